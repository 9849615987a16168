"""Tokenized rows that are kept: the same examples with them and without, what is refused, what is made again, and what survives a kill."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import ingot.data.examples
import ingot.data.row_cache
from ingot.cli import main
from ingot.configs import DistillConfig, DPOConfig, ModelConfig, PPOConfig, RewardConfig, SFTConfig
from ingot.data.cache import CacheMismatch, cached_files
from ingot.data.chat import Encoded
from ingot.data.examples import Examples, encode_row, load_examples
from ingot.data.row_cache import RowCache, read_encoded, source_hash, write_encoded
from ingot.data.rows import PromptOnly, parse_row, read_rows
from ingot.errors import DataError, RunError
from ingot.inference.prompts import PromptEncoder
from ingot.models import Model
from ingot.training.preferences import prepare_preferences
from ingot.training.progress import SilentDisplay
from ingot.training.prompts import load_prompts
from ingot.training.rankings import prepare_rankings
from ingot.training.setup import Given, prepare
from ingot.training.sft import resume, sft
from ingot.training.teaching import prepare_lessons
from killable_rows import ENCODER, TEMPLATE, TOKENIZER, die_at, hammer, kept, shown

HASHES = {"source_hash": "a" * 64, "tokenizer_hash": "b" * 64, "template_hash": "", "settings_hash": ""}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def assert_same(first: Examples, second: Examples) -> None:
    assert first.rows == second.rows
    assert (first.num_rows, first.num_too_long) == (second.num_rows, second.num_too_long)
    assert shown(first.groups) == shown(second.groups)
    for one, other in zip(first.groups, second.groups, strict=True):
        assert [(a.ids.dtype, a.mask.dtype) for a in one] == [(a.ids.dtype, a.mask.dtype) for a in other]


class Spy:
    """An encoder of rows that counts what it is asked."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, row: Any) -> Any:
        self.count += 1
        return encode_row(row, ENCODER)


# ---- the same examples


