"""Log-probabilities of chosen ids in each row, and their gradient: against the softmax in f64, the torch twin, and themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import ingot
from ingot.configs import ModelConfig
from ingot.errors import ConfigError
from ingot.losses.distillation import topk_distillation_loss
from ingot.models.base import Candidates
from networks import SHAPES, Packed, native, pack, perturbed, twin, worst_ratio

# More rows than one chunk of the head (2048), and an empty sequence.
MANY_LENGTHS = [*range(1, 71), 0]
LENGTHS = [5, 1, 0, 66, 9, 13]
EVERYTHING = ("logprobs", "entropy", "lse", "zbar", "values", "hidden", "candidate_logprobs")


def draw_candidates(config: ModelConfig, num_rows: int, seed: int = 0) -> Candidates:
    """Up to eight ids a row, many rows with none, some ids twice, one row with all ids; never the last id."""
    rng = np.random.default_rng(seed)
    counts = np.where(rng.random(num_rows) < 0.4, 0, rng.integers(1, 9, num_rows))
    rows = [rng.integers(0, config.vocab_size - 1, count) for count in counts]
    rows[num_rows // 2] = rng.permutation(config.vocab_size - 1)
    return np.cumsum([0, *map(len, rows)]), np.concatenate(rows).astype(np.int32)


def rows_of(candidates: Candidates) -> np.ndarray[Any, Any]:
    return np.repeat(np.arange(len(candidates[0]) - 1), np.diff(candidates[0]))


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_they_are_those_of_the_softmax(shape: str, level: str) -> None:
    config = SHAPES[shape]
    packed = pack(config, LENGTHS, share=0.5)
    model = native(config, perturbed(config), level=level)
    offsets, ids = candidates = draw_candidates(config, len(packed.tokens))
    banned = [config.vocab_size - 1]
    _, out = model.forward(
        *packed.arrays,
        want=("candidate_logprobs", "hidden", "logprobs", "entropy"),
        candidates=candidates,
        temperature=0.7,
        banned_ids=banned,
        train=False,
    )
    head = model.parameters["transformer.wte.weight" if shape == "gpt2" else "lm_head.weight"]
    scores = (out.hidden.astype(np.float64) @ head.astype(np.float64).T) / 0.7
    scores[:, banned] = -np.inf
    log_p = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(out.candidate_logprobs, log_p[rows_of(candidates), ids], atol=2e-5)
    # The row that has all ids has all of the probability.
    row = len(packed.tokens) // 2
    whole = out.candidate_logprobs[offsets[row] : offsets[row + 1]].astype(np.float64)
    assert np.exp(whole).sum() == pytest.approx(1.0, abs=1e-6)
    # A row with candidates and no target has no other output.
    assert not out.logprobs[packed.targets < 0].any()
    assert not out.entropy[packed.targets < 0].any()
    assert out.entropy[packed.targets >= 0].all()


@pytest.mark.parametrize("shape", ["gpt2", "llama", "wide"])
def test_gradient_equals_the_twins(shape: str, level: str) -> None:
    compare_with_twin(shape, LENGTHS, level)


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_gradient_of_many_rows(shape: str) -> None:
    compare_with_twin(shape, MANY_LENGTHS, None)


def compare_with_twin(shape: str, lengths: list[int], level: str | None) -> None:
    config = SHAPES[shape]
    packed = pack(config, lengths, share=0.5)
    num_tokens = len(packed.tokens)
    candidates = draw_candidates(config, num_tokens)
    rng = np.random.default_rng(1)
    gradients = {
        f"d_{name}": rng.standard_normal(num_tokens).astype(np.float32)
        for name in ("logprobs", "entropy", "lse", "zbar", "values")
    }
    gradients["d_hidden"] = rng.standard_normal((num_tokens, config.hidden_size)).astype(np.float32)
    gradients["d_candidates"] = rng.standard_normal(len(candidates[1])).astype(np.float32)
    options = {"want": EVERYTHING, "candidates": candidates, "temperature": 0.8, "banned_ids": [config.vocab_size - 1]}
    model, reference = native(config, perturbed(config, 1), 1, level=level), twin(config, perturbed(config, 1), 1)
    for given in (gradients, {"d_candidates": gradients["d_candidates"]}):
        ctx, out = model.forward(*packed.arrays, **options)
        twin_ctx, twin_out = reference.forward(*packed.arrays, **options)
        for name in EVERYTHING:
            np.testing.assert_allclose(getattr(out, name), getattr(twin_out, name), rtol=1e-4, atol=2e-5, err_msg=name)
        model.zero_grad()
        reference.zero_grad()
        model.backward(ctx, **given)
        reference.backward(twin_ctx, **{name: array.astype(np.float64) for name, array in given.items()})
        ratio, name = worst_ratio(model.gradients, reference.gradients, 2e-4, 1e-7)
        assert ratio <= 1.0, f"{name}: {ratio:.2f} times the bound"


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_the_gradient_is_the_slope(shape: str) -> None:
    config = SHAPES[shape]
    packed = pack(config, LENGTHS, share=0.0)  # no target anywhere
    candidates = draw_candidates(config, len(packed.tokens))
    d_candidates = np.random.default_rng(2).normal(size=len(candidates[1]), scale=0.02).astype(np.float32)
    model = native(config, perturbed(config))
    ctx, _ = model.forward(*packed.arrays, want=("candidate_logprobs",), candidates=candidates)
    model.backward(ctx, d_candidates=d_candidates)

    def loss() -> float:
        _, out = model.forward(*packed.arrays, want=("candidate_logprobs",), candidates=candidates, train=False)
        return float(d_candidates.astype(np.float64) @ out.candidate_logprobs)

    for name, weight in model.parameters.items():
        gradient = model.gradients[name].astype(np.float64)
        size = np.linalg.norm(gradient)
        if size < 1e-4:
            continue
        step, start = 0.002 / size**2 * gradient, weight.copy()
        weight[...] = start + step
        above = loss()
        weight[...] = start - step
        slope = (above - loss()) / (2 * np.linalg.norm(step))
        weight[...] = start
        assert slope == pytest.approx(size, rel=1e-2), name


def test_a_targets_log_probability_has_the_same_bits_as_a_candidate(level: str) -> None:
    config = SHAPES["wide"]
    packed = pack(config, LENGTHS, share=1.0)
    model = native(config, perturbed(config), level=level)
    _, alone = model.forward(*packed.arrays, temperature=0.9, train=False)
    candidates = (np.arange(len(packed.tokens) + 1), packed.targets)
    _, out = model.forward(
        *packed.arrays, want=("logprobs", "candidate_logprobs"), candidates=candidates, temperature=0.9, train=False
    )
    np.testing.assert_array_equal(out.candidate_logprobs, alone.logprobs)
    np.testing.assert_array_equal(out.logprobs, alone.logprobs)
    # Without a target the row's candidates are the same.
    nothing = np.full_like(packed.targets, -1)
    _, bare = model.forward(
        packed.tokens, packed.offsets, nothing, want=("candidate_logprobs",), candidates=candidates, temperature=0.9
    )
    np.testing.assert_array_equal(bare.candidate_logprobs, alone.logprobs)


@pytest.mark.parametrize("shape", ["llama", "wide"])
def test_a_sequence_alone_and_in_a_pack_has_the_same_bits(shape: str, level: str) -> None:
    config = SHAPES[shape]
    packed = pack(config, LENGTHS, share=0.5)
    model = native(config, perturbed(config), level=level)
    offsets, ids = draw_candidates(config, len(packed.tokens))

    def of(part: Packed, candidates: Candidates) -> np.ndarray[Any, Any]:
        _, out = model.forward(*part.arrays, want=("candidate_logprobs",), candidates=candidates, train=False)
        return out.candidate_logprobs

    whole = of(packed, (offsets, ids))
    for i in range(len(LENGTHS)):
        cut = offsets[packed.offsets[i] : packed.offsets[i + 1] + 1]
        own = slice(int(cut[0]), int(cut[-1]))
        np.testing.assert_array_equal(of(packed.sequence(i), (cut - cut[0], ids[own])), whole[own])


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_an_id_twice_has_the_sum_of_both_gradients(backend: str) -> None:
    config = SHAPES["llama"]
    packed = pack(config, [3], share=0.0)

    def gradients(offsets: list[int], ids: list[int], d: list[float]) -> dict[str, Any]:
        weights = perturbed(config)
        model = native(config, weights) if backend == "native" else twin(config, weights, precision="f32")
        candidates = (np.array(offsets), np.array(ids, np.int32))
        ctx, out = model.forward(*packed.arrays, want=("candidate_logprobs",), candidates=candidates)
        assert len(out.candidate_logprobs) == len(ids)
        assert ctx is not None
        model.backward(ctx, d_candidates=np.array(d, np.float32))
        return dict(model.gradients)

    twice = gradients([0, 0, 3, 3], [4, 7, 4], [0.5, 1.0, 0.25])
    once = gradients([0, 0, 2, 2], [4, 7], [0.75, 1.0])
    ratio, name = worst_ratio(twice, once, 1e-5, 1e-9)
    assert ratio <= 1.0, name
    assert not any(array.any() for array in gradients([0, 0, 0, 0], [], []).values())


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_what_is_wrong_is_named(backend: str) -> None:
    config = SHAPES["llama"]
    packed = pack(config, [3])
    model = native(config, perturbed(config)) if backend == "native" else twin(config, perturbed(config), 0, "f32")
    offsets, ids = np.array([0, 1, 1, 2]), np.array([4, 7], np.int32)

    def forward(candidates: Any, want: tuple[str, ...] = ("candidate_logprobs",), **options: Any) -> Any:
        return model.forward(*packed.arrays, want=want, candidates=candidates, **options)

    with pytest.raises(ValueError, match=r"^candidates: 7 at row 2 is one of banned_ids$"):
        forward((offsets, ids), banned_ids=[7])
    with pytest.raises(IndexError, match=r"^candidates\[1\] is 41, outside 0\.\.41 \(token ids below vocab_size\)$"):
        forward((offsets, np.array([4, 41], np.int32)))
    with pytest.raises(IndexError, match=r"^candidates\[0\] is -1, outside"):
        forward((offsets, np.array([-1, 4], np.int32)))
    with pytest.raises(
        ValueError, match="candidate offsets: ends with 2, but must end with the number of candidates, 3"
    ):
        forward((offsets, np.array([1, 2, 3], np.int32)))
    with pytest.raises(ValueError, match="candidate offsets: decreases from 2 to 1 at index 2"):
        forward((np.array([0, 2, 1, 2]), ids))
    with pytest.raises(ValueError, match="candidate offsets: starts with 1, but must start with 0"):
        forward((np.array([1, 1, 1, 2]), ids))
    with pytest.raises(ValueError, match=r"candidates\[0\]: needs a C-contiguous int64 array of shape \[4\]"):
        forward((np.array([0, 1, 2]), ids))
    with pytest.raises(TypeError, match=r"candidates\[1\]: needs a C-contiguous int32 array"):
        forward((offsets, ids.astype(np.int64)))
    with pytest.raises(ConfigError, match="give both or neither"):
        forward(None)
    with pytest.raises(ConfigError, match="give both or neither"):
        forward((offsets, ids), want=("logprobs",))
    with pytest.raises(ConfigError, match=r"candidates takes a pair of arrays \(offsets, ids\), got list"):
        forward([offsets, ids])
    ctx, _ = forward((offsets, ids))
    with pytest.raises(ValueError, match=r"d_candidates: needs a C-contiguous float32 array of shape \[2\]"):
        model.backward(ctx, d_candidates=np.ones(3, np.float32))
    ctx, _ = model.forward(*packed.arrays)
    with pytest.raises(ValueError, match=r"d_candidates"):
        model.backward(ctx, d_candidates=np.ones(0, np.float32))


# ---- a teacher's likeliest ids (the top-k loss of ingot.losses.distillation)


def test_all_ids_as_candidates_are_the_mean_over_hard_targets() -> None:
    """sum over v of q(v) times the next-token loss of v: the same gradient by another road."""
    config = SHAPES["llama"]
    packed = pack(config, [4, 7], share=0.0)
    num_tokens, size = len(packed.tokens), config.vocab_size
    q = np.random.default_rng(0).dirichlet(np.full(size, 0.3), num_tokens)
    weights = np.full(num_tokens, 1 / num_tokens)
    soft, hard = native(config, perturbed(config)), native(config, perturbed(config))
    candidates = (np.arange(num_tokens + 1) * size, np.tile(np.arange(size, dtype=np.int32), num_tokens))
    ctx, out = soft.forward(*packed.arrays, want=("candidate_logprobs",), candidates=candidates)
    loss, d_candidates, _ = topk_distillation_loss(out.candidate_logprobs, np.log(q).ravel(), candidates[0], weights)
    assert ctx is not None
    soft.backward(ctx, d_candidates=d_candidates)
    crossed = 0.0
    for v in range(size):
        targets = np.full(num_tokens, v, np.int32)
        crossed += hard.forward_backward(packed.tokens, packed.offsets, targets, (weights * q[:, v]).astype(np.float32))
    assert loss == pytest.approx(crossed + float((weights[:, None] * q * np.log(q)).sum()), rel=1e-5)
    ratio, name = worst_ratio(soft.gradients, dict(hard.gradients), 1e-4, 1e-7)
    assert ratio <= 1.0, name


@pytest.mark.parametrize("k", [3, 8])
def test_a_student_learns_its_teachers_table(k: int) -> None:
    """Order-1 teacher over 8 ids; the student sees its k likeliest and the rest's share. Below 1e-3 with all 8 (measured: 1e-5)."""
    rng = np.random.default_rng(3)
    table = rng.dirichlet(np.full(8, 0.5), 8)
    config = ModelConfig.llama(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    student = ingot.Model(config, seed=1, threads=1)
    offsets = np.arange(9) * 16
    best = np.argsort(-table, axis=1)[:, :k]

    def divergence() -> float:
        tokens = np.arange(8, dtype=np.int32)
        everything = (np.arange(9) * 8, np.tile(tokens, 8))
        _, out = student.forward(
            tokens, np.arange(9), np.full(8, -1, np.int32), want=("candidate_logprobs",), candidates=everything
        )
        return float((table * (np.log(table) - out.candidate_logprobs.reshape(8, 8))).sum(axis=1).mean())

    start = divergence()
    for _ in range(150):
        tokens = rng.integers(0, 8, 128).astype(np.int32)
        ids = best[tokens]
        candidates = (np.arange(129) * k, ids.ravel().astype(np.int32))
        ctx, out = student.forward(
            tokens, offsets, np.full(128, -1, np.int32), want=("candidate_logprobs",), candidates=candidates
        )
        teacher = np.log(table[tokens[:, None], ids]).ravel()
        _, d_candidates, _ = topk_distillation_loss(
            out.candidate_logprobs, teacher, candidates[0], np.full(128, 1 / 128)
        )
        student.zero_grad()
        assert ctx is not None
        student.backward(ctx, d_candidates=d_candidates)
        student.step(1e-2)
    end = divergence()
    assert start > 0.3
    if k == 8:
        assert end < 1e-3
    else:
        # The three are right, and what the others share among them is not known.
        rest = np.take_along_axis(table, np.argsort(-table, axis=1)[:, k:], axis=1).sum(axis=1).mean()
        assert end < rest
