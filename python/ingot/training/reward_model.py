"""Training of a reward model: people's judgements in, a model that scores responses out. The whole loop is :meth:`_Run.loop` and below.

The score is read at the token that ends a response, or a step of one. All responses to a prompt lie in one step and one pack, so that K of them cost
K passes and their pairs teach together. Comparisons leave the scale of scores open: at the end they are brought to mean 0 and standard
deviation 1 for each criterion, over responses to training prompts, since reinforcement learning weighs them against a KL penalty. Scores
learnt from labels stay what they are, the log odds of a true label. A run is a function of its settings, its
base model and its rows: killed at any moment and resumed, it ends with the same bits.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ingot.configs import ModelConfig, RewardConfig
from ingot.data.batches import Order
from ingot.data.chat import Encoded
from ingot.data.examples import Pack
from ingot.environment import memory_limit
from ingot.errors import ConfigError
from ingot.inference.intervals import Share, share_of
from ingot.inference.scoring import UNNAMED, RewardModel
from ingot.losses.numerics import Float64, Metrics, f64
from ingot.losses.packed import add_metrics
from ingot.losses.reward import (
    gain_and_bias,
    label_loss,
    pairwise_loss,
    plackett_luce_loss,
    rating_loss,
)
from ingot.models import Model, load_model
from ingot.models.hf import open_folder
from ingot.training.alarms import Rule, above, below
from ingot.training.callbacks import Callback
from ingot.training.cost import Cost
from ingot.training.decisions import Decisions, announce, decide
from ingot.training.demonstrations import Rows
from ingot.training.label_figures import compare_labels, label_figures, nothing_compared, verdict_of_labels
from ingot.training.memory import Held, learner, require_memory
from ingot.training.phases import RowsPhase
from ingot.training.progress import Display
from ingot.training.rankings import Judgement, Rankings, labels_of, lists_of, pairs_of, prepare_rankings
from ingot.training.reward_figures import (
    BagOfWords,
    Comparison,
    hits_of,
    length_hits,
    pair_figures,
    people_agree,
    scored_lengths,
    verdict_of,
)
from ingot.training.runs import RunFolder
from ingot.training.setup import zero_heads
from ingot.training.state import State
from ingot.training.trainer import Trainer, TrainingResult, measure
from ingot.training.verdicts import Verdict

if TYPE_CHECKING:
    from ingot.models.base import IntArray
    from ingot.models.base import Model as ModelProtocol

_DEFAULT_EPOCHS = 1
# As many as Ziegler et al. (2019) normalise on; done again for each model that is written.
_NUM_REFERENCE_SCORES = 256
_REFERENCE_STREAM = 3


def train_reward_model(
    config: RewardConfig,
    data: Rows = None,
    callbacks: Sequence[Callback] = (),
    *,
    dry_run: bool = False,
    force: bool = False,
    quiet: bool = False,
) -> TrainingResult:
    """Train a reward model on judgements, in a new run folder. ``ingot.RewardModel.load`` opens it; ``verdict.json`` says what it is worth.

    Parameters
    ----------
    data
        Rows to learn from, as dictionaries, instead of the files ``config.data``.
    dry_run
        Print the cost and stop: the result holds the untrained network and no history, and no folder is made.
    force
        Go on where the run that made ``config.model`` did not pass its own gate.
    quiet
        Print nothing.

    Raises
    ------
    IngotError
        One line that says what is wrong with settings, model, template, rows, folder or loss, and what to do.
    KeyboardInterrupt
        Ctrl-C, after saving.
    """
    return _PHASE.start(config, data, callbacks, dry_run=dry_run, quiet=quiet, force=force)


def _base_shape(config: RewardConfig) -> ModelConfig:
    """Of the model to start from, which must be one that writes."""
    if not config.model:
        raise ConfigError("no model to start from: give --model with the folder of one that answers")
    saved = open_folder(config.model)
    if saved.num_values:
        raise ConfigError(f"{config.model}: is a model that scores already, with scalar heads: give one that writes")
    return saved.config


def _make_model(config: RewardConfig, rankings: Rankings, known: ModelConfig | None) -> ModelProtocol:
    """The base model with new heads and no dropout; of shape ``known`` where weights are restored from a checkpoint.

    Raises
    ------
    ConfigError
        The base model has fewer ids than its tokenizer.
    RunError
        The run would not fit into memory.
    """
    heads = len(rankings.criteria)
    if known is not None:
        return Model(known, seed=config.seed, num_values=heads, **config.place)
    saved, num_ids = _base_shape(config), rankings.encoder.tokenizer.vocab_size
    if num_ids > saved.vocab_size:
        raise ConfigError(
            f"{config.model}: the tokenizer has {num_ids} tokens but the model only {saved.vocab_size}: they do not belong together"
        )
    shape = dataclasses.replace(saved, dropout=0.0)
    require_memory(memory_limit(), _held(config, rankings, shape))
    model = load_model(config.model, seed=config.seed, num_values=heads, dropout=0.0, **config.place)
    if config.head_init == "zero":
        zero_heads(model)
    return model


def _held(config: RewardConfig, rankings: Rankings, shape: ModelConfig) -> Held:
    """What the run holds in memory."""
    limit = rankings.pack_length
    return learner(
        config,
        shape,
        rankings.train.examples.most_tokens(config.per_device_train_batch_size, limit),
        num_values=len(rankings.criteria),
        read_tokens=rankings.held_out.examples.most_tokens(None, limit),
    )


def _decide(
    config: RewardConfig,
    rankings: Rankings,
    model: ModelProtocol,
    known: dict[str, Any],
    done: int,
    display: Display,
) -> tuple[Decisions, Cost]:
    """Time the run's first batch, settle what is open, and say it."""
    packs = rankings.batches.take(0)
    sample = next(rankings.held_out_packs(config.seed, 1), None)
    scales = rating_scales(rankings)

    def step() -> None:
        model.zero_grad()
        _backward(model, config, packs, rankings, scales)
        model.step(0.0, clip_norm=config.max_grad_norm or None)

    def evaluate() -> None:
        assert sample is not None
        _values(model, sample)

    probe = measure(
        config,
        model,
        step,
        sum(len(pack.tokens) for pack in packs),
        evaluate if sample is not None else None,
        rankings.count_held_out_packs(config.seed),
    )
    epoch = rankings.batches.steps_per_epoch
    decisions, cost = decide(
        config,
        model,
        probe,
        known,
        steps_per_epoch=epoch,
        default_steps=_DEFAULT_EPOCHS * epoch,
        held=(_held(config, rankings, model.config),),
    )
    heads = "" if rankings.criteria == (UNNAMED,) else f"; a head for each of {', '.join(rankings.criteria)}"
    announce(
        config,
        model,
        probe,
        decisions,
        cost,
        done,
        display,
        kind="labels" if rankings.labelled else "rankings",
        data=f"{_told(rankings)}; {rankings.facts['split']}{heads}",
        shape=f"{config.per_device_train_batch_size} prompts in packs of up to {rankings.pack_length}",
        passes=(decisions.max_steps - done) / epoch,
    )
    return decisions, cost


