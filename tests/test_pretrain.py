"""The pretraining loop from the outside: what a run leaves behind, what it says, and what it does when something goes wrong."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import ingot
from ingot import durable
from ingot.configs import Architecture, PretrainConfig
from ingot.data.batches import Cursor, PackedBatches, Stretches
from ingot.errors import ConfigError, DataError, RunError
from ingot.models import Model, load_model
from ingot.tokenizer import Tokenizer
from ingot.training import pretrain as loop
from ingot.training import resuming
from ingot.training.callbacks import Callback
from ingot.training.checkpoints import list_checkpoints
from ingot.training.cost import Cost, fit_to_time, timed
from ingot.training.pretrain import pretrain, resume

TINY = Architecture(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)


@pytest.fixture
def config(tmp_path) -> PretrainConfig:
    """A short run on the bytes of one text with a simple rule."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i % 10} and {(i + 1) % 10}, " for i in range(1500)))
    return PretrainConfig(
        data=(str(text),),
        output=str(tmp_path / "run"),
        architecture=TINY,
        max_length=32,
        per_device_train_batch_size=8,
        max_steps=60,
        learning_rate=1e-2,
        sample_tokens=8,
    )


def test_a_run_learns_and_leaves_a_complete_folder(config, capsys):
    result = pretrain(config)
    assert result.final_loss is not None
    assert result.final_loss < 2.5 < result.history[0]["eval_loss"]
    assert result.history[0]["eval_loss"] == pytest.approx(np.log(256), abs=0.1)

    folder = result.output
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ):
        assert (folder / name).is_file(), name
    card = (folder / "README.md").read_text()
    facts = json.loads((folder / "run.json").read_bytes())
    for expected in (
        facts["data"]["source_hash"],
        facts["data"]["tokenizer_hash"],
        f"{result.final_loss:.4f}",
        "numpy",
    ):
        assert expected in card
    assert str(folder) not in card, "the card names folders of this machine"
    assert "\n# run\n" in card
    assert PretrainConfig.from_dict(facts["config"]) == config

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.history
    assert [line["step"] for line in lines if "loss" in line] == [10, 20, 30, 40, 50, 60]
    assert [line["step"] for line in lines if "eval_loss" in line] == list(range(0, 61, 6))
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in samples] == list(range(0, 61, 6))
    assert all(line["prompt"] for line in samples)

    curves = (folder / "curves.svg").read_text()
    assert "held out" in curves
    assert curves.replace("http://www.w3.org/2000/svg", "").count("http") == 0, (
        "the picture needs nothing from elsewhere"
    )

    out = capsys.readouterr().out
    assert re.search(r"^cost +about .* tokens/s.* timed just now.*memory about", out, re.M)
    assert re.search(r"^step 60/60  loss \d\.\d+  held-out \d\.\d+  .* tokens/s.*GB  ETA 0 s$", out, re.M)
    assert f"{folder} holds the model" in out


def test_the_top_of_the_folder_is_the_best_model_and_the_checkpoint_the_last(config):
    # Digits drawn at random can be learned by heart and not foretold: the held-out loss turns around.
    rng = np.random.default_rng(0)
    text = Path(config.data[0])
    text.write_text("".join(str(digit) for digit in rng.integers(0, 10, 400)))
    config = dataclasses.replace(config, max_steps=400, eval_steps=20, lr_scheduler_type="constant", sample_tokens=0)
    result = pretrain(config, quiet=True)
    losses = {line["step"]: line["eval_loss"] for line in result.history if "eval_loss" in line}
    best = min(losses, key=losses.__getitem__)
    assert best < 400
    assert result.best_loss == losses[best] < result.final_loss == losses[400]
    top, last = (
        load_file(result.output / "model.safetensors"),
        load_file(result.output / "checkpoint-400/model.safetensors"),
    )
    kept = load_file(result.output / f"checkpoint-{best}" / "model.safetensors")
    assert [step for step, _ in list_checkpoints(result.output)] == [best, 380, 400]
    state = result.model.state()
    for name in top:
        np.testing.assert_array_equal(top[name], kept[name])
        np.testing.assert_array_equal(last[name], state[name])
    assert any((top[name] != last[name]).any() for name in top)


