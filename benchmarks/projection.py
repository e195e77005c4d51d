"""Compare the time of projecting per-sample gradients with the time of the passes that compute them.

    python -m benchmarks.projection [--rank 128] [--dimensions 8192] [--rows 4] [--rounds 3]

GPT-2 (124M, random weights) with LoRA on its attention layers, rows with Alpaca's lengths, float32, one thread. Each
round measures the processor time of forward and backward passes with per-sample gradients, and of the projection.
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks.engine import away_from_zero
from benchmarks.workload import alpaca_rows, gpt2, spread
from gradsift.config import LoraConfig
from gradsift.gradients.per_sample import gradient_pass
from gradsift.gradients.projection import Projection
from gradsift.training import lora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rank", 128), ("dimensions", 8192), ("rows", 4), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)  # with more threads, the time that they wait for each other would count
    targets = ["c_attn", "attn.c_proj"]
    adapted = away_from_zero(lora.add_adapter(gpt2(torch.float32), LoraConfig(rank=options.rank, targets=targets), 0))
    rows, _ = alpaca_rows(options.rows * (options.rounds + 1))
    passes, projections = [], []
    with gradient_pass(adapted, "lora", 0) as gradients:
        project = Projection(gradients.size, options.dimensions, seed=0)
        for number in range(options.rounds + 1):
            started = time.process_time()
            batch = rows[number * options.rows : (number + 1) * options.rows]
            block = torch.cat([values for _, values in gradients.parts(batch)])
            passed = time.process_time()
            project(block)
            if number:  # the first round warms up
                passes.append((passed - started) / options.rows)
                projections.append((time.process_time() - passed) / options.rows)
    print(f"{gradients.size:,} numbers to {options.dimensions:,}, {options.rows} rows at once, seconds a row:")
    print(f"  passes {spread(passes)}\n  projection {spread(projections)}")
    print(f"  projection / passes {spread([p / g for p, g in zip(projections, passes, strict=True)])}")


if __name__ == "__main__":
    main()
