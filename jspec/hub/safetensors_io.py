"""Safetensors without mapping the files: rows are read where they are needed, so memory holds one chunk at a time."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jspec.errors import InputError

_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16),
           "F64": np.dtype(np.float64)}
_CODES = {dtype.name: code for code, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the format's own limit
INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Location:
    """Where a tensor lies: file, byte offset, dtype and shape as stored."""

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, Location]:
    """Every tensor of one file. Raises InputError if the file is cut short, corrupt, or of a dtype we do not read."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise InputError(f"{path}: not a safetensors file, or cut short in its header; fetch it again")
        raw = file.read(length)
    try:
        header = {k: v for k, v in json.loads(raw).items() if k != "__metadata__"}
        return {name: _location(path, name, entry, 8 + length, size) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{path}: the safetensors header is corrupt ({type(e).__name__}); fetch the file again") from e


def _location(path: Path, name: str, entry: dict[str, Any], start: int, size: int) -> Location:
    if entry["dtype"] not in _DTYPES:
        raise InputError(f"{path}: tensor {name} is stored as {entry['dtype']}; supported: {', '.join(_DTYPES)}")
    dtype, shape = _DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
    begin, end = (int(n) for n in entry["data_offsets"])
    if begin < 0 or end - begin != int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
        raise InputError(f"{path}: the safetensors header is corrupt at tensor {name}; fetch the file again")
    if start + end > size:
        raise InputError(f"{path}: cut short: {size} bytes where tensor {name} ends at {start + end}; "
                         "fetch the file again")
    return Location(path, start + begin, dtype, shape)


def read_rows(location: Location, start: int, stop: int) -> np.ndarray:
    """Rows start..stop along the first axis, in the stored dtype."""
    width = int(np.prod(location.shape[1:], dtype=np.int64))
    row_bytes = width * location.dtype.itemsize
    out = bytearray((stop - start) * row_bytes)
    with location.path.open("rb", buffering=0) as file:
        file.seek(location.offset + start * row_bytes)
        view = memoryview(out)
        while view:
            n = file.readinto(view)
            if not n:
                raise InputError(f"{location.path}: cut short while it was being read")
            view = view[n:]
    return np.frombuffer(out, location.dtype).reshape(stop - start, *location.shape[1:])


@dataclasses.dataclass(frozen=True)
class SafetensorsSource:
    """The tensors of a directory by name; `rows` reads any range of them."""

    label: str
    locations: dict[str, Location]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: location.shape for name, location in self.locations.items()}

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return read_rows(self.locations[name], start, stop)

    def without(self, prefixes: tuple[str, ...]) -> SafetensorsSource:
        """The tensors whose names begin with none of these."""
        kept = {name: place for name, place in self.locations.items() if not name.startswith(prefixes)}
        return dataclasses.replace(self, locations=kept)


def read_json(path: Path, required: bool = True) -> dict | None:
    """A JSON object of a model directory; None if it is not there and not required. Raises InputError otherwise."""
    if not path.exists() and not required:
        return None
    if not path.exists():
        raise InputError(f"{path.parent}: no {path.name}; a model directory has {path.name} and safetensors")
    try:
        value = json.loads(path.read_text())
    except ValueError as e:
        raise InputError(f"{path}: not valid JSON ({e}); fetch or make it again") from e
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object; fetch or make it again")
    return value


def open_directory(directory: Path) -> SafetensorsSource:
    """The safetensors of a directory: `model.safetensors`, or the files that the index names.

    Raises InputError if there are none (pickled weights are never read), or a file is missing, corrupt or cut short.
    """
    index, single = directory / INDEX, directory / "model.safetensors"
    if index.exists():
        return _open_index(directory, index)
    if not single.exists():
        found = sorted(directory.glob("*.safetensors"))
        if len(found) != 1:
            pickled = sorted([*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth")])
            raise InputError(
                f"{directory}: only pickled weights ({pickled[0].name}), which are never loaded; convert the model to "
                "safetensors (save_pretrained of transformers does)" if pickled and not found else
                f"{directory}: no model.safetensors and no {INDEX}")
        single = found[0]
    return SafetensorsSource(str(directory), read_header(single))


def _open_index(directory: Path, index: Path) -> SafetensorsSource:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{index}: the index is corrupt ({type(e).__name__}); fetch it again") from e
    locations: dict[str, Location] = {}
    for name in files:
        if not (directory / name).exists():
            raise InputError(f"{directory}: {name}, which {INDEX} names, is missing; fetch it")
        locations.update(read_header(directory / name))
    lost = sorted(set(weight_map) - set(locations))
    if lost:
        raise InputError(f"{directory / weight_map[lost[0]]}: tensor {lost[0]} is missing, though {INDEX} names it")
    return SafetensorsSource(str(directory), locations)


def write_file(path: Path, shapes: dict[str, tuple[int, ...]], value: Callable[[str], np.ndarray],
               dtype: str = "float32") -> None:
    """Write tensors of one dtype one after the other: `value(name)` is asked for each only when its turn comes."""
    stored = _DTYPES[_CODES[dtype]]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + stored.itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, shape in shapes.items():
            array = np.ascontiguousarray(value(name)).astype(stored, copy=False)
            assert array.shape == tuple(shape), (name, array.shape, shape)
            file.write(array.view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
