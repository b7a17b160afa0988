"""The report in a real headless Chromium: filter, open, keys, links, hostile content, dark mode, ten thousand attempts."""
import io
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from evaluation import compared, pictures, report
from evaluation.items import category_of
from evaluation.numbers import summarize
from evaluation.output import Output
from tests.evaluation.samples import attempt
from tests.fixtures.needs import missing

HOSTILE = "<script>window.stolen = 1</script><img src=x onerror='window.stolen = 2'></script><!--"


def config(model="m", items=()):
    return {"env": "demo", "model": model, "samples": 1, "max_round": 5, "items": list(items)}


def told(model="m", user="Do this."):
    return {
        "config": config(model), "title": "A game", "items_from": "--items", "revision": "abc", "work": [{"started": "2026-01-01", "seconds": 2.0}],
        "prompt": {"source": "plain", "place": "", "revision": "", "user": user}
    }


def record(number, outcome="success", reward=1.0, text="count 3", category="", sample=0, **more):
    return {
        **attempt(f"demo_{number}", sample, outcome, reward, category), "index": number, "seed": None, "seconds": 1.25, "error": "",
        "task": "abc", "started": "2026-01-01T00:00:00", "first": text,
        "turns": [{"completion": f"I think\n\ntake {text}", "action": "take", "observation": text, "reward": 0.0},
                  {"completion": "what?", "action": None, "invalid": True, "observation": "refused"}], **more
    }


def run(records, model="m", **options):
    return compared.Run(model, told(model, **options), records, summarize(records, 1))


@pytest.fixture(scope="module")
def chromium():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        missing("chromium", "no Chromium (Debian: apt install chromium)")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Page:
    """A report in the browser, without a network; console errors and requests are kept."""

    def __init__(self, browser, path: Path, fragment: str = "", **options) -> None:
        self.context = browser.new_context(**{"offline": True, "viewport": {"width": 1200, "height": 900}, **options})
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.address = path.as_uri()
        self.page.goto(self.address + fragment)
        self.page.wait_for_selector("html[data-ready=yes]")

    def rows(self) -> list[str]:
        return self.page.locator("#table tbody tr td:first-child").all_inner_texts()

    def close(self) -> None:
        self.context.close()
        assert self.errors == []
        assert [url for url in self.requests if not url.startswith(("file:", "data:"))] == []


@pytest.fixture
def page(chromium, tmp_path):
    pages = []

    def opened(runs, fragment="", **options):
        report.write(tmp_path / "report.html", runs)
        pages.append(Page(chromium, tmp_path / "report.html", fragment, **options))
        return pages[-1]

    yield opened
    for one in pages:
        one.close()


MIXED = [record(0), record(1, "failure", 0.5, category="hard"), record(2, "env_error", error="HTTP 500", tries_before=[{
    "outcome": "env_error", "error": "torn"
}]), record(3, "max_rounds", 0.0, category="hard")]


def test_click_filter_and_read_a_trajectory(page):
    shown = page([run(MIXED)])
    inner = shown.page
    assert shown.rows() == ["demo_0", "demo_1", "demo_2", "demo_3"] and inner.inner_text("#shown") == "4 of 4 attempts"
    inner.select_option("#outcome", "failure")
    assert shown.rows() == ["demo_1"]
    inner.select_option("#outcome", "errors")
    assert shown.rows() == ["demo_2"]
    inner.select_option("#outcome", "")
    inner.select_option("#category", "hard")
    assert shown.rows() == ["demo_1", "demo_3"]
    inner.select_option("#category", "")
    inner.fill("#text", "_2")
    assert shown.rows() == ["demo_2"]
    inner.click("#table tbody button")
    inner.wait_for_selector("#columns article")
    text = inner.inner_text("#columns")
    assert "Error: HTTP 500" in text and "Earlier try, env_error: torn" in text and "Round 2" in text
    assert "Invalid action: refused, not sent" in text and "take count 3" in text and "refused" in text
    assert inner.evaluate("document.activeElement.id") == "viewer-title"  # a screen reader is taken along
    assert "item=demo_2" in inner.url


