"""Training of a reward model: its gradients, what counts, what a run leaves behind and says, and what bad input gets."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import ingot
from ingot.cli import main
from ingot.configs import ModelConfig, RewardConfig
from ingot.data.chat import Encoded
from ingot.data.examples import Examples, assemble_pack
from ingot.data.rows import LanguageModelling
from ingot.errors import ConfigError, DataError, RunError
from ingot.feedback.agreement import measure_agreement
from ingot.feedback.records import from_row
from ingot.inference.intervals import bootstrap_share, mean_of, share_of, wilson
from ingot.inference.scoring import RewardModel
from ingot.losses.reward import kwise_loss
from ingot.models import Model
from ingot.training import reward_model as phase
from ingot.training.alarms import Alarms
from ingot.training.progress import SilentDisplay
from ingot.training.rankings import Judgement, Pairs, Ranked, pairs_of
from ingot.training.reward_figures import (
    BagOfWords,
    Comparison,
    hits_of,
    length_hits,
    pair_figures,
    people_agree,
    verdict_of,
)
from ingot.training.verdicts import Verdict, read_verdict, write_verdict
from killable_reward import WORDS, child, ranks_of, rows, settings, worth, write_policy
from killable_sft import write_rows

CONFIG = RewardConfig(max_steps=4, learning_rate=1e-2, threads=1)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model to start from and judgements."""
    write_policy(tmp_path / "policy")
    write_rows(tmp_path / "a.jsonl", rows())
    return tmp_path


def config_at(place: Path, **changes: Any) -> RewardConfig:
    fixed = {"model": str(place / "policy"), "data": (str(place / "a.jsonl"),), "output": str(place / "run")}
    return dataclasses.replace(CONFIG, **{**fixed, **changes})


def last(result: Any, name: str = "eval_accuracy") -> dict[str, Any]:
    """The last line of metrics that has this one."""
    return [line for line in result.history if name in line][-1]


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# ---- the gradient


def loss_of(scores: np.ndarray, made: list[list[Judgement]], first: list[int], **changes: Any) -> tuple[Any, Any]:
    config = dataclasses.replace(CONFIG, **changes)
    scales = np.tile([0.0, 1.0], (scores.shape[1], 1))
    total = phase.weight_of(config, made)
    d_scores, metrics = phase.judged_loss(scores, config, made, np.array(first), scales, total)
    return metrics["loss"], d_scores


@pytest.mark.parametrize("ties", ["drop", "half"])
def test_a_ranking_is_the_kwise_loss(ties):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(9, 1))
    ranks = np.array([1, 2, 2, 3, 1, 1, 2, 1, 2])
    made = [
        [Judgement(0, (0, 1, 2, 3), (1, 2, 2, 3))],
        [Judgement(0, (0, 1, 2), (1, 1, 2))],
        [Judgement(0, (0, 1), (1, 2))],
    ]
    loss, d_scores = loss_of(scores, made, [0, 4, 7], ties=ties, center_rewards_coefficient=0.1)
    expected, d_expected, _ = kwise_loss(
        scores[:, 0], ranks, np.array([0, 4, 7, 9]), num_groups=3, ties=ties, center_rewards_coefficient=0.1
    )
    assert loss == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(d_scores[:, 0], d_expected, rtol=1e-10)


def test_margins_soft_labels_weights_and_criteria_against_autograd():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(5, 2))
    made = [
        [Judgement(0, (0, 1), (1, 2), margin=0.7), Judgement(1, (1, 0), (1, 2), weight=0.5)],
        [Judgement(0, (1, 2), (1, 2), soft_label=0.8, weight=2.0)],
    ]
    loss, d_scores = loss_of(values, made, [0, 2])
    scores = torch.tensor(values, requires_grad=True)
    ln = torch.nn.functional.logsigmoid
    total = -ln(scores[0, 0] - scores[1, 0] - 0.7) - 0.5 * ln(scores[1, 1] - scores[0, 1])
    gap = scores[3, 0] - scores[4, 0]
    total = (total - 2 * (0.8 * ln(gap) + 0.2 * ln(-gap))) / 3.5
    total.backward()
    assert loss == pytest.approx(total.item(), rel=1e-12)
    np.testing.assert_allclose(d_scores, scores.grad.numpy(), rtol=1e-10)


