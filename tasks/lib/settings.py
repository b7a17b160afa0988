"""One place that knows every setting: flag, then environment, then `.env`, then the default."""
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tasks.lib.env_file import parse
from tasks.lib.errors import BadSetting
from training import foreign

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


FLASH_ATTN_WHEEL = ("https://github.com/Dao-AILab/flash-attention/releases/download/v2.7.3/"
                    "flash_attn-2.7.3%2Bcu12torch2.4cxx11abiFALSE-cp310-cp310-linux_x86_64.whl")

SPACY_MODEL = ("https://github.com/explosion/spacy-models/releases/download/"
               "en_core_web_lg-3.3.0/en_core_web_lg-3.3.0-py3-none-any.whl")

# Compose reads the same variables by itself, with the same defaults (a test compares the two).
SETTINGS: dict[str, Setting] = {
    # Sources
    "AGENTGYM_RL_SRC":
    Setting(
        "https://github.com/WooooDyy/AgentGym-RL.git#82402a99c62a293735a3f412fb8ac9a600673bc0",
        "AgentGym-RL: a checkout's folder, or a git URL with #commit. The tasks find one in or beside this folder."),
    "AGENTGYM_SRC":
    Setting("https://github.com/WooooDyy/AgentGym.git#d014732d9fe39b975c368c03749bfd50950067f6",
            "AgentGym: a checkout's folder, or a git URL with #commit. The tasks find one in or beside this folder."),
    # Images
    "REGISTRY":
    Setting("", "Prefix of the image names, with its slash, for --push: registry.example.com/team/."),
    "IMAGE_TAG":
    Setting("latest", "Tag of the images that are built and run."),
    "PULL_POLICY":
    Setting("never", "When Compose asks a registry for our images: never, or missing, with a REGISTRY of your own."),
    "BASE_IMAGE":
    Setting("nvidia/cuda:12.4.1-devel-ubuntu22.04", "What the base image starts from (with --cpu: ubuntu:22.04)."),
    "PYTHON_VERSION":
    Setting("3.10", "Python of the base image; the default FLASH_ATTN_WHEEL fits 3.10 only."),
    "TORCH_VERSION":
    Setting("2.4.0", "torch of the base image."),
    "TORCHVISION_VERSION":
    Setting("0.19.0", "The torchvision that goes with TORCH_VERSION."),
    "TORCH_INDEX_URL":
    Setting("https://download.pytorch.org/whl/cu124",
            "Index with torch's CUDA builds (with --cpu: .../whl/cpu). Set but empty: PyPI."),
    "FLASH_ATTN_WHEEL":
    Setting(FLASH_ATTN_WHEEL, "flash-attn's release wheel. Set but empty: skipped."),
    "EVAL_BASE_IMAGE":
    Setting("python:3.12-slim", "What the evaluation image starts from."),
    "PACKAGE_INDEX_URL":
    Setting("", "Private Python package index for the builds, login included.", secret=True),
    "CA_BUNDLE":
    Setting("/dev/null", "PEM file of a certificate authority for the builds."),
    # Containers
    "COMPOSE_PROJECT_NAME":
    Setting("agentgym-rl",
            "Prefix of container and network names (unset, the tasks add what tells this folder and you)."),
    "HOST_UID":
    Setting("1000", "User id in the containers. The tasks pass yours; set it for plain docker compose."),
    "HOST_GID":
    Setting("1000", "Group id in the containers. The tasks pass yours; set it for plain docker compose."),
    "GPUS":
    Setting(
        "all",
        "GPUs of train, scripts, model-merger, serve and searchqa: all, none (tasks only), or indices such as 0,1."),
    "SHM_SIZE":
    Setting("32g", "Shared memory of the containers train and serve."),
    "IPC_MODE":
    Setting("private", "IPC namespace of those two; with host, SHM_SIZE means nothing."),
    "MEMLOCK":
    Setting("-1", "Bytes of memory that training may lock; -1 is no limit, which a rootless engine cannot give."),
    # Environments and evaluation
    "ENV":
    Setting("searchqa", "Environment that is served and evaluated."),
    "ENV_PORT":
    Setting(
        "36001",
        "Port of the environment server, on the host and in the containers (unset, the tasks take the environment's own)."
    ),
    "ENV_BIND":
    Setting("127.0.0.1", "Host address on which ENV_PORT is published. The servers have no authentication."),
    "MODEL":
    Setting("gpt-4o-mini", "Model that is evaluated."),
    "MAX_ROUND":
    Setting("10", "Rounds of one episode, at most (unset, the tasks take the environment's own)."),
    "OPENAI_API_KEY":
    Setting("", "Key for the model's API.", secret=True),
    "OPENAI_BASE_URL":
    Setting("", "Address of an OpenAI-compatible API (default: OpenAI's own)."),
    "SERVE_MODEL":
    Setting("saves/checkpoint/huggingface", "Model that `docker compose --profile serve` serves, in models or saves."),
    "SERVED_NAME":
    Setting("checkpoint", "Name of that model in requests."),
    "SERVE_PORT":
    Setting("8000",
            "Port of that server on the host, published on ENV_BIND; other containers use http://serve:8000/v1."),
    "ENVIRONMENTS":
    Setting("environments.toml", "File with the environments' rows, relative to this folder."),
    "REQUEST_BYTES":
    Setting("1048576", "Longest request that an environment server reads, in bytes."),
    "ENV_MEMORY":
    Setting("16g", "Memory limit of plain `docker compose --profile env`; the tasks take each environment's own."),
    "ENV_READ_ONLY":
    Setting("true", "Read-only root of plain `docker compose --profile env`; webarena needs false."),
    "ENV_STAGE":
    Setting("", "Build stage of plain `docker compose --profile env`, where it is not called like the environment."),
    "ENV_FOLDER":
    Setting("demo", "Folder that the stage demo copies in plain `docker compose --profile env`: environments/mine."),
    "SPACY_MODEL":
    Setting(SPACY_MODEL, "webshop's language model, a wheel. Set but empty: skipped, and webshop does not start."),
    "MOVIE_KEY":
    Setting("", "The Movie Database's API read access token, for the environment movie.", secret=True),
    "TODO_KEY":
    Setting("", "Todoist API token, for the environment todo, which deletes that account's projects.", secret=True),
    "SHEET_EMAIL":
    Setting("", "Address that the environment sheet shares its sheets with.", secret=True),
    "SHOPPING":
    Setting("", "Address of webarena's shop."),
    "SHOPPING_ADMIN":
    Setting("", "Address of webarena's shop's administration."),
    "REDDIT":
    Setting("", "Address of webarena's forum."),
    "GITLAB":
    Setting("", "Address of webarena's GitLab."),
    "MAP":
    Setting("", "Address of webarena's map."),
    "WIKIPEDIA":
    Setting("", "Address of webarena's Wikipedia."),
    "HOMEPAGE":
    Setting("", "Address of webarena's home page."),
    # Training
    "TRAIN_PYTHON":
    Setting("", "Python with AgentGym-RL's packages, for `train.start --runner local` (default: the tasks' own)."),
    "WANDB_API_KEY":
    Setting("", "Weights & Biases key.", secret=True),
    "WANDB_MODE":
    Setting("offline", "online, offline or disabled."),
    # Merging
    "LOCAL_DIR":
    Setting("saves/checkpoint", "Folder with the sharded actor checkpoint that `invoke merge` reads."),
    "SAVE_DIR":
    Setting(
        "",
        "Folder for the merged model (default: LOCAL_DIR/huggingface; with --lora adapter LOCAL_DIR/lora_adapter)."),
    "MERGE_DEVICE":
    Setting("", "Where `invoke merge` converts: cpu, cuda or cuda:N (default: measured, and remembered for the host)."),
    "HF_UPLOAD_PATH":
    Setting("", "Hub repository, user/name, to which `invoke merge` uploads (default: no upload)."),
    "HF_TOKEN":
    Setting("", "Hugging Face token for uploads and downloads (default: the login of `hf auth login`).", secret=True),
    "HF_ENDPOINT":
    Setting("", "Hub address (default: https://huggingface.co)."),
}


