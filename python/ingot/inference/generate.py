"""Generation: prompts in, continuations out, many at once.

Everything here is a loop over a decoder: sequences that are finished leave it and waiting ones take their place, so the batch stays
full. Random numbers are keyed by (seed, prompt, sample, position): a sample does not depend on what else is being written.
"""

from __future__ import annotations

import codecs
import dataclasses
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from ingot.errors import ConfigError
from ingot.models.base import Sampling

if TYPE_CHECKING:
    from ingot.models.base import Decoder, Model
    from ingot.tokenizer import Tokenizer

FinishReason: TypeAlias = Literal["end_of_text", "stop", "length"]
OnToken: TypeAlias = Callable[[int, int, str], object]
Prompt: TypeAlias = str | Sequence[int]

_BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Completion:
    """One continuation of a prompt."""

    prompt: str
    """The prompt as text."""
    text: str
    """What was written, without the end-of-text token or the stop string that ended it. Bytes that are no UTF-8 become U+FFFD."""
    token_ids: list[int]
    """The tokens drawn, those that ended it included."""
    logprobs: list[float]
    """Their log-probabilities under the full softmax at the sampling temperature (at temperature 1 where it is 0), nats."""
    finish_reason: FinishReason
    """``end_of_text``: the model ended the document, or its turn; ``stop``: a stop string appeared; ``length``: ``max_new_tokens`` were written."""


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    num_samples: int = 1,
    seed: int = 0,
    stop_at_end_of_text: bool = True,
    end_ids: Collection[int] = (),
    batch_size: int = _BATCH_SIZE,
    on_token: OnToken | None = None,
) -> list[Completion]:
    """Continue each prompt ``num_samples`` times.

    Parameters
    ----------
    prompts
        Texts, or sequences of token ids. A text is ordinary text, whatever special tokens it spells; where the tokenizer has an
        end-of-text token, it stands before the text, as it does in training. Ids are taken as they are.
    max_new_tokens
        Most tokens of a continuation. A model with learned positions that has used them up goes on from the second half of its context.
    temperature, top_k, top_p, min_p, repetition_penalty
        See :class:`ingot.Sampling`.
    stop
        Strings that end a continuation where they appear.
    seed
        The same seed gives the same sample for a (prompt, its index, sample number), whatever is generated beside it.
    stop_at_end_of_text
        Whether the end-of-text token ends a continuation.
    end_ids
        Other tokens that end one, such as the end of a turn (:attr:`ingot.data.chat.ChatEncoder.end_ids`).
    batch_size
        Most sequences at a time. Changes speed and memory, not the result.
    on_token
        Called with (index of the prompt, number of the sample, new text) as text becomes final.

    Returns
    -------
    list of Completion
        The samples of the first prompt, then those of the second, and so on.

    Raises
    ------
    ConfigError
        A setting is out of its range, a prompt is empty where the tokenizer has no end-of-text token to begin with, a prompt leaves
        no room in the model's learned positions, or the tokenizer does not belong to the model.
    """
    if isinstance(prompts, str):
        raise ConfigError("prompts takes a list of prompts: write [prompt] for one")
    if num_samples < 1:
        raise ConfigError(f"num_samples must be at least 1, got {num_samples}")
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    writing = _Writing(model, tokenizer, sampling, max_new_tokens, stop, seed, stop_at_end_of_text, end_ids)
    jobs = [job for index, prompt in enumerate(prompts) for job in writing.jobs(prompt, index, range(num_samples))]
    for job, piece in writing.run(jobs, batch_size):
        if on_token is not None and piece:
            on_token(job.prompt_index, job.sample_index, piece)
    return [job.completion() for job in jobs]


def stream(
    model: Model,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    sample_index: int = 0,
    seed: int = 0,
    stop_at_end_of_text: bool = True,
    end_ids: Collection[int] = (),
) -> Iterator[str]:
    """Continue one prompt and yield the text as it becomes final.

    The pieces together are the text of sample ``sample_index`` of :func:`generate` for this prompt alone. Bytes of a character that is
    not complete, and text that may be the beginning of a stop string, are held back until they are decided. Parameters and errors
    are those of :func:`generate`; errors in the settings are raised here, not at the first piece.
    """
    if sample_index < 0:
        raise ConfigError(f"sample_index must be 0 or more, got {sample_index}")
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    writing = _Writing(model, tokenizer, sampling, max_new_tokens, stop, seed, stop_at_end_of_text, end_ids)
    jobs = writing.jobs(prompt, 0, [sample_index])
    return (piece for _, piece in writing.run(jobs, 1) if piece)


