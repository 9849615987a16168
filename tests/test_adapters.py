"""LoRA adapters: nothing at first, W + (alpha / r) B A when trained, and nothing but them changes. References: the torch twin in f64,
dense weights that hold the product, finite differences."""

from __future__ import annotations

import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import ingot
from ingot.configs import ModelConfig
from ingot.errors import CheckpointError, ConfigError
from ingot.models import load_model
from ingot.models.adapters import linear_modules, select_modules
from ingot.models.base import Model
from ingot.models.reference import reference_of
from networks import SHAPES, native, pack, perturbed, twin, worst_ratio

LENGTHS = [5, 1, 0, 66, 9, 13]
ALL = ("logprobs", "entropy", "lse", "zbar", "values", "hidden")
FAMILIES = ["gpt2", "llama", "qwen2", "qwen3", "mixed"]


def build(backend: str, shape: str = "llama", num_values: int = 1, **options: Any) -> Model:
    config = SHAPES[shape]
    if backend == "native":
        return native(config, perturbed(config, num_values), num_values, **options)
    return twin(config, perturbed(config, num_values), num_values, precision="f32")


def fill(model: Model, name: str, seed: int = 0) -> None:
    """Numbers for all of an adapter that matter as much as the weights do."""
    rng = np.random.default_rng(seed)
    adapter = model.adapters[name]
    state = {
        key: (0.3 * rng.standard_normal(array.shape)).astype(np.float32) for key, array in adapter.parameters.items()
    }
    adapter.load_state(state)


def outputs(model: Model, adapter: str | None = None) -> dict[str, Any]:
    packed = pack(model.config, LENGTHS)
    want = ALL if model.num_values else tuple(name for name in ALL if name != "values")
    return dict(model.forward(*packed.arrays, want=want, train=False, adapter=adapter)[1].arrays)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)


def learn(model: Model, steps: int = 3) -> None:
    packed = pack(model.config, LENGTHS)
    for _ in range(steps):
        model.zero_grad()
        model.forward_backward(*packed.arrays, np.full(len(packed.tokens), 0.02, np.float32))
        assert not model.step(1e-2).skipped


# ---- what they compute


@pytest.mark.parametrize("shape", FAMILIES)
def test_a_new_adapter_changes_no_bit(shape: str, level: str) -> None:
    model = build("native", shape, level=level)
    before = outputs(model)
    model.add_adapter("new", rank=3, alpha=5.0)
    assert same(outputs(model, "new"), before)
    assert same(outputs(model, "off"), before)
    assert same(outputs(model), before)
    model.active_adapter = "new"
    assert same(outputs(model), before)


@pytest.mark.parametrize("shape", FAMILIES)
def test_outputs_and_gradients_equal_the_twins(shape: str, level: str) -> None:
    model, reference = build("native", shape, level=level), twin(SHAPES[shape], perturbed(SHAPES[shape], 1), 1)
    for each in (model, reference):
        each.add_adapter("x", rank=3, alpha=4.0)
        fill(each, "x")
    packed = pack(model.config, LENGTHS, share=0.7)
    rng = np.random.default_rng(1)
    num_tokens = len(packed.tokens)
    gradients = {f"d_{name}": rng.standard_normal(num_tokens).astype(np.float32) for name in ALL if name != "hidden"}
    gradients["d_hidden"] = rng.standard_normal((num_tokens, model.config.hidden_size)).astype(np.float32)
    ctx, out = model.forward(*packed.arrays, want=ALL, temperature=0.9, adapter="x")
    twin_ctx, expected = reference.forward(*packed.arrays, want=ALL, temperature=0.9, adapter="x")
    for name in ALL:
        np.testing.assert_allclose(out.arrays[name], expected.arrays[name], rtol=1e-4, atol=2e-5, err_msg=name)
    assert ctx is not None
    model.backward(ctx, **gradients)
    reference.backward(twin_ctx, **{name: array.astype(np.float64) for name, array in gradients.items()})
    ours, theirs = model.adapters["x"].gradients, reference.adapters["x"].gradients
    assert all(array.any() for array in ours.values())
    ratio, name = worst_ratio(ours, dict(theirs), 2e-4, 1e-7)
    assert ratio <= 1.0, f"{name}: {ratio:.2f} times the bound"
    # Nothing below has a gradient.
    for each in (model, reference):
        assert not any(array.any() for array in each.gradients.values())


