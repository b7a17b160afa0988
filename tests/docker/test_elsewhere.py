"""A second engine, with a root, a bridge and a host name of its own, that does not see the checkout: one that is elsewhere."""
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.docker.workbench import Workbench
from tests.fixtures.needs import missing

pytestmark = [pytest.mark.docker, pytest.mark.slow]
IMAGE = os.environ.get("EVAL_BASE_IMAGE", "python:3.12-slim")
# Over the checkout's folder lies an empty one that only the engine sees.
START = """
hostname far
mount -t tmpfs none "$1"
shift
exec dockerd "$@"
"""


@dataclass(frozen=True)
class Far:
    """The second engine: its address, and a checkout that is not there."""
    address: str
    bench: Workbench


@pytest.fixture(scope="module")
def far(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Far]:
    if os.geteuid() or not shutil.which("dockerd"):
        missing("root", "only root starts an engine, and dockerd must be here")
    bench = Workbench.create(tmp_path_factory.mktemp("elsewhere"))
    folder, bridge = Path(tempfile.mkdtemp(prefix="workbench-test-far-")), f"wb{uuid.uuid4().hex[:8]}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    subprocess.run(["ip", "link", "add", bridge, "type", "bridge"], check=True)
    subprocess.run(["ip", "address", "add", "172.31.251.1/24", "dev", bridge], check=True)
    log = (folder / "log").open("w")
    daemon = subprocess.Popen([
        "unshare", "--mount", "--uts", "sh", "-euc", START, "sh", str(bench.root.parent), "--host", address, "--tls=false", "--data-root", str(folder / "root"),
        "--exec-root", str(folder / "run"), "--pidfile", str(folder / "pid"), "--bridge", bridge, "--iptables=false", "--ip6tables=false"
    ], stdout=log, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 120
        while subprocess.run(["docker", "--host", address, "version"], capture_output=True, check=False).returncode:
            assert daemon.poll() is None and time.monotonic() < end, (folder / "log").read_text()[-3000:]
            time.sleep(0.5)
        saved = subprocess.Popen(["docker", "save", IMAGE], stdout=subprocess.PIPE)
        subprocess.run(["docker", "--host", address, "load"], stdin=saved.stdout, check=True, capture_output=True)
        assert saved.wait() == 0
        subprocess.run(["docker", "--host", address, "tag", IMAGE, bench.image("agentgym-rl/train")], check=True)
        yield Far(address, bench)
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(60)
        log.close()
        subprocess.run(["ip", "link", "delete", bridge], check=False)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_mount_that_is_missing_there_is_said_with_what_helps(far: Far) -> None:
    done = far.bench.invoke("train.run", "--gpus", "none", "--", "true", env={"DOCKER_HOST": far.address})
    assert done.returncode and f"the engine at {far.address} mounts folders of its own machine" in done.stderr, done.stderr
    assert f"rsync -a {far.bench.root}/" in done.stderr and "unset DOCKER_HOST" in done.stderr and "Traceback" not in done.stderr


def test_the_doctor_asks_that_engine(far: Far, tmp_path: Path) -> None:
    told = far.bench.invoke("doctor", env={"DOCKER_HOST": far.address}).stdout
    assert f"the engine is on {far.address}, whose GPUs are not asked from here" in told, told
    assert f"the engine's is on {far.address}, in " in told
    config = {"DOCKER_CONFIG": str(tmp_path)}
    plugins = [folder for folder in (Path("/usr/libexec/docker/cli-plugins"), Path("/usr/lib/docker/cli-plugins")) if folder.is_dir()]
    assert plugins
    made = far.bench.run("docker", "context", "create", "far", "--docker", f"host={far.address}", env=config)
    assert made.returncode == 0 and far.bench.run("docker", "context", "use", "far", env=config).returncode == 0
    assert f"the engine is on {far.address}" in far.bench.invoke("doctor", env=config).stdout, "a context says it too"


def test_containers_there_are_the_ones_that_are_seen(far: Far) -> None:
    there = far.bench.invoke("status", env={"DOCKER_HOST": far.address})
    assert there.returncode == 0 and "agentgym-rl/train" in there.stdout and "none" in there.stdout, there.stderr
    assert far.bench.invoke("down", env={"DOCKER_HOST": far.address}).returncode == 0
