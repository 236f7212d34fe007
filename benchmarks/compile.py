"""Compile every kernel at every real shape, and `jspec.rollout` at Qwen3-8B's, for chips that are
not here.

    pip install -e '.[aot]' && python -m benchmarks.compile --json benchmarks/results/compile.json

Runs on a CPU. The real compilers run: libtpu's for TPU v5e, v5p, v6e and tpu7x, and XLA's with
Mosaic GPU and ptxas for sm_90. Recorded are, for a kernel, the vector memory or shared memory,
registers and spills it takes, and for a rollout the memory a device needs and what its decode loops
do (compiled_text.py): a collective in them that crosses the shards of the batch, or a copy of a
pool of keys and values, is a failure. `experts` are a block of Qwen3-30B-A3B's: one that counts
more than EXCESS times the useful operations, or copies its weights, is a failure on a TPU.
`refused` is a shape that an implementation does not take: the reference runs there. Exit code 1 if
anything else does not compile, or does so badly. libtpu lets one process in at a time. Lines about
nvdisasm, which the packages lack, mean nothing. `--what step` compiles all programs of a training
step (`jspec/step.py`) and records the memory a device needs for each.

A rollout is of a heavy tail: 256 sequences in 64 slots a shard of the batch, and a schedule of k,
so that its chain has two loops. Every chip compiles it with `mtp`, and one of them with each of the
other drafters (`--drafts` compiles those it names for all of them).
"""

import argparse
import atexit
import dataclasses
import itertools
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from jspec.scale.topologies import ENVIRONMENT

# read by JAX, libtpu and Mosaic when they start, so it comes before them
os.environ.update(ENVIRONMENT, MOSAIC_GPU_DUMP_PTXAS="1",
                  MOSAIC_GPU_DUMP_TO=tempfile.mkdtemp(prefix="jspec-compile-"))

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from rich.table import Table

import jspec
from benchmarks import compiled_text, kernel_cases, measure
from benchmarks.absent_chips import GPU, POD, TPUS, compiled, devices, on, timed
from benchmarks.options import open_results, program
from benchmarks.shapes import SHAPES
from jspec.config import load_config
from jspec.console import PlainConsole
from jspec.hlo import instructions
from jspec.model import abstract_policy
from jspec.model.experts import compute as of_experts
from jspec.model.pool import BLOCK
from jspec.profiling import memory_of
from jspec.rl.state import TrainState, state_specs
from jspec.rl.update_settings import UpdateSettings
from jspec.sharding import make_mesh
from jspec.step import Step, declare
from jspec.step import compiled as compile_step
from pallas_kernels.implementation import Implementation
from pallas_kernels.rejection_sampling import rejection_sampling
from pallas_kernels.rejection_sampling import shapes as sampling_shapes
from pallas_kernels.verify_attention import shapes as attention_shapes
from pallas_kernels.verify_attention import verify_attention

atexit.register(shutil.rmtree, os.environ["MOSAIC_GPU_DUMP_TO"], ignore_errors=True)

POD_MESH = load_config(Path(__file__).parent.parent / "configs" / "qwen3-8b-pod.yaml").mesh
# fsdp, tensor
MESHES = {**dict.fromkeys(TPUS, (2, 4)), GPU: (1, 1), POD: (POD_MESH.fsdp, POD_MESH.tensor)}
DRAFTS: dict[str, dict[str, Any]] = {
    "mtp": {}, "eagle3": {"vocab": range(32768)}, "peagle": {"vocab": range(32768)},
    "dflash": {"layers": 5, "window": 2048}, "dspark": {"vocab": range(32768)}, "self": {},
    "self, 4 bits": {"bits": 4}, "suffix": {}, "ngram": {}}
"""Options of the drafters that rollouts are compiled with; what follows a comma is no part of the
drafter's name."""
ROLLOUTS = [(GPU, "qwen3-8b", "mtp", False), ("v5e", "qwen3-8b", "mtp", False),
            ("v5e", "llama-3.2-1b", "mtp", False), ("v5p", "qwen3-8b", "mtp", False),
            ("v6e", "qwen3-8b", "mtp", False), ("tpu7x", "qwen3-8b", "mtp", False),
            ("v5e", "qwen3-8b", "mtp", True), (GPU, "qwen3-8b", "eagle3", False),
            (GPU, "qwen3-8b", "dspark", False), ("v6e", "qwen3-8b", "dspark", False),
            ("v5p", "qwen3-8b", "dflash", False), ("v6e", "qwen3-8b", "suffix", False),
            ("tpu7x", "qwen3-8b", "ngram", False), ("v5p", "qwen3-8b", "self", False),
            ("v5e", "qwen3-8b", "self, 4 bits", False), (POD, "qwen3-8b", "mtp", False)]
