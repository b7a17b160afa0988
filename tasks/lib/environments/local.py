"""Environment servers as processes of this machine: `--runner local`.

Everything of one server lies in .run/env/<name>/: its virtual environment, the copy of the package folder that it
runs from (data is linked into it), its log, and state.json, which names the processes to stop.
"""
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servers.protocol import Client, ServerError, check_ready
from tasks.lib import atomic
from tasks.lib.atomic import close_to_others, make_private, write_private
from tasks.lib.engine.dry_run import command_line
from tasks.lib.environments.haproxy import proxy_config
from tasks.lib.environments.plan import Options, server_variables
from tasks.lib.environments.rows import Environment
from tasks.lib.errors import UserError
from tasks.lib.host import processes
from tasks.lib.host.ports import choose_port, take_port
from tasks.lib.host.processes import identity, is_running, last_line
from tasks.lib.host.venvs import ensure_venv, making, run_quietly
from tasks.lib.settings import ROOT

RUN = atomic.RUN / "env"
CONSTRAINTS = ROOT / "docker" / "constraints"


def prepare(row: Environment,
            source: Path,
            data: Path,
            folder: Path = RUN,
            python: Path | None = None) -> tuple[Path, Path, Path]:
    """Return Python, row file and source copy for the row's server, made ready in `folder`.

    Args:
        row: the environment.
        source: the folder that its package folder lies in.
        data: its data folder.
        folder: where the files of local servers are.
        python: a Python that has what the server needs, in place of a virtual environment.

    Raises:
        UserError: what is missing, in one line.
    """
    home = folder / row.name
    package = source / row.folder
    if not package.is_dir():
        remedy = "set AGENTGYM_SRC to an AgentGym checkout" if row.source == "agentgym" else "correct `folder` in its row"
        raise UserError(f"no {row.folder} in {source}; {remedy}", code=1)
    for program in row.programs:
        if not shutil.which(program):
            raise UserError(f"{row.name} needs {program} on PATH" +
                            (f" (Debian: apt install {row.system[0]})" if row.system else ""),
                            code=1)
    make_private(home)
    # Packages that load the nearest .env above their own files must not come to the project's, with all its secrets.
    write_private(home / ".env", "")
    python = python or ensure_venv(home, row.python, CONSTRAINTS / row.pins)
    copy = home / "source"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(package, copy / row.folder, ignore=shutil.ignore_patterns(".git", "__pycache__"), symlinks=True)
    close_to_others(copy)
    row_file = home / "row.json"
    write_private(row_file, json.dumps(row.to_json(defaults=False)))
    make_private(home / "home")
    run_quietly(linking(home, data), "linking the data")
    return python, row_file, copy


def linking(home: Path, data: Path) -> list[str]:
    """Return the command that links the data into the copy of the package folder in `home`."""
    return [
        "env", f"HOME={home / 'home'}", sys.executable,
        str(ROOT / "servers" / "link_data.py"),
        str(home / "row.json"), "--source",
        str(home / "source"), "--data",
        str(data)
    ]


@dataclass(frozen=True)
class Launch:
    """A process of a server: its command line, role and port, and the variables that it gets besides the server's environment."""
    argv: list[str]
    role: str
    port: int
    variables: Mapping[str, str]


def ports_for(options: Options) -> list[int]:
    """Return a port for each server: its own, or for replicas free ones above the proxy's, which are taken.

    Raises:
        UserError: there are none.
    """
    if options.replicas == 1:
        return [options.port]
    ports: list[int] = []
    for _ in range(options.replicas):
        ports.append(choose_port((ports[-1] if ports else options.port) + 1, take_port))
    return ports


