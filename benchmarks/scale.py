"""How much time and memory do statistics -> G-SNR -> selection take for millions of rows?

    python -m benchmarks.scale [--rows 10000000] [--members 3] [--alpha 0.1] [--shards 1] [--folder DIR]

Makes the artifacts of a synthetic pool and of the members' norms at two snapshots, as the stages write them. A row has
some 500 bytes of text, and one row in a thousand has no response token. Then the functions of three stages are called,
each in a new process: statistics, scores, and the selection with its diagnostics and the selected rows that it writes.
Prints, and writes to `scale.json`, each stage's time, its process's peak resident memory and the part of it that was in
use before the stage began (Python and the imports), and the bytes per row of every file.

Needs about 700 bytes of disk per row in DIR (default: a temporary folder). If DIR has the pool or the norms from an
earlier call, they are used again.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import json
import multiprocessing
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from gradsift.artifacts import Artifact, Store
from gradsift.config import ComputeConfig
from gradsift.cost import peak_resident_gb
from gradsift.data.load import EXAMPLES_FILE
from gradsift.diagnostics import Diagnostic
from gradsift.gradients.ensemble_checks import drop_sign, drop_size, loss_between_snapshots, norm_spread
from gradsift.gradients.statistics import NORMS_FILE, Statistics, by_example, mean_loss, read_statistics, statistics
from gradsift.runtime import Display, Runtime
from gradsift.scoring.gsnr import gsnr
from gradsift.scoring.stage import score
from gradsift.selection.stage import select
from gradsift.selection.topk import topk
from gradsift.sources import Method, Source

BLOCK = 2**20  # rows that are made at once: a row group as the stages write it
TEXTS = 2000  # different responses
SNAPSHOTS = (1, 2)


def words(rng: np.random.Generator, mean: int) -> str:
    letters = rng.integers(97, 123, size=(mean, 6)).astype(np.uint8)
    return " ".join(bytes(word).decode() for word in letters)


def pool_blocks(rows: int) -> Iterator[pa.Table]:
    """Yield the rows of `examples.parquet` in blocks."""
    rng = np.random.default_rng(0)
    responses = [words(rng, int(length)) for length in rng.integers(2, 72, TEXTS)]
    turn = pa.struct([("role", pa.string()), ("content", pa.string()), ("is_trained", pa.bool_())])
    for start in range(0, rows, BLOCK):
        index = range(start, min(start + BLOCK, rows))
        output = [responses[i] for i in rng.integers(0, TEXTS, len(index))]
        asked = [f"Question {i}: write what you know of number {i}, in your own words" for i in index]
        hashes = [f"{i:016x}" for i in index]
        pairs = zip(asked, output, strict=True)
        yield pa.table(
            {
                "row_index": pa.array(index, pa.int64()),
                "example_id": [f"{one}-0" for one in hashes],
                "content_hash": hashes,
                "instruction": asked,
                "input": [""] * len(index),
                "output": output,
                "history": pa.array([[]] * len(index), pa.list_(turn)),
                "original": [json.dumps({"instruction": ask, "input": "", "output": out}) for ask, out in pairs],
            }
        )


def norm_blocks(rows: int, member: int, epoch: int, shard: int, shards: int) -> Iterator[pa.Table]:
    """Yield the rows of `gradient_norms.parquet` for one shard in blocks.

    A norm is a random number that all members share, times noise of the member and epoch.
    """
    for start in range(0, rows, BLOCK * shards):
        row = np.arange(start + shard, min(start + BLOCK * shards, rows), shards, dtype=np.int64)
        common, own = (np.random.default_rng(seed) for seed in ([start, shard], [start, shard, member, epoch]))
        norm = common.lognormal(0, 0.5, len(row)) * own.lognormal(0, 0.1, len(row)) * 0.8**epoch
        columns = {"norm_A": norm, "norm_B": norm / 2, "loss": norm * 2}
        columns = {name: values.astype(np.float32) for name, values in columns.items()}
        yield pa.table({"row": row, **columns, "n_tokens": common.integers(2, 400, len(row)).astype(np.int32)})


def write_blocks(path: Path, blocks: Iterator[pa.Table], compression: str) -> int:
    """Write the blocks to a Parquet file and return the number of rows."""
    first = next(blocks)
    rows = 0
    with pq.ParquetWriter(path, first.schema, compression=compression) as writer:
        for block in itertools.chain([first], blocks):
            writer.write_table(block)
            rows += block.num_rows
    return rows


@dataclass(frozen=True)
class Pool:
    """A synthetic pool and its ensemble; each method returns the artifact of a stage, and makes it if necessary."""

    store: Path
    rows: int
    members: int
    shards: int
    alpha: float

    @functools.cached_property
    def runtime(self) -> Runtime:
        display = Display(Console(file=io.StringIO()))
        return Runtime(Store(self.store, say=display.say), ComputeConfig(), display, seed=0)

    def loaded(self) -> Artifact:
        def make(folder: Path) -> Mapping[str, Any]:
            write_blocks(folder / EXAMPLES_FILE, pool_blocks(self.rows), "zstd")
            return {"rows": self.rows}

        return self.runtime.store.obtain("load", "synthetic", {"rows": self.rows}, [], make, version=1)

    def norms(self, epoch: int) -> list[list[Artifact]]:
        return [[self._norms(m, epoch, shard) for shard in range(self.shards)] for m in range(self.members)]

    def _norms(self, member: int, epoch: int, shard: int) -> Artifact:
        defined = self.rows - self.rows // 1000  # the last thousandth has no response token
        about = {"shard": shard, "shards": self.shards, "all_rows": defined}

        def make(folder: Path) -> Mapping[str, Any]:
            blocks = norm_blocks(defined, member, epoch, shard, self.shards)
            return {"rows": write_blocks(folder / NORMS_FILE, blocks, "snappy"), **about, "size_A": 1.0, "size_B": 1.0}

        slug = f"m{member}-e{epoch}-s{shard}of{self.shards}"
        return self.runtime.store.obtain("norms", slug, about, [self.loaded()], make, version=1)

    def statistics(self) -> Artifact:
        early, late = (self.norms(epoch) for epoch in SNAPSHOTS)
        return statistics(self.runtime, early, late, SNAPSHOTS, "all", self.rows)

    def scores(self) -> Artifact:
        made = self.statistics()
        sources = {"statistics": Source(lambda: [made], lambda: read_statistics(made))}
        scorer = Method("gsnr", "gradsift.scoring.gsnr.gsnr", gsnr, ("statistics",), {"eps": 1e-8})
        return score(self.runtime, scorer, self.loaded(), sources, lambda asked: self._diagnosed(read_statistics(made)))

    def _diagnosed(self, found: Statistics) -> list[Diagnostic]:
        return [norm_spread(found, self.members), loss_between_snapshots(found), drop_sign(found), drop_size(found)]

    def selection(self) -> Artifact:
        late = self.norms(SNAPSHOTS[1])

        def measures() -> dict[str, np.ndarray]:
            tokens = by_example(late[0], ("n_tokens",), self.rows)["n_tokens"]
            return {"late_loss": mean_loss(late, self.rows), "response_tokens": tokens}

        selector = Method("topk", "gradsift.selection.topk.topk", topk, (), {})
        return select(self.runtime, selector, self.scores(), self.loaded(), {}, measures, self.alpha, "accepted", {})


def measured(pool: Pool, stage: str) -> dict[str, Any]:
    """Run one stage and return its times and memory.

    The process must be new, so that the peak is that of the stage, and the earlier stages must be in the store.
    """
    before, started, spent = peak_resident_gb(), time.perf_counter(), time.process_time()
    getattr(pool, stage)()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - spent
    peak = {"peak_gb": peak_resident_gb(), "before_gb": before}
    return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1), **peak}


def make_inputs(pool: Pool) -> None:
    for epoch in SNAPSHOTS:
        pool.norms(epoch)


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the function in a new process and return its result."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def file_bytes(pool: Pool) -> dict[str, float]:
    """Return the bytes per row of each file, by stage and file name; for norms, of one member at one snapshot."""
    total: defaultdict[str, float] = defaultdict(float)
    for path in pool.store.glob("*/*/*"):
        if path.suffix in (".parquet", ".npy", ".jsonl"):
            stage = path.parent.parent.name
            times = pool.members * len(SNAPSHOTS) if stage == "norms" else 1
            total[f"{stage}/{path.name}"] += path.stat().st_size / times
    return {name: round(size / pool.rows, 1) for name, size in sorted(total.items())}


def run(pool: Pool) -> dict[str, Any]:
    for name in ("statistics", "score", "select"):  # these stages are measured, so they must run; the inputs may stay
        shutil.rmtree(pool.store / name, ignore_errors=True)
    alone(make_inputs, pool)
    stages = {}
    for stage in ("statistics", "scores", "selection"):
        stages[stage] = found = alone(measured, pool, stage)
        times = f"{found['seconds']:8.1f} s, {found['cpu_seconds']:8.1f} s of CPU"
        print(f"{stage:12} {times}   peak {found['peak_gb']:.2f} GB, {found['before_gb']:.2f} before", flush=True)
    settings = {"rows": pool.rows, "members": pool.members, "shards": pool.shards, "alpha": pool.alpha}
    files = file_bytes(pool)
    for name, size in files.items():
        print(f"{name:32} {size:10.2f} bytes a row")
    return settings | {"stages": stages, "bytes_a_row": files}


def main() -> None:
    from benchmarks.workload import merge_into  # imports transformers, which must not be in the measured processes

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--alpha", type=float, default=0.1)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("scale.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        name = f"{options.rows}x{options.members}x{options.shards}"
        found = run(Pool(folder / name, options.rows, options.members, options.shards, options.alpha))
    merge_into(options.out, {name: found})


if __name__ == "__main__":
    main()
