"""A reference that follows the policy: what it is after each move, what it is not before, and that a killed run finds it again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import ingot
import killable_dpo
import killable_grpo
import killable_ppo
import networks
from ingot.configs import DPOConfig, GRPOConfig, PPOConfig
from ingot.errors import ConfigError
from ingot.models.base import Model
from ingot.models.reference import mix_into, reference_of
from ingot.training.callbacks import Callback
from ingot.training.synced_reference import SYNCED_FILE
from killable_sft import write_base

Weights = dict[str, np.ndarray[Any, np.dtype[np.float32]]]


def outputs_of(model: Model) -> bytes:
    tokens, offsets, targets = networks.pack(model.config, [4, 7, 3]).arrays
    return model.forward(tokens, offsets, targets, train=False, adapter="off")[1].logprobs.tobytes()


def learn(model: Model) -> None:
    tokens, offsets, targets = networks.pack(model.config, [4, 7, 3]).arrays
    model.zero_grad()
    model.forward_backward(tokens, offsets, targets, np.full(len(tokens), 0.1, np.float32))
    assert not model.step(1e-2).skipped


# ---- one move


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_a_move_is_the_mixture_of_weights_and_touches_nothing_else(backend: str, alpha: float) -> None:
    if backend == "torch":
        pytest.importorskip("torch")
    policy = ingot.Model(networks.SHAPES["llama"], seed=3, backend=backend, threads=1, num_values=1)  # type: ignore[arg-type]
    start = reference_of(policy)
    reference = reference_of(start)
    learn(policy)
    before, goal, bits = start.state(), policy.state(), outputs_of(start)
    mix_into(reference, policy, alpha)
    for name, values in reference.state().items():
        expected = alpha * goal[name].astype(np.float64) + (1 - alpha) * before[name].astype(np.float64)
        np.testing.assert_allclose(values, expected, rtol=2**-24, atol=0)
        np.testing.assert_array_equal(policy.state()[name], goal[name])
    assert outputs_of(start) == bits != outputs_of(reference)
    learn(policy)
    moved = outputs_of(reference)
    learn(policy)
    assert outputs_of(reference) == moved


def test_a_policy_with_an_adapter_counts_with_it_merged() -> None:
    policy = ingot.Model(networks.SHAPES["gpt2"], seed=3, threads=1)
    reference = reference_of(policy)
    adapter = policy.add_adapter("default", 2)
    policy.active_adapter = "default"
    values = np.random.default_rng(5)
    adapter.load_state({name: values.normal(size=each.shape).astype("f4") for name, each in adapter.state().items()})
    below = policy.state()
    mix_into(reference, policy, 0.25)
    changed = 0
    for name, found in reference.state().items():
        module = name.removesuffix(".weight")
        delta = adapter.delta(module).T if module in adapter.modules else np.float32(0)
        np.testing.assert_allclose(found, below[name] + 0.25 * delta, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(policy.state()[name], below[name])
        changed += bool(np.any(found != below[name]))
    assert changed == len(adapter.modules)


# ---- runs


def grpo_at(place: Path, **changes: Any) -> GRPOConfig:
    return killable_grpo.settings(place / "runs" / "run", max_steps=10, num_iterations=1, beta=0.1, **changes)


def ppo_at(place: Path, **changes: Any) -> PPOConfig:
    return killable_ppo.settings(place, place / "run", max_steps=10, save_steps=10, **changes)


def dpo_at(place: Path, **changes: Any) -> DPOConfig:
    return killable_dpo.settings(place / "runs" / "run", max_steps=10, **changes)


@pytest.fixture
def inputs(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder with all that a run of the phase reads."""
    (tmp_path / "runs").mkdir()
    if request.param == "ppo":
        killable_ppo.write_inputs(tmp_path)
    elif request.param == "grpo":
        write_base(tmp_path / "base")
        killable_grpo.write_prompts(tmp_path / "prompts.jsonl")
        (tmp_path / "rewards.py").write_text(killable_grpo.REWARDS)
    else:
        killable_dpo.write_chat_model(tmp_path / "base")
        killable_dpo.write_rows(tmp_path / "pairs.jsonl", killable_dpo.pairs())
        killable_dpo.write_rows(tmp_path / "ranked.jsonl", killable_dpo.rankings())
    return tmp_path


PHASES = [pytest.param(name, name, id=name) for name in ("dpo", "grpo", "ppo")]
AT = {"dpo": dpo_at, "grpo": grpo_at, "ppo": ppo_at}


