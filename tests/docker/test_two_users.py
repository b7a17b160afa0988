"""Two real users with a clone each on one engine, both in its group: each sees, joins, stops and removes their own."""
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.docker.workbench import SOCKET
from tests.fixtures.needs import missing
from tests.fixtures.project import copy_project

pytestmark = pytest.mark.docker
IMAGE = os.environ.get("EVAL_BASE_IMAGE", "python:3.12-slim")


# Python may lie in a folder that only root can enter: in a mount namespace of the command's own, an open one stands in its place.
OPENED = """
places=$1 closed=$2; shift 2; number=0
for place in $places; do number=$((number + 1)); mkdir -p "$KEPT/$number"; mount --bind "$place" "$KEPT/$number"; done
for folder in $closed; do mount -t tmpfs -o mode=755 none "$folder"; done
number=0
for place in $places; do number=$((number + 1)); mkdir -p "$place"; mount --bind "$KEPT/$number" "$place"; done
exec "$@"
"""


def closed_above(place: str) -> Path | None:
    """Return the topmost folder above `place` that only its owner can enter."""
    return next((folder for folder in reversed(Path(place).parents) if not folder.stat().st_mode & 0o001), None)


def as_user(uid: int, argv: tuple[str, ...], kept: Path) -> list[str]:
    """Return what runs `argv` as the user, who is in the engine's group and can run this Python."""
    dropped = ["setpriv", f"--reuid={uid}", f"--regid={uid}", f"--groups={SOCKET.stat().st_gid}", *argv]
    closed = {place: folder for place in (sys.base_prefix, sys.prefix) if (folder := closed_above(place))}
    if not closed:
        return dropped
    script = f"KEPT={kept}\n{OPENED}"
    return ["unshare", "--mount", "sh", "-euc", script, "sh", " ".join(closed), " ".join({str(folder) for folder in closed.values()}), *dropped]


