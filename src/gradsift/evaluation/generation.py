"""Greedy answers of a model to prompts, and files of answers in alpaca_eval's `model_outputs` format."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NotRequired, TypedDict, cast

from gradsift import outside_json
from gradsift.cost import passed
from gradsift.data.examples import Turn
from gradsift.errors import ConfigError, DataError
from gradsift.evaluation.benchmarks import Item
from gradsift.evaluation.judges import two_turns, with_input

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from gradsift.journal import Journal

OUTPUTS_FILE = "model_outputs.json"
_REQUIRED = ("instruction", "output", "generator", "dataset", "datasplit", "item_id", "input")
_SHARED = ("instruction", "input", "reference", "after")  # keys with equal values in two models' answers


class Question(NamedTuple):
    """An item and the earlier turns of its conversation."""

    item: Item
    history: Sequence[Turn] = ()


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    max_tokens: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
    journal: Journal | None = None,
) -> list[str]:
    """Return greedy continuations of tokenised prompts, in the order of the prompts.

    Batches are padded on the left. If a prompt and `max_new_tokens` together exceed the model's context, the prompt
    loses its first tokens. An answer ends before the first end token; special tokens and surrounding white space are
    removed. If there are several ranks, each rank generates a part of the answers, and all ranks return all answers.

    Args:
        model: a causal LM on its device, with or without LoRA adapters; its training mode is restored afterwards.
        prompts: N lists of token ids.
        batch_size: the largest number of prompts per batch; answers do not depend on it.
        max_tokens: the largest number of tokens per batch, including padding and the tokens of the answers.
        progress: called after each batch with its number of answers.
        journal: stores each batch's answers; stored answers are not generated again.

    Raises:
        ConfigError: `max_new_tokens` leaves no room for a prompt in the model's context.
        DataError: a prompt has no token.
    """
    from gradsift.data.batching import capped_batches
    from gradsift.journal import Journal
    from gradsift.training import parallel
    from gradsift.training.lora import evaluating

    room = room_of(model.config, max_new_tokens)
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise DataError(f"prompt {number} of {len(prompts)} has no token; give each prompt at least one")
    # LoRA layers are modules of the base model, so its generate() applies them
    backbone: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    greedy = _greedy(model, tokenizer, max_new_tokens)
    cut = [prompt if room is None else prompt[-room:] for prompt in prompts]

    def answer(rows: list[int]) -> list[str]:
        return _continuations(backbone, tokenizer, [cut[n] for n in rows], greedy)

    # the batch with the longest prompts comes first, so that a lack of memory shows at once
    lengths = [len(prompt) + max_new_tokens for prompt in cut]
    answers: dict[int, str] = {}
    kept = journal or Journal()
    with evaluating(model), ExitStack() as stack:
        # generate() takes options that `greedy` leaves unset, such as a repetition penalty, from the model's own config
        stack.callback(setattr, backbone, "generation_config", backbone.generation_config)
        backbone.generation_config = greedy
        for batches in parallel.rounds(capped_batches(lengths, batch_size, max_tokens)):
            rows = list(chain.from_iterable(batches))
            texts = kept.once(rows, functools.partial(parallel.together, batches, answer))
            answers |= zip(rows, texts, strict=True)
            progress(len(rows))
    return [answers[n] for n in range(len(prompts))]


def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    """Return options for greedy decoding up to an end token of the tokenizer or of the model's configuration."""
    from transformers import GenerationConfig

    named = getattr(model.generation_config, "eos_token_id", None)  # chat models may have several
    ends = sorted({*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id} - {None})
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=next((token for token in (tokenizer.pad_token_id, *ends) if token is not None), 0),
        bos_token_id=tokenizer.bos_token_id,
    )


def _continuations(
    backbone: Any, tokenizer: PreTrainedTokenizerBase, batch: Sequence[Sequence[int]], greedy: GenerationConfig
) -> list[str]:
    import torch

    from gradsift.training.device import without_host_reads

    tokens, mask = left_padded(batch, greedy.pad_token_id, backbone.device)
    with torch.no_grad(), without_host_reads():
        out = backbone.generate(input_ids=tokens, attention_mask=mask, generation_config=greedy)
    ends = greedy.eos_token_id or []
    texts = []
    for prompt, new in zip(batch, out[:, tokens.shape[1] :].cpu().tolist(), strict=True):
        end = next((place for place, token in enumerate(new) if token in ends), len(new))
        passed(len(prompt) + min(end, len(new) - 1))  # the last token of an answer is not passed through the model
        texts.append(tokenizer.decode(new[:end], skip_special_tokens=True).strip())
    return texts


def room_of(config: Any, max_new_tokens: int) -> int | None:
    """Return how many tokens of the model's context `max_new_tokens` leaves for a prompt.

    The result is None if the model's configuration has no context length.
    """
    context = getattr(config, "max_position_embeddings", None)
    if not isinstance(context, int):
        return None
    if max_new_tokens >= context:
        raise ConfigError(
            f"benchmark.max_new_tokens={max_new_tokens} leaves no room for a prompt in the model's context "
            f"of {context} tokens; give at most {context - 1}"
        )
    return context - max_new_tokens


