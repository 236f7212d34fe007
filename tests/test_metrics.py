"""What is written of a run, and what is taken back when it is resumed."""

import datetime
import io
import json

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from jspec import metrics
from jspec.clock import Clock, CompileSeconds
from jspec.errors import InputError
from jspec.metrics import Metrics, acceptance_alarm, read_records, untimed
from jspec.run_files import read_samples, steps_with_samples
from tests.loggers.reading import tfrecord_events


def record(step, **more):
    return {"step": step, "reward": 0.5, "length": 3.0, "finished": 1.0, "tokens_per_second": 10.0,
            "acceptance_length": 2.0, "acceptance": 0.5, "drafted": 300,
            "acceptance_by_position": [0.6, 0.4], "logprob_gap": 1e-6, "seconds/step": 1.0, **more}


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
        (first,) = read_records(tmp_path / "metrics.jsonl")
        age = (datetime.datetime.now(datetime.UTC)
               - datetime.datetime.fromisoformat(first.pop("time")))
        assert first == record(1) and datetime.timedelta(0) <= age < datetime.timedelta(hours=1)
        opened.write(record(2, loss=float("nan")))
    second = read_records(tmp_path / "metrics.jsonl")[1]
    assert untimed(second) == untimed(record(2, loss=None)) and second["loss"] is None


def test_tensorboard_has_the_scalars_and_forgets_what_was_taken_back(tmp_path):
    from tensorboardX.proto import event_pb2

    write(tmp_path, 0, [1, 2])
    write(tmp_path, 1, [2])
    first, second = sorted((tmp_path / "tensorboard").iterdir(),
                           key=lambda path: path.name.rsplit(".", 1)[1])
    values = {(event.step, value.tag): value.simple_value for event in tfrecord_events(first)
              for value in event.summary.value}
    assert (values[2, "acceptance_by_position/2"] == pytest.approx(0.4) and values[1, "reward"]
            == 0.5)
    (start,) = [event for event in tfrecord_events(second) if event.HasField("session_log")]
    assert start.step == 2 and start.session_log.status == event_pb2.SessionLog.START


def test_resuming_takes_back_what_came_after_the_checkpoint(tmp_path):
    write(tmp_path, 0, range(1, 6))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')  # killed while writing
    write(tmp_path, 3, range(4, 8))
    assert [r["step"] for r in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]


def test_an_evaluation_before_the_first_step_is_no_step(tmp_path):
    """It is written anew by a start from nothing, and kept by one from a checkpoint."""
    for done, steps, kept in ((0, [0, 1], [0, 1]), (0, [0, 1, 2], [0, 1, 2]), (1, [2], [0, 1, 2])):
        out = console()
        with Metrics(tmp_path, done, 9, out) as opened:
            for step in steps:
                scores = {"step": 0, "eval/pass@1": 0.5, "eval/length": 3, "eval/a/pass@1": 1}
                opened.write(record(step) if step else scores)
        assert [r["step"] for r in read_records(tmp_path / "metrics.jsonl")] == kept
        assert [r["step"] for r in opened.records] == kept[1:]
        assert ("evaluation after step 0:  pass@1 0.500\n" in out.file.getvalue()) == (done == 0)
        assert "step 0/9" not in out.file.getvalue()


def test_samples_are_kept_and_taken_back_as_records_are(tmp_path):
    def sample(step, text):
        return {"step": step, "sample": 0, "prompt": "p", "response": text, "reward": 1.0}

    with Metrics(tmp_path, 0, 9, console()) as opened:
        for step in (1, 2, 3):
            opened.write_samples(step, [sample(step, f"é\u2028{step}")] * 2)
            opened.write(record(step))
        opened.write_samples(4, [])
    assert steps_with_samples(tmp_path) == [1, 2, 3]
    assert read_samples(tmp_path, 2) == [sample(2, "é\u20282")] * 2
    (tmp_path / "samples" / "000003.jsonl").write_text('{"step": 3, "resp')  # killed while writing
    write(tmp_path, 2, [])
    assert steps_with_samples(tmp_path) == [1, 2] and read_samples(tmp_path, 3) == []