@pytest.mark.parametrize("network_dropout", [0.0, 0.2])
@pytest.mark.parametrize("shape", FAMILIES)
def test_dropout_has_the_masks_of_the_twin(shape: str, network_dropout: float, level: str) -> None:
    config = dataclasses.replace(SHAPES[shape], dropout=network_dropout)
    weights = perturbed(config, 1)
    model, reference = native(config, weights, 1, level=level), twin(config, weights, 1)
    for each in (model, reference):
        each.add_adapter("x", rank=3, alpha=4.0, dropout=0.4)
        fill(each, "x")
    packed = pack(config, LENGTHS, share=0.7)
    given: dict[str, Any] = {"want": ("logprobs", "values"), "seed": 11, "adapter": "x"}
    given["sequence_ids"] = np.array([4, 9, 2, 2**40, 0, 7], np.int64)
    ctx, out = model.forward(*packed.arrays, **given)
    twin_ctx, expected = reference.forward(*packed.arrays, **given)
    for name in given["want"]:
        np.testing.assert_allclose(out.arrays[name], expected.arrays[name], rtol=2e-4, atol=5e-5, err_msg=name)
    rng = np.random.default_rng(1)
    gradients = {f"d_{name}": rng.standard_normal(len(packed.tokens)).astype(np.float32) for name in given["want"]}
    assert ctx is not None
    model.backward(ctx, **gradients)
    reference.backward(twin_ctx, **{name: array.astype(np.float64) for name, array in gradients.items()})
    ratio, name = worst_ratio(model.adapters["x"].gradients, dict(reference.adapters["x"].gradients), 5e-4, 1e-6)
    assert ratio <= 1.0, f"{name}: {ratio:.2f} times the bound"
    # The fused pass draws the same masks, another seed others, and without training there are none.
    at_once = native(config, weights, 1, level=level)
    at_once.add_adapter("x", rank=3, alpha=4.0, dropout=0.4)
    fill(at_once, "x")
    counts = np.where(packed.targets >= 0, 0.1, 0.0).astype(np.float32)
    ids = given["sequence_ids"]
    loss = at_once.forward_backward(*packed.arrays, counts, seed=11, sequence_ids=ids, adapter="x")
    assert loss == pytest.approx(-float(counts @ out.logprobs.astype(np.float64)), rel=1e-6)
    other = model.forward(*packed.arrays, **{**given, "seed": 12})[1]
    assert abs(other.logprobs - out.logprobs).max() > 1e-3
    plain = native(SHAPES[shape], weights, 1, level=level)
    plain.add_adapter("x", rank=3, alpha=4.0)
    fill(plain, "x")
    assert same(outputs(model, "x"), outputs(plain, "x"))


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("own", [0, 2])
def test_an_adapter_has_as_many_heads_as_it_wants(own: int, backend: str, tmp_path: Path) -> None:
    model = build(backend, num_values=own)
    model.add_adapter("three", rank=2, num_values=3)
    model.add_adapter("none", rank=2, num_values=0)
    model.add_adapter("same", rank=2)
    packed = pack(model.config, LENGTHS)
    for name in ("three", "none", "same"):
        fill(model, name, seed=len(name))

    def values(of: Model, name: str) -> Any:
        return of.forward(*packed.arrays, want=("values",), train=False, adapter=name)[1].values

    assert values(model, "three").shape == (len(packed.tokens), 3)
    for name in ("none", "same", "off"):
        if name == "none" or not own:
            with pytest.raises(ConfigError, match="no scalar heads"):
                values(model, name)
        else:
            assert values(model, name).shape == (len(packed.tokens), 2)
    # What is asked without a name goes through the active one.
    assert model.num_values == own
    model.active_adapter = "three"
    assert model.num_values == 3
    # They are trained and written with it, and come back as many.
    before = model.state()
    ctx, out = model.forward(*packed.arrays, want=("values",))
    model.backward(ctx, d_values=np.ones_like(out.values))
    assert model.adapters["three"].gradients["score.bias"].tolist() == pytest.approx([len(packed.tokens)] * 3)
    model.step(1e-2)
    assert same(model.state(), before)
    model.save_adapter("three", tmp_path / "adapter")
    again = build("native", num_values=own)
    assert again.load_adapter(tmp_path / "adapter", "x").num_values == 3
    np.testing.assert_allclose(values(again, "x"), values(model, "three"), rtol=1e-4, atol=1e-4)
    # In a folder with the adapter merged they are the model's; in place they have no room.
    model.save(tmp_path / "merged")
    merged = load_model(tmp_path / "merged")
    assert merged.num_values == 3
    np.testing.assert_allclose(values(merged, "off"), values(model, "three"), rtol=1e-3, atol=1e-4)
    with pytest.raises(ConfigError, match=f"has 3 scalar heads and the model {own}"):
        model.merge_adapter("three")
    twice = model.fork()
    assert twice.num_values == 3
    assert same({"v": values(twice, "three")}, {"v": values(model, "three")})


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_the_gradient_is_the_slope(shape: str) -> None:
    model = build("native", shape, num_values=0)
    model.add_adapter("x", rank=2)
    fill(model, "x")
    model.active_adapter = "x"
    packed = pack(model.config, [3, 9, 14], share=1.0)
    weights = np.full(len(packed.tokens), 1 / len(packed.tokens), np.float32)
    model.forward_backward(*packed.arrays, weights)
    adapter = model.adapters["x"]

    def loss() -> float:
        return -float(model.forward(*packed.arrays, train=False)[1].logprobs.mean(dtype=np.float64))

    for name, weight in adapter.parameters.items():
        gradient = adapter.gradients[name].astype(np.float64)
        size = np.linalg.norm(gradient)
        if size < 1e-4:
            continue
        step, start = 0.0007 / size**2 * gradient, weight.copy()
        weight[...] = start + step
        above = loss()
        weight[...] = start - step
        slope = (above - loss()) / (2 * np.linalg.norm(step))
        weight[...] = start
        assert slope == pytest.approx(size, rel=1e-2), name


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_dropout_and_the_fused_pass_go_through_them(shape: str) -> None:
    config = dataclasses.replace(SHAPES[shape], dropout=0.2)
    model = native(config, perturbed(config))
    model.add_adapter("x", rank=2)
    fill(model, "x")
    packed = pack(config, LENGTHS)
    weights = np.random.default_rng(3).random(len(packed.tokens)).astype(np.float32)
    loss = model.forward_backward(*packed.arrays, weights, seed=5, adapter="x")
    fused = {name: array.copy() for name, array in model.adapters["x"].gradients.items()}
    model.zero_grad()
    assert not any(array.any() for array in model.adapters["x"].gradients.values())
    ctx, out = model.forward(*packed.arrays, seed=5, adapter="x")
    assert ctx is not None
    model.backward(ctx, d_logprobs=-weights)
    assert loss == pytest.approx(-(weights * out.logprobs.astype(np.float64)).sum(), rel=1e-12)
    for name, array in model.adapters["x"].gradients.items():
        np.testing.assert_array_equal(array, fused[name], err_msg=name)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("shape", FAMILIES)
