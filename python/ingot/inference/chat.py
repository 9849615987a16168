"""A conversation with a model: its template, its answers as they are written, and the commands of a person who talks with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ingot.data.chat import ChatEncoder
from ingot.data.rows import Message
from ingot.durable import write_file
from ingot.errors import ConfigError, DataError
from ingot.inference.generate import stream
from ingot.models.base import Sampling

if TYPE_CHECKING:
    from ingot.models.base import Model


class Conversation:
    """What was said so far, and the model that answers.

    An answer is a function of the seed, what was said before it, and how often it was asked for.

    Raises
    ------
    ConfigError
        A setting is out of its range, or the tokenizer does not belong to the model.
    DataError
        The template cannot write this dialogue.
    """

    def __init__(
        self,
        model: Model,
        encoder: ChatEncoder,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        seed: int,
        system: str | None = None,
    ) -> None:
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self.model = model
        self.encoder = encoder
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.messages: list[Message] = []
        """The dialogue; the last message is an answer, unless it holds no more than a system message."""
        self._times = 0
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Begin again, with a system message where one is given."""
        messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.encoder.encode_prompt([*messages, {"role": "user", "content": "?"}])
        self.messages = messages
        self._times = 0

    def say(self, text: str) -> Iterator[str]:
        """Say something; the answer, piece by piece. What was written of it stays where the caller stops."""
        return self._answer([*self.messages, {"role": "user", "content": text}], 0)

    def say_again(self) -> Iterator[str]:
        """Another answer in place of the last one.

        Raises
        ------
        DataError
            There is none.
        """
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise DataError("there is no answer yet: say something first")
        return self._answer(self.messages[:-1], self._times + 1)

    def _answer(self, asked: list[Message], times: int) -> Iterator[str]:
        ids = self.encoder.encode_prompt(asked).tolist()
        room = self.max_new_tokens
        limit = self.model.config.max_position_embeddings
        if len(ids) >= limit:
            raise DataError(
                f"the dialogue has {len(ids)} tokens and the model is made for {limit}: /reset begins again, or say less"
            )
        pieces = stream(
            self.model,
            self.encoder.tokenizer,
            ids,
            max_new_tokens=min(room, limit - len(ids)),
            temperature=self.sampling.temperature,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
            min_p=self.sampling.min_p,
            repetition_penalty=self.sampling.repetition_penalty,
            sample_index=times,
            seed=self.seed,
            end_ids=self.encoder.end_ids,
        )
        answer: Message = {"role": "assistant", "content": ""}
        self.messages, self._times = [*asked, answer], times
        return _kept(pieces, answer)

    def save(self, path: str | Path) -> None:
        """Write the dialogue as one row of demonstrations; a row that is in the file already stays.

        Raises
        ------
        DataError
            Nothing was said yet, or the file cannot be written.
        """
        if not any(message["role"] == "assistant" for message in self.messages):
            raise DataError("nothing was said yet: there is nothing to save")
        path = Path(path)
        try:
            before = path.read_bytes() if path.exists() else b""
            if before and not before.endswith(b"\n"):
                before += b"\n"
            write_file(path, before + json.dumps({"messages": self.messages}, ensure_ascii=False).encode() + b"\n")
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error.strerror or error}") from None


def talk(conversation: Conversation, lines: TextIO, out: TextIO, *, interactive: bool) -> None:
    """Read what a person types, a line at a time, and write the answers, until the input or /quit ends it.

    Ctrl-C ends the answer that is being written; what is written of it stays in the dialogue. While nothing is being written, it ends
    the chat.
    """
    while True:
        if interactive:
            out.write("> ")
            out.flush()
        line = lines.readline()
        if not line:
            return
        text = line.strip()
        if not text:
            continue
        command, _, rest = text.partition(" ")
        if command == "/quit":
            return
        try:
            _obey(conversation, command, rest.strip(), text, out)
        except (DataError, ConfigError) as error:
            out.write(f"{error}\n")
        except KeyboardInterrupt:
            out.write(" [stopped]\n")
        out.flush()


def _obey(conversation: Conversation, command: str, rest: str, text: str, out: TextIO) -> None:
    if command == "/reset":
        conversation.reset()
        out.write("forgotten\n")
    elif command == "/system":
        conversation.reset(rest or None)
        out.write("forgotten; the system message is set\n" if rest else "forgotten; no system message\n")
    elif command == "/regen":
        _write(conversation.say_again(), out)
    elif command == "/save":
        if not rest:
            raise DataError("/save takes the name of a file: /save dialogues.jsonl")
        conversation.save(rest)
        out.write(f"saved in {rest}\n")
    elif command.startswith("/"):
        raise DataError(f"there is no command {command}: /reset /system TEXT /regen /save FILE /quit")
    else:
        _write(conversation.say(text), out)


def _write(pieces: Iterator[str], out: TextIO) -> None:
    for piece in pieces:
        out.write(piece)
        out.flush()
    out.write("\n")


def _kept(pieces: Iterator[str], answer: Message) -> Iterator[str]:
    """The same pieces, each added to the answer first."""
    for piece in pieces:
        answer["content"] += piece
        yield piece
