"""Which images there are, what builds them, and in which order."""
from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True)
class Image:
    """One of the project's images.

    Attributes:
        name: repository, without registry and tag.
        service: the Compose service that builds it.
        profile: the Compose profile of that service.
        needs: services whose images must exist before.
    """
    name: str
    service: str
    profile: str
    needs: tuple[str, ...] = ()

    @property
    def task(self) -> str:
        """The task that builds it."""
        return "build." + {"eval-runner": "eval"}.get(self.service, self.service)


# In dependency order; what `build.all` builds.
IMAGES = (
    Image("agentgym-rl/base", "base", "build"),
    Image("agentgym-rl/train", "train", "train", needs=("base", )),
    Image("agentgym-rl/scripts", "scripts", "scripts", needs=("base", )),
    Image("agentgym/eval", "eval-runner", "eval"),
)
# The model's server on hosts without a GPU; `eval --checkpoint` builds it where it is needed.
SERVE = Image("agentgym-rl/serve", "serve", "serve", needs=("base", ))
EVERY = (*IMAGES, SERVE)


def image_of(service: str) -> Image:
    """Return the image that `service` builds.

    Raises:
        KeyError: no image comes from that service.
    """
    return {image.service: image for image in EVERY}[service]


def human_size(size: float) -> str:
    """Return `size` bytes the way `docker images` does: 1.5GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:  # which is rounded to three digits, and not to 1e+03
            return f"{size:.3g}{unit}"
        size /= 1000
    return f"{size:.3g}TB"


def human_age(age: timedelta) -> str:
    """Return `age` in its largest unit: 3 days."""
    seconds = int(age.total_seconds())
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = seconds // length
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return "seconds"
