"""python -m training run FOLDER: run the training run that FOLDER/run.json describes; `uploading` has two commands more."""
import sys

from training import supervisor, uploading

USAGE = "training: write `python -m training run FOLDER`; FOLDER holds the run.json that `invoke train.start` writes"


def main(argv: list[str]) -> int:
    """Return the exit code: 0 finished, 143 or 130 stopped, 2 misuse, else the trainer's."""
    if argv and argv[0] in ("upload", "figures"):
        return uploading.main(argv)
    if len(argv) != 2 or argv[0] != "run":
        print(USAGE, file=sys.stderr)
        return supervisor.MISUSE
    return supervisor.main(argv[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
