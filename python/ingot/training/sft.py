"""Supervised fine-tuning: demonstrations in, a model that answers out. The whole loop is :meth:`_Run.loop` and the methods below it.

Trained are the assistant's texts and the token that ends its turn; what it is asked is read and not learned, unless ``prompt_weight``
says so. A run is a function of its settings, its base model and its rows: killed at any moment and resumed, it ends with the same bits.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ingot.configs import ModelConfig, SFTConfig
from ingot.data.batches import mix
from ingot.data.examples import Pack
from ingot.environment import memory_limit
from ingot.errors import ConfigError
from ingot.inference.generate import generate
from ingot.losses.numerics import Metrics
from ingot.losses.packed import add_metrics, mean_weights
from ingot.losses.sft import relative_weights, sft_loss, token_metrics
from ingot.models import Model, load_model
from ingot.models.growth import grow_vocabulary
from ingot.models.hf import open_folder
from ingot.tokenizer import Tokenizer
from ingot.training.callbacks import Callback
from ingot.training.cost import Cost
from ingot.training.decisions import Decisions, announce, decide
from ingot.training.demonstration_checks import rules, share_within, verdict_of
from ingot.training.demonstrations import Demonstrations, Rows, prepare_demonstrations
from ingot.training.memory import Held, learner, require_memory
from ingot.training.phases import RowsPhase
from ingot.training.progress import Display
from ingot.training.runs import RunFolder
from ingot.training.state import State
from ingot.training.trainer import Trainer, TrainingResult, measure
from ingot.training.verdicts import Verdict

if TYPE_CHECKING:
    from ingot.models.base import Model as ModelProtocol

_DEFAULT_EPOCHS = 3
_DROPOUT_STREAM = 2


def sft(
    config: SFTConfig,
    data: Rows = None,
    callbacks: Sequence[Callback] = (),
    *,
    dry_run: bool = False,
    quiet: bool = False,
) -> TrainingResult:
    """Fine-tune a model on demonstrations, in a new run folder.

    Parameters
    ----------
    data
        Rows to learn from, as dictionaries, instead of the files ``config.data``.
    dry_run
        Print the cost and stop: the result holds the untrained network and no history, and no folder is made.
    quiet
        Print nothing.

    Raises
    ------
    IngotError
        One line that says what is wrong with settings, model, template, rows, folder or loss, and what to do.
    KeyboardInterrupt
        Ctrl-C, after saving.
    """
    return _PHASE.start(config, data, callbacks, dry_run=dry_run, quiet=quiet)


def _base_shape(config: SFTConfig) -> ModelConfig:
    """Of the model to start from, which must be one that writes."""
    if not config.model:
        raise ConfigError("no model to start from: give --model with the folder of a pretrained one")
    saved = open_folder(config.model)
    if saved.num_values:
        raise ConfigError(f"{config.model}: is a model that scores, with scalar heads: give one that writes")
    return saved.config


def _make_model(config: SFTConfig, demonstrations: Demonstrations, known: ModelConfig | None) -> ModelProtocol:
    """The base model with room for the template's tokens; of shape ``known`` where weights are restored from a checkpoint.

    Raises
    ------
    ConfigError
        The base model has fewer ids than its tokenizer.
    RunError
        The run would not fit into memory.
    """
    if known is not None:
        return Model(known, seed=config.seed, **config.place)
    shape = _base_shape(config)
    num_known, num_ids = Tokenizer.from_file(config.model).vocab_size, demonstrations.tokenizer.vocab_size
    if num_known > shape.vocab_size:
        raise ConfigError(
            f"{config.model}: the tokenizer has {num_known} tokens but the model only {shape.vocab_size}: they do not belong together"
        )
    shape = dataclasses.replace(shape, vocab_size=max(shape.vocab_size, num_ids), dropout=config.dropout)
    require_memory(memory_limit(), _held(config, demonstrations, shape))
    base = load_model(config.model, **config.place)
    if base.config == shape and num_ids == num_known:
        return base
    model = Model(shape, seed=config.seed, **config.place)
    frozen = bool(config.lora_rank)
    state = grow_vocabulary(base.state(), num_known=num_known, num_ids=num_ids, seed=config.seed, frozen=frozen)
    model.load_state(state)
    return model


def _held(config: SFTConfig, demonstrations: Demonstrations, shape: ModelConfig) -> Held:
    """What the run holds in memory."""
    limit = demonstrations.pack_length
    return learner(
        config,
        shape,
        demonstrations.train.most_tokens(config.per_device_train_batch_size, limit),
        read_tokens=demonstrations.held_out.most_tokens(None, limit),
    )


def _decide(
    config: SFTConfig,
    demonstrations: Demonstrations,
    model: ModelProtocol,
    known: dict[str, Any],
    done: int,
    display: Display,
) -> tuple[Decisions, Cost]:
    """Time the run's first batch, settle what is open, and say it."""
    packs = demonstrations.batches.take(0)
    sample = next(demonstrations.held_out_packs(config.seed, 1), None)

    def step() -> None:
        model.zero_grad()
        _backward(model, config, packs, 0)
        model.step(0.0, clip_norm=config.max_grad_norm or None)

    def evaluate() -> None:
        assert sample is not None
        model.forward(sample.tokens, sample.offsets, sample.targets, want=("logprobs", "top1", "entropy"), train=False)

    probe = measure(
        config,
        model,
        step,
        sum(len(pack.tokens) for pack in packs),
        evaluate if sample is not None else None,
        demonstrations.count_held_out_packs(config.seed),
    )
    epoch = demonstrations.batches.steps_per_epoch
    decisions, cost = decide(
        config,
        model,
        probe,
        known,
        steps_per_epoch=epoch,
        default_steps=_DEFAULT_EPOCHS * epoch,
        held=(_held(config, demonstrations, model.config),),
    )
    facts = demonstrations.facts
    announce(
        config,
        model,
        probe,
        decisions,
        cost,
        done,
        display,
        kind="rows",
        data=f"{facts['num_train']:,} rows of {facts['train_tokens']:,} tokens, {facts['trained_tokens']:,} of them trained; {facts['split']}",
        shape=f"{config.per_device_train_batch_size} rows in packs of up to {demonstrations.pack_length}",
        passes=(decisions.max_steps - done) / epoch,
    )
    return decisions, cost


