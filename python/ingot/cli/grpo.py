"""``ingot grpo``: configuration file and flags become one GRPOConfig; the loop itself is training/grpo.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ingot.cli.outcome import print_outcome
from ingot.cli.settings import LENGTHS, config_of, parse_run
from ingot.configs import GRPOConfig
from ingot.errors import ConfigError

_GROUPS = ((*LENGTHS, "total_episodes"),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPO(GRPOConfig):
    """Let a model give several answers to each prompt and learn from how their rewards compare (GRPO, DAPO, RLOO and others).

    It starts from a model that answers (ingot sft) and a reward: Python functions, the folder of a reward model, or several with weights.
    What it gains is measured on held-out prompts. Settings come from --config, then the flags over it; the result is saved with the run
    before anything slow starts. Ctrl-C saves and prints the line that resumes.
    """

    config: str | None = None
    """Start from a TOML file with these names (dashes as underscores)."""
    resume: str | None = None
    """Go on with an interrupted run: its folder. With --max-steps N a finished one is extended."""
    dry_run: bool = False
    """Print what the run would be, its cost in time and memory, and stop."""
    json: bool = False
    """Print nothing but one JSON line at the end (of a dry run its plan): updates, the verdict with what was measured before and after, the folder."""

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> GRPO:
        """Flags over the configuration file over the defaults."""
        return parse_run(cls, GRPOConfig, arguments, prog="ingot grpo", groups=_GROUPS)

    def run(self) -> int:
        """Start or resume the run."""
        from ingot.training import grpo as phase

        if self.resume is not None:
            result = phase.resume(
                self.resume, max_steps=self.max_steps, threads=self.threads, level=self.level, quiet=self.json
            )
        else:
            if not self.model:
                raise ConfigError("no model to start from: give --model with the folder of one that answers")
            if not self.prompts:
                raise ConfigError("no prompts to answer: give --prompts with files of rows")
            result = phase.grpo(config_of(self, GRPOConfig), dry_run=self.dry_run, quiet=self.json)
        if self.json:
            print_outcome(result, losses=False)
        return 0
