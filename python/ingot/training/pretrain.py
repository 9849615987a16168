"""Pretraining: text in, a network that predicts the next token out. The whole loop is :meth:`_Run.loop` and the methods below it.

A run is a function of its settings and its text: killed at any moment and resumed, it ends with the same bits.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ingot.configs import PretrainConfig
from ingot.data.batches import Batch, Cursor, count_held_out_batches, held_out_batches, mix
from ingot.losses.next_token import next_token_loss, token_weights
from ingot.training.callbacks import Callback
from ingot.training.checkpoints import newest_usable
from ingot.training.cost import Cost, Probe
from ingot.training.decisions import Decisions, announce, decide, plan_of
from ingot.training.phases import carry_out, reopened
from ingot.training.preparation import Data, Text, held, make_model, prepare_text, settle_length
from ingot.training.progress import Display, make_display
from ingot.training.runs import RunFolder
from ingot.training.samples import choose_prompt, write_sample
from ingot.training.state import State
from ingot.training.trainer import Trainer, TrainingResult, measure, shown

if TYPE_CHECKING:
    from ingot.models.base import Model

_DEFAULT_STEPS = 1000
_DROPOUT_STREAM = 2

PretrainResult = TrainingResult
"""What :func:`pretrain` and :func:`resume` return."""


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
    config = settle_length(config)
    if dry_run:
        text = prepare_text(config, None, data, display)
        model = make_model(config, text.tokenizer, None)
        plan = plan_of(*_decide(config, text, model, {}, 0, display))
        return PretrainResult([], model, text.tokenizer, Path(config.output), None, None, plan)
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
    with reopened(folder, "pretrain", PretrainConfig, max_steps=max_steps, threads=threads, level=level) as (
        run,
        config,
    ):
        return _train(run, config, data, callbacks, display)


def _train(
    folder: RunFolder, config: PretrainConfig, data: Data, callbacks: Sequence[Callback], display: Display
) -> PretrainResult:
    with shown(folder, display):
        text = prepare_text(config, folder, data, display)
        folder.facts["data"] = text.facts
        checkpoint = newest_usable(folder.path, display.say)
        model = make_model(config, text.tokenizer, folder.facts["model_config"] if checkpoint else None)
        return carry_out(
            folder,
            config,
            model,
            checkpoint,
            functools.partial(_decide, config, text, model),
            functools.partial(_Run, folder, config, text, model),
            display,
            callbacks,
        )


def _decide(
    config: PretrainConfig, text: Text, model: Model, known: dict[str, Any], done: int, display: Display
) -> tuple[Decisions, Cost]:
    """Time the run's first batch, settle what is open, and say it."""
    probe = _probe(config, text, model)
    epoch = text.batches.steps_per_epoch()
    decisions, cost = decide(
        config,
        model,
        probe,
        known,
        steps_per_epoch=epoch,
        default_steps=_DEFAULT_STEPS,
        held=(held(config, model.config),),
    )
    facts = text.facts
    announce(
        config,
        model,
        probe,
        decisions,
        cost,
        done,
        display,
        kind="text",
        data=f"{facts['train_tokens']:,} tokens to learn from, {facts['held_out_tokens']:,} held out: {facts['split']}",
        shape=f"{text.windows} windows of up to {config.sequence_length}",
        passes=(decisions.max_steps - done) * probe.step_tokens / facts["train_tokens"],
    )
    return decisions, cost


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
        max_length=config.sequence_length,
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

    sample = next(iter(_held_out(config, text, 1)), None)
    evaluate = None
    if sample is not None:
        evaluate = functools.partial(model.forward, sample.tokens, sample.offsets, sample.targets, train=False)
    batches = count_held_out_batches(
        text.split.held_out, max_length=config.sequence_length, rows=config.per_device_train_batch_size
    )
    return measure(config, model, step, batch.num_targets, evaluate, batches)


class _Run(Trainer[PretrainConfig]):
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
        super().__init__(
            folder,
            config,
            model,
            text.tokenizer,
            state,
            decisions,
            cost,
            display,
            callbacks,
            max_length=config.sequence_length,
        )
        self.text = text
        self.prompt = choose_prompt(config, text)

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

    def train_step(self) -> None:
        """One step of the optimizer, whatever number of batches its gradient takes."""
        state, config = self.state, self.config
        began = time.perf_counter()
        batch, state.cursor = self.text.batches.take(state.step, state.cursor)
        rate = self.learning_rate()
        self.model.zero_grad()
        loss = _backward(self.model, config, batch, state.step)
        info = self.model.step(rate, clip_norm=config.max_grad_norm or None)
        self.count(loss, info, batch.num_targets, began)
        if self.due(config.logging_steps):
            self.log(state.tokens / self.text.batches.tokens_per_epoch, info.grad_norm, rate)

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
            self.display.say(f"step {state.step}  held-out loss {loss:.4f}")
            self.measured(loss, metrics)
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

    def sample(self) -> None:
        """What the model writes now."""
        completion = write_sample(self.model, self.text, self.prompt, self.config.sample_tokens, self.config.seed)
        if completion is None:
            return
        self.record_sample(prompt=self.prompt, completion=completion)
        self.show_sample(self.prompt + completion)
