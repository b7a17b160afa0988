"""A copy of the project with a name, a tag and sources of its own, driven as a user would drive it."""
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.fixtures.invoking import invoke
from tests.fixtures.project import ROOT, copy_project

SOURCES = ROOT / "tests" / "fixtures" / "sources"
SOCKET = Path("/var/run/docker.sock")


def engine_answers() -> bool:
    """Return whether a Docker engine with Compose can be used."""
    try:
        return bool(shutil.which("docker")) and all(
            subprocess.run(["docker", *words], capture_output=True, timeout=60, check=False).returncode == 0
            for words in (["info"], ["compose", "version"]))
    except subprocess.TimeoutExpired:
        return False


@dataclass
class Workbench:
    """The copy.

    Attributes:
        root: its folder.
        env: what every command gets on top of the environment.
    """
    root: Path
    env: dict[str, str] = field(default_factory=dict)

    @classmethod
    def create(cls, folder: Path) -> "Workbench":
        """Copy what git tracks, or would, and the fixture sources beside it, to `folder`."""
        root = copy_project(folder / "workbench")
        for name in ("AgentGym-RL", "AgentGym"):
            shutil.copytree(SOURCES / name, folder / name)
        # Whoever trained in the checkout has left this there.
        (folder / "AgentGym-RL/AgentGym-RL/saves/x").mkdir(parents=True)
        (folder / "AgentGym-RL/AgentGym-RL/saves/x/model.pt").touch()
        (folder / "AgentGym-RL/AgentGym-RL/.env").write_text("HF_TOKEN=hf_secret\n")
        git = ["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@example.org"]
        for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "A copy"]):
            subprocess.run([*git, *words], check=True, capture_output=True)
        name = f"workbench-test-{uuid.uuid4().hex[:8]}"
        return cls(
            root,
            {
                "COMPOSE_PROJECT_NAME": name,
                "IMAGE_TAG": name,
                # What the stand-in for the CUDA image has, and the only index that CI reaches.
                "PYTHON_VERSION": os.environ.get("PYTHON_VERSION", "3.11"),
                "TORCH_INDEX_URL": "",
                "FLASH_ATTN_WHEEL": "",
                # An engine without the right to lift limits can still lower them.
                "MEMLOCK": "65536",
            })

    @property
    def name(self) -> str:
        """Return the Compose project's name, which is also the images' tag."""
        return self.env["COMPOSE_PROJECT_NAME"]

    @property
    def sources(self) -> Path:
        """Return the copy of AgentGym-RL, which lies beside the project."""
        return self.root.parent / "AgentGym-RL"

    def environment(self, env: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the whole environment of a command."""
        return {**os.environ, **self.env, **(env or {})}

    def run(self,
            *argv: str,
            env: Mapping[str, str] | None = None,
            cwd: Path | None = None,
            user: int | None = None,
            stdin: str = "",
            timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Run a command in the project's folder and return what it said."""
        return subprocess.run(argv,
                              cwd=cwd or self.root,
                              env=self.environment(env),
                              input=stdin,
                              capture_output=True,
                              text=True,
                              timeout=timeout,
                              check=False,
                              user=user,
                              group=user,
                              extra_groups=[SOCKET.stat().st_gid] if user else None)

    def invoke(self,
               *words: str,
               env: Mapping[str, str] | None = None,
               cwd: Path | None = None,
               stdin: str = "",
               timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Run `invoke`."""
        return invoke(*words, cwd=cwd or self.root, env=self.environment(env), input=stdin, timeout=timeout)

    def path_with_invoke(self) -> str:
        """Return a PATH on which this Python's `invoke` comes first."""
        return f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def docker(self, *words: str, **options) -> str:  # type: ignore[no-untyped-def]
        """Run `docker`, which must succeed, and return its output."""
        done = self.run("docker", *words, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def compose(self, *words: str, **options) -> subprocess.CompletedProcess[str]:  # type: ignore[no-untyped-def]
        """Run `docker compose` with the CPU override, as a user without a GPU would."""
        return self.run("docker", "compose", "-f", "docker-compose.yml", "-f", "docker-compose.cpu.yml", *words,
                        **options)

    def image(self, name: str) -> str:
        """Return the full name of an image of this copy."""
        return f"{name}:{self.env['IMAGE_TAG']}"

    def containers(self, **labels: str) -> list[str]:
        """Return the ids of this project's containers."""
        filters = [f"label=com.docker.compose.project={self.name}"]
        filters += [f"label=com.docker.compose.{key}={value}" for key, value in labels.items()]
        return self.docker("ps", "-aq", *(word for one in filters for word in ("--filter", one))).split()

    def remove(self) -> None:
        """Remove containers, networks and images of this copy."""
        for container in self.containers():
            self.run("docker", "rm", "-f", container)
        self.run("docker", "network", "rm", f"{self.name}_default")
        images = self.docker("images", "--filter", f"reference=*/*:{self.name}*", "--format",
                             "{{.Repository}}:{{.Tag}}")
        if images:
            self.run("docker", "rmi", "-f", *images.split())


class Terminal:
    """A command on a pseudo-terminal, as a person sees it."""

    def __init__(self, bench: Workbench, *argv: str, env: Mapping[str, str] | None = None) -> None:
        self.seen = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(bench.root)
            os.execvpe(argv[0], list(argv), {**bench.environment(env), "TERM": "dumb"})

    def wait_for(self, pattern: str, timeout: float = 90) -> str:
        """Read until `pattern` shows, and return what was seen since the last call."""
        return self._read(lambda: re.search(pattern, self.seen) is not None, timeout, pattern)

    def type(self, text: str) -> None:
        """Type `text`."""
        os.write(self.fd, text.encode())

    def exit_code(self, timeout: float = 90) -> int:
        """Read to the end and return the exit code."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self._drain(0.2)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"still running after {timeout} s; seen: {self.seen}")

    def _read(self, done: Callable[[], bool], timeout: float, what: str) -> str:
        deadline = time.monotonic() + timeout
        while not done():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what!r} was not seen within {timeout} s, but: {self.seen}")
            self._drain(0.2)
        seen, self.seen = self.seen, ""
        return seen

    def _drain(self, seconds: float) -> None:
        if select.select([self.fd], [], [], seconds)[0]:
            try:
                text = os.read(self.fd, 65536).decode(errors="replace")
                self.seen += re.sub(r"\x1b(\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07)", "", text)
            except OSError:  # the other end is closed
                time.sleep(seconds)
