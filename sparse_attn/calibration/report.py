# SPDX-License-Identifier: Apache-2.0
"""The report of a calibration: a map of the heads and recall against cost, as HTML or PNG."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_attn import viz
from sparse_attn.calibration.calibrate import Calibration

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font-family: sans-serif; margin: 2em auto; max-width: 60em }}
td, th {{ text-align: left; padding: 0 1em 0 0; font-weight: normal }}
svg {{ max-width: 100%; height: auto }}
</style></head><body>
<h1>{title}</h1>
<table>{facts}</table>
<h2>Patterns of the heads</h2>
{heads}
<table>{counts}</table>
<h2>Recall against cost of all that was tried</h2>
{recall}
<h2>Use it</h2>
<pre>{use}</pre>
</body></html>
"""


def check_file(file: str) -> str:
    """`file`, if a report can be written there.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: neither .html nor .png.
    """
    viz.require_matplotlib()
    if Path(file).suffix not in (".html", ".png"):
        raise ValueError(
            f"sparse_attn.calibrate: report {file!r} is neither .html nor .png; name one of these."
        )
    return file


def write_report(file: str, result: Calibration, use: str) -> None:
    """Writes the report; everything it needs is in the one file.

    Args:
        file: ends in .html or .png.
        result: what is reported.
        use: the lines to paste.
    """
    pyplot = viz.require_matplotlib()
    plan = result.plan
    if Path(file).suffix == ".png":
        size = (7 + plan.num_heads * 0.3, max(4.0, 1 + plan.num_layers * 0.14))
        figure, axes = pyplot.subplots(1, 2, figsize=size, layout="constrained")
        viz.heads(plan, axes=axes[1])
        viz.recall(result.trials, plan, axes=axes[0])
        figure.savefig(file, dpi=100)
        pyplot.close(figure)
        return
    page = _PAGE.format(
        title=html.escape(f"Head plan of {plan.model_id}"),
        facts=_rows({"layers": plan.num_layers, "heads": plan.num_heads, **plan.measured}),
        counts=_rows(plan.counts()),
        heads=_svg(viz.heads(plan)),
        recall=_svg(viz.recall(result.trials, plan)),
        use=html.escape(use),
    )
    Path(file).write_text(page, encoding="utf-8")


def _rows(facts: Mapping[str, object]) -> str:
    cells = ((html.escape(str(a)), html.escape(str(b))) for a, b in facts.items())
    return "".join(f"<tr><th>{a}</th><td>{b}</td></tr>" for a, b in cells)


def _svg(axes: Any) -> str:
    stream = io.StringIO()
    figure = axes.figure
    figure.savefig(stream, format="svg", bbox_inches="tight")
    viz.require_matplotlib().close(figure)
    text = stream.getvalue()
    return text[text.index("<svg") :]
