"""Time whole GRPO steps, phase by phase, at SmolLM2-135M's shape from random weights: what
peers/tunix_grpo.py times.

    python -m benchmarks.grpo_step --prompts 1 --group 8 --steps 3
    python -m benchmarks.grpo_step --prompts 4 --group 8 --steps 3 --draft mtp --k 3
    python -m benchmarks.grpo_step --prompts 8 --group 4 --new-tokens 512 --mean 128 --steps 2

With --mean it is the update alone, of answers whose lengths are exponential, cut at --new-tokens:
as it trims them, and at full width, in turn. Else every row runs to --new-tokens. The reward is a
function of the tokens, computed on the host. A first step compiles and is not counted. Prints a
table and, with --json, writes the seconds of every phase of every step.
"""

import argparse
import dataclasses
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

import jspec
from benchmarks import measure
from benchmarks.options import open_results, program
from benchmarks.shapes import SHAPES
from jspec.clock import Clock
from jspec.console import PlainConsole
from jspec.purposes import BENCH_KEY, purpose_key
from jspec.rl.batch import TrainBatch
from jspec.rl.grading import Grades
from jspec.rl.groups import Drawn
from jspec.rl.state import TrainState, init_state
from jspec.rl.update import update
from jspec.rl.update_settings import UpdateSettings
from jspec.step import Step, declare

TIMED = ("reshard", "rollout", "reward", "update")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grpo_step", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--mean", type=float,
                        help="time the update alone, of answers of about this length on average")
    parser.add_argument("--draft", choices=["none", "ngram", "mtp"], default="none")
    parser.add_argument("--k", type=int, default=3)
    parser.add_argument("--micro-batch", type=int, default=0,
                        help="rows of one forward and backward; 0: chosen")
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--json", help="write the result there")
    args = parser.parse_args(arguments)
    open_results(args)
    return args


def random_prompts(args: argparse.Namespace, vocab_size: int, number: int) -> jspec.PromptBatch:
    """Prompts and noise of step `number`."""
    tokens = np.random.default_rng(number).integers(5, vocab_size - 5,
                                                    (args.prompts, args.prompt_tokens))
    key = jax.random.fold_in(purpose_key(0, BENCH_KEY), number)
    return jspec.PromptBatch.from_tokens(tokens.tolist(), group_size=args.group, seed=key,
                                         buckets=(args.prompt_tokens,))


def distinct(out: jspec.Rollout, _: Drawn) -> Grades:
    """How many different tokens each answer has."""
    return Grades(np.array([len(set(row)) for row in np.asarray(out.tokens).tolist()], np.float32),
                  {}, "")


def take(step: Step, state: TrainState, prompts: jspec.PromptBatch
         ) -> tuple[TrainState, dict[str, float], jspec.Rollout]:
    """One GRPO step. Returns (state, seconds by phase and the metrics that say it was a real one,
    its rollout)."""
    begin, clock = time.perf_counter(), Clock()
    state, taken = step.take(state, None, prompts, clock, choose=lambda *_: step.speculation.k,
                             grade=distinct)
    seconds = {name: clock.seconds[name] for name in TIMED} | {"step": time.perf_counter() - begin}
    out, (metrics, *_) = taken.rollout, taken.updates
    generated = int(out.lengths.sum())
    return state, {**seconds, "tokens": generated,
                   "tok_per_s": generated / seconds["rollout"],
                   "acceptance_length": float(out.acceptance_length),
                   "logprob_gap": float(metrics["logprob_gap"]),
                   "grad_norm": float(metrics["grad_norm"])}, out


def tailed(args: argparse.Namespace, vocab_size: int) -> TrainBatch:
    """Random prompts and answers; lengths are the quantiles of an exponential distribution cut at
    --new-tokens."""
    rng, rows, cap = np.random.default_rng(0), args.prompts * args.group, args.new_tokens
    quantiles = -np.log(1 - (np.arange(rows) + 0.5) / rows)
    scales = np.geomspace(1, 100 * cap, 2000)[:, None]
    nearest = np.abs(np.minimum(scales * quantiles, cap).mean(1) - args.mean).argmin()
    lengths = rng.permutation(np.clip(scales[nearest] * quantiles, 1, cap).round().astype(int))
    return TrainBatch(
        prompts=jnp.asarray(rng.integers(5, vocab_size - 5, (args.prompts, args.prompt_tokens)),
                            jnp.int32),
        prompt_lengths=jnp.full(args.prompts, args.prompt_tokens, jnp.int32),
        tokens=jnp.asarray(rng.integers(5, vocab_size - 5, (rows, cap)), jnp.int32),
        logprobs=jnp.full((rows, cap), -np.log(vocab_size), jnp.float32),
        mask=jnp.arange(cap) < jnp.asarray(lengths)[:, None],
        advantages=jnp.asarray(np.resize([1.0, -1.0], rows), jnp.float32))


