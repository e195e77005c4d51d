"""Laws of quantised frozen layers: linear, near the weights that they stand for, with adapters and norms like others.

bitsandbytes quantises on a CPU too. Without the package its part is skipped and the checks of options remain.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import assert_close_by_norm
from safetensors.torch import load_file, save_file
from test_backbones import pin, runtime
from test_norms import assert_norms_close, batch_norms, loop_norms, ragged_examples
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from gradsift.artifacts import Artifact
from gradsift.composition import compose_config
from gradsift.config import ComputeConfig, LoraConfig, ModelConfig, TargetConfig
from gradsift.errors import ConfigError, GradsiftError
from gradsift.forecast import held_weights
from gradsift.training import lora
from gradsift.training.adapted import QuantizedLinear
from gradsift.training.backbones import backbone, load_backbone, load_plain
from gradsift.training.probing import require_adaptable
from gradsift.training.target import can_merge, write_merged

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
installed = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")

CPU = ComputeConfig(device="cpu")
KINDS = ("nf4", "int8")
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}


@pytest.fixture
def folder(tmp_path: Path, byte_tokenizer: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", vocab_size=264, **SHAPE, **HEADS))
    model.save_pretrained(tmp_path / "Tiny")
    byte_tokenizer.save_pretrained(tmp_path / "Tiny")
    return tmp_path / "Tiny"


def loaded(folder: Path, kind: str, dtype: str = "float32") -> Any:
    config = ModelConfig(path=str(folder), quantization=kind, dtype=dtype)
    return load_backbone(backbone(runtime(folder.parent / "store"), config), config, CPU).model


# ------------------------------------------------------------------------------------------- options


def test_the_short_option_is_the_models() -> None:
    options = ["data=json", "data.path=x.json", "proxy=gpt2", "target=llama2_7b", "benchmark=vicuna"]
    options += ["judge=openai", "judge.model=m"]
    config = compose_config([*options, "target.quantization=nf4", "proxy.quantization=int8"])
    assert (config.target.model.quantization, config.proxy.model.quantization) == KINDS
    full = ["features.gradient_params=full", "features.adam=false"]
    for wrong, words in [
        (["target.quantization=nf4", "compute=fsdp"], "target.quantization=nf4 does not go with compute=fsdp"),
        (["target.quantization=nf4", "generator=vllm"], "target.quantization=nf4 does not go with generator=vllm"),
        (["proxy.quantization=nf4", *full], "quantised weights have no gradient"),
        (["proxy.quantization=fp4"], "quantization='fp4' is not known; choose one of: none, nf4, int8"),
    ]:
        with pytest.raises(ConfigError) as caught:
            compose_config([*options, *wrong])
        assert words in str(caught.value), str(caught.value)


def test_options_of_a_model_that_the_run_never_loads_are_not_refused() -> None:
    data = ["data=json", "data.path=x.json", "proxy=gpt2", "target=llama2_7b"]
    target = ["target.quantization=nf4", "compute=fsdp", "stop_after=selection"]
    assert compose_config([*data, *target]).target.model.quantization == "nf4"
    full = ["proxy.quantization=nf4", "features.gradient_params=full", "features.adam=false", "scorer=random"]
    assert compose_config([*data, *full, "stop_after=finetune"]).proxy.model.quantization == "nf4"
    for stage, wrong in (("finetune", target[:2]), ("statistics", full[:3])):
        with pytest.raises(ConfigError, match="does not go with"):
            compose_config([*data, *wrong, f"stop_after={stage}"])


def test_without_the_package_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ConfigError, match=r"model.quantization=nf4 needs .* pip install 'gradsift\[quantization\]'"):
        backbone(runtime(tmp_path), ModelConfig(kind="tiny_bytes", quantization="nf4"))


# -------------------------------------------------------------------------------------------- layers


@installed
@pytest.mark.parametrize("kind", KINDS)
def test_the_layers_are_quantised_and_linear(kind: str, folder: Path) -> None:
    model, plain = loaded(folder, kind), AutoModelForCausalLM.from_pretrained(folder)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    assert layers.keys() == {name for name, layer in plain.named_modules() if type(layer) is nn.Linear} - {"lm_head"}
    for name, layer in layers.items():
        weight, original = layer.restored(torch.float32), plain.get_submodule(name).weight
        assert layer.weight.element_size() * layer.weight.numel() == original.numel() / (2 if kind == "nf4" else 1)
        error = (weight - original).norm() / original.norm()
        assert 0.001 < error < (0.12 if kind == "nf4" else 0.012)
        x = torch.randn(3, 5, layer.in_features, requires_grad=True)
        y = layer(x)
        assert_close_by_norm(y, F.linear(x.double(), weight.double()), k=64)
        y.backward(sent := torch.randn_like(y))
        assert_close_by_norm(x.grad, sent.double() @ weight.double(), k=64)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.to("cpu")  # transformers refuses this for models that it quantised


@installed
@pytest.mark.parametrize("kind", [*KINDS, "none"])
def test_a_forecast_counts_the_bytes_of_the_loaded_weights(kind: str, folder: Path) -> None:
    model, plain = loaded(folder, kind), AutoModelForCausalLM.from_pretrained(folder)
    tensors = [*model.parameters(), *(each.scale for each in model.modules() if isinstance(each, QuantizedLinear))]
    held = sum(each.numel() * each.element_size() for each in tensors)
    rows = sum(each.scale.numel() for each in model.modules() if isinstance(each, QuantizedLinear))
    scales = 4 * rows if kind == "int8" else 0  # of whole rows, which the forecast leaves out
    assert held_weights(plain, 4, kind, parts=1) == held - scales


@installed
def test_int8_rounds_to_the_nearest_127th_of_a_rows_largest_weight(folder: Path) -> None:
    model, plain = loaded(folder, "int8"), AutoModelForCausalLM.from_pretrained(folder)
    layer, name = model.model.layers[0].mlp.up_proj, "model.layers.0.mlp.up_proj"
    original = plain.get_submodule(name).weight
    half = original.abs().amax(1, keepdim=True) / 127 / 2
    assert ((layer.restored(torch.float32) - original).abs() <= half * 1.13).all()  # weights are float16 before


# ------------------------------------------------------------------------------- adapters, norms, runs


@installed
@pytest.mark.parametrize(("kind", "dtype"), [("nf4", "float32"), ("int8", "float32"), ("nf4", "bfloat16")])
def test_norms_of_a_quantised_model_equal_the_loop(kind: str, dtype: str, folder: Path) -> None:
    """The loop goes through a model whose weights are the restored ones, one example at a time, in float64."""
    model, examples = loaded(folder, kind, dtype), ragged_examples(5)
    require_adaptable(model, LoraConfig(rank=3), "proxy.lora", norms=True)
    restored = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False).eval()
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            restored.get_submodule(name).weight.data = layer.restored(torch.float32)
    trained, exact = (lora.add_adapter(each, LoraConfig(rank=3), seed=1).eval() for each in (model, restored))
    torch.manual_seed(2)
    pairs = zip(lora.trainable_parameters(trained).items(), lora.trainable_parameters(exact).items(), strict=True)
    for (name, parameter), (_, twin) in pairs:
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
        assert parameter.dtype == torch.float32
        twin.data.copy_(parameter.data)
    computed, expected = batch_norms(trained, examples, 5), loop_norms(exact, examples)
    if dtype == "float32":
        assert_norms_close(computed, expected)
    else:
        assert (abs(computed - expected) <= 0.03 * expected).all()


@installed
def test_quantised_weights_cannot_be_merged(folder: Path) -> None:
    adapted = lora.add_adapter(loaded(folder, "nf4"), LoraConfig(rank=3), seed=1)
    assert not can_merge(adapted)  # so answers pass through both
    with pytest.raises(ConfigError, match="an adapter cannot be merged into a quantised model"):
        adapted.merge_and_unload()


@installed
def test_quantisation_is_part_of_the_identity(folder: Path, tmp_path: Path) -> None:
    plain, config = pin(tmp_path, folder), ModelConfig(path=str(folder), quantization="nf4")
    made = backbone(runtime(tmp_path), config)
    assert made.fingerprint == plain.fingerprint  # the same weights
    assert (made.numerics, "quantization" in plain.numerics) == ({**plain.numerics, "quantization": "nf4"}, False)
    assert made.identity != plain.identity
    with pytest.raises(GradsiftError, match="this is a defect of gradsift"):
        load_backbone(plain, config, CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_experts_of_gpt_oss_are_restored_from_mxfp4(dtype: str, tmp_path: Path, byte_tokenizer: Any) -> None:
    """A code is a half of 0, 1, 2, 3, 4, 6, 8 or 12 with its sign in the fourth bit, times 2^(scale - 127)."""
    torch.manual_seed(0)
    shape = SHAPE | HEADS | {"intermediate_size": 64, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", vocab_size=264, **shape))
    model.save_pretrained(tmp_path / "Tiny")
    byte_tokenizer.save_pretrained(tmp_path / "Tiny")
    weights = load_file(tmp_path / "Tiny/model.safetensors")
    packed, name = {}, "model.layers.0.mlp.experts.down_proj"
    for key in [key for key in weights if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = weights.pop(key).shape
        packed[f"{key}_blocks"] = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        packed[f"{key}_scales"] = torch.full((experts, outputs, inputs // 32), 122, dtype=torch.uint8)
    save_file(weights | packed, tmp_path / "Tiny/model.safetensors", metadata={"format": "pt"})
    settings = json.loads((tmp_path / "Tiny/config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "Tiny/config.json").write_text(json.dumps(settings))
    restored = loaded(tmp_path / "Tiny", "none", dtype).get_parameter(name)  # (experts, inputs, outputs)
    halves = torch.tensor([0.0, 1, 2, 3, 4, 6, 8, 12])
    codes = packed[f"{name}_blocks"].flatten(2).long()
    codes = torch.stack([codes % 16, codes // 16], -1).flatten(2)
    expected = halves[codes % 8] / 2 * (1 - codes // 8 * 2) * 2.0**-5
    assert restored.dtype == getattr(torch, dtype)
    assert torch.equal(restored.float(), expected.transpose(1, 2))
    config = TargetConfig(name="t", model=ModelConfig(path=str(tmp_path / "Tiny"), dtype=dtype), steps=1)
    config.lora = LoraConfig(rank=2, targets=["q_proj"])
    target = backbone(runtime(tmp_path / "store"), config.model)
    adapted = lora.add_adapter(load_plain(target, config.model, CPU)[0], config.lora, seed=0)
    lora.save_adapter(adapted, tmp_path / "adapter")
    write_merged(target, Artifact("finetune", tmp_path, "x", {}), config, CPU, tmp_path / "merged")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").get_parameter(name), restored)
    if importlib.util.find_spec("bitsandbytes"):
        with pytest.raises(ConfigError, match=r"quantised already \(mxfp4\); leave it out"):
            loaded(tmp_path / "Tiny", "nf4")


@installed
def test_a_run_with_a_quantised_proxy_and_target(gradsift: Any, folder: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {n}.", "output": "ab" * (n % 5 + 1)} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    proxy = ("proxy=hf", f"proxy.model={folder}", "proxy.quantization=int8", "proxy.members=2", "proxy.max_length=32")
    target = ("target=hf", f"target.model={folder}", "target.quantization=nf4", "target.epochs=1", "alpha=0.3")
    data = ("data=json", "data.path=rows.jsonl", "data.holdout=2", "stop_after=finetune", "target.max_length=32")
    quiet = ("tracker=none", "report=false", "compute.threads=1", "compute.device=cpu")
    assert gradsift(*data, *proxy, *target, *quiet) == 0
    manifests = [json.loads(path.read_text()) for path in (tmp_path / "store").glob("*/*/manifest.json")]
    kinds = {each["stage"]: [n.get("quantization") for n in each["numerics"].values()] for each in manifests}
    assert (kinds["member"], kinds["norms"], kinds["finetune"]) == (["int8"], ["int8"], ["nf4"])
