"""`jspec project` from the command line."""

import json
import re
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

from jspec.cli import main
from jspec.scale.project_picture import EVEN, FAST, SLOW, color

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
model:
  name: random
  tokenizer: chars:0123456789+=
  architecture: {vocab_size: 64, hidden_size: 32, intermediate_size: 64, num_layers: 2,
                 num_heads: 4, num_kv_heads: 2, head_dim: 8, max_position_embeddings: 4096}
data: {prompts_per_step: 16, group_size: 4}
sampling: {max_new_tokens: 512}
mesh: {fsdp: 2, tensor: 2}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return str(path)


def test_tables_data_and_picture(capsys, config, tmp_path):
    files = tmp_path / "out.json", tmp_path / "out.svg"
    code = main(["project", config, "--on", "v5p-16,h100-4", "--k", "1,3", "--json", str(files[0]),
                 "--plot", str(files[1]), "--draft-cost", "0.5", "--generation-share", "0.5"])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert "Projected; nothing here was measured. Seconds are a floor: expect 1.2 to 2 times" in out
    assert "random on v5p-16: 8 x v5p, rows over 4 shards on 2 devices each; 64 answers" in out
    assert "pays from" in out and "each machine's best cell" in out and "*" in out
    first, second = json.loads(files[0].read_text())
    assert (first["on"], first["projected"], first["measured"]) == ("v5p-16", True, None)
    assert second["chip"] == "h100" and second["split"]["batch"] == 2
    assert [c["k"] for c in first["cycles"]] == [0, 1, 3] and len(first["cells"]) == 14
    seconds = first["seconds"]
    assert seconds["rest"] == pytest.approx(seconds["prompts"] + seconds["decoding"])
    drawn = xml.parse(files[1]).getroot()
    texts = [text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert "random on v5p-16: times faster than without a draft" in texts
    assert any("nothing here was measured" in text for text in texts)
    shown = f"{first['cells'][0]['rollout']:.2f}"
    assert shown in texts and "rollout" in texts and "step" in texts


def test_the_picture_of_the_readme_is_what_its_command_draws(capsys, monkeypatch, tmp_path):
    command = re.search(r"`jspec (project\s[^`]*--plot) ([^`]+)`", (ROOT / "README.md").read_text())
    monkeypatch.chdir(ROOT)
    assert main([*command[1].split(), str(tmp_path / "drawn.svg")]) == 0
    assert (tmp_path / "drawn.svg").read_text() == (ROOT / command[2]).read_text()
    assert "Projected" in capsys.readouterr().out


def test_a_measured_table_is_named(capsys, config, tmp_path):
    (tmp_path / "costs.json").write_text(json.dumps({
        "source": "someone's", "on": "v5p-8", "measured": [{"k": 3, "tokens": 3, "speedup": 1.5}]}))
    assert main(["project", config, "--on", "v5p-16", "--costs", str(tmp_path / "costs.json"),
                 "--k", "3", "--tokens", "3,9"]) == 0
    out = capsys.readouterr().out
    assert "Of it measured, what a cycle takes beyond its floor: someone's." in out
    nine, three = (next(line for line in out.splitlines() if f"│ {tokens}  " in line)
                   for tokens in (9, 3))
    assert "tokens a cycle" in out and "-" in nine and "1.5" in three and "*" in three


def test_the_rest_of_a_step_follows_the_config(capsys, config, tmp_path):
    def rest(*more):
        name = str(tmp_path / "out.json")
        assert main(["project", config, *more, "--on", "v5p-8", "--k", "1", "--json", name]) == 0
        return json.loads((tmp_path / "out.json").read_text())[0]["seconds"]["rest"]

    once = rest()
    assert rest("grpo.updates_per_rollout=2") == pytest.approx(2 * once)
    assert rest("model.remat=true", "grpo.kl_weight=0.1") == pytest.approx(once * 5 / 3)
    assert rest("--rest", "7.5") == 7.5
    capsys.readouterr()


def test_a_machine_that_is_too_small_is_said(capsys, tmp_path):
    config = str(ROOT / "configs" / "qwen3-30b-a3b-pod.yaml")
    for more, says in (([], "152 GiB a device at their fullest, and there are 60."),
                       (["rollout.kv_tokens=200000"], "75 GiB a device at their fullest"),
                       (["--on", "h200-1", "rollout.kv_tokens=200000"], "")):
        name = str(tmp_path / "out.json")
        assert main(["project", config, "--on", "h100-1", "mesh.fsdp=1", "mesh.expert=1", *more,
                     "--k", "1", "--lengths", "constant:1000", "--json", name]) == 0
        out = capsys.readouterr().out
        assert says in out and ("too small" in out) == bool(says)
    held = json.loads(Path(name).read_text())[0]["held_bytes"]
    of_draft = 2 * 64e6 + 200_000 * 2_048  # a layer of the policy's 48
    assert held == pytest.approx(2 * (30.53e9 - 0.31e9) + 200_000 * 98_304 + of_draft, rel=1e-3)


@pytest.mark.parametrize("arguments, says", [
    (["--on", "v5p-1000"], "v5p"), (["--on", "nothing-8"], "gb200-512"),
    (["--on", "v5p-8", "--k", "0"], "whole number of at least 1"),
    (["--on", "v5p-8", "--acceptance", "1.5"], "at most 1"),
    (["--on", "v5p-8", "--costs", str(ROOT / "benchmarks/published/qwen3_235b.json"),
      "mesh.data=1"], "is of another machine: gb200-512: mesh data x fsdp"),
    (["--on", "v5p-8", "--costs", "a", "--draft-cost", "1"], "not allowed with"),
    (["--on", "v5p-8", "--generation-share", "1", "--rest", "1"], "not allowed with"),
    (["--on", "v5p-8", "--plot", "out.png"], "must end in .svg"),
    (["--on", "v5p-8", "--lengths", "nowhere"], "there is no such file"),
    (["--on", "h100-6"], "does not fit 6 devices"),
    (["--on", "v5p-8", "data.over_sampling=1.5"], "data.over_sampling=1.5 ends rollouts early"),
    (["--on", "v5p-8", "rollout.slots=1"], "slots = 1 are not divided by"),
    (["--on", "v5p-8", "rollout.kv_tokens=1"], "rollout.kv_tokens"),
    (["--on", "v5p-8", "sampling.max_new_tokens=4096"], "more than the model's 4096 positions"),
    (["--on", "v5p-16,h100-6"], "h100-6: mesh data x fsdp x expert x tensor"),
    (["--on", "2xv5p-8", "mesh.data=1", "mesh.fsdp=4"], "not divided by the 2 slices"),
    (["--on", "v5p-8", "--tokens", "9.5", "--k", "3,8"], "a cycle that drafts 8 yields 9 at most"),
    (["--on", "v5p-8", "mesh.tensor=1", "mesh.data=4", "data.prompts_per_step=3",
      "data.group_size=3", "mesh.fsdp=1"], "not divided by"),
    (["--on", "v5p-8", "draft.name=none"], "name a drafter"), ([], "required: --on")])
def test_bad_arguments_are_one_line(capsys, config, arguments, says):
    assert main(["project", config, *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and says in err and err.count("\n") == 1


def test_pictures_have_room_for_what_they_say(capsys, config, tmp_path):
    """Many ks, a long source, a lag, and a row that no k reaches."""
    source = "words " * 60
    (tmp_path / "costs.json").write_text(json.dumps({
        "source": source, "measured": [{"k": 3, "tokens": 3, "speedup": 1.5}]}))
    drawn = tmp_path / "out.svg"
    assert main(["project", config, "--on", "v5p-8", "--k", ",".join(map(str, range(1, 13))),
                 "--tokens", "2,13,14", "--costs", str(tmp_path / "costs.json"), "--lag", "1",
                 "--plot", str(drawn)]) == 0
    out = capsys.readouterr().out
    assert "k = 12" in out and "…" not in out and max(map(len, out.split("\n")[2:])) < 160
    root, name = xml.parse(drawn).getroot(), "{http://www.w3.org/2000/svg}"
    width, height = map(int, root.get("viewBox").split()[2:])
    cells = [float(cell.get("x")) for cell in root.iter(name + "rect") if cell.get("rx")]
    assert max(cells) < width - 44 and len(cells) == 2 * (12 + 1)
    texts = list(root.iter(name + "text"))
    assert all(len(text.text) < width / 6 and float(text.get("y")) < height for text in texts)
    places = [(text.get("x"), text.get("y")) for text in texts]
    assert len(set(places)) == len(places)


def test_colors():
    assert color(1.0) == EVEN and color(4.0) == color(9.0) == FAST and color(0.4) == SLOW
    assert color(2.0)[0] < color(1.5)[0]
