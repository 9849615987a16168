"""Learning from preferences: what the gradient is made of, what is precomputed, what a run leaves behind, what it says to bad input."""

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
from hypothesis import given
from hypothesis import strategies as st

import ingot
from ingot.cli import main
from ingot.configs import DPOConfig
from ingot.configs.dpo import SMOOTHED, LossType
from ingot.data.chat import ChatEncoder, ChatTemplate
from ingot.data.examples import load_examples
from ingot.data.rows import parse_row
from ingot.errors import CheckpointError, ConfigError, DataError, RunError
from ingot.inference.intervals import wilson
from ingot.losses import preference as losses
from ingot.losses.packed import count_by_sequence, sum_by_sequence
from ingot.losses.preference import KTO_LOSS_TYPES, LOSS_TYPES
from ingot.models import load_model
from ingot.models.reference import reference_of
from ingot.tokenizer import Tokenizer
from ingot.training import dpo as phase
from ingot.training import reference_logprobs as reference_file
from ingot.training.alarms import Alarms
from ingot.training.preference_checks import pair_accuracy, rules, separation, verdict_of
from ingot.training.preferences import comparisons_of, mismatched, prepare_preferences, verdicts_of
from ingot.training.progress import SilentDisplay
from ingot.training.reference_logprobs import REFERENCE_FILE, ReferenceLogprobs, sequence_logprobs
from ingot.training.verdicts import Verdict, read_verdict, write_verdict
from killable_dpo import child, pairs, rankings, verdicts, write_chat_model, write_rows

