"""Which parameters an optimizer treats how: groups of patterns turned into groups of names, for both backends."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence

from ingot.errors import CheckpointError, ConfigError
from ingot.models.base import ParameterGroup


def check_optim(optim: str, muon_momentum: float, adapter: bool) -> None:
    """Refuse an optimizer that does not exist, or Muon for an adapter.

    Raises
    ------
    ConfigError
        Names the setting.
    """
    if optim not in ("adamw", "muon"):
        raise ConfigError(f"optim is {optim!r}; there are 'adamw' and 'muon'")
    if not 0.0 <= muon_momentum < 1.0:
        raise ConfigError(f"muon_momentum must be in [0, 1), got {muon_momentum}")
    if optim == "muon" and adapter:
        raise ConfigError("optim 'muon' is for whole matrices, not for adapters (LoRA): take optim 'adamw'")


def check_saved_optim(state: Mapping[str, object], optim: str) -> None:
    """Refuse the state of another optimizer, whose moments mean something else.

    Raises
    ------
    CheckpointError
        Names both.
    """
    saved = "muon" if "muon" in state else "adamw"
    if saved != optim:
        raise CheckpointError(
            f"optimizer state: saved with optim {saved!r}, but optim is {optim!r} here: go on with {saved!r}"
        )


def assign_groups(
    shapes: Mapping[str, tuple[int, ...]], groups: Sequence[ParameterGroup], weight_decay: float
) -> list[tuple[list[str], float, float]]:
    """Groups of (names, factor of the learning rate, weight decay), every parameter in exactly one of them.

    A parameter belongs to the first group with a matching pattern; those in none follow the defaults: factor 1, and
    ``weight_decay`` on matrices.

    Raises
    ------
    ConfigError
        A pattern matches no parameter, or the weight decay is negative.
    """
    if not 0.0 <= weight_decay < float("inf"):
        raise ConfigError(f"weight_decay must be 0 or more, got {weight_decay}")
    for pattern in (pattern for group in groups for pattern in group.names):
        if not any(fnmatch.fnmatchcase(name, pattern) for name in shapes):
            near = difflib.get_close_matches(pattern, shapes, n=1)
            hint = f"; the nearest name is {near[0]!r}" if near else ""
            raise ConfigError(f"no parameter is named {pattern!r}{hint}")
    members: dict[tuple[float, float], list[str]] = {}
    for name, shape in shapes.items():
        matching = (g for g in groups if any(fnmatch.fnmatchcase(name, pattern) for pattern in g.names))
        group = next(matching, ParameterGroup(names=()))
        default = weight_decay if len(shape) > 1 else 0.0
        decay = default if group.weight_decay is None else group.weight_decay
        members.setdefault((group.lr_scale, decay), []).append(name)
    return [(names, scale, decay) for (scale, decay), names in members.items()]
