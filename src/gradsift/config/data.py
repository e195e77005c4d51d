"""The data, and the target set that some methods select towards."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from gradsift.config.checks import at_least, one_of
from gradsift.errors import ConfigError

EMBEDDED = "verifiable"  # the name of the embedded data and of its benchmark


TERSE = "verifiable_terse"  # its skills in the form in which the nano models learnt them: what a finetune may forget


COPIES = ("exact_duplicate", "near_duplicate")


CORRUPTIONS = ("wrong_answer", "mismatched_answer", "truncated", "garbled", *COPIES)


@dataclass
class FieldsConfig:
    """Names of the columns that hold the parts of an example; other names in use are recognised (docs/data.md)."""

    instruction: str = "instruction"
    input: str | None = "input"  # may be missing from the data; null: no column
    output: str = "output"
    messages: str = "messages"  # [{"role": ..., "content": ...}, ...]
    conversations: str = "conversations"  # ShareGPT: [{"from": ..., "value": ...}, ...]
    prompt: str = "prompt"
    completion: str = "completion"
    system: str | None = "system"  # the system prompt, may be missing from the data; null: no column
    history: str | None = "history"  # earlier exchanges [[user, assistant], ...], may be missing; null: no column


@dataclass
class CorruptionConfig:
    """Known corruption, injected to audit scorers: labels say which rows, and no scorer sees them."""

    share: float = 0.0  # of the rows, after `limit`; parts of equal size for each kind, duplicates on top of the rows
    kinds: list[str] = field(default_factory=lambda: list(CORRUPTIONS))
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ConfigError(
                f"data.corruption.share={self.share} is no share; give a number from 0 (none) to below 1, as in 0.3"
            )
        for kind in self.kinds:
            one_of("data.corruption.kinds", kind, CORRUPTIONS)
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ConfigError(
                f"data.corruption.kinds={list(self.kinds)} must name at least one kind, and each once; known: "
                f"{', '.join(CORRUPTIONS)}"
            )
        at_least("data.corruption.seed", self.seed, 0)


@dataclass
class DataConfig:
    """What every dataset has."""

    name: str = MISSING
    limit: int | None = None  # at most this many rows, drawn with `seed`; the order of the file is kept
    holdout: int = 0  # rows set aside before selection, for the held-out loss
    seed: int = 0  # sampling for `limit` and `holdout`; the embedded world's content
    dedup: str = "none"  # exact: equal texts; near: also texts that share most of their words. The first row stays
    dedup_threshold: float = 0.8  # Jaccard similarity of word triples from which rows are near duplicates
    corruption: CorruptionConfig = field(default_factory=CorruptionConfig)

    def __post_init__(self) -> None:
        one_of("data.dedup", self.dedup, ("none", "exact", "near"))
        if not 0.5 <= self.dedup_threshold <= 1:
            raise ConfigError(
                f"data.dedup_threshold={self.dedup_threshold} is out of range; give a Jaccard similarity from 0.5 "
                "(half of the word triples in common) to 1"
            )
        at_least("data.limit", self.limit, 1)
        at_least("data.holdout", self.holdout, 0)
        at_least("data.seed", self.seed, 0)


DATA_FORMATS = ("auto", "alpaca", "messages", "sharegpt", "prompt_completion")


@dataclass
class JsonDataConfig(DataConfig):
    """A local file: .json, .jsonl, .csv, .tsv (each also with .gz) or .parquet."""

    path: str = MISSING
    format: str = "auto"  # auto: decided by the columns of the first row that fits a format
    fields: FieldsConfig = field(default_factory=FieldsConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("data.format", self.format, DATA_FORMATS)


@dataclass
class HubDataConfig(DataConfig):
    """A dataset of the Hugging Face hub."""

    id: str = MISSING
    revision: str | None = None  # a commit; when empty the one that is current at first use, for this store
    split: str = "train"
    format: str = "auto"
    fields: FieldsConfig = field(default_factory=FieldsConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("data.format", self.format, DATA_FORMATS)


@dataclass
class VerifiableDataConfig(DataConfig):
    """The embedded world: generated examples with exactly checkable answers."""

    size: int = 2000
    spoilt: float = 0.5  # share of the rows that are spoilt, over four kinds
    duplicates: float = 0.06  # share of the rows that are exact or near duplicates
    delayed: float = 0.0  # share of the tasks that can be learnt only after others (half as many) are
    benchmark_items: int = 390

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("data.size", self.size, 1)
        at_least("data.benchmark_items", self.benchmark_items, 1)
        if self.holdout:
            raise ConfigError(
                "data.holdout has no use for data=verifiable: its benchmark is the held-out set; leave it 0"
            )
        for option, share in (("data.spoilt", self.spoilt), ("data.duplicates", self.duplicates)):
            if not 0 <= share < 1:
                raise ConfigError(f"{option}={share} is no share; give a number from 0 to below 1")
        if not 0 <= self.delayed <= 0.5:
            raise ConfigError(f"data.delayed={self.delayed} is out of range; give a share from 0 (none) to 0.5")


NO_TARGET_SET = (
    "target_set=none, and {method} selects towards a target set; give target_set=json target_set.path=FILE, or "
    "target_set=gsm8k, bbh or (for data=verifiable) verifiable"
)


@dataclass
class TargetSetConfig:
    """Examples of what the finetuned model shall be good at, in tasks; for the methods that select towards them."""

    name: str = MISSING
    limit: int | None = None  # at most this many rows a task, drawn with `seed`; their order is kept
    seed: int = 0

    def __post_init__(self) -> None:
        at_least("target_set.limit", self.limit, 1)
        at_least("target_set.seed", self.seed, 0)


@dataclass
class FilesTargetSetConfig(TargetSetConfig):
    """Target rows from files: one a task, or one whose column names each row's task."""

    path: str | None = None  # a local file, or a folder that holds the files of `urls`; wins over `urls`
    urls: dict[str, str] = field(default_factory=dict)  # task: address of its file, fetched once at run time
    task: str | None = None  # column that names a row's task; one file is one task when empty
    rows: str | None = None  # key that holds the rows where a .json file has other things beside them
    format: str = "auto"
    fields: FieldsConfig = field(default_factory=FieldsConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("target_set.format", self.format, DATA_FORMATS)
        if not self.path and not self.urls:
            raise ConfigError("target_set.path is empty; name a file with rows of what the model shall be good at")


@dataclass
class VerifiableTargetSetConfig(TargetSetConfig):
    """Right answers of the embedded world, to questions that its dataset and its benchmark do not ask."""

    tasks: list[str] = field(default_factory=lambda: ["sort", "reverse"])  # families of the embedded world
    limit: int | None = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"target_set.tasks={list(self.tasks)} must name at least one family, and each once")
        if self.limit is None:
            raise ConfigError("target_set.limit is empty; the embedded world needs the number of rows a task")
