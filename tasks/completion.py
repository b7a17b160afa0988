"""Let the shell complete tasks, flags and their values."""
import os
import re
import shlex
import sys
from pathlib import Path

from invoke.context import Context
from invoke.tasks import task

from tasks.lib.errors import UserError
from tasks.lib.settings import ROOT

# Each runs this checkout's program alone, never one of the folder where the user happens to stand; outside of a project with
# an environments.toml it offers files.
FIND = """local root=$PWD
    while [ -n "$root" ] && [ ! -f "$root/environments.toml" ]; do root=${root%/*}; done
    [ -n "$root" ] || return"""
SCRIPTS = {
    "bash":
    f"""_agentgym_invoke() {{
    {FIND}
    local IFS=$'\\n'
    COMPREPLY=($(%s "$root" "${{COMP_WORDS[@]:1:COMP_CWORD}}" 2>/dev/null))
}}
complete -o default -F _agentgym_invoke invoke inv
""",
    "zsh":
    f"""_agentgym_invoke() {{
    {FIND}
    local -a found
    found=("${{(@f)$(%s "$root" "${{(@)words[2,CURRENT]}}" 2>/dev/null)}}")
    [ -n "$found" ] && compadd -Q -- $found || _files
}}
(( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit; }}
compdef _agentgym_invoke invoke inv
""",
    "fish":
    """function __agentgym_invoke
    set -l root $PWD
    while test -n "$root" -a ! -f "$root/environments.toml"
        set root (string replace -r '/[^/]*$' '' -- $root)
    end
    test -n "$root"; or return
    set -l words (commandline -opc) (commandline -ct)
    %s $root $words[2..-1] 2>/dev/null
end
complete -c invoke -a '(__agentgym_invoke)'
complete -c inv -a '(__agentgym_invoke)'
""",
}
BEGIN, END = "# >>> completion of invoke, AgentGym-RL's workbench >>>", "# <<< completion of invoke <<<"


def script_for(shell: str) -> str:
    """Return the shell's script.

    Raises:
        UserError: there is none for that shell.
    """
    if shell not in SCRIPTS:
        raise UserError(f"no completion for {shell!r}; choose one of {', '.join(SCRIPTS)}")
    program = shlex.join([sys.executable, "-IS", str(ROOT / "tasks" / "completing.py")])
    return SCRIPTS[shell].replace("%s", program)


def place_for(shell: str) -> Path:
    """Return the file that the shell reads when it starts."""
    home = Path.home()
    if shell == "fish":
        return Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "fish" / "conf.d" / "agentgym_invoke.fish"
    return home / ".bashrc" if shell == "bash" else Path(os.environ.get("ZDOTDIR") or home) / ".zshrc"


def with_block(text: str, script: str) -> str:
    """Return a shell's file with the script in it, in place of an earlier one."""
    kept = re.sub(rf"{re.escape(BEGIN)}.*?{re.escape(END)}\n", "", text, flags=re.DOTALL)
    kept += "" if not kept or kept.endswith("\n") else "\n"
    return f"{kept}{BEGIN}\n{script}{END}\n"


@task(positional=[],
      auto_shortflags=False,
      help={
          "install": "bash, zsh or fish: put it into the file which that shell reads, and say which.",
          "show": "bash, zsh or fish: print it, and change nothing.",
      })
def completion(c: Context, install: str = "", show: str = "") -> None:
    """Complete tasks, flags and values in your shell."""
    if bool(install) == bool(show):
        raise UserError("give --install bash, zsh or fish; --show prints what it would add")
    script = script_for(install or show)
    if show:
        print(script, end="")
        return
    path = place_for(install)
    if c.config.run.dry:
        print(f"would put {len(script.splitlines())} lines into {path}")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    real = Path(os.path.realpath(path))  # where it is a link into a folder of dotfiles, that file changes
    before = real.read_text() if real.exists() else ""
    mode = real.stat().st_mode & 0o777 if real.exists() else 0o644
    beside = real.with_name(f".{real.name}.{os.getpid()}")
    beside.write_text(with_block(before, script))
    beside.chmod(mode)
    beside.replace(real)
    print(f"completion: changed {path}; open a new {install}, or `source {shlex.quote(str(path))}`")
