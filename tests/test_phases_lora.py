"""Adapters in the phases beside sft and dpo: a new one is the reference, the weights below stay, the run holds it merged, and a killed
run ends with the same bits."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import multiprocessing
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ingot
import killable_distill
import killable_grpo
import killable_ppo
import killable_reward
from ingot.cli import main
from ingot.configs import LoraConfig
from ingot.data.batches import Cursor
from ingot.errors import RunError
from ingot.inference.scoring import RewardModel
from ingot.losses.numerics import Float64
from ingot.models import load_model
from ingot.models.base import Model
from ingot.models.native import NativeModel
from ingot.models.safetensors_files import read_header
from ingot.training import grpo as group_phase
from ingot.training.actor_critic import ActorCritic
from ingot.training.experience import gather
from ingot.training.groups import make_lesson
from ingot.training.ppo import learn
from ingot.training.progress import SilentDisplay
from ingot.training.rollouts import recompute
from ingot.training.setup import Given, Setup, prepare
from killable_dpo import write_chat_model
from killable_sft import write_base, write_rows
from networks import pack

LORA = {"lora_rank": 3, "lora_alpha": 12.0}


@dataclasses.dataclass(frozen=True)
class Phase:
    """How the tests of a phase run it."""

    base: str
    """The model that it starts from."""
    write: Callable[[Path], object]
    """All that a run reads."""
    settings: Callable[..., LoraConfig]
    start: Callable[..., Any]
    child: Callable[..., None]
    last: int
    """Its last step."""
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings that let the top of the run be other than what it began with."""


def _write_grpo(root: Path) -> None:
    write_base(root / "base", dropout=0.1)
    killable_grpo.write_prompts(root / "prompts.jsonl")
    (root / "rewards.py").write_text(killable_grpo.REWARDS)


def _write_reward(root: Path) -> None:
    killable_reward.write_policy(root / "policy")
    write_rows(root / "a.jsonl", killable_reward.rows(30, ("helpful", "harmless")))
    write_rows(root / "b.jsonl", killable_reward.rows(50, ("helpful",))[30:])


def _write_distill(root: Path) -> None:
    write_chat_model(root / "student")
    write_chat_model(root / "teacher", seed=8, initializer_range=0.25, hidden_size=24)
    write_rows(root / "prompts.jsonl", [{"prompt": [{"role": "user", "content": f"{n}?"}]} for n in range(60)])


def _ppo_settings(folder: Path, **changes: Any) -> LoraConfig:
    return killable_ppo.settings(folder.parent.parent, folder, **changes)


def _ppo_child(folder: Path, kill_at: int | None, log: Path | None, **changes: Any) -> None:
    killable_ppo.child(folder.parent.parent, folder, changes, kill_at, log)


PHASES = {
    "grpo": Phase(
        "base", _write_grpo, killable_grpo.settings, ingot.grpo, killable_grpo.child, 8, {"export_by": "last"}
    ),
    "ppo": Phase("base", killable_ppo.write_inputs, _ppo_settings, ingot.ppo, _ppo_child, 7, {"export_by": "last"}),
    "reward": Phase(
        "policy", _write_reward, killable_reward.settings, ingot.train_reward_model, killable_reward.child, 10
    ),
    "distill": Phase("student", _write_distill, killable_distill.settings, ingot.distill, killable_distill.child, 10),
}


def snapshot(folder: Path, last: int) -> dict[str, Any]:
    names = ["model.safetensors", "samples.jsonl", "verdict.json", "adapter/adapter_model.safetensors"]
    names += [f"checkpoint-{last}/{name}" for name in (names[0], "optimizer.safetensors", names[-1])]
    taken: dict[str, Any] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    taken["metrics"] = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
    taken["folder"] = sorted(entry.name for entry in folder.rglob("*") if entry.name != "run.lock")
    return taken


def outputs(model: Model, adapter: str | None = None) -> Float64:
    """What a model says of some tokens: log-probabilities, or its scores."""
    packed = pack(model.config, [9, 5])
    want = "values" if model.num_values else "logprobs"
    _, out = model.forward(*packed.arrays, want=(want,), train=False, adapter=adapter)
    found = out.values if model.num_values else out.logprobs
    return np.asarray(found, np.float64)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and forkserver are of Unix")
