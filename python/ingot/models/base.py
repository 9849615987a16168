"""The seam: what a model is to the losses, the loops and the decoder, whichever backend computes it.

Everything is a function of log-probabilities per token, and of scalar heads. Batches are packed: one flat token array and the
offsets of its sequences, no padding. Index t is the state "tokens up to t of this sequence"; ``targets[t]`` is the action taken
there; for a language model that is the next token. Outputs are 0 in rows that have no target or were not asked for.

Shape legend: N tokens of the batch, S sequences, V vocabulary, d hidden size, k scalar heads, R chosen rows, n active slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from ingot.configs import ModelConfig
from ingot.errors import ConfigError

if TYPE_CHECKING:
    from ingot.models.adapters import Adapter

FloatArray: TypeAlias = npt.NDArray[np.float32]
IntArray: TypeAlias = npt.NDArray[np.int32]
LongArray: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

Candidates: TypeAlias = tuple[LongArray, IntArray]
"""Token ids for each row of a batch: row t has ``ids[offsets[t]:offsets[t + 1]]``; offsets i64[N + 1], ids i32[C]. A row may have none,
and the same id several times."""

OUTPUT_NAMES = ("logprobs", "entropy", "lse", "zbar", "top1", "values", "hidden", "candidate_logprobs")
"""What ``forward`` can be asked for."""


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Results of a forward pass. An output that was not asked for is an ``AttributeError`` that says so."""

    arrays: Mapping[str, npt.NDArray[np.generic]]
    """The outputs that were asked for, by name."""

    @property
    def logprobs(self) -> FloatArray:
        """ln p(target) under softmax(logits / temperature), f32[N]."""
        return self._get("logprobs")  # type: ignore[return-value]

    @property
    def entropy(self) -> FloatArray:
        """Entropy of the same distribution in nats, f32[N]."""
        return self._get("entropy")  # type: ignore[return-value]

    @property
    def lse(self) -> FloatArray:
        """ln sum exp(logits / temperature), f32[N]."""
        return self._get("lse")  # type: ignore[return-value]

    @property
    def zbar(self) -> FloatArray:
        """Mean of logits / temperature over the ids that are not banned, f32[N]."""
        return self._get("zbar")  # type: ignore[return-value]

    @property
    def top1(self) -> BoolArray:
        """Whether the target is the likeliest token, bool[N]."""
        return self._get("top1")  # type: ignore[return-value]

    @property
    def values(self) -> FloatArray:
        """Scalar heads: f32[N] for a model with one, f32[N, k] for k > 1."""
        return self._get("values")  # type: ignore[return-value]

    @property
    def hidden(self) -> FloatArray:
        """Final norm's output at ``hidden_rows``, f32[R, d]."""
        return self._get("hidden")  # type: ignore[return-value]

    @property
    def candidate_logprobs(self) -> FloatArray:
        """ln p(candidate) under softmax(logits / temperature), in the order of the candidates, f32[C]."""
        return self._get("candidate_logprobs")  # type: ignore[return-value]

    def _get(self, name: str) -> npt.NDArray[np.generic]:
        try:
            return self.arrays[name]
        except KeyError:
            raise AttributeError(f"{name} was not computed: add {name!r} to forward's want") from None


@dataclasses.dataclass(frozen=True)
class StepInfo:
    """What an optimizer step did."""

    grad_norm: float
    """Euclidean norm of all gradients before clipping."""
    skipped: bool
    """The norm was not finite: weights and moments are as before."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. The log-probability that is reported is always that of the full softmax at ``temperature``."""

    temperature: float = 1.0
    """Divides the logits; 0 always takes the likeliest token (its log-probability is then that at temperature 1)."""
    top_k: int = 0
    """Draw among this many likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together reach this probability."""
    min_p: float = 0.0
    """Draw among tokens at least this share as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Logits of tokens that the sequence already has are divided by this where positive, multiplied where negative (Keskar et al.
    2019). Changes which token is drawn, not the log-probability that is reported."""

    def __post_init__(self) -> None:
        for holds, message in (
            (0.0 <= self.temperature < float("inf"), f"temperature must be 0 or more, got {self.temperature}"),
            (self.top_k >= 0, f"top_k must be 0 (all tokens) or more, got {self.top_k}"),
            (0.0 < self.top_p <= 1.0, f"top_p must be above 0 and at most 1, got {self.top_p}"),
            (0.0 <= self.min_p <= 1.0, f"min_p must be between 0 and 1, got {self.min_p}"),
            (
                0.0 < self.repetition_penalty < float("inf"),
                f"repetition_penalty must be positive, got {self.repetition_penalty}",
            ),
        ):
            if not holds:
                raise ConfigError(message)


