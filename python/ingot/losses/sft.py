"""Supervised fine-tuning: next-token cross-entropy on responses, with a choice of what each token counts.

The path: :func:`relative_weights` says what each token counts beside the others, the step's batches add them up, and
:func:`~ingot.losses.packed.mean_weights` makes them the weights of one mean over the step. A prompt of weight 0 has no targets, so it
costs no product with the vocabulary.
"""

from __future__ import annotations

import numpy as np

from ingot.errors import ConfigError
from ingot.losses.numerics import Bools, Float32, Float64, Floats, Ints, Metrics, f64, require_positive, require_shape
from ingot.losses.packed import usable


def relative_weights(targets: Ints, response_mask: Bools, *, prompt_weight: float = 0.0) -> Float64:
    """f64 [N]: 1 at the targets of responses, ``prompt_weight`` at those of prompts, 0 where there is no target."""
    require_shape(targets.shape, response_mask=response_mask)
    if not prompt_weight >= 0:
        raise ConfigError(f"prompt_weight must be 0 or more, got {prompt_weight}")
    return np.where(targets >= 0, np.where(response_mask, 1.0, prompt_weight), 0.0)


def sft_loss(
    logprobs: Floats,
    targets: Ints,
    weights: Floats,
    *,
    loss_type: str = "nll",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    lse: Floats | None = None,
    zbar: Floats | None = None,
) -> tuple[float, Float32, Float32 | None, Float32 | None, Metrics]:
    """Weighted cross-entropy, optionally smoothed, with a pull on the logits' scale.

    With p_t the probability of the target, eps = label_smoothing, lse_t = ln sum_v e^z_v and zbar_t = mean_v z_v:

    - ``nll``: L = sum_t w_t [-(1 - eps) ln p_t - eps mean_v ln p_v] + z_loss sum_t w_t lse_t^2.
      The mean of ln p over the vocabulary is zbar - lse, so the gradients are
      d_logprobs = -w (1 - eps),  d_zbar = -w eps,  d_lse = w (eps + 2 z_loss lse).
    - ``dft``: L = -sum_t w_t stop_gradient(p_t) ln p_t, d_logprobs = -w p: every token pulls as hard as it is likely already, which
      undoes the 1 / p of the likelihood's gradient (Wu et al. 2025).

    Parameters
    ----------
    logprobs
        [N], ln p_t.
    targets
        i32 [N], -1 where none.
    weights
        [N], from :func:`~ingot.losses.packed.mean_weights` (or :func:`~ingot.losses.next_token.token_weights`).
    label_smoothing, z_loss
        eps (Szegedy et al. 2016), and the coefficient of lse^2 (Chowdhery et al. 2022 take 1e-4). Only with ``nll``.
    lse, zbar
        [N], outputs of the model: lse is needed by both, zbar by label smoothing.

    Returns
    -------
    loss
        f64.
    d_logprobs, d_lse, d_zbar
        f32 [N]; the last two None where not needed, as ``backward`` takes them.
    metrics
        ``loss``; ``nll_loss``, the weighted cross-entropy alone, to compare runs by; ``num_tokens``, ``num_dropped``.
    """
    if loss_type not in ("nll", "dft"):
        raise ConfigError(f"loss_type must be nll or dft, got {loss_type!r}")
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")
    if not z_loss >= 0:
        raise ConfigError(f"z_loss must be 0 or more, got {z_loss}")
    if loss_type == "dft" and (label_smoothing or z_loss):
        raise ConfigError("loss_type dft has neither label_smoothing nor z_loss: leave both 0")
    if (label_smoothing or z_loss) and lse is None:
        raise ConfigError("label_smoothing and z_loss need the model's lse")
    if label_smoothing and zbar is None:
        raise ConfigError("label_smoothing needs the model's zbar")
    require_shape(targets.shape, weights=weights)
    keep, dropped = usable(targets, logprobs, lse, zbar)
    w, lp = np.where(keep, f64(weights), 0.0), np.where(keep, f64(logprobs), 0.0)
    nll_loss = -float(w @ lp)
    metrics = {"loss": nll_loss, "nll_loss": nll_loss, "num_tokens": float(np.count_nonzero(keep)), **dropped}
    if loss_type == "dft":
        pull = w * np.exp(lp)
        metrics["loss"] = -float(pull @ lp)
        return metrics["loss"], (-pull).astype(np.float32), None, None, metrics
    d_lse = d_zbar = None
    loss = (1 - label_smoothing) * nll_loss
    if lse is not None and (label_smoothing or z_loss):
        log_sum = np.where(keep, f64(lse), 0.0)
        loss += z_loss * float(w @ log_sum**2)
        d_lse = (w * (label_smoothing + 2 * z_loss * log_sum)).astype(np.float32)
        if zbar is not None and label_smoothing:
            loss += label_smoothing * float(w @ (log_sum - np.where(keep, f64(zbar), 0.0)))
            d_zbar = (-label_smoothing * w).astype(np.float32)
    metrics["loss"] = loss
    return loss, (-(1 - label_smoothing) * w).astype(np.float32), d_lse, d_zbar, metrics


def unlikelihood_loss(logprobs: Floats, targets: Ints, weights: Floats) -> tuple[float, Float32, Metrics]:
    """L = -sum_t w_t ln(1 - p_t): makes the targets less likely (Welleck et al. 2020), against repetition or unwanted answers.

    d_logprobs = w p / (1 - p), f32 [N]. A target of probability 1 has no finite loss: it is dropped and counted.
    """
    require_shape(targets.shape, weights=weights)
    certain = f64(logprobs) >= 0
    keep, dropped = usable(targets, np.where(certain, np.nan, logprobs))
    w, lp = np.where(keep, f64(weights), 0.0), np.where(keep, f64(logprobs), -1.0)
    odds = np.exp(lp) / -np.expm1(lp)
    loss = float(w @ np.log1p(odds))  # -ln(1 - p) = ln(1 + p / (1 - p))
    return loss, (w * odds).astype(np.float32), {"loss": loss, **dropped}


def token_metrics(targets: Ints, *, num_tokens: float, top1: Bools, entropy: Floats) -> Metrics:
    """``mean_token_accuracy`` (targets that were the likeliest token) and ``entropy`` in nats, means over ``num_tokens`` of the step."""
    require_positive(num_tokens=num_tokens)
    require_shape(targets.shape, top1=top1, entropy=entropy)
    counted = targets >= 0
    return {
        "mean_token_accuracy": float(np.count_nonzero(top1[counted]) / num_tokens),
        "entropy": float(f64(entropy)[counted].sum() / num_tokens),
    }
