"""The load stage: makes examples with ids from the rows of a data source, and lists the rejected rows."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradsift.artifacts import Artifact, Store
from gradsift.config import (
    COPIES,
    DataConfig,
    FieldsConfig,
    HubDataConfig,
    JsonDataConfig,
    MixtureDataConfig,
    SourceConfig,
    VerifiableDataConfig,
)
from gradsift.data import corruption, dedup, files, hub, verifiable
from gradsift.data.examples import Example, Rejected, SourceRow, draw, read_examples, write_examples, write_rejected
from gradsift.data.formats import parse_rows
from gradsift.errors import ConfigError, DataError
from gradsift.manifests import file_hash
from gradsift.runtime import Runtime
from gradsift.scoring.published import join_scores
from gradsift.scoring.scores import write_scores
from gradsift.selection.budget import proportional_shares

VERSION = 2  # version of the stage for the embedded world
ROWS_VERSION = 3  # version of the stage for all other data
EXAMPLES_FILE = "examples.parquet"
HELDOUT_FILE = "heldout.parquet"
PUBLISHED_FILE = "published.parquet"  # the examples' scores from the file `data.scores`
LABELS_FILE = "labels.parquet"  # separate from the examples, so that no scorer reads the labels
BENCHMARK_FILE = "benchmark.json"
SPOILT = (*verifiable.SPOILT, "garbled")  # values of `Labels.quality` for examples that teach something wrong


@dataclass(frozen=True)
class Labels:
    """What is known about each example of a generated or corrupted dataset, in the order of the examples."""

    quality: list[str]  # "clean", one of SPOILT, or a kind of duplicate
    family: list[str] | None  # kind of task of each example; None outside the embedded world
    corruption: list[str | None] | None = None  # kind of injected corruption; None if the example is unchanged
    origin: list[int | None] | None = None  # position of the example that an injected copy repeats


class RowSource(NamedTuple):
    """A source of rows: one or more files, or a hub dataset."""

    name: str  # name of the data in errors
    settings: dict[str, Any]  # what determines the rows besides the config's options, such as a file's hash
    read: Callable[[], Iterator[SourceRow]]


def load(runtime: Runtime, config: DataConfig) -> Artifact:
    """Return the artifact of the load stage. If the store does not have it, make it.

    The stage reads the rows, rejects those that cannot be used, and gives the examples ids. Then it drops duplicates
    (`config.dedup`), holds out examples (`config.holdout`), draws the pool (`config.limit`), and corrupts a share of
    the pool (`config.corruption`).
    """
    settings, downloads = _settings(config), runtime.store.root / "downloads"
    slug, version = config.name, ROWS_VERSION
    sources: dict[str, RowSource] = {}
    if isinstance(config, VerifiableDataConfig):
        slug, version = f"{config.name}-{config.size}", VERSION
    elif isinstance(config, MixtureDataConfig):
        sources = {name: row_source(entry, downloads, f"data.sources.{name}") for name, entry in config.sources.items()}
        for name, source in sources.items():
            settings["sources"][name] |= source.settings
    elif isinstance(config, JsonDataConfig | HubDataConfig):
        sources = {config.name: row_source(config, downloads)}
        settings |= sources[config.name].settings

    make = partial(_make, runtime, config, sources)
    return runtime.store.obtain("load", slug, settings, [], make, version=version, light=True)


def _make(runtime: Runtime, config: DataConfig, sources: Mapping[str, RowSource], folder: Path) -> dict[str, Any]:
    """Write the files of the artifact to `folder`, and return the artifact's info, such as the number of rows."""
    world = None
    if isinstance(config, VerifiableDataConfig):
        world = verifiable.generate(
            size=config.size,
            spoilt=config.spoilt,
            duplicates=config.duplicates,
            benchmark_items=config.benchmark_items,
            delayed=config.delayed,
            seed=config.seed,
        )
        examples, rejected = parse_rows(enumerate(world.rows), "alpaca", FieldsConfig())
    elif isinstance(config, MixtureDataConfig):
        examples, rejected = parse_mixture(config, sources)
    else:
        assert isinstance(config, JsonDataConfig | HubDataConfig)  # noqa: S101 - for the type checker
        source = sources[config.name]
        examples, rejected = parse_rows(source.read(), config.format, config.fields, source.name)
    kept, repeated = _without_duplicates(runtime, config, examples)
    chosen = weighted(config, kept) if isinstance(config, MixtureDataConfig) else kept
    pool, heldout = draw(chosen, config.limit, config.holdout, config.seed)
    # after the draw, so that the same rows are held out with and without scores
    pool, rejected, counts = _with_scores(runtime, config, folder, kept, pool, [*rejected, *repeated])
    if isinstance(config, MixtureDataConfig):
        counts["sources"] = dict(Counter(example.original[config.source_column] for example in pool))
    labels = Labels(["clean"] * len(pool), None)
    if world is not None:
        labels = _world_labels(world, pool)
        # the held-out examples are the benchmark's questions with their right answers, so they are clean
        held = [{**item, "output": item["reference"]} for item in world.benchmark]
        heldout, _ = parse_rows(enumerate(held), "alpaca", FieldsConfig())
        (folder / BENCHMARK_FILE).write_text(json.dumps(world.benchmark, indent=1), encoding="utf-8")
    if config.corruption.share:
        next_row = 1 + max([*(example.row_index for example in kept), *(row.row for row in rejected)])
        pool, labels, counts["corrupted"] = _corrupt(config, pool, labels, next_row)
    if world is not None or config.corruption.share:
        columns = {name: values for name, values in vars(labels).items() if values is not None}
        types = {"origin": pa.int64()}
        arrays = {name: pa.array(values, types.get(name, pa.string())) for name, values in columns.items()}
        pq.write_table(pa.table(arrays), folder / LABELS_FILE)
    write_examples(folder / EXAMPLES_FILE, pool)
    write_examples(folder / HELDOUT_FILE, heldout)
    write_rejected(folder / "rejected.jsonl", rejected)
    counts |= {"rows": len(pool), "heldout": len(heldout)}
    if world is None:
        # a hub dataset may change without a new name, so later stages depend on the content that was read
        counts["content"] = file_hash(folder / EXAMPLES_FILE)
    return counts


