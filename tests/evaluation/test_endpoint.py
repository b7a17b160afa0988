"""Addresses of endpoints."""
import pytest

from evaluation.endpoint import loopback, redacted_url


@pytest.mark.parametrize("url,is_one", [("http://127.0.0.1:8/v1", True), ("http://127.9.9.9/v1", True), ("http://[::1]:8/v1", True),
                                        ("http://LOCALHOST:8", True), ("http://user:pw@localhost/v1", True), ("https://api.openai.com/v1", False),
                                        ("http://10.0.0.1", False), ("http://127.0.0.1.example", False)])
def test_addresses_of_this_machine_are_known(url, is_one):
    assert loopback(url) is is_one


@pytest.mark.parametrize("url,shown", [
    ("https://me:pw@host/v1", "https://***@host/v1"), ("http://user:p@ss@host:8/v1", "http://***@host:8/v1"),
    ("http://user@host", "http://***@host"), ("http://host/a@b", "http://host/a@b"), ("cannot reach http://a:b@c d@e", "cannot reach http://***@c d@e"),
])
def test_logins_in_addresses_are_hidden(url, shown):
    assert redacted_url(url) == shown
