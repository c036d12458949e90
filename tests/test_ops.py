# SPDX-License-Identifier: Apache-2.0
"""The registered operators as torch sees them: schemas, fake tensors, autograd keys, export."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import sparse_attn
from sparse_attn import AShape, Dense, PerHead, SlidingWindow, SparseIndex, ops

OPS = torch.ops.sparse_attn
ALL_CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
# The backward's own backward raises, so nothing that differentiates it can pass.
FIRST_ORDER_CHECKS = ("test_schema", "test_faketensor")

BATCH, HEADS, HEADS_KV, SEQLEN_Q, SEQLEN_K, HEAD_DIM, HEAD_DIM_V = 2, 4, 2, 33, 41, 16, 24


def listed_index(*, columns: bool, bias: bool, bits: bool) -> SparseIndex:
    """Three tiles of 16 rows, one list for all heads; the second tile has no entry."""
    gen = torch.Generator().manual_seed(0)
    return SparseIndex.from_lists(
        seqlen_q=SEQLEN_Q,
        seqlen_k=SEQLEN_K,
        block_m=16,
        block_n=8,
        block_indptr=torch.tensor([[[0, 2, 2, 5]]]),
        block_indices=torch.tensor([0, 9, 1, 16, 36], dtype=torch.int32),
        column_indptr=torch.tensor([[[0, 1, 1, 3]]]) if columns else None,
        column_indices=torch.tensor([8, 0, 30], dtype=torch.int32) if columns else None,
        column_bias=torch.randn(3, generator=gen) if bias else None,
        block_bits_ids=torch.tensor([-1, 0, 1, -1, 0], dtype=torch.int32) if bits else None,
        block_bits=torch.randint(0, 1 << 16, (2, 8, 1), generator=gen) if bits else None,
    ).validate()


INDEXES = {
    "dense": SparseIndex.dense(SEQLEN_Q, SEQLEN_K),
    "streaming": SparseIndex.streaming(SEQLEN_Q, SEQLEN_K, sink=3, window=9, dense_tail=2),
    "blocks": listed_index(columns=False, bias=False, bits=False),
    "columns": listed_index(columns=True, bias=False, bits=False),
    "bias": listed_index(columns=True, bias=True, bits=False),
    "bits": listed_index(columns=True, bias=True, bits=True),
}


@dataclass(frozen=True)
class Call:
    """One call of the op; sizes are the module's constants."""

    index: str
    seq_ranges: bool = False
    sinks: bool = False
    softcap: float = 0.0
    causal: bool = True
    dtype: torch.dtype = torch.float32


CALLS = [
    Call("dense"),
    Call("dense", causal=False, softcap=5.0, dtype=torch.bfloat16),
    Call("dense", seq_ranges=True),
    Call("streaming"),
    Call("streaming", seq_ranges=True, sinks=True),
    Call("blocks", dtype=torch.float16),
    Call("columns", sinks=True),
    Call("bias"),
    Call("bits", seq_ranges=True, sinks=True, softcap=5.0),
]


def call_id(call: Call) -> str:
    flags = [name for name in ("seq_ranges", "sinks", "softcap") if getattr(call, name)]
    return "-".join([call.index, *flags, str(call.dtype)[6:], *([] if call.causal else ["full"])])


each_call = pytest.mark.parametrize("call", CALLS, ids=call_id)


def rows(heads: int, seqlen: int, dim: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, heads, seqlen, dim, generator=gen).to(dtype)


