"""A step's answer for one CPU device, whose compiler is here, held to what that says of the
whole."""

import importlib.util
import json
import subprocess
import sys
from xml.etree import ElementTree

import jax
import pytest

from jspec.base_model import architecture
from jspec.config import load_config
from jspec.console import PlainConsole
from jspec.errors import InputError
from jspec.scale.chips import Chip
from jspec.scale.depths import depths, extended
from jspec.scale.fit import fit
from jspec.scale.memory import refused
from jspec.scale.report import as_json, bars, show, svg, verdict
from jspec.scale.topologies import Topology

LAYERS = 4
HERE = Topology(
    "here",
    Chip("cpu", "cpu", 2**34, 2**34, 1e10, 1e11, None, None, 1, 1e9, 1e9, 2**34, 1, "none"),
    (),
)
OVERRIDES = [
    f"model.architecture.num_layers={LAYERS}",
    "speculation.k=1",
    "model.remat=true",
    "data.prompts_per_step=4",
    "data.group_size=4",
    "grpo.micro_batch=8",
    "draft.every_n_steps=1",
]


def answer(*overrides, layers=()):
    config = load_config("configs/tiny.yaml", [*OVERRIDES, *overrides])
    return fit(config, architecture(config.model), HERE, jax.devices()[:1], layers=layers)


@pytest.fixture(scope="module")
def small():
    return answer("draft.name=none", layers=(1, 2))


@pytest.mark.slow
def test_memory_of_many_layers_is_known_from_a_few(small):
    """Within 10% of what the compiler says of the whole program, program by program."""
    whole = answer("draft.name=none", layers=(LAYERS,))
    assert {p.name: p.layers for p in small.programs} == {
        "reshard": (1, 2),
        "rollout": (1, 2),
        "update": (LAYERS,),
    }
    for few, all_of_it in zip(small.programs, whole.programs, strict=True):
        assert few.bytes == pytest.approx(all_of_it.bytes, rel=0.1), few.name
        compute, known = small.floor(few).compute, whole.floor(all_of_it).compute
        assert compute == pytest.approx(known, rel=0.02), few.name


def test_every_byte_has_a_kind(small):
    """What is always there, the pool and the copy by their shapes, and the rest temporaries."""
    for program in small.programs:
        assert sum(program.kinds.values()) == pytest.approx(program.needed, rel=0.01)
        assert program.kinds["optimizer"] == pytest.approx(
            2 * program.kinds["master weights"], rel=1e-3
        )
    rollout = next(program for program in small.programs if program.name == "rollout")
    # 4 prompts of one block, 16 rows of one: 16 positions, 8 KV heads of 16, float32
    blocks = 4 + 16
    assert rollout.kinds["KV pool"] == LAYERS * blocks * 2 * 8 * 16 * 16 * 4


def test_an_optimizers_state_in_host_memory_is_not_beside_the_rollout(small):
    there = answer("draft.name=none", "grpo.state_memory=host", layers=(1, 2))
    state = small.programs[0].kinds["optimizer"]
    for name, saved in (("reshard", 0), ("rollout", state), ("update", 0)):
        here, before = (next(program for program in found.programs if program.name == name)
                        for found in (there, small))
        assert before.needed - here.needed == saved, name
        assert sum(here.kinds.values()) == here.needed
    assert there.host_bytes == small.host_bytes | {"optimizer": state}
    assert there.largest.micro_batch == small.largest.micro_batch


def test_the_answer_is_said_drawn_and_written(small, capsys):
    show(small, PlainConsole(width=120))
    out = capsys.readouterr().out
    assert "random fits here" in verdict(small) and verdict(small) in out
    assert (
        "a cycle" in out
        and "policy_loss, backward" in out
        and "rollout.slots 16 (of 16 rows)" in out
    )
    assert all(line.count("|") == 1 for line in bars(small)[:-1])
    assert json.loads(json.dumps(as_json(small)))["fits"] is True
    drawn = ElementTree.fromstring(svg(small))
    assert len(drawn.findall("{http://www.w3.org/2000/svg}rect")) > len(small.programs)
    texts = drawn.findall("{http://www.w3.org/2000/svg}text")
    assert all(len(text.text) < int(drawn.get("width")) / 8 for text in texts)  # none is cut


def test_sizes_that_do_not_go_together_are_one_line():
    with pytest.raises(
        InputError, match="mesh data x fsdp x expert x tensor = 1 x 3 x 1 x 1 does not fit"
    ):
        answer("mesh.fsdp=3", "mesh.data=1")


def test_layers_of_two_kinds_are_counted_apart():
    model = architecture(load_config("configs/tiny.yaml", OVERRIDES).model)
    assert [one.num_layers for one in depths(model, (1, 3))] == [1, 3]
    assert depths(model, (1, LAYERS)) == [model]
    assert extended(model, depths(model, (1, 3)), [13, 19]) == pytest.approx(10 + 3 * LAYERS)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. "
            "Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.",
            int(20.5 * 2**30),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries "
            "(17.00G) exceeds available HBM (15.75G).",
            17 * 2**30 + 5,
        ),
        ("INTERNAL: something else", None),
    ],
)
def test_what_a_compiler_says_when_it_does_not_fit(said, expected):
    assert refused(RuntimeError(said), 5) == expected


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"),
    reason="needs the TPU's compiler: pip install 'jspec[aot]'",
)
def test_a_small_step_on_four_chips_that_are_not_here(tmp_path):
    """The command itself: the pool and the copy by their shapes, and floors of every phase."""
    path, plot = tmp_path / "answer.json", tmp_path / "memory.svg"
    sizes = ["mesh.fsdp=2", "mesh.tensor=2", "data.prompts_per_step=4", "data.group_size=4"]
    command = ["fit", "configs/qwen3-8b-pod.yaml", "--on", "v5e-4", "model.name=qwen3-0.6b", *sizes]
    command += ["sampling.max_new_tokens=128", "grpo.micro_batch=2", "speculation.k=1"]
    done = subprocess.run(
        [sys.executable, "-m", "jspec", *command, "--json", str(path), "--plot", str(plot)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(path.read_text())
    assert answer["fits"] and "qwen3-0.6b fits v5e-4" in done.stdout
    rollout = next(program for program in answer["programs"] if program["name"] == "rollout")
    assert rollout["compiled_layers"] == [2, 4]
    assert rollout["bytes"]["rollout copy"] == pytest.approx(2 * 596049920 / 2, rel=0.01)
    phases = {phase["phase"] for program in answer["programs"] for phase in program["phases"]}
    assert {"prefill", "verify", "accept", "policy_loss, backward", "optimizer"} <= phases
    assert answer["step_floor_seconds"] > 0 and plot.is_file()
