"""Laws of loading: all weights of a model come from its files, and errors name what is wrong with them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import assert_close_by_norm, exact_copy
from safetensors.torch import load_file, save_file
from test_backbones import CPU, logits_of, pin
from test_norms import tiny_model
from transformers import GPTNeoConfig, GPTNeoForCausalLM, LlamaForSequenceClassification

from gradsift.config import ModelConfig
from gradsift.errors import DataError
from gradsift.training.backbones import load_backbone, quieten

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("one_thread")]

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def save(tmp_path: Path, byte_tokenizer: Any) -> Callable[..., Path]:
    """Save a model with a tokenizer; `weights` and `settings` change its tensors and its config."""

    def saved(
        model: Any, weights: Callable[[Tensors], Tensors] | None = None, settings: dict[str, Any] | None = None
    ) -> Path:
        folder = tmp_path / "models" / "Tiny"
        model.save_pretrained(folder)
        byte_tokenizer.save_pretrained(folder)
        if weights is not None:
            file = folder / "model.safetensors"
            save_file(weights(load_file(file)), file, metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | (settings or {})))
        return folder

    return saved


def load(folder: Path) -> Any:
    return load_backbone(pin(folder.parent / "store", folder), ModelConfig(path=str(folder)), CPU)


def refusal(folder: Path) -> str:
    """Return the error in one line, without the folder's name."""
    with pytest.raises(DataError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"model.path={folder}")
    return message.replace(str(folder), "FOLDER")


# ------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize(
    ("architecture", "settings", "reason"),
    [
        ("gpt2", {"n_layer": 4}, "24 missing (transformer.h.2.attn.c_attn.bias, "),
        ("gpt2", {"n_layer": 1}, "without a place in the model (transformer.h.1.attn.c_attn.weight, "),
        ("gpt2", {"vocab_size": 70}, "1 of another shape (transformer.wte.weight is [61, 16], not [70, 16])"),
        ("gpt2", {"model_type": "bert"}, "a BertLMHeadModel that its weights do not fit: "),
        ("llama", {"num_hidden_layers": 3}, "9 missing (model.layers.2.input_layernorm.weight, "),
        ("llama", {"model_type": "qwen2"}, "6 missing (model.layers.0.self_attn.k_proj.bias, "),
        ("llama", {"intermediate_size": 32}, "6 of another shape (model.layers.0.mlp.down_proj.weight is [16, 24], "),
    ],
)
def test_a_config_of_another_model_is_refused_with_the_weights(
    architecture: str, settings: dict[str, Any], reason: str, save: Callable[..., Path]
) -> None:
    message = refusal(save(tiny_model(architecture), settings=settings))
    assert reason in message
    assert message.endswith("give the config.json and the weights of one and the same model")


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if name not in key}


def test_a_single_weight_that_is_missing_is_named(save: Callable[..., Path]) -> None:
    message = refusal(save(tiny_model("llama"), without("layers.1.mlp.up_proj")))
    assert "1 missing (model.layers.1.mlp.up_proj.weight)" in message


def test_a_head_may_be_left_out_where_it_is_the_embedding_and_nowhere_else(save: Callable[..., Path]) -> None:
    model = tiny_model("llama", tied=True)
    assert_close_by_norm(logits_of(load(save(model, without("lm_head"))).model), logits_of(exact_copy(model)), k=64)
    assert "1 missing (lm_head.weight)" in refusal(save(tiny_model("llama", tied=False), without("lm_head")))


def test_the_weights_of_a_classifier_have_no_head_for_words(save: Callable[..., Path]) -> None:
    classifier = LlamaForSequenceClassification(tiny_model("llama", tied=False).config)
    assert "1 missing (lm_head.weight)" in refusal(save(classifier, settings={"model_type": "llama"}))


@pytest.mark.parametrize("name", ["score.weight", "classifier.out_proj.weight", "v_head.summary.weight"])
def test_a_head_of_another_task_is_left_alone(name: str, save: Callable[..., Path]) -> None:
    model = tiny_model("llama")
    loaded = load(save(model, lambda tensors: tensors | {name: torch.ones(2, 16)}))
    assert_close_by_norm(logits_of(loaded.model), logits_of(exact_copy(model)), k=64)


