"""What is refused before a run has begun leaves no folder that stands in the way of the next try, and takes nothing of others away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ingot.cli import main
from ingot.errors import ConfigError, DataError, RunError
from ingot.tokenizer import Tokenizer
from ingot.training import phases
from ingot.training.runs import RunFolder
from killable_dpo import pairs, write_chat_model

REWARD = "def low(prompts, completions):\n    return [float(len(text)) for text in completions]\n"


def asked(number: int) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": f"{number}?"}]}


def demonstration(number: int) -> dict[str, Any]:
    return {"messages": [*asked(number)["prompt"], {"role": "assistant", "content": "ab"[number % 2]}]}


PHASES: dict[str, tuple[list[str], Any, str]] = {
    "sft": (["--model", "model", "--data", "rows"], demonstration, "messages"),
    "dpo": (["--model", "model", "--data", "rows"], lambda n: pairs(60)[n], "chosen"),
    "reward": (["--model", "model", "--data", "rows"], lambda n: pairs(60)[n], "chosen"),
    "distill": (
        ["--model", "model", "--teacher", "teacher", "--data", "rows", "--max-new-tokens", "4"],
        asked,
        "prompt",
    ),
    "grpo": (
        ["--model", "model", "--prompts", "rows", "--reward", "reward.py:low", "--max-completion-length", "4"],
        asked,
        "prompt",
    ),
    "ppo": (
        ["--model", "model", "--prompts", "rows", "--reward", "reward.py:low", "--response-length", "4"],
        asked,
        "prompt",
    ),
}
"""By phase: what it is called with, a good row, and the field that a bad row spoils."""


@pytest.mark.parametrize("name", PHASES)
def test_bad_rows_leave_no_folder_and_the_second_try_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, good, spoiled = PHASES[name]
    for folder in ("model", "teacher"):
        write_chat_model(Path(folder))
    Path("reward.py").write_text(REWARD)
    rows = [good(number) for number in range(60)]
    bad = [{**row, spoiled: 5} if number == 30 else row for number, row in enumerate(rows)]
    command = [name, *arguments, "--output", "new/runs/run", "--max-steps", "1", "--threads", "1"]
    command += ["--per-device-train-batch-size", "8", "--held-out", "0.2"]
    Path("rows").write_text("".join(json.dumps(row) + "\n" for row in bad))
    assert main(command) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f'rows, row 31: field "{spoiled}' in line
    assert not Path("new").exists()
    Path("rows").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 1


def test_too_little_text_to_pretrain_on_leaves_no_folder(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("a")
    command = ["pretrain", "--data", str(tmp_path / "text.txt"), "--output", str(tmp_path / "runs" / "run")]
    assert main(command) == 1
    assert "text.txt" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "run").exists()
    (tmp_path / "text.txt").write_text("abc " * 500)
    shape = ["--max-steps", "1", "--max-length", "16", "--sample-tokens", "0", "--threads", "1"]
    assert main([*command, *shape]) == 0


def begin_and_fail(path: Path, error: BaseException, *, begun: bool = False, note: str | None = None) -> None:
    with RunFolder.create(path, "sft", {"seed": 1}) as folder:
        folder.save_tokenizer(Tokenizer.bytes_only())
        assert (path / "tokenizer.json").is_file()
        if begun:
            folder.begun()
        if note is not None:
            (path / note).write_text("mine")
        raise error


def refuse(path: Path, error: BaseException, **how: Any) -> None:
    with pytest.raises(type(error)):
        begin_and_fail(path, error, **how)


@pytest.mark.parametrize("error", [DataError("row 3"), ConfigError("too long"), RunError("too large")])
def test_what_was_there_before_stays(error, tmp_path):
    refuse(tmp_path / "a" / "b", error)
    assert list(tmp_path.iterdir()) == []
    kept = tmp_path / "kept"
    kept.mkdir()
    refuse(kept, error)
    assert list(kept.iterdir()) == []
    # Left by a run that was killed in its first instant, and by others.
    for name in ("sft.toml", ".note"):
        (kept / name).write_text("")
    refuse(kept, error)
    assert sorted(path.name for path in kept.iterdir()) == [".note", "sft.toml"]
    other = tmp_path / "other" / "run"
    refuse(other, error, note="notes.txt")
    assert [path.name for path in other.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("error", "begun"),
    [(KeyboardInterrupt(), False), (OSError("no space"), False), (RunError("not finite"), True)],
)
def test_what_was_stopped_or_had_begun_can_go_on(error, begun, tmp_path):
    refuse(tmp_path / "run", error, begun=begun)
    found = {path.name for path in (tmp_path / "run").iterdir()}
    assert found == {"run.json", "sft.toml", "tokenizer.json", "tokenizer_config.json"}
    # Whoever goes on with it, and is refused, takes nothing away either.
    with pytest.raises(DataError), RunFolder.open(tmp_path / "run"):
        raise DataError("row 3")
    assert {path.name for path in (tmp_path / "run").iterdir()} == found


def test_a_run_has_begun_when_its_first_step_comes(tmp_path, monkeypatch):
    """So that a loss that is no number, say, does not take the run away."""
    write_chat_model(tmp_path / "model")
    rows = [demonstration(number) for number in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    begin = phases.begin

    def fail_after(*arguments: Any) -> None:
        begin(*arguments)
        raise RunError("not finite")

    monkeypatch.setattr(phases, "begin", fail_after)
    run = tmp_path / "run"
    command = ["sft", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows.jsonl"), "--output", str(run)]
    assert main([*command, "--max-steps", "1", "--threads", "1"]) == 1
    monkeypatch.undo()
    assert main(["sft", "--resume", str(run)]) == 0
