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


def test_steps_are_torchs_within_bf16() -> None:
    model = native(SHAPES["llama"])
    model.optimizer = ingot.Optimizer(model, optim="muon", weight_decay=0.1)
    weights = {n: torch.tensor(w) for n, w in model.state().items() if is_matrix_of_a_block(n, w)}
    before = {n: w.clone() for n, w in weights.items()}
    reference = torch.optim.Muon(list(weights.values()), weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        for name, gradient in backpropagate(model, step).items():
            if name in weights:
                weights[name].grad = torch.from_numpy(gradient.astype(np.float32))
        for group in reference.param_groups:
            group["lr"] = LR
        reference.step()
        model.step(LR, clip_norm=None)
    after = model.state()
    for name, weight in weights.items():
        moved, expected = after[name] - before[name].numpy(), (weight - before[name]).numpy()
        # Measured: 1.0 to 2.1 %. bf16 has 8 bits.
        assert np.linalg.norm(moved - expected) < 0.05 * np.linalg.norm(expected), name


def directions(model: base.Model, gradients: Mapping[str, Array], lr: float = LR) -> dict[str, Array]:
    """What one step without decay takes off each matrix of the blocks, in units of the step's length, in f64."""
    before = {name: array.astype(np.float64) for name, array in model.state().items()}
    model.optimizer = ingot.Optimizer(model, optim="muon", weight_decay=0.0)
    model.zero_grad()
    backpropagate(model, 0)
    for name, view in model.gradients.items():
        view[...] = gradients.get(name, 0.0)
    model.step(lr, clip_norm=None)
    after = model.state()
    return {
        name: (weight - after[name]) / (0.2 * lr * np.sqrt(max(weight.shape)))
        for name, weight in before.items()
        if is_matrix_of_a_block(name, weight)
    }


def random_gradients(model: base.Model, seed: int, scale: float = 1.0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.standard_normal(a.shape)).astype(np.float32) for name, a in model.parameters.items()}


WIDE = ModelConfig.llama(
    vocab_size=31, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, head_dim=32, intermediate_size=96
)


@pytest.mark.parametrize("seed", range(3))
def test_singular_values_come_near_one(seed: int) -> None:
    model = native(WIDE)
    for name, step in directions(model, random_gradients(model, seed), lr=1.0).items():
        values = np.linalg.svd(step, compute_uv=False)
        # Random matrices of 24 x 64 and 24 x 96: no singular value below 0.06 of the norm.
        assert values.min() > 0.68, name
        assert values.max() < 1.14, name


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e4, 1e15])
def test_a_step_has_a_length_that_gradients_cannot_exceed(scale: float) -> None:
    model = native(SHAPES["mixed"])
    for name, step in directions(model, random_gradients(model, 0, scale), lr=1.0).items():
        # 1.21 is the polynomial's largest value on [0, 1.21].
        assert np.linalg.norm(step) <= 1.21 * np.sqrt(min(step.shape)), name
        assert np.linalg.norm(step) > 0.6 * np.sqrt(min(step.shape)) or scale < 1e-6, name


def test_the_size_of_a_gradient_does_not_matter() -> None:
    for factor in (2.0**-10, 2.0**20):
        one, other = native(SHAPES["gpt2"]), native(SHAPES["gpt2"])
        gradients = random_gradients(one, 1)
        first = directions(one, gradients)
        second = directions(other, {name: (factor * g).astype(np.float32) for name, g in gradients.items()})
        for name, step in first.items():
            assert np.array_equal(step, second[name]), name


def test_without_a_gradient_a_matrix_stays() -> None:
    model = native(SHAPES["gpt2"])
    assert all(not step.any() for step in directions(model, {}).values())
    for matrix in (np.zeros((5, 3)), np.zeros((2, 7))):
        assert not orthogonalized(torch.from_numpy(matrix)).any()


@pytest.mark.parametrize("rank", [1, 3])
def test_directions_that_a_gradient_does_not_have_stay(rank: int) -> None:
    model = native(WIDE)
    rng = np.random.default_rng(rank)
    gradients = {
        name: (rng.standard_normal((a.shape[0], rank)) @ rng.standard_normal((rank, a.shape[1]))).astype(np.float32)
        for name, a in model.parameters.items()
        if a.ndim == 2
    }
    for name, step in directions(model, gradients, lr=1.0).items():
        values = np.linalg.svd(step, compute_uv=False)
        assert values[rank - 1] > 0.68, name
        assert values[0] < 1.21, name
        assert values[rank] < 1e-3, name
        np.testing.assert_allclose(step, orthogonalize(gradients[name].astype(np.float64)), rtol=0, atol=1e-4)


