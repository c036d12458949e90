# SPDX-License-Identifier: Apache-2.0
"""What clustering a prefix and looking keys up cost, beside other libraries and the memory itself.

    python benchmarks/centroid_cost.py                  # scikit-learn and faiss where installed
    python benchmarks/centroid_cost.py --parts lookup

kmeans: ten iterations of one head's 32k keys into 1,638 clusters, head_dim 128, on one thread,
from the same start; scikit-learn's KMeans and faiss's Kmeans do the same on unit keys.
fit: eight KV heads, two threads, elapsed time. lookup: one decoded token, eight KV heads, groups
of four, from sixteen layers' indexes in turn, so that centroids come from main memory, against the
time to read as many bytes at the rate that this machine's memory was read in between.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_attn import CentroidIndex, calibrate_threshold
from sparse_attn.bench.machine import Machine
from sparse_attn.bench.runner import environment
from sparse_attn.bench.timing import interleaved, paired_ratio, spread
from sparse_attn.env import command_line
from sparse_attn.selection import cluster_means, cluster_members, spherical_kmeans

HEAD_DIM = 128
LENGTH = 32768
CLUSTERS = 1638
ITERATIONS = 10
LAYERS = 16
RESULTS = Path(__file__).parent / "results" / "centroid_cost.json"


def keys(heads: int, length: int, seed: int = 0) -> Tensor:
    """[1, heads, length, HEAD_DIM]: neighbours are alike, and every head leans to one side."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, heads, length, HEAD_DIM, generator=generator)
    for shift in (1, 2, 4, 8, 16):
        x = 0.5 * x + 0.5 * x.roll(shift, 2)
    return 4 * x + 0.5 * torch.randn(1, heads, 1, HEAD_DIM, generator=generator)


def mean_cosine(unit: Tensor, labels: Tensor) -> float:
    """Of every key and the mean direction of its cluster; both [1, 1, n, ...]."""
    indptr, members = cluster_members(labels.int().view(1, 1, -1), CLUSTERS)
    means = F.normalize(cluster_means(unit, None, indptr, members), dim=-1)
    return (unit[0, 0] * means[0, 0, labels.long().view(-1)]).sum(-1).mean().item()


def kmeans(rounds: int) -> list[dict]:
    """One record per library that is installed."""
    x = keys(1, LENGTH)
    unit = F.normalize(x, dim=-1)
    start = spherical_kmeans(x, CLUSTERS, iterations=0)
    indptr, members = cluster_members(start, CLUSTERS)
    directions = F.normalize(cluster_means(unit, None, indptr, members), dim=-1)[0, 0].numpy()
    rows, labels, indexes = unit[0, 0].numpy(), {}, []

    def ours() -> None:
        labels["sparse_attn"] = spherical_kmeans(x, CLUSTERS, iterations=ITERATIONS, tolerance=0.0)

    calls = {
        "sparse_attn": ours,
        "sparse_attn start": lambda: spherical_kmeans(x, CLUSTERS, iterations=0),
    }
    with contextlib.suppress(ImportError):
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits

        def sklearn() -> None:
            fit = KMeans(CLUSTERS, init=directions, n_init=1, max_iter=ITERATIONS, tol=0.0)
            with threadpool_limits(1):
                labels["scikit-learn"] = torch.from_numpy(fit.fit(rows).labels_)

        calls["scikit-learn"] = sklearn
    with contextlib.suppress(ImportError):
        import faiss

        faiss.omp_set_num_threads(1)

        def by_faiss() -> None:
            fit = faiss.Kmeans(
                HEAD_DIM,
                CLUSTERS,
                niter=ITERATIONS,
                spherical=True,
                max_points_per_centroid=LENGTH,
                min_points_per_centroid=1,
            )
            fit.train(rows, init_centroids=directions)
            indexes.append(fit.index)

        calls["faiss"] = by_faiss
    times = interleaved(calls, rounds=rounds)
    begin = times.pop("sparse_attn start")
    if indexes:
        labels["faiss"] = torch.from_numpy(indexes[-1].search(rows, 1)[1])
    # A peer is given the start, but labels the keys by it in its first iteration, and scikit-learn
    # once more at the end; ours makes the start itself and knows the labels then.
    ours_without = [a - b for a, b in zip(times["sparse_attn"].cpu, begin.cpu)]
    return [
        {
            "part": "kmeans",
            "library": name,
            "iterations": ITERATIONS,
            "total_s": spread(entry.cpu),
            "start_s": spread(begin.cpu) if name == "sparse_attn" else None,
            "iteration_s": spread(
                ours_without if name == "sparse_attn" else entry.cpu, 1 / ITERATIONS
            ),
            "time_over_ours": paired_ratio(
                ours_without if name == "sparse_attn" else entry.cpu, ours_without
            ),
            "mean_cosine": mean_cosine(unit, labels[name]),
        }
        for name, entry in times.items()
    ]