def test_lists_and_ratings_against_autograd():
    rng = np.random.default_rng(2)
    values = rng.normal(size=(7, 1))
    made = [
        [Judgement(0, (0, 1, 2, 3), (2, 1, 3, 4), ratings=(1.0, 3.0, float("nan"), 2.0))],
        [Judgement(0, (0, 2, 1), (1, 2, 3), ratings=(0.5, 0.5, 1.5))],
    ]
    orders = ([1, 0, 2, 3], [4, 6, 5])
    scores = torch.tensor(values[:, 0], requires_grad=True)

    def check(expected: torch.Tensor, loss_type: str) -> None:
        loss, d_scores = loss_of(values, made, [0, 4], loss_type=loss_type)
        scores.grad = None
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=1e-12)
        np.testing.assert_allclose(d_scores[:, 0], scores.grad.numpy(), atol=1e-14)

    stages = [
        torch.logsumexp(scores[order[stage:]], 0) - scores[order[stage]]
        for order in orders
        for stage in range(len(order))
    ]
    check(sum(stages) / 2, "plackett_luce")
    check(sum(torch.logsumexp(scores[order], 0) - scores[order[0]] for order in orders) / 2, "best_of")
    rated = [(0, 1.0), (1, 3.0), (3, 2.0), (4, 0.5), (6, 0.5), (5, 1.5)]
    check(sum((scores[place] - rating) ** 2 for place, rating in rated) / 6, "rating")


def sequence(rng: np.random.Generator, length: int) -> Encoded:
    return Encoded(rng.integers(0, 30, length).astype(np.int32), np.arange(length) >= 2, (length - 1,))


def ranked(num_prompts: int, size: int, criteria: int = 1) -> Ranked:
    rng = np.random.default_rng(5)
    groups = tuple(tuple(sequence(rng, int(rng.integers(3, 9))) for _ in range(size)) for _ in range(num_prompts))
    made = tuple(
        tuple(Judgement(c, tuple(range(size)), tuple((rng.permutation(size) + 1).tolist())) for c in range(criteria))
        for _ in range(num_prompts)
    )
    text = LanguageModelling(content="x")
    return Ranked(Examples((text,) * num_prompts, groups, num_prompts, 0), made)


def test_the_gradient_goes_through_the_network_however_a_step_is_packed():
    data = ranked(4, 3, criteria=2)
    rankings: Any = type("Rankings", (), {"train": data, "criteria": ("a", "b")})()
    model = Model(
        ModelConfig.llama(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2),
        seed=1,
        num_values=2,
    )
    scales = np.tile([0.0, 1.0], (2, 1))

    def gradient(places: list[list[int]]) -> tuple[float, dict[str, np.ndarray]]:
        packs = [assemble_pack([data.examples.groups[n] for n in part], members=part) for part in places]
        model.zero_grad()
        metrics = phase._backward(model, CONFIG, packs, rankings, scales)
        return metrics["loss"], {name: np.array(value, np.float64) for name, value in model.gradients.items()}

    loss, grads = gradient([[0, 1, 2, 3]])
    again, same = gradient([[2, 0], [3], [1]])
    assert again == pytest.approx(loss, rel=1e-6)
    for name, grad in grads.items():
        np.testing.assert_allclose(same[name], grad, atol=2e-6, err_msg=name)
    length = sum(float((grad**2).sum()) for grad in grads.values())
    before, losses = model.state(), []
    for sign in (1, -1):
        model.load_state({name: before[name] + sign * 1e-3 / length**0.5 * grads[name] for name in before})
        losses.append(gradient([[0, 1, 2, 3]])[0])
    assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(length**0.5, rel=1e-2)
    assert (grads["score.weight"] != 0).any()
    # Nothing is learned about words.
    assert all((grads[name] == 0).all() for name in grads if name.startswith("lm_head"))


# ---- what counts


def prepared(place: Path, entries: list[dict[str, Any]], **changes: Any) -> Any:
    write_rows(place / "a.jsonl", entries)
    config = config_at(place, held_out=0.0, **changes)
    shape = phase._base_shape(config)
    return phase.prepare_rankings(config, None, shape, None, SilentDisplay())


def test_all_that_is_said_about_a_prompt_is_one_group_and_never_split(place):
    pair = {"prompt": "what?", "chosen": "a", "rejected": "b"}
    entries: list[dict[str, Any]] = [
        pair,
        {"prompt": "who?", "chosen": "x", "rejected": "y"},
        {**pair, "chosen": "c", "margin": 1.5},
        {**pair, "chosen": "b", "rejected": "c", "weight": 0.25, "criterion": "short"},
    ]
    rankings = prepared(place, entries, per_device_train_batch_size=1)
    assert rankings.criteria == ("reward", "short")
    (sequences, _) = rankings.train.examples.groups
    assert len(sequences) == 3
    first = rankings.train.judgements[0]
    assert [judgement.members for judgement in first] == [(0, 1), (2, 1), (1, 2)]
    assert [(judgement.criterion, judgement.weight, judgement.margin) for judgement in first] == [
        (0, 1.0, 0.0),
        (0, 1.0, 1.5),
        (1, 0.25, 0.0),
    ]
    for step in range(4):
        (pack,) = rankings.batches.take(step)
        assert len(pack.offsets) - 1 == len(rankings.train.examples.groups[pack.members[0]])
    with pytest.raises(
        DataError, match=r"3 sequences of row 1 have \d+ tokens together, more than a pack of 20: raise the pack length"
    ):
        prepared(place, entries, pack_length=20)


