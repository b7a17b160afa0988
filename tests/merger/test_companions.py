"""Which files go along with merged weights, and which of a target's a merge replaces."""
import json
import os
import re
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merger import MergeError, companions, files
from merger.foreign.files import Seen

from tests.merger.merging import folder, listing, untouched


@pytest.mark.parametrize("name", [
    "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack",
    "adapter_model.safetensors", "adapter_model.bin", "consolidated.safetensors", "consolidated.safetensors.index.json",
    "consolidated-00001-of-00002.safetensors", "consolidated.00.pth", "consolidated.pth"])  # yapf: disable
def test_these_are_weights(name: str) -> None:
    assert companions.is_weight(name)


@pytest.mark.parametrize("name", [
    "config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "vocab.json", "modeling_custom.py", "merge.json",
    "generation_config.json", "preprocessor_config.json", "README.md", "adapter_config.json", "training_args.bin",
    "model_card.md", "model_index.json", "my_model.safetensors.txt", "embeddings.safetensors",
    "model-q4.gguf", "consolidated.json"])  # yapf: disable
def test_these_are_not(name: str) -> None:
    assert not companions.is_weight(name)


def test_companions_are_copied_and_weights_are_not(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", **{"config.json": "{}", "model.safetensors": "w", "merge.json": "{}",
                                             "consolidated.00.pth": "w", "model-q4.gguf": "w",
                                             "adapter_config.json": "{}", ".hidden": "", "tokenizer.json": "t"})  # yapf: disable
    folder(source / "code", **{"a.py": "a"})
    folder(source / "code/__pycache__", **{"a.pyc": "a"})
    (source / "code").chmod(0o550)
    (source / "link.txt").symlink_to(source / "tokenizer.json")
    (source / "code/loop").symlink_to(source)  # copied, it would have no end
    os.chmod(source / "tokenizer.json", 0o640)
    staging = folder(tmp_path / "staging")
    companions.copy_companions(source, staging, tmp_path / "out")
    assert listing(staging) == {"config.json": b"{}", "tokenizer.json": b"t", "link.txt": b"t", "code": None,
                                "code/a.py": b"a"}  # yapf: disable
    assert not (staging / "link.txt").is_symlink()
    assert stat.S_IMODE((staging / "tokenizer.json").stat().st_mode) == 0o640
    assert stat.S_IMODE((staging / "code").stat().st_mode) == 0o550


def test_from_beside_the_ranks_files_only_plain_files_are_copied(tmp_path: Path) -> None:
    actor = folder(tmp_path / "actor", **{
        "model_world_size_1_rank_0.pt": "", "optim_world_size_1_rank_0.pt": "", "extra_state_world_size_1_rank_0.pt": "",
        "config.json": "{}", "tokenizer.json": "t"})  # yapf: disable
    folder(actor / "huggingface", **{"vocab.json": "{}"})
    staging = folder(tmp_path / "staging")
    companions.copy_companions(actor, staging, actor / "huggingface")
    assert listing(staging) == {"config.json": b"{}", "tokenizer.json": b"t"}


@pytest.mark.parametrize("target", ["bf16", "merged/bf16"])
def test_a_target_inside_the_companions_is_not_copied_into_itself(target: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "huggingface", **{"config.json": "{}"})
    folder(source / target, **{"model.safetensors": "w"})
    folder(source / "code", **{"a.py": "a"})
    (source / "again").symlink_to(source / target)
    staging = folder(tmp_path / "staging")
    companions.copy_companions(source, staging, source / target)
    assert listing(staging) == {"config.json": b"{}", "code": None, "code/a.py": b"a"}


def test_a_target_that_is_the_companions_folder_needs_no_copy(tmp_path: Path) -> None:
    source = folder(tmp_path / "huggingface", **{"config.json": "{}"})
    (tmp_path / "link").symlink_to(source)
    assert list(companions.companions(source, tmp_path / "link")) == []


