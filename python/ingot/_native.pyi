"""The compiled core. Each group belongs to one file of rust/bindings/src; see the Python classes for what they do."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypedDict, final, type_check_only

import numpy as np
import numpy.typing as npt

__all__ = [
    "Context",
    "Decoder",
    "Model",
    "Optimizer",
    "Tokenizer",
    "TokenizerTrainer",
    "build_info",
    "measured_peak",
]

# ---- tokenizer (rust/bindings/src/tokenizer.rs); None for allowed or disallowed means all special tokens

@final
class Tokenizer:
    @staticmethod
    def from_file(path: str | os.PathLike[str]) -> Tokenizer: ...
    @staticmethod
    def from_tiktoken(
        path: str | os.PathLike[str], pattern: str, special_tokens: Sequence[tuple[str, int]]
    ) -> Tokenizer: ...
    @staticmethod
    def from_contents(
        kind: str, contents: bytes, pattern: str, special_tokens: Sequence[tuple[str, int]]
    ) -> Tokenizer: ...
    @staticmethod
    def bytes_only(pattern: str) -> Tokenizer: ...
    def contents(self) -> tuple[str, bytes]: ...
    def canonical_bytes(self) -> bytes: ...
    def save(self, path: str | os.PathLike[str]) -> Path: ...
    def save_tiktoken(self, path: str | os.PathLike[str]) -> None: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def pattern(self) -> str: ...
    @property
    def special_tokens(self) -> list[tuple[str, int]]: ...
    def encode(
        self, text: str | bytes, allowed: Sequence[str] | None, disallowed: Sequence[str] | None
    ) -> list[int]: ...
    def encode_to_numpy(
        self, text: str | bytes, allowed: Sequence[str] | None, disallowed: Sequence[str] | None
    ) -> npt.NDArray[np.uint32]: ...
    def encode_batch(
        self,
        texts: Sequence[str | bytes],
        allowed: Sequence[str] | None,
        disallowed: Sequence[str] | None,
        threads: int | None,
    ) -> list[list[int]]: ...
    def encode_batch_to_numpy(
        self,
        texts: Sequence[str | bytes],
        allowed: Sequence[str] | None,
        disallowed: Sequence[str] | None,
        threads: int | None,
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]: ...
    def encode_file(self, path: str | os.PathLike[str], output: str | os.PathLike[str], threads: int | None) -> int: ...
    def decode_list(self, ids: Sequence[int]) -> bytes: ...
    def decode_array(self, ids: npt.NDArray[np.int64]) -> bytes: ...
    def piece_offsets(self, text: str | bytes) -> npt.NDArray[np.int64]: ...

@final
class TokenizerTrainer:
    def __new__(cls, pattern: str, threads: int | None) -> TokenizerTrainer: ...
    def add_documents(self, documents: Sequence[str | bytes]) -> int: ...
    def add_file(self, path: str | os.PathLike[str]) -> int: ...
    def train(
        self,
        vocab_size: int,
        special_tokens: Sequence[str],
        min_frequency: int,
        progress: Callable[[int, int], object] | None,
    ) -> Tokenizer: ...

# ---- machine (rust/bindings/src/machine.rs)

@type_check_only
class BuildInfo(TypedDict):
    version: str
    profile: Literal["debug", "release"]
    level: str
    levels_available: list[str]
    threads: int

@type_check_only
class MeasuredPeak(TypedDict):
    gflops: float
    read_gb_per_s: float

def build_info(threads: int | None = None) -> BuildInfo: ...
def measured_peak(threads: int | None = None) -> MeasuredPeak: ...

# ---- model (rust/bindings/src/model.rs, optimizer.rs, decoder.rs); ingot.models.native wraps these

@final
class Context:
    @property
    def spent(self) -> bool: ...

@final
class Model:
    def __new__(cls, config: str, *, seed: int, level: str | None, threads: int | None, num_values: int) -> Model: ...
    @property
    def table(self) -> list[tuple[str, list[int]]]: ...
    @property
    def num_values(self) -> int: ...
    @property
    def num_parameters(self) -> int: ...
    @property
    def level(self) -> str: ...
    @property
    def threads(self) -> int: ...
    def fork(self) -> Model: ...
    def parameters(self) -> dict[str, npt.NDArray[np.float32]]: ...
    def snapshot(self) -> dict[str, npt.NDArray[np.float32]]: ...
    def gradients(self) -> dict[str, npt.NDArray[np.float32]]: ...
    def add_adapter(
        self, *, rank: int, scale: float, modules: Sequence[str], num_values: int, dropout: float
    ) -> int: ...
    def adapter_parameters(self, adapter: int) -> dict[str, npt.NDArray[np.float32]]: ...
    def adapter_gradients(self, adapter: int) -> dict[str, npt.NDArray[np.float32]]: ...
    def mark_changed(self) -> None: ...
    def forward(
        self,
        tokens: npt.NDArray[np.int32],
        offsets: npt.NDArray[np.int64],
        targets: npt.NDArray[np.int32],
        *,
        want: Sequence[str],
        value_rows: npt.NDArray[np.bool_] | None,
        hidden_rows: npt.NDArray[np.int64] | None,
        candidates: tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]] | None,
        temperature: float,
        banned_ids: npt.NDArray[np.int32],
        train: bool,
        seed: int,
        sequence_ids: npt.NDArray[np.int64] | None,
        adapter: int | None,
    ) -> tuple[Context | None, dict[str, npt.NDArray[np.generic]]]: ...
    def backward(
        self,
        context: Context,
        *,
        d_logprobs: npt.NDArray[np.float32] | None,
        d_entropy: npt.NDArray[np.float32] | None,
        d_values: npt.NDArray[np.float32] | None,
        d_lse: npt.NDArray[np.float32] | None,
        d_zbar: npt.NDArray[np.float32] | None,
        d_hidden: npt.NDArray[np.float32] | None,
        d_candidates: npt.NDArray[np.float32] | None,
    ) -> None: ...
    def forward_backward(
        self,
        tokens: npt.NDArray[np.int32],
        offsets: npt.NDArray[np.int64],
        targets: npt.NDArray[np.int32],
        weights: npt.NDArray[np.float32],
        *,
        temperature: float,
        banned_ids: npt.NDArray[np.int32],
        train: bool,
        seed: int,
        sequence_ids: npt.NDArray[np.int64] | None,
        adapter: int | None,
    ) -> float: ...
    def zero_grad(self) -> None: ...

@final
class Optimizer:
    def __new__(
        cls,
        model: Model,
        *,
        groups: Sequence[tuple[list[str], float, float]],
        betas: tuple[float, float],
        eps: float,
        eps_mode: str,
        muon_momentum: float | None,
        adapter: int | None,
    ) -> Optimizer: ...
    def step(self, model: Model, *, lr: float, clip_norm: float | None) -> tuple[float, bool]: ...
    def moments(self) -> tuple[dict[str, npt.NDArray[np.float32]], dict[str, npt.NDArray[np.float32]]]: ...
    @property
    def steps_taken(self) -> int: ...
    def set_steps_taken(self, steps: int) -> None: ...

@final
class Decoder:
    def __new__(
        cls,
        model: Model,
        *,
        max_tokens: int,
        max_sequences: int,
        seed: int,
        banned_ids: npt.NDArray[np.int32],
        adapter: int | None,
    ) -> Decoder: ...
    def add(
        self,
        tokens: npt.NDArray[np.int32],
        sequence_id: int,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repetition_penalty: float,
    ) -> int: ...
    def fork(self, slot: int, sequence_id: int) -> int: ...
    def step(
        self, forced: Sequence[tuple[int, int]]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float32]]: ...
    def remove(self, slot: int) -> None: ...
    @property
    def active(self) -> list[int]: ...
    def length(self, slot: int) -> int: ...
