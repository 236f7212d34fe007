"""Time a heavy-tailed workload: real prompts, several answers to each, each as long as the model
makes it, under a cap.

    jspec bench tail smollm2-135m-instruct
    jspec bench tail smollm2-135m-instruct --drafts mtp --k 3 --slots 16 --json FILE
    jspec bench tail smollm2-135m-instruct --drafts mtp --k 3 4:7/16:3
    jspec bench tail smollm2-135m-instruct --grpo

What is counted is useful tokens: those of the answers, end tokens included. Autoregressive decoding
("none") is always timed. Every round has noise of its own, the same for all variants, and takes
them in turn; compiling is not counted. Drafts that remember have seen the rounds before, as in a
run's later epochs. A k is a number or a schedule by live rows: 4:7/16:3 drafts
7 tokens with up to 4 rows, 3 with up to 16, and none with more. `--k auto` measures and chooses
before anything is timed; the k of each loop stands beside it. `mean`, `median` and `largest` are of
the answers' lengths, and `occupancy` is live rows over computed rows.

With --grpo it is whole GRPO steps (grpo_step.py), one a round, of useful tokens over the seconds of
the whole step; a step before them compiles.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Column, Table

import jspec
from benchmarks import drafts as bench_drafts
from benchmarks import grpo_step, measure
from benchmarks.options import KERNELS_HELP, PLAIN, add_listed, drafter, one_of, open_results
from jspec import cli
from jspec.choices import DTYPES, KERNELS, RULES, SEED_HIGH
from jspec.drafts import Draft
from jspec.errors import InputError
from jspec.kernels import choose, picked
from jspec.model import Policy
from jspec.output import screen
from jspec.progress import telling
from jspec.purposes import BENCH_KEY, purpose_key
from jspec.rl.records import read_jsonl
from jspec.rl.state import init_state
from jspec.rl.update_settings import UpdateSettings
from jspec.session import mesh_for
from jspec.sources import Source, open_source
from jspec.step import declare

HELDOUT = Path(__file__).resolve().parent / "prompts" / "heldout.jsonl"


def drafted(text: str) -> Any:
    """A k of `jspec.Speculation`: a whole number, a schedule written as 4:7/16:3, or auto."""
    if ":" not in text:
        return text if text == "auto" else cli.number(int, 1)(text)
    try:
        return jspec.Speculation(k=[tuple(map(int, pair.split(":"))) for pair in text.split("/")]).k
    except ValueError as error:
        detail = f"; {error}" if isinstance(error, InputError) else ""
        raise argparse.ArgumentTypeError("must be ROWS:K pairs as in 4:7/16:3, not "
                                         f"{text!r}{detail}") from None


def shown(k: Any) -> str:
    """The same as it is written."""
    return str(k) if isinstance(k, int) else "/".join(f"{rows}:{drafts}" for rows, drafts in k)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Raises InputError for whatever can be known to be wrong before the model is loaded."""
    parser = cli.Parser(prog="jspec bench tail", description=__doc__)
    count, listed = partial(cli.number, int), partial(add_listed, parser)
    parser.add_argument("model", metavar="MODEL", help=cli.MODEL)
    parser.add_argument("--prompts", type=Path, default=HELDOUT, metavar="FILE.jsonl",
                        help='lines of {"prompt": "..."} (default: '
                        'benchmarks/prompts/heldout.jsonl)')
    parser.add_argument("--count", type=count(1), default=8, metavar="N",
                        help="the first N prompts (default: 8)")
    parser.add_argument("--samples", type=count(1), default=4, metavar="N",
                        help="answers to each (default: 4)")
    parser.add_argument("--max-new-tokens", type=count(1), default=512, metavar="N",
                        help="the cap on an answer (default: 512)")
    listed("--temperature", cli.number(float, 0.0), [1.0], "0 is greedy")
    listed("--drafts", drafter(PLAIN), [PLAIN], "drafters, with options as NAME:KEY=VALUE")
    listed("--k", drafted, [3], "tokens drafted a cycle; a schedule as ROWS:K/ROWS:K; auto: what "
           "jspec.choose_k finds to be best, at first")
    listed("--rule", one_of("rule", RULES), ["rejection"],
           f"how drafts are judged, of {', '.join(RULES)}")
    parser.add_argument("--slots", type=count(1), metavar="N",
                        help="answers in flight at most (default: all)")
    parser.add_argument("--grpo", action="store_true", help="time whole GRPO steps")
    parser.add_argument("--micro-batch", type=count(0), metavar="ROWS",
                        help="with --grpo: rows of one forward and backward; 0: chosen (default: "
                        "0)")
    parser.add_argument("--rounds", type=count(1), default=1, metavar="N",
                        help="runs of every variant (default: 1)")
    parser.add_argument("--seed", type=count(0, SEED_HIGH), default=0,
                        help="of the sampling noise (default: 0)")
    parser.add_argument("--kernels", choices=KERNELS, default="auto", help=KERNELS_HELP)
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, on a CPU float32")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    args = parser.parse_args(arguments)
    if args.grpo and "auto" in args.k:
        raise InputError("--k auto is chosen for rollouts; leave out --grpo, or give numbers")
    if args.micro_batch is not None and not args.grpo:
        raise InputError("--micro-batch is of the update, which --grpo times; add it")
    open_results(args)
    return args