# ---- the gradient


def rating_scales(rankings: Rankings) -> Float64:
    """Mean and standard deviation of each criterion's ratings in training, f64 [k, 2]; 0 and 1 where there are none."""
    lists = lists_of(rankings.train.judgements, rankings.train.first_scores)
    scales = np.tile([0.0, 1.0], (len(rankings.criteria), 1))
    for criterion in range(len(scales)):
        ratings = lists.ratings[(lists.criteria == criterion) & np.isfinite(lists.ratings)]
        if ratings.size:
            scales[criterion] = ratings.mean(), ratings.std() or 1.0
    return scales


def _values(model: ModelProtocol, pack: Pack, train: bool = False) -> tuple[Any, Float64]:
    """Context, and the value of each place that is scored by each head, f64 [E, k]."""
    ctx, out = model.forward(
        pack.tokens,
        pack.offsets,
        np.full(len(pack.tokens), -1, np.int32),
        want=("values",),
        value_rows=pack.value_rows,
        train=train,
    )
    return ctx, f64(out.values[pack.value_rows]).reshape(-1, model.num_values)


def _first_scores(pack: Pack) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Number of each group's first score in the pack, i64 [G + 1], with all of them at the end."""
    before = np.concatenate([[0], np.cumsum(pack.value_rows, dtype=np.int64)])
    return np.asarray(before[pack.offsets[pack.group_offsets]], np.int64)


