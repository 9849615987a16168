"""What a run holds in memory at its peak, counted from the shapes of its networks before any of them is loaded."""

from __future__ import annotations

import dataclasses

from ingot.configs import LoraConfig, ModelConfig, SyncConfig
from ingot.errors import RunError
from ingot.training.lora import num_trained

_F32 = 4
# A started process with all its libraries; measured 0.15 GB.
_PROCESS_BYTES = 150_000_000
# As the core has them: rows of a block's working memory, floats of a chunk of logits (or a share of the vocabulary's matrix), and
# positions of a page of keys and values.
_CHUNK_ROWS = 1024
_LOGITS_FLOATS = 4 << 20
_LOGITS_SHARE = 4
_PAGE_POSITIONS = 64


@dataclasses.dataclass(frozen=True)
class Held:
    """A network of a run, and what is done with it."""

    shape: ModelConfig
    num_copies: int = 1
    """Of its weights; 0 where it stands on those of another network."""
    num_trained: int = 0
    """Parameters that steps change."""
    batch_tokens: int = 0
    """Of the largest pass that a backward pass follows."""
    read_tokens: int = 0
    """Of the largest pass that none follows."""
    num_sequences: int = 0
    """Answers that are sampled at a time."""
    sequence_tokens: int = 0
    """Of the longest of these, its prompt included."""

    @property
    def weight_bytes(self) -> int:
        """Weights."""
        return _F32 * self.num_copies * self.shape.num_parameters

    @property
    def training_bytes(self) -> int:
        """Gradients and two moments, and the copy of the moments that a checkpoint is written from."""
        return _F32 * 5 * self.num_trained

    @property
    def pass_bytes(self) -> int:
        """What a pass keeps for its backward pass, and what it works in.

        Kept per token and layer are the residual stream twice, queries, keys, values, the attention's output with one number for each
        head, and the MLP's inner layer.
        """
        shape = self.shape
        width, heads, vocab = shape.hidden_size, shape.num_attention_heads, shape.vocab_size
        query, inner = heads * (shape.head_dim or 0), shape.intermediate_size or 0
        attention = 2 * query + heads + self._key_value_width
        expanded = (2 if shape.activation == "swiglu" else 1) * inner
        tokens = max(self.batch_tokens, self.read_tokens)
        kept = self.batch_tokens * shape.num_hidden_layers * (2 * width + attention + expanded)
        working = tokens * (2 * width + attention) + min(tokens, _CHUNK_ROWS) * (2 * width + inner + expanded)
        logits = min(tokens * vocab, max(_LOGITS_FLOATS, vocab * width // _LOGITS_SHARE))
        return _F32 * (kept + working + logits)

    @property
    def cache_bytes(self) -> int:
        """Keys and values of the answers that are being sampled, in whole pages."""
        positions = -(-self.sequence_tokens // _PAGE_POSITIONS) * _PAGE_POSITIONS
        return _F32 * self.num_sequences * positions * self.shape.num_hidden_layers * self._key_value_width

    @property
    def _key_value_width(self) -> int:
        return 2 * (self.shape.num_key_value_heads or 0) * (self.shape.head_dim or 0)


def learner(
    config: LoraConfig,
    shape: ModelConfig,
    batch_tokens: int,
    *,
    num_values: int = 0,
    reference: bool = False,
    read_tokens: int = 0,
    num_sequences: int = 0,
    sequence_tokens: int = 0,
) -> Held:
    """The network that a run trains, with the reference that began as its fork.

    Under an adapter the two share their weights to the end; otherwise the first step gives the policy a copy of its own. A reference that
    follows the policy takes one more, for held-out figures stay measured against the start.

    Parameters
    ----------
    num_values
        Scalar heads of an adapter.
    reference
        Whether there is one.
    """
    adapter = num_trained(config, shape, num_values)
    follows = isinstance(config, SyncConfig) and config.sync_ref_model
    return Held(
        shape,
        num_copies=1 + (reference and adapter is None) + (reference and follows),
        num_trained=shape.num_parameters if adapter is None else adapter,
        batch_tokens=batch_tokens,
        read_tokens=read_tokens,
        num_sequences=num_sequences,
        sequence_tokens=sequence_tokens,
    )


def memory_estimate(*held: Held) -> int:
    """Bytes of a run with these networks at its peak."""
    each = (one.weight_bytes + one.training_bytes + one.pass_bytes + one.cache_bytes for one in held)
    return _PROCESS_BYTES + sum(each)


def require_memory(
    limit: int,
    *held: Held,
    remedy: str = "lower --pack-length, train an adapter (--lora-rank), or take a smaller network",
) -> None:
    """Refuse a run that cannot fit into ``limit`` bytes.

    Raises
    ------
    RunError
        Says what takes how much, and ``remedy``.
    """
    needed = memory_estimate(*held)
    if needed <= limit:
        return
    parts = {
        "weights": sum(one.weight_bytes for one in held),
        "gradients and moments": sum(one.training_bytes for one in held),
        "passes": sum(one.pass_bytes for one in held),
        "keys and values of answers": sum(one.cache_bytes for one in held),
    }
    told = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size >= 5e7)
    raise RunError(
        f"this run needs about {needed / 1e9:.1f} GB of memory ({told}) and {limit / 1e9:.1f} GB are there: {remedy}"
    )
