"""Check every kernel on this machine's chip, then time it: against the reference under XLA, and
against counted floors.

    python -m benchmarks.kernels --json benchmarks/results/kernels.json
    python -m benchmarks.kernels --tiny

`copy` is the floor's bandwidth: of a plain copy, measured in this run. `of floor` is the least time
that the kernel's bytes take at that bandwidth, over its time; for the coupled rule, where hashing
may take longer than reading, it is the larger of that and the measured time of the hash alone.
Bytes are, for `rejection_sampling`, the logits once, and with sampled drafts one row a sequence of
the target's and the draft's as well; for `verify_attention`, keys and values of the cached
positions. `xla` is the reference, `sdpa` is `jax.nn.dot_product_attention`, which does not write
the cache and is given it in the layout it likes. Kernels run many times in one program, and
programs in turn; medians are shown.

Nothing is timed that is not right first: verdicts against the reference's (equal up to ties: a few
rows), noise against the reference's exactly, attention against the reference's, its caches and a
row's independence of the others bit for bit. `--tiny` takes small shapes; on a CPU the TPU's
kernels are interpreted, which checks the script and not the speed.
"""

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from benchmarks import kernel_cases, measure
from benchmarks.options import open_results, program
from jspec.console import PlainConsole
from jspec.kernels import choose, picked
from pallas_kernels import noise as noise_lib
from pallas_kernels.implementation import REFERENCE, Implementation
from pallas_kernels.rejection_sampling import rejection_sampling
from pallas_kernels.rejection_sampling import shapes as sampling_shapes
from pallas_kernels.verify_attention import shapes as attention_shapes
from pallas_kernels.verify_attention import verify_attention

TINY_SAMPLING = (sampling_shapes.Shape("tiny", 1024, 4, 3),
                 sampling_shapes.Shape("tiny", 1024, 2, 1, "bfloat16"))
TINY_ATTENTION = (attention_shapes.Shape("tiny", 4, 2, 64, 3, 4, 256), attention_shapes.Shape(
    "tiny", 4, 2, 64, 3, 1, 256, "float32", window=100))
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02}
TIES = 0.02  # share of rows whose verdict rounding may change; of few rows none


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--kernel", nargs="+", choices=["rejection_sampling", "verify_attention"],
                        default=["rejection_sampling", "verify_attention"])
    parser.add_argument("--shape", default="", help="only shapes whose name contains this")
    parser.add_argument("--repeat", type=positive,
                        help="runs in one program; default 20, with --tiny 1")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--json", help="write the result there")
    args = parser.parse_args(arguments)
    open_results(args)
    args.repeat = args.repeat or (1 if args.tiny else 20)
    if jax.default_backend() == "cpu" and not args.tiny:
        parser.error("a CPU only interprets the kernels, and real shapes would take hours; add "
                     "--tiny")
    args.cases = [case for case in every_case(args.tiny)
                  if case[0] in args.kernel and args.shape in case[1].name]
    if not args.cases:
        parser.error(f"no shape of {' or '.join(args.kernel)} has {args.shape!r} in its name")
    return args


def every_case(tiny: bool) -> list[tuple[str, Any, str | None]]:
    """(kernel, shape, rule) of all that can be timed."""
    sampling = TINY_SAMPLING if tiny else sampling_shapes.SHAPES
    return [("rejection_sampling", shape, rule) for shape in sampling for rule in kernel_cases.CASES
            if shape.k or not rule.endswith("drafts")] + [
        ("verify_attention", shape, None)
        for shape in (TINY_ATTENTION if tiny else attention_shapes.SHAPES)]


def wrong(name: str, why: str) -> SystemExit:
    return SystemExit(f"{name} is wrong on this device and was not timed: {why}")


def _nothing(x: jax.Array) -> jax.Array:
    """Zero, but no compiler can know: makes one run wait for the one before."""
    return (jnp.max(x) > 1e30).astype(x.dtype)


def repeated(function: Any, args: tuple[Any, ...], again: Any, times: int) -> Any:
    """A program of `times` runs, each on `again(args, result)` of the run before."""
    @jax.jit
    def program(args):
        return jax.lax.fori_loop(0, times, lambda _, a: again(a, function(*a)), args)

    return partial(program, args)


# rejection_sampling


def judge(implementation: Implementation, args: dict[str, Any]) -> Any:
    banned = kernel_cases.STOPS if "ban" in args else ()
    return rejection_sampling(**args, banned_tokens=banned, implementation=implementation)


