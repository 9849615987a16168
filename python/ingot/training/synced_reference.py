"""The reference that a run's policy is held to: as the run began, or following the policy from afar (TR-DPO, Gorbatovski et al. 2024)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ingot.configs.sync import SyncConfig
from ingot.models.reference import mix_into
from ingot.models.safetensors_files import write_tensors

if TYPE_CHECKING:
    from ingot.models.base import Model
    from ingot.training.progress import Display
    from ingot.training.trainer import Trainer

SYNCED_FILE = "reference.safetensors"
"""In a checkpoint: the weights of a reference that has moved. Before its first move they are those that the run began with."""


class SyncedReference:
    """The model that training is held to. Forward passes only.

    It is a function of the run's settings and steps, and part of its checkpoints once it has moved.

    Parameters
    ----------
    start
        The reference that the run began with. It stays as it is: what is measured against it can be compared over the whole run.
    folder, step
        Of the run, and how many steps it has done.
    """

    def __init__(self, config: SyncConfig, start: Model, folder: Path, step: int) -> None:
        from safetensors.numpy import load_file

        self._config = config
        self.num_syncs = step // config.ref_model_sync_steps if config.sync_ref_model else 0
        """How often it has moved."""
        # Another name for the same memory until it moves.
        self.model = start.fork() if config.sync_ref_model else start
        if self.num_syncs:
            self.model.load_state(load_file(folder / f"checkpoint-{step}" / SYNCED_FILE))

    def announce(self, max_steps: int, display: Display) -> None:
        """Say how it will move, or that it will not."""
        config = self._config
        if config.sync_ref_model:
            every, share = config.ref_model_sync_steps, config.ref_model_mixup_alpha
            display.say(
                f"reference moves {share:g} of the way to the policy every {every} steps"
                if every < max_steps
                else f"reference does not move: ref_model_sync_steps {every} is not below the run's {max_steps} steps; lower --ref-model-sync-steps"
            )

    def follow(self, run: Trainer[Any]) -> bool:
        """Move towards the run's policy where its last step makes that due; the run records it. Whether it was."""
        config, step = self._config, run.state.step
        if not config.sync_ref_model or step % config.ref_model_sync_steps:
            return False
        mix_into(self.model, run.model, config.ref_model_mixup_alpha)
        self.num_syncs += 1
        run.record({"step": step, "reference/syncs": self.num_syncs})
        run.display.say(f"step {step}  the reference moved {config.ref_model_mixup_alpha:g} of the way to the policy")
        return True

    def save(self, folder: Path) -> None:
        """Write into a checkpoint what cannot be had from the run's start."""
        if self.num_syncs:
            write_tensors(folder / SYNCED_FILE, self.model.state())
