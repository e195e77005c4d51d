"""The config of a whole run, checks that involve several config groups, and the conversion from Hydra's config."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from gradsift.config.checks import SCHEMAS, Group, one_of, option
from gradsift.config.data import EMBEDDED, NO_TARGET_SET, TERSE, DataConfig, TargetSetConfig, VerifiableTargetSetConfig
from gradsift.config.evaluation import (
    AlpacaEvalJudgeConfig,
    AuditConfig,
    BenchmarkConfig,
    CompareConfig,
    GeneratorConfig,
    JudgeConfig,
    LocalJudgeConfig,
    require_trained,
)
from gradsift.config.machine import ComputeConfig, ExportConfig, TrackerConfig
from gradsift.config.methods import FacilityLocationConfig, GsnrDirectionConfig, PublishedConfig
from gradsift.config.models import (
    EmbedderConfig,
    FeaturesConfig,
    ModelConfig,
    ProxyConfig,
    SentenceTransformersConfig,
    TargetConfig,
)
from gradsift.errors import ConfigError, first_line
from gradsift.names import require_name
from gradsift.sources import asked_by

STAGES = ("load", "statistics", "scores", "selection", "finetune", "generate", "judge")
OBJECTIVES = {"pws": "judge", "accuracy": "generate", "heldout_loss": "finetune"}  # results, and their stages
SCORES_BY_TASK = ("less", "rds_plus", "sbert")  # scorers that give a score for each task of the target set
BASELINES = ("full", "random", "random_clean")  # scorers that data.scores does not replace
OF_PROXY = {  # sources (inputs of scorers and selectors) that are computed with the proxy, whichever embedder is used
    *("statistics", "late_losses", "answer_losses", "directions", "embedding_gradients"),
    *("gradients", "target_gradients", "backbone", "proxy_inputs"),
}
Root = TypeVar("Root", "Config", CompareConfig)


@dataclass
class Config(Group):
    """All options of a run."""

    data: DataConfig = MISSING
    target_set: TargetSetConfig = MISSING
    proxy: ProxyConfig = MISSING
    embedder: EmbedderConfig = MISSING
    features: FeaturesConfig = MISSING
    scorer: Any = MISSING  # a ScorerConfig, or the mapping of a user's own scorer
    selector: Any = MISSING  # a SelectorConfig, or the mapping of a user's own selector
    target: TargetConfig = MISSING
    benchmark: BenchmarkConfig = MISSING
    judge: JudgeConfig = MISSING
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    tracker: TrackerConfig = MISSING
    compute: ComputeConfig = MISSING
    export: ExportConfig = field(default_factory=ExportConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    alpha: float = option(0.1, above=0, most=1)  # share of the rows to select
    # the rows of which alpha is a share. accepted: all rows of the pool; scored: the rows with a score
    budget_base: str = option("accepted", choices=("accepted", "scored"))
    seed: int = option(0, least=0)  # seed of the proxy ensemble and of the target
    # the stage after which the run ends: load, statistics, scores, selection, finetune, generate or judge; null:
    # the run makes all stages
    stop_after: str | None = None
    plan: bool = False  # only show which stages are done and which are still to do
    # the result that a search (hydra/sweeper=optuna) optimises
    objective: str = option("pws", choices=tuple(OBJECTIVES))
    artifacts: str = option("artifacts", folder=True)  # the store, where all runs keep and find results of stages
    report: bool = True  # write report.html at the end of a run, or one for all jobs of a sweep

    def check(self) -> None:
        if self.stop_after is not None:
            one_of("stop_after", self.stop_after, STAGES)
        if self.data.scores is not None and self.scorer_name not in BASELINES:
            self.scorer = PublishedConfig()
        self._check_names()
        self._check_ensemble()
        self._check_selector()
        self._check_embedded_parts()
        self._check_models()
        self._check_target_set()
        self._check_outputs()
        if self.has_rater:
            self.check_rater()

    @property
    def scorer_name(self) -> str:
        """The name of the scorer, which is one of gradsift's or a user's own."""
        return str(_option_of(self.scorer, "name"))

    @property
    def selector_name(self) -> str:
        """The name of the selector, which is one of gradsift's or a user's own."""
        return str(_option_of(self.selector, "name"))

    @property
    def models(self) -> list[ModelConfig]:
        """The models that the run certainly uses, among proxy, target and local judge.

        With a user's own scorer the proxy is left out, because the scorer may not need it.
        """
        models = [self.proxy.model] if self._needs_proxy and self._asked(self.scorer) is not None else []
        models += [self.target.model] if self.reaches("finetune") else []
        judges = self.has_rater or self._judges
        return [*models, self.judge.model] if judges and isinstance(self.judge, LocalJudgeConfig) else models

    @property
    def has_rater(self) -> bool:
        """Whether the judge grades single examples for the scorer.

        False for a user's own scorer, whose inputs are not known yet.
        """
        return self.reaches("scores") and "rater" in (self._asked(self.scorer) or ())

    def reaches(self, stage: str) -> bool:
        """Return whether a run with this config includes `stage`."""
        return self.stop_after is None or STAGES.index(stage) <= STAGES.index(self.stop_after)

    def check_objective(self) -> None:
        """Raise ConfigError if a search with Optuna has plan=true, or if its jobs end before the objective is known."""
        if self.plan:
            raise ConfigError(
                "plan=true cannot show a search, whose jobs depend on earlier results; plan one job or a sweep"
            )
        if not self.reaches(OBJECTIVES[self.objective]):
            raise ConfigError(
                f"objective={self.objective} is known after {OBJECTIVES[self.objective]}, but "
                f"stop_after={self.stop_after}; take a later stage, or another objective"
            )

    def check_rater(self) -> None:
        """Raise ConfigError if the judge cannot rate single examples of this run's data."""
        reason = "compares two answers" if isinstance(self.judge, AlpacaEvalJudgeConfig) else ""
        if self.judge.name == "verifier" and not self._is_embedded:
            reason = f"knows the right answers of data={EMBEDDED} only"
        if reason:
            raise ConfigError(
                f"scorer={self.scorer_name} needs a judge that can rate one example of data={self.data.name}, and "
                f"judge={self.judge.name} {reason}; choose judge=openai or judge=local"
            )
        require_trained(self.judge)

    @staticmethod
    def _asked(method: Any) -> frozenset[str] | None:
        """Return the names of the inputs of a scorer or selector.

        None for a user's own scorer or selector, whose code is read later.
        """
        return asked_by(str(_option_of(method, "_target_")))

    @property
    def _is_embedded(self) -> bool:
        return self.data.name == EMBEDDED

    @property
    def _selects(self) -> bool:
        """Whether the run uses a selector; scorer=full needs none, since it keeps all rows."""
        return self.reaches("selection") and self.scorer_name != "full"

    @property
    def _judges(self) -> bool:
        """Whether the run judges pairs of answers; with scorer=full both answers would be from the same model."""
        return self.reaches("judge") and self.scorer_name != "full"

    @property
    def _needs_proxy(self) -> bool:
        """Whether the run uses the proxy. A user's own scorer is assumed to use it, a user's own selector is not."""
        if not self.reaches("scores"):
            return self.stop_after == "statistics"
        with_proxy = set(OF_PROXY)
        if not isinstance(self.embedder, SentenceTransformersConfig):
            with_proxy |= {"embeddings", "target_embeddings"}
        scorer, selector = self._asked(self.scorer), self._asked(self.selector)
        if scorer is None or scorer & with_proxy:
            return True
        return self._selects and selector is not None and bool(selector & with_proxy)

    def _check_names(self) -> None:
        """Check the names that become parts of paths.

        Also check that every option of a user's own scorer or selector has a value.
        """
        for group in ("scorer", "selector"):
            method = getattr(self, group)
            for constant, value in method.items() if isinstance(method, dict) else ():
                if value == MISSING:
                    raise ConfigError(f"{group}.{constant} is not set; give it as in {group}.{constant}=VALUE")
        require_name("scorer.name", self.scorer_name)
        require_name("selector.name", self.selector_name)
        for group in ("data", "target_set", "proxy", "embedder", "features", "target", "generator", "judge"):
            require_name(f"{group}.name", getattr(self, group).name)
        for name in self.benchmark.catalog:
            require_name("benchmark.catalog", name)

    def _check_ensemble(self) -> None:
        divides = self.scorer_name in ("gsnr", "gsnr_variance_normalized")
        divides |= isinstance(self.scorer, GsnrDirectionConfig) and self.scorer.weigh == "gsnr"
        if divides and self.proxy.members < 2:
            raise ConfigError(
                f"scorer={self.scorer_name} divides by a variance over members, but proxy.members="
                f"{self.proxy.members}; give at least 2 (the paper has 5)"
            )
        if self.proxy.shard is not None and self.stop_after != "statistics":
            raise ConfigError(
                f"proxy.shard={self.proxy.shard} collects one of {self.proxy.shards} shards and then ends, but "
                f"stop_after={self.stop_after}; add stop_after=statistics, or leave proxy.shard empty (null)"
            )

    def _check_selector(self) -> None:
        selector = self.selector
        if isinstance(selector, FacilityLocationConfig) and self.reaches("selection"):
            shares = {"alpha": self.alpha, "audit.alphas": max(self.audit.alphas) if self.audit.enabled else 0.0}
            name = max(shares, key=lambda each: shares[each])
            if self.budget_base == "accepted" and selector.candidates < shares[name]:
                raise ConfigError(
                    f"selector.candidates={selector.candidates} gives fewer candidates than {name}={shares[name]} "
                    f"selects; raise selector.candidates, or lower {name} below it"
                )
        # for a user's own scorer, the selector checks whether there are scores per task
        without_tasks = self._asked(self.scorer) is not None and self.scorer_name not in SCORES_BY_TASK
        if self._selects and self.selector_name == "round_robin" and without_tasks:
            raise ConfigError(
                f"selector=round_robin takes turns between tasks, but scorer={self.scorer_name} gives no score "
                f"per task; choose scorer={', '.join(SCORES_BY_TASK)} with a target_set, or selector=topk"
            )

    def _check_embedded_parts(self) -> None:
        """Check that models, target set and benchmarks of the embedded world are used only with its data.

        With this data, a nano target must not answer other benchmarks, since the nano model knows only the words of the
        embedded world.
        """
        # a user's own set may hold only the embedded world's words; published sets, which have a URL, hold other words
        asked = [*self.benchmark.sets, *self.benchmark.general]
        embedded_sets = [name for name in asked if name in (EMBEDDED, TERSE)]
        foreign_sets = [name for name in asked if name not in embedded_sets and self.benchmark.catalog[name].url]
        foreign_sets += [] if self.benchmark.lm_eval_folder else self.benchmark.lm_eval_tasks
        if self._is_embedded:
            if self.reaches("generate") and self.target.model.kind == "nano" and foreign_sets:
                raise ConfigError(
                    f"target=nano knows the embedded world's words alone and cannot answer {foreign_sets}; "
                    "take benchmark=verifiable or another target"
                )
            return
        foreign = []
        if isinstance(self.target_set, VerifiableTargetSetConfig):
            foreign.append("target_set=verifiable (choose target_set=json target_set.path=FILE)")
        if self.proxy.model.kind == "nano" and self._needs_proxy:
            foreign.append("proxy=nano (choose proxy=smollm2 or proxy=gpt2, or to test a setup proxy=tiny_bytes)")
        if self.reaches("finetune") and self.target.model.kind == "nano":
            foreign.append("target=nano (choose target=smollm2 or target=llama2_7b, or stop_after=selection)")
        if self.reaches("generate") and EMBEDDED in self.benchmark.sets:
            foreign.append("benchmark=verifiable (choose benchmark=vicuna, or stop_after=selection)")
        elif self.reaches("generate") and embedded_sets:
            foreign.append(f"benchmark sets {embedded_sets} (take them out of benchmark.sets and benchmark.general)")
        if foreign:
            raise ConfigError(f"data={self.data.name} does not go with the embedded world's {'; '.join(foreign)}")

    def _check_models(self) -> None:
        """Check that models with random weights are used only for scores.

        Also check that no other option rules out a quantised model, and that judge=verifier has reference answers.
        """
        if self.reaches("finetune"):
            model = self.target.model
            if model.kind == "tiny_bytes":
                raise ConfigError(
                    "target.model.kind=tiny_bytes has random weights, so its answers mean nothing; take another "
                    "target, or stop_after=selection"
                )
            refused = f"target.quantization={model.quantization} does not go with"
            if model.quantization != "none" and self.compute.strategy == "fsdp":
                raise ConfigError(f"{refused} compute=fsdp, which divides float weights; take compute=ddp")
            if model.quantization != "none" and self.reaches("generate") and self.generator.name != "local":
                name = self.generator.name
                raise ConfigError(f"{refused} generator={name}, which reads the model's files; take generator=local")
        full_gradients = self._needs_proxy and self.features.gradient_params == "full"
        if full_gradients and self.proxy.model.quantization != "none":
            raise ConfigError(
                f"proxy.quantization={self.proxy.model.quantization} does not go with features.gradient_params=full: "
                "quantised weights have no gradient; take features.gradient_params=lora"
            )
        if self.reaches("judge"):
            require_trained(self.judge)
        bare = self.benchmark.without_reference(self.benchmark.sets)
        if self._judges and self.judge.name == "verifier" and bare:
            raise ConfigError(
                f"judge=verifier needs reference answers, which benchmark.sets={bare} do not have; choose judge=openai "
                "or judge=local"
            )

    def _check_target_set(self) -> None:
        methods = {f"scorer={self.scorer_name}": self.scorer} if self.reaches("scores") else {}
        methods |= {f"selector={self.selector_name}": self.selector} if self._selects else {}
        for name, method in methods.items():
            towards_target = any(source.startswith("target_") for source in self._asked(method) or ())
            if towards_target and type(self.target_set) is TargetSetConfig:  # the schema of target_set=none
                raise ConfigError(NO_TARGET_SET.format(method=name))

    def _check_outputs(self) -> None:
        """Check that the run reaches the stages whose results it exports or audits.

        Also check that the data of an audit has known corruption.
        """
        ends = f"stop_after={self.stop_after}"
        if (self.export.formats or self.export.push_to_hub) and not self.reaches("selection"):
            raise ConfigError(f"export writes the selection, but {ends}; take stop_after=selection or a later stage")
        if self.export.merged and not self.reaches("finetune"):
            raise ConfigError(
                f"export.merged=true writes the finetuned target, but {ends}; take stop_after=finetune or a later stage"
            )
        if not self.audit.enabled:
            return
        if not self.reaches("selection"):
            raise ConfigError(f"audit.enabled=true measures selections, but {ends}; take stop_after=selection")
        if not self.data.corruption.share and not getattr(self.data, "spoilt", 0):
            raise ConfigError(
                f"audit.enabled=true compares scores with known corruption, but data={self.data.name} has none; add "
                "some, as in data.corruption.share=0.3"
            )


