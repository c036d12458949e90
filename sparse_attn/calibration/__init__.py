# SPDX-License-Identifier: Apache-2.0
"""Calibration: a head plan from a model's own heads on a text; docs/head_plans.md."""

from sparse_attn.calibration.calibrate import Calibration, calibrate, calibrate_with_trials
from sparse_attn.calibration.choose import Trial, choose
from sparse_attn.calibration.measure import default_candidates

__all__ = [
    "Calibration",
    "Trial",
    "calibrate",
    "calibrate_with_trials",
    "choose",
    "default_candidates",
]
