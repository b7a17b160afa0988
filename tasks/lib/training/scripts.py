"""AgentGym-RL's example scripts, and users' copies of them: their override list, read without running anything.

Read is the part of the shell that they are written in: assignments, `export`, quotes, comments, continued lines and
variables. What no reading can tell (a loop, a command's output) is refused where the training command needs it.
"""
from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tasks.lib.errors import UserError
from tasks.lib.training.overrides import Override, parse
from training import foreign

MODULE = "verl.agent_trainer.main_ppo"
# Variables that a script exports and a run does not take from it: keys and where they go, and what `--gpus`, the
# image and the run's folder decide.
NOT_TAKEN = re.compile(r"WANDB_.*|.*(KEY|TOKEN|SECRET|PASSWORD).*|CUDA_VISIBLE_DEVICES|PYTHONPATH|PATH|LD_LIBRARY_PATH|"
                       r"LD_PRELOAD|HOME|RAY_.*|HYDRA_CONFIG.*")
KEYWORDS = ("if", "for", "while", "until", "case", "select", "function", "{", "((", "[[")
UNKNOWN = "\0"  # stands for what a command would print


@dataclass(frozen=True)
class Script:
    """What a script would run.

    Attributes:
        overrides: of the training command, in its order.
        variables: for the trainer's environment.
        left_out: commands of the script that a run does without, such as conda.
        not_taken: names of variables that it sets and a run does not take from it.
    """
    overrides: list[Override]
    variables: dict[str, str]
    left_out: list[str]
    not_taken: list[str]

    def notice(self, name: str) -> str:
        """Return the line that says what was not taken from the script; empty where all was."""
        said = [f"left out {', '.join(self.left_out)}"] if self.left_out else []
        said += [f"not taken {', '.join(self.not_taken)}"] if self.not_taken else []
        return f"{name}: {'; '.join(said)}" if said else ""


@dataclass
class Word:
    """A word of a command: pieces of text, and variables as (name, default, in quotes)."""
    line: int
    pieces: list[str | tuple[str, str | None, bool]] = field(default_factory=list)
    quoted: bool = False

    def add(self, text: str) -> None:
        """Put text at its end."""
        if self.pieces and isinstance(self.pieces[-1], str):
            self.pieces[-1] += text
        else:
            self.pieces.append(text)

    def plain(self) -> str:
        """Return the text before its first variable."""
        return self.pieces[0] if self.pieces and isinstance(self.pieces[0], str) else ""


