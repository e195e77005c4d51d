"""The stages of one run, bound to its config. `pipeline.run` calls them in order.

The inputs that scorers and selectors ask for are in `gradsift.inputs`; each is made on first use.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradsift.artifacts import Artifact
from gradsift.data.chat_templates import is_chat
from gradsift.data.load import corruption_of, labels_of
from gradsift.data.refused import refused_rows
from gradsift.data.tokens import EncodeReport, encoding_settings
from gradsift.evaluation.benchmarks import Item
from gradsift.evaluation.stages.answers import benchmark_items, generate
from gradsift.evaluation.stages.forgetting import General, forgetting
from gradsift.evaluation.stages.losses import heldout_loss
from gradsift.evaluation.stages.metrics import metrics
from gradsift.features.prompt_clusters import clusters_of, prompt_clusters
from gradsift.inputs import Inputs
from gradsift.scoring.stage import scores_of
from gradsift.selection.audit import audit
from gradsift.selection.budget import budget
from gradsift.selection.stage import positions_of, select
from gradsift.selection.topk import topk
from gradsift.selection.trainers import FOLDER as EXPORT_FOLDER
from gradsift.selection.trainers import export
from gradsift.sources import Method, method
from gradsift.training.merging import write_merged
from gradsift.training.target import finetune


class Line(Inputs):
    """The stages of one run. Each finds its artifact in the store or makes it."""

    @property
    def budget(self) -> int:
        """Number of examples to select."""
        return self.rows if self.keeps_all else budget(self.config.alpha, self.rows)

    # ------------------------------------------------------------------------ scores and selection

    @functools.cached_property
    def scorer(self) -> Method:
        return method("scorer", self.config.scorer, tuple(self.sources))

    @functools.cached_property
    def selector(self) -> Method:
        if self.keeps_all:
            return Method("topk", "gradsift.selection.topk.topk", topk, (), {})
        return method("selector", self.config.selector, tuple(self.sources), leading=("scores", "size"))

    @functools.cached_property
    def refused(self) -> Artifact | None:
        """Artifact with the rows that the proxy's chat template cannot render; None if no row is rendered with it."""
        proxy, asked = self.config.proxy, set(self.scorer.asked)
        if self.config.reaches("selection"):
            asked |= set(self.selector.asked)
        if not is_chat(proxy.template):
            return None
        if not any(self.sources[name].reads_tokens for name in asked):
            return self.embeddings if "embeddings" in asked else None

        def report() -> EncodeReport:
            # tokenising the pool fills the report
            _ = self.proxy_inputs
            return self._report

        slug, settings = f"{proxy.name}-{self.config.data.name}", encoding_settings(proxy.template, proxy.max_length)
        return refused_rows(self.runtime, slug, settings, self.proxy, self.loaded, report)

    def select(self, scored: Artifact, alpha: float | None = None) -> Artifact:
        """Return the selection of the share `alpha` of the examples; if `alpha` is None, of the config's share."""
        alpha, base = (1.0 if self.keeps_all else alpha or self.config.alpha), self.config.budget_base
        data, sources, measures = self.loaded, self.sources, self.measures
        compared = "embeddings" in (*self.scorer.asked, *self.selector.asked)
        embeddings = sources["embeddings"].value if compared else None
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
        # made here, because all ranks and plans must ask for them; only the record calls `measure`
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
        if self.keeps_all:
            # known without the selection's artifact, so a plan can tell whether this finetune exists
            selection = self.everything()
        for name in ("proxy_backbone", "proxy_inputs"):  # frees memory for the target; no later stage reads these
            self.__dict__.pop(name, None)

        def positions() -> np.ndarray:
            return positions_of(selection) if isinstance(selection, Artifact) else selection

        rows = self.budget if isinstance(selection, Artifact) else len(selection)
        return finetune(self.runtime, self.config.target, self.target, self.loaded, self.pool, positions, rows)

    def export(self, selection: Artifact, run: Path) -> dict[str, str]:
        """Write the selection for other trainers into the run's folder, and return the written paths by name."""
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
        """Write the finetuned target as one model into the run's folder; return the model's folder as {name: path}."""
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
        """Questions that the target answers before and after the finetune, to measure forgetting."""
        return self._items_of(self.config.benchmark.general)

    def _items_of(self, names: Sequence[str]) -> list[Item]:
        return benchmark_items(self.runtime, self.config.benchmark, names, self.loaded, self.config.data.seed)

    def answers(self, tuned: Artifact | None) -> Artifact:
        """Answer the benchmark with the finetuned target, or with the untuned target if `tuned` is None."""
        config = self.config
        return generate(self.runtime, config.benchmark, config.target, self.target, tuned, self.items, config.generator)

    def metrics(self, answers: Artifact) -> Artifact | None:
        return metrics(self.runtime, self.config.benchmark, answers, self.items)

    @property
    def asks_forgetting(self) -> bool:
        """Whether the run measures what the finetune makes the target forget."""
        return bool(self.config.benchmark.general or self.config.benchmark.lm_eval_tasks)

    def forgetting(self, tuned: Artifact) -> tuple[General, General]:
        """Return the results on general tasks before and after the finetune."""
        config = self.config
        return forgetting(
            self.runtime, config.benchmark, config.target, self.target, tuned, self.general_items, config.generator
        )
