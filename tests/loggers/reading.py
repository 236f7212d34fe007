"""What each logger has of a run, as its own library or format reads it."""

import json
import os
import subprocess
import sys


def tfrecord_events(path):
    """The whole events of a file: a length, its checksum, data and theirs."""
    from tensorboardX.proto import event_pb2

    data, at = path.read_bytes(), 0
    while (end := at + 16 + int.from_bytes(data[at:at + 8], "little")) <= len(data):
        yield event_pb2.Event.FromString(data[at + 12:end - 4])
        at = end


def tensorboard_values(run):
    """What TensorBoard shows: summaries by step and tag."""
    shown = {}
    for path in sorted((run / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        for event in tfrecord_events(path):
            if event.HasField("session_log"):  # purges what came before it
                shown = {key: value for key, value in shown.items() if key[0] < event.step}
            for value in event.summary.value:
                shown[event.step, value.tag] = value
    return shown


def leveldb_records(data):
    """Of W&B's file: 7 bytes, then LevelDB's log, whose records lie in blocks of 32 KiB."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4:at + 6], "little"), data[at + 6]
        whole += data[at + 7:at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole one, or the last part of one
            yield whole
            whole = b""


def wandb_folder(run):
    (folder,) = run.glob("loggers/wandb/wandb/offline-run-*")
    return folder


def wandb_rows(run):
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = wandb_folder(run).glob("*.wandb")
    for data in leveldb_records(path.read_bytes()):
        items = Record.FromString(data).history.item
        if items:
            yield {"/".join(item.nested_key) or item.key: json.loads(item.value_json)
                   for item in items}


def mlflow_run(run, project):
    """(client, the one run of the project)."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run}/loggers/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name(project).experiment_id
    (found,) = client.search_runs([experiment])
    return client, found


def mlflow_rewards(run, project):
    client, found = mlflow_run(run, project)
    return [(metric.step, metric.value)
            for metric in client.get_metric_history(found.info.run_id, "reward")]


def trackio_logs(run, project):
    """Of its one run. Its library asks where to look when it is imported: once a process."""
    code = f"""import json
from trackio.sqlite_storage import SQLiteStorage
(name,) = SQLiteStorage.get_runs({project!r})
print(json.dumps(SQLiteStorage.get_logs({project!r}, name)))
"""
    away = os.environ | {"TRACKIO_DIR": str(run / "loggers" / "trackio")}
    return json.loads(subprocess.run([sys.executable, "-c", code], env=away, text=True, check=True,
                                     stdout=subprocess.PIPE).stdout)
