# SPDX-License-Identifier: Apache-2.0
"""Presets: which cases answer which question, with the bounds that they should keep to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from sparse_attn import ops

from . import peers
from .cases import Case, Choice, Problem
from .peers import PEERS
from .runner import Goal, Group

DENSE = Choice()
SDPA, FLEX, VLLM = "torch SDPA", "FlexAttention", "vLLM"
ORT_MHA, ORT_GQA, ORT_SPARSE = (
    "ORT MultiHeadAttention",
    "ORT GroupQueryAttention",
    "ORT SparseAttention",
)
CAPABILITIES = ("scalar", "neon", "avx2", "avx512", "avx512_bf16")


@dataclass(frozen=True)
class Options:
    """What the command line may change of a suite; None or empty leaves the preset.

    Attributes:
        seqlen: lengths in tokens.
        head_dim: head dimensions.
        dtype: names of dtypes.
        heads: query heads.
        heads_kv: KV heads.
        batch: sequences.
        threads: of every contestant.
        density: densities of the sparse cases.
        kind: kinds of sparse choices.
        block_m: rows of a tile.
        block_n: keys of a block.
        capability: instruction sets that ours is held to, one after another.
        peers: keys of PEERS that take part.
        phase: "prefill" or "decode", for runs without a suite.
    """

    seqlen: tuple[int, ...] = ()
    head_dim: tuple[int, ...] = ()
    dtype: tuple[str, ...] = ()
    heads: int | None = None
    heads_kv: int | None = None
    batch: int = 1
    threads: int = 1
    density: tuple[float, ...] = ()
    kind: tuple[str, ...] = ()
    block_m: int = 64
    block_n: int = 64
    capability: tuple[str | None, ...] = (None,)
    peers: tuple[str, ...] = tuple(PEERS)
    phase: str = "prefill"

    @property
    def implementations(self) -> list[str]:
        """Names of the peers that take part."""
        return [name for peer in self.peers for name in PEERS[peer]]

    def kv_heads(self, heads: int) -> int:
        """KV heads beside so many query heads."""
        return heads if self.heads_kv is None else self.heads_kv


def _can(capability: str) -> bool:
    """Whether this CPU runs that instruction set."""
    return CAPABILITIES.index(capability) <= CAPABILITIES.index(_fastest())


def _fastest() -> str:
    name = ops.cpu_capability()
    return name if name in CAPABILITIES else "scalar"


def _prefill_problem(options: Options, dtype: str, seqlen: int, head_dim: int) -> Problem:
    heads = options.heads or 1
    return Problem(dtype, seqlen, seqlen, head_dim, heads, options.kv_heads(heads), options.batch)


def _dense_peers(options: Options, case: Case, *, without: Sequence[str] = ()) -> list[Case]:
    return [
        case.with_(by=name, choice=DENSE, capability=None)
        for name in options.implementations
        if name not in without and name != ORT_SPARSE
    ]


def _sparse_peers(options: Options, case: Case) -> list[Case]:
    able = [n for n in options.implementations if n in (FLEX, ORT_SPARSE)]
    return [case.with_(by=name, capability=None) for name in able]


# ------------------------------------------------------------------------------ suites

_SHARE = {
    (128, "float32"): 0.90,
    (128, "bfloat16"): 0.86,
    (64, "float32"): 0.88,
    (64, "bfloat16"): 0.80,
}
_OVER_SDPA = {"float32": 2.5, "bfloat16": 4.8, "float16": 3.5}
_OVER_VLLM = {"float32": 1.1, "bfloat16": 2.2}


def prefill(options: Options) -> Iterator[Group]:
    """Dense causal attention: share of the peak, against the peers, dtypes and instruction sets."""
    dtypes = options.dtype or ("float32", "bfloat16", "float16")
    for seqlen, dim in product(options.seqlen or (8192,), options.head_dim or (128, 64)):
        ours = {
            dtype: Case(_prefill_problem(options, dtype, seqlen, dim), threads=options.threads)
            for dtype in dtypes
        }
        cases: list[Case] = []
        goals: list[Goal] = []
        wide = dim == 128
        for dtype, case in ours.items():
            cases += [case, *_dense_peers(options, case)]
            text = f"dense, {dtype}, head_dim {dim}"
            goals.append(Goal(f"{text}: share of peak", case, bound=_SHARE.get((dim, dtype))))
            for peer, bounds in ((SDPA, _OVER_SDPA), (VLLM, _OVER_VLLM)):
                over = case.with_(by=peer)
                bound = bounds.get(dtype) if wide else None
                text_peer = f"{text}: speed-up over {peer}"
                goals.append(Goal(text_peer, case, over=over, bound=bound, inverse=True))
        if "float32" in ours:
            extra = _instruction_sets(ours, dim)
            cases += [goal.case for goal in extra if goal.case not in cases]
            goals += extra
        yield Group(f"prefill, {seqlen} tokens, head_dim {dim}", cases, goals)


def _instruction_sets(ours: dict[str, Case], dim: int) -> list[Goal]:
    """Widened dtypes against float32, and AVX2 against its own peak."""
    goals = []
    fp32 = ours["float32"]
    if "float16" in ours:
        text = f"float16 over float32, head_dim {dim}: time"
        goals.append(Goal(text, ours["float16"], over=fp32, bound=1.08, at_least=False))
    if "bfloat16" in ours and _fastest() == "avx512_bf16":
        plain = ours["bfloat16"].with_(capability="avx512")
        text = f"bfloat16 without its instruction over float32, head_dim {dim}: time"
        goals.append(Goal(text, plain, over=fp32, bound=1.08, at_least=False))
    if _can("avx2") and _fastest() != "avx2":
        narrow = fp32.with_(capability="avx2")
        text = f"AVX2, float32, head_dim {dim}: share of its own peak"
        goals.append(Goal(text, narrow, bound=0.85 if dim == 128 else None))
    return goals


_TIME_OVER_DENSITY = {0.25: 1.03, 0.1: 1.05, 0.05: 1.08, 0.02: 1.18}
_OVER_FLEX = {"float32": 2.0, "bfloat16": 6.0}


def density(options: Options) -> Iterator[Group]:
    """Time against density, FlexAttention on the same blocks, and two threads on ragged heads."""
    densities = options.density or (0.5, 0.25, 0.1, 0.05, 0.02)
    dtypes = options.dtype or ("float32", "bfloat16")
    for seqlen, dim in product(options.seqlen or (32768,), options.head_dim or (128,)):
        for dtype in dtypes:
            ours = Case(_prefill_problem(options, dtype, seqlen, dim), threads=options.threads)
            slow = (FLEX, ORT_MHA, ORT_GQA)
            cases = [ours, *_dense_peers(options, ours, without=slow)]
            goals: list[Goal] = []
            for share in densities:
                blocks = Choice("blocks", share, options.block_m, options.block_n)
                case = ours.with_(choice=blocks)
                cases.append(case)
                text = f"{dtype}, {seqlen} tokens, blocks {100 * share:g}%"
                bound = _TIME_OVER_DENSITY.get(share)
                what = f"{text}: time over (density x own dense time)"
                goals.append(
                    Goal(what, case, over=ours, bound=bound, at_least=False, per_density=True)
                )
                if share == 0.1:
                    cases += _sparse_peers(options, case)
                    over = case.with_(by=FLEX)
                    bound = _OVER_FLEX.get(dtype)
                    what = f"{text}: speed-up over FlexAttention"
                    goals.append(Goal(what, case, over=over, bound=bound, inverse=True))
            yield Group(f"density, {dtype}, {seqlen} tokens, head_dim {dim}", cases, goals)
    yield _two_threads(options)


def _two_threads(options: Options) -> Group:
    seqlen = min(8192, *(options.seqlen or (8192,)))
    dim = (options.head_dim or (128,))[0]
    problem = Problem("float32", seqlen, seqlen, dim, heads=8, heads_kv=8)
    one = Case(problem, Choice("ragged", 0.1), threads=1)
    two = one.with_(threads=2)
    text = "two threads against one, 8 ragged heads at 10%"
    goals = [
        Goal(f"{text}: speed-up (wall)", two, one, 1.9, inverse=True, clock="wall"),
        Goal(f"{text}: growth of CPU time", two, one, 1.05, at_least=False, clock="cpu"),
    ]
    return Group(f"threads, {seqlen} tokens, head_dim {dim}", [one, two], goals)


def short(options: Options) -> Iterator[Group]:
    """64 to 2,048 tokens, dense and sparse, against torch SDPA."""
    dims = options.head_dim or (64,)
    dtypes = options.dtype or ("float32", "bfloat16", "float16")
    for dtype, dim in product(dtypes, dims):
        cases: list[Case] = []
        goals: list[Goal] = []
        for seqlen in options.seqlen or (64, 128, 256, 512, 1024, 2048):
            heads = options.heads or 8
            kv = options.kv_heads(heads)
            problem = Problem(dtype, seqlen, seqlen, dim, heads, kv, options.batch)
            dense = Case(problem, threads=options.threads)
            cases += _dense_peers(options, dense, without=(FLEX,))
            for capability, choice in product(
                options.capability, (DENSE, Choice("blocks", 0.5), Choice("columns", 0.5))
            ):
                case = dense.with_(choice=choice, capability=capability)
                cases.append(case)
                text = f"{case}, {seqlen} tokens: speed-up over {SDPA}"
                goals.append(Goal(text, case, dense.with_(by=SDPA), bound=1.0, inverse=True))
        yield Group(f"short, {dtype}, head_dim {dim}", cases, goals)


def columns(options: Options) -> Iterator[Group]:
    """Random single keys, finer tiles and other blocks, against 64 x 64 blocks of as many keys."""
    share = (options.density or (0.1,))[0]
    dtypes = options.dtype or ("float32", "bfloat16", "float16")
    for seqlen, dim in product(options.seqlen or (8192,), options.head_dim or (128,)):
        cases: list[Case] = []
        goals: list[Goal] = []
        for dtype in dtypes:
            ours = Case(
                _prefill_problem(options, dtype, seqlen, dim),
                Choice("blocks", share),
                threads=options.threads,
            )
            others = {
                "columns over blocks": (Choice("columns", share), 1.1),
                "block_m 16 over 64": (Choice("blocks", share, block_m=16), 1.2),
                "block_m 128 over 64": (Choice("blocks", share, block_m=128), None),
                "block_n 16 over 64": (Choice("blocks", share, block_n=16), None),
                "block_n 128 over 64": (Choice("blocks", share, block_n=128), None),
            }
            cases.append(ours)
            for text, (choice, bound) in others.items():
                case = ours.with_(choice=choice)
                cases.append(case)
                text = f"{dtype}, {text}, {100 * share:g}%: time"
                goals.append(Goal(text, case, over=ours, bound=bound, at_least=False))
        yield Group(f"columns, {seqlen} tokens, head_dim {dim}", cases, goals)


_DECODE_SHARE = {1: 0.92, 4: 0.85, 8: 0.75}
_DECODE_OVER_SDPA = {"float32": 7.0, "bfloat16": 50.0}
_TOKENS_OVER_STREAMING = {"float32": 0.85, "bfloat16": 0.75}


def decode(options: Options) -> Iterator[Group]:
    """One new row over a long cache: share of the memory's read rate, lists, peers."""
    for seqlen, dim in product(options.seqlen or (32768,), options.head_dim or (128,)):
        kv = options.heads_kv or 8
        for dtype in options.dtype or ("float32", "bfloat16"):
            cases: list[Case] = []
            goals: list[Goal] = []
            for group in (1, 4, 8):
                problem = Problem(dtype, 1, seqlen, dim, kv * group, kv, options.batch)
                case = Case(problem, threads=options.threads)
                cases.append(case)
                bound = _DECODE_SHARE.get(group)
                goals.append(
                    Goal(f"decode, {dtype}, group of {group}: share of read", case, None, bound)
                )
                if group == 4:
                    cases += _dense_peers(options, case, without=(FLEX, ORT_MHA))
                    text = f"decode, {dtype}, heads {kv * group}/{kv}: speed-up over"
                    bound = _DECODE_OVER_SDPA.get(dtype)
                    goals.append(
                        Goal(f"{text} {SDPA}", case, case.with_(by=SDPA), bound, inverse=True)
                    )
                    goals.append(Goal(f"{text} {VLLM}", case, case.with_(by=VLLM), inverse=True))
            # Lists of half of the keys: more than the caches hold.
            half = Case(Problem(dtype, 1, seqlen, dim, 4 * kv, kv, options.batch))
            half = half.with_(choice=Choice("streaming", 0.5), threads=options.threads)
            tokens = half.with_(choice=Choice("columns", 0.5))
            cases += [half, tokens, half.with_(choice=Choice("blocks", 0.5))]
            text = f"decode, {dtype}, token lists: rate over streaming's"
            bound = _TOKENS_OVER_STREAMING.get(dtype)
            goals.append(Goal(text, tokens, half, bound, inverse=True))
            yield Group(f"decode, {dtype}, {seqlen} keys, head_dim {dim}", cases, goals)