def read_prompts(args: argparse.Namespace, tokenizer: Any) -> list[list[int]]:
    """Token ids of the prompts. Raises InputError for a file that cannot be read, or with too few
    of them."""
    texts = [record["prompt"] for record in read_jsonl(args.prompts, ("prompt",), "--prompts")]
    if args.count > len(texts):
        raise InputError(f"--count {args.count} is more than the {len(texts)} prompts of "
                         f"{args.prompts}")
    return bench_drafts.encode(texts[:args.count], tokenizer)


def make_batch(args: argparse.Namespace, prompts: list[list[int]],
               number: int) -> jspec.PromptBatch:
    """The workload with the noise of round `number`."""
    key = jax.random.fold_in(purpose_key(args.seed, BENCH_KEY), number)
    return jspec.PromptBatch.from_tokens(prompts, group_size=args.samples, seed=key)


def settled(args: argparse.Namespace, policy: Policy, draft: Draft | None,
            variant: bench_drafts.Variant, batch: jspec.PromptBatch) -> bench_drafts.Variant:
    """The variant with what is drafted in the place of auto."""
    if variant.k != "auto":
        return variant
    settings = settings_of(args, dataclasses.replace(variant, k=0))
    return dataclasses.replace(variant, k=jspec.choose_k(policy, draft, batch, **settings))


def settings_of(args: argparse.Namespace, variant: bench_drafts.Variant) -> dict[str, Any]:
    """What `jspec.rollout` is called with by name. Checkouts that know no slots are timed by this
    file too."""
    batching = {} if args.slots is None else {"batching": jspec.Batching(slots=args.slots)}
    return {**batching, "sampling": jspec.Sampling(max_new_tokens=args.max_new_tokens,
                                                   temperature=variant.temperature),
            "speculation": jspec.Speculation(k=variant.k, rule=variant.rule, kernels=args.kernels)}


def counted(out: jspec.Rollout) -> dict[str, Any]:
    """What a rollout yielded, and how full its loops were where its statistics say so."""
    lengths, occupancy = np.asarray(out.lengths), getattr(out.stats, "occupancy", None)
    return {"tokens": int(lengths.sum()), "mean": float(lengths.mean()),
            "median": float(np.median(lengths)),
            "largest": int(lengths.max()), "cut": int((~np.asarray(out.finished)).sum()),
            "acceptance_length": float(out.acceptance_length),
            "loop_k": list(getattr(out.stats, "ks", ())),
            "occupancy": None if occupancy is None else float(occupancy)}


def time_rollouts(args: argparse.Namespace, policy: Policy, drafts: dict[str, Draft | None],
                  variants: list[bench_drafts.Variant],
                  prompts: list[list[int]]) -> Iterator[dict[str, Any]]:
    """A row for each variant in each round, of which drafts that remember have seen those before.
    The policy is in the rollout layout."""
    batch, compiled = make_batch(args, prompts, 0), {}
    used = {variant: drafts[variant.draft] for variant in variants}
    with telling("compiling", total=len(variants)) as advance:
        # compiled without being run: one run of this workload may take minutes
        for variant in variants:
            known = settled(args, policy, drafts[variant.draft], variant, batch)
            roll = jax.jit(partial(jspec.rollout, **settings_of(args, known)))
            compiled[variant] = roll.lower(policy, drafts[variant.draft], batch).compile()
            advance()
    with telling("timing", total=args.rounds * len(variants)) as advance:
        for number in range(1, args.rounds + 1):
            batch = make_batch(args, prompts, number)
            programs = {variant: partial(program, policy, used[variant], batch)
                        for variant, program in compiled.items()}
            for variant, seconds, out in measure.in_turn(programs, 1):
                figures, draft = counted(out), used[variant]
                if draft is not None and draft.drafter.remember is not None:
                    used[variant] = jax.jit(draft.drafter.remember)(draft, batch, out)
                yield {"round": number, **dataclasses.asdict(variant), "seconds": seconds,
                       "tok_per_s": figures["tokens"] / seconds, **figures}
                advance()