def test_the_whole_prompt_is_held_out(place):
    entries = [{"prompt": f"{n}?", "chosen": "a", "rejected": f"b{k}"} for n in range(40) for k in range(3)]
    write_rows(place / "a.jsonl", entries)
    config = config_at(place, held_out=0.3)
    rankings = phase.prepare_rankings(config, None, phase._base_shape(config), None, SilentDisplay())
    assert len(rankings.train) + len(rankings.held_out) == 40
    assert all(len(group) == 4 for side in (rankings.train, rankings.held_out) for group in side.examples.groups)
    assert not {row.asked() for row in rankings.train.examples.rows} & {
        row.asked() for row in rankings.held_out.examples.rows
    }


def test_what_was_taken_back_does_not_count(place, capsys):
    base = {"prompt": "what?", "responses": ["a", "b"], "schema_version": 1, "annotator": "me"}
    entries = [
        {**base, "ranks": [1, 2], "id": "one"},
        {**base, "ranks": [2, 1], "id": "two", "revises": "one"},
        {**base, "ranks": [1, 1], "id": "three", "status": "skipped"},
    ]
    rankings = prepared(place, entries)
    assert [judgement.ranks for judgement in rankings.train.judgements[0]] == [(2, 1)]
    tied = [{**base, "ranks": [1, 1], "id": "four"}, entries[0]]
    write_rows(place / "a.jsonl", tied)
    ingot.train_reward_model(config_at(place, held_out=0.0, max_steps=1))
    assert "1 of 2 rows left out: each ties all its responses" in capsys.readouterr().out
    assert len(prepared(place, tied, ties="half").train.judgements[0]) == 2


def test_implicit_prompts_and_the_same_answer_twice(place):
    rankings = prepared(
        place,
        [
            {"chosen": "one two three", "rejected": "one two four"},
            {"chosen": "five six", "rejected": "five nine"},
        ],
    )
    assert [len(group) for group in rankings.train.examples.groups] == [2, 2]
    rankings = prepared(place, [{"prompt": "q", "responses": ["a", "b", "b"], "ranks": [1, 2, 2]}])
    assert [len(group) for group in rankings.train.examples.groups] == [2]
    pairs = rankings.train.pairs()
    # Both of the pairs with the copy: they share the judgement's weight.
    assert pairs.weights.sum() == 1.0
    assert set(zip(pairs.better.tolist(), pairs.worse.tolist(), strict=True)) == {(0, 1)}


def test_ties_teach_nothing_or_that_both_are_even():
    made = [[Judgement(0, (0, 1, 2), (1, 1, 2))]]
    dropped, kept = pairs_of(made, [0]), pairs_of(made, [0], ties=True)
    assert dropped.labels.tolist() == [1, 1]
    assert dropped.weights.tolist() == [0.5, 0.5]
    assert sorted(kept.labels.tolist()) == [0.5, 1, 1]
    _, d_scores = loss_of(np.array([[2.0], [0.0], [-9.0]]), made, [0], ties="half")
    assert d_scores[0, 0] > 0.1 > -0.1 > d_scores[1, 0]


# ---- a run


def test_a_run_learns_and_its_scores_are_normal(place, capsys):
    write_rows(place / "a.jsonl", rows(100, ("helpful", "harmless")))
    config = config_at(place, max_steps=None, per_device_train_batch_size=8, held_out=0.2)
    result = ingot.train_reward_model(config)
    printed = capsys.readouterr().out
    assert "a head for each of helpful, harmless" in printed
    for name in ("helpful", "harmless"):
        assert last(result)[f"eval_accuracy/{name}"] > 0.9
        assert f"On {name}, the reward model orders" in printed
    first = next(line for line in result.history if "eval_accuracy" in line)
    assert first["step"] == 0
    assert abs(first["eval_accuracy"] - 0.5) < 0.2
    assert {"accuracy", "margin", "min_reward", "mean_reward", "max_reward"} <= set(last(result, "margin"))
    model = RewardModel.load(result.output, threads=1)
    assert model.criteria == ("helpful", "harmless")
    rankings = phase.prepare_rankings(config, None, phase._base_shape(config), None, SilentDisplay())
    scores = model.score_ids_each([each.ids for each in rankings.train.sequences])
    np.testing.assert_allclose(scores.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(scores.std(axis=0), 1, atol=1e-5)
    words = sorted(WORDS, key=worth)
    helpful, harmless = model.score_each([ask("1?")] * 2, [words[0], words[-1]]).T
    assert helpful[0] < helpful[1]
    assert harmless[0] > harmless[1]
    verdict = read_verdict(result.output)
    assert verdict is not None
    assert verdict.passed
    assert verdict.figures["accuracy/helpful"] > 0.9
    samples = [json.loads(line) for line in (result.output / "samples.jsonl").read_text().splitlines()]
    assert {"prompt", "responses", "scores", "judgements", "step"} == set(samples[-1])
    card = (result.output / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "ingot reward" in card


def test_transformers_opens_the_run_and_agrees(place):
    result = ingot.train_reward_model(config_at(place), quiet=True)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(result.output).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.output)
    ours = RewardModel.load(result.output, threads=1)
    messages = [*ask("7?"), {"role": "assistant", "content": "aab"}]
    ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    # The template writes a new line after the last end of turn; the score is read before it.
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor([ids[:-1]])).logits.numpy()
    assert theirs.config.num_labels == 1
    np.testing.assert_allclose(ours.score([ask("7?")], ["aab"]), logits[0] + theirs.config.score_bias, atol=1e-4)


