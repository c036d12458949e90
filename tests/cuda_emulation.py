# SPDX-License-Identifier: Apache-2.0
"""Runs sparse_attn's CUDA kernels on CPU tensors, through tools/ptxemu.

SPARSE_ATTN_TEST_CUDA=device makes the same calls on a real device instead. Without it:

`build` compiles the CUDA module for the simulator, once; `run` makes calls of the public functions
in processes where `sparse_attn::attention` is that module's operator, and whose heap the simulator
knows block by block: reads and writes out of bounds, races and uninitialised memory raise.
"""

import atexit
import copy
import ctypes
import dataclasses
import functools
import importlib
import io
import json
import operator
import os
import pickle
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO

import torch

REPO = Path(__file__).resolve().parents[1]
SEEDS = (0, 1, 2)
WORKERS = min(2, os.cpu_count() or 1)
# Asked for like functions.
_STATISTICS = "statistics of the kernels"
_REPLAY = "replays of a graph"


def _tools():
    return importlib.import_module("ptxemu_tools")


@functools.cache
def build(faults: bool = False) -> Path:
    """The module; with `faults` it has one instantiation, with faults that can be seeded."""
    tools = _tools()
    simulator = tools.build()
    folder = REPO / "build" / ("cuda_faults" if faults else "cuda_emulated")
    cutlass = os.environ.get("SPARSE_ATTN_CUTLASS_DIR", "")
    if not cutlass:
        fetch = [sys.executable, str(REPO / "tools/cuda/fetch_cutlass.py")]
        done = subprocess.run(
            [*fetch, str(REPO / "build/cutlass")], capture_output=True, text=True, check=True
        )
        cutlass = done.stdout.strip()
    settings = {
        "CMAKE_MAKE_PROGRAM": tools.program("ninja"),
        "CMAKE_CUDA_COMPILER": tools.nvcc(),
        "Python_EXECUTABLE": sys.executable,
        "SPARSE_ATTN_CUDA_EMULATED": "ON",
        "SPARSE_ATTN_EMULATED_RUNTIME": simulator / "cudart",
        "SPARSE_ATTN_CUTLASS_DIR": cutlass,
        "SPARSE_ATTN_OUTPUT_DIR": folder / "lib",
        **({"SPARSE_ATTN_CUDA_FAULTS": "ON", "SPARSE_ATTN_CUDA_ONLY": "bf16_64"} if faults else {}),
    }
    configure = [tools.program("cmake"), "-S", str(REPO), "-B", str(folder), "-G", "Ninja"]
    configure += [f"-D{name}={value}" for name, value in settings.items()]
    for command in (configure, [tools.program("cmake"), "--build", str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    return folder / "lib" / "_C_cuda_emulated.abi3.so"


# --- the processes ---


def _write(stream: BinaryIO, message: Any) -> None:
    buffer = io.BytesIO()
    torch.save(message, buffer, pickle_module=pickle)
    data = buffer.getvalue()
    stream.write(struct.pack("q", len(data)) + data)
    stream.flush()


def _read(stream: BinaryIO) -> Any:
    header = stream.read(8)
    if len(header) < 8:
        raise EOFError
    data = stream.read(struct.unpack("q", header)[0])
    return torch.load(io.BytesIO(data), weights_only=False)


class _Worker:
    """A process with the emulated operator."""

    def __init__(self, faults: bool) -> None:
        tools = _tools()
        simulator = tools.build()
        environment = {
            **os.environ,
            "LD_PRELOAD": str(simulator / "libptxemu_heap.so"),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        command = [sys.executable, __file__, str(build(faults)), str(simulator / "cudart")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        atexit.register(self.process.kill)

    def call(self, message: Any) -> Any:
        _write(self.process.stdin, message)
        try:
            kind, value = _read(self.process.stdout)
        except EOFError:
            raise AssertionError(f"the process ended with {self.process.wait()}") from None
        if kind == "error":
            raise value
        return value


@functools.cache
def _workers(faults: bool) -> tuple[SimpleQueue, ThreadPoolExecutor]:
    build(faults)
    free: SimpleQueue = SimpleQueue()
    for _ in range(WORKERS):
        free.put(_Worker(faults))
    return free, ThreadPoolExecutor(WORKERS)


def run(function: str, *args: Any, seeds: Sequence[int] = SEEDS, fault: int = 0, **kwargs: Any):
    """What `sparse_attn.<function>(*args, **kwargs)` returns under each schedule.

    Args:
        function: name of a public function, or a dotted one of a module ("ops.attention").
        args: its arguments.
        seeds: schedules of the simulator.
        fault: number of the fault to seed; 0: the kernels as they are.
        kwargs: its keyword arguments.

    Returns:
        one result per seed.

    Raises:
        RuntimeError: the simulator found something; other errors of the call as they are.
    """
    if os.environ.get("SPARSE_ATTN_TEST_CUDA") == "device":
        if fault:
            raise ValueError("faults are seeded under emulation only")
        return [on_device(function, *args, **kwargs) for _ in seeds]
    free, pool = _workers(fault != 0)

    def one(seed: int) -> Any:
        worker = free.get()
        try:
            return worker.call((function, args, kwargs, seed, fault))
        finally:
            free.put(worker)

    return list(pool.map(one, seeds))


def bank_use(
    function: str, *args: Any, fault: int = 0, **kwargs: Any
) -> dict[str, dict[str, dict[str, int]]]:
    """How the kernels of a call used the banks of shared memory: {kernel: {opcode: counts}}.

    Of `function` and `fault` as in `run`. Each kernel's name is mangled, its last launch counts;
    `wavefronts` are what its accesses took, `least` what they would have taken without a conflict.
    """
    free, _ = _workers(fault != 0)
    worker = free.get()
    try:
        worker.call((function, args, kwargs, 0, fault))
        statistics: str = worker.call((_STATISTICS, (), {}, 0, 0))
    finally:
        free.put(worker)
    return {name: kernel["banks"] for name, kernel in json.loads(statistics).items()}


def replay(function: str, *calls: dict[str, Any], seed: int = 0, fault: int = 0):
    """Captures a call in a CUDA graph and replays it with what the others are given.

    Of `function`, `seed` and `fault` as in `run`.

    Args:
        calls: keyword arguments, of the same shapes in each: before each replay, whose results hold
            NaN, they are copied into the tensors of the first, which is the one that is captured,
            after a call to warm up.

    Returns:
        the nodes of the graph, and a result for each of `calls`.

    Raises:
        RuntimeError: a call that a capture does not allow, or a finding of the simulator.
    """
    free, _ = _workers(fault != 0)
    worker = free.get()
    try:
        return worker.call((_REPLAY, (function, *calls), {}, seed, fault))
    finally:
        free.put(worker)


def on_device(function: str, *args: Any, **kwargs: Any) -> Any:
    """What the call returns with its tensors and indexes on the CUDA device; tensors come back."""

    def moved(x: Any, device: str) -> Any:
        if isinstance(x, (tuple, list)):
            return type(x)(moved(member, device) for member in x)
        return x.to(device) if hasattr(x, "to") else x

    sparse_attn = importlib.import_module("sparse_attn")
    call = operator.attrgetter(function)(sparse_attn)
    result = call(*moved(args, "cuda"), **{k: moved(x, "cuda") for k, x in kwargs.items()})
    torch.cuda.synchronize()
    return moved(result, "cpu")


def _overwrite(to: Any, source: Any) -> None:
    """Copies all tensors of one structure into those of another."""
    if isinstance(to, torch.Tensor):
        to.copy_(source)
    elif isinstance(to, dict):
        for name in to:
            _overwrite(to[name], source[name])
    elif dataclasses.is_dataclass(to):
        _overwrite(vars(to), vars(source))
    elif to != source:
        raise ValueError(f"a graph of {to} cannot be replayed with {source}")


def _replays(cudart: ctypes.CDLL, call: Callable, calls: Sequence[dict[str, Any]]) -> Any:
    graph, launched, stream = ctypes.c_void_p(), ctypes.c_void_p(), None

    def check(error: int) -> None:
        if error:
            raise RuntimeError(cudart.cudaGetErrorString(error).decode())

    given = copy.deepcopy(calls[0])
    call(**given)
    check(cudart.cudaStreamBeginCapture(stream, 0))
    try:
        results = call(**given)
    finally:
        error = cudart.cudaStreamEndCapture(stream, ctypes.byref(graph))
        cudart.cudaGetLastError()  # the next call is not to be told
    check(error)
    check(cudart.cudaGraphInstantiate(ctypes.byref(launched), graph, 0))
    nodes = json.loads(cudart.ptxemu_cudart_graph(graph).decode())
    found = []
    for other in calls:
        _overwrite(given, other)
        for result in results:
            result.fill_(torch.nan)
        check(cudart.cudaGraphLaunch(launched, stream))
        found.append(tuple(result.clone() for result in results))
    check(cudart.cudaGraphExecDestroy(launched))
    check(cudart.cudaGraphDestroy(graph))
    return nodes, found


def _serve(module: str, runtime: str) -> None:
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else may write among the replies
    torch.set_num_threads(1)
    sparse_attn = importlib.import_module("sparse_attn")
    torch.ops.load_library(module)
    library = torch.library.Library("sparse_attn", "IMPL")
    emulated = torch.ops.sparse_attn_emulated.attention
    with warnings.catch_warnings():  # of the override, which is meant
        warnings.simplefilter("ignore")
        library.impl("attention", emulated, "CPU", allow_override=True)
    cudart = ctypes.CDLL(str(Path(runtime) / "libcudart.so.13"))
    seed_schedule: Callable[[int], None] = cudart.ptxemu_cudart_seed
    seed_schedule.argtypes = [ctypes.c_uint64]
    for name in ("ptxemu_cudart_kernel_stats", "ptxemu_cudart_graph", "cudaGetErrorString"):
        getattr(cudart, name).restype = ctypes.c_char_p
    while True:
        try:
            function, args, kwargs, seed, fault = _read(requests)
        except EOFError:
            return
        os.environ["SPARSE_ATTN_FAULT"] = str(fault)
        seed_schedule(seed)
        try:
            if function == _STATISTICS:
                reply = ("result", cudart.ptxemu_cudart_kernel_stats().decode())
            elif function == _REPLAY:
                call = operator.attrgetter(args[0])(sparse_attn)
                reply = ("result", _replays(cudart, call, args[1:]))
            else:
                reply = ("result", operator.attrgetter(function)(sparse_attn)(*args, **kwargs))
        except Exception as error:
            reply = ("error", type(error)(*map(str, error.args)))
        _write(replies, reply)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