def test_a_line_has_the_mean_loss_of_the_steps_since_the_line_before(config, tmp_path):
    config = dataclasses.replace(config, max_steps=12, sample_tokens=0)
    each = pretrain(dataclasses.replace(config, logging_steps=1, output=str(tmp_path / "each")), quiet=True).history
    some = pretrain(dataclasses.replace(config, logging_steps=4, output=str(tmp_path / "some")), quiet=True).history
    losses = [line["loss"] for line in each if "loss" in line]
    means = [line["loss"] for line in some if "loss" in line]
    assert means == pytest.approx([np.mean(losses[i : i + 4]) for i in (0, 4, 8)], rel=1e-12)


def test_the_result_opens_as_a_model(config):
    result = pretrain(config, quiet=True)
    model = load_model(result.output)
    tokenizer = Tokenizer.from_file(result.output)
    assert tokenizer.vocab_size == model.config.vocab_size == 256
    text = Path(config.data[0]).read_bytes()[-300:]
    ids = np.frombuffer(text, np.uint8).astype(np.int32)
    _, out = model.forward(ids[:32], np.array([0, 32]), ids[1:33], train=False)
    assert -out.logprobs.mean() < 2.7


def test_going_on_from_a_model_with_other_text(config, tmp_path):
    first = pretrain(dataclasses.replace(config, vocab_size=270), quiet=True)
    other = tmp_path / "other.txt"
    other.write_text(Path(config.data[0]).read_text()[::-1])
    second = pretrain(
        dataclasses.replace(
            config, data=(str(other),), model=str(first.output), output=str(tmp_path / "second"), max_steps=5
        ),
        quiet=True,
    )
    assert second.tokenizer == first.tokenizer
    assert second.model.config == load_model(first.output).config
    card = (second.output / "README.md").read_text()
    assert f"| started from | {first.output} |" in card
    # Before its first step it is the first model: on the first text it has that loss.
    same = pretrain(
        dataclasses.replace(config, model=str(first.output), output=str(tmp_path / "third"), max_steps=1), quiet=True
    )
    assert same.history[0]["eval_loss"] == pytest.approx(first.best_loss, rel=1e-6)


def test_documents_given_by_a_program_are_enough_also_to_resume(config, tmp_path):
    class Stop(Callback):
        def on_log(self, run, metrics):
            if run.step == 20:
                raise KeyboardInterrupt

    documents = [f"{i % 7} is followed by {(i + 1) % 7}." for i in range(300)]
    config = dataclasses.replace(config, data=(), vocab_size=266)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, data=iter(documents), callbacks=[Stop()], quiet=True)
    result = resume(config.output, quiet=True)
    assert result.history[-1]["step"] == 60
    facts = json.loads((result.output / "run.json").read_bytes())["data"]
    assert facts["windows"] == "packed"
    assert facts["num_documents"] == 300
    # The documents are read in their order, once an epoch, also after the resume.
    cursor = json.loads((result.output / "checkpoint-60" / "trainer_state.json").read_bytes())["cursor"]
    epochs = [line["epoch"] for line in result.history if "epoch" in line]
    assert cursor["epoch"] + cursor["index"] / 300 == pytest.approx(epochs[-1], abs=0.2)
    assert epochs[-1] > 1.5


