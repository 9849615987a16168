"""What a report tells, as plain values: one run, or several compared."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ingot.feedback.display import visible
from ingot.reporting.charts import finite, points_of
from ingot.reporting.figures import BINS, FIGURES, HEADLINES, PHASES, Figure, expand
from ingot.reporting.lineage import ancestry, data_of, judge_is_proxy, model_of, sources_of
from ingot.reporting.records import Record, mapping, read_record
from ingot.reporting.settings import settings_of

_MOST_PROMPTS = 64
_MOST_OTHERS = 40
_COUNTERS = ("epoch", "tokens", "episode")
_MINIMISED = {"pretrain": "tokens", "sft": "tokens"}
"""Phases whose losses can be compared."""
_BIN_ORDER = {name: place for place, name in enumerate(("much shorter", "shorter", "similar", "longer", "much longer"))}


def tell_run(folder: str | Path) -> dict[str, Any]:
    """One run: its verdict, alarms, figures, samples, ancestors and settings.

    Raises
    ------
    RunError
        There is no run in the folder.
    """
    record = read_record(folder)
    title, what = PHASES.get(record.kind, PHASES["run"])
    alarms = tell_alarms(record)
    return {
        "runs": [str(record.path)],
        "kind": record.kind,
        "title": title,
        "what": what,
        "status": tell_status(record),
        "verdict": tell_verdict(record),
        "alarms": alarms,
        "notices": record.notices,
        "summary": tell_summary(record),
        "headlines": tell_headlines(record),
        "figures": [*tell_figures(record, alarms), *tell_bars(record)],
        "samples": tell_samples(record.samples),
        "lineage": ancestry(record),
        "settings": settings_of(record.kind, record.config),
        "data": flat(mapping(record.facts.get("data"))),
    }


def compare_runs(folders: Sequence[str | Path]) -> dict[str, Any]:
    """Several runs: what each came to, where their settings differ, and the metrics that two or more of them have, in one chart each.

    Raises
    ------
    RunError
        A folder has no run.
    """
    records = [read_record(folder) for folder in folders]
    names = names_of(records)
    runs = []
    for record, name in zip(records, names, strict=True):
        title, _ = PHASES.get(record.kind, PHASES["run"])
        runs.append(
            {
                "name": name,
                "folder": str(record.path),
                "kind": record.kind,
                "title": title,
                "status": tell_status(record),
                "verdict": tell_verdict(record),
                "alarms": tell_alarms(record),
                "notices": record.notices,
                "summary": tell_summary(record),
                "headlines": tell_headlines(record),
            }
        )
    return {
        "runs": [str(record.path) for record in records],
        "compared": runs,
        "differences": differences(records),
        "figures": list(overlaid(records, names)),
        "samples": samples_beside(records, names),
    }


def tell_status(record: Record) -> dict[str, Any]:
    """How far it came, and what to type to go on."""
    step, planned = record.step, record.planned_steps
    of = f" of {planned:,}" if planned is not None else ""
    if record.finished:
        text = f"Finished: {step:,} steps."
    elif record.metrics:
        text = f"Unfinished: {step:,}{of} steps so far."
    else:
        text = "Unfinished: nothing was measured yet."
    go_on = "" if record.finished or record.kind == "run" else f"ingot {record.kind} --resume {record.path}"
    return {"finished": record.finished, "step": step, "planned": planned, "text": text, "resume": go_on}


def tell_verdict(record: Record) -> dict[str, Any] | None:
    """The content of verdict.json."""
    verdict = record.verdict
    if verdict is None:
        return None
    return {
        "passed": verdict.passed,
        "sentences": list(verdict.sentences),
        "advice": verdict.advice,
        "figures": dict(verdict.figures),
    }


def tell_alarms(record: Record) -> list[dict[str, Any]]:
    """Each alarm with its number, by which charts mark it, and the metrics that it speaks of."""
    names = sorted(record.metric_names, key=len, reverse=True)
    found = []
    for number, line in enumerate(record.alarms, 1):
        message = str(line.get("message", ""))
        spoken = [name for name in names if _speaks_of(message, name)]
        found.append(
            {
                "number": number,
                "step": finite(line.get("step")),
                "alarm": str(line.get("alarm")),
                "message": message,
                "metrics": spoken,
            }
        )
    return found


def tell_summary(record: Record) -> list[dict[str, str]]:
    """What this was in a few lines: model, data, length, machine, versions."""
    facts = record.facts
    elapsed = record.last("time/elapsed_s")
    rows = [(role.capitalize(), name) for role, name, _ in sources_of(record)]
    rows += [
        ("Network", model_of(facts)),
        ("Learned from", ", ".join(data_of(record))),
        ("Took", words_of_time(elapsed) if elapsed is not None else ""),
        ("Machine", _machine(facts)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in mapping(facts.get("versions")).items())),
    ]
    return [{"label": label, "value": value} for label, value in rows if value]


def tell_headlines(record: Record) -> list[dict[str, Any]]:
    """The first and the last value of the metrics that say most about such a run; of the training lines where nothing was held out."""
    found = []
    for metrics, label in HEADLINES.get(record.kind, (("eval_loss|loss", "loss"),)):
        for name in metrics.split("|"):
            points = points_of(record.metrics, name)
            if points:
                (first_step, first), (last_step, last) = points[0], points[-1]
                where = ", held out" if name.startswith("eval_") else ""
                found.append(
                    {
                        "metric": name,
                        "label": _named(record, name, label) + where,
                        "first": first,
                        "first_step": first_step,
                        "last": last,
                        "last_step": last_step,
                    }
                )
                break
    return found


def tell_figures(record: Record, alarms: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The charts that the run has metrics for, each with the alarms that speak of them; what is left over comes last, plainly."""
    names = record.metric_names
    left = dict.fromkeys(names)
    for name in list(left):
        if any(fnmatch.fnmatch(name, pattern) for pattern in BINS):
            del left[name]
    drawn = []
    for figure in FIGURES:
        if figure.kinds and record.kind not in figure.kinds:
            continue
        lines = [line for entry in figure.lines for line in expand(entry, names)]
        series = []
        for line in lines:
            x = _x_of(figure, line.metric, names)
            points = points_of(record.metrics, line.metric, x)
            if points and not (figure.x != "step" and len(points) < 2):
                series.append(
                    {"name": _named(record, line.metric, line.label), "metric": line.metric, "points": points}
                )
            left.pop(line.metric, None)
        if series:
            folded = figure.folded or figure.unless in names
            drawn.append(_figure(dataclasses.replace(figure, folded=folded), series, _levels(figure, record)))
    for name in list(left)[:_MOST_OTHERS]:
        if name.startswith("time/") or name in _COUNTERS:
            continue
        points = points_of(record.metrics, name)
        plain = Figure(name, "", (), "As the run recorded it.", folded=True)
        drawn.append(_figure(plain, [{"name": name, "metric": name, "points": points}], []))
    _mark(drawn, alarms)
    return drawn


