"""Rollouts: what is drawn follows the policy's distribution, its log-probabilities are those of training, bit for bit, and an episode
is a function of its id."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest

import ingot
from ingot import Sampling
from ingot.errors import ConfigError
from ingot.losses.policy import ppo_policy_loss
from ingot.training.rollouts import (
    EpisodeStream,
    banned_ids_of,
    logprob_mismatch,
    packs,
    recompute_logprobs,
    sample_rollouts,
)
from networks import SHAPES, native, perturbed, twin

END = 3
BANNED = (0, 5)


@pytest.fixture(scope="module", params=["gpt2", "qwen3"])
def model(request):
    return native(SHAPES[request.param], perturbed(SHAPES[request.param]))


@pytest.fixture(scope="module")
def small():
    config = ingot.ModelConfig.gpt2(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=12
    )
    return native(config, perturbed(config))


def prompts_for(count, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(6, 30, size=generator.integers(1, 9)).astype(np.int32) for _ in range(count)]


def draw(model, prompts, **options):
    return sample_rollouts(
        model,
        prompts,
        **{"max_new_tokens": 20, "end_ids": [END], "banned_ids": BANNED, "num_generations": 3, **options},
    )


def exact(model, prompt, temperature):
    """Probability of every sequence of at most two actions, from f64 sums of single training passes."""

    def nexts(tokens):
        allowed = [token for token in range(model.config.vocab_size) if token not in BANNED]
        targets = np.full((len(allowed), len(tokens)), -1, np.int32)
        targets[:, -1] = allowed
        _, out = model.forward(
            np.tile(np.array(tokens, np.int32), len(allowed)),
            np.arange(0, targets.size + 1, len(tokens)),
            targets.ravel(),
            train=False,
            temperature=temperature,
            banned_ids=BANNED,
        )
        return dict(zip(allowed, np.exp(out.logprobs[len(tokens) - 1 :: len(tokens)].astype(np.float64)), strict=True))

    chances = {}
    for first, p in nexts(prompt).items():
        if first == END:
            chances[first,] = p
        else:
            chances |= {(first, second): p * q for second, q in nexts([*prompt, first]).items()}
    return chances


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_200_000_draws_follow_the_exact_probabilities(small, temperature):
    prompt, count = [1, 2, 4], 60_000
    rollouts = draw(
        small,
        [prompt],
        num_generations=count,
        max_new_tokens=2,
        sampling=Sampling(temperature=temperature),
        max_sequences=1000,
    )
    chances = exact(small, prompt, temperature)
    assert sum(chances.values()) == pytest.approx(1, abs=1e-5)
    seen = Counter(tuple(rollouts.completion_ids(number).tolist()) for number in range(count))
    assert set(seen) <= set(chances)
    statistic = sum((seen[key] - count * p) ** 2 / (count * p) for key, p in chances.items())
    freedom = len(chances) - 1
    # Wilson and Hilferty 1931: the cube root is nearly normal. 4 deviations: once in 30,000 seeds.
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert abs(z) < 4
    assert rollouts.mask.sum() > 100_000  # twice, so 2e5 draws in all


def test_log_probabilities_are_those_of_training_bit_for_bit(model, level):
    leveled = native(model.config, perturbed(model.config), level=level)
    for temperature in (1.0, 0.7):
        rollouts = draw(leveled, prompts_for(12), sampling=Sampling(temperature=temperature))
        again = recompute_logprobs(leveled, rollouts, max_tokens=50)
        mismatch = logprob_mismatch(rollouts, again)
        assert (mismatch.max, mismatch.mean, mismatch.num_different) == (0.0, 0.0, 0)
        assert mismatch.num_actions == rollouts.num_actions.sum() > 100
        assert mismatch.alarm is None
        assert np.array_equal(again, recompute_logprobs(leveled, rollouts))
        _, out = leveled.forward(
            rollouts.tokens,
            rollouts.offsets,
            rollouts.targets,
            want=("entropy",),
            train=False,
            temperature=temperature,
            banned_ids=rollouts.banned_ids,
        )
        assert np.array_equal(out.entropy, rollouts.entropy)


def test_torch_agrees_and_another_temperature_or_mask_raises_the_alarm(model):
    rollouts = draw(model, prompts_for(12))
    assert (
        logprob_mismatch(rollouts, recompute_logprobs(twin(model.config, perturbed(model.config)), rollouts)).mean
        < 2e-5
    )
    for change in ({"temperature": 1.1}, {"banned_ids": np.array([0], np.int32)}):
        mismatch = logprob_mismatch(rollouts, recompute_logprobs(model, dataclasses.replace(rollouts, **change)))
        assert mismatch.mean > 5e-4
        assert "off-policy" in mismatch.alarm
        assert "\n" not in mismatch.alarm
        assert mismatch.metrics()["sampling/sampling_logp_difference/mean"] == mismatch.mean


def test_the_torch_backend_samples_what_it_trains(model):
    torch_model = twin(model.config, perturbed(model.config), precision="f32")
    rollouts = draw(torch_model, prompts_for(8), max_sequences=5)
    assert logprob_mismatch(rollouts, recompute_logprobs(torch_model, rollouts)).max < 2e-4
    assert logprob_mismatch(rollouts, recompute_logprobs(model, rollouts)).max < 2e-4


def test_policy_losses_take_a_rollout_as_it_is(model):
    rollouts = draw(model, prompts_for(8))
    again = recompute_logprobs(model, rollouts)
    advantages = np.random.default_rng(0).normal(size=len(rollouts.tokens))
    _, gradient, metrics = ppo_policy_loss(
        again, rollouts.logprobs, advantages, rollouts.targets, num_tokens=float(rollouts.mask.sum())
    )
    assert metrics["val/ratio"] == pytest.approx(1, abs=1e-12)
    assert metrics["policy/clipfrac_avg"] == 0
    assert np.array_equal(gradient != 0, rollouts.mask)


def texts(rollouts):
    return {
        int(rollouts.episode_ids[n]): (
            rollouts.completion_ids(n).tolist(),
            rollouts.logprobs[s:e].view(np.uint32).tolist(),
        )
        for n, (s, e) in enumerate(zip(rollouts.offsets[:-1], rollouts.offsets[1:], strict=True))
    }


@pytest.mark.parametrize("slots", [1, 2, 5, 64])
def test_an_episode_depends_on_its_id_alone(model, slots):
    prompts = prompts_for(20)
    ids = 1000 + 7 * np.arange(60)
    usual = draw(model, prompts, episode_ids=ids, max_sequences=16)
    other = draw(model, prompts, episode_ids=ids, max_sequences=slots)
    for name in ("tokens", "offsets", "targets", "logprobs", "episode_ids", "group_ids", "truncated"):
        assert np.array_equal(getattr(usual, name), getattr(other, name)), name
    order = np.random.default_rng(1).permutation(20)
    turned = draw(
        model, [prompts[n] for n in order], episode_ids=ids.reshape(20, 3)[order].ravel(), max_sequences=slots
    )
    assert texts(turned) == texts(usual)
    alone = draw(model, [prompts[4]], episode_ids=ids[12:13], num_generations=1, max_sequences=slots)
    assert texts(alone)[1084] == texts(usual)[1084]
    threaded = native(model.config, perturbed(model.config), threads=2)
    assert texts(draw(threaded, prompts, episode_ids=ids, max_sequences=slots)) == texts(usual)
    assert texts(draw(model, prompts, episode_ids=ids, seed=1)) != texts(usual)
    assert texts(draw(model, prompts, episode_ids=ids + 1))[1001 + 7] != texts(usual)[1000 + 7]


def test_ends_truncation_bans_and_groups(model):
    prompts = prompts_for(40)
    rollouts = draw(model, prompts)
    assert len(rollouts) == 120
    assert rollouts.group_ids.tolist() == [n // 3 for n in range(120)]
    assert rollouts.episode_ids.tolist() == list(range(120))
    assert 0 < rollouts.truncated.sum() < 120
    for number in range(120):
        completion = rollouts.completion_ids(number).tolist()
        assert rollouts.prompt_ids(number).tolist() == prompts[number // 3].tolist()
        assert not set(BANNED) & set(completion)
        assert END not in completion[:-1]
        assert rollouts.truncated[number] == (completion[-1] != END)
        assert len(completion) == 20 if rollouts.truncated[number] else len(completion) <= 20
        start, end = rollouts.offsets[number : number + 2]
        first = start + rollouts.prompt_lengths[number] - 1
        assert rollouts.targets[start:end].tolist() == [-1] * (first - start) + completion + [-1]
        assert (rollouts.logprobs[start:end] != 0).tolist() == rollouts.mask[start:end].tolist()
    metrics = rollouts.metrics()
    assert metrics["completions/clipped_ratio"] == pytest.approx(rollouts.truncated.mean())
    assert metrics["val/num_eos_tokens"] == 120 - rollouts.truncated.sum()
    assert metrics["completions/mean_length"] == pytest.approx(rollouts.mask.sum() / 120)
    none = draw(model, prompts[:3], end_ids=[])
    assert none.truncated.all()
    assert set(none.num_actions.tolist()) == {20}


def test_the_members_of_a_group_share_the_reading_of_their_prompt(model, monkeypatch):
    reads = []
    make = model.decoder

    class Counting:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def add(self, tokens, sequence_id, sampling):
            reads.append(len(tokens))
            return self.inner.add(tokens, sequence_id, sampling)

    monkeypatch.setattr(
        model, "decoder", lambda *arguments, **options: Counting(make(*arguments, **options)), raising=False
    )
    draw(model, prompts_for(30), num_generations=4, max_sequences=16)
    assert len(reads) == 30


def test_finished_episodes_leave_at_once_and_waiting_ones_enter(model):
    stream = EpisodeStream(
        model, max_prompt_tokens=9, max_new_tokens=30, end_ids=[END], banned_ids=BANNED, max_sequences=8
    )
    for number, prompt in enumerate(prompts_for(60)):
        stream.submit(prompt, [number], number)
    busy = []
    while stream.step():
        waiting = stream.num_submitted - stream.num_done - len(stream._active)
        busy.append((len(stream._active), waiting))
    assert all(active + (stream.num_done > 0) * 8 >= 8 for active, waiting in busy if waiting)
    # Were slots refilled only when all are free, this would take as many steps as the longest of each eight.
    assert len(busy) < 1.5 * stream.num_tokens / 8 + 30
    assert sorted(episode.episode_id for episode in stream) == list(range(60))


def test_more_can_be_submitted_while_episodes_come(model):
    stream = EpisodeStream(model, max_prompt_tokens=9, max_new_tokens=5, end_ids=[END], max_sequences=4)
    stream.submit([7, 8], [0, 1], 5)
    got = []
    for episode in stream:
        got.append((episode.group_id, episode.episode_id))
        if len(got) == 1:
            stream.submit([9], [2], 6)
    assert sorted(got) == [(5, 0), (5, 1), (6, 2)]
    assert list(stream) == []


def test_the_context_ends_an_episode(small):
    rollouts = sample_rollouts(small, [[1] * 10, [1] * 3], max_new_tokens=100, end_ids=[])
    assert rollouts.num_actions.tolist() == [2, 9]
    assert rollouts.truncated.all()
    assert logprob_mismatch(rollouts, recompute_logprobs(small, rollouts)).num_different == 0
    with pytest.raises(ConfigError, match="prompt 1 has 12 tokens, which leaves no room to answer in 12"):
        sample_rollouts(small, [[1], [1] * 12], max_new_tokens=1, end_ids=[])


def test_a_minibatch_is_the_same_episodes(model):
    rollouts = draw(model, prompts_for(6))
    chosen = [7, 2, 17]
    part = rollouts.select(chosen)
    assert part.episode_ids.tolist() == chosen
    for place, number in enumerate(chosen):
        assert part.prompt_ids(place).tolist() == rollouts.prompt_ids(number).tolist()
        assert part.completion_ids(place).tolist() == rollouts.completion_ids(number).tolist()
    assert logprob_mismatch(part, recompute_logprobs(model, part)).num_different == 0
    assert len(rollouts.select([])) == 0
    slices = list(packs(rollouts, 40))
    assert [n for episodes, _ in slices for n in range(episodes.start, episodes.stop)] == list(range(18))
    assert all(rows.stop - rows.start <= 40 or e.stop - e.start == 1 for e, rows in slices)
    assert len(slices) > 3


def test_stopping_in_the_middle_leaves_the_model_whole(model):
    prompts = prompts_for(10)
    whole = draw(model, prompts)
    seen = []

    def stop(done, total):
        seen.append((done, total))
        if len(seen) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(model, prompts, progress=stop)
    assert seen[0][1] == 30
    assert texts(draw(model, prompts)) == texts(whole)


@pytest.mark.parametrize(
    ("name", "value"), [("top_k", 5), ("top_p", 0.9), ("min_p", 0.1), ("repetition_penalty", 1.2), ("temperature", 0.0)]
)
def test_what_would_sample_off_policy_is_refused(model, name, value):
    with pytest.raises(ConfigError, match=name) as error:
        draw(model, prompts_for(1), sampling=Sampling(**{name: value}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_sequences": 0}, "max_sequences must be at least 1"),
        ({"num_generations": 0}, "num_generations must be at least 1"),
        ({"end_ids": [0]}, "end id 0 is also banned"),
        ({"end_ids": [99]}, "end id 99 is no id of the model"),
        ({"episode_ids": [1, 2]}, "episode_ids has 2 entries"),
        ({"episode_ids": [1, 2, 1]}, "holds an id twice"),
    ],
)
def test_settings_that_do_not_fit(model, options, words):
    with pytest.raises(ConfigError, match=words):
        draw(model, prompts_for(1), **options)


def test_an_empty_prompt_is_refused_and_no_prompt_is_no_episode(model):
    with pytest.raises(ConfigError, match="prompt 0 is empty"):
        draw(model, [[]])
    nothing = draw(model, [])
    assert (len(nothing), nothing.metrics(), logprob_mismatch(nothing, nothing.logprobs).mean) == (0, {}, 0.0)


def test_headers_padding_and_rows_without_a_token_are_never_drawn():
    tokenizer = ingot.Tokenizer.bytes_only().with_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    ends = {256, 258}
    assert tokenizer.special_tokens["<|im_start|>"] == 257
    assert banned_ids_of(tokenizer, 262, ends).tolist() == [257, 259, 260, 261]
