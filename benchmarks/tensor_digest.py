"""Compares merged models tensor by tensor, through a digest of each, so that no two outputs need to lie side by side."""
from __future__ import annotations

import hashlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CHUNK = 4 << 20  # bytes a read

Digests = dict[str, list[Any]]  # name: [dtype as safetensors spells it, shape, SHA-256 of the bytes]


def digest_folder(folder: Path) -> Digests:
    """Digests of all tensors in the safetensors files of `folder`.

    Raises ValueError when there is no such file, a name appears twice, or the index and the files disagree.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"no *.safetensors in {folder}")
    places: dict[str, tuple[Path, int, list[Any]]] = {}
    for path in files:
        header, data = _header(path)
        for name, entry in header.items():
            if name in places:
                raise ValueError(f"{name} is in {path.name} and in {places[name][0].name}")
            places[name] = (path, data, [entry["dtype"], entry["shape"], entry["data_offsets"]])
    _check_index(folder, {name: place[0].name for name, place in places.items()})
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(places, pool.map(_digest, places.values()), strict=True))


def digest_pickled(path: Path) -> Digests:
    """Digests of all fp32 tensors of a `torch.save` of a state dict."""
    import torch
    state = torch.load(path, mmap=True, weights_only=True)
    return {
        name: ["F32", list(value.shape), hashlib.sha256(value.numpy().data).hexdigest()]
        for name, value in state.items()
    }


def differences(expected: Digests, found: Digests, tied: bool) -> list[str]:
    """What is missing, surplus or unequal, a sentence each; with `tied`, lm_head may be left out."""
    optional = {"lm_head.weight"} if tied else set()
    texts = [f"{name} is missing" for name in sorted(expected.keys() - found.keys() - optional)]
    texts += [f"{name} is surplus" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        if expected[name][:2] != found[name][:2]:
            texts.append(f"{name} is {found[name][0]} {found[name][1]}, not {expected[name][0]} {expected[name][1]}")
        elif expected[name] != found[name]:
            texts.append(f"{name} has other values")
    return texts


def _header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The header of a safetensors file without its metadata, and where the data begins.

    Format: 8 bytes of little-endian length, then JSON (https://github.com/huggingface/safetensors#format).
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _check_index(folder: Path, files: dict[str, str]) -> None:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        if json.loads(index.read_text())["weight_map"] != files:
            raise ValueError(f"{index.name} does not name the tensors that are there")
    elif len(set(files.values())) > 1:
        raise ValueError(f"several safetensors files in {folder}, and no {index.name}")


def _digest(place: tuple[Path, int, list[Any]]) -> list[Any]:
    path, data, (dtype, shape, (begin, end)) = place
    sha, left = hashlib.sha256(), end - begin
    with path.open("rb", buffering=0) as file:
        file.seek(data + begin)
        while left:
            chunk = file.read(min(CHUNK, left))
            if not chunk:
                raise ValueError(f"{path.name} ends before its tensors do")
            sha.update(chunk)
            left -= len(chunk)
    return [dtype, shape, sha.hexdigest()]


if __name__ == "__main__":  # in a process of its own, because of torch
    print(json.dumps(digest_pickled(Path(sys.argv[1]))))
