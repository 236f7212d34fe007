"""What a run leaves to be read: metrics.jsonl, a record a step, and the samples of each step. Free
of anything that computes."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jspec.errors import InputError
from jspec.hub.json_io import parse_json

log = logging.getLogger(__name__)

METRICS, SAMPLES = "metrics.jsonl", "samples"
"""In the output_dir: the file of all records, and the folder with a file of samples for a step."""

TIMINGS = ("seconds/", "tokens_per_second", "compilations")
"""Prefixes of the fields that differ, as `time` does, between two runs of the same thing; all
others are equal."""

Sample = dict[str, Any]
"""One answer of a step, as `jspec.step_record.samples` has it."""


def untimed(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what may differ between two runs of the same thing."""
    return {key: value
            for key, value in record.items() if key != "time" and not key.startswith(TIMINGS)}


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order; none if there is no such file. Lines that are no
    records are left out: a last one that a crash cut short, and others with a warning. Raises
    InputError if it cannot be read."""
    path, records = Path(path), []
    if not path.exists():
        return records
    try:
        if not path.is_file():
            raise InputError(f"{path} is no file, and metrics are written there; move it away")
        *lines, unended = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    for number, text in enumerate((*lines, unended), start=1):
        try:
            if text.strip():
                records.append(_record(text, f"{path}:{number}"))
        except InputError as error:
            if number <= len(lines):
                log.warning("%s: left out", error)
    return records


def _record(text: bytes, where: str) -> dict[str, Any]:
    record = parse_json(text, where)
    if type(record.get("step")) is not int:
        raise InputError(f"{where}: no record of a step: it has no whole number 'step'")
    return record


def keep_steps(path: Path, steps: int) -> list[dict[str, Any]]:
    """Cut a metrics.jsonl back to its first `steps` steps, in one move, and return their records;
    with them what an evaluation before the first step wrote as step 0, which no start without a
    checkpoint keeps."""
    records = [record for record in read_records(path) if record["step"] <= steps and steps]
    if path.exists():
        shorter = path.with_suffix(".tmp")
        shorter.write_text("".join(json.dumps(record) + "\n" for record in records),
                           encoding="utf-8")
        os.replace(shorter, path)
    return records


def write_samples(directory: Path, step: int, samples: Sequence[Sample]) -> None:
    """Write a step's samples, a line each; without any there is no file."""
    if samples:
        (directory / SAMPLES).mkdir(exist_ok=True)
        text = "".join(json.dumps(sample) + "\n" for sample in samples)
        _samples_file(directory, step).write_text(text, encoding="utf-8")


def read_samples(directory: Path, step: int) -> list[Sample]:
    """The samples of a step, in order; lines that are none are left out, as in `read_records`."""
    return read_records(_samples_file(directory, step))


def steps_with_samples(directory: Path) -> list[int]:
    """The steps of which there are samples, ascending."""
    names = (re.fullmatch(r"(\d+)\.jsonl", path.name) for path in (directory / SAMPLES).glob("*"))
    return sorted(int(name[1]) for name in names if name)


def keep_samples(directory: Path, steps: int) -> None:
    """Remove the samples of what came after the first `steps` steps."""
    for step in steps_with_samples(directory):
        if step > steps:
            _samples_file(directory, step).unlink()


def _samples_file(directory: Path, step: int) -> Path:
    return directory / SAMPLES / f"{step:06d}.jsonl"