def _option_of(method: Any, option: str) -> Any:
    """Return the value of an option of `method`; "unnamed" if `method` is a mapping without this option.

    `method` is a dataclass or, for a user's own scorer or selector, a mapping.
    """
    return method.get(option, "unnamed") if isinstance(method, dict) else getattr(method, option)


def load_config(composed: DictConfig) -> Config:
    """Convert the composed config of a run into a checked `Config`; see `load_root`."""
    return load_root(composed, Config)


def load_root(composed: DictConfig, kind: type[Root]) -> Root:
    """Convert a composed config into an instance of the dataclass `kind`, whose values are checked.

    Raises:
        ConfigError: an option is missing, unknown or has a value that cannot be used.
    """
    try:
        config = OmegaConf.to_object(composed)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} is not set; give it as in {error.full_key}=VALUE") from error
    except OmegaConfBaseException as error:
        reason = first_line(error)
        if match := re.search(r"Environment variable '(\w+)' not found", reason):
            reason = f"the environment variable {match[1]} is not set; the header of the YAML file describes its value"
        raise ConfigError(reason) from error
    if not isinstance(config, kind):
        raise ConfigError(f"the config is not a {kind.__name__}; the first default of its YAML file must be the schema")
    _require_known("", config)
    return config


def _require_known(option: str, value: Any) -> None:
    """Raise ConfigError for an unknown option added with `+` or `++`, which would have no effect."""
    if not dataclasses.is_dataclass(value):
        return
    known = [field.name for field in dataclasses.fields(value)]
    for name, each in vars(value).items():
        if name not in known:
            raise ConfigError(f"{option}{name} is no option; known: {', '.join(known)}")
        _require_known(f"{option}{name}.", each)


