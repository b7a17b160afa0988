"""Why a training run died: from what it printed, its exit code, the kernel's counts, the disk and the environment.

A line is evidence for a cause until the trainer finishes another step: what it survived did not kill it.
"""
from __future__ import annotations

import re
import signal
from dataclasses import dataclass, field

GPU_OOM, HOST_OOM, NCCL, ENVIRONMENT, DISK = "gpu_oom", "host_oom", "nccl_timeout", "environment", "disk_full"
RAY, NAN, KILLED, MISUSE, HANG, UNKNOWN = "ray_worker", "nan", "killed", "misuse", "hang", "unknown"
CAUSES = (GPU_OOM, HOST_OOM, NCCL, ENVIRONMENT, DISK, RAY, NAN, KILLED, MISUSE, HANG, UNKNOWN)
# Another attempt, with nothing changed, may go well.
CURABLE = (ENVIRONMENT, RAY, NCCL)

REMEDIES = {
    GPU_OOM:
    "lower actor_rollout_ref.rollout.gpu_memory_utilization or data.max_response_length, or offload parameters and "
    "optimizer (actor_rollout_ref.actor.fsdp_config.param_offload, .optimizer_offload)",
    HOST_OOM:
    "give the container more memory, or offload less to it",
    NCCL:
    "look at the GPUs and their links (nvidia-smi, dmesg); `invoke train.resume --name {name}` goes on",
    ENVIRONMENT:
    "see that the environment's server answers (`invoke env.check --env {environment}`), then `invoke train.resume --name {name}`",
    DISK:
    "free some disk (`invoke train.watch --name {name}` keeps fewer checkpoints), then `invoke train.resume --name {name}`",
    RAY:
    "`invoke train.resume --name {name}` goes on; the worker's own words are in the log's folder",
    NAN:
    "lower the learning rate, or look at the rewards; a resume from the same checkpoint is likely to end alike",
    KILLED:
    "`invoke train.resume --name {name}` goes on",
    MISUSE:
    "mend what the reason names; `invoke train.check` looks for such before a start",
    HANG:
    "look at the last lines and at the GPUs; `invoke train.resume --name {name}` goes on",
    UNKNOWN:
    "the last lines may tell; `invoke train.resume --name {name}` goes on",
}


def remedy(cause: str, name: str, environment: str = "") -> str:
    """Return what to do about a death of the run `name`, as it can be typed."""
    told = REMEDIES.get(cause, REMEDIES[UNKNOWN])
    return told.format(name=name, environment=environment or "…")


