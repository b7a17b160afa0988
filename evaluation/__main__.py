"""Run the command line: signals, output that may go away, exit codes."""
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

from evaluation.cli import FAILED, INTERRUPTED, MISUSE, parser
from evaluation.commands import COMMANDS
from evaluation.output import Output, complain
from evaluation.problems import Misuse, Stopped


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` and return the exit code."""
    if sys.stdout is None:  # closed: the next file that is opened would take its number, and what is said with it
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the program runs
    output = Output(sys.stdout)
    with redirect_stdout(output):
        code, command = _obey(argv)
        output.flush()
    if output.gone is None:
        return code
    if not isinstance(output.gone, BrokenPipeError):  # whose reader wanted no more
        complain(f"standard output cannot be written: {output.gone.strerror}; give it another place")
    return code if command == "run" else code or FAILED  # a run has left everything in its folder


def _obey(argv: Sequence[str] | None) -> tuple[int, str]:
    try:
        options = parser().parse_args(argv)
    except SystemExit as left:
        return int(left.code or 0), ""
    try:
        return COMMANDS[options.command](options), options.command
    except Misuse as problem:
        complain(str(problem))
        return MISUSE, options.command
    except Stopped as problem:
        complain(str(problem))
        return FAILED, options.command
    except KeyboardInterrupt:
        return INTERRUPTED, options.command


def program() -> None:
    """Run the command line as a program of its own, and leave with its exit code."""
    # SIGTERM, from a cluster's scheduler or `docker stop`, and SIGHUP, from a terminal that is closed, are answered like
    # Ctrl-C: sessions are closed, numbers written.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(number, lambda signum, frame: signal.raise_signal(signal.SIGINT))
    sys.exit(main())


if __name__ == "__main__":
    program()
