# SPDX-License-Identifier: Apache-2.0
"""Settings of the whole suite: repeatable examples, few threads, no network."""

import os

# Before transformers is imported anywhere: tests make the models that they need.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

# Before torch starts its threads: idle ones sleep. Spinning, they would take the processor from
# other work on a busy machine, at every one of the suite's thousands of short calls.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

# A test of a pattern means that pattern, also where dense attention would be faster.
os.environ.setdefault("SPARSE_ATTN_FALLBACK", "0")

import pytest
import torch
from hypothesis import settings

# The default draws the same examples on every run; `pytest --hypothesis-profile=explore` draws new
# ones. No deadline: a first call may compile or start threads, which says nothing about the code.
settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("explore", derandomize=False, deadline=None, max_examples=1000)
settings.load_profile("ci")

MAX_THREADS = 2


@pytest.fixture(autouse=True)
def few_threads():
    """Run every test on at most MAX_THREADS threads and undo what it sets itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, MAX_THREADS))
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Give a test the same numbers alone, in any order, and whatever else a machine skips."""
    torch.manual_seed(0)
