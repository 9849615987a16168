"""Fine-tuning an adapter: it learns, the weights below it stay, the run opens like any other, and resumes with the same bits."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ingot
from ingot.cli import main
from ingot.configs import SFTConfig
from ingot.errors import ConfigError, RunError
from ingot.models import load_model
from ingot.models.growth import grow_vocabulary
from ingot.models.safetensors_files import read_header
from ingot.models.sharing import weights_hash
from ingot.tokenizer import Tokenizer
from ingot.training.lora import num_trained
from killable_sft import WORDS, child, rows, settings, write_base, write_rows
from networks import pack

CONFIG = SFTConfig(max_steps=4, sample_tokens=0, learning_rate=1e-2, lora_rank=4, threads=1)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a base model and demonstrations."""
    write_base(tmp_path / "base")
    write_rows(tmp_path / "a.jsonl", rows())
    return tmp_path


def config_at(place: Path, **changes: Any) -> SFTConfig:
    return dataclasses.replace(
        CONFIG,
        **{"model": str(place / "base"), "data": (str(place / "a.jsonl"),), "output": str(place / "run"), **changes},
    )


def test_an_adapter_learns_the_task_and_the_run_holds_it_merged(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_base(place / "raw", hidden_size=32)
    # The base answers with the next letter of the five; the adapter learns to answer with the one that was asked.
    shifted = [
        {"prompt": f"{number}: {WORDS[number % 5]}", "completion": WORDS[(number + 1) % 5]} for number in range(60)
    ]
    write_rows(place / "b.jsonl", shifted)
    base = {"model": str(place / "raw"), "data": (str(place / "b.jsonl"),), "output": str(place / "base2")}
    below = ingot.sft(config_at(place, **base, max_steps=200, lora_rank=0), quiet=True).output
    before = load_model(below).state()
    same_rows = [{"prompt": row["prompt"], "completion": WORDS[number % 5]} for number, row in enumerate(shifted)]
    write_rows(place / "a.jsonl", same_rows)
    result = ingot.sft(
        config_at(place, model=str(below), max_steps=160, eval_steps=80, held_out=0.2, lora_rank=8, lora_dropout=0.1)
    )
    out = capsys.readouterr().out
    said = r"^adapter   rank 8, alpha 16, on 7 linear layers: [\d,]+ parameters are trained \(\d+ %\)"
    assert re.search(said, out, re.M)
    lines = [line for line in result.history if "eval_loss" in line]
    assert lines[0]["eval_mean_token_accuracy"] < 0.7
    assert lines[-1]["eval_loss"] < 0.2 * lines[0]["eval_loss"]
    assert lines[-1]["eval_mean_token_accuracy"] > 0.95

    # The weights below are the base's, bit for bit.
    assert {name: array.tobytes() for name, array in result.model.state().items()} == {
        name: array.tobytes() for name, array in before.items()
    }
    # The top is the merged model; the adapter beside it does the same on the base.
    merged, apart = load_model(result.output, threads=1), load_model(below, threads=1)
    apart.load_adapter(result.output / "adapter", "x")
    packed = pack(merged.config, [9, 5])
    merged_out, apart_out, without = (
        model.forward(*packed.arrays, train=False, adapter=adapter)[1].logprobs
        for model, adapter in ((merged, None), (apart, "x"), (apart, "off"))
    )
    np.testing.assert_allclose(merged_out, apart_out, atol=1e-4)
    assert abs(apart_out - without).max() > 0.1
    written = json.loads((result.output / "adapter" / "adapter_config.json").read_bytes())
    assert written["base_model_name_or_path"] == str(below)
    assert written["lora_dropout"] == 0.1
    # Moments of what is trained, and of nothing else.
    moments = {tensor.name for tensor in read_header(result.output / "checkpoint-160" / "optimizer.safetensors")}
    assert moments == {"step"} | {f"{m}.{name}" for m in "mv" for name in result.model.adapters["default"].parameters}


def test_the_rows_of_new_tokens_stay_as_they_began(place: Path) -> None:
    result = ingot.sft(config_at(place), quiet=True)
    base = load_model(place / "base")
    known, ids = Tokenizer.from_file(place / "base").vocab_size, result.tokenizer.vocab_size
    assert ids > known
    grown = grow_vocabulary(base.state(), num_known=known, num_ids=ids, seed=0, frozen=True)
    assert {name: array.tobytes() for name, array in result.model.state().items()} == {
        name: array.tobytes() for name, array in grown.items()
    }


def test_rows_that_stay_lie_where_used_tokens_lie() -> None:
    """Training moves no new row here, so it must be one that a state of the network can prefer."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(200, 16)) * np.where(np.arange(200) < 60, 1.0, 0.02)[:, None] + rng.normal(size=16)
    state = {"lm_head.weight": table.astype(np.float32)}
    near, far = (
        grow_vocabulary(state, num_known=200, num_ids=204, seed=1, frozen=frozen)["lm_head.weight"]
        for frozen in (False, True)
    )
    np.testing.assert_array_equal(far[:200], state["lm_head.weight"])
    mean = table.mean(axis=0)
    old = np.linalg.norm(table - mean, axis=1)
    np.testing.assert_allclose(np.linalg.norm(far[200:] - mean, axis=1), np.quantile(old, 0.9), rtol=1e-5)
    # The state that points at a new row prefers it to all others; near the mean none does.
    for new in range(200, 204):
        assert np.argmax(far @ (far[new] - mean)) == new
        assert np.argmax(near @ (near[new] - mean)) != new


def test_named_layers_alone_are_adapted(place: Path) -> None:
    result = ingot.sft(config_at(place, max_steps=1, lora_target_modules=("q_proj", "v_proj")), quiet=True)
    assert {name.split(".")[-3] for name in result.model.adapters["default"].parameters} == {"q_proj", "v_proj"}
    with pytest.raises(ConfigError, match=r"no linear layer is named 'c_attn'; there are q_proj, k_proj"):
        ingot.sft(config_at(place, output=str(place / "other"), lora_target_modules=("c_attn",)), quiet=True)


def test_both_backends_train_the_same_adapter(place: Path) -> None:
    runs = {}
    for backend in ("native", "torch"):
        output = str(place / backend)
        runs[backend] = ingot.sft(config_at(place, output=output, backend=backend, precision="f32"), quiet=True)
    ours, theirs = (run.model.adapters["default"].state() for run in runs.values())
    assert list(ours) == list(theirs)
    # AdamW's first steps are the learning rate times the gradient's sign, and signs of tiny gradients differ.
    worst = max(np.abs(ours[name] - theirs[name]).mean() for name in ours)
    assert worst < 1e-3 < np.abs(ours["model.layers.0.mlp.up_proj.lora_B.weight"]).mean()
    again = ingot.resume(place / "torch", max_steps=5, quiet=True)
    assert again.history[-1]["step"] == 5


def test_what_is_trained_is_counted(place: Path) -> None:
    shape = load_model(place / "base").config
    trained = num_trained(CONFIG, shape)
    adapter = load_model(place / "base").add_adapter("x", CONFIG.lora_rank)
    assert trained == adapter.num_parameters
    assert num_trained(dataclasses.replace(CONFIG, lora_rank=0), shape) is None


def snapshot(folder: Path) -> dict[str, Any]:
    names = ["model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "samples.jsonl"]
    names += [f"checkpoint-10/{name}" for name in ("model.safetensors", "optimizer.safetensors", names[1])]
    taken: dict[str, Any] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    taken["metrics"] = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
    taken["folder"] = sorted(entry.name for entry in folder.rglob("*") if entry.name != "run.lock")
    return taken


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and forkserver are of Unix")
def test_killed_and_resumed_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    write_rows(tmp_path / "a.jsonl", rows(40))
    write_rows(tmp_path / "b.jsonl", [{"prompt": f"{n}?", "completion": "yes"} for n in range(20)])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killable_sft"])

    def run(folder: Path, kill_at: int | None = None, log: Path | None = None) -> int | None:
        folder.parent.mkdir(exist_ok=True)
        process = context.Process(target=child, args=(folder, kill_at, log), kwargs={"lora_rank": 3})
        process.start()
        process.join(600)
        return process.exitcode

    assert run(tmp_path / "whole" / "run", log=tmp_path / "points") == 0
    expected = snapshot(tmp_path / "whole" / "run")
    points = (tmp_path / "points").read_text().split("\n")
    first_save = next(n for n, name in enumerate(points) if name.startswith("optimizer"))
    # While the adapter is written beside the best model, just after a checkpoint, and near the end.
    beside = next(n for n, name in enumerate(points) if name.startswith("adapter_model") and n > first_save)
    folder = tmp_path / "killed" / "run"
    for kill_at in (beside, first_save + 14, 30):
        assert run(folder, kill_at) == -9, "the run was over before it was killed"
    assert run(folder) == 0
    assert settings(folder, lora_rank=3).dropout > 0
    assert snapshot(folder) == expected


def test_another_base_is_refused(place: Path) -> None:
    result = ingot.sft(config_at(place), quiet=True)
    assert ingot.resume(result.output, max_steps=6, quiet=True).history[-1]["step"] == 6
    model = load_model(place / "base")
    model.parameters["model.norm.weight"][0] += 1.0
    model.save(place / "base")
    with pytest.raises(RunError, match="base: holds other weights than when this run began"):
        ingot.resume(result.output, max_steps=8, quiet=True)


def test_the_hash_sees_every_weight(place: Path) -> None:
    model = load_model(place / "base")
    before = weights_hash(model)
    assert weights_hash(model.fork()) == before
    for view in model.parameters.values():
        view.flat[-1] += 1.0
        assert weights_hash(model) != before
        view.flat[-1] -= 1.0


def test_flags_and_files_of_the_command_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(place / "run")
    arguments = ["sft", "--model", str(place / "base"), "--data", str(place / "a.jsonl"), "--sample-tokens", "2"]
    lora = ["--lora-rank", "2", "--lora-alpha", "4", "--lora-target-modules", "q_proj", "down_proj"]
    assert main([*arguments, *lora, "--output", run, "--max-steps", "2"]) == 0
    assert "adapter   rank 2, alpha 4, on 2 linear layers" in capsys.readouterr().out
    again = ["sft", "--config", f"{run}/sft.toml", "--output", run + "2", "--max-steps", "2", "--json"]
    assert main(again) == 0
    capsys.readouterr()
    first, second = (Path(folder) / "model.safetensors" for folder in (run, run + "2"))
    assert first.read_bytes() == second.read_bytes()
    assert main(["generate", run, "--prompt", "a", "--max-new-tokens", "2"]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*arguments, "--lora-rank", "-1", "--output", run + "3"])
    assert "lora_rank must be 0 (train all weights) or more, got -1" in capsys.readouterr().err
