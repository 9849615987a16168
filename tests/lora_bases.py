"""Bases for tests that train adapters: random weights that are fit to be adapted, and the same that speak of all letters alike.

An adapter learns on frozen features and speaks through a frozen head, so that a base must have both. Weights of deviation .02, which full
training begins with, give neither: the MLPs see next to nothing, and since what reaches the head has a norm of its own, its logits are
bounded by the head's weights. With deviation .2 (of 32 inputs: about 1 / sqrt(32)) both are of size 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ingot.configs import ModelConfig
from ingot.models import Model, Optimizer

WIDTH = 0.2
RANK = 8


def base(config: ModelConfig, seed: int, num_values: int = 0) -> Any:
    """Random weights of this deviation."""
    return Model(dataclasses.replace(config, initializer_range=WIDTH), seed=seed, threads=1, num_values=num_values)


def uniform_base(config: ModelConfig, seed: int) -> Any:
    """The same, with the same probability for all letters: the head reads the second half of the residual stream, where the base writes
    nothing, but adapters may. The head's rows sum to 0, since LayerNorm writes its mean there."""
    model = base(config, seed)
    half = config.hidden_size // 2
    state = model.state()
    for name, weight in state.items():
        if any(each in name for each in ("wte", "wpe", "embed_tokens", "c_proj.weight")):
            weight[:, half:] = 0.0
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[half:] = 0.0
    head = np.random.default_rng(seed).normal(scale=0.5, size=state["lm_head.weight"][:, half:].shape)
    state["lm_head.weight"][:, :half] = 0.0
    state["lm_head.weight"][:, half:] = head - head.mean(1, keepdims=True)
    model.load_state(state)
    return model


def adapted(model: Any, seed: int = 0, num_values: int | None = None) -> Any:
    """With an adapter of rank 8 on all linear layers, which is what steps train."""
    model.add_adapter("x", RANK, seed=seed, num_values=num_values)
    model.active_adapter = "x"
    model.optimizer = Optimizer(model, weight_decay=0.0)
    return model