def launches(row: Environment, options: Options, data: Path, home: Path, python: Path, proxy: str | None,
             ports: Sequence[int]) -> list[Launch]:
    """Return the processes to start, in this order.

    Args:
        home: the row's run folder.
        python: the server's own.
        proxy: HAProxy, which replicas need.
        ports: of the servers.
    """
    found = []
    for number, port in enumerate(ports):
        host = options.bind if options.replicas == 1 else "127.0.0.1"
        argv = [
            str(python),
            str(ROOT / "servers" / "serve.py"),
            str(home / "row.json"), "--source",
            str(home / "source"), "--data",
            str(data), "--scratch",
            str(home / f"scratch-{number}"), "--host", host, "--port",
            str(port)
        ]
        variables = {"HOME": str(home / "home"), **server_variables(row, options, number)}
        found.append(Launch(argv, f"server-{number}", port, variables))
    if proxy and options.replicas > 1:
        found.append(Launch([proxy, "-db", "-f", str(home / "haproxy.cfg")], "proxy", options.port, {}))
    return found


def proxy_for(options: Options, environ: Mapping[str, str]) -> str | None:
    """Return HAProxy's path; None where there is none, and no need of it.

    Raises:
        UserError: replicas need it.
    """
    proxy = shutil.which("haproxy", path=environ.get("PATH", "") + ":/usr/sbin")
    if options.replicas > 1 and not proxy:
        raise UserError("--replicas needs haproxy on PATH (Debian: apt install haproxy), or --runner docker", code=1)
    return proxy


def would_run(row: Environment,
              options: Options,
              data: Path,
              environ: Mapping[str, str],
              folder: Path = RUN) -> list[str]:
    """Return the command lines of a start, for `--dry`: the virtual environment where it is not made yet, then `up`'s.

    Raises:
        UserError: a program is missing.
    """
    home = folder / row.name
    ports = ports_for(options)
    started = launches(row, options, data, home, home / "venv/bin/python", proxy_for(options, environ), ports)
    return [
        *map(shlex.join, making(home, row.python, CONSTRAINTS / row.pins)),
        shlex.join(linking(home, data)), *(command_line(one.argv, one.variables) for one in started)
    ]


def entry_of(process: subprocess.Popen, role: str, port: int) -> dict[str, Any]:
    """Return the state entry of a process."""
    return {**identity(process.pid), "role": role, "port": port}


def states(folder: Path = RUN) -> dict[str, dict[str, Any]]:
    """Return the state of every local server that was started and not stopped, by environment."""
    try:
        found = {path.parent.name: read_state(path) for path in sorted(folder.glob("*/state.json"))}
    except PermissionError:  # another user's, who works in this folder: none of ours
        return {}
    return {name: state for name, state in found.items() if state is not None}


