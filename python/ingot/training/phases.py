"""How runs begin, go on and are resumed: the order of things that all phases share, and all of it for those that learn from rows.

What is a phase's own, its loop above all, is in the file of its name, and its :class:`RowsPhase` there says which functions these are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from ingot.configs import LoraConfig, ModelConfig, RunConfig
from ingot.training.callbacks import Callback
from ingot.training.checkpoints import newest_usable
from ingot.training.cost import Cost
from ingot.training.decisions import Decisions
from ingot.training.demonstrations import Rows
from ingot.training.lora import attach_adapter
from ingot.training.progress import Display, make_display
from ingot.training.runs import RunFolder
from ingot.training.state import State
from ingot.training.trainer import (
    ConfigT,
    Restore,
    TrainingResult,
    begin,
    restore_model,
    saved_config,
    saved_state,
    shown,
)
from ingot.training.verdicts import require_passed

if TYPE_CHECKING:
    from ingot.data.chat import ChatEncoder
    from ingot.models.base import Model


class Run(Protocol):
    """A run that is ready to start: a :class:`~ingot.training.trainer.Trainer` with a loop."""

    def loop(self) -> None:
        """From the state's step to the last one."""
        ...

    def result(self) -> TrainingResult:
        """What it has come to."""
        ...


@contextlib.contextmanager
def reopened(
    folder: str | Path,
    kind: str,
    config_type: type[ConfigT],
    *,
    max_steps: int | None,
    threads: int | None,
    level: str | None,
) -> Iterator[tuple[RunFolder, ConfigT]]:
    """An existing run of phase ``kind`` and its settings (see :func:`~ingot.training.trainer.saved_config`)."""
    with RunFolder.open(folder) as run:
        run.require_kind(kind)
        yield run, saved_config(run, folder, config_type, max_steps=max_steps, threads=threads, level=level)


def carry_out(
    folder: RunFolder,
    config: RunConfig,
    model: Model,
    checkpoint: Path | None,
    decide: Callable[[dict[str, Any], int, Display], tuple[Decisions, Cost]],
    trainer: Callable[[State, Decisions, Cost, Display, Sequence[Callback]], Run],
    display: Display,
    callbacks: Sequence[Callback],
    restore: Restore | None = None,
) -> TrainingResult:
    """Decide, restore, loop.

    Parameters
    ----------
    checkpoint
        To go on from.
    decide
        Takes what is decided already, and the steps that are done.
    trainer
        Makes the run.
    restore
        Where more than ``model`` is trained.
    """
    folder.facts["model_config"] = model.config.to_dict()
    state = saved_state(folder, checkpoint)
    decisions, cost = decide(folder.facts.get("decisions", {}), state.step, display)
    restore = restore or functools.partial(restore_model, model)
    begin(folder, config, model, decisions, state, checkpoint, display, restore)
    run = trainer(state, decisions, cost, display, callbacks)
    run.loop()
    return run.result()


# ---- phases that learn from rows


class Material(Protocol):
    """What a phase learns from, read, encoded and divided."""

    @property
    def encoder(self) -> ChatEncoder:
        """With the template and the tokenizer of the run."""
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """For run.json and the card."""
        ...


RowsT = TypeVar("RowsT", bound=LoraConfig)
MaterialT = TypeVar("MaterialT", bound=Material)


@dataclasses.dataclass(frozen=True)
class RowsPhase(Generic[RowsT, MaterialT]):
    """The parts that a phase begins with, in the order in which they are called."""

    kind: str
    """As run.json and the command line name it."""
    config: type[RowsT]
    shape: Callable[[RowsT], ModelConfig]
    """Of the model to start from."""
    prepare: Callable[[RowsT, RunFolder | None, ModelConfig, Rows, Display], MaterialT]
    """Takes the run's folder, which keeps tokenizer and template (None for a dry run), and the shape."""
    make_model: Callable[[RowsT, MaterialT, ModelConfig | None], Model]
    """The model to start from; of the shape given where weights are restored from a checkpoint."""
    decide: Callable[[RowsT, MaterialT, Model, dict[str, Any], int, Display], tuple[Decisions, Cost]]
    """Takes what is decided already, and the steps that are done."""
    trainer: Callable[
        [RunFolder, RowsT, MaterialT, Model, State, Decisions, Cost, Display, Sequence[Callback]],
        Run,
    ]
    builds_on: Callable[[RowsT], Sequence[str]] = lambda config: ()
    """Folders of the models whose own runs must have passed."""

    def start(
        self,
        config: RowsT,
        data: Rows,
        callbacks: Sequence[Callback],
        *,
        dry_run: bool,
        quiet: bool,
        force: bool = False,
    ) -> TrainingResult:
        """A new run."""
        display = make_display(quiet)
        rows = None if data is None else list(data)
        shape = self.shape(config)
        for name in self.builds_on(config):
            require_passed(name, force=force, display=display)
        if dry_run:
            material = self.prepare(config, None, shape, rows, display)
            model = self.make_model(config, material, None)
            attach_adapter(config, model, {})
            self.decide(config, material, model, {}, 0, display)
            return TrainingResult([], model, material.encoder.tokenizer, Path(config.output), None, None)
        with RunFolder.create(config.output, self.kind, config.to_dict()) as folder:
            return self._train(folder, config, rows, callbacks, display)

    def resume(
        self,
        folder: str | Path,
        *,
        max_steps: int | None = None,
        threads: int | None = None,
        level: str | None = None,
        data: Rows = None,
        callbacks: Sequence[Callback] = (),
        quiet: bool = False,
    ) -> TrainingResult:
        """Go on with a run from its newest whole checkpoint, or from step 0 where there is none. Models that it compares with must still be there.

        Parameters
        ----------
        max_steps
            A new end; extends a finished run. The schedule is stretched to it.
        threads, level
            Other than the run began with. Threads change nothing but speed; another instruction level changes the last bits.
        data
            The same rows again, where the run was given them by a program.

        Raises
        ------
        IngotError
            As when a run begins; also where there is no run, it is finished, or none of its checkpoints is whole.
        KeyboardInterrupt
            Ctrl-C, after saving.
        """
        display = make_display(quiet)
        with reopened(folder, self.kind, self.config, max_steps=max_steps, threads=threads, level=level) as (
            run,
            config,
        ):
            return self._train(run, config, None if data is None else list(data), callbacks, display)

    def _train(
        self, folder: RunFolder, config: RowsT, rows: Rows, callbacks: Sequence[Callback], display: Display
    ) -> TrainingResult:
        with shown(folder, display):
            known = folder.facts.get("model_config")
            shape = ModelConfig.from_dict(known) if known else self.shape(config)
            material = self.prepare(config, folder, shape, rows, display)
            folder.facts["data"] = material.facts
            checkpoint = newest_usable(folder.path, display.say)
            # An adapter's checkpoint lacks the weights below it.
            model = self.make_model(config, material, shape if checkpoint and not config.lora_rank else None)
            attach_adapter(config, model, folder.facts)
            return carry_out(
                folder,
                config,
                model,
                checkpoint,
                functools.partial(self.decide, config, material, model),
                functools.partial(self.trainer, folder, config, material, model),
                display,
                callbacks,
            )
