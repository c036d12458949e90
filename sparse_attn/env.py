# SPDX-License-Identifier: Apache-2.0
"""What a bug report needs to know of an installation; never raises, whatever is broken.

    python -m sparse_attn env

Where the package itself cannot be imported, run this file: it imports nothing but the standard
library until it is asked for the rest. What other modules need to know of the machine stands here
too.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

PACKAGES = ("sparse_attn", "torch", "numpy", "transformers", "vllm", "flash_attn", "matplotlib")
_HERE = Path(__file__).resolve().parent


def cpu_model() -> str:
    """Name of the processor; that of its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def cache_folder() -> Path:
    """Where the package keeps what it has made: SPARSE_ATTN_CACHE or ~/.cache/sparse_attn."""
    return Path(os.environ.get("SPARSE_ATTN_CACHE") or Path.home() / ".cache" / "sparse_attn")


def command_line(words: Sequence[str]) -> str:
    """A command as records keep it: to be typed again, and without the folders of this machine.

    Example:
        >>> command_line(["python", "run.py", "--methods", "a b", "--json=/home/me/x.json"])
        "python run.py --methods 'a b' --json=x.json"
    """

    def short(word: str) -> str:
        option, equals, value = word.rpartition("=")
        return option + equals + (os.path.basename(value) if os.path.isabs(value) else value)

    return shlex.join(map(short, words))


def report() -> dict[str, str]:
    """Names and values; what could not be found out says why in place of its value."""
    return {name: _safely(find) for name, find in _FACTS.items()}


def text() -> str:
    """The report, a line each."""
    return "\n".join(f"{name:18s} {value}" for name, value in report().items())


def _safely(find: Callable[[], object]) -> str:
    try:
        return str(find())
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        line = (str(error).strip() or "no message").splitlines()[0]
        return f"unknown: {type(error).__name__}: {line}"


def _versions() -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} -")
    return ", ".join(found)


def _cpu() -> str:
    return f"{cpu_model()}, {os.cpu_count()} processors"


def _torch() -> str:
    torch = importlib.import_module("torch")
    cuda = torch.version.cuda or torch.version.hip or "none"
    abi = torch._C._GLIBCXX_USE_CXX11_ABI
    return (
        f"{torch.__version__} at {_folder(torch)}, CUDA {cuda}, C++11 ABI {abi}, "
        f"its CPU capability {torch.backends.cpu.get_cpu_capability()}"
    )


def _folder(module: object) -> str:
    return str(Path(getattr(module, "__file__", None) or "nowhere").parent)


def _threads() -> str:
    torch = importlib.import_module("torch")
    given = [f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS",) if name in os.environ]
    return ", ".join([f"{torch.get_num_threads()} of torch", *given])


def _library() -> str:
    files = sorted(_HERE.glob("_C*.so"))
    if not files:
        return f"none beside {_HERE}: the source tree is imported, or the build failed"
    return ", ".join(f"{file} ({file.stat().st_size} bytes)" for file in files)


def _capability() -> str:
    capability: str = importlib.import_module("sparse_attn.ops").cpu_capability()
    return capability


def _backends() -> str:
    names = importlib.import_module("sparse_attn.backends").BACKENDS
    return ", ".join(names)


def _cuda() -> str:
    torch = importlib.import_module("torch")
    if torch.version.cuda is None:
        return f"no device: torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "no device: torch sees none (driver, or CUDA_VISIBLE_DEVICES)"
    count = torch.cuda.device_count()
    capabilities = ["{}.{}".format(*torch.cuda.get_device_capability(n)) for n in range(count)]
    return ", ".join(f"{torch.cuda.get_device_name(n)} {capabilities[n]}" for n in range(count))


def _cuda_kernels() -> str:
    try:
        importlib.import_module("sparse_attn.ops").load_cuda()
    except ImportError as error:
        return f"not there: {error}"
    return "present"


def _cache() -> str:
    folder = cache_folder()
    if not folder.exists():
        return f"{folder} (nothing there)"
    entries = sorted(folder.iterdir())
    return f"{folder}: " + (", ".join(map(_sized, entries)) or "empty")


def _sized(entry: Path) -> str:
    files = [entry] if entry.is_file() else [file for file in entry.rglob("*") if file.is_file()]
    return f"{entry.name} ({sum(file.stat().st_size for file in files) >> 10} KiB)"


def _variables() -> str:
    found = {name: value for name, value in os.environ.items() if name.startswith("SPARSE_ATTN_")}
    return ", ".join(f"{name}={value}" for name, value in sorted(found.items())) or "none"


def _self_test() -> str:
    """Whether attention over everything is attention."""
    torch = importlib.import_module("torch")
    package = importlib.import_module("sparse_attn")
    q = torch.arange(2 * 70 * 16, dtype=torch.float32).sin().view(1, 2, 70, 16)
    ours = package.attention(q, q, q, "dense")
    theirs = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    error = float((ours - theirs).abs().max())
    return f"{'passes' if error < 1e-4 else 'FAILS'} (largest difference to torch {error:.1e})"


_FACTS: dict[str, Callable[[], object]] = {
    "packages": _versions,
    "python": lambda: f"{sys.version.split()[0]} at {sys.executable}",
    "system": platform.platform,
    "cpu": _cpu,
    "torch": _torch,
    "threads": _threads,
    "package": lambda: _HERE,
    "library": _library,
    "cpu kernels": _capability,
    "backends": _backends,
    "cuda": _cuda,
    "cuda kernels": _cuda_kernels,
    "variables": _variables,
    "cache": _cache,
    "self-test": _self_test,
}

if __name__ == "__main__":
    sys.stdout.write(text() + "\n")
