"""The numerical settings that a model computes with, and how a loaded model is given them.

    precision     dtype of weights and products: float32 or bfloat16
    quantization  format of frozen linear layers, if they are quantised: nf4 or int8
    products      tf32 if float32 products are rounded to TF32 (compute.precision=auto on CUDA)
    residual      dtype of the residual stream between blocks: float32 or bfloat16 (`gradsift.training.residual`)
    attention     transformers' name of the attention implementation
    kernels       version of the compiled CPU kernels that the model uses, or off (`gradsift.cpu`)

Results of different numerics must not be mixed in one ensemble: the variance of the gradient norms over its members
(V_t in GRADFILTERING) would then include the difference between the numerics. So these values are part of the identity
of a model and of everything that is computed from it.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from gradsift.config import ComputeConfig, ModelConfig
from gradsift.training.device import device_of, has_bfloat16
from gradsift.training.residual import residual_in_float32, residual_precision


def dtype_of(compute: ComputeConfig, model: ModelConfig | None = None) -> torch.dtype:
    """Return the dtype in which a model is loaded.

    It is `model.dtype` or, if `model` is None or its dtype is auto, `compute.precision`. `compute.precision=auto` is
    bfloat16 on a GPU that has bfloat16 products, else float32.
    """
    precision = compute.precision if model is None or model.dtype == "auto" else model.dtype
    if precision == "auto":
        return torch.bfloat16 if device_of(compute).type == "cuda" and has_bfloat16() else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def rounds_to_tf32(compute: ComputeConfig) -> bool:
    """Return whether float32 products may be rounded to TF32: True with compute.precision=auto on a GPU."""
    return compute.precision == "auto" and device_of(compute).type == "cuda"


def set_kernels(compute: ComputeConfig) -> None:
    """Set whether torch rounds float32 products to TF32 and uses deterministic kernels only, in this process."""
    torch.set_float32_matmul_precision("high" if rounds_to_tf32(compute) else "highest")
    if compute.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a process first uses cuBLAS
        torch.use_deterministic_algorithms(True)


def prepare(model: Any, compute: ComputeConfig) -> None:
    """Set up residual stream, activation, attention and CPU kernels of a model that was just loaded.

    Args:
        model: a frozen causal language model of transformers, without adapters.
    """
    residual_in_float32(model)
    _fuse_gelu(model)
    if device_of(compute).type != "cpu":
        return
    model.set_attn_implementation("eager")  # the backward pass of torch's fused attention is slow on a CPU
    packs = compute.strategy != "fsdp" and not is_quantized(model)  # packed weights cannot be divided over ranks
    if compute.kernels == "auto" and packs:
        from gradsift.cpu import accelerate

        accelerate(model)


def numerics_of(model: Any) -> dict[str, str]:
    """Return the numerics of a prepared model, read from the model itself."""
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return {
        "precision": str(model.dtype).removeprefix("torch."),
        **({"quantization": model.quantization} if is_quantized(model) else {}),
        **({"products": "tf32"} if tf32 else {}),
        "residual": residual_precision(model),
        "attention": str(model.config._attn_implementation),
        "kernels": getattr(model, "kernels_version", "off"),
    }


def expected_numerics(config: Any, compute: ComputeConfig, model_config: ModelConfig) -> dict[str, str]:
    """Return the numerics that a model will have on this machine, without loading its weights.

    The model is built on torch's meta device and prepared like a loaded one.

    Args:
        config: transformers' config of the model.
        model_config: gradsift's config of the model.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype_of(compute, model_config), trust_remote_code=model_config.trust_remote_code
        )
    if model_config.quantization != "none":
        model.quantization = model_config.quantization
    prepare(model.requires_grad_(False), compute)
    return numerics_of(model)


def is_quantized(model: Any) -> bool:
    """Return whether frozen layers of a model are quantised (`gradsift.training.quantized`)."""
    return "quantization" in vars(model)


def _fuse_gelu(model: Any) -> None:
    """Make torch compute GPT-2's tanh GELU in one kernel; transformers passes over the widest tensor eight times."""
    from transformers.activations import GELUTanh, NewGELUActivation

    for module in model.modules():
        if isinstance(getattr(module, "act", None), NewGELUActivation):
            module.act = GELUTanh()
