"""Distillation as a run: the student comes near its teacher, a killed run ends with the same bits, bad input is one clear line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ingot
from ingot.cli import main
from ingot.configs import DistillConfig
from ingot.errors import CheckpointError, ConfigError, DataError, RunError
from ingot.losses.packed import sum_by_sequence
from ingot.models import Model, load_model
from ingot.tokenizer import Tokenizer
from ingot.training import distill as phase
from ingot.training import trainer
from ingot.training.progress import SilentDisplay
from ingot.training.rollouts import recompute_logprobs
from ingot.training.teaching import prepare_lessons
from ingot.training.verdicts import Verdict, read_verdict, write_verdict
from killable_distill import child
from killable_dpo import write_chat_model, write_rows

CONFIG = DistillConfig(max_steps=4, max_new_tokens=6, learning_rate=1e-2, per_device_train_batch_size=16, threads=1)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a student, a teacher who is surer of what to say, and prompts."""
    write_chat_model(tmp_path / "student")
    write_chat_model(tmp_path / "teacher", seed=8, initializer_range=0.25, hidden_size=24)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": [{"role": "user", "content": f"{n}?"}]} for n in range(120)])
    return tmp_path


def config_at(place: Path, **changes: Any) -> DistillConfig:
    fields: dict[str, Any] = {"model": str(place / "student"), "teacher": str(place / "teacher")}
    fields |= {"data": (str(place / "prompts.jsonl"),), "output": str(place / "run"), "held_out": 0.3}
    return dataclasses.replace(CONFIG, **{**fields, **changes})


