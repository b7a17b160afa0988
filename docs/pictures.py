"""Make the README's pictures from what `invoke quickstart` left: its table as a terminal shows it, and its report.

    invoke quickstart && python docs/pictures.py

Needs Chromium on PATH, or playwright's own (`playwright install chromium`).
"""
import argparse
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.text import Text

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SAVES = ROOT / "saves" / "quickstart"
PLAYERS = ("random", "untrained", "trained", "expert")
COLUMNS = 132


def table(path: Path) -> None:
    """Write what a terminal shows of the four players' comparison as an SVG."""
    words = ["-m", "evaluation", "compare", *(str(SAVES / "eval" / name) for name in PLAYERS)]
    environ = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(COLUMNS)}
    said = subprocess.run([sys.executable, *words, "--out", str(SAVES / "report.html")],
                          cwd=ROOT,
                          env=environ,
                          capture_output=True,
                          text=True,
                          check=True).stdout
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text.from_ansi(said.split("\nuntrained: ")[0]))
    path.write_text(console.export_svg(title="invoke quickstart", unique_id="quickstart"))


def page(path: Path) -> None:
    """Write the top of the report's page as a PNG."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium") or None)
        view = browser.new_page(viewport={"width": 1200, "height": 1500})
        view.goto((SAVES / "report.html").as_uri())
        view.wait_for_load_state("load")
        view.wait_for_timeout(1500)
        view.screenshot(path=str(path))
        browser.close()


def main() -> int:
    """Make both; return the exit code."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not all((SAVES / "eval" / name / "summary.json").is_file() for name in PLAYERS):
        print(f"pictures: no quickstart in {SAVES}; run `invoke quickstart` first", file=sys.stderr)
        return 2
    table(HERE / "quickstart.svg")
    page(HERE / "report.png")
    print(f"pictures: {HERE / 'quickstart.svg'}, {HERE / 'report.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
