"""`jspec bench drafts`: what its records say, how its figures are made, and what it refuses."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jspec
from benchmarks import drafts, measure, parts
from benchmarks.prompts import make_heldout
from benchmarks.shapes import SHAPES
from jspec import cli
from jspec.choices import RULES
from jspec.drafts.base import Committed, Sampler
from jspec.errors import InputError
from jspec.heads import files
from jspec.model import Trunk, logits, verify
from jspec.speculate import RolloutStats
from jspec.speculate.types import NOISE

FIELDS = {"draft", "k", "batch", "temperature", "rule", "acceptance_length",
          "acceptance_by_position", "tok_per_s", "cycle_ms", "draft_ms", "verify_ms", "rest_ms",
          "accept_ms", "speedup", "predicted_speedup", "seconds",
          "commit", "machine", "date", "command", "model", "prompts"}


def bench(*arguments):
    """`jspec bench drafts ...` in this process: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err)):
        patch.setattr(sys, "argv", sys.argv)
        code = cli.main(["bench", "drafts", *arguments])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "sums.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+{i}="}) + "\n" for i in range(5)))
    return str(path)


@pytest.fixture(scope="module")
def run(model, prompts, tmp_path_factory):
    """A whole run: (records as written, stdout, stderr, plot)."""
    folder = tmp_path_factory.mktemp("out")
    code, out, err = bench(model, "--drafts", "none,ngram,mtp", "--k", "2", "--batch", "2",
                           "--temperature", "0,1", "--prompts", prompts, "--max-new-tokens", "6",
                           "--rounds", "2", "--json", str(folder / "records.json"), "--plot",
                           str(folder / "plots" / "drafts.png"))
    assert code == 0, err
    return (json.loads((folder / "records.json").read_text()), out, err,
            folder / "plots" / "drafts.png")


@pytest.mark.slow
def test_a_record_for_every_variant(run):
    records, out, err, plot = run
    assert [(r["draft"], r["k"], r["temperature"]) for r in records] == [
        (draft, k, t) for t in (0.0, 1.0) for draft, k in (("none", 0), ("ngram", 2), ("mtp", 2))]
    assert all(FIELDS <= r.keys() for r in records)
    # the fifth is left over
    assert all((r["batch"], r["prompts"], len(r["seconds"])) == (2, 4, 2) for r in records)
    assert all(len(r["acceptance_by_position"]) == r["k"] for r in records)
    assert (records[0]["command"].startswith("jspec bench drafts ")
            and records[0]["machine"]["cores"])
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "speed-up" in out and "predicted" in out
    # an n-gram draft has nothing to train
    assert err.count("untrained") == 1 and "--drafts mtp --draft-path mtp=DIR" in err


@pytest.mark.slow
def test_figures_hang_together(run):
    records = run[0]
    plain = {r["temperature"]: r for r in records if r["draft"] == "none"}
    for r in records:
        base = plain[r["temperature"]]
        assert r["tok_per_s"] == pytest.approx(r["tokens"] / np.median(r["seconds"]))
        assert r["speedup"] == pytest.approx(r["tok_per_s"] / base["tok_per_s"])
        assert r["cycle_ms"] == pytest.approx(r["draft_ms"] + r["verify_ms"] + r["rest_ms"])
        costs = [x["draft_ms"] + x["verify_ms"] + x["accept_ms"] for x in (base, r)]
        assert r["predicted_speedup"] == pytest.approx(r["acceptance_length"] * costs[0] / costs[1])
        assert (r["verify_ms"] > 0 and r["accept_ms"] > 0 and (r["draft_ms"] > 0)
                == (r["draft"] != "none"))
        assert 1 <= r["acceptance_length"] <= r["k"] + 1
        assert all(0 <= b <= a <= 1 for a, b in zip([1, *r["acceptance_by_position"]],
                                                    r["acceptance_by_position"], strict=False))
        if r["temperature"] == 0:  # greedy tokens are the same, whoever drafts
            assert r["tokens"] == base["tokens"]
    assert all((r["acceptance_length"], r["speedup"]) == (1.0, 1.0) for r in plain.values())


