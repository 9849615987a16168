"""Does a labeller's ranking follow something that it should not, such as the order of showing? An exact test.

For one group, Kendall's S counts pairs: +1 where the labeller ranked the first of two (shown earlier, or longer) higher, -1 where
lower, 0 for a tie. If the ranking has nothing to do with that order, all arrangements of the ranks are equally likely, S is
(untied pairs) - 2 (inversions), and inversions of a multiset have the Gaussian multinomial coefficient as their generating function
(MacMahon 1916). Groups are independent, so their sum's distribution is the convolution: no normal approximation, and the test
never raises more false alarms than its level.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_NOTHING = 1e-30
_SMALLEST = 1e-25


@dataclasses.dataclass(frozen=True)
class OrderingTest:
    """How often rankings follow an order."""

    share: float
    """Of the untied pairs: the first in the order is ranked higher. 0.5 is none; NaN without pairs."""
    num_pairs: int
    """Untied pairs."""
    num_groups: int
    """Groups with such a pair."""
    p_value: float
    """Two-sided, exact: how often rankings that have nothing to do with the order look at least as far from 0.5; 1e-25 at the least."""


def ordering_test(rankings: Iterable[Sequence[int]]) -> OrderingTest:
    """Test rankings, each a list of ranks (1 best, equal for ties) in the order that is asked about."""
    total = pairs = groups = 0
    kinds: Counter[tuple[int, ...]] = Counter()
    for ranks in rankings:
        ties = tuple(sorted(Counter(ranks).values()))
        untied = _untied_pairs(ties)
        if untied == 0:
            continue
        total += sum(
            (later > earlier) - (later < earlier) for number, later in enumerate(ranks) for earlier in ranks[:number]
        )
        pairs += untied
        groups += 1
        kinds[ties] += 1
    if pairs == 0:
        return OrderingTest(share=float("nan"), num_pairs=0, num_groups=0, p_value=1.0)
    distribution = _Distribution(np.ones(1), 0)
    for ties, count in sorted(kinds.items()):
        distribution = distribution.plus(_Distribution(_inversions(ties), 0).times(count))
    inversions = (pairs - total) // 2
    p_value = 2 * min(distribution.at_most(inversions), distribution.at_most(pairs - inversions))
    return OrderingTest(
        share=0.5 + total / (2 * pairs), num_pairs=pairs, num_groups=groups, p_value=min(1.0, max(p_value, _SMALLEST))
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of several tests (Holm 1979): below a level, the chance of any false alarm among them is at most that level."""
    order = sorted(range(len(p_values)), key=lambda number: p_values[number])
    adjusted = [1.0] * len(p_values)
    highest = 0.0
    for place, number in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[number]))
        adjusted[number] = highest
    return adjusted


def _untied_pairs(ties: Sequence[int]) -> int:
    size = sum(ties)
    return size * (size - 1) // 2 - sum(count * (count - 1) // 2 for count in ties)


@functools.cache
def _inversions(ties: tuple[int, ...]) -> Array:
    """Probability of each number of inversions of a random arrangement with these ties, f64 [untied pairs + 1]."""
    # [n]! / ([t1]! [t2]! ...) with [k] = 1 + q + ... + q^(k-1), as polynomials with whole coefficients, hence divided exactly.
    numerator = _factorial(sum(ties))
    for count in ties:
        numerator = _divide(numerator, _factorial(count))
    total = sum(numerator)
    return np.array([coefficient / total for coefficient in numerator])


def _factorial(size: int) -> list[int]:
    product = [1]
    for length in range(2, size + 1):
        grown = [0] * (len(product) + length - 1)
        for shift in range(length):
            for place, coefficient in enumerate(product):
                grown[place + shift] += coefficient
        product = grown
    return product


def _divide(numerator: list[int], denominator: list[int]) -> list[int]:
    rest = list(numerator)
    quotient = []
    for place in range(len(numerator) - len(denominator) + 1):
        # Both begin with 1.
        factor = rest[place]
        quotient.append(factor)
        for shift, coefficient in enumerate(denominator):
            rest[place + shift] -= factor * coefficient
    return quotient


@dataclasses.dataclass(frozen=True)
class _Distribution:
    """Probabilities of the whole numbers from ``start`` on, alike from both ends; ends that are next to nothing are cut."""

    probabilities: Array
    start: int

    def plus(self, other: _Distribution) -> _Distribution:
        """Of the sum of two independent numbers."""
        summed = np.convolve(self.probabilities, other.probabilities)
        cut = int(np.argmax(summed > _NOTHING))
        return _Distribution(summed[cut : len(summed) - cut], self.start + other.start + cut)

    def times(self, count: int) -> _Distribution:
        """Of the sum of so many."""
        total, square = _Distribution(np.ones(1), 0), self
        while count:
            if count & 1:
                total = total.plus(square)
            count >>= 1
            if count:
                square = square.plus(square)
        return total

    def at_most(self, number: int) -> float:
        """Probability of ``number`` or less."""
        return float(self.probabilities[: max(0, number - self.start + 1)].sum())
