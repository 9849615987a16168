"""What the loops of all phases share: beginning and resuming a run, checkpoints, logs, what happens when a disk is full, and the end.

A phase is a subclass of :class:`Trainer` with its own ``loop``, ``train_step`` and ``evaluate``; what it learns and how is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from ingot.configs import RunConfig, parse_duration
from ingot.durable import write_file
from ingot.environment import cpu_name
from ingot.errors import ConfigError, RunError
from ingot.models import Optimizer
from ingot.reporting.charts import draw_curves
from ingot.training.alarms import Alarms, Rule
from ingot.training.callbacks import Callback, RunView
from ingot.training.card import versions, write_card
from ingot.training.checkpoints import prune, read_optimizer, read_state, write_checkpoint
from ingot.training.cost import Cost, Probe, timed
from ingot.training.decisions import Decisions
from ingot.training.interruption import Interruption
from ingot.training.lora import load_trained_state, read_trained, trained_state
from ingot.training.pace import Pace
from ingot.training.progress import Display
from ingot.training.runs import CARD_FILE, RunFolder
from ingot.training.schedules import learning_rate, resolve_warmup
from ingot.training.state import State
from ingot.training.verdicts import Verdict, write_verdict

if TYPE_CHECKING:
    from ingot.data.chat import ChatEncoder
    from ingot.models.base import Model, StepInfo
    from ingot.models.base import Optimizer as OptimizerProtocol
    from ingot.tokenizer import Tokenizer
    from ingot.training.checkpoints import Savable
    from ingot.training.progress import Status

_MAX_SKIPPED_IN_ROW = 10
_SIGN_OF_LIFE_S = 0.2

ConfigT = TypeVar("ConfigT", bound=RunConfig)

Restore: TypeAlias = Callable[[RunConfig, Path | None], None]
"""Makes optimizers, and puts weights and moments back to where a checkpoint, if any, has them."""


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """What a phase of training returns."""

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
    plan: dict[str, Any] | None = None
    """Of a dry run: ``max_steps`` and what else was decided, ``expected_s`` of the whole run, seconds of a step, an evaluation and a
    checkpoint, and ``memory_bytes``."""


# ---- beginning and resuming


def saved_config(
    run: RunFolder,
    folder: str | Path,
    kind: type[ConfigT],
    *,
    max_steps: int | None,
    threads: int | None,
    level: str | None,
) -> ConfigT:
    """The settings that a run began with, on these threads and this level, and to this end where one is given.

    Raises
    ------
    ConfigError
        ``max_steps`` is none.
    RunError
        The run is finished and is not to be extended.
    """
    fields = {**run.facts["config"], "output": str(folder)}
    overrides = {"threads": threads, "level": level}
    fields |= {name: value for name, value in overrides.items() if value is not None}
    config = kind.from_dict(fields, f"{run.path / 'run.json'}")
    if max_steps is not None:
        if max_steps < 1:
            raise ConfigError(f"max_steps must be at least 1, got {max_steps}")
        run.facts["decisions"] = {**run.facts.get("decisions", {}), "max_steps": max_steps}
    elif run.facts["finished"]:
        steps = run.facts["decisions"]["max_steps"]
        raise RunError(f"{folder}: this run is finished ({steps} steps); --max-steps N extends it")
    return config


def saved_state(folder: RunFolder, checkpoint: Path | None) -> State:
    """Where the run is to go on.

    Raises
    ------
    ConfigError
        It has gone beyond the end that it is given now.
    """
    state = State() if checkpoint is None else State.from_dict(read_state(checkpoint))
    if folder.facts.get("decisions", {}).get("max_steps", state.step) < state.step:
        raise ConfigError(f"{folder.path}: has done {state.step} steps already; give --max-steps {state.step} or more")
    return state


def begin(
    folder: RunFolder,
    config: RunConfig,
    model: Model,
    decisions: Decisions,
    state: State,
    checkpoint: Path | None,
    display: Display,
    restore: Restore,
) -> None:
    """Record what was decided, and put weights, moments and logs back to where ``checkpoint`` has them."""
    folder.facts |= {"decisions": dataclasses.asdict(decisions), "finished": False}
    began_at_level = folder.facts.setdefault("level", model.level)
    if began_at_level != model.level:
        display.say(f"began at instruction level {began_at_level}, goes on at {model.level}: the last bits will differ")
    folder.facts["versions"] = versions()
    folder.facts["machine"] = {"cpu": cpu_name(), "threads": model.threads}
    folder.save_facts()
    folder.begun()
    restore(config, checkpoint)
    if checkpoint is not None:
        display.say(f"resumed from {checkpoint}")
    else:
        display.say(f"settings saved in {folder.path}; Ctrl-C saves and stops")
    folder.metrics.cut(state.metrics_lines)
    folder.samples.cut(state.samples_lines)


def restore_model(model: Model, config: RunConfig, checkpoint: Path | None) -> None:
    """A new optimizer; weights and moments as ``checkpoint`` has them."""
    model.optimizer = make_optimizer(config, model)
    if checkpoint is not None:
        load_trained_state(model, read_trained(model, checkpoint))
        model.optimizer.load_state(read_optimizer(checkpoint))


def make_optimizer(config: RunConfig, model: Model) -> OptimizerProtocol:
    """A new optimizer of this model."""
    return Optimizer(
        model,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        eps_mode=config.adam_eps_mode,
        weight_decay=config.weight_decay,
        optim=config.optim,
        muon_momentum=config.muon_momentum,
    )


@contextlib.contextmanager
def shown(folder: RunFolder, display: Display) -> Iterator[None]:
    """The display ends with what is done in here; who interrupts it reads how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        display.stop()
        display.say(f"stopped; go on with: {resume_command(folder)}")
        raise
    finally:
        display.stop()


