"""The file that judgements are added to: JSON lines, synced one by one, shared by many labellers at once (:mod:`ingot.json_lines`).

A last line that was cut short (power cut, full disk) is reported on reading; the next writer moves it to ``FILE.torn``.
"""

from __future__ import annotations

import os
from pathlib import Path

from ingot.data.files import parse_json
from ingot.data.judgements import current
from ingot.errors import DataError
from ingot.feedback.records import Record, from_row, to_row
from ingot.json_lines import append_lines, is_row, locked, torn


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
        with file, locked(file.fileno(), exclusive=False):
            if os.fstat(file.fileno()).st_size < self._position:
                # Somebody put a shorter file in its place.
                self.records, self._position, self._rows = [], 0, 0
            file.seek(self._position)
            content = file.read()
        whole, newline, tail = content.rpartition(b"\n")
        added = [record for line in whole.split(b"\n") if (record := self._parse(line)) is not None] if newline else []
        self._position += len(whole) + len(newline)
        if tail.strip():
            if is_row(tail):
                record = self._parse(tail)
                assert record is not None
                added.append(record)
                self._position += len(tail)
            else:
                self._notice(torn(self.path, tail) + "; it is left out")
        self.records += added
        return added

    def append(self, *records: Record) -> None:
        """Add records, all or none of them; when this returns, they are on the disk.

        Raises
        ------
        OSError
            They could not be written; the file is as it was.
        """
        notice = append_lines(self.path, map(to_row, records))
        if notice:
            self._notice(notice)
        self.refresh()

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
