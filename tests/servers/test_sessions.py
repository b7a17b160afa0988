"""Sessions: ids that are never another's, idle sessions that end, pools, limits and stuck servers."""
import json
import os
import socket
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from servers import protocol
from servers.protocol import ServerError
from tests.fixtures.servers import ROOT, rows, running


def get(client, path):
    with urllib.request.urlopen(client.base + path, timeout=10) as response:
        return json.loads(response.read())


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come true")


@pytest.mark.parametrize("name", sorted(name for name in rows() if name.startswith("form-")))
def test_ids_tell_their_replica_and_reach_only_it(name, tmp_path):
    row = rows()[name]
    with running(row, tmp_path, True, "--replica", "2", "--replicas", "3") as client:
        sessions = [client.create() for _ in range(4)]
        assert len(set(sessions)) == 4 and {session % 3 for session in sessions} == {2}
        for number, session in enumerate(sessions):
            client.reset(session, number)
        for number, session in enumerate(sessions):
            assert client.step(session, "add").observation == f"count {number + 1}"
        for stranger in (sessions[0] + 1, sessions[0] + 3000, 0, 1):
            with pytest.raises(ServerError, match="no session") as caught:
                client.step(stranger, "add")
            assert caught.value.status == 404


def test_a_restarted_server_refuses_the_sessions_of_its_last_run(tmp_path):
    row = rows()["form-textcraft"]
    with running(row, tmp_path) as client:
        old, started = client.create(), client.sessions()["started"]
        assert client.sessions()["started"] == started <= time.time()
    with running(row, tmp_path) as client:
        new = client.create()
        assert new != old and client.sessions()["started"] > started
        with pytest.raises(ServerError, match="no session"):
            client.step(old, "add")


def test_an_idle_session_is_closed_and_a_used_one_is_not(tmp_path):
    row = rows()["form-textcraft"]
    with running(row, tmp_path, True, "--session-ttl", "3") as client:
        idle, used = client.create(), client.create()
        client.reset(used, 0)
        for _ in range(24):
            client.step(used, "add")
            time.sleep(0.2)
        assert client.step(used, "add").observation == "count 25"
        with pytest.raises(ServerError, match="no session"):
            client.reset(idle, 0)
        assert get(client, "/opened") == 1  # closed inside the server too, not only forgotten


@pytest.mark.parametrize("closed_by", ["the client", "time"])
def test_a_session_of_a_server_without_close_is_used_again_but_never_seen_again(closed_by, tmp_path):
    row = rows()["form-sqlgym"]
    with running(row, tmp_path, True, "--session-ttl", "3") as client:
        first = client.create()
        client.reset(first, 7)
        if closed_by == "time":
            wait_for(lambda: get(client, "/_sessions")["live"] == 0)
        else:
            assert client.close(first)
        opened = get(client, "/opened")
        second = client.create()
        assert second != first and get(client, "/opened") == opened
        with pytest.raises(ServerError, match="was not reset yet"):
            client.step(second, "add")
        with pytest.raises(ServerError, match="no session"):
            client.step(first, "add")
        assert client.reset(second, 2) == "count 2"
        assert client.step(second, "add").observation == "count 3"


@pytest.mark.parametrize("name", ["form-webshop", "form-alfworld", "form-maze"])
def test_a_session_used_again_can_be_looked_at_before_its_reset_and_shows_nothing_of_its_last_user(name, tmp_path):
    # AgentGym's own clients read before they reset: wordle's asks for the vocabulary as it is created.
    row = rows()[name]
    with running(row, tmp_path) as client:
        first = client.create()
        client.reset(first, 7)
        client.step(first, "add")
        assert client.close(first)
        second = client.create()
        look = f"/observation?{row.protocol.id}={second}"
        assert get(client, look) == f"count {row.check.items[0]}"
        with pytest.raises(ServerError, match="was not reset yet"):
            client.step(second, "add")
        client.reset(second, 3)
        client.step(second, "add")
        assert get(client, look) == "count 4"


def test_one_session_more_than_the_limit_is_refused(tmp_path):
    row = rows()["form-sqlgym"]
    with running(row, tmp_path) as client:
        sessions = [client.create() for _ in range(8)]
        with pytest.raises(ServerError, match="all 8 sessions") as caught:
            client.create()
        assert caught.value.status == 429
        asked = urllib.request.Request(client.base + "/create", data=b"", headers={"X-Asks-Another": "1"})
        with pytest.raises(urllib.error.HTTPError) as caught:  # for the proxy, which goes on to the next replica
            urllib.request.urlopen(asked, timeout=10)
        assert caught.value.code == 503
        client.close(sessions[0])
        client.create()


