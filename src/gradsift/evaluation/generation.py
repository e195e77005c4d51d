"""A model's answers to benchmark items, and their file in alpaca_eval's `model_outputs` format."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NotRequired, TypedDict

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
_SHARED = ("instruction", "input", "reference", "after")  # these must be equal in two models' answers


class Question(NamedTuple):
    """An item, and the turns of the conversation before it."""

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

    Padding is on the left and masked by its position, not by its id, which may be the end token's. A prompt that leaves
    no room for `max_new_tokens` in the model's context is cut on its left. An answer ends before the first end token;
    special tokens and surrounding white space are removed. Each rank answers a part and returns all answers.

    Args:
        model: a causal LM on its device, with or without LoRA adapters; its training mode is restored.
        prompts: N lists of token ids.
        batch_size: prompts per batch at most; answers do not depend on it.
        max_tokens: tokens per batch at most, including padding and the tokens of the answers.
        progress: called after each batch with the number of new answers.
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
            raise DataError(f"prompt {number} of {len(prompts)} has no token; a model needs at least one")
    # LoRA layers, if any, are inside the backbone, so its own generate() includes them
    backbone: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    greedy = _greedy(model, tokenizer, max_new_tokens)
    cut = [prompt if room is None else prompt[-room:] for prompt in prompts]

    def answer(rows: list[int]) -> list[str]:
        return _continuations(backbone, tokenizer, [cut[n] for n in rows], greedy)

    # the longest prompts come first: a batch that does not fit into memory fails at once
    lengths = [len(prompt) + max_new_tokens for prompt in cut]
    answers: dict[int, str] = {}
    kept = journal or Journal()
    with evaluating(model), ExitStack() as stack:
        # generate() takes unset options, such as a repetition penalty, from the model's own config
        stack.callback(setattr, backbone, "generation_config", backbone.generation_config)
        backbone.generation_config = greedy
        for batches in parallel.rounds(capped_batches(lengths, batch_size, max_tokens)):
            rows = list(chain.from_iterable(batches))
            texts = kept.once(rows, functools.partial(parallel.together, batches, answer))
            answers |= zip(rows, texts, strict=True)
            progress(len(rows))
    return [answers[n] for n in range(len(prompts))]


def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    """Return greedy decoding until an end token of the tokenizer or of the model's configuration."""
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
        passed(len(prompt) + min(end, len(new) - 1))  # an answer's last token is not fed back
        texts.append(tokenizer.decode(new[:end], skip_special_tokens=True).strip())
    return texts


def room_of(config: Any, max_new_tokens: int) -> int | None:
    """Return the largest number of tokens that a prompt may have; None if the model's configuration names no limit."""
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
    """Return token ids and attention mask, (B, T) int64, of sequences padded on the left with `pad`."""
    import torch

    width = max(len(row) for row in batch)
    tokens = torch.tensor([[pad] * (width - len(row)) + list(row) for row in batch], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=device)
    return tokens, mask


class ModelOutput(TypedDict):
    """One answer. The keys up to `datasplit` are alpaca_eval's (`dataset` is the benchmark), the other keys our own."""

    instruction: str
    output: str
    generator: str
    dataset: str
    datasplit: str
    item_id: str
    input: str
    reference: str | None
    after: NotRequired[str]  # for the second turn of a conversation: dataset of the first turn


def model_outputs(items: Sequence[Item], answers: Sequence[str], generator: str) -> list[ModelOutput]:
    """Return the answers of `generator`, one row per item."""
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
    # ASCII escapes: text from the web may hold half a surrogate pair, which UTF-8 cannot encode
    path.write_text(json.dumps(list(rows), indent=1) + "\n", encoding="ascii")


