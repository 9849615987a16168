"""Models as Hugging Face directories: ``config.json`` and ``model.safetensors``, in and out, for both backends.

GPT-2, Llama, Qwen2 and Qwen3 are written in a form that transformers opens; a network that none of their classes computes is saved
as ``model_type: "ingot"``. Reading is strict: a setting that this network does not have, or a weight that is missing, surplus or of
the wrong shape, is an error that names it.

A model whose scalar heads are its purpose (a reward model) is a ``*ForSequenceClassification``: ``score.weight`` [k, d] in the file,
no language model's head, and in ``config.json`` the heads' names (``id2label``) and their biases (``score_bias``, which transformers'
classes have no place for: a score is theirs plus this constant).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ingot.configs import ModelConfig
from ingot.durable import reached, rename, temporary_name, write_file
from ingot.errors import CheckpointError, ConfigError
from ingot.models.safetensors_files import StoredTensor, read_header, read_tensors, write_tensors
from ingot.models.tables import LazyArrays, some

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_ADAPTER_FILE = "adapter_config.json"

Family: TypeAlias = Literal["gpt2", "llama", "qwen2", "qwen3", "ingot"]

_ARCHITECTURES: dict[Family, str] = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "ingot": "IngotForCausalLM",
}
_SCORES = "ForSequenceClassification"
# Names of activations: transformers' to ours, and back (the first of several is written).
_GPT2_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
}
# Buffers that old files carry beside the weights: causal masks of GPT-2, rotary frequencies of Llama.
_NO_WEIGHT = re.compile(r"(^|\.)(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")
_PREFIXES = {"gpt2": "transformer."}
_EMBEDDINGS = ("model.embed_tokens.weight", "transformer.wte.weight")
_HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """What a directory holds, before its weights are read."""

    folder: Path
    config: ModelConfig
    num_values: int
    """Scalar heads (``score.weight``) in the files."""
    labels: tuple[str, ...] | None
    """Names of the heads where they are the model's purpose (``*ForSequenceClassification``), else None."""
    score_bias: tuple[float, ...] | None
    """Of such a model's heads, where ``config.json`` has it."""
    step_separator: str | None
    """Ends a step of an answer, where the heads are read at each step's last token."""
    _files: Mapping[Path, list[StoredTensor]] = dataclasses.field(repr=False)

    def weights(
        self, shapes: Mapping[str, tuple[int, ...]], optional: tuple[str, ...] = ()
    ) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
        """The weights by the names of ``shapes``, as f32, one at a time. All names and shapes are checked before the first is read.

        Parameters
        ----------
        shapes
            The model's names and shapes (a shared head once, under the embedding's name).
        optional
            Names that the files may lack; nothing is returned for those.

        Raises
        ------
        CheckpointError
            Names the weights that are missing, surplus or of another shape.
        """
        places, copies = self._match(shapes, optional)
        for path, names in places.items():
            stored = {tensor.name: tensor for tensor in self._files[path]}
            for name, values in read_tensors(path, [stored[name] for name in names]):
                yield names[name], values
        self._check_copies(copies)

    def _match(
        self, shapes: Mapping[str, tuple[int, ...]], optional: tuple[str, ...]
    ) -> tuple[dict[Path, dict[str, str]], list[tuple[str, str]]]:
        """For each file: its names that are wanted, and what they are called here; and pairs of names that must be equal."""
        places: dict[Path, dict[str, str]] = {}
        found: dict[str, str] = {}
        copies: list[tuple[str, str]] = []
        surplus: list[str] = []
        wrong: list[str] = []
        prefix = _PREFIXES.get(family_of(self.config), "model.")
        for path, tensors in self._files.items():
            for tensor in tensors:
                name = tensor.name if tensor.name in shapes else prefix + tensor.name
                if name not in shapes:
                    if tensor.name == _HEAD and self.config.tie_word_embeddings:
                        copies.append((tensor.name, ""))
                    elif not _NO_WEIGHT.search(tensor.name):
                        surplus.append(tensor.name)
                    continue
                if name in found:
                    raise CheckpointError(f"{self.folder}: {found[name]} and {tensor.name} are the same weight")
                found[name] = tensor.name
                places.setdefault(path, {})[tensor.name] = name
                if tensor.shape != shapes[name]:
                    wrong.append(f"{tensor.name} is {list(tensor.shape)}, not {list(shapes[name])}")
        missing = [name for name in shapes if name not in found and name not in optional]
        if copies and missing and missing[0] in _EMBEDDINGS:
            # A shared matrix stored under the head's name alone.
            path = next(path for path, tensors in self._files.items() if any(t.name == _HEAD for t in tensors))
            places.setdefault(path, {})[_HEAD] = missing.pop(0)
            copies = []
        complaints = [
            f"{label}: {some(names)}"
            for label, names in (("missing", missing), ("surplus", surplus), ("wrong shape", wrong))
            if names
        ]
        if complaints:
            raise CheckpointError(
                f"{self.folder}: the weights do not fit {CONFIG_FILE}; {'; '.join(complaints)}. "
                f"Save the model again, or take the {CONFIG_FILE} that belongs to these weights"
            )
        embedding = next((found[name] for name in _EMBEDDINGS if name in found), "")
        return places, [(head, embedding) for head, _ in copies]

    def _check_copies(self, copies: list[tuple[str, str]]) -> None:
        """A head that config.json calls shared must be the embedding."""
        for pair in copies:
            values = []
            for path, tensors in self._files.items():
                values += [array for _, array in read_tensors(path, [t for t in tensors if t.name in pair])]
            if len(values) != 2 or not np.array_equal(values[0], values[1], equal_nan=True):
                raise CheckpointError(
                    f"{self.folder}: {CONFIG_FILE} says tie_word_embeddings, but {pair[0]} differs from {pair[1]}: "
                    "set tie_word_embeddings to false"
                )


