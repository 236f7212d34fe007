"""The kernels as the model uses them: which implementation runs, and how it runs on the shards of a
mesh.

The reference is plain JAX, which XLA partitions by itself. A Pallas kernel is a program for one
device, so on a mesh it runs under `shard_map`, split as the rollout layout splits rows, heads and
vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jspec.arguments import one_of
from jspec.choices import KERNELS
from jspec.errors import InputError
from jspec.sharding import constrain, current_mesh, heads_replicated, partition
from pallas_kernels.implementation import REFERENCE, Implementation
from pallas_kernels.noise import CoupledNoise, Noise
from pallas_kernels.rejection_sampling import Verdict, is_cut, rejection_sampling
from pallas_kernels.rejection_sampling import draw as _draw
from pallas_kernels.verify_attention import verify_attention

log = logging.getLogger(__name__)


def platform() -> str:
    """The platform that programs are being made for: the current mesh's, else JAX's default."""
    device = current_mesh().abstract_mesh.abstract_device
    return getattr(device, "platform", None) or jax.default_backend()


def _is_hopper() -> bool:
    """Whether the GPU has the kernels' matrix instructions: compute capability 9 does, older and
    newer ones do not."""
    if jax.default_backend() != "gpu":  # it is being compiled for a GPU that is not here
        return True
    return str(getattr(jax.local_devices()[0], "compute_capability", "")).startswith("9.")


def choose(kernels: str | Implementation) -> Implementation:
    """The implementation that `speculation.kernels` stands for here. An `Implementation` is itself.

    Raises InputError for a name that is not one of KERNELS, and for "pallas" on an accelerator that
    has no kernels.
    """
    if isinstance(kernels, Implementation):
        return kernels
    one_of(KERNELS)("speculation kernels", kernels)
    chip = "gpu" if platform() in ("gpu", "cuda") else platform()
    supported = chip == "tpu" or chip == "gpu" and _is_hopper()
    if kernels == "reference" or kernels == "auto" and not supported:
        return REFERENCE
    if chip == "cpu":
        return Implementation("tpu", interpret=True)
    if not supported:
        raise InputError(f"speculation.kernels=pallas needs a TPU or a Hopper GPU, and this is "
                         f"{jax.devices()[0].device_kind}; set speculation.kernels=auto")
    return Implementation(chip, fall_back=kernels == "auto")


def picked(kernels: str | Implementation) -> str:
    """In a few words what `choose` picks, for logs."""
    chosen = choose(kernels)
    return f"{chosen.name} kernels" + (", interpreted" if chosen.interpret else "")


def _or_reference(implementation: Implementation, kernel: Callable[[], Any],
                  reference: Callable[[], Any]) -> Any:
    if implementation.name == "reference":
        return reference()
    try:
        return kernel()
    except NotImplementedError as refusal:
        if not implementation.fall_back:
            raise InputError(f"speculation.kernels=pallas: {refusal}; set "
                             "speculation.kernels=auto") from None
        log.warning("the reference takes the place of a %s kernel: %s", implementation.name,
                    refusal)
        return reference()


def _split(layout: str, x: jax.Array, *axes: str | None) -> PartitionSpec:
    """How the mesh splits x; `axes` are the logical names of its leading dimensions."""
    return partition(current_mesh(), layout, x.shape, (*axes, *(None,) * (x.ndim - len(axes))))


def _one_device() -> bool:
    """Whether nothing is left to be split: there is no mesh, or a `shard_map` around this has split
    it all."""
    mesh = current_mesh()
    return all(size == 1 or name in mesh.manual_axes for name, size in mesh.shape.items())


def _axes(entry: Any) -> tuple[str, ...] | None:
    """The mesh axes of one entry of a PartitionSpec, which unwraps a tuple of one; None if there
    are none."""
    return (entry,) if isinstance(entry, str) else entry or None


def whole_vocabulary(layout: str, x: jax.Array) -> jax.Array:
    """x [N, ..., V] with every row's vocabulary on its own shard of the batch.

    What sorts, accumulates or cuts it into blocks is not left to XLA's partitioner: its blocks
    would cross the shards' edges, and what is passed over them is a collective of all devices,
    where others may be at another cycle by then.
    """
    return constrain(x, layout, "batch", *(None,) * (x.ndim - 1))


def draw(layout: str, log_q: jax.Array, noise: Noise, offset: int,
         draft_vocab: jax.Array | None = None) -> jax.Array:
    """`rejection_sampling.draw` on the shards of a layout: int32 [N] from log_q float32 [N, Vd].
    Where they share the vocabulary no row of it is gathered."""
    split = (None if draft_vocab is not None or _one_device()
             else _split(layout, log_q, "batch", "vocab"))
    axis = None if split is None or isinstance(noise, CoupledNoise) else _axes(split[1])
    if axis is None:
        return _draw(log_q, noise, offset, draft_vocab)
    rows = PartitionSpec(split[0])
    return jax.shard_map(lambda log_q, noise: _draw(log_q, noise, offset, axis=axis),
                         in_specs=(split, rows), out_specs=rows, check_vma=False)(log_q, noise)


def attend(policy: Any, q: jax.Array, k: jax.Array, v: jax.Array, pool_k: jax.Array,
           pool_v: jax.Array, table: jax.Array, lengths: jax.Array,
           window: int | None = None,
           together: str | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`verify_attention` as `policy.kernels` says, on the shards of `policy.layout`: rows are a
    shard's own, heads are split. q [B, T, H, D], k and v [B, T, H_kv, D], pools
    [blocks, H_kv, size, D], table int32 [B, M], lengths int32 [B].

    Where KV heads are replicated, every shard computes all heads: the copies of the pool must stay
    equal.
    """
    args = (q, k, v, pool_k, pool_v, table, lengths)
    attention = partial(verify_attention, window=window, together=together)

    def kernel() -> tuple[jax.Array, ...]:
        run = partial(attention, implementation=policy.kernels)
        if _one_device():
            return run(*args)
        whole = heads_replicated(policy.config, policy.layout)
        queries = _split(policy.layout, q, None, None, None if whole else "q_heads")
        new = _split(policy.layout, k, None, None, None if whole else "kv_heads")
        pool = _split(policy.layout, pool_k, None, None if whole else "kv_heads")
        rows = PartitionSpec()
        return jax.shard_map(run, in_specs=(queries, new, new, pool, pool, rows, rows),
                             out_specs=(queries, pool, pool), check_vma=False)(*args)

    return _or_reference(policy.kernels, kernel, lambda: attention(*args))


