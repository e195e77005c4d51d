"""Law of `export.merged`: the merged model answers as the target with its adapter does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradsift.artifacts import Artifact, Store
from gradsift.config import ComputeConfig, LoraConfig, ModelConfig, TargetConfig
from gradsift.runtime import Display, Runtime
from gradsift.training import lora
from gradsift.training.backbones import backbone, load_backbone
from gradsift.training.merging import write_merged
from gradsift.training.target import load_tuned


@pytest.mark.parametrize("rslora", [False, True])
def test_the_merged_target_answers_as_adapter_and_target_do(rslora: bool, tmp_path: Path) -> None:
    runtime = Runtime(Store(tmp_path / "store"), ComputeConfig(kernels="off"), Display(), seed=0)
    model = ModelConfig(kind="tiny_bytes")
    config = TargetConfig(name="own", model=model, lora=LoraConfig(rank=4, use_rslora=rslora), steps=1)
    target = backbone(runtime, model)
    adapted = lora.add_adapter(load_backbone(target, model, runtime.compute).model, config.lora, seed=1)
    torch.manual_seed(2)
    for name, factor in lora.trainable_parameters(adapted).items():
        if "lora_B" in name:  # zeros before any training
            torch.nn.init.normal_(factor, std=0.05)
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
