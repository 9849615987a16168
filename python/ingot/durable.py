"""Files that survive a crash: a reader sees the old content or the new, never a part of either.

Everything is written under a temporary name, synced, renamed, and the folder synced (a rename is only durable when its folder is).
Each of these operations announces itself by name to ``crash_points`` before and after it happens; tests end the process there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

TEMPORARY_PREFIX = ".tmp-"

crash_points: list[Callable[[str], None]] = []
"""Called with the name of each point around a write, sync, rename or removal. Empty unless a test listens."""


def reached(point: str) -> None:
    """Announce a point."""
    for listener in crash_points:
        listener(point)


def temporary_name(path: Path) -> Path:
    """A name beside ``path`` that marks an unfinished file or folder."""
    return path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{path.name}")


def remove_unfinished(folder: Path) -> None:
    """Delete what interrupted writes left in ``folder``. Only for the process that owns the folder."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content`` in one step."""
    temporary = temporary_name(path)
    try:
        reached(f"{path.name}: before write")
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            reached(f"{path.name}: before sync")
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    rename(temporary, path)


def rename(source: Path, target: Path) -> None:
    """Rename a synced file over ``target``, or a synced folder to a new name, and make it durable."""
    name = target.name
    reached(f"{name}: before rename")
    source.replace(target)
    reached(f"{name}: before folder sync")
    sync_folder(target.parent)
    reached(f"{name}: done")


def remove_folder(path: Path) -> None:
    """Delete a folder; a crash leaves it whole or under a temporary name."""
    temporary = temporary_name(path.with_name(f"removed-{path.name}"))
    reached(f"{path.name}: before removal")
    path.replace(temporary)
    reached(f"{path.name}: during removal")
    shutil.rmtree(temporary)
    reached(f"{path.name}: removed")


def sync_file(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    reached(f"{path.name}: before sync in place")
    # Windows syncs only files that are open for writing.
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk (not needed, and not possible, on Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """sha256 of a file's content, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
