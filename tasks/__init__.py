"""The tasks that `invoke --list` shows; one module is one namespace."""
from invoke.collection import Collection

from tasks import build, clean, data, env, evaluate, evaluate_suite, merge, models, train
from tasks.completion import completion
from tasks.edge import guard
from tasks.formatting import format
from tasks.project import doctor, down, status
from tasks.quickstart import quickstart

ns = Collection(quickstart, status, down, doctor, completion, format, build, train, env, merge, data, models, clean)
ns.add_collection(Collection.from_module(evaluate, name="eval"))
ns.collections["eval"].add_task(evaluate_suite.suite)
guard(ns)
