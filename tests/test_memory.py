"""Laws of the arithmetic of memory: it is what autograd keeps, and a GPU's defaults follow it."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from gradsift.config import ComputeConfig, LoraConfig
from gradsift.forecast import operations
from gradsift.training import device, lora, numerics
from gradsift.training.device import (
    TokenBudget,
    adapted_names,
    checkpoint_blocks,
    fitting_tokens,
    needs_checkpointing,
    token_bytes,
    without_host_reads,
)

LLAMA_7B = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
LLAMA_13B = LLAMA_7B | {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40}
GROUPED = LLAMA_7B | {"num_key_value_heads": 8, "head_dim": 128}
GPT2 = {"n_embd": 768, "n_head": 12, "vocab_size": 50257}
NARROW = ["q_proj", "v_proj"]
CASES = {
    "7B": ("llama", LLAMA_7B, NARROW),
    "13B": ("llama", LLAMA_13B, NARROW),
    "7B, all layers": ("llama", LLAMA_7B, ["all-linear"]),
    "mistral": ("mistral", GROUPED, NARROW),
    "qwen2": ("qwen2", GROUPED, ["up_proj"]),
    "qwen3": ("qwen3", GROUPED, NARROW),
    "smollm3": ("smollm3", GROUPED | {"no_rope_layer_interval": 2, "pad_token_id": None}, ["down_proj"]),
    "gpt2": ("gpt2", GPT2, ["c_attn"]),
    "gpt2, all layers": ("gpt2", GPT2, ["all-linear"]),
}


def fused_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool = False, **options: Any
) -> torch.Tensor:
    """Attention as a GPU has it; on `meta`, torch would keep all scores."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[0]


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused_attention)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # which `meta` has not
    monkeypatch.setattr(torch, "autocast", lambda kind, **options: nullcontext())


def built(case: str, layers: int, dtype: torch.dtype = torch.bfloat16, *, checkpointed: bool = False) -> Any:
    """Return a model without memory, set up as on a GPU, with an adapter."""
    kind, values, targets = CASES[case]
    config = AutoConfig.for_model(kind, **values, **{"n_layer" if kind == "gpt2" else "num_hidden_layers": layers})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with mock.patch.object(numerics, "device_of", lambda compute: torch.device("cuda")):
        numerics.prepare(model.requires_grad_(False), ComputeConfig())
    if checkpointed:
        checkpoint_blocks(model)
    return lora.add_adapter(model, LoraConfig(rank=8, alpha=16, dropout=0.0, targets=targets), seed=0).to("meta")


def kept_bytes(adapted: Any, tokens: int) -> int:
    """Return the bytes of all tensors that autograd keeps of a forward pass below the head, weights excepted."""
    weights = {each.untyped_storage()._cdata for each in adapted.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), without_host_reads():
        ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
        _ = adapted.get_base_model().base_model(input_ids=ids, use_cache=False)[0]
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.bfloat16) for case in CASES), *((case, torch.float32) for case in ("7B", "gpt2"))],
)
def test_the_bytes_of_a_token_are_what_autograd_keeps(case: str, dtype: torch.dtype) -> None:
    """Two blocks more keep as much more as the arithmetic says, to 2 % (copies of factors, statistics of norms)."""
    models = [built(case, layers, dtype) for layers in (1, 3)]
    fewer, more = (kept_bytes(model, 1024) for model in models)
    per_token = [
        token_bytes(model.config, dtype.itemsize, adapted_names(model), checkpointed=False) or 0 for model in models
    ]
    assert (more - fewer) / 1024 == pytest.approx(per_token[1] - per_token[0], rel=0.02)


