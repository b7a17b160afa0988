"""Hand `invoke` the task collection of the package `tasks/`.

Invoke prefers this file to the package and registers it under the same name; giving the name back lets
`from tasks import ...` mean the package everywhere (invoke, pytest, mypy).
"""
import sys
from importlib import import_module

del sys.modules[__name__]
ns = import_module(__name__).ns
