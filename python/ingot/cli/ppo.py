"""``ingot ppo``: configuration file and flags become one PPOConfig; the loop itself is training/ppo.py."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from ingot.cli.settings import LENGTHS, flag_names, flag_value, override, verdict_facts
from ingot.configs import PPOConfig, load_toml
from ingot.errors import ConfigError

_GROUPS = ((*LENGTHS, "total_episodes"),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPO(PPOConfig):
    """Let a model answer prompts and learn from the rewards of its answers (proximal policy optimisation).

    It starts from a model that answers (ingot sft) and a reward: a reward model (ingot reward), Python functions, or several with weights.
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
    def parse(cls, arguments: Sequence[str]) -> PPO:
        """Flags over the configuration file over the defaults."""
        from ingot.cli import parse_flags

        fields: dict[str, Any] = {}
        config = flag_value(arguments, "config")
        if config is not None:
            override(fields, PPOConfig.fields_of(load_toml(config), config), _GROUPS)
        given = flag_names(arguments)
        override(fields, {}, _GROUPS, given)
        if given & {"reward", "reward_weights"}:
            # Rewards on the command line stand instead of those of the file, and are not added to them; weights belong to their rewards.
            fields.pop("reward_weights", None)
        if "reward" in given:
            fields.pop("reward", None)
        return parse_flags(cls, arguments, prog="ingot ppo", default=cls(**fields))

    def settings(self) -> PPOConfig:
        """The configuration of the run, without the flags that only led to it."""
        names = [field.name for field in dataclasses.fields(PPOConfig)]
        return PPOConfig(**{name: getattr(self, name) for name in names})

    def run(self) -> int:
        """Start or resume the run."""
        from ingot.training import ppo as phase

        if self.resume is not None:
            result = phase.resume(
                self.resume, max_steps=self.max_steps, threads=self.threads, level=self.level, quiet=self.json
            )
        else:
            if not self.model:
                raise ConfigError("no model to start from: give --model with the folder of one that answers")
            if not self.prompts:
                raise ConfigError("no prompts to answer: give --prompts with files of rows")
            result = phase.ppo(self.settings(), dry_run=self.dry_run, quiet=self.json)
        if self.json:
            steps = [line["step"] for line in result.history if "loss" in line]
            facts: dict[str, Any] = {
                "output": str(result.output),
                "steps": steps[-1] if steps else 0,
                "num_parameters": result.model.config.num_parameters,
            }
            facts |= verdict_facts(result.output) if result.plan is None else result.plan
            print(json.dumps(facts))
        return 0
