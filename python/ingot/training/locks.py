"""One live run a folder: a lock file that names its process, and that a later run takes over when that process is gone."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from ingot.errors import RunError


class RunLock:
    """Held from ``acquire`` to ``release``, or as a context manager.

    The file holds process id, host and start of the process, so that a process id used again is not mistaken for the run.
    A lock of another host cannot be judged from here and counts as live.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.lock"
        self._held = False

    def acquire(self) -> None:
        """Take the lock.

        Raises
        ------
        RunError
            Another live run holds it.
        """
        content = json.dumps(_identity()).encode()
        # One attempt for a free folder, one after removing a stale lock, and a few for races with others who do the same.
        for _ in range(10):
            if _create(self.path, content):
                self._held = True
                return
            try:
                seen = self.path.read_bytes()
            except FileNotFoundError:
                continue
            holder = _parse(seen)
            if holder is not None and _is_live(holder):
                raise RunError(
                    f"{self.path.parent}: in use by process {holder['pid']} on {holder['host']}; wait for it, stop it, or choose "
                    f"another --output (if it is gone, delete {self.path})"
                )
            self._set_aside(seen)
        raise RunError(f"{self.path}: other processes keep taking this lock; try again")

    def release(self) -> None:
        """Give the lock back."""
        if self._held:
            self._held = False
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _set_aside(self, stale: bytes) -> None:
        """Remove the stale lock, and no other: only one of several processes can rename it, and a fresh one is put back."""
        aside = self.path.with_name(f".tmp-{os.getpid()}-stale-lock")
        try:
            self.path.replace(aside)
        except FileNotFoundError:
            return
        if aside.read_bytes() != stale:
            with contextlib.suppress(OSError):
                os.link(aside, self.path)
        aside.unlink(missing_ok=True)


def _create(path: Path, content: bytes) -> bool:
    """Make the file with its whole content, or find that there is one."""
    temporary = path.with_name(f".tmp-{os.getpid()}-lock")
    temporary.write_bytes(content)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:
        # A file system without hard links: a crash between these two lines leaves an empty lock, which counts as stale.
        try:
            with path.open("xb") as file:
                file.write(content)
        except FileExistsError:
            return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _identity() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": _start_of(os.getpid())}


def _start_of(pid: int) -> str:
    """What tells this process from others that have or had its id; :class:`psutil.NoSuchProcess` where there is none.

    Linux counts ticks since boot, which a change of the clock does not move; elsewhere it is the time of day.
    """
    process = psutil.Process(pid)
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        # The name, in parentheses, may hold spaces; the start is the 22nd field, the 20th behind it.
        ticks = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19]
    except (OSError, IndexError):
        return f"{process.create_time():.0f}"
    return f"{boot} {ticks.decode()}"


def _parse(content: bytes) -> dict[str, Any] | None:
    try:
        holder = json.loads(content)
    except ValueError:
        return None
    known = isinstance(holder, dict) and {"pid", "host", "started"} <= holder.keys()
    return holder if known else None


def _is_live(holder: dict[str, Any]) -> bool:
    if holder["host"] != socket.gethostname():
        return True
    try:
        process = psutil.Process(int(holder["pid"]))
        # A killed process whose parent has not asked for its exit code is listed still.
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return _start_of(int(holder["pid"])) == str(holder["started"])
    except (psutil.NoSuchProcess, ValueError, TypeError):
        return False
    except psutil.AccessDenied:
        return True