def test_what_lies_in_the_target_is_kept_and_never_written_through(tmp_path: Path) -> None:
    target = folder(tmp_path / "out", **{"config.json": "old", "notes.md": "mine", "model.safetensors": "w",
                                           "consolidated.safetensors": "w", "q4.gguf": "of it"})  # yapf: disable
    (target / "adapter_config.json").write_text("of an adapter that goes")
    folder(target / "runs", log="events").chmod(0o550)
    staging = folder(tmp_path / "staging")
    companions.keep_companions(target, staging)
    assert listing(staging) == {"config.json": b"old", "notes.md": b"mine", "q4.gguf": b"of it", "runs": None,
                                "runs/log": b"events"}  # yapf: disable
    files.atomic_write(staging / "config.json", b"new")
    assert (target / "config.json").read_text() == "old" and (staging / "config.json").read_text() == "new"


def test_what_is_in_the_staging_already_is_not_taken_from_the_target(tmp_path: Path) -> None:
    elsewhere = folder(tmp_path / "elsewhere", a="theirs")
    target, staging = folder(tmp_path / "out", x="old"), folder(tmp_path / "staging", x="new")
    folder(target / "code", a="old", b="old")
    folder(staging / "code", a="new")
    folder(staging / "tools", a="new")
    (target / "tools").symlink_to(elsewhere)
    with untouched(target, elsewhere):
        companions.keep_companions(target, staging)
    assert listing(staging) == {"x": b"new", "code": None, "code/a": b"new", "code/b": b"old", "tools": None,
                                "tools/a": b"new"}  # yapf: disable


LOADED = ["tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "generation_config.json", "vocab.json",
          "added_tokens.json", "preprocessor_config.json", "chat_template.json"]  # yapf: disable
BAD = [b"", b"{", b"[" * 200_000, b'{"a":' * 100 + b"1" + b"}" * 100, b"[]", b"1", b"null", b'"x"', b"\xff\xfe{}",
       b"{}" * 2, b'{"a": ' + b"9" * 5000 + b"}", b'{"a": [' + b"1," * 9_000_000 + b"1]}"]  # yapf: disable


def check(place: Path) -> list[str]:
    return companions.check_documents((place, ), Seen())


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_a_companion_that_could_not_be_loaded_is_refused(bad: bytes, tmp_path: Path) -> None:
    for name in LOADED if len(bad) < 1000 else LOADED[:2]:
        place = folder(tmp_path / name)
        (place / name).write_bytes(bad)
        with pytest.raises(MergeError, match=re.escape(name)) as caught:
            check(place)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 600
        (place / name).rename(place / "notes.json")  # which nothing loads
        note, = check(place)
        assert note.endswith("it goes along as it is") and note.isprintable()


def test_a_companion_larger_than_any_is_refused_and_a_device_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").touch()
    os.truncate(tmp_path / "tokenizer.json", 1 << 40)
    with pytest.raises(MergeError, match="1099511627776 bytes, more than the"):
        check(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").symlink_to("/dev/zero")
    assert check(tmp_path) == []  # refused by its kind where it is copied
    with pytest.raises(MergeError, match="a device"):
        companions.copy_companions(tmp_path, folder(tmp_path / "staging"), tmp_path / "out")


def test_what_the_libraries_load_is_taken(tmp_path: Path) -> None:
    for name, text in {"tokenizer_config.json": '{"model_max_length": 1000000000000000019884624838656, "a": NaN, "a": 1}',
                       "vocab.json": json.dumps({"\ud83d": 1, "ä": 2}), "tokenizer.json": json.dumps(
                           {"model": {"vocab": {f"t{i},[{{": i for i in range(200_000)},
                                      "merges": [["a", "b"]] * 500_000}})}.items():  # yapf: disable
        (tmp_path / name).write_text(text)
    assert check(tmp_path) == []


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)),
       st.binary(max_size=6), st.integers(0, 200))  # yapf: disable
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_it_is_refused_as_json_itself_would(tmp_path_factory: pytest.TempPathFactory, value: object, put: bytes, at: int) -> None:
    data = json.dumps(value).encode()
    data = data[:at] + put + data[at:]
    place = tmp_path_factory.mktemp("drawn")
    (place / "tokenizer_config.json").write_bytes(data)
    try:
        loadable = isinstance(json.loads(data.decode()), dict)
    except ValueError:
        loadable = False
    try:
        check(place)
        taken = True
    except MergeError as error:
        assert str(error).isprintable()
        taken = False
    assert taken == loadable
