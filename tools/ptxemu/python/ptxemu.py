# SPDX-License-Identifier: Apache-2.0
"""Launches kernels in the simulator from Python, on NumPy arrays and torch CPU tensors.

module = ptxemu.Module(ptx_text)
module.launch("kernel", grid=4, block=128, args=[x, y, 1000])
"""

import ctypes
import json
import os
import struct
from pathlib import Path


class Finding(Exception):
    """What a kernel did wrong, or what the simulator cannot do; `kind` is one word."""

    def __init__(self, kind, message):
        super().__init__(message)
        self.kind = kind


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("address", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("read_only", ctypes.c_int32),
    ]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("cooperative", ctypes.c_uint32),
        ("dynamic_shared", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("max_instructions", ctypes.c_uint64),
        ("resident", ctypes.c_uint32),
        ("check_races", ctypes.c_uint32),
        ("check_initialised", ctypes.c_uint32),
        ("unchecked_global", ctypes.c_uint32),
    ]


_library = None


def library(path=None):
    """The simulator's library: `path`, or the environment's PTXEMU_LIBRARY, or build/ptxemu."""
    global _library
    if _library is None:
        default = Path(__file__).resolve().parents[3] / "build" / "ptxemu" / "libptxemu.so"
        loaded = ctypes.CDLL(str(path or os.environ.get("PTXEMU_LIBRARY", default)))
        for name in ("error", "error_kind", "describe", "stats"):
            getattr(loaded, f"ptxemu_{name}").restype = ctypes.c_char_p
        loaded.ptxemu_load.restype = ctypes.c_void_p
        loaded.ptxemu_variable.restype = ctypes.c_uint64
        _library = loaded
    return _library


def _finding():
    return Finding(library().ptxemu_error_kind().decode(), library().ptxemu_error().decode())


def _triple(value):
    values = (value,) if isinstance(value, int) else tuple(value)
    return values + (1,) * (3 - len(values))


def _memory(argument):
    """Address, bytes and read-only flag of an array or a tensor; None for anything else."""
    if hasattr(argument, "__array_interface__"):
        address, read_only = argument.__array_interface__["data"]
        return address, argument.nbytes, read_only
    if hasattr(argument, "data_ptr"):
        return argument.data_ptr(), argument.numel() * argument.element_size(), False
    return None


class Pointer:
    """An argument that points into an array: the array's memory is what the kernel may use."""

    def __init__(self, array, byte_offset=0):
        self.array, self.byte_offset = array, byte_offset


_SCALARS = {"f32": "<f", "f64": "<d", "f16": "<e"}


class Module:
    """A PTX text, ready to run."""

    def __init__(self, ptx):
        self._handle = library().ptxemu_load(ptx.encode())
        if not self._handle:
            raise _finding()
        described = json.loads(library().ptxemu_describe(ctypes.c_void_p(self._handle)))
        self.kernels = {kernel["name"]: kernel for kernel in described["kernels"]}
        self.unsupported = described["unsupported"]

    def __del__(self):
        if getattr(self, "_handle", None):
            library().ptxemu_unload(ctypes.c_void_p(self._handle))

    def find(self, part):
        """The full name of the only kernel whose name contains `part`."""
        (name,) = [kernel for kernel in self.kernels if part in kernel]
        return name

    def variable(self, name):
        """Address and size in bytes of a .global or .const variable."""
        size = ctypes.c_uint64()
        address = library().ptxemu_variable(
            ctypes.c_void_p(self._handle), name.encode(), ctypes.byref(size)
        )
        return address, size.value

    def launch(
        self,
        kernel=None,
        *,
        grid=1,
        block=32,
        args=(),
        shared=0,
        cluster=None,
        seed=0,
        buffers=(),
        cooperative=False,
        resident=4,
        max_instructions=0,
        check_races=True,
        check_initialised=True,
        unchecked_global=False,
    ):
        """Run a kernel; return statistics, or raise Finding.

        Args:
            kernel: its name; may be left out if there is only one.
            grid: CTAs, an int or up to three.
            block: threads of a CTA, the same.
            args: one per parameter: arrays and tensors (their memory becomes valid), Pointer,
                numbers, or bytes for a struct.
            shared: bytes of dynamic shared memory.
            cluster: CTAs of a cluster; None: as the kernel declares.
            seed: 0 runs warps in order; any other value is a random interleaving.
            buffers: further arrays that the kernel may use.
            cooperative: all CTAs run side by side.
            resident: how many clusters run side by side otherwise.
            max_instructions: warp instructions after which to give up; 0: never.
            check_races: find races and missing proxy fences.
            check_initialised: find reads of shared memory that nothing has written.
            unchecked_global: take any global address for valid.
        """
        kernel = kernel or self.find("")
        parameters = self.kernels[kernel]["parameters"]
        if len(parameters) != len(args):
            raise TypeError(f"{kernel} takes {len(parameters)} arguments; {len(args)} were given")
        size = parameters[-1]["offset"] + parameters[-1]["size"] if parameters else 0
        block_bytes = bytearray(size)
        known = {}
        for parameter, argument in zip(parameters, args):
            offset = argument.byte_offset if isinstance(argument, Pointer) else 0
            array = argument.array if isinstance(argument, Pointer) else argument
            memory = _memory(array)
            if memory:
                known[memory[0]] = (*memory, parameter["name"])
                data = struct.pack("<Q", memory[0] + offset)
            elif isinstance(argument, bytes):
                data = argument
            elif parameter["type"] in _SCALARS:
                data = struct.pack(_SCALARS[parameter["type"]], argument)
            else:
                mask = (1 << 8 * parameter["size"]) - 1
                data = (int(argument) & mask).to_bytes(parameter["size"], "little")
            if len(data) != parameter["size"]:
                raise TypeError(f"{parameter['name']} has {parameter['size']} bytes")
            block_bytes[parameter["offset"] : parameter["offset"] + len(data)] = data
        for number, array in enumerate(buffers):
            memory = _memory(array)
            known[memory[0]] = (*memory, f"buffer {number}")
        table = (_Buffer * len(known))(
            *[_Buffer(a, n, name.encode(), ro) for a, n, ro, name in known.values()]
        )
        config = _Config(
            _triple(grid),
            _triple(block),
            _triple(cluster) if cluster else (0, 0, 0),
            cooperative,
            shared,
            seed,
            max_instructions,
            resident,
            check_races,
            check_initialised,
            unchecked_global,
        )
        failed = library().ptxemu_launch(
            ctypes.c_void_p(self._handle),
            kernel.encode(),
            ctypes.byref(config),
            bytes(block_bytes),
            ctypes.c_uint64(len(block_bytes)),
            table,
            ctypes.c_uint64(len(known)),
        )
        if failed:
            raise _finding()
        return json.loads(library().ptxemu_stats())


def tensor_map(array, box, *, data_type, swizzle=0):
    """The 128 bytes of a tensor map over a C-contiguous array; `box` outermost first.

    `data_type` and `swizzle` are values of CUtensorMapDataType and CUtensorMapSwizzle.
    """
    rank = array.ndim
    dims = (ctypes.c_uint64 * rank)(*reversed(array.shape))
    strides = (ctypes.c_uint64 * rank)(*reversed(array.strides[:-1]))
    boxes = (ctypes.c_uint32 * rank)(*reversed(box))
    storage = ctypes.create_string_buffer(128)
    failed = library().ptxemu_encode_tiled(
        storage, data_type, rank, ctypes.c_void_p(_memory(array)[0]), dims, strides, boxes, swizzle
    )
    if failed:
        raise _finding()
    return storage.raw
