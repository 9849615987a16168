"""report.html: the demo as one page that opens without a network. Everything that a model wrote is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ingot import world
from ingot.demo.measure import Sample
from ingot.reporting.charts import SMALL, Series, draw_chart
from ingot.reporting.page import render

Answers = Sequence[tuple[world.Document, Sequence[str]]]


def draw_page(
    report: Mapping[str, Any],
    looks: Sequence[tuple[int, Sequence[Sample]]],
    final: Sequence[Sample],
    answers: Answers,
) -> str:
    """The page.

    Parameters
    ----------
    report
        The content of report.json.
    looks
        Steps, and what the model wrote then, the same requests each time.
    final
        What the finished model wrote on these requests.
    answers
        Held-out documents, and what the finished model answers to their questions.
    """
    stages = [looks[0], looks[len(looks) // 4], looks[len(looks) // 2]] if len(looks) > 3 else list(looks)
    steps: dict[int, Sequence[Sample]] = {step: samples for step, samples in stages if step < report["steps"]}
    steps[report["steps"]] = final
    stories = [
        (sample.request.text, [(step, samples[number]) for step, samples in steps.items()])
        for number, sample in enumerate(final)
    ]
    asked = [(document, list(zip(document.questions, given, strict=True))) for document, given in answers]
    return render(
        "demo.html",
        report=report,
        loss_chart=_loss_chart(report),
        score_chart=_score_chart(report),
        stories=stories,
        asked=asked,
    )


def _loss_chart(report: Mapping[str, Any]) -> str:
    # The loss of an untrained model would press everything else to the ground.
    history = [look for look in report["history"] if look["step"]] or report["history"]
    entropy = report["true_entropy"]
    floor = [(float(history[0]["step"]), entropy), (float(history[-1]["step"]), entropy)]
    loss = [(float(look["step"]), float(look["held_out_loss"])) for look in history]
    return draw_chart(
        [Series("held-out loss", loss, dots=True), Series("true entropy", floor)],
        "Held-out loss and its floor",
        "step",
        "nats per token",
        frame=SMALL,
    )


def _score_chart(report: Mapping[str, Any]) -> str:
    history = report["history"]

    def line(name: str, values: Sequence[float]) -> Series:
        points = [(float(look["step"]), 100.0 * value) for look, value in zip(history, values, strict=True)]
        return Series(name, points, dots=True)

    return draw_chart(
        [
            line("well-formed", [look["well_formed"] for look in history]),
            line("does all as asked", [look["follows_request"]["all"] for look in history]),
            line("possible stories", [look["possible"] for look in history]),
            line("questions answered", [look["question_accuracy"] for look in history]),
        ],
        "What its stories are like at temperature 1",
        "step",
        "per cent",
        frame=SMALL,
    )