def turn(action, observation="seen", **more):
    return {"completion": f"Action: {action}", "action": action, "observation": observation, "reward": 0.0, **more}


def test_words_are_found_wherever_they_were_said(page):
    places = [{"first": "a Needle in the first observation"}, {"error": "needle torn"}, {"turns": [turn("go", reasoning="some NEEDLE")]},
              {"turns": [turn("take needle")]}, {"turns": [turn("go", "the\nneedle\"s eye")]}, {"turns": [{"completion": "x", "action": None, "refusal": "no needle"}]},
              {"turns": [turn("go", extras={"tool_calls": ["needle"]})]}, {"turns": [turn("go")]}]
    shown = page([run([record(n, **{"text": "nothing", **more}) for n, more in enumerate(places)])])
    inner = shown.page
    inner.fill("#said", "needle")
    inner.wait_for_selector("#shown:text-is('7 of 8 attempts')")
    inner.fill("#said", 'e\nneedle"S')
    inner.fill("#said", 'needle"S E')
    inner.wait_for_selector("#shown:text-is('1 of 8 attempts')")
    assert shown.rows() == ["demo_4"]
    inner.fill("#said", "(.*")  # words, no pattern
    inner.wait_for_selector("#shown:text-is('0 of 8 attempts')")
    inner.fill("#said", "nothingneedle")  # the end of one and the beginning of another
    inner.wait_for_selector("#shown:text-is('0 of 8 attempts')")
    inner.fill("#said", "needle torn")
    inner.wait_for_selector("#shown:text-is('1 of 8 attempts')")
    inner.fill("#said", "completion")  # a name of the page's own, which nobody said
    inner.wait_for_selector("#shown:text-is('0 of 8 attempts')")
    inner.fill("#said", "NEEDLE")
    inner.select_option("#outcome", "success")
    inner.fill("#text", "_2")
    inner.wait_for_selector("#shown:text-is('1 of 8 attempts')")
    inner.click("#table tbody button")
    inner.wait_for_selector("#columns .match details[open] pre:text-is('some NEEDLE')")  # unfolded, since it was looked for


def test_attempts_are_counted_by_item(page):
    first = [record(0), record(0, "failure", 0.5, sample=1), record(0, "env_error", sample=2), record(1, "failure", 0.25)]
    second = [record(0, sample=0), record(1), record(2, "timeout")]
    shown = page([run(first, "one"), run(second, "two")])
    inner = shown.page
    inner.select_option("#view", "items")
    cells = [row.locator("td").all_inner_texts() for row in inner.locator("#table tbody tr").all()]
    assert inner.locator("#table th").all_inner_texts() == ["item", "solved by one", "solved by two", "reward"]
    assert cells == [["demo_0", "1 of 2, 1 without a score", "1 of 1", "0.83"], ["demo_1", "0 of 1", "1 of 1", "0.63"],
                     ["demo_2", "", "0 of 0, 1 without a score", "–"]]
    assert inner.inner_text("#shown") == "3 of 3 items, 7 of 7 attempts"
    inner.click("#table th button:text-is('solved by one')")
    assert shown.rows() == ["demo_1", "demo_0", "demo_2"]  # an item that was not played comes last
    inner.select_option("#run", "1")
    assert inner.inner_text("#shown") == "3 of 3 items, 3 of 7 attempts"


def test_numbers_are_filtered_and_what_cannot_be_read_is_said(page):
    shown = page([run(MIXED)])
    inner = shown.page
    for where, kept in (("reward < 0.5", [3]), ("reward>=0.5, rounds = 3", [0, 1]), ("Reward != 1 and seconds > 1", [1, 3]), ("tokens > 1e3", []),
                        ("reward >= -1", [0, 1, 3]), ("", [0, 1, 2, 3])):
        inner.fill("#where", where)
        assert shown.rows() == [f"demo_{n}" for n in kept] and inner.is_hidden("#where-note"), where
    for where in ("reward <", "outcome = 3", "reward < x", "constructor = 1", "reward < 0.5; rounds = 3"):
        inner.fill("#where", where)
        assert inner.inner_text("#where-note").startswith(f'"{where}" is left out: ') and len(shown.rows()) == 4
        assert inner.get_attribute("#where", "aria-invalid") == "true"
    inner.fill("#where", "rounds = 3")
    assert inner.is_hidden("#where-note") and inner.get_attribute("#where", "aria-invalid") is None


