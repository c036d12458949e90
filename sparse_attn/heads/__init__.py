# SPDX-License-Identifier: Apache-2.0
"""Head plans: a pattern per layer and head of a model, as a file; docs/head_plans.md."""

from sparse_attn.heads.described import describe, undescribe
from sparse_attn.heads.plan import HeadPlan, PlannedHead, config_hash, ready_plans, schema
from sparse_attn.heads.readers import FORMS, read_plan

__all__ = [
    "FORMS",
    "HeadPlan",
    "PlannedHead",
    "config_hash",
    "describe",
    "read_plan",
    "ready_plans",
    "schema",
    "undescribe",
]