def backward(options: Options) -> Iterator[Group]:
    """Gradients against the forward pass over the same keys, and against torch SDPA's."""
    share = (options.density or (0.1,))[0]
    dtypes = options.dtype or ("float32", "bfloat16")
    choices = (DENSE, Choice("blocks", share), Choice("columns", share))
    for seqlen, dim in product(options.seqlen or (8192,), options.head_dim or (128,)):
        for dtype in dtypes:
            problem = _prefill_problem(options, dtype, seqlen, dim)
            cases: list[Case] = []
            goals: list[Goal] = []
            for choice in choices:
                ours = Case(problem, choice, threads=options.threads)
                gradients = ours.with_(by=peers.BACKWARD)
                cases += [ours, gradients]
                text = f"{dtype}, {choice}: time of backward over forward"
                goals.append(Goal(text, gradients, over=ours, bound=3.5, at_least=False))
                if choice is DENSE and "sdpa" in options.peers:
                    other = ours.with_(by=peers.SDPA_BACKWARD)
                    cases += [ours.with_(by=SDPA), other]
                    text = f"{dtype}, {choice}: speed-up of backward over {SDPA}'s"
                    goals.append(Goal(text, gradients, over=other, inverse=True))
            yield Group(f"backward, {dtype}, {seqlen} tokens, head_dim {dim}", cases, goals)