def _backward(
    model: ModelProtocol, config: RewardConfig, packs: Sequence[Pack], rankings: Rankings, scales: Float64
) -> Metrics:
    """Add up the gradients of one step's packs; metrics of the whole step, ``loss`` among them."""
    made = [[rankings.train.judgements[member] for member in pack.members] for pack in packs]
    total = sum(weight_of(config, judgements) for judgements in made)
    num_scores = sum(np.count_nonzero(pack.value_rows) for pack in packs) * len(rankings.criteria)
    parts = []
    for pack, judgements in zip(packs, made, strict=True):
        ctx, scores = _values(model, pack, train=True)
        # Where nothing is to be learned, any total gives a loss of 0.
        d_scores, metrics = judged_loss(scores, config, judgements, _first_scores(pack)[:-1], scales, total or 1.0)
        assert ctx is not None
        d_values = np.zeros((len(pack.tokens), model.num_values), np.float32)
        d_values[pack.value_rows] = d_scores
        model.backward(ctx, d_values=d_values if model.num_values > 1 else d_values[:, 0].copy())
        metrics["mean_reward"] = float(scores.sum()) / num_scores
        parts.append(metrics)
    return add_metrics(parts)


def weight_of(config: RewardConfig, judgements: Sequence[Sequence[Judgement]]) -> float:
    """What these judgements count together: the normalizer of :func:`judged_loss` over a step."""
    labels = labels_of(judgements, np.zeros(len(judgements), np.int64), last_only=config.train_on_last_step_only)
    if len(labels):
        return float(len(labels))
    if config.loss_type == "rating":
        lists = lists_of(judgements, np.zeros(len(judgements), np.int64))
        return float(np.count_nonzero(np.isfinite(lists.ratings)))
    if config.loss_type == "pairwise":
        pairs = pairs_of(judgements, np.zeros(len(judgements), np.int64), ties=config.ties == "half")
        return float(pairs.weights.sum())
    return float(sum(map(len, judgements)))


def judged_loss(
    scores: Float64,
    config: RewardConfig,
    judgements: Sequence[Sequence[Judgement]],
    first_scores: np.ndarray[Any, np.dtype[np.int64]],
    scales: Float64,
    total: float,
) -> tuple[Float64, Metrics]:
    """The gradient by the scores [E, k], f64 like them, and metrics with the ``loss``, over ``total`` weight: of the configured loss, or where
    the judgements are labels of binary cross-entropy. Scores of a group begin at its number among ``first_scores`` [G]."""
    d_scores = np.zeros_like(scores)
    labels = labels_of(judgements, first_scores, last_only=config.train_on_last_step_only)
    if len(labels):
        labelled = (labels.places, labels.criteria)
        _, d_labelled, metrics = label_loss(scores[labelled], labels.true, num_labels=total)
        np.add.at(d_scores, labelled, d_labelled)
        return d_scores, metrics
    if config.loss_type == "pairwise":
        pairs = pairs_of(judgements, first_scores, ties=config.ties == "half")
        better, worse = (pairs.better, pairs.criteria), (pairs.worse, pairs.criteria)
        _, d_better, d_worse, metrics = pairwise_loss(
            scores[better],
            scores[worse],
            num_pairs=total,
            weights=pairs.weights,
            margins=pairs.margins,
            labels=pairs.labels,
            center_rewards_coefficient=config.center_rewards_coefficient,
        )
        np.add.at(d_scores, better, d_better)
        np.add.at(d_scores, worse, d_worse)
        return d_scores, metrics
    lists = lists_of(judgements, first_scores)
    places = (lists.sequences, lists.criteria)
    if config.loss_type == "rating":
        mean, std = scales[lists.criteria].T
        _, d_entries, metrics = rating_loss(scores[places], (lists.ratings - mean) / std, num_ratings=total)
    else:
        ranks = np.minimum(lists.ranks, 2) if config.loss_type == "best_of" else lists.ranks
        _, d_entries, metrics = plackett_luce_loss(scores[places], ranks, lists.offsets, num_groups=total)
    np.add.at(d_scores, places, d_entries)
    return d_scores, metrics


