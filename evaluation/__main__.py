"""Run the command line: signals, output that may go away, exit codes."""
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

from evaluation.cli import FAILED, INTERRUPTED, MISUSE, parser
from evaluation.commands import COMMANDS
from evaluation.output import FACTS, Output, complain
from evaluation.problems import Misuse, Stopped
from evaluation.secrets import hide
from evaluation.text import one_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` and return the exit code."""
    if sys.stdout is None:  # closed: the next file that is opened would take its number, and what is said with it
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the program runs
    output = Output(sys.stdout)
    words = sys.argv[1:] if argv is None else argv
    with redirect_stdout(output):
        if "--json" in words and words[0] != "watch":  # standard output is for the object alone; a watch's are many
            FACTS.clear()
            with redirect_stdout(sys.stderr):
                code, command = _obey(words)
            print(json.dumps({"code": code, **FACTS}))
        else:
            code, command = _obey(words)
        output.flush()
    if output.gone is None:
        return code
    if not isinstance(output.gone, BrokenPipeError):  # whose reader wanted no more
        complain(f"standard output cannot be written: {output.gone.strerror}; give it another place")
    return code if command == "run" else code or FAILED  # a run has left everything in its folder


def _obey(argv: Sequence[str]) -> tuple[int, str]:
    try:
        options = parser().parse_args(argv)
    except SystemExit as left:
        return int(left.code or 0), ""
    try:
        return COMMANDS[options.command](options), options.command
    except (Misuse, Stopped) as problem:
        code = MISUSE if isinstance(problem, Misuse) else FAILED
        complain(str(problem))
        FACTS["error"] = {"code": code, "message": hide(one_line(str(problem)))}
        return code, options.command
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
