"""Alarms begin and end where their conditions do, also over a resumed run; verdicts open or close the next stage."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ingot.errors import RunError
from ingot.training.alarms import Alarms, above, apart, below, below_share_of_start, drifted
from ingot.training.progress import SilentDisplay
from ingot.training.verdicts import VERDICT_FILE, Verdict, read_verdict, require_passed, write_verdict


class Listening(SilentDisplay):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def raised(rule, values, metric="x"):
    """Steps at which the alarm begins."""
    alarms = Alarms([rule])
    return [step for step, value in enumerate(values) if alarms.check({"step": step, metric: value})]


def test_an_alarm_begins_once_and_again_after_it_ended() -> None:
    rule = above("too high", "x", 1.0, "because")
    assert raised(rule, [0.5, 1.0, 1.5, 2.0, 0.5, 1.1]) == [2, 5]
    assert raised(below("too low", "x", 1.0, "because"), [1.0, 0.9, 0.8, 1.0, 0.0]) == [1, 4]


def test_an_alarm_waits_for_so_many_lines_in_a_row() -> None:
    assert raised(above("high", "x", 1.0, "c", after=3), [2, 2, 0, 2, 2, 2, 2]) == [5]
    assert raised(below("low", "x", 0.0, "c", after=2), [-1, 1, -1, -1]) == [3]


def test_changes_are_measured_from_the_first_line() -> None:
    assert raised(below_share_of_start("collapse", "x", 0.2, "c"), [5.0, 1.01, 1.0, 0.99]) == [3]
    assert raised(drifted("drift", "x", 0.5, "c"), [10.0, 15.0, 15.1]) == [2]
    assert raised(drifted("drift", "x", 0.5, "c"), [10.0, 5.0, 4.9]) == [2]


def test_two_metrics_that_part() -> None:
    rule = apart("over-optimisation", "proxy", "gold", 2, "restore an earlier checkpoint")
    alarms = Alarms([rule])
    lines = [(0, 0), (1, 1), (2, 1), (3, 0.5)]
    began = [alarms.check({"proxy": proxy, "gold": gold}) for proxy, gold in lines]
    assert [bool(each) for each in began] == [False, False, False, True]
    assert began[3][0][0] == "over-optimisation"
    assert "restore an earlier checkpoint" in began[3][0][1]


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "high", True])
def test_lines_without_a_number_say_nothing(value: object) -> None:
    assert raised(above("high", "x", 0.0, "c"), [value]) == []
    assert Alarms([above("high", "x", 0.0, "c")]).check({"y": 1.0}) == []


def test_a_resumed_run_raises_what_an_uninterrupted_one_does() -> None:
    values = [1.0, 3.0, 3.0, 0.1, 4.0, 0.2]
    rules = [above("high", "x", 2.0, "c"), drifted("drift", "x", 0.5, "c"), above("long", "x", 2.0, "c", after=2)]
    whole = Alarms(rules)
    history, expected = [], []
    for step, value in enumerate(values):
        history.append({"step": step, "x": value})
        expected.append(whole.check(history[-1]))
    for cut in range(len(values)):
        # The log holds lines of alarms too.
        resumed = Alarms(rules, [*history[:cut], {"step": cut, "alarm": "high", "message": "", "x": 9.0}])
        assert [resumed.check(line) for line in history[cut:]] == expected[cut:]


def verdict(passed: bool) -> Verdict:
    return Verdict(
        passed=passed, sentences=("It orders 71 % of pairs.",), figures={"accuracy": 0.71}, advice="Collect more."
    )


def test_a_verdict_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_verdict(tmp_path) is None
    write_verdict(tmp_path, verdict(True))
    assert read_verdict(tmp_path) == verdict(True)
    (tmp_path / VERDICT_FILE).write_text('{"passed": true')
    with pytest.raises(RunError, match="damaged"):
        read_verdict(tmp_path)


def test_a_failed_verdict_stops_the_next_stage_unless_forced(tmp_path: Path) -> None:
    display = Listening()
    assert require_passed(tmp_path, force=False, display=display) is None
    write_verdict(tmp_path, verdict(True))
    require_passed(tmp_path, force=False, display=display)
    assert "71 %" in display.said[-1]
    assert "Collect more" not in display.said[-1]
    write_verdict(tmp_path, verdict(False))
    with pytest.raises(RunError, match=r"71 %.*Collect more.*--force"):
        require_passed(tmp_path, force=False, display=display)
    require_passed(tmp_path, force=True, display=display)
    assert "by force" in display.said[-1]
