"""The presets give the lists of AgentGym-RL's ten training scripts, which are kept here as facts."""
import json
from pathlib import Path

import pytest

from tasks.lib.errors import UserError
from tasks.lib.training import presets
from tasks.lib.training.overrides import read

FACTS = Path(__file__).resolve().parents[1] / "fixtures" / "training" / "overrides.json"
LISTS: dict[str, dict[str, str]] = json.loads(FACTS.read_text())
# What a run has of its own, and a preset does not.
OWN = ("actor_rollout_ref.agentgym.env_addr", "actor_rollout_ref.agentgym.task_name", "actor_rollout_ref.model.path",
       "actor_rollout_ref.rollout.rollout_log_dir", "trainer.default_local_dir", "trainer.project_name",
       "trainer.experiment_name")


def names(script: str) -> tuple[str, str]:
    """Return environment and kind of a script."""
    return Path(script).stem.removesuffix("_train"), "scaling" if "ScalingInter" in script else "fixed"


def test_there_are_ten_scripts() -> None:
    assert len(LISTS) == 10
    assert sorted(map(names, LISTS)) == sorted(
        (name, kind) for name, kinds in presets.environments().items() for kind in kinds)


@pytest.mark.parametrize("script", LISTS)
def test_a_preset_is_its_scripts_list_key_by_key(script: str) -> None:
    found = {one.key: one.value for one in presets.built_in(*names(script))}
    assert found == {key: read(text) for key, text in LISTS[script].items() if key not in OWN}


def test_an_environment_without_a_preset_is_refused() -> None:
    for name in ("alfworld", "common", "nothing"):
        with pytest.raises(UserError, match="has no preset fixed for"):
            presets.built_in(name, "fixed")


def test_a_file_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text('source = "mine"\ndata.train_batch_size = 8\n[trainer]\nlogger = ["console"]\n')
    assert list(map(str,
                    presets.from_file(tmp_path / "p.toml"))) == ["data.train_batch_size=8", "trainer.logger=[console]"]


@pytest.mark.parametrize(("text", "line"), [
    ("a = ", "no TOML"),
    ("a = 2026-01-01", "is no number, text or list"),
    ("\xff", "no TOML"),
])
def test_a_file_that_is_none_is_refused_in_one_line(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "p.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=line) as said:
        presets.from_file(tmp_path / "p.toml")
    assert "\n" not in said.value.message


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        presets.from_file(tmp_path / "p.toml")
