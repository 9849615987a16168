"""A policy and what estimates its values, which train and are saved together.

The critic is a head on the policy's own network, an adapter of its own on the policy's base, or a network of its own. What a folder
holds of the policy is a plain causal language model either way; the head is in ``value_head.safetensors`` beside it, what is trained of
another critic in ``critic.safetensors``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ingot.configs import ModelConfig, PPOConfig
from ingot.models import Model as make_model
from ingot.models.adapters import write_adapter
from ingot.models.base import Model, StepInfo
from ingot.models.hf import write_folder
from ingot.models.safetensors_files import write_tensors
from ingot.models.tables import LazyArrays
from ingot.training.checkpoints import read_optimizer
from ingot.training.lora import ADAPTER, attach_adapter, load_trained_state, read_trained, trained_state
from ingot.training.setup import Setup, load_policy
from ingot.training.trainer import make_optimizer

HEAD_FILE = "value_head.safetensors"
CRITIC_FILE = "critic.safetensors"

_PREFIX = "critic."


class ActorCritic:
    """Both of them.

    Parameters
    ----------
    policy
        With one scalar head where it is its own critic.
    critic
        With one scalar head; None for the policy's own.
    """

    def __init__(self, policy: Model, critic: Model | None = None) -> None:
        self.policy = policy
        self.critic = critic

    @classmethod
    def start(cls, config: PPOConfig, setup: Setup) -> ActorCritic:
        """As a new run begins: a critic that says 0, or what the reward model says."""
        if config.critic == "shared":
            return cls(setup.policy)
        if config.critic == "policy":
            return cls(setup.policy, _adapted(config, setup) if config.lora_rank else load_policy(config, num_values=1))
        return cls(setup.policy, _critic_of(config, setup))

    @property
    def config(self) -> ModelConfig:
        """Of the policy."""
        return self.policy.config

    @property
    def optimizer(self) -> ActorCritic:
        """Both optimizers."""
        return self

    def zero_grad(self) -> None:
        """Of both."""
        self.policy.zero_grad()
        if self.critic is not None:
            self.critic.zero_grad()

    def step(self, rate: float, critic_rate: float, clip_norm: float | None) -> tuple[StepInfo, StepInfo | None]:
        """A step of each, with norms of their own."""
        info = self.policy.step(rate, clip_norm=clip_norm)
        return info, None if self.critic is None else self.critic.step(critic_rate, clip_norm=clip_norm)

    # ---- files

    def save(self, folder: str | Path) -> None:
        """The policy as a Hugging Face directory, and what estimates values in a file beside it."""
        state = self.policy.merged_state()
        heads = {name: state[name] for name in state if name.startswith("score.")}
        write_folder(folder, self.config, LazyArrays((name for name in state if name not in heads), state.__getitem__))
        if self.critic is not None:
            write_tensors(Path(folder) / CRITIC_FILE, trained_state(self.critic))
        else:
            write_tensors(Path(folder) / HEAD_FILE, heads)

    @property
    def active_adapter(self) -> str | None:
        """The policy's."""
        return self.policy.active_adapter

    def save_adapter(self, name: str, folder: str | Path) -> None:
        """Write the policy's adapter as peft does, without the value head: what it belongs to is a model that writes."""
        adapter = self.policy.adapters[name]
        state = {key: values for key, values in adapter.state().items() if not key.startswith("score.")}
        write_adapter(Path(folder), adapter, self.config, state)

    def state(self) -> dict[str, npt.NDArray[np.generic]]:
        """Moments of both."""
        moments = self.policy.optimizer.state()
        if self.critic is not None:
            moments |= {_PREFIX + name: values for name, values in self.critic.optimizer.state().items()}
        return moments

    def restore(self, config: Any, checkpoint: Path | None) -> None:
        """New optimizers; weights and moments as ``checkpoint`` has them."""
        from safetensors.numpy import load_file

        self.policy.optimizer = make_optimizer(config, self.policy)
        if self.critic is not None:
            self.critic.optimizer = make_optimizer(config, self.critic)
        if checkpoint is None:
            return
        moments = read_optimizer(checkpoint)
        weights = read_trained(self.policy, checkpoint)
        if self.critic is None:
            load_trained_state(self.policy, {**weights, **load_file(checkpoint / HEAD_FILE)})
        else:
            load_trained_state(self.policy, weights)
            load_trained_state(self.critic, load_file(checkpoint / CRITIC_FILE))
            own = {name: values for name, values in moments.items() if name.startswith(_PREFIX)}
            self.critic.optimizer.load_state({name.removeprefix(_PREFIX): values for name, values in own.items()})
            moments = {name: values for name, values in moments.items() if name not in own}
        self.policy.optimizer.load_state(moments)


def _adapted(config: PPOConfig, setup: Setup) -> Model:
    """The base below the policy's adapter with another adapter, whose head says 0."""
    critic = setup.base.fork()
    attach_adapter(config, critic, None, base_hash=setup.base.hash, num_values=1)
    return critic


def _critic_of(config: PPOConfig, setup: Setup) -> Model:
    """What starts as the reward model, its criteria made one by their weights: an adapter where the reward model is one on the policy's
    base, and a policy's adapter is trained; else a network."""
    rewarder = setup.scorers.reward_model
    weights, scale = rewarder.weights, rewarder.gain
    known = rewarder.model.active_adapter if config.lora_rank else None
    state = dict(rewarder.model.merged_state()) if known is None else rewarder.model.adapters[known].state()
    state["score.weight"] = (weights @ (scale[:, None] * state["score.weight"]))[None].astype(np.float32)
    state["score.bias"] = np.array([weights @ (scale * state["score.bias"] + rewarder.bias)], np.float32)
    if known is not None:
        critic = setup.base.fork()
        adapter = rewarder.model.adapters[known]
        critic.add_adapter(ADAPTER, adapter.rank, adapter.alpha, adapter.modules, num_values=1).load_state(state)
        critic.active_adapter = ADAPTER
        return critic
    critic = make_model(dataclasses.replace(rewarder.config, dropout=0.0), num_values=1, **config.place)
    critic.load_state(state)
    return critic
