"""What a cycle costs on this device with this draft, and how much of the draft is accepted: short
runs of the decode loop itself, for a few (rows, k). Costs are kept in jspec's cache, for a device,
a jax and shapes; acceptance is of the weights as they are, and asked anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jspec import __version__
from jspec.compile_cache import kind_of_machine
from jspec.distributed import fetch, from_main, is_main
from jspec.drafts import Draft, Drafter
from jspec.hub.names import cache_directory
from jspec.kernels import picked
from jspec.model import Policy
from jspec.progress import telling
from jspec.sharding import batch_shards, constrain, current_mesh
from jspec.speculate.loops import loops
from jspec.speculate.results import Rollout
from jspec.speculate.rollout import Prefilled, continue_prompts, prefill_prompts, ready
from jspec.speculate.schedule import Costs
from jspec.speculate.types import Batching, PromptBatch, Sampling, Speculation

log = logging.getLogger(__name__)

CAP = 64
"""The most tokens of a sequence in a timed run."""
CONTEXT = 1024
"""Positions at most by which a row is longer than its prompt when it is timed: half of what it may
grow to."""
PROBED, PROBE_TOKENS = 3, 16
"""Drafts a cycle and tokens a sequence of the rollout that shows what is accepted."""
ROUNDS, QUICK_ROUNDS, FEWEST, LEAST_SECONDS = 3, 11, 3, 0.3
"""Timed runs of every point, taken in turn, more where all are quick; the fewest cycles of one, and
what they should take at least."""

Point = tuple[int, int | None]
"""(rows, k) of what is timed; k = None: without a draft."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is measured: rollouts of `batch` with this policy and draft. `rows`: of one shard, by
    loop of the chain; `length`: positions of a row's context; `longest`: what a sequence may
    generate."""

    params: Policy
    draft: Draft
    batch: PromptBatch
    sampling: Sampling
    speculation: Speculation
    rows: tuple[int, ...]
    shards: int
    length: int
    longest: int

    @classmethod
    def of(cls, params: Policy, draft: Draft, batch: PromptBatch, sampling: Sampling,
           speculation: Speculation, batching: Batching) -> Subject:
        prompts, bucket = batch.tokens.shape
        shards = batch_shards("rollout" if params.stacked else params.layout)
        sequences = prompts * batch.group_size
        chain = loops(min(batching.slots or sequences, sequences) // shards, 0,
                      sampling.max_new_tokens)
        cap = min(CAP, max(2, sampling.max_new_tokens))
        length = min(bucket + min(sampling.max_new_tokens // 2, CONTEXT),
                     params.config.max_position_embeddings - cap - PROBED)
        temperature = jnp.asarray(sampling.temperature, jnp.float32).max()
        top_p = None if sampling.top_p is None else jnp.asarray(sampling.top_p, jnp.float32).min()
        min_p = None if sampling.min_p is None else jnp.asarray(sampling.min_p, jnp.float32).max()
        short = Sampling(max_new_tokens=cap, temperature=temperature, top_k=sampling.top_k,
                         top_p=top_p, min_p=min_p, stop_tokens=())
        # k must not follow from the noise that judges: that of the batch is not to be used before
        # its rollout
        batch = batch.replace(key=jax.random.fold_in(batch.key, 2**32 - 1))
        return cls(params, draft, batch, short, speculation, tuple(rows for rows, _ in chain),
                   shards, max(length, bucket), sampling.max_new_tokens)

    def named(self) -> str:
        """In words what the costs depend on; weights only by their shapes."""
        shapes = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}",
                              (self.draft.weights, self.draft.state))
        policy, device = self.params, jax.devices()[0]
        return repr((__version__, kind_of_machine(), device.platform, device.device_kind,
                     dict(current_mesh().shape) or None, policy.config, policy.dtype, policy.layout,
                     self.draft.name, digest(self.draft.drafter), self.draft.config, shapes,
                     self.batch.tokens.shape, self.batch.group_size, self.rows, self.length,
                     self.sampling.max_new_tokens, self.sampling.top_k, self.sampling.top_p is None,
                     self.sampling.min_p is None,
                     self.speculation.rule, picked(self.speculation.kernels),
                     self.speculation.depths))


def digest(drafter: Drafter) -> str:
    """Of the files that a drafter's functions are in: what their programs cost is known for the
    code as it is."""
    modules = (sys.modules.get(getattr(function, "__module__", None)) for function in drafter)
    files = sorted({Path(module.__file__) for module in modules
                    if getattr(module, "__file__", None)})
    return hashlib.sha256(b"".join(file.read_bytes() for file in files
                                   if file.is_file())).hexdigest()[:16]


@partial(jax.jit, static_argnames=("length", "speculation"))
def _prompts(params: Policy, draft: Draft, batch: PromptBatch, *, length: int,
             speculation: Speculation) -> Prefilled:
    """The prompts, computed with room for `length` positions."""
    policy, draft = ready(params, draft, speculation)
    tokens = jnp.pad(batch.tokens, ((0, 0), (0, length - batch.tokens.shape[1])))
    return prefill_prompts(policy, draft, batch.replace(tokens=tokens), speculation.depths)


@partial(jax.jit, static_argnames=("rows", "shards", "group_size", "speculation"))
def _cycles(params: Policy, draft: Draft | None, prompts: Prefilled, key: jax.Array,
            sampling: Sampling, *, rows: int,
            shards: int, group_size: int, speculation: Speculation) -> Rollout:
    """One loop of that many rows a shard, which continue the prompts in turn."""
    policy, draft = ready(params, draft, speculation)
    group_size = math.gcd(rows, group_size)
    index = np.resize(np.arange(len(prompts.lengths)), rows * shards // group_size)
    prompts = jax.tree.map(lambda x: constrain(jnp.take(x, index, axis=0), policy.layout, "batch",
                                               *(None,) * (x.ndim - 1)), prompts)
    if draft is None:
        prompts = prompts.replace(draft_rows=None, draft_key_values=())
    batch = PromptBatch(prompts.tokens, prompts.lengths, jnp.arange(rows * shards), key, group_size)
    # all of what a rollout returns: what nobody wanted would not be computed
    return continue_prompts(policy, draft, prompts, batch, sampling, speculation, Batching())


def _run(subject: Subject, prompts: Prefilled, point: Point, limit: int) -> Rollout:
    rows, k = point
    # a bound above the rows there are keeps the draft where the loop drafts nothing
    drafted = {None: 0, 0: ((rows, 0), (rows + 1, 1))}.get(k, k)
    return _cycles(subject.params, None if k is None else subject.draft, prompts, subject.batch.key,
                   subject.sampling.replace(limit=np.int32(limit)), rows=rows,
                   shards=subject.shards, group_size=subject.batch.group_size,
                   speculation=subject.speculation.replace(k=drafted))


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    out = jax.block_until_ready(run())
    return time.perf_counter() - begin, out


def _cycles_of(out: Rollout) -> int:
    """Of the shard that had the most."""
    return int(fetch(out.stats.loop_cycles).sum(-1).max())


def _time(subject: Subject, prompts: Prefilled,
          points: Sequence[Point]) -> dict[Point, tuple[float, float, float]]:
    """(seconds of a cycle, seconds of the rest of its program, seconds of compiling) of each
    point."""
    prompts = prompts.replace(lengths=prompts.lengths * 0 + subject.length)
    cap, limits, compiling, slow = subject.sampling.max_new_tokens, [], [], False

    def run(point: Point, limit: int) -> tuple[float, Rollout]:
        return _timed(lambda: _run(subject, prompts, point, limit))

    for point in points:
        first, once, some = (run(point, limit)[0] for limit in (1, 1, min(1 + FEWEST, cap)))
        cycles = max(FEWEST, math.ceil(FEWEST * LEAST_SECONDS / max(some - once, 1e-6)))
        limits.append(min(1 + cycles, cap))
        compiling.append(max(0.0, first - once))
        slow |= some > LEAST_SECONDS
    rounds, *limits = json.loads(from_main(  # the same work on every process
        lambda: json.dumps([ROUNDS if slow else QUICK_ROUNDS, *limits])))
    runs: dict[Point, list[tuple[float, int, float, int]]] = {point: [] for point in points}
    for _ in range(rounds):
        for point, limit in zip(points, limits, strict=True):
            (short, one), (long, many) = run(point, 1), run(point, limit)
            runs[point].append((short, _cycles_of(one), long, _cycles_of(many)))
    return {point: (*_split(*map(statistics.median, zip(*of, strict=True))), took)
            for (point, of), took in zip(runs.items(), compiling, strict=True)}


def _split(short: float, few: float, long: float, many: float) -> tuple[float, float]:
    """(seconds of a cycle, seconds of the rest) of runs with few and with many cycles. A tenth of
    all is the cycles' at least: the difference of runs that took next to nothing may be
    anything."""
    cycle = max((long - short) / max(1, many - few), 0.1 * long / max(1, many))
    return cycle, max(0.0, short - few * cycle)


def prompts_of(subject: Subject) -> Prefilled:
    return _prompts(subject.params, subject.draft, subject.batch, length=subject.length,
                    speculation=subject.speculation.replace(k=0))


def accepted(subject: Subject, prompts: Prefilled) -> tuple[float, ...]:
    """By draft position, how often the drafts up to it are accepted at the beginning of answers to
    these prompts."""
    stats = _run(subject, prompts, (subject.rows[0], PROBED),
                 min(PROBE_TOKENS, subject.sampling.max_new_tokens)).stats
    drafted, taken = fetch((stats.drafted, stats.accepted))
    return tuple((taken / np.maximum(drafted, 1)).tolist())


def needed(subject: Subject) -> list[Point]:
    """What every choice rests on: the first and the last loop without a draft, and with one."""
    return [(rows, k) for rows in sorted({subject.rows[0], subject.rows[-1]})
            for k in (None, PROBED)]


def measured(subject: Subject, prompts: Prefilled, points: Sequence[Point],
             costs: Costs | None = None) -> Costs:
    """`costs` with these points too; None: of these alone, `needed` among them. The same on every
    process: what the first one measured, which is kept for later commands too."""
    with telling("measuring what a cycle costs"):
        timed = _time(subject, prompts, points)
        start = costs.start if costs else _start(subject, prompts, timed)
    plain = [*(costs.plain if costs else ()),
             *((rows, t[0]) for (rows, k), t in timed.items() if k is None)]
    drafting = [*(costs.drafting if costs else ()),
                *((*at, t[0]) for at, t in timed.items() if at[1] is not None)]
    compiling = costs.compiling if costs else sum(t[2] for t in timed.values())
    mine = Costs(subject.rows, subject.shards, tuple(plain), tuple(drafting), start, compiling)
    made = Costs.from_json(json.loads(from_main(lambda: json.dumps(dataclasses.asdict(mine)))))
    _keep(subject, made)
    return made


def _start(subject: Subject, prompts: Prefilled,
           timed: dict[Point, tuple[float, float, float]]) -> float:
    """Seconds that a draft takes in the beginning: to be prepared, and to see the prompts. Of the
    second they take together the draft's part is that of its layers."""
    rows = subject.rows[0]
    seconds, _ = _timed(lambda: prompts_of(subject))
    layers = len(prompts.draft_key_values), subject.params.config.num_layers
    seeing = seconds * layers[0] / sum(layers) * subject.batch.tokens.shape[1] / subject.length
    return max(0.0, timed[rows, PROBED][1] - timed[rows, None][1]) + seeing


# --- kept between runs ---


def _file(subject: Subject) -> Path:
    return (cache_directory() / "costs"
            / f"{hashlib.sha256(subject.named().encode()).hexdigest()[:16]}.json")


def kept(subject: Subject) -> Costs | None:
    """What an earlier command measured of the same, or None."""
    def read() -> str:
        try:
            found = json.loads(_file(subject).read_text())
            return json.dumps(dataclasses.asdict(Costs.from_json(found["costs"])))
        except (OSError, ValueError, KeyError, TypeError):
            # not there, or not whole: it is measured anew
            return "null"

    found = json.loads(from_main(read))
    return found and Costs.from_json(found)


def _keep(subject: Subject, costs: Costs) -> None:
    """For the next command. A cache that cannot be written to costs no more than measuring
    again."""
    if not is_main():
        return
    path = _file(subject)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text(json.dumps({"of": subject.named(),
                                                        "costs": dataclasses.asdict(costs)}))
        path.with_suffix(".tmp").replace(path)
    except OSError as error:
        log.warning("%s cannot be written (%s): what cycles cost is measured again next time", path,
                    error.strerror)
