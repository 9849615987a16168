"""What settings are read from and checked with: TOML files, recipes, durations, names of keys."""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from ingot.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Refuse a setting.

    Raises
    ------
    ConfigError
        With ``message``, where the condition does not hold.
    """
    if not condition:
        raise ConfigError(message)


def check_keys(config: type, fields: Mapping[str, Any], source: str) -> None:
    """Refuse keys that ``config`` has no field for.

    Raises
    ------
    ConfigError
        Names the key, the source and the nearest field.
    """
    known = [field.name for field in dataclasses.fields(config)]
    for key in fields:
        if key not in known:
            near = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise ConfigError(f"{source}: unknown key {key!r}; {hint}")


def check_types(config: type, fields: Mapping[str, Any], source: str) -> None:
    """Refuse values of another type than the field of ``config`` has, such as a number in quotes.

    Raises
    ------
    ConfigError
        Names the key, the source, the value and what it should be.
    """
    hints = typing.get_type_hints(config)
    for key, value in fields.items():
        if not _fits(value, hints[key]):
            wanted = _in_words(hints[key])
            raise ConfigError(f"{source}: {key} is {value!r}; give {wanted}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from a TOML file is one of a field's type; an array is a list or, once converted, a tuple."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in options)
    if origin is typing.Literal:
        return value in options
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(entry, options[0]) for entry in value)
    if hint in (int, float):
        # True is an int to Python.
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


def _in_words(hint: Any) -> str:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_in_words(option) for option in options if option is not type(None))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, options))
    if origin is tuple:
        return f"a list, each entry {_in_words(options[0])}"
    words = {int: "a whole number", float: "a number", str: "a text in quotes", bool: "true or false"}
    return words.get(hint, f"a {getattr(hint, '__name__', hint)}")


def load_toml(path: str | Path) -> dict[str, Any]:
    """A TOML file as a mapping; :class:`ConfigError` names file and line where it cannot be read."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from None


def recipe_names() -> list[str]:
    """Names of the recipes shipped in the package."""
    folder = resources.files("ingot") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name: str) -> dict[str, Any]:
    """The recipe of that name as a mapping; an unknown one is an error that names the nearest."""
    names = recipe_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"no recipe is named {name!r}; {hint}There are: {', '.join(names)}")
    text = (resources.files("ingot") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(text: str) -> float:
    """Seconds of ``90s``, ``30m``, ``2h``, ``1h30m`` or a plain number of seconds.

    >>> parse_duration("1h30m")
    5400.0
    """
    compact = text.replace(" ", "").lower()
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd]?)", compact)
    if not parts or "".join(number + unit for number, unit in parts) != compact or any(not u for _, u in parts[:-1]):
        raise ConfigError(f"{text!r} is not a duration: write for example 90s, 30m, 2h or 1h30m")
    seconds = sum(float(number) * _UNITS[unit or "s"] for number, unit in parts)
    if seconds <= 0:
        raise ConfigError(f"{text!r} is not a duration above zero")
    return seconds
