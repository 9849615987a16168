"""AdamW of both backends against torch.optim.AdamW in f64: groups, clipping, epsilon, skipped steps, state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

import ingot
from ingot.errors import CheckpointError, ConfigError
from ingot.models import base
from ingot.models.native import NativeModel
from ingot.models.torch_backend import TorchModel
from networks import SHAPES, pack, perturbed

CONFIG = SHAPES["gpt2"]
NORM_BIAS = "transformer.ln_f.bias"
BACKENDS: dict[str, Callable[[], base.Model]] = {
    "native": lambda: NativeModel(CONFIG),
    "torch": lambda: TorchModel(CONFIG, precision="f32", device="cpu", threads=1),
}


@pytest.fixture(params=BACKENDS)
def model(request: pytest.FixtureRequest) -> base.Model:
    """A model of either backend."""
    model = BACKENDS[request.param]()
    model.load_state(perturbed(CONFIG))
    return model


def backpropagate(model: base.Model, step: int, size: float = 1.0) -> dict[str, np.ndarray[Any, Any]]:
    """Fill the gradients from a batch, ``size`` times as large as those of the mean; returns them in f64."""
    batch = pack(CONFIG, [9, 30, 5], seed=step)
    weights = np.full(len(batch.tokens), size / len(batch.tokens), dtype=np.float32)
    model.zero_grad()
    model.forward_backward(*batch.arrays, weights)
    return {name: array.astype(np.float64) for name, array in model.gradients.items()}


class Reference:
    """torch.optim.AdamW on f64 copies of a model's weights."""

    def __init__(self, model: base.Model, settings: Mapping[str, tuple[float, float]], **options: Any) -> None:
        self.weights = {name: torch.tensor(array, dtype=torch.float64) for name, array in model.state().items()}
        groups = [
            {"params": [self.weights[name]], "scale": scale, "weight_decay": decay}
            for name, (scale, decay) in settings.items()
        ]
        self.optimizer = torch.optim.AdamW(groups, **options)

    def step(self, gradients: Mapping[str, np.ndarray[Any, Any]], lr: float, clip_norm: float | None) -> float:
        for name, weight in self.weights.items():
            weight.grad = torch.from_numpy(gradients[name].copy())
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), clip_norm or float("inf"))
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        self.optimizer.step()
        return float(norm)


def usual_settings(model: base.Model, decay: float) -> dict[str, tuple[float, float]]:
    return {name: (1.0, decay if array.ndim > 1 else 0.0) for name, array in model.parameters.items()}


def assert_close(model: base.Model, expected: Mapping[str, Any], lr: float, num_steps: int) -> None:
    """Each step moves a weight by about lr; rounding in f32 moves it by far less."""
    for name, array in model.state().items():
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=1e-4 * lr * num_steps + 3e-7, err_msg=name)


@pytest.mark.parametrize("clip_norm", [None, 0.05, 1e3])
def test_adamw_is_torchs(model: base.Model, clip_norm: float | None) -> None:
    model.optimizer = ingot.Optimizer(model, betas=(0.8, 0.97), eps=1e-6, weight_decay=0.3)
    reference = Reference(model, usual_settings(model, 0.3), betas=(0.8, 0.97), eps=1e-6)
    for step in range(12):
        gradients = backpropagate(model, step)
        lr = 0.01 / (step + 1)
        info = model.step(lr, clip_norm)
        assert info.grad_norm == pytest.approx(reference.step(gradients, lr, clip_norm), rel=1e-5)
        assert not info.skipped
    assert_close(model, reference.weights, 0.01, 12)
    moments = reference.optimizer.state
    state = model.optimizer.state()
    assert state["step"].tolist() == [12]
    for name, weight in reference.weights.items():
        for prefix, moment in (("m", "exp_avg"), ("v", "exp_avg_sq")):
            want = moments[weight][moment].numpy()
            np.testing.assert_allclose(
                state[f"{prefix}.{name}"], want, rtol=1e-4, atol=1e-4 * np.abs(want).max() + 1e-12
            )


def test_defaults_of_a_model() -> None:
    for make in BACKENDS.values():
        model = make()
        reference = Reference(model, usual_settings(model, 0.1), betas=(0.9, 0.95), eps=1e-8)
        for step in range(3):
            # Large gradients: beside them epsilon and the rounding of those near zero do not show.
            reference.step(backpropagate(model, step, 1e4), 1e-2, 1.0)
            model.step(1e-2)
        for name in ("transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight", NORM_BIAS):
            difference = np.abs(model.state()[name] - reference.weights[name].numpy())
            assert np.median(difference) < 1e-6, name


