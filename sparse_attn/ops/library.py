# SPDX-License-Identifier: Apache-2.0
"""The compiled library: loading it, and what it says of itself.

The schemas are in csrc/registration.cpp.
"""

from __future__ import annotations

from pathlib import Path

import torch


def _load() -> None:
    library = Path(__file__).parents[1] / "_C.abi3.so"
    try:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except (OSError, FileNotFoundError) as error:
        causes = (
            f"the compiled library {library.name} is missing: the source tree is imported instead "
            "of the installed package (run `pip install .` and import from another directory, or "
            "`pip install -e .`)"
            if not library.exists()
            else f"it does not fit this torch ({torch.__version__}; 2.11 or newer is needed), or "
            "was built for another kind of CPU or C library; rebuild with `pip install .`"
        )
        raise ImportError(
            f"sparse_attn: cannot load its operators: {error}. Likely: {causes}."
        ) from error


_load()
OPS = torch.ops.sparse_attn


def cpu_capability() -> str:
    """Name of the instruction set that the CPU kernels run on now."""
    name: str = OPS.cpu_capability()
    return name
