"""Pretraining: text in, a network that predicts the next token out. The whole loop is :meth:`_Run.loop` and the methods below it.

A run is a function of its settings and its text: killed at any moment and resumed, it ends with the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ingot.configs import PretrainConfig, parse_duration
from ingot.data.batches import Batch, Cursor, count_held_out_batches, held_out_batches, mix
from ingot.durable import write_file
from ingot.errors import ConfigError, RunError
from ingot.losses.next_token import next_token_loss, token_weights
from ingot.models import Optimizer
from ingot.training.callbacks import Callback, RunView
from ingot.training.card import versions, write_card
from ingot.training.checkpoints import newest_usable, prune, read_optimizer, read_state, read_weights, write_checkpoint
from ingot.training.cost import Cost, Probe, timed
from ingot.training.decisions import Decisions, announce, decide
from ingot.training.interruption import Interruption
from ingot.training.pace import Pace
from ingot.training.preparation import Data, Text, make_model, prepare_text
from ingot.training.progress import Display, make_display
from ingot.training.report import draw_curves
from ingot.training.runs import CARD_FILE, RunFolder
from ingot.training.samples import choose_prompt, write_sample
from ingot.training.schedules import learning_rate, resolve_warmup
from ingot.training.state import State

if TYPE_CHECKING:
    from ingot.models.base import Model
    from ingot.tokenizer import Tokenizer

_MAX_SKIPPED_IN_ROW = 10
_DROPOUT_STREAM = 2


@dataclasses.dataclass(frozen=True)
class PretrainResult:
    """What :func:`pretrain` and :func:`resume` return."""

    history: list[dict[str, Any]]
    """Lines of metrics.jsonl."""
    model: Model
    """With the weights of the last step. The top of ``output`` holds those with the best held-out loss."""
    tokenizer: Tokenizer
    output: Path
    best_loss: float | None
    """Lowest held-out loss, nats per token; None where nothing was held out."""
    final_loss: float | None
    """Held-out loss of the last step."""


def pretrain(
    config: PretrainConfig,
    data: Data = None,
    callbacks: Sequence[Callback] = (),
    *,
    dry_run: bool = False,
    quiet: bool = False,
) -> PretrainResult:
    """Train a network on text, in a new run folder.

    Parameters
    ----------
    data
        Documents to learn from, or a Corpus, instead of ``config.data``.
    dry_run
        Print the cost and stop: the result holds the untrained network and no history, and no folder is made.
    quiet
        Print nothing.

    Raises
    ------
    IngotError
        One line that says what is wrong with settings, data, folder or loss, and what to do.
    KeyboardInterrupt
        Ctrl-C, after saving.
    """
    display = make_display(quiet)
    if dry_run:
        text = prepare_text(config, None, data, display)
        model = make_model(config, text.tokenizer, None)
        probe = _probe(config, text, model)
        decisions, cost = decide(config, text, model, probe, {})
        announce(config, text, model, probe, decisions, cost, 0, display)
        return PretrainResult([], model, text.tokenizer, Path(config.output), None, None)
    with RunFolder.create(config.output, "pretrain", config.to_dict()) as folder:
        return _train(folder, config, data, callbacks, display)


def resume(
    folder: str | Path,
    *,
    max_steps: int | None = None,
    threads: int | None = None,
    level: str | None = None,
    data: Data = None,
    callbacks: Sequence[Callback] = (),
    quiet: bool = False,
) -> PretrainResult:
    """Go on with a run from its newest whole checkpoint, or from step 0 where there is none.

    Parameters
    ----------
    max_steps
        A new end; extends a finished run. The schedule is stretched to it.
    threads, level
        Other than the run began with. Threads change nothing but speed; another instruction level changes the last bits.
    data
        Needed where the run was given its documents by a program and its token file is gone.

    Raises
    ------
    IngotError
        As :func:`pretrain`; also where there is no run, it is finished, or none of its checkpoints is whole.
    """
    display = make_display(quiet)
    with RunFolder.open(folder) as run:
        fields = {**run.facts["config"], "output": str(folder)}
        overrides = {"threads": threads, "level": level}
        fields |= {name: value for name, value in overrides.items() if value is not None}
        config = PretrainConfig.from_dict(fields, f"{run.path / 'run.json'}")
        if max_steps is not None:
            if max_steps < 1:
                raise ConfigError(f"max_steps must be at least 1, got {max_steps}")
            run.facts["decisions"] = {**run.facts.get("decisions", {}), "max_steps": max_steps}
        elif run.facts["finished"]:
            steps = run.facts["decisions"]["max_steps"]
            raise RunError(f"{folder}: this run is finished ({steps} steps); --max-steps N extends it")
        return _train(run, config, data, callbacks, display)


def _train(
    folder: RunFolder, config: PretrainConfig, data: Data, callbacks: Sequence[Callback], display: Display
) -> PretrainResult:
    """Prepare, restore, decide, loop."""
    command = f"ingot pretrain --resume {folder.path}"
    try:
        text = prepare_text(config, folder, data, display)
        folder.facts["data"] = text.facts
        checkpoint = newest_usable(folder.path, display.say)
        model = make_model(config, text.tokenizer, folder.facts["model_config"] if checkpoint else None)
        folder.facts["model_config"] = model.config.to_dict()
        state = State() if checkpoint is None else State.from_dict(read_state(checkpoint))
        known = folder.facts.get("decisions", {})
        if known.get("max_steps", state.step) < state.step:
            raise ConfigError(
                f"{folder.path}: has done {state.step} steps already; give --max-steps {state.step} or more"
            )
        probe = _probe(config, text, model)
        decisions, cost = decide(config, text, model, probe, known)
        announce(config, text, model, probe, decisions, cost, state.step, display)
        folder.facts |= {"decisions": dataclasses.asdict(decisions), "finished": False}
        began_at_level = folder.facts.setdefault("level", model.level)
        if began_at_level != model.level:
            display.say(
                f"began at instruction level {began_at_level}, goes on at {model.level}: the last bits will differ"
            )
        folder.facts["versions"] = versions()
        folder.save_facts()
        model.optimizer = _optimizer(config, model)
        if checkpoint is not None:
            model.load_state(read_weights(checkpoint))
            model.optimizer.load_state(read_optimizer(checkpoint))
            display.say(f"resumed from {checkpoint}")
        else:
            display.say(f"settings saved in {folder.path}; Ctrl-C saves and stops")
        folder.metrics.cut(state.metrics_lines)
        folder.samples.cut(state.samples_lines)
        run = _Run(folder, config, text, model, state, decisions, cost, display, callbacks)
        run.loop()
    except KeyboardInterrupt:
        display.stop()
        display.say(f"stopped; go on with: {command}")
        raise
    finally:
        display.stop()
    return PretrainResult(folder.metrics.read(), model, text.tokenizer, folder.path, state.best_loss, state.eval_loss)


def _optimizer(config: PretrainConfig, model: Model) -> Any:
    return Optimizer(
        model,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )


def _backward(model: Model, config: PretrainConfig, batch: Batch, step: int) -> float:
    """Add up the gradients of one step's batch; the mean loss over all of its targets."""
    loss = 0.0
    for part in batch.split(config.gradient_accumulation_steps):
        loss += model.forward_backward(
            part.tokens,
            part.offsets,
            part.targets,
            token_weights(part.targets, batch.num_targets),
            seed=mix(config.seed, _DROPOUT_STREAM, step),
            sequence_ids=part.sequence_ids,
        )
    return loss