def require_dataset(store: Store, config: HubDataConfig) -> None:
    """Raise DataError if neither store nor hub can provide the rows of a hub dataset (see `hub.require_dataset`)."""
    if not store.has("load", config.name, _settings(config), [], version=ROWS_VERSION):
        hub.require_dataset(config.id, config.revision)


def _settings(config: DataConfig) -> dict[str, Any]:
    """Return the settings of the stage, which are its options and enter the artifact's fingerprint.

    Options that later versions of gradsift added are left out while they are off, so that earlier artifacts can still
    be found.
    """
    settings = asdict(config)
    if config.dedup != "near":
        del settings["dedup_threshold"]
    else:
        settings["dedup_version"] = dedup.VERSION
    if config.dedup == "none":
        del settings["dedup"]
    if isinstance(config, VerifiableDataConfig) and (config.dedup != "none" or config.limit):
        settings["labels_version"] = 2  # since version 2, a copy without its original in the pool is labelled clean
    if config.corruption.share:
        settings["corruption_version"] = corruption.VERSION
    else:
        del settings["corruption"]
    if config.scores is not None:
        settings["scores"] = file_hash(Path(config.scores))
    for later in ("subset", "streaming", "scores"):
        if not settings.get(later):
            settings.pop(later, None)
    if settings.get("delayed") == 0:
        del settings["delayed"]
    return settings


# --------------------------------------------------------------------------------- reading the rows


