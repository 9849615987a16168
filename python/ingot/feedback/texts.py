"""Prompts and responses as rows carry them: a string, or a list of messages with a role and a content."""

from __future__ import annotations

from ingot.data.keys import Text


def text_problem(value: object) -> str | None:
    """What keeps ``value`` from being a prompt or a response, in words; None where nothing does."""
    if isinstance(value, str):
        return None
    if not isinstance(value, list):
        return f"is a {type(value).__name__}, not a string or a list of messages"
    if not value:
        return "is an empty list; give a string or messages"
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            return f"has a {type(message).__name__} as message {number}, not an object"
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                return f'has no string "{name}" in message {number}'
    return None


def plain(text: Text) -> str:
    """The words alone: a string as it is, messages one after the other without their roles."""
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)
