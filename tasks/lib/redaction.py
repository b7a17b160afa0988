"""What no output may show: the values of secrets, and logins inside URLs."""
from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

from tasks.lib.settings import SETTINGS, read_dotenv


def hide_logins(text: str) -> str:
    """Return `text` without the logins in its URLs; what stands before the last @ of a host is one."""
    return re.sub(r"(\w+://)[^/\s]*@", r"\1***@", text)


def secret_values(environ: Mapping[str, str] | None = None, dotenv: Mapping[str, str] | None = None) -> list[str]:
    """Return the values of all secrets that are set, longest first: what no output may show."""
    environ = os.environ if environ is None else environ
    dotenv = read_dotenv() if dotenv is None else dotenv
    found = {
        source[name]
        for source in (environ, dotenv)
        for name, setting in SETTINGS.items() if setting.secret and source.get(name)
    }
    return sorted(found, key=len, reverse=True)


def redact(text: str, secrets: Sequence[str]) -> str:
    """Return `text` without the values in `secrets` and without logins inside URLs."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return hide_logins(text)
