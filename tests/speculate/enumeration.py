"""Drives `jspec.speculate.cycle.cycle` over every accept, refuse and draw, cycle after cycle.

Noise is the cycle's argument, and every uniform enters by a step function of 2^24 values. The
thresholds are not presupposed: they are found in the code's own behaviour by bisection, one uniform
after the other, for thousands of rows at once. An outcome's weight is the share of uniform values
that lead to it, exactly.

What an acceptance uniform decides may show only if later ones accept, or only if they refuse: its
thresholds are looked for in both cases, so no order of judging is presupposed either.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jspec
from jspec.speculate import Sampling
from jspec.speculate.cycle import cycle as run_cycle
from jspec.speculate.rollout import start
from pallas_kernels.noise import BlockNoise, RejectionNoise

KINDS = {"rejection": RejectionNoise, "block": BlockNoise}
LEVELS = 2**24
WAYS = 8  # an interval that holds a step is cut in so many
ROWS = 1024  # rows of one call
STATES = 512  # rows of the pool of states


class Cycle:
    """The jitted cycle on sequences gathered from a pool of states, in slots that are in another
    order and partly free, as after rows were retired, refilled and moved."""

    def __init__(self, policy, draft, prompt, sampling, k, rule):
        self.policy, self.kind = jspec.reshard(policy), KINDS[rule]
        self.draft, self.k, self.sampling, self.vocab = draft, k, sampling, policy.config.vocab_size
        if draft is not None:
            self.draft = draft.drafter.prepare(self.policy, draft)
        batch = jspec.PromptBatch.from_tokens([prompt], group_size=1, seed=0,
                                              buckets=(len(prompt),))
        self.prompt_length = len(prompt)
        first = jax.jit(partial(start, k=k))(self.policy, self.draft, batch, sampling)
        self.first = _pool([(_by_sequence(first), 1)])
        self._step = jax.jit(self._trace)

    def _trace(self, policy, draft, pool, rows, noise):
        state = _in_slots(_map_rows(lambda x: x[rows], pool))
        at = jnp.minimum(state.slots, len(rows) - 1)
        noise = jax.tree.map(lambda x: x[at], noise)
        new, proposal, verdict = run_cycle(policy, draft, state, noise, sampling=self.sampling,
                                           stop_tokens=self.sampling.stop_tokens, k=self.k)
        slot_of = jnp.zeros(len(rows), jnp.int32).at[state.slots].set(jnp.arange(len(state.slots)),
                                                                      mode="drop")
        return _by_sequence(new), *jax.tree.map(lambda x: x[slot_of], (proposal.tokens, verdict))

    def run(self, pool, rows, noise):
        """([(new State, rows)], outcome codes int64) of rows [R] of the pool, in calls of fixed
        size."""
        states, codes = [], []
        for at in range(0, len(rows), ROWS):
            some, part = rows[at:at + ROWS], noise[at:at + ROWS]
            pad = ROWS - len(some)
            new, drafted, verdict = self._step(self.policy, self.draft, pool,
                                               np.pad(some, (0, pad)),
                                               self._noise(np.pad(part, ((0, pad), (0, 0)))))
            states.append((new, len(some)))
            codes.append(self._code(drafted, verdict)[:len(some)])
        return states, np.concatenate(codes)

    def finals(self, state):
        """(generated tokens, stopped, done) of every row."""
        of = state.sequences
        tokens, lengths, stopped, done = map(np.asarray,
                                             (of.tokens, of.lengths, of.finished, of.done))
        return [(tuple(map(int, t[self.prompt_length:n])), bool(s), bool(d))
                for t, n, s, d in zip(tokens, lengths, stopped, done, strict=True)]

    def _noise(self, levels):
        u = jnp.asarray((levels / LEVELS).astype(np.float32))
        k = self.k
        return self.kind(u[:, :2 * k].reshape(-1, k, 2), u[:, 2 * k:3 * k], u[:, 3 * k:])

    def _code(self, drafted, verdict):
        """One number for all that a cycle decided: drafts, how many were accepted, and the tokens
        emitted."""
        accepted, tokens = np.asarray(verdict.accepted,
                                      np.int64), np.asarray(verdict.tokens, np.int64)
        code = accepted
        for column in np.asarray(drafted, np.int64).T:
            code = code * self.vocab + column
        for j, column in enumerate(tokens.T):
            code = code * (self.vocab + 1) + np.where(j <= accepted, column, self.vocab)
        return code


def _by_sequence(state):
    """The state with sequence i in slot i, and in block i all that is cached of it: then leaves
    lead with sequences."""
    n = len(state.sequences.ids)
    slot_of = jnp.zeros(n, jnp.int32).at[state.slots].set(jnp.arange(len(state.slots)), mode="drop")
    table = state.cache.table[slot_of]
    assert table.shape[1] == 1

    def cache(of):
        pools = jax.tree.map(lambda x: x[table[:, 0]], (of.k, of.v))
        return of.replace(k=pools[0], v=pools[1], table=jnp.arange(n, dtype=jnp.int32)[:, None])

    draft = state.draft
    if draft is not None:
        rows = jax.tree.map(lambda x: x[slot_of], draft.rows)
        draft = draft.replace(rows=rows, cache=None if draft.cache is None else cache(draft.cache))
    return state.replace(slots=jnp.arange(n, dtype=jnp.int32), cache=cache(state.cache),
                         draft=draft)


def _in_slots(state):
    """A state of `_by_sequence` with its sequences in reverse order in slots of which every fifth
    is free, and their blocks in yet another."""
    n = len(state.sequences.ids)
    slots = np.insert(np.arange(n)[::-1], np.arange(0, n, 4), n).astype(np.int32)
    live, at = slots < n, np.minimum(slots, n - 1)
    blocks = np.roll(np.arange(n), 7)  # of each sequence
    table = jnp.asarray(np.where(live, blocks[at], n)[:, None].astype(np.int32))

    def cache(of):
        pools = jax.tree.map(lambda x: x[np.argsort(blocks)], (of.k, of.v))
        return of.replace(k=pools[0], v=pools[1], table=table)

    draft = state.draft
    if draft is not None:
        rows = jax.tree.map(lambda x: x[at], draft.rows)
        draft = draft.replace(rows=rows, cache=None if draft.cache is None else cache(draft.cache))
    return state.replace(slots=jnp.asarray(slots), cache=cache(state.cache), draft=draft)


def _map_rows(fn, state, *more):
    """fn over the leaves that lead with rows; what does not is the first state's."""
    parts = [dataclasses.replace(s, prompts=None, free=None, waiting=None, admitted=None,
                                 wanted=None, counts=None) for s in (state, *more)]
    new = jax.tree.map(fn, *parts)
    n = len(new.sequences.ids)
    new = new.replace(slots=np.arange(n, dtype=np.int32), cache=_renumbered(new.cache, n))
    if new.draft is not None and new.draft.cache is not None:
        new = new.replace(draft=new.draft.replace(cache=_renumbered(new.draft.cache, n)))
    return new.replace(prompts=state.prompts, free=state.free, waiting=state.waiting,
                       admitted=state.admitted, wanted=state.wanted, counts=state.counts)


