"""The two backends are one seam: the same calls, the same numbers, the same errors."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ingot
from ingot.errors import CheckpointError, ConfigError, RunError
from ingot.models import base, torch_backend
from ingot.models.native import NativeModel
from ingot.models.torch_backend import TorchModel
from networks import OUTPUTS, SHAPES, native, output_gradients, pack, perturbed, twin, worst_ratio
from oracle.transformer import Transformer

LENGTHS = [1, 0, 5, 13, 5, 2, 66]
BACKENDS: dict[str, Callable[..., base.Model]] = {
    "native": NativeModel,
    "torch": lambda config, **options: TorchModel(config, precision="f32", device="cpu", threads=1, **options),
}


@pytest.fixture(params=BACKENDS)
def make(request: pytest.FixtureRequest) -> Callable[..., base.Model]:
    """A maker of models of either backend."""
    return BACKENDS[request.param]


@pytest.mark.parametrize("num_values", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_f64_twin_is_the_oracle(shape: str, num_values: int) -> None:
    config = SHAPES[shape]
    weights = perturbed(config, num_values)
    packed = pack(config, LENGTHS)
    options: dict[str, Any] = {"temperature": 0.7, "banned_ids": [config.vocab_size - 1]}
    oracle = Transformer(config, weights, num_values)
    tapes, expected = oracle.forward(*packed.arrays, **options)
    model = twin(config, weights, num_values)
    ctx, out = model.forward(*packed.arrays, want=OUTPUTS, **options)
    for name in OUTPUTS:
        want = expected[name].reshape(out.arrays[name].shape)
        np.testing.assert_allclose(out.arrays[name], want, rtol=0, atol=1e-12, err_msg=name)
    given = {n: a.astype(np.float64) for n, a in output_gradients(packed, config, num_values, OUTPUTS).items()}
    oracle.backward(tapes, {name.removeprefix("d_"): array for name, array in given.items()})
    model.backward(ctx, **given)
    ratio, name = worst_ratio(model.gradients, oracle.gradients, 1e-11, 1e-13)
    assert ratio <= 1.0, name


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("shape", SHAPES)
def test_same_call_same_outputs(shape: str, dropout: float) -> None:
    config = dataclasses.replace(SHAPES[shape], dropout=dropout)
    weights = perturbed(config, 2)
    packed = pack(config, LENGTHS)
    rng = np.random.default_rng(0)
    options: dict[str, Any] = {
        "want": base.OUTPUT_NAMES,
        "value_rows": rng.random(len(packed.tokens)) < 0.5,
        "hidden_rows": np.array([3, 1, 3]),
        "candidates": (np.minimum(np.arange(len(packed.tokens) + 1), 2), np.array([5, 3], np.int32)),
        "temperature": 1.3,
        "banned_ids": [config.vocab_size - 1],
        "seed": 2**63 + 5,
        "sequence_ids": np.array([7, 1, -2, 2**40, 3, 4, 5]),
    }
    _, ours = native(config, weights, 2).forward(*packed.arrays, **options)
    _, theirs = twin(config, weights, 2, precision="f32").forward(*packed.arrays, **options)
    for name in base.OUTPUT_NAMES:
        got, want = ours.arrays[name], theirs.arrays[name]
        assert (got.dtype, got.shape) == (want.dtype, want.shape), name
        if name == "top1":
            np.testing.assert_array_equal(got, want)
        else:
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("shape", SHAPES)
def test_same_seed_same_initial_weights(shape: str) -> None:
    config = SHAPES[shape]
    ours = NativeModel(config, seed=2**40 + 3, num_values=2).state()
    theirs = TorchModel(config, seed=2**40 + 3, num_values=2, precision="f32", device="cpu").state()
    assert list(ours) == list(theirs)
    for name, array in ours.items():
        # The last bit may differ: the native core has a logarithm of its own.
        np.testing.assert_allclose(array, theirs[name], rtol=2e-7, atol=0, err_msg=name)


def test_training_in_either_backend_ends_in_the_same_place() -> None:
    config = dataclasses.replace(SHAPES["llama"], dropout=0.1)
    batches = [pack(config, LENGTHS, seed=i) for i in range(10)]
    results = []
    for kind in BACKENDS.values():
        model = kind(config, seed=1)
        for step, batch in enumerate(batches):
            weights = np.full(len(batch.tokens), 0.01, dtype=np.float32)
            model.zero_grad()
            loss = model.forward_backward(*batch.arrays, weights, seed=step)
            info = model.step(1e-2, clip_norm=0.1)
        results.append((loss, info.grad_norm, model.state()))
    (loss, norm, weights), (other_loss, other_norm, other_weights) = results
    assert loss == pytest.approx(other_loss, rel=1e-4)
    assert norm == pytest.approx(other_norm, rel=1e-3)
    for name, array in weights.items():
        np.testing.assert_allclose(array, other_weights[name], atol=2e-4, err_msg=name)


def test_models_and_optimizers_move_between_backends(tmp_path: Path) -> None:
    config = SHAPES["gpt2"]
    packed = pack(config, LENGTHS)
    row_weights = np.full(len(packed.tokens), 0.01, dtype=np.float32)
    source = TorchModel(config, seed=1, precision="f32", device="cpu")
    source.forward_backward(*packed.arrays, row_weights)
    source.step(1e-2)
    source.save(tmp_path / "model")
    target = ingot.load_model(tmp_path / "model")
    assert target.backend == "native"
    target.optimizer.load_state(source.optimizer.state())
    back = ingot.load_model(tmp_path / "model", backend="torch", device="cpu")
    assert back.backend == "torch"
    back.optimizer.load_state(target.optimizer.state())
    for model in (source, target, back):
        model.zero_grad()
        model.forward_backward(*packed.arrays, row_weights)
        model.step(1e-2)
    for name, array in source.state().items():
        np.testing.assert_allclose(target.state()[name], array, atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(back.state()[name], array, err_msg=name)


@pytest.mark.parametrize("shape", ["gpt2", "llama", "qwen3"])
def test_decoders_write_the_same_text(shape: str) -> None:
    config = SHAPES[shape]
    weights = perturbed(config)
    samplings = [
        ingot.Sampling(temperature=0.0),
        ingot.Sampling(temperature=1.2),
        ingot.Sampling(temperature=0.9, top_k=5),
        ingot.Sampling(top_p=0.8, repetition_penalty=1.3),
        ingot.Sampling(min_p=0.1),
    ]
    prompts = [[1, 2, 3], [4], [5, 6], list(range(20)), [7, 7, 7, 7]]
    texts, logprobs = [], []
    for model in (native(config, weights), twin(config, weights, precision="f32")):
        decoder = model.decoder(60, 6, seed=11, banned_ids=[0])
        for identity, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
            decoder.add(prompt, identity, sampling)
        steps = [decoder.step() for _ in range(10)]
        decoder.remove(1)
        assert decoder.fork(3, 77) == 1
        assert decoder.active == [0, 1, 2, 3, 4]
        assert decoder.length(1) == decoder.length(3) == 30
        steps += [decoder.step({2: 9} if i == 0 else None) for i in range(25)]
        assert steps[10].tokens[2] == 9
        texts.append(np.concatenate([step.tokens for step in steps]))
        logprobs.append(np.concatenate([step.logprobs for step in steps]))
        assert all(step.slots.tolist() == [0, 1, 2, 3, 4] for step in steps)
    np.testing.assert_array_equal(texts[0], texts[1])
    np.testing.assert_allclose(logprobs[0], logprobs[1], atol=1e-4)


def test_logits_in_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SHAPES["gpt2"]
    packed = pack(config, LENGTHS)
    given = {n: a.astype(np.float64) for n, a in output_gradients(packed, config, 0, OUTPUTS[:4]).items()}
    gradients = []
    for limit in (1 << 24, 7 * config.vocab_size):
        monkeypatch.setattr(torch_backend.model, "CHUNK_LOGITS", limit)
        model = twin(config, perturbed(config))
        ctx, out = model.forward(*packed.arrays, want=OUTPUTS[:4])
        model.backward(ctx, **given)
        loss = model.forward_backward(*packed.arrays, np.ones(len(packed.tokens)))
        gradients.append((loss, out.logprobs, model.gradients))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-13)
    np.testing.assert_allclose(gradients[0][1], gradients[1][1], atol=1e-13)
    assert worst_ratio(gradients[0][2], gradients[1][2], 1e-12, 1e-14)[0] <= 1.0


def test_bf16_stays_near_f32() -> None:
    config = SHAPES["llama"]
    packed = pack(config, LENGTHS)
    model, reference = twin(config, perturbed(config), precision="bf16"), twin(config, perturbed(config))
    _, out = model.forward(*packed.arrays)
    _, expected = reference.forward(*packed.arrays)
    assert out.logprobs.dtype == np.float32
    difference = np.abs(out.logprobs - expected.logprobs)
    assert 1e-5 < difference.mean() < 2e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
def test_gpu_equals_the_cpu() -> None:
    config = dataclasses.replace(SHAPES["llama"], dropout=0.2)
    packed = pack(config, LENGTHS)
    row_weights = np.full(len(packed.tokens), 0.01, dtype=np.float32)
    gradients = []
    for device in ("cpu", "cuda"):
        model = TorchModel(config, seed=1, precision="f32", device=device)
        model.forward_backward(*packed.arrays, row_weights)
        gradients.append(model.gradients)
    assert worst_ratio(gradients[1], gradients[0], 1e-4, 1e-7)[0] <= 1.0


# -- the rules of contexts, and errors, of both backends --------------------------------------------------------------


def test_several_contexts_live_at_once(make: Callable[..., base.Model]) -> None:
    config = SHAPES["gpt2"]
    batches = [pack(config, LENGTHS, seed=i) for i in range(3)]
    one_by_one, together = make(config, seed=1), make(config, seed=1)
    for batch in batches:
        ctx, out = one_by_one.forward(*batch.arrays)
        assert ctx is not None
        one_by_one.backward(ctx, d_logprobs=np.ones_like(out.logprobs))
    contexts = [together.forward(*batch.arrays)[0] for batch in batches]
    together.forward(*batches[0].arrays)  # dropped at once
    for ctx, batch in zip(contexts, batches, strict=True):
        assert ctx is not None
        assert not ctx.spent
        together.backward(ctx, d_logprobs=np.ones(len(batch.tokens), dtype=np.float32))
        assert ctx.spent
    assert worst_ratio(together.gradients, one_by_one.gradients, 1e-6, 1e-9)[0] <= 1.0


def test_contexts_are_for_one_backward_pass_on_the_same_weights(make: Callable[..., base.Model]) -> None:
    config = SHAPES["gpt2"]
    packed = pack(config, LENGTHS)
    ones = np.ones(len(packed.tokens), dtype=np.float32)
    model = make(config)
    ctx, _ = model.forward(*packed.arrays)
    assert ctx is not None
    with pytest.raises(RuntimeError, match="another model"):
        make(config).backward(ctx, d_logprobs=ones)
    model.backward(ctx, d_logprobs=ones)
    with pytest.raises(RuntimeError, match="already used"):
        model.backward(ctx, d_logprobs=ones)
    stale, _ = model.forward(*packed.arrays)
    decoder = model.decoder(8, 1)
    assert stale is not None
    model.step(1e-3)
    with pytest.raises(RuntimeError, match="parameters changed"):
        model.backward(stale, d_logprobs=ones)
    with pytest.raises(RuntimeError, match="parameters changed"):
        decoder.add([1], 0)
    assert model.forward(*packed.arrays, train=False)[0] is None
    with pytest.raises(TypeError, match="train=True"):
        model.backward(None, d_logprobs=ones)  # type: ignore[arg-type]


def test_outputs_that_were_not_asked_for_are_named(make: Callable[..., base.Model]) -> None:
    config = SHAPES["gpt2"]
    packed = pack(config, LENGTHS)
    model = make(config)
    ctx, out = model.forward(*packed.arrays)
    with pytest.raises(AttributeError, match="add 'entropy' to forward's want"):
        _ = out.entropy
    assert ctx is not None
    with pytest.raises(ValueError, match="d_hidden"):
        model.backward(ctx, d_hidden=np.ones((len(packed.tokens), config.hidden_size), dtype=np.float32))
    with pytest.raises(ConfigError, match="no scalar heads"):
        model.forward(*packed.arrays, want=("values",))
    with pytest.raises(ConfigError, match="'logits'"):
        model.forward(*packed.arrays, want=("logits",))


def test_an_empty_batch_is_a_batch(make: Callable[..., base.Model]) -> None:
    config = SHAPES["llama"]
    model = make(config, num_values=1)
    none = np.empty(0, dtype=np.int32)
    for offsets in (np.zeros(1, dtype=np.int64), np.zeros(3, dtype=np.int64)):
        ctx, out = model.forward(
            none, offsets, none, want=base.OUTPUT_NAMES, candidates=(np.zeros(1, dtype=np.int64), none)
        )
        assert [len(out.arrays[name]) for name in base.OUTPUT_NAMES] == [0] * 8
        assert ctx is not None
        model.backward(ctx, d_logprobs=np.empty(0, dtype=np.float32))
        assert model.forward_backward(none, offsets, none, np.empty(0, dtype=np.float32)) == 0.0
    assert not any(array.any() for array in model.gradients.values())


def test_rows_without_any_target_have_no_loss(make: Callable[..., base.Model]) -> None:
    config = SHAPES["llama"]
    packed = pack(config, LENGTHS, share=0.0)
    model = make(config)
    _, out = model.forward(*packed.arrays, want=("logprobs", "entropy"))
    assert not out.logprobs.any()
    assert not out.entropy.any()
    assert model.forward_backward(*packed.arrays, np.ones(len(packed.tokens), dtype=np.float32)) == 0.0
    assert not any(array.any() for array in model.gradients.values())


BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dtype": (
        {"tokens": np.zeros(4, dtype=np.int64)},
        TypeError,
        r"tokens: .*int32.*\[.*int64 of shape \[4\].*strides",
    ),
    "no array": ({"targets": [1, 2, 3, -1]}, TypeError, "targets: .*got list"),
    "shape": ({"targets": np.zeros(3, dtype=np.int32)}, ValueError, r"targets: .*\[4\].*shape \[3\]"),
    "order": ({"tokens": np.zeros(8, dtype=np.int32)[::2]}, ValueError, "tokens: .*not C-contiguous"),
    "token": ({"tokens": np.array([0, 1, 37, 2], dtype=np.int32)}, IndexError, r"tokens\[2\] is 37, outside 0\.\.37"),
    "target": ({"targets": np.array([0, 1, 2, -2], dtype=np.int32)}, IndexError, r"targets\[3\] is -2"),
    "offsets start": ({"offsets": np.array([1, 4])}, ValueError, "offsets: starts with 1"),
    "offsets end": ({"offsets": np.array([0, 5])}, ValueError, "offsets: ends with 5"),
    "offsets fall": ({"offsets": np.array([0, 3, 2, 4])}, ValueError, "offsets: decreases from 3 to 2 at index 2"),
    "no offsets": ({"offsets": np.empty(0, dtype=np.int64)}, ValueError, "offsets: is empty"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature: must be a positive number, got 0"),
    "banned target": ({"banned_ids": [1, 5]}, ValueError, "targets: 1 at row 1 is one of banned_ids"),
    "banned id": ({"banned_ids": [37]}, IndexError, r"banned_ids\[0\] is 37"),
    "all banned": ({"banned_ids": list(range(37))}, ValueError, "banned_ids: names the whole vocabulary"),
    "seed": ({"seed": -1}, ConfigError, "seed must be between 0"),
    "identities": ({"sequence_ids": np.zeros(2, dtype=np.int64)}, ValueError, r"sequence_ids: .*\[1\].*shape \[2\]"),
    "hidden rows": (
        {"want": ("hidden",), "hidden_rows": np.array([0, 4])},
        IndexError,
        r"hidden_rows\[1\] is 4, outside 0\.\.4",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_named_alike(make: Callable[..., base.Model], case: str) -> None:
    changes, kind, message = BAD_CALLS[case]
    good: dict[str, Any] = {
        "tokens": np.arange(4, dtype=np.int32),
        "offsets": np.array([0, 4]),
        "targets": np.array([0, 1, 2, -1], dtype=np.int32),
    }
    model = make(SHAPES["gpt2"])
    with pytest.raises(kind, match=message):
        model.forward(**(good | changes))


def test_sequences_beyond_learned_positions_are_refused(make: Callable[..., base.Model]) -> None:
    config = SHAPES["gpt2"]
    packed = pack(config, [3, config.max_position_embeddings + 1])
    with pytest.raises(ConfigError, match=r"sequence 1 has 131 tokens.*max_position_embeddings = 130"):
        make(config).forward(*packed.arrays)


def test_decoder_errors_are_named_alike(make: Callable[..., base.Model]) -> None:
    model = make(SHAPES["gpt2"])
    for bad in (0, -1, 2**70):
        with pytest.raises(ConfigError, match=rf"^max_sequences: must be at least 1 .*, got {bad}$"):
            model.decoder(8, bad)
        with pytest.raises(ConfigError, match=rf"^max_tokens: must be at least 1 .*, got {bad}$"):
            model.decoder(bad, 1)
    with pytest.raises(ValueError, match="max_tokens"):
        model.decoder(131, 1)
    decoder = model.decoder(4, 2, banned_ids=[9])
    with pytest.raises(ValueError, match="tokens"):
        decoder.add([], 0)
    with pytest.raises(ValueError, match="tokens"):
        decoder.add([1, 2, 3, 4, 5], 0)
    with pytest.raises(IndexError, match=r"tokens\[1\] is 37"):
        decoder.add([1, 37], 0)
    slot = decoder.add([1, 2, 3], 0)
    with pytest.raises(ValueError, match="7 is not in use"):
        decoder.step({7: 1})
    with pytest.raises(ValueError, match="banned_ids"):
        decoder.step({slot: 9})
    decoder.add([1], 1)
    with pytest.raises(ValueError, match="all in use"):
        decoder.fork(slot, 2)
    decoder.step()
    with pytest.raises(ValueError, match="full"):
        decoder.step()
    decoder.remove(slot)
    with pytest.raises(ValueError, match="not in use"):
        decoder.length(slot)
    decoder.step()
    assert decoder.length(1) == 3


def test_drawing_from_broken_weights_is_an_error(make: Callable[..., base.Model]) -> None:
    model = make(SHAPES["gpt2"])
    state = model.state()
    state["transformer.ln_f.weight"][:] = np.nan
    model.load_state(state)
    decoder = model.decoder(4, 1)
    decoder.add([1], 42)
    with pytest.raises(RunError, match="sequence 42 are not finite"):
        decoder.step()


def test_states_are_strict(make: Callable[..., base.Model]) -> None:
    model = make(SHAPES["gpt2"])
    state = model.state()
    for change, message in (
        ({"transformer.ln_f.bias": None}, "missing: transformer.ln_f.bias"),
        ({"extra": np.zeros(1)}, "surplus: extra"),
        ({"transformer.ln_f.bias": np.zeros(3)}, r"wrong shape: transformer.ln_f.bias is \[3\], not \[21\]"),
    ):
        broken = {name: array for name, array in (state | change).items() if array is not None}
        with pytest.raises(CheckpointError, match=message):
            model.load_state(broken)
    optimizer_state = model.optimizer.state()
    del optimizer_state["m.transformer.ln_f.bias"]
    with pytest.raises(CheckpointError, match=r"missing: m.transformer.ln_f.bias"):
        model.optimizer.load_state(optimizer_state)


def test_a_second_thread_gets_an_error(make: Callable[..., base.Model]) -> None:
    config = SHAPES["wide"]
    packed = pack(config, [130] * 30)
    model = make(config)
    errors: list[str] = []
    stop = threading.Event()

    def meddle() -> None:
        while not stop.is_set():
            try:
                model.forward(*packed.sequence(0).arrays)
            except RuntimeError as error:
                errors.append(str(error))
                return

    thread = threading.Thread(target=meddle)
    thread.start()
    try:
        for _ in range(200):
            try:
                model.forward(*packed.arrays)
            except RuntimeError as error:
                errors.append(str(error))
            if errors:
                break
    finally:
        stop.set()
        thread.join()
    assert errors
    assert "another thread" in errors[0]
    model.forward(*packed.arrays)


def test_what_torch_lends_cannot_be_written_to() -> None:
    model = TorchModel(SHAPES["gpt2"], device="cpu")
    with pytest.raises(ValueError, match="read-only"):
        model.parameters["transformer.ln_f.bias"][0] = 1.0


def test_settings_of_the_torch_backend_are_checked() -> None:
    config = SHAPES["gpt2"]
    with pytest.raises(ConfigError, match="device is 'tpu'"):
        ingot.Model(config, backend="torch", device="tpu")
    with pytest.raises(ConfigError, match="precision"):
        TorchModel(config, precision="f16")  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="sees no GPU"):
            ingot.Model(config, backend="torch", device="cuda")
    assert repr(ingot.Model(config, backend="torch", device="cpu")).startswith("torch model, 9,949 parameters")


def test_torch_is_imported_by_its_backend_alone() -> None:
    root = Path(torch_backend.__file__).parent
    package = Path(ingot.__file__).parent
    importers = [
        path.relative_to(package)
        for path in package.rglob("*.py")
        if root not in path.parents
        and any(line.strip().startswith(("import torch", "from torch")) for line in path.read_text().splitlines())
    ]
    assert importers == []
    code = "import sys, ingot; ingot.Model(ingot.ModelConfig.gpt2(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
