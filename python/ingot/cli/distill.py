"""``ingot distill``: configuration file and flags become one DistillConfig; the loop itself is training/distill.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ingot.cli.outcome import print_outcome
from ingot.cli.settings import config_of, parse_run
from ingot.configs import DistillConfig
from ingot.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill(DistillConfig):
    """Let a student learn from a better model: on its own answers, on the teacher's, or on both.

    Settings come from --config, then the flags over it; the result is saved with the run before anything slow starts. Ctrl-C saves and
    prints the line that resumes.
    """

    config: str | None = None
    """Start from a TOML file with these names (dashes as underscores)."""
    resume: str | None = None
    """Go on with an interrupted run: its folder. With --max-steps N a finished one is extended."""
    force: bool = False
    """Go on from a student or with a teacher whose own run did not pass its gate."""
    dry_run: bool = False
    """Print what the run would be, its cost in time and memory, and stop."""
    json: bool = False
    """Print nothing but one JSON line at the end (of a dry run its plan): steps, losses, the verdict, the folder."""

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> Distill:
        """Flags over the configuration file over the defaults."""
        return parse_run(cls, DistillConfig, arguments, prog="ingot distill")

    def run(self) -> int:
        """Start or resume the run."""
        from ingot.training import distill as phase

        if self.resume is not None:
            result = phase.resume(
                self.resume, max_steps=self.max_steps, threads=self.threads, level=self.level, quiet=self.json
            )
        else:
            if not self.data:
                raise ConfigError("no prompts to answer: give --data with files of rows that have one")
            result = phase.distill(
                config_of(self, DistillConfig), dry_run=self.dry_run, force=self.force, quiet=self.json
            )
        if self.json:
            print_outcome(result)
        return 0
