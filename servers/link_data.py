"""Link data to where a server looks for it: python link_data.py ROW.json --source DIR --data DIR

Once for an image, or for the copy that a local server runs from; environments.toml lists the links.
"""
import argparse
import json
import os
import shutil


def main() -> None:
    """Make the row's links."""
    parser = argparse.ArgumentParser(description="Link data to where an environment server looks for it.")
    parser.add_argument("row", help="JSON file with the environment's row")
    parser.add_argument("--source", required=True, help="folder that the row's package folder lies in")
    parser.add_argument("--data", required=True, help="folder with the row's data")
    options = parser.parse_args()
    with open(options.row) as file:
        row = json.load(file)
    for path, place in row.get("links", {}).items():
        link = os.path.expanduser(place.format(folder=os.path.join(os.path.abspath(options.source), row["folder"])))
        target = os.path.normpath(os.path.join(os.path.abspath(options.data), path))
        os.makedirs(os.path.dirname(link), exist_ok=True)
        if os.path.isdir(link) and not os.path.islink(link):
            shutil.rmtree(link)
        elif os.path.lexists(link):
            os.remove(link)
        os.symlink(target, link)


if __name__ == "__main__":
    main()
