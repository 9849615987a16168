"""Judgements on disk: read as written, never lost, never torn, by many processes at once; revisions, pairs and splits."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ingot
from ingot import durable
from ingot.data.chat import ChatEncoder, ChatTemplate
from ingot.data.examples import Examples, load_examples
from ingot.data.judgements import current, in_force, unique
from ingot.data.rows import parse_row, read_rows
from ingot.data.split import split_rows, split_side
from ingot.errors import DataError
from ingot.feedback.journal import Journal, read_judgements
from ingot.feedback.pairs import from_preferences, to_preferences
from ingot.feedback.records import Record, from_row, to_row, with_id

TOKENIZER = ingot.Tokenizer.train(iter(["answer answer"]), vocab_size=260)
ENCODER = ChatEncoder(
    ChatTemplate.built_in(), TOKENIZER.with_special_tokens(ChatTemplate.built_in().missing_special_tokens(TOKENIZER))
)
texts = st.text(max_size=8)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": texts}),
    min_size=1,
    max_size=3,
)


@st.composite
def records(draw):
    size = draw(st.integers(2, 5))

    def each(what):
        return draw(st.lists(what, min_size=size, max_size=size).map(tuple))

    def maybe(what):
        return each(what) if draw(st.booleans()) else None

    return with_id(
        Record(
            prompt=draw(texts | messages),
            responses=each(texts | messages),
            ranks=each(st.integers(1, size)),
            group_id=draw(st.text(min_size=1, max_size=5)),
            annotator=draw(texts),
            criterion=draw(texts),
            status=draw(st.sampled_from(["judged", "skipped", "withdrawn"])),
            revises=draw(st.none() | st.text(min_size=1, max_size=3)),
            order=tuple(draw(st.permutations(range(size)))) if draw(st.booleans()) else (),
            ratings=maybe(st.none() | st.integers(1, 7)),
            answers={name: each(st.none() | st.booleans()) for name in draw(st.sets(texts, max_size=2))},
            flags={
                name: tuple(draw(st.lists(st.integers(0, size - 1), max_size=2)))
                for name in draw(st.sets(texts, max_size=2))
            },
            note=draw(texts),
            kind=draw(st.sampled_from(["new", "repeat", "gold"])),
            repeat=draw(st.integers(0, 2)),
            gold_ranks=maybe(st.integers(1, size)),
            time_s=draw(st.none() | st.floats(0, 1e6)),
            created=draw(texts),
            source_models=maybe(texts),
            rubric=draw(st.none() | st.just({"version": "1", "sha256": "ab"})),
            extra=draw(st.dictionaries(st.sampled_from(["sampling", "batch"]), st.integers() | texts, max_size=2)),
        )
    )


@given(records())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_a_record_survives_its_row(record):
    row = json.loads(json.dumps(to_row(record)))
    assert from_row(row, "f, row 1") == record
    assert with_id(record) == record


@given(st.lists(records(), max_size=4))
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
def test_a_journal_gives_back_what_was_added(tmp_path_factory, added):
    path = tmp_path_factory.mktemp("journal") / "ranked.jsonl"
    journal = Journal(path)
    for record in added:
        journal.append(record)
    assert journal.records == Journal(path).records == added
    assert not journal.notices


def test_the_fields_of_a_ranked_list_are_always_there():
    row = to_row(make())
    assert list(row)[:6] == ["prompt", "responses", "ranks", "group_id", "annotator", "criterion"]
    assert row["schema_version"] == 1


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch):
    """Nothing here cuts the power: a write need not wait for the disk, which may be busy."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def make(group="g", annotator="ann", ranks=(1, 2), **more):
    responses = tuple(f"answer {letter}" for letter in "abcdef"[: len(ranks)])
    fields = {"prompt": "p", "responses": responses, "criterion": "helpful", **more}
    return with_id(Record(ranks=tuple(ranks), group_id=group, annotator=annotator, **fields))


