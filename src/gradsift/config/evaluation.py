"""Options of benchmarks, of the generation of answers, of judges and of the audit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from gradsift.config.checks import Group, each_once, endpoint_address, one_of, option, require_secrets_elsewhere
from gradsift.config.data import EMBEDDED, TERSE
from gradsift.config.machine import ComputeConfig
from gradsift.config.models import ModelConfig
from gradsift.errors import ConfigError

MATCHES = ("exact", "number", "choice")
_WEEK = 604_800  # seconds, the longest wait that can be set; much longer waits overflow Python's timers


@dataclass
class BenchmarkSetConfig:
    """One benchmark: where its questions are, and which fields hold their parts (`a.b`: the field b inside a)."""

    path: str | None = None  # a local JSON or JSONL file; used instead of `url`
    url: str | None = None  # address of the file, which is downloaded at first use
    id: str | None = None  # field of the item's id; null: the row number is the id
    rows: str | None = None  # key of the rows in a JSON file whose object has several keys
    instruction: str = "instruction"  # field of the question
    input: str | None = None  # field of further text of the question; null: none
    second_turn: str | None = None  # field of a question that is asked after the answer to the first
    reference: str | None = None  # field of the reference answer, for judge=verifier, accuracy and other metrics
    reference_after: str | None = None  # text in the reference field after which the answer begins, such as ####
    match: str = "exact"  # how an answer is compared with the reference (see gradsift.evaluation.matching)
    file: str | None = None  # path of the local copy within `benchmark.folder`; null: the last part of `url`


def _benchmark_set(name: str, entry: Any) -> BenchmarkSetConfig:
    if isinstance(entry, BenchmarkSetConfig):
        return entry
    known = [f.name for f in dataclasses.fields(BenchmarkSetConfig)]
    for key, value in entry.items():
        if key not in known:
            raise ConfigError(f"benchmark.catalog.{name}.{key} is not known; an entry has {', '.join(known)}")
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"benchmark.catalog.{name}.{key}={value!r} must be text")
    benchmark = BenchmarkSetConfig(**entry)
    one_of(f"benchmark.catalog.{name}.match", benchmark.match, MATCHES)
    if benchmark.reference_after is not None and benchmark.reference is None:
        raise ConfigError(
            f"benchmark.catalog.{name}.reference_after={benchmark.reference_after!r} has no field to look in; name it "
            f"with benchmark.catalog.{name}.reference=FIELD"
        )
    return benchmark


@dataclass
class BenchmarkConfig(Group, option="benchmark", schema="benchmark"):
    """Which questions the finetuned models answer, and how."""

    sets: list[str] = field(default_factory=list)  # names of sets in the catalogue
    # sets answered before and after the finetune, to measure forgetting
    general: list[str] = field(default_factory=list)
    catalog: dict[str, Any] = field(default_factory=dict)  # the known sets by name, each a `BenchmarkSetConfig`
    upstream: str | None = None  # base address of the files of the published test sets, for use in `catalog`
    upstream_bbh: str | None = None  # base address of the files of BIG-Bench-Hard, for use in `catalog`
    folder: str | None = None  # folder with local copies of the files, used instead of every `url`
    limit: int | None = option(None, least=1)  # number of items taken from the start of each set; null: all
    max_new_tokens: int = option(512, least=1)  # largest number of tokens of an answer
    batch_size: int = option(16, least=1)  # number of answers generated together
    wordnet_dir: str | None = None  # folder with the files of WordNet 3.x, for METEOR; null: no METEOR
    lm_eval_tasks: list[str] = field(default_factory=list)  # tasks of lm-eval, answered before and after the finetune
    lm_eval_folder: str | None = None  # folder with the YAML files of your own lm-eval tasks, and with their data

    def check(self) -> None:
        self.catalog = {name: _benchmark_set(name, entry) for name, entry in self.catalog.items()}
        known = [EMBEDDED, TERSE, *self.catalog]
        each_once("benchmark.sets", self.sets, f"; known: {', '.join(known)}")
        for key in ("general", "lm_eval_tasks"):
            if names := getattr(self, key):
                each_once(f"benchmark.{key}", names)
        for name in [*self.sets, *self.general]:
            if name not in known:
                key = "sets" if name in self.sets else "general"
                raise ConfigError(
                    f"benchmark.{key} names {name!r}, not in benchmark.catalog; known: {', '.join(known)}"
                )
        if self.lm_eval_folder is not None and not self.lm_eval_tasks:
            raise ConfigError(
                f"benchmark.lm_eval_folder={self.lm_eval_folder} holds tasks, but benchmark.lm_eval_tasks names none"
            )
        if both := [name for name in self.general if name in self.sets]:
            raise ConfigError(
                f"benchmark.general={both} is in benchmark.sets too, which the untuned target answers in any case; "
                "name it in one of the two"
            )
        if bare := self.without_reference(self.general):
            raise ConfigError(
                f"benchmark.general={bare} has no reference answers, with which forgetting is measured; name their "
                f"field with benchmark.catalog.{bare[0]}.reference=FIELD, or take other sets"
            )
        if self.wordnet_dir is not None and not self.general and self.without_reference(self.sets) == list(self.sets):
            raise ConfigError(
                f"benchmark.wordnet_dir is for METEOR, which needs reference answers, but benchmark.sets="
                f"{list(self.sets)} have none; name their field with benchmark.catalog.{self.sets[0]}.reference=FIELD"
            )

    def without_reference(self, names: list[str]) -> list[str]:
        """Return the sets among `names` that have no reference answers."""
        return [n for n in names if n not in (EMBEDDED, TERSE) and self.catalog[n].reference is None]

    def match_of(self, name: str) -> str:
        """Return the rule by which answers to the set `name` are compared with the reference answers."""
        return self.catalog[name].match if name in self.catalog else "exact"  # exact for the embedded world's sets


_RESERVED = {  # parameters that judge.extra_body must not hold, and the remedy
    "messages": "which contains the judge's prompt; leave it out",
    "model": "which has an option of its own: judge.model",
    "stream": "but replies are not streamed; leave it out",
    "n": "but only one reply per request is read; leave it out",
    "max_tokens": "which has options of its own: judge.max_tokens and judge.token_parameter",
    "max_completion_tokens": "which has options of its own: judge.max_tokens and judge.token_parameter",
}


@dataclass
class JudgeConfig(Group, option="judge"):
    """A judge scores each of the two answers of a pair. Every pair is judged twice, once with each answer first."""

    name: str = MISSING
    # confidence level of the interval of the pairwise winning score (PWS)
    confidence: float = option(0.95, above=0, below=1)


@dataclass
class VerifierJudgeConfig(JudgeConfig, schema="verifier"):
    """Gives an answer the score 1 if it matches the reference answer by the benchmark's rule (`match`), else 0."""


