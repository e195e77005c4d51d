"""The target's training against those that people know: transformers' Trainer and TRL's SFTTrainer.

All three start from the same adapter and see the same rows in the same order, the peers in two micro-batches a step.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from padding import padded
from test_finetuning import optimization, train, weights_of
from test_norms import VOCABULARY, tiny_model
from transformers import Trainer, TrainingArguments

from gradsift.config import LoraConfig
from gradsift.data.tokens import Encoded
from gradsift.training import lora

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("one_thread")]

STEPS, BATCH, RATE = 10, 4, 1e-3
# gradients are from 0.19 to 0.37 long, so that a clip at 0.3 binds in some of the steps
RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"schedule": "linear", "warmup_steps": 0, "max_grad_norm": 1.0},
    "cosine": {"schedule": "cosine", "warmup_steps": 3, "max_grad_norm": 0.3},
}


def rows() -> list[Encoded]:
    """Return examples with responses of 1 to 12 tokens after prompts of 1 to 6."""
    rng = np.random.default_rng(3)
    made = []
    for row in range(STEPS * BATCH):
        prompt, response = int(rng.integers(1, 7)), int(rng.integers(1, 13))
        ids = rng.integers(0, VOCABULARY, prompt + response).astype(np.int32)
        made.append(Encoded(row, row, ids, np.arange(prompt + response) >= prompt))
    return made


def twin(adapted: Any) -> Any:
    """Return the model with peft's own adapter and the weights of `adapted`, in evaluation mode, without dropout."""
    names = {name.rsplit(".", 1)[-1] for name, _ in lora.lora_layers(adapted)}
    theirs = peft.LoraConfig(r=4, lora_alpha=16, target_modules=list(names))
    model = peft.get_peft_model(tiny_model("llama"), theirs)
    weights = lora.trainable_parameters(model)
    for name, value in weights_of(adapted).items():
        weights[name].data.copy_(value)
    return model


def dataset() -> list[dict[str, list[int]]]:
    return [
        {
            "input_ids": example.input_ids.tolist(),
            "labels": np.where(example.is_response, example.input_ids, -100).tolist(),
        }
        for example in rows()
    ]


def arguments(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH // 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "learning_rate": RATE,
        "weight_decay": 0.01,
        "lr_scheduler_type": recipe["schedule"],
        "warmup_steps": recipe["warmup_steps"],
        "max_grad_norm": recipe["max_grad_norm"],
        "train_sampling_strategy": "sequential",
        "optim": "adamw_torch",
        "use_cpu": True,
        "bf16": False,  # on unasked in TRL
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
    }


def fresh() -> Any:
    return lora.add_adapter(tiny_model("llama"), LoraConfig(rank=4), seed=1)


def trained(recipe: dict[str, Any], loss: str = "token") -> dict[str, torch.Tensor]:
    """Return the weights after ten steps of our training."""
    adapted = fresh()
    rate = optimization(**recipe, loss=loss, learning_rate=RATE, total_steps=STEPS)
    plan = [list(range(step * BATCH, step * BATCH + BATCH)) for step in range(STEPS)]
    train(adapted, rows(), plan, optimization=rate, tokens=40)
    return weights_of(adapted)


def distance(computed: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the distance of the B matrices, relative by norm; B starts at 0."""
    assert computed.keys() == expected.keys()
    ours, theirs = (
        torch.cat([w[name].flatten() for name in computed if "lora_B" in name]) for w in (computed, expected)
    )
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("recipe", RECIPES)
def test_ten_steps_give_the_weights_of_transformers_trainer(recipe: str, tmp_path: Path) -> None:
    model = twin(fresh())
    settings = TrainingArguments(**arguments(RECIPES[recipe], tmp_path))
    Trainer(model, settings, data_collator=padded, train_dataset=dataset()).train()
    assert distance(trained(RECIPES[recipe]), weights_of(model)) <= 1e-5


@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed; `make setup` installs it")
def test_ten_steps_give_the_weights_of_trls_sft_trainer(byte_tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = twin(fresh())
    settings = SFTConfig(**arguments(RECIPES["cosine"], tmp_path), dataset_kwargs={"skip_prepare_dataset": True})
    given = {"train_dataset": Dataset.from_list(dataset()), "processing_class": byte_tokenizer}
    SFTTrainer(model, settings, data_collator=padded, **given).train()
    assert distance(trained(RECIPES["cosine"]), weights_of(model)) <= 1e-5


def test_the_laws_above_see_a_loss_by_example_and_a_missing_clip() -> None:
    recipe = RECIPES["cosine"]
    ours = trained(recipe)
    assert distance(trained(recipe, "example"), ours) > 0.1
    assert distance(trained(recipe | {"max_grad_norm": None}), ours) > 1e-3
