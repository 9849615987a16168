"""Reward models that learn from labels, of answers and of steps: what counts, what a run leaves behind and says, and who uses it."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ingot
from ingot.cli import main
from ingot.configs import GRPOConfig, PPOConfig, RewardConfig
from ingot.errors import ConfigError, DataError
from ingot.inference.intervals import area_under_curve
from ingot.inference.scoring import RewardModel
from ingot.losses.reward import label_loss
from ingot.training import reward_model as phase
from ingot.training.label_figures import (
    compare_labels,
    first_error_hits,
    label_figures,
    length_rule,
    nothing_compared,
    verdict_of_labels,
)
from ingot.training.progress import SilentDisplay
from ingot.training.rankings import Labels, labels_of
from ingot.training.reward_figures import scored_lengths
from ingot.training.verdicts import read_verdict
from killable_reward import child, labelled_rows, write_policy
from killable_sft import write_rows
from test_reward import snapshot

CONFIG = RewardConfig(max_steps=4, learning_rate=1e-2, threads=1)
KINDS = pytest.mark.parametrize("in_steps", [False, True])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_policy(tmp_path / "policy")
    return tmp_path


def config_at(place: Path, **changes: Any) -> RewardConfig:
    fixed = {"model": str(place / "policy"), "data": (str(place / "a.jsonl"),), "output": str(place / "run")}
    return dataclasses.replace(CONFIG, **{**fixed, **changes})


def prepared(place: Path, entries: list[dict[str, Any]], **changes: Any) -> Any:
    config = config_at(place, **{"held_out": 0.0, **changes})
    return phase.prepare_rankings(config, None, phase._base_shape(config), entries, SilentDisplay())


STEPS = [
    {"prompt": "q", "completions": ["a", "bb"], "labels": [True, False]},
    {"prompt": "q", "completions": ["c"], "labels": [True], "criterion": "style"},
    {"prompt": "p", "completions": ["d", "e", "f"], "labels": [False, True, True]},
    {"prompt": "q", "completions": ["a", "bb"], "labels": [False, False], "criterion": "style"},
]


# ---- what counts


def test_labels_find_their_scores(place):
    rankings = prepared(place, STEPS)
    assert rankings.labelled
    assert rankings.step_separator == "\n"
    assert rankings.criteria == ("reward", "style")
    # The answer that two rows label is run through the network once.
    assert [len(group) for group in rankings.train.examples.groups] == [2, 1]
    labels = rankings.train.labels()
    assert labels.places.tolist() == [0, 1, 2, 0, 1, 3, 4, 5]
    assert labels.criteria.tolist() == [0, 0, 1, 1, 1, 0, 0, 0]
    assert labels.true.tolist() == [True, False, True, False, False, False, True, True]
    assert labels.groups.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert labels.offsets.tolist() == [0, 2, 3, 5, 8]
    style = labels.of(1)
    assert (style.places.tolist(), style.offsets.tolist()) == ([2, 0, 1], [0, 1, 3])
    last = labels_of(rankings.train.judgements, rankings.train.first_scores, last_only=True)
    assert (last.places.tolist(), last.true.tolist()) == ([1, 2, 1, 5], [False, True, False, True])
    assert rankings.facts["num_train_labels"] == 8
    assert rankings.facts["labels_of"] == "steps"


@pytest.mark.parametrize("last_only", [False, True])
def test_the_loss_and_its_way_through_the_network_against_autograd(place, last_only):
    rankings = prepared(place, STEPS, train_on_last_step_only=last_only)
    config = config_at(place, train_on_last_step_only=last_only)
    model = phase._make_model(config, rankings, None)
    [pack] = rankings.batches.take(0)
    model.zero_grad()
    metrics = phase._backward(model, config, [pack], rankings, np.tile([0.0, 1.0], (2, 1)))
    _, out = model.forward(
        pack.tokens, pack.offsets, np.full(len(pack.tokens), -1, np.int32),
        want=("values",), value_rows=np.ones(len(pack.tokens), bool), train=False,
    )  # fmt: skip
    values = torch.tensor(out.values.astype(np.float64), requires_grad=True)
    logits, targets = [], []
    for group, first in zip(pack.members, pack.group_offsets[:-1], strict=True):
        sequences = rankings.train.examples.groups[group]
        ends = [pack.offsets[first + n] + end for n, each in enumerate(sequences) for end in each.ends]
        for judgement in rankings.train.judgements[group]:
            cut = slice(-1 if last_only else 0, None)
            for member, label in list(zip(judgement.members, judgement.labels, strict=True))[cut]:
                logits.append(values[ends[member], judgement.criterion])
                targets.append(float(label))
    loss = F.binary_cross_entropy_with_logits(torch.stack(logits), torch.tensor(targets, dtype=torch.float64))
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
    loss.backward()
    # The head's bias has the sum of all gradients; they would not add up were one at another token's.
    np.testing.assert_allclose(model.gradients["score.bias"], values.grad.sum(0).numpy(), rtol=1e-4, atol=1e-7)


@KINDS
def test_the_whole_prompt_is_held_out(place, in_steps):
    entries = labelled_rows(40, ("one", "two"), in_steps=in_steps)
    rankings = prepared(place, entries, held_out=0.3)
    sides = [{str(row.asked()) for row in side.examples.rows} for side in (rankings.train, rankings.held_out)]
    assert len(sides[0] | sides[1]) == 40
    assert not sides[0] & sides[1]


# ---- a run


@KINDS
def test_a_run_learns_and_its_scores_stay_log_odds(place, in_steps, capsys):
    write_rows(place / "a.jsonl", labelled_rows(150, in_steps=in_steps))
    config = config_at(place, max_steps=None, num_train_epochs=3, per_device_train_batch_size=8, held_out=0.2)
    result = ingot.train_reward_model(config)
    printed = capsys.readouterr().out
    assert ("labelled steps, " if in_steps else "labels, ") in printed
    lines = [line for line in result.history if "eval_auc" in line]
    assert lines[-1]["eval_accuracy"] > 0.95
    assert lines[-1]["eval_nll"] == pytest.approx(lines[-1]["eval_loss"])
    assert ("eval_first_error_accuracy" in lines[-1]) is in_steps
    assert ("eval_length_correlation" in lines[-1]) is not in_steps
    model = RewardModel.load(result.output, threads=1)
    assert model.step_separator == ("\n" if in_steps else None)
    asked: Any = [{"role": "user", "content": "1?"}]
    good, bad = model.score([asked] * 2, ["aab", "bb"])
    assert good > 0 > bad
    # The best weights, not the last; but brought to no scale.
    trained = RewardModel(result.model, model.encoder, step_separator=model.step_separator)
    np.testing.assert_allclose(model.score([asked], ["aab"]), trained.score([asked], ["aab"]), rtol=0.2)
    if in_steps:
        [scores] = model.score_steps([asked], [["aab", "bb", "ab"]])
        assert (scores > 0).tolist() == [True, False, True]
    verdict = read_verdict(result.output)
    assert verdict is not None
    assert verdict.passed
    assert "always saying the same gets" in verdict.text
    samples = [json.loads(line) for line in (result.output / "samples.jsonl").read_text().splitlines()]
    for sample in samples:
        for judgement in sample["judgements"]:
            assert len(judgement["labels"]) == len(judgement["responses"])
            for number, label in zip(judgement["responses"], judgement["labels"], strict=True):
                assert sample["responses"][number].startswith("a") is label
        assert len(sample["scores"]) == len(sample["responses"])
    assert main(["report", str(result.output)]) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and forkserver are of Unix")
@KINDS
def test_killed_and_resumed_it_ends_with_the_same_bits(tmp_path, in_steps):
    write_policy(tmp_path / "policy")
    write_rows(tmp_path / "a.jsonl", labelled_rows(30, ("good", "short"), in_steps=in_steps))
    write_rows(tmp_path / "b.jsonl", labelled_rows(50, ("good",), in_steps=in_steps)[30:])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killable_reward"])
    changes = {"ties": "drop", "center_rewards_coefficient": 0.0, "train_on_last_step_only": in_steps}

    def run(folder: Path, kill_at: int | str | None = None, log: Path | None = None) -> int | None:
        folder.parent.mkdir(exist_ok=True)
        process = context.Process(target=child, args=(folder, kill_at, log), kwargs=changes)
        process.start()
        process.join(600)
        return process.exitcode

    assert run(tmp_path / "whole" / "run", log=tmp_path / "points") == 0
    points = (tmp_path / "points").read_text().split("\n")
    first_save = next(n for n, name in enumerate(points) if name.startswith("optimizer"))
    folder = tmp_path / "killed" / "run"
    for kill_at in (first_save + 12, "verdict"):
        assert run(folder, kill_at) == -9, "the run was over before it was killed"
    assert run(folder) == 0
    assert snapshot(folder) == snapshot(tmp_path / "whole" / "run")


def test_policies_are_trained_and_compared_by_steps(place):
    """By PPO with the last step, by GRPO with the weakest, and by compare with all."""
    write_rows(place / "a.jsonl", labelled_rows(40, in_steps=True))
    rewarder = str(ingot.train_reward_model(config_at(place), quiet=True).output)
    write_rows(place / "p.jsonl", [{"prompt": [{"role": "user", "content": f"{n}?"}]} for n in range(8)])
    shared: dict[str, Any] = {
        "model": str(place / "policy"), "prompts": (str(place / "p.jsonl"),), "threads": 1, "held_out": 0.25,
        "gate_answers": 0, "max_steps": 1, "sample_prompts": 0,
    }  # fmt: skip
    by_last = PPOConfig(
        reward_model=rewarder, output=str(place / "ppo"), per_device_train_batch_size=4, response_length=8, **shared
    )
    result = ingot.ppo(by_last, quiet=True)
    assert any(np.isfinite(line.get("rewards/run/mean", np.nan)) for line in result.history)
    by_weakest = GRPOConfig(
        reward=(f"{rewarder}:min",), output=str(place / "grpo"), num_generations=2, per_device_train_batch_size=4,
        max_completion_length=8, **shared,
    )  # fmt: skip
    result = ingot.grpo(by_weakest, quiet=True)
    assert any(np.isfinite(line.get("rewards/run:min/mean", np.nan)) for line in result.history)
    models = [str(place / "policy"), str(place / "ppo")]
    judge = f"{rewarder}:product"
    found = ingot.compare_models(models, place / "p.jsonl", judge, max_new_tokens=8, output=place / "cmp", threads=1)
    assert found.num_prompts == 8


# ---- what it is worth


def labels(true: list[bool], groups: list[int], offsets: list[int] | None = None) -> Labels:
    num = len(true)
    return Labels(
        np.arange(num), np.zeros(num, np.int64), np.array(true), np.array(groups), np.array(offsets or range(num + 1))
    )


def test_area_under_the_curve_against_all_pairs_and_its_coverage():
    rng = np.random.default_rng(0)
    for _ in range(30):
        scores, true = rng.integers(0, 5, 30).astype(float), rng.random(30) < 0.4
        gaps = scores[true][:, None] - scores[~true][None, :]
        share = area_under_curve(scores, true, range(30))
        assert share.value == pytest.approx(((np.sign(gaps) + 1) / 2).mean())
        assert share.low < share.value < share.high
        turned = area_under_curve(-scores, true, range(30))
        assert (turned.low, turned.high) == (pytest.approx(1 - share.high), pytest.approx(1 - share.low))
    assert np.isnan(area_under_curve([1.0, 2.0], [True, True], [0, 1]).value)
    # Two normals one apart: the area is the normal distribution at 1 / sqrt 2. Cases of a prompt share half of their noise.
    covered = 0
    for _ in range(300):
        shared = np.repeat(rng.normal(size=60), 4)
        true = np.tile([True, False, True, False], 60)
        drawn = (shared + rng.normal(size=240)) / 2**0.5 + true
        found = area_under_curve(drawn, true, np.repeat(np.arange(60), 4))
        covered += found.low <= 0.7602 <= found.high
    assert 0.92 <= covered / 300 <= 1.0


def test_figures_of_labels_against_formulas():
    found = labels([True, False, True, False, True], [0, 0, 1, 1, 2], [0, 2, 4, 5])
    scores = np.array([[2.0], [1.0], [0.0], [-1.0], [-3.0]])
    figures = label_figures(scores, np.array([3, 2, 9, 4, 5]), found, ("reward",), in_steps=True)
    assert figures["accuracy"] == pytest.approx((1 + 0 + 0.5 + 1 + 0) / 5)
    expected = F.binary_cross_entropy_with_logits(torch.tensor(scores[:, 0]), torch.tensor(found.true).double())
    assert figures["nll"] == pytest.approx(expected.item())
    assert figures["auc"] == pytest.approx((2 + 1 + 0) / 6)
    assert figures["mean_reward"] == pytest.approx(-0.2)
    # The first row's wrong step is missed, the second's is found, the third has none and one is said.
    assert first_error_hits(scores[:, 0], found).tolist() == [0.0, 1.0, 0.0]
    assert figures["first_error_accuracy"] == pytest.approx(1 / 3)
    _, _, metrics = label_loss(scores[:, 0], found.true, num_labels=5)
    assert metrics["loss"] == pytest.approx(figures["nll"])


def test_the_length_rule_is_the_best_threshold():
    rng = np.random.default_rng(1)
    for _ in range(50):
        lengths, true = rng.integers(1, 6, 12), rng.random(12) < 0.5
        rule = length_rule(lengths, true)
        right = ((rule(lengths) > 0) == true).mean()
        every = [((lengths > cut) == true).mean() for cut in range(7)]
        assert right == pytest.approx(max(*every, *(1 - share for share in every)))


def test_the_verdict_names_what_it_is_compared_with(place):
    rankings = prepared(place, labelled_rows(120), held_out=0.4)
    train, held = rankings.train, rankings.held_out
    true = held.labels().true
    rng = np.random.default_rng(0)
    good = np.where(true, 1.0, -1.0)[:, None] + rng.normal(size=(len(true), 1))
    found = compare_labels("", good, 0, train, held, in_steps=False)
    assert found.passed
    verdict = verdict_of_labels([found], in_steps=False)
    assert verdict.passed
    assert "held-out answers rightly whether they are wanted" in verdict.text
    assert "A wanted answer scores above an unwanted one in" in verdict.text
    assert {"accuracy_majority", "accuracy_length", "auc_length", "auc_low"} <= set(verdict.figures)
    assert found.words.accuracy.value > 0.9  # the rule is one of words
    assert not compare_labels("", -good, 0, train, held, in_steps=False).passed
    lengths = scored_lengths(held.sequences)[:, None].astype(float)
    assert not compare_labels("", lengths, 0, train, held, in_steps=False).passed
    nothing = verdict_of_labels([nothing_compared("")], in_steps=True)
    assert not nothing.passed
    assert "measured on no held-out step" in nothing.text
    assert "--held-out" in nothing.text


# ---- bad input


ONE = {"prompt": "a", "completion": "b", "label": True}
TWO = {"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}


@pytest.mark.parametrize(
    ("entries", "changes", "message"),
    [
        (
            [TWO, {**TWO, "labels": [True]}],
            {},
            r'a\.jsonl, row 2: field "labels" has 1 entries, but field "completions"',
        ),
        ([TWO, {**TWO, "completions": ["b", " "]}], {}, r'a\.jsonl, row 2: field "completions\[1\]" is empty; fill it'),
        ([TWO, {**TWO, "labels": [True, 1]}], {}, r'a\.jsonl, row 2: field "labels\[1\]" is the number 1; write true'),
        (
            [TWO, {**TWO, "completions": []}],
            {},
            r'a\.jsonl, row 2: field "completions" is an empty list; give the steps',
        ),
        ([ONE, {**ONE, "label": "yes"}], {}, r'a\.jsonl, row 2: field "label" is a string; write true or false'),
        ([ONE, {**ONE, "completion": ""}], {}, r'a\.jsonl, row 2: field "completion" is empty'),
        ([{**ONE, "criterion": 3}], {}, r'a\.jsonl, row 1: field "criterion" is 3; give a string'),
        ([ONE, TWO], {}, r"a\.jsonl, row 2: is stepwise supervision .* but the file is unpaired preference"),
        (
            [ONE] * 3,
            {},
            r"a\.jsonl: all 3 labels are true, so that there is nothing to tell apart: give rows labelled false",
        ),
        ([ONE, TWO], {}, r"put this one into another file"),
        (
            [ONE],
            {"loss_type": "best_of"},
            r"row 1: has a label, which loss_type best_of has no use for; leave loss_type",
        ),
        ([TWO], {"ties": "half"}, r"row 1: has labels, which ties half has no use for; leave ties drop"),
        ([ONE], {"train_on_last_step_only": True}, r"row 1: has no steps; leave train_on_last_step_only out"),
        ([ONE, {**ONE, "label": False}], {}, r"with 1 different prompts are too few to hold 10 % of the prompts out"),
    ],
)
def test_bad_input_is_one_clear_line(place, entries, changes, message):
    write_rows(place / "a.jsonl", entries)
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        ingot.train_reward_model(config_at(place, **changes), quiet=True)
    assert "\n" not in str(caught.value)


def test_files_of_two_sorts_are_refused(place):
    write_rows(place / "a.jsonl", [ONE])
    write_rows(place / "b.jsonl", [TWO])
    with pytest.raises(DataError, match=r"b\.jsonl: holds answers in steps .*a\.jsonl holds answers with a label each"):
        ingot.train_reward_model(config_at(place, data=(str(place / "a.jsonl"), str(place / "b.jsonl"))), quiet=True)
    with pytest.raises(ConfigError, match="step_separator is empty"):
        RewardConfig(step_separator="")


def test_the_help_names_the_rows(capsys):
    with pytest.raises(SystemExit):
        main(["reward", "--help"])
    told = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    for words in (
        "prompt, completion and label",
        "completions (the steps of one answer) and labels",
        "--step-separator",
    ):
        assert words in told
