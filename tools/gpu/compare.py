# SPDX-License-Identifier: Apache-2.0
"""Compares what the GPU computes with what tools/ptxemu computes from the same kernels.

    python tools/gpu/compare.py --json FILE

Runs the cases of tests/test_cuda_prefill.py and tests/test_cuda_decode.py both ways and records the
largest difference in units of the last place of the output type. Where the simulator's rounding of
`mma` is the hardware's, all are 0; above two units the program fails.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

TESTS = Path(__file__).resolve().parents[2] / "tests"
ALLOWED = 2


def ulps(a: Tensor, b: Tensor) -> int:
    """Largest distance of two tensors of one floating type, in units of the last place.

    Infinite or NaN on one side only is as far as a number can be.
    """
    if a.numel() == 0:
        return 0
    integer = torch.int32 if a.dtype == torch.float32 else torch.int16

    def ordered(x: Tensor) -> Tensor:  # integers in the order of the numbers; -0 is 0
        bits = x.contiguous().view(integer).long()
        low = torch.iinfo(integer).min
        return torch.where(bits < 0, low - bits, bits)

    if not torch.equal(torch.isfinite(a), torch.isfinite(b)):
        return int(torch.iinfo(integer).max)
    return int((ordered(a) - ordered(b)).abs().max())


def main() -> int:
    """The command; 1 if a case differs by more than ALLOWED."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    cases, emulation = (importlib.import_module(name) for name in ("cases", "cuda_emulation"))
    records = []
    for module in ("test_cuda_prefill", "test_cuda_decode"):
        tests = importlib.import_module(module)
        for name, case in {**tests.FEATURES, **tests.MORE}.items():
            fit = {} if case.dtype != torch.float32 else {"dtype": torch.bfloat16}
            problem = cases.build(type(case)(**{**vars(case), **fit}))
            call = ("attention", problem.q, problem.k, problem.v, problem.index)
            settings = {"return_lse": True, **problem.kwargs}
            ours = emulation.run(*call, seeds=(0,), **settings)[0]
            theirs = emulation.on_device(*call, **settings)
            found = {what: ulps(*pair) for what, *pair in zip(("out", "lse"), ours, theirs)}
            records.append({"case": f"{module}: {name}", "ulps": found})
            print(json.dumps(records[-1]), flush=True)
    worst = max(max(record["ulps"].values()) for record in records)
    document = {"gpu": torch.cuda.get_device_name(), "worst": worst, "records": records}
    arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if worst <= ALLOWED else 1


if __name__ == "__main__":
    raise SystemExit(main())
