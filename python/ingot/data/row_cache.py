"""Tokenized rows, made once and kept for the next run.

A file in the safetensors format that holds R rows in the order in which they are read, of S sequences and N tokens together, those
that are too long for a run included (each run leaves out what it has no room for):

    ids            u16 or i32 [N]
    mask           bool [N]: trained
    seq_lens       i64 [S]: tokens of each sequence
    num_sequences  i64 [R]: sequences of each row: prompt and completion; chosen, rejected; response 1 to K
    ends           i64 [E]: where sequences are judged
    num_ends       i64 [S]: how many of these belong to each sequence

Its metadata is one entry, ``ingot``: JSON with the hashes of what the ids were made from, of the arrays, and the version. Only what
decides ids is hashed: labels, ranks and other columns are read from the rows at every start.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ingot.data.cache import REMEDY, ROWS_SUFFIX, CacheMismatch, cached_name, require_same
from ingot.data.chat import Encoded
from ingot.data.files import Progress
from ingot.data.keys import canonical, digest
from ingot.data.rows import Row
from ingot.durable import reached, write_file
from ingot.errors import DataError

FORMAT_VERSION = 1
_ROWS_A_REPORT = 100
_ROWS_COMPARED = 8

RowT = TypeVar("RowT", bound=Row)
Group = tuple[Encoded, ...]
Arrays = dict[str, npt.NDArray[Any]]


class RowCache:
    """The folder in which tokenized rows are kept.

    Parameters
    ----------
    folder
        Made when it is needed.
    say
        Told, in one line, when a file cannot be used or kept.
    """

    def __init__(self, folder: str | Path, say: Callable[[str], object] = lambda _: None) -> None:
        self.folder = Path(folder)
        self._say = say
        self._full = False

    def path(self, hashes: Mapping[str, str]) -> Path:
        """Where the rows with these hashes lie."""
        return self.folder / (cached_name(*(hashes[name] for name in _WORDS)) + ROWS_SUFFIX)

    def find(self, hashes: Mapping[str, str]) -> list[Group] | None:
        """The rows with these hashes; None where they are not there, or not whole.

        Raises
        ------
        CacheMismatch
            The file with their name holds other ones.
        """
        path = self.path(hashes)
        try:
            return read_encoded(path, hashes)
        except CacheMismatch:
            raise
        except FileNotFoundError:
            return None
        except (DataError, OSError) as error:
            self.again(path, str(error).removeprefix(f"{path}: ").removesuffix(f"; {REMEDY}"))
            return None

    def again(self, path: Path, why: str) -> None:
        """Say that a file is not used."""
        self._say(f"cache {path}: {why}; tokenized again")

    def keep(self, hashes: Mapping[str, str], groups: Sequence[Group]) -> None:
        """Write rows for the next run. Where that fails, say so once: a run needs no cache."""
        path = self.path(hashes)
        if self._full:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_encoded(path, hashes, groups)
        except OSError as error:
            self._full = True
            self._say(
                f"cache {path}: cannot be written: {error.strerror or error}; the run goes on, and the next start tokenizes again; "
                "--cache-dir chooses another place"
            )


def encode_rows(
    rows: Sequence[RowT],
    encode: Callable[[RowT], Sequence[Encoded]],
    *,
    tokenizer_hash: str,
    template_hash: str,
    settings: Mapping[str, object] | None = None,
    cache: RowCache | None = None,
    progress: Progress | None = None,
) -> list[Group]:
    """The sequences of each row, from the cache where it has them; otherwise made, and put there.

    Parameters
    ----------
    encode
        A function of the row's kind and :meth:`~ingot.data.rows.Row.parts`, the tokenizer, the template and ``settings`` alone.
    template_hash
        Empty for none.
    settings
        What else decides ids.
    progress
        Called with the rows done and all rows.

    Raises
    ------
    RowError
        The first row that ``encode`` refuses.
    CacheMismatch
        The file that should hold these rows was made from something else.
    """
    if cache is None or not rows:
        return _encode_all(rows, encode, progress)
    hashes = {
        "source_hash": source_hash(rows),
        "tokenizer_hash": tokenizer_hash,
        "template_hash": template_hash,
        "settings_hash": digest(settings) if settings else "",
    }
    found = cache.find(hashes)
    if found is not None:
        if _still_encoded_so(rows, encode, found):
            return found
        cache.again(cache.path(hashes), "made by code that tokenized rows in another way")
    groups = _encode_all(rows, encode, progress)
    cache.keep(hashes, groups)
    return groups


def source_hash(rows: Sequence[Row]) -> str:
    """sha256, as hex, of what decides the ids of rows: their kinds, prompts and answers, in their order.

    Independent of the name, format and compression of the file that they come from, and of their other columns.
    """
    found = hashlib.sha256()
    for row in rows:
        part = canonical(row.kind, row.parts())
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.hexdigest()


def write_encoded(path: Path, hashes: Mapping[str, str], groups: Sequence[Group]) -> None:
    """Write a file; it appears under its name only when it is whole and on the disk.

    Raises
    ------
    OSError
        No space, no permission. Nothing is left.
    """
    from safetensors.numpy import save

    from ingot import __version__

    arrays = _arrays_of(groups)
    header = {
        "format_version": FORMAT_VERSION,
        "ingot_version": __version__,
        **hashes,
        "num_rows": len(groups),
        "num_tokens": len(arrays["ids"]),
        "payload_hash": _payload_hash(arrays),
    }
    reached("tokenized rows: before write")
    write_file(path, save(arrays, {"ingot": json.dumps(header)}))


def read_encoded(path: Path, hashes: Mapping[str, str]) -> list[Group]:
    """The sequences of each row.

    Parameters
    ----------
    hashes
        ``source_hash``, ``tokenizer_hash``, ``template_hash`` and ``settings_hash`` that the file must have.

    Raises
    ------
    CacheMismatch
        It was made from something else; names the hashes that differ.
    DataError
        It is cut short, altered, no file of tokenized rows, or made by another version.
    OSError
        It is not there or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    from ingot import __version__

    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {})["ingot"])
            version = (header["format_version"], header["ingot_version"])
            arrays = {name: file.get_tensor(name) for name in _ARRAYS if name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DataError(f"{path}: cut short or altered ({error}); {REMEDY}") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: not a file of tokenized rows of ingot; {REMEDY}") from None
    require_same(path, header, {name: (words, hashes[name]) for name, words in _WORDS.items()})
    if version != (FORMAT_VERSION, __version__):
        raise DataError(f"{path}: made by ingot {version[1]} (format {version[0]}); {REMEDY}")
    if set(arrays) != set(_ARRAYS) or header.get("payload_hash") != _payload_hash(arrays):
        raise DataError(f"{path}: altered since it was written (payload_hash differs); {REMEDY}")
    return _groups_of(arrays)


_WORDS = {
    "source_hash": "source",
    "tokenizer_hash": "tokenizer",
    "template_hash": "chat template",
    "settings_hash": "choice of settings",
}
_ARRAYS = ("ids", "mask", "seq_lens", "num_sequences", "ends", "num_ends")


def _encode_all(
    rows: Sequence[RowT], encode: Callable[[RowT], Sequence[Encoded]], progress: Progress | None
) -> list[Group]:
    groups = []
    for done, row in enumerate(rows, 1):
        groups.append(tuple(encode(row)))
        if progress is not None and done % _ROWS_A_REPORT == 0:
            progress(done, len(rows))
    return groups


def _still_encoded_so(
    rows: Sequence[RowT], encode: Callable[[RowT], Sequence[Encoded]], groups: Sequence[Group]
) -> bool:
    """Whether some rows, spread over all, are encoded today as they were: code changes more often than versions do."""
    return all(
        len(fresh := encode(rows[place])) == len(groups[place]) and all(map(_same, fresh, groups[place]))
        for place in range(0, len(rows), -(-len(rows) // _ROWS_COMPARED))
    )


def _same(first: Encoded, second: Encoded) -> bool:
    return (
        np.array_equal(first.ids, second.ids) and np.array_equal(first.mask, second.mask) and first.ends == second.ends
    )


def _arrays_of(groups: Sequence[Group]) -> Arrays:
    sequences = list(itertools.chain(*groups))
    ids = np.concatenate([np.zeros(0, np.int32), *(each.ids for each in sequences)])
    return {
        "ids": ids.astype("<u2" if ids.max(initial=0) < 1 << 16 else "<i4"),
        "mask": np.concatenate([np.zeros(0, np.bool_), *(each.mask for each in sequences)]),
        "seq_lens": np.array([len(each) for each in sequences], "<i8"),
        "num_sequences": np.array([len(group) for group in groups], "<i8"),
        "ends": np.array([end for each in sequences for end in each.ends], "<i8"),
        "num_ends": np.array([len(each.ends) for each in sequences], "<i8"),
    }


def _groups_of(arrays: Arrays) -> list[Group]:
    ids = arrays["ids"].astype(np.int32)
    bounds, ends_at, firsts = (
        [0, *np.cumsum(arrays[name]).tolist()] for name in ("seq_lens", "num_ends", "num_sequences")
    )
    ends = arrays["ends"].tolist()
    sequences = [
        Encoded(ids[low:high], arrays["mask"][low:high], tuple(ends[first:last]))
        for (low, high), (first, last) in zip(itertools.pairwise(bounds), itertools.pairwise(ends_at), strict=True)
    ]
    return [tuple(sequences[low:high]) for low, high in itertools.pairwise(firsts)]


def _payload_hash(arrays: Arrays) -> str:
    """sha256, as hex, of names, types, shapes and values."""
    found = hashlib.sha256()
    for name in _ARRAYS:
        found.update(canonical(name, arrays[name].dtype.str, arrays[name].shape))
        found.update(arrays[name].data)
    return found.hexdigest()