def open_folder(folder: str | Path) -> SavedModel:
    """Read a directory's configuration and the headers of its weights.

    Raises
    ------
    CheckpointError
        There is no model, a file is damaged, or the network is one that ingot does not have.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    fields = _read_fields(folder)
    config = config_from_hf(fields, str(folder / CONFIG_FILE))
    files = {path: read_header(path) for path in _weight_files(folder)}
    scores = [t for tensors in files.values() for t in tensors if t.name == "score.weight"]
    num_values = scores[0].shape[0] if scores and len(scores[0].shape) == 2 else 0
    labels, bias = _heads(fields, num_values, folder)
    separator = fields.get("step_separator") if labels else None
    if separator is not None and (not isinstance(separator, str) or not separator):
        raise CheckpointError(f"{folder}: step_separator in {CONFIG_FILE} is {separator!r}, not a text")
    return SavedModel(folder, config, num_values, labels, bias, separator, files)


def _heads(
    fields: Mapping[str, Any], num_values: int, folder: Path
) -> tuple[tuple[str, ...] | None, tuple[float, ...] | None]:
    """Names and biases of the scalar heads of a model that scores."""
    if not any(str(name).endswith(_SCORES) for name in fields.get("architectures") or ()):
        return None, None
    named = fields.get("id2label") or {}
    labels = tuple(str(named.get(str(head), f"LABEL_{head}")) for head in range(num_values))
    bias = fields.get("score_bias")
    if num_values == 0:
        raise CheckpointError(
            f"{folder}: {CONFIG_FILE} says {_SCORES}, but the weights have no score.weight: save the model again"
        )
    if len(named) not in (0, num_values):
        raise CheckpointError(
            f"{folder}: {CONFIG_FILE} names {len(named)} labels, but score.weight has {num_values} rows"
        )
    if bias is None:
        return labels, None
    numbers = (
        [float(each) for each in bias]
        if isinstance(bias, list) and all(isinstance(each, int | float) for each in bias)
        else []
    )
    if len(numbers) != num_values or not all(map(math.isfinite, numbers)):
        raise CheckpointError(
            f"{folder}: score_bias in {CONFIG_FILE} is {bias!r}, not one finite number for each of {num_values} heads"
        )
    return labels, tuple(numbers)


def require_writer(folder: str | Path) -> None:
    """Refuse a reward model, whose head for words is not in its files.

    Raises
    ------
    ConfigError
        It scores and does not write.
    CheckpointError
        As :func:`open_folder`.
    """
    if open_folder(folder).labels is not None:
        raise ConfigError(f"{folder}: is a reward model, which scores and writes nothing: give a model that writes")


def read_config(folder: str | Path) -> ModelConfig:
    """The configuration in a directory's ``config.json``; a ``CheckpointError`` where ingot has no such network."""
    return config_from_hf(_read_fields(folder), str(Path(folder) / CONFIG_FILE))


