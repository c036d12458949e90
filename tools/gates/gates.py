# SPDX-License-Identifier: Apache-2.0
"""What the compiler made of the CUDA kernels, against limits that are checked in.

python tools/gates/gates.py            prints tables, fails on a broken limit
python tools/gates/gates.py --update   writes limits.json from what is found

The PTX is that of the module that the tests execute, so the kernels are compiled once for both;
ptxas makes sm_80 code of it. What differs from the limits is printed as a table of changes.

Per kernel: registers, spills and local memory (none is allowed), shared memory, blocks per SM, and
of the loop with the largest share of tensor-core instructions (the unmasked one) how many of them
are tensor-core instructions and how many compare or select. Limits of bank conflicts are kept here
too: `tests/test_cuda_banks.py` holds them where the simulator executes the kernels.

Needs nvcc, and cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm.
"""

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
LIMITS = Path(__file__).with_name("limits.json")

#: Of compute capability 8.0 (CUDA C++ Programming Guide, technical specifications; the reserved
#: bytes and the granularities are those of cuda_occupancy.h).
REGISTERS_PER_SM, REGISTER_UNIT = 65536, 256
SHARED_PER_SM, SHARED_RESERVED, SHARED_UNIT = 164 * 1024, 1024, 128
WARPS_PER_SM, BLOCKS_PER_SM = 64, 32

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);")
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_TENSOR = ("HMMA", "HGMMA", "IMMA", "QGMMA")
_SELECT = ("ISETP", "FSETP", "PLOP3", "SEL", "FSEL")


@dataclass
class Kernel:
    """What is measured of one; `limit` says which side of a checked-in number is a fault."""

    registers: int
    local_bytes: int
    shared_bytes: int
    blocks_per_sm: int
    loop_instructions: int = 0
    loop_tensor: int = 0
    loop_select: int = 0

    @property
    def tensor_share(self) -> float:
        """Of the loop's instructions."""
        return self.loop_tensor / self.loop_instructions if self.loop_instructions else 0.0


#: Field to +1 if more is worse, -1 if less is.
DIRECTIONS = {
    "registers": 1,
    "local_bytes": 1,
    "shared_bytes": 1,
    "blocks_per_sm": -1,
    "tensor_share": -1,
    "loop_select": 1,
}


