"""Direct preference optimisation and its relatives: preferences in, a model that favours the better answers out, without a reward model.

The whole loop is :meth:`_Run.loop` and the methods below it. Log-probabilities under the reference are computed once, before training;
of the training rows as they come where the reference follows the policy.
A run is a function of its settings, its models and its rows: killed at any moment and resumed, it ends with the same bits.

Shape legend: S sequences (answers with their prompts) of a step or of one pack, B pairs, U verdicts.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ingot.configs import DPOConfig, ModelConfig
from ingot.data.examples import Pack, assemble_pack, best_fit_decreasing
from ingot.data.keys import prompt_key
from ingot.data.rows import Row, UnpairedPreference
from ingot.environment import memory_limit
from ingot.errors import ConfigError
from ingot.losses.numerics import Float64, Ints, Metrics, f64
from ingot.losses.packed import add_metrics, count_by_sequence, spread, sum_by_sequence
from ingot.losses.preference import (
    Pairs,
    bco_reference_point,
    cpo_loss,
    kto_loss,
    kto_reference_point,
    mixed_dpo_loss,
    orpo_loss,
)
from ingot.models import Model, load_model
from ingot.models.growth import grow_vocabulary
from ingot.models.hf import open_folder
from ingot.models.reference import reference_of
from ingot.tokenizer import Tokenizer
from ingot.training.callbacks import Callback
from ingot.training.cost import Cost
from ingot.training.decisions import Decisions, announce, decide
from ingot.training.demonstrations import Rows
from ingot.training.memory import Held, learner, require_memory
from ingot.training.phases import RowsPhase
from ingot.training.preference_checks import pair_accuracy, rules, separation, verdict_of
from ingot.training.preferences import (
    Comparisons,
    Preferences,
    Verdicts,
    comparisons_of,
    prepare_preferences,
    verdicts_of,
)
from ingot.training.progress import Display, duration
from ingot.training.reference_logprobs import ReferenceLogprobs, reference_logprobs, sequence_logprobs
from ingot.training.rollouts import as_read_by, banned_ids_of, recompute_logprobs, sample_rollouts
from ingot.training.runs import RunFolder
from ingot.training.state import State
from ingot.training.synced_reference import SyncedReference
from ingot.training.trainer import Trainer, TrainingResult, measure
from ingot.training.verdicts import Verdict

if TYPE_CHECKING:
    from ingot.models.base import Context
    from ingot.models.base import Model as ModelProtocol

_DEFAULT_EPOCHS = 1


def dpo(
    config: DPOConfig,
    data: Rows = None,
    callbacks: Sequence[Callback] = (),
    *,
    dry_run: bool = False,
    force: bool = False,
    quiet: bool = False,
) -> TrainingResult:
    """Train a model on preferences, in a new run folder.

    Parameters
    ----------
    data
        Rows to learn from, as dictionaries, instead of the files ``config.data``.
    dry_run
        Print the cost and stop: the result holds the untrained network and no history, and no folder is made.
    force
        Go on from a model whose own run did not pass its gate.
    quiet
        Print nothing.

    Raises
    ------
    IngotError
        One line that says what is wrong with settings, models, rows, folder or loss, and what to do.
    KeyboardInterrupt
        Ctrl-C, after saving.
    """
    return _PHASE.start(config, data, callbacks, dry_run=dry_run, quiet=quiet, force=force)


def _start_shape(config: DPOConfig) -> ModelConfig:
    """Of the model to start from, which must be one that writes, as the reference."""
    if not config.model:
        raise ConfigError("no model to start from: give --model with the folder of a fine-tuned one")
    shapes = []
    for folder in (config.model, config.reference_model):
        if folder is not None:
            saved = open_folder(folder)
            if saved.num_values:
                raise ConfigError(f"{folder}: is a model that scores, with scalar heads: give one that writes")
            shapes.append(saved.config)
    if config.sync_ref_model and len({dataclasses.replace(shape, dropout=0.0) for shape in shapes}) > 1:
        raise ConfigError(
            f"{config.reference_model}: is a network of another shape than {config.model}, so that the two cannot be mixed: leave sync_ref_model out"
        )
    return shapes[0]


def _make_model(config: DPOConfig, preferences: Preferences, known: ModelConfig | None) -> ModelProtocol:
    """The model to start from, without dropout; of shape ``known`` where weights are restored from a checkpoint.

    Raises
    ------
    ConfigError
        It has fewer ids than its tokenizer.
    RunError
        The run would not fit into memory.
    """
    if known is not None:
        return Model(known, seed=config.seed, **config.place)
    shape = _start_shape(config)
    require_memory(memory_limit(), *_held(config, preferences, shape))
    return _start(config, preferences, config.model)


def _held(
    config: DPOConfig, preferences: Preferences, shape: ModelConfig, *, resumed: bool = False
) -> tuple[Held, ...]:
    """What the run holds in memory: the policy, and the reference, which is another network where :func:`_make_reference` loads one."""
    limit = preferences.pack_length
    read = max(part.most_tokens(None, limit) for part in (preferences.train, preferences.held_out))
    batch = preferences.train.most_tokens(config.per_device_train_batch_size, limit)
    policy = learner(config, shape, batch, reference=True, read_tokens=read)
    if config.reference_model is None and not resumed:
        return (policy,)
    other = shape if config.reference_model is None else open_folder(config.reference_model).config
    policy = learner(config, shape, batch, read_tokens=read)
    return policy, Held(other, num_copies=2 if config.sync_ref_model else 1, read_tokens=read)


def _make_reference(
    config: DPOConfig, preferences: Preferences, model: ModelProtocol, *, resumed: bool
) -> ModelProtocol:
    """The model that the new one is compared with: as it was before training, or another. Forward passes only."""
    if config.reference_model is None and not resumed:
        return reference_of(model)
    return _start(config, preferences, config.reference_model or config.model)


def _start(config: DPOConfig, preferences: Preferences, folder: str) -> ModelProtocol:
    """The model in a folder without dropout, for policy and reference are compared as they are and not as random parts of them; with
    room for the template's tokens where it lacks them."""
    loaded = load_model(folder, dropout=0.0, **config.place)
    num_known, num_ids = Tokenizer.from_file(folder).vocab_size, preferences.encoder.tokenizer.vocab_size
    if num_known > loaded.config.vocab_size:
        raise ConfigError(
            f"{folder}: the tokenizer has {num_known} tokens but the model only {loaded.config.vocab_size}: they do not belong together"
        )
    shape = dataclasses.replace(loaded.config, vocab_size=max(loaded.config.vocab_size, num_ids))
    if loaded.config == shape and num_ids == num_known:
        return loaded
    model = Model(shape, seed=config.seed, **config.place)
    frozen = bool(config.lora_rank)
    state = grow_vocabulary(loaded.state(), num_known=num_known, num_ids=num_ids, seed=config.seed, frozen=frozen)
    model.load_state(state)
    return model