def _read_fields(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / CONFIG_FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        if (path.parent / _ADAPTER_FILE).is_file():
            above = path.parent.parent
            remedy = (
                f"give {above}, which has it merged"
                if (above / CONFIG_FILE).is_file()
                else "merge it into its model and save that (load_adapter, save)"
            )
            raise CheckpointError(f"{folder}: holds an adapter without the weights below it: {remedy}") from None
        raise CheckpointError(f"{path}: missing: {folder} is no folder of a saved model") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    return fields


def write_scorer(
    folder: str | Path,
    config: ModelConfig,
    state: Mapping[str, npt.NDArray[np.float32]],
    *,
    labels: Sequence[str],
    pad_token_id: int | None = None,
    step_separator: str | None = None,
) -> None:
    """Write a model that scores, in a form that transformers opens as ``*ForSequenceClassification``.

    Parameters
    ----------
    state
        With ``score.weight`` [k, d] and ``score.bias`` [k]. The language model's head is left out.
    labels
        Names of the k heads.
    pad_token_id
        What transformers finds the end of padded sequences by.
    step_separator
        Of a model that scores steps: it stands in ``config.json``, where transformers' classes keep it and do nothing with it.

    Raises
    ------
    OSError
        As :func:`write_folder`.
    """
    fields = config_to_hf(config)
    fields |= {
        "architectures": [
            _ARCHITECTURES[family_of(config)].replace("LMHeadModel", _SCORES).replace("ForCausalLM", _SCORES)
        ],
        "num_labels": len(labels),
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
        "score_bias": [float(each) for each in state["score.bias"]],
        "pad_token_id": pad_token_id,
    }
    if step_separator is not None:
        fields["step_separator"] = step_separator
    kept = (name for name in state if name not in (_HEAD, "score.bias"))
    _write(Path(folder), fields, LazyArrays(kept, state.__getitem__))


def write_folder(folder: str | Path, config: ModelConfig, state: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Write ``config.json`` and ``model.safetensors``; each appears in one step, after it is on the disk.

    Raises
    ------
    OSError
        No space, no permission. A file that was there before stays as it was.
    """
    _write(Path(folder), config_to_hf(config), state)


def _write(folder: Path, fields: Mapping[str, Any], state: Mapping[str, npt.NDArray[np.float32]]) -> None:
    from ingot import __version__

    folder.mkdir(parents=True, exist_ok=True)
    target = folder / WEIGHTS_FILE
    temporary = temporary_name(target)
    reached(f"{WEIGHTS_FILE}: before write")
    try:
        # "format": "pt" is what transformers asks for; the layout is the same.
        write_tensors(temporary, state, {"format": "pt", "ingot_version": __version__})
        reached(f"{WEIGHTS_FILE}: written")
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    rename(temporary, target)
    write_file(folder / CONFIG_FILE, json.dumps(fields, indent=2).encode() + b"\n")


def family_of(config: ModelConfig) -> Family:
    """The transformers class that computes exactly this network; "ingot" where there is none."""
    gpt2 = (
        config.norm == "layer"
        and config.position == "learned"
        and config.activation != "swiglu"
        and config.attention_bias == "qkvo"
        and config.mlp_bias
        and not config.qk_norm
        and config.num_key_value_heads == config.num_attention_heads
        and config.num_attention_heads * (config.head_dim or 0) == config.hidden_size
    )
    if gpt2:
        return "gpt2"
    if not (config.norm == "rms" and config.position == "rotary" and config.activation == "swiglu"):
        return "ingot"
    if config.qk_norm:
        return "ingot" if config.mlp_bias or config.attention_bias == "qkv" else "qwen3"
    if config.attention_bias == "qkv":
        return "ingot" if config.mlp_bias else "qwen2"
    # transformers' Llama refuses a hidden size that does not divide by the heads, whatever head_dim says.
    return "ingot" if config.hidden_size % config.num_attention_heads else "llama"


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The contents of ``config.json``.

    Token ids of the start and end of a text are the tokenizer's to say (``generation_config.json``); without the nulls here
    transformers would take those of its published models.
    """
    family = family_of(config)
    common: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    if family == "ingot":
        return common | config.to_dict()
    common |= {"vocab_size": config.vocab_size, "initializer_range": config.initializer_range}
    if family == "gpt2":
        names = {ours: theirs for theirs, ours in reversed(_GPT2_ACTIVATIONS.items())}
        return common | {
            "n_embd": config.hidden_size,
            "n_layer": config.num_hidden_layers,
            "n_head": config.num_attention_heads,
            "n_inner": config.intermediate_size,
            "n_positions": config.max_position_embeddings,
            "activation_function": names[config.activation],
            "layer_norm_epsilon": config.norm_eps,
            "embd_pdrop": config.dropout,
            "attn_pdrop": config.dropout,
            "resid_pdrop": config.dropout,
        }
    fields = common | {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        # The older pair of names: every release of transformers reads it.
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "attention_dropout": config.dropout,
    }
    if family != "qwen2":
        fields["attention_bias"] = config.attention_bias == "qkvo"
    if family == "llama":
        fields["mlp_bias"] = config.mlp_bias
    return fields


def config_from_hf(fields: Mapping[str, Any], source: str) -> ModelConfig:
    """The inverse of :func:`config_to_hf`, for configurations that transformers wrote too.

    Settings with no effect on the network's function (token ids, cache, labels) are passed over. GPT-2's three dropout
    probabilities become one (that of the residual branches), Llama's attention dropout the dropout of all places.

    Raises
    ------
    CheckpointError
        Names the key of ``source`` that asks for something else than this network does.
    """
    family = fields.get("model_type")
    try:
        if family == "ingot":
            known = {field.name for field in dataclasses.fields(ModelConfig)}
            skipped = {"architectures", "model_type", "dtype", "bos_token_id", "eos_token_id", "pad_token_id"}
            skipped |= {"num_labels", "id2label", "label2id", "score_bias", "step_separator"}
            surplus = [name for name in fields if name not in known | skipped]
            if surplus:
                raise CheckpointError(f"{source}: unknown key {surplus[0]!r}: written by a newer version of ingot?")
            return ModelConfig(**{name: value for name, value in fields.items() if name in known})
        if family == "gpt2":
            return _from_gpt2(fields, source)
        if family in ("llama", "qwen2", "qwen3"):
            return _from_llama(fields, family, source)
    except KeyError as error:
        raise CheckpointError(f"{source}: the key {error} is missing") from None
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{source}: {error}") from None
    raise CheckpointError(
        f"{source}: model_type is {family!r}; ingot opens {', '.join(_ARCHITECTURES)} (Llama's class also serves SmolLM2)"
    )


def _from_gpt2(fields: Mapping[str, Any], source: str) -> ModelConfig:
    _require(fields, source, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    activation = fields.get("activation_function", "gelu_new")
    if activation not in _GPT2_ACTIVATIONS:
        raise CheckpointError(
            f"{source}: activation_function is {activation!r}; known are {', '.join(_GPT2_ACTIVATIONS)}"
        )
    return ModelConfig.gpt2(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["n_embd"],
        num_hidden_layers=fields["n_layer"],
        num_attention_heads=fields["n_head"],
        intermediate_size=fields.get("n_inner"),
        max_position_embeddings=fields.get("n_positions", 1024),
        activation=_GPT2_ACTIVATIONS[activation],
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
        tie_word_embeddings=fields.get("tie_word_embeddings", True),
        dropout=fields.get("resid_pdrop", 0.1),
        initializer_range=fields.get("initializer_range", 0.02),
    )


def _from_llama(fields: Mapping[str, Any], family: str, source: str) -> ModelConfig:
    _require(fields, source, hidden_act="silu", use_sliding_window=False)
    if family != "llama":
        _require(fields, source, mlp_bias=False)
    kinds = set(fields.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise CheckpointError(f"{source}: layer_types has {sorted(kinds)[0]!r}; ingot has full attention alone")
    has_bias = fields.get("attention_bias", False)
    theta, scaling = _rotary(fields, source)
    head_dim = fields.get("head_dim")
    return ModelConfig.llama(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        num_hidden_layers=fields["num_hidden_layers"],
        num_attention_heads=fields["num_attention_heads"],
        num_key_value_heads=fields.get("num_key_value_heads"),
        head_dim=128 if head_dim is None and family == "qwen3" else head_dim,
        intermediate_size=fields["intermediate_size"],
        max_position_embeddings=fields.get("max_position_embeddings", 2048 if family == "llama" else 32768),
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        attention_bias="qkv" if family == "qwen2" else "qkvo" if has_bias else "none",
        mlp_bias=fields.get("mlp_bias", False),
        qk_norm=family == "qwen3",
        tie_word_embeddings=fields.get("tie_word_embeddings", False),
        dropout=fields.get("attention_dropout", 0.0),
        initializer_range=fields.get("initializer_range", 0.02),
    )


def _rotary(fields: Mapping[str, Any], source: str) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling: from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before)."""
    settings = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    theta = settings.pop("rope_theta", fields.get("rope_theta", 10000.0))
    kind = settings.pop("rope_type", settings.pop("type", "default"))
    settings.pop("type", None)
    partial = settings.pop("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1.0):
        raise CheckpointError(f"{source}: partial_rotary_factor is {partial}; ingot turns whole heads alone")
    needed = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if kind not in needed:
        raise CheckpointError(f"{source}: rotary scaling {kind!r} is not known; ingot has {', '.join(needed)}")
    if kind == "default":
        return theta, None
    return theta, {"rope_type": kind, **{name: settings[name] for name in needed[kind]}}


def _require(fields: Mapping[str, Any], source: str, **settings: Any) -> None:
    """Refuse a key that is there with another value."""
    for name, value in settings.items():
        if fields.get(name, value) not in (value, None):
            raise CheckpointError(f"{source}: {name} is {fields[name]!r}; ingot's networks have {value!r}")


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a directory: one, or the shards that the index names."""
    whole, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if whole.is_file():
        return [whole]
    if not index.is_file():
        other = sorted([*folder.glob("pytorch_model*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        hint = f"; {other[0].name} is a pickle, which ingot does not read: convert it to safetensors" if other else ""
        raise CheckpointError(f"{folder}: {WEIGHTS_FILE} is missing{hint}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index}: damaged: copy or save the model again") from None
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{folder}: {name} is missing, which {INDEX_FILE} names")
    return [folder / name for name in names]
