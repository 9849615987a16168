"""Coefficients of agreement: Cohen's kappa, Fleiss' kappa, Krippendorff's alpha.

All are 1 for perfect agreement and 0 for what chance gives; NaN where nothing can be said (too few values, or one value throughout).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Metric = Literal["nominal", "ordinal", "interval"]


def cohen_kappa(table: npt.ArrayLike) -> float:
    """kappa = (p_o - p_e) / (1 - p_e), with p_e from the two labellers' own frequencies (Cohen 1960).

    Parameters
    ----------
    table
        [C, C]: how often (or in what share of cases) labeller one chose the row's category and labeller two the column's.
    """
    counts = np.asarray(table, dtype=np.float64)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"table has shape {counts.shape}; it is square, one row and column a category")
    total = counts.sum()
    if total <= 0:
        return float("nan")
    shares = counts / total
    observed = float(np.trace(shares))
    expected = float(shares.sum(axis=1) @ shares.sum(axis=0))
    return _beyond_chance(observed, expected)


def confusion_table(first: Sequence[Hashable], second: Sequence[Hashable]) -> Array:
    """[C, C] counts of two labellers' categories for the same cases, categories in the order of first appearance."""
    if len(first) != len(second):
        raise ValueError(f"{len(first)} categories against {len(second)}; give one of each for every case")
    index: dict[Hashable, int] = {}
    for category in (*first, *second):
        index.setdefault(category, len(index))
    table = np.zeros((len(index), len(index)))
    for a, b in zip(first, second, strict=True):
        table[index[a], index[b]] += 1
    return table


def fleiss_kappa(counts: npt.ArrayLike) -> float:
    """Agreement of several labellers, not necessarily the same for each case (Fleiss 1971).

    Parameters
    ----------
    counts
        [N, C]: how many labellers put case i into category c; the same number n >= 2 of labellers for each case.
    """
    table = np.asarray(counts, dtype=np.float64)
    if table.ndim != 2:
        raise ValueError(f"counts has {table.ndim} dimensions; it has two, cases by categories")
    if table.shape[0] == 0:
        return float("nan")
    raters = table.sum(axis=1)
    n = raters[0]
    if n < 2 or np.any(raters != n):
        raise ValueError("every case needs the same number of labellers, at least 2")
    observed = float(np.mean((np.square(table).sum(axis=1) - n) / (n * (n - 1))))
    expected = float(np.square(table.sum(axis=0) / table.sum()).sum())
    return _beyond_chance(observed, expected)


def krippendorff_alpha(units: Sequence[Sequence[float]], metric: Metric) -> float:
    """alpha = 1 - D_o / D_e from the values that each unit got, however many (Krippendorff, Content Analysis, ch. 12).

    Parameters
    ----------
    units
        The values of each unit; missing ones are simply not there. Units with fewer than two values say nothing.
    metric
        nominal: equal or not. ordinal: values only have an order. interval: squared differences.
    """
    return Coincidences(units).alpha(metric)


class Coincidences:
    """How often two values met in one unit: all that alpha needs, kept by unit so that units can be drawn again.

    Each unit of m values adds 1 / (m - 1) for every ordered pair of them, so each value counts once.
    """

    def __init__(self, units: Sequence[Sequence[float]]) -> None:
        pairable = [(number, values) for number, values in enumerate(units) if len(values) >= 2]
        self.values: Array = np.unique([value for _, values in pairable for value in values]).astype(np.float64)
        self.num_units = len(pairable)
        size = len(self.values)
        cells: list[npt.NDArray[np.int64]] = []
        weights: list[Array] = []
        owners: list[npt.NDArray[np.int64]] = []
        for number, values in pairable:
            codes = np.searchsorted(self.values, np.asarray(values, dtype=np.float64))
            met = (codes[:, None] * size + codes[None, :])[~np.eye(len(codes), dtype=bool)]
            cells.append(met.astype(np.int64))
            weights.append(np.full(met.size, 1.0 / (len(codes) - 1)))
            owners.append(np.full(met.size, number, dtype=np.int64))
        self._cells = np.concatenate(cells) if cells else np.zeros(0, dtype=np.int64)
        self._weights = np.concatenate(weights) if weights else np.zeros(0)
        self._owners = np.concatenate(owners) if owners else np.zeros(0, dtype=np.int64)

    def alpha(self, metric: Metric, unit_weights: Array | None = None) -> float:
        """alpha, with each unit counted ``unit_weights`` times (f64 [number of units given]); once unless given."""
        size = len(self.values)
        if size == 0:
            return float("nan")
        weights = self._weights if unit_weights is None else self._weights * unit_weights[self._owners]
        met = np.bincount(self._cells, weights, minlength=size * size).reshape(size, size)
        each = met.sum(axis=1)
        total = float(each.sum())
        distance = self._distance(metric, each)
        observed = float((met * distance).sum())
        expected = float(each @ distance @ each)
        if expected <= 0:
            return float("nan")
        return 1.0 - (total - 1.0) * observed / expected

    def _distance(self, metric: Metric, each: Array) -> Array:
        if metric == "nominal":
            return 1.0 - np.eye(len(self.values))
        if metric == "interval":
            return np.square(self.values[:, None] - self.values[None, :])
        # Values between two others, and half of those equal to either: the difference of their mean ranks.
        mean_ranks = np.cumsum(each) - each / 2
        return np.square(mean_ranks[:, None] - mean_ranks[None, :])


def _beyond_chance(observed: float, expected: float) -> float:
    return (observed - expected) / (1.0 - expected) if expected < 1.0 else float("nan")
