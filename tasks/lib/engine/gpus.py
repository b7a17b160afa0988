"""Which GPUs a container gets: a decision, made from the flag, the setting and the engine."""
import re
from dataclasses import dataclass

from tasks.lib.errors import UserError

NO_RUNTIME = "no NVIDIA runtime on this engine: running without GPUs (docker-compose.cpu.yml)"


@dataclass(frozen=True)
class GpuChoice:
    """What to hand to Compose.

    Attributes:
        cpu: add the CPU override, which asks for no device.
        variables: what Compose interpolates.
        notice: a line to show, or empty.
    """
    cpu: bool
    variables: dict[str, str]
    notice: str = ""


def refusal(name: str, setting: str, nvidia: bool) -> str | None:
    """Return why an environment that needs a GPU gets none, and the remedy; None where it gets one.

    Raises:
        UserError: GPUS, `setting`, is no choice.
    """
    if setting == "none":
        return f"{name} needs an NVIDIA GPU, and GPUS=none; set GPUS to all, or to indices such as 0,1"
    if choose_gpus("", setting, nvidia).cpu:
        return f"{name} needs an NVIDIA GPU: the engine has no NVIDIA runtime; install nvidia-container-toolkit"
    return None


def choose_gpus(flag: str, setting: str, nvidia: bool) -> GpuChoice:
    """Decide on GPUs.

    Args:
        flag: what `--gpus` says; empty when it was not given.
        setting: the value of GPUS, which counts without a flag.
        nvidia: whether the engine has the NVIDIA runtime.

    Raises:
        UserError: no such choice, or a flag asks for GPUs that the engine cannot give.
    """
    wanted = flag or setting
    if wanted == "none":
        return GpuChoice(cpu=True, variables={})
    if wanted != "all" and not re.fullmatch(r"(\d+|GPU-[\w-]+)(,(\d+|GPU-[\w-]+))*", wanted):
        raise UserError(f"--gpus {wanted!r} is no choice; use all, none, or indices such as 0,1")
    named = wanted.split(",")
    twice = [one for one in named if named.count(one) > 1]
    if twice:
        raise UserError(f"{'--gpus ' if flag else 'GPUS='}{wanted} names {twice[0]} twice; once is enough")
    if nvidia:
        return GpuChoice(cpu=False, variables={"GPUS": wanted} if flag else {})
    if flag:
        raise UserError(f"--gpus {flag}: the engine has no NVIDIA runtime; install nvidia-container-toolkit, "
                        "or pass --gpus none")
    return GpuChoice(cpu=True, variables={}, notice=NO_RUNTIME)
