"""A trainer that trains nothing: it prints, writes and dies as verl's does, for tests that take seconds.

    python fake_trainer.py key=value …      (of a key given twice the last counts)

Beside the trainer's own keys: fake.do (what happens), fake.at (in which step), fake.once (a file: only where it is not
there yet), fake.seconds (a step takes), fake.trajectories (a rank plays).
"""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.training.runs import archive

GIVEN = dict(word.lstrip("+").split("=", 1) for word in sys.argv[1:])
FOLDER = Path(GIVEN["trainer.default_local_dir"])
WORLD = int(GIVEN.get("trainer.n_gpus_per_node", 2))
TOTAL = int(GIVEN["trainer.total_training_steps"])
SAVE = int(GIVEN.get("trainer.save_freq", 2))
SECONDS = float(GIVEN.get("fake.seconds", 0.02))
TRAJECTORIES = int(GIVEN.get("fake.trajectories", 2))
URL = GIVEN.get("actor_rollout_ref.agentgym.env_addr", "")


def main_task(text: str) -> None:
    print(f"\x1b[36m(main_task pid=77)\x1b[0m {text}", flush=True)


def worker(text: str) -> None:
    print(f"\x1b[36m(WorkerDict pid=78)\x1b[0m {text}", flush=True)


def happens(step: int) -> str:
    """Return what is to happen in a step."""
    if step != int(GIVEN.get("fake.at", -1)):
        return ""
    once = GIVEN.get("fake.once")
    if once:
        if os.path.exists(once):
            return ""
        Path(once).touch()
    return GIVEN.get("fake.do", "")


class Rounds:
    """ScalingInter's stages as the trainer counts them."""

    def __init__(self) -> None:
        text = GIVEN.get("algorithm.rounds_ctrl.rounds", "3")
        self.scaling = GIVEN.get("algorithm.rounds_ctrl.type") == "scaling_inter_stepwise"
        self.rounds = [int(part) for part in text.strip("[]").split(",")]
        self.every = int(GIVEN.get("algorithm.rounds_ctrl.steps_scaling_inter", 100))
        self.stage, self.count = 0, 1

    def resumed(self, step: int) -> None:
        self.count, self.stage = step, min(step // self.every, len(self.rounds) - 1)

    def next(self) -> None:
        if self.scaling and self.count % self.every == 0 and self.stage + 1 < len(self.rounds):
            self.stage += 1
        self.count += 1

    def now(self) -> int:
        return self.rounds[self.stage if self.scaling else 0]


def save(step: int, half: bool = False) -> None:
    folder = FOLDER / f"global_step_{step}"
    for kind in ("model", "optim", "extra_state"):
        for rank in range(WORLD):
            archive(folder / "actor" / f"{kind}_world_size_{WORLD}_rank_{rank}.pt")
        if half:
            os.kill(os.getpid(), signal.SIGKILL)
    (folder / "actor" / "huggingface").mkdir(exist_ok=True)
    (folder / "actor" / "huggingface" / "config.json").write_text("{}")
    archive(folder / "data.pt")
    (FOLDER / "latest_checkpointed_iteration.txt").write_text(str(step))


def request(path: str) -> bool:
    """Ask the environment; False where the request fails, in whatever way."""
    try:
        with urllib.request.urlopen(urllib.request.Request(URL + path, data=b"{}"), timeout=5) as answer:
            return answer.status == 200
    except OSError as error:
        what = "" if hasattr(error, "code") else f"HTTPConnectionPool: Max retries exceeded (Caused by {error})"
        worker(f"Rollou step Error: {what} item id = 7")
        return False


def play(step: int) -> None:
    for rank in range(WORLD):
        played = []
        for _ in range(TRAJECTORIES):
            said = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "OK"}]
            said += [{"role": "user", "content": "a ball"}, {"role": "assistant", "content": "look"}]
            good = not URL or request("/step")
            if GIVEN.get("fake.do") == "unreadable" and step >= int(GIVEN["fake.at"]):
                worker("Rollou step Error: Invalid action. item id = 7")
                good = False
            time.sleep(float(GIVEN.get("fake.turn", 0)))
            if good:
                said.append({"role": "user", "content": "nothing"})
            played.append({"item_id": 7, "conversations": said, "reward": 0.5 if good and step % 2 else 0})
        place = FOLDER / "rollouts" / f"step{step}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{rank}.json").write_text(json.dumps(played))


