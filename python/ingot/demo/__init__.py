"""``ingot demo``: train on the built-in small world, and show what the model can do before, during and after.

This module stays light: everything heavy is imported inside :func:`run`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from ingot.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The demo: a recipe, a seed, and where to put the model and the report."""

    output: str = "runs/demo"
    """Folder for the model, report.html and report.json."""
    recipe: Literal["world", "world-long"] = "world"
    """world: about four minutes on two cores; world-long: until questions about a story are answered too."""
    seed: int = 0
    """Of the stories, the initial weights and the samples."""
    max_steps: int | None = None
    """Steps of training; those of the recipe unless given. A few dozen show how it works, not what it reaches."""
    num_samples: int = 1000
    """Stories that the finished model writes, and held-out documents that it is measured on."""
    threads: int | None = None
    """CPU threads; what affinity and the container allow unless given."""
    level: Literal["portable", "avx2", "avx512"] | None = None
    """Force an instruction level; the best one unless given."""
    dry_run: bool = False
    """Print what training would cost, and stop."""
    json: bool = False
    """Print the report as JSON instead of the progress."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "num_samples", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more, got {self.seed}")


def run(config: DemoConfig) -> dict[str, Any]:
    """Train, measure, and write the report.

    Returns
    -------
    dict
        The content of report.json; empty for a dry run.

    Raises
    ------
    IngotError
        One line that says what is wrong, as :func:`ingot.pretrain` does.
    """
    from ingot.demo.show import show

    return show(config)
