"""What the kernels' references are compared to: the same rules again, one row at a time, in float64
numpy."""

import numpy as np


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def process(logits, temperature=1.0, top_k=0, top_p=1.0, banned=(), min_p=0.0):
    """Probabilities float64 [V] that one row of logits [V] is sampled from."""
    x = np.array(logits, np.float64)
    x[list(banned)] = -np.inf
    if temperature == 0:
        p = np.zeros(len(x))
        p[np.argmax(x)] = 1
        return p
    p = np.exp(log_softmax(x / temperature))
    order = np.argsort(-p, kind="stable")  # ties to the lowest id
    if top_k:
        p[order[top_k:]] = 0
        p = p / p.sum()
    if top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        cut = before >= top_p
        cut[0] = False
        p[order[cut]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


def crossing_margin(logits, temperature, top_k, top_p, banned=()):
    """How close the mass before any token comes to top_p: below float32's rounding, the cut is a
    matter of taste."""
    p = process(logits, temperature, top_k, 1.0, banned)
    before = np.cumsum(np.sort(p)[::-1])
    return np.abs(before - top_p).min()


def inverse_transform(mass, u, block):
    """The token that two uniforms u [2] draw from unnormalised mass [V]: a block of the vocabulary,
    then inside it."""
    mass = np.asarray(mass, np.float64)
    blocks = [mass[i:i + block] for i in range(0, len(mass), block)]
    sums = np.array([b.sum() for b in blocks])
    first = int(np.argmax(np.cumsum(sums) > u[0] * sums.sum()))
    inside = np.cumsum(blocks[first])
    return first * block + int(np.argmax(inside > u[1] * inside[-1]))


def reject(p, drafts, q, accept, residual_u, block):
    """One row of the rejection rule. p [K + 1, V], drafts [K], q [K, V] or None, accept [K],
    residual_u [2]. Returns (accepted, last token)."""
    for j, y in enumerate(drafts):
        one = np.eye(p.shape[1])[y] if q is None else q[j]
        if one[y] > 0 and accept[j] * one[y] < p[j][y]:
            continue
        mass = np.maximum(p[j] - one, 0)
        return j, inverse_transform(mass if mass.sum() > 0 else p[j], residual_u, block)
    return len(drafts), inverse_transform(p[-1], residual_u, block)


def block_tests(p, drafts, q):
    """One row of the block rule: w [K + 1] and h [K + 1] of accepting the first 0 .. K drafts; h[0]
    is 1. p [K + 1, V], drafts [K], q [K, V]."""
    w, h = [1.0], [1.0]
    for j, y in enumerate(drafts):
        w.append(min(1.0, w[-1] * p[j][y] / q[j][y]))
        if j + 1 == len(drafts):
            h.append(w[-1])
        else:
            left = np.maximum(w[-1] * p[j + 1] - q[j + 1], 0).sum()
            h.append(left / (left + 1 - w[-1]) if left + 1 - w[-1] > 0 else 1.0)
    return np.array(w), np.array(h)


def block(p, drafts, q, accept, residual_u, block):
    """One row of the block rule, as `reject`."""
    q = np.eye(p.shape[1])[drafts] if q is None else q
    w, h = block_tests(p, drafts, q)
    passed = max([0, *(j + 1 for j, u in enumerate(accept) if u < h[j + 1])])
    if passed == len(drafts):
        return passed, inverse_transform(p[-1], residual_u, block)
    mass = np.maximum(w[passed] * p[passed] - q[passed], 0)
    return passed, inverse_transform(mass if mass.sum() > 0 else p[passed], residual_u, block)


def attention(q, k, v, length, window=None, together=None):
    """Dense attention of one row: q [T, H, D] at positions length.., k and v [S, H_kv, D] with the
    new ones written; a position sees itself and the window - 1 before it; of positions that are
    `together`, the window before them all, and themselves "causal" or "whole"."""
    t, h, d = q.shape
    out = np.zeros((t, h, d))
    for i in range(t):
        for j in range(h):
            head = j // (h // k.shape[1])
            end = length + (t if together == "whole" else i + 1)
            first = (end if together is None else length) - (end if window is None else window)
            seen = slice(max(first, 0), end)
            keys, values = (x[seen, head].astype(np.float64) for x in (k, v))
            scores = keys @ q[i, j].astype(np.float64) / np.sqrt(d)
            out[i, j] = np.exp(log_softmax(scores)) @ values
    return out


def summary(logits, temperature, drafted, gumbel, ban, banned_tokens, offset, chunk):
    """One row of `rejection_sampling.summary.Summary` as a dict of float64 [C]; gumbel [V] or None,
    drafted a global id or -1."""
    x = np.asarray(logits, np.float64)
    ids = offset + np.arange(len(x))
    banned = np.isin(ids, banned_tokens) & bool(ban)
    g = gumbel if gumbel is not None and temperature > 0 else np.zeros(len(x))
    score = np.where(banned, -np.inf, x / (temperature or 1.0) + g)
    names = ("top", "total", "weighted", "best", "best_id", "best_noise", "drafted", "mass",
             "spill")
    out = {name: [] for name in names}
    for start in range(0, len(x), chunk):
        part = slice(start, start + chunk)
        top, at = x[part].max(), start + int(np.argmax(score[part]))
        some = score[at] > -np.inf

        def above(y, from_):
            return (y - (from_ if from_ > -np.inf else 0.0)) / (temperature or 1.0)

        d = above(x[part], top)
        e = np.exp(d)
        candidate = ~banned[part] & (ids[part] != drafted)
        first = ids[part] < (ids[start] // chunk + 1) * chunk
        drafted_x = x[part][ids[part] == drafted].max(initial=-np.inf)
        left = np.exp(above(np.where(candidate, x[part], -np.inf), x[at] if some else 0.0))
        values = (top, e.sum(), (e * np.where(e > 0, d, 0.0)).sum(), x[at] if some else -np.inf,
                  ids[at], g[at] if some else 0.0, drafted_x, left[first].sum(), left[~first].sum())
        for name, value in zip(names, values, strict=True):
            out[name].append(value)
    return {name: np.array(value) for name, value in out.items()}
