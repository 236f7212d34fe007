"""The floor of a cycle against figures that were worked out by hand from published shapes."""

import dataclasses

import jax
import numpy as np
import pytest

from jspec.drafts import dflash, draft_model, dspark, eagle3, mixed, mtp, ngram, peagle
from jspec.drafts import self as itself
from jspec.model import ModelConfig, abstract_policy
from jspec.scale.chips import CHIPS
from jspec.scale.cycle_cost import (
    Decoding,
    Overhead,
    Sizes,
    Split,
    cycle,
    draft_sizes,
    forward,
    ring,
    shards_reached,
    torus,
)
from tests.scale.models import QWEN3_8B, QWEN3_30B, QWEN3_235B

V5P = CHIPS["v5p"]
MS = 1e3


@pytest.mark.parametrize("model, total, in_experts, active, kv_bytes", [
    (QWEN3_8B, 8.19e9, 0, 8.19e9, 147_456), (QWEN3_30B, 30.53e9, 28.99e9, 3.35e9, 98_304),
    (QWEN3_235B, 235.09e9, 227.10e9, 22.19e9, 192_512)], ids=["8b", "30b", "235b"])
def test_sizes_are_those_that_are_published(model, total, in_experts, active, kv_bytes):
    sizes, looked_up = Sizes.of(model), model.vocab_size * model.hidden_size
    experts = sizes.expert * sizes.experts * sizes.sparse_layers
    assert experts == pytest.approx(in_experts, rel=1e-3)
    assert sizes.dense + experts + looked_up == pytest.approx(total, rel=1e-3)
    assert sizes.active + looked_up == pytest.approx(active, rel=2e-3)
    assert sizes.kv_values * sizes.kv_bytes == kv_bytes


def test_a_tied_embedding_is_the_head_and_read():
    model = dataclasses.replace(QWEN3_8B, tie_embeddings=True)
    assert Sizes.of(model).dense == Sizes.of(QWEN3_8B).dense


def test_experts_hit_by_chance():
    hit = Sizes.of(QWEN3_30B).experts_hit([1, 8, 32, 64])
    assert hit.round().tolist() == [8, 52, 112, 126]


@pytest.mark.parametrize("members, reached", [(4, 3.63), (8, 5.34), (16, 6.60), (32, 7.36)])
def test_shards_that_a_token_reaches(members, reached):
    assert shards_reached(Sizes.of(QWEN3_30B), members) == pytest.approx(reached, abs=0.01)


def test_floor_of_a_cycle_on_512_chips():
    """Were all weights split evenly: 0.37 ms of weights; 10.3 of 8 rows' keys and values at 16k."""
    sizes = Sizes.of(QWEN3_235B)
    even = dataclasses.replace(sizes, dense=sizes.dense / 512, expert=sizes.expert / 4)
    found = forward(even, V5P, Split(512, 1, 128), 8, 8 * 16384)
    assert MS * found.weights == pytest.approx(0.37, rel=0.03)
    assert MS * found.key_values == pytest.approx(10.3, rel=0.01)
    bare = dataclasses.replace(sizes, score_operations=0.0)
    once, four = (MS * forward(bare, V5P, Split(512, 1, 128), 8, 0, tokens).operations
                  for tokens in (1, 4))
    assert once == pytest.approx(0.77 * 21.56 / 22.19, rel=0.01)  # without the embedding's rows
    assert four == pytest.approx(4 * once)


def test_as_counted_in_the_compiled_program():
    """What `jspec fit configs/qwen3-8b-pod.yaml --on v5e-16 mesh.fsdp=4` counted in libtpu's
    programs (JAX 0.10.2): a cycle of 256 rows of a shard, k = 3, at 1,536 positions each."""
    chip, split, head = CHIPS["v5e"], Split(4, 4), 151936 * 4096
    verify = forward(Sizes.of(QWEN3_8B), chip, split, 256, 256 * 1536, 4)
    assert verify.operations * chip.bf16 == pytest.approx(3.788e12 + 0.319e12, rel=0.02)
    moved = (verify.weights + verify.key_values) * chip.hbm_bandwidth
    assert moved == pytest.approx(16.37e9 + 2.32e9, rel=0.04)  # verify, and logits in accept
    assert verify.collectives == pytest.approx(0.0105, rel=0.03)
    block = Sizes.of(dataclasses.replace(QWEN3_8B, num_layers=1))
    draft = dataclasses.replace(block, dense=block.dense + 2 * 4096**2)
    assert draft.dense > head
    drafted = forward(draft, chip, split, 256, 256 * 1536)
    assert 3 * drafted.operations * chip.bf16 == pytest.approx(0.326e12, rel=0.03)
    assert 3 * drafted.seconds < 0.00632  # a floor: its logits, written and read, are left out


