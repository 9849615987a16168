"""Rollouts: many sampled episodes with the exact log-probabilities of the policy that drew them.

Any number of episodes goes through a bounded number of decoder slots: finished ones leave at once, waiting ones take their place,
and the episodes of one prompt share its reading. Random numbers are keyed by (seed, episode id, position), so an episode does not
depend on the number of slots or threads, on the order, or on what shares the batch: an interrupted rollout is drawn again bit for bit.

The end token is an action like any other. An episode that is ended by its length instead is ``truncated``.

Shape legend: S episodes, N tokens of all of them, prompts included.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ingot.errors import ConfigError
from ingot.models.base import BoolArray, FloatArray, IntArray, LongArray, Sampling

if TYPE_CHECKING:
    from ingot.models.base import Model
    from ingot.tokenizer import Tokenizer

Progress: TypeAlias = Callable[[int, int], object]
"""Called with episodes done and in all, after every token. What it raises ends the sampling; the model is unharmed."""

MAX_SEQUENCES = 64
"""Decoder slots unless given."""

MISMATCH_ALARM = 5e-4
"""Mean difference, in nats, between log-probabilities of sampling and of training above which something is wrong."""

_PACK_TOKENS = 16384


@dataclasses.dataclass(frozen=True, eq=False)
class Episode:
    """One sampled answer."""

    episode_id: int
    group_id: int
    prompt_ids: IntArray
    """i32 [P]"""
    completion_ids: IntArray
    """The actions, i32 [T]; the last is the end token unless ``truncated``."""
    logprobs: FloatArray
    """Of the actions under softmax(logits / temperature) with banned ids masked, nats, f32 [T]. Without regard to top-k and the like."""
    entropy: FloatArray
    """Of that softmax at each action, nats, f32 [T]."""
    truncated: bool
    """Ended by its length, not by an end token."""


class EpisodeStream:
    """Episodes as they are finished, in no particular order. More can be submitted at any time, also between two of them.

    Parameters
    ----------
    model
        Its weights must not change while the stream is used.
    max_prompt_tokens
        Length of the longest prompt that will be submitted.
    max_new_tokens
        Most actions of an episode; fewer where the model's context ends before.
    end_ids
        Tokens that end an episode.
    sampling
        How actions are drawn.
    banned_ids
        Ids that are never drawn; training must mask the same.
    seed
        Of the random numbers.
    max_sequences
        Decoder slots: most episodes at a time. Changes speed and memory, not the result.

    Raises
    ------
    ConfigError
        A setting is out of range or does not fit another.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_prompt_tokens: int,
        max_new_tokens: int,
        end_ids: Collection[int],
        sampling: Sampling | None = None,
        banned_ids: Sequence[int] | IntArray | None = None,
        seed: int = 0,
        max_sequences: int = MAX_SEQUENCES,
    ) -> None:
        for name, value in (("max_new_tokens", max_new_tokens), ("max_sequences", max_sequences)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        vocab_size = model.config.vocab_size
        banned = {int(token) for token in (banned_ids if banned_ids is not None else ())}
        for end in sorted(end_ids):
            if not 0 <= end < vocab_size:
                raise ConfigError(f"end id {end} is no id of the model, which has {vocab_size}")
            if end in banned:
                raise ConfigError(
                    f"end id {end} is also banned, so that no episode could end with it: take it out of one"
                )
        self._context = model.config.max_position_embeddings
        self._max_new_tokens = max_new_tokens
        self._max_tokens = min(max_prompt_tokens + max_new_tokens, self._context)
        self._end_ids = frozenset(end_ids)
        self._sampling = sampling or Sampling()
        self._capacity = max_sequences
        self._decoder = model.decoder(
            max(2, self._max_tokens), max_sequences, seed=seed, banned_ids=np.array(sorted(banned), np.int32)
        )
        self._waiting: deque[_Waiting] = deque()
        self._active: dict[int, _Active] = {}
        self._finished: deque[Episode] = deque()
        self.num_submitted = 0
        """Episodes so far."""
        self.num_done = 0
        """Of these, episodes that are finished."""
        self.num_tokens = 0
        """Actions drawn so far."""

    def submit(
        self,
        prompt_ids: Sequence[int] | IntArray,
        episode_ids: Iterable[int],
        group_id: int = 0,
        *,
        before_others: bool = False,
    ) -> None:
        """Episodes with one prompt, which is read once for those that enter together; last in the queue, or first.

        Raises
        ------
        ConfigError
            The prompt is empty, or leaves no room for an action.
        """
        prompt = np.asarray(prompt_ids, np.int32)
        ids = deque(int(episode) for episode in episode_ids)
        if len(prompt) == 0:
            raise ConfigError(f"prompt {group_id} is empty: an episode begins with at least one token")
        if len(prompt) >= self._max_tokens:
            raise ConfigError(
                f"prompt {group_id} has {len(prompt)} tokens, which leaves no room to answer in {self._max_tokens} "
                f"(the model's context is {self._context}): shorten it or leave it out"
            )
        if ids:
            self.num_submitted += len(ids)
            waiting = _Waiting(prompt, ids, group_id)
            self._waiting.appendleft(waiting) if before_others else self._waiting.append(waiting)

    def __iter__(self) -> Iterator[Episode]:
        return self

    def __next__(self) -> Episode:
        while not self._finished:
            if not self.step():
                raise StopIteration
        return self._finished.popleft()

    def take(self) -> list[Episode]:
        """The episodes that were finished by :meth:`step` and not taken yet."""
        taken = list(self._finished)
        self._finished.clear()
        return taken

    @property
    def busy(self) -> bool:
        """Whether there is an episode to write or to take."""
        return bool(self._waiting or self._active or self._finished)

    def step(self) -> bool:
        """Draw one action for each episode that is being written; False where there is nothing left to draw."""
        self._admit()
        if not self._active:
            return False
        step = self._decoder.step()
        self.num_tokens += len(step.slots)
        drawn = zip(
            step.slots.tolist(), step.tokens.tolist(), step.logprobs.tolist(), step.entropy.tolist(), strict=True
        )
        for slot, token, logprob, entropy in drawn:
            episode = self._active[slot]
            episode.tokens.append(token)
            episode.logprobs.append(logprob)
            episode.entropy.append(entropy)
            ended = token in self._end_ids
            if ended or len(episode.tokens) == episode.room:
                self._decoder.remove(slot)
                del self._active[slot]
                self._finished.append(episode.finish(truncated=not ended))
                self.num_done += 1
        return True

    def _admit(self) -> None:
        """Fill the free slots. A prompt is read once for all its episodes that enter at the same time, so they wait for one another,
        but never for more than a quarter of the slots."""
        while self._waiting:
            first = self._waiting[0]
            free = self._capacity - len(self._active)
            if free < min(len(first.episode_ids), max(1, self._capacity // 4)):
                return
            room = min(self._max_new_tokens, self._context - len(first.prompt_ids))
            reader: int | None = None
            for _ in range(min(free, len(first.episode_ids))):
                episode_id = first.episode_ids.popleft()
                if reader is None:
                    slot = reader = self._decoder.add(first.prompt_ids, episode_id, self._sampling)
                else:
                    slot = self._decoder.fork(reader, episode_id)
                self._active[slot] = _Active(first.prompt_ids, episode_id, first.group_id, room)
            if not first.episode_ids:
                self._waiting.popleft()


@dataclasses.dataclass
class _Waiting:
    """Episodes of one prompt that have not begun."""

    prompt_ids: IntArray
    episode_ids: deque[int]
    group_id: int


@dataclasses.dataclass
class _Active:
    """An episode that is being written."""

    prompt_ids: IntArray
    episode_id: int
    group_id: int
    room: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    entropy: list[float] = dataclasses.field(default_factory=list)

    def finish(self, *, truncated: bool) -> Episode:
        return Episode(
            self.episode_id,
            self.group_id,
            self.prompt_ids,
            np.array(self.tokens, np.int32),
            # f32 came as f64: the way back is exact.
            np.array(self.logprobs, np.float32),
            np.array(self.entropy, np.float32),
            truncated,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Rollouts:
    """Episodes as a packed batch, ready for ``model.forward`` and the losses.

    Index t is the state "tokens up to t of this episode"; ``targets[t]``, ``logprobs[t]`` and ``entropy[t]`` speak of the action taken
    there. The first action of an episode is taken at the last token of its prompt; at its own last token none is.
    """

    tokens: IntArray
    """Prompt and actions of each episode, i32 [N]."""
    offsets: LongArray
    """Episode s is ``tokens[offsets[s]:offsets[s + 1]]``, i64 [S + 1]."""
    targets: IntArray
    """The action, -1 where none is taken, i32 [N]."""
    logprobs: FloatArray
    """ln of the probability with which it was drawn (behaviour policy), 0 where none is taken, f32 [N]."""
    entropy: FloatArray
    """Of the distribution it was drawn from, nats, 0 where none is taken, f32 [N]."""
    episode_ids: LongArray
    """i64 [S]"""
    group_ids: LongArray
    """Number of the prompt, i64 [S]; episodes of one group are neighbours."""
    prompt_lengths: LongArray
    """i64 [S]"""
    truncated: BoolArray
    """Ended by length, bool [S]."""
    temperature: float
    """Of the softmax; training must use the same."""
    banned_ids: IntArray
    """What was never drawn; training must mask the same, i32 [B]."""

    def __len__(self) -> int:
        return len(self.episode_ids)

    @property
    def mask(self) -> BoolArray:
        """Where an action is taken, bool [N]."""
        return self.targets >= 0

    @property
    def num_actions(self) -> LongArray:
        """Actions of each episode, i64 [S]."""
        return np.diff(self.offsets) - self.prompt_lengths

    def prompt_ids(self, number: int) -> IntArray:
        """Tokens of an episode's prompt."""
        start = self.offsets[number]
        return self.tokens[start : start + self.prompt_lengths[number]]

    def completion_ids(self, number: int) -> IntArray:
        """An episode's actions, the end token included."""
        return self.tokens[self.offsets[number] + self.prompt_lengths[number] : self.offsets[number + 1]]

    def rows_of(self, numbers: Sequence[int] | LongArray) -> LongArray:
        """Where the tokens of these episodes lie, in this order, i64."""
        chosen = np.asarray(numbers, np.int64)
        low, lengths = self.offsets[:-1][chosen], np.diff(self.offsets)[chosen]
        offsets = _offsets(lengths)
        return np.asarray(np.arange(int(offsets[-1])) + np.repeat(low - offsets[:-1], lengths), np.int64)

    def select(self, numbers: Sequence[int] | LongArray) -> Rollouts:
        """These episodes, in this order: a minibatch."""
        chosen = np.asarray(numbers, np.int64)
        rows = self.rows_of(chosen)
        return dataclasses.replace(
            self,
            offsets=_offsets(np.diff(self.offsets)[chosen]),
            **{name: getattr(self, name)[rows] for name in ("tokens", "targets", "logprobs", "entropy")},
            **{
                name: getattr(self, name)[chosen]
                for name in ("episode_ids", "group_ids", "prompt_lengths", "truncated")
            },
        )

    @classmethod
    def join(cls, parts: Sequence[Rollouts]) -> Rollouts:
        """Several rollouts of one policy as one, in this order."""
        names = ("tokens", "targets", "logprobs", "entropy", "episode_ids", "group_ids", "prompt_lengths", "truncated")
        joined: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return dataclasses.replace(
            parts[0], offsets=_offsets(np.concatenate([np.diff(part.offsets) for part in parts])), **joined
        )

    def metrics(self) -> dict[str, float]:
        """Lengths, in actions, and how episodes ended; names as in TRL's GRPO and PPO."""
        lengths, ended = self.num_actions, ~self.truncated
        if not len(self):
            return {}
        return {
            "completions/mean_length": float(lengths.mean()),
            "completions/min_length": float(lengths.min()),
            "completions/max_length": float(lengths.max()),
            "completions/mean_terminated_length": float(lengths[ended].mean()) if ended.any() else 0.0,
            "completions/clipped_ratio": float(self.truncated.mean()),
            "val/num_eos_tokens": float(np.count_nonzero(ended)),
            "entropy": float(self.entropy[self.mask].mean(dtype=np.float64)),
        }


def sample_rollouts(
    model: Model,
    prompts: Sequence[Sequence[int] | IntArray],
    *,
    num_generations: int = 1,
    max_new_tokens: int,
    end_ids: Collection[int],
    seed: int = 0,
    episode_ids: Sequence[int] | LongArray | None = None,
    sampling: Sampling | None = None,
    banned_ids: Sequence[int] | IntArray | None = None,
    max_sequences: int = MAX_SEQUENCES,
    progress: Progress | None = None,
) -> Rollouts:
    """Draw ``num_generations`` episodes for each prompt from the policy itself.

    Parameters
    ----------
    prompts
        Token ids, one prompt a group.
    episode_ids
        Names of the episodes, one for each (prompt, generation), prompts first; 0, 1, ... unless given. An episode is a function of
        the weights, its prompt, its id and ``seed``: give new ids in each rollout of a run.
    sampling
        Its temperature is that of the policy. Top-k, top-p and the like are refused.
    progress
        See :data:`Progress`.

    The other parameters are those of :class:`EpisodeStream`.

    Raises
    ------
    ConfigError
        A setting is out of range, would draw from another distribution than the one that is trained, or does not fit another.
    """
    sampling = sampling or Sampling()
    require_on_policy(sampling)
    if num_generations < 1:
        raise ConfigError(f"num_generations must be at least 1, got {num_generations}")
    count = len(prompts) * num_generations
    ids = np.arange(count, dtype=np.int64) if episode_ids is None else np.asarray(episode_ids, np.int64)
    if len(ids) != count:
        raise ConfigError(
            f"episode_ids has {len(ids)} entries, but {len(prompts)} prompts with {num_generations} generations are {count} episodes"
        )
    if len(np.unique(ids)) != count:
        raise ConfigError("episode_ids holds an id twice: the two episodes would draw the same random numbers")
    stream = EpisodeStream(
        model,
        max_prompt_tokens=max(map(len, prompts), default=1),
        max_new_tokens=max_new_tokens,
        end_ids=end_ids,
        sampling=sampling,
        banned_ids=banned_ids,
        seed=seed,
        max_sequences=min(max_sequences, max(1, count)) if max_sequences >= 1 else max_sequences,
    )
    for group, prompt in enumerate(prompts):
        stream.submit(prompt, ids[group * num_generations : (group + 1) * num_generations], group)
    while stream.step():
        if progress is not None:
            progress(stream.num_done, count)
    place = {int(episode): number for number, episode in enumerate(ids)}
    episodes = sorted(stream, key=lambda episode: place[episode.episode_id])
    return pack_episodes(episodes, temperature=sampling.temperature, banned_ids=banned_ids)


def require_on_policy(sampling: Sampling) -> None:
    """Refuse what draws from another distribution than the one that training differentiates.

    Raises
    ------
    ConfigError
        Names the setting.
    """
    if sampling.temperature == 0.0:
        raise ConfigError(
            "temperature 0 always takes the likeliest token and explores nothing: give a positive one, usually 1"
        )
    plain = Sampling(temperature=sampling.temperature)
    for name in ("top_k", "top_p", "min_p", "repetition_penalty"):
        value, neutral = getattr(sampling, name), getattr(plain, name)
        if value != neutral:
            raise ConfigError(
                f"{name} {value} draws from another distribution than the one that is trained, a bias that no figure shows: "
                f"leave {name} at {neutral} for reinforcement learning"
            )


def pack_episodes(
    episodes: Sequence[Episode], *, temperature: float = 1.0, banned_ids: Sequence[int] | IntArray | None = None
) -> Rollouts:
    """These episodes as one batch, in this order."""
    prompt_lengths = np.array([len(episode.prompt_ids) for episode in episodes], np.int64)
    counts = np.array([len(episode.completion_ids) for episode in episodes], np.int64)
    offsets = _offsets(prompt_lengths + counts)
    num_tokens = int(offsets[-1])
    tokens = np.empty(num_tokens, np.int32)
    targets = np.full(num_tokens, -1, np.int32)
    logprobs, entropy = np.zeros(num_tokens, np.float32), np.zeros(num_tokens, np.float32)
    for episode, start, begin, end in zip(
        episodes, offsets[:-1].tolist(), (offsets[:-1] + prompt_lengths).tolist(), offsets[1:].tolist(), strict=True
    ):
        tokens[start:begin] = episode.prompt_ids
        tokens[begin:end] = episode.completion_ids
        targets[begin - 1 : end - 1] = episode.completion_ids
        logprobs[begin - 1 : end - 1] = episode.logprobs
        entropy[begin - 1 : end - 1] = episode.entropy
    return Rollouts(
        tokens=tokens,
        offsets=offsets,
        targets=targets,
        logprobs=logprobs,
        entropy=entropy,
        episode_ids=np.array([episode.episode_id for episode in episodes], np.int64),
        group_ids=np.array([episode.group_id for episode in episodes], np.int64),
        prompt_lengths=prompt_lengths,
        truncated=np.array([episode.truncated for episode in episodes], np.bool_),
        temperature=temperature,
        banned_ids=np.array(sorted({int(token) for token in (banned_ids if banned_ids is not None else ())}), np.int32),
    )


def banned_ids_of(tokenizer: Tokenizer, vocab_size: int, end_ids: Collection[int]) -> IntArray:
    """Ids that an answer never holds: special tokens that end nothing (headers, padding), and rows of a padded vocabulary, i32."""
    special = set(tokenizer.special_tokens.values()) - set(end_ids)
    return np.array(sorted(special | set(range(tokenizer.vocab_size, vocab_size))), np.int32)


def as_read_by(model: Model, rollouts: Rollouts, tokenizer: Tokenizer, end_ids: Collection[int]) -> Rollouts:
    """The same answers for a model of the same tokenizer whose vocabulary may be padded otherwise than that of the one that drew them."""
    return dataclasses.replace(rollouts, banned_ids=banned_ids_of(tokenizer, model.config.vocab_size, end_ids))


# ---- the policy now, against the policy that sampled


def packs(rollouts: Rollouts, max_tokens: int = _PACK_TOKENS) -> Iterator[tuple[slice, slice]]:
    """Episodes that follow one another, as many as have ``max_tokens`` tokens together (at least one): slices of S and of N."""
    first = 0
    while first < len(rollouts):
        limit = int(rollouts.offsets[first]) + max_tokens
        last = max(first + 1, int(np.searchsorted(rollouts.offsets, limit, side="right")) - 1)
        yield slice(first, last), slice(int(rollouts.offsets[first]), int(rollouts.offsets[last]))
        first = last


def recompute_logprobs(model: Model, rollouts: Rollouts, *, max_tokens: int = _PACK_TOKENS) -> FloatArray:
    """ln pi(action) of each action by the forward pass of training, f32 [N]: the policy's own, or a reference model's.

    ``max_tokens`` bounds the tokens of a pass; it changes memory, not the result.
    """
    return recompute(model, rollouts, ("logprobs",), max_tokens=max_tokens)["logprobs"]


def recompute(
    model: Model, rollouts: Rollouts, want: Collection[str], *, max_tokens: int = _PACK_TOKENS
) -> dict[str, FloatArray]:
    """Outputs of the forward pass of training at each action, f32 [N] each: ``logprobs``, ``entropy``, ``values`` (of one head)."""
    found = {name: np.zeros(len(rollouts.tokens), np.float32) for name in want}
    # Values alone need no logits.
    targets = rollouts.targets if set(want) - {"values"} else np.full_like(rollouts.targets, -1)
    for episodes, rows in packs(rollouts, max_tokens):
        _, out = model.forward(
            rollouts.tokens[rows],
            rollouts.offsets[episodes.start : episodes.stop + 1] - rollouts.offsets[episodes.start],
            targets[rows],
            want=want,
            value_rows=rollouts.mask[rows] if "values" in want else None,
            temperature=rollouts.temperature,
            banned_ids=rollouts.banned_ids,
            train=False,
        )
        for name, values in found.items():
            values[rows] = out.arrays[name]
    return found


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """How far log-probabilities of sampling are from those of training."""

    mean: float
    """Mean absolute difference over actions, nats."""
    max: float
    """Largest absolute difference, nats."""
    num_different: int
    """Actions whose two numbers differ in any bit; 0 on the native backend."""
    num_actions: int

    @property
    def alarm(self) -> str | None:
        """What to say where the mean is above :data:`MISMATCH_ALARM` or no number; None where all is well."""
        if self.mean <= MISMATCH_ALARM:
            return None
        return (
            f"log-probabilities of sampling and of training differ by {self.mean:.2g} nats on average (at most {self.max:.2g}), "
            f"more than {MISMATCH_ALARM:g}: updates are off-policy without a sign; are the weights those that sampled, "
            "temperature and banned ids the same, dropout off, and the precision of both the same?"
        )

    def metrics(self) -> dict[str, float]:
        """Names as in TRL's GRPO."""
        return {
            "sampling/sampling_logp_difference/mean": self.mean,
            "sampling/sampling_logp_difference/max": self.max,
        }


def logprob_mismatch(rollouts: Rollouts, logprobs: FloatArray) -> Mismatch:
    """Compare the rollout's log-probabilities with those that :func:`recompute_logprobs` gave for the same weights."""
    then, now = rollouts.logprobs[rollouts.mask], np.asarray(logprobs, np.float32)[rollouts.mask]
    difference = np.abs(then.astype(np.float64) - now)
    different = int(np.count_nonzero(then.view(np.uint32) != now.view(np.uint32)))
    if not len(then):
        return Mismatch(0.0, 0.0, 0, 0)
    return Mismatch(float(difference.mean()), float(difference.max()), different, len(then))


def _offsets(lengths: LongArray) -> LongArray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