def test_lists_and_what_they_are_multiplied_to():
    for text in (["1", "2", "3"], ["1,2,3"], ["1,", "2,3", "2"]):
        assert drafts.parse(["m", "--k", *text]).k == [1, 2, 3]
    args = drafts.parse(["m", "--rule", "coupled,rejection", "--drafts", "mtp", "--k", "4,2",
                         "--temperature", "0"])
    assert drafts.make_variants(args) == [
        drafts.Variant("none", 0, "rejection", 0.0),
        *(drafts.Variant("mtp", k, rule, 0.0) for k in (4, 2) for rule in ("coupled", "rejection"))]
    own = f"{Path(__file__).parents[2]}/examples/drafter.py:bigram"
    args = drafts.parse(["m", "--drafts", own, f"{own}:answer=false", "--draft-path",
                         f"{own}=head"])
    assert drafts.kinds(args) == [own, own] and args.draft_path == {own: "head"}
    policy = jspec.init_policy(SHAPES["tiny"], jax.random.key(0))
    made = drafts.choose_draft(args.drafts[1], policy, "m", {})(policy)
    assert made.name == "bigram" and not made.config.answer
    defaults = drafts.parse(["m"])
    assert (defaults.k == list(range(1, 8)) and set(defaults.drafts)
            == {"none", *jspec.drafts.DRAFTERS})


@pytest.mark.parametrize(("options", "count"), [
    ([], 24), (["--count", "3"], 3), (["--count", "96"], 96), (["--batch", "1,32"], 32)])
def test_how_many_prompts(options, count):
    assert len(drafts.read_texts(drafts.parse(["m", *options]))) == count


def test_tallies_of_all_batches():
    def stats(cycles, drafted, accepted):
        return RolloutStats(*(np.array(x, np.int32) for x in (cycles, drafted, accepted)))

    counts = [(np.array([6, 3]), stats([3, 2], [5, 5], [3, 1])),
              (np.array([5, 4]), stats([1, 4], [5, 5], [5, 0]))]
    assert drafts.acceptance(counts) == {"tokens": 18, "cycles": 3 + 4, "acceptance_length": 1.8,
                                         "acceptance_by_position": [0.8, 0.1]}


def test_speed_ups_measured_and_predicted():
    def raw(draft, **figures):
        return {"draft": draft, "temperature": 1.0, "prefill_s": 1.0, **figures}

    plain, fast = drafts.compared([
        raw("none", tokens=100, cycles=100, seconds=[3.0, 2.0, 9.0], acceptance_length=1.0,
            draft_ms=0.0, verify_ms=18.0, accept_ms=2.0),
        raw("mtp", tokens=90, cycles=40, seconds=[2.0, 2.0, 2.0], acceptance_length=2.25,
            draft_ms=6.0, verify_ms=20.0, accept_ms=4.0)])
    assert ((plain["cycle_ms"], plain["rest_ms"], plain["speedup"], plain["predicted_speedup"])
            == (20.0, 2.0, 1.0, 1.0))
    assert (fast["tok_per_s"], fast["cycle_ms"], fast["rest_ms"]) == (45.0, 25.0, -1.0)
    assert (fast["speedup"] == pytest.approx(45 * 3 / 100) and fast["predicted_speedup"]
            == pytest.approx(2.25 * 20 / 30))


def test_programs_are_run_in_turn():
    order = []
    programs = {name: lambda name=name: order.append(name) or name for name in "ab"}
    taken = list(measure.in_turn(programs, 2))
    assert (order == ["a", "b", "a", "b"] == [name for name, _, _ in taken]
            == [result for _, _, result in taken])


@pytest.mark.slow
def test_parts_do_what_a_cycle_does():
    """Run twice, a part's second run sees what its first left in the cache."""
    k, policy = 2, jspec.init_policy(SHAPES["tiny"], jax.random.key(0))
    draft, policy = jspec.drafts.mtp(policy, jax.random.key(1)), jspec.reshard(policy)
    batch = jspec.PromptBatch.from_tokens([[7, 8, 9, 7, 8], [5, 6, 7]], group_size=1, seed=3)
    state = parts.prefill(policy, draft, batch, jspec.Sampling(max_new_tokens=4), k=k)
    key, of = jax.random.key_data(batch.key), state.sequences

    cache = state.cache
    for i in range(2):
        trunk, cache = verify(policy, of.tokens[:, :k + 1] + i, cache, of.lengths - 1 + i)
    got, scores = parts.verification(policy, state, k=k, features=(), times=2)
    np.testing.assert_allclose(scores, logits(policy, trunk.hidden), atol=1e-5)

    prepared = parts.prepare(policy, draft)
    sampler = Sampler(NOISE["coupled"](key, of.ids, of.lengths, k), of.temperature, None, 0, k)
    expected, _ = draft.drafter.propose(policy, prepared, state.draft,
                                        Committed(of.tokens, of.lengths), sampler)
    once = parts.drafting(policy, prepared, state, got, key, rule="coupled", k=k, times=1)
    np.testing.assert_array_equal(once.tokens, expected.tokens)
    np.testing.assert_allclose(once.log_q, expected.log_q, atol=1e-5)
    # what the drafter is shown of the verification decides what it drafts next
    twice = [parts.drafting(policy, prepared, state, Trunk(scale * got.hidden), key, rule="coupled",
                            k=k, times=2) for scale in (1, -1)]
    assert not np.allclose(twice[0].log_q, twice[1].log_q, atol=1e-3)

    judged = parts.verdict(policy, state, scores, once, key, rule="coupled")
    assert judged.tokens.shape == (2, k + 1) and np.all(np.asarray(judged.accepted) <= k)


