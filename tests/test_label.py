"""Labelling as a person does it: what is typed, what is shown, what is on disk after each judgement, coming back, being many."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from ingot.cli import main
from ingot.errors import ConfigError, DataError
from ingot.feedback.answers import (
    AnswerError,
    describe_ranking,
    match_name,
    parse_failures,
    parse_flag,
    parse_ranking,
    parse_ratings,
)
from ingot.feedback.candidates import Group, read_candidates
from ingot.feedback.criteria import BUILT_IN, load_criterion
from ingot.feedback.display import is_hidden, visible
from ingot.feedback.journal import Journal, read_judgements
from ingot.feedback.schedule import schedule, shown_order
from ingot.feedback.session import Judgement, Session, collect


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch):
    """Nothing here cuts the power: a write need not wait for the disk, which may be busy."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def rows(count, size=3):
    return [
        {
            "prompt": f"question {n}?",
            "responses": [f"answer {n}{letter}" for letter in "abcdefgh"[:size]],
            "sources": [f"model-{letter}" for letter in "abcdefgh"[:size]],
        }
        for n in range(count)
    ]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def desk(tmp_path, monkeypatch, capsys):
    """Type lines into `ingot label` on a file of candidates; gives exit code, what was printed, and the records."""

    class Desk:
        candidates = tmp_path / "candidates.jsonl"
        output = tmp_path / "ranked.jsonl"

        def label(self, typed, *more, labeler="me"):
            monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in typed)))
            command = ["label", str(self.candidates), "--output", str(self.output), "--labeler", labeler, *more]
            self.code = main(command)
            self.out, self.err = capsys.readouterr()
            self.shown = " ".join(self.out.split())
            return self.records()

        def records(self):
            return Journal(self.output).records

        def group(self, n):
            return read_candidates(self.candidates).groups[n]

        def order(self, n, repeat=0, labeler="me"):
            group = self.group(n)
            size = len(group.responses)
            return shown_order(size, seed=0, labeler=labeler, group_id=group.group_id, repeat=repeat)

    write(Desk.candidates, rows(3))
    return Desk()


PLAIN = ("--no-ratings", "--questions", "--repeats", "0")


def test_a_ranking_is_written_in_the_order_of_the_file(desk):
    (record, *_) = desk.label(["2 1=3", "5 7 4", "hon 1 harm 1,3", "q"])
    assert desk.code == 0
    order = desk.order(0)
    shown_ranks, shown_ratings, honest = (2, 1, 2), (5, 7, 4), (False, True, True)
    assert [record.ranks[place] for place in order] == list(shown_ranks)
    assert [record.ratings[place] for place in order] == list(shown_ratings)
    assert [record.answers["honest"][place] for place in order] == list(honest)
    assert [record.answers["harmless"][place] for place in order] == [False, True, False]
    assert record.answers["helpful"] == (True, True, True)
    assert record.order == order
    assert record.responses == tuple(rows(1)[0]["responses"])
    assert record.source_models == ("model-a", "model-b", "model-c")
    assert (record.annotator, record.criterion, record.status, record.kind) == ("me", "helpful", "judged", "new")
    assert record.rubric == BUILT_IN["helpful"].rubric
    assert record.time_s >= 0
    assert record.created.endswith("+00:00")
    assert "1 judged; 2 left" in desk.shown


def test_the_order_of_showing_never_changes_what_was_said(desk):
    write(desk.candidates, rows(12, size=4))
    records = desk.label(["3 1 4 2", "1 2 3 4"] * 6, *PLAIN)
    said = [(2, 4, 1, 3), (1, 2, 3, 4)]
    assert len({record.order for record in records}) > 5
    for number, record in enumerate(records):
        assert record.order == desk.order(number)
        shown = tuple(record.ranks[place] for place in record.order)
        assert shown == said[number % 2]


