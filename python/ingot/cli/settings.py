"""How recipe, configuration file and flags become one configuration: the later ones win."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ingot.errors import ConfigError

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