def die(words: str, code: int = 1) -> None:
    main_task("Traceback (most recent call last):")
    main_task(words)
    sys.exit(code)


def act(what: str, step: int) -> None:
    """Do what is to happen in the middle of a step."""
    if what == "gpu_oom":
        die("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.")
    if what == "ray_worker":
        die("ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.")
    if what == "nccl_timeout":
        worker("[rank1]:[E1130 ProcessGroupNCCL.cpp:616] [Rank 1] Watchdog caught collective operation timeout: "
               "WorkNCCL(SeqNum=4, OpType=ALLREDUCE) ran for 600031 milliseconds before timing out.")
        os.kill(os.getpid(), signal.SIGABRT)
    if what == "disk_full":
        die("OSError: [Errno 28] No space left on device: 'global_step_4/actor/model_world_size_2_rank_0.pt'")
    if what == "misuse":
        die("ValueError: Key 'ppo_mini_batch' is not in struct")
    if what == "assert":
        die("AssertionError: real_train_batch_size (4) must be divisible by minimal possible batch size (3)")
    if what == "unknown":
        die("RuntimeError: something nobody has seen before", 3)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "unscheduled":
        for _ in range(1000):
            print(
                "\x1b[33m(autoscaler +35s)\x1b[0m Error: No available node types can fulfill resource request {'GPU': 1.0}",
                flush=True)
            time.sleep(0.2)
    if what == "loop_lost":  # Ray starts it again, and it waits
        print(f"\x1b[36m(main_task pid=79)\x1b[0m Total training steps: {TOTAL}", flush=True)
        time.sleep(3600)
    if what == "hang":
        time.sleep(3600)
    if what == "end":
        sys.exit(0)
    if what == "orphan":
        subprocess.Popen(["sleep", "3600"], start_new_session=True)
        die("RuntimeError: leaving a process")
    if what == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        Path(FOLDER / "deaf").touch()
        time.sleep(3600)
    if what == "noise":
        os.write(1,
                 b"\xff\xfe \x1b]0;title\x07\x1b[2J\xe2\x80\xae evil\n" + b"x" * 3_000_000 + b"\nstep:999 - a:1.000\n")
        worker("step:5 - critic/score/mean:9.000")
        os.write(1, b"Running: 10%|# | 1/9\rRunning: 20%|## | 2/9\r\n")
    if what == "half":
        save(step, half=True)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(134))
    print("2026-11-30 13:23:43,320\tINFO worker.py:1691 -- Connected to Ray cluster.", flush=True)
    rounds, step, mode = Rounds(), 0, GIVEN.get("trainer.resume_mode", "auto")
    tracker = FOLDER / "latest_checkpointed_iteration.txt"
    if mode == "auto" and tracker.exists():
        mode = f"{FOLDER}/global_step_{int(tracker.read_text())}"
    main_task(f"Total training steps: {TOTAL}")
    if happens(0):
        act(GIVEN["fake.do"], 0)
    if "global_step_" in mode:
        step = int(mode.rsplit("_", 1)[1])
        for kind in ("model", "optim", "extra_state"):
            (Path(mode) / "actor" / f"{kind}_world_size_{WORLD}_rank_0.pt").read_bytes()
        (Path(mode) / "data.pt").read_bytes()
        rounds.resumed(step)
        main_task(f"Setting global step to {step}")
    else:
        main_task("Training from scratch")
    step += 1
    while True:
        what = happens(step)
        play(step)
        time.sleep(SECONDS)
        act(what, step)
        if SAVE > 0 and step % SAVE == 0:
            save(step)
        gradient = "nan" if what == "nan" else "0.208"
        reward = 0.01 * step
        before = f"step:{step} - max_rounds:{rounds.now()}.000 - actor/grad_norm:{gradient} - critic/ta"
        after = f"sk_score/mean:{reward:.3f} - response_length/mean:95.875 - timing_s/step:{SECONDS:.3f}"
        if what == "torn":
            main_task(before)
            worker("between")
            main_task(after)
        else:
            main_task(before + after)
        step += 1
        rounds.next()
        if step >= TOTAL:
            if SAVE > 0 and (step - 1) % SAVE:
                save(step)
            act(happens(step), step)
            return


if __name__ == "__main__":
    main()