def in_sight(inner, number: int) -> bool:
    """Return True once the top of a turn is the top of the window."""
    place = f"document.querySelector('[data-turn=\"{number}\"]').getBoundingClientRect().top"
    return any(abs(inner.evaluate(place)) < 5 or inner.wait_for_timeout(100) for _ in range(100))


def test_a_link_leads_to_a_turn_and_says_what_it_cost(page):
    turns = [turn(f"go {n}", "room " * 200, tokens=[1234, 56], seconds=2.34) for n in range(8)]
    shown = page([run([record(0, turns=turns)])], "#run=0&item=demo_0&sample=0&turn=4")
    inner = shown.page
    inner.wait_for_selector("#columns article")
    assert in_sight(inner, 4)
    assert "56 tokens after 1,234 · 2.3 s" in inner.inner_text("[data-turn='4']")
    inner.click("[data-turn='2'] h3 a")
    assert in_sight(inner, 2)
    assert inner.url.endswith("#run=0&item=demo_0&sample=0&turn=2")


@pytest.mark.parametrize("turn", ["9", "0", "-1", "1e999", "x", "2\"]", "%00"])
def test_a_link_to_a_turn_that_is_not_there_says_so(turn, page):
    inner = page([run(MIXED)], f"#run=0&item=demo_1&sample=0&turn={turn}").page
    inner.wait_for_selector("#copied:has-text('and this attempt has 2')")
    assert inner.inner_text("#viewer-title") == "demo_1" and inner.is_hidden("#lost")
    inner.evaluate("() => { location.hash = 'run=0&item=demo_1&sample=0&turn=2'; }")
    inner.wait_for_selector("#copied:has-text('this attempt')", state="detached")


@pytest.mark.parametrize("where", ["run=0&item=demo_9&sample=0", "run=0&item=demo_1&sample=7", "run=7&item=demo_1&sample=0", "item=demo_9", "item=%3Cimg%20src=x%3E&run=0&sample=0"])
def test_a_link_to_an_attempt_that_is_not_there_says_so(where, page):
    inner = page([run(MIXED)], f"#{where}").page
    inner.wait_for_selector("#lost:has-text('an attempt that this report does not have')")
    assert inner.is_hidden("#viewer")
    inner.evaluate("() => { location.hash = 'sample=0&item=demo_1&run=0'; }")  # in whatever order
    inner.wait_for_selector("#viewer-title:text-is('demo_1')")
    assert inner.is_hidden("#lost")


def test_what_was_said_in_place_of_an_answer_is_shown_and_turns_nothing(page):
    said = {"completion": "", "action": "", "observation": "a\u202eb", "refusal": "I can\u2066not", "extras": {"tool_calls": ["go north"]}}
    inner = page([run([record(0, turns=[said, turn("go")], error="\x1b[2K\u202etorn")])], "#run=0&item=demo_0&sample=0").page
    inner.wait_for_selector("#columns article")
    shown = inner.inner_text("#columns")
    for text in ("(empty)", "a\\u202eb", "I can\\u2066not", "tool_calls", "go north", "\\u001b[2K\\u202etorn"):
        assert text in shown, text
    assert not set(shown) & set("\u202e\u2066\x1b")


