"""Runs that train an adapter: what they put on the model, and what they write and read beside it.

The top of such a run's folder, and each of its checkpoints, is the model with the adapter merged, which every command and transformers
open; ``adapter/`` beside it is the adapter alone, as peft writes it. The weights below are those of ``config.model``, which a resumed run
needs as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ingot.configs.lora import LoraConfig
from ingot.errors import CheckpointError, RunError
from ingot.models.adapters import ADAPTER_FOLDER, adapter_table, linear_modules, read_adapter, select_modules
from ingot.models.sharing import weights_hash

if TYPE_CHECKING:
    from ingot.configs import ModelConfig
    from ingot.models.base import Model

ADAPTER = "default"
"""The name of the adapter that a run trains."""


def attach_adapter(
    config: LoraConfig,
    model: Model,
    facts: dict[str, Any] | None,
    *,
    base_hash: str | None = None,
    num_values: int | None = None,
) -> None:
    """Put the adapter that the settings ask for, if any, on the model, and make it what is trained.

    Parameters
    ----------
    facts
        Content of run.json: gets the hash of the weights below, or is compared with it where it has one. None where the caller
        compares them.
    base_hash
        That hash, where the caller knows it.
    num_values
        Scalar heads of the adapter; as many as the model has unless given.

    Raises
    ------
    ConfigError
        A target names no layer of this model.
    RunError
        The run began on other weights.
    """
    if not config.lora_rank:
        return
    found = base_hash or weights_hash(model)
    if facts is not None and facts.setdefault("base_hash", found) != found:
        base = facts["config"]["model"]
        raise RunError(
            f"{base}: holds other weights than when this run began, and the run's adapter belongs to those: put them back, or start again"
        )
    adapter = model.add_adapter(
        ADAPTER,
        config.lora_rank,
        config.lora_alpha,
        config.lora_target_modules,
        config.seed,
        num_values=num_values,
        # Of phases that have dropout at all.
        dropout=getattr(config, "lora_dropout", 0.0),
    )
    adapter.base_model, adapter.base_hash = str(getattr(config, "model", "")) or None, found
    model.active_adapter = ADAPTER


def num_trained(config: LoraConfig, shape: ModelConfig, num_values: int = 0) -> int | None:
    """Parameters that a run trains where those are not all of the model's."""
    if not config.lora_rank:
        return None
    modules = select_modules(list(linear_modules(shape)), config.lora_target_modules)
    return sum(parameter.size for parameter in adapter_table(shape, num_values, config.lora_rank, modules))


def trained_state(model: Model) -> Mapping[str, npt.NDArray[np.float32]]:
    """Copies of what steps change: the active adapter, or all weights."""
    return model.state() if model.active_adapter is None else model.adapters[model.active_adapter].state()


def load_trained_state(model: Model, state: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """The inverse of :func:`trained_state`."""
    if model.active_adapter is None:
        model.load_state(state)
    else:
        model.adapters[model.active_adapter].load_state(state)


def trained_gradients(model: Model) -> Mapping[str, npt.NDArray[np.float32]]:
    """Gradients of what steps change."""
    return model.gradients if model.active_adapter is None else model.adapters[model.active_adapter].gradients


@runtime_checkable
class SavesAdapter(Protocol):
    """A model, or what holds one, that can write its active adapter."""

    @property
    def active_adapter(self) -> str | None:
        """The one that is trained."""
        ...

    def save_adapter(self, name: str, folder: str | Path) -> None:
        """Write it as peft does."""
        ...


def save_beside(saved: object, folder: Path) -> None:
    """Where ``saved`` has an active adapter, write that to ``folder/adapter``."""
    if isinstance(saved, SavesAdapter) and saved.active_adapter is not None:
        saved.save_adapter(saved.active_adapter, folder / ADAPTER_FOLDER)


def read_trained(model: Model, checkpoint: Path) -> Mapping[str, npt.NDArray[np.float32]]:
    """What :func:`trained_state` was when a checkpoint was written.

    Raises
    ------
    CheckpointError
        It was written by a run that trained all weights.
    """
    from ingot.training.checkpoints import read_weights

    if model.active_adapter is None:
        return read_weights(checkpoint)
    if not (checkpoint / ADAPTER_FOLDER).is_dir():
        raise CheckpointError(f"{checkpoint}: has no adapter")
    return read_adapter(checkpoint / ADAPTER_FOLDER)[1]
