"""The one door to Docker: every docker command of the tasks goes through `drive` or `ask`.

python-on-whales is imported inside the functions: importing it costs more than `invoke --list` may take.
"""
from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from invoke.context import Context
from invoke.exceptions import Exit

from tasks.lib.errors import INTERRUPTED
from tasks.lib.settings import ROOT, hide_logins, read_dotenv, resolve, secret_values

if TYPE_CHECKING:
    from python_on_whales import DockerClient

Answer = TypeVar("Answer")

ENGINE_AT_LEAST = 24
# The environment servers' health check asks often at the start only (--start-interval): cheap when it counts.
ENGINE_AT_LEAST_FOR_ENVIRONMENTS = 25
COMMAND_NOT_FOUND = 127
NO_DOCKER = "docker: no docker command on PATH; install Docker Engine 24 or newer with Compose v2 and Buildx"

ENGINE_DOWN = "engine down"  # `engine_down` says more

# What Docker says, and what a user can do about it. The first match counts.
REMEDIES = (
    (r"context not found|context .* does not exist",
     "there is no such context; see `docker context ls`, then set or unset "
     "DOCKER_CONTEXT"),
    (r"permission denied while trying to connect", "add yourself to the group docker, then log in again"),
    (r"Cannot connect to the Docker daemon|error during connect|failed to connect to the docker API|"
     r"unable to (parse|resolve) docker (host|endpoint)", ENGINE_DOWN),
    (r"port is already allocated|address already in use", "the port is in use; choose another with ENV_PORT"),
    (r"could not select device driver",
     "the engine has no NVIDIA runtime; install nvidia-container-toolkit, or pass --gpus none"),
    (r"error setting rlimit",
     "the engine may not lift the limit on locked memory (rootless?); set MEMLOCK to what `ulimit -l` allows, in bytes"
     ),
    (r"bind source path does not exist", "a mounted folder is missing; create the folder that Docker names"),
    (r"no space left on device", "the disk is full; see `docker system df`, then `invoke clean.cache`"),
    (r"no such host|dial tcp|i/o timeout",
     "the registry does not answer; check the network, or name an image that is here (BASE_IMAGE, EVAL_BASE_IMAGE)"),
    (r"is not a docker command|unknown (shorthand )?flag",
     "docker has no Compose or Buildx plugin, or an old one; install docker-compose-plugin and docker-buildx-plugin"),
    (r"pull access denied|repository does not exist|failed to resolve source metadata|No such image",
     "an image is neither here nor in a registry; `invoke build.all` builds ours"),
    (r"Could not resolve host|temporary failure in name resolution|failed to fetch|Failed to fetch",
     "a download failed; check the network, PACKAGE_INDEX_URL and CA_BUNDLE"),
)

# How Docker begins what it says itself, where a command in a container says something on the same stream.
DOCKER_SAYS = (r"Error response from daemon|error during connect|Cannot connect to the Docker daemon|"
               r"failed to connect to the docker API|permission denied while trying to connect|Failed to initialize")

# Runs in docker's place under --dry: notes how many arguments there are, then each, and does nothing else.
RECORDER = 'printf "%s\\0" "$#" "$@" >>"$DRY_RECORD"'


def remedy(said: str) -> str | None:
    """Return what a user can do about Docker's message `said`, where that is known."""
    advice = next((advice for pattern, advice in REMEDIES if re.search(pattern, said, re.IGNORECASE)), None)
    return engine_down(os.environ) if advice == ENGINE_DOWN else advice


def engine_down(environ: Mapping[str, str]) -> str:
    """Return what to do about an engine that does not answer; DOCKER_HOST says where it was looked for."""
    host = environ.get("DOCKER_HOST")
    if host:
        return f"no Docker engine answers at DOCKER_HOST={hide_logins(host)}; start that one, or unset DOCKER_HOST"
    return "the Docker engine does not answer; start it (sudo systemctl start docker)"


def docker_said(argv: Sequence[str], said: str) -> str:
    """Return what of `said`, the standard error of `argv`, is Docker's own: with `compose run`, not the command's.

    Docker says what stopped it last.
    """
    lines = said.splitlines()
    if not ("compose" in argv[:2] and "run" in argv) or not lines:
        return said
    return lines[-1] if re.match(DOCKER_SAYS, lines[-1]) else ""


