"""Options of the data and of the target set. Some methods select rows for the tasks of the target set."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gradsift.config.checks import Group, each_once, option
from gradsift.errors import ConfigError, first_line
from gradsift.names import LONGEST_NAME, slug

EMBEDDED = "verifiable"  # name of the dataset and of the benchmark of the embedded world, a generated toy task
TERSE = "verifiable_terse"  # benchmark: questions in the form of the nano models' pretraining, to measure forgetting
COPIES = ("exact_duplicate", "near_duplicate")
CORRUPTIONS = ("wrong_answer", "mismatched_answer", "truncated", "garbled", *COPIES)
DATA_FORMATS = ("auto", "alpaca", "messages", "sharegpt", "prompt_completion")
NO_TARGET_SET = (
    "target_set=none, and {method} selects towards a target set; give target_set=json target_set.path=FILE, or "
    "target_set=gsm8k, bbh or (for data=verifiable) verifiable"
)


@dataclass
class FieldsConfig:
    """Names of the columns that hold the parts of an example. Other common names are also recognised (docs/data.md)."""

    instruction: str = "instruction"  # column of the prompt
    input: str | None = "input"  # column of further text of the prompt; the data may lack this column; null: none
    output: str = "output"  # column of the response
    messages: str = "messages"  # column of the turns: [{"role": ..., "content": ...}, ...]
    conversations: str = "conversations"  # column of the turns in ShareGPT data: [{"from": ..., "value": ...}, ...]
    prompt: str = "prompt"  # column of a prompt that is a text or a list of turns
    completion: str = "completion"  # column of the response to `prompt`
    system: str | None = "system"  # column of the system prompt; the data may lack this column; null: none
    # column of earlier exchanges [[user, assistant], ...]; the data may lack this column; null: none
    history: str | None = "history"


@dataclass
class CorruptionConfig(Group, option="data.corruption"):
    """Corruption of a share of the rows, to audit scorers. No scorer but random_clean sees which rows are corrupted."""

    # share of the rows (after `limit`) to corrupt, divided equally among the kinds; duplicates are added to the rows
    share: float = option(0.0, least=0, below=1)
    kinds: list[str] = option(list(CORRUPTIONS), choices=CORRUPTIONS)  # kinds of corruption, each named once
    seed: int = option(0, least=0)  # seed of the corruption

    def check(self) -> None:
        each_once("data.corruption.kinds", self.kinds, f"; known: {', '.join(CORRUPTIONS)}")


@dataclass
class DataConfig(Group, option="data"):
    """Options of every dataset."""

    name: str = MISSING
    # use at most this many rows, drawn at random with `seed` and kept in the order of the file; null: all rows
    limit: int | None = option(None, least=1)
    holdout: int = option(0, least=0)  # number of rows set aside before selection, to measure the held-out loss
    # seed of the draws for `limit` and `holdout`, of a mixture's sample, and of the embedded world
    seed: int = option(0, least=0)
    # which repeated rows are dropped. exact: rows whose texts equal those of an earlier row; near: also rows that share
    # most of their words with an earlier, kept row
    dedup: str = option("none", choices=("none", "exact", "near"))
    # for dedup=near: rows are near duplicates if the Jaccard similarity of their word triples is at least this
    dedup_threshold: float = option(0.8, least=0.5, most=1)
    corruption: CorruptionConfig = field(default_factory=CorruptionConfig)
    # file written by `gradsift scores`. Its scores replace those of the scorer (unless the scorer is full, random or
    # random_clean); rows without a score in the file are rejected
    scores: str | None = None

    def check(self) -> None:
        if self.scores is not None and self.corruption.share:
            raise ConfigError(
                "data.scores has no score of a corrupted text; give either data.scores or data.corruption.share"
            )


def _check_paths(option: str, value: Any) -> None:
    """Raise ConfigError unless the value is a path or a list of paths."""
    paths = value if isinstance(value, list) else [value]
    if not paths or not all(isinstance(path, str) and path for path in paths):
        raise ConfigError(f"{option}={value!r} names no file; give a path, or a list as in {option}=[A,B]")


def _check_id(option: str, id: str) -> None:
    """Raise ConfigError unless `id` has the form of a hub dataset's name, such as OWNER/NAME."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", id):
        raise ConfigError(
            f"{option}={id} is no name of a hub dataset; give it as OWNER/NAME, or take data=json data.path=FILE"
        )


@dataclass
class JsonDataConfig(DataConfig, schema="json"):
    """Local files: .json, .jsonl, .csv, .tsv (each also with .gz or .zst), .parquet or .arrow."""

    # a file, a list of files, a pattern as in 'folder/*.jsonl', a folder of shards, a folder written by
    # `datasets.save_to_disk`, or `-` for JSON rows from standard input
    path: Any = MISSING
    format: str = option("auto", choices=DATA_FORMATS)  # auto: the format of the first row whose columns fit one
    fields: FieldsConfig = field(default_factory=FieldsConfig)

    def check(self) -> None:
        super().check()
        _check_paths("data.path", self.path)


@dataclass
class HubDataConfig(DataConfig, schema="hub"):
    """A dataset of the Hugging Face hub."""

    name: str = ""  # empty: made from the id and the subset
    id: str = MISSING  # OWNER/NAME on the hub
    subset: str | None = None  # name of a subset (config) of the dataset; null: the only one
    # commit of the dataset on the hub; null: the commit that is current at first use, which the store then keeps
    revision: str | None = None
    split: str = "train"  # split of the dataset
    format: str = option("auto", choices=DATA_FORMATS)  # auto: the format of the first row whose columns fit one
    fields: FieldsConfig = field(default_factory=FieldsConfig)
    streaming: bool = False  # read only the first `limit` + `holdout` rows, for datasets that do not fit on the disk

    def check(self) -> None:
        super().check()
        _check_id("data.id", self.id)
        if self.streaming and self.limit is None:
            raise ConfigError("data.streaming=true needs the number of rows to read, as in data.limit=10000")
        self.name = self.name or slug("-".join(filter(None, (self.id, self.subset))))[:LONGEST_NAME]