@pytest.mark.usefixtures("on_meta")
def test_with_checkpointing_a_block_keeps_the_stream_alone() -> None:
    models = [built("7B", layers, checkpointed=True) for layers in (1, 3)]
    fewer, more = (kept_bytes(model, 1024) for model in models)
    names = adapted_names(models[0])
    per_token = [token_bytes(model.config, 2, names, checkpointed=True) or 0 for model in models]
    assert (more - fewer) / 1024 == pytest.approx(per_token[1] - per_token[0], rel=0.02)
    block = token_bytes(models[0].config, 2, names, checkpointed=False) or 0  # of which a backward pass has one
    assert per_token[0] == block + 4 * 4096


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("case", ["7B", "13B"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_operations_of_a_plan_are_those_of_a_trace(case: str, checkpointed: bool) -> None:
    """Two blocks more take as many more as the arithmetic says, to 2 % (products of attention and of the adapter).

    With checkpointing torch does not compute a block's last product again, as nothing reads it: up to 8 % less.
    """
    counts, sizes = [], []
    for layers in (1, 3):
        model = built(case, layers, checkpointed=checkpointed)
        ids = torch.zeros(1, 128, dtype=torch.long, device="meta")
        with FlopCounterMode(display=False) as counter, without_host_reads():
            model.get_base_model().base_model(input_ids=ids, use_cache=False)[0].sum().backward()
        counts.append(counter.get_total_flops())
        sizes.append(sum(each.numel() for each in model.parameters() if not each.requires_grad))
    expected = operations(sizes[1] - sizes[0], checkpointed=checkpointed)
    assert (0.92 if checkpointed else 0.98) * expected < (counts[1] - counts[0]) / 128 < 1.02 * expected


@pytest.mark.parametrize("kind", ["gemma3_text", "gemma3", "mamba"])
def test_a_model_that_is_not_known_has_no_arithmetic(kind: str) -> None:
    """Its config need not have the names that others have: gemma3's has parts, and a mamba has no heads."""
    config = AutoConfig.for_model(kind)
    assert token_bytes(config, 2, NARROW, checkpointed=False) is None
    assert token_bytes(config, 2, NARROW, checkpointed=True) is None


@pytest.mark.parametrize("case", ["7B", "7B, all layers", "qwen2", "gpt2, all layers"])
def test_a_budget_from_before_the_adapter_fits_after_it(case: str) -> None:
    """The proxy's budget, and whether the target is checkpointed, are decided as soon as the weights are loaded."""
    adapted = built(case, 2)
    bare = copy.deepcopy(adapted).unload()
    for checkpointed in (False, True):
        before = fitting_tokens(bare, 20 * 2**30, checkpointed=checkpointed) or 0
        bytes_after = token_bytes(adapted.config, 2, adapted_names(adapted), checkpointed=checkpointed) or 0
        held = sum(each.numel() * each.element_size() for each in bare.parameters())
        assert 0 < held + before * bytes_after <= 0.8 * 20 * 2**30


@pytest.mark.parametrize(("memory", "case", "layers", "wanted"), [(80, "7B", 32, False), (24, "7B", 32, True)])
def test_checkpointing_is_for_gpus_that_it_keeps_busy(
    monkeypatch: pytest.MonkeyPatch, memory: int, case: str, layers: int, wanted: bool
) -> None:
    gpu = SimpleNamespace(total_memory=memory * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    model = built(case, layers)
    assert needs_checkpointing(model, torch.device("cuda")) == wanted
    assert not needs_checkpointing(model, torch.device("cpu"))
    held = sum(each.numel() * each.element_size() * (4 if each.requires_grad else 1) for each in model.parameters())
    tokens = fitting_tokens(model, gpu.total_memory, checkpointed=False) or 0
    each = token_bytes(model.config, 2, NARROW, checkpointed=False) or 0
    assert held + tokens * each == pytest.approx(0.8 * gpu.total_memory, rel=1e-3)


def test_a_gpus_budget_fits_its_memory_and_remembers_when_it_did_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_halved", {})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=20 * 2**30))
    model = built("7B", 32)
    fitting = fitting_tokens(model, 20 * 2**30, checkpointed=False) or 0
    assert 256 < fitting < 1024
    cuda = SimpleNamespace(
        config=model.config, parameters=lambda: iter(on_cuda), named_parameters=model.named_parameters, modules=list
    )
    on_cuda = [_OnCuda(each) for each in model.parameters()]
    assert TokenBudget.of(cuda, 77, print).tokens == 77
    budget = TokenBudget.of(cuda, None, lambda line: None)
    assert budget.tokens == fitting
    run_out(budget, [100] * 4)
    assert budget.tokens == 200
    assert TokenBudget.of(cuda, None, print).tokens == 200
    assert TokenBudget.of(cuda, 77, print).tokens == 77
    on_cpu = [TokenBudget.of(model, None, lambda line: None) for _ in range(2)]
    run_out(on_cpu[0], [100, 100])
    assert on_cpu[1].tokens == TokenBudget.of(model, None, print).tokens  # nothing is remembered there


def run_out(budget: TokenBudget, lengths: list[int]) -> None:
    failing = [MemoryError()]

    def work(tokens: int) -> None:
        if failing:
            raise failing.pop()

    budget.run(work, lengths)


class _OnCuda:
    """A parameter that says it is on a GPU."""

    def __init__(self, parameter: torch.Tensor) -> None:
        self._parameter = parameter
        self.device = torch.device("cuda")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parameter, name)
