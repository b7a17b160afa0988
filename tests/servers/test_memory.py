"""How much memory a server takes."""
import subprocess
import sys

import pytest

from servers import memory
from tests.fixtures.servers import ROOT


def test_memory_is_the_servers_own_and_its_childrens_or_the_containers():
    ours = {30: memory.Process(1, 30, 5), 31: memory.Process(30, 30, 5), 32: memory.Process(31, 32, 5)}
    strangers = {1: memory.Process(0, 1, 5), 40: memory.Process(1, 40, 5)}
    assert memory.own({**ours, **strangers}, 30) == {30, 31, 32}
    # In a container: docker-init leads the session; the health check comes from outside of it.
    inside = {1: memory.Process(0, 1, 5), 7: memory.Process(1, 1, 5), 9: memory.Process(0, 0, 5)}
    assert memory.own(inside, 7) == {1, 7, 9}


def test_memory_on_a_shared_machine_is_not_the_machines():
    code = "from servers import memory; print(memory.memory_mb())"
    shown = subprocess.run([sys.executable, "-c", code],
                           cwd=ROOT,
                           capture_output=True,
                           text=True,
                           start_new_session=True).stdout
    assert 1 < float(shown) < 60  # pytest alone, its neighbour, is larger


@pytest.mark.parametrize("files,charged,allowed", [
    ({
        "memory.current": "5000000\n",
        "memory.stat": "anon 1\ninactive_file 2000000\n",
        "memory.max": "8000000\n"
    }, 3_000_000, 8.0),
    ({
        "memory.current": "5000000\n",
        "memory.stat": "anon 1\n",
        "memory.max": "max\n"
    }, 5_000_000, None),
    ({
        "memory/memory.usage_in_bytes": "7000000",
        "memory/memory.stat": "total_inactive_file 1000000\n",
        "memory/memory.limit_in_bytes": "9223372036854771712"
    }, 6_000_000, None),
    ({
        "memory/memory.usage_in_bytes": "7000000",
        "memory/memory.stat": "cache 1\n",
        "memory/memory.limit_in_bytes": "9000000"
    }, 7_000_000, 9.0),
    ({
        "memory.current": "nonsense",
        "memory.stat": ""
    }, None, None),
    ({}, None, None),
])
def test_a_containers_memory_is_what_it_is_charged(files, charged, allowed, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory.charged(str(tmp_path)) == charged and memory.allowed_mb(str(tmp_path)) == allowed


def test_memory_that_children_share_is_counted_once():
    code = ("import mmap, os, time\nfrom servers import memory\nheld = mmap.mmap(-1, 60_000_000)\n"
            "held.write(b'x' * 60_000_000)\nalone = memory.memory_mb()\n"
            "for _ in range(4):\n    if not os.fork():\n        held[:: 4096]\n        time.sleep(5)\n        os._exit(0)\n"
            "time.sleep(1)\nprint(alone, memory.memory_mb())\nos.killpg(0, 9)")
    shown = subprocess.run([sys.executable, "-u", "-c", code],
                           cwd=ROOT,
                           capture_output=True,
                           text=True,
                           start_new_session=True).stdout
    alone, with_children = map(float, shown.split())
    assert 60 < alone < 120 and with_children < alone + 60  # not five times the 60 MB
