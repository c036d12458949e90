# SPDX-License-Identifier: Apache-2.0
"""flash-attn's functions against plain attention in fp64, in flash-attn's own layout."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from bounds import plain_attention

from sparse_attn import AShape
from sparse_attn.integrations import flash_attn as door

Tensor = torch.Tensor


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qkv(rows: int = 50, keys: int = 70, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return (
        randn(batch, rows, 4, 16),
        randn(batch, keys, 2, 16, seed=1),
        randn(batch, keys, 2, 24, seed=2),
    )


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
    """(out, lse) over [batch, seqlen, heads, head_dim], not causal by default."""
    options = {"causal": False} | options
    out, lse = plain_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask, **options)
    return out.transpose(1, 2), lse


def check(ours: Tensor, tensors: Any, mask: Tensor | None = None, **options: Any) -> None:
    oracle = plain(*(x.double() for x in tensors), mask, **options)[0]
    error = (plain(*tensors, mask, **options)[0] - oracle).abs().max()
    eps = 2 * torch.finfo(torch.float32).eps
    assert ours.shape == oracle.shape
    assert (ours - oracle).abs().max() <= 2 * (error + eps * oracle.abs().max())


def distance(rows: int, keys: int) -> Tensor:
    """How far left of its row each key lies, bottom-right aligned."""
    return torch.arange(rows)[:, None] + keys - rows - torch.arange(keys)[None]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_flash_attn_func(causal: bool, softcap: float) -> None:
    tensors = qkv()
    out, lse, probs = door.flash_attn_func(
        *tensors, 0.0, 0.3, causal, softcap=softcap, return_attn_probs=True
    )
    options = {"causal": causal, "softmax_scale": 0.3, "softcap": softcap}
    check(out, tensors, **options)
    torch.testing.assert_close(lse, plain(*tensors, **options)[1])
    assert probs.numel() == 0
    assert torch.equal(
        out, door.flash_attn_func(*tensors, softmax_scale=0.3, causal=causal, softcap=softcap)
    )


@pytest.mark.parametrize(
    ("causal", "window", "left", "right"),
    [
        (True, (-1, -1), 99, 0),
        (True, (9, 0), 9, 0),
        (True, (9, 9), 9, 0),
        (False, (9, 0), 9, 0),
        (False, (-1, 0), 99, 0),
        (False, (9, 9), 9, 9),
        (False, (0, 0), 0, 0),
        (True, (None, None), 99, 0),
    ],
)
def test_windows(causal: bool, window: Any, left: int, right: int) -> None:
    tensors, d = qkv(), distance(50, 70)
    out = door.flash_attn_func(*tensors, causal=causal, window_size=window)
    check(out, tensors, (d <= left) & (d >= -right))


def test_pattern_and_packed_forms() -> None:
    tensors, d = qkv(50, 50), distance(50, 50)
    q, k, v = tensors[0], tensors[1], tensors[1].flip(1)
    pattern, mask = AShape(sink=3, window=6), (d >= 0) & ((d < 6) | (torch.arange(50) < 3))
    out = door.flash_attn_func(q, k, v, causal=True, pattern=pattern)
    check(out, (q, k, v), mask)
    options = {"causal": True, "pattern": pattern}
    assert torch.equal(door.flash_attn_kvpacked_func(q, torch.stack((k, v), 2), **options), out)
    three = torch.stack((q, q.flip(1), q.flip(2)), 2)
    packed = door.flash_attn_qkvpacked_func(three, **options)
    assert torch.equal(packed, door.flash_attn_func(*three.unbind(2), **options))


def cu(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def test_varlen() -> None:
    rows, keys = (7, 30, 1), (20, 30, 64)
    q, k, v = randn(38, 4, 16), randn(114, 2, 16, seed=1), randn(114, 2, 16, seed=2)
    lengths = (cu(*rows), cu(*keys), 30, 64)
    out, lse, _ = door.flash_attn_varlen_func(
        q, k, v, *lengths, causal=True, return_attn_probs=True
    )
    parts = zip(q.split(rows), k.split(keys), v.split(keys))
    for own, of, part in zip(out.split(rows), lse.split(rows, 1), parts):
        tensors = [x[None] for x in part]
        check(own[None], tensors, causal=True)
        torch.testing.assert_close(of[None], plain(*tensors, causal=True)[1])


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("appended", [0, 1, 3])
def test_kvcache(paged: bool, appended: int) -> None:
    """New keys are written where flash-attn writes them, and are seen."""
    lens, rows = torch.tensor([21, 40], dtype=torch.int32), max(appended, 1)
    q, caches = randn(2, rows, 4, 16), [randn(2, 64, 2, 16, seed=s) for s in (1, 2)]
    new = [randn(2, appended, 2, 16, seed=s) for s in (3, 4)] if appended else [None, None]
    expected = [cache.clone() for cache in caches]
    for cache, rows_new in zip(expected, new):
        for b, start in enumerate(lens.tolist()):
            if rows_new is not None:
                cache[b, start : start + appended] = rows_new[b]
    table = None
    given = caches
    if paged:  # pages of 16 in an order of their own
        table = torch.tensor([[5, 2, 0, 7], [1, 6, 3, 4]], dtype=torch.int32)
        given = [torch.empty(8, 16, 2, 16) for _ in caches]
        for pool, cache in zip(given, caches):
            pool[table.long()] = cache.unflatten(1, (4, 16))
    out, lse = door.flash_attn_with_kvcache(
        q, *given, *new, cache_seqlens=lens, block_table=table, causal=True, return_softmax_lse=True
    )
    held = [pool[table.long()].flatten(1, 2) if table is not None else pool for pool in given]
    assert all(torch.equal(a, b) for a, b in zip(held, expected))
    for b, length in enumerate((lens + appended).tolist()):
        tensors = [q[b : b + 1], *(cache[b : b + 1, :length] for cache in expected)]
        check(out[b : b + 1], tensors, causal=True)
        torch.testing.assert_close(lse[b : b + 1], plain(*tensors, causal=True)[1])


def test_kvcache_without_lengths_is_all_of_it() -> None:
    q, k, v = randn(2, 1, 4, 16), randn(2, 30, 2, 16, seed=1), randn(2, 30, 2, 16, seed=2)
    check(door.flash_attn_with_kvcache(q, k, v), (q, k, v))


def test_vertical_slash_dialect() -> None:
    """The lists of vLLM: keys of the blocks and the columns, and no others."""
    q, k, v = randn(1, 130, 2, 16), randn(1, 200, 2, 16, seed=1), randn(1, 200, 2, 16, seed=2)
    counts = torch.tensor([[[1, 2, 1], [0, 1, 2]]], dtype=torch.int32)
    blocks = torch.tensor([[[[0, 9], [3, 128], [64, 9]], [[9, 9], [64, 9], [0, 100]]]]).int()
    columns = torch.tensor([[[[65], [70], [1]], [[2], [3], [199]]]]).int()
    mask = torch.zeros(1, 2, 130, 200, dtype=torch.bool)
    for h in range(2):
        for t in range(3):
            rows = slice(64 * t, 64 * t + 64)
            for n in range(int(counts[0, h, t])):
                mask[0, h, rows, int(blocks[0, h, t, n]) : int(blocks[0, h, t, n]) + 64] = True
            mask[0, h, rows, int(columns[0, h, t, 0])] = True
    lists = (counts, blocks, torch.ones_like(counts), columns)
    target = torch.empty_like(q)
    out, lse = door.sparse_attn_func(
        q, k, v, *lists, causal=True, return_softmax_lse=True, out=target
    )
    assert out is target
    check(out, (q, k, v), mask & (distance(130, 200) >= 0))
    _, expected = plain(q, k, v, mask, causal=True)
    torch.testing.assert_close(lse, expected)


@pytest.mark.parametrize("causal", [False, True])
def test_block_sparse_dialect(causal: bool) -> None:
    """A dense, a block-sparse and a block-streaming head, over two sequences of unlike lengths."""
    rows, block = (200, 300), 128
    q, k, v = (randn(500, 3, 16, seed=s) for s in range(3))
    kinds = torch.tensor([0, 1, -1], dtype=torch.int32)
    streaming = torch.tensor([0, 0, 0, 0, 1, 1], dtype=torch.int32)
    grid = torch.tensor([[[[1, 0, 0], [0, 1, 0], [0, 0, 0]]], [[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]])
    out = door.block_sparse_attn_func(
        *(q, k, v, cu(*rows), cu(*rows), kinds, streaming, grid.bool(), 300, 300, 0.0),
        is_causal=causal,
    )
    for s, part in enumerate(out.split(rows)):
        n = rows[s]
        r, c = torch.arange(n)[:, None] // block, torch.arange(n)[None] // block
        last = r if causal else torch.full_like(r, -(-n // block) - 1)
        heads = (torch.ones(n, n).bool(), grid[s, 0].bool()[r, c], (c < 1) | (c == last))
        mask = torch.stack([h.expand(n, n) for h in heads])[None]
        tensors = [x.split(rows)[s][None] for x in (q, k, v)]
        check(part[None], tensors, mask, causal=causal)


def test_block_sparse_dialect_of_more_keys_than_rows() -> None:
    """Causality is aligned at the bottom right of each sequence."""
    rows, keys = (100, 130), (150, 130)
    q, k, v = randn(230, 2, 16), randn(280, 2, 16, seed=1), randn(280, 2, 16, seed=2)
    grid = torch.tensor([[[[1, 1], [0, 0]]], [[[1, 0], [0, 1]]]]).bool()
    lengths, kinds = (cu(*rows), cu(*keys)), torch.tensor([0, 1], dtype=torch.int32)
    out, lse, _ = door.block_sparse_attn_func(
        *(q, k, v, *lengths, kinds, None, grid, 130, 150, 0.0),
        is_causal=True,
        return_attn_probs=True,
    )
    parts = zip(q.split(rows), k.split(keys), v.split(keys))
    for s, (own, of, part) in enumerate(zip(out.split(rows), lse.split(rows, 1), parts)):
        r, c = torch.arange(rows[s])[:, None] // 128, torch.arange(keys[s])[None] // 128
        mask = torch.stack([torch.ones(rows[s], keys[s]).bool(), grid[s, 0][r, c]])[None]
        tensors = [x[None] for x in part]
        check(own[None], tensors, mask, causal=True)
        torch.testing.assert_close(of[None], plain(*tensors, mask, causal=True)[1])


def test_gradients_go_through() -> None:
    tensors = [x.requires_grad_() for x in qkv()]
    other = [x.detach().clone().requires_grad_() for x in tensors]
    door.flash_attn_func(*tensors, causal=True).square().sum().backward()
    plain(*other, causal=True)[0].square().sum().backward()
    for ours, theirs in zip(tensors, other):
        torch.testing.assert_close(ours.grad, theirs.grad)


# ------------------------------------------------------------------------------ under its name


def loaded() -> dict[str, Any]:
    return {n: m for n, m in sys.modules.items() if n.split(".")[0] == "flash_attn"}


def test_install_is_reversible(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    there = types.ModuleType("flash_attn")  # one that was imported before, with a part of its own
    part = types.ModuleType("flash_attn.bert_padding")
    monkeypatch.setitem(sys.modules, "flash_attn", there)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", part)
    before = loaded()
    tensors = qkv(50, 50)
    with door.install(AShape(sink=3, window=6)) as handle:
        from flash_attn import flash_attn_func
        from flash_attn.flash_attn_interface import flash_attn_with_kvcache

        assert "flash_attn.bert_padding" not in sys.modules
        with pytest.raises(ImportError):
            from flash_attn import layers  # noqa: F401
    assert loaded() == before
    handle.disable()
    expected = door.flash_attn_func(*tensors, causal=True, pattern=AShape(sink=3, window=6))
    assert torch.equal(flash_attn_func(*tensors, causal=True), expected)
    dense = door.flash_attn_func(*tensors, causal=True)
    assert torch.equal(flash_attn_func(*tensors, causal=True, pattern="dense"), dense)
    assert flash_attn_with_kvcache.__doc__ == door.flash_attn_with_kvcache.__doc__


def test_importing_the_door_installs_nothing() -> None:
    assert not any(m.__doc__ == door.__doc__ for m in loaded().values())


# ------------------------------------------------------------------------------ errors

SLOPES = torch.ones(4)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dropout_p": 0.1}, r"dropout_p=0\.1 is not supported; pass 0\.0"),
        ({"alibi_slopes": SLOPES}, r"alibi_slopes=a tensor \(4,\) is not supported; pass None"),
        ({"window_size": (3, 5)}, "not the same on both sides"),
        ({"window_size": (3, 0), "pattern": AShape()}, "together with a sparse pattern"),
    ],
)
def test_flash_attn_func_refuses(options: Any, text: str) -> None:
    with pytest.raises(NotImplementedError, match=text):
        door.flash_attn_func(*qkv(), **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rotary_cos": SLOPES}, "rotary_cos=.*rotate q and k beforehand"),
        ({"rotary_sin": SLOPES}, "rotary_sin=.*rotate q and k beforehand"),
        ({"cache_batch_idx": SLOPES}, "index the cache beforehand"),
        ({"cache_leftpad": SLOPES}, "use attention_ranges"),
        ({"alibi_slopes": SLOPES}, "alibi_slopes"),
    ],
)
def test_kvcache_refuses(options: Any, text: str) -> None:
    with pytest.raises(NotImplementedError, match=text):
        door.flash_attn_with_kvcache(*qkv(), **options)


def test_other_refusals() -> None:
    q, k, v = randn(8, 4, 16), randn(8, 2, 16), randn(8, 2, 16)
    lengths = (cu(8), cu(8), 8, 8)
    with pytest.raises(NotImplementedError, match="use flash_attn_with_kvcache, which takes pages"):
        door.flash_attn_varlen_func(q, k, v, *lengths, block_table=SLOPES)
    with pytest.raises(ValueError, match=r"q is \(8, 4, 16\); pass a tensor \[batch, seqlen"):
        door.flash_attn_func(q, k, v)
    with pytest.raises(ValueError, match=r"k is list; pass a tensor \[tokens, heads"):
        door.flash_attn_varlen_func(q, [], v, *lengths)
    with pytest.raises(ValueError, match="pass a tensor .*2 or 3"):
        door.flash_attn_qkvpacked_func(q)
    q, k, v = qkv(1, 30)
    with pytest.raises(ValueError, match="k without v"):
        door.flash_attn_with_kvcache(q, k, v, k[:, :1], cache_seqlens=3)
    with pytest.raises(ValueError, match=r"1 new keys behind cache_seqlens=\[30, 30\] do not fit"):
        door.flash_attn_with_kvcache(q, k, v, k[:, :1], v[:, :1])
    with pytest.raises(ValueError, match="tells of 1 sequences, cu_seqlens_k of 2"):
        door.block_sparse_attn_func(
            *(randn(8, 1, 16) for _ in range(3)),
            *(cu(8), cu(4, 4), torch.zeros(1), None, None, 8, 8, 0.0),
        )
