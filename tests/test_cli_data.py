"""``ingot data`` as a person types it: what is printed, what is written, exit codes."""

from __future__ import annotations

import gzip
import json

import pytest

from ingot.cli import main
from ingot.tokenizer import Tokenizer

DIALOGUE = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "low\tlower\x1b[0m"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tokenizer that knows no template."""
    folder = tmp_path_factory.mktemp("base")
    Tokenizer.train(iter(["low lower lowest hello hello"] * 3), vocab_size=265).save(folder)
    return folder


def run(capsys, *arguments):
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- check


def test_good_rows_are_said_to_be_good(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", *[{"prompt": "hi", "completion": "x" * n} for n in range(1, 101)])
    code, out, err = run(capsys, "data", "check", path)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"{path}: prompt-completion, plain text; 100 of 100 rows good; every row can be used",
        "  length in characters: median 53, 95 % up to 98, longest 102",
    ]


def test_every_bad_row_is_named_and_the_exit_code_is_1(tmp_path, capsys):
    rows = [{"messages": DIALOGUE}, {"messages": DIALOGUE[:1]}, {"text": "x"}, {"messages": DIALOGUE, "id": 2}]
    path = write(tmp_path / "a.jsonl", *rows)
    code, out, _ = run(capsys, "data", "check", path)
    lines = out.splitlines()
    assert code == 1
    assert lines[0] == (
        f'{path}, row 2: field "messages" has no assistant message, so that there is nothing to learn; add the answer'
    )
    assert lines[1].startswith(
        f"{path}, row 3: is language modelling (plain text), but the file is language modelling (conversational)"
    )
    assert (
        lines[2] == f"{path}: language modelling, conversational; 2 of 4 rows good; 2 rows cannot be used (named above)"
    )
    assert lines[4] == "  1 row said before (row 4 repeats row 1): remove those that you do not mean to weigh twice"


def test_lengths_in_tokens_and_rows_that_training_will_drop(tmp_path, base, capsys):
    path = write(tmp_path / "a.jsonl", {"prompt": "hi", "completion": "y" * 50}, {"prompt": "hi", "completion": "y"})
    code, out, _ = run(capsys, "data", "check", path, "--tokenizer", base, "--max-length", 20)
    assert code == 0
    # <|endoftext|> h i, the y, <|endoftext|>
    assert "length in tokens: median 54, 95 % up to 54, longest 54" in out
    assert "1 row (50.0 %) longer than --max-length 20: training drops them whole; none is cut" in out
    code, out, _ = run(capsys, "data", "check", path, "--tokenizer", base, "--max-length", 54)
    assert "longer than" not in out
    prompts = write(tmp_path / "p.jsonl", {"prompt": DIALOGUE[:1]}, {"prompt": DIALOGUE[:1]})
    assert "prompt-only, conversational; 2 of 2" in run(capsys, "data", "check", prompts, "--tokenizer", base)[1]


def test_facts_as_json(tmp_path, base, capsys):
    good = write(tmp_path / "a.jsonl", {"prompt": "hi"}, {"prompt": "hi"})
    bad = write(tmp_path / "b.jsonl", {"prompt": 3})
    code, out, _ = run(capsys, "data", "check", good, bad, "--json", "--tokenizer", base, "--max-length", 2)
    facts = json.loads(out)
    assert code == 1
    assert facts["num_bad"] == 1
    first, second = facts["files"]
    assert first == {
        "file": str(good),
        "kind": "prompt-only, plain text",
        "num_rows": 2,
        "num_bad": 0,
        "num_duplicates": 1,
        "unit": "tokens",
        "lengths": {"median": 3, "p95": 3, "max": 3},
        "max_length": 2,
        "num_too_long": 2,
        "problems": [],
    }
    assert second["problems"] == [
        {"row": 1, "field": "prompt", "problem": "is the number 3", "fix": "give a string or a list of messages"}
    ]


@pytest.mark.parametrize(
    ("arguments", "message", "exit_code"),
    [
        ((), "nothing to check: name files of rows", 2),
        (("missing.jsonl",), "missing.jsonl: no such file", 1),
        (("a.jsonl", "--max-length", "9"), "--max-length counts tokens: give --tokenizer too", 2),
    ],
)
def test_check_needs_its_arguments(arguments, message, exit_code, capsys):
    code, _, err = run(capsys, "data", "check", *arguments)
    assert (code, err) == (exit_code, f"ingot: {message}\n")


def test_an_empty_file_is_no_good_data(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl")
    assert run(capsys, "data", "check", path)[:2] == (1, f"{path}: no row in it\n")


def test_transcripts_are_pointed_to_their_importer(tmp_path, capsys):
    path = write(
        tmp_path / "a.jsonl", {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    )
    code, out, _ = run(capsys, "data", "check", path)
    assert code == 0
    assert f"ingot data import hh {path} --output pairs.jsonl" in out


# ---- show


def test_tokens_are_shown_as_the_model_sees_them(tmp_path, base, capsys):
    path = write(tmp_path / "a.jsonl", {"messages": DIALOGUE}, {"messages": DIALOGUE})
    code, out, err = run(capsys, "data", "show", path, "--tokenizer", base, "--rows", 1)
    assert (code, err) == (0, "")
    tokenizer = Tokenizer.from_file(base)

    def cut(text):
        return "|".join(tokenizer.token_bytes(token).decode() for token in tokenizer.encode_ordinary(text))

    def count(text):
        return len(tokenizer.encode_ordinary(text))

    answer = count(DIALOGUE[1]["content"])
    assert out.splitlines() == [
        "written by the built-in chat template; a turn of the assistant ends with <|im_end|> (id 266)",
        "the tokenizer has no <|im_start|>, <|im_end|>, <|pad|> yet: shown as ingot sft adds them",
        "trained tokens are between [[ and ]], tokens divided by |; \u23ce is a new line, "
        "\u00d73 after a character says that it takes 3 tokens",
        f"--- row 1, language modelling: {8 + count('user') + count('hello') + count('assistant') + answer} tokens, {answer + 1} trained",
        f"<|endoftext|>|<|im_start|>|{cut('user')}|\u23ce",
        f"{cut('hello')}|<|im_end|>|\u23ce",
        f"<|im_start|>|{cut('assistant')}|\u23ce",
        f"[[{cut('low')}|\u21e5|{cut('lower')}|\\x1b|[|0|m|<|im_end|>]]",
    ]


def test_characters_of_several_tokens_can_be_read(tmp_path, base, capsys):
    row = {"prompt": "\u00e4\u20ac", "completion": "\U0001f600 x"}
    _, out, _ = run(capsys, "data", "show", write(tmp_path / "a.jsonl", row), "--tokenizer", base)
    assert out.splitlines()[-1] == "<|endoftext|>|\u00e4\u00d72|\u20ac\u00d73[[\U0001f600\u00d74| |x|<|endoftext|>]]"


def test_colour_marks_the_same_tokens(tmp_path, base, capsys):
    path = write(tmp_path / "a.jsonl", {"messages": DIALOGUE})
    _, out, _ = run(capsys, "data", "show", path, "--tokenizer", base, "--color", "always")
    assert "trained tokens are green" in out
    assert "\x1b[32mlow" in out or "\x1b[92mlow" in out
    assert "\x1b[0m\x1b[0m" not in out
    assert "[[" not in out
    green = [part for part in out.split("\x1b[") if part.startswith(("32m", "92m", "1;32m", "1;92m"))]
    assert green[0].endswith("low")
    parts = out.split("\x1b[")
    assert all(part.startswith("1;") for part in parts if "<|im_" in part and "id 266" not in part)
    assert not any(part.startswith("1;") for part in parts if part.endswith("low"))
    assert green[-1].endswith("<|im_end|>")


def test_each_sequence_of_a_row_has_its_name(tmp_path, base, capsys):
    def names(row):
        _, out, _ = run(capsys, "data", "show", write(tmp_path / "a.jsonl", row), "--tokenizer", base, "--json")
        return [json.loads(line)["sequence"] for line in out.splitlines()]

    assert names({"prompt": "hi", "chosen": "a", "rejected": "b"}) == ["chosen", "rejected"]
    assert names({"prompt": "hi", "completion": "a", "label": False}) == ["not wanted"]
    assert names({"prompt": "hi", "responses": ["a", "b"], "ranks": [2, 1]}) == [
        "response 1 (rank 2)",
        "response 2 (rank 1)",
    ]
    assert names({"prompt": "hi", "responses": ["a", "b"]}) == ["response 1", "response 2"]
    assert names({"prompt": "hi", "completions": ["a", "b"], "labels": [True, False]}) == ["steps right, wrong"]
    assert names({"prompt": "hi"}) == ["prompt (the model writes on from its end)"]


def test_ids_as_json_are_those_of_training(tmp_path, base, capsys):
    path = write(tmp_path / "a.jsonl", *[{"prompt": "hi", "completion": "x" * n} for n in range(1, 6)])
    _, out, _ = run(capsys, "data", "show", path, "--tokenizer", base, "--json", "--start", 3, "--rows", 2)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["row"] for row in rows] == [3, 4]
    assert rows[0]["tokens"] == ["<|endoftext|>", "h", "i", "x", "x", "x", "<|endoftext|>"]
    assert rows[0]["trained"] == [0, 0, 0, 1, 1, 1, 1]


def test_bad_rows_are_named_while_the_others_are_shown(tmp_path, base, capsys):
    path = write(tmp_path / "a.jsonl", {"prompt": ""}, {"prompt": "hi"})
    code, out, err = run(capsys, "data", "show", path, "--tokenizer", base)
    assert code == 1
    assert err == f'{path}, row 1: field "prompt" is empty; write what is to be answered, or remove the row\n'
    assert "--- row 2, prompt" in out
    code, _, err = run(capsys, "data", "show", path, "--tokenizer", base, "--start", 3)
    assert (code, err) == (2, f"ingot: {path}: has no row 3: give a smaller --start\n")
    assert (
        run(capsys, "data", "show", path, "--tokenizer", base, "--rows", 0)[2]
        == "ingot: --rows and --start are at least 1\n"
    )


def test_a_template_without_an_end_of_turn_is_refused(tmp_path, base, capsys):
    folder = tmp_path / "model"
    Tokenizer.from_file(base).save(folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    path = write(tmp_path / "a.jsonl", {"messages": DIALOGUE})
    code, _, err = run(capsys, "data", "show", path, "--tokenizer", folder)
    assert code == 1
    assert "chat_template.jinja: writes no special token of the tokenizer at the end of an assistant message" in err
    assert err.count("\n") == 1


# ---- import


def talk(answer):
    return f"\n\nHuman: hi\n\nAssistant: {answer}"


def test_imported_rows_pass_the_check(tmp_path, capsys):
    source = tmp_path / "hh.jsonl.gz"
    records = [{"chosen": talk("ä"), "rejected": talk("b")}, {"chosen": talk("a"), "rejected": talk("a")}]
    source.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode()))
    target = tmp_path / "pairs.jsonl"
    code, out, err = run(capsys, "data", "import", "hh", source, "--output", target)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"{source}, row 2: dropped: chosen and rejected are the same",
        f"2 records -> 1 row, 1 dropped (named above): {target}",
    ]
    assert "ä" in target.read_text(encoding="utf-8")
    assert run(capsys, "data", "check", target)[0] == 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["hh.jsonl.gz", "pairs.jsonl"]
    again = run(capsys, "data", "import", "hh", source, "--output", target)
    assert again == (2, "", f"ingot: --output {target}: exists already; give another name, or remove it\n")
    _, out, _ = run(capsys, "data", "import", "hh", source, "--output", tmp_path / "b.jsonl", "--json")
    assert json.loads(out) == {
        "output": str(tmp_path / "b.jsonl"),
        "num_records": 2,
        "num_rows": 1,
        "dropped": [{"record": 2, "reason": "chosen and rejected are the same"}],
    }


def test_a_file_of_another_format_leaves_nothing_behind(tmp_path, capsys):
    source = write(tmp_path / "a.jsonl", {"text": "x"})
    code, out, err = run(capsys, "data", "import", "alpaca", source, "--output", tmp_path / "b.jsonl")
    assert (code, out) == (1, "")
    assert err == (
        f"ingot: {source}, read as alpaca: none of 1 records gives a row; "
        'the first because it has no field "instruction" (fields there: text)\n'
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    _, _, err = run(capsys, "data", "import", "hh", source, "--output", tmp_path / "no" / "b.jsonl")
    assert (
        err == f"ingot: --output {tmp_path / 'no' / 'b.jsonl'}: there is no folder {tmp_path / 'no'}; make it first\n"
    )
    assert run(capsys, "data", "import", "oasst", source, "--output", tmp_path / "b.jsonl")[0] == 2
