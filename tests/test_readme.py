"""Every command and every Python example of the README runs, in order, in one folder; only the lengths of runs are cut."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ingot.cli import main
from ingot.data.rows import RankedList, read_rows
from ingot.losses import advantages, best_of_n, distillation, kl, policy, preference, reward, sft
from ingot.world import documents

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORTER = {"--max-steps": "4", "--max-time": "20m", "--max-new-tokens": "8", "--vocab-size": "400"}


def blocks(language: str) -> list[str]:
    """The fenced blocks of that language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """The shell lines of the README, comments cut off."""
    lines = [line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def shortened(words: list[str]) -> list[str]:
    """The same command with a few steps instead of many."""
    cut = [SHORTER.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    if words[:2] == ["ingot", "pretrain"] and "--max-steps" not in words and "--max-time" not in words:
        cut += ["--max-steps", "4" if "--resume" not in words else "6"]
    if words[:2] == ["ingot", "pretrain"] and "--recipe" in words:
        cut += ["--vocab-size", "256" if "shakespeare" in " ".join(words) else "400"]
    if words[1] in ("demo", "sft", "reward", "dpo"):
        cut += ["--max-steps", "4"]
    if words[1] in ("chat", "sample", "compare"):
        cut += ["--max-new-tokens", "8"]
    if words[1] in ("ppo", "grpo", "distill"):
        cut += ["--max-steps", "2", "--per-device-train-batch-size", "8"]
        cut += [{"ppo": "--response-length", "grpo": "--max-completion-length"}.get(words[1], "--max-new-tokens"), "8"]
    if words[1] in ("dpo", "ppo", "grpo", "distill"):
        # Nothing that was trained for four steps passes its gate.
        cut += ["--force"]
    return cut


@pytest.mark.timeout(600)
def test_commands_and_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "\n".join(document.text for document in documents(seed=5, split="train", count=400))
    for name in ("tinyshakespeare.txt", "other.txt", "more.txt", "a.txt", "b.txt"):
        Path(name).write_text(text, encoding="utf-8")
    transcript = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: No."}
    Path("transcripts.jsonl").write_text(json.dumps(transcript) + "\n", encoding="utf-8")
    prompts = [{"prompt": [{"role": "user", "content": f"Prompt {number}"}]} for number in range(30)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8")
    demos = [{**prompt, "completion": [{"role": "assistant", "content": "An answer."}]} for prompt in prompts]
    for number, row in enumerate(demos):
        row["prompt"] = [{"role": "user", "content": f"Question {number}"}]
    Path("demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in demos), encoding="utf-8")
    # A ranking, ratings and answers to the questions for each group, and a word too many; to a chat, they are questions.
    typed = ["1 2 3 4", "6 2 2 2", "", "2 1 3 4", "7 7 7 7", ""] * 20 + ["q"]
    Path("my_reward.py").write_text(
        "def score(prompts, completions):\n    return [float(len(str(c))) for c in completions]\n"
    )
    folder = Path("my-texts")
    folder.mkdir()
    shutil.copy("a.txt", folder / "a.txt")
    ran = 0
    for line in commands():
        words = shlex.split(line)
        if words[0] == "make":
            done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        elif words[0] == "ingot":
            monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed) + "\n"))
            assert main(shortened(words)[1:]) == 0, line
        else:
            assert words[0] in ("pip", "git", "cd"), f"the README has a command that no test runs: {line}"
        ran += 1
    pairs = [pair for row in read_rows("ranked.jsonl") if isinstance(row, RankedList) for pair in row.preferences()]
    assert len(pairs) >= 6 * len(prompts)
    for example in blocks("python"):
        done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        ran += 1
    assert ran >= 8


def test_every_objective_is_explained():
    """docs/losses.md names what there is, and nothing that there is not."""
    named = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")))
    modules = (advantages, best_of_n, distillation, kl, policy, preference, reward, sft)
    functions = {name for module in modules for name, found in vars(module).items() if callable(found)}
    objectives = {name for name in functions if re.search(r"_(loss|advantages)$", name) and not name.startswith("_")}
    assert not objectives - named
    assert not {*preference.LOSS_TYPES, "simpo", "dft", "grpo", "dapo", "bnpo", "dr_grpo", "cispo"} - named
    assert (
        not {name for name in named if re.search(r"_(loss|advantages|bonus|weights|rewards)$", name)}
        - functions
        - {"z_loss"}
    )


def test_every_figure_of_the_readme_names_its_command():
    """A table of figures is followed by the command that printed it."""
    for table in re.findall(r"(?:^\|.*\n)+(?:\n.*){0,6}", README, flags=re.MULTILINE):
        if re.search(r"\d+\.\d+ ?(?:s|ms|x|MB/s|GB)\b", table):
            assert re.search(r"`(?:make|ingot|python)[^`]*`", table), table