def _backward(model: ModelProtocol, config: SFTConfig, packs: Sequence[Pack], step: int) -> Metrics:
    """Add up the gradients of one step's packs; metrics of the whole step, ``loss`` among them."""
    smoothing, z_loss = config.label_smoothing_factor, config.z_loss
    want = {"logprobs", "top1", "entropy"}
    want |= {"lse"} if smoothing or z_loss else set()
    want |= {"zbar"} if smoothing else set()
    relative = [relative_weights(pack.targets, pack.mask, prompt_weight=config.prompt_weight) for pack in packs]
    totals = {
        "token_mean": sum(float(weights.sum()) for weights in relative),
        "sequence_mean": float(sum(len(pack.offsets) - 1 for pack in packs)),
        "sum": 1.0,
    }
    num_tokens = sum(int(np.count_nonzero(pack.mask)) for pack in packs)
    parts = []
    for pack, each in zip(packs, relative, strict=True):
        # Where nothing is to be learned, any total gives a loss of 0.
        total = totals[config.loss_reduction] or 1.0
        weights = mean_weights(each, pack.offsets, reduction=config.loss_reduction, total=total)
        ctx, out = model.forward(
            pack.tokens,
            pack.offsets,
            pack.targets,
            want=want,
            seed=mix(config.seed, _DROPOUT_STREAM, step),
            sequence_ids=pack.sequence_ids,
        )
        _, d_logprobs, d_lse, d_zbar, metrics = sft_loss(
            out.logprobs,
            pack.targets,
            weights,
            loss_type=config.loss_type,
            label_smoothing=smoothing,
            z_loss=z_loss,
            lse=out.lse if "lse" in want else None,
            zbar=out.zbar if "zbar" in want else None,
        )
        assert ctx is not None
        model.backward(ctx, d_logprobs=d_logprobs, d_lse=d_lse, d_zbar=d_zbar)
        answers = np.where(pack.mask, pack.targets, np.int32(-1))
        metrics |= token_metrics(answers, num_tokens=num_tokens or 1, top1=out.top1, entropy=out.entropy)
        parts.append(metrics)
    return add_metrics(parts)