class _Job:
    """One continuation: what it starts from, and what is written so far."""

    def __init__(self, prompt: str, prompt_ids: list[int], prompt_index: int, sample_index: int, room: int) -> None:
        self.prompt = prompt
        self.prompt_ids = prompt_ids
        self.prompt_index = prompt_index
        self.sample_index = sample_index
        self.room = room
        self.window = 0
        self.context = list(prompt_ids)
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: FinishReason | None = None
        self.text = ""
        self._given = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def sequence_id(self) -> int:
        """Key of the random numbers: the sample's number for the first prompt, whatever the number of samples.

        Positions begin again where the context was moved on, so the number of moves belongs to the key.
        """
        return self.window << 52 | self.prompt_index << 32 | self.sample_index

    def move_on(self, limit: int) -> None:
        """Keep the second half of a full context of ``limit`` tokens, so that there is room to write on."""
        self.window += 1
        self.context = self.context[-max(1, limit // 2) :]

    def completion(self) -> Completion:
        """The result, once it is finished."""
        assert self.finish_reason is not None
        return Completion(self.prompt, self.text, self.token_ids, self.logprobs, self.finish_reason)

    def write(self, new: bytes, stop: Sequence[str]) -> None:
        """Append the bytes of a token; finish where a stop string is complete."""
        # A stop string may begin before the new text, but not end before it.
        overlap = max((len(string) for string in stop), default=1) - 1
        start = max(0, len(self.text) - overlap)
        self.text += self._decoder.decode(new)
        ends = [place for place in (self.text.find(string, start) for string in stop) if place >= 0]
        if ends:
            self.text = self.text[: min(ends)]
            self.finish_reason = "stop"

    def finish(self, reason: FinishReason) -> None:
        """End here; an incomplete character becomes U+FFFD."""
        self.finish_reason = reason
        self.text += self._decoder.decode(b"", final=True)

    def final_piece(self, stop: Sequence[str]) -> str:
        """The text that became final since the last call."""
        end = len(self.text)
        if self.finish_reason is None:
            end -= max((_overlap(self.text, string) for string in stop), default=0)
        piece = self.text[self._given : end]
        self._given = max(self._given, end)
        return piece


class _Writing:
    """Settings of one call, checked, and the loop over the decoder."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        sampling: Sampling,
        max_new_tokens: int,
        stop: str | Sequence[str],
        seed: int,
        stop_at_end_of_text: bool,
        end_ids: Collection[int],
    ) -> None:
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self.stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self.stop:
            raise ConfigError("a stop string is empty: it would end every text at once")
        vocab_size = model.config.vocab_size
        if tokenizer.vocab_size > vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} tokens but the model only {vocab_size}: they do not belong together"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        ends = (tokenizer.eos_token_id if stop_at_end_of_text else None, *end_ids)
        self.ends = frozenset(end for end in ends if end is not None)
        # A model with learned positions has none beyond these.
        self.limit = model.config.max_position_embeddings if model.config.position == "learned" else None
        # Ids that a padded vocabulary has beyond the tokenizer's: they have no text.
        self.banned_ids = np.arange(tokenizer.vocab_size, vocab_size, dtype=np.int32)

    def jobs(self, prompt: Prompt, index: int, samples: Sequence[int]) -> list[_Job]:
        """The samples of one prompt."""
        text, ids = self._encode(prompt, index)
        if self.limit is not None and len(ids) >= self.limit:
            raise ConfigError(
                f"prompt {index} has {len(ids)} tokens, which leaves no room in the model's "
                f"{self.limit} learned positions: shorten it"
            )
        return [_Job(text, ids, index, sample, self.max_new_tokens) for sample in samples]

    def _encode(self, prompt: Prompt, index: int) -> tuple[str, list[int]]:
        begin = self.tokenizer.eos_token_id
        if isinstance(prompt, str):
            ids = self.tokenizer.encode_ordinary(prompt)
            ids = ids if begin is None else [begin, *ids]
            text = prompt
        else:
            ids = [int(token) for token in prompt]
            text = self.tokenizer.decode(ids)
        if not ids:
            raise ConfigError(
                f"prompt {index} is empty, and the tokenizer has no end-of-text token to begin with: give a prompt"
            )
        return text, ids

    def run(self, jobs: Sequence[_Job], batch_size: int) -> Iterator[tuple[_Job, str]]:
        """Write all jobs; after each step the jobs that gained a token, with the text that became final."""
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        if not jobs:
            return iter(())
        decoder = self.model.decoder(
            min(max(len(job.prompt_ids) + job.room for job in jobs), self.limit or sys.maxsize),
            min(batch_size, len(jobs)),
            seed=self.seed,
            banned_ids=self.banned_ids,
        )
        return self._steps(decoder, deque(jobs), min(batch_size, len(jobs)))

    def _steps(self, decoder: Decoder, waiting: deque[_Job], capacity: int) -> Iterator[tuple[_Job, str]]:
        active: dict[int, _Job] = {}
        while waiting or active:
            self._admit(decoder, waiting, active, capacity)
            step = decoder.step()
            drawn = zip(step.slots.tolist(), step.tokens.tolist(), step.logprobs.tolist(), strict=True)
            for slot, token, logprob in drawn:
                job = active[slot]
                self._take(job, token, logprob)
                if job.finish_reason is not None:
                    decoder.remove(slot)
                    del active[slot]
                elif len(job.context) == self.limit:
                    decoder.remove(slot)
                    del active[slot]
                    job.move_on(self.limit)
                    active[decoder.add(job.context, job.sequence_id, self.sampling)] = job
                yield job, job.final_piece(self.stop)

    def _admit(self, decoder: Decoder, waiting: deque[_Job], active: dict[int, _Job], capacity: int) -> None:
        """Fill the free slots. Samples of one prompt that enter together share its reading."""
        reader: tuple[int, int] | None = None
        while waiting and len(active) < capacity:
            job = waiting.popleft()
            if reader is not None and reader[0] == job.prompt_index:
                slot = decoder.fork(reader[1], job.sequence_id)
            else:
                slot = decoder.add(job.prompt_ids, job.sequence_id, self.sampling)
                reader = (job.prompt_index, slot)
            active[slot] = job

    def _take(self, job: _Job, token: int, logprob: float) -> None:
        job.token_ids.append(token)
        job.context.append(token)
        job.logprobs.append(logprob)
        if token in self.ends:
            job.finish("end_of_text")
            return
        job.write(self.tokenizer.token_bytes(token), self.stop)
        if job.finish_reason is None and len(job.token_ids) == job.room:
            job.finish("length")


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of ``text`` that ``string`` begins with (and goes on after)."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)
