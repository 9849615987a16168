"""Training on the CPU beside PyTorch: the same recipe to the same loss, and the time and memory of one step.

    python benches/pretrain.py --data tinyshakespeare.txt          both parts (about 12 minutes on two cores)
    python benches/pretrain.py --data tinyshakespeare.txt --part step --save

Each side lives in a process of its own and is asked in turn, so both meet the same moods of a shared machine; medians are printed.
Before anything is timed, both sides load the same weights and must compute the same loss. The peer is a plain PyTorch loop in float32
(scaled_dot_product_attention, fused AdamW), as installed, for the step also with torch.compile. Memory is the peak of the resident set above what
the process had after its imports.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ingot.configs import ModelConfig, PretrainConfig, load_recipe
from ingot.data.batches import Cursor, RandomBatches, Stretches, held_out_batches
from ingot.environment import cpu_name, peak_memory
from ingot.training.schedules import learning_rate


@dataclasses.dataclass(frozen=True)
class Task:
    """A recipe on a text of bytes."""

    config: PretrainConfig
    shape: ModelConfig
    text: npt.NDArray[np.int64]
    """Byte values; the last tenth is held out."""

    @property
    def cut(self) -> int:
        """Where the held-out part begins."""
        return int(len(self.text) * 0.9)

    def batches(self, seed: int) -> RandomBatches:
        """The training windows of this seed; both sides see the same ones."""
        train = Stretches(np.array([0]), np.array([self.cut]))
        return RandomBatches(
            self.text, train, self.config.sequence_length, self.config.per_device_train_batch_size, seed
        )

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        return learning_rate(
            step,
            self.config.max_steps or 1,
            peak=self.config.learning_rate,
            schedule=self.config.lr_scheduler_type,
            warmup_steps=self.config.warmup_steps or 0,
            min_ratio=self.config.min_learning_rate_ratio,
            decay_ratio=self.config.decay_ratio,
        )


class Ours:
    """ingot's native core."""

    def __init__(self, task: Task, seed: int, state: dict[str, Any] | None) -> None:
        import ingot

        self.task = task
        config = task.config
        self.model = ingot.Model(task.shape, seed=seed)
        if state is not None:
            self.model.load_state(state)
        self.model.optimizer = ingot.Optimizer(
            self.model, betas=(config.adam_beta1, config.adam_beta2), weight_decay=config.weight_decay
        )

    def state(self) -> dict[str, Any]:
        """Weights by their Hugging Face names."""
        return self.model.state()

    def step(self, batch: Any, rate: float, seed: int) -> float:
        """One optimizer step; the loss before it."""
        weights = np.full(len(batch.targets), 1.0 / len(batch.targets), np.float32)
        self.model.zero_grad()
        loss = self.model.forward_backward(batch.tokens, batch.offsets, batch.targets, weights, seed=seed)
        self.model.step(rate, clip_norm=self.task.config.max_grad_norm)
        return float(loss)

    def loss(self, batch: Any) -> float:
        """Sum of the losses of all tokens, without dropout."""
        _, out = self.model.forward(batch.tokens, batch.offsets, batch.targets, train=False)
        return -float(out.logprobs.astype(np.float64).sum())