def _decide(
    config: DPOConfig,
    preferences: Preferences,
    model: ModelProtocol,
    known: dict[str, Any],
    done: int,
    display: Display,
) -> tuple[Decisions, Cost]:
    """Time the run's first batch, settle what is open, and say it."""
    packs = preferences.batches.take(0)
    sample = next(preferences.held_out_packs(config.seed, 1), None)
    # What the reference gives does not change what a step costs.
    unscored = ReferenceLogprobs(preferences.train)
    unscored.values[:] = 0.0
    partners = ReferenceLogprobs(preferences.train_mismatched)
    partners.values[:] = 0.0

    def step() -> None:
        if config.sync_ref_model:
            for pack in packs:
                sequence_logprobs(model, pack)
        model.zero_grad()
        _backward(model, config, preferences, packs, unscored, partners)
        model.step(0.0, clip_norm=config.max_grad_norm or None)

    def evaluate() -> None:
        assert sample is not None
        model.forward(sample.tokens, sample.offsets, sample.targets, want=("logprobs", "entropy"), train=False)

    probe = measure(
        config,
        model,
        step,
        sum(len(pack.tokens) for pack in packs),
        evaluate if sample is not None else None,
        preferences.count_held_out_packs(config.seed),
    )
    epoch = preferences.batches.steps_per_epoch
    decisions, cost = decide(
        config,
        model,
        probe,
        known,
        steps_per_epoch=epoch,
        default_steps=_DEFAULT_EPOCHS * epoch,
        held=_held(config, preferences, model.config, resumed=done > 0),
    )
    facts = preferences.facts
    announce(
        config,
        model,
        probe,
        decisions,
        cost,
        done,
        display,
        kind="rows",
        data=f"{facts['num_train']:,} rows, {facts['num_train_answers']:,} answers of {facts['train_tokens']:,} tokens with their prompts; "
        f"{facts['split']}",
        shape=f"{config.per_device_train_batch_size} rows in packs of up to {preferences.pack_length}",
        passes=(decisions.max_steps - done) / epoch,
    )
    if done == 0:
        # A forward pass is about a third of a step.
        parts = [preferences.held_out]
        if not (config.reference_free or config.sync_ref_model):
            parts.append(preferences.train)
        tokens = sum(int(part.lengths().sum()) for part in parts)
        seconds = duration(tokens / probe.step_tokens * probe.step_s / 3)
        by = config.reference_model or config.model
        display.say(
            f"reference {sum(len(group) for part in parts for group in part.groups):,} answers, scored once by {by}, about {seconds}"
        )
    return decisions, cost


