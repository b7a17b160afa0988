"""Numbers that a user types after a flag."""
from __future__ import annotations

from tasks.lib.errors import UserError

MOST = 2_000_000  # poll(2) counts milliseconds in 31 bits


def whole_number(flag: str, value: str, least: int) -> int:
    """Return the number that the user typed.

    Raises:
        UserError: it is none, below `least`, or above MOST, which no clock of the system takes as seconds.
    """
    if not value.isdecimal() or int(value[:20]) < least:
        raise UserError(f"--{flag} {value} is no whole number of at least {least}")
    if int(value[:20]) > MOST:
        raise UserError(f"--{flag} {value} is more than {MOST}; give less")
    return int(value)


def port_number(name: str, value: str) -> int:
    """Return the port that the user typed.

    Raises:
        UserError: it is none.
    """
    if not value.isdecimal() or not 1 <= int(value[:20]) <= 65535:
        raise UserError(f"{name} {value} is no port; choose one from 1 to 65535")
    return int(value)
