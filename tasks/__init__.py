"""The tasks that `invoke --list` shows; one module is one namespace."""
from invoke.collection import Collection

from tasks import merge
from tasks.quickstart import quickstart

ns = Collection(quickstart, merge)
