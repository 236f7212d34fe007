"""What is counted in a compiled program's text, against what the program is known to do."""

import jax
import jax.numpy as jnp
import pytest

from jspec.hlo import groups, instructions
from jspec.scale.counts import Collective, Count, added, counted
from jspec.scale.floors import Floor, Places, floor
from jspec.scale.products import operations
from jspec.scale.topologies import topology


def test_bodies_of_loops_count_as_often_as_they_turn():
    """Seven turns that are a constant, and as many as the caller says of those that are data."""

    def program(x, w, n):
        x, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=7)
        return jax.lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] @ w), (0, x))[1]

    shapes = [
        jax.ShapeDtypeStruct(s, t)
        for s, t in (((64, 256), "float32"), ((256, 256), "float32"), ((), "int32"))
    ]
    text = jax.jit(program).lower(*shapes).compile().as_text()
    total = counted(text, "all", lambda loop: 5.0, 1)
    once = 2 * 64 * 256 * 256
    assert sum(count.operations for count in total.values()) == (7 + 5) * once
    moved = sum(count.bytes for count in total.values())
    weights = 12 * 256 * 256 * 4
    assert weights <= moved <= 3 * weights
    assert sum(c.operations for c in added([total, total]).values()) == 24 * once


def test_a_part_of_an_array_counts_as_that_part():
    def program(table, rows, at):
        table = jax.lax.dynamic_update_slice(table, rows, (at, 0))
        return table, table[at + jnp.arange(3)]

    shapes = [
        jax.ShapeDtypeStruct(s, t)
        for s, t in (((100_000, 64), "float32"), ((4, 64), "float32"), ((), "int32"))
    ]
    text = jax.jit(program, donate_argnums=0).lower(*shapes).compile().as_text()
    assert sum(count.bytes for count in counted(text, "all", lambda _: 1.0, 1).values()) < 20_000


WINDOW = ("window={size=16x2x1 stride=15x1x1 lhs_dilate=16x2x1}, "
          "dim_labels=0b12f_01io->01b2f")
BATCHED = """
ENTRY %main () -> f32[16,2,512,4,512] {
  %a = bf16[16,512,2,4,128]{4,3,2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[16,2,128,512]{3,2,1,0:T(8,128)} parameter(1)
  %w = bf16[6144,4096]{1,0:T(8,128)} parameter(2)
  %x = bf16[256,4096]{1,0:T(8,128)} parameter(3)
  %c = f32[16,2,512,4,512]{2,4,3,1,0:T(8,128)} convolution(%a, %b), WINDOW
  %e = bf16[256,6144]{1,0:T(8,128)} convolution(%x, %w), dim_labels=bf_oi->bf
}
"""


def test_products_that_a_tpu_writes_as_convolutions():
    """Of scores of 16 prompts and 2 heads, whose batch axes are windows, dilated or padded: only
    those places count where a number meets another."""
    found = instructions(BATCHED.replace("WINDOW", WINDOW))
    assert operations(found["e"], found) == 2 * 256 * 6144 * 4096
    # axis 0 of 16: a window of 16, dilated by 16: one meeting each; axis 1 of 2 likewise
    assert operations(found["c"], found) == 2 * (16 * 2 * 4) * 512 * 128 * 512


KERNELS = """
ENTRY %main () -> bf16[512,768] {
  %plan = s32[17]{0} parameter(0)
  %x = bf16[512,2048]{1,0} parameter(1)
  %w = bf16[16,768,2048]{2,1,0} parameter(2)
  %dy = bf16[512,768]{1,0} parameter(3)
  %turned = bf16[2048,512]{1,0} parameter(4)
  %gmm = bf16[512,768]{1,0} custom-call(%plan, %x, %w), custom_call_target="tpu_custom_call"
  %tgmm = bf16[16,2048,768]{2,1,0} custom-call(%plan, %turned, %dy), target="tpu_custom_call"
  %other = bf16[512,768]{1,0} custom-call(%plan, %dy), custom_call_target="tpu_custom_call"
}
"""


def test_grouped_products_count_the_rows_of_the_experts_that_are_here():
    """Forward, and the weights' gradient, whose rows lie turned; 16 of 64 experts."""
    found, whole = instructions(KERNELS), 2 * 512 * 768 * 2048
    for name, expected in {"gmm": whole, "tgmm": whole, "other": 0}.items():
        assert operations(found[name], found) == expected
        assert operations(found[name], found, experts=64) == expected / 4


