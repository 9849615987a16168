"""How runs of phases that learn from their own samples begin and are resumed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from ingot.training.callbacks import Callback
from ingot.training.checkpoints import newest_usable
from ingot.training.cost import Cost
from ingot.training.decisions import Decisions
from ingot.training.online import OnlineT, require_best_of_n
from ingot.training.phases import Run, carry_out, reopened
from ingot.training.progress import Display, make_display
from ingot.training.prompts import Rows
from ingot.training.rewards import RewardFunction
from ingot.training.runs import RunFolder
from ingot.training.scores import TokenScorer
from ingot.training.setup import Given, Setup, keep, require_gates
from ingot.training.state import State
from ingot.training.trainer import TrainingResult, shown

SetupT = TypeVar("SetupT", bound=Setup)


@dataclasses.dataclass(frozen=True)
class SamplingPhase(Generic[OnlineT, SetupT]):
    """The parts that a phase begins with, in the order in which they are called."""

    kind: str
    """As run.json and the command line name it."""
    config: type[OnlineT]
    prepare: Callable[[OnlineT, Given, Display], SetupT]
    decide: Callable[[OnlineT, SetupT, dict[str, Any], int, Display], tuple[Decisions, Cost]]
    """Takes what is decided already, and the updates that are done."""
    trainer: Callable[[RunFolder, OnlineT, SetupT, State, Decisions, Cost, Display, Sequence[Callback]], Run]

    def start(
        self, config: OnlineT, given: Given, callbacks: Sequence[Callback], *, dry_run: bool, quiet: bool
    ) -> TrainingResult:
        """A new run."""
        display = make_display(quiet)
        setup = self.prepare(config, given, display)
        if dry_run:
            self.decide(config, setup, {}, 0, display)
            return TrainingResult([], setup.policy, setup.encoder.tokenizer, Path(config.output), None, None)
        require_gates(config, display)
        gate = require_best_of_n(config, setup, display)
        with RunFolder.create(config.output, self.kind, config.to_dict()) as folder:
            folder.facts["gate"] = None if gate is None else dataclasses.asdict(gate)
            return self._train(folder, config, setup, callbacks, display)

    def resume(
        self,
        folder: str | Path,
        *,
        max_steps: int | None = None,
        threads: int | None = None,
        level: str | None = None,
        prompts: Rows = None,
        rewards: Sequence[RewardFunction | TokenScorer] = (),
        gold: RewardFunction | None = None,
        callbacks: Sequence[Callback] = (),
        quiet: bool = False,
    ) -> TrainingResult:
        """Go on with a run from its newest whole checkpoint, or from step 0 where there is none.

        Parameters
        ----------
        max_steps
            A new end, in updates; extends a finished run. The schedule is stretched to it.
        threads, level
            Other than the run began with. Threads change nothing but speed; another instruction level changes the last bits.
        prompts, rewards, gold
            The same again, where the run was given them by a program.

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
            setup = self.prepare(config, Given.of(prompts, rewards, gold), display)
            return self._train(run, config, setup, callbacks, display)

    def _train(
        self, folder: RunFolder, config: OnlineT, setup: SetupT, callbacks: Sequence[Callback], display: Display
    ) -> TrainingResult:
        with shown(folder, display):
            keep(config, folder, setup)
            return carry_out(
                folder,
                config,
                setup.policy,
                newest_usable(folder.path, display.say),
                functools.partial(self.decide, config, setup),
                functools.partial(self.trainer, folder, config, setup),
                display,
                callbacks,
                setup.restore,
            )
