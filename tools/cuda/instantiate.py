# SPDX-License-Identifier: Apache-2.0
"""Writes csrc/cuda/*/instantiations/: one file per kernel, element type and head_dim.

python tools/cuda/instantiate.py           writes them
python tools/cuda/instantiate.py --check   fails if the files differ from what it would write
"""

import sys
from pathlib import Path

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
ELEMENTS = {"bf16": "cutlass::bfloat16_t", "fp16": "cutlass::half_t"}
HEAD_DIMS = (64, 96, 128, 256)
#: Kernel to the parameters of its launch function, launch_<kernel>.
KERNELS = {
    "decode": "const DecodeParams&, cudaStream_t",
    "prefill": "const PrefillParams&, cudaStream_t",
}


def files() -> dict[Path, str]:
    """All files of the instantiations folders and their texts."""
    texts = {}
    for kernel, parameters in KERNELS.items():
        for name, element in ELEMENTS.items():
            for dim in HEAD_DIMS:
                path = CUDA / kernel / "instantiations" / f"{name}_{dim}.cu"
                texts[path] = (
                    "// SPDX-License-Identifier: Apache-2.0\n"
                    "// Written by tools/cuda/instantiate.py.\n"
                    '#include "../launch.cuh"\n\n'
                    "namespace sparse_attn::cuda {\n\n"
                    f"template cudaError_t launch_{kernel}<{element}, {dim}>({parameters});\n\n"
                    "}  // namespace sparse_attn::cuda\n"
                )
    return texts


def differences() -> list[str]:
    """What is missing, left over or different on disk."""
    wanted = files()
    found = set(CUDA.glob("*/instantiations/*"))
    wrong = [path for path, text in wanted.items() if path not in found or path.read_text() != text]
    return sorted(str(path.relative_to(CUDA)) for path in {*wrong, *(found - set(wanted))})


def main() -> None:
    """Writes the files, or with --check compares them."""
    if sys.argv[1:] == ["--check"]:
        if wrong := differences():
            sys.exit(f"run tools/cuda/instantiate.py: {', '.join(wrong)}")
        return
    wanted = files()
    for path in set(CUDA.glob("*/instantiations/*")) - set(wanted):
        path.unlink()
    for path, text in wanted.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
