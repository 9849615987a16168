"""Tokenizer speed and memory beside tiktoken (encoding) and tokenizers (training), paired in one run, every answer asserted equal.

    python benches/tokenizer.py [FILE ...] [--vocab-size 8192] [--pattern gpt2] [--threads 2] [--megabytes 20] [--save FILE.csv]

Without a file the text is generated: 4 MB of words with a skewed distribution, Latin, Cyrillic and Chinese. Text is cut into documents of
about 10 kB. Each figure comes from runs in turn (ours, theirs, ours, ...), each in a process of its own; the best of each is shown, in wall
clock, and the ratio of processor time beside it, which other work on the machine disturbs less. Peak memory is what the process
held at most above what it held with the documents loaded.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import ingot
from ingot.environment import cpu_name

DOCUMENT_BYTES = 10_000
END = "<|endoftext|>"


@dataclass(frozen=True)
class Job:
    """What one child process does."""

    work: str
    text_path: str
    limit: int
    vocab_size: int
    pattern: str
    threads: int
    tokenizer_path: str


@dataclass(frozen=True)
class Measured:
    """What came of it."""

    wall_s: float
    cpu_s: float
    peak_bytes: int
    answer: str
    """sha256 of the merges or ids."""


@dataclass(frozen=True)
class Row:
    """One line of the results."""

    text: str
    megabytes: float
    task: str
    ours_mb_per_s: float
    peer: str
    peer_mb_per_s: float
    ratio: float
    ratio_cpu: float
    ours_peak_mb: float
    peer_peak_mb: float


def generated(num_bytes: int) -> str:
    """Words of syllables drawn by Zipf's law, frequent ones short, with punctuation, numbers and line ends."""
    rng = random.Random(0)
    scripts = [
        ("bcdfghjklmnprstvwy", "aeiou"),
        ("бвгдзклмнпрстхшч", "аеиоуы"),
        ("的一是不了人我在有他这中", "大来上国个到说们为子和你"),
    ]
    words = []
    for rank in range(1, 20_001):
        first, second = rng.choices(scripts, weights=[16, 2, 1])[0]
        syllables = [rng.choice(first) + rng.choice(second) for _ in range(rng.randint(1, 1 + rank.bit_length() // 4))]
        words.append("".join(syllables) + rng.choice(["", "n", "s", "t"]) * (first[0] == "b"))
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    ends = [*[""] * 12, ",", ".", "!\n", "'s", ";\n\n", "  ", " (", " 1984"]
    out: list[str] = []
    size = 0
    while size < num_bytes:
        for word in rng.choices(words, weights, k=1000):
            out.append(" " + word + rng.choice(ends))
            size += len(out[-1].encode())
    return "".join(out)


def documents_of(path: str, limit: int) -> list[str]:
    """About ``limit`` bytes of the file, in documents cut at line ends."""
    with Path(path).open(encoding="utf-8", errors="replace", newline="") as file:
        documents = []
        size = 0
        while size < limit and (lines := file.readlines(DOCUMENT_BYTES)):
            documents.append("".join(lines))
            size += len(documents[-1].encode())
    return documents


def digest(items: object) -> str:
    """sha256 of an array of ids, or of anything that JSON can hold."""
    data = items.tobytes() if isinstance(items, np.ndarray) else json.dumps(items).encode()
    return hashlib.sha256(data).hexdigest()


def train_ours(job: Job, documents: list[str]) -> Callable[[], object]:
    def work() -> object:
        return ingot.Tokenizer.train(
            iter(documents), vocab_size=job.vocab_size, pattern=job.pattern, special_tokens=[END], threads=job.threads
        )

    return work


def train_peer(job: Job, documents: list[str]) -> Callable[[], object]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    with tempfile.TemporaryDirectory() as folder:
        path = ingot.Tokenizer.bytes_only(job.pattern).save(folder)
        pre_tokenizer = Tokenizer.from_file(str(path)).pre_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=job.vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def work() -> object:
        tokenizer.train_from_iterator(documents, trainer)
        return tokenizer

    return work


def merges_of(trained: Any) -> object:
    """The merges as strings, of either library's tokenizer."""
    if isinstance(trained, ingot.Tokenizer):
        with tempfile.TemporaryDirectory() as folder:
            text = trained.save(folder).read_text(encoding="utf-8")
    else:
        text = trained.to_str()
    return [list(pair) for pair in json.loads(text)["model"]["merges"]]


def encode_ours(job: Job, documents: list[str]) -> Callable[[], object]:
    tokenizer = ingot.Tokenizer.from_file(job.tokenizer_path)
    if job.work == "encode to arrays, warm":
        tokenizer.encode_batch_to_numpy(documents, threads=job.threads)
    if job.work == "encode to lists":
        return lambda: tokenizer.encode_batch(documents, disallowed_special=(), threads=job.threads)
    return lambda: tokenizer.encode_batch_to_numpy(documents, threads=job.threads)[0]


def encode_peer(job: Job, documents: list[str]) -> Callable[[], object]:
    import tiktoken
    from tiktoken_ext import openai_public

    constants = openai_public.cl100k_base.__code__.co_consts
    cl100k = next(c for c in constants if isinstance(c, str) and r"\p{N}{1,3}" in c)
    tokenizer = ingot.Tokenizer.from_file(job.tokenizer_path)
    special = dict(tokenizer.special_tokens)
    encoding = tiktoken.Encoding(
        "bench",
        pat_str=openai_public.r50k_pat_str if job.pattern == "gpt2" else cl100k,
        mergeable_ranks={tokenizer.token_bytes(i): i for i in range(len(tokenizer)) if i not in special.values()},
        special_tokens=special,
    )
    if job.work == "encode to lists":
        return lambda: encoding.encode_ordinary_batch(documents, num_threads=job.threads)
    return lambda: np.concatenate([encoding.encode_to_numpy(text, disallowed_special=()) for text in documents])


def child(job: Job, ours: bool) -> Measured:
    """Run one job in this process."""
    documents = documents_of(job.text_path, job.limit)
    if job.work == "train":
        work = (train_ours if ours else train_peer)(job, documents)
    else:
        work = (encode_ours if ours else encode_peer)(job, documents)
    before = psutil.Process().memory_info().rss
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before
    answer = digest(merges_of(result) if job.work == "train" else result)
    return Measured(wall_s, cpu_s, max(0, peak), answer)


def compare(job: Job, peer: str, repeats: int, megabytes: float) -> Row:
    """Run a job with both libraries in turn; stops if an answer differs."""
    runs: dict[bool, list[Measured]] = {True: [], False: []}
    for _ in range(repeats):
        for ours in (True, False):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                runs[ours].append(pool.submit(child, job, ours).result())
    answers = {measured.answer for both in runs.values() for measured in both}
    if len(answers) != 1:
        raise SystemExit(f"{job.text_path}: {job.work}: ingot and {peer} do not agree")
    wall = {ours: min(measured.wall_s for measured in both) for ours, both in runs.items()}
    cpu = {ours: min(measured.cpu_s for measured in both) for ours, both in runs.items()}
    peak = {ours: min(measured.peak_bytes for measured in both) / 1e6 for ours, both in runs.items()}
    threads = f", {job.threads} thread{'s' if job.threads > 1 else ''}"
    return Row(
        text=Path(job.text_path).name,
        megabytes=round(megabytes, 1),
        task=job.work + threads,
        ours_mb_per_s=round(megabytes / wall[True], 1),
        peer=peer,
        peer_mb_per_s=round(megabytes / wall[False], 1),
        ratio=round(wall[False] / wall[True], 1),
        ratio_cpu=round(cpu[False] / cpu[True], 1),
        ours_peak_mb=round(peak[True], 1),
        peer_peak_mb=round(peak[False], 1),
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="text to train on and to encode; generated unless given")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--pattern", choices=["gpt2", "cl100k"], default="gpt2")
    parser.add_argument("--threads", type=int, default=2, help="for the rows with several threads")
    parser.add_argument("--megabytes", type=float, default=20, help="use at most this much of each file")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", help="also write the rows as CSV")
    arguments = parser.parse_args()

    print(f"{cpu_name()}; {ingot.build_info()}")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        files = arguments.files
        if not files:
            files = [str(Path(folder) / "generated")]
            Path(files[0]).write_text(generated(4_000_000), encoding="utf-8", newline="")
        for number, file in enumerate(files):
            limit = int(arguments.megabytes * 1e6)
            documents = documents_of(file, limit)
            megabytes = sum(len(text.encode()) for text in documents) / 1e6
            tokenizer = ingot.Tokenizer.train(
                iter(documents), vocab_size=arguments.vocab_size, pattern=arguments.pattern, special_tokens=[END]
            )
            path = tokenizer.save(Path(folder) / str(number))
            jobs = [("train", "tokenizers", 1), ("train", "tokenizers", arguments.threads)]
            jobs += [("encode to arrays, cold", "tiktoken", 1), ("encode to arrays, warm", "tiktoken", 1)]
            jobs += [("encode to lists", "tiktoken", 1), ("encode to lists", "tiktoken", arguments.threads)]
            for work, peer, threads in jobs:
                job = Job(work, file, limit, arguments.vocab_size, arguments.pattern, threads, str(path))
                row = compare(job, peer, arguments.repeats, megabytes)
                rows.append(row)
                print(
                    f"{row.text}, {row.megabytes} MB, {row.task}: {row.ours_mb_per_s} MB/s, {row.peer} {row.peer_mb_per_s} MB/s, "
                    f"ratio {row.ratio} (processor time {row.ratio_cpu}); peak {row.ours_peak_mb} MB, {row.peer_peak_mb} MB",
                    flush=True,
                )
    print("all merges and ids were equal")
    if arguments.save:
        with Path(arguments.save).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=["machine", *asdict(rows[0])])
            writer.writeheader()
            writer.writerows({"machine": cpu_name(), **asdict(row)} for row in rows)


if __name__ == "__main__":
    main()