@pytest.mark.parametrize(
    ("said", "group", "count"),
    [
        ("replica_groups=[4,2]<=[8]", (0, 1), 4),
        ("replica_groups={{0,4},{1,5}}", (0, 4), 2),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4), 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3), 2),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", (0, 4), 4),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", (0, 2), 4),
    ],
)
def test_groups_of_a_collective(said, group, count):
    line = f"  %r = f32[8]{{0}} all-reduce(%p), channel_id=1, {said}, x={{}}"
    text = f"ENTRY %m () -> f32[8] {{\n{line}\n}}\n"
    found = groups(instructions(text)["r"], 8)
    assert found[0] == group and len(found) == count
    assert sorted(sum(found, ())) == list(range(8)) or said.endswith("{1,5}}")


def test_a_collective_that_is_spread_over_fusions_counts_once():
    text = """
%first (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %g = bf16[16,8]{1,0} all-gather(%p), replica_groups=[4,4]<=[16], {"flag_start":"-1"}
}
%later (q: bf16[4,8]) -> bf16[16,8] {
  %q = bf16[4,8]{1,0} parameter(0)
  ROOT %h = bf16[16,8]{1,0} all-gather(%q), replica_groups=[4,4]<=[16], {"flag_start":"2"}
}
ENTRY %main (x: bf16[4,8]) -> bf16[16,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %a = bf16[16,8]{1,0} fusion(%x), kind=kCustom, calls=%first
  ROOT %b = bf16[16,8]{1,0} fusion(%x), kind=kCustom, calls=%later
}
"""
    counts = counted(text, "all", lambda _: 1.0, 16)
    found = {key: n for count in counts.values() for key, n in count.collectives.items()}
    assert found == {Collective("all-gather", 256, (0, 1, 2, 3)): 1.0}


def test_a_transfer_is_of_the_phase_that_takes_what_it_brings():
    """A TPU's compiler begins it early: among the last phase's operations, with no scope."""
    text = """
ENTRY %main (w: bf16[1024,1024], x: bf16[8,1024]) -> bf16[8,1024] {
  %w = bf16[1024,1024]{1,0} parameter(0)
  %x = bf16[8,1024]{1,0:S(1)} parameter(1)
  %start = (bf16[1024,1024]{1,0:S(1)}, bf16[1024,1024]{1,0}, u32[]{:S(2)}) copy-start(%w)
  %a = bf16[8,1024]{1,0:S(1)} negate(%x), metadata={op_name="jit(f)/commit/neg"}
  %done = bf16[1024,1024]{1,0:S(1)} copy-done(%start)
  ROOT %d = bf16[8,1024]{1,0:S(1)} dot(%a, %done), METADATA
}
"""
    text = text.replace(
        "METADATA", 'lhs_contracting_dims={1}, metadata={op_name="jit(f)/verify/dot"}')
    counts = counted(text, "all", lambda _: 1.0, 1)
    assert {phase.name: count.bytes for phase, count in counts.items()} == {
        "verify": 2 * 1024 * 1024, "commit": 0}


def test_collectives_go_over_the_links_of_their_axes():
    """A ring of 8 chips that wraps, of which 2 links work: 7/8 of the bytes over both; a line has
    one way; an all-reduce is two; what crosses slices goes over the hosts' cards."""
    ring = Places(topology("v5p-1024"), tuple((0, (0, 0, z)) for z in range(8)))
    line = Places(topology("v5p-64"), tuple((0, (0, 0, z)) for z in range(4)))
    size, link = 9 * 10**9, 9e10
    assert ring.seconds(Collective("all-gather", size, tuple(range(8))))[0] == pytest.approx(
        size * 7 / 8 / (2 * link) + 4e-6
    )
    assert line.seconds(Collective("all-reduce", size, tuple(range(4))))[0] == pytest.approx(
        2 * (size * 3 / 4 / link + 3e-6)
    )
    apart = Places(topology("v5p-64"), ((0, (0, 0, 0)), (1, (0, 0, 0))))
    within, between = apart.seconds(Collective("all-reduce", size, (0, 1)))
    assert within == 0 and between == pytest.approx(2 * size / 2 / 6.25e9)


def test_what_binds_is_the_longest_part():
    places = Places(topology("v5e-16"), ((0, (0, 0)),))
    count = Count(operations=1.97e14, bytes=8.2e11 / 2)
    count.attended[256, 2, 4, 128] += 36
    found = floor(count, places, context=1000.0)
    assert found.binds == "operations"
    assert found.bytes - count.bytes == 36 * 256 * 2 * 128 * 1000 * 4
    assert found.operations - count.operations == 36 * 4 * 256 * 2 * 4 * 128 * 1000
    assert (found + Floor(dcn=9.0)).binds == "collectives (DCN)"
    assert (found * 3).seconds == pytest.approx(3 * found.seconds)
