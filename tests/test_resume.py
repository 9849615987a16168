"""Killed at any point and resumed, a run ends with the bits of one that was left alone.

SIGKILL strikes at named points around every write, sync, rename and removal (:data:`ingot.durable.crash_points`), and at random
moments. Each kill is seen to land in a run that was not finished.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import killable
from ingot.errors import CheckpointError, ConfigError, RunError
from ingot.training.callbacks import Callback
from ingot.training.pretrain import pretrain, resume

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and forkserver are of Unix")

FINAL = "checkpoint-12"
# Only a child that hangs should reach it: on a busy machine one takes a minute.
_PATIENCE_S = 600
_ASKING = threading.Lock()


@pytest.fixture(scope="module")
def context() -> Any:
    """Children fork from a server that has imported everything and started no thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killable"])
    return context


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    killable.write_text(folder)
    return folder


@dataclasses.dataclass
class Reference:
    """The run that was left alone."""

    snapshot: dict[str, Any]
    points: list[str]
    duration_s: float


@pytest.fixture(scope="module")
def reference(context, place) -> Reference:
    """In ``place / "a" / "run"``, as every other run lies in a folder of the same name."""
    log = place / "points"
    folder = new_folder(place, "reference")
    began = time.monotonic()
    assert run_child(context, folder, log=log) == 0
    return Reference(snapshot(folder), log.read_text().split("\n"), time.monotonic() - began)


def new_folder(place: Path, name: str) -> Path:
    (place / name).mkdir()
    os.link(place / "text.txt", place / name / "text.txt")
    return place / name / "run"


def run_child(
    context,
    folder: Path,
    kill_at: int | None = None,
    log: Path | None = None,
    after_s: float | None = None,
    optim: str = "adamw",
) -> int:
    """Exit code of a child that runs or resumes; killed at a point, or ``after_s`` seconds after its first."""
    process = context.Process(target=killable.child, args=(folder, kill_at, after_s, log, optim))
    # Starting one process asks all others whether they have ended, and two threads that read one answer get half of it each.
    with _ASKING:
        process.start()
    assert multiprocessing.connection.wait([process.sentinel], _PATIENCE_S), "the child hangs"
    with _ASKING:
        process.join()
        assert process.exitcode is not None
        return int(process.exitcode)


def finished(folder: Path) -> bool:
    file = folder / "run.json"
    return file.exists() and bool(json.loads(file.read_bytes())["finished"])


def snapshot(folder: Path) -> dict[str, Any]:
    """Everything that must not depend on what happened on the way."""
    names = [
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "README.md",
        "samples.jsonl",
        "generation_config.json",
    ]
    names += [f"{FINAL}/model.safetensors", f"{FINAL}/optimizer.safetensors"]
    taken: dict[str, Any] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    taken["metrics"] = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
    state = json.loads((folder / FINAL / "trainer_state.json").read_bytes())
    taken["state"] = {k: v for k, v in state.items() if k != "elapsed_s"}
    # A kill between the last write and the release of the lock leaves the lock of a dead process, which counts for nothing.
    taken["folder"] = sorted(entry.name for entry in folder.iterdir() if entry.name != "run.lock")
    return taken


def assert_same(folder: Path, reference: Reference) -> None:
    now = snapshot(folder)
    for name, value in reference.snapshot.items():
        assert now[name] == value, name


def test_two_runs_left_alone_are_the_same(context, place, reference):
    folder = new_folder(place, "again")
    assert run_child(context, folder) == 0
    assert_same(folder, reference)
    assert len(reference.snapshot["metrics"]) == 6 + 4


def test_another_seed_is_another_run(place, reference):
    folder = new_folder(place, "seed")
    pretrain(dataclasses.replace(killable.settings(folder), seed=6), quiet=True)
    assert snapshot(folder)["model.safetensors"] != reference.snapshot["model.safetensors"]


