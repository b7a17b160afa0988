"""Time `invoke build.all`: with nothing changed, and with one source file of verl touched.

    python benchmarks/build.py              with the settings of this project (.env, the environment)
    python benchmarks/build.py --fixture    with the tests' small sources, in a copy of the project

The first build is not reported: it is mostly download. The touched file gets its old content back.
"""
import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def build(root: Path, env: dict[str, str]) -> tuple[float, str]:
    """Run `invoke build.all`; return the seconds and what it said.

    Raises:
        SystemExit: the build failed.
    """
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "invoke", "build.all"],
                          cwd=root,
                          env=env,
                          text=True,
                          stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT,
                          check=False)
    if done.returncode:
        sys.exit(done.stdout + f"build.all failed with exit code {done.returncode}")
    return time.monotonic() - start, done.stdout


def installs(said: str) -> int:
    """Count the layers with `pip install` of dependencies that were run and not taken from the cache."""
    steps = re.findall(r"^#(\d+) \[[^\]]+\] RUN .*constraint", said, re.M)
    return sum(f"#{step} CACHED" not in said for step in steps)


def measure(root: Path, sources: Path, env: dict[str, str]) -> None:
    """Print both figures."""
    build(root, env)
    seconds, said = build(root, env)
    print(f"nothing changed: {seconds:.1f} s, {installs(said)} dependency installs")
    touched = sources / "AgentGym-RL" / "verl" / "__init__.py"
    before = touched.read_bytes()
    touched.write_bytes(before + f"\n# touched at {time.time()}\n".encode())
    try:
        seconds, said = build(root, env)
    finally:
        touched.write_bytes(before)
    print(f"a touched source file: {seconds:.1f} s, {installs(said)} dependency installs")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fixture", action="store_true", help="use the tests' sources, images and settings")
    if not parser.parse_args().fixture:
        from tasks.lib.engine.sources import RL, choose_sources, is_url
        from tasks.lib.settings import read_dotenv
        source = choose_sources(ROOT, {**read_dotenv(), **os.environ}).get(RL, "")
        if not source or is_url(source):
            sys.exit(f"build benchmark: no AgentGym-RL checkout to touch a file in; set {RL}, or pass --fixture")
        measure(ROOT, Path(source), dict(os.environ))
        return
    from tests.docker.workbench import Workbench
    with tempfile.TemporaryDirectory() as folder:
        bench = Workbench.create(Path(folder))
        try:
            measure(bench.root, bench.sources, bench.environment())
        finally:
            bench.remove()


if __name__ == "__main__":
    main()
