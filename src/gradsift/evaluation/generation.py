"""Answers of a model to benchmark items, and their file in alpaca_eval's `model_outputs` shape."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from gradsift import outside_json
from gradsift.cost import passed
from gradsift.errors import ConfigError, DataError
from gradsift.evaluation.benchmarks import Item

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gradsift.journal import Journal


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
    journal: Journal | None = None,
) -> list[str]:
    """Greedy continuations of tokenised prompts, in the order given.

    Prompts are sorted by length, padded on the left and masked by attention mask, never by the pad
    id, so tokenizers whose pad and end tokens are one work. A prompt that leaves no room for
    `max_new_tokens` in the model's context loses tokens on its left. An answer ends before the
    first end token; special tokens and surrounding white space are removed.

    Args:
        model: a causal LM on its device, with or without LoRA adapters; its mode is restored.
        prompts: N lists of token ids, as the model is to see them.
        max_new_tokens: tokens an answer may have.
        batch_size: prompts a batch; answers do not depend on it.
        progress: called after each batch with the number of new answers.
        journal: keeps the answers batch by batch.

    Raises:
        ConfigError: `max_new_tokens` leaves no room for a prompt in the model's context.
        DataError: a prompt has no token.
    """
    from gradsift.journal import Journal
    from gradsift.training.lora import evaluating

    room, ends = _room(model, max_new_tokens), _end_tokens(model, tokenizer)
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise DataError(f"prompt {number} of {len(prompts)} has no token; a model needs at least one")
    # longest first: a batch that does not fit into memory shows at once
    order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))
    answers = [""] * len(prompts)
    kept = journal or Journal()
    with evaluating(model), _greedy(model, tokenizer, ends, max_new_tokens) as generate:

        def answer(rows: list[int]) -> list[str]:
            batch = [list(prompts[n] if room is None else prompts[n][-room:]) for n in rows]
            found = generate(batch)
            for prompt, tokens in zip(batch, found, strict=True):  # an answer's last token is not fed back
                passed(len(prompt) + min(_end(tokens, ends), len(tokens) - 1))
            return [_text(tokenizer, tokens, ends) for tokens in found]

        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            for n, text in zip(rows, kept.once(rows, functools.partial(answer, rows)), strict=True):
                answers[n] = text
            progress(len(rows))
    return answers


def _room(model: PreTrainedModel, max_new_tokens: int) -> int | None:
    """Tokens that a prompt may have; None where the model's config names no limit."""
    context = _context_length(model)
    if context is None:
        return None
    if max_new_tokens >= context:
        raise ConfigError(
            f"benchmark.max_new_tokens={max_new_tokens} leaves no room for a prompt in the model's context "
            f"of {context} tokens; give at most {context - 1}"
        )
    return context - max_new_tokens


def _end(tokens: list[int], ends: set[int]) -> int:
    """The place of the first end token; the number of tokens where there is none."""
    return next((place for place, token in enumerate(tokens) if token in ends), len(tokens))


def _text(tokenizer: PreTrainedTokenizerBase, tokens: list[int], ends: set[int]) -> str:
    """What stands before the first end token."""
    text: str = tokenizer.decode(tokens[: _end(tokens, ends)], skip_special_tokens=True).strip()
    return text


def _context_length(model: PreTrainedModel) -> int | None:
    """The number of positions the model knows; None where its config names none."""
    length = getattr(model.config, "max_position_embeddings", None)
    return length if isinstance(length, int) else None


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokenizer's end token, and those the model's makers name (chat models may have several)."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ends = set(named) if isinstance(named, list) else {named}
    return {token for token in (*ends, tokenizer.eos_token_id) if token is not None}


@contextmanager
def _greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: set[int], max_new_tokens: int
) -> Iterator[Callable[[list[list[int]]], list[list[int]]]]:
    """A function from a batch of prompts to their continuations (up to `max_new_tokens` ids each)."""
    import torch
    from transformers import GenerationConfig

    # LoRA layers sit inside the backbone, so its own generate() sees them
    backbone = model.get_base_model() if hasattr(model, "get_base_model") else model
    pad = next((t for t in (tokenizer.pad_token_id, *sorted(ends)) if t is not None), 0)
    plain = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        bos_token_id=tokenizer.bos_token_id,
    )

    def generate(batch: list[list[int]]) -> list[list[int]]:
        tokens, mask = left_padded(batch, pad, backbone.device)
        with torch.no_grad():
            out = backbone.generate(input_ids=tokens, attention_mask=mask, generation_config=plain)
        rows: list[list[int]] = out[:, tokens.shape[1] :].tolist()
        return rows

    # generate() fills what a config leaves open from the model's own one, which may hold a
    # repetition penalty (no longer greedy) or a temperature (a warning): put ours in its place
    own = backbone.generation_config
    backbone.generation_config = plain
    try:
        yield generate
    finally:
        backbone.generation_config = own


