"""Change one thing in a module that decides, and see whether its wing's fast tests notice.

    python benchmarks/mutation.py --module scripts/merger/plan.py --sample 20 --seed 1

Each mutant is one comparison, operator, `min`, `not` or small number that is another one, in a copy of the project; the
module's tests run there until one fails. A mutant that survives is printed with its line: write the test that it lacks, or
say why the two are equal. Exit 0 where at least --least of them were killed.
"""
from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = {
    "scripts/merger/layout.py": ["tests/merger/test_layout.py"],
    "scripts/merger/plan.py":
    ["tests/merger/test_plan.py", "tests/merger/test_layout.py", "tests/merger/test_saved_names.py"],
    "scripts/merger/checkpoint.py": ["tests/merger/test_discover.py", "tests/merger/test_job.py"],
    "scripts/merger/lora.py": ["tests/merger/test_lora.py"],
    "evaluation/numbers.py": ["tests/evaluation/test_numbers.py"],
    "evaluation/actions.py": ["tests/evaluation/test_actions.py"],
    "evaluation/protocol.py": ["tests/evaluation/test_protocol.py"],
    "evaluation/records.py": ["tests/evaluation/test_records.py"],
    "environment_rows/row.py": ["tests/servers/test_rows.py"],
    "tasks/lib/environments/plan.py": ["tests/tasks/test_environments_plan.py", "tests/servers/test_rows.py"],
}
OTHER: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn,
    ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult, ast.Div: ast.Mult, ast.Mod: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # yapf: disable
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}


def changes(tree: ast.Module) -> Iterator[tuple[ast.expr | ast.stmt, str, object]]:
    """Yield (node, attribute, its other value) for all that can be changed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            for number, op in enumerate(node.ops):
                if type(op) in OTHER:
                    yield node, "ops", [*node.ops[:number], OTHER[type(op)](), *node.ops[number + 1:]]
        elif isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)) and type(node.op) in OTHER:
            yield node, "op", OTHER[type(node.op)]()
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield node, "op", ast.UAdd()  # of a truth value: itself
        elif isinstance(node, ast.Name) and node.id in NAMES:
            yield node, "id", NAMES[node.id]
        elif isinstance(node, ast.Constant) and type(node.value) is int and 0 <= node.value < 100:
            yield node, "value", node.value + 1


def mutant(source: str, number: int) -> tuple[int, str, str]:
    """Return (line, what it says now, the whole changed source) of the change with this number."""
    tree = ast.parse(source)
    node, name, value = list(changes(tree))[number]
    setattr(node, name, value)
    return node.lineno, ast.unparse(node), ast.unparse(ast.fix_missing_locations(tree))


def passes(folder: Path, tests: list[str], limit: float) -> bool:
    """Tell whether the tests pass in the copy within `limit` seconds."""
    argv = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", "--no-header", *tests]
    process = subprocess.Popen(argv, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
                               env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})  # yapf: disable
    try:
        return process.wait(limit) == 0
    except subprocess.TimeoutExpired:  # it never ends, which a user would notice
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", action="append", choices=sorted(TESTS), help="one of these modules; default: all")
    parser.add_argument("--sample", type=int, default=20, help="mutants of each module; 0 for all (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="chooses them (default 0)")
    parser.add_argument("--lines", default="", help="only these lines of the module, such as 240:249")
    parser.add_argument("--least", type=float, default=0.95, help="share that must be killed (default 0.95)")
    asked = parser.parse_args()
    killed = tried = 0
    with tempfile.TemporaryDirectory(prefix="mutation-") as place:
        folder = Path(place) / "project"
        names = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True,
                               check=True).stdout
        for name in filter(None, names.split("\0")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
        subprocess.run(["git", "init", "-q", str(folder)], check=True)
        for module in asked.module or sorted(TESTS):
            tests = [name for name in TESTS[module] if (folder / name).exists()]
            source, begun = (folder / module).read_text(), time.monotonic()
            if not passes(folder, tests, 3600):
                print(f"{module}: its tests fail without a change")
                return 2
            limit = 30 + 5 * (time.monotonic() - begun)
            low, high = map(int, asked.lines.split(":")) if asked.lines else (1, 1 << 30)
            wanted = [
                number for number, (node, *_) in enumerate(changes(ast.parse(source))) if low <= node.lineno <= high
            ]
            if asked.sample:
                wanted = random.Random(asked.seed).sample(wanted, min(asked.sample, len(wanted)))
            lived = 0
            for number in sorted(wanted):
                line, says, changed = mutant(source, number)
                (folder / module).write_text(changed)
                if passes(folder, tests, limit):
                    lived += 1
                    print(f"{module}:{line}: survived as {says}", flush=True)
            (folder / module).write_text(source)
            print(f"{module}: {len(wanted) - lived} of {len(wanted)} killed", flush=True)
            killed, tried = killed + len(wanted) - lived, tried + len(wanted)
    print(f"all: {killed} of {tried} killed")
    return 0 if killed >= asked.least * tried else 1


if __name__ == "__main__":
    sys.exit(main())