# The order within a line: the first that matches says what the line is about.
_PATTERNS = (
    (GPU_OOM, r"CUDA out of memory|torch\.(?:cuda\.)?OutOfMemoryError|CUDA error: out of memory|HIP out of memory|"
     r"CUBLAS_STATUS_ALLOC_FAILED|No available memory for the cache blocks|"
     r"Free memory on device .* is less than desired"),
    (HOST_OOM, r"ray\.exceptions\.OutOfMemoryError|killed due to (?:memory pressure|the node running low on memory)|"
     r"due to memory pressure \(OOM\)|kill details: Memory on the node|OOM kill reason: Memory usage|"
     r"DefaultCPUAllocator: (?:can't|not enough)|Cannot allocate memory|"
     r"^\w*MemoryError\b|std::bad_alloc"),
    (DISK, r"No space left on device|Disk quota exceeded|\[Errno (?:28|122)\]|PytorchStreamWriter failed writing|"
     r"enforce fail at inline_container.*(?:unexpected pos|failed)|file system is over \d+% full"),
    (NAN,
     r"probability tensor contains either `?inf`?, `?nan`?|(?:loss|grad_norm|gradient)s? (?:is|are) (?:nan|NaN|not finite)|"
     r"found (?:NaN|nan|Inf) in"),
    (NCCL, r"Watchdog caught collective operation timeout|collective operation timed? ?out|"
     r"ProcessGroupNCCL.*(?:timed? ?out|terminat)|ncclRemoteError|ncclSystemError|ncclInternalError|"
     r"ncclUnhandledCudaError|NCCL error|NCCL communicator was aborted|DistBackendError|"
     r"Timed out (?:initializing process group|waiting \d+ ?ms)|DistStoreError|"
     r"Connection closed by peer \[|(?:gloo|tcp/pair)\S*.*(?:Connection|Timed out|timeout)"),
    (ENVIRONMENT, r"Failed to connect to env server|Failed to create environment|"
     r"HTTPConnectionPool\(.*(?:/create|/reset|/step|/observ|/close)|url: /(?:create|reset|step)\b"),
    (MISUSE, r"Could not override|is not in struct|Key '[^']*' (?:is )?not|LexerNoViableAlt|no viable alternative|"
     r"mismatched input|extraneous input|token recognition error|missing EQUAL|Primary config|"
     r"only support equal chunk|ConfigKeyError|ConfigAttributeError|InterpolationKeyError|"
     r"ModuleNotFoundError|^ImportError|No module named|Can't load tokenizer|is not a local folder|"
     r"does not appear to have a file named|RepositoryNotFound|HFValidationError|"
     r"Model architectures? .* (?:is|are) not supported|Unsupported task name|"
     r"size mismatch for|Weights only load failed|InvalidAuthToken|PermissionError|Permission denied|"
     r"can't open file|No such file or directory|unrecognized arguments"),
    (RAY,
     r"RayActorError|ActorDiedError|ActorUnavailableError|The actor died|WorkerCrashedError|[Ww]orker (?:died|crashed)|"
     r"worker died|NodeDiedError|LocalRayletDiedError|OwnerDiedError|raylet (?:died|has exited|terminated)|"
     r"GCS (?:server )?(?:is )?(?:down|unavailable|died)|failed to connect to GCS|A worker was killed|"
     r"The node .* has been marked dead|Worker unexpectedly exits"),
)
EVIDENCE = re.compile("|".join(f"(?P<c{number}>{pattern})" for number, (_, pattern) in enumerate(_PATTERNS)))
# Words that the patterns share, for a first look: most lines have none.
HINT = re.compile(
    r"[Oo]ut ?[Oo]f ?[Mm]emory|ALLOC_FAILED|memory|alloc|space left|quota|Errno|Pytorch|enforce|% full|nan|NaN|Inf|finite|NCCL|"
    r"nccl|collective|Timed? ?out|timeout|Dist|peer|gloo|env server|environment|HTTPConn|url: /|override|struct|"
    r"Key '|viable|input|recognition|EQUAL|Primary|chunk|Config|Interpol|Import|odule|tokenizer|local folder|"
    r"appear|Repository|HFVal|rchitecture|Unsupported|mismatch|Weights|Auth|ermission|open file|No such|arguments|"
    r"Actor|actor|orker|Died|raylet|GCS|marked dead|scheduled|fulfill|resources|available GPUs")
# How a traceback ends: `module.Error: words`.
EXCEPTION = re.compile(
    r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Warning)\b(?:\([^)]*\))?(?:: .*)?")
# A program that tells of something and goes on, which ended nothing; and Ray's line above the error itself.
REMARK = re.compile(
    r"ray\.exceptions\.RayTaskError\(|(?:\[?\d[\d:,. \-]*\]?\s+)?(?:WARNING|INFO|DEBUG)\b|\S+: \w*Warning: ")
ASSERTS = re.compile(r"(?:AssertionError|ValueError|TypeError|KeyError|NotImplementedError|AttributeError)\b")
WAITS = re.compile(r"cannot be scheduled right now|No available node types can fulfill|Insufficient cluster resources|"
                   r"[Tt]otal available GPUs .* is less than")
REASON = 400  # characters
# The causes by weight: what is named later is often a consequence of what is named earlier.
_WEIGHT = (GPU_OOM, HOST_OOM, DISK, NAN, NCCL, ENVIRONMENT, MISUSE, RAY)


@dataclass
class Evidence:
    """What the lines since the last step tell.

    Attributes:
        first: by cause, the first line that spoke for it.
        exception: the last line that ends a traceback.
        waits: a line of Ray's that says what it has too few of.
    """
    first: dict[str, str] = field(default_factory=dict)
    exception: str = ""
    waits: str = ""

    def feed(self, line: str) -> None:
        """Take note of a line, without Ray's prefix; one of source code, in a traceback, tells nothing."""
        if not line.startswith("  ") and HINT.search(line):
            match = EVIDENCE.search(line)
            cause = _PATTERNS[int((match.lastgroup or "c0")[1:])][0] if match else ""
            if cause and not (cause == MISUSE and REMARK.match(line)):
                self.first.setdefault(cause, line.strip()[:REASON])
            elif WAITS.search(line):
                self.waits = self.waits or line.strip()
        text = line.strip()
        if EXCEPTION.fullmatch(text) and "Warning" not in text.split(":")[0]:
            self.exception = text

    def step_done(self) -> None:
        """Forget: the trainer went on."""
        self.first.clear()
        self.exception = self.waits = ""


