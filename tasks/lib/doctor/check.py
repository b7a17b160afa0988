"""One line of the doctor."""
from dataclasses import asdict, dataclass

OK, NOTE, MISSING = "ok", "note", "missing"


@dataclass(frozen=True)
class Check:
    """One line of the doctor.

    Attributes:
        name: what was looked at.
        level: ok, note (fine for some uses) or missing (needed).
        found: what is there.
        remedy: what to do about it; empty where nothing is to be done.
    """
    name: str
    level: str
    found: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        """Return the check for `--json`."""
        return asdict(self)