def test_what_is_searched_is_no_pattern(page):
    words = [".*", "a|b", "(", "[a-z]", "\\d", "$^", "a+b?", "{2}", "/x/", "-", "\\"]
    shown = page([run([record(n, turns=[turn(f"say {one} now", "")], text="") for n, one in enumerate(words)])])
    for number, one in enumerate(words):
        shown.page.fill("#said", f"say {one} now")
        shown.page.wait_for_selector("#shown:text-is('1 of 11 attempts')")
        assert shown.rows() == [f"demo_{number}"]
    shown.page.fill("#said", "")
    for where in (",", " and ", ",,", "   "):
        shown.page.fill("#where", where)
        shown.page.wait_for_selector("#shown:text-is('11 of 11 attempts')")
        assert shown.page.is_hidden("#where-note")


def test_long_words_are_folded_and_come_whole(page):
    parts = ["".join(f"{kind} {n} of a long line that goes on\n" for n in range(6_000)) for kind in ("wall", "door")] + ["x" * 200_000]
    shown = page([run([record(0, turns=[turn("look", text, reasoning="why not" * 9) for text in parts]), record(1)])])
    inner = shown.page
    inner.click("#table tbody button >> nth=0")
    inner.wait_for_selector("#columns article")
    assert len(inner.inner_text("#columns")) < 20_000 and not inner.is_visible("#columns details pre")
    inner.click("#columns details summary >> nth=0")
    assert inner.is_visible("#columns details pre >> nth=0")
    for number, text in enumerate(parts):
        place = inner.locator(f"[data-turn='{number + 1}']")
        place.locator("button").click()
        blocks = place.locator("pre .block").evaluate_all("(all) => all.map((one) => one.textContent)")
        assert len(blocks) >= 4 and ("\n" if "\n" in text else "").join(blocks) == text


def test_words_of_every_script_come_whole(page):
    texts = ["Grüße 世界 😀", "half \ud83d a pair", "İstanbul ﬁ", "😀" * 30_000, "a\u2028b\x00c", ""]
    records = [record(n, text=text, turns=[turn("go", text, reasoning=text or None, extras={"k": text}), turn("stop " + text)]) for n, text in enumerate(texts)]
    shown = page([run(records)], "#run=0&item=demo_5&sample=0")
    shown.context.grant_permissions(["clipboard-read", "clipboard-write"])
    inner = shown.page
    for number, text in enumerate(texts):
        inner.evaluate(f"() => {{ location.hash = 'run=0&item=demo_{number}&sample=0'; }}")
        inner.wait_for_selector(f"#viewer-title:text-is('demo_{number}')")
        inner.click("#copy")
        inner.wait_for_selector("#copied:has-text('copied')")
        copied = json.loads(inner.evaluate("navigator.clipboard.readText()"))
        as_written = text.encode("utf-8", "backslashreplace").decode()
        assert (copied["first"], copied["turns"][0]["observation"], copied["turns"][1]["action"]) == (as_written, as_written, "stop " + as_written)
        assert copied["turns"][0]["extras"] == {"k": text}
    for words, found in (("世界", 1), ("i̇STANBUL", 0), ("İSTANBUL", 1), ("😀😀", 1), ("GRÜSSE", 0), ("grüße", 1)):
        inner.fill("#said", words)
        inner.wait_for_selector(f"#shown:text-is('{found} of 6 attempts')")


def test_an_attempt_is_copied_as_json(page):
    shown = page([run(MIXED)], "#run=0&item=demo_1&sample=0")
    shown.context.grant_permissions(["clipboard-read", "clipboard-write"])
    inner = shown.page
    inner.wait_for_selector("#columns article")
    inner.click("#copy")
    inner.wait_for_selector("#copied:has-text('copied')")
    copied = json.loads(inner.evaluate("navigator.clipboard.readText()"))
    assert {key: copied[key] for key in ("run", "item", "sample", "outcome", "reward", "category", "turns", "first")} == {
        "run": "m", **{key: MIXED[1][key] for key in ("item", "sample", "outcome", "reward", "category", "turns", "first")}}


