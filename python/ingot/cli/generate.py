"""``ingot generate``."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from ingot.configs import Backend, Level
from ingot.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """Let a model continue a prompt; the text appears as it is written.

    A sample depends on the seed and its number alone, not on what is generated beside it.
    """

    model: Positional[str]
    """Folder of the model."""
    prompt: str | None = None
    """Text to continue; the beginning of a document unless given."""
    prompts: str | None = None
    """A file with many prompts: rows with a "prompt" (.jsonl, .json, each also as .gz or .zst, .parquet), or one prompt a line. Results
    are JSON lines."""
    max_new_tokens: int = 200
    """Stop after this many tokens."""
    temperature: float = 0.8
    """0 always takes the likeliest token, 1 samples from the model as it is."""
    top_k: int = 0
    """Sample among this many likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that make up this probability."""
    min_p: float = 0.0
    """Sample among tokens at least this share as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that already occurred less likely."""
    stop: tuple[str, ...] = ()
    """Stop where one of these strings appears; it is not part of the text."""
    num_samples: int = 1
    """Samples of each prompt."""
    seed: int = 0
    """Of the random numbers."""
    backend: Backend = "native"
    """native or torch."""
    device: str | None = None
    """Of the torch backend: cpu or cuda."""
    threads: int | None = None
    """CPU threads; what affinity and the container allow unless given."""
    level: Level | None = None
    """Force an instruction level."""
    json: bool = False
    """Print one JSON line a sample, with its tokens' log-probabilities."""

    def run(self) -> int:
        """Generate and print."""
        import ingot
        from ingot.inference.generate import generate, stream
        from ingot.models.hf import require_writer

        if self.prompt is not None and self.prompts is not None:
            raise ConfigError("give --prompt or --prompts, not both")
        require_writer(self.model)
        model = ingot.load_model(
            self.model, backend=self.backend, device=self.device, threads=self.threads, level=self.level
        )
        tokenizer = ingot.Tokenizer.from_file(self.model)
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "stop": self.stop,
            "seed": self.seed,
        }
        if self.prompts is None and not self.json:
            if self.num_samples < 1:
                raise ConfigError(f"num_samples must be at least 1, got {self.num_samples}")
            for index in range(self.num_samples):
                # Wrong settings are refused before anything is shown.
                pieces = stream(model, tokenizer, self.prompt or "", sample_index=index, **options)
                if self.num_samples > 1:
                    print(f"--- sample {index + 1} of {self.num_samples}")
                sys.stdout.write(self.prompt or "")
                for piece in pieces:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
                print()
            return 0
        prompts = read_prompts(self.prompts) if self.prompts is not None else [self.prompt or ""]
        for completion in generate(model, tokenizer, prompts, num_samples=self.num_samples, **options):
            print(json.dumps(dataclasses.asdict(completion), ensure_ascii=False))
        return 0


def read_prompts(path: str) -> list[str]:
    """The prompts of a file of rows, or the lines of any other file.

    Raises
    ------
    DataError
        Names the first row that has no prompt in plain text.
    """
    from ingot.data.files import suffix_of
    from ingot.data.rows import PromptOnly, RowError, read_rows

    if suffix_of(Path(path)) not in (".jsonl", ".json", ".parquet"):
        return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line]
    prompts = []
    for row in read_rows(path, [PromptOnly]):
        assert isinstance(row, PromptOnly)
        if not isinstance(row.prompt, str):
            raise RowError("is a conversation", "give the prompt as text", field="prompt", file=path, row=row.number)
        prompts.append(row.prompt)
    return prompts
