"""Everything that a run depends on, and the checks across groups."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from gradsift.config.bounds import require_bounds
from gradsift.config.checks import at_least, one_of
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
from gradsift.config.evaluation import AuditConfig, BenchmarkConfig, JudgeConfig
from gradsift.config.machine import ComputeConfig, TrackerConfig
from gradsift.config.methods import (
    FacilityLocationConfig,
    GsnrDirectionConfig,
    LengthConfig,
    ScorerConfig,
)
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

STAGES = ("load", "statistics", "scores", "selection", "finetune", "generate", "judge")


SCORES_BY_TASK = ("less", "rds_plus", "sbert")  # scorers with a score for each task of the target set
OBJECTIVES = {"pws": "judge", "accuracy": "generate", "heldout_loss": "finetune"}  # and the stage that gives each
RATERS = ("verifier", "local", "openai")  # judges that can grade one example
# what asks for nothing of the proxy, or only for its embeddings, which another embedder may make (a test holds each)
WITHOUT_PROXY = ("random", "full", "llm_rating")
TOWARDS_TARGET = {"scorer": ("less", "g2is", "rds_plus", "sbert"), "selector": ("gradient_walk", "round_robin_queries")}
BY_EMBEDDINGS = ("rds_plus", "sbert", "facility_location", "repr_filter", "clusters", "round_robin_queries")


@dataclass
class Config:
    """Everything that a run depends on."""

    data: DataConfig = MISSING
    target_set: TargetSetConfig = MISSING
    proxy: ProxyConfig = MISSING
    embedder: EmbedderConfig = MISSING
    features: FeaturesConfig = MISSING
    scorer: Any = MISSING  # an open set: see ScorerConfig
    selector: Any = MISSING  # an open set: see SelectorConfig
    target: TargetConfig = MISSING
    benchmark: BenchmarkConfig = MISSING
    judge: JudgeConfig = MISSING
    tracker: TrackerConfig = MISSING
    compute: ComputeConfig = MISSING
    audit: AuditConfig = field(default_factory=AuditConfig)
    alpha: float = 0.1  # share of the rows that is selected
    budget_base: str = "accepted"  # alpha's base: all accepted rows, or those that got a score
    seed: int = 0  # proxy ensemble and target
    stop_after: str | None = None  # a stage's name ends the line there
    plan: bool = False  # show what is done and what is to do, and do nothing
    objective: str = "pws"  # what a search (hydra/sweeper=optuna) looks at: pws, accuracy, or heldout_loss to minimize
    artifacts: str = "artifacts"  # folder of finished work, shared by all runs
    report: bool = True  # report.html at the end of a run; of a sweep one for all of its jobs

    def __post_init__(self) -> None:
        require_bounds(self)
        self._check_names()
        if not 0 < self.alpha <= 1:
            raise ConfigError(
                f"alpha={self.alpha} is no share of the data; give a number above 0 and up to 1, as in 0.1"
            )
        one_of("budget_base", self.budget_base, ("accepted", "scored"))
        at_least("seed", self.seed, 0)
        one_of("objective", self.objective, tuple(OBJECTIVES))
        if self.stop_after is not None:
            one_of("stop_after", self.stop_after, STAGES)
        self._check_ensemble()
        if self.proxy.shard is not None and self.stop_after != "statistics":
            raise ConfigError(
                f"proxy.shard={self.proxy.shard} collects one of {self.proxy.shards} shards and ends there, but "
                f"stop_after={self.stop_after}; add stop_after=statistics, or leave proxy.shard empty (null)"
            )
        self._check_candidates()
        self._check_turns()
        self._check_embedded_parts()
        self._check_random_weights()
        self._check_target_set()
        if self.audit.enabled:
            self._check_audit()
        if self.reaches("scores") and self.scorer_name == "llm_rating":
            self.check_rater()
        if self.reaches("judge") and self.scorer_name != "full":  # full against itself needs no judge
            self._check_judge()

    @property
    def scorer_name(self) -> str:
        """The scorer's name, for a scorer of ours or of the user's own."""
        name = self.scorer.get("name", "unnamed") if isinstance(self.scorer, dict) else self.scorer.name
        return str(name)

    @property
    def selector_name(self) -> str:
        """The selector's name, likewise."""
        name = self.selector.get("name", "unnamed") if isinstance(self.selector, dict) else self.selector.name
        return str(name)

    def reaches(self, stage: str) -> bool:
        """Whether a run with this config comes as far as `stage`."""
        return self.stop_after is None or STAGES.index(stage) <= STAGES.index(self.stop_after)

    def check_objective(self) -> None:
        """Refuse a search that would never see its objective."""
        if self.plan:
            raise ConfigError("plan=true shows no search, whose jobs follow from results; plan one job, or a sweep")
        if not self.reaches(OBJECTIVES[self.objective]):
            raise ConfigError(
                f"objective={self.objective} is known after {OBJECTIVES[self.objective]}, but "
                f"stop_after={self.stop_after}; take a later stage, or another objective"
            )

    @property
    def _needs_proxy(self) -> bool:
        """Whether the run computes anything with the proxy; a user's own scorer is taken to, a selector not to."""
        if not self.reaches("scores"):
            return self.stop_after == "statistics"
        encoded_apart = BY_EMBEDDINGS if isinstance(self.embedder, SentenceTransformersConfig) else ()
        counts_characters = isinstance(self.scorer, LengthConfig) and self.scorer.unit == "characters"
        if not counts_characters and self.scorer_name not in (*WITHOUT_PROXY, *encoded_apart):
            return True
        if not self.reaches("selection") or self.scorer_name == "full":  # which selects everything
            return False
        return self.selector_name in ("gradient_walk", *BY_EMBEDDINGS) and self.selector_name not in encoded_apart

    def _check_names(self) -> None:
        """Each is a part of paths, in the store or in a sweep's folder."""
        require_name("scorer.name", self.scorer_name)
        require_name("selector.name", self.selector_name)
        for group in ("data", "target_set", "proxy", "embedder", "features", "target", "judge"):
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

    def _check_target_set(self) -> None:
        """Of methods of the user's own nothing is known here; the run itself looks at what they ask for."""
        if isinstance(self.target_set, FilesTargetSetConfig | VerifiableTargetSetConfig):
            return
        if self.reaches("scores") and self.scorer_name in TOWARDS_TARGET["scorer"]:
            raise ConfigError(NO_TARGET_SET.format(method=f"scorer={self.scorer_name}"))
        selects = self.reaches("selection") and self.scorer_name != "full"
        if selects and self.selector_name in TOWARDS_TARGET["selector"]:
            raise ConfigError(NO_TARGET_SET.format(method=f"selector={self.selector_name}"))

    def _check_candidates(self) -> None:
        if not isinstance(self.selector, FacilityLocationConfig) or not self.reaches("selection"):
            return
        if self.budget_base != "accepted":
            return
        option, most = "alpha", self.alpha
        if self.audit.enabled and max(self.audit.alphas) > self.alpha:
            option, most = "audit.alphas", max(self.audit.alphas)
        if self.selector.candidates < most:
            raise ConfigError(
                f"selector.candidates={self.selector.candidates} lets fewer examples enter than {option}={most} "
                f"selects; raise selector.candidates, or lower {option} below it"
            )

    def _check_turns(self) -> None:
        """Of a scorer of the user's own nothing is known here; the selector itself looks at its scores."""
        takes_turns = self.selector_name == "round_robin" and self.reaches("selection") and self.scorer_name != "full"
        is_ours = isinstance(self.scorer, ScorerConfig) and self.scorer._target_.startswith("gradsift.")
        if takes_turns and is_ours and self.scorer_name not in SCORES_BY_TASK:
            raise ConfigError(
                f"selector=round_robin takes turns between tasks, and scorer={self.scorer_name} gives no score a task; "
                f"choose scorer={', '.join(SCORES_BY_TASK)} with a target_set, or selector=topk"
            )

    def _check_embedded_parts(self) -> None:
        """The nano models and the embedded benchmark know nothing outside the embedded world."""
        # a set of the user's own may keep to the embedded world's words; the published ones do not
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
            foreign.append("proxy=nano (choose proxy=smollm2 or proxy=gpt2)")
        if self.reaches("finetune") and self.target.model.kind == "nano":
            foreign.append("target=nano (choose target=smollm2 or target=llama2_7b, or stop_after=selection)")
        if self.reaches("generate") and EMBEDDED in self.benchmark.sets:
            foreign.append("benchmark=verifiable (choose benchmark=vicuna, or stop_after=selection)")
        elif self.reaches("generate") and embedded_sets:
            foreign.append(f"benchmark sets {embedded_sets} (take them out of benchmark.sets and benchmark.general)")
        if foreign:
            raise ConfigError(f"data={self.data.name} does not go with the embedded world's {'; '.join(foreign)}")

    def _check_random_weights(self) -> None:
        """A model of random weights takes any data, but for scores alone: it has no answer and no judgment to give."""
        if self.reaches("finetune") and self.target.model.kind == "tiny_bytes":
            raise ConfigError(
                "target.model.kind=tiny_bytes has random weights, so no answer of it means anything; "
                "take another target, or stop_after=selection"
            )
        judge = getattr(self.judge, "model", None)
        if self.reaches("judge") and isinstance(judge, ModelConfig) and judge.kind == "tiny_bytes":
            raise ConfigError("judge.model.kind=tiny_bytes has random weights and cannot judge; take another judge")

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
        """Refuse a judge that cannot rate single examples of this run's data."""
        name = self.judge.name
        if name not in RATERS:
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