@dataclass
class LocalJudgeConfig(JudgeConfig, schema="local"):
    """Shows a local model two answers, A and B, and asks which is better.

    The scores come from the model's log-probabilities of the tokens A and B as its reply.

    With a small model, this judge only checks that the pipeline runs: its judgments mean nothing.
    """

    model: ModelConfig = MISSING
    max_length: int = option(2048, least=16)  # largest number of tokens of question and answers; longer answers are cut
    batch_size: int = option(8, least=1)  # number of pairs that pass through the model together


@dataclass
class EndpointOptions(Group):
    """How requests are sent to an OpenAI-compatible endpoint, and what they may cost."""

    # address of the endpoint; null: the environment variable OPENAI_BASE_URL or, if unset, the OpenAI client's default
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"  # environment variable that holds the key; the key is never in the config
    timeout: float = option(60.0, above=0, most=_WEEK)  # longest time of a request, in seconds
    # largest number of retries of a failed request, each after a backoff or after the endpoint's Retry-After
    retries: int = option(5, least=0)
    # longest wait before a retry, in seconds; if Retry-After asks for a longer wait, the run ends
    max_wait: float = option(120.0, least=0, most=_WEEK)
    give_up: int = option(10, least=1)  # number of failed requests in a row that ends the run
    concurrency: int = option(4, least=1)  # number of requests sent at the same time
    price_input: float | None = option(None, least=0)  # USD per million prompt tokens; null: unknown
    price_output: float | None = option(None, least=0)  # USD per million reply tokens; null: unknown
    # cap on a stage's cost in USD, resumed runs included; needs price_input and price_output
    max_usd: float | None = option(None, above=0)
    max_calls: int | None = option(None, least=1)  # cap on a stage's requests, resumed runs included

    def check(self) -> None:
        super().check()
        group = self._option
        if self.base_url:
            endpoint_address(f"{group}.base_url", self.base_url, self.api_key_env)
        if (self.price_input is None) != (self.price_output is None):
            raise ConfigError(f"give both {group}.price_input and {group}.price_output, or neither")
        if self.max_usd is not None and self.price_input is None:
            raise ConfigError(
                f"{group}.max_usd={self.max_usd:g} needs {group}.price_input and {group}.price_output (USD per million "
                f"tokens); give them, or cap the requests with {group}.max_calls"
            )