# ---- the loss of a step


@dataclasses.dataclass(frozen=True, eq=False)
class _Answers:
    """Sequences of one or more packs and what is known of them."""

    logps: Float64
    """l, f64 [S]."""
    ref_logps: Float64
    """r, f64 [S]; 0 for losses without a reference."""
    lengths: Ints
    """Trained tokens n, i64 [S]."""
    compared: Comparisons | Verdicts


@dataclasses.dataclass(frozen=True)
class _Totals:
    """Normalizers of a whole step."""

    num_chosen: float
    """Weights of the pairs, or of the good answers, summed up."""
    num_rejected: float
    num_chosen_tokens: float
    """Tokens of the chosen answers, those of a pair times its weight."""


def _compared(config: DPOConfig, rows: Sequence[Row], first_sequences: Ints) -> Comparisons | Verdicts:
    make = verdicts_of if config.on_verdicts else comparisons_of
    return make(rows, first_sequences)


def _totals(compared: Comparisons | Verdicts, lengths: Ints) -> _Totals:
    if isinstance(compared, Verdicts):
        good = compared.weights[compared.labels]
        return _Totals(
            float(good.sum()),
            float(compared.weights[~compared.labels].sum()),
            float(good @ lengths[compared.answers[compared.labels]]),
        )
    total = float(compared.weights.sum())
    return _Totals(total, total, float(compared.weights @ lengths[compared.chosen]))


def _objective(
    config: DPOConfig, answers: _Answers, totals: _Totals, reference_point: float
) -> tuple[float, Float64, Metrics]:
    """Loss, dL/dl of each sequence (f64 [S]) and metrics of some of a step's answers; those of all its parts add up."""
    compared, count = answers.compared, len(answers.logps)
    if isinstance(compared, Verdicts):
        loss, d_each, metrics = kto_loss(
            answers.logps[compared.answers],
            answers.ref_logps[compared.answers],
            compared.labels,
            kl=reference_point,
            num_chosen=totals.num_chosen,
            num_rejected=totals.num_rejected,
            weights=compared.weights,
            loss_type=config.loss_type[0],
            beta=config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )
        for name, rows, total in (
            ("chosen", compared.labels, totals.num_chosen),
            ("rejected", ~compared.labels, totals.num_rejected),
        ):
            length = float(compared.weights[rows] @ answers.lengths[compared.answers[rows]])
            metrics[f"lengths/{name}"] = length / total if total else 0.0
        return loss, f64(np.bincount(compared.answers, d_each, minlength=count)), metrics
    pairs = Pairs(
        chosen_logps=answers.logps[compared.chosen],
        rejected_logps=answers.logps[compared.rejected],
        ref_chosen_logps=answers.ref_logps[compared.chosen],
        ref_rejected_logps=answers.ref_logps[compared.rejected],
        chosen_lengths=answers.lengths[compared.chosen],
        rejected_lengths=answers.lengths[compared.rejected],
    )
    weights = None if (compared.weights == 1.0).all() else compared.weights
    kind = config.loss_type[0]
    if kind == "orpo":
        loss, d_chosen, d_rejected, metrics = orpo_loss(
            pairs, num_pairs=totals.num_chosen, weights=weights, beta=config.beta
        )
    elif kind in ("cpo", "simpo"):
        alpha = (0.0 if kind == "simpo" else 1.0) if config.cpo_alpha is None else config.cpo_alpha
        loss, d_chosen, d_rejected, metrics = cpo_loss(
            pairs,
            num_pairs=totals.num_chosen,
            num_chosen_tokens=totals.num_chosen_tokens,
            weights=weights,
            loss_type="simpo" if kind == "simpo" else "sigmoid",
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            simpo_gamma=config.simpo_gamma,
            cpo_alpha=alpha,
        )
    else:
        shares = config.loss_weights or (1.0,) * len(config.loss_type)
        loss, d_chosen, d_rejected, metrics = mixed_dpo_loss(
            pairs,
            loss_types=dict(zip(config.loss_type, shares, strict=True)),
            num_pairs=totals.num_chosen,
            num_chosen_tokens=totals.num_chosen_tokens,
            weights=weights,
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            discopop_tau=config.discopop_tau,
        )
    share = compared.weights / totals.num_chosen
    metrics["lengths/chosen"] = float(share @ pairs.chosen_lengths)
    metrics["lengths/rejected"] = float(share @ pairs.rejected_lengths)
    d_logps = np.bincount(compared.chosen, d_chosen, minlength=count)
    d_logps += np.bincount(compared.rejected, d_rejected, minlength=count)
    return loss, f64(d_logps), metrics


