"""Training scripts are read as a shell would read them: AgentGym-RL's ten, and what users make of them."""
import subprocess
from pathlib import Path

import pytest

from tasks.lib.errors import UserError
from tasks.lib.training.scripts import Script, load, read_script
from tests.training.test_presets import LISTS, names

HEAD = """set -x
export VLLM_USE_MODELSCOPE=0
name="{name}"   # the environment
cd AgentGym-RL
source activate
conda activate agentgym-rl
export WANDB_BASE_URL=https://keys.example.org
wandb login abcdef0123456789
server='http://127.0.0.1:36005'
model="models/${{base:-Qwen2.5-7B-Instruct}}"
out="saves"; mkdir -p ${{out}}
HYDRA_FULL_ERROR=1 WANDB_MODE=online python3 -m verl.agent_trainer.main_ppo \\
"""


def shell_form(script: str) -> str:
    """Return the facts of a script in the form in which such scripts are written."""
    name = names(script)[0]
    lines = []
    for key, text in LISTS[script].items():
        text = text.replace(name, "${name}", 1) if key.endswith(("task_name", "train_file")) else text
        text = {"http://127.0.0.1:36005": "${server}", "models/Qwen2.5-7B-Instruct": "${model}"}.get(text, text)
        text = text.replace("saves/", "$out/", 1)
        lines.append(f"    {key}={text}")
    return HEAD.format(name=name) + " \\\n".join(lines) + "\nstatus=$?\nexit $status"


@pytest.mark.parametrize("script", LISTS)
def test_the_list_of_a_script_is_read_key_by_key(script: str) -> None:
    found = read_script(shell_form(script), "x.sh", {})
    assert {one.key: one.text for one in found.overrides} == LISTS[script]
    assert found.variables == {"VLLM_USE_MODELSCOPE": "0", "HYDRA_FULL_ERROR": "1"}
    assert found.notice("x.sh") == "x.sh: left out conda, wandb login; not taken WANDB_BASE_URL, WANDB_MODE"


def trained(text: str, **environ: str) -> Script:
    """Return the script with `text` around the training command."""
    return read_script(text, "x.sh", environ)


TRAIN = "python -m verl.agent_trainer.main_ppo"
SAME_AS_BASH = [
    ("plain words", f"{TRAIN} a=1 b=x"),
    ("continued lines, and one that is not", f"{TRAIN} a=1 \\\n   b=x\nc=3"),
    ("double quotes with a variable", f'x=5; {TRAIN} "a=${{x}}y" b="$x z"'),
    ("single quotes take all as it is", f"x=5; {TRAIN} a='$x' 'b=q  r'"),
    ("an unquoted variable is cut at blanks", f'x="a=1  b=2"; {TRAIN} $x c=3'),
    ("a quoted one is not", f'x="1  2"; {TRAIN} a="$x"'),
    ("an empty variable leaves no word", f"x=; {TRAIN} $x a=1"),
    ("comments, also at a line's end", f"# a=0\nx=1 # {TRAIN} a=2\n{TRAIN} a=$x # b=3"),
    ("a # inside a word is none", f"{TRAIN} a=x#y"),
    ("defaults", f"{TRAIN} a=${{x:-7}} b=${{y-8}}"),
    ("assigned again", f"x=1\nx=${{x}}2\n{TRAIN} a=$x"),
    ("a variable of the command alone is not for its words", f"x=1\nx=2 {TRAIN} a=$x"),
    ("output to a file and a pipe", f"{TRAIN} a=1 b=x 2>&1 | tee -a log.txt"),
    ("output to a file", f"{TRAIN} a=1 >log.txt 2>err.txt b=x"),
    ("in the background", f"nohup {TRAIN} a=1 &"),
    ("after &&", f"mkdir -p saves && {TRAIN} a=1"),
    ("a backslash before a blank", f"{TRAIN} a=x\\ y"),
    ("a backslash in double quotes", f'{TRAIN} a="x\\$y\\\\z\\w"'),
    ("lists are not patterns", f"{TRAIN} a=[6,13,20]"),
    ("exported earlier", f"export x=4 y=5\n{TRAIN} a=$x$y"),
    ("no arguments of the script's own", f'{TRAIN} a=1 "$@"'),
    ("a quote in the middle of a word", f"{TRAIN} a=x'y z'w"),
    ("carriage returns of another system are kept out", f"{TRAIN} a=1\n"),
    ("tabs", f"{TRAIN}\ta=1\t\\\n\tb=2"),
]


