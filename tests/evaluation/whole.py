"""Whole runs and what came of them."""
import json
from pathlib import Path

from evaluation.__main__ import main
from tests.fixtures.servers import FIXTURE_ROWS

KEY = "sk-secret-of-the-test"


def run(out: Path, server: str, base_url: str, *flags: str, env: str = "form-textcraft") -> int:
    return main([
        "run", "--env", env, "--environments", str(FIXTURE_ROWS), "--server", server, "--base-url", base_url, "--model",
        "stand-in", "--model-tries", "4", "--out", str(out), *flags
    ])


def attempts(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "attempts.jsonl").read_text().splitlines()]


def summary(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


def outcomes(out: Path) -> dict[str, str]:
    return {record["item"].rsplit("_", 1)[-1]: record["outcome"] for record in attempts(out)}


def opened(client) -> int:
    import urllib.request
    with urllib.request.urlopen(client.base.removesuffix("/maze") + "/opened") as answer:
        return json.loads(answer.read())
