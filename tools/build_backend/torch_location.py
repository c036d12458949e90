# SPDX-License-Identifier: Apache-2.0
"""Find the torch whose headers the native code is compiled against, without importing it.

Two places are searched, in this order:

1. what this interpreter can import (a developer's environment, or an isolated build
   environment that torch was installed into as a build requirement);
2. what the interpreter imports once ``PYTHON*`` variables are ignored. An installer isolates a
   build from the environment it installs into through ``PYTHONPATH``, so this is the environment
   the package will live in; a torch found there need not be downloaded again.

Run as a script it prints the directory of the torch package (CMakeLists.txt does that).
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

MINIMUM = (2, 11)
"""Oldest torch (major, minor) whose headers have what the native code needs."""

_PRINT_ORIGIN = (
    "import importlib.util as u; s = u.find_spec('torch'); print(s.origin or '' if s else '')"
)


def _importable_here() -> Path | None:
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def _importable_in_target() -> Path | None:
    done = subprocess.run(
        [sys.executable, "-E", "-c", _PRINT_ORIGIN],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    origin = done.stdout.strip()
    return Path(origin).parent if done.returncode == 0 and origin else None


def _usable(torch_dir: Path) -> bool:
    """Whether ``torch_dir`` is a torch with stable-ABI headers, at least of version MINIMUM."""
    version_file = torch_dir / "version.py"
    if not (torch_dir / "include/torch/csrc/stable/library.h").is_file():
        return False
    if not version_file.is_file():
        return False
    found = re.search(r"__version__ = ['\"](\d+)\.(\d+)", version_file.read_text())
    return bool(found) and (int(found[1]), int(found[2])) >= MINIMUM


def find_torch() -> Path | None:
    """Return the directory of a usable torch package, or None."""
    for candidate in (_importable_here, _importable_in_target):
        torch_dir = candidate()
        if torch_dir and _usable(torch_dir):
            return torch_dir
    return None


def main() -> int:
    """Print the directory of torch; exit status 1 if there is none."""
    torch_dir = find_torch()
    if torch_dir is None:
        wanted = ".".join(map(str, MINIMUM))
        print(f"no torch >= {wanted} is installed for {sys.executable}", file=sys.stderr)
        return 1
    print(torch_dir.as_posix())
    return 0


if __name__ == "__main__":
    sys.exit(main())