def test_what_is_shown_is_blind_and_in_the_recorded_order(desk):
    write(desk.candidates, [{**row, "group_id": f"secret-{n}"} for n, row in enumerate(rows(3))])
    desk.label(["1 2 3", "", "", "q"])
    assert "model-" not in desk.out
    assert "secret-" not in desk.out
    places = [desk.out.index(f"answer 0{'abc'[place]}") for place in desk.order(0)]
    assert places == sorted(places)
    assert "question 0?" in desk.out
    assert "1 > 2 > 3" in desk.out


def test_the_row_is_a_ranked_list_that_any_reader_knows(desk):
    desk.label(["1 2 3", "", "", "q"])
    (row,) = map(json.loads, desk.output.read_text().splitlines())
    assert row["ranks"] == [row["order"].index(place) + 1 for place in range(3)]
    assert {"prompt", "responses", "ranks", "group_id", "annotator", "criterion"} <= row.keys()
    # What was not said is not there.
    assert not {"ratings", "answers", "flags", "note", "gold_ranks", "revises"} & row.keys()


def test_flags_notes_and_views(desk):
    (record, *_) = desk.label(
        ["f unsafe 2", "f off 1 3", "f off 3", "f bad", "n a note\x1b[2J", "v 2", "v", "h", "g", "3 2 1", "", "", "q"]
    )
    order = desk.order(0)
    assert record.flags == {"unsafe": (order[1],), "off-task": (order[0],), "bad-premise": ()}
    assert record.note == "a note\x1b[2J"
    assert "flags: unsafe 2, off-task 1, bad-premise" in desk.out
    assert "\x1b" not in desk.out
    assert "noted: a note\\x1b[2J" in desk.out
    # First, v 2, v: and the guideline and the help once more.
    assert desk.out.count(f"answer 0{'abc'[order[1]]}") == 3
    assert desk.out.count(f"answer 0{'abc'[order[0]]}") == 2
    assert desk.out.count("what to look for: helpful") == 2
    assert "flag unsafe" in desk.shown


def test_mistakes_are_named_and_asked_again(desk):
    (record, *_) = desk.label(
        ["", "1 2", "1 2 2", "9 1 2", "x", "v 7", "f loud", "2 3 1", "5 5", "8 1 1", "", "hon", "ok"]
    )
    for message in (
        "rank the responses, best first",
        "3 missing; rank every response",
        "response 2 is there twice",
        "there is no response 9; they are 1 to 3",
        "'x' is not a ranking such as 2 1=3",
        "there is no response 7",
        "'loud' is not unsafe, off-task or bad-premise",
        "2 ratings for 3 responses",
        "'8' is no rating",
        "which response fails 'honest'?",
    ):
        assert message in desk.shown
    assert record.ratings is None
    assert record.answers == dict.fromkeys(BUILT_IN, (True,) * 3)


