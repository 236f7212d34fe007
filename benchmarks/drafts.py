"""Compare drafters on the same prompts: acceptance, where a cycle's milliseconds go, tokens a
second, speed-up.

    jspec bench drafts smollm2-135m-instruct --drafts ngram,mtp --k 1,3,7 --batch 1,8 --json FILE

Lists are separated by commas or spaces. A drafter's options follow it: self:bits=4, and more after
further colons. Autoregressive decoding ("none") is always timed: speed-ups are over it, at the same
batch and temperature. Every drafter continues every prompt, `batch` of them at a time, all programs
in turn, chunk by chunk, so that a drifting machine drifts for all; figures are medians over rounds
of seconds over all prompts.

`cycle ms` is that of the rollouts, prefill taken out. `draft ms` and `verify ms` are programs of
their own (parts.py), and `rest ms` is what then remains of the cycle: the verdict, the commit, the
loop. `predicted` is the speed-up that acceptance and costs promise: tokens a cycle, times a plain
step over a cycle, each the sum of its parts (drafting, verification, verdict) timed apart. The
measured one also pays for prefill, and for rows that wait for the longest.
"""

import argparse
import dataclasses
import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

import jspec
from benchmarks import measure
from benchmarks.drafts_programs import (
    Variant,
    acceptance,
    features_of,
    part_ms,
    part_programs,
    part_times,
    rollout_programs,
)
from benchmarks.drafts_report import compared, draw, show
from benchmarks.options import (
    KERNELS_HELP,
    PLAIN,
    add_listed,
    drafter,
    named_drafter,
    one_of,
    open_results,
    split_options,
)
from jspec import cli
from jspec.choices import DTYPES, KERNELS, MIXED, RULES, SEED_HIGH
from jspec.drafts.base import Draft
from jspec.errors import InputError
from jspec.heads import shipped
from jspec.kernels import choose, picked
from jspec.model import ModelConfig, Policy
from jspec.prepare import around, check_fresh_draft, fresh_draft
from jspec.progress import telling
from jspec.purposes import BENCH_KEY, DRAFT_KEY, purpose_key
from jspec.rl.encode import encode_prompt
from jspec.rl.records import read_jsonl
from jspec.session import mesh_for
from jspec.sources import Source, open_source

HELDOUT = Path(__file__).parent / "prompts" / "heldout.jsonl"
COUNT = 24  # prompts, if nothing is said and batches are smaller
_UNIT = 16  # prompts are padded to a multiple of this


