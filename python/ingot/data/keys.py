"""What prompts and rows are known by: ids and keys that are a function of content alone, the same on every machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Text = str | Sequence[Mapping[str, Any]]
"""Plain text, or messages with role and content."""

By = Literal["first_turn", "prompt"]


def canonical(*values: object) -> bytes:
    """The same bytes for the same values, whatever the order of keys: what ids and keyed random numbers are made from."""
    return json.dumps(values, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()


def digest(*values: object) -> str:
    """sha256 of the values as hex."""
    return hashlib.sha256(canonical(*values)).hexdigest()


def uniform(*values: object) -> float:
    """A number in [0, 1) that is a function of the values: the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(canonical(*values)).digest()[:8], "big") / 2.0**64


def group_id_of(prompt: Text, responses: Sequence[Text]) -> str:
    """Names a prompt with these responses, in whatever order: where a row has no ``group_id``.

    Where the prompt is a conversation, a response in plain text is the assistant's message.
    """
    turns = [
        [{"role": "assistant", "content": response}]
        if isinstance(response, str) and not isinstance(prompt, str)
        else response
        for response in responses
    ]
    return digest(prompt, sorted(canonical(turn).decode() for turn in turns))[:16]


def prompt_key(prompt: Text, by: By = "first_turn") -> list[str]:
    """Equal for prompts that ask the same; case and white space make no difference.

    A string is the same as one message of the user with that text. ``by="first_turn"``: messages count up to the first one of the
    user, so that all continuations of one conversation have one key. ``by="prompt"``: all messages count.
    """
    messages: Sequence[Mapping[str, Any]] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if by == "first_turn":
        first = next((number for number, message in enumerate(messages) if message["role"] == "user"), len(messages))
        messages = messages[: first + 1]
    return [" ".join(part.casefold().split()) for message in messages for part in (message["role"], message["content"])]
