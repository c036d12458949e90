# SPDX-License-Identifier: Apache-2.0
"""The benchmark: this package, its peers and the machine's own limits, taken in turn.

    python -m sparse_attn bench --suite prefill --json prefill.json
    python -m sparse_attn bench --seqlen 8192 --dtype bfloat16 --density 1 0.1 0.02 --plot plots

Every figure is a median over rounds; in each round every contestant runs once, after the machine's
peak (fused multiply-adds, memory reads) was measured once, all in one process. Ratios are medians
of the ratios inside a round, so a machine whose speed drifts does not distort them.

`cases` says what is measured, `peers` who takes part, `machine` measures the limits, `timing`
takes the times, `runner` turns them into records, `suites` holds the presets and `report` prints.
"""

from __future__ import annotations

from .command import add_command

__all__ = ["add_command"]
