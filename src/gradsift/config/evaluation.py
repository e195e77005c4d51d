"""Benchmarks, judges and the audit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from gradsift.config.checks import at_least, endpoint_address, one_of, positive
from gradsift.config.data import EMBEDDED, TERSE
from gradsift.config.models import ModelConfig
from gradsift.errors import ConfigError

MATCHES = ("exact", "number", "choice")
_LONGEST = 604_800  # seconds; of waits of centuries Python makes an OverflowError


@dataclass
class BenchmarkSetConfig:
    """One benchmark: where its questions are and which (dotted) fields hold the parts."""

    path: str | None = None  # a local JSON or JSONL file; wins over `url`
    url: str | None = None  # fetched once at run time
    id: str | None = None  # the row number when empty
    rows: str | None = None  # key that holds the rows where a JSON file has other things beside them
    instruction: str = "instruction"
    input: str | None = None
    reference: str | None = None  # the reference answer, for judge=verifier, accuracy and the metrics
    reference_after: str | None = None  # text in that field behind which the reference answer stands, as ####
    match: str = "exact"  # how an answer is compared with the reference (see gradsift.evaluation.matching)
    file: str | None = None  # its place below `benchmark.folder`; the last part of `url` when empty


def _benchmark_set(name: str, entry: Any) -> BenchmarkSetConfig:
    if isinstance(entry, BenchmarkSetConfig):
        return entry
    known = [f.name for f in dataclasses.fields(BenchmarkSetConfig)]
    for key, value in entry.items():
        if key not in known:
            raise ConfigError(f"benchmark.catalog.{name}.{key} is not known; an entry has {', '.join(known)}")
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"benchmark.catalog.{name}.{key}={value!r} must be text")
    found = BenchmarkSetConfig(**entry)
    one_of(f"benchmark.catalog.{name}.match", found.match, MATCHES)
    if found.reference_after is not None and found.reference is None:
        raise ConfigError(
            f"benchmark.catalog.{name}.reference_after={found.reference_after!r} has no field to look in; name it with "
            f"benchmark.catalog.{name}.reference=FIELD"
        )
    return found


@dataclass
class BenchmarkConfig:
    """Which questions the finetuned models answer, and how."""

    sets: list[str] = field(default_factory=list)
    general: list[str] = field(default_factory=list)  # sets answered before and after the finetune: is it forgotten?
    catalog: dict[str, Any] = field(default_factory=dict)  # name: BenchmarkSetConfig, or its fields
    upstream: str | None = None  # base addresses that the catalog's entries may refer to
    upstream_bbh: str | None = None
    folder: str | None = None  # local copies, below it by each set's `file`; wins over every `url`
    limit: int | None = None  # the first items of each set
    max_new_tokens: int = 512
    batch_size: int = 16
    wordnet_dir: str | None = None  # WordNet 3.x's own files, for METEOR, which is left out when empty
    lm_eval_tasks: list[str] = field(default_factory=list)  # names in lm-eval, answered before and after the finetune
    lm_eval_folder: str | None = None  # YAML files of tasks beside lm-eval's own, with their data

    def __post_init__(self) -> None:
        at_least("benchmark.limit", self.limit, 1)
        at_least("benchmark.max_new_tokens", self.max_new_tokens, 1)
        at_least("benchmark.batch_size", self.batch_size, 1)
        if not self.sets:
            raise ConfigError("benchmark.sets is empty; name at least one, as in benchmark.sets=[vicuna]")
        self.catalog = {name: _benchmark_set(name, entry) for name, entry in self.catalog.items()}
        for option, kind in (("sets", "set"), ("general", "set"), ("lm_eval_tasks", "task")):
            names = list(getattr(self, option))
            if len(set(names)) < len(names):
                raise ConfigError(f"benchmark.{option}={names} names a {kind} twice; name each once")
        for option, name in [("sets", n) for n in self.sets] + [("general", n) for n in self.general]:
            if name not in (EMBEDDED, TERSE) and name not in self.catalog:
                known = ", ".join([EMBEDDED, TERSE, *self.catalog])
                raise ConfigError(
                    f"benchmark.{option} names {name!r}, which benchmark.catalog does not hold; known: {known}"
                )
        if self.lm_eval_folder is not None and not self.lm_eval_tasks:
            raise ConfigError(
                f"benchmark.lm_eval_folder={self.lm_eval_folder} holds tasks, and benchmark.lm_eval_tasks names none"
            )
        self._check_references()

    def _check_references(self) -> None:
        if both := [name for name in self.general if name in self.sets]:
            raise ConfigError(
                f"benchmark.general={both} stands in benchmark.sets too, where the untouched target answers it anyway; "
                "name it in one of them"
            )
        if bare := self.without_reference(self.general):
            raise ConfigError(
                f"benchmark.general={bare} has no reference answers, and forgetting is measured by them; name their "
                f"field with benchmark.catalog.{bare[0]}.reference=FIELD, or take other sets"
            )
        if self.wordnet_dir is not None and not self.general and self.without_reference(self.sets) == list(self.sets):
            raise ConfigError(
                f"benchmark.wordnet_dir is for METEOR, which needs reference answers, and benchmark.sets="
                f"{list(self.sets)} have none; name their field with benchmark.catalog.{self.sets[0]}.reference=FIELD"
            )

    def without_reference(self, names: list[str]) -> list[str]:
        """Those sets among `names` that have no reference answers."""
        return [n for n in names if n not in (EMBEDDED, TERSE) and self.catalog[n].reference is None]

    def match_of(self, name: str) -> str:
        """How answers to the set `name` are compared with the reference."""
        entry = self.catalog.get(name)  # the embedded world's sets stand in no catalogue
        return "exact" if entry is None else str(entry.match)


@dataclass
class JudgeConfig:
    """A judge gives each answer of a pair a score; every pair is judged in both orders."""

    name: str = MISSING
    bootstrap: int = 2000  # resamples of the items for the PWS interval
    confidence: float = 0.95

    def __post_init__(self) -> None:
        at_least("judge.bootstrap", self.bootstrap, 1)
        if not 0 < self.confidence < 1:
            raise ConfigError(f"judge.confidence={self.confidence} must lie between 0 and 1")


@dataclass
class VerifierJudgeConfig(JudgeConfig):
    """Grades an answer 1 if it equals the reference answer, else 0."""


@dataclass
class LocalJudgeConfig(JudgeConfig):
    """Compares the log-probability of A and B under a local model: a plumbing check for small models."""

    model: ModelConfig = MISSING
    max_length: int = 2048
    batch_size: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("judge.max_length", self.max_length, 16)
        at_least("judge.batch_size", self.batch_size, 1)


@dataclass
class EndpointJudgeConfig(JudgeConfig):
    """How a judge behind an OpenAI-compatible endpoint is reached and paid."""

    base_url: str | None = None  # the client's own default when empty
    api_key_env: str = "OPENAI_API_KEY"  # name of the variable; the key itself never enters the config
    timeout: float = 60.0  # seconds a request
    retries: int = 5  # of a request that failed, with exponential backoff; the endpoint's Retry-After is heeded
    max_wait: float = 120.0  # seconds; a longer Retry-After ends the run, to be gone on with later
    give_up: int = 10  # so many requests in a row that failed for good end the run
    concurrency: int = 4  # requests at a time
    dry_run: bool = False  # say what would be sent and what it would cost, and end there
    price_input: float | None = None  # USD a million prompt tokens; unknown when empty
    price_output: float | None = None  # USD a million reply tokens
    max_usd: float | None = None  # spending cap of one stage, over all its runs; needs both prices
    max_calls: int | None = None  # the same, in requests

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("judge.retries", self.retries, 0)
        at_least("judge.max_wait", self.max_wait, 0)
        at_least("judge.give_up", self.give_up, 1)
        at_least("judge.concurrency", self.concurrency, 1)
        if self.base_url:
            endpoint_address("judge.base_url", self.base_url, self.api_key_env)
        positive("judge.timeout", self.timeout)
        for name in ("timeout", "max_wait"):
            if (seconds := getattr(self, name)) > _LONGEST:
                raise ConfigError(f"judge.{name}={seconds:g} is more than {_LONGEST:,} seconds, a week; give less")
        self._check_money()

    def _check_money(self) -> None:
        at_least("judge.price_input", self.price_input, 0)
        at_least("judge.price_output", self.price_output, 0)
        at_least("judge.max_calls", self.max_calls, 1)
        if self.max_usd is not None:
            positive("judge.max_usd", self.max_usd)
        if (self.price_input is None) != (self.price_output is None):
            raise ConfigError("give both judge.price_input and judge.price_output, or neither")
        if self.max_usd is not None and self.price_input is None:
            raise ConfigError(
                f"judge.max_usd={self.max_usd:g} needs judge.price_input and judge.price_output (USD a million "
                "tokens); give them, or cap the requests with judge.max_calls"
            )


@dataclass
class OpenaiJudgeConfig(EndpointJudgeConfig):
    """The paper's 1-10 protocol on any OpenAI-compatible endpoint."""

    model: str = "gpt-4o"
    temperature: float = 0.0
    max_tokens: int = 256
    parse: str = "tolerant"  # how scores are read; legacy: the published rule, which makes an unread reply a tie

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("judge.max_tokens", self.max_tokens, 1)
        at_least("judge.temperature", self.temperature, 0)
        one_of("judge.parse", self.parse, ("strict", "tolerant", "legacy"))


