"""Surroundings of a user who has set nothing."""
import pytest

from tests.evaluation.whole import KEY


@pytest.fixture(autouse=True)
def plain_surroundings(monkeypatch, tmp_path):
    for name in ("ENV", "ENV_SERVER", "MODEL", "MAX_ROUND", "OPENAI_BASE_URL", "AGENTGYM_SRC", "ENVIRONMENTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.chdir(tmp_path)
