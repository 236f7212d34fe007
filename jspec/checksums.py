"""Checksums of the files in a folder's folders: written when they are whole, compared before they
are believed."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

from jspec.errors import InputError
from jspec.hub.json_io import read_json

NAME = "jspec_checksums.json"
CHUNK = 1 << 24


def write(folder: Path) -> None:
    """Write NAME into `folder`, in one move: how many bytes each file in its folders has, and their
    CRC-32."""
    paths = sorted(path for path in folder.glob("*/**/*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): _sum(path) for path in paths}
    work = folder / f".{NAME}"
    work.write_text(json.dumps(sums))
    os.replace(work, folder / NAME)


def known(folder: Path) -> bool:
    """Whether `folder` has checksums."""
    return (folder / NAME).exists()


def damage(folder: Path, items: Sequence[str] | None = None) -> str:
    """What is not as it was written, of a folder that has checksums; "" if all is.

    items: names of the folders in `folder` to look at; None: all there are.
    """
    try:
        sums = read_json(folder / NAME)
        if not sums:
            return f"{NAME} names no file"
        for name, written in sums.items():
            if items is None or name.split("/")[0] in items:
                if _sum(folder / name) != written:
                    return f"{name} is not what was written there"
    except InputError as error:
        return str(error)
    except OSError as error:
        return f"{name}: {error.strerror}"
    return ""


def _sum(path: Path) -> list[int]:
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return [size, crc]
