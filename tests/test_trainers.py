"""Laws of `export=[trl,llama_factory,axolotl]`: each tool's own loader reads the rows and trains on the responses.

LLaMA-Factory and axolotl pin other versions of the libraries than gradsift, so their tests run in environments of their
own: GRADSIFT_TEST_LLAMA_FACTORY and GRADSIFT_TEST_AXOLOTL name the Python of each.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_norms import tiny_model

from gradsift.config import ExportConfig, FieldsConfig, LoraConfig, ModelConfig, TargetConfig
from gradsift.data.examples import Example
from gradsift.data.formats import parse_rows
from gradsift.selection.trainers import export

FORMATS = ("trl", "llama_factory", "axolotl")
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _turns(*texts: str, **of_the_second: Any) -> dict[str, Any]:
    turns: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)
    ]
    turns[1] |= of_the_second
    return {"messages": [{"role": "system", "content": "Be kind."}, *turns]}


SHAPES: dict[str, list[dict[str, Any]]] = {
    "single": [
        {"instruction": f"Name river {n}.", "input": "" if n else "In Asia.", "output": f"R{n}."} for n in range(4)
    ],
    "several": [_turns(f"Hi {n}", "Hello.", "Who?", f"Me {n}.") for n in range(4)],
    "weighted": [_turns(f"Hi {n}", "Bad draft.", "Again", f"Good {n}.", weight=0) for n in range(4)],
    "pairs": [{"prompt": f"Q{n}", "chosen": f"Good {n}.", "rejected": f"Bad {n}."} for n in range(4)],
}
TRAINED = {  # the replies that carry loss
    "single": ["R0.", "R1.", "R2.", "R3."],
    "several": [text for n in range(4) for text in ("Hello.", f"Me {n}.")],
    "weighted": [f"Good {n}." for n in range(4)],
    "pairs": [f"Good {n}." for n in range(4)],
}


def examples(shape: str) -> list[Example]:
    made, rejected = parse_rows(enumerate(SHAPES[shape]), "auto", FieldsConfig())
    assert not rejected
    return made


def target(template: str = "chat") -> TargetConfig:
    lora = LoraConfig(rank=2, alpha=4.0)
    model = ModelConfig(path="a/b")
    return TargetConfig(name="own", model=model, lora=lora, template=template, max_length=256, steps=1, batch_size=2)


def exported(folder: Path, shape: str, template: str = "chat", model: str | None = "a/b") -> Path:
    export(ExportConfig(**dict.fromkeys(FORMATS, True)), target(template), model, examples(shape), folder)
    return folder / "export"


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for each in value.values() for text in strings(each)]
    return [text for each in value for text in strings(each)] if isinstance(value, list) else [str(value)]


@pytest.fixture
def model(byte_tokenizer: Any, tmp_path: Path) -> Path:
    """The folder of a tiny random model whose chat template marks what is generated."""
    made = tiny_model("llama")
    made.resize_token_embeddings(len(byte_tokenizer))
    made.save_pretrained(tmp_path / "model")
    byte_tokenizer.chat_template = MARKED
    byte_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def own_template(folder: Path) -> str:
    """Return the path of a chat template that is not the model's."""
    text = MARKED.replace("'<|im_start|>' + m['role']", "'[' + m['role'] + ']'")
    (folder / "own.jinja").write_text(text.replace("<|im_start|>assistant", "[assistant]"))
    return str(folder / "own.jinja")


# --------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("template", ["chat", "alpaca"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_text_of_a_selected_row_is_in_the_rows_of_each_tool(shape: str, template: str, tmp_path: Path) -> None:
    folder = exported(tmp_path, shape, template)
    wanted = {text for row in SHAPES[shape] for text in strings(row) if text not in ("", "0", "user", "assistant")}
    wanted -= {"system"}
    for tool in FORMATS:
        written = "\n".join(text for file in (folder / tool).glob("*.jsonl") for text in strings(rows_of(file)))
        assert [text for text in wanted if text not in written] == []