def test_the_result_does_not_depend_on_how_a_step_is_divided(config, tmp_path):
    """1 x 8 and 8 x 1 rows: the same gradient, with dropout and without."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 20, 200)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(0, 64, bounds[-1])
    batches = PackedBatches(ids, Stretches.of(bounds[:-1], bounds[1:]), 24, 8, 0)
    batch, _ = batches.take(0, Cursor())
    for dropout in (0.0, 0.2):
        shape = dataclasses.replace(TINY, dropout=dropout).resolve(64, 24)
        model = Model(shape, seed=1)
        found = []
        for parts in (1, 2, 4, 8):
            model.zero_grad()
            once = dataclasses.replace(
                config, gradient_accumulation_steps=parts, per_device_train_batch_size=8 // parts
            )
            loss = loop._backward(model, once, batch, step=3)
            found.append((loss, {name: np.array(value) for name, value in model.gradients.items()}))
        for loss, gradients in found[1:]:
            assert loss == pytest.approx(found[0][0], rel=1e-6)
            for name, gradient in gradients.items():
                difference = np.abs(gradient - found[0][1][name]).max()
                assert difference <= 1e-5 * np.abs(found[0][1][name]).max() + 1e-9, name


def test_epochs_decide_the_number_of_steps(config):
    config = dataclasses.replace(config, max_steps=None, num_train_epochs=1.5, sample_tokens=0)
    result = pretrain(config, quiet=True)
    last = [line for line in result.history if "epoch" in line][-1]
    assert 1.5 <= last["epoch"] < 1.5 + 256 / 5000


def test_a_time_decides_the_number_of_steps_once(config):
    class Stop(Callback):
        def on_log(self, run, metrics):
            raise KeyboardInterrupt

    config = dataclasses.replace(config, max_steps=None, max_time="3s", sample_tokens=0)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, callbacks=[Stop()], quiet=True)
    decided = json.loads((Path(config.output) / "run.json").read_bytes())["decisions"]
    began = time.monotonic()
    result = resume(config.output, quiet=True)
    took_s = time.monotonic() - began
    assert result.history[-1]["step"] == decided["max_steps"]
    assert json.loads((result.output / "run.json").read_bytes())["decisions"] == decided
    # The machine may be busy with other work: this only rules out a wrong unit or a forgotten part.
    assert 0.3 < took_s < 60


def test_fitting_to_a_time_reserves_room_for_the_rest():
    steps, limit = fit_to_time(1000.0, 0.1, 1.0, 0.5, 4)
    assert limit is None
    assert Cost(0.1, 2.0, 1.0, memory_bytes=0).total_s(steps, 12, 10) == pytest.approx(960, abs=0.2)
    steps, limit = fit_to_time(1000.0, 0.1, 1.0, 0.5, 4000)
    assert limit == 16
    assert 0.8 * 9600 < steps < 9600
    with pytest.raises(ConfigError, match=r"only 5 steps of 1\.80 s fit into 10 s"):
        fit_to_time(10.0, 1.8, 0.0, 0.0, 0)


def test_timing_leaves_the_first_call_out(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    durations = iter([9.0, 1.0, 2.0, 3.0, 4.0])

    def call():
        clock[0] += next(durations)

    assert timed(call, 14.0) == 2.0


def test_a_dry_run_tells_the_cost_and_makes_no_folder(config, capsys):
    result = pretrain(config, dry_run=True)
    out = capsys.readouterr().out
    for word in ("network", "text", "length", "cost"):
        assert re.search(rf"^{word} ", out, re.M)
    assert not Path(config.output).exists()
    assert result.history == []


def test_probing_leaves_the_weights_as_they_were(config):
    result = pretrain(config, dry_run=True, quiet=True)
    fresh = Model(result.model.config, seed=config.seed)
    for name, value in result.model.state().items():
        np.testing.assert_array_equal(value.view(np.uint32), fresh.state()[name].view(np.uint32))


class Poison(Callback):
    """Makes the weights useless from a step on, for so many lines of metrics."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, run, metrics):
        if run.step == self.step:
            state = run.model.state()
            name = next(iter(state))
            state[name] = np.full_like(state[name], np.nan)
            run.model.load_state(state)


def test_a_loss_that_is_no_number_stops_the_run_with_the_step_named(config):
    config = dataclasses.replace(config, logging_steps=1, eval_steps=10, sample_tokens=0)
    with pytest.raises(
        RunError,
        match=r"not finite since step 26 \(10 steps in a row were skipped\); the last checkpoint is .*checkpoint-20; .*--learning-rate",
    ):
        pretrain(config, callbacks=[Poison(25)], quiet=True)
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    strict = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [line["step"] for line in strict if line.get("loss", 0) is None] == list(range(26, 36))[:-1]
    assert not (Path(config.output) / "run.lock").exists()
    resumed = resume(config.output, quiet=True)
    assert resumed.final_loss is not None
    assert resumed.final_loss < 2.5


