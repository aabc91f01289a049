"""The folder of a command's results: nothing of an earlier run is mixed in, and nothing is left where nothing came."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parasolver_cli.terminal import as_json

RECORD = "result.json"


def check_folder(folder: Path, overwrite: bool = False) -> None:
    """Refuse a folder that cannot be written to, or that holds an earlier run; nothing is made yet.

    Raises:
        ValueError: with the reason.
    """
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror or error}") from error
    if (folder / RECORD).exists() and not overwrite:
        raise ValueError(f"{folder} holds an earlier run; give another folder, or --overwrite to replace it")


@contextmanager
def prepared(folder: Path) -> Iterator[Path]:
    """The folder, made and without the files of an earlier run; removed if it was made here and stays empty."""
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    _remove_earlier(folder)
    try:
        yield folder
    finally:
        if made and not any(folder.iterdir()):
            folder.rmdir()


def write_record(folder: Path, record: dict[str, Any], files: Sequence[str]) -> dict[str, Any]:
    """Write ``result.json`` in one go, with the names of the files beside it, by which they can be removed."""
    record = record | {"files": [*files]}
    unfinished = folder / f".{RECORD}.{os.getpid()}"
    unfinished.write_text(as_json(record) + "\n")
    unfinished.replace(folder / RECORD)
    return record


def _remove_earlier(folder: Path) -> None:
    """Only what an earlier run says that it wrote here."""
    try:
        names = json.loads((folder / RECORD).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        names = []
    for name in [*names, RECORD]:
        file = folder / str(name)
        if file.parent == folder and file.is_file():
            file.unlink()
