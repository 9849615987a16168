"""Rows tokenized through the cache in a process of its own, for tests that end it by force or run several at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ingot.data.cache import cached_files
from ingot.data.chat import ChatEncoder, ChatTemplate, Encoded
from ingot.data.examples import encode_row
from ingot.data.row_cache import RowCache, encode_rows
from ingot.data.rows import read_rows
from ingot.durable import crash_points
from ingot.tokenizer import END_OF_TEXT, Tokenizer

TEMPLATE = ChatTemplate.built_in()
_BASE = Tokenizer.bytes_only().with_special_tokens([END_OF_TEXT])
TOKENIZER = _BASE.with_special_tokens(TEMPLATE.missing_special_tokens(_BASE))
ENCODER = ChatEncoder(TEMPLATE, TOKENIZER)
PAIRS = [{"prompt": f"p{number}", "chosen": "yes", "rejected": "no"} for number in range(20)]


def kept(
    folder: Path,
    lines: list[str] | None = None,
    encode: Callable[[Any], list[Encoded]] | None = None,
    entries: list[dict[str, Any]] | None = None,
    settings: dict[str, object] | None = None,
    **hashes: str,
) -> list[tuple[Encoded, ...]]:
    """Rows through the cache of a folder; what it says goes to ``lines``."""
    return encode_rows(
        list(read_rows(entries or PAIRS)),
        encode or (lambda row: encode_row(row, ENCODER)),
        tokenizer_hash=hashes.get("tokenizer_hash", TOKENIZER.hash),
        template_hash=hashes.get("template_hash", TEMPLATE.hash),
        settings=settings,
        cache=RowCache(folder, [].append if lines is None else lines.append),
    )


def shown(groups: Any) -> list[list[tuple[list[int], list[bool], tuple[int, ...]]]]:
    """Groups as values that can be compared."""
    return [[(each.ids.tolist(), each.mask.tolist(), each.ends) for each in group] for group in groups]


def hammer(folder: Path, number: int, count: int) -> None:
    """Entry of a process: build, use and clear what the others build, use and clear."""
    expected = shown(kept(folder / "alone" / str(number)))
    for turn in range(count):
        lines: list[str] = []
        if (turn + number) % 3 == 0:
            for path in cached_files(folder / "shared"):
                if not path.name.startswith(".tmp-"):
                    path.unlink(missing_ok=True)
        if shown(kept(folder / "shared", lines)) != expected or lines:
            sys.exit(3)


def die_at(folder: Path, kill_at: int | None, names: Path) -> None:
    """Entry of a process: build, and die at a point; ``names`` gets those of all points."""
    seen: list[str] = []

    def reached(name: str) -> None:
        seen.append(name)
        if len(seen) - 1 == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    crash_points.append(reached)
    kept(folder)
    names.write_text("\n".join(seen))