def _renumbered(cache, n):
    return cache.replace(table=np.arange(n, dtype=np.int32)[:, None])


def _pool(parts):
    """One pool of the leading n rows of each (state, n), of at least STATES rows: each size is a
    compilation."""
    count = sum(n for _, n in parts)
    size = max(STATES, count)

    def join(*leaves):
        x = np.concatenate([np.asarray(leaf)[:n]
                            for leaf, (_, n) in zip(leaves, parts, strict=True)])
        return np.pad(x, ((0, size - count), *((0, 0),) * (x.ndim - 1)))

    return _map_rows(join, *(state for state, _ in parts))


def _cells(evaluate, first, last):
    """All constant pieces of step functions, one on first[i] .. last[i] for every i: arrays (i,
    first, last) of them.

    evaluate: (i, levels) to values, [n, any]. A piece between two equal values is found only if it
    is wider than 1 / WAYS of the whole: steps are monotone elsewhere.
    """
    row, low, high = np.arange(len(first)), first, last
    below, above = np.split(evaluate(np.tile(row, 2), np.concatenate([low, high])), 2)
    steps = [(row, low)]
    while len(row):
        inner = [low + (high - low) * i // WAYS for i in range(1, WAYS)]
        values = [below, *np.split(evaluate(np.tile(row, WAYS - 1), np.concatenate(inner)),
                                   WAYS - 1), above]
        points = [low, *inner, high]
        row, low, high, below, above = (np.concatenate(x) for x in (
            [row] * WAYS, points[:-1], points[1:], values[:-1], values[1:]))
        differ = (below != above).any(-1)
        row, low, high, below, above = (x[differ] for x in (row, low, high, below, above))
        found = high - low == 1
        steps.append((row[found], high[found]))
        row, low, high, below, above = (x[~found] for x in (row, low, high, below, above))
    row, start = (np.concatenate(x) for x in zip(*steps, strict=True))
    order = np.lexsort((start, row))
    row, start = row[order], start[order]
    more = np.append(row[1:] == row[:-1], False)
    return row, start, np.where(more, np.append(start[1:], 0) - 1, last[row])


def _unknown(states, k):
    """The levels, first and last, of `states` rows' uniforms, none of which anything is known
    about."""
    return np.zeros((states, 3 * k + 2), np.int64), np.full((states, 3 * k + 2), LEVELS - 1)


def _one_cycle(cycle, pool, first, last):
    """Every way through one cycle from the leading rows of the pool, whose uniforms lie in first ..
    last, [rows, 3 K + 2]: (pool row, first, last, weight) of each way."""
    origin, weight = np.arange(len(first)), np.ones(len(first))
    for variable in range(first.shape[1]):
        accepts = 2 * cycle.k <= variable < 3 * cycle.k - 1
        later = slice(variable + 1, 3 * cycle.k if accepts else variable + 1)

        def evaluate(rows, level, first=first, last=last, origin=origin, variable=variable,
                     later=later, accepts=accepts):
            codes = []
            for others in (first, last)[:2 if accepts else 1]:
                noise = _middle(first[rows], last[rows])
                noise[:, variable], noise[:, later] = level, others[rows, later]
                codes.append(cycle.run(pool, origin[rows], noise)[1])
            return np.stack(codes, 1)

        row, low, high = _cells(evaluate, first[:, variable], last[:, variable])
        weight = weight[row] * ((high - low + 1) / (last[row, variable] - first[row, variable] + 1))
        origin, first, last = origin[row], first[row], last[row]
        first[:, variable], last[:, variable] = low, high
    return origin, first, last, weight


def _middle(first, last):
    return (first + last + 1) // 2


def _carry(first, last, count, k):
    """What a cycle is known about its uniforms, if those of a position that an earlier one has
    drawn for are drawn no more: first and last of the next cycle, which begins `count` [rows]
    positions on."""
    new_first, new_last = _unknown(len(first), k)
    for row, n in enumerate(count):
        for begin, width in ((0, 2), (2 * k, 1)):
            kept = width * max(k - n, 0)
            old, new = slice(begin + width * k - kept,
                             begin + width * k), slice(begin, begin + kept)
            new_first[row, new], new_last[row, new] = first[row, old], last[row, old]
    return new_first, new_last


def enumerate_sequences(policy, draft, prompt, *, k, rule="rejection", keep_noise=False,
                        max_new_tokens,
                        min_new_tokens=0, stop_tokens=(), temperature=1.0, top_k=0, top_p=None,
                        min_p=None, behaviour=None):
    """({(tokens, stopped): probability}, cycles) of all sequences that chains of cycles emit.

    behaviour: gets of each (tokens, stopped) the sums of `behaviour_logprobs` and of `logprobs`.

    keep_noise: a planted bug; a position's uniforms for drafting and judging are the same in every
    cycle that reaches it. The twin of noise that is keyed by position.
    """
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
                        max_new_tokens=max_new_tokens,
                        min_new_tokens=min_new_tokens, stop_tokens=stop_tokens)
    cycle = Cycle(policy, draft, prompt, sampling, k, rule)
    pool, masses, out, cycles = cycle.first, np.ones(1), {}, 0
    known = _unknown(1, k)
    while len(masses):
        before = np.asarray(pool.sequences.lengths)
        origin, first, last, weight = _one_cycle(cycle, pool, *known)
        weight = weight * masses[origin]
        states, _ = cycle.run(pool, origin, _middle(first, last))
        pool = _pool(states)
        members = {}
        for i, final in enumerate(cycle.finals(pool)[:len(origin)]):
            members.setdefault((*final, i if keep_noise else None), []).append(i)
        for (tokens, stopped, done, _), rows in members.items():
            if done:
                out[tokens, stopped] = out.get((tokens, stopped), 0.0) + weight[rows].sum()
                if behaviour is not None:
                    of = pool.sequences
                    behaviour[tokens, stopped] = [
                        float(np.sum(np.asarray(x)[rows[0], :len(tokens)], dtype=np.float64))
                        for x in (of.behaviour_logprobs, of.logprobs)]
        going = [rows for (_, _, done, _), rows in members.items() if not done]
        # rows that committed the same tokens are one state from here on: a draft's state depends on
        # nothing else
        masses = np.array([weight[rows].sum() for rows in going])
        if going:
            keep = np.array([rows[0] for rows in going])
            known = _unknown(len(keep), k)
            if keep_noise:
                count = np.asarray(pool.sequences.lengths)[keep] - before[origin[keep]]
                known = _carry(first[keep], last[keep], count, k)
            pool = _pool([(_map_rows(lambda x, keep=keep: x[keep], pool), len(keep))])
        cycles += 1
    return out, cycles


def tokens_a_cycle(policy, draft, prompt, *, k, rule):
    """How many tokens the first cycle emits, in expectation, where nothing stops it."""
    cycle = Cycle(policy, draft, prompt, Sampling(max_new_tokens=k + 1, stop_tokens=()), k, rule)
    origin, first, last, weight = _one_cycle(cycle, cycle.first, *_unknown(1, k))
    lengths = np.asarray(_pool(cycle.run(cycle.first, origin, _middle(first, last))[0])
                         .sequences.lengths)[:len(origin)]
    return float((weight * (lengths - len(prompt))).sum())