def test_both_backends_learn_the_same(place):
    native = ingot.train_reward_model(config_at(place), quiet=True)
    other = config_at(place, backend="torch", device="cpu", output=str(place / "torch"))
    twin = ingot.train_reward_model(other, quiet=True)
    # Not the mean reward: the loss leaves it open, so that it follows rounding.
    for name in ("eval_loss", "eval_margin"):
        assert last(twin)[name] == pytest.approx(last(native)[name], abs=5e-4)
    words = [RewardModel.load(each.output).score([ask("1?")] * 2, ["aa", "b"]) for each in (native, twin)]
    np.testing.assert_allclose(words[0], words[1], atol=2e-3)


@pytest.mark.parametrize("loss_type", ["plackett_luce", "best_of", "rating"])
def test_the_other_losses_learn_too(place, loss_type):
    entries = rows(150)
    for row in entries:
        row["ratings"] = [1 + 2 * worth(word) for word in row["responses"]]
    write_rows(place / "a.jsonl", entries)
    config = config_at(place, loss_type=loss_type, max_steps=None, per_device_train_batch_size=8, held_out=0.2)
    result = ingot.train_reward_model(config, quiet=True)
    assert last(result)["eval_accuracy"] > 0.9
    assert last(result)["eval_loss"] < 0.7 * next(line["eval_loss"] for line in result.history if "eval_loss" in line)


def test_zero_heads_start_without_an_opinion(place):
    result = ingot.train_reward_model(config_at(place, head_init="zero", max_steps=1), quiet=True)
    first = result.history[0]
    assert first["eval_reward_std"] == 0.0
    assert first["eval_accuracy"] == 0.5
    assert first["eval_loss"] == pytest.approx(np.log(2))


def test_criteria_can_be_picked_and_ordered(place, capsys):
    write_rows(place / "a.jsonl", rows(30, ("helpful", "harmless")))
    assert prepared(place, rows(9, ("helpful", "harmless")), criteria=("harmless", "helpful")).criteria == (
        "harmless",
        "helpful",
    )
    write_rows(place / "a.jsonl", rows(30, ("helpful", "harmless")))
    result = ingot.train_reward_model(config_at(place, criteria=("harmless",)))
    assert RewardModel.load(result.output).criteria == ("harmless",)
    assert "left out 30 rows about helpful" in capsys.readouterr().out
    config = json.loads((result.output / "run.json").read_bytes())["config"]
    assert RewardConfig.from_dict(config).criteria == ("harmless",)


def test_rows_that_are_too_long_are_counted_not_cut(place, capsys):
    long = {"prompt": ask("long?"), "responses": ["a" * 90, "b"], "ranks": [1, 2]}
    write_rows(place / "a.jsonl", [*rows(40), long])
    result = ingot.train_reward_model(config_at(place, max_steps=1))
    assert (
        "1 of 41 rows have a response that makes more than 96 tokens with its prompt and are left out whole"
        in capsys.readouterr().out
    )
    facts = json.loads((result.output / "run.json").read_bytes())["data"]
    assert (facts["num_rows"], facts["num_too_long"]) == (41, 1)


# ---- killed and resumed


