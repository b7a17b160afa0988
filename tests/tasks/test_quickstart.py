"""The whole story without Docker: what is trained is what is merged, served and measured; and that the check can fail."""
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sample_checkpoint
import torch
import train_sample
import transformers
from invoke import MockContext
from safetensors.torch import load_file, save_file

from tasks.lib.errors import UserError
from tests.fixtures.invoking import invoke
from tests.fixtures.story import SAMPLING, Story, success
from tests.merger.merging import SAMPLE_PROGRAMS, SCRIPTS

quickstart = importlib.import_module("tasks.quickstart")  # the package's attribute of this name is the task


def test_the_trained_agent_is_above_chance_and_the_expert_above_all(story: Story) -> None:
    assert story.done.returncode == 0, story.done.stdout[-3000:] + story.done.stderr[-3000:]
    assert story.success("expert") == 1.0
    assert story.success("untrained") == 0.0
    assert story.success("trained") > story.success("random") + 0.2


def test_a_server_that_the_user_wants_to_keep_is_kept() -> None:
    from tasks.lib.environments import lease
    from tasks.lib.environments import local as env_local
    from tasks.lib.environments.lookup import find_row
    from tasks.lib.environments.running import local_url
    row = find_row("demo")
    env_local.down(row.name)
    try:
        with quickstart.demo_server(MockContext()) as url:
            assert local_url(row) == url
        assert local_url(row) is None
        with quickstart.demo_server(MockContext()) as url:
            lease.detach_owner(row.name)  # as `invoke env.up --env demo` does
        assert local_url(row) == url
    finally:
        env_local.down(row.name)


def test_it_shows_a_table_and_writes_a_report(story: Story) -> None:
    heads = next(line for line in story.done.stdout.splitlines() if "untrained" in line and "expert" in line)
    assert [heads.find(name) for name in ("random", " trained", "expert")] == sorted(
        heads.find(name) for name in ("random", " trained", "expert"))
    assert "bit for bit" in story.done.stdout and "verified      │ yes" in story.done.stdout
    assert f"report: {story.saves / 'report.html'}" in story.done.stdout
    assert (story.saves / "report.html").stat().st_size > 100_000


def test_nothing_is_left_running(story: Story) -> None:
    assert not list((story.root / ".run").glob("*/*/state.json"))


