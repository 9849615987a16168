"""Several responses to each of many prompts: candidates for people to rank, or the best of n by a reward.

A response is a function of the weights, the settings, the prompt and its number: what was written before an interruption is kept, and
what comes after is what would have come anyway.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ingot.data.keys import canonical, digest
from ingot.data.rows import PromptOnly, RowError, read_rows
from ingot.errors import ConfigError, DataError
from ingot.inference.prompts import PromptEncoder
from ingot.json_lines import append_lines, is_row
from ingot.losses.best_of_n import best_of_n_kl_bound, best_rows, expected_max
from ingot.models import Backend, load_model
from ingot.models.base import IntArray, Sampling
from ingot.models.hf import require_writer
from ingot.tokenizer import Tokenizer
from ingot.training.interruption import Interruption
from ingot.training.progress import Display, SilentDisplay
from ingot.training.rewards import RewardFunctions, completion_like
from ingot.training.rollouts import MAX_SEQUENCES, Episode, EpisodeStream, banned_ids_of

if TYPE_CHECKING:
    from ingot.models.base import Model

MAX_REDRAWS = 4
"""How often a response that is empty or there already is drawn again before it is dropped."""

_FLUSH_S = 2.0
_FLUSH_RESPONSES = 256
# Columns that would make a row of another kind of what is written here.
_NOT_KEPT = frozenset(
    [
        "prompt",
        "responses",
        "ranks",
        "ranking",
        "annotator",
        "criterion",
        "chosen",
        "rejected",
        "completion",
        "completions",
        "label",
        "labels",
        "messages",
        "text",
        "group_id",
        "sources",
        "source",
        "truncated",
        "reward",
        "rewards",
        "sampling",
    ]
)


@dataclasses.dataclass(frozen=True)
class SampleResult:
    """What was done."""

    output: str
    num_prompts: int
    num_there: int
    """Prompts whose row was in the file already."""
    num_written: int
    """Rows added."""
    num_too_long: int
    """Prompts left out: no room for an answer in the model's context."""
    num_alike: int
    """Prompts left out: fewer than two different responses, or none that can be kept."""
    num_below: int
    """Prompts left out: no response reached the threshold."""
    num_redrawn: int
    """Responses drawn again."""
    num_dropped: int
    """Responses left out: empty, or there already."""
    num_responses: int
    """Responses drawn, those drawn again included."""
    num_truncated: int
    """Of these, ended by length."""
    num_tokens: int
    """Tokens drawn."""
    seconds: float
    interrupted: bool
    curve: list[dict[str, float]]
    """Best of n: ``n``, ``reward`` (unbiased estimate of the expected largest), ``kl`` (its largest possible divergence, nats)."""
    notices: list[str]


@dataclasses.dataclass
class Writer:
    """A model, what it sees and where its answers end."""

    source: str
    model: Model
    encoder: PromptEncoder
    banned_ids: IntArray


@dataclasses.dataclass
class PromptGroup:
    """A prompt and its responses so far."""

    row: PromptOnly
    group_id: str
    prompts: list[IntArray]
    """Ids for each writer."""
    texts: list[str]
    truncated: list[bool]
    redraws: int = 0
    outstanding: int = 0


