"""A run's folder: whose it is, one run at a time, and what the operating system says of it in one
line."""

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest

from jspec import checksums
from jspec.config import Config
from jspec.draft_config import DraftTrainingConfig
from jspec.errors import InputError
from jspec.output_dir import LOCK, claimed, is_run, written
from jspec.settings import to_yaml


def refused(directory, **options) -> str:
    with pytest.raises(InputError) as error, claimed(directory, **options):
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


def listing(directory):
    return {path.relative_to(directory): path.read_bytes() if path.is_file() else None
            for path in directory.rglob("*")}


def test_the_second_run_in_a_folder_is_refused_and_the_next_one_is_not(tmp_path):
    with claimed(tmp_path / "run"):
        said = refused(tmp_path / "run")
        assert f"process {os.getpid()} on " in said and "choose another output_dir" in said
    with claimed(tmp_path / "run"):  # the lock file is there still, and nobody holds it
        assert (tmp_path / "run" / LOCK).exists() and (tmp_path / "run" / "checkpoints").is_dir()


@pytest.mark.parametrize("name, text", [
    ("config.yaml", "# mine\nsteps: 3\n"), ("config.yaml", to_yaml(Config()) + "# and a note\n"),
    ("metrics.jsonl", "{}\n"), (LOCK, "pid 7\n"), (f"{LOCK}/x", ""),
    ("checkpoints/200/optimizer/state.pt", "weights"),
    ("checkpoints/200/_CHECKPOINT_METADATA", "{}"),
    ("tensorboard/events", "x"), ("broken_checkpoints/1", "x")])
def test_what_is_not_a_runs_own_is_left_alone(tmp_path, name, text):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    before = listing(tmp_path)
    said = refused(tmp_path)
    assert (f"holds {name.split('/')[0]}, which no run of jspec has made" in said
            and f"{tmp_path / 'run'}" in said)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name, text", [
    ("config.yaml", to_yaml(Config())), ("config.yaml", to_yaml(DraftTrainingConfig())),
    ("config.yaml", "seed: 3\nsteps: 4\nof_an_earlier_version: 1\n"), (LOCK, ""),
    (f"checkpoints/4/{checksums.NAME}", "{}"),
    ("checkpoints/4/_CHECKPOINT_METADATA",
     json.dumps({"item_handlers": {"meta": "", "policy": "", "optimizer": ""}}))])
def test_a_run_of_an_earlier_version_is_known_by_what_it_left(tmp_path, name, text):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    assert is_run(tmp_path)
    with claimed(tmp_path):
        pass


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/2/mine", "trace/a"])
def test_what_another_run_removes_is_no_place_for_a_run(tmp_path, name):
    with claimed(tmp_path / "run"):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "run")
    before = listing(tmp_path)
    for way in ("run", "link"):
        assert (f"lies in {tmp_path / 'run' / name.split('/')[0]}, where the run of"
                in refused(tmp_path / way / name))
    assert listing(tmp_path) == before
    with claimed(tmp_path / "run" / "eval"), claimed(tmp_path / "checkpoints" / "mine"):
        pass


def test_other_files_are_in_nobodys_way(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with claimed(tmp_path):
        assert not is_run(tmp_path.parent) and is_run(tmp_path)


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard"])
def test_a_file_where_a_folder_is_needed(tmp_path, name):
    with claimed(tmp_path, folders=()):
        pass
    (tmp_path / name).write_text("x")
    assert f"{tmp_path / name} is a file, and a folder is needed there" in refused(tmp_path)


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    assert "file is no folder" in refused(tmp_path / "file")
    for path in (tmp_path / "file" / "run", "/proc/jspec/run"):
        said = refused(path)
        assert (f"output_dir={path} cannot be written to" in said
                and "choose another output_dir" in said)


def test_a_full_disk_is_found_before_the_first_step(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "cannot be written to: No space left on device; make room" in refused(tmp_path)
    monkeypatch.undo()
    with claimed(tmp_path):  # what was refused holds no lock
        pass


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch, caplog):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with claimed(tmp_path):
        assert "file system without locks" in caplog.text


def test_a_link_to_nothing_is_named(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match="is a link to .*gone, which is not there"):
        with written(tmp_path / "run"):
            (tmp_path / "run").mkdir(parents=True, exist_ok=True)
