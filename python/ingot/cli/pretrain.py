"""``ingot pretrain``: recipe, configuration file and flags become one PretrainConfig; the loop itself is training/pretrain.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ingot.configs import PretrainConfig, load_recipe, load_toml, pretrain_fields
from ingot.errors import ConfigError

_LENGTHS = ("max_steps", "num_train_epochs", "max_time")
_VOCABULARIES = ("tokenizer", "vocab_size")


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
        recipe, config = _value(arguments, "recipe"), _value(arguments, "config")
        if recipe is not None:
            fields |= pretrain_fields(load_recipe(recipe), f"recipe {recipe}")
        if config is not None:
            _override(fields, pretrain_fields(load_toml(config), config))
        flags = {
            argument.split("=")[0].lstrip("-").replace("-", "_") for argument in arguments if argument.startswith("--")
        }
        _override(fields, {}, flags)
        return parse_flags(cls, arguments, prog="ingot pretrain", default=cls(**fields))

    def settings(self) -> PretrainConfig:
        """The configuration of the run, without the flags that only led to it."""
        names = [field.name for field in dataclasses.fields(PretrainConfig)]
        return PretrainConfig(**{name: getattr(self, name) for name in names})

    def run(self) -> int:
        """Start or resume the run."""
        import ingot

        if self.resume is not None:
            ingot.resume(self.resume, max_steps=self.max_steps, threads=self.threads, level=self.level)
            return 0
        if not self.data:
            raise ConfigError("no text to learn from: give --data with files or folders")
        ingot.pretrain(self.settings(), dry_run=self.dry_run)
        return 0


def _value(arguments: Sequence[str], flag: str) -> str | None:
    for index, argument in enumerate(arguments):
        if argument == f"--{flag}" and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith(f"--{flag}="):
            return argument.partition("=")[2]
    return None


def _override(fields: dict[str, Any], newer: dict[str, Any], flags: set[str] | None = None) -> None:
    """Put ``newer`` over ``fields``; of settings that exclude one another the newer one wins."""
    names = flags if flags is not None else set(newer)
    for group in (_LENGTHS, _VOCABULARIES):
        if names.intersection(group):
            for name in group:
                fields.pop(name, None)
    fields |= newer
