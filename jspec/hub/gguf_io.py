"""llama.cpp's GGUF files: tensors dequantized row by row under transformers' names."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from jspec.errors import InputError
from jspec.hub.assemble import check_layers
from jspec.hub.fields import whole
from jspec.hub.gguf_config import ROPE_FACTORS, config_from_gguf
from jspec.hub.tensors import stored_tensors, unstacked
from jspec.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies in the file. `shape` is logical (rows first); `heads` > 0: rows to
    reorder."""

    offset: int
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    row_bytes: int
    heads: int = 0

    def part(self, index: int, shape: tuple[int, ...]) -> GgufTensor:
        """The index-th of the tensors of this shape that it is made of, one below the other."""
        rows = math.prod(shape[:-1])
        return dataclasses.replace(self, offset=self.offset + index * rows * self.row_bytes,
                                   shape=shape)


@dataclasses.dataclass(frozen=True)
class GgufSource:
    """The tensors of a GGUF file under transformers' names; `rows` reads and dequantizes any range
    to float32."""

    label: str
    path: Path
    tensors: dict[str, GgufTensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: t.shape for name, t in self.tensors.items()}

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        tensor = self.tensors[name]
        if not tensor.heads:
            return self._read(tensor, start, stop)
        # llama.cpp stores a head's rows as (0, half, 1, half + 1, ...); whole heads put them back
        # in halves
        size = tensor.shape[0] // tensor.heads
        first = start - start % size
        out = self._read(tensor, first, -(-stop // size) * size)
        out = out.reshape(-1, size // 2, 2, *out.shape[1:]).swapaxes(1, 2).reshape(out.shape)
        return out[start - first:stop - first]

    def _read(self, tensor: GgufTensor, start: int, stop: int) -> np.ndarray:
        flat = len(tensor.shape) == 1  # a vector is one row of the file
        count = 1 if flat else stop - start
        try:
            with self.path.open("rb") as file:
                file.seek(tensor.offset + (0 if flat else start * tensor.row_bytes))
                raw = file.read(count * tensor.row_bytes)
        except OSError as e:
            raise InputError(f"{self.path}: cannot be read ({e.strerror or e})") from None
        if len(raw) != count * tensor.row_bytes:
            raise InputError(f"{self.path}: cut short while it was being read")
        try:
            rows = gguf.quants.dequantize(np.frombuffer(raw, np.uint8).reshape(count, -1),
                                          tensor.kind)
        except NotImplementedError:
            raise InputError(f"{self.path}: tensors quantized as {tensor.kind.name} are not "
                             "supported; take a GGUF of another quantization, or the model's "
                             "safetensors") from None
        return rows[0, start:stop] if flat else rows


class _Reader(gguf.GGUFReader):
    """The library's reader, bounded: by itself it takes what lies beyond the file's end for empty,
    and so would read an array of 10^9 entries to its end, or the machine's."""

    # tokens, merges and types of the largest published vocabularies are half as many
    values_left = 4_000_000

    def _get(self, offset, dtype, count=1, **options) -> np.ndarray:
        self.values_left -= 1
        out = super()._get(offset, dtype, count, **options)
        if self.values_left < 0 or len(out) < count:
            raise ValueError("its header speaks of more than the file holds")
        return out


def open_gguf(path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    """(metadata fields, tensors by llama.cpp's names). Raises InputError if the file is cut short
    or no GGUF."""
    try:
        size = path.stat().st_size
        reader = _Reader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {t.name: t for t in reader.tensors}
    except Exception as e:
        # the reader meets bad bytes with whatever numpy or struct raises on them
        reason = " ".join(str(e).split())[:200]
        raise InputError(f"{path}: cannot be read as GGUF, it is cut short or corrupt ({reason}); "
                         "fetch it again") from e
    end = max((int(t.data_offset) + int(t.n_bytes) for t in tensors.values()), default=0)
    if end > size:
        raise InputError(f"{path}: cut short: {size} bytes where its tensors end at {end}; fetch "
                         "it again")
    if whole(fields, "split.count", 1, str(path), least=0) > 1:
        raise InputError(f"{path}: one part of a split GGUF; merge the parts first "
                         "(llama-gguf-split --merge)")
    return fields, tensors


def gguf_source(path: Path, opened: tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]
                | None = None) -> tuple[GgufSource, ModelConfig, dict[str, Any]]:
    """(tensors under transformers' names, config, metadata) of a GGUF file. opened: what
    `open_gguf` gave, if it has been asked. Raises InputError as that does."""
    fields, found = opened or open_gguf(path)
    shapes = {name: tuple(int(n) for n in t.shape[::-1]) for name, t in found.items()}
    factors = found.get(ROPE_FACTORS)
    config = config_from_gguf(fields, shapes, None if factors is None else np.array(factors.data))
    own = unstacked(str(path), {name: _stored(t, shapes[name]) for name, t in found.items()
                                if name != ROPE_FACTORS}, config)
    check_layers(str(path), config, len(own))
    stored = {t.gguf: t for t in stored_tensors(config)}
    reordered = ({"q": config.num_heads, "k": config.num_kv_heads} if config.family == "llama"
                 else {})
    tensors = {}
    for name, tensor in own.items():
        if name in stored:
            heads = reordered.get(str(stored[name].key[-1]).removesuffix("_bias"), 0)
            name, tensor = stored[name].name, dataclasses.replace(tensor, heads=heads)
        tensors[name] = tensor
    return GgufSource(str(path), path, tensors), config, fields


def _stored(tensor: gguf.ReaderTensor, shape: tuple[int, ...]) -> GgufTensor:
    rows = max(1, math.prod(shape[:-1]))
    return GgufTensor(int(tensor.data_offset), tensor.tensor_type, shape,
                      int(tensor.n_bytes) // rows)