@dataclass
class SourceConfig(Group, option="data.sources.NAME"):
    """One source of a mixture: local files, or a dataset of the hub."""

    path: Any = None  # local files, as data.path of data=json; give either path or id
    id: str | None = None  # a dataset of the hub, as data.id of data=hub
    subset: str | None = None  # as data.subset of data=hub
    revision: str | None = None  # as data.revision of data=hub
    split: str = "train"  # split of the hub's dataset
    weight: float | None = option(None, above=0)  # relative share of the mixture; null: all rows of the source
    format: str = option("auto", choices=DATA_FORMATS)  # as data.format
    fields: FieldsConfig = field(default_factory=FieldsConfig)

    def check(self) -> None:
        if (self.path is None) == (not self.id):
            raise ConfigError(
                f"a source of data.sources has path={self.path} and id={self.id}; give one of the two, as in "
                "{code: {path: FILE}}"
            )
        if self.id:
            _check_id("data.sources.NAME.id", self.id)
        else:
            _check_paths("data.sources.NAME.path", self.path)


@dataclass
class MixtureDataConfig(DataConfig, schema="mixture"):
    """Several sources as one dataset: all of their rows, or a sample in proportion to the sources' weights."""

    # the options of each source by its name, as in
    # 'data.sources={code: {path: code.jsonl, weight: 1}, chat: {id: OWNER/NAME, weight: 3}}'
    sources: Any = MISSING
    source_column: str = "source"  # name of a column that is added and holds the name of each row's source

    def check(self) -> None:
        super().check()
        if not isinstance(self.sources, dict) or not self.sources:
            raise ConfigError(
                f"data.sources={self.sources!r} names no sources; give them as in "
                "'data.sources={code: {path: FILE}, chat: {id: OWNER/NAME}}'"
            )
        sources = {}
        for name, entry in self.sources.items():
            try:  # OmegaConf checks the names and types of the source's options
                source: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SourceConfig), entry))
            except (OmegaConfBaseException, ValueError, TypeError) as error:
                example = "give a source as in {path: FILE} or {id: ID}"
                raise ConfigError(f"data.sources.{name}: {first_line(error)}; {example}") from error
            sources[str(name)] = source
        self.sources = sources
        unweighted = [name for name, source in self.sources.items() if source.weight is None]
        if unweighted and len(unweighted) < len(self.sources):
            raise ConfigError(
                f"data.sources.{unweighted[0]}.weight is not set, but others are; give every source a weight, or none"
            )


@dataclass
class VerifiableDataConfig(DataConfig, schema="verifiable"):
    """Generated examples of the embedded world, a toy task whose answers can be checked exactly."""

    size: int = option(3000, least=1)  # number of rows
    spoilt: float = option(0.5, least=0, below=1)  # share of the rows that are spoilt, in equal parts in four ways
    duplicates: float = option(0.06, least=0, below=1)  # share of the rows that are exact or near duplicates
    # share of the tasks that chain two named operations; half as many further tasks show what one named operation does
    delayed: float = option(0.0, least=0, most=0.5)
    benchmark_items: int = option(780, least=1)  # number of held-out questions

    def check(self) -> None:
        super().check()
        if self.holdout:
            raise ConfigError(
                "data.holdout must be 0 with data=verifiable, whose benchmark already consists of held-out questions"
            )


@dataclass
class TargetSetConfig(Group, option="target_set", schema="target_set"):
    """Examples of what the finetuned model should be good at, grouped into tasks.

    Some methods select the rows that should help most with these tasks.
    """

    name: str = MISSING
    limit: int | None = option(None, least=1)  # at most this many rows per task, drawn with `seed`
    seed: int = option(0, least=0)  # seed of the draw for `limit`


@dataclass
class FilesTargetSetConfig(TargetSetConfig, schema="files"):
    """Target rows from files: one file per task, or one file with a column that names each row's task."""

    path: str | None = None  # a local file, or a folder with local copies of the files in `urls`; replaces `urls`
    urls: dict[str, str] = field(default_factory=dict)  # address of each task's file, which is downloaded at first use
    task: str | None = None  # column that names a row's task; null: all rows of a file are one task
    rows: str | None = None  # key of the rows in a .json file whose object has several keys
    format: str = option("auto", choices=DATA_FORMATS)  # as data.format
    fields: FieldsConfig = field(default_factory=FieldsConfig)

    def check(self) -> None:
        if not self.path and not self.urls:
            raise ConfigError("target_set.path is empty; name a file with rows of what the model should be good at")


@dataclass
class VerifiableTargetSetConfig(TargetSetConfig, schema="verifiable_tasks"):
    """Questions of the embedded world with their right answers.

    No question is in `data=verifiable` or in its benchmark.
    """

    tasks: list[str] = field(default_factory=lambda: ["sort", "reverse"])  # families (kinds of task) of the world
    limit: int | None = option(20, least=1)  # rows per task

    def check(self) -> None:
        each_once("target_set.tasks", self.tasks)
        if self.limit is None:
            raise ConfigError("target_set.limit is empty; the embedded world needs the number of rows per task")
