"""Overrides: quoted for Hydra's grammar, read by it, and put over one another."""
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from tasks.lib.errors import UserError
from tasks.lib.training import overrides
from tasks.lib.training.overrides import layer, make, parse


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration of one key."""
    folder = tmp_path_factory.mktemp("hydra")
    (folder / "c.yaml").write_text("k: 1\n")
    return folder


def composed(config: Path, word: str) -> object:
    """Return what Hydra makes of `word`."""
    with initialize_config_dir(str(config), version_base=None):
        return OmegaConf.to_container(compose("c", [word]), resolve=True)["k"]  # type: ignore[index, call-overload]


@settings(deadline=None, max_examples=30)
@given(st.text(alphabet="ab'\\\"${}[](),=~%: 1#é\n\t/", max_size=8))
@example("http://h:1/x?a=b&c=d")
@example("~/models/x")
@example("\\${x}")
@example("a\\")
@example("null")
@example("08")
@example("'q'")
@example("")
def test_a_text_is_read_back_as_it_was(config: Path, text: str) -> None:
    assert composed(config, f"k={overrides.quote(text)}") == text


@pytest.mark.parametrize("value", [1, 1e-6, True, None, [6, 13, 20], ["console", "wandb"], ["a,b", "~"], "5", "x"])
def test_a_value_is_read_back_as_it_was(config: Path, value: object) -> None:
    assert composed(config, str(make("k", value))) == value


@pytest.mark.parametrize(("typed", "value"), [
    ("k=[6,13,20]", [6, 13, 20]),
    ("k=http://h:1/x?a=b", "http://h:1/x?a=b"),
    ("k=~/models/x", "~/models/x"),
    ("k=it's", "it's"),
    ("k=a,b", "a,b"),
    ("k=(x", "(x"),
    ("k=[x", "[x"),
    ("k=a=b", "a=b"),
    ("k='quoted already'", "quoted already"),
    ("k=1e-6", 1e-6),
    ("k=", ""),
])
def test_what_the_user_types_is_quoted_where_hydra_would_refuse_it(config: Path, typed: str, value: object) -> None:
    assert parse(typed).value == value
    assert composed(config, str(parse(typed))) == value


def test_a_key_that_the_trainer_reads_and_its_file_lacks_gets_a_plus() -> None:
    assert [str(parse(word)) for word in ("data.seed=3", "+data.seed=3", "trainer.save_freq=3", "~critic.optim")
            ] == ["+data.seed=3", "+data.seed=3", "trainer.save_freq=3", "~critic.optim"]


@pytest.mark.parametrize("word", ["train_batch_size", "=3", "--multirun", "a b=3", "", "~"])
def test_what_is_no_override_is_refused_in_one_line(word: str) -> None:
    with pytest.raises(UserError, match="is no override; write key=value") as said:
        parse(word)
    assert said.value.code == 2 and "\n" not in said.value.message


def test_the_last_layer_wins_at_the_place_of_the_first() -> None:
    found = layer([make("a", 1), parse("+b=2")], [make("c", 3)], [parse("b=4"), make("a", 5)])
    assert list(map(str, found)) == ["a=5", "+b=4", "c=3"]


def test_settings_are_defaults_under_the_overrides() -> None:
    assert overrides.settings([make("a", 2), parse("~b")], {"a": 1, "b": 1, "c": 1}) == {"a": 2, "c": 1}


def test_a_nested_configuration_is_flattened_to_dotted_keys() -> None:
    assert overrides.flat({"a": {"b": 1, "c": {"d": [1]}}, "e": {}}) == {"a.b": 1, "a.c.d": [1], "e": {}}