def _forward(model: ModelProtocol, pack: Pack, *, train: bool) -> tuple[Context | None, Float64, float]:
    """Context, l of each sequence and the summed entropy of the trained tokens' distributions."""
    ctx, out = model.forward(
        pack.tokens,
        pack.offsets,
        pack.targets,
        want=("logprobs", "entropy"),
        sequence_ids=pack.sequence_ids,
        train=train,
    )
    entropy = float(out.entropy[pack.mask].sum(dtype=np.float64))
    return ctx, sum_by_sequence(out.logprobs, pack.targets, pack.offsets), entropy


def _backward(
    model: ModelProtocol,
    config: DPOConfig,
    preferences: Preferences,
    packs: Sequence[Pack],
    reference: ReferenceLogprobs | None,
    mismatched: ReferenceLogprobs,
) -> Metrics:
    """Add up the gradients of one step's packs; metrics of the whole step, ``loss`` among them.

    Parameters
    ----------
    reference
        Of the training rows; None for a loss without a reference.
    mismatched
        Of their mismatched answers, none unless the loss is KTO's.
    """
    rows = preferences.train.rows
    lengths = [count_by_sequence(pack.targets, pack.offsets) for pack in packs]
    firsts = np.cumsum([0, *map(len, lengths)])
    whole = _compared(
        config,
        [rows[member] for pack in packs for member in pack.members],
        np.concatenate([pack.group_offsets[:-1] + first for pack, first in zip(packs, firsts[:-1], strict=True)]),
    )
    totals = _totals(whole, np.concatenate(lengths))
    num_tokens = sum(int(np.count_nonzero(pack.mask)) for pack in packs)
    members = [member for pack in packs for member in pack.members.tolist()]
    point = _kto_point(model, mismatched, members, preferences.pack_length)
    ref_logps = [
        np.zeros(len(each)) if reference is None else reference.of(pack.members)
        for pack, each in zip(packs, lengths, strict=True)
    ]
    parts: list[Metrics] = []
    if config.couples_batch:
        # All log-probabilities are needed before the first gradient: with several packs, the forward pass of each is made twice.
        first_pass = [_forward(model, pack, train=len(packs) == 1) for pack in packs]
        joint = _Answers(
            np.concatenate([logps for _, logps, _ in first_pass]),
            np.concatenate(ref_logps),
            np.concatenate(lengths),
            whole,
        )
        point = _bco_point(config, joint)
        _, d_joint, metrics = _objective(config, joint, totals, point)
        for number, pack in enumerate(packs):
            ctx, _, entropy = first_pass[0] if len(packs) == 1 else _forward(model, pack, train=True)
            d_logps = d_joint[firsts[number] : firsts[number + 1]]
            _spread_back(model, ctx, pack, f64(d_logps))
            parts.append({"entropy": entropy / num_tokens})
        parts.append(metrics)
    else:
        for pack, each, ref in zip(packs, lengths, ref_logps, strict=True):
            ctx, logps, entropy = _forward(model, pack, train=True)
            compared = _compared(config, [rows[member] for member in pack.members], pack.group_offsets[:-1])
            _, d_logps, metrics = _objective(config, _Answers(logps, ref, each, compared), totals, point)
            _spread_back(model, ctx, pack, d_logps)
            parts.append({**metrics, "entropy": entropy / num_tokens})
    metrics = add_metrics(parts)
    if config.on_verdicts:
        metrics["kl"] = point
    return metrics