def test_bits_do_not_depend_on_threads() -> None:
    # Matrices of 2100 x 520, which all threads share, and small ones that they take one by one.
    config = ModelConfig.gpt2(
        vocab_size=11, hidden_size=20, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=40
    )
    large = ModelConfig.llama(
        vocab_size=11, hidden_size=520, num_hidden_layers=1, num_attention_heads=2, intermediate_size=2100
    )
    for shape in (config, large):
        reference: dict[str, Array] = {}
        for threads in (1, 2, 3, 8):
            model = NativeModel(shape, seed=1, threads=threads)
            model.optimizer = ingot.Optimizer(model, optim="muon")
            for step in range(2 if shape is config else 1):
                backpropagate(model, step)
                model.step(LR)
            state = model.state()
            reference = reference or state
            for name, array in state.items():
                assert np.array_equal(array, reference[name]), (threads, name)


def test_a_gradient_that_is_not_finite_skips_the_step(make: Callable[[ModelConfig], base.Model]) -> None:
    model = make(SHAPES["llama"])
    model.optimizer = ingot.Optimizer(model, optim="muon")
    batch = pack(model.config, [9], seed=1)
    model.forward_backward(*batch.arrays, np.full(9, np.inf, dtype=np.float32))
    before, moments = model.state(), model.optimizer.state()
    assert model.step(LR).skipped
    for name, array in model.state().items():
        assert np.array_equal(array, before[name])
    assert all(np.array_equal(array, moments[name]) for name, array in model.optimizer.state().items())


def test_groups_have_rates_of_their_own(make: Callable[[ModelConfig], base.Model]) -> None:
    steps = []
    for groups in (
        [],
        [ingot.ParameterGroup(names=("*mlp*",), lr_scale=0.5), ingot.ParameterGroup(names=("*q_proj*",), lr_scale=0)],
    ):
        model = make(SHAPES["llama"])
        before = model.state()
        model.optimizer = ingot.Optimizer(model, groups, optim="muon", weight_decay=0.1)
        backpropagate(model, 0)
        model.step(LR)
        steps.append({name: array - before[name] for name, array in model.state().items()})
    for name, step in steps[0].items():
        factor = 0.5 if "mlp" in name else 0.0 if "q_proj" in name else 1.0
        np.testing.assert_allclose(steps[1][name], factor * step, rtol=1e-4, atol=3e-7, err_msg=name)


def test_a_saved_state_goes_on_with_the_same_bits(make: Callable[[ModelConfig], base.Model]) -> None:
    whole, first, second = (make(SHAPES["gpt2"]) for _ in range(3))
    for model in (whole, first, second):
        model.optimizer = ingot.Optimizer(model, optim="muon")
    for step in range(4):
        for model in (whole, first) if step < 2 else (whole, second):
            backpropagate(model, step)
            model.step(LR)
        if step == 1:
            second.load_state(first.state())
            second.optimizer.load_state(first.optimizer.state())
    for name, array in whole.state().items():
        assert np.array_equal(array, second.state()[name]), name


def test_a_state_of_another_optimizer_is_refused(make: Callable[[ModelConfig], base.Model]) -> None:
    model = make(SHAPES["gpt2"])
    adamw, muon = ingot.Optimizer(model), ingot.Optimizer(model, optim="muon")
    with pytest.raises(CheckpointError, match="saved with optim 'adamw', but optim is 'muon'"):
        muon.load_state(adamw.state())
    with pytest.raises(CheckpointError, match="saved with optim 'muon', but optim is 'adamw'"):
        adamw.load_state(muon.state())
    damaged = muon.state()
    del damaged["step"]
    with pytest.raises(CheckpointError, match="step"):
        muon.load_state(damaged)


def test_settings_are_checked(make: Callable[[ModelConfig], base.Model]) -> None:
    model = make(SHAPES["gpt2"])
    with pytest.raises(ConfigError, match="optim is 'sgd'"):
        ingot.Optimizer(model, optim="sgd")  # type: ignore[arg-type]
    for momentum in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="muon_momentum must be in"):
            ingot.Optimizer(model, optim="muon", muon_momentum=momentum)
    model.add_adapter("low", rank=2)
    model.active_adapter = "low"
    with pytest.raises(ConfigError, match="not for adapters"):
        ingot.Optimizer(model, optim="muon")
    with pytest.raises(ConfigError, match="muon_momentum must be in"):
        SFTConfig(model="m", data=("d",), muon_momentum=1.0)
    with pytest.raises(ConfigError, match="not for adapters"):
        SFTConfig(model="m", data=("d",), optim="muon", lora_rank=4)
