"""The built-in backbones: nano models of the embedded world, and a byte-level model with random weights.

The embedded world is the generated task of `data=verifiable` (`gradsift.data.verifiable`). With the byte-level model
(tiny_bytes), real data can pass through all stages without a pretrained model, but the resulting scores say nothing
about the data.

Shape letters: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
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

CONTEXT = 128  # tokens of a nano model; the longest example of the embedded world has about 25
BYTES_CONTEXT = 1024  # tokens, that is bytes
_PAD, _EOS, _UNK, _NEWLINE = "<pad>", "<eos>", "<unk>", "\n"
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def nano_tokenizer() -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer of the embedded world: one token per word, and one for a line break.

    `<eos>` is also the beginning-of-text token (bos), which some models need. `<pad>` is a separate token, so that
    padding is never mistaken for the end of an answer.
    """
    words = (_PAD, _EOS, _UNK, _NEWLINE, *VOCABULARY)
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=_UNK))
    tokenizer.pre_tokenizer = Sequence([Split(Regex(r"\n"), "isolated"), Split(Regex(r"[^\S\n]+"), "removed")])
    return _fast(tokenizer, CONTEXT, bos_token=_EOS, unk_token=_UNK)


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each UTF-8 byte, and the two special tokens `<eos>` and `<pad>`."""
    alphabet = sorted(ByteLevel.alphabet())  # 256 printable characters, one for each byte
    tokenizer = Tokenizer(BPE({character: index for index, character in enumerate(alphabet)}, merges=[]))
    # without merges no token depends on the splitting into words, and skipping it halves the time
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer, BYTES_CONTEXT)


def _fast(tokenizer: Tokenizer, context: int, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_EOS,
        **special,
        model_max_length=context,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def nano_config(architecture: str) -> GPT2Config | LlamaConfig:
    """Return the config of a model with about 0.17 M parameters for the vocabulary of `nano_tokenizer`.

    Args:
        architecture: `gpt2` or `llama`.
    """
    shared: dict[str, Any] = _ids_of(nano_tokenizer()) | {
        "initializer_range": 0.1,  # at this width the usual 0.02 wastes most of the short training
        "tie_word_embeddings": True,
    }
    if architecture == "gpt2":
        return GPT2Config(n_positions=CONTEXT, n_embd=64, n_layer=3, n_head=4, **_NO_DROPOUT, **shared)
    return LlamaConfig(
        hidden_size=64,
        intermediate_size=160,  # both models have about the same size: Llama's MLP has three matrices, GPT-2's two
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        **shared,
    )


def bytes_config() -> GPT2Config:
    """Return the config of a GPT-2 with about a million parameters for the vocabulary of `bytes_tokenizer`."""
    return GPT2Config(
        n_positions=BYTES_CONTEXT,
        n_embd=128,
        n_layer=4,
        n_head=4,
        activation_function="gelu_pytorch_tanh",  # GPT-2's function in one kernel: a sixth less time per step
        **_NO_DROPOUT,
        **_ids_of(bytes_tokenizer()),
    )


def _ids_of(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": -(-len(tokenizer) // 64) * 64,  # matrix products are faster with a multiple of 64
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,
    }


def nano_model(architecture: str, *, seed: int = 0) -> PreTrainedModel:
    """Return an untrained model with the config `nano_config` and random weights drawn with `seed`."""
    return _drawn(nano_config(architecture), seed)


def bytes_model(*, seed: int = 0) -> PreTrainedModel:
    """Return an untrained model with the config `bytes_config` and random weights drawn with `seed`."""
    return _drawn(bytes_config(), seed)


def _drawn(config: GPT2Config | LlamaConfig, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config) if isinstance(config, GPT2Config) else LlamaForCausalLM(config)


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
    progress: Callable[[float], None] = lambda loss: None,
) -> float:
    """Train all weights of a nano model, in place, on the embedded world's pretraining text.

    No row is used in more than one step. The optimiser is AdamW without weight decay. The learning rate warms up over a
    twentieth of the steps and falls linearly to a tenth of its peak. The loss is a weighted mean of the tokens'
    negative log-likelihoods: response tokens and the eos have weight 1, prompt tokens have weight `prompt_loss_weight`.
    The same arguments and number of threads give the same model weights.

    Args:
        instructed_share: share of the rows that are worded like the rows of `data=verifiable`.
        progress: called after every step with the loss of the batch.

    Returns:
        The mean loss over the last tenth of the steps, in nats per token.
    """
    rows = pretraining_rows(steps * batch_size, seed=seed, instructed_share=instructed_share)
    prompts = tokenizer([prompt for prompt, _ in rows], add_special_tokens=False)["input_ids"]
    responses = tokenizer([response for _, response in rows], add_special_tokens=False)["input_ids"]
    encoded = [(ids, [*response, tokenizer.eos_token_id]) for ids, response in zip(prompts, responses, strict=True)]
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
        progress(losses[-1])
    model.eval()
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def _pad(batch: list[tuple[list[int], list[int]]], prompt_loss_weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids (B, T), padded on the right, and their loss weights (B, T), 0 for padding.

    Causal attention needs no mask for padding on the right. The eos token is used for padding, because transformers
    would warn about pad tokens without a mask.
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
