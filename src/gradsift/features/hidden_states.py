"""Embeddings from a causal language model: its last hidden states, pooled over the tokens of a text.

    e = sum over t of w_t h_t,  with weights that sum to 1 over the T real tokens
    mean           w_t = 1 / T
    weighted_mean  w_t = t / (1 + ... + T): later hidden states depend on more of the text (RDS+, arXiv 2503.01807)
    last           w_T = 1

Shape letters: B texts of a batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from gradsift.artifacts import Artifact
from gradsift.config import EmbedderConfig, HiddenStatesConfig
from gradsift.data.batching import Batch, collate
from gradsift.data.examples import Example, Rejected
from gradsift.data.tokens import Encoded, encode, encode_prompts, encoding_settings
from gradsift.errors import ConfigError
from gradsift.features.embeddings import Embedder
from gradsift.runtime import Advance
from gradsift.training.backbones import Backbone
from gradsift.training.device import without_host_reads


class HiddenStates:
    """The proxy's backbone as an encoder (see `gradsift.features.embeddings.Encoder`)."""

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
        """Return each example's tokens, how many examples were cut, and the examples that cannot be rendered.

        With text=prompt, the tokens are those of the prompt. Otherwise they are those of the whole example, in the
        template that the encoder was made with. An example without a response token (with text=prompt: without a token)
        is left out.
        """
        tokenizer, limit = self._backbone.tokenizer, min(self._config.max_length, self._backbone.context)
        if self._config.text == "prompt":
            refused: dict[int, Rejected] = {}
            ids, cut = encode_prompts(examples, tokenizer, self._template, limit, advance, refused)
            prompts = [
                Encoded(row, example.row_index, each, np.zeros(len(each), dtype=bool))
                for row, (example, each) in enumerate(zip(examples, ids, strict=True))
            ]
            return [prompt for prompt in prompts if len(prompt.input_ids)], cut, list(refused.values())
        encoded, report = encode(examples, tokenizer, self._template, limit, advance)
        # not the sum, which would count most cut responses twice: a prompt is cut before its response
        return encoded, max(report.truncated_prompts, report.truncated_responses), list(report.refused.values())

    @torch.inference_mode()
    def embed(self, texts: Sequence[Encoded]) -> np.ndarray:
        """Return vectors (B, D) float32, not normalised."""
        batch = collate(texts, self._backbone.pad_id).to(self.model.device)
        vectors: np.ndarray = pooled_states(self.model, batch, self._config.pooling).cpu().numpy()
        return vectors


def hidden_states_embedder(
    config: EmbedderConfig, template: str, proxy: Artifact, backbone: Callable[[], Backbone]
) -> Embedder:
    """Return the embedder that pools hidden states of the proxy's backbone as `config` says.

    Args:
        template: the proxy's template.

    Raises:
        ConfigError: the config belongs to another embedder.
    """
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
    """Return the weighted sum of hidden states over the real tokens, summed in float32.

    Args:
        hidden: (B, T, D)
        mask: (B, T), 1 at real tokens; every text has at least one.
        pooling: mean, weighted_mean or last.

    Returns:
        (B, D) float32

    Raises:
        ConfigError: unknown pooling.
    """
    real = mask.bool()
    place = real.cumsum(1)  # t, counted over real tokens, so that the padding side does not matter
    if pooling == "mean":
        weights = real.float()
    elif pooling == "weighted_mean":
        weights = (place * real).float()
    elif pooling == "last":
        weights = (real & (place == place[:, -1:])).float()
    else:
        raise ConfigError(f"pooling={pooling!r} is not known; choose one of: mean, weighted_mean, last")
    weights = weights / weights.sum(1, keepdim=True)
    known = hidden.float().masked_fill(~real[:, :, None], 0.0)  # the state at a padding token may be NaN
    return torch.einsum("bt,btd->bd", weights, known)
