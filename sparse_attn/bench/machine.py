# SPDX-License-Identifier: Apache-2.0
"""The machine's own limits: fused multiply-adds per second, and bytes read per second.

The loops are a page of C++ (machine.cpp beside this file), compiled on first use with the compiler
found ($CXX, c++, g++ or clang++) for the CPU at hand. Without a compiler the limits are unknown and
shares of them are left out.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparse_attn import ops

FMA_ITERATIONS = 3_000_000  # about 5 ms
FMA_BITS = {"bf16_512": 16, "fp32_512": 512, "fp32_256": 256, "fp32_128": 128}
READ_BYTES = {"dram": 256 << 20, "l3": 8 << 20, "l2": 512 << 10}
_READ_AT_LEAST = 64 << 20  # bytes of one sample: small buffers are read several times

_CAPABILITY_FMA = {"avx512_bf16": "fp32_512", "avx512": "fp32_512", "avx2": "fp32_256"}


class Unavailable(RuntimeError):
    """Something optional cannot take part; the text says why."""


@dataclass(frozen=True)
class Limit:
    """One limit of the machine: a call, and how much it does.

    Attributes:
        name: key of FMA_BITS or READ_BYTES.
        unit: "flop" or "byte".
        amount: flop or bytes per call.
        call: does it.
        threads: that share the amount.
    """

    name: str
    unit: str
    amount: float
    call: Callable[[], object]
    threads: int = 1


def peak_name(dtype: torch.dtype, capability: str | None = None) -> str:
    """Which multiply-add limits kernels for `dtype`: the widest that the instruction set has.

    float16, and bfloat16 without its dot product, are widened to float32.
    """
    capability = capability or ops.cpu_capability()
    if capability == "avx512_bf16" and dtype == torch.bfloat16:
        return "bf16_512"
    return _CAPABILITY_FMA.get(capability, "fp32_128")


def compiler() -> list[str]:
    """The C++ compiler's command.

    Raises:
        Unavailable: there is none.
    """
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in (chosen, ["c++"], ["g++"], ["clang++"]):
        if command and shutil.which(command[0]):
            return command
    raise Unavailable("no C++ compiler is found (set CXX, or install g++)")


class Machine:
    """The compiled loops.

    Args:
        threads: that a limit is measured on, each with its own part of the buffer.

    Raises:
        Unavailable: there is no compiler, or it failed.
    """

    def __init__(self, threads: int = 1):
        native = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
        flags = [
            "-O3",
            "-std=c++17",
            "-ffp-contract=fast",
            "-fPIC",
            "-shared",
            native,
            "-Wno-psabi",
        ]
        source = Path(__file__).with_name("machine.cpp")
        with tempfile.TemporaryDirectory() as folder:
            library = str(Path(folder) / "machine.so")
            command = [*compiler(), *flags, str(source), "-o", library]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise Unavailable(f"`{shlex.join(command)}` failed: {done.stderr.strip()[:300]}")
            loaded = ctypes.CDLL(library)  # stays mapped after the file is gone
        self._fma = loaded.machine_fma
        self._fma.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.POINTER(ctypes.c_double)]
        self._fma.restype = ctypes.c_double
        self._read = loaded.machine_read
        self._read.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._read.restype = ctypes.c_int64
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self._buffers: dict[str, Tensor] = {}

    def limit(self, name: str) -> Limit | None:
        """The limit of that name; None if the CPU has no such instruction."""
        return self._fma_limit(name) if name in FMA_BITS else self._read_limit(name)

    def _fma_limit(self, name: str) -> Limit | None:
        bits = FMA_BITS[name]

        def once(_: int = 0) -> float:
            flops: float = self._fma(bits, FMA_ITERATIONS, ctypes.byref(ctypes.c_double()))
            return flops

        per_thread: float = self._fma(bits, 1, ctypes.byref(ctypes.c_double())) * FMA_ITERATIONS
        if not per_thread:
            return None
        return Limit(name, "flop", per_thread * self._threads, self._all(once), self._threads)

    def _read_limit(self, name: str) -> Limit:
        """Threads share main memory and L3, and have an L2 each."""
        each = READ_BYTES[name] if name == "l2" else READ_BYTES[name] // self._threads
        each -= each % 1024
        if name not in self._buffers:
            # Filled: untouched pages would all be one page of zeros that never leaves the cache.
            self._buffers[name] = torch.arange(each * self._threads // 8 + 8)
        start = -(-self._buffers[name].data_ptr() // 64) * 64
        repeats = max(1, _READ_AT_LEAST // (each * self._threads))

        def once(thread: int = 0) -> None:
            for _ in range(repeats):
                self._read(start + thread * each, each)

        amount = float(each * self._threads * repeats)
        return Limit(name, "byte", amount, self._all(once), self._threads)

    def _all(self, once: Callable[[int], object]) -> Callable[[], object]:
        """A call that runs `once` on every thread; ctypes lets go of the interpreter lock."""
        pool = self._pool
        if pool is None:
            return lambda: once(0)
        return lambda: list(pool.map(once, range(self._threads)))
