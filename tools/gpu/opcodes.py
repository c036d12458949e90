# SPDX-License-Identifier: Apache-2.0
"""Runs tools/ptxemu's instruction tests on the GPU as well, and compares the results bit by bit.

    python tools/gpu/opcodes.py --json FILE

The same PTX gets the same operands, through the CUDA driver (libcuda.so.1), which compiles it for
the GPU that is there. What the driver refuses is recorded and no failure: some instructions are of
newer GPUs. Results of `.approx` functions may differ by two units in the last place.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).resolve().parents[2] / "tests"
APPROXIMATE = 2


class Refused(Exception):
    """The driver does not take this PTX."""


class Device:
    """The first GPU, through the driver API; memory is copied there and back at every launch."""

    def __init__(self, driver: Any = None) -> None:
        """`driver`: what has the functions of libcuda.so.1; None loads it."""
        self.driver = ctypes.CDLL("libcuda.so.1") if driver is None else driver
        self.context, device = ctypes.c_void_p(), ctypes.c_int()
        self._check("cuInit", 0)
        self._check("cuDeviceGet", ctypes.byref(device), 0)
        self._check("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), device)
        self._check("cuCtxSetCurrent", self.context)

    def _check(self, name: str, *args: Any) -> None:
        status = getattr(self.driver, name)(*args)
        if status != 0:
            raise RuntimeError(f"{name} returned {status}")

    def launch(self, ptx: str, block: int, arrays: list[np.ndarray]) -> None:
        """Runs kernel `k` of a PTX text in one CTA; every argument is an array, in place.

        Raises:
            Refused: the driver cannot compile it.
        """
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        status = self.driver.cuModuleLoadData(ctypes.byref(module), ctypes.c_char_p(ptx.encode()))
        if status != 0:
            raise Refused(f"cuModuleLoadData returned {status}")
        addresses = [ctypes.c_uint64() for _ in arrays]
        try:
            self._check("cuModuleGetFunction", ctypes.byref(function), module, b"k")
            for address, array in zip(addresses, arrays, strict=True):
                size = ctypes.c_size_t(array.nbytes)
                self._check("cuMemAlloc_v2", ctypes.byref(address), size)
                self._check("cuMemcpyHtoD_v2", address, ctypes.c_void_p(array.ctypes.data), size)
            pointers = (ctypes.c_void_p * len(arrays))(*map(ctypes.addressof, addresses))
            self._check("cuLaunchKernel", function, 1, 1, 1, block, 1, 1, 0, None, pointers, None)
            self._check("cuCtxSynchronize")
            for address, array in zip(addresses, arrays, strict=True):
                size = ctypes.c_size_t(array.nbytes)
                self._check("cuMemcpyDtoH_v2", ctypes.c_void_p(array.ctypes.data), address, size)
        finally:
            for address in addresses:
                if address.value:
                    self._check("cuMemFree_v2", address)
            self._check("cuModuleUnload", module)


class Both:
    """Stands in for a module of the simulator: a launch runs there and on the device."""

    def __init__(self, ptx: str, simulated: Any, device: Device, found: list[int]) -> None:
        self.ptx, self.simulated, self.device, self.found = ptx, simulated, device, found

    def launch(self, *, block: int = 32, args: list[np.ndarray]) -> None:
        """Appends the largest difference of 32-bit words to `found`; args get the simulator's."""
        theirs = [x.copy() for x in args]
        self.simulated.launch(block=block, args=args)
        self.device.launch(self.ptx, block, theirs)
        for ours, other in zip(args, theirs, strict=True):
            words = [x.reshape(-1).view(np.uint32).astype(np.int64) for x in (ours, other)]
            self.found.append(int(np.abs(words[0] - words[1]).max()))


@contextmanager
def on_both(tests: Any, device: Device, found: list[int]) -> Iterator[None]:
    """The instruction tests' modules run on the device, too."""
    tools = importlib.import_module("ptxemu_tools")
    original = tests.module

    def both(*args: Any, **kwargs: Any) -> Both:
        ptx = tools.kernel(*args, **kwargs)
        return Both(ptx, original(*args, **kwargs), device, found)

    tests.module = both
    try:
        yield
    finally:
        tests.module = original


def cases(tests: Any) -> list[tuple[str, Callable[[], Any]]]:
    """An instruction, and what runs it, for every scalar and every warp instruction that is tested.

    `isspacep` of an address and `elect` choose as the machine likes, and are left out.
    """
    found: list[tuple[str, Callable[[], Any]]] = []
    for instruction, kind, operands, _ in tests.CASES:
        if not instruction.startswith("isspacep"):
            run = lambda i=instruction, k=kind, o=operands: tests.run_lanes(i, k, [o])  # noqa: E731
            found.append((instruction, run))
    for instruction, _ in tests.test_warp_instruction.pytestmark[0].args[1]:
        if "elect" not in instruction:
            found.append((instruction, lambda i=instruction: tests.run_warp(i)))
    return found


def compare(device: Device) -> list[dict[str, Any]]:
    """A record per instruction: its difference, or why it was refused, and whether it passed."""
    tests = importlib.import_module("test_ptxemu_instructions")
    records = []
    for instruction, run in cases(tests):
        found: list[int] = []
        record: dict[str, Any] = {"instruction": instruction}
        try:
            with on_both(tests, device, found):
                run()
        except Refused as error:
            records.append({**record, "refused": str(error), "passed": True})
            continue
        allowed = APPROXIMATE if ".approx" in instruction else 0
        records.append({**record, "difference": max(found), "passed": max(found) <= allowed})
    return records


def main(driver: Any = None) -> int:
    """The command; 1 if a result differs, or if the driver refused more than a tenth of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    records = compare(Device(driver))
    arguments.json.write_text(json.dumps({"records": records}, indent=1) + "\n")
    wrong = [record for record in records if not record["passed"]]
    refused = [record for record in records if "refused" in record]
    for record in (*wrong, *refused):
        print(json.dumps(record))
    print(f"{len(records)} instructions, {len(wrong)} differ, {len(refused)} refused")
    return 1 if wrong or len(refused) * 10 > len(records) else 0


if __name__ == "__main__":
    raise SystemExit(main())