def _held_out(config: PretrainConfig, text: Text, eval_batches: int | None) -> Iterator[Batch]:
    """The held-out part, or so many batches of it."""
    return held_out_batches(
        text.shards.ids,
        text.split.held_out,
        max_length=config.max_length,
        rows=config.per_device_train_batch_size,
        limit=eval_batches,
    )


def _probe(config: PretrainConfig, text: Text, model: Model) -> Probe:
    """Time a few steps on the first batch, and a batch of the held-out part. The weights are put back; the optimizer is not."""
    batch, _ = text.batches.take(0, Cursor())

    def step() -> None:
        text.batches.take(0, Cursor())
        model.zero_grad()
        _backward(model, config, batch, 0)
        model.step(0.0, clip_norm=config.max_grad_norm or None)

    # A length fitted to the time deserves a better measurement than an estimate for the eye.
    seconds = 0.2 if config.max_time is None else min(10.0, max(1.0, 0.01 * parse_duration(config.max_time)))
    before = model.state()
    step_s = timed(step, seconds)
    model.load_state(before)
    evaluation_batch_s = 0.0
    for sample in _held_out(config, text, 1):
        evaluation_batch_s = timed(
            functools.partial(model.forward, sample.tokens, sample.offsets, sample.targets, train=False), 0.05
        )
    batches = count_held_out_batches(
        text.split.held_out, max_length=config.max_length, rows=config.per_device_train_batch_size
    )
    return Probe(step_s, batch.num_targets, evaluation_batch_s, batches)


