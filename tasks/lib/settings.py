"""One place that knows every setting: flag, then environment, then `.env`, then the default."""
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Setting:
    """A variable that users may set in the environment or in `.env`.

    Attributes:
        default: the value when nobody sets it; empty means unset.
        meaning: one sentence for `.env.example`.
        secret: travels by name only and is never printed.
    """
    default: str
    meaning: str
    secret: bool = False


SETTINGS: dict[str, Setting] = {
    "LOCAL_DIR": Setting("saves/checkpoint", "Folder with the sharded actor checkpoint that `invoke merge` reads."),
    "SAVE_DIR": Setting("", "Folder for the merged model (default: LOCAL_DIR/huggingface)."),
    "HF_UPLOAD_PATH": Setting("", "Hub repository, user/name, to which `invoke merge` uploads (default: no upload)."),
    "HF_TOKEN": Setting("", "Hugging Face token for the upload (default: the login of `hf auth login`).", secret=True),
    "HF_ENDPOINT": Setting("", "Hub address (default: https://huggingface.co)."),
}


def read_dotenv(path: Path = ROOT / ".env") -> dict[str, str]:
    """Return the variables of a `.env` file; an absent file has none.

    `dotenv_values` and not `load_dotenv`: the latter would change the environment that Docker Compose sees.
    """
    if not path.is_file():
        return {}
    from dotenv import dotenv_values
    return {name: value for name, value in dotenv_values(path).items() if value is not None}


def resolve(name: str,
            flag: str | None = None,
            environ: Mapping[str, str] | None = None,
            dotenv: Mapping[str, str] | None = None) -> str:
    """Return the value of setting `name`: the first that is set and not empty of flag, environment, `.env`, default.

    Raises:
        KeyError: `name` is no setting.
    """
    setting = SETTINGS[name]
    environ = os.environ if environ is None else environ
    dotenv = read_dotenv() if dotenv is None else dotenv
    return flag or environ.get(name) or dotenv.get(name) or setting.default


def resolve_path(name: str, flag: str | None = None) -> str:
    """Return the path setting `name`; a relative flag starts where the user stands, any other at the project's root."""
    value = flag or resolve(name)
    return value if flag or not value else str(ROOT / value)