def test_merging_gives_the_same_function_and_unmerging_the_weights_back(shape: str, backend: str) -> None:
    model = build(backend, shape)
    model.add_adapter("x", rank=3)
    fill(model, "x")
    model.add_adapter("y")
    before, through = model.state(), outputs(model, "x")
    assert not np.allclose(through["logprobs"], outputs(model)["logprobs"], atol=1e-2)
    model.merge_adapter("x")
    model.active_adapter = "x"
    merged = outputs(model)
    for name in ALL:
        np.testing.assert_allclose(merged[name], through[name], rtol=1e-4, atol=5e-5, err_msg=name)
    for other in ("off", "y"):
        with pytest.raises(RuntimeError, match="adapter 'x' is merged into the weights: unmerge it first"):
            outputs(model, other)
    with pytest.raises(RuntimeError, match="unmerge it"):
        model.merge_adapter("y")
    for forbidden in (lambda: model.step(1e-3), lambda: model.load_state(before), lambda: model.add_adapter("z")):
        with pytest.raises(RuntimeError, match="unmerge it first"):
            forbidden()
    fork = model.fork()
    assert same(outputs(fork), merged)
    model.unmerge_adapter()
    assert same(outputs(fork), merged)
    fork.unmerge_adapter()
    for each in (model, fork):
        for name, array in each.state().items():
            np.testing.assert_allclose(array, before[name], atol=1e-6, err_msg=name)
    with pytest.raises(RuntimeError, match="no adapter is merged"):
        model.unmerge_adapter()


