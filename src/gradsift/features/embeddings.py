"""The stage `embeddings`: one unit vector (norm 1) for the text of each example, computed by the run's embedder.

Equal texts are embedded once, so that exact duplicates have equal embeddings. After an interruption, the stage
continues with the first block of texts that was not finished.

The embedder `hidden_states` pools the last hidden states of a causal language model over the tokens of a text:

    e = sum over t of w_t h_t,  with weights that sum to 1 over the text's T tokens (padding is not counted)
    mean           w_t = 1 / T
    weighted_mean  w_t = t / (1 + ... + T): later hidden states depend on more of the text (RDS+, arXiv 2503.01807)
    last           w_T = 1, and all other weights are 0

Shape letters: N examples, B texts of a batch, T tokens, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from gradsift.artifacts import Artifact
from gradsift.config import EmbedderConfig, HiddenStatesConfig
from gradsift.data.batching import Batch, collate
from gradsift.data.examples import Example, Rejected, write_rejected
from gradsift.data.tokens import REFUSED_FILE, Encoded, encode, encode_prompts, encoding_settings, say_refused
from gradsift.errors import ConfigError, GradsiftError
from gradsift.features.vectors import fill_block, finish_features, open_features, unit_rows
from gradsift.runtime import Advance, Runtime
from gradsift.training.backbones import Backbone
from gradsift.training.device import TokenBudget, without_host_reads

VERSION = 2
_BLOCK = 4096  # texts between two entries of the journal


class Encoder(Protocol):
    """A loaded model that turns texts into vectors."""

    model: Any  # its transformer, for the token budget
    dimensions: int

    def read(self, examples: Sequence[Example], advance: Advance) -> tuple[list[Encoded], int, list[Rejected]]:
        """Return the tokens of each example with a non-empty text, and what was cut or left out.

        Returns:
            The tokens, the number of texts that were cut to the largest length, and the rejected examples.
        """

    def embed(self, texts: Sequence[Encoded]) -> np.ndarray:
        """Return the vectors of the texts, (B, D) float32, from one forward pass. Their norms need not be 1."""


@dataclass(frozen=True)
class Embedder:
    name: str
    settings: Mapping[str, Any]  # all that the vectors depend on besides the model; JSON values
    model: Artifact
    load: Callable[[], Encoder]


def embed(
    runtime: Runtime,
    embedder: Embedder,
    source: Artifact,
    rows: Callable[[], tuple[Sequence[Example], Sequence[str]]],
) -> Artifact:
    """Return an artifact with the examples' embeddings, to be read with `read_features`.

    An example has a row of zeros if its text is empty or the proxy's chat template cannot render it.

    Args:
        source: the artifact with the examples.
        rows: returns the examples of `source` and a list of tasks: the task of each example of a target set, or an
            empty list for a pool.

    Raises:
        GradsiftError: an embedding is not finite; the message names the rows.
    """

    def make(folder: Path) -> Mapping[str, Any]:
        (examples, tasks), encoder = rows(), embedder.load()
        with runtime.display.task("read texts", len(examples)) as advance:
            texts, cut, refused = encoder.read(examples, advance)
        if cut:
            runtime.display.say(
                f"  {cut:,} of {len(examples):,} texts were cut to embedder.max_length or the model's own limit"
            )
        if refused:
            say_refused(runtime, refused, len(examples), "proxy", "texts")
            write_rejected(folder / REFUSED_FILE, refused)
        vectors = open_features(folder, len(examples), encoder.dimensions)
        vectors[np.setdiff1d(np.arange(len(examples)), [text.row for text in texts])] = 0
        _fill(runtime, folder, encoder, texts, vectors)
        finish_features(folder, vectors, [example.example_id for example in examples], tasks)
        counts = {"empty": len(examples) - len(texts), "cut": cut, "refused": len(refused)}
        return {"rows": len(examples), "dimensions": encoder.dimensions, **counts}

    slug, parents = f"{embedder.name}-{source.stage}", [embedder.model, source]
    return runtime.store.obtain("embeddings", slug, dict(embedder.settings), parents, make, version=VERSION)


def _fill(runtime: Runtime, folder: Path, encoder: Encoder, texts: Sequence[Encoded], vectors: np.memmap) -> None:
    """Write the embeddings of `texts` to their rows of `vectors` (N, D)."""
    by_tokens: dict[bytes, list[Encoded]] = {}
    for text in texts:
        by_tokens.setdefault(text.input_ids.tobytes(), []).append(text)
    groups = list(by_tokens.values())
    budget = TokenBudget.of(encoder.model, runtime.compute.tokens, runtime.display.say)
    journal = runtime.journal(folder)
    with runtime.display.task(f"embed {len(texts):,} texts", len(groups)) as advance:
        for start in range(0, len(groups), _BLOCK):
            block = groups[start : start + _BLOCK]

            def make(block: Sequence[Sequence[Encoded]] = block) -> np.ndarray:
                unit = embedded(encoder, [equal[0] for equal in block], budget, advance)
                return np.repeat(unit, [len(equal) for equal in block], axis=0)

            index = [text.row for equal in block for text in equal]
            if not fill_block(journal, vectors, index, [start, start + len(block)], make):
                advance(len(block))


def embedded(encoder: Encoder, texts: Sequence[Encoded], budget: TokenBudget, advance: Advance) -> np.ndarray:
    """Return the embeddings of `texts`, scaled to norm 1, (len(texts), D) float32.

    They are computed in batches of texts that have similar numbers of tokens.
    """
    place_of = {text.row: place for place, text in enumerate(texts)}
    vectors = np.empty((len(texts), encoder.dimensions), dtype=np.float32)

    def embed_batch(batch: list[Encoded]) -> None:
        output = encoder.embed(batch)
        bad = np.flatnonzero(~np.isfinite(output).all(axis=1))
        if len(bad):
            rows = ", ".join(str(batch[place].row_index) for place in bad[:8])
            raise GradsiftError(
                f"the embedding of row {rows} is not finite; take compute.precision=float32 or another embedder"
            )
        vectors[[place_of[text.row] for text in batch]] = unit_rows(output)

    for _ in budget.passes(texts, embed_batch, advance=advance):
        pass
    return vectors


class HiddenStates:
    """The proxy's backbone as an `Encoder`."""

    def __init__(self, backbone: Backbone, config: HiddenStatesConfig, template: str) -> None:
        self._backbone, self._config, self._template = backbone, config, template
        self.model = backbone.model
        if self.model.base_model is self.model:
            raise ConfigError(
                f"embedder={config.name}: {type(self.model).__name__} gives no hidden states apart from its logits; "
                "take another proxy, or embedder=sentence_transformers"
            )
        self.dimensions = int(self.model.config.get_text_config().hidden_size)

    def read(self, examples: Sequence[Example], advance: Advance) -> tuple[list[Encoded], int, list[Rejected]]:
        """See `Encoder.read`.

        A text counts as empty if it has no response token. With `embedder.text=prompt`, it counts as empty if it has no
        token at all.
        """
        tokenizer, limit = self._backbone.tokenizer, min(self._config.max_length, self._backbone.context)
        if self._config.text == "prompt":
            ids, cut, refused = encode_prompts(examples, tokenizer, self._template, limit, advance)
            prompts = [
                Encoded(row, example.row_index, each, np.zeros(len(each), dtype=bool))
                for row, (example, each) in enumerate(zip(examples, ids, strict=True))
            ]
            return [prompt for prompt in prompts if len(prompt.input_ids)], cut, list(refused.values())
        encoded, report = encode(examples, tokenizer, self._template, limit, advance)
        # not the sum: a response is cut only after its prompt, so most examples with a cut response are in both counts
        return encoded, max(report.truncated_prompts, report.truncated_responses), list(report.refused.values())

    @torch.inference_mode()
    def embed(self, texts: Sequence[Encoded]) -> np.ndarray:
        batch = collate(texts, self._backbone.pad_id).to(self.model.device)
        vectors: np.ndarray = pooled_states(self.model, batch, self._config.pooling).cpu().numpy()
        return vectors


