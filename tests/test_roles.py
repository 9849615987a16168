"""Policy, value, reward and reference on one base: adapters that find their own weights below them share those in memory, change nothing
of one another, and say the same bits as they do alone."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import ingot
import killable_ppo
import killable_reward
import large_base
from ingot.data.batches import Cursor
from ingot.inference.scoring import RewardModel
from ingot.models import load_model
from ingot.models.base import Model
from ingot.models.native import NativeModel
from ingot.models.safetensors_files import read_header
from ingot.models.sharing import SharedBase, weights_hash
from ingot.training.actor_critic import ActorCritic
from ingot.training.experience import gather
from ingot.training.ppo import learn
from ingot.training.progress import SilentDisplay
from ingot.training.rollouts import recompute
from ingot.training.setup import Given, Setup, prepare
from killable_sft import write_rows

LORA: dict[str, Any] = {"lora_rank": 3, "lora_alpha": 12.0}


class Listening(SilentDisplay):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and a reward model of two criteria and a judge that are adapters on it."""
    place = tmp_path_factory.mktemp("roles")
    killable_ppo.write_inputs(place)
    write_rows(place / "a.jsonl", killable_reward.rows(30, ("helpful", "harmless")))
    write_rows(place / "b.jsonl", killable_reward.rows(50, ("helpful",))[30:])
    write_rows(place / "c.jsonl", killable_reward.rows(33))
    for name, data, rank in (("lora_rm", ("a", "b"), 2), ("lora_judge", ("c",), 5)):
        ingot.train_reward_model(
            killable_reward.settings(
                place / name,
                model=str(place / "base"),
                data=tuple(str(place / f"{each}.jsonl") for each in data),
                lora_rank=rank,
                max_steps=6,
                save_steps=6,
                eval_steps=6,
            ),
            quiet=True,
        )
    return place


def settings(root: Path, folder: Path, **changes: Any) -> Any:
    names = {"reward_model": str(root / "lora_rm"), "judge": str(root / "lora_judge"), "force": True}
    return killable_ppo.settings(root, folder, **{**names, **LORA, **changes})


def made(config: Any, display: SilentDisplay | None = None) -> tuple[Setup, ActorCritic]:
    shared = int(config.critic == "shared")
    setup = prepare(config, Given(), display or SilentDisplay(), num_values=shared)
    return setup, ActorCritic.start(config, setup)


def models_of(setup: Setup) -> dict[str, Model]:
    judge = setup.scorers._judge
    assert isinstance(judge, RewardModel)
    models = {"policy": setup.policy, "reference": setup.reference}
    return models | {"reward": setup.scorers.reward_model.model, "judge": judge.model}


def address(model: Model) -> int:
    """Of the weights in memory."""
    if isinstance(model, NativeModel):
        return next(iter(model._core.snapshot().values())).ctypes.data
    return int(model._own_set.flat.data_ptr())  # type: ignore[attr-defined]


def sequences() -> list[npt.NDArray[np.int32]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, size, dtype=np.int32) for size in (5, 1, 30, 9, 17)]


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("critic", ["shared", "policy", "reward_model"])
def test_all_roles_lie_on_one_base(root: Path, tmp_path: Path, critic: str, backend: str) -> None:
    place = {} if backend == "native" else {"backend": "torch", "device": "cpu", "precision": "f32"}
    if place:
        pytest.importorskip("torch")
    display = Listening()
    setup, actors = made(settings(root, tmp_path / "run", critic=critic, **place), display)
    models = models_of(setup) | ({} if actors.critic is None else {"critic": actors.critic})
    assert len({address(model) for model in models.values()}) == 1
    # Each with heads of its own.
    heads = {name: model.num_values for name, model in models.items()}
    assert heads.pop("critic", 1) == 1
    assert heads == {"policy": int(critic == "shared"), "reference": 0, "reward": 2, "judge": 1}
    said = [line for line in display.lines if "whose weights are in memory once" in line]
    assert [line.split(":")[0] for line in said] == [str(root / "lora_rm"), str(root / "lora_judge")]