def test_every_judgement_is_on_disk_before_the_next_question(tmp_path):
    """kill -9 while the labeller looks at the second item: the first is there, and the same command goes on with the second."""
    candidates, output = write(tmp_path / "candidates.jsonl", rows(3)), tmp_path / "ranked.jsonl"
    command = [sys.executable, "-m", "ingot.cli", "label", str(candidates), "--output", str(output), "--labeler", "me"]
    with subprocess.Popen(command + list(PLAIN), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        process.stdin.write(b"1 2 3\n")
        process.stdin.flush()
        deadline = time.monotonic() + 60
        while (not output.exists() or not output.read_bytes().endswith(b"\n")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    (first,) = read_judgements(output)
    assert first.prompt == "question 0?"
    done = subprocess.run(command + list(PLAIN), input=b"=\n=\n", capture_output=True, check=True)
    assert b"2 of 3" in done.stdout
    assert b"question 0?" not in done.stdout
    assert b"2 judged; none left" in done.stdout
    assert [record.prompt for record in read_judgements(output)] == ["question 0?", "question 1?", "question 2?"]


def test_ctrl_c_keeps_a_ranking_that_was_given(desk, monkeypatch):
    lines = iter(["1 2 3\n"])

    def interrupted():
        for line in lines:
            return line
        raise KeyboardInterrupt

    stdin = io.StringIO()
    monkeypatch.setattr(stdin, "readline", interrupted)
    make = io.StringIO
    monkeypatch.setattr(io, "StringIO", lambda *text: stdin if text else make())
    (record,) = desk.label([])
    assert desk.code == 130
    assert record.ratings is None
    assert "1 judged; 2 left" in desk.shown


def test_the_end_of_the_input_stops_and_keeps_too(desk):
    (record,) = desk.label(["1 2 3"])
    assert desk.code == 0
    assert record.status == "judged"


def test_skip_and_come_back(desk):
    first, second = desk.label(["s", "n odd", "3 2 1", "", "", "q"])
    assert (first.status, first.ranks) == ("skipped", (1, 1, 1))
    assert second.note == "odd"
    assert "1 judged, 1 skipped; 1 left" in desk.shown
    records = desk.label(["=", "", ""])
    assert "question 2?" in desk.shown
    assert "question 0?" not in desk.shown
    assert "3 of 3" in desk.shown
    assert [record.status for record in records] == ["skipped", "judged", "judged"]
    assert len(read_judgements(desk.output)) == 2
    assert desk.label([]) == records
    assert "0 judged; none left" in desk.shown


def test_undo_takes_back_and_the_new_judgement_revises(desk):
    records = desk.label(["1 2 3", "s", "u", "u", "3 2 1", "2 1 3", "q"], *PLAIN)
    one, skip, skip_back, one_back, one_new, two = records
    assert [record.status for record in records] == ["judged", "skipped", "withdrawn", "withdrawn", "judged", "judged"]
    assert (skip_back.revises, one_back.revises, one_new.revises, two.revises) == (skip.id, one.id, one.id, skip.id)
    assert read_judgements(desk.output) == [one_new, two]
    assert desk.shown.count("taken back; here it is again") == 2
    assert "3 judged, 1 skipped, 2 taken back; 1 left" in desk.shown


def test_undo_reaches_into_an_earlier_session_and_no_further_than_oneself(desk):
    desk.label(["1 2 3"], *PLAIN)
    desk.label(["1 2 3"], *PLAIN, labeler="you")
    records = desk.label(["u", "u", "q"], *PLAIN)
    assert [(record.annotator, record.status) for record in records] == [
        ("me", "judged"),
        ("you", "judged"),
        ("me", "withdrawn"),
    ]
    assert "nothing to take back" in desk.shown
    # Stopped after an undo: the item comes again, and the judgement still says what it revises.
    *_, new = desk.label(["3 2 1", "q"], *PLAIN)
    assert new.revises == records[0].id
    assert [record.annotator for record in read_judgements(desk.output)] == ["you", "me"]


def test_undo_within_an_item_goes_back_to_its_ranking(desk):
    desk.label(["1 2 3", "", ""])
    records = desk.label(["1 2 3", "u", "3 2 1", "7 7 7", "", "q"])
    assert [record.status for record in records] == ["judged", "judged"]
    assert records[1].ranks == tuple(3 - desk.order(1).index(place) for place in range(3))
    assert records[1].ratings == (7, 7, 7)


def test_a_disk_that_is_full_loses_no_judgement(desk, monkeypatch):
    write_bytes, full = os.write, [True, True]
    monkeypatch.setattr(os, "write", lambda d, data: write_bytes(d, data[:5] if full and full.pop() else data))
    monkeypatch.setattr("ingot.feedback.terminal.Keyboard.__init__", lambda self: setattr(self, "interactive", True))
    monkeypatch.setattr("builtins.input", lambda prompt: sys.stdin.readline().strip())
    (record,) = desk.label(["1 2 3", "", "", "q"], *PLAIN)
    assert record.status == "judged"
    assert desk.shown.count("NOT SAVED") == 2
    assert "No space left" in desk.shown


def test_the_summary_for_programs(desk):
    desk.label(["1 2 3", "s", "u", "=", "q"], *PLAIN, "--json")
    assert json.loads(desk.out) == {
        "output": str(desk.output),
        "labeler": "me",
        "criterion": "helpful",
        "judged": 2,
        "skipped": 1,
        "taken_back": 1,
        "done": 2,
        "remaining": 1,
    }
    assert "question 0?" in desk.err


def test_a_limit_ends_the_session(desk):
    assert len(desk.label(["=", "=", "="], *PLAIN, "--limit", "2")) == 2


HOSTILE = "\x1b]0;title\x07\x1b[2J\x9b31m\x08\r\x7f\u202ereversed\u2066\u200b\ud800 [bold]markup[/bold] \U000e0041"


def test_text_cannot_command_the_terminal(desk):
    row = {"prompt": [{"role": "us\x1ber", "content": HOSTILE}], "responses": [HOSTILE, HOSTILE + "!"]}
    write(desk.candidates, [row])
    (record,) = desk.label(["1 2"], *PLAIN)
    assert not [character for character in desk.out if is_hidden(character) or ord(character) > 0xFFFF]
    for written in ("\\x1b]0;title\\x07", "\\x9b31m", "\\u202ereversed", "\\ud800", "[bold]markup[/bold]", "us\\x1ber"):
        assert written in desk.out
    # The record holds the text as it was.
    assert record.responses == (HOSTILE, HOSTILE + "!")


def at_a_terminal(command, typed, height=24, width=72):
    """What a program writes to a terminal of this size while somebody answers each of its questions."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(width), "LINES": str(height)}
    # Ctrl-C reaches those whose own terminal it is.
    own = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", own, *command],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        start_new_session=True,
    )
    os.close(theirs)
    written, seen, deadline = b"", 0, time.monotonic() + 120
    waiting = list(typed)
    while time.monotonic() < deadline:
        if not select.select([ours], [], [], 1.0)[0]:
            if not waiting and typed[-1] == b"\x03":
                # Pressed while the line editor was being set up, it is noticed at the next key only: a person presses again.
                os.write(ours, b"\x03")
            continue
        try:
            written += os.read(ours, 65536)
        except OSError:
            break
        # A question ends the line that the cursor is on.
        if waiting and re.search(rb"(> |--)$", re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", written[seen:])):
            seen = len(written)
            os.write(ours, waiting.pop(0))
    process.kill()
    os.close(ours)
    return process.wait(), written.decode()


def test_a_real_terminal_gets_colours_and_nothing_else_from_hostile_text(tmp_path):
    long = "\n".join(f"line {n}" for n in range(30))
    row = {"prompt": HOSTILE, "responses": [HOSTILE + long, HOSTILE + "!"]}
    candidates, output = (
        write(tmp_path / "candidates.jsonl", [row, row | {"prompt": "second"}]),
        tmp_path / "ranked.jsonl",
    )
    command = [sys.executable, "-m", "ingot.cli", "label", str(candidates), "--output", str(output), "--labeler", "me"]
    # Two pages, the ranking, its correction with the backspace key, Ctrl-C at the second item.
    typed = [b"\n", b"1 3\x7f2\n", b"q\x7f\n", b"\n", b"\n", b"\x03"]
    code, written = at_a_terminal(command, typed)
    assert code == 130, written
    assert "more lines: Enter --" in written
    assert "\x1b[1;36m" in written
    left = re.sub(r"\x1b\[(\?2004[hl]|[0-9;]*[mK]|C)", "", written)
    assert not [character for character in left if is_hidden(character) and character not in "\r\x08\x07"]
    # A bell or a backspace of the line editor, but none of the text.
    assert "title\\x07" in left
    (record,) = read_judgements(output)
    assert [record.ranks[place] for place in record.order] == [1, 2]
    assert "1 judged; 1 left" in left


def test_a_terminal_without_unicode_gets_escapes(tmp_path):
    candidates = write(tmp_path / "candidates.jsonl", [{"prompt": "Wie schön?", "responses": ["“so”", "so"]}])
    command = [sys.executable, "-m", "ingot.cli", "label", str(candidates), "--output", str(tmp_path / "ranked.jsonl")]
    done = subprocess.run(
        [*command, "--labeler", "me", *PLAIN],
        input=b"1 2\n",
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert b"Wie sch\\xf6n?" in done.stdout
    assert b"\\u201cso\\u201d" in done.stdout
    assert b"\\u25" not in done.stdout
    assert read_judgements(tmp_path / "ranked.jsonl")[0].responses == ("“so”", "so")


@given(st.text())
def test_visible_text_has_nothing_hidden_and_plain_text_is_left_alone(text):
    assert not any(map(is_hidden, visible(text)))
    if not any(map(is_hidden, text)):
        assert visible(text) == text


def test_messages_are_shown_with_their_roles_and_long_text_is_wrapped(desk):
    prompt = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "second"}]
    responses = [[{"role": "assistant", "content": "word " * 100}], "x" * 250, ""]
    write(desk.candidates, [{"prompt": prompt, "responses": responses}])
    desk.label(["=", "q"], *PLAIN)
    assert max(map(len, desk.out.splitlines())) <= 100
    assert "user: first assistant: second" in desk.shown
    assert desk.out.count("word") == 100
    assert desk.out.count("x" * 90) == 2
    assert "(empty)" in desk.out


def test_a_criterion_of_ones_own(desk, tmp_path):
    own = tmp_path / "concise.toml"
    own.write_text('name = "concise"\nversion = "3"\nguideline = """\nFewer words.\n"""\n')
    (record,) = desk.label(["1 2 3", "con 2", "q"], "--no-ratings", "--criterion", str(own), "--questions", str(own))
    assert record.criterion == "concise"
    assert record.rubric["version"] == "3"
    assert [record.answers["concise"][place] for place in desk.order(0)] == [True, False, True]
    assert "Fewer words." in desk.out
    # A guideline that changes on the way is told.
    own.write_text('name = "concise"\nversion = "3"\nguideline = "Many words."\n')
    desk.label(["q"], "--criterion", str(own))
    assert "the guideline of 'concise' changed since 1 of the judgements there were made" in desk.shown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("name =", "not valid TOML"),
        ('name = "x"', "no text in 'guideline'"),
        ('guideline = "x"', "no text in 'name'"),
        ('name = "a b"\nguideline = "x"', "is not one word"),
        ('name = "honest"\nguideline = "x"', "is that of a built-in criterion"),
        ('name = "x"\nguideline = "x"\nscale = 3', "unknown field 'scale'"),
    ],
)
def test_a_bad_criterion_is_named(tmp_path, content, message):
    path = tmp_path / "own.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"own\.toml.*" + message):
        load_criterion(str(path))
    with pytest.raises(
        ConfigError, match=r"criterion 'nice': not built in \(helpful, honest, harmless\); give a \.toml"
    ):
        load_criterion("nice")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "a list, not an object"),
        ('{"prompt": "p", "completion": "c"}', r'no field "responses" \(fields there: prompt, completion\)'),
        ('{"prompt": 3, "responses": ["a", "b"]}', '"prompt" is a int'),
        ('{"prompt": "p", "responses": ["a"]}', "has 1 entries; at least two are needed"),
        ('{"prompt": "p", "responses": ["a", null]}', 'response 2 in "responses" is a NoneType'),
        (
            '{"prompt": "p", "responses": ["a", "b"], "sources": ["x"]}',
            '"sources" is not a list with one entry for each',
        ),
        (
            '{"prompt": "p", "responses": ["a", "b"], "sources": ["x", 1]}',
            '"sources" holds something that is no string',
        ),
        ('{"prompt": "p", "responses": ["a", "b"], "group_id": [1]}', '"group_id" is a list'),
        ('{"prompt": "p", "responses": ["a", "b"], "group_id": "one"}', "'one' is that of row 1, with other content"),
    ],
)
def test_a_bad_candidate_is_named_by_file_and_row(desk, row, message):
    good = json.dumps({"prompt": "p", "responses": ["x", "y"], "group_id": "one"})
    desk.candidates.write_text(good + "\n\n" + row + "\n")
    with pytest.raises(DataError, match=r"candidates\.jsonl, row 3: .*" + message):
        read_candidates(desk.candidates)
    desk.label([])
    assert desk.code == 1
    assert desk.err.startswith(f"ingot: {desk.candidates}, row 3: ")
    assert desk.err.count("\n") == 1


def test_candidates_come_from_any_file_of_rows(tmp_path):
    import pyarrow
    from pyarrow import parquet

    lines = [{"prompt": f"p{n}", "responses": ["a", "b"]} for n in range(3)]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(content))
    (tmp_path / "a.json").write_text(json.dumps(lines))
    parquet.write_table(pyarrow.Table.from_pylist(lines), tmp_path / "a.parquet")
    expected = read_candidates(tmp_path / "a.jsonl").groups
    assert [group.prompt for group in expected] == ["p0", "p1", "p2"]
    for path in sorted(tmp_path.iterdir()):
        assert read_candidates(path).groups == expected, path
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content)[:-9])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be decompressed .* cut short"):
        read_candidates(tmp_path / "a.jsonl.gz")


def test_what_can_be_judged_but_not_trained_on_is_told_before(desk):
    write(desk.candidates, [{"prompt": "p", "responses": ["a", "b"]}, {"prompt": "q", "responses": ["a", ""]}])
    assert len(desk.label(["1 2", "1 2"], *PLAIN)) == 2
    assert '1 row to judge but not to train on, the first is row 2, whose field "responses[1]" is empty' in desk.shown
    write(desk.candidates, [{"prompt": "p", "responses": ["a", "b"]}])
    assert read_candidates(desk.candidates).notices == []


def test_bad_flags_and_files_are_named(desk):
    for more, message in (
        (["--overlap", "2"], "overlap is 2.0; give a share from 0 to 1"),
        (["--repeats", "0.9"], "repeats is 0.9; give a share from 0 to 0.5"),
        (["--limit", "0"], "--limit is 0"),
        (["--criterion", "nice"], "criterion 'nice': not built in"),
        (["--gold", "none.jsonl"], "none.jsonl: no such file"),
        (["--output", str(desk.candidates)], "is also what is read"),
        (["--labeler", " "], "labeler is empty"),
    ):
        desk.label([], *more)
        assert desk.code in (1, 2)
        assert message in desk.err
    desk.candidates.write_text("\n")
    desk.label([])
    assert 'nothing to judge; rows look like {"prompt"' in desk.err


def test_other_responses_under_a_known_group_id_are_refused(desk):
    write(desk.candidates, [{"prompt": "p", "responses": ["a", "b"], "group_id": "one"}])
    desk.label(["1 2"], *PLAIN)
    write(desk.candidates, [{"prompt": "p", "responses": ["a", "c"], "group_id": "one"}])
    desk.label(["1 2"], *PLAIN)
    assert "group 'one' was judged with another prompt or other responses" in desk.err


def test_candidates_in_another_order_are_the_same_groups(desk):
    write(
        desk.candidates, [{"prompt": "p", "responses": ["a", "b", "c"]}, {"prompt": "p", "responses": ["b", "c", "a"]}]
    )
    assert len(desk.label(["1 2 3", "1 2 3"], *PLAIN)) == 1
    assert "1 row left out: the same as an earlier one" in desk.shown
    write(desk.candidates, [{"prompt": "p", "responses": ["c", "b", "a"]}])
    assert len(desk.label(["1 2 3"], *PLAIN)) == 1
    assert "none left" in desk.shown


def test_a_line_cut_short_is_told_and_labelling_goes_on(desk):
    desk.label(["1 2 3"], *PLAIN)
    desk.output.write_bytes(desk.output.read_bytes() + b'{"prompt": "cut')
    desk.label(["1 2 3"], *PLAIN)
    assert "its last line is cut short (15 bytes, as after a power cut); it is left out" in desk.shown
    assert "it was moved to" in desk.shown
    assert len(read_judgements(desk.output)) == 2


def test_responses_that_are_the_same_are_shown_once(desk):
    write(
        desk.candidates,
        [
            {"prompt": "p", "responses": ["a", "b", "a"], "sources": ["x", "y", "z"]},
            {"prompt": "q", "responses": ["a", "a"]},
            {"prompt": "p", "responses": ["a", "b", "a"], "sources": ["x", "y", "z"]},
        ],
    )
    (record,) = desk.label(["1 2"], *PLAIN)
    assert record.responses == ("a", "b")
    assert record.source_models == ("x", "y")
    for notice in (
        "1 row left out: all responses are the same",
        "1 row with a response that is there twice",
        "1 row left out: the same as an earlier one",
    ):
        assert notice in desk.shown


# The schedule


def groups(count, size=3):
    return [Group(group_id=f"g{n}", prompt=f"p{n}", responses=tuple("abcdef"[:size])) for n in range(count)]


def gold_groups(count):
    return [Group(group_id=f"gold{n}", prompt="p", responses=("a", "b"), gold_ranks=(1, 2)) for n in range(count)]


def test_repeats_and_gold_come_in_the_asked_shares():
    for labeler in ("me", "you"):
        items = schedule(groups(1000), gold_groups(100), labeler=labeler, repeats=0.08, gold_share=0.05)
        kinds = [item.kind for item in items]
        assert kinds.count("new") == 1000
        assert 0.05 <= kinds.count("repeat") / len(items) <= 0.10
        assert 0.04 <= kinds.count("gold") / len(items) <= 0.06
        assert len({item.key for item in items}) == len(items)
        place = {item.key: number for number, item in enumerate(items)}
        gaps = [number - place[group, 0] for (group, repeat), number in place.items() if repeat]
        assert min(gaps) >= 5
        assert max(gaps) <= 40


def test_labellers_have_schedules_of_their_own_and_each_the_same_every_time():
    def of(labeler, seed=0):
        return [item.key for item in schedule(groups(200), gold_groups(20), labeler=labeler, seed=seed)]

    assert of("me") == of("me")
    assert of("me") != of("you")
    assert of("me") != of("me", seed=1)
    # Groups that are added at the end change nothing before.
    longer = [item.key for item in schedule(groups(260), gold_groups(20), labeler="me")]
    assert longer[:180] == of("me")[:180]


def test_every_order_is_shown_equally_often():
    counts = dict.fromkeys(itertools.permutations(range(3)), 0)
    for n in range(6000):
        counts[shown_order(3, seed=0, labeler="me", group_id=str(n), repeat=0)] += 1
    # Chi-square with 5 degrees of freedom: 20.5 is its 0.999 quantile.
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 20.5
    assert len({shown_order(5, seed=0, labeler="me", group_id="g", repeat=n) for n in range(20)}) > 10


def first(showing):
    return Judgement(ranks=tuple(range(1, len(showing.responses) + 1)))


def test_gold_and_repeats_are_recorded_and_not_told(tmp_path):
    journal = Journal(tmp_path / "ranked.jsonl")
    session = Session(groups(60), journal, labeler="me", gold=gold_groups(5), repeats=0.1, gold_share=0.1)
    shown = []
    records = collect(session, lambda showing: (shown.append(showing), first(showing))[1])
    assert {record.kind for record in records} == {"new", "repeat", "gold"}
    assert all((record.gold_ranks == (1, 2)) == (record.kind == "gold") for record in records)
    repeats = [record for record in records if record.kind == "repeat"]
    assert repeats
    assert all(record.repeat == 1 for record in repeats)
    assert not {"kind", "gold_ranks", "sources"} & {name for showing in shown for name in vars(showing)}
    assert session.next() is None


def test_a_skipped_group_does_not_come_back(tmp_path):
    journal = Journal(tmp_path / "ranked.jsonl")
    records = collect(Session(groups(60), journal, labeler="me", repeats=0.2), lambda showing: None)
    assert len(records) == 60


def test_overlap_divides_the_rest_among_labellers(tmp_path):
    def run(overlap):
        journal = Journal(tmp_path / f"{overlap}.jsonl")
        sessions = [
            Session(groups(200), journal, labeler=name, repeats=0, overlap=overlap) for name in ("ann", "bob", "cid")
        ]
        # In turns, as people do who sit down at the same time.
        while any(collect(session, first, limit=1) for session in sessions):
            pass
        by_group = {}
        for record in journal.records:
            by_group.setdefault(record.group_id, []).append(record.annotator)
        assert len(by_group) == 200
        return [len(names) for names in by_group.values()]

    assert set(run(1.0)) == {3}
    assert set(run(0.0)) == {1}
    some = run(0.2)
    assert set(some) == {1, 3}
    assert 0.1 < some.count(3) / 200 < 0.3


def test_many_people_at_once_lose_no_row(tmp_path):
    candidates, output = write(tmp_path / "candidates.jsonl", rows(12)), tmp_path / "ranked.jsonl"
    people = []
    for name in ("ann", "bob", "cid"):
        command = [
            sys.executable,
            "-m",
            "ingot.cli",
            "label",
            str(candidates),
            "--output",
            str(output),
            "--labeler",
            name,
        ]
        people.append(subprocess.Popen(command + list(PLAIN), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL))
    for person in people:
        person.stdin.write(b"2 3=1\n" * 12)
        person.stdin.close()
    assert [person.wait(120) for person in people] == [0, 0, 0]
    records = read_judgements(output)
    assert sorted(record.annotator for record in records) == ["ann"] * 12 + ["bob"] * 12 + ["cid"] * 12
    assert len({(record.annotator, record.group_id) for record in records}) == 36


# What is typed


@given(st.integers(1, 12).flatmap(lambda size: st.lists(st.integers(1, size), min_size=size, max_size=size)), st.data())
def test_a_ranking_that_is_written_out_is_read_back(ranks, data):
    levels = {rank: number for number, rank in enumerate(sorted(set(ranks)), 1)}
    dense = tuple(levels[rank] for rank in ranks)
    text = describe_ranking(ranks)
    assert parse_ranking(text, len(ranks)) == dense
    assert parse_ranking(text.replace(" > ", data.draw(st.sampled_from([" ", ",", "  >"]))), len(ranks)) == dense
    if len(ranks) <= 9:
        assert parse_ranking(text.replace(" > ", "").replace(" ", ""), len(ranks)) == dense


@given(st.text(alphabet="0123= >,a", max_size=9), st.integers(2, 3))
def test_whatever_is_typed_is_a_ranking_or_a_named_mistake(text, size):
    try:
        ranks = parse_ranking(text, size)
    except AnswerError:
        return
    assert len(ranks) == size
    assert sorted(set(ranks)) == list(range(1, max(ranks) + 1))


def test_typed_answers_by_hand():
    assert parse_ranking("2 1=3", 3) == (2, 1, 2)
    assert parse_ranking("=", 3) == (1, 1, 1)
    for text in ("1==2 3", "=1 2 3", "1 2 3="):
        with pytest.raises(AnswerError, match="= stands between two numbers"):
            parse_ranking(text, 3)
    assert parse_ranking("10 1 2 3 4 5 6 7 8 9", 10)[9] == 1
    assert parse_ratings("7 - 1", 3) == (7, None, 1)
    assert parse_ratings("715", 3) == (7, 1, 5)
    assert parse_ratings("", 3) is parse_ratings("-", 3) is None
    names = ["helpful", "honest"]
    assert parse_failures("hon *", names, 2) == {"helpful": (True, True), "honest": (False, False)}
    assert parse_failures("", names, 2) == {}
    for text, message in (
        ("ho", "which response fails 'honest'"),
        ("h 1", "could be helpful or honest"),
        ("1", "say what 1"),
    ):
        with pytest.raises(AnswerError, match=message):
            parse_failures(text, names, 2)
    assert parse_flag("uns 1,2", 2) == ("unsafe", [0, 1])
    assert match_name("HELP", names) == "helpful"