# ---- a step


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_a_step_is_the_formula(place, lmbda):
    """On-policy, the gradient is that of -sum A_t ln pi(a_t) / T; on the teacher's answers, of their cross-entropy. Whatever the packs."""
    found = []
    for pack_length in (4096, 60):
        config = config_at(place, lmbda=lmbda, pack_length=pack_length)
        student, teacher = load_model(config.model, threads=1), load_model(config.teacher, threads=1)
        lessons = prepare_lessons(config, None, student.config, None, SilentDisplay())
        metrics, rollouts = phase._learn(config, lessons, student, 3)
        found.append((metrics, {name: np.array(value) for name, value in student.gradients.items()}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    own, theirs = recompute_logprobs(student, rollouts), recompute_logprobs(teacher, rollouts)
    num_tokens = np.count_nonzero(rollouts.mask)
    # Every answer of a run has random numbers of its own.
    np.testing.assert_array_equal(rollouts.episode_ids, np.arange(48, 64))
    gap = sum_by_sequence(own.astype(float) - theirs, rollouts.targets, rollouts.offsets)
    if lmbda:
        np.testing.assert_array_equal(own, rollouts.logprobs)
        assert metrics["kl"] == pytest.approx(gap.mean(), rel=1e-6)
        assert metrics["loss"] == pytest.approx(gap.sum() / num_tokens, rel=1e-6)
    else:
        np.testing.assert_array_equal(theirs, rollouts.logprobs)
        assert metrics["loss"] == pytest.approx(-own.sum(dtype=float) / num_tokens, rel=1e-6)
    student.zero_grad()
    ctx, _ = student.forward(rollouts.tokens, rollouts.offsets, rollouts.targets, banned_ids=rollouts.banned_ids)
    pull = (theirs.astype(float) - own if lmbda else np.ones(len(own))) / num_tokens
    student.backward(ctx, d_logprobs=np.where(rollouts.mask, -pull, 0.0).astype(np.float32))
    for name, gradient in student.gradients.items():
        for _, ours in found:
            np.testing.assert_allclose(
                ours[name], gradient, atol=1e-5 * max(1e-2, np.abs(gradient).max()), err_msg=name
            )


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_a_step_on_whole_distributions_is_the_formula(place, lmbda, beta, monkeypatch):
    """The divergence of the two softmaxes over all that may follow, in f64 from hidden states; its gradient by finite differences. A
    teacher's vocabulary that is padded does not matter, nor do packs."""
    write_chat_model(place / "teacher", seed=8, initializer_range=0.25, vocab_size=270)
    config = config_at(place, lmbda=lmbda, beta=beta, temperature=0.8)
    student, teacher = load_model(config.model, threads=1), load_model(config.teacher, threads=1)
    lessons = prepare_lessons(config, None, student.config, None, SilentDisplay())
    metrics, rollouts = phase._learn(config, lessons, student, 3)
    gradients = {name: np.array(value) for name, value in student.gradients.items()}
    rows = np.flatnonzero(rollouts.mask)
    allowed = np.setdiff1d(np.arange(lessons.encoder.tokenizer.vocab_size), rollouts.banned_ids)
    logprobs = []
    for model in (student, teacher):
        _, out = model.forward(
            rollouts.tokens, rollouts.offsets, rollouts.targets, want=("hidden",), hidden_rows=rows, train=False
        )
        scores = out.hidden.astype(float) @ model.state()["model.embed_tokens.weight"][allowed].T.astype(float) / 0.8
        logprobs.append(scores - np.log(np.exp(scores).sum(axis=1, keepdims=True)))
    (lp, lq), (p, q) = logprobs, [np.exp(each) for each in logprobs]
    lm = np.log(beta * q + (1 - beta) * p)
    if beta in (0.0, 1.0):
        each = (p * (lp - lq)).sum(1) if beta else (q * (lq - lp)).sum(1)
    else:
        each = (beta * q * (lq - lm) + (1 - beta) * p * (lp - lm)).sum(1)
    assert metrics["loss"] == pytest.approx(each.mean(), rel=1e-4)
    assert metrics["on_policy"] == lmbda

    state, rng = student.state(), np.random.default_rng(1)
    for _ in range(2):
        way = {name: rng.normal(size=values.shape).astype("f4") for name, values in state.items()}
        ends = []
        for sign in (1, -1):
            student.load_state({name: values + np.float32(sign * 1e-3) * way[name] for name, values in state.items()})
            ends.append(phase._compare(config, lessons, student, rollouts)["loss"])
        slope = sum(float((gradients[name].astype(float) * way[name]).sum()) for name in way)
        assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(slope, rel=2e-2, abs=2e-3)

    student.load_state(state)
    monkeypatch.setattr(phase, "_COMPARED", 40 * len(allowed))
    student.zero_grad()
    again = phase._compare(config, lessons, student, rollouts)
    assert again["loss"] == pytest.approx(metrics["loss"], rel=1e-6)
    for name, gradient in student.gradients.items():
        np.testing.assert_allclose(gradient, gradients[name], atol=1e-5 * max(1e-2, np.abs(gradient).max()))


def test_a_teacher_whose_vocabulary_is_padded(place):
    write_chat_model(place / "teacher", seed=8, vocab_size=300)
    for lmbda in (0.0, 1.0):
        config = config_at(place, lmbda=lmbda, max_steps=1, output=str(place / f"{lmbda}"))
        assert ingot.distill(config, quiet=True).history[-1]["step"] == 1


def test_steps_are_divided_as_asked(place):
    result = ingot.distill(config_at(place, lmbda=0.5, max_steps=30, logging_steps=1, eval_steps=30), quiet=True)
    kinds = [line["on_policy"] for line in result.history if "on_policy" in line]
    assert len(kinds) == 30
    assert 6 <= sum(kinds) <= 24
    assert all(("kl" in line) == bool(line["on_policy"]) for line in result.history if "on_policy" in line)


# ---- runs


def test_whole_distributions_have_less_noise(place):
    """In as many steps, on the student's own answers, it comes nearer than by its own tokens alone."""
    found = {}
    for beta in (None, 1.0):
        config = config_at(place, beta=beta, max_steps=40, eval_steps=40, output=str(place / f"{beta}"))
        lines = [line for line in ingot.distill(config, quiet=True).history if "eval_reverse_kl" in line]
        found[beta] = lines[-1]["eval_reverse_kl"] / lines[0]["eval_reverse_kl"]
    assert found[1.0] < 0.85 * found[None]


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_the_student_comes_near_its_teacher(place, lmbda, capsys):
    config = config_at(place, lmbda=lmbda, max_steps=160, eval_steps=80, sample_prompts=3)
    result = ingot.distill(config)
    out = capsys.readouterr().out
    assert re.search(
        r"^step 160  KL student to teacher \d+\.\d+  teacher to student \d+\.\d+  answers ended \d+ %$", out, re.M
    )
    lines = [line for line in result.history if "eval_reverse_kl" in line]
    assert [line["step"] for line in lines] == [0, 80, 160]
    # What is learned falls further than the other direction.
    falls = {name: lines[-1][name] / lines[0][name] for name in ("eval_reverse_kl", "eval_forward_kl")}
    assert max(falls.values()) < 0.9
    assert falls["eval_reverse_kl" if lmbda else "eval_forward_kl"] < 0.75
    assert lines[-1]["eval_loss"] == lines[-1]["eval_reverse_kl" if lmbda else "eval_forward_kl"]
    found = read_verdict(result.output)
    assert found is not None
    assert "verdict   " in out
    assert found.figures["fall"] > found.figures["margin"] > 0
    samples = [json.loads(line) for line in (result.output / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 9
    assert {"prompt", "completion", "teacher", "ended", "kl"} <= samples[0].keys()
    assert [one["teacher"] for one in samples[:3]] == [one["teacher"] for one in samples[-3:]]
    assert "ingot distill" in (result.output / "README.md").read_text()
    assert DistillConfig.from_dict(json.loads((result.output / "run.json").read_bytes())["config"]) == config
    with pytest.raises(RunError, match=r"holds a finished run of 160 steps.*ingot distill --resume"):
        ingot.distill(config, quiet=True)


def test_it_is_measured_on_as_many_prompts_as_asked(place):
    for batches, count in ((None, 37), (2, 32)):
        config = config_at(
            place, eval_batches=batches, max_steps=1, sample_prompts=99, output=str(place / f"{batches}")
        )
        lines = (ingot.distill(config, quiet=True).output / "samples.jsonl").read_text().splitlines()
        facts = json.loads((place / f"{batches}" / "run.json").read_bytes())["data"]
        assert len(lines) == 2 * min(facts["num_held_out"], count)


def test_dropout_of_both_is_off(place):
    write_chat_model(place / "student", dropout=0.2)
    write_chat_model(place / "teacher", seed=8, dropout=0.2)
    result = ingot.distill(config_at(place, model=str(place / "teacher"), max_steps=1), quiet=True)
    # The student is its own teacher.
    assert result.history[0]["eval_reverse_kl"] == 0.0
    assert result.history[0]["eval_forward_kl"] == 0.0
    assert result.model.config.dropout == 0.0


def snapshot(folder: Path) -> dict[str, Any]:
    names = ["model.safetensors", "tokenizer.json", "chat_template.jinja", "samples.jsonl", "verdict.json"]
    names += ["config.json", "README.md", "checkpoint-10/model.safetensors", "checkpoint-10/optimizer.safetensors"]
    taken: dict[str, Any] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    taken["metrics"] = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
    taken["folder"] = sorted(entry.name for entry in folder.iterdir() if entry.name != "run.lock")
    return taken


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and forkserver are of Unix")
def test_killed_and_resumed_it_ends_with_the_same_bits(place):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killable_distill"])

    def run(folder: Path, kill_at: int | None = None, log: Path | None = None) -> int | None:
        process = context.Process(target=child, args=(folder, kill_at, log))
        process.start()
        process.join(600)
        return process.exitcode

    (place / "whole").mkdir()
    assert run(place / "whole" / "run", log=place / "points") == 0
    expected = snapshot(place / "whole" / "run")
    kinds = {line.get("on_policy") for line in expected["metrics"]} - {None}
    assert kinds == {0.0, 1.0}
    points = (place / "points").read_text().split("\n")
    first_save = next(n for n, name in enumerate(points) if name.startswith("optimizer"))
    (place / "killed").mkdir()
    folder = place / "killed" / "run"
    for kill_at in (first_save + 12, 25):
        assert run(folder, kill_at) == -9, "the run was over before it was killed"
    assert run(folder) == 0
    assert snapshot(folder) == expected


def test_ctrl_c_while_answers_are_drawn_loses_nothing(place, monkeypatch):
    """The step that was being drawn is given up, and drawn again when the run goes on."""
    whole = ingot.distill(config_at(place, eval_steps=4, output=str(place / "whole")), quiet=True)
    alive, calls = phase._Run.alive, iter(range(10**6))

    def press(self: Any, done: int, total: int) -> None:
        # Inside the second step.
        self.stop.requested = self.stop.requested or (self.state.step == 1 and next(calls) == 2)
        alive(self, done, total)

    monkeypatch.setattr(phase._Run, "alive", press)
    with pytest.raises(KeyboardInterrupt):
        ingot.distill(config_at(place, eval_steps=4), quiet=True)
    assert (place / "run" / "checkpoint-1").is_dir()
    monkeypatch.setattr(phase._Run, "alive", alive)
    result = ingot.resume(place / "run", quiet=True)
    for name, values in whole.model.state().items():
        np.testing.assert_array_equal(values, result.model.state()[name], err_msg=name)


def test_signs_of_life_are_given_while_answers_are_drawn(place, monkeypatch):
    monkeypatch.setattr(trainer, "_SIGN_OF_LIFE_S", 0.0)
    status, losses = phase._Run.status, []

    def seen(self: Any, loss: float | None) -> Any:
        losses.append(loss)
        return status(self, loss)

    monkeypatch.setattr(phase._Run, "status", seen)
    ingot.distill(config_at(place, max_steps=2, eval_steps=2), quiet=True)
    assert sum(loss is not None for loss in losses) == 2
    assert losses.count(None) >= 2 * 5, "at every token of the answers"


def test_on_the_command_line(place, capsys):
    run = str(place / "run")
    arguments = ["distill", "--model", str(place / "student"), "--teacher", str(place / "teacher"), "--output", run]
    arguments += ["--data", str(place / "prompts.jsonl"), "--max-new-tokens", "4", "--threads", "1", "--max-steps", "2"]
    assert main([*arguments, "--dry-run"]) == 0
    assert not Path(run).exists()
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["steps"], facts["output"]) == (2, run)
    assert "reverse_kl_after" in facts["figures"]
    assert main(["distill", "--resume", run, "--max-steps", "3", "--json"]) == 0
    assert main(["dpo", "--resume", run]) == 1
    assert "a run of ingot distill; go on with it: ingot distill --resume" in capsys.readouterr().err
    assert main(["distill", "--config", f"{run}/distill.toml", "--output", run + "2", "--json"]) == 0


# ---- bad input


@pytest.mark.parametrize(
    ("entries", "changes", "message"),
    [
        ([{"text": "a"}], {}, r"row 1: has the columns text, not those of prompt-only"),
        ([{"prompt": ""}], {}, r'row 1: field "prompt" is empty'),
        ([{"prompt": "q" * 95}], {}, r"none of 1 prompts fits: the shortest has \d+ tokens and there is room for 90"),
        ([{"prompt": "q"}] * 9, {}, r"9 prompts, 1 of them different, are too few to hold 30 % out"),
        (None, {"model": ""}, r"no model to start from: give --model"),
        (None, {"teacher": ""}, r"nobody to learn from: give --teacher"),
        (None, {"teacher": "nowhere"}, r"nowhere: no such folder"),
        (None, {"data": ()}, r"no prompts to answer: give --data"),
        (None, {"max_new_tokens": 96}, r"max_new_tokens 96 leaves no room for a prompt"),
        (None, {"pack_length": 20}, r"pack_length 20 is below the \d+ tokens"),
    ],
)
def test_bad_input_is_one_clear_line(place, entries, changes, message):
    if entries is not None:
        changes = {"data": (write_rows(place / "a.jsonl", entries),), **changes}
    with pytest.raises((ConfigError, DataError, RunError, CheckpointError), match=message) as caught:
        ingot.distill(config_at(place, **changes), quiet=True)
    assert "\n" not in str(caught.value)


def test_teachers_that_do_not_fit_are_refused(place):
    tokenizer = Tokenizer.train(iter(["low lower"] * 9), vocab_size=258).with_special_tokens(["<|endoftext|>"])
    tokenizer.save(place / "teacher")
    with pytest.raises(ConfigError, match="has another tokenizer"):
        ingot.distill(config_at(place), quiet=True)
    write_chat_model(place / "teacher")
    Model(load_model(place / "teacher").config, num_values=1).save(place / "teacher")
    with pytest.raises(ConfigError, match="is a model that scores"):
        ingot.distill(config_at(place, output=str(place / "b")), quiet=True)
    write_chat_model(place / "teacher")
    write_verdict(place / "teacher", Verdict(passed=False, sentences=("It is no better.",), figures={}))
    with pytest.raises(RunError, match=r"did not pass its gate: It is no better\."):
        ingot.distill(config_at(place, output=str(place / "b")), quiet=True)
    ingot.distill(config_at(place, output=str(place / "c"), max_steps=1), force=True, quiet=True)
    for changes, message in (
        ({"lmbda": 1.5}, "lmbda must be"),
        ({"beta": 1.5}, "beta must be"),
        ({"temperature": 0.0}, "temperature must be above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            DistillConfig(**changes)


def line(step: int, reverse: float, **figures: float) -> dict[str, Any]:
    found = {
        "eval_reverse_kl": reverse,
        "eval_reverse_kl_error": 0.1,
        "eval_forward_kl": 2 * reverse,
        "eval_forward_kl_error": 0.1,
    }
    found |= {
        "eval_eos_rate": 0.9,
        "eval_teacher_eos_rate": 0.9,
        "eval_completions/mean_length": 5.0,
        "eval_teacher_mean_length": 6.0,
    }
    return {"step": step, **found, **figures}


def test_the_verdict_asks_for_more_than_chance():
    # 1.96 sqrt(.1^2 + .1^2) = .277
    assert phase.verdict_of([line(0, 2.0), line(5, 1.72)], 5, "reverse_kl").passed
    near = phase.verdict_of([line(0, 2.0), line(5, 1.73)], 5, "reverse_kl")
    assert not near.passed
    assert "change -0.270 ± 0.277" in near.text
    silent = phase.verdict_of([line(0, 2.0), line(5, 1.0, eval_eos_rate=0.7), line(9, 1.0)], 5, "reverse_kl")
    assert not silent.passed
    assert "Answers no longer end" in silent.text
    assert not phase.verdict_of([{"step": 3, "loss": 1.0}], 3, "reverse_kl").passed
