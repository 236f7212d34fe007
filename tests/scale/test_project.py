"""Rollouts and steps; and what others have published of speculation in post-training, out of the
model's own formulas (arXiv 2604.26779; the inputs that are not published are named here)."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from jspec import cli
from jspec.config import load_config
from jspec.scale.chips import CHIPS
from jspec.scale.cycle_cost import Decoding, Overhead, Sizes, Split
from jspec.scale.lengths import constant, shuffled, spans, tail
from jspec.scale.project import (
    Answers,
    by_tokens,
    pays_from,
    project,
    rest_of_share,
    rollout_seconds,
    step_seconds,
    tokens_a_cycle,
)
from jspec.scale.project_command import projected
from tests.scale.models import QWEN3_8B, QWEN3_235B

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "benchmarks" / "published"
BIG = ["mesh.fsdp=1", "mesh.expert=64", "mesh.tensor=1", "grpo.micro_batch=0",
       "data.prompts_per_step=256", "data.group_size=16", "data.max_prompt_tokens=1024",
       "sampling.max_new_tokens=32768", "--precision", "fp8", "--engine", "server",
       "--lengths", "tail:6000:0.8"]
"""4,096 rollouts in FP8 with a long tail are as published; that experts lie on 64 devices, and how
long prompts and answers are, is assumed."""
SMALL = ["mesh.fsdp=1", "mesh.tensor=1", "sampling.max_new_tokens=16384", "--engine", "server"]
"""How many rollouts there were, and of what length, is assumed."""


def found(model, on, *rest):
    """The projection of `jspec project` for a model's shape."""
    arguments = cli._parse(["project", str(ROOT / "configs" / "qwen3-8b-pod.yaml"), "--on", on,
                            *rest])
    return projected(load_config(arguments.config, arguments.overrides), model, on, arguments)


def cells(of):
    return {(cell.k, cell.tokens): cell for row in of.rows for cell in row if cell}


@pytest.mark.parametrize("calibration", [
    ["--costs", str(PUBLISHED / "qwen3_235b.json")],
    ["--draft-cost", "0.014"]],  # a block and a head of 32,000 tokens in FP8: nothing is fitted
    ids=["measured", "floor"])
def test_the_published_simulation_of_235b(calibration):
    one = found(QWEN3_235B, "gb200-512", *BIG, *calibration, "--generation-share", "0.65",
                "--tokens", "3,5,8")
    for at, rollout, step in (((3, 3), 2.72, 1.70), ((7, 5), 4.07, 1.96), ((7, 8), 6.49, 2.22)):
        cell = cells(one)[at]
        assert (cell.rollout, cell.step) == pytest.approx((rollout, step), rel=0.03)
    late = found(QWEN3_235B, "gb200-2048", *BIG, *calibration, "--generation-share", str(1 / 1.4),
                 "--lag", "2", "--tokens", "4")  # the rest takes 0.40 of generation
    cell = cells(late)[5, 4]
    assert (cell.rollout, cell.step) == pytest.approx((3.5, 2.5), rel=0.05)


@pytest.mark.parametrize("name, generation, step, others", [
    ("zero", 100.0, (151.2, 107.5), {2.88: 1.51, 3.04: 1.63}),
    ("think", 133.6, (185.3, 137.4), {})])
def test_the_published_table_of_8b(name, generation, step, others):
    table = json.loads((PUBLISHED / f"qwen3_8b_{name}.json").read_text())
    points = {(row["k"], row["tokens"]): row["speedup"] for row in table["measured"]}
    tokens = ",".join(str(t) for _, t in points) + "," + ",".join(map(str, others))
    one = found(QWEN3_8B, "gb200-32", *SMALL, "--costs", str(PUBLISHED / f"qwen3_8b_{name}.json"),
                "--generation-share", str(generation / step[0]), "--tokens", tokens.strip(","))
    for at, speedup in points.items():
        assert cells(one)[at].rollout == pytest.approx(speedup, rel=0.10)
    for t, speedup in others.items():  # of other drafts, which nothing was fitted to
        assert cells(one)[3, t].rollout == pytest.approx(speedup, rel=0.03)
    first = cells(one)[min(points)]
    assert step[0] / first.step == pytest.approx(step[1], rel=0.06)


def test_a_floor_alone_says_more_than_that_engine_reached():
    """What a cycle took there beyond its floor followed the drafted tokens."""
    floor = found(QWEN3_8B, "gb200-32", *SMALL).projection
    real = found(QWEN3_8B, "gb200-32", *SMALL, "--costs",
                 str(PUBLISHED / "qwen3_8b_zero.json")).projection
    assert floor.cost(7) < 1.6 and real.cost(7) == pytest.approx(5.06 / 1.21, rel=0.01)
    assert pays_from(floor, 7) < 0.4 < 0.8 < pays_from(real, 7)


def test_the_published_steps_with_a_lag():
    """12 nodes generate and 4 train: 75.0 s, 0.6 of them waiting with a draft, and then 60.5."""
    assert step_seconds(75.0, 60.5 - 0.6, lag=1) == 75.0
    assert step_seconds(75.0 / 1.77, 60.5 - 0.6, lag=1) == pytest.approx(60.5, rel=0.02)


def test_expected_tokens():
    assert tokens_a_cycle(0.0, 5) == 1 and tokens_a_cycle(1.0, 5) == 6
    assert tokens_a_cycle(0.5, 3) == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    drawn = np.random.default_rng(0).random((100_000, 4)) < 0.7
    accepted = np.cumprod(drawn, 1).sum(1).mean()
    assert tokens_a_cycle(0.7, 4) == pytest.approx(1 + accepted, rel=0.01)


DECODING = Decoding(Sizes.of(QWEN3_8B), CHIPS["v5p"], Split(4), draft_share=0.1)


def answers(lengths, slots=8, chain=(), prompts=0.0):
    return Answers(spans(np.asarray(lengths, float), 4, 1, slots, 100), chain, prompts)


def test_a_rollout_is_its_cycles():
    alike = answers(constant(32, 50), prompts=1000)
    flat = dataclasses.replace(DECODING, policy=dataclasses.replace(
        DECODING.policy, kv_values=0.0, score_operations=0.0))
    cycle = 2 * flat.policy.dense / CHIPS["v5p"].hbm_bandwidth
    prompts = 2 * flat.policy.active * 1000 / CHIPS["v5p"].bf16
    assert rollout_seconds(flat, alike) == pytest.approx(50 * cycle + prompts)
    assert rollout_seconds(flat, alike, 3, 2.0) == pytest.approx(25 * 1.3 * cycle + prompts)


def test_the_slowest_shard_is_waited_for():
    short, one_long = [10.0] * 32, [10.0] * 31 + [100.0]
    ratio = rollout_seconds(DECODING, answers(one_long)) / rollout_seconds(DECODING, answers(short))
    assert 9 < ratio < 10.5


def test_compiled_loops_compute_dead_rows():
    lengths = shuffled(tail(256, 1000, 200))
    chains = ((), (64, 16, 4, 1), (64,))
    exact, shrinking, fixed = (rollout_seconds(
        dataclasses.replace(DECODING, overhead=Overhead()), answers(lengths, 64, chain), 7, 4.0)
        for chain in chains)
    assert exact < shrinking < fixed
    assert answers(lengths, 64, (64, 16)).rows().tolist() == [
        64 if live > 16 else 16 for live in answers(lengths, 64).spans.live]


def test_steps_and_their_bound():
    assert rest_of_share(65.0, 0.65) == pytest.approx(35.0)
    one = project(DECODING, answers(constant(32, 50)), [3], rest=1.0)
    assert one.share == pytest.approx(one.generation / (one.generation + 1))
    [[cell]] = by_tokens(one, [2.0])
    assert cell.rollout == pytest.approx(2 / one.cost(3))
    assert cell.step == pytest.approx(1 / (one.share / cell.rollout + 1 - one.share))
    assert cell.step < one.bound == pytest.approx(1 / (1 - one.share))
    late = dataclasses.replace(one, lag=1)
    assert late.cell(3, 2.0).step == pytest.approx(max(one.generation, 1) / max(
        one.generation / cell.rollout, 1))
    assert by_tokens(one, [4.5]) == [[None]]


def test_from_where_on_speculation_pays():
    one = project(DECODING, answers(constant(32, 50)), [1, 3, 7])
    for k in (1, 3, 7):
        assert one.cell(k, tokens_a_cycle(pays_from(one, k), k)).rollout == pytest.approx(1)
    dear = dataclasses.replace(DECODING, draft_share=2.0)
    assert pays_from(project(dear, answers(constant(32, 50)), [3]), 3) is None
