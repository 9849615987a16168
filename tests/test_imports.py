"""Data of other formats become rows; what gives none is named with the reason, and nothing else is lost."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.data.imports import KINDS, Dropped, Imported, import_rows
from ingot.data.rows import parse_row
from ingot.errors import ConfigError, DataError
from ingot.tokenizer import Tokenizer


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def imported(tmp_path):
    """Import these records; the rows, or the reasons as strings."""

    def run(kind, *records, **options):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        results = list(import_rows(kind, path, **options))
        for result in results:
            if isinstance(result, Imported):
                parse_row(result.columns)
        return [result.columns if isinstance(result, Imported) else result.reason for result in results]

    return run


# ---- hh


def talk(*turns):
    return "".join(f"\n\n{who}: {text}" for who, text in turns)


H, A = "Human", "Assistant"


def test_a_transcript_becomes_a_prompt_and_two_answers(imported):
    first = [(H, "hi"), (A, "yes?"), (H, "a\n\nb ")]
    [row] = imported("hh", {"chosen": talk(*first, (A, "x")), "rejected": talk(*first, (A, "y")), "id": 4})
    prompt = [user("hi"), assistant("yes?"), user("a\n\nb")]
    assert row == {"prompt": prompt, "chosen": [assistant("x")], "rejected": [assistant("y")], "id": 4}


def test_answers_may_go_on_for_several_turns(imported):
    [row] = imported(
        "hh", {"chosen": talk((H, "a"), (A, "b"), (H, "c"), (A, "d")), "rejected": talk((H, "a"), (A, "x"))}
    )
    assert row == {
        "prompt": [user("a")],
        "chosen": [assistant("b"), user("c"), assistant("d")],
        "rejected": [assistant("x")],
    }


def test_turns_of_one_person_in_a_row_are_one_message(imported):
    [row] = imported("hh", {"chosen": talk((H, "a"), (A, "b"), (A, "c")), "rejected": talk((H, "a"), (A, "b"))})
    assert (row["chosen"], row["rejected"]) == ([assistant("b\n\nc")], [assistant("b")])
    [row] = imported("hh", {"chosen": talk((H, "a"), (A, ""), (A, "c")), "rejected": talk((H, "a"), (A, "b"))})
    assert row["chosen"] == [assistant("c")]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (talk((H, "a"), (A, "b")), talk((H, "a"), (A, "b ")), "chosen and rejected are the same"),
        (talk((H, "a"), (A, " ")), talk((H, "a"), (A, "b")), "the answer of chosen is empty"),
        (
            talk((H, "a"), (A, "b")),
            talk((H, "a"), (A, "b"), (H, "c"), (A, "d")),
            "chosen is the beginning of the other dialogue",
        ),
        (talk((H, "a"), (A, "b"), (H, "c")), talk((H, "a"), (A, "x")), 'ends with a message of role "user"'),
        (talk((H, "a"), (A, "b")), "plain", 'field "rejected" is no transcript'),
        ("Hello." + talk((H, "a"), (A, "b")), talk((H, "a"), (A, "c")), 'field "chosen" is no transcript'),
        (3, talk((H, "a")), 'field "chosen" is not a string'),
    ],
)
def test_transcripts_that_prefer_nothing_are_dropped_with_the_reason(imported, chosen, rejected, reason):
    [dropped] = imported("hh", {"chosen": chosen, "rejected": rejected})
    assert reason in dropped


WORDS = st.text(alphabet="ab:\n HumanAssistant", max_size=12).filter(lambda text: "\n\n" not in f"\n{text}\n")


@given(st.lists(WORDS, min_size=1, max_size=5), WORDS, WORDS)
def test_every_transcript_is_a_row_or_dropped_and_says_the_same(texts, chosen, rejected):
    turns = [(H if index % 2 == 0 else A, text) for index, text in enumerate(texts)]
    turns = turns if turns[-1][0] == H else turns[:-1]
    record = {"chosen": talk(*turns, (A, chosen)), "rejected": talk(*turns, (A, rejected))}
    results = (
        list(KINDS["hh"](record, None))
        if chosen.strip() and rejected.strip() and chosen.strip() != rejected.strip()
        else []
    )
    for row in results:
        said = [text.strip() for _, text in turns]
        assert [message["content"] for message in row["prompt"]] == said
        assert row["chosen"] == [assistant(chosen.strip())]
        assert row["rejected"] == [assistant(rejected.strip())]


# ---- alpaca and sharegpt


def test_alpaca_rows(imported):
    rows = imported(
        "alpaca",
        {"instruction": "add", "input": "2 2", "output": "4", "id": 1},
        {"instruction": "sing", "input": "", "output": "la", "text": "rendered"},
        {"instruction": "go", "output": "ok", "system": "be kind", "history": [["hi", "ho"]]},
    )
    assert rows == [
        {"prompt": [user("add\n\n2 2")], "completion": [assistant("4")], "id": 1},
        {"prompt": [user("sing")], "completion": [assistant("la")]},
        {
            "prompt": [{"role": "system", "content": "be kind"}, user("hi"), assistant("ho"), user("go")],
            "completion": [assistant("ok")],
        },
    ]
    reasons = imported(
        "alpaca",
        {"instruction": "add", "input": "", "output": ""},
        {"text": "x"},
        {"instruction": "x", "output": "y", "input": 3},
        {"instruction": "x", "output": "y", "history": ["a"]},
        [1],
    )
    expected = [
        "completion[0].content",
        'has no field "instruction"',
        '"input" is not a string',
        '"history"',
        "a list, not an object",
    ]
    assert all(part in reason for part, reason in zip(expected, reasons, strict=True))


def test_sharegpt_rows(imported):
    said = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    rows = imported(
        "sharegpt",
        {"id": "a", "conversations": said},
        {
            "conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}],
            "system": "be kind",
        },
    )
    assert rows == [
        {"messages": [user("hi"), assistant("ho")], "id": "a"},
        {"messages": [{"role": "system", "content": "be kind"}, user("hi"), assistant("ho")]},
    ]
    reasons = imported(
        "sharegpt",
        {"conversations": [*said, said[1]]},
        {"conversations": [{"from": "alien", "value": "hi"}]},
        {"conversations": said[:1]},
        {"conversations": ["hi"]},
        {"conversations": [said[0], {"from": "gpt", "value": None}]},
        {"items": []},
    )
    expected = [
        "second assistant turn",
        "from 'alien'",
        "no assistant message",
        "[0] is not an object",
        "is null",
        'no list "conversations"',
    ]
    assert all(part in reason for part, reason in zip(expected, reasons, strict=True))


# ---- judgements


def test_best_of_four_ties_the_rest(imported):
    record = {"query": "q", "sample0": "a", "sample1": "b", "sample2": "c", "sample3": "d", "best": 2, "n": 1}
    [row] = imported("best-of-4", record)
    assert row == {"prompt": "q", "responses": list("abcd"), "ranks": [2, 2, 1, 2], "n": 1}
    assert [(pair.chosen, pair.rejected) for pair in parse_row(row).preferences()] == [
        ("c", "a"),
        ("c", "b"),
        ("c", "d"),
    ]
    [row] = imported("best-of-4", {**record, "sample0": "b", "sample3": "c"})
    assert (row["responses"], row["ranks"]) == (["b", "c"], [2, 1])
    reasons = imported(
        "best-of-4",
        {**record, "best": 4},
        {**record, "best": None},
        {**record, **{f"sample{n}": "a" for n in range(4)}},
        {**record, "sample1": 3},
        {**record, "sample1": ""},
    )
    expected = ['best" is 4', 'best" is None', "all samples are the same", "neither text nor token ids", "responses[1]"]
    assert all(part in reason for part, reason in zip(expected, reasons, strict=True))


def test_best_of_four_with_token_ids(imported):
    tokenizer = Tokenizer.bytes_only()
    record = {"query": [900, 900, *b"hi"], "sample0": [*b"yo", 900], "sample1": list(b"no"), "best": 1}
    [row] = imported("best-of-4", record, tokenizer=tokenizer)
    assert row == {"prompt": "hi", "responses": ["yo", "no"], "ranks": [2, 1]}
    inside, nothing = imported(
        "best-of-4", {**record, "sample0": [97, 900, 98]}, {**record, "query": [900]}, tokenizer=tokenizer
    )
    assert "ids in it that the tokenizer does not have" in inside
    assert 'field "prompt" is empty' in nothing
    with pytest.raises(ConfigError, match="give their tokenizer with --tokenizer"):
        imported("best-of-4", record)


def test_argilla_records_of_both_versions(imported):
    fields = {"prompt": "q", "reply-1": "a", "reply-2": "b", "reply-3": "c"}
    ranking = [{"value": ["reply-2", "reply-1", "reply-3"], "user_id": "me"}]
    tied = {"value": ["reply-1", "reply-2", "reply-3"], "rank": [2, 2, 1]}
    listed = [{"value": "reply-3", "rank": 1}, {"value": "reply-1", "rank": 2}]
    rows = imported(
        "argilla",
        {
            "id": "7",
            "fields": fields,
            "metadata": {"m": 1},
            "suggestions": {},
            "responses": {"better": ranking},
            "vectors": {},
        },
        {
            **fields,
            "preference": [{"user_id": "me", "value": tied, "status": "submitted"}],
            "preference-suggestion": None,
            "metadata": "{}",
        },
        {"fields": fields, "responses": {"better": [{"value": listed, "user_id": "x"}]}},
        {
            "fields": fields,
            "responses": {"best": [{"value": "reply-2", "user_id": "x"}, {"value": "reply-1", "user_id": "y"}]},
        },
    )
    common = {"prompt": "q", "annotator": "me"}
    assert rows[0] == {
        **common,
        "responses": ["b", "a", "c"],
        "ranks": [1, 2, 3],
        "criterion": "better",
        "id": "7",
        "metadata": {"m": 1},
    }
    assert rows[1] == {
        **common,
        "responses": ["a", "b", "c"],
        "ranks": [2, 2, 1],
        "criterion": "preference",
        "metadata": "{}",
    }
    assert (rows[2]["responses"], rows[2]["ranks"]) == (["c", "a"], [1, 2])
    assert [(row["annotator"], row["responses"], row["ranks"]) for row in rows[3:]] == [
        ("x", ["b", "a", "c"], [1, 2, 2]),
        ("y", ["a", "b", "c"], [1, 2, 2]),
    ]
    shifted = {"value": {"value": ["reply-1", "reply-2"], "rank": [3, 2]}, "user_id": "x"}
    [row] = imported("argilla", {"fields": fields, "responses": {"q": [shifted]}})
    assert (row["responses"], row["ranks"]) == (["a", "b"], [2, 1])
    reasons = imported(
        "argilla",
        {"fields": fields, "responses": {}},
        {"fields": fields, "responses": {"q": [{"value": "tie"}]}},
        {"fields": fields, "responses": {"q": [{"value": 3}]}},
        {"fields": fields, "responses": {"q": [{"value": ["reply-1", "reply-2"], "status": "draft"}]}},
        {"fields": fields, "responses": {"q": [{"value": {"value": [[1], "reply-1"], "rank": [1, 2]}}]}},
        {"fields": {"a": "1", "b": "2", "c": "3", "d": "4"}, "responses": {"q": [{"value": ["a", "b"]}]}},
    )
    expected = [
        "nobody has answered",
        "names 'tie', which is no field",
        "neither a ranking",
        "is draft, not submitted",
        "names '[1]'",
        "which field is the prompt?",
    ]
    assert all(part in reason for part, reason in zip(expected, reasons, strict=True))


def test_label_studio_tasks(imported):
    def task(result, data, **annotation):
        return {
            "id": 5,
            "data": data,
            "annotations": [{"completed_by": {"id": 3, "email": "me@x"}, "result": [result], **annotation}],
        }

    def pair(selected, to_name="answer1,answer2"):
        return {"type": "pairwise", "from_name": "pw", "to_name": to_name, "value": {"selected": selected}}

    def ranker(order):
        return {"type": "ranker", "from_name": "rank", "value": {"ranker": order}}

    answers = {"prompt": "q", "answer1": "a", "answer2": "b"}
    items = {"prompt": "q", "items": [{"id": "x", "body": "X"}, {"id": "y", "title": "Y"}, {"id": "z", "text": "Z"}]}
    rows = imported(
        "label-studio",
        task(pair("left"), answers),
        task(pair("right", "txt-1,txt-2"), answers),
        task(ranker(["z", "x", "y"]), items),
        task(ranker({"_": ["y", "x"], "bad": []}), items),
    )
    common = {"prompt": "q", "annotator": "me@x", "id": 5}
    assert rows[:3] == [
        {**common, "responses": ["a", "b"], "ranks": [1, 2], "criterion": "pw"},
        {**common, "responses": ["b", "a"], "ranks": [1, 2], "criterion": "pw"},
        {**common, "responses": ["Z", "X", "Y"], "ranks": [1, 2, 3], "criterion": "rank"},
    ]
    assert rows[3]["responses"] == ["Y", "X"]
    reasons = imported(
        "label-studio",
        task(pair(None), answers),
        task(pair("left"), answers, was_cancelled=True),
        task(pair("left", "l,r"), {"prompt": "q", "a": "1", "b": "2", "c": "3"}),
        task(ranker({"good": ["x"], "bad": ["y"]}), items),
        task(ranker(["w", "x"]), items),
        task(ranker([["x"], "y"]), items),
        task({"type": "choices", "value": {}}, answers),
        {"data": answers, "annotations": []},
        {"prompt": "q", "pw": "left"},
    )
    expected = [
        "neither left nor right",
        "was skipped",
        "which two fields",
        "2 buckets",
        "has no text",
        "has no text",
        "neither a Pairwise",
        "nobody has annotated",
        "JSON-MIN",
    ]
    assert all(part in reason for part, reason in zip(expected, reasons, strict=True))


# ---- all kinds


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 3) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "value", "rank", "from", "type", "a", "b"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.parametrize("kind", KINDS)
def test_any_record_gives_a_row_or_a_reason(kind, tmp_path_factory):
    path = tmp_path_factory.mktemp(kind) / "a.jsonl"
    names = [
        "chosen",
        "rejected",
        "instruction",
        "input",
        "output",
        "history",
        "conversations",
        "query",
        "sample0",
        "sample1",
        "best",
    ]
    names += ["fields", "responses", "data", "annotations", "prompt", "x"]

    @settings(max_examples=60, deadline=None)
    @given(st.dictionaries(st.sampled_from(names), JSON, max_size=4) | JSON)
    def total(record):
        path.write_text(json.dumps(record) + "\n")
        results = list(import_rows(kind, path, tokenizer=Tokenizer.bytes_only()))
        assert results
        assert all(result.record == 1 and (isinstance(result, Imported) or result.reason) for result in results)

    total()


def test_lines_that_are_no_json_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("{\n")
    [dropped] = import_rows("hh", tmp_path / "a.jsonl")
    assert isinstance(dropped, Dropped)
    assert dropped.reason.startswith("not valid JSON")
    with pytest.raises(ConfigError, match="'oasst' is no format that can be imported: give one of hh, alpaca"):
        next(import_rows("oasst", tmp_path / "a.jsonl"))
    with pytest.raises(DataError, match="no such file"):
        next(import_rows("hh", tmp_path / "b.jsonl"))