@pytest.mark.parametrize("shape", ["gpt2", "llama", "qwen3"])
def test_a_dense_model_with_the_product_is_the_same_function(shape: str) -> None:
    model = build("native", shape)
    model.add_adapter("x", rank=3, alpha=7.0)
    fill(model, "x")
    weights, adapter = model.state(), model.adapters["x"].state()
    for module in linear_modules(model.config):
        product = adapter[f"{module}.lora_B.weight"].astype(np.float64) @ adapter[f"{module}.lora_A.weight"]
        delta = (7.0 / 3) * product
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + (delta.T if shape == "gpt2" else delta)
    weights |= {name: array for name, array in adapter.items() if name.startswith("score.")}
    dense = native(model.config, {name: array.astype(np.float32) for name, array in weights.items()}, 1)
    expected = outputs(dense)
    for name, array in outputs(model, "x").items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=5e-5, err_msg=name)


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_decoding_goes_through_them_with_the_bits_of_training(shape: str, level: str) -> None:
    model = build("native", shape, num_values=0, level=level)
    model.add_adapter("x", rank=3)
    fill(model, "x")
    decoder = model.decoder(12, 2, adapter="x")
    decoder.add([3, 1, 4], 0)
    decoder.add([2], 1)
    steps = [decoder.step() for _ in range(8)]
    for slot, prompt in enumerate(([3, 1, 4], [2])):
        written = [int(step.tokens[slot]) for step in steps]
        tokens = np.array(prompt + written, np.int32)
        targets = np.append(tokens[1:], np.int32(-1))
        _, out = model.forward(tokens, np.array([0, len(tokens)]), targets, adapter="x", train=False)
        decoded = np.array([step.logprobs[slot] for step in steps])
        np.testing.assert_array_equal(out.logprobs[len(prompt) - 1 : -1], decoded)
    model.active_adapter = "x"
    active = model.decoder(12, 1)
    active.add([3, 1, 4], 0)
    assert active.step().logprobs[0] == steps[0].logprobs[0]


# ---- what training them changes


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_training_changes_the_active_adapter_alone(shape: str, backend: str) -> None:
    model = build(backend, shape)
    for name in ("policy", "judge"):
        model.add_adapter(name, rank=2, seed=len(name))
    weights, judge, off = model.state(), model.adapters["judge"].state(), outputs(model, "off")
    first = model.adapters["policy"].state()
    model.active_adapter = "policy"
    learn(model)
    policy = outputs(model)
    assert not same(policy, off)
    # A only moves once B is not 0 any more; the heads had no gradient.
    moved = {name for name, array in model.adapters["policy"].state().items() if not np.array_equal(array, first[name])}
    assert moved == {name for name in first if "lora" in name} | {"score.weight"}  # decay
    assert same(weights, model.state())
    assert same(judge, model.adapters["judge"].state())
    assert same(outputs(model, "off"), off)
    assert same(outputs(model, "judge"), off)
    model.active_adapter = "judge"
    learn(model, 2)
    assert same(outputs(model, "policy"), policy)
    assert not same(outputs(model, "judge"), off)
    assert same(outputs(model, "off"), off)
    # The weights themselves can still be trained.
    model.active_adapter = None
    learn(model, 1)
    assert not same(weights, model.state())


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_scalar_heads_are_trained_with_the_adapter(backend: str) -> None:
    model = build(backend)
    off = outputs(model, "off")
    model.add_adapter("critic")
    model.active_adapter = "critic"
    packed = pack(model.config, LENGTHS)
    for _ in range(2):
        model.zero_grad()
        ctx, out = model.forward(*packed.arrays, want=("values",))
        assert ctx is not None
        model.backward(ctx, d_values=(out.values - 1.0) / len(packed.tokens))
        model.step(1e-2)
    own = model.adapters["critic"].state()
    assert (own["score.weight"] != model.state()["score.weight"]).all()
    assert (own["score.bias"] != model.state()["score.bias"]).all()
    assert same(outputs(model, "off"), off)
    assert abs(outputs(model)["values"] - 1).mean() < abs(off["values"] - 1).mean()


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_forks_have_copies_of_the_adapters(backend: str) -> None:
    policy = build(backend)
    policy.add_adapter("x")
    policy.active_adapter = "x"
    learn(policy, 1)
    reference = reference_of(policy)
    before = outputs(reference)
    assert same(before, outputs(policy))
    learn(policy)
    assert same(before, outputs(reference))
    assert not same(before, outputs(policy))
    assert same(outputs(policy, "off"), outputs(reference, "off"))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_saved_state_goes_on_with_the_same_bits(backend: str) -> None:
    whole, cut = build(backend), build(backend)
    for model in (whole, cut):
        model.add_adapter("x", seed=4)
        model.active_adapter = "x"
        learn(model, 2)
    adapter, moments = cut.adapters["x"].state(), cut.optimizer.state()
    names = set(adapter)
    assert set(moments) == {"step"} | {f"m.{name}" for name in names} | {f"v.{name}" for name in names}
    again = build(backend)
    again.add_adapter("x")
    again.active_adapter = "x"
    again.adapters["x"].load_state(adapter)
    again.optimizer.load_state(moments)
    learn(whole)
    learn(again)
    assert same(whole.adapters["x"].state(), again.adapters["x"].state())
    assert same(outputs(whole), outputs(again))


