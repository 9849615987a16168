"""Group methods (Shao et al. 2024 and its relatives): several answers to each prompt, rewarded and compared. The whole loop is
:meth:`_Run.loop` and the methods below it.

One update: the policy gives ``num_generations`` answers to each of some prompts; each answer is scored; what it is worth is its score
beside those of its group; one or a few passes raise the likelihood of the better answers and lower that of the others, as far as the
clipped ratio lets them. No critic is trained. How the methods differ is in ``configs/grpo.py``; advantages are in ``groups.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ingot.configs import GRPOConfig
from ingot.data.batches import Order, mix
from ingot.losses.kl import kl_loss
from ingot.losses.numerics import Float32, Float64, Floats, Metrics, f64
from ingot.losses.packed import add_metrics, mean_weights, sequence_ids
from ingot.losses.policy import entropy_bonus, grpo_loss, reinforce_loss, rloo_loss
from ingot.models.base import FloatArray, IntArray, LongArray, Model, StepInfo
from ingot.training.alarms import above
from ingot.training.callbacks import Callback
from ingot.training.cost import Cost, Probe
from ingot.training.decisions import Decisions, announce, decide
from ingot.training.experience import Draw, Experience, gather
from ingot.training.groups import Lesson, make_lesson, punish_length, right_and_wrong, signal
from ingot.training.lora import load_trained_state, trained_state
from ingot.training.online import OnlineTrainer
from ingot.training.policy_alarms import group_rule, policy_rules
from ingot.training.progress import Display
from ingot.training.prompts import Rows
from ingot.training.rewards import RewardFunction
from ingot.training.rollouts import Rollouts, packs
from ingot.training.runs import RunFolder
from ingot.training.sampling_phase import SamplingPhase
from ingot.training.scores import TokenScorer
from ingot.training.setup import Given, Setup, prepare
from ingot.training.state import State
from ingot.training.trainer import Stopped, TrainingResult, make_optimizer

_DEFAULT_UPDATES = 200
_MINIBATCH_STREAM = 3


def grpo(
    config: GRPOConfig,
    prompts: Rows = None,
    rewards: Sequence[RewardFunction | TokenScorer] = (),
    gold: RewardFunction | None = None,
    callbacks: Sequence[Callback] = (),
    *,
    dry_run: bool = False,
    quiet: bool = False,
) -> TrainingResult:
    """Train a model to give answers that are rewarded more, by comparing its answers to each prompt, in a new run folder.

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