@pytest.mark.parametrize("name, pooled", [("form-textcraft", 0), ("form-alfworld", 1)])
def test_a_create_that_nobody_waited_for_leaves_no_session(name, pooled, tmp_path):
    """Or a health check that comes before a slow server is ready would fill it."""
    row = rows()[name].replaced(app="late:app")
    (tmp_path / "late.py").write_text("import asyncio\nfrom fixture_server import app\n\n"
                                      "@app.middleware('http')\nasync def slow(request, go_on):\n"
                                      "    if request.headers.get('slow'):\n        await asyncio.sleep(2)\n"
                                      "    return await go_on(request)\n")
    with running(row, tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT / row.folder}") as client:
        before = client.sessions()["pooled"]
        kept = [client.create() for _ in range(before + 1)]  # none is left in the pool
        late = urllib.request.Request(client.base + "/create",
                                      data=b"{}",
                                      headers={
                                          "Content-Type": "application/json",
                                          "slow": "yes"
                                      })
        opened = get(client, "/opened")
        with pytest.raises(TimeoutError):
            urllib.request.urlopen(late, timeout=0.5)
        wait_for(lambda: client.sessions()["pooled"] == pooled and get(client, "/opened") == opened + pooled)
        assert client.sessions()["live"] == len(kept)
        with urllib.request.urlopen(late, timeout=30) as answer:
            assert answer.status == 200
        assert client.sessions()["live"] == len(kept) + 1


def stuck(tmp_path):
    """Return a row whose server has /stuck, which blocks its one event loop for a while, and its PYTHONPATH."""
    row = rows()["form-textcraft"].replaced(app="stuck:app")
    (tmp_path / "stuck.py").write_text("import asyncio, time\nfrom fixture_server import app\n\n"
                                       "@app.post('/stuck')\nasync def stuck():\n    time.sleep(60)\n\n"
                                       "@app.middleware('http')\nasync def slow(request, go_on):\n"
                                       "    reply = await go_on(request)\n    if request.url.path == '/reset':\n"
                                       "        await asyncio.sleep(5)\n    return reply\n")
    return row, f"{tmp_path}{os.pathsep}{ROOT / row.folder}"


def test_a_session_that_was_closed_counts_until_its_last_request_is_through(tmp_path):
    """Where all sessions share one account, the next one must not begin while a request of the last still works."""
    row, path = stuck(tmp_path)
    row = row.replaced(max_sessions=1)
    with running(row, tmp_path, PYTHONPATH=path) as client, ThreadPoolExecutor() as pool:
        session = client.create()
        reset = pool.submit(client.reset, session, 0)
        time.sleep(1.5)
        assert client.close(session)
        with pytest.raises(ServerError, match="all 1 sessions"):
            client.create()
        reset.result()
        client.create()


def test_a_client_that_stalls_is_no_stuck_server(tmp_path):
    row = rows()["form-textcraft"].replaced(request_seconds=2.0)
    with running(row, tmp_path) as client:
        host, _, port = client.root.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as half:
            half.sendall(
                b"POST /step HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 40\r\n\r\n{")
            time.sleep(5)
            assert client.process.poll() is None
            assert client.create()


@pytest.mark.parametrize("consent, opened", [("it deletes everything", 0), ("", 1)])
def test_a_health_check_opens_no_session_that_needs_consent(consent, opened, tmp_path):
    row = rows()["form-textcraft"].replaced(consent=consent, session_ids="counted")
    with running(row, tmp_path, True, I_UNDERSTAND=row.name) as client:
        file = tmp_path / "row.json"
        file.write_text(json.dumps(row.to_json(defaults=False)))
        made = client.create()
        assert protocol.main([str(file), "--url", client.root]) == 0
        assert client.create() == made + 1 + opened
    assert protocol.main([str(file), "--url", client.root]) == 1


def test_what_is_no_request_for_a_session_reaches_the_server_unchanged(tmp_path):
    with running(rows()["form-textcraft"], tmp_path) as client:
        assert get(client, "/") == "This is the fixture."
        request = urllib.request.Request(client.base + "/step", data=b"torn {", method="POST")
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        assert caught.value.code == 422


