"""How recipe, configuration file and flags become one configuration: the later ones win."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ingot.errors import ConfigError

if TYPE_CHECKING:
    from ingot.configs import RunConfig

CommandT = TypeVar("CommandT")
ConfigT = TypeVar("ConfigT", bound="RunConfig")

LENGTHS = ("max_steps", "num_train_epochs", "max_time")
"""Each fixes the length of a run, so a run has one of them."""

# Flags that go with --resume: all else is as the run began.
_RESUMING = {"resume", "max_steps", "threads", "level", "json", "no_json"}


def check_resume(command: object, arguments: Sequence[str]) -> None:
    """Refuse settings beside ``--resume``, where they would be ignored.

    Raises
    ------
    ConfigError
        Names the first of them.
    """
    if getattr(command, "resume", None) is None:
        return
    others = [name for name in flag_names(arguments) if name not in _RESUMING]
    if others:
        flag = "--" + min(others).replace("_", "-")
        raise ConfigError(
            f"--resume goes on with the run's own settings: leave {flag} out (--max-steps, --threads and --level may be given)"
        )


_NEEDED = (
    "model",
    "reference_model",
    "teacher",
    "data",
    "prompts",
    "reward_model",
    "reward",
    "output",
    "config",
    "resume",
)
"""What is read first of a phase's help: what a run is made from, and how it goes on."""


def put_needed_first(command: type) -> None:
    """Let ``--help`` of a phase begin with what a run is made from, then the phase's own settings, then what all phases share."""
    from ingot.configs import RunConfig

    if not issubclass(command, RunConfig):
        return
    fields = command.__dataclass_fields__
    by_class = [name for base in (*command.__mro__[1:], command) for name in vars(base).get("__annotations__", ())]
    order = [name for name in dict.fromkeys((*_NEEDED, *by_class)) if name in fields]
    command.__dataclass_fields__ = {name: fields[name] for name in order}


def flag_value(arguments: Sequence[str], flag: str) -> str | None:
    """The value of ``--flag``, before the flags are parsed."""
    for index, argument in enumerate(arguments):
        if argument == f"--{flag}" and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith(f"--{flag}="):
            return argument.partition("=")[2]
    return None


def flag_names(arguments: Sequence[str]) -> set[str]:
    """Names of the flags that are given, as fields have them."""
    return {argument.split("=")[0].lstrip("-").replace("-", "_") for argument in arguments if argument.startswith("--")}


def override(
    fields: dict[str, Any], newer: dict[str, Any], groups: Sequence[Sequence[str]], names: set[str] | None = None
) -> None:
    """Put ``newer`` over ``fields``; of the settings of a group, which exclude one another, the newer one wins.

    ``names`` are those that win, where they come from elsewhere than ``newer``.
    """
    winners = names if names is not None else set(newer)
    for group in groups:
        if winners.intersection(group):
            for name in group:
                fields.pop(name, None)
    fields |= newer


def parse_run(
    command: type[CommandT],
    config_type: type[RunConfig],
    arguments: Sequence[str],
    *,
    prog: str,
    groups: Sequence[Sequence[str]] = (LENGTHS,),
    recipe: dict[str, Any] | None = None,
) -> CommandT:
    """Flags over the configuration file over the recipe, if any, over the defaults. Of the settings of a group the newest wins."""
    from ingot.cli import parse_flags
    from ingot.configs import load_toml

    fields = dict(recipe or {})
    config, given = flag_value(arguments, "config"), flag_names(arguments)
    if config is not None:
        override(fields, config_type.fields_of(load_toml(config), config), groups)
    override(fields, {}, groups, given)
    if given & {"reward", "reward_weights"}:
        # Rewards on the command line stand instead of those of the file, and are not added to them; weights belong to their rewards.
        fields.pop("reward_weights", None)
    if "reward" in given:
        fields.pop("reward", None)
    return parse_flags(command, arguments, prog=prog, default=command(**fields))


def config_of(command: object, config_type: type[ConfigT]) -> ConfigT:
    """The configuration of the run, without the flags that only led to it."""
    return config_type(**{field.name: getattr(command, field.name) for field in dataclasses.fields(config_type)})