class Torch:
    """The peer: GPT-2 in plain PyTorch."""

    def __init__(self, task: Task, seed: int, state: dict[str, Any] | None, compiled: bool) -> None:
        import torch

        torch.manual_seed(seed)
        self.torch = torch
        self.task = task
        self.network = _torch_gpt2(task.shape)
        if state is not None:
            self.network.load_state_dict({name: torch.tensor(np.asarray(value)) for name, value in state.items()})
        decayed = [p for p in self.network.parameters() if p.dim() >= 2]
        plain = [p for p in self.network.parameters() if p.dim() < 2]
        config = task.config
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            betas=(config.adam_beta1, config.adam_beta2),
            fused=True,
        )
        self.run = torch.compile(self.network) if compiled else self.network

    def _rows(self, batch: Any) -> tuple[Any, Any]:
        length = int(batch.offsets[1])
        tokens = self.torch.from_numpy(batch.tokens.astype(np.int64)).view(-1, length)
        return tokens, self.torch.from_numpy(batch.targets.astype(np.int64)).view(-1, length)

    def step(self, batch: Any, rate: float, seed: int) -> float:
        """One optimizer step; the loss before it."""
        self.network.train()
        tokens, targets = self._rows(batch)
        loss = self.run(tokens, targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.task.config.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return float(loss.detach())

    def loss(self, batch: Any) -> float:
        """Sum of the losses of all tokens, without dropout."""
        self.network.eval()
        total = 0.0
        with self.torch.no_grad():
            for low, high in zip(batch.offsets[:-1], batch.offsets[1:], strict=True):
                piece = dataclasses.replace(
                    batch,
                    tokens=batch.tokens[low:high],
                    targets=batch.targets[low:high],
                    offsets=np.array([0, high - low]),
                )
                if low == 0 and len({*np.diff(batch.offsets).tolist()}) == 1:
                    tokens, targets = self._rows(batch)
                    return float(self.network(tokens, targets)) * targets.numel()
                tokens, targets = self._rows(piece)
                total += float(self.network(tokens, targets)) * targets.numel()
        return total


def _torch_gpt2(shape: ModelConfig) -> Any:
    """GPT-2 with Hugging Face's names, so that weights go over unchanged."""
    import torch
    from torch import nn
    from torch.nn import functional

    d, heads, p = shape.hidden_size, shape.num_attention_heads, shape.dropout

    class Conv1D(nn.Module):
        def __init__(self, inputs: int, outputs: int, std: float) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(inputs, outputs) * std)
            self.bias = nn.Parameter(torch.zeros(outputs))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.linear(x, self.weight.t(), self.bias)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            std = shape.initializer_range
            out_std = std / math.sqrt(2 * shape.num_hidden_layers)
            self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
            self.attn = nn.ModuleDict({"c_attn": Conv1D(d, 3 * d, std), "c_proj": Conv1D(d, d, out_std)})
            self.mlp = nn.ModuleDict({"c_fc": Conv1D(d, 4 * d, std), "c_proj": Conv1D(4 * d, d, out_std)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            b, t, _ = x.shape
            q, k, v = (
                part.view(b, t, heads, -1).transpose(1, 2) for part in self.attn["c_attn"](self.ln_1(x)).split(d, 2)
            )
            mixed = functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, dropout_p=p if self.training else 0.0
            )
            mixed = mixed.transpose(1, 2).reshape(b, t, d)
            x = x + functional.dropout(self.attn["c_proj"](mixed), p, self.training)
            hidden = functional.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
            return x + functional.dropout(self.mlp["c_proj"](hidden), p, self.training)

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.wpe = nn.Embedding(shape.vocab_size, d), nn.Embedding(shape.max_position_embeddings, d)
            nn.init.normal_(self.wte.weight, std=shape.initializer_range)
            nn.init.normal_(self.wpe.weight, std=shape.initializer_range)
            self.h = nn.ModuleList([Block() for _ in range(shape.num_hidden_layers)])
            self.ln_f = nn.LayerNorm(d)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = Transformer()

        def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            body = self.transformer
            x = body.wte(tokens) + body.wpe(torch.arange(tokens.shape[1]))
            x = functional.dropout(x, p, self.training)
            for block in body.h:
                x = block(x)
            logits = functional.linear(body.ln_f(x), body.wte.weight)
            return functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))

    return Network()


