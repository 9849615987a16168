"""PPO: what an update does, what a run leaves behind, and what it says to bad input."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ingot
from ingot.cli import main
from ingot.configs import PPOConfig, load_toml
from ingot.data.batches import Cursor
from ingot.data.chat import ChatEncoder, ChatTemplate
from ingot.errors import ConfigError, DataError, RunError
from ingot.inference.generate import generate
from ingot.inference.scoring import RewardModel
from ingot.models import load_model
from ingot.models.hf import open_folder
from ingot.tokenizer import Tokenizer
from ingot.training import experience
from ingot.training import ppo as phase
from ingot.training.actor_critic import ActorCritic
from ingot.training.progress import SilentDisplay
from ingot.training.rollouts import recompute_logprobs
from ingot.training.setup import Given
from ingot.training.verdicts import Verdict, read_verdict, write_verdict
from killable_ppo import (
    chat_encoder,
    child,
    settings,
    shape_of,
    write_companions,
    write_inputs,
    write_policy,
    write_reward_model,
)
from killable_sft import write_base


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that a run reads."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def plain(root: Path, folder: Path, **changes: Any) -> PPOConfig:
    """A short run with functions alone."""
    nothing = {"reward_model": None, "reward": (), "reward_weights": None, "judge": None, "gold": None, "ptx_data": ()}
    return settings(root, folder, **{**nothing, "max_steps": 2, "save_steps": 2, "eval_steps": 2, **changes})


def vowels(prompts: Any, completions: Any) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in one[0]["content"])) for one in completions]


# ---- killed and resumed


def snapshot(folder: Path) -> dict[str, Any]:
    names = ["model.safetensors", "samples.jsonl", "verdict.json", "README.md", "tokenizer_config.json"]
    names += [str(path.relative_to(folder)) for path in folder.glob("checkpoint-7/*.safetensors")]
    names += [path.name for path in folder.glob("*.safetensors")]
    taken: dict[str, Any] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    taken["metrics"] = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
    state = json.loads((folder / "checkpoint-7" / "trainer_state.json").read_bytes())
    taken["state"] = {name: value for name, value in state.items() if name != "elapsed_s"}
    taken["folder"] = sorted(entry.name for entry in folder.iterdir() if entry.name != "run.lock")
    return taken


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and forkserver are of Unix")
@pytest.mark.parametrize("critic", ["shared", "reward_model"])
def test_killed_and_resumed_it_ends_with_the_same_bits(root, tmp_path, critic):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killable_ppo"])

    def run(folder: Path, kill_at: int | None = None, log: Path | None = None) -> int | None:
        process = context.Process(target=child, args=(root, folder, {"critic": critic}, kill_at, log))
        process.start()
        process.join(600)
        return process.exitcode

    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    assert run(tmp_path / "whole" / "run", log=tmp_path / "points") == 0
    expected = snapshot(tmp_path / "whole" / "run")
    coefficients = [line["objective/kl_coef"] for line in expected["metrics"] if "objective/kl_coef" in line]
    assert len(set(coefficients)) == 7, "the coefficient has to move for this to show anything"
    points = (tmp_path / "points").read_text().split("\n")
    # While a checkpoint is written, then after an update that no checkpoint has.
    saved = next(n for n, name in enumerate(points) if name.startswith("optimizer"))
    logged = [n for n, name in enumerate(points) if name == "metrics.jsonl: appended"]
    folder = tmp_path / "killed" / "run"
    for kill_at in (saved, logged[4]):
        assert run(folder, kill_at) == -9, "the run was over before it was killed"
    assert run(folder) == 0
    assert snapshot(folder) == expected


@pytest.mark.skipif(sys.platform == "win32", reason="signals are of Unix")
def test_ctrl_c_while_it_samples_saves_and_the_run_goes_on_bit_for_bit(root, tmp_path, monkeypatch):
    whole = ingot.ppo(plain(root, tmp_path / "whole"), rewards=[vowels], quiet=True)
    draw, calls = experience.sample_rollouts, []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # after one for timing, an evaluation and the first update
            os.kill(os.getpid(), signal.SIGINT)
        return draw(*arguments, **options)

    monkeypatch.setattr(experience, "sample_rollouts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ingot.ppo(plain(root, tmp_path / "stopped"), rewards=[vowels], quiet=True)
    assert len(calls) == 4
    assert (tmp_path / "stopped" / "checkpoint-1").is_dir()
    monkeypatch.undo()
    again = ingot.resume(tmp_path / "stopped", rewards=[vowels], quiet=True)
    for name in ("model.safetensors", "value_head.safetensors", "samples.jsonl"):
        assert (again.output / name).read_bytes() == (whole.output / name).read_bytes()


# ---- what a run leaves behind


def test_a_run_with_everything(root, tmp_path, capsys):
    import transformers

    result = ingot.ppo(settings(root, tmp_path / "run"))
    out = capsys.readouterr().out
    assert re.search(
        r"^step 7  held out: proxy -?\d+\.\d+  judge .* gold .* KL .* ended \d+ %  length \d\.\d$", out, re.M
    )
    assert re.search(r"^verdict   (passed|did not pass): Proxy \(trained against\) went from", out, re.M)
    lines = [line for line in result.history if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 8))
    assert [line["episode"] for line in lines] == list(range(6, 43, 6))
    for line in lines:
        assert line["sampling/sampling_logp_difference/max"] == 0.0
        assert line["val/ratio_first"] == 0.0
        assert line["val/num_steps"] == 4
        assert line["objective/rlhf_reward"] == pytest.approx(
            line["objective/scores"] - line["objective/kl_coef"] * line["objective/kl"]
        )
        assert line["grad_norm/ptx"] > 0
        assert line["grad_norm/ppo"] > 0
        shares = [line[f"time/share_{part}"] for part in ("sampling", "reference", "scoring", "training")]
        assert sum(shares) == pytest.approx(1.0)
    names = {"rewards/rm/mean", "rewards/letters/mean", "objective/judge", "objective/gold", "objective/kl_k3"}
    names |= {"policy/entropy_avg", "policy/clipfrac_avg", "val/explained_variance", "val/ratio_var", "loss/ptx_avg"}
    assert names <= lines[0].keys()
    assert lines[0]["objective/kl"] == 0.0
    evaluations = [line for line in result.history if "eval_score" in line]
    assert [line["step"] for line in evaluations] == [0, 3, 6, 7]
    assert {"eval_judge", "eval_gold", "eval_kl", "eval_eos_rate", "eval_distinct_2", "eval_ptx_bpb"} <= evaluations[
        0
    ].keys()
    state = json.loads((result.output / "checkpoint-7" / "trainer_state.json").read_bytes())
    read = state["cursor"]["epoch"] * 300 + state["cursor"]["index"]
    assert read >= 28 * 2, "each of 28 steps reads two rows of pretraining text, all of it new"
    assert (state["extra"]["position"], state["extra"]["episode"]) == (42, 42)
    samples = [json.loads(line) for line in (result.output / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 * 2
    first = {sample["prompt"]: sample["completion"] for sample in samples if sample["step"] == 0}
    assert all(sample["before"] == first[sample["prompt"]] for sample in samples)
    verdict = read_verdict(result.output)
    assert verdict is not None
    assert {"score_before", "judge_after", "gold_change", "kl_after", "eos_rate_after"} <= verdict.figures.keys()

    # A plain language model, with the critic's head beside it.
    assert open_folder(result.output).num_values == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(result.output)
    assert theirs.num_parameters() == load_model(result.output).num_parameters
    assert (result.output / "value_head.safetensors").is_file()
    tokenizer = Tokenizer.from_file(result.output)
    encoder = ChatEncoder(ChatTemplate.of_model(result.output), tokenizer)
    prompt = encoder.encode_prompt([{"role": "user", "content": "1?"}]).tolist()
    generate(load_model(result.output), tokenizer, [prompt], max_new_tokens=2, end_ids=encoder.end_ids)
    card = (result.output / "README.md").read_text()
    assert "ingot ppo" in card
    assert "rm, reward.py:letters" in card
    assert (result.output / "curves.svg").read_text().count("<polyline") == 4
    assert PPOConfig.from_dict(json.loads((result.output / "run.json").read_bytes())["config"]) == settings(
        root, tmp_path / "run"
    )
    with pytest.raises(RunError, match=r"finished run of 7 steps.*ingot ppo --resume"):
        ingot.ppo(settings(root, tmp_path / "run"), quiet=True)
    assert ingot.resume(result.output, max_steps=8, quiet=True).history[-1]["step"] == 8


def test_the_reference_keeps_its_bits_while_the_policy_learns(root, tmp_path, monkeypatch):
    setups = []
    prepare = phase.prepare

    def remembering(*arguments: Any, **options: Any) -> Any:
        setups.append(prepare(*arguments, **options))
        return setups[-1]

    monkeypatch.setattr(phase, "prepare", remembering)
    result = ingot.ppo(plain(root, tmp_path / "run", max_steps=5, save_steps=5), rewards=[vowels], quiet=True)
    (setup,) = setups
    fresh, found = load_model(root / "base"), setup.reference.state()
    assert all((found[name] == values).all() for name, values in fresh.state().items())
    assert any((result.model.state()[name] != values).any() for name, values in fresh.state().items())
    rollouts = experience.gather(setup, setup.prompts.take(0, 4), policy=setup.policy, first_episode=0, seed=1).rollouts
    np.testing.assert_array_equal(recompute_logprobs(setup.reference, rollouts), recompute_logprobs(fresh, rollouts))


def test_a_critic_of_its_own_starts_as_the_reward_model(root, tmp_path):
    config = settings(
        root, tmp_path / "run", critic="reward_model", critic_learning_rate=1e-3, max_steps=1, save_steps=1
    )
    setup = phase.prepare(config, Given(), SilentDisplay())
    actors = ActorCritic.start(config, setup)
    assert setup.policy.num_values == 0
    rollouts = experience.gather(setup, setup.prompts.take(0, 5), policy=setup.policy, first_episode=0, seed=1).rollouts
    judged = RewardModel.load(root / "rm").model
    ends = rollouts.offsets[1:] - 1
    rows = np.zeros(len(rollouts.tokens), np.bool_)
    rows[ends] = True
    values = []
    for model in (actors.critic, judged):
        none = np.full(len(rows), -1, np.int32)
        _, out = model.forward(rollouts.tokens, rollouts.offsets, none, want=("values",), value_rows=rows, train=False)
        values.append(out.values[ends])
    np.testing.assert_allclose(values[0], values[1], rtol=1e-6)
    result = ingot.ppo(config, quiet=True)
    assert not (result.output / "value_head.safetensors").exists()
    assert (result.output / "critic.safetensors").is_file()
    assert result.history[1]["grad_norm/critic"] > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"kl_penalty": "loss", "kl_estimator": "k2", "kl_coef": 0.1},
        {"kl_penalty": "loss", "kl_estimator": "k3", "kl_coef": 0.1, "kl_target": None},
        {"whiten_rewards": True, "whiten_advantages": False},
        {"delta": 3.0, "cliprange_value": None, "sampling_ratio_cap": 2.0, "adam_eps_mode": "tf"},
        {"temperature": 0.7, "missing_eos": "replace", "missing_eos_penalty": 2.0, "export_by": "last"},
        {"missing_eos_penalty": None, "total_episodes": 7, "max_steps": None, "export_by": "objective"},
        {"critic": "policy", "held_out": 0.0, "max_steps": None, "num_train_epochs": 0.3},
    ],
)
def test_settings_run(root, tmp_path, changes):
    result = ingot.ppo(plain(root, tmp_path / "run", **changes), rewards=[vowels], quiet=True)
    lines = [line for line in result.history if "loss" in line]
    assert len(lines) == 2
    assert all(line["sampling/sampling_logp_difference/max"] == 0.0 for line in lines)
    if "missing_eos" in changes:
        assert lines[0]["objective/scores_min"] == -2.0
    if changes.get("held_out") == 0.0:
        assert read_verdict(result.output) is None


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_plain_text_and_a_model_without_a_template(root, tmp_path, backend):
    write_base(tmp_path / "base")
    count = lambda completions, **_: [float(len(one)) for one in completions]  # noqa: E731
    config = plain(root, tmp_path / "run", model=str(tmp_path / "base"), prompts=(), backend=backend)
    result = ingot.ppo(config, prompts=[{"prompt": f"{n} "} for n in range(40)], rewards=[count], quiet=True)
    lines = [line for line in result.history if "loss" in line]
    assert all(line["sampling/sampling_logp_difference/mean"] < 1e-5 for line in lines)
    assert open_folder(result.output).num_values == 0
    assert not (result.output / "chat_template.jinja").exists()


def test_an_update_ends_early_where_the_policy_went_far(root, tmp_path):
    config = plain(root, tmp_path / "run", target_kl=1e-3, learning_rate=0.3, num_ppo_epochs=4, max_steps=1)
    (line,) = (line for line in ingot.ppo(config, rewards=[vowels], quiet=True).history if "loss" in line)
    assert 1 <= line["val/num_steps"] < 8


def test_without_a_rate_an_update_changes_nothing_and_the_ratio_is_one(root, tmp_path):
    config = settings(root, tmp_path / "run")
    setup = phase.prepare(config, Given(), SilentDisplay(), num_values=1)
    actors = ActorCritic.start(config, setup)
    actors.restore(config, None)
    before = setup.policy.state()
    drawn = experience.gather(
        setup, setup.prompts.take(0, 6), policy=setup.policy, first_episode=0, seed=1, values=True
    )
    options: dict[str, Any] = {"kl_coef": 0.1, "step": 0, "cursor": Cursor(), "pack_length": 96}
    update = phase.learn(config, actors, None, drawn, **options)
    assert update.metrics["val/ratio"] == 1.0
    assert update.metrics["val/ratio_max"] == 1.0
    assert update.metrics["policy/clipfrac_avg"] == 0.0
    assert all((setup.policy.state()[name] == values).all() for name, values in before.items())
    # Bounding the memory of a pass changes no figure but the last bits.
    whole = phase.learn(config, actors, None, drawn, **{**options, "pack_length": 4096})
    for name, value in update.metrics.items():
        assert whole.metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_learning_raises_the_reward(root, tmp_path):
    """Answers that end are worth 1, others lose 1: half of the answers of a random model end, all of a trained one."""
    ends = lambda prompts, completions: [1.0] * len(completions)  # noqa: E731
    config = plain(
        root, tmp_path / "run", max_steps=30, save_steps=30, eval_steps=30, per_device_train_batch_size=32, response_length=12,
        kl_coef=0.02, kl_target=None,
    )  # fmt: skip
    result = ingot.ppo(config, rewards=[ends], quiet=True)
    evaluations = [line for line in result.history if "eval_score" in line]
    assert evaluations[-1]["eval_eos_rate"] > evaluations[0]["eval_eos_rate"] + 0.5
    verdict = read_verdict(result.output)
    assert verdict is not None
    assert verdict.figures["score_change"] > 0.5


# ---- gates


def test_a_failed_model_or_reward_model_stops_it_unless_forced(root, tmp_path):
    failed = Verdict(passed=False, sentences=("It orders 51 % of pairs.",), figures={}, advice="Get more judgements.")
    folder = write_reward_model(tmp_path / "rm")
    write_verdict(folder, failed)
    config = plain(root, tmp_path / "run", reward_model=str(folder), max_steps=1)
    with pytest.raises(
        RunError, match=r"did not pass its gate: It orders 51 % of pairs\. Get more judgements\. \(--force"
    ):
        ingot.ppo(config, quiet=True)
    assert not (tmp_path / "run").exists()
    ingot.ppo(dataclasses.replace(config, force=True), quiet=True)
    write_verdict(write_policy(tmp_path / "base"), failed)
    with pytest.raises(RunError, match="did not pass its gate"):
        ingot.ppo(plain(root, tmp_path / "other", model=str(tmp_path / "base")), rewards=[vowels], quiet=True)


def test_the_best_of_n_must_please_somebody_else(root, tmp_path, capsys):
    def likes_length(prompts: Any, completions: Any) -> list[float]:
        return [float(len(one[0]["content"])) for one in completions]

    def likes_brevity(prompts: Any, completions: Any) -> list[float]:
        return [-each for each in likes_length(prompts, completions)]

    config = plain(root, tmp_path / "run", gate_answers=4, held_out=0.5, max_steps=1)
    with pytest.raises(
        RunError, match=r"best of 4 did not pass: Of 4 answers to each of \d+ prompts.*\(--force goes on"
    ) as caught:
        ingot.ppo(config, rewards=[likes_length], gold=likes_brevity, quiet=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    forced = ingot.ppo(dataclasses.replace(config, force=True), rewards=[likes_length], gold=likes_brevity)
    assert "gate      did not pass, going on by force" in capsys.readouterr().out
    assert json.loads((forced.output / "run.json").read_bytes())["gate"]["passed"] is False
    agreeing = dataclasses.replace(config, output=str(tmp_path / "other"))
    ingot.ppo(agreeing, rewards=[likes_length], gold=lambda completions, **_: likes_length([], completions))
    assert "gate      passed: Of 4 answers" in capsys.readouterr().out
    ingot.ppo(dataclasses.replace(config, output=str(tmp_path / "third")), rewards=[likes_length])
    assert "gate      nobody but the reward will judge this run" in capsys.readouterr().out


# ---- bad input


def no_number(prompts: Any, completions: Any) -> list[Any]:
    return [float("nan")] * len(completions)


def too_few(prompts: Any, completions: Any) -> list[float]:
    return [1.0]


def raising(prompts: Any, completions: Any) -> list[float]:
    raise ValueError("no such word")


def slow(prompts: Any, completions: Any) -> list[float]:
    time.sleep(1.0)
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (no_number, r"reward no_number: returned nan for completion 0"),
        (too_few, r"reward too_few: returned 1 rewards for 6 completions"),
        (raising, r"reward raising: raised ValueError: no such word \(test_ppo\.py, line \d+\)"),
        (slow, r"reward slow: took longer than 0\.1 s for 6 completions"),
    ],
)
def test_a_reward_that_fails_from_the_start_begins_nothing(root, tmp_path, reward, message):
    with pytest.raises(RunError, match=message) as caught:
        ingot.ppo(plain(root, tmp_path / "run", reward_timeout=0.1), rewards=[reward], quiet=True)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_reward_that_fails_later_loses_nothing(root, tmp_path):
    calls = []

    def moody(prompts: Any, completions: Any) -> list[float]:
        calls.append(1)
        return [float("inf")] * len(completions) if len(calls) == 5 else vowels(prompts, completions)

    moody.__name__ = "vowels"
    config = plain(root, tmp_path / "run", max_steps=4, save_steps=4, eval_steps=4)
    whole = ingot.ppo(dataclasses.replace(config, output=str(tmp_path / "whole")), rewards=[vowels], quiet=True)
    with pytest.raises(
        RunError, match=r"reward vowels: returned inf for completion 0.*checkpoint-2; mend it, then: ingot ppo --resume"
    ):
        ingot.ppo(config, rewards=[moody], quiet=True)
    again = ingot.resume(tmp_path / "run", rewards=[vowels], quiet=True)
    assert (again.output / "model.safetensors").read_bytes() == (whole.output / "model.safetensors").read_bytes()


def test_other_bad_input_is_one_clear_line(root, tmp_path):
    encoder = chat_encoder()
    grown = ChatEncoder(encoder.template, encoder.tokenizer.with_special_tokens(["<|extra|>"]))
    other = tmp_path / "other-rm"
    RewardModel(ingot.Model(shape_of(grown), num_values=1), grown).save(other)
    write_companions(other, grown)
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "w" * 90}) + "\n")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "once"}) + "\n")
    (tmp_path / "empty.jsonl").write_text("")
    rows = str(root / "prompts.jsonl")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": ""}, "no model to start from: give --model"),
        ({"model": "nowhere"}, "nowhere: no such folder"),
        ({"model": str(root / "rm")}, "is a model that scores"),
        ({"reward_model": str(root / "base")}, "holds a model that writes, not one that scores"),
        ({"reward_model": str(other)}, "its tokenizer .* is not that of"),
        ({"reward": (f"{root / 'reward.py'}:leters",)}, "did you mean 'letters'"),
        (
            {"judge": str(root / "rm"), "reward_model": str(root / "rm")},
            "is the judge and the reward: it would approve of itself",
        ),
        ({"prompts": ()}, "no prompts to answer: give --prompts"),
        (
            {"prompts": (str(tmp_path / "long.jsonl"),)},
            r"long\.jsonl: none of 1 prompts fits: the shortest has 91 tokens and there is room for 58",
        ),
        (
            {"prompts": (str(tmp_path / "text.jsonl"),)},
            r"text\.jsonl, row 1: has the columns text, not those of prompt-only",
        ),
        ({"prompts": (str(tmp_path / "empty.jsonl"),)}, r"empty\.jsonl: no row in it"),
        ({"prompts": (rows,), "response_length": 64}, "leave no room for a prompt in the model's context of 64"),
        ({"prompts": (rows,), "pack_length": 10}, "pack_length 10 is below the"),
        ({"ptx_data": (str(tmp_path / "nowhere.txt"),)}, "nowhere.txt: no such file"),
    ]
    for number, (changes, message) in enumerate(cases):
        given = [] if "reward" in changes or "reward_model" in changes else [vowels]
        with pytest.raises((ConfigError, DataError, RunError, ingot.CheckpointError), match=message) as caught:
            ingot.ppo(plain(root, tmp_path / f"run{number}", **changes), rewards=given, quiet=True)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no reward was given: --reward-model"):
        ingot.ppo(plain(root, tmp_path / "none"), quiet=True)


def test_settings_that_cannot_be_are_refused():
    for changes, message in (
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"kl_penalty": "loss"}, "kl_estimator k1 teaches nothing as a loss"),
        ({"kl_estimator": "k3"}, "kl_estimator k3 in the reward does not hold the policy"),
        ({"critic": "reward_model"}, "critic reward_model needs a reward model"),
        ({"critic_learning_rate": 1e-3}, "critic_learning_rate is of a critic of its own"),
        ({"export_by": "judge"}, "export_by judge needs --judge"),
        ({"reward": ("a:b", "a:c"), "reward_weights": (1.0,)}, "reward_weights has 1 numbers for 2 rewards"),
        ({"delta": 1.1}, "delta must be above 1 \\+ cliprange"),
        ({"kl_target": 6.0, "kl_coef": 0.0}, "kl_target moves kl_coef"),
        ({"num_mini_batches": 65}, "num_mini_batches 65 is more than the 64 answers"),
        ({"max_steps": 3, "total_episodes": 64}, "max_steps and total_episodes each fix"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty must be 0 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            PPOConfig(**changes)


def test_none_over_another_default_survives_its_file(root, tmp_path):
    config = plain(
        root, tmp_path / "run", missing_eos_penalty=None, cliprange_value=None, eval_batches=None, max_steps=1
    )
    assert PPOConfig.from_dict(config.to_dict()) == config
    result = ingot.ppo(config, rewards=[vowels], quiet=True)
    assert PPOConfig.from_dict(load_toml(result.output / "ppo.toml")) == config
    again = ingot.resume(result.output, rewards=[vowels], max_steps=2, quiet=True)
    assert again.history[-1]["eval_score"] >= 0.0, "no penalty was taken off"


def test_what_a_run_began_with_must_not_change(root, tmp_path):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    write_inputs(inputs)
    result = ingot.ppo(settings(inputs, tmp_path / "run", max_steps=1), quiet=True)
    rows = (inputs / "prompts.jsonl").read_text()
    (inputs / "prompts.jsonl").write_text(rows.replace("7?", "77?"))
    with pytest.raises(RunError, match=r"prompts\.jsonl changed since this run began: bring the rows back"):
        ingot.resume(result.output, max_steps=2, quiet=True)
    (inputs / "prompts.jsonl").write_text(rows)
    text = (inputs / "text.txt").read_text()
    (inputs / "text.txt").write_text(text + "more")
    with pytest.raises(RunError, match=r"text\.txt changed since this run began: bring the text back"):
        ingot.resume(result.output, max_steps=2, quiet=True)
    (inputs / "text.txt").write_text(text)
    model = load_model(inputs / "base")
    model.parameters["lm_head.weight" if "lm_head.weight" in model.parameters else next(iter(model.parameters))][0] += 1
    model.save(inputs / "base")
    with pytest.raises(
        RunError, match=r"the weights in .*base changed since this run began: which are the run's reference"
    ):
        ingot.resume(result.output, max_steps=2, quiet=True)


def test_a_kl_that_explodes_has_a_name(root, tmp_path, capsys):
    config = plain(
        root,
        tmp_path / "run",
        max_steps=12,
        save_steps=12,
        learning_rate=0.5,
        kl_coef=0.0,
        kl_target=None,
        cliprange=0.9,
        num_ppo_epochs=8,
    )
    ingot.ppo(config, rewards=[vowels])
    assert re.search(
        r"^alarm     KL: KL to the reference is [\d.e+]+ nats an answer, beyond 10: its weight is too small",
        capsys.readouterr().out,
        re.M,
    )


# ---- the command line


def test_the_command_line(root, tmp_path, capsys):
    run = str(tmp_path / "ppo")
    arguments = ["ppo", "--model", str(root / "base"), "--prompts", str(root / "prompts.jsonl"), "--output", run]
    arguments += ["--response-length", "4", "--per-device-train-batch-size", "4", "--threads", "1"]
    assert main(arguments) == 2
    assert "ingot: no reward was given" in capsys.readouterr().err
    arguments += [
        "--reward-model",
        str(root / "rm"),
        "--reward",
        f"{root / 'reward.py'}:letters",
        "--reward-weights",
        "1",
        "0.5",
    ]
    assert main([*arguments, "--dry-run", "--max-steps", "3"]) == 0
    assert "3 steps of about" in capsys.readouterr().out
    assert not Path(run).exists()
    assert main([*arguments, "--total-episodes", "8", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["output"], facts["steps"]) == (run, 2)
    assert "score_after" in facts["figures"]
    assert main(["ppo", "--resume", run, "--max-steps", "3"]) == 0
    assert f"resumed from {run}/checkpoint-2" in capsys.readouterr().out
    assert main(["ppo", "--config", f"{run}/ppo.toml", "--output", run + "2", "--max-steps", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 1
    other = ["ppo", "--config", f"{run}/ppo.toml", "--output", run + "3", "--max-steps", "1", "--json"]
    assert main([*other, "--reward", f"{root / 'reward.py'}:gold", "--reward-weights", "1", "1"]) == 0
    capsys.readouterr()
    saved = json.loads(Path(run + "3", "run.json").read_bytes())["config"]
    assert saved["reward"] == [f"{root / 'reward.py'}:gold"]
    assert main(["sft", "--resume", run]) == 1
    assert f"a run of ingot ppo; go on with it: ingot ppo --resume {run}" in capsys.readouterr().err
