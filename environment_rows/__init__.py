"""What a row of environments.toml is: the one schema that tasks, servers and evaluation share by file.

The wings never import each other, and yet all read these rows: a package of its own, beside them, that every image
copies. It runs with every environment's own Python, so: Python 3.8, and nothing but the standard library.

    python -m environment_rows schema                # the JSON schema for editors, environments.schema.json
    python -m environment_rows json FILE FOLDER      # every row of a TOML file, checked, as FOLDER/<name>.json
"""
from environment_rows.row import ABOUT, Check, Data, Environment, Items, Key, Prompt, Protocol, Row, Success, about
from environment_rows.tables import environment, environments, near, read_toml, refusal, row, toml_tables
from environment_rows.typed import Misfit

__all__ = [
    "ABOUT", "Check", "Data", "Environment", "Items", "Key", "Misfit", "Prompt", "Protocol", "Row", "Success", "about",
    "environment", "environments", "near", "read_toml", "refusal", "row", "toml_tables"
]
