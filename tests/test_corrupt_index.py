# SPDX-License-Identifier: Apache-2.0
"""Corrupt indexes raise in every path and never read out of bounds; so do wrong arguments."""

import re
from dataclasses import replace

import pytest
import torch

import sparse_attn
from sparse_attn import SparseIndex, UnsupportedError

SEQLEN_K = 200
BIG = 2**31 - 1


def good_index(seqlen_q):
    """Two listed heads, a dense and a streaming one; each tile of a list 3 blocks and 3 columns."""
    tiles = -(-seqlen_q // 64)
    counts = torch.tensor([3, 3, 0, 0])[:, None] * torch.ones(4, tiles, dtype=torch.int64)
    ends = counts.flatten().cumsum(0).view(4, tiles)
    indptr = torch.cat((ends[:, :1] - counts[:, :1], ends), 1)[None]
    lists = 2 * tiles
    return SparseIndex(
        seqlen_q=seqlen_q,
        seqlen_k=SEQLEN_K,
        block_m=64,
        block_n=16,
        heads=torch.tensor([[2, 0, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0], [1, 4, 9, 2]]).int(),
        block_indptr=indptr,
        block_indices=torch.tensor([8, 40, 190] * lists, dtype=torch.int32),
        column_indptr=indptr.clone(),
        column_indices=torch.tensor([0, 30, 189] * lists, dtype=torch.int32),
        column_bias=torch.zeros(3 * lists),
        block_bits_ids=torch.tensor([-1, 0, 1] * lists, dtype=torch.int32),
        block_bits=torch.full((2, 16, 1), -1, dtype=torch.int64),
    ).validate()


# What is done to the last tile of the last listed head: tensor, position, value, the complaint.
# Positions count from the end of the entries of that tile (lists) or are indptr's own.
LISTS = {
    "block past the keys": ("block_indices", -1, SEQLEN_K, "block start is past the keys"),
    "block far past the keys": ("block_indices", -1, BIG, "block start is past the keys"),
    "block negative": ("block_indices", -3, -1, "block start is negative"),
    "block very negative": ("block_indices", -3, -BIG - 1, "block start is negative"),
    "block negative, not first": ("block_indices", -1, -16, "block start is negative"),
    "blocks unsorted": ("block_indices", -2, 195, "blocks are not ascending and disjoint"),
    "block twice": ("block_indices", -2, 8, "blocks are not ascending and disjoint"),
    "blocks overlap by one": ("block_indices", -2, 23, "blocks are not ascending and disjoint"),
    "column past the keys": ("column_indices", -1, SEQLEN_K, "column is past the keys"),
    "column far past the keys": ("column_indices", -1, BIG, "column is past the keys"),
    "column negative": ("column_indices", -3, -1, "column is negative"),
    "column very negative": ("column_indices", -2, -BIG - 1, "column is negative"),
    "columns unsorted": ("column_indices", -3, 35, "columns are not strictly ascending"),
    "column twice": ("column_indices", -3, 30, "columns are not strictly ascending"),
    "column is a block's first": ("column_indices", -2, 40, "column lies inside a block"),
    "column is a block's last": ("column_indices", -2, 23, "column lies inside a block"),
    "column in a last short block": ("column_indices", -1, 199, "column lies inside a block"),
    "mask past the masks": ("block_bits_ids", -1, 2, "block_bits_ids is out of range"),
    "mask far past the masks": ("block_bits_ids", -3, BIG, "block_bits_ids is out of range"),
    "mask below -1": ("block_bits_ids", -2, -2, "block_bits_ids is out of range"),
}
INDPTRS = {
    "one past the capacity": (-1, lambda end: end + 1, "runs past the capacity"),
    "far past the capacity": (-1, lambda end: 2**62, "runs past the capacity"),
    "decreasing": (-1, lambda end: end - 4, "indptr decreases"),
    "ends at a negative": (-1, lambda end: -5, "indptr decreases"),
    # The tile before, if there is one, ends there: it raises first, with its own complaint.
    "begins at a negative": (-2, lambda end: -1, "indptr (is negative|decreases)"),
    "begins at a very negative": (-2, lambda end: -(2**62), "indptr (is negative|decreases)"),
    "begins past the end": (-2, lambda end: 2**62, "indptr (decreases|runs past the capacity)"),
}
HEADS = {
    "kind 3": (1, 0, 3, "unknown head kind"),
    "kind -1": (0, 0, -1, "unknown head kind"),
    "negative sink": (3, 1, -1, "sink, window or dense_tail is negative"),
    "negative window": (3, 2, -7, "sink, window or dense_tail is negative"),
    "negative dense_tail": (3, 3, -BIG - 1, "sink, window or dense_tail is negative"),
    "lists of a dense head": (0, 0, 0, "a head that is not listed carries list entries"),
    "lists of a streaming head": (1, 0, 1, "a head that is not listed carries list entries"),
}


def corruptions(seqlen_q):
    """(name, corrupt index, complaint) of every corruption of values."""
    good = good_index(seqlen_q)
    for name, (tensor, position, value, complaint) in LISTS.items():
        corrupt = getattr(good, tensor).clone()
        corrupt[position] = value
        yield name, replace(good, **{tensor: corrupt}), complaint
    for kind in ("block_indptr", "column_indptr"):
        for name, (position, change, complaint) in INDPTRS.items():
            corrupt = getattr(good, kind).clone()
            corrupt[0, 1, position] = change(int(corrupt[0, 1, -1]))
            yield f"{kind} {name}", replace(good, **{kind: corrupt}), complaint
    for name, (head, column, value, complaint) in HEADS.items():
        corrupt = good.heads.clone()
        corrupt[head, column] = value
        yield name, replace(good, heads=corrupt), complaint


NAMES = [name for name, _, _ in corruptions(130)]


def tensors(seqlen_q, seqlen_k=SEQLEN_K, heads=4, heads_kv=4, dim=16):
    return tuple(
        torch.ones(1, h, n, dim)
        for h, n in ((heads, seqlen_q), (heads_kv, seqlen_k), (heads_kv, seqlen_k))
    )


def backward(index, seqlen_q):
    """The backward op by itself: through autograd the forward would raise first."""
    q, k, v = tensors(seqlen_q)
    rows = torch.zeros(1, 4, seqlen_q)
    return torch.ops.sparse_attn.attention_backward(
        torch.ones_like(q), rows, rows, q, k, v, *index.op_args(), None, 0, False, 1.0, 0.0
    )


@pytest.mark.parametrize("seqlen_q", [1, 16, 130])
@pytest.mark.parametrize("name", NAMES)
def test_corrupt_values_raise(name, seqlen_q):
    index, complaint = next(x[1:] for x in corruptions(seqlen_q) if x[0] == name)
    with pytest.raises(ValueError, match=complaint):
        index.validate()
    q, k, v = tensors(seqlen_q)
    for causal in (False, True):
        with pytest.raises(RuntimeError, match=f"sparse_attn::attention: .*{complaint}"):
            sparse_attn.attention(q, k, v, index, causal=causal)
    with pytest.raises(RuntimeError, match=f"sparse_attn::attention_backward: .*{complaint}"):
        backward(index, seqlen_q)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_fault_leaves_no_trace(threads):
    """A call after one that raised works, on any number of threads."""
    torch.set_num_threads(threads)
    q, k, v = tensors(130)
    wanted = sparse_attn.attention(q, k, v, good_index(130))
    for _, index, _ in corruptions(130):
        with pytest.raises(RuntimeError):
            sparse_attn.attention(q, k, v, index)
        assert torch.equal(sparse_attn.attention(q, k, v, good_index(130)), wanted)


def test_the_message_names_the_place():
    index = next(index for name, index, _ in corruptions(130) if name == "block past the keys")
    place = re.escape("index of batch 0, head 1, query tile 2: block start is past the keys")
    with pytest.raises(RuntimeError, match=rf"{place} \(value 200, limit 200\)"):
        sparse_attn.attention(*tensors(130), index)
    with pytest.raises(ValueError, match=place):
        index.validate()


def test_garbage_outside_of_the_lists_is_ignored():
    good = good_index(130)
    spare = torch.tensor([-7, BIG], dtype=torch.int32)
    padded = replace(
        good,
        block_indices=torch.cat((good.block_indices, spare)),
        column_indices=torch.cat((good.column_indices, spare)),
        column_bias=torch.cat((good.column_bias, torch.full((2,), torch.nan))),
        block_bits_ids=torch.cat((good.block_bits_ids, spare)),
    ).validate()
    q, k, v = tensors(130)
    assert torch.equal(sparse_attn.attention(q, k, v, padded), sparse_attn.attention(q, k, v, good))
    assert all(
        torch.equal(a, b) for a, b in zip(backward(padded, 130), backward(good, 130), strict=True)
    )


# -------------------------------------------------------------------- dtypes and shapes

# field, what is made of it, error of validate, its text, text of the op
SHAPES = {
    "heads int64": ("heads", lambda x: x.long(), TypeError, "heads is torch.int64", "wrong dtype"),
    "heads of 3": ("heads", lambda x: x[:, :3].contiguous(), ValueError, "heads has shape",
                   "has 3 columns, expected 4"),
    "fewer heads": ("heads", lambda x: x[:3], ValueError, "has shape", "block_indptr is not"),
    "block_indptr int32": ("block_indptr", lambda x: x.int(), TypeError,
                           "block_indptr is torch.int32", "wrong dtype"),
    "block_indptr 2D": ("block_indptr", lambda x: x[0], ValueError, "has shape",
                        "2 dimensions, expected 3"),
    "block_indptr short": ("block_indptr", lambda x: x[..., :-1].contiguous(), ValueError,
                           "block_indptr has shape", "differ in dimension 2"),
    "column_indptr int32": ("column_indptr", lambda x: x.int(), TypeError,
                            "column_indptr is torch.int32", "wrong dtype"),
    "column_indptr batch": ("column_indptr", lambda x: x.repeat(2, 1, 1), ValueError,
                            "column_indptr has shape", "differ in dimension 0"),
    "block_indices int64": ("block_indices", lambda x: x.long(), TypeError,
                            "block_indices is torch.int64", "wrong dtype"),
    "block_indices 2D": ("block_indices", lambda x: x[None], ValueError, "has shape",
                         "2 dimensions, expected 1"),
    "column_indices int64": ("column_indices", lambda x: x.long(), TypeError,
                             "column_indices is torch.int64", "wrong dtype"),
    "column_bias float64": ("column_bias", lambda x: x.double(), TypeError,
                            "column_bias is torch.float64", "wrong dtype"),
    "column_bias short": ("column_bias", lambda x: x[:-1], ValueError, "column_bias has shape",
                          "column_bias has 17 entries, column_indices 18"),
    "ids int64": ("block_bits_ids", lambda x: x.long(), TypeError, "block_bits_ids is torch.int64",
                  "wrong dtype"),
    "ids short": ("block_bits_ids", lambda x: x[:-1], ValueError, "block_bits_ids has shape",
                  "block_bits_ids has 17 entries, block_indices 18"),
    "ids missing": ("block_bits_ids", lambda x: None, ValueError, "go together", "come together"),
    "bits missing": ("block_bits", lambda x: None, ValueError, "go together", "come together"),
    "bits int32": ("block_bits", lambda x: x.int(), TypeError, "block_bits is torch.int32",
                   "wrong dtype"),
    "bits of block_n 8": ("block_bits", lambda x: x[:, :8].contiguous(), ValueError,
                          "block_bits has shape", "block_bits is not"),
    "bits of two words": ("block_bits", lambda x: x.repeat(1, 1, 2), ValueError,
                          "block_bits has shape", "block_bits is not"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_wrong_tensors_raise(name):
    field, change, error, text, op_text = SHAPES[name]
    good = good_index(130)
    index = replace(good, **{field: change(getattr(good, field))})
    with pytest.raises(error, match=text):
        index.validate()
    with pytest.raises(RuntimeError, match=op_text):
        torch.ops.sparse_attn.attention(
            *tensors(130), *index.op_args(), None, 0, False, 1.0, 0.0, None
        )
    with pytest.raises(RuntimeError, match=op_text):
        backward(index, 130)


@pytest.mark.parametrize(("block_m", "block_n"), [(0, 16), (8, 16), (24, 16), (-16, 16)])
def test_wrong_rows_of_a_tile_raise(block_m, block_n):
    index = replace(good_index(16), block_m=block_m)
    with pytest.raises(ValueError, match=f"block_m={block_m}; it must be 1 or a multiple of 16"):
        index.validate()
    with pytest.raises(RuntimeError, match=f"block_m={block_m} is neither 1 nor a multiple"):
        torch.ops.sparse_attn.attention(
            *tensors(16), *index.op_args(), None, 0, False, 1.0, 0.0, None
        )


@pytest.mark.parametrize("block_n", [0, 4, 12, -8])
def test_wrong_keys_of_a_block_raise(block_n):
    index = replace(good_index(16), block_n=block_n)
    with pytest.raises(ValueError, match=f"block_n={block_n}; it must be a multiple of 8"):
        index.validate()
    with pytest.raises(RuntimeError, match=f"block_n={block_n} is not a positive multiple of 8"):
        torch.ops.sparse_attn.attention(
            *tensors(16), *index.op_args(), None, 0, False, 1.0, 0.0, None
        )


def test_too_few_tiles_raise():
    """An index of another seqlen_q: the public call refuses it, the op if rows lack tiles."""
    index = good_index(128)
    with pytest.raises(ValueError, match="built for seqlen_q=128, seqlen_k=200, q and k have 130"):
        sparse_attn.attention(*tensors(130), index)
    with pytest.raises(RuntimeError, match="covers 128 query rows, the call has 130"):
        torch.ops.sparse_attn.attention(
            *tensors(130), *index.op_args(), None, 0, False, 1.0, 0.0, None
        )
    with pytest.raises(RuntimeError, match="covers 128 query rows, the call has 130"):
        backward(index, 130)
    with pytest.raises(ValueError, match="seqlen_q=64, seqlen_k=100, q and k have 64 and 99"):
        sparse_attn.attention(*tensors(64, 99), SparseIndex.dense(64, 100))


def test_lists_for_more_keys_than_there_are_raise():
    """The op is told lists for 200 keys and given 190."""
    q, k, v = tensors(130, seqlen_k=190)
    index = good_index(130).op_args()
    with pytest.raises(RuntimeError, match="past the keys"):
        torch.ops.sparse_attn.attention(q, k, v, *index, None, 0, False, 1.0, 0.0, None)


# -------------------------------------------------------------------- arguments of the calls


def bad(error, text, q=None, k=None, v=None, pattern="dense", **kwargs):
    """A wrong call: its error and what replaces the good arguments."""
    return error, text, {"q": q, "k": k, "v": v}, pattern, kwargs


F32, F64 = torch.float32, torch.float64
ARGUMENTS = {
    "q a list": bad(TypeError, "q is a list; pass a torch.Tensor", q=[[1.0]]),
    "v None": bad(TypeError, "v is a str; pass a torch.Tensor", v="v"),
    "q 3D": bad(ValueError, r"q has 3 dimensions; pass \[batch, heads", q=torch.ones(4, 9, 16)),
    "k 5D": bad(ValueError, "k has 5 dimensions", k=torch.ones(1, 1, 2, 12, 16)),
    "k dtype": bad(ValueError, "k is torch.float64 on cpu, q is torch.float32 on cpu; pass q, k",
                   k=torch.ones(1, 2, 12, 16, dtype=F64)),
    "v device": bad(ValueError, "v is torch.float32 on meta, q is torch.float32 on cpu",
                    v=torch.ones(1, 2, 12, 16, device="meta")),
    "head_dim 84": bad(ValueError, "head_dim=84 is not a multiple of 8; pad q, k and v to 88",
                       q=torch.ones(1, 4, 9, 84), k=torch.ones(1, 2, 12, 84)),
    "head_dim 0": bad(ValueError, "head_dim=0 is not a multiple of 8; pad q, k and v to 8",
                      q=torch.ones(1, 4, 9, 0), k=torch.ones(1, 2, 12, 0)),
    "head_dim_v 20": bad(ValueError, "head_dim_v=20 is not a multiple of 8; pad v to 24",
                         v=torch.ones(1, 2, 12, 20)),
    "stride": bad(ValueError, "last dimension of k has stride 12; pass k.contiguous",
                  k=torch.ones(1, 2, 16, 12).transpose(2, 3)),
    "batch": bad(ValueError, r"q \(1, 4, 9, 16\), k \(2, 2, 12, 16\) .* do not fit; q and k need",
                 k=torch.ones(2, 2, 12, 16), v=torch.ones(2, 2, 12, 16)),
    "k's head_dim": bad(ValueError, "do not fit", k=torch.ones(1, 2, 12, 24)),
    "v's length": bad(ValueError, "do not fit", v=torch.ones(1, 2, 13, 16)),
    "v's heads": bad(ValueError, "do not fit", v=torch.ones(1, 1, 12, 16)),
    "group": bad(ValueError, "4 query heads are no multiple of 3 KV heads",
                 k=torch.ones(1, 3, 12, 16), v=torch.ones(1, 3, 12, 16)),
    "no KV heads": bad(ValueError, "4 query heads are no multiple of 0 KV heads",
                       k=torch.ones(1, 0, 12, 16), v=torch.ones(1, 0, 12, 16)),
    "index heads": bad(ValueError, r"index has 3 heads; pass one with 1, 2 \(KV heads\) or 4",
                       pattern=SparseIndex.dense(9, 12, num_heads=3)),
    "index batch": bad(ValueError, "the index has batch 2; pass one with 1 or 1",
                       pattern=SparseIndex.stack([SparseIndex.dense(9, 12)] * 2)),
    "scale nan": bad(ValueError, "softmax_scale=nan is not finite", softmax_scale=float("nan")),
    "causal": bad(TypeError, "causal is a str; pass True or False", causal="no"),
    "offset": bad(TypeError, "q_offset is a float; pass an int", q_offset=1.5),
    "softcap 0": bad(ValueError, "softcap=0.0 is not above 0; pass None for none", softcap=0.0),
    "softcap -1": bad(ValueError, "softcap=-1.0 is not above 0", softcap=-1.0),
    "softcap nan": bad(ValueError, "softcap=nan is not above 0", softcap=float("nan")),
    "sinks dtype": bad(ValueError, r"sinks is torch.float64 \(4,\); pass float32 \[4\]",
                       sinks=torch.ones(4, dtype=F64)),
    "sinks shape": bad(ValueError, r"sinks is torch.float32 \(2,\); pass float32 \[4\]",
                       sinks=torch.ones(2)),
    "backend": bad(ValueError, "backend='gpu' is unknown; pass 'auto' or one of", backend="gpu"),
    "float64": bad(UnsupportedError, "cpu: it runs float32, .* not torch.float64",
                   q=torch.ones(1, 4, 9, 16, dtype=F64), k=torch.ones(1, 2, 12, 16, dtype=F64),
                   v=torch.ones(1, 2, 12, 16, dtype=F64)),
    "head_dim 520": bad(UnsupportedError, "head_dim=520 is above 512",
                        q=torch.ones(1, 4, 9, 520), k=torch.ones(1, 2, 12, 520)),
    "head_dim_v 520": bad(UnsupportedError, "head_dim_v=520 is above 512", backend="cpu",
                          v=torch.ones(1, 2, 12, 520)),
}  # fmt: skip


@pytest.mark.parametrize("name", ARGUMENTS)
def test_wrong_argument(name):
    error, text, changes, pattern, kwargs = ARGUMENTS[name]
    tensors_of = dict(zip("qkv", tensors(9, 12, heads=4, heads_kv=2), strict=True))
    tensors_of.update({key: value for key, value in changes.items() if value is not None})
    with pytest.raises(error, match=f"sparse_attn.attention: .*{text}"):
        sparse_attn.attention(*tensors_of.values(), pattern, **kwargs)


def test_gradient_of_biases_is_refused():
    index = good_index(16)
    index = replace(index, column_bias=index.column_bias.requires_grad_())
    with pytest.raises(UnsupportedError, match="it has no gradient of column_bias; detach") as info:
        sparse_attn.attention(*tensors(16), index)
    assert info.value.reasons == ("cpu: it has no gradient of column_bias; detach it",)
    with torch.no_grad():
        sparse_attn.attention(*tensors(16), index)


@pytest.mark.parametrize(
    ("ranges", "text"),
    [
        (torch.zeros(1, 5), "seq_ranges is torch.float32 .*pass int32"),
        (torch.zeros(1, 4).int(), r"seq_ranges is torch.int32 \(1, 4\); pass int32"),
        (torch.zeros(5).int(), "pass int32"),
        (
            torch.tensor([[0, 10, 0, 12, 0]]).int(),
            r"sequence 0 has .*\[0, 10, 0, 12\], outside of 9",
        ),
        (torch.tensor([[0, 4, 0, 4, 0], [4, 5, 4, 9, 0]]).int(), "sequence 1 .*9 rows and 12 keys"),
        (torch.tensor([[-1, 4, 0, 4, 0]]).int(), "sequence 0"),
        (torch.tensor([[0, -1, 0, 4, 0]]).int(), "sequence 0"),
        (torch.tensor([[0, 4, -1, 4, 0]]).int(), "sequence 0"),
        (torch.tensor([[0, 4, 0, -4, 0]]).int(), "sequence 0"),
    ],
)
def test_wrong_ranges(ranges, text):
    q, k, v = tensors(9, 12)
    with pytest.raises(ValueError, match=f"sparse_attn.attention_ranges: .*{text}"):
        sparse_attn.attention_ranges(q, k, v, "dense", ranges)
    if ranges.dtype == torch.int32 and ranges.dim() == 2:  # the op checks for itself
        with pytest.raises(RuntimeError, match="sparse_attn: seq_ranges"):
            torch.ops.sparse_attn.attention(
                q, k, v, *SparseIndex.dense(9, 12).op_args(), ranges, 0, True, 1.0, 0.0, None
            )


def test_wrong_number_of_ranges():
    q, k, v = (x.expand(3, -1, -1, -1) for x in tensors(9, 12))
    ranges = torch.tensor([[0, 4, 0, 4, 0]] * 2).int()
    with pytest.raises(ValueError, match="seq_ranges has 2 rows for batch 3; pass one for each"):
        sparse_attn.attention_ranges(q, k, v, "dense", ranges)


def test_ranges_that_share_rows_raise():
    """Threads would race on the rows of two sequences."""
    ranges = torch.tensor([[0, 5, 0, 5, 0], [4, 5, 5, 5, 0]]).int()
    with pytest.raises(RuntimeError, match="seq_ranges overlap in q at token 4"):
        sparse_attn.attention_ranges(*tensors(9, 12), "dense", ranges)


def varlen(q=None, k=None, cu_q=(0, 4, 9), cu_k=(0, 4, 12), longest=(9, 12), dtype=torch.int32):
    q = torch.ones(9, 4, 16) if q is None else q
    k = torch.ones(12, 2, 16) if k is None else k
    cu_q, cu_k = (torch.tensor(x, dtype=dtype) for x in (cu_q, cu_k))
    return sparse_attn.attention_varlen(q, k, torch.ones(12, 2, 16), cu_q, cu_k, *longest)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"q": torch.ones(1, 4, 9, 16)}, r"q has 4 dimensions; pass \[total tokens, heads"),
        ({"k": torch.ones(12, 16)}, "k has 2 dimensions"),
        ({"dtype": torch.int64}, r"cu_seqlens_q is torch.int64 \(3,\); pass int32 \[num_seqs"),
        ({"cu_q": ((0, 9),)}, "cu_seqlens_q is torch.int32 .*pass int32"),
        ({"cu_k": ()}, r"cu_seqlens_k is torch.int32 \(0,\)"),
        ({"cu_q": (0, 5, 8)}, r"cu_seqlens_q does not ascend from 0 to 9.*\[0, 5, 8\]"),
        ({"cu_q": (1, 5, 9)}, "cu_seqlens_q does not ascend from 0 to 9"),
        ({"cu_k": (0, 13, 12)}, "cu_seqlens_k does not ascend from 0 to 12"),
        ({"longest": (4, 12)}, "a sequence of cu_seqlens_q has 5 tokens, more than max_seqlen=4"),
        ({"longest": (9, 7)}, "a sequence of cu_seqlens_k has 8 tokens, more than max_seqlen=7"),
        ({"cu_k": (0, 4, 5, 12)}, "cu_seqlens_q tells of 2 sequences, cu_seqlens_k of 3"),
    ],
)
def test_wrong_varlen(kwargs, text):
    varlen()
    with pytest.raises(ValueError, match=f"sparse_attn.attention_varlen: .*{text}"):
        varlen(**kwargs)


