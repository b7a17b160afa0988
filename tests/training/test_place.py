"""Where a run trains: the place of one that is there is found again."""
from __future__ import annotations

from typing import Any

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
    for module in (place, containers):
        monkeypatch.setattr(module, "resolve", {"GPUS": "all", "SHM_SIZE": "16g"}.get)


def test_a_run_that_went_without_gpus_goes_on_without() -> None:
    """Its run.json says all, as nobody typed a choice: that is no flag that asks for GPUs."""
    found = place.again(Context(), {"runner": "docker", "gpus": {"choice": "all", "count": 2}})
    assert found.gpus is not None and found.gpus.cpu and found.missing == ("", "")


def test_indices_are_asked_for_again() -> None:
    with pytest.raises(UserError,
                       match=r"--gpus 0,1: the engine has no NVIDIA runtime; install nvidia-container-toolkit$"):
        place.again(Context(), {"runner": "docker", "gpus": {"choice": "0,1", "count": 2}})


def test_gpus_of_the_setting_count_on_this_machine_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "resolve", lambda name: {"GPUS": "2,3"}.get(name, ""))
    assert place.choose(Context(), "local", "", "", "").chosen == ("2", "3")
    assert place.choose(Context(), "local", "", "0", "").chosen == ("0", )
    assert place.choose(Context(), "local", "", "all", "").chosen == ()
    monkeypatch.setattr(place, "resolve", lambda name: {"GPUS": "none"}.get(name, ""))
    with pytest.raises(UserError, match="GPUS=none: training needs GPUs"):
        place.choose(Context(), "local", "", "", "")


def test_a_local_place_is_looked_at_with_the_gpus_that_the_trainer_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an index that is not there CUDA shows nothing, and the trainer would wait for ever."""
    seen = []

    def run(words: list[str], **kwargs: Any) -> None:
        seen.append(kwargs["env"].get("CUDA_VISIBLE_DEVICES"))
        raise OSError("stop here")

    monkeypatch.setattr(place.subprocess, "run", run)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for chosen in (("7", ), ("0", "1"), ()):
        place.look(Context(), place.Place("local", python="python3", chosen=chosen), {})
    assert seen == ["7", "0,1", None]