# ---- the run


class _Run(Trainer[RewardConfig]):
    """The loop and its parts."""

    def __init__(
        self,
        folder: RunFolder,
        config: RewardConfig,
        rankings: Rankings,
        model: ModelProtocol,
        state: State,
        decisions: Decisions,
        cost: Cost,
        display: Display,
        callbacks: Sequence[Callback],
    ) -> None:
        self.rankings = rankings
        self.scales = rating_scales(rankings)
        super().__init__(
            folder,
            config,
            model,
            rankings.encoder.tokenizer,
            state,
            decisions,
            cost,
            display,
            callbacks,
            max_length=int(rankings.train.examples.lengths().mean()),
            encoder=rankings.encoder,
            rules=_rules(decisions.max_steps),
        )

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
        """One step of the optimizer on the next prompts, however many packs they make."""
        state, config = self.state, self.config
        began = time.perf_counter()
        packs = self.rankings.batches.take(state.step)
        rate = self.learning_rate()
        self.model.zero_grad()
        metrics = _backward(self.model, config, packs, self.rankings, self.scales)
        info = self.model.step(rate, clip_norm=config.max_grad_norm or None)
        self.count(metrics.pop("loss"), info, sum(len(pack.tokens) for pack in packs), began)
        if self.due(config.logging_steps):
            self.log(state.step / self.rankings.batches.steps_per_epoch, info.grad_norm, rate, **metrics)

    # ---- how good it is

    def evaluate(self) -> None:
        """Held-out loss and accuracies; the best weights so far go to the top of the run's folder. Given up when asked to stop."""
        state = self.state
        if not len(self.rankings.held_out):
            state.evaluated_step = state.step
            return
        began = time.perf_counter()
        scored = self.held_out_scores()
        if scored is None:
            return
        members, scores = scored
        held_out = self.rankings.held_out.select(members)
        self.pace.evaluation_took(time.perf_counter() - began)
        config = dataclasses.replace(self.config, train_on_last_step_only=False)
        total = weight_of(config, held_out.judgements)
        _, losses = judged_loss(scores, config, held_out.judgements, held_out.first_scores, self.scales, total or 1.0)
        lengths, names = scored_lengths(held_out.sequences), self.rankings.criteria
        if self.rankings.labelled:
            figures = label_figures(scores, lengths, held_out.labels(), names, in_steps=self.in_steps)
        else:
            figures = pair_figures(scores, lengths, held_out.pairs(), names)
        metrics = {
            "step": state.step,
            "tokens": state.tokens,
            "eval_loss": losses["loss"],
            **{f"eval_{name}": value for name, value in figures.items()},
            "time/evaluation_s": time.perf_counter() - began,
        }
        accuracy = figures.get("accuracy")
        what = "labels said rightly" if self.rankings.labelled else "pairs ordered as people did"
        ordered = "" if accuracy is None else f"  {what} {100 * accuracy:.1f} %"
        self.display.say(f"step {state.step}  held-out loss {losses['loss']:.4f}{ordered}")
        self.show_scores(held_out.judgements, members, scores)
        self.measured(losses["loss"], metrics)
        state.evaluated_step = state.step
        self.notify(lambda callback, view: callback.on_evaluate(view, metrics))

    def held_out_scores(self) -> tuple[list[int], Float64] | None:
        """Numbers of held-out prompts, ascending, and the values of what is scored of them, f64 [E, k]; None where it was interrupted."""
        found: dict[int, Float64] = {}
        for pack in self.rankings.held_out_packs(self.config.seed, self.decisions.eval_batches):
            if self.stop.requested:
                return None
            _, scores = _values(self.model, pack)
            found |= dict(zip(pack.members.tolist(), np.split(scores, _first_scores(pack)[1:-1]), strict=True))
            # A sign of life where this takes long.
            self.display.update(self.pace.status(self.state.step, None, self.state.eval_loss))
        members = sorted(found)
        return members, np.concatenate([found[member] for member in members])

    def show_scores(self, judgements: Sequence[Sequence[Judgement]], members: Sequence[int], scores: Float64) -> None:
        """Record the responses to a few held-out prompts, or their steps, with their scores."""
        limit, criteria = self.config.sample_tokens, self.rankings.criteria
        groups = self.rankings.held_out.examples.groups
        first = 0
        for member, made in list(zip(members, judgements, strict=True))[: self.config.sample_prompts if limit else 0]:
            group = groups[member]
            prompt = group[0].ids[~group[0].mask]
            texts = [self.tokenizer.decode(ids[:limit]) for sequence in group for ids in _scored_ids(sequence)]
            self.record_sample(
                prompt=self.tokenizer.decode(prompt[-limit:]),
                responses=texts,
                scores=[dict(zip(criteria, row, strict=True)) for row in scores[first : first + len(texts)].tolist()],
                judgements=[
                    {
                        "criterion": criteria[each.criterion],
                        "responses": each.members,
                        **({"ranks": each.ranks} if each.labels is None else {"labels": each.labels}),
                    }
                    for each in made
                ],
            )
            first += len(texts)

    # ---- what is left of it

    def reward_model(self) -> RewardModel:
        """The model as it is now; one that learnt from comparisons with scores of mean 0 and standard deviation 1 over responses to training prompts.

        These are all of them, or the responses to the first prompts of a fixed order until there are 256.
        """
        rankings = self.rankings
        if rankings.labelled:
            separator = rankings.step_separator
            return RewardModel(self.model, rankings.encoder, rankings.criteria, step_separator=separator)
        groups = rankings.train.examples.groups
        order = Order(len(groups), self.config.seed, _REFERENCE_STREAM)
        chosen: list[IntArray] = []
        for index in range(len(groups)):
            chosen += [sequence.ids for sequence in groups[order[index]]]
            if len(chosen) >= _NUM_REFERENCE_SCORES:
                break
        values = RewardModel(self.model, rankings.encoder, rankings.criteria).score_ids_each(chosen)
        gains, biases = zip(*(gain_and_bias(column) for column in values.T), strict=True)
        return RewardModel(self.model, rankings.encoder, rankings.criteria, gain=gains, bias=biases)

    def write_model(self, losses: dict[str, float | None]) -> None:
        """A classifier as transformers has them, at the top of the run's folder."""
        self.folder.export(self.reward_model(), self.tokenizer, self.card(losses, self.state.step), self.encoder)

    @property
    def in_steps(self) -> bool:
        """Whether each step of an answer is scored."""
        return self.rankings.step_separator is not None

    def verdict(self) -> Verdict:
        """On the held-out prompts, all of them, by the model that the folder holds."""
        rankings = self.rankings
        names = [name if name != UNNAMED or len(rankings.criteria) > 1 else "" for name in rankings.criteria]
        if rankings.labelled:
            return self.verdict_on_labels(names)
        people = people_agree((rankings.train, rankings.held_out))
        if not len(rankings.held_out):
            nothing = Share(math.nan, math.nan, math.nan, 0, 0)
            return verdict_of([Comparison(name, nothing, nothing, nothing, nothing) for name in names], people)
        model = RewardModel.load(self.folder.path, **self.config.place)
        sequences, pairs = rankings.held_out.sequences, rankings.held_out.pairs()
        scores = model.score_ends_each(sequences)
        lengths = scored_lengths(sequences)
        longer = length_hits(lengths, pairs)
        learned, learned_from = rankings.train.sequences, rankings.train.pairs()
        comparisons = []
        for number, name in enumerate(names):
            mine = pairs.of(number)
            words = BagOfWords(learned, learned_from.of(number)).scores(sequences)
            word_scores = np.repeat(words[:, None], len(names), axis=1)
            shares = (
                hits_of(scores, mine),
                longer[pairs.criteria == number],
                1 - longer[pairs.criteria == number],
                hits_of(word_scores, mine),
            )
            comparisons.append(Comparison(name, *(share_of(hits, mine.groups) for hits in shares)))
        return verdict_of(comparisons, people)

    def verdict_on_labels(self, names: Sequence[str]) -> Verdict:
        """The same where rows have labels."""
        train, held_out = self.rankings.train, self.rankings.held_out
        if not len(held_out):
            return verdict_of_labels([nothing_compared(name) for name in names], in_steps=self.in_steps)
        scores = RewardModel.load(self.folder.path, **self.config.place).score_ends_each(held_out.sequences)
        comparisons = [
            compare_labels(name, scores, number, train, held_out, in_steps=self.in_steps)
            for number, name in enumerate(names)
        ]
        return verdict_of_labels(comparisons, in_steps=self.in_steps)


