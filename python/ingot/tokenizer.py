"""Text <-> ids: byte-level byte pair encoding, trained here or read from the files of Hugging Face and tiktoken.

Ids equal those of ``tiktoken`` and ``tokenizers``. Every text has ids, and decoding them gives the same bytes back: bytes that are no
valid UTF-8 are legal input.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import operator
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, SupportsIndex, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from ingot import _native
from ingot.data.corpus import Corpus, join_surrogates
from ingot.durable import temporary_name, write_file
from ingot.errors import ConfigError, DataError
from ingot.normalization import is_nfc, nfc

END_OF_TEXT = "<|endoftext|>"
"""The special token that ends a document, where a vocabulary has it."""

PATTERNS = ("gpt2", "cl100k", "llama3", "qwen2", "smollm")
"""Ways of cutting text into pieces before merging; see :meth:`Tokenizer.train`."""

NUM_BYTES = 256

Text: TypeAlias = str | bytes
Special: TypeAlias = Literal["all"] | Collection[str]
Progress: TypeAlias = Callable[[str, int, int], object]
Source: TypeAlias = str | Path | Sequence[str | Path] | Iterable[str | bytes]

_BATCH_BYTES = 16 << 20
_JSON = "tokenizer.json"
_ResultT = TypeVar("_ResultT")


class Tokenizer:
    """A vocabulary with its merges: text to ids and back. Immutable; threads may share it.

    Made by :meth:`train`, :meth:`from_file`, :meth:`from_tiktoken` or :meth:`bytes_only`. Two tokenizers are equal when they give every
    text the same ids by the same rule. ``len(tokenizer)`` is :attr:`vocab_size`; pickling works.

    Examples
    --------
    >>> tokenizer = Tokenizer.train(iter(["low lower lowest"] * 3), vocab_size=262)
    >>> ids = tokenizer.encode("lowest low")
    >>> tokenizer.decode(ids)
    'lowest low'
    """

    _core: _native.Tokenizer
    _nfc: bool

    def __init__(self) -> None:
        raise TypeError("make a Tokenizer with Tokenizer.train, from_file, from_tiktoken or bytes_only")

    @classmethod
    def _wrap(cls, core: _native.Tokenizer, nfc: bool = False) -> Tokenizer:
        tokenizer = object.__new__(cls)
        tokenizer._core = core
        tokenizer._nfc = nfc
        return tokenizer

    # ---- making one

    @classmethod
    def train(
        cls,
        source: Source,
        *,
        vocab_size: int,
        pattern: str = "gpt2",
        special_tokens: Sequence[str] = (END_OF_TEXT,),
        min_frequency: int = 0,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> Tokenizer:
        """Learn merges from text. The result is that of Hugging Face's trainer and does not depend on ``threads``.

        Parameters
        ----------
        source
            A path or a list of paths (files and folders, as :class:`ingot.data.corpus.Corpus` takes them), a ``Corpus``, or an iterable
            of documents as str or bytes. A list of str is a list of paths: give documents as ``iter(texts)``. No piece crosses from
            one document into another. Plain files are streamed: memory grows with distinct words, not with the text.
        vocab_size
            Number of ids, special tokens included. Bytes take the first 256 ids in the order of the ``ByteLevel`` alphabet, then come
            the merges, then the special tokens. 256 means the bytes alone: no merges, no special tokens, id == byte; ``source`` is
            then not read.
        pattern
            ``"gpt2"``; ``"cl100k"`` as tiktoken has it today; ``"llama3"`` (cl100k before tiktoken changed the end of the text);
            ``"qwen2"`` (each digit alone); ``"smollm"`` (GPT-2 with each digit alone).
        special_tokens
            Strings that are tokens of their own and that text never gives by itself.
        min_frequency
            Merge no pair that occurs less often than this.
        progress
            Called as ``progress("reading", bytes_so_far, 0)`` while counting and ``progress("merging", merges, wanted)`` while
            learning. What it raises ends the training.

        Raises
        ------
        ValueError
            ``vocab_size`` has no room for bytes and special tokens, or is larger than the text can give (the message says what it can
            give); the text is empty; the pattern is unknown.
        """
        if vocab_size == NUM_BYTES and tuple(special_tokens) in ((), (END_OF_TEXT,)):
            return cls.bytes_only(pattern)
        if isinstance(special_tokens, str):
            raise TypeError("special_tokens is one str: give a list of them")
        least = NUM_BYTES + len(special_tokens)
        if vocab_size < least:
            # Before any text is read.
            raise ConfigError(
                f"vocab_size {vocab_size} is too small: 256 bytes and {len(special_tokens)} special tokens need at least {least}"
            )
        if min_frequency < 0:
            raise ConfigError(f"min_frequency is {min_frequency}: it cannot be negative")
        trainer = _native.TokenizerTrainer(pattern, threads)
        for num_bytes in _count(trainer, source):
            if progress is not None:
                progress("reading", num_bytes, 0)

        def merging(done: int, wanted: int) -> None:
            if progress is not None:
                progress("merging", done, wanted)

        return cls._wrap(trainer.train(vocab_size, list(special_tokens), min_frequency, merging if progress else None))

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read Hugging Face's ``tokenizer.json``, or the one in a folder.

        Ids are those of ``tokenizers.Tokenizer.from_file(path).encode(text, add_special_tokens=False)`` for text without special tokens.
        Where the file says so (Qwen's does), text is brought into Unicode's form C first; decoding then gives that form back.

        Raises
        ------
        FileNotFoundError
            There is none.
        ValueError
            The file is damaged, or is no byte-level BPE with a known pattern; the message names the part.
        """
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not file.exists():
            where = f"no {file.name} in this folder" if Path(path).is_dir() else "no such file or folder"
            raise FileNotFoundError(
                errno.ENOENT, f"{where}; give a tokenizer's folder or its tokenizer.json", str(path)
            )
        try:
            return cls._wrap(_native.Tokenizer.from_file(path))
        except DataError:
            contents = _without_nfc(file)
            if contents is None:
                raise
        try:
            return cls._wrap(_native.Tokenizer.from_contents(_JSON, contents, "", []), nfc=True)
        except DataError as error:
            raise DataError(f"{file}: {error}") from None

    @classmethod
    def from_tiktoken(
        cls, path: str | Path, *, pattern: str, special_tokens: Mapping[str, int] | None = None
    ) -> Tokenizer:
        """Read tiktoken's rank file (a base64 token and its rank in each line). Pattern and special tokens are not in it.

        Raises
        ------
        FileNotFoundError
            There is none.
        ValueError
            The file is damaged, or a special token has the id of another token.
        """
        return cls._wrap(_native.Tokenizer.from_tiktoken(path, pattern, list((special_tokens or {}).items())))

    @classmethod
    def bytes_only(cls, pattern: str = "gpt2") -> Tokenizer:
        """The 256 bytes: id == byte, no merges, no special tokens."""
        return cls._wrap(_native.Tokenizer.bytes_only(pattern))

    def with_special_tokens(self, names: Iterable[str]) -> Tokenizer:
        """This tokenizer with these special tokens too: those that it lacks take the ids from :attr:`vocab_size` on, in this order.

        Raises
        ------
        ValueError
            A name is empty, or an ordinary token.
        """
        new = [name for name in dict.fromkeys(names) if name not in self.special_tokens]
        if "" in new:
            raise ValueError("a special token is empty: give it a name")
        for name in new:
            if len(self.encode_ordinary(name)) == 1:
                raise ValueError(
                    f"{name!r} is an ordinary token of this vocabulary: give a name that text does not have"
                )
        if not new:
            return self
        ids = range(self.vocab_size, self.vocab_size + len(new))
        kind, contents = self._core.contents()
        if kind == _JSON:
            document = json.loads(contents)
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            document["added_tokens"] += [{"id": i, "content": name, **flags} for i, name in zip(ids, new, strict=True)]
            contents = json.dumps(document).encode()
        specials = [*self.special_tokens.items(), *zip(new, ids, strict=True)]
        return _restore(kind, contents, self.pattern, specials, self._nfc)

    def save(self, path: str | Path) -> Path:
        """Write ``tokenizer.json`` into the folder ``path`` (made if need be), or to ``path`` itself if it ends in ``.json``.

        The file appears whole or not at all. Returns where it is. ``tokenizers`` opens it and gives the same ids.
        """
        saved = Path(self._core.save(path))
        if self._nfc:
            document = json.loads(saved.read_bytes())
            document["normalizer"] = {"type": "NFC"}
            write_file(saved, json.dumps(document, ensure_ascii=False, indent=2).encode())
        return saved

    def save_tiktoken(self, path: str | Path) -> None:
        """Write the tokens that are not special as tiktoken's rank file, which gives the same ids there.

        Raises
        ------
        ValueError
            The vocabulary comes from a file whose ids do not follow the order of its merges, or that normalizes text; tiktoken would
            give other ids.
        """
        if self._nfc:
            raise ValueError(
                "this tokenizer brings text into Unicode's form C, and tiktoken does not: save it as tokenizer.json"
            )
        self._core.save_tiktoken(path)

    # ---- text to ids

    def encode(
        self, text: Text, *, allowed_special: Special = frozenset(), disallowed_special: Special = "all"
    ) -> list[int]:
        """Ids of a text. By default a text that contains a special token is refused, as in tiktoken.

        Parameters
        ----------
        text
            str or bytes. Surrogates in a str that make a pair are joined; lone ones become U+FFFD, as in tiktoken.
        allowed_special
            Special tokens that become their own id where they occur; ``"all"`` for every one.
        disallowed_special
            Strings that must not occur; ``"all"`` for every special token that is not allowed, ``()`` to treat all of those as ordinary
            text.

        Raises
        ------
        ValueError
            A disallowed special token occurs; the message names it and says what to do.
        """
        allowed, disallowed = _names(allowed_special), _names(disallowed_special)
        return _repaired(lambda t: self._core.encode(t, allowed, disallowed), self._normal(text, allowed))

    def encode_ordinary(self, text: Text) -> list[int]:
        """Ids of a text in which special tokens are ordinary text."""
        return _repaired(lambda t: self._core.encode(t, [], []), self._normal(text, []))

    def encode_to_numpy(
        self, text: Text, *, allowed_special: Special = frozenset(), disallowed_special: Special = ()
    ) -> npt.NDArray[np.uint32]:
        """Ids of a text as an array, u32 [num_tokens]. By default special tokens are ordinary text: this is for data."""
        allowed, disallowed = _names(allowed_special), _names(disallowed_special)
        return _repaired(lambda t: self._core.encode_to_numpy(t, allowed, disallowed), self._normal(text, allowed))

    def encode_batch(
        self,
        texts: Sequence[Text],
        *,
        allowed_special: Special = frozenset(),
        disallowed_special: Special = "all",
        threads: int | None = None,
    ) -> list[list[int]]:
        """Ids of many texts, encoded by several threads; see :meth:`encode`."""
        allowed, disallowed = _names(allowed_special), _names(disallowed_special)
        normal = [self._normal(text, allowed) for text in texts]
        return _repaired_all(lambda t: self._core.encode_batch(t, allowed, disallowed, threads), normal)

    def encode_batch_to_numpy(
        self,
        texts: Sequence[Text],
        *,
        threads: int | None = None,
        allowed_special: Special = frozenset(),
        disallowed_special: Special = (),
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """Ids of many texts in a row, encoded by several threads. By default special tokens are ordinary text: this is for data.

        Returns
        -------
        ids
            u32 [num_tokens]
        offsets
            i64 [len(texts) + 1]: the ids of text ``i`` are ``ids[offsets[i]:offsets[i + 1]]``.
        """
        allowed, disallowed = _names(allowed_special), _names(disallowed_special)
        normal = [self._normal(text, allowed) for text in texts]
        return _repaired_all(lambda t: self._core.encode_batch_to_numpy(t, allowed, disallowed, threads), normal)

    def encode_file(self, path: str | Path, output: str | Path, *, threads: int | None = None) -> int:
        """Encode a file, special tokens as ordinary text, into a ``.npy`` array of one dimension; the number of tokens.

        The array is ``uint16`` where all ids fit (``vocab_size`` up to 65,536), else ``uint32``. The file is read block by block, cut
        where pieces end, so that memory stays bounded and the ids are those of the whole text. ``output`` appears whole or not at all.
        """
        if not self._nfc:
            return self._core.encode_file(path, output, threads)
        normal = temporary_name(Path(output))
        try:
            # No character joins with a line's end.
            with Path(path).open("rb") as source, normal.open("wb") as sink:
                sink.writelines(_as_bytes(self._normal(line, [])) for line in source)
            return self._core.encode_file(normal, output, threads)
        finally:
            normal.unlink(missing_ok=True)

    def pieces(self, text: Text) -> list[tuple[bytes, list[int]]]:
        """How an ordinary text is cut: each piece with the ids of its tokens. No token crosses the border of a piece."""
        data = _as_bytes(self._normal(text, []))
        offsets = self._core.piece_offsets(data).tolist()
        pieces = [data[start:end] for start, end in itertools.pairwise(offsets)]
        return [(piece, self.encode_ordinary(piece)) for piece in pieces]

    def _normal(self, text: Text, allowed: list[str] | None) -> Text:
        """The text as the merges are to see it; tokens that are found in it as such stay as they are."""
        if not isinstance(text, str | bytes):
            raise TypeError(f"text is {type(text).__name__}: give str or bytes")
        if not self._nfc:
            return text
        # Bytes that are no UTF-8 stay: as lone surrogates they have no other form.
        shown = text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else join_surrogates(text)
        if is_nfc(shown):
            return text
        found = [*self._always, *(self.special_tokens if allowed is None else allowed)]
        found.sort(key=len, reverse=True)
        parts = re.split("(" + "|".join(map(re.escape, found)) + ")", shown) if found else [shown]
        shown = "".join(part if index % 2 else nfc(part) for index, part in enumerate(parts))
        return shown.encode("utf-8", "surrogateescape") if isinstance(text, bytes) else shown

    @cached_property
    def _always(self) -> list[str]:
        """Added tokens that any text gives, allowed or not: those of a file that are not special."""
        kind, contents = self._core.contents()
        added = json.loads(contents)["added_tokens"] if kind == _JSON else []
        return [entry["content"] for entry in added if not entry.get("special", False)]

    # ---- ids to text

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]], errors: str = "replace") -> str:
        """The text behind ids. Ids may end inside a character: ``errors`` is that of ``bytes.decode``.

        Raises
        ------
        DataError
            An id that no token has; the message names it and its index.
        TypeError
            Something else than whole numbers.
        """
        return self.decode_bytes(ids).decode("utf-8", errors)

    def decode_bytes(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> bytes:
        """The bytes behind ids, exactly; special tokens included. Raises as :meth:`decode`."""
        if isinstance(ids, np.ndarray):
            if ids.dtype.kind not in "iu":
                raise TypeError(f"token ids have dtype {ids.dtype}: give whole numbers")
            if ids.ndim != 1:
                raise DataError(f"token ids have shape {list(ids.shape)}: give those of one text, in one dimension")
            if ids.dtype != np.uint64:
                return self._core.decode_array(np.ascontiguousarray(ids, dtype=np.int64))
            ids = ids.tolist()
        if not isinstance(ids, Iterable):
            raise TypeError(f"token ids are {ids!r}: give a list of whole numbers")
        numbers = list(ids)
        try:
            return self._core.decode_list(numbers)
        except (TypeError, OverflowError):
            raise self._no_ids(numbers) from None

    def _no_ids(self, numbers: Sequence[object]) -> Exception:
        """Of a list with something that is no 64-bit number: what it is."""
        for index, number in enumerate(numbers):
            if not isinstance(number, SupportsIndex):
                return TypeError(f"token id {number!r} at index {index} is no whole number")
            if not 0 <= operator.index(number) < self.vocab_size:
                last = self.vocab_size - 1
                return DataError(f"token id {number} at index {index} has no token: ids run from 0 to {last}")
        return TypeError("token ids are no list of whole numbers")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token. Raises as :meth:`decode`."""
        return self.decode_bytes([token_id])

    # ---- facts

    @property
    def vocab_size(self) -> int:
        """Number of ids: the largest one plus 1, special tokens included."""
        return self._core.vocab_size

    @property
    def pattern(self) -> str:
        """Name of the pattern that cuts text into pieces."""
        return self._core.pattern

    @cached_property
    def special_tokens(self) -> Mapping[str, int]:
        """Special tokens and their ids, ascending by id."""
        return MappingProxyType(dict(self._core.special_tokens))

    @property
    def eos_token_id(self) -> int | None:
        """Id of ``<|endoftext|>``, the end of a document; ``None`` if it is no special token here."""
        return self.special_tokens.get(END_OF_TEXT)

    @cached_property
    def hash(self) -> str:
        """sha256, as hex, of all that decides ids: tokens, merges, pattern and special tokens. Independent of file and machine."""
        return hashlib.sha256(self._core.canonical_bytes() + (b"NFC" if self._nfc else b"")).hexdigest()

    def __len__(self) -> int:
        return self.vocab_size

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tokenizer):
            return NotImplemented
        return self is other or self.hash == other.hash

    def __hash__(self) -> int:
        return hash(self.hash)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, pattern={self.pattern!r}, special_tokens={dict(self.special_tokens)})"

    def __reduce__(self) -> tuple[Callable[..., Tokenizer], tuple[object, ...]]:
        kind, contents = self._core.contents()
        return _restore, (kind, contents, self.pattern, list(self.special_tokens.items()), self._nfc)


def _restore(
    kind: str, contents: bytes, pattern: str, special_tokens: list[tuple[str, int]], nfc: bool = False
) -> Tokenizer:
    """Undo :meth:`Tokenizer.__reduce__`."""
    return Tokenizer._wrap(_native.Tokenizer.from_contents(kind, contents, pattern, special_tokens), nfc)


def _without_nfc(file: Path) -> bytes | None:
    """The contents of a tokenizer.json whose normalizer is form C, without it; None for any other."""
    try:
        document = json.loads(file.read_bytes())
        normalizer = document.pop("normalizer")
        if normalizer.get("type") == "Sequence":
            (normalizer,) = normalizer["normalizers"]
        return json.dumps(document).encode() if normalizer["type"] == "NFC" else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _as_bytes(text: Text) -> bytes:
    return text if isinstance(text, bytes) else join_surrogates(text).encode()


def _names(special: Special) -> list[str] | None:
    """A set of special tokens as the native side takes it: ``None`` means all."""
    if isinstance(special, str):
        if special != "all":
            raise ValueError(f"{special!r} is no set of special tokens: give a set of strings, or 'all'")
        return None
    return list(special)


def _repaired(work: Callable[[Text], _ResultT], text: Text) -> _ResultT:
    try:
        return work(text)
    except UnicodeEncodeError:
        assert isinstance(text, str)
        return work(join_surrogates(text))


def _repaired_all(work: Callable[[list[Text]], _ResultT], texts: Iterable[Text]) -> _ResultT:
    texts = list(texts)
    try:
        return work(texts)
    except UnicodeEncodeError:
        return work([join_surrogates(text) if isinstance(text, str) else text for text in texts])


def _count(trainer: _native.TokenizerTrainer, source: Source) -> Iterator[int]:
    """Count the pieces of ``source`` step by step; after each step the bytes counted so far."""
    if isinstance(source, str | Path):
        source = [source]
    if isinstance(source, list | tuple) and not any(isinstance(entry, bytes) for entry in source):
        source = Corpus(source)
    if isinstance(source, Corpus) and source.files and source.separator is None:
        for path in source.files:
            if path.suffix.lower() in (".jsonl", ".gz", ".zst"):
                yield from _count_documents(trainer, Corpus(path))
            else:
                yield trainer.add_file(path)
    else:
        yield from _count_documents(trainer, source)


def _count_documents(trainer: _native.TokenizerTrainer, documents: Iterable[Any]) -> Iterator[int]:
    """Count documents in groups that keep all threads busy."""
    group: list[Text] = []
    size = 0
    for number, document in enumerate(documents, 1):
        if not isinstance(document, str | bytes):
            raise TypeError(f"document {number} is a {type(document).__name__}: give str or bytes")
        group.append(document)
        size += len(document)
        if size >= _BATCH_BYTES:
            yield _repaired_all(trainer.add_documents, group)
            group, size = [], 0
    if group:
        yield _repaired_all(trainer.add_documents, group)
