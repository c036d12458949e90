# SPDX-License-Identifier: Apache-2.0
"""The compiled library: loading it, and what it says of itself.

The schemas are in csrc/registration.cpp.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor


def _load(name: str, missing: str, unfit: str) -> None:
    """Loads a module of the package, whose operators register themselves.

    Args:
        name: file name.
        missing: why it may not be there.
        unfit: why it may not load.

    Raises:
        ImportError: with the likely cause.
    """
    library = Path(__file__).parents[1] / name
    try:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except (OSError, FileNotFoundError) as error:
        cause = unfit if library.exists() else f"the compiled library {name} is missing: {missing}"
        raise ImportError(
            f"sparse_attn: cannot load its operators: {error}. Likely: {cause}."
        ) from error


@functools.cache
def load_cuda() -> None:
    """Loads the CUDA kernels; the second time nothing is left to do.

    Raises:
        ImportError: they are not there, or do not load.
    """
    _load(
        "_C_cuda.abi3.so",
        "sparse_attn was built without CUDA; rebuild it where nvcc (12.4 or newer) is, with "
        "`SKBUILD_CMAKE_DEFINE=SPARSE_ATTN_CUDA=ON pip install .`, or move the tensors to the CPU",
        f"it does not fit this torch ({torch.__version__}; 2.11 or newer is needed); rebuild with "
        "`SKBUILD_CMAKE_DEFINE=SPARSE_ATTN_CUDA=ON pip install .`",
    )


_load(
    "_C.abi3.so",
    "the source tree is imported instead of the installed package (run `pip install .` and import "
    "from another directory, or `pip install -e .`)",
    f"it does not fit this torch ({torch.__version__}; 2.11 or newer is needed), or was built for "
    "another kind of CPU or C library; rebuild with `pip install .`",
)
OPS = torch.ops.sparse_attn

MAX_HEAD_DIM = 512
"""Of the CPU operators; csrc/core/types.h has the same."""
MAX_CUDA_HEAD_DIM = 256


def on_cpu(x: Tensor) -> bool:
    """Whether the native operators that choose keys take a tensor; else plain torch does it."""
    return x.is_cpu


def cpu_capability() -> str:
    """Name of the instruction set that the CPU kernels run on now."""
    name: str = OPS.cpu_capability()
    return name
