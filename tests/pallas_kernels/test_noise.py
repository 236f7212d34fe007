"""The bits are a contract: any program can make them again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from pallas_kernels import noise

KEY = jax.random.key(7, impl="threefry2x32")
DATA = jax.random.key_data(KEY)
rejection_noise, coupled_noise = (jax.jit(f, static_argnames="k")
                                  for f in (noise.rejection_noise, noise.coupled_noise))


@pytest.mark.parametrize("key, counter, out", [
    # the test vectors of Random123 (kat_vectors, threefry2x32 20)
    ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
])
def test_known_answers(key, counter, out):
    got = noise.threefry2x32(*map(jnp.uint32, key), *map(jnp.uint32, counter))
    assert tuple(map(int, got)) == out


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 - 1])
def test_seed_key_is_jax_key_below_32_bits(seed):
    assert (noise.seed_key(seed) == jax.random.key(seed, impl="threefry2x32")).all()


@pytest.mark.parametrize("impl, wide",
                         [("rbg", False), ("unsafe_rbg", False), ("threefry2x32", True)])
def test_seed_key_is_one_key_whatever_the_process_is_set_to(impl, wide):
    with jax.default_prng_impl(impl), jax.enable_x64(wide):
        for seed, words in ((5, (0, 5)), (np.int64(5 + 2**32), (1, 5)),
                            (2**64 - 1, (2**32 - 1, 2**32 - 1))):
            assert tuple(map(int, noise.key_words(noise.seed_key(seed)))) == words


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_beyond_64_bits_are_refused(seed):
    with pytest.raises(ValueError, match=rf"a seed must be from 0 to 2\*\*64 - 1, not {seed}"):
        noise.seed_key(seed)


def test_key_words_has_every_word_of_a_key():
    """Threefry's are its two; of a key of four words each counts."""
    np.testing.assert_array_equal(noise.key_words(KEY), DATA)
    words = np.array([[1, 2, 3, 4], *(np.array([1, 2, 3, 4]) + np.eye(4))], np.uint32)
    keys = noise.key_words(jax.random.wrap_key_data(words, impl="rbg"))
    assert keys.shape == (5, 2) and keys.dtype == jnp.uint32
    assert len(np.unique(keys, axis=0)) == 5


def test_fold_is_jax_fold_in():
    ids = jnp.array([0, 1, 17, 2**31 - 1])
    got = noise.fold(DATA, ids, 5)
    want = [jax.random.key_data(jax.random.fold_in(jax.random.fold_in(KEY, int(i)), 5))
            for i in ids]
    np.testing.assert_array_equal(got, jnp.stack(want))


def test_bits_are_partitionable_jax_bits():
    assert jax.config.jax_threefry_partitionable
    np.testing.assert_array_equal(noise.random_bits(DATA, jnp.arange(1000)),
                                  jax.random.bits(KEY, (1000,), jnp.uint32))


def test_uniform_is_below_one_and_exact():
    bits = jnp.array([0, 255, 256, 2**31, 2**32 - 1], jnp.uint32)
    np.testing.assert_array_equal(noise.uniform(bits),
                                  np.array([0, 0, 2.0**-24, 0.5, 1 - 2.0**-24], np.float32))


def test_gumbel_is_finite_at_the_ends():
    g = np.asarray(noise.gumbel(jnp.array([0, 1, 2**31, 2**32 - 2, 2**32 - 1], jnp.uint32)))
    assert np.isfinite(g).all()
    assert g[0] > 22 and g[-1] < -2.5
    np.testing.assert_allclose(g[2], -np.log(np.log(2)), atol=1e-6)


def test_distributions():
    bits = noise.random_bits(DATA, jnp.arange(200_000))
    assert stats.kstest(np.asarray(noise.uniform(bits)), "uniform").pvalue > 1e-4
    g = np.asarray(noise.gumbel(bits), np.float64)
    assert stats.kstest(g, "gumbel_r").pvalue > 1e-4
    np.testing.assert_allclose([g.mean(), g.var()], [np.euler_gamma, np.pi**2 / 6], rtol=0.02)


def test_rejection_noise_never_repeats():
    """Over sequences, cycles, offsets, tags and the two uniforms of a draw."""
    ids, committed = (jnp.asarray(x.ravel()) for x in np.meshgrid(np.arange(40), np.arange(50)))
    made = rejection_noise(DATA, ids, committed, 3)
    values = np.concatenate([np.asarray(x).ravel()
                             for x in (made.draft, made.accept, made.residual)])
    # 24 bits: n values collide by chance n^2 / 2^25 times; one that is used twice would repeat
    # 2,000 times at once
    expected = len(values) ** 2 / 2**25
    repeats = len(values) - len(np.unique(values))
    assert abs(repeats - expected) < 6 * np.sqrt(expected)
    flat = [np.asarray(x).reshape(2000, -1) for x in (made.draft, made.accept, made.residual)]
    assert np.abs(np.corrcoef(np.concatenate(flat, 1), rowvar=False) - np.eye(11)).max() < 0.1


def test_keys_never_collide_between_tags_and_offsets():
    fold = jax.jit(noise.fold)
    keys = fold(DATA, jnp.arange(30)[:, None, None, None], jnp.arange(30)[:, None, None],
                jnp.arange(8)[:, None], jnp.arange(4))
    positions = fold(DATA, jnp.arange(30)[:, None], jnp.arange(200), noise.TARGET)
    keys = np.concatenate([np.asarray(keys).reshape(-1, 2), np.asarray(positions).reshape(-1, 2)])
    assert len(np.unique(keys, axis=0)) == len(keys)


def test_rejection_noise_is_of_its_cycle_and_row_alone():
    whole = rejection_noise(DATA, jnp.arange(6), jnp.arange(6) + 3, 3)
    for k in (0, 2):
        one = rejection_noise(DATA, jnp.array([4]), jnp.array([7]), k)
        np.testing.assert_array_equal(one.residual[0], whole.residual[4])
        np.testing.assert_array_equal(one.draft[0], whole.draft[4, :k])
        np.testing.assert_array_equal(one.accept[0], whole.accept[4, :k])


def test_block_noise_is_the_numbers_of_rejection_noise():
    block = jax.jit(noise.block_noise,
                    static_argnames="k")(DATA, jnp.arange(6), jnp.arange(6) + 3, 3)
    assert type(block) is noise.BlockNoise
    for a, b in zip(jax.tree.leaves(block),
                    jax.tree.leaves(rejection_noise(DATA, jnp.arange(6), jnp.arange(6) + 3, 3)),
                    strict=True):
        np.testing.assert_array_equal(a, b)


def test_coupled_noise_is_of_the_position_alone():
    ids = jnp.array([5])
    whole = coupled_noise(DATA, ids, jnp.array([10]), 7).keys[0]
    assert whole.shape == (8, 2)
    for at in range(8):
        np.testing.assert_array_equal(coupled_noise(DATA, ids, jnp.array([10 + at]), 0).keys[0, 0],
                                      whole[at])
    want = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(KEY, 5), 10), noise.TARGET)
    np.testing.assert_array_equal(whole[0], jax.random.key_data(want))
