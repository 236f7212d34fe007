"""Whether what jspec makes runs in vLLM as it runs here: exported, loaded there beside the exported
policy, greedy text and acceptance compared.

    bash benchmarks/peers/install.sh PEERS                 # once; PEERS/vllm is what is needed
    python -m benchmarks.served PEERS --draft eagle3=RUN --json benchmarks/results/served_cpu.json

RUN is what `jspec draft export` takes for a draft. A kind whose draft is not given is left out, but
for `ngram`, which has nothing to be trained, and `draft_model`, which then is the policy itself
with noise in its matrices. The file is a list of records, and those of other kinds stay in it.

Prompts, answers and drafts are the same on both sides, in float32, at temperature 0: above it vLLM
0.32's CPU build reads temperatures that are not the request's. So texts are to be equal but for
ties, tokens whose logits differ by less than `TIE`; and so are cycles. Ours begin where vLLM's do,
behind the first token, which it takes from the prefill. What vLLM accepted behind an end token or
the cap is not counted here, and stands in the data as `behind`.

The two look-ups (`ngram`) are not the same: of the longest matches vLLM takes the first and stops
at the text's end, jspec the last, which it repeats. `replay` says what either is to accept. Nor
are the keys of a `dflash` of several layers, see `with_first_norm`. In how many rows this makes
what was counted, to the last cycle, stands in the data as `replayed`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

import jspec
from benchmarks import drafts as bench_drafts
from benchmarks import measure
from benchmarks.options import open_results, program
from benchmarks.served_answers import (
    NGRAM,
    Answer,
    Impossible,
    answer_of,
    counts,
    replay,
    same_cycles,
    theirs,
)
from benchmarks.versus import Failed, peer, run
from jspec import cli
from jspec.console import PlainConsole
from jspec.drafts import Draft
from jspec.drafts.parts import one_pass
from jspec.model import Policy, logits, train_forward

TIE = 1e-3
"""Between two logits of float32, in units of the logits: what products of other shapes may turn."""
FREE = ("ngram", "draft_model")
"""Drafts that need no training."""
BLUR = 0.15
"""The noise of a `draft_model` that is not given, in standard deviations of each matrix."""


class Kind(NamedTuple):
    """How one kind is served. draft: the kind of draft; export: options of `jspec draft export`;
    settings: of vLLM's `speculative_config`."""

    draft: str
    settings: Mapping[str, Any]
    export: tuple[str, ...] = ()


PARALLEL = {"method": "eagle3", "parallel_drafting": True}
KINDS = {
    "ngram": Kind("ngram", {"method": "ngram", "prompt_lookup_max": NGRAM,
                            "prompt_lookup_min": 1}),
    "draft_model": Kind("draft_model", {"method": "draft_model"}),
    "eagle3": Kind("eagle3", {"method": "eagle3"}, ("--layout", "specforge")),
    "eagle3, speculators": Kind("eagle3", {"method": "eagle3"}, ("--layout", "speculators")),
    "peagle": Kind("peagle", PARALLEL, ("--layout", "specforge")),
    "peagle, speculators": Kind("peagle", PARALLEL, ("--layout", "speculators")),
    "dflash": Kind("dflash", {"method": "dflash"}, ("--layout", "specforge")),
    "dflash, speculators": Kind("dflash", {"method": "dflash"}, ("--layout", "speculators")),
}


# --- there ---


def blurred(policy: Policy) -> Policy:
    """The policy with noise in the matrices of its layers, in the training layout."""
    leaves, tree = jax.tree.flatten(policy.weights["layers"])
    keys = jax.random.split(jax.random.key(0), len(leaves))
    layers = tree.unflatten([
        x + BLUR * x.std() * jax.random.normal(key, x.shape, x.dtype) if x.ndim > 2 else x
        for x, key in zip(leaves, keys, strict=True)])
    return policy.replace(weights={**policy.weights, "layers": layers})


def exported(args: argparse.Namespace, policy: Policy, kind: Kind,
             directory: Path) -> tuple[Draft, dict[str, Any]]:
    """A draft as it is read back from what was written for vLLM, and vLLM's settings for it.
    policy: in the training layout. Raises Failed."""
    settings = {**kind.settings, "num_speculative_tokens": args.k}
    if kind.draft == "ngram":
        return jspec.drafts.find("ngram").init(policy, max_ngram=NGRAM), settings
    source = args.draft.get(kind.draft)
    if source is None:
        source = str(jspec.export(blurred(policy), directory.with_suffix(".blurred")))
    run([sys.executable, "-m", "jspec", "draft", "export", args.model, source, str(directory),
         *kind.export], args.timeout)
    return jspec.load_draft(policy, directory), {**settings, "model": str(directory)}


