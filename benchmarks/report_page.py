"""How fast the evaluation's report answers in a browser: ten thousand attempts searched, turns of megabytes opened.

    python benchmarks/report_page.py [--attempts 10000] [--runs 5] [--json]

Needs Chromium and playwright. Times are the page's own, from the key or the click to what is drawn (two frames later);
the page is loaded anew for each run. Goals: a search in under 0.5 s, four turns of 5 MB in under 1 s.
"""
import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval_runner import large_run

from evaluation import report

# From `begin()` to the first frame after `reached()` holds.
TIMED = """([begin, reached]) => new Promise((resolve) => {
    const at = (id) => document.getElementById(id);
    const type = (id, text) => { at(id).focus(); at(id).value = text; at(id).dispatchEvent(new Event('input')); };
    const steps = {
        search: () => type('said', 'inventory: [oak'), again: () => type('said', 'act 7'), none: () => type('said', 'no such words'),
        open: () => document.querySelector('#table tbody button').click(),
        all: () => { for (const button of document.querySelectorAll('#columns .turn > div > button')) button.click(); },
    };
    const holds = {
        counted: () => at('shown').textContent.endsWith('attempts'),
        drawn: () => document.querySelector('#columns article') !== null,
    };
    const began = performance.now();
    const look = () => holds[reached]() ? requestAnimationFrame(() => requestAnimationFrame(() => resolve(performance.now() - began))) : setTimeout(look, 1);
    steps[begin]();
    look();
})"""
STEPS = {
    "large": (("first search, all attempts have it", "search", "counted"), ("second search", "again", "counted"),
              ("search that finds nothing", "none", "counted")),
    "long": (("opening four turns of 5 MB, folded", "open", "drawn"), ("unfolding all four", "all", "drawn")),
}


def measure(attempts: int, runs: int, chromium: str) -> dict[str, list[float]]:
    """Return the seconds of each step, `runs` times."""
    from playwright.sync_api import sync_playwright
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        long = large_run(1, 4)
        for number, turn in enumerate(long.records[0]["turns"]):
            turn["observation"] = f"line {number} of a long one\n" * 220_000
        pages = {name: Path(folder) / f"{name}.html" for name in STEPS}
        report.write(pages["large"], [large_run(attempts, 10)])
        report.write(pages["long"], [long])
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for _ in range(runs):
            for name, path in pages.items():
                tab = browser.new_page(viewport={"width": 1200, "height": 900})
                tab.goto(path.as_uri())
                tab.wait_for_selector("html[data-ready=yes]")
                for title, begin, reached in STEPS[name]:
                    figures.setdefault(title, []).append(tab.evaluate(TIMED, [begin, reached]) / 1000)
                tab.close()
        browser.close()
    return figures


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attempts", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise SystemExit("report_page: no Chromium here (Debian: apt install chromium)")
    figures = measure(options.attempts, options.runs, chromium)
    if options.json:
        print(json.dumps(figures))
        return
    print(
        f"| {options.attempts} attempts of 10 rounds, and one attempt of 4 x 5 MB | median s (least–most) |\n|---|---|")
    for title, seconds in figures.items():
        print(f"| {title} | {statistics.median(seconds):.2f} ({min(seconds):.2f}–{max(seconds):.2f}) |")


if __name__ == "__main__":
    main()
