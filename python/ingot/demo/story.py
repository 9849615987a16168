"""The demo's whole path as one page: what went into each stage, what changed, and how we know. The words are here, the numbers come in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ingot.reporting.charts import finite
from ingot.reporting.page import render
from ingot.reporting.records import Record, mapping
from ingot.reporting.tell import tell_alarms, tell_figures, words_of_time


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage in words, for someone who never trained a model."""

    title: str
    short: str
    """For the picture of the path."""
    in_a_word: str
    went_in: str
    changed: str
    known: str
    """How we know that it worked."""
    charts: tuple[str, ...] = ()
    """Titles of the figures of a run's report that belong here."""


STAGES: Mapping[str, Stage] = {
    "pretrain": Stage(
        "Pretraining",
        "reads",
        "It learns to write by reading.",
        "Plain text: short stories of a small world, made by a grammar, one after the other. Half of all combinations of person, thing and "
        "place are kept from it, so that what follows can be measured on requests that it has never seen.",
        "The network starts with random weights and babbles. At each place in the text it guesses the next token, is told the right one, and "
        "all weights move a little so that the right one would have been less of a surprise.",
        "By the loss: how surprised it is by stories that were kept from it. The grammar knows how surprising its stories really are, so "
        "there is a floor that no reader can expect to go below, and the distance to it is what is left to learn.",
        ("Loss",),
    ),
    "sft": Stage(
        "Fine-tuning on demonstrations",
        "is shown",
        "It learns to do what it is asked by seeing it done.",
        "Demonstrations: requests, each with a story that does what was asked. The same kind of training as before, on the answers alone.",
        "The model learned text; now it learns turns: someone asks, it answers, and it stops when the story is told.",
        "By requests that were held out: does the story have the person, the thing, the place and the ending that were asked for, and does it "
        "end by itself? Whether it pleases its reader it cannot know yet: the demonstrations do not heed the reader's taste.",
        ("Loss", "Answers that end by themselves"),
    ),
    "responses": Stage(
        "Several responses to each request",
        "answers",
        "It writes more than one story for each request.",
        "Requests without answers. For each of them the fine-tuned model writes several stories at random.",
        "Nothing in the model: its answers become the material that is judged.",
        "The stories must differ, or there is nothing to choose between.",
    ),
    "rankings": Stage(
        "Ranking them",
        "is judged",
        "Someone says which of the stories is better.",
        "The stories of each request side by side, in shuffled order and without a sign of where they come from.",
        "Nothing in the model either. The judgement is the only thing in all of this that says what is wanted: a whole story that does what "
        "was asked, with an encounter that its reader likes. No program is told that rule.",
        "Judges err. Here a known share of the rankings is turned round on purpose, so that what follows has to bear it.",
    ),
    "reward": Stage(
        "The reward model",
        "is scored",
        "A second model learns to judge as the rankings do.",
        "The rankings. The fine-tuned model is copied and given a single number as its output: a score.",
        "Of two stories the one that was ranked higher should score higher; whenever it does not, the weights move. Turned rankings "
        "contradict the others and average out.",
        "By pairs that were kept out and judged without noise: how often does the better story score higher? A coin gets 50 %, and so must a "
        "rule that looks at length alone.",
        ("Judged as people did",),
    ),
    "best_of_n": Stage(
        "Is the score worth following?",
        "is checked",
        "Before anything is trained on the score, it is put to the test.",
        "Held-out requests, many stories for each, and the reward model, which picks the one that it likes best.",
        "Nothing in the model. If picking by the score does not give better stories, training on it would not either, only more slowly.",
        "By the world's rule, which the reward model has never seen: the more stories it may pick from, the better the pick should be.",
    ),
    "ppo": Stage(
        "Reinforcement learning (PPO)",
        "practises",
        "It practises, and the reward model tells it how well it does.",
        "Requests without answers, and the reward model as the judge.",
        "The model writes stories, each is scored, and what led to better scores than expected becomes a little more likely. It pays a price "
        "for moving away from the model that it was: without that, it would find strange texts that only the scorer likes.",
        "By the world's rule on requests that it never saw, story by story against the model before. The score itself proves nothing: it is "
        "what the model was trained on.",
        ("Scores side by side", "Score against distance"),
    ),
    "dpo": Stage(
        "The shorter way (DPO)",
        "compares",
        "The same rankings, learned directly, without a reward model.",
        "The rankings once more, as pairs of a better and a worse story.",
        "The better story of each pair becomes more likely than the worse one, measured against the model before. Nothing is sampled or "
        "scored on the way, so it is faster.",
        "As for PPO, on the same requests.",
        ("Pairs in the right order", "Log-probability of both answers"),
    ),
    "report": Stage("The report", "is told", "What you are reading.", "", "", ""),
}

