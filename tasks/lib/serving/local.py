"""Serve a Hugging Face folder on an OpenAI-compatible address for as long as it is needed, on this machine.

Everything of one server lies in .run/serve/<name>/: its log, its temporary files, and state.json, which names the server
and the run that it belongs to.
"""
import http.client
import json
import os
import re
import shlex
import shutil
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

from invoke.context import Context

from tasks.lib import atomic
from tasks.lib.atomic import make_private, write_private
from tasks.lib.errors import INTERRUPTED, UserError
from tasks.lib.host import processes
from tasks.lib.host.ports import free_port
from tasks.lib.notices import put, tell
from tasks.lib.settings import ROOT, SETTINGS
from training.exchange import Stays, opener

RUN = atomic.RUN / "serve"
PROGRAM = ROOT / "scripts" / "serve_transformers.py"
ENGINES = ("auto", "vllm", "transformers")
# What `transformers serve` imports: its extra `serving`.
NEEDED = ("torch", "transformers", "accelerate", "fastapi", "uvicorn", "openai", "pydantic")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}


def missing() -> list[str]:
    """Return the packages that this Python lacks for `transformers serve`."""
    found = [name for name in NEEDED if not find_spec(name)]
    with suppress(PackageNotFoundError):
        if int(version("transformers").split(".")[0]) < 5:  # its server answers to other requests
            found.append("transformers 5")
    return found


def has_cuda() -> bool:
    """Tell whether torch sees a CUDA GPU here."""
    import torch
    return torch.cuda.is_available()


def choose_engine(engine: str) -> tuple[str, str]:
    """Return vllm or transformers, and why; by itself vLLM where it is installed and can run.

    Raises:
        UserError: no such engine, or it cannot run here.
    """
    if engine not in ENGINES:
        raise UserError(f"unknown engine {engine!r}; choose one of {', '.join(ENGINES)}")
    vllm = bool(find_spec("vllm"))
    if engine != "transformers" and vllm and has_cuda():
        return "vllm", "it is installed, and a CUDA GPU is here"
    if engine == "vllm":
        raise UserError("--engine vllm needs a CUDA GPU, and there is none; use --engine transformers" if vllm else
                        "--engine vllm needs the package vllm, which is not installed; use --engine transformers")
    lacking = missing()
    if lacking:
        raise UserError(f"serving a model needs {', '.join(lacking)}; `pip install -r requirements-dev.txt`")
    return "transformers", "--engine says so" if engine == "transformers" else \
        "no CUDA GPU is here" if vllm else "vllm is not installed"


def command(engine: str, model: Path, name: str, port: int) -> list[str]:
    """Return the command line of the server."""
    # As a module: this Python's vLLM, whether or not its folder is on PATH.
    program = ["-m", "vllm.entrypoints.openai.api_server"] if engine == "vllm" else [str(PROGRAM)]
    flag = "--served-model-name" if engine == "vllm" else "--name"
    return [sys.executable, *program, "--model", str(model), flag, name, "--host", "127.0.0.1", "--port", str(port)]


def surroundings(environ: Mapping[str, str], temporary: Path) -> dict[str, str]:
    """Return the server's environment: offline, without our secrets, and without a key that it would ask for."""
    left_out = {"VLLM_API_KEY", *(name for name, setting in SETTINGS.items() if setting.secret)}
    kept = {name: value for name, value in environ.items() if name not in left_out}
    return {**kept, **OFFLINE, "TMPDIR": str(temporary)}


def stop_leftovers(folder: Path = RUN) -> None:
    """Stop the servers whose run was killed."""
    for path in sorted(folder.glob("*/state.json")):
        with suppress(ValueError, KeyError):
            state = json.loads(path.read_text())
            if processes.is_running(state["owner"]):
                continue
            if processes.is_running(state["server"]):
                tell(f"stopping {path.parent.name}, which a killed run left behind")
            processes.stop([state["server"]])
        path.unlink(missing_ok=True)


def wait_until_ready(url: str, server: Mapping[str, Any], log: Path, wait: float) -> None:
    """Return when the server answers.

    Raises:
        UserError: it ended, or the time is up.
    """
    direct = opener(urllib.request.ProxyHandler({}), Stays())
    end = time.monotonic() + wait
    while time.monotonic() < end:
        if not processes.is_running(server):
            raise UserError(f"the model's server ended: {processes.last_line(log)}; see {log}", code=1)
        with suppress(OSError, http.client.HTTPException), direct.open(f"{url}/health", timeout=5):
            return
        time.sleep(0.2)
    raise UserError(
        f"the model's server was not ready after {wait:g} s: {processes.last_line(log)}; see {log}, or "
        "give it longer with --serve-wait",
        code=1)


def write_state(home: Path, server: Mapping[str, Any] | None) -> Path:
    """Write this run, and its server once it was started, to a file of our own; with a server it is state.json."""
    new = home / f"state.{os.getpid()}-{uuid4().hex}"
    noted = {"owner": processes.identity(os.getpid()), **({"server": server} if server else {})}
    write_private(new, json.dumps(noted))
    return new.replace(home / "state.json") if server else new


def claim(home: Path) -> bool:
    """Make the folder `home` this run's own; False where another run has it."""
    make_private(home)
    new = write_state(home, None)
    try:
        os.link(new, home / "state.json")  # whole, and not where there is one
    except FileExistsError:
        return False
    finally:
        new.unlink()
    return True


@contextmanager
def served_locally(model: Path, name: str, engine: str = "auto", wait: float = 600) -> Iterator[str]:
    """Serve the Hugging Face folder `model` as `name` with this Python; give the address, http://127.0.0.1:PORT/v1.

    The server is stopped whichever way the block is left.

    Args:
        task: who asks, for messages.
        model: the folder.
        name: the model's name in requests; letters, digits, dot, dash, underscore.
        engine: auto, vllm or transformers.
        wait: seconds until it must answer.

    Raises:
        UserError: one line: it cannot run here (2), or did not start (1); nothing is left running.
    """
    chosen, why = choose_engine(engine)
    tell(f"serving {model} with {chosen} ({why})")
    with started(Context(), model, name, chosen, wait) as url:
        yield url


@contextmanager
def started(c: Context, model: Path, name: str, engine: str, wait: float) -> Iterator[str]:
    """Do what `served_locally` does, with an engine that was chosen.

    Raises:
        UserError: as there.
    """
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"{name!r} is no name for a model; use letters, digits, dot, dash, underscore")
    port = free_port()
    argv, url = command(engine, model.resolve(), name, port), f"http://127.0.0.1:{port}"
    if c.config.run.dry:
        put(shlex.join(argv))
        yield f"{url}/v1"
        return
    stop_leftovers()
    home = RUN / name
    if not claim(home):
        raise UserError(f"another run serves {name} just now; wait for it", code=1)
    try:
        shutil.rmtree(home / "tmp", ignore_errors=True)
        make_private(home / "tmp")
        log = home / "server.log"
        process = processes.launch(argv, log, surroundings(os.environ, home / "tmp"), home)
        server = processes.identity(process.pid)
        try:
            try:
                write_state(home, server)
                wait_until_ready(url, server, log, wait)
            except KeyboardInterrupt:
                raise UserError(code=INTERRUPTED) from None
            yield f"{url}/v1"
        finally:
            processes.stop([server])
            process.wait()
    finally:
        shutil.rmtree(home / "tmp", ignore_errors=True)
        (home / "state.json").unlink(missing_ok=True)
