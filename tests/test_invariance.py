"""What must not matter: neighbours in the batch, order, the way of computing (whole or token by token), threads, micro-batches."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import ingot
from ingot.models.native import NativeModel
from networks import SHAPES, Packed, native, pack, perturbed, worst_ratio

# Around the tile of 64 keys, short ones, and an empty one.
LENGTHS = [5, 64, 1, 0, 130, 65, 2, 100, 63]
HEAD = ("logprobs", "entropy", "lse", "zbar")
FAMILIES = ["gpt2", "llama", "qwen3", "wide"]


@pytest.mark.parametrize("shape", FAMILIES)
def test_changing_a_token_changes_what_follows_it_alone(shape: str, level: str) -> None:
    config = SHAPES[shape]
    model = native(config, perturbed(config, 1), 1, level=level)
    packed = pack(config, LENGTHS, share=1.0)
    before = outputs(model, packed)
    start, stop = int(packed.offsets[4]), int(packed.offsets[5])
    for row in (start, start + 63, start + 64, start + 70, stop - 1):
        changed = packed.tokens.copy()
        changed[row] = (changed[row] + 1) % (config.vocab_size - 1)
        after = outputs(model, dataclasses.replace(packed, tokens=changed))
        for name, array in before.items():
            # The state at `row` has read the token; whatever stands before it, or in another sequence, has not.
            same = np.r_[0:row, stop : len(changed)]
            np.testing.assert_array_equal(after[name][same], array[same], err_msg=name)
            assert (after[name][row:stop] != array[row:stop]).mean() > 0.9, name


@pytest.mark.parametrize("shape", FAMILIES)
def test_a_sequence_alone_in_a_pack_and_in_another_order_has_the_same_bits(shape: str, level: str) -> None:
    config = SHAPES[shape]
    model = native(config, perturbed(config, 1), 1, level=level)
    packed = pack(config, LENGTHS, share=1.0)
    whole = outputs(model, packed)
    order = np.random.default_rng(0).permutation(len(LENGTHS))
    pieces = [packed.sequence(i) for i in order]
    shuffled = outputs(
        model,
        Packed(
            np.concatenate([piece.tokens for piece in pieces]),
            np.concatenate([[0], np.cumsum([len(piece.tokens) for piece in pieces])]),
            np.concatenate([piece.targets for piece in pieces]),
        ),
    )
    start = 0
    for i in order:
        rows = slice(int(packed.offsets[i]), int(packed.offsets[i + 1]))
        length = rows.stop - rows.start
        alone = outputs(model, packed.sequence(i))
        for name, array in whole.items():
            np.testing.assert_array_equal(alone[name], array[rows], err_msg=name)
            np.testing.assert_array_equal(shuffled[name][start : start + length], array[rows], err_msg=name)
        start += length


@pytest.mark.parametrize("shape", FAMILIES)
def test_rows_without_a_target_do_not_matter(shape: str, level: str) -> None:
    config = SHAPES[shape]
    model = native(config, perturbed(config), level=level)
    packed = pack(config, LENGTHS, share=1.0)
    _, full = model.forward(*packed.arrays)
    some = packed.targets.copy()
    some[np.random.default_rng(0).random(len(some)) < 0.7] = -1
    _, sparse = model.forward(packed.tokens, packed.offsets, some)
    np.testing.assert_array_equal(sparse.logprobs, np.where(some >= 0, full.logprobs, 0.0))


@pytest.mark.parametrize("shape", FAMILIES)
def test_training_keeps_the_bits_of_scoring(shape: str, level: str) -> None:
    config = SHAPES[shape]
    model = native(config, perturbed(config, 1), 1, level=level)
    packed = pack(config, LENGTHS, share=1.0)
    kept = outputs(model, packed, train=True)
    for name, array in outputs(model, packed, train=False).items():
        np.testing.assert_array_equal(array, kept[name], err_msg=name)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", FAMILIES)
def test_decoding_token_by_token_has_the_bits_of_training(shape: str, temperature: float, level: str) -> None:
    config = SHAPES[shape]
    model = native(config, perturbed(config), level=level)
    banned = [config.vocab_size - 1]
    packed = pack(config, LENGTHS, share=1.0)
    sequences = [packed.sequence(i).tokens for i in range(len(LENGTHS)) if LENGTHS[i] > 1]
    # Prompts of different lengths, so that chunks, single tokens and page borders come in all combinations.
    prompts = [1 + (7 * i) % (len(tokens) - 1) for i, tokens in enumerate(sequences)]
    decoder = model.decoder(max(map(len, sequences)), len(sequences) + 1, banned_ids=banned)
    sampling = ingot.Sampling(temperature=temperature)
    slots = [decoder.add(s[:n], i, sampling) for i, (s, n) in enumerate(zip(sequences, prompts, strict=True))]
    forked = decoder.fork(slots[1], 99)
    found: dict[int, dict[str, list[float]]] = {slot: {"logprobs": [], "entropy": []} for slot in [*slots, forked]}
    owners = dict(zip(slots, sequences, strict=True)) | {forked: sequences[1]}
    while decoder.active:
        forced = {slot: int(owners[slot][decoder.length(slot)]) for slot in decoder.active}
        step = decoder.step(forced)
        assert step.tokens.tolist() == [forced[slot] for slot in step.slots.tolist()]
        for slot, logprob, entropy in zip(step.slots.tolist(), step.logprobs, step.entropy, strict=True):
            found[slot]["logprobs"].append(logprob)
            found[slot]["entropy"].append(entropy)
        for slot in decoder.active:
            if decoder.length(slot) == len(owners[slot]):
                decoder.remove(slot)
    prompts_of = dict(zip(slots, prompts, strict=True)) | {forked: prompts[1]}
    for slot, tokens in owners.items():
        targets = np.append(tokens[1:], -1).astype(np.int32)
        _, out = model.forward(
            tokens,
            np.array([0, len(tokens)]),
            targets,
            want=("logprobs", "entropy"),
            temperature=temperature,
            banned_ids=banned,
        )
        rows = slice(prompts_of[slot] - 1, len(tokens) - 1)
        for name, values in found[slot].items():
            np.testing.assert_array_equal(np.array(values, dtype=np.float32), getattr(out, name)[rows], err_msg=name)


def test_sampled_tokens_do_not_depend_on_the_company() -> None:
    config = SHAPES["llama"]
    model = native(config, perturbed(config))
    sampling = ingot.Sampling(temperature=1.1, top_k=20, top_p=0.95)
    prompts = {17: [1, 2, 3], 4: [5], 1000: list(range(30)), -3: [1, 2, 3]}
    together = write(model, prompts, sampling)
    for identity, prompt in prompts.items():
        assert write(model, {identity: prompt}, sampling) == {identity: together[identity]}
    # Equal prompts, other identities: other texts.
    assert together[17] != together[-3]
    assert write(model, prompts, sampling, seed=1) != together


def test_weights_after_20_steps_do_not_depend_on_threads(level: str) -> None:
    config = dataclasses.replace(SHAPES["wide"], dropout=0.1)
    # Rows enough for several work items of every kind.
    batches = [pack(config, [64, 130, 1, 7, 100, 33], seed=i) for i in range(20)]
    results = []
    for threads in (1, 2, 3, 8):
        model = NativeModel(config, seed=3, threads=threads, level=level)
        assert model.threads == threads
        for step, batch in enumerate(batches):
            weights = np.full(len(batch.tokens), 1.0 / len(batch.tokens), dtype=np.float32)
            model.zero_grad()
            loss = model.forward_backward(*batch.arrays, weights, seed=step)
            info = model.step(1e-3)
        results.append((loss, info.grad_norm, model.state()))
    for loss, norm, state in results[1:]:
        assert (loss, norm) == results[0][:2]
        for name, array in state.items():
            np.testing.assert_array_equal(array, results[0][2][name], err_msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_eight_micro_batches_give_the_gradient_of_one(shape: str, dropout: float, level: str) -> None:
    config = dataclasses.replace(SHAPES[shape], dropout=dropout)
    model = native(config, perturbed(config), level=level)
    packed = pack(config, [9, 30, 5, 70, 18, 1, 40, 25])
    weights = np.full(len(packed.tokens), 1.0 / (packed.targets >= 0).sum(), dtype=np.float32)
    identities = np.arange(100, 108, dtype=np.int64)
    loss = model.forward_backward(*packed.arrays, weights, seed=2, sequence_ids=identities)
    whole = {name: array.copy() for name, array in model.gradients.items()}
    model.zero_grad()
    parts = 0.0
    for i in range(8):
        rows = slice(int(packed.offsets[i]), int(packed.offsets[i + 1]))
        part = packed.sequence(i)
        parts += model.forward_backward(*part.arrays, weights[rows], seed=2, sequence_ids=identities[i : i + 1])
    assert parts == pytest.approx(loss, rel=1e-12)
    ratio, name = worst_ratio(model.gradients, whole, 1e-5, 0.0)
    if name.endswith("k_proj.bias"):
        pytest.fail("a gradient that is rounding alone cannot be compared")
    assert ratio <= 1.0, name


def test_levels_with_fused_products_agree_to_the_bit() -> None:
    levels = [level for level in ingot.build_info()["levels_available"] if level != "portable"]
    config = dataclasses.replace(SHAPES["wide"], dropout=0.1)
    packed = pack(config, LENGTHS)
    weights = np.full(len(packed.tokens), 0.01, dtype=np.float32)
    states = []
    for level in levels:
        model = NativeModel(config, level=level)
        losses = []
        for step in range(3):
            model.zero_grad()
            losses.append(model.forward_backward(*packed.arrays, weights, seed=step))
            model.step(1e-3)
        states.append((losses, model.state()))
    for losses, state in states[1:]:
        assert losses == states[0][0]
        for name, array in state.items():
            np.testing.assert_array_equal(array, states[0][1][name], err_msg=name)


def outputs(model: NativeModel, packed: Packed, *, train: bool = False) -> dict[str, np.ndarray[Any, Any]]:
    _, out = model.forward(*packed.arrays, want=(*HEAD, "values", "hidden"), train=train)
    return dict(out.arrays)


def write(
    model: NativeModel, prompts: dict[int, list[int]], sampling: ingot.Sampling, seed: int = 0
) -> dict[int, list[int]]:
    """40 tokens after each prompt, by the sequence's identity."""
    decoder = model.decoder(80, len(prompts), seed=seed)
    slots = {decoder.add(prompt, identity, sampling): identity for identity, prompt in prompts.items()}
    texts: dict[int, list[int]] = {identity: [] for identity in prompts}
    for _ in range(40):
        step = decoder.step()
        for slot, token in zip(step.slots.tolist(), step.tokens.tolist(), strict=True):
            texts[slots[slot]].append(token)
    return texts
