"""What a reward model's scores are worth: how often they order held-out pairs as people did, beside rules that need no network.

Shape legend: S responses, k criteria, P pairs.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from ingot.data.chat import Encoded
from ingot.inference.intervals import Share, share_of
from ingot.losses.numerics import Float64, Floats, Metrics, f64, log_sigmoid, sigmoid
from ingot.losses.reward import expected_calibration_error, length_correlation
from ingot.training.rankings import Pairs, Ranked
from ingot.training.verdicts import Verdict

LENGTH_BINS = ("much_shorter", "shorter", "similar", "longer", "much_longer")
"""Of the better response beside the worse one: difference over the longer's length below -0.5, -0.1, 0.1, 0.5, and above."""
_EDGES = (-0.5, -0.1, 0.1, 0.5)
_MIN_PAIRS = 20


def scored_lengths(sequences: Iterable[Encoded]) -> npt.NDArray[np.int64]:
    """Tokens of each response up to where it is scored, that one included, i64 [E]: of a whole response all of them."""
    return np.array([np.count_nonzero(each.mask[: end + 1]) for each in sequences for end in each.ends], np.int64)


def hits_of(scores: Floats, pairs: Pairs) -> Float64:
    """Of each pair, f64 [P]: the probability that people's judgement agrees with the order of the scores [S, k]; half for equal ones."""
    gap = scores[pairs.better, pairs.criteria] - scores[pairs.worse, pairs.criteria]
    return f64(np.where(gap > 0, pairs.labels, np.where(gap < 0, 1 - pairs.labels, 0.5)))


def pair_figures(scores: Floats, lengths: npt.NDArray[np.int64], pairs: Pairs, criteria: Sequence[str]) -> Metrics:
    """Figures of all criteria together, and of each (``NAME/CRITERION``) where there are several.

    ``accuracy`` of pairs with its interval (``accuracy_low``, ``accuracy_high``), ``margin`` and ``margin_std`` (mean and standard deviation
    of better - worse), ``nll`` in nats a pair (ln 2 without knowledge), ``ece`` (expected calibration error in 10 bins),
    ``accuracy_when_BIN`` by difference of length, ``length_slope``: accuracy where the better response is the longer one minus where it is
    the shorter one; and of the scores ``mean_reward``, ``reward_std``, ``min_reward``, ``max_reward``, ``length_correlation``. What there are no pairs
    for is left out.
    """
    figures = _figures(scores, lengths, pairs)
    if len(criteria) > 1:
        for number, name in enumerate(criteria):
            for key, value in _figures(scores[:, [number]], lengths, pairs.of(number), column=0).items():
                figures[f"{key}/{name}"] = value
    return figures


def reward_figures(scores: Floats, lengths: npt.NDArray[np.int64]) -> Metrics:
    """Of scores [E, k] alone: ``mean_reward``, ``reward_std``, ``min_reward``, ``max_reward``, ``length_correlation`` (the strongest of a criterion)."""
    if not scores.size:
        return {}
    return {
        "mean_reward": float(scores.mean()),
        "reward_std": float(scores.std(axis=0).min()),
        "min_reward": float(scores.min()),
        "max_reward": float(scores.max()),
        "length_correlation": max((length_correlation(each, lengths) for each in scores.T), key=abs),
    }


def _figures(scores: Floats, lengths: npt.NDArray[np.int64], pairs: Pairs, column: int | None = None) -> Metrics:
    pairs = pairs if column is None else dataclasses.replace(pairs, criteria=np.full(len(pairs), column, np.int64))
    figures = reward_figures(scores, lengths)
    if not len(pairs):
        return figures
    hits = hits_of(scores, pairs)
    share = share_of(hits, pairs.groups)
    margins = f64(scores[pairs.better, pairs.criteria] - scores[pairs.worse, pairs.criteria])
    nll = -pairs.labels * log_sigmoid(margins) - (1 - pairs.labels) * log_sigmoid(-margins)
    figures |= {
        "accuracy": share.value,
        "accuracy_low": share.low,
        "accuracy_high": share.high,
        "margin": float(margins.mean()),
        "margin_std": float(margins.std()),
        "nll": float(nll.mean()),
        "ece": expected_calibration_error(margins, pairs.labels),
    }
    better, worse = lengths[pairs.better], lengths[pairs.worse]
    difference = (better - worse) / np.maximum(np.maximum(better, worse), 1)
    bins = np.digitize(difference, _EDGES)
    for number, name in enumerate(LENGTH_BINS):
        if (bins == number).any():
            figures[f"accuracy_when_{name}"] = float(hits[bins == number].mean())
    shorter, longer = bins < 2, bins > 2
    if min(np.count_nonzero(shorter), np.count_nonzero(longer)) >= _MIN_PAIRS:
        figures["length_slope"] = float(hits[longer].mean() - hits[shorter].mean())
    return figures


