"""Drives `jspec.speculate.cycle.cycle` over every accept, refuse and draw, cycle after cycle.

Noise is the cycle's argument, and every uniform enters by a step function of 2^24 values. The thresholds are not
presupposed: they are found in the code's own behaviour by bisection, one uniform after the other, for thousands of rows
at once. An outcome's weight is the share of uniform values that lead to it, exactly.
"""

import importlib
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import jspec
from jspec.speculate import Sampling
from pallas_kernels.noise import RejectionNoise

cycle_module = importlib.import_module("jspec.speculate.cycle")
rollout_module = importlib.import_module("jspec.speculate.rollout")

LEVELS = 2**24
WAYS = 8  # an interval that holds a step is cut in so many
ROWS = 1024  # rows of one call
STATES = 512  # rows of the pool of states


class Cycle:
    """The jitted cycle on rows gathered from a pool of states, with its drafts and verdicts made visible."""

    def __init__(self, policy, draft, prompt, sampling, k):
        self.policy = jspec.reshard(policy)
        self.draft, self.k, self.sampling, self.vocab = draft, k, sampling, policy.config.vocab_size
        if draft is not None:
            self.draft = draft.module.prepare(self.policy, draft)
        batch = jspec.PromptBatch.from_tokens([prompt], group_size=1, seed=0, buckets=(len(prompt),))
        self.prompt_length = len(prompt)
        first = jax.jit(partial(rollout_module.start, k=k))(self.policy, self.draft, batch, sampling)
        self.first = _pool([(first, 1)])
        self._step = jax.jit(self._trace)

    def _trace(self, policy, draft, pool, rows, noise):
        slots = _map_rows(lambda x: x[rows], pool)
        seen = {}

        def propose(*args):
            seen["drafted"] = _PROPOSE(*args)
            return seen["drafted"]

        def judge(*args, **kwargs):
            seen["verdict"] = _JUDGE(*args, **kwargs)
            return seen["verdict"]

        with mock.patch.object(cycle_module, "_propose", propose), \
                mock.patch.object(cycle_module, "judge", judge):
            new = cycle_module.cycle(policy, draft, slots, noise, sampling=self.sampling,
                                     stop_tokens=self.sampling.stop_tokens, k=self.k)
        return new, seen["drafted"][0].tokens, seen["verdict"]

    def run(self, pool, rows, noise):
        """(new Slots, outcome codes int64) of rows [R] of the pool, in calls of fixed size."""
        slots, codes = [], []
        for at in range(0, len(rows), ROWS):
            some, part = rows[at:at + ROWS], noise[at:at + ROWS]
            pad = ROWS - len(some)
            new, drafted, verdict = self._step(self.policy, self.draft, pool, np.pad(some, (0, pad)),
                                               self._noise(np.pad(part, ((0, pad), (0, 0)))))
            slots.append((new, len(some)))
            codes.append(self._code(drafted, verdict)[:len(some)])
        return slots, np.concatenate(codes)

    def finals(self, slots):
        """(generated tokens, stopped, done) of every row."""
        tokens, lengths, stopped, done = map(np.asarray, (slots.tokens, slots.lengths, slots.stopped, slots.done))
        return [(tuple(map(int, t[self.prompt_length:n])), bool(s), bool(d))
                for t, n, s, d in zip(tokens, lengths, stopped, done, strict=True)]

    def _noise(self, levels):
        u = jnp.asarray((levels / LEVELS).astype(np.float32))
        k = self.k
        return RejectionNoise(u[:, :2 * k].reshape(-1, k, 2), u[:, 2 * k:3 * k], u[:, 3 * k:])

    def _code(self, drafted, verdict):
        """One number for all that a cycle decided: drafts, how many were accepted, and the tokens emitted."""
        accepted, tokens = np.asarray(verdict.accepted, np.int64), np.asarray(verdict.tokens, np.int64)
        code = accepted
        for column in np.asarray(drafted, np.int64).T:
            code = code * self.vocab + column
        for j, column in enumerate(tokens.T):
            code = code * (self.vocab + 1) + np.where(j <= accepted, column, self.vocab)
        return code


_PROPOSE, _JUDGE = cycle_module._propose, cycle_module.judge


def _map_rows(fn, slots, *more):
    """fn over the leaves that lead with rows; the counters by draft position do not."""
    rows = [s.replace(drafted=None, accepted=None) for s in (slots, *more)]
    return jax.tree.map(fn, *rows).replace(drafted=slots.drafted, accepted=slots.accepted)


