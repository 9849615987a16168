"""The small files that Hugging Face's libraries expect beside weights and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ingot.data.chat import ChatEncoder
    from ingot.tokenizer import Tokenizer


def write_tokenizer_config(
    folder: Path, tokenizer: Tokenizer, max_length: int | None = None, encoder: ChatEncoder | None = None
) -> None:
    """``tokenizer_config.json``: which class opens tokenizer.json, and the end-of-text token, which also begins a text.

    With ``encoder`` the special tokens are those of its chat template, which is written beside it.
    """
    fields: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if max_length is not None:
        fields["model_max_length"] = max_length
    if encoder is not None:
        template = encoder.template
        names = {
            "bos_token": template.bos_token,
            # A template that does not name its end has no use for one; other tools stop at it.
            "eos_token": template.eos_token or encoder.end_of_turn,
            "pad_token": template.padding_token(tokenizer),
        }
        fields |= {name: token for name, token in names.items() if token}
        template.save(folder)
    elif tokenizer.eos_token_id is not None:
        end = tokenizer.decode([tokenizer.eos_token_id])
        fields |= {"bos_token": end, "eos_token": end}
    _write(folder / "tokenizer_config.json", fields)


def write_generation_config(folder: Path, tokenizer: Tokenizer, encoder: ChatEncoder | None = None) -> None:
    """``generation_config.json``: where generation begins and ends."""
    fields: dict[str, Any] = {"do_sample": True}
    if encoder is not None:
        fields["eos_token_id"] = sorted(encoder.end_ids)
        begin = tokenizer.special_tokens.get(encoder.template.bos_token)
        for name, token in (("bos_token_id", begin), ("pad_token_id", encoder.pad_token_id)):
            if token is not None:
                fields[name] = token
    elif tokenizer.eos_token_id is not None:
        fields |= {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    _write(folder / "generation_config.json", fields)


def _write(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