def test_the_lessons_are_conversations_of_items_that_are_not_played_afterwards(story: Story) -> None:
    lessons = [json.loads(line) for line in (story.saves / "lessons.jsonl").read_text().splitlines()]
    played = [json.loads(line) for line in (story.saves / "eval" / "trained" / "attempts.jsonl").read_text().splitlines()]
    assert len(lessons) == 192 and len(played) == 16
    assert not {lesson["item"] for lesson in lessons} & {record["item"] for record in played}
    assert [message["content"] for message in lessons[0]["messages"] if message.get("weight") == 0] == ["OK."]
    roles = [message["role"] for message in lessons[0]["messages"]]
    assert roles == ["user", "assistant"] * (len(roles) // 2)


def exchanged(model: Path, folder: Path) -> Path:
    """Copy a merged model with the pieces of ranks 0 and 1 of four exchanged in every tensor."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    for name, whole in weights.items():
        pieces = list(whole.chunk(4))  # as FSDP cuts the first dimension
        if len(pieces) > 1 and pieces[0].shape == pieces[1].shape:
            pieces[0], pieces[1] = pieces[1], pieces[0]
            weights[name] = torch.cat(pieces)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_wrong_merge_scores_like_no_training(story: Story, tmp_path: Path) -> None:
    model = exchanged(story.saves / "actor" / "huggingface", tmp_path / "exchanged")
    done = subprocess.run([sys.executable, "-m", "invoke", "eval", "--checkpoint", str(model), "--env", "demo", "--runner", "local", "--items",
                           ",".join(map(str, quickstart.HELD_OUT)), "--out", str(tmp_path / "run"), *SAMPLING],
                          cwd=story.root, capture_output=True, text=True, timeout=600, check=False)  # yapf: disable
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert success(tmp_path / "run") <= story.success("untrained") + 0.1 < story.success("trained")


def test_rows_of_one_s_own_do_not_keep_it_from_its_environment() -> None:
    rows = {**os.environ, "ENVIRONMENTS": "tests/fixtures/environments.toml"}
    done = invoke("--dry", "quickstart", cwd=SCRIPTS.parent, env=rows)
    assert done.returncode == 0 and "--env=demo" in done.stdout, done.stderr


def test_an_agent_that_is_no_better_than_chance_ends_it_with_1(tmp_path: Path) -> None:
    def run(name: str, mean: float, high: float) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps({"success": {"mean": mean, "low": 0.0, "high": high}}))
        return tmp_path / name

    chance = run("random", 0.0, 0.19)
    quickstart.judge(chance, run("good", 0.5, 0.7))
    with pytest.raises(UserError, match="not above") as left:
        quickstart.judge(chance, run("bad", 0.06, 0.3))
    assert left.value.code == 1


# The trainer


def conversation(*answers: str) -> list[dict[str, Any]]:
    rounds = [({"role": "user", "content": f"find {answer}"}, {"role": "assistant", "content": answer}) for answer in answers]
    return [message for pair in rounds for message in pair]


def test_a_window_is_whole_rounds_in_their_order() -> None:
    talk = [{"role": "user", "content": "rules"}, {"role": "assistant", "content": "OK.", "weight": 0}]
    talk += conversation("north", "south", "east", "west", "take")
    rng = random.Random(0)
    lengths = set()
    for _ in range(100):
        part = train_sample.window(talk, 3, rng)
        start = talk.index(part[0])
        assert part == talk[start:start + len(part)] and start != 2 and part[-1]["role"] == "assistant"
        lengths.add(len(train_sample.answers(part)))
    assert lengths == {1, 2, 3}
    assert train_sample.window(talk[:4], 8, rng) == talk[:4]


def test_the_labels_are_what_the_assistant_said_and_its_end(tmp_path: Path) -> None:
    sample_checkpoint.write_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    tokenizer.padding_side = "right"
    given = [{"role": "user", "content": "rules"}, {"role": "assistant", "content": "OK.", "weight": 0}]
    ids, mask, labels = train_sample.encode(tokenizer, [[*given, *conversation("east", "take")], conversation("put")])
    assert ids.shape == mask.shape == labels.shape
    said = [tokenizer.decode(line[line != train_sample.IGNORED]) for line in labels]
    assert said == ["east<|im_end|>take<|im_end|>", "put<|im_end|>"]
    # What a server sends for the first answer is what was trained on.
    served = tokenizer.apply_chat_template(conversation("put")[:1], add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(ids[1][mask[1] == 1]).startswith(served + "put<|im_end|>")


def test_one_rank_alone_can_be_trained(tmp_path: Path) -> None:
    lesson = {"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": "take"}]}
    (tmp_path / "lessons.jsonl").write_text(json.dumps(lesson) + "\n")
    done = subprocess.run([sys.executable, str(SAMPLE_PROGRAMS / "train_sample.py"), "--data", str(tmp_path / "lessons.jsonl"), "--save-dir",
                           str(tmp_path / "actor"), "--reference", str(tmp_path / "reference.safetensors"), "--world-size", "1", "--steps", "2"],
                          capture_output=True, text=True, timeout=300, check=False)  # yapf: disable
    assert done.returncode == 0, done.stderr[-2000:]
    saved = torch.load(tmp_path / "actor" / "model_world_size_1_rank_0.pt", weights_only=False)
    whole = load_file(tmp_path / "reference.safetensors")
    assert whole and all(torch.equal(tensor, saved[name]) for name, tensor in whole.items())


@pytest.mark.parametrize(("data", "words", "told"), [
    ("", (), "no conversation with an assistant"),
    ("{}", (), "line 1 is no conversation"),
    ('{"messages": [{"role": "user", "content": "x"}]}', (), "no conversation with an assistant"),
    ('{"messages": []}', ("--steps", "0"), "--steps 0 is too small; give 1 or more"),
    (None, (), "No such file"),
], ids=["empty", "other lines", "no answers", "no steps", "no file"])  # yapf: disable
def test_lessons_that_cannot_be_are_one_line_and_write_nothing(data: str | None, words: tuple[str, ...], told: str, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / "lessons.jsonl").write_text(data)
    done = subprocess.run([sys.executable, str(SAMPLE_PROGRAMS / "train_sample.py"), "--data", str(tmp_path / "lessons.jsonl"), "--save-dir",
                           str(tmp_path / "actor"), "--reference", str(tmp_path / "reference"), *words],
                          capture_output=True, text=True, timeout=60, check=False)  # yapf: disable
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and told in done.stderr
    assert done.stderr.startswith("train_sample: ") and not (tmp_path / "actor").exists()
