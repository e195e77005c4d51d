"""The inputs that a scorer or a selector can ask for: the pool, the proxy and its ensemble, gradients and embeddings.

Each input is made on first use, so nothing is computed or loaded that the chosen scorer and selector do not need.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import chain

import numpy as np

from gradsift.artifacts import Artifact
from gradsift.config import Config, SentenceTransformersConfig
from gradsift.data.examples import Example
from gradsift.data.load import PUBLISHED_FILE, labels_of, load, pool_of
from gradsift.data.target_set import load_target_set, target_set_of
from gradsift.data.tokens import EncodeReport, encode, encoding_settings
from gradsift.diagnostics import Diagnostic
from gradsift.evaluation.stages.judging import rater
from gradsift.features.embeddings import Embedder, embed, hidden_states_embedder
from gradsift.features.gradients import FeatureInputs, gradient_features, require_room, warm_up
from gradsift.features.sentence_encoder import sentence_embedder
from gradsift.features.vectors import read_features
from gradsift.gradients.embedding_head import embedding_gradients, read_embedding_gradients, with_check
from gradsift.gradients.ensemble_checks import diagnose_ensemble
from gradsift.gradients.statistics import by_example, mean_loss, read_statistics, statistics
from gradsift.journal import Journal
from gradsift.proxy.collection import collect_shard, ensemble_norms
from gradsift.proxy.ensemble import train_adapters, train_members
from gradsift.proxy.epochs import Ensemble, ProxyInputs
from gradsift.proxy.member_tables import answer_losses, directions, read_answer_losses, read_cosines
from gradsift.runtime import Runtime
from gradsift.scoring.scores import read_scores
from gradsift.sources import Source
from gradsift.training.backbones import Backbone, backbone, load_shown
from gradsift.training.device import TokenBudget, device_of
from gradsift.training.lora import left_out
from gradsift.training.probing import require_adaptable
from gradsift.training.target import load_target, say_report


class Inputs:
    """The inputs of one run's scorer and selector. Each input is read from the store, or made if it is not there."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.config = config
        self.runtime = runtime
        self.keeps_all = config.scorer_name == "full"
        self._tried: set[str] = set()  # options (`proxy.lora`, ...) whose adapters were checked
        self.loaded = load(runtime, config.data)
        self.rows = int(self.loaded.info["rows"])  # N

    @functools.cached_property
    def pool(self) -> list[Example]:
        """The examples to select from."""
        return pool_of(self.loaded)

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
        """The proxy's backbone, and the pool's examples as tokens."""
        inputs, self._report = self._encoded(self.pool, "the proxy")
        return inputs

    @functools.cached_property
    def target(self) -> Artifact:
        return backbone(self.runtime, self.config.target.model)

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
        """Return `proxy_inputs`, after a check that proxy and target can be trained with their adapters.

        Stages call this method only when they have to make an artifact, so a run whose artifacts all exist loads no
        model.

        Args:
            option: the option that describes the adapter to train, `proxy.lora` or `features.warmup.lora`.
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
    def ensemble(self) -> Ensemble:
        return Ensemble(self.runtime, self.config.proxy, self.proxy, self.loaded, self._inputs_to_train)

    @functools.cached_property
    def adapters(self) -> list[list[Artifact]]:
        """The ensemble's weights as [adapter][epoch - 1]: one adapter per member, or one that all members share."""
        return train_adapters(self.ensemble)

    def norms(self, epoch: int) -> list[list[Artifact]]:
        """Return artifacts with the members' per-sample gradient norms after an epoch, as [member][shard]."""
        return ensemble_norms(self.ensemble, self.adapters, epoch)

    @functools.cached_property
    def late_norms(self) -> list[list[Artifact]]:
        return self.norms(self.config.proxy.snapshots[1])

    @property
    def has_ensemble(self) -> bool:
        """Whether the scorer asked for norms or losses of the ensemble."""
        return not {"late_norms", "answer_losses"}.isdisjoint(vars(self))

    def collect_shard(self) -> list[int]:
        """Collect all members' norms of the examples in the shard `proxy.shard`; return the incomplete shards."""
        shard = self.config.proxy.shard
        assert shard is not None  # noqa: S101 - checked by the caller
        return collect_shard(self.ensemble, self.adapters, shard)

    @functools.cached_property
    def statistics(self) -> Artifact:
        """Artifact with the mean and variance of each example's norms over the members (GRADFILTERING, section 3)."""
        proxy = self.config.proxy
        early = self.norms(proxy.snapshots[0])
        return statistics(self.runtime, early, self.late_norms, proxy.snapshots, proxy.norm_scope, self.rows)

    @functools.cached_property
    def answer_losses(self) -> list[Artifact]:
        """Losses of the examples' responses, after their own and after other prompts, at the late snapshot.

        The late snapshot is the epoch `proxy.snapshots[1]`.

        There is one table per adapter (`gradsift.proxy.member_tables`).
        """
        late = self.config.proxy.snapshots[1] - 1
        return [answer_losses(self.ensemble, epochs[late], i) for i, epochs in enumerate(self.adapters)]

    def late_losses(self) -> np.ndarray:
        """Return each example's loss at the late snapshot, averaged over the members, (N,) float64."""
        return mean_loss(self.late_norms, self.rows)

    def measures(self) -> dict[str, np.ndarray]:
        """Return each example's loss at the late snapshot and its number of response tokens, as arrays (N,) by name.

        The dict is empty if the scorer did not ask for norms.
        """
        if "late_norms" not in vars(self):
            return {}
        tokens = by_example(self.late_norms[0], ("n_tokens",), self.rows)["n_tokens"]  # the same for every member
        return {"late_loss": self.late_losses(), "response_tokens": tokens}

    def diagnose(self, asked: Sequence[str]) -> list[Diagnostic]:
        """Return the diagnostics of the ensemble's training from its first epoch to the late snapshot.

        The list is empty if the scorer uses no ensemble. `asked` names the sources that the scorer asks for.
        """
        if not self.has_ensemble:
            return []
        trained = [epochs[: self.config.proxy.snapshots[1]] for epochs in self.adapters]
        table = read_statistics(self.statistics) if "statistics" in asked else None
        return diagnose_ensemble(trained, table, self.config.proxy.members)

    @functools.cached_property
    def directions(self) -> list[Artifact]:
        """Cosine of each example's gradient with the mean gradient, at the late snapshot: one table per adapter."""
        late = self.config.proxy.snapshots[1] - 1
        return [directions(self.ensemble, epochs[late]) for epochs in self.adapters]

    @functools.cached_property
    def embedding_gradients(self) -> Artifact:
        """Statistics of each example's gradients with respect to the input embedding and the LM head.

        They are computed at the first member's weights after its first epoch.
        """
        (first,) = train_members(with_check(self.ensemble), [0], epochs=1)[0]
        return embedding_gradients(self.ensemble, first, self.rows)

    @functools.cached_property
    def target_set(self) -> Artifact:
        return load_target_set(self.runtime, self.config.target_set, self.loaded)

    @functools.cached_property
    def checkpoints(self) -> list[Artifact]:
        """The checkpoints of the gradient features' warm-up (adapter and Adam's state), one per epoch."""
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
        """Gradient features of the target set, from plain gradients: `features.adam` applies to the pool only."""
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

    @functools.cached_property
    def sources(self) -> dict[str, Source]:
        """The inputs that a scorer or selector may ask for, by name (see `gradsift.scoring`, `gradsift.selection`)."""
        proxy = self.config.proxy
        encoding = encoding_settings(proxy.template, proxy.max_length)
        of_tokens = functools.partial(Source, reads_tokens=True)
        return {
            "count": Source(list, lambda: self.rows),
            "examples": Source(list, lambda: self.pool),
            "labels": Source(lambda: [self.loaded], lambda: labels_of(self.loaded)),
            "statistics": of_tokens(lambda: [self.statistics], lambda: read_statistics(self.statistics)),
            "late_losses": of_tokens(lambda: list(chain.from_iterable(self.late_norms)), self.late_losses),
            "answer_losses": of_tokens(
                lambda: self.answer_losses, lambda: read_answer_losses(self.answer_losses, self.rows)
            ),
            "embedding_gradients": of_tokens(
                lambda: [self.embedding_gradients], lambda: read_embedding_gradients(self.embedding_gradients)
            ),
            "directions": of_tokens(lambda: self.directions, lambda: read_cosines(self.directions, self.rows)),
            "gradients": of_tokens(lambda: [self.gradients], lambda: read_features(self.gradients)),
            "target_gradients": Source(lambda: [self.target_gradients], lambda: read_features(self.target_gradients)),
            "backbone": Source(lambda: [self.proxy], lambda: self.proxy_backbone),
            "proxy_inputs": of_tokens(lambda: [self.proxy], lambda: self.proxy_inputs, encoding),
            "embeddings": Source(lambda: [self.embeddings], lambda: read_features(self.embeddings)),
            "target_embeddings": Source(
                lambda: [self.target_embeddings], lambda: read_features(self.target_embeddings)
            ),
            "rater": rater(self.runtime, self.config.judge),
            "published_scores": Source(list, lambda: read_scores(self.loaded.file(PUBLISHED_FILE))),
            "task": Source(list, lambda: self.runtime.display.task),
            "journal": Source(list, Journal),  # replaced by the score stage, whose journal keeps results
        }
