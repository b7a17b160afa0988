"""What `invoke doctor` tells before the first hour: each judgement, and the lines of a machine with an engine elsewhere."""
import json
import re
import socket
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from tasks.lib.doctor import surroundings
from tasks.lib.doctor.check import NOTE, OK, Check
from tasks.lib.doctor.checks import MISSING, check_disk
from tasks.lib.doctor.surroundings import Gpu
from tests.fixtures import needs
from tests.fixtures.project import copy_project
from tests.tasks.test_edge import FAKE, Project

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
H200 = "NVIDIA H200"


def gpu(driver: str) -> list[Gpu]:
    return [Gpu(H200, 143771, 10, driver)]


@pytest.mark.parametrize("check, level, said", [
    (surroundings.check_gpus(gpu("550.54.14"), ""), OK, "0: NVIDIA H200, 10 of 143771 MiB used; driver 550.54.14"),
    (surroundings.check_gpus(gpu("570.1"), ""), OK, "driver 570.1"),
    (surroundings.check_gpus(gpu("550.54.13"), ""), NOTE, "older than CUDA 12.4's own"),
    (surroundings.check_gpus(gpu("525.60.13"), ""), NOTE, "older than CUDA 12.4's own"),
    (surroundings.check_gpus(gpu("525.60.12"), ""), NOTE, "too old for CUDA 12.4"),
    (surroundings.check_gpus(gpu("470.256.02"), ""), NOTE, "too old for CUDA 12.4"),
    (surroundings.check_gpus([], ""), NOTE, "finds none"),
    (surroundings.check_gpus(None, ""), NOTE, "no nvidia-smi"),
    (surroundings.check_gpus(gpu("550.54.14"), "tcp://far:2375"), NOTE, "tcp://far:2375, whose GPUs are not asked from here"),
    (check_disk(32_000_000_000, "/x"), OK, "32 GB of images not built yet"),
    (check_disk(12_000_000_000, "/x", 25_000_000_000), OK, "7 GB of images not built yet"),
    (check_disk(6_000_000_000, "/x", 25_000_000_000), MISSING, "6 GB free"),
    (surroundings.check_memory(64 << 30, "32g", 32 << 30), OK, "SHM_SIZE=32g"),
    (surroundings.check_memory(24 << 30, "32g", 32 << 30), NOTE, "more than there is"),
    (surroundings.check_shared(1 << 30), OK, "1.07GB"),
    (surroundings.check_shared(64 << 20), NOTE, "67.1MB"),
    (surroundings.check_shared(None), NOTE, "none"),
    (surroundings.check_ports({}), OK, "free"),
    (surroundings.check_ports({36001: "searchqa", 8000: "SERVE_PORT"}), NOTE, "8000 (SERVE_PORT), 36001 (searchqa)"),
    (surroundings.check_clock(NOW - timedelta(seconds=59), NOW, NOW), OK, "2026-01-02 03:04:05"),
    (surroundings.check_clock(NOW - timedelta(seconds=61), NOW, None), NOTE, "03:03:04 with the engine"),
    (surroundings.check_clock(NOW, NOW, NOW + timedelta(days=400)), NOTE, "this checkout has files of 2027"),
    (surroundings.check_images({"a": timedelta(days=3), "b": timedelta(0)}), OK, "a (3 days), b (seconds)"),
    (surroundings.check_images({"a": timedelta(days=3), "b": None}), NOTE, "a (3 days); not built: b"),
    (surroundings.check_data(["webshop", "alfworld"], []), NOTE, "not: webshop, alfworld"),
    (surroundings.check_data([], ["sqlgym"]), OK, "there: sqlgym"),
    (surroundings.check_models(["Qwen"], Path("/m")), OK, "Qwen"),
    (surroundings.check_models([], Path("/m")), NOTE, "none in /m"),
    (surroundings.check_keys({"HF_TOKEN": "hf_secret", "TODO_KEY": ""}), OK, "set: HF_TOKEN; not set: PACKAGE_INDEX_URL"),
    (surroundings.check_others([]), OK, "no container"),
    (surroundings.check_others(["of /a, user id 7", "of /b", "of /a, user id 7"]), NOTE, "2 of /a, user id 7, 1 of /b"),
    (surroundings.check_differences({"ENV": "maze", "HF_TOKEN": "hf_x"}, {"HF_TOKEN": "hf_x"}), OK, "other than the defaults: ENV, HF_TOKEN"),
    (surroundings.check_differences({"HF_TOKEN": "hf_x"}, {"HF_TOKEN": "hf_y"}), NOTE, "goes before .env: HF_TOKEN"),
], ids=lambda value: f"{value.name}: {value.found}"[:60] if isinstance(value, Check) else None)  # fmt: skip
def test_a_judgement(check: Check, level: str, said: str) -> None:
    assert check.level == level and said in check.found, check
    assert bool(check.remedy) == (level != OK)
    assert not re.search("hf_[xys]", check.found + check.remedy), "a key's value is not shown"


