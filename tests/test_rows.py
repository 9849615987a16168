"""Rows of alignment data: the kind is found by the columns, and what cannot be used is named by file, row, field and fix."""

from __future__ import annotations

import gzip
import json
import math
import re
import sys
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from ingot.data import rows as rows_module
from ingot.data.rows import (
    KINDS,
    Candidates,
    LanguageModelling,
    Preference,
    PromptCompletion,
    PromptOnly,
    RankedList,
    RowError,
    Stepwise,
    UnpairedPreference,
    parse_row,
    read_rows,
    scan,
)
from ingot.errors import DataError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


EXAMPLES = [
    (LanguageModelling, False, {"text": "once"}),
    (LanguageModelling, True, {"messages": [user("hi"), assistant("ho")]}),
    (PromptOnly, False, {"prompt": "hi"}),
    (PromptOnly, True, {"prompt": [user("hi")]}),
    (PromptCompletion, False, {"prompt": "hi", "completion": "ho"}),
    (PromptCompletion, True, {"prompt": [user("hi")], "completion": [assistant("ho")]}),
    (
        Preference,
        False,
        {"prompt": "hi", "chosen": "ho", "rejected": "no", "margin": 0.5, "weight": 2.0, "group_id": "g"},
    ),
    (Preference, True, {"prompt": [user("hi")], "chosen": [assistant("ho")], "rejected": [assistant("no")]}),
    (Preference, False, {"chosen": "hi ho", "rejected": "hi no"}),
    (UnpairedPreference, False, {"prompt": "hi", "completion": "ho", "label": False}),
    (UnpairedPreference, True, {"prompt": [user("hi")], "completion": [assistant("ho")], "label": True}),
    (Stepwise, False, {"prompt": "2+2+2", "completions": ["2+2=4", "4+2=7"], "labels": [True, False]}),
    (Candidates, False, {"prompt": "hi", "responses": ["a", "b", "c"]}),
    (
        RankedList,
        False,
        {
            "prompt": "hi",
            "responses": ["a", "b", "c"],
            "ranks": [2, 1, 2],
            "group_id": "7",
            "annotator": "me",
            "criterion": "helpful",
        },
    ),
    (RankedList, True, {"prompt": [user("hi")], "responses": [[assistant("a")], [assistant("b")]], "ranks": [1, 1]}),
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("kind", "conversational", "columns"), EXAMPLES)
def test_the_kind_is_found_by_the_columns_and_nothing_is_lost(kind, conversational, columns):
    columns = {**columns, "source": "here", "ä": [None]}
    row = parse_row(columns, number=3)
    assert type(row) is kind
    assert row.conversational is conversational
    assert row.number == 3
    assert row.extra == {"source": "here", "ä": [None]}
    assert row.columns() == columns
    assert parse_row(row.columns()) == parse_row(columns)


def test_the_rows_of_the_documentation_are_what_it_calls_them():
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    kind, found = "", set()
    for name, row in re.findall(r"^\| ([a-z -]*?) *\|[^|]*\| `(\{.*\})` \|$", text, flags=re.MULTILINE):
        kind = name or kind
        assert parse_row(json.loads(row)).kind == kind
        found.add(kind)
    assert found == {kind.kind for kind in KINDS}


def test_every_kind_has_an_example():
    assert {kind for kind, _, _ in EXAMPLES} == set(KINDS)


def test_what_both_answers_begin_with_is_the_prompt():
    first = [user("a"), assistant("b"), user("c")]
    row = parse_row({"chosen": [*first, assistant("x")], "rejected": [*first, assistant("y")]})
    assert (row.prompt, row.chosen, row.rejected) == (first, [assistant("x")], [assistant("y")])


def test_other_spellings_are_understood():
    bare = parse_row([user("hi"), assistant("ho")])
    assert bare == parse_row({"messages": [user("hi"), assistant("ho")]})
    asked = parse_row({"question": "2+2?", "answer": "4", "id": 1})
    assert asked == PromptCompletion(prompt=[user("2+2?")], completion=[assistant("4")], extra={"id": 1})
    text = parse_row({"prompt": [user("hi")], "chosen": "a", "rejected": "b"})
    assert (text.chosen, text.rejected) == ([assistant("a")], [assistant("b")])
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse_row({"prompt": [{"role": "user", "content": parts}]}).prompt == [user("ab")]
    called = {"messages": [user("hi"), {**assistant("ho"), "tool_calls": None, "name": "x"}], "tools": None}
    assert parse_row(called).content == [user("hi"), assistant("ho")]