texts = st.text("ab é\u20ac\U0001f600<|im_end>\n", max_size=12).map(lambda text: text.strip() or "x")
dialogues = st.lists(st.tuples(texts, texts), min_size=1, max_size=2).map(
    lambda pairs: [turn for asked, said in pairs for turn in (user(asked), assistant(said))]
)
different = st.lists(texts, min_size=2, max_size=4, unique=True)
# Neither of the first two begins with the other: without a prompt, nothing would be left of one.
diverging = different.filter(lambda two: two[0][: len(two[1])] != two[1][: len(two[0])])
KINDS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "text": st.builds(lambda text: {"text": text}, texts),
    "messages": st.builds(lambda messages: {"messages": messages}, dialogues),
    "completion": st.builds(lambda prompt, text: {"prompt": prompt, "completion": text}, texts, texts),
    "question": st.builds(lambda text, answer: {"question": text, "answer": answer}, texts, texts),
    "pair": st.builds(
        lambda text, two: {"prompt": [user(text)], "chosen": [assistant(two[0])], "rejected": [assistant(two[1])]},
        texts,
        different,
    ),
    "implicit pair": st.builds(
        lambda text, two: {"chosen": f"{text}\n{two[0]}", "rejected": f"{text}\n{two[1]}"}, texts, diverging
    ),
    "verdict": st.builds(
        lambda prompt, text, label: {"prompt": prompt, "completion": text, "label": label}, texts, texts, st.booleans()
    ),
    "steps": st.builds(
        lambda prompt, steps: {"prompt": prompt, "completions": steps, "labels": [True] * len(steps)},
        texts,
        st.lists(texts, min_size=1, max_size=3),
    ),
    "candidates": st.builds(lambda text, answers: {"prompt": text, "responses": answers}, texts, different),
    "ranking": st.builds(
        lambda text, answers: {"prompt": [user(text)], "responses": answers, "ranks": list(range(1, len(answers) + 1))},
        texts,
        different,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_examples_are_the_same_with_the_cache_and_without(kind):
    @settings(max_examples=8)
    @given(st.lists(KINDS[kind], min_size=1, max_size=6), st.integers(8, 60))
    def check(entries, max_length):
        with tempfile.TemporaryDirectory() as folder:

            def load(cache):
                try:
                    return load_examples(entries, ENCODER, max_length=max_length, cache=cache)
                except DataError as error:
                    return str(error)

            lines: list[str] = []
            plain, built, used = load(None), load(RowCache(folder, lines.append)), load(RowCache(folder, lines.append))
            # Rows that are compared with what was kept, and differ, are made again, and that is said.
            assert lines == []
            groups = [encode_row(row, ENCODER) for row in read_rows(entries)]
            fitting = [group for group in groups if max(map(len, group)) <= max_length]
            if isinstance(plain, str):
                assert fitting == []
                assert plain == built == used
            else:
                assert shown(plain.groups) == shown(fitting)
                assert plain.num_too_long == len(groups) - len(fitting)
                assert_same(plain, built)
                assert_same(plain, used)
                assert len(cached_files(folder)) == 1

    check()


@settings(max_examples=20)
@given(st.lists(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=5), max_size=3), max_size=4), st.integers(0, 9))
@example([[[65535]]], 0)
@example([[[65535]], [[65536]]], 0)
def test_whatever_is_written_is_read(groups, seed):
    random = np.random.default_rng(seed)
    made = [
        tuple(Encoded(np.array(ids, np.int32), random.random(len(ids)) < 0.5, tuple(range(len(ids)))) for ids in group)
        for group in groups
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.rows.safetensors"
        write_encoded(path, HASHES, made)
        assert shown(read_encoded(path, HASHES)) == shown(made)
        whole = path.read_bytes()
        write_encoded(path, HASHES, made)
        assert path.read_bytes() == whole


def test_small_ids_take_two_bytes_and_any_tool_can_read_them(tmp_path):
    from safetensors.numpy import load_file

    groups = kept(tmp_path)
    [path] = cached_files(tmp_path)
    arrays = load_file(path)
    assert arrays["ids"].dtype == np.uint16
    assert arrays["num_sequences"].tolist() == [2] * 20
    assert arrays["seq_lens"].tolist() == [len(each) for group in groups for each in group]
    assert len(arrays["mask"]) == len(arrays["ids"]) == arrays["seq_lens"].sum()


def test_rows_that_are_kept_are_not_encoded_again(tmp_path):
    first, again = Spy(), Spy()
    assert shown(kept(tmp_path, encode=first)) == shown(kept(tmp_path, encode=again))
    assert first.count == 20
    assert again.count <= 8


def test_what_decides_no_id_may_change_and_what_does_makes_a_new_file(tmp_path):
    row = {"prompt": "p", "chosen": "yes", "rejected": "no"}
    kept(tmp_path, entries=[row])
    kept(tmp_path, entries=[{**row, "margin": 2.0, "annotator": "me"}])
    assert len(cached_files(tmp_path)) == 1
    for changed in ([{**row, "chosen": "yes!"}], [row, row], [{**row, "chosen": "no", "rejected": "yes"}]):
        before = len(cached_files(tmp_path))
        spy = Spy()
        kept(tmp_path, entries=changed, encode=spy)
        assert spy.count == len(changed)
        assert len(cached_files(tmp_path)) == before + 1
    assert source_hash([parse_row({"prompt": "p", "completion": "c"})]) != source_hash(
        [parse_row({"prompt": "p", "completion": "c", "label": True})]
    )


def test_prompts_are_the_same_with_the_cache_and_without(place):
    entries = [{"prompt": [user(f"{n}?")], "level": n} for n in range(30)] + [{"prompt": [user("long" * 30)]}]
    path = write_rows(place / "p.jsonl", entries)
    encoder = PromptEncoder(place / "model", TOKENIZER)

    def load(cache):
        return load_prompts(
            [path], None, encoder, longest=60, held_out=0.2, seed=0, display=SilentDisplay(), cache=cache
        )

    plain, built, used = load(None), load(RowCache(place / "c")), load(RowCache(place / "c"))
    assert len(cached_files(place / "c")) == 1
    for other in (built, used):
        assert other.facts == plain.facts
        assert plain.facts["num_too_long"] == 1
        for one, same in zip((*plain.train, *plain.held_out), (*other.train, *other.held_out), strict=True):
            assert (one.content, one.columns, one.ids.tolist()) == (same.content, same.columns, same.ids.tolist())
            assert same.ids.dtype == np.int32


def test_a_prompt_that_cannot_be_encoded_is_named(place):
    path = write_rows(place / "p.jsonl", [{"prompt": [user("a")]}, {"prompt": [user("a"), user("b")]}])
    (place / "model" / "chat_template.jinja").write_text(
        "{{ raise_exception('odd') if messages | length == 2 and messages[1]['role'] == 'user' }}" + TEMPLATE.source
    )
    encoder = PromptEncoder(place / "model", TOKENIZER)
    with pytest.raises(DataError, match=r'p\.jsonl, row 2: field "prompt" cannot be encoded: .*odd'):
        load_prompts(
            [path], None, encoder, longest=60, held_out=0, seed=0, display=SilentDisplay(), cache=RowCache(place / "c")
        )
    assert not (place / "c").exists()


# ---- what is refused, and what is made again


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"entries": [{"text": "other"}]}, "another source \\(source_hash"),
        ({"tokenizer_hash": "c" * 64}, "another tokenizer \\(tokenizer_hash"),
        ({"template_hash": "d" * 64}, "another chat template \\(template_hash"),
        ({"settings": {"step_separator": "|"}}, "another choice of settings \\(settings_hash"),
        ({"template_hash": ""}, "another chat template \\(template_hash none, expected"),
        ({"tokenizer_hash": "c" * 64, "template_hash": "d" * 64}, "another tokenizer .* and another chat template"),
    ],
)
def test_a_file_that_was_made_from_something_else_is_refused_by_name(tmp_path, changes, named):
    kept(tmp_path / "a", **changes)
    kept(tmp_path / "b")
    [mine], [other] = cached_files(tmp_path / "b"), cached_files(tmp_path / "a")
    mine.write_bytes(other.read_bytes())
    with pytest.raises(CacheMismatch, match=f"{mine.name}: made with {named}.*; delete it and it will be made again"):
        kept(tmp_path / "b")
    assert mine.read_bytes() == other.read_bytes()
    mine.unlink()
    kept(tmp_path / "b")


