"""Runs of one configuration, played by several machines, as one."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.attempts import ERRORS, Attempt, Key, key_of
from evaluation.problems import Misuse
from evaluation.records import differences, identity, read_attempts, read_run, told


class Joined(NamedTuple):
    """Several runs as one.

    Attributes:
        twice: attempts that more than one of them has, of which one stands.
        versions: the runners that played them, and what those were run with; run.json has the first.
    """
    manifest: dict[str, Any]
    records: list[Attempt]
    twice: int
    versions: list[str]


def join(folders: Sequence[Path]) -> Joined:
    """Return the runs in `folders` as one: the items of all, in the order of the folders.

    Of an attempt that several runs have, one with a result stands, the earliest of those.

    Raises:
        Misuse: a run cannot be read, or differs from the first in more than items and samples.
    """
    manifests = [read_run(folder) for folder in folders]
    first, seen = manifests[0], [folder.resolve() for folder in folders]
    for folder, place in zip(folders, seen, strict=True):
        if seen.count(place) > 1:
            raise Misuse(f"merge: {folder} is named twice; name each run once")
    for folder, other in zip(folders[1:], manifests[1:], strict=True):
        differing = differences(identity(first["config"]), identity(other["config"]))
        if differing:
            raise Misuse(f"merge: {folder} has another configuration than {folders[0]} ({'; '.join(differing)}); "
                         "merge runs of one configuration, or compare these")
        about = [one.get("about") or {} for one in (first, other)]
        if about[0] != about[1]:
            raise Misuse(f"merge: {folders[0]} was played on {told(about[0])}, and {folder} on {told(about[1])}; merge "
                         "runs on the same data, or compare these")
    items = list(dict.fromkeys(item for one in manifests for item in one["config"]["items"]))
    samples = max(one["config"]["samples"] for one in manifests)
    standing: dict[Key, Attempt] = {}
    twice = 0
    for folder in folders:
        for record in read_attempts(folder):
            before = standing.get(key_of(record))
            twice += before is not None
            if before is None or (before["outcome"] in ERRORS, before["started"]) > (record["outcome"]
                                                                                     in ERRORS, record["started"]):
                standing[key_of(record)] = record
    config = {**first["config"], "items": items, "samples": samples}
    work = sorted((work for one in manifests for work in one["work"]), key=lambda one: one["started"])
    places = {item: place for place, item in enumerate(items)}
    records = sorted(standing.values(), key=lambda one: (one["sample"], places[one["item"]]))
    origin = "; ".join(dict.fromkeys(str(one.get("items_from", "")) for one in manifests))
    versions = [f"{one['revision'] or 'unknown'} {one.get('versions') or ''}" for one in manifests]
    return Joined({
        **first, "config": config,
        "work": work,
        "items_from": origin
    }, records, twice, list(dict.fromkeys(versions)))
