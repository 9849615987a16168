"""``ingot sft``: configuration file and flags become one SFTConfig; the loop itself is training/sft.py."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from ingot.cli.settings import LENGTHS, flag_names, flag_value, override, verdict_facts
from ingot.configs import SFTConfig, load_toml
from ingot.errors import ConfigError

_GROUPS = (LENGTHS,)


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
        from ingot.cli import parse_flags

        fields: dict[str, Any] = {}
        config = flag_value(arguments, "config")
        if config is not None:
            override(fields, SFTConfig.fields_of(load_toml(config), config), _GROUPS)
        override(fields, {}, _GROUPS, flag_names(arguments))
        return parse_flags(cls, arguments, prog="ingot sft", default=cls(**fields))

    def settings(self) -> SFTConfig:
        """The configuration of the run, without the flags that only led to it."""
        names = [field.name for field in dataclasses.fields(SFTConfig)]
        return SFTConfig(**{name: getattr(self, name) for name in names})

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
            result = phase.sft(self.settings(), dry_run=self.dry_run, quiet=self.json)
        if self.json:
            last = [line for line in result.history if "loss" in line]
            facts: dict[str, Any] = {
                "output": str(result.output),
                "steps": last[-1]["step"] if last else 0,
                "best_loss": result.best_loss,
                "final_loss": result.final_loss,
                "num_parameters": result.model.num_parameters,
            }
            facts |= verdict_facts(result.output) if result.plan is None else result.plan
            print(json.dumps(facts))
        return 0