@pytest.mark.parametrize("lens", [13, -1, torch.tensor([13])])
def test_wrong_cache_lengths(lens):
    with pytest.raises(ValueError, match="attention_decode: cache_seqlens .* holds 0 to 12 keys"):
        sparse_attn.attention_decode(*tensors(1, 12), cache_seqlens=lens)
    with pytest.raises(ValueError, match="sparse_attn.attention_decode: q has 3 dimensions"):
        sparse_attn.attention_decode(torch.ones(4, 1, 16), *tensors(1, 12)[1:], cache_seqlens=lens)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        (
            {"cache_seqlens": torch.tensor([4, 4])},
            ValueError,
            r"has shape \(2,\); pass int32 \[1\]",
        ),
        ({"cache_seqlens": torch.tensor([[4]])}, ValueError, r"has shape \(1, 1\)"),
        ({"cache_seqlens": 4.5}, TypeError, "cache_seqlens is torch.float32; pass int32"),
        ({"q_offset": 2.0}, TypeError, "q_offset is a float; pass an int"),
    ],
)
@pytest.mark.parametrize("paged", [False, True])
def test_wrong_lengths_and_offsets_of_a_cache(changes, error, text, paged):
    q, k, v = tensors(1, 16)
    more = {"cache_seqlens": 9} | changes
    if paged:
        k, v = (x.transpose(1, 2) for x in (k, v))
        more["block_table"] = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(error, match=f"sparse_attn.attention_decode: .*{text}"):
        sparse_attn.attention_decode(q, k, v, **more)


def test_wrong_parts_to_merge():
    out, lse = torch.ones(2, 3, 8), torch.ones(2, 3)
    with pytest.raises(ValueError, match="merge_states: 0 outs and 0 lses; pass as many of both"):
        sparse_attn.merge_states([], [])
    with pytest.raises(ValueError, match="merge_states: 1 outs and 2 lses"):
        sparse_attn.merge_states([out], [lse, lse])
    with pytest.raises(ValueError, match=r"part 1 has out \(2, 3, 16\) .*part 0 has out"):
        sparse_attn.merge_states([out, torch.ones(2, 3, 16)], [lse, lse])
    with pytest.raises(ValueError, match=r"part 0 has out \(2, 3, 8\) and lse \(2, 2\)"):
        sparse_attn.merge_states([out], [torch.ones(2, 2)])


def test_unknown_capability(monkeypatch):
    monkeypatch.setenv("SPARSE_ATTN_CPU_CAPABILITY", "mmx")
    with pytest.raises(RuntimeError, match="CAPABILITY=mmx is unknown; known: .*scalar"):
        sparse_attn.attention(*tensors(2, 2))