def _pool(parts):
    """One pool of the leading n rows of each (slots, n), of at least STATES rows: each size is a compilation."""
    count = sum(n for _, n in parts)
    size = max(STATES, count)

    def join(*leaves):
        x = np.concatenate([np.asarray(leaf)[:n] for leaf, (_, n) in zip(leaves, parts, strict=True)])
        return np.pad(x, ((0, size - count), *((0, 0),) * (x.ndim - 1)))

    return _map_rows(join, *(slots for slots, _ in parts))


def _cells(evaluate, count):
    """All constant pieces of `count` step functions on 0 .. LEVELS - 1: (row, representative, width) arrays.

    A piece between two equal values is found only if it is wider than LEVELS / WAYS: steps are monotone elsewhere.
    """
    row = np.arange(count)
    low, high = np.zeros(count, np.int64), np.full(count, LEVELS - 1)
    ends = evaluate(np.tile(row, 2), np.concatenate([low, high])).reshape(2, -1)
    below, above = ends
    steps = [(row, low)]
    while len(row):
        inner = [low + (high - low) * i // WAYS for i in range(1, WAYS)]
        values = [below, *evaluate(np.tile(row, WAYS - 1), np.concatenate(inner)).reshape(WAYS - 1, -1), above]
        points = [low, *inner, high]
        row, low, high, below, above = (np.concatenate(x) for x in (
            [row] * WAYS, points[:-1], points[1:], values[:-1], values[1:]))
        differ = below != above
        row, low, high, below, above = (x[differ] for x in (row, low, high, below, above))
        found = high - low == 1
        steps.append((row[found], high[found]))
        row, low, high, below, above = (x[~found] for x in (row, low, high, below, above))
    row, start = (np.concatenate(x) for x in zip(*steps, strict=True))
    order = np.lexsort((start, row))
    row, start = row[order], start[order]
    end = np.where(np.append(row[1:] == row[:-1], False), np.append(start[1:], 0), LEVELS)
    return row, (start + end) // 2, end - start


def _one_cycle(cycle, pool, states):
    """Every way through one cycle from pool rows 0 .. states - 1: (pool row, noise, weight) of each."""
    origin, weight = np.arange(states), np.ones(states)
    noise = np.full((states, 3 * cycle.k + 2), LEVELS // 2, np.int64)
    for variable in range(noise.shape[1]):
        def evaluate(rows, level, noise=noise, origin=origin, variable=variable):
            changed = noise[rows]
            changed[:, variable] = level
            return cycle.run(pool, origin[rows], changed)[1]

        row, level, width = _cells(evaluate, len(origin))
        origin, noise, weight = origin[row], noise[row], weight[row] * (width / LEVELS)
        noise[:, variable] = level
    return origin, noise, weight


def enumerate_sequences(policy, draft, prompt, *, k, max_new_tokens, min_new_tokens=0, stop_tokens=(), temperature=1.0,
                        top_k=0, top_p=None):
    """({(tokens, stopped): probability}, cycles) of all sequences that chains of cycles emit."""
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=max_new_tokens,
                        min_new_tokens=min_new_tokens, stop_tokens=stop_tokens)
    cycle = Cycle(policy, draft, prompt, sampling, k)
    pool, masses, out, cycles = cycle.first, np.ones(1), {}, 0
    while len(masses):
        origin, noise, weight = _one_cycle(cycle, pool, len(masses))
        weight = weight * masses[origin]
        slots, _ = cycle.run(pool, origin, noise)
        pool = _pool(slots)
        members = {}
        for i, final in enumerate(cycle.finals(pool)[:len(origin)]):
            members.setdefault(final, []).append(i)
        for (tokens, stopped, done), rows in members.items():
            if done:
                out[tokens, stopped] = out.get((tokens, stopped), 0.0) + weight[rows].sum()
        going = [rows for (_, _, done), rows in members.items() if not done]
        # rows that committed the same tokens are one state from here on: a draft's state depends on nothing else
        masses = np.array([weight[rows].sum() for rows in going])
        if going:
            keep = np.array([rows[0] for rows in going])
            pool = _pool([(_map_rows(lambda x, keep=keep: x[keep], pool), len(keep))])
        cycles += 1
    return out, cycles
