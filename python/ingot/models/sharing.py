"""One set of weights under several models: which weights they are, and adapters that find theirs there."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ingot.configs import ModelConfig
from ingot.models.adapters import ADAPTER_FOLDER, CONFIG_FILE, read_adapter
from ingot.models.base import Model


def weights_hash(model: Model) -> str:
    """sha256, as hex, of a network's own weights, names and shapes included; scalar heads do not count."""
    digest = hashlib.sha256()
    for name, array in sorted(model.snapshot().items()):
        if not name.startswith("score."):
            digest.update(f"{name} {array.shape}\0".encode())
            digest.update(np.ascontiguousarray(array, np.float32).data)
    return digest.hexdigest()


class SharedBase:
    """Weights that several roles of a run stand on: policy, reference, reward models, critic. They are in memory once.

    Parameters
    ----------
    model
        Has the weights, and no adapter yet. What is written to it later changes nothing here.
    source
        Where they come from, for messages.
    say
        Told where a role found its weights.
    """

    def __init__(self, model: Model, source: str, say: Callable[[str], None] = lambda line: None) -> None:
        self._model = model.fork()
        self.source = source
        self.hash = weights_hash(model)
        self._say = say

    def fork(self) -> Model:
        """Another model on these weights, which takes no memory for them."""
        return self._model.fork()

    def adapted(self, folder: Path, shape: ModelConfig) -> Model | None:
        """These weights with the adapter of a run, active, and the scalar heads that it has; None where the run left no adapter, or one
        that belongs to other weights.

        Parameters
        ----------
        folder
            Of the run.
        shape
            Of the network in it.

        Raises
        ------
        CheckpointError
            The adapter is damaged.
        """
        place = folder / ADAPTER_FOLDER
        if not (place / CONFIG_FILE).is_file():
            return None
        settings, _ = read_adapter(place)
        if settings["base_hash"] != self.hash or _without_dropout(shape) != _without_dropout(self._model.config):
            self._say(
                f"{folder}: its adapter belongs to other weights than those of {self.source}: loaded as a network of its own"
            )
            return None
        model = self.fork()
        model.load_adapter(place, folder.name)
        model.active_adapter = folder.name
        self._say(f"{folder}: an adapter on {self.source}, whose weights are in memory once")
        return model


def _without_dropout(shape: ModelConfig) -> ModelConfig:
    return dataclasses.replace(shape, dropout=0.0)
