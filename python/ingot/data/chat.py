"""Dialogues as token ids, and which of them are trained.

A chat template is Jinja, as Hugging Face models have it; but ids are built segment by segment, never by searching a rendered text:

    opening   bos, and the header that names who speaks        not trained
    content   what that person says, as ordinary text          trained if it is the assistant
    closing   the token that ends the assistant's turn         trained; the end of other turns belongs to the next opening

The segments of a sequence of roles come from rendering marks in place of the contents; each dialogue is then rendered as it is and
compared with its segments, so that a template that does something else with a content is refused and not guessed at. Hence:

- the ids of the first k messages begin those of the first k + 1 (what is decoded is what was trained, and a cache can be kept);
- the ids of a prompt and the header of the answer are exactly what precedes the answer in training;
- the trained ids decode to the assistant's texts and end tokens;
- a content never gives a special token, whatever is written in it, and no token reaches across the edge of a segment (tokenizing the
  rendered text at once can merge a header's last character with white space that an answer begins with);
- padding is never the end token (packing needs none; exported models name one).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ingot.data.rows import ROLES, Message
from ingot.durable import write_file
from ingot.errors import DataError
from ingot.tokenizer import END_OF_TEXT, Tokenizer

FILE_NAME = "chat_template.jinja"

PAD = "<|pad|>"
"""The padding token of models that have none but the end token."""

_PADS = (PAD, "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>")
_SPECIAL_SHAPE = re.compile(r"<\|[^<>|\s]+\|?>|<[^<>|\s]+\|>")
# White space beside a mark shows whether the template strips contents; no template writes an em space.
_SPACE = "\u2003"
_PROBE = ("user", "assistant", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """How a dialogue is written for a model."""

    source: str
    """Jinja, with ``messages``, ``add_generation_prompt``, ``bos_token`` and ``eos_token``."""
    bos_token: str = ""
    """Begins a dialogue; empty for none."""
    eos_token: str = ""
    """What the model calls its end; empty for none."""
    pad_token: str = ""
    name: str = "the chat template"
    """For messages to people."""
    tokens_may_be_added: bool = False
    """The model has not been trained with this template: special tokens that its tokenizer lacks are to be added."""

    @classmethod
    def built_in(cls, bos_token: str = END_OF_TEXT) -> ChatTemplate:
        """The template of models that are aligned here: ``<|im_start|>role``, a new line, the content, ``<|im_end|>``."""
        source = (resources.files("ingot") / "templates" / FILE_NAME).read_text(encoding="utf-8")
        return cls(source, bos_token, "<|im_end|>", PAD, "the built-in chat template", tokens_may_be_added=True)

    @classmethod
    def from_file(cls, path: str | Path, bos_token: str = END_OF_TEXT) -> ChatTemplate:
        """A template that somebody wrote, for a model that does not know it yet."""
        try:
            source = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{path}: not UTF-8 text; give a chat template in Jinja") from None
        return cls(source, bos_token, "", PAD, str(path), tokens_may_be_added=True)

    @classmethod
    def of_model(cls, folder: str | Path) -> ChatTemplate:
        """The template of a model directory: ``chat_template.jinja``, or ``chat_template`` in ``tokenizer_config.json``.

        Where it has neither, the built-in one, with the model's own ``bos_token``.
        """
        folder = Path(folder)
        folder = folder if folder.is_dir() else folder.parent
        config = {**_json_object(folder / "special_tokens_map.json"), **_json_object(folder / "tokenizer_config.json")}
        bos, eos, pad = (_token_name(config.get(name)) for name in ("bos_token", "eos_token", "pad_token"))
        path = folder / FILE_NAME
        if path.exists():
            return cls(path.read_text(encoding="utf-8"), bos, eos, pad, str(path))
        source = config.get("chat_template")
        if isinstance(source, list):
            source = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, Mapping)}.get(
                "default"
            )
        if isinstance(source, str):
            return cls(source, bos, eos, pad, f"the chat template of {folder}")
        return cls.built_in(bos or END_OF_TEXT)

    def save(self, folder: str | Path) -> Path:
        """Write ``chat_template.jinja`` into a model directory; its ``tokenizer_config.json`` has to name :attr:`bos_token` and the rest."""
        path = Path(folder) / FILE_NAME
        write_file(path, self.source.encode())
        return path

    @cached_property
    def hash(self) -> str:
        """sha256, as hex, of all that decides the text of a dialogue."""
        parts = [self.source, self.bos_token, self.eos_token]
        if "pad_token" in self.source:
            parts.append(self.pad_token)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def render(self, messages: Sequence[Mapping[str, object]], *, add_generation_prompt: bool = False) -> str:
        """The text of a dialogue, as Jinja makes it.

        Raises
        ------
        DataError
            The template is no Jinja, does what the sandbox forbids, or refuses these messages.
        """
        return self._render(
            messages=[dict(message) for message in messages], add_generation_prompt=add_generation_prompt
        )

    @cached_property
    def _render(self) -> Callable[..., str]:
        import jinja2

        def guarded(work: Callable[..., Any], *arguments: Any, **names: Any) -> Any:
            try:
                return work(*arguments, **names)
            except DataError:
                raise
            except jinja2.TemplateSyntaxError as error:
                raise DataError(f"{self.name}, line {error.lineno}: no valid Jinja: {error.message}") from None
            except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                raise DataError(f"{self.name}: fails on this dialogue: {error}") from None

        template = guarded(_environment(self.name).from_string, self.source)
        tokens = {"bos_token": self.bos_token, "eos_token": self.eos_token, "pad_token": self.pad_token}
        return lambda **names: str(guarded(template.render, **tokens, **names))

    def literals(
        self, roles: Sequence[str], *, add_generation_prompt: bool = False
    ) -> tuple[list[str], list[tuple[bool, bool]]]:
        """What the template writes before, between and after the contents of messages with these roles.

        Returns
        -------
        literals
            One more than there are roles.
        strips
            For each message, whether the template strips white space from the left and from the right of its content.

        Raises
        ------
        DataError
            A content does not appear once and in order, so that there are no such texts.
        """
        marks = [f"CONTENTOFMESSAGE{index}X" for index in range(len(roles))]
        rendered = self.render(
            [{"role": role, "content": _SPACE + mark + _SPACE} for role, mark in zip(roles, marks, strict=True)],
            add_generation_prompt=add_generation_prompt,
        )
        literals, strips = [], []
        for index, mark in enumerate(marks):
            before, found, rest = rendered.partition(mark)
            if not found or mark in rest:
                raise DataError(
                    f"{self.name}: writes the content of message {index + 1} of {len(roles)} ({roles[index]}) "
                    f"{'twice' if found else 'not at all, or in another order'}: its ids cannot be built from the roles; give another template"
                )
            left, right = before.endswith(_SPACE), rest.startswith(_SPACE)
            literals.append(before.removesuffix(_SPACE))
            strips.append((not left, not right))
            rendered = rest.removeprefix(_SPACE)
        return [*literals, rendered], strips

    def missing_special_tokens(self, tokenizer: Tokenizer) -> tuple[str, ...]:
        """Special tokens that are to be added to ``tokenizer`` before it can write this template, in the order of their new ids.

        For a template that the model knows already these are none: what its tokenizer has as text stays text. A padding token is
        among them where the model has none that is different from every end token.
        """
        wanted: list[str] = []
        if self.tokens_may_be_added:
            literals, _ = self.literals(_PROBE)
            # Some templates have no place for a system message.
            with contextlib.suppress(DataError):
                literals += self.literals(("system", *_PROBE))[0]
            wanted = [self.bos_token] if self.bos_token else []
            wanted += _SPECIAL_SHAPE.findall("".join(literals))
        if self.padding_token(tokenizer) is None:
            wanted.append(PAD)
        return tuple(token for token in dict.fromkeys(wanted) if token not in tokenizer.special_tokens)

    def padding_token(self, tokenizer: Tokenizer) -> str | None:
        """A special token of ``tokenizer`` that means padding and nothing else; ``None`` if there is none."""
        taken = {self.bos_token, self.eos_token, END_OF_TEXT, *_SPECIAL_SHAPE.findall(self.source)}
        for token in (self.pad_token, *_PADS):
            if token in tokenizer.special_tokens and token not in taken:
                return token
        return None


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A sequence, and which of its tokens are trained."""

    ids: npt.NDArray[np.int32]
    """i32 [n]"""
    mask: npt.NDArray[np.bool_]
    """bool [n]: this token is to be predicted."""
    ends: tuple[int, ...] = ()
    """Tokens at which the sequence is judged: its last, or the last of each step."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The segments around the contents of messages with certain roles."""

    openings: tuple[str, ...]
    closings: tuple[str, ...]
    tail: str
    """What the template writes after the last closing."""
    strips: tuple[tuple[bool, bool], ...]


