"""The reference of the rules against a float64 oracle that goes row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pallas_kernels import noise as noise_lib
from pallas_kernels.noise import BlockNoise, CoupledNoise, RejectionNoise
from pallas_kernels.rejection_sampling import draw, process_logits, reference, rejection_sampling
from tests.pallas_kernels import oracle

VOCAB = 7
few = settings(max_examples=150, deadline=None, derandomize=True)
# a coarse grid makes ties common
logit_rows = st.lists(st.sampled_from([-np.inf, -3.0, -1.0, 0.0, 0.5, 2.0]), min_size=VOCAB,
                      max_size=VOCAB).filter(lambda x: max(x) > -np.inf)
unit = st.floats(0, 1, exclude_max=True, width=32)
temperatures = st.sampled_from([0.0, 0.3, 0.7, 1.0, 2.5])
coupled_noise = jax.jit(noise_lib.coupled_noise, static_argnames="k")
STATIC = ("top_k", "banned_tokens")
_process = jax.jit(process_logits, static_argnames=STATIC)


def judge(*args, **options):
    """Compiled anew each time: some tests change the size of a block."""
    return jax.jit(lambda *a, **o: rejection_sampling(*a, **o),
                   static_argnames=STATIC)(*args, **options)


@few
@given(logit_rows, temperatures, st.sampled_from([0, 1, 2, 3, 6, 7, 9]),
       st.sampled_from([0.0, 0.05, 0.35, 0.62, 0.93]), st.booleans(), st.booleans(),
       st.sampled_from([0.0, 0.07, 0.31, 1.0]))
def test_process_logits(row, temperature, top_k, top_p, truncate, banned, min_p):
    ban = (1, 4) if banned else ()
    assume(not banned or max(x for i, x in enumerate(row) if i not in ban) > -np.inf)
    top_p = top_p if truncate else 1.0
    assume(top_p == 0 or top_p == 1 or oracle.crossing_margin(row, temperature, top_k, top_p, ban)
           > 1e-5)
    got = _process(jnp.array(row, jnp.float32), jnp.float32(temperature), jnp.float32(top_p)
                   if truncate else None, top_k=top_k, min_p=jnp.float32(min_p),
                   ban=jnp.array(banned), banned_tokens=(1, 4))
    want = oracle.process(row, temperature, top_k, top_p, ban, min_p)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(got) > -np.inf, want > 0)
    np.testing.assert_allclose(np.exp(np.asarray(got, np.float64)), want, atol=1e-6)


def test_ties_go_to_the_lowest_id():
    row = jnp.array([0.0, 1.0, 1.0, 1.0, 0.0])
    one = jnp.float32(1)
    for kept, options in [((1, 2), dict(top_k=2)), ((1,), dict(top_k=1)),
                          ((1,), dict(top_p=jnp.float32(0.1))),
                          ((1, 2), dict(top_p=jnp.float32(0.4)))]:
        assert tuple(np.flatnonzero(np.isfinite(_process(row, one, **options)))) == kept
    assert int(jnp.argmax(_process(row, jnp.float32(0)))) == 1


def test_the_order_of_processing():
    """Ban, temperature, top-k, renormalised, top-p, then min-p: a top-p or a min-p before any of
    these would keep other tokens."""
    row = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))
    one = jnp.float32(1)

    def kept(**options):
        return tuple(np.flatnonzero(np.isfinite(_process(row, options.pop("temperature", one),
                                                         **options))))

    assert kept(top_p=jnp.float32(0.65)) == (0, 1)
    assert kept(top_p=jnp.float32(0.55), top_k=2) == (0,)  # 0.4 / 0.7 reaches 0.55 on its own
    assert kept(top_p=jnp.float32(0.65), temperature=jnp.float32(0.25)) == (0,)
    assert kept(top_p=jnp.float32(0.65), ban=jnp.array(True), banned_tokens=(0,)) == (1, 2)
    assert kept(min_p=jnp.float32(0.6)) == (0, 1)
    assert kept(min_p=jnp.float32(0.6), temperature=jnp.float32(2)) == (0, 1, 2)
    assert kept(min_p=jnp.float32(0.6), ban=jnp.array(True), banned_tokens=(0,)) == (1, 2)
    assert kept(min_p=jnp.float32(0.2), top_p=jnp.float32(0.75)) == (0, 1, 2)


def _with_block(size):
    def run(mass, u):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "VOCAB_BLOCK", size)
            return reference.inverse_transform(mass, u)

    return jax.jit(run)


_transform = {size: _with_block(size) for size in (2, 3, 512)}


@few
@given(st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=1, max_size=11)
       .filter(lambda x: max(x) > 0), unit, unit, st.sampled_from(list(_transform)))
def test_inverse_transform(mass, u0, u1, block):
    got = int(_transform[block](jnp.array([[*mass, *[0.0] * (11 - len(mass))]], jnp.float32),
                                jnp.array([[u0, u1]], jnp.float32))[0])
    assert mass[got] > 0
    # on the step itself rounding decides; beside it nothing does
    near = {oracle.inverse_transform(mass, np.clip([u0 + a, u1 + b], 0, 1 - 1e-9), block)
            for a in (-1e-6, 0, 1e-6) for b in (-1e-6, 0, 1e-6)}
    assert got in near


def test_inverse_transform_at_the_ends():
    top = np.float32(1 - 2**-24)
    mass = jnp.array([[0.0, 0.5, 0.25, 0.0], [0.0, 0.0, 0.0, 1e-30]])
    for u, want in ((0.0, [1, 3]), (top, [2, 3])):
        np.testing.assert_array_equal(reference.inverse_transform(mass, jnp.full((2, 2), u)), want)


def random_case(rng, rows, k, vocab, sampled, kind=RejectionNoise):
    logits = rng.normal(0, 1.5, (rows, k + 1, vocab)).astype(np.float32)
    q_logits = rng.normal(0, 1.5, (rows, k, vocab))
    log_q = oracle.log_softmax(q_logits).astype(np.float32)
    drafts = rng.integers(0, vocab, (rows, k)).astype(np.int32)
    noise = kind(*(jnp.asarray(rng.random(s), jnp.float32)
                   for s in ((rows, k, 2), (rows, k), (rows, 2))))
    return logits, drafts, log_q if sampled else None, noise


@pytest.mark.parametrize("kind, rule",
                         [(RejectionNoise, oracle.reject), (BlockNoise, oracle.block)])
@pytest.mark.parametrize("k, rows, sampled, vocab, block", [
    (0, 9, False, 13, 4), (1, 1, True, 5, 512), (3, 64, True, 13, 4), (2, 64, True, 8, 2),
    (3, 64, False, 5, 512)])
def test_rejection_and_block(k, rows, sampled, vocab, block, kind, rule, monkeypatch):
    monkeypatch.setattr(reference, "VOCAB_BLOCK", block)
    rng = np.random.default_rng(vocab * 10 + k)
    logits, drafts, log_q, noise = random_case(rng, rows, k, vocab, sampled, kind)
    temperature = rng.choice([0.0, 0.7, 1.0], rows).astype(np.float32)
    top_p = rng.choice([0.6, 1.0], rows).astype(np.float32)
    ban = rng.random((rows, k + 1)) < 0.3
    got = judge(jnp.asarray(logits), jnp.asarray(drafts),
                None if log_q is None else jnp.asarray(log_q), noise, jnp.asarray(temperature),
                jnp.asarray(top_p), top_k=4, ban=jnp.asarray(ban), banned_tokens=(2,))
    for i in range(rows):
        p = np.stack([oracle.process(logits[i, j], temperature[i], 4, top_p[i],
                                     (2,) if ban[i, j] else ()) for j in range(k + 1)])
        q = None if log_q is None else np.exp(log_q[i].astype(np.float64))
        accepted, last = rule(p, drafts[i], q, noise.accept[i], np.asarray(noise.residual[i]),
                              block)
        assert int(got.accepted[i]) == accepted
        tokens = [*drafts[i, :accepted], last]
        assert np.asarray(got.tokens[i, :accepted + 1]).tolist() == tokens
        raw = oracle.log_softmax(logits[i].astype(np.float64) / (temperature[i] or 1.0))
        np.testing.assert_allclose(got.logprobs[i, :accepted + 1],
                                   [raw[j, t] for j, t in enumerate(tokens)], atol=1e-5)
        np.testing.assert_allclose(got.entropy[i], -(np.exp(raw) * raw).sum(-1), atol=1e-5)


by_uniforms = pytest.mark.parametrize("kind", [RejectionNoise, BlockNoise])


@by_uniforms
def test_a_draft_that_is_the_target_is_always_accepted(kind):
    """p = q: p / q is 1 and u is below it; nothing is left for the residual."""
    rng = np.random.default_rng(0)
    log_q = jnp.asarray(oracle.log_softmax(rng.normal(0, 1, (1, 2, 6))), jnp.float32)
    log_q = jax.nn.log_softmax(jnp.repeat(log_q, 50, 0))
    logits = jnp.pad(log_q, ((0, 0), (0, 1), (0, 0)))
    noise = kind(jnp.zeros((50, 2, 2)), jnp.full((50, 2), 1 - 2**-20), jnp.full((50, 2), 0.5))
    out = judge(logits, jnp.asarray(rng.integers(0, 6, (50, 2)), jnp.int32), log_q, noise,
                jnp.ones(50))
    np.testing.assert_array_equal(out.accepted, 2)


def test_a_residual_of_all_zeros_draws_from_p():
    log_p = jnp.log(jnp.array([[0.25, 0.75, 0.0]]))
    np.testing.assert_allclose(reference.residual(log_p, log_p), jnp.exp(log_p))


@by_uniforms
def test_a_draft_without_probability_is_refused_even_at_u_zero(kind):
    logits = jnp.array([[[0.0, -jnp.inf, 0.0], [0.0, 0.0, 0.0]]])
    noise = kind(jnp.zeros((1, 1, 2)), jnp.zeros((1, 1)), jnp.full((1, 2), 0.9))
    for log_q in (None, jnp.log(jnp.array([[[0.1, 0.8, 0.1]]]))):
        out = judge(logits, jnp.array([[1]]), log_q, noise, jnp.ones(1))
        assert int(out.accepted[0]) == 0 and int(out.tokens[0, 0]) == 2


@by_uniforms
def test_a_draft_that_is_not_finite_ends_the_block(kind):
    """It is refused, and the token there is drawn from p: as if only the drafts before it had been
    made."""
    logits, drafts, log_q, noise = random_case(np.random.default_rng(0), 64, 2, 9, True, kind)
    spoil = jax.jit(lambda log_q, value, at: rejection_sampling(
        logits, drafts, log_q.at[:, at].set(value), noise, jnp.ones(64)))
    for at in (0, 1):
        before = jnp.asarray(log_q[:, :at]) if at else None
        want = judge(jnp.asarray(logits[:, :at + 1]), jnp.asarray(drafts[:, :at]), before,
                     noise.replace(draft=noise.draft[:, :at], accept=noise.accept[:, :at]),
                     jnp.ones(64))
        emitted = np.arange(at + 1) <= np.asarray(want.accepted)[:, None]
        assert len(set(np.asarray(want.accepted).tolist())) == at + 1
        for value in (np.nan, np.inf, -np.inf):
            got = spoil(jnp.asarray(log_q), value, at)
            np.testing.assert_array_equal(got.accepted, want.accepted)
            np.testing.assert_array_equal(np.asarray(got.tokens)[:, :at + 1][emitted],
                                          np.asarray(want.tokens)[emitted])


@pytest.mark.parametrize("coupled", [False, True])
def test_a_draw_from_what_is_not_finite_is_an_id_that_exists(coupled):
    log_q = jnp.full((4, 700), jnp.nan).at[2:, 5:].set(-1.0)
    noise = RejectionNoise(jnp.full((4, 1, 2), 0.9), jnp.zeros((4, 1)), jnp.zeros((4, 2)))
    if coupled:
        noise = coupled_noise(jax.random.key_data(jax.random.key(0)), jnp.arange(4), jnp.full(4, 5),
                              1)
    reduced = jnp.arange(3, 1403, 2)
    whole, part = jax.jit(lambda q, noise: (draw(q, noise, 0), draw(q, noise, 0, reduced)))(log_q,
                                                                                            noise)
    assert (whole.dtype == part.dtype == jnp.int32 and np.isin(whole, range(700)).all()
            and np.isin(part, reduced).all())


# small numbers, the smallest normal one, and what chips flush to 0
TINY = np.float32([1e-2, 1e-4, 1e-6, 1e-9, 1e-12, 1e-20, 1e-30, 1.2e-38, 1e-39, 1e-44])


def test_a_small_temperature_is_the_limit():
    """Finite log-probabilities of what is likeliest, and that alone is drawn; also of logits that
    nearly tie, and of large ones. Below the smallest normal number it is 0."""
    rng, cold = np.random.default_rng(7), jax.jit(rejection_sampling)
    for scale, shift in ((2.0, 0.0), (1e-5, 7.0), (300.0, -4000.0)):
        logits = (shift + scale * rng.normal(0, 1, (len(TINY), 1, 40))).astype(np.float32)
        _, _, _, noise = random_case(rng, len(TINY), 0, 40, False)
        out = cold(jnp.asarray(logits), jnp.zeros((len(TINY), 0), jnp.int32), None, noise,
                   jnp.asarray(TINY))
        for row, t, token, got, entropy in zip(logits[:, 0], TINY, out.tokens[:, 0],
                                               out.logprobs[:, 0], out.entropy[:, 0], strict=True):
            raw = oracle.log_softmax(row.astype(np.float64) / (t if t >= 1.2e-38 else 1.0))
            np.testing.assert_allclose(got, raw[token], atol=1e-5, rtol=1e-5)
            p = np.exp(raw)
            np.testing.assert_allclose(entropy, -(p * np.where(p > 0, raw, 0)).sum(), atol=1e-5)
            if t < 1e-9:
                assert int(token) == row.argmax()


def test_a_later_test_outdoes_an_earlier_one():
    """Block accepts a draft that the target likes less than the draft did, for the sake of the one
    after it."""
    p, q = np.array([[0.2, 0.8], [0.9, 0.1], [0.5, 0.5]]), np.array([[0.6, 0.4], [0.3, 0.7]])
    w, h = oracle.block_tests(p, [0, 0], q)
    # rejection would take the first one time in three, block always
    np.testing.assert_allclose(w, [1, 1 / 3, 1])
    args = jnp.log(p)[None], jnp.zeros((1, 2), jnp.int32), jnp.log(q)[None]
    late = jnp.array([[1 - 2**-24, 1 - 2**-20]])
    tests = {kind: int(judge(*args, kind(jnp.zeros((1, 2, 2)), late, jnp.zeros((1, 2))),
                             jnp.ones(1)).accepted[0]) for kind in (RejectionNoise, BlockNoise)}
    assert tests == {RejectionNoise: 0, BlockNoise: 2}


def test_block_over_a_reduced_vocabulary_is_block_with_q_zero_elsewhere():
    rng = np.random.default_rng(6)
    logits, _, _, noise = random_case(rng, 64, 3, 40, False, BlockNoise)
    ids = np.sort(rng.choice(40, 9, replace=False)).astype(np.int32)
    log_q = jax.nn.log_softmax(jnp.asarray(rng.normal(0, 1, (64, 3, 9)), jnp.float32))
    drafts = jnp.asarray(ids[rng.integers(0, 9, (64, 3))])
    whole = jnp.full((64, 3, 40), -jnp.inf).at[..., ids].set(log_q)
    a, b = (judge(jnp.asarray(logits), drafts, q, noise, jnp.ones(64), draft_vocab=vocab)
            for q, vocab in ((log_q, jnp.asarray(ids)), (whole, None)))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
    assert len(set(np.asarray(a.accepted).tolist())) == 4


def test_coupled_is_argmax_of_log_p_plus_gumbel():
    rng = np.random.default_rng(1)
    rows, k, vocab = 40, 3, 11
    logits = rng.normal(0, 1, (rows, k + 1, vocab)).astype(np.float32)
    noise = coupled_noise(jax.random.key_data(jax.random.key(0)), jnp.arange(rows),
                          jnp.full(rows, 5), k)
    gumbel = jax.jit(lambda keys: noise_lib.gumbel(noise_lib.random_bits(keys[..., None, :],
                                                                         jnp.arange(vocab))))
    g = np.asarray(gumbel(noise.keys), np.float64)
    with np.errstate(divide="ignore"):
        log_p = np.log([[oracle.process(x, 0.7, 5) for x in row] for row in logits])
    target = np.argmax(log_p + g, -1)
    drafts = np.where(rng.random((rows, k)) < 0.7, target[:, :k],
                      rng.integers(0, vocab, (rows, k))).astype(np.int32)
    out = judge(jnp.asarray(logits), jnp.asarray(drafts), None, noise, jnp.full(rows, 0.7), top_k=5)
    accepted = np.cumprod(drafts == target[:, :k], 1).sum(1)
    np.testing.assert_array_equal(out.accepted, accepted)
    assert set(accepted) == {0, 1, 2, 3}
    keep = np.arange(k + 1) <= accepted[:, None]
    np.testing.assert_array_equal(np.asarray(out.tokens)[keep], target[keep])


def test_a_coupled_draft_draws_with_the_noise_of_its_position():
    noise = coupled_noise(jax.random.key_data(jax.random.key(0)), jnp.arange(8), jnp.full(8, 5), 2)
    log_q = jax.nn.log_softmax(jax.random.normal(jax.random.key(1), (8, 9)))
    logits = jnp.stack([log_q] * 3, 1)
    drafts = jax.jit(lambda q, n: jnp.stack([draw(q, n, 0), draw(q, n, 1)], 1))(log_q, noise)
    out = judge(logits, drafts, jnp.stack([log_q] * 2, 1), CoupledNoise(noise.keys), jnp.ones(8))
    np.testing.assert_array_equal(out.accepted, 2)


@pytest.mark.parametrize("coupled", [True, False])
def test_a_draft_of_a_reduced_vocabulary(coupled):
    """It is drawn with the noise of its global id, and is the draw over the whole vocabulary with q
    zero elsewhere."""
    rng = np.random.default_rng(5)
    ids = jnp.asarray(np.sort(rng.choice(600, 90, replace=False)), jnp.int32)
    log_q = jax.nn.log_softmax(jax.random.normal(jax.random.key(1), (64, 90)))
    whole = jnp.full((64, 600), -jnp.inf).at[:, ids].set(log_q)
    if coupled:
        noise = coupled_noise(jax.random.key_data(jax.random.key(0)), jnp.arange(64),
                              jnp.full(64, 5), 1)
        np.testing.assert_array_equal(draw(log_q, noise, 0, ids), draw(whole, noise, 0))
        return
    u = jnp.asarray(rng.random((64, 1, 2)), jnp.float32)
    noise = RejectionNoise(u, jnp.zeros((64, 1)), jnp.zeros((64, 2)))
    # 90 ids are one block: the second uniform alone decides
    want = [int(ids[np.argmax(np.cumsum(np.exp(q)) > v * np.exp(q).sum())])
            for q, v in zip(np.asarray(log_q, np.float64), np.asarray(u[:, 0, 1]), strict=True)]
    # a step itself may round either way
    assert (np.asarray(draw(log_q, noise, 0, ids)) == want).sum() >= 63


def test_temperature_zero_needs_no_noise():
    rng = np.random.default_rng(2)
    logits, drafts, log_q, noise = random_case(rng, 32, 2, 6, True)
    best = logits.argmax(-1)
    for some in (noise, BlockNoise(noise.draft, noise.accept, noise.residual),
                 coupled_noise(jnp.zeros(2, jnp.uint32), jnp.arange(32), jnp.zeros(32, jnp.int32),
                               2)):
        # at T = 0 a draft's q is one-hot too
        greedy = process_logits(log_q, jnp.zeros((32, 1)))
        chosen = draw(greedy[:, 0], some, 0), draw(greedy[:, 1], some, 1)
        out = judge(jnp.asarray(logits), jnp.stack(chosen, 1), greedy, some, jnp.zeros(32))
        keep = np.arange(3) <= np.asarray(out.accepted)[:, None]
        np.testing.assert_array_equal(np.asarray(out.tokens)[keep], best[keep])
        np.testing.assert_array_equal(out.accepted,
                                      np.cumprod(np.stack(chosen, 1) == best[:, :2], 1).sum(1))
        assert np.asarray(out.logprobs)[keep].max() < 0  # taken with T = 1


def test_bfloat16_logits_are_judged_in_float32():
    rng = np.random.default_rng(3)
    logits, drafts, log_q, noise = random_case(rng, 32, 2, 6, True)
    half = jnp.asarray(logits, jnp.bfloat16)
    args = jnp.asarray(drafts), jnp.asarray(log_q), noise, jnp.ones(32)
    for a, b in zip(jax.tree.leaves(judge(half, *args)),
                    jax.tree.leaves(judge(half.astype(jnp.float32), *args)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_row_does_not_depend_on_the_others():
    rng = np.random.default_rng(4)
    logits, drafts, log_q, noise = random_case(rng, 16, 3, 9, True)
    order = rng.permutation(16)
    whole = judge(jnp.asarray(logits), jnp.asarray(drafts), jnp.asarray(log_q), noise, jnp.ones(16))
    moved = judge(*(jnp.asarray(x[order]) for x in (logits, drafts, log_q)),
                               jax.tree.map(lambda x: x[order], noise), jnp.ones(16))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(moved), strict=True):
        np.testing.assert_array_equal(np.asarray(a)[order], b)