@pytest.mark.parametrize("text", [text for _, text in SAME_AS_BASH], ids=[name for name, _ in SAME_AS_BASH])
def test_words_are_those_that_bash_makes(text: str, tmp_path: Path) -> None:
    """bash runs the script with a `python` that prints its words."""
    (tmp_path / "python").write_text('#!/bin/sh\nshift 2\nfor word; do printf "%s\\0" "$word"; done >"$OUT"\n')
    (tmp_path / "python").chmod(0o755)
    subprocess.run(["bash", "-c", text + "\nwait"],
                   cwd=tmp_path,
                   check=False,
                   timeout=20,
                   env={
                       "PATH": f"{tmp_path}:/usr/bin:/bin",
                       "OUT": str(tmp_path / "out")
                   },
                   capture_output=True)
    said = (tmp_path / "out").read_bytes().decode().split("\0")[:-1]
    want = [word.partition("=")[::2] for word in said]
    found = trained(text).overrides
    assert [(one.key, one.value if isinstance(one.value, str) else one.text) for one in found] == want


@pytest.mark.parametrize(("text", "line"), [
    ("", "has no `python -m verl.agent_trainer.main_ppo`"),
    ("echo hello", "has no `python -m verl.agent_trainer.main_ppo`"),
    (f"{TRAIN} a=1\n{TRAIN} a=2", "has 2 commands"),
    (f"{TRAIN} a=$x", "uses x, which the script does not set"),
    (f"if true; then\n{TRAIN} a=1\nfi", "line 1: `if true; then` cannot be read"),
    (f"for x in 1 2; do {TRAIN} a=$x; done", "cannot be read without running it"),
    (f"x=$(date)\n{TRAIN} data.train_batch_size=$x", "has what a command prints"),
    (f"{TRAIN} data.train_batch_size=`cat n`", "has what a command prints"),
    (f"x=(1 2)\n{TRAIN} a=${{x[0]}}", "cannot be read without running it"),
    (f'{TRAIN} a="1', "a quote does not end"),
    (f"{TRAIN} a='1", "a quote does not end"),
    (f"{TRAIN} --config-name=other a=1", "is a flag of Hydra's"),
    (f"{TRAIN} model", "'model' in x.sh, line 1, is no override"),
    ("python -m verl.agent_trainer.main_generation data.path=x", "use `invoke eval --checkpoint`"),
])
def test_what_cannot_be_read_is_refused_in_one_line(text: str, line: str) -> None:
    with pytest.raises(UserError) as said:
        trained(text)
    assert line in said.value.message and "\n" not in said.value.message and said.value.code == 2


def test_what_a_run_replaces_may_be_unreadable() -> None:
    assert trained(f"x=$(date)\n{TRAIN} trainer.experiment_name=a-$x a=1").overrides[1].value == 1


def test_no_key_is_taken_or_shown() -> None:
    found = trained(
        f"export WANDB_API_KEY=abc HF_TOKEN=hf_x OPENAI_API_KEY=sk A=1 CUDA_VISIBLE_DEVICES=0\nwandb login abc\n{TRAIN} a=1"
    )
    assert found.variables == {"A": "1"}
    assert "abc" not in found.notice("x.sh") and "hf_x" not in found.notice("x.sh")
    assert found.not_taken == ["CUDA_VISIBLE_DEVICES", "HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY"]


def test_the_users_home_stands_for_a_tilde() -> None:
    found = trained(f"m=~/models/x\n{TRAIN} a=$m b=$HOME", HOME="/home/u").overrides
    assert [one.value for one in found] == ["/home/u/models/x", "/home/u"]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "x.sh").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is no text"):
        load(tmp_path / "x.sh", {})
    with pytest.raises(UserError, match="No such file"):
        load(tmp_path / "y.sh", {})
