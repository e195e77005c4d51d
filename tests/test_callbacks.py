"""Laws of the public callbacks and functions: the norms are those of a loop over single examples, in any trainer."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import peft
import pytest
import torch
from datasets import Dataset
from exactness import assert_close_by_norm
from padding import padded
from test_norms import VOCABULARY, tiny_model
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from gradsift import GradientNormCallback, GradientNormTrainerCallback, per_sample_gradients, per_sample_norms
from gradsift.errors import ConfigError, DataError, GradsiftError
from gradsift.gradients.callback import NormRecords
from gradsift.gradients.per_sample import attached
from gradsift.gradients.probes import NormProbe

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("one_thread")]

COUNT, BATCH = 8, 2
IDS = [30, 11, 25, 4, 7, 98, 41, 2]


def their_model(**options: Any) -> Any:
    """A model with peft's own adapters, as anyone has it; A and B are both away from zero."""
    settings = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "up_proj"], **options)
    torch.manual_seed(5)
    model = peft.get_peft_model(tiny_model("llama"), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model


def dataset() -> list[dict[str, Any]]:
    rng, rows = np.random.default_rng(3), []
    for number in IDS:
        prompt, response = int(rng.integers(1, 5)), int(rng.integers(2, 9))
        ids = rng.integers(1, VOCABULARY, prompt + response)
        labels = np.where(np.arange(prompt + response) >= prompt, ids, -100)
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist(), "example_id": number})
    return rows


def loop(model: Any, rows: list[dict[str, Any]]) -> tuple[torch.Tensor, np.ndarray]:
    """Gradients (N, P) and norms (N, 3) of A, B and both: one backward pass per example, by peft in float64."""
    model = copy.deepcopy(model).double().eval()
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    gradients, norms = [], []
    for row in rows:
        loss = model(**padded([row])).loss
        parts = torch.autograd.grad(loss, [parameter for _, parameter in named])
        of = {
            side: torch.cat([part.flatten() for (name, _), part in zip(named, parts, strict=True) if side in name])
            for side in ("lora_A", "lora_B", "lora_")
        }
        norms.append([float(of[side].norm()) for side in of])
        gradients.append(of["lora_"])
    return torch.stack(gradients), np.array(norms)


def require_loop(table: dict[str, np.ndarray], expected: np.ndarray, epochs: int = 1) -> None:
    """That the table holds the norms of every example once an epoch, whose weights did not move."""
    assert sorted(table["example_id"].tolist()) == sorted(IDS * epochs)
    place = {number: place for place, number in enumerate(IDS)}
    order = [place[number] for number in table["example_id"].tolist()]
    computed = np.stack([table[name] for name in ("norm_A", "norm_B", "norm")], 1)
    assert_close_by_norm(computed, expected[order], k=2048, dim=(), dtype=torch.float32)


# ------------------------------------------------------------------------------------- functions


def test_the_functions_give_the_gradients_and_norms_of_the_loop_and_leave_the_model_alone() -> None:
    model, rows = their_model(lora_dropout=0.3).train(), dataset()
    gradients, norms = loop(model, rows)
    kinds = [type(module) for module in model.modules()]
    assert_close_by_norm(per_sample_norms(model, rows, tokens=20), norms[:, 2], k=2048, dim=(), dtype=torch.float32)
    computed = per_sample_gradients(model, rows, tokens=20)
    assert_close_by_norm(computed, gradients, k=2048)
    left_padded = [
        {
            "input_ids": torch.tensor([0, 0, *row["input_ids"]]),
            "labels": torch.tensor([-100, -100, *row["labels"]]),
            "attention_mask": [0, 0, *[1] * len(row["labels"])],
        }
        for row in rows
    ]
    assert torch.equal(per_sample_gradients(model, left_padded, tokens=20), computed)
    assert [type(module) for module in model.modules()] == kinds
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("frozen", ["lora_A", "lora_"])
def test_adapters_that_do_not_train_have_gradients_too(frozen: str) -> None:
    """peft freezes the adapters of a model that it loads, unless it is told that they train."""
    model, rows = their_model(), dataset()[:3]
    expected = per_sample_gradients(model, rows)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and frozen not in name)
    assert torch.equal(per_sample_gradients(model, rows), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "row 1 has no labels"),
        ({"labels": [-100, -100]}, "row 1 has input_ids"),
        ({"input_ids": [1, 2, 3], "labels": [-100, -100, 4]}, "row 1: the label at position 2 is 4 and the token 3"),
        ({"input_ids": [1, 2], "labels": [1, -100]}, "row 1 has no label after its first token"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(change: dict[str, Any], message: str) -> None:
    rows = dataset()[:2]
    with pytest.raises(DataError, match=message):
        per_sample_norms(their_model(), [rows[0], rows[1] | change])


@pytest.mark.parametrize("options", [{"use_dora": True}, {"bias": "all"}])
def test_adapters_with_another_formula_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(GradsiftError, match=r"model.layers.0.self_attn.q_proj is of class"):
        per_sample_norms(their_model(**options).requires_grad_(True), dataset())


# ------------------------------------------------------------------------------------- Lightning


class TheirModule(L.LightningModule):
    """A module with automatic optimisation, as anyone writes it; its weights do not move."""

    def __init__(self, model: Any, reduction: str) -> None:
        super().__init__()
        self.model, self.reduction = model, reduction

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "labels", "attention_mask")}
        if self.reduction == "token_mean":
            return self.model(**inputs).loss
        logits = self.model(**inputs).logits[:, :-1].transpose(1, 2)
        losses = torch.nn.functional.cross_entropy(logits, inputs["labels"][:, 1:], reduction="none")
        own = losses.sum(1) / (inputs["labels"][:, 1:] != -100).sum(1)
        return own.mean() if self.reduction == "mean" else own.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)


