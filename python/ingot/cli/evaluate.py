"""``ingot eval``."""

from __future__ import annotations

import dataclasses
import json

from tyro.conf import Positional

from ingot.configs import Backend, Level
from ingot.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Loss, perplexity and bits per byte of a model on a text.

    Bits per byte do not depend on the tokenizer, so they compare models with different ones; loss and perplexity do not.
    """

    model: Positional[str]
    """Folder of the model."""
    data: tuple[str, ...] = ()
    """Text to measure on: files and folders, as for pretraining."""
    separator: str | None = None
    """Cut each text file into documents at this string."""
    max_length: int | None = None
    """Longest context in tokens; what the model was made for unless given."""
    batch_tokens: int = 8192
    """Tokens in one forward pass; changes memory and speed, not the result."""
    backend: Backend = "native"
    """native or torch."""
    device: str | None = None
    """Of the torch backend: cpu or cuda."""
    threads: int | None = None
    """CPU threads; what affinity and the container allow unless given."""
    level: Level | None = None
    """Force an instruction level."""
    json: bool = False
    """Print the facts as JSON."""

    def run(self) -> int:
        """Measure and print."""
        import ingot
        from ingot.inference.evaluate import evaluate
        from ingot.models.hf import require_writer

        if not self.data:
            raise ConfigError("no text to measure on: give --data with files or folders")
        require_writer(self.model)
        model = ingot.load_model(
            self.model, backend=self.backend, device=self.device, threads=self.threads, level=self.level
        )
        tokenizer = ingot.Tokenizer.from_file(self.model)
        result = evaluate(
            model,
            tokenizer,
            self.data,
            separator=self.separator,
            max_length=self.max_length,
            batch_tokens=self.batch_tokens,
        )
        if self.json:
            print(json.dumps(dataclasses.asdict(result)))
            return 0
        print(f"loss           {result.loss:.4f} nats per token")
        print(f"perplexity     {result.perplexity:.3f} (per token of this tokenizer)")
        print(f"bits_per_byte  {result.bits_per_byte:.4f}")
        documents = f"{result.num_documents:,} document{'s' if result.num_documents != 1 else ''}"
        print(f"num_tokens     {result.num_tokens:,} of {documents}, {result.num_bytes:,} bytes")
        print(f"rule           {result.rule}")
        return 0
