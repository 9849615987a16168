"""The crossing into the native core: arrays are refused unless they are exact, views share memory, contexts are used once."""

from __future__ import annotations

import dataclasses
import gc
import re
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest

import ingot
from ingot import _native
from ingot.errors import CheckpointError, ConfigError
from ingot.models.base import Model
from ingot.models.native import NativeModel
from networks import SHAPES, pack, perturbed

LENGTHS = [5, 0, 9, 1]
LLAMA = SHAPES["llama"]
# Large enough for a call to take a while.
SLOW = ingot.ModelConfig.llama(vocab_size=61, hidden_size=128, num_hidden_layers=6, num_attention_heads=4)


def make(config: ingot.ModelConfig, num_values: int = 0, **options: Any) -> Model:
    """A model with weights far from their initial values."""
    model = ingot.Model(config, num_values=num_values, **options)
    model.load_state(perturbed(config, num_values))
    return model


def batch(lengths: list[int], config: ingot.ModelConfig = LLAMA) -> tuple[Any, Any, Any]:
    """Sequences of these lengths; every row has a target but the last of each sequence."""
    packed = pack(config, lengths, share=1.0)
    targets = packed.targets.copy()
    targets[packed.offsets[1:][np.array(lengths) > 0] - 1] = -1
    return packed.tokens, packed.offsets, targets


@pytest.fixture(params=["gpt2", "llama", "qwen3"])
def model(request: pytest.FixtureRequest) -> Model:
    return make(SHAPES[request.param], num_values=1)


def bits(array: Any) -> Any:
    return np.asarray(array).view(np.uint32)


