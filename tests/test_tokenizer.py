"""The tokenizer gives the ids of tiktoken and tokenizers, the merges of tokenizers' trainer, and every byte back."""

from __future__ import annotations

import base64
import functools
import json
import pickle
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
import tiktoken
import tiktoken_ext.openai_public
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

import ingot.tokenizer
from ingot import Tokenizer
from ingot.errors import DataError
from ingot.normalization import nfc
from oracle import bpe

PATTERNS = ingot.tokenizer.PATTERNS
END = "<|endoftext|>"

SCALARS = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF)

# Characters at which the patterns decide something, beside ordinary words.
TRICKY = [
    *" \t\r\n'sdmtSDMTxX09.,!-é",
    *"\u017f\u212a\u00df\u0130\u00a0\u0085\u2028\u3000\u200b\u0301\x1c\x1f\0²Ⅷ٣中語한क्🎉\U0001d7d8",
    *[
        "'ll",
        "'VE",
        "'re",
        "'\u017f",
        "  ",
        "\n\n",
        "\r\n",
        " \n ",
        "it's",
        "12345",
        "<|endoftext|>",
        "<|",
        "hello world",
    ],
]


def tiktoken_patterns() -> dict[str, str]:
    """The patterns as the installed tiktoken has them, read from its source."""
    names = tiktoken_ext.openai_public.cl100k_base.__code__.co_consts
    cl100k = next(c for c in names if isinstance(c, str) and r"\p{N}{1,3}" in c)
    return {"gpt2": tiktoken_ext.openai_public.r50k_pat_str, "cl100k": cl100k}


def make_text(seed: int, num_words: int = 4000) -> str:
    """Text with a skewed distribution of words, some of them not Latin, and all kinds of punctuation."""
    rng = random.Random(seed)
    alphabets = ["etaoinshrdlu", "etaoinshrdlucmfwypvbgkjqxz", "абвгдежзик", "中文字符串語", "0123456789"]
    words = []
    for _ in range(600):
        alphabet = rng.choices(alphabets, weights=[6, 6, 2, 1, 1])[0]
        words.append("".join(rng.choice(alphabet) for _ in range(rng.randint(1, 9))))
    weights = [1 / (rank + 1) for rank in range(len(words))]
    out = []
    for word in rng.choices(words, weights, k=num_words):
        out.append(rng.choice(["", "", "", "'s", "'LL", ",", ".", "!\n", "\n\n", "  ", "\r\n\t", " (", "🎉"]))
        out.append(rng.choice([" ", " ", " ", "", "-"]) + word)
    return "".join(out)


TEXT = make_text(0)


def train(
    documents: Iterable[str | bytes],
    vocab_size: int,
    pattern: str = "gpt2",
    specials: Iterable[str] = (END,),
    **more: Any,
) -> Tokenizer:
    return Tokenizer.train(
        iter(documents), vocab_size=vocab_size, pattern=pattern, special_tokens=list(specials), **more
    )


@pytest.fixture(scope="module")
def tokenizer_of() -> Callable[[str], Tokenizer]:
    """A tokenizer for each pattern, trained once."""
    made = {pattern: train([TEXT], 1500, pattern) for pattern in PATTERNS}
    return made.__getitem__


def ranks_of(tokenizer: Tokenizer) -> dict[bytes, int]:
    special = set(tokenizer.special_tokens.values())
    return {tokenizer.token_bytes(i): i for i in range(len(tokenizer)) if i not in special}


def merges_of(tokenizer: Tokenizer, folder: Path) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.save(folder).read_text("utf-8"))["model"]["merges"]]


def hf_of(tokenizer: Tokenizer, folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(tokenizer.save(folder)))


def tiktoken_of(tokenizer: Tokenizer, pattern: str) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "own",
        pat_str=tiktoken_patterns()[pattern],
        mergeable_ranks=ranks_of(tokenizer),
        special_tokens=dict(tokenizer.special_tokens),
    )


def tricky_text(rng: random.Random) -> str:
    def part() -> str:
        return chr(rng.choice(SCALARS_AS_NUMBERS)) if rng.random() < 0.15 else rng.choice(TRICKY)

    return "".join(part() for _ in range(rng.randint(0, 40)))


SCALARS_AS_NUMBERS = [ord(c) for c in SCALARS]


# ---- Unicode


