"""What a user can mend: raised anywhere below the tasks, said once at their edge."""

from training.text import shown as printable

__all__ = ["BadSetting", "DockerError", "NoEngine", "UserError", "printable"]
MISUSE = 2
INTERRUPTED = 130
PIPE_CLOSED = 141  # as a shell says it of SIGPIPE


class UserError(Exception):
    """A failure that its message explains: what, the value, the remedy; the task's edge puts the task's name before it.

    Attributes:
        message: one line for the user; empty where all was said before.
        code: the exit code: 2 for misuse, 1 for what failed, another program's own code for its failure.
        speaker: who says it in place of the task, such as docker; empty for the task.
    """
    speaker = ""

    def __init__(self, message: str = "", code: int = MISUSE) -> None:
        super().__init__(message)
        self.message = message
        self.code = code

    def said(self, name: str = "") -> str:
        """Return the message with whoever says it before it: `name`, unless it is somebody else; empty without one."""
        speaker = self.speaker or name
        said = f"{speaker}: {self.message}" if self.message and speaker else self.message
        return printable(said)


class BadSetting(UserError):
    """A setting that cannot be, whichever task reads it."""


class DockerError(UserError):
    """A failure of Docker, or of what the tasks need of it."""
    speaker = "docker"


class NoEngine(DockerError):
    """No docker command is here, or no engine answers it."""
