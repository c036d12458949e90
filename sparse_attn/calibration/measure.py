# SPDX-License-Identifier: Apache-2.0
"""Measuring candidates on every head of a model while it reads a text with exact attention."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_attn.attention import attention
from sparse_attn.calibration.choose import Trial
from sparse_attn.heads import describe, undescribe
from sparse_attn.heads.plan import text_config
from sparse_attn.integrations.transformers import enable, wrapped_attention
from sparse_attn.patterns import AShape, Dense, Pattern, VerticalSlash

ENOUGH = 0.9995
"""Recall from which on a head tries nothing dearer."""
_DEALT = 0.85  # part of the time that is dealt to the layers: the last one must not find it spent
_AT_LEAST = 3  # candidates that a layer needs to count as measured, where there are as many


def default_candidates(tokens: int) -> tuple[Pattern, ...]:
    """What a head may become, for texts of about `tokens` tokens; Dense is always one more.

    In the order of trying: first a coarse ladder from cheap to dear, then what lies between.
    Budgets are what 8,192 tokens call for, scaled to other lengths.
    """
    scale = tokens / 8192

    def near(sink: int, window: int) -> Pattern:
        return AShape(sink=sink, window=max(16, round(window * scale)))

    def slash(vertical: int, slashes: int) -> Pattern:
        return VerticalSlash(
            vertical=max(30, round(vertical * scale)), slash=max(50, round(slashes * scale))
        )

    coarse = [near(16, 128), slash(50, 100), near(16, 512), slash(250, 250), slash(500, 500)]
    coarse += [slash(1000, 500), slash(1000, 1500), slash(1500, 3000)]
    fine = [near(16, 64), near(16, 256), slash(100, 200), slash(500, 250), near(64, 1024)]
    fine += [slash(500, 1000), near(64, 2048), near(64, 4096)]
    return tuple(dict.fromkeys([*coarse, *fine]))


@dataclass
class Layer:
    """Trials of one layer.

    Attributes:
        number: of the layer.
        heads: the trials of every head, dense attention first.
    """

    number: int
    heads: list[list[Trial]]

    def to_json(self) -> str:
        """A line of the state file."""
        heads = [
            [[describe(t.pattern), t.milliseconds, t.recall, t.change] for t in trials]
            for trials in self.heads
        ]
        return json.dumps({"layer": self.number, "heads": heads})

    @classmethod
    def from_json(cls, line: str) -> Layer:
        """What `to_json` wrote."""
        data = json.loads(line)
        heads = [[Trial(undescribe(p), *rest) for p, *rest in trials] for trials in data["heads"]]
        return cls(data["layer"], heads)


@dataclass
class State:
    """What was measured so far, also in a file, to go on from there.

    Attributes:
        key: what the numbers depend on; a file of another key is refused.
        file: where; None: nowhere.
        layers: by number.
    """

    key: dict[str, Any]
    file: Path | None = None
    layers: dict[int, Layer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.file is None:
            return
        if not self.file.exists():
            self.file.write_text(json.dumps(self.key) + "\n", encoding="utf-8")
            return
        header, *lines = self.file.read_text(encoding="utf-8").splitlines()
        found = json.loads(header)
        other = sorted(name for name in self.key if found.get(name) != self.key[name])
        if other:
            raise ValueError(
                f"sparse_attn.calibrate: {self.file} is of another {', '.join(other)}; remove it, "
                "or pass another state file."
            )
        for line in lines:
            layer = Layer.from_json(line)
            self.layers[layer.number] = layer

    def add(self, layer: Layer) -> None:
        """Keeps a layer."""
        self.layers[layer.number] = layer
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(layer.to_json() + "\n")


class TimeUp(Exception):
    """The time is over; raised from inside a pass to end it."""


@dataclass(frozen=True)
class _Heads:
    """The tensors of one layer as its attention gets them."""

    q: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor  # [heads, head_dim_v, head_dim_v]: the output projection's square of a head
    options: dict[str, Any]
    sinks: Tensor | None

    def run(self, head: int, pattern: Pattern) -> tuple[Tensor, Tensor, float]:
        """Output and lse of one head, and its processor time in milliseconds."""
        group = self.q.shape[1] // self.k.shape[1]
        kv = slice(head // group, head // group + 1)
        sinks = None if self.sinks is None else self.sinks[head : head + 1]
        tensors = (self.q[:, head : head + 1], self.k[:, kv], self.v[:, kv])
        begin = time.thread_time()
        out, lse = attention(
            *tensors, pattern, sinks=sinks, return_lse=True, fallback=False, **self.options
        )
        return out.float(), lse, (time.thread_time() - begin) * 1e3

    def square(self, head: int, x: Tensor) -> float:
        """Mean square of x after the output projection."""
        return float(((x @ self.weights[head]) * x).sum(-1).mean())


def _projection(module: Any, heads: int, head_dim: int) -> Tensor:
    weight = getattr(getattr(module, "o_proj", None), "weight", None)
    if weight is None or weight.dim() != 2 or weight.shape[1] != heads * head_dim:
        return torch.eye(head_dim).expand(heads, -1, -1)
    of_head = weight.detach().float().unflatten(1, (heads, head_dim)).transpose(0, 1)
    squares: Tensor = of_head.mT @ of_head
    return squares


def measure_layer(
    number: int,
    tensors: _Heads,
    candidates: Sequence[Pattern],
    deadline: float,
    end: float,
    threads: int,
) -> Layer:
    """Every candidate on every head of a layer, until `deadline`; the first three until `end`.

    Raises:
        TimeUp: `end` came before the first three.
    """
    heads = range(tensors.q.shape[1])
    with ThreadPoolExecutor(threads) as pool:
        tensors.run(0, Dense())  # a first call loads code
        dense = list(pool.map(lambda head: tensors.run(head, Dense()), heads))
        whole = sum(tensors.square(head, dense[head][0]) for head in heads) or 1.0
        trials = [[Trial(Dense(), dense[head][2], 1.0, 0.0)] for head in heads]

        def attempt(head: int, pattern: Pattern) -> None:
            if any(t.recall >= ENOUGH and t.pattern != Dense() for t in trials[head]):
                return
            out, lse, milliseconds = tensors.run(head, pattern)
            recall = torch.exp(lse - dense[head][1]).nan_to_num(1.0).clamp(max=1.0).mean()
            change = tensors.square(head, out - dense[head][0]) / whole
            trials[head].append(Trial(pattern, milliseconds, float(recall), change))

        for order, pattern in enumerate(candidates):
            now = time.monotonic()
            if order < _AT_LEAST and now > end:
                raise TimeUp
            if order >= _AT_LEAST and now > deadline:
                break
            list(pool.map(lambda head: attempt(head, pattern), heads))  # noqa: B023
    return Layer(number, trials)


def measured_layers(config: Any, tokens: int) -> int:
    """How many layers have no window of their own within `tokens`."""
    kinds = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or tokens
    return sum(kind != "sliding_attention" or window >= tokens for kind in kinds)


@torch.no_grad()
def measure(
    model: Any,
    ids: Tensor,
    candidates: Sequence[Pattern],
    state: State,
    *,
    seconds: float,
    progress: Callable[[int, int, float], None] | None = None,
) -> None:
    """Reads `ids` once and measures what `state` lacks.

    Args:
        model: a transformers model; it is left as it was.
        ids: int64 [1, tokens].
        candidates: tried in this order, until the layer's part of the time is up.
        state: what was measured; layers are added to it.
        seconds: wall time for all of it. When it is up the pass ends, but for the candidate
            under way; layers that were not reached are not in `state`.
        progress: told (layers done, layers, seconds that remain).
    """
    total = measured_layers(text_config(model), ids.shape[1])
    threads = torch.get_num_threads()
    begin = time.monotonic()
    first = len(state.layers)
    if first == total:
        return  # only to choose anew

    def look(function: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kw: Any):  # type: ignore[no-untyped-def]
        number = module.layer_idx
        window = kw.get("sliding_window")
        if number not in state.layers and (window is None or window >= k.shape[2]):
            done = len(state.layers) + 1 - first
            end = begin + seconds
            if time.monotonic() > end:
                raise TimeUp
            deadline = begin + _DEALT * seconds * done / (total - first)
            sinks = kw.get("s_aux")
            tensors = _Heads(
                q,
                k,
                v,
                _projection(module, q.shape[1], v.shape[3]),
                {"softmax_scale": kw.get("scaling"), "softcap": kw.get("softcap")},
                None if sinks is None else sinks.float(),
            )
            torch.set_num_threads(1)
            try:
                state.add(measure_layer(number, tensors, candidates, deadline, end, threads))
            finally:
                torch.set_num_threads(threads)
            if progress is not None:
                spent = time.monotonic() - begin
                progress(len(state.layers), total, spent / done * (total - first - done))
        return function(module, q, k, v, *args, **kw)

    before = model.config._attn_implementation
    with enable("dense", name="sparse_attn_calibration") as handle:
        model.set_attn_implementation(handle.name)
        try:
            with wrapped_attention(handle.name, look):
                model.base_model(ids, use_cache=False)
        except TimeUp:
            pass
        finally:
            model.set_attn_implementation(before)