_SHARES = {
    "preferred": "stories that please their reader",
    "follows_prompt": "stories that do all that was asked",
    "well_formed": "stories of well-formed sentences",
}
_ROWS: tuple[tuple[str, str, str], ...] = (
    ("preferred", "Stories that please their reader", "share"),
    ("follows_prompt", "Stories that do all that was asked", "share"),
    ("well_formed", "Stories of well-formed sentences alone", "share"),
    ("diversity", "Diversity: entropy of its stories, nats", "number"),
    ("kl", "Distance from the model before (KL), nats a story", "number"),
)

_WORDS: Mapping[str, tuple[str, str]] = {
    "num_documents": ("texts", "number"),
    "num_tokens": ("tokens", "number"),
    "num_demonstrations": ("demonstrations", "number"),
    "num_prompts": ("requests", "number"),
    "num_responses": ("stories", "number"),
    "num_rankings": ("rankings", "number"),
    "num_pairs": ("pairs", "number"),
    "noise": ("turned round on purpose", "share"),
    "flipped": ("turned round", "share"),
    "agreement": ("agreement with the rule", "share"),
    "steps": ("steps", "number"),
    "updates": ("updates", "number"),
    "episodes": ("stories written in training", "number"),
    "num_parameters": ("weights", "number"),
    "accuracy_noiseless": ("held-out pairs in the right order", "share"),
    "reward_accuracy": ("held-out pairs in the right order", "share"),
    "accuracy_noisy": ("the same, judged with noise", "share"),
    "baseline_length": ("a rule that looks at length", "share"),
    "n": ("stories to pick from", "number"),
    "gain": ("gained by picking", "number"),
    "gain_low": ("at least, with 95 % confidence", "number"),
    "gain_high": ("at most, with 95 % confidence", "number"),
    "kl": ("distance from the model before, nats a story", "number"),
    "eval_loss": ("held-out loss, nats a token", "number"),
    "true_entropy": ("the floor under it", "number"),
    "gap": ("left to learn, nats a token", "number"),
    "eos_rate": ("end by themselves", "share"),
    "diversity": ("diversity, nats a story", "number"),
    "episodes_per_s": ("stories a second", "number"),
    "share_sampling": ("of the time spent writing", "share"),
    "share_scoring": ("of the time spent scoring", "share"),
    "share_training": ("of the time spent learning", "share"),
    "well_formed_sentences": ("of its sentences are well-formed", "share"),
    **{name: (words, "share") for name, words in _SHARES.items()},
}


