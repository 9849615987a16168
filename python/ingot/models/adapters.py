"""LoRA adapters (Hu et al. 2021): W' = W + (alpha / rank) B A on linear layers, while the weights below stay as they are.

Several adapters may lie on one model. Each call says which it goes through, and training one leaves the weights and the other adapters
alone. Files are those of peft: ``adapter_config.json`` and ``adapter_model.safetensors``.

Shape legend: r rank, d_in and d_out a layer's inputs and outputs.
"""

from __future__ import annotations

import abc
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ingot.configs import ModelConfig
from ingot.durable import rename, temporary_name, write_file
from ingot.errors import CheckpointError, ConfigError
from ingot.models.base import FloatArray
from ingot.models.hf import family_of
from ingot.models.parameters import Parameter, parameter_table
from ingot.models.safetensors_files import read_header, read_metadata, read_tensors, write_tensors
from ingot.models.tables import LazyArrays, check_state, some

OFF = "off"
"""The name of no adapter: the model as it is without any."""
ALL_LINEAR = "all-linear"
"""Every linear layer of the blocks."""
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_FOLDER = "adapter"
"""Where a run's adapter lies in its folder, beside the model with the adapter merged."""

_PREFIX = "base_model.model."
_DEFAULT_RANK = 8
_DEFAULT_ALPHA = 16.0
_BASE_HASH = "base_hash"
# Settings of peft that change what an adapter computes, and the only values of them that are read here.
_PLAIN = {
    "use_dora": False,
    "use_rslora": False,
    "lora_bias": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "layer_replication": None,
}


@dataclasses.dataclass(frozen=True)
class AdapterSettings:
    """What an adapter is, beside its weights."""

    rank: int
    alpha: float
    modules: tuple[str, ...]
    """The linear layers that it changes, by name."""
    num_values: int
    """Scalar heads of its own."""
    dropout: float = 0.0
    """Share of the elements of each layer's input that A does not see while training."""

    @property
    def scale(self) -> float:
        """Factor of B A: alpha / rank."""
        return self.alpha / self.rank