def resume_command(folder: RunFolder) -> str:
    """What to type to go on with a run."""
    return f"ingot {folder.facts['kind']} --resume {folder.path}"


def measure(
    config: RunConfig,
    model: Model,
    step: Callable[[], object],
    step_tokens: int,
    evaluate: Callable[[], object] | None,
    evaluation_batches: int,
) -> Probe:
    """Time a few calls of ``step``, which must change nothing but weights and gradients, and of ``evaluate``, one held-out batch.

    The weights are put back; the optimizer is not.
    """
    # A length fitted to the time deserves a better measurement than an estimate for the eye.
    seconds = 0.2 if config.max_time is None else min(10.0, max(1.0, 0.01 * parse_duration(config.max_time)))
    before = trained_state(model)
    step_s = timed(step, seconds)
    load_trained_state(model, before)
    return Probe(step_s, step_tokens, 0.0 if evaluate is None else timed(evaluate, 0.05), evaluation_batches)


# ---- while it runs


class Stopped(Exception):
    """Sampling was given up, since the run was asked to stop."""


class Trainer(Generic[ConfigT]):
    """A run in progress: state, logs, checkpoints."""

    def __init__(
        self,
        folder: RunFolder,
        config: ConfigT,
        model: Model,
        tokenizer: Tokenizer,
        state: State,
        decisions: Decisions,
        cost: Cost,
        display: Display,
        callbacks: Sequence[Callback],
        *,
        max_length: int,
        encoder: ChatEncoder | None = None,
        rules: Sequence[Rule] = (),
    ) -> None:
        self.folder = folder
        self.config = config
        self.model = model
        self.saved: Savable = model
        """What checkpoints and the run's folder hold of it."""
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.state = state
        self.decisions = decisions
        self.display = display
        self.callbacks = callbacks
        self.warmup_steps = resolve_warmup(config.warmup_steps, config.warmup_ratio, decisions.max_steps)
        self.saved_step = state.step
        self.pace = Pace(cost, decisions, model, max_length, state.elapsed_s)
        self.stop = Interruption()
        self._alive_s = -math.inf
        self.alarms = Alarms(rules, folder.metrics.read() if rules else ())

    def result(self) -> TrainingResult:
        """What the run has come to."""
        state = self.state
        history = self.folder.metrics.read()
        return TrainingResult(history, self.model, self.tokenizer, self.folder.path, state.best_loss, state.eval_loss)

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now."""
        return self.state.step % every == 0 or self.state.step >= self.decisions.max_steps

    def learning_rate(self) -> float:
        """Of the step that comes now."""
        return learning_rate(
            self.state.step,
            self.decisions.max_steps,
            peak=self.config.learning_rate,
            schedule=self.config.lr_scheduler_type,
            warmup_steps=self.warmup_steps,
            min_ratio=self.config.min_learning_rate_ratio,
            decay_ratio=self.config.decay_ratio,
        )

    def count(self, loss: float, info: StepInfo, num_tokens: int, began: float) -> None:
        """A step is done: ``num_tokens`` targets, since ``began`` on the clock."""
        state = self.state
        state.step += 1
        state.tokens += num_tokens
        self.count_skipped(info.skipped)
        if math.isfinite(loss):
            state.loss_sum += loss
            state.loss_count += 1
        self.pace.step_took(time.perf_counter() - began, num_tokens)
        self.display.update(self.status(loss))

    def status(self, loss: float | None) -> Status:
        """For the display; without a loss it is a sign of life during something else than a step."""
        return self.pace.status(self.state.step, loss, self.state.eval_loss)

    def alive(self, done: int, total: int) -> None:
        """A sign of life while answers are drawn, and the place where that is given up."""
        if self.stop.requested:
            raise Stopped
        now = time.perf_counter()
        if now - self._alive_s >= _SIGN_OF_LIFE_S:
            self._alive_s = now
            self.display.update(self.status(None))

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

    def log(self, epoch: float, grad_norm: float, rate: float, **more: float) -> None:
        """One line of metrics.jsonl about training."""
        state = self.state
        metrics = {
            "step": state.step,
            "epoch": epoch,
            "tokens": state.tokens,
            "loss": state.loss_sum / state.loss_count if state.loss_count else None,
            **more,
            "grad_norm": grad_norm,
            "learning_rate": rate,
            "skipped_steps": state.skipped_steps,
            **self.pace.metrics(),
        }
        state.loss_sum, state.loss_count = 0.0, 0
        self.record(metrics)
        self.notify(lambda callback, view: callback.on_log(view, metrics))

    def record(self, metrics: dict[str, Any]) -> None:
        """Append to metrics.jsonl, and raise the alarms that begin with this line."""
        self.guarded(lambda: self.folder.metrics.append(metrics))
        self.state.metrics_lines += 1
        for name, message in self.alarms.check(metrics):
            self.display.say(f"alarm     {name}: {message}")
            line = {"step": self.state.step, "alarm": name, "message": message}
            self.guarded(functools.partial(self.folder.metrics.append, line))
            self.state.metrics_lines += 1

    def record_sample(self, **fields: Any) -> None:
        """Append to samples.jsonl."""
        self.guarded(lambda: self.folder.samples.append({"step": self.state.step, **fields}))
        self.state.samples_lines += 1

    def show_sample(self, text: str) -> None:
        """What the model writes now, for the eye."""
        folded = text.strip().replace("\n", "\n  | ")
        self.display.say(f"  | {folded}")

    def measured(self, loss: float, metrics: dict[str, Any]) -> None:
        """Record a held-out loss; the best weights so far go to the top of the run's folder."""
        state = self.state
        state.eval_loss = loss if math.isfinite(loss) else None
        self.record(metrics)
        if math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss):
            self.export(loss)

    # ---- what is saved

    def export(self, loss: float | None) -> None:
        """Make the top of the run's folder this model, and remember it as the best one."""
        state = self.state
        try:
            self.write_model({"held out": loss})
        except OSError as error:
            self.display.say(
                f"{self.folder.path}: the best model could not be written ({reason(error)}); the run goes on"
            )
            return
        state.best_loss, state.best_step = loss, state.step

    def write_model(self, losses: dict[str, float | None]) -> None:
        """The model as it is now, at the top of the run's folder."""
        self.folder.export(self.saved, self.tokenizer, self.card(losses, self.state.step), self.encoder)

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
            path = write_checkpoint(
                self.folder.path,
                state.step,
                self.saved,
                self.tokenizer,
                fields,
                versions(),
                self.encoder,
                self.save_more,
            )
        except OSError as error:
            state.best_saved_loss, state.best_saved_step = before
            line = f"checkpoint-{state.step} could not be saved ({reason(error)}); {self.last_checkpoint()}"
            if required:
                raise RunError(f"{line}; free some space, then: {resume_command(self.folder)}") from None
            self.display.say(f"{line}; the run goes on")
            return
        previous, self.saved_step = self.saved_step, state.step
        self.prune(previous)
        self.pace.save_took(time.perf_counter() - began)
        self.notify(lambda callback, view: callback.on_save(view, path))

    def save_more(self, folder: Path) -> None:
        """What else this phase writes into a checkpoint."""

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
        """Verdict, curves, card, and the mark that the run is done. The last line says whether the next stage may build on it."""
        state, folder = self.state, self.folder
        self.display.stop()
        self.prune(state.step)
        if state.best_step is None:
            # Without a best model so far, the last one is the result.
            self.guarded(lambda: self.write_model({}))
        verdict = self.verdict()
        if verdict is not None:
            self.guarded(lambda: write_verdict(folder.path, verdict))
        losses = {"held out, best": state.best_loss, "held out, last step": state.eval_loss}
        best_step = state.step if state.best_step is None else state.best_step
        self.guarded(lambda: write_file(folder.path / CARD_FILE, self.card(losses, best_step).encode()))
        self.guarded(lambda: write_file(folder.path / "curves.svg", self.curves()))
        folder.facts["finished"] = True
        self.guarded(folder.save_facts)
        last = f"checkpoint-{state.step}"
        if state.best_loss is not None and state.best_step != state.step:
            self.display.say(
                f"{folder.path} holds the weights of step {state.best_step}, {self.best_in_words(state.best_loss)}; "
                f"those of the last step are in {folder.path / last}"
            )
        else:
            self.display.say(f"{folder.path} holds the model; its curves are in {folder.path / 'curves.svg'}")
        self.display.say(f"the run on a page: ingot report {folder.path}")
        if verdict is not None:
            self.display.say(verdict.closing_line)
        self.notify(lambda callback, view: callback.on_end(view))

    def verdict(self) -> Verdict | None:
        """What the weights at the top of the run's folder are worth to the next stage; None where the phase does not judge them."""
        return None

    def curves(self) -> bytes:
        """The picture of the run, as SVG."""
        return draw_curves(self.folder.metrics.read(), f"{self.folder.path.name}: loss")

    def best_in_words(self, loss: float) -> str:
        """Why the best weights are the best ones."""
        return f"the best held-out loss ({loss:.4f})"

    def card(self, losses: dict[str, float | None], step: int) -> str:
        """Text of README.md."""
        return write_card(self.folder.facts, step=step, losses=losses, num_parameters=self.model.num_parameters)

    def guarded(self, write: Callable[[], object]) -> None:
        """Where a small file cannot be written, stop in one line: the last checkpoint stays, and the run can go on from it."""
        try:
            write()
        except OSError as error:
            raise RunError(
                f"{error.filename or self.folder.path}: cannot be written ({reason(error)}); {self.last_checkpoint()}; "
                f"free some space, then: {resume_command(self.folder)}"
            ) from None

    def last_checkpoint(self) -> str:
        """Where the run stands on the disk, in words."""
        if self.saved_step == 0:
            return "nothing was saved so far"
        return f"the last checkpoint is {self.folder.path / f'checkpoint-{self.saved_step}'}"

    def notify(self, call: Callable[[Callback, RunView], None]) -> None:
        """Tell each callback."""
        if self.callbacks:
            view = RunView(self.model, self.tokenizer, self.folder.path, self.state.step, self.decisions.max_steps)
            for callback in self.callbacks:
                call(callback, view)


def reason(error: OSError) -> str:
    """Why, in words."""
    return error.strerror or str(error)
