"""Safetensors files: any float type read as f32, one tensor in memory at a time; equal arrays written as equal bytes.

A file is a u64 length, a JSON header of that length (``dtype, shape, data_offsets`` of each tensor) and the data. The library's numpy
reader has no bfloat16; its writer puts metadata in an order that changes from file to file, and hides what the system refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ingot.errors import CheckpointError

_WRITTEN_TYPES = {"<f4": "F32", "<f8": "F64", "<i4": "I32", "<i8": "I64"}
_BYTES_PER_ELEMENT = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# The limit of the safetensors library.
_MAX_HEADER_BYTES = 100_000_000


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file."""

    name: str
    dtype: str
    """As the header has it: F32, F16, BF16, F64, or one that is not a float."""
    shape: tuple[int, ...]
    start: int
    """Byte in the file."""
    end: int


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of a file, checked against its size.

    Raises
    ------
    CheckpointError
        The file is cut short or is no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(f"{path}: no safetensors file, or cut short ({size} bytes): copy or save it again")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = [_entry(name, entry, 8 + length) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: the safetensors header is damaged: copy or save the file again") from None
    for tensor in tensors:
        width = _BYTES_PER_ELEMENT.get(tensor.dtype)
        holds = tensor.end - tensor.start
        if tensor.start < 8 + length or holds < 0 or (width and holds != width * math.prod(tensor.shape)):
            raise CheckpointError(f"{path}: {tensor.name} does not fill its place: save the file again")
        if tensor.end > size:
            raise CheckpointError(
                f"{path}: cut short: {tensor.name} ends at byte {tensor.end}, the file at {size}; copy or save it again"
            )
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """What a file that :func:`read_header` can read says of itself."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return dict(header.get("__metadata__") or {})


def _entry(name: str, entry: Mapping[str, Any], data: int) -> StoredTensor:
    shape = tuple(entry["shape"])
    start, end = entry["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, end)):
        raise ValueError(name)
    return StoredTensor(name, str(entry["dtype"]), shape, data + start, data + end)


def read_tensors(path: Path, tensors: list[StoredTensor]) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """The values of some of a file's tensors as f32 arrays, one after the other.

    Raises
    ------
    CheckpointError
        A tensor is not of a float type.
    """
    with path.open("rb") as file:
        for tensor in sorted(tensors, key=lambda tensor: tensor.start):
            if tensor.dtype not in _BYTES_PER_ELEMENT:
                raise CheckpointError(
                    f"{path}: {tensor.name} is stored as {tensor.dtype}; float types alone can be read "
                    f"({', '.join(_BYTES_PER_ELEMENT)})"
                )
            file.seek(tensor.start)
            raw = file.read(tensor.end - tensor.start)
            yield tensor.name, _to_f32(raw, tensor.dtype).reshape(tensor.shape)


def _to_f32(raw: bytes, dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "BF16":
        # A bfloat16 is the upper half of the f32 of the same value.
        upper = np.frombuffer(raw, dtype="<u2").astype(np.uint32)
        return (upper << np.uint32(16)).view(np.float32)
    stored: npt.NDArray[np.float32] = np.frombuffer(raw, dtype={"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype])
    return stored.astype(np.float32, copy=False)


def write_tensors(
    path: Path, arrays: Mapping[str, npt.NDArray[np.generic]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file, synced to the disk. Types are f32, f64, i32 and i64.

    Raises
    ------
    OSError
        No space, no permission; ``path`` may hold a part, so write to a temporary name and rename.
    """
    # An array may be made when it is asked for: of all but one at a time only the form is kept.
    forms = {name: _form(arrays[name]) for name in arrays}
    # Largest elements first, as the library does, so that each tensor is aligned to its type.
    names = sorted(forms, key=lambda name: (-forms[name][0].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for name in names:
        dtype, shape, size = forms[name]
        end = position + size
        stored = _WRITTEN_TYPES[dtype.newbyteorder("<").str]
        header[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in names:
            _write_array(file, arrays[name])
        file.flush()
        os.fsync(file.fileno())


def _form(array: npt.NDArray[np.generic]) -> tuple[np.dtype[np.generic], tuple[int, ...], int]:
    return array.dtype, array.shape, array.nbytes


def _write_array(file: BinaryIO, array: npt.NDArray[np.generic]) -> None:
    file.write(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)
