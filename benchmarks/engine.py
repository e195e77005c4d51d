"""Compare the speed of the gradient engine with the alternatives that users have.

    python -m benchmarks.engine [--rounds 3] [--steps 3] [--targets c_attn]

The model is GPT-2 (124M architecture, random weights: the arithmetic is the same) with LoRA of rank 8.
The rows have Alpaca's lengths: real lengths if GRADSIFT_DATA is set and SmolLM2 is installed, else
lengths drawn from a shipped histogram. Each round has its own rows, on which all of these ways are timed:

  engine       training steps of a member in bfloat16, with the norms from their own backward passes
  step         like engine, but without the callback and so without norms
  epoch_end    the extra pass of collect=epoch_end in bfloat16
  *_float32    engine, step and epoch_end in float32
  loop         one backward pass per example, float32, the norms from the parameters' gradients
  opacus       GradSampleModule, sorted batches of 8, float32
  ghost        Opacus' fast gradient clipping (ghost norms), sorted batches of 8, float32
  vmap         torch.func: vmap(grad) over sorted batches of 8, float32
  plain_step   Lightning and peft as a user would train, random padded batches of 8, float32, no norms

`bench.json` holds the ratios (median, min, max over the rounds), and the precision and `collect` setting of the engine
in these ratios.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import peft
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.workload import alpaca_rows, gemm_peak, gpt2, interleaved, merge_into, spread
from gradsift.config import ComputeConfig, LoraConfig
from gradsift.data.batching import Batch, collate, epoch_batches
from gradsift.data.tokens import Encoded
from gradsift.gradients.callback import GradientNormCallback
from gradsift.proxy.collection import collect_norms
from gradsift.training import lora
from gradsift.training.device import TokenBudget
from gradsift.training.finetuning import fit
from gradsift.training.modules import Optimization, ProxyMember
from gradsift.training.numerics import prepare

POOL = 2000
BATCH = 8
CPU = ComputeConfig(device="cpu")


def adapted_gpt2(precision: torch.dtype, targets: list[str]) -> Any:
    """Return GPT-2 with an adapter, set up as with `proxy=gpt2` on a CPU."""
    model = gpt2(precision, activation="gelu_pytorch_tanh", attention="eager")
    prepare(model, CPU)
    return away_from_zero(lora.add_adapter(model, LoraConfig(targets=targets), seed=0))


def peft_gpt2(targets: list[str]) -> Any:
    """Return GPT-2 with an adapter in float32, set up by peft and transformers alone."""
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=targets, lora_dropout=0.0, fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    return away_from_zero(peft.get_peft_model(gpt2(torch.float32), config))


def away_from_zero(adapted: Any) -> Any:
    """Set B to small random numbers, as after some training, because at B = 0 the gradient of A is zero."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in lora.trainable_parameters(adapted).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01, generator=generator)
    return adapted


class Clock(L.Callback):
    """Measures the seconds from the start of a training to the end of its last step."""

    seconds = 0.0

    def on_train_start(self, *arguments: Any) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.seconds = time.perf_counter() - self._started


class Round:
    """The rows of each round, in batches of similar lengths as in an epoch over the pool; round -1 has one batch."""

    def __init__(self, pool: Sequence[Encoded], steps: int) -> None:
        self.pool = pool
        plan = epoch_batches([len(row.input_ids) for row in pool], BATCH, "bucketed", seed=0)
        self._steps = [plan[start : start + steps] for start in range(0, len(plan), steps)]

    def plan(self, number: int) -> list[list[int]]:
        return self._steps[number % len(self._steps)] if number >= 0 else self._steps[-1][:1]

    def rows(self, number: int) -> list[Encoded]:
        return [self.pool[position] for step in self.plan(number) for position in step]

    def sorted_batches(self, number: int) -> list[list[Encoded]]:
        rows = sorted(self.rows(number), key=lambda row: len(row.input_ids))
        return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]

    def random_batches(self, number: int) -> list[list[Encoded]]:
        rows = self.rows(number)
        order = np.random.default_rng(number + 1).permutation(len(rows))
        return [[rows[p] for p in order[start : start + BATCH]] for start in range(0, len(rows), BATCH)]


# --------------------------------------------------------------------------------------------- ours


