"""Scores by the length of the response, the prompt or both: a cheap baseline (Zhao et al., arXiv 2402.04833).

Lengths are measured without template, special tokens or truncation. `conf/scorer/length.yaml` chooses one of the two
functions by `scorer.unit`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradsift.data.examples import Example
from gradsift.scoring.scores import Scores
from gradsift.scoring.superfilter import token_ids
from gradsift.training.backbones import Backbone


def length_in_tokens(examples: Sequence[Example], backbone: Backbone, *, unit: str, part: str, prefer: str) -> Scores:
    """Score by the number of tokens. The proxy's tokenizer tokenises each text by itself.

    Args:
        unit: name in `Scores.parts` under which the lengths are returned.
        part: response (the last one of a conversation), prompt (all before it) or both.
        prefer: long (the score is the length) or short (the score is minus the length).
    """
    texts = [texts_of(example, part) for example in examples]
    counts = [len(ids) for ids in token_ids(backbone.tokenizer, [text for row in texts for text in row], special=False)]
    row_of = np.repeat(np.arange(len(texts)), [len(row) for row in texts])
    return _scores(np.bincount(row_of, counts, minlength=len(texts)), unit, prefer)


def length_in_characters(examples: Sequence[Example], *, unit: str, part: str, prefer: str) -> Scores:
    """Score by length in Unicode characters; the arguments are as in `length_in_tokens`, without the backbone."""
    counts = [sum(map(len, texts_of(example, part))) for example in examples]
    return _scores(np.array(counts, dtype=float), unit, prefer)


def texts_of(example: Example, part: str) -> list[str]:
    """Return the texts of an example's response, of its prompt (earlier turns, instruction, input) or of both."""
    prompt = [*(turn.content for turn in example.history), example.instruction, example.input]
    return {"response": [example.output], "prompt": prompt, "both": [*prompt, example.output]}[part]


def _scores(lengths: np.ndarray, unit: str, prefer: str) -> Scores:
    return Scores(lengths if prefer == "long" else -lengths, {unit: lengths})
