"""What fine-tuning on demonstrations watches, and what it says at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ingot.data.examples import Examples
from ingot.inference.intervals import wilson
from ingot.training.alarms import Metrics, Rule
from ingot.training.verdicts import Verdict

_MIN_ENDED = 0.5
"""Of the answers that a model should end by itself, the share that it has to."""
_MIN_FALL = 0.002
"""Share of itself by which the held-out loss has to fall; anything less is no learning."""
_MAX_RISE = 0.02
"""Share of its lowest value by which the held-out loss may rise again."""


def share_within(examples: Examples, max_tokens: int) -> float:
    """Share of the rows whose first answer, with the token that ends it, has at most ``max_tokens`` tokens; NaN without rows."""
    lengths = []
    for sequence, *_ in examples.groups:
        answer = sequence.mask[int(np.argmax(sequence.mask)) :]
        lengths.append(len(answer) if answer.all() else int(np.argmin(answer)))
    return float(np.mean(np.array(lengths) <= max_tokens)) if lengths else float("nan")


def rules() -> tuple[Rule, ...]:
    """What to watch."""
    return (_memorises(),)


def _memorises() -> Rule:
    def check(lines: Sequence[Metrics]) -> str | None:
        best, last = min(line["eval_loss"] for line in lines), lines[-1]["eval_loss"]
        if last <= best * (1.0 + _MAX_RISE):
            return None
        return (
            f"eval_loss is {last:.4g}, up from {best:.4g}: the model learns its demonstrations by heart; take fewer epochs, a lower "
            "--learning-rate, or more demonstrations (the weights of the lowest loss are kept)"
        )

    return Rule("memorising", ("eval_loss",), check)


def verdict_of(
    history: Sequence[Mapping[str, Any]], best_step: int | None, *, num_answers: int, max_tokens: int, within: float
) -> Verdict:
    """Whether the weights that the run keeps answer as the demonstrations do, from its metrics.jsonl.

    It passes where the held-out loss fell by more than a trifle, and the model is not shown to end less than half as many answers by itself as the
    demonstrations do within the same number of tokens (upper bound of the 95 % interval). What was not measured is not held against it,
    unless nothing was.

    Parameters
    ----------
    best_step
        The step that the top of the run's folder holds; the last one unless given.
    num_answers, max_tokens
        How many answers each evaluation drew, and how long they may become.
    within
        Share of the demonstrations whose answers are no longer than that (:func:`share_within`).
    """
    lines = [line for line in history if line.get("eval_loss") is not None or line.get("eval_eos_rate") is not None]
    if not lines:
        return Verdict(
            passed=False,
            sentences=("Nothing was held out and no answer was drawn, so nothing is known of what it learned.",),
            figures={},
            advice="Train it again with --held-out 0.1.",
        )
    start, end = lines[0], ([line for line in lines if line["step"] == best_step] or lines)[-1]
    figures: dict[str, float | int | str | None] = {"step": end["step"]}
    sentences, advice = [], []
    if end.get("eval_loss") is None:
        sentences.append("Nothing was held out, so its loss on new rows is not known.")
    else:
        sentences.append(
            f"On held-out rows the loss went from {start['eval_loss']:.3f} to {end['eval_loss']:.3f} nats a token, and the likeliest "
            f"token is the right one {_percent(end['eval_mean_token_accuracy'])} of the time "
            f"({_percent(start['eval_mean_token_accuracy'])} before)."
        )
        for name in ("eval_loss", "eval_mean_token_accuracy"):
            figures |= {f"{name}_before": start[name], f"{name}_after": end[name]}
        if end["eval_loss"] > start["eval_loss"] * (1.0 - _MIN_FALL):
            advice.append(
                "It learned next to nothing: train longer, change --learning-rate, or look at the rows with ingot data show."
            )
    if end.get("eval_eos_rate") is not None and num_answers:
        ended = round(end["eval_eos_rate"] * num_answers)
        _, high = wilson(end["eval_eos_rate"], num_answers)
        sentences.append(
            f"It ends {ended} of {num_answers} answers by itself within {max_tokens} tokens "
            f"({round(start['eval_eos_rate'] * num_answers)} before); {_percent(within)} of the demonstrations are that short."
        )
        figures |= {"eval_eos_rate_before": start["eval_eos_rate"], "eval_eos_rate_after": end["eval_eos_rate"]}
        figures["demonstrations_within"] = within
        if high < _MIN_ENDED * within:
            advice.append(
                "Its answers do not end: train longer, and see in ingot data show that the end of turn is trained."
            )
    return Verdict(passed=not advice, sentences=tuple(sentences), figures=figures, advice=" ".join(advice))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
