# SPDX-License-Identifier: Apache-2.0
"""HiPState: a hierarchical search that is not run anew for every token that is decoded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_attn.index import SparseIndex
from sparse_attn.ops.hip import Pieces
from sparse_attn.patterns.base import (
    PatternState,
    check_int,
    offset_or_default,
    scale_or_default,
)
from sparse_attn.patterns.hip import HierarchicalPattern

# InfiniteHiP's, for the last of its three stages and for fewer.
_INTERVALS = (32, 16, 8)
_NEVER = -(1 << 62)  # a T_i that no call has


class HiPState(PatternState):
    """A `HiP` or `InfiniteHiP` whose stages are refreshed every so many tokens of a decode.

    Let T be the position of a call's last row, plus 1, and T_i what it was when stage i last ran.
    In a call of one tile of rows (a decode step, or a few tokens at once) stage i runs

        if it never ran, if T - T_i >= intervals[i], if T < T_i (tokens were taken back),
        or if the stage before it runs,

    on what the stage before it keeps or kept; otherwise what it kept is taken again. Sinks and the
    window are always those of the call. A call in which stage 0 runs chooses what the pattern
    alone does. Between two runs, keys that leave the window are seen again only once a stage that
    can choose them runs: keep window above the intervals, as InfiniteHiP's defaults do.

    A call of more rows than a tile holds (a prefill) is built by the pattern alone, and whatever
    was kept is forgotten.

    Args:
        pattern: the search.
        intervals: tokens from one run of a stage to the next, one per stage; by default the last
            of InfiniteHiP's 32, 16 and 8.

    Raises:
        TypeError: `pattern` is no such search, or an interval no int.
        ValueError: an interval is below 1, or there is not one per stage.

    Example:
        >>> import torch, sparse_attn
        >>> state = sparse_attn.HiPState(sparse_attn.InfiniteHiP())
        >>> q, k, v = torch.randn(1, 2, 1, 64), *torch.randn(2, 1, 2, 5000, 64)
        >>> sparse_attn.attention_decode(q, k, v, state).shape
        torch.Size([1, 2, 1, 64])
    """

    def __init__(
        self, pattern: HierarchicalPattern, intervals: Sequence[int] | None = None
    ) -> None:
        if not isinstance(pattern, HierarchicalPattern):
            raise TypeError(
                f"sparse_attn.HiPState: pattern is a {type(pattern).__name__}; "
                "pass a HiP or an InfiniteHiP."
            )
        chosen = _INTERVALS[-pattern.num_stages :] if intervals is None else tuple(intervals)
        for interval in chosen:
            check_int("HiPState", "an interval", interval, 1)
        if len(chosen) != pattern.num_stages:
            raise ValueError(
                f"sparse_attn.HiPState: {len(chosen)} intervals for {pattern.num_stages} stages; "
                "pass one per stage."
            )
        self.pattern = pattern
        self.intervals = chosen
        self._members: dict[int, HiPState] = {}
        self._ends: list[int]
        self._kept: list[Pieces | None]
        self._forget()

    def __repr__(self) -> str:
        return f"HiPState({self.pattern!r}, intervals={self.intervals})"

    def build(
        self,
        q: Tensor,
        k: Tensor,
        *,
        causal: bool = True,
        softmax_scale: float | None = None,
        q_offset: int | None = None,
    ) -> SparseIndex:
        """See `Pattern.build`.

        Raises:
            ValueError: as the pattern, or the batch or heads are not those of the calls before.
        """
        rows = q.shape[2] if q.dim() == 4 else 0
        if rows > self.pattern.block_m or rows == 0:
            self._forget()
            return self.pattern.build(
                q, k, causal=causal, softmax_scale=softmax_scale, q_offset=q_offset
            )
        self.pattern.check_call(q, k, causal)
        scale, offset = scale_or_default(q, softmax_scale), offset_or_default(q, k, q_offset)
        self._check_same_call(q, k)
        end = offset + rows
        refresh = False
        for stage in range(self.pattern.num_stages):
            refresh = refresh or self._is_due(stage, end)
            if refresh:
                before = self._kept[stage - 1] if stage > 0 else None
                self._kept[stage] = self.pattern.run_stage(
                    stage, q, k, before, softmax_scale=scale, q_offset=offset
                )
                self._ends[stage] = end
        leaves = self._kept[-1]
        assert leaves is not None
        return self.pattern.index_of(leaves, seqlen_q=rows, seqlen_k=k.shape[2], q_offset=offset)

    def of_sequence(self, sequence: int) -> HiPState:
        """See `PatternState.of_sequence`."""
        if sequence not in self._members:
            self._members[sequence] = HiPState(self.pattern, self.intervals)
        return self._members[sequence]

    def state_dict(self) -> dict[str, Tensor]:
        """See `PatternState.state_dict`.

        Returns:
            "ends" int64 [stages], the T_i, negative for a stage that never ran; "starts.i" and
            "counts.i" of those that did; and the same of every sequence after "sequence.s.".
        """
        state = {"ends": torch.tensor(self._ends)}
        for stage, pieces in enumerate(self._kept):
            if pieces is not None:
                state[f"starts.{stage}"], state[f"counts.{stage}"] = (x.clone() for x in pieces)
        for sequence, member in self._members.items():
            for name, value in member.state_dict().items():
                state[f"sequence.{sequence}.{name}"] = value
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `PatternState.load_state_dict`."""
        own, members = _split(state)
        ends, kept = self._checked(own)
        restored = {}
        for sequence, part in members.items():
            restored[sequence] = HiPState(self.pattern, self.intervals)
            restored[sequence].load_state_dict(part)
        self._ends, self._kept, self._members = ends, kept, restored

    def reset(self) -> None:
        """See `PatternState.reset`."""
        self._forget()
        self._members = {}

    # ---------------------------------------------------------------- memory

    def _forget(self) -> None:
        self._ends = [_NEVER] * self.pattern.num_stages
        self._kept = [None] * self.pattern.num_stages

    def _is_due(self, stage: int, end: int) -> bool:
        since = end - self._ends[stage]
        return self._kept[stage] is None or since < 0 or since >= self.intervals[stage]

    def _check_same_call(self, q: Tensor, k: Tensor) -> None:
        pieces = self._kept[0]
        if pieces is None:
            return
        expected = (q.shape[0], self.pattern.lists_of(q, k))
        if tuple(pieces[0].shape[:2]) != expected:
            raise ValueError(
                f"sparse_attn.HiPState.build: the state holds (batch, lists) = "
                f"{tuple(pieces[0].shape[:2])}, the call has {expected}; keep a state per cache, "
                "and call reset() when the batch changes."
            )

    def _checked(self, state: dict[str, Tensor]) -> tuple[list[int], list[Pieces | None]]:
        """The memory that a state without members describes.

        Raises:
            ValueError: it does not fit this pattern.
        """
        stages = self.pattern.num_stages
        ends = state.get("ends")
        if ends is None or ends.dtype != torch.int64 or tuple(ends.shape) != (stages,):
            raise _misfit("ends", ends, f"int64 [{stages}]")
        ran = [int(end) != _NEVER for end in ends]
        names = {f"{x}.{i}" for i in range(stages) if ran[i] for x in ("starts", "counts")}
        if set(state) - {"ends"} != names:
            raise ValueError(
                f"sparse_attn.HiPState.load_state_dict: the tensors are {sorted(state)}; "
                f"{sorted(names | {'ends'})} are needed."
            )
        kept: list[Pieces | None] = []
        for i in range(stages):
            if not ran[i]:
                kept.append(None)
                continue
            starts, counts = state[f"starts.{i}"], state[f"counts.{i}"]
            for name, x, dims in ((f"starts.{i}", starts, 4), (f"counts.{i}", counts, 3)):
                fits = x.dim() == dims and x.shape[:2] == starts.shape[:2] and x.shape[2] == 1
                if not fits or x.dtype != torch.int32:
                    raise _misfit(name, x, f"int32 of {dims} dimensions [batch, lists, 1, ...]")
            kept.append((starts.clone(), counts.clone()))
        return ends.tolist(), kept


def _split(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
    """A state's own tensors, and those of its sequences by their names there."""
    own: dict[str, Tensor] = {}
    members: dict[int, dict[str, Tensor]] = {}
    for name, value in state.items():
        head, _, rest = name.partition(".")
        number, _, inner = rest.partition(".")
        if head == "sequence" and number.isdigit() and inner:
            members.setdefault(int(number), {})[inner] = value
        else:
            own[name] = value
    return own, members


def _misfit(name: str, found: Tensor | None, needed: str) -> ValueError:
    what = "missing" if found is None else f"{found.dtype} {tuple(found.shape)}"
    return ValueError(
        f"sparse_attn.HiPState.load_state_dict: {name} is {what}; {needed} is needed. Load what "
        "state_dict of an equal pattern's state gave."
    )