def train(adapted: Any, rounds: Round, number: int, with_norms: bool) -> tuple[float, np.ndarray | None]:
    """Return the seconds of a member's training steps, and the round's norms (N, 2), or None without norms."""
    clock, plan, rows = Clock(), rounds.plan(number), rounds.rows(number)
    budget = TokenBudget.of(adapted.get_base_model(), None, print)
    module = ProxyMember(adapted, Optimization(1e-12, 0.0, "constant", 0, len(plan)), budget, pad_id=0)
    norms = GradientNormCallback()
    fit(
        module,
        rounds.pool,
        plan,
        compute=CPU,
        callbacks=[norms, clock] if with_norms else [clock],
    )
    if not with_norms:
        return clock.seconds, None
    table = norms.records.columns(rows)
    return clock.seconds, np.stack([table["norm_A"], table["norm_B"]], 1)


def epoch_end(adapted: Any, rounds: Round, number: int) -> float:
    budget = TokenBudget.of(adapted.get_base_model(), None, print)
    started = time.perf_counter()
    collect_norms(adapted, rounds.rows(number), budget, 0, CPU)
    return time.perf_counter() - started


# ------------------------------------------------------------------------------------------- rivals


def labels_of(batch: Batch) -> torch.Tensor:
    """Return labels as transformers expects them: -100 for tokens without a loss."""
    labels = torch.full_like(batch.input_ids, -100)
    labels.view(-1)[batch.places + 1] = batch.targets
    return labels


def loop(model: Any, rows: Sequence[Encoded]) -> tuple[float, np.ndarray]:
    """Return the seconds and the norms (N, 2) of one forward and backward pass per example."""
    parameters = lora.trainable_parameters(model)
    norms = np.empty((len(rows), 2))
    started = time.perf_counter()
    for index, row in enumerate(rows):
        batch = collate([row], 0)
        model(input_ids=batch.input_ids, labels=labels_of(batch)).loss.backward()
        squares = {"A": 0.0, "B": 0.0}
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                squares["A" if "lora_A" in name else "B"] += float(parameter.grad.square().sum())
        norms[index] = squares["A"] ** 0.5, squares["B"] ** 0.5
        model.zero_grad(set_to_none=True)
    return time.perf_counter() - started, norms


def mean_losses(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return each example's mean loss over its response tokens, (B,), from the logits of all tokens."""
    labels = labels_of(batch)
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    return losses.view(len(labels), -1).sum(1) / batch.counts


def backward_from_all_logits(module: Any, rows: Sequence[Encoded]) -> None:
    """Backpropagate the sum of the examples' mean losses."""
    batch = collate(rows, 0)
    logits = module(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    mean_losses(logits, batch).sum().backward()


def opacus(module: Any, batches: Sequence[Sequence[Encoded]]) -> float:
    """Return the seconds of per-sample gradients with Opacus, and of their norms."""
    started = time.perf_counter()
    for rows in batches:
        backward_from_all_logits(module, rows)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.grad_sample.flatten(1).square().sum(1)
                parameter.grad_sample = None
                parameter.grad = None
    return time.perf_counter() - started


def ghost(module: Any, batches: Sequence[Sequence[Encoded]]) -> float:
    """Return the seconds of norms with Opacus' ghost mode, which does not compute per-sample gradients."""
    started = time.perf_counter()
    for rows in batches:
        backward_from_all_logits(module, rows)
        module.get_norm_sample()
        module.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def vmap(model: Any, batches: Sequence[Sequence[Encoded]]) -> float:
    """Return the seconds of per-sample gradients of the LoRA parameters with torch.func, and of their norms."""
    adapter = {name: parameter.detach() for name, parameter in lora.trainable_parameters(model).items()}

    def loss(
        adapter: dict[str, torch.Tensor], ids: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        inputs = {"input_ids": ids[None], "attention_mask": mask[None], "use_cache": False}
        logits = torch.func.functional_call(model, adapter, (), inputs).logits[0, :-1]
        losses = F.cross_entropy(logits, labels[1:], reduction="none", ignore_index=-100)
        return losses.sum() / (labels[1:] != -100).sum()

    gradients_of = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))
    started = time.perf_counter()
    for rows in batches:
        batch = collate(rows, 0)
        gradients = gradients_of(adapter, batch.input_ids, labels_of(batch), additive_mask(batch))
        for gradient in gradients.values():
            gradient.flatten(1).square().sum(1)
    return time.perf_counter() - started


def additive_mask(batch: Batch) -> torch.Tensor:
    """Return the causal mask with padding, (B, 1, T, T), which transformers cannot make under vmap."""
    width = batch.input_ids.shape[1]
    visible = batch.attention_mask[:, None, None, :].bool() & torch.ones(width, width, dtype=torch.bool).tril()
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)


