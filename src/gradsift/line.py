"""The stages of one run, as methods that read their options from the run's config.

`pipeline.run` calls the stages in order. The inputs that scorers and selectors ask for are in `gradsift.inputs`; each
input is made when it is first used.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gradsift.artifacts import Artifact
from gradsift.config import ContrastConfig, EndpointGeneratorConfig, QuotasConfig
from gradsift.data.chat_templates import is_chat
from gradsift.data.load import corruption_of, labels_of
from gradsift.data.target_set import find_overlap, warn_of_leak
from gradsift.data.tokens import EncodeReport, encoding_settings, refused_rows
from gradsift.errors import ConfigError
from gradsift.evaluation.benchmarks import Item
from gradsift.evaluation.remote import check_generator
from gradsift.evaluation.stages.answers import benchmark_items, generate
from gradsift.evaluation.stages.judging import check_judge
from gradsift.evaluation.stages.losses import heldout_loss
from gradsift.evaluation.stages.metrics import General, check_metrics, forgetting, metrics
from gradsift.features.gradients import warmup_rows
from gradsift.features.prompt_clusters import clusters_of, prompt_clusters
from gradsift.inputs import Inputs
from gradsift.scoring.contrast import require_neighbours
from gradsift.scoring.random import require_labels
from gradsift.scoring.stage import scores_of
from gradsift.selection.audit import audit
from gradsift.selection.budget import budget
from gradsift.selection.quotas import groups_of
from gradsift.selection.stage import positions_of, select
from gradsift.selection.topk import topk
from gradsift.selection.trainers import FOLDER as EXPORT_FOLDER
from gradsift.selection.trainers import export
from gradsift.sources import Method, method
from gradsift.training.target import finetune, planned_steps, write_merged


class Line(Inputs):
    """The stages of one run. Each stage finds its artifact in the store or makes it."""

    @property
    def budget(self) -> int:
        """Number of examples to select."""
        return self.rows if self.keeps_all else budget(self.config.alpha, self.rows)

    @functools.cached_property
    def asked(self) -> set[str]:
        """Names of the sources (inputs, see `gradsift.sources`) that the scorer and the selector ask for.

        The sources of a method are left out if the run stops before the stage of the method.
        """
        methods = [self.scorer] if self.config.reaches("scores") else []
        methods += [self.selector] if self.config.reaches("selection") else []
        return {source for chosen in methods for source in chosen.asked}

    def check(self) -> None:
        """Raise GradsiftError if an option does not fit the data, a model or the machine, before hours of training."""
        config, asked = self.config, self.asked
        towards_target = any(source.startswith("target_") for source in asked)
        if config.reaches("selection") and not self.keeps_all:
            for alpha in (config.alpha, *(config.audit.alphas if config.audit.enabled else ())):
                budget(alpha, self.rows)
        if config.audit.enabled:
            _ = self.clusters
        if isinstance(config.scorer, ContrastConfig) and config.reaches("scores"):
            require_neighbours(self.rows, config.scorer.neighbours)
        if "labels" in asked:
            require_labels(labels_of(self.loaded))
        if isinstance(config.selector, QuotasConfig) and config.reaches("selection"):
            groups_of(self.pool, config.selector.column, config.selector.shares)
        if asked & {"gradients", "target_gradients"}:
            if config.features.name == "nano" and config.proxy.model.kind != "nano":
                raise ConfigError(
                    f"features=nano is made for the embedded world's models, not for proxy={config.proxy.name}; "
                    "choose features=less or features=g2is"
                )
            warmup = config.features.warmup
            warmup.warmup_of(warmup.epochs * math.ceil(warmup_rows(warmup, self.rows) / warmup.batch_size))
        if towards_target:
            find_overlap(self.runtime, self.target_set, self.loaded)
        if asked & {"embeddings", "target_embeddings"}:
            _ = self.embedder
        if "rater" in asked:
            config.check_rater()
        if "rater" in asked or (config.reaches("judge") and not self.keeps_all):
            check_judge(self.runtime, config.judge)
        if config.reaches("generate"):
            check_metrics(config.benchmark)
            if isinstance(config.generator, EndpointGeneratorConfig):
                check_generator(config.generator)
            _ = self.items, self.general_items
            if towards_target:
                questions = {(item.instruction.strip(), item.input.strip()) for item in self.items}
                warn_of_leak(self.runtime, self.target_set, questions)
        if config.reaches("finetune"):
            config.target.warmup_of(planned_steps(config.target, self.budget))
            _ = self.target

    # ------------------------------------------------------------------------ scores and selection

    @functools.cached_property
    def scorer(self) -> Method:
        return method("scorer", self.config.scorer, tuple(self.sources))

    @functools.cached_property
    def selector(self) -> Method:
        if self.keeps_all:
            return Method("topk", "gradsift.selection.topk.topk", topk, (), {})
        return method("selector", self.config.selector, tuple(self.sources))

    @functools.cached_property
    def refused(self) -> Artifact | None:
        """Artifact with the rows that the proxy's chat template cannot render.

        It is None if the proxy has no chat template, or if no source that the run asks for uses the pool's tokens or
        embeddings.
        """
        proxy = self.config.proxy
        if not is_chat(proxy.template):
            return None
        if not any(self.sources[name].reads_tokens for name in self.asked):
            return self.embeddings if "embeddings" in self.asked else None

        def report() -> EncodeReport:
            # tokenising the pool fills the report
            _ = self.proxy_inputs
            return self._report

        slug, settings = f"{proxy.name}-{self.config.data.name}", encoding_settings(proxy.template, proxy.max_length)
        return refused_rows(self.runtime, slug, settings, self.proxy, self.loaded, report)

    def select(self, scored: Artifact, alpha: float | None = None) -> Artifact:
        """Return the artifact of a selection that keeps the share `alpha` of the examples.

        If `alpha` is None, the share is `config.alpha`. A full-data run keeps all examples.
        """
        alpha, base = (1.0 if self.keeps_all else alpha or self.config.alpha), self.config.budget_base
        data, sources, measures = self.loaded, self.sources, self.measures
        embeddings = sources["embeddings"].value if "embeddings" in self.asked else None
        corruption = corruption_of(data)
        return select(self.runtime, self.selector, scored, data, sources, measures, alpha, base, corruption, embeddings)

    @functools.cached_property
    def clusters(self) -> Artifact | None:
        """Clusters of the prompts, which an audit uses as task families; None if the data's labels name families."""
        labels = labels_of(self.loaded)
        if labels and labels.family:
            return None
        return prompt_clusters(self.runtime, self.loaded, lambda: self.pool, self.config.audit.clusters)

    def audit(self, scored: Artifact) -> Callable[[], dict[str, Any]]:
        """Make the audit's selections, and return a function that evaluates them against the known corruption."""
        labels, clusters = labels_of(self.loaded), self.clusters
        assert labels is not None  # noqa: S101 - the config refuses an audit of data without labels
        # not made in `measure`, which only the record calls: all ranks and plans must ask for the selections
        selections = {alpha: self.select(scored, alpha) for alpha in self.config.audit.alphas}

        def measure() -> dict[str, Any]:
            families = clusters_of(clusters) if clusters else labels.family or []
            positions = {alpha: positions_of(selection) for alpha, selection in selections.items()}
            about = {"data": self.loaded.fingerprint, "families": "clusters" if clusters else "labels"}
            return about | audit(scores_of(scored), labels, families, positions)

        return measure

    # --------------------------------------------------------------------- the target and its answers

    def everything(self) -> np.ndarray:
        """Return the positions of all examples: the selection of the full-data reference."""
        return np.arange(self.rows)

    def finetune(self, selection: Artifact | np.ndarray) -> Artifact:
        """Return the target finetuned on a selection, or on the examples at the given positions of the pool."""
        if self.keeps_all:  # needs no selection's artifact, so a plan can tell whether this finetune exists
            selection = self.everything()
        for name in ("proxy_backbone", "proxy_inputs"):  # frees memory for the target; no later stage reads these
            self.__dict__.pop(name, None)

        def positions() -> np.ndarray:
            return positions_of(selection) if isinstance(selection, Artifact) else selection

        rows = self.budget if isinstance(selection, Artifact) else len(selection)
        return finetune(self.runtime, self.config.target, self.target, self.loaded, self.pool, positions, rows)

    def export(self, selection: Artifact, run: Path) -> dict[str, str]:
        """Write the selection into the run's folder in the formats of other trainers; return the paths by name."""
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
        """Merge the finetuned adapter into the target, and write the model into the run's folder.

        Returns:
            `{name: path}` with the path of the model's folder.
        """
        folder = run / EXPORT_FOLDER / "merged"
        with self.runtime.display.task("merge the adapter into the target", None):
            write_merged(self.target, tuned, self.config.target, self.config.compute, folder)
        return {"merged target": str(folder)}

    def heldout_loss(self, tuned: Artifact | None) -> Artifact | None:
        return heldout_loss(self.runtime, self.config.target, self.target, tuned, self.loaded)

    @functools.cached_property
    def items(self) -> list[Item]:
        """The benchmark's questions."""
        config = self.config
        return benchmark_items(self.runtime, config.benchmark, config.benchmark.sets, self.loaded, config.data.seed)

    @functools.cached_property
    def general_items(self) -> list[Item]:
        """Questions that the target answers before and after the finetune, to measure forgetting."""
        config = self.config
        return benchmark_items(self.runtime, config.benchmark, config.benchmark.general, self.loaded, config.data.seed)

    def answers(self, tuned: Artifact | None) -> Artifact:
        """Answer the benchmark's questions with the finetuned target, or with the untuned target if `tuned` is None."""
        config = self.config
        return generate(self.runtime, config.benchmark, config.target, self.target, tuned, self.items, config.generator)

    def metrics(self, answers: Artifact) -> Artifact | None:
        return metrics(self.runtime, self.config.benchmark, answers, self.items)

    def forgetting(self, tuned: Artifact) -> tuple[General, General]:
        """Return the results on general tasks before and after the finetune."""
        config = self.config
        return forgetting(
            self.runtime, config.benchmark, config.target, self.target, tuned, self.general_items, config.generator
        )