def test_contexts_go_stale_with_the_adapter() -> None:
    model = build("native")
    adapter = model.add_adapter("x")
    packed = pack(model.config, LENGTHS)
    ctx, _ = model.forward(*packed.arrays, adapter="x")
    adapter.load_state(adapter.state())
    assert ctx is not None
    with pytest.raises(RuntimeError, match="the parameters changed"):
        model.backward(ctx, d_logprobs=np.ones(len(packed.tokens), np.float32))


def test_training_one_takes_memory_for_it_alone() -> None:
    config = ModelConfig.llama(
        vocab_size=30_000, hidden_size=512, num_hidden_layers=1, num_attention_heads=8, tie_word_embeddings=False
    )
    model = ingot.Model(config, threads=1)
    weights = 4 * model.num_parameters
    packed = pack(config, [16, 16])

    def train(trained: Model) -> int:
        adapter = trained.add_adapter("x", rank=64)
        trained.active_adapter = "x"
        for _ in range(2):
            trained.zero_grad()
            trained.forward_backward(*packed.arrays, np.full(32, 1 / 32, np.float32))
            trained.step(1e-3)
        return adapter.num_parameters

    process = psutil.Process()
    # What activations take, which every kind of training has; a fork works in the same memory.
    train(model.fork())
    gc.collect()
    before = process.memory_info().rss
    num_parameters = train(model)
    gc.collect()
    grown = process.memory_info().rss - before
    # Weights, gradients and two moments of the adapter; no gradient, no moment and no copy of the model.
    assert grown < 4 * 4 * num_parameters + 0.05 * weights


# ---- names, settings, files


