"""Direct preference objectives: learning from pairs (or single verdicts) without a reward model and without sampling.

They take summed log-probabilities of whole responses (:func:`~ingot.losses.packed.sum_by_sequence`), l under the policy and r under
the reference, and give dL/dl for :func:`~ingot.losses.packed.spread`. Reference log-probabilities never change: compute them once.
With chosen and rejected in turn in one pack, a step is::

    ctx, out = model.forward(tokens, offsets, targets, want=("logprobs",))
    logps, lengths = sum_by_sequence(out.logprobs, targets, offsets), count_by_sequence(targets, offsets)
    pairs = Pairs(chosen_logps=logps[0::2], rejected_logps=logps[1::2], ...)
    loss, d_chosen, d_rejected, metrics = dpo_loss(pairs, num_pairs=num_pairs)
    d_logps = np.stack([d_chosen, d_rejected], axis=1).ravel()
    model.backward(ctx, d_logprobs=spread(d_logps, targets, offsets))

Notation: d = l - r, the log-ratio; c chosen, r rejected; n response lengths; x = beta (d_c - d_r), the margin of the implicit
rewards; s the logistic function. Loss types and settings carry TRL's names. Each loss is a mean over the ``num_pairs`` pairs of the
step. Pairs with a log-probability that is not finite give nothing and are counted in ``num_dropped``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from ingot.errors import ConfigError
from ingot.losses.numerics import (
    Bools,
    Float64,
    Floats,
    Ints,
    Metrics,
    f64,
    log1mexp,
    log_sigmoid,
    require_positive,
    require_shape,
    sigmoid,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
    """B pairs of responses to the same prompts, by their summed log-probabilities in nats."""

    chosen_logps: Floats
    """l_c, [B]."""
    rejected_logps: Floats
    """l_r, [B]."""
    ref_chosen_logps: Floats
    """r_c, [B]."""
    ref_rejected_logps: Floats
    """r_r, [B]."""
    chosen_lengths: Ints
    """n_c, [B]: counted tokens."""
    rejected_lengths: Ints
    """n_r, [B]."""

    def __post_init__(self) -> None:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        require_shape(np.shape(self.chosen_logps), **fields)
        for name, values in fields.items():
            object.__setattr__(self, name, f64(values))

    @classmethod
    def without_reference(
        cls, *, chosen_logps: Floats, rejected_logps: Floats, chosen_lengths: Ints, rejected_lengths: Ints
    ) -> Pairs:
        """Pairs for the objectives that have no reference model: r is 0 for all."""
        zeros = np.zeros(np.shape(chosen_logps))
        return cls(
            chosen_logps=chosen_logps,
            rejected_logps=rejected_logps,
            ref_chosen_logps=zeros,
            ref_rejected_logps=zeros,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
        )

    @property
    def chosen_logratios(self) -> Float64:
        """d_c = l_c - r_c."""
        return f64(self.chosen_logps - self.ref_chosen_logps)

    @property
    def rejected_logratios(self) -> Float64:
        """d_r = l_r - r_r."""
        return f64(self.rejected_logps - self.ref_rejected_logps)

    def __getitem__(self, rows: Bools | Ints) -> Pairs:
        return Pairs(**{field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)})

    @property
    def finite(self) -> Bools:
        """Pairs whose four log-probabilities are all finite."""
        logps = self.chosen_logps, self.rejected_logps, self.ref_chosen_logps, self.ref_rejected_logps
        finite: Bools = np.isfinite(np.stack(logps)).all(axis=0)
        return finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the loss types share; each says which it uses."""

    beta: float = 0.1
    """How closely the policy is held to the reference; tau in IPO."""
    label_smoothing: float = 0.0
    """Assumed share of flipped labels, eps."""
    discopop_tau: float = 0.05
    """Width of DiscoPOP's blend."""
    simpo_gamma: float = 0.5
    """Margin by which SimPO's chosen response should win, in units of its reward."""


Terms = tuple[Float64, Float64, Float64]
"""Loss of each pair, and its derivatives by l_c and l_r, [B]. The reference is constant, so these are those by d_c and d_r."""


def _of_margin(loss: Float64, d_x: Float64, beta: float) -> Terms:
    """Terms of a loss of x = beta (d_c - d_r) alone."""
    return loss, beta * d_x, -beta * d_x


