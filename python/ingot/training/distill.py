"""Distillation: a student learns from a teacher's probabilities, on its own answers or on the teacher's. The loop is :meth:`_Run.loop`.

On-policy, the student answers and A_t = ln teacher(a_t) - ln student(a_t) is the advantage of each of its tokens (Agarwal et al. 2024):
that lowers KL(student || teacher) where the student goes. Otherwise the teacher answers and the student is fine-tuned on it (Kim and
Rush 2016): that lowers KL(teacher || student). With ``beta`` the two models' whole distributions are compared at each token of either's
answers. What a step draws is a function of (seed, step) and the weights, so a run that was
killed draws the same again and ends with the same bits.

Shape legend: S answers, N tokens with their prompts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ingot.configs import DistillConfig
from ingot.data.batches import mix
from ingot.data.keys import uniform
from ingot.inference.intervals import Z_95, mean_of
from ingot.losses.distillation import generalized_jsd_loss, reverse_kl_advantages
from ingot.losses.numerics import Float64, Floats, Metrics, f64
from ingot.losses.packed import add_metrics, sum_by_sequence
from ingot.losses.policy import reinforce_loss
from ingot.models.base import IntArray, Sampling
from ingot.training.alarms import Rule, below_share_of_start, drifted
from ingot.training.callbacks import Callback
from ingot.training.cost import Cost
from ingot.training.decisions import Decisions, announce, decide
from ingot.training.demonstrations import Rows
from ingot.training.phases import RowsPhase
from ingot.training.progress import Display
from ingot.training.rollouts import (
    Progress,
    Rollouts,
    as_read_by,
    banned_ids_of,
    packs,
    recompute_logprobs,
    sample_rollouts,
)
from ingot.training.runs import RunFolder
from ingot.training.state import State
from ingot.training.teaching import Lessons, held, make_student, prepare_lessons, student_shape
from ingot.training.trainer import Stopped, Trainer, TrainingResult, measure
from ingot.training.verdicts import Verdict

if TYPE_CHECKING:
    from ingot.models.base import Model as ModelProtocol

_DEFAULT_EPOCHS = 1
_HELD_OUT_STREAM, _TEACHER_STREAM = 11, 12
MAX_EOS_FALL = 0.1
"""A run passes if the share of answers that the student ends by itself fell by no more than this."""


def distill(
    config: DistillConfig,
    data: Rows = None,
    callbacks: Sequence[Callback] = (),
    *,
    dry_run: bool = False,
    force: bool = False,
    quiet: bool = False,
) -> TrainingResult:
    """Let a student learn from a teacher, in a new run folder.

    Parameters
    ----------
    data
        Rows with a prompt, as dictionaries, instead of the files ``config.data``.
    dry_run
        Print the cost and stop: the result holds the untrained network and no history, and no folder is made.
    force
        Go on from a student or with a teacher whose own run did not pass its gate.
    quiet
        Print nothing.

    Raises
    ------
    IngotError
        One line that says what is wrong with settings, models, prompts, folder or loss, and what to do.
    KeyboardInterrupt
        Ctrl-C, after saving.
    """
    return _PHASE.start(config, data, callbacks, dry_run=dry_run, quiet=quiet, force=force)


def _decide(
    config: DistillConfig,
    lessons: Lessons,
    student: ModelProtocol,
    known: dict[str, Any],
    done: int,
    display: Display,
) -> tuple[Decisions, Cost]:
    """Time the run's first step, settle what is open, and say it."""
    tokens: list[int] = []

    def step() -> None:
        _, rollouts = _learn(config, lessons, student, 0)
        tokens.append(len(rollouts.tokens))
        student.step(0.0, clip_norm=config.max_grad_norm or None)

    sample = lessons.held_out[: config.per_device_train_batch_size]

    def evaluate() -> None:
        said = _answers(config, lessons, student, sample, config.seed)
        said = _read_by(lessons.teacher, lessons, said)
        recompute_logprobs(lessons.teacher, said, max_tokens=lessons.pack_length)

    batches = -(-len(lessons.held_out) // config.per_device_train_batch_size)
    probe = measure(config, student, step, 1, evaluate if sample else None, batches)
    probe = dataclasses.replace(probe, step_tokens=max(1, tokens[0]))
    epoch = -(-len(lessons.prompts.train) // config.per_device_train_batch_size)
    decisions, cost = decide(
        config,
        student,
        probe,
        known,
        steps_per_epoch=epoch,
        default_steps=_DEFAULT_EPOCHS * epoch,
        held=held(config, lessons, student.config),
    )
    announce(
        config,
        student,
        probe,
        decisions,
        cost,
        done,
        display,
        kind="prompts",
        data=f"{len(lessons.prompts.train):,} prompts; {lessons.facts['split']}; "
        f"teacher {config.teacher} of {lessons.teacher.num_parameters:,} parameters",
        shape=f"{config.per_device_train_batch_size} answers",
        passes=(decisions.max_steps - done) / epoch,
    )
    return decisions, cost


# ---- a step


def _learn(
    config: DistillConfig,
    lessons: Lessons,
    student: ModelProtocol,
    step: int,
    progress: Progress | None = None,
) -> tuple[Metrics, Rollouts]:
    """Draw the step's answers and add up the student's gradients: metrics of the whole step, ``loss`` among them, and the answers."""
    on_policy = uniform("lmbda", config.seed, step) < config.lmbda
    count = config.per_device_train_batch_size
    rollouts = _answers(
        config,
        lessons,
        student if on_policy else lessons.teacher,
        lessons.take(step, count),
        config.seed,
        first_episode=step * count,
        progress=progress,
    )
    student.zero_grad()
    found = (
        _compare(config, lessons, student, rollouts)
        if config.beta is not None
        else _follow(config, lessons, student, rollouts, on_policy=on_policy)
    )
    found["on_policy"] = float(on_policy)
    drawn = rollouts.metrics()
    found |= {name: drawn[name] for name in ("completions/mean_length", "completions/clipped_ratio", "entropy")}
    return found, rollouts


def _follow(
    config: DistillConfig,
    lessons: Lessons,
    student: ModelProtocol,
    rollouts: Rollouts,
    *,
    on_policy: bool,
) -> Metrics:
    """Gradients from the answers' own tokens."""
    weights = rollouts.mask / np.count_nonzero(rollouts.mask)
    scored = None
    if on_policy:
        read = _read_by(lessons.teacher, lessons, rollouts)
        scored = recompute_logprobs(lessons.teacher, read, max_tokens=lessons.pack_length)
    rollouts = _read_by(student, lessons, rollouts)
    parts = []
    for episodes, rows in packs(rollouts, lessons.pack_length):
        targets = rollouts.targets[rows]
        ctx, out = student.forward(
            rollouts.tokens[rows],
            rollouts.offsets[episodes.start : episodes.stop + 1] - rollouts.offsets[episodes.start],
            targets,
            temperature=rollouts.temperature,
            banned_ids=rollouts.banned_ids,
        )
        # The student's own answers by the teacher's opinion of them; the teacher's by likelihood, every token's advantage being 1.
        advantages = (
            np.ones(len(targets))
            if scored is None
            else reverse_kl_advantages(rollouts.logprobs[rows], scored[rows], targets)
        )
        _, d_logprobs, metrics = reinforce_loss(out.logprobs, advantages, targets, weights[rows])
        assert ctx is not None
        student.backward(ctx, d_logprobs=d_logprobs)
        nll = -float(f64(out.logprobs) @ weights[rows])
        distance = 0.0 if scored is None else float(f64(rollouts.logprobs[rows] - scored[rows]) @ weights[rows])
        parts.append({"num_dropped": metrics["num_dropped"], "nll": nll, "distance": distance})
    found = add_metrics(parts)
    by_token = found.pop("nll"), found.pop("distance")
    # What is lowered: KL(student || teacher) by token, or the teacher's words' cross-entropy.
    found["loss"] = by_token[1] if on_policy else by_token[0]
    if on_policy:
        found["kl"] = by_token[1] * np.count_nonzero(rollouts.mask) / len(rollouts)
    return found


_COMPARED = 1 << 22
"""Pairs of probabilities that are held at a time, about; an answer's are always together."""


def _compare(config: DistillConfig, lessons: Lessons, student: ModelProtocol, rollouts: Rollouts) -> Metrics:
    """Gradients from the two whole distributions at each token of the answers."""
    assert config.beta is not None
    weights = rollouts.mask / np.count_nonzero(rollouts.mask)
    models = lessons.teacher, student
    banned = [_read_by(model, lessons, rollouts).banned_ids for model in models]
    # All that may follow: the same ids for both.
    ids = np.setdiff1d(np.arange(lessons.encoder.tokenizer.vocab_size, dtype=np.int32), banned[1])
    parts = []
    for episodes, rows in packs(rollouts, min(lessons.pack_length, max(1, _COMPARED // len(ids)))):
        mask = rollouts.mask[rows]
        offsets = rollouts.offsets[episodes.start : episodes.stop + 1] - rollouts.offsets[episodes.start]
        candidates = np.concatenate([[0], np.cumsum(mask * len(ids))]), np.tile(ids, int(np.count_nonzero(mask)))
        (_, taught), (ctx, said) = (
            model.forward(
                rollouts.tokens[rows],
                offsets,
                rollouts.targets[rows],
                want=("candidate_logprobs",),
                candidates=candidates,
                temperature=rollouts.temperature,
                banned_ids=never,
                train=model is student,
            )
            for model, never in zip(models, banned, strict=True)
        )
        _, d_candidates, metrics = generalized_jsd_loss(
            said.candidate_logprobs, taught.candidate_logprobs, candidates[0], weights[rows], beta=config.beta
        )
        assert ctx is not None
        student.backward(ctx, d_candidates=d_candidates)
        parts.append(metrics)
    return add_metrics(parts)


def _read_by(model: ModelProtocol, lessons: Lessons, rollouts: Rollouts) -> Rollouts:
    return as_read_by(model, rollouts, lessons.encoder.tokenizer, lessons.encoder.end_ids)


def _answers(
    config: DistillConfig,
    lessons: Lessons,
    model: ModelProtocol,
    asked: Sequence[IntArray],
    seed: int,
    *,
    first_episode: int = 0,
    progress: Progress | None = None,
) -> Rollouts:
    tokenizer = lessons.encoder.tokenizer
    return sample_rollouts(
        model,
        asked,
        max_new_tokens=config.max_new_tokens,
        end_ids=lessons.encoder.end_ids,
        seed=seed,
        episode_ids=np.arange(first_episode, first_episode + len(asked), dtype=np.int64),
        sampling=Sampling(temperature=config.temperature),
        banned_ids=banned_ids_of(tokenizer, model.config.vocab_size, lessons.encoder.end_ids),
        progress=progress,
    )


def _distances(first: Floats, second: Floats, rollouts: Rollouts) -> Float64:
    """Of each answer sum ln first - ln second, nats, f64 [S]: their mean is the KL."""
    return sum_by_sequence(f64(first) - f64(second), rollouts.targets, rollouts.offsets)


# ---- the run


class _Run(Trainer[DistillConfig]):
    """The loop and its parts."""

    def __init__(
        self,
        folder: RunFolder,
        config: DistillConfig,
        lessons: Lessons,
        student: ModelProtocol,
        state: State,
        decisions: Decisions,
        cost: Cost,
        display: Display,
        callbacks: Sequence[Callback],
    ) -> None:
        super().__init__(
            folder,
            config,
            student,
            lessons.encoder.tokenizer,
            state,
            decisions,
            cost,
            display,
            callbacks,
            max_length=lessons.prompts.longest + config.max_new_tokens,
            encoder=lessons.encoder,
            rules=_rules(),
        )
        self.lessons = lessons
        self.teacher = lessons.teacher
        # The same ones each time; what the teacher says to them is drawn once.
        limit = decisions.eval_batches
        self.held_out = lessons.held_out[: None if limit is None else limit * config.per_device_train_batch_size]
        self.taught: Rollouts | None = None

    def loop(self) -> None:
        """From the state's step to the last one."""
        state, total = self.state, self.decisions.max_steps
        self.notify(lambda callback, view: callback.on_start(view))
        self.display.start(state.step, total)
        with self.stop:
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
                # A step that was given up has changed nothing: it is drawn again when the run goes on.
                with contextlib.suppress(Stopped):
                    self.train_step()
        self.finish()

    def train_step(self) -> None:
        """Answers to the next prompts, and one step of the optimizer on them."""
        state, config = self.state, self.config
        began = time.perf_counter()
        rate = self.learning_rate()
        metrics, rollouts = _learn(config, self.lessons, self.model, state.step, self.alive)
        info = self.model.step(rate, clip_norm=config.max_grad_norm or None)
        self.count(metrics["loss"], info, len(rollouts.tokens), began)
        if self.due(config.logging_steps):
            epoch = state.step * config.per_device_train_batch_size / len(self.lessons.prompts.train)
            shown = {name: value for name, value in metrics.items() if name != "loss"}
            shown["time/episodes_per_s"] = len(rollouts) / (time.perf_counter() - began)
            self.log(epoch, info.grad_norm, rate, **shown)

    def evaluate(self) -> None:
        """How far student and teacher are apart on held-out prompts, each on its own answers; the best weights so far are kept."""
        state, config = self.state, self.config
        if not self.held_out:
            state.evaluated_step = state.step
            return
        began = time.perf_counter()
        try:
            said = self.answer(self.model, _HELD_OUT_STREAM)
            self.taught = self.taught or self.answer(self.teacher, _TEACHER_STREAM)
        except Stopped:
            return
        taught = self.taught
        read = _read_by(self.teacher, self.lessons, said), _read_by(self.model, self.lessons, taught)
        each = _distances(said.logprobs, recompute_logprobs(self.teacher, read[0]), said)
        reverse = mean_of(each)
        forward = mean_of(_distances(taught.logprobs, recompute_logprobs(self.model, read[1]), taught))
        drawn, wanted = said.metrics(), taught.metrics()
        metrics: dict[str, Any] = {
            "step": state.step,
            "tokens": state.tokens,
            "eval_loss": (reverse if config.lmbda >= 0.5 else forward).value,
            "eval_reverse_kl": reverse.value,
            "eval_reverse_kl_error": reverse.error,
            "eval_forward_kl": forward.value,
            "eval_forward_kl_error": forward.error,
            "eval_eos_rate": 1.0 - drawn["completions/clipped_ratio"],
            "eval_teacher_eos_rate": 1.0 - wanted["completions/clipped_ratio"],
            "eval_completions/mean_length": drawn["completions/mean_length"],
            "eval_teacher_mean_length": wanted["completions/mean_length"],
            "eval_sample_entropy": drawn["entropy"],
            "time/evaluation_s": time.perf_counter() - began,
        }
        self.pace.evaluation_took(metrics["time/evaluation_s"])
        for number in range(min(config.sample_prompts if config.sample_tokens else 0, len(said))):
            texts = [
                self.tokenizer.decode(rollouts.completion_ids(number)[: config.sample_tokens].tolist())
                for rollouts in (said, taught)
            ]
            prompt = self.tokenizer.decode(self.held_out[number].tolist())
            ended = not bool(said.truncated[number])
            self.record_sample(
                prompt=prompt, completion=texts[0], teacher=texts[1], ended=ended, kl=float(each[number])
            )
            if number == 0:
                self.show_sample(prompt + texts[0])
        self.display.say(
            f"step {state.step}  KL student to teacher {reverse.value:.3f}  teacher to student {forward.value:.3f}  "
            f"answers ended {100 * metrics['eval_eos_rate']:.0f} %"
        )
        self.measured(metrics["eval_loss"], metrics)
        state.evaluated_step = state.step
        self.notify(lambda callback, view: callback.on_evaluate(view, metrics))

    def answer(self, model: ModelProtocol, stream: int) -> Rollouts:
        """Answers to the held-out prompts."""
        seed = mix(self.config.seed, stream)
        return _answers(self.config, self.lessons, model, self.held_out, seed, progress=self.alive)

    def verdict(self) -> Verdict:
        """Of the weights that the folder holds."""
        name = "reverse_kl" if self.config.lmbda >= 0.5 else "forward_kl"
        return verdict_of(self.folder.metrics.read(), self.state.best_step, name)


def _rules() -> tuple[Rule, ...]:
    return (
        below_share_of_start(
            "entropy collapse",
            "eval_sample_entropy",
            0.2,
            "the student writes the same answers again and again; lower --learning-rate, or --lmbda, so that it also learns the teacher's",
        ),
        drifted(
            "length drift",
            "eval_completions/mean_length",
            0.5,
            "answers became much longer or shorter; compare with eval_teacher_mean_length: is it what the teacher does?",
        ),
    )


def verdict_of(history: Sequence[dict[str, Any]], best_step: int | None, name: str) -> Verdict:
    """Whether the weights that the run keeps are nearer to the teacher than those that it began with, from its metrics.jsonl.

    It passes where the KL ``name`` (``reverse_kl`` or ``forward_kl``) on held-out prompts fell by more than chance (95 %, as if the two
    measurements had nothing in common), and the share of answers that end fell by at most :data:`MAX_EOS_FALL`.
    """
    lines = [line for line in history if line.get(f"eval_{name}") is not None]
    if not lines:
        return Verdict(
            passed=False,
            sentences=("Nothing was held out, so nothing is known of how near it came to its teacher.",),
            figures={},
            advice="Train it again with --held-out 0.1.",
        )
    kept = [line for line in lines if line["step"] == best_step] or lines
    start, end = lines[0], kept[-1]
    errors = start[f"eval_{name}_error"], end[f"eval_{name}_error"]
    fall = start[f"eval_{name}"] - end[f"eval_{name}"]
    margin = math.inf if None in errors else Z_95 * math.hypot(*errors)
    ends = end["eval_eos_rate"] >= start["eval_eos_rate"] - MAX_EOS_FALL
    sentences = (
        f"On held-out prompts the student's answers are {end['eval_reverse_kl']:.3f} nats from the teacher ({start['eval_reverse_kl']:.3f} "
        f"before), the teacher's {end['eval_forward_kl']:.3f} nats from the student ({start['eval_forward_kl']:.3f} before).",
        f"It ends {100 * end['eval_eos_rate']:.1f} % of its answers ({100 * start['eval_eos_rate']:.1f} % before, the teacher "
        f"{100 * end['eval_teacher_eos_rate']:.1f} %), after {end['eval_completions/mean_length']:.1f} tokens "
        f"({start['eval_completions/mean_length']:.1f} before, the teacher {end['eval_teacher_mean_length']:.1f}).",
    )
    advice = []
    if fall <= margin:
        advice.append(
            f"It is not shown to be nearer to the teacher (change {-fall:+.3f} ± {margin:.3f}): train longer, with a higher --learning-rate, "
            "or with more prompts held out."
        )
    if not ends:
        advice.append("Answers no longer end: raise --max-new-tokens, or take a smaller --lmbda.")
    figures: dict[str, float | int | str | None] = {
        "step": end["step"],
        "fall": fall,
        "margin": margin if math.isfinite(margin) else None,
    }
    for key in ("reverse_kl", "forward_kl", "eos_rate", "completions/mean_length"):
        figures |= {f"{key}_before": start[f"eval_{key}"], f"{key}_after": end[f"eval_{key}"]}
    return Verdict(passed=fall > margin and ends, sentences=sentences, figures=figures, advice=" ".join(advice))


_PHASE = RowsPhase(
    kind="distill",
    config=DistillConfig,
    shape=student_shape,
    prepare=prepare_lessons,
    make_model=make_student,
    decide=_decide,
    trainer=_Run,
    builds_on=lambda config: (config.model, config.teacher),
)

resume = _PHASE.resume
