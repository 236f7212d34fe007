"""Time a mixture of experts against the dense product of the parameters that its rows use.

    python -m benchmarks.experts --json benchmarks/results/experts_cpu.json

The block has 64 experts, 4 a row. `decode` is its forward with 8 rows, as in a cycle; `update`
forward and backward with a micro-batch's. Beside each stands a dense feed-forward of as many
parameters as there are in the experts that those rows use: `dense`, with the same rows in decoding
(which reads the same bytes) and, in the update, with as many as come to the same operations. What
`ragged_dot` takes, which computes all experts for all rows on a CPU, is timed in decoding.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from benchmarks import measure
from benchmarks.options import open_results, program
from jspec.console import PlainConsole
from jspec.model import experts
from jspec.model.layers import mlp

COUNT, TOP_K, WIDTH, HIDDEN = 64, 4, 1024, 512
ROWS = {"decode": 8, "update": 1024}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="default: 15")
    parser.add_argument("--tiny", action="store_true", help="small shapes: checks the script only")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    args = parser.parse_args(arguments)
    open_results(args)
    return args


def block(rows: int, width: int, hidden: int) -> tuple[Any, ...]:
    """Weights of the block, and x, routes and gates of so many rows: every row its own experts."""
    keys = jax.random.split(jax.random.key(0), 3)
    w = {"expert_gate_up": jax.random.normal(keys[0], (COUNT, 2, hidden, width)) / width**0.5,
         "expert_down": jax.random.normal(keys[1], (COUNT, width, hidden)) / hidden**0.5}
    rng = np.random.default_rng(0)
    routes = np.stack([rng.permutation(COUNT)[:TOP_K] for _ in range(rows)]).astype(np.uint8)
    return (w, jax.random.normal(keys[2], (rows, width)), jnp.asarray(routes),
            jnp.full((rows, TOP_K), 1 / TOP_K))


def dense(rows: int, parts: int, width: int, hidden: int) -> tuple[Any, jax.Array]:
    """Weights of a dense feed-forward of `parts` experts' parameters, and rows."""
    keys = jax.random.split(jax.random.key(1), 3)
    w = {"gate_up": jax.random.normal(keys[0], (2, parts * hidden, width)) / width**0.5,
         "down": jax.random.normal(keys[1], (width, parts * hidden)) / (parts * hidden)**0.5}
    return w, jax.random.normal(keys[2], (rows, width))


def ragged(w: Any, x: jax.Array, routes: jax.Array) -> jax.Array:
    """The products alone, as `lax.ragged_dot` makes them of sorted rows."""
    sizes = jnp.bincount(routes.reshape(-1).astype(jnp.int32), length=COUNT).astype(jnp.int32)
    flat = w["expert_gate_up"].reshape(COUNT, -1, x.shape[1]).swapaxes(1, 2)
    y = jax.lax.ragged_dot(jnp.repeat(x, TOP_K, axis=0), flat, sizes)
    gate, up = jnp.split(y, 2, axis=1)
    return jax.lax.ragged_dot(jax.nn.silu(gate) * up, w["expert_down"].swapaxes(1, 2), sizes)


def programs(what: str, width: int, hidden: int, rows: int
             ) -> tuple[dict[str, Callable[[], Any]], int]:
    """What is timed, and how many experts the rows use."""
    w, x, routes, gates = block(rows, width, hidden)
    used = len(np.unique(routes))
    if what == "decode":
        w_dense, x_dense = dense(rows, used, width, hidden)
        return {"experts": partial(jax.jit(experts.compute), w, x, routes, gates),
                "dense": partial(jax.jit(mlp), w_dense, x_dense),
                "ragged_dot": partial(jax.jit(ragged), w, x, routes)}, used
    w_dense, x_dense = dense(rows * TOP_K // used, used, width, hidden)
    learned = jax.jit(jax.grad(lambda w, x: jnp.square(
        experts.compute(w, x, routes, gates)).sum(), (0, 1)))
    plain = jax.jit(jax.grad(lambda w, x: jnp.square(mlp(w, x)).sum(), (0, 1)))
    return {"experts": partial(learned, w, x), "dense": partial(plain, w_dense, x_dense)}, used


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    width, hidden = (32, 16) if args.tiny else (WIDTH, HIDDEN)
    found, table = [], Table("what", "rows", "experts used", "ms", "dense, ms", "times", "ragged")
    for what, rows in ROWS.items():
        made, used = programs(what, width, hidden, rows // 8 if args.tiny else rows)
        taken = measure.interleaved(made, args.rounds)
        ms = {name: 1e3 * measure.median(seconds) for name, seconds in taken.items()}
        least = {name: 1e3 * min(seconds) for name, seconds in taken.items()}
        found.append({"what": what, "rows": rows, "experts_used": used, "ms": ms, "least_ms": least,
                      "times_dense": ms["experts"] / ms["dense"]})
        other = f"{ms['ragged_dot'] / ms['dense']:.3g}x" if "ragged_dot" in ms else ""
        table.add_row(what, str(rows), str(used), f"{ms['experts']:.4g}", f"{ms['dense']:.4g}",
                      f"{found[-1]['times_dense']:.3g}x", other)
    PlainConsole().print(table)
    measure.write_json(args.json, measure.report(found, experts=COUNT, top_k=TOP_K, width=width,
                                                 hidden=hidden, dtype="float32"))
    return 0


if __name__ == "__main__":
    program(main)
