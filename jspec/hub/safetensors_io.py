"""The one reader and the one writer of safetensors.

Ours, and not the library's: that one maps a file, whose pages then count as this process's memory,
and has all tensors before it writes; here rows are read and tensors written when their turn comes,
so memory holds one chunk at a time.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jspec.errors import InputError
from jspec.hub.fields import short
from jspec.hub.json_io import parse_json, read_bytes
from jspec.hub.tensors import unstacked
from jspec.model.config import ModelConfig

_FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
           "BF16": np.dtype(ml_dtypes.bfloat16), "F64": np.dtype(np.float64)}
_DTYPES = (_FLOATS | {"BOOL": np.dtype(bool), "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8),
                     "I16": np.dtype(np.int16), "U16": np.dtype(np.uint16),
                      "I32": np.dtype(np.int32), "U32": np.dtype(np.uint32),
                      "I64": np.dtype(np.int64), "U64": np.dtype(np.uint64)})
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

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * self.dtype.itemsize

    def part(self, index: int, shape: tuple[int, ...]) -> Location:
        """The index-th of the tensors of this shape that it is made of, one below the other."""
        offset = self.offset + index * math.prod(shape) * self.dtype.itemsize
        return dataclasses.replace(self, offset=offset, shape=shape)


def read_header(path: Path, dtypes: Mapping[str, np.dtype] = _FLOATS) -> dict[str, Location]:
    """Every tensor of one file. Raises InputError if it is no file or cannot be read, is cut short
    or corrupt, or is of none of these dtypes, by their code in the format."""
    if not path.is_file():
        raise InputError(f"{path}: not a file; fetch the model again")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise InputError(f"{path}: not a safetensors file, or cut short in its header; "
                                 "fetch it again")
            raw = file.read(length)
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror or e})") from None
    header = parse_json(raw, f"{path}: the safetensors header is corrupt")
    places = {name: _location(path, name, entry, 8 + length, size, dtypes)
              for name, entry in header.items() if name != "__metadata__"}
    before = 0
    for begin, end, name in sorted((place.offset, place.end, name)
                                   for name, place in places.items()):
        if begin < before:  # else a small file could stand for any amount of memory
            raise InputError(f"{path}: the safetensors header is corrupt: tensor {name} begins "
                             "inside another; fetch the file again")
        before = end
    return places


def _location(path: Path, name: str, entry: Any, start: int, size: int,
              dtypes: Mapping[str, np.dtype]) -> Location:
    try:
        code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = (isinstance(shape, list)
                 and all(type(n) is int and n >= 0 for n in (*shape, begin, end)))
        dtype = dtypes.get(code)
    except (ValueError, KeyError, TypeError):
        whole, code, dtype = False, None, None
    if whole and dtype is None:
        raise InputError(f"{path}: tensor {name} is stored as {str(code)[:40]}; supported: "
                         f"{', '.join(dtypes)}")
    if not whole or end - begin != math.prod(shape) * dtype.itemsize:
        raise InputError(f"{path}: the safetensors header is corrupt at tensor {name}; fetch the "
                         "file again")
    if start + end > size:
        raise InputError(f"{path}: cut short: {size} bytes where tensor {name} ends at "
                         f"{start + end}; fetch the file again")
    return Location(path, start + begin, dtype, tuple(shape))


def read_rows(location: Location, start: int, stop: int) -> np.ndarray:
    """Rows start..stop along the first axis, in the stored dtype."""
    width = int(np.prod(location.shape[1:], dtype=np.int64))
    row_bytes = width * location.dtype.itemsize
    out = bytearray((stop - start) * row_bytes)
    try:
        with location.path.open("rb", buffering=0) as file:
            file.seek(location.offset + start * row_bytes)
            view = memoryview(out)
            while view:
                n = file.readinto(view)
                if not n:
                    raise InputError(f"{location.path}: cut short while it was being read")
                view = view[n:]
    except OSError as e:
        raise InputError(f"{location.path}: cannot be read ({e.strerror or e})") from None
    return np.frombuffer(out, location.dtype).reshape(stop - start, *location.shape[1:])


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All of a small file at once, whole numbers too. Raises InputError as `read_header` does."""
    return {name: _read_whole(place) for name, place in read_header(path, _DTYPES).items()}