def sample_candidates(
    models: Sequence[str | Path],
    prompts: str | Path,
    output: str | Path,
    *,
    num_generations: int = 4,
    best_of: int | None = None,
    rewards: RewardFunctions | None = None,
    reward_threshold: float | None = None,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    duplicates: Literal["redraw", "drop"] = "redraw",
    seed: int = 0,
    max_sequences: int = MAX_SEQUENCES,
    threads: int | None = None,
    backend: Backend = "native",
    device: str | None = None,
    dry_run: bool = False,
    display: Display | None = None,
) -> SampleResult:
    """Add a row of responses for each prompt to ``output``, in the order in which they are complete; rows that are there are kept.

    Parameters
    ----------
    models
        Folders. With several, they take turns: response i is by model i modulo their number.
    prompts
        Rows with a "prompt", plain or conversational.
    num_generations
        Responses of each prompt. Rows are ``{"prompt", "responses", "group_id", "sources", "truncated"}``, the prompts' other columns,
        with ``rewards`` also "rewards", as ``ingot label`` reads them. Empty responses and repeated ones are not among them.
    best_of
        Draw so many instead and write the one with the highest reward: ``{"prompt", "completion", "source", "reward", "rewards"}``,
        rows to fine-tune on. Repeated responses count, so that the curve speaks of independent draws.
    rewards
        Scores responses.
    reward_threshold
        With ``best_of``: leave out prompts whose best is below.
    temperature, top_k, top_p
        See :class:`ingot.Sampling`.
    duplicates
        Draw repeated and empty responses again (at most :data:`MAX_REDRAWS` times), or drop them.
    max_sequences
        Decoder slots of each model.
    dry_run
        Check everything, load the models and encode the prompts, but draw and write nothing.
    display
        Where progress is shown.

    Raises
    ------
    ConfigError, DataError, CheckpointError
        Something does not fit; the message names it.
    RewardError
        A reward function failed; rows written before are kept.
    """
    display = display or SilentDisplay()
    size = num_generations if best_of is None else best_of
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    _check_settings(models, size, best_of, rewards, reward_threshold, temperature, duplicates)
    output = Path(output)
    if output.resolve() == Path(prompts).resolve():
        raise ConfigError(f"--output {output} is also what is read; give another file")
    settings: dict[str, Any] = {
        "models": [str(model) for model in models],
        "num_generations": size,
        "best_of": best_of is not None,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    notices: list[str] = []
    there = _rows_there(output, settings, notices)
    rows = prompt_rows(prompts)
    writers = [open_writer(model, threads, backend, device) for model in models]
    groups, too_long = prompt_groups(rows, there, writers, size, prompts, notices)
    if too_long and not groups and not there:
        raise DataError(f"{prompts}: no prompt leaves room to answer in the context of {', '.join(map(str, models))}")
    work = _Work(writers, output, settings, rewards, reward_threshold, duplicates if temperature else "drop", size)
    start = time.monotonic()
    interrupted = False
    if groups and not dry_run:
        longest = max(len(ids) for group in groups for ids in group.prompts)
        streams = [
            EpisodeStream(
                writer.model,
                max_prompt_tokens=longest,
                max_new_tokens=max_new_tokens,
                end_ids=writer.encoder.end_ids,
                sampling=sampling,
                banned_ids=writer.banned_ids,
                seed=seed,
                max_sequences=min(max_sequences, len(groups) * size) if max_sequences >= 1 else max_sequences,
            )
            for writer in writers
        ]
        interrupted = work.run(streams, groups, display)
    notices += work.notices
    scored = [row["rewards"] for row in there.values() if "rewards" in row] + work.scored
    return SampleResult(
        output=str(output),
        num_prompts=len(rows),
        num_there=len(rows) - len(groups) - too_long,
        num_written=work.num_written,
        num_too_long=too_long,
        num_alike=work.num_alike,
        num_below=work.num_below,
        num_redrawn=work.num_redrawn,
        num_dropped=work.num_dropped,
        num_responses=work.num_responses,
        num_truncated=work.num_truncated,
        num_tokens=work.num_tokens,
        seconds=time.monotonic() - start,
        interrupted=interrupted,
        curve=_curve(scored, size) if best_of is not None else [],
        notices=notices,
    )


def _check_settings(
    models: Sequence[str | Path],
    size: int,
    best_of: int | None,
    rewards: RewardFunctions | None,
    reward_threshold: float | None,
    temperature: float,
    duplicates: str,
) -> None:
    if not models:
        raise ConfigError("no model was given: name at least one folder")
    if duplicates not in ("redraw", "drop"):
        raise ConfigError(f"duplicates must be redraw or drop, got {duplicates!r}")
    if best_of is None:
        if size < 2:
            raise ConfigError(f"num_generations is {size}: to compare, give at least 2")
        if reward_threshold is not None:
            raise ConfigError("reward_threshold chooses among the best of n: give best_of too")
    elif size < 1:
        raise ConfigError(f"best_of must be at least 1, got {size}")
    elif rewards is None:
        raise ConfigError("best_of keeps the response with the highest reward: give a reward too")
    if size < len(models):
        raise ConfigError(
            f"{size} responses for each prompt are too few for {len(models)} models: draw at least one by each"
        )
    if temperature == 0.0 and size > len(models):
        raise ConfigError(
            f"temperature 0 always draws the same, so that {size} responses by {len(models)} model{'s' if len(models) > 1 else ''} "
            "would not differ: give a positive one"
        )


def _rows_there(output: Path, settings: dict[str, Any], notices: list[str]) -> dict[str, dict[str, Any]]:
    """The rows of an earlier, interrupted call by group id; refused where they were drawn in another way."""
    if not output.exists():
        return {}
    if output.is_dir():
        raise DataError(f"{output}: a folder; name a .jsonl file as --output")
    *lines, last = output.read_bytes().split(b"\n")
    if last.strip():
        if is_row(last):
            lines.append(last)
        else:
            notices.append(f"{output}: its last line is cut short; its prompt is sampled again")
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{output}, row {number}: not valid JSON ({error}); mend it or give another --output"
            ) from None
        if not isinstance(row, dict) or not isinstance(row.get("sampling"), dict) or "group_id" not in row:
            raise DataError(f"{output}, row {number}: not written by ingot sample; give another --output")
        for name, value in settings.items():
            before = row["sampling"].get(name)
            if before != value:
                raise ConfigError(
                    f"{output}, row {number}: was sampled with {name} {_plain(before)}, not {_plain(value)}; "
                    "give the same settings to go on, or another --output"
                )
        found[str(row["group_id"])] = row
    return found


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def prompt_rows(prompts: str | Path) -> list[PromptOnly]:
    """The prompts of a file; other columns are in ``extra``."""
    return [row for row in read_rows(prompts, (PromptOnly,)) if isinstance(row, PromptOnly)]