@dataclass
class EndpointJudgeConfig(EndpointOptions, JudgeConfig):
    """Options of a judge that is a model at an OpenAI-compatible endpoint: address, requests, prices and caps.

    The options that hold mappings have the type Any, because Hydra adds no keys to an option whose type is a mapping.
    """

    # number of unreadable replies in a row that ends the run; null: unreadable replies never end it
    give_up_unreadable: int | None = option(10, least=1)
    # name of the parameter of a request that limits the tokens of the reply
    token_parameter: str = option("max_tokens", choices=("max_tokens", "max_completion_tokens"))
    system_role: bool = True  # false: the text of the system message is put at the start of the user's message
    extra_body: Any = None  # mapping of parameters that are added to each request; null as a value removes a parameter
    extra_headers: Any = None  # mapping of HTTP headers; env:NAME is the value of an environment variable
    extra_query: Any = None  # mapping of query parameters of the address, such as Azure's api-version
    dry_run: bool = False  # print the number and the estimated cost of the requests, then end without sending them

    def check(self) -> None:
        super().check()
        for name in ("extra_body", "extra_headers", "extra_query"):
            value = getattr(self, name) or {}
            if not isinstance(value, dict):
                raise ConfigError(
                    f"judge.{name}={value!r} is not a mapping; give it as in judge.{name}={{NAME: VALUE}}"
                )
            if name != "extra_body":
                require_secrets_elsewhere(f"judge.{name}", value)
        if reserved := [name for name in _RESERVED if name in (self.extra_body or {})]:
            raise ConfigError(f"judge.extra_body holds {reserved[0]}, {_RESERVED[reserved[0]]}")


@dataclass
class OpenaiJudgeConfig(EndpointJudgeConfig, schema="openai"):
    """A judge that is a model at an OpenAI-compatible endpoint, with a prompt and a parser of its replies.

    The default prompt is the paper's, which asks for scores from 1 to 10.
    """

    model: str = "gpt-4o"  # name of the model at the endpoint
    temperature: float | None = option(0.0, least=0)  # sampling temperature; null: not sent
    max_tokens: int = option(256, least=1)  # largest number of tokens of a reply
    # how scores are read from a reply; legacy: by the published rule, but an unreadable reply is invalid and not a tie
    parse: str = option("tolerant", choices=("strict", "tolerant", "legacy", "verdict", "json"))
    system: str | None = None  # text before question and answers; null: that of the 1-10 protocol
    task: str | None = None  # text after question and answers; null: that of the 1-10 protocol


