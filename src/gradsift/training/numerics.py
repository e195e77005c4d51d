"""The numerics of models (the settings that change the rounding of results), and the number of torch's CPU threads.

    precision     dtype of weights and matrix products: float32 or bfloat16
    quantization  format of frozen linear layers, if they are quantised: nf4 or int8
    products      tf32 if float32 matrix products are rounded to TF32 (compute.precision=auto on CUDA)
    residual      dtype of the residual stream between blocks: float32 or bfloat16 (`gradsift.training.residual`)
    attention     transformers' name of the attention implementation
    kernels       version of the compiled CPU kernels that the model uses, or off (`gradsift.cpu`)

Results of different numerics must not be mixed in one ensemble: the variance of the gradient norms over the ensemble's
members (V_t in GRADFILTERING) would then include the difference between the numerics. So the numerics are part of the
identity of a model and of everything that is computed from the model.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import joblib
import psutil
import torch
from transformers.activations import GELUTanh, NewGELUActivation

from gradsift.config import ComputeConfig, ModelConfig
from gradsift.training.device import device_of
from gradsift.training.residual import residual_in_float32, residual_precision

_TORCH_THREADS = torch.get_num_threads()  # torch's own choice, before a run sets another number


def dtype_of(compute: ComputeConfig, model: ModelConfig | None = None) -> torch.dtype:
    """Return the dtype in which a model is loaded.

    This is `model.dtype` or, if `model.dtype` is auto or no model is given, `compute.precision`. If `compute.precision`
    is auto too, the dtype is bfloat16 on a GPU that supports bfloat16 matrix products, else float32.
    """
    precision = compute.precision if model is None or model.dtype == "auto" else model.dtype
    if precision == "auto":
        has_products = device_of(compute).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_products else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def rounds_to_tf32(compute: ComputeConfig) -> bool:
    """Return whether float32 matrix products may be rounded to TF32, which is so if compute.precision=auto on a GPU."""
    return compute.precision == "auto" and device_of(compute).type == "cuda"


def set_kernels(compute: ComputeConfig) -> None:
    """Set, for this process, whether torch rounds float32 matrix products to TF32.

    If `compute.deterministic` is true, torch is also restricted to deterministic kernels.
    """
    torch.set_float32_matmul_precision("high" if rounds_to_tf32(compute) else "highest")
    if compute.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a process first uses cuBLAS
        torch.use_deterministic_algorithms(True)


def prepare(model: Any, compute: ComputeConfig) -> None:
    """Change how a frozen model computes, in place.

    This sets the precision of the residual stream, the implementations of GELU and attention, and the CPU kernels.
    """
    residual_in_float32(model)
    for module in model.modules():
        # torch computes GPT-2's tanh GELU in one pass over the widest tensor, transformers in eight
        if isinstance(getattr(module, "act", None), NewGELUActivation):
            module.act = GELUTanh()
    if device_of(compute).type != "cpu":
        return
    model.set_attn_implementation("eager")  # the backward pass of torch's fused attention is slow on a CPU
    packs = compute.strategy != "fsdp" and not hasattr(model, "quantization")  # a divided model cannot be packed
    if compute.kernels == "auto" and packs:
        from gradsift.cpu import accelerate

        accelerate(model)


def numerics_of(model: Any) -> dict[str, str]:
    """Return the numerics of a model that `prepare` has changed, read from the model and from torch's settings."""
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return {
        "precision": str(model.dtype).removeprefix("torch."),
        **({"quantization": model.quantization} if hasattr(model, "quantization") else {}),
        **({"products": "tf32"} if tf32 else {}),
        "residual": residual_precision(model),
        "attention": str(model.config._attn_implementation),
        "kernels": getattr(model, "kernels_version", "off"),
    }


def expected_numerics(config: Any, compute: ComputeConfig, model_config: ModelConfig) -> dict[str, str]:
    """Return the numerics that a model will have on this machine, without loading its weights.

    Args:
        config: transformers' config of the model.
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


@functools.cache
def busy_cores() -> float:
    """Return how many cores of this machine were busy with other work when this process first called the function."""
    # measured once, because results depend on the number of threads, which all jobs of a sweep must share
    percent = psutil.cpu_percent(interval=0.25)  # of all cores, over a quarter of a second
    return float(percent) / 100 * (os.cpu_count() or 1)


def threads_of(compute: ComputeConfig) -> int:
    """Return the number of threads that `compute.threads` asks for.

    The threads of a kernel wait for each other by spinning, so a training step takes many times longer if there is even
    one thread more than there are free cores. So `auto` takes the least of three numbers: torch's own choice, the
    number of cores that this process may use (CPU affinity and cgroup limits), and the number of free cores. If several
    ranks share this CPU, the least number is divided among them. If OMP_NUM_THREADS is set, `auto` is torch's own
    choice, which follows this variable.
    """
    if compute.threads is None or (compute.threads == "auto" and "OMP_NUM_THREADS" in os.environ):
        return _TORCH_THREADS
    if compute.threads != "auto":
        return int(compute.threads)
    free = round((os.cpu_count() or 1) - busy_cores())
    processes = compute.devices if device_of(compute).type == "cpu" else 1
    return max(1, min(_TORCH_THREADS, int(joblib.cpu_count()), free) // processes)


def set_threads(compute: ComputeConfig) -> None:
    torch.set_num_threads(threads_of(compute))


def threads_in_words(compute: ComputeConfig) -> str:
    """Return a phrase such as "1 thread (auto: 2 cores, 1.0 of 2 busy with other work)"."""
    number = torch.get_num_threads()
    words = f"{number} thread{'s' if number > 1 else ''}"
    if compute.threads != "auto" or "OMP_NUM_THREADS" in os.environ:
        return words
    return f"{words} (auto: {joblib.cpu_count()} cores, {busy_cores():.1f} of {os.cpu_count()} busy with other work)"