class Reader:
    """Cuts a script into commands, each a list of words.

    Raises:
        ValueError: a quote or bracket that does not end.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.line = 1

    def take(self, count: int = 1) -> str:
        """Return the next characters and go on behind them."""
        taken = self.text[self.at:self.at + count]
        self.line += taken.count("\n")
        self.at += count
        return taken

    def until(self, end: str, what: str) -> str:
        """Return what stands before `end`, and go on behind it."""
        found = self.text.find(end, self.at)
        if found < 0:
            raise ValueError(f"line {self.line}: {what} does not end")
        inner = self.take(found - self.at)
        self.take(len(end))
        return inner

    def commands(self) -> Iterator[list[Word]]:
        """Give the commands in order; what follows a pipe or goes to a file is left out."""
        words: list[Word] = []
        word: Word | None = None
        skipping = False
        while self.at <= len(self.text):
            char = self.text[self.at:self.at + 1]
            if self.text.startswith("\\\n", self.at):
                self.take(2)
                continue
            if char in ("", " ", "\t", "\r", "\n", ";", "|", "&", "<", ">", "(", ")"):
                if word is not None and not (char in "<>" and char and word.pieces == ["2"]):
                    if not skipping:
                        words.append(word)
                    skipping = skipping and char not in (" ", "\t")
                word = None
                if char in ("<", ">"):  # of a redirection the file's name goes too
                    self.take()
                    while self.text[self.at:self.at + 1] in ("<", ">", "&", " ") and self.at < len(self.text):
                        self.take()
                    while self.text[self.at:self.at + 1] not in ("", " ", "\t", "\n", ";", "|", "&"):
                        self.take()
                    continue
                if char in ("", "\n", ";", "|", "&", "(", ")"):
                    if words:
                        yield words
                    words = []
                    if char == "(" or char == ")":
                        yield [Word(self.line, [char])]
                self.take()
                if char == "|":
                    self.take(1 if self.text[self.at:self.at + 1] == "|" else 0)
                continue
            if char == "#" and word is None:
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
                continue
            word = word or Word(self.line)
            self._piece(word, char)

    def _piece(self, word: Word, char: str) -> None:
        if char == "'":
            self.take()
            word.quoted = True
            word.add(self.until("'", "a quote"))
        elif char == '"':
            self.take()
            word.quoted = True
            word.add("")
            while True:
                inner = self.text[self.at:self.at + 1]
                if not inner:
                    raise ValueError(f"line {word.line}: a quote does not end")
                if inner == '"':
                    self.take()
                    return
                if inner == "\\" and self.text[self.at + 1:self.at + 2] in ('"', "\\", "$", "`", "\n"):
                    self.take()
                    escaped = self.take()
                    word.add("" if escaped == "\n" else escaped)
                elif inner in "$`":
                    self._variable(word, True)
                else:
                    word.add(self.take())
        elif char == "\\":
            self.take()
            word.quoted = True
            word.add(self.take())
        elif char in "$`":
            self._variable(word, False)
        else:
            word.add(self.take())

    def _variable(self, word: Word, quoted: bool) -> None:
        if self.text[self.at] == "`":
            self.take()
            self.until("`", "a command in ``")
            word.add(UNKNOWN)
            return
        if self.text.startswith("$(", self.at):
            depth, start = 0, self.line
            while True:
                char = self.take()
                if not char:
                    raise ValueError(f"line {start}: a command in $( ) does not end")
                depth += {"(": 1, ")": -1}.get(char, 0)
                if char == ")" and depth == 0:
                    word.add(UNKNOWN)
                    return
        if self.text.startswith("${", self.at):
            self.take(2)
            inner = self.until("}", "a variable in ${ }")
            found = re.fullmatch(r"(\w+|[@*#?!])(?::?-(.*))?", inner, re.DOTALL)
            if not found:
                word.add(UNKNOWN)  # arrays, substitutions
                return
            default = found[2]
            if default is not None:
                default = default.strip("\"'")
                default = UNKNOWN if "$" in default or "`" in default else default
            word.pieces.append((found[1], default, quoted))
            return
        found = re.compile(r"\$(\w+|[@*#?!$])").match(self.text, self.at)
        if not found:
            word.add(self.take())
            return
        name = found[1] if not found[1][0].isdigit() else found[1][0]
        self.take(1 + len(name))
        word.pieces.append((name, None, quoted))


class Shell:
    """The variables of a script while it is read."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.values: dict[str, str] = {}
        self.environ = environ
        self.unset: set[str] = set()

    def expand(self, word: Word) -> list[str]:
        """Return the words that `word` becomes: unquoted variables are cut at blanks."""
        found = [""]
        kept = word.quoted and not any(piece[:1] == ("@", ) for piece in word.pieces)  # "$@" of no arguments is no word
        for piece in word.pieces:
            if isinstance(piece, str):
                found[-1] += piece
                kept = kept or bool(piece)
                continue
            name, default, quoted = piece
            value = self.value(name, default)
            if quoted:
                found[-1] += value
                continue
            parts = value.split()
            if not parts:
                continue
            found[-1] += parts[0]
            found += parts[1:]
            kept = True
        return found if kept else []

    def value(self, name: str, default: str | None) -> str:
        """Return a variable's value."""
        if name in self.values:
            return self.values[name] or default or ""
        if name in ("@", "*") or name.isdigit():
            return default or ""
        if name in ("?", "#", "!", "$"):
            return UNKNOWN
        if name in ("HOME", "USER", "PWD") and name in self.environ:
            return self.environ[name]
        if default is None:
            self.unset.add(name)
        return default or ""


def assignment(word: Word) -> str:
    """Return the name that `word` assigns to; empty where it is no assignment."""
    found = re.match(r"([A-Za-z_]\w*)=", word.plain())
    return found[1] if found else ""


def assigned(shell: Shell, word: Word, name: str) -> str:
    """Return the value that the assignment `word` gives `name`."""
    rest = Word(word.line, list(word.pieces), True)
    first = word.plain()[len(name) + 1:]
    if first.startswith("~/") or first == "~":
        first = shell.environ.get("HOME", "~") + first[1:]
    rest.pieces[0] = first
    # The right side of an assignment is not cut into words.
    rest.pieces = [one if isinstance(one, str) else (one[0], one[1], True) for one in rest.pieces]
    return shell.expand(rest)[0]


def command_name(words: list[str]) -> str:
    """Return what a left out command is called in the notice; empty for one that does nothing to a run."""
    if words[0] in ("conda", "mamba", "micromamba") or words[0].endswith("/conda"):
        return "conda"
    if words[0] in ("source", ".") and len(words) > 1:
        return "conda" if "conda" in words[1] or words[1] == "activate" else f"source {words[1]}"
    if words[0] == "wandb":
        return " ".join(words[:2])  # never its key
    if words[0] in ("ray", "pip", "export", "huggingface-cli", "hf", "python", "python3", "bash", "sh", "ulimit"):
        return " ".join(words[:2])
    return ""


