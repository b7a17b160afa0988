"""What is done to an application that is not ours, so that an item is the same task each time and one fault stays one."""
import contextvars
import importlib
import importlib.abc
import importlib.machinery
import os
import sqlite3
import sys
import time
import types
import weakref
from typing import Any, Callable, Iterable, List, Optional

OWN = ("environment_rows", "servers")
ATTACH = 24  # SQLITE_ATTACH
INTERRUPTED = "interrupted"  # what SQLite says of a query that was stopped

# The queries that were stopped in the request that runs now; threads that work for the request see it too.
_stopped: "contextvars.ContextVar[Optional[List[float]]]" = contextvars.ContextVar("stopped", default=None)


def note_stopped_queries() -> List[float]:
    """Return a list that gets the limit of every query that is stopped while the request of this context is answered."""
    found: List[float] = []
    _stopped.set(found)
    return found


def forget_own_modules() -> None:
    """Let the application find its own packages of our packages' names; what of ours is in use stays as it is."""
    for name in list(sys.modules):
        if name.split(".")[0] in OWN:
            del sys.modules[name]


def sort_listings() -> None:
    """Make `os.listdir` return names in order, whatever the file system does."""
    listdir = os.listdir

    def ordered(path: Any = ".") -> List[Any]:
        return sorted(listdir(path))

    os.listdir = ordered  # type: ignore[assignment]


def limit_queries(seconds: float) -> None:
    """Stop every SQLite query after `seconds`, and refuse ATTACH, which would write files."""
    connect = sqlite3.connect

    class Limited(sqlite3.Connection):

        def cursor(self, *args: Any, **kwargs: Any) -> Any:
            deadline = time.monotonic() + seconds

            def stops() -> bool:
                late = time.monotonic() > deadline
                found = _stopped.get()
                if late and found is not None:
                    found.append(seconds)
                return late

            self.set_progress_handler(stops, 10_000)
            return super().cursor(*args, **kwargs)

    def limited(*args: Any, **kwargs: Any) -> Any:
        connection = connect(*args, **{"factory": Limited, **kwargs})
        connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_DENY if action == ATTACH else sqlite3.SQLITE_OK)
        return connection

    sqlite3.connect = limited  # type: ignore[assignment]


class Planner:
    """A planner's library in the hands of one game."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)


def share_planners() -> None:
    """Give a planner whose game is gone to the next game.

    fast_downward loads a copy of its library for each game, since its state is global; nothing closes one, and 34 MB
    stay mapped. A library that a game has left holds nothing that the next one sees: loading a task frees the last.
    """
    fast_downward: Any = importlib.import_module("fast_downward")
    load_copy, free = fast_downward.load_lib, []  # type: ignore[var-annotated]

    def load_lib() -> Planner:
        library = free.pop() if free else load_copy()
        planner = Planner(library)
        weakref.finalize(planner, free.append, library)
        return planner

    fast_downward.load_lib = load_lib


def release_games() -> None:
    """Let a game of textworld go when nobody plays it any more, and its planner with it.

    Upstream registers a game at each reset and makes it once; the register holds a wrapper that holds the game.
    """
    gym: Any = importlib.import_module("textworld.gym")
    registry: Any = importlib.import_module("textworld.gym.utils").registry
    make = gym.make

    def make_once(name: str) -> Any:
        game = make(name)
        registry.pop(name, None)
        return game

    gym.make = make_once
    share_planners()


def answer_cuda() -> None:
    """Let torch's .cuda() leave tensors and models where they are, if DEVICE is cpu."""
    if os.environ.get("DEVICE") != "cpu":
        return
    torch: Any = importlib.import_module("torch")

    def stay(self: Any, *_: Any, **__: Any) -> Any:
        return self

    torch.Tensor.cuda = torch.nn.Module.cuda = stay


ANSWERS = {"games": release_games, "cuda": answer_cuda}


class Unused(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for packages that a server imports and never uses, where they are not installed."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Answer for the packages and all below them."""
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.names else None

    def create_module(self, spec: Any) -> types.ModuleType:
        """Return a module that has every name; what is called says that the package is missing."""

        def missing(*_: Any, **__: Any) -> None:
            raise RuntimeError(f"{spec.name} is not installed: this server was thought not to use it")

        def attribute(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return missing

        module = types.ModuleType(spec.name)
        module.__getattr__ = attribute  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def load(app: str, keep: List[str], optional: Iterable[str] = ()) -> Callable:
    """Import `module:attribute`; variables named in `keep` stay as the caller set them, whatever the module does.

    Those of them that are `optional` are absent where they are empty: OpenAI's client takes an empty address for one.
    """
    kept = {name for name in keep if os.environ.get(name)}
    environ_class = type(os.environ)

    class CallersFirst(environ_class):  # type: ignore[misc,valid-type]

        def __setitem__(self, name: str, value: str) -> None:
            if name not in kept:
                super().__setitem__(name, value)

    os.environ.__class__ = CallersFirst  # agentenv_webarena sets its sites' addresses while it is imported
    try:
        module, attribute = app.split(":")
        return getattr(importlib.import_module(module), attribute)
    finally:
        os.environ.__class__ = environ_class
        for name in optional:
            if not os.environ.get(name):
                os.environ.pop(name, None)