def test_rows_of_other_tools_are_judgements():
    row = {"prompt": "p", "responses": ["a", "b"], "ranks": [2, 1]}
    record = from_row(row, "f")
    assert (record.status, record.annotator, record.schema_version) == ("judged", "", 0)
    assert len(record.group_id) == 16
    assert record.group_id == from_row(dict(reversed(row.items())), "f").group_id
    # Tools that list the best response first mean the same group.
    assert record.group_id == from_row({**row, "responses": ["b", "a"]}, "f").group_id
    assert record.group_id != from_row({**row, "responses": ["a", "c"]}, "f").group_id
    assert from_row({**row, "annotator": 7}, "f").annotator == "7"
    # Without ids two equal rows are two judgements.
    assert current([record, record]) == [record, record]


def test_what_other_tools_call_id_and_status_is_theirs():
    exported = {"prompt": "p", "responses": ["a", "b"], "id": "record 1", "status": "submitted", "kind": 3}
    rows = [exported | {"ranks": ranks, "annotator": name} for name, ranks in (("ann", [1, 2]), ("bob", [2, 1]))]
    judgements = [from_row(row, "f") for row in rows]
    assert current(judgements) == judgements
    assert judgements[0].extra == {"id": "record 1", "status": "submitted", "kind": 3}
    assert [row.annotator for row in read_rows(rows)] == ["ann", "bob"]
    assert [row.columns() for row in read_rows(rows)] == rows
    assert len(list(to_preferences(judgements))) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": [1]}, '"ranks" has 1 entries for 2 responses; give one for each'),
        ({"ranks": [0, 1]}, '"ranks" holds 0; its entries are whole numbers from 1: 1 for the best'),
        ({"ranks": [1, True]}, '"ranks" holds True'),
        ({"ranks": "12"}, '"ranks" is a str, not a list'),
        ({"ranks": None}, 'no field "ranks"'),
        ({"responses": ["a"]}, '"responses" has 1 entries; at least two are needed'),
        ({"responses": ["a", 3]}, 'response 2 in "responses" is a int'),
        (
            {"responses": ["a", [{"role": "assistant"}]]},
            'response 2 in "responses" has no string "content" in message 1',
        ),
        ({"prompt": []}, '"prompt" is an empty list'),
        ({"order": [0, 0]}, r'"order" is \[0, 0\], not an order of the 2 responses'),
        ({"ratings": [1, 8]}, '"ratings" holds 8; its entries are 1 to 7'),
        (
            {"answers": {"honest": [True, "no"]}},
            '"answers": "honest" holds \'no\'; its entries are true, false or null',
        ),
        ({"flags": {"unsafe": [2]}}, '"flags" is'),
        ({"status": "done"}, "\"status\" is 'done'; it is one of judged, skipped, withdrawn"),
        ({"time_s": "long"}, "\"time_s\" is 'long', not a number of seconds"),
        ({"group_id": 1.5}, '"group_id" is a float'),
        ({"annotator": ["x"]}, '"annotator" is a list, not a string'),
        ({"schema_version": 2}, r"written by a newer ingot \(schema 2, this one reads up to 1\)"),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, message):
    good = to_row(make())
    path = tmp_path / "ranked.jsonl"
    path.write_text(json.dumps(good) + "\n\n" + json.dumps(good | change) + "\n" + json.dumps(good) + "\n")
    with pytest.raises(DataError, match=r"ranked\.jsonl, row 3.*" + message):
        Journal(path)


def test_a_missing_field_and_no_json_are_named(tmp_path):
    path = tmp_path / "ranked.jsonl"
    path.write_text('{"prompt": "p", "responses": ["a", "b"]}\n')
    with pytest.raises(DataError, match='row 1: no field "ranks"'):
        Journal(path)
    path.write_text("[1]\n")
    with pytest.raises(DataError, match="row 1: a list, not an object"):
        Journal(path)
    path.write_text('{"prompt": \n{}\n')
    with pytest.raises(DataError, match="row 1: not valid JSON"):
        Journal(path)
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        read_judgements(tmp_path / "none.jsonl")