def _logistic(x: Float64, eps: float) -> tuple[Float64, Float64]:
    """-(1 - eps) ln s(x) - eps ln s(-x), and its derivative: cross-entropy with the label 1 - eps."""
    return -(1 - eps) * log_sigmoid(x) - eps * log_sigmoid(-x), eps * sigmoid(x) - (1 - eps) * sigmoid(-x)


def _mean_scores(pairs: Pairs) -> tuple[Float64, Float64, Float64, Float64]:
    """d_c / n_c and d_r / n_r, and the lengths, at least 1."""
    n_c, n_r = np.maximum(pairs.chosen_lengths, 1.0), np.maximum(pairs.rejected_lengths, 1.0)
    return pairs.chosen_logratios / n_c, pairs.rejected_logratios / n_r, f64(n_c), f64(n_r)


def sigmoid_terms(pairs: Pairs, settings: Settings) -> Terms:
    """-(1 - eps) ln s(x) - eps ln s(-x): DPO (Rafailov et al. 2023, eq. 7); with eps its conservative form, cDPO (Mitchell 2023)."""
    x = settings.beta * (pairs.chosen_logratios - pairs.rejected_logratios)
    return _of_margin(*_logistic(x, settings.label_smoothing), settings.beta)


def robust_terms(pairs: Pairs, settings: Settings) -> Terms:
    """[-(1 - eps) ln s(x) + eps ln s(-x)] / (1 - 2 eps): unbiased under labels flipped at rate eps (Chowdhury et al. 2024)."""
    eps = settings.label_smoothing
    x = settings.beta * (pairs.chosen_logratios - pairs.rejected_logratios)
    loss = (-(1 - eps) * log_sigmoid(x) + eps * log_sigmoid(-x)) / (1 - 2 * eps)
    d_x = -((1 - eps) * sigmoid(-x) + eps * sigmoid(x)) / (1 - 2 * eps)
    return _of_margin(loss, d_x, settings.beta)


def hinge_terms(pairs: Pairs, settings: Settings) -> Terms:
    """max(0, 1 - x): SLiC's margin loss (Zhao et al. 2023) on DPO's rewards."""
    x = settings.beta * (pairs.chosen_logratios - pairs.rejected_logratios)
    return _of_margin(np.maximum(0.0, 1 - x), -f64(x < 1), settings.beta)


def ipo_terms(pairs: Pairs, settings: Settings) -> Terms:
    """(d_c / n_c - d_r / n_r - 1 / (2 tau))^2, tau = beta: IPO (Azar et al. 2023, eq. 17), per token.

    Stops at a finite margin where DPO, on pairs without contradiction, has no optimum.
    """
    mean_c, mean_r, n_c, n_r = _mean_scores(pairs)
    u = mean_c - mean_r - 1 / (2 * settings.beta)
    return u**2, 2 * u / n_c, -2 * u / n_r


def sigmoid_norm_terms(pairs: Pairs, settings: Settings) -> Terms:
    """-ln s(beta (d_c / n_c - d_r / n_r)), smoothed as DPO: per token, so that length earns nothing."""
    mean_c, mean_r, n_c, n_r = _mean_scores(pairs)
    loss, d_x = _logistic(settings.beta * (mean_c - mean_r), settings.label_smoothing)
    return loss, settings.beta * d_x / n_c, -settings.beta * d_x / n_r


def simpo_terms(pairs: Pairs, settings: Settings) -> Terms:
    """-ln s(beta (l_c / n_c - l_r / n_r) - gamma), smoothed as DPO: SimPO (Meng et al. 2024), of pairs without reference."""
    mean_c, mean_r, n_c, n_r = _mean_scores(pairs)
    loss, d_x = _logistic(settings.beta * (mean_c - mean_r) - settings.simpo_gamma, settings.label_smoothing)
    return loss, settings.beta * d_x / n_c, -settings.beta * d_x / n_r


def exo_pair_terms(pairs: Pairs, settings: Settings) -> Terms:
    """KL(q || p) of q = (s(x), s(-x)) from the label p = (1 - eps, eps): EXO (Ji et al. 2024, eq. 16); eps > 0.

    dL/dx = s(x) s(-x) (x - ln((1 - eps) / eps)).
    """
    eps = settings.label_smoothing
    x = settings.beta * (pairs.chosen_logratios - pairs.rejected_logratios)
    loss = sigmoid(x) * (log_sigmoid(x) - np.log1p(-eps)) + sigmoid(-x) * (log_sigmoid(-x) - np.log(eps))
    return _of_margin(loss, sigmoid(x) * sigmoid(-x) * (x - np.log1p(-eps) + np.log(eps)), settings.beta)


