"""Format AgentGym-RL's source."""
import os

from invoke.context import Context
from invoke.tasks import task

from tasks.lib.engine import containers
from tasks.lib.engine.sources import RL, choose_sources, is_url
from tasks.lib.errors import UserError
from tasks.lib.redaction import hide_logins
from tasks.lib.settings import ROOT, read_dotenv


@task(positional=[],
      auto_shortflags=False,
      help={"check": "Show what would change and exit 1 if anything would; change nothing."})
def format(c: Context, check: bool = False) -> None:
    """Format AgentGym-RL's source with its own style."""
    sources = choose_sources(ROOT, {**read_dotenv(), **os.environ})
    source = sources.get(RL, "")
    if not source or is_url(source):
        raise UserError(f"no AgentGym-RL checkout ({RL}={hide_logins(source) or 'unset'}); set {RL} to its folder")
    containers.run(c, "formatter", ["--check"] if check else [], variables={RL: source})