def test_masks_and_frequencies_of_old_files_are_left_alone(save: Callable[..., Path]) -> None:
    """GPT-2's files on the hub have masks and names without a prefix; old files of Llama have rotary frequencies."""
    gpt2, mask = tiny_model("gpt2"), torch.ones(1, 1, 32, 32).tril()

    def as_on_the_hub(tensors: Tensors) -> Tensors:
        bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
        return bare | {"h.0.attn.bias": mask, "h.0.attn.masked_bias": torch.tensor(-1e4)}

    assert_close_by_norm(logits_of(load(save(gpt2, as_on_the_hub)).model), logits_of(exact_copy(gpt2)), k=64)
    llama, frequencies = tiny_model("llama"), "model.layers.0.self_attn.rotary_emb.inv_freq"
    load(save(llama, lambda tensors: tensors | {frequencies: torch.ones(2)}))
    neo = GPTNeoForCausalLM(
        GPTNeoConfig(vocab_size=61, hidden_size=16, num_layers=1, attention_types=[[["global"], 1]], num_heads=2)
    )
    masks = {f"transformer.h.0.attn.attention.{name}": mask.clone() for name in ("bias", "masked_bias")}
    load(save(neo, lambda tensors: tensors | masks))


def test_no_table_of_transformers_stands_beside_the_error(
    save: Callable[..., Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("transformers.modeling_utils")
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    folder = save(tiny_model("gpt2"), settings={"n_layer": 3})
    refusal(folder)
    assert "LOAD REPORT" in caplog.text
    caplog.clear()
    quieten()
    refusal(folder)
    assert "LOAD REPORT" not in caplog.text


# --------------------------------------------------------------------------------------- other files


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1]", "config.json is not an object with the model's settings: [1]"),
        ("null", "config.json is not an object with the model's settings: None"),
        ("hello", "config.json is not JSON (Expecting value"),
        ("", "config.json is not JSON (Expecting value"),
        ("[" * 99_999, "config.json is not JSON (nested too deep"),
        ("{}", "Should have a `model_type` key"),
        ('{"model_type": 3}', "model type `3`"),
    ],
)
def test_a_config_that_describes_no_model_is_refused(text: str, reason: str, save: Callable[..., Path]) -> None:
    folder = save(tiny_model("gpt2"))
    (folder / "config.json").write_text(text)
    assert reason in refusal(folder)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"n_embd": "wide"}, "Field 'n_embd' expected int, got str (value: 'wide')"),
        ({"n_embd": 17}, "`embed_dim` must be divisible by num_heads"),
        ({"n_head": 0}, "ZeroDivisionError"),
        ({"model_type": "t5"}, "Unrecognized configuration class"),
        (
            {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "m.M", "AutoConfig": "c.C"}},
            "model.trust_remote_code=true runs the code",
        ),
    ],
)
def test_settings_that_make_no_causal_model_are_refused(
    settings: dict[str, Any], reason: str, save: Callable[..., Path]
) -> None:
    assert reason in refusal(save(tiny_model("gpt2"), settings=settings))


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["[1]", "hello", '{"added_tokens": [3', "{}"])
def test_a_broken_tokenizer_is_refused(file: str, text: str, save: Callable[..., Path]) -> None:
    folder = save(tiny_model("gpt2"))
    (folder / file).write_text(text)
    if (file, text) == ("tokenizer_config.json", "{}"):  # the settings alone: all tokens are in the other file
        assert len(load(folder).tokenizer) >= 260
    else:
        assert "its tokenizer could not be loaded" in refusal(folder)


@pytest.mark.parametrize("tokenizer_class", [None, "LlamaTokenizer"])
def test_a_folder_without_a_tokenizer_is_refused(tokenizer_class: str | None, save: Callable[..., Path]) -> None:
    """transformers makes an empty tokenizer, which gives no tokens or only unknown ones."""
    folder = save(tiny_model("gpt2"))
    (folder / "tokenizer.json").unlink()
    if tokenizer_class is None:
        (folder / "tokenizer_config.json").unlink()
    else:
        settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": tokenizer_class}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "has no tokenizer: its vocabulary holds nothing but special tokens" in refusal(folder)


def test_an_index_that_names_no_file_there_is_refused(save: Callable[..., Path]) -> None:
    folder = save(tiny_model("gpt2"))
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    for text in ("[1]", json.dumps({"metadata": {}, "weight_map": {"transformer.wte.weight": "gone.safetensors"}})):
        index.write_text(text)
        assert "could not be loaded" in refusal(folder)


def test_a_defect_is_not_taken_for_a_broken_file(save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Defect(Exception):
        pass

    def fail(*args: Any, **options: Any) -> Any:
        raise Defect

    folder = save(tiny_model("gpt2"))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(Defect):
        load(folder)