def test_targets_are_names_or_their_ends() -> None:
    modules = list(linear_modules(SHAPES["llama"]))
    assert len(modules) == 7 * SHAPES["llama"].num_hidden_layers
    assert select_modules(modules, "all-linear") == modules
    assert select_modules(modules, ["q_proj", "v_proj"]) == [m for m in modules if m.endswith(("q_proj", "v_proj"))]
    assert select_modules(modules, ["layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]
    with pytest.raises(
        ConfigError, match=r"no linear layer is named 'c_attn'; there are q_proj, k_proj, v_proj, o_proj"
    ):
        select_modules(modules, ["q_proj", "c_attn"])
    with pytest.raises(ConfigError, match=r"target_modules is 'q_proj'; give 'all-linear' or a list"):
        select_modules(modules, "q_proj")
    with pytest.raises(ConfigError, match="names no layer"):
        select_modules(modules, [])


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_what_is_wrong_is_named(backend: str) -> None:
    model = build(backend)
    model.add_adapter("x")
    for name in ("x", "off", "", "a/b"):
        with pytest.raises(ConfigError, match="give another name"):
            model.add_adapter(name)
    with pytest.raises(ConfigError, match="rank must be at least 1, got 0"):
        model.add_adapter("y", rank=0)
    with pytest.raises(ConfigError, match="alpha must be positive"):
        model.add_adapter("y", alpha=0.0)
    with pytest.raises(ConfigError, match="the model has no adapter 'z'; it has 'x'"):
        outputs(model, "z")
    with pytest.raises(ConfigError, match="no adapter 'z'"):
        model.active_adapter = "z"


def test_both_backends_begin_with_the_same_numbers() -> None:
    states = []
    for backend in ("native", "torch"):
        model = build(backend)
        states.append(model.add_adapter("x", rank=5, seed=7).state())
    assert list(states[0]) == list(states[1])
    assert same(*states)
    for name, array in states[0].items():
        if "lora_A" in name:
            bound = 1 / np.sqrt(array.shape[1])
            assert 0.8 * bound < np.abs(array).max() <= bound
        if "lora_B" in name:
            assert not array.any()


@pytest.mark.parametrize(("writer", "reader"), [("native", "torch"), ("torch", "native"), ("native", "native")])
@pytest.mark.parametrize("shape", ["gpt2", "qwen3"])
def test_files_come_back_as_they_were(shape: str, writer: str, reader: str, tmp_path: Path) -> None:
    model = build(writer, shape)
    targets = ["c_attn", "mlp.c_proj"] if shape == "gpt2" else ["q_proj", "up_proj"]
    model.add_adapter("x", rank=3, alpha=5.0, target_modules=targets, dropout=0.05)
    fill(model, "x")
    model.adapters["x"].base_model, model.adapters["x"].base_hash = "some/base", "some hash"
    model.save_adapter("x", tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 3, 5.0)
    assert settings["fan_in_fan_out"] == (shape == "gpt2")
    assert settings["base_model_name_or_path"] == "some/base"
    assert settings["lora_dropout"] == 0.05
    if shape == "qwen3":
        assert settings["target_modules"] == ["q_proj", "up_proj"]
    again = build(reader, shape)
    adapter = again.load_adapter(tmp_path, "y")
    assert same(adapter.state(), model.adapters["x"].state())
    assert (adapter.base_model, adapter.base_hash) == ("some/base", "some hash")
    assert adapter.settings == model.adapters["x"].settings
    if writer == reader:
        assert same(outputs(again, "y"), outputs(model, "x"))


def test_files_of_another_kind_are_refused_by_name(tmp_path: Path) -> None:
    model = build("native")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: missing"):
        model.load_adapter(tmp_path)
    model.add_adapter("x")
    model.save_adapter("x", tmp_path)
    path = tmp_path / "adapter_config.json"
    settings = json.loads(path.read_text())
    for key, value in (("peft_type", "IA3"), ("use_dora", True), ("use_rslora", True), ("bias", "all")):
        path.write_text(json.dumps({**settings, key: value}))
        with pytest.raises(CheckpointError, match=f"adapter_config.json: {key} is"):
            model.load_adapter(tmp_path)
    path.write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"is for another network, with model\.layers"):
        build("native", "gpt2").load_adapter(tmp_path)
    with pytest.raises(CheckpointError, match="wrong shape"):
        build("native", "qwen3").load_adapter(tmp_path)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        model.load_adapter(tmp_path)
    assert list(model.adapters) == ["x"]


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_saving_merges_the_active_adapter(backend: str, tmp_path: Path) -> None:
    model = build(backend, "gpt2")
    model.add_adapter("x")
    fill(model, "x")
    model.save(tmp_path / "base")
    model.active_adapter = "x"
    model.save(tmp_path / "merged")
    opened = ingot.load_model(tmp_path / "merged")
    expected = outputs(model)
    for name, array in outputs(opened).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=5e-5, err_msg=name)
    assert same(ingot.load_model(tmp_path / "base").state(), model.state())


def test_views_of_ones_own_memory_are_no_arguments() -> None:
    model = build("native")
    adapter = model.add_adapter("x")
    size = adapter.parameters["model.layers.0.mlp.up_proj.lora_A.weight"].size
    rows = pack(model.config, [size])
    for own in (adapter.parameters, adapter.gradients):
        view = own["model.layers.0.mlp.up_proj.lora_A.weight"].reshape(-1)
        with pytest.raises(ValueError, match="weights: is a view of the model's own memory"):
            model.forward_backward(*rows.arrays, view, adapter="x")