def test_revisions_take_the_place_of_what_they_revise():
    first = make(created="1")
    back = make(status="withdrawn", ranks=(1, 1), revises=first.id)
    second = make(ranks=(2, 1), revises=first.id)
    skip = make("h", status="skipped", ranks=(1, 1))
    third = make(ranks=(1, 1), revises=second.id)
    assert current([first]) == [first]
    assert current([first, back]) == []
    assert current([first, back, second]) == [second]
    assert in_force([first, skip, back, second]) == [skip, second]
    assert current([first, back, second, third]) == [third]
    # Taking back the revision does not bring the first one back.
    assert current([first, back, second, make(status="withdrawn", ranks=(1, 1), revises=second.id)]) == []
    assert unique([first, skip, first]) == [first, skip]


CUTS = [b'{"prompt": "p", "resp', b"\x00" * 40, '{"prompt": "ä'.encode()[:-1]]


@pytest.mark.parametrize("cut", CUTS)
def test_a_line_cut_short_is_reported_kept_and_not_fatal(tmp_path, cut):
    path = tmp_path / "ranked.jsonl"
    Journal(path).append(make("a"))
    whole = path.read_bytes()
    path.write_bytes(whole + cut)
    journal = Journal(path)
    assert [record.group_id for record in journal.records] == ["a"]
    assert journal.notices == [
        f"{path}: its last line is cut short ({len(cut)} bytes, as after a power cut); it is left out"
    ]
    assert path.read_bytes() == whole + cut
    journal.append(make("b"))
    assert [record.group_id for record in journal.records] == ["a", "b"]
    assert journal.notices[1].endswith(f"it was moved to {path}.torn")
    assert path.read_bytes().startswith(whole + b'{"prompt"')
    assert (tmp_path / "ranked.jsonl.torn").read_bytes() == cut + b"\n"
    assert [record.group_id for record in Journal(path).records] == ["a", "b"]
    assert not Journal(path).notices
    # A second power cut does not overwrite what the first one left.
    path.write_bytes(path.read_bytes() + b"again")
    Journal(path).append(make("c"))
    assert (tmp_path / "ranked.jsonl.torn").read_bytes() == cut + b"\nagain\n"


def test_a_last_line_without_its_end_counts(tmp_path):
    path = tmp_path / "ranked.jsonl"
    path.write_bytes(json.dumps(to_row(make("a"))).encode())
    journal = Journal(path)
    assert len(journal.records) == 1
    journal.append(make("b"))
    journal.append(make("c"))
    assert (
        [record.group_id for record in journal.records]
        == ["a", "b", "c"]
        == [r.group_id for r in Journal(path).records]
    )
    assert path.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize("keep", range(0, 400, 37))
def test_a_file_cut_anywhere_loses_at_most_the_line_it_was_cut_in(tmp_path, keep):
    path = tmp_path / "ranked.jsonl"
    for group in "ab":
        Journal(path).append(make(group))
    content = path.read_bytes()[:keep]
    path.write_bytes(content)
    Journal(path).append(make("c"))
    whole = content.count(b"\n")
    assert [record.group_id for record in Journal(path).records] == [*["a", "b"][:whole], "c"]
    torn = tmp_path / "ranked.jsonl.torn"
    rest = content.rpartition(b"\n")[2]
    assert (torn.read_bytes() if torn.exists() else b"") == (rest + b"\n" if rest else b"")


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "ranked.jsonl"
    journal = Journal(path)
    journal.append(make("a"))
    before = path.read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:20]))
    with pytest.raises(OSError, match="No space left") as caught:
        journal.append(make("b"))
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    monkeypatch.undo()
    journal.append(make("b"))
    assert [record.group_id for record in journal.records] == ["a", "b"]


