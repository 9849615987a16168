"""The reference model: the policy as it was before training, which KL penalties and preference losses compare with."""

from __future__ import annotations

import numpy as np

from ingot.models.base import Model


def reference_of(model: Model) -> Model:
    """A model with the weights that ``model`` has now; training ``model`` does not change it. For forward passes only.

    It costs no memory until ``model`` is first written to (see :meth:`ingot.models.base.Model.fork`), and then one copy of the weights.
    """
    return model.fork()


def mix_into(reference: Model, policy: Model, alpha: float) -> None:
    """reference = alpha * policy + (1 - alpha) * reference, in f64 and rounded once to f32 (TR-DPO, Gorbatovski et al. 2024).

    The policy counts with its active adapter merged: of an adapter's factors no mixture exists. Models that share memory with the
    reference keep their weights; the first such write gives the reference a copy of its own.

    Parameters
    ----------
    reference
        Of the same shape as the policy.
    alpha
        Above 0, at most 1: the policy as it is.
    """
    goal = policy.merged_state()
    mixed = {
        name: (alpha * goal[name].astype(np.float64) + (1.0 - alpha) * values.astype(np.float64)).astype(np.float32)
        for name, values in reference.state().items()
    }
    reference.load_state(mixed)