@pytest.mark.parametrize("name", PHASES)
def test_a_run_holds_its_adapter_merged_and_killed_it_ends_with_the_same_bits(tmp_path: Path, name: str) -> None:
    phase = PHASES[name]
    phase.write(tmp_path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killable_grpo", "killable_ppo", "killable_reward", "killable_distill"])

    def run(folder: Path, kill_at: int | None = None, log: Path | None = None) -> int | None:
        folder.parent.mkdir(exist_ok=True)
        process = context.Process(target=phase.child, args=(folder, kill_at, log), kwargs={**LORA, **phase.changes})
        process.start()
        process.join(600)
        return process.exitcode

    whole = tmp_path / "whole" / "run"
    assert run(whole, log=tmp_path / "points") == 0
    expected = snapshot(whole, phase.last)

    # The top is the merged model; the adapter beside it does the same on the base.
    top, base = load_model(whole, threads=1), load_model(tmp_path / phase.base, threads=1)
    if top.num_values:
        base = load_model(tmp_path / phase.base, num_values=top.num_values, threads=1)
    base.load_adapter(whole / "adapter", "x")
    np.testing.assert_allclose(outputs(top), outputs(base, "x"), atol=1e-4)
    assert abs(outputs(base, "x") - outputs(base, "off")).max() > 1e-2
    for module, weights in top.state().items():
        if not any(module == f"{each}.weight" for each in base.adapters["x"].modules) and "score" not in module:
            np.testing.assert_array_equal(weights, base.state()[module])
    if name == "ppo":
        # Pretraining text teaches the adapter too.
        norms = [line["grad_norm/ptx"] for line in expected["metrics"] if "grad_norm/ptx" in line]
        assert min(norms) > 0
    # Moments of what is trained, and of nothing else.
    tensors = read_header(whole / f"checkpoint-{phase.last}" / "optimizer.safetensors")
    assert all("lora_" in tensor.name or "score" in tensor.name or tensor.name == "step" for tensor in tensors)

    points = (tmp_path / "points").read_text().split("\n")
    first_save = next(n for n, each in enumerate(points) if each.startswith("optimizer"))
    logged = [n for n, each in enumerate(points) if each == "metrics.jsonl: appended" and n > first_save]
    folder = tmp_path / "killed" / "run"
    assert run(folder, logged[1]) == -9, "the run was over before it was killed"
    assert run(folder) == 0
    assert snapshot(folder, phase.last) == expected


@pytest.mark.parametrize("name", PHASES)
def test_another_base_is_refused(tmp_path: Path, name: str) -> None:
    phase = PHASES[name]
    phase.write(tmp_path)
    run = tmp_path / "a" / "run"
    run.parent.mkdir()
    result = phase.start(phase.settings(run, max_steps=1, **LORA), quiet=True)
    # The result's model holds the base's weights still, and the adapter beside them.
    base = load_model(tmp_path / phase.base)
    for key, weights in base.state().items():
        np.testing.assert_array_equal(result.model.state()[key], weights)
    assert ingot.resume(run, max_steps=2, quiet=True).history[-1]["step"] == 2
    base.parameters["model.norm.weight"][0] += 1.0
    base.save(tmp_path / phase.base)
    with pytest.raises(RunError, match=r"changed since this run began|holds other weights than when this run began"):
        ingot.resume(run, max_steps=3, quiet=True)


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_new_adapter_is_the_reference_which_costs_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    phase = PHASES[name]
    phase.write(tmp_path)
    config: Any = phase.settings(tmp_path / "a" / "run", **LORA)
    setup = prepare(config, Given(), SilentDisplay(), num_values=int(name == "ppo"))
    count = config.per_device_train_batch_size
    experience = gather(setup, setup.prompts.take(0, count), policy=setup.policy, first_episode=0, seed=0)
    assert experience.logprobs.tobytes() == experience.ref_logprobs.tobytes()
    assert experience.rollouts.mask.any()
    if name == "ppo":
        values = recompute(setup.policy, experience.rollouts, ("values",), max_tokens=4096)["values"]
        assert not values.any()
    assert _address(setup.reference) == _address(setup.policy)

    actors = ActorCritic(setup.policy)
    if name == "ppo":
        actors.restore(config, None)
        experience = dataclasses.replace(experience, values=values)
        learn(config, actors, None, experience, kl_coef=0.1, step=0, cursor=Cursor(), pack_length=4096, rate=0.1)
        moved = recompute(setup.policy, experience.rollouts, ("values",), max_tokens=4096)["values"]
        assert abs(moved).max() > 1e-3, "the value head trains with the adapter"
    else:
        groups = gather(
            setup, setup.prompts.take(0, 4), policy=setup.policy, num_generations=4, first_episode=0, seed=0
        )
        lesson, _ = make_lesson(config, groups)
        group_phase.learn(config, setup.policy, lesson, step=0, pack_length=4096, rate=0.1)
    after = gather(setup, setup.prompts.take(0, count), policy=setup.policy, first_episode=0, seed=0)
    assert abs(after.logprobs - after.ref_logprobs).max() > 1e-2
    reference = recompute(setup.reference, experience.rollouts, ("logprobs",), max_tokens=4096)["logprobs"]
    assert reference.tobytes() == experience.ref_logprobs.tobytes()
    # After a step too the two lie in the same memory, and after a run.
    assert _address(setup.reference) == _address(setup.policy)
    made: list[Setup] = []
    module = importlib.import_module(f"ingot.training.{name}")
    real = module._PHASE
    watched = dataclasses.replace(real, prepare=lambda *given: made.append(real.prepare(*given)) or made[0])
    monkeypatch.setattr(module, "_PHASE", watched)
    (tmp_path / "a").mkdir(exist_ok=True)
    result = phase.start(dataclasses.replace(config, max_steps=2), quiet=True)
    assert result.history[-1]["eval_kl"] != 0
    assert _address(made[0].reference) == _address(made[0].policy)


def _address(model: Model) -> int:
    assert isinstance(model, NativeModel)
    return next(iter(model._core.snapshot().values())).ctypes.data


@pytest.mark.parametrize("name", PHASES)
def test_both_backends_train_it(tmp_path: Path, name: str) -> None:
    phase = PHASES[name]
    phase.write(tmp_path)
    (tmp_path / "a").mkdir()
    changes: dict[str, Any] = {**LORA, "backend": "torch", "device": "cpu", "precision": "f32", "max_steps": 2}
    result = phase.start(phase.settings(tmp_path / "a" / "run", **changes), quiet=True)
    base = load_model(tmp_path / phase.base)
    for key, weights in base.state().items():
        np.testing.assert_array_equal(result.model.state()[key], weights)
    assert result.model.adapters["default"].parameters["model.layers.0.mlp.up_proj.lora_B.weight"].any()
    again = ingot.resume(tmp_path / "a" / "run", max_steps=3, quiet=True)
    assert again.history[-1]["step"] == 3


def test_a_critic_of_its_own_is_another_adapter(tmp_path: Path) -> None:
    killable_ppo.write_inputs(tmp_path)
    outcomes = []
    for folder, stop in ((tmp_path / "a" / "run", 4), (tmp_path / "b" / "run", 2)):
        folder.parent.mkdir()
        config = killable_ppo.settings(tmp_path, folder, critic="policy", max_steps=4, **LORA)
        if stop < 4:
            shutil.copytree(tmp_path / "a" / "run", folder)
            for checkpoint in folder.glob("checkpoint-4"):
                shutil.rmtree(checkpoint)
            ingot.resume(folder, max_steps=4, quiet=True)
        else:
            ingot.ppo(config, quiet=True)
        files = ("adapter/adapter_model.safetensors", "critic.safetensors", "optimizer.safetensors")
        outcomes.append([(folder / "checkpoint-4" / name).read_bytes() for name in files])
    assert outcomes[0] == outcomes[1]
    names = {tensor.name for tensor in read_header(tmp_path / "a" / "run" / "checkpoint-4" / "optimizer.safetensors")}
    assert {"critic.m.score.weight", "critic.m.model.layers.0.mlp.up_proj.lora_B.weight"} <= names
    assert not any("norm" in name for name in names)


def test_a_reward_models_adapter_says_scores(tmp_path: Path) -> None:
    """Gain and bias are in the heads of the adapter beside the top, and not in those that training goes on with."""
    _write_reward(tmp_path)
    folder = tmp_path / "a" / "run"
    folder.parent.mkdir()
    config = killable_reward.settings(folder, max_steps=40, eval_steps=20, save_steps=20, held_out=0.2, **LORA)
    result = ingot.train_reward_model(config, quiet=True)
    measured = [line for line in result.history if "eval_accuracy" in line]
    assert measured[-1]["eval_accuracy"] > 0.8 > measured[0]["eval_accuracy"]
    scorer = RewardModel.load(folder, threads=1)
    prompts = [row["prompt"] for row in killable_reward.rows(40)]
    scores = scorer.score_each(prompts, ["aab" if n % 2 else "bb" for n in range(40)])
    assert abs(scores[1::2, 0].mean() - scores[::2, 0].mean()) > 1
    base = load_model(tmp_path / "policy", num_values=2, threads=1)
    base.load_adapter(folder / "adapter", "x")
    base.active_adapter = "x"
    same = RewardModel(base, scorer.encoder, scorer.criteria).score_each(prompts[:5], ["aab"] * 5)
    np.testing.assert_allclose(same, scorer.score_each(prompts[:5], ["aab"] * 5), atol=1e-4)


def test_flags_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write_grpo(tmp_path)
    arguments = ["grpo", "--model", str(tmp_path / "base"), "--prompts", str(tmp_path / "prompts.jsonl")]
    arguments += ["--reward", f"{tmp_path / 'rewards.py'}:low", "--num-generations", "2", "--max-steps", "1"]
    arguments += ["--per-device-train-batch-size", "4", "--max-completion-length", "3", "--sample-prompts", "1"]
    lora = ["--lora-rank", "2", "--lora-target-modules", "q_proj", "down_proj"]
    assert main([*arguments, *lora, "--output", str(tmp_path / "run")]) == 0
    assert "adapter   rank 2, alpha 16, on 2 linear layers" in capsys.readouterr().out
