"""The keys of a row. Descriptions stand in the JSON schema, so that editors show them."""
import json
import math
import os
from typing import Any, Dict, List, Literal, Mapping, Optional, Tuple, Union

from environment_rows.typed import Misfit, Table, key

Folder = Union[str, "os.PathLike[str]"]


class Protocol(Table):
    """How a server speaks HTTP."""
    prefix: str = key("All routes lie under it.", "", pattern=r"(/[A-Za-z0-9._~-]+)*")
    create: Optional[Dict[str, Any]] = key("Body of POST /create; absent: none.", None)
    id_reply: str = key("Key of the id in create's reply; \"\" means that the reply is the bare integer.")
    id: Literal["id", "env_idx"] = key("Key of the id in every later request, and in the query of a GET.")
    item: str = key("Key of the item in POST /reset.")
    reset: Dict[str, Any] = key("What else the body of POST /reset holds.", {})
    observation: Literal["reply", "list", "get"] = key(
        "Where the first observation is: reply (keys observation_keys, joined by newlines), list (the reply's first "
        "element) or get (GET /observation).")
    observation_keys: Tuple[str, ...] = key("Keys of the first observation in reset's reply.", ("observation", ))
    state: str = key("Key of the observation in POST /step's reply.", "observation")
    reward: str = key("Key of the reward in POST /step's reply.", "reward")
    done: str = key("Key of the end in POST /step's reply.", "done")
    reward_when_done: bool = key("A reward counts only in the last step.", False)
    reset_fault: Dict[str, Any] = key("What POST /reset's reply holds where it failed with a 200.", {})
    faults: Tuple[str, ...] = key(
        "Words of an observation that tell of the network, a key or a quota, not of the action: an error, not a step.",
        ())
    fault_starts: Tuple[str, ...] = key("Words that such an observation begins with, where a page may hold them too.",
                                        ())
    close: bool = key("Whether the server has POST /close.")


class Success(Table):
    """The reward with which an episode counts as solved: give `at_least` or `above`."""
    at_least: Optional[float] = key("Solved with this reward or a greater one.", None)
    above: Optional[float] = key("Solved with a greater reward than this.", None)
    best: bool = key("An episode's reward is the best of its steps, not the last one's.", False)

    def validate(self, where: Tuple[Any, ...]) -> None:
        if (self.at_least is None) == (self.above is None):
            raise Misfit(where, "give either at_least or above")

    def counts(self, before: float, reward: float) -> float:
        """Return the episode's reward after a step that gave `reward`, where it was `before` until then."""
        return max(before, reward) if self.best else reward

    def holds(self, reward: float) -> bool:
        """Return True if `reward`, as the server gives it, solves the item."""
        return reward >= self.at_least if self.at_least is not None else reward > (self.above or 0.0)


class Items(Table):
    """The items that exist and can be played."""
    first: int = key("The first item's number.", 0, least=0)
    last: Optional[int] = key("The last item's number; absent: there is no end, or the data decides.", None, least=0)
    eval_size: Optional[int] = key("Items of AgentGym's own evaluation list.", None, least=1)
    wraps: bool = key("What is beyond the last one starts again at the first.", False)
    splits: Dict[str, Tuple[int, int]] = key(
        "AgentGym's own splits, first and last item each; the evaluation begins at test or dev, where AgentEval has no "
        "list.", {})
    note: str = key("For readers: what an item is.", "")


class Check(Table):
    """What `invoke env.check` plays."""
    action: str = key("An action that every item understands.")
    items: Tuple[int, int] = key("Two items that differ; the health check plays the first.")
    same_start: bool = key("Different items may begin alike.", False)


class Data(Table):
    """A file or folder that must lie in data/<name>: give where it comes from."""
    path: str = key("Its path in data/<name>.")
    url: str = key("Address that it is fetched from.", "")
    hub: str = key("Hugging Face repository that it is fetched from: user/name, or datasets/user/name.", "")
    files: Tuple[str, ...] = key("The repository's files; absent: all.", ())
    then: Literal["", "join", "gunzip", "unzip", "untar"] = key(
        "What is done to what was fetched: join puts the files one after the other; untar takes the one file `inner` out "
        "of an archive.", "")
    inner: Tuple[str, ...] = key("Archives in the archive, unzipped as well; of untar, the file.", ())
    source: str = key("Its path in the package folder of a checkout, which it is copied from.", "")
    make: str = key("What servers/make_data.py makes it by, in the environment's own Python, once the rest is there.",
                    "")
    split: str = key("The split that it is of; the server starts with that of the check's items alone.", "")
    index: str = key("The kind of search index that it is; the server takes the one that was chosen, or the first.", "")
    how: str = key("How to get by hand what is not fetched.", "")

    def validate(self, where: Tuple[Any, ...]) -> None:
        if not (self.url or self.hub or self.source or self.make or self.how):
            raise Misfit(where, "give url, hub, source, make or how")