def qkv(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [
        rows(HEADS, SEQLEN_Q, HEAD_DIM, dtype, 1),
        rows(HEADS_KV, SEQLEN_K, HEAD_DIM, dtype, 2),
        rows(HEADS_KV, SEQLEN_K, HEAD_DIM_V, dtype, 3),
    ]


def call_args(call: Call) -> tuple:
    """All that follows q, k and v in the schema, without sinks."""
    # Batch entry 1 leaves rows and keys out at both ends.
    ranges = torch.tensor([[0, 33, 0, 41, 8], [1, 30, 2, 37, 7]], dtype=torch.int32)
    return (
        *INDEXES[call.index].op_args(),
        ranges if call.seq_ranges else None,
        SEQLEN_K - SEQLEN_Q,
        call.causal,
        HEAD_DIM**-0.5,
        call.softcap,
    )


def sinks_of(call: Call) -> torch.Tensor | None:
    return torch.linspace(-1.0, 1.0, HEADS) if call.sinks else None


# --- opcheck --------------------------------------------------------------------------------------


@each_call
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_opcheck_attention(call, grad):
    q, k, v = (x.requires_grad_(grad) for x in qkv(call.dtype))
    sinks = sinks_of(call)
    if sinks is not None:
        sinks.requires_grad_(grad)
    opcheck(OPS.attention.default, (q, k, v, *call_args(call), sinks), test_utils=ALL_CHECKS)


@pytest.mark.parametrize("which", range(3), ids=["q", "k", "v"])
def test_opcheck_attention_one_gradient(which):
    inputs = qkv()
    inputs[which].requires_grad_()
    args = (*inputs, *call_args(Call("bias")), None)
    opcheck(OPS.attention.default, args, test_utils=ALL_CHECKS)


@each_call
def test_opcheck_attention_backward(call):
    q, k, v = qkv(call.dtype)
    args = call_args(call)
    out, lse = OPS.attention(q, k, v, *args, sinks_of(call))
    delta = torch.zeros_like(lse)
    opcheck(
        OPS.attention_backward.default,
        (torch.ones_like(out), delta, lse, q, k, v, *args),
        test_utils=FIRST_ORDER_CHECKS,
    )


@pytest.mark.parametrize("name", INDEXES)
def test_opcheck_check_index(name):
    index = INDEXES[name]
    opcheck(
        OPS.check_index.default,
        (*index.op_args(), index.seqlen_q, index.seqlen_k),
        test_utils=ALL_CHECKS,
    )


def test_opcheck_can_fail():
    """A fake with the wrong strides is what opcheck is there to catch."""
    with torch.library._scoped_library("sparse_attn_test", "DEF") as library:
        library.define("rows(Tensor q) -> Tensor")
        library.impl("rows", lambda q: q.transpose(1, 2).contiguous().transpose(1, 2), "CPU")
        torch.library.register_fake(
            "sparse_attn_test::rows", lambda q: torch.empty_like(q), lib=library
        )
        op = torch.ops.sparse_attn_test.rows.default
        with pytest.raises(Exception, match="[Ss]tride"):
            opcheck(op, (rows(2, 4, 8, torch.float32, 0),), test_utils="test_faketensor")


# --- shapes and strides of the fakes --------------------------------------------------------------


def bhsd(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous()


def bshd(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def padded(x: torch.Tensor) -> torch.Tensor:
    """Rows of a wider tensor, as q, k and v of one fused projection are."""
    return torch.cat((x, x), dim=-1)[..., : x.shape[-1]]


LAYOUTS = {"bhsd": bhsd, "bshd": bshd, "padded": padded, "padded_bshd": lambda x: bshd(padded(x))}


def layout_of(tensors) -> list[tuple]:
    return [(x.shape, x.stride(), x.dtype, x.device) for x in tensors]


@pytest.mark.parametrize("layout_kv", LAYOUTS)
@pytest.mark.parametrize("layout_q", LAYOUTS)
@pytest.mark.parametrize("seqlen_q", [33, 1, 0])
def test_fake_strides_are_the_real_ones(layout_q, layout_kv, seqlen_q):
    q, k, v = qkv(torch.bfloat16)
    q = LAYOUTS[layout_q](q[:, :, :seqlen_q])
    k, v = LAYOUTS[layout_kv](k), LAYOUTS[layout_kv](v)
    index = SparseIndex.dense(seqlen_q, SEQLEN_K)
    settings = (None, SEQLEN_K - seqlen_q, True, 0.25, 0.0)

    def run(q, k, v, *index_args):
        out, lse = OPS.attention(q, k, v, *index_args, *settings, None)
        delta = torch.zeros_like(lse)
        grads = OPS.attention_backward(out, delta, lse, q, k, v, *index_args, *settings)
        return layout_of([out, lse, *grads])

    real = run(q, k, v, *index.op_args())
    with FakeTensorMode() as mode:
        fake = run(
            *(mode.from_tensor(x) for x in (q, k, v)),
            *(mode.from_tensor(x) if torch.is_tensor(x) else x for x in index.op_args()),
        )
    assert fake == real


def test_out_is_laid_out_as_q():
    """A model that keeps [batch, seqlen, heads, head_dim] gets its output without a copy."""
    q, k, v = (bshd(x) for x in qkv())
    out = sparse_attn.attention(q, k, v)
    assert out.transpose(1, 2).is_contiguous()
    assert sparse_attn.attention(bhsd(q), k, v).is_contiguous()


# --- dispatch -------------------------------------------------------------------------------------


def test_ops_have_kernels_for_the_cpu_only():
    """An operator that another device would silently run on the CPU has no place here."""
    for name in ("attention", "attention_backward", "check_index"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sparse_attn::{name}", "CPU")
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"sparse_attn::{name}", "CUDA")


def test_meta_tensors_give_shapes():
    q, k, v = (x.to("meta") for x in qkv())
    index = [x.to("meta") if torch.is_tensor(x) else x for x in INDEXES["bits"].op_args()]
    out, lse = OPS.attention(q, k, v, *index, None, 8, True, 0.25, 0.0, None)
    assert out.shape == (BATCH, HEADS, SEQLEN_Q, HEAD_DIM_V) and out.is_meta
    assert lse.shape == (BATCH, HEADS, SEQLEN_Q) and lse.dtype == torch.float32


def test_cpu_capability_names_the_kernels(monkeypatch):
    monkeypatch.setenv("SPARSE_ATTN_CPU_CAPABILITY", "scalar")
    assert ops.cpu_capability() == "scalar"
    monkeypatch.setenv("SPARSE_ATTN_CPU_CAPABILITY", "abacus")
    with pytest.raises(RuntimeError, match="abacus is unknown; known: .*scalar"):
        ops.cpu_capability()


def test_vmap_is_a_loop_over_calls():
    q, k, v = qkv()
    many = torch.stack([q, -q, 2 * q])
    mapped = torch.vmap(lambda q: sparse_attn.attention(q, k, v))(many)
    looped = torch.stack([sparse_attn.attention(q, k, v) for q in many])
    assert torch.equal(mapped, looped)


# --- corrupt calls --------------------------------------------------------------------------------


def test_check_index_names_the_fault():
    index = INDEXES["columns"]
    args = list(index.op_args())
    args[2] = args[2].clone()
    args[2][1] = SEQLEN_K
    with pytest.raises(RuntimeError, match="check_index: .*block"):
        OPS.check_index(*args, index.seqlen_q, index.seqlen_k)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("column_indptr", torch.zeros(3, 1, 4, dtype=torch.int64), "column_indptr"),
        ("block_indices", torch.zeros(5, dtype=torch.int64), "block_indices has the wrong dtype"),
        ("block_m", 24, "block_m=24"),
        ("block_n", 12, "block_n=12"),
        ("seq_ranges", torch.tensor([[0, 99, 0, 41, 8]] * 2, dtype=torch.int32), "leaves q"),
        ("sinks", torch.zeros(HEADS - 1), "sinks"),
    ],
)
def test_the_op_checks_what_it_is_given(name, value, message):
    args = [*qkv(), *call_args(Call("blocks")), None]
    names = [argument.name for argument in OPS.attention.default._schema.arguments]
    args[names.index(name)] = value
    with pytest.raises(RuntimeError, match=message):
        OPS.attention(*args)


# --- export ---------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    """The smallest module that attends with a pattern of its own."""

    def __init__(self, pattern):
        super().__init__()
        self.pattern = pattern
        self.project = torch.nn.Linear(32, 3 * 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in self.project(x).chunk(3, -1))
        return sparse_attn.attention(q, k, v, self.pattern).transpose(1, 2).flatten(2)


EXPORTED = {
    "name": "a_shape",
    "dense": Dense(),
    "a_shape": AShape(sink=2, window=8),
    "per_head": PerHead([SlidingWindow(8), Dense()]),
}


@pytest.mark.parametrize("pattern", EXPORTED.values(), ids=EXPORTED)
def test_export_with_any_length(pattern):
    torch.manual_seed(0)
    layer = Layer(pattern).eval()
    seqlen = torch.export.Dim("seqlen", min=2, max=4096)
    x = torch.randn(1, 40, 32)
    program = torch.export.export(layer, (x,), dynamic_shapes=({1: seqlen},))
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(OPS.attention.default) == 1
    for length in (40, 67):
        x = torch.randn(1, length, 32)
        assert torch.equal(program.module()(x), layer(x))


def test_a_module_that_cannot_be_loaded_says_why(tmp_path):
    """What `load_cuda` rests on: the module is not there, or is no library for this torch."""
    from sparse_attn.ops import library

    causes = ("built without CUDA", "does not fit this torch")
    with pytest.raises(ImportError, match="x.so is missing: built without CUDA"):
        library._load(str(tmp_path / "x.so"), *causes)
    (tmp_path / "x.so").write_bytes(b"\x7fELF of another machine")
    with pytest.raises(ImportError, match="Likely: does not fit this torch"):
        library._load(str(tmp_path / "x.so"), *causes)
