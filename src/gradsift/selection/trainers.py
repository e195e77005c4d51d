"""Export of the selection for other trainers: TRL, LLaMA-Factory and axolotl.

For each trainer, a folder with rows and configs is written.

Each config repeats the settings of the run's finetune: the model, the adapter, the optimiser and the maximal length.
The loss is computed on responses only, as in the run. With a chat template, axolotl's rows mark the replies on which
the run does not train (weight 0). Rows for TRL and LLaMA-Factory cannot mark such replies: if any selected example has
such a reply, each row for these two trainers holds a single trained reply, with the turns before it as the prompt.

With a text template (alpaca, plain), TRL and axolotl get rows with the rendered prompt, one row for each trained reply,
so that these two train on the same text as the run. LLaMA-Factory always renders the prompts itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gradsift.config import ExportConfig, TargetConfig
from gradsift.data.chat_templates import file_text, is_chat, is_file
from gradsift.data.columns import pair_of
from gradsift.data.examples import Example, Turn
from gradsift.data.templates import render
from gradsift.data.turns import Unusable, turns_of

FOLDER = "export"  # in the folder of the run
NO_MODEL = "MODEL"  # placeholder in the configs of a run without a target
Row = dict[str, Any]


def export(
    config: ExportConfig, target: TargetConfig, model: str | None, examples: Sequence[Example], run: Path
) -> dict[str, str]:
    """Write the selection in each format of `config`, each in its own folder below `run`.

    Args:
        model: hub id or folder of the target; None for a run without a target, whose configs then contain NO_MODEL.
        examples: the selection, best first.

    Returns:
        A dict from `for <format>`, such as `for trl`, to the path of the format's folder.
    """
    written = {}
    for name in config.formats:
        folder = run / FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        _FORMATS[name](folder, target, model or NO_MODEL, examples)
        written[f"for {name}"] = str(folder)
    return written


def turns(example: Example) -> list[Turn]:
    """Return all turns of an example; the last user turn is the instruction and, on a new line, the input, if any."""
    prompt = example.instruction + ("\n" + example.input if example.input else "")
    return [*example.history, Turn("user", prompt), Turn("assistant", example.output)]


def _message(turn: Turn) -> dict[str, str]:
    return {"role": turn.role, "content": turn.content}


def _trained(example: Example) -> list[int]:
    """Return the indices, among the example's turns, of the replies on which the loss is computed."""
    return [place for place, turn in enumerate(turns(example)) if turn.role == "assistant" and turn.is_trained]


def _has_context_replies(examples: Iterable[Example]) -> bool:
    return any(turn.role == "assistant" and not turn.is_trained for each in examples for turn in each.history)


def _messages(examples: Iterable[Example], *, by_reply: bool, marks: bool = False) -> Iterator[Row]:
    """Yield rows that hold the messages of an example.

    Args:
        by_reply: whether to yield, instead of a row for each example, a row for each trained reply, which is then the
            last message of the row.
        marks: whether to add the key `train` to each message, which says whether the loss is computed on the message.
    """
    for example in examples:
        whole = turns(example)
        for end in _trained(example) if by_reply else [len(whole) - 1]:
            said = [
                _message(turn) | ({"train": turn.role == "assistant" and turn.is_trained} if marks else {})
                for turn in whole[: end + 1]
            ]
            yield {"messages": said, "example_id": example.example_id}


def _replies(examples: Iterable[Example], template: str) -> Iterator[Row]:
    """Yield the prompt and the completion of each trained reply, as messages or, for a text template, as text."""
    for example in examples:
        if is_chat(template):
            whole = [_message(turn) for turn in turns(example)]
            pairs: list[tuple[Any, Any]] = [(whole[:place], [whole[place]]) for place in _trained(example)]
        else:
            parts = render(example, template)
            texts = [part.text for part in parts]
            pairs = [("".join(texts[:n]), part.text) for n, part in enumerate(parts) if part.is_response]
        for prompt, completion in pairs:
            yield {"prompt": prompt, "completion": completion, "example_id": example.example_id}


def _preferences(examples: Iterable[Example]) -> Iterator[tuple[Example, Turn]]:
    """Yield the example and the rejected reply for each example whose row has a rejected reply to the same prompt."""
    for example in examples:
        pair = pair_of(example.original)
        if pair is None:
            continue
        reply = example.original[pair[1]]
        try:
            if isinstance(reply, str):
                whole = [Turn("assistant", reply)]
            else:
                whole = turns_of(reply if isinstance(reply, list) else [reply])
        except Unusable:
            continue
        answer, prompt = ([turn for turn in part if turn.role != "system"] for part in (whole, turns(example)[:-1]))
        before = [_message(turn) for turn in answer[:-1]]
        if answer and answer[-1].role == "assistant" and before in ([], [_message(turn) for turn in prompt]):
            yield example, answer[-1]