def dump_config(config: Config) -> dict[str, Any]:
    """Return the values of a config as a nested dict, and the name of each group's schema, for `restore_config`."""
    kinds = {group: type(getattr(config, group, None)) for group in SCHEMAS}
    schemas = {group: name for group in SCHEMAS for name, kind in SCHEMAS[group].items() if kind is kinds[group]}
    return {"schemas": schemas, "values": dataclasses.asdict(config)}


def restore_config(dumped: Any) -> Config:
    """Return the checked config from which `dump_config` made `dumped`.

    Raises:
        ConfigError: `dumped` does not describe a config, or was written by a version of gradsift with other options.
    """
    if not isinstance(dumped, dict) or not all(isinstance(dumped.get(part), dict) for part in ("schemas", "values")):
        raise ConfigError("this run's config has no readable schemas and values; give another run, or its options")
    try:
        composed = OmegaConf.structured(Config)
        for group, schema in dumped["schemas"].items():
            composed[group] = OmegaConf.structured(SCHEMAS[group][schema])
        return load_config(OmegaConf.merge(composed, dumped["values"]))  # type: ignore[arg-type]
    except (KeyError, TypeError, OmegaConfBaseException) as error:
        raise ConfigError(f"this run's config cannot be read by this version of gradsift ({error})") from error