# ---- what needs no network


def length_hits(lengths: npt.NDArray[np.int64], pairs: Pairs) -> Float64:
    """What the rule that prefers the longer response gets, f64 [P]."""
    return hits_of(np.repeat(f64(lengths)[:, None], int(pairs.criteria.max(initial=0)) + 1, axis=1), pairs)


class BagOfWords:
    """Logistic regression on which tokens two responses differ in: what can be said without reading in order.

    A response is ln(1 + count) of each token, over the root mean square of that in training; the weights minimise the negative
    log-likelihood of the pairs plus half their squared length, by accelerated gradient descent (Nesterov 1983).
    """

    _MAX_PAIRS = 20000
    _STEPS = 150

    def __init__(self, sequences: Sequence[Encoded], pairs: Pairs) -> None:
        kept = slice(None, None, max(1, -(-len(pairs) // self._MAX_PAIRS)))
        better, worse, labels = pairs.better[kept], pairs.worse[kept], pairs.labels[kept]
        rows, columns, values = _counts(sequences)
        num, width = len(sequences), int(columns.max(initial=0)) + 1
        self._scale = np.sqrt(np.bincount(columns, values**2, minlength=width) / max(num, 1))
        values = values / self._scale[columns]

        def margins_of(weights: Float64) -> Float64:
            scores = np.bincount(rows, values * weights[columns], minlength=num)
            return f64(scores[better] - scores[worse])

        def back(slopes: Float64) -> Float64:
            spread = np.bincount(better, slopes, minlength=num) - np.bincount(worse, slopes, minlength=num)
            return f64(np.bincount(columns, values * spread[rows], minlength=width))

        # The largest curvature, by power iteration; a step of its inverse always goes down.
        direction, largest = np.full(width, width**-0.5), 0.0
        for _ in range(20):
            turned = back(margins_of(direction))
            largest = float(np.sqrt(turned @ turned))
            direction = turned / max(largest, 1e-300)
        rate = 1 / (1 + 0.3 * largest)
        weights = ahead = np.zeros(width)
        for step in range(self._STEPS if len(better) else 0):
            margins = margins_of(ahead)
            gradient = back((1 - labels) * sigmoid(margins) - labels * sigmoid(-margins)) + ahead
            after = ahead - rate * gradient
            weights, ahead = after, after + step / (step + 3) * (after - weights)
        self._weights = weights

    def scores(self, sequences: Sequence[Encoded]) -> Float64:
        """f64 [S]; tokens that training did not have count nothing."""
        rows, columns, values = _counts(sequences)
        known = columns < len(self._weights)
        rows, columns, values = rows[known], columns[known], values[known]
        scale = np.where(self._scale > 0, self._scale, 1.0)
        return f64(np.bincount(rows, values / scale[columns] * self._weights[columns], minlength=len(sequences)))


def _counts(
    sequences: Sequence[Encoded],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Float64]:
    """Numbers of sequences, tokens of their responses, and ln(1 + count)."""
    rows, columns, counts = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for number, sequence in enumerate(sequences):
        ids, count = np.unique(sequence.ids[sequence.mask], return_counts=True)
        rows.append(np.full(len(ids), number))
        columns.append(ids.astype(np.int64))
        counts.append(count)
    return np.concatenate(rows), np.concatenate(columns), np.log1p(np.concatenate(counts))


def people_agree(ranked: Iterable[Ranked]) -> Share:
    """How often two people who both ranked two responses unequal ranked them alike: what an accuracy can be compared with.

    Of each prompt and criterion, the first judgement of each person counts; every two people are compared on every pair that both
    ordered. It is the ``strict_agreement`` of :func:`ingot.feedback.agreement.measure_agreement`. NaN where no pair was judged by two.
    """
    hits: list[float] = []
    prompts: list[int] = []
    number = 0
    for part in ranked:
        for made in part.judgements:
            number += 1
            by_person: dict[tuple[int, str], dict[tuple[int, int], int]] = {}
            for judgement in made:
                if judgement.annotator is None:
                    continue
                outcomes = {
                    (min(better, worse), max(better, worse)): 0 if tied else 1 if better < worse else -1
                    for better, worse, tied in judgement.pairs(ties=True)
                }
                known = by_person.setdefault((judgement.criterion, judgement.annotator), {})
                by_person[judgement.criterion, judgement.annotator] = {**outcomes, **known}
            by_criterion: defaultdict[int, list[dict[tuple[int, int], int]]] = defaultdict(list)
            for (criterion, _), outcomes in by_person.items():
                by_criterion[criterion].append(outcomes)
            for people in by_criterion.values():
                for first, second in itertools.combinations(people, 2):
                    shared = [pair for pair in first.keys() & second.keys() if first[pair] and second[pair]]
                    both = [first[pair] == second[pair] for pair in shared]
                    hits += map(float, both)
                    prompts += [number] * len(both)
    return share_of(hits, prompts)


# ---- in words


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Accuracies on the same held-out pairs."""

    name: str
    """Of the criterion; empty where there is one without a name."""
    model: Share
    longer: Share
    shorter: Share
    words: Share
    """Bag of words."""

    @property
    def length_rule(self) -> Share:
        """The better one of the two."""
        return max(self.longer, self.shorter, key=lambda share: share.value)

    @property
    def passed(self) -> bool:
        """The accuracy is above chance beyond its interval, and above that of the length rule."""
        return self.model.low > 0.5 and self.model.value > self.length_rule.value


def verdict_of(comparisons: Sequence[Comparison], people: Share) -> Verdict:
    """Whether reinforcement learning may follow the model: each criterion's :attr:`Comparison.passed`.

    ``people`` is how far people agree with each other; NaN where that cannot be measured.
    """
    sentences: list[str] = []
    figures: dict[str, float | int | str | None] = {}
    for each in comparisons:
        ending = f"/{each.name}" if each.name else ""
        subject = f"On {each.name}, the reward model" if each.name else "The reward model"
        if not each.model.num_cases:
            sentences.append(f"{subject} was measured on no held-out pair.")
            continue
        rule = "longer" if each.longer.value >= each.shorter.value else "shorter"
        # Two figures that look alike say nothing about which is the larger.
        digits = 1 if round(100 * each.model.value) == round(100 * each.length_rule.value) else 0
        sentences.append(
            f"{subject} orders {as_percent(each.model, digits)} of {each.model.num_cases:,} held-out pairs as people did "
            f"(95 % interval {100 * each.model.low:.0f} to {100 * each.model.high:.0f}); a rule that prefers the {rule} answer gets "
            f"{as_percent(each.length_rule, digits)}, a bag of words {as_percent(each.words)}."
        )
        figures |= {
            f"accuracy{ending}": each.model.value,
            f"accuracy_low{ending}": each.model.low,
            f"accuracy_high{ending}": each.model.high,
            f"accuracy_longer_wins{ending}": each.longer.value,
            f"accuracy_shorter_wins{ending}": each.shorter.value,
            f"accuracy_bag_of_words{ending}": each.words.value,
            f"num_pairs{ending}": each.model.num_cases,
            f"num_prompts{ending}": each.model.num_prompts,
        }
    if people.num_cases:
        sentences.append(f"People agree with each other on {as_percent(people)} of {people.num_cases:,} pairs.")
        figures |= {
            "people_agreement": people.value,
            "people_agreement_low": people.low,
            "people_agreement_high": people.high,
        }
    else:
        sentences.append("How far people agree with each other is not known: no pair was judged by two of them.")
    measured = [each for each in comparisons if each.model.num_cases]
    passed = bool(measured) and len(measured) == len(comparisons) and all(each.passed for each in comparisons)
    if people.num_cases and any(each.model.low > people.high for each in measured):
        sentences.append(
            "That is more than people agree on: look for prompts or answers that are in training and held out alike."
        )
    advice = ""
    if not measured or len(measured) < len(comparisons):
        advice = "Hold prompts out (--held-out) to see what it is worth."
    elif not passed:
        advice = (
            "It is no better than chance or than length: collect more judgements, see how far people agree (ingot agreement), "
            "or change the learning rate."
        )
    return Verdict(passed=passed, sentences=tuple(sentences), figures=figures, advice=advice)


def as_percent(share: Share, digits: int = 0) -> str:
    """A share in words."""
    return f"{100 * share.value:.{digits}f} %"
