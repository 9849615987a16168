"""Whether learning from preferences worked: accuracy on held-out rows with its interval, alarms while it trains, the verdict at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ingot.inference.intervals import Z_95, wilson
from ingot.losses.numerics import Bools, Float64, Floats, Ints, f64
from ingot.training.alarms import Metrics, Rule, above, below_share_of_start, drifted
from ingot.training.verdicts import Verdict

MAX_EOS_FALL = 0.1
"""A run passes if the share of answers that the model ends by itself fell by no more than this."""
MAX_KL_PER_TOKEN = 0.2
"""10 nats in 50 tokens."""

_BOOTSTRAP_DRAWS = 400


# ---- how often the better answer is preferred


def pair_accuracy(margins: Floats, weights: Floats, clusters: Ints) -> tuple[float, float, float]:
    """The share of pairs with a positive margin, a margin of 0 counting half, and its 95 % interval.

    Pairs of one prompt stand or fall together: the interval is that of a ratio over prompts (normal, sample variance); Wilson's where
    the share is below 0.1 or above 0.9 or there are fewer than 40 prompts.

    Parameters
    ----------
    margins, weights
        [B]: score of the chosen less that of the rejected, and what each pair counts.
    clusters
        [B]: number of each pair's prompt, from 0.

    Returns
    -------
    share, low, high
        NaN where there is no pair.
    """
    if not len(margins):
        return math.nan, math.nan, math.nan
    hits = f64((np.sign(margins) + 1) / 2)
    total, won = np.bincount(clusters, weights), np.bincount(clusters, f64(weights) * hits)
    won, total = won[total > 0], total[total > 0]
    share, count = float(won.sum() / total.sum()), len(total)
    if count < 40 or not 0.1 <= share <= 0.9:
        return share, *wilson(share, float(total.sum() ** 2 / (total**2).sum()))
    spread = Z_95 * math.sqrt(count / (count - 1) * float(((won - share * total) ** 2).sum())) / float(total.sum())
    return share, share - spread, share + spread


def separation(scores: Floats, labels: Bools, weights: Floats, clusters: Ints) -> tuple[float, float, float]:
    """How often a good answer scores above a bad one, both drawn at random (ties half), and its 95 % interval by a bootstrap of prompts.

    Parameters
    ----------
    scores, labels, weights
        [U]: of each answer, whether it is good, and what it counts.
    clusters
        [U]: number of each answer's prompt, from 0.

    Returns
    -------
    share, low, high
        NaN where one kind is missing.
    """
    _, places = np.unique(scores, return_inverse=True)

    def share(counts: Float64) -> float:
        good = np.bincount(places, counts * labels)
        bad = np.bincount(places, counts * ~labels)
        total = float(good.sum() * bad.sum())
        return float(good @ (np.cumsum(bad) - bad / 2)) / total if total > 0 else math.nan

    w = f64(weights)
    value = share(w) if len(w) else math.nan
    if math.isnan(value):
        return value, value, value
    rng, count = np.random.default_rng(0), int(np.max(clusters)) + 1
    drawn = (np.bincount(rng.integers(0, count, count), minlength=count) for _ in range(_BOOTSTRAP_DRAWS))
    low, high = np.nanpercentile([share(w * times[clusters]) for times in drawn], [2.5, 97.5])
    return value, float(low), float(high)


# ---- while it trains


def _displacement(chosen: str, rejected: str, margins: str) -> Rule:
    def check(lines: Sequence[Metrics]) -> str | None:
        first, last = lines[0], lines[-1]
        fall = first[chosen] - last[chosen]
        if fall <= max(1.0, 0.05 * abs(first[chosen])) or last[rejected] >= first[rejected]:
            return None
        if last[margins] <= first[margins]:
            return None
        return (
            f"{chosen} fell from {first[chosen]:.4g} to {last[chosen]:.4g} and {rejected} from {first[rejected]:.4g} to "
            f"{last[rejected]:.4g} while the margin rose: probability moves to answers that are in no pair; raise --beta, add --loss-type "
            "sigmoid sft, or take --loss-type ipo"
        )

    return Rule("displacement", (chosen, rejected, margins), check)


def _kl_too_large() -> Rule:
    def check(lines: Sequence[Metrics]) -> str | None:
        kl, length = lines[-1]["eval_kl"], lines[-1]["eval_completions/mean_length"]
        if kl <= MAX_KL_PER_TOKEN * length:
            return None
        return (
            f"eval_kl is {kl:.3g} nats in answers of {length:.3g} tokens, more than 10 in 50: the model is far from its reference; "
            "raise --beta, lower --learning-rate, or stop earlier"
        )

    return Rule("far from the reference", ("eval_kl", "eval_completions/mean_length"), check)


def _ends_less() -> Rule:
    def check(lines: Sequence[Metrics]) -> str | None:
        first, last = lines[0]["eval_eos_rate"], lines[-1]["eval_eos_rate"]
        if last >= first - MAX_EOS_FALL:
            return None
        return (
            f"eval_eos_rate fell from {first:.2f} to {last:.2f}: answers no longer end; are the chosen answers much longer than the rejected "
            "ones? try --loss-type sigmoid_norm or simpo, a larger --beta, or a higher --sample-tokens if they only got longer"
        )

    return Rule("answers do not end", ("eval_eos_rate",), check)


def rules(*, held_out: bool) -> tuple[Rule, ...]:
    """What to watch; on the held-out rows where there are any, which are the same ones each time."""
    prefix = "eval_" if held_out else ""
    return (
        _displacement(f"{prefix}logps/chosen", f"{prefix}logps/rejected", f"{prefix}rewards/margins"),
        above(
            "saturated pairs",
            "rewards/saturated",
            0.5,
            "these pairs teach nothing more; stop earlier, raise --beta, or take --loss-type ipo",
            after=3,
        ),
        below_share_of_start(
            "entropy collapse",
            "eval_sample_entropy",
            0.2,
            "the model writes the same answers again and again; raise --beta",
        ),
        drifted(
            "length drift",
            "eval_completions/mean_length",
            0.5,
            "answers became much longer or shorter; do judges prefer length? try --loss-type sigmoid_norm or simpo",
        ),
        _kl_too_large(),
        _ends_less(),
    )


# ---- the end


def verdict_of(history: Sequence[Mapping[str, Any]], best_step: int | None, *, verdicts: bool) -> Verdict:
    """What the run has shown, from its metrics.jsonl at the step whose weights it keeps.

    It passes where the accuracy's interval lies above 50 % and the share of answers that the model ends by itself fell by at most
    :data:`MAX_EOS_FALL`.

    Parameters
    ----------
    best_step
        The step that the top of the run's folder holds; the last one unless given.
    verdicts
        The held-out rows are single answers, good or bad.
    """
    lines = [line for line in history if line.get("eval_accuracy") is not None]
    if not lines:
        return Verdict(
            passed=False,
            sentences=("Nothing was held out, so nothing is known of how often it prefers the better answer.",),
            figures={},
            advice="Train it again with --held-out 0.1.",
        )
    # A resumed run may have measured a step twice: the last line counts.
    kept = [line for line in lines if line["step"] == best_step] or lines
    start, end = lines[0], kept[-1]
    low, high = end["eval_accuracy_low"], end["eval_accuracy_high"]
    orders = "held-out good answers above bad ones" if verdicts else "held-out pairs as their judges did"
    sentences = [
        f"The model's implicit rewards order {_percent(end['eval_accuracy'])} of {orders} "
        f"(95 % interval {_percent(low)} to {_percent(high)}); a rule that prefers the longer answer gets {_percent(end['eval_length_accuracy'])}, "
        f"the likelihood under the model it started from {_percent(end['eval_start_accuracy'])}."
    ]
    figures: dict[str, float | int | str | None] = {"step": end["step"]}
    names = ["eval_accuracy", "eval_accuracy_low", "eval_accuracy_high", "eval_length_accuracy", "eval_start_accuracy"]
    if end["step"] == 0:
        sentences.append("At no step was its held-out loss below that of the model it started from, which was kept.")
    passed = low > 0.5
    advice = []
    if not passed:
        advice.append(
            "It is not shown to prefer better answers more often than chance: train longer or with a higher --learning-rate, give more "
            "preferences, or hold out more of them."
        )
    if end.get("eval_eos_rate") is not None and start.get("eval_eos_rate") is not None:
        before, after = start["eval_eos_rate"], end["eval_eos_rate"]
        ended = after >= before - MAX_EOS_FALL
        passed = passed and ended
        sentences.append(
            f"Its answers are {end['eval_kl']:z.2f} nats from the reference; it ends {_percent(after)} of them by itself ({_percent(before)} "
            f"before), after {end['eval_completions/mean_length']:.1f} tokens ({start['eval_completions/mean_length']:.1f} before)."
        )
        if not ended:
            advice.append(
                "Answers no longer end: take a larger --beta, a length-normalised loss (--loss-type sigmoid_norm), or fewer steps."
            )
        names += ["eval_kl", "eval_eos_rate", "eval_completions/mean_length"]
        figures["start_eos_rate"], figures["start_mean_length"] = before, start["eval_completions/mean_length"]
    figures |= {name: end[name] for name in names}
    return Verdict(passed=passed, sentences=tuple(sentences), figures=figures, advice=" ".join(advice))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