def named_path(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (equals and path):
        raise argparse.ArgumentTypeError(f"must be NAME=DIR, not {text!r}")
    return named_drafter()(name), path


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Raises InputError for whatever can be known to be wrong before the model is loaded."""
    parser = cli.Parser(prog="jspec bench drafts", description=__doc__)

    listed = partial(add_listed, parser)
    parser.add_argument("model", metavar="MODEL", help=cli.MODEL)
    listed("--drafts", drafter(PLAIN), [PLAIN, *jspec.drafts.DRAFTERS],
           "drafters, with options as NAME:KEY=VALUE")
    listed("--k", cli.number(int, 1), list(range(1, 8)), "tokens drafted a cycle")
    listed("--batch", cli.number(int, 1), [1], "prompts decoded together")
    listed("--temperature", cli.number(float, 0.0), [1.0], "0 is greedy")
    listed("--rule", one_of("rule", RULES), ["rejection"],
           f"how drafts are judged, of {', '.join(RULES)}")
    parser.add_argument("--max-new-tokens", type=cli.number(int, 1), default=64, metavar="N",
                        help="longest answer; an end token ends one earlier (default: 64)")
    parser.add_argument("--prompts", type=Path, default=HELDOUT, metavar="FILE.jsonl",
                        help='lines of {"prompt": "..."} (default: '
                        'benchmarks/prompts/heldout.jsonl)')
    parser.add_argument("--count", type=cli.number(int, 1), metavar="N",
                        help=f"only the first N prompts (default: {COUNT}, or all if there are "
                        "fewer)")
    parser.add_argument("--draft-path", type=named_path, action="append", default=[],
                        metavar="NAME=DIR", help="where a drafter's trained weights are, as "
                        "jspec.load_draft takes it; may be repeated")
    parser.add_argument("--rounds", type=cli.number(int, 1), default=3, metavar="N",
                        help="runs of every program, taken in turn (default: 3)")
    parser.add_argument("--seed", type=cli.number(int, 0, SEED_HIGH), default=0,
                        help="of the sampling noise (default: 0)")
    parser.add_argument("--kernels", choices=KERNELS, default="auto", help=KERNELS_HELP)
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, on a CPU float32")
    parser.add_argument("--json", metavar="FILE", help="write a list of records there")
    parser.add_argument("--plot", metavar="FILE.png",
                        help="draw acceptance and speed-up there (needs matplotlib)")
    args = parser.parse_args(arguments)
    args.draft_path = dict(args.draft_path)
    for name in args.draft_path.keys() - set(map(path_name, args.drafts)):
        given = any(split_options(other)[0] == name for other in args.drafts)
        raise InputError(f"--draft-path {name}=... is for a drafter that --drafts leaves out; add "
                         f"{name} to it" + ", without options, as a trained draft has its own"
                         * given)
    open_results(args)
    return args


def read_texts(args: argparse.Namespace) -> list[str]:
    """The prompts that are asked for. Raises InputError for a file that cannot be read, or with too
    few of them."""
    texts = [record["prompt"] for record in read_jsonl(args.prompts, ("prompt",), "--prompts")]
    wanted = args.count or min(max(COUNT, *args.batch), len(texts))
    if wanted > len(texts):
        raise InputError(f"--count {wanted} is more than the {len(texts)} prompts of "
                         f"{args.prompts}")
    if max(args.batch) > wanted:
        raise InputError(f"--batch {max(args.batch)} is more than the {wanted} prompts; lower it "
                         "or give more prompts")
    return texts[:wanted]


def encode(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """The prompts' token ids, within the tokenizer's chat template. Raises InputError."""
    try:
        return [encode_prompt(tokenizer, text) for text in texts]
    except Exception as error:  # tokenizers raise nothing narrower
        raise InputError(f"the model's tokenizer refuses one of the prompts ({error}); give others "
                         "by --prompts FILE.jsonl") from None


def check_positions(args: argparse.Namespace, config: ModelConfig,
                    prompts: list[list[int]]) -> None:
    """Raise InputError if the longest prompt, its answer and the drafts after it do not fit the
    model's positions."""
    longest, k = max(map(len, prompts)), max(args.k)
    if longest + args.max_new_tokens + k > config.max_position_embeddings:
        raise InputError(f"a prompt of {longest} tokens, --max-new-tokens {args.max_new_tokens} "
                         f"and --k {k} do not fit the model's {config.max_position_embeddings} "
                         "positions; lower one of them")


def path_name(name: str) -> str:
    """What a drafter is called where its trained weights are named: only a mixed one's options are
    beside what was trained."""
    kind, options = split_options(name)
    return kind if kind == MIXED and "draft" not in options else name


def trained(name: str, model_name: str, paths: dict[str, str]) -> str | None:
    """Where the drafter's trained weights come from, as `jspec.load_draft` takes it; None:
    nowhere."""
    name = path_name(name)
    return paths.get(name, model_name if shipped(model_name, name) else None)


def kinds(args: argparse.Namespace) -> list[str]:
    """The drafters that are asked for, without their options."""
    return [split_options(name)[0] for name in args.drafts if name != PLAIN]


def paths_of_run(args: argparse.Namespace, source: Source) -> dict[str, str]:
    """The run itself as where the weights of its own drafter are."""
    return {name: args.model for name in kinds(args) if source.holds(name)}


def choose_draft(name: str, shape: Policy, model_name: str, paths: dict[str, str],
                 tokenizer: Any = None) -> Callable[[Policy], Draft | None]:
    """What makes the drafter `name` of the policy (training layout): trained weights from `paths`,
    else those that ship with jspec, else (and always where it has options) fresh ones, with a
    warning where there would be something to train. Raises InputError, before any weights of the
    policy are read, for a path that holds no such draft, or options that the drafter does not
    take."""
    if name == PLAIN:
        return lambda policy: None
    path, (kind, options) = trained(name, model_name, paths), split_options(name)
    label = f"--drafts {kind}"
    made_by = jspec.drafts.find(kind, label)
    if path is None:
        check_fresh_draft(shape, made_by, options, label)
        if made_by.loss is not None:
            print(f"jspec: the {name} draft for {model_name} is untrained: few of its tokens will "
                  f"be accepted; a trained one is --drafts {kind} --draft-path {kind}=DIR",
                  file=sys.stderr)
        return partial(fresh_draft, key=purpose_key(1, DRAFT_KEY), drafter=made_by, options=options,
                       label=label)
    draft = around(shape, jspec.load_draft(shape, path, made_by, tokenizer), made_by, options,
                   label, f"--draft-path {name}={path}")
    return lambda policy: draft


def make_variants(args: argparse.Namespace) -> list[Variant]:
    """Of each temperature, plain decoding and then the rest."""
    names = [name for name in args.drafts if name != PLAIN]
    return [variant for temperature in args.temperature for variant in (
        Variant(PLAIN, 0, "rejection", temperature),
        *itertools.starmap(partial(Variant, temperature=temperature),
                           itertools.product(names, args.k, args.rule)))]


def make_batches(args: argparse.Namespace, prompts: list[list[int]],
                 size: int) -> list[jspec.PromptBatch]:
    """`size` prompts at a time, all padded to one length; what is left over in the end is left
    out."""
    length, key = -(-max(map(len, prompts)) // _UNIT) * _UNIT, purpose_key(args.seed, BENCH_KEY)
    return [jspec.PromptBatch.from_tokens(prompts[i:i + size], group_size=1, seed=key,
                                          buckets=(length,), sequence_ids=range(i, i + size))
            for i in range(0, len(prompts) - size + 1, size)]


def time_batch(args: argparse.Namespace, policy: Policy, drafts: dict[str, Draft | None],
               prompts: list[list[int]], size: int) -> list[dict[str, Any]]:
    """The records of one batch size, each variant's figures and its comparison with plain
    decoding."""
    batches, variants = make_batches(args, prompts, size), make_variants(args)
    rollouts = rollout_programs(args, policy, drafts, variants, batches)
    with telling(f"batch {size}: compiling the parts of a cycle"):
        programs = rollouts | part_programs(args, policy, drafts, variants, batches[0])
    with telling(f"batch {size}: compiling the rollouts", total=len(variants)) as advance:
        for variant in variants:  # all batches have one shape: the first compiles for the others
            jax.block_until_ready(rollouts["rollout", variant, 0]())
            advance()
    seconds, counts = defaultdict(list), {}
    with telling(f"batch {size}: timing", total=args.rounds * len(programs)) as advance:
        for key, taken, result in measure.in_turn(programs, args.rounds):
            seconds[key].append(taken)
            if key[0] == "rollout":
                counts[key] = jax.device_get(result)
            advance()
    records = []
    for variant in variants:
        keys = [("rollout", variant, number) for number in range(len(batches))]
        records.append(
            {"batch": size, **dataclasses.asdict(variant), "prompts": size * len(batches),
             **acceptance([counts[key] for key in keys]),
             "seconds": [sum(taken) for taken in zip(*(seconds[key] for key in keys), strict=True)],
             "prefill_s": len(batches) * measure.median(seconds["prefill", variant.draft]),
             **part_ms(seconds, variant, features_of(drafts[variant.draft]), part_times(args))})
    return compared(records)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Returns the records, which are what `--json` writes. Raises InputError for a mistake of the
    user's."""
    args = parse(arguments)
    texts, source = read_texts(args), open_source(args.model, [], args.dtype, kinds(args))
    prompts = encode(texts, source.tokenizer)
    check_positions(args, source.shape.config, prompts)
    with jax.set_mesh(mesh_for(source.shape.config, math.gcd(*args.batch), "--batch")):
        return timed(args, source, prompts)


def timed(args: argparse.Namespace, source: Source,
          prompts: list[list[int]]) -> list[dict[str, Any]]:
    """The records, measured on the current mesh."""
    paths = paths_of_run(args, source) | args.draft_path
    makers = {name: choose_draft(name, source.shape, args.model, paths, source.tokenizer)
              for name in dict.fromkeys((PLAIN, *args.drafts))}
    with telling(f"loading {args.model}"):
        policy = source.load_finite()
        drafts = {name: make(policy) for name, make in makers.items()}
        policy = jspec.reshard(policy).replace(kernels=choose(args.kernels))
    facts = {"model": args.model, "dtype": policy.dtype, "kernels": picked(args.kernels),
             "seed": args.seed, "max_new_tokens": args.max_new_tokens,
             "prompts_file": str(args.prompts), **measure.circumstances()}
    records = []
    for size in args.batch:
        records += [{**record, "trained": trained(record["draft"], args.model, paths), **facts}
                    for record in time_batch(args, policy, drafts, prompts, size)]
        measure.write_json(args.json, records)
    title = (f"{args.model}, {facts['dtype']}, up to {args.max_new_tokens} new tokens, "
             f"{facts['kernels']}")
    show(records, title)
    if args.plot:
        draw(records, title, args.plot)
    return records


if __name__ == "__main__":
    sys.exit(cli.main(["bench", "drafts", *sys.argv[1:]]))