@dataclass(frozen=True)
class Death:
    """Why an attempt ended.

    Attributes:
        cause: one of CAUSES.
        reason: a sentence for the user; may hold text of others, so it is to be shown escaped.
    """
    cause: str
    reason: str

    @property
    def curable(self) -> bool:
        """Whether another attempt may go well."""
        return self.cause in CURABLE


@dataclass(frozen=True)
class Facts:
    """What is known besides the lines when an attempt ended.

    Attributes:
        exit_code: as subprocess has it: -9 for a process that signal 9 ended.
        last_step: the last step that was finished; None where none was in this attempt.
        steps: how many there are to do.
        oom_kills: how many processes of this container the kernel killed for want of memory meanwhile.
        disk_free: bytes left for the run's folder.
        nan: the first step with a figure that is no number, and its keys.
        environment_lost: what became of the environment's server, a sentence; "" where it was there.
        silent_seconds: since the last line, where the supervisor ended a trainer that hung.
        hung: whether it did.
    """
    exit_code: int
    last_step: int | None = None
    steps: int | None = None
    oom_kills: int = 0
    disk_free: int | None = None
    nan: tuple[int, tuple[str, ...]] | None = None
    environment_lost: str = ""
    silent_seconds: float = 0.0
    hung: bool = False


LOW_DISK = 64 << 20


def diagnose(evidence: Evidence, facts: Facts) -> Death:
    """Return why the trainer ended although it was not done, and nobody had asked it to stop."""
    first = evidence.first
    if facts.nan is not None:
        step, keys = facts.nan
        return Death(NAN, f"step {step} has figures that are no numbers: {', '.join(keys[:4])}")
    if facts.hung:
        minutes = f"{facts.silent_seconds / 60:.0f} minutes"
        if evidence.waits:
            return Death(MISUSE, f"Ray waited for what it does not have: {evidence.waits}")
        if facts.environment_lost:
            return Death(ENVIRONMENT, f"{facts.environment_lost}; the trainer said nothing for {minutes}")
        return Death(HANG,
                     f"the trainer said nothing for {minutes}" + (f"; last: {first[NCCL]}" if NCCL in first else ""))
    if facts.oom_kills and GPU_OOM not in first:
        processes = "a process" if facts.oom_kills == 1 else f"{facts.oom_kills} processes"
        return Death(HOST_OOM, f"the kernel killed {processes} of the trainer for want of memory")
    for cause in _WEIGHT:
        if cause in first and (cause != MISUSE or RAY not in first or facts.last_step is None):
            return Death(cause, _said(cause, first[cause], evidence, facts))
    if facts.disk_free is not None and facts.disk_free < LOW_DISK:
        return Death(DISK, f"the disk of the run's folder has {facts.disk_free >> 20} MiB left")
    if facts.environment_lost:
        return Death(ENVIRONMENT, facts.environment_lost)
    number = _signal(facts.exit_code)
    if number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        return Death(KILLED, f"somebody, or the system, sent the trainer {signal.Signals(number).name}")
    if evidence.exception and ASSERTS.match(evidence.exception) and facts.last_step is None:
        return Death(MISUSE, f"before the first step: {evidence.exception}")
    if facts.exit_code == 0:
        return Death(
            UNKNOWN, f"the trainer ended by itself after step {facts.last_step or 0} of {facts.steps}; "
            "are there fewer batches than steps (trainer.total_epochs)?")
    ended = f"signal {signal.Signals(number).name}" if number else f"exit code {facts.exit_code}"
    return Death(UNKNOWN, ended + (f": {evidence.exception}" if evidence.exception else ""))


def _said(cause: str, line: str, evidence: Evidence, facts: Facts) -> str:
    if cause == ENVIRONMENT and facts.environment_lost:
        return f"{facts.environment_lost} ({line})"
    return line


def _signal(code: int) -> int:
    """Return the signal that an exit code tells of; 0 for none. A shell between says 128 + n."""
    number = -code if code < 0 else code - 128 if 128 < code < 160 else 0
    return number if number in {member.value for member in signal.Signals} else 0


def exit_code(code: int) -> int:
    """Return an exit code of subprocess as a shell has it, and never 0."""
    return 128 - code if code < 0 else code or 1
