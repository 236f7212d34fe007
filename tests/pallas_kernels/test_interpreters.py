"""Bits of noise inside a kernel, and the twin that shows that a race would be found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import noise
from tests.pallas_kernels.interpreters import CHIPS, forget, races_found


def _tpu(body, x, shape, scratch):
    spec = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(body, in_specs=[spec], out_specs=spec, out_shape=shape,
                          scratch_shapes=scratch, interpret=CHIPS["tpu"].interpret)(x)


def _tpu_copy(wait):
    def body(x, out, buffer, sent):
        copy = pltpu.make_async_copy(x, buffer, sent)
        copy.start()
        if wait:
            copy.wait()
        value = buffer[...] + 1
        if not wait:
            copy.wait()
        buffer[...] = value
        pltpu.sync_copy(buffer, out)

    x = jnp.arange(8 * 128, dtype=jnp.float32).reshape(8, 128)
    return _tpu(body, x, jax.ShapeDtypeStruct(x.shape, x.dtype),
                [pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA])


def _gpu_copy(wait):
    def body(x, out, buffer, arrived):
        plgpu.copy_gmem_to_smem(x, buffer, arrived)
        if wait:
            plgpu.barrier_wait(arrived)
        value = buffer[...] + 1
        if not wait:
            plgpu.barrier_wait(arrived)
        out[...] = value

    x = jnp.arange(128, dtype=jnp.float32)
    return plgpu.kernel(body, out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
                        scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()],
                        interpret=CHIPS["gpu"].interpret)(x)


@pytest.mark.parametrize("chip, run", [("tpu", _tpu_copy), ("gpu", _gpu_copy)])
@pytest.mark.parametrize("wait", [True, False])
def test_a_copy_that_is_not_waited_for_is_a_race(chip, run, wait):
    try:
        jax.block_until_ready(run(wait))
        assert races_found(chip) == (not wait)
    finally:
        forget(chip)


def _bits_tpu(keys, ids):
    def body(keys, ids, out):
        x0, x1 = noise.threefry2x32(*(keys[:, i:i + 1].astype(jnp.uint32) for i in (0, 1)),
                                    jnp.uint32(0), ids[...].astype(jnp.uint32))
        out[...] = (x0 ^ x1).astype(jnp.int32)

    shape = jax.ShapeDtypeStruct((len(keys), ids.shape[1]), jnp.int32)
    return pl.pallas_call(body, out_shape=shape,
                          interpret=CHIPS["tpu"].interpret)(keys.astype(jnp.int32), ids)


def _bits_gpu(keys, ids):
    def body(keys, ids, out):
        def row(i, _):
            out[i] = noise.random_bits(keys.at[i], ids[0]).astype(jnp.int32)
        lax.fori_loop(0, keys.shape[0], row, None)

    shape = jax.ShapeDtypeStruct((len(keys), ids.shape[1]), jnp.int32)
    return plgpu.kernel(body, out_type=shape, interpret=CHIPS["gpu"].interpret)(keys, ids)


@pytest.mark.parametrize("run", [_bits_tpu, _bits_gpu])
def test_the_same_bits_inside_a_kernel(run):
    rng = np.random.default_rng(0)
    keys = jnp.asarray(rng.integers(0, 2**32, (8, 2), dtype=np.uint32))
    ids = jnp.asarray(rng.integers(0, 2**31, (1, 256), dtype=np.int32))
    got = jax.lax.bitcast_convert_type(run(keys, ids), jnp.uint32)
    np.testing.assert_array_equal(got, noise.random_bits(keys[:, None], ids))