def read_script(text: str, name: str, environ: Mapping[str, str]) -> Script:
    """Return what the script `text` would run.

    Args:
        name: what messages call it.
        environ: of the user, for HOME, USER and PWD.

    Raises:
        UserError: it does not train, trains twice, or the training command depends on what cannot be read.
    """
    shell = Shell(environ)
    exported: dict[str, str] = {}
    left_out: list[str] = []
    trainings: list[tuple[int, list[str]]] = []
    depth: list[int] = []
    reader = Reader(text)
    try:
        for words in reader.commands():
            first = words[0].plain()
            if first in KEYWORDS or first in ("(", ")"):
                depth.append(words[0].line)
            local: dict[str, str] = {}
            while words and (key := assignment(words[0])):
                local[key] = assigned(shell, words.pop(0), key)
            if not words:
                shell.values.update(local)
                exported.update({key: value for key, value in local.items() if key in exported})
                continue
            shell.unset.clear()
            said = [one for word in words for one in shell.expand(word)]
            if not said:
                continue
            if said[0] in ("export", "declare", "readonly") and len(words) > 1:
                for word in words[1:]:
                    key = assignment(word) or word.plain()
                    if not re.fullmatch(r"[A-Za-z_]\w*", key):
                        continue
                    if assignment(word):
                        shell.values[key] = assigned(shell, word, key)
                    exported[key] = shell.values.get(key, "")
                continue
            at = next(
                (place for place, one in enumerate(said) if one == MODULE or one.endswith("agent_trainer/main_ppo.py")),
                None)
            if at is not None:
                if depth:
                    raise UserError(
                        f"{name}: line {depth[0]}: `{_line(text, depth[0])}` cannot be read without running it; "
                        "keep the assignments and the training command alone")
                if shell.unset:
                    raise UserError(
                        f"{name}: line {words[0].line}: the training command uses {', '.join(sorted(shell.unset))}, "
                        "which the script does not set; set it there")
                trainings.append((words[0].line, said[at + 1:]))
                exported.update(local)
                continue
            label = command_name(said)
            if label and label not in left_out:
                left_out.append(label)
            if "verl.agent_trainer.main_generation" in said:
                raise UserError(
                    f"{name}: it evaluates (main_generation) and trains nothing; use `invoke eval --checkpoint`")
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    if len(trainings) != 1:
        what = "has no" if not trainings else f"has {len(trainings)} commands with"
        raise UserError(f"{name} {what} `python -m {MODULE}`; give a script that trains once")
    line, arguments = trainings[0]
    return Script([_override(word, name, line) for word in arguments], {
        key: value
        for key, value in exported.items() if not NOT_TAKEN.fullmatch(key) and UNKNOWN not in value
    }, left_out, sorted(key for key in exported if NOT_TAKEN.fullmatch(key) or UNKNOWN in exported[key]))


def _line(text: str, number: int) -> str:
    return text.splitlines()[number - 1].strip()


def _override(word: str, name: str, line: int) -> Override:
    if word.startswith("-"):
        raise UserError(f"{name}: line {line}: {word} is a flag of Hydra's; give overrides alone")
    shown = word.replace(UNKNOWN, "…")
    found = parse(shown, f"in {name}, line {line},")
    if UNKNOWN in word and found.key not in REPLACED:
        raise UserError(
            f"{name}: line {line}: {shown} has what a command prints, which cannot be read without running it; "
            "write the value")
    return found


# What a run replaces in a script's list, whatever the script says.
REPLACED = ("actor_rollout_ref.agentgym.env_addr", "trainer.n_gpus_per_node", "trainer.default_local_dir",
            "actor_rollout_ref.rollout.rollout_log_dir", "hydra.run.dir", "trainer.project_name",
            "trainer.experiment_name")


def load(path: Path, environ: Mapping[str, str]) -> Script:
    """Return what the script at `path` would run.

    Raises:
        UserError: it cannot be read; see `read_script`.
    """
    try:
        text = foreign.read_bytes(path, foreign.LARGEST_LINE).decode()
    except ValueError as error:
        fault = "is no text" if isinstance(error, UnicodeDecodeError) else str(error).removeprefix(f"{path} ")
        raise UserError(f"--script {path} {fault}; give one of AgentGym-RL's examples/train/*/*.sh") from None
    except OSError as error:
        raise UserError(f"--script {path}: {error.strerror}; give one of AgentGym-RL's examples/train/*/*.sh") from None
    return read_script(text, path.name, environ)
