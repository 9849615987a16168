"""``ingot agreement``."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

if TYPE_CHECKING:
    from rich.console import Console

    from ingot.feedback.agreement import Bias, CriterionReport, Estimate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far labellers agree with each other and with themselves, what sways them, and what to label again.

    Exit code 1 where people agree less than the gate asks.
    """

    rankings: Positional[str]
    """File of judgements, as `ingot label` writes it."""
    criterion: str | None = None
    """Judgements about this criterion alone; each criterion in turn unless given."""
    gate: float = 0.4
    """The least Krippendorff alpha (ordinal) with which the rankings should be trained on."""
    relabel: int = 10
    """List at most this many groups to judge again, the most disputed first."""
    draws: int = 1000
    """Bootstrap samples for the intervals."""
    seed: int = 0
    """Of the bootstrap."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Measure and print."""
        from pathlib import Path

        from ingot.errors import ConfigError, DataError
        from ingot.feedback.agreement import criteria_of, measure_agreement
        from ingot.feedback.journal import Journal

        if self.draws < 1:
            raise ConfigError(f"--draws is {self.draws}; give at least 1")
        if self.relabel < 0:
            raise ConfigError(f"--relabel is {self.relabel}; give 0 or more")
        if not Path(self.rankings).exists():
            raise DataError(f"{self.rankings}: no such file; `ingot label` makes it")
        journal = Journal(self.rankings)
        criteria = [self.criterion] if self.criterion is not None else criteria_of(journal.records)
        if not criteria:
            raise DataError(f"{self.rankings}: no judgements in it; label some groups first")
        try:
            reports = [
                measure_agreement(
                    journal.records,
                    criterion,
                    gate=self.gate,
                    num_draws=self.draws,
                    num_disputed=self.relabel,
                    seed=self.seed,
                )
                for criterion in criteria
            ]
        except DataError as error:
            raise DataError(f"{self.rankings}: {error}") from None
        if self.json:
            rows = [_without_nan(dataclasses.asdict(report)) for report in reports]
            print(json.dumps({"file": self.rankings, "notices": journal.notices, "criteria": rows}, ensure_ascii=False))
        else:
            from rich.console import Console

            console = Console(highlight=False)
            for notice in journal.notices:
                console.print(notice, style="yellow", markup=False)
            for report in reports:
                _show(console, report)
        return 1 if any(report.passed is False for report in reports) else 0