@dataclass
class AlpacaEvalJudgeConfig(EndpointJudgeConfig, schema="alpaca_eval"):
    """One of alpaca_eval's annotators as the judge. It judges every pair twice, once with each answer first."""

    # name of an annotator of the package, or the folder or file of your own annotator
    annotators: str = "weighted_alpaca_eval_gpt4_turbo"
    model: str | None = None  # name of the model at the endpoint; null: the annotator's model
    max_tokens: int | None = option(None, least=1)  # largest number of tokens of a reply; null: the annotator's number

    def check(self) -> None:
        super().check()
        # imported here, since only this judge reads files that the config names
        from gradsift.evaluation.judges.annotators import read_annotator

        foreign = read_annotator(self.annotators).base_url
        if foreign:
            endpoint_address(f"judge.annotators={self.annotators}: client_kwargs.base_url", foreign, self.api_key_env)
        # an OpenAI key must not be sent to an address from an annotator's file
        if foreign and not self.base_url and self.api_key_env == EndpointJudgeConfig.api_key_env:
            raise ConfigError(
                f"judge.annotators={self.annotators} asks {foreign}; name the environment variable with "
                "its key by judge.api_key_env=NAME, or another endpoint by judge.base_url=URL"
            )


def require_trained(judge: JudgeConfig) -> None:
    """Raise ConfigError for a judge with random weights, whose judgments mean nothing."""
    if isinstance(judge, LocalJudgeConfig) and judge.model.kind == "tiny_bytes":
        raise ConfigError("judge.model.kind=tiny_bytes has random weights and cannot judge; take another judge")


@dataclass
class CompareConfig(Group):
    """The options of `gradsift.evaluation.compare`.

    Only these few of a run's options are composed, because composing all options of a run would take 0.3 s longer.
    """

    benchmark: BenchmarkConfig = field(default_factory=lambda: BenchmarkConfig(sets=[EMBEDDED]))
    judge: JudgeConfig = MISSING
    compute: ComputeConfig = MISSING
    artifacts: str = option("artifacts", folder=True)

    def check(self) -> None:
        require_trained(self.judge)


@dataclass
class GeneratorConfig(Group, option="generator", schema="local"):
    """Where answers are generated: in this process (`local`), or by an endpoint."""

    name: str = "local"


@dataclass
class EndpointGeneratorConfig(EndpointOptions, GeneratorConfig, schema="endpoint"):
    """An OpenAI-compatible server generates the answers.

    The server must serve a tuned target under the name of the target's artifact in the store.
    """

    model: str | None = None  # name of the untuned target on the server; null: target.model.path
    # what is sent. tokens: token ids, encoded with the target's template, to the completions API; chat: messages, to
    # which the server applies its own template
    prompt: str = option("tokens", choices=("tokens", "chat"))
    # command that starts a server and takes the arguments of `vllm serve`; each stage that generates answers runs it on
    # this machine, with the adapter. Empty: the server at `base_url` is used
    serve: list[str] = field(default_factory=list)
    serve_arguments: list[str] = field(default_factory=list)  # further arguments of `serve`
    start_timeout: float = option(1800.0, above=0, most=_WEEK)  # seconds within which the started server must answer

    def check(self) -> None:
        super().check()
        if self.serve and self.base_url:
            raise ConfigError(
                f"generator.serve={self.serve} starts a server, but generator.base_url={self.base_url} names a running "
                "one; give generator.serve=[] to use the running server"
            )
        if not self.serve and not self.base_url:
            raise ConfigError(f"generator={self.name} needs the address of a server: generator.base_url=URL")


@dataclass
class AuditConfig(Group, option="audit"):
    """The noise audit: how well a scorer keeps known corruption out of the selection (gradsift.selection.audit)."""

    enabled: bool = False  # compare the scores with known corruption
    alphas: list[float] = option([0.05, 0.1, 0.15], above=0, most=1)  # values of alpha at which the audit selects
    clusters: int = option(30, least=2)  # number of clusters of prompts, used as task families if the data has none

    def check(self) -> None:
        each_once("audit.alphas", self.alphas)