def tell_bars(record: Record) -> list[dict[str, Any]]:
    """Of a reward model: how often it is right by the difference of lengths, for each criterion."""
    names = record.metric_names
    pattern = next((pattern for pattern in BINS if fnmatch.filter(names, pattern)), None)
    groups: dict[str, list[dict[str, Any]]] = {}
    for name in fnmatch.filter(names, pattern) if pattern else ():
        of_bin, _, criterion = name.partition("/")
        words = of_bin.partition("_when_")[2].replace("_", " ")
        value = record.last(name)
        groups.setdefault(criterion, []).append({"name": words, "metric": name, "value": value})
    return [
        {
            "kind": "bars",
            "title": "Right by difference of lengths" + (f": {criterion}" if criterion else ""),
            "y_title": "share of pairs",
            "x_title": "",
            "read": "How often the preferred response scores higher, by how much longer or shorter it is than the other one. The bars should be "
            "about equally high; a slope means that the scorer has learned length instead of quality.",
            "bars": sorted(bars, key=lambda bar: _BIN_ORDER.get(bar["name"], len(_BIN_ORDER))),
            "levels": [{"y": 0.5, "name": "a coin"}],
            "folded": bool(criterion),
        }
        for criterion, bars in groups.items()
    ]


def tell_samples(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the model wrote at the first and at the last evaluation on the same prompts, and on the way.

    Returns
    -------
    dict
        ``first_step``, ``last_step``, ``num_prompts``, and ``prompts``: each a ``prompt`` and its ``looks``, in order of steps, with the
        ``completions`` of that step and their ``facts``.
    """
    by_prompt: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for line in lines:
        step = finite(line.get("step"))
        if step is None:
            continue
        looks = by_prompt.setdefault(words(line.get("prompt")), {})
        if "completion" in line:
            known = ("step", "prompt", "completion", "before")
            facts = {name: value for name, value in line.items() if name not in known and value is not None}
            looks.setdefault(step, []).append({"text": words(line["completion"]), "facts": facts})
            if "before" in line and step > 0:
                looks.setdefault(0.0, [{"text": words(line["before"]), "facts": {}}])
        elif isinstance(line.get("responses"), list):
            looks.setdefault(step, []).extend(_scored(line))
    by_prompt = {prompt: looks for prompt, looks in by_prompt.items() if looks}
    steps = sorted({step for looks in by_prompt.values() for step in looks})
    told = []
    # Prompts that were there to the end first: those show what changed.
    order = sorted(by_prompt.items(), key=lambda entry: (-max(entry[1]), -len(entry[1])))
    for prompt, looks in order[:_MOST_PROMPTS]:
        told.append(
            {"prompt": prompt, "looks": [{"step": step, "completions": looks[step]} for step in _some(sorted(looks))]}
        )
    return {
        "first_step": steps[0] if steps else None,
        "last_step": steps[-1] if steps else None,
        "num_prompts": len(by_prompt),
        "prompts": told,
    }


def samples_beside(records: Sequence[Record], names: Sequence[str]) -> list[dict[str, Any]]:
    """For prompts that two or more runs answered: what each wrote last."""
    each = [tell_samples(record.samples)["prompts"] for record in records]
    found: dict[str, list[dict[str, Any]]] = {}
    for prompts, name in zip(each, names, strict=True):
        for entry in prompts:
            look = entry["looks"][-1]
            found.setdefault(entry["prompt"], []).append({"name": name, **look})
    return [{"prompt": prompt, "looks": looks} for prompt, looks in found.items() if len(looks) > 1][:_MOST_PROMPTS]


def differences(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Settings that two or more runs have and that are not the same in all of these; None where a run has no such setting."""
    each = [{row["name"]: row for row in settings_of(record.kind, record.config)} for record in records]
    found = []
    for setting in dict.fromkeys(name for rows in each for name in rows):
        values = [rows[setting]["value"] if setting in rows else None for rows in each]
        there = [rows[setting]["value"] for rows in each if setting in rows]
        if setting != "output" and any(value != there[0] for value in there):
            meaning = next(rows[setting]["meaning"] for rows in each if setting in rows)
            found.append({"name": setting, "values": values, "meaning": meaning})
    return found


def overlaid(records: Sequence[Record], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A chart for each metric that two or more runs have, a line for each run; losses only of phases that minimise the same."""
    every = [name for record in records for name in record.metric_names]
    places: dict[tuple[str, str], tuple[int, Figure, str]] = {}
    for number, figure in enumerate(FIGURES):
        for line in figure.lines:
            several = f": {line.label}" if len(figure.lines) > 1 else ""
            for metric, where in ((line.metric, ""), (line.held_out or f"eval_{line.metric}", ", held out")):
                title = figure.title + several + where
                if figure.x != "step":
                    series = _of_all(records, names, metric, _x_of(figure, metric, every))
                    if len(series) > 1:
                        yield _figure(dataclasses.replace(figure, title=title), series, [])
                    continue
                for kind in figure.kinds or ("",):
                    places.setdefault((metric, kind), (number, figure, title))
    groups: dict[tuple[str, str], list[int]] = {}
    for number, record in enumerate(records):
        for metric in record.metric_names:
            alike = _MINIMISED.get(record.kind, record.kind) if metric.endswith("loss") else ""
            groups.setdefault((metric, alike), []).append(number)
    drawn = []
    for (metric, _), members in groups.items():
        if len(members) < 2 or metric in _COUNTERS:
            continue
        plain = Figure(metric, "", (), "As the runs recorded it.", folded=True)
        kinds = (*(records[number].kind for number in members), "")
        found = (places[metric, kind] for kind in kinds if (metric, kind) in places)
        place, figure, title = next(found, (len(FIGURES), plain, metric))
        series = _of_all([records[number] for number in members], [names[number] for number in members], metric, "step")
        drawn.append((place, _figure(dataclasses.replace(figure, title=title), series, [])))
    yield from (told for _, told in sorted(drawn, key=lambda entry: entry[0]))


def names_of(records: Sequence[Record]) -> list[str]:
    """A short name for each run: its folder's, or the whole path where two have the same."""
    short = [record.path.name or str(record.path) for record in records]
    return [name if short.count(name) == 1 else str(record.path) for name, record in zip(short, records, strict=True)]


def words(value: object) -> str:
    """A prompt or a completion as text, whatever it is: messages with their roles, hidden characters written out."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, list) and all(isinstance(each, dict) for each in value):
        return visible("\n".join(f"{each.get('role', '?')}: {each.get('content', '')}" for each in value))
    return visible(json.dumps(value, ensure_ascii=False))


def words_of_time(seconds: float) -> str:
    """Seconds for a person.

    >>> words_of_time(723)
    '12 min 3 s'
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    words = [(hours, "h"), (minutes, "min"), (0 if hours else left, "s")]
    return " ".join(f"{count} {unit}" for count, unit in words if count)


def flat(facts: Mapping[str, Any], before: str = "") -> list[dict[str, Any]]:
    """Names and values of nested facts, the names joined by dots."""
    rows: list[dict[str, Any]] = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{before}{name}.")
        else:
            rows.append({"name": f"{before}{name}", "value": value})
    return rows


def _scored(line: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Responses of a reward model's sample, or steps of them, with its scores and the ranks or labels that people gave."""
    told: list[dict[str, Any]] = [{"text": words(response), "facts": {}} for response in line["responses"]]
    for one, scores in zip(told, _list(line.get("scores")), strict=False):
        one["facts"] |= mapping(scores)
    judgements = [mapping(each) for each in _list(line.get("judgements"))]
    for judgement in judgements[::-1]:
        about = "" if len({each.get("criterion") for each in judgements}) == 1 else f", {judgement.get('criterion')}"
        for what in ("rank", "label"):
            for number, said in zip(_list(judgement.get("responses")), _list(judgement.get(f"{what}s")), strict=False):
                if isinstance(number, int) and 0 <= number < len(told):
                    told[number]["facts"][f"{what}{about}"] = said
    return told


def _speaks_of(message: str, name: str) -> bool:
    """Whether a message names a metric; one that is a plain word, such as reward, only where it is said what it did."""
    did = "" if re.search(r"\W|_", name) else r" (is|was|rose|fell|went) "
    return re.search(rf"(?<![\w/]){re.escape(name)}(?![\w/]){did}", message) is not None


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _some(steps: Sequence[float]) -> list[float]:
    """The first, the last, and at most four between."""
    if len(steps) <= 6:
        return list(steps)
    return [steps[round(number * (len(steps) - 1) / 5)] for number in range(6)]


def _of_all(records: Sequence[Record], names: Sequence[str], metric: str, x: str) -> list[dict[str, Any]]:
    found = []
    for record, name in zip(records, names, strict=True):
        points = points_of(record.metrics, metric, x)
        if points:
            found.append({"name": name, "metric": metric, "points": points})
    return found


def _figure(figure: Figure, series: Sequence[Mapping[str, Any]], levels: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "kind": "lines",
        "title": figure.title,
        "x_title": figure.x_title or figure.x,
        "y_title": figure.y_title,
        "read": figure.read,
        "series": list(series),
        "levels": levels,
        "marks": [],
        "cut": figure.cut,
        "folded": figure.folded,
        "alarms": list(figure.alarms),
        "over_steps": figure.x == "step",
    }


def _named(record: Record, metric: str, label: str) -> str:
    """A judge that is what was trained against is called what it is."""
    if metric not in ("objective/judge", "eval_judge", "eval_objective/judge") or not judge_is_proxy(record):
        return label
    return label.replace("the judge", "the proxy (again)").replace("judge", "proxy (again)")


def _x_of(figure: Figure, metric: str, names: Sequence[str]) -> str:
    """What lies along x: of a held-out line the held-out twin of it."""
    if figure.x == "step" or not metric.startswith("eval_"):
        return figure.x
    short = f"eval_{figure.x.rpartition('/')[2]}"
    return short if short in names else f"eval_{figure.x}"


def _levels(figure: Figure, record: Record) -> list[dict[str, Any]]:
    found = [{"y": y, "name": name} for y, name in figure.levels]
    given = {**record.config, **(record.verdict.figures if record.verdict else {})}
    for pattern, name in figure.levels_from.items():
        values = [finite(given[key]) for key in fnmatch.filter(list(given), pattern)]
        values += [record.last(key) for key in fnmatch.filter(record.metric_names, pattern)]
        value = next((each for each in values if each is not None), None)
        if value is not None and name not in [level["name"] for level in found]:
            found.append({"y": value, "name": name})
    return found


def _mark(drawn: Sequence[dict[str, Any]], alarms: Sequence[Mapping[str, Any]]) -> None:
    """Put each alarm into the charts of the metrics that it speaks of; into the first chart over steps where there is none."""
    over_steps = [figure for figure in drawn if figure["over_steps"]]
    for alarm in alarms:
        if alarm["step"] is None:
            continue
        mark = {"x": alarm["step"], "sign": str(alarm["number"])}
        places = [
            figure
            for figure in over_steps
            if {series["metric"] for series in figure["series"]} & set(alarm["metrics"])
            or any(fnmatch.fnmatch(alarm["alarm"], pattern) for pattern in figure["alarms"])
        ]
        for figure in places or over_steps[:1]:
            figure["marks"].append(mark)


def _machine(facts: Mapping[str, Any]) -> str:
    machine = mapping(facts.get("machine"))
    told = [str(machine[name]) for name in ("cpu", "device") if machine.get(name)]
    if machine.get("threads"):
        told.append("1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads")
    if facts.get("level"):
        told.append(f"level {facts['level']}")
    return ", ".join(told)
