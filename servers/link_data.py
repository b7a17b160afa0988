"""Link data to where a server looks for it: python link_data.py ROW.json --source DIR --data DIR

Once for an image, or for the copy that a local server runs from; environments.toml lists the links.
"""
import argparse
import json
import os
import shutil
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from environment_rows import Environment


def make_real(folder: str, source: str) -> None:
    """Make every folder from `source` down to `folder` a real one.

    A checkout may hold links to folders elsewhere. Each becomes a folder of links to what it held, so that what is
    removed or made in `folder` is removed or made in `source`, and never where such a link leads.
    """
    place = source
    for part in os.path.relpath(folder, source).split(os.sep):
        place = os.path.join(place, part)
        if os.path.islink(place):
            target = os.path.realpath(place)
            os.remove(place)
            os.mkdir(place)
            for name in os.listdir(target) if os.path.isdir(target) else []:
                os.symlink(os.path.join(target, name), os.path.join(place, name))


def main() -> None:
    """Make the row's links."""
    parser = argparse.ArgumentParser(description="Link data to where an environment server looks for it.")
    parser.add_argument("row", help="JSON file with the environment's row")
    parser.add_argument("--source", required=True, help="folder that the row's package folder lies in")
    parser.add_argument("--data", required=True, help="folder with the row's data")
    options = parser.parse_args()
    with open(options.row) as file:
        row = Environment.read(json.load(file))
    source = os.path.abspath(options.source)
    for path, place in row.links.items():
        link = os.path.normpath(os.path.expanduser(place.format(folder=os.path.join(source, row.folder))))
        target = os.path.normpath(os.path.join(os.path.abspath(options.data), path))
        if link.startswith(source + os.sep):
            make_real(os.path.dirname(link), source)
        os.makedirs(os.path.dirname(link), exist_ok=True)
        if os.path.isdir(link) and not os.path.islink(link):
            shutil.rmtree(link)
        elif os.path.lexists(link):
            os.remove(link)
        os.symlink(target, link)


if __name__ == "__main__":
    main()
