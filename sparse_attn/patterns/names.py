# SPDX-License-Identifier: Apache-2.0
"""What a user may write for a pattern: an object, a name, or one of these per head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sparse_attn.patterns.adaptive import Adaptive
from sparse_attn.patterns.anchor import AnchorAttention
from sparse_attn.patterns.base import Pattern
from sparse_attn.patterns.block_sparse import BlockSparse
from sparse_attn.patterns.flexprefill import FlexPrefill
from sparse_attn.patterns.hip import HiP, InfiniteHiP
from sparse_attn.patterns.per_head import PerHead
from sparse_attn.patterns.quest import Quest
from sparse_attn.patterns.sparge import SpargeAttention
from sparse_attn.patterns.static import AShape, Dense, SlidingWindow
from sparse_attn.patterns.strided import Dilated, StridedBlocks
from sparse_attn.patterns.vertical_slash import VerticalSlash
from sparse_attn.patterns.xattention import XAttention

# Defaults are the papers' (MInference's, but for HiP), so that a name means what users expect.
_NAMED: dict[str, Pattern] = {
    "adaptive": Adaptive(),
    "dense": Dense(),
    "a_shape": AShape(),
    "tri_shape": AShape(dense_tail=100),
    "anchor_attention": AnchorAttention(),
    "block_sparse": BlockSparse(top_k=100),
    "dilated": Dilated(),
    "flexprefill": FlexPrefill(),
    "hip": HiP(),
    "infinite_hip": InfiniteHiP(),
    "quest": Quest(),
    "sparge": SpargeAttention(),
    "strided_blocks": StridedBlocks(),
    "vertical_slash": VerticalSlash(),
    "xattention": XAttention(),
}
# Names that mean nothing without a number, and what to write instead.
_NEEDS_ARGUMENTS = {"sliding_window": SlidingWindow, "per_head": PerHead}


def pattern_names() -> tuple[str, ...]:
    """The names that stand for a pattern, sorted."""
    return tuple(sorted(_NAMED))


def resolve(
    pattern: Pattern | str | Sequence[Pattern | str] | Mapping[int, Pattern | str], num_heads: int
) -> Pattern:
    """The Pattern that a name, a list or dict of heads, or a Pattern stands for.

    Args:
        pattern: a Pattern; or a name: "dense", "a_shape" (sink 128, window 3968), "tri_shape" (the
            same with the last 100 rows dense), "block_sparse" (100 blocks of 64 a tile),
            "vertical_slash" (1000 columns, 6096 diagonals), "hip" (512 keys a tile), "infinite_hip"
            (2048 keys a tile), "xattention" (stride 16, 0.9 of the mass), "flexprefill" (0.9 of the
            mass), "sparge" (0.98 of the mass), "quest" (decoding, 2048 keys), "anchor_attention"
            (superblocks of 2048 rows, theta 12), "dilated" (sink 1024, every second of 8192
            diagonals), "strided_blocks" (32 local blocks of 64, every eighth column of blocks),
            "adaptive" (0.98 of the mass); or a list with one of these per query head; or a dict
            from every query head to one of these.
        num_heads: query heads, which a list or a PerHead must fit.

    Returns:
        A Pattern for `num_heads` heads.

    Raises:
        TypeError: it is neither of these.
        ValueError: the name is unknown or needs arguments, or a list does not fit `num_heads`.

    Example:
        >>> resolve("tri_shape", num_heads=8)
        AShape(sink=128, window=3968, dense_tail=100)
    """
    if type(pattern) is str and pattern in _NAMED:  # first, since asking an ABC takes long
        return _NAMED[pattern]
    if isinstance(pattern, PerHead):
        pattern.check_num_heads(num_heads)
        return pattern
    if isinstance(pattern, (Pattern, str)):
        return _resolve_one(pattern)
    if isinstance(pattern, Mapping):
        by_head = PerHead({head: _resolve_one(member) for head, member in pattern.items()})
        by_head.check_num_heads(num_heads)
        return by_head
    if not isinstance(pattern, Sequence):
        raise TypeError(f"sparse_attn.patterns.resolve: pattern is {_what_to_pass(pattern)}")
    if len(pattern) != num_heads:
        raise ValueError(
            f"sparse_attn.patterns.resolve: {len(pattern)} patterns for {num_heads} query heads; "
            "pass one per head."
        )
    members = [_resolve_one(member) for member in pattern]
    if members and all(member == members[0] for member in members):
        return members[0]  # no grouping to do, and the index may be one that all heads share
    return PerHead(members)


def _what_to_pass(given: object) -> str:
    if isinstance(given, type):
        return f"the class {given.__name__}; pass an instance, {given.__name__}(...)."
    if isinstance(given, torch.Tensor):
        return (
            f"a tensor {tuple(given.shape)}; for a boolean mask pass "
            "SparseIndex.from_dense_mask(mask), for a grid of blocks SparseIndex.from_blocks(...)."
        )
    return (
        f"a {type(given).__name__}; pass a Pattern, a name ({_known()}), a list of them per query "
        "head, or a dict from head to one."
    )


def _resolve_one(pattern: Pattern | str) -> Pattern:
    if isinstance(pattern, Pattern):
        return pattern
    if not isinstance(pattern, str):
        raise TypeError(
            f"sparse_attn.patterns.resolve: {pattern!r} is a {type(pattern).__name__}; "
            f"pass a Pattern or a name ({_known()})."
        )
    if pattern in _NEEDS_ARGUMENTS:
        name = _NEEDS_ARGUMENTS[pattern].__name__
        raise ValueError(
            f"sparse_attn.patterns.resolve: pattern={pattern!r} needs arguments; "
            f"pass {name}(...) from sparse_attn.patterns."
        )
    if pattern not in _NAMED:
        raise ValueError(
            f"sparse_attn.patterns.resolve: pattern={pattern!r} is unknown; known names are "
            f"{_known()}."
        )
    return _NAMED[pattern]


def _known() -> str:
    return ", ".join(repr(name) for name in pattern_names())