"""What is compiled if nothing is said: chip, shape (the second has heads of 64), draft, and whether
rows are paused."""
PROMPTS, LENGTH, GROUP, SLOTS, CAP = 16, 128, 16, 64, 1024  # slots of each shard of the batch
KV_TOKENS = SLOTS * (LENGTH + CAP) * 6 // 10  # of each shard, where rows are paused
SCHEDULE = ((16, 3), (SLOTS, 1))
EXPERTS = {"count": 128, "top_k": 8, "width": 2048, "hidden": 768}
EXPERT_ROWS = {"forward": (8, 64), "gradient": (4096,)}
EXCESS = 1.1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", nargs="+", choices=[*TPUS, GPU], default=[*TPUS, GPU])
    parser.add_argument("--what", nargs="+", choices=["kernels", "experts", "rollout", "step"],
                        default=["kernels", "experts", "rollout"])
    parser.add_argument("--shape", default="", help="only shapes whose name contains this")
    parser.add_argument("--drafts", nargs="+", choices=DRAFTS,
                        help="of the rollouts, for every chip and shape")
    parser.add_argument("--pausing", action="store_true",
                        help="with --drafts: in a pool that makes rows pause")
    parser.add_argument("--layers", type=int, metavar="N",
                        help="of the rollouts' policies, instead of all of them")
    parser.add_argument("--json", help="write the result there")
    args = parser.parse_args(arguments)
    open_results(args)
    return args


def kernels(chip: str, wanted: str) -> Any:
    """(kernel, shape's name, rule, jitted function, arguments) of everything that is compiled for
    one device."""
    implementation = Implementation("gpu" if chip == GPU else "tpu")
    device = devices(chip)[0]
    mesh = jax.sharding.Mesh([device], ("tensor",))
    for shape in sampling_shapes.SHAPES:
        for rule in kernel_cases.CASES:
            if wanted not in shape.name or (rule.endswith("drafts") and not shape.k):
                continue
            args = jax.eval_shape(partial(kernel_cases.judging, shape, rule), jax.random.key(0))
            # as the head makes them: [B * (K + 1), V]
            args["logits"] = jax.eval_shape(lambda x: x.reshape(-1, x.shape[-1]), args["logits"])
            args["ban"] = jax.ShapeDtypeStruct((shape.batch, shape.k + 1), bool)
            names = tuple(args)

            def judge(*values, names=names, shape=shape,
                      axis=("tensor",) if shape.shards > 1 else None):
                values = dict(zip(names, values, strict=True))
                values["logits"] = values["logits"].reshape(shape.batch, shape.k + 1, -1)
                return rejection_sampling(**values, banned_tokens=kernel_cases.STOPS,
                                          implementation=implementation, axis=axis)

            if shape.shards > 1:  # one shard of a vocabulary that is in parts
                split = {"logits": PartitionSpec(None, "tensor"),
                         "draft_log_q": PartitionSpec(None, None, "tensor")}
                parts = tuple(split.get(name, PartitionSpec()) for name in names)
                judge = jax.shard_map(judge, mesh=mesh, in_specs=parts, out_specs=PartitionSpec(),
                                      check_vma=False)
            where = (NamedSharding(mesh, PartitionSpec()) if shape.shards > 1
                     else SingleDeviceSharding(device))
            yield "rejection_sampling", shape.name, rule, jax.jit(judge), on(where,
                                                                             tuple(args.values()))
    for shape in attention_shapes.SHAPES:
        if wanted in shape.name:
            lengths = jnp.zeros(shape.batch, jnp.int32)
            args = jax.eval_shape(partial(kernel_cases.attending, shape, lengths),
                                  jax.random.key(0))
            attend = jax.jit(partial(verify_attention, **shape.reach,
                                     implementation=implementation), donate_argnums=(3, 4))
            yield "verify_attention", shape.name, None, attend, on(SingleDeviceSharding(device),
                                                                   args)


