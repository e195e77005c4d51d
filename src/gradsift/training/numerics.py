"""How a model computes, besides its weights and inputs, and how a loaded model is set up for it.

    precision   of weights and products: float32 or bfloat16
    products    tf32 if float32 products are rounded to it (compute.precision=auto on CUDA)
    residual    of the residual stream between blocks: float32 or bfloat16 (`gradsift.training.residual`)
    attention   transformers' name of the implementation
    kernels     version of the compiled CPU kernels that the model uses, or off (`gradsift.cpu`)

Results of different numerics must not be mixed in one ensemble, because its variance V_t would measure the difference
of the numerics. So these values are part of a model's identity, and of everything that is computed from the model.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from gradsift.config import ComputeConfig
from gradsift.training.device import device_of, has_bfloat16
from gradsift.training.residual import residual_in_float32, residual_precision


def dtype_of(compute: ComputeConfig) -> torch.dtype:
    """Return the precision in which models are loaded; auto is bfloat16 on a GPU that has it, else float32."""
    if compute.precision == "auto":
        return torch.bfloat16 if device_of(compute).type == "cuda" and has_bfloat16() else torch.float32
    return torch.bfloat16 if compute.precision == "bfloat16" else torch.float32


def set_kernels(compute: ComputeConfig) -> None:
    """Choose torch's kernels in this process: TF32 for float32 products, and deterministic ones."""
    tf32 = compute.precision == "auto" and device_of(compute).type == "cuda"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    if compute.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a process first uses cuBLAS
        torch.use_deterministic_algorithms(True)


def prepare(model: Any, compute: ComputeConfig) -> None:
    """Set up residual stream, activation, attention and CPU kernels of a model that was just loaded.

    Args:
        model: a causal language model of transformers without adapters, frozen afterwards.
    """
    residual_in_float32(model)
    _fuse_gelu(model)
    if device_of(compute).type != "cpu":
        return
    model.set_attn_implementation("eager")  # the backward pass of torch's fused attention is slow on a CPU
    if compute.kernels == "auto" and compute.strategy != "fsdp":  # packed weights cannot be divided over ranks
        from gradsift.cpu import accelerate

        accelerate(model)


def numerics_of(model: Any) -> dict[str, str]:
    """Return the numerics of a prepared model, read from the model itself."""
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return {
        "precision": str(model.dtype).removeprefix("torch."),
        **({"products": "tf32"} if tf32 else {}),
        "residual": residual_precision(model),
        "attention": str(model.config._attn_implementation),
        "kernels": getattr(model, "kernels_version", "off"),
    }


def expected_numerics(config: Any, compute: ComputeConfig, trust_remote_code: bool) -> dict[str, str]:
    """Return the numerics that a model will have on this machine, without loading its weights.

    The model is built on torch's meta device and prepared like a loaded one.

    Args:
        config: transformers' config of the model.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype_of(compute), trust_remote_code=trust_remote_code)
    prepare(model.requires_grad_(False), compute)
    return numerics_of(model)


def _fuse_gelu(model: Any) -> None:
    """Compute GPT-2's tanh GELU in one kernel; transformers makes eight passes over the widest activation."""
    from transformers.activations import GELUTanh, NewGELUActivation

    for module in model.modules():
        if isinstance(getattr(module, "act", None), NewGELUActivation):
            module.act = GELUTanh()
