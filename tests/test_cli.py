import errno
import os
import subprocess
import sys

import pytest

from jspec.cli import main
from jspec.config import Config, load_config
from jspec.settings import describe


def run(capsys, *arguments):
    """Exit code, what was printed, and what was complained about."""
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"steps: 3\noutput_dir: {tmp_path}/run\n")
    return str(path)


@pytest.mark.parametrize("command", ["train", "rollout", "eval", "fetch", "export", "profile",
                                     "fit", "project"])
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    assert f"usage: jspec {command}" in capsys.readouterr().out


def test_help_lists_every_command_and_a_first_thing_to_try(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(command in out
               for command in ("train", "rollout", "eval", "fetch", "export", "bench", "profile"))
    assert 'jspec rollout smollm2-135m-instruct --prompt "' in out


def test_train_help_lists_the_keys(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    assert "speculation.k = 'auto'" in out and "tokens drafted per cycle" in out


def told(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        main(list(arguments))
    assert exit.value.code == 0
    return capsys.readouterr().out


def test_train_help_is_one_page_with_every_key_by_section(capsys):
    out = told(capsys, "train", "--help")
    assert len(out.splitlines()) <= 100 and max(map(len, out.splitlines())) <= 100
    words = out[out.index("all, by section"):].split()
    assert all(key.split(".")[-1] in words for key, *_ in describe(Config))


def test_help_of_a_section_a_key_or_all_has_defaults_and_meanings(capsys):
    section = told(capsys, "train", "--help", "sampling")
    assert "sampling.top_k = 0" in section and "keep the k likeliest tokens" in section
    assert "sampling: What" in section and "grpo." not in section and "usage" not in section
    assert told(capsys, "profile", "--help", "grpo.clip").startswith("    grpo.clip = 1.0 ")
    everything = told(capsys, "train", "-h", "all")
    assert all(f"{key} = {default}" in everything for key, kind, default, _ in describe(Config)
               if kind)
    assert run(capsys, "train", "--help", "grpo.clap") == (
        2, "", "jspec: error: --help: there is no section and no key 'grpo.clap'; did you mean "
        "'grpo.clip'?\n")


def test_help_does_not_wait_for_jax():
    code = ("import sys, jspec.cli\ntry: jspec.cli.main(['train', '-h'])\n"
            "finally: assert 'jax' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_whole_configuration_can_be_printed(capsys, config, tmp_path):
    code, out, _ = run(capsys, "train", config, "--print-config", "grpo.learning_rate=3e-6")
    assert code == 0
    (tmp_path / "printed.yaml").write_text(out)
    assert (load_config(tmp_path / "printed.yaml")
            == load_config(config, ["grpo.learning_rate=3e-6"]))


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "the following arguments are required: COMMAND (see `jspec --help`)"),
    (["rollout", "m"],
     "the following arguments are required: --prompt (see `jspec rollout --help`)"),
    (["rollout", "m", "--prompt", "x", "--k", "two"],
     "argument --k: invalid int value: 'two' (see `jspec rollout --help`)"),
    (["fetch", "m", "--fast"], "unrecognized arguments: --fast (see `jspec --help`)"),
    (["train", "missing.yaml"], "config file missing.yaml does not exist"),
    (["rollout", "m", "--prompt", "x", "--temperature", "-1"],
     "override 'sampling.temperature=-1.0': 'sampling.temperature' must be at least 0, not -1.0"),
    (["rollout", "m", "--prompt", "x", "--k", "0"],
     "override 'speculation.k=0': 'speculation.k' must be at least 1, not 0"),
    (["eval", "m", "data.sorce=x"],
     "override 'data.sorce=x': unknown key 'data.sorce'; did you mean 'data.source'?"),
    (["eval", "m", "--prompts", "0"], "--prompts must be at least 1, not 0"),
])
def test_mistakes_are_one_line(capsys, arguments, message):
    assert run(capsys, *arguments) == (2, "", f"jspec: error: {message}\n")


def test_a_variable_that_jax_does_not_understand_is_one_line():
    done = subprocess.run([sys.executable, "-m", "jspec", "eval", "x"], capture_output=True,
                          text=True, env=os.environ | {"JAX_NUM_CPU_DEVICES": "two"})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert '"two" for JAX flag JAX_NUM_CPU_DEVICES; mend or unset that variable' in done.stderr


def test_a_bad_override_is_one_line(capsys, config):
    code, _, err = run(capsys, "train", config, "grpo.lr=1")
    assert (code, err) == (2, "jspec: error: override 'grpo.lr=1': unknown key 'grpo.lr'; "
                              "did you mean 'grpo.learning_rate'?\n")


@pytest.mark.parametrize("arguments", [["rollout", "smollm3", "--prompt", "x"], ["eval", "smollm3"],
                                       ["export", "smollm3", "out"], ["fetch", "smollm3"]])
def test_a_model_that_is_not_there_is_one_line(capsys, arguments):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("jspec: error: model 'smollm3' is not there") and err.count("\n") == 1


def test_bench_needs_a_checkout(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("jspec.cli.__file__", str(tmp_path / "site-packages" / "jspec" / "cli.py"))
    code, _, err = run(capsys, "bench", "--help")
    assert code == 2 and "`jspec bench` needs a source checkout of jspec, not a wheel" in err


def test_interrupted(capsys, monkeypatch, config):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("jspec.config.load_config", interrupt)
    assert run(capsys, "train", config) == (130, "", "jspec: interrupted\n")


@pytest.mark.parametrize("error, code, line", [
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\nmore"), 1,
     "jspec: error: out of memory (Out of memory allocating 8 bytes.); take a smaller model, more "
     "devices, or fewer"),
    (MemoryError(), 1, "jspec: error: out of memory (no more is said); take"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), 2,
     f"jspec: error: {'x' * 97}...: File name too"),
])
def test_what_the_machine_has_no_room_for_is_one_line(capsys, monkeypatch, config, error, code,
                                                      line):
    def fail(*_):
        raise error

    monkeypatch.setattr("jspec.config.load_config", fail)
    got, _, err = run(capsys, "train", config)
    assert got == code and err.startswith(line) and err.count("\n") == 1


def test_no_traceback_from_the_program_itself():
    done = subprocess.run([sys.executable, "-m", "jspec", "train", "nope.yaml"],
                          capture_output=True, text=True)
    assert ((done.returncode, done.stderr)
            == (2, "jspec: error: config file nope.yaml does not exist\n"))