@dataclass
class AlpacaEvalJudgeConfig(EndpointJudgeConfig):
    """One of alpaca_eval's annotators, asked in both orders."""

    annotators: str = "weighted_alpaca_eval_gpt4_turbo"  # a shipped one, or the folder (or file) of one's own
    model: str | None = None  # the annotator's own when empty
    max_tokens: int | None = None  # likewise

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("judge.max_tokens", self.max_tokens, 1)
        # imported here: the package of judges imports this one
        from gradsift.evaluation.judges.annotators import read_annotator

        foreign = read_annotator(self.annotators).base_url
        if foreign:
            endpoint_address(f"judge.annotators={self.annotators}: client_kwargs.base_url", foreign, self.api_key_env)
        # OpenAI's key is for OpenAI, not for whatever address stands in a file
        if foreign and not self.base_url and self.api_key_env == EndpointJudgeConfig.api_key_env:
            raise ConfigError(
                f"judge.annotators={self.annotators} asks {foreign}; name the environment variable that holds a key "
                "for it with judge.api_key_env=NAME, or another endpoint with judge.base_url=URL"
            )


@dataclass
class AuditConfig:
    """How well the scorer keeps known corruption out (see selection/audit.py)."""

    enabled: bool = False
    alphas: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.15])  # shares selected for the audit alone
    clusters: int = 30  # of the prompts, where the data has no families

    def __post_init__(self) -> None:
        at_least("audit.clusters", self.clusters, 2)
        if not self.alphas or len(set(self.alphas)) < len(self.alphas):
            raise ConfigError(f"audit.alphas={list(self.alphas)} must name at least one share, and each once")
        for alpha in self.alphas:
            if not 0 < alpha <= 1:
                raise ConfigError(f"audit.alphas holds {alpha}, which is no share; give numbers above 0 and up to 1")