def characters_of(expression: str) -> set[str]:
    """The characters that tiktoken's engine sees in a class: it drops what a pattern does not match."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("class", pat_str=expression, mergeable_ranks=ranks, special_tokens={})
    return set(bytes(encoding.encode_ordinary(SCALARS)).decode())


@functools.cache
def classes_seen_by_ingot() -> dict[str, set[str]]:
    """The classes as the splitter shows them: a letter joins the letter before it, a number the number; white space joins nothing."""
    tokenizer = Tokenizer.bytes_only("gpt2")
    seen: dict[str, set[str]] = {r"\p{L}": set(), r"\p{N}": set(), r"\s": set()}
    for expression, neighbour in ((r"\p{L}", "a"), (r"\p{N}", "1"), ("other", "!")):
        joined = set()
        text = "".join(f"\n{neighbour}{c}\n" for c in SCALARS).encode()
        offsets = tokenizer._core.piece_offsets(text)
        starts = set(offsets.tolist())
        position = 0
        for c in SCALARS:
            if position + 2 not in starts:
                joined.add(c)
            position += 3 + len(c.encode())
        seen[expression] = joined
    seen[r"\s"] = set(SCALARS) - seen[r"\p{L}"] - seen[r"\p{N}"] - seen.pop("other")
    return seen


def test_every_code_point_has_the_class_that_tiktoken_sees() -> None:
    for expression, ours in classes_seen_by_ingot().items():
        assert ours == characters_of(expression), expression


def test_every_code_point_has_the_class_that_tokenizers_sees() -> None:
    for expression, ours in classes_seen_by_ingot().items():
        runs = pre_tokenizers.Split(tokenizers.Regex(f"{expression}+"), behavior="removed", invert=True)
        theirs = {c for _, (start, end) in runs.pre_tokenize_str(SCALARS) for c in SCALARS[start:end]}
        assert ours == theirs, expression


# ---- ids


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ids_equal_tokenizers(pattern: str, tokenizer_of: Callable[[str], Tokenizer], tmp_path: Path) -> None:
    tokenizer = tokenizer_of(pattern)
    hf = hf_of(tokenizer, tmp_path)
    rng = random.Random(1)
    for text in [TEXT, *(tricky_text(rng) for _ in range(3000))]:
        # Special tokens are matched there by default, and here when they are allowed.
        assert tokenizer.encode(text, allowed_special="all") == hf.encode(text).ids, text
        pieces = [piece.decode() for piece, _ in tokenizer.pieces(text)]
        if END not in text:
            assert pieces == [text[a:b] for _, (a, b) in hf.pre_tokenizer.pre_tokenize_str(text)], text
            assert (
                tokenizer.decode(tokenizer.encode(text))
                == hf.decode(hf.encode(text).ids, skip_special_tokens=False)
                == text
            )


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k"])
def test_ids_equal_tiktoken(pattern: str, tokenizer_of: Callable[[str], Tokenizer], tmp_path: Path) -> None:
    tokenizer = tokenizer_of(pattern)
    encoding = tiktoken_of(tokenizer, pattern)
    tokenizer.save_tiktoken(tmp_path / "own.tiktoken")
    again = Tokenizer.from_tiktoken(tmp_path / "own.tiktoken", pattern=pattern, special_tokens=tokenizer.special_tokens)
    assert again == tokenizer
    rng = random.Random(2)
    for text in [TEXT, *(tricky_text(rng) for _ in range(3000))]:
        assert tokenizer.encode_ordinary(text) == encoding.encode_ordinary(text), text
        assert tokenizer.encode(text, allowed_special="all") == encoding.encode(text, allowed_special="all"), text


def test_the_end_of_a_text_in_cl100k_and_llama3() -> None:
    pieces = {p: [b for b, _ in Tokenizer.bytes_only(p).pieces("a\n  ")] for p in ("cl100k", "llama3")}
    assert pieces == {"cl100k": [b"a", b"\n  "], "llama3": [b"a", b"\n", b"  "]}


@pytest.fixture(scope="module")
def stable_characters() -> list[str]:
    """Characters that the regex module, which follows a newer Unicode, puts into the same class as tiktoken."""
    unstable: set[str] = set()
    for expression in (r"\p{L}", r"\p{N}", r"\s"):
        unstable |= set(regex.findall(expression, SCALARS)) ^ characters_of(expression)
    return [c for c in SCALARS if c not in unstable]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_any_bytes_equal_the_slow_twin(pattern: str, stable_characters: list[str]) -> None:
    tokenizer = train([TEXT], 600, pattern)
    merges = bpe.train([TEXT.encode()], 600 - 257, pattern)
    assert [tokenizer.token_bytes(i) for i in range(599)] == bpe.tokens_of(merges)
    character = st.sampled_from(stable_characters).map(str.encode)
    broken = st.binary(min_size=1, max_size=3)
    part = st.one_of(
        st.sampled_from([c.encode() for c in TRICKY]),
        st.sampled_from(TEXT.split(" ")).map(str.encode),
        character,
        broken,
    )

    @settings(max_examples=150, derandomize=True)
    @given(st.lists(part, max_size=30).map(b"".join).filter(lambda data: is_stable(data, stable)))
    def check(data: bytes) -> None:
        ids = tokenizer.encode_ordinary(data)
        assert [piece for piece, _ in tokenizer.pieces(data)] == bpe.split(pattern, data)
        assert ids == bpe.encode_merges(merges, pattern, data)
        assert tokenizer.decode_bytes(ids) == data

    stable = set(stable_characters)
    check()


def is_stable(data: bytes, stable: set[str]) -> bool:
    """Random bytes can happen to spell a character whose class has changed."""
    return all(c in stable or "\udc80" <= c <= "\udcff" for c in data.decode("utf-8", "surrogateescape"))


@settings(max_examples=300, derandomize=True)
@given(data=st.binary(max_size=300))
def test_any_bytes_come_back(data: bytes) -> None:
    for tokenizer in (Tokenizer.bytes_only("gpt2"), Tokenizer.bytes_only("cl100k")):
        assert tokenizer.encode(data) == list(data)
        assert tokenizer.decode_bytes(np.frombuffer(data, np.uint8)) == data
        assert b"".join(piece for piece, _ in tokenizer.pieces(data)) == data


def random_ranks(rng: random.Random, reachable: bool) -> list[bytes]:
    """Tokens in order of rank: made by merging random neighbours of a text, so that each is one merge of two others, or any strings."""
    tokens = [bytes([byte]) for byte in rng.sample(range(256), 256)]
    text = [bytes([byte]) for byte in rng.choices(b"abc", k=400)]
    while len(tokens) < 256 + 60:
        if reachable:
            at = rng.randrange(len(text) - 1)
            pair = text[at : at + 2]
            new = b"".join(pair)
            i = 0
            while i < len(text) - 1:
                if text[i : i + 2] == pair:
                    text[i : i + 2] = [new]
                i += 1
            tokens.append(new)
        else:
            new = bytes(rng.choices(b"abc", k=rng.randint(2, 8)))
            if new not in tokens:
                tokens.append(new)
    return tokens


@pytest.mark.parametrize("reachable", [True, False])
def test_rank_files_give_tiktokens_ids(reachable: bool, tmp_path: Path) -> None:
    """Also where a token is no merge of two others, so that only tiktoken's rule reaches it."""
    rng = random.Random(3)
    writable = 0
    for number in range(60):
        tokens = random_ranks(rng, reachable)
        path = tmp_path / f"{number}.tiktoken"
        path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
        tokenizer = Tokenizer.from_tiktoken(path, pattern="gpt2", special_tokens={END: len(tokens)})
        ranks = {token: rank for rank, token in enumerate(tokens)}
        encoding = tiktoken.Encoding(
            "random", pat_str=tiktoken_patterns()["gpt2"], mergeable_ranks=ranks, special_tokens={END: len(tokens)}
        )
        for length in [3, 8, 20, 20, 63, 64, 65, 66, 200]:
            text = "".join(rng.choices("abc", k=length))
            ids = tokenizer.encode(text)
            assert ids == encoding.encode(text) == bpe.encode_ranks(ranks, "gpt2", text.encode()), text
        assert pickle.loads(pickle.dumps(tokenizer)) == tokenizer
        tokenizer.save_tiktoken(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == path.read_bytes()
        try:
            tokenizer.save(tmp_path / "json")
        except ValueError as error:
            assert "save_tiktoken" in str(error)  # noqa: PT017
        else:
            writable += 1
            assert Tokenizer.from_file(tmp_path / "json") == tokenizer
    assert (writable == 60) if reachable else (writable < 60)


def test_pieces_longer_than_the_caches_and_the_scan() -> None:
    tokenizer = train(["abcab " * 100, "a" * 300], 256 + 8, specials=())
    merges = bpe.train([b"abcab " * 100, b"a" * 300], 8)
    rng = random.Random(4)
    for length in [1, 14, 15, 16, 17, 63, 64, 65, 66, 255, 256, 257, 1000]:
        for _ in range(3):
            text = "".join(rng.choices("aabc", k=length)).encode()
            for _ in range(2):
                # The second time it may come from a cache.
                assert tokenizer.encode(text) == bpe.encode_merges(merges, "gpt2", text)


def test_more_pieces_than_the_cache_holds() -> None:
    tokenizer = train([TEXT], 1500)
    rng = random.Random(5)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(3, 20))) for _ in range(200_000)]
    text = " ".join(words)
    ids = tokenizer.encode_to_numpy(text)
    assert tokenizer.decode(ids) == text
    hf_ids = [i for word in words[:2000] for i in tokenizer.encode(" " + word)]
    again = train([TEXT], 1500)
    assert [i for word in words[:2000] for i in again.encode(" " + word)] == hf_ids
    np.testing.assert_array_equal(again.encode_to_numpy(text), ids)