@pytest.mark.slow
@pytest.mark.parametrize("name", jspec.drafts.DRAFTERS)
def test_every_drafter_is_timed(name):
    config = dataclasses.replace(SHAPES["tiny"], num_layers=8)
    policy = jspec.init_policy(config, jax.random.key(0))
    made = {"none": None, name: drafts.choose_draft(name, policy, "tiny", {})(policy)}
    args = drafts.parse(["m", "--drafts", name, "--k", "3", "--max-new-tokens", "8", "--rounds",
                         "1", "--batch", "2", "--rule", *RULES])
    records = drafts.time_batch(args, jspec.reshard(policy), made, [[7, 8, 9, 7], [5, 6]], 2)
    assert [r["rule"] for r in records] == ["rejection", *RULES]
    assert all(r["draft"] == name and r["draft_ms"] > 0 and r["verify_ms"] > 0 for r in records[1:])


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "the following arguments are required: MODEL"),
    (["m", "--drafts", "none,mpt"],
     "argument --drafts: unknown drafter 'mpt'; did you mean 'mtp'?"),
    *((["m", "--drafts", text], "argument --drafts: must be a drafter, or one with options as in "
       f"self:bits=4, not '{text}'") for text in ("self:4", "none:bits=4", "self:bits=[")),
    (["m", "--rule", "rejections"],
     "argument --rule: unknown rule 'rejections'; did you mean 'rejection'?"),
    (["m", "--k", "0"], "argument --k: must be a whole number of at least 1, not '0'"),
    (["m", "--k", "1,two"], "argument --k: must be a whole number of at least 1, not 'two'"),
    (["m", "--k", ","], "argument --k: needs at least one"),
    (["m", "--batch", "0"], "argument --batch: must be a whole number of at least 1, not '0'"),
    (["m", "--temperature", "-1"],
     "argument --temperature: must be a number of at least 0.0, not '-1'"),
    (["m", "--temperature", "nan"],
     "argument --temperature: must be a number of at least 0.0, not 'nan'"),
    (["m", "--draft-path", "mtp"], "argument --draft-path: must be NAME=DIR, not 'mtp'"),
    (["m", "--draft-path", "mpt=x"],
     "argument --draft-path: unknown drafter 'mpt'; did you mean 'mtp'?"),
    (["m", "--drafts", "ngram", "--draft-path", "mtp=x"],
     "--draft-path mtp=... is for a drafter that --drafts leaves out; add mtp to it"),
    (["m", "--drafts", "mtp:depths=2", "--draft-path", "mtp=x"],
     "--draft-path mtp=... is for a drafter that --drafts leaves out; add mtp to it, without "
     "options, as a trained draft has its own"),
    (["m", "--prompts", "gone.jsonl"],
     "cannot read the prompts gone.jsonl: No such file or directory; check --prompts"),
    (["m", "--count", "97"], f"--count 97 is more than the 96 prompts of {drafts.HELDOUT}"),
    (["m", "--batch", "8", "--count", "4"],
     "--batch 8 is more than the 4 prompts; lower it or give more prompts"),
    (["m", "--json", "."], "--json . is a directory; name a file in it"),
    (["m", "--plot", "drafts.txt"], "--plot drafts.txt must end in .png, .pdf or .svg"),
    (["smollm3"], "model 'smollm3' is not there"),
])
def test_mistakes_are_one_line(arguments, message):
    code, out, err = bench(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"jspec: error: {message}")