def _show(console: Console, report: CriterionReport) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from ingot.feedback.display import visible

    console.print()
    console.rule(Text(visible(report.criterion or "(no criterion named)")), align="left")
    console.print(
        f"{report.num_judgements} judgements of {report.num_groups} groups by {len(report.labelers)} "
        f"{'person' if len(report.labelers) == 1 else 'people'}; {report.num_shared} groups judged by at least two"
    )
    colour = {True: "green", False: "red", None: "yellow"}[report.passed]
    console.print()
    console.print(report.verdict, style=f"bold {colour}", markup=False)
    if report.num_shared:
        figures = Table(box=box.SIMPLE, pad_edge=False, show_header=False)
        rows: list[tuple[str, Estimate, str]] = [
            ("same outcome, of all pairs", report.agreement, "share"),
            ("same outcome where neither tied", report.strict_agreement, "share"),
            ("Fleiss' kappa", report.fleiss, "coefficient"),
            ("Krippendorff's alpha, ordinal", report.alphas["ordinal"], "coefficient"),
            ("  nominal", report.alphas["nominal"], "coefficient"),
            ("  interval", report.alphas["interval"], "coefficient"),
            ("  of ratings 1 to 7 (interval)", report.rating_alpha, "coefficient"),
            *((f"  of answers: {visible(name)}", value, "coefficient") for name, value in report.answer_alphas.items()),
        ]
        for name, value, kind in rows:
            if value.count:
                figures.add_row(Text(name), _figure(value, kind), _interval(value, kind))
        console.print(figures)
    people = Table(box=box.SIMPLE, pad_edge=False, title="Labellers", title_justify="left", title_style="bold")
    for heading in ("", "judged", "seconds", "ties", "same again", "gold right", "earlier", "longer", "without"):
        people.add_column(heading, justify="left" if not heading else "right")
    for labeler in report.labelers:
        people.add_row(
            Text(visible(labeler.name or "(nobody named)")),
            str(labeler.num_judgements),
            "-" if math.isnan(labeler.median_time_s) else f"{labeler.median_time_s:.0f}",
            f"{labeler.ties:.0%}",
            _with_interval(labeler.self_agreement),
            _with_interval(labeler.gold_accuracy),
            _bias(labeler.position),
            _bias(labeler.length),
            "-" if math.isnan(labeler.alpha_without) else f"{labeler.alpha_without:.2f}",
        )
    console.print(people)
    console.print(
        "same again: pairs with the same outcome when a group came back; earlier, longer: pairs whose response shown earlier, "
        "or longer one, was ranked higher (50% is no preference, ! is more than chance); without: alpha of the others",
        style="dim",
        markup=False,
    )
    for labeler in report.labelers:
        name = visible(labeler.name)
        gold = labeler.gold_accuracy
        if gold.count >= 10 and gold.low <= 0.5:
            console.print(
                f"{name}'s answers to gold items cannot be told from guessing ({_with_interval(gold)} right).",
                style="red",
                markup=False,
            )
        if labeler.position.alarm:
            side = "earlier" if labeler.position.test.share > 0.5 else "later"
            console.print(
                f"{name} prefers what is shown {side} ({labeler.position.test.share:.0%} of pairs ranked the one shown "
                f"earlier higher, p = {labeler.position.adjusted_p:.2g}): the order was random, so this is bias.",
                style="red",
                markup=False,
            )
        if labeler.length.alarm:
            side = "longer" if labeler.length.test.share > 0.5 else "shorter"
            console.print(
                f"{name} prefers {side} responses ({labeler.length.test.share:.0%} of pairs ranked the longer one higher, "
                f"p = {labeler.length.adjusted_p:.2g}): bias, unless they are better; compare with the others.",
                style="yellow",
                markup=False,
            )
    if len(report.pairs) > 1 or (report.pairs and report.pairs[0].num_groups):
        table = Table(box=box.SIMPLE, pad_edge=False, title="Two by two", title_justify="left", title_style="bold")
        for heading in ("", "", "groups", "same outcome", "Cohen's kappa"):
            table.add_column(heading, justify="left" if not heading else "right")
        for pair in report.pairs:
            table.add_row(
                Text(visible(pair.first)),
                Text(visible(pair.second)),
                str(pair.num_groups),
                _with_interval(pair.agreement),
                _with_interval(pair.kappa, "coefficient"),
            )
        console.print(table)
    if report.disputed:
        table = Table(box=box.SIMPLE, pad_edge=False, title="Label again", title_justify="left", title_style="bold")
        table.add_column("disagree", justify="right")
        table.add_column("group")
        table.add_column("judged by")
        table.add_column("prompt", no_wrap=True, overflow="ellipsis")
        for disputed in report.disputed:
            table.add_row(
                f"{disputed.disagreement:.0%}",
                Text(visible(disputed.group_id)),
                Text(visible(", ".join(disputed.labelers))),
                Text(visible(disputed.prompt)),
            )
        console.print(table)


def _figure(value: Estimate, kind: str) -> str:
    if math.isnan(value.value):
        return "-"
    return f"{value.value:.1%}" if kind == "share" else f"{value.value:.3f}"


def _interval(value: Estimate, kind: str) -> str:
    if math.isnan(value.low):
        return ""
    return f"{value.low:.1%} to {value.high:.1%}" if kind == "share" else f"{value.low:.3f} to {value.high:.3f}"


def _with_interval(value: Estimate, kind: str = "share") -> str:
    if math.isnan(value.value):
        return "-"
    figure, low, high = (
        f"{100 * number:.0f}" if kind == "share" else f"{number:.2f}" for number in (value.value, value.low, value.high)
    )
    return figure + "%" * (kind == "share") + ("" if math.isnan(value.low) else f" ({low} to {high})")


def _bias(bias: Bias) -> str:
    if not bias.test.num_pairs:
        return "-"
    return f"{bias.test.share:.0%}" + (" !" if bias.alarm else "")


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, dict):
        return {name: _without_nan(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value
