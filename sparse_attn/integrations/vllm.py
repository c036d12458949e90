# SPDX-License-Identifier: Apache-2.0
"""Sparse attention in vLLM's engine on CPUs, as a plugin.

    from vllm import LLM

    LLM(model, additional_config={"sparse_attn": {"pattern": "a_shape"}})

vLLM finds `register` by the entry point ``vllm.general_plugins`` and calls it in each of its
processes. It puts `SparseAttnBackend` in the place of vLLM's own CPU backend, the only one that
vLLM's CPU platform ever takes; without ``additional_config["sparse_attn"]`` the backend hands every
layer to vLLM's own implementation. With it, vLLM keeps its scheduler, its block tables and the size
of its pages; inside a page, keys and values lie as `sparse_attn.integrations._pages` says.

Source: ``vllm.v1.attention`` (0.32).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from sparse_attn.heads import HeadPlan, undescribe
from sparse_attn.integrations._pages import attend_batch, write_pages

__all__ = ["SparseAttnBackend", "SparseAttnImpl"]

_PREFIX = "sparse_attn.integrations.vllm"


def options() -> dict[str, Any] | None:
    """What the engine being built has under additional_config["sparse_attn"]; None if nothing.

    Returns:
        "pattern" and "decode", each a pattern, a pattern's name or a `HeadPlan`.

    Raises:
        ValueError: a key is unknown or a value is no pattern.
    """
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    given = getattr(config, "additional_config", None)
    if not isinstance(given, Mapping) or "sparse_attn" not in given:
        return None
    return read_options(given["sparse_attn"])


def read_options(given: Any) -> dict[str, Any]:
    """See `options`."""
    if not isinstance(given, Mapping) or set(given) - {"pattern", "decode"}:
        raise ValueError(
            f"{_PREFIX}: additional_config['sparse_attn'] is {given!r}; pass a dict with 'pattern' "
            "and 'decode' or one of them."
        )
    return {name: _pattern(given.get(name, "dense")) for name in ("pattern", "decode")}


def _pattern(given: Any) -> Any:
    if isinstance(given, Mapping):
        return undescribe(dict(given))
    if isinstance(given, str):
        return HeadPlan.load(Path(given)) if given.endswith(".json") else given
    raise ValueError(
        f"{_PREFIX}: {given!r} is no pattern; pass a pattern's name, a head plan's .json file or "
        "a dict such as {'type': 'AShape', 'sink': 64, 'window': 1024}."
    )


class SparseAttnBackend(CPUAttentionBackend):
    """vLLM's CPU backend, with this package's kernels where an engine asks for them."""

    @staticmethod
    def get_impl_cls() -> Any:
        """The implementation that the engine being built asks for."""
        return CPUAttentionBackendImpl if options() is None else SparseAttnImpl


class SparseAttnImpl(CPUAttentionBackendImpl):
    """Attention of one layer over vLLM's pages.

    Raises:
        NotImplementedError: the layer wants something that no kernel here does; the text says what.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.options = options() or read_options({})
        attn_type = str(getattr(self.attn_type, "value", self.attn_type))
        for wrong, what in (
            (self.alibi_slopes is not None, "ALiBi slopes are"),
            (attn_type != "decoder", f"attention of type {attn_type!r} is"),
            (self.is_fp8_kv_cache, f"kv_cache_dtype={self.kv_cache_dtype!r} is"),
        ):
            if wrong:
                raise NotImplementedError(
                    f"{_PREFIX}: {what} not supported; leave 'sparse_attn' out of "
                    "additional_config for this model."
                )

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """See vLLM's ``AttentionImpl``."""
        write_pages(kv_cache, key[: len(slot_mapping)], value[: len(slot_mapping)], slot_mapping)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """See vLLM's ``AttentionImpl``; the keys of this pass are in the cache already."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(f"{_PREFIX}: a quantised output is not supported.")
        if attn_metadata is None:  # warming up
            return output
        if attn_metadata.dynamic_causal is not None:
            raise NotImplementedError(
                f"{_PREFIX}: causality that differs within a batch is not supported; leave "
                "'sparse_attn' out of additional_config for this model."
            )
        tokens = attn_metadata.num_actual_tokens
        shares_cache = self.kv_sharing_target_layer_name is not None
        window = self.sliding_window
        attend_batch(
            query[:tokens],
            None if shares_cache else (key[:tokens], value[:tokens]),
            kv_cache,
            output[:tokens],
            attn_metadata.query_start_loc.tolist(),
            attn_metadata.seq_lens.tolist(),
            attn_metadata.block_table,
            pattern=self._of_layer("pattern", layer),
            decode=self._of_layer("decode", layer),
            window=window if window > 0 else None,
            causal=bool(attn_metadata.causal),
            softmax_scale=self.scale,
            softcap=self.logits_soft_cap or None,
            sinks=None if self.sinks is None else self.sinks.to(torch.float32),
        )
        return output

    def _of_layer(self, name: str, layer: Any) -> Any:
        chosen = self.options[name]
        if not isinstance(chosen, HeadPlan):
            return chosen
        from vllm.model_executor.models.utils import extract_layer_index

        return chosen(extract_layer_index(layer.layer_name))
