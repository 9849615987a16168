"""What a distillation starts with: student, teacher, and prompts as both read them."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

from ingot.configs import DistillConfig, ModelConfig
from ingot.data.batches import Order
from ingot.data.chat import ChatEncoder, ChatTemplate
from ingot.data.rows import Content, PromptOnly, RowError, read_rows
from ingot.data.split import split_side
from ingot.environment import memory_limit
from ingot.errors import ConfigError, DataError
from ingot.models import Model, load_model
from ingot.models.base import IntArray
from ingot.models.hf import open_folder
from ingot.tokenizer import Tokenizer
from ingot.training.cost import require_memory
from ingot.training.demonstrations import Rows, require_unchanged
from ingot.training.lora import num_trained
from ingot.training.progress import Display
from ingot.training.runs import RunFolder

if TYPE_CHECKING:
    from ingot.models.base import Model as ModelProtocol

_PACK_LENGTH = 4096


def student_shape(config: DistillConfig) -> ModelConfig:
    """Of the student's network.

    Raises
    ------
    ConfigError
        A model is not named, does not write, or the teacher cannot read as far as the student.
    """
    if not config.model:
        raise ConfigError("no model to start from: give --model with the folder of the student")
    if not config.teacher:
        raise ConfigError("nobody to learn from: give --teacher with the folder of the better model")
    shapes = []
    for folder in (config.model, config.teacher):
        saved = open_folder(folder)
        if saved.num_values:
            raise ConfigError(f"{folder}: is a model that scores, with scalar heads: give one that writes")
        shapes.append(saved.config)
    if shapes[1].max_position_embeddings < shapes[0].max_position_embeddings and shapes[1].position == "learned":
        raise ConfigError(
            f"{config.teacher}: learned {shapes[1].max_position_embeddings} positions, fewer than the {shapes[0].max_position_embeddings} "
            "of the student, so that it could not read all that the student writes"
        )
    return shapes[0]


def make_student(config: DistillConfig, lessons: Lessons, known: ModelConfig | None) -> ModelProtocol:
    """The model to start from, without dropout; of shape ``known`` where weights are restored from a checkpoint."""
    if known is not None:
        return Model(known, seed=config.seed, **config.place)
    shape = student_shape(config)
    require_memory(shape, lessons.pack_length, memory_limit(), num_trained(config, shape))
    return _load(config.model, config)


def _load(folder: str, config: DistillConfig) -> ModelProtocol:
    """Without dropout."""
    model = load_model(folder, **config.place)
    if model.config.dropout:
        same = Model(dataclasses.replace(model.config, dropout=0.0), seed=config.seed, **config.place)
        same.load_state(model.state())
        model = same
    return model


@dataclasses.dataclass(frozen=True)
class Lessons:
    """What is asked, and who knows better."""

    teacher: ModelProtocol
    """Forward passes only."""

    encoder: ChatEncoder
    """Template and tokenizer of the student, which are used for both models."""
    train: tuple[IntArray, ...]
    """Ids of each prompt, i32 [P]."""
    held_out: tuple[IntArray, ...]
    pack_length: int
    seed: int
    facts: dict[str, Any]
    """For run.json and the card."""

    def take(self, step: int, count: int) -> list[IntArray]:
        """The prompts of a step: passes over all of them, each in an order of its own."""
        chosen = []
        order: Order | None = None
        for place in range(step * count, (step + 1) * count):
            epoch, index = divmod(place, len(self.train))
            if order is None or order.epoch != epoch:
                order = Order(len(self.train), self.seed, epoch)
            chosen.append(self.train[order[index]])
        return chosen


def prepare_lessons(
    config: DistillConfig, folder: RunFolder | None, shape: ModelConfig, rows: Rows, display: Display
) -> Lessons:
    """Read, encode and divide the prompts, and load the teacher.

    Parameters
    ----------
    folder
        Of the run, which keeps its tokenizer and template; None for a dry run.
    shape
        Of the student's network.

    Raises
    ------
    ConfigError
        Lengths, tokenizers and networks do not fit together.
    DataError
        A row cannot be used (:class:`~ingot.data.rows.RowError`), or too few are left.
    RunError
        The rows of a resumed run have changed.
    """
    saved = folder is not None and (folder.path / "tokenizer.json").is_file()
    source = folder.path if folder is not None and saved else config.model
    tokenizer = Tokenizer.from_file(source)
    try:
        encoder = ChatEncoder(ChatTemplate.of_model(source), tokenizer)
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    if tokenizer.vocab_size > shape.vocab_size:
        raise ConfigError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} tokens but the model only {shape.vocab_size}: they do not belong together"
        )
    if Tokenizer.from_file(config.teacher).hash != tokenizer.hash:
        raise ConfigError(
            f"{config.teacher}: has another tokenizer than {config.model}, so that it would score other tokens: give a teacher with the same one"
        )
    room = shape.max_position_embeddings - config.max_new_tokens
    if room < 1:
        raise ConfigError(
            f"max_new_tokens {config.max_new_tokens} leaves no room for a prompt in the model's context of {shape.max_position_embeddings}"
        )
    longest = min(room, config.max_prompt_length or room)
    if rows is None and not config.data:
        raise DataError("no prompts to answer: give --data with files of rows that have one")
    name = ", ".join(config.data) if rows is None else "the rows given"
    asked: list[tuple[Content, IntArray]] = []
    num_rows = 0
    for row in read_rows(
        list(config.data) if rows is None else rows,
        (PromptOnly,),
        lambda done, total: display.work("reading prompts", done, total),
    ):
        assert isinstance(row, PromptOnly)
        num_rows += 1
        try:
            ids = (
                encoder.encode_text_prompt(row.prompt)
                if isinstance(row.prompt, str)
                else encoder.encode_prompt(row.prompt)
            )
        except DataError as error:
            raise RowError(
                f"cannot be encoded: {error}", "change it or remove the row", field="prompt", file=name, row=row.number
            ) from None
        if len(ids) <= longest:
            asked.append((row.prompt, ids))
    if not asked:
        raise DataError(
            f"{name}: none of {num_rows} prompts has {longest} tokens or fewer, which the model's context leaves beside an answer: "
            "lower --max-new-tokens, or shorten the prompts"
        )
    if len(asked) < num_rows:
        display.say(
            f"{name}: {num_rows - len(asked):,} of {num_rows:,} prompts are longer than {longest} tokens and left out whole"
        )
    digest = hashlib.sha256()
    for _, ids in asked:
        digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
    require_unchanged(folder, digest.hexdigest(), config.data)
    sides = [split_side(prompt, config.held_out) if config.held_out else "train" for prompt, _ in asked]
    train, held_out = (
        tuple(ids for (_, ids), side in zip(asked, sides, strict=True) if side == wanted)
        for wanted in ("train", "held_out")
    )
    if not train or (config.held_out and not held_out):
        raise DataError(
            f"{name}: {len(asked)} prompts are too few to hold {100 * config.held_out:g} % of them out: give more, or --held-out 0"
        )
    needed = max(len(ids) for _, ids in asked) + config.max_new_tokens
    pack_length = config.pack_length or max(_PACK_LENGTH, needed)
    if pack_length < needed:
        raise ConfigError(
            f"pack_length {pack_length} is below the {needed} tokens of the longest prompt with its answer: raise it"
        )
    rule = (
        f"{len(held_out):,} of {len(asked):,} prompts are held out, chosen by a hash of their text"
        if held_out
        else "nothing is held out"
    )
    facts = {
        "examples_hash": digest.hexdigest(),
        "tokenizer_hash": tokenizer.hash,
        "template_hash": hashlib.sha256(encoder.template.source.encode()).hexdigest(),
        "num_rows": num_rows,
        "num_too_long": num_rows - len(asked),
        "max_length": longest,
        "num_train": len(train),
        "num_held_out": len(held_out),
        "split": rule,
    }
    if folder is not None and not saved:
        folder.save_tokenizer(tokenizer, encoder)
    teacher = _load(config.teacher, config)
    return Lessons(teacher, encoder, train, held_out, pack_length, config.seed, facts)
