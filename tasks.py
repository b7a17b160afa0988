"""Hand `invoke` the task collection of the package `tasks/`.

Invoke prefers this file to the package and registers it under the same name; giving the name back lets
`from tasks import ...` mean the package everywhere (invoke, pytest, mypy).
"""
import sys
from importlib import import_module

if sys.version_info < (3, 11):  # before anything that an older one cannot read
    sys.exit(f"invoke: this project needs Python 3.11 or newer; this is {sys.version.split()[0]}, {sys.executable}")

del sys.modules[__name__]
ns = import_module(__name__).ns
import_module(f"{__name__}.words").check(ns, sys.argv)