def read_state(path: Path) -> dict[str, Any] | None:
    """Return what a state file says; None where it is torn or not ours."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        state = json.loads(path.read_text())
        if all({"pid", "born", "role"} <= set(entry) for entry in state["processes"]):
            return {"url": "", **state, "port": int(state["port"])}
    return None


def launched_from(home: Path) -> list[dict[str, Any]]:
    """Return the processes that serve from `home`, by their command lines: for a state that cannot be read."""
    import psutil
    ours = {str(home / "row.json"), str(home / "haproxy.cfg")}
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if ours.intersection(process.info["cmdline"] or []):
            with suppress(psutil.Error):
                found.append(identity(process.pid))
    return found


def up(row: Environment,
       options: Options,
       source: Path,
       data: Path,
       environ: Mapping[str, str],
       wait: float,
       folder: Path = RUN,
       python: Path | None = None) -> str:
    """Start the row's server, or replicas behind HAProxy; return the URL once a session can be played.

    Raises:
        UserError: it could not start or did not get ready; nothing is left running.
    """
    home = folder / row.name
    ports = ports_for(options)
    proxy = proxy_for(options, environ)
    python, _, copy = prepare(row, source, data, folder, python)
    started = launches(row, options, data, home, python, proxy, ports)
    state: dict[str, Any] = {"url": url(options), "port": options.port, "processes": []}

    if options.replicas > 1:
        addresses = [f"127.0.0.1:{one.port}" for one in started if one.role != "proxy"]
        rules = proxy_config(row, options.port, addresses)
        write_private(home / "haproxy.cfg", rules.replace("bind :", f"bind {options.bind}:", 1))
    # The row's `before` says `python`: the server's own, not the caller's.
    path = os.pathsep.join((str(python.parent), environ.get("PATH", os.defpath)))
    ready = False
    try:
        for one in started:
            variables = {**environ, "PATH": path, **one.variables} if one.role != "proxy" else environ
            process = processes.launch(one.argv, home / f"{one.role}.log", variables, copy)
            state["processes"].append(entry_of(process, one.role, one.port))
            write_private(home / "state.json", json.dumps(state))
        wait_until_ready(row, options, state, home, wait)
        ready = True
    finally:
        if not ready:  # Ctrl-C too: the servers are sessions of their own and do not see it
            down(row.name, folder)
    return state["url"]


def url(options: Options) -> str:
    """Return the address of a server for programs on this machine."""
    host = "127.0.0.1" if options.bind in ("0.0.0.0", "") else options.bind
    return f"http://{host}:{options.port}"


def probe(row: Environment, address: str, replicas: int, seen: set[int], timeout: float) -> ServerError | None:
    """Try to play a session once; note in `seen` which replica it was on, or return what went wrong."""
    try:
        client = Client(address, row.protocol, timeout=max(1.0, timeout))
        if row.consent:  # a session changes real accounts: none without need
            for number in range(replicas):
                client.sessions(number)
                seen.add(number)
        else:  # the proxy hands out creates in turn to those that are up: all are when every remainder was seen
            seen.add(check_ready(client, row.check.items[0]) % replicas)
    except ServerError as error:
        return error
    return None


FROM_THE_PROXY = (502, 503, 504)  # of a server that does not answer


class Reasons:
    """Why a server is not ready: what the last try to play said, and what the server itself last answered.

    That tells more than the last line of its log, which may be of the next start.
    """

    def __init__(self) -> None:
        self.last = "no answer"
        self.answered = ""

    def note(self, error: ServerError | None) -> None:
        """Note what a try came to; that nobody listens says nothing of why."""
        if error is not None:
            self.last = str(error)
            if error.status not in (None, *FROM_THE_PROXY):
                self.answered = self.last


def is_ours(row: Environment, state: Mapping[str, Any], timeout: float) -> bool:
    """Tell whether the processes of `state` are what answers at its address.

    Between the look for a free port and the server's own bind, another one may have taken the port: one that plays
    other items, and answers all the same.
    """
    client = Client(state["url"], row.protocol, timeout=max(1.0, timeout))
    servers = [entry["pid"] for entry in state["processes"] if entry["role"] != "proxy"]
    try:
        return all(client.sessions(number).get("pid") == pid for number, pid in enumerate(servers))
    except ServerError:
        return False


def wait_until_ready(row: Environment, options: Options, state: Mapping[str, Any], home: Path, wait: float) -> None:
    """Return when a session could be played on every replica.

    Raises:
        UserError: a process ended, or the time is up.
    """
    end, reasons = time.monotonic() + wait, Reasons()
    seen: set[int] = set()
    while True:
        for entry in state["processes"]:
            if not is_running(entry):
                said = reasons.answered or last_line(home / (entry["role"] + ".log"))
                raise UserError(f"{row.name}: the {entry['role']} ended: {said}", code=1)
        left = end - time.monotonic()
        if left <= 0:
            raise UserError(
                f"{row.name} was not ready after {wait:g} s: {reasons.answered or reasons.last}; see {home / 'server-0.log'}, "
                "or give it longer with --wait",
                code=1)
        if is_ours(row, state, left):
            reasons.note(probe(row, state["url"], options.replicas, seen, left))
            if len(seen) == options.replicas:
                return
        time.sleep(0.1)


def down(name: str, folder: Path = RUN) -> bool:
    """Stop the processes of the environment's local server, with their groups; False where none was started."""
    path = folder / name / "state.json"
    if not path.is_file():
        return False
    state = read_state(path)
    processes.stop(state["processes"] if state else launched_from(folder / name))
    path.unlink(missing_ok=True)  # somebody else may stop it too
    return True
