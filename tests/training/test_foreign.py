"""Files of a run that others wrote, or that were cut, or grew: a line, never a traceback, a hang or a full memory."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.lib import checkpoints
from tasks.lib.errors import UserError
from tasks.lib.training import facts, watching
from tasks.lib.training.showing import lines, row
from tests.training.runs import write_run
from training import curve, plot, rollouts
from training.folder import RunFolder
from training.status import status

DEEP = "[" * 200_000 + "]" * 200_000
ODD = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
                   | st.sampled_from([1e308, -1, 2**70, 10**299, "\x1b[2J", "\u202e", "../../x"]),
                   lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
                   max_leaves=4)
ATTEMPT = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("number", "started", "ended", "state", "cause", "reason", "resumed_from", "last_step"),
                           ODD))


def shows(folder: Path) -> list[str]:
    """Return what is shown of a run; [] where its run.json is refused in one line."""
    try:
        found = status(folder)
        told = [*lines(found), *row(found), json.dumps(found.json())]
        told.append(
            plot.page(found,
                      RunFolder(folder).read(),
                      RunFolder(folder).read_metrics(), curve.points(folder / "eval")))
    except ValueError as error:
        assert "\n" not in str(error) and str(error).isprintable()
        return []
    assert all(line.isprintable() for line in told[:-1])
    return told


@given(run=st.fixed_dictionaries({},
                                 optional=dict.fromkeys(
                                     ("steps", "gpus", "environment", "poisoned", "nan_steps", "options", "algorithm",
                                      "runner", "created", "world_size", "attempts"), ODD)),
       attempts=st.lists(ATTEMPT, max_size=2) | ODD)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_run_json_says_is_shown_or_refused_in_one_line(run, attempts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "run.json").write_text(json.dumps({"schema": 1, "attempts": attempts, **run}))
    shows(folder)


@given(state=st.dictionaries(
    st.sampled_from(
        ["state", "updated", "step", "pid", "environment", "gpus", "note", "silent_seconds", "resumed_from", "host"]),
    ODD),
       metrics=st.lists(st.fixed_dictionaries({
           "step":
           ODD | st.integers(0, 3),
           "metrics":
           ODD | st.dictionaries(st.sampled_from(["critic/task_score/mean", "timing_s/step", "actor/grad_norm"]), ODD)
       }),
                        max_size=4),
       event=st.dictionaries(st.sampled_from(["event", "time", "step"]), ODD | st.just("evaluated")))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_the_other_files_say_is_shown(state, metrics, event, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, attempts=[{"number": 1, "started": 1.0}])
    (folder / "state.json").write_text(json.dumps({"state": "running", "updated": time.time(), **state}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    assert shows(folder)


@pytest.mark.parametrize(
    "name", ["state.json", "metrics.jsonl", "events.jsonl", "log/attempt-1.log", "latest_checkpointed_iteration.txt"])
@pytest.mark.parametrize("kind", ["deep", "pipe", "endless", "device"])
def test_a_file_that_is_none_neither_hangs_nor_fills_the_memory(tmp_path, name, kind):
    write_run(tmp_path, attempts=[{"number": 1, "started": 1.0}])
    place = tmp_path / name
    place.parent.mkdir(exist_ok=True)
    if kind == "deep":
        place.write_text(DEEP)
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "device":
        place.symlink_to("/dev/zero")
    else:
        place.touch()
        os.truncate(place, 1 << 40)
    # Not ru_maxrss, which begins with what the process that started this one had: the tests' own hundreds of megabytes.
    program = f"""
import re
from pathlib import Path
from training.status import status
print(status({str(tmp_path)!r}).state, int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) >> 10)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    word, megabytes = done.stdout.split()
    assert word == "vanished" and int(megabytes) < 500


@pytest.mark.parametrize("text", [
    DEEP, '{"schema": 1, "a": {}, "a": {}}', '{"schema": 1, "steps": ' + "9" * 4000 + "}",
    "[" + "[]," * 1_100_000 + "0]"
])
def test_json_that_is_too_much_is_refused_in_one_line_by_every_reader(tmp_path, text):
    write_run(tmp_path)
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match="is no JSON that is read") as caught:
        RunFolder(tmp_path).read()
    assert "\n" not in str(caught.value)
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer_config.json", "merge.json", "merge-of.json"):
        (model / name).write_text(text)
    assert "cannot be read" in facts.read_model(model).fault
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text.encode())
    assert "no safetensors file" in facts.read_model(model).fault
    (model / "model.safetensors.index.json").write_text(text)
    assert "cannot be read" in facts.read_model(model).fault
    (tmp_path / "items.json").write_text(text)
    assert facts.read_items(tmp_path / "items.json").fault
    assert watching.read_record(model) == {} and watching.evaluated_merge(model) == "" and not checkpoints.is_current(
        model, tmp_path)
    (model / "config.json").write_text(text)
    with pytest.raises(UserError):
        checkpoints.check(model)
    evaluated = tmp_path / "eval" / "maze-global_step_1-abcdef"
    evaluated.mkdir(parents=True)
    (evaluated / "summary.json").write_text(text)
    (evaluated / "run.json").write_text(text)
    assert curve.points(tmp_path / "eval") == []
    played = tmp_path / "rollouts" / "step1"
    played.mkdir(parents=True)
    (played / "0.json").write_text(text)
    assert rollouts.read(tmp_path / "rollouts", 1) is None


def test_few_bytes_of_json_do_not_become_a_gigabyte():
    # A process of its own: this one's highest mark may lie far above what the reading takes.
    program = """
import re
from pathlib import Path
from training import foreign
try:
    foreign.loads("[" + '{"":' * 50 * 20_000 + "0")
except ValueError as error:
    print(error)
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) >> 10)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    refusal, megabytes = done.stdout.splitlines()
    assert "values" in refusal and int(megabytes) < 200


@pytest.mark.parametrize("config", [{
    "architectures": [1]
}, {
    "architectures": "x"
}, {
    "text_config": []
}, {
    "max_position_embeddings": "8"
}, {
    "max_position_embeddings": 2**70
}])
def test_a_config_whose_fields_are_none_is_refused_in_one_line(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **config}))
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    with pytest.raises(UserError, match=r"no list|no text|no table|no whole number"):
        checkpoints.check(tmp_path)
