"""Short names of models: `proxy=NAME` and `target=NAME` stand for `hf` with the id below and the model's chat template.

Any other model of the hub, such as the base model of one of these, is given as `target=hf target.model=ID`, for example
with the id Qwen/Qwen3-0.6B-Base.
"""

from __future__ import annotations

from typing import Any

KNOWN_MODELS = {
    "qwen3_0.6b": "Qwen/Qwen3-0.6B",
    "qwen3_1.7b": "Qwen/Qwen3-1.7B",
    "qwen3_8b": "Qwen/Qwen3-8B",
    "llama3_1b": "meta-llama/Llama-3.2-1B-Instruct",  # gated, like all models of Meta and Google
    "llama3_8b": "meta-llama/Llama-3.1-8B-Instruct",
    "gemma3_270m": "google/gemma-3-270m-it",
    "gemma3_1b": "google/gemma-3-1b-it",
    "smollm3_3b": "HuggingFaceTB/SmolLM3-3B",
    "olmo2_1b": "allenai/OLMo-2-0425-1B-Instruct",
    "olmo2_7b": "allenai/OLMo-2-1124-7B-Instruct",
    "olmo3_7b": "allenai/Olmo-3-7B-Instruct",
    "mistral_7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "gpt_oss_20b": "openai/gpt-oss-20b",
}


def known_choices() -> dict[str, dict[str, Any]]:
    """Return, by short name, what a file `proxy/NAME.yaml` or `target/NAME.yaml` would contain."""
    return {
        name: {"defaults": ["hf", "_self_"], "name": name, "model": {"path": path}, "template": "chat"}
        for name, path in KNOWN_MODELS.items()
    }
