"""Run folders: one live run each, whole checkpoints or none, metrics that can be cut back, and room for nobody else's files."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import socket
import sys
import types
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file

from ingot import durable
from ingot.errors import CheckpointError, RunError
from ingot.tokenizer import Tokenizer
from ingot.training import checkpoints
from ingot.training.locks import RunLock
from ingot.training.metrics import MetricsLog
from ingot.training.runs import RunFolder


class Weights:
    """Plays model and optimizer: one array each."""

    config = types.SimpleNamespace(max_position_embeddings=64)

    def __init__(self, value: float) -> None:
        self.value = value
        self.optimizer = self

    def state(self):
        return {"m.w": np.full(3, self.value, np.float32)}

    def save(self, folder):
        save_file({"w": np.full(3, self.value, np.float32)}, Path(folder) / "model.safetensors")


class Words:
    """Plays tokenizer."""

    eos_token_id = 7

    def decode(self, ids):
        return "<|endoftext|>"

    def save(self, folder):
        (Path(folder) / "tokenizer.json").write_text("{}")


def write(folder: Path, step: int, state: dict | None = None) -> Path:
    return checkpoints.write_checkpoint(folder, step, Weights(step), Words(), state or {"step": step}, {"ingot": "1"})


@pytest.fixture
def points():
    """Names of the crash points as they are reached."""
    names: list[str] = []
    durable.crash_points.append(names.append)
    yield names
    durable.crash_points.clear()


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    path = write(tmp_path, 7, {"step": 7, "loss_sum": 0.1 + 0.2})
    checkpoints.verify(path)
    assert checkpoints.read_state(path)["loss_sum"] == 0.1 + 0.2
    assert checkpoints.read_weights(path)["w"].tolist() == [7, 7, 7]
    assert checkpoints.read_optimizer(path)["m.w"].tolist() == [7, 7, 7]
    assert checkpoints.newest_usable(tmp_path, print) == path
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint-7"]


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, points, monkeypatch):
    """A power cut is not a kill: what was not synced may be gone. Each file, the folder, and at last the folder above are synced."""
    synced: list[int] = []
    at_rename: list[int] = []
    real = os.fsync

    def fsync(descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    durable.crash_points.append(
        lambda name: at_rename.extend(synced) if name == "checkpoint-1: before rename" else None
    )
    path = write(tmp_path, 1)
    assert {file.stat().st_ino for file in [path, *path.iterdir()]} <= set(at_rename)
    assert synced[-1] == tmp_path.stat().st_ino
    assert len(synced) > len(at_rename)


FILES = ["model.safetensors", "optimizer.safetensors", "trainer_state.json", "tokenizer.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["cut", "edit", "delete"])
def test_a_harmed_checkpoint_is_refused_by_name_and_the_one_before_used(tmp_path, name, harm):
    before, newest = write(tmp_path, 10), write(tmp_path, 20)
    file = newest / name
    content = file.read_bytes()
    if harm == "cut":
        file.write_bytes(content[:-1] if name != "manifest.json" else content[:-5])
    elif harm == "edit":
        middle = len(content) // 2
        changed = bytes([content[middle] ^ 1])
        file.write_bytes(content[:middle] + changed + content[middle + 1 :])
    else:
        file.unlink()
    lines: list[str] = []
    assert checkpoints.newest_usable(tmp_path, lines.append) == before
    assert len(lines) == 1
    assert "checkpoint-20" in lines[0]
    if not (name == "manifest.json" and harm == "edit"):
        assert name in lines[0]
    write(tmp_path, 20)
    assert checkpoints.newest_usable(tmp_path, lines.append) == newest


def test_without_a_whole_checkpoint_the_run_does_not_begin_anew_in_silence(tmp_path):
    assert checkpoints.newest_usable(tmp_path, print) is None
    for step in (1, 2):
        (write(tmp_path, step) / "manifest.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"checkpoint-2: manifest\.json is missing; .*checkpoint-1: .* delete them"
    ):
        checkpoints.newest_usable(tmp_path, lambda line: None)


def test_a_checkpoint_from_a_newer_version_is_refused_and_not_replaced_by_an_older_one(tmp_path):
    write(tmp_path, 1)
    manifest = write(tmp_path, 2) / "manifest.json"
    content = json.loads(manifest.read_bytes())
    manifest.write_text(json.dumps({**content, "format_version": 99, "versions": {"ingot": "9.9"}}))
    with pytest.raises(CheckpointError, match=r"checkpoint-2: saved by ingot 9\.9 in format 99.*upgrade ingot"):
        checkpoints.newest_usable(tmp_path, print)


def test_a_manifest_cannot_name_files_elsewhere(tmp_path):
    path = write(tmp_path, 1)
    outside = tmp_path / "outside"
    outside.write_text("x")
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest["files"]["../outside"] = {"sha256": durable.file_sha256(outside), "bytes": 1}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"\.\./outside is missing"):
        checkpoints.verify(path)


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in (1, 2, 3, 4, 5, 10):
        write(tmp_path, step)
    # 10 was refused earlier: it lies ahead of this run, which is at 5.
    checkpoints.prune(tmp_path, 5, previous=4, keep_newest=2, keep_best=2)
    assert [step for step, _ in checkpoints.list_checkpoints(tmp_path)] == [2, 4, 5, 10]
    # 4 was refused, and the run resumed from 2.
    checkpoints.prune(tmp_path, 5, previous=2, keep_newest=2, keep_best=2)
    assert [step for step, _ in checkpoints.list_checkpoints(tmp_path)] == [2, 5, 10]


def test_a_full_disk_at_any_point_leaves_the_last_checkpoint_and_nothing_else(tmp_path, points):
    write(tmp_path, 1)
    names = list(points)
    assert len(names) > 10
    for index, name in enumerate(names):
        folder = tmp_path / str(index)
        folder.mkdir()
        good = write(folder, 1)
        seen = []

        def full(point, seen=seen, index=index):
            seen.append(point)
            if len(seen) == index + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        durable.crash_points.append(full)
        with pytest.raises(OSError, match="No space left"):
            write(folder, 2)
        durable.crash_points.remove(full)
        left = {entry.name for entry in folder.iterdir()}
        # Once the folder is renamed, the checkpoint is there, whole.
        assert left - {"checkpoint-2"} == {"checkpoint-1"}, name
        usable = checkpoints.newest_usable(folder, pytest.fail)
        assert usable in (good, folder / "checkpoint-2")


def test_metrics_are_cut_back_to_whole_lines(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.sync()
    log.cut(3)
    assert log.read() == []
    for step in range(1, 6):
        log.append({"step": step, "loss": float("nan") if step == 2 else 0.1 * step, "text": "a\u2028b\n"})
    with log.path.open("ab") as file:
        file.write(b'{"step": 6, "lo')
    assert [line["step"] for line in log.read()] == [1, 2, 3, 4, 5]
    assert log.read()[1]["loss"] is None
    log.cut(4)
    log.append({"step": 9})
    assert [line["step"] for line in log.read()] == [1, 2, 3, 4, 9]
    assert log.path.read_bytes().endswith(b"}\n")
    log.cut(0)
    assert log.path.read_bytes() == b""


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_a_line_that_does_not_fit_leaves_no_part_of_itself(tmp_path):
    import resource

    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1})
    before = log.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))
    try:
        with pytest.raises(OSError, match=r"large|space"):
            log.append({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log.path.read_bytes() == before


def test_a_replaced_file_is_old_or_new_and_never_a_part(tmp_path, points):
    path = tmp_path / "file"
    durable.write_file(path, b"old")
    assert points == [
        "file: before write",
        "file: before sync",
        "file: before rename",
        "file: before folder sync",
        "file: done",
    ]

    def fail(point):
        if point == "file: before sync":
            raise OSError(errno.ENOSPC, "full")

    durable.crash_points.append(fail)
    with pytest.raises(OSError, match="full"):
        durable.write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


CONFIG = {"output": "x", "data": ["a.txt"], "max_steps": 5, "model": {"hidden_size": 8}}


def test_a_new_run_saves_its_settings_at_once_and_takes_only_an_empty_folder(tmp_path):
    import tomllib

    with RunFolder.create(tmp_path / "a" / "b", "pretrain", CONFIG) as folder:
        assert tomllib.loads((folder.path / "pretrain.toml").read_text()) == CONFIG
        assert json.loads((folder.path / "run.json").read_bytes())["config"] == CONFIG
    with pytest.raises(RunError, match=r"unfinished run; go on with it: ingot pretrain --resume"):
        RunFolder.create(tmp_path / "a" / "b", "pretrain", CONFIG)
    with RunFolder.open(tmp_path / "a" / "b") as folder:
        folder.facts |= {"finished": True, "decisions": {"max_steps": 5}}
        folder.save_facts()
    with pytest.raises(RunError, match=r"holds a finished run of 5 steps; .*--max-steps N"):
        RunFolder.create(tmp_path / "a" / "b", "pretrain", CONFIG)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("precious")
    with pytest.raises(RunError, match=r"holds other files \(cat\.jpg\)"):
        RunFolder.create(tmp_path / "photos", "pretrain", CONFIG)
    assert [entry.name for entry in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be made"):
        RunFolder.create(tmp_path / "file", "pretrain", CONFIG)


def test_a_run_that_fails_before_it_began_leaves_what_others_put_there(tmp_path):
    def work(error, path, stranger=False):
        with RunFolder.create(path, "pretrain", CONFIG) as folder:
            folder.save_tokenizer(Tokenizer.bytes_only())
            if stranger:
                (path / "notes.txt").write_text("precious")
            raise error("wrong")

    for error in (RunError, FileNotFoundError):
        with pytest.raises(error, match="wrong"):
            work(error, tmp_path / "a")
        assert not (tmp_path / "a").exists()
    with pytest.raises(KeyboardInterrupt):
        work(KeyboardInterrupt, tmp_path / "b")
    RunFolder.open(tmp_path / "b").close()
    with pytest.raises(RunError, match="wrong"):
        work(RunError, tmp_path / "c", stranger=True)
    assert [entry.name for entry in (tmp_path / "c").iterdir()] == ["notes.txt"]


def test_what_cannot_be_resumed_is_named(tmp_path):
    with pytest.raises(RunError, match="no run to resume"):
        RunFolder.open(tmp_path / "nowhere")
    RunFolder.create(tmp_path / "a", "pretrain", CONFIG).close()
    file = tmp_path / "a" / "run.json"
    content = file.read_text()
    file.write_text(content[: len(content) // 2])
    with pytest.raises(RunError, match=r"run\.json: damaged"):
        RunFolder.open(tmp_path / "a")
    file.write_text(content.replace('"format_version": 1', '"format_version": 8'))
    with pytest.raises(RunError, match=r"newer version of ingot \(format 8\)"):
        RunFolder.open(tmp_path / "a")
    assert not (tmp_path / "a" / "run.lock").exists()


def test_a_folder_in_use_is_refused_also_by_the_same_process(tmp_path):
    with RunFolder.create(tmp_path, "pretrain", CONFIG):
        with pytest.raises(RunError, match=rf"in use by process {os.getpid()} on"):
            RunFolder.open(tmp_path)
        with pytest.raises(RunError, match="in use by process"):
            RunFolder.create(tmp_path, "pretrain", CONFIG)
    RunFolder.open(tmp_path).close()


def _hold(folder, ready):
    RunLock(folder).acquire()
    ready.set()
    signal.pause()


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_the_lock_of_a_killed_run_is_taken_over_that_of_a_live_one_is_not(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(RunError, match=f"in use by process {process.pid}"):
        RunLock(tmp_path).acquire()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    # Dead, and not yet asked for its exit code: a zombie is no live run.
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    RunLock(tmp_path).acquire()
    process.join()


@pytest.mark.parametrize(
    ("holder", "live"),
    [
        ({"pid": os.getpid(), "host": socket.gethostname(), "started": "12345"}, False),
        ({"pid": 2**22 + 1, "host": socket.gethostname(), "started": "12345"}, False),
        ({"pid": os.getpid(), "host": "another machine", "started": "12345"}, True),
        ("", False),
        ({"pid": 1}, False),
    ],
)
def test_which_locks_count_as_live(tmp_path, holder, live):
    (tmp_path / "run.lock").write_text(json.dumps(holder) if holder else "")
    lock = RunLock(tmp_path)
    if live:
        with pytest.raises(RunError, match=r"on another machine; .*delete .*run\.lock"):
            lock.acquire()
    else:
        with lock:
            assert json.loads((tmp_path / "run.lock").read_bytes())["pid"] == os.getpid()
        assert list(tmp_path.iterdir()) == []


def _race(folder, start, results):
    start.wait()
    try:
        RunLock(folder).acquire()
        results.put(1)
        start_over = results  # keep the process, and so the lock, alive until the others have tried
        signal.pause() if start_over else None
    except RunError:
        results.put(0)


@pytest.mark.skipif(sys.platform == "win32", reason="ends its processes by signal")
def test_of_several_that_find_a_stale_lock_one_gets_it(tmp_path):
    context = multiprocessing.get_context("spawn")
    stale = {"pid": 2**22 + 1, "host": socket.gethostname(), "started": "1"}
    (tmp_path / "run.lock").write_text(json.dumps(stale))
    start, results = context.Event(), context.Queue()
    processes = [context.Process(target=_race, args=(tmp_path, start, results)) for _ in range(4)]
    for process in processes:
        process.start()
    start.set()
    outcomes = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.terminate()
        process.join()
    assert sum(outcomes) == 1


def test_leftovers_of_a_crash_are_swept_when_the_run_is_opened(tmp_path):
    RunFolder.create(tmp_path, "pretrain", CONFIG).close()
    (tmp_path / ".tmp-1-checkpoint-5").mkdir()
    (tmp_path / ".tmp-1-checkpoint-5" / "model.safetensors").write_text("half")
    (tmp_path / ".tmp-1-run.json").write_text("{")
    RunFolder.open(tmp_path).close()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["pretrain.toml", "run.json"]


def test_an_export_replaces_the_files_at_the_top(tmp_path):
    with RunFolder.create(tmp_path, "pretrain", CONFIG) as folder:
        for value in (1.0, 2.0):
            folder.export(Weights(value), Words(), f"card {value}")
        assert load_file(tmp_path / "model.safetensors")["w"].tolist() == [2, 2, 2]
        assert (tmp_path / "README.md").read_text() == "card 2.0"
        assert json.loads((tmp_path / "generation_config.json").read_bytes())["eos_token_id"] == 7
        assert json.loads((tmp_path / "tokenizer_config.json").read_bytes())["eos_token"] == "<|endoftext|>"
    assert not list(tmp_path.glob(".tmp-*"))
