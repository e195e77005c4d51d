"""The built-in backbones: tiny language models of the embedded world, pretrained in about half a minute.

The embedded world is the generated task of `data=verifiable` (`gradsift.data.verifiable`).

Shape letters: B batch, T tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from gradsift.cost import passed
from gradsift.data.verifiable import VOCABULARY, pretraining_rows
from gradsift.errors import ConfigError

Architecture = Literal["gpt2", "llama"]

CONTEXT = 128  # tokens; the longest example of the embedded world has about 25
_PAD, _EOS, _UNK, _NEWLINE = "<pad>", "<eos>", "<unk>", "\n"


def nano_tokenizer() -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer of the embedded world: one token per word, and one for a line break.

    `<eos>` is also the beginning-of-text token (bos), which some models need. `<pad>` is a token of its own, so that
    padding is never taken for the end of an answer. Words outside the vocabulary become `<unk>`.
    """
    words = (_PAD, _EOS, _UNK, _NEWLINE, *VOCABULARY)
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=_UNK))
    tokenizer.pre_tokenizer = Sequence([Split(Regex(r"\n"), "isolated"), Split(Regex(r"[^\S\n]+"), "removed")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_EOS,
        bos_token=_EOS,
        unk_token=_UNK,
        model_max_length=CONTEXT,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def nano_model(architecture: Architecture, *, seed: int = 0) -> PreTrainedModel:
    """Return a randomly initialised model of about 0.17 M parameters for `nano_tokenizer`, without dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = nano_config(architecture)
        return GPT2LMHeadModel(config) if architecture == "gpt2" else LlamaForCausalLM(config)


def nano_config(architecture: Architecture) -> GPT2Config | LlamaConfig:
    """Return the config of `nano_model`."""
    tokenizer = nano_tokenizer()
    # rounded up to a multiple of 64, for which matrix products are faster
    shared: dict[str, Any] = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "initializer_range": 0.1,  # at this width the usual 0.02 wastes most of the short training
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    if architecture == "gpt2":
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        shape = {"n_positions": CONTEXT, "n_embd": 64, "n_layer": 3, "n_head": 4}
        return GPT2Config(**shape, **dropout, **shared)
    if architecture == "llama":
        return LlamaConfig(
            hidden_size=64,
            intermediate_size=160,  # both models have about the same size: Llama's MLP has three matrices, GPT-2's two
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            **shared,
        )
    raise ConfigError(f"architecture={architecture!r} is not built in; use 'gpt2' or 'llama'")


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int = 2400,
    batch_size: int = 32,
    learning_rate: float = 2.5e-3,
    prompt_loss_weight: float = 0.1,
    instructed_share: float = 0.006,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
) -> float:
    """Train all weights of a nano model, in place, on the embedded world's pretraining text.

    Every step has new rows. The learning rate (AdamW, no weight decay) warms up over a twentieth of the steps and falls
    linearly to a tenth of its peak. The loss is the weighted mean negative log-likelihood over tokens: response tokens
    and the eos have weight 1, prompt tokens `prompt_loss_weight`. The same arguments and number of threads give the
    same model weights.

    Args:
        progress: called after every step with step, steps and the loss of the batch.

    Returns:
        The mean loss over the last tenth of the steps, in nats a token.
    """
    rows = pretraining_rows(steps * batch_size, seed=seed, instructed_share=instructed_share)
    encoded = _encode(tokenizer, rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.1 + 0.9 * (steps - step) / max(1, steps - warmup))
    )
    model.train()
    losses = []
    for step in range(steps):
        batch = encoded[step * batch_size : (step + 1) * batch_size]
        tokens_BT, weights_BT = _pad(batch, prompt_loss_weight)
        logits_BTV = model(input_ids=tokens_BT).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten(), reduction="none")
        weights = weights_BT[:, 1:].flatten()
        loss = (nll * weights).sum() / weights.sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        passed(sum(len(prompt) + len(response) for prompt, response in batch))
        losses.append(loss.item())
        if progress is not None:
            progress(step + 1, steps, losses[-1])
    model.eval()
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def _encode(tokenizer: PreTrainedTokenizerFast, rows: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Return the token ids of each prompt, and of its response with the eos."""
    prompts = tokenizer([prompt for prompt, _ in rows], add_special_tokens=False)["input_ids"]
    responses = tokenizer([response for _, response in rows], add_special_tokens=False)["input_ids"]
    return [(prompt, [*response, tokenizer.eos_token_id]) for prompt, response in zip(prompts, responses, strict=True)]


def _pad(batch: list[tuple[list[int], list[int]]], prompt_loss_weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids (B, T), padded on the right, and their loss weights (B, T), 0 for padding.

    Causal attention never looks to the right, so no mask is needed. Rows are padded with the eos, because transformers
    warns of a pad token without a mask.
    """
    longest = max(len(prompt) + len(response) for prompt, response in batch)
    tokens_BT = torch.full((len(batch), longest), batch[0][1][-1])
    weights_BT = torch.zeros(len(batch), longest)
    for row, (prompt, response) in enumerate(batch):
        end = len(prompt) + len(response)
        tokens_BT[row, :end] = torch.tensor(prompt + response)
        weights_BT[row, : len(prompt)] = prompt_loss_weight
        weights_BT[row, len(prompt) : end] = 1.0
    return tokens_BT, weights_BT