def test_mistakes_that_only_the_model_shows(model, prompts, tmp_path):
    code, _, err = bench(model, "--prompts", prompts, "--max-new-tokens", "2040", "--k", "4", "9")
    assert code == 2 and err == ("jspec: error: a prompt of 4 tokens, --max-new-tokens 2040 and "
                                 "--k 9 do not fit the model's 2048 positions; lower one of them\n")
    # the shipped prompts have letters, and this model's tokenizer has none
    code, _, err = bench(model)
    assert (code == 2
            and err.startswith("jspec: error: the model's tokenizer refuses one of the prompts ("))
    code, _, err = bench(model, "--prompts", prompts, "--drafts", "self:bit=4")
    assert (code == 2 and err == "jspec: error: --drafts self.bit: self has no such option, but "
            "bits, vocab; remove it\n")
    code, _, err = bench(model, "--prompts", prompts, "--drafts", "mtp", "--draft-path",
                         f"mtp={tmp_path}")
    assert code == 2 and str(tmp_path) in err and err.count("\n") == 1


def test_without_matplotlib(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert bench("m", "--plot", "drafts.png")[::2] == (
        2, "jspec: error: --plot needs matplotlib: pip install matplotlib\n")


def test_help():
    out = io.StringIO()
    with pytest.raises(SystemExit) as exit, contextlib.redirect_stdout(out):
        cli.main(["bench", "drafts", "--help"])
    assert exit.value.code == 0
    assert ("usage: jspec bench drafts" in out.getvalue()
            and "--draft-path NAME=DIR" in out.getvalue())


def test_bench_still_times_rollouts():
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as err:
        patch.setattr(sys, "argv", sys.argv)
        for wrong in ("2", "0.5,x"):
            assert cli.main(["bench", "--acceptance", wrong]) == 2
            assert ("--acceptance takes probabilities" in err.getvalue()
                    and err.getvalue().count("\n") == 1)
            err.truncate(err.seek(0))


def test_a_trained_draft_is_taken_from_its_path(tmp_path, capsys):
    policy = jspec.init_policy(SHAPES["tiny"], jax.random.key(0))
    files.write(jspec.drafts.mtp(policy, jax.random.key(5), vocab=[1, 2, 3]), tmp_path)
    assert (drafts.choose_draft("mtp", policy, "tiny",
                                {"mtp": str(tmp_path)})(policy).config.vocab_size == 3)
    assert drafts.choose_draft("none", policy, "tiny", {"mtp": str(tmp_path)})(policy) is None
    assert (drafts.choose_draft("self:bits=4", policy, "tiny",
                                {"mtp": str(tmp_path)})(policy).config.bits == 4)
    assert capsys.readouterr().err == ""
    # one ships
    assert drafts.trained("mtp", "smollm2-135m-instruct", {}) == "smollm2-135m-instruct"
    assert drafts.trained("mtp", "smollm2-135m-instruct", {"mtp": "mine"}) == "mine"
    assert drafts.trained("ngram", "smollm2-135m-instruct", {}) is None
    with pytest.raises(InputError, match="--draft-path ngram=.* holds a draft of the kind mtp"):
        drafts.choose_draft("ngram", policy, "tiny", {"ngram": str(tmp_path)})(policy)
    assert drafts.trained("mixed:certainty=0.5", "m", {"mixed": "mine"}) == "mine"
    assert drafts.trained("mixed:draft=mtp", "m", {"mixed": "mine"}) is None
    with pytest.raises(InputError, match="no draft at bare"):
        drafts.choose_draft("mtp", policy, "tiny", {"mtp": "bare"})(policy)


def test_heldout_prompts_are_what_their_sources_say():
    records = [json.loads(line) for line in drafts.HELDOUT.read_text(encoding="utf-8").splitlines()]
    assert records[::2] == make_heldout.written()
    asked = [re.match(r"reasoning_gym:(\w+) seed=77 index=(\d+)", r["source"]).groups()
             for r in records[1::2]]
    assert (len(records) == 96 == len({r["prompt"] for r in records})
            and {task for task, _ in asked} == set(make_heldout.TASKS))
    gym = pytest.importorskip("reasoning_gym")
    for (task, index), record in zip(asked, records[1::2], strict=True):
        made = gym.create_dataset(task, seed=77, size=20, **make_heldout.TASKS[task])
        assert made[int(index)]["question"] == record["prompt"]
