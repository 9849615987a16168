"""``ingot demo``: the whole path on the built-in small world, from raw text to an aligned model, and what each stage changed.

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
    """Folder for the models, the data between them, report.html and report.json. The same command goes on with an interrupted demo."""
    recipe: Literal["world", "world-long"] = "world"
    """world: about four minutes on two cores; world-long: until questions about a story are answered too."""
    stages: Literal["all", "pretrain"] = "all"
    """all: pretraining, fine-tuning, rankings, reward model, PPO and DPO; pretrain: the first of them alone."""
    label: Literal["rule", "me"] = "rule"
    """Who ranks the answers: the world's rule with some noise, or you, in the terminal."""
    seed: int = 0
    """Of the stories, the initial weights and the samples."""
    max_steps: int | None = None
    """Steps of pretraining; those of the recipe unless given. The other stages are cut in proportion. A few dozen show how it works, not what
    it reaches."""
    num_samples: int = 1000
    """Stories that the pretrained model writes, and held-out documents that it is measured on."""
    num_requests: int = 4000
    """Held-out requests that the policies are measured on in the end."""
    threads: int | None = None
    """CPU threads; what affinity and the container allow unless given."""
    level: Literal["portable", "avx2", "avx512"] | None = None
    """Force an instruction level; the best one unless given."""
    dry_run: bool = False
    """Print what training would cost, and stop."""
    json: bool = False
    """Print the report as JSON instead of the progress."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "num_samples", "num_requests", "threads"):
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
        The content of report.json (that of pretraining for the first stage alone); empty for a dry run.

    Raises
    ------
    IngotError
        One line that says what is wrong, as :func:`ingot.pretrain` does.
    """
    from ingot.demo.course import run_course

    return run_course(config)
