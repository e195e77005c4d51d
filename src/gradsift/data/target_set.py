"""The target set: examples of the tasks that the finetuned model should be good at.

LESS, G2IS, RDS+ and other methods select the examples of the pool that should help most with these tasks. Target rows
are read like the rows of the data, except that a row that cannot be used raises an error instead of being rejected:
target sets are so small that every row matters.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from gradsift.artifacts import Artifact
from gradsift.config import (
    NO_TARGET_SET,
    FieldsConfig,
    FilesTargetSetConfig,
    TargetSetConfig,
    VerifiableTargetSetConfig,
)
from gradsift.data import dedup, verifiable
from gradsift.data.download import fetch_url
from gradsift.data.examples import Example, SourceRow, draw, read_examples, write_examples
from gradsift.data.files import file_kind, hash_of, read_rows
from gradsift.data.formats import parse_rows
from gradsift.data.load import benchmark_rows, pool_of
from gradsift.errors import ConfigError, DataError
from gradsift.manifests import file_hash
from gradsift.runtime import Runtime

VERSION = 2
EXAMPLES_FILE = "examples.parquet"
TASKS_FILE = "tasks.json"
OVERLAP_FILE = "overlap.jsonl"
OVERLAP_VERSION = 2
_ALIKE = 0.8  # smallest Jaccard similarity of similar prompts; the default of near duplicates too
_NAMED = 5  # maximum number of rows in the warning; `overlap.jsonl` lists all


@dataclass(frozen=True)
class TargetSet:
    """Q examples, and the name of the task of each example. The examples of a task are adjacent."""

    examples: list[Example]
    tasks: list[str]


def load_target_set(runtime: Runtime, config: TargetSetConfig, loaded: Artifact) -> Artifact:
    """Return the artifact with the target rows, at most `config.limit` of each task.

    Raises:
        ConfigError: the config has no target set, or the embedded world lacks a task or has too few questions for one.
        DataError: a file is missing, empty or in no known format, or a row cannot be used.
    """
    settings, parents = asdict(config), []
    by_task: Callable[[], dict[str, list[Example]]]
    if isinstance(config, FilesTargetSetConfig):
        files = _files(config, runtime.store.root / "downloads")
        for file in files.values():
            file_kind(file, "target_set")  # raises if the file is missing or its type unknown
        settings |= {"path": None, "urls": None, "sha256": {task: hash_of(file) for task, file in files.items()}}
        by_task = partial(_examples_of_files, config, files)
    elif isinstance(config, VerifiableTargetSetConfig):
        parents.append(loaded)
        by_task = partial(_examples_of_world, config, loaded)
    else:
        raise ConfigError(NO_TARGET_SET.format(method="this configuration"))

    def make(folder: Path) -> Mapping[str, Any]:
        examples: list[Example] = []
        tasks: list[str] = []
        for task, rows in by_task().items():
            drawn, _ = draw(rows, config.limit, 0, config.seed)
            examples += [replace(row, example_id=f"{task}/{row.example_id}") for row in drawn]
            tasks += [task] * len(drawn)
        write_examples(folder / EXAMPLES_FILE, examples)
        (folder / TASKS_FILE).write_text(json.dumps(tasks), encoding="utf-8")
        return {"rows": len(examples), "tasks": len(set(tasks)), "content": file_hash(folder / EXAMPLES_FILE)}

    return runtime.store.obtain("target_set", config.name, settings, parents, make, version=VERSION, light=True)


def _files(config: FilesTargetSetConfig, downloads: Path) -> dict[str, Path]:
    """Return a dict from each task's name to its file.

    With `config.task`, a single file holds several tasks: the column `config.task` has the task of each row.
    """
    if config.path is None:
        return {task: fetch_url(url, downloads) for task, url in config.urls.items()}
    path = Path(config.path).expanduser()
    if not path.is_dir():
        return {next(iter(config.urls)) if len(config.urls) == 1 else path.name.split(".")[0]: path}
    if not config.urls:
        raise ConfigError(f"target_set.path={config.path} is a folder; name one file in it")
    files = {task: path / url.rsplit("/", 1)[-1] for task, url in config.urls.items()}
    if len(set(files.values())) < len(files):
        raise ConfigError(
            f"target_set.path={config.path}: two of target_set.urls end in the same file name, so two tasks would have "
            "the same rows; leave target_set.path empty, or give one file with target_set.task=COLUMN"
        )
    return files


def _examples_of_files(config: FilesTargetSetConfig, files: Mapping[str, Path]) -> dict[str, list[Example]]:
    by_task: dict[str, list[Example]] = {}
    for name, file in files.items():
        rows = list(read_rows(file, config.rows))
        tasks = [name if config.task is None else _task_of(row, config.task, file) for row in rows]
        examples, rejected = parse_rows(rows, config.format, config.fields, source=str(file), group="target_set")
        if rejected:
            raise DataError(
                f"{file}, row {rejected[0].row}: {rejected[0].reason}; correct or delete the row, or check "
                "target_set.format and the names of its columns as in target_set.fields.output=NAME"
            )
        for task, example in zip(tasks, examples, strict=True):
            by_task.setdefault(task, []).append(example)
    return by_task


def _task_of(row: SourceRow, column: str, file: Path) -> str:
    task = row.content.get(column) if isinstance(row.content, dict) else None
    if not isinstance(task, str) or not task.strip():
        raise DataError(
            f"{file}, row {row.row}: column {column!r} holds {task!r} instead of the name of a task; check "
            "target_set.task"
        )
    return task


def _examples_of_world(config: VerifiableTargetSetConfig, loaded: Artifact) -> dict[str, list[Example]]:
    taken = {(example.instruction, example.input) for example in pool_of(loaded)}
    taken |= {(item["instruction"], item["input"]) for item in benchmark_rows(loaded)}
    by_task = {}
    for task in config.tasks:
        rows = verifiable.further_rows(task, config.limit or 1, taken, config.seed)
        by_task[task] = parse_rows(enumerate(rows), "alpaca", FieldsConfig())[0]
    return by_task


def target_set_of(artifact: Artifact) -> TargetSet:
    """Return the target set that `load_target_set` wrote."""
    tasks = json.loads(artifact.file(TASKS_FILE).read_text(encoding="utf-8"))
    return TargetSet(read_examples(artifact.file(EXAMPLES_FILE)), tasks)


def find_overlap(runtime: Runtime, target_set: Artifact, loaded: Artifact) -> Artifact:
    """Return an artifact whose `overlap.jsonl` lists the target rows with a prompt equal or similar to one in the pool.

    Prints a warning if there are such target rows: a method could select the similar rows of the pool, which would make
    the method's result look better than it is.
    """

    def make(folder: Path) -> Mapping[str, Any]:
        targets = target_set_of(target_set)
        matches = overlap(targets.examples, pool_of(loaded))
        with (folder / OVERLAP_FILE).open("w", encoding="ascii") as stream:
            for place, example, shared in matches:
                match = {"task": targets.tasks[place], "target_row": targets.examples[place].row_index}
                stream.write(json.dumps(match | {"row": example.row_index, "shared": shared}) + "\n")
        return {"rows": len(targets.examples), "overlapping": len({place for place, _, _ in matches})}

    made = runtime.store.obtain(
        "overlap", target_set.path.name, {}, [target_set, loaded], make, version=OVERLAP_VERSION, light=True
    )
    if made.info["overlapping"]:
        lines = made.file(OVERLAP_FILE).read_text(encoding="ascii").splitlines()
        first = ", ".join(str(json.loads(line)["row"]) for line in lines[:_NAMED])
        runtime.display.say(
            f"  warning: {made.info['overlapping']} of {made.info['rows']} target rows have the same or a similar "
            f"prompt as a row of the data (row {first}{', ...' if len(lines) > _NAMED else ''}; all in "
            f"{made.file(OVERLAP_FILE)}), so results would be too good; take other target rows"
        )
    return made


def overlap(
    targets: Sequence[Example], pool: Sequence[Example], alike: float = _ALIKE
) -> list[tuple[int, Example, str]]:
    """Return all pairs of a target row and a pool example with similar prompts, in the order of the target rows.

    Prompts are similar if the Jaccard similarity of their word triples, ignoring case, is at least `alike`. The
    comparison is exact: no pair of similar prompts is missed.

    Returns:
        Tuples (position of the target row, example, relation). The relation is `prompt and response` if both are equal,
        `prompt` if only the prompts are equal, otherwise `similar prompt`.
    """
    own = [_prompt_shingles(target) for target in targets]
    holders: dict[tuple[str, ...], list[int]] = {}
    for place, shingles in enumerate(own):
        for shingle in shingles:
            holders.setdefault(shingle, []).append(place)
    matches = []
    for example in pool:
        other = _prompt_shingles(example)
        common = Counter(place for shingle in other for place in holders.get(shingle, ()))
        for place, count in common.items():
            if count >= alike * (len(other) + len(own[place]) - count):
                target, shared = targets[place], "similar prompt"
                if target.history == example.history and dedup.prompt_texts(target) == dedup.prompt_texts(example):
                    shared = "prompt and response" if target.output == example.output else "prompt"
                matches.append((place, example, shared))
    return sorted(matches, key=lambda match: (match[0], match[1].row_index))


def warn_of_leak(runtime: Runtime, target_set: Artifact, asked: Set[tuple[str, str]]) -> None:
    """Print a warning if target rows are questions of the benchmark.

    `asked` holds the (instruction, input) of each question of the benchmark.
    """
    targets = target_set_of(target_set).examples
    if leaked := sum((target.instruction.strip(), target.input.strip()) in asked for target in targets):
        runtime.display.say(
            f"  warning: {leaked} of {len(targets)} target rows are questions of the benchmark too, so its results "
            "would be too good; take other target rows (target_set), or other benchmark.sets"
        )


def _prompt_shingles(example: Example) -> dedup.Shingles:
    return dedup.shingles_of([text.casefold() for text in dedup.prompt_texts(example)])
