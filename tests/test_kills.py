"""Runs that are killed where it hurts: half way through what a logger writes, a checkpoint, and an
export. The same command again gives the same metrics. (In an evaluation: `test_evaluator.py`; at
any moment, and a small version: `test_train.py`.)"""

import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jspec import hub, train
from jspec.checkpoint import has_checkpoints
from jspec.choices import LOGGERS
from jspec.cli import main
from jspec.errors import InputError
from jspec.hub.exporter import whole_directory
from tests.hub.checkpoints import GOLDEN
from tests.loggers import reading
from tests.tiny_runs import ROOT, SMALL, records, tiny

EVERY = ["steps=5", "checkpoint.every=2", "checkpoint.best=loss", "draft.name=ngram",
         "draft.options={}"]
AT = 3  # no step that a checkpoint is due after: the run goes on from step 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    directory = tmp_path_factory.mktemp("whole")
    assert train.train(tiny(directory, *EVERY)) == 0
    return directory


def tensorboard_rewards(run):
    return [(step, value.simple_value)
            for (step, tag), value in reading.tensorboard_values(run).items() if tag == "reward"]


def test_what_a_killed_export_left_goes_with_the_next_and_nothing_else_does(tmp_path):
    policy = hub.load(str(GOLDEN / "llama"))
    (tmp_path / ".out-original").mkdir()  # somebody's own
    with pytest.raises(InputError, match="is not an empty directory"), \
            whole_directory(tmp_path / "out") as at_work:
        left = tmp_path / at_work.name.replace(at_work.name[-8:], "abcdefgh")
        left.mkdir()
        (left / "model.safetensors").write_bytes(b"half of it")
        hub.export(policy, tmp_path / "out")
        assert at_work.is_dir() and not left.exists()
        hub.export(policy, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out-original", "out"]


PLANTS = {
    "record": """
        from jspec.metrics import Metrics
        write = Metrics.write
        def half(self, record):
            if record["step"] == {at}:
                self.file.write('{{"step": {at}, "rew')
                self.file.flush()
                kill()
            write(self, record)
        Metrics.write = half
        """,
    "samples": """
        from jspec import metrics
        from jspec.run_files import write_samples
        def half(directory, step, samples):
            write_samples(directory, step, samples)
            if step == {at}:
                path = directory / "samples" / "{at:06d}.jsonl"
                path.write_bytes(path.read_bytes()[:-9])
                kill()
        metrics.write_samples = half
        """,
    "tensorboard": """
        from jspec.loggers.tensorboard import TensorBoard
        write = TensorBoard.write
        def half(self, entry):
            write(self, entry)
            if entry.step == {at}:
                path = self.writer._file_name
                os.truncate(path, os.stat(path).st_size - 9)
                kill()
        TensorBoard.write = half
        """,
    "mlflow": """
        from mlflow import MlflowClient
        log_batch = MlflowClient.log_batch
        def half(self, run, metrics=(), **more):
            if metrics and metrics[0].step == {at}:
                log_batch(self, run, metrics=metrics[:len(metrics) // 2])
                kill()
            log_batch(self, run, metrics=metrics, **more)
        MlflowClient.log_batch = half
        """,
    "wandb": """
        from jspec.loggers.wandb import WeightsAndBiases
        write = WeightsAndBiases.write
        def half(self, entry):
            write(self, entry)
            if entry.step == {at}:
                kill()  # its library is about to write that
        WeightsAndBiases.write = half
        """,
    "trackio": """
        from jspec.loggers.trackio import Trackio
        write = Trackio.write
        def half(self, entry):
            write(self, entry)
            if entry.step == {at}:
                kill()
        Trackio.write = half
        """,
    "checkpoint": """
        from jspec import checksums
        def half(folder):  # all files are written, and the folder has no name yet
            if folder.name.startswith("4."):
                kill()
            write(folder)
        write, checksums.write = checksums.write, half
        """,
    "export": """
        from jspec.hub import safetensors_io, exporter
        write_file = exporter.write_file
        def half(path, shapes, value):
            write_file(path, shapes, value)
            os.truncate(path, path.stat().st_size // 2)
            kill()
        exporter.write_file = half
        """,
}
"""What is done to jspec in a process, which kills itself by it."""


def run(*arguments, plant="", **environment):
    """A jspec command in a process of its own, and its exit code."""
    lines = (PLANTS[plant] if plant else "").format(at=AT)
    code = "\n".join(["import os, signal, sys", "def kill():",
                      "    os.kill(os.getpid(), signal.SIGKILL)",
                      *(line.removeprefix(" " * 8) for line in lines.splitlines()),
                      "from jspec.cli import main", "sys.exit(main(sys.argv[1:]))"])
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT,
                          env=os.environ | environment, stdout=subprocess.DEVNULL,
                          timeout=500).returncode


READ = {
    "tensorboard": tensorboard_rewards,
    "mlflow": lambda run: reading.mlflow_rewards(run, "jspec"),
    "wandb": lambda run: [(row["step"], row["reward"]) for row in reading.wandb_rows(run)],
    "trackio": lambda run: [(log["step"], log["reward"])
                            for log in reading.trackio_logs(run, "jspec")],
}
"""The steps that a logger has, each with its reward."""


def training(directory, *overrides):
    return ["train", "configs/tiny.yaml", *SMALL, *EVERY, f"output_dir={directory}", *overrides]


@pytest.mark.slow
@pytest.mark.parametrize("plant", ["record", "samples", *LOGGERS, "checkpoint"])
def test_sigkill_while_something_is_written(whole, tmp_path, plant):
    loggers = [plant] if plant in LOGGERS else []
    if loggers and not importlib.util.find_spec(LOGGERS[plant][0]):
        pytest.skip("not installed")
    command = training(tmp_path, f"logging.loggers=[{','.join(loggers)}]")
    away = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "loggers" / "trackio")}
    assert run(*command, plant=plant, **away) == -signal.SIGKILL
    assert has_checkpoints(tmp_path)
    assert run(*command, **away) == 0
    assert records(tmp_path) == records(whole)
    if plant in READ:
        want = [(record["step"], pytest.approx(record["reward"])) for record in records(whole)]
        assert READ[plant](tmp_path) == want


def tree(directory):
    """Every file below a directory, by what is in it."""
    return {path.relative_to(directory): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(Path(directory).rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_sigkill_during_an_export(whole, tmp_path):
    """The run is as it was, its export is there only once it is whole, and both go on."""
    assert run(*training(tmp_path / "run", "steps=2")) == 0
    before = tree(tmp_path / "run")
    for source in (tmp_path / "run", f"{tmp_path}/run@best"):
        assert run("export", source, tmp_path / "out", plant="export") == -signal.SIGKILL
    assert tree(tmp_path / "run") == before and not (tmp_path / "out").exists()
    with pytest.raises(InputError):
        hub.load(str(tmp_path / "out"))
    assert len(list(tmp_path.iterdir())) == 2  # of two kills, what the second left
    assert run("export", tmp_path / "run", tmp_path / "out") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "again")]) == 0
    assert tree(tmp_path / "again") == tree(tmp_path / "out")
    assert run(*training(tmp_path / "run")) == 0
    assert records(tmp_path / "run") == records(whole)
