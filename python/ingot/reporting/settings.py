"""Settings of a run beside their defaults, with what each of them means."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import textwrap
from collections.abc import Mapping
from typing import Any


def settings_of(kind: str, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each setting's ``name``, ``value``, ``default``, ``meaning``, and whether it is ``changed``; those of the phase first, in its order.

    Where the phase is not known to this version, none counts as changed.
    """
    known = config_class(kind)
    given = _flat(config)
    if known is None:
        return [_row(name, value, None, "", False) for name, value in given.items()]
    defaults, meanings = _flat(known().to_dict()), _meanings(known)
    fields = [field.name for field in dataclasses.fields(known)]
    rows = []
    for name in dict.fromkeys((*fields, *defaults, *given)):
        value, default = given.get(name, defaults.get(name)), defaults.get(name)
        if name in fields and name not in given and any(other.startswith(f"{name}.") for other in given):
            # A table: its entries have rows of their own.
            continue
        if name == "architecture":
            continue
        rows.append(_row(name, value, default, meanings.get(name.rpartition(".")[2], ""), value != default))
    return rows


@functools.cache
def config_class(kind: str) -> Any:
    """The settings of a phase: the dataclass that configs/PHASE.py has for it; None where there is none."""
    if not kind.isidentifier():
        return None
    try:
        module = importlib.import_module(f"ingot.configs.{kind}")
    except ImportError:
        return None
    for value in vars(module).values():
        own = inspect.isclass(value) and dataclasses.is_dataclass(value) and value.__module__ == module.__name__
        if own and value.__name__.lower() == f"{kind}config":
            return value
    return None


def _row(name: str, value: Any, default: Any, meaning: str, changed: bool) -> dict[str, Any]:
    return {"name": name, "value": value, "default": default, "meaning": meaning, "changed": changed}


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Entries of tables under their names joined by dots."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{name}.")
        else:
            found[f"{before}{name}"] = list(value) if isinstance(value, tuple) else value
    return found


def _meanings(config: type) -> dict[str, str]:
    """The text under each field, of the class, those that it is made from, and the tables in it."""
    tables = [type(field.default) for field in dataclasses.fields(config) if dataclasses.is_dataclass(field.default)]
    found: dict[str, str] = {}
    for each in (*tables, *reversed(config.__mro__)):
        if not dataclasses.is_dataclass(each) or each is object:
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0]
        except (OSError, SyntaxError):
            continue
        assert isinstance(body, ast.ClassDef)
        for statement, after in zip(body.body, body.body[1:], strict=False):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            if (
                isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            ):
                found[statement.target.id] = " ".join(after.value.value.split())
    return found