class Key(Table):
    """A variable without which the server refuses to start."""
    name: str = key("The variable.", pattern=r"[A-Z][A-Z0-9_]*")
    how: str = key("What it is, and where to get it.")
    public: bool = key("It is no secret.", False)
    optional: bool = key("The server starts without it; it is passed on where it is set.", False)


ABOUT = "about.json"


def about(folder: Folder) -> Dict[str, str]:
    """Return what the data in `folder` is: data = "toy" where it is made up, index = the kind of index that was chosen.

    Empty for what the row's servers are meant for. What a score depends on, a server tells (GET /_sessions), and an
    evaluation records.
    """
    try:
        with open(os.path.join(folder, ABOUT), encoding="utf-8") as file:
            told = json.load(file)
    except (OSError, ValueError):
        return {}
    return {
        key: value
        for key, value in told.items() if isinstance(value, str) and value
    } if isinstance(told, dict) else {}


class Prompt(Table):
    """The words for a model: a class in a file of AgentGym's agentenv/agentenv/envs, or a text of one's own."""
    file: str = key("File of AgentGym that has them.", "")
    class_: str = key("Class in that file.", "", table_key="class")
    text: str = key("The words themselves, of an environment of one's own.", "")


class Row(Table):
    """An environment, as far as playing it goes: what the evaluation reads."""
    HIDDEN = ("name", )
    name: str = key("The table's name.")
    title: str = key("One line for `invoke env.list`.", "")
    source: Literal["agentgym", "project"] = key(
        "Where the package folder is: the AgentGym checkout (AGENTGYM_SRC), or this repository.", "agentgym")
    folder: str = key(
        "Package folder inside the source (one of your own: environments/NAME); modules are imported "
        "from it.", "")
    app: str = key("The ASGI application that upstream's start command serves, module:attribute.",
                   "",
                   pattern=r"[\w.]+:\w+")
    port: int = key(
        "Default port; ENV_PORT and --port come first. Below 32768, where Linux takes the ports of outgoing "
        "connections from; searchqa's 36001 is what AgentGym-RL's documents say.",
        least=1024,
        most=65535)
    concurrency: int = key("Sessions at which one server is at its best.", least=1)
    rounds: int = key("Rounds of an episode in AgentGym-RL's evaluation scripts or AgentGym's documents.", least=1)
    action: Literal[
        "raw", "one_action_line", "after_first_action", "after_last_action", "sql_block", "backticks",
        "whole_line"] = key(
            "How the evaluation reads an action out of a completion, as AgentGym's client does. raw: the "
            "whole completion. one_action_line: the line after \"Action:\", its letters, digits and commas; "
            "a second \"Action:\" is refused. after_first_action: what is between the first \"Action:\" and "
            "the next; without one the whole completion. after_last_action: what follows the last "
            "\"Action:\"; without one the whole completion, if it has search[ or click[. sql_block: what is "
            "in the last ```sql block. backticks: the whole completion, if it has something between ``` and "
            "```; else it is refused. whole_line: the last line that is not blank (our own: AgentGym has no "
            "such client).")
    reward_range: Tuple[float, float] = key(
        "Lowest and highest reward; the evaluation scales it to 0 to 1, `invoke env.check` fails on one outside.",
        (0.0, 1.0))
    item_maps: Tuple[str, ...] = key(
        "JSON files in `folder` that give the numbers of items with other names (alfworld's trials).", ())
    prompt: Prompt = key("Where the words for a model are.", Prompt())
    protocol: Protocol = key("How the server speaks HTTP.")
    check: Optional[Check] = key("What `invoke env.check` plays.", None)
    success: Success = key("When an episode succeeds; absent: with a reward of at least 1.", Success(at_least=1.0))
    items: Items = key("Which items there are.")

    def validate(self, where: Tuple[Any, ...]) -> None:
        low, high = self.reward_range
        if not -math.inf < low < high < math.inf:
            raise Misfit((*where, "reward_range"), "give the least reward and a greater one, both finite")

    def scaled(self, reward: float) -> float:
        """Return `reward` as a share of the row's range, 0 to 1; what lies outside the range counts as its end."""
        low, high = self.reward_range
        return min(max((reward - low) / (high - low), 0.0), 1.0)