def _pairs(examples: Iterable[Example]) -> Iterator[Row]:
    """Yield rows for LLaMA-Factory and axolotl: the prompt's messages, the chosen reply and the rejected reply."""
    for example, rejected in _preferences(examples):
        *prompt, chosen = (_message(turn) for turn in turns(example))
        row = {"messages": prompt, "chosen": chosen, "rejected": _message(rejected)}
        yield row | {"example_id": example.example_id}


def _pairs_for_trl(examples: Iterable[Example], template: str) -> Iterator[Row]:
    """Yield rows for TRL: prompt, chosen reply and rejected reply, as messages or, for a text template, as text."""
    for example, rejected in _preferences(examples):
        if is_chat(template):
            *prompt, chosen = (_message(turn) for turn in turns(example))
            row: Row = {"prompt": prompt, "chosen": [chosen], "rejected": [_message(rejected)]}
        else:
            *before, last = (part.text for part in render(example, template))
            row = {"prompt": "".join(before), "chosen": last, "rejected": rejected.content}
        yield row | {"example_id": example.example_id}


def _common(target: TargetConfig, model: str) -> dict[str, Any]:
    """Return the settings that all three trainers have, under TRL's names."""
    alpha, warms_up = target.lora.alpha, target.warmup_steps or target.warmup_ratio
    constant = "constant_with_warmup" if warms_up else "constant"  # transformers' names
    return {
        "model_name_or_path": model,
        **({"model_revision": target.model.revision} if target.model.revision else {}),
        "lora_r": target.lora.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": target.lora.dropout,
        "use_rslora": target.lora.use_rslora,
        "max_length": target.max_length,
        "output_dir": "output",
        "per_device_train_batch_size": target.batch_size,
        **({"max_steps": target.steps} if target.steps else {"num_train_epochs": target.epochs}),
        "learning_rate": target.learning_rate,
        "lr_scheduler_type": constant if target.schedule == "constant" else target.schedule,
        "weight_decay": target.weight_decay,
        "max_grad_norm": target.max_grad_norm or 0.0,
    }


def _renamed(settings: Mapping[str, Any], target: TargetConfig, names: Mapping[str, str]) -> dict[str, Any]:
    """Return TRL's `settings` under the `names` of another trainer, with the warm-up and no gradient accumulation.

    The warm-up is not among the common settings: TRL has one setting for steps and ratio, the other trainers have two.
    """
    warmup = {"warmup_ratio": target.warmup_ratio} if target.warmup_ratio else {"warmup_steps": target.warmup_steps}
    renamed = {names.get(name, name): value for name, value in settings.items()}
    return renamed | warmup | {"gradient_accumulation_steps": 1}


def _trl(folder: Path, target: TargetConfig, model: str, examples: Sequence[Example]) -> None:
    several = any(len(_trained(example)) > 1 for example in examples)
    # in a row with several trained replies, TRL finds them by the {% generation %} marks of the chat template
    if is_chat(target.template) and several and not _has_context_replies(examples):
        rows, loss = _messages(examples, by_reply=False), {"assistant_only_loss": True}
    else:
        rows, loss = _replies(examples, target.template), {"completion_only_loss": True}
    layers = target.lora.targets
    config = _common(target, model) | {
        "use_peft": True,
        "lora_target_modules": list(layers) if len(layers) > 1 else layers[0],
        "warmup_steps": target.warmup_steps or target.warmup_ratio,
        "report_to": "none",
    }
    if own := _own_template(folder, target):
        config["chat_template_path"] = own
    pairs = _pairs_for_trl(examples, target.template)
    for kind, file, rows_of, more in (("sft", "train.jsonl", rows, loss), ("dpo", "pairs.jsonl", pairs, {})):
        if _write_rows(folder / file, rows_of):
            data = {"datasets": [{"path": "json", "data_files": file, "split": "train"}]}
            run = f"cd {folder.name} && trl {kind} --config {kind}.yaml"
            _write_yaml(folder / f"{kind}.yaml", run, config | data | more)


def _own_template(folder: Path, target: TargetConfig) -> str | None:
    """Copy the user's chat template into the folder and return the copy's name; None if the template is not a file."""
    if not is_file(target.template):
        return None
    (folder / "template.jinja").write_text(file_text(target.template), encoding="utf-8")
    return "template.jinja"


