"""Answers of several models to the same prompts, drawn with the same random numbers, and the file that keeps them.

An answer is a function of the weights, the settings, the seed, its prompt and its number: what was drawn before an interruption is kept,
and what comes after is what would have come anyway.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ingot.data.rows import Content
from ingot.durable import write_file
from ingot.errors import ConfigError, DataError
from ingot.inference.sample import (
    PromptGroup,
    Writer,
    episode_id_of,
    open_writer,
    prompt_groups,
    prompt_rows,
)
from ingot.json_lines import append_lines, is_row
from ingot.models.base import Sampling
from ingot.training.progress import Display
from ingot.training.rewards import completion_like
from ingot.training.rollouts import MAX_SEQUENCES, EpisodeStream

_CHUNK = 32
_OWN = ("prompt", "responses", "group_id", "prompt_id", "sources", "truncated", "num_tokens", "comparison", "scores")


@dataclasses.dataclass
class Case:
    """A prompt with answers that are compared with one another."""

    case_id: str
    prompt_id: str
    prompt: Content
    columns: Mapping[str, Any]
    """The other columns of the prompt's row."""
    sources: list[str]
    """Who wrote each answer."""
    texts: list[str]
    truncated: list[bool]
    """Ended by length."""
    num_tokens: list[int]
    scores: dict[str, list[float | None]] = dataclasses.field(default_factory=dict)
    """Of each answer, by the name of what gave them; None where it had nothing to say."""

    @property
    def answers(self) -> list[Content]:
        """In the form of the prompt."""
        return [completion_like(self.prompt, text) for text in self.texts]

    def select(self, places: Sequence[int]) -> Case:
        """The case of these answers, in this order."""
        return dataclasses.replace(
            self,
            sources=[self.sources[place] for place in places],
            texts=[self.texts[place] for place in places],
            truncated=[self.truncated[place] for place in places],
            num_tokens=[self.num_tokens[place] for place in places],
            scores={},
        )

    def row(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """As it is written to a file: candidates that ``ingot label`` reads too."""
        row = {
            "prompt": self.prompt,
            "responses": self.answers,
            "group_id": self.case_id,
            "prompt_id": self.prompt_id,
            "sources": self.sources,
            "truncated": self.truncated,
            "num_tokens": self.num_tokens,
            "comparison": dict(settings),
        }
        if self.scores:
            row["scores"] = self.scores
        return {**row, **{name: value for name, value in self.columns.items() if name not in row}}

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Case:
        """The inverse of :meth:`row`."""
        return cls(
            case_id=row["group_id"],
            prompt_id=row["prompt_id"],
            prompt=row["prompt"],
            columns={name: value for name, value in row.items() if name not in _OWN},
            sources=list(row["sources"]),
            texts=[text_of(answer) for answer in row["responses"]],
            truncated=list(row["truncated"]),
            num_tokens=list(row["num_tokens"]),
            scores=dict(row.get("scores", {})),
        )


def text_of(answer: Any) -> str:
    """The words of an answer, whatever its form."""
    return answer if isinstance(answer, str) else "".join(message["content"] for message in answer)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """All cases, in the order of the prompts."""

    cases: list[Case]
    num_too_long: int
    """Prompts left out: no room for an answer."""


def draw_cases(
    models: Sequence[str],
    prompts: str | Path,
    *,
    num_generations: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    file: Path | None,
    display: Display,
    notices: list[str],
    max_sequences: int = MAX_SEQUENCES,
    **place: Any,
) -> Drawn:
    """Let models answer prompts. The i-th case of a prompt has the i-th answer of each model; with one model, a prompt's only case has all of
    its answers.

    Parameters
    ----------
    file
        Where cases are kept as they are complete; those in it are not drawn again.
    notices
        What a person should know is added here.
    place
        ``threads``, ``backend`` and ``device``.

    The other parameters are those of :func:`ingot.inference.sample.sample_candidates`.

    Raises
    ------
    ConfigError, DataError, CheckpointError
        Something does not fit, or the file holds cases that were drawn in another way.
    """
    settings = {
        "models": list(models),
        "num_generations": num_generations,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    there = {} if file is None else _read(file, settings, notices)
    writers = [
        open_writer(model, place.get("threads"), place.get("backend", "native"), place.get("device"))
        for model in models
    ]
    groups, num_too_long = prompt_groups(prompt_rows(prompts), {}, writers, num_generations, prompts, notices)
    if not groups:
        raise DataError(f"{prompts}: no prompt leaves room to answer in the context of {', '.join(models)}")
    cases: dict[str, Case] = {}
    total = len(groups) * num_generations * len(models)
    for first in range(0, len(groups), _CHUNK):
        chunk = groups[first : first + _CHUNK]
        ids = [
            _case_id(group, number) for group in chunk for number in range(num_generations if len(models) > 1 else 1)
        ]
        if not all(case in there for case in ids):
            done = first * num_generations * len(models)
            made = _answer(writers, chunk, settings, max_sequences, done, total, display)
            fresh = [case for case in made if case.case_id not in there]
            notice = append_lines(file, [case.row(settings) for case in fresh]) if file is not None else None
            notices += [notice] if notice else []
            there |= {case.case_id: case for case in fresh}
        cases |= {case: there[case] for case in ids}
    display.stop()
    return Drawn(list(cases.values()), num_too_long)


def write_cases(file: Path, cases: Iterable[Case]) -> None:
    """Put the scores of cases into their file, which is replaced in one step; rows of other prompts stay."""
    scores = {case.case_id: case.scores for case in cases}
    rows = [json.loads(line) for line in file.read_bytes().split(b"\n") if line.strip() and is_row(line)]
    for row in rows:
        if scores.get(row["group_id"]):
            row["scores"] = {**row.get("scores", {}), **scores[row["group_id"]]}
    write_file(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _read(file: Path, settings: Mapping[str, Any], notices: list[str]) -> dict[str, Case]:
    """Cases that are in the file, by id; refused where they were drawn in another way."""
    if not file.exists():
        return {}
    if file.is_dir():
        raise DataError(f"{file}: a folder; name a .jsonl file as --output")
    found: dict[str, Case] = {}
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        if not is_row(line):
            notices.append(f"{file}: row {number} is cut short; its prompt is answered again")
            continue
        row = json.loads(line)
        if not isinstance(row.get("comparison"), dict):
            raise DataError(f"{file}, row {number}: not written by ingot compare; give another --output")
        for name, now in settings.items():
            before = row["comparison"].get(name)
            if before != now:
                raise ConfigError(
                    f"{file}, row {number}: was drawn with {name} {_plain(before)}, not {_plain(now)}; "
                    "give the same settings to go on, or another --output"
                )
        found[row["group_id"]] = Case.of_row(row)
    return found


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _case_id(group: PromptGroup, number: int) -> str:
    return f"{group.group_id}-{number}"


@dataclasses.dataclass(frozen=True)
class _Answer:
    source: str
    text: str
    truncated: bool
    num_tokens: int


def _answer(
    writers: Sequence[Writer],
    groups: Sequence[PromptGroup],
    settings: Mapping[str, Any],
    max_sequences: int,
    done: int,
    total: int,
    display: Display,
) -> list[Case]:
    """The cases of these prompts."""
    size = settings["num_generations"]
    drawn: npt.NDArray[np.object_] = np.empty((len(writers), len(groups), size), object)
    for number, writer in enumerate(writers):
        begun = done + number * len(groups) * size

        def progress(count: int, begun: int = begun) -> None:
            display.work("answering", begun + count, total)

        for (index, place), answer in _draw(writer, number, groups, settings, max_sequences, progress).items():
            drawn[number, index, place] = answer
    cases = []
    for index, group in enumerate(groups):
        for place in range(size if len(writers) > 1 else 1):
            answers: list[_Answer] = (drawn[:, index, place] if len(writers) > 1 else drawn[0, index]).tolist()
            cases.append(
                Case(
                    case_id=_case_id(group, place),
                    prompt_id=group.group_id,
                    prompt=group.row.prompt,
                    columns={name: value for name, value in group.row.extra.items() if name not in _OWN},
                    sources=[answer.source for answer in answers],
                    texts=[answer.text for answer in answers],
                    truncated=[answer.truncated for answer in answers],
                    num_tokens=[answer.num_tokens for answer in answers],
                )
            )
    return cases


def _draw(
    writer: Writer,
    number: int,
    groups: Sequence[PromptGroup],
    settings: Mapping[str, Any],
    max_sequences: int,
    progress: Callable[[int], None],
) -> dict[tuple[int, int], _Answer]:
    """Answers of one model by (number of the prompt, number of the answer); every model has the same random numbers."""
    size = settings["num_generations"]
    stream = EpisodeStream(
        writer.model,
        max_prompt_tokens=max(len(group.prompts[number]) for group in groups),
        max_new_tokens=settings["max_new_tokens"],
        end_ids=writer.encoder.end_ids,
        sampling=Sampling(temperature=settings["temperature"]),
        banned_ids=writer.banned_ids,
        seed=settings["seed"],
        max_sequences=min(max_sequences, len(groups) * size) if max_sequences >= 1 else max_sequences,
    )
    places: dict[int, tuple[int, int]] = {}
    for index, group in enumerate(groups):
        ids = [episode_id_of(group.group_id, place, 0) for place in range(size)]
        places |= {episode: (index, place) for place, episode in enumerate(ids)}
        stream.submit(group.prompts[number], ids, index)
    while stream.step():
        progress(stream.num_done)
    return {
        places[episode.episode_id]: _Answer(
            writer.source,
            writer.encoder.decode(episode.completion_ids),
            episode.truncated,
            len(episode.completion_ids),
        )
        for episode in stream
    }
