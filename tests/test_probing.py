"""Laws of the trial: an adapter that cannot train is refused before any training, and a good one leaves no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import SMOKE
from test_norms import adapted_model, batch_norms, ragged_examples, tiny_model
from torch import nn

from gradsift.config import LoraConfig
from gradsift.data.batching import collate
from gradsift.errors import ConfigError
from gradsift.gradients.per_sample import gradient_pass
from gradsift.training import adapted as adapted_module
from gradsift.training import lora
from gradsift.training.adapted import AdaptedLinear
from gradsift.training.device import checkpoint_blocks
from gradsift.training.head import ResponseLosses
from gradsift.training.probing import require_adaptable

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("one_thread")]


class Doubled(nn.Linear):
    """A subclass of a linear layer that computes another function."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Renamed(nn.Linear):
    """A subclass that computes the same as its parent."""


def with_layer(kind: type[nn.Linear]) -> Any:
    model: Any = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.__class__ = kind
    return model


def refusal(model: Any, targets: list[str], *, norms: bool = True) -> str:
    with pytest.raises(ConfigError) as caught:
        require_adaptable(model, LoraConfig(targets=targets), "proxy.lora", norms=norms)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --------------------------------------------------------------------------------------- the trial


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_trial_leaves_no_trace(architecture: str, precision: torch.dtype) -> None:
    model = tiny_model(architecture).to(precision)
    before, modules = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    state = torch.get_rng_state()
    require_adaptable(model, LoraConfig(dropout=0.3), "proxy.lora", norms=True)
    refusal(model, ["nowhere"])
    assert torch.equal(torch.get_rng_state(), state)
    assert [type(module) for module in model.modules()] == modules
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_linear_layer_with_a_forward_of_its_own_has_no_norms_and_trains_by_peft() -> None:
    message = refusal(with_layer(Doubled), ["all-linear"])
    assert "per-sample gradients need plain LoRA on frozen linear layers, but model.layers.1.mlp.up_proj" in message
    assert "is of class Doubled" in message
    assert "proxy.lora.targets=[down_proj,gate_proj,k_proj,o_proj,q_proj,v_proj]" in message  # and not up_proj
    require_adaptable(with_layer(Doubled), LoraConfig(), "target.lora", norms=False)


def test_a_subclass_that_computes_the_same_is_plain_unless_something_is_hooked_to_it() -> None:
    require_adaptable(with_layer(Renamed), LoraConfig(), "proxy.lora", norms=True)
    hooked, patched = with_layer(Renamed), with_layer(Renamed)
    hooked.model.layers[1].mlp.up_proj.register_forward_hook(lambda layer, inputs, output: output + 1)
    patched.model.layers[1].mlp.up_proj.forward = lambda inputs: torch.zeros(*inputs.shape[:-1], 24)
    for model in (hooked, patched):
        assert "model.layers.1.mlp.up_proj is of class Renamed" in refusal(model, ["up_proj"])


