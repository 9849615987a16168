"""What fine-tuning says at its end, and what it watches."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import ingot
from ingot.cli import main
from ingot.configs import SFTConfig
from ingot.data.chat import Encoded
from ingot.data.examples import Examples
from ingot.errors import RunError
from ingot.training.alarms import Alarms
from ingot.training.demonstration_checks import rules, share_within, verdict_of
from ingot.training.verdicts import read_verdict, require_passed
from killable_sft import rows, write_base, write_rows


def line(step: int, loss: float, ended: float) -> dict[str, float]:
    return {"step": step, "eval_loss": loss, "eval_mean_token_accuracy": 0.5, "eval_eos_rate": ended}


def judged(
    *lines: dict[str, float], within: float = 1.0, best_step: int | None = 10
) -> ingot.training.verdicts.Verdict:
    return verdict_of(lines, best_step, num_answers=8, max_tokens=64, within=within)


def test_a_loss_that_fell_and_answers_that_end_pass() -> None:
    found = judged(line(0, 2.0, 0.0), line(10, 1.0, 0.75), line(20, 1.5, 0.0))
    assert found.passed
    assert found.figures["eval_loss_before"] == 2.0
    assert found.figures["eval_loss_after"] == 1.0
    assert "from 2.000 to 1.000" in found.text
    assert "6 of 8 answers by itself within 64 tokens (0 before)" in found.text
    assert found.advice == ""


@pytest.mark.parametrize("after", [2.0, 1.999, 3.0])
def test_a_loss_that_hardly_fell_does_not(after: float) -> None:
    found = judged(line(0, 2.0, 1.0), line(10, after, 1.0))
    assert not found.passed
    assert "learned next to nothing" in found.text


@pytest.mark.parametrize(
    ("ended", "within", "passed"),
    # Wilson's upper bounds for 0, 1 and 2 of 8 answers are 0.324, 0.471 and 0.591.
    [(0, 1.0, False), (1, 1.0, False), (2, 1.0, True), (0, 0.7, False), (0, 0.6, True), (0, 0.0, True)],
)
def test_answers_must_end_where_the_demonstrations_do(ended: int, within: float, passed: bool) -> None:
    found = judged(line(0, 2.0, 0.0), line(10, 1.0, ended / 8), within=within)
    assert found.passed is passed
    assert ("do not end" in found.text) is not passed


def test_what_was_not_measured_is_not_held_against_it_unless_nothing_was() -> None:
    no_loss = {"step": 0, "eval_eos_rate": 1.0}
    assert judged(no_loss, {**no_loss, "step": 10}).passed
    no_answers = [
        {name: value for name, value in each.items() if name != "eval_eos_rate"}
        for each in (line(0, 2.0, 0.0), line(10, 1.0, 0.0))
    ]
    assert judged(*no_answers).passed
    nothing = judged({"step": 10, "loss": 1.0})
    assert not nothing.passed
    assert "--held-out" in nothing.text


def test_lengths_of_first_answers() -> None:
    def example(*mask: int) -> tuple[Encoded, ...]:
        return (Encoded(np.arange(len(mask), dtype=np.int32), np.array(mask, np.bool_), ()),)

    examples = Examples(
        rows=(),
        groups=(example(0, 1, 1), example(0, 0, 1, 1, 1, 0, 1), example(1, 1, 1, 1)),
        num_rows=3,
        num_too_long=0,
    )
    assert [share_within(examples, limit) for limit in (1, 2, 3, 4)] == [0.0, 1 / 3, 2 / 3, 1.0]


def test_a_held_out_loss_that_rises_again_is_an_alarm() -> None:
    alarms = Alarms(rules())
    raised = [
        alarms.check({"step": step, "eval_loss": loss}) for step, loss in enumerate((2.0, 1.0, 1.019, 1.03, 1.05, 1.0))
    ]
    assert [[name for name, _ in each] for each in raised] == [[], [], [], ["memorising"], [], []]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_base(tmp_path / "base")
    write_rows(tmp_path / "a.jsonl", rows())
    return tmp_path


def test_the_run_says_it_and_the_next_stage_reads_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = SFTConfig(
        model=str(place / "base"),
        data=(str(place / "a.jsonl"),),
        output=str(place / "good"),
        max_steps=40,
        learning_rate=1e-2,
        sample_tokens=8,
        held_out=0.2,
    )
    ingot.sft(config)
    assert "verdict   passed: On held-out rows" in capsys.readouterr().out
    found = read_verdict(place / "good")
    assert found is not None
    assert found.passed
    still = dataclasses.replace(config, output=str(place / "still"), max_steps=2, learning_rate=1e-12)
    ingot.sft(still, quiet=True)
    pairs = write_rows(
        place / "pairs.jsonl", [{"prompt": f"{n}: a", "chosen": "a", "rejected": "b"} for n in range(40)]
    )
    assert main(["dpo", "--model", str(place / "still"), "--data", pairs, "--output", str(place / "dpo")]) == 1
    assert "still: did not pass its gate: On held-out rows" in capsys.readouterr().err
    assert not (place / "dpo").exists()


def test_json_has_the_verdict(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(place / "base"), "--data", str(place / "a.jsonl"), "--output", str(place / "run")]
    assert (
        main(["sft", *arguments, "--max-steps", "2", "--learning-rate", "1e-2", "--sample-tokens", "2", "--json"]) == 0
    )
    facts = json.loads(capsys.readouterr().out)
    found = read_verdict(place / "run")
    assert found is not None
    assert (facts["passed"], facts["verdict"]) == (found.passed, found.text)


class Listening:
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize("kind", ["sft", "reward", "pretrain"])
def test_a_run_without_its_end_has_no_verdict_yet(tmp_path: Path, kind: str) -> None:
    display = Listening()
    (tmp_path / "run.json").write_text(json.dumps({"kind": kind, "finished": False}))
    if kind == "pretrain":
        assert require_passed(tmp_path, force=False, display=display) is None  # type: ignore[arg-type]
        return
    with pytest.raises(RunError, match=rf"is not finished.*ingot {kind} --resume {tmp_path} \(--force"):
        require_passed(tmp_path, force=False, display=display)  # type: ignore[arg-type]
    require_passed(tmp_path, force=True, display=display)  # type: ignore[arg-type]
    assert "by force" in display.said[-1]
    (tmp_path / "run.json").write_text(json.dumps({"kind": kind, "finished": True}))
    assert require_passed(tmp_path, force=False, display=display) is None  # type: ignore[arg-type]
