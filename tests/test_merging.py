"""Laws of merging: a merged model, exported or in memory, answers as the target with its adapter does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import assert_close_by_norm, exact_copy
from test_generation import ragged_prompts, slow_answer, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradsift.artifacts import Artifact, Store
from gradsift.config import ComputeConfig, LoraConfig, ModelConfig, TargetConfig
from gradsift.errors import ConfigError
from gradsift.evaluation.generation import generate_answers
from gradsift.manifests import file_hash
from gradsift.runtime import Display, Runtime
from gradsift.training import lora
from gradsift.training.backbones import backbone, load_backbone
from gradsift.training.target import can_merge, load_to_answer, load_tuned, write_merged


@pytest.mark.parametrize("rslora", [False, True])
def test_the_merged_target_answers_as_adapter_and_target_do(rslora: bool, tmp_path: Path) -> None:
    runtime = Runtime(Store(tmp_path / "store"), ComputeConfig(kernels="off"), Display(), seed=0)
    model = ModelConfig(kind="tiny_bytes")
    config = TargetConfig(name="own", model=model, lora=LoraConfig(rank=4, use_rslora=rslora), steps=1)
    target = backbone(runtime, model)
    adapted = lora.add_adapter(load_backbone(target, model, runtime.compute).model, config.lora, seed=1)
    with_effect(adapted)
    lora.save_adapter(adapted, tmp_path / "tuned" / "adapter")
    tuned = Artifact("finetune", tmp_path / "tuned", "x", {})
    write_merged(target, tuned, config, runtime.compute, tmp_path / "merged")

    assert {path.suffix for path in (tmp_path / "merged").iterdir()} <= {".json", ".safetensors", ".jinja"}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("Name a river.", return_tensors="pt").input_ids
    expected, untuned = load_tuned(runtime, config, target, tuned), load_tuned(runtime, config, target, None)
    with torch.no_grad():
        ours, plain = (each.model(ids).logits for each in (expected, untuned))
        torch.testing.assert_close(merged(ids).logits, ours, rtol=1e-4, atol=1e-5)
        assert (ours - plain).abs().max() > 1e-2  # the adapter does change the answers
        answers = [each.generate(ids, max_new_tokens=8, do_sample=False) for each in (merged, expected.model)]
    assert answers[0].tolist() == answers[1].tolist()


def tuned_target(folder: Path, architecture: str, **changes: Any) -> tuple[Runtime, TargetConfig, Artifact, Artifact]:
    """Return the arguments of `load_tuned` for a tiny random model with a random adapter."""
    tiny_model(architecture).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    runtime = Runtime(Store(folder / "store"), ComputeConfig(device="cpu"), Display(), seed=0)
    config = TargetConfig(
        name="own", model=ModelConfig(path=str(folder / "model")), lora=LoraConfig(rank=4, **changes), steps=1
    )
    target = backbone(runtime, config.model)
    adapted = lora.add_adapter(load_backbone(target, config.model, runtime.compute).model, config.lora, seed=1)
    with_effect(adapted)
    lora.save_adapter(adapted, folder / "tuned" / "adapter")
    return runtime, config, target, Artifact("finetune", folder / "tuned", "x", {})


def with_effect(adapted: Any) -> None:
    """Draw B, which is zero before any training."""
    torch.manual_seed(2)
    for name, factor in lora.trainable_parameters(adapted).items():
        if "lora_B" in name:
            torch.nn.init.normal_(factor, std=0.05)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("architecture", "rslora"), [("gpt2", True), ("llama", False)])
def test_answers_of_a_model_merged_in_memory_are_those_of_target_and_adapter(
    architecture: str, rslora: bool, tmp_path: Path
) -> None:
    """The definition is an adapted model in float64, one prompt at a time, in which no two words are equally likely."""
    given = tuned_target(tmp_path, architecture, use_rslora=rslora)
    merged, apart, untuned = load_to_answer(*given), load_tuned(*given), load_to_answer(*given[:3], None)
    assert not list(lora.lora_layers(merged.model))
    assert list(lora.lora_layers(apart.model))
    prompts, options = ragged_prompts(), {"max_new_tokens": 8, "batch_size": 4}
    exact = exact_copy(apart.model)
    expected = [slow_answer(exact, prompt, 8) for prompt in prompts]
    for each in (merged, apart):
        assert generate_answers(each.model, each.tokenizer, prompts, **options) == expected
    assert generate_answers(untuned.model, untuned.tokenizer, prompts, **options) != expected
    ids = torch.tensor([prompts[0]])
    with torch.no_grad():
        assert_close_by_norm(merged.model(ids).logits, exact(ids).logits, k=64)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_merging_changes_neither_files_nor_a_model_loaded_before(architecture: str, tmp_path: Path) -> None:
    runtime, config, target, tuned = tuned_target(tmp_path, architecture)
    files = {path: file_hash(path) for path in (tmp_path / "model").iterdir()}
    before = load_backbone(target, config.model, runtime.compute).model
    kept = {name: weight.clone() for name, weight in before.state_dict().items()}
    merged = load_to_answer(runtime, config, target, tuned).model
    after = load_backbone(target, config.model, runtime.compute).model
    for name, weight in kept.items():
        assert torch.equal(before.state_dict()[name], weight)
        assert torch.equal(after.state_dict()[name], weight)
    assert any(not torch.equal(weight, merged.state_dict()[name]) for name, weight in kept.items())
    assert {path: file_hash(path) for path in (tmp_path / "model").iterdir()} == files


@contextmanager
def products(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def test_an_adapter_stays_apart_where_the_sum_would_be_rounded_or_another_function() -> None:
    """Quantised weights are in test_quantized.py, and divided ones in test_ranks.py."""

    def adapted(architecture: str, dtype: torch.dtype, targets: list[str]) -> Any:
        return lora.add_adapter(tiny_model(architecture).to(dtype), LoraConfig(rank=2, targets=targets), seed=0)

    plain = adapted("llama", torch.float32, ["all-linear"])
    assert can_merge(plain)
    with products("high"):  # TF32 on a GPU
        assert not can_merge(plain)
    assert not can_merge(adapted("llama", torch.bfloat16, ["all-linear"]))
    assert can_merge(adapted("llama", torch.float32, ["lm_head"]))
    tied = adapted("gpt2", torch.float32, ["lm_head"])  # the head is the embedding too
    assert not can_merge(tied)
    with pytest.raises(ConfigError, match=r"another module uses too \(.*lm_head\); leave these"):
        lora.require_mergeable(tied)
    assert not can_merge(tiny_model("llama"))
    shared = tiny_model("llama")
    first, second = (layer.self_attn for layer in shared.model.layers[:2])
    first.q_proj.weight = second.q_proj.weight  # it would get the adapters of both
    twice = lora.add_adapter(shared, LoraConfig(rank=2, targets=["q_proj"]), seed=0)
    assert not can_merge(twice)
    with pytest.raises(ConfigError, match=r"layers.0.self_attn.q_proj.*layers.1.self_attn.q_proj"):
        lora.require_mergeable(twice)