def blocks_per_sm(registers: int, shared: int, threads: int) -> int:
    """How many blocks a multiprocessor of sm_80 holds at a time."""
    warps = -(-threads // 32)
    per_warp = -(-max(registers, 1) * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS_PER_SM // per_warp // warps
    per_block = -(-(shared + SHARED_RESERVED) // SHARED_UNIT) * SHARED_UNIT
    return min(by_registers, SHARED_PER_SM // per_block, WARPS_PER_SM // warps, BLOCKS_PER_SM)


def tool(name: str) -> str:
    """Path of a CUDA program: of the toolkit, the search path or a package of PyPI."""
    for folder in sys.path:
        for found in Path(folder or ".").glob(f"nvidia/cu*/bin/{name}"):
            return str(found)
    found = shutil.which(name) or next(
        (str(x) for x in Path("/usr/local").glob(f"cuda*/bin/{name}")), None
    )
    if found is None:
        raise FileNotFoundError(
            f"{name} is not there: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm, "
            "or install the CUDA toolkit"
        )
    return found


def output(*command: str, folder: Path | None = None) -> str:
    """What a program prints; raises with its errors if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def tensor_loops(sass: str) -> list[Counter]:
    """Instructions by opcode of every loop with tensor-core instructions and none inside it."""
    code = [
        (int(at, 16), re.sub(r"^@!?U?P\w+\s+", "", text)) for at, text in _INSTRUCTION.findall(sass)
    ]
    tensor = [at for at, text in code if text.startswith(_TENSOR)]
    spans = set()
    for at, text in code:
        target = re.match(r"BRA\b.*?0x([0-9a-f]+)", text)
        low = int(target.group(1), 16) if target else at
        if low < at and any(low <= x <= at for x in tensor):
            spans.add((low, at))
    return [
        Counter(text.split()[0].split(".")[0] for at, text in code if low <= at <= high)
        for low, high in sorted(spans)
        if not any(low <= a and b <= high and (a, b) != (low, high) for a, b in spans)
    ]


def measure(binary: Path, shared: dict[str, int], threads: int = 128) -> dict[str, Kernel]:
    """Every kernel of an object file or cubin by its mangled name.

    Args:
        binary: with code for sm_80.
        shared: dynamic shared memory of a kernel, by a part of its name.
        threads: of a block.
    """
    usage = output(tool("cuobjdump"), "--dump-resource-usage", str(binary))
    sass = output(tool("cuobjdump"), "-sass", str(binary))
    code = {part.split("\n")[0].strip(): part for part in re.split(r"\n\s*Function : ", sass)[1:]}
    found = {}
    for name, *numbers in _USAGE.findall(usage):
        registers, stack, static, local = map(int, numbers)
        dynamic = next((size for part, size in shared.items() if part in name), 0)
        kernel = Kernel(
            registers,
            stack + local,
            static + dynamic,
            blocks_per_sm(registers, static + dynamic, threads),
        )
        main = max(
            tensor_loops(code.get(name, "")),
            key=lambda c: sum(c[x] for x in _TENSOR) / c.total(),
            default=Counter(),
        )
        kernel.loop_tensor = sum(main[x] for x in _TENSOR)
        if kernel.loop_tensor:
            kernel.loop_instructions = main.total()
            kernel.loop_select = sum(main[x] for x in _SELECT)
        found[name] = kernel
    return found


def row(kernel: Kernel) -> dict[str, float]:
    """The numbers that have a limit."""
    return {name: round(getattr(kernel, name), 3) for name in DIRECTIONS}


@dataclass(frozen=True)
class Change:
    """Of a kernel against its limits."""

    kernel: str
    field: str
    limit: float | str
    now: float | str
    worse: bool

    def __str__(self) -> str:
        mark = "BROKEN" if self.worse else ""
        return (
            f"{self.kernel:28}{self.field:>15}{self.limit!s:>12}{self.now!s:>12}  {mark}".rstrip()
        )


def differences(
    found: dict[str, dict[str, float]], limits: dict[str, dict[str, float]]
) -> list[Change]:
    """What is worse than its limit or merely different, and what spills; the worst first."""
    changes = []
    for name in sorted({*found, *limits}):
        if name not in found or name not in limits:
            there = name in found
            now, limit = ("there", "none") if there else ("gone", "there")
            changes.append(Change(name, "kernel", limit, now, there))
            continue
        for field, sign in DIRECTIONS.items():
            now, limit = found[name][field], limits[name].get(field, "none")
            if field == "local_bytes" and now > 0:
                changes.append(Change(name, field, 0, now, True))
            elif now != limit:
                worse = isinstance(limit, str) or sign * (now - limit) > 0
                changes.append(Change(name, field, limit, now, worse))
    return sorted(changes, key=lambda change: not change.worse)


def change_table(changes: list[Change]) -> str:
    """A line a change."""
    head = f"{'kernel':28}{'what':>15}{'limit':>12}{'now':>12}"
    return "\n".join([head, *map(str, changes)])


SIZES = """
#include <cstdio>
#include "csrc/cuda/decode/kernel.cuh"
#include "csrc/cuda/prefill/kernel.cuh"
using namespace sparse_attn::cuda;
using Element = cutlass::bfloat16_t;
template <int kDim, int kRows> void decode() {
  std::printf("decode %d %d %zu\\n", kDim, kRows,
              sizeof(DecodeShared<DecodeConfig<Element, kDim, kRows>>));
}
template <int kDim> void sizes() {
  decode<kDim, 16>();
  decode<kDim, 64>();
  std::printf("prefill %d 0 %zu\\n", kDim, sizeof(PrefillShared<PrefillConfig<Element, kDim>>));
}
int main() {
  sizes<64>();
  sizes<96>();
  sizes<128>();
  sizes<256>();
}
"""


def shared_bytes(folder: Path, flags: list[str]) -> dict[tuple[str, int, int], int]:
    """Dynamic shared memory by kernel, head_dim and tile rows (0: there is one kind)."""
    source = folder / "sizes.cu"
    source.write_text(SIZES)
    program = folder / "sizes"
    output(tool("nvcc"), *flags, f"-I{REPO}", "-o", str(program), str(source))
    lines = [line.split() for line in output(str(program)).splitlines()]
    return {(kernel, int(dim), int(rows)): int(size) for kernel, dim, rows, size in lines}


def emulated_objects() -> list[Path]:
    """Objects of the module that the tests execute, with the PTX of the bf16 kernels."""
    sys.path.insert(0, str(REPO / "tests"))
    library = importlib.import_module("cuda_emulation").build()
    folder = library.parents[1] / "CMakeFiles" / "sparse_attn_cuda_kernels.dir" / "csrc" / "cuda"
    return sorted(folder.glob("*/instantiations/bf16_*.o"))


def assemble(source: Path, folder: Path) -> Path:
    """sm_80 code of an object's PTX."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    output(tool("cuobjdump"), "-xptx", "all", str(source), folder=folder)
    (ptx,) = folder.glob("*.ptx")
    binary = folder / "kernels.cubin"
    output(tool("ptxas"), "-arch=sm_80", "-o", str(binary), str(ptx))
    return binary


def compile_kernels(folder: Path, cutlass: str) -> dict[str, dict[str, float]]:
    """The bf16 kernels of every head_dim for sm_80, measured; fp16 ones differ in an opcode."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++20", "--expt-relaxed-constexpr", f"-isystem={cutlass}"]
    sizes = shared_bytes(folder, [*flags, "-gencode", "arch=compute_80,code=compute_80"])
    sources = emulated_objects()
    kernels = [(x.parts[-3], int(x.name.split(".")[0].split("_")[1])) for x in sources]
    folders = [folder / f"{kernel}_{dim}" for kernel, dim in kernels]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        binaries = list(pool.map(assemble, sources, folders))
    found = {}
    for (kernel, dim), binary in zip(kernels, binaries, strict=True):
        shared = {
            (f"{kernel}_kernel" if rows == 0 else f"Li{dim}ELi{rows}E"): size
            for (of, at, rows), size in sizes.items()
            if of == kernel and at == dim
        }
        for name, measured in measure(binary, shared).items():
            rows = re.search(rf"Li{dim}ELi(\d+)E", name)
            short = re.search(r"\d((?:decode|prefill)_[a-z]+)I", name)
            label = f"{short.group(1) if short else name} {dim}"
            label += f" x {rows.group(1)}" if rows else ""
            found[label] = row(measured)
        found[f"binary of {kernel} {dim}"] = {
            **dict.fromkeys(DIRECTIONS, 0),
            "shared_bytes": -(-binary.stat().st_size // 16384) * 16384,
        }
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """A line a kernel."""
    head = f"{'kernel':28}" + "".join(f"{name:>15}" for name in DIRECTIONS)
    lines = [
        f"{name:28}" + "".join(f"{x:>15}" for x in row.values()) for name, row in found.items()
    ]
    return "\n".join([head, *lines])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the limits, print the changes")
    parser.add_argument("--cutlass", help="include directory of CUTLASS; default: fetched")
    parser.add_argument("--folder", type=Path, default=REPO / "build" / "gates")
    options = parser.parse_args()
    cutlass = (
        options.cutlass
        or output(
            sys.executable, str(REPO / "tools/cuda/fetch_cutlass.py"), str(REPO / "build/cutlass")
        ).strip()
    )
    found = compile_kernels(options.folder, cutlass)
    compiler = output(tool("nvcc"), "--version").split("release ")[1].split(",")[0]
    kept = json.loads(LIMITS.read_text()) if LIMITS.exists() else {"nvcc": compiler, "kernels": {}}
    print(table(found))
    changes = differences(found, kept["kernels"])
    worse = [change for change in changes if change.worse]
    if compiler != kept["nvcc"]:  # another compiler may take more or less; none may spill
        print(f"limits are of nvcc {kept['nvcc']}, this is {compiler}: only spills count")
        worse = [change for change in worse if change.field == "local_bytes"]
    print("\nno changes" if not changes else f"\n{change_table(changes)}")
    if options.update:
        LIMITS.write_text(json.dumps({**kept, "nvcc": compiler, "kernels": found}, indent=1) + "\n")
    elif worse:
        sys.exit(f"{len(worse)} limits are broken")


if __name__ == "__main__":
    main()