def read_model_outputs(path: Path) -> list[ModelOutput]:
    """Read a `model_outputs.json`. A row without an id, as in alpaca_eval's own files, gets the row number as its id.

    Raises:
        DataError: the file is missing or broken, an id is there twice, or a second turn lacks its first turn.
    """
    try:
        loaded = outside_json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); generate the answers first") from error
    except ValueError as error:  # broken JSON or broken UTF-8
        raise DataError(f"{path} is not whole JSON ({error}); generate the answers again") from error
    if not isinstance(loaded, list) or not loaded:
        raise DataError(f"{path} holds no list of answers; it must be in alpaca_eval's model_outputs shape")
    rows: dict[tuple[str, str], ModelOutput] = {}
    for number, content in enumerate(loaded, start=1):
        row = _read_row(content, number, path)
        if item_key(row) in rows:
            raise DataError(f"{path}, row {number}: item {'/'.join(item_key(row))} is there twice")
        rows[item_key(row)] = row
    for row in rows.values():
        if "after" in row and "after" in rows.get((row["after"], row["item_id"]), {"after": None}):
            before = f"{row['after']}/{row['item_id']}"
            raise DataError(f"{path}: {'/'.join(item_key(row))} needs {before} as the first turn before it")
    return list(rows.values())


def _read_row(row: Any, number: int, path: Path) -> ModelOutput:
    if not isinstance(row, dict):
        raise DataError(f"{path}, row {number} is of type {type(row).__name__}, not an object")

    def text(name: str, default: str | None = None) -> str:
        value = row.get(name, default)
        if not isinstance(value, str):
            raise DataError(f"{path}, row {number}: {name} is missing or is not text")
        return value

    item_id = row.get("item_id", number)
    read = ModelOutput(
        instruction=text("instruction"),
        output=text("output"),
        generator=text("generator", path.stem),
        dataset=text("dataset", "unnamed"),
        datasplit=text("datasplit", "eval"),
        item_id=str(item_id) if type(item_id) is int else text("item_id"),
        input=text("input", ""),
        reference=None if row.get("reference") is None else text("reference"),
    )
    if row.get("after") is not None:
        read["after"] = text("after")
    return read


def item_key(row: ModelOutput) -> tuple[str, str]:
    """Return benchmark and id, which identify an item across files."""
    return row["dataset"], row["item_id"]


def first_turns(rows: Sequence[ModelOutput]) -> dict[tuple[str, str], ModelOutput]:
    """Return the first turn's row of each conversation, by the key of its second turn."""
    by_key = {item_key(row): row for row in rows}
    return {key: by_key[row["after"], row["item_id"]] for key, row in by_key.items() if "after" in row}


def without_turns(rows: Sequence[ModelOutput]) -> list[ModelOutput]:
    """Return the rows; in the row of a second turn, instruction and output hold both turns of the conversation."""
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
    problems = [f"{'/'.join(key)} (only in the model's)" for key in of_model if key not in of_reference]
    problems += [f"{'/'.join(key)} (only in the reference model's)" for key in of_reference if key not in of_model]
    for key in of_model.keys() & of_reference.keys():
        mine, other = dict(of_model[key]), dict(of_reference[key])
        if differing := [part for part in _SHARED if mine.get(part) != other.get(part)]:
            problems.append(f"{'/'.join(key)} (other {', '.join(differing)})")
    if len(of_model) < len(rows) or len(of_reference) < len(reference_rows):
        problems.append("an item that is there twice")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise DataError(
            f"the two models' answers are not to the same items: {'; '.join(sorted(problems)[:5])}{more}; "
            "generate both with the same benchmark options"
        )


def read_pair(path: Path, reference_path: Path) -> tuple[list[ModelOutput], list[ModelOutput]]:
    """Read the answers of two models to the same items (see `check_pairs`)."""
    rows, reference_rows = read_model_outputs(path), read_model_outputs(reference_path)
    try:
        check_pairs(rows, reference_rows)
    except DataError as error:
        raise DataError(f"{path} and {reference_path}: {error}") from error
    return rows, reference_rows
