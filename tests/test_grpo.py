"""Group methods: what is learned from, what each method is made of, what a run leaves behind, and what it says to bad input."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ingot
import killable_ppo
from ingot.cli import main
from ingot.configs import GRPOConfig
from ingot.configs.grpo import _METHODS
from ingot.errors import ConfigError, DataError, RunError
from ingot.losses.advantages import soft_overlong_punishment
from ingot.training import groups
from ingot.training import grpo as phase
from ingot.training.callbacks import Callback
from ingot.training.progress import make_display
from ingot.training.setup import Given, prepare
from killable_grpo import REWARDS, child, lines_without_time, settings, write_prompts
from killable_sft import rows, write_base, write_rows

LOSS_TYPES = tuple(_METHODS)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model (whose dropout is to be off), prompts and a file of rewards."""
    write_base(tmp_path / "base", dropout=0.1)
    write_prompts(tmp_path / "prompts.jsonl")
    (tmp_path / "rewards.py").write_text(REWARDS)
    return tmp_path


def config_at(place: Path, **changes: Any) -> GRPOConfig:
    fields: dict[str, Any] = {
        "model": str(place / "base"),
        "prompts": (str(place / "prompts.jsonl"),),
        "reward": (f"{place / 'rewards.py'}:low",),
        "output": str(place / "run"),
        "num_generations": 4,
        "per_device_train_batch_size": 16,
        "max_completion_length": 4,
        "max_steps": 2,
        "held_out": 0.2,
        "learning_rate": 3e-3,
        "threads": 1,
        **changes,
    }
    return GRPOConfig(**fields)


def updates(result: Any) -> list[dict[str, Any]]:
    return [line for line in result.history if "loss" in line]


# ---- methods


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_method_runs_and_says_what_it_did(place, loss_type):
    steps = {} if loss_type == "reinforce" else {"num_iterations": 2, "num_mini_batches": 2}
    result = phase.grpo(config_at(place, loss_type=loss_type, beta=0.1, **steps), quiet=True)
    lines = updates(result)
    assert [line["step"] for line in lines] == [1, 2]
    names = {"reward", "reward_std", "rewards/low/mean", "frac_reward_zero_std", "kl", "entropy", "objective/kl"}
    names |= {"completions/mean_length", "completions/clipped_ratio", "rewards/low/pass@1", "rewards/low/pass@4"}
    names |= {"val/ratio_first", "policy/approxkl_avg", "num_dropped", "time/share_sampling", "time/episodes_per_s"}
    if loss_type not in ("cispo", "reinforce"):
        names |= {"clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"}
    if loss_type == "cispo":
        names |= {"cispo_clip_ratio"}
    for line in lines:
        assert names <= line.keys(), names - line.keys()
        assert line["val/num_steps"] == (1 if loss_type == "reinforce" else 4)
        assert line["val/ratio_first"] == 0.0  # sampling and training agree bit for bit
    assert lines[0]["grad_norm"] > 0
    assert lines[0]["kl"] == 0.0 < lines[1]["kl"]
    assert lines[0]["reward"] == pytest.approx(lines[0]["rewards/low/pass@1"])
    assert lines[0]["rewards/low/pass@1"] < lines[0]["rewards/low/pass@4"]