def snapshot(folder: Path) -> dict[str, Any]:
    names = ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "samples.jsonl"]
    names += ["config.json", "README.md", "verdict.json"]
    names += ["checkpoint-10/model.safetensors", "checkpoint-10/optimizer.safetensors"]
    taken: dict[str, Any] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    taken["metrics"] = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
    taken["folder"] = sorted(entry.name for entry in folder.iterdir() if entry.name != "run.lock")
    return taken


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and forkserver are of Unix")
def test_killed_and_resumed_it_ends_with_the_same_bits(tmp_path):
    write_policy(tmp_path / "policy")
    write_rows(tmp_path / "a.jsonl", rows(30, ("helpful", "harmless")))
    write_rows(tmp_path / "b.jsonl", rows(50, ("helpful",))[30:])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killable_reward"])

    def run(folder: Path, kill_at: int | str | None = None, log: Path | None = None) -> int | None:
        process = context.Process(target=child, args=(folder, kill_at, log))
        process.start()
        process.join(600)
        return process.exitcode

    (tmp_path / "whole").mkdir()
    assert run(tmp_path / "whole" / "run", log=tmp_path / "points") == 0
    expected = snapshot(tmp_path / "whole" / "run")
    points = (tmp_path / "points").read_text().split("\n")
    # In the first seconds, where the tokenizer is saved, between checkpoints, and where the verdict is written.
    first_save = next(n for n, name in enumerate(points) if name.startswith("optimizer"))
    tokenizer = next(n for n, name in enumerate(points) if name.startswith("tokenizer.json"))
    (tmp_path / "killed").mkdir()
    folder = tmp_path / "killed" / "run"
    for kill_at in (tokenizer, first_save + 12, "verdict"):
        assert run(folder, kill_at) == -9, "the run was over before it was killed"
    assert run(folder) == 0
    assert settings(folder).ties == "half"
    assert snapshot(folder) == expected


# ---- what it is worth


def pairs(better: list[int], worse: list[int], groups: list[int], labels: list[float] | None = None) -> Pairs:
    num = len(better)
    return Pairs(
        np.array(better),
        np.array(worse),
        np.zeros(num, np.int64),
        np.array(labels or [1.0] * num),
        np.ones(num),
        np.zeros(num),
        np.array(groups),
    )


def test_figures_against_formulas():
    scores = np.array([[2.0], [1.0], [0.0], [0.0], [3.0], [-1.0]])
    lengths = np.array([10, 8, 3, 3, 1, 10])
    made = pairs([0, 1, 2, 5], [1, 2, 3, 4], [0, 0, 1, 2], [1.0, 0.75, 1.0, 1.0])
    found = pair_figures(scores, lengths, made, ("reward",))
    margins = np.array([1.0, 1.0, 0.0, -4.0])
    assert hits_of(scores, made).tolist() == [1.0, 0.75, 0.5, 0.0]
    assert found["accuracy"] == pytest.approx(2.25 / 4)
    assert found["margin"] == pytest.approx(margins.mean())
    assert found["margin_std"] == pytest.approx(margins.std())
    s = 1 / (1 + np.exp(-margins))
    nll = -np.log(s) * [1, 0.75, 1, 1] - np.log(1 - s) * [0, 0.25, 0, 0]
    assert found["nll"] == pytest.approx(nll.mean())
    assert found["length_correlation"] == pytest.approx(np.corrcoef(scores[:, 0], lengths)[0, 1])
    assert (found["accuracy_when_longer"], found["accuracy_when_much_longer"]) == (1.0, pytest.approx(0.375))
    assert found["accuracy_when_similar"] == 0.5
    assert "length_slope" not in found
    assert "accuracy_when_shorter" not in found
    assert (found["reward_std"], found["min_reward"], found["max_reward"]) == (pytest.approx(scores.std()), -1.0, 3.0)
    assert length_hits(lengths, made).tolist() == [1.0, 0.75, 0.5, 1.0]


def test_a_model_that_learnt_length_is_found_out():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 50, 400)
    good = rng.normal(size=400)
    first, second = np.arange(0, 400, 2), np.arange(1, 400, 2)
    better = np.where(good[first] > good[second], first, second)
    made = pairs(better.tolist(), (first + second - better).tolist(), list(range(200)))
    by_length = pair_figures(lengths[:, None] / 10.0, lengths, made, ("reward",))
    assert by_length["length_slope"] == 1.0
    assert by_length["length_correlation"] == pytest.approx(1.0)
    knowing = pair_figures(good[:, None], lengths, made, ("reward",))
    assert knowing["accuracy"] == 1.0
    assert knowing["length_slope"] == 0.0

    def alarms(figures: dict[str, float], step: int) -> set[str]:
        watch = Alarms(phase._rules(10))
        return {
            name for name, _ in watch.check({"step": step, **{f"eval_{key}": value for key, value in figures.items()}})
        }

    assert {"accuracy by length", "score follows length"} <= alarms(by_length, 9)
    assert alarms(by_length, 2) == set()
    assert not {"accuracy by length", "score follows length"} & alarms(knowing, 9)
    assert "equal scores" in alarms(pair_figures(np.zeros((400, 1)), lengths, made, ("reward",)), 9)