@pytest.mark.parametrize("asked", ["%C2%B2", "9" * 5000, "x", "true", "1.0"])
def test_what_is_no_id_is_no_session(asked, tmp_path):
    row = rows()["form-webshop"]
    with running(row, tmp_path) as client:
        client.create()
        with pytest.raises(urllib.error.HTTPError) as caught:
            get(client, f"/observation?{row.protocol.id}={asked}")
        assert caught.value.code == 404
        deep = urllib.request.Request(client.base + "/step",
                                      data=b"[" * 200_000,
                                      headers={"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(deep, timeout=10)
        assert "no session" not in caught.value.read().decode() and client.process.poll() is None


def test_a_stuck_server_gives_up(tmp_path):
    row, path = stuck(tmp_path)
    row = row.replaced(request_seconds=10.0)
    with running(row, tmp_path, PYTHONPATH=path) as client:
        with pytest.raises((OSError, urllib.error.URLError)):
            urllib.request.urlopen(urllib.request.Request(client.base + "/stuck", data=b"", method="POST"), timeout=20)
        assert client.process.wait(timeout=10) == 70


def served_by(code, tmp_path, **changes):
    """Return a row whose server is `code`, in the form textcraft, and the path that finds it."""
    (tmp_path / "special.py").write_text(code)
    row = rows()["form-textcraft"].replaced(app="special:app", **changes)
    return row, f"{tmp_path}{os.pathsep}{ROOT / row.folder}"


RANDOM = """
import random, time
from fastapi import FastAPI
app, ids = FastAPI(), iter(range(1000))

@app.post("/create")
async def create(body: dict):
    random.seed(0)
    return {"id": next(ids)}

@app.post("/reset")
def reset(body: dict):
    random.seed(body["data_idx"])
    time.sleep(0.02)
    return {"observation": str(random.random())}

@app.post("/close")
async def close(body: dict):
    return True
"""


def test_an_item_stays_the_same_under_load_where_resets_take_turns(tmp_path):
    row, path = served_by(RANDOM, tmp_path, serial_reset=True)
    with running(row, tmp_path, PYTHONPATH=path) as client, ThreadPoolExecutor(8) as threads:

        def play(item):
            session = client.create()
            return item, client.reset(session, item)

        found = set(threads.map(play, [number % 4 for number in range(64)]))
    assert len(found) == 4


def test_an_action_of_many_digits_is_no_fault_of_the_server(tmp_path):
    row, path = served_by(RANDOM.replace('str(random.random())', 'str(int("0" + "9" * body["data_idx"]))[:5]'),
                          tmp_path)
    with running(row, tmp_path, PYTHONPATH=path) as client:
        assert client.reset(client.create(), 5000) == "99999"


# SqlGymEnv as upstream has it: the action's query, then the reference query, whose error is compared like a result.
QUERIES = """
import sqlite3
from fastapi import FastAPI
app, db = FastAPI(), sqlite3.connect(":memory:")
SLOW = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
gold = {"query": SLOW}

def run(query):
    try:
        return db.cursor().execute(query).fetchall()
    except Exception as error:
        return str(error)

@app.post("/create")
async def create(body: dict):
    return {"id": 0}

@app.post("/reset")
async def reset(body: dict):
    gold["query"] = SLOW if body["data_idx"] else "SELECT 1"
    return {"observation": "ask"}

@app.post("/step")
async def step(body: dict):
    found = run(SLOW if body["action"] == "slow" else body["action"])
    right = found != "interrupted" and set(found) == set(run(gold["query"]))
    return {"observation": str(found), "reward": float(right), "done": True}

@app.post("/close")
async def close(body: dict):
    return True
"""


def test_a_reference_query_that_is_stopped_is_an_error_and_no_score(tmp_path):
    row, path = served_by(QUERIES, tmp_path, sqlite_seconds=0.3)
    with running(row, tmp_path, PYTHONPATH=path) as client:
        session = client.create()
        client.reset(session, 0)
        assert client.step(session, "SELECT 1").reward == 1.0
        assert client.step(session, "slow") == ("interrupted", 0.0, True)  # the action's own: a score
        client.reset(session, 5)
        for action in ("SELECT 1", "SELECT 'interrupted'"):
            with pytest.raises(ServerError, match=r"the reference query took longer than 0\.3 s") as caught:
                client.step(session, action)
            assert caught.value.status == 500
        client.reset(session, 0)
        assert client.step(session, "SELECT 1").reward == 1.0


def test_temporary_files_of_an_earlier_start_go_and_new_ones_lie_where_libraries_load(tmp_path):
    row = rows()["form-textcraft"].replaced(scratch=True)
    scratch = tmp_path / "scratch"
    (scratch / "old").mkdir(parents=True)
    (scratch / "old" / "file").touch()
    (scratch / "link").symlink_to(tmp_path)
    with running(row, tmp_path, True, "--scratch", str(scratch)) as client:
        assert client.sessions() and list(scratch.iterdir()) == [] and tmp_path.exists()


def test_a_server_tells_what_its_scores_depend_on(tmp_path):
    (tmp_path / "about.json").write_text('{"data": "toy", "wrong": 3, "empty": ""}')
    with running(rows()["form-textcraft"], tmp_path, True, "--data", str(tmp_path), DEVICE="cpu") as client:
        assert client.sessions()["about"] == {"data": "toy"}  # it has no GPU to do without
    with running(rows()["form-textcraft"].replaced(gpu=True), tmp_path, True, DEVICE="cpu") as client:
        assert client.sessions()["about"] == {"device": "cpu"}