def served(args: argparse.Namespace, folder: Path,
           settings: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """What vLLM makes of each prompt: the lines of `peers/vllm_served.py`. Raises Failed."""
    return peer(args, "vllm", "vllm_served.py", str(folder / "policy"),
                str(folder / "prompts.jsonl"), "--new-tokens", str(args.max_new_tokens),
                "--speculative", json.dumps(settings))


# --- here ---


def ours(args: argparse.Namespace, policy: Policy, draft: Draft | None,
         prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Answer]:
    """Greedy answers, a prompt at a time, so that each has its own counts; all in one program."""
    width = max(map(len, prompts))

    def answer(prompt: Sequence[int]) -> Answer:
        out = jax.device_get(jspec.rollout(
            policy, draft,
            jspec.PromptBatch.from_tokens([prompt], group_size=1, seed=0, buckets=(width,)),
            sampling=jspec.Sampling(max_new_tokens=new_tokens, temperature=0.0),
            speculation=jspec.Speculation(k=args.k, rule="coupled")))
        return Answer(out.tokens[0, :out.lengths[0]].tolist(), int(out.stats.cycles[0]),
                      out.stats.accepted.tolist())

    return [answer(prompt) for prompt in prompts]


def behind_the_first(args: argparse.Namespace, policy: Policy, draft: Draft,
                     prompts: Sequence[Sequence[int]], alone: Sequence[Answer]) -> list[Answer]:
    """Ours with a draft, from where vLLM's drafts begin."""
    firsts = [answer.tokens[:1] for answer in alone]
    out = ours(args, policy, draft, [[*prompt, *first] for prompt, first
                                     in zip(prompts, firsts, strict=True)],
               args.max_new_tokens - 1)
    ended = [first[0] in policy.config.stop_tokens for first in firsts]
    return [Answer(first, 0, [0] * args.k) if over
            else answer._replace(tokens=[*first, *answer.tokens])
            for first, answer, over in zip(firsts, out, ended, strict=True)]


def with_first_norm(draft: Draft) -> Draft:
    """A DFlash draft as vLLM's CPU build runs it: over the context the keys of all layers are
    normed with the first one's weight (`findings/vllm_cpu_dflash_key_norm.sh`)."""
    def first(draft: Draft) -> Draft:
        layers = draft.weights["layers"]
        return draft.replace(weights={**draft.weights, "layers": [
            {**layer, "k_norm": layers[0]["k_norm"]} for layer in layers]})

    return draft.replace(drafter=draft.drafter._replace(
        start=lambda policy, draft, *rest: one_pass.start(policy, first(draft), *rest),
        observe=lambda policy, draft, *rest: one_pass.observe(policy, first(draft), *rest)))


# --- what is compared ---


class Part(NamedTuple):
    """Where two answers part: after `at` tokens, whose logits differ by `margin`."""

    row: int
    at: int
    margin: float


@jax.jit
def _logits(policy: Policy, tokens: jax.Array, at: jax.Array) -> jax.Array:
    return logits(policy, train_forward(policy, tokens[None]).hidden[0, at])


def parted(policy: Policy, prompts: Sequence[Sequence[int]], one: Sequence[Answer],
           other: Sequence[Answer], width: int) -> list[Part]:
    """The rows whose tokens are not the same. The margin is this policy's, of the two tokens at the
    first place where they differ; width: no less than a prompt and its answer."""
    found = []
    for row, (prompt, a, b) in enumerate(zip(prompts, one, other, strict=True)):
        if a.tokens == b.tokens:
            continue
        at = next(i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)) if x != y)
        before = [*prompt, *a.tokens[:at]]
        padded = jnp.array(before + [0] * (width - len(before)), jnp.int32)
        row_logits = np.asarray(_logits(policy, padded, jnp.int32(len(before) - 1)))
        margin = abs(float(row_logits[a.tokens[at]] - row_logits[b.tokens[at]]))
        found.append(Part(row, at, margin))
    return found


