import dataclasses
import os

import pytest

from jspec.choices import DRAFTERS, OTHERS_NAMES, RULES
from jspec.config import Config, load_config
from jspec.draft_config import DraftTrainingConfig
from jspec.errors import InputError
from jspec.settings import describe, refuse_changes, to_yaml

RANDOM = ["model.name=random", "model.tokenizer=chars:ab", "model.architecture.hidden_size=64"]


def test_later_layers_win_and_the_rest_are_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 9\ngrpo:\n  learning_rate: 2e-6\n"
                    "sampling: {temperature: 1, stop_tokens: [1, 2]}\n")
    config = load_config(path, ["steps=11", "sampling.temperature=0.5", "output_dir=runs/${seed}"])
    assert (config.steps, config.grpo.learning_rate, config.sampling.temperature) == (11, 2e-6, 0.5)
    assert config.sampling.stop_tokens == (1, 2)
    assert config.output_dir == "runs/0"
    assert config.data == Config().data


def test_an_integer_is_a_float_where_a_float_is_meant():
    temperature = load_config(None, ["sampling.temperature=1"]).sampling.temperature
    assert temperature == 1.0 and isinstance(temperature, float)


def test_options_and_architecture_take_any_keys():
    config = load_config(None, [*RANDOM, "draft.options.longest=4"])
    assert config.model.architecture == {"hidden_size": 64}
    assert config.draft.options == {"longest": 4}