def test_attention_is_computed_for_every_token():
    found = forward(Sizes.of(QWEN3_8B), V5P, Split(1), 1, 1000, 3)
    operations = 2 * 3 * Sizes.of(QWEN3_8B).active + 4 * 36 * 32 * 128 * 1000 * 3
    assert found.operations == pytest.approx(operations / V5P.bf16)


def test_bytes_and_operations_overlap_and_what_is_sent_does_not():
    found = forward(Sizes.of(QWEN3_8B), V5P, Split(1, 4), [1, 4096], [1000, 4096])
    assert found.weights[0] > found.operations[0] and found.weights[1] < found.operations[1]
    few, many = found.seconds - found.collectives
    assert few == pytest.approx(found.weights[0] + found.key_values[0])
    assert many == pytest.approx(found.operations[1])
    assert np.all(found.collectives > 0)


def test_heads_fewer_than_shards_are_replicated():
    two, four, eight = (forward(Sizes.of(QWEN3_235B), V5P, Split(1, n), 1, 1000).key_values
                        for n in (2, 4, 8))
    assert two == 2 * four and eight == four


def test_rings():
    v5e, h100 = CHIPS["v5e"], CHIPS["h100"]
    assert ring(1e9, 1, V5P, 64) == 0
    assert torus(8, V5P, 512) == (8, 1) and torus(64, V5P, 512) == (8, 2)
    assert torus(512, V5P, 512) == (8, 3) and torus(16, v5e, 256) == (16, 1)
    assert ring(1e9, 8, V5P, 512) == pytest.approx(1e9 * 7 / 8 / 1.8e11, rel=0.01)
    assert ring(1e9, 8, h100, 64) == pytest.approx(1e9 * 7 / 8 / 4.5e11, rel=0.01)
    for members, apart in ((16, 1), (8, 2)):  # beyond a host it is the network
        sent = 1e9 * (members - 1) / members
        assert ring(1e9, members, h100, 64, apart) == pytest.approx(sent / 5e10, rel=0.01)
    assert ring(1e9, 64, CHIPS["gb200"], 512) == pytest.approx(1e9 * 63 / 64 / 9e11, rel=0.01)


def test_all_to_all_sends_less_than_a_gather_where_a_token_reaches_few_shards():
    sizes, chip = Sizes.of(QWEN3_235B), CHIPS["gb200"]
    gather, sparse = (forward(sizes, chip, Split(64, 1, 64, sparse), 64, 0).collectives
                      for sparse in (False, True))
    assert sparse < 0.2 * gather


def test_a_cycle_drafts_verifies_and_has_its_overhead():
    sizes = Sizes.of(QWEN3_8B)
    part = dataclasses.replace(sizes, layers=1, dense=1e8, kv_values=0, score_operations=0)
    decoding = Decoding(sizes, V5P, Split(1), (part,))
    plain, drafting = cycle(decoding, 0, 8, 8000), cycle(decoding, 3, 8, 8000)
    assert plain.draft == plain.overhead == 0
    assert drafting.draft == pytest.approx(3 * 2e8 / V5P.hbm_bandwidth)
    share = cycle(dataclasses.replace(decoding, draft_share=0.1), 3, 8, 8000)
    assert share.draft == pytest.approx(0.3 * plain.seconds)
    for passes in (1, 2):
        few = dataclasses.replace(decoding, draft=(dataclasses.replace(part, passes=passes),))
        assert cycle(few, 3, 8, 8000).draft == pytest.approx(passes * drafting.draft / 3, rel=1e-3)
        assert cycle(few, 1, 8, 8000).draft == cycle(decoding, 1, 8, 8000).draft
        assert cycle(few, 0, 8, 8000).draft == 0
    more = dataclasses.replace(decoding, overhead=Overhead(1e-3, 2e-3, 1e-3))
    assert cycle(more, 3, 8, 8000).seconds == pytest.approx(drafting.seconds + 6e-3)
    relative = Overhead(0.0, 0.5, 0.25, relative=True)
    found = cycle(dataclasses.replace(decoding, overhead=relative), 2, 8, 8000)
    assert found.overhead == pytest.approx(plain.seconds)


