"""What a cycle of decoding costs by rows and drafts, and which schedule `speculation.k=auto` would
choose from that.

    jspec bench cost smollm2-135m-instruct
    jspec bench cost smollm2-135m-instruct --drafts mtp,self --rows 1,8,32 --k 1,3,7 --json FILE

The loop of `jspec.rollout` is timed itself, over rows that are all live, as a run with
speculation.k=auto does it (jspec/cycle_costs.py); k = 0 is a draft that is kept up to date and
drafts nothing. What is accepted is asked of the first tokens of answers to real prompts.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

import jspec
from benchmarks import drafts as bench_drafts
from benchmarks import measure
from benchmarks.options import KERNELS_HELP, add_listed, drafter, open_results
from jspec import cli, cycle_costs
from jspec.choices import DTYPES, KERNELS, RULES
from jspec.choosing import spread
from jspec.drafts import Draft
from jspec.kernels import choose, picked
from jspec.model import Policy
from jspec.output import screen
from jspec.progress import telling
from jspec.purposes import BENCH_KEY, purpose_key
from jspec.rl.records import read_jsonl
from jspec.session import mesh_for
from jspec.sources import Source, open_source
from jspec.speculate.schedule import Costs, choose_schedule, reason


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Raises InputError for whatever can be known to be wrong before the model is loaded."""
    parser = cli.Parser(prog="jspec bench cost", description=__doc__)
    count, listed = partial(cli.number, int), partial(add_listed, parser)
    parser.add_argument("model", metavar="MODEL", help=cli.MODEL)
    listed("--drafts", drafter(), ["mtp"], "drafters, with options as NAME:KEY=VALUE")
    listed("--rows", count(1), [1, 8, 32], "rows decoded together")
    listed("--k", count(0, 64), [1, cycle_costs.PROBED], "tokens drafted a cycle")
    parser.add_argument("--max-new-tokens", type=count(2), default=512, metavar="N",
                        help="the cap on an answer: rows are timed in their middle (default: 512)")
    parser.add_argument("--prompts", type=Path, default=bench_drafts.HELDOUT, metavar="FILE.jsonl",
                        help='lines of {"prompt": "..."} (default: '
                        'benchmarks/prompts/heldout.jsonl)')
    parser.add_argument("--rule", choices=RULES, default="rejection",
                        help="how drafts are judged (default: rejection)")
    parser.add_argument("--temperature", type=cli.number(float, 0.0), default=1.0,
                        help="0 is greedy (default: 1)")
    parser.add_argument("--draft-path", type=bench_drafts.named_path, action="append", default=[],
                        metavar="NAME=DIR", help="where a drafter's trained weights are, as "
                        "jspec.load_draft takes it; may be repeated")
    parser.add_argument("--kernels", choices=KERNELS, default="auto", help=KERNELS_HELP)
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, on a CPU float32")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    args = parser.parse_args(arguments)
    open_results(args)
    return args


def time_draft(args: argparse.Namespace, policy: Policy, draft: Draft,
               prompts: list[list[int]]) -> tuple[Costs, tuple[float, ...]]:
    """What cycles cost with a draft, and what of it is accepted. The policy is in the rollout
    layout."""
    most = max(args.rows)
    batch = jspec.PromptBatch.from_tokens([prompts[i % len(prompts)] for i in range(most)],
                                          group_size=1, seed=purpose_key(0, BENCH_KEY))
    sampling = jspec.Sampling(max_new_tokens=args.max_new_tokens, temperature=args.temperature)
    speculation = jspec.Speculation(rule=args.rule, kernels=args.kernels)
    subject = cycle_costs.Subject.of(policy, draft, batch, sampling, speculation, jspec.Batching())
    subject = dataclasses.replace(subject, rows=tuple(sorted(args.rows, reverse=True)))
    computed = cycle_costs.prompts_of(subject)
    points = [(rows, k) for rows in args.rows
              for k in (None, *sorted({*args.k, cycle_costs.PROBED}))]
    return (cycle_costs.measured(subject, computed, points),
            cycle_costs.accepted(subject, computed))


def show(name: str, costs: Costs, title: str) -> None:
    ks = sorted({k for _, k, _ in costs.drafting})
    table = Table("rows", "no draft, ms", *(f"k = {k}" for k in ks), title=f"{name}: {title}")
    for rows, plain in sorted(costs.plain):
        cycles = [costs.of_drafting(rows, k) for k in ks]
        table.add_row(str(rows), f"{1e3 * plain:.4g}",
                      *(f"{1e3 * c:.4g} ({c / plain:.2f}x)" for c in cycles))
    screen().print(table)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns the result, which is what `--json` writes. Raises InputError for a mistake of the
    user's."""
    args = parse(arguments)
    source = open_source(args.model, [], args.dtype, bench_drafts.kinds(args))
    with jax.set_mesh(mesh_for(source.shape.config, math.gcd(*args.rows), "--rows")):
        return timed(args, source)


def timed(args: argparse.Namespace, source: Source) -> dict[str, Any]:
    """The result, measured on the current mesh."""
    texts = [record["prompt"] for record in read_jsonl(args.prompts, ("prompt",), "--prompts")]
    prompts = bench_drafts.encode(texts[:max(args.rows)], source.tokenizer)
    paths = bench_drafts.paths_of_run(args, source) | dict(args.draft_path)
    makers = {name: bench_drafts.choose_draft(name, source.shape, args.model, paths,
                                              source.tokenizer)
              for name in args.drafts}
    with telling(f"loading {args.model}"):
        policy = source.load_finite()
        drafts = {name: make(policy) for name, make in makers.items()}
        policy = jspec.reshard(policy).replace(kernels=choose(args.kernels))
    rows, title = [], f"{args.model}, {policy.dtype}, {args.rule}, {picked(args.kernels)}"
    for name, draft in drafts.items():
        costs, acceptance = time_draft(args, policy, draft, prompts)
        choice = choose_schedule(costs, acceptance, spread(max(args.rows), args.max_new_tokens))
        show(name, costs, title)
        said = reason(choice, costs, acceptance)
        screen().print(said, soft_wrap=True)
        rows.append({"draft": name, "costs": dataclasses.asdict(costs), "acceptance": acceptance,
                     "k": choice.k, "expected_speedup": choice.speedup, "reason": said})
    result = measure.report(rows, model=args.model, dtype=policy.dtype, rule=args.rule,
                            kernels=picked(args.kernels),
                            temperature=args.temperature, max_new_tokens=args.max_new_tokens)
    measure.write_json(args.json, result)
    return result


if __name__ == "__main__":
    sys.exit(cli.main(["bench", "cost", *sys.argv[1:]]))
