"""Byte pair encoding in its slowest and plainest form: the twin of the compiled tokenizer.

Pieces come from the published regular expressions, run by the ``regex`` module; training counts every pair again before each merge;
encoding looks at every pair again after each merge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import regex

_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{tail}|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PATTERNS: dict[str, str] = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # Python's $ also matches before a last newline; \Z is the end alone, as $ is for tiktoken.
    "cl100k": _CL100K.format(digits="{1,3}", tail=r"|\s+\Z"),
    "llama3": _CL100K.format(digits="{1,3}", tail=""),
    "qwen2": _CL100K.format(digits="", tail=""),
}

Piece = tuple[int, ...]
Pair = tuple[int, int]


def byte_level_order() -> list[int]:
    """Bytes in the order of their ids: those that Latin-1 can print, then the others."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return printable + [byte for byte in range(256) if byte not in printable]


def split(pattern: str, text: bytes) -> list[bytes]:
    """The pieces of a text. A byte that is not part of valid UTF-8 becomes a surrogate, which no class of the pattern contains."""
    if pattern == "smollm":
        parts = regex.split(r"(\p{N})", text.decode("utf-8", "surrogateescape"))
        return [
            piece.encode("utf-8", "surrogateescape")
            for i, part in enumerate(parts)
            for piece in ([part] if i % 2 else regex.findall(PATTERNS["gpt2"], part))
        ]
    found = regex.findall(PATTERNS[pattern], text.decode("utf-8", "surrogateescape"))
    return [piece.encode("utf-8", "surrogateescape") for piece in found]


def train(documents: Iterable[bytes], num_merges: int, pattern: str = "gpt2", min_frequency: int = 0) -> list[Pair]:
    """Merges as pairs of ids: bytes in ByteLevel order, then one id for each merge. Fewer where no pair is left."""
    id_of_byte = {byte: i for i, byte in enumerate(byte_level_order())}
    counts: Counter[Piece] = Counter()
    for document in documents:
        counts.update(tuple(id_of_byte[byte] for byte in piece) for piece in split(pattern, document))
    merges: list[Pair] = []
    while len(merges) < num_merges:
        pairs: Counter[Pair] = Counter()
        for piece, count in counts.items():
            for pair in pairwise(piece):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < max(1, min_frequency):
            break
        merged: Counter[Piece] = Counter()
        for piece, count in counts.items():
            merged[_join(piece, best, 256 + len(merges))] += count
        counts = merged
        merges.append(best)
    return merges


def _join(piece: Piece, pair: Pair, new: int) -> Piece:
    out: list[int] = []
    i = 0
    while i < len(piece):
        if piece[i : i + 2] == pair:
            out.append(new)
            i += 2
        else:
            out.append(piece[i])
            i += 1
    return tuple(out)


def tokens_of(merges: Sequence[Pair]) -> list[bytes]:
    """The bytes of each id."""
    tokens = [bytes([byte]) for byte in byte_level_order()]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return tokens


def encode_merges(merges: Sequence[Pair], pattern: str, text: bytes) -> list[int]:
    """Hugging Face's rule: of the listed pairs the one listed first, leftmost first."""
    id_of_byte = {byte: i for i, byte in enumerate(byte_level_order())}
    rank = {pair: i for i, pair in enumerate(merges)}
    ids: list[int] = []
    for piece in split(pattern, text):
        symbols = [id_of_byte[byte] for byte in piece]
        while len(symbols) > 1:
            best = min(range(len(symbols) - 1), key=lambda i: rank.get((symbols[i], symbols[i + 1]), len(rank)))
            pair = (symbols[best], symbols[best + 1])
            if pair not in rank:
                break
            symbols[best : best + 2] = [256 + rank[pair]]
        ids += symbols
    return ids


def encode_ranks(ranks: Mapping[bytes, int], pattern: str, text: bytes) -> list[int]:
    """tiktoken's rule: a piece that is a token is taken whole; else neighbours whose concatenation is a token merge, smallest id first."""
    ids: list[int] = []
    for piece in split(pattern, text):
        if piece in ranks:
            ids.append(ranks[piece])
            continue
        parts = [piece[i : i + 1] for i in range(len(piece))]
        while len(parts) > 1:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
            if parts[best] + parts[best + 1] not in ranks:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        ids += [ranks[part] for part in parts]
    return ids