# ---- arrays in


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("tokens", np.zeros(15, np.int64), TypeError),
        ("tokens", np.zeros((15, 1), np.int32), ValueError),
        ("tokens", np.zeros(30, np.int32)[::2], ValueError),
        ("tokens", np.zeros(15, ">i4"), TypeError),
        ("tokens", np.frombuffer(bytes(61), np.uint8)[1:].view(np.int32), ValueError),
        ("tokens", [0] * 15, TypeError),
        ("offsets", np.array([0, 5, 5, 14, 15], np.int32), TypeError),
        ("targets", np.zeros(14, np.int32), ValueError),
        ("value_rows", np.zeros(15, np.int8), TypeError),
        ("hidden_rows", np.zeros(2, np.int32), TypeError),
        ("sequence_ids", np.zeros(3, np.int64), ValueError),
    ],
)
def test_forward_names_dtype_shape_and_strides(model: Model, name: str, value: Any, error: type[Exception]) -> None:
    tokens, offsets, targets = batch(LENGTHS, model.config)
    arguments = {"tokens": tokens, "offsets": offsets, "targets": targets, name: value}
    with pytest.raises(error) as caught:
        model.forward(**arguments)
    message = str(caught.value)
    assert message.startswith(f"{name}: needs a C-contiguous ")
    if isinstance(value, np.ndarray):
        assert str(value.dtype) in message
        assert f"shape {list(value.shape)}" in message
        assert f"strides {list(value.strides)} bytes" in message


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("d_logprobs", np.zeros(15), TypeError),
        ("d_logprobs", np.zeros(14, np.float32), ValueError),
        ("d_entropy", np.zeros((15, 1), np.float32), ValueError),
        ("d_values", np.zeros((15, 2), np.float32), ValueError),
        ("d_hidden", np.zeros((20, 15), np.float32).T, ValueError),
    ],
)
def test_backward_names_what_is_wrong_and_leaves_the_context_usable(
    model: Model, name: str, value: Any, error: type[Exception]
) -> None:
    ctx, _ = model.forward(*batch(LENGTHS, model.config), want=("logprobs", "entropy", "values", "hidden"))
    assert ctx is not None
    with pytest.raises(error, match=f"^{name}: needs a C-contiguous float32 array of shape"):
        model.backward(ctx, **{name: value})
    assert not ctx.spent
    model.backward(ctx, d_logprobs=np.ones(15, np.float32))
    assert ctx.spent


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": 35}, IndexError, r"tokens\[3\] is 35, outside 0\.\.35"),
        ({"tokens": -1}, IndexError, r"tokens\[3\] is -1, outside 0\.\.35"),
        ({"targets": -2}, IndexError, r"targets\[3\] is -2, outside -1\.\.35"),
        ({"offsets": 4}, ValueError, "offsets: decreases from 14 to 4 at index 4"),
        ({"temperature": 0.0}, ValueError, "temperature: must be a positive number, got 0"),
        ({"temperature": float("nan")}, ValueError, "temperature: must be a positive number"),
        ({"banned_ids": [35]}, IndexError, r"banned_ids\[0\] is 35"),
        ({"banned_ids": [1.5]}, ConfigError, "banned_ids: needs a list of token ids"),
        ({"banned_ids": range(35)}, ValueError, "banned_ids: names the whole vocabulary"),
        ({"want": ("logprobs", "speed")}, ConfigError, "want has no output named 'speed'"),
        ({"want": "logprobs"}, ConfigError, "want takes a collection of names"),
        ({"seed": -1}, ConfigError, "seed must be between 0 and"),
        ({"seed": 1 << 64}, ConfigError, "seed must be between 0 and"),
        ({"hidden_rows": np.array([15]), "want": ("hidden",)}, IndexError, r"hidden_rows\[0\] is 15"),
    ],
)
def test_forward_refuses_values_that_make_no_sense(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = ingot.Model(SHAPES["qwen3"])
    tokens, offsets, targets = batch(LENGTHS, model.config)
    arguments: dict[str, Any] = {"tokens": tokens, "offsets": offsets, "targets": targets}
    for name, value in change.items():
        if name in ("tokens", "targets", "offsets"):
            arguments[name] = arguments[name].copy()
            arguments[name][-1 if name == "offsets" else 3] = value
        else:
            arguments[name] = value
    with pytest.raises(error, match=message):
        model.forward(**arguments)


def test_learned_positions_are_a_limit_and_rotary_ones_are_not() -> None:
    with pytest.raises(ConfigError, match=r"sequence 1 has 131 tokens, but the learned positions end at .* 130"):
        ingot.Model(SHAPES["gpt2"]).forward(*batch([2, 131], SHAPES["gpt2"]))
    ingot.Model(dataclasses.replace(LLAMA, max_position_embeddings=16)).forward(*batch([131]))


def test_a_view_of_the_models_memory_is_no_gradient(model: Model) -> None:
    name = next(name for name in model.parameters if name.endswith("k.weight") or "norm" in name or "ln_f" in name)
    own = model.parameters[name]
    ctx, _ = model.forward(*batch([len(own)], model.config))
    assert ctx is not None
    with pytest.raises(ValueError, match="d_logprobs: is a view of the model's own memory"):
        model.backward(ctx, d_logprobs=own)
    with pytest.raises(ValueError, match="weights: is a view of the model's own memory"):
        model.forward_backward(*batch([len(own)], model.config), model.gradients[name])
    model.backward(ctx, d_logprobs=own.copy())


# ---- outputs


def test_outputs_are_there_when_asked_for(model: Model) -> None:
    tokens, offsets, targets = batch(LENGTHS, model.config)
    want = ("logprobs", "entropy", "lse", "zbar", "top1", "values", "hidden")
    rows = np.array([3, 0, 3])
    value_rows = np.arange(15) % 2 == 0
    ctx, out = model.forward(tokens, offsets, targets, want=want, hidden_rows=rows, value_rows=value_rows, train=False)
    assert ctx is None
    assert {name: (array.dtype.name, array.shape) for name, array in out.arrays.items()} == {
        **dict.fromkeys(("logprobs", "entropy", "lse", "zbar", "values"), ("float32", (15,))),
        "top1": ("bool", (15,)),
        "hidden": ("float32", (3, model.config.hidden_size)),
    }
    np.testing.assert_array_equal(out.logprobs == 0, targets < 0)
    np.testing.assert_array_equal(out.values != 0, value_rows)
    np.testing.assert_array_equal(out.hidden[0], out.hidden[2])
    _, out = model.forward(tokens, offsets, targets, train=False)
    with pytest.raises(AttributeError, match="entropy was not computed: add 'entropy' to forward's want"):
        _ = out.entropy


def test_k_scalar_heads_give_k_columns() -> None:
    model = make(LLAMA, num_values=3)
    ctx, out = model.forward(*batch(LENGTHS, model.config), want=("values", "hidden"))
    assert ctx is not None
    assert out.values.shape == (15, 3)
    expected = out.hidden @ model.parameters["score.weight"].T + model.parameters["score.bias"]
    np.testing.assert_allclose(out.values, expected, atol=1e-5)
    d_values = np.random.default_rng(0).normal(size=(15, 3)).astype(np.float32)
    model.backward(ctx, d_values=d_values)
    np.testing.assert_allclose(model.gradients["score.weight"], d_values.T @ out.hidden, atol=1e-4)
    np.testing.assert_allclose(model.gradients["score.bias"], d_values.sum(0), atol=1e-5)


def test_values_need_a_head() -> None:
    with pytest.raises(ConfigError, match="no scalar heads: make it with num_values"):
        ingot.Model(LLAMA).forward(*batch(LENGTHS), want=("values",))


# ---- views


def test_views_share_the_models_memory(model: Model) -> None:
    tokens, offsets, targets = batch(LENGTHS, model.config)
    _, before = model.forward(tokens, offsets, targets, train=False)
    saved = model.state()
    for name, view in model.parameters.items():
        assert view.dtype == np.float32
        assert view.flags.writeable
        assert not view.flags.owndata
        view[...] = 0.0
        _, after = model.forward(tokens, offsets, targets, train=False)
        assert not np.array_equal(before.logprobs, after.logprobs) or name.startswith("score"), name
        view[...] = saved[name]
    _, after = model.forward(tokens, offsets, targets, train=False)
    np.testing.assert_array_equal(bits(before.logprobs), bits(after.logprobs))


def test_gpt2_linear_layers_are_shown_as_transformers_shows_them() -> None:
    model = ingot.Model(SHAPES["gpt2"])
    fused, d = model.parameters["transformer.h.0.attn.c_attn.weight"], model.config.hidden_size
    assert fused.shape == (d, 3 * d)
    assert fused.strides == (4, 4 * d)
    assert model.parameters["transformer.wte.weight"].flags.c_contiguous


def test_views_outlive_the_model() -> None:
    model = ingot.Model(LLAMA)
    view = model.parameters["model.norm.weight"]
    gradient = model.gradients["model.norm.weight"]
    del model
    gc.collect()
    # Whoever takes freed memory next would be seen here.
    others = [ingot.Model(LLAMA, seed=seed) for seed in range(3)]
    np.testing.assert_array_equal(view, np.ones(LLAMA.hidden_size))
    np.testing.assert_array_equal(gradient, np.zeros(LLAMA.hidden_size))
    del others


def test_gradients_are_views_that_backward_adds_to_and_step_reads(model: Model) -> None:
    views = model.gradients
    assert all(not view.any() for view in views.values())
    tokens, offsets, targets = batch(LENGTHS, model.config)
    weights = np.ones(15, np.float32)
    model.forward_backward(tokens, offsets, targets, weights)
    once = {name: view.copy() for name, view in views.items()}
    model.forward_backward(tokens, offsets, targets, weights)
    for name, view in views.items():
        np.testing.assert_allclose(view, 2 * once[name], rtol=1e-5, atol=1e-5)
    model.zero_grad()
    assert all(not view.any() for view in views.values())
    name = next(iter(views))
    before = model.state()
    views[name][0] = 1.0
    model.step(0.1)
    changed = {key for key, view in model.parameters.items() if (view != before[key]).any()}
    # Weight decay changes matrices; vectors have neither gradient nor decay.
    assert name in changed
    assert all(before[key].ndim == 2 for key in changed)


def test_fused_and_separate_passes_agree(model: Model) -> None:
    tokens, offsets, targets = batch(LENGTHS, model.config)
    weights = np.random.default_rng(0).normal(size=15).astype(np.float32)
    loss = model.forward_backward(
        tokens, offsets, targets, weights, temperature=0.7, banned_ids=[model.config.vocab_size - 1]
    )
    fused = {name: view.copy() for name, view in model.gradients.items()}
    model.zero_grad()
    ctx, out = model.forward(tokens, offsets, targets, temperature=0.7, banned_ids=[model.config.vocab_size - 1])
    assert ctx is not None
    model.backward(ctx, d_logprobs=-weights)
    assert loss == pytest.approx(-(weights * out.logprobs).astype(np.float64).sum(), rel=1e-6)
    for name, view in model.gradients.items():
        np.testing.assert_allclose(fused[name], view, rtol=1e-4, atol=1e-6)


# ---- contexts


def test_contexts_are_used_once_and_only_on_their_weights(model: Model) -> None:
    data = batch(LENGTHS, model.config)
    ones = np.ones(15, np.float32)
    first, _ = model.forward(*data)
    second, _ = model.forward(*data)
    assert first is not None
    assert second is not None
    model.backward(first, d_logprobs=ones)
    with pytest.raises(RuntimeError, match="already used by a backward pass"):
        model.backward(first, d_logprobs=ones)
    model.step(1e-3)
    with pytest.raises(RuntimeError, match="the parameters changed after this context was made"):
        model.backward(second, d_logprobs=ones)
    third, _ = model.forward(*data)
    model.load_state(model.state())
    assert third is not None
    with pytest.raises(RuntimeError, match="the parameters changed"):
        model.backward(third, d_logprobs=ones)
    other, _ = ingot.Model(model.config).forward(*data)
    assert other is not None
    with pytest.raises(RuntimeError, match="belongs to another model"):
        model.backward(other, d_logprobs=ones)
    nothing, _ = model.forward(*data, train=False)
    with pytest.raises(TypeError, match="train=True"):
        model.backward(nothing, d_logprobs=ones)  # type: ignore[arg-type]


def test_gradients_of_outputs_that_were_not_asked_for_are_refused(model: Model) -> None:
    ctx, _ = model.forward(*batch(LENGTHS, model.config))
    assert ctx is not None
    with pytest.raises(ValueError, match="d_values: was given, but the forward pass was not asked for values"):
        model.backward(ctx, d_values=np.ones(15, np.float32))


def test_step_without_gradients_says_so() -> None:
    with pytest.raises(RuntimeError, match="no gradients yet"):
        ingot.Model(LLAMA).step(1e-3)


# ---- threads and signals


def test_a_second_thread_gets_an_error_and_not_a_race() -> None:
    model = ingot.Model(SLOW, threads=1)
    data = batch([200] * 16, SLOW)
    started = threading.Event()

    def work() -> None:
        started.set()
        for _ in range(5):
            model.forward(*data, train=False)

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    messages = set()
    while thread.is_alive():
        try:
            model.zero_grad()
        except RuntimeError as error:
            messages.add(str(error))
        time.sleep(0.001)
    thread.join()
    assert messages == {"this model is in use by another thread: take turns, or give each thread a model of its own"}
    model.zero_grad()


def test_other_python_threads_run_meanwhile() -> None:
    model = ingot.Model(SLOW, threads=1)
    data = batch([200] * 16, SLOW)
    ticks = 0
    done = threading.Event()

    def count() -> None:
        nonlocal ticks
        while not done.wait(0.001):
            ticks += 1

    thread = threading.Thread(target=count)
    thread.start()
    began = time.perf_counter()
    model.forward(*data, train=False)
    elapsed_s = time.perf_counter() - began
    seen = ticks
    done.set()
    thread.join()
    assert seen > 50 * elapsed_s


def test_interrupt_arrives_between_calls() -> None:
    # In a process of its own: pytest has its own idea of Ctrl-C.
    program = """
import os, signal, threading, time
import numpy as np
import ingot
model = ingot.Model(ingot.ModelConfig.llama(vocab_size=61, hidden_size=128, num_hidden_layers=4, num_attention_heads=4))
tokens = np.zeros(4000, np.int32)
offsets = np.arange(0, 4001, 200)
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
began = time.perf_counter()
try:
    while True:
        model.forward(tokens, offsets, tokens)
except KeyboardInterrupt:
    print("interrupted", time.perf_counter() - began < 5)
model.forward(tokens, offsets, tokens)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (result.stdout, result.returncode) == ("interrupted True\n", 0), result.stderr


# ---- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "int4"}, "precision is 'int4'"),
        ({"precision": "bf16"}, "precision is 'bf16'; the native backend has 'f32'"),
        ({"backend": "jax"}, "backend is 'jax'; there are 'native' and 'torch'"),
        ({"device": "cuda"}, "the native backend computes on the CPU"),
        ({"level": "mmx"}, 'level is "mmx"; there are portable, avx2 and avx512'),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"num_values": -1}, "num_values must be 0 or more, got -1"),
        ({"backend": "torch", "level": "avx2"}, "level is a setting of the native backend"),
        ({"seed": -1}, "seed must be between 0 and"),
    ],
)
def test_settings_that_do_not_exist_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ingot.Model(LLAMA, **settings)


def test_level_and_threads_are_taken(level: str) -> None:
    model = ingot.Model(LLAMA, level=level, threads=3)
    assert (model.level, model.threads) == (level, 3)
    assert (model.backend, model.num_values) == ("native", 0)


def test_levels_agree(level: str) -> None:
    """AVX2 and AVX-512 to the bit; the portable one, which does not fuse, closely."""
    data = batch([70, 3], SHAPES["qwen3"])
    best = make(SHAPES["qwen3"])
    model = make(SHAPES["qwen3"], level=level)
    expected, got = (m.forward(*data, train=False)[1].logprobs for m in (best, model))
    if level == "portable":
        np.testing.assert_allclose(got, expected, atol=1e-4)
    else:
        np.testing.assert_array_equal(bits(got), bits(expected))


def test_build_info_has_the_facts() -> None:
    info = ingot.build_info(threads=5)
    assert info["version"] == ingot.__version__
    assert info["level"] == info["levels_available"][-1]
    assert info["levels_available"][0] == "portable"
    assert info["threads"] == 5
    assert ingot.build_info()["threads"] >= 1
    with pytest.raises(ConfigError, match="threads must be at least 1"):
        ingot.build_info(threads=0)


def test_affinity_is_the_default_number_of_threads() -> None:
    program = "import os, ingot; os.sched_setaffinity(0, [0]); print(ingot.build_info()['threads'])"
    if not hasattr(__import__("os"), "sched_setaffinity"):
        pytest.skip("this system has no CPU affinity")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "1\n"


def test_repr_is_a_table_whose_numbers_add_up(model: Model) -> None:
    lines = repr(model).splitlines()
    assert f"{model.num_parameters:,} parameters" in lines[0]
    assert sum(int(line.split()[-1].replace(",", "")) for line in lines[1:]) == model.num_parameters
    assert sum(array.size for array in model.parameters.values()) == model.num_parameters
    heads = sum(model.parameters[name].size for name in ("score.weight", "score.bias"))
    assert model.config.num_parameters + heads == model.num_parameters


# ---- state


def test_state_is_a_copy_and_loads_strictly(model: Model) -> None:
    state = model.state()
    assert all(array.flags.c_contiguous and array.flags.owndata for array in state.values())
    other = ingot.Model(model.config, seed=9, num_values=1)
    other.load_state(state)
    data = batch(LENGTHS, model.config)
    np.testing.assert_array_equal(
        bits(model.forward(*data, train=False)[1].logprobs), bits(other.forward(*data, train=False)[1].logprobs)
    )
    name = next(iter(state))
    for broken, message in (
        ({key: value for key, value in state.items() if key != name}, f"missing: {re.escape(name)}"),
        ({**state, "extra.weight": state[name]}, "surplus: extra.weight"),
        ({**state, name: state[name][:-1]}, f"wrong shape: {re.escape(name)} is"),
    ):
        with pytest.raises(CheckpointError, match=message):
            other.load_state(broken)


def test_optimizer_state_continues_bit_for_bit(model: Model) -> None:
    data = batch(LENGTHS, model.config)
    weights = np.full(15, 1 / 12, np.float32)

    def train(subject: Model, steps: int) -> None:
        for _ in range(steps):
            subject.zero_grad()
            subject.forward_backward(*data, weights)
            subject.step(1e-2)

    train(model, 3)
    other = ingot.Model(model.config, seed=9, num_values=1)
    other.load_state(model.state())
    other.optimizer.load_state(model.optimizer.state())
    assert int(other.optimizer.state()["step"][0]) == 3
    train(model, 3)
    train(other, 3)
    for name, array in model.state().items():
        np.testing.assert_array_equal(bits(array), bits(other.state()[name]), err_msg=name)
    state = dict(model.optimizer.state())
    name = next(iter(model.parameters))
    del state[f"m.{name}"]
    with pytest.raises(CheckpointError, match=f"optimizer state is not this model's; missing: m.{re.escape(name)}"):
        other.optimizer.load_state(state)


def test_groups_set_rates_and_decay(model: Model) -> None:
    groups = [ingot.ParameterGroup(names=("score.*",), lr_scale=0.0), ingot.ParameterGroup(names=("*.weight",))]
    model.optimizer = ingot.Optimizer(model, groups, weight_decay=0.5)
    before = model.state()
    model.forward_backward(*batch(LENGTHS, model.config), np.ones(15, np.float32))
    model.step(1e-2)
    for name, array in model.parameters.items():
        assert np.array_equal(array, before[name]) == name.startswith("score."), name
    with pytest.raises(ConfigError, match=r"no parameter is named 'scor\.\*'"):
        ingot.Optimizer(model, [ingot.ParameterGroup(names=("scor.*",))])
    with pytest.raises(ConfigError, match="lr_scale must be 0 or more"):
        ingot.ParameterGroup(names=("*",), lr_scale=-1.0)


def test_gradients_that_are_no_numbers_skip_the_step(model: Model) -> None:
    model.forward_backward(*batch(LENGTHS, model.config), np.ones(15, np.float32))
    before = model.state()
    next(iter(model.gradients.values()))[0] = np.nan
    info = model.step(1e-2)
    assert info.skipped
    assert np.isnan(info.grad_norm)
    assert all(np.array_equal(array, before[name]) for name, array in model.parameters.items())
    assert int(model.optimizer.state()["step"][0]) == 0


# ---- the package


def test_import_is_light() -> None:
    program = (
        "import sys, time, numpy; began = time.perf_counter(); import ingot; "
        "print(time.perf_counter() - began < 0.15, [m for m in ('torch', 'rich', 'tyro') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "True []\n"


def test_every_public_name_exists() -> None:
    for name in ingot.__all__:
        assert getattr(ingot, name) is not None
    assert set(ingot.__all__) <= set(dir(ingot))
    with pytest.raises(AttributeError, match="module 'ingot' has no attribute 'nonsense'"):
        _ = ingot.nonsense


def test_classes_of_the_core_are_closed() -> None:
    model = ingot.Model(LLAMA)
    assert isinstance(model, NativeModel)
    with pytest.raises(AttributeError):
        model._core.level = "avx2"  # type: ignore[misc]
    with pytest.raises(TypeError):
        type("Sub", (_native.Model,), {})