def lightning_trainer(callback: GradientNormCallback, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "barebones": False}
    return L.Trainer(
        accelerator="cpu", devices=1, callbacks=[callback], enable_model_summary=False, **(quiet | options)
    )


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*eval mode.*")
@pytest.mark.parametrize(("reduction", "accumulate", "epochs"), [("mean", 1, 2), ("token_mean", 2, 1), ("sum", 1, 1)])
def test_in_a_lightning_trainer(reduction: str, accumulate: int, epochs: int) -> None:
    model = their_model()
    _, norms = loop(model, dataset())

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return padded(rows) | {"example_id": torch.tensor([row["example_id"] for row in rows])}

    callback = GradientNormCallback(reduction=reduction)
    loader = DataLoader(dataset(), batch_size=BATCH, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
    trainer = lightning_trainer(callback, max_epochs=epochs, accumulate_grad_batches=accumulate)
    trainer.fit(TheirModule(model, reduction), loader)
    table = callback.table()
    require_loop(table, norms, epochs)
    assert table["epoch"].tolist() == [epoch for epoch in range(epochs) for _ in IDS]
    assert all(type(module).__name__ != "AdaptedLinear" for module in model.modules())


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*eval mode.*")
@pytest.mark.parametrize("kind", [int, str])
def test_a_checkpoint_of_lightning_keeps_what_was_collected(kind: type, tmp_path: Path) -> None:
    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [kind(row["example_id"]) for row in rows]
        return padded(rows) | {"example_id": torch.tensor(ids) if kind is int else ids}

    loader = DataLoader(dataset(), batch_size=BATCH, collate_fn=collate)  # type: ignore[arg-type]
    path = tmp_path / "epoch.ckpt"
    for epochs in (1, 2):
        callback = GradientNormCallback()
        trainer = lightning_trainer(callback, max_epochs=epochs)
        trainer.fit(TheirModule(their_model(), "mean"), loader, ckpt_path=str(path) if path.exists() else None)
        trainer.save_checkpoint(path)
    table = callback.table()
    assert table["example_id"].tolist() == [*map(kind, IDS)] * 2
    assert table["epoch"].tolist() == [0] * len(IDS) + [1] * len(IDS)


def test_ids_that_float64_rounds_are_refused() -> None:
    records, norms = NormRecords(), torch.ones(1)
    records.add(torch.tensor([2**53 - 1]), 0, norms, norms)
    assert records.table()["example_id"].tolist() == [2**53 - 1]
    records.add([2**53 + 1], 0, norms, norms)  # a list of numbers is no list of strings
    with pytest.raises(GradsiftError, match="give smaller numbers, or strings"):
        records.table()


def test_a_batch_without_ids_and_an_unknown_reduction_are_refused() -> None:
    with pytest.raises(ConfigError, match="reduction='median' is not known"):
        GradientNormCallback(reduction="median")
    loader = DataLoader(dataset(), batch_size=BATCH, collate_fn=padded)  # type: ignore[arg-type]
    with pytest.raises(GradsiftError, match="the batch has no 'example_id'"):
        lightning_trainer(GradientNormCallback(), max_epochs=1).fit(TheirModule(their_model(), "mean"), loader)


def test_a_module_that_packs_its_batch_is_refused() -> None:
    class Packs(TheirModule):
        def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
            return super().training_step({name: values.reshape(1, -1) for name, values in batch.items()}, index)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return padded(rows) | {"example_id": torch.tensor([row["example_id"] for row in rows])}

    loader = DataLoader(dataset(), batch_size=BATCH, collate_fn=collate)  # type: ignore[arg-type]
    trainer = lightning_trainer(GradientNormCallback(reduction="token_mean"), max_epochs=1)
    with pytest.raises(GradsiftError, match=f"has {BATCH} example ids, but the adapted layers saw 1 examples"):
        trainer.fit(Packs(their_model(), "token_mean"), loader)


def test_two_forward_passes_before_a_backward_pass_are_refused() -> None:
    model, batch = their_model(), padded(dataset()[:2])
    with attached(model, NormProbe()), pytest.raises(GradsiftError, match="passed twice before a backward pass"):
        model(**batch)
        model(**batch)


# ------------------------------------------------------------------------------------- transformers and TRL


def arguments(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 3,  # 4 batches: the last step has one
        "num_train_epochs": 1,
        "learning_rate": 1e-30,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "remove_unused_columns": False,
        **options,
    }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_transformers_trainer(checkpointing: bool, tmp_path: Path) -> None:
    model, callback = their_model(), GradientNormTrainerCallback()
    _, norms = loop(model, dataset())
    if checkpointing:
        model.enable_input_require_grads()
    settings = TrainingArguments(**arguments(tmp_path, gradient_checkpointing=checkpointing))
    Trainer(model, settings, data_collator=padded, train_dataset=dataset(), callbacks=[callback]).train()
    require_loop(callback.table(), norms)
    assert model(**padded(dataset()[:1])).loss.requires_grad  # and no hook is left


def test_after_an_exception_in_the_trainer_the_model_is_as_before(tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, *given: Any, **named: Any) -> None:
            raise ValueError("the disk is full")

    model, callback = their_model(), GradientNormTrainerCallback()
    _, norms = loop(model, dataset())
    kinds = [type(module) for module in model.modules()]
    settings, rows = TrainingArguments(**arguments(tmp_path)), dataset()
    trainer = Trainer(model, settings, data_collator=padded, train_dataset=rows, callbacks=[callback, Fails()])
    with pytest.raises(ValueError, match="disk is full"):
        trainer.train()
    assert [type(module) for module in model.modules()] != kinds
    model(**padded(dataset()[:1]))
    assert [type(module) for module in model.modules()] == kinds
    assert not model._forward_hooks and not model._forward_pre_hooks

    with pytest.raises(ValueError, match="disk is full"):
        trainer.train()
    trainer.remove_callback(Fails)  # and a training that follows at once
    callback.records = NormRecords()
    trainer.train()
    require_loop(callback.table(), norms)
    assert [type(module) for module in model.modules()] == kinds
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_an_id_column_that_the_trainer_drops_is_missed_with_the_remedy(tmp_path: Path) -> None:
    settings = TrainingArguments(**arguments(tmp_path, remove_unused_columns=True))
    callbacks = [GradientNormTrainerCallback()]
    rows = Dataset.from_list(dataset())
    trainer = Trainer(their_model(), settings, data_collator=padded, train_dataset=rows, callbacks=callbacks)
    with pytest.raises(GradsiftError, match=r"no column 'example_id'.*remove_unused_columns=False"):
        trainer.train()


@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed; `make setup` installs it")
def test_in_trls_sft_trainer(byte_tokenizer: Any, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    model, callback = their_model(), GradientNormTrainerCallback()
    _, norms = loop(model, dataset())
    settings = SFTConfig(**arguments(tmp_path), dataset_kwargs={"skip_prepare_dataset": True})
    given = {"train_dataset": Dataset.from_list(dataset()), "processing_class": byte_tokenizer}
    SFTTrainer(model, settings, data_collator=padded, callbacks=[callback], **given).train()
    require_loop(callback.table(), norms)
