"""What each logger is given, what it takes back, and that none of them stops a run."""

import importlib
import json
import sys
import types
from pathlib import Path

import pytest

from jspec.choices import LOGGERS
from jspec.errors import InputError
from jspec.loggers import Loggers, RunCard, check_installed
from jspec.loggers.base import Entry, plain_names
from jspec.run_files import write_samples
from tests.loggers.reading import (
    mlflow_rewards,
    mlflow_run,
    tensorboard_values,
    trackio_logs,
    wandb_folder,
    wandb_rows,
)

TIME = "2026-11-28T05:00:00+00:00"


def record(step, **more):
    return {"step": step, "reward": step / 10, "eval/pass@4": 0.5, "loss": None, "ks": [3, 7],
            "text": "x", "time": TIME, **more}


def card(directory, **config):
    directory.mkdir(exist_ok=True)
    return RunCard(directory, "project", "name", {"steps": 3, **config})


def sample(step, response="4"):
    return {"step": step, "sample": 0, "prompt": "2+2=", "response": response, "answer": "4",
            "reward": 1.0, "rewards": {"right": 1.0, "short": None}, "length": 2, "finished": True,
            "cycles": 1, "accepted": 1}


class Fake:
    """A logger that has what it was given, and fails at some steps."""

    def __init__(self, fail=(), held=None):
        self.fail, self.steps, self.opened, self.taken_back = set(fail), [], [], held

    def __call__(self, card, done):
        self.opened.append(done)
        if "open" in self.fail:
            raise OSError(28, "No space left on device")
        self.steps = [step for step in self.steps if step <= done]
        self.held = self.steps[-1] if self.steps else -1
        return self

    def write(self, entry):
        if entry.step in self.fail:
            raise RuntimeError("the server is away")
        self.steps.append(entry.step)

    def close(self):
        pass


@pytest.fixture
def fake(monkeypatch):
    def install(**options):
        made = Fake(**options)
        monkeypatch.setitem(sys.modules, "jspec.loggers.tensorboard",
                            types.SimpleNamespace(open_logger=made))
        return made

    return install


def test_names_for_those_that_refuse_them():
    names = ["pass@4", "kl(k1)", "reward/my check", "reward/my_check", "a//../b", "é" * 300, "ok"]
    assert plain_names(names) == ["pass_at_4", "kl_k1", "reward/my_check", "reward/my_check_2",
                                  "a/_/_/b", "_", "ok"]
    assert len(plain_names(["a" * 300])[0]) <= 250


def test_what_is_no_finite_number_is_left_out(tmp_path):
    entry = Entry.of(record(1, fine=True), tmp_path)
    assert entry.scalars == {"step": 1, "reward": 0.1, "eval/pass@4": 0.5, "ks/1": 3, "ks/2": 7,
                             "fine": True}
    assert entry.plain()["eval/pass_at_4"] == 0.5 and entry.time == 1795842000.0


def test_a_logger_is_given_what_it_lacks(tmp_path, fake):
    made = fake()
    loggers = Loggers(["tensorboard"], card(tmp_path), [record(1), record(2)], 2)  # chosen late
    loggers.write(record(3))
    assert made.steps == [1, 2, 3]
    Loggers(["tensorboard"], card(tmp_path), [record(1)], 1).write(record(2))  # back to step 1
    assert made.steps == [1, 2] and made.opened == [2, 1]


def test_a_logger_that_fails_stops_nothing_and_loses_nothing(tmp_path, fake, caplog):
    made = fake(fail=[2])
    loggers = Loggers(["tensorboard"], card(tmp_path), [], 0)
    for step in range(1, 4):
        loggers.write(record(step))
    assert made.steps == [1] and caplog.text.count("tensorboard has failed") == 1
    assert "RuntimeError: the server is away" in caplog.text
    made.fail = set()
    loggers.write(record(4))
    assert made.steps == [1, 2, 3, 4] and "has been given what it lacked" in caplog.text


def test_one_that_does_not_open_is_refused_before_the_first_step_alone(tmp_path, fake, caplog):
    fake(fail=["open"])
    with pytest.raises(InputError, match="logging.loggers: tensorboard cannot be opened: OSError: "
                       ".*No space left on device; mend that, or leave it out"):
        Loggers(["tensorboard"], card(tmp_path), [], 0)
    Loggers(["tensorboard"], card(tmp_path), [record(1)], 1).write(record(2))
    assert caplog.text.count("has failed") == 1


def test_a_logger_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"wandb needs the package wandb, which is not installed: "
                       r"pip install -e '\.\[wandb\]'"):
        check_installed(["wandb"])


def test_the_id_of_a_run_stays(tmp_path):
    assert card(tmp_path).id == card(tmp_path).id != card(tmp_path / "other").id


