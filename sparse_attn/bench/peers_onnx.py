# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime's attention operators, each a model of one node made in memory.

Layouts: query, key, value and output are [batch, seqlen, heads * head_dim]; caches are
[batch, heads_kv, capacity, head_dim]. Tensors are bound once, so a run copies nothing in or out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Keys
from .machine import Unavailable

_SCORES_LIMIT = 2 << 30  # bytes: MultiHeadAttention and GroupQueryAttention store all scores

Named = list[tuple[str, Tensor | None]]


def _modules() -> tuple[Any, Any]:
    try:
        return importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    except ImportError as error:
        raise Unavailable(f"{error.name} is not installed") from error


def session(
    op: str, inputs: Named, outputs: Named, attributes: dict[str, int], threads: int
) -> Callable[[], object]:
    """A call that runs one com.microsoft operator on these tensors, into these tensors.

    Args:
        op: name of the operator.
        inputs: in the operator's order; None where one is left out.
        outputs: likewise; may share memory with inputs (caches).
        attributes: of the node.
        threads: of the session's own pool.
    """
    onnx, runtime = _modules()
    helper, types = onnx.helper, onnx.TensorProto
    element = {
        torch.float32: types.FLOAT,
        torch.float16: types.FLOAT16,
        torch.bfloat16: types.BFLOAT16,
        torch.int32: types.INT32,
    }

    def described(values: Named) -> list[Any]:
        return [
            helper.make_tensor_value_info(name, element[value.dtype], list(value.shape))
            for name, value in values
            if value is not None
        ]

    def names(values: Named) -> list[str]:
        return [name if value is not None else "" for name, value in values]

    node = helper.make_node(op, names(inputs), names(outputs), domain="com.microsoft", **attributes)
    graph = helper.make_graph([node], op, described(inputs), described(outputs))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    # Waiting threads would take processor time from whoever runs next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    run = runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = run.io_binding()
    for bind, values in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, value in values:
            if value is not None:
                bind(name, "cpu", 0, element[value.dtype], tuple(value.shape), value.data_ptr())
    tensors = (inputs, outputs)  # the binding holds addresses only

    def call() -> object:
        return tensors and run.run_with_iobinding(binding)

    return call


def prepare(
    op: str, case: Case, inputs: tuple[Tensor, Tensor, Tensor], keys: Keys
) -> tuple[Callable[[], object], Callable[[object], Tensor]]:
    """The call of one operator, and what reads its output as [batch, heads, seqlen, head_dim].

    Raises:
        Unavailable: the package is missing, or the operator cannot compute the case.
    """
    _, runtime = _modules()
    problem = case.problem
    if problem.torch_dtype == torch.bfloat16:
        raise Unavailable("it has no bfloat16 on CPUs")
    if (op == "SparseAttention") == (case.choice.kind == "dense"):
        raise Unavailable("dense operators for dense cases, the sparse one for blocks")
    scores = 4 * problem.batch * problem.heads * problem.seqlen_q * problem.seqlen_k
    if op != "SparseAttention" and scores > _SCORES_LIMIT:
        raise Unavailable(f"it would store {scores >> 20} MiB of scores")
    q = _flat(inputs[0])
    out = torch.empty_like(q)
    build = {
        "MultiHeadAttention": _multi_head,
        "GroupQueryAttention": _group_query,
        "SparseAttention": _sparse,
    }[op]
    feeds, results, attributes = build(case, inputs, keys)
    attributes["num_heads"] = problem.heads
    try:
        call = session(op, [("q", q), *feeds], [("out", out), *results], attributes, case.threads)
        call()
    except Exception as error:  # its exceptions derive from nothing narrower
        if type(error).__module__.startswith(runtime.__name__):
            raise Unavailable(str(error).replace("\n", " ")[:120]) from error
        raise
    return call, lambda _: out.view(*out.shape[:2], problem.heads, -1).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    """[batch, heads, seqlen, dim] to [batch, seqlen, heads * dim], copied."""
    return x.transpose(1, 2).flatten(2).contiguous()


Parts = tuple[Named, Named, dict[str, int]]


def _multi_head(case: Case, inputs: tuple[Tensor, Tensor, Tensor], keys: Keys) -> Parts:
    problem = case.problem
    if problem.heads != problem.heads_kv or problem.phase == "decode":
        raise Unavailable("MultiHeadAttention: prefill with as many KV heads as heads only")
    _, k, v = inputs
    return [("k", _flat(k)), ("v", _flat(v))], [], {"unidirectional": 1}


def _group_query(case: Case, inputs: tuple[Tensor, Tensor, Tensor], keys: Keys) -> Parts:
    """In decode the newest rows are appended to a cache that is updated in place."""
    problem = case.problem
    _, k, v = inputs
    past: Named = [("past_k", None), ("past_v", None)]
    present = [torch.empty_like(k), torch.empty_like(v)]
    if problem.phase == "decode":
        present = [k.clone(), v.clone()]
        past = [("past_k", present[0]), ("past_v", present[1])]
    last = torch.full((problem.batch,), problem.seqlen_k - 1, dtype=torch.int32)
    total = torch.tensor([problem.seqlen_k], dtype=torch.int32)
    feeds: Named = [
        ("k", _flat(k[:, :, problem.offset :])),
        ("v", _flat(v[:, :, problem.offset :])),
        *past,
        ("last", last),
        ("total", total),
    ]
    results: Named = [("present_k", present[0]), ("present_v", present[1])]
    return feeds, results, {"kv_num_heads": problem.heads_kv}


def _sparse(case: Case, inputs: tuple[Tensor, Tensor, Tensor], keys: Keys) -> Parts:
    problem, choice = case.problem, case.choice
    if problem.phase == "decode" or choice.kind not in ("blocks", "ragged"):
        raise Unavailable("SparseAttention: prefill with block lists only")
    if keys.block_m != keys.block_n or problem.heads != problem.heads_kv:
        raise Unavailable("SparseAttention: square blocks and one layout per KV head only")
    _, k, v = inputs
    grid = keys.grid[0]  # [layouts, tiles, blocks]
    counts = grid.sum(-1)
    rows = torch.nn.functional.pad(counts.cumsum(-1), (1, 0)).int().contiguous()
    columns = torch.full((grid.shape[0], int(counts.sum(-1).max())), -1, dtype=torch.int32)
    for layout in range(grid.shape[0]):
        used = grid[layout].nonzero()[:, 1].int()
        columns[layout, : len(used)] = used
    capacity = grid.shape[2] * keys.block_n
    shape = (problem.batch, problem.heads_kv, capacity, problem.head_dim)
    cache_k, cache_v = torch.zeros(shape, dtype=k.dtype), torch.zeros(shape, dtype=k.dtype)
    feeds: Named = [
        ("k", _flat(k)),
        ("v", _flat(v)),
        ("past_k", cache_k),
        ("past_v", cache_v),
        ("rows", rows),
        ("columns", columns),
        ("total", torch.tensor([problem.seqlen_k], dtype=torch.int32)),
        ("lengths", torch.full((problem.batch,), problem.seqlen_k, dtype=torch.int32)),
    ]
    results: Named = [("present_k", cache_k), ("present_v", cache_v)]
    attributes = {"kv_num_heads": problem.heads_kv, "sparse_block_size": keys.block_n}
    return feeds, results, attributes
