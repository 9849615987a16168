"""The file that judgements are added to: JSON lines, synced one by one, shared by many labellers at once.

A row is written with one call, under a lock that all processes respect, at the end of the file, and synced before the call returns.
A last line that was cut short (power cut, full disk) is reported on reading; the next writer moves it to ``FILE.torn``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ingot import durable
from ingot.data.files import parse_json
from ingot.data.judgements import current
from ingot.errors import DataError
from ingot.feedback.records import Record, from_row, to_row

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class Journal:
    """A file of records.

    ``records`` are those read so far, in file order; ``notices`` what a person should know about the file. Opening reads it.

    Raises
    ------
    DataError
        A row in the midst of the file is no record; the message names it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.records: list[Record] = []
        self.notices: list[str] = []
        self._position = 0
        self._rows = 0
        self.refresh()

    def refresh(self) -> list[Record]:
        """Read what was added since, by whomever; the new records."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return []
        with file, _locked(file.fileno(), exclusive=False):
            if os.fstat(file.fileno()).st_size < self._position:
                # Somebody put a shorter file in its place.
                self.records, self._position, self._rows = [], 0, 0
            file.seek(self._position)
            content = file.read()
        whole, newline, tail = content.rpartition(b"\n")
        added = [record for line in whole.split(b"\n") if (record := self._parse(line)) is not None] if newline else []
        self._position += len(whole) + len(newline)
        if tail.strip():
            if _is_row(tail):
                record = self._parse(tail)
                assert record is not None
                added.append(record)
                self._position += len(tail)
            else:
                self._notice(_torn(self.path, tail) + "; it is left out")
        self.records += added
        return added

    def append(self, *records: Record) -> None:
        """Add records, all or none of them; when this returns, they are on the disk.

        Raises
        ------
        OSError
            They could not be written; the file is as it was.
        """
        content = b"".join(_encode(to_row(record)) for record in records)
        name = self.path.name
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
        try:
            with _locked(descriptor, exclusive=True):
                size = self._end_line(descriptor)
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
                    raise OSError(error.errno, error.strerror, str(self.path)) from None
                durable.reached(f"{name}: appended")
        finally:
            os.close(descriptor)
        if new:
            durable.sync_folder(self.path.parent)
        self.refresh()

    def _end_line(self, descriptor: int) -> int:
        """Make the file end with a whole line: a cut one goes to ``FILE.torn``; the size of the file then."""
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
            return size
        if _is_row(tail):
            os.write(descriptor, b"\n")
            return size + 1
        aside = self.path.with_name(self.path.name + ".torn")
        with aside.open("ab") as file:
            file.write(tail + b"\n")
            file.flush()
            os.fsync(file.fileno())
        durable.sync_folder(self.path.parent)
        durable.reached(f"{self.path.name}: torn line kept")
        os.ftruncate(descriptor, size - len(tail))
        self._notice(_torn(self.path, tail) + f"; it was moved to {aside}")
        return size - len(tail)

    def _parse(self, line: bytes) -> Record | None:
        self._rows += 1
        if not line.strip():
            return None
        place = f"{self.path}, row {self._rows}"
        return from_row(parse_json(line), place)

    def _notice(self, text: str) -> None:
        if text not in self.notices:
            self.notices.append(text)


def read_judgements(path: str | Path) -> list[Record]:
    """The judgements of a file that count: neither revised nor taken back nor skipped, in file order.

    Raises
    ------
    DataError
        There is no such file, or a row of it is no record.
    """
    if not Path(path).exists():
        raise DataError(f"{path}: no such file")
    return current(Journal(path).records)


def _encode(row: dict[str, Any]) -> bytes:
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:
        # Halves of surrogate pairs, which no UTF-8 can hold, survive as escapes.
        return (json.dumps(row) + "\n").encode("ascii")


def _is_row(line: bytes) -> bool:
    """Whether this is a whole row: no beginning of a JSON object is a JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _torn(path: Path, tail: bytes) -> str:
    return f"{path}: its last line is cut short ({len(tail)} bytes, as after a power cut)"


@contextlib.contextmanager
def _locked(descriptor: int, exclusive: bool) -> Iterator[None]:
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
