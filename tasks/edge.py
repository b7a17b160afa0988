"""The tasks' edge: what a user can mend is one line and an exit code there, never a traceback."""
import errno
import os
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from typing import Any

from invoke.collection import Collection
from invoke.exceptions import Exit
from invoke.tasks import Task

from tasks import reporting
from tasks.lib.atomic import RUN
from tasks.lib.errors import INTERRUPTED, MISUSE, PIPE_CLOSED, BadSetting, UserError, printable
from tasks.lib.notices import TASK
from tasks.lib.settings import ROOT

REMEDIES = {
    errno.EACCES: "give yourself access (chown, chmod)",
    errno.EPERM: "give yourself access (chown, chmod)",
    errno.ENOSPC: "free some disk",
}
# Tasks that do one thing in several ways speak as one; each of env, eval and training's others as itself.
SPEAK_AS_ONE = ("build", "clean", "merge")


def line(error: OSError) -> str:
    """Return what failed, with which file, and the remedy where one is known."""
    # Its owner's keys and servers are in there: nothing to be opened to others.
    refused = error.errno in (errno.EACCES, errno.EPERM) and str(error.filename).startswith(f"{RUN}{os.sep}")
    if refused and (uid := RUN.stat().st_uid) != os.geteuid():
        return f"{RUN} is of user id {uid}, who works in this folder; work in a clone of your own: git clone {ROOT} DIR"
    said = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
    return "; ".join(filter(None, (said, REMEDIES.get(error.errno or 0))))


def speaker_of(name: str) -> str:
    """Return the name under which the task `name` speaks to the user."""
    family = name.partition(".")[0]
    return family if family in SPEAK_AS_ONE or name in ("train.shell", "train.run") else name


def guarded(name: str, body: Callable[..., Any]) -> Callable[..., Any]:
    """Return the task `body`, which leaves with `Exit` where user, system or package stops it, and on Ctrl-C."""

    @wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = TASK.set(speaker_of(name))
        try:
            return body(*args, **kwargs)
        except BadSetting as error:
            raise Exit(error.said(name), code=error.code) from None
        except UserError as error:
            raise Exit(error.said(speaker_of(name)) or None, code=error.code) from None
        except BrokenPipeError:  # whoever read what we print wanted no more
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise Exit(code=PIPE_CLOSED) from None
        except OSError as error:
            raise Exit(printable(f"{name}: {line(error)}"), code=MISUSE) from None
        except ModuleNotFoundError as error:
            raise Exit(printable(f"{name}: this Python has no {error.name}; `pip install -r requirements-dev.txt`"),
                       code=MISUSE) from None
        except KeyboardInterrupt:
            raise Exit(f"{name}: interrupted", code=INTERRUPTED) from None
        finally:
            TASK.reset(before)

    return run


def report(name: str, task: Task[Callable[..., Any]]) -> None:
    """Give the task `name` the flag `--json`, where it has something to report."""
    if name in reporting.SILENT:
        return
    body = task.body
    shape = signature(body)
    own = "json" in shape.parameters
    task.help.setdefault("json", reporting.HELP)

    @wraps(body)
    def run(*args: Any, json: bool = False, **kwargs: Any) -> Any:
        given = {**kwargs, "json": json} if own else kwargs
        # Called by another task, or watched, which is no single report.
        if not json or reporting.FACTS.get() is not None or kwargs.get("watch"):
            return body(*args, **given)
        return reporting.as_object(name, own or name.partition(".")[0] in reporting.BY_PROGRAM, args[0].config.run.dry,
                                   lambda: body(*args, **given))

    if not own:
        parameters = [*shape.parameters.values(), Parameter("json", Parameter.KEYWORD_ONLY, default=False)]
        run.__signature__ = shape.replace(parameters=parameters)  # type: ignore[attr-defined]
    task.body = run


def guard(collection: Collection, prefix: str = "") -> None:
    """Guard every task of `collection`; its default task goes by the collection's name."""
    for name, task in collection.tasks.items():
        full = prefix.rstrip(".") if name == collection.default else prefix + name
        task.body = guarded(full, task.body)
        report(full, task)
    for name, inner in collection.collections.items():
        guard(inner, f"{prefix}{name}.")