def distinct_points(reference: Reference) -> Iterator[tuple[str, int]]:
    """The middle one of the moments at which each named point is reached; checkpoints of different steps are one."""
    kinds = [re.sub(r"^checkpoint-\d+", "checkpoint", name) for name in reference.points]
    for name in sorted(set(kinds)):
        indices = [index for index, other in enumerate(kinds) if other == name]
        yield name, indices[len(indices) // 2]


@pytest.mark.timeout(600)
def test_killed_at_each_named_point(context, place, reference):
    points = list(distinct_points(reference))
    kinds = {name.partition(": ")[2] for name, _ in points}
    assert kinds >= {
        "before write",
        "before sync",
        "before rename",
        "before folder sync",
        "before removal",
        "before append",
    }
    assert len(points) > 50

    def attempt(job: tuple[int, tuple[str, int]]) -> None:
        number, (name, index) = job
        folder = new_folder(place, f"point-{number}")
        assert run_child(context, folder, kill_at=index) == -signal.SIGKILL, name
        assert not finished(folder) or name.startswith("run.json"), name
        if not finished(folder):
            assert run_child(context, folder) == 0, name
        assert_same(folder, reference)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(attempt, enumerate(points)))


def test_muon_killed_between_checkpoints_ends_the_same(context, place, reference):
    log = place / "points-muon"
    whole, killed = new_folder(place, "muon"), new_folder(place, "muon-killed")
    assert run_child(context, whole, log=log, optim="muon") == 0
    points = log.read_text().split("\n")
    assert run_child(context, killed, kill_at=2 * len(points) // 3, optim="muon") == -signal.SIGKILL
    assert not finished(killed)
    assert list(killed.glob("checkpoint-*"))
    assert run_child(context, killed) == 0
    assert snapshot(killed) == snapshot(whole)
    assert snapshot(whole)["model.safetensors"] != reference.snapshot["model.safetensors"]


def test_the_state_of_another_optimizer_is_refused(place, reference, context):
    folder = new_folder(place, "swapped")
    run_child(context, folder, kill_at=len(reference.points) // 2)
    facts = json.loads((folder / "run.json").read_bytes())
    facts["config"]["optim"] = "muon"
    (folder / "run.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match="saved with optim 'adamw', but optim is 'muon'"):
        resume(folder, quiet=True)


def kill_until_done(context, folder: Path, reference: Reference, rng: random.Random, most: int) -> int:
    """Kill a run again and again, at points and at random moments, and let it finish after at most ``most`` kills; how many landed."""
    kills = 0
    while kills < most and not finished(folder):
        if rng.random() < 0.5:
            code = run_child(context, folder, kill_at=rng.randrange(len(reference.points)))
        else:
            code = run_child(context, folder, after_s=rng.uniform(0.0, reference.duration_s))
        if code == 0:
            assert finished(folder)
            break
        assert code == -signal.SIGKILL
        if finished(folder):
            break
        kills += 1
    if not finished(folder):
        assert run_child(context, folder) == 0
    return kills


def test_killed_at_random_moments_again_and_again(context, place, reference):
    rng = random.Random(1)
    kills = number = 0
    while kills < 8:
        folder = new_folder(place, f"random-{number}")
        kills += kill_until_done(context, folder, reference, rng, 4)
        assert_same(folder, reference)
        number += 1


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_thousand_kills(context, place, reference):
    def attempt(number: int) -> int:
        folder = new_folder(place, f"thousand-{number}")
        kills = kill_until_done(context, folder, reference, random.Random(number), 8)
        assert_same(folder, reference)
        return kills

    kills = number = 0
    with ThreadPoolExecutor(2) as pool:
        while kills < 1000:
            kills += sum(pool.map(attempt, range(number, number + 20)))
            number += 20
            sys.stdout.write(f"{kills} kills in {number} runs\n")


class StopAt(Callback):
    """Presses Ctrl-C when a line of metrics says that this step is done."""

    def __init__(self, step: int, times: int = 1) -> None:
        self.step = step
        self.times = times

    def on_log(self, run, metrics):
        if run.step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_saves_and_prints_the_line_that_resumes(place, reference, capsys):
    folder = new_folder(place, "interrupted")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        pretrain(killable.settings(folder), callbacks=[StopAt(8)])
    assert signal.getsignal(signal.SIGINT) is before
    assert (folder / "checkpoint-8").is_dir()
    assert f"stopped; go on with: ingot pretrain --resume {folder}" in capsys.readouterr().out
    assert not finished(folder)
    resume(folder, quiet=True)
    now = snapshot(folder)
    # The extra checkpoint is pruned like any other; nothing else tells that the run was interrupted at a step due for evaluation.
    assert now == reference.snapshot


def test_a_second_ctrl_c_stops_at_once(place, reference):
    folder = new_folder(place, "interrupted-twice")
    with pytest.raises(KeyboardInterrupt):
        pretrain(killable.settings(folder), callbacks=[StopAt(8, times=2)], quiet=True)
    assert not (folder / "checkpoint-8").exists()
    resume(folder, quiet=True)
    assert_same(folder, reference)


def test_threads_do_not_change_a_bit(place, reference):
    folder = new_folder(place, "threads")
    with pytest.raises(KeyboardInterrupt):
        pretrain(killable.threads_of(killable.settings(folder), 3), callbacks=[StopAt(6)], quiet=True)
    resume(folder, threads=2, quiet=True)
    assert_same_but_card(folder, reference)


def assert_same_but_card(folder: Path, reference: Reference) -> None:
    """The card holds the settings, and the number of threads is one."""
    now = snapshot(folder)
    for name, value in reference.snapshot.items():
        assert now[name] == value or name == "README.md", name


def test_another_level_is_allowed_and_says_so(place, capsys):
    import ingot

    levels = ingot.build_info()["levels_available"]
    if len(levels) < 2:
        pytest.skip("this machine has one level")
    folder = new_folder(place, "level")
    with pytest.raises(KeyboardInterrupt):
        pretrain(dataclasses.replace(killable.settings(folder), level=levels[-1]), callbacks=[StopAt(6)], quiet=True)
    resume(folder, level=levels[0])
    line = f"began at instruction level {levels[-1]}, goes on at {levels[0]}: the last bits will differ"
    assert line in capsys.readouterr().out
    assert finished(folder)


def test_a_torn_checkpoint_is_refused_by_name_and_the_run_ends_the_same(place, reference, capsys):
    folder = new_folder(place, "torn")
    with pytest.raises(KeyboardInterrupt):
        pretrain(killable.settings(folder), callbacks=[StopAt(10)], quiet=True)
    weights = folder / "checkpoint-10" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    resume(folder)
    out = capsys.readouterr().out
    assert "refused: " in out
    assert "checkpoint-10: model.safetensors is cut short" in out
    assert f"resumed from {folder / 'checkpoint-9'}" in out
    assert_same(folder, reference)


def test_a_finished_run_is_extended_and_no_shorter_one_is_made(place, reference):
    folder = new_folder(place, "extended")
    killable.go_on(folder)
    with pytest.raises(RunError, match=r"this run is finished \(12 steps\); --max-steps N extends it"):
        resume(folder, quiet=True)
    with pytest.raises(ConfigError, match="has done 12 steps already"):
        resume(folder, max_steps=11, quiet=True)
    assert_same(folder, reference)
    result = resume(folder, max_steps=16, quiet=True)
    assert [line["step"] for line in result.history if "loss" in line] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert finished(folder)
    assert (folder / "checkpoint-16").is_dir()


def test_an_extension_that_is_killed_goes_on_with_its_new_length(context, place):
    straight, killed = new_folder(place, "extension-a"), new_folder(place, "extension-b")
    for folder in (straight, killed):
        killable.go_on(folder)
    resume(straight, max_steps=18, quiet=True)
    with pytest.raises(KeyboardInterrupt):
        resume(killed, max_steps=18, callbacks=[StopAt(14)], quiet=True)
    assert run_child(context, killed) == 0
    for name in ("model.safetensors", "checkpoint-18/model.safetensors", "checkpoint-18/optimizer.safetensors"):
        assert (straight / name).read_bytes() == (killed / name).read_bytes(), name


def test_resuming_reads_no_text_again(place, reference):
    folder = new_folder(place, "no-text")
    with pytest.raises(KeyboardInterrupt):
        pretrain(killable.settings(folder), callbacks=[StopAt(6)], quiet=True)
    text = folder.parent / "text.txt"
    text.unlink()
    text.write_text("something else")
    resume(folder, quiet=True)
    assert_same(folder, reference)


def test_a_text_that_changed_is_noticed_where_it_must_be_read_again(place):
    folder = new_folder(place, "changed")
    with pytest.raises(KeyboardInterrupt):
        pretrain(killable.settings(folder), callbacks=[StopAt(6)], quiet=True)
    for file in (folder.parent / "run-cache").iterdir():
        file.unlink()
    text = folder.parent / "text.txt"
    changed = text.read_text() + "more"
    text.unlink()
    text.write_text(changed)
    with pytest.raises(RunError, match="the text has changed since this run began"):
        resume(folder, quiet=True)
    assert not (folder / "run.lock").exists()
