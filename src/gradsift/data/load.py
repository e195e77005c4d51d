"""The load stage: makes examples with ids from the rows of any source, and lists the rows that it rejects."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gradsift.artifacts import Artifact, Store
from gradsift.config import (
    COPIES,
    CorruptionConfig,
    DataConfig,
    FieldsConfig,
    HubDataConfig,
    JsonDataConfig,
    MixtureDataConfig,
    VerifiableDataConfig,
)
from gradsift.data import corruption, dedup, formats, hub, verifiable
from gradsift.data.examples import Example, Rejected, draw, read_examples, write_examples, write_rejected
from gradsift.data.mixture import parse_mixture, row_source, weighted
from gradsift.errors import ConfigError, DataError
from gradsift.manifests import file_hash
from gradsift.runtime import Runtime
from gradsift.scoring.published import Published
from gradsift.scoring.scores import write_scores

VERSION = 2  # version of the stage for the embedded world
ROWS_VERSION = 3  # version of the stage for other data
EXAMPLES_FILE = "examples.parquet"
HELDOUT_FILE = "heldout.parquet"
PUBLISHED_FILE = "published.parquet"  # the examples' scores from the file `data.scores`
LABELS_FILE = "labels.parquet"  # separate from the examples, so that no scorer reads the labels
BENCHMARK_FILE = "benchmark.json"
SPOILT = (*verifiable.SPOILT, "garbled")  # values of `Labels.quality` for examples that teach something wrong


@dataclass(frozen=True)
class Labels:
    """Labels of each example of a generated or corrupted dataset, in the order of the examples."""

    quality: list[str]  # "clean", one of SPOILT, or a kind of duplicate
    family: list[str] | None  # kind of task of each example; None outside the embedded world
    corruption: list[str | None] | None = None  # kind of injected corruption; None if the example is unchanged
    origin: list[int | None] | None = None  # position of the example that an injected copy repeats


def load(runtime: Runtime, config: DataConfig) -> Artifact:
    """Return the artifact of the load stage; make it if the store does not have it.

    Rows are read and checked, and examples get ids. Then duplicates are dropped (`config.dedup`), examples are held out
    (`config.holdout`), and a share of the other examples is corrupted (`config.corruption`).
    """
    if isinstance(config, VerifiableDataConfig):
        return _load_world(runtime, config)
    return _load_rows(runtime, config)


def require_dataset(store: Store, config: HubDataConfig) -> None:
    """Raise DataError if neither store nor hub can provide the rows of a hub dataset (see `hub.require_dataset`)."""
    if not store.has("load", config.name, _settings(config), [], version=ROWS_VERSION):
        hub.require_dataset(config.id, config.revision)


def _settings(config: DataConfig) -> dict[str, Any]:
    """Return the options as settings; newer options are left out while off, so that earlier results stay valid."""
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


def _load_rows(runtime: Runtime, config: DataConfig) -> Artifact:
    assert isinstance(config, JsonDataConfig | HubDataConfig | MixtureDataConfig)  # noqa: S101 - for the type checker
    settings, downloads = _settings(config), runtime.store.root / "downloads"
    if isinstance(config, MixtureDataConfig):
        sources = {name: row_source(entry, downloads, f"data.sources.{name}") for name, entry in config.sources.items()}
        for name, each in sources.items():
            settings["sources"][name] |= each.settings
    else:
        source = row_source(config, downloads)
        settings |= source.settings

    def make(folder: Path) -> Mapping[str, Any]:
        if isinstance(config, MixtureDataConfig):
            examples, rejected = parse_mixture(config, sources)
        else:
            examples, rejected = formats.parse_rows(source.read(), config.format, config.fields, source=source.name)
        kept, repeated = _without_duplicates(runtime, config, examples)
        chosen = weighted(config, kept) if isinstance(config, MixtureDataConfig) else kept
        pool, heldout = draw(chosen, config.limit, config.holdout, config.seed)
        # after the draw, so that the same rows are held out with and without scores
        pool, rejected, counts = _with_scores(runtime, config, folder, kept, pool, [*rejected, *repeated])
        if isinstance(config, MixtureDataConfig):
            counts["sources"] = dict(Counter(example.original[config.source_column] for example in pool))
        if config.corruption.share:
            next_row = 1 + max([*(example.row_index for example in kept), *(row.row for row in rejected)])
            clean, before = Labels(["clean"] * len(pool), None), pool
            pool, labels = _corrupt(config.corruption, pool, clean, corruption.changes_of_text(pool), next_row)
            _write_labels(folder, labels)
            kinds = labels.corruption or ()
            counts["corrupted"] = dict(Counter(filter(None, kinds))) | {
                "stand_ins": corruption.stand_ins(before, kinds)
            }
        write_examples(folder / EXAMPLES_FILE, pool)
        write_examples(folder / HELDOUT_FILE, heldout)
        write_rejected(folder / "rejected.jsonl", rejected)
        # a hub dataset may change without a new name, so later stages depend on the content that was read
        content = file_hash(folder / EXAMPLES_FILE)
        return counts | {"rows": len(pool), "heldout": len(heldout), "content": content}

    return runtime.store.obtain("load", config.name, settings, [], make, version=ROWS_VERSION, light=True)


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
    """Write the scores of `data.scores`; return the examples with a score, all rejected rows, and the stage's counts.

    Without `data.scores` no scores are written, and all examples of the pool are returned.

    Args:
        kept: all accepted examples of the data, held-out examples included.
        rejected: the rows that are rejected for other reasons.
    """
    unscored: list[Rejected] = []
    counts: dict[str, Any] = {}
    if config.scores is not None:
        published = Published(Path(config.scores))
        pool, unscored = published.divide(pool)
        write_scores(folder / PUBLISHED_FILE, published.of(pool), [[example.example_id for example in pool]])
        counts = {"rows_without_score": len(unscored), "unused_scores": published.unused(kept)}
        runtime.display.say(
            f"  {published.path.name} has scores for {len(pool):,} of {len(pool) + len(unscored):,} rows; the other "
            f"{len(unscored):,} are rejected; {counts['unused_scores']:,} of its scores are of texts that are not in "
            "the data"
        )
    counts |= {"accepted": len(kept) - len(unscored), "rejected": len(rejected) + len(unscored)}
    return pool, sorted([*rejected, *unscored], key=lambda row: row.row), counts


def _load_world(runtime: Runtime, config: VerifiableDataConfig) -> Artifact:
    def make(folder: Path) -> Mapping[str, Any]:
        world = verifiable.generate(
            size=config.size,
            spoilt=config.spoilt,
            duplicates=config.duplicates,
            benchmark_items=config.benchmark_items,
            delayed=config.delayed,
            seed=config.seed,
        )
        examples, rejected = formats.parse_rows(enumerate(world.rows), "alpaca", FieldsConfig())
        if rejected:
            raise DataError(f"the embedded world made an unusable row {rejected[0].row}: {rejected[0].reason}")
        kept, repeated = _without_duplicates(runtime, config, examples)
        pool, _ = draw(kept, config.limit, 0, config.seed)
        pool, rejected, counts = _with_scores(runtime, config, folder, kept, pool, repeated)
        known = [world.labels[example.row_index] for example in pool]
        labels = Labels(_without_lone_copies(pool, known), [label.family for label in known])
        if config.corruption.share:
            changes = corruption.changes_of_text(pool) | _world_changes(world)
            pool, labels = _corrupt(config.corruption, pool, labels, changes, len(world.rows))
            counts["corrupted"] = dict(Counter(filter(None, labels.corruption or ())))
        write_examples(folder / EXAMPLES_FILE, pool)
        # the benchmark's questions and reference answers are the held-out examples: all are clean, unlike the pool
        held = [{**item, "output": item["reference"]} for item in world.benchmark]
        write_examples(folder / HELDOUT_FILE, formats.parse_rows(enumerate(held), "alpaca", FieldsConfig())[0])
        _write_labels(folder, labels)
        write_rejected(folder / "rejected.jsonl", rejected)
        (folder / BENCHMARK_FILE).write_text(json.dumps(world.benchmark, indent=1), encoding="utf-8")
        return counts | {"rows": len(pool), "heldout": len(world.benchmark)}

    return runtime.store.obtain(
        "load", f"{config.name}-{config.size}", _settings(config), [], make, version=VERSION, light=True
    )


def _without_lone_copies(pool: Sequence[Example], known: Sequence[verifiable.Label]) -> list[str]:
    """Return each example's quality label, which becomes clean for a copy of a row that is not in the pool."""
    questions = [
        verifiable.question_of(label.family, example.instruction, example.input)
        for example, label in zip(pool, known, strict=True)
    ]
    asked = {question for question, label in zip(questions, known, strict=True) if label.quality == "clean"}
    quality = []
    for question, label in zip(questions, known, strict=True):
        alone = label.quality in COPIES and question not in asked
        quality.append("clean" if alone else label.quality)
        if alone:
            asked.add(question)  # a second copy of the same row repeats this copy
    return quality