def test_a_tree_shows_where_attempts_at_an_item_part(page):
    north, south = ["open door", "go north", "take key", "win"], ["open door", "go south"]
    attempts = [(north, "success", 1.0), (south, "failure", 0.0), (north, "success", 1.0), (["open door"], "max_rounds", 0.0)]
    records = [record(0, how, won, sample=n, turns=[turn(one) for one in actions]) for n, (actions, how, won) in enumerate(attempts)]
    records.append(record(0, "failure", 0.0, sample=4, turns=[{"completion": HOSTILE, "action": None, "invalid": True}]))
    inner = page([run([*records, record(1)])], "#item=demo_0").page
    inner.wait_for_selector("#columns article")
    # [numbers of attempts, actions, what ends there, branches]
    shape = """(place) => [place.querySelector(':scope > p').textContent,
        [...place.querySelectorAll(':scope > .steps > li, :scope > details > .steps > li')].map((one) => one.textContent),
        [...place.querySelectorAll(':scope > .tree > li')].map((one) => one.querySelector(':scope > p') ? grow(one) : one.textContent)]"""
    grown = inner.evaluate("() => { const grow = " + shape + "; return grow(document.querySelector('#columns .tree > li')); }")
    assert grown == ["5 attempts, solved 2 of 5", [], [
        ["4 attempts, solved 2 of 4", ["open door"], [
            "ends here: m, sample 3 max_rounds 0.00",
            ["2 attempts, solved 2 of 2", ["go north", "take key", "win"], ["ends here: m, sample 0 success 1.00", "ends here: m, sample 2 success 1.00"]],
            ["1 attempt, solved 0 of 1", ["go south"], ["ends here: m, sample 1 failure 0.00"]]]],
        ["1 attempt, solved 0 of 1", ["(no valid action)"], ["ends here: m, sample 4 failure 0.00"]]]]
    inner.click("#columns a:text-is('m, sample 2')")
    inner.wait_for_selector("#columns h3:has-text('sample 2')")
    inner.click("#whole-item")
    inner.wait_for_selector("#columns .tree")
    assert inner.inner_text("#viewer-title") == "demo_0" and inner.is_hidden("#copy")


def test_on_a_telephone_an_id_stays_in_one_piece(page):
    names = ["sciworld_1502", "a-b-c_42 with words", "x" * 300]
    records = [{**record(n), "item": name} for n, name in enumerate(names)]
    inner = page([run(records, "Qwen/Qwen2.5-7B-Instruct-with-a-long-name"), run(records, "b")], viewport={"width": 390, "height": 800}).page
    heights = inner.evaluate("[...document.querySelectorAll('#table td.item button')].map((one) => one.getBoundingClientRect().height)")
    assert len(heights) == 6 and max(heights) < 30  # one line of text each
    assert inner.evaluate("document.documentElement.scrollWidth") <= 390
    inner.select_option("#view", "items")
    assert inner.evaluate("document.documentElement.scrollWidth") <= 390
    inner.click("#table tbody button >> nth=0")
    inner.wait_for_selector("#columns article")
    assert inner.evaluate("document.documentElement.scrollWidth") <= 390


def test_columns_sort(page):
    shown = page([run(MIXED)])
    button = shown.page.locator("#table th button", has_text="reward")
    button.click()
    assert shown.rows() == ["demo_3", "demo_1", "demo_0", "demo_2"]  # no reward comes last
    button.click()
    assert shown.rows()[0] == "demo_0" and shown.page.get_attribute("th:has(button:text('reward'))", "aria-sort") == "descending"


def test_the_keyboard_is_enough(page):
    shown = page([run(MIXED)])
    inner = shown.page
    inner.keyboard.press("j")
    inner.wait_for_selector("#columns article")
    assert inner.inner_text("#viewer-title") == "demo_0"
    inner.keyboard.press("j")
    inner.wait_for_selector("#viewer-title:text-is('demo_1')")
    inner.keyboard.press("k")
    inner.wait_for_selector("#viewer-title:text-is('demo_0')")
    inner.keyboard.press("Escape")
    assert inner.is_hidden("#viewer") and inner.evaluate("document.activeElement.textContent") == "demo_0"
    inner.keyboard.press("/")
    inner.keyboard.type("_3")
    assert shown.rows() == ["demo_3"]