def read_dotenv(path: Path = ROOT / ".env") -> dict[str, str]:
    """Return the variables of a `.env` file, as Docker Compose reads it; an absent file has none.

    Raises:
        BadSetting: it is no text, or a line of it is refused.
    """
    if not path.exists() or path.resolve() == Path(os.devnull):
        return {}
    try:
        contents = foreign.read_bytes(path, foreign.LARGEST_LINE)
    except (OSError, ValueError) as error:
        told = f"cannot be read: {error.strerror}" if isinstance(error,
                                                                 OSError) else str(error).removeprefix(f"{path} ")
        raise BadSetting(f"{path} {told}; it is a file with a line NAME=VALUE for each setting") from None
    try:
        return parse(contents.decode(), os.environ, str(path))
    except UnicodeDecodeError:
        kind = "is UTF-16" if contents[:2] in (b"\xff\xfe", b"\xfe\xff") else "is not UTF-8"
        raise BadSetting(f"{path} {kind}; save it as UTF-8") from None


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
    """Return the path setting `name`; a relative flag starts where the user stands, any other at the project's root.

    A `~` is the user's home: no shell expands it in `.env` or after the = of a flag.
    """
    value = os.path.expanduser(flag or resolve(name))
    return value if flag or not value else str(ROOT / value)


FOLDERS = ("models", "saves", "data", "AgentItemId", "AgentEval")


def effective_environment() -> dict[str, str]:
    """Return the environment, with `.env` below it."""
    return {**read_dotenv(), **os.environ}