def _read_whole(place: Location) -> np.ndarray:
    # a scalar has no rows of its own
    as_one_row = dataclasses.replace(place, shape=(1, *place.shape))
    return read_rows(as_one_row, 0, 1)[0]


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
        kept = {name: place
                for name, place in self.locations.items() if not name.startswith(prefixes)}
        return dataclasses.replace(self, locations=kept)

    def unstacked(self, config: ModelConfig) -> SafetensorsSource:
        """The tensors as publishers store them, experts one by one, however they are stored."""
        return dataclasses.replace(self, locations=unstacked(self.label, self.locations, config))


def open_directory(directory: Path) -> SafetensorsSource:
    """The safetensors of a directory: `model.safetensors`, or the files that the index names.

    Raises InputError if there are none (pickled weights are never read), or a file is missing,
    corrupt or cut short.
    """
    index, single = directory / INDEX, directory / "model.safetensors"
    if index.exists():
        return _open_index(directory, index)
    if not single.exists():
        found = sorted(directory.glob("*.safetensors"))
        if len(found) != 1:
            pickled = sorted([*directory.glob("*.bin"), *directory.glob("*.pt"),
                              *directory.glob("*.pth")])
            raise InputError(
                f"{directory}: only pickled weights ({pickled[0].name}), which are never loaded; "
                "convert the model to safetensors (save_pretrained of transformers does)"
                if pickled and not found else f"{directory}: no model.safetensors and no {INDEX}")
        single = found[0]
    return SafetensorsSource(str(directory), read_header(single))


def _open_index(directory: Path, index: Path) -> SafetensorsSource:
    weight_map = parse_json(read_bytes(index), f"{index}: the index is corrupt").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: the index is corrupt: it has no weight_map; fetch it again")
    for name, file in weight_map.items():
        # a plain name: an index may not reach outside the model's folder (links, as of the hub's
        # cache, may)
        if (not isinstance(file, str) or file in ("", ".", "..") or {"/", "\0"} & set(file)
            or len(file) > 255):
            raise InputError(f"{index}: the index is corrupt: tensor {name[:100]} is in "
                             f"{short(file)}, which is not the name of a file beside it; fetch it "
                             "again")
    headers = {}
    for file in sorted(set(weight_map.values())):
        if not (directory / file).exists():
            raise InputError(f"{directory}: {file}, which {INDEX} names, is missing; fetch it")
        headers[file] = read_header(directory / file)
    locations: dict[str, Location] = {}
    for file, header in headers.items():
        for name, place in header.items():
            if name in locations and name not in weight_map:
                raise InputError(f"{directory}: tensor {name} is in {place.path.name} and in "
                                 f"{locations[name].path.name}, and {INDEX} does not say which; "
                                 "fetch the model again")
            if weight_map.get(name, file) == file:
                locations[name] = place
    lost = sorted(set(weight_map) - set(locations))
    if lost:
        raise InputError(f"{directory / weight_map[lost[0]]}: tensor {lost[0]} is missing, though "
                         f"{INDEX} names it")
    return SafetensorsSource(str(directory), locations)


def write_file(path: Path, shapes: Mapping[str, tuple[tuple[int, ...], str]],
               value: Callable[[str], np.ndarray]) -> None:
    """Write tensors one after the other, those of wide dtypes first, so that each begins where its
    own may.

    Args:
      shapes: of every tensor its shape and the name of the dtype that it is stored in.
      value: asked for each tensor only when its turn comes.
    """
    ordered = sorted(shapes, key=lambda name: -_DTYPES[_CODES[shapes[name][1]]].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in ordered:
        shape, dtype = shapes[name]
        end = offset + _DTYPES[_CODES[dtype]].itemsize * math.prod(shape)
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in ordered:
            shape, dtype = shapes[name]
            array = np.asarray(value(name))
            assert array.shape == tuple(shape), (name, array.shape, shape)
            stored = np.ascontiguousarray(array).astype(_DTYPES[_CODES[dtype]], copy=False)
            file.write(stored.view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """`write_file` of what is in memory, each tensor in its own dtype."""
    write_file(path, {name: (x.shape, x.dtype.name) for name, x in tensors.items()},
               tensors.__getitem__)