def fit(_: int) -> list[dict]:
    """A prefix of eight KV heads, on two threads."""
    x, records = keys(8, LENGTH), []
    torch.set_num_threads(2)
    for levels in (1, 2):
        begin, cpu = time.perf_counter(), time.process_time()
        CentroidIndex.fit(x, CLUSTERS, levels=levels)
        wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
        records.append({"part": "fit", "levels": levels, "wall_s": wall, "cpu_s": cpu})
    torch.set_num_threads(1)
    return records


def lookup(rounds: int) -> list[dict]:
    """A record per length and lookup."""
    machine = Machine(threads=1)
    dram = machine.limit("dram")
    assert dram is not None
    records = []
    for length in (8192, LENGTH, 131072):
        # Quality does not matter here, and iterations cost: heads and layers share one clustering.
        one = CentroidIndex.fit(keys(1, length), ratio=0.05, levels=2, iterations=1)
        base = one.select(heads=[0] * 8)
        layers = max(2, LAYERS * LENGTH // length)
        copies = [
            replace(
                base,
                centroids=base.centroids.clone(),
                coarse_centroids=base.coarse_centroids.clone(),
                members=base.members.clone(),
            )
            for _ in range(layers)
        ]
        q = torch.randn(1, 32, 1, HEAD_DIM)
        k = torch.zeros(1, 8, length + 1, HEAD_DIM)
        coarse = calibrate_threshold(base, q, 0.7, level="coarse")
        kinds = {
            "flat": {"threshold": calibrate_threshold(base, q, 0.95)},
            "two levels": {
                "threshold": calibrate_threshold(base, q, 0.95, coarse_threshold=coarse),
                "coarse_threshold": coarse,
            },
        }
        calls = {"read": dram.call}
        for name, thresholds in kinds.items():
            turns = itertools.cycle([copy.lookup(**thresholds) for copy in copies])
            calls[name] = lambda turns=turns, q=q, k=k: next(turns).build(q, k)
        for call in calls.values():
            call()
        times = interleaved(calls, rounds=rounds, min_sample=2e-2)
        size = base.centroids.numel() * 4
        read = [t * size / dram.amount for t in times["read"].cpu]
        for name in kinds:
            records.append(
                {
                    "part": "lookup",
                    "kind": name,
                    "length": length,
                    "clusters": base.clusters,
                    "build_ms": spread(times[name].cpu, 1e3),
                    "read_centroids_ms": spread(read, 1e3),
                    "over_read": paired_ratio(times[name].cpu, read),
                    "over_flat": paired_ratio(times[name].cpu, times["flat"].cpu),
                }
            )
    return records


PARTS = {"kmeans": kmeans, "fit": fit, "lookup": lookup}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS, help="parts are replaced in it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    command = command_line(["python", "benchmarks/centroid_cost.py", *sys.argv[1:]])
    found = []
    for part in arguments.parts:
        for record in PARTS[part](arguments.rounds):
            print(json.dumps(record))
            found.append(record | {"command": command, "env": environment()})
    old = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
    kept = [record for record in old if record["part"] not in arguments.parts]
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(kept + found, indent=1) + "\n")


if __name__ == "__main__":
    main()
