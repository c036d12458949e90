# SPDX-License-Identifier: Apache-2.0
"""Which kernel can run a call, and why another cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from sparse_attn.ops import MAX_CUDA_HEAD_DIM, MAX_HEAD_DIM, load_cuda

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class UnsupportedError(NotImplementedError):
    """No kernel can run the call.

    Attributes:
        reasons: per backend that was asked, "name: why not".
    """

    def __init__(self, message: str, reasons: Sequence[str]) -> None:
        super().__init__(message)
        self.reasons = tuple(reasons)


class Problem(NamedTuple):
    """What a backend is asked about: everything that can decide whether it runs.

    Attributes:
        device_type: of q, k and v.
        dtype: of q, k and v.
        head_dim: of q and k.
        head_dim_v: of v.
        bias_requires_grad: whether a gradient of the index's column_bias is asked for.
        requires_grad: whether any gradient is; told for tensors that are not on the CPU.
    """

    device_type: str
    dtype: torch.dtype
    head_dim: int
    head_dim_v: int
    bias_requires_grad: bool = False
    requires_grad: bool = False


def _too_wide(head_dim: int, head_dim_v: int, most: int) -> list[str]:
    dims = (("head_dim", head_dim), ("head_dim_v", head_dim_v))
    return [f"{name}={dim} is above {most}" for name, dim in dims if dim > most]


def _cpu_reasons(problem: Problem) -> list[str]:
    device_type, dtype, head_dim, head_dim_v, bias_requires_grad, _ = problem
    reasons = []
    if device_type != "cpu":
        reasons.append(f"it runs tensors on cpu, these are on {device_type}")
    if dtype not in _DTYPES:
        reasons.append(f"it runs float32, bfloat16 and float16, not {dtype}")
    if head_dim > MAX_HEAD_DIM or head_dim_v > MAX_HEAD_DIM:  # rarely: asked in every call
        reasons += _too_wide(head_dim, head_dim_v, MAX_HEAD_DIM)
    if bias_requires_grad:
        reasons.append("it has no gradient of column_bias; detach it")
    return reasons


def _cuda_reasons(problem: Problem) -> list[str]:
    if problem.device_type != "cuda":
        return [f"it runs tensors on cuda, these are on {problem.device_type}"]
    load_cuda()
    reasons = []
    if problem.dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"it runs bfloat16 and float16, not {problem.dtype}")
    reasons += _too_wide(problem.head_dim, problem.head_dim_v, MAX_CUDA_HEAD_DIM)
    if problem.requires_grad or problem.bias_requires_grad:
        reasons.append("it has no gradient; detach the inputs, or call it under torch.no_grad()")
    return reasons


#: Backends by name, which is the device that they run on: the reasons why one cannot run a call.
BACKENDS: dict[str, Callable[[Problem], list[str]]] = {
    "cpu": _cpu_reasons,
    "cuda": _cuda_reasons,
}


def choose(function: str, problem: Problem, backend: str) -> str:
    """Name of the first backend that can run `problem`; an explicit one never falls back.

    Args:
        function: caller's name, for the error's text.
        problem: the call.
        backend: "auto" or a name in BACKENDS.

    Raises:
        ValueError: unknown name.
        UnsupportedError: none can run it; `.reasons` says why.
        ImportError: the tensors are on a CUDA device, and the CUDA kernels are not there.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(
            f"sparse_attn.{function}: backend={backend!r} is unknown; "
            f"pass 'auto' or one of {sorted(BACKENDS)}."
        )
    asked: list[str] = [backend]
    if backend == "auto":  # the others would only say that they run another device
        asked = [problem.device_type] if problem.device_type in BACKENDS else [*BACKENDS]
    reasons = []
    for name in asked:
        why_not = BACKENDS[name](problem)
        if not why_not:
            return name
        reasons += [f"{name}: {reason}" for reason in why_not]
    raise UnsupportedError(
        f"sparse_attn.{function}: no backend can run this call: {'; '.join(reasons)}.", reasons
    )