def _spread_back(model: ModelProtocol, ctx: Context | None, pack: Pack, d_logps: Float64) -> None:
    assert ctx is not None
    model.backward(ctx, d_logprobs=spread(d_logps, pack.targets, pack.offsets))


def _kto_point(model: ModelProtocol, mismatched: ReferenceLogprobs, members: Iterable[int], pack_length: int) -> float:
    """KTO's estimate of the distance from the reference, on the mismatched answers of these rows; 0 for other losses."""
    groups = mismatched.examples.groups
    found = [member for member in members if groups and groups[member]]
    lengths = [sum(map(len, groups[member])) for member in found]
    logps, ref_logps = [np.zeros(0)], [np.zeros(0)]
    for places in best_fit_decreasing(lengths, pack_length):
        pack = assemble_pack([groups[found[place]] for place in places])
        logps.append(sequence_logprobs(model, pack))
        ref_logps.append(mismatched.of(found[place] for place in places))
    return kto_reference_point(np.concatenate(logps), np.concatenate(ref_logps))


def _bco_point(config: DPOConfig, answers: _Answers) -> float:
    compared = answers.compared
    if config.loss_type != ("bco",) or not isinstance(compared, Verdicts):
        return 0.0
    logps, ref_logps = answers.logps[compared.answers], answers.ref_logps[compared.answers]
    return bco_reference_point(logps, ref_logps, compared.labels, compared.weights)


# ---- the run


