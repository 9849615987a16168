"""Files, folders and iterables of text as documents: byte strings in a fixed order.

A text file is one document, or many where a separator cuts it; a ``.jsonl`` file holds one in each row's ``text``. Both may be
compressed (``.gz``, ``.zst``). Bytes are taken as they are: text need not be UTF-8, and strings that look like special tokens are text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

from ingot.data.files import open_binary, parse_json, reading, suffix_of
from ingot.errors import DataError

_TEXT_SUFFIXES = (".txt", ".jsonl")
_NOT_TEXT = (".parquet", ".arrow", ".zip", ".tar", ".tgz", ".pdf", ".docx", ".npy", ".npz", ".bin", ".safetensors")
_CHUNK_BYTES = 1 << 22

Source = str | Path | Sequence[str | Path] | Iterable[str | bytes]


class Corpus:
    """Documents in a fixed order; can be read any number of times.

    Parameters
    ----------
    source
        A path, or a list or tuple of paths: files, and folders that are searched for ``.txt`` and ``.jsonl`` files (sorted by name).
        A list of bytes, or any other iterable of str or bytes, is taken as the documents themselves; an iterator that can be read
        only once is read into memory.
    separator
        Cut each text file at this string. Pieces of white space alone are dropped.

    Raises
    ------
    DataError
        Names the file, and the row where there is one. A missing path is found on construction, the rest while reading.
    """

    def __init__(self, source: Source, separator: str | None = None) -> None:
        if separator == "":
            raise DataError("separator is empty: give the string that ends a document, or none")
        self.separator = separator
        self._separator = separator.encode() if separator is not None else None
        self.files: tuple[Path, ...] = ()
        """The files that are read, in order; none where documents were given."""
        self._documents: Iterable[str | bytes] = ()
        self._facts: tuple[str, int, int] | None = None
        if isinstance(source, str | Path):
            self.files = _find([source])
        elif isinstance(source, list | tuple) and not any(isinstance(entry, bytes) for entry in source):
            self.files = _find(source)
        else:
            documents = cast(Iterable[str | bytes], source)
            self._documents = list(documents) if isinstance(documents, Iterator) else documents

    @classmethod
    def from_documents(cls, documents: Iterable[str | bytes]) -> Corpus:
        """A corpus of these texts, whatever holds them."""
        return cls(iter(documents) if isinstance(documents, list | tuple) else documents)

    def __iter__(self) -> Iterator[bytes]:
        """The documents that hold anything."""
        for number, document in enumerate(self._documents, 1):
            if isinstance(document, str):
                document = utf8(document)
            if not isinstance(document, bytes):
                raise DataError(f"document {number} is a {type(document).__name__}: give str or bytes")
            if document:
                yield document
        for path in self.files:
            yield from self._read(path)

    @property
    def hash(self) -> str:
        """sha256 of the documents and their boundaries, as hex; independent of file names and of compression."""
        return self._measure()[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all documents."""
        return self._measure()[1]

    @property
    def num_documents(self) -> int:
        """Documents that hold anything."""
        return self._measure()[2]

    def __repr__(self) -> str:
        what = f"{len(self.files)} files" if self.files else "documents in memory"
        return f"Corpus({what}, separator={self.separator!r})"

    def _measure(self) -> tuple[str, int, int]:
        """Hash, bytes and documents, from one pass that is made once."""
        if self._facts is None:
            digest = hashlib.sha256()
            num_bytes = num_documents = 0
            for document in self:
                digest.update(len(document).to_bytes(8, "little"))
                digest.update(document)
                num_bytes += len(document)
                num_documents += 1
            if num_documents == 0:
                raise DataError(f"{self._name()}: no text in it; give files that hold some")
            self._facts = (digest.hexdigest(), num_bytes, num_documents)
        return self._facts

    def _name(self) -> str:
        return ", ".join(map(str, self.files[:3])) + (", ..." if len(self.files) > 3 else "") or "the documents given"

    def _read(self, path: Path) -> Iterator[bytes]:
        with reading(path), open_binary(path) as stream:
            if suffix_of(path) == ".jsonl":
                yield from _rows(path, stream)
            elif self._separator is not None:
                yield from (piece for piece in _pieces(stream, self._separator) if piece.strip())
            elif document := stream.read():
                yield document


def utf8(text: str) -> bytes:
    """The bytes of a text. Surrogates that make a pair are joined; lone ones become U+FFFD, as in the tokenizer."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return join_surrogates(text).encode()


def join_surrogates(text: str) -> str:
    """Join surrogates that make a pair; what is left alone becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _exists(path: Path, entry: str | Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        # Too long a name: most likely a text where a path belongs.
        raise DataError(
            f"{str(entry)[:40]!r}...: cannot be a path ({error.strerror}); texts are given as iter([...])"
        ) from None


def _find(source: Iterable[str | Path]) -> tuple[Path, ...]:
    """The files that these paths stand for."""
    files: list[Path] = []
    for entry in source:
        path = Path(entry)
        exists = _exists(path, entry)
        if path.is_dir():
            found = sorted(
                inner
                for inner in path.rglob("*")
                if inner.is_file()
                and suffix_of(inner) in _TEXT_SUFFIXES
                and not any(part.startswith(".") for part in inner.relative_to(path).parts)
            )
            if not found:
                raise DataError(f"{path}: no .txt or .jsonl file in this folder (each also as .gz or .zst)")
            files += found
        elif not exists:
            hint = "" if isinstance(entry, Path) or not _looks_like_text(entry) else "; texts are given as iter([...])"
            raise DataError(f"{path}: no such file or folder{hint}")
        elif suffix_of(path) in _NOT_TEXT:
            raise DataError(f'{path}: not a text file; give .txt, or .jsonl with a "text" field')
        else:
            files.append(path)
    if not files:
        raise DataError("no text was given: name at least one file or folder")
    return tuple(files)


def _looks_like_text(entry: str) -> bool:
    return "\n" in entry or entry.count(" ") > 2


def _pieces(stream: BinaryIO, separator: bytes) -> Iterator[bytes]:
    """A stream cut at each separator, reading no more than the longest piece at once."""
    held = bytearray()
    while chunk := stream.read(_CHUNK_BYTES):
        # A separator may begin in what was held already.
        searched = max(0, len(held) - len(separator) + 1)
        held += chunk
        if held.find(separator, searched) >= 0:
            *whole, rest = held.split(separator)
            yield from map(bytes, whole)
            held = bytearray(rest)
    yield bytes(held)


def _rows(path: Path, stream: BinaryIO) -> Iterator[bytes]:
    """The texts of a ``.jsonl`` file."""
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        row = parse_json(line)
        if isinstance(row, ValueError):
            raise DataError(f"{path}, row {number}: not valid JSON ({row})")
        if not isinstance(row, dict):
            raise DataError(
                f'{path}, row {number}: a {type(row).__name__}, not an object; each row looks like {{"text": "..."}}'
            )
        if "text" not in row:
            names = ", ".join(map(str, row)) or "none"
            raise DataError(
                f'{path}, row {number}: no field "text" (fields there: {names}); rename the one with the text'
            )
        text = row["text"]
        if not isinstance(text, str):
            raise DataError(f'{path}, row {number}: field "text" is of type {type(text).__name__}; give a string')
        if text:
            yield utf8(text)
