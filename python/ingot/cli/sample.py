"""``ingot sample``."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Literal

from tyro.conf import UseAppendAction

from ingot.configs import Backend

if TYPE_CHECKING:
    from ingot.inference.sample import SampleResult


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw several responses to each of many prompts, to be ranked by people (`ingot label`) or scored by a reward.

    Rows are on the disk as soon as they are complete; the same command goes on where it stopped. A response depends on the seed, its
    prompt and its number alone, not on what is drawn beside it.
    """

    model: UseAppendAction[tuple[str, ...]]
    """Folder of a model; give it several times to mix models, which take turns. Each row says what wrote each response."""
    prompts: str
    """Rows with a "prompt", text or messages: .jsonl or .json (each also as .gz or .zst), or .parquet."""
    output: str
    """File that rows are added to (JSON lines)."""
    num_generations: int = 4
    """Responses of each prompt."""
    max_new_tokens: int = 256
    """End a response after this many tokens."""
    temperature: float = 1.0
    """1 samples from the model as it is; lower is more of the same."""
    top_k: int = 0
    """Sample among this many likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that make up this probability."""
    duplicates: Literal["redraw", "drop"] = "redraw"
    """What to do with a response that is empty or that its prompt has already: draw it again (a few times), or drop it."""
    reward: UseAppendAction[tuple[str, ...]] = ()
    """Score responses: ./file.py:FUNCTION, package.module.FUNCTION or the folder of a reward model (FOLDER:CRITERION for one of its criteria); may be given several times."""
    reward_weights: tuple[float, ...] | None = None
    """One number for each --reward; 1 unless given."""
    reward_timeout: float = 600.0
    """Most seconds of one call of a reward function."""
    best_of: int | None = None
    """Draw this many responses of each prompt and write the one with the highest reward, as a row to fine-tune on."""
    reward_threshold: float | None = None
    """With --best-of: leave out prompts whose best response has a lower reward."""
    seed: int = 0
    """Of the random numbers."""
    max_sequences: int = 64
    """Responses that are written at a time; more are faster on larger machines and need more memory."""
    backend: Backend = "native"
    """native or torch."""
    device: str | None = None
    """Of the torch backend: cpu or cuda."""
    threads: int | None = None
    """CPU threads; what affinity and the container allow unless given."""
    dry_run: bool = False
    """Load and check everything and say what would be drawn, but draw and write nothing."""
    json: bool = False
    """Print the facts as one JSON object, and no progress."""

    def run(self) -> int:
        """Sample until done or interrupted."""
        from ingot.inference.sample import sample_candidates
        from ingot.training.progress import make_display
        from ingot.training.rewards import RewardFunctions

        rewards = None
        if self.reward:
            place = {"threads": self.threads, "backend": self.backend, "device": self.device}
            rewards = RewardFunctions(self.reward, self.reward_weights, timeout_s=self.reward_timeout, place=place)
        elif self.reward_weights is not None:
            from ingot.errors import ConfigError

            raise ConfigError("--reward-weights weighs rewards: give --reward too")
        result = sample_candidates(
            self.model,
            self.prompts,
            self.output,
            num_generations=self.num_generations,
            best_of=self.best_of,
            rewards=rewards,
            reward_threshold=self.reward_threshold,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            duplicates=self.duplicates,
            seed=self.seed,
            max_sequences=self.max_sequences,
            threads=self.threads,
            backend=self.backend,
            device=self.device,
            dry_run=self.dry_run,
            display=make_display(quiet=self.json),
        )
        if self.json:
            print(json.dumps({**dataclasses.asdict(result), "dry_run": self.dry_run}, ensure_ascii=False))
        else:
            print("\n".join(self._words(result)))
        return 130 if result.interrupted else 0

    def _words(self, result: SampleResult) -> list[str]:
        left_out = result.num_too_long + result.num_alike + result.num_below
        waiting = result.num_prompts - result.num_there - result.num_written - left_out
        lines = list(result.notices)
        there = f", {result.num_there:,} of them in {result.output} already" if result.num_there else ""
        if self.dry_run:
            size = self.num_generations if self.best_of is None else self.best_of
            return [
                *lines,
                f"{_count(result.num_prompts, 'prompt')}{there}; {waiting * size:,} responses of up to "
                f"{self.max_new_tokens:,} tokens would be drawn. Nothing was written.",
            ]
        if result.num_responses:
            share = 100 * result.num_truncated / result.num_responses
            lines.append(
                f"{_count(result.num_responses, 'response')}, {_count(result.num_tokens, 'token')} in {result.seconds:.1f} s "
                f"({result.num_tokens / max(result.seconds, 1e-9):,.0f} tokens/s); {share:.1f} % ended by --max-new-tokens or the context"
            )
        if result.num_redrawn or result.num_dropped:
            lines.append(
                f"empty or the same as another: {result.num_redrawn:,} drawn again, {result.num_dropped:,} dropped in the end"
            )
        if result.num_alike:
            what = "no response that can be kept" if self.best_of is not None else "fewer than two different responses"
            lines.append(f"{_count(result.num_alike, 'prompt')} left out: {what}")
        if result.num_below:
            lines.append(f"{_count(result.num_below, 'prompt')} left out: no reward of {self.reward_threshold} or more")
        if result.curve:
            lines.append("best of n   mean reward   divergence from the model, at most")
            lines += [
                f"{point['n']:9.0f}   {point['reward']:11.4f}   {point['kl']:.3f} nats"
                for point in result.curve
                if _is_round(int(point["n"]), len(result.curve))
            ]
        lines.append(f"{_count(result.num_written, 'row')} added to {result.output}{there and ' (' + there[2:] + ')'}.")
        if result.interrupted:
            lines.append(f"Interrupted with {_count(waiting, 'prompt')} left; the same command goes on.")
        elif self.best_of is None and result.num_written + result.num_there:
            lines.append(f"Next: ingot label {result.output} --output ranked.jsonl --labeler YOUR-NAME")
        return lines


def _is_round(n: int, last: int) -> bool:
    """Powers of two, and the last."""
    return n & (n - 1) == 0 or n == last


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