class _Run(Trainer[DPOConfig]):
    """The loop and its parts."""

    def __init__(
        self,
        folder: RunFolder,
        config: DPOConfig,
        preferences: Preferences,
        model: ModelProtocol,
        state: State,
        decisions: Decisions,
        cost: Cost,
        display: Display,
        callbacks: Sequence[Callback],
    ) -> None:
        encoder, train = preferences.encoder, preferences.train
        answers = sum(map(len, train.groups))
        super().__init__(
            folder,
            config,
            model,
            encoder.tokenizer,
            state,
            decisions,
            cost,
            display,
            callbacks,
            max_length=max(1, int(train.lengths().sum() / answers)),
            encoder=encoder,
            rules=rules(held_out=len(preferences.held_out) > 0),
        )
        self.preferences = preferences
        self.reference = reference = _make_reference(config, preferences, model, resumed=state.step > 0)
        self.held_to = SyncedReference(config, reference, folder.path, state.step)
        self.held_to.announce(decisions.max_steps, display)
        self.banned_ids = banned_ids_of(self.tokenizer, model.config.vocab_size, encoder.end_ids)
        longest = model.config.max_position_embeddings - 1
        self.prompts = preferences.prompts(config.sample_prompts if config.sample_tokens else 0, longest)
        sets = {
            "held_out": preferences.held_out,
            "train_mismatched": preferences.train_mismatched,
            "held_out_mismatched": preferences.held_out_mismatched,
        }
        if not config.reference_free:
            sets["train"] = preferences.train
        scored = [name for name in sets if name.startswith("held_out") or not config.sync_ref_model]
        found: dict[str, ReferenceLogprobs] = {}

        def score() -> None:
            found.update(
                reference_logprobs(
                    folder.path,
                    reference,
                    {name: sets[name] for name in scored if len(sets[name])},
                    hashes={name: preferences.facts[name] for name in ("tokenizer_hash", "template_hash")},
                    pack_length=preferences.pack_length,
                    display=display,
                )
            )

        self.guarded(score)
        self.ref = {name: found.get(name, ReferenceLogprobs(examples)) for name, examples in sets.items()}
        """Log-probabilities under the reference: ``train`` (unless the loss has none), ``held_out``, and of mismatched answers. Where it
        follows the policy, those of training rows are known from when they are first needed until it moves."""

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
                self.train_step()
        self.finish()

    def train_step(self) -> None:
        """One step of the optimizer on the next rows, however many packs they make."""
        state, config = self.state, self.config
        began = time.perf_counter()
        packs = self.preferences.batches.take(state.step)
        rate = self.learning_rate()
        if config.sync_ref_model:
            members = [member for pack in packs for member in pack.members.tolist()]
            for reference in self.followed():
                reference.score(self.held_to.model, self.preferences.pack_length, members=members)
        self.model.zero_grad()
        metrics = _backward(
            self.model, config, self.preferences, packs, self.ref.get("train"), self.ref["train_mismatched"]
        )
        info = self.model.step(rate, clip_norm=config.max_grad_norm or None)
        self.count(metrics["loss"], info, sum(len(pack.tokens) for pack in packs), began)
        if self.held_to.follow(self):
            for reference in self.followed():
                reference.forget()
        if self.due(config.logging_steps):
            epoch = state.step / self.preferences.batches.steps_per_epoch
            answers = sum(len(pack.offsets) - 1 for pack in packs)
            shown = {name: value for name, value in metrics.items() if name != "loss"}
            shown["time/episodes_per_s"] = answers / (time.perf_counter() - began)
            self.log(epoch, info.grad_norm, rate, **shown)

    def followed(self) -> list[ReferenceLogprobs]:
        """What is known of the training rows under the reference."""
        return [self.ref[name] for name in ("train", "train_mismatched") if len(self.ref[name].examples)]

    def save_more(self, folder: Path) -> None:
        """The reference, where it has moved."""
        self.held_to.save(folder)

    def evaluate(self) -> None:
        """Held-out loss and accuracy, answers; the best weights so far go to the top of the run's folder. Given up when asked to stop."""
        state = self.state
        began = time.perf_counter()
        measured: dict[str, float] = {}
        if len(self.preferences.held_out):
            held_out = self.held_out_metrics()
            if held_out is None:
                return
            measured |= held_out
        self.pace.evaluation_took(time.perf_counter() - began)
        if self.prompts:
            measured |= self.answer()
        metrics = {
            "step": state.step,
            "tokens": state.tokens,
            **measured,
            "time/evaluation_s": time.perf_counter() - began,
        }
        words = [f"step {state.step}"]
        if "eval_loss" in measured:
            words += [f"held-out loss {measured['eval_loss']:.4f}", f"accuracy {100 * measured['eval_accuracy']:.1f} %"]
            words += [f"margin {measured['eval_rewards/margins']:z.3f}"]
        if self.prompts:
            words += [f"KL {measured['eval_kl']:z.2f}", f"answers ended {100 * measured['eval_eos_rate']:.0f} %"]
        if len(words) > 1:
            self.display.say("  ".join(words))
        if "eval_loss" in measured:
            self.measured(measured["eval_loss"], metrics)
        elif measured:
            self.record(metrics)
        state.evaluated_step = state.step
        self.notify(lambda callback, view: callback.on_evaluate(view, metrics))

    def held_out_metrics(self) -> dict[str, float] | None:
        """Loss and metrics of the held-out rows as one step, and how well they are ordered; None where it was interrupted."""
        preferences, config = self.preferences, self.config
        members: list[int] = []
        logps, lengths = [], []
        entropy = num_tokens = 0.0
        for pack in preferences.held_out_packs(config.seed, self.decisions.eval_batches):
            if self.stop.requested:
                return None
            _, sums, pack_entropy = _forward(self.model, pack, train=False)
            members += pack.members.tolist()
            logps.append(sums)
            lengths.append(count_by_sequence(pack.targets, pack.offsets))
            entropy += pack_entropy
            num_tokens += np.count_nonzero(pack.mask)
            # A sign of life where this takes long.
            self.display.update(self.pace.status(self.state.step, None, self.state.eval_loss))
        rows = [preferences.held_out.rows[member] for member in members]
        sizes = [len(preferences.held_out.groups[member]) for member in members]
        first = np.cumsum([0, *sizes])[:-1]
        ref_logps = self.ref["held_out"].of(members)
        loss_ref = np.zeros_like(ref_logps) if config.reference_free else ref_logps
        answers = _Answers(np.concatenate(logps), loss_ref, np.concatenate(lengths), _compared(config, rows, first))
        point = _kto_point(self.model, self.ref["held_out_mismatched"], members, preferences.pack_length)
        if config.couples_batch:
            point = _bco_point(config, answers)
        _, _, metrics = _objective(config, answers, _totals(answers.compared, answers.lengths), point)
        metrics["entropy"] = entropy / num_tokens
        scores = {
            "": _implicit_rewards(config, answers),
            "length_": f64(answers.lengths),
            "start_": ref_logps,
        }
        for name, values in scores.items():
            share, low, high = _accuracy(rows, first, values)
            metrics[f"{name}accuracy"] = share
            if not name:
                metrics |= {"accuracy_low": low, "accuracy_high": high}
        return {f"eval_{name}": value for name, value in metrics.items()}

    def answer(self) -> dict[str, float]:
        """Let the model answer the prompts, the same ones with the same random numbers each time: how far it is from the reference there,
        how long its answers are, and the share that it ends."""
        config, before = self.config, self.first_answers()
        rollouts = sample_rollouts(
            self.model,
            self.prompts,
            max_new_tokens=config.sample_tokens,
            end_ids=self.preferences.encoder.end_ids,
            seed=config.seed,
            banned_ids=self.banned_ids,
        )
        read = as_read_by(self.reference, rollouts, self.tokenizer, self.preferences.encoder.end_ids)
        ref_logprobs = recompute_logprobs(self.reference, read)
        distance = sum_by_sequence(f64(rollouts.logprobs) - f64(ref_logprobs), rollouts.targets, rollouts.offsets)
        texts = [self.tokenizer.decode(rollouts.completion_ids(number).tolist()) for number in range(len(rollouts))]
        for number, prompt in enumerate(self.prompts):
            fields: dict[str, Any] = {"prompt": self.tokenizer.decode(prompt), "completion": texts[number]}
            if before:
                fields["before"] = before[number]
            self.record_sample(**fields, ended=not bool(rollouts.truncated[number]), kl=float(distance[number]))
        self.show_sample(self.tokenizer.decode(self.prompts[0]) + texts[0])
        measured = rollouts.metrics()
        return {
            "eval_kl": float(distance.mean()),
            "eval_eos_rate": 1.0 - measured["completions/clipped_ratio"],
            "eval_completions/mean_length": measured["completions/mean_length"],
            "eval_sample_entropy": measured["entropy"],
        }

    def first_answers(self) -> list[str]:
        """What the model answered before the first step, as samples.jsonl has it; nothing before that."""
        if self.state.step == 0:
            return []
        lines = self.folder.samples.read()[: len(self.prompts)]
        return [line["completion"] for line in lines] if all(line["step"] == 0 for line in lines) else []

    def verdict(self) -> Verdict:
        """Of the weights that the folder holds."""
        single = any(isinstance(row, UnpairedPreference) for row in self.preferences.held_out.rows)
        return verdict_of(self.folder.metrics.read(), self.state.best_step, verdicts=single)