def test_groups_have_rates_and_decays_of_their_own(model: base.Model) -> None:
    groups = [
        base.ParameterGroup(names=("*.h.0.*",), lr_scale=0.0),
        base.ParameterGroup(names=("*.bias", "transformer.ln_f.weight"), lr_scale=3.0, weight_decay=0.5),
        base.ParameterGroup(names=("*.wpe.weight",), weight_decay=0.0),
    ]
    model.optimizer = ingot.Optimizer(model, groups, weight_decay=0.2, eps=1e-4)
    settings = usual_settings(model, 0.2)
    for name in settings:
        if ".h.0." in name:
            settings[name] = (0.0, settings[name][1])
        elif name.endswith(".bias") or name == "transformer.ln_f.weight":
            settings[name] = (3.0, 0.5)
    settings["transformer.wpe.weight"] = (1.0, 0.0)
    reference = Reference(model, settings, betas=(0.9, 0.95), eps=1e-4)
    before = model.state()
    for step in range(5):
        reference.step(backpropagate(model, step), 1e-2, 1.0)
        model.step(1e-2)
    assert_close(model, reference.weights, 3e-2, 5)
    after = model.state()
    for name, array in before.items():
        assert (array == after[name]).all() == (".h.0." in name), name


def test_epsilon_before_the_correction_is_tensorflows(model: base.Model) -> None:
    # Kingma and Ba 2015, end of section 2: theta -= lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps).
    model.optimizer = ingot.Optimizer(model, betas=(0.9, 0.999), eps=1e-3, eps_mode="tf", weight_decay=0.0)
    weights = {name: array.astype(np.float64) for name, array in model.state().items()}
    first = {name: np.zeros_like(array) for name, array in weights.items()}
    second = {name: np.zeros_like(array) for name, array in weights.items()}
    for step in range(1, 6):
        for name, gradient in backpropagate(model, step).items():
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            scale = 1e-2 * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
            weights[name] -= scale * first[name] / (np.sqrt(second[name]) + 1e-3)
        model.step(1e-2, clip_norm=None)
    assert_close(model, weights, 1e-2, 5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_on_gradients_that_are_not_finite_changes_nothing(bad: float) -> None:
    for make in BACKENDS.values():
        model = make()
        backpropagate(model, 0)
        model.step(1e-2)
        weights, state = model.state(), model.optimizer.state()
        broken = weights | {NORM_BIAS: np.full_like(weights[NORM_BIAS], bad)}
        model.load_state(broken)
        backpropagate(model, 1)
        model.load_state(weights)
        info = model.step(1e-2)
        assert info.skipped
        assert not np.isfinite(info.grad_norm)
        for name, array in model.state().items():
            np.testing.assert_array_equal(array, weights[name])
        for name, entry in model.optimizer.state().items():
            np.testing.assert_array_equal(entry, state[name])
        backpropagate(model, 2)
        assert not model.step(1e-2).skipped
        assert model.optimizer.state()["step"].tolist() == [2]


def test_state_restores_the_optimizer(model: base.Model) -> None:
    for step in range(3):
        backpropagate(model, step)
        model.step(1e-2)
    weights, state = model.state(), model.optimizer.state()
    assert list(state) == ["step", *(f"{prefix}.{name}" for prefix in "mv" for name in weights)]

    def two_more() -> dict[str, Any]:
        for step in range(3, 5):
            backpropagate(model, step)
            model.step(1e-2)
        return model.state()

    expected = two_more()
    model.load_state(weights)
    model.optimizer = ingot.Optimizer(model)
    model.optimizer.load_state(state)
    for name, array in two_more().items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    with pytest.raises(CheckpointError, match="step is -1"):
        model.optimizer.load_state(state | {"step": np.array([-1])})


def test_steps_without_gradients_and_senseless_settings_are_refused(model: base.Model) -> None:
    with pytest.raises(RuntimeError, match="no gradients yet"):
        model.step(1e-3)
    backpropagate(model, 0)
    with pytest.raises(ValueError, match=r"learning_rate: .*(nan|NaN)"):
        model.step(float("nan"))
    with pytest.raises(ValueError, match="clip_norm: must be positive, got 0"):
        model.step(1e-3, clip_norm=0.0)
    for settings, message in (
        ({"betas": (1.0, 0.9)}, "beta"),
        ({"eps": -1.0}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more, got -0.1"),
        ({"eps_mode": "jax"}, """eps_mode is ['"]jax['"]"""),
        (
            {"groups": [base.ParameterGroup(names=("transformer.wt.weight",))]},
            "nearest name is 'transformer.wte.weight'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ingot.Optimizer(model, **settings)
    with pytest.raises(ConfigError, match="lr_scale"):
        base.ParameterGroup(names=("*",), lr_scale=-1.0)