def time_steps(args: argparse.Namespace, policy: Policy, drafts: dict[str, Draft | None],
               variants: list[bench_drafts.Variant],
               prompts: list[list[int]]) -> Iterator[dict[str, Any]]:
    """A row for each variant in each round, of one GRPO step. The policy is in the training
    layout."""
    for variant in variants:
        settings = UpdateSettings(micro_batch=args.micro_batch or 0,
                                  temperature=variant.temperature)
        # the update takes the state's buffers over, and the next variant wants the policy again
        own, its_draft = jax.tree.map(lambda x: x.copy(), (policy, drafts[variant.draft]))
        state = init_state(own, its_draft, settings, seed=0)
        step = declare(state, settings, **settings_of(args, variant))
        with telling(f"{variant.draft}: a step that compiles, then {args.rounds}"):
            for number in range(args.rounds + 1):
                state, seconds, out = grpo_step.take(step, state, make_batch(args, prompts, number))
                if number:
                    figures = counted(out)
                    yield {"round": number, **dataclasses.asdict(variant), **seconds,
                           "seconds": seconds["step"],
                           **figures, "tok_per_s": figures["tokens"] / seconds["step"]}


def show(args: argparse.Namespace, rows: list[dict[str, Any]], title: str) -> None:
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "draft": lambda r: r["draft"],
        "k": lambda r: f"auto {r['loop_k']}" if r["k"] == "auto" else shown(r["k"]),
        "T": lambda r: f"{r['temperature']:g}",
        "rule": lambda r: r["rule"], "seconds": lambda r: f"{r['seconds']:.1f}",
        **({name: lambda r, name=name: f"{r[name]:.1f}" for name in grpo_step.TIMED} if args.grpo
           else {}), "tokens": lambda r: str(r["tokens"]),
        "tok/s": lambda r: f"{r['tok_per_s']:.1f}", "mean": lambda r: f"{r['mean']:.0f}",
        "median": lambda r: f"{r['median']:.0f}", "largest": lambda r: str(r["largest"]),
        "tokens/cycle": lambda r: f"{r['acceptance_length']:.2f}",
        "occupancy": lambda r: "" if r["occupancy"] is None else f"{r['occupancy']:.2f}"}
    table = Table(*(Column(name, overflow="fold") for name in columns), title=title)
    for row in rows:
        table.add_row(*(text(row) for text in columns.values()))
    screen(width=max(150, screen().width)).print(table)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns the result, which is what `--json` writes. Raises InputError for a mistake of the
    user's."""
    args = parse(arguments)
    source = open_source(args.model, [], args.dtype, bench_drafts.kinds(args))
    rows = math.gcd(args.count * args.samples, args.slots or 0)
    with jax.set_mesh(mesh_for(source.shape.config, rows, "--count")):
        return timed(args, source)


def timed(args: argparse.Namespace, source: Source) -> dict[str, Any]:
    """The result, measured on the current mesh."""
    prompts, variants = read_prompts(args, source.tokenizer), bench_drafts.make_variants(args)
    paths = bench_drafts.paths_of_run(args, source)
    makers = {name: bench_drafts.choose_draft(name, source.shape, args.model, paths,
                                              source.tokenizer)
              for name in dict.fromkeys((PLAIN, *args.drafts))}
    with telling(f"loading {args.model}"):
        policy = source.load()
        drafts = {name: make(policy) for name, make in makers.items()}
        if not args.grpo:
            policy = jspec.reshard(policy).replace(kernels=choose(args.kernels))
    rows, rounds = [], time_steps if args.grpo else time_rollouts
    facts = {"model": args.model, "dtype": policy.dtype, "kernels": picked(args.kernels),
             "seed": args.seed, "prompts": args.count, "samples": args.samples,
             "max_new_tokens": args.max_new_tokens, "slots": args.slots, "grpo": args.grpo}
    for row in rounds(args, policy, drafts, variants, prompts):
        rows.append(row)
        result = measure.report(rows, **facts)
        measure.write_json(args.json, result)
    show(args, rows, f"{'GRPO step, ' if args.grpo else ''}{args.model}, {args.count} prompts "
         f"x {args.samples}, up to {args.max_new_tokens} new tokens, {facts['dtype']}, "
         f"{facts['kernels']}")
    return result


if __name__ == "__main__":
    sys.exit(cli.main(["bench", "tail", *sys.argv[1:]]))
