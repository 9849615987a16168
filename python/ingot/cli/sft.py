"""``ingot sft``: configuration file and flags become one SFTConfig; the loop itself is training/sft.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ingot.cli.outcome import print_outcome
from ingot.cli.settings import config_of, parse_run
from ingot.configs import SFTConfig
from ingot.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFT(SFTConfig):
    """Fine-tune a model on demonstrations, so that it answers.

    Special tokens of the chat template are added and the embedding grown where the model lacks them. Settings come from --config, then
    the flags over it; the result is saved with the run before anything slow starts. Ctrl-C saves and prints the line that resumes.
    """

    config: str | None = None
    """Start from a TOML file with these names (dashes as underscores)."""
    resume: str | None = None
    """Go on with an interrupted run: its folder. With --max-steps N a finished one is extended."""
    dry_run: bool = False
    """Print what the run would be, its cost in time and memory, and stop."""
    json: bool = False
    """Print nothing but one JSON line at the end (of a dry run its plan): steps, losses, the verdict, the folder."""

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> SFT:
        """Flags over the configuration file over the defaults."""
        return parse_run(cls, SFTConfig, arguments, prog="ingot sft")

    def run(self) -> int:
        """Start or resume the run."""
        from ingot.training import sft as phase

        if self.resume is not None:
            result = phase.resume(
                self.resume, max_steps=self.max_steps, threads=self.threads, level=self.level, quiet=self.json
            )
        else:
            if not self.model:
                raise ConfigError("no model to start from: give --model with the folder of a pretrained one")
            if not self.data:
                raise ConfigError("no demonstrations to learn from: give --data with files of rows")
            result = phase.sft(config_of(self, SFTConfig), dry_run=self.dry_run, quiet=self.json)
        if self.json:
            print_outcome(result)
        return 0
