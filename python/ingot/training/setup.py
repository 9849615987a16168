"""What a phase that learns from its own samples starts with: policy, reference, prompts, rewards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ingot.configs import OnlineConfig, RunConfig
from ingot.data.files import changed_files
from ingot.data.row_cache import RowCache
from ingot.environment import memory_limit
from ingot.errors import ConfigError, RunError
from ingot.inference.prompts import PromptEncoder
from ingot.inference.scoring import split_name
from ingot.models import load_model
from ingot.models.base import IntArray, Model
from ingot.models.hf import open_folder
from ingot.models.reference import reference_of
from ingot.models.sharing import SharedBase
from ingot.tokenizer import Tokenizer
from ingot.training.lora import attach_adapter
from ingot.training.memory import Held, learner, require_memory
from ingot.training.progress import Display
from ingot.training.prompts import Prompts, Rows, load_prompts
from ingot.training.rewards import RewardFunction
from ingot.training.rollouts import banned_ids_of
from ingot.training.runs import RunFolder
from ingot.training.scores import Scorers, TokenScorer
from ingot.training.trainer import restore_model
from ingot.training.verdicts import require_passed

_PACK_TOKENS = 4096


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """What a program hands over instead of naming it in the settings; a resumed run has to be given it again."""

    prompts: Rows = None
    rewards: Sequence[RewardFunction | TokenScorer] = ()
    gold: RewardFunction | None = None

    @classmethod
    def of(cls, prompts: Rows, rewards: Sequence[RewardFunction | TokenScorer], gold: RewardFunction | None) -> Given:
        """These, read once."""
        return cls(None if prompts is None else list(prompts), tuple(rewards), gold)


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """Everything but the settings of learning itself."""

    policy: Model
    """With the weights that the run starts from, and the adapter on them where one is trained."""
    reference: Model
    """The same weights without an adapter, which do not change."""
    base: SharedBase
    """Those weights again, for reward models and critics that are adapters on them."""
    encoder: PromptEncoder
    prompts: Prompts
    scorers: Scorers
    banned_ids: IntArray
    """What an answer never holds, in sampling and in training."""
    max_new_tokens: int
    temperature: float
    max_sequences: int
    pack_length: int
    held: tuple[Held, ...]
    """What all of these hold in memory, the policy first."""
    facts: dict[str, Any]
    """For run.json and the card."""

    def restore(self, config: RunConfig, checkpoint: Path | None) -> None:
        """New optimizers; weights and moments as ``checkpoint`` has them."""
        restore_model(self.policy, config, checkpoint)


def prepare(config: OnlineConfig, given: Given, display: Display, *, num_values: int = 0) -> Setup:
    """Load models, read prompts, find rewards. Nothing is written.

    Parameters
    ----------
    num_values
        Scalar heads that the policy gets beside it, at 0.

    Raises
    ------
    ConfigError
        Model, tokenizer, rewards and lengths do not fit together.
    DataError
        A prompt cannot be used, or too few are left.
    RunError
        The run does not fit into memory.
    """
    if not config.model:
        raise ConfigError("no model to start from: give --model with the folder of one that answers")
    saved = open_folder(config.model)
    if saved.num_values:
        raise ConfigError(f"{config.model}: is a model that scores, with scalar heads: give one that writes")
    tokenizer = Tokenizer.from_file(config.model)
    if tokenizer.vocab_size > saved.config.vocab_size:
        raise ConfigError(
            f"{config.model}: the tokenizer has {tokenizer.vocab_size} tokens but the model only {saved.config.vocab_size}: "
            "they do not belong together"
        )
    encoder = PromptEncoder(config.model, tokenizer)
    if not encoder.end_ids:
        raise ConfigError(
            f"{config.model}: its tokenizer has no token that ends an answer: fine-tune it with ingot sft"
        )
    # Reward functions are checked before anything slow: they are what people write themselves.
    scorers = Scorers(config, encoder, given.rewards, given.gold)
    context = saved.config.max_position_embeddings
    room = context - config.answer_length
    if room < 1:
        raise ConfigError(
            f"answers of {config.answer_length} tokens leave no room for a prompt in the model's context of {context}: make them shorter"
        )
    prompts = load_prompts(
        config.prompts,
        given.prompts,
        encoder,
        longest=min(room, config.max_prompt_length or room),
        held_out=config.held_out,
        seed=config.seed,
        display=display,
        cache=RowCache(config.cache_folder, display.say),
    )
    longest = prompts.longest + config.answer_length
    pack_length = config.pack_length or max(_PACK_TOKENS, longest)
    if pack_length < longest:
        raise ConfigError(
            f"pack_length {pack_length} is below the {longest} tokens of the longest prompt with its answer: raise it"
        )
    read = min(pack_length, config.per_device_train_batch_size * longest)
    policy_held = learner(
        config,
        saved.config,
        min(pack_length, config.minibatch_size * longest),
        num_values=num_values,
        reference=True,
        read_tokens=read,
        num_sequences=min(config.max_sequences, config.per_device_train_batch_size),
        sequence_tokens=longest,
    )
    # Before anything is loaded; then with all that is.
    require_memory(memory_limit(), policy_held)
    # An adapter has heads of its own.
    policy = load_policy(config, 0 if config.lora_rank else num_values)
    # Before there is an adapter: what is trained then leaves the weights alone that the two share, and there is one copy to the end.
    reference = reference_of(policy)
    base = SharedBase(policy, config.model, display.say)
    scorers.load_models(base)
    scoring = [
        Held(model.config, num_copies=int(model.active_adapter is None), read_tokens=read) for model in scorers.networks
    ]
    held = (policy_held, *scoring)
    require_memory(memory_limit(), *held)
    facts = {
        **prompts.facts,
        "tokenizer_hash": tokenizer.hash,
        "template_hash": encoder.chat.template.hash if encoder.chat else "",
        "model_hash": base.hash,
    }
    attach_adapter(config, policy, None, base_hash=base.hash, num_values=num_values)
    return Setup(
        policy=policy,
        reference=reference,
        base=base,
        encoder=encoder,
        prompts=prompts,
        scorers=scorers,
        banned_ids=banned_ids_of(tokenizer, saved.config.vocab_size, encoder.end_ids),
        max_new_tokens=config.answer_length,
        temperature=config.temperature,
        max_sequences=config.max_sequences,
        pack_length=pack_length,
        held=held,
        facts=facts,
    )


def keep(config: OnlineConfig, folder: RunFolder, setup: Setup) -> None:
    """Record in a run's folder what it begins with, tokenizer and template included; of a resumed one, refuse what has changed.

    Raises
    ------
    RunError
        Says what changed, and what to do.
    """
    known = folder.facts.get("data", {})
    for name, what, remedy in _REMEDIES:
        if name in known and known[name] != setup.facts[name]:
            raise RunError(
                f"{what(config, known)} changed since this run began: {remedy} as it was, or start a new run from {folder.path}"
            )
    folder.facts["data"] = known | setup.facts
    if not (folder.path / "tokenizer.json").is_file():
        folder.save_tokenizer(setup.encoder.tokenizer, setup.encoder.chat)


def require_gates(config: OnlineConfig, display: Display) -> None:
    """Repeat the verdicts of the runs that this one builds on, and refuse a failed one unless ``config.force``.

    Raises
    ------
    RunError
        One did not pass; says why and what to do.
    """
    for name in (config.model, *config.rewards):
        folder = split_name(name)[0]
        if Path(folder).is_dir():
            require_passed(folder, force=config.force, display=display)


def load_policy(config: OnlineConfig, num_values: int = 0) -> Model:
    """The model to start from, without dropout: a ratio of two policies must not be one of two masks. Its scalar heads say 0."""
    model = load_model(config.model, num_values=num_values, dropout=0.0, **config.place)
    if num_values:
        zero_heads(model)
    return model


def zero_heads(model: Model) -> None:
    """Let the scalar heads say 0 everywhere, so that a new critic does not begin with noise (Ziegler et al. 2019)."""
    state = model.state()
    model.load_state({name: values * 0 if name.startswith("score.") else values for name, values in state.items()})


_REMEDIES: tuple[tuple[str, Callable[[Any, Mapping[str, Any]], str], str], ...] = (
    (
        "model_hash",
        lambda config, _: f"the weights in {config.model}",
        "which are the run's reference: bring them back",
    ),
    ("tokenizer_hash", lambda config, _: f"the tokenizer in {config.model}", "bring it back"),
    ("template_hash", lambda config, _: f"the chat template in {config.model}", "bring it back"),
    (
        "prompts_hash",
        lambda config, known: ", ".join(changed_files(config.prompts, known.get("files", {}))) or "the prompts given",
        "bring the rows back",
    ),
    ("ptx_hash", lambda config, _: ", ".join(config.ptx_data), "bring the text back"),
)