def full_disk(when) -> None:
    """From now on points for which ``when(name)`` holds find no space."""

    def listener(name: str) -> None:
        if when(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    durable.crash_points.append(listener)


@pytest.fixture(autouse=True)
def _no_listeners():
    yield
    durable.crash_points.clear()


def test_a_full_disk_does_not_stop_the_run_and_the_last_checkpoint_stays(config, capsys):
    state = {"saves": 0}

    def second_save(name: str) -> bool:
        if name == "optimizer.safetensors: before write":
            state["saves"] += 1
            return state["saves"] == 2
        return False

    config = dataclasses.replace(config, save_steps=20, save_total_limit=9)
    full_disk(second_save)
    pretrain(config)
    out = capsys.readouterr().out
    assert (
        f"checkpoint-40 could not be saved (No space left on device); the last checkpoint is {config.output}/checkpoint-20; the run goes on"
        in out
    )
    assert [step for step, _ in list_checkpoints(Path(config.output))] == [20, 60]


def test_a_full_disk_at_the_end_stops_in_one_line_and_can_be_resumed(config):
    full_disk(lambda name: name == "checkpoint-60: before rename")
    with pytest.raises(
        RunError,
        match=r"checkpoint-60 could not be saved .*last checkpoint is .*checkpoint-54; free some space, then: ingot pretrain --resume",
    ):
        pretrain(config, quiet=True)
    assert not list(Path(config.output).glob(".tmp-*"))
    durable.crash_points.clear()
    assert resume(config.output, quiet=True).history[-1]["step"] == 60


def test_a_full_disk_for_metrics_stops_in_one_line(config):
    seen = []

    def late(name: str) -> bool:
        seen.append(name)
        return name == "metrics.jsonl: before append" and seen.count(name) > 12

    full_disk(late)
    with pytest.raises(
        RunError, match=r"cannot be written \(No space left on device\); the last checkpoint is .*checkpoint-"
    ):
        pretrain(config, quiet=True)


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_a_write_that_the_system_refuses_is_a_full_disk(config, capsys):
    import resource

    class Limit(Callback):
        def on_log(self, run, metrics):
            if run.step == 10:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
            if run.step == 30:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        pretrain(dataclasses.replace(config, save_steps=20, save_total_limit=9, eval_steps=60), callbacks=[Limit()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    line = r"checkpoint-20 could not be saved \(.*File too large.*\); nothing was saved so far; the run goes on"
    assert re.search(line, capsys.readouterr().out)
    assert [step for step, _ in list_checkpoints(Path(config.output))] == [40, 60]


def test_callbacks_are_told_in_order(config):
    calls: list[tuple[str, int]] = []

    class Listen(Callback):
        def on_start(self, run):
            calls.append(("start", run.step))

        def on_log(self, run, metrics):
            calls.append(("log", metrics["step"]))

        def on_evaluate(self, run, metrics):
            assert run.model.num_parameters > 0
            calls.append(("evaluate", run.step))

        def on_save(self, run, checkpoint):
            calls.append(("save", int(checkpoint.name.partition("-")[2])))

        def on_end(self, run):
            assert (run.output / "curves.svg").exists()
            calls.append(("end", run.step))

    pretrain(dataclasses.replace(config, max_steps=4, eval_steps=2, logging_steps=4), callbacks=[Listen()], quiet=True)
    assert calls == [
        ("start", 0),
        ("evaluate", 0),
        ("evaluate", 2),
        ("save", 2),
        ("log", 4),
        ("evaluate", 4),
        ("save", 4),
        ("end", 4),
    ]


def test_without_a_held_out_part_the_last_weights_are_the_result(config):
    result = pretrain(dataclasses.replace(config, held_out=0.0, max_steps=10), quiet=True)
    assert result.best_loss is None
    assert result.final_loss is None
    top, last = (
        load_file(result.output / "model.safetensors"),
        load_file(result.output / "checkpoint-10/model.safetensors"),
    )
    for name in top:
        np.testing.assert_array_equal(top[name], last[name])


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"data": ()}, DataError, "no text to learn from: give --data"),
        ({"data": ("nowhere.txt",)}, DataError, r"nowhere\.txt: no such file"),
        ({"max_length": 20000}, DataError, r"text\.txt: .* fewer than one window of max_length 20000"),
        ({"vocab_size": 255}, ValueError, "vocab_size 255 is too small"),
        ({"vocab_size": 100000}, ValueError, "100000"),
        ({"tokenizer": "nowhere"}, OSError, "nowhere"),
        ({"model": "nowhere"}, (ValueError, OSError), "nowhere"),
        (
            {"architecture": Architecture(hidden_size=65536, num_hidden_layers=200, num_attention_heads=512)},
            RunError,
            r"needs about [\d.]+ GB of memory .* and [\d.]+ GB are there: lower --per-device-train-batch-size",
        ),
        ({"per_device_train_batch_size": 10**9}, RunError, "GB are there"),
        (
            {"architecture": dataclasses.replace(TINY, num_attention_heads=3)},
            ConfigError,
            "hidden_size 16 does not divide by num_attention_heads 3",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(config, fields, error, message):
    with pytest.raises(error, match=message) as raised:
        pretrain(dataclasses.replace(config, **fields), quiet=True)
    assert "\n" not in str(raised.value)
    assert not Path(config.output).exists(), "the corrected settings cannot use the folder"


def test_a_model_that_does_not_fit_the_run_is_refused(config, tmp_path):
    first = pretrain(
        dataclasses.replace(config, architecture=dataclasses.replace(TINY, family="gpt2"), max_steps=1), quiet=True
    )
    again = dataclasses.replace(config, model=str(first.output))
    with pytest.raises(ConfigError, match="max_length 64 is beyond the 32 positions"):
        pretrain(dataclasses.replace(again, max_length=64, output=str(tmp_path / "b")), quiet=True)
    with pytest.raises(ConfigError, match="brings its tokenizer"):
        pretrain(dataclasses.replace(again, vocab_size=300, output=str(tmp_path / "c")), quiet=True)
    Tokenizer.train(iter(["some words and more words"] * 9), vocab_size=262).save(tmp_path / "tok")
    other = dataclasses.replace(again, tokenizer=str(tmp_path / "tok"), output=str(tmp_path / "d"))
    with pytest.raises(ConfigError, match=r"tok: not the tokenizer that .*run learned with.*leave --tokenizer out"):
        pretrain(other, quiet=True)
    # Also a smaller one, whose ids the model has, though as other text.
    base = dataclasses.replace(config, architecture=TINY, vocab_size=270, max_steps=1, output=str(tmp_path / "e"))
    larger = pretrain(base, quiet=True)
    with pytest.raises(ConfigError, match="not the tokenizer that"):
        pretrain(dataclasses.replace(other, model=str(larger.output)), quiet=True)
    (larger.output / "tokenizer.json").unlink()
    assert pretrain(dataclasses.replace(other, model=str(larger.output)), quiet=True).final_loss
    (first.output / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"262 tokens but the model .* only 256"):
        pretrain(dataclasses.replace(other, output=str(tmp_path / "f")), quiet=True)


def test_a_model_with_learned_positions_fixes_the_length_where_none_is_given(config, tmp_path):
    gpt2 = dataclasses.replace(TINY, family="gpt2")
    first = pretrain(dataclasses.replace(config, architecture=gpt2, max_steps=1), quiet=True)
    again = dataclasses.replace(config, model=str(first.output), max_length=None, max_steps=1)
    result = pretrain(dataclasses.replace(again, output=str(tmp_path / "b")), quiet=True)
    assert json.loads((result.output / "run.json").read_bytes())["config"]["max_length"] == 32
    # Rotary positions set no limit.
    second = pretrain(dataclasses.replace(config, output=str(tmp_path / "c"), max_steps=1), quiet=True)
    longer = dataclasses.replace(again, model=str(second.output), output=str(tmp_path / "d"), windows="packed")
    result = pretrain(longer, quiet=True)
    assert json.loads((result.output / "run.json").read_bytes())["config"]["max_length"] == 256


def test_names_of_the_package():
    assert ingot.pretrain is pretrain
    assert ingot.resume is resuming.resume
    assert ingot.PretrainConfig is PretrainConfig