def _world_changes(world: verifiable.World) -> dict[str, corruption.Change]:
    """Return, by kind of corruption, the functions that corrupt an example with words of the embedded world only."""

    def reworded(example: Example, rng: random.Random) -> corruption.Texts:
        family = world.labels[example.row_index].family
        return (*verifiable.reworded(family, example.instruction, example.input, rng), example.output)

    return {
        "wrong_answer": corruption.of_output(verifiable.wrong_answer),
        "garbled": corruption.of_output(verifiable.garbled),
        "near_duplicate": reworded,
    }


def _corrupt(
    config: CorruptionConfig,
    pool: Sequence[Example],
    labels: Labels,
    changes: Mapping[str, corruption.Change],
    next_row: int,
) -> tuple[list[Example], Labels]:
    """Corrupt a share of the pool, and label the result. Only examples labelled clean are corrupted or copied."""
    made = corruption.corrupt(
        pool,
        changes,
        share=config.share,
        kinds=config.kinds,
        seed=config.seed,
        next_row=next_row,
        sound=[position for position, quality in enumerate(labels.quality) if quality == "clean"],
    )
    source = [position if origin is None else origin for position, origin in enumerate(made.origin)]
    quality = [kind or labels.quality[position] for kind, position in zip(made.kind, source, strict=True)]
    family = None if labels.family is None else [labels.family[position] for position in source]
    return made.examples, Labels(quality, family, made.kind, made.origin)


