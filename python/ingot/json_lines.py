"""Files of JSON lines that are added to while others read them, or add to them too.

Rows are written with one call, under a lock that all processes respect, at the end of the file, and synced before the call returns. A
last line that was cut short (power cut, full disk) is moved to ``FILE.torn`` by the next writer.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ingot import durable
from ingot.data.files import json_line

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> str | None:
    """Add rows, all or none of them; when this returns, they are on the disk.

    Returns
    -------
    str or None
        What a person should know: that the last line was cut short and moved aside.

    Raises
    ------
    OSError
        They could not be written; the file is as it was.
    """
    content = b"".join(json_line(dict(row)) for row in rows)
    name = path.name
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
    try:
        with locked(descriptor, exclusive=True):
            size, notice = _end_line(path, descriptor)
            durable.reached(f"{name}: before append")
            try:
                written = os.write(descriptor, content)
                if written != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                durable.reached(f"{name}: before sync")
                os.fsync(descriptor)
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, size)
                raise OSError(error.errno, error.strerror, str(path)) from None
            durable.reached(f"{name}: appended")
    finally:
        os.close(descriptor)
    if new:
        durable.sync_folder(path.parent)
    return notice


def _end_line(path: Path, descriptor: int) -> tuple[int, str | None]:
    """Make the file end with a whole line: a cut one goes to ``FILE.torn``; the size of the file then, and what happened."""
    size = os.fstat(descriptor).st_size
    tail = b""
    position = size
    while position > 0 and b"\n" not in tail:
        step = min(position, 1 << 16)
        position -= step
        os.lseek(descriptor, position, os.SEEK_SET)
        tail = os.read(descriptor, step) + tail
    tail = tail.rpartition(b"\n")[2]
    if not tail:
        return size, None
    if is_row(tail):
        os.write(descriptor, b"\n")
        return size + 1, None
    aside = path.with_name(path.name + ".torn")
    with aside.open("ab") as file:
        file.write(tail + b"\n")
        file.flush()
        os.fsync(file.fileno())
    durable.sync_folder(path.parent)
    durable.reached(f"{path.name}: torn line kept")
    os.ftruncate(descriptor, size - len(tail))
    return size - len(tail), torn(path, tail) + f"; it was moved to {aside}"


def is_row(line: bytes) -> bool:
    """Whether this is a whole row: no beginning of a JSON object is a JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def torn(path: Path, tail: bytes) -> str:
    """What to say of a last line that is no row."""
    return f"{path}: its last line is cut short ({len(tail)} bytes, as after a power cut)"


@contextlib.contextmanager
def locked(descriptor: int, exclusive: bool) -> Iterator[None]:
    """Hold the file's lock, shared or alone; other processes wait. File systems without locks go without."""
    held = True
    try:
        _lock(descriptor, exclusive)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        held = False
    try:
        yield
    finally:
        if held:
            _unlock(descriptor)


if sys.platform == "win32":
    import msvcrt
    import time

    # Windows locks ranges and keeps others from reading them: a byte far behind any content stands for the file.
    _LOCK_BYTE = 0x7FFFFFFE

    def _lock(descriptor: int, exclusive: bool) -> None:
        while True:
            os.lseek(descriptor, _LOCK_BYTE, os.SEEK_SET)
            try:
                return msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EDEADLK):
                    raise
                time.sleep(0.01)
            finally:
                os.lseek(descriptor, 0, os.SEEK_SET)

    def _unlock(descriptor: int) -> None:
        os.lseek(descriptor, _LOCK_BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(descriptor: int, exclusive: bool) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)

    def _unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