def test_yaml_round_trip(tmp_path):
    config = load_config(None, [*RANDOM, "sampling.stop_tokens=[7]", "data.system_prompt='a: b'"])
    (tmp_path / "copy.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "copy.yaml") == config


ODD = ["it's", 'a "b"', "${x}", "\\${x}", "${seed}", "a\\", "[red]", "{a: 1}", "# no", "null", "7",
       "1e-6", "é\n ", ": -", "&a *b", "a~"]


@pytest.mark.parametrize("text", ODD)
def test_a_value_is_taken_as_it_is_and_survives_the_file(tmp_path, text):
    config = load_config(None, [("model.name", text), ("data.options", {"a": [text]})])
    assert config.model.name == text and config.data.options == {"a": [text]}
    (tmp_path / "copy.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "copy.yaml") == config


def test_references_are_to_keys_and_to_nothing_else(monkeypatch):
    monkeypatch.setenv("SECRET", "told")
    config = load_config(None, [("model.name", "my/model"),
                                "output_dir='runs/${model.name}/${seed}/\\${x}'"])
    assert config.output_dir == "runs/my/model/0/${x}"
    for text in ("${oc.env:SECRET}", "${oc.decode:1}", "a ${", "${}", "${${seed}}",
                 "${output_dir}"):
        with pytest.raises(InputError) as caught:
            load_config(None, [f"output_dir='{text}'"])
        assert "told" not in str(caught.value) and "\n" not in str(caught.value)


def test_overrides_merge_into_mappings_and_replace_the_rest(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("draft: {options: {depths: 2, blocks: 1}}\nsampling: {stop_tokens: [1, 2]}\n")
    config = load_config(path, ["draft.options.blocks=2", "sampling.stop_tokens=[3]",
                                f"seed={2**64 - 1}"])
    assert (config.draft.options, config.sampling.stop_tokens) == ({"depths": 2, "blocks": 2}, (3,))
    assert config.seed == 2**64 - 1


def test_what_is_set_of_a_short_entry_keeps_what_it_said():
    config = load_config(None, ["base=dapo", "reward.function.overlong.weight=0.5",
                                "data.source={a: a.jsonl, b: {source: b.jsonl, weight: 3}}",
                                "data.source.a.weight=2", "data.source.b=other.jsonl"])
    assert config.reward.function == {
        "task": "math_verify", "overlong": {"function": "soft_overlong", "weight": 0.5}}
    assert config.data.source == {"a": {"source": "a.jsonl", "weight": 2}, "b": "other.jsonl"}


def test_what_is_masked_is_not_everything():
    with pytest.raises(InputError, match="and with sampling.stop_tokens=.. all do"):
        load_config(None, ["grpo.mask_truncated=true", "sampling.stop_tokens=[]"])


def test_what_differs_inside_of_a_mapping_is_named_alone():
    said = "data.source={a: {source: a.jsonl, weight: 1}, b: b.jsonl}"
    before = load_config(None, [said])
    for change, told in (("data.source.a.weight=2", "data.source.a.weight=1, not 2;"),
                         ("data.source.b=c.jsonl", "data.source.b=b.jsonl, not c.jsonl;"),
                         ("data.source.c=c.jsonl", "data.source={'a': ")):
        with pytest.raises(InputError, match=f"runs/it holds a run with {told}"):
            refuse_changes("runs/it", before, load_config(None, [said, change]), ())


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().grpo.clip = 2.0


def test_every_rule_has_its_noise():
    from jspec.speculate.types import NOISE

    assert tuple(NOISE) == RULES


def test_every_field_has_a_meaning():
    rows = describe(Config)
    assert all(meaning for *_, meaning in rows)
    kinds = "a whole number or a list of lists of whole numbers or auto"
    assert ("speculation.k", kinds, "'auto'") in [row[:3] for row in rows]
    assert ("grpo.kl_estimate", "k1 | k2 | k3", "'k3'") in [row[:3] for row in rows]


@pytest.mark.parametrize(("override", "message"), [
    ("grpo.learnig_rate=3", "override 'grpo.learnig_rate=3': unknown key 'grpo.learnig_rate'; "
                            "did you mean 'grpo.learning_rate'?"),
    ("grpo.lr=3",
     "override 'grpo.lr=3': unknown key 'grpo.lr'; did you mean 'grpo.learning_rate'?"),
    ("grpo.beta=0.1",
     "override 'grpo.beta=0.1': unknown key 'grpo.beta'; did you mean 'grpo.kl_weight'?"),
    ("draft.max_grad_norm=1", "override 'draft.max_grad_norm=1': unknown key "
                              "'draft.max_grad_norm'; did you mean 'draft.clip'?"),
    ("logging.to=x",
     "override 'logging.to=x': unknown key 'logging.to'; did you mean 'logging.loggers'?"),
    ("grpo.b1=1", "override 'grpo.b1=1': 'grpo.b1' must be below 1, not 1"),
    ("grpo.eps=0", "override 'grpo.eps=0': 'grpo.eps' must be above 0, not 0"),
    ("lora.alpha=32", "lora.alpha is of adapters, and there are none: set lora.rank above 0, or "
                      "leave it out"),
    ("lora.rank=100000", "override 'lora.rank=100000': 'lora.rank' must be at most 65536, not "
                         "100000"),
    ("lora.alpha=1e7", "override 'lora.alpha=1e7': 'lora.alpha' must be at most 1000000.0, not "
                       "10000000.0"),
    ("grpo.sapo_tau=[1,2]", "grpo.sapo_tau is of grpo.objective=sapo, and that is grpo; leave it "
                            "out"),
    ("k=3", "override 'k=3': unknown key 'k'; did you mean 'speculation.k'?"),
    ("temprature=3",
     "override 'temprature=3': unknown key 'temprature'; did you mean 'sampling.temperature'?"),
    ("model=gpt",
     "override 'model=gpt': 'model' is a section, not a value; set its keys, such as 'model.name'"),
    ("steps", "override 'steps' must be key=value, such as grpo.learning_rate=1e-6"),
    ("seed=[1", "override 'seed=[1': did not find expected ',' or ']'"),
    ("steps=many", "override 'steps=many': 'steps' must be a whole number, not 'many'"),
    ("steps=1.5", "override 'steps=1.5': 'steps' must be a whole number, not 1.5"),
    ("steps=true", "override 'steps=true': 'steps' must be a whole number, not true"),
    ("steps=null", "override 'steps=null': 'steps' must be a whole number, not null"),
    ("grpo.clip=.nan", "override 'grpo.clip=.nan': 'grpo.clip' must be a number, not nan"),
    ("model.remat=1", "override 'model.remat=1': 'model.remat' must be true or false or none or "
     "full or dots or dots_no_batch, not 1"),
    ("model.name=7", "override 'model.name=7': 'model.name' must be text, not 7"),
    ("sampling.stop_tokens=[a]", "override 'sampling.stop_tokens=[a]': 'sampling.stop_tokens' must "
     "be a list of whole numbers or null, not ['a']"),
    ("draft.name=mpt", "override 'draft.name=mpt': 'draft.name' must be one of "
                       f"{', '.join(DRAFTERS)}, none, path/to/file.py:NAME, not 'mpt'"),
    ("speculation.k=0", "override 'speculation.k=0': 'speculation.k' must be at least 1, not 0"),
    ("speculation.k=often", "override 'speculation.k=often': 'speculation.k' must be a whole "
     "number or a list of lists of whole numbers or auto, not 'often'"),
    ("speculation.k=[[4,7],[4,3]]", "speculation.k=[[4, 7], [4, 3]] is no schedule: pairs of "
     "[rows, k], with k from 0 to 64 and no number of rows twice, such as [[4, 7], [16, 3]]"),
    ("speculation.k=[]", "speculation.k=[] is no schedule: pairs of [rows, k], with k from 0 to 64 "
     "and no number of rows twice, such as [[4, 7], [16, 3]]"),
    ("sampling.top_p=0", "override 'sampling.top_p=0': 'sampling.top_p' must be above 0, not 0"),
    ("sampling.top_p=1.5",
     "override 'sampling.top_p=1.5': 'sampling.top_p' must be at most 1, not 1.5"),
    ("grpo.clip_high=-1",
     "override 'grpo.clip_high=-1': 'grpo.clip_high' must be at least 0, not -1"),
    ("output_dir=${nope}",
     "override 'output_dir=${nope}': 'output_dir': Interpolation key 'nope' not found"),
    ("data.group_size=1", "data.group_size must be at least 2, not 1: an answer's advantage is "
     "measured against the others of its group"),
    ("sampling.min_new_tokens=129",
     "sampling.min_new_tokens (129) is above sampling.max_new_tokens (128)"),
    ("data.over_sampling=0.5",
     "override 'data.over_sampling=0.5': 'data.over_sampling' must be at least 1, not 0.5"),
    ("grpo.micro_batch=5", "grpo.micro_batch (5) must divide the rows of a step, "
                           "data.prompts_per_step x data.group_size = 16"),
    ("grpo.widths=[32,129]", "grpo.widths is [32, 129], and no answer is longer than "
     "sampling.max_new_tokens = 128: leave out what is above it"),
    ("model.name=random", "model.name is 'random' and model.architecture is not set: an "
     "architecture goes with the name 'random', which needs one"),
    ("draft={path: p, options: {longest: 4}}", "draft.options are a fresh draft's, and the one at "
     "draft.path=p has its own; set draft.options=null"),
    ("draft.options=[1]", "override 'draft.options=[1]': 'draft.options' must be a mapping of "
     "names to texts, finite numbers, lists and mappings or null, not [1]"),
    ("data.options={1: 2}", "override 'data.options={1: 2}': 'data.options' must be a mapping of "
     "names to texts, finite numbers, lists and mappings, not {1: 2}; the name 1 is no text, which "
     "it is in quotes"),
    ("data.source={a: {source: b, weight: .inf}}", "override 'data.source={a: {source: b, weight: "
     ".inf}}': 'data.source' must be text or a mapping of names to texts, finite numbers, lists "
     "and mappings, not {'a': {'source': 'b', 'weight': inf}}; 'data.source.a.weight' is inf"),
    ("reward.function=[a, b]", "override 'reward.function=[a, b]': 'reward.function' must be text "
     "or a mapping of names to texts, finite numbers, lists and mappings, not ['a', 'b']; several "
     "go by name, as in {a: ..., b: ...}"),
    ("data.source={}", "override 'data.source={}': 'data.source' must be text or a mapping of "
     "names to texts, finite numbers, lists and mappings with one entry at least, not {}"),
    ("data.weights=[1, 2]", "override 'data.weights=[1, 2]': unknown key 'data.weights'; did you "
     "mean 'data.source'?"),
    ("data.options={size:5}", "override 'data.options={size:5}': 'data.options' has the key "
     "'size:5' without a value; write a blank after the colon, as in {size: 1}"),
    ("data.options={a:[5]}",
     "override 'data.options={a:[5]}': found unexpected ':'; write a blank after the colon"),
    ("output_dir=[a]", "override 'output_dir=[a]': 'output_dir' must be text, not ['a']; text with "
     "such characters needs quotes, as in output_dir='\"...\"'"),
    ('output_dir=""',
     "override 'output_dir=\"\"': 'output_dir' must be text with one character at least, not ''"),
    ('output_dir="a\\0b"',
     "override 'output_dir=\"a\\0b\"': 'output_dir' must be text, not 'a\\x00b'"),
    ("seed=-1", "override 'seed=-1': 'seed' must be at least 0, not -1"),
    (f"seed={2**64}", f"override 'seed={2**64}': 'seed' must be at most {2**64 - 1}, not {2**64}"),
    ("steps=3000000000",
     "override 'steps=3000000000': 'steps' must be at most 2147483647, not 3000000000"),
    ("grpo.clip=1e39", "override 'grpo.clip=1e39': 'grpo.clip' must be 0, or between 1.2e-38 and "
     "3.4e+38 in size, which is what float32 holds, not 1e+39"),
    ("grpo.clip=9" + "0" * 400,
     f"override 'grpo.clip=9{'0' * 86}...': 'grpo.clip' must be a number, not 9{'0' * 96}..."),
    ("seed=9" + "0" * 5000,
     f"override 'seed=9{'0' * 91}...': a whole number of more than 4300 digits"),
    ("seed=" + "[" * 99, f"override 'seed={'[' * 92}...': nested more than 32 deep"),
    ("seed=&a [*a]", "override 'seed=&a [*a]': *a stands inside of itself"),
    ("seed=!!int x", "override 'seed=!!int x': invalid literal for int() with base 10: 'x'"),
    ("seed=!!python/object:os.system x", "override 'seed=!!python/object:os.system x': could not "
     "determine a constructor for the tag 'tag:yaml.org,2002:python/object:os.system'"),
    ("grpo..clip=1", "override 'grpo..clip=1' must be key=value, such as grpo.learning_rate=1e-6"),
    ("seed=1\n2", "override 'seed=1\\n2': 'seed' must be a whole number, not '1 2'"),
    ("mesh.fsdp=-1", "mesh.data, mesh.fsdp, mesh.expert and mesh.tensor are (-1, -1, 1, 1): "
                     "each at least 1, and one of them at most may be -1"),
])
def test_a_bad_override_is_named(override, message):
    with pytest.raises(InputError) as caught:
        load_config(None, [override])
    assert str(caught.value) == message


def test_what_is_drawn_is_rounded_up():
    for share, factor, drawn in ((4, 1.0, 4), (10, 1.1, 11), (4, 1.5, 6), (5, 1.5, 8)):
        data = load_config(None, [f"data.prompts_per_step={share}",
                                  f"data.over_sampling={factor}"]).data
        assert data.prompts_drawn == drawn


def test_quotes_are_no_remedy_where_a_mapping_may_be():
    with pytest.raises(InputError) as refused:
        load_config(None, ["reward.function={a: {weight: .nan}}"])
    assert "finite numbers" in str(refused.value) and "quotes" not in str(refused.value)


@pytest.mark.parametrize(("text", "message"), [
    ("steps: 3\nsampling:\n  topk: 3\n",
     "unknown key 'sampling.topk'; did you mean 'sampling.top_k'?"),
    ("steps: many\n", "'steps' must be a whole number, not 'many'"),
    ("model:\n", "'model' is a section, not a value; set its keys, such as 'model.name'"),
    ("- steps\n", "must hold key: value pairs, such as 'steps: 10'"),
    ("42\n", "must hold key: value pairs, such as 'steps: 10'"),
    ("steps: 3\nsteps: 4\n", "is not valid YAML: line 2, column 1: found duplicate key steps"),
    ("model: [\n", "is not valid YAML: line 2, column 1: did not find expected node content"),
])
def test_a_bad_file_is_named(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert str(caught.value).replace(f"{path}: ", "").replace(f"{path} ", "") == message
    assert str(caught.value).startswith(str(path))


def test_a_few_aliases_are_read_and_many_are_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: &a 5\nsteps: *a\n")
    assert load_config(path).steps == 5
    levels = "".join(f"    a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9))
    path.write_text(f"data:\n  options:\n    a0: &a0 [1, 1]\n{levels}")
    with pytest.raises(InputError, match="more than 20000 values, aliases written out"):
        load_config(path)


@pytest.mark.parametrize("content",
                         [b"steps: \xff", b"steps: 3\0", b"# " + b"x" * 2**18, b"steps: 3\n--- 4",
                          b"data: {options: {a: .nan}}", b"data: {options: {a: !!set {x}}}"])
def test_hostile_files_get_one_line_each(tmp_path, content):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_what_is_no_file_is_no_config(tmp_path):
    os.mkfifo(tmp_path / "fifo.yaml")
    for name in ("", "fifo.yaml"):
        with pytest.raises(InputError, match="is no regular file"):
            load_config(tmp_path / name)
    for name in ("a\0b", "a" * 5000):
        with pytest.raises(InputError, match="does not exist"):
            load_config(tmp_path / name)


def test_a_file_that_is_not_there_is_named_with_its_neighbour(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("steps: 3\n")
    with pytest.raises(InputError) as caught:
        load_config(tmp_path / "quickstrat.yaml")
    assert str(caught.value) == (f"config file {tmp_path}/quickstrat.yaml does not exist; "
                                 f"did you mean {tmp_path}/quickstart.yaml?")


@pytest.mark.parametrize(("overrides", "message"), [
    (["base=rloo", "grpo.kl_weight=0"], "grpo.kl_in_reward is of the KL to a reference, and there "
     "is none: set grpo.kl_weight above 0, or grpo.kl_in_reward=false"),
    (["grpo.objective=cispo", "grpo.dual_clip=3"], "grpo.dual_clip bounds a clipped loss, and "
     "grpo.objective=cispo is none; leave it out"),
])
def test_keys_that_do_not_go_together_are_named(overrides, message):
    with pytest.raises(InputError) as error:
        load_config(None, overrides)
    assert str(error.value) == message


def test_what_others_call_a_key_is_no_key_of_ours():
    keys = {row[0] for row in describe(Config)}
    assert OTHERS_NAMES.keys() <= keys
    names = [name for theirs in OTHERS_NAMES.values() for name in theirs]
    assert len(names) == len({*names}) and not {*names} & {key.split(".")[-1] for key in keys}


def test_an_override_of_a_bad_file_value_repairs_it(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("steps: many\n")
    assert load_config(path, ["steps=4"]).steps == 4


def test_the_home_is_where_a_path_says_so(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    config = load_config(None, ["output_dir=~/run", "data.source=~/p.jsonl",
                                "data.system_prompt=~/as it is"])
    assert ((config.output_dir, config.data.source)
            == ("/home/somebody/run", "/home/somebody/p.jsonl"))
    assert config.data.system_prompt == "~/as it is"
    draft = load_config(None, ["samples.sources=[self, ~/p.jsonl]"], DraftTrainingConfig)
    assert draft.samples.sources == ("self", "/home/somebody/p.jsonl")
    assert load_config(None, ["output_dir='~'"]).output_dir == "/home/somebody"
    with pytest.raises(InputError, match="'output_dir': ~nobody_at_all/x names the home of a user "
                       "who is not there"):
        load_config(None, ["output_dir=~nobody_at_all/x"])
