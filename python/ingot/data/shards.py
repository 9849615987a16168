"""Token files: a corpus as ids in one memory-mapped file, made once and kept for the next run.

Layout, little-endian: 4096 bytes of header (magic, then JSON padded with spaces); ids as u16 or u32; document starts i64[D+1];
document keys u64[D]. Where the tokenizer has an end-of-text id it stands before the first document, between documents, and after the
last one, so that a document with both of its boundaries is one slice of the ids.
"""

from __future__ import annotations

import array
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ingot.data.cache import REMEDY, TOKENS_SUFFIX, CacheMismatch, cached_name, require_same
from ingot.data.corpus import Corpus
from ingot.durable import reached, rename
from ingot.errors import DataError

if TYPE_CHECKING:
    from ingot.tokenizer import Tokenizer

FORMAT_VERSION = 1
_MAGIC = b"INGOTTOK"
_HEADER_BYTES = 4096
_GROUP_BYTES = 1 << 23
_GROUP_DOCUMENTS = 1 << 14

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""


class TokenShards:
    """A tokenized corpus on disk. Made by :meth:`build`, opened by :meth:`open`."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.header = header
        self.source_hash: str = header["source_hash"]
        """Hash of the corpus."""
        self.tokenizer_hash: str = header["tokenizer_hash"]
        """Hash of the tokenizer that made the ids."""
        self.eos_token_id: int | None = header["eos_token_id"]
        """The id between documents, or None."""
        self.num_documents: int = header["num_documents"]
        self.num_tokens: int = header["num_tokens"]
        """Ids in the file, end-of-text ids included."""
        self.num_bytes: int = header["num_bytes"]
        """Bytes of the text."""
        dtype = np.dtype(header["dtype"])
        starts_at = _HEADER_BYTES + _padded(self.num_tokens * dtype.itemsize)
        keys_at = starts_at + 8 * (self.num_documents + 1)
        # Plain views of the maps: a memmap's own slicing costs microseconds, a batch has hundreds of slices.
        self.ids: npt.NDArray[Any] = np.memmap(path, dtype, "r", _HEADER_BYTES, (self.num_tokens,)).view(np.ndarray)
        """u16 or u32 [num_tokens], mapped from the file."""
        self.starts: npt.NDArray[np.int64] = np.memmap(path, "<i8", "r", starts_at, (self.num_documents + 1,)).view(
            np.ndarray
        )
        """i64 [D+1]: where each document begins in ``ids``, its leading end-of-text id included."""
        self.keys: npt.NDArray[np.uint64] = np.memmap(path, "<u8", "r", keys_at, (self.num_documents,)).view(np.ndarray)
        """u64 [D]: hash of each document's bytes."""

    @classmethod
    def build(
        cls,
        corpus: Corpus,
        tokenizer: Tokenizer,
        cache_dir: str | Path,
        progress: Progress | None = None,
        threads: int | None = None,
    ) -> TokenShards:
        """The token file of this corpus and tokenizer in ``cache_dir``: the one that is there, or a new one.

        The file appears under its name only when it is complete.

        Raises
        ------
        DataError
            The corpus holds no text, or there is no space for the file.
        CacheMismatch
            The file with this name is of another corpus or tokenizer.
        """
        folder = Path(cache_dir)
        path = cached_path(folder, corpus.hash, tokenizer.hash)
        if path.exists():
            try:
                return cls.open(path, tokenizer=tokenizer, source_hash=corpus.hash)
            except CacheMismatch:
                raise
            except DataError:
                pass  # Not whole: made again.
        temporary = folder / f"{path.name}.{os.getpid()}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            reached("token file: before write")
            with temporary.open("wb") as file:
                _write(file, corpus, tokenizer, progress, threads)
                file.flush()
                reached("token file: before sync")
                os.fsync(file.fileno())
            rename(temporary, path)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be written: {error.strerror or error}; --cache-dir chooses another place"
            ) from None
        finally:
            temporary.unlink(missing_ok=True)
        return cls.open(path, tokenizer=tokenizer, source_hash=corpus.hash)

    @classmethod
    def open(
        cls, path: str | Path, *, tokenizer: Tokenizer | None = None, source_hash: str | None = None
    ) -> TokenShards:
        """Map a token file; with ``tokenizer`` or ``source_hash``, one that belongs to them.

        Raises
        ------
        DataError
            The file is no token file, is cut short, or is from a newer version.
        CacheMismatch
            It belongs to another tokenizer or corpus.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                head = file.read(_HEADER_BYTES)
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
        if not head.startswith(_MAGIC):
            raise DataError(f"{path}: not a token file of ingot")
        try:
            header = json.loads(head[len(_MAGIC) :])
            version = header["format_version"]
            if version > FORMAT_VERSION:
                raise DataError(f"{path}: made by a newer version of ingot (format {version}); {REMEDY}")
            complete = size == _file_bytes(header)
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: the header is damaged; {REMEDY}") from None
        if not complete:
            raise DataError(f"{path}: {size} bytes long, {_file_bytes(header)} expected; {REMEDY}")
        expected = {}
        if source_hash is not None:
            expected["source_hash"] = ("text", source_hash)
        if tokenizer is not None:
            expected["tokenizer_hash"] = ("tokenizer", tokenizer.hash)
        require_same(path, header, expected)
        return cls(path, header)

    def __repr__(self) -> str:
        return f"TokenShards({str(self.path)!r}, {self.num_documents:,} documents, {self.num_tokens:,} tokens)"


def cached_path(cache_dir: str | Path, source_hash: str, tokenizer_hash: str) -> Path:
    """Where the token file of this corpus and tokenizer lies."""
    return Path(cache_dir) / (cached_name(source_hash, tokenizer_hash) + TOKENS_SUFFIX)


def _padded(size: int) -> int:
    """Sections begin at multiples of 64 bytes."""
    return -(-size // 64) * 64


def _file_bytes(header: dict[str, Any]) -> int:
    ids = int(header["num_tokens"]) * np.dtype(header["dtype"]).itemsize
    return _HEADER_BYTES + _padded(ids) + 8 * (2 * int(header["num_documents"]) + 1)


def _write(
    file: BinaryIO, corpus: Corpus, tokenizer: Tokenizer, progress: Progress | None, threads: int | None
) -> None:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    end = tokenizer.eos_token_id
    boundary = b"" if end is None else np.array([end], dtype).tobytes()
    starts = array.array("q", [0])
    keys = array.array("Q")
    position = done = 0
    file.write(b"\0" * _HEADER_BYTES)
    for documents in _groups(corpus):
        ids, offsets = tokenizer.encode_batch_to_numpy(documents, threads=threads)
        narrow = ids.astype(dtype)
        for index, document in enumerate(documents):
            piece = narrow[offsets[index] : offsets[index + 1]]
            file.write(boundary)
            file.write(piece.tobytes())
            position += len(piece) + (end is not None)
            starts.append(position)
            keys.append(int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "little"))
            done += len(document)
        if progress is not None:
            progress(done, corpus.num_bytes)
    file.write(boundary)
    position += end is not None
    size = position * dtype.itemsize
    file.write(b"\0" * (_padded(size) - size))
    file.write(np.frombuffer(starts, np.int64).astype("<i8").tobytes())
    file.write(np.frombuffer(keys, np.uint64).astype("<u8").tobytes())
    header = {
        "format_version": FORMAT_VERSION,
        "dtype": dtype.str,
        "num_tokens": position,
        "num_documents": len(keys),
        "num_bytes": done,
        "eos_token_id": end,
        "tokenizer_hash": tokenizer.hash,
        "source_hash": corpus.hash,
    }
    file.seek(0)
    file.write((_MAGIC + json.dumps(header).encode()).ljust(_HEADER_BYTES))


def _groups(corpus: Corpus) -> Iterator[list[bytes]]:
    """Documents in lists large enough to keep all threads busy."""
    held: list[bytes] = []
    size = 0
    for document in corpus:
        held.append(document)
        size += len(document)
        if size >= _GROUP_BYTES or len(held) >= _GROUP_DOCUMENTS:
            yield held
            held, size = [], 0
    if held:
        yield held
