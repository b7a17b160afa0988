"""Misuse of the command line."""
import pytest

from evaluation.__main__ import main


@pytest.mark.parametrize("argv,told", [
    ([], "required"), (["fly"], "invalid choice"), (["run", "--samples", "0"], "--samples"), (["run", "--samples", "x"], "--samples"),
    (["run", "--env", "serchqa"], "did you mean searchqa"), (["run", "--temperature", "hot"], "--temperature hot"),
    (["run", "--env", "textcraft", "--items", "9999"], "no item 9999"), (["run", "--env", "textcraft", "--model", "expert"], "no scripted players"),
    (["run", "--env", "demo"], "no OPENAI_API_KEY"), (["run", "--env", "demo", "--environments", "/nowhere.toml"], "no rows in"),
    (["rescore", "/nowhere"], "no run in"), (["run", "--prompt", "/nowhere", "--env", "demo"], "--prompt /nowhere cannot be read: No such file or directory; name a text file"),
    (["run", "--prices", "/nowhere", "--env", "demo", "--model", "expert"], "--prices /nowhere cannot be read: No such file or directory; name a TOML or JSON file"), (["run", "--fresh", "--resume", "--env", "demo"], "contradict"),
    (["run", "--env", "demo", "--model", "expert", "--items", "textcraft_3"], "is one of textcraft"),
    (["run", "--env", "demo", "--base-url", "ftp"], "--base-url: 'ftp' is no address; write it like http://127.0.0.1:8000/v1"),
    (["run", "--env", "demo", "--model", "a\udcffb"], "--model 'a\\udcffb' has characters"),
    (["run", "--limit", "x"], "--limit: x is no whole number"), (["run", "--limit", "0"], "--limit: 0 is not at least 1"),
    (["run", "--time-limit", "soon"], "--time-limit: soon is no number"), (["run", "--seed", "x"], "--seed: x is no whole number"), (["run", "--env", "demo", "--max-error-rate", "7"], "--max-error-rate"),
    (["prompts", "--agentgym", "/nowhere"], "no prompt of"), (["run", "--env", "demo", "--resume", "--model", "expert"], "no run in"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_misuse_is_one_line_and_exit_code_2(argv, told, capsys, monkeypatch, tmp_path):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "ENV", "MODEL", "ENVIRONMENTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []
