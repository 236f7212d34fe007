"""Time `jspec.rollout`: tokens per second, milliseconds of a cycle and of its draft, share of the
memory floor.

    python -m benchmarks.rollout --shape smollm2-135m --batch 1 8 32
    python -m benchmarks.rollout --shape smollm2-135m --batch 8 --drafts mtp --k 1 3 7 --acceptance
    0.8,0.7,0.6 python -m benchmarks.rollout --shape qwen3-8b --batch 1 8 64 --prompt-tokens 2048
    --drafts ngram mtp --k 1 3 7 python -m benchmarks.rollout --weights smollm2-135m-instruct
    --prompt repeat --batch 1 --drafts ngram --k 3

Weights are random unless `--weights` names a model. Every row has a prompt of its own and runs to
--new-tokens. The first line of each batch size is autoregressive; speed-ups are over it. With a
draft, a drafter that costs nothing ("synthetic") is timed at each k as well: its cycle is the
verification alone, and `draft ms` is what the real drafter adds to it. `accept ms` is the verdict
over given logits, as a program of its own. `--acceptance` sets the acceptance by position by hand,
whatever the drafter (see synthetic.py). `floor` is the share of the memory floor: bytes of weights
and live keys and values that a cycle must read, over the bandwidth of a plain copy measured in this
run, over the cycle's time. All are medians of runs taken in turn.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from rich.table import Table

import jspec
import jspec.hub
from benchmarks import kernel_cases, measure, parts, synthetic
from benchmarks.options import KERNELS_HELP, PLAIN, add_listed, drafter, open_results, split_options
from benchmarks.shapes import SHAPES
from jspec import cli
from jspec.choices import DTYPES, KERNELS, RULES
from jspec.drafts import Draft, find
from jspec.errors import InputError
from jspec.kernels import choose, judge, picked
from jspec.model import Policy, abstract_policy, to_rollout
from jspec.output import screen
from jspec.prepare import check_fresh_draft, fresh_draft
from jspec.progress import telling
from jspec.purposes import BENCH_KEY, purpose_key
from jspec.session import mesh_for
from pallas_kernels.rejection_sampling.shapes import Shape

REPEATED = "The quick brown fox jumps over the lazy dog, and the lazy dog sleeps on. "


SYNTHETIC = "synthetic"
DETERMINISTIC = (SYNTHETIC, "ngram", "suffix")
"""Drafters that sample nothing, so that the rule has no distribution of theirs to read."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Raises InputError for whatever can be known to be wrong before anything is made."""
    parser = cli.Parser(prog="jspec bench", description=__doc__)
    count = partial(cli.number, int)
    listed = partial(add_listed, parser)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m",
                        help="sizes of a model with random weights (default: smollm2-135m)")
    parser.add_argument("--weights", metavar="MODEL",
                        help=f"instead of random weights: {cli.NAMED}")
    listed("--batch", count(1), [1, 8, 32], "rows decoded together")
    parser.add_argument("--prompt-tokens", type=count(1), default=48, metavar="N",
                        help="of every prompt (default: 48)")
    parser.add_argument("--new-tokens", type=count(1), default=64, metavar="N",
                        help="that every row gets; nothing ends one earlier (default: 64)")
    parser.add_argument("--prompt", choices=("random", "repeat"), default="random",
                        help="repeat: a phrase over and over (default: random)")
    listed("--drafts", drafter(PLAIN, SYNTHETIC), [PLAIN],
           "drafters, with options as NAME:KEY=VALUE; synthetic costs nothing")
    listed("--k", count(1), [3], "tokens drafted a cycle")
    parser.add_argument("--acceptance", metavar="P,P,...",
                        help="acceptance by draft position, for example 0.8,0.7,0.6; the last one "
                        "goes on (default: what is accepted)")
    parser.add_argument("--rule", choices=RULES, default="rejection",
                        help="how drafts are judged (default: rejection)")
    parser.add_argument("--kernels", choices=KERNELS, default="auto", help=KERNELS_HELP)
    parser.add_argument("--temperature", type=cli.number(float, 0.0), default=1.0,
                        help="0 is greedy (default: 1)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, on a CPU float32")
    parser.add_argument("--rounds", type=count(1), default=5, metavar="N",
                        help="runs of every program, taken in turn (default: 5)")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    args = parser.parse_args(arguments)
    try:
        args.acceptance = (args.acceptance
                           and tuple(map(cli.number(float, 0, 1), args.acceptance.split(","))))
    except argparse.ArgumentTypeError:
        parser.error("--acceptance takes probabilities, separated by commas")
    shape = jspec.hub.read_config(args.weights) if args.weights else SHAPES[args.shape]
    needed, positions = (args.prompt_tokens + args.new_tokens + max(args.k),
                         shape.max_position_embeddings)
    if needed > positions:
        raise InputError(f"--prompt-tokens {args.prompt_tokens}, --new-tokens {args.new_tokens} "
                         f"and --k {max(args.k)} do not fit the model's {positions} positions; "
                         "lower one of them")
    args.dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    for name in args.drafts:
        if name not in (PLAIN, SYNTHETIC):
            kind, options = split_options(name)
            label = f"--drafts {kind}"
            check_fresh_draft(abstract_policy(shape, args.dtype), find(kind, label), options, label)
    open_results(args)
    return args