@pytest.mark.parametrize("estimator", ["group", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_advantages_of_one_method_go_with_the_loss_of_another(place, estimator, ratio):
    changes = {"advantage_estimator": estimator, "importance_sampling_level": ratio, "kl_penalty": "reward"}
    result = phase.grpo(
        config_at(place, loss_type="grpo", beta=0.1, sampling_ratio_cap=2.0, entropy_coef=0.01, **changes), quiet=True
    )
    assert updates(result)[-1]["grad_norm"] > 0
    assert "policy/entropy_avg" in updates(result)[-1]


def rollout(config: GRPOConfig, **given: Any) -> tuple[Any, Any]:
    """What a run starts with, and the answers of its first update."""
    setup = prepare(config, Given(**given), make_display(True))
    experience = phase.gather(
        setup,
        setup.prompts.take(0, config.num_prompts),
        policy=setup.policy,
        num_generations=config.num_generations,
        first_episode=0,
        seed=config.seed,
    )
    return setup, experience


def gradient(config: GRPOConfig, setup: Any, lesson: Any, pack_length: int) -> dict[str, np.ndarray]:
    """Of one minibatch with all answers of a lesson."""
    experience = lesson.experience
    numbers = np.arange(len(experience))
    batch = phase._Minibatch(
        experience.rollouts,
        experience.logprobs - 0.1,
        experience.ref_logprobs + 0.2,
        lesson.advantages_of(numbers, np.arange(len(experience.logprobs))),
        num_sequences=len(numbers),
    )
    setup.policy.zero_grad()
    phase._backward(config, setup.policy, batch, pack_length)
    return {name: np.array(values) for name, values in setup.policy.gradients.items()}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_packs_do_not_change_the_gradient(place, loss_type):
    config = config_at(place, loss_type=loss_type, beta=0.3, entropy_coef=0.1, kl_penalty="loss", kl_estimator="k2")
    setup, experience = rollout(config)
    lesson, _ = groups.make_lesson(config, experience)
    whole, parts = (gradient(config, setup, lesson, length) for length in (4096, 10))
    assert max(float(np.abs(values).max()) for values in whole.values()) > 0
    for name, values in whole.items():
        np.testing.assert_allclose(parts[name], values, atol=1e-5 * np.abs(values).max() + 1e-9, err_msg=name)


def letters(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    """A score that differs from answer to answer."""
    return [float(sum(text.encode())) / 100 for text in completions]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"loss_type": "grpo"}, lambda r, m, s, all_: (r - m) / (s + 1e-4)),
        ({"loss_type": "dr_grpo"}, lambda r, m, s, all_: r - m),
        ({"loss_type": "dapo", "scale_rewards": "batch"}, lambda r, m, s, all_: (r - m) / (all_ + 1e-4)),
        ({"loss_type": "reinforce"}, lambda r, m, s, all_: r - m),
        ({"loss_type": "rloo", "beta": 0.0}, lambda r, m, s, all_: (r - m) * 4 / 3),
    ],
)
def test_advantages_are_those_of_the_method(place, changes, expected):
    config = config_at(place, reward=(), **changes)
    _, experience = rollout(config, rewards=(letters,))
    lesson, metrics = groups.make_lesson(config, experience)
    rewards = experience.scores.total.reshape(-1, 4)
    mean, std = rewards.mean(1, keepdims=True), rewards.std(1, ddof=1, keepdims=True)
    wanted = expected(rewards, mean, std, rewards.std(ddof=1))
    np.testing.assert_allclose(lesson.advantages.reshape(-1, 4), wanted, rtol=1e-9, atol=1e-12)
    assert metrics["reward"] == pytest.approx(rewards.mean())
    assert metrics["reward_std"] == pytest.approx(rewards.std(ddof=1))


def test_the_kl_is_taken_off_the_reward_of_each_answer(place):
    config = config_at(place, reward=(), loss_type="rloo", beta=0.5)
    _, experience = rollout(config, rewards=(letters,))
    moved = dataclasses.replace(
        experience, ref_logprobs=(experience.logprobs - np.arange(len(experience.logprobs)) / 50).astype(np.float32)
    )
    lesson, metrics = groups.make_lesson(config, moved)
    rewards = (moved.scores.total - 0.5 * moved.kl).reshape(-1, 4)
    np.testing.assert_allclose(
        lesson.advantages.reshape(-1, 4), (rewards - rewards.mean(1, keepdims=True)) * 4 / 3, rtol=1e-6
    )
    assert metrics["objective/rlhf_reward"] == pytest.approx(rewards.mean())


def test_reinforce_plus_plus_gives_each_token_what_is_still_to_come(place):
    config = config_at(place, reward=(), loss_type="reinforce_plus_plus", beta=0.5, num_generations=1)
    _, experience = rollout(config, rewards=(letters,))
    moved = dataclasses.replace(
        experience, ref_logprobs=(experience.logprobs - np.arange(len(experience.logprobs)) / 50).astype(np.float32)
    )
    lesson, _ = groups.make_lesson(config, moved)
    to_go = np.zeros(len(moved.logprobs))
    difference = moved.logprobs.astype(float) - moved.ref_logprobs
    for number, (start, end) in enumerate(zip(moved.rollouts.offsets[:-1], moved.rollouts.offsets[1:], strict=True)):
        value = moved.scores.total[number]
        for t in range(end - 1, start - 1, -1):
            if moved.rollouts.targets[t] >= 0:
                value -= 0.5 * difference[t]
                to_go[t] = value
    mask = moved.rollouts.mask
    expected = (to_go[mask] - to_go[mask].mean()) / to_go[mask].std()
    np.testing.assert_allclose(lesson.advantages[mask], expected, rtol=1e-6)


# ---- what is learned from


def some(answers: list[Any]) -> Any:
    """A reward function that gives these, over and over."""

    def given(prompts: Any, completions: Any, **columns: Any) -> list[Any]:
        return [answers[number % len(answers)] for number in range(len(completions))]

    return given


SIGNAL_IN_ONE_OF_FOUR = [
    number for group in ([1] * 4, [0] * 4, [0, 1, 0, 0], [None, None, None, 1]) for number in group
]


