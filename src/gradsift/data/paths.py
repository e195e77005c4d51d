"""The files that `data.path` names: a file, a list, a pattern, a folder of shards, or standard input."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from gradsift.data.examples import SourceRow
from gradsift.data.files import SUFFIXES, file_kind, read_rows
from gradsift.errors import DataError

STANDARD_INPUT = "-"
_PATTERN_CHARACTERS = "*?["


def files_of(paths: str | Sequence[str], downloads: Path, group: str = "data") -> list[Path]:
    """Return the files that `data.path` names, in the order in which their rows are numbered.

    A folder must be written by `datasets.save_to_disk`, or hold shards of one type, which are read in the order of
    their names.

    Args:
        paths: one or several of: a file, a folder, a pattern as in `folder/*.jsonl`, `-` for standard input.
        downloads: the folder for a copy of standard input.
        group: group of the option that names the files, for errors.

    Raises:
        DataError: a file does not exist, is of an unknown type or is named twice, or a folder holds several types.
    """
    files: list[Path] = []
    for path in [paths] if isinstance(paths, str) else paths:
        files += _files_of(path, downloads, group)
    for file in files:
        file_kind(file, group)  # raises if its type is unknown
    if repeated := next((file for place, file in enumerate(files) if file in files[:place]), None):
        raise DataError(f"{group}.path names {repeated} twice; name each file once")
    return files


def require_files(paths: str | Sequence[str], group: str = "data") -> None:
    """Raise the DataError that `files_of` would raise; standard input is not read."""
    named = [paths] if isinstance(paths, str) else paths
    files_of([path for path in named if path != STANDARD_INPUT], Path(), group)


def read_files(files: Sequence[Path]) -> Iterator[SourceRow]:
    """Yield the rows of files, numbered across all files. `SourceRow.line` is set only if there is one file."""
    if len(files) == 1:
        yield from read_rows(files[0])
        return
    number = 0
    for file in files:
        for row in read_rows(file):
            yield SourceRow(number, row.content)
            number += 1


def _files_of(path: str, downloads: Path, group: str) -> list[Path]:
    if path == STANDARD_INPUT:
        return [_copy_of_standard_input(downloads)]
    place = Path(path).expanduser()
    if place.is_dir():
        return _files_in(place, group)
    if place.exists() or not any(character in path for character in _PATTERN_CHARACTERS):
        return [place]
    root = place.anchor or "."
    files = sorted(file for file in Path(root).glob(str(place.relative_to(place.anchor))) if file.is_file())
    if not files:
        raise DataError(f"{group}.path={path}: no file has such a name; check the pattern (now in {Path.cwd()})")
    return files


def _files_in(folder: Path, group: str) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(each.name for each in folder.iterdir() if (each / "state.json").is_file()))
        raise DataError(f"{group}.path={folder} holds several splits; name the folder of one: {splits}")
    if (folder / "state.json").is_file():
        return _saved_files(folder)
    files = sorted(
        each
        for each in folder.iterdir()
        if each.is_file() and each.name.lower().endswith(SUFFIXES) and each.name[0] != "."
    )
    kinds = sorted({file_kind(file) for file in files})
    if len(kinds) != 1:
        content = f"files of the types {', '.join(kinds)}" if kinds else "no file of a known type"
        raise DataError(
            f"{group}.path={folder} is a folder with {content}; give a pattern for the files that hold the rows, as in "
            f"{group}.path='{folder}/*.{kinds[0] if kinds else 'jsonl'}'"
        )
    return files


def _saved_files(folder: Path) -> list[Path]:
    """Return the data files in a folder that `datasets.save_to_disk` wrote."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [each["filename"] for each in state["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{folder / 'state.json'} is not as datasets.save_to_disk writes it ({error!r})") from error
    return [folder / Path(name).name for name in names]


def _copy_of_standard_input(downloads: Path) -> Path:
    content = _standard_input()
    if not content.strip():
        raise DataError("data.path=- reads standard input, which holds no row; pipe JSON rows into the command")
    name = f"stdin-{hashlib.sha256(content).hexdigest()[:16]}.json"
    copy = downloads / name
    if not copy.is_file():
        downloads.mkdir(parents=True, exist_ok=True)
        part = copy.with_suffix(".part")
        part.write_bytes(content)
        part.replace(copy)
    return copy


@functools.cache  # standard input can be read only once, and every job of a sweep in this process needs it
def _standard_input() -> bytes:
    return sys.stdin.buffer.read()