def draw_story(report: Mapping[str, Any]) -> str:
    """The page.

    Parameters
    ----------
    report
        The content of report.json: figures under flat names (``preferred_before``, ``preferred_after``, ``reward_accuracy``, ...),
        ``changes``, ``targets``, ``dpo`` (a second column), ``machine``, ``samples``, and ``stages``, each with a ``name`` of
        :data:`STAGES`, ``elapsed_s``, ``budget_s``, ``figures``, ``verdict``, ``history`` (lines of its metrics.jsonl), ``charts``,
        ``samples``, ``folder`` and ``note``. Whatever is missing is left out.
    """
    stages = [_tell_stage(number, mapping(stage)) for number, stage in enumerate(_list(report.get("stages")), 1)]
    return render(
        "story.html",
        report=report,
        stages=stages,
        results=_results(report),
        missed=_missed(report),
        hero=_hero(report),
        samples=_samples(report.get("samples")),
        took=_time(report.get("elapsed_s")),
        everything=_time(report.get("total_s")),
        machine=mapping(report.get("machine")),
        rule=report.get("labeler", "rule") == "rule",
    )


def _tell_stage(number: int, stage: Mapping[str, Any]) -> dict[str, Any]:
    name = str(stage.get("name", ""))
    title = str(stage.get("title") or name or "A stage")
    words = STAGES.get(name, Stage(title, title, "", "", "", ""))
    elapsed, budget = finite(stage.get("elapsed_s")), finite(stage.get("budget_s"))
    return {
        "id": f"stage-{number}",
        "number": number,
        "name": name,
        "words": words,
        "took": _time(elapsed),
        "budget": _time(budget),
        "late": elapsed is not None and budget is not None and elapsed > budget,
        "share": min(1.0, elapsed / budget) if elapsed is not None and budget else None,
        "verdict": stage.get("verdict") if isinstance(stage.get("verdict"), Mapping) else None,
        "facts": [_fact(key, value) for key, value in mapping(stage.get("figures")).items() if _is_known(value)],
        "figures": [*_charts_of(name, stage), *_charts_given(stage)],
        "alarms": tell_alarms(_record_of(name, stage)),
        "samples": _samples(stage.get("samples")),
        "folder": stage.get("folder"),
        "note": stage.get("note"),
    }


def _record_of(name: str, stage: Mapping[str, Any]) -> Record:
    """The stage's lines of metrics in the form that reports are told from."""
    lines = [line for line in _list(stage.get("history")) if isinstance(line, Mapping)]
    return Record(
        path=Path(name or "."),
        facts={"kind": name or "run"},
        metrics=[dict(line) for line in lines if "alarm" not in line],
        alarms=[dict(line) for line in lines if "alarm" in line],
        samples=[],
        verdict=None,
        notices=[],
    )


def _charts_of(name: str, stage: Mapping[str, Any]) -> list[dict[str, Any]]:
    record = _record_of(name, stage)
    drawn = {figure["title"]: figure for figure in reversed(tell_figures(record, tell_alarms(record)))}
    charts = STAGES[name].charts if name in STAGES else tuple(drawn)[:2]
    found = [{**drawn[title], "folded": False} for title in charts if title in drawn]
    floor = finite(mapping(stage.get("figures")).get("true_entropy"))
    for figure in found:
        if figure["title"] == "Loss" and floor is not None:
            figure["levels"] = [*figure["levels"], {"y": floor, "name": "the floor"}]
    return found


