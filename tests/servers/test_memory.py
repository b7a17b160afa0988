"""How much memory a server takes."""
import subprocess
import sys

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
