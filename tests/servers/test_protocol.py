"""The protocol client and `env.check` against a server of every form, bare and inside serve.py."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

from servers.protocol import Client, ServerError, check_ready
from tasks.lib.environments.conformance import Conformance
from tests.fixtures.servers import ROOT, rows, running

FORMS = sorted(name for name in rows() if name.startswith("form-"))


def verdicts(name: str, client: Client) -> dict[str, bool | None]:
    return {finding.check: finding.holds for finding in Conformance(rows()[name], client).run()}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "in serve.py"])
def test_a_server_of_this_form_conforms(name, wrapped, tmp_path):
    row = rows()[name]
    with running(row, tmp_path, wrapped) as client:
        findings = Conformance(row, client).run()
    # Bare, a server without close has none; serve.py gives it one.
    lacking = not wrapped and not row.protocol.close
    assert len(findings) == 8
    assert [finding for finding in findings if finding.holds is False] == []
    assert [finding.check for finding in findings if finding.holds is None] == (["close"] if lacking else [])


@pytest.mark.parametrize("limit,left_out", [(1, ["same item twice the same", "two sessions apart"]),
                                            (2, ["two sessions apart"]), (3, [])])
def test_a_check_that_needs_more_sessions_than_the_server_allows_is_left_out(limit, left_out, tmp_path):
    row = rows()["form-weather"].replaced(max_sessions=limit)  # as todo and sheet are
    with running(row, tmp_path) as client:
        findings = Conformance(row, client).run()
    assert [finding for finding in findings if finding.holds is False] == []
    assert [finding.check for finding in findings if finding.holds is None] == left_out
    assert {finding.detail
            for finding in findings
            if finding.holds is None} <= {f"needs {number} sessions, the server allows {limit}"
                                          for number in (2, 3)}


@pytest.mark.parametrize("fault,check", [("shared", "two sessions apart"), ("unsteady", "same item twice the same"),
                                         ("anyid", "bad id is an error"), ("sticky", "close")])
def test_a_broken_server_is_found_out(fault, check, tmp_path):
    with running(rows()["form-textcraft"], tmp_path, False, FAULT=fault) as client:
        assert verdicts("form-textcraft", client)[check] is False


@pytest.mark.parametrize("name", FORMS)
def test_an_episode_is_played_to_its_end(name, tmp_path):
    row = rows()[name]
    with running(row, tmp_path) as client:
        session = client.create()
        first = client.reset(session, 3)
        assert first.splitlines()[-1] == "count 3"
        step = client.step(session, "add")
        assert (step.observation, step.reward, step.done) == ("count 4", 0.0, False)
        last = client.step(session, "win")
        assert (last.reward, last.done) == (row.reward_range[1], True)
        with pytest.raises(ServerError):
            client.step(session, "add")


def test_an_error_inside_a_200_is_an_error(tmp_path):
    row = rows()["form-textcraft"]
    with running(row, tmp_path, False) as client:
        with pytest.raises(ServerError, match="no such session") as caught:
            client.step(999, "add")
        assert caught.value.status == 200


@pytest.mark.parametrize("answer,message", [(b"torn {", "no JSON"), (b'{"error": "no"}', "POST /create: no"),
                                            (b"true", "no session id"), (b'{"idx": 3}', "no session id")])
def test_an_answer_without_a_session_is_an_error(answer, message):
    import http.server
    import threading

    class Answers(http.server.BaseHTTPRequestHandler):

        def do_POST(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = Client(f"http://127.0.0.1:{server.server_port}", rows()["form-textcraft"].protocol, timeout=5)
    with pytest.raises(ServerError, match=message):
        check_ready(client, 0)
    server.shutdown()


def test_words_of_the_network_in_an_observation_are_an_error(tmp_path):
    row = rows()["form-weather"]
    with running(row, tmp_path, False) as client:
        session = client.create()
        client.reset(session, 3)
        client.protocol = row.protocol.replaced(faults=("count 4", ))
        with pytest.raises(ServerError, match="POST /step: count 4"):
            client.step(session, "add")
        assert client.step(session, "add").observation == "count 5"
        client.protocol = row.protocol.replaced(faults=("count 4", ), fault_starts=("6", "count 7"))
        assert client.step(session, "add").observation == "count 6"
        with pytest.raises(ServerError, match="POST /step: count 7"):
            client.step(session, "add")


def test_a_reset_that_says_in_its_reply_that_it_failed_is_an_error(tmp_path):
    row = rows()["form-webarena"]
    with running(row, tmp_path, False) as client:
        session = client.create()
        assert client.reset(session, 3) == "count 3"
        client.protocol = row.protocol.replaced(reset_fault={"observation": "not this one"})
        with pytest.raises(ServerError, match=r"POST /reset: .*not this one"):
            client.reset(session, 3)
        client.protocol = row.protocol.replaced(reset_fault={"observation": "not this one", "sites": "Error"})
        assert client.reset(session, 3) == "count 3"


@pytest.mark.parametrize("url,line", [
    ("http://127.0.0.1:x", "POST /create: nonnumeric port: 'x'; give an address like http://127.0.0.1:8000"),
    ("localhost", "POST /create: unknown url type: 'localhost/create'; give an address like http://127.0.0.1:8000"),
])
def test_an_address_that_is_none_is_told(url, line):
    with pytest.raises(ServerError, match=line) as caught:
        Client(url, rows()["form-textcraft"].protocol, timeout=5).create()
    assert caught.value.status is None


def test_a_port_that_speaks_something_else_is_told():
    import socketserver
    import threading

    class Greets(socketserver.BaseRequestHandler):

        def handle(self):
            self.request.sendall(b"220 mail.example ESMTP\r\n")
            self.request.recv(1000)

    with socketserver.TCPServer(("127.0.0.1", 0), Greets) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(ServerError, match=f"POST /create: {url} speaks no HTTP") as caught:
            Client(url, rows()["form-textcraft"].protocol, timeout=5).create()
        assert caught.value.status is None
        server.shutdown()


def probe(tmp_path: Path, name: str, url: str) -> subprocess.CompletedProcess:
    row = tmp_path / "row.json"
    row.write_text(json.dumps(rows()[name].to_json(defaults=False)))
    return subprocess.run([sys.executable, "-I", ROOT / "servers/protocol.py", row, "--url", url, "--timeout", "5"],
                          capture_output=True,
                          text=True)


def test_the_probe_tells_ready_from_listening(tmp_path):
    with running(rows()["form-sqlgym"], tmp_path, False) as client:
        assert probe(tmp_path, "form-sqlgym", client.base).returncode == 0
        # The same server, asked as a server of another form, listens but is not ready.
        wrong = probe(tmp_path, "form-webarena", client.base)
    assert (wrong.returncode, wrong.stderr) == (1, "")
    assert wrong.stdout.startswith("not ready: POST /create: no session id")
    gone = probe(tmp_path, "form-sqlgym", client.base)
    assert gone.returncode == 1 and "refused" in gone.stdout
