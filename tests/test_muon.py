"""Muon of both backends: against an f64 twin made of singular values, torch.optim.Muon, bounds, damaged and missing gradients, state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

import ingot
from ingot.configs import ModelConfig, SFTConfig
from ingot.errors import CheckpointError, ConfigError
from ingot.models import base
from ingot.models.native import NativeModel
from ingot.models.torch_backend import TorchModel
from ingot.models.torch_backend.optimizer import orthogonalized
from networks import SHAPES, pack, perturbed
from oracle.muon import FusedMuon, Muon, is_matrix_of_a_block, orthogonalize

Array = np.ndarray[Any, Any]
BACKENDS: dict[str, Callable[[ModelConfig], base.Model]] = {
    "native": lambda config: NativeModel(config, threads=2),
    "torch": lambda config: TorchModel(config, precision="f32", device="cpu", threads=1),
}
LR = 0.02


@pytest.fixture(params=BACKENDS)
def make(request: pytest.FixtureRequest) -> Callable[[ModelConfig], base.Model]:
    """A model of either backend with weights that are not tiny."""

    def made(config: ModelConfig) -> base.Model:
        model = BACKENDS[request.param](config)
        model.load_state(perturbed(config))
        return model

    return made


def native(config: ModelConfig, threads: int = 1) -> NativeModel:
    model = NativeModel(config, threads=threads)
    model.load_state(perturbed(config))
    return model


def backpropagate(model: base.Model, step: int) -> dict[str, Array]:
    """Fill the gradients from a batch; returns them in f64."""
    batch = pack(model.config, [9, 30, 5], seed=step)
    weights = np.full(len(batch.tokens), 1.0 / len(batch.tokens), dtype=np.float32)
    model.zero_grad()
    model.forward_backward(*batch.arrays, weights)
    return {name: array.astype(np.float64) for name, array in model.gradients.items()}


class Twin:
    """Muon and torch's AdamW in f64."""

    def __init__(self, model: base.Model, momentum: float, weight_decay: float) -> None:
        self.weights = {name: array.astype(np.float64) for name, array in model.state().items()}
        self.muons: dict[str, Muon | FusedMuon] = {}
        self.others: dict[str, torch.Tensor] = {}
        for name, weight in self.weights.items():
            if is_matrix_of_a_block(name, weight):
                kind = FusedMuon if name.endswith("c_attn.weight") else Muon
                self.muons[name] = kind(momentum, weight_decay)
            else:
                self.others[name] = torch.from_numpy(weight)
        decays = [{"params": [p], "weight_decay": weight_decay if p.ndim > 1 else 0.0} for p in self.others.values()]
        self.adamw = torch.optim.AdamW(decays, betas=(0.9, 0.95), eps=1e-8)

    def step(self, gradients: Mapping[str, Array], lr: float, clip_norm: float) -> None:
        norm = np.sqrt(sum(np.sum(g**2) for g in gradients.values()))
        scale = min(1.0, clip_norm / (norm + 1e-6))
        for name, muon in self.muons.items():
            self.weights[name] = muon.step(self.weights[name], gradients[name] * scale, lr)
        for name, weight in self.others.items():
            weight.grad = torch.from_numpy(gradients[name] * scale)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()


@pytest.mark.parametrize("shape", ["gpt2", "llama", "qwen3", "mixed"])
def test_steps_are_those_of_the_f64_twin(make: Callable[[ModelConfig], base.Model], shape: str) -> None:
    model = make(SHAPES[shape])
    model.optimizer = ingot.Optimizer(model, optim="muon", muon_momentum=0.9, weight_decay=0.3)
    twin = Twin(model, 0.9, 0.3)
    assert len(twin.muons) >= 4 * model.config.num_hidden_layers
    for step in range(5):
        gradients = backpropagate(model, step)
        model.step(LR, clip_norm=0.5)
        twin.step(gradients, LR, 0.5)
        for name, array in model.state().items():
            # An element moves by about 0.2 LR a step; the smallest singular values grow 485-fold, and rounding with them.
            np.testing.assert_allclose(array, twin.weights[name], rtol=0, atol=2e-4 * LR * (step + 1), err_msg=name)
    state = model.optimizer.state()
    for name, muon in twin.muons.items():
        assert not state[f"v.{name}"].any()
        buffers = [part.buffer for part in muon.parts] if isinstance(muon, FusedMuon) else [muon.buffer]
        np.testing.assert_allclose(state[f"m.{name}"], np.hstack(buffers), rtol=1e-5, atol=1e-9)