class _Run:
    """The loop and its parts."""

    def __init__(
        self,
        folder: RunFolder,
        config: PretrainConfig,
        text: Text,
        model: Model,
        state: State,
        decisions: Decisions,
        cost: Cost,
        display: Display,
        callbacks: Sequence[Callback],
    ) -> None:
        self.folder = folder
        self.config = config
        self.text = text
        self.model = model
        self.state = state
        self.decisions = decisions
        self.display = display
        self.callbacks = callbacks
        self.warmup_steps = resolve_warmup(config.warmup_steps, config.warmup_ratio, decisions.max_steps)
        self.saved_step = state.step
        self.pace = Pace(cost, decisions, model, config.max_length, state.elapsed_s)
        self.prompt = choose_prompt(config, text)
        self.stop = Interruption()

    def loop(self) -> None:
        """From the state's step to the last one."""
        state, total = self.state, self.decisions.max_steps
        self.notify(lambda callback, view: callback.on_start(view))
        self.display.start(state.step, total)
        with self.stop:
            while True:
                if self.due(self.decisions.eval_steps) and state.evaluated_step != state.step:
                    self.evaluate()
                if self.stop.requested:
                    self.save(required=True)
                    raise KeyboardInterrupt
                if self.due(self.decisions.save_steps):
                    self.save(required=state.step == total)
                if state.step >= total:
                    break
                self.train_step()
        self.finish()

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now."""
        return self.state.step % every == 0 or self.state.step >= self.decisions.max_steps

    def train_step(self) -> None:
        """One step of the optimizer, whatever number of batches its gradient takes."""
        state, config = self.state, self.config
        began = time.perf_counter()
        batch, state.cursor = self.text.batches.take(state.step, state.cursor)
        rate = learning_rate(
            state.step,
            self.decisions.max_steps,
            peak=config.learning_rate,
            schedule=config.lr_scheduler_type,
            warmup_steps=self.warmup_steps,
            min_ratio=config.min_learning_rate_ratio,
            decay_ratio=config.decay_ratio,
        )
        self.model.zero_grad()
        loss = _backward(self.model, config, batch, state.step)
        info = self.model.step(rate, clip_norm=config.max_grad_norm or None)

        state.step += 1
        state.tokens += batch.num_targets
        self.count_skipped(info.skipped)
        if math.isfinite(loss):
            state.loss_sum += loss
            state.loss_count += 1
        self.pace.step_took(time.perf_counter() - began, batch.num_targets)
        self.display.update(self.pace.status(state.step, loss, state.eval_loss))
        if self.due(config.logging_steps):
            self.log(info.grad_norm, rate)

    def count_skipped(self, skipped: bool) -> None:
        """A step whose gradient is not finite changes nothing; many in a row end the run."""
        state = self.state
        state.skipped_steps += skipped
        state.skipped_in_row = state.skipped_in_row + 1 if skipped else 0
        if state.skipped_in_row >= _MAX_SKIPPED_IN_ROW:
            first = state.step - state.skipped_in_row + 1
            raise RunError(
                f"the gradient is not finite since step {first} ({state.skipped_in_row} steps in a row were skipped); "
                f"{self.last_checkpoint()}; start again with a lower --learning-rate or a longer warm-up"
            )

    def log(self, grad_norm: float, rate: float) -> None:
        """One line of metrics.jsonl about training."""
        state = self.state
        metrics = {
            "step": state.step,
            "epoch": state.tokens / self.text.batches.tokens_per_epoch,
            "tokens": state.tokens,
            "loss": state.loss_sum / state.loss_count if state.loss_count else None,
            "grad_norm": grad_norm,
            "learning_rate": rate,
            "skipped_steps": state.skipped_steps,
            **self.pace.metrics(),
        }
        state.loss_sum, state.loss_count = 0.0, 0
        self.record(metrics)
        self.notify(lambda callback, view: callback.on_log(view, metrics))

    def evaluate(self) -> None:
        """Held-out loss and a sample; the best weights so far go to the top of the run's folder. Given up when asked to stop."""
        state = self.state
        began = time.perf_counter()
        loss: float | None = None
        if len(self.text.split.held_out):
            loss = self.held_out_loss()
            if loss is None:
                return
        took_s = time.perf_counter() - began
        self.pace.evaluation_took(took_s)
        metrics = {"step": state.step, "tokens": state.tokens, "eval_loss": loss, "time/evaluation_s": took_s}
        if loss is not None:
            state.eval_loss = loss if math.isfinite(loss) else None
            self.record(metrics)
            self.display.say(f"step {state.step}  held-out loss {loss:.4f}")
            if math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss):
                self.export(loss)
        state.evaluated_step = state.step
        if self.config.sample_tokens:
            self.sample()
        self.notify(lambda callback, view: callback.on_evaluate(view, metrics))

    def held_out_loss(self) -> float | None:
        """Mean over the held-out tokens, nats; None where it was interrupted."""
        total, count = 0.0, 0
        for batch in _held_out(self.config, self.text, self.decisions.eval_batches):
            if self.stop.requested:
                return None
            _, out = self.model.forward(batch.tokens, batch.offsets, batch.targets, train=False)
            ones = np.ones(len(batch.targets), np.float32)
            loss, _, _ = next_token_loss(out.logprobs, batch.targets, ones)
            total += loss
            count += batch.num_targets
            # A sign of life where this takes long.
            self.display.update(self.pace.status(self.state.step, None, self.state.eval_loss))
        return total / count

    def export(self, loss: float | None) -> None:
        """Make the top of the run's folder this model, and remember it as the best one."""
        state = self.state
        card = self.card({"held out": loss}, state.step)
        try:
            self.folder.export(self.model, self.text.tokenizer, card)
        except OSError as error:
            self.display.say(
                f"{self.folder.path}: the best model could not be written ({_reason(error)}); the run goes on"
            )
            return
        state.best_loss, state.best_step = loss, state.step

    def sample(self) -> None:
        """What the model writes now."""
        completion = write_sample(self.model, self.text, self.prompt, self.config.sample_tokens, self.config.seed)
        if completion is None:
            return
        line = {"step": self.state.step, "prompt": self.prompt, "completion": completion}
        self.guarded(lambda: self.folder.samples.append(line))
        self.state.samples_lines += 1
        shown = (self.prompt + completion).strip().replace("\n", "\n  | ")
        self.display.say(f"  | {shown}")

    def save(self, required: bool) -> None:
        """Write a checkpoint. Where there is no space for it, go on without, unless it is ``required``."""
        state = self.state
        if self.saved_step == state.step or state.step == 0:
            return
        if state.skipped_in_row and not required:
            # Should the weights have lost their numbers, this would in time replace every good checkpoint.
            return
        began = time.perf_counter()
        before = state.best_saved_loss, state.best_saved_step
        loss = state.eval_loss if state.evaluated_step == state.step else None
        if loss is not None and (state.best_saved_loss is None or loss < state.best_saved_loss):
            state.best_saved_loss, state.best_saved_step = loss, state.step
        state.elapsed_s = self.pace.elapsed_s
        fields = {**state.to_dict(), "level": self.model.level, "backend": self.model.backend}
        try:
            self.folder.metrics.sync()
            self.folder.samples.sync()
            path = write_checkpoint(self.folder.path, state.step, self.model, self.text.tokenizer, fields, versions())
        except OSError as error:
            state.best_saved_loss, state.best_saved_step = before
            line = f"checkpoint-{state.step} could not be saved ({_reason(error)}); {self.last_checkpoint()}"
            if required:
                raise RunError(f"{line}; free some space, then: ingot pretrain --resume {self.folder.path}") from None
            self.display.say(f"{line}; the run goes on")
            return
        previous, self.saved_step = self.saved_step, state.step
        self.prune(previous)
        self.pace.save_took(time.perf_counter() - began)
        self.notify(lambda callback, view: callback.on_save(view, path))

    def prune(self, previous: int) -> None:
        """Delete the checkpoints that are not to be kept; one that cannot be deleted does no harm."""
        with contextlib.suppress(OSError):
            prune(
                self.folder.path,
                self.state.step,
                previous,
                self.config.save_total_limit,
                self.state.best_saved_step,
            )

    def finish(self) -> None:
        """Curves, card, and the mark that the run is done."""
        state, folder = self.state, self.folder
        self.display.stop()
        self.prune(state.step)
        if state.best_step is None:
            self.export_required()
        losses = {"held out, best": state.best_loss, "held out, last step": state.eval_loss}
        best_step = state.step if state.best_step is None else state.best_step
        self.guarded(lambda: write_file(folder.path / CARD_FILE, self.card(losses, best_step).encode()))
        curves = draw_curves(folder.metrics.read(), f"{folder.path.name}: loss")
        self.guarded(lambda: write_file(folder.path / "curves.svg", curves))
        folder.facts["finished"] = True
        self.guarded(folder.save_facts)
        last = f"checkpoint-{state.step}"
        if state.best_loss is not None and state.best_step != state.step:
            self.display.say(
                f"{folder.path} holds the weights of step {state.best_step}, the best held-out loss ({state.best_loss:.4f}); "
                f"those of the last step are in {folder.path / last}"
            )
        else:
            self.display.say(f"{folder.path} holds the model; its curves are in {folder.path / 'curves.svg'}")
        self.notify(lambda callback, view: callback.on_end(view))

    def export_required(self) -> None:
        """Without a best model so far, the last one is the result."""
        self.guarded(lambda: self.folder.export(self.model, self.text.tokenizer, self.card({}, self.state.step)))

    def card(self, losses: dict[str, float | None], step: int) -> str:
        """Text of README.md."""
        return write_card(self.folder.facts, step=step, losses=losses, num_parameters=self.model.num_parameters)

    def record(self, metrics: dict[str, Any]) -> None:
        """Append to metrics.jsonl."""
        self.guarded(lambda: self.folder.metrics.append(metrics))
        self.state.metrics_lines += 1

    def guarded(self, write: Callable[[], object]) -> None:
        """Where a small file cannot be written, stop in one line: the last checkpoint stays, and the run can go on from it."""
        try:
            write()
        except OSError as error:
            raise RunError(
                f"{error.filename or self.folder.path}: cannot be written ({_reason(error)}); {self.last_checkpoint()}; "
                f"free some space, then: ingot pretrain --resume {self.folder.path}"
            ) from None

    def last_checkpoint(self) -> str:
        """Where the run stands on the disk, in words."""
        if self.saved_step == 0:
            return "nothing was saved so far"
        return f"the last checkpoint is {self.folder.path / f'checkpoint-{self.saved_step}'}"

    def notify(self, call: Callable[[Callback, RunView], None]) -> None:
        """Tell each callback."""
        if self.callbacks:
            view = RunView(self.model, self.text.tokenizer, self.folder.path, self.state.step, self.decisions.max_steps)
            for callback in self.callbacks:
                call(callback, view)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
