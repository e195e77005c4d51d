"""Per-sample norms of tiny random models of many families: equal to the one-example loop in float64, or refused.

The loop is autograd through peft's own layers, one example a backward pass, in float64. Ours is one backward pass over
a padded batch in float32. Each family has a model of two layers; what is refused, is refused with the layer's name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_norms import VOCABULARY, assert_norms_close, batch_norms, loop_norms, ragged_examples
from transformers import AutoConfig, AutoModelForCausalLM

from gradsift.config import LoraConfig
from gradsift.errors import ConfigError
from gradsift.training import lora
from gradsift.training.device import checkpoint_blocks
from gradsift.training.probing import require_adaptable

pytestmark = [
    pytest.mark.numerics,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # transformers' own, of tiny configs
]

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {  # names that most families share
    **SPECIAL,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
HEAD = LLAMA | {"head_dim": 8}
GPT2 = SPECIAL | {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
STATES = SPECIAL | {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}

WORK: dict[str, dict[str, Any]] = {
    "biogpt": LLAMA,
    "bloom": SPECIAL | {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "codegen": GPT2 | {"n_head": 4, "rotary_dim": 2},
    "cohere": LLAMA,
    "cohere2": LLAMA,
    "ernie4_5": HEAD,
    "exaone4": HEAD,
    "falcon": SPECIAL | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gemma": HEAD,
    "gemma2": HEAD,
    "gemma3_text": HEAD,
    "glm4": HEAD,
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neo": SPECIAL
    | {"max_position_embeddings": 32, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "window_size": 8}
    | {"attention_types": [[["global", "local"], 1]]},
    "gpt_neox": LLAMA,
    "gptj": GPT2 | {"rotary_dim": 4},
    "granite": LLAMA,
    "helium": HEAD,
    "lfm2": LLAMA,
    "llama": LLAMA,
    "mistral": HEAD,
    "mpt": SPECIAL | {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 32},
    "nemotron": HEAD,
    "olmo": LLAMA,
    "olmo2": LLAMA,
    "olmo3": LLAMA,
    "persimmon": LLAMA,
    "phi": LLAMA,
    "phi3": LLAMA,
    "qwen2": LLAMA,
    "qwen3": HEAD,
    "rwkv": SPECIAL | {"hidden_size": 16, "num_hidden_layers": 2, "context_length": 32, "intermediate_size": 24},
    "smollm3": LLAMA,
    "stablelm": LLAMA,
    "starcoder2": LLAMA,
    "xglm": SPECIAL
    | {"d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 2, "max_position_embeddings": 32},
}

# with experts: settings, the class of the blocks of experts, and the layers that [all-linear] adapts
ATTENTION = "k_proj, o_proj, q_proj, v_proj"
MIXED: dict[str, tuple[dict[str, Any], str, str]] = {
    "gpt_oss": (HEAD | {"num_local_experts": 4, "num_experts_per_tok": 2}, "GptOssMLP", ATTENTION),
    "granitemoe": (LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}, "GraniteMoeMoE", ATTENTION),
    "llama4_text": (HEAD | {"intermediate_size_mlp": 24, "num_local_experts": 2}, "Llama4TextMoe", ATTENTION),
    "mixtral": (HEAD | {"num_local_experts": 4}, "MixtralSparseMoeBlock", ATTENTION),
    "olmoe": (LLAMA | {"num_experts": 4, "num_experts_per_tok": 2}, "OlmoeSparseMoeBlock", ATTENTION),
    "phimoe": (LLAMA | {"num_local_experts": 4}, "PhimoeSparseMoeBlock", ATTENTION),
    "qwen2_moe": (
        LLAMA | EXPERTS | {"shared_expert_intermediate_size": 8, "mlp_only_layers": [1]},
        "Qwen2MoeSparseMoeBlock",
        ATTENTION,
    ),
    "qwen3_moe": (HEAD | EXPERTS | {"mlp_only_layers": [1]}, "Qwen3MoeSparseMoeBlock", ATTENTION),
}

# with [all-linear]: settings, the reason, and the targets that the message names
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "deepseek_v3": (
        LLAMA
        | {"num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
        | {"moe_intermediate_size": 8, "first_k_dense_replace": 1, "n_shared_experts": 1, "v_head_dim": 8}
        | {"kv_lora_rank": 4, "q_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4},
        "model.layers.0.self_attn.kv_b_proj sees inputs of shape (2, 1, 7, 4), not (batch, tokens, width)",
        "kv_a_proj_with_mqa,o_proj,q_a_proj,q_b_proj",
    ),
    "jamba": (
        LLAMA | {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4},
        "model.layers.0.mamba.dt_proj takes no part in a forward pass",
        "down_proj,gate_proj,in_proj,k_proj,o_proj,out_proj,q_proj,up_proj,v_proj,x_proj",
    ),
    "mamba": (
        STATES,
        "is refused by peft for MambaForCausalLM: [PEFT:PeftType.LORA] Module 'out_proj'",
        "in_proj,x_proj",
    ),
    "opt": (
        SPECIAL
        | {"hidden_size": 16, "num_hidden_layers": 2, "ffn_dim": 24, "num_attention_heads": 2}
        | {"max_position_embeddings": 32, "word_embed_proj_dim": 16},
        "model.decoder.layers.0.fc1 sees inputs of shape (14, 16), not (batch, tokens, width)",
        "k_proj,out_proj,q_proj,v_proj",
    ),
}


def tiny(name: str, settings: dict[str, Any]) -> Any:
    """Return a model whose attention and experts also work in float64."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, vocab_size=VOCABULARY, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    return model.requires_grad_(False).eval()