def test_a_cut_line_ends_the_file_for_its_readers(tmp_path):
    (tmp_path / "m.jsonl").write_text(json.dumps(record(1)) + '\n{"step": 2')
    assert [r["step"] for r in read_records(tmp_path / "m.jsonl")] == [1]
    assert read_records(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("broken",
                         [b'{"step": 2, "rew', b"\xff\xfe", b"[1]", b'{"reward": 1}',
                          b'{"step": "2"}', b'{"step": 2, "x": ' + b"9" * 5000 + b"}", b"[" * 5000])
def test_a_broken_line_costs_no_other_line(tmp_path, broken, caplog):
    lines = [json.dumps(record(1)).encode(), broken, json.dumps(record(3)).encode(), b""]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert [r["step"] for r in read_records(tmp_path / "metrics.jsonl")] == [1, 3]
    assert "metrics.jsonl:2" in caplog.text and "left out" in caplog.text
    write(tmp_path, 3, [4])
    assert [r["step"] for r in read_records(tmp_path / "metrics.jsonl")] == [1, 3, 4]


def test_metrics_that_cannot_be_written_are_one_line(tmp_path):
    (tmp_path / "folder" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(InputError, match="metrics.jsonl is no file"):
        write(tmp_path / "folder", 0, [1])
    opened = Metrics(tmp_path / "full", 0, 3, console())
    opened.file.close()
    opened.file = open("/dev/full", "a")
    with pytest.raises(InputError,
                       match="the metrics of step 1: No space left on device; make room"), opened:
        opened.write(record(1))


def test_only_timings_differ_between_equal_runs():
    left = untimed(record(1, **{"seconds/rollout": 2.0}))
    assert (left == untimed(record(1, **{"seconds/rollout": 5.0, "tokens_per_second": 3.0,
                                         "time": "now"})))
    assert "reward" in left and not any(key.startswith("seconds") for key in left)


@pytest.mark.parametrize("before, now, alarms", [
    ([0.8, 0.8, 0.8], 0.39, True), ([0.8, 0.8, 0.8], 0.41, False), ([0.8, 0.8], 0.0, False),
    ([None, None, None], None, False), ([0.8] * 3, 0.0, True)])
def test_alarm_when_acceptance_falls_under_half_of_its_running_mean(before, now, alarms):
    said = acceptance_alarm([record(i, acceptance=a) for i, a in enumerate(before)],
                            record(9, acceptance=now))
    assert bool(said) == alarms
    assert not alarms or ("step 9" in said and "80.0%" in said)


def test_no_alarm_about_chance():
    assert (acceptance_alarm([record(i, acceptance=0.02) for i in range(9)],
                             record(9, acceptance=0.0)) is None)
    assert acceptance_alarm([record(i, acceptance=0.02) for i in range(9)],
                            record(9, acceptance=0.0, drafted=3000))


def test_the_alarm_is_printed_and_its_mean_survives_a_resume(tmp_path):
    write(tmp_path, 0, range(1, 5))
    out = console()
    with Metrics(tmp_path, 4, 9, out) as opened:
        opened.write(record(5, acceptance=0.1))
    assert "ALARM: acceptance fell to 10.0%" in out.file.getvalue()


def test_lines_and_tables_for_people(tmp_path):
    text = write(tmp_path, 0, range(1, 10))
    assert ("step 9/9" in text and "reward 0.500" in text
            and "2.00 tok/cycle  acceptance 50%" in text)
    assert ("logprob_gap 1.0e-06" in text and not {"reward_failures", "NOT FINITE", "compiling"}
            & set(text.split()))
    bad = metrics.line(record(1, reward_failures=3, draft_skipped_in_row=1, tokens_per_second=None,
                              **{"seconds/compile": 2.5}), 9)
    assert ("reward_failures 3" in bad and "draft NOT FINITE" in bad and "- tok/s" in bad
            and "(compiling 2.5 s)" in bad)
    assert "draft NOT FINITE" in metrics.line(record(1, draft_finite=False), 9)
    plain = metrics.line(record(1) | {"acceptance": None}, 9)  # autoregressive
    assert "tok/cycle" not in plain
    out = console()
    out.print(metrics.table([record(i) for i in range(1, 101)]))
    shown = [line.split()[0] for line in out.file.getvalue().splitlines()
             if line.split() and line.split()[0].isdigit()]
    assert len(shown) == metrics.TABLE_ROWS and shown[0] == "1" and shown[-1] == "100"
    out.print(metrics.table([]))
    columns = {"step", "reward", "length", "finished", "tok/s", "tok/cycle", "acceptance",
               "logprob_gap", "grad_norm", "draft/loss", "seconds"}
    assert columns <= set(out.file.getvalue().split())  # whole, in a log of 120 columns


def test_the_steps_that_compile_are_left_out_of_the_medians():
    def shown(*records):
        out = console()
        out.print(metrics.phase_table(records))
        return out.file.getvalue()

    warm = record(2, **{"seconds/rollout": 3.0, "seconds/update": 1.0, "seconds/compile": 0.0})
    cold = record(1, **{"seconds/rollout": 90.0, "seconds/update": 10.0, "seconds/compile": 80.0})
    assert ("75%" in shown(cold, cold, warm)
            and "of the steps that compiled nothing" in shown(cold, cold, warm))
    assert "90%" in shown(cold) and "compiling included" in shown(cold)


def test_compiling_is_counted_by_phase():
    with CompileSeconds() as compiling:
        clock = Clock(compiling)
        with clock("rollout"):
            jax.jit(lambda x: x * 1.2345 + 6)(jnp.ones(3))
        with clock("update"):
            pass
        assert clock.compiling["rollout"] > 0 == clock.compiling["update"]
        assert (clock.record()["seconds/compile"]
                == pytest.approx(clock.compiling["rollout"], abs=1e-3))
        assert clock.compilations() > 0 == Clock(compiling).compilations()
    before = compiling()
    jax.jit(lambda x: x * 1.2345 + 7)(jnp.ones(3))
    assert compiling() == before


def test_a_process_that_does_not_write_leaves_no_file(tmp_path):
    with Metrics(tmp_path, 0, 2, console(), write=False) as opened:
        opened.write(record(1))
    assert not list(tmp_path.iterdir()) and len(opened.records) == 1


def test_seconds_of_phases_add_up():
    clock = Clock()
    with clock("data"):
        pass
    with clock("data"):
        pass
    fields = clock.record()
    assert set(fields) == {"seconds/data", "seconds/compile", "seconds/step"}
    assert fields["seconds/step"] >= fields["seconds/data"] >= 0
