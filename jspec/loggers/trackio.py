"""trackio: a database in TRACKIO_DIR, or in the output_dir, that `trackio show` reads."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout

from jspec.loggers.base import Entry, RunCard


class Trackio:
    """A run of trackio. Its library writes within seconds, in the background, and has no flush."""

    def __init__(self, card: RunCard, done: int) -> None:
        """A run that has more than `done` steps is removed: all of them are written again."""
        os.environ.setdefault("TRACKIO_DIR", str(card.store("trackio").absolute()))
        import trackio  # where to is asked for when it is imported
        from trackio.sqlite_storage import SQLiteStorage

        name = f"{card.name}-{card.id}"  # trackio knows runs by their names
        last = SQLiteStorage.get_last_step(card.project, name)
        self.held = -1 if last is None else last
        if self.held > done:
            SQLiteStorage.delete_run(card.project, name)
            self.held = -1
        self.trackio = trackio
        with redirect_stdout(io.StringIO()):  # jspec's has a line a step
            self.run = trackio.init(project=card.project, name=name, config=dict(card.config),
                                    resume="allow", embed=False)

    def write(self, entry: Entry) -> None:
        import pandas

        # a name of trackio's own
        values = {name: value for name, value in entry.scalars.items() if name != "step"}
        if entry.samples:
            values["samples"] = self.trackio.Table(
                dataframe=pandas.DataFrame(entry.rows(), columns=entry.columns()))
        self.run.log(values, step=entry.step)

    def close(self) -> None:
        with redirect_stdout(io.StringIO()):
            self.trackio.finish()


open_logger = Trackio
