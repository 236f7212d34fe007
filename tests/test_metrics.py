"""What is written of a run, and what is taken back when it is resumed."""

import io
import json

import pytest
from rich.console import Console

from jspec import metrics
from jspec.metrics import Metrics, acceptance_alarm, read_records, untimed


def record(step, **more):
    return {"step": step, "reward": 0.5, "length": 3.0, "finished": 1.0, "tokens_per_second": 10.0,
            "acceptance_length": 2.0, "acceptance": 0.5, "drafted": 300, "acceptance_by_position": [0.6, 0.4],
            "logprob_gap": 1e-6,
            "seconds/step": 1.0, **more}


def console():
    return Console(file=io.StringIO(), width=120)


def write(directory, done, steps):
    out = console()
    with Metrics(directory, done, 9, out) as opened:
        for step in steps:
            opened.write(record(step))
    return out.file.getvalue()


def test_a_record_a_step_flushed_as_it_is_written(tmp_path):
    with Metrics(tmp_path, 0, 3, console()) as opened:
        opened.write(record(1))
        assert read_records(tmp_path / "metrics.jsonl") == [record(1)]
        opened.write(record(2, loss=float("nan")))
    assert read_records(tmp_path / "metrics.jsonl")[1] == record(2, loss=None)
    assert list((tmp_path / "tensorboard").iterdir())


def test_resuming_takes_back_what_came_after_the_checkpoint(tmp_path):
    write(tmp_path, 0, range(1, 6))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')  # killed while writing
    write(tmp_path, 3, range(4, 8))
    assert [r["step"] for r in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]


def test_a_cut_line_ends_the_file_for_its_readers(tmp_path):
    (tmp_path / "m.jsonl").write_text(json.dumps(record(1)) + '\n{"step": 2')
    assert [r["step"] for r in read_records(tmp_path / "m.jsonl")] == [1]
    assert read_records(tmp_path / "none.jsonl") == []


def test_only_timings_differ_between_equal_runs():
    left = untimed(record(1, **{"seconds/rollout": 2.0}))
    assert left == untimed(record(1, **{"seconds/rollout": 5.0, "tokens_per_second": 3.0}))
    assert "reward" in left and not any(key.startswith("seconds") for key in left)


@pytest.mark.parametrize("before, now, alarms", [
    ([0.8, 0.8, 0.8], 0.39, True), ([0.8, 0.8, 0.8], 0.41, False), ([0.8, 0.8], 0.0, False),
    ([None, None, None], None, False), ([0.8] * 3, 0.0, True)])
def test_alarm_when_acceptance_falls_under_half_of_its_running_mean(before, now, alarms):
    said = acceptance_alarm([record(i, acceptance=a) for i, a in enumerate(before)], record(9, acceptance=now))
    assert bool(said) == alarms
    assert not alarms or ("step 9" in said and "80.0%" in said)


def test_no_alarm_about_chance():
    assert acceptance_alarm([record(i, acceptance=0.02) for i in range(9)], record(9, acceptance=0.0)) is None
    assert acceptance_alarm([record(i, acceptance=0.02) for i in range(9)], record(9, acceptance=0.0, drafted=3000))


def test_the_alarm_is_printed_and_its_mean_survives_a_resume(tmp_path):
    write(tmp_path, 0, range(1, 5))
    out = console()
    with Metrics(tmp_path, 4, 9, out) as opened:
        opened.write(record(5, acceptance=0.1))
    assert "ALARM: acceptance fell to 10.0%" in out.file.getvalue()


def test_lines_and_tables_for_people(tmp_path):
    text = write(tmp_path, 0, range(1, 10))
    assert "step 9/9" in text and "reward 0.500" in text and "2.00 tok/cycle (accepted 50%)" in text
    plain = metrics.line(record(1) | {"acceptance": None}, 9)  # autoregressive
    assert "tok/cycle" not in plain
    out = console()
    out.print(metrics.table([record(i) for i in range(1, 101)]))
    shown = [line.split()[0] for line in out.file.getvalue().splitlines() if line.split() and line.split()[0].isdigit()]
    assert len(shown) == metrics.TABLE_ROWS and shown[0] == "1" and shown[-1] == "100"
    out.print(metrics.table([]))
    out.print(metrics.phase_table([record(1, **{"seconds/rollout": 3.0, "seconds/update": 1.0})]))
    assert "75%" in out.file.getvalue()


def test_a_process_that_does_not_write_leaves_no_file(tmp_path):
    with Metrics(tmp_path, 0, 2, console(), write=False) as opened:
        opened.write(record(1))
    assert not list(tmp_path.iterdir()) and len(opened.records) == 1


def test_seconds_of_phases_add_up():
    clock = metrics.Clock()
    with clock("data"):
        pass
    with clock("data"):
        pass
    fields = clock.record()
    assert set(fields) == {"seconds/data", "seconds/step"} and fields["seconds/step"] >= fields["seconds/data"] >= 0
