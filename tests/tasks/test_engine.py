"""The Docker wing's decisions: values in, values out, no engine."""
import os
import re
import socket
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest

from tasks.lib.doctor import checks
from tasks.lib.engine import client, ownership
from tasks.lib.engine.builds import build_variables
from tasks.lib.engine.compose_files import caller_variables, compose_files
from tasks.lib.engine.dry_run import command_line
from tasks.lib.engine.gpus import NO_RUNTIME, GpuChoice, choose_gpus, refusal
from tasks.lib.engine.mounts import Translation, ensure_folders
from tasks.lib.engine.remedies import docker_said, remedy
from tasks.lib.engine.sources import GYM, RL, check_source, choose_sources, find_checkouts, origin, revision
from tasks.lib.environments.compose_model import compose_model
from tasks.lib.environments.lookup import key_names
from tasks.lib.environments.plan import Options
from tasks.lib.environments.rows import environment, environments
from tasks.lib.errors import NoEngine, UserError
from tasks.lib.host.leftovers import bytecode_folders
from tasks.lib.host.programs import choose_program_runner
from tasks.lib.redaction import redact, secret_values
from tasks.lib.settings import ROOT, SETTINGS
from tasks.lib.tables import human_age, human_size
from tests.fixtures import needs


def test_an_engine_elsewhere_that_says_nothing_is_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the connection, as a stopped one or a wrong program does."""
    needs.docker()
    monkeypatch.setattr(client, "ELSEWHERE_WAIT", 0.5)
    client._hear_from_elsewhere.cache_clear()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("DOCKER_HOST", host)
        with pytest.raises(NoEngine, match=f"no Docker engine answers at DOCKER_HOST={host}; "):
            client.engine_version()


@pytest.mark.parametrize("flag, setting, nvidia, expected", [
    ("", "all", True, GpuChoice(cpu=False, variables={})),
    ("", "0,1", True, GpuChoice(cpu=False, variables={})),
    ("0,1", "all", True, GpuChoice(cpu=False, variables={"GPUS": "0,1"})),
    ("all", "none", True, GpuChoice(cpu=False, variables={"GPUS": "all"})),
    ("GPU-8f2c-1", "all", True, GpuChoice(cpu=False, variables={"GPUS": "GPU-8f2c-1"})),
    ("none", "all", True, GpuChoice(cpu=True, variables={})),
    ("", "none", True, GpuChoice(cpu=True, variables={})),
    ("none", "all", False, GpuChoice(cpu=True, variables={})),
    ("", "all", False, GpuChoice(cpu=True, variables={}, notice=NO_RUNTIME)),
    ("", "2", False, GpuChoice(cpu=True, variables={}, notice=NO_RUNTIME)),
],
                         ids=[
                             "nothing asked, GPUs there: all of them", "a setting that Compose reads by itself",
                             "a flag goes to Compose", "a flag beats the setting", "a GPU's own id",
                             "none although there are GPUs", "none by setting",
                             "none where there are none: nothing to say",
                             "nothing asked, no GPUs: the override, said aloud",
                             "a setting on a host without GPUs: the override, said aloud"
                         ])
def test_gpus(flag: str, setting: str, nvidia: bool, expected: GpuChoice) -> None:
    assert choose_gpus(flag, setting, nvidia) == expected


@pytest.mark.parametrize("flag, setting, nvidia, said", [
    ("two", "all", True, "'two' is no choice"),
    ("0,,1", "all", True, "'0,,1' is no choice"),
    ("-1", "all", True, "'-1' is no choice"),
    ("", "some", True, "'some' is no choice"),
    ("all", "all", False, "--gpus all: the engine has no NVIDIA runtime"),
    ("0,1,0", "all", True, "--gpus 0,1,0 names 0 twice"),
    ("", "3,3", True, "GPUS=3,3 names 3 twice"),
],
                         ids=[
                             "a word", "a gap", "a negative index", "a wrong setting", "a flag that cannot be met",
                             "one twice", "one twice in the setting"
                         ])
def test_gpus_that_cannot_be(flag: str, setting: str, nvidia: bool, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        choose_gpus(flag, setting, nvidia)


@pytest.mark.parametrize("setting, nvidia, said", [("all", True, None), ("0,1", True, None),
                                                   ("all", False, "no NVIDIA runtime"), ("none", True, "GPUS=none")])
def test_an_environment_that_needs_a_gpu_gets_one_or_is_refused(setting: str, nvidia: bool, said: str | None) -> None:
    found = refusal("searchqa", setting, nvidia)
    assert found is None if said is None else said in (found or "")


@pytest.mark.parametrize("name, replicas, reserved", [("searchqa", 1, True), ("searchqa", 2, True), ("demo", 1, False)])
def test_every_server_that_needs_a_gpu_reserves_what_the_setting_says(name: str, replicas: int, reserved: bool) -> None:
    options = Options(port=1, replicas=replicas)
    services = compose_model(environment(name), options, f"env-{name}:t", "env-proxy:t", Path("/home"),
                             Path("/nowhere"), {})["services"]
    servers = [one for one in services.values() if one["labels"]["org.agentgym-rl.env.role"] == "server"]
    assert len(servers) == replicas and all(("deploy" in one) == reserved for one in servers)
    if reserved:
        device = servers[0]["deploy"]["resources"]["reservations"]["devices"][0]
        assert device == {"driver": "nvidia", "device_ids": ["${GPUS:-all}"], "capabilities": ["gpu"]}


@pytest.mark.parametrize("host, inside, volumes", [
    ("saves/x/actor", "/workspace/saves/x/actor", []),
    ("saves", "/workspace/saves", []),
    ("models/../saves/x", "/workspace/saves/x", []),
    ("saves-old", "/host{root}/saves-old", ["{root}/saves-old"]),
    ("linked", "/host{top}/disk/run", ["{top}/disk/run"]),
    ("saves/link-out", "/host{top}/disk/run", ["{top}/disk/run"]),
    ("data/x", "/workspace/data/x", []),
    ("{top}/disk/data/x", "/workspace/data/x", []),
    ("absent", "/host{root}/absent", []),
],
                         ids=[
                             "inside a mount", "a mount itself", "dots", "a name that begins like a mount",
                             "a link to elsewhere", "a link out of a mount", "inside a mount that is a link",
                             "the other name of a linked mount", "an absent folder is not mounted"
                         ])
def test_translation(tmp_path: Path, host: str, inside: str, volumes: list[str]) -> None:
    top = tmp_path.resolve()
    root = top / "project"
    for folder in ("project/saves/x/actor", "project/models", "project/saves-old", "disk/run", "disk/data/x"):
        (top / folder).mkdir(parents=True)
    (root / "linked").symlink_to(top / "disk/run")
    (root / "saves/link-out").symlink_to(top / "disk/run")
    (root / "data").symlink_to(top / "disk/data")
    translation = Translation(root)
    assert translation.path(root / host.format(top=top)) == inside.format(root=root, top=top)
    assert list(translation.volumes) == [one.format(root=root, top=top) for one in volumes]
    assert all(value == f"/host{key}" for key, value in translation.volumes.items())


def test_output_mounts_the_parent_because_a_mount_point_cannot_be_replaced(tmp_path: Path) -> None:
    top = tmp_path.resolve()
    translation = Translation(top / "project")
    assert translation.output(top / "merged") == f"/host{top}/merged"
    assert translation.volumes == {str(top): f"/host{top}"}
    assert translation.output(top / "project/saves/x/merged") == "/workspace/saves/x/merged"


def test_a_colon_cannot_be_mounted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="colon"):
        Translation(tmp_path / "project").path(tmp_path / "a:b")


def test_folders_are_created_once(tmp_path: Path) -> None:
    assert len(ensure_folders(tmp_path, {})) == 5
    assert ensure_folders(tmp_path, {}) == []


LAYOUTS = {
    "nothing around": ([], "work/bench", {}),
    "beside both": (["work/AgentGym-RL/AgentGym-RL/verl", "work/AgentGym/agentenv/agentenv"], "work/bench", {
        RL: "work/AgentGym-RL",
        GYM: "work/AgentGym"
    }),
    "inside the checkout, submodule there": (["rl/AgentGym-RL/verl", "rl/AgentGym/agentenv/agentenv"], "rl/bench", {
        RL: "rl",
        GYM: "rl/AgentGym"
    }),
    "inside the checkout, submodule empty": (["rl/AgentGym-RL/verl", "rl/AgentGym"], "rl/bench", {
        RL: "rl"
    }),
    "laid over the checkout": (["rl/AgentGym-RL/verl", "rl/AgentGym/agentenv/agentenv"], "rl", {
        RL: "rl",
        GYM: "rl/AgentGym"
    }),
    "checkouts inside the project": (["b/AgentGym-RL/AgentGym-RL/verl", "b/AgentGym/agentenv/agentenv"], "b", {
        RL: "b/AgentGym-RL",
        GYM: "b/AgentGym"
    }),
    "the submodule before a clone beside":
    (["w/AgentGym-RL/AgentGym-RL/verl", "w/AgentGym-RL/AgentGym/agentenv/agentenv",
      "w/AgentGym/agentenv/agentenv"], "w/bench", {
          RL: "w/AgentGym-RL",
          GYM: "w/AgentGym-RL/AgentGym"
      }),
    "inside AgentGym alone": (["gym/agentenv/agentenv"], "gym/bench", {
        GYM: "gym"
    }),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_checkouts_are_found(tmp_path: Path, layout: tuple[list[str], str, dict[str, str]]) -> None:
    folders, root, expected = layout
    for folder in [*folders, root]:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    assert find_checkouts(tmp_path / root) == {name: tmp_path / place for name, place in expected.items()}


@pytest.mark.parametrize(
    "source, expected", [
        ("rl", "{top}/rl"),
        ("rl/AgentGym-RL", "{top}/rl"),
        ("{top}/rl/", "{top}/rl"),
        ("https://example.org/x.git#abc", "https://example.org/x.git#abc"),
        ("git@example.org:x.git#abc:sub", "git@example.org:x.git#abc:sub"),
    ],
    ids=["a relative folder", "the folder inside", "an absolute folder", "a pinned URL", "a pinned ssh address"])
def test_a_source_is_taken(tmp_path: Path, source: str, expected: str) -> None:
    (tmp_path / "rl/AgentGym-RL/verl").mkdir(parents=True)
    top = tmp_path.resolve()
    assert check_source(RL, source.format(top=top), tmp_path) == expected.format(top=top)


@pytest.mark.parametrize("source, said", [("empty", "has no AgentGym-RL/verl"), ("absent", "has no AgentGym-RL/verl"),
                                          ("https://example.org/x.git", "is not pinned")],
                         ids=["a folder without verl", "no folder", "a URL without a commit"])
def test_a_source_is_refused(tmp_path: Path, source: str, said: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=said):
        check_source(RL, source, tmp_path)


def test_a_setting_beats_the_checkout_found(tmp_path: Path) -> None:
    (tmp_path / "AgentGym-RL/AgentGym-RL/verl").mkdir(parents=True)
    (tmp_path / "bench").mkdir()
    url = "https://example.org/x.git#abc"
    assert choose_sources(tmp_path / "bench", {RL: url}) == {RL: url}
    assert choose_sources(tmp_path / "bench", {RL: ""}) == {RL: str(tmp_path / "AgentGym-RL")}


def test_revision_of_a_url_a_plain_folder_and_this_repository(tmp_path: Path) -> None:
    assert revision("https://example.org/x.git#abc:sub") == "abc"
    assert revision(str(tmp_path)) == "unknown"
    # Unpacked without a repository of its own into another one, which does not track it.
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "a").touch()
    git = ["git", "-C", tmp_path, "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["add", "a"], ["commit", "-qm", "a"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "unpacked").mkdir()
    (tmp_path / "unpacked/b").touch()
    assert revision(str(tmp_path / "unpacked")) == "unknown" != revision(str(tmp_path))
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", revision(str(ROOT)))


@pytest.mark.parametrize("remote, expected", [("https://me:token@example.org/x.git", "https://example.org/x.git"),
                                              ("git@example.org:x.git", "git@example.org:x.git"),
                                              ("/srv/x.git", "unknown")],
                         ids=["a login is dropped", "ssh", "a folder is nobody's business"])
def test_origin_is_public(tmp_path: Path, remote: str, expected: str) -> None:
    import subprocess
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    subprocess.run(["git", "-C", str(tmp_path), "remote", "add", "origin", remote], check=True)
    assert origin(tmp_path) == expected


@pytest.mark.parametrize("said, word", [
    ("Cannot connect to the Docker daemon at unix:///var/run/docker.sock.", "start it"),
    ("permission denied while trying to connect to the Docker daemon socket", "group docker"),
    ("Bind for 127.0.0.1:36001 failed: port is already allocated", "ENV_PORT"),
    ("listen tcp4 127.0.0.1:36001: bind: address already in use", "ENV_PORT"),
    ('could not select device driver "nvidia" with capabilities: [[gpu]]', "--gpus none"),
    ("invalid mount config for type \"bind\": bind source path does not exist: /x/saves", "create"),
    ("write /x: no space left on device", "clean.cache"),
    ("error setting rlimit type 8: operation not permitted", "MEMLOCK"),
    ("pull access denied for agentgym/eval, repository does not exist", "build.all"),
],
                         ids=lambda value: value[:40])
def test_docker_s_message_has_a_remedy(said: str, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    advice = remedy(said)
    assert advice and word in advice


@pytest.mark.parametrize("argv, said, advised", [
    ("compose run train x", "OSError: [Errno 98] Address already in use", False),
    ("compose run train x", "No such image\nsee the log", False),
    ("compose run train x",
     " Network x  Creating\nError response from daemon: driver failed: port is already allocated", True),
    ("compose run train x", "Cannot connect to the Docker daemon at unix:///x. Is it running?", True),
    ("compose up env-server", "listen tcp4 127.0.0.1:36001: bind: address already in use", True),
    ("compose build train", "#7 0.3 write /x: no space left on device\nfailed to solve", True),
],
                         ids=[
                             "a program in the container", "a program's words are not Docker's",
                             "Docker, before it starts", "no engine", "no program is run",
                             "a build's own output is Docker's"
                         ])
def test_a_remedy_is_for_docker_s_words_not_for_the_command_s(argv: str, said: str, advised: bool) -> None:
    assert (remedy(docker_said(["docker", *argv.split()], said)) is not None) == advised


def test_an_unknown_message_has_none() -> None:
    assert remedy("exit status 3") is None


@pytest.mark.parametrize("text, expected", [
    ("--key abc123 x", "--key *** x"),
    ("https://me:pw@example.org/simple", "https://***@example.org/simple"),
    ("https://token@example.org", "https://***@example.org"),
    ("https://me:p@ss:w@example.org/x", "https://***@example.org/x"),
    ("mail me@example.org", "mail me@example.org"),
    ("https://example.org/a@b", "https://example.org/a@b"),
],
                         ids=[
                             "a value", "a login in a URL", "a token in a URL", "a login with an @ in it",
                             "an address stays", "an @ in a path stays"
                         ])
def test_redact(text: str, expected: str) -> None:
    assert redact(text, ["abc123"]) == expected


def test_secrets_come_from_both_places_longest_first() -> None:
    assert secret_values({
        "HF_TOKEN": "long-one",
        "MODEL": "shown"
    }, {
        "HF_TOKEN": "other",
        "WANDB_API_KEY": "k"
    }) == ["long-one", "other", "k"]


def test_compose_files(tmp_path: Path) -> None:
    names = [path.name for path in compose_files(tmp_path, cpu=True)]
    assert names == ["docker-compose.yml", "docker-compose.cpu.yml"]
    (tmp_path / "docker-compose.override.yml").touch()
    assert [path.name
            for path in compose_files(tmp_path, cpu=False)] == ["docker-compose.yml", "docker-compose.override.yml"]


def test_ids_are_the_caller_s_unless_chosen() -> None:
    assert set(caller_variables({}, {})) == {"HOST_UID", "HOST_GID", "COMPOSE_PROJECT_NAME"}
    assert set(caller_variables({"HOST_UID": "7", "COMPOSE_PROJECT_NAME": "mine"}, {"HOST_GID": "8"})) == set()
    assert set(caller_variables({}, {"COMPOSE_PROJECT_NAME": "mine"})) == {"HOST_UID", "HOST_GID"}


def test_command_line_can_be_pasted() -> None:
    assert command_line(["docker", "run", "a b"], {"TAG": "x y"}) == "TAG='x y' docker run 'a b'"


def test_a_secret_with_a_quote_in_it_is_hidden() -> None:
    hidden = command_line(["docker", "run", "it's", "x=it's"], {"KEY": "it's", "URL": "https://me:a'b@x"}, ["it's"])
    assert hidden == "KEY=*** URL='https://***@x' docker run *** 'x=***'"


@pytest.mark.parametrize("runner, importable, expected", [("auto", True, "local"), ("auto", False, "docker"),
                                                          ("local", False, "local"), ("docker", True, "docker")])
def test_runner(runner: str, importable: bool, expected: str) -> None:
    assert choose_program_runner(runner, importable) == expected


def test_the_doctor_looks_for_every_file_that_builds_and_runs() -> None:
    names = ("docker-compose*.yml", "Dockerfile.*", "docker/*.Dockerfile")
    ours = {str(path.relative_to(ROOT)) for name in names for path in ROOT.glob(name)}
    assert ours - {"docker-compose.override.yml"} <= set(checks.FILES) and checks.check_files(ROOT).level == checks.OK


def test_env_example_and_the_table_agree() -> None:
    text = (ROOT / ".env.example").read_text()
    lines = dict(re.findall(r"^#(\w+)=(.*)$", text, re.M))
    assert lines == {name: setting.default for name, setting in SETTINGS.items()}
    for name, setting in SETTINGS.items():
        assert f"# {setting.meaning}{' Secret.' if setting.secret else ''}\n#{name}=" in text
    assert not re.search(r"^[^#\n]", text, re.M), "copying the file must change nothing"


def test_compose_and_the_table_agree() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    # Set by the tasks for one build; no setting of a user.
    internal = {"REVISION", "SOURCE_URL", "AGENTGYM_RL_REVISION", "AGENTGYM_REVISION", "CHECKOUT"}
    defaults = [(name, default) for name, default in re.findall(r"\$\{(\w+):?-([^}]*)\}", text) if name not in internal]
    for name, default in defaults:
        # The formatter mounts a folder, which a URL is not; a label says who started a container, where that is told.
        assert default == SETTINGS[name].default or (name, default) in ((RL, "./AgentGym-RL"), ("HOST_UID", ""))
    by_name = set(re.findall(r"^ +(\w+):$", text, re.M)) & set(SETTINGS)
    by_environment = set(re.findall(r"environment: (\w+)$", text, re.M))
    # GPUS=none and the upload of a local merge are decided by the tasks, as is a merge's device (MERGE_DEVICE);
    # COMPOSE_PROJECT_NAME is Compose's own, and TRAIN_PYTHON is for trainings without Compose.
    others = {"COMPOSE_PROJECT_NAME", "MERGE_DEVICE", "TRAIN_PYTHON"}
    assert {name for name, _ in defaults} | by_name | by_environment | others == set(SETTINGS)


def test_plain_compose_passes_every_key_of_an_environment() -> None:
    text = (ROOT / "docker-compose.yml").read_text().partition("  env-server:")[2].partition("\n    labels:")[0]
    passed = set(re.findall(r"^      (\w+):$", text, re.M))
    assert {key.name for row in environments().values() for key in row.keys} <= passed
    assert {key.name for row in environments().values() for key in row.keys} <= key_names()


@pytest.mark.parametrize("check, level", [
    (checks.check_engine("26.1.5+dfsg1"), checks.OK),
    (checks.check_engine("24.0.0"), checks.OK),
    (checks.check_engine("20.10.24"), checks.MISSING),
    (checks.check_engine_for_environments("25.0.3"), checks.OK),
    (checks.check_engine_for_environments("24.0.7"), checks.NOTE),
    (checks.check_compose("Docker Compose version v2.39.0"), checks.OK),
    (checks.check_compose("Docker Compose version 2.26.1-4"), checks.OK),
    (checks.check_compose("docker-compose version 1.29.2"), checks.MISSING),
    (checks.check_disk(32_000_000_000, "/x"), checks.OK),
    (checks.check_disk(31_999_999_999, "/x"), checks.MISSING),
    (checks.check_nvidia(True), checks.OK),
    (checks.check_nvidia(False), checks.NOTE),
    (checks.check_dotenv(False, {}), checks.OK),
    (checks.check_dotenv(True, {"ENV_PORT": "1"}), checks.OK),
    (checks.check_dotenv(True, {"ENV_PROT": "1"}), checks.NOTE),
    (checks.check_dotenv(True, {
        "REDDIT": "1",
        "I_UNDERSTAND": "todo"
    }, {"REDDIT"}), checks.OK),
    (checks.check_files(ROOT), checks.OK),
    (checks.check_files(Path("/nowhere")), checks.MISSING),
    (checks.check_sources(ROOT, {RL: "/nowhere"})[0], checks.MISSING),
    (checks.check_sources(ROOT, {RL: "https://example.org/x#1"})[0], checks.OK),
],
                         ids=lambda value: f"{value.name} {value.found}" if isinstance(value, checks.Check) else value)
def test_doctor_judges(check: checks.Check, level: str) -> None:
    assert check.level == level
    assert bool(check.remedy) == (level != checks.OK)


def test_caches_are_found_outside_what_is_kept(tmp_path: Path) -> None:
    for folder in ("tasks/__pycache__", "tasks/deep/__pycache__", ".mypy_cache/x/__pycache__", "saves/__pycache__",
                   "AgentGym-RL/__pycache__", ".venv/__pycache__"):
        (tmp_path / folder).mkdir(parents=True)
    assert [str(path.relative_to(tmp_path))
            for path in bytecode_folders(tmp_path)] == [".mypy_cache", "tasks/__pycache__", "tasks/deep/__pycache__"]


@pytest.mark.parametrize("size, expected", [(0, "0B"), (999, "999B"), (7_690_000_000, "7.69GB"), (378_000_000, "378MB"),
                                            (999_900, "1MB")])
def test_human_size(size: int, expected: str) -> None:
    assert human_size(size) == expected


@pytest.mark.parametrize("seconds, expected", [(5, "seconds"), (60, "1 minute"), (7200, "2 hours"), (90000, "1 day")])
def test_human_age(seconds: int, expected: str) -> None:
    assert human_age(timedelta(seconds=seconds)) == expected


def test_an_image_names_its_checkout_unless_it_is_pushed() -> None:
    assert ownership.builder_of({ownership.CHECKOUT: build_variables("")["CHECKOUT"]}) == ownership.Owner(os.path.realpath(ROOT), ownership.caller())
    assert build_variables("", push=True)["CHECKOUT"] == ""
    assert ownership.builder_of({}) == ownership.Owner("", "")
