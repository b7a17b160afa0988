"""The tasks that `invoke --list` shows; one module is one namespace."""
from invoke.collection import Collection

from tasks import build, merge, train
from tasks.quickstart import quickstart

ns = Collection(quickstart, build, train, merge)
