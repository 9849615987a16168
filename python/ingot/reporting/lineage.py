"""Where a run comes from: the chain of runs that led to it, each with its data and its verdict."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ingot.errors import RunError
from ingot.reporting.records import Record, mapping, read_record

_MOST_RUNS = 30

SOURCES: tuple[tuple[str, str], ...] = (
    ("model", "started from"),
    ("reference_model", "held to"),
    ("reward_model", "scored by (proxy)"),
    ("reward", "scored by (proxy)"),
    ("judge", "watched by (judge)"),
    ("gold", "watched by (gold)"),
)
"""Settings that name other models or functions, and what each is to the run."""


def ancestry(record: Record) -> list[dict[str, Any]]:
    """The runs that led to this one, oldest first, itself last.

    Each has ``name``, ``folder``, ``kind`` (None for what is no run of ours: a model from elsewhere, a function, a folder that is gone),
    ``found``, ``data``, ``steps``, ``verdict`` and ``sources``: ``role`` and ``name`` of what it was made from.
    """
    entries: dict[str, dict[str, Any]] = {}
    _visit(record, str(record.path), entries, set())
    return list(entries.values())


def _visit(record: Record, name: str, entries: dict[str, dict[str, Any]], path: set[str]) -> None:
    key = _key(record.path)
    path = path | {key}
    sources = []
    for role, source, folder in sources_of(record):
        other = _key(folder) if folder is not None else source
        sources.append({"role": role, "name": source})
        if other in entries or other in path or len(entries) >= _MOST_RUNS:
            continue
        if folder is None:
            entries[other] = _stranger(source)
            continue
        try:
            _visit(read_record(folder), source, entries, path)
        except RunError:
            # A model from elsewhere: it has no run to tell of.
            entries[other] = _stranger(source, found=True)
    verdict = record.verdict
    entries[key] = {
        "name": name,
        "folder": str(record.path),
        "kind": record.kind,
        "found": True,
        "data": data_of(record),
        "steps": record.step,
        "finished": record.finished,
        "verdict": None if verdict is None else {"passed": verdict.passed, "text": verdict.text},
        "sources": sources,
    }


def sources_of(record: Record) -> Iterator[tuple[str, str, Path | None]]:
    """Role, name as it was given, and folder where it is one that is there, of all that the run was made from."""
    for key, role in SOURCES:
        for name in _names(record.config.get(key)):
            # What is trained against judges nothing.
            shown = "scored by (proxy)" if key == "judge" and judge_is_proxy(record) else role
            yield shown, name, _where(record, name)


def judge_is_proxy(record: Record) -> bool:
    """Whether the judge is what the run was trained against."""

    def places(*keys: str) -> set[str]:
        names = [name for key in keys for name in _names(record.config.get(key))]
        return {name if (folder := _where(record, name)) is None else _key(folder) for name in names}

    return bool(places("judge") & places("reward_model", "reward"))


def data_of(record: Record) -> list[str]:
    """The data that a run learned from, in a few words each."""
    told = [str(name) for key in ("data", "prompts", "ptx_data") for name in _names(record.config.get(key))]
    facts = mapping(record.facts.get("data"))
    for key, words in (
        ("num_documents", "documents"),
        ("num_rows", "rows"),
        ("num_train_pairs", "pairs to learn from"),
        ("num_train_labels", "labels to learn from"),
        ("num_tokens", "tokens"),
        ("train_tokens", "tokens to learn from"),
        ("num_held_out", "rows held out"),
        ("num_held_out_pairs", "pairs held out"),
    ):
        value = facts.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            told.append(f"{value:,} {words}")
    return told


def _names(value: object) -> list[str]:
    if isinstance(value, str):
        return [value] if value else []
    return [name for name in value if isinstance(name, str) and name] if isinstance(value, list | tuple) else []


def _where(record: Record, name: str) -> Path | None:
    """The folder that a setting names: seen from here, from where the run was made, or beside the run; also FOLDER:CRITERION."""
    bases = [Path(), record.path.parent]
    output = record.config.get("output")
    if isinstance(output, str) and not Path(output).is_absolute():
        parts, actual = Path(output).parts, record.path.absolute().parts
        if actual[-len(parts) :] == parts:
            bases.insert(0, Path(*actual[: -len(parts)]))
    for text in dict.fromkeys((name, name.rpartition(":")[0])):
        if not text:
            continue
        for place in [*(base / text for base in bases), record.path.parent / Path(text).name]:
            try:
                if place.is_dir():
                    return place
            except OSError:
                continue
    return None


def _key(folder: Path) -> str:
    return os.path.realpath(folder)


def _stranger(name: str, found: bool = False) -> dict[str, Any]:
    return {
        "name": name,
        "folder": name,
        "kind": None,
        "found": found,
        "data": [],
        "steps": None,
        "finished": None,
        "verdict": None,
        "sources": [],
    }


def model_of(facts: Mapping[str, Any]) -> str:
    """The network in words; empty where it is not known."""
    shape = mapping(facts.get("model_config"))
    layers, width, vocabulary = (shape.get(name) for name in ("num_hidden_layers", "hidden_size", "vocab_size"))
    if not all(isinstance(value, int) for value in (layers, width, vocabulary)):
        return ""
    return f"{layers} layers of width {width}, {vocabulary:,} tokens in the vocabulary"