class ChatEncoder:
    """Dialogues to ids by one template and one tokenizer.

    Raises
    ------
    DataError
        The tokenizer lacks special tokens of the template (:meth:`ChatTemplate.missing_special_tokens` says which), the template ends
        no turn of the assistant with a special token, or the end token would also be the padding.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self.template = template
        self.tokenizer = tokenizer
        missing = [token for token in template.missing_special_tokens(tokenizer) if token != PAD]
        if missing:
            raise DataError(
                f"the tokenizer has no special token {', '.join(missing)}, which {template.name} needs: "
                "train with ingot sft, which adds them, or give a model that has them"
            )
        by_length = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._closing = re.compile(rf"\s*(?:{'|'.join(map(re.escape, by_length))})" if by_length else r"(?!)")
        self._layouts: dict[tuple[str, ...], _Layout] = {}
        self._cached_ids = cache(self._literal_ids)
        closing = self._layout(("user", "assistant")).closings[1]
        self.end_of_turn: str = closing.strip()
        """The token that ends a turn of the assistant."""
        self.end_of_turn_id: int = tokenizer.special_tokens[self.end_of_turn]
        ends = {self.end_of_turn_id, tokenizer.eos_token_id, tokenizer.special_tokens.get(template.eos_token)}
        self.end_ids: frozenset[int] = frozenset(end for end in ends if end is not None)
        """Generation stops at these: the end of a turn, and the end of a text."""
        padding = template.padding_token(tokenizer)
        self.pad_token_id: int | None = tokenizer.special_tokens[padding] if padding else None
        """Different from every end; ``None`` where the tokenizer has no such token."""
        if self.pad_token_id in self.end_ids:
            raise DataError(
                f"{template.name}: {padding!r} is padding and end of turn: give the model another padding token"
            )

    # ---- dialogues

    def encode(self, messages: Sequence[Message], *, first_trained: int = 0) -> Encoded:
        """Ids of a dialogue up to the end of its last turn; trained are the assistant's messages from number ``first_trained`` on.

        Raises
        ------
        DataError
            The template refuses the messages or changes a content, or there is nothing to train, or nothing but what is trained.
        """
        layout, contents = self._segments(messages)
        ids: list[int] = []
        mask: list[bool] = []
        for index, (message, content) in enumerate(zip(messages, contents, strict=True)):
            trained = message["role"] == "assistant" and index >= first_trained
            opening = self._cached_ids(layout.openings[index])
            inner = [*self.tokenizer.encode_ordinary(content), *self._cached_ids(layout.closings[index])]
            ids += opening
            ids += inner
            mask += [False] * len(opening) + [trained] * len(inner)
        return _encoded(ids, mask)

    def encode_prompt(self, messages: Sequence[Message]) -> npt.NDArray[np.int32]:
        """Ids of a prompt and the header of the answer, i32 [n]: what a model sees before it writes.

        Raises
        ------
        DataError
            As :meth:`encode`.
        """
        _, contents = self._segments(messages)
        layout = self._layout((*(message["role"] for message in messages), "assistant"))
        ids: list[int] = []
        for index, content in enumerate(contents):
            ids += self._cached_ids(layout.openings[index])
            ids += self.tokenizer.encode_ordinary(content)
            ids += self._cached_ids(layout.closings[index])
        ids += self._cached_ids(layout.openings[-1])
        return np.array(ids, np.int32)

    def _segments(self, messages: Sequence[Message]) -> tuple[_Layout, list[str]]:
        """The layout of these messages and their contents as the template writes them, both proven by rendering."""
        layout = self._layout(tuple(message["role"] for message in messages))
        contents = []
        for message, (left, right) in zip(messages, layout.strips, strict=True):
            content = message["content"].lstrip() if left else message["content"]
            contents.append(content.rstrip() if right else content)
        pieces = zip(layout.openings, contents, layout.closings, strict=True)
        if "".join(map("".join, pieces)) + layout.tail != self.template.render(messages):
            raise DataError(
                f"{self.template.name}: changes the text of a message in this dialogue, so that its ids cannot be built from the roles; "
                "change that text or give another template"
            )
        return layout, contents

    def _layout(self, roles: tuple[str, ...]) -> _Layout:
        """The segments of messages with these roles, checked against those of every shorter beginning."""
        if not roles:
            raise DataError("a dialogue has no message: give at least one")
        for role in roles:
            # A role becomes part of the header, where special tokens are special.
            if role not in ROLES:
                raise DataError(f"a message has the role {role!r}: the roles are {', '.join(ROLES)}")
        for length in range(1, len(roles) + 1):
            # Templates may refuse a system message alone; nothing is ever encoded up to there.
            if roles[:length] not in self._layouts and (length == len(roles) or roles[length - 1] != "system"):
                self._layouts[roles[:length]] = self._new_layout(roles[:length])
        return self._layouts[roles]

    def _new_layout(self, roles: tuple[str, ...]) -> _Layout:
        literals, strips = self.template.literals(roles)
        openings, closings = [literals[0]], []
        for index, role in enumerate(roles):
            after = literals[index + 1]
            found = self._closing.match(after) if role == "assistant" else None
            if role == "assistant" and found is None:
                raise DataError(
                    f"{self.template.name}: writes no special token of the tokenizer at the end of an assistant message "
                    f"(but {_shown(after)}), so that a model trained with it would never stop; give a template with an end of turn"
                )
            closings.append(found.group() if found else "")
            openings.append(after[len(closings[-1]) :])
        tail = openings.pop()
        layout = _Layout(tuple(openings), tuple(closings), tail, tuple(strips))
        ends = {closing for role, closing in zip(roles, closings, strict=True) if role == "assistant"}
        if len(ends) > 1:
            raise DataError(
                f"{self.template.name}: ends the assistant's turns in different ways ({', '.join(map(_shown, sorted(ends)))}): "
                "give a template that ends them all alike"
            )
        self._check_beginning(roles, layout)
        return layout

    def _check_beginning(self, roles: tuple[str, ...], layout: _Layout) -> None:
        """What comes before the last message must be written the same without it, or a model would not see while it writes what it
        was trained on."""
        shorter = self._layouts.get(roles[:-1])
        if shorter is None:
            return
        count = len(roles) - 1
        same = (shorter.openings, shorter.closings, shorter.strips) == (
            layout.openings[:count],
            layout.closings[:count],
            layout.strips[:count],
        )
        if not same:
            raise DataError(
                f"{self.template.name}: writes a dialogue ({', '.join(roles[:-1])}) in another way once a message ({roles[-1]}) follows, "
                "so that what is trained on is not what the model sees while it writes; give another template"
            )
        if roles[-1] == "assistant":
            literals, _ = self.template.literals(roles[:-1], add_generation_prompt=True)
            written = layout.closings[-2] + layout.openings[-1]
            if not written.startswith(literals[-1]):
                raise DataError(
                    f"{self.template.name}: begins an answer with {_shown(written)} in training, but with {_shown(literals[-1])} "
                    "when one is asked for; give a template that does both alike"
                )

    # ---- plain text

    @property
    def text_start_ids(self) -> tuple[int, ...]:
        """What begins a plain text: the token between documents, else the template's ``bos_token``, else nothing."""
        start = self.tokenizer.eos_token_id
        if start is None:
            start = self.tokenizer.special_tokens.get(self.template.bos_token)
        return () if start is None else (start,)

    @property
    def text_end_id(self) -> int:
        """What ends a plain text."""
        end = self.tokenizer.eos_token_id
        if end is None:
            end = self.tokenizer.special_tokens.get(self.template.eos_token, self.end_of_turn_id)
        return end

    def encode_text(self, text: str | Sequence[int], prompt: str | Sequence[int] | None = None) -> Encoded:
        """Ids of a plain text with its end. All of it is trained; after a prompt, all but that. Either may be given as ids.

        Prompt and text are encoded apart, so that the ids of the prompt are those that a model sees before it writes.
        """

        def ids_of(part: str | Sequence[int]) -> Sequence[int]:
            return self.tokenizer.encode_ordinary(part) if isinstance(part, str) else part

        before = [*self.text_start_ids, *(ids_of(prompt) if prompt is not None else ())]
        after = [*ids_of(text), self.text_end_id]
        return _encoded(before + after, [False] * len(before) + [True] * len(after), text=prompt is None)

    def encode_text_prompt(self, prompt: str) -> npt.NDArray[np.int32]:
        """Ids of a plain prompt, i32 [n]: what a model sees before it writes."""
        return np.array([*self.text_start_ids, *self.tokenizer.encode_ordinary(prompt)], np.int32)

    def _literal_ids(self, literal: str) -> list[int]:
        """Ids of what the template writes; its special tokens are special."""
        return self.tokenizer.encode(literal, allowed_special="all")


def _encoded(ids: list[int], mask: list[bool], *, text: bool = False) -> Encoded:
    """Refuses a mask that trains nothing; and one that trains everything, which only a text without a prompt may have."""
    if not any(mask):
        raise DataError("no token of it would be trained: it holds no message of the assistant that is to be learned")
    if all(mask) and not text:
        raise DataError(
            "every token of it would be trained, also what the model is asked: the template marks nobody's turn"
        )
    return Encoded(np.array(ids, np.int32), np.array(mask, np.bool_), (len(ids) - 1,))


def _shown(literal: str) -> str:
    return repr(literal if len(literal) <= 60 else literal[:60] + "...") if literal else "nothing"


def _json_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None
    return value if isinstance(value, dict) else {}


def _token_name(value: Any) -> str:
    """The name of a token in Hugging Face's files: a string, or an object that holds one."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _environment(name: str) -> Any:
    """Jinja as Hugging Face's libraries set it up for chat templates: sandboxed, blocks leave no lines behind, loop controls."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """``{% generation %}``, which marks what the assistant writes: rendered as if it were not there, as roles say the same."""

        tags = {"generation"}  # noqa: RUF012 - the name and type that Jinja asks for

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise DataError(f"{name}: refuses this dialogue: {message}")

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment
