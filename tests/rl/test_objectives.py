"""Every objective under every aggregation against float64 NumPy, however rows are cut and on
however many devices; and what is refused of a user's own."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jspec.choices import AGGREGATIONS, OBJECTIVES
from jspec.errors import InputError
from jspec.rl import micro_batches as mb
from jspec.rl import update as up
from jspec.rl.aggregation import token_shares
from jspec.rl.batch import TrainBatch
from jspec.rl.losses import answer_loss
from jspec.rl.objectives import Limits, Tokens, find, loss_of
from jspec.rl.update_settings import UpdateSettings
from tests.test_sharding import on_devices

P, G, T = 8, 3, 6
N = P * G
SETTINGS = UpdateSettings(clip_low=0.2, clip_high=0.3, constant_length=5, kl_weight=0.1,
                          entropy_weight=0.02)
EACH = {name: {} for name in OBJECTIVES} | {
    "dual_clip": dict(objective="grpo", dual_clip=1.5), "k1": dict(objective="grpo",
                                                                   kl_estimate="k1"),
    "k2": dict(objective="gspo", kl_estimate="k2", dual_clip=1.2)}
"""By a name of its own each: an objective with its settings."""
FIELDS = ("old", "logprobs", "anchored", "entropy")


def settings_of(name):
    options = {"objective": name} | EACH[name]
    return dataclasses.replace(SETTINGS, **options | {"objective": find(options["objective"])})


def case(seed=0):
    """Log-probabilities of some answers, in float64; of the rows some are empty, and all of one
    prompt."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, T + 1, N)
    lengths[3:6] = 0
    data = {"old": rng.normal(-2, 0.4, (N, T)), "advantages": rng.normal(0, 1, N),
            "mask": np.arange(T) < lengths[:, None]}
    data["logprobs"] = data["old"] + rng.normal(0, 0.4, (N, T))
    data["anchored"] = data["logprobs"] + rng.normal(0, 0.3, (N, T))
    data["entropy"] = rng.uniform(0, 3, (N, T))
    data["advantages"][7] = 0.0
    return {key: x if x.dtype == bool else x.astype(np.float32).astype(np.float64)
            for key, x in data.items()}


def surrogate(name, d, a, n, settings):
    """(loss of each token, its derivative by the token's log-probability) of one answer of n > 0
    tokens, d and a of which are log-ratios and the advantage."""
    low, high = 1 - settings.clip_low, 1 + settings.clip_high
    r = np.exp(d)
    if name == "cispo":
        weight = np.clip(r, low, high) * a
        return None, -weight
    if name == "sapo":
        tau = settings.sapo_tau[0] if a > 0 else settings.sapo_tau[1]
        gate = 1 / (1 + np.exp(-tau * (r - 1)))
        return -a * 4 / tau * gate, -a * 4 * gate * (1 - gate) * r
    whole = {"gspo": d.mean(), "gspo_token": d.mean(), "rloo": d.sum()}
    r = np.full(n, np.exp(whole[name])) if name in whole else r
    free, bound = r * a, np.clip(r, low, high) * a
    value, slope = np.minimum(free, bound), np.where(free <= bound, free, 0.0)
    if settings.dual_clip and a < 0:
        slope = np.where(value < settings.dual_clip * a, 0.0, slope)
        value = np.maximum(value, settings.dual_clip * a)
    if name == "gspo":  # each token is in the ratio of all
        slope = np.full(n, slope.sum() / n)
    if name == "rloo":
        slope = np.full(n, slope.sum())
    return -value, -slope


def expected(name, aggregation, data, settings):
    """(loss, its gradients by log-probabilities and entropy [2, N, T]) in float64, one row after
    the other."""
    objective = EACH[name].get("objective", name)
    counts = data["mask"].sum(1)
    loss, grads = 0.0, np.zeros((2, N, T))
    for i, n in enumerate(counts):
        if not n:
            continue
        of_prompt = counts[i // G * G: i // G * G + G].sum()
        prompts = sum(counts[p * G: p * G + G].sum() > 0 for p in range(P))
        share = {"token_mean": 1 / counts.sum(), "sequence_mean": 1 / (n * (counts > 0).sum()),
                 "prompt_mean": 1 / (of_prompt * prompts),
                 "constant_length": 1 / (N * settings.constant_length)}[aggregation]
        old, new, anchored, entropy = (data[field][i, :n] for field in FIELDS)
        each, slope = surrogate(objective, new - old, data["advantages"][i], n, settings)
        each = slope * new if each is None else each
        d = anchored - new
        kl, kl_slope = {"k1": (-d, np.ones(n)), "k2": (d * d / 2, -d),
                        "k3": (np.exp(d) - d - 1, 1 - np.exp(d))}[settings.kl_estimate]
        loss += share * (each + settings.kl_weight * kl - settings.entropy_weight * entropy).sum()
        grads[0, i, :n] = share * (slope + settings.kl_weight * kl_slope)
        grads[1, i, :n] = -share * settings.entropy_weight
    return loss, grads


def of_micro_batches(data, named, rows):
    """{name/aggregation: (loss, gradients [2, N, T])} of jspec's, `rows` rows at a time, of
    log-probabilities and entropies that are looked up by the tokens, which are their places."""
    shapes = ((rows // blocks(), T), (rows // blocks(), 3))

    @jax.jit
    def gradients(data):
        def of(name, aggregation):
            settings = dataclasses.replace(settings_of(name), aggregation=aggregation)
            batch = TrainBatch(
                jnp.zeros((P, 1), jnp.int32), jnp.ones(P, jnp.int32),
                jnp.arange(N * T, dtype=jnp.int32).reshape(N, T), data["old"], data["mask"],
                data["advantages"])
            batch, totals = up.with_shares(batch, settings)

            def one(micro):
                def loss(*learned):
                    at = micro.rows.tokens
                    logprobs, entropy, anchored = (x.ravel()[at] for x in (*learned,
                                                                           data["anchored"]))
                    return answer_loss(logprobs, entropy, anchored, micro.rows, totals, settings)

                (_, metrics), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(
                    data["logprobs"], data["entropy"])
                return (metrics["loss"], jnp.stack(grads)), ()

            return mb.accumulate(one, batch, shapes)[0]

        return {f"{name}/{aggregation}": of(name, aggregation) for name, aggregation in named}

    return jax.device_get(gradients({key: jnp.asarray(x, x.dtype if x.dtype == bool
                                                      else jnp.float32)
                                     for key, x in data.items()}))


def blocks():
    return mb.blocks_of(TrainBatch(jnp.zeros((P, 1)), *[None] * 5))


def check(found, data):
    for key, (loss, grads) in found.items():
        name, aggregation = key.split("/")
        wanted, wanted_grads = expected(name, aggregation, data, settings_of(name))
        np.testing.assert_allclose(loss, wanted, rtol=0, atol=1e-6 * max(1, abs(wanted)),
                                   err_msg=key)
        np.testing.assert_allclose(grads, wanted_grads, rtol=0, err_msg=key,
                                   atol=1e-6 * np.abs(wanted_grads).max())


GOLDEN = Path(__file__).parents[1] / "golden" / "objectives.npz"
EMPTY = 11 / 12
"""Of the golden batch's 12 rows one is empty. TRL's means over answers count it; ours do not."""
TRL = {  # case: (objective, aggregation, other settings, TRL's loss over ours)
    "grpo": ("grpo", "sequence_mean", {}, EMPTY),
    "dr_grpo": ("dr_grpo", "constant_length", {}, 1),
    "dapo": ("dapo", "token_mean", {}, 1),
    "bnpo": ("grpo", "token_mean", {}, 1),
    "gspo": ("gspo", "sequence_mean", {}, EMPTY),
    "gspo_token_mean": ("gspo", "token_mean", {}, 1),
    "cispo": ("cispo", "token_mean", dict(clip_low=1.0), 1),
    "sapo": ("sapo", "sequence_mean", {}, EMPTY),
    "dual_clip": ("grpo", "token_mean", dict(dual_clip=1.5), 1),
    "entropy": ("grpo", "token_mean", dict(entropy_weight=0.02), 1),
    "kl": ("grpo", "token_mean", dict(kl_weight=0.1), 1),
    "rloo": ("rloo", "sequence_mean", {}, EMPTY),
}


@pytest.mark.parametrize("case", TRL)
def test_trl_has_the_same_losses(case):
    """`tests/golden/make_objectives.py` says how those were made."""
    with np.load(GOLDEN) as file:
        data = dict(file)
    name, aggregation, options, over = TRL[case]
    settings = UpdateSettings(objective=find(name), aggregation=aggregation, clip_high=0.3,
                              constant_length=7, **options)
    given = {key: jnp.asarray(x, x.dtype if x.dtype == bool else jnp.float32)
             for key, x in data.items() if key in (*FIELDS, "advantages", "mask")}
    batch = TrainBatch(jnp.zeros((6, 1)), None, given["old"], given["old"], given["mask"],
                       given["advantages"])
    batch, totals = up.with_shares(batch, settings)

    def loss(logprobs):
        return answer_loss(logprobs, given["entropy"],
                           given["anchored"] if settings.kl_weight else None, batch, totals,
                           settings)

    (got, metrics), grads = jax.value_and_grad(loss, has_aux=True)(given["logprobs"])
    wanted = data[f"{case}/loss"]
    if case == "rloo":  # where the empty row has a loss, its advantage, and no gradient
        wanted = wanted + data["advantages"][5] / 12
    np.testing.assert_allclose(over * got, wanted, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(over * grads, data[f"{case}/grad"], rtol=0,
                               atol=1e-6 * np.abs(data[f"{case}/grad"]).max())
    if case == "dapo":
        for side in ("low", "high"):
            np.testing.assert_allclose(metrics[f"clip_fraction/{side}"], data[f"dapo/{side}"])


ALL = [(name, aggregation) for name in EACH for aggregation in AGGREGATIONS]
ONCE = {find(name): name for name in reversed(OBJECTIVES)}.values()
SOME = [(name, AGGREGATIONS[i % len(AGGREGATIONS)])
        for i, name in enumerate([*ONCE, *(EACH.keys() - OBJECTIVES.keys())])]


@pytest.mark.parametrize("rows", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, N))])
@pytest.mark.parametrize("named", [SOME, pytest.param(ALL, marks=pytest.mark.slow)])
def test_every_objective_is_that_of_float64(named, rows):
    data = case()
    check(of_micro_batches(data, named, rows), data)


def eight(cases):
    """Checks on 8 devices, and prints how many rows each of them has at a time."""
    from jspec.sharding import make_mesh

    for sizes in ((8, 1, 1), (2, 2, 2)):
        with jax.set_mesh(make_mesh(*sizes)):
            for rows in (8, 24):
                data = case()
                check(of_micro_batches(data, [tuple(x) for x in cases], rows), data)
    print(json.dumps(blocks()))


@pytest.mark.slow  # a small version is in test_sharding.py
def test_every_objective_is_that_of_float64_on_eight_devices():
    assert on_devices(8, f"from tests.rl.test_objectives import eight; eight({ALL!r})") == 1


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "prompt_mean"])
def test_a_mean_of_micro_batches_means_is_caught(aggregation, monkeypatch):
    data = case()
    take = mb.take

    def planted(batch, order, done, rows, width):
        made = take(batch, order, done, rows, width)
        share, whole = token_shares(made.rows.mask, 1, aggregation, T)
        total = token_shares(batch.mask, G, aggregation, T)[1]
        return made.replace(rows=made.rows.replace(shares=share * total / whole / (N // rows)))

    monkeypatch.setattr(mb, "take", planted)
    found = of_micro_batches(data, [("grpo", aggregation)], 3)
    with pytest.raises(AssertionError):
        check(found, data)


def test_an_objective_of_a_users_own(tmp_path):
    own = find("examples/own_objective.py:weighted")
    shape = jnp.ones((2, 3))
    tokens = Tokens(-shape, jnp.array([[0.0, 1.0, 0.0]] * 2), jnp.array([[1.0], [-1.0]]), shape > 0)
    each, bounded = loss_of(own, tokens, Limits())
    np.testing.assert_allclose(each, [[1, 2, 1], [-1, -2, -1]])
    np.testing.assert_array_equal(bounded, tokens.log_ratio)
    wrong = {"short": "return tokens.mask.sum(1)", "nothing": "pass", "raises": "return tokens.x",
             "three": "return (tokens.log_ratio,) * 3", "exits": "raise SystemExit(3)"}
    (tmp_path / "own.py").write_text("".join(f"def {name}(tokens, limits): {body}\n"
                                             for name, body in wrong.items()))
    for name in wrong:
        said = {"raises": "raises AttributeError", "exits": "raises SystemExit"}.get(
            name, "must return the loss of each token")
        with pytest.raises(InputError, match=f"{name}: it {said}") as error:
            find(f"{tmp_path / 'own.py'}:{name}")
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="has no 'less'; its functions are: short, nothing"):
        find(f"{tmp_path / 'own.py'}:less")