def left_padded(
    batch: Sequence[Sequence[int]], pad: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad sequences on the left with `pad`; return the token ids and the attention mask, (B, T) int64 each."""
    import torch

    width = max(len(row) for row in batch)
    tokens = torch.tensor([[pad] * (width - len(row)) + list(row) for row in batch], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=device)
    return tokens, mask


class ModelOutput(TypedDict):
    """One answer. The first five keys are those of alpaca_eval, with the benchmark's name as `dataset`."""

    instruction: str
    output: str
    generator: str
    dataset: str
    datasplit: str
    item_id: str
    input: str
    reference: str | None
    after: NotRequired[str]  # only for a second turn of a conversation: the dataset of the first turn


def model_outputs(items: Sequence[Item], answers: Sequence[str], generator: str) -> list[ModelOutput]:
    """Return one row per item, with the answer of the model named `generator`."""
    rows = []
    for item, answer in zip(items, answers, strict=True):
        row = ModelOutput(
            instruction=item.instruction,
            output=answer,
            generator=generator,
            dataset=item.benchmark,
            datasplit="eval",
            item_id=item.item_id,
            input=item.input,
            reference=item.reference,
        )
        if item.after is not None:
            row["after"] = item.after
        rows.append(row)
    return rows


def write_model_outputs(path: Path, rows: Sequence[ModelOutput]) -> None:
    """Write `rows` as a JSON list."""
    # ASCII escapes: texts from the web can contain lone surrogates, which UTF-8 cannot encode
    path.write_text(json.dumps(list(rows), indent=1) + "\n", encoding="ascii")


def read_model_outputs(path: Path) -> list[ModelOutput]:
    """Read a `model_outputs.json`. A row without an id, as in alpaca_eval's own files, gets its row number as id.

    Raises:
        DataError: the file is missing or invalid, two rows have the same id, or a second turn lacks its first turn.
    """
    try:
        loaded = outside_json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); generate the answers first") from error
    except ValueError as error:  # broken JSON or broken UTF-8
        raise DataError(f"{path} is not valid JSON ({error}); generate the answers again") from error
    if not isinstance(loaded, list) or not loaded:
        raise DataError(f"{path} is not a list of answers; give a file in alpaca_eval's model_outputs format")
    rows: dict[tuple[str, str], ModelOutput] = {}
    for number, content in enumerate(loaded, start=1):
        row = _read_row(content, number, path)
        if item_key(row) in rows:
            raise DataError(f"{path}, row {number}: an earlier row has the same item {'/'.join(item_key(row))}")
        rows[item_key(row)] = row
    for row in rows.values():
        if "after" not in row:
            continue
        first = rows.get((row["after"], row["item_id"]))
        if first is None or "after" in first:
            missing = f"{row['after']}/{row['item_id']}"
            raise DataError(f"{path}: {'/'.join(item_key(row))} is a second turn, but {missing} is not its first turn")
    return list(rows.values())


def _read_row(content: Any, number: int, path: Path) -> ModelOutput:
    if not isinstance(content, dict):
        raise DataError(f"{path}, row {number} is of type {type(content).__name__}, not a JSON object")
    row = {"generator": path.stem, "dataset": "unnamed", "datasplit": "eval", "item_id": number, "input": ""} | content
    if type(row["item_id"]) is int:
        row["item_id"] = str(row["item_id"])
    optional = [name for name in ("reference", "after") if row.get(name) is not None]
    for name in (*_REQUIRED, *optional):
        if not isinstance(row.get(name), str):
            raise DataError(f"{path}, row {number}: {name} is missing or is not text")
    read = {name: row[name] for name in _REQUIRED} | {"reference": None} | {name: row[name] for name in optional}
    return cast(ModelOutput, read)


def item_key(row: ModelOutput) -> tuple[str, str]:
    """Return the benchmark and the item's id, which together identify an item in the files of all models."""
    return row["dataset"], row["item_id"]


def first_turns(rows: Sequence[ModelOutput]) -> dict[tuple[str, str], ModelOutput]:
    """Return a dict from the item key of each second turn to the row of its first turn."""
    by_key = {item_key(row): row for row in rows}
    return {key: by_key[row["after"], row["item_id"]] for key, row in by_key.items() if "after" in row}


def without_turns(rows: Sequence[ModelOutput]) -> list[ModelOutput]:
    """Return `rows`; a second turn's row gets both turns' questions as instruction, and both answers as output."""
    first = first_turns(rows)
    single: list[ModelOutput] = []
    for row in rows:
        if before := first.get(item_key(row)):
            instruction = two_turns(*(with_input(turn["instruction"], turn["input"]) for turn in (before, row)))
            row = {**row, "instruction": instruction, "input": "", "output": two_turns(before["output"], row["output"])}
        single.append(row)
    return single


def check_pairs(rows: Sequence[ModelOutput], reference_rows: Sequence[ModelOutput]) -> None:
    """Raise DataError unless two models answered the same items, with equal instructions, inputs and references."""
    of_model, of_reference = ({item_key(row): row for row in each} for each in (rows, reference_rows))
    problems = [f"{'/'.join(key)} (only in the model's answers)" for key in of_model if key not in of_reference]
    problems += [
        f"{'/'.join(key)} (only in the reference model's answers)" for key in of_reference if key not in of_model
    ]
    for key in of_model.keys() & of_reference.keys():
        mine, other = dict(of_model[key]), dict(of_reference[key])
        if differing := [part for part in _SHARED if mine.get(part) != other.get(part)]:
            problems.append(f"{'/'.join(key)} (different {', '.join(differing)})")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise DataError(
            f"the two models did not answer the same items: {'; '.join(sorted(problems)[:5])}{more}; generate both "
            "models' answers with the same benchmark options"
        )


def read_pair(path: Path, reference_path: Path) -> tuple[list[ModelOutput], list[ModelOutput]]:
    """Read the answers of two models to the same items (see `check_pairs`)."""
    rows, reference_rows = read_model_outputs(path), read_model_outputs(reference_path)
    try:
        check_pairs(rows, reference_rows)
    except DataError as error:
        raise DataError(f"{path} and {reference_path}: {error}") from error
    return rows, reference_rows
