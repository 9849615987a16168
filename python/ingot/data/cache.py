"""The folder of tokenized data that is kept between runs: what lies in it, and what may not be used.

Files of two kinds: tokenized text (:mod:`ingot.data.shards`) and tokenized rows (:mod:`ingot.data.row_cache`). The name of each holds the
hashes of all that it was made from, so that data which changed are made anew and stand beside the old.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from ingot.errors import DataError

TOKENS_SUFFIX = ".tokens"
ROWS_SUFFIX = ".rows.safetensors"
REMEDY = "delete it and it will be made again"


class CacheMismatch(DataError):
    """A file was made from something else than its name says, so that somebody copied or renamed it."""


def cached_name(*hashes: str) -> str:
    """The name, without its suffix, of a file made from what has these hashes; one that is empty stands for nothing."""
    return "-".join(found[:16] or "0" for found in hashes)


def require_same(path: Path, found: Mapping[str, object], expected: Mapping[str, tuple[str, str]]) -> None:
    """Refuse a file that was made from something else.

    Parameters
    ----------
    found
        The header of the file.
    expected
        For each hash of the header, what it is of, in words, and what it should be.

    Raises
    ------
    CacheMismatch
        Names each hash that differs.
    """
    others = [
        f"another {words} ({name} {str(found.get(name) or 'none')[:12]}, expected {wanted[:12] or 'none'})"
        for name, (words, wanted) in expected.items()
        if found.get(name) != wanted
    ]
    if others:
        raise CacheMismatch(f"{path}: made with {' and '.join(others)}; {REMEDY}")


def cached_files(folder: str | Path) -> list[Path]:
    """The files of a cache folder, and what unfinished writes left there."""
    found = {path for suffix in (TOKENS_SUFFIX, ROWS_SUFFIX) for path in Path(folder).glob(f"*{suffix}*")}
    return sorted(path for path in found if path.is_file())


def clear_cache(folder: str | Path) -> tuple[int, int]:
    """Delete the files of a cache folder: how many went, and their bytes. One that another run has open may stay (Windows)."""
    count = freed = 0
    for path in cached_files(folder):
        with contextlib.suppress(OSError):
            size = path.stat().st_size
            path.unlink()
            count += 1
            freed += size
    return count, freed
