"""Why a run died."""
from __future__ import annotations

import pytest

from training.diagnosis import CAUSES, REMEDIES, Death, Evidence, Facts, diagnose, exit_code

# Lines as PyTorch, Ray, vLLM, Hydra and the trainer print them.
LINES = [
    ("gpu_oom",
     "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.16 GiB. GPU 0 has a total capacity of 79.1"),
    ("gpu_oom", "RuntimeError: CUDA error: out of memory"),
    ("gpu_oom", "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"),
    ("host_oom", "ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory."),
    ("host_oom",
     "1 Workers (tasks / actors) killed due to memory pressure (OOM), 0 Workers crashed due to other reasons"),
    ("host_oom",
     "[2026-11-30 14:48:59,397 I 85 85] (raylet) node_manager.cc:3199: Killing 1 worker(s), kill details: Memory on the node (IP: 172.19.0.3) was 3.90GB used / 4.00GB limit"
     ),
    ("host_oom",
     "RuntimeError: [enforce fail at alloc_cpu.cpp:83] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ("nccl_timeout",
     "[E1130 ProcessGroupNCCL.cpp:616] [Rank 1] Watchdog caught collective operation timeout: WorkNCCL("),
    ("nccl_timeout",
     "torch.distributed.DistBackendError: NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp"),
    ("nccl_timeout", "RuntimeError: [../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting "
     "1800000ms for recv operation to complete"),
    ("nccl_timeout",
     "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer "
     "[127.0.0.1]:25137"),
    ("environment", "Failed to connect to env server, retrying...(5/5)"),
    ("environment",
     "requests.exceptions.ConnectionError: HTTPConnectionPool(host='127.0.0.1', port=36005): Max retries "
     "exceeded with url: /create (Caused by NewConnectionError('Connection refused'))"),
    ("environment", "requests.exceptions.RequestException: Failed to create environment: <Response [500]>"),
    ("disk_full", "OSError: [Errno 28] No space left on device: '/saves/x/global_step_2'"),
    ("disk_full",
     "RuntimeError: [enforce fail at inline_container.cc:783] . PytorchStreamWriter failed writing file data/3"),
    ("disk_full", "OSError: [Errno 122] Disk quota exceeded"),
    ("ray_worker", "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task."),
    ("ray_worker", "ray.exceptions.RayActorError: The actor died because of an error raised in its creation task"),
    ("ray_worker", "A worker died or was killed while executing a task by an unexpected system error."),
    ("nan", "RuntimeError: probability tensor contains either `inf`, `nan` or element < 0"),
    ("misuse", "Could not override 'data.train_batch'."),
    ("misuse", "omegaconf.errors.ConfigAttributeError: Key 'x' is not in struct"),
    ("misuse", "AssertionError: only support equal chunk. Got size of DataProto 4 and chunk 3."),
    ("misuse", "ModuleNotFoundError: No module named 'flash_attn'"),
    ("misuse", "PermissionError: [Errno 13] Permission denied: 'outputs'"),
]


def test_a_warning_and_rays_heading_are_not_why_it_ended():
    evidence = Evidence()
    for text in ("WARNING 11-30 18:49:43 _custom_ops.py:19] Failed to import from vllm._C with ImportError('libcuda.so.1')",
                 "/opt/venv/vllm/connections.py:8: RuntimeWarning: No module named 'vllm._version'",
                 "2026-11-30 18:48:31,992\tINFO authentication.py:50 -- No such file or directory: a new token",
                 "ray.exceptions.RayTaskError(PermissionError): ray::main_task() (pid=236, ip=172.20.0.2)", '  File "<frozen os>", line 225',
                 "PermissionError: [Errno 13] Permission denied: '/workspace/models/.huggingface'"):  # yapf: disable
        evidence.feed(text)
    found = diagnose(evidence, Facts(exit_code=1, steps=9, last_step=None))
    assert (found.cause, found.reason) == ("misuse", "PermissionError: [Errno 13] Permission denied: '/workspace/models/.huggingface'")


@pytest.mark.parametrize("cause, line", LINES)
def test_a_line_is_evidence(cause, line):
    evidence = Evidence()
    for text in ("Traceback (most recent call last):", '  File "/x/y.py", line 3, in f', line):
        evidence.feed(text)
    found = diagnose(evidence, Facts(exit_code=1, steps=9, last_step=None))
    assert found.cause == cause and line[:60] in found.reason


