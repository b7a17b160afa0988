"""What searchqa's smaller search indexes cost and find, on made-up vectors: recall@3 against the flat one, memory, queries a second.

    python benchmarks/searchqa.py [--vectors 200000] [--dimensions 768] [--queries 500] [--index hnsw,ivfpq] [--json]

It needs faiss-cpu. The vectors lie around cluster centres, as those of passages do about their subjects; drawn evenly they would
have no neighbours to find, and no index but the flat one would find any. Memory is what the process gains by reading the index.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from servers.make_data import flat_vectors, smaller_index

CLUSTER, SPREAD = 100, 0.6  # vectors a centre, and their distance from it where a centre is of length 1
# Read in a process of its own: what another index left in the allocator must not count.
READ = """
import resource, sys, time, faiss, numpy
faiss.omp_set_num_threads(1)
queries = numpy.load(sys.argv[2])
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1000
before = resident()
index = faiss.read_index(sys.argv[1])
index.search(queries[:1], 3)
gained = resident() - before
begun = time.perf_counter()
for query in queries:
    index.search(query[None], 3)
print(gained, len(queries) / (time.perf_counter() - begun))
"""


def made_up(count: int, dimensions: int, queries: int, seed: int = 0) -> tuple[Any, Any]:
    """Return vectors of shape (count, dimensions) and queries near some of them, all of length 1."""
    rng = numpy.random.RandomState(seed)
    centres = rng.randn(max(1, count // CLUSTER), dimensions).astype("float32") / dimensions**0.5

    def around(number: int) -> Any:
        noise = rng.randn(number, dimensions).astype("float32") * SPREAD / dimensions**0.5
        found = centres[rng.randint(0, len(centres), number)] + noise
        return found / numpy.linalg.norm(found, axis=1, keepdims=True)

    return around(count), around(queries)


def measure(index: Any, queries: Any, expected: Any, folder: Path) -> dict[str, float]:
    """Return what `index` finds of `expected` (the three nearest of each query), and what it costs."""
    import faiss
    found = index.search(queries, 3)[1]
    recall = numpy.mean([len(set(one) & set(right)) / 3 for one, right in zip(found, expected, strict=True)])
    file, asked = folder / "index", folder / "queries.npy"
    faiss.write_index(index, str(file))
    numpy.save(asked, queries)
    said = subprocess.run([sys.executable, "-c", READ, file, asked], capture_output=True, text=True, check=True).stdout
    gained, rate = map(float, said.split())
    return {
        "recall_at_3": round(float(recall), 3),
        "file_mb": round(file.stat().st_size / 1e6, 1),
        "memory_mb": round(gained, 1),
        "queries_per_s": round(rate, 1)
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--vectors", type=int, default=200_000)
    parser.add_argument("--dimensions", type=int, default=768)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--index", default="hnsw,ivfpq")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    try:
        import faiss
    except ImportError:
        sys.exit("searchqa: needs faiss; `pip install faiss-cpu`")
    vectors, queries = made_up(options.vectors, options.dimensions, options.queries)
    flat = faiss.IndexFlatIP(options.dimensions)
    flat.add(vectors)
    expected = flat.search(queries, 3)[1]
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results["flat"] = {**measure(flat, queries, expected, folder), "made_s": 0.0}
        (folder / "index").rename(folder / "flat")
        on_disk = flat_vectors(str(folder / "flat"))  # as env.data reads it
        for kind in options.index.split(","):
            begun = time.perf_counter()
            index = smaller_index(kind, on_disk)
            made = time.perf_counter() - begun
            results[kind] = {**measure(index, queries, expected, folder), "made_s": round(made, 1)}
    if options.json:
        print(json.dumps({"vectors": options.vectors, "dimensions": options.dimensions, "results": results}))
        return
    print(
        f"{options.vectors} vectors of {options.dimensions} dimensions, {options.queries} queries one by one on one core"
    )
    print(f"{'index':8}{'recall@3':>10}{'file MB':>10}{'memory MB':>11}{'queries/s':>11}{'made in s':>11}")
    for kind, one in results.items():
        print(
            f"{kind:8}{one['recall_at_3']:>10.3f}{one['file_mb']:>10.1f}{one['memory_mb']:>11.1f}{one['queries_per_s']:>11.1f}"
            f"{one['made_s']:>11.1f}")


if __name__ == "__main__":
    main()
