"""Figures of runs for wandb, trackio or mlflow, handed over by their own clients, where these are installed."""
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation.compared import Run, step_of
from evaluation.problems import Misuse, Stopped
from evaluation.secrets import hide_in

TRACKERS = ("wandb", "trackio", "mlflow")
NOT_SENT = ("row", "items")  # of the configuration: long, and in run.json


def figures(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return a run's figures by name; means with the bounds of their intervals."""
    found: dict[str, float] = {}

    def add(name: str, figure: Mapping[str, Any] | None) -> None:
        if figure:
            found[name] = figure["mean"]
            found.update({f"{name}/{side}": figure[side] for side in ("low", "high") if figure[side] is not None})

    add("success", summary["success"])
    add("reward", summary["reward"])
    add("rounds", summary["rounds"])
    for k, figure in summary.get("pass_at", {}).items():
        add(f"pass_at_{k}", figure)
    for name, one in summary["categories"].items():
        add(f"success/{name}", one["success"])
    for name in ("attempts", "expected", "scored", "errors", "invalid_actions", "empty_answers"):
        found[name] = summary[name]
    found.update({f"outcomes/{name}": count for name, count in summary["outcomes"].items()})
    found.update({f"tokens/{name}": count for name, count in summary["usage"].items()})
    if summary["cost"] is not None:
        found["cost"] = summary["cost"]
    if summary["seconds"]["wall"] is not None:
        found["seconds"] = summary["seconds"]["wall"]
    return {name: float(value) for name, value in found.items()}


def send(kind: str, project: str, folder: Path, run: Run) -> None:
    """Hand a run's figures and configuration to a tracker; where the model's name tells a training step, at that step.

    Raises:
        Misuse: its client is not installed.
        Stopped: its client failed; what it said.
    """
    if importlib.util.find_spec(kind) is None:
        raise Misuse(f"export: --to {kind} needs {kind}, which this Python has not; `pip install {kind}`")
    found, step = figures(run.summary), step_of(run.manifest["config"]["model"])
    config = hide_in({key: value for key, value in run.manifest["config"].items() if key not in NOT_SENT})
    config.update(revision=run.manifest["revision"], items=len(run.manifest["config"]["items"]))
    client = importlib.import_module(kind)
    try:
        if kind == "mlflow":
            client.set_experiment(project)
            with client.start_run(run_name=folder.name):
                client.log_params({key: str(value)[:500] for key, value in config.items()})
                # Names of mlflow's metrics are of letters, digits and a few signs.
                named = {
                    "".join(one if one.isalnum() or one in "_-. /" else "_" for one in name): value
                    for name, value in found.items()
                }
                client.log_metrics(named, step=step)
            return
        client.init(project=project, name=folder.name, config=config)
        client.log(found, **({} if step is None else {"step": step}))
        client.finish()
    except Exception as error:  # whatever theirs raise, an account or a network that is not there above all
        raise Stopped(f"export: {kind} failed with {folder.name}: {error}; see its own documentation") from None