class PlainModule(L.LightningModule):
    """A plain Lightning module that finetunes a causal language model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, torch.Tensor], batch_index: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-12)


def plain_step(module: PlainModule, batches: Sequence[Sequence[Encoded]]) -> float:
    def inputs(rows: Sequence[Sequence[Encoded]]) -> dict[str, torch.Tensor]:
        batch = collate(rows[0], 0)
        return {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "labels": labels_of(batch),
        }

    clock = Clock()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(list(batches), batch_size=1, collate_fn=inputs))  # type: ignore[arg-type]
    return clock.seconds


# -------------------------------------------------------------------------------------------- figures


def operations(rows: Sequence[Encoded], model: Any) -> float:
    """Return the floating-point operations that forward and backward pass need for all tokens but padding.

    Not counted are gradients of frozen weights, the gradient of the first adapted layer's input, and the masked half of
    the attention matrix.
    """
    config = model.get_base_model().config
    width, layers = config.n_embd, config.n_layer
    total = 0.0
    for row in rows:
        tokens, predicted = len(row.input_ids), int(row.is_response.sum())
        total += 2 * 2 * 12 * layers * width**2 * tokens - 2 * 3 * width**2 * tokens
        total += 2 * 2 * config.vocab_size * width * predicted
        total += 3 * 2 * layers * width * tokens**2
    return total


def per_round(slow: list[float], fast: list[float]) -> dict[str, float]:
    return spread([s / f for s, f in zip(slow, fast, strict=True)])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    pool, source = alpaca_rows(POOL)
    rounds, targets = Round(pool, options.steps), [options.targets]
    fast, exact = (adapted_gpt2(precision, targets) for precision in (torch.bfloat16, torch.float32))
    users, mapped, plain = peft_gpt2(targets), vmap_gpt2(targets), PlainModule(peft_gpt2(targets))
    users.load_state_dict(exact.state_dict())  # equal weights, so that the norms can be compared
    peaks: dict[str, list[float]] = {"bfloat16": [], "float32": []}
    errors: list[float] = []

    def gemm(number: int) -> float:
        for name, precision in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
            if number >= 0:
                peaks[name].append(gemm_peak(precision))
        return 0.0

    def looped(number: int) -> float:
        seconds, norms = loop(users, rounds.rows(number))
        if number >= 0:
            ours = train(exact, rounds, number, with_norms=True)[1]
            errors.append(float(np.abs(ours / norms - 1).max()))
        return seconds

    ways: dict[str, Callable[[int], float]] = {
        "gemm": gemm,
        "engine": lambda n: train(fast, rounds, n, with_norms=True)[0],
        "step": lambda n: train(fast, rounds, n, with_norms=False)[0],
        "epoch_end": lambda n: epoch_end(fast, rounds, n),
        "engine_float32": lambda n: train(exact, rounds, n, with_norms=True)[0],
        "step_float32": lambda n: train(exact, rounds, n, with_norms=False)[0],
        "epoch_end_float32": lambda n: epoch_end(exact, rounds, n),
        "loop": looped,
        **opacus_ways(rounds, targets),
        "vmap": lambda n: vmap(mapped, rounds.sorted_batches(n)),
        "plain_step": lambda n: plain_step(plain, rounds.random_batches(n)),
    }
    seconds = interleaved(ways, options.rounds)
    del seconds["gemm"]
    needed = [operations(rounds.rows(n), fast) for n in range(options.rounds)]
    fractions = {
        name: spread([f / s / p for f, s, p in zip(needed, seconds[way], peaks[name], strict=True)])
        for name, way in (("bfloat16", "engine"), ("float32", "engine_float32"))
    }
    counts = [len(rounds.rows(n)) for n in range(options.rounds)]
    tokens = [sum(len(r.input_ids) for r in rounds.rows(n)) for n in range(options.rounds)]
    return {
        "vs_loop": per_round(seconds["loop"], seconds["engine"]),
        "vs_opacus": per_round(seconds["opacus"], seconds["engine"]) if "opacus" in seconds else None,
        "vs_opacus_ghost": per_round(seconds["ghost"], seconds["engine"]) if "ghost" in seconds else None,
        "vs_vmap": per_round(seconds["vmap"], seconds["engine"]),
        "vs_plain_step": per_round(seconds["plain_step"], seconds["engine"]),
        "callback_overhead": per_round(seconds["engine"], seconds["step"]),
        "gemm_peak_fraction": fractions["bfloat16"],
        "precision": "bfloat16",
        "collect": "during_training",
        "float32": {
            "vs_loop": per_round(seconds["loop"], seconds["engine_float32"]),
            "callback_overhead": per_round(seconds["engine_float32"], seconds["step_float32"]),
            "gemm_peak_fraction": fractions["float32"],
            "largest_relative_difference_to_loop": max(errors),
        },
        "epoch_end_over_epoch": {
            "bfloat16": per_round(seconds["epoch_end"], seconds["step"]),
            "float32": per_round(seconds["epoch_end_float32"], seconds["step_float32"]),
        },
        "milliseconds_an_example": {
            way: spread([1000 * s / c for s, c in zip(values, counts, strict=True)]) for way, values in seconds.items()
        },
        "gemm_peak_tflops": {name: spread([p / 1e12 for p in values]) for name, values in peaks.items()},
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "workload": {
            "lengths": source,
            "targets": targets,
            "rows_a_round": counts,
            "tokens_a_row": sum(tokens) / sum(counts),
            "rounds": options.rounds,
            "threads": torch.get_num_threads(),
        },
    }


def opacus_ways(rounds: Round, targets: list[str]) -> dict[str, Callable[[int], float]]:
    """Return the timed functions of Opacus' two modes, or an empty dict if Opacus is missing (`make setup-bench`)."""
    try:
        from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    except ImportError:
        print("opacus is not installed (make setup-bench): vs_opacus is left out")
        return {}
    sampled = GradSampleModule(peft_gpt2(targets).train(), strict=False)
    ghosts = GradSampleModuleFastGradientClipping(peft_gpt2(targets).train(), strict=False, use_ghost_clipping=True)
    return {
        "opacus": lambda n: opacus(sampled, rounds.sorted_batches(n)),
        "ghost": lambda n: ghost(ghosts, rounds.sorted_batches(n)),
    }