def redact(text: str, secrets: Sequence[str]) -> str:
    """Return `text` without the values in `secrets` and without logins inside URLs."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return hide_logins(text)


def compose_files(root: Path, cpu: bool) -> list[Path]:
    """Return the Compose files to pass: the project's, the CPU override, and the user's own override last.

    Naming any file makes Compose forget `docker-compose.override.yml`, hence the third.
    """
    files = [root / "docker-compose.yml"]
    if cpu:
        files.append(root / "docker-compose.cpu.yml")
    own = root / "docker-compose.override.yml"
    return [*files, own] if own.is_file() else files


def caller_variables(environ: Mapping[str, str], dotenv: Mapping[str, str]) -> dict[str, str]:
    """Return the ids that containers run with, as far as the user has not chosen them."""
    ids = {"HOST_UID": os.getuid(), "HOST_GID": os.getgid()}
    return {name: str(value) for name, value in ids.items() if not (environ.get(name) or dotenv.get(name))}


def command_line(argv: Sequence[str], variables: Mapping[str, str], secrets: Sequence[str] = ()) -> str:
    """Return `argv` as a user would type it in a shell, with the variables that it needs before it, redacted."""

    def word(text: str) -> str:  # redacted before it is quoted, which changes a secret that has a quote in it
        hidden = redact(text, secrets)
        return hidden if hidden == "***" else shlex.quote(hidden)

    return " ".join([*(f"{name}={word(value)}" for name, value in variables.items()), *map(word, argv)])


def interactive() -> bool:
    """Return whether a person sits at this terminal, so that a container gets one too."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))  # None: it is closed


def remainder(c: Context) -> list[str]:
    """Return what follows `--`, word by word: `c.remainder` has lost the quoting."""
    if "--" in sys.argv:
        return sys.argv[sys.argv.index("--") + 1:]
    return shlex.split(getattr(c, "remainder", "") or "")


def drive(c: Context,
          action: Callable[[DockerClient], Any],
          profiles: Sequence[str] = (),
          cpu: bool = False,
          variables: Mapping[str, str] | None = None,
          files: Sequence[Path] = ()) -> None:
    """Carry out `action` on a Docker client for the Compose `profiles`, its output going to ours.

    With `--dry`, print the command lines that it would run, and run none. `action` makes one or more calls and
    returns what the last one returns; streams (`stream=True`, `stream_logs=True`) are printed as they come.

    Args:
        c: the task's context.
        action: what to do with the client; must not read answers, which `--dry` does not give (see `ask`).
        profiles: Compose profiles to activate.
        cpu: add the CPU override file.
        variables: what Compose interpolates, on top of the environment. No secrets: `--dry` prints them.
        files: further Compose files, after the project's own.

    Raises:
        Exit: Docker's exit code when it failed; 130 after Ctrl-C; 127 without a docker command.
    """
    variables = {**caller_variables(os.environ, read_dotenv()), **(variables or {})}
    if c.config.run.dry:
        _print_commands(action, profiles, cpu, variables, files)
        return
    if c.config.run.echo:
        _print_commands(action, profiles, cpu, variables, files)
    with _environment(variables), _docker_decides_on_interrupt():
        with _failures_as_exit(shown=False):
            result = action(_client(profiles, cpu, files=files))
        with _failures_as_exit(shown=True):
            _show(result)


def ask(action: Callable[[DockerClient], Answer],
        profiles: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        files: Sequence[Path] = (),
        cpu: bool = False) -> Answer:
    """Return the answer of a read-only `action`, such as an inspection.

    Not for `--dry`, which asks Docker nothing.

    Raises:
        Exit: as for `drive`; Docker's message is in it.
    """
    variables = {**caller_variables(os.environ, read_dotenv()), **(variables or {})}
    with _environment(variables), _failures_as_exit(shown=False):
        return action(_client(profiles, cpu, files=files))


def execute(client: DockerClient, container: str, command: Sequence[str], user: str) -> None:
    """Run `command` in a running container with our own streams, terminal or not.

    python-on-whales' `container.execute` gives a command our standard input only with a terminal, or holds its
    output back until the end.
    """
    from python_on_whales.utils import run
    flags = ["--interactive", *(["--tty"] if interactive() else []), *(["--user", user] if user else [])]
    run([*client.client_config.docker_cmd, "exec", *flags, container, *command],
        capture_stdout=False,
        capture_stderr=False)


def require_engine(c: Context, at_least: int = ENGINE_AT_LEAST) -> None:
    """Stop with one clear line where no engine answers, or one below `at_least`. `--dry` asks nothing.

    Raises:
        Exit: see above.
    """
    if c.config.run.dry:
        return
    version = engine_version()
    major = version.partition(".")[0]
    if major.isdecimal() and int(major) < at_least:  # a build of one's own may be called dev
        what = "" if at_least == ENGINE_AT_LEAST else " for environment servers"
        raise Exit(f"docker: engine {version} is too old{what}; install Docker Engine {at_least} or newer", code=1)


def engine_version() -> str:
    """Return the engine's version, such as 26.1.5.

    Raises:
        Exit: no engine answers.
    """
    server = ask(lambda docker: docker.version().server)
    if server is None or not server.version:
        raise Exit(f"docker: {engine_down(os.environ)}", code=1)
    return server.version


def has_nvidia_runtime() -> bool:
    """Return whether the engine can hand out NVIDIA GPUs.

    The engine looks for the toolkit's hook on its PATH, whether or not a runtime named nvidia is registered too.
    """
    runtimes = ask(lambda docker: docker.system.info().runtimes) or {}
    return "nvidia" in runtimes or has_nvidia_hook()


def has_nvidia_hook() -> bool:
    """Return whether the NVIDIA container toolkit is installed on this host, without asking the engine."""
    return shutil.which("nvidia-container-runtime-hook") is not None