ALL_LOSSES = sorted(losses_named for losses_named in LossType.__args__ if losses_named != "sft")  # type: ignore[attr-defined]
CONFIG = DPOConfig(max_steps=4, sample_tokens=0, learning_rate=1e-2, per_device_train_batch_size=8, threads=1)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model that knows chat, pairs, ranked lists and verdicts."""
    write_chat_model(tmp_path / "base")
    write_rows(tmp_path / "pairs.jsonl", pairs())
    write_rows(tmp_path / "ranked.jsonl", rankings())
    write_rows(tmp_path / "verdicts.jsonl", verdicts())
    return tmp_path


def config_at(place: Path, **changes: Any) -> DPOConfig:
    fields = {"model": str(place / "base"), "data": (str(place / "pairs.jsonl"),), "output": str(place / "run")}
    return dataclasses.replace(CONFIG, **{**fields, **changes})


def changes_of(loss: str) -> dict[str, Any]:
    return {"loss_type": (loss,), "label_smoothing": 0.1 if loss == "exo_pair" else 0.0}


def prepared(place: Path, **changes: Any) -> Any:
    config = config_at(place, **changes)
    model = load_model(place / "base", threads=1)
    return config, model, prepare_preferences(config, None, model.config, None, SilentDisplay())


def reference(examples: Any, model: Any, pack_length: int = 4096) -> ReferenceLogprobs:
    found = ReferenceLogprobs(examples)
    found.score(model, pack_length, lambda tokens: None)
    return found


# ---- what is compared


def test_pairs_lists_and_verdicts_as_numbered_sequences():
    ranked = {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [2, 1, 2]}
    rows = [parse_row({"prompt": "p", "chosen": "a", "rejected": "b", "weight": 3}), parse_row(ranked)]
    found = comparisons_of(rows, [0, 2])
    assert sorted(zip(found.chosen, found.rejected, found.weights, found.rows, strict=True)) == [
        (0, 1, 3.0, 0),
        (3, 2, 0.5, 1),
        (3, 4, 0.5, 1),
    ]
    single = parse_row({"prompt": "p", "completion": "a", "label": False})
    assert not len(comparisons_of([single], [0]))
    apart = verdicts_of([*rows, single], [0, 2, 5])
    assert sorted(zip(apart.answers, apart.labels, apart.weights, strict=True)) == [
        (0, True, 3.0),
        (1, False, 3.0),
        (2, False, 0.5),
        (3, True, 0.5),
        (3, True, 0.5),
        (4, False, 0.5),
        (5, False, 1.0),
    ]


@given(st.lists(st.lists(st.integers(1, 4), min_size=2, max_size=5), min_size=1, max_size=4))
def test_lists_have_the_pairs_that_they_are_written_as(rankings):
    """Whatever the ranks and ties: the same pairs, by number, as the preference rows that a list is exported to."""
    rows, expected, first = [], [], [0]
    for number, ranks in enumerate(rankings):
        ranks = [rank - min(ranks) + 1 for rank in ranks]
        responses = [f"answer {place}" for place in range(len(ranks))]
        row = parse_row({"prompt": f"{number}", "responses": responses, "ranks": ranks})
        for pair in row.preferences():
            better, worse = pair.extra["response_numbers"]
            expected.append((first[-1] + better, first[-1] + worse, pair.weight, number))
        rows.append(row)
        first.append(first[-1] + len(ranks))
    found = comparisons_of(rows, first[:-1])
    assert list(zip(found.chosen, found.rejected, found.weights, found.rows, strict=True)) == expected
    apart = verdicts_of(rows, first[:-1])
    assert apart.weights[apart.labels].sum() == pytest.approx(apart.weights[~apart.labels].sum())
    assert found.weights.sum() == pytest.approx(len({number for *_, number in expected}))


def test_mismatched_answers_are_of_another_prompt_and_short_enough(place):
    _, _, preferences = prepared(place, loss_type=("kto",), held_out=0.2)
    examples = preferences.train
    for group, other in zip(examples.groups, preferences.train_mismatched.groups, strict=True):
        own = [sequence.ids[: int(np.argmax(sequence.mask))].tolist() for sequence in group]
        for sequence, prompt in zip(other, own, strict=True):
            assert sequence.ids[: int(np.argmax(sequence.mask))].tolist() == prompt
            completion = sequence.ids[len(prompt) :].tolist()
            assert any(
                completion == each.ids[int(np.argmax(each.mask)) :].tolist() for g in examples.groups for each in g
            )
    # Where all ask the same, or nothing fits, there is none.
    same = load_examples([{"prompt": "p", "completion": "a", "label": True}] * 3, preferences.encoder, max_length=96)
    assert all(group == () for group in mismatched(same, 96).groups)
    assert all(group == () for group in mismatched(examples, 5).groups)


# ---- the gradient of a step


@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_every_loss_has_one_gradient_however_it_is_packed(place, loss):
    """And it is the slope of the loss: along it, a finite difference has its squared length. Covers both passes of coupled losses."""
    data = "verdicts.jsonl" if loss in KTO_LOSS_TYPES else "pairs.jsonl"
    write_chat_model(place / "base", initializer_range=0.2)
    names = {"data": (str(place / data),), **changes_of(loss)}
    found = []
    for pack_length in (4096, 150):
        config, model, preferences = prepared(place, pack_length=pack_length, **names)
        packs = preferences.batches.take(0)
        assert (len(packs) > 1) == (pack_length == 150)
        moved = reference_of(model)
        rng = np.random.default_rng(3)
        moved.load_state(
            {k: v + 0.05 * rng.standard_normal(v.shape).astype(np.float32) for k, v in model.state().items()}
        )
        ref, partners = reference(preferences.train, moved), reference(preferences.train_mismatched, moved)
        ref_or_none = None if config.reference_free else ref

        def step(model=model, config=config, preferences=preferences, packs=packs, ref=ref_or_none, partners=partners):
            model.zero_grad()
            return phase._backward(model, config, preferences, packs, ref, partners)

        metrics = step()
        gradients = {name: np.array(value) for name, value in model.gradients.items()}
        found.append((metrics, gradients))
        if pack_length == 4096:
            continue
        # z is a constant of the loss of kto and bco, but not of its value: their slope is checked in the losses' tests.
        if loss in ("kto", "bco"):
            continue
        size = np.sqrt(sum(float((grad.astype(np.float64) ** 2).sum()) for grad in gradients.values()))
        before, values = model.state(), []
        for sign in (1, -1):
            model.load_state({name: before[name] + np.float32(sign * 1e-3 / size) * gradients[name] for name in before})
            values.append(step()["loss"])
        assert (values[0] - values[1]) / 2e-3 == pytest.approx(size, rel=2e-2)
    (whole, grads), (parts, same) = found
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    for name, grad in grads.items():
        np.testing.assert_allclose(same[name], grad, atol=1e-5 * max(1.0, np.abs(grad).max()), err_msg=name)


def test_a_ranked_list_is_its_weighted_pairs(place):
    """Three answers run once have the loss and gradient of their two pairs, each with half the weight."""
    lists, written = rankings(8), []
    for entry in lists:
        written += [pair.columns() for pair in parse_row(entry).preferences()]
    write_rows(place / "lists.jsonl", lists)
    write_rows(place / "written.jsonl", written)
    found = []
    for name, size in (("lists", 8), ("written", 16)):
        config, model, preferences = prepared(
            place, data=(str(place / f"{name}.jsonl"),), held_out=0.0, per_device_train_batch_size=size
        )
        model.zero_grad()
        ref = reference(preferences.train, write_other(place))
        metrics = phase._backward(
            model, config, preferences, preferences.batches.take(0), ref, reference(preferences.train_mismatched, model)
        )
        found.append((metrics, {key: np.array(value) for key, value in model.gradients.items()}))
    (first, grads), (second, same) = found
    for name in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "lengths/rejected"):
        assert first[name] == pytest.approx(second[name], rel=1e-5, abs=1e-7), name
    for name, grad in grads.items():
        np.testing.assert_allclose(same[name], grad, atol=1e-6, err_msg=name)


def write_other(place: Path) -> Any:
    return load_model(write_chat_model(place / "other", seed=9), threads=1)


def test_the_sft_term_is_the_mean_loss_of_the_chosen_tokens(place):
    config, model, preferences = prepared(place, loss_type=("sigmoid", "sft"), loss_weights=(1.0, 0.25))
    packs = preferences.batches.take(0)
    ref = reference(preferences.train, model)
    metrics = phase._backward(model, config, preferences, packs, ref, reference(preferences.train_mismatched, model))
    total = tokens = 0.0
    for pack in packs:
        chosen = sequence_logprobs(model, pack)[0::2]
        total += float(chosen.sum())
        tokens += float(count_by_sequence(pack.targets, pack.offsets)[0::2].sum())
    assert metrics["nll_loss"] == pytest.approx(-total / tokens, rel=1e-9)
    assert metrics["losses/sigmoid"] == pytest.approx(np.log(2))
    assert metrics["loss"] == pytest.approx(np.log(2) + 0.25 * metrics["nll_loss"])


# ---- the reference


def test_precomputed_log_probabilities_are_those_of_the_moment_and_stay(place):
    """Whatever shares a pack; and training the policy does not move its reference by a bit."""
    config, model, preferences = prepared(place)
    shared = reference_of(model)
    ref = reference(preferences.train, shared, pack_length=200)
    again = reference(preferences.train, shared)
    np.testing.assert_array_equal(ref.values, again.values)
    for step in range(10):
        packs = preferences.batches.take(step)
        if step == 0:
            for pack in packs:
                _, out = model.forward(pack.tokens, pack.offsets, pack.targets)
                now = sum_by_sequence(out.logprobs, pack.targets, pack.offsets)
                np.testing.assert_array_equal(ref.of(pack.members), now)
        model.zero_grad()
        phase._backward(model, config, preferences, packs, ref, reference(preferences.train_mismatched, shared))
        model.step(1e-2)
    np.testing.assert_array_equal(reference(preferences.train, shared).values, ref.values)
    assert (reference(preferences.train, model).values != ref.values).all()


class Counting(SilentDisplay):
    """Keeps what is said, and counts the passes of the reference."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.passes = 0

    def say(self, text: str) -> None:
        self.said.append(text)

    def work(self, text: str, done: int, total: int) -> None:
        self.passes += text == "reference log-probabilities"