def nca_pair_terms(pairs: Pairs, settings: Settings) -> Terms:
    """-ln s(a) - ln s(-a) / 2 - ln s(-b) / 2 with a = beta d_c, b = beta d_r: NCA (Chen et al. 2024)."""
    a, b = settings.beta * pairs.chosen_logratios, settings.beta * pairs.rejected_logratios
    loss = -log_sigmoid(a) - 0.5 * log_sigmoid(-a) - 0.5 * log_sigmoid(-b)
    return loss, settings.beta * (0.5 * sigmoid(a) - sigmoid(-a)), settings.beta * 0.5 * sigmoid(b)


def bco_pair_terms(pairs: Pairs, settings: Settings) -> Terms:
    """-ln s(a) - ln s(-b): each response classified by itself (BCO, Jung et al. 2024, without its running reward shift)."""
    a, b = settings.beta * pairs.chosen_logratios, settings.beta * pairs.rejected_logratios
    return -log_sigmoid(a) - log_sigmoid(-b), -settings.beta * sigmoid(-a), settings.beta * sigmoid(b)


def sppo_hard_terms(pairs: Pairs, settings: Settings) -> Terms:
    """(d_c - 1 / (2 beta))^2 + (d_r + 1 / (2 beta))^2: SPPO (Wu et al. 2024, eq. 4.7) with win rates 1 and 0."""
    u_c, u_r = pairs.chosen_logratios - 0.5 / settings.beta, pairs.rejected_logratios + 0.5 / settings.beta
    return u_c**2 + u_r**2, 2 * u_c, 2 * u_r


def aot_terms(pairs: Pairs, settings: Settings) -> Terms:
    """DPO's loss on beta (sorted(l_c - l_r) - sorted(r_c - r_r)): AOT (Melnyk et al. 2024), dominance of margins as a distribution.

    Couples the whole batch: the loss of a step in parts is another one.
    """
    policy, reference = pairs.chosen_logps - pairs.rejected_logps, pairs.ref_chosen_logps - pairs.ref_rejected_logps
    order = np.argsort(policy, kind="stable")
    loss, d_x = np.empty_like(policy), np.empty_like(policy)
    loss[order], d_x[order] = _logistic(settings.beta * (policy[order] - np.sort(reference)), settings.label_smoothing)
    return _of_margin(f64(loss), f64(d_x), settings.beta)


def aot_unpaired_terms(pairs: Pairs, settings: Settings) -> Terms:
    """DPO's loss on beta (sorted(d_c) - sorted(d_r)): AOT without pairing (Melnyk et al. 2024). Couples the whole batch."""
    d_c, d_r = pairs.chosen_logratios, pairs.rejected_logratios
    order_c, order_r = np.argsort(d_c, kind="stable"), np.argsort(d_r, kind="stable")
    loss, d_x = _logistic(settings.beta * (d_c[order_c] - d_r[order_r]), settings.label_smoothing)
    by_c, by_r = np.empty_like(d_x), np.empty_like(d_x)
    by_c[order_c], by_r[order_r] = settings.beta * d_x, -settings.beta * d_x
    return loss, by_c, by_r


def apo_zero_terms(pairs: Pairs, settings: Settings) -> Terms:
    """1 - s(a) + s(b): raises the chosen, lowers the rejected (APO, D'Oosterlinck et al. 2024, eq. 7)."""
    a, b = settings.beta * pairs.chosen_logratios, settings.beta * pairs.rejected_logratios
    return sigmoid(-a) + sigmoid(b), -settings.beta * sigmoid(a) * sigmoid(-a), settings.beta * sigmoid(b) * sigmoid(-b)


def apo_down_terms(pairs: Pairs, settings: Settings) -> Terms:
    """s(a) + 1 - s(x): lowers both, the rejected more, where even the chosen is worse than the policy (APO, eq. 8)."""
    a = settings.beta * pairs.chosen_logratios
    x = settings.beta * (pairs.chosen_logratios - pairs.rejected_logratios)
    by_a, by_x = sigmoid(a) * sigmoid(-a), -sigmoid(x) * sigmoid(-x)
    return sigmoid(a) + sigmoid(-x), settings.beta * (by_a + by_x), -settings.beta * by_x