def test_rows_keep_the_order_of_the_selection_and_name_their_example(tmp_path: Path) -> None:
    ids = [example.example_id for example in examples("single")]
    for tool in FORMATS:
        assert [row["example_id"] for row in rows_of(exported(tmp_path, "single") / tool / "train.jsonl")] == ids


def test_a_reply_that_is_not_trained_is_context_for_every_tool(tmp_path: Path) -> None:
    folder = exported(tmp_path, "weighted")
    first = rows_of(folder / "trl" / "train.jsonl")[0]
    assert [turn["content"] for turn in first["prompt"]] == ["Be kind.", "Hi 0", "Bad draft.", "Again"]
    assert first["completion"] == [{"role": "assistant", "content": "Good 0."}]
    assert yaml.safe_load((folder / "llama_factory" / "sft.yaml").read_text())["mask_history"] is True
    turns = rows_of(folder / "axolotl" / "train.jsonl")[0]["messages"]
    assert [turn["train"] for turn in turns] == [False, False, False, False, True]


def test_a_template_of_the_users_own_goes_along(tmp_path: Path) -> None:
    template = own_template(tmp_path)
    folder = exported(tmp_path, "pairs", template)
    named = {"trl": "chat_template_path", "axolotl": "chat_template_jinja"}
    for tool, key in named.items():
        for file in ("sft.yaml", "dpo.yaml"):
            config = yaml.safe_load((folder / tool / file).read_text())
            assert (folder / tool / config[key]).read_text() == Path(template).read_text()
    for file in ("sft.yaml", "dpo.yaml"):
        text = (folder / "llama_factory" / file).read_text()
        assert f"the tokenizer's own chat template, not {template}, is used here" in text.splitlines()[0]
        assert "template" not in yaml.safe_load(text)


def test_a_run_without_a_target_leaves_the_model_to_be_named(tmp_path: Path) -> None:
    folder = exported(tmp_path, "single", model=None)
    named = {tool: yaml.safe_load((folder / tool / "sft.yaml").read_text()) for tool in FORMATS}
    keys = {"trl": "model_name_or_path", "llama_factory": "model_name_or_path", "axolotl": "base_model"}
    assert [named[tool][keys[tool]] for tool in FORMATS] == ["MODEL"] * 3


def test_epochs_have_each_tools_name_and_type(tmp_path: Path) -> None:
    by_epochs = dataclasses.replace(target(), steps=None, epochs=2)
    export(ExportConfig(**dict.fromkeys(FORMATS, True)), by_epochs, "a/b", examples("single"), tmp_path)
    lines = [(tmp_path / "export" / tool / "sft.yaml").read_text().splitlines() for tool in FORMATS]
    expected = ("num_train_epochs: 2", "num_train_epochs: 2.0", "num_epochs: 2")
    assert all(line in of_tool for line, of_tool in zip(expected, lines, strict=True))


def test_only_pairs_have_files_for_preference_training(tmp_path: Path) -> None:
    for shape in SHAPES:
        folder = exported(tmp_path / shape, shape)
        for tool in FORMATS:
            assert (
                (folder / tool / "dpo.yaml").exists() is (folder / tool / "pairs.jsonl").exists() is (shape == "pairs")
            )


def test_chosen_and_rejected_conversations_become_one_prompt_and_two_replies(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "Q"}]
    chosen, rejected = ([*prompt, {"role": "assistant", "content": text}] for text in ("Yes.", "No."))
    made, _ = parse_rows([(0, {"chosen": chosen, "rejected": rejected})], "auto", FieldsConfig())
    export(ExportConfig(trl=True), target(), "a/b", made, tmp_path)
    (row,) = rows_of(tmp_path / "export" / "trl" / "pairs.jsonl")
    assert (row["prompt"], row["chosen"], row["rejected"]) == (prompt, chosen[1:], rejected[1:])


# ------------------------------------------------------------------------------------ the real tools


