"""Proximal policy optimisation from rewards of whole answers (Ziegler et al. 2019; Ouyang et al. 2022). The whole loop is
:meth:`_Run.loop` and the methods below it.

One update: the policy answers prompts; each answer is scored; each of its tokens is paid minus the KL to the reference, the last one
the score on top; generalized advantages say what each token was worth; a few passes over these answers raise the likelihood of tokens
that were worth more than the critic expected, as far as the clipped ratio lets them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ingot.configs import PPOConfig, RunConfig
from ingot.data.batches import Cursor, mix
from ingot.environment import memory_limit
from ingot.losses.advantages import generalized_advantages, token_rewards, whiten
from ingot.losses.kl import AdaptiveKLController, FixedKLController, KLController, kl_loss
from ingot.losses.numerics import Float64, Floats, Metrics, f64
from ingot.losses.packed import add_metrics, mean_weights
from ingot.losses.policy import (
    entropy_bonus,
    explained_variance,
    ppo_policy_loss,
    truncated_importance_weights,
    value_loss,
)
from ingot.models.base import FloatArray, Model, StepInfo
from ingot.training.actor_critic import ActorCritic
from ingot.training.callbacks import Callback
from ingot.training.cost import Cost, Probe
from ingot.training.decisions import Decisions, announce, decide
from ingot.training.experience import Experience, gather
from ingot.training.lora import load_trained_state, trained_state
from ingot.training.memory import Held, require_memory
from ingot.training.online import OnlineTrainer
from ingot.training.policy_alarms import critic_rules, policy_rules, tax_rule
from ingot.training.pretraining_mix import PretrainingMix
from ingot.training.progress import Display
from ingot.training.prompts import Rows
from ingot.training.rewards import RewardFunction
from ingot.training.rollouts import Rollouts, packs, recompute
from ingot.training.runs import RunFolder
from ingot.training.sampling_phase import SamplingPhase
from ingot.training.scores import TokenScorer
from ingot.training.setup import Given, Setup, prepare
from ingot.training.state import State
from ingot.training.trainer import Stopped, TrainingResult

_DEFAULT_UPDATES = 200
_MINIBATCH_STREAM = 3


def ppo(
    config: PPOConfig,
    prompts: Rows = None,
    rewards: Sequence[RewardFunction | TokenScorer] = (),
    gold: RewardFunction | None = None,
    callbacks: Sequence[Callback] = (),
    *,
    dry_run: bool = False,
    quiet: bool = False,
) -> TrainingResult:
    """Train a model to give answers that are rewarded more, in a new run folder.

    Parameters
    ----------
    prompts
        Rows with a "prompt", as dictionaries, instead of the files ``config.prompts``.
    rewards
        Besides those that ``config`` names: callables ``(prompts, completions, **columns) -> list[float]``, or reward models.
    gold
        Knows what is really wanted, instead of the function ``config.gold``; recorded only.
    dry_run
        Print the cost and stop: no folder is made.
    quiet
        Print nothing.

    Raises
    ------
    IngotError
        One line that says what is wrong with settings, models, prompts, rewards or folder, and what to do.
    KeyboardInterrupt
        Ctrl-C, after saving.
    """
    return _PHASE.start(config, Given.of(prompts, rewards, gold), callbacks, dry_run=dry_run, quiet=quiet)


@dataclasses.dataclass(frozen=True, eq=False)
class _Setup(Setup):
    """Also what else learns, and from what."""

    actors: ActorCritic
    ptx: PretrainingMix | None

    def restore(self, config: RunConfig, checkpoint: Path | None) -> None:
        """As the base class, the critic with the policy."""
        self.actors.restore(config, checkpoint)


def _prepare(config: PPOConfig, given: Given, display: Display) -> _Setup:
    setup = prepare(config, given, display, num_values=int(config.critic == "shared"))
    ptx = PretrainingMix.open(config, setup.encoder.tokenizer, display)
    actors = ActorCritic.start(config, setup)
    held = _held(config, setup, actors.critic)
    require_memory(memory_limit(), *held)
    parts = vars(setup) | {"facts": setup.facts | (ptx.facts if ptx else {}), "held": held}
    return _Setup(**parts, actors=actors, ptx=ptx)


def _held(config: PPOConfig, setup: Setup, critic: Model | None) -> tuple[Held, ...]:
    """Also a critic of its own, and the passes over pretraining text."""
    policy, *others = setup.held
    if config.ptx_data:
        policy = dataclasses.replace(
            policy, batch_tokens=max(policy.batch_tokens, config.ptx_batch_size * config.ptx_length)
        )
    if critic is not None:
        adapter = critic.active_adapter
        others.append(
            Held(
                critic.config,
                num_copies=int(adapter is None),
                num_trained=critic.num_parameters if adapter is None else critic.adapters[adapter].num_parameters,
                batch_tokens=policy.batch_tokens,
            )
        )
    return policy, *others


def _decide(
    config: PPOConfig, setup: _Setup, known: dict[str, Any], done: int, display: Display
) -> tuple[Decisions, Cost]:
    """Time an update on the run's first prompts, settle what is open, and say it. The weights are put back."""
    size, actors = config.per_device_train_batch_size, setup.actors
    before = trained_state(actors.policy), None if actors.critic is None else trained_state(actors.critic)
    actors.restore(config, None)
    began = time.perf_counter()
    experience = gather(
        setup,
        setup.prompts.take(0, size),
        policy=actors.policy,
        first_episode=0,
        seed=config.seed,
        values=actors.critic is None,
        progress=lambda step, total: display.work("timing an update", step, total),
    )
    sampling_s = time.perf_counter() - began
    learn(
        config,
        actors,
        setup.ptx,
        experience,
        kl_coef=config.kl_coef,
        step=0,
        cursor=Cursor(),
        pack_length=setup.pack_length,
    )
    step_s = time.perf_counter() - began
    load_trained_state(actors.policy, before[0])
    if actors.critic is not None and before[1] is not None:
        load_trained_state(actors.critic, before[1])
    probe = Probe(
        step_s=step_s,
        step_tokens=int(experience.rollouts.num_actions.sum()),
        evaluation_batch_s=sampling_s if setup.prompts.held_out else 0.0,
        evaluation_batches=-(-len(setup.prompts.held_out) // size),
    )
    epoch = len(setup.prompts.train) / size
    updates = _DEFAULT_UPDATES if config.total_episodes is None else -(-config.total_episodes // size)
    decisions, cost = decide(
        config, setup.policy, probe, known, steps_per_epoch=epoch, default_steps=updates, held=setup.held
    )
    facts = setup.facts
    announce(
        config,
        setup.policy,
        probe,
        decisions,
        cost,
        done,
        display,
        kind="prompts",
        data=f"{facts['num_train']:,} to learn from; {facts['split']}",
        shape=f"{size} answers of up to {config.response_length}, {config.num_ppo_epochs} epochs of {config.num_mini_batches} steps",
        passes=(decisions.max_steps - done) / epoch,
    )
    return decisions, cost


@dataclasses.dataclass(frozen=True)
class Update:
    """What an update did."""

    loss: float
    """Mean over its steps."""
    infos: tuple[StepInfo, ...]
    """Of the policy's steps."""
    metrics: Metrics
    cursor: Cursor
    """After the pretraining text it read."""


def learn(
    config: PPOConfig,
    actors: ActorCritic,
    ptx: PretrainingMix | None,
    experience: Experience,
    *,
    kl_coef: float,
    step: int,
    cursor: Cursor,
    pack_length: int,
    rate: float = 0.0,
    critic_rate: float = 0.0,
) -> Update:
    """One update of policy and critic on the episodes of one rollout.

    Parameters
    ----------
    kl_coef
        Weight of the KL to the reference now.
    step
        Number of the update: its minibatches are a function of it.
    cursor
        Where the pretraining text stands.
    rate, critic_rate
        Learning rates.
    """
    rollouts = experience.rollouts
    values = experience.values
    if values is None:
        assert actors.critic is not None
        values = recompute(actors.critic, rollouts, ("values",), max_tokens=pack_length)["values"]
    advantages, returns, metrics = _advantages(config, experience, values, kl_coef)
    metrics["val/explained_variance"] = explained_variance(values, returns, rollouts.targets)
    steps: list[Metrics] = []
    infos: list[StepInfo] = []
    for epoch in range(config.num_ppo_epochs):
        draws = np.random.Philox(key=mix(config.seed, _MINIBATCH_STREAM, step, epoch)).random_raw(len(rollouts))
        shuffled = np.argsort(draws, kind="stable")
        for numbers in np.array_split(shuffled, config.num_mini_batches):
            rows = rollouts.rows_of(numbers)
            batch = _Minibatch(
                rollouts.select(numbers),
                experience.logprobs[rows],
                experience.ref_logprobs[rows],
                values[rows],
                advantages[rows],
                returns[rows],
            )
            actors.zero_grad()
            found = _backward(config, actors, batch, kl_coef, pack_length)
            if not steps:
                metrics["val/ratio_first"] = found["val/ratio_far_max"]
            if config.target_kl is not None and found["policy/approxkl_avg"] > config.target_kl:
                break
            if ptx is not None:
                number = step * config.num_ppo_epochs * config.num_mini_batches + len(steps)
                more, cursor = ptx.backward(actors.policy, number, cursor, config.ptx_coef)
                found |= more
            info, critic_info = actors.step(rate, critic_rate, config.max_grad_norm or None)
            if critic_info is not None:
                found["grad_norm/critic"] = critic_info.grad_norm
            steps.append(found)
            infos.append(info)
        else:
            continue
        break
    metrics["val/num_steps"] = float(len(steps))
    for name in steps[0]:
        column = [found[name] for found in steps]
        metrics[name] = max(column) if name.endswith("_max") else float(np.mean(column))
    metrics["val/ratio_var"] = float(np.var([found["val/ratio"] for found in steps]))
    return Update(metrics["loss"], tuple(infos), metrics, cursor)


@dataclasses.dataclass(frozen=True, eq=False)
class _Minibatch:
    """Some episodes of a rollout, and by token what was known of them before the update, [N] each."""

    rollouts: Rollouts
    logprobs: FloatArray
    ref_logprobs: FloatArray
    values: FloatArray
    advantages: Float64
    returns: Float64


def _advantages(
    config: PPOConfig, experience: Experience, values: Floats, kl_coef: float
) -> tuple[Float64, Float64, Metrics]:
    """Advantages and returns by token, f64 [N] each, and figures of them."""
    rollouts = experience.rollouts
    targets, offsets = rollouts.targets, rollouts.offsets
    rewards, metrics = token_rewards(
        experience.scores.total,
        experience.logprobs,
        experience.ref_logprobs,
        targets,
        offsets,
        kl_coef=kl_coef if config.kl_penalty == "reward" else 0.0,
        kl_estimator=config.kl_estimator,
    )
    if config.kl_penalty == "loss":
        metrics["objective/non_score_reward"] = -kl_coef * metrics["objective/kl"]
        metrics["objective/rlhf_reward"] = metrics["objective/scores"] + metrics["objective/non_score_reward"]
    if config.whiten_rewards:
        rewards = whiten(rewards, targets, shift_mean=False)
    advantages, returns = generalized_advantages(rewards, values, targets, offsets, gamma=config.gamma, lam=config.lam)
    counted = returns[rollouts.mask & np.isfinite(returns)]
    metrics |= {
        "objective/kl_coef": kl_coef,
        "val/return_mean": float(counted.mean()) if counted.size else 0.0,
        "val/return_std": float(counted.std()) if counted.size else 0.0,
        "val/advantage_std": float(np.nanstd(advantages[rollouts.mask])) if counted.size else 0.0,
    }
    if config.whiten_advantages:
        advantages = whiten(advantages, targets)
    if config.sampling_ratio_cap is not None:
        advantages = advantages * truncated_importance_weights(
            experience.logprobs, rollouts.logprobs, cap=config.sampling_ratio_cap
        )
    return advantages, returns, metrics


def _backward(config: PPOConfig, actors: ActorCritic, batch: _Minibatch, kl_coef: float, pack_length: int) -> Metrics:
    """Add up the gradients of one minibatch; its metrics, ``loss`` among them."""
    rollouts = batch.rollouts
    num_tokens = float(np.count_nonzero(rollouts.mask))
    want = {"logprobs"} | ({"entropy"} if config.ent_coef else set()) | (set() if actors.critic else {"values"})
    parts: list[Metrics] = []
    for episodes, rows in packs(rollouts, pack_length):
        tokens, targets = rollouts.tokens[rows], rollouts.targets[rows]
        offsets = rollouts.offsets[episodes.start : episodes.stop + 1] - rollouts.offsets[episodes.start]
        softmax: dict[str, Any] = {"temperature": rollouts.temperature, "banned_ids": rollouts.banned_ids}
        ctx, out = actors.policy.forward(
            tokens, offsets, targets, want=want, value_rows=targets >= 0 if "values" in want else None, **softmax
        )
        assert ctx is not None
        loss, d_logprobs, metrics = ppo_policy_loss(
            out.logprobs,
            batch.logprobs[rows],
            batch.advantages[rows],
            targets,
            num_tokens=num_tokens,
            cliprange=config.cliprange,
            delta=config.delta,
        )
        far = np.abs(np.expm1(np.clip(f64(out.logprobs) - batch.logprobs[rows], -20, 20)))[targets >= 0]
        metrics["val/ratio_far_max"] = float(far.max()) if far.size else 0.0
        if config.kl_penalty == "loss":
            weights = mean_weights(targets >= 0, offsets, reduction="token_mean", total=num_tokens)
            penalty, d_kl, found = kl_loss(
                out.logprobs, batch.ref_logprobs[rows], targets, weights, beta=kl_coef, kl_estimator=config.kl_estimator
            )
            loss, d_logprobs = loss + penalty, d_logprobs + d_kl
            metrics["loss/kl_avg"] = found["kl"]
        d_entropy = None
        if config.ent_coef:
            bonus, d_entropy, found = entropy_bonus(
                out.entropy, targets, num_tokens=num_tokens, ent_coef=config.ent_coef
            )
            loss += bonus
            metrics |= {"policy/entropy_avg": found["policy/entropy_avg"]}
        d_values = None
        critic_ctx = None
        if actors.critic is None:
            values = out.values
        else:
            critic_ctx, critic_out = actors.critic.forward(
                tokens, offsets, np.full_like(targets, -1), want=("values",), value_rows=targets >= 0
            )
            values = critic_out.values
        critic_loss, d_values, found = value_loss(
            values,
            batch.values[rows],
            batch.returns[rows],
            targets,
            num_tokens=num_tokens,
            vf_coef=config.vf_coef,
            cliprange_value=config.cliprange_value,
        )
        metrics |= {name: found[name] for name in ("loss/value_avg", "val/clipfrac_avg")}
        metrics["loss"] = loss + critic_loss
        if critic_ctx is None:
            actors.policy.backward(ctx, d_logprobs=d_logprobs, d_entropy=d_entropy, d_values=d_values)
        else:
            assert actors.critic is not None
            actors.policy.backward(ctx, d_logprobs=d_logprobs, d_entropy=d_entropy)
            actors.critic.backward(critic_ctx, d_values=d_values)
        parts.append(metrics)
    return add_metrics(parts)


class _Run(OnlineTrainer[PPOConfig]):
    """The loop and its parts."""

    def __init__(
        self,
        folder: RunFolder,
        config: PPOConfig,
        setup: _Setup,
        state: State,
        decisions: Decisions,
        cost: Cost,
        display: Display,
        callbacks: Sequence[Callback],
    ) -> None:
        scorers = setup.scorers
        watched = [name for name, there in (("judge", scorers.has_judge), ("gold", scorers.has_gold)) if there]
        rules = [*policy_rules(kl_target=config.kl_target, watched=watched), *critic_rules()]
        rules += [] if setup.ptx is None else [tax_rule()]
        super().__init__(folder, config, setup, state, decisions, cost, display, callbacks, rules=rules)
        self.actors = setup.actors
        self.saved = setup.actors
        self.ptx = setup.ptx

    def loop(self) -> None:
        """From the state's step to the last one."""
        state, total = self.state, self.decisions.max_steps
        self.notify(lambda callback, view: callback.on_start(view))
        self.display.start(state.step, total)
        with self.stop, self.saving():
            while True:
                if self.due(self.decisions.eval_steps) and state.evaluated_step != state.step:
                    self.evaluate()
                if self.stop.requested:
                    self.save(required=True)
                    raise KeyboardInterrupt
                if self.due(self.decisions.save_steps):
                    self.save(required=state.step == total)
                if state.step >= total:
                    break
                with contextlib.suppress(Stopped):
                    self.train_step()
        self.finish()

    def train_step(self) -> None:
        """One update: a rollout, and all that is learned from it."""
        state, config = self.state, self.config
        began = time.perf_counter()
        rate = self.learning_rate()
        experience, draw = self.collect(
            self.draw, config.per_device_train_batch_size, values=self.actors.critic is None
        )
        controller = self.kl_controller
        update = learn(
            config,
            self.actors,
            self.ptx,
            experience,
            kl_coef=controller.kl_coef,
            step=state.step,
            cursor=state.cursor,
            pack_length=self.setup.pack_length,
            rate=rate,
            critic_rate=rate * (config.critic_learning_rate or config.learning_rate) / config.learning_rate,
        )
        state.cursor = update.cursor
        state.extra["kl_coef"] = controller.updated(update.metrics["objective/kl"], len(experience)).kl_coef
        self.count_update(update.loss, update.infos, experience, draw, began, update.metrics)

    @property
    def kl_controller(self) -> KLController:
        """Holds the coefficient of the KL as it is now."""
        config = self.config
        kl_coef = float(self.state.extra.get("kl_coef", config.kl_coef))
        if config.kl_target is None:
            return FixedKLController(kl_coef)
        return AdaptiveKLController(kl_coef=kl_coef, target=config.kl_target, horizon=config.kl_horizon)

    @property
    def kl_weight(self) -> float:
        """The coefficient that the run began with."""
        return self.config.kl_coef

    def measures(self, experience: Experience) -> dict[str, float]:
        """Also how likely held-out pretraining text is, where the run mixes such text in."""
        measures = super().measures(experience)
        return measures if self.ptx is None else measures | {"ptx_bpb": self.ptx.bits_per_byte(self.model)}


_PHASE = SamplingPhase(kind="ppo", config=PPOConfig, prepare=_prepare, decide=_decide, trainer=_Run)

resume = _PHASE.resume
