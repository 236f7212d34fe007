"""Rows of parquet files and of data sets that Hugging Face's `datasets` saved, read by pyarrow.

Not by `datasets` itself: it takes splits from the names of files, and turns texts that look like
JSON or dates into values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from jspec.errors import InputError, shortened
from jspec.hub.json_io import read_json
from jspec.rl.columns import section_of

SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.parquet")
"""What the hub calls the shards of a split."""
ROWS = 1024
"""Read at a time."""


def pyarrow() -> ModuleType:
    try:
        import pyarrow
    except ImportError as error:
        raise InputError(f"parquet files and data sets are read by pyarrow, which is not installed "
                         f"({error}); run: pip install -e '.[data]'") from error
    return pyarrow


def rows(path: Path, split: str | None, setting: str) -> Iterator[
        tuple[dict[str, Any], Path, int]]:
    """The rows of a parquet file or of a folder, with each one's file and its number there.

    Args:
        path: a .parquet file, or a folder: of such files, or as `save_to_disk` writes a Dataset or
            a DatasetDict.
        split: of a folder with several; None: "train", or the only one.
        setting: what named the path, for errors.

    Raises InputError for a folder that is no data set, a split that is not there, and a file that
    cannot be read.
    """
    for file in files_of(path, split, setting):
        table = read_table(file, setting)
        decoders = [(name, make) for name, kind in
                    zip(table.column_names, table.schema.types, strict=True)
                    if (make := decoder(kind))]
        number = 0
        for batch in table.to_batches(max_chunksize=ROWS):
            for row in batch.to_pylist():
                number += 1
                yield row | {name: make(row[name]) for name, make in decoders}, file, number


def files_of(path: Path, split: str | None, setting: str) -> list[Path]:
    """The files of a data set, in order; arguments and errors are those of `rows`."""
    if path.suffix == ".parquet" and not path.is_dir():
        return [path]
    if (path / "dataset_dict.json").exists():
        splits = read_json(path / "dataset_dict.json").get("splits")
        if not isinstance(splits, list):
            raise InputError(f"{path}/dataset_dict.json names no splits; save the data set again")
        path, split = path / chosen(path, list(map(str, splits)), split, setting), None
    if (path / "state.json").exists():
        no_split(path, split, setting)
        files = read_json(path / "state.json").get("_data_files")
        if not isinstance(files, list) or not all(
                isinstance(file, dict) and isinstance(file.get("filename"), str) for file in files):
            raise InputError(f"{path}/state.json names no files; save the data set again")
        return [path / file["filename"] for file in files]
    files = sorted(path.glob("*.parquet")) or sorted((path / "data").glob("*.parquet"))
    if not files:
        raise InputError(f"{setting}={path} is a folder without a data set: neither .parquet files "
                         "nor what datasets' save_to_disk writes are in it")
    return shards(path, files, split, setting)


def shards(path: Path, files: list[Path], split: str | None, setting: str) -> list[Path]:
    """Those of a folder's parquet files that are of the split."""
    named = [match for file in files if (match := SHARD.fullmatch(file.name))]
    if not named:
        no_split(path, split, setting)
        return files
    if len(named) < len(files):
        strange = next(file.name for file in files if not SHARD.fullmatch(file.name))
        raise InputError(f"{path}: {named[0][0]} names a split and {strange} names none; put them "
                         "into folders of their own")
    split = chosen(path, list(dict.fromkeys(match["split"] for match in named)), split, setting)
    mine = [match for match in named if match["split"] == split]
    if len(mine) != int(mine[0]["count"]):
        raise InputError(f"{path}: the split {split!r} is of {int(mine[0]['count'])} files, and "
                         f"{len(mine)} are there; fetch the others")
    return [file for file in files if SHARD.fullmatch(file.name)["split"] == split]


def chosen(path: Path, splits: list[str], split: str | None, setting: str) -> str:
    """The split to read. Raises InputError if it is not there, or it is not clear which one."""
    wanted = split or (splits[0] if len(splits) == 1 else "train")
    if wanted not in splits:
        has = f"{path} has the splits {shortened(', '.join(map(repr, splits))) or 'of nothing'}"
        raise InputError(f"{has}, and no {split!r}" if split else
                         f"{has}; choose one ({split_of(setting)})")
    return wanted


def no_split(path: Path, split: str | None, setting: str) -> None:
    if split:
        raise InputError(f"{path} has no splits, and so no {split!r}; leave {split_of(setting)} "
                         "out")


def split_of(setting: str) -> str:
    """The setting that chooses a split of what `setting` names."""
    return "evaluation.split" if setting == "evaluation.sources" else (
        f"{section_of(setting)}.split")


def read_table(path: Path, setting: str) -> Any:
    """The table of a file. Raises InputError for one that cannot be read."""
    pa = pyarrow()
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for without end
            raise InputError(f"cannot read the prompts {path}: it is not a file; check {setting}")
        if path.suffix == ".parquet":
            from pyarrow import parquet

            return parquet.ParquetFile(path).read()
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            return stream.read_all()
    except FileNotFoundError as error:
        raise InputError(f"cannot read the prompts {path}: No such file or directory; check "
                         f"{setting}") from error
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read the prompts {path}: {shortened(str(error), 200)}; check "
                         f"{setting}") from error


def decoder(kind: Any) -> Any:
    """What makes a column's values of what pyarrow has: `datasets` keeps values of no one type as
    JSON, which is text here. None: nothing is to be done."""
    pa = pyarrow()
    if getattr(kind, "extension_name", "") == "arrow.json":
        return lambda value: None if value is None else json.loads(value)
    if pa.types.is_struct(kind):
        inside = {field.name: make for field in kind if (make := decoder(field.type))}
        return (lambda value: None if value is None else value | {
            name: make(value[name]) for name, make in inside.items()}) if inside else None
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        make = decoder(kind.value_type)
        return make and (lambda value: None if value is None else [make(part) for part in value])
    return None
