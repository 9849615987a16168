"""The reference model: the policy as it was before training, which KL penalties and preference losses compare with."""

from __future__ import annotations

from ingot.models import Model
from ingot.models.base import Model as ModelProtocol


def reference_of(model: ModelProtocol) -> ModelProtocol:
    """A model with the weights that ``model`` has now; training ``model`` does not change it. For forward passes only."""
    device = model.level if model.backend == "torch" else None
    level = model.level if model.backend == "native" else None
    reference = Model(
        model.config,
        num_values=model.num_values,
        backend=model.backend,
        device=device,
        level=level,
        threads=model.threads,
    )
    reference.load_state(model.state())
    return reference