def _implicit_rewards(config: DPOConfig, answers: _Answers) -> Float64:
    """What the loss orders answers by: beta d, or l, per token where the loss has it so and no reference."""
    if config.loss_type[0] in ("simpo", "orpo"):
        return f64(answers.logps / np.maximum(answers.lengths, 1))
    return f64(answers.logps - answers.ref_logps)


def _accuracy(rows: Sequence[Row], first_sequences: Ints, scores: Float64) -> tuple[float, float, float]:
    """How often the better answer has the higher score: within pairs, or of good and bad answers where rows are single ones."""
    prompts: dict[tuple[str, ...], int] = {}
    cluster = np.array([prompts.setdefault(tuple(prompt_key(row.asked())), len(prompts)) for row in rows], np.int64)
    if any(isinstance(row, UnpairedPreference) for row in rows):
        single = verdicts_of(rows, first_sequences)
        return separation(scores[single.answers], single.labels, single.weights, cluster[single.rows])
    pairs = comparisons_of(rows, first_sequences)
    return pair_accuracy(scores[pairs.chosen] - scores[pairs.rejected], pairs.weights, cluster[pairs.rows])


_PHASE = RowsPhase(
    kind="dpo",
    config=DPOConfig,
    shape=_start_shape,
    prepare=prepare_preferences,
    make_model=_make_model,
    decide=_decide,
    trainer=_Run,
    builds_on=lambda config: (config.model,),
)

resume = _PHASE.resume
