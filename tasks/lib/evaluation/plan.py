"""What `invoke eval` hands to the evaluation runner, decided from flags, settings and what is up."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from tasks.lib.errors import UserError
from tasks.lib.flags import Value

RUNS = Path("saves") / "eval"
NEEDED = ("aiohttp", "openai", "psutil", "pydantic", "rich", "jinja2", "numpy", "tenacity", "matplotlib")
MAX_TOKENS = 4096  # the runner's default


@dataclass(frozen=True)
class Endpoint:
    """A model's server that was started for a run.

    Attributes:
        name: the model's name in requests.
        url: the server's address for the runner; its port differs from run to run.
        engine: vllm or transformers.
        context: tokens of the model's context; 0 where the model does not say.
    """
    name: str
    url: str
    engine: str
    context: int = 0


def endpoint_flags(endpoint: Endpoint, values: Mapping[str, Value]) -> dict[str, Value]:
    """Return the runner's flags for a server that was started, beside the user's `values`.

    vLLM refuses a request whose prompt and max_tokens exceed the context, so a small context gets smaller completions.
    transformers' server never looks at the context, and answers one request at a time.
    """
    found: dict[str, Value] = {
        "model": endpoint.name,
        "base_url": endpoint.url,
        "base_url_as": f"{endpoint.engine}, started for the run",
    }
    if endpoint.context and endpoint.context < 2 * MAX_TOKENS and not values.get("max_tokens"):
        found["max_tokens"] = str(endpoint.context // 2)
    if endpoint.engine == "transformers":
        found["context_length"] = values.get("context_length") or str(endpoint.context or "")
        found["concurrency"] = values.get("concurrency") or "1"
    return found


def loopback_host(url: str) -> str:
    """Return the host of `url` where it is whichever machine asks, else nothing; also of a malformed one."""
    try:
        host = urlsplit(url).hostname or ""
        return host if host == "localhost" or ip_address(host).is_loopback else ""
    except ValueError:
        return ""


def run_folder(name: str, root: Path) -> Path:
    """Return the folder of the run called `name`: a path, or a folder of saves/eval.

    Raises:
        UserError: neither is there.
    """
    for path in (Path(name), root / RUNS / name):
        if (path / "run.json").is_file():
            return path
    raise UserError(f"no run {name}; `invoke eval.list` shows them")


def latest_run(root: Path) -> Path:
    """Return the folder of the run that was worked on last.

    Raises:
        UserError: there is none.
    """
    found = sorted((root / RUNS).glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"no runs in {root / RUNS}; `invoke eval` makes one")
    return found[-1].parent


def folders(names: Sequence[str], root: Path) -> list[Path]:
    """Return the folders of the runs called `names`, or of the latest run where there is no name."""
    return [run_folder(name, root) for name in names] if names else [latest_run(root)]
