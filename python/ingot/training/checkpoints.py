"""checkpoint-N/: everything that an exact resume needs, in a folder that is either whole or refused by name.

``model.safetensors``, ``config.json`` and the tokenizer make it a Hugging Face directory; ``optimizer.safetensors`` holds the moments,
``trainer_state.json`` the place in the data and the history; ``manifest.json``, written last, the sha256 of each file. A run that trains
an adapter has that in ``adapter/``, and merged in ``model.safetensors``.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ingot.durable import (
    file_sha256,
    reached,
    remove_folder,
    rename,
    sync_file,
    sync_folder,
    temporary_name,
)
from ingot.errors import CheckpointError
from ingot.models.safetensors_files import write_tensors
from ingot.training.companions import write_tokenizer_config
from ingot.training.lora import save_beside

if TYPE_CHECKING:
    from ingot.configs import ModelConfig
    from ingot.data.chat import ChatEncoder
    from ingot.tokenizer import Tokenizer

FORMAT_VERSION = 1
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "trainer_state.json"
MANIFEST_FILE = "manifest.json"


class Savable(Protocol):
    """What a checkpoint holds: a model, or several parts that are trained together."""

    @property
    def config(self) -> ModelConfig:
        """Shape of the model that is the result."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write ``config.json``, ``model.safetensors``, and files of their own for other parts."""
        ...

    @property
    def optimizer(self) -> HasState:
        """Holds the moments."""
        ...


class HasState(Protocol):
    """An optimizer, or several."""

    def state(self) -> Mapping[str, npt.NDArray[np.generic]]:
        """Its arrays by name."""
        ...


class NewerFormat(CheckpointError):
    """Written by a later version of ingot, so it cannot be judged by this one."""


def write_checkpoint(
    folder: Path,
    step: int,
    model: Savable,
    tokenizer: Tokenizer,
    state: Mapping[str, Any],
    versions: Mapping[str, str],
    encoder: ChatEncoder | None = None,
    more: Callable[[Path], object] = lambda folder: None,
) -> Path:
    """Save ``folder/checkpoint-<step>``. It appears under its name when all of it is on the disk.

    With ``encoder``, whose template the model was trained with, that template is among its files. ``more`` writes into the folder what
    else the run's state is made of.

    Raises
    ------
    OSError
        There is no space, say. What was there before stays, and nothing is left of the new one.
    """
    target = folder / f"checkpoint-{step}"
    temporary = temporary_name(target)
    try:
        temporary.mkdir()
        reached(f"{MODEL_FILE}: before write")
        model.save(temporary)
        save_beside(model, temporary)
        tokenizer.save(temporary)
        if encoder is not None:
            write_tokenizer_config(temporary, tokenizer, model.config.max_position_embeddings, encoder)
        reached(f"{OPTIMIZER_FILE}: before write")
        write_tensors(temporary / OPTIMIZER_FILE, model.optimizer.state())
        more(temporary)
        (temporary / STATE_FILE).write_bytes(_json({"format_version": FORMAT_VERSION, **state}))
        files = {}
        for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
            sync_file(path)
            files[path.relative_to(temporary).as_posix()] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
        manifest = {"format_version": FORMAT_VERSION, "versions": dict(versions), "files": files}
        reached(f"{MANIFEST_FILE}: before write")
        (temporary / MANIFEST_FILE).write_bytes(_json(manifest))
        sync_file(temporary / MANIFEST_FILE)
        for inner in (path for path in temporary.iterdir() if path.is_dir()):
            sync_folder(inner)
        sync_folder(temporary)
        if target.exists():
            # A torn one of the same step, refused before; a usable one would not be written again.
            remove_folder(target)
        rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def read_state(path: Path) -> dict[str, Any]:
    """``trainer_state.json`` of a verified checkpoint."""
    state: dict[str, Any] = json.loads((path / STATE_FILE).read_bytes())
    return state


def read_weights(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """The model's arrays of a verified checkpoint, by Hugging Face name."""
    from safetensors.numpy import load_file

    weights: dict[str, npt.NDArray[np.float32]] = {}
    for file in sorted(path.glob("model*.safetensors")):
        weights |= load_file(file)
    return weights


def read_optimizer(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """The optimizer's arrays of a verified checkpoint."""
    from safetensors.numpy import load_file

    return load_file(path / OPTIMIZER_FILE)


def verify(path: Path) -> None:
    """Check every file against the manifest.

    Raises
    ------
    NewerFormat
        A later version of ingot wrote it.
    CheckpointError
        Names the file that is missing, cut short or altered.
    """
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_bytes())
        version = int(manifest["format_version"])
        files = {str(name): (str(entry["sha256"]), int(entry["bytes"])) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: {MANIFEST_FILE} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: {MANIFEST_FILE} is damaged") from None
    if version > FORMAT_VERSION:
        by = manifest.get("versions", {}).get("ingot", "a newer version")
        raise NewerFormat(
            f"{path}: saved by ingot {by} in format {version}, this one reads up to {FORMAT_VERSION}; upgrade ingot to go on with it"
        )
    for required in (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE):
        if required not in files and not (required == MODEL_FILE and f"{MODEL_FILE}.index.json" in files):
            raise CheckpointError(f"{path}: {MANIFEST_FILE} does not list {required}")
    for name, (digest, size) in files.items():
        file = path / name
        # Nothing but this folder and what lies in its own folders.
        if Path(name).is_absolute() or ".." in Path(name).parts or not file.is_file():
            raise CheckpointError(f"{path}: {name} is missing")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"{path}: {name} is cut short or altered ({file.stat().st_size} bytes, {size} written)"
            )
        if file_sha256(file) != digest:
            raise CheckpointError(f"{path}: {name} was altered after it was written (its sha256 differs)")


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints in a run folder, whole or not, by step."""
    found = []
    for path in folder.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found)


def newest_usable(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint; ``say`` gets a line for each one that is refused. None where there is none at all.

    Raises
    ------
    CheckpointError
        There are checkpoints, and none is whole.
    """
    refused = []
    for _, path in reversed(list_checkpoints(folder)):
        try:
            verify(path)
        except NewerFormat:
            raise
        except CheckpointError as error:
            refused.append(str(error))
            say(f"refused: {error}")
        except OSError as error:
            refused.append(f"{path}: cannot be read: {error.strerror or error}")
            say(f"refused: {refused[-1]}")
        else:
            return path
    if refused:
        raise CheckpointError(
            f"no usable checkpoint: {'; '.join(refused)}; delete them to start this run again from step 0"
        )
    return None


def prune(folder: Path, step: int, previous: int, keep_newest: int, keep_best: int | None) -> None:
    """Delete the checkpoints up to ``step``, the newest, but for the newest ones and the best.

    Those between ``previous``, the one saved or resumed from before, and ``step`` were refused when the run was resumed: they go first.
    """
    done = [(number, path) for number, path in list_checkpoints(folder) if number <= step]
    refused = [(number, path) for number, path in done if previous < number < step]
    kept = [entry for entry in done if entry not in refused]
    for number, path in refused + kept[:-keep_newest]:
        if number != keep_best or (number, path) in refused:
            remove_folder(path)


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"
