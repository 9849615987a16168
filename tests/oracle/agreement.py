"""Agreement coefficients and the ordering test as their definitions read, in exact fractions: slow twins."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction


def cohen(pairs):
    """From the list of (first labeller's, second labeller's) categories."""
    n = len(pairs)
    observed = Fraction(sum(a == b for a, b in pairs), n)
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    expected = sum(Fraction(first[c] * second[c], n * n) for c in first)
    return None if expected == 1 else (observed - expected) / (1 - expected)


def fleiss(cases):
    """From the list of categories of each case, the same number everywhere."""
    n = len(cases[0])
    agreeing = [Fraction(sum(a == b for a, b in itertools.permutations(case, 2)), n * (n - 1)) for case in cases]
    observed = sum(agreeing) / len(cases)
    everything = Counter(category for case in cases for category in case)
    total = sum(everything.values())
    expected = sum(Fraction(count, total) ** 2 for count in everything.values())
    return None if expected == 1 else (observed - expected) / (1 - expected)


def alpha(units, metric):
    """Mean disagreement of two values of one unit over that of any two values, pair by pair."""
    units = [list(unit) for unit in units if len(unit) >= 2]
    values = [value for unit in units for value in unit]
    counts = Counter(values)

    def distance(a, b):
        if metric == "nominal":
            return Fraction(a != b)
        if metric == "interval":
            return (Fraction(a) - Fraction(b)) ** 2
        low, high = min(a, b), max(a, b)
        between = sum(count for value, count in counts.items() if low <= value <= high)
        return (between - Fraction(counts[a] + counts[b], 2)) ** 2

    n = len(values)
    if n == 0:
        return None
    observed = sum(
        sum(distance(a, b) for a, b in itertools.permutations(unit, 2)) / Fraction(len(unit) - 1) for unit in units
    ) / Fraction(n)
    expected = sum(distance(a, b) for a, b in itertools.permutations(values, 2)) / Fraction(n * (n - 1))
    return None if expected == 0 else 1 - observed / expected


def ordering_p_value(rankings):
    """By running through every arrangement of every list of ranks."""

    def statistic(ranks):
        return sum((b > a) - (b < a) for a, b in itertools.combinations(ranks, 2))

    spread = Counter({0: Fraction(1)})
    for ranks in rankings:
        arrangements = list(itertools.permutations(ranks))
        grown = Counter()
        for arrangement in arrangements:
            for total, probability in spread.items():
                grown[total + statistic(arrangement)] += probability / len(arrangements)
        spread = grown
    seen = sum(statistic(ranks) for ranks in rankings)
    below = sum(probability for total, probability in spread.items() if total <= seen)
    above = sum(probability for total, probability in spread.items() if total >= seen)
    return min(Fraction(1), 2 * min(below, above))
