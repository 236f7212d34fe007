"""TensorBoard: event files in output_dir/tensorboard."""

from __future__ import annotations

import os
from pathlib import Path

from jspec.loggers.base import Entry, RunCard


class TensorBoard:
    """Writes events as they come: tensorboardX's own SummaryWriter hangs on a full disk."""

    def __init__(self, card: RunCard, done: int) -> None:
        """What earlier files say of steps after `done` is shown no more; nor is the last step that
        they have, for it may not be whole, and is written again."""
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        directory = card.directory / "tensorboard"
        directory.mkdir(exist_ok=True)
        self.events, self.summary = event_pb2, summary
        files = sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        self.held = min(done, max(map(self.last_step, files[-1:]), default=-1) - 1)
        self.writer = event_file_writer.EventsWriter(str(directory / "events"),
                                                     f".{os.getpid()}.{len(files)}")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self.writer.write_event(event_pb2.Event(step=self.held + 1, session_log=start))

    def last_step(self, path: Path) -> int:
        """Of the last whole event in a file: TFRecords, a length, its checksum, data and theirs."""
        data, at, last = path.read_bytes(), 0, b""
        while (end := at + 16 + int.from_bytes(data[at:at + 8], "little")) <= len(data):
            last, at = data[at + 12:end - 4], end
        return self.events.Event.FromString(last).step

    def write(self, entry: Entry) -> None:
        summaries = [self.summary.scalar(name, value) for name, value in entry.plain().items()]
        if entry.samples:
            summaries.append(self.summary.text("samples", _markdown(entry)))
        for summary in summaries:
            self.writer.write_event(self.events.Event(wall_time=entry.time, step=entry.step,
                                                      summary=summary))
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def _markdown(entry: Entry) -> str:
    """The samples for TensorBoard's texts. All is indented, so that nothing of it is markup."""
    lines = [f"{name}: {'' if value is None else value}" for row in entry.rows()
             for name, value in (*zip(entry.columns(), row, strict=True), ("", ""))]
    return "\n".join(f"    {line}" for line in "\n".join(lines).splitlines())


open_logger = TensorBoard
