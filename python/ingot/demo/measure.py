"""What a model has learned of the small world, in figures.

Index legend: N tokens of a packed batch, D documents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ingot import world
from ingot.inference.generate import generate

if TYPE_CHECKING:
    from ingot.models.base import Model
    from ingot.tokenizer import Tokenizer

_BATCH_DOCUMENTS = 64
_MAX_NEW_TOKENS = 120
"""No story of the world is longer; a model that does not stop is stopped."""

_Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Reading:
    """How well held-out documents are predicted, each token scored once, the end-of-text tokens included."""

    loss: float
    """Mean negative log-probability, nats per token."""
    true_entropy: float
    """The same of the grammar itself on the same documents: no reader can expect to be below it."""
    question_accuracy: float
    """Share of the questions whose answer, every token of it, is what the model would write."""
    answered: list[bool]
    """For each question in order."""

    @property
    def gap(self) -> float:
        """What is left to learn, nats per token."""
        return self.loss - self.true_entropy


@dataclasses.dataclass(frozen=True)
class Sample:
    """A story that the model wrote."""

    request: world.Request
    text: str
    check: world.Check


def read(model: Model, tokenizer: Tokenizer, documents: Sequence[world.Document]) -> Reading:
    """Measure how a model predicts these documents."""
    total, count = 0.0, 0
    answered: list[bool] = []
    for first in range(0, len(documents), _BATCH_DOCUMENTS):
        encoded = [_encode(tokenizer, document) for document in documents[first : first + _BATCH_DOCUMENTS]]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(ids) - 1 for ids, _ in encoded], out=offsets[1:])
        tokens = np.concatenate([ids[:-1] for ids, _ in encoded])  # i32 [N]
        targets = np.concatenate([ids[1:] for ids, _ in encoded])  # i32 [N]
        _, out = model.forward(tokens, offsets, targets, want=("logprobs", "top1"), train=False)
        total -= float(out.logprobs.sum(dtype=np.float64))
        count += len(targets)
        for (_, answers), offset in zip(encoded, offsets[:-1], strict=True):
            answered += [bool(out.top1[offset + begin : offset + end].all()) for begin, end in answers]
    return Reading(
        loss=total / count,
        true_entropy=-sum(document.log_probability for document in documents) / count,
        question_accuracy=sum(answered) / len(answered),
        answered=answered,
    )


def write(
    model: Model, tokenizer: Tokenizer, requests: Sequence[world.Request], *, seed: int, temperature: float = 1.0
) -> list[Sample]:
    """Let a model write one story for each request."""
    prompts = [request.text + "\n" for request in requests]
    completions = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=_MAX_NEW_TOKENS,
        temperature=temperature,
        stop="\n",
        seed=seed,
        batch_size=_BATCH_DOCUMENTS,
    )
    return [
        Sample(request, completion.text, world.check(completion.text, request))
        for request, completion in zip(requests, completions, strict=True)
    ]


def answer(model: Model, tokenizer: Tokenizer, document: world.Document) -> list[str]:
    """What a model answers to each question of a document when it is asked that one alone."""
    story = document.story.prompt + document.story.text
    prompts = [f"{story}\n{question.text}" for question in document.questions]
    completions = generate(model, tokenizer, prompts, max_new_tokens=20, temperature=0.0, stop="\n")
    return [completion.text.strip() for completion in completions]


def figures(reading: Reading, samples: Sequence[Sample], training: Iterable[str]) -> dict[str, Any]:
    """Both kinds of figures under the names that the report has for them."""
    scores = world.score_samples([sample.request for sample in samples], [sample.text for sample in samples], training)
    return {
        "well_formed": scores.well_formed,
        "distinct": scores.distinct,
        "copied": scores.copied,
        "possible": scores.possible,
        "follows_request": dict(scores.follows_request),
        "held_out_loss": reading.loss,
        "true_entropy": reading.true_entropy,
        "gap": reading.gap,
        "question_accuracy": reading.question_accuracy,
    }


def _encode(tokenizer: Tokenizer, document: world.Document) -> tuple[np.ndarray[Any, np.dtype[np.int32]], list[_Span]]:
    """End-of-text, document, end-of-text as i32, and where among its targets the answers are.

    A piece that begins with a space or a line break begins with a token, so the parts have the same tokens as the whole.
    """
    end = tokenizer.eos_token_id
    assert end is not None
    ids = [end, *tokenizer.encode_ordinary(document.story.prompt + document.story.text)]
    answers = []
    for question in document.questions:
        ids += tokenizer.encode_ordinary("\n" + question.text)
        begin = len(ids) - 1
        ids += tokenizer.encode_ordinary(" " + question.answer)
        answers.append((begin, len(ids) - 1))
    return np.array([*ids, end], np.int32), answers
