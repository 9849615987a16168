"""``ingot plan``."""

from __future__ import annotations

import dataclasses
import json

from ingot.configs import parse_duration
from ingot.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What to train on this machine in a given time: size, tokens, steps, expected time and peak memory, from a short probe."""

    data: tuple[str, ...] = ()
    """Text to learn from: files and folders."""
    max_time: str = "1h"
    """Time for training, such as 20m or 2h."""
    tokenizer: str | None = None
    """A trained tokenizer; a vocabulary size is proposed unless given."""
    max_length: int = 256
    """Sequence length in tokens."""
    output: str = "runs/planned"
    """The run's folder in the printed command."""
    separator: str | None = None
    """Cut each text file into documents at this string."""
    threads: int | None = None
    """CPU threads; what affinity and the container allow unless given."""
    json: bool = False
    """Print the facts as JSON."""

    def run(self) -> int:
        """Measure, choose, print."""
        if not self.data:
            raise UsageError("no text to plan for: give --data with files or folders")
        from ingot.plan import plan
        from ingot.tokenizer import Tokenizer

        chosen = plan(
            self.data,
            parse_duration(self.max_time),
            tokenizer=Tokenizer.from_file(self.tokenizer) if self.tokenizer is not None else None,
            tokenizer_path=self.tokenizer,
            max_length=self.max_length,
            output=self.output,
            separator=self.separator,
            threads=self.threads,
        )
        if self.json:
            print(json.dumps(dataclasses.asdict(chosen)))
            return 0
        shape = chosen.architecture
        print(f"text       {chosen.corpus_bytes / 1e6:.1f} MB, about {chosen.corpus_tokens / 1e6:.2f} M tokens")
        print(f"vocabulary {chosen.vocab_size} tokens, {chosen.bytes_per_token:.2f} bytes each")
        print(
            f"network    {chosen.num_parameters / 1e6:.2f} M parameters: {shape.num_hidden_layers} layers of width "
            f"{shape.hidden_size}, {shape.num_attention_heads} heads, context {chosen.max_length}"
        )
        print(
            f"training   {chosen.max_steps:,} steps of {chosen.per_device_train_batch_size} x {chosen.max_length} tokens: "
            f"{chosen.train_tokens / 1e6:.1f} M tokens, the text {chosen.epochs:g} times"
        )
        print(
            f"cost       {_clock(chosen.expected_s)} at {chosen.tokens_per_s:,.0f} tokens/s (measured), "
            f"{chosen.peak_memory_gb:.2f} GB of memory"
        )
        print(f"limited by {chosen.limited_by}")
        print(f"\n  {chosen.command}")
        return 0


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