@dataclasses.dataclass(frozen=True)
class DecodeStep:
    """One token for each active slot of a decoder, in ascending order of slots."""

    slots: IntArray
    """i32[n]."""
    tokens: IntArray
    """Tokens drawn (or forced), i32[n]."""
    logprobs: FloatArray
    """Their log-probabilities under the full softmax at the slot's temperature, banned ids masked, f32[n]."""
    entropy: FloatArray
    """Entropy of that softmax in nats, f32[n]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that an optimizer treats alike."""

    names: tuple[str, ...]
    """Hugging Face names; ``*`` and ``?`` match as in file names. A parameter belongs to the first group that matches it."""
    lr_scale: float = 1.0
    """Factor of the learning rate; 0 freezes."""
    weight_decay: float | None = None
    """For every parameter of the group; the optimizer's value for matrices and 0 for vectors unless given."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.lr_scale < float("inf"):
            raise ConfigError(f"lr_scale must be 0 or more, got {self.lr_scale}")
        if self.weight_decay is not None and not 0.0 <= self.weight_decay < float("inf"):
            raise ConfigError(f"weight_decay must be 0 or more, got {self.weight_decay}")


EpsMode: TypeAlias = Literal["torch", "tf"]
"""Where AdamW adds epsilon: after bias correction (torch), or before it (TensorFlow)."""

Optim: TypeAlias = Literal["adamw", "muon"]
"""AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for the others."""


@runtime_checkable
class Context(Protocol):
    """Activations that wait for a backward pass. Dropping it frees them."""

    @property
    def spent(self) -> bool:
        """Whether backward was called with it."""
        ...


@runtime_checkable
class Optimizer(Protocol):
    """AdamW (Loshchilov and Hutter 2019) or Muon (Jordan et al. 2024) over all parameters of one model, with one norm for clipping."""

    def step(self, lr: float, clip_norm: float | None = 1.0) -> StepInfo:
        """Update the weights from the gradients, which stay as they are.

        Parameters
        ----------
        lr
            Learning rate of this step.
        clip_norm
            Scale the gradients down to this global norm where they are above it; None for no clipping.
        """
        ...

    def state(self) -> dict[str, npt.NDArray[np.generic]]:
        """Copies: ``step`` i64[1] and for each parameter ``m.NAME`` and ``v.NAME``, f32 in Hugging Face's shapes.

        Of Muon also ``muon`` i64[1], a mark; its momentum is in ``m``, and ``v`` is 0 there.
        """
        ...

    def load_state(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """The inverse of :meth:`state`; a missing, surplus or mis-shaped entry is a ``CheckpointError`` that names it, and so is
        the state of another ``optim``."""
        ...


@runtime_checkable
class Decoder(Protocol):
    """Writes several sequences at once, one token a step, from a cache of keys and values.

    Random numbers are a function of (seed, sequence_id, position): a sample does not depend on what else is being decoded.
    A decoder belongs to the weights at its creation: after they changed, each of its calls is a ``RuntimeError``.
    """

    @property
    def active(self) -> list[int]:
        """Slots in use, ascending."""
        ...

    def add(self, tokens: npt.ArrayLike, sequence_id: int, sampling: Sampling = ...) -> int:
        """Read a prompt of at least one token and return its slot."""
        ...

    def fork(self, slot: int, sequence_id: int) -> int:
        """A second sequence that begins as this one is now; the cache is shared until they differ."""
        ...

    def step(self, forced: Mapping[int, int] | None = None) -> DecodeStep:
        """Draw a token for each active slot, or take the one that ``forced`` has for it, and append it to the sequence."""
        ...

    def remove(self, slot: int) -> None:
        """Give the slot and its cache back."""
        ...

    def length(self, slot: int) -> int:
        """Tokens of the sequence so far, prompt included."""
        ...


@runtime_checkable
class Model(Protocol):
    """A network with its parameters, gradients and optimizer.

    Not for use by two threads at once: the second one gets a ``RuntimeError``.
    """

    optimizer: Optimizer
    """What :meth:`step` uses: AdamW with the defaults of :func:`ingot.models.Optimizer` unless replaced. Each adapter has its own,
    and so have the weights; this is that of the active adapter."""

    active_adapter: str | None
    """The adapter that calls without ``adapter`` go through, that :meth:`step` trains and that :meth:`save` merges; None for none."""

    @property
    def config(self) -> ModelConfig:
        """The network's shape."""
        ...

    @property
    def backend(self) -> Literal["native", "torch"]:
        """Which backend computes it."""
        ...

    @property
    def level(self) -> str:
        """Instruction level in use (native), or the device (torch)."""
        ...

    @property
    def threads(self) -> int:
        """CPU threads in use."""
        ...

    @property
    def num_values(self) -> int:
        """Scalar heads, ``score.weight`` [k, d] and ``score.bias`` [k], of a call without ``adapter``: the active adapter's, else the
        model's own; 0 for none."""
        ...

    @property
    def num_parameters(self) -> int:
        """Number of weights, a shared head counted once."""
        ...

    @property
    def parameters(self) -> Mapping[str, FloatArray]:
        """Weights by Hugging Face name. Native: writable views of the flat buffer; a write is seen by the next forward.

        Views are of this model alone: asking for them takes a copy where a fork shares the memory (see :meth:`fork`).
        """
        ...

    @property
    def gradients(self) -> Mapping[str, FloatArray]:
        """Gradients by Hugging Face name, zeros before the first backward. Native: writable views of the flat buffer."""
        ...

    def forward(
        self,
        tokens: IntArray,
        offsets: LongArray,
        targets: IntArray,
        *,
        want: Collection[str] = ("logprobs",),
        value_rows: BoolArray | None = None,
        hidden_rows: LongArray | None = None,
        candidates: Candidates | None = None,
        temperature: float = 1.0,
        banned_ids: Sequence[int] | IntArray | None = None,
        train: bool = True,
        seed: int = 0,
        sequence_ids: LongArray | None = None,
        adapter: str | None = None,
    ) -> tuple[Context | None, Outputs]:
        """Log-probabilities and other outputs of a packed batch.

        Parameters
        ----------
        tokens
            Token ids, i32[N].
        offsets
            Sequence s is ``tokens[offsets[s]:offsets[s + 1]]``; i64[S + 1], starts with 0, ends with N. Sequences may be empty.
        targets
            The token to be scored after each position, -1 for none; i32[N]. The head runs on rows with a target alone, and on those
            with candidates where these are wanted.
        want
            Names among :data:`OUTPUT_NAMES`.
        value_rows
            Rows whose scalar heads are computed, bool[N]; all unless given.
        hidden_rows
            Rows whose final hidden state is returned, i64[R]; all unless given.
        candidates
            (offsets, ids): ids whose log-probabilities ``candidate_logprobs`` returns, of the same softmax as ``logprobs``. Rows
            with candidates need no target; their other outputs are 0 then.
        temperature
            Logits are divided by it, before everything else; positive.
        banned_ids
            Ids that have probability 0; not allowed as targets or candidates.
        train
            Keep what backward needs, and apply dropout. False keeps nothing, and the context is None.
        seed
            Of the dropout masks, which are a function of (seed, layer, place, sequence id, position).
        sequence_ids
            Identities of the sequences for that, i64[S]; 0 to S - 1 unless given.
        adapter
            Name of the adapter to go through; the active one unless given, "off" for none. The backward pass adds to the gradients of
            that adapter alone.

        Returns
        -------
        (context, outputs)
            Several contexts may be alive at once.
        """
        ...

    def backward(
        self,
        ctx: Context,
        d_logprobs: FloatArray | None = None,
        d_entropy: FloatArray | None = None,
        d_values: FloatArray | None = None,
        d_lse: FloatArray | None = None,
        d_zbar: FloatArray | None = None,
        d_hidden: FloatArray | None = None,
        d_candidates: FloatArray | None = None,
    ) -> None:
        """Add the gradient of ``sum(output * d_output)`` to :attr:`gradients`. Shapes are those of the outputs, f32;
        ``d_candidates`` [C] belongs to ``candidate_logprobs``.

        Raises
        ------
        RuntimeError
            The context is spent, belongs to another model, or the weights changed since it was made.
        """
        ...

    def forward_backward(
        self,
        tokens: IntArray,
        offsets: LongArray,
        targets: IntArray,
        weights: FloatArray,
        *,
        temperature: float = 1.0,
        banned_ids: Sequence[int] | IntArray | None = None,
        train: bool = True,
        seed: int = 0,
        sequence_ids: LongArray | None = None,
        adapter: str | None = None,
    ) -> float:
        """Next-token loss ``sum(weights * -logprobs)`` in f64, its gradient added: the same as forward and backward, fused.

        ``weights`` is f32[N], normalised by the caller (for a mean: 1 / number of targets). ``train`` turns dropout on.
        """
        ...

    def zero_grad(self) -> None:
        """Set all gradients to 0, those of adapters too."""
        ...

    def step(self, lr: float, clip_norm: float | None = 1.0) -> StepInfo:
        """``optimizer.step(lr, clip_norm)``."""
        ...

    def decoder(
        self,
        max_tokens: int,
        max_sequences: int,
        *,
        seed: int = 0,
        banned_ids: Sequence[int] | IntArray | None = None,
        adapter: str | None = None,
    ) -> Decoder:
        """A decoder with room for ``max_sequences`` sequences of up to ``max_tokens`` tokens each, prompt included.

        ``adapter`` is as in :meth:`forward`.
        """
        ...

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The adapters by name (see :mod:`ingot.models.adapters`)."""
        ...

    def add_adapter(
        self,
        name: str,
        rank: int = 8,
        alpha: float = 16.0,
        target_modules: str | Sequence[str] = "all-linear",
        seed: int = 0,
        *,
        num_values: int | None = None,
        dropout: float = 0.0,
    ) -> Adapter:
        """A new LoRA adapter, which changes nothing before it is trained. See :meth:`ingot.models.adapters.Adapted.add_adapter`."""
        ...

    def merge_adapter(self, name: str) -> None:
        """Add an adapter to the weights; other adapters, and "off", are a ``RuntimeError`` until it is unmerged."""
        ...

    def unmerge_adapter(self) -> None:
        """Take the merged adapter off the weights again."""
        ...

    def merged_state(self) -> Mapping[str, FloatArray]:
        """The weights with the active adapter merged; each is made when it is asked for."""
        ...

    def save_adapter(self, name: str, folder: str | Path) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as peft does."""
        ...

    def load_adapter(self, folder: str | Path, name: str = "default") -> Adapter:
        """Add an adapter from such a folder."""
        ...

    def fork(self) -> Model:
        """A second model with the weights and adapters that this one has now; nothing done to either changes the other.

        They share the weights' memory until one of them is written to (by a step, by :meth:`load_state`, or by asking a native
        model for :attr:`parameters`), which takes a copy first.
        """
        ...

    def state(self) -> dict[str, FloatArray]:
        """Copies of all weights by Hugging Face name."""
        ...

    def snapshot(self) -> Mapping[str, FloatArray]:
        """All weights by Hugging Face name, to read and to drop: views of the model's memory where it can be seen, else copies."""
        ...

    def load_state(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """The inverse of :meth:`state`; missing, surplus or mis-shaped weights are a ``CheckpointError`` that names them."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``, the active adapter merged: a directory that transformers opens."""
        ...

    def flops_per_token(self, max_length: int) -> float:
        """Floating-point operations of a training step per token at sequences of ``max_length`` tokens."""
        ...


def check_want(want: Collection[str], num_values: int, candidates: Candidates | None) -> frozenset[str]:
    """The outputs asked for, checked by name.

    Raises
    ------
    ConfigError
        A name is unknown, values are asked of a model that has no scalar heads, or candidates are missing or not asked for.
    """
    if isinstance(want, str):
        raise ConfigError(f"want takes a collection of names, got the string {want!r}: write ({want!r},)")
    unknown = sorted(set(want) - set(OUTPUT_NAMES))
    if unknown:
        raise ConfigError(f"want has no output named {unknown[0]!r}; there are {', '.join(OUTPUT_NAMES)}")
    if "values" in want and num_values == 0:
        raise ConfigError("the model has no scalar heads: make it with num_values of 1 or more")
    if ("candidate_logprobs" in want) != (candidates is not None):
        raise ConfigError("candidates and 'candidate_logprobs' in want go together: give both or neither")
    if candidates is not None and not (isinstance(candidates, tuple) and len(candidates) == 2):
        raise ConfigError(f"candidates takes a pair of arrays (offsets, ids), got {type(candidates).__name__}")
    return frozenset(want)
