"""``ingot pretrain``: recipe, configuration file and flags become one PretrainConfig; the loop itself is training/pretrain.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ingot.cli.settings import LENGTHS, flag_names, flag_value, override
from ingot.configs import PretrainConfig, load_recipe, load_toml
from ingot.errors import ConfigError

# Settings that exclude one another.
_GROUPS = (LENGTHS, ("tokenizer", "vocab_size"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrain(PretrainConfig):
    """Train a network to predict the next token of raw text.

    Settings come from --recipe, then --config over it, then the flags over both; the result is saved with the run before
    anything slow starts. Ctrl-C saves and prints the line that resumes.
    """

    recipe: str | None = None
    """Start from a recipe shipped with ingot, such as shakespeare-char-cpu or folder."""
    config: str | None = None
    """Start from a TOML file with these names (dashes as underscores; the network's in a table [model])."""
    resume: str | None = None
    """Go on with an interrupted run: its folder. With --max-steps N a finished one is extended."""
    dry_run: bool = False
    """Print what the run would be, its cost in time and memory, and stop."""

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> Pretrain:
        """Flags over the configuration file over the recipe over the defaults."""
        from ingot.cli import parse_flags

        fields: dict[str, Any] = {}
        recipe, config = flag_value(arguments, "recipe"), flag_value(arguments, "config")
        if recipe is not None:
            fields |= PretrainConfig.fields_of(load_recipe(recipe), f"recipe {recipe}")
        if config is not None:
            override(fields, PretrainConfig.fields_of(load_toml(config), config), _GROUPS)
        override(fields, {}, _GROUPS, flag_names(arguments))
        parsed = parse_flags(cls, arguments, prog="ingot pretrain", default=cls(**fields))
        shape = sorted(name for name in flag_names(arguments) if name.startswith("model."))
        if parsed.model is not None and shape:
            flag = "--" + shape[0].replace("_", "-")
            raise ConfigError(f"{flag} shapes a new network, and --model goes on from one: leave one of them out")
        return parsed

    def settings(self) -> PretrainConfig:
        """The configuration of the run, without the flags that only led to it."""
        names = [field.name for field in dataclasses.fields(PretrainConfig)]
        return PretrainConfig(**{name: getattr(self, name) for name in names})

    def run(self) -> int:
        """Start or resume the run."""
        from ingot.training import pretrain

        if self.resume is not None:
            pretrain.resume(self.resume, max_steps=self.max_steps, threads=self.threads, level=self.level)
            return 0
        if not self.data:
            raise ConfigError("no text to learn from: give --data with files or folders")
        pretrain.pretrain(self.settings(), dry_run=self.dry_run)
        return 0