def overhead(options: Options) -> Iterator[Group]:
    """What a call costs when there is almost nothing to compute."""
    seqlen, dim = (options.seqlen or (16,))[0], (options.head_dim or (64,))[0]
    for dtype in options.dtype or ("float32", "bfloat16"):
        problem = _prefill_problem(options, dtype, seqlen, dim)
        ours = Case(problem, threads=options.threads)
        listed = ours.with_(choice=Choice("blocks", 1.0))
        sdpa = ours.with_(by=SDPA)
        op = ours.with_(by="sparse_attn op")
        cases = [ours, op, listed, *_dense_peers(options, ours)]
        text = f"{dtype}, {problem.heads} head, {seqlen} tokens"
        goals = [
            Goal(f"{text}: microseconds", ours, bound=25.0, at_least=False, microseconds=True),
            Goal(f"{text}: time over {SDPA}'s", ours, over=sdpa, at_least=False),
            Goal(f"{text}, ready index: time over {SDPA}'s", listed, over=sdpa, at_least=False),
        ]
        yield Group(f"overhead, {dtype}", cases, goals)


SUITES: dict[str, Callable[[Options], Iterator[Group]]] = {
    "prefill": prefill,
    "density": density,
    "short": short,
    "columns": columns,
    "decode": decode,
    "backward": backward,
    "overhead": overhead,
}