def image_exists(name: str) -> bool:
    """Return whether the engine has the image `name`."""
    return ask(lambda docker: docker.image.exists(name))


def require_image(c: Context, name: str, task: str) -> None:
    """Stop with one clear line where the engine has no image `name`; `task` builds it. `--dry` asks nothing.

    Raises:
        Exit: exit code 1.
    """
    require_engine(c)
    if not c.config.run.dry and not image_exists(name):
        raise Exit(f"docker: no image {name} yet; build it with `invoke {task}`", code=1)


def image_name(name: str, tag: str = "") -> str:
    """Return the full name of our image `name` (agentgym-rl/train), with registry and tag."""
    return f"{resolve('REGISTRY')}{name}:{resolve('IMAGE_TAG', tag)}"


def environment_images() -> list[str]:
    """Return the names of the environment servers' images that the engine has under our registry and tag."""
    pattern = image_name("agentgym/env-*")
    found = ask(lambda docker: docker.image.list(filters={"reference": pattern}))
    return sorted({tag for image in found for tag in image.repo_tags if fnmatch(tag, pattern)})


@dataclass(frozen=True)
class ImageFacts:
    """What the engine knows of an image: its id, its size in bytes, when it was created."""
    id: str
    size: int
    created: datetime


def image_facts(name: str) -> ImageFacts | None:
    """Return what the engine knows of the image `name`, or None where it has none of that name."""
    if not image_exists(name):
        return None
    image = ask(lambda docker: docker.image.inspect(name))
    return ImageFacts(image.id, image.size, image.created)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print `rows` in columns under `head`; nothing where there is no row."""
    if not rows:
        return
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)


def _client(profiles: Sequence[str], cpu: bool, call: Sequence[str] = ("docker", ),
            files: Sequence[Path] = ()) -> DockerClient:
    from python_on_whales import DockerClient
    return DockerClient(compose_files=[*compose_files(ROOT, cpu), *files],
                        compose_profiles=list(profiles),
                        client_call=list(call),
                        client_type="docker")


def _print_commands(action: Callable[[DockerClient], Any], profiles: Sequence[str], cpu: bool,
                    variables: Mapping[str, str], files: Sequence[Path]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "argv"
        record.touch()
        # A call whose answer python-on-whales reads gets none, and is noted all the same.
        with _environment({"DRY_RECORD": str(record)}), suppress(json.JSONDecodeError):
            _drain(action(_client(profiles, cpu, call=("sh", "-c", RECORDER, "docker"), files=files)))
        words = map(os.fsdecode, record.read_bytes().split(b"\0")[:-1])
    for count in words:
        argv = ["docker", *islice(words, int(count))]
        print(command_line(argv, variables if "compose" in argv[:2] else {}, secret_values()), flush=True)


def _drain(result: Any) -> None:
    if isinstance(result, Iterator):
        for _ in result:
            pass


def _show(result: Any) -> None:
    if isinstance(result, Iterator):
        for item in result:
            source, line = ("stdout", item.encode()) if isinstance(item, str) else item
            stream = sys.stderr if source == "stderr" else sys.stdout
            # Bytes, where the stream takes them: what a command prints may be no text.
            if hasattr(stream, "buffer"):
                stream.flush()
                stream.buffer.write(line)
                stream.buffer.flush()
            else:
                stream.write(line.decode(errors="replace"))


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set `variables` while python-on-whales runs: its Compose calls take no environment of their own."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _docker_decides_on_interrupt() -> Iterator[None]:
    """Let docker answer Ctrl-C, which the terminal sends to it as well, and leave with 130 when it is done.

    Without this, `subprocess.run` kills docker a quarter of a second later, before Compose can stop anything.
    """
    pressed = False

    def note(signum: int, frame: object) -> None:
        nonlocal pressed
        pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exit:
        if not pressed:
            raise
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise Exit(code=INTERRUPTED)


@contextmanager
def _failures_as_exit(shown: bool) -> Iterator[None]:
    """Turn python-on-whales' exceptions into `Exit`, with Docker's last line unless it was `shown` as it came."""
    from python_on_whales.exceptions import DockerException
    try:
        from python_on_whales.client_config import ClientNotFoundError
    except ImportError:  # where newer releases keep it
        from python_on_whales.exceptions import ClientNotFoundError  # type: ignore[attr-defined, no-redef]
    try:
        yield
    except ClientNotFoundError:
        raise Exit(NO_DOCKER, code=COMMAND_NOT_FOUND) from None
    except DockerException as error:
        said = redact((error.stderr or error.stdout or "").strip(), secret_values())
        advice = remedy(docker_said(error.docker_command, said))
        code = 128 - error.return_code if error.return_code < 0 else error.return_code  # as a shell says it of a signal
        if advice:
            raise Exit(f"docker: {advice}", code=code) from None
        message = said.splitlines()[-1] if said and not shown else None
        raise Exit(message and f"docker: {message}", code=code) from None
    except json.JSONDecodeError:
        raise Exit("docker: the docker command on PATH does not answer as Docker's does; is it another program's?",
                   code=1) from None
