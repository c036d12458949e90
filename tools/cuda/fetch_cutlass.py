# SPDX-License-Identifier: Apache-2.0
"""Fetches the CUTLASS headers that the CUDA kernels are built with, from PyPI.

    python tools/cuda/fetch_cutlass.py build/cutlass    prints the include directory

Nothing is installed: the wheel is downloaded without what it depends on, and its headers unpacked.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "nvidia-cutlass==4.2.0.0"
INCLUDE = "cutlass_library/source/include"


def fetch(folder: Path) -> Path:
    """Include directory below `folder`, which is filled if it is not yet."""
    include = folder / INCLUDE
    done = folder / "complete"
    if done.exists():
        return include
    with tempfile.TemporaryDirectory() as download:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--dest", download, PACKAGE], check=True)
        (wheel,) = Path(download).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith(INCLUDE + "/")]
            archive.extractall(folder, names)
    done.touch()
    return include


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1]).resolve()))
