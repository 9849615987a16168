"""What a distillation starts with: student, teacher, and prompts as both read them."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

from ingot.configs import DistillConfig, ModelConfig
from ingot.data.chat import ChatEncoder
from ingot.data.row_cache import RowCache
from ingot.environment import memory_limit
from ingot.errors import ConfigError, DataError
from ingot.inference.prompts import PromptEncoder
from ingot.models import Model, load_model
from ingot.models.base import IntArray
from ingot.models.hf import open_folder
from ingot.tokenizer import Tokenizer
from ingot.training.demonstrations import Rows, encoder_of, require_unchanged
from ingot.training.memory import Held, learner, require_memory
from ingot.training.progress import Display
from ingot.training.prompts import Prompts, load_prompts
from ingot.training.rollouts import MAX_SEQUENCES
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


def held(config: DistillConfig, lessons: Lessons, shape: ModelConfig) -> tuple[Held, Held]:
    """What the run holds in memory: the student of this shape, and the teacher."""
    longest, count = lessons.prompts.longest + config.max_new_tokens, config.per_device_train_batch_size
    tokens = min(lessons.pack_length, count * longest)
    slots = min(count, MAX_SEQUENCES)
    student = learner(config, shape, tokens, num_sequences=slots, sequence_tokens=longest)
    teacher = Held(lessons.teacher.config, read_tokens=tokens, num_sequences=slots, sequence_tokens=longest)
    return student, teacher


def make_student(config: DistillConfig, lessons: Lessons, known: ModelConfig | None) -> ModelProtocol:
    """The model to start from, without dropout; of shape ``known`` where weights are restored from a checkpoint."""
    if known is not None:
        return Model(known, seed=config.seed, **config.place)
    shape = student_shape(config)
    require_memory(memory_limit(), *held(config, lessons, shape))
    return load_model(config.model, dropout=0.0, **config.place)


@dataclasses.dataclass(frozen=True)
class Lessons:
    """What is asked, and who knows better."""

    teacher: ModelProtocol
    """Forward passes only."""
    encoder: ChatEncoder
    """Template and tokenizer of the student, which are used for both models."""
    prompts: Prompts
    pack_length: int
    facts: dict[str, Any]
    """For run.json and the card."""

    def take(self, step: int, count: int) -> list[IntArray]:
        """Ids of the prompts of a step, i32 [P] each."""
        return [prompt.ids for prompt in self.prompts.take(step * count, count)]

    @property
    def held_out(self) -> list[IntArray]:
        """Ids of the prompts that are held out."""
        return [prompt.ids for prompt in self.prompts.held_out]


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
    encoder = encoder_of(folder, config.model)
    tokenizer = encoder.tokenizer
    if tokenizer.vocab_size > shape.vocab_size:
        raise ConfigError(
            f"{config.model}: the tokenizer has {tokenizer.vocab_size} tokens but the model only {shape.vocab_size}: they do not belong together"
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
    prompts = load_prompts(
        config.data,
        rows,
        PromptEncoder(config.model if folder is None else folder.path, tokenizer),
        longest=longest,
        held_out=config.held_out,
        seed=config.seed,
        display=display,
        cache=RowCache(config.cache_folder, display.say),
    )
    facts = prompts.facts | {
        "tokenizer_hash": tokenizer.hash,
        "template_hash": hashlib.sha256(encoder.template.source.encode()).hexdigest(),
    }
    # As phases that learn from rows name it.
    facts["examples_hash"] = facts.pop("prompts_hash")
    require_unchanged(folder, facts["examples_hash"], config.data)
    needed = prompts.longest + config.max_new_tokens
    pack_length = config.pack_length or max(_PACK_LENGTH, needed)
    if pack_length < needed:
        raise ConfigError(
            f"pack_length {pack_length} is below the {needed} tokens of the longest prompt with its answer: raise it"
        )
    return Lessons(load_model(config.teacher, dropout=0.0, **config.place), encoder, prompts, pack_length, facts)