def test_people_agree_as_the_agreement_report_says():
    rng = np.random.default_rng(3)
    entries = []
    for n in range(12):
        good = rng.normal(size=3)
        for person in ("ada", "bob", "eve", "ada"):
            noisy = np.round(good + rng.normal(size=3), 0)
            levels = sorted(set(noisy), reverse=True)
            entries.append(
                {
                    "prompt": f"{n}",
                    "responses": ["a", "b", "c"],
                    "ranks": [levels.index(each) + 1 for each in noisy],
                    "annotator": person,
                    "group_id": str(n),
                }
            )
    made = [
        tuple(
            Judgement(0, (0, 1, 2), tuple(row["ranks"]), annotator=row["annotator"])  # type: ignore[arg-type]
            for row in entries
            if row["prompt"] == str(n)
        )
        for n in range(12)
    ]
    empty = Examples((), (), 0, 0)
    found = people_agree([Ranked(empty, tuple(made[:5])), Ranked(empty, tuple(made[5:]))])
    expected = measure_agreement([from_row(row, "here") for row in entries], num_draws=10).strict_agreement
    assert found.num_cases == expected.count
    assert found.value == pytest.approx(expected.value)
    assert people_agree([Ranked(empty, ((made[0][0],),))]).num_cases == 0


def test_the_bag_of_words_is_the_best_one():
    """Against the same objective minimised by torch."""
    rng = np.random.default_rng(4)
    sequences = [Encoded(rng.integers(0, 6, 12).astype(np.int32), np.ones(12, bool), (11,)) for _ in range(60)]
    counts = np.array([np.bincount(each.ids, minlength=6) for each in sequences])
    better = np.where(counts[:30, 2] + rng.normal(size=30) > counts[30:, 2], np.arange(30), np.arange(30, 60))
    made = pairs(better.tolist(), (30 + 2 * np.arange(30) - better).tolist(), list(range(30)))
    words = BagOfWords(sequences, made)
    features = np.log1p(counts)
    features = torch.tensor(features / np.sqrt((features**2).mean(axis=0)))
    weights = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        scores = features @ weights
        margins = scores[made.better] - scores[made.worse]
        loss = -torch.nn.functional.logsigmoid(margins).sum() + weights @ weights / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    np.testing.assert_allclose(words.scores(sequences), (features @ weights).detach().numpy(), atol=1e-3)
    unknown = Encoded(np.array([9], np.int32), np.ones(1, bool), (0,))
    assert words.scores([unknown]).tolist() == [0.0]


def test_intervals_of_means():
    # Deviation of (1, 0, 0, 0) is 0.5, of its mean 0.25.
    found = mean_of([1.0, 0.0, 0.0, 0.0])
    assert (found.value, found.error) == (0.25, 0.25)
    assert (found.low, found.high) == pytest.approx((0.25 - 1.959964 * 0.25, 0.25 + 1.959964 * 0.25))
    assert found.margin == pytest.approx(1.959964 * 0.25)
    one, none = mean_of([3.0]), mean_of([])
    assert (one.value, one.low, one.high) == (3.0, -math.inf, math.inf)
    assert math.isnan(none.value)
    assert (none.low, none.high) == (-math.inf, math.inf)


def test_intervals():
    # Wilson's for 8 of 10, as published tables have it.
    np.testing.assert_allclose(wilson(0.8, 10), (0.4902, 0.9433), atol=1e-4)
    few = share_of([1.0] * 8 + [0.0] * 2, range(10))
    assert (few.low, few.high) == wilson(0.8, few.num_prompts * 0.9)
    rng = np.random.default_rng(0)
    hits = (rng.random(400) < 0.6).astype(float)
    plain = share_of(hits, range(400))
    half = 1.959964 * hits.std(ddof=1) / 20
    assert (plain.low, plain.high) == (pytest.approx(hits.mean() - half), pytest.approx(hits.mean() + half))
    # Every case ten times over says nothing more.
    again = share_of(np.repeat(hits, 10), np.repeat(np.arange(400), 10))
    assert (again.low, again.high) == (pytest.approx(plain.low), pytest.approx(plain.high))
    drawn = bootstrap_share(np.repeat(hits, 10), np.repeat(np.arange(400), 10))
    assert (drawn.low, drawn.high) == (pytest.approx(plain.low, abs=0.01), pytest.approx(plain.high, abs=0.01))
    certain = share_of([1.0] * 50, range(50))
    assert certain.high == 1.0
    assert 0.9 < certain.low < 1.0
    assert share_of([], []).num_cases == 0
    covered = 0
    for _ in range(400):
        chance = rng.beta(3, 2, 80)
        drawn_hits = (rng.random((80, 4)) < chance[:, None]).astype(float)
        found = share_of(drawn_hits.ravel(), np.repeat(np.arange(80), 4))
        covered += found.low <= 0.6 <= found.high
    assert 0.92 <= covered / 400 <= 0.98