def open_writer(folder: str | Path, threads: int | None, backend: Backend, device: str | None) -> Writer:
    """Load a model that writes, with what it sees of prompts.

    Raises
    ------
    ConfigError
        The model scores instead of writing, or does not belong to its tokenizer.
    CheckpointError
        There is no model, or it is damaged.
    """
    require_writer(folder)
    model = load_model(folder, backend=backend, device=device, threads=threads)
    tokenizer = Tokenizer.from_file(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens but the model only {model.config.vocab_size}: "
            "they do not belong together"
        )
    encoder = PromptEncoder(folder, tokenizer)
    return Writer(str(folder), model, encoder, banned_ids_of(tokenizer, model.config.vocab_size, encoder.end_ids))


def prompt_groups(
    rows: Sequence[PromptOnly],
    there: dict[str, dict[str, Any]],
    writers: Sequence[Writer],
    size: int,
    file: str | Path,
    notices: list[str],
) -> tuple[list[PromptGroup], int]:
    """What is to be drawn, and the number of prompts that no model can answer within its context."""
    groups: list[PromptGroup] = []
    too_long: list[int] = []
    seen: dict[str, int] = {}
    copies: Counter[str] = Counter()
    for row in rows:
        given = row.extra.get("group_id")
        if isinstance(given, str | int) and not isinstance(given, bool) and given != "":
            group_id = str(given)
        else:
            copies[digest(row.prompt)] += 1
            group_id = digest(row.prompt, copies[digest(row.prompt)])[:16]
        if group_id in seen:
            raise DataError(
                f'{file}, row {row.number}: "group_id" {group_id!r} is that of row {seen[group_id]}; change one'
            )
        seen[group_id] = row.number
        try:
            ids = [writer.encoder.encode(row.prompt) for writer in writers]
        except RowError:
            raise
        except DataError as error:
            raise DataError(f"{file}, row {row.number}: {error}") from None
        if group_id in there:
            if there[group_id].get("prompt") != row.prompt:
                raise DataError(
                    f'{file}, row {row.number}: "group_id" {group_id!r} is in the output with another prompt; give another --output'
                )
            continue
        if any(
            len(each) >= writer.model.config.max_position_embeddings for each, writer in zip(ids, writers, strict=True)
        ):
            too_long.append(row.number)
            continue
        groups.append(PromptGroup(row, group_id, ids, [""] * size, [False] * size))
    if too_long:
        context = min(writer.model.config.max_position_embeddings for writer in writers)
        notices.append(
            f"{file}: {_count(len(too_long), 'prompt')} left out (row {too_long[0]} first): no room to answer in the model's context "
            f"of {context} tokens"
        )
    return groups, len(too_long)


