"""The one door to Docker: every docker command of the tasks goes through `drive` or `ask`.

python-on-whales is imported inside the functions: importing it costs more than `invoke --list` may take.
"""
from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from invoke.context import Context

from tasks.lib.engine.compose_files import as_read, caller_variables, compose_files
from tasks.lib.engine.dry_run import RECORDER, print_commands
from tasks.lib.engine.remedies import MOUNT_MISSING, NO_DOCKER, docker_said, engine_down, mount_missing_at, remedy
from tasks.lib.errors import INTERRUPTED, DockerError, NoEngine, UserError
from tasks.lib.redaction import hide_logins, redact, secret_values
from tasks.lib.settings import ROOT, read_dotenv

if TYPE_CHECKING:
    from python_on_whales import DockerClient

Answer = TypeVar("Answer")

ENGINE_AT_LEAST = 24
# The environment servers' health check asks often at the start only (--start-interval): cheap when it counts.
ENGINE_AT_LEAST_FOR_ENVIRONMENTS = 25
COMMAND_NOT_FOUND = 127
ELSEWHERE_WAIT = 20.0  # seconds


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
        UserError: Docker's exit code when it failed; 130 after Ctrl-C; 127 without a docker command.
    """
    dotenv = read_dotenv()
    given = {**caller_variables(os.environ, dotenv), **(variables or {})}
    if c.config.run.dry or c.config.run.echo:

        def recorded(record: Mapping[str, str]) -> None:
            with _environment({**given, **record}):
                _drain(action(_client(profiles, cpu, call=RECORDER, files=files)))

        print_commands(recorded, given)
    if c.config.run.dry:
        return
    with _environment({**as_read(os.environ, dotenv), **given}), _docker_decides_on_interrupt():
        _hear_from_elsewhere()
        with _failures_as_errors(shown=False):
            result = action(_client(profiles, cpu, files=files))
        with _failures_as_errors(shown=True):
            _show(result)


def ask(action: Callable[[DockerClient], Answer],
        profiles: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        files: Sequence[Path] = (),
        cpu: bool = False) -> Answer:
    """Return the answer of a read-only `action`, such as an inspection.

    Not for `--dry`, which asks Docker nothing.

    Raises:
        UserError: as for `drive`; Docker's message is in it.
    """
    dotenv = read_dotenv()
    variables = {**as_read(os.environ, dotenv), **caller_variables(os.environ, dotenv), **(variables or {})}
    with _environment(variables), _failures_as_errors(shown=False):
        _hear_from_elsewhere()
        return action(_client(profiles, cpu, files=files))


@cache
def _hear_from_elsewhere() -> None:
    """Stop where an engine elsewhere takes a connection, or its packets are lost, and nothing comes: docker would wait for ever.

    Other failures are those of the call that follows.

    Raises:
        NoEngine: see above.
    """
    if not {"DOCKER_HOST", "DOCKER_CONTEXT"} & os.environ.keys():
        return
    try:
        with suppress(OSError):
            subprocess.run(["docker", "version"],
                           stdin=subprocess.DEVNULL,
                           capture_output=True,
                           timeout=ELSEWHERE_WAIT,
                           check=False)
    except subprocess.TimeoutExpired:
        raise NoEngine(engine_down(os.environ), code=1) from None


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
        UserError: see above.
    """
    if c.config.run.dry:
        return
    version = engine_version()
    major = version.partition(".")[0]
    if major.isdecimal() and int(major) < at_least:  # a build of one's own may be called dev
        what = "" if at_least == ENGINE_AT_LEAST else " for environment servers"
        raise DockerError(f"engine {version} is too old{what}; install Docker Engine {at_least} or newer", code=1)


def engine_version() -> str:
    """Return the engine's version, such as 26.1.5.

    Raises:
        UserError: no engine answers.
    """
    server = ask(lambda docker: docker.version().server)
    if server is None or not server.version:
        raise NoEngine(engine_down(os.environ), code=1)
    return server.version


def has_nvidia_runtime() -> bool:
    """Return whether the engine can hand out NVIDIA GPUs.

    The engine looks for the toolkit's hook on its PATH, whether or not a runtime named nvidia is registered too.
    """
    runtimes = ask(lambda docker: docker.system.info().runtimes) or {}
    return "nvidia" in runtimes or (has_nvidia_hook() and not elsewhere())


def elsewhere() -> str:
    """Return the address of the engine in use where it is another machine's; empty where it is this one's."""
    with suppress(DockerError, KeyError, AttributeError):  # an older docker has no contexts, and an address of its own
        host = ask(lambda docker: docker.context.inspect(None).endpoints["docker"].host) or ""
        if not host.startswith(
            ("unix:", "npipe:",
             "fd:")) and host and ask(lambda docker: docker.system.info().name) != socket.gethostname():
            return hide_logins(host)
    return ""


def has_nvidia_hook() -> bool:
    """Return whether the NVIDIA container toolkit is installed on this host, without asking the engine."""
    return shutil.which("nvidia-container-runtime-hook") is not None


def _client(profiles: Sequence[str], cpu: bool, call: Sequence[str] = ("docker", ),
            files: Sequence[Path] = ()) -> DockerClient:
    from python_on_whales import DockerClient
    return DockerClient(compose_files=[*compose_files(ROOT, cpu), *files],
                        compose_profiles=list(profiles),
                        client_call=list(call),
                        client_type="docker")


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


def _drain(result: Any) -> None:
    if isinstance(result, Iterator):
        for _ in result:
            pass


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
    except UserError:
        if not pressed:
            raise
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise UserError(code=INTERRUPTED)


@contextmanager
def _failures_as_errors(shown: bool) -> Iterator[None]:
    """Turn python-on-whales' exceptions into `DockerError`, with Docker's last line unless it was `shown` as it came."""
    from python_on_whales.exceptions import DockerException
    try:
        from python_on_whales.client_config import ClientNotFoundError
    except ImportError:  # where newer releases keep it
        from python_on_whales.exceptions import ClientNotFoundError  # type: ignore[attr-defined, no-redef]
    try:
        yield
    except ClientNotFoundError:
        raise NoEngine(NO_DOCKER, code=COMMAND_NOT_FOUND) from None
    except DockerException as error:
        said = redact((error.stderr or error.stdout or "").strip(), secret_values())
        advice = remedy(docker_said(error.docker_command, said))
        if advice == MOUNT_MISSING and (host := elsewhere()):
            advice = mount_missing_at(host)
        code = 128 - error.return_code if error.return_code < 0 else error.return_code  # as a shell says it of a signal
        if advice:
            raise (NoEngine if advice == engine_down(os.environ) else DockerError)(advice, code=code) from None
        message = said.splitlines()[-1] if said and not shown else ""
        raise DockerError(message, code=code) from None
    except json.JSONDecodeError:
        raise DockerError("the docker command on PATH does not answer as Docker's does; is it another program's?",
                          code=1) from None
