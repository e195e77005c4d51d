"""Embeddings from a causal language model: its last hidden states, pooled over the tokens of a text.

    e = sum over t of w_t h_t,  with weights that sum to 1 over the T real tokens
    mean           w_t = 1 / T
    weighted_mean  w_t = t / (1 + ... + T): later tokens have read more of the text (RDS+)
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
from gradsift.data.examples import Example
from gradsift.data.tokens import Encoded, encode, encode_prompts, encoding_settings
from gradsift.errors import ConfigError
from gradsift.features.embeddings import Embedder, Text
from gradsift.runtime import Advance
from gradsift.training.backbones import Backbone


class HiddenStates:
    """An encoder that is the proxy's backbone (see `gradsift.features.embeddings.Encoder`)."""

    def __init__(self, backbone: Backbone, config: HiddenStatesConfig, template: str) -> None:
        self._backbone, self._config, self._template = backbone, config, template
        self.model = backbone.model
        if self.model.base_model is self.model:
            raise ConfigError(
                f"embedder={config.name}: {type(self.model).__name__} gives no hidden states apart from its logits; "
                "take another proxy, or embedder=sentence_transformers"
            )
        self.dimensions = int(self.model.config.get_text_config().hidden_size)

    def read(self, examples: Sequence[Example], advance: Advance) -> tuple[list[Text], int]:
        """The tokens of each example, as the proxy is trained on them, and how many examples were cut."""
        tokenizer, limit = self._backbone.tokenizer, min(self._config.max_length, self._backbone.context)
        if self._config.text == "prompt":
            ids, cut = encode_prompts(examples, tokenizer, self._template, limit, advance)
            return [_text(each) for each in ids], cut
        encoded, report = encode(examples, tokenizer, self._template, limit, advance)
        texts = [Text(b"", 0)] * len(examples)  # what has no response token stays empty
        for example in encoded:
            texts[example.row] = _text(example.input_ids)
        # not the sum: an example that loses response tokens has lost those of its prompt before
        return texts, max(report.truncated_prompts, report.truncated_responses)

    @torch.inference_mode()
    def embed(self, texts: Sequence[Text]) -> np.ndarray:
        """(B, D) float32, of any length."""
        batch = collate([_encoded(row, text) for row, text in enumerate(texts)], self._backbone.pad_id)
        pooled: np.ndarray = pooled_states(self.model, batch.to(self.model.device), self._config.pooling).cpu().numpy()
        return pooled


def hidden_states_embedder(
    config: EmbedderConfig, template: str, proxy: Artifact, backbone: Callable[[], Backbone]
) -> Embedder:
    """The embedder of this config; `template` is the proxy's.

    Raises:
        ConfigError: the config is another embedder's.
    """
    if not isinstance(config, HiddenStatesConfig):
        raise ConfigError(
            f"embedder={config.name} is not known; choose hidden_states, rds_plus or sentence_transformers"
        )
    template = "plain" if config.text == "instruction_input_output" else template  # a line each
    settings = {"text": config.text, "pooling": config.pooling, **encoding_settings(template, config.max_length)}
    return Embedder(config.name, settings, proxy, lambda: HiddenStates(backbone(), config, template))


def pooled_states(model: Any, batch: Batch, pooling: str) -> torch.Tensor:
    """Pooled last hidden states of a batch, (B, D) float32; padding, on either side, has no part in them."""
    inputs = {**batch.model_inputs(), "attention_mask": batch.attention_mask}
    hidden = model.base_model(**inputs, use_cache=False)[0]
    return pool(hidden, batch.attention_mask, pooling)


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Weighted sum of hidden states over the real tokens, summed in float32.

    Args:
        hidden: (B, T, D)
        mask: (B, T), 1 at real tokens, of which every text has at least one.
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
    known = hidden.float().masked_fill(~real[:, :, None], 0.0)  # a state at padding may be anything, NaN too
    return torch.einsum("bt,btd->bd", weights, known)


def _text(ids: np.ndarray) -> Text:
    return Text(ids.astype(np.int32).tobytes(), len(ids))


def _encoded(row: int, text: Text) -> Encoded:
    ids = np.frombuffer(text.content, dtype=np.int32)
    return Encoded(row, row, ids, np.zeros(len(ids), dtype=bool))