def _serve(pipe: Connection, side: str, task: Task) -> None:
    """The loop of a side's process: make, compare, train, time, tell."""
    import ingot

    if side != "ingot":
        import torch

        torch.set_num_threads(ingot.build_info()["threads"])
        if side == "torch compiled":
            # Loads the compiler, a few hundred MB of modules, which are no memory of the step.
            torch.compile(lambda x: x.sin() + 1.0)(torch.ones(8))
    else:
        import ingot.models.native
    imported = peak_memory()
    runner: Any = None
    while True:
        request, argument = pipe.recv()
        if request == "make":
            seed, state = argument
            runner = Ours(task, seed, state) if side == "ingot" else Torch(task, seed, state, side == "torch compiled")
            pipe.send(None)
        elif request == "state":
            pipe.send(runner.state())
        elif request == "loss":
            pipe.send(runner.loss(argument))
        elif request == "train":
            first, last, seed = argument
            batches = task.batches(seed)
            began = time.perf_counter()
            for step in range(first, last):
                batch, _ = batches.take(step, Cursor())
                runner.step(batch, task.rate(step), seed * 1_000_003 + step)
            pipe.send(time.perf_counter() - began)
        elif request == "memory":
            pipe.send(peak_memory() - imported)
        else:
            return


class Side:
    """Handle on a side's process."""

    def __init__(self, name: str, task: Task) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, task), daemon=True)
        self._process.start()

    def ask(self, request: str, argument: Any = None) -> Any:
        """Send a request and wait for its answer."""
        self._pipe.send((request, argument))
        return self._pipe.recv()

    def close(self) -> None:
        """End the process."""
        self._pipe.send(("stop", None))
        self._process.join()


def same_weights(sides: list[Side], task: Task, seed: int) -> None:
    """Give all sides ingot's weights and see that they compute the same loss."""
    sides[0].ask("make", (seed, None))
    state = sides[0].ask("state")
    batch, _ = task.batches(seed).take(0, Cursor())
    expected = sides[0].ask("loss", batch) / len(batch.targets)
    for side in sides[1:]:
        side.ask("make", (seed, state))
        got = side.ask("loss", batch) / len(batch.targets)
        assert abs(got - expected) < 1e-4, (
            f"{side.name} computes a loss of {got}, ingot {expected}, on the same weights"
        )
    print(f"same weights, same batch: loss {expected:.5f} on all sides")


def bench_recipe(path: Path, seeds: int, sides_wanted: list[str]) -> dict[str, Any]:
    """The recipe shakespeare-char-cpu to its end, each side with each seed, its own initial weights apart."""
    task = make_task("shakespeare-char-cpu", path, dropout=None)
    steps = task.config.max_steps or 0
    held_out = Stretches(np.array([task.cut]), np.array([len(task.text)]))
    sides = [Side(name, task) for name in sides_wanted]
    same_weights(sides, task, 0)
    rows: dict[str, list[tuple[float, float]]] = {side.name: [] for side in sides}
    for seed in range(seeds):
        for side in sides:
            side.ask("make", (seed, None))
            elapsed_s = side.ask("train", (0, steps, seed))
            total = count = 0.0
            for batch in held_out_batches(task.text, held_out, max_length=task.config.sequence_length, rows=64):
                total += side.ask("loss", batch)
                count += len(batch.targets)
            rows[side.name].append((total / count, elapsed_s))
            print(f"seed {seed}  {side.name:<15} held-out loss {total / count:.4f}  {elapsed_s:7.1f} s", flush=True)
    result = {}
    for name, values in rows.items():
        losses, times = zip(*values, strict=True)
        result[name] = {"loss": statistics.mean(losses), "losses": losses, "elapsed_s": statistics.median(times)}
        print(f"{name:<15} mean loss {result[name]['loss']:.4f}  median {result[name]['elapsed_s']:.1f} s")
    for name in sides_wanted[1:]:
        speed = result[name]["elapsed_s"] / result["ingot"]["elapsed_s"]
        print(
            f"ingot is {speed:.2f}x as fast as {name}; its loss is {result['ingot']['loss'] - result[name]['loss']:+.4f} higher"
        )
    for side in sides:
        side.close()
    return result