def judge(policy: Any, logits: jax.Array, draft_tokens: jax.Array, draft_log_q: jax.Array | None,
          noise: Any, temperature: jax.Array, top_p: jax.Array | None = None, *,
          draft_vocab: jax.Array | None = None, top_k: int = 0, min_p: jax.Array | None = None,
          ban: jax.Array | None = None, banned_tokens: tuple[int, ...] = ()) -> Verdict:
    """`rejection_sampling` as `policy.kernels` says, on the shards of `policy.layout`: the verdict
    on draft_tokens int32 [B, K], drawn from draft_log_q float32 [B, K, Vd], by logits
    [B, K + 1, V]."""
    args = (logits, draft_tokens, draft_log_q, noise, temperature, draft_vocab, ban)

    def run(logits, draft_tokens, draft_log_q, noise, temperature, draft_vocab, ban,
            **where) -> Verdict:
        return rejection_sampling(logits, draft_tokens, draft_log_q, noise, temperature, top_p,
                                  draft_vocab=draft_vocab,
                                  top_k=top_k, min_p=min_p, ban=ban,
                                  banned_tokens=banned_tokens, **where)

    def reference() -> Verdict:
        # only reduces over the vocabulary
        if isinstance(noise, CoupledNoise) and not top_k and top_p is None:
            return run(*args)
        scores, q = (x if x is None else whole_vocabulary(policy.layout, x)
                     for x in (logits, draft_log_q))
        return run(scores, draft_tokens, q, *args[3:])

    def kernel() -> Verdict:
        if is_cut(top_k, top_p, min_p):  # the reference's, as two of them sort
            return reference()
        if _one_device():
            return run(*args, implementation=policy.kernels)
        by_row = partial(_split, policy.layout)
        scores = by_row(logits, "batch", None, "vocab")
        rows = jax.tree.map(lambda x: by_row(x, "batch"), (draft_tokens, noise, temperature, ban))
        q = draft_log_q if draft_log_q is None else by_row(draft_log_q, "batch", None,
                                                          "vocab" if draft_vocab is None else None)
        tokens, noises, temperatures, bans = rows
        split = jax.shard_map(partial(run, implementation=policy.kernels, axis=_axes(scores[2])),
                              in_specs=(scores, tokens, q, noises, temperatures, PartitionSpec(),
                                        bans),
                              out_specs=Verdict(*(PartitionSpec(scores[0]),) * 4), check_vma=False)
        return split(*args)

    return _or_reference(policy.kernels, kernel, reference)