@pytest.mark.parametrize("norms", [True, False])
def test_a_layer_that_is_computed_wrongly_is_named(norms: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a class were wrongly taken for plain, the fresh adapter would change the layer's outputs."""
    monkeypatch.setattr(adapted_module, "is_plain", lambda layer: True)
    message = refusal(with_layer(Doubled), ["up_proj"], norms=norms)
    assert "model.layers.1.mlp.up_proj gives other outputs with a fresh adapter" in message


def test_logits_that_a_fresh_adapter_changes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    add = lora.add_adapter

    def with_another_head(model: Any, *arguments: Any, **options: Any) -> Any:
        adapted = add(model, *arguments, **options)
        hook = model.get_output_embeddings().register_forward_hook(lambda layer, inputs, output: 1.01 * output)
        unload = adapted.unload
        adapted.unload = lambda: (hook.remove(), unload())[1]
        return adapted

    monkeypatch.setattr(lora, "add_adapter", with_another_head)
    assert "LlamaForCausalLM gives other logits with a fresh adapter (rel" in refusal(tiny_model("llama"), ["q_proj"])


def test_a_model_that_looks_ahead_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are padded without a mask, which is invisible to causal models only."""
    model: Any = tiny_model("llama")
    inner = model.model.layers[0].forward
    mixed = lambda hidden, **kwargs: inner(hidden, **kwargs) + hidden.mean(1, keepdim=True)  # noqa: E731
    monkeypatch.setattr(model.model.layers[0], "forward", mixed)
    assert "a row beside a longer row has another loss than alone" in refusal(model, ["q_proj"])


def test_a_model_that_fails_by_itself_is_not_the_adapters_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**inputs: Any) -> Any:
        raise ValueError("no")

    model: Any = tiny_model("llama")
    monkeypatch.setattr(model, "forward", fail)
    message = refusal(model, ["q_proj"])
    assert "proxy.lora: LlamaForCausalLM itself fails, without any adapter (ValueError: no)" in message


def test_memory_that_runs_out_is_not_the_adapters_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ResponseLosses, "__call__", fail)
    with pytest.raises(torch.OutOfMemoryError):
        require_adaptable(tiny_model("llama"), LoraConfig(), "proxy.lora", norms=True)


# ------------------------------------------------------------------------------------ when it is made


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("proxy.lora.targets=[nowhere]", "proxy.lora.targets=[nowhere] names no linear layer of GPT2LMHeadModel"),
        ("target.lora.targets=[nowhere]", "target.lora.targets=[nowhere] names no linear layer of LlamaForCausalLM"),
    ],
)
def test_a_wrong_adapter_of_proxy_or_target_is_refused_before_anything_trains(
    option: str, message: str, gradsift: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gradsift(*SMOKE, option) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert {stage["name"] for stage in gradsift.runs()[-1]["stages"]} == {"load", "backbone"}
    assert not any(stage["optimizer_steps"] for stage in gradsift.runs()[-1]["stages"] if not stage["reused"])


def test_a_finished_run_loads_no_model(after_smoke: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    short = (*SMOKE, "stop_after=finetune")
    assert after_smoke(*short) == 0

    def fail(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("gradsift.training.backbones.load_backbone", fail)
    assert after_smoke(*short) == 0


# ------------------------------------------------------------------------------------- checkpointing


class Saved:
    """Count the numbers that a forward pass keeps for the backward pass."""

    numbers = 0

    def count(self, tensor: torch.Tensor) -> torch.Tensor:
        self.numbers += tensor.numel()
        return tensor


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpointed_blocks_give_the_same_gradients_from_fewer_activations(architecture: str, dropout: float) -> None:
    gradients, kept = [], []
    for checkpointed in (False, True):
        model = tiny_model(architecture)
        if checkpointed:
            checkpoint_blocks(model)
        adapted = lora.add_adapter(model, LoraConfig(rank=3, dropout=dropout), seed=1)
        torch.manual_seed(2)
        for name, parameter in lora.trainable_parameters(adapted).items():
            if "lora_B" in name:
                parameter.data.normal_(std=0.3)
        losses_of, saved = ResponseLosses(adapted), Saved()
        torch.manual_seed(7)  # the dropout masks
        with torch.autograd.graph.saved_tensors_hooks(saved.count, lambda tensor: tensor):
            losses = losses_of(collate(ragged_examples(), 0))
        kept.append(saved.numbers)
        losses.sum().backward()
        gradients.append([parameter.grad for parameter in lora.trainable_parameters(adapted).values()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert kept[1] < kept[0] / 2


def test_checkpointed_blocks_give_the_same_per_sample_gradients_and_norms() -> None:
    plain, checkpointed = (adapted_model("llama", ["all-linear"]) for _ in range(2))
    checkpoint_blocks(checkpointed)
    examples, rows = ragged_examples(), []
    for adapted in (plain, checkpointed):
        with gradient_pass(adapted, "lora", 0) as gradients:
            rows.append(gradients(examples))
    assert torch.equal(*rows)
    for _ in range(2):  # nothing is left of the first pass
        assert (batch_norms(checkpointed, examples, 3) == batch_norms(plain, examples, 3)).all()


def test_a_model_without_known_blocks_cannot_be_checkpointed() -> None:
    with pytest.raises(ConfigError, match=r"compute\.checkpointing=true, but transformers does not know the blocks"):
        checkpoint_blocks(nn.Sequential(nn.Linear(2, 2)))


# -------------------------------------------------------------------------------- variants of adapters


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    for use_rslora, scale in ((False, 16 / 4), (True, 16 / 2)):
        adapted = lora.add_adapter(tiny_model("gpt2"), LoraConfig(rank=4, use_rslora=use_rslora), seed=0)
        layers = [layer for _, layer in lora.lora_layers(adapted)]
        assert all(isinstance(layer, AdaptedLinear) and layer.scaling["default"] == scale for layer in layers)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_a_is_drawn_as_init_says_and_b_starts_at_zero(init: str) -> None:
    adapted = lora.add_adapter(tiny_model("gpt2"), LoraConfig(rank=4, init=init), seed=0)
    for _, layer in lora.lora_layers(adapted):
        factor = layer.lora_A["default"].weight
        inputs = factor.shape[1]
        deviation = {"kaiming": (3 * inputs) ** -0.5, "gaussian": 1 / 4}[init]
        assert factor.std().item() == pytest.approx(deviation, rel=0.2)  # of 4 x inputs draws
        assert (init == "gaussian") == (factor.abs().max().item() > inputs**-0.5)
        assert not layer.lora_B["default"].weight.any()


def test_an_option_that_came_later_renames_no_finished_work() -> None:
    assert LoraConfig().settings == {"rank": 8, "alpha": 16.0, "dropout": 0.0, "targets": ["all-linear"]}
    assert LoraConfig(use_rslora=True).settings == LoraConfig().settings | {"use_rslora": True}
    assert LoraConfig(init="gaussian").settings == LoraConfig().settings | {"init": "gaussian"}


def test_dora_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"lora\.use_dora=true is not offered"):
        LoraConfig(use_dora=True)