def _charts_given(stage: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Charts that the demo adds, in the form of a report's figures."""
    return [
        {
            "kind": "lines",
            "x_title": "",
            "y_title": "",
            "read": "",
            "levels": [],
            "marks": [],
            "cut": False,
            "folded": False,
            **chart,
            "series": [
                {
                    "name": one["name"],
                    "metric": f"eval_{one['name']}",
                    "points": [(float(x), float(y)) for x, y in one["points"]],
                }
                for one in chart["series"]
            ],
        }
        for chart in _list(stage.get("charts"))
    ]


def _samples(given: object) -> list[dict[str, Any]]:
    return [
        {
            "prompt": str(sample.get("prompt", "")),
            "answers": [_answer(mapping(each)) for each in _list(sample.get("answers"))],
        }
        for sample in map(mapping, _list(given))
    ]


def _answer(answer: Mapping[str, Any]) -> dict[str, Any]:
    facts = dict(mapping(answer.get("facts")))
    # Said where it is so, and neither good nor bad: noise is part of the task.
    turned = " (turned round)" if facts.pop("turned", False) else ""
    return {"label": f"{answer.get('label', '')}{turned}", "text": str(answer.get("text", "")), "facts": facts}


def _results(report: Mapping[str, Any]) -> dict[str, Any]:
    """The table of figures: before, after PPO and after DPO, with the change and what was wanted."""
    dpo, targets = mapping(report.get("dpo")), mapping(report.get("targets"))
    rows = []
    for name, words, kind in _ROWS:
        before, after = finite(report.get(f"{name}_before")), finite(report.get(f"{name}_after"))
        if name == "kl":
            before, after = None, finite(report.get("kl"))
        other = finite(dpo.get("kl" if name == "kl" else f"{name}_after"))
        if before is None and after is None and other is None:
            continue
        change = mapping(mapping(report.get("changes")).get(name))
        wanted = [
            mapping(targets[key])
            for key in (f"{name}_before", f"{name}_after", f"{name}_change", name)
            if isinstance(targets.get(key), Mapping)
        ]
        rows.append(
            {
                "words": words,
                "before": _shown(before, kind),
                "after": _shown(after, kind),
                "dpo": _shown(other, kind),
                "change": _interval(change),
                # The other rows have their unit beside them; this bound is a share.
                "wanted": [
                    {"text": _bound(each) + (" of before" if name == "diversity" else ""), "met": each.get("met")}
                    for each in wanted
                ],
            }
        )
    accuracy = finite(report.get("reward_accuracy"))
    return {"rows": rows, "dpo": bool(dpo), "changes": any(row["change"] for row in rows), "reward_accuracy": accuracy}


def _missed(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Targets that were not reached, each with what was wanted and why."""
    return [
        {"name": str(name).replace("_", " "), **target, "wanted": _bound(target)}
        for name, target in mapping(report.get("targets")).items()
        if isinstance(target, Mapping) and target.get("met") is False
    ]


def _bound(target: Mapping[str, Any]) -> str:
    return str(target.get("wanted", "")).replace(">=", "≥").replace("<=", "≤")


def _hero(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The few figures that say it all."""
    found = []
    for name, words in _SHARES.items():
        before, after = finite(report.get(f"{name}_before")), finite(report.get(f"{name}_after"))
        if after is not None:
            found.append({"before": _shown(before, "share"), "after": _shown(after, "share"), "words": words})
    accuracy = finite(report.get("reward_accuracy"))
    if accuracy is not None:
        found.append(
            {
                "before": "",
                "after": _shown(accuracy, "share"),
                "words": "of held-out pairs the reward model orders rightly",
            }
        )
    return found


def _is_known(value: object) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _fact(name: str, value: object) -> dict[str, str]:
    words, kind = _WORDS.get(name, (name.replace("_", " "), "number"))
    number = finite(value)
    return {"words": words, "value": str(value) if number is None else _shown(number, kind)}


def _shown(value: float | None, kind: str) -> str:
    """A share in per cent, any other number to four digits; nothing for None.

    >>> _shown(0.9312, "share"), _shown(123456.0, "number"), _shown(1.23456, "number"), _shown(None, "share")
    ('93.1 %', '123,456', '1.235', '')
    """
    if value is None:
        return ""
    if kind == "share":
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 10_000 else f"{value:.4g}"


def _interval(change: Mapping[str, Any]) -> str:
    mean, low, high = (finite(change.get(name)) for name in ("mean", "low", "high"))
    if mean is None:
        return ""
    bounds = "" if low is None or high is None else f" ({100 * low:+.1f} to {100 * high:+.1f})"
    return f"{100 * mean:+.1f}{bounds}"


def _time(seconds: object) -> str:
    number = finite(seconds)
    return "" if number is None else words_of_time(number)


def _list(value: object) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else []
