"""How sure a figure is: 95 % intervals of means, accuracies and win rates, with the prompts as what was drawn at random.

Cases of one prompt (the pairs of a ranking, several samples) stand or fall together, so the prompt is the unit: intervals from single
cases would be too narrow.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from ingot.losses.numerics import Float64, Ints, f64

Z_95 = 1.959963984540054
"""Standard errors on each side of a mean that hold it in 95 of 100 cases."""
_MIN_CLUSTERS = 40
_EXTREME = 0.1


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over prompts with its 95 % interval, which is normal."""

    value: float
    """NaN of nothing."""
    error: float
    """Standard error; infinite below two values."""

    @property
    def margin(self) -> float:
        """Half the width of the interval."""
        return Z_95 * self.error

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.value - self.margin if math.isfinite(self.error) else -math.inf

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.value + self.margin if math.isfinite(self.error) else math.inf


def mean_of(values: npt.ArrayLike) -> Mean:
    """The mean of values that have nothing in common, [n]; of differences, of pairs that have nothing in common with one another."""
    v = f64(values)
    error = float(v.std(ddof=1)) / math.sqrt(len(v)) if len(v) > 1 else math.inf
    return Mean(float(v.mean()) if len(v) else math.nan, error)


@dataclasses.dataclass(frozen=True)
class Share:
    """A share with its 95 % interval; NaN where there is no case."""

    value: float
    low: float
    high: float
    num_cases: int
    num_prompts: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % (95 % interval {100 * self.low:.1f} to {100 * self.high:.1f})"


def share_of(hits: npt.ArrayLike, clusters: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> Share:
    """The share of hits, and its interval.

    Parameters
    ----------
    hits
        Of each case, 0 to 1: half for a tie. [n]
    clusters
        Number of each case's prompt, [n].
    weights
        What each case counts, [n]; 1 unless given. Cases of weight 0 are none.

    Returns
    -------
    Share
        Normal interval from the variance of the ratio estimator over prompts (Cochran 1977, eq. 6.13; with one case a prompt it is the
        sample variance of the mean). Below 40 prompts, where the share is within 0.1 of an end, and where all are alike, Wilson's interval (1927) of the
        number of independent cases that has the same variance, at most that of all cases.
    """
    h = f64(hits)
    w = np.ones(len(h)) if weights is None else f64(weights)
    h, w, clusters = h[w > 0], w[w > 0], np.asarray(clusters)[w > 0]
    _, owner = np.unique(clusters, return_inverse=True)
    tries = f64(np.bincount(owner, w))
    num, total = len(tries), float(tries.sum())
    if num == 0:
        return Share(math.nan, math.nan, math.nan, 0, 0)
    value = float(w @ h / total)
    residuals = np.bincount(owner, w * h) - value * tries
    variance = num / (num - 1) * float(residuals @ residuals) / total**2 if num > 1 else math.inf
    if num >= _MIN_CLUSTERS and _EXTREME <= value <= 1 - _EXTREME and variance > 0:
        half = Z_95 * math.sqrt(variance)
        return Share(value, max(0.0, value - half), min(1.0, value + half), len(h), num)
    spread = value * (1 - value)
    # As many independent cases as say as much; all alike, or one alone, say no more than their prompts.
    size = (
        float(num) if variance in (0.0, math.inf) or spread == 0.0 else min(total**2 / float(w @ w), spread / variance)
    )
    low, high = wilson(value, size)
    return Share(value, low, high, len(h), num)


def wilson(value: float, size: float) -> tuple[float, float]:
    """Wilson's interval (1927) of a share of ``size`` independent cases."""
    scale = 1 + Z_95**2 / size
    middle = (value + Z_95**2 / (2 * size)) / scale
    half = Z_95 * math.sqrt(value * (1 - value) / size + Z_95**2 / (4 * size**2)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_share(hits: npt.ArrayLike, clusters: npt.ArrayLike, *, num_draws: int = 2000, seed: int = 0) -> Share:
    """The share of hits with the 95 % percentiles of a bootstrap that draws prompts; Wilson's interval as in :func:`share_of`
    below 40 prompts and near the ends, where percentiles are too narrow."""
    plain = share_of(hits, clusters)
    if plain.num_prompts < _MIN_CLUSTERS or not _EXTREME <= plain.value <= 1 - _EXTREME or np.ptp(f64(hits)) == 0:
        return plain
    _, owner = np.unique(np.asarray(clusters), return_inverse=True)
    sums, tries = f64(np.bincount(owner, f64(hits))), f64(np.bincount(owner))
    rng = np.random.default_rng(seed)
    drawn = np.array([_ratio(sums, tries, rng.integers(0, len(tries), len(tries))) for _ in range(num_draws)])
    low, high = np.percentile(drawn, [2.5, 97.5])
    return dataclasses.replace(plain, low=float(low), high=float(high))


def _ratio(sums: Float64, tries: Float64, rows: Ints) -> float:
    return float(sums[rows].sum() / tries[rows].sum())
