"""Models that have a name of their own (`config/models.py`): a tiny random one of each architecture trains and answers.

Their per-sample norms are in `test_architectures.py`, their residual streams in `test_residual.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exactness import exact_copy
from test_generation import CONTEXT, VOCABULARY, ragged_prompts, slow_answer, tiny_tokenizer
from test_norms import ragged_examples
from transformers import AutoConfig, AutoModelForCausalLM

from gradsift.config import LoraConfig
from gradsift.data.batching import collate
from gradsift.evaluation.generation import generate_answers
from gradsift.training import lora
from gradsift.training.head import ResponseLosses

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16, "num_attention_heads": 2}
SHAPE |= {"num_key_value_heads": 1, "max_position_embeddings": CONTEXT}
SHAPE |= {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}
WINDOW = {"sliding_window": 8}  # shorter than the prompts
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3_text": WINDOW | {"layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": WINDOW | EXPERTS,
    "llama": {},
    "mistral": WINDOW,
    "olmo2": {},
    "olmo3": WINDOW | {"layer_types": ["sliding_attention", "full_attention"]},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "smollm3": {"no_rope_layers": [1, 0]},
}


def family(name: str, vocabulary: int) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, vocab_size=vocabulary, **SHAPE, **FAMILIES[name])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():  # the usual initialisation makes a model repeat its last word
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_of_a_batch_are_those_without_padding_and_cache(name: str) -> None:
    model, prompts = family(name, VOCABULARY), ragged_prompts(6)
    exact = exact_copy(model)
    expected = [slow_answer(exact, prompt, 5) for prompt in prompts]
    assert len(set(expected)) > 2
    assert generate_answers(model, tiny_tokenizer(), prompts, max_new_tokens=5, batch_size=4) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_training_steps_lower_the_loss_and_move_the_adapter_alone(name: str) -> None:
    model = family(name, 61)
    before = {key: weight.clone() for key, weight in model.named_parameters()}
    adapted = lora.add_adapter(model, LoraConfig(rank=3), seed=1)
    losses, batch = ResponseLosses(adapted), collate(ragged_examples(6), 0)
    optimizer = torch.optim.AdamW(lora.trainable_parameters(adapted).values(), lr=1e-2)
    seen = []
    for _ in range(6):
        loss = losses(batch).mean()
        seen.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert seen[-1] < seen[0] - 0.05
    plain = adapted.unload()
    assert all(torch.equal(weight, before[key]) for key, weight in plain.named_parameters())