def bench_step(path: Path, rounds: int, sides_wanted: list[str]) -> dict[str, Any]:
    """Time and memory of a step of shakespeare-char: 10.8M parameters, 64 x 256 tokens, dropout 0.2."""
    plain = make_task("shakespeare-char", path, dropout=0.0)
    checked = [Side(name, plain) for name in sides_wanted]
    same_weights(checked, plain, 0)
    for side in checked:
        side.close()
    task = make_task("shakespeare-char", path, dropout=None)
    sides = [Side(name, task) for name in sides_wanted]
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    for side in sides:
        side.ask("make", (0, None))
        side.ask("train", (0, 2, 0))
    for index in range(rounds):
        for side in sides:
            times[side.name].append(side.ask("train", (2 + index, 3 + index, 0)))
    result = {}
    for side in sides:
        step_s = statistics.median(times[side.name])
        result[side.name] = {"step_s": step_s, "memory_mb": side.ask("memory") / 1e6}
        rate = task.config.sequence_length * task.config.per_device_train_batch_size / step_s
        print(
            f"{side.name:<15} {step_s:6.3f} s a step  {rate:8.0f} tokens/s  {result[side.name]['memory_mb']:7.0f} MB",
            flush=True,
        )
        side.close()
    ours = result["ingot"]
    for name in sides_wanted[1:]:
        theirs = result[name]
        print(
            f"ingot is {theirs['step_s'] / ours['step_s']:.2f}x as fast as {name} "
            f"and uses {ours['memory_mb'] / theirs['memory_mb']:.2f} of its memory"
        )
    return result


def make_task(recipe: str, path: Path, dropout: float | None) -> Task:
    """A recipe on the bytes of a file."""
    config = PretrainConfig.from_dict(load_recipe(recipe), recipe)
    if dropout is not None:
        config = dataclasses.replace(config, architecture=dataclasses.replace(config.architecture, dropout=dropout))
    text = np.frombuffer(path.read_bytes(), np.uint8).astype(np.int64)
    return Task(config, config.architecture.resolve(256, config.sequence_length), text)


def main() -> None:
    """Run, print, and save where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a text; the small world's stories unless given")
    parser.add_argument("--part", choices=["recipe", "step", "all"], default="all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true", help="write benches/results/<cpu>-pretrain.json")
    arguments = parser.parse_args()
    import torch

    import ingot

    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    build = ingot.build_info()
    machine = f"{cpu_name()}, {build['threads']} threads, level {build['level']}"
    print(f"{machine}; ingot {build['version']}, torch {torch.__version__}")
    compiler = shutil.which("g++") is not None
    if not compiler:
        print("g++ is missing, so torch.compile cannot run: apt install g++; only plain torch is compared")
    with tempfile.TemporaryDirectory() as folder:
        # A cache of its own: one that a killed compilation left behind cannot be loaded.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "inductor")
        path = arguments.data
        if path is None:
            from ingot.world import documents

            path = Path(folder) / "world.txt"
            path.write_text(
                "\n".join(str(d.text) for d in documents(seed=0, split="train", count=5000)), encoding="utf-8"
            )
        results: dict[str, Any] = {"machine": machine, "torch": torch.__version__, "data": path.name}
        sides = ["ingot", "torch"] + (["torch compiled"] if compiler else [])
        if arguments.part in ("recipe", "all"):
            results["recipe"] = bench_recipe(path, arguments.seeds, ["ingot", "torch"])
        if arguments.part in ("step", "all"):
            results["step"] = bench_step(path, arguments.rounds, sides)
    if arguments.save:
        folder_path = Path(__file__).parent / "results"
        folder_path.mkdir(exist_ok=True)
        cpu = re.sub(r"\((r|tm)\)", "", cpu_name().lower())
        name = "-".join(cpu.split()) + f"-{build['threads']}-threads-pretrain.json"
        if (folder_path / name).exists():
            # Parts that were measured in another run stay.
            results = {**json.loads((folder_path / name).read_text(encoding="utf-8")), **results}
        (folder_path / name).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"saved {folder_path / name}")


if __name__ == "__main__":
    main()
