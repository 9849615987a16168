"""Files and iterables become documents; what cannot be read is named by file and row."""

from __future__ import annotations

import gzip
import json

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from ingot.data import corpus as corpus_module
from ingot.data.corpus import Corpus
from ingot.errors import DataError
from ingot.tokenizer import Tokenizer


def test_a_text_file_is_one_document_of_its_very_bytes(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo \xff\xfe<|endoftext|>\n")
    assert list(Corpus(path)) == [path.read_bytes()]
    assert Corpus(path).num_bytes == len(path.read_bytes())


def test_a_separator_cuts_and_white_space_alone_is_no_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("first<|endoftext|>\nsecond<|endoftext|>  <|endoftext|>\n")
    assert list(Corpus(path, separator="<|endoftext|>")) == [b"first", b"\nsecond"]


@given(st.lists(st.text(alphabet="ab-", max_size=12), max_size=8), st.integers(1, 7))
def test_cutting_a_stream_equals_cutting_the_whole(pieces, chunk):
    text = "--".join(pieces).encode()
    previous, corpus_module._CHUNK_BYTES = corpus_module._CHUNK_BYTES, chunk
    try:
        import io

        cut = list(corpus_module._pieces(io.BytesIO(text), b"--"))
    finally:
        corpus_module._CHUNK_BYTES = previous
    assert cut == text.split(b"--")


def test_rows_folders_and_compression(tmp_path):
    rows = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in ("x", "", "ä\u2028b")) + "\n"
    folder = tmp_path / "texts"
    (folder / "inner").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "no.txt").write_text("no")
    (folder / "notes.md").write_text("no")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (folder / "c.TXT").write_text("c")
    compress = zstandard.ZstdCompressor().compress
    (folder / "inner" / "d.txt.zst").write_bytes(compress(b"first frame,") + compress(b" second frame"))
    (folder / "a.txt").write_text("a")
    expected = [b"a", b"x", "ä\u2028b".encode(), b"c", b"first frame, second frame"]
    assert list(Corpus(folder)) == expected
    assert list(Corpus([str(folder / "notes.md"), folder / "a.txt"])) == [b"no", b"a"]


def test_documents_in_memory_can_be_read_again_whatever_holds_them():
    for source in (iter(["one", b"two"]), [b"one", b"two"], ("one" if i == 0 else "two" for i in range(2))):
        corpus = Corpus(source)
        assert list(corpus) == list(corpus) == [b"one", b"two"]
    assert list(Corpus.from_documents(["one", "two"])) == [b"one", b"two"]


def test_the_hash_is_of_the_documents_and_their_boundaries(tmp_path):
    (tmp_path / "a.txt").write_text("same text")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"same text"))
    assert Corpus(tmp_path / "a.txt").hash == Corpus(tmp_path / "b.txt.gz").hash == Corpus([b"same text"]).hash
    assert Corpus([b"same text"]).hash != Corpus([b"same ", b"text"]).hash


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', r'a\.jsonl, row 2: field "text" is of type int; give a string'),
        ("a.jsonl", b'{"text": "x"}\n\n{"content": ""}\n', r'row 3: no field "text" \(fields there: content\)'),
        ("a.jsonl", b"[1]\n", "row 1: a list, not an object"),
        ("a.jsonl", b'{"text": "x"\n', "row 1: not valid JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', "row 1: not valid JSON"),
        ("a.txt", b"", "a.txt: no text in it"),
        ("a.txt.gz", b"not gzip", "cannot be decompressed"),
        ("a.txt.gz", gzip.compress(b"x" * 1000)[:-9], "cannot be decompressed"),
        ("a.txt.zst", b"not zstandard", "not valid zstandard data"),
        ("a.txt.zst", zstandard.ZstdCompressor().compress(bytes(range(256)) * 9)[:-5], "cannot be decompressed"),
        ("a.parquet", b"PAR1", "not a text file"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        _ = Corpus(path).hash


def test_missing_and_empty_places_are_found_at_once(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.txt: no such file or folder"):
        Corpus(tmp_path / "nothing.txt")
    with pytest.raises(DataError, match=r"no \.txt or \.jsonl file in this folder"):
        Corpus(tmp_path)
    with pytest.raises(DataError, match="no text was given"):
        Corpus([])
    with pytest.raises(DataError, match="separator is empty"):
        Corpus([b"x"], separator="")
    with pytest.raises(DataError, match="document 2 is a int"):
        list(Corpus(iter(["a", 2])))


def test_a_text_in_the_place_of_a_path_is_told_apart():
    text = "a text where a path belongs. " * 300
    with pytest.raises(DataError, match=r"cannot be a path \(.*\); texts are given as iter\(\[\.\.\.\]\)") as raised:
        Corpus([text])
    assert len(str(raised.value)) < 200
    with pytest.raises(DataError, match="cannot be a path"):
        Tokenizer.train([text], vocab_size=300)


def test_surrogates_are_read_as_the_tokenizer_reads_them(tmp_path):
    texts = ["a\ud800b", "\ud83d\ude00", "\udc00\ud800 x"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = Tokenizer.bytes_only()
    for corpus in (Corpus(iter(texts)), Corpus(tmp_path / "a.jsonl")):
        assert list(map(list, corpus)) == [tokenizer.encode(text) for text in texts]
