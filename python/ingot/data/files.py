"""Opening what people keep data in: plain and compressed files, JSON lines, JSON arrays, Parquet. One item at a time, never a whole file
(a JSON array excepted, which cannot be read otherwise)."""

from __future__ import annotations

import contextlib
import gzip
import importlib
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from ingot.durable import file_sha256
from ingot.errors import DataError

Progress = Callable[[int, int], object]
"""Called with bytes of the file that are read and the file's size, now and then."""

_COMPRESSIONS = (".gz", ".zst")
_NO_ROWS = (".txt", ".md", ".csv", ".tsv", ".xlsx", ".zip", ".tar", ".arrow", ".pkl", ".npy", ".safetensors")
_CHUNK_BYTES = 1 << 22
_ITEMS_A_REPORT = 500


def suffix_of(path: Path) -> str:
    """The suffix without that of a compression, lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a file is read into one line that names it."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: cannot be decompressed ({error}); is the file cut short?") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def open_binary(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed where its name ends in ``.gz`` or ``.zst``."""
    return decompressed(path, path.open("rb"))


def decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    """A stream of the bytes of ``raw``, an open file with the name ``path``; closing it closes ``raw``."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, _GzipFile(raw))
    if suffix == ".zst":
        return cast(BinaryIO, io.BufferedReader(_Zstandard(raw), _CHUNK_BYTES))
    return raw


def file_hashes(paths: Sequence[str | Path]) -> dict[str, str]:
    """sha256, as hex, of each of these files as it lies on the disk."""
    return {str(path): file_sha256(Path(path)) for path in paths}


def changed_files(paths: Sequence[str], known: Mapping[str, str]) -> list[str]:
    """Which of these files are not as they were when their hashes were taken; all of them where none stands out."""
    return [path for path, found in file_hashes(paths).items() if known.get(path) != found] or list(paths)


def json_items(path: Path, progress: Progress | None = None) -> Iterator[tuple[int, Any]]:
    """The rows of a ``.jsonl``, ``.json`` (an array, or lines after all) or ``.parquet`` file with their numbers, from 1.

    A line that is no JSON comes as the ``ValueError`` that says why, so that the rest can be read. Empty lines are no rows but count.

    Raises
    ------
    DataError
        The file cannot be read at all.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file")
    if path.is_dir():
        raise DataError(f"{path}: a folder; name the files in it")
    if suffix_of(path) in _NO_ROWS:
        raise DataError(
            f"{path}: not a file of rows; make .jsonl of it (one JSON object a line), or give .json or .parquet"
        )
    if suffix_of(path) == ".parquet":
        items = _parquet_items(path, progress)
    elif suffix_of(path) == ".json":
        items = _array_items(path)
    else:
        items = _line_items(path, progress)
    with reading(path):
        yield from items


def parse_json(text: bytes) -> Any:
    """A JSON value, or the ``ValueError`` that says why it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return ValueError(f"{error.msg.removesuffix(' at')} at character {error.pos + 1}")
    except UnicodeDecodeError as error:
        return ValueError(f"byte {error.start + 1} is no UTF-8")
    except RecursionError:
        return ValueError("nested too deeply")
    except ValueError as error:
        return ValueError(str(error))


def json_line(value: Any) -> bytes:
    """A row of a JSON lines file: readable UTF-8; escapes only where a string holds half a character."""
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(value).encode() + b"\n"


def _line_items(path: Path, progress: Progress | None) -> Iterator[tuple[int, Any]]:
    size = path.stat().st_size
    with path.open("rb") as raw, decompressed(path, raw) as stream:
        for number, line in enumerate(stream, 1):
            if progress is not None and number % _ITEMS_A_REPORT == 0:
                progress(raw.tell(), size)
            if line.strip():
                yield number, parse_json(line.rstrip())
    if progress is not None:
        progress(size, size)


def _array_items(path: Path) -> Iterator[tuple[int, Any]]:
    with open_binary(path) as stream:
        content = stream.read()
    whole = parse_json(content)
    if isinstance(whole, ValueError) and b"\n" in content.strip():
        for number, line in enumerate(content.splitlines(), 1):
            if line.strip():
                yield number, parse_json(line.rstrip())
    elif isinstance(whole, list):
        yield from enumerate(whole, 1)
    else:
        yield 1, whole


def _parquet_items(path: Path, progress: Progress | None) -> Iterator[tuple[int, Any]]:
    try:
        pyarrow, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install 'ingot[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            total = file.metadata.num_rows
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
                if progress is not None:
                    progress(number, total)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a Parquet file that pyarrow can read ({error})") from None


class _GzipFile(gzip.GzipFile):
    """Closes the file below it too."""

    def __init__(self, raw: BinaryIO) -> None:
        self._below = raw
        super().__init__(fileobj=raw, mode="rb")

    def close(self) -> None:
        super().close()
        self._below.close()


class _Zstandard(io.RawIOBase):
    """A ``.zst`` file, decompressed; its errors are ``OSError`` as those of other files, also where the last frame is cut short."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._file = raw
        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame = self._decompressor.decompressobj()
        self._started = False
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        while not self._ready:
            if self._frame.eof:
                rest = self._frame.unused_data
                self._frame = self._decompressor.decompressobj()
                self._started = False
            else:
                rest = b""
            chunk = rest or self._file.read(_CHUNK_BYTES)
            if not chunk:
                if self._started:
                    raise EOFError("the last frame is incomplete")
                return 0
            self._started = True
            try:
                self._ready = self._frame.decompress(chunk)
            except self._error as error:
                raise OSError(f"not valid zstandard data ({error})") from None
        size = min(len(view), len(self._ready))
        view[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()
