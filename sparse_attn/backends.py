# SPDX-License-Identifier: Apache-2.0
"""Which kernel can run a call, and why another cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

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
    """

    device_type: str
    dtype: torch.dtype
    head_dim: int
    head_dim_v: int
    bias_requires_grad: bool = False


def _cpu_reasons(problem: Problem) -> list[str]:
    device_type, dtype, head_dim, head_dim_v, bias_requires_grad = problem
    reasons = []
    if device_type != "cpu":
        reasons.append(f"it runs tensors on cpu, these are on {device_type}")
    if dtype not in _DTYPES:
        reasons.append(f"it runs float32, bfloat16 and float16, not {dtype}")
    if head_dim > 256:
        reasons.append(f"head_dim={head_dim} is above 256")
    if head_dim_v > 256:
        reasons.append(f"head_dim_v={head_dim_v} is above 256")
    if bias_requires_grad:
        reasons.append("it has no gradient of column_bias; detach it")
    return reasons


#: Backends in the order in which `auto` asks them: name to the reasons why it cannot run.
BACKENDS: dict[str, Callable[[Problem], list[str]]] = {"cpu": _cpu_reasons}


def choose(function: str, problem: Problem, backend: str) -> str:
    """Name of the first backend that can run `problem`; an explicit one never falls back.

    Args:
        function: caller's name, for the error's text.
        problem: the call.
        backend: "auto" or a name in BACKENDS.

    Raises:
        ValueError: unknown name.
        UnsupportedError: none can run it; `.reasons` says why.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(
            f"sparse_attn.{function}: backend={backend!r} is unknown; "
            f"pass 'auto' or one of {sorted(BACKENDS)}."
        )
    reasons = []
    for name in BACKENDS if backend == "auto" else [backend]:
        why_not = BACKENDS[name](problem)
        if not why_not:
            return name
        reasons += [f"{name}: {reason}" for reason in why_not]
    raise UnsupportedError(
        f"sparse_attn.{function}: no backend can run this call: {'; '.join(reasons)}.", reasons
    )