def test_they_are_kept_with_the_run_and_belong_to_weights_and_rows(place, monkeypatch):
    _, model, preferences = prepared(place)
    sets = {"train": preferences.train, "held_out": preferences.held_out}

    def get(model=model, sets=sets, template="t"):
        display = Counting()
        found = reference_file.reference_logprobs(
            place, model, sets, hashes={"template_hash": template}, pack_length=300, display=display
        )
        return found, display

    first, display = get()
    assert display.passes > 2
    again, display = get()
    assert display.passes == 0
    assert not display.said
    np.testing.assert_array_equal(first["train"].values, again["train"].values)
    for changed in ({"template": "other"}, {"model": write_other(place)}, {"sets": {"train": preferences.held_out}}):
        get()
        _, display = get(**changed)
        assert "computed again" in display.said[0]
        assert display.passes
    (place / REFERENCE_FILE).unlink()
    # Interrupted half-way, it keeps what it has.
    calls = iter(range(99))

    def interrupted(model, pack):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return sequence_logprobs(model, pack)

    monkeypatch.setattr(reference_file, "sequence_logprobs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get()
    monkeypatch.setattr(reference_file, "sequence_logprobs", sequence_logprobs)
    rest, display = get()
    assert 0 < display.passes < len(first["train"].unknown()) + 99
    np.testing.assert_array_equal(rest["train"].values, first["train"].values)
    (place / REFERENCE_FILE).write_bytes(b"torn")
    np.testing.assert_array_equal(get()[0]["held_out"].values, first["held_out"].values)


def test_another_reference_model_is_what_it_is_compared_with(place):
    write_other(place)
    result = ingot.dpo(config_at(place, reference_model=str(place / "other"), sample_tokens=4, max_steps=1), quiet=True)
    start = result.history[0]
    assert start["eval_rewards/margins"] != 0.0
    assert start["eval_kl"] != 0.0
    write_rows(place / "x.jsonl", pairs(10))
    tokenizer = Tokenizer.train(iter(["low lower"] * 9), vocab_size=258).with_special_tokens(["<|endoftext|>"])
    tokenizer.save(place / "other")
    with pytest.raises(ConfigError, match="has another tokenizer"):
        ingot.dpo(config_at(place, reference_model=str(place / "other"), output=str(place / "b")), quiet=True)
    with pytest.raises(ConfigError, match="loss_type orpo has no reference"):
        config_at(place, reference_model="x", loss_type=("orpo",))


# ---- runs


def test_it_learns_to_prefer_and_leaves_a_complete_folder(place, capsys):
    config = config_at(place, max_steps=60, eval_steps=30, sample_tokens=6, held_out=0.3, sample_prompts=5)
    result = ingot.dpo(config)
    out = capsys.readouterr().out
    assert re.search(
        r"^step 60  held-out loss \d\.\d+  accuracy 100\.0 %  margin \d+\.\d+  KL -?\d+\.\d+  answers ended \d+ %$",
        out,
        re.M,
    )
    assert re.search(
        r"^verdict   (passed|did not pass): The model's implicit rewards order 100\.0 % of held-out pairs", out, re.M
    )
    lines = [line for line in result.history if "eval_loss" in line]
    assert [line["step"] for line in lines] == [0, 30, 60]
    assert lines[0]["eval_loss"] == pytest.approx(np.log(2))
    assert lines[0]["eval_accuracy"] == 0.5
    assert lines[0]["eval_kl"] == 0.0
    assert lines[-1]["eval_kl"] != 0.0
    assert lines[-1]["eval_loss"] < 0.3
    trl = {
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "entropy",
    }
    ours = {"rewards/saturated", "lengths/chosen", "lengths/rejected", "num_dropped"}
    assert trl | ours <= set(next(line for line in result.history if "loss" in line))
    assert {f"eval_{name}" for name in trl | ours} <= set(lines[-1])
    assert lines[-1]["eval_rewards/margins"] == pytest.approx(
        lines[-1]["eval_rewards/chosen"] - lines[-1]["eval_rewards/rejected"]
    )
    found = read_verdict(result.output)
    assert found is not None
    assert found.figures["eval_accuracy"] == 1.0
    # All chosen answers are as long as or longer than the rejected ones.
    assert found.figures["eval_length_accuracy"] > 0.6
    samples = [json.loads(line) for line in (result.output / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 15
    assert all(one["before"] == first["completion"] for one, first in zip(samples[5:10], samples[:5], strict=True))
    assert {"prompt", "completion", "ended", "kl"} <= samples[-1].keys()

    model, tokenizer = load_model(result.output), Tokenizer.from_file(result.output)
    ChatEncoder(ChatTemplate.of_model(result.output), tokenizer)
    assert model.config.dropout == 0.0
    assert "ingot dpo" in (result.output / "README.md").read_text()
    assert DPOConfig.from_dict(json.loads((result.output / "run.json").read_bytes())["config"]) == config
    assert (result.output / "dpo.toml").is_file()


def test_verdicts_alone_and_lists_that_somebody_took_back(place, capsys):
    kto = config_at(
        place, data=(str(place / "verdicts.jsonl"),), loss_type=("kto",), max_steps=60, eval_steps=30, held_out=0.3
    )
    result = ingot.dpo(kto, quiet=True)
    last = [line for line in result.history if "eval_loss" in line][-1]
    assert last["eval_accuracy"] > 0.9
    assert "eval_rewards/chosen" in last
    # What is called kl is KTO's reference point; eval_kl is measured on samples, of which there are none here.
    assert "eval_kl" not in last
    assert next(line for line in result.history if "loss" in line)["kl"] >= 0.0
    found = read_verdict(result.output)
    assert found is not None
    assert "held-out good answers above bad ones" in found.text

    judged = {"schema_version": 1, "prompt": "which?", "responses": ["a", "b"], "annotator": "me"}
    first = [{**judged, "prompt": f"{n}: which?", "id": f"j{n}", "ranks": [1, 2]} for n in range(30)]
    later: list[dict[str, Any]] = [{**first[0], "id": "back", "status": "withdrawn", "revises": "j0"}]
    later += [{**first[1], "id": "new", "ranks": [2, 1], "revises": "j1"}]
    later += [{**judged, "prompt": "tied?", "id": "tie", "ranks": [1, 1]}]
    data = (write_rows(place / "one.jsonl", first), write_rows(place / "two.jsonl", later))
    lists = config_at(place, data=data, output=str(place / "lists"), max_steps=1)
    assert "1 of 30 rows tie all their answers and are left out" in run_and_read(lists, capsys)
    facts = json.loads((place / "lists" / "run.json").read_bytes())["data"]
    assert (facts["num_rows"], facts["num_tied"], facts["num_train"] + facts["num_held_out"]) == (30, 1, 29)


def run_and_read(config: DPOConfig, capsys: Any) -> str:
    ingot.dpo(config)
    return str(capsys.readouterr().out)


def test_verdicts_of_which_one_kind_rules_are_told(place, capsys):
    for bad, words in ((30, ""), (10, "--undesirable-weight 3 would balance"), (0, "no answer is bad")):
        entries = [{"prompt": f"{n}?", "completion": "a", "label": n >= bad} for n in range(bad + 30)]
        data = (write_rows(place / "v.jsonl", entries),)
        fields = {"data": data, "loss_type": ("kto",), "held_out": 0.0, "max_steps": 1}
        printed = run_and_read(config_at(place, **fields, output=str(place / f"{bad}")), capsys)
        assert f"verdicts  30 good, {bad} bad" in printed
        assert words in printed
        assert ("balance" in printed) == (bad == 10)
    write_rows(place / "v.jsonl", [{"prompt": f"{n}?", "completion": "a", "label": n >= 10} for n in range(40)])
    balanced = config_at(place, **fields, undesirable_weight=3.0, output=str(place / "balanced"))
    assert "balance them" not in run_and_read(balanced, capsys)


def test_answers_that_are_too_long_are_left_out_whole(place, capsys):
    long = {"prompt": "q", "chosen": "a" * 200, "rejected": "b"}
    entries = [{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(30)]
    data = (write_rows(place / "c.jsonl", [*entries, long]),)
    printed = run_and_read(config_at(place, data=data, max_steps=1, held_out=0.3), capsys)
    assert (
        "1 of 31 rows have an answer that makes more than 96 tokens with its prompt and are left out whole" in printed
    )


def test_dropout_of_the_model_is_off(place):
    write_chat_model(place / "base", dropout=0.3)
    result = ingot.dpo(config_at(place, max_steps=2), quiet=True)
    assert result.history[0]["eval_loss"] == pytest.approx(np.log(2))
    first = next(line for line in result.history if "loss" in line)
    assert result.model.config.dropout == 0.0
    assert first["rewards/chosen"] != 0.0


def snapshot(folder: Path) -> dict[str, Any]:
    names = [
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "samples.jsonl",
        "verdict.json",
        REFERENCE_FILE,
    ]
    names += ["config.json", "README.md", "checkpoint-10/model.safetensors", "checkpoint-10/optimizer.safetensors"]
    taken: dict[str, Any] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    taken["metrics"] = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
    taken["folder"] = sorted(entry.name for entry in folder.iterdir() if entry.name != "run.lock")
    return taken


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and forkserver are of Unix")
@pytest.mark.parametrize("loss", ["sigmoid sft", "kto"])
def test_killed_and_resumed_it_ends_with_the_same_bits(place, loss):
    changes = {"loss_type": tuple(loss.split()), "loss_weights": ()}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killable_dpo"])

    def run(folder: Path, kill_at: int | None = None, log: Path | None = None) -> int | None:
        process = context.Process(target=child, args=(folder, kill_at, log, changes))
        process.start()
        process.join(600)
        return process.exitcode

    (place / "whole").mkdir()
    assert run(place / "whole" / "run", log=place / "points") == 0
    expected = snapshot(place / "whole" / "run")
    points = (place / "points").read_text().split("\n")
    # Before and after the reference's numbers are there, between checkpoints, and near the end.
    scored = next(n for n, name in enumerate(points) if name.startswith(REFERENCE_FILE))
    first_save = next(n for n, name in enumerate(points) if name.startswith("optimizer"))
    (place / "killed").mkdir()
    folder = place / "killed" / "run"
    for kill_at in (scored, first_save + 12, 30) if loss != "kto" else (first_save + 12,):
        assert run(folder, kill_at) == -9, "the run was over before it was killed"
    assert run(folder) == 0
    assert snapshot(folder) == expected


def test_a_failed_fine_tuning_is_no_start_unless_forced(place):
    failed = Verdict(passed=False, sentences=("It learned nothing.",), figures={})
    write_verdict(place / "base", failed)
    with pytest.raises(RunError, match=r"did not pass its gate: It learned nothing\. \(--force"):
        ingot.dpo(config_at(place), quiet=True)
    assert not (place / "run").exists()
    ingot.dpo(config_at(place, max_steps=1), force=True, quiet=True)


def test_on_the_command_line(place, capsys):
    run = str(place / "run")
    arguments = ["dpo", "--model", str(place / "base"), "--data", str(place / "pairs.jsonl"), "--output", run]
    arguments += ["--sample-tokens", "2", "--threads", "1"]
    assert main([*arguments, "--loss-type", "sigmoid", "--dry-run"]) == 0
    assert not Path(run).exists()
    capsys.readouterr()
    assert (
        main([*arguments, "--loss-type", "sigmoid", "sft", "--loss-weights", "1", "0.5", "--max-steps", "2", "--json"])
        == 0
    )
    facts = json.loads(capsys.readouterr().out)
    assert (facts["steps"], facts["output"]) == (2, run)
    assert isinstance(facts["passed"], bool)
    assert "eval_accuracy_low" in facts["figures"]
    assert main(["dpo", "--resume", run, "--max-steps", "3"]) == 0
    assert f"resumed from {run}/checkpoint-2" in capsys.readouterr().out
    again = ["dpo", "--config", f"{run}/dpo.toml", "--output", run + "2", "--num-train-epochs", "1"]
    assert main(again) == 0
    assert main(["sft", "--resume", run]) == 1
    assert "a run of ingot dpo; go on with it: ingot dpo --resume" in capsys.readouterr().err
    with pytest.raises(SystemExit) as usage:
        main([*arguments, "--loss-type", "orpo", "--label-smoothing", "0.1"])
    assert usage.value.code == 2
    assert "label_smoothing has no effect on loss_type orpo" in capsys.readouterr().err


# ---- bad input

PROMPT = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("entries", "changes", "message"),
    [
        (
            [{"prompt": "a", "chosen": "b", "rejected": "b"}],
            {},
            r'a\.jsonl, row 1: field "rejected" equals field "chosen"; remove the row',
        ),
        ([{"prompt": "a", "chosen": "b", "rejected": ""}], {}, r'a\.jsonl, row 1: field "rejected" is empty'),
        (
            [{"prompt": "a", "completion": "b", "label": True}],
            {},
            r"a\.jsonl, row 1: is of kind unpaired preference.*--loss-type kto",
        ),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2 + [{"prompt": "a", "completion": "b", "label": True}],
            {},
            r"a\.jsonl, row 3: is unpaired preference \(plain text\), but the file is preference \(plain text\)",
        ),
        (
            [{"prompt": "a", "completion": "b"}],
            {},
            r"a\.jsonl, row 1: is of kind prompt-completion, which prefers nothing",
        ),
        (
            [{"prompt": "a", "responses": ["b", "c"]}],
            {},
            r"a\.jsonl, row 1: is of kind candidates, which prefers nothing",
        ),
        ([{"prompt": "a", "responses": ["b", "c"], "ranks": [1]}], {}, r'a\.jsonl, row 1: field "ranks" has 1 entries'),
        ([{"prompt": "a", "responses": ["b", "c"], "ranking": [1, 0]}], {}, r"older version"),
        ([{"prompt": "a", "responses": ["b", "c"], "ranks": [1, 1]}] * 9, {}, r"no row prefers anything"),
        ([{"prompt": PROMPT, "chosen": [PROMPT[0]], "rejected": "b"}], {}, r"row 1: field"),
        ([{"prompt": [{"role": "bot", "content": "a"}], "chosen": "b", "rejected": "c"}], {}, r"unknown role"),
        (
            [{"prompt": "a", "chosen": "b" * 200, "rejected": "c"}],
            {},
            r"a\.jsonl: none of 1 rows fits into max_length 96",
        ),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 9, {}, r"9 rows with 1 different prompts are too few"),
        (
            [{"prompt": f"{n}", "chosen": "b", "rejected": "c", "weight": 2} for n in range(30)],
            {"loss_type": ("aot",)},
            r"row 1: has a weight",
        ),
        (None, {"pack_length": 30}, r"raise the pack length"),
        (None, {"model": "nowhere"}, r"nowhere: no such folder"),
        (None, {"model": ""}, r"no model to start from: give --model"),
        (None, {"data": ()}, r"no preferences to learn from: give --data"),
    ],
)
def test_bad_input_is_one_clear_line(place, entries, changes, message):
    if entries is not None:
        changes = {"data": (write_rows(place / "a.jsonl", entries),), **changes}
    with pytest.raises((ConfigError, DataError, RunError, CheckpointError), match=message) as caught:
        ingot.dpo(config_at(place, **changes), quiet=True)
    assert "\n" not in str(caught.value)


def test_a_model_that_knows_no_chat_says_what_is_missing(place):
    from killable_sft import write_base

    write_base(place / "raw")
    with pytest.raises(
        DataError, match=r"raw: the tokenizer has no special token .*train with ingot sft, which adds them"
    ):
        ingot.dpo(config_at(place, model=str(place / "raw")), quiet=True)


def test_orpo_needs_no_fine_tuning_before(place):
    """It learns the template's tokens beside the preference, from a model that was only pretrained; also when it is resumed."""
    from killable_sft import write_base

    write_base(place / "raw")
    fields = {"model": str(place / "raw"), "loss_type": ("orpo",), "max_steps": 60, "eval_steps": 30, "held_out": 0.3}
    result = ingot.dpo(config_at(place, **fields, sample_tokens=4), quiet=True)
    assert {"<|im_start|>", "<|im_end|>", "<|pad|>"} <= set(result.tokenizer.special_tokens)
    last = [line for line in result.history if "eval_loss" in line][-1]
    assert last["eval_accuracy"] > 0.9
    assert last["eval_nll_loss"] < 0.7 * result.history[0]["eval_nll_loss"]
    again = ingot.resume(place / "run", max_steps=61, quiet=True).history[-1]
    assert again["eval_kl"] == pytest.approx(last["eval_kl"], rel=0.5)


def test_settings_that_cannot_be_are_refused():
    for changes, message in (
        ({"loss_type": ()}, "loss_type is empty"),
        ({"loss_type": ("dpo",)}, "loss_type must be one of sigmoid, robust"),
        ({"loss_type": ("sft",)}, "sft learns from the chosen answers alone"),
        ({"loss_type": ("sigmoid", "kto")}, "loss_type kto is not added to others"),
        ({"loss_type": ("ipo", "ipo")}, "names a loss twice"),
        ({"loss_weights": (1.0, 2.0)}, "loss_weights has 2 entries for 1 losses"),
        ({"loss_weights": (-1.0,)}, "loss_weights must all be positive"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"label_smoothing": 0.5}, "label_smoothing must be at least 0"),
        ({"loss_type": ("ipo",), "label_smoothing": 0.1}, "label_smoothing has no effect on loss_type ipo"),
        ({"loss_type": ("exo_pair",)}, "exo_pair needs label_smoothing"),
        ({"cpo_alpha": 1.0}, "cpo_alpha has no effect"),
        ({"desirable_weight": 2.0}, "desirable_weight has no effect"),
        ({"loss_type": ("kto",), "per_device_train_batch_size": 1}, "give per_device_train_batch_size 2 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            DPOConfig(**changes)


def test_the_names_of_the_losses_are_those_that_there_are():
    pair = set(LossType.__args__) - {"sft", "cpo", "simpo", "orpo"} - set(KTO_LOSS_TYPES)  # type: ignore[attr-defined]
    assert pair == set(LOSS_TYPES)
    # cpo is called sigmoid inside its own loss.
    assert set(SMOOTHED) == losses.SMOOTHED | {"cpo"}


# ---- figures of the verdict


@given(st.integers(0, 2**32 - 1), st.integers(1, 60))
def test_accuracy_and_its_interval(seed, count):
    rng = np.random.default_rng(seed)
    margins = rng.normal(0.5, 1, count) * rng.integers(0, 2, count)
    weights, clusters = rng.uniform(0.2, 2, count), rng.integers(0, max(1, count // 2), count)
    share, low, high = pair_accuracy(margins, weights, clusters)
    expected = np.average(np.where(margins > 0, 1.0, np.where(margins == 0, 0.5, 0.0)), weights=weights)
    assert share == pytest.approx(expected)
    assert low <= share + 1e-12
    assert high >= share - 1e-12


def test_intervals_are_those_of_textbooks_and_hold_what_they_promise():
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(1.0, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)
    share, low, high = pair_accuracy(np.array([1.0] * 60 + [-1.0] * 40), np.ones(100), np.arange(100))
    half = 1.96 * np.sqrt(0.6 * 0.4 / 99)
    assert (share, low, high) == pytest.approx((0.6, 0.6 - half, 0.6 + half), abs=1e-4)
    # Pairs of one prompt that stand or fall together count once: the interval is as wide as with one pair each.
    repeated = pair_accuracy(np.repeat([1.0] * 60 + [-1.0] * 40, 5), np.full(500, 0.2), np.repeat(np.arange(100), 5))
    assert repeated == pytest.approx((share, low, high))
    rng = np.random.default_rng(0)
    holds = 0
    for _ in range(400):
        truth = rng.beta(4, 3, 80)
        wins = (rng.random((80, 3)) < truth[:, None]).ravel()
        _, low, high = pair_accuracy(wins - 0.5, np.ones(240), np.repeat(np.arange(80), 3))
        holds += low <= 4 / 7 <= high
    assert 0.91 <= holds / 400 <= 0.98


def test_separation_is_the_area_under_the_curve():
    rng = np.random.default_rng(1)
    scores, labels = rng.integers(0, 6, 50).astype(float), rng.random(50) < 0.4
    good, bad = scores[labels][:, None], scores[~labels][None, :]
    ones, prompts = np.ones(50), np.arange(50)
    share, low, high = separation(scores, labels, ones, prompts)
    assert share == pytest.approx(float(((good > bad) + 0.5 * (good == bad)).mean()))
    assert low < share < high
    assert np.isnan(separation(scores, np.ones(50, bool), ones, prompts)[0])
    twice, weighted = np.concatenate([prompts, prompts[:9]]), ones + (prompts < 9)
    assert separation(scores, labels, weighted, prompts)[0] == pytest.approx(
        separation(scores[twice], labels[twice], np.ones(59), twice)[0]
    )


def line(step: int, **figures: float) -> dict[str, float]:
    start = {"eval_accuracy": 0.7, "eval_accuracy_low": 0.6, "eval_accuracy_high": 0.8, "eval_length_accuracy": 0.5}
    start |= {"eval_start_accuracy": 0.55, "eval_kl": 1.0, "eval_eos_rate": 0.9, "eval_completions/mean_length": 20.0}
    return {"step": step, **start, **figures}


def test_the_verdict_speaks_of_the_weights_that_are_kept():
    history: list[dict[str, float]] = [
        line(0, eval_accuracy_low=0.4),
        line(5),
        {"step": 7, "loss": 1.0},
        line(10, eval_eos_rate=0.1),
    ]
    found = verdict_of(history, 5, verdicts=False)
    assert found.passed
    assert found.figures["step"] == 5
    assert "order 70.0 % of held-out pairs" in found.text
    assert "longer answer gets 50.0 %" in found.text
    assert verdict_of(history, None, verdicts=False).passed is False
    assert "Answers no longer end" in verdict_of(history, 10, verdicts=False).text
    chance = verdict_of([line(0), line(5, eval_accuracy_low=0.5)], 5, verdicts=False)
    assert not chance.passed
    assert "not shown to prefer better answers" in chance.text
    nothing = verdict_of([{"step": 1, "loss": 1.0}], 1, verdicts=False)
    assert not nothing.passed
    assert "Nothing was held out" in nothing.text


def test_alarms_of_a_run_on_preferences():
    def raised(*lines: dict[str, float]) -> list[str]:
        alarms = Alarms(rules(held_out=True))
        return [name for each in lines for name, _ in alarms.check(each)]

    def logged(chosen: float, rejected: float, margin: float) -> dict[str, float]:
        return {"eval_logps/chosen": chosen, "eval_logps/rejected": rejected, "eval_rewards/margins": margin}

    assert raised(logged(-20, -20, 0), logged(-25, -40, 1.5)) == ["displacement"]
    assert raised(logged(-20, -20, 0), logged(-19, -40, 2.0), logged(-25, -19, 2.0)) == []
    assert raised(*[{"rewards/saturated": 0.6}] * 4) == ["saturated pairs"]
    answers = {"eval_kl": 1.0, "eval_completions/mean_length": 20.0, "eval_eos_rate": 0.9, "eval_sample_entropy": 2.0}
    assert raised(answers, {**answers, "eval_kl": 4.1}) == ["far from the reference"]
    assert raised(answers, {**answers, "eval_completions/mean_length": 31.0}) == ["length drift"]
    assert raised(answers, {**answers, "eval_eos_rate": 0.79}) == ["answers do not end"]
    assert raised(answers, {**answers, "eval_sample_entropy": 0.39}) == ["entropy collapse"]
