"""Print the schema, or turn a file of rows into JSON: see the package."""
import json
import sys
from pathlib import Path
from typing import List

from environment_rows.row import Environment
from environment_rows.tables import NAME, environments, read_toml
from environment_rows.typed import schema

USAGE = "give `schema`, or `json FILE FOLDER`"


def main(argv: List[str]) -> int:
    """Return 0, or 2 with one line where the file does not fit."""
    if argv == ["schema"]:
        print(json.dumps(schema(Environment, "Environments of the AgentGym-RL workbench", NAME), indent=1))
        return 0
    if len(argv) != 3 or argv[0] != "json":
        print(f"environment_rows: {USAGE}", file=sys.stderr)
        return 2
    file, folder = Path(argv[1]), Path(argv[2])
    try:
        rows = environments(read_toml(file))
    except (OSError, ValueError) as error:
        print(f"{file.name}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    for name, row in rows.items():
        (folder / f"{name}.json").write_text(json.dumps(row.to_json(defaults=False)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
