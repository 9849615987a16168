"""metrics.jsonl and samples.jsonl: one JSON object a line, each with its ``step``.

Everything but the keys under ``time/`` depends on the run's settings and data alone, so a resumed run writes the lines that an
uninterrupted one writes. Numbers that are not finite are written as null, which JSON has.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ingot.durable import reached, sync_file, write_file


class MetricsLog:
    """Appends to the file, and cuts it back to a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, metrics: Mapping[str, Any]) -> None:
        """Write one line; :class:`OSError` where there is no space, and then no part of the line counts."""
        line = json.dumps({name: _finite(value) for name, value in metrics.items()}, ensure_ascii=False)
        reached(f"{self.path.name}: before append")
        with self.path.open("ab", buffering=0) as file:
            size = file.tell()
            content = line.encode("utf-8", "replace") + b"\n"
            try:
                if file.write(content) != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except OSError:
                file.truncate(size)
                raise
        reached(f"{self.path.name}: appended")

    def sync(self) -> None:
        """Make the lines durable: a checkpoint must not be newer than what leads to it."""
        if not self.path.exists():
            return
        sync_file(self.path)

    def cut(self, lines: int) -> None:
        """Keep the first ``lines`` lines; a torn last line goes too."""
        if not self.path.exists():
            return
        kept = self._complete()[:lines]
        write_file(self.path, b"".join(line + b"\n" for line in kept))

    @property
    def num_lines(self) -> int:
        """Complete lines in the file."""
        return len(self._complete()) if self.path.exists() else 0

    def read(self) -> list[dict[str, Any]]:
        """All complete lines."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self._complete()]

    def _complete(self) -> list[bytes]:
        """The lines up to the first that is torn: appends happen in order, so what follows it cannot be older."""
        lines = []
        for line in self.path.read_bytes().split(b"\n")[:-1]:
            try:
                json.loads(line)
            except ValueError:
                break
            lines.append(line)
        return lines


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
