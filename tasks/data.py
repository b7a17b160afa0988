"""Fetch the lists of items that training and evaluation play."""
from invoke.context import Context
from invoke.tasks import task

from tasks.lib.notices import put
from tasks.lib.settings import ROOT


@task(positional=[],
      auto_shortflags=False,
      help={
          "env": "Environments, with commas between them (default: all that the data set has).",
          "revision": "Branch, tag or commit of the data set (default: main).",
          "data_set": "Data set of the same layout (default: AgentGym/AgentGym-RL-Data-ID).",
          "force": "Replace lists with other items.",
      })
def fetch(c: Context, env: str = "", revision: str = "", data_set: str = "", force: bool = False) -> None:
    """Fetch AgentGym-RL's item lists from the Hub."""
    from tasks.lib.environments.lookup import all_rows, find_row
    from tasks.lib.fetching import items
    from tasks.lib.tables import human_size
    asked = [name.strip() for name in env.split(",") if name.strip()]
    for name in asked:
        find_row(name)  # a mistyped name is told before anything is asked of the Hub
    items.fetch(ROOT, tuple(all_rows()), asked, revision, force, c.config.run.dry,
                lambda line: put(f"data.fetch: {line}"), human_size, data_set or items.DATA_SET)
