"""Writing token by token: what is drawn follows the model's distribution, and bookkeeping never changes a bit."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

import ingot
from ingot import Sampling
from ingot.errors import ConfigError, RunError
from ingot.models.base import Model
from networks import SHAPES, native, perturbed

PLAIN = Sampling()
GREEDY = Sampling(temperature=0.0)


def make(config: ingot.ModelConfig, **options: Any) -> Model:
    return native(config, perturbed(config), **options)


@pytest.fixture(params=["gpt2", "qwen3"])
def model(request: pytest.FixtureRequest) -> Model:
    return make(SHAPES[request.param])


def bits(array: Any) -> list[int]:
    return np.asarray(array, np.float32).view(np.uint32).tolist()


def training_logprobs(model: Model, tokens: list[int], **options: Any) -> Any:
    """ln p of each token after the first."""
    inputs, targets = np.array(tokens[:-1], np.int32), np.array(tokens[1:], np.int32)
    _, out = model.forward(inputs, np.array([0, len(inputs)]), targets, train=False, **options)
    return out.logprobs


def next_scores(model: Model, tokens: list[int], temperature: float, banned: tuple[int, ...]) -> Any:
    """The scaled logits of the next token, f64[V], -inf where banned: ln p + lse of each candidate as a target."""
    allowed = [token for token in range(model.config.vocab_size) if token not in banned]
    targets = np.full((len(allowed), len(tokens)), -1, np.int32)
    targets[:, -1] = allowed
    _, out = model.forward(
        np.tile(np.array(tokens, np.int32), len(allowed)),
        np.arange(0, targets.size + 1, len(tokens)),
        targets.ravel(),
        want=("logprobs", "lse"),
        train=False,
        temperature=temperature,
        banned_ids=banned,
    )
    scores = np.full(model.config.vocab_size, -np.inf)
    last = slice(len(tokens) - 1, None, len(tokens))
    scores[allowed] = out.logprobs[last].astype(np.float64) + out.lse[last]
    return scores


def truncated(scores: Any, previous: list[int], sampling: Sampling) -> Any:
    """Probabilities after penalty, top-k, top-p and min-p, by sorting everything."""
    scores = scores.copy()
    for token in set(previous):
        factor = 1 / sampling.repetition_penalty if scores[token] > 0 else sampling.repetition_penalty
        scores[token] *= factor
    p = np.exp(scores - scores.max())
    order = sorted(np.flatnonzero(p > 0).tolist(), key=lambda token: (-p[token], token))
    if sampling.top_k:
        order = order[: sampling.top_k]
    mass = sum(p[token] for token in order)
    kept: list[int] = []
    while len(kept) < len(order) and sum(p[token] for token in kept) < sampling.top_p * mass:
        kept.append(order[len(kept)])
    kept = [token for token in kept if p[token] >= sampling.min_p * p[order[0]]]
    result = np.zeros_like(p)
    result[kept] = p[kept] / p[kept].sum()
    return result


def chi_square_deviate(counts: Counter[int], probabilities: Any) -> float:
    """The chi-square statistic of the counts as a standard normal deviate (Wilson and Hilferty 1931); rare tokens share a bin."""
    total = sum(counts.values())
    expected = probabilities * total
    common = np.flatnonzero(expected >= 5)
    observed = np.array([counts[int(token)] for token in common])
    bins = expected[common]
    if total - bins.sum() > 1:
        observed, bins = np.append(observed, total - observed.sum()), np.append(bins, total - bins.sum())
    degrees = len(bins) - 1
    statistic = ((observed - bins) ** 2 / bins).sum()
    spread = 2 / (9 * degrees)
    return float(((statistic / degrees) ** (1 / 3) - (1 - spread)) / np.sqrt(spread))


# ---- what is drawn


@pytest.mark.parametrize(
    ("sampling", "draws"),
    [
        (PLAIN, 200_000),
        (Sampling(temperature=0.6), 20_000),
        (Sampling(temperature=1.7, top_k=7), 20_000),
        (Sampling(top_p=0.8), 20_000),
        (Sampling(min_p=0.2), 20_000),
        (Sampling(temperature=1.5, repetition_penalty=1.8), 20_000),
        (Sampling(temperature=1.3, top_k=20, top_p=0.9, min_p=0.1, repetition_penalty=1.2), 20_000),
    ],
    ids=lambda value: str(value).removeprefix("Sampling"),
)
def test_draws_follow_the_distribution(sampling: Sampling, draws: int) -> None:
    model = make(SHAPES["qwen3"])
    # Several tokens are likely, several not.
    model.parameters["model.norm.weight"][...] *= 0.5
    prompt, banned = [4, 9, 9, 1], (2, 30)
    expected = truncated(next_scores(model, prompt, sampling.temperature, banned), prompt, sampling)
    # A choice, but not among equals.
    assert expected.max() > 1.5 / np.count_nonzero(expected)
    assert (np.count_nonzero(expected) < 33) == (sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0)
    width = 1000
    decoder = model.decoder(len(prompt) + 1, width, seed=11, banned_ids=banned)
    counts: Counter[int] = Counter()
    for turn in range(draws // width):
        first = decoder.add(prompt, turn * width, sampling)
        slots = [first, *(decoder.fork(first, turn * width + i) for i in range(1, width))]
        counts.update(decoder.step().tokens.tolist())
        for slot in slots:
            decoder.remove(slot)
    assert sum(counts.values()) == draws
    assert set(counts) <= set(np.flatnonzero(expected).tolist())
    assert chi_square_deviate(counts, expected) < 4


def test_greedy_takes_the_likeliest_and_reports_temperature_one(model: Model) -> None:
    decoder = model.decoder(30, 1)
    slot = decoder.add([1, 5], 0, GREEDY)
    tokens = [1, 5]
    logprobs = []
    for _ in range(20):
        scores = next_scores(model, tokens, 1.0, ())
        step = decoder.step()
        tokens.append(int(step.tokens[0]))
        logprobs.append(step.logprobs[0])
        assert tokens[-1] == int(scores.argmax())
    assert bits(logprobs) == bits(training_logprobs(model, tokens)[1:])
    assert decoder.length(slot) == 22


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.0])
def test_reported_numbers_are_those_of_the_full_softmax(model: Model, temperature: float) -> None:
    """Truncation and penalty change what is drawn, not what is reported; banned ids change both."""
    sampling = Sampling(temperature=temperature, top_k=5, top_p=0.9, repetition_penalty=1.3)
    decoder = model.decoder(80, 1, banned_ids=[7, 8])
    decoder.add([3], 5, sampling)
    tokens, logprobs, entropies = [3], [], []
    for _ in range(70):
        step = decoder.step()
        tokens.append(int(step.tokens[0]))
        logprobs.append(step.logprobs[0])
        entropies.append(step.entropy[0])
    assert not {7, 8} & set(tokens)
    inputs, targets = np.array(tokens[:-1], np.int32), np.array(tokens[1:], np.int32)
    _, out = model.forward(
        inputs,
        np.array([0, len(inputs)]),
        targets,
        want=("logprobs", "entropy"),
        temperature=temperature,
        banned_ids=[7, 8],
        train=False,
    )
    assert bits(logprobs) == bits(out.logprobs)
    assert bits(entropies) == bits(out.entropy)


# ---- who shares the batch


def test_a_sample_depends_on_its_identity_alone(model: Model, level: str) -> None:
    """The same sequence id gives the same text alone, among 64, in another slot, and after a fork."""
    model = make(model.config, level=level)
    prompts = [[1 + i % 5, *range(i % 7)] for i in range(64)]
    count = 40

    def write(order: list[int], capacity: int) -> dict[int, list[tuple[int, int]]]:
        decoder = model.decoder(60, capacity, seed=3)
        waiting, active = list(order), {}
        texts: dict[int, list[tuple[int, int]]] = {i: [] for i in order}
        while waiting or active:
            while waiting and len(active) < capacity:
                i = waiting.pop(0)
                active[decoder.add(prompts[i], i, PLAIN)] = i
            step = decoder.step()
            for slot, token, logprob in zip(
                step.slots.tolist(), step.tokens.tolist(), bits(step.logprobs), strict=True
            ):
                i = active[slot]
                texts[i].append((token, logprob))
                # Sequences leave at different times, so that others take their slots.
                if len(texts[i]) == count - i % 11:
                    decoder.remove(slot)
                    del active[slot]
        return texts

    together = write(list(range(64)), 64)
    assert write(list(reversed(range(64))), 7) == together
    assert {i: write([i], 1)[i] for i in (0, 17, 63)} == {i: together[i] for i in (0, 17, 63)}
    assert len({tuple(text) for text in together.values()}) == 64
    assert model.decoder(60, 1, seed=4).add(prompts[0], 0, PLAIN) == 0


def test_seeds_and_sequence_ids_change_the_draws(model: Model) -> None:
    def text(seed: int, sequence_id: int) -> list[int]:
        decoder = model.decoder(40, 1, seed=seed)
        decoder.add([1], sequence_id, PLAIN)
        return [int(decoder.step().tokens[0]) for _ in range(30)]

    assert text(1, 2) == text(1, 2)
    assert len({tuple(text(seed, i)) for seed in (0, 1, 1 << 40) for i in (0, 1, 1 << 40, -1)}) == 12


# ---- bookkeeping


def test_forks_share_the_past_and_nothing_else(model: Model) -> None:
    """Forks of forks at every place of a page, each with its own continuation, have the bits of separate sequences."""
    rng = np.random.default_rng(0)
    vocab_size = model.config.vocab_size
    decoder = model.decoder(128, 8)
    texts = {decoder.add([1, 2, 3], 0, PLAIN): [1, 2, 3]}
    begins = {0: 2}
    logprobs: dict[int, list[float]] = {0: []}
    for step_number in range(100):
        if step_number in (0, 1, 60, 61, 62, 63, 90):
            origin = list(texts)[step_number % len(texts)]
            slot = decoder.fork(origin, step_number)
            texts[slot] = list(texts[origin])
            begins[slot] = len(texts[origin]) - 1
            logprobs[slot] = []
        forced = {slot: int(rng.integers(vocab_size)) for slot in texts}
        step = decoder.step(forced)
        assert step.slots.tolist() == sorted(texts)
        for slot, token, logprob in zip(step.slots.tolist(), step.tokens.tolist(), step.logprobs, strict=True):
            assert token == forced[slot]
            texts[slot].append(token)
            logprobs[slot].append(logprob)
    assert len(texts) == 8
    for slot, text in texts.items():
        assert decoder.length(slot) == len(text)
        assert bits(logprobs[slot]) == bits(training_logprobs(model, text)[begins[slot] :]), slot


def test_removed_slots_leave_nothing_behind(model: Model) -> None:
    decoder = model.decoder(100, 2)
    rng = np.random.default_rng(0)
    for turn in range(5):
        first = decoder.add(rng.integers(0, 20, 70), turn, PLAIN)
        decoder.step()
        second = decoder.fork(first, 99)
        decoder.step()
        decoder.remove(first)
        text = rng.integers(0, 20, 30).tolist()
        third = decoder.add(text[:2], turn, PLAIN)
        assert third == first
        got = [decoder.step({third: token}).logprobs[0] for token in text[2:]]
        assert bits(got) == bits(training_logprobs(model, text)[1:])
        assert decoder.active == [third, second] if third < second else [second, third]
        decoder.remove(second)
        decoder.remove(third)
    assert decoder.active == []
    assert len(decoder.step().tokens) == 0


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads_change_nothing(threads: int) -> None:
    results = []
    for number in (1, threads):
        model = make(SHAPES["qwen3"], threads=number)
        decoder = model.decoder(80, 5)
        for i in range(5):
            decoder.add([i, i + 1], i, PLAIN)
        steps = [decoder.step() for _ in range(70)]
        results.append([(step.tokens.tolist(), bits(step.logprobs)) for step in steps])
    assert results[0] == results[1]


# ---- errors


def test_errors_name_the_slot_or_the_value(model: Model) -> None:
    decoder = model.decoder(6, 2, banned_ids=[4])
    vocab_size = model.config.vocab_size
    with pytest.raises(ValueError, match="slot: 0 is not in use"):
        decoder.length(0)
    with pytest.raises(ValueError, match="tokens: is empty"):
        decoder.add([], 0, PLAIN)
    with pytest.raises(IndexError, match=rf"tokens\[1\] is {vocab_size}, outside 0\.\.{vocab_size}"):
        decoder.add([0, vocab_size], 0, PLAIN)
    with pytest.raises(ConfigError, match="tokens: needs a list of token ids, got float64"):
        decoder.add([0.5], 0, PLAIN)
    with pytest.raises(ValueError, match=r"tokens: has 6 entries, which leaves no room .* max_tokens = 6"):
        decoder.add([0] * 6, 0, PLAIN)
    slot = decoder.add([0] * 4, 0, PLAIN)
    decoder.fork(slot, 1)
    with pytest.raises(ValueError, match="slots: 2 are all in use"):
        decoder.add([0], 2, PLAIN)
    with pytest.raises(ValueError, match="forced: 4 for slot 1 is one of banned_ids"):
        decoder.step({1: 4})
    with pytest.raises(IndexError, match=r"forced\[0\] is -1"):
        decoder.step({1: -1})
    with pytest.raises(ValueError, match="slot: 5 is not in use"):
        decoder.step({5: 1})
    assert (decoder.length(0), decoder.length(1)) == (4, 4)
    decoder.step()
    decoder.step()
    with pytest.raises(ValueError, match="slot: 0 is full with max_tokens = 6 tokens"):
        decoder.step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"temperature": float("nan")}, "temperature must be 0 or more"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p must be above 0"),
        ({"min_p": -0.1}, "min_p must be between 0 and 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive"),
    ],
)
def test_sampling_settings_are_checked(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)  # type: ignore[arg-type]


def test_learned_positions_limit_a_decoder() -> None:
    model = make(SHAPES["gpt2"])
    with pytest.raises(ValueError, match="max_tokens: 131 is beyond the 130 positions that the model has learned"):
        model.decoder(131, 1)
    decoder = model.decoder(130, 1)
    decoder.add([0] * 129, 0, PLAIN)
    assert len(decoder.step().tokens) == 1


def test_a_decoder_serves_the_weights_that_it_was_made_with(model: Model) -> None:
    decoder = model.decoder(10, 1)
    decoder.add([1], 0, PLAIN)
    model.forward_backward(np.zeros(4, np.int32), np.array([0, 4]), np.zeros(4, np.int32), np.ones(4, np.float32))
    decoder.step()
    model.step(1e-3)
    for call in (decoder.step, lambda: decoder.add([1], 1, PLAIN), lambda: decoder.fork(0, 1)):
        with pytest.raises(RuntimeError, match="the parameters changed after this decoder was made"):
            call()


def test_weights_that_are_no_numbers_are_named(model: Model) -> None:
    next(iter(model.parameters.values()))[...] = np.nan
    decoder = model.decoder(10, 1)
    decoder.add([1], 42, PLAIN)
    with pytest.raises(RunError, match="the logits of sequence 42 are not finite"):
        decoder.step()