def custom(options: Options) -> Iterator[Group]:
    """What the command line describes, without a suite: every combination of its lists."""
    for seqlen, dim, dtype in product(
        options.seqlen or (4096,), options.head_dim or (128,), options.dtype or ("float32",)
    ):
        if options.phase == "decode":
            heads = options.heads or 8
            kv = options.kv_heads(heads)
            problem = Problem(dtype, 1, seqlen, dim, heads, kv, options.batch)
        else:
            problem = _prefill_problem(options, dtype, seqlen, dim)
        dense = Case(problem, threads=options.threads)
        slow = (FLEX, ORT_MHA) if options.phase == "decode" else ()
        cases = _dense_peers(options, dense, without=slow)
        for share, kind in product(options.density or (1.0, 0.1), options.kind or ("blocks",)):
            choice = Choice(kind, share, options.block_m, options.block_n) if share < 1 else DENSE
            new = [dense.with_(choice=choice, capability=name) for name in options.capability]
            if share < 1 and kind in ("blocks", "ragged") and options.phase == "prefill":
                new += _sparse_peers(options, dense.with_(choice=choice))
            cases += [case for case in new if case not in cases]
        where = f"heads {problem.heads}/{problem.heads_kv}"
        yield Group(f"{options.phase}, {dtype}, {seqlen} tokens, head_dim {dim}, {where}", cases)