def update_alone(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the update of heavy-tailed answers, trimmed and not, and how far their gradients
    are apart."""
    batch, made = tailed(args, SHAPES[args.shape].vocab_size), {}
    settings = UpdateSettings(micro_batch=args.micro_batch, remat=args.remat)
    state = init_state(jspec.init_policy(SHAPES[args.shape], jax.random.key(0)), None, settings,
                       seed=0)
    for name, widths in (("trimmed", ()), ("full width", (args.new_tokens,))):
        one = dataclasses.replace(settings, widths=widths)
        made[name] = jax.jit(partial(update, settings=one)).lower(state, None, batch).compile()
    programs = {name: partial(compiled, state, None, batch) for name, compiled in made.items()}
    seconds, norms = {name: [] for name in programs}, {}
    for name, taken, (_, metrics) in measure.in_turn(programs, args.steps):
        seconds[name].append(taken)
        norms[name] = float(metrics["grad_norm"])
    tokens = int(batch.mask.sum())
    ratio = measure.median([full / own for own, full in zip(seconds["trimmed"],
                                                            seconds["full width"], strict=True)])
    table = Table("update", "seconds", "tok/s", "gradient's norm",
                  title=f"{args.shape}, {args.prompts} x {args.group} rows, {args.prompt_tokens} "
                  f"+ {tokens / batch.tokens.shape[0]:.0f} of {args.new_tokens} tokens")
    for name, taken in seconds.items():
        table.add_row(name, f"{min(taken):.1f}", f"{tokens / min(taken):.1f}", f"{norms[name]:.6f}")
    console = PlainConsole()
    console.print(table)
    console.print(f"Trimmed is {ratio:.2f}x as fast (median of {args.steps} pairs).")
    rows = [{"update": name, "seconds": taken, "grad_norm": norms[name]}
            for name, taken in seconds.items()]
    return measure.report(rows, model=args.shape, sequences=batch.tokens.shape[0], tokens=tokens,
                          new_tokens=args.new_tokens, micro_batch=args.micro_batch, speedup=ratio)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = parse(arguments)
    if args.mean:
        result = update_alone(args)
        measure.write_json(args.json, result)
        return result
    policy = jspec.init_policy(SHAPES[args.shape], jax.random.key(0))
    draft = (None if args.draft == "none"
             else getattr(jspec.drafts, args.draft)(policy, jax.random.key(1)))
    settings = UpdateSettings(micro_batch=args.micro_batch, remat=args.remat)
    state, rows = init_state(policy, draft, settings, seed=0), []
    step = declare(state, settings, speculation=jspec.Speculation(k=args.k),
                   sampling=jspec.Sampling(max_new_tokens=args.new_tokens, stop_tokens=()))
    del policy, draft  # the state's buffers are donated
    for number in range(args.steps + 1):
        prompts = random_prompts(args, SHAPES[args.shape].vocab_size, number)
        state, row, _ = take(step, state, prompts)
        if number:
            rows.append(row)
    table = Table(title=f"GRPO step, {args.shape}, {args.prompts} x {args.group} rows, "
                  f"{args.prompt_tokens} + {args.new_tokens} tokens, draft {args.draft}")
    shown = [*TIMED, "step", "tok_per_s", "acceptance_length", "logprob_gap"]
    for name in shown:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{row[name]:.3g}" for name in shown))
    PlainConsole(width=max(110, PlainConsole().width)).print(table)
    result = measure.report(rows, model=args.shape, sequences=args.prompts * args.group,
                            draft=args.draft)
    measure.write_json(args.json, result)
    return result


if __name__ == "__main__":
    program(main)
