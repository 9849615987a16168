"""Next-token cross-entropy over a packed batch: the negative log-likelihood of each token given those before it.

The mean over all targets of a step, whatever batches they lie in: weights carry 1 / W, with W the step's targets, known before the
backward pass. Then the gradients of a step's batches add up to the gradient of the whole, however it is divided.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt


def token_weights(targets: npt.NDArray[np.int32], num_targets: int) -> npt.NDArray[np.float32]:
    """Weights of the mean loss, f32 [N]: 1 / ``num_targets`` where there is a target (>= 0), else 0.

    ``num_targets`` counts the targets of the whole step, of which this batch may be a part.
    """
    if num_targets < 1:
        raise ValueError(f"num_targets must be at least 1, got {num_targets}")
    return np.where(targets >= 0, np.float32(1.0 / num_targets), np.float32(0.0)).astype(np.float32)


def next_token_loss(
    logprobs: npt.NDArray[np.float32], targets: npt.NDArray[np.int32], weights: npt.NDArray[np.float32]
) -> tuple[float, npt.NDArray[np.float32], dict[str, float]]:
    """L = sum_t w_t * -ln p(target_t), its gradient by the log-probabilities, and metrics.

    Parameters
    ----------
    logprobs
        f32 [N], ln p(target) in nats.
    targets
        i32 [N], -1 where none; such tokens count nothing whatever their weight.
    weights
        f32 [N], from :func:`token_weights`.

    Returns
    -------
    loss
        f64, summed in f64.
    d_logprobs
        f32 [N]: -w.
    metrics
        ``loss`` and ``num_tokens``.
    """
    scored = targets >= 0
    w = np.where(scored, weights, np.float32(0.0)).astype(np.float32)
    # Outputs are 0 where not requested, yet nothing here relies on it: 0 * NaN would be NaN.
    values = np.where(scored, logprobs, np.float32(0.0)).astype(np.float64)
    loss = -float(values @ w.astype(np.float64))
    return loss, -w, {"loss": loss, "num_tokens": float(np.count_nonzero(scored))}


def perplexity(loss: float) -> float:
    """exp(loss), without overflow."""
    return math.exp(min(loss, 700.0))
