# SPDX-License-Identifier: Apache-2.0
"""The entry point ``vllm.general_plugins``: vLLM calls `register` in each of its processes."""

from __future__ import annotations

import importlib
import logging


def register() -> None:
    """Put `sparse_attn.integrations.vllm.SparseAttnBackend` in the place of vLLM's CPU backend.

    It may be called any number of times. A vLLM whose interface is another is left alone, with a
    warning: an installed plugin must not keep an engine from starting that does not ask for it.
    """
    try:
        registry = importlib.import_module("vllm.v1.attention.backends.registry")
        backend = registry.AttentionBackendEnum.CPU_ATTN
        registry.register_backend(backend, "sparse_attn.integrations.vllm.SparseAttnBackend")
    except (ImportError, AttributeError) as error:
        logging.getLogger(__name__).warning(
            "sparse_attn: this vLLM has no CPU backend that can be replaced (%s); vLLM runs "
            "without sparse_attn. Versions known to work: 0.32.",
            error,
        )