def discopop_terms(pairs: Pairs, settings: Settings) -> Terms:
    """-(1 - m) ln s(x) + m e^-x with m = s(x / tau): the loss found by search in DiscoPOP (Lu et al. 2024, eq. 5)."""
    tau = settings.discopop_tau
    x = settings.beta * (pairs.chosen_logratios - pairs.rejected_logratios)
    m, rest = sigmoid(x / tau), sigmoid(-x / tau)
    # One exponential: e^-x alone overflows where m is 0.
    exponential = np.exp(np.minimum(-x + log_sigmoid(x / tau), 700.0))
    loss = -rest * log_sigmoid(x) + exponential
    d_x = -rest * sigmoid(-x) + log_sigmoid(x) * m * rest / tau + exponential * (rest / tau - 1)
    return _of_margin(loss, d_x, settings.beta)


LOSS_TYPES: Mapping[str, Callable[[Pairs, Settings], Terms]] = {
    "sigmoid": sigmoid_terms,
    "robust": robust_terms,
    "hinge": hinge_terms,
    "ipo": ipo_terms,
    "sigmoid_norm": sigmoid_norm_terms,
    "exo_pair": exo_pair_terms,
    "nca_pair": nca_pair_terms,
    "bco_pair": bco_pair_terms,
    "sppo_hard": sppo_hard_terms,
    "aot": aot_terms,
    "aot_unpaired": aot_unpaired_terms,
    "apo_zero": apo_zero_terms,
    "apo_down": apo_down_terms,
    "discopop": discopop_terms,
}
"""``loss_type`` of :func:`dpo_loss` -> its terms."""

CPO_LOSS_TYPES: Mapping[str, Callable[[Pairs, Settings], Terms]] = {
    "sigmoid": sigmoid_terms,
    "hinge": hinge_terms,
    "ipo": ipo_terms,
    "simpo": simpo_terms,
}
"""``loss_type`` of :func:`cpo_loss` -> its terms, of pairs without reference."""

KTO_LOSS_TYPES = ("kto", "apo_zero_unpaired", "bco")
"""``loss_type`` of :func:`kto_loss`."""

SMOOTHED = frozenset({"sigmoid", "robust", "sigmoid_norm", "exo_pair", "aot", "aot_unpaired", "simpo"})
"""Loss types that use ``label_smoothing``."""


def _check(loss_type: str, known: Mapping[str, object], settings: Settings) -> None:
    if loss_type not in known:
        raise ConfigError(f"loss_type must be one of {', '.join(known)}, got {loss_type!r}")
    if not 0 <= settings.label_smoothing < 0.5:
        raise ConfigError(f"label_smoothing must be at least 0 and below 0.5, got {settings.label_smoothing}")
    if settings.label_smoothing > 0 and loss_type not in SMOOTHED:
        takers = ", ".join(sorted(SMOOTHED & set(known)))
        raise ConfigError(
            f"label_smoothing has no effect on loss_type {loss_type}: leave it 0, or take one of {takers}"
        )
    for name in ("beta", "discopop_tau"):
        if not getattr(settings, name) > 0:
            raise ConfigError(f"{name} must be above 0, got {getattr(settings, name)}")


def _pair_metrics(chosen_rewards: Float64, rejected_rewards: Float64, pairs: Pairs, w: Float64) -> Metrics:
    margins = chosen_rewards - rejected_rewards
    return {
        "rewards/chosen": float(w @ chosen_rewards),
        "rewards/rejected": float(w @ rejected_rewards),
        "rewards/accuracies": float(w @ (margins > 0)),
        "rewards/margins": float(w @ margins),
        "logps/chosen": float(w @ pairs.chosen_logps),
        "logps/rejected": float(w @ pairs.rejected_logps),
    }


def _shares(weights: Floats | None, keep: Bools, num_pairs: float) -> Float64:
    """What each kept pair counts in the step's mean."""
    require_positive(num_pairs=num_pairs)
    if weights is None:
        return np.full(np.count_nonzero(keep), 1 / num_pairs)
    require_shape(keep.shape, weights=weights)
    return f64(f64(weights)[keep] / num_pairs)


