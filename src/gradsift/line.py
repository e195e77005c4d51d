"""The stages of one run, bound to its config. `pipeline.run` calls them in order.

Most stages are cached properties: a stage runs when a later one first asks for its result, so nothing is computed or
loaded that the chosen scorer and selector do not need.

Shape letters: M members, N examples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from gradsift.artifacts import Artifact
from gradsift.config import Config, SentenceTransformersConfig
from gradsift.data.chat_templates import is_chat
from gradsift.data.examples import Example
from gradsift.data.load import PUBLISHED_FILE, corruption_of, labels_of, load, pool_of
from gradsift.data.refused import refused_rows
from gradsift.data.target_set import load_target_set, target_set_of
from gradsift.data.tokens import EncodeReport, encode, encoding_settings
from gradsift.diagnostics import Diagnostic
from gradsift.evaluation.benchmarks import Item
from gradsift.evaluation.stages.answers import benchmark_items, generate
from gradsift.evaluation.stages.forgetting import General, forgetting
from gradsift.evaluation.stages.judging import rater
from gradsift.evaluation.stages.losses import heldout_loss
from gradsift.evaluation.stages.metrics import metrics
from gradsift.features.embeddings import Embedder, embed
from gradsift.features.gradients import FeatureInputs, gradient_features, require_room
from gradsift.features.hidden_states import hidden_states_embedder
from gradsift.features.prompt_clusters import clusters_of, prompt_clusters
from gradsift.features.sentence_encoder import sentence_embedder
from gradsift.features.vectors import read_features
from gradsift.features.warmup import warm_up
from gradsift.gradients.directions import directions, read_cosines
from gradsift.gradients.embedding_head import checked_inputs, embedding_gradients, read_embedding_gradients
from gradsift.gradients.ensemble_checks import diagnose_ensemble
from gradsift.gradients.norms_table import by_example
from gradsift.gradients.statistics import mean_loss, read_statistics, statistics
from gradsift.journal import Journal
from gradsift.proxy.answer_losses import answer_losses, read_answer_losses
from gradsift.proxy.ensemble import collect_shard, ensemble_norms, train_adapter, train_adapters
from gradsift.proxy.epochs import ProxyInputs
from gradsift.runtime import Runtime
from gradsift.scoring.scores import read_scores
from gradsift.scoring.stage import scores_of
from gradsift.selection.audit import audit
from gradsift.selection.budget import budget
from gradsift.selection.stage import positions_of, select
from gradsift.selection.topk import topk
from gradsift.selection.trainers import FOLDER as EXPORT_FOLDER
from gradsift.selection.trainers import export
from gradsift.sources import Method, Source, method
from gradsift.training.backbones import Backbone, backbone, load_shown
from gradsift.training.device import TokenBudget, device_of
from gradsift.training.lora import left_out
from gradsift.training.merging import write_merged
from gradsift.training.probing import require_adaptable
from gradsift.training.target import finetune, load_target, say_report

# sources that are computed from the pool in tokens of the proxy's template
_READ_TOKENS = ("statistics", "late_losses", "directions", "embedding_gradients", "gradients", "proxy_inputs")


class Line:
    """The stages of one run. Each finds its artifact in the store or makes it."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.config = config
        self.runtime = runtime
        self.keeps_all = config.scorer_name == "full"
        self._norms: dict[int, list[list[Artifact]]] = {}  # by epoch
        self._tried: set[str] = set()  # options of adapters that are known to fit their model
        self.loaded = load(runtime, config.data)
        self.rows = int(self.loaded.info["rows"])  # N

    @functools.cached_property
    def pool(self) -> list[Example]:
        """The examples to select from."""
        return pool_of(self.loaded)

    @property
    def budget(self) -> int:
        """Number of examples to select."""
        return self.rows if self.keeps_all else budget(self.config.alpha, self.rows)

    # ------------------------------------------------------------------- the proxy and its ensemble

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
        """The proxy and the tokens of the pool."""
        inputs, self._report = self._encoded(self.pool, "the proxy")
        return inputs

    @functools.cached_property
    def refused(self) -> Artifact | None:
        """The rows of the pool that the proxy's chat template cannot show; None if the run shows it no row."""
        proxy, asked = self.config.proxy, {*self.scorer.asked, *self.selector.asked}
        if not is_chat(proxy.template) or asked.isdisjoint(_READ_TOKENS):
            return None

        def report() -> EncodeReport:
            _ = self.proxy_inputs
            return self._report

        slug, settings = f"{proxy.name}-{self.config.data.name}", encoding_settings(proxy.template, proxy.max_length)
        return refused_rows(self.runtime, slug, settings, self.proxy, self.loaded, report)

    def _encoded(self, examples: list[Example], purpose: str) -> tuple[ProxyInputs, EncodeReport]:
        model, proxy = self.proxy_backbone, self.config.proxy
        limit = min(proxy.max_length, model.context)
        with self.runtime.display.task(f"tokenise for {purpose}", len(examples)) as advance:
            encoded, report = encode(examples, model.tokenizer, proxy.template, limit, advance)
        model.require_embedded(encoded)
        say_report(self.runtime, report, len(examples), "proxy")
        tokens = TokenBudget.of(model.model, self.config.compute.tokens, self.runtime.display.say)
        return ProxyInputs(model, encoded, tokens), report

    def _inputs_to_train(self, option: str = "proxy.lora") -> ProxyInputs:
        """Return `proxy_inputs` once the adapters have been tried on their models.

        Stages call it before they make their first artifact, so a run that finds its work done loads no model.

        Args:
            option: the adapter that is about to be trained, `proxy.lora` or `features.warmup.lora`. Before the first
                one the target's adapter is tried too, if the run comes to a finetune.
        """
        config = self.config
        if config.reaches("finetune") and not self._tried:
            same = self.target.identity == self.proxy.identity
            loaded = self.proxy_backbone if same else load_target(self.runtime, config.target, self.target)
            require_adaptable(loaded.model, config.target.lora, "target.lora", norms=False)
        if option not in self._tried:
            lora = config.proxy.lora if option == "proxy.lora" else config.features.warmup.lora
            norms = option == "proxy.lora" or config.features.gradient_params == "lora"
            require_adaptable(self.proxy_backbone.model, lora, option, norms=norms)
            if remark := left_out(self.proxy_backbone.model, lora, option):
                self.runtime.display.say(f"  {remark}")
            self._tried.add(option)
        return self.proxy_inputs

    @functools.cached_property
    def adapters(self) -> list[list[Artifact]]:
        """The ensemble's weights as [adapter][epoch - 1]: one adapter per member, or one that all members share."""
        return train_adapters(self.runtime, self.config.proxy, self.proxy, self.loaded, self._inputs_to_train)

    def norms(self, epoch: int) -> list[list[Artifact]]:
        """Return the members' per-sample gradient norms after an epoch, as [member][shard]."""
        if epoch not in self._norms:
            proxy, load = self.config.proxy, self._inputs_to_train
            self._norms[epoch] = ensemble_norms(self.runtime, proxy, self.adapters, load, epoch)
        return self._norms[epoch]

    @property
    def has_ensemble(self) -> bool:
        """Whether the scorer asked for norms or losses of the ensemble."""
        return bool(self._norms) or "answer_losses" in vars(self)

    def collect_shard(self) -> list[int]:
        """Collect the shard `proxy.shard` of all members, and return the shards that are still incomplete."""
        proxy = self.config.proxy
        assert proxy.shard is not None  # noqa: S101 - checked by the caller
        return collect_shard(self.runtime, proxy, self.adapters, self._inputs_to_train, proxy.shard)

    @functools.cached_property
    def late_norms(self) -> list[list[Artifact]]:
        return self.norms(self.config.proxy.snapshots[1])

    @functools.cached_property
    def statistics(self) -> Artifact:
        """Mean, variance and drop of the norms over the members (GRADFILTERING, section 3)."""
        proxy = self.config.proxy
        early, late = (self.norms(epoch) for epoch in proxy.snapshots)
        return statistics(self.runtime, early, late, proxy.snapshots, proxy.norm_scope, self.rows)

    @functools.cached_property
    def answer_losses(self) -> list[Artifact]:
        """Losses of the answers at the late snapshot: one table per adapter."""
        load, late = self._inputs_to_train, self.config.proxy.snapshots[1] - 1
        return [answer_losses(self.runtime, self.config.proxy.lora, epochs[late], load) for epochs in self.adapters]

    def late_losses(self) -> np.ndarray:
        """Return the examples' losses at the late snapshot, the mean over members, (N,) float64."""
        return mean_loss(self.late_norms, self.rows)

    def measures(self) -> dict[str, np.ndarray]:
        """Return what the ensemble knows of each example besides its norms; empty if the scorer did not ask for it."""
        if not self._norms:
            return {}
        tokens = by_example(self.late_norms[0], ("n_tokens",), self.rows)["n_tokens"]  # the same for every member
        return {"late_loss": self.late_losses(), "response_tokens": tokens}

    def diagnose(self, asked: Sequence[str]) -> list[Diagnostic]:
        """Return diagnostics of the ensemble up to the late snapshot; none if the scorer did not ask for it.

        Args:
            asked: the names of the scorer's sources.
        """
        if not self.has_ensemble:
            return []
        trained = [epochs[: self.config.proxy.snapshots[1]] for epochs in self.adapters]
        table = read_statistics(self.statistics) if "statistics" in asked else None
        return diagnose_ensemble(trained, table, self.config.proxy.members)

    # ------------------------------------------------------------------ gradients and texts as vectors

    @functools.cached_property
    def directions(self) -> list[Artifact]:
        """Cosines to the mean gradient at the late snapshot: one table per adapter."""
        proxy = self.config.proxy
        late = [epochs[proxy.snapshots[1] - 1] for epochs in self.adapters]
        return [directions(self.runtime, proxy.lora, weights, self._inputs_to_train) for weights in late]

    @functools.cached_property
    def embedding_gradients(self) -> Artifact:
        """Gradients of the first adapter after its first epoch; no other member and no later epoch is trained."""
        proxy = self.config.proxy
        load = checked_inputs(self._inputs_to_train, proxy.lora, self.runtime.compute)
        first = train_adapter(self.runtime, proxy, self.proxy, self.loaded, load, 0, epochs=1)
        return embedding_gradients(self.runtime, first[0], proxy.lora, lambda: self.proxy_inputs, self.rows)

    @functools.cached_property
    def target_set(self) -> Artifact:
        return load_target_set(self.runtime, self.config.target_set, self.loaded)

    @functools.cached_property
    def checkpoints(self) -> list[Artifact]:
        """The checkpoints of the warm-up, one per epoch."""
        features, proxy = self.config.features, self.config.proxy

        def load() -> ProxyInputs:
            inputs = self._inputs_to_train("features.warmup.lora")
            count = 1 if features.checkpoints == "last" else features.warmup.epochs
            require_room(self.runtime, features, self._pool_inputs(), count)  # before the first epoch is trained
            return inputs

        return warm_up(self.runtime, features.warmup, proxy, self.proxy, self.loaded, load)

    def _pool_inputs(self) -> FeatureInputs:
        return FeatureInputs(self.proxy_inputs, [example.example_id for example in self.pool])

    def _target_inputs(self) -> FeatureInputs:
        rows = target_set_of(self.target_set)
        ids = [example.example_id for example in rows.examples]
        return FeatureInputs(self._encoded(rows.examples, "the target set")[0], ids, rows.tasks)

    @functools.cached_property
    def gradients(self) -> Artifact:
        """Gradient features of the pool."""
        features, proxy, load = self.config.features, self.config.proxy, self._pool_inputs
        rows, adam = self.loaded, features.adam
        return gradient_features(self.runtime, features, proxy, self.checkpoints, rows, load, slug="pool", adam=adam)

    @functools.cached_property
    def target_gradients(self) -> Artifact:
        """Gradient features of the target set, without Adam: LESS compares a step of Adam with plain gradients."""
        features, proxy, load = self.config.features, self.config.proxy, self._target_inputs
        rows, slug = self.target_set, f"target-{self.config.target_set.name}"
        return gradient_features(self.runtime, features, proxy, self.checkpoints, rows, load, slug=slug, adam=False)

    @functools.cached_property
    def embedder(self) -> Embedder:
        config = self.config.embedder
        if isinstance(config, SentenceTransformersConfig):
            return sentence_embedder(self.runtime, config)
        return hidden_states_embedder(config, self.config.proxy.template, self.proxy, lambda: self.proxy_backbone)

    @functools.cached_property
    def embeddings(self) -> Artifact:
        return embed(self.runtime, self.embedder, self.loaded, lambda: (self.pool, []))

    @functools.cached_property
    def target_embeddings(self) -> Artifact:
        def load() -> tuple[list[Example], list[str]]:
            rows = target_set_of(self.target_set)
            return rows.examples, rows.tasks

        return embed(self.runtime, self.embedder, self.target_set, load)

    # ------------------------------------------------------------------------ scores and selection

    @functools.cached_property
    def sources(self) -> dict[str, Source]:
        """What a scorer or a selector may ask for (see `gradsift.scoring` and `gradsift.selection`)."""
        proxy = self.config.proxy
        encoding = encoding_settings(proxy.template, proxy.max_length)
        return {
            "count": Source(list, lambda: self.rows),
            "examples": Source(list, lambda: self.pool),
            "labels": Source(lambda: [self.loaded], lambda: labels_of(self.loaded)),
            "statistics": Source(lambda: [self.statistics], lambda: read_statistics(self.statistics)),
            "late_losses": Source(lambda: list(chain.from_iterable(self.late_norms)), self.late_losses),
            "answer_losses": Source(
                lambda: self.answer_losses, lambda: read_answer_losses(self.answer_losses, self.rows)
            ),
            "embedding_gradients": Source(
                lambda: [self.embedding_gradients], lambda: read_embedding_gradients(self.embedding_gradients)
            ),
            "directions": Source(lambda: self.directions, lambda: read_cosines(self.directions, self.rows)),
            "gradients": Source(lambda: [self.gradients], lambda: read_features(self.gradients)),
            "target_gradients": Source(lambda: [self.target_gradients], lambda: read_features(self.target_gradients)),
            "backbone": Source(lambda: [self.proxy], lambda: self.proxy_backbone),
            "proxy_inputs": Source(lambda: [self.proxy], lambda: self.proxy_inputs, encoding),
            "embeddings": Source(lambda: [self.embeddings], lambda: read_features(self.embeddings)),
            "target_embeddings": Source(
                lambda: [self.target_embeddings], lambda: read_features(self.target_embeddings)
            ),
            "rater": rater(self.runtime, self.config.judge),
            "published_scores": Source(list, lambda: read_scores(self.loaded.file(PUBLISHED_FILE))),
            "task": Source(list, lambda: self.runtime.display.task),
            "journal": Source(list, Journal),  # replaced by the score stage, whose journal keeps results
        }

    @functools.cached_property
    def scorer(self) -> Method:
        return method("scorer", self.config.scorer, tuple(self.sources))

    @functools.cached_property
    def selector(self) -> Method:
        if self.keeps_all:
            return Method("topk", "gradsift.selection.topk.topk", topk, (), {})
        return method("selector", self.config.selector, tuple(self.sources), leading=("scores", "size"))

    def select(self, scored: Artifact, alpha: float | None = None) -> Artifact:
        """Select the share `alpha` of the examples; the config's share if it is None."""
        alpha, base = (1.0 if self.keeps_all else alpha or self.config.alpha), self.config.budget_base
        data, sources, measures = self.loaded, self.sources, self.measures
        compared = "embeddings" in (*self.scorer.asked, *self.selector.asked)
        embeddings = sources["embeddings"].value if compared else None
        corruption = corruption_of(data)
        return select(self.runtime, self.selector, scored, data, sources, measures, alpha, base, corruption, embeddings)

    @functools.cached_property
    def clusters(self) -> Artifact | None:
        """Clusters of the prompts, which stand for task families in an audit if the data does not name any."""
        labels = labels_of(self.loaded)
        if labels and labels.family:
            return None
        return prompt_clusters(self.runtime, self.loaded, lambda: self.pool, self.config.audit.clusters)

    def audit(self, scored: Artifact) -> Callable[[], dict[str, Any]]:
        """Make the audit's selections, and return a function that measures how they treat the known corruption."""
        labels, clusters = labels_of(self.loaded), self.clusters
        assert labels is not None  # noqa: S101 - the config refuses an audit of data without labels
        selections = {alpha: self.select(scored, alpha) for alpha in self.config.audit.alphas}

        def measure() -> dict[str, Any]:
            families = clusters_of(clusters) if clusters else labels.family or []
            positions = {alpha: positions_of(selection) for alpha, selection in selections.items()}
            about = {"data": self.loaded.fingerprint, "families": "clusters" if clusters else "labels"}
            return about | audit(scores_of(scored), labels, families, positions)

        return measure

    # --------------------------------------------------------------------- the target and its answers

    @functools.cached_property
    def target(self) -> Artifact:
        return backbone(self.runtime, self.config.target.model)

    def everything(self) -> np.ndarray:
        """Return the positions of all examples: the selection of the full-data reference."""
        return np.arange(self.rows)

    def finetune(self, selection: Artifact | np.ndarray) -> Artifact:
        """Finetune the target on a selection, or on the examples at the given positions of the pool."""
        if self.keeps_all:
            selection = self.everything()
        for name in ("proxy_backbone", "proxy_inputs"):  # the target needs the memory; nothing scores after this
            self.__dict__.pop(name, None)

        def positions() -> np.ndarray:
            return positions_of(selection) if isinstance(selection, Artifact) else selection

        rows = self.budget if isinstance(selection, Artifact) else len(selection)
        return finetune(self.runtime, self.config.target, self.target, self.loaded, self.pool, positions, rows)

    def export(self, selection: Artifact, run: Path) -> dict[str, str]:
        """Write the selection for other trainers into the run's folder, and return what was written, by name."""
        config, target = self.config.export, self.config.target
        if not config.formats:
            return {}
        model = target.model.path if target.model.kind == "pretrained" else None
        if model is None and self.config.reaches("finetune"):
            model = str(self.target.path.absolute())
        elif model is not None and Path(model).expanduser().is_dir():
            model = str(Path(model).expanduser().absolute())
        return export(config, target, model, [self.pool[position] for position in positions_of(selection)], run)

    def merge(self, tuned: Artifact, run: Path) -> dict[str, str]:
        """Write the finetuned target as one model into the run's folder, and return its folder, by name."""
        folder = run / EXPORT_FOLDER / "merged"
        with self.runtime.display.task("merge the adapter into the target", None):
            write_merged(self.target, tuned, self.config.target, self.config.compute, folder)
        return {"merged target": str(folder)}

    def heldout_loss(self, tuned: Artifact | None) -> Artifact | None:
        return heldout_loss(self.runtime, self.config.target, self.target, tuned, self.loaded)

    @functools.cached_property
    def items(self) -> list[Item]:
        """The benchmark's questions."""
        return self._items_of(self.config.benchmark.sets)

    @functools.cached_property
    def general_items(self) -> list[Item]:
        """Questions that the target answers before and after the finetune."""
        return self._items_of(self.config.benchmark.general)

    def _items_of(self, names: Sequence[str]) -> list[Item]:
        return benchmark_items(self.runtime, self.config.benchmark, names, self.loaded, self.config.data.seed)

    def answers(self, tuned: Artifact | None) -> Artifact:
        """Answer the benchmark with a finetuned target, or with the untuned one if it is None."""
        config = self.config
        given = (config.benchmark, config.target, self.target, tuned, self.items, config.generator)
        return generate(self.runtime, *given)

    def metrics(self, answers: Artifact) -> Artifact | None:
        return metrics(self.runtime, self.config.benchmark, answers, self.items)

    @property
    def asks_forgetting(self) -> bool:
        """Whether the run measures what the finetune makes the target forget."""
        return bool(self.config.benchmark.general or self.config.benchmark.lm_eval_tasks)

    def forgetting(self, tuned: Artifact) -> tuple[General, General]:
        """Return the results on general tasks before and after the finetune."""
        benchmark, target = self.config.benchmark, self.config.target
        given = (benchmark, target, self.target, tuned, self.general_items, self.config.generator)
        return forgetting(self.runtime, *given)
