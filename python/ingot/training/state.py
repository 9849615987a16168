"""What changes from step to step, beside weights and moments: trainer_state.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ingot.data.batches import Cursor


@dataclasses.dataclass
class State:
    """The place in the data, the place in the logs, and what later decisions depend on."""

    step: int = 0
    """Steps that are done."""
    cursor: Cursor = dataclasses.field(default_factory=Cursor)
    tokens: int = 0
    """Targets seen."""
    skipped_steps: int = 0
    """Steps whose gradient was not finite."""
    skipped_in_row: int = 0
    loss_sum: float = 0.0
    """Of the finite losses since the last line of metrics."""
    loss_count: int = 0
    evaluated_step: int = -1
    eval_loss: float | None = None
    """Held-out loss at ``evaluated_step``."""
    best_loss: float | None = None
    """Lowest held-out loss so far; its weights are at the top of the run's folder."""
    best_step: int | None = None
    best_saved_loss: float | None = None
    """Held-out loss of the best checkpoint, which is kept."""
    best_saved_step: int | None = None
    metrics_lines: int = 0
    samples_lines: int = 0
    elapsed_s: float = 0.0
    """Time spent in all processes of this run."""
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What one phase alone has to remember, as plain values: a coefficient that moves, a position, counts."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> State:
        """The inverse of :meth:`to_dict`; other entries of the file are left aside."""
        names = {field.name for field in dataclasses.fields(cls)}
        kept = {name: value for name, value in fields.items() if name in names}
        return cls(**{**kept, "cursor": Cursor(**fields["cursor"])})
