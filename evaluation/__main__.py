"""The command line of the evaluation runner."""
import argparse
import sys
from collections.abc import Sequence

from evaluation import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m evaluation",
                                     description="Evaluate language models on AgentGym's environment servers.",
                                     epilog="This version has no commands yet: it answers --help and --version.")
    parser.add_argument("--version", action="version", version=f"evaluation {__version__}")
    parser.parse_args(argv)
    parser.print_usage(sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