def test_groups_without_signal_are_counted_kept_or_dropped(place):
    kept, metrics = groups.make_lesson(
        config_at(place), rollout(config_at(place, reward=()), rewards=(some(SIGNAL_IN_ONE_OF_FOUR),))[1]
    )
    assert metrics["frac_reward_zero_std"] == 0.75
    # Three answers have no reward: nothing is learned from them.
    assert len(kept) == metrics["val/num_trained"] == 13
    config = config_at(place, zero_std_groups="drop", reward=())
    dropped, metrics = groups.make_lesson(config, rollout(config, rewards=(some(SIGNAL_IN_ONE_OF_FOUR),))[1])
    assert metrics["frac_reward_zero_std"] == 0.75
    assert dropped.experience.rollouts.episode_ids.tolist() == [8, 9, 10, 11]
    std = np.std([0, 1, 0, 0], ddof=1)
    np.testing.assert_allclose(dropped.advantages, (np.array([0, 1, 0, 0]) - 0.25) / (std + 1e-4))


def test_resampling_fills_the_update_with_other_prompts(place):
    config = config_at(place, reward=(), zero_std_groups="resample", per_device_train_batch_size=16, max_steps=1)
    result = phase.grpo(config, rewards=(some(SIGNAL_IN_ONE_OF_FOUR),), quiet=True)
    (line,) = updates(result)
    # Of each draw one group in four teaches something; after three more draws the update goes with what there is.
    assert line["val/num_episodes"] == 4 * 16
    assert line["val/num_trained"] == 16
    assert line["episode"] == 64
    few = phase.grpo(
        dataclasses.replace(config, max_resamples=1, output=str(place / "few")),
        rewards=(some(SIGNAL_IN_ONE_OF_FOUR),),
        quiet=True,
    )
    assert updates(few)[0]["val/num_trained"] == 8
    # Where as many groups are found as are wanted, the rest is left.
    many = some([0, 1])
    plenty = phase.grpo(dataclasses.replace(config, output=str(place / "plenty")), rewards=(many,), quiet=True)
    assert updates(plenty)[0]["val/num_episodes"] == updates(plenty)[0]["val/num_trained"] == 16


