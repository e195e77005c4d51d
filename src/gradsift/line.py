"""The stages of one run, bound to its config: what `pipeline.run` calls in order.

Models and examples are loaded when they are first needed, and nothing is computed that the chosen scorer and
selector do not ask for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from gradsift.artifacts import Artifact
from gradsift.config import Config, SentenceTransformersConfig
from gradsift.data.examples import Example
from gradsift.data.load import corruption_of, labels_of, load, pool_of
from gradsift.data.target_set import find_overlap, load_target_set, target_set_of, warn_of_leak
from gradsift.data.tokens import encode, encoding_settings
from gradsift.diagnostics import Diagnostic
from gradsift.errors import ConfigError
from gradsift.evaluation.benchmarks import Item
from gradsift.evaluation.stages.answers import benchmark_items, generate
from gradsift.evaluation.stages.forgetting import General, forgetting
from gradsift.evaluation.stages.judging import check_judge, rater
from gradsift.evaluation.stages.losses import heldout_loss
from gradsift.evaluation.stages.metrics import check_metrics, metrics
from gradsift.features.embeddings import Embedder, embed
from gradsift.features.gradients import FeatureInputs, gradient_features, require_room
from gradsift.features.hidden_states import hidden_states_embedder
from gradsift.features.prompt_clusters import clusters_of, prompt_clusters
from gradsift.features.sentence_encoder import sentence_embedder
from gradsift.features.vectors import read_features
from gradsift.features.warmup import warm_up, warmup_rows
from gradsift.gradients.diagnostics import diagnose_ensemble
from gradsift.gradients.directions import directions, read_cosines
from gradsift.gradients.embedding_head import checked_inputs, embedding_gradients, read_embedding_gradients
from gradsift.gradients.norms_table import by_example
from gradsift.gradients.statistics import mean_loss, read_statistics, statistics
from gradsift.journal import Journal
from gradsift.planning import Planned
from gradsift.proxy.ensemble import collect_shard, ensemble_norms, train_adapter, train_adapters
from gradsift.proxy.epochs import ProxyInputs
from gradsift.runtime import Runtime
from gradsift.scoring.stage import scores_of
from gradsift.selection.audit import audit
from gradsift.selection.budget import budget
from gradsift.selection.stage import positions_of, select
from gradsift.selection.topk import topk
from gradsift.sources import Method, Source, method
from gradsift.training.backbones import Backbone, backbone, load_shown
from gradsift.training.device import TokenBudget, device_of
from gradsift.training.probing import require_adaptable
from gradsift.training.target import expected_finetune, finetune, planned_steps, say_report


class Line:
    """One run: each method is a stage, found in the store or made."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.config = config
        self.runtime = runtime
        self.keeps_all = config.scorer_name == "full"
        self._norms: dict[int, list[list[Artifact]]] = {}  # by epoch
        self._tried: set[str] = set()  # options of the proxy's adapters that are known to work
        self.loaded = load(runtime, config.data)

    def check(self) -> None:
        """Refuse now what would fail only after hours of training."""
        config = self.config
        methods = [self.scorer] if config.reaches("scores") and config.stop_after != "statistics" else []
        methods += [self.selector] if config.reaches("selection") else []
        if config.reaches("selection") and not self.keeps_all:
            for alpha in (config.alpha, *(config.audit.alphas if config.audit.enabled else ())):
                budget(alpha, int(self.loaded.info["rows"]))
        if config.audit.enabled:
            _ = self.clusters
        asked = {name for chosen in methods for name in chosen.asked}
        if asked & {"gradients", "target_gradients"}:
            self._check_features()
        towards_target = any(name.startswith("target_") for name in asked)
        if towards_target:
            find_overlap(self.runtime, self.target_set, self.loaded)
        if asked & {"embeddings", "target_embeddings"}:
            _ = self.embedder
        if config.reaches("judge") and not self.keeps_all:
            check_judge(self.runtime, config.judge)
        if any("rater" in chosen.asked for chosen in methods):
            config.check_rater()
            check_judge(self.runtime, config.judge)
        if config.reaches("generate"):
            check_metrics(config.benchmark)
            _ = self.items, self.general_items
            if towards_target:
                questions = {(item.instruction.strip(), item.input.strip()) for item in self.items}
                warn_of_leak(self.runtime, self.target_set, questions)
        if config.reaches("finetune"):
            rows = int(self.loaded.info["rows"])
            config.target.warmup_of(
                planned_steps(config.target, rows if self.keeps_all else budget(config.alpha, rows))
            )
            _ = self.target

    def _check_features(self) -> None:
        config = self.config
        if config.features.name == "nano" and config.proxy.model.kind != "nano":
            raise ConfigError(
                f"features=nano is made for the embedded world's models, not for proxy={config.proxy.name}; choose "
                "features=less or features=g2is"
            )
        warmup = config.features.warmup
        rows = warmup_rows(warmup, int(self.loaded.info["rows"]))
        warmup.warmup_of(warmup.epochs * math.ceil(rows / warmup.batch_size))

    @functools.cached_property
    def pool(self) -> list[Example]:
        return pool_of(self.loaded)

    # ------------------------------------------------------------------------------------- scoring

    @functools.cached_property
    def scorer(self) -> Method:
        return method("scorer", self.config.scorer, tuple(self.sources))

    @functools.cached_property
    def target_set(self) -> Artifact:
        return load_target_set(self.runtime, self.config.target_set, self.loaded)

    @functools.cached_property
    def proxy(self) -> Artifact:
        return backbone(self.runtime, self.config.proxy.model)

    @functools.cached_property
    def proxy_backbone(self) -> Backbone:
        loaded = load_shown(self.runtime, self.proxy, self.config.proxy.model)
        loaded.model.to(device_of(self.runtime.compute))
        return loaded

    @functools.cached_property
    def proxy_inputs(self) -> ProxyInputs:
        return self._encoded(self.pool, "the proxy")

    def _encoded(self, examples: list[Example], purpose: str) -> ProxyInputs:
        model, proxy = self.proxy_backbone, self.config.proxy
        limit = min(proxy.max_length, model.context)
        with self.runtime.display.task(f"tokenise for {purpose}", len(examples)) as advance:
            encoded, report = encode(examples, model.tokenizer, proxy.template, limit, advance)
        say_report(self.runtime, report, len(examples), "proxy")
        budget = TokenBudget.of(model.model, self.config.compute.tokens, self.runtime.display.say)
        return ProxyInputs(model, encoded, budget)

    def _inputs_to_train(self, option: str = "proxy.lora") -> ProxyInputs:
        """`proxy_inputs`, after a trial of the adapter `option`, and of the target's where one will be tuned.

        Called where the first unit has to be made: a run that finds its work done loads no model.
        """
        if self.config.reaches("finetune") and not self._tried:
            same = self.target.identity == self.proxy.identity
            loaded = self.proxy_backbone if same else load_shown(self.runtime, self.target, self.config.target.model)
            require_adaptable(loaded.model, self.config.target.lora, "target.lora", norms=False)
        if option not in self._tried:
            features, own = self.config.features, option == "proxy.lora"
            config, norms = (
                (self.config.proxy.lora if own else features.warmup.lora),
                own or features.gradient_params == "lora",
            )
            require_adaptable(self.proxy_backbone.model, config, option, norms=norms)
            self._tried.add(option)
        return self.proxy_inputs

    @functools.cached_property
    def adapters(self) -> list[list[Artifact]]:
        """The ensemble's weights, as [adapter][epoch - 1]: one a member, or one that all members share."""
        return train_adapters(self.runtime, self.config.proxy, self.proxy, self.loaded, self._inputs_to_train)

    def norms(self, epoch: int) -> list[list[Artifact]]:
        """The members' gradient norms after an epoch, as [member][shard]; an epoch nobody asks for has none."""
        if epoch not in self._norms:
            self._norms[epoch] = ensemble_norms(
                self.runtime, self.config.proxy, self.adapters, self._inputs_to_train, epoch
            )
        return self._norms[epoch]

    @property
    def has_norms(self) -> bool:
        """Whether anything asked for norms of the ensemble."""
        return bool(self._norms)

    def collect_shard(self) -> list[int]:
        """Collect the shard `proxy.shard` of all members; returns the shards of which something is missing."""
        proxy = self.config.proxy
        assert proxy.shard is not None  # noqa: S101 - the caller's branch
        return collect_shard(self.runtime, proxy, self.adapters, self._inputs_to_train, proxy.shard)

    def statistics(self) -> Artifact:
        proxy = self.config.proxy
        early, late = (self.norms(epoch) for epoch in proxy.snapshots)
        rows = int(self.loaded.info["rows"])
        return statistics(self.runtime, early, late, proxy.snapshots, proxy.norm_scope, rows)

    def late_norms(self) -> list[list[Artifact]]:
        return self.norms(self.config.proxy.snapshots[1])

    def late_losses(self) -> np.ndarray:
        return mean_loss(self.late_norms(), int(self.loaded.info["rows"]))

    @functools.cached_property
    def directions(self) -> list[Artifact]:
        """A table an adapter, at the late snapshot: one a member, or one where members share their weights."""
        proxy = self.config.proxy
        late = [epochs[proxy.snapshots[1] - 1] for epochs in self.adapters]
        return [directions(self.runtime, proxy.lora, weights, self._inputs_to_train) for weights in late]

    @functools.cached_property
    def checkpoints(self) -> list[Artifact]:
        """Those of the warm-up, one an epoch."""

        def load() -> ProxyInputs:
            config = self.config.features
            inputs = self._inputs_to_train("features.warmup.lora")
            count = 1 if config.checkpoints == "last" else config.warmup.epochs
            require_room(self.runtime, config, self._pool_inputs(), count)  # before the first epoch, not after the last
            return inputs

        features, proxy = self.config.features, self.config.proxy
        return warm_up(self.runtime, features.warmup, proxy, self.proxy, self.loaded, load)

    def _pool_inputs(self) -> FeatureInputs:
        return FeatureInputs(self.proxy_inputs, [example.example_id for example in self.pool])

    def _target_inputs(self) -> FeatureInputs:
        found = target_set_of(self.target_set)
        ids = [example.example_id for example in found.examples]
        return FeatureInputs(self._encoded(found.examples, "the target set"), ids, found.tasks)

    @functools.cached_property
    def gradients(self) -> Artifact:
        """Gradient features of the pool."""
        return self._gradients(self.loaded, self._pool_inputs, "pool", self.config.features.adam)

    @functools.cached_property
    def target_gradients(self) -> Artifact:
        """Gradient features of the target set: plain, as a target's gradient is what a step of Adam is measured by."""
        slug = f"target-{self.config.target_set.name}"
        return self._gradients(self.target_set, self._target_inputs, slug, adam=False)

    def _gradients(self, rows: Artifact, load: Callable[[], FeatureInputs], slug: str, adam: bool) -> Artifact:
        features, proxy = self.config.features, self.config.proxy
        return gradient_features(self.runtime, features, proxy, self.checkpoints, rows, load, slug=slug, adam=adam)

    def response_tokens(self) -> np.ndarray:
        """(N,) float64, the same for every member; NaN for an example that has none."""
        return by_example(self.late_norms()[0], ("n_tokens",), int(self.loaded.info["rows"]))["n_tokens"]

    @functools.cached_property
    def embedding_gradients(self) -> Artifact:
        """Of the first adapter after its first epoch; no other member and no later epoch is trained for it."""
        proxy, rows = self.config.proxy, int(self.loaded.info["rows"])
        load = checked_inputs(self._inputs_to_train, proxy.lora, self.runtime.compute)
        first = train_adapter(self.runtime, proxy, self.proxy, self.loaded, load, 0, epochs=1)
        return embedding_gradients(self.runtime, first[0], proxy.lora, lambda: self.proxy_inputs, rows)

    def diagnose(self, asked: Sequence[str]) -> list[Diagnostic]:
        """Of the ensemble up to the late snapshot, if the scorer asked for it."""
        if not self.has_norms:
            return []
        late = self.config.proxy.snapshots[1]
        found = read_statistics(self.statistics()) if "statistics" in asked else None
        trained = [epochs[:late] for epochs in self.adapters]
        return diagnose_ensemble(trained, found, self.config.proxy.members)

    def measures(self) -> dict[str, np.ndarray]:
        """What the ensemble, if the scorer asked for it, knows of each example besides its norms."""
        if not self.has_norms:
            return {}
        return {"late_loss": self.late_losses(), "response_tokens": self.response_tokens()}

    @functools.cached_property
    def embedder(self) -> Embedder:
        config = self.config.embedder
        if isinstance(config, SentenceTransformersConfig):
            return sentence_embedder(self.runtime, config)
        return hidden_states_embedder(config, self.config.proxy.template, self.proxy, lambda: self.proxy_backbone)

    def embeddings(self) -> Artifact:
        return embed(self.runtime, self.embedder, self.loaded, lambda: (self.pool, []))

    def target_embeddings(self) -> Artifact:
        def rows() -> tuple[list[Example], list[str]]:
            found = target_set_of(self.target_set)
            return found.examples, found.tasks

        return embed(self.runtime, self.embedder, self.target_set, rows)

    @functools.cached_property
    def sources(self) -> dict[str, Source]:
        """What a scorer or a selector may ask for (see `gradsift.scoring` and `gradsift.selection`)."""
        nothing: list[Artifact] = []
        return {
            "count": Source(lambda: nothing, lambda: int(self.loaded.info["rows"])),
            "examples": Source(lambda: nothing, lambda: self.pool),
            "statistics": Source(lambda: [self.statistics()], lambda: read_statistics(self.statistics())),
            "late_losses": Source(lambda: list(chain.from_iterable(self.late_norms())), self.late_losses),
            "embedding_gradients": Source(
                lambda: [self.embedding_gradients], lambda: read_embedding_gradients(self.embedding_gradients)
            ),
            "directions": Source(
                lambda: self.directions, lambda: read_cosines(self.directions, int(self.loaded.info["rows"]))
            ),
            "gradients": Source(lambda: [self.gradients], lambda: read_features(self.gradients)),
            "target_gradients": Source(lambda: [self.target_gradients], lambda: read_features(self.target_gradients)),
            "backbone": Source(lambda: [self.proxy], lambda: self.proxy_backbone),
            "proxy_inputs": Source(
                lambda: [self.proxy],
                lambda: self.proxy_inputs,
                encoding_settings(self.config.proxy.template, self.config.proxy.max_length),
            ),
            "embeddings": Source(lambda: [self.embeddings()], lambda: read_features(self.embeddings())),
            "target_embeddings": Source(
                lambda: [self.target_embeddings()], lambda: read_features(self.target_embeddings())
            ),
            "rater": rater(self.runtime, self.config.judge),
            "task": Source(lambda: nothing, lambda: self.runtime.display.task),
            "journal": Source(lambda: nothing, Journal),  # the score stage has one that keeps what it is told
        }

    # ----------------------------------------------------------------------- selection and evaluation

    @functools.cached_property
    def selector(self) -> Method:
        if self.keeps_all:
            return Method("topk", "gradsift.selection.topk.topk", topk, (), {})
        return method("selector", self.config.selector, tuple(self.sources), given=("scores", "size"))

    def select(self, scored: Artifact, alpha: float | None = None) -> Artifact:
        alpha, base = (1.0 if self.keeps_all else alpha or self.config.alpha), self.config.budget_base
        data, sources, measures = self.loaded, self.sources, self.measures
        corruption = corruption_of(self.loaded)
        compared = "embeddings" in (*self.scorer.asked, *self.selector.asked)
        embeddings = sources["embeddings"].value if compared else None
        return select(self.runtime, self.selector, scored, data, sources, measures, alpha, base, corruption, embeddings)

    @functools.cached_property
    def clusters(self) -> Artifact | None:
        """What stands for the kinds of task in an audit where the data does not tell them."""
        labels = labels_of(self.loaded)
        if labels and labels.family:
            return None
        return prompt_clusters(self.runtime, self.loaded, lambda: self.pool, self.config.audit.clusters)

    def audit(self, scored: Artifact) -> Callable[[], dict[str, Any]]:
        """What the scorer, and the selector with it, makes of the known corruption; worked out when it is called."""
        labels, clusters = labels_of(self.loaded), self.clusters
        assert labels is not None  # noqa: S101 - the config has refused data without
        selections = {alpha: self.select(scored, alpha) for alpha in self.config.audit.alphas}

        def found() -> dict[str, Any]:
            families = clusters_of(clusters) if clusters else labels.family or []
            chosen = {alpha: positions_of(selection) for alpha, selection in selections.items()}
            about = {"data": self.loaded.fingerprint, "families": "clusters" if clusters else "labels"}
            return about | audit(scores_of(scored), labels, families, chosen)

        return found

    def everything(self) -> np.ndarray:
        """All positions of the pool: the full-data reference."""
        return np.arange(int(self.loaded.info["rows"]))

    @functools.cached_property
    def target(self) -> Artifact:
        return backbone(self.runtime, self.config.target.model)

    def finetune(self, selection: Artifact | np.ndarray) -> Artifact:
        if self.keeps_all:
            positions = self.everything()
        elif isinstance(selection, Planned):
            rows = budget(self.config.alpha, int(self.loaded.info["rows"]))
            return expected_finetune(self.runtime, self.config.target, self.target, self.loaded, selection, rows)
        else:
            positions = positions_of(selection) if isinstance(selection, Artifact) else selection
        return finetune(self.runtime, self.config.target, self.target, self.loaded, self.pool, positions)

    @functools.cached_property
    def items(self) -> list[Item]:
        return self._items_of(self.config.benchmark.sets)

    @functools.cached_property
    def general_items(self) -> list[Item]:
        """What the target is asked before and after the finetune."""
        return self._items_of(self.config.benchmark.general)

    def _items_of(self, names: Sequence[str]) -> list[Item]:
        config = self.config
        return benchmark_items(self.runtime, config.benchmark, names, self.loaded, config.data.seed)

    def answers(self, tuned: Artifact | None) -> Artifact:
        config = self.config
        return generate(self.runtime, config.benchmark, config.target, self.target, tuned, self.items)

    def metrics(self, answers: Artifact) -> Artifact | None:
        return metrics(self.runtime, self.config.benchmark, answers, self.items)

    @property
    def asks_forgetting(self) -> bool:
        return bool(self.config.benchmark.general or self.config.benchmark.lm_eval_tasks)

    def forgetting(self, tuned: Artifact) -> tuple[General, General]:
        config, items = self.config, self.general_items
        return forgetting(self.runtime, config.benchmark, config.target, self.target, tuned, items)

    def heldout_loss(self, tuned: Artifact | None) -> Artifact | None:
        return heldout_loss(self.runtime, self.config.target, self.target, tuned, self.loaded)