def left_padded(
    batch: Sequence[Sequence[int]], pad: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, (B, T) int64, of sequences that end in the last column."""
    import torch

    width = max(len(row) for row in batch)
    tokens = torch.tensor([[pad] * (width - len(row)) + list(row) for row in batch], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=device)
    return tokens, mask


# ------------------------------------------------------------------------------------- model_outputs

OUTPUTS_FILE = "model_outputs.json"


class ModelOutput(TypedDict):
    """One answer: alpaca_eval's keys (`dataset` is the benchmark's name), then ours."""

    instruction: str
    output: str
    generator: str
    dataset: str
    datasplit: str
    item_id: str
    input: str
    reference: str | None


def model_outputs(items: Sequence[Item], answers: Sequence[str], generator: str) -> list[ModelOutput]:
    """The answers of `generator`, one row an item, in the shape that alpaca_eval reads."""
    return [
        ModelOutput(
            instruction=item.instruction,
            output=answer,
            generator=generator,
            dataset=item.benchmark,
            datasplit="eval",
            item_id=item.item_id,
            input=item.input,
            reference=item.reference,
        )
        for item, answer in zip(items, answers, strict=True)
    ]


def write_model_outputs(path: Path, rows: Sequence[ModelOutput]) -> None:
    """Write `rows` as a JSON list."""
    # ASCII escapes: text from the web may hold half a surrogate pair, which UTF-8 cannot
    path.write_text(json.dumps(list(rows), indent=1) + "\n", encoding="ascii")


def read_model_outputs(path: Path) -> list[ModelOutput]:
    """Read a `model_outputs.json`, ours or alpaca_eval's (which has no ids: the row number serves).

    Raises:
        DataError: the file is missing or broken, a row lacks instruction or output, or two rows of
            a dataset have the same id.
    """
    try:
        loaded = outside_json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); generate the answers first") from error
    except ValueError as error:  # broken JSON or broken UTF-8
        raise DataError(f"{path} is not whole JSON ({error}); delete it and generate the answers again") from error
    if not isinstance(loaded, list) or not loaded:
        raise DataError(f"{path} holds no list of answers; it must be in alpaca_eval's model_outputs shape")
    rows = [_read_row(row, number, path) for number, row in enumerate(loaded, start=1)]
    seen: set[tuple[str, str]] = set()
    for number, row in enumerate(rows, start=1):
        if item_key(row) in seen:
            raise DataError(f"{path}, row {number}: item {'/'.join(item_key(row))} is there twice")
        seen.add(item_key(row))
    return rows


def _read_row(row: Any, number: int, path: Path) -> ModelOutput:
    if not isinstance(row, dict):
        raise DataError(f"{path}, row {number} is of type {type(row).__name__}, not an object")

    def text(name: str, default: str | None = None) -> str:
        value = row.get(name, default)
        if not isinstance(value, str):
            raise DataError(f"{path}, row {number}: {name} is missing or is not text")
        return value

    item_id = row.get("item_id", number)
    return ModelOutput(
        instruction=text("instruction"),
        output=text("output"),
        generator=text("generator", path.stem),
        dataset=text("dataset", "unnamed"),
        datasplit=text("datasplit", "eval"),
        item_id=str(item_id) if type(item_id) is int else text("item_id"),
        input=text("input", ""),
        reference=None if row.get("reference") is None else text("reference"),
    )


def item_key(row: ModelOutput) -> tuple[str, str]:
    """Benchmark and id: what identifies an item over files."""
    return row["dataset"], row["item_id"]


def check_pairs(rows: Sequence[ModelOutput], reference_rows: Sequence[ModelOutput]) -> None:
    """Refuse answers of two models that do not belong to the same items.

    The order of the rows does not matter; instruction, input and reference answer must agree.

    Raises:
        DataError: names up to five differing items and what differs.
    """
    ours = {item_key(row): row for row in rows}
    theirs = {item_key(row): row for row in reference_rows}
    problems = [f"{'/'.join(key)} (only in the model's)" for key in ours if key not in theirs]
    problems += [f"{'/'.join(key)} (only in the reference model's)" for key in theirs if key not in ours]
    for key in ours.keys() & theirs.keys():
        mine, other = dict(ours[key]), dict(theirs[key])
        differing = [part for part in ("instruction", "input", "reference") if mine[part] != other[part]]
        if differing:
            problems.append(f"{'/'.join(key)} (other {', '.join(differing)})")
    if len(ours) < len(rows) or len(theirs) < len(reference_rows):
        problems.append("an item that is there twice")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise DataError(
            f"the two models' answers are not to the same items: {'; '.join(sorted(problems)[:5])}{more}; "
            "generate both with the same benchmark options"
        )


def read_pair(path: Path, reference_path: Path) -> tuple[list[ModelOutput], list[ModelOutput]]:
    """Read the answers of two models to the same items, as `check_pairs` demands."""
    rows, reference_rows = read_model_outputs(path), read_model_outputs(reference_path)
    try:
        check_pairs(rows, reference_rows)
    except DataError as error:
        raise DataError(f"{path} and {reference_path}: {error}") from error
    return rows, reference_rows