def test_groups_of_several_draws_are_not_mixed_and_no_more_are_taken_than_wanted(place):
    draws = 0

    def by_draw(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        """All the same in a draw, but not the same in the next one."""
        nonlocal draws
        draws += 1
        return [float(draws)] * len(completions)

    config = config_at(place, reward=(), zero_std_groups="resample", max_steps=1, held_out=0.0)
    (line,) = updates(phase.grpo(config, rewards=(by_draw,), quiet=True))
    assert (line["frac_reward_zero_std"], line["val/num_trained"], line["val/num_episodes"]) == (1.0, 0, 64)

    def three_of_four(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        return [0.0] * 4 + [float(number % 2) for number in range(len(completions) - 4)]

    (line,) = updates(
        phase.grpo(dataclasses.replace(config, output=str(place / "b")), rewards=(three_of_four,), quiet=True)
    )
    # One group is missing and three of four teach something: two more are drawn, one of which does.
    assert (line["val/num_episodes"], line["val/num_trained"]) == (24, 16)

    def then_all(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        silent = 4 if len(completions) == 16 else 0
        return [0.0] * silent + [float(number % 2) for number in range(len(completions) - silent)]

    (line,) = updates(phase.grpo(dataclasses.replace(config, output=str(place / "c")), rewards=(then_all,), quiet=True))
    assert (line["val/num_episodes"], line["val/num_trained"]) == (24, 16)


def test_without_any_signal_there_is_an_alarm_and_nothing_is_lost(place, capsys):
    base = ingot.load_model(place / "base").state()
    for treatment in ("keep", "drop", "resample"):
        output = place / treatment
        config = config_at(
            place,
            reward=(f"{place / 'rewards.py'}:constant",),
            zero_std_groups=treatment,
            max_steps=4,
            output=str(output),
        )
        result = phase.grpo(config)
        alarms = {line["alarm"]: line["message"] for line in result.history if "alarm" in line}
        assert "nearly all answers to a prompt are scored the same" in alarms["groups without signal"]
        assert "nothing to learn" in alarms["no signal"]
        out = capsys.readouterr().out
        assert "alarm     groups without signal: frac_reward_zero_std is 1, above 0.8" in out
        assert all(line["frac_reward_zero_std"] == 1.0 for line in updates(result))
        for name, values in ingot.load_model(output).state().items():
            np.testing.assert_array_equal(values, base[name])
    assert updates(result)[0]["val/num_steps"] == 0


def test_answers_that_were_cut_teach_nothing_where_they_are_masked(place):
    config = config_at(place, loss_type="grpo", reward=(), mask_truncated_completions=True)
    setup, experience = rollout(config, rewards=(letters,))
    truncated = np.arange(len(experience)) % 4 == 1
    experience = dataclasses.replace(experience, rollouts=dataclasses.replace(experience.rollouts, truncated=truncated))
    lesson, _ = groups.make_lesson(config, experience)
    before = setup.policy.state()
    setup.policy.optimizer = phase.make_optimizer(config, setup.policy)

    def step(lesson: Any, config: GRPOConfig) -> tuple[Any, Any]:
        setup.policy.load_state(before)
        update = phase.learn(config, setup.policy, lesson, step=0, pack_length=4096, rate=0.0)
        return update, {name: np.array(values) for name, values in setup.policy.gradients.items()}

    _, masked = step(lesson, config)
    # The same with the advantages of those answers at 0: each answer counts once in the mean whether it teaches or not.
    silent = dataclasses.replace(lesson, advantages=np.where(truncated, 0.0, lesson.advantages))
    _, expected = step(silent, dataclasses.replace(config, mask_truncated_completions=False))
    for name, values in expected.items():
        np.testing.assert_allclose(masked[name], values, atol=1e-5 * np.abs(values).max() + 1e-9, err_msg=name)
    every = dataclasses.replace(
        lesson,
        experience=dataclasses.replace(
            experience, rollouts=dataclasses.replace(experience.rollouts, truncated=np.ones(len(experience), np.bool_))
        ),
    )
    update, _ = step(every, config)
    assert update.infos == ()


def test_overlong_answers_lose_more_and_more(place):
    lost = soft_overlong_punishment(np.array([1, 6, 7, 8, 10]), max_completion_length=10, soft_punish_cache=4)
    np.testing.assert_allclose(lost, [0, 0, -0.25, -0.5, -1])
    config = config_at(place, soft_punish_cache=2, max_completion_length=4)
    _, experience = rollout(config)
    punished = groups.punish_length(config, experience)
    expected = experience.scores.total - np.clip((experience.rollouts.num_actions - 2) / 2, 0, 1)
    np.testing.assert_array_equal(punished.scores.total, expected)
    assert expected.min() <= -1 + 1e-12
    constant = dataclasses.replace(config, reward=(f"{place / 'rewards.py'}:constant",))
    for line in phase.grpo(constant, quiet=True).history:
        score = line.get("eval_score", line.get("reward", -0.5))
        assert score == pytest.approx(-0.5, abs=0.1), "held-out answers are scored as those of training are"


def test_right_and_wrong_answers(place):
    config = config_at(place, reward=())
    right = [float(number) for number in "1000110000001111"]
    _, experience = rollout(config, rewards=(some(right), letters))
    found = groups.right_and_wrong(config, experience)
    assert found["rewards/given/pass@1"] == pytest.approx(7 / 16)
    # 1 - C(n - c, k) / C(n, k): 1/2, 5/6, 0 and 1 for k = 2.
    assert found["rewards/given/pass@2"] == pytest.approx((1 / 2 + 5 / 6 + 0 + 1) / 4)
    assert found["rewards/given/pass@4"] == pytest.approx(3 / 4)
    lengths = experience.rollouts.num_actions
    assert found["rewards/given/length_right"] == pytest.approx(lengths[np.array(right) == 1].mean())
    assert found["rewards/given/length_wrong"] == pytest.approx(lengths[np.array(right) == 0].mean())
    assert not any(name.startswith("rewards/letters") for name in found)


# ---- rewards


def test_several_rewards_with_weights_and_columns(place):
    reward = tuple(f"{place / 'rewards.py'}:{name}" for name in ("vowels", "low"))
    result = phase.grpo(
        config_at(place, reward=reward, reward_weights=(2.0, 0.5), eval_steps=1, num_generations=2), quiet=True
    )
    for line in updates(result):
        assert {"rewards/vowels/mean", "rewards/low/mean"} <= line.keys()
    first = next(line for line in result.history if "eval_score" in line)
    assert {"eval_rewards/vowels/mean", "eval_rewards/low/mean"} <= first.keys()
    _, experience = rollout(config_at(place, reward=reward, reward_weights=(2.0, 0.5), per_device_train_batch_size=64))
    each = experience.scores.each
    expected = 2 * np.nan_to_num(each["vowels"]) + 0.5 * each["low"]
    np.testing.assert_allclose(experience.scores.total, expected)
    silent = np.isnan(each["vowels"])
    assert silent.any()
    assert [prompt.columns["want"] == "k" for prompt in experience.prompts] == silent.tolist()


def test_a_reward_model_and_a_function_with_a_judge_beside_them(tmp_path, capsys):
    killable_ppo.write_inputs(tmp_path)
    rm, letter = str(tmp_path / "rm"), f"{tmp_path / 'reward.py'}:letters"
    config = GRPOConfig(
        model=str(tmp_path / "base"),
        prompts=(str(tmp_path / "prompts.jsonl"),),
        reward=(rm, letter),
        reward_weights=(0.5, 2.0),
        judge=str(tmp_path / "judge"),
        gate_answers=0,
        output=str(tmp_path / "run"),
        num_generations=4,
        per_device_train_batch_size=16,
        max_completion_length=4,
        max_steps=2,
        threads=1,
    )
    result = phase.grpo(config)
    out = capsys.readouterr().out
    assert "Proxy (trained against) went from" in out
    assert "Judge (not trained against) went from" in out
    for line in updates(result):
        each = 0.5 * line["rewards/rm/mean"] + 2.0 * line["rewards/letters/mean"]
        assert line["reward"] == pytest.approx(each)
        assert {"objective/judge", "objective/judge_std"} <= line.keys()
    assert {"eval_judge", "eval_rewards/rm/mean"} <= result.history[0].keys()
    with pytest.raises(ConfigError, match="it would approve of itself"):
        phase.grpo(dataclasses.replace(config, judge=rm, output=str(tmp_path / "b")), quiet=True)


BROKEN = {
    "raises": ("raise KeyError('answer')", r"rewards\.py:broken: raised KeyError: 'answer' \(rewards\.py, line \d+\)"),
    "nan": ("return [float('nan')] * len(completions)", r"returned nan for completion 0, '.*'; return a finite number"),
    "few": ("return [1.0]", r"returned 1 rewards for 16 completions; return one for each"),
    "slow": ("import time; time.sleep(2)", r"took longer than 0\.1 s for 16 completions: make it faster"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_reward_that_fails_ends_the_run_in_one_line_and_loses_nothing(place, fault):
    """It fails in the fifth update; mended, the run goes on and ends as if nothing had been."""
    line, message = BROKEN[fault]
    mended = REWARDS + "\n\ndef broken(prompts, completions):\n    return low(prompts, completions)\n"
    calls = (
        "\n\ncalls = 0\n\n\ndef broken(prompts, completions):\n    global calls\n    calls += len(completions) == 16\n"
    )
    (place / "rewards.py").write_text(
        REWARDS + calls + f"    if calls == 6:\n        {line}\n    return low(prompts, completions)\n"
    )
    changes = {"reward": (f"{place / 'rewards.py'}:broken",), "max_steps": 6, "save_steps": 2, "reward_timeout": 0.1}
    if fault != "slow":
        changes["reward_timeout"] = 60.0
    with pytest.raises(RunError, match=message) as caught:
        phase.grpo(config_at(place, **changes), quiet=True)
    said = str(caught.value)
    assert "\n" not in said
    assert said.endswith(
        f"the last checkpoint is {place}/run/checkpoint-4; mend it, then: ingot grpo --resume {place}/run"
    )
    (place / "rewards.py").write_text(mended)
    phase.resume(place / "run", quiet=True)
    phase.grpo(config_at(place, **{**changes, "output": str(place / "whole")}), quiet=True)
    for name in ("model.safetensors", "samples.jsonl"):
        assert (place / "run" / name).read_bytes() == (place / "whole" / name).read_bytes()
    assert lines_without_time(place / "run" / "metrics.jsonl") == lines_without_time(place / "whole" / "metrics.jsonl")


# ---- runs


def test_it_learns_and_says_so(place, capsys):
    """The model is random, and letters of the lower half of the alphabet are rewarded."""
    config = config_at(
        place,
        max_steps=40,
        learning_rate=2e-2,
        per_device_train_batch_size=32,
        eval_steps=20,
        gold=f"{place / 'rewards.py'}:share_low",
    )
    result = phase.grpo(config)
    assert result.history[-1]["eval_score"] == 1.0
    out = capsys.readouterr().out
    assert re.search(r"^method    dapo: advantages by group, no KL$", out, re.M)
    assert "Proxy (trained against) went from" in out
    assert "Gold went from" in out
    verdict = json.loads((result.output / "verdict.json").read_bytes())
    assert verdict["figures"]["score_after"] > verdict["figures"]["score_before"]
    assert {"kl_after", "eos_rate_before", "mean_length_after"} <= verdict["figures"].keys()
    assert "`ingot grpo`" in (result.output / "README.md").read_text()
    samples = [json.loads(line) for line in (result.output / "samples.jsonl").read_text().splitlines()]
    assert {"prompt", "completion", "before", "score", "kl", "gold"} <= samples[-1].keys()
    lines = updates(result)
    assert all({"objective/gold", "objective/scores"} <= line.keys() for line in lines)
    shares = [
        value for name, value in lines[-1].items() if name.startswith("time/share_") and name != "time/share_of_peak"
    ]
    assert sum(shares) == pytest.approx(1.0, abs=1e-6)


def test_a_reward_whose_favourites_gold_does_not_like_is_refused(place):
    config = config_at(place, gold=f"{place / 'rewards.py'}:constant")
    with pytest.raises(RunError, match=r"best of 16 did not pass: .*\(--force goes on all the same\)"):
        phase.grpo(config, quiet=True)
    assert not (place / "run").exists()
    forced = phase.grpo(dataclasses.replace(config, force=True), quiet=True)
    assert forced.history[-1]["step"] == 2


def test_dialogues_are_answered_as_messages(place):
    write_rows(place / "demos.jsonl", rows())
    demos = ingot.SFTConfig(
        model=str(place / "base"), data=(str(place / "demos.jsonl"),), output=str(place / "sft"), max_steps=2, threads=1
    )
    ingot.sft(demos, quiet=True)
    seen: list[Any] = []

    def look(prompts: Any, completions: Any, completion: Any) -> list[float]:
        seen.append((prompts[0], completions[0], completion[0]))
        return [float(len(each[0]["content"])) for each in completions]

    asked = [{"question": f"{n}+1?", "answer": f"#### {n + 1}"} for n in range(30)]
    # Two steps of fine-tuning teach nothing, and the verdict says so.
    config = config_at(place, model=str(place / "sft"), reward=(), prompts=(), force=True)
    result = ingot.grpo(config, prompts=asked, rewards=[look], quiet=True)
    prompt, completion, reference = seen[0]
    assert prompt[0]["role"] == "user"
    assert completion[0]["role"] == "assistant"
    assert reference[0]["content"].startswith("#### ")
    assert (result.output / "chat_template.jinja").is_file()
    with pytest.raises(RunError, match=r"the prompts given changed since this run began: bring the rows back"):
        ingot.resume(result.output, max_steps=3, prompts=asked[:-1], rewards=[look], quiet=True)
    assert ingot.resume(result.output, max_steps=3, prompts=asked, rewards=[look], quiet=True).history[-1]["step"] == 3


def snapshot(folder: Path) -> dict[str, Any]:
    names = ["model.safetensors", "tokenizer.json", "samples.jsonl", "config.json", "README.md", "verdict.json"]
    names += ["checkpoint-8/model.safetensors", "checkpoint-8/optimizer.safetensors"]
    taken: dict[str, Any] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    taken["metrics"] = lines_without_time(folder / "metrics.jsonl")
    taken["folder"] = sorted(entry.name for entry in folder.iterdir() if entry.name != "run.lock")
    return taken


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and forkserver are of Unix")
def test_killed_and_resumed_it_ends_with_the_same_bits(place):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killable_grpo"])

    def run(folder: Path, kill_at: int | None = None, log: Path | None = None) -> int | None:
        process = context.Process(target=child, args=(folder, kill_at, log))
        process.start()
        process.join(600)
        return process.exitcode

    (place / "whole").mkdir()
    assert run(place / "whole" / "run", log=place / "points") == 0
    expected = snapshot(place / "whole" / "run")
    points = (place / "points").read_text().split("\n")
    first_save = next(n for n, name in enumerate(points) if name.startswith("optimizer"))
    (place / "killed").mkdir()
    folder = place / "killed" / "run"
    # Before anything is saved, between two checkpoints, and near the end.
    for kill_at in (first_save - 4, first_save + 9, 24):
        assert run(folder, kill_at) == -9, "the run was over before it was killed"
    assert run(folder) == 0
    lines = [line for line in expected["metrics"] if "loss" in line]
    assert any(line["val/num_episodes"] > 12 for line in lines), "no group was drawn again"
    assert any(line["clip_ratio/region_mean"] > 0 for line in lines), "nothing was clipped"
    assert snapshot(folder) == expected


class StopAt(Callback):
    """Presses Ctrl-C after a line of metrics."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, run: Any, metrics: Any) -> None:
        if run.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_saves_and_prints_the_line_that_resumes(place, capsys):
    for name in ("a", "b"):
        (place / name).mkdir()
    whole, stopped = place / "a" / "run", place / "b" / "run"
    phase.grpo(settings(whole), quiet=True)
    with pytest.raises(KeyboardInterrupt):
        phase.grpo(settings(stopped), callbacks=[StopAt(4)])
    assert f"stopped; go on with: ingot grpo --resume {stopped}" in capsys.readouterr().out
    assert (stopped / "checkpoint-4").is_dir()
    phase.resume(stopped, quiet=True)
    assert snapshot(stopped) == snapshot(whole)


def test_an_update_that_is_given_up_while_it_samples_is_drawn_again(place, monkeypatch):
    for name in ("a", "b"):
        (place / name).mkdir()
    whole, stopped = place / "a" / "run", place / "b" / "run"
    phase.grpo(settings(whole), quiet=True)
    real, calls = phase._Run.alive, 0

    def press(self: Any, done: int, total: int) -> None:
        nonlocal calls
        # In the second draw of an update that needs one.
        calls += self.state.step > 2 and total in (4, 8)
        if calls == 2:
            os.kill(os.getpid(), signal.SIGINT)
        real(self, done, total)

    monkeypatch.setattr(phase._Run, "alive", press)
    with pytest.raises(KeyboardInterrupt):
        phase.grpo(settings(stopped), quiet=True)
    monkeypatch.undo()
    lines = [line for line in lines_without_time(stopped / "metrics.jsonl") if "loss" in line]
    assert 2 < lines[-1]["step"] < 8
    phase.resume(stopped, quiet=True)
    assert snapshot(stopped) == snapshot(whole)


# ---- the command line


def test_the_command_line(place, capsys):
    base, prompts = str(place / "base"), str(place / "prompts.jsonl")
    reward = f"{place / 'rewards.py'}:low"
    run = str(place / "run")
    arguments = [
        "grpo",
        "--model",
        base,
        "--reward",
        reward,
        "--prompts",
        prompts,
        "--output",
        run,
        "--loss-type",
        "dapo",
    ]
    arguments += ["--max-completion-length", "4", "--per-device-train-batch-size", "16", "--held-out", "0.2"]
    assert main([*arguments, "--dry-run"]) == 0
    assert not Path(run).exists()
    assert "2 prompts with 8 answers of up to 4" in capsys.readouterr().out
    assert main([*arguments, "--max-steps", "2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["steps"], facts["output"]) == (2, run)
    assert {"score_before", "score_after", "score_margin"} <= facts["figures"].keys()
    assert main(["grpo", "--resume", run, "--max-steps", "3"]) == 0
    assert f"resumed from {run}/checkpoint-2" in capsys.readouterr().out
    two = ["--reward", f"{place / 'rewards.py'}:vowels", "--reward", reward, "--reward-weights", "1", "0.5"]
    again = ["grpo", "--config", f"{run}/grpo.toml", "--output", run + "2", "--total-episodes", "32", *two]
    assert main([*again, "--missing-eos-penalty", "None"]) == 0
    lines = lines_without_time(Path(run + "2") / "metrics.jsonl")
    assert {"rewards/vowels/mean", "rewards/low/mean"} <= lines[1].keys()
    assert [line["episode"] for line in lines if "loss" in line] == [16, 32]
    with pytest.raises(SystemExit):
        main(["grpo", "--help"])
    assert "--num-generations" in capsys.readouterr().out


def test_the_torch_backend_learns_the_same(place):
    changes = {"beta": 0.1, "loss_type": "grpo", "max_steps": 3, "sampling_ratio_cap": 2.0, "num_iterations": 2}
    native, torch = (
        updates(phase.grpo(config_at(place, output=str(place / name), backend=name, **changes), quiet=True))
        for name in ("native", "torch")
    )
    for ours, theirs in zip(native, torch, strict=True):
        assert theirs["val/ratio_first"] < 1e-3
        for name in ("reward", "grad_norm", "kl", "loss", "entropy"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-2, abs=1e-5), name


def test_a_length_in_time(place):
    result = phase.grpo(config_at(place, max_steps=None, max_time="2s", eval_batches=1), quiet=True)
    assert json.loads((result.output / "run.json").read_bytes())["decisions"]["max_steps"] >= 10


@pytest.mark.parametrize(
    ("entries", "changes", "message"),
    [
        ([{"text": "a"}] * 9, {}, r"prompts\.jsonl, row 1: "),
        ([{"prompt": "a" * 200}] * 9, {}, r"prompts\.jsonl: none of 9 prompts fits: the shortest has 201 tokens"),
        ([{"prompt": "a"}] * 9, {}, r"9 prompts, 1 of them different, are too few to hold 20 % out"),
        ([{"prompt": [{"role": "user", "content": "a"}]}] * 9, {}, r'row 1: field "prompt" cannot be encoded'),
        (None, {"model": "nowhere"}, r"nowhere: no such folder"),
        (None, {"model": ""}, r"no model to start from: give --model"),
        (None, {"prompts": ()}, r"no prompts to answer: give --prompts"),
        (None, {"reward": ()}, r"no reward was given"),
        (None, {"reward": ("rewards.py",)}, r"reward rewards\.py: names no function; write rewards\.py:FUNCTION"),
        (None, {"reward": ("nowhere.py:f",)}, r"reward nowhere\.py:f: nowhere\.py: no such file"),
        (None, {"max_completion_length": 96}, r"answers of 96 tokens leave no room for a prompt"),
        (None, {"pack_length": 5}, r"pack_length 5 is below the \d+ tokens"),
    ],
)
def test_bad_input_is_one_clear_line(place, entries, changes, message):
    if entries is not None:
        (place / "prompts.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    with pytest.raises((ConfigError, DataError, RunError, ingot.CheckpointError), match=message) as caught:
        phase.grpo(config_at(place, **changes), quiet=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_generations": 1}, r"num_generations must be at least 2: dapo compares an answer with others"),
        ({"per_device_train_batch_size": 9}, r"9 does not divide by num_generations 8"),
        ({"loss_type": "grpo", "epsilon": 1.0}, r"epsilon must be above 0 and below 1"),
        ({"loss_type": "cispo", "epsilon": 0.2}, r"epsilon is not for loss_type cispo"),
        ({"loss_type": "cispo", "delta": 9.0}, r"delta is not for loss_type cispo"),
        (
            {"loss_type": "rloo", "importance_sampling_level": "token"},
            r"importance_sampling_level is not for loss_type rloo",
        ),
        (
            {"loss_type": "rloo", "scale_rewards": "group"},
            r"scale_rewards goes with the advantage estimator group, not with rloo",
        ),
        ({"loss_type": "rloo", "advantage_estimator": "reinforce_plus_plus"}, r"takes a whole answer for one action"),
        ({"normalize_advantages": True}, r"normalize_advantages goes with the advantage estimator rloo"),
        ({"loss_type": "reinforce", "num_iterations": 2}, r"loss_type reinforce takes one step an update"),
        ({"loss_type": "reinforce", "epsilon_high": 0.3}, r"epsilon_high is not for loss_type reinforce"),
        ({"loss_type": "reinforce_plus_plus", "zero_std_groups": "drop"}, r"zero_std_groups drop is for methods"),
        ({"gamma": 0.9}, r"gamma discounts rewards by token"),
        ({"kl_estimator": "k2"}, r"need a weight of the KL: give --beta above 0"),
        ({"beta": 0.1, "kl_estimator": "k1"}, r"kl_estimator k1 teaches nothing as a loss"),
        ({"loss_type": "rloo", "kl_estimator": "k3"}, r"kl_estimator k3 in the reward does not hold the policy"),
        ({"beta": -0.1}, r"beta must be 0 or more"),
        ({"delta": 1.1}, r"delta must be above 1 \+ epsilon_high = 1\.28"),
        ({"soft_punish_cache": 65}, r"soft_punish_cache must be at least 1 and at most max_completion_length 64"),
        ({"sampling_ratio_cap": 0.0}, r"sampling_ratio_cap must be above 0"),
        ({"num_mini_batches": 65}, r"num_mini_batches 65 is more than the 64 answers"),
        ({"max_steps": 3, "total_episodes": 9}, r"give one of them"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        GRPOConfig(**changes)
    assert "\n" not in str(caught.value)


def test_what_is_left_open_is_what_the_method_has():
    assert GRPOConfig().method.epsilon_high == 0.28
    assert GRPOConfig(epsilon=0.1).method.epsilon_high == 0.1
    assert GRPOConfig(loss_type="gspo").method.importance_sampling_level == "sequence"
    assert GRPOConfig(loss_type="rloo").method.beta == 0.05
    assert GRPOConfig(loss_type="rloo", beta=0.0).method.beta == 0.0
    assert GRPOConfig(beta=0.1, kl_penalty="reward").method.kl_estimator == "k1"
    assert GRPOConfig(loss_type="rloo", kl_penalty="loss").method.kl_estimator == "k2"
    for loss_type in LOSS_TYPES:
        config = GRPOConfig(loss_type=loss_type)
        assert GRPOConfig.from_dict(config.to_dict()) == config


def test_functions_given_by_a_program_have_weights_too(place):
    def one(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    def length(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [float(len(completion)) for completion in completions]

    weighted = config_at(place, reward=(), reward_weights=(2.0, -0.5))
    for line in updates(ingot.grpo(weighted, rewards=[one, length], quiet=True)):
        expected = 2.0 * line["rewards/one/mean"] - 0.5 * line["rewards/length/mean"]
        assert line["objective/scores"] == pytest.approx(expected)
    with pytest.raises(ConfigError, match="reward_weights has 2 numbers for 1 rewards"):
        ingot.grpo(dataclasses.replace(weighted, output=str(place / "other")), rewards=[one], quiet=True)
    assert not (place / "other").exists()
