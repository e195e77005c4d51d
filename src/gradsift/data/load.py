"""The load stage: from any source to examples with ids, with nothing lost on the way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gradsift.artifacts import Artifact, file_hash
from gradsift.config import DataConfig, FieldsConfig, HubDataConfig, JsonDataConfig, VerifiableDataConfig
from gradsift.data import formats, verifiable
from gradsift.data.examples import Example, Rejected, draw, read_examples, write_examples, write_rejected
from gradsift.errors import DataError
from gradsift.runtime import Runtime

VERSION = 1
EXAMPLES_FILE = "examples.parquet"
HELDOUT_FILE = "heldout.parquet"
LABELS_FILE = "labels.parquet"  # apart from the examples: no scorer reads it
BENCHMARK_FILE = "benchmark.json"


@dataclass(frozen=True)
class Labels:
    """What is known about each example of a generated dataset, in the order of the examples."""

    quality: list[str]
    family: list[str]


def load(runtime: Runtime, config: DataConfig) -> Artifact:
    """Read, check and number the examples; set held-out ones aside."""
    if isinstance(config, VerifiableDataConfig):
        return _load_world(runtime, config)
    if isinstance(config, JsonDataConfig):
        path = Path(config.path).expanduser()
        settings = asdict(config) | {"path": None, "kind": formats.file_kind(path), "sha256": formats.hash_of(path)}
        return _load_rows(runtime, config, settings, path)
    return _load_rows(runtime, config, asdict(config), None)


def _load_rows(runtime: Runtime, config: DataConfig, settings: Mapping[str, Any], path: Path | None) -> Artifact:
    def make(folder: Path) -> Mapping[str, Any]:
        assert isinstance(config, JsonDataConfig | HubDataConfig)  # noqa: S101 - for the type checker
        if isinstance(config, JsonDataConfig) and path is not None:
            rows = formats.read_rows(path)
        elif isinstance(config, HubDataConfig):
            rows = formats.load_hub(config.id, config.revision, config.split)
        examples, rejected = formats.parse_rows(rows, config.format, config.fields, source=_name(config))
        return _write(folder, config, examples, rejected)

    return runtime.store.obtain("load", config.name, settings, [], make, version=VERSION)


def _name(config: JsonDataConfig | HubDataConfig) -> str:
    return config.path if isinstance(config, JsonDataConfig) else config.id


def _write(
    folder: Path, config: DataConfig, examples: Sequence[Example], rejected: Sequence[Rejected]
) -> dict[str, Any]:
    pool, heldout = draw(examples, config.limit, config.holdout, config.seed)
    write_examples(folder / EXAMPLES_FILE, pool)
    write_examples(folder / HELDOUT_FILE, heldout)
    write_rejected(folder / "rejected.jsonl", rejected)
    counts = {"rows": len(pool), "accepted": len(examples), "heldout": len(heldout), "rejected": len(rejected)}
    # a hub dataset may change under its name: what is computed from it is bound to what was read
    return counts | {"content": file_hash(folder / EXAMPLES_FILE)}


def _load_world(runtime: Runtime, config: VerifiableDataConfig) -> Artifact:
    def make(folder: Path) -> Mapping[str, Any]:
        world = verifiable.generate(
            size=config.size,
            spoilt=config.spoilt,
            duplicates=config.duplicates,
            benchmark_items=config.benchmark_items,
            seed=config.seed,
        )
        examples, rejected = formats.parse_rows(enumerate(world.rows), "alpaca", FieldsConfig())
        if rejected:
            raise DataError(f"the embedded world made an unusable row {rejected[0].row}: {rejected[0].reason}")
        pool, _ = draw(examples, config.limit, 0, config.seed)
        labels = [world.labels[example.row_index] for example in pool]
        write_examples(folder / EXAMPLES_FILE, pool)
        # the benchmark's own answers serve as held-out examples: they are clean, unlike the pool
        held = [{**item, "output": item["reference"]} for item in world.benchmark]
        write_examples(folder / HELDOUT_FILE, formats.parse_rows(enumerate(held), "alpaca", FieldsConfig())[0])
        quality, family = [label.quality for label in labels], [label.family for label in labels]
        pq.write_table(pa.table({"quality": quality, "family": family}), folder / LABELS_FILE)
        (folder / BENCHMARK_FILE).write_text(json.dumps(world.benchmark, indent=1), encoding="utf-8")
        return {"rows": len(pool), "accepted": len(examples), "heldout": len(held), "rejected": 0}

    return runtime.store.obtain("load", f"{config.name}-{config.size}", asdict(config), [], make, version=VERSION)


def pool_of(loaded: Artifact) -> list[Example]:
    """The examples to select from."""
    return read_examples(loaded.file(EXAMPLES_FILE))


def heldout_of(loaded: Artifact) -> list[Example]:
    """The examples set aside for the held-out loss; may be empty."""
    return read_examples(loaded.file(HELDOUT_FILE))


def benchmark_rows(loaded: Artifact) -> list[dict[str, str]]:
    """The questions that came with the embedded world."""
    rows: list[dict[str, str]] = json.loads(loaded.file(BENCHMARK_FILE).read_text(encoding="utf-8"))
    return rows


def labels_of(loaded: Artifact) -> Labels | None:
    """Quality labels and families, where the data has them; for reports only."""
    path = loaded.file(LABELS_FILE)
    if not path.is_file():
        return None
    table = pq.read_table(path)
    return Labels(table["quality"].to_pylist(), table["family"].to_pylist())
