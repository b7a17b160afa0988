"""The tasks' edge: what a user can mend is one line and an exit code there, never a traceback."""
import errno
import os
from collections.abc import Callable
from functools import wraps
from typing import Any

from invoke.collection import Collection
from invoke.exceptions import Exit

from tasks.lib.errors import INTERRUPTED, MISUSE, PIPE_CLOSED, BadSetting, UserError, printable
from tasks.lib.notices import TASK

REMEDIES = {
    errno.EACCES: "give yourself access (chown, chmod)",
    errno.EPERM: "give yourself access (chown, chmod)",
    errno.ENOSPC: "free some disk",
}
# Tasks that do one thing in several ways speak as one; each of env, eval and training's others as itself.
SPEAK_AS_ONE = ("build", "clean", "merge")


def line(error: OSError) -> str:
    """Return what failed, with which file, and the remedy where one is known."""
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
            raise Exit(f"{name}: this Python has no {error.name}; `pip install -r requirements-dev.txt`",
                       code=MISUSE) from None
        except KeyboardInterrupt:
            raise Exit(f"{name}: interrupted", code=INTERRUPTED) from None
        finally:
            TASK.reset(before)

    return run


def guard(collection: Collection, prefix: str = "") -> None:
    """Guard every task of `collection`; its default task goes by the collection's name."""
    for name, task in collection.tasks.items():
        task.body = guarded(prefix.rstrip(".") if name == collection.default else prefix + name, task.body)
    for name, inner in collection.collections.items():
        guard(inner, f"{prefix}{name}.")
