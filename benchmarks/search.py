"""Nearest candidates: the exact search and hnswlib's graphs, by the size of the base. Recall, and the time to build and to ask.

    python benchmarks/search.py --to docs/search.md

Embeddings are of unit norm. "structured": from a space of 32 directions with some noise, in which neighbours are near, as encoders
give them; "random" (of the first width): normal numbers, where nothing is near and graphs find least. Seconds are the least of
several calls, after one that is not counted (it compiles); a graph is built once.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import processes
import tyro

from jaxmethods.retrieval import approximate, search

DIRECTIONS, NOISE = 32, 0.2


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    to: str | None = None
    """A Markdown file for the table; by default it is printed."""
    sizes: tuple[int, ...] = (1_000, 10_000, 100_000)
    """Of the base."""
    dims: tuple[int, ...] = (384, 512)
    """Of embeddings: MiniLM's and CLIP's."""
    queries: int = 256
    k: int = 10
    breadths: tuple[int, ...] = (32, 128)
    """How many near ones the graph's search looks at."""
    calls: int = 5
    """Timed calls."""
    threads: int = 2
    """Of hnswlib. The exact search takes what JAX takes."""


def main(o: Options) -> None:
    rows = [
        row
        for kind in ("structured", "random")
        for dim in (o.dims if kind == "structured" else o.dims[:1])
        for size in o.sizes
        for row in measured(o, kind, size, dim)
    ]
    text = table(o, rows)
    if o.to is None:
        print(text)
    else:
        Path(o.to).write_text(text + "\n")


def embeddings(kind: str, rows: int, dim: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, dim)).astype(np.float32)
    if kind == "structured":
        directions = np.random.default_rng(0).normal(size=(DIRECTIONS, dim)) / np.sqrt(DIRECTIONS)
        x = (rng.normal(size=(rows, DIRECTIONS)) @ directions + NOISE * x).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def measured(o: Options, kind: str, size: int, dim: int) -> list[dict[str, Any]]:
    candidates, queries = embeddings(kind, size, dim, 1), embeddings(kind, o.queries, dim, 2)
    at_hand = jax.device_put(candidates)
    exact = lambda: jax.block_until_ready(search.top_k(queries, at_hand, o.k))
    right = np.asarray(exact()[1])
    told = {"kind": kind, "dim": dim, "size": size}
    found = [told | {"form": "exact", "recall": 1.0, "build": 0.0, "ask": least(exact, o.calls)}]
    begin = time.perf_counter()
    graph = approximate.graph_of(candidates, threads=o.threads)
    built = time.perf_counter() - begin
    for breadth in o.breadths:
        near = lambda breadth=breadth: approximate.top_k(queries, graph, o.k, breadth=breadth, threads=o.threads)
        rows = near()[1]
        hits = np.mean([len(np.intersect1d(a, b)) / o.k for a, b in zip(rows, right, strict=True)])
        asked = {"recall": float(hits), "build": built, "ask": least(near, o.calls)}
        found.append(told | {"form": f"graph, breadth {breadth}"} | asked)
    print(f"{kind}, width {dim}, {size:,}: built in {built:.0f} s", file=sys.stderr)
    return found


def least(function: Callable[[], Any], calls: int) -> float:
    seconds = []
    for _ in range(calls):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def table(o: Options, rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Exact and approximate search, by the size of the base, on the CPU",
        "",
        f"`python benchmarks/search.py --sizes {' '.join(map(str, o.sizes))}`, {date.today()}, "
        f"{processes.cpu()}, {o.threads} threads of hnswlib, float32; jax {jax.__version__}, "
        f"hnswlib {version('hnswlib')} (16 neighbours, built with breadth 200). {o.queries} queries at once, "
        f"k = {o.k}. Recall is the share of the {o.k} nearest that was found, query times are the least of {o.calls} calls; the "
        f"load average at the end was {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.",
        "",
        "| embeddings | width | base | search | recall | build, s | queries, ms | exact / graph |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    exact = 0.0
    for row in rows:
        first = row["form"] == "exact"
        exact = row["ask"] if first else exact
        build, ratio = ("", "") if first else (f"{row['build']:.1f}", f"{exact / row['ask']:.1f}")
        lines.append(
            f"| {row['kind']} | {row['dim']} | {row['size']:,} | {row['form']} | {row['recall']:.3f} | {build} | "
            f"{1000 * row['ask']:.1f} | {ratio} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options))