def test_models_are_folders_with_a_config(tmp_path: Path) -> None:
    for name in ("Qwen2.5-7B", "org/model", ".cache/x", "a/b/c"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
    assert surroundings.models_in(tmp_path) == ["Qwen2.5-7B", "org/model"]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A copy of the project with a docker whose engine is on a machine called far."""
    needs.docker()
    (tmp_path / "docker").mkdir()
    answers = """    *"context inspect"*) echo '[{"Name": "x", "Endpoints": {"docker": {"Host": "tcp://me:pw@far:2375"}}}]' ;;
    *"system info"*) echo '{"Runtimes": {}, "Name": "far", "DockerRootDir": "/var/lib/docker", "MemTotal": 8589934592}' ;;
"""
    (tmp_path / "docker/docker").write_text(FAKE.replace('    *"container list"*)', answers + '    *"container list"*)', 1))
    (tmp_path / "docker/docker").chmod(0o755)
    (tmp_path / "docker/nvidia-smi").write_text(f"#!/bin/sh\necho '{H200}, 143771, 10, 550.54.14'\n")
    (tmp_path / "docker/nvidia-smi").chmod(0o755)
    (tmp_path / "docker/nvidia-container-runtime-hook").write_text("#!/bin/sh\n")
    (tmp_path / "docker/nvidia-container-runtime-hook").chmod(0o755)
    (tmp_path / "docker/ids").touch()
    return Project(copy_project(tmp_path / "project"), tmp_path / "docker")


def lines(project: Project, **variables: str) -> dict[str, dict[str, str]]:
    done = project.invoke("doctor", "--json", **variables)
    assert not done.stderr and "error" not in json.loads(done.stdout).get("error", {}), done.stderr + done.stdout
    assert "checks" in done.stdout, done.stdout
    return {one["name"]: one for one in json.loads(done.stdout)["checks"]}


def test_an_engine_elsewhere_is_asked_and_this_machine_is_not(project: Project) -> None:
    found = lines(project)
    assert found["gpus"]["level"] == NOTE and "far:2375" in found["gpus"]["found"] and found["gpus"]["remedy"] == "invoke train.run -- nvidia-smi"
    assert found["nvidia"]["level"] == NOTE, "the toolkit of this machine says nothing of that one"
    assert found["disk"]["level"] == NOTE and "far:2375" in found["disk"]["found"]
    assert found["memory"]["found"].startswith("8.59GB")
    assert not [one for one in found.values() if "pw@" in str(one)]


def test_an_engine_of_this_machine_by_tcp_is_this_machine_s(project: Project) -> None:
    script = project.answers / "docker"
    script.write_text(script.read_text().replace('"Name": "far"', f'"Name": "{socket.gethostname()}"'))
    found = lines(project)
    assert found["gpus"]["level"] == OK and H200 in found["gpus"]["found"] and found["nvidia"]["level"] == OK


def test_a_setting_that_cannot_be_is_a_line(project: Project) -> None:
    assert lines(project, SERVE_PORT="x")["ports"]["level"] == MISSING


def test_a_folder_that_is_missing_there_is_told_with_what_helps(project: Project) -> None:
    (project.answers / "images").write_text('[{"Id": "sha256:1"}]')
    script = project.answers / "docker"
    said = 'Error response from daemon: invalid mount config for type "bind": bind source path does not exist: /x'
    script.write_text(script.read_text().replace("esac", f"    compose*) echo '{said}' >&2; exit 1 ;;\nesac"))
    done = project.invoke("train.run", "--gpus", "none", "--", "true")
    assert done.returncode == 1 and "tcp://***@far:2375 mounts folders of its own machine" in done.stderr, done.stderr
    assert f"rsync -a {project.root}/ HOST:{project.root}/" in done.stderr and "docker context use default" in done.stderr
