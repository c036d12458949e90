# SPDX-License-Identifier: Apache-2.0
"""Attention of a serving engine's batch over its pages; torch only, no engine is imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_attn.attention import attention, attention_decode
from sparse_attn.dispatch import DECODE_MAX_ROWS
from sparse_attn.patterns import SlidingWindow


def split_pages(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [num_pages, num_heads_kv, page_size, head_dim], as views of one tensor.

    Args:
        kv_cache: [num_pages, num_heads_kv, page_size, 2 * head_dim], contiguous: of each page and
            head the keys come first, then the values.
    """
    pages, heads, size, double = kv_cache.shape
    both = kv_cache.view(pages, heads, 2 * size, double // 2)
    return both[:, :, :size], both[:, :, size:]


def write_pages(kv_cache: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Put new keys and values where a serving engine has reserved room for them.

    Args:
        kv_cache: as in `split_pages`.
        key: [tokens, num_heads_kv, head_dim].
        value: [tokens, num_heads_kv, head_dim].
        slots: integers [tokens], page * page_size + place in the page; negative for padding.
    """
    size = kv_cache.shape[2]
    slots = slots.long()
    used = slots >= 0
    slots = slots[used]
    count = used.shape[0]
    for pages, rows in zip(split_pages(kv_cache), (key, value), strict=True):
        pages[slots // size, :, slots % size] = rows[:count][used]


def attend_batch(
    query: Tensor,
    new_keys: tuple[Tensor, Tensor] | None,
    kv_cache: Tensor,
    out: Tensor,
    query_starts: Sequence[int],
    seq_lens: Sequence[int],
    block_table: Tensor,
    *,
    pattern: Any,
    decode: Any,
    window: int | None = None,
    **numerics: Any,
) -> None:
    """Attention of every request of a batch over its own pages, written into `out`.

    Requests with as many rows as each other, and few, run as one call; the others one by one.

    Args:
        query: [tokens, num_heads, head_dim], the requests' rows one after the other.
        new_keys: keys and values [tokens, num_heads_kv, head_dim] of the same tokens; a request
            that is all new is computed from them. None: from the pages alone.
        kv_cache: as in `split_pages`, with the new keys in it.
        out: [tokens, num_heads * head_dim] or [tokens, num_heads, head_dim].
        query_starts: request s has rows query_starts[s] to query_starts[s + 1].
        seq_lens: keys of each request, the new ones included.
        block_table: int32 [requests, max_pages], its pages in order.
        pattern: keys that requests of more than 16 rows see.
        decode: the same for fewer rows.
        window: a sliding window of the model's own; it stands above both.
        numerics: causal, softmax_scale, softcap and sinks as `attention` takes them.
    """
    out = out.view(out.shape[0], query.shape[1], -1)
    keys, values = (x.transpose(1, 2) for x in split_pages(kv_cache))
    for rows, requests in _alike(query_starts, seq_lens):
        chosen = decode if rows <= DECODE_MAX_ROWS else pattern
        first = torch.tensor([query_starts[s] for s in requests])
        lens = [seq_lens[s] for s in requests]
        if window is not None:
            chosen = SlidingWindow(window)
        where = (first[:, None] + torch.arange(rows)).flatten()
        q = query[where].view(len(requests), rows, *query.shape[1:]).transpose(1, 2)
        if new_keys is not None and lens == [rows]:
            k, v = (x[where].unsqueeze(0).transpose(1, 2) for x in new_keys)
            result = attention(q, k, v, chosen, **numerics)
        else:
            pages = -(-max(lens) // kv_cache.shape[2])
            result = attention_decode(
                q,
                keys,
                values,
                chosen,
                cache_seqlens=torch.tensor(lens, dtype=torch.int32),
                block_table=block_table[requests, :pages].to(torch.int32).contiguous(),
                **numerics,
            )
        assert isinstance(result, Tensor)
        out[where] = result.transpose(1, 2).reshape(len(where), query.shape[1], -1)


def _alike(query_starts: Sequence[int], seq_lens: Sequence[int]) -> list[tuple[int, list[int]]]:
    """(rows, requests that run together): those of few rows by their number, others alone."""
    groups: dict[tuple[int, int], list[int]] = {}
    for request in range(len(seq_lens)):
        rows = query_starts[request + 1] - query_starts[request]
        if rows > 0:
            own = request if rows > DECODE_MAX_ROWS else -1
            groups.setdefault((rows, own), []).append(request)
    return [(rows, requests) for (rows, _), requests in groups.items()]