def row_source(
    config: JsonDataConfig | HubDataConfig | SourceConfig, downloads: Path, group: str = "data"
) -> RowSource:
    """Return the source of rows that a config describes; errors name its options as `<group>.<option>`."""
    if isinstance(config, HubDataConfig) or config.path is None:
        assert not isinstance(config, JsonDataConfig)  # noqa: S101 - for the type checker
        id, revision, split, subset = config.id or "", config.revision, config.split, config.subset
        first = None
        if isinstance(config, HubDataConfig) and config.streaming:
            first = (config.limit or 0) + config.holdout
        return RowSource(id, {}, lambda: hub.load_hub(id, revision, split, subset, first, group))
    named = files.files_of(config.path, downloads, group)
    kinds, hashes = [files.file_kind(file) for file in named], [files.hash_of(file) for file in named]
    one = len(named) == 1
    settings = {"path": None, "kind": kinds[0] if one else kinds, "sha256": hashes[0] if one else hashes}
    name = config.path if isinstance(config.path, str) else ", ".join(config.path)
    return RowSource(name, settings, lambda: files.read_files(named))


def parse_mixture(config: MixtureDataConfig, sources: Mapping[str, RowSource]) -> tuple[list[Example], list[Rejected]]:
    """Return the examples and the rejected rows of all sources, with rows numbered consecutively across the sources.

    The name of each example's source is added to `original` as the column `config.source_column`. Raises DataError if
    the data already has a column of this name.
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
                f"{source.name} already has a column {column!r}; choose another column for the sources' names, as in "
                "data.source_column=mixture_source"
            )
        examples += [replace(example, original={**example.original, column: name}) for example in parsed]
        rejected += [replace(row, reason=f"{name}: {row.reason}") for row in unusable]
        first += len(rows)
    return examples, rejected


def weighted(config: MixtureDataConfig, examples: Sequence[Example]) -> list[Example]:
    """Return a seeded sample in which the sources' shares follow their weights; without weights, all examples.

    If `config.limit` is set, the sample has `limit` + `holdout` examples; otherwise it is as large as possible. Raises
    ConfigError if a source has too few examples for its share.
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


def _without_duplicates(
    runtime: Runtime, config: DataConfig, examples: Sequence[Example]
) -> tuple[list[Example], list[Rejected]]:
    if config.dedup == "none":
        return list(examples), []
    with runtime.display.task(f"data.dedup={config.dedup}", len(examples)) as advance:
        kept, repeated = dedup.deduplicated(examples, config.dedup, config.dedup_threshold, advance)
    if repeated and config.holdout >= len(kept):
        raise ConfigError(
            f"data.dedup={config.dedup} drops {len(repeated):,} of the {len(examples):,} rows, and "
            f"data.holdout={config.holdout} leaves none of the other {len(kept):,} to select from; give a smaller "
            "data.holdout, or data.dedup=none"
        )
    return kept, repeated


def _with_scores(
    runtime: Runtime,
    config: DataConfig,
    folder: Path,
    kept: Sequence[Example],
    pool: list[Example],
    rejected: Sequence[Rejected],
) -> tuple[list[Example], list[Rejected], dict[str, Any]]:
    """Write the scores of the file `data.scores`, and reject the examples of the pool that have none.

    `kept` holds all accepted examples of the data, including the held-out examples.

    Returns the remaining pool, all rejected rows, and the counts of rows and scores for the artifact's info. Without
    `data.scores`, the pool stays as it is.
    """
    unscored: list[Rejected] = []
    counts: dict[str, Any] = {}
    if config.scores is not None:
        file = Path(config.scores)
        pool, unscored, scores, unused = join_scores(file, pool, kept)
        write_scores(folder / PUBLISHED_FILE, scores, [[example.example_id for example in pool]])
        counts = {"rows_without_score": len(unscored), "unused_scores": unused}
        runtime.display.say(
            f"  {file.name} has scores for {len(pool):,} of {len(pool) + len(unscored):,} rows; the other "
            f"{len(unscored):,} are rejected; {unused:,} of its scores are of texts that are not in the data"
        )
    counts |= {"accepted": len(kept) - len(unscored), "rejected": len(rejected) + len(unscored)}
    return pool, sorted([*rejected, *unscored], key=lambda row: row.row), counts