def test_each_judgement_is_synced_before_append_returns(tmp_path, monkeypatch):
    path = tmp_path / "ranked.jsonl"
    events = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("sync"), sync(descriptor))[1])
    monkeypatch.setattr(durable, "crash_points", [events.append])
    Journal(path).append(make("a"))
    place = events.index("ranked.jsonl: before sync")
    assert events[place + 1 : place + 3] == ["sync", "ranked.jsonl: appended"]
    # The name of a new file is on the disk too.
    assert events[place + 3 :] == ["sync"]


class Crash(BaseException):
    """The process ends here."""


def test_a_crash_at_any_point_of_a_write_loses_nothing_that_was_said_before(tmp_path, monkeypatch):
    def write(path, points):
        path.write_bytes(b"")
        Journal(path).append(make("a"))
        path.write_bytes(path.read_bytes() + b"torn")
        monkeypatch.setattr(durable, "crash_points", [points])
        try:
            Journal(path).append(make("b"))
        except Crash:
            pass
        finally:
            monkeypatch.setattr(durable, "crash_points", [])

    names = []
    write(tmp_path / "whole.jsonl", names.append)
    assert [name.partition(": ")[2] for name in names] == [
        "torn line kept",
        "before append",
        "before sync",
        "appended",
    ]
    for count in range(1, len(names) + 1):
        path = tmp_path / f"{count}.jsonl"
        left = iter(range(count, 0, -1))

        def crash(name, left=left):
            if next(left) == 1:
                raise Crash

        write(path, crash)
        Journal(path).append(make("c"))
        groups = [record.group_id for record in Journal(path).records]
        assert groups in (["a", "c"], ["a", "b", "c"])
        assert b"torn\n" in path.with_name(path.name + ".torn").read_bytes()


WRITER = """
    import sys
    from ingot.feedback.journal import Journal
    from ingot.feedback.records import Record, with_id
    path, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    journal = Journal(path)
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(count):
        # Far longer than a pipe's or a buffer's share, and than the next one's.
        text = name * (1 + 9000 * (number % 3))
        journal.append(with_id(Record(prompt=text, responses=("a", "b"), ranks=(1, 2), group_id=str(number), annotator=name)))
        if number % 7 == 0 and not any(r.group_id == "0" for r in journal.records):
            raise SystemExit("a row that was there is gone")
"""


def start(path, name, count):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(path), name, str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_many_labellers_on_one_file_lose_and_tear_no_row(tmp_path):
    path = tmp_path / "ranked.jsonl"
    path.write_bytes(b'{"cut short')
    writers = [start(path, name, 20) for name in "abcd"]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.close()
    for writer in writers:
        assert writer.wait(120) == 0
        writer.stdout.close()
    journal = Journal(path)
    assert not journal.notices
    for name in "abcd":
        mine = [record for record in journal.records if record.annotator == name]
        assert [record.group_id for record in mine] == [str(number) for number in range(20)]
    assert (tmp_path / "ranked.jsonl.torn").read_bytes() == b'{"cut short\n'


def test_a_labeller_who_is_killed_leaves_whole_rows(tmp_path):
    path = tmp_path / "ranked.jsonl"
    writer = start(path, "a", 100_000)
    assert writer.stdout.readline() == "ready\n"
    writer.stdin.write("go\n")
    writer.stdin.flush()
    while not path.exists() or path.stat().st_size < 200_000:
        pass
    writer.kill()
    writer.wait()
    writer.stdin.close()
    writer.stdout.close()
    journal = Journal(path)
    journal.append(make("after"))
    groups = [record.group_id for record in journal.records]
    assert groups == [str(number) for number in range(len(groups) - 1)] + ["after"]


def test_a_reader_sees_what_others_add(tmp_path):
    path = tmp_path / "ranked.jsonl"
    mine, theirs = Journal(path), Journal(path)
    mine.append(make("a"))
    theirs.append(make("b"))
    assert [record.group_id for record in theirs.records] == ["a", "b"]
    assert [record.group_id for record in mine.refresh()] == ["b"]
    assert mine.refresh() == []
    path.write_bytes(b"")
    assert mine.refresh() == mine.records == []


