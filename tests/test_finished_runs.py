"""How every phase ends: with exit code 0, since its work is done, and a last line that says whether the next stage may build on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ingot.cli import main
from ingot.training import distill, dpo, grpo, ppo, reward_model, sft
from ingot.training.verdicts import Verdict, read_verdict
from killable_ppo import write_inputs, write_policy
from killable_sft import rows, write_rows

PHASES = {
    "sft": (sft, ("--data", "rows.jsonl")),
    "reward": (reward_model, ("--data", "pairs.jsonl")),
    "ppo": (ppo, ("--prompts", "prompts.jsonl", "--reward-model", "rm", "--response-length", "4")),
    "grpo": (grpo, ("--prompts", "prompts.jsonl", "--reward", "reward.py:letters", "--max-completion-length", "4")),
    "dpo": (dpo, ("--data", "pairs.jsonl")),
    "distill": (distill, ("--data", "prompts.jsonl", "--teacher", "teacher", "--max-new-tokens", "4")),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    write_policy(folder / "teacher")
    write_rows(folder / "rows.jsonl", rows())
    message = [{"role": "user", "content": "?"}]
    pairs = [
        {"prompt": [{**message[0], "content": f"{n}?"}], "chosen": "yes" * (1 + n % 3), "rejected": "no"}
        for n in range(40)
    ]
    write_rows(folder / "pairs.jsonl", pairs)
    return folder


@pytest.mark.parametrize("passed", [True, False])
@pytest.mark.parametrize("name", PHASES)
def test_the_last_line_is_the_verdict(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    passed: bool,
) -> None:
    module, flags = PHASES[name]
    found = Verdict(passed=passed, sentences=("It was seen.",), figures={"x": 1.0}, advice="Train it longer.")
    monkeypatch.setattr(module._Run, "verdict", lambda run: found)
    monkeypatch.chdir(root)
    output = str(tmp_path / "run")
    common = ("--model", "base", "--output", output, "--max-steps", "1", "--threads", "1", "--cache-dir", str(tmp_path))
    common += ("--per-device-train-batch-size", "4")
    if name == "grpo":
        common += ("--num-generations", "2")
    assert main([name, *common, *flags]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    if passed:
        assert last == "verdict   passed: It was seen."
    else:
        assert last == (
            "verdict   did not pass: It was seen. Train it longer. What builds on this model refuses it, unless --force is given."
        )
    assert read_verdict(output) == found
    # The same for a program, of a run that goes on for one more step.
    assert main([name, "--resume", output, "--max-steps", "2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["passed"] is passed
    assert facts["verdict"] == found.text
    assert facts["figures"] == {"x": 1.0}
    if passed or name == "reward":
        return
    # What builds on it.
    assert main(["dpo", "--model", output, "--data", "pairs.jsonl", "--output", str(tmp_path / "next")]) == 1
    err = capsys.readouterr().err
    assert err == f"ingot: {output}: did not pass its gate: {found.text} (--force goes on all the same)\n"