def _placed(terms: Terms, keep: Bools, w: Float64) -> tuple[float, Float64, Float64]:
    """The step's mean loss and its gradients with a row for every pair, 0 for the dropped."""
    loss, by_c, by_r = terms
    d_chosen, d_rejected = np.zeros(keep.shape), np.zeros(keep.shape)
    d_chosen[keep], d_rejected[keep] = w * by_c, w * by_r
    return float(w @ loss), d_chosen, d_rejected


def dpo_loss(
    pairs: Pairs,
    *,
    num_pairs: float,
    weights: Floats | None = None,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
) -> tuple[float, Float64, Float64, Metrics]:
    """The DPO family: L = (1 / num_pairs) sum_pairs of the terms of ``loss_type`` (:data:`LOSS_TYPES`).

    Parameters
    ----------
    pairs
        B of them.
    num_pairs
        Pairs of the whole step, or the sum of their weights.
    weights
        What each pair counts, [B]; 1 unless given. The pairs of one ranked list have 1 / (their number), so that it counts as one.
        Not for the AOT types, which have no pairs of their own.
    beta, label_smoothing, discopop_tau
        :class:`Settings`.

    Returns
    -------
    loss
        f64.
    d_chosen_logps, d_rejected_logps
        f64 [B]: dL/dl_c and dL/dl_r.
    metrics
        ``rewards/chosen``, ``rewards/rejected`` (beta d), ``rewards/accuracies``, ``rewards/margins``, ``rewards/saturated``
        (share of pairs with a margin above 5, which learn nothing more), ``logps/chosen``, ``logps/rejected``: both falling while
        margins rise is likelihood displacement.

    Raises ``ConfigError`` for a setting that is unknown, out of range or of no effect on ``loss_type``.
    """
    settings = Settings(beta=beta, label_smoothing=label_smoothing, discopop_tau=discopop_tau)
    _check(loss_type, LOSS_TYPES, settings)
    if label_smoothing == 0 and loss_type == "exo_pair":
        raise ConfigError("loss_type exo_pair needs label_smoothing above 0, for example 0.001")
    if weights is not None and loss_type in ("aot", "aot_unpaired"):
        raise ConfigError(f"loss_type {loss_type} takes no weights: it compares sorted batches, not pairs")
    keep = pairs.finite
    kept, w = pairs[keep], _shares(weights, keep, num_pairs)
    loss, d_chosen, d_rejected = _placed(LOSS_TYPES[loss_type](kept, settings), keep, w)
    chosen_rewards, rejected_rewards = beta * kept.chosen_logratios, beta * kept.rejected_logratios
    metrics = {
        "loss": loss,
        **_pair_metrics(chosen_rewards, rejected_rewards, kept, w),
        "rewards/saturated": float(w @ (chosen_rewards - rejected_rewards > 5)),
        "num_dropped": float(np.count_nonzero(~keep)),
    }
    return loss, d_chosen, d_rejected, metrics


def chosen_nll_loss(pairs: Pairs, *, num_chosen_tokens: float, weights: Floats | None = None) -> tuple[float, Float64]:
    """Fine-tuning on the chosen responses beside a preference loss: -sum_pairs w l_c / num_chosen_tokens, the mean loss per token.

    Parameters
    ----------
    num_chosen_tokens
        Tokens of the chosen responses in the whole step, those of a pair times its weight.
    weights
        As :func:`dpo_loss`.

    Returns
    -------
    loss, d_chosen_logps
        f64; f64 [B], 0 for pairs that are not finite.
    """
    keep = pairs.finite
    by_token = np.zeros(keep.shape)
    by_token[keep] = _shares(weights, keep, num_chosen_tokens)
    return -float(by_token[keep] @ pairs.chosen_logps[keep]), -by_token