ranks = st.integers(2, 6).flatmap(lambda size: st.lists(st.integers(1, size), min_size=size, max_size=size))


@given(ranks)
def test_preference_rows_hold_every_untied_pair_once_and_no_other(ranking):
    record = make(ranks=tuple(ranking), annotator="ann")
    rows = list(to_preferences([record]))
    text = dict(zip(record.responses, record.ranks, strict=True))
    assert all(text[row["chosen"]] < text[row["rejected"]] for row in rows)
    pairs = {(row["chosen"], row["rejected"]) for row in rows}
    assert len(pairs) == len(rows)
    assert len(rows) == sum(a < b for a in ranking for b in ranking)
    if rows:
        assert sum(row["weight"] for row in rows) == pytest.approx(1.0)
        assert {row["group_id"] for row in rows} == {"g"}


@given(st.lists(ranks, max_size=4))
def test_ranked_lists_come_back_from_their_preference_rows(rankings):
    originals = [make(f"g{n % 2}", ranks=tuple(r), created=str(n)) for n, r in enumerate(rankings)]
    originals = [record for record in originals if len(set(record.ranks)) > 1]
    back = from_preferences(json.loads(json.dumps(list(to_preferences(originals)))))
    assert len(back) == len(originals)
    for record, again in zip(originals, back, strict=True):
        assert (again.prompt, again.group_id, again.annotator, again.id) == ("p", record.group_id, "ann", record.id)
        levels = {rank: number for number, rank in enumerate(sorted(set(record.ranks)), 1)}
        assert dict(zip(again.responses, again.ranks, strict=True)) == {
            text: levels[rank] for text, rank in zip(record.responses, record.ranks, strict=True)
        }


def test_a_judgement_taken_back_or_replaced_gives_no_pair(tmp_path):
    """Through every door: preference rows of records, and what training reads from the file itself."""
    first = make("a", ranks=(1, 2), created="1")
    second = make("a", ranks=(2, 1), revises=first.id)
    gone = make("b", ranks=(1, 2))
    back = make("b", status="withdrawn", ranks=(1, 1), revises=gone.id)
    skipped = make("c", status="skipped", ranks=(1, 1))
    kept = make("d", ranks=(1, 2, 3))
    written = [first, gone, skipped, kept, kept, back, second]
    path, later = tmp_path / "ranked.jsonl", tmp_path / "later.jsonl"
    Journal(path).append(*written)
    assert [(row["judgement"], row["chosen"]) for row in to_preferences(written)] == [
        *[(kept.id, "answer a")] * 2,
        (kept.id, "answer b"),
        (second.id, "answer b"),
    ]
    lists = list(read_rows(path))
    assert [row.id for row in lists] == [record.id for record in read_judgements(path)] == [kept.id, second.id]
    pairs = [pair.columns() for row in lists for pair in row.preferences()]
    asked = [{name: row[name] for name in sorted(row)} for row in to_preferences(written)]
    assert [{name: row[name] for name in asked[0]} for row in pairs] == asked
    examples = load_examples(path, ENCODER, max_length=100)
    assert [row.id for row in examples.rows] == [kept.id, second.id]
    # A later file may take back what an earlier one says.
    Journal(later).append(make("d", status="withdrawn", ranks=(1, 1), revises=kept.id))
    assert [row.id for row in read_rows([path, later])] == [second.id]
    with pytest.raises(DataError, match=r"later\.jsonl: none of the 1 judgements counts"):
        load_examples(later, ENCODER, max_length=100)


