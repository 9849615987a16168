"""Preferences learned by an adapter: held to the model below it, which stays as it is, and resumed with the same bits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import ingot
from ingot.configs import DPOConfig, SFTConfig
from ingot.errors import CheckpointError
from ingot.models import load_model
from ingot.training.callbacks import Callback
from ingot.training.metrics import MetricsLog
from ingot.training.preferences import prepare_preferences
from ingot.training.progress import SilentDisplay
from ingot.training.reference_logprobs import REFERENCE_FILE, ReferenceLogprobs
from killable_dpo import pairs, write_chat_model, write_rows

CONFIG = DPOConfig(
    max_steps=6,
    save_steps=3,
    eval_steps=3,
    logging_steps=1,
    sample_tokens=0,
    learning_rate=1e-2,
    per_device_train_batch_size=8,
    threads=1,
    lora_rank=4,
)


class StopAt(Callback):
    """Ends the run by force once a step is logged."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, run: Any, metrics: dict[str, Any]) -> None:
        if metrics["step"] == self.step:
            raise ZeroDivisionError


def trained(folder: Path) -> tuple[bytes, bytes, list[dict[str, Any]]]:
    lines = [
        {key: value for key, value in line.items() if not key.startswith("time/")}
        for line in MetricsLog(folder / "metrics.jsonl").read()
    ]
    return (
        (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        (folder / "model.safetensors").read_bytes(),
        lines,
    )


def test_it_learns_above_the_model_and_resumes_with_the_same_bits(tmp_path: Path) -> None:
    base = write_chat_model(tmp_path / "base")
    fields = {"model": str(base), "data": (write_rows(tmp_path / "pairs.jsonl", pairs()),)}
    config = dataclasses.replace(CONFIG, **fields, output=str(tmp_path / "whole"))
    result = ingot.dpo(config, quiet=True)
    logged = [line for line in result.history if "rewards/margins" in line]
    # A new adapter is the reference: the first step has no margin. Later ones do.
    assert logged[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    assert logged[-1]["rewards/margins"] > 1e-3
    # Without its adapter the model is what it began with.
    again = dataclasses.replace(config, output=str(tmp_path / "other"), max_steps=1, eval_steps=1, save_steps=1)
    other = ingot.dpo(again, quiet=True)
    for name, array in result.model.state().items():
        np.testing.assert_array_equal(array, other.model.state()[name])

    killed = tmp_path / "killed"
    with pytest.raises(ZeroDivisionError):
        ingot.dpo(dataclasses.replace(config, output=str(killed)), callbacks=[StopAt(5)], quiet=True)
    ingot.resume(killed, quiet=True)
    assert trained(killed) == trained(tmp_path / "whole")


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_what_an_adapter_learned_before_is_in_the_reference(tmp_path: Path, lora_rank: int) -> None:
    base = write_chat_model(tmp_path / "base")
    talk = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}]} for n in range(40)
    ]
    tuned = SFTConfig(
        model=str(base),
        data=(write_rows(tmp_path / "talk.jsonl", talk),),
        output=str(tmp_path / "sft"),
        max_steps=6,
        lora_rank=4,
        learning_rate=3e-2,
        sample_tokens=0,
        threads=1,
    )
    ingot.sft(tuned, quiet=True)
    fields = {"data": (write_rows(tmp_path / "pairs.jsonl", pairs()),), "output": str(tmp_path / "dpo")}
    config = dataclasses.replace(CONFIG, **fields, model=str(tmp_path / "sft"), lora_rank=lora_rank, max_steps=2)
    result = ingot.dpo(config, quiet=True)
    first = next(line for line in result.history if "rewards/margins" in line)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    before, plain = load_model(tmp_path / "sft", threads=1), load_model(base, threads=1)
    train = prepare_preferences(config, None, before.config, None, SilentDisplay()).train
    stored = load_file(tmp_path / "dpo" / REFERENCE_FILE)["train"]
    found = {}
    for name, model in (("tuned", before), ("base", plain)):
        found[name] = ReferenceLogprobs(train)
        found[name].score(model, 4096)
    np.testing.assert_array_equal(stored, found["tuned"].values)
    assert np.abs(stored - found["base"].values).max() > 0.1

    # The adapter's own folder lacks what it lies on.
    with pytest.raises(
        CheckpointError, match=r"sft.adapter: holds an adapter without the weights below it: give .*sft, which"
    ):
        ingot.dpo(dataclasses.replace(config, model=str(tmp_path / "sft" / "adapter")), quiet=True)
