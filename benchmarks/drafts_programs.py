"""What `jspec bench drafts` times, and what it reads from that: rollouts, and their parts."""

import argparse
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import jspec
from benchmarks import measure, parts
from benchmarks.options import PLAIN
from jspec.drafts.base import Draft, Proposal
from jspec.model import Policy

TIMES = 16  # runs of a part within its program


@dataclasses.dataclass(frozen=True)
class Variant:
    """What one record is about, at one batch size. `none` has k = 0, and runs under the rejection
    rule."""

    draft: str
    k: int
    rule: str
    temperature: float


def rollout_programs(args: argparse.Namespace, policy: Policy, drafts: dict[str, Draft | None],
                     variants: list[Variant],
                     batches: list[jspec.PromptBatch]) -> dict[Any, Callable[[], Any]]:
    """("rollout", variant, number of the batch) -> a program that gives lengths and statistics."""
    def run(variant: Variant, batch: jspec.PromptBatch):
        sampling = jspec.Sampling(max_new_tokens=args.max_new_tokens,
                                  temperature=variant.temperature)
        speculation = jspec.Speculation(k=variant.k, rule=variant.rule, kernels=args.kernels)
        out = jspec.rollout(policy, drafts[variant.draft], batch, sampling=sampling,
                            speculation=speculation)
        return out.lengths, out.stats

    return {("rollout", variant, number): partial(run, variant, batch)
            for number, batch in enumerate(batches) for variant in variants}


def features_of(draft: Draft | None) -> tuple[int, ...]:
    return () if draft is None else draft.drafter.features(draft.config)


def part_programs(args: argparse.Namespace, policy: Policy, drafts: dict[str, Draft | None],
                  variants: list[Variant],
                  batch: jspec.PromptBatch) -> dict[Any, Callable[[], Any]]:
    """("prefill", drafter), ("verify", k, features), ("draft", variant) and ("verdict", variant) ->
    a program. Each has run once: what it gives is what the next part is given."""
    programs: dict[Any, Callable[[], Any]] = {}

    def run(key: Any, function: Callable, *arguments: Any, **options: Any) -> Any:
        programs[key] = partial(function, *arguments, **options)
        return jax.block_until_ready(programs[key]())

    sampling = jspec.Sampling(max_new_tokens=args.max_new_tokens, temperature=1.0)
    key, times = jax.random.key_data(batch.key), part_times(args)
    begun, prepared, computed = {}, {}, {}
    for name, draft in drafts.items():
        started = run(("prefill", name), parts.prefill, policy, draft, batch, sampling,
                      k=max(args.k))
        # they are alike
        begun[name] = started if name == PLAIN else started.replace(cache=begun[PLAIN].cache)
        prepared[name] = jax.jit(parts.prepare)(policy, draft)
    for variant in variants:
        draft = prepared[variant.draft]
        pass_key = ("verify", variant.k, features_of(draft))
        if pass_key not in computed:
            computed[pass_key] = run(pass_key, parts.verification, policy, begun[PLAIN],
                                     k=variant.k, features=pass_key[2], times=times)
        trunk, scores = computed[pass_key]
        mine = begun[variant.draft]
        at = jnp.full(batch.lengths.shape, variant.temperature)
        mine = mine.replace(sequences=mine.sequences.replace(temperature=at))
        proposal = Proposal(jnp.zeros((len(batch.lengths), 0), jnp.int32))
        if draft is not None:
            proposal = run(("draft", variant), parts.drafting, policy, draft, mine, trunk, key,
                           rule=variant.rule, k=variant.k, times=times)
        run(("verdict", variant), parts.verdict, policy, mine, scores, proposal, key,
            rule=variant.rule)
    return programs


def part_times(args: argparse.Namespace) -> int:
    return min(TIMES, args.max_new_tokens)


def acceptance(counts: list[tuple[Any, Any]]) -> dict[str, Any]:
    """Over all batches' (lengths, statistics): tokens, `cycles` (of each batch's longest row, which
    is how often the loop ran), tokens a cycle of a row, and the share accepted at each position."""
    stats = jax.tree.map(lambda *x: sum(x),
                         *(stats.replace(cycles=stats.cycles.sum()) for _, stats in counts))
    tokens = int(sum(lengths.sum() for lengths, _ in counts))
    return {"tokens": tokens, "cycles": int(sum(stats.cycles.max() for _, stats in counts)),
            "acceptance_length": tokens / int(stats.cycles),
            "acceptance_by_position": parts.by_position(stats).tolist()}


def part_ms(seconds: dict[Any, list[float]], variant: Variant, features: tuple[int, ...],
            times: int) -> dict[str, float]:
    """Milliseconds of a cycle's parts, each a program of its own."""
    drafting = measure.median(seconds["draft", variant]) / times if variant.k else 0.0
    return {"draft_ms": 1e3 * drafting,
            "verify_ms": 1e3 * measure.median(seconds["verify", variant.k, features]) / times,
            "accept_ms": 1e3 * measure.median(seconds["verdict", variant])}
