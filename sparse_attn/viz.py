# SPDX-License-Identifier: Apache-2.0
"""Pictures with matplotlib (``pip install 'sparse_attn[viz]'``): indexes, head plans, recall.

Every function draws on the axes it is given, or on a new figure, and returns the axes:

    sparse_attn.viz.plot(index).figure.savefig("index.png")
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparse_attn import drawing
from sparse_attn.heads import HeadPlan
from sparse_attn.index import HeadKind, SparseIndex

if TYPE_CHECKING:
    from sparse_attn.calibration import Trial

__all__ = ["heads", "plot", "recall", "require_matplotlib"]

_COLOURS = "tab20"


def require_matplotlib() -> Any:
    """matplotlib.pyplot.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ImportError(
            "sparse_attn.viz: needs matplotlib; install it with: pip install matplotlib"
        ) from error


def _axes(given: Any, width: float, height: float) -> Any:
    if given is not None:
        return given
    return require_matplotlib().subplots(figsize=(width, height), layout="constrained")[1]


def plot(
    index: SparseIndex,
    head: int = 0,
    *,
    batch: int = 0,
    causal: bool = True,
    q_offset: int | None = None,
    axes: Any = None,
) -> Any:
    """Which keys (across) the rows (down) of one head see; darker: more of a cell's keys.

    Args:
        index: what is drawn; at most 256 rows and columns of cells, each showing its middle row.
        head: of the index.
        batch: of the index.
        causal: whether keys after a row's own are hidden.
        q_offset: position of row 0, default seqlen_k - seqlen_q.
        axes: where to draw; default a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the index has no such head or batch entry.
    """
    if not (0 <= head < index.num_heads and 0 <= batch < index.batch_size):
        raise ValueError(
            f"sparse_attn.viz.plot: head={head}, batch={batch}; the index has {index.num_heads} "
            f"heads and {index.batch_size} batch entries."
        )
    axes = _axes(axes, 4, 4 * min(1.5, max(0.3, index.seqlen_q / max(1, index.seqlen_k))))
    picture = drawing.grid(
        index, head, batch=batch, rows=256, columns=256, causal=causal, q_offset=q_offset
    )
    # single keys would vanish among white cells: the square root brings them out
    axes.imshow(
        picture.sqrt().numpy(),
        cmap="Blues",
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
        extent=(0, index.seqlen_k, index.seqlen_q, 0),
    )
    kind = HeadKind(int(index.heads[head, 0])).name.lower()
    axes.set(xlabel="key", ylabel="query row", title=f"head {head} ({kind})")
    return axes


def heads(plan: HeadPlan, *, axes: Any = None) -> Any:
    """Which head (across) of which layer (down) has which pattern.

    Args:
        plan: what is drawn.
        axes: where to draw; default a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is missing.
    """
    pyplot = require_matplotlib()
    numbers = {name: number for number, name in enumerate(plan.counts())}
    colours = pyplot.get_cmap(_COLOURS, max(2, len(numbers)))
    axes = _axes(axes, 3 + plan.num_heads * 0.3, 1 + plan.num_layers * 0.14)
    cells = [[numbers[repr(head.pattern)] for head in layer] for layer in plan.layers]
    axes.imshow(cells, cmap=colours, vmin=-0.5, vmax=max(2, len(numbers)) - 0.5, aspect="auto")
    axes.set(xlabel="head", ylabel="layer", title=plan.model_id)
    patch = importlib.import_module("matplotlib.patches").Patch
    labels = [
        patch(color=colours(number), label=f"{count} {_short(plan, name)}")
        for number, (name, count) in enumerate(plan.counts().items())
    ]
    axes.legend(handles=labels, loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=7)
    return axes


def _short(plan: HeadPlan, name: str) -> str:
    """A pattern's text without the fields that every pattern of its kind in the plan shares."""
    kind, _, fields = name.rstrip(")").partition("(")
    same = [other for other in plan.counts() if other.partition("(")[0] == kind]
    if len(same) == 1:
        return kind if len(name) > 40 else name
    parts = fields.split(", ")
    others = [set(other.rstrip(")").partition("(")[2].split(", ")) for other in same]
    return f"{kind}({', '.join(p for p in parts if not all(p in o for o in others))})"


def recall(
    trials: Mapping[int, Sequence[Sequence[Trial]]] | Iterable[Sequence[Sequence[Trial]]],
    plan: HeadPlan | None = None,
    *,
    axes: Any = None,
) -> Any:
    """Recall against cost: a point for each trial of a calibration, the plan's choices on top.

    Args:
        trials: `Calibration.trials`, or its layers in order.
        plan: marks what it chose, if given.
        axes: where to draw; default a new figure.

    Returns:
        The axes; cost is the time as a share of the head's dense attention, the vertical axis the
        mass that is lost (1 - recall), on a logarithmic scale.

    Raises:
        ImportError: matplotlib is missing.
    """
    axes = _axes(axes, 5, 4)
    layers = trials if isinstance(trials, Mapping) else dict(enumerate(trials))
    by_kind: dict[str, list[tuple[float, float]]] = {}
    picked = []
    for number, layer in layers.items():
        for head, tried in enumerate(layer):
            whole = max((t.milliseconds for t in tried if t.change == 0), default=math.nan)
            for trial in tried:
                point = (trial.milliseconds / whole, max(1e-5, 1 - trial.recall))
                by_kind.setdefault(type(trial.pattern).__name__, []).append(point)
                if plan is not None and plan.layers[number][head].pattern == trial.pattern:
                    picked.append(point)
    for kind, points in by_kind.items():
        axes.scatter(*zip(*points, strict=True), s=3, alpha=0.4, label=kind)
    if picked:
        axes.scatter(
            *zip(*picked, strict=True), s=12, facecolors="none", edgecolors="k", label="chosen"
        )
    axes.set(xlabel="time, share of dense", ylabel="mass lost, 1 - recall", yscale="log")
    if by_kind:
        axes.legend(fontsize=7)
    return axes
