"""Scores of whole responses by a reward model: for best of n, for rollouts, and as a judge.

A response's score is ``gain * value + bias`` of the scalar head at its last token, which is the end of its turn: where a response was
cut off without one, the end is put behind it. Each criterion that the model was trained on (helpful, harmless) has a head of its own.

A process reward model scores each step of a response at the step's last token, which is that of its separator; the score of the whole
is made of these (:func:`ingot.losses.reward.aggregate_steps`).

Shape legend: n responses, k criteria, N tokens of a packed batch, S sequences, E ends (places where one is scored), T steps of a response.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from ingot.data.chat import ChatEncoder, ChatTemplate, Encoded
from ingot.data.examples import assemble_pack
from ingot.data.rows import Content, Message
from ingot.data.steps import encode_steps, split_steps, with_step_ends
from ingot.errors import ConfigError, DataError
from ingot.losses.numerics import Float64, f64
from ingot.losses.reward import STEP_AGGREGATES, StepAggregate, aggregate_steps
from ingot.models import load_model
from ingot.models.adapters import write_adapter
from ingot.models.base import FloatArray, IntArray, LongArray
from ingot.models.hf import CONFIG_FILE, open_folder, write_scorer
from ingot.models.tables import LazyArrays
from ingot.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ingot.configs import ModelConfig
    from ingot.models.base import Model
    from ingot.models.sharing import SharedBase

UNNAMED = "reward"
"""The criterion of a model that was trained on judgements without one."""

Progress: TypeAlias = Callable[[int, int], object]
"""Called with responses done and in all."""

_PACK_TOKENS = 16384


class _TooLongError(DataError):
    """A response is longer than the context."""


class RewardModel:
    """A model with scalar heads, and how text becomes its tokens.

    Parameters
    ----------
    model
        With as many scalar heads as ``criteria``. Its weights may go on changing.
    encoder
        The chat template and tokenizer that it was trained with.
    criteria
        Names of the heads.
    gain, bias
        [k]: make scores of the heads' values; 1 and 0 unless given.
    weights
        What each criterion counts in :meth:`score`; those that are not named count 0. The mean of all unless given.
    name
        For messages to people and as the name of a reward.
    step_separator
        Of a process reward model: ends each step.
    step_aggregate
        How the score of a whole response is made of those of its steps.

    Raises
    ------
    ConfigError
        ``weights`` names no criterion of the model, or holds no finite number.
    """

    def __init__(
        self,
        model: Model,
        encoder: ChatEncoder,
        criteria: Sequence[str] = (UNNAMED,),
        *,
        gain: npt.ArrayLike | None = None,
        bias: npt.ArrayLike | None = None,
        weights: Mapping[str, float] | None = None,
        name: str = "the reward model",
        step_separator: str | None = None,
        step_aggregate: StepAggregate = "last",
    ) -> None:
        if model.num_values != len(criteria):
            raise ValueError(f"the model has {model.num_values} scalar heads, but {len(criteria)} criteria are named")
        self.model = model
        self.encoder = encoder
        self.criteria = tuple(criteria)
        self.name = self.__name__ = name
        self.step_separator = step_separator
        self.step_aggregate = step_aggregate
        self.gain = np.ones(len(self.criteria)) if gain is None else f64(gain)
        self.bias = np.zeros(len(self.criteria)) if bias is None else f64(bias)
        self.weights = self._weights(weights)
        """What each criterion counts in :meth:`score`, f64 [k]."""

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        weights: Mapping[str, float] | None = None,
        step_aggregate: StepAggregate = "last",
        base: SharedBase | None = None,
        **place: Any,
    ) -> RewardModel:
        """The reward model in a folder; ``FOLDER:CRITERION`` is one with that criterion's head alone counting.

        Of a process reward model ``FOLDER:last``, ``FOLDER:min`` and ``FOLDER:product`` say how steps are put together, as ``step_aggregate``
        does.

        Where the folder's run trained an adapter on the weights of ``base``, the model is ``base`` with that adapter: no weights are loaded
        but the adapter's. Otherwise it is the network in the folder, at ``place``.

        ``place`` are ``backend``, ``device``, ``threads``, ``level`` and ``precision`` of :func:`ingot.load_model`.

        Raises
        ------
        ConfigError
            The folder holds a model without scores, or no such criterion.
        CheckpointError, DataError
            There is no model, it is damaged, or its tokenizer and template do not fit together.
        """
        path, criterion = split_name(str(folder))
        saved = open_folder(path)
        if saved.labels is None and saved.num_values:
            raise ConfigError(
                f"{path}: holds a network in training, whose scalar heads are not yet brought to a scale: give the folder of its run"
            )
        if saved.labels is None:
            raise ConfigError(
                f"{path}: holds a model that writes, not one that scores: give the folder of a reward model (ingot reward makes one)"
            )
        if saved.step_separator is not None and criterion in STEP_AGGREGATES and criterion not in saved.labels:
            step_aggregate, suffix, criterion = cast("StepAggregate", criterion), f":{criterion}", None
        else:
            suffix = f":{criterion}" if criterion else ""
        if criterion is not None:
            if weights is not None:
                raise ConfigError(f"{folder}: names a criterion, and weights are given too: give one of them")
            weights = {criterion: 1.0}
        encoder = ChatEncoder(ChatTemplate.of_model(path), Tokenizer.from_file(path))
        if encoder.tokenizer.vocab_size > saved.config.vocab_size:
            raise ConfigError(
                f"{path}: the tokenizer has {encoder.tokenizer.vocab_size} tokens but the model only {saved.config.vocab_size}: "
                "they do not belong together"
            )
        shared = None if base is None else base.adapted(Path(path), saved.config)
        model = load_model(path, **place) if shared is None else shared
        return cls(
            model,
            encoder,
            saved.labels,
            weights=weights,
            name=Path(path).resolve().name + suffix,
            step_separator=saved.step_separator,
            step_aggregate=step_aggregate,
        )

    @property
    def config(self) -> ModelConfig:
        """The network's shape."""
        return self.model.config

    def _weights(self, weights: Mapping[str, float] | None) -> Float64:
        if weights is None:
            return np.full(len(self.criteria), 1.0 / len(self.criteria))
        for criterion, weight in weights.items():
            if criterion not in self.criteria:
                raise ConfigError(f"{self.name}: scores {', '.join(self.criteria)}, not {criterion!r}")
            if not np.isfinite(weight):
                raise ConfigError(f"{self.name}: the weight of {criterion} is {weight}: give a finite number")
        return np.array([weights.get(criterion, 0.0) for criterion in self.criteria], np.float64)

    # ---- text

    def score(
        self, prompts: Sequence[Content], completions: Sequence[Content], progress: Progress | None = None
    ) -> Float64:
        """Score of each completion after its prompt, f64 [n]: the criteria's scores by :attr:`weights`.

        Parameters
        ----------
        prompts
            Text or messages.
        completions
            In the form of their prompts; text after messages is the assistant's message.
        progress
            See :data:`Progress`.

        Raises
        ------
        DataError
            A prompt with its completion is longer than the model's context, or the template cannot write it.
        """
        return self.score_each(prompts, completions, progress) @ self.weights

    def score_each(
        self, prompts: Sequence[Content], completions: Sequence[Content], progress: Progress | None = None
    ) -> Float64:
        """The same for each criterion, f64 [n, k]."""
        if len(prompts) != len(completions):
            raise ValueError(f"{len(completions)} completions for {len(prompts)} prompts")
        return self._scores(self._encoded_all(prompts, completions), progress)

    def score_steps(
        self,
        prompts: Sequence[Content],
        completions: Sequence[Content | Sequence[str]],
        progress: Progress | None = None,
    ) -> list[Float64]:
        """Scores of the steps of each completion, f64 [T] each: the log odds that a step is right, as a process reward model learnt them.

        Parameters
        ----------
        prompts
            Text or messages.
        completions
            The steps, as a list of texts; or as :meth:`score` takes them, to be divided at the separator. T is what :func:`ingot.data.steps.split_steps`
            finds, at least 1.

        Raises
        ------
        ConfigError
            The model scores whole responses.
        DataError
            As :meth:`score`.
        """
        if self.step_separator is None:
            raise ConfigError(
                f"{self.name}: scores whole responses, not steps: train one on rows with steps and labels"
            )
        encoded = self._encoded_all(prompts, completions)
        ends = np.cumsum([len(each.ends) for each in encoded])[:-1]
        return [f64(each) for each in np.split(self.score_ends_each(encoded, progress) @ self.weights, ends)]

    def __call__(self, prompts: Sequence[Content], completions: Sequence[Content]) -> list[float | None]:
        """As a reward function, with nothing to say about what is longer than the model's context."""
        if len(prompts) != len(completions):
            raise ValueError(f"{len(completions)} completions for {len(prompts)} prompts")
        fitting: dict[int, Encoded] = {}
        for number, each in enumerate(zip(prompts, completions, strict=True)):
            with contextlib.suppress(_TooLongError):
                fitting[number] = self._encoded(*each, number)
        scores = self._scores(list(fitting.values())) @ self.weights
        said = dict(zip(fitting, scores.tolist(), strict=True))
        return [said.get(number) for number in range(len(prompts))]

    def _encoded_all(self, prompts: Sequence[Content], completions: Sequence[Content | Sequence[str]]) -> list[Encoded]:
        if len(prompts) != len(completions):
            raise ValueError(f"{len(completions)} completions for {len(prompts)} prompts")
        return [self._encoded(*each, n) for n, each in enumerate(zip(prompts, completions, strict=True))]

    def _encoded(self, prompt: Content, completion: Content | Sequence[str], number: int) -> Encoded:
        try:
            return self._fitting(self._unchecked(prompt, completion))
        except DataError as error:
            kind = _TooLongError if isinstance(error, _TooLongError) else DataError
            raise kind(f"{self.name}: response {number} cannot be scored: {error}") from None

    def _unchecked(self, prompt: Content, completion: Content | Sequence[str]) -> Encoded:
        if self.step_separator is not None:
            prompt, steps = _in_steps(prompt, completion, self.step_separator)
            return encode_steps(prompt, steps, self.encoder, self.step_separator)
        if isinstance(prompt, str):
            if not isinstance(completion, str):
                raise DataError("the completion is a list of messages, but the prompt is text")
            return self.encoder.encode_text(completion, prompt)
        answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        return self.encoder.encode([*prompt, *cast("list[Message]", answer)], first_trained=len(prompt))

    def _fitting(self, sequence: Encoded) -> Encoded:
        context = self.model.config.max_position_embeddings
        if len(sequence) == context + 1 and self.step_separator is None:
            # As score_tokens has it: a response that fills the context ends in its last place.
            return _ended(np.append(sequence.ids[: context - 1], sequence.ids[-1]))
        if len(sequence) > context:
            raise _TooLongError(
                f"it has {len(sequence)} tokens with its prompt, and the model's context is {context}: shorten it or leave it out"
            )
        return sequence

    # ---- tokens

    def require_tokens_of(self, encoder: ChatEncoder | Tokenizer, source: str) -> None:
        """Refuse token ids of another tokenizer, or (where an encoder is given) dialogues by another template.

        Raises
        ------
        ConfigError
            Says whose differ and what to do.
        """
        tokenizer = encoder.tokenizer if isinstance(encoder, ChatEncoder) else encoder
        if tokenizer.hash != self.encoder.tokenizer.hash:
            raise ConfigError(
                f"{self.name}: its tokenizer ({self.encoder.tokenizer.vocab_size} tokens) is not that of {source} "
                f"({tokenizer.vocab_size} tokens), so that it would read other text: train a reward model from {source} (ingot reward --model {source})"
            )
        if isinstance(encoder, ChatEncoder) and encoder.template.hash != self.encoder.template.hash:
            raise ConfigError(
                f"{self.name}: its chat template is not that of {source}: train a reward model from {source} (ingot reward --model {source})"
            )

    def score_tokens(
        self,
        tokens: IntArray,
        offsets: LongArray,
        *,
        end_id: int | None = None,
        prompt_lengths: LongArray | None = None,
    ) -> Float64:
        """Score of each sequence of a packed batch, prompt and response, f64 [S]: what :meth:`score` gives for the same text.

        Parameters
        ----------
        tokens, offsets
            i32 [N], i64 [S + 1], of the same tokenizer (:meth:`require_tokens_of`), such as those of
            :class:`ingot.training.rollouts.Rollouts`.
        end_id
            Put behind a sequence whose last token ends nothing; the end of a turn unless given. For plain text it is
            ``encoder.text_end_id``. Where such a sequence already fills the model's context, it takes its last token's place. A process
            reward model reads no end: an answer without a separator behind its last step gets one there.
        prompt_lengths
            Tokens of each prompt, i64 [S]: what a process reward model finds the steps by; others do without. Only where the last step
            is what counts may they be left out.

        Raises
        ------
        DataError
            A sequence is empty, or longer than the model's context.
        """
        return self.score_tokens_each(tokens, offsets, end_id=end_id, prompt_lengths=prompt_lengths) @ self.weights

    def score_tokens_each(
        self,
        tokens: IntArray,
        offsets: LongArray,
        *,
        end_id: int | None = None,
        prompt_lengths: LongArray | None = None,
    ) -> Float64:
        """The same for each criterion, f64 [S, k]."""
        end = self.encoder.end_of_turn_id if end_id is None else end_id
        context = self.model.config.max_position_embeddings
        if self.step_separator is not None and prompt_lengths is None and self.step_aggregate != "last":
            raise ValueError(f"steps are put together by {self.step_aggregate}: give prompt_lengths")
        sequences = []
        for number, (low, high) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
            ids = tokens[low:high]
            if not 0 < len(ids) <= context:
                raise DataError(
                    f"{self.name}: sequence {number} has {len(ids)} tokens; a score needs 1 to {context} of them"
                )
            ended = int(ids[-1]) in self.encoder.end_ids
            if self.step_separator is not None:
                first = 0 if prompt_lengths is None else int(prompt_lengths[number])
                ids = ids[:-1] if ended else ids
                sequences.append(
                    with_step_ends(ids, first, self.encoder.tokenizer, self.step_separator, max_length=context)
                )
                continue
            if not ended:
                ids = np.append(ids[: context - 1], np.int32(end))
            sequences.append(_ended(np.asarray(ids, np.int32)))
        return self._scores(sequences)

    def score_ids_each(self, sequences: Sequence[IntArray], progress: Progress | None = None) -> Float64:
        """The heads' scores at the last token of each of these sequences as they are, f64 [n, k]."""
        return self.score_ends_each([_ended(each) for each in sequences], progress)

    def score_ends_each(self, sequences: Sequence[Encoded], progress: Progress | None = None) -> Float64:
        """The heads' scores at every end of these sequences, in their order, f64 [E, k]."""
        scores = [np.empty((0, len(self.criteria)))]
        for first, last in _packs([len(each) for each in sequences]):
            scores.append(end_values(self.model, sequences[first:last]))
            if progress is not None:
                progress(last, len(sequences))
        return self.gain * np.concatenate(scores) + self.bias

    def _scores(self, sequences: Sequence[Encoded], progress: Progress | None = None) -> Float64:
        """Of whole responses, f64 [n, k]."""
        scores = self.score_ends_each(sequences, progress)
        offsets = np.concatenate([[0], np.cumsum([len(each.ends) for each in sequences], dtype=np.int64)])
        return aggregate_steps(scores, offsets, self.step_aggregate)

    # ---- files

    def save(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` as transformers' ``*ForSequenceClassification``, gain and bias folded in."""
        state = self._scaled(self.model.merged_state())
        write_scorer(
            folder,
            self.model.config,
            state,
            labels=self.criteria,
            pad_token_id=self.encoder.pad_token_id,
            step_separator=self.step_separator,
        )

    @property
    def active_adapter(self) -> str | None:
        """The model's."""
        return self.model.active_adapter

    def save_adapter(self, name: str, folder: str | Path) -> None:
        """Write an adapter of the model as peft does, gain and bias folded into its heads."""
        adapter = self.model.adapters[name]
        write_adapter(Path(folder), adapter, self.model.config, self._scaled(adapter.state()))

    def _scaled(self, state: Mapping[str, FloatArray]) -> Mapping[str, FloatArray]:
        """Weights whose heads say scores."""
        weight = (self.gain[:, None] * state["score.weight"]).astype(np.float32)
        bias = (self.gain * state["score.bias"] + self.bias).astype(np.float32)
        heads = {"score.weight": weight, "score.bias": bias}
        return LazyArrays(state, lambda name: heads[name] if name in heads else state[name])


def end_values(model: Model, sequences: Sequence[Encoded]) -> Float64:
    """Values of the scalar heads at every end of these sequences, f64 [E, k], in one pass."""
    pack = assemble_pack([[each] for each in sequences])
    _, out = model.forward(
        pack.tokens,
        pack.offsets,
        np.full(len(pack.tokens), -1, np.int32),
        want=("values",),
        value_rows=pack.value_rows,
        train=False,
    )
    return f64(out.values[pack.value_rows]).reshape(-1, model.num_values)


def _ended(ids: IntArray) -> Encoded:
    """A sequence that is scored at its last token."""
    return Encoded(ids, np.ones(len(ids), np.bool_), (len(ids) - 1,))


def _in_steps(prompt: Content, completion: Content | Sequence[str], separator: str) -> tuple[Content, Sequence[str]]:
    """A prompt with all but the last message of an answer, and the steps of that."""
    if isinstance(completion, str):
        return prompt, split_steps(completion, separator)
    if all(isinstance(each, str) for each in completion):
        if not completion:
            raise DataError("it has no step")
        return prompt, cast("Sequence[str]", completion)
    if isinstance(prompt, str):
        raise DataError("the completion is a list of messages, but the prompt is text")
    messages = cast("list[Message]", completion)
    return [*prompt, *messages[:-1]], split_steps(messages[-1]["content"], separator)


def is_reward_folder(name: str) -> bool:
    """Whether ``name``, or what stands before its last colon, is a folder with a model."""
    return (Path(split_name(name)[0]) / CONFIG_FILE).is_file()


def split_name(name: str) -> tuple[str, str | None]:
    """Folder and criterion of ``FOLDER`` or ``FOLDER:CRITERION``."""
    folder, colon, criterion = name.rpartition(":")
    if colon and criterion and not Path(name).is_dir() and Path(folder).is_dir():
        return folder, criterion
    return name, None


def _packs(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of sequences that follow one another with at most so many tokens together (at least one sequence)."""
    first = total = 0
    for number, length in enumerate(lengths):
        if total and total + length > _PACK_TOKENS:
            yield first, number
            first, total = number, 0
        total += length
    if total:
        yield first, len(lengths)
