"""A run's folder as it is, read with patience: unfinished, from an older version, or in part damaged."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ingot.errors import RunError
from ingot.reporting.charts import finite
from ingot.training.runs import FORMAT_VERSION, RUN_FILE
from ingot.training.verdicts import Verdict, read_verdict


@dataclasses.dataclass(frozen=True)
class Record:
    """What a run has left behind."""

    path: Path
    facts: Mapping[str, Any]
    """Content of run.json; empty where there is none."""
    metrics: list[dict[str, Any]]
    """Lines of metrics.jsonl, without alarms."""
    alarms: list[dict[str, Any]]
    """``step``, ``alarm`` and ``message``, in order."""
    samples: list[dict[str, Any]]
    verdict: Verdict | None
    notices: list[str]
    """What could not be read and why, for a person."""

    @property
    def kind(self) -> str:
        """The phase: pretrain, sft, reward, dpo, ppo, grpo; "run" where it is not known."""
        kind = self.facts.get("kind")
        return kind if isinstance(kind, str) and kind else "run"

    @property
    def config(self) -> Mapping[str, Any]:
        """The settings that the run began with."""
        return mapping(self.facts.get("config"))

    @property
    def step(self) -> int:
        """The last step that a line of metrics speaks of."""
        steps = [line["step"] for line in self.metrics if isinstance(line.get("step"), int)]
        return max(steps, default=0)

    @property
    def planned_steps(self) -> int | None:
        """Where it is to end."""
        steps = mapping(self.facts.get("decisions")).get("max_steps")
        return steps if isinstance(steps, int) and not isinstance(steps, bool) else None

    @property
    def finished(self) -> bool:
        """Whether it came to its end."""
        return bool(self.facts.get("finished"))

    @functools.cached_property
    def metric_names(self) -> list[str]:
        """All metrics that have a number somewhere, in the order in which they appear."""
        names: dict[str, None] = {}
        for line in self.metrics:
            for name, value in line.items():
                if name not in names and name != "step" and finite(value) is not None:
                    names[name] = None
        return list(names)

    def last(self, name: str) -> float | None:
        """The last finite value of a metric."""
        values = (finite(line.get(name)) for line in reversed(self.metrics))
        return next((value for value in values if value is not None), None)


def read_record(folder: str | Path) -> Record:
    """Read a run's folder.

    Raises
    ------
    RunError
        There is no run in it.
    """
    path = Path(folder)
    if not (path / RUN_FILE).is_file() and not (path / "metrics.jsonl").is_file():
        what = "no such folder" if not path.exists() else f"no run in it ({RUN_FILE} is missing)"
        raise RunError(f"{path}: {what}; give the --output folder of a run")
    notices: list[str] = []
    facts = _read_facts(path / RUN_FILE, notices)
    lines = _read_lines(path / "metrics.jsonl", notices)
    try:
        verdict = read_verdict(path)
    except RunError as error:
        verdict = None
        notices.append(str(error))
    return Record(
        path=path,
        facts=facts,
        metrics=[line for line in lines if "alarm" not in line],
        alarms=[line for line in lines if "alarm" in line],
        samples=_read_lines(path / "samples.jsonl", notices),
        verdict=verdict,
        notices=notices,
    )


def mapping(value: object) -> Mapping[str, Any]:
    """The value where it is an object, an empty one otherwise: files of other versions may hold anything."""
    return value if isinstance(value, Mapping) else {}


def _read_facts(path: Path, notices: list[str]) -> Mapping[str, Any]:
    try:
        facts = json.loads(path.read_bytes())
    except FileNotFoundError:
        notices.append(f"{path}: is missing, so settings, model and data of this run are not known")
        return {}
    except (ValueError, OSError):
        notices.append(f"{path}: damaged, cannot be read, so settings, model and data of this run are not known")
        return {}
    version = mapping(facts).get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        notices.append(f"{path}: made by a newer version of ingot (format {version}); some of it may not be shown")
    return mapping(facts)


def _read_lines(path: Path, notices: list[str]) -> list[dict[str, Any]]:
    """Whole lines that hold an object; the number of others is told."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        notices.append(f"{path}: cannot be read: {error.strerror or error}")
        return []
    lines, bad = [], 0
    for line in content.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            bad += 1
            continue
        if isinstance(value, dict):
            lines.append(value)
        else:
            bad += 1
    if bad:
        notices.append(f"{path}: {bad} damaged {'line was' if bad == 1 else 'lines were'} left out")
    return lines
