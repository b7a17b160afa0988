"""What a run is configured with."""
import pytest

from evaluation.problems import Misuse
from evaluation.settings import api_key, check_url, extra_body


def test_a_key_is_asked_for_where_openais_endpoint_is_meant():
    assert api_key("http://127.0.0.1:8000/v1", {}) == "none" and api_key("", {"OPENAI_API_KEY": " k\n"}) == "k"
    for url in ("", "https://api.openai.com/v1"):
        with pytest.raises(Misuse, match="no OPENAI_API_KEY"):
            api_key(url, {})


def test_a_key_may_lie_in_a_file(tmp_path):
    file = tmp_path / "key"
    file.write_text("from-the-file\n")
    assert api_key("", {"OPENAI_API_KEY_FILE": str(file)}) == "from-the-file"
    assert api_key("", {"OPENAI_API_KEY": "k", "OPENAI_API_KEY_FILE": str(file)}) == "k"
    file.write_text("")  # what Compose makes of an empty variable
    assert api_key("http://127.0.0.1:8000/v1", {"OPENAI_API_KEY_FILE": str(file)}) == "none"
    with pytest.raises(Misuse, match="cannot be read"):
        api_key("", {"OPENAI_API_KEY_FILE": str(tmp_path / "none")})


@pytest.mark.parametrize("key", ["sk-secret\nsecond", "sk-secret second", "sk-sec\x01ret", "sk-secr\u00e9t", "sk-secret\x7f"], ids=ascii)
def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(key, tmp_path):
    file = tmp_path / "key"
    file.write_text(key + "\n")
    for name, value in (("OPENAI_API_KEY", key), ("OPENAI_API_KEY_FILE", str(file))):
        with pytest.raises(Misuse, match=name) as caught:
            api_key("", {name: value})
        assert "sk-" not in str(caught.value) and "second" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", "3", '{"x": NaN}', '{"x": [-Infinity]}', '{"x": 1e999}', "[" * 100000], ids=lambda text: text[:20])
def test_an_extra_body_that_is_no_object_is_refused(text):
    with pytest.raises(Misuse, match="--extra-body"):
        extra_body(text)


@pytest.mark.parametrize("url", [
    "localhost:8000", "http://127.0.0.1:x/v1", "http://127.0.0.1:99999/v1", "http://[::1", "http://a..b:1", "http://:80", "http://",
    "http://joe:hunter2@127.0.0.1:x", "http://joe:hun/ter2@host", "http://joe:hunter2@a..b", "http://a b", "joe:hunter2@host",
])
def test_what_is_no_address_is_refused_without_its_login(url):
    with pytest.raises(Misuse, match="no address") as caught:
        check_url("--server", url)
    assert "joe" not in str(caught.value) and "ter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://host/v1?api_key=hunter2", "http://me:hunter2@host/v1#hunter2"])
def test_an_address_that_no_route_can_follow_is_refused_without_its_secret(url):
    with pytest.raises(Misuse, match="has a query or fragment") as caught:
        check_url("--base-url", url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://[::1]:80/v1", "http://my_server:8000", "https://me:p@ss@host/v1", "http://bücher.example", "https://host/@me/v1"])
def test_an_address_is_taken_as_it_is(url):
    assert check_url("--server", url + "/") == url