def test_a_link_leads_to_an_attempt(page):
    shown = page([run(MIXED)], "#run=0&item=demo_3&sample=0")
    shown.page.wait_for_selector("#columns article")
    assert shown.page.inner_text("#viewer-title") == "demo_3"


def test_the_way_back_leads_out_of_an_attempt(page):
    inner = page([run(MIXED)]).page
    inner.click("#table tbody button >> nth=0")
    inner.wait_for_selector("#columns article")
    inner.click("#table tbody button >> nth=1")
    inner.wait_for_selector("#viewer-title:text-is('demo_1')")
    inner.go_back()
    inner.wait_for_selector("#viewer-title:text-is('demo_0')")
    inner.go_back()
    inner.wait_for_selector("#viewer", state="hidden", timeout=5000)
    assert inner.evaluate("document.activeElement.textContent") == "demo_0" and "#" not in inner.url
    inner.go_forward()
    inner.wait_for_selector("#viewer-title:text-is('demo_0')")


def test_runs_stand_side_by_side(page):
    shown = page([run(MIXED, "before"), run([record(n, text="other words") for n in range(4)], "after")])
    inner = shown.page
    assert inner.locator(".numbers thead th").all_inner_texts()[:2] == ["before", "after"] and len(shown.rows()) == 8
    inner.click("#table tbody button >> nth=0")
    inner.wait_for_selector("#columns article")
    inner.select_option("#beside", index=1)
    inner.wait_for_selector("#columns article >> nth=1")
    both = inner.locator("#columns article").all_inner_texts()
    assert "count 3" in both[0] and "other words" in both[1]


def test_hostile_words_stay_words(page):
    bad = record(0, text=HOSTILE, category=HOSTILE, error=HOSTILE, tries_before=[{"outcome": "env_error", "error": HOSTILE}])
    bad["item"] = HOSTILE
    shown = page([run([bad, record(1, text=HOSTILE)], HOSTILE, user=HOSTILE), run([record(0)], "calm")])
    inner = shown.page
    assert shown.rows()[0] == HOSTILE
    inner.click("#table tbody button >> nth=0")
    inner.wait_for_selector("#columns article")
    assert inner.inner_text("#columns").count("window.stolen = 1") >= 3
    inner.wait_for_timeout(200)
    assert inner.evaluate("window.stolen") is None and inner.locator("img").count() == 0
    # Even markup that got in could not run: the policy names the one script that may.
    inner.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=data:x onerror=\"window.stolen = 3\">')")
    inner.wait_for_timeout(200)
    assert inner.evaluate("window.stolen") is None
    shown.errors = [error for error in shown.errors if "Content Security Policy" not in error]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_in_light_and_dark(scheme, page):
    inner = page([run(MIXED)], color_scheme=scheme).page
    # WCAG's contrast of text and marks on their ground, computed in the page.
    contrast = """(selector) => {
        const light = (colour) => { const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((v) => { v /= 255;
            return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const [a, b] = [light(getComputedStyle(document.querySelector(selector)).color), light(getComputedStyle(document.body).backgroundColor)];
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); }"""
    for selector in ("body", ".note", ".facts", "#table td button", "td.success", "td.failure", "td.env_error"):
        assert inner.evaluate(contrast, selector) >= 4.5, selector
    bright = inner.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert bright is (scheme == "light")


def test_everything_has_a_name_for_whoever_cannot_see_it(page):
    inner = page([run(MIXED)]).page
    assert inner.evaluate("[...document.querySelectorAll('input, select')].every((one) => one.labels.length === 1)")
    assert inner.evaluate("[...document.querySelectorAll('figure')].every((one) => one.getAttribute('aria-label').length > 10)")
    assert inner.evaluate("[...document.querySelectorAll('button')].every((one) => one.textContent.trim().length > 0)")
    assert inner.get_attribute("html", "lang") == "en" and inner.locator("h1").count() == 1