def share(value: float, low: float, high: float, num: int = 100) -> Any:
    return dataclasses.replace(share_of([1.0], [0]), value=value, low=low, high=high, num_cases=num, num_prompts=num)


def test_the_verdict_says_what_it_is_compared_with():
    people, nobody = share(0.76, 0.72, 0.8, 500), share_of([], [])
    fair = Comparison(
        "", share(0.71, 0.68, 0.74, 2000), share(0.58, 0.5, 0.6), share(0.42, 0.4, 0.5), share(0.63, 0.6, 0.66)
    )
    verdict = verdict_of([fair], people)
    assert verdict.passed
    assert "The reward model orders 71 % of 2,000 held-out pairs as people did (95 % interval 68 to 74)" in verdict.text
    assert "a rule that prefers the longer answer gets 58 %, a bag of words 63 %" in verdict.text
    assert "People agree with each other on 76 %" in verdict.text
    assert verdict.figures["accuracy"] == 0.71
    assert not verdict_of([dataclasses.replace(fair, model=share(0.71, 0.49, 0.9))], people).passed
    short = dataclasses.replace(fair, shorter=share(0.72, 0.7, 0.74), longer=share(0.28, 0.2, 0.3))
    assert not verdict_of([short], people).passed
    assert "prefers the shorter answer gets 72 %" in verdict_of([short], people).text
    assert not verdict_of([fair, dataclasses.replace(short, name="b")], people).passed
    close = dataclasses.replace(fair, longer=share(0.7051, 0.6, 0.8), model=share(0.7071, 0.6, 0.8))
    text = verdict_of([close], people).text
    assert "orders 70.7 %" in text
    assert "longer answer gets 70.5 %" in text
    assert "more than people agree on" in verdict_of([fair], share(0.6, 0.55, 0.65)).text
    unknown = verdict_of([Comparison("", nobody, nobody, nobody, nobody)], nobody)
    assert not unknown.passed
    assert "--held-out" in unknown.text
    assert "How far people agree with each other is not known" in unknown.text


def test_judgements_without_sense_do_not_pass(place):
    rng = np.random.default_rng(0)
    entries = rows(150)
    for row in entries:
        row["ranks"] = (rng.permutation(3) + 1).tolist()
    write_rows(place / "a.jsonl", entries)
    result = ingot.train_reward_model(config_at(place, held_out=0.3, max_steps=None), quiet=True)
    verdict = read_verdict(result.output)
    assert verdict is not None
    assert not verdict.passed
    with pytest.raises(ConfigError, match="is a model that scores already"):
        ingot.train_reward_model(config_at(place, model=str(result.output), output=str(place / "again")))


def test_a_policy_that_did_not_pass_its_gate_needs_force(place):
    write_verdict(
        place / "policy", Verdict(passed=False, sentences=("It writes nothing.",), figures={}, advice="Train it.")
    )
    with pytest.raises(RunError, match=r"policy: did not pass its gate: It writes nothing\. Train it\. \(--force"):
        ingot.train_reward_model(config_at(place), quiet=True)
    assert ingot.train_reward_model(config_at(place, max_steps=1), force=True, quiet=True).output.exists()


# ---- the command line, and bad input


