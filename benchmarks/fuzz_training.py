"""What of the tasks and of a training's records is fuzzed: the files of a run's folder, and what is printed."""
import contextlib
import importlib
import io
import json
import random
import sys
from pathlib import Path
from typing import Any

from fuzz import HERE, Target
from fuzz_evaluation import a_text, mutated, spelt

sys.path.insert(0, str(HERE.parent))

RUN: dict[str, Any] = {
    "schema": 1,
    "steps": 4,
    "gpus": {"choice": "all", "count": 2},
    "environment": {"name": "textcraft", "url": "http://127.0.0.1:1"},
    "algorithm": "grpo",
    "runner": "local",
    "created": 1.7e9,
    "world_size": 2,
    "poisoned": [2],
    "nan_steps": [],
    "options": {"skip": []},
    "attempts": [{"number": 1, "started": 1.7e9, "ended": 1.7e9 + 60, "state": "died", "cause": "nccl_timeout", "reason": "x",
                  "resumed_from": 2, "last_step": 3}],
}  # yapf: disable
FILES: dict[str, Any] = {
    "run.json": RUN,
    "state.json": {"state": "running", "updated": 1.7e9, "step": 3, "pid": 7, "host": "h", "silent_seconds": 1.0, "note": "n",
                   "environment": {"reachable": True, "sessions": 3}, "gpus": "0"},
    "metrics.jsonl": {"step": 3, "metrics": {"critic/task_score/mean": 0.5, "timing_s/step": 3.0, "actor/grad_norm": 1.0}},
    "events.jsonl": {"event": "evaluated", "time": 1.7e9, "step": 2},
    "eval/step2/summary.json": {"attempts": 1, "expected": 1, "errors": 0, "success": {"mean": 1.0, "low": 0.1, "high": 1.0}},
    "eval/step2/run.json": {"config": {"env": "textcraft", "model": "m-global_step_2", "samples": 1, "items": ["textcraft_0"]}},
    "global_step_2/actor/fsdp_config.json": {"world_size": 2, "FSDP_version": 1},
    "latest_checkpointed_iteration.txt": 2,
}  # yapf: disable


def a_file(chance: random.Random) -> bytes:
    """Return the name of a run's file and what it holds."""
    name = chance.choice(list(FILES))
    lines = 3 if name.endswith(".jsonl") else 1
    body = b"\n".join(spelt(chance, mutated(chance, FILES[name], chance.choice([0.02, 0.1]))) for _ in range(lines))
    return name.encode() + b"\n" + body


def check_file(data: bytes, folder: Path) -> bool:
    """Show a run's folder of which one file is the case's; return whether it is shown, and not refused in a line."""
    shows = importlib.import_module("tests.training.test_foreign").shows
    name, _, body = data.partition(b"\n")
    for other, value in FILES.items():
        place = folder / other
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(body if other == name.decode() else json.dumps(value).encode())
    return bool(shows(folder))


def check_text(data: bytes, folder: Path) -> bool:
    """Let the tasks and the trainer's own programs print a text: a line each, and nothing that a terminal obeys."""
    from servers.saying import say as serve_says
    from tasks.lib.errors import UserError
    from tasks.lib.notices import put, say, tell
    from tasks.lib.tables import print_table
    from training.text import clipped, plain, shown
    text = data.decode("utf-8", "surrogatepass")
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        for one in (put, say, tell, serve_says):
            one(text)
        print_table(("a", "b"), [(text, text)])
    seen = out.getvalue()
    assert seen.count("\n") == 6 and all(line.isprintable() for line in seen.split("\n")), repr(seen)
    assert all(part.isprintable() for part in (UserError(text + "x").said("t"), shown(text), clipped(text, 20)))
    assert "\x1b" not in plain(text)
    return True


def targets() -> dict[str, Target]:
    """Return the targets of a training's records and of the tasks' printing."""
    return {"training.files": Target(a_file, check_file), "tasks.text": Target(a_text, check_text)}