def test_ten_thousand_attempts_open_and_filter(chromium, tmp_path):
    turns = [{"completion": f"Thought: {n}\nAction: go {n}", "action": f"go {n}", "observation": f"room {n} " * 12, "reward": 0.0} for n in range(10)]
    records = [record(n, *(("success", 1.0) if n % 3 else ("failure", 0.25)), turns=turns, category=f"c{n % 5}") for n in range(10_000)]
    report.write(tmp_path / "large.html", [run(records)])
    shown = Page(chromium, tmp_path / "large.html")
    assert shown.page.inner_text("#shown") == "10000 of 10000 attempts"
    shown.page.fill("#said", "ACTION: GO 3")
    shown.page.wait_for_selector("#shown:text-is('10000 of 10000 attempts')")
    shown.page.fill("#said", "no such words")
    shown.page.wait_for_selector("#shown:text-is('0 of 10000 attempts')")
    shown.page.fill("#said", "")
    shown.page.fill("#text", "_9999")
    shown.page.wait_for_selector("#shown:text-is('1 of 10000 attempts')")
    assert shown.rows() == ["demo_9999"]
    shown.page.click("#table tbody button")
    shown.page.wait_for_selector("#columns article")
    shown.close()


def test_the_page_has_the_numbers_without_a_browser(tmp_path):
    report.write(tmp_path / "x.html", [run(MIXED)])
    page = (tmp_path / "x.html").read_text()
    assert "33.3 % [6.1, 79.2]" in page and not re.search(r'(src|href)="(https?:)?//', page)
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', page, re.DOTALL)[1])
    assert [row[4] for row in data["rows"]] == ["success", "failure", "env_error", "max_rounds"]
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_runs_of_one_model_are_told_apart_by_their_folders():
    p, q = Path("p"), Path("q")
    assert compared.names([("a", p), ("b", q)]) == ["a", "b"]
    assert compared.names([("a", p / "r"), ("a", q / "s")]) == ["a (r)", "a (s)"]
    assert compared.names([("a", p / "r"), ("a", q / "r")]) == ["a (p/r)", "a (q/r)"]
    assert compared.names([("a", p), ("a", p)]) == ["1: a (p)", "2: a (p)"]


def test_a_comparison_says_how_many_items_were_another_task(tmp_path):
    one, other = run([record(n) for n in range(3)], "a"), run([record(n, task="abc" if n else "xyz") for n in range(3)], "b")
    line, = compared.difference_lines([one, other])
    assert line["items"] == "2 (1 more were another task and are left out)"
    assert line["items"] in report.render([one, other])
    # Another prompt dresses the first observation in other words: its digest then tells nothing.
    other.manifest["prompt"]["before_first"] = "Before.\n"
    assert compared.difference_lines([one, other])[0]["items"] == "3"


def test_runs_of_different_environments_are_not_paired():
    one, other = run([record(n) for n in range(3)], "a"), run([record(n, "failure", 0.0) for n in range(3)], "b")
    assert len(compared.difference_lines([one, other, one])) == 2
    other.manifest["config"]["env"] = "maze"
    assert [line["name"] for line in compared.difference_lines([one, other, one])] == ["a − a"]
    assert "Differences, item by item" not in report.render([one, other])


def test_names_that_are_no_utf_8_end_no_report(tmp_path):
    path = Path(os.fsdecode(b"searchqa_h\xffrd_test.json"))
    runs = [run([record(0, category=category_of(path, "searchqa"))], name) for name in compared.names([("m", Path(os.fsdecode(b"o\xff"))), ("m", Path("p"))])]
    runs[0].manifest["items_from"] = path.name
    report.write(tmp_path / "x.html", runs)
    page = (tmp_path / "x.html").read_text()
    assert "m (o\ufffd)" in page and "h\ufffdrd" in page and "searchqa_h\ufffdrd_test.json" in page