def trained_texts(labels: list[list[int]], tokenizer: Any) -> list[str]:
    """Return each run of trained tokens as text, without the tokens that end a turn or the text."""
    texts: list[str] = []
    for row in labels:
        inside = False
        for token in row:
            if token < 0 or token in tokenizer.all_special_ids:
                inside = False
            elif inside:
                texts[-1] += tokenizer.decode([token])
            else:
                texts.append(tokenizer.decode([token]))
                inside = True
    return [text for text in texts if text.strip()]


CASES = [
    *((shape, "chat") for shape in SHAPES),
    ("single", "alpaca"),
    ("single", "own.jinja"),
    ("several", "own.jinja"),
]


@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed; `make setup` installs it")
@pytest.mark.parametrize(("shape", "template"), CASES)
def test_trl_takes_a_step_on_the_responses(
    shape: str, template: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trl
    from trl.scripts import sft

    trainers: list[Any] = []
    train = trl.SFTTrainer.train
    monkeypatch.setattr(trl.SFTTrainer, "train", lambda self, **given: (trainers.append(self), train(self, **given)))
    template = own_template(tmp_path) if template == "own.jinja" else template
    monkeypatch.chdir(exported(tmp_path, shape, template, str(model)) / "trl")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    here = ["--config", "sft.yaml", "--use_cpu", "true", "--bf16", "false", "--disable_tqdm", "true"]
    sft.main(*sft.make_parser().parse_args_and_config(here))
    (trainer,) = trainers
    assert trainer.state.global_step == 1
    labels = [trainer.data_collator([row])["labels"][0].tolist() for row in trainer.train_dataset]
    assert trained_texts(labels, trainer.processing_class) == TRAINED[shape]
    shown = [trainer.processing_class.decode(row["input_ids"]) for row in trainer.train_dataset]
    assert all(("[user]" in text) is template.endswith(".jinja") for text in shown)


def run_in(variable: str, arguments: list[str], folder: Path, cache: Path) -> str:
    """Run a tool in the environment whose Python `variable` names, and return what it prints."""
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"the tool has an environment of its own; name its Python in {variable}")
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    own = {
        "HF_DATASETS_CACHE": str(cache),
        "HF_HOME": str(cache),
        "CUDA_VISIBLE_DEVICES": "",
        "AXOLOTL_DO_NOT_TRACK": "1",
    }
    code = subprocess.run(
        [python, *arguments], cwd=folder, env=kept | own, capture_output=True, text=True, check=False, timeout=900
    )
    assert code.returncode == 0, (code.stdout + code.stderr)[-4000:]
    return code.stdout + code.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "config"), [*((shape, "sft.yaml") for shape in SHAPES), ("pairs", "dpo.yaml")])
def test_llama_factory_takes_a_step(shape: str, config: str, model: Path, tmp_path: Path) -> None:
    folder = exported(tmp_path, shape, model=str(model)) / "llama_factory"
    here = ["overwrite_cache=true", "max_steps=1", "use_cpu=true"]
    arguments = ["-m", "llamafactory.cli", "train", config, *here]
    printed = run_in("GRADSIFT_TEST_LLAMA_FACTORY", arguments, folder, tmp_path / "cache")
    assert "Skipping this abnormal example" not in printed
    assert (folder / "output" / "adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "template", "config"),
    [
        *((shape, "chat", "sft.yaml") for shape in SHAPES),
        ("single", "alpaca", "sft.yaml"),
        ("several", "own.jinja", "sft.yaml"),
        ("pairs", "chat", "dpo.yaml"),
    ],
)
def test_axolotl_takes_a_step(shape: str, template: str, config: str, model: Path, tmp_path: Path) -> None:
    template = own_template(tmp_path) if template == "own.jinja" else template
    folder = exported(tmp_path, shape, template, str(model)) / "axolotl"
    arguments = ["-m", "axolotl.cli.train", config, "--max_steps", "1"]
    run_in("GRADSIFT_TEST_AXOLOTL", arguments, folder, tmp_path / "cache")
    assert (folder / "output" / "adapter_model.safetensors").exists()
