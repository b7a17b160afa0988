"""A checkpoint that FSDP under the image's torch 2.4.0 wrote, merged in the scripts container."""
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.docker.workbench import Workbench

pytestmark = pytest.mark.docker


@pytest.fixture
def merged(built: Workbench, checkpoint: Path) -> Iterator[Path]:
    """Return where the merged model goes by default; what a test merged there is removed."""
    yield checkpoint / "huggingface"
    for weights in (checkpoint / "huggingface").glob("model*.safetensors*"):
        weights.unlink()


def assert_bit_exact(folder: Path, reference: Path) -> None:
    result = {}
    for file in folder.glob("model*.safetensors"):
        assert (file.stat().st_uid, file.stat().st_gid) == (os.getuid(), os.getgid())
        result |= load_file(file)
    expected = load_file(reference)
    assert set(result) == set(expected) and expected
    for name, tensor in expected.items():
        assert result[name].dtype == tensor.dtype, name
        # Bit by bit: equal() would let -0.0 pass for 0.0 and refuse NaN.
        assert bytes(result[name].contiguous().view(-1).numpy()) == bytes(tensor.contiguous().view(-1).numpy()), name


def test_the_shards_are_torch_2_4_0_s_own(built: Workbench, checkpoint: Path) -> None:
    said = built.docker(
        "run", "--rm", "-v", f"{checkpoint}:/c:ro", "--user", f"{os.getuid()}:{os.getgid()}",
        built.image("agentgym-rl/scripts"), "python", "-c",
        "import torch; d = torch.load('/c/model_world_size_4_rank_0.pt', weights_only=False); "
        "print(torch.__version__, len(d))")
    assert said.startswith("2.4.0")


def test_invoke_merges_bit_exact_and_the_result_is_the_caller_s(built: Workbench, checkpoint: Path,
                                                                merged: Path) -> None:
    done = built.invoke("merge", "--runner", "docker", "--local-dir", "saves/x/actor", "--dtype", "float32", "--verify")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_bit_exact(merged, checkpoint.parent / "reference.safetensors")
    owners = {(path.stat().st_uid, path.stat().st_gid)
              for path in (built.root / "models/.cache/agentgym-rl-workbench/model-checks").glob("*.json")}
    assert owners == {(os.getuid(), os.getgid())}


def test_compose_merges_bit_exact_and_the_result_is_the_caller_s(built: Workbench, checkpoint: Path,
                                                                 merged: Path) -> None:
    done = built.compose("--profile",
                         "model-merger",
                         "run",
                         "--rm",
                         "model-merger",
                         "--dtype",
                         "float32",
                         env={
                             "LOCAL_DIR": "saves/x/actor",
                             "HOST_UID": str(os.getuid()),
                             "HOST_GID": str(os.getgid())
                         })
    assert done.returncode == 0, done.stdout + done.stderr
    assert_bit_exact(merged, checkpoint.parent / "reference.safetensors")


def test_compose_merger_takes_save_dir(built: Workbench, checkpoint: Path) -> None:
    out = built.root / "models" / "from compose"
    done = built.compose("--profile",
                         "model-merger",
                         "run",
                         "--rm",
                         "model-merger",
                         "--dtype",
                         "float32",
                         env={
                             "LOCAL_DIR": "saves/x/actor",
                             "SAVE_DIR": "models/from compose",
                             "HOST_UID": str(os.getuid()),
                             "HOST_GID": str(os.getgid())
                         })
    assert done.returncode == 0, done.stdout + done.stderr
    assert_bit_exact(out, checkpoint.parent / "reference.safetensors")
    shutil.rmtree(out)


def test_folders_outside_the_mounts_are_mounted_for_the_run(built: Workbench, checkpoint: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "some where"
    shutil.copytree(checkpoint, elsewhere)
    out = tmp_path / "new" / "merged"
    done = built.invoke("merge", "--runner", "docker", "--local-dir", str(elsewhere), "--save-dir", str(out), "--dtype",
                        "float32")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_bit_exact(out, checkpoint.parent / "reference.safetensors")


def test_a_relative_folder_counts_from_where_the_user_stands(built: Workbench, checkpoint: Path) -> None:
    done = built.invoke("merge.inspect", "--runner", "docker", "--local-dir", "actor", "--json", cwd=checkpoint.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)


def test_verify_compares_in_the_container(built: Workbench, checkpoint: Path, merged: Path) -> None:
    words = ["--runner", "docker", "--local-dir", "saves/x/actor"]
    assert built.invoke("merge", *words).returncode == 0
    done = built.invoke("merge.verify", *words)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_merger_s_exit_code_is_ours(built: Workbench, checkpoint: Path) -> None:
    done = built.invoke("merge", "--runner", "docker", "--local-dir", "saves/x/actor", "--dtype", "float99")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr + done.stdout


def test_merge_shell_opens_the_scripts_container(built: Workbench) -> None:
    done = built.invoke("merge.shell", stdin="yapf --version; pwd; exit 4\n")
    assert done.returncode == 4, done.stderr
    assert done.stdout.splitlines()[-1] == "/workspace"
