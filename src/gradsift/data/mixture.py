"""Sources of rows: local files, hub datasets, and mixtures of several sources with weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gradsift.config import HubDataConfig, JsonDataConfig, MixtureDataConfig, SourceConfig
from gradsift.data import files, hub, paths
from gradsift.data.examples import Example, Rejected, SourceRow, draw
from gradsift.data.formats import parse_rows
from gradsift.errors import ConfigError, DataError
from gradsift.selection.budget import proportional_shares


class RowSource(NamedTuple):
    """A source of rows.

    name      name of the data in errors
    settings  what the rows depend on besides the options that name the source, such as the hash of a file
    read      function that returns the rows
    """

    name: str
    settings: dict[str, Any]
    read: Callable[[], Iterator[SourceRow]]


def row_source(
    config: JsonDataConfig | HubDataConfig | SourceConfig, downloads: Path, group: str = "data"
) -> RowSource:
    """Return the source that a config describes.

    Args:
        downloads: the folder for a copy of standard input.
        group: group of the options that name the source, for errors.

    Raises:
        DataError: a file is missing or of an unknown type.
    """
    path = None if isinstance(config, HubDataConfig) else config.path
    if path is None:
        assert not isinstance(config, JsonDataConfig)  # noqa: S101 - for the type checker
        id, revision, split, subset = config.id or "", config.revision, config.split, config.subset
        first = None
        if isinstance(config, HubDataConfig) and config.streaming:
            first = (config.limit or 0) + config.holdout
        return RowSource(id, {}, lambda: hub.load_hub(id, revision, split, subset, first, group))
    named = paths.files_of(path, downloads, group)
    kinds, hashes = [files.file_kind(file) for file in named], [files.hash_of(file) for file in named]
    one = len(named) == 1
    settings = {"path": None, "kind": kinds[0] if one else kinds, "sha256": hashes[0] if one else hashes}
    return RowSource(path if isinstance(path, str) else ", ".join(path), settings, lambda: paths.read_files(named))


def parse_mixture(config: MixtureDataConfig, sources: Mapping[str, RowSource]) -> tuple[list[Example], list[Rejected]]:
    """Return the examples and the rejected rows of all sources.

    Rows are numbered consecutively across all sources. The column `config.source_column` of `original` holds the name
    of the source.

    Raises:
        DataError: a source already has this column, or cannot be read (see `parse_rows`).
    """
    examples: list[Example] = []
    rejected: list[Rejected] = []
    occurrences: Counter[str] = Counter()
    first, column = 0, config.source_column
    for name, source in sources.items():
        entry = config.sources[name]
        rows = [row._replace(row=first + row.row) for row in source.read()]
        group = f"data.sources.{name}"
        parsed, unusable = parse_rows(rows, entry.format, entry.fields, source.name, group, occurrences)
        if any(column in example.original for example in parsed):
            raise DataError(
                f"{source.name} has a column {column!r} already; give the name of another one for the sources, as in "
                "data.source_column=mixture_source"
            )
        examples += [replace(example, original={**example.original, column: name}) for example in parsed]
        rejected += [replace(row, reason=f"{name}: {row.reason}") for row in unusable]
        first += len(rows)
    return examples, rejected


def weighted(config: MixtureDataConfig, examples: Sequence[Example]) -> list[Example]:
    """Return a seeded sample in which each source's share is proportional to its weight.

    If the sources have no weights, return all examples. With `config.limit` the sample has `limit` + `holdout`
    examples, otherwise it is as large as possible.

    Raises:
        ConfigError: a source has too few examples for its share.
    """
    weights = np.array([source.weight or 0.0 for source in config.sources.values()])
    if not weights.all():
        return list(examples)
    by_source: dict[str, list[Example]] = {name: [] for name in config.sources}
    for example in examples:
        by_source[example.original[config.source_column]].append(example)
    available = np.array([len(group) for group in by_source.values()])
    most = int(np.floor((available * weights.sum() / weights).min()))
    size = most if config.limit is None else config.limit + config.holdout
    if size > most:
        scarce = list(by_source)[int(np.argmin(available / weights))]
        raise ConfigError(
            f"data.limit={config.limit} and data.holdout={config.holdout} ask for {size:,} rows, but "
            f"data.sources.{scarce} has {len(by_source[scarce]):,}, enough for {most:,} in these shares; give a "
            "smaller data.limit, or leave it out for the most rows"
        )
    drawn: list[Example] = []
    for group, count in zip(by_source.values(), proportional_shares(size, weights).tolist(), strict=True):
        drawn += draw(group, count, 0, config.seed)[0] if group else []
    return sorted(drawn, key=lambda example: example.row_index)