# ---- training


def hf_merges(
    documents: list[str], vocab_size: int, min_frequency: int, specials: list[str], pattern: str, folder: Path
) -> list[tuple[str, str]]:
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer = hf_of(Tokenizer.bytes_only(pattern), folder).pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator(documents, trainer)
    return [tuple(pair) for pair in json.loads(theirs.to_str())["model"]["merges"]]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("vocab_size", "specials"), [(300, [END]), (2000, [END]), (2000, []), (1000, ["<a>", "<b>"])])
def test_merges_equal_tokenizers(pattern: str, vocab_size: int, specials: list[str], tmp_path: Path) -> None:
    documents = [make_text(seed, 1500) for seed in range(3)]
    tokenizer = train(documents, vocab_size, pattern, specials)
    assert len(tokenizer) == vocab_size
    assert list(tokenizer.special_tokens.values()) == list(range(vocab_size - len(specials), vocab_size))
    assert merges_of(tokenizer, tmp_path) == hf_merges(documents, vocab_size, 0, specials, pattern, tmp_path)


@settings(max_examples=60, derandomize=True)
@given(
    words=st.lists(st.text(alphabet="ab", min_size=1, max_size=12), min_size=1, max_size=30),
    min_frequency=st.integers(0, 4),
    data=st.data(),
)
def test_ties_and_overlaps_merge_as_in_tokenizers_and_the_twin(
    words: list[str], min_frequency: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two letters: runs (aaaa) overlap themselves and almost every count is tied."""
    folder = tmp_path_factory.getbasetemp()
    documents = [" ".join(words)]
    possible = bpe.train([documents[0].encode()], 1000, min_frequency=min_frequency)
    wanted = data.draw(st.integers(1, len(possible) + 3))
    if wanted > len(possible):
        with pytest.raises(ValueError, match=f"largest vocab_size is {256 + len(possible)}[^0-9]"):
            train(documents, 256 + wanted, specials=(), min_frequency=min_frequency)
        return
    tokenizer = train(documents, 256 + wanted, specials=(), min_frequency=min_frequency)
    assert [tokenizer.token_bytes(i) for i in range(256 + wanted)] == bpe.tokens_of(possible[:wanted])
    assert merges_of(tokenizer, folder) == hf_merges(documents, 256 + wanted, min_frequency, [], "gpt2", folder)


def test_training_on_bytes_that_are_no_text() -> None:
    rng = random.Random(6)
    document = b"".join(rng.choices([b"\xff\xfe", b"\xe2\x82", b"ab", b" ", b"\xc3\xa9"], k=3000))
    merges = bpe.train([document], 20)
    tokenizer = train([document], 276, specials=())
    assert [tokenizer.token_bytes(i) for i in range(276)] == bpe.tokens_of(merges)


def test_training_does_not_depend_on_threads_source_or_grouping(tmp_path: Path) -> None:
    documents = [make_text(seed, 300) for seed in range(8)]
    reference = train(documents, 900)
    for threads in (1, 2, 3, 8):
        assert train(documents, 900, threads=threads) == reference
    assert train([document.encode() for document in documents], 900) == reference
    assert Tokenizer.train([document.encode() for document in documents], vocab_size=900) == reference
    paths = []
    for number, document in enumerate(documents):
        paths.append(tmp_path / f"{number}.txt")
        paths[-1].write_bytes(document.encode())
    assert Tokenizer.train(paths, vocab_size=900) == reference
    assert Tokenizer.train(tmp_path, vocab_size=900) == reference
    rows = "".join(json.dumps({"text": document}) + "\n" for document in documents)
    (tmp_path / "rows.jsonl").write_text(rows, "utf-8")
    assert Tokenizer.train(tmp_path / "rows.jsonl", vocab_size=900) == reference


def test_a_long_document_counts_as_a_whole(tmp_path: Path) -> None:
    """More than one block and part, so that it is cut while it is read."""
    text = make_text(7, 40_000) * 40
    assert len(text) > 9 << 20
    path = tmp_path / "long.txt"
    path.write_bytes(text.encode())
    from_file = Tokenizer.train(str(path), vocab_size=700, threads=2)
    theirs = hf_merges([text[: len(text) // 40]], 700, 0, [END], "gpt2", tmp_path)
    assert from_file == train([text], 700, threads=3)
    assert merges_of(from_file, tmp_path) == theirs


def test_progress_is_reported_and_can_stop() -> None:
    seen: list[tuple[str, int, int]] = []
    tokenizer = train([TEXT], 600, progress=lambda *step: seen.append(step))
    assert len(tokenizer) == 600
    assert seen[0] == ("reading", len(TEXT.encode()), 0)
    assert seen[1] == ("merging", 0, 343)
    assert seen[-1] == ("merging", 343, 343)

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "merging" and done > 100:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        train([TEXT], 1500, progress=stop)


@pytest.mark.parametrize("work", ["encode", "encode_batch", "train"])
def test_interrupts_stop_long_work(work: str) -> None:
    tokenizer = train([TEXT], 600)
    letters = "".join(random.Random(8).choices("abcdefghij", k=200_000))
    # Seconds of work, where the signal comes after a tenth of one.
    text = (letters + " ") * 300
    rng = random.Random(9)
    words = " ".join("".join(rng.choices("abcdefghijklmnop", k=30)) for _ in range(300_000 if work == "train" else 0))

    def run() -> None:
        if work == "encode":
            tokenizer.encode_to_numpy(text)
        elif work == "encode_batch":
            tokenizer.encode_batch_to_numpy([text] * 4, threads=2)
        else:
            train([words], 60_000)

    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.1, lambda: signal.pthread_kill(main, signal.SIGINT))
    started = time.perf_counter()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run()
    timer.join()
    assert time.perf_counter() - started < 10
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


# ---- special tokens


def test_special_tokens_as_in_tiktoken() -> None:
    tokenizer = train([TEXT], 700, specials=[END, "<|pad|>"])
    encoding = tiktoken_of(tokenizer, "gpt2")
    text = f"one{END} two <|pad|>{END}three <|endoftext"
    for allowed in (set(), {END}, {END, "<|pad|>"}, "all", {"unknown"}):
        for disallowed in ((), {END}, {"<|pad|>"}, {"two"}, "all"):
            try:
                expected: Any = encoding.encode(text, allowed_special=allowed, disallowed_special=disallowed)  # type: ignore[arg-type]
            except ValueError:
                with pytest.raises(ValueError, match="the text contains the special token"):
                    tokenizer.encode(text, allowed_special=allowed, disallowed_special=disallowed)  # type: ignore[arg-type]
                continue
            assert tokenizer.encode(text, allowed_special=allowed, disallowed_special=disallowed) == expected  # type: ignore[arg-type]
    assert tokenizer.encode_ordinary(text) == encoding.encode_ordinary(text)
    assert tokenizer.encode_to_numpy(text).tolist() == encoding.encode_ordinary(text)


def test_a_disallowed_token_is_named() -> None:
    tokenizer = train([TEXT], 700)
    with pytest.raises(ValueError, match=r'"<\|endoftext\|>" at byte 3: pass allowed_special'):
        tokenizer.encode(f"one{END}")
    with pytest.raises(ValueError, match="at byte 3"):
        tokenizer.encode_batch(["fine", f"one{END}"])
    with pytest.raises(ValueError, match="'some' is no set of special tokens"):
        tokenizer.encode("x", allowed_special="some")  # type: ignore[arg-type]


def test_added_tokens_that_are_not_special_are_always_found(tmp_path: Path) -> None:
    """As in tokenizers, and in files whatever the blocks."""
    hf = hf_of(train([TEXT], 700), tmp_path)
    hf.add_tokens([tokenizers.AddedToken("<think>", normalized=False), tokenizers.AddedToken("<thinking> x")])
    hf.save(str(tmp_path / "added.json"))
    tokenizer = Tokenizer.from_file(tmp_path / "added.json")
    assert dict(tokenizer.special_tokens) == {END: 699}
    assert len(tokenizer) == 702
    for text in ["a<think>b", "<thinking> x<thinking> y", "<think", "<think><think> s", ""]:
        assert tokenizer.encode(text) == hf.encode(text).ids
        assert tokenizer.decode(hf.encode(text).ids) == text
    assert tokenizer.token_bytes(700) == b"<think>"
    assert Tokenizer.from_file(tokenizer.save(tmp_path / "again")) == tokenizer
    long = "<thinking> x" * 400_000
    (tmp_path / "long.txt").write_text(long)
    assert tokenizer.encode_file(tmp_path / "long.txt", tmp_path / "long.npy", threads=1) == 400_000
    assert (np.load(tmp_path / "long.npy") == 701).all()
    assert (tokenizer.encode_batch_to_numpy([long], threads=2)[0] == 701).all()


def test_surrogates_as_in_tiktoken() -> None:
    tokenizer = train([TEXT], 700)
    encoding = tiktoken_of(tokenizer, "gpt2")
    for text in ["a\ud800b", "\ud83d\ude00", "\udc00\ud800 x"]:
        assert tokenizer.encode(text) == encoding.encode(text)
        assert tokenizer.encode_batch(["fine", text])[1] == encoding.encode(text)
    assert tokenizer.decode(tokenizer.encode("a\ud800")) == "a\ufffd"


# ---- sizes and settings


def test_256_means_bytes(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(iter(["any"]), vocab_size=256)
    assert tokenizer == Tokenizer.bytes_only()
    assert (len(tokenizer), tokenizer.vocab_size, dict(tokenizer.special_tokens), tokenizer.eos_token_id) == (
        256,
        256,
        {},
        None,
    )
    every_byte = bytes(range(256))
    assert tokenizer.encode(every_byte) == list(every_byte)
    text = "any \x00\x7f é"
    assert hf_of(tokenizer, tmp_path).encode(text).ids == list(text.encode())
    assert Tokenizer.from_file(tmp_path) == tokenizer


def test_the_order_of_ids() -> None:
    tokenizer = train([TEXT], 300)
    assert [tokenizer.token_bytes(i)[0] for i in range(256)] == bpe.byte_level_order()
    assert tokenizer.eos_token_id == 299
    assert tokenizer.token_bytes(299) == END.encode()
    assert repr(tokenizer) == "Tokenizer(vocab_size=300, pattern='gpt2', special_tokens={'<|endoftext|>': 299})"


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"vocab_size": 255}, "vocab_size 255 is too small: 256 bytes and 1 special tokens need at least 257"),
        ({"vocab_size": 257, "special_tokens": ["<a>", "<b>"]}, "need at least 258"),
        ({"vocab_size": 300, "pattern": "gtp2"}, 'unknown pattern "gtp2": did you mean "gpt2"'),
        ({"vocab_size": 300, "special_tokens": ["<a>", "<a>"]}, 'special token "<a>" is given twice'),
        ({"vocab_size": 300, "special_tokens": [""]}, "a special token is empty"),
        ({"vocab_size": 300, "min_frequency": -1}, "min_frequency is -1"),
        ({"vocab_size": 300, "threads": 0}, "threads is 0"),
        ({"vocab_size": 100_000}, r"only \d+ merges are possible, so the largest vocab_size is \d+"),
        ({"vocab_size": 1000, "min_frequency": 10_000}, "with min_frequency 10000"),
    ],
)
def test_settings_that_cannot_work_are_explained(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer.train(iter([TEXT]), **settings_)


def test_sources_that_cannot_work_are_explained(tmp_path: Path) -> None:
    for nothing in ([], [""], [b"", b""]):
        with pytest.raises(ValueError, match="there is no text to learn from"):
            Tokenizer.train(iter(nothing), vocab_size=300)
    with pytest.raises(ValueError, match="no such file or folder"):
        Tokenizer.train([str(tmp_path / "missing.txt")], vocab_size=300)
    with pytest.raises(TypeError, match="document 2 is a int"):
        Tokenizer.train(iter(["x", 3]), vocab_size=300)  # type: ignore[list-item]
    with pytest.raises(ValueError, match='special token "e" is also an ordinary token'):
        train([TEXT], 300, specials=["e"])
    with pytest.raises(TypeError, match="make a Tokenizer with"):
        Tokenizer()


# ---- decoding


def test_decoding() -> None:
    tokenizer = train([TEXT], 700)
    ids = tokenizer.encode("héllo")
    assert tokenizer.decode(ids) == "héllo"
    for dtype in (np.uint16, np.int32, np.uint32, np.int64):
        assert tokenizer.decode_bytes(np.array(ids, dtype)) == "héllo".encode()
    assert tokenizer.decode_bytes(np.array(ids)[::-1]) == b"".join(tokenizer.token_bytes(i) for i in reversed(ids))
    cut = tokenizer.encode("é".encode()[:1])
    assert tokenizer.decode(cut) == "\ufffd"
    with pytest.raises(UnicodeDecodeError):
        tokenizer.decode(cut, errors="strict")
    assert tokenizer.decode([np.int64(ids[0]), *ids[1:]]) == tokenizer.decode(iter(ids)) == "héllo"


def test_what_is_no_id_is_named() -> None:
    tokenizer = train([TEXT], 700)
    for bad in (700, -1, 2**40, 2**63, 2**70, -(2**70)):
        with pytest.raises(DataError, match=f"^token id {bad} at index 1 has no token: ids run from 0 to 699$"):
            tokenizer.decode([0, bad])
        with pytest.raises(DataError, match=f"^token id {bad} at index 0 has no token"):
            tokenizer.token_bytes(bad)
    with pytest.raises(DataError, match=f"^token id {2**63 + 5} at index 1 has no token"):
        tokenizer.decode(np.array([0, 2**63 + 5], np.uint64))
    for odd in ("a", 1.5, None, [1]):
        with pytest.raises(TypeError, match=rf"^token id {re.escape(repr(odd))} at index 1 is no whole number$"):
            tokenizer.decode([0, odd])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"^token ids are 5: give a list of whole numbers$"):
        tokenizer.decode(5)  # type: ignore[arg-type]
    for array in (np.zeros(2), np.array(["a"])):
        with pytest.raises(TypeError, match=rf"^token ids have dtype {array.dtype}: give whole numbers$"):
            tokenizer.decode(array)
    with pytest.raises(DataError, match=r"^token ids have shape \[1, 2\]: give those of one text"):
        tokenizer.decode(np.zeros((1, 2), np.int32))


def test_ids_between_tokens_have_none(tmp_path: Path) -> None:
    """cl100k has gaps before its special tokens."""
    path = tmp_path / "gaps.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256)))
    tokenizer = Tokenizer.from_tiktoken(path, pattern="cl100k", special_tokens={END: 300, "<|x|>": 260})
    assert len(tokenizer) == 301
    assert dict(tokenizer.special_tokens) == {"<|x|>": 260, END: 300}
    assert tokenizer.token_bytes(260) == b"<|x|>"
    with pytest.raises(ValueError, match="token id 270"):
        tokenizer.decode([270])


# ---- batches and files


def test_batches_equal_single_texts_on_any_number_of_threads() -> None:
    tokenizer = train([TEXT], 900, "cl100k")
    rng = random.Random(10)
    texts: list[str | bytes] = [tricky_text(rng) for _ in range(500)]
    texts += [make_text(11, 60_000), "", b"\xff" * 300_000 + b"x y", "", " " * 600_000, TEXT * 30, ""]
    expected = [tokenizer.encode_ordinary(text) for text in texts]
    for threads in (1, 2, 3, 8, None):
        ids, offsets = tokenizer.encode_batch_to_numpy(texts, threads=threads)
        assert (ids.dtype, offsets.dtype) == (np.uint32, np.int64)
        assert offsets[0] == 0
        for i, want in enumerate(expected):
            assert ids[offsets[i] : offsets[i + 1]].tolist() == want
    assert tokenizer.encode_batch(texts, disallowed_special=(), threads=2) == expected
    assert tokenizer.encode_batch_to_numpy([])[1].tolist() == [0]


@pytest.mark.parametrize("vocab_size", [256, 900])
def test_files_are_encoded_as_a_whole(vocab_size: int, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(iter([TEXT]), vocab_size=vocab_size, pattern="llama3")
    long = make_text(12, 50_000).encode()
    for number, data in enumerate(
        [b"", b"x", TEXT.encode(), long * 30, b" \n" * 4_500_000 + b"x", b"\xe4\xb8\xad\xff" * 2_500_000]
    ):
        source, output = tmp_path / f"{number}.txt", tmp_path / f"{number}.npy"
        source.write_bytes(data)
        num_tokens = tokenizer.encode_file(source, output, threads=1 + number % 2)
        ids = np.load(output, allow_pickle=False)
        assert (ids.dtype, ids.shape) == (np.uint16, (num_tokens,))
        np.testing.assert_array_equal(ids, tokenizer.encode_to_numpy(data))
        assert tokenizer.decode_bytes(ids) == data
    assert not list(tmp_path.glob("*.partial"))


def test_large_vocabularies_need_32_bits(tmp_path: Path) -> None:
    path = tmp_path / "large.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256)))
    (tmp_path / "x.txt").write_text("abc")
    for last, dtype in ((65_535, np.uint16), (65_536, np.uint32)):
        tokenizer = Tokenizer.from_tiktoken(path, pattern="gpt2", special_tokens={END: last})
        tokenizer.encode_file(tmp_path / "x.txt", tmp_path / "x.npy")
        assert np.load(tmp_path / "x.npy").dtype == dtype


def test_pickle_equality_and_hash(tmp_path: Path) -> None:
    tokenizer = train([TEXT], 700)
    same = pickle.loads(pickle.dumps(tokenizer))
    assert (same, same.hash, hash(same)) == (tokenizer, tokenizer.hash, hash(tokenizer))
    assert Tokenizer.from_file(tokenizer.save(tmp_path / "a" / "b")).hash == tokenizer.hash
    assert Tokenizer.from_file(tokenizer.save(tmp_path / "named.json")) == tokenizer
    others = [
        train([TEXT], 701),
        train([TEXT], 700, specials=["<|x|>"]),
        train([TEXT], 700, specials=()),
        train([TEXT], 700, "llama3"),
    ]
    assert len({tokenizer, same, *others}) == 5
    assert tokenizer != "tokenizer"


def test_a_file_of_tokenizers_own_trainer_opens(tmp_path: Path) -> None:
    """Special tokens first, merges as pairs or, in old files, as lines."""
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=[END, "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    theirs.train_from_iterator([TEXT], trainer)
    theirs.save(str(tmp_path / "pairs.json"))
    document = json.loads((tmp_path / "pairs.json").read_text("utf-8"))
    document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]
    (tmp_path / "lines.json").write_text(json.dumps(document), "utf-8")
    tokenizer = Tokenizer.from_file(tmp_path / "pairs.json")
    assert Tokenizer.from_file(tmp_path / "lines.json") == tokenizer
    assert dict(tokenizer.special_tokens) == {END: 0, "<pad>": 1}
    assert tokenizer.encode(TEXT) == theirs.encode(TEXT).ids


def test_ignore_merges_takes_whole_pieces_first(tmp_path: Path) -> None:
    document = json.loads(train([TEXT], 700).save(tmp_path).read_text("utf-8"))
    document["model"]["vocab"]["xyzzy"] = 700
    for ignore_merges in (False, True):
        document["model"]["ignore_merges"] = ignore_merges
        path = tmp_path / f"{ignore_merges}.json"
        path.write_text(json.dumps(document), "utf-8")
        hf = tokenizers.Tokenizer.from_file(str(path))
        tokenizer = Tokenizer.from_file(path)
        assert (tokenizer.encode("xyzzy") == [700]) is ignore_merges
        for text in ("xyzzy", " xyzzy", "xyzzy xyzzyx"):
            assert tokenizer.encode(text) == hf.encode(text).ids
        assert Tokenizer.from_file(tokenizer.save(tmp_path / "again")) == tokenizer


def test_the_post_processor_of_a_file_is_kept(tmp_path: Path) -> None:
    document = json.loads(train([TEXT], 700).save(tmp_path).read_text("utf-8"))
    document["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": True,
    }
    (tmp_path / "with.json").write_text(json.dumps(document), "utf-8")
    again = json.loads(Tokenizer.from_file(tmp_path / "with.json").save(tmp_path / "again").read_text("utf-8"))
    assert again["post_processor"] == document["post_processor"]


def _without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda document: document.pop(key)


def _with(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        *outer, last = path.split(".")
        for key in outer:
            document = document[key]
        document[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("model"), "not a tokenizer.json, or damaged: missing field `model`"),
        (_without("pre_tokenizer"), "it has no pre_tokenizer"),
        (_with("model.type", "Unigram"), "its model is Unigram: only byte-level BPE"),
        (_with("model.byte_fallback", True), "sets byte_fallback"),
        (_with("model.dropout", 0.1), "sets dropout"),
        (_with("model.end_of_word_suffix", "</w>"), "sets end_of_word_suffix"),
        (_with("normalizer", {"type": "NFKC"}), "normalizer NFKC"),
        (_with("decoder", {"type": "WordPiece"}), "its decoder is WordPiece"),
        (_with("pre_tokenizer", {"type": "Whitespace"}), "ends in Whitespace"),
        (_with("pre_tokenizer.add_prefix_space", True), "add_prefix_space"),
        (_with("model.vocab.!", 5000000), "the vocabulary is damaged"),
        (_with("model.vocab.!", 5), "two tokens have id 5|have the same"),
        (_with("model.vocab.é☃", 700), "not in the byte-level alphabet"),
        (_with("model.merges", [["a", "nowhere"]]), 'merge 0 uses "nowhere"'),
        (_with("model.merges", [["☃"]]), "not a tokenizer.json, or damaged"),
        (_with("model.merges", ["a b c"]), "merge 0 is not two tokens"),
        (_with("model.merges", [["z", "z"]]), 'merge 0 makes "zz", which is not in the vocabulary'),
        (_with("added_tokens", [{"id": 3, "content": END, "special": True}]), "the vocabulary says 699"),
        (_with("added_tokens", [{"id": 699, "content": END, "lstrip": True}]), "sets lstrip"),
    ],
)
def test_files_that_cannot_be_used_are_explained(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    document = json.loads(train([TEXT], 700).save(tmp_path).read_text("utf-8"))
    change(document)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.from_file(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pattern_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    document = json.loads(train([TEXT], 700, "llama3").save(tmp_path).read_text("utf-8"))
    document["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\W+"
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    with pytest.raises(ValueError, match=r"its pattern is not one that ingot knows: \\w\+\|\\W\+"):
        Tokenizer.from_file(tmp_path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    contents = train([TEXT], 300).save(tmp_path).read_bytes()
    for length in [*range(0, 200, 7), *range(200, len(contents) - 2, 997)]:
        (tmp_path / "cut.json").write_bytes(contents[:length])
        with pytest.raises(ValueError, match=r"cut\.json"):
            Tokenizer.from_file(tmp_path / "cut.json")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "byte 0x00 has no token|vocabulary is empty"),
        (b"IQ== 0\nno base64 !\n", "line 2 is not a base64 token and its rank"),
        (b"IQ== 0\nIg== 0\n", "line 2: rank 0 is given twice"),
        (b"IQ== 0\nIQ== 1\n", "tokens 0 and 1 have the same bytes"),
        (b"IQ== 0\n", "byte 0x00 has no token"),
        (b"IQ== 4000000000\n", "token id 4000000000 is too large"),
    ],
)
def test_damaged_rank_files_are_explained(contents: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.tiktoken"
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.from_tiktoken(path, pattern="gpt2")
    assert str(path) in str(caught.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer.from_file(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Tokenizer.from_tiktoken(tmp_path / "nowhere", pattern="gpt2")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train([TEXT], 300).encode_file(tmp_path / "nowhere", tmp_path / "out.npy")
    assert list(tmp_path.iterdir()) == []


def test_special_tokens_that_clash_are_refused(tmp_path: Path) -> None:
    train([TEXT], 300, specials=()).save_tiktoken(tmp_path / "x")
    with pytest.raises(ValueError, match="has id 5, which another token has"):
        Tokenizer.from_tiktoken(tmp_path / "x", pattern="gpt2", special_tokens={END: 5})


# ---- time


HOSTILE: dict[str, Callable[[random.Random, int], str]] = {
    "one letter": lambda rng, n: "a" * n,
    "spaces": lambda rng, n: " " * n,
    "newlines": lambda rng, n: "\n" * n,
    "spaces and a letter": lambda rng, n: " " * n + "x",
    "blank lines": lambda rng, n: "\n   " * (n // 4) + "x",
    "random letters": lambda rng, n: "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=n)),
    "digits": lambda rng, n: "".join(rng.choices("0123456789", k=n)),
    "carets": lambda rng, n: "^" * n,
    "apostrophes": lambda rng, n: "'" * n,
    "Chinese": lambda rng, n: "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(n // 3)),
    "start of a special token": lambda rng, n: "<|endoftext|" * (n // 12),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("pattern", ["gpt2", "cl100k"])
def test_a_megabyte_of_anything_takes_moments(pattern: str, kind: str) -> None:
    """Quadratic time would be minutes: tiktoken's own regular expression overflows its stack on one of these."""
    tokenizer = train([TEXT, "a" * 100, "^" * 100, " " * 100], 900, pattern)
    text = HOSTILE[kind](random.Random(13), 1 << 20)
    started = time.perf_counter()
    ids = tokenizer.encode(text)
    assert time.perf_counter() - started < 8
    assert tokenizer.decode(ids) == text


# ---- files that bring text into Unicode's form C first, as Qwen's does

COMPOSING = [
    *"aeoAK ;`\n\u212a\u037e\u1100\u1161\u11a8\uac00\u0915\u093c\u0301\u0323\u0345\u05b0\u0338\u3099\u304b",
    # After Unicode 9: marks, and a pair that joins.
    *"\u0898\u07fd\u1abf\U0001e2ec\U00011935\U00011930\U00011938",
    *["é", "e\u0301", "<think>", "<|im_end|>", END, "word"],
]


@pytest.fixture(scope="module")
def normalizing(tmp_path_factory) -> Path:
    """A tokenizer.json in the shape of Qwen's: form C, special tokens, and added tokens that are not special."""
    folder = tmp_path_factory.mktemp("nfc")
    specials = [END, "<|im_end|>"]
    text = [TEXT, "café déjà é à ≯ 한국어 " * 20]
    Tokenizer.train(iter(text), vocab_size=700, pattern="qwen2", special_tokens=specials).save(folder)
    document = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    document["normalizer"] = {"type": "NFC"}
    document["added_tokens"].append({**document["added_tokens"][0], "id": 700, "content": "<think>", "special": False})
    (folder / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    return folder


@settings(max_examples=300, deadline=None)
@given(text=st.lists(st.sampled_from(COMPOSING) | st.characters(exclude_categories=["Cs"])).map("".join))
def test_form_c_is_that_of_tokenizers(text: str, normalizing: Path) -> None:
    peer = tokenizers.Tokenizer.from_file(str(normalizing / "tokenizer.json"))
    ours = Tokenizer.from_file(normalizing)
    assert nfc(text) == tokenizers.normalizers.NFC().normalize_str(text)
    # The peer finds special tokens in any text; what reads as one only after it was normalized is none for it, and is one for us.
    if "\u212a" not in text:
        expected = peer.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, allowed_special="all") == expected
        assert ours.encode_batch_to_numpy([text], allowed_special="all")[0].tolist() == expected
    assert ours.decode(ours.encode_ordinary(text)) == "".join(
        part if part == "<think>" else nfc(part) for part in re.split("(<think>)", text)
    )


def test_form_c_of_every_character_is_that_of_tokenizers() -> None:
    peer = tokenizers.normalizers.NFC()
    for around in ("{}", "a{}\u0301", "\u0345{}", "\U00011935{}\u0323"):
        whole = "\n".join(around.format(c) for c in SCALARS if c != "\n")
        assert nfc(whole) == peer.normalize_str(whole)


def test_a_normalizing_tokenizer_everywhere(normalizing: Path, tmp_path: Path) -> None:
    ours = Tokenizer.from_file(normalizing)
    text = "e\u0301 cafe\u0301\nde\u0301ja\u0300 <think>\u0338 \u1112\u1161\u11ab"
    ids = ours.encode(text)
    assert ours.decode(ids) == "é café\ndéjà <think>\u0338 한"
    assert ids == ours.encode(ours.decode(ids))
    assert ours.encode_to_numpy(text).tolist() == ours.encode_batch([text])[0] == ids
    assert ours.encode_ordinary(text.encode()) == ids
    assert ours.encode_ordinary(b"\xffe\xcc\x81") == [*ours.encode_ordinary(b"\xff"), *ours.encode_ordinary("é")]
    assert b"".join(piece for piece, _ in ours.pieces(text)) == ours.decode_bytes(ids)
    (tmp_path / "a.txt").write_bytes(text.encode() * 3)
    assert ours.encode_file(tmp_path / "a.txt", tmp_path / "a.npy") == 3 * len(ids)
    assert np.load(tmp_path / "a.npy").tolist() == ours.encode_ordinary(text * 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "a.txt"]

    ours.save(tmp_path / "again")
    document = json.loads((tmp_path / "again" / "tokenizer.json").read_bytes())
    assert document["normalizer"] == {"type": "NFC"}
    plain = json.loads((normalizing / "tokenizer.json").read_bytes()) | {"normalizer": None}
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    assert Tokenizer.from_file(tmp_path / "plain.json") != ours
    more = ours.with_special_tokens(["<|more|>"])
    assert more != ours
    for same in (Tokenizer.from_file(tmp_path / "again"), pickle.loads(pickle.dumps(ours))):
        assert same == ours
        assert same.encode(text) == ids
    assert more.encode(text) == ids
    with pytest.raises(ValueError, match="form C"):
        ours.save_tiktoken(tmp_path / "x.tiktoken")


def test_what_is_no_text_and_no_file_is_named(tmp_path: Path) -> None:
    tokenizer = Tokenizer.bytes_only()
    with pytest.raises(TypeError, match="text is int: give str or bytes"):
        tokenizer.encode(5)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json in this folder"):
        Tokenizer.from_file(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        Tokenizer.from_file(tmp_path / "nowhere")
