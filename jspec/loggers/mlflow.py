"""MLflow: the server of MLFLOW_TRACKING_URI, or a database in the output_dir."""

from __future__ import annotations

import logging
import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

from jspec.loggers.base import Entry, RunCard

ID = "jspec.run"
"""The tag by which a run is found again."""
MOST = 100
"""Parameters or tags of one request."""
SQLITE = "sqlite:///"
LONGEST_VALUE = 5000  # in characters


class Mlflow:
    """A run of MLflow; every call is committed."""

    def __init__(self, card: RunCard, done: int) -> None:
        """In a database of SQLite what came after `done` is removed. A server has no way to: there
        later steps are in the history twice."""
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table it makes
        given = os.environ.get("MLFLOW_TRACKING_URI")
        uri = given or f"{SQLITE}{card.store('mlflow').absolute() / 'mlflow.db'}"
        self.client = MlflowClient(uri)
        run = self.find(card, None if given else card.store("mlflow").absolute() / "artifacts")
        self.run_id = run.info.run_id
        self.client.update_run(self.run_id, status="RUNNING")
        self.configure(run, card)
        if uri.startswith(SQLITE):
            _cut(Path(uri.removeprefix(SQLITE)), self.run_id, done)
        steps = [metric.step for metric in self.client.get_metric_history(self.run_id, "step")]
        self.held = min(done, max(steps, default=-1))

    def find(self, card: RunCard, artifacts: Path | None) -> Run:
        """The run, made if it is not there."""
        experiment = self.client.get_experiment_by_name(card.project)
        number = (experiment.experiment_id if experiment else self.client.create_experiment(
            card.project, artifact_location=artifacts and artifacts.as_uri()))
        found = self.client.search_runs([number], f"tags.`{ID}` = '{card.id}'", max_results=1)
        return found[0] if found else self.client.create_run(number, run_name=card.name,
                                                             tags={ID: card.id})

    def configure(self, run: Run, card: RunCard) -> None:
        """The configuration as parameters. One cannot be changed: what a resumed run changes is a
        tag of the same name."""
        values = {key: str(value)[:LONGEST_VALUE] for key, value in card.config.items()}
        params = run.data.params
        new = [Param(key, value) for key, value in values.items() if key not in params]
        changed = [RunTag(key, value) for key, value in values.items()
                   if params.get(key, value) != value]
        for start in range(0, max(len(new), len(changed)), MOST):
            part = slice(start, start + MOST)
            self.client.log_batch(self.run_id, params=new[part], tags=changed[part])

    def write(self, entry: Entry) -> None:
        if entry.samples:
            # as log_table writes it, but for good: that appends to what is there
            self.client.log_dict(self.run_id, {"columns": entry.columns(), "data": entry.rows()},
                                 f"samples/{entry.step:06d}.json")
        time = int(entry.time * 1000)
        self.client.log_batch(self.run_id, metrics=[Metric(name, value, time, entry.step)
                                                    for name, value in entry.plain().items()])

    def close(self) -> None:
        self.client.set_terminated(self.run_id)


def _cut(database: Path, run: str, done: int) -> None:
    """Remove what a database has of a run's steps after `done`. MLflow itself removes no metric; a
    later database that these words do not fit keeps both."""
    with suppress(sqlite3.Error), closing(sqlite3.connect(database)) as opened, opened:
        opened.execute("DELETE FROM metrics WHERE run_uuid = ? AND step > ?", (run, done))
        opened.execute("DELETE FROM latest_metrics WHERE run_uuid = ?", (run,))
        # of a group's rows the one with the largest step, as SQLite promises
        opened.execute("INSERT INTO latest_metrics (key, value, timestamp, step, is_nan, run_uuid) "
                       "SELECT key, value, timestamp, max(step), is_nan, run_uuid FROM metrics "
                       "WHERE run_uuid = ? GROUP BY key", (run,))


open_logger = Mlflow