def _scored_ids(sequence: Encoded) -> list[IntArray]:
    """Ids of what is scored: the response, or each of its steps."""
    first = int(np.argmax(sequence.mask))
    starts = [first, *(end + 1 for end in sequence.ends[:-1])]
    return [sequence.ids[start : end + 1] for start, end in zip(starts, sequence.ends, strict=True)]


def _told(rankings: Rankings) -> str:
    """What is learnt from, in a few words."""
    facts = rankings.facts
    told = f"{facts['num_train']:,} prompts with {facts['num_train_responses']:,} responses and "
    if not rankings.labelled:
        return told + f"{facts['num_train_pairs']:,} ordered pairs"
    number = facts["num_train_labels"]
    what = "labelled steps" if rankings.step_separator is not None else "labels"
    return told + f"{number:,} {what}, {100 * facts['num_train_true'] / max(number, 1):.0f} % of them true"


def _rules(max_steps: int) -> list[Rule]:
    """Alarms of a reward model, once half of the run is over: an untrained one has all these signs."""
    length = (
        "it has learnt length: add judgements in which the shorter answer is the better one, or even the lengths out"
    )
    short = "it has learnt to prefer short answers: add judgements in which the longer answer is the better one, or even the lengths out"
    rules = (
        above("accuracy by length", "eval_length_slope", 0.3, length),
        below("accuracy by shortness", "eval_length_slope", -0.3, short),
        above("score follows length", "eval_length_correlation", 0.5, length),
        below("score follows shortness", "eval_length_correlation", -0.5, short),
        above(
            "calibration",
            "eval_ece",
            0.1,
            "it is too sure or not sure enough: too many epochs, or too high a learning rate",
        ),
        below("equal scores", "eval_reward_std", 1e-6, "it gives every response the same score and has learnt nothing"),
    )
    return [_late(rule, max_steps) for rule in rules]


def _late(rule: Rule, max_steps: int) -> Rule:
    def check(lines: Sequence[Any]) -> str | None:
        late = [line for line in lines if line["step"] >= max_steps / 2]
        return rule.check(late) if late else None

    return dataclasses.replace(rule, needs=(*rule.needs, "step"), check=check)


_PHASE = RowsPhase(
    kind="reward",
    config=RewardConfig,
    shape=_base_shape,
    prepare=prepare_rankings,
    make_model=_make_model,
    decide=_decide,
    trainer=_Run,
    builds_on=lambda config: (config.model,),
)

resume = _PHASE.resume