def test_a_reader_can_ask_for_the_kinds_it_takes():
    row = {"prompt": "hi", "chosen": "a", "rejected": "b"}
    assert parse_row(row, kinds=[PromptOnly]) == PromptOnly(prompt="hi", extra={"chosen": "a", "rejected": "b"})
    with pytest.raises(RowError, match=r"not those of language modelling \(messages or text\) or prompt-completion"):
        parse_row(row, kinds=[LanguageModelling, PromptCompletion])


C = [user("q"), assistant("a")]
BAD = [
    ('{"text": "x"', "", "is not valid JSON (Expecting ',' delimiter at character 13)"),
    (b'{"text": "\xff"}', "", "is not valid JSON (byte 11 is no UTF-8)"),
    ("[" * 100_000, "", "is not valid JSON (nested too deeply)"),
    ("3", "", "is the number 3, not an object"),
    ({}, "", "has no columns of any kind (columns there: none)"),
    ({"body": "x"}, "", "(columns there: body)"),
    ({"instruction": "x", "input": "", "output": "y"}, "", "ingot data import alpaca"),
    ({"conversations": [{"from": "human", "value": "x"}]}, "", "ingot data import sharegpt"),
    ({"query": "x", "sample0": "y", "best": 0}, "", "ingot data import best-of-4"),
    ({"text": None}, "text", "is null"),
    ({"text": " \n"}, "text", "is empty"),
    ({"messages": "hi"}, "messages", "is a string; give a list of messages"),
    ({"messages": []}, "messages", "is an empty list"),
    ({"messages": ["hi"]}, "messages[0]", 'is a string; give a message {"role", "content"}'),
    ({"messages": [{"role": "user"}]}, "messages[0]", 'has no "content"'),
    ({"messages": [{"content": "x"}]}, "messages[0]", 'has no "role"'),
    ({"messages": [{"from": "human", "value": "x"}]}, "messages[0]", "import sharegpt"),
    ({"messages": [user("x"), {"role": "gpt", "content": "y"}]}, "messages[1].role", 'unknown role; write "assistant"'),
    ({"messages": [{"role": "usr", "content": "y"}]}, "messages[0].role", 'unknown role; write "user"'),
    ({"messages": [{"role": 7, "content": "y"}]}, "messages[0].role", "the roles are system, user, assistant, tool"),
    ({"messages": [user(3)]}, "messages[0].content", "is the number 3; give a string"),
    ({"messages": [user([{"type": "image"}])]}, "messages[0].content[0]", "is no text"),
    ({"messages": [user("x"), {**assistant(""), "tool_calls": [1]}]}, "messages[1].tool_calls", "is not understood"),
    ({"messages": [*C, assistant("b")]}, "messages[2]", "is a second assistant turn in a row"),
    ({"messages": [user("x")]}, "messages", "has no assistant message"),
    ({"messages": [*C, user("x"), assistant(" ")]}, "messages[3].content", "is empty"),
    ({"messages": C, "tools": [{}]}, "tools", "is not understood"),
    ({"prompt": 3}, "prompt", "is the number 3; give a string or a list of messages"),
    ({"prompt": ""}, "prompt", "is empty"),
    ({"prompt": C}, "prompt", "ends with an assistant message"),
    ({"completion": "x"}, "prompt", "is missing (columns there: completion)"),
    ({"prompt": "x", "completion": ""}, "completion", "is empty"),
    ({"prompt": "x", "completion": None}, "completion", "is null"),
    ({"prompt": "x", "completion": C[1:]}, "completion", 'but field "prompt" is text'),
    ({"prompt": C[:1], "completion": C}, "completion", "begins with the prompt"),
    ({"prompt": C[:1], "completion": []}, "completion", "is an empty list"),
    ({"prompt": C[:1], "completion": [user("x")]}, "completion[0]", 'begins with a message of role "user"'),
    ({"prompt": C[:1], "completion": [assistant("x"), user("y")]}, "completion", 'ends with a message of role "user"'),
    ({"prompt": C[:1], "completion": [assistant("")]}, "completion[0].content", "is empty"),
    ({"prompt": "x", "chosen": "a"}, "rejected", "is missing"),
    ({"prompt": "x", "chosen": "a", "rejected": "a"}, "rejected", 'equals field "chosen"'),
    ({"chosen": C, "rejected": C}, "rejected", 'equals field "chosen"'),
    ({"chosen": "ab", "rejected": "ab"}, "rejected", 'equals field "chosen"'),
    ({"chosen": "ab", "rejected": "abc"}, "chosen", "is the beginning of the other answer"),
    ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: "}, "rejected", "ingot data import hh"),
    ({"chosen": "ab", "rejected": C}, "rejected", 'is a list, but field "chosen" is a string'),
    ({"chosen": C, "rejected": [user("z"), C[1]]}, "rejected", 'has no message in common with field "chosen"'),
    ({"chosen": C, "rejected": C[:1]}, "rejected", "nothing is left of it"),
    ({"chosen": C, "rejected": [*C, user("z"), C[1]]}, "chosen", "nothing is left of it"),
    ({"prompt": "x", "chosen": "a", "rejected": "b", "margin": "1"}, "margin", "is a string; give a number"),
    ({"prompt": "x", "chosen": "a", "rejected": "b", "margin": math.nan}, "margin", "is nan; give a finite number"),
    ({"prompt": "x", "chosen": "a", "rejected": "b", "weight": 0}, "weight", "is 0; give a positive number"),
    ({"prompt": "x", "completion": "a", "label": 1}, "label", "is the number 1; write true or false"),
    (
        {"prompt": "x", "completions": ["a"], "labels": [True, False]},
        "labels",
        'has 2 entries, but field "completions" has 1',
    ),
    ({"prompt": "x", "completions": ["a", ""], "labels": [True, True]}, "completions[1]", "is empty"),
    ({"prompt": "x", "completions": ["a"], "labels": ["yes"]}, "labels[0]", "is a string; write true or false"),
    ({"prompt": "x", "completions": ["a"]}, "labels", "is missing"),
    ({"prompt": "x", "responses": ["a"]}, "responses", "holds 1 answers; give at least two"),
    ({"prompt": "x", "responses": "ab", "ranks": [1, 2]}, "responses", "is a string; give a list"),
    ({"prompt": "x", "responses": ["a", ""], "ranks": [1, 2]}, "responses[1]", "is empty"),
    (
        {"prompt": "x", "responses": ["a", "b"], "ranks": [1, 2, 3]},
        "ranks",
        'has 3 entries, but field "responses" has 2',
    ),
    ({"prompt": "x", "responses": ["a", "b"], "ranks": [0, 1]}, "ranks", "begins at 0; the best response has rank 1"),
    ({"prompt": "x", "responses": ["a", "b"], "ranks": [2, 3]}, "ranks", "begins at 2"),
    (
        {"prompt": "x", "responses": ["a", "b"], "ranks": [1, 2.0]},
        "ranks[1]",
        "is the number 2.0; ranks are whole numbers",
    ),
    ({"prompt": "x", "responses": ["a", "b"], "ranks": [True, 2]}, "ranks[0]", "is true; ranks are whole numbers"),
    (
        {"prompt": "x", "responses": ["a", "b", "a"], "ranks": [1, 2, 3]},
        "ranks",
        "responses 0 and 2, which are the same",
    ),
    ({"prompt": "x", "responses": ["a", "b"], "annotator": "me"}, "ranks", "is the file from an older version?"),
    ({"prompt": "x", "ranks": [1, 2]}, "responses", "is missing"),
    (
        {"prompt": "x", "responses": ["a", "b"], "ranks": [1, 2], "schema_version": "0.1"},
        "schema_version",
        "ingot label",
    ),
    (
        {"prompt": "x", "responses": ["a", "b"], "ranks": [1, 2], "schema_version": 2},
        "schema_version",
        "is 2, but this version of ingot reads up to 1; update ingot",
    ),
]


