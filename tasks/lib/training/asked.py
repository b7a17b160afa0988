"""What the user types after `train.check`, `train.start` and `train.resume`, as tables."""
from __future__ import annotations

from dataclasses import dataclass

from tasks.lib.flags import flag

SKIP = "Checks to leave out, by their ids: gpus,disk. They are written down in run.json."


@dataclass
class Asked:
    """What a run is to be; `check` and `start` share it."""
    env: str = flag("Environment that is played (default: the script's, then $ENV).")
    model: str = flag("Folder of the Hugging Face model, or its name in models/ (default: the script's or preset's).")
    name: str = flag("Name of the run and its folder, saves/NAME (default: ENV-ALGORITHM-fixed|scaling-DATE-TIME).")
    algorithm: str = flag("grpo or reinforce++ (default: the preset's or script's, grpo).")
    rounds: str = flag("Rounds of an episode, a fixed number (default: the preset's or script's).")
    scaling_inter: str = flag("ScalingInter: rounds of each stage, such as 6,13,20.")
    every: str = flag("With --scaling-inter, steps of a stage (default: the preset's or script's, 100).")
    steps: str = flag("Steps to train (default: all epochs of the preset or script, less one step).")
    gpus: str = flag("GPUs: all, or indices such as 0,1 (default: $GPUS, then all).")
    shm_size: str = flag(
        "With --runner docker, shared memory of the container, such as 64g (default: $SHM_SIZE, then 32g).")
    preset: tuple[str, ...] = flag("fixed, scaling, or a TOML file of the trainer's keys. Repeatable; the last wins.",
                                   ())
    script: str = flag("Take the overrides of one of AgentGym-RL's training scripts, or of a copy of yours.")
    server: str = flag(
        "Address of the environment server, for the trainer (default: the one that is up, else one is started).")
    replicas: str = flag(
        "Servers behind the one address, where one is started; with --server, those that are there (default: 1).")
    runner: str = flag(
        "auto (default: docker where there is one, else local), docker, or local (a Python of this machine).", "auto")
    python: str = flag(
        "With --runner local, the Python with AgentGym-RL's packages (default: $TRAIN_PYTHON, then this one).")
    skip: str = flag(SKIP)
    i_understand: bool = flag("Agree to what the environment does to real accounts; it says what when this is missing.",
                              False)


@dataclass
class Checked(Asked):
    """What `check` takes besides."""
    json: bool = flag("Print the findings as JSON.", False)


@dataclass
class Beside:
    """What goes on beside the trainer; `start` and `resume` share it."""
    attach: bool = flag("Follow the log; Ctrl-C leaves the run going.", False)
    watch: bool = flag("Merge, evaluate and prune its checkpoints as they come, as `train.watch` does.", False)
    watch_flags: str = flag("Flags of `train.watch` for that, in one word: '--eval=babyai --limit=50 --keep-last=2'.")
    keep_env: bool = flag("Leave an environment server that the run starts up after the run (default: it is stopped).",
                          False)
    wait: str = flag("Seconds until an environment server that is started must be ready (default: 120).", "120")


@dataclass
class Started(Beside, Asked):
    """What `start` takes."""
    retries: str = flag("Deaths from which it resumes by itself: environment, Ray worker, NCCL (default: 0).", "0")
    on_env_loss: str = flag(
        "Where the environment was away in a step: stop (default) at the last good checkpoint, or continue.", "stop")
    stop_seconds: str = flag("Seconds that the trainer has to end before it is killed (default: 30).", "30")


@dataclass
class Resumed(Beside):
    """What `resume` takes."""
    name: str = flag("The run's name.")
    steps: str = flag("Steps to train in all, more than it has: a finished run goes on (default: as it was started).")
    skip: str = flag(SKIP)
