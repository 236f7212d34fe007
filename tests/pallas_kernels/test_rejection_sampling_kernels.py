"""The kernels of `rejection_sampling`: each number of a chunk against float64, and verdicts against
the reference.

Stated tolerances, float32: 1e-5 of what a chunk or a row sums up; a token may differ from the
reference's where the margin that decided it is below TIE.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels import noise as noise_lib
from pallas_kernels.noise import BlockNoise, CoupledNoise, RejectionNoise
from pallas_kernels.rejection_sampling import gpu, rejection_sampling, shapes, summary, tpu
from tests.pallas_kernels import oracle
from tests.pallas_kernels.interpreters import CHIPS, PLAIN, races_found

TIE = 1e-4
TOLERANCE = 1e-5
MODULES = {"tpu": tpu, "gpu": gpu}
MULTIPLE = {"tpu": 1, "gpu": 64}  # elements of which the kernel's rows must be a multiple


def few(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True)


cases = st.fixed_dictionaries({
    "seed": st.integers(0, 2**32 - 1), "rows": st.integers(1, 9),
    "chunks": st.sampled_from([0.01, 0.3, 1, 1.6, 2.9]),
    "dtype": st.sampled_from(["float32", "bfloat16"]),
    "rule": st.sampled_from(["coupled", "rejection"]),
    "offset": st.sampled_from([None, 0, 592, 1536]), "banned": st.booleans(),
    "lone": st.booleans()})


def check_summary(chip, seed, rows, chunks, dtype, rule, offset, banned, lone):
    """lone: all of a row -inf but for one id."""
    rng = np.random.default_rng(seed)
    multiple = MULTIPLE[chip]
    vocab = max(int(chunks * summary.CHUNK) // multiple, 1) * multiple
    first = offset or 0
    x = rng.normal(0, 3, (rows, vocab)).astype(np.float32)
    x[rng.random(x.shape) < 0.2] = -np.inf
    if lone:
        x[:] = -np.inf
        x[np.arange(rows), rng.integers(0, vocab, rows)] = 1
    logits = jnp.asarray(x, dtype)
    temperature = rng.choice([0, 1e-12, 0.3, 1, 2.5], rows).astype(np.float32)
    drafted = keys = None
    if rule == "coupled":
        keys = rng.integers(0, 2**32, (rows, 2), dtype=np.uint32)
    else:
        drafted = np.where(rng.random(rows) < 0.3, -1,
                           first + rng.integers(0, vocab, rows)).astype(np.int32)
    tokens = (tuple(int(first + i) for i in (*rng.integers(0, vocab, 2), vocab + 3)) if banned
              else ())
    ban = rng.random(rows) < 0.5
    got = MODULES[chip].summarize(logits, jnp.asarray(temperature),
                                  *(None if a is None else jnp.asarray(a)
                                    for a in (drafted, keys, ban if banned else None, offset)),
                                  banned_tokens=tokens, interpret=CHIPS[chip].interpret)
    assert not races_found(chip)
    for i in range(rows):
        g = None
        if keys is not None:
            g = np.asarray(noise_lib.gumbel(
                noise_lib.random_bits(jnp.asarray(keys[i]), first + jnp.arange(vocab))), np.float64)
        want = oracle.summary(np.asarray(logits[i], np.float32), temperature[i],
                              -1 if drafted is None else drafted[i],
                              g, banned and ban[i], tokens, first, summary.CHUNK)
        missing = {"drafted", "mass", "spill"} if keys is not None else {"best_noise"}
        missing |= {"spill"} if offset is None else set()
        some = want["best"] > -np.inf
        for name, value in want.items():
            if name in missing:
                assert getattr(got, name) is None
                continue
            mine = np.asarray(getattr(got, name)[i], np.float64)
            assert mine.shape == value.shape
            if name == "best_id":
                mine, value = mine[some], value[some]
            np.testing.assert_allclose(mine, value, rtol=0 if name == "best_id" else TOLERANCE,
                                       atol=TOLERANCE, err_msg=name)


# a finished row's logits may be anything
FINISHED = dict(seed=1, rows=5, dtype="float32", banned=False, lone=True)


@few(12)
@given(cases)
@example(dict(FINISHED, chunks=1.6, rule="rejection", offset=592))
def test_summary_tpu(case):
    check_summary("tpu", **case)


@few(2)
@given(cases)
@example(dict(FINISHED, chunks=1, rule="coupled", offset=None))
def test_summary_gpu(case):
    check_summary("gpu", **{**case, "rows": min(case["rows"], 3)})


@pytest.mark.slow
@few(400)
@given(cases)
def test_summary_tpu_in_full(case):
    check_summary("tpu", **case)


@pytest.mark.slow
@few(60)
@given(cases)
def test_summary_gpu_in_full(case):
    check_summary("gpu", **case)


def verdict(implementation=None, **static):
    options = {} if implementation is None else {"implementation": implementation}
    return jax.jit(partial(rejection_sampling, **options, **static))


def case(seed, rows, k, vocab, kind, coupled, dtype="float32", uniforms=RejectionNoise):
    """Arguments of `rejection_sampling`. kind: of the drafts, "certain", "sampled" or "reduced";
    uniforms: of the noise where it is not coupled."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (rows, k + 1, vocab)).astype(np.float32)
    logits[:, :, rng.integers(0, vocab, vocab // 8)] = -np.inf
    ids = (np.sort(rng.choice(vocab, vocab // 3, replace=False)).astype(np.int32)
           if kind == "reduced" else None)
    likely = (rng.integers(0, vocab, (rows, k + 1)) if ids is None
              else rng.choice(ids, (rows, k + 1)))
    # about half of the mass
    np.put_along_axis(logits, likely[..., None], np.log(2 * vocab) + 2, axis=-1)
    width = vocab if ids is None else len(ids)
    near = logits[:, :k] if ids is None else logits[:, :k][..., ids]
    log_q = np.asarray(jax.nn.log_softmax(
        np.maximum(near, -5) + rng.normal(0, 0.7, (rows, k, width)))).astype(np.float32)
    if kind == "certain":
        drafts = likely[:, :k]
    else:
        drafts = np.argmax(log_q + rng.gumbel(size=log_q.shape), -1)
        drafts = drafts if ids is None else ids[drafts]
    if coupled:
        noise = CoupledNoise(jnp.asarray(rng.integers(0, 2**32, (rows, k + 1, 2), dtype=np.uint32)))
    else:
        noise = uniforms(*(jnp.asarray(rng.random(s), jnp.float32)
                           for s in ((rows, k, 2), (rows, k), (rows, 2))))
    log_q = None if kind == "certain" else jnp.asarray(log_q)
    temperature = jnp.asarray(rng.choice([0, 0.7, 1.0, 1.0], rows), jnp.float32)
    return dict(logits=jnp.asarray(logits, dtype), draft_tokens=jnp.asarray(drafts, jnp.int32),
                draft_log_q=log_q, noise=noise, temperature=temperature,
                draft_vocab=None if ids is None else jnp.asarray(ids),
                ban=jnp.asarray(rng.random((rows, k + 1)) < 0.3))


def nudged(args):
    """The same arguments, with what decides moved by less than a tie's margin: noise, or logits
    where they decide."""
    noise = args["noise"]
    for shift in (-TIE, TIE):
        if isinstance(noise, CoupledNoise):
            for parity in (0, 1):
                sign = (shift * ((jnp.arange(args["logits"].shape[-1]) + parity) % 2)
                        .astype(jnp.float32))
                yield {**args, "logits": args["logits"].astype(jnp.float32) + sign}
        else:
            yield {**args, "noise": jax.tree.map(lambda u, s=shift: jnp.clip(u * (1 + s) + s / 10,
                                                                             0, 1 - 2**-24), noise)}


def assert_same(got, args, reference, *, at_most=0.02):
    """Tokens equal the reference's but for a share `at_most` of ties; numbers are close."""
    want = reference(**args)
    emitted = np.arange(want.tokens.shape[1]) <= np.asarray(want.accepted)[:, None]

    def equal(want):
        emitted = np.arange(want.tokens.shape[1]) <= np.asarray(want.accepted)[:, None]
        same = np.asarray(got.accepted) == want.accepted
        return same & (~emitted | (np.asarray(got.tokens) == want.tokens)).all(1)

    same = equal(want)
    if not same.all():
        explained = np.any([equal(reference(**other)) for other in nudged(args)], axis=0)
        assert (same | explained).all(), (f"rows {np.flatnonzero(~same & ~explained)} differ, and "
                                          "by no tie")
        assert (~same).sum() <= max(1, at_most * len(same))
    keep = emitted & same[:, None]
    np.testing.assert_allclose(np.asarray(got.logprobs)[keep], np.asarray(want.logprobs)[keep],
                               atol=TOLERANCE, rtol=TOLERANCE)
    np.testing.assert_allclose(got.entropy, want.entropy, atol=TOLERANCE, rtol=TOLERANCE)
    return want


def ruined(args, seed=0):
    """The same arguments with drafts of which a part is not finite."""
    rng = np.random.default_rng(seed)
    bad = rng.choice(np.float32([np.nan, np.inf, -np.inf, 0]), args["draft_tokens"].shape,
                     p=[0.3, 0.1, 0.1, 0.5])
    return {**args,
            "draft_log_q": jnp.where(bad[..., None] == 0, args["draft_log_q"], bad[..., None])}


def chilled(args):
    """The same arguments at temperatures down to what counts as 0."""
    tiny = np.resize(np.float32([1e-2, 1e-6, 1e-12, 1e-30, 1.2e-38, 1e-40]),
                     args["temperature"].shape)
    return {**args, "temperature": jnp.asarray(tiny)}


VERDICTS = [("certain", 3, 1300, False), ("sampled", 3, 1300, False), ("reduced", 2, 700, False),
            ("certain", 0, 1300, False), ("sampled", 3, 1300, True), ("certain", 0, 515, True)]


@pytest.mark.parametrize("kind, k, vocab, coupled", VERDICTS)
def test_verdicts_equal_the_reference(kind, k, vocab, coupled):
    check_verdicts(kind, k, vocab, coupled)


def check_verdicts(kind, k, vocab, coupled, uniforms=RejectionNoise):
    kernel, reference = (verdict(*which, banned_tokens=(5, 17)) for which in ((PLAIN,), ()))
    args = case(vocab + k, 64, k, vocab, kind, coupled, uniforms=uniforms)
    want = assert_same(kernel(**args), args, reference)
    if k:
        assert len(set(np.asarray(want.accepted).tolist())) == k + 1  # all that can happen does
    others = ([chilled(args)] if kind == "certain"
              else [chilled(args), ruined(args), chilled(ruined(args))])
    for other in others:
        want = assert_same(kernel(**other), other, reference)
        emitted = np.arange(k + 1) <= np.asarray(want.accepted)[:, None]
        assert (np.isfinite(np.asarray(want.logprobs)[emitted]).all()
                and np.isfinite(want.entropy).all())


@pytest.mark.parametrize("kind, k, vocab", [("sampled", 3, 1300), ("reduced", 2, 700),
                                            ("certain", 3, 1300), ("certain", 0, 515)])
def test_block_verdicts_equal_the_reference(kind, k, vocab):
    check_verdicts(kind, k, vocab, False, BlockNoise)


def test_verdicts_of_the_gpu_equal_the_reference():
    """A usual row, a cold one, and one whose draft is not finite."""
    args = case(0, 3, 1, 704, "sampled", False)
    args |= {"temperature": jnp.array([0.7, 1e-12, 1.0]),
             "draft_log_q": args["draft_log_q"].at[2].set(jnp.nan)}
    assert_same(verdict(CHIPS["gpu"])(**args), args, verdict())
    assert not races_found("gpu")


def test_a_verdict_with_the_wrong_noise_does_not():
    """The twin of the comparison: another key, or another uniform, is seen."""
    for coupled in (True, False):
        args = case(1, 64, 2, 700, "sampled", coupled)
        other = jax.tree.map(lambda x: x[::-1], args["noise"])
        with pytest.raises(AssertionError, match="differ, and by no tie"):
            assert_same(verdict(PLAIN)(**{**args, "noise": other}), args, verdict())


def test_bfloat16_logits():
    args = case(3, 32, 2, 1000, "sampled", False, "bfloat16")
    assert_same(verdict(PLAIN)(**args), args, verdict())


SMALL = ("smollm2-135m-b1-k0-float32", "smollm2-135m-b1-k3-float32")
REAL = [pytest.param(s, marks=() if s.name in SMALL else pytest.mark.slow, id=s.name)
        for s in shapes.SHAPES if s.logits_bytes * s.shards < 400e6]


@pytest.mark.parametrize("shape", REAL)
@pytest.mark.parametrize("coupled", [False, True])
def test_real_shapes(shape, coupled):
    args = case(shape.rows, shape.batch, shape.k, shape.vocab, "sampled" if shape.k else "certain",
                coupled, shape.dtype)
    assert_same(verdict(PLAIN)(**args), args, verdict())


def test_refusals():
    args = case(0, 1, 1, 64, "certain", False)
    half = {**args, "logits": args["logits"].astype(jnp.float16)}
    for chip in CHIPS.values():
        with pytest.raises(NotImplementedError, match="must be float32 or bfloat16, not float16"):
            rejection_sampling(**half, implementation=chip)
    odd = case(0, 1, 1, 67, "certain", False)
    with pytest.raises(NotImplementedError,
                       match="a row of 67 float32 logits is not a multiple of 128 bytes"):
        rejection_sampling(**odd, implementation=CHIPS["gpu"])


@pytest.mark.parametrize("kind, k", [("certain", 2), ("sampled", 2), ("certain", 0)])
def test_a_ban_of_what_outweighs_all_else(kind, k):
    """What is left is e^-200 of the row: it must be weighed against itself."""
    args = case(11, 64, k, 700, kind, False)
    args["logits"] = args["logits"].at[..., 5].set(200.0)
    args |= {"ban": jnp.ones_like(args["ban"]), "temperature": jnp.ones(64)}
    want = assert_same(verdict(PLAIN, banned_tokens=(5,))(**args), args,
                       verdict(banned_tokens=(5,)))
    assert not (np.asarray(want.tokens[:, 0]) == 5).any()


def test_a_ban_that_leaves_one_token():
    """Its probability is 1, exactly: a draft of it is accepted whatever the uniform, and nothing
    else is emitted."""
    logits = jnp.full((8, 2, 700), -jnp.inf).at[..., 5].set(3.3).at[..., 300].set(
        jnp.linspace(-7, 9, 8)[:, None])
    top = 1 - 2**-24
    noise = RejectionNoise(jnp.full((8, 1, 2), top), jnp.full((8, 1), top), jnp.full((8, 2), top))
    out = verdict(PLAIN, banned_tokens=(5,))(logits, jnp.full((8, 1), 300), None, noise,
                                             jnp.ones(8), ban=jnp.ones((8, 2), bool))
    np.testing.assert_array_equal(out.accepted, 1)
    np.testing.assert_array_equal(out.tokens, 300)


def test_ids_stay_in_the_vocabulary_and_entropy_finite():
    """A padded vocabulary of the smallest floats; and NaN, of which a token that exists must
    come."""
    args = case(12, 4, 1, 1200, "certain", False) | {"temperature": jnp.ones(4)}
    args["logits"] = args["logits"].at[..., 512:].set(jnp.finfo(jnp.float32).min)
    assert_same(verdict(PLAIN)(**args), args, verdict())
    args["logits"] = jnp.full_like(args["logits"], jnp.nan)
    assert (np.asarray(verdict(PLAIN)(**args).tokens) < 1200).all()


def test_the_reference_refuses_a_shard():
    args = case(0, 1, 1, 64, "certain", False)
    for options in ({}, {"implementation": PLAIN, "top_k": 3}):
        with pytest.raises(NotImplementedError,
                           match="judges a whole vocabulary, not a shard of it: leave out axis"):
            rejection_sampling(**args, axis=("tensor",), **options)