def mixed_dpo_loss(
    pairs: Pairs,
    *,
    loss_types: Mapping[str, float],
    num_pairs: float,
    num_chosen_tokens: float = 0.0,
    weights: Floats | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
) -> tuple[float, Float64, Float64, Metrics]:
    """A weighted sum of losses of the DPO family and of fine-tuning on the chosen response (``sft``).

    With sigmoid and sft it is DPO with a likelihood term (Pang et al. 2024, "RPO"), with sigmoid, bco_pair and sft mixed preference
    optimization (Wang et al. 2024).

    Parameters
    ----------
    loss_types
        :data:`LOSS_TYPES` or ``sft`` -> weight.
    num_chosen_tokens
        As :func:`chosen_nll_loss`; needed for ``sft``.
    label_smoothing
        For those types that use it, of which there must be one unless it is 0.

    Returns
    -------
    loss, d_chosen_logps, d_rejected_logps, metrics
        As :func:`dpo_loss`; of several types also ``losses/TYPE``, each unweighted; with ``sft`` also ``nll_loss``.
    """
    family = {name: weight for name, weight in loss_types.items() if name != "sft"}
    if not family:
        raise ConfigError(
            "loss_type sft learns from the chosen responses alone: add a preference loss, or run ingot sft"
        )
    if label_smoothing > 0 and not SMOOTHED & family.keys():
        _check(next(iter(family)), LOSS_TYPES, Settings(label_smoothing=label_smoothing))
    total, d_chosen, d_rejected = 0.0, np.zeros(pairs.chosen_logps.shape), np.zeros(pairs.chosen_logps.shape)
    metrics: Metrics = {}
    each: Metrics = {}
    for name, weight in family.items():
        loss, by_chosen, by_rejected, metrics = dpo_loss(
            pairs,
            num_pairs=num_pairs,
            weights=weights,
            loss_type=name,
            beta=beta,
            label_smoothing=label_smoothing if name in SMOOTHED else 0.0,
            discopop_tau=discopop_tau,
        )
        total += weight * loss
        d_chosen += weight * by_chosen
        d_rejected += weight * by_rejected
        each[f"losses/{name}"] = loss
    if "sft" in loss_types:
        nll_loss, d_nll = chosen_nll_loss(pairs, num_chosen_tokens=num_chosen_tokens, weights=weights)
        total += loss_types["sft"] * nll_loss
        d_chosen += loss_types["sft"] * d_nll
        each["nll_loss"] = nll_loss
    if len(loss_types) > 1:
        metrics |= each
    metrics["loss"] = total
    return total, d_chosen, d_rejected, metrics


def cpo_loss(
    pairs: Pairs,
    *,
    num_pairs: float,
    num_chosen_tokens: float = 0.0,
    weights: Floats | None = None,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    simpo_gamma: float = 0.5,
    cpo_alpha: float = 1.0,
) -> tuple[float, Float64, Float64, Metrics]:
    """Preference without a reference model: CPO (Xu et al. 2024), and SimPO (Meng et al. 2024) as ``loss_type="simpo"``.

    L = (1 / num_pairs) sum_pairs of the terms of ``loss_type`` (:data:`CPO_LOSS_TYPES`), with r = 0, plus cpo_alpha times the mean
    loss per token of the chosen responses, -sum l_c / num_chosen_tokens. SimPO proper has ``cpo_alpha=0`` and a beta of 2 to 2.5.
    Nothing holds these to a reference: watch the KL.

    Parameters
    ----------
    pairs
        Their reference log-probabilities are not looked at (:meth:`Pairs.without_reference`).
    num_pairs, weights
        As :func:`dpo_loss`.
    num_chosen_tokens
        Tokens of the chosen responses in the whole step, those of a pair times its weight. Needed unless ``cpo_alpha`` is 0.

    Returns
    -------
    loss, d_chosen_logps, d_rejected_logps, metrics
        As :func:`dpo_loss`, with rewards beta l, or beta l / n for ipo and simpo; and ``nll_loss``.
    """
    settings = Settings(beta=beta, label_smoothing=label_smoothing, simpo_gamma=simpo_gamma)
    _check(loss_type, CPO_LOSS_TYPES, settings)
    if cpo_alpha != 0:
        require_positive(num_chosen_tokens=num_chosen_tokens)
    zeros = np.zeros(pairs.chosen_logps.shape)
    pairs = dataclasses.replace(pairs, ref_chosen_logps=zeros, ref_rejected_logps=zeros)
    keep = pairs.finite
    kept, w = pairs[keep], _shares(weights, keep, num_pairs)
    loss, d_chosen, d_rejected = _placed(CPO_LOSS_TYPES[loss_type](kept, settings), keep, w)
    nll_loss = 0.0
    if cpo_alpha != 0:
        nll_loss, d_nll = chosen_nll_loss(pairs, num_chosen_tokens=num_chosen_tokens, weights=weights)
        d_chosen += cpo_alpha * d_nll
        loss += cpo_alpha * nll_loss
    per_token = loss_type in ("ipo", "simpo")
    scores = _mean_scores(kept)[:2] if per_token else (kept.chosen_logratios, kept.rejected_logratios)
    metrics = {
        "loss": loss,
        "nll_loss": nll_loss,
        **_pair_metrics(beta * scores[0], beta * scores[1], kept, w),
        "num_dropped": float(np.count_nonzero(~keep)),
    }
    return loss, d_chosen, d_rejected, metrics