@pytest.mark.parametrize("encoding,shown", [("utf-8", b"report: o\\udcff/\xc3\xa9\n"), ("ascii", b"report: o\\udcff/\\xe9\n")])
def test_a_name_that_the_output_cannot_spell_is_shown_as_an_escape(encoding, shown):
    out = io.TextIOWrapper(io.BytesIO(), encoding)
    print("report: o\udcff/é", file=Output(out), flush=True)
    assert out.buffer.getvalue() == shown


def test_each_training_has_a_curve_of_its_own():
    def of(name, env="demo"):
        made = run([record(n) for n in range(3)], name)
        made.manifest["config"]["env"] = env
        return made

    two = [of(f"{training}-global_step_{step}") for training in "ab" for step in (200, 100)]
    assert {name: [step for step, _ in points] for name, points in compared.by_training(two).items()} == {"a": [100, 200], "b": [100, 200]}
    curve, = (chart for chart in pictures.draw(two) if chart["title"] == "Reward by training step")
    assert curve["words"].startswith("a: step 100: ") and "; b: step 100: " in curve["words"]
    mixed = [of("x-global_step_1"), of("x-global_step_2"), of("x-global_step_3", "textcraft")]
    assert list(compared.by_training(mixed)) == ["demo: x"] and len(compared.by_training(mixed)["demo: x"]) == 2
    assert "<title>demo, textcraft: x-global_step_1" in report.render(mixed)
    assert compared.by_training([of("a-global_step_1"), of("b-global_step_2")]) == {}


@pytest.mark.parametrize("models,curve", [
    (["x-global_step_1-actor-00112233", "x-global_step_20-actor-aabbccdd"], {"x-actor": [1, 20]}),
    (["global_step_1-0011aabb", "global_step_2-2233ccdd"], {"step": [1, 2]}),
    (["org/x-step-1", "org/x-step-2"], {"org/x": [1, 2]}),
    (["x-global_step_1", "x-global_step_1", "x-global_step_2"], {"x": [1, 1, 2]}),
    (["x-global_step_1", "x-global_step_1"], {}),
    (["two-step-7b-instruct", "two-step-8b-instruct"], {}),
    (["stepfun-step2-mini", "stepfun-step3-mini"], {}),
    (["onestep1", "onestep2"], {}),
], ids=["checkpoints", "nothing but steps", "steps of one's own", "a step twice", "one step alone", "a size", "a version", "within a word"])
def test_the_step_is_a_word_and_the_rest_is_the_training(models, curve):
    # Where models repeat, runs are called after their folders too.
    called = compared.names([(model, Path(f"saves/eval/demo-{n}")) for n, model in enumerate(models)])
    runs = [compared.Run(name, told(model), [record(0)], summarize([record(0)], 1)) for name, model in zip(called, models, strict=True)]
    assert {name: [step for step, _ in points] for name, points in compared.by_training(runs).items()} == curve


def test_a_category_that_a_run_never_played_has_no_bar():
    from evaluation import charts
    drawn = {}

    def keep(labels, runs, name, *rest, **more):
        drawn[name] = runs
        return ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "bars", keep)
        pictures.draw([run([record(0, category="easy")], "one"), run([record(0, category="hard")], "two")])
    assert str(drawn["categories"]) == "{'one': [1.0, nan], 'two': [nan, 1.0]}"
    assert "<svg" in pictures.draw([run([record(0, category="easy")], "one"), run([record(0, category="hard")], "two")])[-1]["svg"]


@pytest.mark.parametrize("category", ["", "hard"])
def test_charts_keep_runs_whose_names_begin_alike(category):
    ends = ["Qwen/Qwen2.5-7B-Instruct (textcraft-Qwen2.5-7B-Instruct-" + end for end in ("1a2b3c4d)", "9f8e7d6c)")]
    drawn = pictures.draw([run([record(n, category=category) for n in range(3)], name) for name in ends])
    for chart in drawn:
        assert "1a2b3c4d)" in chart["svg"] and "9f8e7d6c)" in chart["svg"], chart["title"]
    assert len(drawn) == (4 if category else 3)