def test_on_the_command_line(place, capsys):
    run = str(place / "run")
    arguments = ["reward", "--model", str(place / "policy"), "--data", str(place / "a.jsonl"), "--output", run]
    assert main([*arguments, "--dry-run"]) == 0
    assert not Path(run).exists()
    capsys.readouterr()
    assert main([*arguments, "--max-steps", "3", "--learning-rate", "1e-2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["steps"], facts["output"]) == (3, run)
    assert {"passed", "verdict", "accuracy", "accuracy_low", "accuracy_longer_wins"} <= set(facts)
    assert main(["reward", "--resume", run, "--max-steps", "5"]) == 0
    assert f"resumed from {run}/checkpoint-3" in capsys.readouterr().out
    assert last(ingot.resume(run, max_steps=6, quiet=True))["step"] == 6
    assert main(["reward", "--config", f"{run}/reward.toml", "--output", run + "2", "--num-train-epochs", "1"]) == 0
    assert main(["sft", "--resume", run]) == 1
    assert f"a run of ingot reward; go on with it: ingot reward --resume {run}" in capsys.readouterr().err


RANKED = {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2]}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("entries", "changes", "message"),
    [
        ([{"prompt": "a"}] * 9, {}, r"a\.jsonl, row 1: is prompt-only: it holds no answer; give rows with answers"),
        (
            [{"prompt": "a", "completion": "b"}],
            {},
            r"a\.jsonl, row 1: is of kind prompt-completion, which compares nothing",
        ),
        ([{**PAIR, "rejected": "b"}], {}, r'a\.jsonl, row 1: field "rejected" equals field "chosen"'),
        ([{**RANKED, "ranks": [1]}], {}, r'a\.jsonl, row 1: field "ranks" has 1 entries, but field "responses" has 2'),
        ([{**RANKED, "ranks": [1, 1]}] * 2, {}, r"a\.jsonl: no row prefers anything: each ties its responses"),
        ([{**RANKED, "schema_version": 9}], {}, r'a\.jsonl, row 1: field "schema_version" is 9'),
        (
            [{"prompt": "a", "chosen": "b" * 200, "rejected": "c"}],
            {},
            r"a\.jsonl: none of 1 rows fits into max_length 96",
        ),
        ([RANKED] * 9, {}, r"with 1 different prompts are too few to hold 10 % of the prompts out"),
        ([{**PAIR, "soft_label": 1.5}], {}, r'row 1: field "soft_label" is 1\.5; give a probability'),
        ([{**PAIR, "criterion": 3}], {}, r'row 1: field "criterion" is 3; give a string'),
        (
            [{**PAIR, "margin": 2.0}],
            {"loss_type": "best_of"},
            r'row 1: field "margin" has no use in loss_type best_of; take --loss-type pairwise',
        ),
        ([PAIR], {"loss_type": "rating"}, r"row 1: is a pair, but loss_type rating learns from ratings"),
        ([RANKED], {"loss_type": "rating"}, r"row 1: has no ratings, which loss_type rating learns from"),
        (
            [{**RANKED, "ratings": [1]}],
            {"loss_type": "rating"},
            r'row 1: field "ratings" is no list with an entry for each',
        ),
        (
            [{**RANKED, "ratings": [1, "x"]}],
            {"loss_type": "rating"},
            r"row 1: field \"ratings\[1\]\" is 'x'; give a number or null",
        ),
        (
            [{**RANKED, "criterion": "helpful"}],
            {"criteria": ("kind",)},
            r"a\.jsonl: no row is about 'kind'; criteria there: helpful",
        ),
        (None, {"model": "nowhere"}, r"nowhere: no such folder"),
        (None, {"model": ""}, r"no model to start from: give --model"),
        (None, {"data": ()}, r"no judgements to learn from: give --data"),
        (None, {"pack_length": 50}, r"tokens together, more than a pack of 50: raise the pack length"),
    ],
)
def test_bad_input_is_one_clear_line(place, entries, changes, message):
    if entries is not None:
        write_rows(place / "a.jsonl", entries)
    with pytest.raises((ConfigError, DataError, RunError, ingot.CheckpointError), match=message) as caught:
        ingot.train_reward_model(config_at(place, **changes), quiet=True)
    assert "\n" not in str(caught.value)


def test_settings_that_cannot_be_are_refused():
    for changes, message in (
        ({"loss_type": "best_of", "ties": "half"}, "ties has no effect on loss_type best_of: leave it drop"),
        ({"loss_type": "rating", "center_rewards_coefficient": 0.1}, "center_rewards_coefficient has no effect"),
        ({"criteria": ("a", "a")}, "criteria names one twice"),
        ({"center_rewards_coefficient": -1.0}, "center_rewards_coefficient must be 0 or more"),
        ({"max_steps": 3, "num_train_epochs": 1}, "give one of them"),
    ):
        with pytest.raises(ConfigError, match=message):
            RewardConfig(**changes)


def test_a_base_model_without_a_template_is_told_what_to_do(place):
    Model(ModelConfig.llama(vocab_size=257, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save(
        place / "base"
    )
    ingot.Tokenizer.bytes_only().with_special_tokens(["<|endoftext|>"]).save(place / "base")
    with pytest.raises(
        DataError, match=r"base: the tokenizer has no special token .*train with ingot sft, which adds them"
    ):
        ingot.train_reward_model(config_at(place, model=str(place / "base")), quiet=True)


def test_the_rows_of_a_resumed_run_must_be_the_same(place):
    result = ingot.train_reward_model(config_at(place), quiet=True)
    entries = rows()
    entries[3]["ranks"] = entries[4]["ranks"]
    entries[4]["ranks"] = ranks_of(entries[4]["responses"], -1)
    write_rows(place / "a.jsonl", entries)
    with pytest.raises(RunError, match=r"a\.jsonl: changed since this run began"):
        ingot.resume(result.output, max_steps=9, quiet=True)
