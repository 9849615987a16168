"""``ingot tokenizer train | encode | decode | inspect``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from ingot.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Learn a byte-level BPE vocabulary from text. The result does not depend on the number of threads."""

    files: Positional[tuple[str, ...]]
    """Text to learn from: files and folders (.txt, .jsonl with a "text" field, each also as .gz or .zst)."""
    output: str
    """Folder for tokenizer.json."""
    vocab_size: int = 4096
    """Number of token ids, special tokens included; 256 means bytes as they are."""
    pattern: Literal["gpt2", "cl100k", "llama3", "qwen2", "smollm"] = "gpt2"
    """How text is cut into words before merging."""
    special_tokens: tuple[str, ...] = ("<|endoftext|>",)
    """Tokens that text can never produce; they take the last ids."""
    min_frequency: int = 0
    """Merge no pair that occurs less often than this."""
    separator: str | None = None
    """Cut each text file into documents at this string."""
    threads: int | None = None
    """CPU threads; what affinity and the container allow unless given."""
    json: bool = False
    """Print the facts as JSON."""

    def run(self) -> int:
        """Train, save, say what came out."""
        import time

        import ingot
        from ingot.data.corpus import Corpus
        from ingot.training.progress import make_display

        if not self.files:
            raise ConfigError("no text to learn from: name files or folders")
        if (Path(self.output) / "config.json").exists():
            raise ConfigError(
                f"{self.output}: holds a model, which needs the tokenizer that it learned with; choose another --output"
            )
        corpus = Corpus(self.files, separator=self.separator)
        if corpus.num_bytes == 0:
            raise DataError(f"{', '.join(self.files)}: there is no text to learn from")
        started = time.perf_counter()
        display = make_display(quiet=self.json)
        try:
            tokenizer = ingot.Tokenizer.train(
                corpus,
                vocab_size=self.vocab_size,
                pattern=self.pattern,
                special_tokens=list(self.special_tokens),
                min_frequency=self.min_frequency,
                threads=self.threads,
                progress=lambda stage, done, total: display.work(stage, done, total or corpus.num_bytes),
            )
        finally:
            display.stop()
        elapsed_s = time.perf_counter() - started
        tokenizer.save(self.output)
        facts = {
            "tokenizer": str(Path(self.output) / "tokenizer.json"),
            "vocab_size": tokenizer.vocab_size,
            "special_tokens": dict(tokenizer.special_tokens),
            "num_bytes": corpus.num_bytes,
            "elapsed_s": round(elapsed_s, 3),
            "hash": tokenizer.hash,
        }
        if self.json:
            print(json.dumps(facts))
        else:
            size = corpus.num_bytes
            amount = f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size:,} bytes"
            print(f"learned {tokenizer.vocab_size} tokens from {amount} in {elapsed_s:.2f} s: {facts['tokenizer']}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encode:
    """Turn a file into token ids, as a numpy array on disk (uint16 where the vocabulary fits, else uint32)."""

    file: Positional[str]
    """The text; any bytes are legal. Strings that look like special tokens are ordinary text."""
    tokenizer: str
    """Folder or tokenizer.json."""
    output: str
    """The .npy file to write."""
    threads: int | None = None
    """CPU threads; what affinity and the container allow unless given. The result does not depend on it."""
    json: bool = False
    """Print the facts as JSON."""

    def run(self) -> int:
        """Encode, save, say how well the vocabulary fits."""
        import ingot

        _refuse_same(self.file, self.output)
        tokenizer = ingot.Tokenizer.from_file(self.tokenizer)
        num_tokens = tokenizer.encode_file(self.file, self.output, threads=self.threads)
        num_bytes = Path(self.file).stat().st_size
        facts = {"output": self.output, "num_tokens": num_tokens, "num_bytes": num_bytes}
        facts["bytes_per_token"] = round(num_bytes / num_tokens, 4) if num_tokens else 0.0
        if self.json:
            print(json.dumps(facts))
        else:
            print(
                f"{num_bytes:,} bytes -> {num_tokens:,} tokens ({facts['bytes_per_token']:.2f} bytes per token): {self.output}"
            )
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode:
    """Turn token ids back into the bytes that they stand for."""

    file: Positional[str]
    """A .npy file of ids, as encode writes it."""
    tokenizer: str
    """Folder or tokenizer.json."""
    output: str
    """The file to write."""
    json: bool = False
    """Print the facts as JSON."""

    def run(self) -> int:
        """Decode in blocks, so that a long file needs little memory."""
        import numpy as np

        import ingot
        from ingot.durable import temporary_name

        _refuse_same(self.file, self.output)
        tokenizer = ingot.Tokenizer.from_file(self.tokenizer)
        try:
            ids = np.load(self.file, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError):
            raise DataError(f"{self.file}: not a .npy file of token ids, as ingot tokenizer encode writes it") from None
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise DataError(
                f"{self.file}: expected a one-dimensional array of integers, got {ids.dtype} of shape {ids.shape}"
            )
        target = Path(self.output)
        partial = temporary_name(target)
        block = 1 << 20
        try:
            with partial.open("wb") as sink:
                for start in range(0, len(ids), block):
                    sink.write(tokenizer.decode_bytes(ids[start : start + block]))
            partial.replace(target)
        except ValueError as error:
            counted = f", counted from {start:,} on" if start else ""
            raise DataError(f"{self.file}: {error}{counted}: was it made with another tokenizer?") from None
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(target)) from None
        finally:
            partial.unlink(missing_ok=True)
        num_bytes = target.stat().st_size
        if self.json:
            print(json.dumps({"output": self.output, "num_tokens": len(ids), "num_bytes": num_bytes}))
        else:
            print(f"{len(ids):,} tokens -> {num_bytes:,} bytes: {target}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show how a text is cut: pieces in colour, their ids, and how many bytes a token stands for."""

    tokenizer: Positional[str]
    """Folder or tokenizer.json."""
    text: str | None = None
    """The text to cut."""
    file: str | None = None
    """Or a file whose beginning is cut."""
    json: bool = False
    """Print the facts as JSON."""

    def run(self) -> int:
        """Print the vocabulary's facts, and the pieces of the text where one is given."""
        import ingot

        tokenizer = ingot.Tokenizer.from_file(self.tokenizer)
        if self.text is not None and self.file is not None:
            raise ConfigError("give --text or --file, not both")
        content = self.text.encode() if self.text is not None else None
        if self.file is not None:
            with Path(self.file).open("rb") as source:
                content = source.read(4000)
        ids = tokenizer.encode_ordinary(content) if content is not None else []
        facts = {
            "vocab_size": tokenizer.vocab_size,
            "pattern": tokenizer.pattern,
            "special_tokens": dict(tokenizer.special_tokens),
            "hash": tokenizer.hash,
        }
        if content is not None:
            facts["ids"] = ids
            facts["tokens"] = [tokenizer.token_bytes(i).decode("utf-8", "backslashreplace") for i in ids]
            facts["num_tokens"] = len(ids)
            facts["num_bytes"] = len(content)
            facts["bytes_per_token"] = round(len(content) / len(ids), 4) if ids else 0.0
        if self.json:
            print(json.dumps(facts, ensure_ascii=False))
            return 0
        specials = ", ".join(f"{name} = {i}" for name, i in tokenizer.special_tokens.items()) or "none"
        print(f"{tokenizer.vocab_size} tokens, pattern {tokenizer.pattern}, special tokens: {specials}")
        if content is not None:
            _print_pieces(tokenizer, ids, len(content))
        return 0


def _refuse_same(source: str, target: str) -> None:
    """No command replaces what it reads."""
    if Path(source).exists() and Path(target).exists() and Path(source).samefile(target):
        raise ConfigError(f"--output {target} is the file that is read: choose another name")


def _print_pieces(tokenizer: object, ids: list[int], num_bytes: int) -> None:
    from rich.console import Console
    from rich.text import Text

    colours = ("black on bright_cyan", "black on bright_yellow", "black on bright_green", "black on bright_magenta")
    line = Text()
    table = Text()
    for index, token_id in enumerate(ids):
        piece = tokenizer.token_bytes(token_id).decode("utf-8", "backslashreplace")  # type: ignore[attr-defined]
        shown = piece.replace("\n", "\u23ce\n").replace("\t", "\u21e5")
        line.append(shown, style=colours[index % len(colours)])
        table.append(shown.replace("\n", "").replace(" ", "\u00b7") or "\u00b7", style=colours[index % len(colours)])
        table.append(f" {token_id}  ")
    console = Console(highlight=False)
    console.print(line)
    console.print(table)
    if ids:
        print(f"{num_bytes} bytes, {len(ids)} tokens, {num_bytes / len(ids):.2f} bytes per token")