def _write_labels(folder: Path, labels: Labels) -> None:
    """Write a table with one column for each field of `labels` that is not None."""
    columns = {name: values for name, values in vars(labels).items() if values is not None}
    types = {"origin": pa.int64()}
    arrays = {name: pa.array(values, types.get(name, pa.string())) for name, values in columns.items()}
    pq.write_table(pa.table(arrays), folder / LABELS_FILE)


def pool_of(loaded: Artifact) -> list[Example]:
    """Return the examples to select from."""
    return read_examples(loaded.file(EXAMPLES_FILE))


def heldout_of(loaded: Artifact) -> list[Example]:
    """Return the examples that were held out for the held-out loss; may be empty."""
    return read_examples(loaded.file(HELDOUT_FILE))


def benchmark_rows(loaded: Artifact) -> list[dict[str, str]]:
    """Return the embedded world's benchmark questions."""
    rows: list[dict[str, str]] = json.loads(loaded.file(BENCHMARK_FILE).read_text(encoding="utf-8"))
    return rows


def labels_of(loaded: Artifact) -> Labels | None:
    """Return the labels of the examples, or None if the data has no labels. Use them for reports only."""
    path = loaded.file(LABELS_FILE)
    if not path.is_file():
        return None
    columns = pq.read_table(path).to_pydict()
    return Labels(columns["quality"], columns.get("family"), columns.get("corruption"), columns.get("origin"))


def corruption_of(loaded: Artifact) -> dict[int, str]:
    """Return the kind of corruption of each corrupted example, by its position; empty if nothing was injected."""
    labels = labels_of(loaded)
    kinds = labels.corruption if labels else None
    return {position: kind for position, kind in enumerate(kinds or ()) if kind}