@pytest.mark.parametrize("line", [
    "step:1 - max_rounds:3.000 - critic/score/mean:0.5",
    "[rank-0]: Saving model to /saves/x/global_step_2/actor/model_world_size_2_rank_0.pt",
    "FutureWarning: You are using `torch.load` with `weights_only=False`, which uses the default pickle module",
    "{'actor_rollout_ref': {'actor': {'clip_ratio': 0.2, 'grad_clip': 1.0, 'memory': None},",
    "Checkpoint tracker file does not exist: %s /x/latest_checkpointed_iteration.txt",
    "INFO worker.py:1691 -- Using address 127.0.0.1:36379 set in the environment variable RAY_ADDRESS",
    "After building vLLM rollout, memory allocated (GB): 3.5, memory reserved (GB): 7.2",
    "kwargs: {'n': 1, 'logprobs': 1, 'max_tokens': 100, 'detokenize': False}",
])
def test_ordinary_lines_are_none(line):
    evidence = Evidence()
    evidence.feed(line)
    assert not evidence.first and not evidence.exception


def test_source_code_in_a_traceback_is_no_evidence():
    evidence = Evidence()
    for line in ('  File "/x/torch/cuda.py", line 3, in f',
                 '    raise torch.cuda.OutOfMemoryError("CUDA out of memory")'):
        evidence.feed(line)
    assert not evidence.first


def test_what_ray_calls_possible_proves_nothing():
    """Ray's text of every worker's death names the OOM killer and SIGSEGV as causes that there may be."""
    evidence = Evidence()
    evidence.feed(
        "A worker died or was killed while executing a task by an unexpected system error. Some common causes "
        "include: (1) the process was killed by the OOM killer due to high memory usage, (2) ray stop --force was "
        "called, or (3) the worker crashed unexpectedly due to SIGSEGV or another unexpected error.")
    assert diagnose(evidence, Facts(exit_code=1, last_step=3)).cause == "ray_worker"


def test_what_was_survived_did_not_kill():
    evidence = Evidence()
    evidence.feed("Failed to connect to env server, retrying...(1/5)")
    evidence.step_done()
    assert diagnose(evidence, Facts(exit_code=-9, last_step=3)).cause == "killed"


def test_the_root_comes_before_what_follows_from_it():
    evidence = Evidence()
    for line in ("ray.exceptions.RayTaskError(OutOfMemoryError): ray::WorkerDict.update_actor()",
                 "ray.exceptions.ActorDiedError: The actor died unexpectedly",
                 "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate"):
        evidence.feed(line)
    assert diagnose(evidence, Facts(exit_code=1, last_step=3)).cause == "gpu_oom"


@pytest.mark.parametrize("facts, cause, words", [
    ({
        "exit_code": 1,
        "oom_kills": 1
    }, "host_oom", "killed a process"),
    ({
        "exit_code": -9,
        "oom_kills": 2
    }, "host_oom", "2 processes"),
    ({
        "exit_code": -9
    }, "killed", "SIGKILL"),
    ({
        "exit_code": 137
    }, "killed", "SIGKILL"),
    ({
        "exit_code": 143
    }, "killed", "SIGTERM"),
    ({
        "exit_code": 1,
        "disk_free": 1000
    }, "disk_full", "0 MiB"),
    ({
        "exit_code": 1,
        "environment_lost": "the server is gone"
    }, "environment", "gone"),
    ({
        "exit_code": 0,
        "last_step": 4,
        "steps": 9
    }, "unknown", "after step 4 of 9"),
    ({
        "exit_code": 3
    }, "unknown", "exit code 3"),
    ({
        "exit_code": -11
    }, "unknown", "SIGSEGV"),
    ({
        "exit_code": 1,
        "nan": (3, ("actor/grad_norm", ))
    }, "nan", "step 3"),
    ({
        "exit_code": -15,
        "hung": True,
        "silent_seconds": 3600
    }, "hang", "60 minutes"),
    ({
        "exit_code": -15,
        "hung": True,
        "silent_seconds": 600,
        "environment_lost": "no answer"
    }, "environment", "no answer"),
])
def test_what_else_is_known(facts, cause, words):
    found = diagnose(Evidence(), Facts(**facts))
    assert found.cause == cause and words in found.reason


def test_ray_that_waits_for_gpus_is_misuse():
    evidence = Evidence()
    evidence.feed("Warning: The following resource request cannot be scheduled right now: {'GPU': 1.0}")
    found = diagnose(evidence, Facts(exit_code=-15, hung=True, silent_seconds=300))
    assert found.cause == "misuse" and "GPU" in found.reason


def test_an_assertion_before_the_first_step_is_misuse_and_later_unknown():
    evidence = Evidence()
    evidence.feed("AssertionError: world size 3")
    assert diagnose(evidence, Facts(exit_code=1)).cause == "misuse"
    assert diagnose(evidence, Facts(exit_code=1, last_step=5)).cause == "unknown"


def test_only_environment_ray_and_nccl_are_worth_another_attempt():
    assert {cause for cause in CAUSES if Death(cause, "").curable} == {"environment", "ray_worker", "nccl_timeout"}
    assert set(REMEDIES) == set(CAUSES)


@pytest.mark.parametrize("code, shell", [(0, 1), (1, 1), (3, 3), (-9, 137), (-15, 143), (134, 134)])
def test_a_death_is_never_0(code, shell):
    assert exit_code(code) == shell
