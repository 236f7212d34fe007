"""llama.cpp's GGUF files: metadata to `ModelConfig`, and tensors dequantized row by row under transformers' names."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from jspec.errors import InputError
from jspec.hub.architectures import end_tokens, stored_tensors
from jspec.model.config import ModelConfig, RopeConfig
from jspec.model.layers import rope_frequencies

GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_ROPE_FACTORS = "rope_freqs.weight"  # Llama 3's scaling, stored as one divisor a frequency


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies in the file. `shape` is logical (rows first); `heads` > 0: rows to reorder."""

    offset: int
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    row_bytes: int
    heads: int = 0


@dataclasses.dataclass(frozen=True)
class GgufSource:
    """The tensors of a GGUF file under transformers' names; `rows` reads and dequantizes any range to float32."""

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
        # llama.cpp stores a head's rows as (0, half, 1, half + 1, ...); whole heads put them back in halves
        size = tensor.shape[0] // tensor.heads
        first = start - start % size
        out = self._read(tensor, first, -(-stop // size) * size)
        out = out.reshape(-1, size // 2, 2, *out.shape[1:]).swapaxes(1, 2).reshape(out.shape)
        return out[start - first:stop - first]

    def _read(self, tensor: GgufTensor, start: int, stop: int) -> np.ndarray:
        flat = len(tensor.shape) == 1  # a vector is one row of the file
        count = 1 if flat else stop - start
        with self.path.open("rb") as file:
            file.seek(tensor.offset + (0 if flat else start * tensor.row_bytes))
            raw = file.read(count * tensor.row_bytes)
        if len(raw) != count * tensor.row_bytes:
            raise InputError(f"{self.path}: cut short while it was being read")
        rows = gguf.quants.dequantize(np.frombuffer(raw, np.uint8).reshape(count, -1), tensor.kind)
        return rows[0, start:stop] if flat else rows


def open_gguf(path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    """(metadata fields, tensors by llama.cpp's names). Raises InputError if the file is cut short or no GGUF."""
    size = path.stat().st_size
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {t.name: t for t in reader.tensors}
    except Exception as e:  # the reader meets bad bytes with whatever numpy or struct raises on them
        raise InputError(f"{path}: cannot be read as GGUF, it is cut short or corrupt ({e}); fetch it again") from e
    end = max((int(t.data_offset) + int(t.n_bytes) for t in tensors.values()), default=0)
    if end > size:
        raise InputError(f"{path}: cut short: {size} bytes where its tensors end at {end}; fetch it again")
    if fields.get("split.count", 1) > 1:
        raise InputError(f"{path}: one part of a split GGUF; merge the parts first (llama-gguf-split --merge)")
    return fields, tensors


def _decimal(value: float) -> float:
    """A float32 of the file as the decimal it was written from (1e-05, not 9.999999747378752e-06)."""
    return float(str(np.float32(value)))


def _rope(fields: dict[str, Any], arch: str, head_dim: int, factors: np.ndarray | None) -> RopeConfig:
    theta = _decimal(fields.get(f"{arch}.rope.freq_base", 10000.0))
    scaling = fields.get(f"{arch}.rope.scaling.type", "none")
    if factors is not None:
        return llama3_rope(theta, head_dim, factors)
    factor = _decimal(fields.get(f"{arch}.rope.scaling.factor", 1.0))
    if scaling == "none":
        return RopeConfig(theta=theta)
    if scaling == "linear":
        return RopeConfig(theta=theta, scaling="linear", factor=factor)
    if scaling != "yarn":
        raise InputError(f"rope scaling {scaling!r} of a GGUF is not supported; supported: none, linear, yarn, and "
                         "Llama 3's rope_freqs")
    original = fields.get(f"{arch}.rope.scaling.original_context_length", fields[f"{arch}.context_length"])
    rope = RopeConfig(theta=theta, scaling="yarn", factor=factor, original_max_position=int(original))
    extra = _decimal(fields.get(f"{arch}.rope.scaling.attn_factor", 1.0))
    if extra != 1.0:  # llama.cpp multiplies YaRN's own factor by it
        rope = dataclasses.replace(rope, attention_factor=extra * (0.1 * math.log(factor) + 1.0))
    return rope


def llama3_rope(theta: float, head_dim: int, factors: np.ndarray) -> RopeConfig:
    """The published llama3 scaling whose frequencies these divisors give. Raises InputError if it is another one."""
    plain, _ = rope_frequencies(RopeConfig(theta=theta), head_dim)
    rope = RopeConfig(theta=theta, scaling="llama3", factor=float(factors.max()), original_max_position=8192)
    scaled, _ = rope_frequencies(rope, head_dim)
    if factors.shape != plain.shape or not np.allclose(plain / scaled, factors, rtol=1e-3):
        raise InputError(f"the GGUF's {_ROPE_FACTORS} is not Llama 3's scaling; use the model's safetensors")
    return rope


def config_from_gguf(fields: dict[str, Any], tensors: dict[str, gguf.ReaderTensor]) -> ModelConfig:
    """ModelConfig of a GGUF's metadata. Raises InputError for an architecture that is not supported."""
    arch = fields.get("general.architecture")
    if arch not in GGUF_ARCHITECTURES:
        raise InputError(f"GGUF architecture {arch!r} is not supported; supported: {', '.join(GGUF_ARCHITECTURES)}")
    if fields.get(f"{arch}.expert_count", 0):
        raise InputError("a GGUF with a mixture of experts is not supported")
    try:
        heads, hidden = int(fields[f"{arch}.attention.head_count"]), int(fields[f"{arch}.embedding_length"])
        head_dim = int(fields.get(f"{arch}.attention.key_length", hidden // heads))
        factors = tensors.get(_ROPE_FACTORS)
        rope = _rope(fields, arch, head_dim, None if factors is None else np.array(factors.data))
        stop = end_tokens(fields.get("tokenizer.ggml.eos_token_id"), fields.get("tokenizer.ggml.eot_token_id"))
        return ModelConfig(
            family=arch, vocab_size=int(tensors["token_embd.weight"].shape[1]), hidden_size=hidden,
            intermediate_size=int(fields[f"{arch}.feed_forward_length"]), num_layers=int(fields[f"{arch}.block_count"]),
            num_heads=heads, num_kv_heads=int(fields.get(f"{arch}.attention.head_count_kv", heads)), head_dim=head_dim,
            rms_norm_eps=_decimal(fields[f"{arch}.attention.layer_norm_rms_epsilon"]), rope=rope,
            tie_embeddings="output.weight" not in tensors, qkv_bias="blk.0.attn_q.bias" in tensors,
            out_bias="blk.0.attn_output.bias" in tensors, mlp_bias="blk.0.ffn_gate.bias" in tensors,
            qk_norm="blk.0.attn_q_norm.weight" in tensors,
            max_position_embeddings=int(fields[f"{arch}.context_length"]), stop_tokens=stop,
            pad_token=int(fields.get("tokenizer.ggml.padding_token_id", stop[0] if stop else 0)))
    except KeyError as e:
        raise InputError(f"the GGUF has no {e.args[0]}; it is not a complete language model") from e


def gguf_source(path: Path) -> tuple[GgufSource, ModelConfig, dict[str, Any]]:
    """(tensors under transformers' names, config, metadata) of a GGUF file. Raises InputError as above."""
    fields, found = open_gguf(path)
    config = config_from_gguf(fields, found)
    names = {t.gguf: t.name for t in stored_tensors(config)}
    reordered = {"q": config.num_heads, "k": config.num_kv_heads} if config.family == "llama" else {}
    heads = {t.name: reordered.get(t.key[-1].removesuffix("_bias"), 0) for t in stored_tensors(config)}
    tensors = {}
    for name, t in found.items():
        if name == _ROPE_FACTORS:
            continue
        shape = tuple(int(n) for n in t.shape[::-1])
        rows = 1 if len(shape) == 1 else shape[0]
        hf = names.get(name, name)
        tensors[hf] = GgufTensor(int(t.data_offset), t.tensor_type, shape, int(t.n_bytes) // rows, heads.get(hf, 0))
    return GgufSource(str(path), path, tensors), config, fields