def _decide(
    config: GRPOConfig, setup: Setup, known: dict[str, Any], done: int, display: Display
) -> tuple[Decisions, Cost]:
    """Time an update on the run's first prompts, settle what is open, and say it. The weights are put back."""
    policy, size, method = setup.policy, config.per_device_train_batch_size, config.method
    before = trained_state(policy)
    policy.optimizer = make_optimizer(config, policy)
    began = time.perf_counter()
    experience = gather(
        setup,
        setup.prompts.take(0, config.num_prompts),
        policy=policy,
        num_generations=config.num_generations,
        first_episode=0,
        seed=config.seed,
        progress=lambda step, total: display.work("timing an update", step, total),
    )
    sampling_s = time.perf_counter() - began
    lesson, _ = make_lesson(config, punish_length(config, experience))
    learn(config, policy, lesson, step=0, pack_length=setup.pack_length)
    step_s = time.perf_counter() - began
    load_trained_state(policy, before)
    probe = Probe(
        step_s=step_s,
        step_tokens=int(experience.rollouts.num_actions.sum()),
        evaluation_batch_s=sampling_s if setup.prompts.held_out else 0.0,
        evaluation_batches=-(-len(setup.prompts.held_out) // size),
    )
    epoch = len(setup.prompts.train) / config.num_prompts
    updates = _DEFAULT_UPDATES if config.total_episodes is None else -(-config.total_episodes // size)
    decisions, cost = decide(
        config, policy, probe, known, steps_per_epoch=epoch, default_steps=updates, held=setup.held
    )
    facts = setup.facts
    display.say(
        f"method    {config.loss_type}: advantages by {method.advantage_estimator}, "
        + (
            f"KL in the {method.kl_penalty} ({method.kl_estimator}) with beta {method.beta:g}"
            if method.beta
            else "no KL"
        )
        + ("" if config.zero_std_groups == "keep" else f", groups without signal: {config.zero_std_groups}")
    )
    announce(
        config,
        policy,
        probe,
        decisions,
        cost,
        done,
        display,
        kind="prompts",
        data=f"{facts['num_train']:,} to learn from; {facts['split']}",
        shape=f"{config.num_prompts} prompts with {config.num_generations} answers of up to {config.max_completion_length}, "
        f"{config.num_iterations * config.num_mini_batches} steps of the optimizer",
        passes=(decisions.max_steps - done) / epoch,
    )
    return decisions, cost


@dataclasses.dataclass(frozen=True)
class Update:
    """What an update did."""

    loss: float
    """Mean over its steps; 0 where there was nothing to learn."""
    infos: tuple[StepInfo, ...]
    """Of its steps."""
    metrics: Metrics


def learn(
    config: GRPOConfig, model: Model, lesson: Lesson, *, step: int, pack_length: int, rate: float = 0.0
) -> Update:
    """One update of the policy on the answers of one rollout.

    Parameters
    ----------
    step
        Number of the update: its minibatches are a function of it.
    pack_length
        Most tokens of a pass.
    rate
        Learning rate.
    """
    experience, rollouts = lesson.experience, lesson.experience.rollouts
    steps: list[Metrics] = []
    infos: list[StepInfo] = []
    for iteration in range(config.num_iterations if len(lesson) else 0):
        order = Order(len(rollouts), mix(config.seed, _MINIBATCH_STREAM, step), iteration)
        shuffled = np.array([order[index] for index in range(len(rollouts))])
        for part in np.array_split(shuffled, config.num_mini_batches):
            numbers = part[~rollouts.truncated[part]] if config.mask_truncated_completions else part
            if not len(numbers):
                continue
            rows = rollouts.rows_of(numbers)
            batch = _Minibatch(
                rollouts.select(numbers),
                experience.logprobs[rows],
                experience.ref_logprobs[rows],
                lesson.advantages_of(numbers, rows),
                num_sequences=len(part),
            )
            model.zero_grad()
            steps.append(_backward(config, model, batch, pack_length))
            infos.append(model.step(rate, clip_norm=config.max_grad_norm or None))
    metrics: Metrics = {"val/num_steps": float(len(steps))}
    if not steps:
        return Update(0.0, (), metrics)
    for name in steps[0]:
        column = [found[name] for found in steps]
        merge = max if name.endswith("_max") else min if name.endswith("_min") else np.mean
        metrics[name] = float(merge(column))
    metrics["val/ratio_first"] = steps[0]["val/ratio_far_max"]
    metrics["val/ratio_var"] = float(np.var([found["val/ratio"] for found in steps]))
    return Update(metrics["loss"], tuple(infos), metrics)


@dataclasses.dataclass(frozen=True, eq=False)
class _Minibatch:
    """Some answers of a rollout, and what was known of them before the update. S answers, N tokens."""

    rollouts: Rollouts
    logprobs: FloatArray
    """f32 [N]"""
    ref_logprobs: FloatArray
    """f32 [N]"""
    advantages: Float64
    """f64 [S] or [N]"""
    num_sequences: int
    """That means go over: those of which nothing is learned count too."""


def _backward(config: GRPOConfig, model: Model, batch: _Minibatch, pack_length: int) -> Metrics:
    """Add up the gradients of one minibatch; its metrics, ``loss`` among them."""
    rollouts = batch.rollouts
    num_tokens = float(np.count_nonzero(rollouts.mask))
    by_token = len(batch.advantages) != len(rollouts)
    parts: list[Metrics] = []
    for episodes, rows in packs(rollouts, pack_length):
        targets = rollouts.targets[rows]
        offsets = rollouts.offsets[episodes.start : episodes.stop + 1] - rollouts.offsets[episodes.start]
        ctx, out = model.forward(
            rollouts.tokens[rows],
            offsets,
            targets,
            want=("logprobs", "entropy") if config.entropy_coef else ("logprobs",),
            temperature=rollouts.temperature,
            banned_ids=rollouts.banned_ids,
        )
        assert ctx is not None
        loss, d_logprobs, metrics = _loss(
            config,
            out.logprobs,
            batch.logprobs[rows],
            batch.ref_logprobs[rows],
            batch.advantages[rows if by_token else episodes],
            targets,
            offsets,
            num_sequences=batch.num_sequences,
            num_tokens=num_tokens,
        )
        metrics |= _moved(out.logprobs, batch.logprobs[rows], targets, num_tokens)
        d_entropy = None
        if config.entropy_coef:
            bonus, d_entropy, found = entropy_bonus(
                out.entropy, targets, num_tokens=num_tokens, ent_coef=config.entropy_coef
            )
            loss += bonus
            metrics |= {"policy/entropy_avg": found["policy/entropy_avg"]}
        model.backward(ctx, d_logprobs=d_logprobs, d_entropy=d_entropy)
        parts.append({**metrics, "loss": loss})
    return add_metrics(parts)


def _loss(
    config: GRPOConfig,
    logprobs: FloatArray,
    old_logprobs: FloatArray,
    ref_logprobs: FloatArray,
    advantages: Float64,
    targets: IntArray,
    offsets: LongArray,
    *,
    num_sequences: int,
    num_tokens: float,
) -> tuple[float, Float32, Metrics]:
    """The method's loss of a part of a step, its gradient, and metrics."""
    method = config.method
    beta = method.beta if method.kl_penalty == "loss" else 0.0
    if config.loss_type not in ("rloo", "reinforce"):
        kind = {
            "gspo": "grpo",
            "reinforce_plus_plus": "bnpo",
            "reinforce_plus_plus_baseline": "bnpo",
        }.get(config.loss_type, config.loss_type)
        loss, d_logprobs, metrics = grpo_loss(
            logprobs,
            old_logprobs,
            advantages,
            targets,
            offsets,
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            max_completion_length=config.max_completion_length if kind == "dr_grpo" else None,
            loss_type=kind,
            importance_sampling_level=method.importance_sampling_level,
            epsilon=method.epsilon,
            epsilon_high=method.epsilon_high,
            delta=config.delta,
            beta=beta,
            ref_logprobs=ref_logprobs if beta else None,
            kl_estimator=method.kl_estimator,
        )
        metrics.pop("kl", None)  # of the whole rollout it is known
        return loss, d_logprobs, metrics
    if config.loss_type == "rloo":
        loss, d_logprobs, metrics = rloo_loss(
            logprobs,
            old_logprobs,
            advantages,
            targets,
            offsets,
            num_sequences=num_sequences,
            epsilon=method.epsilon,
            epsilon_high=method.epsilon_high,
        )
        weights = mean_weights(targets >= 0, offsets, reduction="sum") / num_sequences
    else:
        weights = mean_weights(targets >= 0, offsets, reduction="token_mean", total=num_tokens)
        spread = advantages if len(advantages) == len(targets) else advantages[sequence_ids(offsets)]
        loss, d_logprobs, metrics = reinforce_loss(logprobs, spread, targets, weights)
    if beta:
        penalty, d_kl, _ = kl_loss(
            logprobs, ref_logprobs, targets, weights, beta=beta, kl_estimator=method.kl_estimator
        )
        loss, d_logprobs = loss + penalty, d_logprobs + d_kl
    return loss, d_logprobs, metrics


def _moved(logprobs: Floats, old_logprobs: Floats, targets: IntArray, num_tokens: float) -> Metrics:
    """How far the policy is from the one that sampled: means over the tokens of the step."""
    log_ratio = (f64(logprobs) - f64(old_logprobs))[targets >= 0]
    log_ratio = log_ratio[np.isfinite(log_ratio)]
    far = np.expm1(np.clip(log_ratio, -20, 20))
    return {
        "policy/approxkl_avg": float((log_ratio**2).sum() / 2 / num_tokens),
        "val/ratio": float((1 + far).sum() / num_tokens),
        "val/ratio_max": float(1 + far.max(initial=-1)),
        "val/ratio_far_max": float(np.abs(far).max(initial=0.0)),
    }


class _Run(OnlineTrainer[GRPOConfig]):
    """The loop and its parts."""

    def __init__(
        self,
        folder: RunFolder,
        config: GRPOConfig,
        setup: Setup,
        state: State,
        decisions: Decisions,
        cost: Cost,
        display: Display,
        callbacks: Sequence[Callback],
    ) -> None:
        scorers = setup.scorers
        watched = [name for name, there in (("judge", scorers.has_judge), ("gold", scorers.has_gold)) if there]
        cause = "learning rate, num_iterations or num_mini_batches too high"
        rules = [
            *policy_rules(kl_target=None, watched=watched),
            *([] if config.method.advantage_estimator == "reinforce_plus_plus" else [group_rule()]),
            above("clipping", "clip_ratio/region_mean", 0.5, cause),
            above("clipping", "cispo_clip_ratio", 0.5, cause),
        ]
        super().__init__(folder, config, setup, state, decisions, cost, display, callbacks, rules=rules)

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
        config = self.config
        began = time.perf_counter()
        rate = self.learning_rate()
        experience, draw = self.collect_groups()
        lesson, metrics = make_lesson(config, experience)
        update = learn(config, self.model, lesson, step=self.state.step, pack_length=self.setup.pack_length, rate=rate)
        metrics |= {**right_and_wrong(config, experience), **update.metrics}
        self.count_update(update.loss, update.infos, experience, draw, began, metrics)

    def collect_groups(self) -> tuple[Experience, Draw]:
        """A rollout of an update's prompts; with ``resample`` of as many more as it takes until enough groups have a signal."""
        config = self.config
        draw, count, kept = self.draw, config.num_prompts, 0
        parts: list[Experience] = []
        drawn = 0
        while True:
            part, draw = self.collect(draw, count, config.num_generations)
            parts.append(punish_length(config, part))
            drawn += count
            kept += int(np.count_nonzero(signal(config, parts[-1]))) // config.num_generations
            missing = config.num_prompts - kept
            if config.zero_std_groups != "resample" or missing <= 0 or len(parts) > config.max_resamples:
                return (parts[0] if len(parts) == 1 else Experience.join(parts)), draw
            # As many as are needed where as many have a signal as so far.
            count = min(config.num_prompts, -(-missing * drawn // kept)) if kept else config.num_prompts

    def answer_held_out(self) -> Experience:
        """Scored as in training."""
        return punish_length(self.config, super().answer_held_out())

    def measures(self, experience: Experience) -> dict[str, float]:
        """Also the mean of each reward, where there are several."""
        each = experience.scores.each
        means = {
            f"rewards/{name}/mean": float(np.nanmean(values)) if np.isfinite(values).any() else 0.0
            for name, values in each.items()
        }
        return super().measures(experience) | (means if len(each) > 1 else {})

    @property
    def kl_weight(self) -> float:
        """``beta``."""
        return self.config.method.beta


_PHASE = SamplingPhase(kind="grpo", config=GRPOConfig, prepare=prepare, decide=_decide, trainer=_Run)

resume = _PHASE.resume