def check_verdicts(name: str, implementation: Implementation, args: dict[str, Any]) -> None:
    """Raise SystemExit unless verdicts of greedy and sampled rows, some with bans, are the
    reference's."""
    rows = len(args["temperature"])
    args = {**args, "temperature": jnp.asarray(np.resize([1.0, 0.0, 0.7, 1.0], rows), jnp.float32),
            "ban": jnp.arange(args["logits"].shape[1]) % 2 == jnp.arange(rows)[:, None] % 2}
    got, want = (jax.device_get(jax.jit(partial(judge, i))(args))
                 for i in (implementation, REFERENCE))
    emitted = np.arange(want.tokens.shape[1]) <= want.accepted[:, None]
    same = (got.accepted == want.accepted) & (~emitted | (got.tokens == want.tokens)).all(1)
    if (~same).sum() > (TIES * rows if rows >= 16 else 0):
        raise wrong(name, f"{(~same).sum()} of {rows} rows differ from the reference")
    for field in ("logprobs", "entropy"):
        keep = same[:, None] & (emitted | (field == "entropy"))
        gap = np.abs(getattr(got, field) - getattr(want, field))[keep].max(initial=0)
        if not gap < 1e-3:
            raise wrong(name, f"{field} are off by {gap}")


def check_noise(name: str, implementation: Implementation, args: dict[str, Any]) -> None:
    """Raise SystemExit unless tokens of a flat distribution, which noise alone decides, are the
    reference's."""
    flat = {**args, "logits": jnp.zeros_like(args["logits"])}
    got, want = (jax.device_get(jax.jit(partial(judge, i))(flat).tokens)
                 for i in (implementation, REFERENCE))
    if not (got == want).all():
        raise wrong(name,
                    f"{(got != want).sum()} of {got.size} tokens of a flat distribution are others")


def hash_alone(keys: jax.Array, vocab: int) -> jax.Array:
    """The noise of every row and id, reduced to one number a row as soon as it is made."""
    return noise_lib.random_bits(keys[..., None, :], jnp.arange(vocab)).max(-1)


def time_sampling(shape: Any, rule: str, implementation: Implementation, bandwidth: float,
                  args: argparse.Namespace) -> dict[str, Any]:
    name, vocab = f"rejection_sampling {shape.name} {rule}", shape.vocab // shape.shards
    case = jax.jit(partial(kernel_cases.judging, shape, rule))(jax.random.key(1))
    check_verdicts(name, implementation, case)
    if rule == "coupled":
        check_noise(name, implementation, case)

    def again(a, verdict):
        return ({**a[0], "temperature": a[0]["temperature"] + _nothing(verdict.entropy)},)

    programs = {label: repeated(partial(judge, i), (case,), again, args.repeat)
                for label, i in (("kernel", implementation), ("xla", REFERENCE))}
    if rule == "coupled":
        programs["hash"] = repeated(partial(hash_alone, vocab=vocab), (case["noise"].keys,),
                                    lambda a, out: (a[0] ^ (out[..., None]
                                                            == 0).astype(jnp.uint32),), args.repeat)
    seconds = {k: measure.median(v) / args.repeat
               for k, v in measure.interleaved(programs, args.rounds).items()}
    counted = shape.logits_bytes
    if rule.endswith("drafts"):
        counted += shape.batch * vocab * (jnp.dtype(shape.dtype).itemsize + 4)
    floor = max(counted / bandwidth, seconds.get("hash", 0.0))
    return {"kernel": "rejection_sampling", "shape": shape.name, "rule": rule, "bytes": counted,
            "seconds": seconds,
            "of_floor": floor / seconds["kernel"], "over_xla": seconds["xla"] / seconds["kernel"]}


# verify_attention


