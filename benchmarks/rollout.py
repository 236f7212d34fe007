"""Time `jspec.rollout`: tokens per second, milliseconds of a cycle and of its draft, share of the memory floor.

    python benchmarks/rollout.py --shape smollm2-135m --batch 1 8 32
    python benchmarks/rollout.py --shape smollm2-135m --batch 8 --draft mtp --k 1 3 7 --acceptance 0.8,0.7,0.6
    python benchmarks/rollout.py --shape qwen3-8b --batch 1 8 64 --prompt-tokens 2048 --draft ngram mtp --k 1 3 7
    python benchmarks/rollout.py --weights smollm2-135m-instruct --prompt repeat --batch 1 --draft ngram --k 3

Weights are random unless `--weights` names a model. Every row has a prompt of its own and runs to --new-tokens. The
first line of each batch size is autoregressive; speed-ups are over it. With a draft, a drafter that costs nothing
("synthetic") is timed at each k as well: its cycle is the verification alone, and `draft ms` is what the real drafter
adds to it. `accept ms` is the verdict over given logits, as a program of its own. `--acceptance` sets the acceptance by
position by hand, whatever the drafter (see synthetic.py). `floor` is the share of the memory floor: bytes of weights
and live keys and values that a cycle must read, over the bandwidth of a plain copy measured in this run, over the
cycle's time. All are medians of runs taken in turn.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax  # noqa: E402
import numpy as np  # noqa: E402
from rich.table import Table  # noqa: E402

import jspec  # noqa: E402
from benchmarks import kernel_cases, measure, parts, synthetic  # noqa: E402
from benchmarks.shapes import SHAPES  # noqa: E402
from jspec.console import PlainConsole  # noqa: E402
from jspec.kernels import KERNELS, choose, judge, picked  # noqa: E402
from jspec.model import Policy, to_rollout  # noqa: E402
from jspec.prepare import BENCH_KEY, purpose_key  # noqa: E402
from jspec.progress import telling  # noqa: E402
from jspec.speculate.cycle import RULES  # noqa: E402
from pallas_kernels.rejection_sampling.shapes import Shape  # noqa: E402

REPEATED = "The quick brown fox jumps over the lazy dog, and the lazy dog sleeps on. "


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--weights", help="a model that jspec.load takes, instead of random weights of --shape")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt", choices=["random", "repeat"], default="random",
                        help="repeat: a phrase over and over")
    parser.add_argument("--draft", nargs="+", choices=["none", "ngram", "mtp", "synthetic"], default=["none"])
    parser.add_argument("--k", type=int, nargs="+", default=[3])
    parser.add_argument("--acceptance", type=lambda text: tuple(map(float, text.split(","))),
                        help="acceptance by draft position, for example 0.8,0.7,0.6; the last one goes on")
    parser.add_argument("--rule", choices=RULES, default="rejection")
    parser.add_argument("--kernels", choices=KERNELS, default="auto")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16, on a CPU float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the result there")
    args = parser.parse_args(arguments)
    if args.acceptance and not all(0 <= a <= 1 for a in args.acceptance):
        parser.error("--acceptance takes probabilities, separated by commas")
    args.dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return args


def make_policy(args: argparse.Namespace) -> Policy:
    """In the rollout layout, on the device."""
    if args.weights:
        return jspec.reshard(jspec.load(args.weights, dtype=args.dtype))
    config = SHAPES[args.shape]
    make = jax.jit(lambda key: to_rollout(jspec.init_policy(config, key, args.dtype)))
    return jax.block_until_ready(make(jax.random.key(0)))


def make_batch(args: argparse.Namespace, policy: Policy, size: int) -> jspec.PromptBatch:
    if args.prompt == "random":
        prompts = np.random.default_rng(0).integers(5, policy.config.vocab_size - 5, (size, args.prompt_tokens))
    elif args.weights:
        phrase = jspec.load_tokenizer(args.weights).encode(REPEATED)
        prompts = np.broadcast_to(np.resize(phrase, args.prompt_tokens), (size, args.prompt_tokens))
    else:
        phrase = np.random.default_rng(0).integers(5, policy.config.vocab_size - 5, 12)
        prompts = np.broadcast_to(np.resize(phrase, args.prompt_tokens), (size, args.prompt_tokens))
    return jspec.PromptBatch.from_tokens(prompts.tolist(), group_size=1, seed=purpose_key(0, BENCH_KEY),
                                         buckets=(args.prompt_tokens,))


def make_draft(name: str, policy: Policy):
    if name == "none":
        return None
    if name == "synthetic":
        return synthetic.free(policy)
    return getattr(jspec.drafts, name)(policy, jax.random.key(1))


def variants(args: argparse.Namespace) -> list[tuple[str, int]]:
    """(drafter, k) to be timed at each batch size: autoregressive first, then the free drafter, then the real ones."""
    drafts = [d for d in args.draft if d not in ("none", "synthetic")]
    names = (["synthetic"] if drafts or "synthetic" in args.draft else []) + drafts
    return [("none", 0)] + [(name, k) for name in names for k in args.k]


def accept_program(args: argparse.Namespace, policy: Policy, size: int, k: int, sampled: bool) -> Any:
    """The verdict of a cycle, over logits that are there already."""
    rule = f"{args.rule}, sampled drafts" if sampled and args.rule != "coupled" else args.rule
    shape = Shape(args.shape, policy.config.vocab_size, size, k)
    case = jax.jit(partial(kernel_cases.judging, shape, rule))(jax.random.key(0))
    chosen = policy.replace(weights={}, kernels=choose(args.kernels))
    return partial(jax.jit(lambda case: judge(chosen, **case)), case)


def time_batch(args: argparse.Namespace, policy: Policy, size: int, rule: str) -> list[dict[str, Any]]:
    """One row of raw figures for each variant at one batch size."""
    batch = make_batch(args, policy, size)
    sampling = jspec.Sampling(max_new_tokens=args.new_tokens, temperature=args.temperature, stop_tokens=())
    programs, wanted = {}, variants(args)
    for name in dict.fromkeys(name for name, _ in wanted):
        programs[name, "prefill"] = partial(parts.prefill, policy, make_draft(name, policy), batch, sampling,
                                            k=max(args.k))
    for name, k in wanted:
        programs[name, k, "accept"] = accept_program(args, policy, size, k, sampled=name == "mtp")
        # plain decoding has nothing to accept, and a rule for drafts would only change its noise
        speculation = jspec.Speculation(k=k, rule=rule if k else args.rule, kernels=args.kernels)
        programs[name, k] = partial(jspec.rollout, policy, make_draft(name, policy), batch, sampling=sampling,
                                    speculation=speculation)
    seconds = measure.interleaved(programs, args.rounds)
    rows = []
    for name, k in wanted:
        out = programs[name, k]()
        cycles, total = int(out.stats.cycles.max()), measure.median(seconds[name, k])
        prefill = measure.median(seconds[name, "prefill"])
        accept_ms = 1e3 * measure.median(seconds[name, k, "accept"])
        rows.append({"batch": size, "draft": name, "k": k, "tok_per_s": int(out.lengths.sum()) / total,
                     "seconds": seconds[name, k], "prefill_s": prefill, "cycles": cycles,
                     "cycle_ms": 1e3 * (total - prefill) / cycles, "accept_ms": accept_ms,
                     "acceptance_length": float(out.acceptance_length),
                     "accepted_by_position": parts.by_position(out.stats).round(3).tolist()})
    return rows


def derive(args: argparse.Namespace, policy: Policy, rows: list[dict[str, Any]], bandwidth: float) -> None:
    """Add speed-up, draft time and share of the memory floor to the rows of one batch size."""
    plain = rows[0]
    free = {row["k"]: row["cycle_ms"] for row in rows if row["draft"] == "synthetic"}
    itemsize = np.dtype(policy.dtype).itemsize
    live = plain["batch"] * (args.prompt_tokens + args.new_tokens / 2)
    floor_ms = 1e3 * (measure.weight_bytes(policy) + measure.kv_bytes(policy.config, itemsize, live)) / bandwidth
    for row in rows:
        row["speedup"] = row["tok_per_s"] / plain["tok_per_s"]
        row["share_of_floor"] = floor_ms / row["cycle_ms"]
        row["draft_ms"] = row["cycle_ms"] - free[row["k"]] if row["draft"] not in ("none", "synthetic") else None


def show(rows: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    for name in ("batch", "draft", "k", "tok/s", "speed-up", "tokens/cycle", "cycle ms", "draft ms", "accept ms",
                 "prefill ms", "floor"):
        table.add_column(name, justify="left" if name == "draft" else "right")
    for row in rows:
        draft_ms = "" if row["draft_ms"] is None else f"{row['draft_ms']:.2f}"
        table.add_row(str(row["batch"]), row["draft"], str(row["k"]), f"{row['tok_per_s']:.1f}",
                      f"{row['speedup']:.2f}x", f"{row['acceptance_length']:.2f}", f"{row['cycle_ms']:.2f}", draft_ms,
                      f"{row['accept_ms']:.2f}", f"{1e3 * row['prefill_s']:.1f}", f"{100 * row['share_of_floor']:.0f}%")
    PlainConsole(width=max(110, PlainConsole().width)).print(table)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = parse(arguments)
    with telling(f"making {args.weights or args.shape}"):
        policy = make_policy(args)
    rule = synthetic.add_rule(args.acceptance) if args.acceptance else args.rule
    bandwidth = measure.copy_bandwidth(2**24 if args.shape == "tiny" and not args.weights else None)
    rows = []
    for size in args.batch:
        with telling(f"batch {size}"):
            new = time_batch(args, policy, size, rule)
        derive(args, policy, new, bandwidth)
        rows += new
    name = args.weights or args.shape
    show(rows, f"{name}, {args.dtype}, {args.prompt_tokens} + {args.new_tokens} tokens, {rule}, "
               f"{picked(args.kernels)}, copy {bandwidth / 1e9:.1f} GB/s")
    result = measure.report(rows, model=name, dtype=args.dtype, rule=rule, kernels=picked(args.kernels),
                            copy_gb_per_s=bandwidth / 1e9,
                            prompt_tokens=args.prompt_tokens, new_tokens=args.new_tokens)
    measure.write_json(args.json, result)
    return result


if __name__ == "__main__":
    main()
