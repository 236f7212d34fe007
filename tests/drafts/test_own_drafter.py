"""A drafter in a file of the user's: found, checked, run only where that is allowed, and the same
value as long as the file is the same."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jspec
from jspec import cycle_costs
from jspec.checkpoint import Checkpoints
from jspec.config import load_config
from jspec.drafts import base, find, known
from jspec.heads import files
from jspec.prepare import check_draft
from jspec.rl.state import init_state
from jspec.rl.update_settings import UpdateSettings
from jspec.run_dir import keep_config, load_draft, load_run
from jspec.sources import choose_draft, open_source
from tests.speculate import tiny

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "drafter.py")
POLICY = tiny.policy(5)
HEAD = """
import dataclasses, jax.numpy as jnp
from jspec.drafts.base import Draft, Drafter, Proposal
@dataclasses.dataclass(frozen=True)
class Config:
    policy: object
def init(policy, key=None): return Draft({}, {}, Config(policy.config), mine)
def propose(policy, draft, state, committed, sampler): return Proposal(TABLE), state
TABLE = jnp.zeros((1, 1), jnp.int32)
mine = Drafter("mine", Config, init, propose)
"""


def written(folder, text, name="own.py"):
    (folder / name).write_text(HEAD + text)
    return f"{folder / name}:mine"


def refused(name):
    with pytest.raises(jspec.InputError) as error:
        find(name, f"draft.name={name!r}")
    assert str(error.value).startswith(f"draft.name={name!r}") and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("text, message", [
    ("del mine", "own.py has no 'mine'"),
    ("other = mine\ndel mine", "own.py has no 'mine'; its drafters are: other"),
    ("1 / 0", "own.py does not import: ZeroDivisionError"),
    ("mine = Drafter('mine', Config, init)", "does not import: TypeError: Drafter.__new__() "
     "missing 1 required positional argument: 'propose'"),
    ("mine = init",
     "is no drafter, but function; make one with jspec.drafts.Drafter(name, Config, init, propose"),
    ("mine = mine._replace(propose=None)", "lacks a function: its propose is None"),
    ("mine = mine._replace(start=3)", "lacks a function: its start is 3"),
    ("mine = mine._replace(Config=int)",
     "its Config must be a frozen dataclass with a field `policy`"),
    ("mine = mine._replace(init=lambda policy: 0)",
     "its init must take (policy, key) and options with defaults: too"),
    ("mine = mine._replace(name='a b')", "its name is 'a b', and must be an identifier"),
    ("mine = mine._replace(name='mtp')",
     "its name is 'mtp', which is one of jspec's own; give it another"),
])
def test_what_is_no_whole_drafter_is_one_line(tmp_path, text, message):
    assert message in refused(written(tmp_path, text))


def test_a_file_that_is_not_there():
    assert "there is no file no/such.py (looked in /" in refused("no/such.py:mine")


def test_what_its_init_returns_is_checked(tmp_path):
    made = find(written(tmp_path, "mine = mine._replace(init=lambda policy, key=None: 3)"))
    with pytest.raises(jspec.InputError,
                       match="mine draft: its init must return a Draft of this drafter, not 3"):
        jspec.drafts.constructor(made)(POLICY)
    with pytest.raises(jspec.InputError,
                       match="draft.options.depth: bigram has no such option, but answer; remove"):
        check_draft(load_config(None, [f"draft.name={EXAMPLE}:bigram", "draft.options={depth: 1}"]),
                    POLICY.config)


def test_the_same_file_is_the_same_value(tmp_path, monkeypatch):
    name = written(tmp_path, "")
    monkeypatch.chdir(tmp_path)
    one, other = find(name), find("own.py:mine")
    assert one is other and hash(one) == hash(other)
    traces = []

    @jax.jit
    def program(draft):
        traces.append(draft.drafter)
        return draft.drafter.propose(None, draft, None, None, None)[0].tokens

    drafts = one.init(POLICY), find("./own.py:mine").init(POLICY)
    assert drafts[0] == drafts[1] and jax.tree.structure(drafts[0]) == jax.tree.structure(drafts[1])
    assert [program(draft).sum() for draft in drafts] == [0, 0] and len(traces) == 1
    cost = cycle_costs.digest(one)
    written(tmp_path, "TABLE = TABLE + 1")  # as long as before, and within the same second
    changed = find(name)
    assert changed != one and changed.name == one.name
    assert program(changed.init(POLICY)).sum() == 1 and len(traces) == 2
    assert cycle_costs.digest(changed) != cost
    written(tmp_path, "")
    assert find(name) is one


def test_a_file_that_is_first_run_under_a_trace_has_arrays_all_the_same(tmp_path):
    name = written(tmp_path, "")
    jax.eval_shape(lambda: find(name).init(POLICY).weights)
    assert find(name).propose(None, None, None, None, None)[0].tokens.sum() == 0


def test_a_name_in_a_file_runs_nothing(tmp_path):
    name = written(tmp_path, "raise SystemExit")
    for text in (name, "mine", "own", f"{EXAMPLE}:bigram"):
        with pytest.raises(jspec.InputError, match="is unknown; known: "
                           f"{', '.join(jspec.drafts.DRAFTERS)}; one of your"):
            known(text)
    given = find(f"{EXAMPLE}:bigram")
    assert known("bigram", given) is given and known("mtp", given) is find("mtp")


def test_a_head_of_it_is_read_where_it_is_given(tmp_path):
    drafter = find(f"{EXAMPLE}:bigram")
    draft = drafter.init(POLICY, answer=False)
    files.write(draft, tmp_path)
    assert jspec.load_draft(POLICY, tmp_path, drafter) == draft
    with pytest.raises(jspec.InputError,
                       match="drafter 'bigram' is unknown; .* draft.name=path/to/file.py:NAME"):
        jspec.load_draft(POLICY, tmp_path)
    section = [f"draft.name={EXAMPLE}:bigram", f"draft.path={tmp_path}", "draft.options=null"]
    check_draft(load_config(None, section), POLICY.config)
    with pytest.raises(jspec.InputError, match="drafter 'bigram' is unknown"):
        check_draft(load_config(None, ["draft.name=ngram", *section[1:]]), POLICY.config)


def test_a_run_with_it_comes_back_and_runs_its_file_only_where_that_is_allowed(tmp_path,
                                                                               monkeypatch):
    name, run = f"{EXAMPLE}:bigram", str(tmp_path)
    shape = dataclasses.asdict(POLICY.config)
    del shape["tokenless"]
    config = load_config(None, [f"output_dir={run}", f"draft.name={name}", "model.name=random",
                                "model.tokenizer=chars:012", ("model.architecture", shape)])
    state = init_state(POLICY, find(name).init(POLICY, answer=False), UpdateSettings.of(config),
                       seed=0)
    keep_config(config)
    with Checkpoints(run, keep=1) as checkpoints:
        checkpoints.save(3, state, {})
        checkpoints.wait()
        assert checkpoints.restore(state)[1].draft == state.draft
    ran = []
    monkeypatch.setattr("jspec.sources.find", lambda *names: ran.append(names) or find(*names))
    assert open_source(run, [], drafters=()).draft is None  # `jspec export`
    other = open_source(run, [], drafters=("ngram",))
    assert (choose_draft(other, "ngram")(POLICY).name == "ngram" and [names[0] for names in ran]
            == ["ngram"])
    for overrides in ([], ["draft.path=x", "draft.options=null"]):  # neither names a file
        with pytest.raises(jspec.InputError, match="would run that file: look at it, then give "
                           "--run-code or name it"):
            open_source(run, overrides).draft  # noqa: B018 - where it is read
    assert len(ran) == 1
    for given in ({"run_code": True}, {"overrides": [f"draft.name={name}"]}, {"drafters": (name,)}):
        source = open_source(run, **{"overrides": [], **given})
        assert source.draft == state.draft
        assert (choose_draft(source,
                             name)(POLICY) is choose_draft(source, None)(POLICY) is source.draft)
    with pytest.raises(jspec.InputError, match="the draft of .*: drafter 'bigram' is unknown"):
        load_draft(run)
    assert load_run(run, drafter=find(name))[2] == state.draft


@pytest.mark.parametrize("answer", [True, False])
def test_the_example_against_a_plain_search(answer):
    """After `start` over the first tokens, then `observe` of the next two, it drafts what a plain
    search finds."""
    bigram = find(f"{EXAMPLE}:bigram")
    draft, tokens, lengths = bigram.init(POLICY, answer=answer), [[1, 2, 3, 1, 4, 1, 0, 0],
                                                                  [2, 2, 0, 3, 3, 2, 0, 0]], 4
    held = jnp.array(tokens)
    rows, _ = bigram.start(POLICY, draft, base.Prefill(None, held, jnp.array([lengths, lengths])))
    state = bigram.observe(POLICY, draft, base.DraftState(rows), base.Observation(
        None, held[:, 4:7], jnp.array([4, 4]), jnp.array([2, 2])))
    sampler = base.Sampler(None, jnp.ones(2), None, 0, 3)
    got = bigram.propose(POLICY, draft, state, base.Committed(held, jnp.array([6, 6])),
                         sampler)[0].tokens.tolist()
    for row, drafted in zip(tokens, got, strict=True):
        token, looked = row[5], row[:6 if answer else 4]
        for other in drafted:
            at = [i for i in range(len(looked) - 1) if looked[i] == token]
            token = row[at[-1] + 1] if at else token
            assert other == token
