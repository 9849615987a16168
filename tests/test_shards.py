"""Token files: what is in them, when they are used again, and what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from ingot.data.cache import CacheMismatch, cached_files, clear_cache
from ingot.data.corpus import Corpus
from ingot.data.shards import TokenShards
from ingot.errors import DataError


class ByteTokenizer:
    """Bytes as ids; with ``end``, an id that stands between documents. Counts what it encodes."""

    def __init__(self, end: int | None = None, vocab_size: int = 256) -> None:
        self.eos_token_id = end
        self.vocab_size = vocab_size
        self.encoded = 0

    @property
    def hash(self) -> str:
        return hashlib.sha256(f"{self.eos_token_id} {self.vocab_size}".encode()).hexdigest()

    def encode_batch_to_numpy(self, documents, threads=None):
        self.encoded += len(documents)
        offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
        return np.frombuffer(b"".join(documents), np.uint8).astype(np.uint32), offsets


@pytest.mark.parametrize(("vocab_size", "dtype"), [(256, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_ids_without_an_end_of_text_id(tmp_path, vocab_size, dtype):
    shards = TokenShards.build(Corpus([b"abc", b"de"]), ByteTokenizer(None, vocab_size), tmp_path)
    assert shards.ids.dtype == dtype
    assert bytes(shards.ids.astype(np.uint8)) == b"abcde"
    assert shards.starts.tolist() == [0, 3, 5]
    assert (shards.num_documents, shards.num_tokens, shards.num_bytes) == (2, 5, 5)


def test_the_end_of_text_id_stands_on_both_sides_of_each_document(tmp_path):
    shards = TokenShards.build(Corpus([b"ab", b"ab", b"c"]), ByteTokenizer(end=300, vocab_size=301), tmp_path)
    assert shards.ids.tolist() == [300, 97, 98, 300, 97, 98, 300, 99, 300]
    assert shards.starts.tolist() == [0, 3, 6, 8]
    assert shards.keys[0] == shards.keys[1] != shards.keys[2]


def test_groups_of_documents_are_one_stream(tmp_path, monkeypatch):
    from ingot.data import shards as module

    documents = [bytes([65 + i % 26]) * (i % 7 + 1) for i in range(100)]
    monkeypatch.setattr(module, "_GROUP_BYTES", 10)
    seen = []
    shards = TokenShards.build(
        Corpus(documents), ByteTokenizer(), tmp_path, progress=lambda done, total: seen.append((done, total))
    )
    assert bytes(shards.ids.astype(np.uint8)) == b"".join(documents)
    assert len(seen) > 10
    assert seen[-1] == (shards.num_bytes, shards.num_bytes)


def test_a_second_build_opens_the_first(tmp_path):
    tokenizer = ByteTokenizer()
    first = TokenShards.build(Corpus([b"abc"]), tokenizer, tmp_path)
    again = TokenShards.build(Corpus([b"abc"]), tokenizer, tmp_path)
    assert tokenizer.encoded == 1
    assert again.path == first.path
    other = TokenShards.build(Corpus([b"abd"]), tokenizer, tmp_path)
    assert other.path != first.path
    assert TokenShards.build(Corpus([b"abc"]), ByteTokenizer(end=9), tmp_path).path != first.path


def test_a_damaged_file_is_made_again_and_refused_when_opened(tmp_path):
    tokenizer = ByteTokenizer()
    path = TokenShards.build(Corpus([b"abc" * 100]), tokenizer, tmp_path).path
    whole = path.read_bytes()
    for damaged, message in (
        (whole[:-1], "bytes long"),
        (b"something else", "not a token file"),
        (whole[:9] + b"!" + whole[10:], "header is damaged"),
        (whole.replace(b'"format_version": 1', b'"format_version": 9'), "newer version"),
        (whole.replace(b'"num_tokens": 300', b'"num_tokens": "x"'), "header is damaged"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=message):
            TokenShards.open(path)
        built = TokenShards.build(Corpus([b"abc" * 100]), tokenizer, tmp_path)
        assert built.path.read_bytes() == whole


def test_a_file_of_another_text_or_tokenizer_is_refused_and_not_overwritten(tmp_path):
    corpus, tokenizer = Corpus([b"abc"]), ByteTokenizer()
    first = TokenShards.build(corpus, tokenizer, tmp_path)
    with pytest.raises(CacheMismatch, match=r"another tokenizer \(tokenizer_hash "):
        TokenShards.open(first.path, tokenizer=ByteTokenizer(end=5))
    with pytest.raises(CacheMismatch, match=r"another text \(source_hash .*, expected 000000000000\); delete it"):
        TokenShards.open(first.path, source_hash="0" * 64)
    other = TokenShards.build(Corpus([b"abd"]), tokenizer, tmp_path).path
    other.write_bytes(first.path.read_bytes())
    with pytest.raises(CacheMismatch, match="another text"):
        TokenShards.build(Corpus([b"abd"]), tokenizer, tmp_path)
    assert other.read_bytes() == first.path.read_bytes()


def test_a_failed_build_leaves_nothing(tmp_path):
    class Failing(ByteTokenizer):
        def encode_batch_to_numpy(self, documents, threads=None):
            raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"cannot be written: No space left on device; --cache-dir"):
        TokenShards.build(Corpus([b"abc"]), Failing(), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_cache_can_be_listed_and_cleared(tmp_path):
    TokenShards.build(Corpus([b"abc"]), ByteTokenizer(), tmp_path)
    TokenShards.build(Corpus([b"abd"]), ByteTokenizer(), tmp_path)
    (tmp_path / "mine.txt").write_text("stays")
    files = cached_files(tmp_path)
    assert len(files) == 2
    size = sum(path.stat().st_size for path in files)
    assert clear_cache(tmp_path) == (2, size)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert cached_files(Path(tmp_path) / "nowhere") == []
