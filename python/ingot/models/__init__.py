"""Models: one network, two backends behind one seam (:mod:`ingot.models.base`)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ingot.configs import ModelConfig
from ingot.errors import ConfigError
from ingot.models import base
from ingot.models.base import DecodeStep, EpsMode, Optim, Outputs, ParameterGroup, Sampling, StepInfo

__all__ = [
    "DecodeStep",
    "Model",
    "Optimizer",
    "Outputs",
    "ParameterGroup",
    "Sampling",
    "StepInfo",
    "load_model",
]

Backend = Literal["native", "torch"]
Precision = Literal["auto", "f32", "bf16", "f64"]


def Model(
    config: ModelConfig,
    seed: int = 0,
    precision: Precision = "auto",
    backend: Backend = "native",
    device: str | None = None,
    threads: int | None = None,
    *,
    level: str | None = None,
    num_values: int = 0,
) -> base.Model:
    """A new network.

    Parameters
    ----------
    config
        Its shape.
    seed
        Of the initial weights, which are the same on both backends.
    precision
        Of the matrix products; ``auto`` is f32 on the CPU, and bf16 on a GPU that has it.
    backend
        ``native`` (CPU) or ``torch`` (CPU or GPU; needs PyTorch).
    device
        Of the torch backend: ``cpu``, ``cuda``, ``cuda:1``; the GPU where there is one unless given.
    threads
        CPU threads; what affinity and the container allow unless given. Results of the native backend do not depend on it.
    level
        Force an instruction level of the native backend: ``portable``, ``avx2`` or ``avx512``.
    num_values
        Number of scalar heads beside the language model's head.

    Raises
    ------
    ConfigError
        A setting is unknown or not available here.
    """
    if num_values < 0:
        raise ConfigError(f"num_values must be 0 or more, got {num_values}")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}")
    if backend == "native":
        if device not in (None, "cpu"):
            raise ConfigError(f"the native backend computes on the CPU; for device {device!r} give backend='torch'")
        if precision not in ("auto", "f32"):
            raise ConfigError(f"precision is {precision!r}; the native backend has 'f32', which 'auto' stands for")
        from ingot.models.native import NativeModel

        return NativeModel(config, seed=seed, threads=threads, level=level, num_values=num_values)
    if backend == "torch":
        if level is not None:
            raise ConfigError("level is a setting of the native backend: leave it out with backend='torch'")
        from ingot.models.torch_backend import TorchModel

        return TorchModel(config, seed=seed, precision=precision, device=device, threads=threads, num_values=num_values)
    raise ConfigError(f"backend is {backend!r}; there are 'native' and 'torch'")


def load_model(
    folder: str | Path,
    seed: int = 0,
    precision: Precision = "auto",
    backend: Backend = "native",
    device: str | None = None,
    threads: int | None = None,
    *,
    level: str | None = None,
    num_values: int | None = None,
    dropout: float | None = None,
) -> base.Model:
    """A network from a Hugging Face directory: one that ingot saved, or a GPT-2, Llama, Qwen2 or Qwen3 that transformers saved.

    Parameters
    ----------
    num_values
        Scalar heads; those of the directory unless given. Where the directory has none, new ones start from ``seed``.
    dropout
        Instead of the directory's.

    The other parameters are those of :func:`Model`.

    Raises
    ------
    CheckpointError
        Something is missing, damaged, surplus, or of a network that ingot does not have; the message names it.
    """
    from ingot.models.hf import open_folder

    saved = open_folder(folder)
    if num_values is None:
        num_values = saved.num_values
    elif saved.num_values not in (0, num_values):
        raise ConfigError(f"{folder}: has {saved.num_values} scalar heads, not {num_values}: leave num_values out")
    config = saved.config if dropout is None else dataclasses.replace(saved.config, dropout=dropout)
    model = Model(config, seed, precision, backend, device, threads, level=level, num_values=num_values)
    shapes = {name: tuple(array.shape) for name, array in model.parameters.items()}
    new = ("score.bias",) if saved.num_values else ("score.weight", "score.bias")
    # A model that scores has no head for words; the network's keeps its first values.
    weights = saved.weights(shapes, optional=new if saved.labels is None else (*new, "lm_head.weight"))
    if saved.score_bias is not None:
        weights = itertools.chain([("score.bias", np.array(saved.score_bias, np.float32))], weights)
    if backend == "native":
        views = model.parameters
        for name, values in weights:
            views[name][...] = values
    else:
        model.load_state({**model.state(), **dict(weights)})
    return model


def Optimizer(
    model: base.Model,
    groups: Sequence[ParameterGroup] | None = None,
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    eps_mode: EpsMode = "torch",
    weight_decay: float = 0.1,
    optim: Optim = "adamw",
    muon_momentum: float = 0.95,
) -> base.Optimizer:
    """What changes the weights: AdamW (Loshchilov and Hutter 2019, algorithm 2), or Muon (Jordan et al. 2024) on the blocks' matrices.

    Muon takes the momentum m of a matrix's gradient g, makes it nearly orthogonal, and goes as far as AdamW would (Liu et al. 2025,
    equation 4), so that one learning rate serves both::

        m = momentum * m + (1 - momentum) * g
        u = momentum * m + (1 - momentum) * g
        X = u / max(|u|, 1e-7), then 5 times X = (a + b X X^T + c (X X^T)^2) X     a, b, c = 3.4445, -4.7750, 2.0315
        W = (1 - lr * weight_decay) * W - 0.2 * lr * sqrt(max(rows, columns)) * X

    All directions of a matrix then move about equally far, also those in which the gradient is small. Matrices are the projections of
    attention and MLP, where GPT-2's query, key and value count as three; embeddings, positions, heads, norms and biases have AdamW.

    Parameters
    ----------
    groups
        Parameters with a learning rate or weight decay of their own; the others follow the defaults.
    betas, eps
        Decay rates of the moments, and what is added to the denominator.
    eps_mode
        ``torch`` adds it after the bias correction, ``tf`` before.
    weight_decay
        Decoupled, on matrices; vectors (biases and norms) have none.
    optim
        ``adamw``, or ``muon`` (not for adapters).
    muon_momentum
        Share of the momentum that a step keeps, in [0, 1).

    Raises
    ------
    ConfigError
        A group names a parameter that the model does not have, or a number is out of its range.
    """
    settings: dict[str, Any] = {
        "betas": betas,
        "eps": eps,
        "eps_mode": eps_mode,
        "weight_decay": weight_decay,
        "optim": optim,
        "muon_momentum": muon_momentum,
    }
    if model.backend == "native":
        from ingot.models.native import NativeModel, NativeOptimizer

        if not isinstance(model, NativeModel):
            raise TypeError(f"the model is of class {type(model).__name__}, which the native optimizer does not know")
        return NativeOptimizer(model, groups, **settings)
    from ingot.models.torch_backend import TorchModel, TorchOptimizer

    if not isinstance(model, TorchModel):
        raise TypeError(f"the model is of class {type(model).__name__}, which the torch optimizer does not know")
    return TorchOptimizer(model, groups, **settings)
