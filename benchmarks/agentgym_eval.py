"""Play textcraft items with AgentGym's own evaluator and a model that answers after a given time; print the seconds.

    python benchmarks/agentgym_eval.py --agentgym ../AgentGym --url http://127.0.0.1:36001 --items 64 --rounds 20

Runs in a Python that has what AgentGym's client needs (torch, transformers, requests, openai); eval_runner.py calls it.
"""
import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agentgym", required=True, type=Path, help="AgentGym checkout")
    parser.add_argument("--url", required=True, help="address of a textcraft server")
    parser.add_argument("--items", type=int, default=64, help="items to play (default: 64)")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of each (default: 20)")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds until the model answers (default: 0)")
    options = parser.parse_args()
    if not (options.agentgym / "agentenv" / "agentenv").is_dir():
        parser.error(f"no agentenv/agentenv in --agentgym {options.agentgym}; name an AgentGym checkout")
    sys.path.insert(0, str(options.agentgym / "agentenv"))
    from agentenv.controller import APIAgent, Evaluator  # type: ignore[import-not-found]
    from agentenv.envs import TextCraftTask  # type: ignore[import-not-found]

    class Instant(APIAgent):  # type: ignore[misc]
        """A model that needs no endpoint."""

        def __init__(self) -> None:
            pass

        def generate(self, conversation: list[Any]) -> tuple[str, str]:
            """Return an answer and no reasoning."""
            time.sleep(options.latency)
            return "Thought:\nI need wood.\n\nAction:\nget 1 oak log", ""

    task = TextCraftTask(client_args={"env_server_base": options.url, "data_len": options.items, "timeout": 300})
    evaluator = Evaluator(Instant(), [task])
    begun = time.perf_counter()
    # One item a call, as AgentGym's example programs do.
    for item in range(options.items):
        evaluator.eval(max_rounds=options.rounds, idxs=[item])
    print(json.dumps({"seconds": time.perf_counter() - begun}))


if __name__ == "__main__":
    main()