@dataclass(frozen=True)
class Person:
    """A user of this machine with a clone in their home, which nobody else can read.

    Attributes:
        name, uid: of the user.
        root: the clone.
        shared: COMPOSE_PROJECT_NAME and IMAGE_TAG, which two people's .env files have in common.
        home: where it is not the folder that the clone is in; another's, with the .docker that their builds make, is closed.
    """
    name: str
    uid: int
    root: Path
    shared: Mapping[str, str]
    home: Path | None = None

    def environment(self, more: Mapping[str, str]) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "HOME": str(self.home or self.root.parent), "LANG": "C.UTF-8", **self.shared, **more}

    def run(self, *argv: str, stdin: str = "", cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(as_user(self.uid, argv, self.root.parents[1] / "kept"), cwd=cwd or self.root, env=self.environment(more), input=stdin,
                              capture_output=True, text=True, check=False, timeout=600)

    def invoke(self, *words: str, **options) -> subprocess.CompletedProcess[str]:  # type: ignore[no-untyped-def]
        return self.run(sys.executable, "-m", "invoke", *words, **options)

    def answers(self, said: str, *words: str) -> str:
        """Run `invoke` on a terminal on which somebody types `said`; return what it shows."""
        outer, inner = pty.openpty()
        os.fchown(inner, self.uid, -1)
        argv = as_user(self.uid, (sys.executable, "-m", "invoke", *words), self.root.parents[1] / "kept")
        process = subprocess.Popen(argv, cwd=self.root, env=self.environment({}), stdin=inner, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        os.write(outer, said.encode())
        try:
            told, _ = process.communicate(timeout=120)
        finally:
            process.kill()
        os.close(inner)
        os.close(outer)
        return told

    def start(self, service: str = "train", **more: str) -> str:
        """Start a container of `service` that stays up, as plain Compose does; return its id."""
        done = self.run("docker", "compose", "-f", "docker-compose.yml", "-f", "docker-compose.cpu.yml", "--profile", "*", "run", "--detach", "--no-deps",
                        service, "sleep", "600", HOST_UID=str(self.uid), HOST_GID=str(self.uid), MEMLOCK="65536", **more)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-1]


def docker(*words: str) -> str:
    return subprocess.run(["docker", *words], capture_output=True, text=True, check=False).stdout.strip()


def runs(container: str) -> bool:
    return docker("inspect", "--format", "{{.State.Running}}", container) == "true"


@pytest.fixture(scope="module")
def people(engine: None) -> Iterator[tuple[Person, Person]]:
    """Two users, who are gone afterwards with all that they have."""
    if os.geteuid() or not shutil.which("useradd"):
        missing("root", "only root makes users")
    tag = f"workbench-test-{uuid.uuid4().hex[:8]}"
    homes = Path(tempfile.mkdtemp(prefix=tag))
    homes.chmod(0o755)
    names, found = [f"wb{tag[-8:]}{letter}" for letter in "ab"], []
    docker("tag", IMAGE, f"agentgym-rl/train:{tag}")
    docker("tag", IMAGE, f"agentgym-rl/scripts:{tag}")
    try:
        for name in names:
            subprocess.run(["useradd", "--create-home", "--home-dir", homes / name, "--groups", str(SOCKET.stat().st_gid), name], check=True, capture_output=True)
            home = homes / name
            root = copy_project(home / "workbench")
            uid = home.stat().st_uid
            subprocess.run(["chown", "-R", f"{uid}:{uid}", home], check=True)
            home.chmod(0o700)
            for folder in ("models", "saves", "data", "AgentItemId", "AgentEval"):
                (root / folder).mkdir(exist_ok=True)
                os.chown(root / folder, uid, uid)
            found.append(Person(name, uid, root, {"COMPOSE_PROJECT_NAME": tag, "IMAGE_TAG": tag, "GPUS": "none"}))
        for person in found:
            ran = person.run(sys.executable, "-c", "import os, invoke; print(os.getuid())")
            assert ran.stdout == f"{person.uid}\n", ran.stderr
        yield found[0], found[1]
    finally:
        for person in found:
            for container in docker("ps", "-aq", "--filter", f"label=com.docker.compose.project.working_dir={person.root}").split():
                docker("rm", "--force", "--volumes", container)
        for network in docker("network", "ls", "-q", "--filter", f"label=com.docker.compose.project={tag}").split():
            docker("network", "rm", network)
        for image in docker("images", "--filter", f"reference=*/*:{tag}", "--format", "{{.Repository}}:{{.Tag}}").split():
            docker("rmi", image)
        for name in names:
            subprocess.run(["userdel", "--remove", name], check=False, capture_output=True)
        shutil.rmtree(homes, ignore_errors=True)


@pytest.fixture
def theirs(people: tuple[Person, Person]) -> Iterator[str]:
    """A container that runs for the first of the two."""
    docker("tag", IMAGE, f"agentgym-rl/train:{people[0].shared['IMAGE_TAG']}")
    container = people[0].start()
    yield container
    docker("rm", "--force", "--volumes", container)


def test_a_stranger_s_container_is_shown_with_folder_and_owner(people: tuple[Person, Person], theirs: str) -> None:
    one, two = people
    told = two.invoke("status")
    assert re.search(rf"^\S+ +running +{re.escape(str(one.root))} +{one.uid}$", told.stdout, re.M), told.stdout + told.stderr
    own_name = {"COMPOSE_PROJECT_NAME": f"{two.shared['COMPOSE_PROJECT_NAME']}-two"}
    facts = json.loads(two.invoke("status", "--json", **own_name).stdout)  # under another name of the project, too
    assert facts["containers"] == []
    assert [found["owner"] for found in facts["of_others"] if found["id"] == theirs] == [{"folder": str(one.root), "uid": str(one.uid)}]
    assert [found["id"] for found in json.loads(one.invoke("status", "--json").stdout)["containers"]] == [theirs]


def test_a_shell_is_one_s_own(people: tuple[Person, Person], theirs: str) -> None:
    one, two = people
    done = two.invoke("train.shell", stdin="hostname; id -u; touch /workspace/saves/mine\n", MEMLOCK="65536")
    assert done.returncode == 0 and f"which is of {one.root}, user id {one.uid}" in done.stderr, done.stderr
    host, uid = done.stdout.split()
    assert not theirs.startswith(host) and uid == str(two.uid)
    assert (two.root / "saves/mine").exists() == (not (one.root / "saves/mine").exists())


@pytest.mark.parametrize("words", [["down"], ["clean.containers", "--yes"], ["env.down"]], ids=" ".join)
def test_nothing_of_a_stranger_s_is_stopped_or_removed(people: tuple[Person, Person], theirs: str, words: list[str]) -> None:
    one, two = people
    mine = two.start("scripts")
    volumes, networks = docker("volume", "ls", "-q"), docker("network", "ls", "-q", "--filter", f"name={one.shared['COMPOSE_PROJECT_NAME']}")
    done = two.invoke(*words)
    assert done.returncode == 0, done.stderr
    assert runs(theirs) and runs(mine) == (words == ["env.down"])
    assert networks and networks == docker("network", "ls", "-q", "--filter", f"name={one.shared['COMPOSE_PROJECT_NAME']}")
    assert set(volumes.split()) <= set(docker("volume", "ls", "-q").split())
    if words[0] != "env.down":
        assert f"left {docker('inspect', '--format', '{{.Name}}', theirs)[1:]} alone, which is of {one.root}" in done.stderr
    docker("rm", "--force", mine)


def test_any_asks_about_each_and_asks_nobody_who_is_not_there(people: tuple[Person, Person], theirs: str) -> None:
    one, two = people
    question = rf"Stop and remove \S+, which is of {re.escape(str(one.root))}, user id {one.uid}\? \[y/N\]"
    for words in (["down", "--any"], ["clean.containers", "--any", "--yes"]):
        alone = two.invoke(*words)
        assert alone.returncode == 2 and "nobody is here to answer; --any asks about each" in alone.stderr and runs(theirs), alone.stderr
    others = len(json.loads(two.invoke("status", "--json").stdout)["of_others"])  # other tests have some too
    refused = two.answers("n\n" * (others + 9), "down", "--any")
    assert re.search(question, refused) and runs(theirs), refused
    names = [found["name"] for found in json.loads(two.invoke("status", "--json").stdout)["of_others"]]
    assert docker("inspect", "--format", "{{.Name}}", theirs)[1:] == names[0], "the project's own come first, and are all that a y meets"
    agreed = two.answers("y\n" + "n\n" * (others + 9), "down", "--any")
    assert re.search(question, agreed) and docker("ps", "-aq", "--no-trunc", "--filter", f"id={theirs}") == "", agreed


def test_a_shell_in_a_stranger_s_container_is_asked_for(people: tuple[Person, Person], theirs: str) -> None:
    one, two = people
    assert two.invoke("train.shell", "--any", stdin="hostname\n").returncode == 2
    joined = two.answers("y\nexec hostname\n", "train.shell", "--any")
    assert re.search(rf"Join \S+, which is of {re.escape(str(one.root))}, user id {one.uid}\?", joined) and theirs.startswith(joined.split()[-1]), joined
    assert runs(theirs)


def test_servers_started_at_once_have_ports_folders_and_volumes_of_their_own(people: tuple[Person, Person]) -> None:
    own = [{"COMPOSE_PROJECT_NAME": f"{person.shared['COMPOSE_PROJECT_NAME']}-{person.name[-1]}"} for person in people]
    built = people[0].invoke("build.env", "--env", "demo")
    assert built.returncode == 0, built.stderr[-3000:]
    with ThreadPoolExecutor() as pool:
        up = list(pool.map(lambda pair: pair[0].invoke("env.up", "--env", "demo", "--runner", "docker", **pair[1]), zip(people, own, strict=True)))
    try:
        assert [done.returncode for done in up] == [0, 0], up
        urls = [re.search(r"http://127\.0\.0\.1:\d+", done.stdout) for done in up]
        assert all(urls) and urls[0][0] != urls[1][0]  # type: ignore[index]
        one, two = people
        listed = [json.loads(person.invoke("env.list", "--json", **name).stdout)["environments"] for person, name in zip(people, own, strict=True)]
        demos = [found for rows in listed for row in rows if row["name"] == "demo" for found in row["running"]]
        assert [demo["url"] for demo in demos] == [url[0] for url in urls]  # type: ignore[index]
        image = docker("image", "inspect", "--format", "{{.Id}}", f"agentgym/env-demo:{one.shared['IMAGE_TAG']}")
        assert {demo["image"] for demo in demos} == {image}, "the row has the digest of what runs"
        state = one.root / ".run"
        assert state.stat().st_uid == one.uid and two.run("ls", str(state)).returncode != 0
        # Who built what the two share is told, and only they remove it.
        assert re.search(rf"^agentgym/env-demo:\S+ .* {re.escape(str(one.root))}, user id {one.uid}$", two.invoke("status").stdout, re.M)
        assert re.search(r"^agentgym/env-demo:\S+ .* this checkout$", one.invoke("status").stdout, re.M)
        assert two.invoke("env.down", **own[1]).stdout == "demo is down\n"
        left = two.invoke("clean.images", "--yes")
        assert f"left agentgym/env-demo:{one.shared['IMAGE_TAG']} alone, which is of {one.root}" in left.stderr, left.stderr
        assert docker("image", "inspect", "--format", "{{.Id}}", image) == image
        assert one.invoke("env.check", "--env", "demo", **own[0]).returncode == 0, "the other's is still up"
        assert "Stop and remove" in two.answers("n\n" * 50, "env.down", "--env", "demo", "--any")
        assert one.invoke("env.down", **own[0]).stdout == "demo is down\n"
    finally:
        for person, name in zip(people, own, strict=True):
            person.invoke("down", **name)


def test_a_run_whose_container_is_a_stranger_s_is_not_stopped(people: tuple[Person, Person], theirs: str) -> None:
    """Two clones whose saves/ is one folder on shared storage."""
    _, two = people
    container = docker("inspect", "--format", "{{.Name}}", theirs)[1:]
    script = ("from training.folder import RunFolder; import pathlib, time; f = pathlib.Path('saves/shared'); f.mkdir();"
              f"RunFolder(f).create({{'name': 'shared', 'created': time.time(), 'runner': 'docker', 'container': {container!r}, 'attempts': [], 'steps': 3,"
              "'environment': {'name': 'demo'}, 'algorithm': 'grpo', 'options': {}, 'folder': str(f)})")
    made = two.run(sys.executable, "-c", script, PYTHONPATH=str(two.root))
    assert made.returncode == 0, made.stderr
    done = two.invoke("train.stop", "--name", "shared")
    assert runs(theirs), done.stdout
    assert done.returncode == 2 and f"left {container} alone" in done.stderr and "--any asks" in done.stderr, done.stdout + done.stderr


@pytest.fixture
def guest(people: tuple[Person, Person]) -> Iterator[Person]:
    """The second of the two, in the first one's folder, in which everybody may read and write but for what the tasks note."""
    one, two = people
    docker("tag", IMAGE, f"agentgym-rl/scripts:{two.shared['IMAGE_TAG']}")  # clean.images of another test took it
    one.root.parent.chmod(0o755)
    subprocess.run(["chmod", "-R", "a+rwX", one.root], check=True)
    (one.root / ".run").mkdir(mode=0o700, exist_ok=True)
    for place in ((one.root / ".run"), *(one.root / ".run").rglob("*")):
        place.chmod(0o700)
        os.chown(place, one.uid, one.uid)
    yield Person(two.name, two.uid, one.root, two.shared, two.root.parent)
    one.root.parent.chmod(0o700)


def test_two_in_one_folder_have_each_their_own_containers(people: tuple[Person, Person], guest: Person, theirs: str) -> None:
    told = json.loads(guest.invoke("status", "--json").stdout)
    assert "containers" in told, told
    assert told["containers"] == [] and theirs in [found["id"] for found in told["of_others"]]
    mine = guest.start("scripts")
    assert [found["id"] for found in json.loads(guest.invoke("status", "--json").stdout)["containers"]] == [mine]
    assert guest.invoke("down").returncode == 0 and runs(theirs) and not runs(mine)
    plain = {"COMPOSE_PROJECT_NAME": ""}
    said = [person.invoke("--dry", "down", **plain).stdout for person in (people[0], guest)]
    names = [re.search(r"COMPOSE_PROJECT_NAME=(agentgym-rl-\w{6}) ", one) for one in said]
    assert all(names) and names[0][1] != names[1][1], "the user is part of the project's name"  # type: ignore[index]


@pytest.mark.parametrize("words", [["env.up", "--env", "demo", "--runner", "local"], ["env.up", "--env", "demo", "--runner", "docker"], ["env.restart", "--env", "demo"],
                                   ["eval", "--env", "demo", "--model", "expert", "--runner", "local"], ["env.logs", "--env", "demo"]], ids=" ".join)
def test_what_another_noted_in_this_folder_stays_theirs(guest: Person, words: list[str]) -> None:
    done = guest.invoke(*words)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert f"{guest.root}/.run is of user id {guest.root.stat().st_uid}, who works in this folder" in done.stderr and f"git clone {guest.root} DIR" in done.stderr


@pytest.mark.parametrize("words", [["env.list"], ["env.down"], ["doctor"], ["train.list"], ["eval.list"]], ids=" ".join)
def test_what_only_looks_works_in_another_s_folder(guest: Person, words: list[str]) -> None:
    done = guest.invoke(*words)
    assert done.returncode in ((0, 1) if words == ["doctor"] else (0, )) and "Traceback" not in done.stderr, done.stderr