def policy_and_drafts(args: argparse.Namespace) -> tuple[Policy, dict[str, Draft | None]]:
    """The policy in the rollout layout, on the device, and every drafter that is timed with it."""
    names = dict.fromkeys(name for name, _ in variants(args))
    if args.weights:
        policy = jspec.load(args.weights, dtype=args.dtype)
        drafts = {name: make_draft(name, policy) for name in names}
        return jspec.reshard(policy), drafts

    def random(key):
        return jspec.init_policy(SHAPES[args.shape], key, args.dtype)

    # each in a program of its own, of which XLA leaves out the masters that it does not need
    key = jax.random.key(0)
    drafts = {name: jax.jit(lambda key, name=name: make_draft(name, random(key)))(key)
              for name in names}
    return jax.block_until_ready(jax.jit(lambda key: to_rollout(random(key)))(key)), drafts


def make_draft(name: str, policy: Policy) -> Draft | None:
    """A fresh draft for a policy in the training layout."""
    if name == PLAIN:
        return None
    if name == SYNTHETIC:
        return synthetic.free.init(policy)
    kind, options = split_options(name)
    return fresh_draft(policy, jax.random.key(1), find(kind), options, f"--drafts {kind}")


def make_batch(args: argparse.Namespace, policy: Policy, size: int) -> jspec.PromptBatch:
    if args.prompt == "random":
        prompts = np.random.default_rng(0).integers(5, policy.config.vocab_size - 5,
                                                    (size, args.prompt_tokens))
    elif args.weights:
        phrase = jspec.load_tokenizer(args.weights).encode(REPEATED)
        prompts = np.broadcast_to(np.resize(phrase, args.prompt_tokens), (size, args.prompt_tokens))
    else:
        phrase = np.random.default_rng(0).integers(5, policy.config.vocab_size - 5, 12)
        prompts = np.broadcast_to(np.resize(phrase, args.prompt_tokens), (size, args.prompt_tokens))
    return jspec.PromptBatch.from_tokens(prompts.tolist(), group_size=1,
                                         seed=purpose_key(0, BENCH_KEY),
                                         buckets=(args.prompt_tokens,))


def variants(args: argparse.Namespace) -> list[tuple[str, int]]:
    """(drafter, k) to be timed at each batch size: autoregressive first, then the free drafter,
    then the real ones."""
    drafts = [name for name in args.drafts if name not in (PLAIN, SYNTHETIC)]
    names = ([SYNTHETIC] if drafts or SYNTHETIC in args.drafts else []) + drafts
    return [(PLAIN, 0)] + [(name, k) for name in names for k in args.k]


def accept_program(args: argparse.Namespace, policy: Policy, size: int, k: int,
                   sampled: bool) -> Any:
    """The verdict of a cycle, over logits that are there already."""
    rule = f"{args.rule}, sampled drafts" if sampled and args.rule != "coupled" else args.rule
    shape = Shape(args.shape, policy.config.vocab_size, size, k)
    case = jax.jit(partial(kernel_cases.judging, shape, rule))(jax.random.key(0))
    chosen = policy.replace(weights={}, kernels=choose(args.kernels))
    return partial(jax.jit(lambda case: judge(chosen, **case)), case)


