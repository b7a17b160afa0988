"""Start an environment server of AgentGym's kind so that it can be trusted with many sessions.

    python serve.py ROW.json --source DIR [--data DIR] [--host 127.0.0.1] [--port 8000] [--session-ttl 3600]

ROW.json is the environment's table of environments.toml, DIR of --source the folder that its package folder lies in.
The process exits with 2 and one line where data, keys or consent are missing. The server's own application runs
unchanged; upstream's start commands only call uvicorn with an access log that costs a line for every step. Around it:

- `os.listdir` is sorted, so that an item id is the same task on every machine (with PYTHONHASHSEED=0, which must be
  set before Python starts).
- Every session gets an id that nobody guesses and that no other replica and no earlier run of this server gave out:
  it is drawn at random, and id % replicas is the replica, so a proxy routes by arithmetic. A client that outlives a
  restart gets an error, never another session's state.
- A session that nobody used for --session-ttl seconds is closed. Where the server has no close, the session goes to
  a pool: the next create takes it. Its first step must follow a reset; whoever looks at it before that (AgentGym's
  client of wordle reads the vocabulary first) sees it as a reset to the row's first item leaves it.
- Where the row says serial_reset, creates and resets run one at a time: textcraft's draw from Python's one random
  generator in several threads, and an item would differ from one time to the next.
- GET /metrics tells Prometheus of sessions, requests by route and status, their times, and memory.
- GET /_sessions tells how many sessions are live, how much memory the server has, its process id, since when it
  runs (seconds since 1970), and what its scores depend on beside the row: made-up data, another search index.

It runs with every environment's own Python and uvicorn, so: Python 3.8, no other dependency.
"""
import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from environment_rows import Environment, about, refusal
from servers.connections import patient
from servers.foreign import ANSWERS, Unused, forget_own_modules, limit_queries, load, sort_listings
from servers.memory import limit_mb, memory_mb
from servers.saying import say
from servers.sessions import Sessions

RECYCLE_AT = 0.8  # of the memory limit
MISUSE, RECYCLED, STUCK = 2, 75, 70  # exit codes


def give_up_when_stuck(sessions: Sessions, seconds: float) -> None:
    """End the process when one request runs longer than `seconds`: a blocked event loop heals no other way."""

    def watch() -> None:
        while True:
            time.sleep(1.0)
            if sessions.longest_request() > seconds:
                say(f"a request runs for more than {seconds:g} s; giving up this server and its sessions")
                os._exit(STUCK)

    threading.Thread(target=watch, daemon=True).start()


def empty_scratch(folder: str) -> None:
    """Make `folder` the one for temporary files, without what an earlier start left in it."""
    os.makedirs(folder, exist_ok=True)
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.remove(path)
    os.environ["TMPDIR"] = folder
    tempfile.tempdir = None


def prepare(row: Environment, source: str, data: str, scratch: str) -> None:
    """Stand where the row's server must start, see its packages, and set its variables."""
    folder = os.path.join(os.path.abspath(source), row.folder)
    index = row.index(data)
    places = {"folder": folder, "data": os.path.abspath(data), "index": index.path if index else ""}
    if row.scratch:
        empty_scratch(os.path.abspath(scratch))
    for name, value in {**row.env, **(row.cpu_env if os.environ.get("DEVICE") == "cpu" else {})}.items():
        os.environ[name] = value.format(**places)  # a caller's PYTHONPATH is meant for other programs
    os.chdir(os.path.join(folder, row.workdir))
    for command in row.before:
        done = subprocess.run(command)
        if done.returncode:
            say(f"{row.name}: `{command[-1]}` failed with {done.returncode}")
            sys.exit(1)
    # In place of this program's own folders, whose modules could hide the server's.
    sys.path[:2] = [folder] + [os.path.join(folder, extra) for extra in row.pythonpath]
    forget_own_modules()
    sys.meta_path.append(Unused(row.unused))  # last: what is installed comes first
    for name in row.answers:
        ANSWERS[name]()
    if row.sqlite_seconds:
        limit_queries(row.sqlite_seconds)
    sort_listings()
    if hasattr(sys, "set_int_max_str_digits"):
        # An action's many digits are the action's fault and no server's; more of them would take seconds to read.
        sys.set_int_max_str_digits(100_000)


def main() -> None:
    """Serve the row's application until a signal comes."""
    setting = os.environ.get
    parser = argparse.ArgumentParser(description="Serve an environment of AgentGym's kind.")
    parser.add_argument("row", help="JSON file with the environment's row")
    parser.add_argument("--source", required=True, help="folder that the row's package folder lies in")
    parser.add_argument("--data", default="data", help="folder with the row's data")
    parser.add_argument("--scratch", default="/scratch", help="folder of the server's own for temporary files; emptied")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=int(setting("ENV_PORT") or 8000))
    parser.add_argument("--session-ttl",
                        type=float,
                        default=float(setting("SESSION_TTL") or 3600),
                        help="seconds after which an idle session is closed; 0: never")
    parser.add_argument("--replica", type=int, default=int(setting("REPLICA") or 0))
    parser.add_argument("--replicas", type=int, default=int(setting("REPLICAS") or 1))
    parser.add_argument("--recycle", action="store_true", help="end when memory nears the limit and no session is live")
    options = parser.parse_args()
    with open(options.row) as file:
        row = Environment.read(json.load(file))
    missing = refusal(row, options.data, os.environ,
                      os.environ.get("I_UNDERSTAND") == row.name, options.data, f"set I_UNDERSTAND={row.name}")
    if missing:
        say(missing)
        sys.exit(MISUSE)
    prepare(row, options.source, options.data, options.scratch)
    app = load(row.app, [key.name for key in row.keys], [key.name for key in row.keys if key.optional])
    import uvicorn

    def recycle() -> None:
        if sessions.is_idle() and memory_mb() > RECYCLE_AT * limit_mb(row.memory_mb):
            say("memory is near its limit and no session is live; starting afresh")
            server.should_exit = recycled["now"] = True

    recycled = {"now": False}
    try:
        sessions = Sessions(app,
                            row,
                            ttl=options.session_ttl,
                            replica=options.replica,
                            replicas=options.replicas,
                            about={
                                **about(options.data),
                                **({
                                    "device": "cpu"
                                } if row.gpu and os.environ.get("DEVICE") == "cpu" else {})
                            },
                            after_reaping=recycle if options.recycle else None)
    except ValueError as error:
        say(f"{row.name}: {error}")
        sys.exit(MISUSE)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # half-sent requests by the thousand keep nobody else out
    if row.request_seconds:
        give_up_when_stuck(sessions, row.request_seconds)
    # Idle connections outlive those that a proxy keeps, so that it never sends a request into a closing one.
    server = uvicorn.Server(
        uvicorn.Config(sessions,
                       host=options.host,
                       port=options.port,
                       http=patient(),
                       access_log=False,
                       log_level="warning",
                       timeout_keep_alive=75,
                       timeout_graceful_shutdown=5))
    server.run()
    if recycled["now"]:
        sys.exit(RECYCLED)  # a failure to the engine, so that it starts the container again


if __name__ == "__main__":
    main()