class _Run(Trainer[SFTConfig]):
    """The loop and its parts."""

    def __init__(
        self,
        folder: RunFolder,
        config: SFTConfig,
        demonstrations: Demonstrations,
        model: ModelProtocol,
        state: State,
        decisions: Decisions,
        cost: Cost,
        display: Display,
        callbacks: Sequence[Callback],
    ) -> None:
        encoder, train = demonstrations.encoder, demonstrations.train
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
            max_length=int(train.lengths().mean()),
            encoder=encoder,
            rules=rules(),
        )
        self.demonstrations = demonstrations
        longest = demonstrations.max_length - 1
        self.prompts = demonstrations.prompts(config.sample_prompts if config.sample_tokens else 0, longest)

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
        packs = self.demonstrations.batches.take(state.step)
        rate = self.learning_rate()
        self.model.zero_grad()
        metrics = _backward(self.model, config, packs, state.step)
        info = self.model.step(rate, clip_norm=config.max_grad_norm or None)
        self.count(metrics["loss"], info, sum(len(pack.tokens) for pack in packs), began)
        if self.due(config.logging_steps):
            epoch = state.step / self.demonstrations.batches.steps_per_epoch
            shown = {name: metrics[name] for name in ("nll_loss", "mean_token_accuracy", "entropy", "num_dropped")}
            self.log(epoch, info.grad_norm, rate, **shown)

    def evaluate(self) -> None:
        """Held-out loss and answers; the best weights so far go to the top of the run's folder. Given up when asked to stop."""
        state = self.state
        began = time.perf_counter()
        measured: dict[str, float] = {}
        if len(self.demonstrations.held_out):
            held_out = self.held_out_metrics()
            if held_out is None:
                return
            measured |= held_out
        self.pace.evaluation_took(time.perf_counter() - began)
        if self.prompts:
            measured["eval_eos_rate"] = self.answer()
        took_s = time.perf_counter() - began
        metrics = {"step": state.step, "tokens": state.tokens, **measured, "time/evaluation_s": took_s}
        if "eval_loss" in measured:
            accuracy = 100 * measured["eval_mean_token_accuracy"]
            self.display.say(
                f"step {state.step}  held-out loss {measured['eval_loss']:.4f}  token accuracy {accuracy:.1f} %"
                + (f"  answers ended {100 * measured['eval_eos_rate']:.0f} %" if self.prompts else "")
            )
            self.measured(measured["eval_loss"], metrics)
        elif measured:
            self.record(metrics)
        state.evaluated_step = state.step
        self.notify(lambda callback, view: callback.on_evaluate(view, metrics))

    def held_out_metrics(self) -> dict[str, float] | None:
        """Means over the held-out answers' tokens, of all and of each file; None where it was interrupted."""
        demonstrations, names = self.demonstrations, self.demonstrations.sources
        # Of each file: tokens, summed loss, tokens that were the likeliest, summed entropy.
        sums = np.zeros((4, len(names)))
        for pack in demonstrations.held_out_packs(self.config.seed, self.decisions.eval_batches):
            if self.stop.requested:
                return None
            _, out = self.model.forward(
                pack.tokens, pack.offsets, pack.targets, want=("logprobs", "top1", "entropy"), train=False
            )
            counted = pack.targets >= 0
            # One sequence a row.
            file = np.repeat(demonstrations.held_out_sources[pack.members], np.diff(pack.offsets))[counted]
            values_of = (np.ones(len(counted)), -out.logprobs, out.top1, out.entropy)
            for row, values in enumerate(values_of):
                sums[row] += np.bincount(file, np.asarray(values, np.float64)[counted], minlength=len(names))
            # A sign of life where this takes long.
            self.display.update(self.pace.status(self.state.step, None, self.state.eval_loss))
        metrics: dict[str, float] = {}
        parts = [("eval", sums.sum(axis=1))]
        if len(names) > 1:
            parts += [(f"eval_{name}", sums[:, number]) for number, name in enumerate(names)]
        for prefix, (count, loss, right, entropy) in parts:
            if count:
                metrics[f"{prefix}_loss"] = float(loss / count)
                metrics[f"{prefix}_mean_token_accuracy"] = float(right / count)
                metrics[f"{prefix}_entropy"] = float(entropy / count)
        return metrics

    def answer(self) -> float:
        """Let the model answer held-out prompts, the same ones with the same random numbers each time; the share that it ends."""
        answers = generate(
            self.model,
            self.tokenizer,
            self.prompts,
            max_new_tokens=self.config.sample_tokens,
            temperature=self.config.sample_temperature,
            seed=self.config.seed,
            end_ids=self.demonstrations.encoder.end_ids,
        )
        for answer in answers:
            ended = answer.finish_reason != "length"
            self.record_sample(prompt=answer.prompt, completion=answer.text, ended=ended)
        self.show_sample(answers[0].prompt + answers[0].text)
        return sum(answer.finish_reason != "length" for answer in answers) / len(answers)

    def verdict(self) -> Verdict:
        """Of the weights that the folder holds."""
        demonstrations, max_tokens = self.demonstrations, self.config.sample_tokens
        return verdict_of(
            self.folder.metrics.read(),
            self.state.best_step,
            num_answers=len(self.prompts),
            max_tokens=max_tokens,
            within=share_within(
                demonstrations.held_out if len(demonstrations.held_out) else demonstrations.train, max_tokens
            ),
        )


_PHASE = RowsPhase(
    kind="sft",
    config=SFTConfig,
    shape=_base_shape,
    prepare=prepare_demonstrations,
    make_model=_make_model,
    decide=_decide,
    trainer=_Run,
)

resume = _PHASE.resume