def orpo_loss(
    pairs: Pairs,
    *,
    num_pairs: float,
    weights: Floats | None = None,
    beta: float = 0.1,
    nll: bool = True,
) -> tuple[float, Float64, Float64, Metrics]:
    """ORPO (Hong et al. 2024, eqs. 4 to 7): fine-tuning on the chosen response and an odds ratio in one, without a reference.

    a = l_c / n_c, b = l_r / n_r;  o = (a - b) - (ln(1 - e^a) - ln(1 - e^b));  L = mean of -a - beta ln s(o).
    dL/da = -1 - beta s(-o) / (1 - e^a);  dL/db = beta s(-o) / (1 - e^b).

    Parameters
    ----------
    pairs
        As for :func:`cpo_loss`. A response of probability 1 (or without a token) has infinite odds: its pair is dropped.
    num_pairs, weights
        As :func:`dpo_loss`.
    beta
        Weight of the odds ratio, lambda in the paper.
    nll
        Whether -a is part of the loss. Without it the odds ratio stands alone, to be added to a fine-tuning loss over other
        tokens, such as prompt and response.

    Returns
    -------
    loss, d_chosen_logps, d_rejected_logps, metrics
        As :func:`dpo_loss`, with rewards beta a and beta b; ``nll_loss``, ``log_odds_ratio`` (ln s(o)), ``log_odds_chosen`` (o).
    """
    if not beta > 0:
        raise ConfigError(f"beta must be above 0, got {beta}")
    n_c, n_r = np.maximum(pairs.chosen_lengths, 1.0), np.maximum(pairs.rejected_lengths, 1.0)
    a, b = f64(pairs.chosen_logps / n_c), f64(pairs.rejected_logps / n_r)
    keep = np.isfinite(a) & np.isfinite(b) & (a < 0) & (b < 0)
    w = _shares(weights, keep, num_pairs)
    a, b, n_c, n_r = a[keep], b[keep], n_c[keep], n_r[keep]
    o = (a - b) - (log1mexp(a) - log1mexp(b))
    pull = beta * sigmoid(-o)
    alone = 0.0 if nll else 1.0
    terms = (alone - 1) * a - beta * log_sigmoid(o), (alone - 1 + pull / np.expm1(a)) / n_c, -pull / np.expm1(b) / n_r
    loss, d_chosen, d_rejected = _placed(terms, keep, w)
    metrics = {
        "loss": loss,
        "nll_loss": -float(w @ a),
        "log_odds_ratio": float(w @ log_sigmoid(o)),
        "log_odds_chosen": float(w @ o),
        **_pair_metrics(beta * a, beta * b, pairs[keep], w),
        "num_dropped": float(np.count_nonzero(~keep)),
    }
    return loss, d_chosen, d_rejected, metrics


def kto_reference_point(logps: Floats, ref_logps: Floats) -> float:
    """z = max(0, mean of l - r) over MISMATCHED examples, the prompt of one with the response of another: how far the policy is
    from the reference on the whole (KTO's estimate of their KL divergence), taken as a constant. Over the whole step, finite rows.
    """
    require_shape(np.shape(logps), ref_logps=ref_logps)
    finite = np.isfinite(logps) & np.isfinite(ref_logps)
    logratios = f64(logps)[finite] - f64(ref_logps)[finite]
    return max(0.0, float(logratios.mean())) if logratios.size else 0.0


