"""Log-probabilities under the reference model: computed once for all of a run's answers, before training, and kept in its folder.

The file belongs to the weights, rows, template and tokenizer that it was made with. A resumed run finds it, also half done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ingot.data.examples import Examples, Pack, assemble_pack, hash_of, next_fit
from ingot.data.keys import digest
from ingot.durable import rename, temporary_name
from ingot.losses.numerics import Float64, f64
from ingot.losses.packed import sum_by_sequence
from ingot.models.safetensors_files import write_tensors
from ingot.models.sharing import weights_hash

if TYPE_CHECKING:
    from ingot.models.base import Model
    from ingot.training.progress import Display

REFERENCE_FILE = "reference_logprobs.safetensors"
_SAVE_EVERY_S = 60.0


class ReferenceLogprobs:
    """r = ln ref(answer | prompt), summed over the trained tokens, of every sequence of some examples.

    Parameters
    ----------
    examples
        The sequences, group by group.
    """

    def __init__(self, examples: Examples) -> None:
        self.examples = examples
        sizes = [len(group) for group in examples.groups]
        self._first = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        self.values: Float64 = np.full(int(self._first[-1]), np.nan)
        """Nats, f64 [T], one for each sequence; NaN where it is not known."""

    def of(self, members: Iterable[int]) -> Float64:
        """Those of the sequences of these groups, in their order, f64 [S]."""
        parts = [self.values[self._first[member] : self._first[member + 1]] for member in members]
        return f64(np.concatenate(parts)) if parts else np.zeros(0)

    def unknown(self, members: Iterable[int] | None = None) -> list[int]:
        """Groups with a sequence that is not known, of all or of ``members``."""
        first = self._first
        numbers = range(len(first) - 1) if members is None else members
        return [number for number in numbers if np.isnan(self.values[first[number] : first[number + 1]]).any()]

    def forget(self) -> None:
        """Know none any more, since the reference is another one."""
        self.values[:] = np.nan

    def score(
        self,
        model: Model,
        pack_length: int,
        done: Callable[[int], None] = lambda tokens: None,
        members: Iterable[int] | None = None,
    ) -> None:
        """Compute those that are not known, of all groups or of ``members``; ``done`` is told the tokens of each pack."""
        groups = self.unknown(members)
        rest = self.examples.select(groups)
        for places in next_fit(rest, pack_length, 0):
            pack = assemble_pack([rest.groups[place] for place in places])
            sums = sequence_logprobs(model, pack)
            for number, place in enumerate(places):
                low, high = pack.group_offsets[number : number + 2]
                first = self._first[groups[place]]
                self.values[first : first + high - low] = sums[low:high]
            done(len(pack.tokens))


def sequence_logprobs(model: Model, pack: Pack) -> Float64:
    """ln pi(answer | prompt) of each sequence, f64 [S], by a forward pass that keeps nothing."""
    _, out = model.forward(pack.tokens, pack.offsets, pack.targets, train=False)
    return sum_by_sequence(out.logprobs, pack.targets, pack.offsets)


def reference_logprobs(
    folder: Path,
    model: Model,
    sets: Mapping[str, Examples],
    *,
    hashes: Mapping[str, str],
    pack_length: int,
    display: Display,
) -> dict[str, ReferenceLogprobs]:
    """Those of all ``sets``, from the run's folder where they are there, otherwise computed and put there.

    Parameters
    ----------
    model
        The reference. Forward passes only.
    hashes
        Of what else the ids come from: tokenizer, template.
    pack_length
        Most tokens of a pass; changes memory, not the result.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    path = folder / REFERENCE_FILE
    key = digest(weights_hash(model), dict(hashes), {name: hash_of(examples) for name, examples in sets.items()})
    found = {name: ReferenceLogprobs(examples) for name, examples in sets.items()}
    stored = _read(path)
    if stored is not None:
        values, stored_key = stored
        if stored_key == key:
            for name, each in found.items():
                each.values[:] = values[name]
        else:
            display.say(f"reference {path}: is of another reference model or other rows; computed again")
    if not any(each.unknown() for each in found.values()):
        return found
    total = sum(sum(int(each.examples.lengths()[n]) for n in each.unknown()) for each in found.values())
    counted, saved_at = 0, time.monotonic()

    def save() -> None:
        temporary = temporary_name(path)
        try:
            write_tensors(temporary, {name: each.values for name, each in found.items()}, {"key": key})
            rename(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def done(tokens: int) -> None:
        nonlocal counted, saved_at
        counted += tokens
        display.work("reference log-probabilities", counted, total)
        if time.monotonic() - saved_at >= _SAVE_EVERY_S:
            save()
            saved_at = time.monotonic()

    try:
        for each in found.values():
            each.score(model, pack_length, done)
    finally:
        save()
    return found


def _read(path: Path) -> tuple[dict[str, Float64], str] | None:
    """Values and key of the file; None where there is none that can be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, (file.metadata() or {}).get("key", "")  # noqa: SIM118
    except (FileNotFoundError, SafetensorError):
        return None