def vmap_gpt2(targets: list[str]) -> Any:
    model = peft_gpt2(targets)
    model.get_base_model().set_attn_implementation("eager")
    return model


def show(results: dict[str, Any]) -> None:
    work = results["workload"]
    print(
        f"GPT-2 124M, LoRA rank 8 on {work['targets'][0]}, {work['tokens_a_row']:.0f} tokens a row "
        f"({work['lengths']}), {work['rounds']} rounds of {work['rows_a_round'][0]} rows, {work['threads']} threads; "
        f"{results['precision']}, collect={results['collect']}; median [min, max]"
    )
    for name in ("vs_loop", "vs_opacus", "vs_opacus_ghost", "vs_vmap", "vs_plain_step", "callback_overhead"):
        print(f"  {name:28s}{line(results[name])}")
    print(f"  {'gemm_peak_fraction':28s}{line(results['gemm_peak_fraction'])}")
    for name in ("vs_loop", "callback_overhead", "gemm_peak_fraction"):
        print(f"  {'float32 ' + name:28s}{line(results['float32'][name])}")
    for precision, ratio in results["epoch_end_over_epoch"].items():
        print(f"  {'epoch_end/epoch ' + precision:28s}{line(ratio)}")
    print("  milliseconds an example:")
    for way, milliseconds in results["milliseconds_an_example"].items():
        print(f"    {way:26s}{line(milliseconds, 0)}")
    for precision, peak in results["gemm_peak_tflops"].items():
        print(f"  {'GEMM peak TFLOP/s ' + precision:28s}{line(peak)}")
    print(f"  peak memory of this process, with the models of all rivals, {results['peak_memory_gb']:.1f} GB")
    print(f"  float32 norms against the loop: {results['float32']['largest_relative_difference_to_loop']:.1e} relative")


def line(values: dict[str, float] | None, digits: int = 2) -> str:
    if values is None:
        return "-"
    return f"{values['median']:.{digits}f} [{values['min']:.{digits}f}, {values['max']:.{digits}f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="batches of 8 a round")
    parser.add_argument("--targets", default="c_attn", help="adapted layers: c_attn (peft's choice) or all-linear")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    options = parser.parse_args()
    results = measure(options)
    show(results)
    merge_into(options.out, results)


if __name__ == "__main__":
    main()