@pytest.mark.parametrize(("row", "field", "message"), BAD)
def test_a_bad_row_is_named_by_file_row_field_and_fix(tmp_path, row, field, message):
    line = row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n" + line + b"\n")
    [error] = scan(path)
    assert isinstance(error, RowError)
    assert (error.file, error.row, error.field) == (str(path), 2, field)
    assert message in str(error)
    assert str(error).startswith(f"{path}, row 2: " + (f'field "{field}" ' if field else ""))
    assert "\n" not in str(error)
    assert error.fix
    with pytest.raises(RowError):
        list(read_rows(path))


def test_rows_of_another_kind_than_most_are_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "x"}, *[{"prompt": "y"}] * 3, {"prompt": [user("y")]}, {"prompt": ""}])
    results = list(scan(path))
    assert [type(row) for row in results] == [RowError, *[PromptOnly] * 3, RowError, RowError]
    assert "row 1: is language modelling (plain text), but the file is prompt-only (plain text) (see row 2)" in str(
        results[0]
    )
    assert "row 5: is prompt-only (conversational)" in str(results[4])
    late = write(tmp_path / "b.jsonl", [*[{"prompt": "y"}] * 150, {"text": "x"}])
    assert [row.row for row in scan(late) if isinstance(row, RowError)] == [151]