def adapted(model: Any, targets: list[str]) -> Any:
    """Return a model whose B is not zero, as after some training: at B = 0 the gradient of A vanishes."""
    computed = lora.add_adapter(model, LoraConfig(rank=3, targets=targets), seed=1).eval()
    torch.manual_seed(2)
    for name, parameter in lora.trainable_parameters(computed).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return computed


def test_there_are_families_enough() -> None:
    assert len(WORK) + len(MIXED) + len(REFUSED) >= 45


@pytest.mark.parametrize("name", WORK)
def test_norms_of_a_family_equal_the_loop(name: str) -> None:
    model, examples = tiny(name, WORK[name]), ragged_examples(5)
    require_adaptable(model, LoraConfig(rank=3), "proxy.lora", norms=True)
    trained = adapted(model, ["all-linear"])
    assert_norms_close(batch_norms(trained, examples, 5), loop_norms(trained, examples))


@pytest.mark.parametrize("name", MIXED)
def test_experts_have_no_adapter_by_default_and_are_named(name: str) -> None:
    settings, block, layers = MIXED[name]
    model, examples, config = tiny(name, settings), ragged_examples(5), LoraConfig(rank=3)
    require_adaptable(model, config, "proxy.lora", norms=True)
    message = str(lora.left_out(model, config, "proxy.lora"))
    assert message.startswith(f"proxy.lora.targets=[all-linear] adapts {layers}; ")
    assert f" ({block}, " in message
    assert lora.left_out(model, LoraConfig(targets=["q_proj"]), "proxy.lora") is None
    trained = adapted(model, ["all-linear"])
    assert {path.rsplit(".", 1)[-1] for path, _ in lora.lora_layers(trained)} == set(layers.split(", "))
    assert_norms_close(batch_norms(trained, examples, 5), loop_norms(trained, examples))


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_is_refused_with_the_layer_and_the_targets_that_work(name: str) -> None:
    settings, reason, targets = REFUSED[name]
    model, examples = tiny(name, settings), ragged_examples(5)
    with pytest.raises(ConfigError) as caught:
        require_adaptable(model, LoraConfig(rank=3), "proxy.lora", norms=True)
    assert str(caught.value).startswith("proxy.lora.targets=[all-linear] ")
    assert reason in str(caught.value)
    assert str(caught.value).endswith(f"; targets that work: proxy.lora.targets=[{targets}]")
    assert not list(lora.lora_layers(model))  # also where peft gave up halfway
    trained = adapted(model, targets.split(","))
    assert_norms_close(batch_norms(trained, examples, 5), loop_norms(trained, examples))


@pytest.mark.parametrize("name", ["deepseek_v3", "mixtral", "olmoe", "opt", "qwen2_moe", "qwen3_moe"])
def test_a_target_needs_no_examples_that_are_told_apart(name: str) -> None:
    """So its experts can be adapted too, by their names."""
    experts = ["w1", "w2", "w3"] if name == "mixtral" else ["gate_proj", "up_proj", "down_proj"]
    targets = ["all-linear"] if name == "opt" else ["q_proj", "o_proj", *experts]
    settings = (MIXED | REFUSED)[name][0]
    require_adaptable(tiny(name, settings), LoraConfig(rank=3, targets=targets), "target.lora", norms=False)
    if name != "opt":
        with pytest.raises(ConfigError, match=r"has no per-sample gradient here|is of class|sees inputs of shape"):
            require_adaptable(tiny(name, settings), LoraConfig(rank=3, targets=targets), "proxy.lora", norms=True)


@pytest.mark.parametrize("name", ["llama4_text", "mamba", "phimoe"])
def test_a_target_whose_layers_take_no_adapter_is_refused(name: str) -> None:
    reasons = {
        "llama4_text": "the pass fails in or after model.layers.0.feed_forward.router, a Llama4Router (AttributeError",
        "mamba": "is refused by peft for MambaForCausalLM: [PEFT:PeftType.LORA] Module 'out_proj'",
        "phimoe": "the pass fails in or after model.layers.0.mlp.router, a PhimoeTopKRouter (AttributeError",
    }
    with pytest.raises(ConfigError) as caught:
        config = LoraConfig(rank=3, targets=["all-linear" if name == "mamba" else "router"])
        require_adaptable(tiny(name, (MIXED | REFUSED)[name][0]), config, "target.lora", norms=False)
    assert reasons[name] in str(caught.value)
    assert "targets that work: target.lora.targets=[" in str(caught.value)


@pytest.mark.parametrize("name", ["bloom", "falcon", "gemma3_text", "gpt2", "gpt_neox", "llama", "mpt", "phi", "qwen3"])
def test_checkpointed_blocks_give_the_same_norms(name: str) -> None:
    plain, examples = adapted(tiny(name, WORK[name]), ["all-linear"]), ragged_examples(5)
    checkpointed = adapted(tiny(name, WORK[name]), ["all-linear"])
    checkpoint_blocks(checkpointed)
    assert np.array_equal(batch_norms(checkpointed, examples, 5), batch_norms(plain, examples, 5))
