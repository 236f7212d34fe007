"""Config files over the bases that they name."""

import pytest

from jspec.config import load_config
from jspec.config_files import PRESETS, presets
from jspec.errors import InputError
from jspec.settings import to_yaml


def files(folder, **texts):
    for name, text in texts.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    return folder


def test_a_file_wins_over_its_bases_key_by_key_and_overrides_over_all(tmp_path):
    files(tmp_path / "below", lowest="steps: 3\ndata: {group_size: 2, options: {a: 1, b: 1}}\n",
          middle="base: lowest.yaml\nsteps: 4\nseed: 5\ndata: {options: {b: 2}}\n")
    files(tmp_path, top="base: below/middle.yaml\nseed: 6\ndata: {held_out: 7}\n")
    config = load_config(tmp_path / "top.yaml", ["data.held_out=8"])
    data = config.data
    assert (config.steps, config.seed, data.group_size, data.held_out) == (4, 6, 2, 8)
    assert data.options == {"a": 1, "b": 2}
    (tmp_path / "written.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "written.yaml") == config and "base:" not in to_yaml(config)


def test_a_preset_is_named_by_its_name_and_a_file_of_that_name_hides_it(tmp_path):
    for name in ("dr_grpo", "dr_grpo.yaml"):
        files(tmp_path, top=f"base: {name}\nsteps: 2\n")
        config = load_config(tmp_path / "top.yaml")
        assert (config.grpo.objective, config.steps) == ("dr_grpo", 2)
    files(tmp_path, top="base: dr_grpo.yaml\n", dr_grpo="base: dr_grpo.yaml\nsteps: 3\n")
    with pytest.raises(InputError, match="leads in a circle"):
        load_config(tmp_path / "top.yaml")


def test_a_base_on_the_command_line_takes_the_place_of_the_files_own(tmp_path, monkeypatch):
    files(tmp_path, other="steps: 9\nseed: 9\n", own="steps: 8\ngrpo: {clip: 3}\n",
          top="base: own.yaml\nseed: 1\n")
    monkeypatch.chdir(tmp_path)
    config = load_config("top.yaml", ["base=other.yaml"])
    assert (config.steps, config.seed, config.grpo.clip) == (9, 1, 1.0)
    assert load_config(None, ["base=dr_grpo"]).grpo.objective == "dr_grpo"


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_a_config_with_a_reason(name):
    config = load_config(PRESETS / f"{name}.yaml")
    assert config != load_config() and config.grpo.objective == name
    assert (PRESETS / f"{name}.yaml").read_text().startswith("# ")


@pytest.mark.parametrize(("text", "message"), [
    ("base: 7", "{top}: 'base' must name a config file or a preset ({presets}), not 7"),
    ("base: [a]", "{top}: 'base' must name a config file or a preset ({presets}), not ['a']"),
    ('base: "a\\0"', "{top}: 'base' must name a config file or a preset ({presets}), not "
     "'a\\x00'"),
    ("base: dr_gppo", "{top}: 'base': {folder}/dr_gppo does not exist, and no preset has that "
     "name; did you mean dr_grpo?"),
    ("base: ../nope/x.yaml", "{top}: 'base': {folder}/../nope/x.yaml does not exist, and no preset "
     "has that name ({presets})"),
    ("base: b.yaml", "{folder}/b.yaml: 'base' leads in a circle, back to {top}; let one of these "
     "files name no base"),
    ("base: bad.yaml", "{folder}/bad.yaml: unknown key 'grpo.clap'; did you mean 'grpo.clip'?"),
    ("base: .", "config file {folder} is no regular file"),
    ("bases: dr_grpo", "{top}: unknown key 'bases'; did you mean 'base'?"),
])
def test_a_bad_base_is_one_line(tmp_path, text, message):
    files(tmp_path, top=text, b="base: ./top.yaml\n", bad="grpo: {clap: 2}\n")
    with pytest.raises(InputError) as caught:
        load_config(tmp_path / "top.yaml")
    assert str(caught.value) == message.format(top=f"{tmp_path}/top.yaml", folder=tmp_path,
                                               presets=", ".join(presets()))
