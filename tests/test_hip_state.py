# SPDX-License-Identifier: Apache-2.0
"""Decoding with a search that is refreshed at intervals, against the rule replayed step by step."""

from __future__ import annotations

import random

import oracle_hip
import pytest
import torch
from torch import Tensor

import sparse_attn
from sparse_attn.patterns import AShape, HiP, HiPStage, HiPState, InfiniteHiP, PerHead

SCALE = 0.25
THREE = InfiniteHiP(
    stages=(HiPStage(64, 2), HiPStage(16, 2, k_in=128), HiPStage(4, 1, k_in=64)),
    k=32,
    sink=5,
    window=70,
    share="kv",
)
TREE = HiP(mask_k=32, block_k=4, sink=5, window=33, stride_q=1)


def cache(length: int, *, batch: int = 2, heads: int = 4, heads_kv: int = 2, seed: int = 0):
    """q and k of small integers, q a multiple of 12, for `length` tokens: exact, with many ties."""
    gen = torch.Generator().manual_seed(seed)
    q = 12 * torch.randint(-3, 4, (batch, heads, length, 16), generator=gen).float()
    k = torch.randint(-3, 4, (batch, heads_kv, length, 16), generator=gen).float()
    return q, k


class Replay:
    """The caching rule for one batch entry, in plain lists."""

    def __init__(self, pattern, intervals):
        self.pattern, self.intervals = pattern, intervals
        self.ends = [None] * len(intervals)
        self.kept: dict = {}

    def mask(self, q: Tensor, k: Tensor) -> tuple[Tensor, int]:
        """(bool [heads, rows, seqlen_k], number of stages that ran); q are the newest rows."""
        heads, rows, _ = q.shape
        seqlen_k = k.shape[1]
        offset = seqlen_k - rows
        ran = 0
        for i, interval in enumerate(self.intervals):
            last = self.ends[i]
            due = last is None or seqlen_k < last or seqlen_k - last >= interval
            if ran or due:
                ran += 1
                self.ends[i] = seqlen_k
                for together in oracle_hip.heads_of_lists(heads, k.shape[0], self.pattern.share):
                    self.kept[i, together[0]] = self.run(i, q, k, together, offset)
        out = torch.zeros(heads, rows, seqlen_k, dtype=torch.bool)
        for together in oracle_hip.heads_of_lists(heads, k.shape[0], self.pattern.share):
            out[together] = oracle_hip.visible(
                self.kept[len(self.intervals) - 1, together[0]],
                leaf=self.pattern.leaf,
                sink=self.pattern.sink,
                window=self.pattern.window,
                positions=torch.arange(rows) + offset,
                seqlen_k=seqlen_k,
            )
        return out, ran

    def run(self, i, q, k, together, offset):
        if isinstance(self.pattern, HiP):
            return oracle_hip.hip_leaves(
                self.pattern, q, k, together, 0, scale=SCALE, offset=offset
            )
        before = self.kept.get((i - 1, together[0]))
        return oracle_hip.infinite_stage(
            self.pattern, i, before, q, k, together, 0, scale=SCALE, offset=offset
        )


def seen(pattern, q: Tensor, k: Tensor) -> Tensor:
    index = pattern.build(q, k, softmax_scale=SCALE).validate()
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return index.expand_heads(q.shape[1]).to_dense_mask() & causal


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    ("pattern", "intervals"),
    [
        (THREE, (32, 16, 8)),
        (THREE, (12, 5, 3)),  # no multiples of each other
        (THREE, (1, 1, 1)),
        (THREE, (2, 7, 4)),
        (TREE, (8,)),
    ],
)
def test_equals_the_caching_rule(pattern, intervals, seed):
    rng = random.Random(seed)
    q, k = cache(420, seed=seed)
    state = HiPState(pattern, intervals)
    replays = [Replay(pattern, intervals) for _ in range(2)]
    length, runs = rng.randint(1, 380), []
    for _ in range(40):
        rows = rng.choice([1, 1, 1, 1, 2, 5])  # several: speculative decoding
        length = min(length + rows, 420)
        if rng.random() < 0.1:
            length = max(length - rng.randint(1, 6), rows)  # the last tokens were rejected
        now, keys = q[:, :, length - rows : length], k[:, :, :length]
        rows = now.shape[2]
        found = seen(state, now, keys)
        for b, replay in enumerate(replays):
            expected, ran = replay.mask(now[b], keys[b])
            assert torch.equal(found[b], expected)
        runs.append(ran)
        if ran == len(intervals):
            assert torch.equal(found, seen(pattern, now, keys))
    assert runs[0] == len(intervals) and (intervals[0] == 1 or 0 in runs)


def test_each_sequence_has_its_own_memory():
    q, k = cache(300)
    v = torch.randn(k.shape)
    state = HiPState(THREE, (8, 4, 2))
    alone = [HiPState(THREE, (8, 4, 2)) for _ in range(2)]
    for step in range(12):
        lengths = [200 + step, 150 + 3 * step]
        now = torch.stack([q[b, :, n - 1 : n] for b, n in enumerate(lengths)])
        seqlens = torch.tensor(lengths, dtype=torch.int32)
        out = sparse_attn.attention_decode(now, k, v, state, cache_seqlens=seqlens)
        for b, n in enumerate(lengths):
            part = (now[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n])
            torch.testing.assert_close(
                out[b : b + 1], sparse_attn.attention(*part, alone[b]), rtol=1e-6, atol=1e-6
            )
    assert state.of_sequence(1) is state.of_sequence(1) is not state.of_sequence(0)