def test_a_torn_or_altered_file_is_said_and_made_again(tmp_path):
    expected = shown(kept(tmp_path))
    [path] = cached_files(tmp_path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    size = len(whole) - header
    damaged = [whole[:cut] for cut in (0, 5, 100, header, len(whole) - 1)]
    for place in (0, size // 3, size // 2, size - 1):
        altered = bytearray(whole)
        altered[header + place] ^= 1
        damaged.append(bytes(altered))
    damaged.append(whole + b"x")
    damaged.append(b"something else altogether, of another program")
    damaged.append(whole.replace(b"payload_hash", b"payload_rash"))
    damaged.append(whole.replace(b'\\"num_rows\\"', b'\\"num_rows!"'))
    for content in damaged:
        assert content != whole
        path.write_bytes(content)
        with pytest.raises(DataError, match="delete it and it will be made again"):
            read_encoded(path, dict.fromkeys(HASHES, "") | hashes_of(path, whole))
        lines: list[str] = []
        spy = Spy()
        assert shown(kept(tmp_path, lines, spy)) == expected
        assert spy.count == 20
        assert len(lines) == 1
        assert str(path) in lines[0]
        assert lines[0].endswith("; tokenized again")
        assert path.read_bytes() == whole


def hashes_of(path: Path, content: bytes) -> dict[str, str]:
    """Those of a file's header."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["ingot"]
    return {name: value for name, value in json.loads(header).items() if name in HASHES}


def test_a_file_of_another_version_or_of_other_code_is_made_again(tmp_path, monkeypatch):
    kept(tmp_path)
    lines: list[str] = []
    monkeypatch.setattr("ingot.__version__", "9.9")
    kept(tmp_path, lines)
    assert "made by ingot" in lines.pop()
    kept(tmp_path, lines)
    assert lines == []
    monkeypatch.setattr(ingot.data.row_cache, "FORMAT_VERSION", 2)
    kept(tmp_path, lines)
    assert "(format 1)" in lines.pop()

    def otherwise(row):
        return [dataclasses.replace(each, mask=np.ones_like(each.mask)) for each in encode_row(row, ENCODER)]

    groups = kept(tmp_path, lines, otherwise)
    assert "tokenized rows in another way" in lines.pop()
    assert all(each.mask.all() for group in groups for each in group)
    kept(tmp_path, lines, otherwise)
    assert lines == []


@pytest.mark.parametrize("problem", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_run_goes_on_where_nothing_can_be_kept(tmp_path, monkeypatch, problem):
    def refuse(path, content):
        raise OSError(problem, os.strerror(problem))

    monkeypatch.setattr(ingot.data.row_cache, "write_file", refuse)
    lines: list[str] = []
    cache = RowCache(tmp_path, lines.append)
    for text in ("one", "two"):
        found = load_examples([{"text": text}], ENCODER, max_length=60, cache=cache)
        assert_same(found, load_examples([{"text": text}], ENCODER, max_length=60))
    [line] = lines
    assert os.strerror(problem) in line
    assert "--cache-dir" in line
    assert cached_files(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_no_reason_to_stop(tmp_path):
    (tmp_path / "file").write_text("")
    lines: list[str] = []
    assert len(kept(tmp_path / "file" / "cache", lines)) == 20
    assert [line for line in lines if "cannot be written" in line] == lines[-1:]


# ---- several at once, and kills


def test_several_runs_on_the_same_rows_do_no_harm(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killable_rows"])
    processes = [context.Process(target=hammer, args=(tmp_path, number, 25)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    for path in cached_files(tmp_path / "shared"):
        assert not path.name.startswith(".tmp-")


def test_killed_while_it_writes_it_leaves_all_or_nothing(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killable_rows"])

    def run(folder: Path, kill_at: int | None) -> int | None:
        process = context.Process(target=die_at, args=(folder, kill_at, tmp_path / "names"))
        process.start()
        process.join()
        return process.exitcode

    assert run(tmp_path / "whole", None) == 0
    [reference] = cached_files(tmp_path / "whole")
    names = (tmp_path / "names").read_text().splitlines()
    assert len(names) >= 5
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        assert run(folder, number) == -signal.SIGKILL, name
        path = folder / reference.name
        assert not path.exists() or path.read_bytes() == reference.read_bytes(), name
        lines: list[str] = []
        assert len(kept(folder, lines)) == 20
        assert lines == [], name
        assert path.read_bytes() == reference.read_bytes()
        assert main(["cache", "--folder", str(folder), "--clear"]) == 0
        assert list(folder.iterdir()) == [], name


# ---- in runs


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model that knows the built-in template."""
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = ModelConfig.llama(vocab_size=TOKENIZER.vocab_size, max_position_embeddings=96, **shape)
    Model(config, seed=3).save(tmp_path / "model")
    TOKENIZER.save(tmp_path / "model")
    return tmp_path


def write_rows(path: Path, entries: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


DEMONSTRATIONS = [{"messages": [user(f"{n}?"), assistant(str(n % 3))]} for n in range(40)]
LONG = {"messages": [user("x" * 200), assistant("y")]}
SETTINGS = SFTConfig(max_steps=1, eval_steps=2, sample_tokens=0, threads=1, held_out=0.2)


def sft_at(place: Path, **changes: Any) -> SFTConfig:
    paths = {"model": str(place / "model"), "data": (str(place / "a.jsonl"),), "output": str(place / "run")}
    return dataclasses.replace(SETTINGS, **{**paths, **changes})


@pytest.fixture
def encoded(monkeypatch) -> list[Any]:
    """The rows that are encoded."""
    rows: list[Any] = []

    def counted(row, encoder, **settings):
        rows.append(row)
        return encode_row(row, encoder, **settings)

    monkeypatch.setattr(ingot.data.examples, "encode_row", counted)
    return rows


def test_the_second_run_uses_what_the_first_left_and_says_the_same(place, encoded, capsys):
    write_rows(place / "a.jsonl", [*DEMONSTRATIONS, LONG])
    sft(sft_at(place))
    assert len(encoded) == 41
    facts = json.loads((place / "run" / "run.json").read_text())["data"]
    said = [line for line in capsys.readouterr().out.splitlines() if "left out whole" in line]
    [path] = cached_files(place / ".cache")
    encoded.clear()
    sft(sft_at(place, output=str(place / "again")))
    assert len(encoded) <= 8
    assert json.loads((place / "again" / "run.json").read_text())["data"] == facts
    assert [line for line in capsys.readouterr().out.splitlines() if "left out whole" in line] == said
    assert "1 of 41 rows" in said[0]
    # What a run has room for is decided at each start, not in the file.
    encoded.clear()
    sft(sft_at(place, output=str(place / "short"), max_length=48), quiet=True)
    assert len(encoded) <= 8
    assert cached_files(place / ".cache") == [path]


def test_edited_rows_are_simply_read_and_a_resumed_run_refuses_them(place, encoded):
    write_rows(place / "a.jsonl", DEMONSTRATIONS)
    both = (str(place / "a.jsonl"), write_rows(place / "b.jsonl", [{"text": "b"}] * 3))
    sft(sft_at(place, cache_dir=str(place / "elsewhere"), data=both), quiet=True)
    write_rows(place / "a.jsonl", [*DEMONSTRATIONS[:-1], {"messages": [user("new?"), assistant("yes")]}])
    with pytest.raises(RunError, match=r"^[^,]*/a\.jsonl: changed since this run began; bring the rows back"):
        resume(place / "run", max_steps=2, quiet=True)
    encoded.clear()
    sft(sft_at(place, cache_dir=str(place / "elsewhere"), output=str(place / "new")), quiet=True)
    assert len(cached_files(place / "elsewhere")) == 3
    write_rows(place / "a.jsonl", DEMONSTRATIONS)
    encoded.clear()
    assert resume(place / "run", max_steps=2, quiet=True).history
    assert len(encoded) <= 8 + 3
    assert not (place / ".cache").exists()


def test_a_run_refuses_a_file_that_was_put_in_place_of_its_own(place, capsys):
    write_rows(place / "a.jsonl", DEMONSTRATIONS)
    sft(sft_at(place), quiet=True)
    [path] = cached_files(place / ".cache")
    kept(place / "other")
    path.write_bytes(cached_files(place / "other")[0].read_bytes())
    flags = ["--model", str(place / "model"), "--data", str(place / "a.jsonl"), "--output", str(place / "b")]
    assert main(["sft", *flags, "--max-steps", "1"]) != 0
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "another source" in line
    assert main(["cache", "--folder", str(place / ".cache")]) == 0
    assert "1 files of tokenized data" in capsys.readouterr().out
    assert main(["cache", "--folder", str(place / ".cache"), "--clear"]) == 0
    assert main(["sft", *flags, "--max-steps", "1", "--threads", "1", "--json"]) == 0


PAIRS = [{"prompt": [user(f"{n}?")], "chosen": "yes", "rejected": "no"} for n in range(40)]
ASKED = [{"prompt": [user(f"{n}?")]} for n in range(40)]


@pytest.mark.parametrize("phase", ["reward", "dpo", "distill", "ppo"])
def test_every_phase_keeps_its_rows(place, phase, monkeypatch):
    path = write_rows(place / "a.jsonl", PAIRS if phase in ("reward", "dpo") else ASKED)
    shape = ingot.load_model(place / "model").config
    common: dict[str, Any] = {"model": str(place / "model"), "output": str(place / "run"), "threads": 1}

    def facts() -> dict[str, Any]:
        if phase == "reward":
            return prepare_rankings(RewardConfig(data=(path,), **common), None, shape, None, SilentDisplay()).facts
        if phase == "dpo":
            return prepare_preferences(DPOConfig(data=(path,), **common), None, shape, None, SilentDisplay()).facts
        if phase == "distill":
            config = DistillConfig(teacher=common["model"], data=(path,), max_new_tokens=8, **common)
            return prepare_lessons(config, None, shape, None, SilentDisplay()).facts
        ppo = PPOConfig(prompts=(path,), response_length=8, held_out=0.2, **common)
        return prepare(ppo, Given(rewards=[lambda completions, **_: [0.0] * len(completions)]), SilentDisplay()).facts

    first = facts()
    [kept_rows] = cached_files(place / ".cache")
    modified = kept_rows.stat().st_mtime_ns
    assert facts() == first
    assert kept_rows.stat().st_mtime_ns == modified
    kept_rows.unlink()
    monkeypatch.setattr(ingot.data.row_cache.RowCache, "keep", lambda *_: None)
    assert facts() == first


def test_prompts_and_dialogues_with_the_same_words_are_different_rows():
    assert source_hash([PromptOnly(prompt="a")]) != source_hash([parse_row({"text": "a"})])