@pytest.mark.parametrize("name", ["lora_rm", "lora_judge"])
def test_scores_on_the_shared_base_are_those_of_the_run_alone(root: Path, tmp_path: Path, name: str) -> None:
    setup, _ = made(settings(root, tmp_path / "run"))
    models = models_of(setup)
    shared = setup.scorers.reward_model if name == "lora_rm" else setup.scorers._judge
    assert isinstance(shared, RewardModel)
    scores = shared.score_ids_each(sequences())
    assert abs(scores).min() > 1e-3

    # The same weights in memory of their own: the same bits.
    apart = load_model(root / "base", threads=1)
    assert address(apart) != address(models["policy"])
    apart.load_adapter(root / name / "adapter", "x")
    apart.active_adapter = "x"
    alone = RewardModel(apart, shared.encoder, shared.criteria)
    assert alone.score_ids_each(sequences()).tobytes() == scores.tobytes()

    # The folder itself has adapter and weights in one sum, rounded once.
    merged = RewardModel.load(root / name, threads=1)
    assert merged.model.active_adapter is None
    np.testing.assert_allclose(merged.score_ids_each(sequences()), scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("critic", ["shared", "policy", "reward_model"])
def test_what_one_role_learns_no_other_sees(root: Path, tmp_path: Path, critic: str) -> None:
    config = settings(root, tmp_path / "run", critic=critic, ptx_data=())
    setup, actors = made(config)
    actors.restore(config, None)
    experience = gather(
        setup, setup.prompts.take(0, 6), policy=setup.policy, first_episode=0, seed=0, values=critic == "shared"
    )
    assert experience.logprobs.tobytes() == experience.ref_logprobs.tobytes()
    before = {
        name: model.adapters[model.active_adapter].state()
        for name, model in models_of(setup).items()
        if model.active_adapter is not None
    }
    weights = weights_hash(setup.policy)
    scores = setup.scorers.reward_model.score_ids_each(sequences())
    for step in range(5):  # of two minibatches in two epochs each
        learn(
            config,
            actors,
            None,
            experience,
            kl_coef=0.1,
            step=step,
            cursor=Cursor(),
            pack_length=4096,
            rate=0.02,
            critic_rate=0.02,
        )
    rollouts = experience.rollouts
    now = recompute(setup.policy, rollouts, ("logprobs",), max_tokens=4096)["logprobs"]
    assert abs(now - experience.logprobs).max() > 1e-2
    reference = recompute(setup.reference, rollouts, ("logprobs",), max_tokens=4096)["logprobs"]
    assert reference.tobytes() == experience.ref_logprobs.tobytes()
    assert setup.scorers.reward_model.score_ids_each(sequences()).tobytes() == scores.tobytes()
    for name, model in models_of(setup).items():
        if name in before:
            assert model.active_adapter is not None
            after = model.adapters[model.active_adapter].state()
            assert all(np.array_equal(after[key], values) for key, values in before[name].items()) == (name != "policy")
    assert weights_hash(setup.policy) == weights
    assert len({address(model) for model in (*models_of(setup).values(), actors.critic or setup.policy)}) == 1


def test_a_critic_starts_as_the_reward_model_whose_adapter_it_takes_over(root: Path, tmp_path: Path) -> None:
    setup, actors = made(
        settings(root, tmp_path / "run", critic="reward_model", reward_model=f"{root}/lora_rm:helpful")
    )
    assert actors.critic is not None
    alone = load_model(root / "base", threads=1)
    alone.load_adapter(root / "lora_rm" / "adapter", "x")
    alone.active_adapter = "x"
    theirs = RewardModel(alone, setup.scorers.reward_model.encoder, ("helpful", "harmless"))
    mine = RewardModel(actors.critic, theirs.encoder, ("value",))
    expected = theirs.score_ids_each(sequences())[:, 0]
    np.testing.assert_allclose(mine.score_ids_each(sequences())[:, 0], expected, rtol=1e-5, atol=1e-6)
    assert actors.critic.adapters["default"].rank == 2
    # A new adapter's head says nothing.
    _, fresh = made(settings(root, tmp_path / "run", critic="policy"))
    assert fresh.critic is not None
    assert not RewardModel(fresh.critic, theirs.encoder, ("value",)).score_ids_each(sequences()).any()


def test_an_adapter_for_other_weights_is_loaded_as_a_network(root: Path, tmp_path: Path) -> None:
    other = load_model(root / "base")
    other.parameters["model.norm.weight"][0] += 0.5
    lines: list[str] = []
    base = SharedBase(other, "runs/other", lines.append)
    loaded = RewardModel.load(root / "lora_rm", base=base, threads=1)
    assert lines == [
        f"{root / 'lora_rm'}: its adapter belongs to other weights than those of runs/other: loaded as a network of its own"
    ]
    assert address(loaded.model) != address(other)
    expected = RewardModel.load(root / "lora_rm", threads=1).score_ids_each(sequences())
    np.testing.assert_array_equal(loaded.score_ids_each(sequences()), expected)
    # A run without an adapter is nothing to speak of.
    RewardModel.load(root / "rm", base=base, threads=1)
    assert len(lines) == 1
    # Weights alone decide: the same ones with other settings compute something else.
    same = load_model(root / "base")
    assert base.hash != weights_hash(same)
    shape = dataclasses.replace(same.config, rope_theta=7.0)
    assert SharedBase(same, "x", lines.append).adapted(root / "lora_rm", shape) is None


def test_heads_do_not_count_in_the_hash(root: Path) -> None:
    plain, scoring = load_model(root / "base"), load_model(root / "base", num_values=2)
    assert weights_hash(plain) == weights_hash(scoring)
    adapter = plain.load_adapter(root / "lora_rm" / "adapter")
    assert adapter.base_hash == weights_hash(plain)


# ---- a run


def snapshot(folder: Path) -> dict[str, Any]:
    names = ["model.safetensors", "samples.jsonl", "adapter/adapter_model.safetensors", "critic.safetensors"]
    names += [f"checkpoint-7/{name}" for name in ("critic.safetensors", "optimizer.safetensors", names[2])]
    taken: dict[str, Any] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    taken["metrics"] = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
    return taken


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and forkserver are of Unix")
def test_a_killed_run_with_a_critics_adapter_ends_with_the_same_bits(root: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killable_ppo"])
    changes = {key: getattr(settings(root, tmp_path), key) for key in ("reward_model", "judge", "force", *LORA)}
    changes |= {"critic": "reward_model", "critic_learning_rate": 5e-3, "export_by": "last"}

    def run(folder: Path, kill_at: int | None = None, log: Path | None = None) -> int | None:
        folder.parent.mkdir(exist_ok=True)
        process = context.Process(target=killable_ppo.child, args=(root, folder, changes, kill_at, log))
        process.start()
        process.join(600)
        return process.exitcode

    whole = tmp_path / "whole" / "run"
    assert run(whole, log=tmp_path / "points") == 0
    tensors = {tensor.name for tensor in read_header(whole / "critic.safetensors")}
    assert tensors == {
        tensor.name.removeprefix("base_model.model.")
        for tensor in read_header(root / "lora_rm/adapter/adapter_model.safetensors")
    }
    points = (tmp_path / "points").read_text().split("\n")
    first_save = next(n for n, each in enumerate(points) if each.startswith("optimizer"))
    logged = [n for n, each in enumerate(points) if each == "metrics.jsonl: appended" and n > first_save]
    folder = tmp_path / "killed" / "run"
    assert run(folder, logged[1]) == -9, "the run was over before it was killed"
    assert run(folder) == 0
    assert snapshot(folder) == snapshot(whole)


# ---- memory


def memory_of_run(place: Path, how: str) -> tuple[int, int]:
    """Bytes: what a run of five roles took at most beyond the interpreter's own, and what one base with all adapters and moments takes."""
    script = Path(large_base.__file__)
    done = subprocess.run(
        [sys.executable, str(script), str(place), how],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # Policy and critic are trained: weights, gradients and two moments of each; reward model and judge are not.
    return found["most"] - found["before"], found["base"] + (2 * 4 + 2) * found["adapter"]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("large")
    large_base.write_inputs(place)
    return place


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_five_roles_take_the_memory_of_one_base(large: Path) -> None:
    """Measured: 1.54 of base and adapters; the rest is activations, a weight on its way to the disk, and modules imported on the way. A
    second base anywhere, also for a moment, would be 2.5."""
    taken, needed = memory_of_run(large, "shared")
    assert taken < 1.85 * needed, f"{taken / 1e6:.0f} MB, of which {needed / 1e6:.0f} MB are the base and its adapters"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_roles_apart_take_more(large: Path) -> None:
    taken, needed = memory_of_run(large, "apart")
    assert taken > 3 * needed