class Weighs(Callback):
    """Keeps the policy's weights after each step that is logged."""

    def __init__(self) -> None:
        self.after: dict[int, Weights] = {}

    def on_log(self, run: Any, metrics: dict[str, Any]) -> None:
        self.after[metrics["step"]] = dict(run.model.merged_state())


@pytest.mark.parametrize(("inputs", "phase"), PHASES, indirect=["inputs"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_run_is_held_to_the_mixture(inputs: Path, phase: str, lora: bool) -> None:
    more = {"lora_rank": 2, "learning_rate": 1e-2} if lora else {}
    config = AT[phase](
        inputs, sync_ref_model=True, ref_model_sync_steps=3, ref_model_mixup_alpha=0.7, logging_steps=1, **more
    )
    weighs = Weighs()
    result = getattr(ingot, phase)(config, callbacks=[weighs], quiet=True)
    synced = [(line["step"], line["reference/syncs"]) for line in result.history if "reference/syncs" in line]
    assert synced == [(3, 1), (6, 2), (9, 3)]
    expected = {name: each.astype(np.float64) for name, each in ingot.load_model(inputs / "base").state().items()}
    for step, _ in synced:
        expected = {
            name: 0.7 * weighs.after[step][name].astype(np.float64) + 0.3 * each for name, each in expected.items()
        }
    found = load_file(result.output / "checkpoint-10" / SYNCED_FILE)
    for name, each in expected.items():
        np.testing.assert_allclose(found[name], each, rtol=1e-5, atol=1e-6, err_msg=name)
    moved = max(
        float(np.abs(found[name] - each).max()) for name, each in ingot.load_model(inputs / "base").state().items()
    )
    assert moved > 1e-3, "the policy has to learn for this to show anything"


@pytest.mark.parametrize(("inputs", "phase"), PHASES, indirect=["inputs"])
def test_off_it_is_the_model_that_the_run_began_with(inputs: Path, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ingot.training import synced_reference

    seen: list[Any] = []
    make = synced_reference.SyncedReference.__init__

    def spy(self: Any, *args: Any) -> None:
        make(self, *args)
        seen.append((self, {name: each.tobytes() for name, each in self.model.state().items()}))

    monkeypatch.setattr(synced_reference.SyncedReference, "__init__", spy)
    config = AT[phase](inputs, logging_steps=1)
    result = getattr(ingot, phase)(config, quiet=True)
    ((kept, before),) = seen
    assert {name: each.tobytes() for name, each in kept.model.state().items()} == before
    assert {name: each.tobytes() for name, each in result.model.state().items()} != before
    assert result.history[-1]["step"] == 10
    assert not any("reference/syncs" in line for line in result.history)
    assert not list(result.output.rglob(SYNCED_FILE))


@pytest.mark.parametrize("inputs", ["dpo"], indirect=True)
@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_preferences_are_compared_with_the_reference_of_the_moment(inputs: Path, loss: str) -> None:
    """With alpha 1 the reference is the policy after each move: the next step has no margin. What is held out knows the start alone."""
    fixed = AT["dpo"](inputs, logging_steps=1, loss_type=(loss,), loss_weights=())
    # Steps of so many rows see each of them several times.
    fixed = dataclasses.replace(fixed, per_device_train_batch_size=40, learning_rate=1e-2, eval_steps=1)
    moving = dataclasses.replace(
        fixed, sync_ref_model=True, ref_model_sync_steps=3, ref_model_mixup_alpha=1.0, output=str(inputs / "other")
    )
    history = {config.sync_ref_model: ingot.dpo(config, quiet=True).history for config in (fixed, moving)}
    margins = {
        on: {line["step"]: abs(line["rewards/margins"]) for line in lines if "rewards/margins" in line}
        for on, lines in history.items()
    }
    assert all(margins[True][step] < 1e-6 for step in (1, 4, 7, 10))
    assert all(margins[True][step] > 1e-4 for step in (2, 3, 5, 6, 8, 9))
    assert all(margins[False][step] > 1e-4 for step in range(2, 11))
    held_out = [line for line in history[True] if line.get("eval_rewards/margins") is not None and line["step"]]
    assert len(held_out) == 10
    assert all(abs(line["eval_rewards/margins"]) > 1e-4 and abs(line["eval_kl"]) > 1e-4 for line in held_out)


@pytest.mark.parametrize("inputs", ["grpo"], indirect=True)
def test_answers_are_held_to_the_reference_of_the_moment(inputs: Path) -> None:
    config = AT["grpo"](inputs, logging_steps=1, sync_ref_model=True, ref_model_sync_steps=3, ref_model_mixup_alpha=1.0)
    config = dataclasses.replace(config, learning_rate=1e-2, eval_steps=1)
    history = ingot.grpo(config, quiet=True).history
    kl = {line["step"]: abs(line["objective/kl"]) for line in history if "objective/kl" in line}
    assert all(kl[step] < 1e-6 for step in (1, 4, 7, 10))
    assert all(kl[step] > 1e-4 for step in (2, 3, 5, 6, 8, 9))
    assert all(abs(line["eval_kl"]) > 1e-4 for line in history if "eval_kl" in line and line["step"] > 1)


# ---- killed and resumed


def snapshot(folder: Path) -> dict[str, Any]:
    names = ["model.safetensors", "samples.jsonl", "verdict.json"]
    names += [str(path.relative_to(folder)) for path in folder.glob("checkpoint-*/*.safetensors")]
    taken: dict[str, Any] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    taken["metrics"] = [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]
    return taken


SYNC: dict[str, Any] = {"sync_ref_model": True, "ref_model_sync_steps": 2, "logging_steps": 1, "save_steps": 3}


def child(phase: str, place: Path, folder: Path, kill_at: int | None, log: Path | None) -> None:
    """Entry of the process."""
    if phase == "grpo":
        killable_grpo.child(folder, kill_at, log, **SYNC)
    elif phase == "dpo":
        killable_dpo.child(folder, kill_at, log, SYNC)
    else:
        killable_ppo.child(place, folder, SYNC, kill_at, log)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and forkserver are of Unix")
@pytest.mark.parametrize(("inputs", "phase"), PHASES, indirect=["inputs"])
def test_killed_between_two_moves_and_resumed_it_ends_with_the_same_bits(inputs: Path, phase: str) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killable_dpo", "killable_grpo", "killable_ppo"])

    def run(folder: Path, kill_at: int | None = None, log: Path | None = None) -> int | None:
        process = context.Process(target=child, args=(phase, inputs, folder, kill_at, log))
        process.start()
        process.join(600)
        return process.exitcode

    for name in ("whole", "killed"):
        (inputs / name).mkdir()
    assert run(inputs / "whole" / "run", log=inputs / "points") == 0
    expected = snapshot(inputs / "whole" / "run")
    assert any(name.endswith(SYNCED_FILE) for name in expected)
    points = (inputs / "points").read_text().split("\n")
    saved = [n for n, name in enumerate(points) if name.startswith("manifest")]
    folder = inputs / "killed" / "run"
    # While the first checkpoint with a moved reference is written; then with one there, after the next move.
    for kill_at in (
        saved[0],
        next(n for n in range(saved[0] + 8, len(points)) if points[n] == "metrics.jsonl: appended"),
    ):
        assert run(folder, kill_at) == -9, "the run was over before it was killed"
    assert run(folder) == 0
    assert snapshot(folder) == expected


# ---- bad input


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (DPOConfig, {"ref_model_mixup_alpha": 0.5}, "has no effect without sync_ref_model"),
        (DPOConfig, {"ref_model_sync_steps": 5}, "has no effect without sync_ref_model"),
        (DPOConfig, {"sync_ref_model": True, "ref_model_mixup_alpha": 0.0}, "above 0 and at most 1"),
        (DPOConfig, {"sync_ref_model": True, "ref_model_sync_steps": 0}, "at least 1"),
        (DPOConfig, {"sync_ref_model": True, "loss_type": ("simpo",)}, "simpo has no reference"),
        (GRPOConfig, {"sync_ref_model": True}, "give --beta above 0"),
        (PPOConfig, {"sync_ref_model": True, "kl_coef": 0.0}, "give --kl-coef above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(kind: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**changes)


@pytest.mark.parametrize("inputs", ["dpo"], indirect=True)
def test_another_network_cannot_be_mixed_in(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killable_dpo.write_chat_model(inputs / "wide", hidden_size=32)
    config = AT["dpo"](inputs, sync_ref_model=True, reference_model=str(inputs / "wide"))
    with pytest.raises(ConfigError, match="wide: is a network of another shape"):
        ingot.dpo(config, quiet=True)
    assert not Path(config.output).exists()
    # That a run is too short for any move is said.
    ingot.dpo(dataclasses.replace(config, reference_model=None, max_steps=2))
    assert "does not move: ref_model_sync_steps 512" in capsys.readouterr().out