class Adapter(abc.ABC):
    """One adapter of a model. Names of tensors are peft's without ``base_model.model.``: ``MODULE.lora_A.weight`` [r, d_in],
    ``MODULE.lora_B.weight`` [d_out, r]; and ``score.weight`` [k, d] and ``score.bias`` [k] where it has scalar heads.
    """

    def __init__(self, name: str, settings: AdapterSettings) -> None:
        self.name = name
        self.settings = settings
        self.base_model: str | None = None
        """Where the weights below it are, for ``base_model_name_or_path`` of its file."""
        self.base_hash: str | None = None
        """Of the weights below it (:func:`ingot.models.sharing.weights_hash`), where that is known."""

    @property
    def rank(self) -> int:
        """Rows of A and columns of B."""
        return self.settings.rank

    @property
    def alpha(self) -> float:
        """B A counts times alpha / rank."""
        return self.settings.alpha

    @property
    def modules(self) -> tuple[str, ...]:
        """The linear layers that it changes, by name."""
        return self.settings.modules

    @property
    def num_values(self) -> int:
        """Its scalar heads."""
        return self.settings.num_values

    @property
    def scale(self) -> float:
        """Factor of B A: alpha / rank."""
        return self.settings.scale

    @property
    @abc.abstractmethod
    def parameters(self) -> Mapping[str, FloatArray]:
        """Its weights by name; writable views on the native backend, read-only copies on torch."""

    @property
    @abc.abstractmethod
    def gradients(self) -> Mapping[str, FloatArray]:
        """Its gradients by name, zeros before the first backward; views or copies as :attr:`parameters`."""

    @abc.abstractmethod
    def _write(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Take over values that were checked."""

    @property
    def num_parameters(self) -> int:
        """Number of its weights."""
        return sum(array.size for array in self.parameters.values())

    def state(self) -> dict[str, FloatArray]:
        """Copies of its weights by name."""
        return {name: np.array(array, order="C") for name, array in self.parameters.items()}

    def load_state(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """The inverse of :meth:`state`; missing, surplus or mis-shaped weights are a ``CheckpointError`` that names them."""
        check_state(state, {name: array.shape for name, array in self.parameters.items()}, "the adapter's state")
        self._write(state)

    def delta(self, module: str) -> FloatArray:
        """(alpha / rank) B A of one module, f32 [d_out, d_in]."""
        weights = self.parameters
        product = np.asarray(weights[f"{module}.lora_B.weight"] @ weights[f"{module}.lora_A.weight"], np.float32)
        product *= np.float32(self.scale)
        return product


class Adapted(abc.ABC):
    """What a model of either backend does with adapters."""

    _adapters: dict[str, Adapter]
    _active: str | None
    _merged: str | None
    _head_deltas: dict[str, FloatArray]
    """What merging added to the scalar heads."""

    config: Any
    state: Any
    snapshot: Any

    @property
    @abc.abstractmethod
    def _own_values(self) -> int:
        """Scalar heads of the model's own."""

    @abc.abstractmethod
    def _make_adapter(self, name: str, settings: AdapterSettings) -> Adapter:
        """A new adapter of zeros, the scalar heads copies of the model's where it has as many."""

    @abc.abstractmethod
    def _add_to_weights(self, deltas: Iterator[tuple[str, FloatArray]]) -> None:
        """Add to weights of the model by name, in the shapes in which they are shown."""

    @property
    def num_values(self) -> int:
        """Scalar heads that a call without ``adapter`` sees: the active adapter's, else the model's own."""
        return self._values_of(self._trained())

    def _values_of(self, adapter: Adapter | None) -> int:
        return self._own_values if adapter is None else adapter.num_values

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The adapters by name."""
        return MappingProxyType(self._adapters)

    @property
    def active_adapter(self) -> str | None:
        """The adapter that calls without ``adapter`` go through, that :meth:`step` trains and :meth:`save` merges; None for none."""
        return self._active

    @active_adapter.setter
    def active_adapter(self, name: str | None) -> None:
        if name is not None:
            self._known(name)
        self._active = name

    def add_adapter(
        self,
        name: str,
        rank: int = _DEFAULT_RANK,
        alpha: float = _DEFAULT_ALPHA,
        target_modules: str | Sequence[str] = ALL_LINEAR,
        seed: int = 0,
        *,
        num_values: int | None = None,
        dropout: float = 0.0,
    ) -> Adapter:
        """A new adapter, which changes nothing before it is trained: A ~ U(-1/sqrt(d_in), 1/sqrt(d_in)), B = 0.

        Parameters
        ----------
        rank, alpha
            W' = W + (alpha / rank) B A, with A [rank, d_in] and B [d_out, rank].
        target_modules
            "all-linear", or names of linear layers as they end: ``q_proj`` for that of every block, ``layers.0.self_attn.q_proj`` for one.
        seed
            Of A.
        num_values
            Scalar heads of its own. As many as the model has, and their values, unless given; another number of heads begins at 0.
        dropout
            peft's ``lora_dropout``: while training, A sees each layer's input with this share of its elements at 0 and the others
            scaled by 1 / (1 - dropout). The masks are functions of the call's seed, as those of the network's own dropout are.

        Raises
        ------
        ConfigError
            The name is taken, a number is out of its range, or a target names no linear layer.
        RuntimeError
            An adapter is merged into the weights.
        """
        if not name or name == OFF or "/" in name or name in self._adapters:
            taken = (
                "is there already" if name in self._adapters else 'is no name for an adapter ("off" stands for none)'
            )
            raise ConfigError(f"adapter {name!r} {taken}: give another name")
        self._require_unmerged()
        if rank < 1:
            raise ConfigError(f"rank must be at least 1, got {rank}")
        if not 0.0 < alpha < math.inf:
            raise ConfigError(f"alpha must be positive, got {alpha}")
        if not 0.0 <= dropout < 1.0:
            raise ConfigError(f"dropout must be at least 0 and below 1, got {dropout}")
        if num_values is not None and num_values < 0:
            raise ConfigError(f"num_values must be 0 or more, got {num_values}")
        inputs = linear_modules(self.config)
        modules = select_modules(list(inputs), target_modules)
        heads = self._own_values if num_values is None else num_values
        adapter = self._make_adapter(name, AdapterSettings(rank, alpha, tuple(modules), heads, dropout))
        state = adapter.state()
        for number, module in enumerate(modules):
            bound = 1.0 / math.sqrt(inputs[module])
            values = np.random.default_rng([seed, number]).uniform(-bound, bound, (rank, inputs[module]))
            state[f"{module}.lora_A.weight"] = values.astype(np.float32)
        adapter._write(state)
        self._adapters[name] = adapter
        return adapter

    def merge_adapter(self, name: str) -> None:
        """Add an adapter to the weights: calls through it cost nothing more. Other adapters, and "off", are an error until it is unmerged.

        Raises
        ------
        ConfigError
            There is no such adapter, or it has another number of scalar heads than the model.
        RuntimeError
            One is merged already.
        """
        adapter = self._known(name)
        self._require_unmerged()
        if adapter.num_values != self._own_values:
            raise ConfigError(
                f"adapter {name!r} has {adapter.num_values} scalar heads and the model {self._own_values}: it cannot be merged in place; "
                "make it active and save the model"
            )
        self._add_to_weights(self._deltas(adapter, 1.0))
        self._merged = name

    def unmerge_adapter(self) -> None:
        """Take the merged adapter off the weights again, which are then as before but for rounding."""
        if self._merged is None:
            raise RuntimeError("no adapter is merged into the weights")
        self._add_to_weights(self._deltas(self._adapters[self._merged], -1.0))
        self._merged = None

    def save_adapter(self, name: str, folder: str | Path) -> None:
        """Write an adapter as peft does.

        Raises
        ------
        ConfigError
            There is no such adapter.
        OSError
            No space, no permission. What was there before stays.
        """
        write_adapter(Path(folder), self._known(name), self.config)

    def load_adapter(self, folder: str | Path, name: str = "default") -> Adapter:
        """Add an adapter from a folder that :meth:`save_adapter` or peft wrote, with the scalar heads that it has there (the model's where
        it has none).

        Raises
        ------
        CheckpointError
            A file is missing or damaged, or the adapter is of another kind or for another network; the message names what.
        ConfigError
            The name is taken.
        """
        settings, state = read_adapter(Path(folder))
        modules = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
        unknown = [module for module in modules if module not in linear_modules(self.config)]
        if unknown or not modules:
            raise CheckpointError(f"{folder}: is for another network, with {some(unknown) or 'no linear layer at all'}")
        num_values = len(state["score.weight"]) if "score.weight" in state else None
        adapter = self.add_adapter(
            name,
            settings["r"],
            settings["lora_alpha"],
            modules,
            num_values=num_values,
            dropout=settings["lora_dropout"],
        )
        try:
            # Without scalar heads of its own it keeps the model's.
            heads = {key: value for key, value in adapter.parameters.items() if key.startswith("score.")}
            adapter.load_state({**heads, **state})
        except CheckpointError as error:
            del self._adapters[name]
            raise CheckpointError(f"{folder}: {error}") from None
        adapter.base_model, adapter.base_hash = settings["base_model_name_or_path"], settings[_BASE_HASH]
        return adapter

    def merged_state(self) -> Mapping[str, FloatArray]:
        """The weights with the active adapter merged, as :meth:`save` writes them; each is made when it is asked for."""
        weights: Mapping[str, FloatArray] = self.snapshot()
        adapter = self._trained()
        if adapter is None or self._merged is not None:
            return weights
        turned = family_of(self.config) == "gpt2"
        changed = {f"{module}.weight": module for module in adapter.modules}
        heads = {name: array for name, array in adapter.parameters.items() if name.startswith("score.")}

        def merged(name: str) -> FloatArray:
            if name in heads:
                return heads[name]
            if name not in changed:
                return weights[name]
            delta = adapter.delta(changed[name])
            whole = delta.T if turned else delta
            whole += weights[name]
            return whole

        own = (name for name in weights if not name.startswith("score."))
        return LazyArrays([*own, *heads], merged)

    def _known(self, name: str) -> Adapter:
        if name not in self._adapters:
            names = ", ".join(map(repr, self._adapters)) or "none"
            raise ConfigError(f"the model has no adapter {name!r}; it has {names}")
        return self._adapters[name]

    def _chosen(self, adapter: str | None) -> Adapter | None:
        """The adapter that a call goes through, beside what is merged into the weights.

        Raises
        ------
        ConfigError
            There is no such adapter.
        RuntimeError
            Another one is merged into the weights.
        """
        name = self._active if adapter is None else adapter
        chosen = None if name is None or name == OFF else self._known(name)
        if self._merged is None:
            return chosen
        if chosen is None or chosen.name != self._merged:
            raise RuntimeError(f"adapter {self._merged!r} is merged into the weights: unmerge it first")
        return None

    def _trained(self) -> Adapter | None:
        """The adapter that an optimizer made now changes; None for the model's own weights."""
        return None if self._active is None else self._adapters[self._active]

    def _require_unmerged(self) -> None:
        if self._merged is not None:
            raise RuntimeError(f"adapter {self._merged!r} is merged into the weights: unmerge it first")

    def _deltas(self, adapter: Adapter, sign: float) -> Iterator[tuple[str, FloatArray]]:
        """What merging adds to each weight, in the shape in which it is shown."""
        turned = family_of(self.config) == "gpt2"
        for module in adapter.modules:
            delta = np.float32(sign) * adapter.delta(module)
            yield f"{module}.weight", delta.T if turned else delta
        if sign > 0:
            own, state = adapter.parameters, self.state() if self._own_values else {}
            self._head_deltas = {key: own[key] - state[key] for key in state if key.startswith("score.")}
        for key, delta in self._head_deltas.items():
            yield key, np.float32(sign) * delta


def linear_modules(config: ModelConfig) -> dict[str, int]:
    """The linear layers of the blocks by name, and their inputs."""
    return {
        parameter.name.removesuffix(".weight"): parameter.shape[0 if parameter.turned else 1]
        for parameter in parameter_table(config)
        if len(parameter.shape) == 2 and (".layers." in parameter.name or ".h." in parameter.name)
    }


def select_modules(modules: Sequence[str], target_modules: str | Sequence[str]) -> list[str]:
    """Those of ``modules`` that are named, whole or by their ends.

    Raises
    ------
    ConfigError
        A target names none.
    """
    if target_modules == ALL_LINEAR or list(target_modules) == [ALL_LINEAR]:
        return list(modules)
    known = ", ".join(dict.fromkeys(_short(module) for module in modules))
    if isinstance(target_modules, str):
        raise ConfigError(f"target_modules is {target_modules!r}; give {ALL_LINEAR!r} or a list of names ({known})")
    if not target_modules:
        raise ConfigError(f"target_modules names no layer; give {ALL_LINEAR!r} or some of {known}")
    for target in target_modules:
        if not any(_ends(module, target) for module in modules):
            raise ConfigError(f"target_modules: no linear layer is named {target!r}; there are {known}")
    return [module for module in modules if any(_ends(module, target) for target in target_modules)]


def _ends(module: str, target: str) -> bool:
    return module == target or module.endswith("." + target)


def _short(module: str) -> str:
    """The part of a name that is the same in all blocks."""
    return module.rpartition(".")[2]


def adapter_table(config: ModelConfig, num_values: int, rank: int, modules: Sequence[str]) -> list[Parameter]:
    """Names, shapes and places of an adapter's parameters in its flat buffer, those of the native core."""
    base = {parameter.name: parameter for parameter in parameter_table(config, num_values)}
    shapes: list[tuple[str, tuple[int, ...]]] = []
    for module in modules:
        weight = base[f"{module}.weight"]
        outputs, inputs = weight.shape[::-1] if weight.turned else weight.shape
        shapes += [(f"{module}.lora_A.weight", (rank, inputs)), (f"{module}.lora_B.weight", (outputs, rank))]
    shapes += [(name, parameter.shape) for name, parameter in base.items() if name.startswith("score.")]
    table: list[Parameter] = []
    for name, shape in shapes:
        table.append(Parameter(name, shape, table[-1].offset + table[-1].size if table else 0, "zero"))
    return table


# ---- files


def write_adapter(
    folder: Path, adapter: Adapter, config: ModelConfig, state: Mapping[str, FloatArray] | None = None
) -> None:
    """``adapter_config.json`` and ``adapter_model.safetensors`` as peft writes them; ``state`` instead of the adapter's own weights."""
    everything = list(linear_modules(config))
    names = sorted({_short(module) for module in adapter.modules})
    # Short names where they mean these layers and no others.
    if select_modules(everything, names) != list(adapter.modules):
        names = list(adapter.modules)
    parameters = adapter.parameters if state is None else state
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.settings.dropout,
        "target_modules": names,
        "modules_to_save": ["score"] if "score.weight" in parameters else None,
        "bias": "none",
        "fan_in_fan_out": family_of(config) == "gpt2",
        "init_lora_weights": True,
        "inference_mode": True,
        "use_dora": False,
        "use_rslora": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / WEIGHTS_FILE
    temporary = temporary_name(target)
    try:
        # A field of its own in adapter_config.json would be a surprise to peft; what stands here it does not read.
        known = {} if adapter.base_hash is None else {_BASE_HASH: adapter.base_hash}
        write_tensors(
            temporary, {_PREFIX + name: array for name, array in parameters.items()}, {"format": "pt", **known}
        )
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    rename(temporary, target)
    write_file(folder / CONFIG_FILE, json.dumps(settings, indent=2).encode() + b"\n")


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, FloatArray]]:
    """The settings and the weights of an adapter, by the names of :class:`Adapter`.

    Raises
    ------
    CheckpointError
        A file is missing or damaged, or the adapter is of a kind that ingot does not have.
    """
    path = folder / CONFIG_FILE
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind, rank, alpha = settings["peft_type"], settings["r"], settings["lora_alpha"]
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing: {folder} is no folder of an adapter") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error!r}") from None
    if kind != "LORA":
        raise CheckpointError(f"{path}: peft_type is {kind!r}; ingot has LORA alone")
    for key, plain in _PLAIN.items():
        if settings.get(key, plain) not in (plain, None):
            raise CheckpointError(f"{path}: {key} is {settings[key]!r}; ingot has {plain!r} alone")
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise CheckpointError(f"{weights}: missing")
    state = {name.removeprefix(_PREFIX): array for name, array in read_tensors(weights, read_header(weights))}
    found = {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": settings.get("lora_dropout") or 0.0,
        "base_model_name_or_path": settings.get("base_model_name_or_path"),
        _BASE_HASH: read_metadata(weights).get(_BASE_HASH),
    }
    return found, state