def test_a_ranked_list_becomes_pairs_of_one_weight_and_ties_none():
    row = parse_row({"prompt": "hi", "responses": list("abcd"), "ranks": [2, 1, 2, 4], "annotator": "me", "x": 1})
    pairs = row.preferences()
    assert {(pair.chosen, pair.rejected) for pair in pairs} == {
        ("b", "a"),
        ("b", "c"),
        ("b", "d"),
        ("a", "d"),
        ("c", "d"),
    }
    assert sum(pair.weight for pair in pairs) == pytest.approx(1.0)
    assert len({pair.group_id for pair in pairs}) == 1
    assert all(pair.extra["annotator"] == "me" and pair.extra["x"] == 1 for pair in pairs)
    assert [parse_row(pair.columns()) for pair in pairs] == pairs
    assert parse_row({"prompt": "hi", "responses": ["a", "b"], "ranks": [1, 1]}).preferences() == []


def test_files_of_all_forms_give_the_same_rows(tmp_path):
    columns = [{"prompt": "hä\u2028", "completion": "x" * n} for n in range(1, 2000)]
    lines = "".join(json.dumps(row) + "\r\n" for row in columns).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    (tmp_path / "a.json").write_text(json.dumps(columns, indent=1))
    (tmp_path / "b.json").write_bytes(lines)
    expected = [parse_row(row, number=n) for n, row in enumerate(columns, 1)]
    for path in sorted(tmp_path.iterdir()):
        assert list(read_rows(path)) == expected, path
    assert list(read_rows(columns)) == expected
    assert len(list(read_rows([tmp_path / "a.jsonl", str(tmp_path / "a.json")]))) == 2 * len(expected)


def test_reading_is_streaming_and_says_how_far_it_is(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "x" * 100}] * 5000)
    seen = []
    stream = read_rows(path, progress=lambda done, total: seen.append((done, total)))
    next(stream)
    assert seen == []
    list(stream)
    size = path.stat().st_size
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (size, size)
    assert len(seen) > 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl: no row in it"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 1000)[:-9], "cannot be decompressed"),
        ("a.jsonl.zst", b"no", "not valid zstandard data"),
        ("a.txt", b"Once upon a time", r"a\.txt: not a file of rows; make \.jsonl of it"),
        ("a.csv.gz", b"", r"a\.csv\.gz: not a file of rows"),
        ("missing/a.jsonl", None, "a.jsonl: no such file"),
        (".", None, "a folder; name the files in it"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(tmp_path / name))


def test_no_files_are_no_rows():
    with pytest.raises(DataError, match="no rows were given"):
        list(read_rows([]))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"a\.parquet: reading Parquet needs pyarrow: pip install 'ingot\[parquet\]'"):
        list(read_rows(tmp_path / "a.parquet"))


def test_parquet_rows_equal_those_of_json_lines(tmp_path):
    import pyarrow
    from pyarrow import parquet

    columns = [{"prompt": [user("hi")], "completion": [assistant(f"ho {n}")]} for n in range(3000)]
    parquet.write_table(pyarrow.Table.from_pylist(columns), tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet")) == list(read_rows(columns))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(DataError, match=r"b\.parquet: not a Parquet file"):
        list(read_rows(tmp_path / "b.parquet"))


COLUMNS = [
    "text",
    "messages",
    "prompt",
    "completion",
    "completions",
    "chosen",
    "rejected",
    "label",
    "labels",
    "responses",
    "ranks",
    "role",
    "content",
    "margin",
    "question",
    "answer",
    "schema_version",
    "tools",
    "group_id",
    "weight",
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(COLUMNS), inner, max_size=5),
    max_leaves=12,
)


@given(JSON)
def test_any_json_is_a_row_or_named(value):
    try:
        row = parse_row(value)
    except RowError:
        return
    assert parse_row(row.columns()) == parse_row(value) or "nan" in repr(row)


def test_equal_rows_have_equal_fingerprints_whatever_else_they_carry():
    first, second = (parse_row({"prompt": "a", "completion": "b", "id": n}) for n in range(2))
    assert first.fingerprint() == second.fingerprint()
    assert first.fingerprint() != parse_row({"prompt": "a", "completion": "c"}).fingerprint()
    assert rows_module.parse_row({"text": "a"}).fingerprint() != parse_row({"prompt": "a"}).fingerprint()
