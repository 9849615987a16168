"""What a model writes at each evaluation: the same prompt and random numbers each time, so that samples can be compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ingot.configs import PretrainConfig
from ingot.inference.generate import generate
from ingot.training.preparation import Text

if TYPE_CHECKING:
    from ingot.models.base import Model

_TEMPERATURE = 0.8
_PROMPT_TOKENS = 16


def choose_prompt(config: PretrainConfig, text: Text) -> str:
    """The configured one, or the first tokens of the held-out text (of the training text where nothing is held out)."""
    if config.sample_prompt is not None:
        return config.sample_prompt
    stretches = text.split.held_out if len(text.split.held_out) else text.split.train
    start, stop = int(stretches.starts[0]), int(stretches.stops[0])
    length = max(1, min(_PROMPT_TOKENS, config.sequence_length // 4))
    ids = [int(token) for token in text.shards.ids[start : min(start + length, stop)]]
    return text.tokenizer.decode([token for token in ids if token != text.shards.eos_token_id])


def write_sample(model: Model, text: Text, prompt: str, length: int, seed: int) -> str | None:
    """A continuation of up to ``length`` tokens; None where learned positions leave no room for one."""
    if model.config.position == "learned":
        # One position more for the end-of-text token that begins a document.
        used = len(text.tokenizer.encode_ordinary(prompt)) + 1
        length = min(length, model.config.max_position_embeddings - used)
    if length < 1:
        return None
    completions = generate(model, text.tokenizer, [prompt], max_new_tokens=length, temperature=_TEMPERATURE, seed=seed)
    return completions[0].text