def test_tensorboard_has_every_step_once_and_samples_as_text(tmp_path):
    write_samples(tmp_path, 2, [sample(2, "<b>*4*</b>\n# head")])
    loggers = Loggers(["tensorboard"], card(tmp_path), [], 0)
    for step in (1, 2, 3):
        loggers.write(record(step))
    loggers.close()
    (first,) = (tmp_path / "tensorboard").iterdir()
    first.write_bytes(first.read_bytes()[:-5])  # killed while it wrote
    Loggers(["tensorboard"], card(tmp_path), [record(step) for step in (1, 2, 3)], 3).close()
    shown = tensorboard_values(tmp_path)
    assert [step for step, tag in shown if tag == "reward"] == [1, 2, 3]
    assert shown[3, "eval/pass_at_4"].simple_value == 0.5
    text = shown[2, "samples/text_summary"].tensor.string_val[0].decode()
    assert "    response: <b>*4*</b>\n    # head\n" in text
    assert "rewards: right 1, short -" in text
    assert all(line.startswith("    ") for line in text.splitlines())


@pytest.fixture
def real(monkeypatch, tmp_path):
    """A logger's own library, with nothing of this machine's settings."""
    def opened(name):
        pytest.importorskip(LOGGERS[name][0])
        for key in ("WANDB_MODE", "WANDB_DIR", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
            monkeypatch.delenv(key, raising=False)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "loggers" / "trackio"))
        write_samples(tmp_path, 1, [sample(1)])
        loggers = Loggers([name], card(tmp_path, lr=1), [], 0)
        for step in (1, 2, 3):
            loggers.write(record(step))
        loggers.close()
        loggers = Loggers([name], card(tmp_path, lr=2), [record(1), record(2)], 2)
        loggers.write(record(3, reward=0.9))
        loggers.close()
        return tmp_path

    return opened


def test_wandb_itself(real):
    run = real("wandb")
    steps = [(row["step"], row["reward"], row["eval/pass@4"]) for row in wandb_rows(run)]
    assert steps == [(1, 0.1, 0.5), (2, 0.2, 0.5), (3, 0.9, 0.5)]
    (table,) = wandb_folder(run).glob("files/media/table/*.json")
    assert json.loads(table.read_text())["data"][0][1:4] == ["2+2=", "4", "4"]


def test_mlflow_itself(real):
    run = real("mlflow")
    client, found = mlflow_run(run, "project")
    assert mlflow_rewards(run, "project") == [(1, 0.1), (2, 0.2), (3, 0.9)]
    assert found.data.metrics["reward"] == 0.9 and found.data.metrics["eval/pass_at_4"] == 0.5
    assert found.data.params["lr"] == "1" and found.data.tags["lr"] == "2"
    (artifact,) = client.list_artifacts(found.info.run_id, "samples")
    assert artifact.path == "samples/000001.json"


def test_trackio_itself(real):
    logs = trackio_logs(real("trackio"), "project")
    assert [(log["step"], log["reward"]) for log in logs] == [(1, 0.1), (2, 0.2), (3, 0.9)]
    assert logs[0]["samples"]["_value"][0]["response"] == "4"


class Library(types.ModuleType):
    """A library's place holder that remembers what is called."""

    def __init__(self, name, **values):
        super().__init__(name)
        self.calls = []
        self.__dict__.update(values)


def use(monkeypatch, logger, **modules):
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    name = f"jspec.loggers.{logger}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


@pytest.mark.parametrize("key, mode", [(True, "online"), (False, "offline")])
def test_wandb_is_online_where_there_is_a_key(monkeypatch, tmp_path, key, mode):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    logged, given = [], {}
    run = types.SimpleNamespace(starting_step=3, config=types.SimpleNamespace(
        update=lambda values, allow_val_change: given.update(config=values)),
        log=lambda values, **options: logged.append((values, options)), finish=lambda: None,
        dir=str(tmp_path / "wandb/offline-run-2-x/files"))
    library = Library("wandb", login=lambda **options: key, Settings=lambda **options: None,
                      init=lambda **options: given.update(options) or run,
                      Table=lambda columns, data: (columns, data))
    opened = use(monkeypatch, "wandb", wandb=library).open_logger(card(tmp_path), 2)
    assert given["mode"] == mode and given["resume"] == ("allow" if key else None)
    assert given["id"] == card(tmp_path).id and given["config"] == {"steps": 3}
    assert opened.held == 2  # what the server has
    write_samples(tmp_path, 3, [sample(3)])
    opened.write(Entry.of(record(3), tmp_path))
    ((values, options),) = logged
    assert values["eval/pass@4"] == 0.5 and "loss" not in values and options["step"] == 3
    assert values["samples"][1][0][2] == "4"


def test_every_logger_has_an_extra_and_a_file():
    import tomllib

    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    for name, (_, extra) in LOGGERS.items():
        assert (root / "jspec" / "loggers" / f"{name}.py").is_file()
        assert not extra or extra in project["optional-dependencies"]
