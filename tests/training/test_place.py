"""Where a run trains: the place of one that is there is found again."""
from __future__ import annotations

import pytest
from invoke.context import Context

from tasks.lib.engine import containers
from tasks.lib.errors import UserError
from tasks.lib.training import place


@pytest.fixture(autouse=True)
def engine_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there be an engine, with the image, that has no NVIDIA runtime."""
    monkeypatch.setattr(place.docker, "require_engine", lambda c: None)
    monkeypatch.setattr(containers, "has_nvidia_runtime", lambda: False)
    monkeypatch.setattr(place, "image_exists", lambda name: True)
    monkeypatch.setattr(place, "resolve", lambda name: "all")
    monkeypatch.setattr(containers, "resolve", lambda name: "all")


def test_a_run_that_went_without_gpus_goes_on_without() -> None:
    """Its run.json says all, as nobody typed a choice: that is no flag that asks for GPUs."""
    found = place.again(Context(), {"runner": "docker", "gpus": {"choice": "all", "count": 2}})
    assert found.gpus is not None and found.gpus.cpu and found.missing == ("", "")


def test_indices_are_asked_for_again() -> None:
    with pytest.raises(UserError, match="--gpus 0,1: the engine has no NVIDIA runtime"):
        place.again(Context(), {"runner": "docker", "gpus": {"choice": "0,1", "count": 2}})