def test_a_prefill_is_the_pattern_and_forgets():
    q, k = cache(300)
    state = HiPState(THREE)
    seen(state, q[:, :, 199:200], k[:, :, :200])
    assert torch.equal(seen(state, q, k), seen(THREE, q, k))
    assert set(state.state_dict()) == {"ends"}
    later = (q[:, :, 200:201], k[:, :, :201])  # would not be due, had the state not forgotten
    assert torch.equal(seen(state, *later), seen(THREE, *later))


def test_save_and_restore():
    q, k = cache(300)
    state, twin = HiPState(THREE, (32, 16, 8)), HiPState(THREE, (32, 16, 8))
    seen(state, q[:, :, 199:200], k[:, :, :200])
    seen(state.of_sequence(3), q[:1, :, 149:150], k[:1, :, :150])
    saved = state.state_dict()
    twin.load_state_dict(saved)
    assert set(twin.state_dict()) == set(saved) and "sequence.3.starts.0" in saved
    for name, tensor in twin.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
    for length in range(201, 240):
        now = (q[:, :, length - 1 : length], k[:, :, :length])
        assert torch.equal(seen(twin, *now), seen(state, *now))
    assert not torch.equal(state.state_dict()["ends"], saved["ends"])  # a copy, not a view
    state.reset()
    assert set(state.state_dict()) == {"ends"}
    now = (q[:, :, 250:251], k[:, :, :251])
    assert torch.equal(seen(state, *now), seen(THREE, *now))


def test_in_some_heads_of_a_mixture():
    q, k = cache(300)
    v = torch.randn(k.shape)
    state, alone = HiPState(TREE), HiPState(TREE)
    mixed = PerHead({1: AShape(4, 16)}, default=state)
    heads = [0, 2, 3]
    for length in range(200, 220):
        now, keys = q[:, :, length - 1 : length], k[:, :, :length]
        out = sparse_attn.attention(now, keys, v[:, :, :length], mixed)
        own = alone.build(now[:, heads], keys[:, [0, 1, 1]])
        part = (now[:, heads], keys[:, [0, 1, 1]], v[:, [0, 1, 1], :length])
        torch.testing.assert_close(out[:, heads], sparse_attn.attention(*part, own))
    seqlens = torch.tensor([220, 180], dtype=torch.int32)
    sparse_attn.attention_decode(q[:, :, :1], k, v, mixed, cache_seqlens=seqlens)
    assert "sequence.1.starts.0" in state.state_dict()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: HiPState(AShape()), TypeError, "pattern is a AShape; pass a HiP"),
        (lambda: HiPState(TREE, (8, 4)), ValueError, "2 intervals for 1 stages"),
        (lambda: HiPState(TREE, (0,)), ValueError, "an interval=0 is below 1"),
        (lambda: HiPState(TREE, (8.0,)), TypeError, "an interval=8.0 is a float"),
        (
            lambda: HiPState(InfiniteHiP(stages=(HiPStage(8),) + (HiPStage(8, k_in=8),) * 3)),
            ValueError,
            "3 intervals for 4 stages",
        ),
    ],
)
def test_wrong_parameters_raise(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_wrong_calls_raise():
    q, k = cache(100)
    state = HiPState(TREE)
    seen(state, q[:, :, -1:], k)
    with pytest.raises(ValueError, match=r"holds \(batch, lists\) = \(2, 4\), the call has \(1, 4"):
        seen(state, q[:1, :, -1:], k[:1])
    with pytest.raises(ValueError, match="causal=False"):
        state.build(q[:, :, -1:], k, causal=False)
    with pytest.raises(ValueError, match="q has 3 dimensions"):
        state.build(q[0], k)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ends": None}, "ends is missing"),
        ({"ends": torch.zeros(2)}, "ends is torch.float32"),
        ({"ends": torch.zeros(2, dtype=torch.int64)}, r"ends is torch.int64 \(2,\)"),
        ({"starts.0": None}, "the tensors are"),
        ({"starts.7": torch.zeros(1)}, "the tensors are"),
        ({"starts.0": torch.zeros(2, 4, 1, 8)}, "starts.0 is torch.float32"),
        ({"counts.0": torch.zeros(2, 4, dtype=torch.int32)}, "counts.0 is torch.int32"),
        ({"sequence.0.ends": torch.zeros(2)}, "ends is torch.float32"),
    ],
)
def test_a_state_that_does_not_fit_raises(change, message):
    q, k = cache(100)
    state = HiPState(TREE)
    seen(state, q[:, :, -1:], k)
    saved = {**state.state_dict(), **change}
    saved = {name: tensor for name, tensor in saved.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        state.load_state_dict(saved)
    assert "starts.0" in state.state_dict()  # what it held is still there