def experts(chip: str, what: str, rows: int) -> dict[str, Any]:
    """A row of a block of experts on one device: its operations over those that are useful, and
    what copies its weights."""
    count, top_k, width, hidden = EXPERTS.values()
    matrices = {"expert_gate_up": (count, 2, hidden, width), "expert_down": (count, width, hidden)}
    shapes = ({name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in matrices.items()},
              jax.ShapeDtypeStruct((rows, width), jnp.bfloat16),
              jax.ShapeDtypeStruct((rows, top_k), jnp.uint8),
              jax.ShapeDtypeStruct((rows, top_k), jnp.float32))
    useful = 6 * rows * top_k * width * hidden * (1 if what == "forward" else 3)
    function = of_experts if what == "forward" else jax.grad(
        lambda w, x, routes, gates: of_experts(w, x, routes, gates).sum(), (0, 1, 3))
    begin = time.perf_counter()
    try:
        made = compiled(jax.jit(function), on(SingleDeviceSharding(devices(chip)[0]), shapes), chip)
    except Exception as error:  # a compiler's: this is what the run is there to find
        return {"failed": str(error)[:500]}
    found = instructions(made.as_text())
    # the gradients of the weights are as large, and are what the kernels are there to make
    copied = [text for text in compiled_text.copied(found, matrices.values())
              if "custom-call" not in text]
    row = {"seconds": round(time.perf_counter() - begin, 2), **memory_of(made),
           "weights_copied": copied}
    if chip == GPU:  # its compiler counts nothing
        return row
    excess = round(made.cost_analysis()["flops"] / useful, 3)
    row["operations_over_useful"] = excess
    if excess > EXCESS or copied:
        row["failed"] = (f"{excess} times the useful operations; copied: "
                         f"{'; '.join(copied)}")[:2000]
    return row