def time_batch(args: argparse.Namespace, policy: Policy, drafts: dict[str, Draft | None], size: int,
               rule: str) -> list[dict[str, Any]]:
    """One row of raw figures for each variant at one batch size."""
    batch = make_batch(args, policy, size)
    sampling = jspec.Sampling(max_new_tokens=args.new_tokens, temperature=args.temperature,
                              stop_tokens=())
    programs: dict[Any, Any] = {}
    wanted = variants(args)
    for name, draft in drafts.items():
        programs[name, "prefill"] = partial(parts.prefill, policy, draft, batch, sampling,
                                            k=max(args.k))
    for name, k in wanted:
        sampled = name.split(":")[0] not in (PLAIN, *DETERMINISTIC)
        programs[name, k, "accept"] = accept_program(args, policy, size, k, sampled)
        # plain decoding has nothing to accept, and a rule for drafts would only change its noise
        speculation = jspec.Speculation(k=k, rule=rule if k else args.rule, kernels=args.kernels)
        programs[name, k] = partial(jspec.rollout, policy, drafts[name], batch, sampling=sampling,
                                    speculation=speculation)
    seconds = measure.interleaved(programs, args.rounds)
    rows = []
    for name, k in wanted:
        out = programs[name, k]()
        cycles, total = int(out.stats.cycles.max()), measure.median(seconds[name, k])
        prefill = measure.median(seconds[name, "prefill"])
        accept_ms = 1e3 * measure.median(seconds[name, k, "accept"])
        rows.append({"batch": size, "draft": name, "k": k, "tok_per_s": int(out.lengths.sum())
                     / total, "seconds": seconds[name, k], "prefill_s": prefill, "cycles": cycles,
                     "cycle_ms": 1e3 * (total - prefill) / cycles, "accept_ms": accept_ms,
                     "acceptance_length": float(out.acceptance_length),
                     "accepted_by_position": parts.by_position(out.stats).round(3).tolist()})
    return rows


def derive(args: argparse.Namespace, policy: Policy, rows: list[dict[str, Any]],
           bandwidth: float) -> None:
    """Add speed-up, draft time and share of the memory floor to the rows of one batch size."""
    plain = rows[0]
    free = {row["k"]: row["cycle_ms"] for row in rows if row["draft"] == SYNTHETIC}
    itemsize = np.dtype(policy.dtype).itemsize
    live = plain["batch"] * (args.prompt_tokens + args.new_tokens / 2)
    mesh = jax.sharding.get_mesh()  # a device reads its part of the weights, and of the rows
    weights, kv = measure.weight_bytes(policy), measure.kv_bytes(policy.config, itemsize, live)
    floor_ms = 1e3 * (weights / mesh.shape["tensor"] + kv / mesh.size) / bandwidth
    for row in rows:
        row["speedup"] = row["tok_per_s"] / plain["tok_per_s"]
        row["share_of_floor"] = floor_ms / row["cycle_ms"]
        row["draft_ms"] = (row["cycle_ms"] - free[row["k"]]
                           if row["draft"] not in (PLAIN, SYNTHETIC) else None)


def show(rows: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    for name in ("batch", "draft", "k", "tok/s", "speed-up", "tokens/cycle", "cycle ms", "draft ms",
                 "accept ms", "prefill ms", "floor"):
        table.add_column(name, justify="left" if name == "draft" else "right")
    for row in rows:
        draft_ms = "" if row["draft_ms"] is None else f"{row['draft_ms']:.2f}"
        table.add_row(str(row["batch"]), row["draft"], str(row["k"]), f"{row['tok_per_s']:.1f}",
                      f"{row['speedup']:.2f}x", f"{row['acceptance_length']:.2f}",
                      f"{row['cycle_ms']:.2f}", draft_ms, f"{row['accept_ms']:.2f}",
                      f"{1e3 * row['prefill_s']:.1f}", f"{100 * row['share_of_floor']:.0f}%")
    screen(width=max(110, screen().width)).print(table)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(arguments)
    shape = jspec.hub.read_config(args.weights) if args.weights else SHAPES[args.shape]
    with jax.set_mesh(mesh_for(shape, math.gcd(*args.batch), "--batch")):
        return timed(args)


def timed(args: argparse.Namespace) -> dict[str, Any]:
    """The result, measured on the current mesh."""
    with telling(f"making {args.weights or args.shape}"):
        policy, drafts = policy_and_drafts(args)
    rule = synthetic.add_rule(args.acceptance) if args.acceptance else args.rule
    bandwidth = measure.copy_bandwidth(2**24 if args.shape == "tiny" and not args.weights else None)
    rows = []
    for size in args.batch:
        with telling(f"batch {size}"):
            new = time_batch(args, policy, drafts, size, rule)
        derive(args, policy, new, bandwidth)
        rows += new
    name = args.weights or args.shape
    show(rows, f"{name}, {args.dtype}, {args.prompt_tokens} + {args.new_tokens} tokens, {rule}, "
               f"{picked(args.kernels)}, copy {bandwidth / 1e9:.1f} GB/s")
    result = measure.report(rows, model=name, dtype=args.dtype, rule=rule,
                            kernels=picked(args.kernels), copy_gb_per_s=bandwidth / 1e9,
                            prompt_tokens=args.prompt_tokens, new_tokens=args.new_tokens)
    measure.write_json(args.json, result)
    return result


if __name__ == "__main__":
    sys.exit(cli.main(["bench", *sys.argv[1:]]))