def compare(args: argparse.Namespace, policy: Policy, name: str, draft: Draft,
            prompts: Sequence[Sequence[int]], alone: tuple[Sequence[Answer], Sequence[Answer]],
            lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The record of a kind. alone: vLLM's answers and ours, without a draft; lines: vLLM's with it.
    Raises Impossible."""
    is_ngram = KINDS[name].draft == "ngram"
    there = [theirs(line, args.k, replay(prompt, line["tokens"], args.k, first=True)
                    if is_ngram else None) for prompt, line in zip(prompts, lines, strict=True)]
    here = behind_the_first(args, policy, draft, prompts, there)
    width = max(map(len, prompts)) + args.max_new_tokens
    pairs = {"vllm_alone": (alone[0], there), "jspec_alone": (alone[1], there),
             "jspec": (here, there)}
    parts = {what: parted(policy, prompts, *pair, width) for what, pair in pairs.items()}
    margins = [part.margin for found in parts.values() for part in found]
    apart = {part.row for part in parts["jspec"]}
    alike = [row for row in range(len(prompts)) if row not in apart]
    record = {"draft": name, "model": args.model, "tie": TIE, "k": args.k,
              "settings": dict(KINDS[name].settings), "prompts": len(prompts),
              "same_text": {what: len(prompts) - len(found) for what, found in parts.items()},
              "parts": {what: [part._asdict() for part in found] for what, found in parts.items()},
              "ties": all(margin < TIE for margin in margins),
              "rows_compared": len(alike),
              "same_cycles": same_cycles([here[row] for row in alike],
                                         [there[row] for row in alike]),
              "jspec": counts(here), "vllm": counts(there)}
    if is_ngram:
        said = [answer_of(a.tokens, [n for _, n in replay(prompt, a.tokens, args.k, first=False)],
                          args.k)
                for prompt, a in zip(prompts, here, strict=True)]
        record["replayed"] = same_cycles(here, said)
    elif draft.name == "dflash" and draft.config.block.num_layers > 1:
        record["replayed"] = same_cycles(there, behind_the_first(
            args, policy, with_first_norm(draft), prompts, there))
    return record


def show(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    table = Table("draft", "same text as vLLM alone", "as jspec", "same cycles",
                  "tokens a cycle, vLLM", "jspec", "by position, vLLM", "jspec", title=title)
    for row in rows:
        sides = row["vllm"], row["jspec"]
        table.add_row(row["draft"], *(f"{row['same_text'][what]} of {row['prompts']}"
                                      for what in ("vllm_alone", "jspec")),
                      f"{row['same_cycles']} of {row['rows_compared']}",
                      *(f"{side['acceptance_length']:.3f}" for side in sides),
                      *("  ".join(f"{x:.1%}" for x in side["acceptance_by_position"])
                        for side in sides))
    PlainConsole(width=max(140, PlainConsole().width)).print(table)


def draft_at(text: str) -> tuple[str, str]:
    """A parser of KIND=PATH."""
    name, equals, path = text.partition("=")
    known = dict.fromkeys(kind.draft for kind in KINDS.values() if kind.draft != "ngram")
    if not (equals and path) or name not in known:
        raise argparse.ArgumentTypeError(f"must be KIND=PATH, of {', '.join(known)}, not {text!r}")
    return name, path


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Raises InputError for whatever can be known to be wrong before the model is loaded."""
    parser = cli.Parser(prog="python -m benchmarks.served", description=__doc__)
    parser.add_argument("peers", type=Path, help="where install.sh put the peers")
    parser.add_argument("--model", default="smollm2-135m-instruct", help=cli.MODEL)
    parser.add_argument("--draft", type=draft_at, action="append", default=[], metavar="KIND=PATH",
                        help="a trained draft, as `jspec draft export` takes it; may be repeated")
    parser.add_argument("--only", nargs="+", choices=KINDS, metavar="KIND",
                        help=f"of {', '.join(KINDS)} (default: all that a draft is there for)")
    parser.add_argument("--k", type=cli.number(int, 1), default=3, help="tokens drafted a cycle")
    parser.add_argument("--count", type=cli.number(int, 1), default=32, metavar="N",
                        help="the first N held-out prompts (default: 32)")
    parser.add_argument("--max-new-tokens", type=cli.number(int, 2), default=64, metavar="N")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one program")
    parser.add_argument("--json", metavar="FILE", help="put the results in there")
    args = parser.parse_args(arguments)
    args.draft, args.peers = dict(args.draft), args.peers.resolve()
    args.prompts, args.batch = bench_drafts.HELDOUT, [1]  # what `read_texts` reads
    args.others = kept(args)
    open_results(args)
    return args


def given(args: argparse.Namespace) -> list[str]:
    """The kinds that a draft is there for."""
    return [name for name, kind in KINDS.items() if kind.draft in {*args.draft, *FREE}
            and (not args.only or name in args.only)]


def kept(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of other kinds in the file of --json."""
    path = args.json and Path(args.json)
    found = json.loads(path.read_text()) if path and path.is_file() else []
    return [row for row in found if row["draft"] not in given(args)]


def in_order(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Records in the order of `KINDS`."""
    return sorted(rows, key=lambda row: list(KINDS).index(row["draft"]))


def measured(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """The record of every kind, in a folder that exports go to."""
    console = PlainConsole(stderr=True)
    tokenizer = jspec.load_tokenizer(args.model)
    prompts = bench_drafts.encode(bench_drafts.read_texts(args), tokenizer)
    trained = jspec.load(args.model, dtype="float32")
    jspec.export(trained, folder / "policy", tokenizer)
    policy = jspec.reshard(trained)
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"tokens": tokens}) + "\n" for tokens in prompts))
    alone = ([answer_of(line["tokens"], [], args.k) for line in served(args, folder, None)],
             ours(args, policy, None, prompts, args.max_new_tokens))
    for number, name in enumerate(given(args)):
        console.print(f"{name} (load {os.getloadavg()[0]:.1f})")
        try:
            draft, settings = exported(args, trained, KINDS[name], folder / str(number))
            lines = served(args, folder, settings)
            yield compare(args, policy, name, draft, prompts, alone, lines)
        except (Failed, Impossible) as error:
            console.print(f"{name} failed: {error}", markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 1 if a kind that a draft is there for has no record, or parted otherwise than
    by a tie."""
    args = parse(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for row in measured(args, Path(folder)):
            rows.append({**row, **measure.circumstances()})
            measure.write_json(args.json, in_order(args.others + rows))
    show(rows, f"{args.model}, k = {args.k}, temperature 0")
    return int(len(rows) < len(given(args)) or not all(row["ties"] for row in rows))


if __name__ == "__main__":
    program(main)
