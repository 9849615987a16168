"""``ingot reward``: configuration file and flags become one RewardConfig; the loop itself is training/reward_model.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ingot.cli.outcome import print_outcome
from ingot.cli.settings import config_of, parse_run
from ingot.configs import RewardConfig
from ingot.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward(RewardConfig):
    """Train a model on judgements that scores answers, or their steps, as people would.

    It learns from rows of one sort: ranked lists and pairs (prompt, chosen, rejected); answers that were wanted or not (prompt, completion, label); or
    answers in steps (prompt, completions, labels), for a process reward model. It ends with a verdict on held-out prompts, beside what
    rules without a network get. Settings come from --config, then the flags over it; the result is saved with the run before anything slow starts. Ctrl-C saves and prints the line that resumes.
    """

    config: str | None = None
    """Start from a TOML file with these names (dashes as underscores)."""
    resume: str | None = None
    """Go on with an interrupted run: its folder. With --max-steps N a finished one is extended."""
    dry_run: bool = False
    """Print what the run would be, its cost in time and memory, and stop."""
    force: bool = False
    """Go on where the run that made the model did not pass its own gate."""
    json: bool = False
    """Print nothing but one JSON line at the end (of a dry run its plan): steps, losses, the verdict, the folder."""

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> Reward:
        """Flags over the configuration file over the defaults."""
        return parse_run(cls, RewardConfig, arguments, prog="ingot reward")

    def run(self) -> int:
        """Start or resume the run."""
        from ingot.training import reward_model as phase

        if self.resume is not None:
            result = phase.resume(
                self.resume, max_steps=self.max_steps, threads=self.threads, level=self.level, quiet=self.json
            )
        else:
            if not self.model:
                raise ConfigError("no model to start from: give --model with the folder of one that answers")
            if not self.data:
                raise ConfigError(
                    "no judgements to learn from: give --data with files of ranked lists, pairs, or answers with labels"
                )
            result = phase.train_reward_model(
                config_of(self, RewardConfig), dry_run=self.dry_run, force=self.force, quiet=self.json
            )
        if self.json:
            print_outcome(result)
        return 0
