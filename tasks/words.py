"""What was typed, before invoke looks at it: its own line names no remedy, and leaves with 1."""
from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from invoke.collection import Collection
from invoke.exceptions import ParseError
from invoke.parser import Parser, ParserContext
from invoke.program import Program

from tasks.lib.errors import MISUSE, printable
from tasks.lib.notices import put

# A word that stands alone is most often meant for the first of these that the task has.
MEANT = ("--local-dir", "--env", "--name", "--run")
# What verl's merger calls flags of ours.
OF_VERL = {"--hf-model-path": "--config-dir", "--target-dir": "--save-dir"}
AFTER_DASHES = ("train.run", "train.start", "train.check")


def contexts(ns: Collection) -> list[ParserContext]:
    """Return the tasks as invoke's parser knows them; invoke takes each help text only once, so they are put back."""
    tasks = [ns[name] for name in ns.task_names]
    helps = [dict(task.help) for task in tasks]
    found: list[ParserContext] = ns.to_contexts()
    for task, help in zip(tasks, helps, strict=True):
        task.help = help
    return found


def fault(ns: Collection, argv: Sequence[str]) -> str:
    """Return what is wrong with the words of a command line, and what helps; empty where invoke takes them."""
    program = Program()
    program.argv = list(argv)
    try:
        program.parse_core_args()
        wanted = program.core[0].args
        if wanted.complete.value or wanted["print-completion-script"].value or wanted.version.value:
            return ""
        known = contexts(ns)
        parser = Parser(contexts=known, initial=program.initial_context)
        found = parser.parse_argv(program.core.unparsed)
    except ParseError as error:
        return explained(ns, error, [] if program.core is None else program.core.unparsed)
    flag = found[-1].flags.get(program.core.unparsed[-1]) if found[1:] else None
    if flag is not None and flag.kind is list:  # of which invoke makes an empty list
        return f"{shown(ns, found[-1])}: {program.core.unparsed[-1]} needs a value"
    asked = wanted.help.value
    if isinstance(asked, str) and asked not in parser.contexts:
        return unknown_task(ns, asked)
    return ""


def shown(ns: Collection, context: ParserContext) -> str:
    """Return the name under which a task is known: a default task goes by its collection's."""
    name = context.name or ""
    family = name.partition(".")[0]
    return family if family in ns.collections and ns.collections[family].default == name.partition(".")[2] else name


def names(ns: Collection) -> list[str]:
    """Return every name under which a task can be typed."""
    return [name for task, aliases in ns.task_names.items() for name in (task, *aliases)]


def explained(ns: Collection, error: ParseError, words: Sequence[str]) -> str:
    """Return invoke's `error` about `words` in words that help."""
    match = re.fullmatch(r"No idea what (['\"].*['\"]) is!", str(error), re.DOTALL)
    context = error.context
    if match is None or context is None:
        task = shown(ns, context) if context is not None and context.name else ""
        return f"{task}: {str(error).rstrip('!')}; `invoke --help {task}` shows its flags".removeprefix(": ")
    word = match[1][1:-1].encode().decode("unicode_escape") if "\\" in match[1] else match[1][1:-1]
    if not context.name:
        return unknown_task(ns, word)
    return f"{shown(ns, context)}: {unknown_word(context, word, words, names(ns))}"


def unknown_task(ns: Collection, word: str) -> str:
    """Return what to type in place of a task that is none."""
    if word in ns.collections:
        inside = sorted(name for name in names(ns) if name.startswith(f"{word}."))
        return f"{word} is no task; choose {', '.join(inside)}"
    if word.startswith("-"):
        return f"no flag {word}; flags of a task come after its name, and `invoke --help` shows invoke's own"
    return f"no task {word!r}; {close(word, [*names(ns), *ns.collections]) or '`invoke --list` shows them'}"


def unknown_word(context: ParserContext, word: str, words: Sequence[str], tasks: Iterable[str]) -> str:
    """Return what to type in place of `word`, which the task cannot take where it stands."""
    flags = [flag for flag in context.flags if flag.startswith("--")]
    if word.startswith("-"):
        typed = word.partition("=")[0]
        ours = OF_VERL.get(typed.replace("_", "-"))
        if ours and ours in flags:
            return f"no flag {typed}; did you mean {ours}?"
        return f"no flag {typed}; {close(typed, flags) or f'`invoke --help {context.name}` shows them'}"
    if context.name == "train.run":
        rest = [one for one in words[words.index(word):] if one != "--"] if word in words else [word]
        return f"put the command after --: invoke train.run -- {shlex.join(rest)}"
    if context.name in AFTER_DASHES and "=" in word:
        return f"put the trainer's own words after --: invoke {context.name} … -- {shlex.quote(word)}"
    task = close(word, tasks)
    path = "/" in word and "--checkpoint" in context.flags
    flag = "--checkpoint" if path else next((one for one in MEANT if one in context.flags), "")
    if flag and not task:
        return f"{word!r} stands alone; write {flag} {shlex.quote(word)}"
    return f"it takes no word {word!r}; {task or f'`invoke --help {context.name}` shows its flags'}"


def close(word: str, known: Iterable[str]) -> str:
    """Return a question with what is most like `word`; empty where nothing is."""
    found = get_close_matches(word, list(known), 1, 0.7)
    return f"did you mean {found[0]}?" if found else ""


def check(ns: Collection, argv: Sequence[str]) -> None:
    """Leave with one line and exit code 2 where the words cannot be what the user meant; with --json with an object too.

    Raises:
        SystemExit: see above.
    """
    said = fault(ns, argv)
    if not said:
        return
    line = printable(f"invoke: {said}")
    typed = argv[:argv.index("--")] if "--" in argv else argv
    if "--json" in typed:
        print(json.dumps({"task": "invoke", "code": MISUSE, "error": {"code": MISUSE, "message": line}}), flush=True)
    put(line, file=sys.stderr)
    sys.exit(MISUSE)