def hidden_states_embedder(
    config: EmbedderConfig, template: str, proxy: Artifact, backbone: Callable[[], Backbone]
) -> Embedder:
    """Return the embedder that pools the hidden states of the proxy's `backbone`; `template` is `proxy.template`."""
    if not isinstance(config, HiddenStatesConfig):
        raise ConfigError(
            f"embedder={config.name} is not known; choose hidden_states, rds_plus or sentence_transformers"
        )
    template = "plain" if config.text == "instruction_input_output" else template  # `plain`: each field on a line
    settings = {"text": config.text, "pooling": config.pooling, **encoding_settings(template, config.max_length)}
    return Embedder(config.name, settings, proxy, lambda: HiddenStates(backbone(), config, template))


def pooled_states(model: Any, batch: Batch, pooling: str) -> torch.Tensor:
    """Return the pooled last hidden states of a batch, (B, D) float32; padding on either side has no effect."""
    inputs = {**batch.model_inputs(), "attention_mask": batch.attention_mask}
    with without_host_reads():
        hidden = model.base_model(**inputs, use_cache=False)[0]
    return pool(hidden, batch.attention_mask, pooling)


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Return the weighted sum (B, D) of hidden states (B, T, D) over the real tokens, summed in float32.

    `mask` (B, T) is 1 at real tokens and 0 at padding. Every text must have at least one real token.
    """
    real = mask.bool()
    place = real.cumsum(1)  # t; padding is not counted, so the padding side does not matter
    if pooling == "mean":
        weights = real.float()
    elif pooling == "weighted_mean":
        weights = (place * real).float()
    else:  # last
        weights = (real & (place == place[:, -1:])).float()
    weights = weights / weights.sum(1, keepdim=True)
    known = hidden.float().masked_fill(~real[:, :, None], 0.0)  # states at padding tokens may be NaN
    return torch.einsum("bt,btd->bd", weights, known)
