"""A model by name as a draft: whose tokenizer it has, and where its weights are read from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jspec
from jspec import hub, prepare
from jspec.config import load_config
from jspec.heads import files
from jspec.heads.models import check_tokens, open_model
from jspec.sharding import make_mesh
from tests.speculate import tiny

DRAFTER = jspec.drafts.find("draft_model")
ALPHABET = "0123456789"


def make(vocab, **options):
    return tiny.policy(vocab, **{"layers": 1, "heads": 2, "kv_heads": 1, "hidden": 16, "scale": 0.2,
                                 **options})


@pytest.fixture(scope="module")
def policy():
    """A policy of a padded vocabulary, as `jspec.load` reads one: ids without a token are known."""
    return make(16, layers=2, tokenless=((12, 16),))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """alphabet, vocabulary -> a model that was exported with a tokenizer of single characters."""
    def exported(alphabet=ALPHABET, vocab=14):
        path = tmp_path_factory.mktemp("model") / "saved"
        jspec.export(make(vocab, seed=3), path, hub.character_tokenizer(alphabet))
        return str(path)

    return exported


def message(call):
    with pytest.raises(jspec.InputError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_model_by_name_is_a_draft(policy, directory):
    source, tokenizer = directory(), hub.character_tokenizer(ALPHABET)
    want = jspec.load(source)
    for named in ({}, {"drafter": DRAFTER, "tokenizer": tokenizer}):
        draft = jspec.load_draft(policy, source, **named)
        assert (draft.name == "draft_model" and draft.config.model == want.config
                and draft.config.model.tokenless == ((12, 14),))
        jax.tree.map(np.testing.assert_array_equal, draft.weights, want.weights)


def test_a_trained_one_comes_back_from_files(policy, directory, tmp_path):
    draft = tiny.shaken(jspec.load_draft(policy, directory()))
    files.write(draft, tmp_path, dtype="float32")
    for named in ({}, {"drafter": DRAFTER}):
        again = jspec.load_draft(policy, tmp_path, **named)
        assert again.config == draft.config
        jax.tree.map(np.testing.assert_array_equal, again.weights, draft.weights)


def test_another_tokenizer_is_named(policy, directory):
    tokenizer, other = hub.character_tokenizer(ALPHABET), directory("0123546789")
    text = message(lambda: jspec.load_draft(policy, other, DRAFTER, tokenizer))
    assert (f"{other} has another tokenizer than the policy: its token 6 is '5', and the policy's "
            "is '4'" in text)
    jspec.load_draft(policy, other)  # which ids have a token does not tell
    fewer = directory("0123", 16)
    assert "the policy has a token of id 6, and" in message(lambda: jspec.load_draft(policy, fewer))
    # the ids that both have a token for are the same: exact, and worth its while
    assert jspec.load_draft(policy, fewer, DRAFTER, tokenizer).name == "draft_model"
    more = directory(ALPHABET + "+-", 16)
    assert f"{more} has a token of id 12" in message(lambda: jspec.load_draft(policy, more))
    few = directory("01", 4)
    assert "a token of id 11, and the model only 4 ids" in message(
        lambda: jspec.load_draft(policy, few, DRAFTER, tokenizer))


def test_names_of_nothing(policy, tmp_path):
    text = message(lambda: jspec.load_draft(policy, tmp_path / "gone", DRAFTER))
    assert "is not there" in text
    assert "no draft at" in message(lambda: jspec.load_draft(policy, tmp_path / "gone.gguf"))


CONFIG = ["model.name=random", f"model.tokenizer=chars:{ALPHABET}", "draft.name=draft_model",
          "model.architecture={vocab_size: 16, hidden_size: 16, intermediate_size: 32, "
          "num_layers: 2, num_heads: 2, num_kv_heads: 1, head_dim: 8, "
          "max_position_embeddings: 512}"]


def test_a_configuration_names_it(directory):
    """Its shape is known, and its tokenizer compared, before any weights are read."""
    source = directory()
    config = load_config(None, [*CONFIG, f"draft.path={source}"])
    base = prepare.BaseModel.of(config)
    with jax.set_mesh(make_mesh()):
        shape = prepare.check_draft(config, base.shape.config)
        assert isinstance(shape.weights["embed"], jax.ShapeDtypeStruct)
        draft = prepare.make_draft(config, base.policy())
        assert draft.config == shape.config
        assert jax.tree.map(jnp.shape, draft.weights) == jax.tree.map(jnp.shape, shape.weights)
    other = load_config(None, [*CONFIG, f"draft.path={directory('0123546789')}"])
    assert "its token 6 is '5'" in message(
        lambda: prepare.check_tokenizer(other, base.config, base.tokenizer))
    check_tokens(open_model(source), base.config, base.tokenizer)
    # and one that history goes beside
    beside = [load_config(None, [*CONFIG, f"draft.path={path}", "draft.name=mixed"])
              for path in (source, other.draft.path)]
    drafted = base.shape.config
    assert prepare.check_draft(beside[0], drafted).config.trained == "draft_model"
    assert "its token 6 is '5'" in message(lambda: prepare.check_draft(beside[1], drafted))
    assert "set draft.path to one" in message(lambda: load_config(None, CONFIG))
    fresh = load_config(None, [*CONFIG, "draft.options={model: {num_layers: 1}}"])
    assert prepare.check_draft(fresh, base.config).config.model.num_layers == 1
