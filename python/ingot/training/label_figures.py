"""What a reward model's scores are worth where answers, or their steps, have labels: beside rules that need no network.

A score is the log odds of a true label: above 0 it says true. Two questions are asked of it. How often is it on its label's side
(accuracy)? And how often does a true case score above a false one (area under the ROC curve, AUC), which is what best of n and
reinforcement learning live by, and which no share of true labels makes easy?

Shape legend: E scores, k criteria, L labels.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ingot.data.chat import Encoded
from ingot.inference.intervals import Share, area_under_curve, share_of
from ingot.losses.numerics import Float64, Floats, Metrics, f64, log_sigmoid
from ingot.losses.reward import expected_calibration_error
from ingot.training.rankings import Labels, Numbers, Pairs, Ranked
from ingot.training.reward_figures import BagOfWords, as_percent, reward_figures, scored_lengths
from ingot.training.verdicts import Verdict

_MOST_LEARNT = 20000


def label_hits(scores: Floats, labels: Labels) -> Float64:
    """Of each label, f64 [L]: 1 where its score of [E, k] is on its side of 0, half at 0."""
    return _sides(scores[labels.places, labels.criteria], labels.true)


def _sides(scores: Floats, true: npt.NDArray[np.bool_]) -> Float64:
    return f64((np.sign(scores) * np.where(true, 1, -1) + 1) / 2)


def label_figures(
    scores: Floats, lengths: npt.NDArray[np.int64], labels: Labels, criteria: Sequence[str], *, in_steps: bool
) -> Metrics:
    """Figures of all criteria together, and of each (``NAME/CRITERION``) where there are several.

    ``accuracy`` and ``auc`` with their 95 % intervals (``accuracy_low``, ``accuracy_high``, and so on; the prompts are the unit), ``nll`` in nats
    a label (ln 2 without knowledge), ``ece`` (expected calibration error in 10 bins), and of the scores what
    :func:`~ingot.training.reward_figures.reward_figures` has. Of answers in steps ``first_error_accuracy``: the share of answers whose first wrong
    step is the first that scores below 0, or that have none; and ``position_correlation`` for ``length_correlation``, since that steps which come
    later are wrong more often is no fault. What there are no labels for is left out.
    """
    figures = _figures(scores, lengths, labels, in_steps)
    if len(criteria) > 1:
        for number, name in enumerate(criteria):
            mine = dataclasses.replace(labels.of(number), criteria=np.zeros(len(labels.of(number)), np.int64))
            for key, value in _figures(scores[:, [number]], lengths, mine, in_steps).items():
                figures[f"{key}/{name}"] = value
    return figures


def _figures(scores: Floats, lengths: npt.NDArray[np.int64], labels: Labels, in_steps: bool) -> Metrics:
    figures = reward_figures(scores, lengths)
    if in_steps and figures:
        figures["position_correlation"] = figures.pop("length_correlation")
    if not len(labels):
        return figures
    own = f64(scores[labels.places, labels.criteria])
    accuracy = share_of(label_hits(scores, labels), labels.groups)
    nll = -log_sigmoid(np.where(labels.true, own, -own))
    figures |= {
        "accuracy": accuracy.value,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "nll": float(nll.mean()),
        "ece": expected_calibration_error(own, f64(labels.true)),
    }
    area = area_under_curve(own, labels.true, labels.groups)
    if area.num_cases:
        figures |= {"auc": area.value, "auc_low": area.low, "auc_high": area.high}
    if in_steps:
        found = first_error_hits(own, labels)
        figures["first_error_accuracy"] = float(found.mean())
    return figures


def first_error_hits(scores: Floats, labels: Labels) -> Float64:
    """Of each row, f64 [R]: whether the first step with a score [L] below 0 is the first that is labelled wrong, or neither has one."""
    hits = []
    for low, high in itertools.pairwise(labels.offsets.tolist()):
        said, true = np.append(scores[low:high] < 0, True), np.append(~labels.true[low:high], True)
        hits.append(float(np.argmax(said) == np.argmax(true)))
    return f64(hits)


# ---- what needs no network


def length_rule(lengths: npt.NDArray[np.int64], true: npt.NDArray[np.bool_]) -> Callable[[npt.ArrayLike], Float64]:
    """Scores of lengths by the one threshold, and the side of it that is true, that are right most often on these [L]: above 0 says true.

    What is on the threshold's side scores higher the farther it is from it.
    """
    values = np.unique(lengths)
    if not len(values):
        return lambda found: np.zeros(len(f64(found)))
    # True above, for a threshold below everything and behind each length.
    thresholds = np.concatenate([[values[0] - 0.5], values + 0.5])
    place = np.searchsorted(thresholds, lengths)
    above = (
        np.bincount(place[true], minlength=len(thresholds) + 1),
        np.bincount(place[~true], minlength=len(thresholds) + 1),
    )
    right = true.sum() - np.cumsum(above[0])[:-1] + np.cumsum(above[1])[:-1]
    best, worst = int(np.argmax(right)), int(np.argmin(right))
    sign, chosen = (1.0, best) if right[best] >= len(true) - right[worst] else (-1.0, worst)
    return lambda found: f64(sign * (f64(found) - thresholds[chosen]))


class LabelledWords:
    """Logistic regression on which tokens an answer has, up to where it is labelled: what can be said without reading in order.

    It is :class:`~ingot.training.reward_figures.BagOfWords` on pairs of a case and a text without any token; ``constant``, an id that no text has,
    is in all cases.
    """

    def __init__(self, sequences: Sequence[Encoded], labels: Labels, constant: int) -> None:
        self._constant = constant
        kept = slice(None, None, max(1, -(-len(labels) // _MOST_LEARNT)))
        cases = self._cases(sequences, labels.places[kept])
        true, numbers, nothing = labels.true[kept], np.arange(len(cases)), np.full(len(cases), len(cases))
        ones, zeros = np.ones(len(cases)), np.zeros(len(cases))
        better, worse = np.where(true, numbers, nothing), np.where(true, nothing, numbers)
        pairs = Pairs(better, worse, zeros.astype(np.int64), ones, ones, zeros, labels.groups[kept])
        self._words = BagOfWords([*cases, _of([])], pairs)

    def _cases(self, sequences: Sequence[Encoded], places: Numbers) -> list[Encoded]:
        ends = [(each, end) for each in sequences for end in each.ends]
        cut = [(sequence.ids[: end + 1][sequence.mask[: end + 1]]) for sequence, end in (ends[at] for at in places)]
        return [_of([*ids, self._constant]) for ids in cut]

    def scores(self, sequences: Sequence[Encoded], labels: Labels) -> Float64:
        """f64 [L]"""
        return self._words.scores(self._cases(sequences, labels.places))


def _of(ids: Sequence[int]) -> Encoded:
    return Encoded(np.array(ids, np.int32), np.ones(len(ids), np.bool_))


# ---- in words


@dataclasses.dataclass(frozen=True)
class Scored:
    """How often on the right side, and how often a true case above a false one."""

    accuracy: Share
    auc: Share

    @classmethod
    def of(cls, scores: Floats, labels: Labels) -> Scored:
        """Of scores [L]."""
        return cls(
            share_of(_sides(scores, labels.true), labels.groups), area_under_curve(scores, labels.true, labels.groups)
        )


@dataclasses.dataclass(frozen=True)
class LabelComparison:
    """What the same held-out labels say of the model and of rules."""

    name: str
    """Of the criterion; empty where there is one without a name."""
    model: Scored
    majority: Scored
    """Always says what most labels in training say."""
    length: Scored
    """One threshold on the length, from training."""
    words: Scored
    """Bag of words."""
    first_error: Share
    """Answers whose first wrong step is found; of no case where answers are judged whole."""

    @property
    def passed(self) -> bool:
        """A true case scores above a false one more often than by chance, beyond the interval, and more often than by length."""
        return self.model.auc.low > 0.5 and self.model.auc.value > self.length.auc.value


def compare_labels(
    name: str, scores: Floats, criterion: int, train: Ranked, held_out: Ranked, *, in_steps: bool
) -> LabelComparison:
    """Scores [E, k] of the held-out answers and rules that learn from the training labels, on the held-out labels of a criterion."""
    learned, judged = train.labels().of(criterion), held_out.labels().of(criterion)
    rule = length_rule(scored_lengths(train.sequences)[learned.places], learned.true)
    constant = 1 + max(int(each.ids.max()) for each in (*train.sequences, *held_out.sequences))
    words = LabelledWords(train.sequences, learned, constant)
    usual = np.full(len(judged), 1.0 if 2 * learned.true.sum() >= len(learned) else -1.0)
    own = f64(scores[judged.places, criterion])
    rows = judged.groups[judged.offsets[:-1]]
    return LabelComparison(
        name,
        Scored.of(own, judged),
        Scored.of(usual, judged),
        Scored.of(rule(scored_lengths(held_out.sequences)[judged.places]), judged),
        Scored.of(words.scores(held_out.sequences, judged), judged),
        share_of(first_error_hits(own, judged) if in_steps else [], rows if in_steps else []),
    )


def verdict_of_labels(comparisons: Sequence[LabelComparison], *, in_steps: bool) -> Verdict:
    """Whether reinforcement learning may follow the model: each criterion's :attr:`LabelComparison.passed`."""
    sentences: list[str] = []
    figures: dict[str, float | int | str | None] = {}
    case, good, bad = ("step", "right", "wrong") if in_steps else ("answer", "wanted", "unwanted")
    for each in comparisons:
        ending = f"/{each.name}" if each.name else ""
        subject = f"On {each.name}, the reward model" if each.name else "The reward model"
        right, area = each.model.accuracy, each.model.auc
        if not area.num_cases:
            known = f"{right.num_cases:,} held-out {case}s of one label" if right.num_cases else f"no held-out {case}"
            sentences.append(f"{subject} was measured on {known}, which tells nothing apart.")
            continue
        # Two figures that look alike say nothing about which is the larger.
        digits = 1 if round(100 * area.value) == round(100 * each.length.auc.value) else 0
        sentences += [
            f"{subject} says of {as_percent(right)} of {right.num_cases:,} held-out {case}s rightly whether they are {good} "
            f"(95 % interval {100 * right.low:.0f} to {100 * right.high:.0f}); always saying the same gets {as_percent(each.majority.accuracy)}, "
            f"a rule by length {as_percent(each.length.accuracy)}, a bag of words {as_percent(each.words.accuracy)}.",
            f"A {good} {case} scores above {'an' if bad[0] == 'u' else 'a'} {bad} one in {as_percent(area, digits)} of cases "
            f"({100 * area.low:.0f} to {100 * area.high:.0f}); by chance it is 50 %, by length {as_percent(each.length.auc, digits)}, "
            f"by a bag of words {as_percent(each.words.auc)}.",
        ]
        figures |= {
            f"accuracy{ending}": right.value,
            f"accuracy_low{ending}": right.low,
            f"accuracy_high{ending}": right.high,
            f"accuracy_majority{ending}": each.majority.accuracy.value,
            f"accuracy_length{ending}": each.length.accuracy.value,
            f"accuracy_bag_of_words{ending}": each.words.accuracy.value,
            f"auc{ending}": area.value,
            f"auc_low{ending}": area.low,
            f"auc_high{ending}": area.high,
            f"auc_length{ending}": each.length.auc.value,
            f"auc_bag_of_words{ending}": each.words.auc.value,
            f"num_labels{ending}": right.num_cases,
            f"num_prompts{ending}": right.num_prompts,
        }
        if each.first_error.num_cases:
            sentences.append(
                f"It finds the first wrong step, or that there is none, in {as_percent(each.first_error)} of "
                f"{each.first_error.num_cases:,} answers."
            )
            figures[f"first_error_accuracy{ending}"] = each.first_error.value
    measured = [each for each in comparisons if each.model.auc.num_cases]
    passed = bool(measured) and len(measured) == len(comparisons) and all(each.passed for each in comparisons)
    advice = ""
    if not measured or len(measured) < len(comparisons):
        advice = "Hold prompts of both labels out (--held-out) to see what it is worth."
    elif not passed:
        advice = "It is no better than chance or than length: give more rows, look whether the labels are right, or change the learning rate."
    return Verdict(passed=passed, sentences=tuple(sentences), figures=figures, advice=advice)


def nothing_compared(name: str) -> LabelComparison:
    """Where nothing is held out."""
    nothing = Share(math.nan, math.nan, math.nan, 0, 0)
    none = Scored(nothing, nothing)
    return LabelComparison(name, none, none, none, none, nothing)