class Environment(Row):
    """An environment: what its server needs, and how it is played."""
    title: str = key("One line for `invoke env.list`.")
    folder: str = key("Package folder inside the source (one of your own: environments/NAME); modules are imported "
                      "from it.")
    app: str = key("The ASGI application that upstream's start command serves, module:attribute.",
                   pattern=r"[\w.]+:\w+")
    stage: str = key("Build stage in docker/env.Dockerfile; absent: the table's name.", "")
    command: str = key("For readers: upstream's own start command (we start `app`: servers/serve.py says why).", "")
    workdir: str = key("Folder, relative to `folder`, in which the server must start.", ".")
    pythonpath: Tuple[str, ...] = key(
        "Further folders, relative to `folder`, that modules are imported from (packages with an impossible "
        "requires-python).", ())
    python: str = key("Python version that the constraints were made for.", pattern=r"3\.\d+")
    constraints: str = key(
        "Pins: docker/constraints/env-<this>.txt, installed whole, without looking at dependencies; "
        "absent: the table's name.", "")
    unused: Tuple[str,
                  ...] = key("Packages that the server imports and never uses, and that are therefore not installed.",
                             ())
    system: Tuple[str, ...] = key("Debian packages that the server needs.", ())
    programs: Tuple[str, ...] = key("What must be on PATH for --runner local.", ())
    memory_mb: int = key("Memory limit of the server's container, in MB.", least=1)
    gpu: bool = key("Whether the server needs an NVIDIA GPU (GPUS says which).", False)
    session_mb: Optional[float] = key("For readers: memory a session, measured; absent where nobody measured.", None)
    max_sessions: Optional[int] = key("Sessions at once; one more gets an error in place of another session's id.",
                                      None,
                                      least=1)
    session_ids: Literal["random", "counted"] = key(
        "random: ids that nobody guesses, below 2^53. counted: 1, 2, 3 for a client that needs small integers (none of "
        "AgentGym's own does); anybody can guess them, and a restart gives them out again.", "random")
    processes: int = key("Most processes and threads of the server's container.", 1024, least=16)
    request_seconds: Optional[float] = key(
        "Longest request before the server is given up and starts again; absent: no limit.", None, least=0.001)
    sqlite_seconds: Optional[float] = key(
        "Longest SQLite query; where another than the action's own is stopped, the step is an error, no score.",
        None,
        least=0.001)
    serial_reset: bool = key("Creates and resets run one at a time; absent: as they come.", False)
    read_only: bool = key("Whether the container's root is read-only.", True)
    tmpfs: Tuple[str, ...] = key("Folders that the server must write to, in memory; nothing in them can be run.",
                                 ("/tmp", ))
    scratch: bool = key(
        "The server loads libraries from temporary files: TMPDIR is then an empty folder on disk in which that is allowed.",
        False)
    answers: Tuple[Literal["games", "cuda"], ...] = key(
        "What servers/foreign.py answers in place of a library. games: textworld lets a game go at the "
        "next reset, and the planner that fast_downward loaded for it serves another one. cuda: torch's .cuda(), where the "
        "server was told to do without a GPU.", ())
    cpu_env: Dict[str, str] = key("Variables set as well where the server was told to do without a GPU.", {})
    before: Tuple[Tuple[str, ...], ...] = key("Commands run in `workdir` before the server is imported.", ())
    env: Dict[str, str] = key(
        "Variables set for the server; {folder} is the package folder, {data} the data folder, {index} the file of the "
        "search index in it.", {})
    toy: str = key("Small made-up data on which it plays (servers/toys.py); absent: there is none.", "")
    consent: str = key("What the user must agree to before it starts (--i-understand).", "")
    notes: Tuple[str, ...] = key("For readers: what to beware of.", ())
    check: Check = key("What `invoke env.check` plays.")
    data: Tuple[Data, ...] = key("What must lie in data/<name>, and where it comes from.", ())
    keys: Tuple[Key, ...] = key("Variables (secrets) without which it refuses to start.", ())
    links: Dict[str, str] = key(
        "Data that the server looks for elsewhere: path in data/<name> = place (\".\" is the data folder itself).", {})

    @property
    def pins(self) -> str:
        """The name of the file of pins in docker/constraints."""
        return f"env-{self.constraints or self.name}.txt"

    def index(self, folder: Folder) -> Optional[Data]:
        """Return the search index that the server takes from the data in `folder`; None where the row knows of none."""
        kinds = {data.index: data for data in self.data if data.index}
        return kinds.get(about(folder).get("index", "")) or next(iter(kinds.values()), None)

    def missing_data(self, folder: Folder) -> List[Data]:
        """Return the data that is not in `folder` and without which the server does not start."""
        index = self.index(folder)
        absent = [
            data for data in self.data
            if not os.path.exists(os.path.join(folder, data.path)) and (not data.index or data is index)
        ]
        return [data for data in absent if not data.split or self._is_checked(data.split)]

    def _is_checked(self, split: str) -> bool:
        first, last = self.items.splits.get(split, (0, -1))
        return first <= self.check.items[0] <= last

    def missing_keys(self, environ: Mapping[str, str]) -> List[Key]:
        """Return the keys that are a must and that `environ` does not set."""
        return [one for one in self.keys if not (one.optional or environ.get(one.name))]
