"""One time limit for a whole exchange over HTTP, whatever the other side does."""
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from servers.exchange import Stays, opener
from servers.protocol import Client, ServerError
from tests.fixtures.dripping import DRIPS, dripping, within
from tests.fixtures.servers import ROOT, rows


def test_the_wings_that_may_not_import_each_other_have_it_alike():
    assert (ROOT / "servers/exchange.py").read_bytes() == (ROOT / "training/exchange.py").read_bytes()


@pytest.mark.parametrize("kind", DRIPS)
def test_who_drips_does_not_hold_us_up(kind):
    with dripping(kind) as url, within(10), pytest.raises(OSError) as caught:
        try:
            with opener(urllib.request.ProxyHandler({}), Stays()).open(url, timeout=1) as reply:
                reply.read(1 << 20)
        except urllib.error.HTTPError as error:
            with error:
                error.read(1000)
    assert isinstance(caught.value, TimeoutError)


@pytest.mark.parametrize("kind", DRIPS)
def test_the_protocols_client_says_so_in_one_line(kind):
    with dripping(kind) as url, within(10), pytest.raises(ServerError) as caught:
        Client(url, rows()["form-textcraft"].protocol, timeout=1).create()
    assert str(caught.value) == "POST /create: the answer did not end within 1 s"


def test_an_answer_that_ends_is_read_and_its_time_can_be_renewed():

    class Slow(BaseHTTPRequestHandler):

        def do_GET(self):
            self.send_response(200)
            self.send_header("content-length", "4")
            self.end_headers()
            for letter in b"abcd":
                threading.Event().wait(0.4)
                self.wfile.write(bytes([letter]))

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with opener(urllib.request.ProxyHandler({})).open(url) as reply:
            assert reply.read() == b"abcd"
        with opener(urllib.request.ProxyHandler({})).open(url, timeout=1.1) as reply:
            found = b""
            while piece := reply.read(1):
                reply.allow(1.1)
                found += piece
        assert found == b"abcd"
        server.shutdown()