def test_overhead_goes_from_no_draft_to_the_least_that_was_measured():
    line = Overhead(1.0, -0.5, 0.5, least=3)
    assert [line.of(k) for k in (0, 3, 5)] == [1.0, 2.0, 3.0]
    assert line.of(1) == pytest.approx(1 + 1 / 3)


SMALL = ModelConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2,
                    num_kv_heads=1, head_dim=8)


def test_what_drafting_a_token_reads():
    policy, sizes = abstract_policy(SMALL), Sizes.of(SMALL)
    assert draft_sizes(None, sizes, SMALL) == draft_sizes(ngram(policy), sizes, SMALL) == ()
    assert draft_sizes(itself(policy, bits=4), sizes, SMALL) == (
        dataclasses.replace(sizes, weight_bytes=0.5),)
    small = dataclasses.replace(SMALL, num_layers=1, num_kv_heads=SMALL.num_heads)
    assert draft_sizes(draft_model(policy, 0, model=small), sizes, SMALL) == (Sizes.of(small),)

    def found(make, **options):
        return draft_sizes(_abstract(make, policy, **options), sizes, SMALL)

    block = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 32  # attention and feed-forward
    fused = 16 * (16 + 2 * 8) + 3 * 16 * 16  # queries, keys and values of twice the width
    for make, inputs, layers, passes in (  # an own embedding is looked up
            (mtp, 2 * 16 * 16, 1, (0, 0)), (eagle3, fused, 1, (0, 0)), (peagle, fused, 1, (2, 1)),
            (dflash, 16 * 16, 2, (1, 1))):
        blocks, head, *others = found(make)
        assert blocks.dense == pytest.approx(layers * block + inputs, rel=0.05), make
        assert (blocks.kv_values, blocks.layers) == (layers * 2 * 8, layers)
        assert head.dense == 64 * 16 and head.kv_values == head.layers == 0 and not others
        assert (blocks.passes, head.passes) == passes
    made = _abstract(mtp, policy)
    steps = made.replace(config=dataclasses.replace(made.config, blocks=2, shared=True))
    assert draft_sizes(steps, sizes, SMALL) == draft_sizes(made, sizes, SMALL)
    assert found(eagle3, layers=2)[0].dense == pytest.approx(2 * block + fused, rel=0.05)
    # of the Markov head w1 is looked up, and w2 read for each token; the confidence is not asked
    *rest, markov = found(dspark, confidence=True)
    assert tuple(rest) == found(dflash) and (markov.dense, markov.passes) == (64 * 256, 0)
    around = jax.eval_shape(lambda policy: mixed(policy, 0, draft="dspark"), policy)
    assert draft_sizes(around, sizes, SMALL) == found(dspark)


def test_a_draft_of_one_pass_reads_its_weights_once_a_cycle():
    """Qwen3-8B on one device, few rows: bytes bind, and are the parameters' by hand."""
    sizes, policy = Sizes.of(QWEN3_8B), abstract_policy(QWEN3_8B)
    layer = 4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 12288
    head, wider = 151936 * 4096, 4096 * (4096 + 2 * 1024)
    parameters = {dflash: lambda k: 2 * layer + 5 * 4096**2 + head,
                  dspark: lambda k: 2 * layer + 5 * 4096**2 + head + k * 151936 * 256,
                  # queries, keys and values are of twice the width
                  peagle: lambda k: min(k, 2) * (layer + wider + 3 * 4096**2) + head,
                  mtp: lambda k: k * (layer + 2 * 4096**2 + head)}
    for make, count in parameters.items():
        draft = draft_sizes(_abstract(make, policy), sizes, QWEN3_8B)
        for k in (1, 4, 7):
            found = cycle(Decoding(sizes, V5P, Split(1), draft), k, 8, 0).draft
            assert found == pytest.approx(2 * count(k) / V5P.hbm_bandwidth, rel=1e-3), (make, k)


def _abstract(make, policy, **options):
    return jax.eval_shape(lambda policy: make(policy, jax.random.key(0), **options), policy)


def test_numbers_and_arrays_alike():
    decoding = Decoding(Sizes.of(QWEN3_30B), V5P, Split(32, 1, 16))
    rows, context = np.array([1.0, 8.0]), np.array([100.0, 9000.0])
    together = cycle(decoding, 3, rows, context).seconds
    assert together.tolist() == [float(cycle(decoding, 3, *pair).seconds)
                                 for pair in zip(rows, context, strict=True)]
