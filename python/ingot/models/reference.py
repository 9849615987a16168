"""The reference model: the policy as it was before training, which KL penalties and preference losses compare with."""

from __future__ import annotations

from ingot.models.base import Model


def reference_of(model: Model) -> Model:
    """A model with the weights that ``model`` has now; training ``model`` does not change it. For forward passes only.

    It costs no memory until ``model`` is first written to (see :meth:`ingot.models.base.Model.fork`), and then one copy of the weights.
    """
    return model.fork()