def test_one_group_has_one_id_whoever_reads_it():
    asked = [{"role": "user", "content": "p"}]
    for prompt, responses in (
        ("p", ["b", "a"]),
        (asked, ["a", "b"]),
        (asked, [[{"role": "assistant", "content": "a"}], "b"]),
    ):
        row = {"prompt": prompt, "responses": responses, "ranks": [1, 2]}
        [pair] = parse_row(row).preferences()
        assert pair.group_id == from_row(row, "f").group_id
        [other] = parse_row(row | {"responses": responses[::-1]}).preferences()
        assert other.group_id == pair.group_id
        [other] = parse_row(row | {"responses": [*responses, "c"], "ranks": [1, 2, 2]}).preferences()[:1]
        assert other.group_id != pair.group_id


def test_rows_and_records_are_held_out_alike():
    prompts = [f"Prompt  {n}" for n in range(300)]
    rows = [
        parse_row({"prompt": [{"role": "user", "content": prompt.upper()}], "completion": "a"}) for prompt in prompts
    ]
    examples = Examples(tuple(rows), tuple(() for _ in rows), 300, 0)
    _, held_out = examples.split(0.2)
    _, expected = split_rows(prompts, lambda prompt: prompt, held_out=0.2)
    assert [row.asked()[0]["content"] for row in held_out.rows] == [prompt.upper() for prompt in expected]


def test_pairs_that_no_ranking_makes_are_refused():
    def row(chosen, rejected):
        return {"prompt": "p", "chosen": chosen, "rejected": rejected, "group_id": "g"}

    for rows in (
        [row("a", "b"), row("b", "a")],
        [row("a", "b"), row("b", "c"), row("c", "a")],
        [row("a", "b"), row("c", "d")],
    ):
        with pytest.raises(DataError, match=r"group 'g': its . pairs are not those of a ranking with ties"):
            from_preferences(rows)


def test_the_same_text_twice_is_no_pair():
    record = dataclasses.replace(make(ranks=(1, 2, 3)), responses=("same", "same", "other"))
    rows = list(to_preferences([record]))
    assert [(row["chosen"], row["rejected"], row["weight"]) for row in rows] == [("same", "other", 0.5)] * 2


def test_a_prompt_lies_on_one_side_whatever_comes_with_it():
    rows = [make(f"g{n}", annotator=name, prompt=f"Prompt {n // 3}") for n in range(600) for name in ("ann", "bob")]
    train, held_out = split_rows(rows, lambda record: record.prompt, held_out=0.2, seed=1)
    assert len(train) + len(held_out) == len(rows)
    assert not {r.prompt for r in train} & {r.prompt for r in held_out}
    assert 0.12 < len({r.prompt for r in held_out}) / 200 < 0.28
    again, _ = split_rows(rows[::-1], lambda record: record.prompt, held_out=0.2, seed=1)
    assert again == train[::-1]
    other, _ = split_rows(rows, lambda record: record.prompt, held_out=0.2, seed=2)
    assert other != train


def test_conversations_stay_together_and_small_changes_make_no_new_prompt():
    def user(text):
        return {"role": "user", "content": text}

    answer = {"role": "assistant", "content": "yes"}
    for number in range(50):
        sides = {
            split_side(f"How is {number}?", 0.5),
            split_side(f"  how IS\n{number}? ", 0.5),
            split_side([user(f"How is {number}?")], 0.5),
            split_side([user(f"How is {number}?"), answer, user("And then?")], 0.5),
        }
        assert len(sides) == 1
    whole = {split_side([user("Hi"), answer, user(f"{n}")], 0.5, by="prompt") for n in range(20)}
    assert whole == {"train", "held_out"}


def test_a_split_with_an_empty_side_is_refused():
    rows = [make(prompt="the only one")]
    with pytest.raises(
        DataError, match=r"no prompt falls on the held-out side of a split by first turn .* or by=\"prompt\""
    ):
        split_rows(rows, lambda record: record.prompt, held_out=0.01)
    with pytest.raises(DataError, match=r"held_out is 1\.5; give a share between 0 and 1"):
        split_rows(rows, lambda record: record.prompt, held_out=1.5)
