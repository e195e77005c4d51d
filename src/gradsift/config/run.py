"""Everything that a run depends on, and the checks across groups."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from gradsift.config.checks import Group, option
from gradsift.config.data import (
    EMBEDDED,
    NO_TARGET_SET,
    TERSE,
    DataConfig,
    FilesTargetSetConfig,
    TargetSetConfig,
    VerifiableDataConfig,
    VerifiableTargetSetConfig,
)
from gradsift.config.evaluation import (
    AlpacaEvalJudgeConfig,
    AuditConfig,
    BenchmarkConfig,
    GeneratorConfig,
    JudgeConfig,
    require_trained,
)
from gradsift.config.export import ExportConfig
from gradsift.config.machine import ComputeConfig, TrackerConfig
from gradsift.config.methods import FacilityLocationConfig, GsnrDirectionConfig, PublishedConfig
from gradsift.config.models import (
    EmbedderConfig,
    FeaturesConfig,
    ModelConfig,
    ProxyConfig,
    SentenceTransformersConfig,
    TargetConfig,
)
from gradsift.errors import ConfigError
from gradsift.names import require_name
from gradsift.signatures import asked_by

STAGES = ("load", "statistics", "scores", "selection", "finetune", "generate", "judge")
OBJECTIVES = {"pws": "judge", "accuracy": "generate", "heldout_loss": "finetune"}  # and the stage that computes each
SCORES_BY_TASK = ("less", "rds_plus", "sbert")  # scorers that give a score for each task of the target set
BASELINES = ("full", "random", "random_clean")  # scorers that data.scores does not replace
_EMBEDDINGS = {"embeddings", "target_embeddings"}
OF_PROXY = {  # sources (inputs of scorers and selectors) that are computed with the proxy, whatever the embedder
    *("statistics", "late_losses", "answer_losses", "directions", "embedding_gradients"),
    *("gradients", "target_gradients", "backbone", "proxy_inputs"),
}


def _name_of(method: Any) -> str:
    return str(method.get("name", "unnamed") if isinstance(method, dict) else method.name)


@dataclass
class Config(Group):
    """Everything that a run depends on."""

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
    alpha: float = option(0.1, above=0, most=1)  # share of the rows that is selected
    # the rows of which alpha is a share: all accepted rows, or those that were scored
    budget_base: str = option("accepted", choices=("accepted", "scored"))
    seed: int = option(0, least=0)  # seed of the proxy ensemble and of the target
    stop_after: str | None = None  # the stage after which the run ends; null: the last one
    plan: bool = False  # only show which stages are done and which are still to do
    objective: str = option("pws", choices=tuple(OBJECTIVES))  # what a search optimises (hydra/sweeper=optuna)
    artifacts: str = "artifacts"  # folder of the store, which keeps the results of stages for all runs
    report: bool = True  # write report.html at the end of a run, or one for all jobs of a sweep

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stop_after is not None and self.stop_after not in STAGES:
            raise ConfigError(f"stop_after={self.stop_after!r} is not known; choose one of: {', '.join(STAGES)}")
        if self.data.scores is not None and self.scorer_name not in BASELINES:
            self.scorer = PublishedConfig()
        self._check_names()
        self._check_ensemble()
        self._check_candidates()
        self._check_turns()
        self._check_embedded_parts()
        self._check_random_weights()
        self._check_quantization()
        self._check_target_set()
        self._check_export()
        if self.audit.enabled:
            self._check_audit()
        if self.has_rater:
            self.check_rater()
        if self.reaches("judge") and self.scorer_name != "full":  # full would be compared with itself
            self._check_judge()

    @property
    def scorer_name(self) -> str:
        """The name of the scorer, which may be a user's own."""
        return _name_of(self.scorer)

    @property
    def selector_name(self) -> str:
        """The name of the selector, which may be a user's own."""
        return _name_of(self.selector)

    @property
    def models(self) -> list[ModelConfig]:
        """The models that the run is sure to compute with: proxy, target and local judge, as far as they are needed.

        With a user's own scorer the proxy is left out, because that scorer may not need it.
        """
        models = [self.proxy.model] if self._needs_proxy and self._asked(self.scorer) is not None else []
        models += [self.target.model] if self.reaches("finetune") else []
        judge = getattr(self.judge, "model", None)
        judges = self.has_rater or (self.reaches("judge") and self.scorer_name != "full")
        return [*models, judge] if judges and isinstance(judge, ModelConfig) else models

    @property
    def has_rater(self) -> bool:
        """Whether the judge grades single examples for the scorer; False for a user's own scorer."""
        return self.reaches("scores") and "rater" in (self._asked(self.scorer) or ())

    def reaches(self, stage: str) -> bool:
        """Return whether a run with this config includes `stage`."""
        return self.stop_after is None or STAGES.index(stage) <= STAGES.index(self.stop_after)

    def check_objective(self) -> None:
        """Raise ConfigError if a search has plan=true, or if its jobs end before the objective is computed."""
        if self.plan:
            raise ConfigError("plan=true shows no search, whose jobs follow from results; plan one job, or a sweep")
        if not self.reaches(OBJECTIVES[self.objective]):
            raise ConfigError(
                f"objective={self.objective} is known after {OBJECTIVES[self.objective]}, but "
                f"stop_after={self.stop_after}; take a later stage, or another objective"
            )

    @staticmethod
    def _asked(method: Any) -> frozenset[str] | None:
        """Return the inputs that a scorer or selector asks for; None for a user's own, which is inspected later."""
        target = method.get("_target_", "") if isinstance(method, dict) else method._target_
        return asked_by(str(target))

    @property
    def _selects(self) -> bool:
        """Whether the run uses a selector; scorer=full needs none."""
        return self.reaches("selection") and self.scorer_name != "full"

    @property
    def _needs_proxy(self) -> bool:
        """Whether the run uses the proxy. A user's own scorer is assumed to use it, a user's own selector is not."""
        if not self.reaches("scores"):
            return self.stop_after == "statistics"
        with_proxy = set(OF_PROXY)
        if not isinstance(self.embedder, SentenceTransformersConfig):
            with_proxy |= _EMBEDDINGS
        scorer, selector = self._asked(self.scorer), self._asked(self.selector)
        if scorer is None or scorer & with_proxy:
            return True
        return self._selects and selector is not None and bool(selector & with_proxy)

    def _check_names(self) -> None:
        """Check the names that become parts of paths, in the store or in a sweep's folder."""
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
                f"scorer={self.scorer.name} divides by a variance over members, but proxy.members="
                f"{self.proxy.members}; give at least 2 (the paper has 5)"
            )
        if self.proxy.shard is not None and self.stop_after != "statistics":
            raise ConfigError(
                f"proxy.shard={self.proxy.shard} collects one of {self.proxy.shards} shards and ends there, but "
                f"stop_after={self.stop_after}; add stop_after=statistics, or leave proxy.shard empty (null)"
            )

    def _check_target_set(self) -> None:
        if isinstance(self.target_set, FilesTargetSetConfig | VerifiableTargetSetConfig):
            return
        methods = {f"scorer={self.scorer_name}": self.scorer} if self.reaches("scores") else {}
        methods |= {f"selector={self.selector_name}": self.selector} if self._selects else {}
        for name, method in methods.items():
            if any(source.startswith("target_") for source in self._asked(method) or ()):
                raise ConfigError(NO_TARGET_SET.format(method=name))

    def _check_export(self) -> None:
        if (self.export.formats or self.export.push_to_hub) and not self.reaches("selection"):
            raise ConfigError(
                f"export is of the selection, but stop_after={self.stop_after}; take stop_after=selection or a later "
                "stage"
            )
        if self.export.merged and not self.reaches("finetune"):
            raise ConfigError(
                f"export.merged=true writes the finetuned target, but stop_after={self.stop_after}; take "
                "stop_after=finetune or a later stage"
            )

    def _check_candidates(self) -> None:
        if not isinstance(self.selector, FacilityLocationConfig) or not self.reaches("selection"):
            return
        if self.budget_base != "accepted":
            return
        name, most = "alpha", self.alpha
        if self.audit.enabled and max(self.audit.alphas) > self.alpha:
            name, most = "audit.alphas", max(self.audit.alphas)
        if self.selector.candidates < most:
            raise ConfigError(
                f"selector.candidates={self.selector.candidates} lets fewer examples enter than {name}={most} "
                f"selects; raise selector.candidates, or lower {name} below it"
            )

    def _check_turns(self) -> None:
        """Check that round_robin gets scores by task; the scores of a user's own scorer are checked by the selector."""
        known = self._asked(self.scorer) is not None
        if self._selects and self.selector_name == "round_robin" and known and self.scorer_name not in SCORES_BY_TASK:
            raise ConfigError(
                f"selector=round_robin takes turns between tasks, and scorer={self.scorer_name} gives no score "
                f"per task; choose scorer={', '.join(SCORES_BY_TASK)} with a target_set, or selector=topk"
            )

    def _check_embedded_parts(self) -> None:
        """Check that the embedded world's models, target set and benchmarks go with the run's data and benchmark."""
        # a user's own set may hold only the embedded world's words; published sets, which have a URL, hold other words
        asked = [*self.benchmark.sets, *self.benchmark.general]
        embedded_sets = [name for name in asked if name in (EMBEDDED, TERSE)]
        foreign_sets = [name for name in asked if name not in embedded_sets and self.benchmark.catalog[name].url]
        foreign_sets += [] if self.benchmark.lm_eval_folder else self.benchmark.lm_eval_tasks
        if self.reaches("generate") and self.target.model.kind == "nano" and foreign_sets and self._is_embedded:
            raise ConfigError(
                f"target=nano knows the embedded world's words alone and cannot answer {foreign_sets}; "
                "take benchmark=verifiable or another target"
            )
        if self._is_embedded:
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

    def _check_random_weights(self) -> None:
        """Check that a model with random weights is used for scoring only: its answers and judgments mean nothing."""
        if self.reaches("finetune") and self.target.model.kind == "tiny_bytes":
            raise ConfigError(
                "target.model.kind=tiny_bytes has random weights, so no answer of it means anything; "
                "take another target, or stop_after=selection"
            )
        if self.reaches("judge"):
            require_trained(self.judge)

    def _check_quantization(self) -> None:
        target = f"target.quantization={self.target.model.quantization} does not go with "
        of_target = self.target.model.quantization != "none" and self.reaches("finetune")
        if of_target and self.compute.strategy == "fsdp":
            raise ConfigError(f"{target}compute=fsdp, which divides float weights; take compute=ddp")
        if of_target and self.generator.name != "local" and self.reaches("generate"):
            raise ConfigError(
                f"{target}generator={self.generator.name}, which answers with the weights of the model's files; take "
                "generator=local"
            )
        of_proxy = self.proxy.model.quantization != "none" and self._needs_proxy
        if of_proxy and self.features.gradient_params == "full":
            raise ConfigError(
                f"proxy.quantization={self.proxy.model.quantization} does not go with features.gradient_params=full: "
                "quantised weights have no gradient; take features.gradient_params=lora"
            )

    def _check_audit(self) -> None:
        if not self.reaches("selection"):
            raise ConfigError(
                f"audit.enabled looks at selections, but stop_after={self.stop_after}; take stop_after=selection"
            )
        spoilt = self.data.spoilt if isinstance(self.data, VerifiableDataConfig) else 0.0
        if not self.data.corruption.share and not spoilt:
            raise ConfigError(
                f"audit.enabled compares scores with known corruption, of which data={self.data.name} has none; inject "
                "some with data.corruption.share, as in data.corruption.share=0.3"
            )

    def check_rater(self) -> None:
        """Raise ConfigError for a judge that cannot rate single examples of this run's data."""
        name = self.judge.name
        if isinstance(self.judge, AlpacaEvalJudgeConfig):
            raise ConfigError(f"scorer={self.scorer_name} needs a judge that can rate one example; judge={name} cannot")
        if name == "verifier" and not self._is_embedded:
            raise ConfigError(
                f"judge=verifier knows the right answers of data={EMBEDDED} alone and cannot rate "
                f"data={self.data.name} for scorer={self.scorer_name}; choose judge=openai or judge=local"
            )
        model = getattr(self.judge, "model", None)
        if isinstance(model, ModelConfig) and model.kind == "tiny_bytes":
            raise ConfigError("judge.model.kind=tiny_bytes has random weights and cannot rate; take another judge")

    @property
    def _is_embedded(self) -> bool:
        return self.data.name == EMBEDDED

    def _check_judge(self) -> None:
        if self.judge.name != "verifier":
            return
        if bare := self.benchmark.without_reference(self.benchmark.sets):
            raise ConfigError(
                f"judge=verifier needs reference answers, which benchmark.sets={bare} do not have; "
                "choose judge=openai or judge=local"
            )