class _Work:
    """Draws, settles groups, scores and writes."""

    def __init__(
        self,
        writers: Sequence[Writer],
        output: Path,
        settings: dict[str, Any],
        rewards: RewardFunctions | None,
        threshold: float | None,
        duplicates: str,
        size: int,
    ) -> None:
        self._writers = writers
        self._output = output
        self._settings = settings
        self._best = bool(settings["best_of"])
        self._rewards = rewards
        self._threshold = threshold
        self._redraw = duplicates == "redraw"
        self._size = size
        self._streams: Sequence[EpisodeStream] = ()
        self._jobs: dict[int, tuple[PromptGroup, int]] = {}
        self._settled: list[tuple[PromptGroup, list[int]]] = []
        self._flushed_at = time.monotonic()
        self.scored: list[list[float | None]] = []
        self.notices: list[str] = []
        self.num_written = self.num_alike = self.num_below = 0
        self.num_redrawn = self.num_dropped = self.num_responses = self.num_truncated = 0

    @property
    def num_tokens(self) -> int:
        return sum(stream.num_tokens for stream in self._streams)

    def run(self, streams: Sequence[EpisodeStream], groups: Sequence[PromptGroup], display: Display) -> bool:
        """Draw all groups; whether it was interrupted."""
        self._streams = streams
        for group in groups:
            self._submit(group, range(self._size))
        start = shown_at = time.monotonic()
        with Interruption() as interruption:
            while not interruption.requested and (busy := [stream for stream in streams if stream.busy]):
                # Models keep pace, so that groups are complete early.
                stream = min(busy, key=lambda stream: stream.num_done / stream.num_submitted)
                stream.step()
                for episode in stream.take():
                    self._accept(episode)
                now = time.monotonic()
                if now - self._flushed_at >= _FLUSH_S or len(self._settled) * self._size >= _FLUSH_RESPONSES:
                    self._flush()
                if now - shown_at >= 0.2:
                    shown_at = now
                    done = sum(stream.num_done for stream in streams)
                    total = sum(stream.num_submitted for stream in streams)
                    display.work(f"sampling, {self.num_tokens / (now - start):,.0f} tokens/s", done, total)
            self._flush()
            display.stop()
            return interruption.requested and any(stream.busy for stream in streams)

    def _submit(self, group: PromptGroup, places: Sequence[int]) -> None:
        """Draw these responses of a group."""
        group.outstanding = len(places)
        for number, stream in enumerate(self._streams):
            own = [place for place in places if place % len(self._streams) == number]
            ids = [episode_id_of(group.group_id, place, group.redraws) for place in own]
            self._jobs.update({episode: (group, place) for episode, place in zip(ids, own, strict=True)})
            # What completes a group goes first, so that groups are written early.
            stream.submit(group.prompts[number], ids, group.row.number, before_others=group.redraws > 0)

    def _accept(self, episode: Episode) -> None:
        group, place = self._jobs.pop(episode.episode_id)
        group.texts[place] = self._writers[place % len(self._writers)].encoder.decode(episode.completion_ids)
        group.truncated[place] = episode.truncated
        group.outstanding -= 1
        self.num_responses += 1
        self.num_truncated += episode.truncated
        if group.outstanding == 0:
            self._settle(group)

    def _settle(self, group: PromptGroup) -> None:
        """All responses of a group are there: keep the group, or draw again what is empty or there twice."""
        places = range(self._size)
        filled = [place for place in places if group.texts[place].strip()]
        if self._best:
            good = filled
        else:
            first = {group.texts[place]: place for place in reversed(filled)}
            good = [place for place in filled if first[group.texts[place]] == place]
            bad = [place for place in places if place not in good]
            if bad and self._redraw and group.redraws < MAX_REDRAWS:
                group.redraws += 1
                self.num_redrawn += len(bad)
                self._submit(group, bad)
                return
        self.num_dropped += self._size - len(good)
        if len(good) < (1 if self._best else 2):
            self.num_alike += 1
            return
        self._settled.append((group, good))

    def _flush(self) -> None:
        """Score and write what is settled."""
        settled, self._settled = self._settled, []
        self._flushed_at = time.monotonic()
        rows = []
        scores = self._score(settled)
        for (group, good), rewards in zip(settled, scores, strict=True):
            row = self._best_row(group, good, rewards) if self._best else self._candidates_row(group, good, rewards)
            if row is not None:
                rows.append(row)
        if rows:
            notice = append_lines(self._output, rows)
            if notice:
                self.notices.append(notice)
            self.num_written += len(rows)

    def _score(self, settled: Sequence[tuple[PromptGroup, list[int]]]) -> list[list[float | None]]:
        """Rewards of all responses of each group (best of n), or of those that are kept; None where no function applies."""
        if self._rewards is None:
            return [[] for _ in settled]
        which = [(group, list(range(self._size)) if self._best else good) for group, good in settled]
        flat = [(group, place) for group, places in which for place in places]
        names = dict.fromkeys(name for group, _ in flat for name in group.row.extra)
        total = self._rewards(
            [group.row.prompt for group, _ in flat],
            [completion_like(group.row.prompt, group.texts[place]) for group, place in flat],
            {name: [group.row.extra.get(name) for group, _ in flat] for name in names},
        ).total.tolist()
        found, begin = [], 0
        for _, places in which:
            found.append([None if math.isnan(score) else score for score in total[begin : begin + len(places)]])
            begin += len(places)
        return found

    def _candidates_row(self, group: PromptGroup, good: list[int], rewards: list[float | None]) -> dict[str, Any]:
        prompt = group.row.prompt
        row: dict[str, Any] = {
            "prompt": prompt,
            "responses": [completion_like(prompt, group.texts[place]) for place in good],
            "group_id": group.group_id,
            "sources": [self._source(place) for place in good],
            "truncated": [group.truncated[place] for place in good],
        }
        if self._rewards is not None:
            row["rewards"] = rewards
        return {**row, **self._common(group)}

    def _best_row(self, group: PromptGroup, good: list[int], rewards: list[float | None]) -> dict[str, Any] | None:
        self.scored.append(rewards)
        scores = np.full(self._size, np.nan)
        scores[good] = [np.nan if rewards[place] is None else rewards[place] for place in good]
        if np.isnan(scores).all():
            self.num_alike += 1
            return None
        best = best_rows(scores, np.zeros(self._size, np.int64), threshold=self._threshold)
        if not len(best):
            self.num_below += 1
            return None
        place, prompt = int(best[0]), group.row.prompt
        return {
            "prompt": prompt,
            "completion": completion_like(prompt, group.texts[place]),
            "group_id": group.group_id,
            "source": self._source(place),
            "truncated": group.truncated[place],
            "reward": rewards[place],
            "rewards": rewards,
            **self._common(group),
        }

    def _source(self, place: int) -> str:
        return self._writers[place % len(self._writers)].source

    def _common(self, group: PromptGroup) -> dict[str, Any]:
        kept = {name: value for name, value in group.row.extra.items() if name not in _NOT_KEPT}
        return {"sampling": self._settings, **kept}


def episode_id_of(group_id: str, place: int, redraws: int) -> int:
    """63 bits that name a response of a prompt, whatever other prompts there are."""
    content = canonical(group_id, place, redraws)
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") >> 1


def _curve(scored: Sequence[Sequence[float | None]], size: int) -> list[dict[str, float]]:
    """Mean over prompts of the expected largest of n rewards, for n = 1 .. size; of those whose responses were all scored."""
    whole = [[float(score) for score in scores if score is not None] for scores in scored]
    estimates = [expected_max(np.array(scores)) for scores in whole if len(scores) == size]
    if not estimates:
        return []
    means = np.mean(estimates, axis=0)
    return [
        {"n": n, "reward": float(mean), "kl": best_of_n_kl_bound(n)} for n, mean in enumerate(means.tolist(), start=1)
    ]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
