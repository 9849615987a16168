"""Preferences learned by an adapter: held to the model below it, which stays as it is, and resumed with the same bits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ingot
from ingot.configs import DPOConfig
from ingot.training.callbacks import Callback
from ingot.training.metrics import MetricsLog
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
