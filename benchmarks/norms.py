"""Per-sample LoRA gradient norms: one batched backward pass against a loop over examples.

    python -m benchmarks.norms [--rounds 5] [--rows 64]

GPT-2 (124M architecture, random weights: the arithmetic is the same), LoRA rank 8 on all linear
layers, float32, rows with lengths drawn from a shipped histogram of Alpaca's (prompt and response
in GPT-2 tokens). The two ways take turns on the same rows; `bench.json` holds the ratio loop / batched.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gradsift.config import LoraConfig
from gradsift.data.batching import collate, length_batches
from gradsift.data.tokens import Encoded
from gradsift.gradients.norms import PerSampleNorms
from gradsift.training import lora
from gradsift.training.finetuning import response_losses

# tokens at the quantiles 0, 10, ..., 100 % of 5,000 Alpaca rows (SmolLM2's tokenizer, Alpaca template)
PROMPT_QUANTILES = (33, 37, 39, 40, 42, 44, 53, 60, 65, 73, 280)
RESPONSE_QUANTILES = (2, 8, 12, 18, 29, 45, 61, 78, 97, 126, 588)


def rows_like_alpaca(count: int, seed: int = 0) -> list[Encoded]:
    """Random token ids with Alpaca's lengths; at most 512 tokens."""
    rng = np.random.default_rng(seed)
    grid = np.linspace(0, 1, 11)
    rows = []
    for row in range(count):
        prompt, response = (
            int(np.interp(rng.random(), grid, quantiles)) for quantiles in (PROMPT_QUANTILES, RESPONSE_QUANTILES)
        )
        length = min(512, prompt + response)
        is_response = np.arange(length) >= length - min(response, length - 1)
        rows.append(Encoded(row, rng.integers(0, 50257, length).astype(np.int32), is_response))
    return rows


def batched(adapted: torch.nn.Module, rows: Sequence[Encoded], max_tokens: int) -> np.ndarray:
    """What the collection pass does; (N, 2) norms of A and B."""
    norms = np.empty((len(rows), 2))
    with PerSampleNorms(adapted) as hooks:
        for positions in length_batches([len(row.input_ids) for row in rows], max_tokens):
            response_losses(adapted, collate([rows[position] for position in positions], 0)).sum().backward()
            norms[positions] = torch.stack(hooks.take(), 1).numpy()
            adapted.zero_grad(set_to_none=True)
    return norms


def loop(adapted: torch.nn.Module, rows: Sequence[Encoded]) -> np.ndarray:
    """One example a backward pass, the norms from the parameters' gradients."""
    parameters = lora.trainable_parameters(adapted)
    norms = np.empty((len(rows), 2))
    for row in rows:
        response_losses(adapted, collate([row], 0)).sum().backward()
        squares = {"A": 0.0, "B": 0.0}
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                squares["A" if "lora_A" in name else "B"] += float(parameter.grad.square().sum())
        norms[row.row] = squares["A"] ** 0.5, squares["B"] ** 0.5
        adapted.zero_grad(set_to_none=True)
    return norms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=1024, help="padded tokens a batch")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    adapted = lora.add_adapter(GPT2LMHeadModel(GPT2Config()).requires_grad_(False).eval(), LoraConfig(), seed=0)
    for name, parameter in lora.trainable_parameters(adapted).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01)  # at B = 0 the gradient of A vanishes
    rows = rows_like_alpaca(options.rows)
    ratios, seconds = [], []
    for number in range(options.rounds + 1):
        started = time.perf_counter()
        fast = batched(adapted, rows, options.max_tokens)
        middle = time.perf_counter()
        slow = loop(adapted, rows)
        ended = time.perf_counter()
        if number:  # the first round warms up
            ratios.append((ended - middle) / (middle - started))
            seconds.append((middle - started) / len(rows))
    error = float(np.abs(fast / slow - 1).max())
    ratio = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    result = {
        "vs_loop": ratio,
        "precision": "float32",
        "collect": "epoch_end",
        "rows": len(rows),
        "rounds": options.rounds,
        "threads": torch.get_num_threads(),
        "seconds_per_example": statistics.median(seconds),
        "largest_relative_difference": error,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(
        f"batched norms against the loop, {len(rows)} rows, {options.rounds} rounds, {result['threads']} threads: "
        f"{ratio['median']:.2f}x [{ratio['min']:.2f}, {ratio['max']:.2f}], "
        f"{result['seconds_per_example'] * 1000:.0f} ms an example, largest relative difference {error:.1e}"
    )


if __name__ == "__main__":
    main()
