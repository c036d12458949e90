# SPDX-License-Identifier: Apache-2.0
"""Plans that other projects publish, read as they are.

* MInference (Jiang et al. 2024, arXiv:2407.02490): a list of layers, each
  ``{"head": [type, a, b, score]}``; "vertical_and_slash" has columns and diagonals, "stream_llm"
  first and nearest keys, "block_sparse" blocks. Heads that are missing have (1000, 6096). The score
  is dropped: it is a recall in some files and something else in others.
* Qwen2.5-1M (Yang et al. 2025, arXiv:2501.15383): the same list, as `sparse_attention_config` of
  the model's config or in a file of that name; the last rows of every chunk choose.
* DuoAttention (Xiao et al. 2024, arXiv:2410.10819): full_attention_heads.tsv, a row a layer and a
  column a KV head; the heads with the largest numbers see everything.
* MoA (Fu et al. 2024, arXiv:2406.14909): ``{"alphas": ..., "betas": ...}`` by layer and query
  head; for n tokens the head keeps alpha + beta n of them, of which 64 are the first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sparse_attn.heads.plan import HeadPlan, config_hash, planned, text_config
from sparse_attn.patterns import AShape, BlockSparse, Dense, Pattern, VerticalSlash

MOA_SINK = 64
MOA_LEAST = 128
MOA_STEP = 64
QWEN_CHUNK = 32768
_MISSING_HEAD = ("vertical_and_slash", 1000, 6096, 1)
_LAYERS = "a list of layers, each {head: [type, a, b, score]}"


@dataclass(frozen=True)
class _Source:
    """A file that is read, and what the caller says beside it."""

    where: str
    data: Any
    config: Any
    options: Mapping[str, Any]

    def wrong(self, what: str) -> ValueError:
        """The error that names the file."""
        return ValueError(f"sparse_attn.heads.read_plan: {self.where}: {what}.")

    def size(self, name: str, field: str) -> int | None:
        """A number of heads, as the caller or the config gives it."""
        given: int | None = self.options.get(name)
        return getattr(self.config, field, None) if given is None else given

    @property
    def num_heads(self) -> int | None:
        """Query heads."""
        return self.size("num_heads", "num_attention_heads")

    @property
    def num_heads_kv(self) -> int | None:
        """KV heads; a config without the number has as many as query heads."""
        return self.size("num_heads_kv", "num_key_value_heads") or getattr(
            self.config, "num_attention_heads", None
        )


def read_plan(
    file: str | Path,
    *,
    form: str = "auto",
    config: Any = None,
    num_heads: int | None = None,
    num_heads_kv: int | None = None,
    tokens: int | None = None,
    sparsity: float | None = None,
    sink: int = 64,
    recent: int = 256,
) -> HeadPlan:
    """A plan from a file of this project or of another.

    Args:
        file: the file.
        form: "auto" or one of `FORMS`.
        config: the model's config (or model, or path of its config.json), for its heads and hash.
        num_heads: query heads of a layer, where neither file nor config say it.
        num_heads_kv: KV heads of a layer, likewise.
        tokens: length the plan is for (MoA: prompt and new tokens).
        sparsity: share of KV heads that stream (DuoAttention); None: those below a half.
        sink: first keys of a streaming head, in tokens (DuoAttention).
        recent: nearest keys of one, its row's own included (DuoAttention).

    Returns:
        The plan, checked against `config`, if there is one.

    Raises:
        OSError: there is no such file.
        ValueError: it cannot be read; the text says where and what is allowed.
    """
    path = Path(file)
    if isinstance(config, (str, Path)):
        config = SimpleNamespace(**json.loads(Path(config).read_text(encoding="utf-8")))
    options = {
        "num_heads": num_heads,
        "num_heads_kv": num_heads_kv,
        "tokens": tokens,
        "sparsity": sparsity,
        "sink": sink,
        "recent": recent,
    }
    data = _content(path)
    config = None if config is None else text_config(config)
    source = _Source(str(file), data, config, options)
    chosen = _form_of(source, path) if form == "auto" else form
    if chosen not in FORMS:
        raise source.wrong(f"form={form!r} is unknown; pass one of {', '.join(FORMS)}")
    plan = FORMS[chosen](source)
    return plan if config is None else plan.check_model(config)


def _content(path: Path) -> Any:
    """JSON, or rows of numbers where the file is no JSON."""
    text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        try:
            return [[float(cell) for cell in row.split()] for row in text.splitlines() if row]
        except ValueError:
            raise ValueError(
                f"sparse_attn.heads.read_plan: {path}: neither JSON ({error}) nor rows of numbers."
            ) from None


def _form_of(source: _Source, path: Path) -> str:
    data = source.data
    if isinstance(data, dict):
        if "alphas" in data and "betas" in data:
            return "moa"
        if _qwen_list(data) is not None:
            return "qwen"
        return "sparse_attn"
    if isinstance(data, list) and data and isinstance(data[0], list):
        return "duo_attention"
    if isinstance(data, list) and data and isinstance(data[0], dict):
        return "qwen" if "sparse_attention_config" in path.name else "minference"
    raise source.wrong(f"no form is known by it; pass form= one of {', '.join(FORMS)}")


def _finish(source: _Source, layers: list[list[Pattern]], created_by: str) -> HeadPlan:
    heads_kv = source.num_heads_kv
    if heads_kv is None:
        raise source.wrong(
            "how many KV heads a layer has is not in it; pass config= (the model's config.json) "
            "or num_heads_kv="
        )
    name = getattr(source.config, "_name_or_path", "") or Path(source.where).stem
    return HeadPlan(
        planned(layers),
        num_heads_kv=heads_kv,
        model_id=name,
        config_hash=None if source.config is None else config_hash(source.config),
        created_by=created_by,
    )


# ------------------------------------------------------------------------------ the forms


def _own(source: _Source) -> HeadPlan:
    return HeadPlan.from_dict(source.data, where=source.where)


def _minference(source: _Source) -> HeadPlan:
    return _finish(source, _listed_layers(source, source.data, {}), "MInference")


def _qwen(source: _Source) -> HeadPlan:
    data, last_q = source.data, 64
    if isinstance(data, dict):
        dual = data.get("dual_chunk_attention_config") or data
        last_q = dual.get("sparse_attention_last_q", 64)
        data = _qwen_list(data)
    return _finish(
        source,
        _listed_layers(source, data, {"chunk": QWEN_CHUNK, "last_q": last_q}),
        "Qwen2.5-1M sparse_attention_config",
    )


def _qwen_list(data: dict[str, Any]) -> Any:
    inner = data.get("dual_chunk_attention_config") or data
    return inner.get("sparse_attention_config")


def _listed_layers(source: _Source, data: Any, extra: dict[str, Any]) -> list[list[Pattern]]:
    if not isinstance(data, list) or not all(isinstance(layer, dict) for layer in data):
        raise source.wrong(f"expected {_LAYERS}")
    last = max((int(head) for layer in data for head in layer), default=-1)
    num_heads = source.num_heads or last + 1
    if last >= num_heads:
        raise source.wrong(f"head {last} is named, the model has {num_heads} heads")
    return [
        [
            _entry(source, number, head, layer.get(str(head), _MISSING_HEAD), extra)
            for head in range(num_heads)
        ]
        for number, layer in enumerate(data)
    ]


def _entry(source: _Source, layer: int, head: int, entry: Any, extra: dict[str, Any]) -> Pattern:
    try:
        name, first, second, *_ = entry
        if name == "vertical_and_slash":
            return VerticalSlash(vertical=first, slash=second, **extra)
        if name == "stream_llm":
            return AShape(sink=first, window=second)
        if name == "block_sparse":
            return BlockSparse(top_k=first)
    except (TypeError, ValueError) as error:
        raise source.wrong(f"layer {layer}, head {head}: {entry!r:.80}: {error}") from error
    raise source.wrong(
        f"layer {layer}, head {head}: type {name!r} is unknown; known are vertical_and_slash, "
        "stream_llm and block_sparse"
    )


def _duo_attention(source: _Source) -> HeadPlan:
    rows = source.data
    if len({len(row) for row in rows}) != 1 or not rows[0]:
        raise source.wrong("expected as many numbers in every row, one per KV head")
    heads_kv, heads = len(rows[0]), source.num_heads
    if heads is None or heads % heads_kv:
        raise source.wrong(
            f"it has {heads_kv} KV heads, and num_heads={heads} query heads; pass config= or a "
            "num_heads that is a multiple of them"
        )
    full = _retrieval_heads(rows, source.options["sparsity"])
    streaming = AShape(sink=source.options["sink"], window=source.options["recent"])
    group = heads // heads_kv
    layers: list[list[Pattern]] = [
        [Dense() if (n, h) in full else streaming for h in range(heads_kv) for _ in range(group)]
        for n in range(len(rows))
    ]
    known = replace(source, options={**source.options, "num_heads_kv": heads_kv})
    return _finish(known, layers, "DuoAttention")


def _retrieval_heads(rows: list[list[float]], sparsity: float | None) -> set[tuple[int, int]]:
    """(layer, KV head) that see everything: the largest numbers, ties to the first.

    The original adds noise to break ties and takes those at or above the quantile `sparsity`.
    """
    heads = [(layer, head) for layer, row in enumerate(rows) for head in range(len(row))]
    if sparsity is None:
        return {(layer, head) for layer, head in heads if rows[layer][head] >= 0.5}
    if not 0 <= sparsity <= 1:
        raise ValueError(
            f"sparse_attn.heads.read_plan: sparsity={sparsity} is outside [0, 1]; pass a share."
        )
    below = len(heads) if sparsity == 1 else math.ceil(sparsity * (len(heads) - 1))
    ranked = sorted(heads, key=lambda at: -rows[at[0]][at[1]])
    return set(ranked[: len(heads) - below])


def _moa(source: _Source) -> HeadPlan:
    tokens = source.options["tokens"]
    if tokens is None:
        raise source.wrong("its windows grow with the length; pass tokens=, prompt and new ones")
    alphas, betas = source.data["alphas"], source.data["betas"]
    if [len(row) for row in alphas] != [len(row) for row in betas]:
        raise source.wrong("alphas and betas differ in layers or heads")

    def window(alpha: float, beta: float) -> Pattern:
        size = max(int(alpha + beta * tokens), MOA_LEAST)
        size = min(math.ceil(size / MOA_STEP) * MOA_STEP, tokens)
        if size == tokens:
            return Dense()
        return AShape(sink=MOA_SINK, window=size - MOA_SINK)

    layers: list[list[Pattern]] = [
        [window(alpha, beta) for alpha, beta in zip(*rows, strict=True)]
        for rows in zip(alphas, betas, strict=True)
    ]
    return _finish(source, layers, f"MoA, for {tokens} tokens")


FORMS: dict[str, Callable[[_Source], HeadPlan]] = {
    "sparse_attn": _own,
    "minference": _minference,
    "qwen": _qwen,
    "duo_attention": _duo_attention,
    "moa": _moa,
}
