"""Make data for an environment in its own Python: python make_data.py WHAT OUT --source DIR [--data DIR]

WHAT is `toy-NAME` (see servers/toys.py), or a file or folder that only the environment's own packages can make of what was
fetched into --data. --source is the folder that the package folder lies in. OUT must not exist: it appears whole or not
at all.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from typing import Any, Callable

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from servers import toys

del sys.path[1]  # this file's own folder, whose modules could hide a library's

CHUNK = 100_000  # vectors that are in memory at once


def alfworld_logic(out: str, source: str, data: str) -> None:
    """Write alfworld's planning domain and grammar, which its package brings, to the folder `out`."""
    from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH
    os.mkdir(out)
    shutil.copyfile(ALFRED_PDDL_PATH, out + "/alfred.pddl")
    shutil.copyfile(ALFRED_TWL2_PATH, out + "/alfred.twl2")


def webshop_index(out: str, source: str, data: str) -> None:
    """Make webshop's search index: upstream's own program writes the texts, pyserini indexes them."""
    with tempfile.TemporaryDirectory(dir=os.path.dirname(out)) as folder:
        shop = os.path.join(source, "agentenv-webshop", "webshop")
        shutil.copytree(shop + "/search_engine", folder + "/search_engine", ignore=shutil.ignore_patterns("indexes*"))
        shutil.copytree(shop + "/web_agent_site", folder + "/web_agent_site")
        os.symlink(os.path.abspath(data), folder + "/data")
        for name in ("resources", "resources_100", "resources_1k", "resources_100k"):
            os.makedirs(folder + "/search_engine/" + name, exist_ok=True)
        subprocess.run([sys.executable, "convert_product_file_format.py"],
                       cwd=folder + "/search_engine",
                       check=True,
                       stdout=subprocess.DEVNULL)
        toys.index(folder + "/search_engine/resources_1k", out)


def flat_vectors(path: str) -> Any:
    """Return the vectors of a flat faiss index of inner products as an array on disk, of shape (vectors, dimensions).

    Raises:
        ValueError: it is another index.
    """
    import numpy
    # faiss/impl/index_write.cpp: four letters, dimensions, vectors, two unused numbers, trained, metric, floats.
    header = numpy.dtype([("kind", "S4"), ("d", "<i4"), ("n", "<i8"), ("unused", "<i8", 2), ("trained", "?"),
                          ("metric", "<i4"), ("floats", "<u8")])
    with open(path, "rb") as file:
        begin = file.read(header.itemsize)
    found = numpy.frombuffer(begin.ljust(header.itemsize, b"\0"), header)[0]
    if found["kind"] != b"IxFI" or os.path.getsize(path) != header.itemsize + 4 * int(found["floats"]):
        raise ValueError(f"{path} is no whole flat index of inner products")
    shape = int(found["n"]), int(found["d"])
    return numpy.memmap(path, dtype="<f4", mode="r", offset=header.itemsize, shape=shape)


def smaller_index(kind: str, vectors: Any, say: Callable[[str], None] = lambda line: None) -> Any:
    """Return a faiss index of inner products over `vectors`, which are read piece by piece.

    hnsw: a graph over vectors of one byte a dimension. ivfpq: lists of product-quantized vectors, a byte for four dimensions
    (192 of 768); a sixteenth of the lists is searched.
    """
    import faiss
    import numpy
    count, size = vectors.shape
    ip = faiss.METRIC_INNER_PRODUCT
    lists = max(1, min(65536, int(4 * count**0.5), count // 39))
    if kind == "hnsw":
        index = faiss.IndexHNSWSQ(size, faiss.ScalarQuantizer.QT_8bit, 32, ip)
        index.hnsw.efConstruction, index.hnsw.efSearch = 200, 128
        sample = min(count, 100_000)
    elif kind == "ivfpq":
        pieces = max(one for one in range(1, max(2, size // 4 + 1)) if size % one == 0)
        bits = min(8, max(1, (count // 39).bit_length() - 1))
        index = faiss.index_factory(size, f"IVF{lists},PQ{pieces}x{bits}", ip)
        sample = min(count, max(256 * 39, 64 * lists))
    else:
        raise ValueError(f"no index {kind}")
    chosen = numpy.sort(numpy.random.RandomState(0).choice(count, sample, replace=False))
    say(f"training on {sample} of {count} vectors")
    index.train(numpy.ascontiguousarray(vectors[chosen]))
    for begin in range(0, count, CHUNK):
        index.add(numpy.ascontiguousarray(vectors[begin:begin + CHUNK]))
        say(f"{min(count, begin + CHUNK)} of {count} vectors")
    if kind == "ivfpq":
        faiss.extract_index_ivf(index).nprobe = max(1, lists // 16)
    return index


def searchqa_index(kind: str) -> Callable[[str, str, str], None]:
    """Return the maker of searchqa's smaller index."""

    def make(out: str, source: str, data: str) -> None:
        import faiss
        index = smaller_index(kind, flat_vectors(data + "/e5_Flat.index"), lambda line: print(line, flush=True))
        faiss.write_index(index, out)

    return make


MAKERS = {
    "alfworld-logic": alfworld_logic,
    "webshop-index": webshop_index,
    "searchqa-hnsw": searchqa_index("hnsw"),
    "searchqa-ivfpq": searchqa_index("ivfpq"),
}


def make_toy(name: str) -> Callable[[str, str, str], None]:
    """Return the maker of toy data."""

    def make(out: str, source: str, data: str) -> None:
        os.mkdir(out)
        toys.TOYS[name](out, source)
        toys.write_json(out + "/" + toys.ABOUT, {"data": "toy"})

    return make


MAKERS.update({"toy-" + name: make_toy(name) for name in toys.TOYS})


def main() -> None:
    """Make what is asked for."""
    parser = argparse.ArgumentParser(description="Make data for an environment.")
    parser.add_argument("what", choices=sorted(MAKERS))
    parser.add_argument("out")
    parser.add_argument("--source", required=True, help="folder that the package folder lies in")
    parser.add_argument("--data", default="", help="folder with what was fetched")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.abspath(options.out))) as folder:
        half = folder + "/made"
        try:
            MAKERS[options.what](half, os.path.abspath(options.source), os.path.abspath(options.data))
        except (ImportError, OSError, ValueError, RuntimeError, subprocess.CalledProcessError) as error:
            sys.exit("{}: {}: {}".format(options.what, type(error).__name__, " ".join(str(error).split())))
        os.rename(half, options.out)


if __name__ == "__main__":
    main()
