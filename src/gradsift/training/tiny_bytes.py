"""A byte-level GPT-2 with random weights, to run real data through all stages without a pretrained model.

It is meant for tests of memory and of the pipeline; its scores say nothing about the data.
"""

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

CONTEXT = 1024  # tokens, that is bytes
_PAD, _EOS = "<pad>", "<eos>"


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte of UTF-8, which can decode any text, and with `<eos>` and `<pad>`."""
    alphabet = sorted(ByteLevel.alphabet())  # 256 printable characters, one for each byte
    tokenizer = Tokenizer(BPE({character: index for index, character in enumerate(alphabet)}, merges=[]))
    # without merges, splitting into words changes no token, and skipping it halves the time
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_EOS,
        model_max_length=CONTEXT,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def bytes_model(*, seed: int = 0) -> GPT2LMHeadModel:
    """Return an untrained GPT-2 of about a million parameters, drawn with `seed`, without dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(bytes_config())


def bytes_config() -> GPT2Config:
    """Return the config of `bytes_model`."""
    tokenizer = bytes_tokenizer()
    return GPT2Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,  # a multiple of 64: matrix products are faster
        n_positions=CONTEXT,
        n_embd=128,
        n_layer=4,
        n_head=4,
        activation_function="gelu_pytorch_tanh",  # GPT-2's function in one kernel: a sixth less time per step
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
    )