def bco_reference_point(logps: Floats, ref_logps: Floats, labels: Bools, weights: Floats | None = None) -> float:
    """The middle between the mean l - r of the desirable and of the undesirable examples of a step (Jung et al. 2024's reward shift
    over beta, of this step alone where theirs is a running mean), taken as a constant; 0 where the step has one kind alone.
    """
    require_shape(np.shape(logps), ref_logps=ref_logps, labels=labels, weights=weights)
    w = np.ones(np.shape(logps)) if weights is None else f64(weights)
    finite = np.isfinite(logps) & np.isfinite(ref_logps)
    good, bad = finite & np.asarray(labels, bool), finite & ~np.asarray(labels, bool)
    if not good.any() or not bad.any():
        return 0.0
    d = np.where(finite, f64(logps), 0.0) - np.where(finite, f64(ref_logps), 0.0)
    return float((w[good] @ d[good] / w[good].sum() + w[bad] @ d[bad] / w[bad].sum()) / 2)


def kto_loss(
    logps: Floats,
    ref_logps: Floats,
    labels: Bools,
    *,
    kl: float,
    num_chosen: float,
    num_rejected: float,
    weights: Floats | None = None,
    loss_type: str = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[float, Float64, Metrics]:
    """KTO (Ethayarajh et al. 2024, eq. 7) and its relatives: single verdicts, good or bad, instead of pairs.

    With x = beta (d - z), a good example has the loss w_D (1 - s(x)), a bad one w_U s(x); with loss_type ``bco``
    -w_D ln s(x) and -w_U ln s(-x) (binary classifier optimization, Jung et al. 2024). The mean over all examples.

    Parameters
    ----------
    logps, ref_logps
        l and r, [S].
    labels
        bool [S]: whether the response is desirable.
    kl
        z, from :func:`kto_reference_point`, for ``bco`` from :func:`bco_reference_point`; loss_type ``apo_zero_unpaired`` has z = 0
        and takes no other.
    num_chosen, num_rejected
        Desirable and undesirable examples of the whole step, or the sums of their weights. The loss divides by their sum.
    weights
        What each example counts, [S]; 1 unless given.
    desirable_weight, undesirable_weight
        w_D, w_U. Keep w_D num_chosen / (w_U num_rejected) near 1.

    Returns
    -------
    loss
        f64.
    d_logps
        f64 [S]: dL/dl.
    metrics
        ``rewards/chosen`` and ``logps/chosen`` (means over the desirable), the same of ``rejected``, ``rewards/margins``. ``kl`` is
        the caller's.
    """
    if loss_type not in KTO_LOSS_TYPES:
        raise ConfigError(f"loss_type must be one of {', '.join(KTO_LOSS_TYPES)}, got {loss_type!r}")
    if not beta > 0:
        raise ConfigError(f"beta must be above 0, got {beta}")
    if loss_type == "apo_zero_unpaired" and kl != 0:
        raise ConfigError(f"loss_type apo_zero_unpaired has no reference point: kl must be 0, got {kl}")
    require_positive(num_examples=num_chosen + num_rejected)
    require_shape(np.shape(logps), ref_logps=ref_logps, labels=labels, weights=weights)
    labels = np.asarray(labels, bool)
    each = np.ones(labels.shape) if weights is None else f64(weights)
    finite = np.isfinite(logps) & np.isfinite(ref_logps)
    logratios = np.where(finite, f64(logps), 0.0) - np.where(finite, ref_logps, 0.0)
    good, bad = finite & labels, finite & ~labels
    x = beta * (logratios - kl)
    by_kind = np.where(good, desirable_weight, np.where(bad, undesirable_weight, 0.0))
    w = each * by_kind / (num_chosen + num_rejected)
    if loss_type == "bco":
        loss = float(w @ -log_sigmoid(np.where(labels, x, -x)))
        d_logps = w * beta * np.where(labels, -sigmoid(-x), sigmoid(x))
    else:
        loss = float(w @ np.where(labels, sigmoid(-x), sigmoid(x)))
        d_logps = w * np.where(labels, -1.0, 1.0) * beta * sigmoid(x) * sigmoid(-x)
    metrics = {"loss": loss, "num_dropped": float(np.count_nonzero(~finite))}
    for name, rows, count in (("chosen", good, num_chosen), ("rejected", bad, num_rejected)):
        metrics[f"rewards/{name}"] = float(beta * (each[rows] @ logratios[rows]) / (count or 1.0))
        metrics[f"logps/{name}"] = float(each[rows] @ f64(logps)[rows] / (count or 1.0))
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return loss, d_logps, metrics