def check_attention(name: str, implementation: Implementation, shape: Any,
                    case: tuple[jax.Array, ...]) -> None:
    """Raise SystemExit unless output and caches are the reference's and a row's result is its own,
    bit for bit."""
    run, reference = (jax.jit(partial(verify_attention, **shape.reach, implementation=i))
                      for i in (implementation, REFERENCE))
    lengths = jnp.asarray(np.random.default_rng(0).integers(0, shape.size - shape.t + 1,
                                                            shape.batch), jnp.int32)
    # one empty row and one full one, neither of them the row that is compared with itself in other
    # company
    case = (*case[:6], lengths.at[shape.batch // 2].set(0).at[-1].set(shape.size - shape.t))
    got, want = run(*case), reference(*case)
    gap = float(jnp.abs(got[0].astype(jnp.float32) - want[0].astype(jnp.float32)).max())
    if not gap < TOLERANCE[shape.dtype]:
        raise wrong(name, f"the output is off by {gap}")
    table, held = case[5], case[6][:, None] + shape.t
    position = jnp.arange(table.shape[1] * case[3].shape[2]).reshape(table.shape[1], -1)
    # by row and block, of its heads and positions
    written = (position < held[..., None])[:, :, None, :, None]
    if not all(bool(jnp.all(jnp.where(written, a[table] == b[table], True)))
               for a, b in zip(got[1:], want[1:], strict=True)):
        raise wrong(name, "the pool does not hold what was written")
    # the same row and its blocks in other company: of equal queries, and of its own length
    others = [*(x.at[1:].set(x[:1]) for x in case[:3]), *case[3:6], case[6].at[1:].set(case[6][0])]
    if not bool(jnp.all(run(*others)[0][0] == got[0][0])):
        raise wrong(name, "a row depends on the others")


def runs(label: str, program: Any) -> bool:
    """Whether a peer takes this shape on this machine; says why not."""
    try:
        jax.block_until_ready(program())
    except Exception as error:  # a peer's own, of whatever kind
        print(f"{label} does not run: {str(error).splitlines()[0]}")
        return False
    return True


def sdpa(implementation: str, shape: Any, q: jax.Array, k: jax.Array, v: jax.Array,
         lengths: jax.Array) -> jax.Array:
    """`jax.nn.dot_product_attention` of all new positions against caches [B, S, H_kv, D], new ones
    included."""
    visible = jnp.arange(k.shape[1]) <= lengths[:, None, None] + jnp.arange(shape.t)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=visible[:, None],
                                        implementation=implementation)


def time_attention(shape: Any, implementation: Implementation, bandwidth: float,
                   args: argparse.Namespace) -> dict[str, Any]:
    name = f"verify_attention {shape.name}"
    length = min(shape.size - shape.t, 4096)
    lengths = jnp.full(shape.batch, length, jnp.int32)
    case = jax.jit(partial(kernel_cases.attending, shape))(lengths, jax.random.key(1))
    check_attention(name, implementation, shape, case)

    def again(a, result):
        return (a[0] + _nothing(result[0]), *a[1:3], *result[1:], *a[5:])

    programs = {label: repeated(partial(verify_attention, **shape.reach, implementation=i),
                                case, again, args.repeat)
                for label, i in (("kernel", implementation), ("xla", REFERENCE))}
    if shape.window is None:
        # a peer has every row's cache in one piece
        q, table = case[0], case[5]
        caches = [x[table].transpose(0, 1, 3, 2, 4).reshape(shape.batch, -1, *x.shape[1::2])
                  for x in case[3:5]]
        for peer in ("xla", "cudnn"):
            program = repeated(partial(sdpa, peer, shape), (q, *caches, lengths),
                               lambda a, out: (a[0] + _nothing(out), *a[1:]), args.repeat)
            if runs(f"{name}: sdpa {peer}", program):
                programs[f"sdpa {peer}"] = program
    seconds = {k: measure.median(v) / args.repeat
               for k, v in measure.interleaved(programs, args.rounds).items()}
    counted = shape.kv_bytes(length if shape.window is None else min(length, shape.window))
    return {"kernel": "verify_attention", "shape": shape.name, "rule": None, "length": length,
            "bytes": counted,
            "seconds": seconds, "of_floor": counted / bandwidth / seconds["kernel"],
            "over_xla": seconds["xla"] / seconds["kernel"]}


def show(rows: list[dict[str, Any]], bandwidth: float) -> None:
    table = Table("kernel", "shape", "rule", "us", "xla us", "others us", "of floor", "over xla",
                  title=f"copy: {bandwidth / 1e9:,.0f} GB/s")
    for row in rows:
        if "refused" in row:
            table.add_row(row["kernel"], row["shape"], row["rule"] or "",
                          f"refused: {row['refused']}")
            continue
        us = {k: f"{1e6 * v:,.0f}" for k, v in row["seconds"].items()}
        rest = ", ".join(f"{k} {v}" for k, v in us.items() if k not in ("kernel", "xla"))
        table.add_row(row["kernel"], row["shape"], row["rule"] or "", us["kernel"], us["xla"], rest,
                      f"{row['of_floor']:.0%}", f"{row['over_xla']:.2f}x")
    PlainConsole(width=160).print(table)


def measured(args: argparse.Namespace, implementation: Implementation, bandwidth: float) -> Any:
    """One row after the other. A shape that the kernel refuses is a row that says so."""
    for kernel, shape, rule in args.cases:
        try:
            if rule:
                yield time_sampling(shape, rule, implementation, bandwidth, args)
            else:
                yield time_attention(shape, implementation, bandwidth, args)
        except NotImplementedError as refusal:
            yield {"kernel": kernel, "shape": shape.name, "rule": rule, "refused": str(refusal)}


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    implementation = choose("pallas")
    bandwidth = measure.copy_bandwidth(2**22 if args.tiny else None)
    print(f"{picked('pallas')} on {jax.devices()[0].device_kind}")
    rows = []
    try:
        for row in measured(args, implementation, bandwidth):
            rows.append(row)
    finally:  # what was measured before something went wrong is kept
        show(rows, bandwidth)
        measure.write_json(args.json, measure.report(rows, copy_gb_per_s=bandwidth / 1e9,
                                                     kernels=picked("pallas")))
    return 0


if __name__ == "__main__":
    program(main)