# -------------------------------------------------------------------------- labels and corruption


def _world_labels(world: verifiable.World, pool: Sequence[Example]) -> Labels:
    """Return the labels of the pool.

    A duplicate is labelled clean if the row that it repeats is not in the pool.
    """
    known = [world.labels[example.row_index] for example in pool]
    questions = [verifiable.task_of(example.instruction, example.input).question for example in pool]
    asked = {question for question, label in zip(questions, known, strict=True) if label.quality == "clean"}
    quality = []
    for question, label in zip(questions, known, strict=True):
        alone = label.quality in COPIES and question not in asked
        quality.append("clean" if alone else label.quality)
        if alone:
            asked.add(question)  # a second duplicate of the same row repeats this one
    return Labels(quality, [label.family for label in known])


def _corrupt(
    config: DataConfig, pool: Sequence[Example], labels: Labels, next_row: int
) -> tuple[list[Example], Labels, dict[str, int]]:
    """Corrupt a share of the pool; return the new pool, its labels, and the number of corrupted rows of each kind.

    Only examples labelled clean are corrupted or copied. In the embedded world, changed texts contain only words of the
    world's vocabulary.
    """
    is_world = isinstance(config, VerifiableDataConfig)

    def reworded(example: Example, rng: random.Random) -> corruption.Texts:
        return (*verifiable.task_of(example.instruction, example.input).reworded(rng).prompt, example.output)

    changes = corruption.changes_of_text(pool)
    if is_world:
        changes["wrong_answer"] = corruption.of_output(verifiable.wrong_answer)
        changes["garbled"] = corruption.of_output(verifiable.garbled)
        changes["near_duplicate"] = reworded
    sound = [position for position, quality in enumerate(labels.quality) if quality == "clean"]
    made = corruption.corrupt(pool, changes, config.corruption, next_row, sound)
    counts = dict(Counter(filter(None, made.kind)))
    if not is_world:
        counts["stand_ins"] = corruption.stand_ins(pool, made.kind)
    source = [position if origin is None else origin for position, origin in enumerate(made.origin)]
    quality = [kind or labels.quality[position] for kind, position in zip(made.kind, source, strict=True)]
    family = None if labels.family is None else [labels.family[position] for position in source]
    return made.examples, Labels(quality, family, made.kind, made.origin), counts


def pool_of(loaded: Artifact) -> list[Example]:
    """Return the pool: the examples to select from."""
    return read_examples(loaded.file(EXAMPLES_FILE))


def heldout_of(loaded: Artifact) -> list[Example]:
    """Return the examples that were held out to measure the held-out loss; empty if there are none."""
    return read_examples(loaded.file(HELDOUT_FILE))


def benchmark_rows(loaded: Artifact) -> list[dict[str, str]]:
    """Return the embedded world's benchmark questions."""
    rows: list[dict[str, str]] = json.loads(loaded.file(BENCHMARK_FILE).read_text(encoding="utf-8"))
    return rows


def labels_of(loaded: Artifact) -> Labels | None:
    """Return the labels of the pool's examples, or None if the data has no labels.

    The labels serve reports and the audit. Of gradsift's scorers, only the reference scorer random_clean reads them.
    """
    path = loaded.file(LABELS_FILE)
    if not path.is_file():
        return None
    columns = pq.read_table(path).to_pydict()
    return Labels(columns["quality"], columns.get("family"), columns.get("corruption"), columns.get("origin"))


def corruption_of(loaded: Artifact) -> dict[int, str]:
    """Return a dict from the position of each corrupted example in the pool to the kind of its corruption."""
    labels = labels_of(loaded)
    kinds = labels.corruption if labels else None
    return {position: kind for position, kind in enumerate(kinds or ()) if kind}