def prompts_of(shards: int) -> int:
    """PROMPTS on two shards of the batch, and as many to each where there are more: their slots are
    fewer than rows."""
    return PROMPTS * max(shards // 2, 1)


def declared(mesh: Mesh, shape: str, name: str, pausing: bool = False, layers: int | None = None
             ) -> tuple[Step, TrainState, Any]:
    """(a step, its state, its prompts) of one of SHAPES and one of DRAFTS on a mesh, which is the
    current one: shapes with shardings, kernels asked for by name."""
    config, shards = SHAPES[shape], mesh.shape["fsdp"]
    config = dataclasses.replace(config, num_layers=layers or config.num_layers)
    policy, drafter = abstract_policy(config,
                                      "bfloat16"), getattr(jspec.drafts, name.partition(",")[0])
    draft = jax.eval_shape(lambda p: drafter(p, jax.random.key(0), **DRAFTS[name]), policy)
    batch = jax.eval_shape(lambda: jspec.PromptBatch.from_tokens(
        [[1] * LENGTH] * prompts_of(shards), group_size=GROUP, seed=0, buckets=(LENGTH,)))
    # one width: the update holds a loop for each, and minutes go into one
    settings = UpdateSettings(remat=True, widths=(CAP,), micro_batch=2 * GROUP)
    specs = state_specs(policy, draft, settings)
    step = declare(specs, settings, sampling=jspec.Sampling(max_new_tokens=CAP, stop_tokens=(1,)),
                   speculation=jspec.Speculation(k=SCHEDULE, kernels="pallas"),
                   batching=jspec.Batching(slots=SLOTS * shards,
                                           kv_tokens=KV_TOKENS * shards if pausing else None))
    return step, specs, on(NamedSharding(mesh, PartitionSpec()), batch)


def rollout(chip: str, shape: str, name: str, pausing: bool = False,
            layers: int | None = None) -> dict[str, Any]:
    """A row of a step's rollout, from the policy in its training layout."""
    config, (fsdp, tensor) = SHAPES[shape], MESHES[chip]
    mesh = make_mesh(1, fsdp, tensor, devices=devices(chip))
    with jax.set_mesh(mesh):
        step, specs, prompts = declared(mesh, shape, name, pausing, layers)
        block = config.num_kv_heads // tensor, BLOCK, config.head_dim
        shards = [device // tensor for device in range(fsdp * tensor)]
        row = timed(chip, step.rollout,
                    (specs.policy, specs.draft, prompts, step.sampling, SCHEDULE),
                    partial(compiled_text.read, block=block, shards=shards))
    return row if "failed" in row else judged(row, block, pausing)


def whole_step(chip: str, shape: str, name: str,
               layers: int | None = None) -> Iterator[dict[str, Any]]:
    """A row of each program of a step: what it needs of a device's memory."""
    mesh = make_mesh(1, *MESHES[chip], devices=devices(chip))
    found: dict[str, dict[str, Any]] = {}

    def compile(part: str, function: Any, arguments: Any) -> Any:
        begin = time.perf_counter()
        found[part] = {"failed": "it did not compile"}
        made = compiled(function, arguments, chip)
        found[part] = {"seconds": round(time.perf_counter() - begin, 2), **memory_of(made)}
        return made

    with jax.set_mesh(mesh):
        step, specs, prompts = declared(mesh, shape, name, layers=layers)
        try:
            compile_step(step, specs, None, prompts, SCHEDULE, compile)
        except Exception as error:  # a compiler's: this is what the run is there to find
            found[list(found)[-1]]["failed"] = str(error)[:500]
    for part, row in found.items():
        yield {"program": part, **row}


def judged(row: dict[str, Any], block: tuple[int, ...], pausing: bool) -> dict[str, Any]:
    """A rollout's row, failed where its loops do what they must not, or are not those asked for.
    Where rows are paused there is a pool in host memory too, and what is moved at a time is a
    block."""
    wrong = [f"{what} in a loop: {'; '.join(row[what])}"
             for what in ("crossing", "gathered", "copied") if row[what]]
    if row["loops"] != sorted(dict(SCHEDULE), reverse=True) or len(row["pools"]) <= pausing:
        wrong.append(f"its loops, of {row['loops']} rows, or its pools, {row['pools']}, are not "
                     "those asked for")
    if (bool(row["moved"]) != pausing
        or any(math.prod(shape) > math.prod(block) for shape in row["moved"])):
        wrong.append(f"moved to host memory at a time: {row['moved']}")
    return {**row, "failed": ". ".join(wrong)[:2000]} if wrong else row


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if "kernels" in args.what:
        for chip in (chip for chip in args.chip if chip != POD):  # one device of it is one of v5p
            for kernel, shape, rule, function, values in kernels(chip, args.shape):
                yield {"chip": chip, "what": kernel, "shape": shape, "rule": rule,
                       **timed(chip, function, values)}
    if "experts" in args.what and args.shape in "qwen3-30b-a3b":
        for chip in (chip for chip in args.chip if chip != POD):
            for what, rows in ((what, n) for what, many in EXPERT_ROWS.items() for n in many):
                yield {"chip": chip, "what": "experts", "shape": "qwen3-30b-a3b",
                       "rule": f"{what}, {rows} rows", **experts(chip, what, rows)}
    if "rollout" in args.what:
        for chip, shape, draft, pausing in chosen(args):
            fsdp, tensor = MESHES[chip]
            yield {"chip": chip, "what": "jspec.rollout", "shape": shape, "rule": None,
                   "draft": draft,
                   "mesh": {"fsdp": fsdp, "tensor": tensor}, "sequences": prompts_of(fsdp) * GROUP,
                   "slots": SLOTS * fsdp, "kv_tokens": KV_TOKENS * fsdp if pausing else None,
                   "max_new_tokens": CAP, "k": SCHEDULE,
                   "layers": args.layers, **rollout(chip, shape, draft, pausing, args.layers)}
    if "step" in args.what:
        for chip, shape, draft, _ in chosen(args):
            for row in whole_step(chip, shape, draft, args.layers):
                yield {"chip": chip, "what": "step", "shape": shape, "rule": None, "draft": draft,
                       "layers": args.layers, **row}


def chosen(args: argparse.Namespace) -> Iterator[tuple[str, str, str, bool]]:
    """(chip, shape, draft, whether rows are paused) of what is asked for."""
    wanted = ROLLOUTS
    if args.drafts:
        shapes = dict.fromkeys(shape for _, shape, *_ in ROLLOUTS)
        wanted = itertools.product(args.chip, shapes, args.drafts, [args.pausing])
    return ((chip, shape, *rest)
            for chip, shape, *rest in wanted if chip in args.chip and args.shape in shape)


def show(found: list[dict[str, Any]]) -> None:
    table = Table("chip", "what", "compiled", "refused", "failed", "seconds", "on-chip KiB",
                  "registers", "spills")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault((row["chip"], row["what"]), []).append(row)
    for (chip, what), group in groups.items():
        good = [row for row in group if "seconds" in row and "failed" not in row]
        most = {name: max((row.get(name, 0) for row in good), default=0)
                for name in ("vmem_bytes", "smem_bytes", "registers", "spill_bytes")}
        table.add_row(chip, what, str(len(good)),
                      *(str(sum(name in row for row in group)) for name in ("refused", "failed")),
                      f"{sum(row['seconds'] for row in good):.0f}",
                      f"{max(most['vmem_bytes'], most['smem_bytes']) / 1024:,.0f}",
                      *(str(most[name]) if chip == GPU else ""
                        for name in ("registers", "spill_bytes")))
    PlainConsole().print(table)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    found = []
    for row in rows(args):
        found.append(row)
        measure.write_json(args.json, measure.report(found))  # of an hour nothing is lost
        if "failed" in row:
            print(f"{row['chip']} {row['what']} {row['shape']} "
                  f"{row['rule'] or row.get('draft', '')}: {row['failed']}", file=sys.stderr)
    if not found:
        print(f"nothing to compile: no shape has {args.shape!r} in its name, or --what "
              f"{' '.join(args.what)} has no program for {' '.join(args.chip)}", file=sys.stderr)
        return 2
    show(found)
    return int(any("failed" in row for row in found))


if __name__ == "__main__":
    program(main)
