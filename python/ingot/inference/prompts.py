"""Prompts as a model sees them, and where its answers end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ingot.data.chat import ChatEncoder, ChatTemplate
from ingot.data.rows import Content
from ingot.errors import DataError
from ingot.models.base import IntArray
from ingot.tokenizer import Tokenizer


class PromptEncoder:
    """The prompts of one model: messages by the template in its folder, strings as plain text.

    A model without a template and its tokens (one that was only pretrained) takes strings alone.
    """

    def __init__(self, folder: str | Path, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.chat: ChatEncoder | None = None
        """Encodes dialogues; None for a model without a template."""
        self._no_chat = ""
        try:
            self.chat = ChatEncoder(ChatTemplate.of_model(folder), tokenizer)
        except DataError as error:
            self._no_chat = str(error)
        end = tokenizer.eos_token_id
        plain_ends = frozenset(() if end is None else (end,))
        self.end_ids: frozenset[int] = self.chat.end_ids if self.chat is not None else plain_ends
        """Tokens that end an answer."""

    def encode(self, prompt: Content) -> IntArray:
        """Ids of a prompt up to where the answer begins, i32 [P].

        Raises
        ------
        DataError
            The model has no template for messages, the template refuses them, or there is no token to begin with.
        """
        if isinstance(prompt, list):
            if self.chat is None:
                raise DataError(f"the prompt is a list of messages, but {self._no_chat}")
            return self.chat.encode_prompt(prompt)
        if self.chat is not None:
            ids = self.chat.encode_text_prompt(prompt)
        else:
            # A document begins after the end of the one before.
            ids = np.array([*sorted(self.end_ids), *self.tokenizer.encode_ordinary(prompt)], np.int32)
        if not len(ids):
            raise DataError("the prompt is empty, and the tokenizer has no end-of-text token to begin with")
        return ids

    def end_id_for(self, prompt: Content) -> int | None:
        """The token that an answer to this prompt ends with: the end of a turn, or of a text."""
        if self.chat is None:
            return self.tokenizer.eos_token_id
        return self.chat.end_of_turn_id if isinstance(prompt, list) else self.chat.text_end_id

    def decode(self, completion_ids: Sequence[int] | IntArray) -> str:
        """The text of an answer, without the token that ended it. Bytes that are no UTF-8 become U+FFFD."""
        ids = np.asarray(completion_ids, np.int64)
        return self.tokenizer.decode(ids[:-1] if len(ids) and int(ids[-1]) in self.end_ids else ids)