def _llama_factory(folder: Path, target: TargetConfig, model: str, examples: Sequence[Example]) -> None:
    by_reply = _has_context_replies(examples)
    _write_rows(folder / "train.jsonl", _messages(examples, by_reply=by_reply))
    tags = {"role_tag": "role", "content_tag": "content"}
    tags |= {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
    entry = {"file_name": "train.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    info: dict[str, Any] = {"gradsift": entry}
    layers = target.lora.targets
    config = _renamed(_common(target, model), target, {"lora_r": "lora_rank", "max_length": "cutoff_len"})
    if "num_train_epochs" in config:
        config["num_train_epochs"] = float(config["num_train_epochs"])  # the type in LLaMA-Factory's own examples
    config |= {
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "all" if layers == ["all-linear"] else ",".join(layers),
        "dataset_dir": ".",
        "report_to": "none",
    }
    run = f"cd {folder.name} && llamafactory-cli train"
    if not is_chat(target.template):  # else the tokenizer's chat template is used
        config["template"] = "alpaca"
    elif is_file(target.template):
        run = f"the tokenizer's own chat template, not {target.template}, is used here: {run}"
    sft = {"stage": "sft", "dataset": "gradsift"} | ({"mask_history": True} if by_reply else {})
    _write_yaml(folder / "sft.yaml", f"{run} sft.yaml", config | sft)
    if _write_rows(folder / "pairs.jsonl", _pairs(examples)):
        columns = {name: name for name in ("messages", "chosen", "rejected")}
        pairs = {"file_name": "pairs.jsonl", "formatting": "sharegpt", "ranking": True}
        info["gradsift_pairs"] = pairs | {"columns": columns, "tags": tags}
        _write_yaml(folder / "dpo.yaml", f"{run} dpo.yaml", config | {"stage": "dpo", "dataset": "gradsift_pairs"})
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


_AXOLOTL_NAMES = {
    "model_name_or_path": "base_model",
    "model_revision": "revision_of_model",
    "use_rslora": "peft_use_rslora",
    "max_length": "sequence_len",
    "per_device_train_batch_size": "micro_batch_size",
    "num_train_epochs": "num_epochs",
    "lr_scheduler_type": "lr_scheduler",
}


def _axolotl(folder: Path, target: TargetConfig, model: str, examples: Sequence[Example]) -> None:
    source: dict[str, Any] = {"path": "train.jsonl", "ds_type": "json", "split": "train"}
    layers = target.lora.targets
    config = _renamed(_common(target, model), target, _AXOLOTL_NAMES)
    config |= {"adapter": "lora", "val_set_size": 0, "optimizer": "adamw_torch"}
    config |= {"lora_target_linear": True} if layers == ["all-linear"] else {"lora_target_modules": list(layers)}
    if is_chat(target.template):
        config["chat_template"] = "tokenizer_default"
        if own := _own_template(folder, target):
            config |= {"chat_template": "jinja", "chat_template_jinja": own}
        source |= {"type": "chat_template", "field_messages": "messages", "roles_to_train": ["assistant"]}
        source |= {"train_on_eos": "turn"}
        marks = _has_context_replies(examples)
        source |= {"message_field_training": "train"} if marks else {}
        rows = _messages(examples, by_reply=False, marks=marks)
    else:
        whole = {"format": "{instruction}", "no_input_format": "{instruction}", "system_prompt": ""}
        source |= {"type": {"field_instruction": "prompt", "field_output": "completion", **whole}}
        rows = _replies(examples, target.template)
    _write_rows(folder / "train.jsonl", rows)
    run = f"cd {folder.name} && axolotl train"
    _write_yaml(folder / "sft.yaml", f"{run} sft.yaml", config | {"datasets": [source]})
    if _write_rows(folder / "pairs.jsonl", _pairs(examples)):
        pairs = {"path": "pairs.jsonl", "ds_type": "json", "split": "train", "type": "chat_template.default"}
        _write_yaml(folder / "dpo.yaml", f"{run} dpo.yaml", config | {"rl": "dpo", "datasets": [pairs]})


_FORMATS: Mapping[str, Callable[[Path, TargetConfig, str, Sequence[Example]], None]] = {
    "trl": _trl,
    "llama_factory": _llama_factory,
    "axolotl": _axolotl,
}


def _write_yaml(path: Path, command: str, config: Mapping[str, Any]) -> None:
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    path.write_text(f"# {command}\n{text}", encoding="utf-8")


def _write_rows(path: Path, rows: Iterable[Row]) -> int:
    """Write rows as JSON lines, and return the number of rows; if there are no rows, no file is left."""
    number = 0
    with path.open("w", encoding="ascii") as stream:
        for number, row in enumerate(rows, start=1):  # noqa: B007 - the count
            stream.write(json.dumps(row, allow_nan=False) + "\n")
    if not number:
        path.unlink()
    return number
