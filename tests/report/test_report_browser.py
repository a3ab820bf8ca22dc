"""Reports in a real browser: they render, run only their own code, and work on phones, in the dark and by keyboard."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from qlora_train.report.write_report import write_comparison, write_report
from qlora_train.runs import RunFolder, write_json
from tests.support.browser import HOW_TO_GET_ONE, chromium, open_browser
from tests.support.report_runs import (
    begun_run,
    segment,
    write_answers,
    write_data_report,
    write_lines,
    write_metrics,
)

pytestmark = pytest.mark.skipif(chromium() is None, reason=HOW_TO_GET_ONE)
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
NUM_ROWS = 30
HOSTILE = (
    "<script>window.hacked=1</script>", "</script><script>window.hacked=1</script>",
    '"><img src=x onerror="window.hacked=1">',
    "' onmouseover='window.hacked=1", "<svg/onload=window.hacked=1>", "{{7*7}}{% raw %}${7*7}", "a\0b\x1b[2Jc\x07",
    "\u202egnp.exe\u2066\u200f", "\ud800", "W" * 5000, "\u0623\u0647\u0644\u0627 \U0001f600", "<!--", "]]>", "&lt;b&gt;",
    "javascript:window.hacked=1", "</style><style>body{display:none}</style>",
)  # fmt: skip
"""Texts that act, or break a page, where they are not escaped."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = chromium()
    assert executable is not None
    with open_browser(executable) as opened:
        yield opened


def full_run(folder: Path, name: str, *, offset: float = 0.0) -> RunFolder:
    """Return a run with something in every part of the page."""
    run = begun_run(folder, name=name)
    write_metrics(run, offset=offset)
    right = 10 if offset else 20
    write_answers(run, [(f"answer {i}", "no", f"answer {i}" if i < right else "wrong") for i in range(NUM_ROWS)])
    write_data_report(run, [segment("Question\n", trained=False), segment("Answer", trained=True)])
    write_lines(
        run.path / "samples.jsonl",
        [{"step": step, "row": 0, "prompt": "Q", "expected": "A", "generated": "A" * step} for step in (1, 2)],
    )
    row = {"where": "rows.jsonl:3", "num_tokens": 4, "num_labels": 2, "warnings": []}
    rows = [{"where": "rows.jsonl:3", "loss": 2.5, "sequences": [{**row, "segments": [segment("x", trained=True)]}]}]
    part = {"num_rows": 9, "num_measured": 3, "median": 0.5, "rows": rows, "other_rows": []}
    write_json(run.row_losses_file, {"step": 40, "train": part, "eval": part})
    write_json(
        run.path / "plan.json", {"peak_bytes": 2_100_000_000, "num_steps": 40, "parts": {"weights": 3, "adapter": 1}}
    )
    run.record_command("qlora-train run.yaml")
    return run


class Opened:
    """A page that is open, with what its console said."""

    def __init__(self, page: Page, file: Path) -> None:
        self.page, self.messages = page, list[str]()
        page.on("console", lambda message: self.messages.append(message.text))
        page.on("pageerror", lambda error: self.messages.append(str(error)))
        page.on("request", lambda request: self.messages.append(request.url) if request.url != file.as_uri() else None)
        page.goto(file.as_uri())

    def value(self, script: str) -> Any:
        return self.page.evaluate(script)

    def background(self) -> str:
        return str(self.value("getComputedStyle(document.body).backgroundColor"))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(full_run(tmp_path_factory.mktemp("run"), "first").path)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    runs = [full_run(folder, "first"), full_run(folder, "second", offset=0.4)]
    return write_comparison([run.path for run in runs], folder / "comparison.html")


def opened(browser: Browser, file: Path, viewport: dict[str, int], **context: Any) -> Opened:
    return Opened(browser.new_page(viewport=viewport, **context), file)  # type: ignore[arg-type]


def drawn_pixels(page: Page) -> list[int]:
    """Return the number of drawn pixels of each canvas."""
    return page.evaluate(  # type: ignore[no-any-return]
        """[...document.querySelectorAll("canvas")].map((canvas) => {
            const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            return data.filter((value, index) => index % 4 === 3 && value > 0).length;
        })"""
    )


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_page_renders_without_a_message_and_fits_its_width(
    name: str, scheme: str, viewport: dict[str, int], browser: Browser, request: pytest.FixtureRequest
) -> None:
    shown = opened(browser, request.getfixturevalue(name), viewport, color_scheme=scheme)
    assert shown.messages == [], "console, errors and requests"
    assert shown.value("document.documentElement.scrollWidth") <= viewport["width"]
    assert len(drawn_pixels(shown.page)) == {"report": 5, "comparison": 6}[name]
    assert min(drawn_pixels(shown.page)) > 1000
    red = int(shown.background().removeprefix("rgb(").split(",")[0])
    assert (red < 60) == (scheme == "dark")
    shown.page.close()


def test_charts_have_the_points_and_a_cursor_that_keys_move(report: Path, browser: Browser) -> None:
    shown = opened(browser, report, DESKTOP)
    points = json.loads(shown.value("document.getElementById('chart-data').textContent"))
    assert [len(chart["steps"]) for chart in points] == [20] * 5
    plot = shown.page.locator(".plot").first
    plot.focus()
    shown.page.keyboard.press("Home")
    announced = shown.page.locator("#announcer")
    assert announced.text_content() == "step 2, training, running mean 1.1"
    for _ in range(4):
        shown.page.keyboard.press("ArrowRight")
    assert str(announced.text_content()).startswith("step 10, training, running mean ")
    assert str(announced.text_content()).endswith("held out 0.35")
    legends = shown.page.locator(".u-legend .u-series:first-child .u-value").all_text_contents()
    assert legends == ["10"] * 5, "the cursor is shared"
    shown.page.keyboard.press("End")
    assert str(announced.text_content()).startswith("step 40")
    shown.page.close()


def test_tooltip_shows_the_values_under_the_mouse(report: Path, browser: Browser) -> None:
    shown = opened(browser, report, DESKTOP)
    shown.page.locator(".plot .u-over").first.hover()
    tip = shown.page.locator(".plot .tip").first
    assert tip.is_visible()
    assert "step 20" in str(tip.text_content()) or "step 22" in str(tip.text_content())
    assert "running mean" in str(tip.text_content())
    shown.page.close()


def test_theme_button_goes_round_and_is_remembered(report: Path, browser: Browser) -> None:
    shown = opened(browser, report, DESKTOP, color_scheme="light")
    button = shown.page.locator("#theme")
    light = shown.background()
    seen = []
    for _ in range(3):
        button.click()
        seen.append((button.text_content(), shown.background() == light))
    assert seen == [("Theme: light", True), ("Theme: dark", False), ("Theme: auto", True)]
    button.click()
    button.click()
    shown.page.reload()
    assert button.text_content() == "Theme: dark"
    assert shown.background() != light
    shown.page.close()


def test_filters_and_more_work_by_keyboard(report: Path, browser: Browser) -> None:
    shown = opened(browser, report, DESKTOP)
    rows = shown.page.locator("#answer-rows article:visible")
    assert rows.count() == 12
    shown.page.locator("[data-more=answer-rows]").press("Enter")
    assert rows.count() == 24
    wrong = shown.page.get_by_role("button", name="still wrong 10")
    wrong.press("Space")
    assert wrong.get_attribute("aria-pressed") == "true"
    assert rows.count() == 10
    assert shown.page.locator("[data-count=answer-rows]").text_content() == "10 of 10 rows shown"
    assert shown.page.locator("#settings tr:visible").count() == 15
    shown.page.get_by_role("button", name="all").last.press("Enter")
    assert shown.page.locator("#settings tr:visible").count() > 60
    shown.page.close()


def test_first_tab_skips_to_the_report_and_focus_is_visible(report: Path, browser: Browser) -> None:
    shown = opened(browser, report, PHONE)
    shown.page.keyboard.press("Tab")
    assert shown.value("document.activeElement.className") == "skip"
    assert shown.page.locator(".skip").bounding_box()["y"] > 0  # type: ignore[index]
    shown.page.keyboard.press("Enter")
    assert shown.value("location.hash") == "#main"
    for _ in range(12):
        shown.page.keyboard.press("Tab")
        width = shown.value("getComputedStyle(document.activeElement).outlineWidth")
        assert width == "2px", shown.value("document.activeElement.outerHTML")
    shown.page.close()


def test_screen_readers_find_parts_by_their_names(report: Path, browser: Browser) -> None:
    shown = opened(browser, report, DESKTOP)
    for name in ("Training", "Answers before and after", "Rows to look at", "Data", "Checks", "Reproduce"):
        assert shown.page.get_by_role("region", name=name, exact=True).count() == 1
    assert shown.page.get_by_role("img", name="Loss by optimizer step").count() == 1
    assert shown.page.get_by_role("navigation", name="Sections").count() == 1
    assert shown.page.get_by_role("table", name="Metrics by optimizer step", include_hidden=True).count() == 1
    shown.page.close()


COLOURS_OF_TEXTS = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (text) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = text;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const behind = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = rgba(getComputedStyle(each).backgroundColor);
      if (colour[3] > 0) return colour;
    }
    return [255, 255, 255, 255];
  };
  return [...document.querySelectorAll("body *")]
    .filter((element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim()))
    .filter((element) => element.checkVisibility() && !element.closest("script, .hidden, .skip"))
    .map((element) => [rgba(getComputedStyle(element).color), behind(element), element.outerHTML.slice(0, 90)]);
})()
"""


def luminance(colour: list[int]) -> float:
    """Return the relative luminance of WCAG 2.2."""
    parts = [value / 255 for value in colour[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in parts]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: list[int], other: list[int]) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_every_text_has_the_contrast_of_wcag_aa(
    name: str, scheme: str, browser: Browser, request: pytest.FixtureRequest
) -> None:
    shown = opened(browser, request.getfixturevalue(name), DESKTOP, color_scheme=scheme)
    texts = shown.value(COLOURS_OF_TEXTS)
    assert len(texts) > 50
    assert [where for colour, behind, where in texts if contrast(colour, behind) < 4.5] == []
    shown.page.close()


def test_comparison_shows_the_rows_that_runs_disagree_on(comparison: Path, browser: Browser) -> None:
    shown = opened(browser, comparison, DESKTOP)
    assert shown.page.locator("#answer-rows article:visible").count() == 10
    names = shown.page.locator(".plot").nth(1).locator(".u-legend .u-label").all_text_contents()
    assert names == ["step", "first", "second"]
    assert shown.page.locator("#results .best").count() == 1, "the held-out loss"
    shown.page.close()


def hostile_run(folder: Path) -> RunFolder:
    """Return a run whose rows, names, answers, config and paths are all hostile."""
    run = begun_run(folder, name="<img src=x onerror=window.hacked=1>")
    config = run.config_file.read_text(encoding="utf-8")
    run.config_file.write_text(
        config.replace(str(folder / "base"), "'<script>window.hacked=1</script>'"), encoding="utf-8"
    )
    lines = [{"step": 1, "loss": 1.0, text: 1.0, f"eval_{text}": 2.0} for text in HOSTILE[:9]]
    write_lines(run.metrics_file, [*lines, {"step": 2, "loss": 0.5}])
    write_answers(run, [(text, text, f"{text}!") for text in HOSTILE])
    write_data_report(
        run, [segment(text, trained=bool(i % 2)) for i, text in enumerate(HOSTILE)], where=f"{HOSTILE[2]}:1"
    )
    write_lines(
        run.path / "samples.jsonl",
        [{"step": 1, "row": i, "prompt": text, "expected": text, "generated": text} for i, text in enumerate(HOSTILE)],
    )
    sequence = {"where": HOSTILE[0], "num_tokens": 1, "num_labels": 1, "warnings": []}
    sequence["segments"] = [segment(text, trained=True) for text in HOSTILE]
    rows = [{"where": text, "loss": 1.0, "sequences": [sequence]} for text in HOSTILE]
    part = {"num_rows": 1, "num_measured": 1, "median": 1.0, "rows": rows, "other_rows": []}
    write_json(run.row_losses_file, {"step": 1, "train": part, "eval": part})
    write_json(
        run.metadata_file,
        {"base": HOSTILE[2], "device": HOSTILE[1], "versions": dict(zip(HOSTILE, HOSTILE, strict=True)), "changes": []},
    )
    write_json(run.path / "plan.json", {"peak_bytes": 10, "num_steps": 1, "parts": dict.fromkeys(HOSTILE, 1)})
    for text in HOSTILE[:6]:
        run.record_command(text)
    return run


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("several", [False, True], ids=["report", "comparison"])
def test_hostile_texts_run_nothing_and_keep_the_layout(
    several: bool, viewport: dict[str, int], browser: Browser, tmp_path: Path
) -> None:
    run = hostile_run(tmp_path)
    other = full_run(tmp_path / "other", "<b>other")
    page = tmp_path / "page.html"
    file = write_comparison([run.path, other.path], page) if several else write_report(run.path, page)
    shown = opened(browser, file, viewport)
    shown.page.locator(".u-over").first.hover()
    assert shown.value("window.hacked") is None
    assert shown.messages == []
    assert shown.value("document.querySelectorAll('img, iframe, object, embed, form').length") == 0
    assert shown.value("document.documentElement.scrollWidth") <= viewport["width"]
    assert shown.value("getComputedStyle(document.body).display") == "block"
    assert shown.page.locator("main section").count() == (5 if several else 6)
    assert min(drawn_pixels(shown.page)) > 1000
    shown.page.close()


def test_policy_stops_what_would_slip_through(report: Path, browser: Browser, tmp_path: Path) -> None:
    """Were a text not escaped, the browser would still run and load nothing."""
    attack = "<script>window.hacked=1</script><img src='https://place.example/x.png' onerror='window.hacked=1'></main>"
    broken = tmp_path / "broken.html"
    broken.write_text(report.read_text(encoding="utf-8").replace("</main>", attack, 1), encoding="utf-8")
    shown = opened(browser, broken, DESKTOP)
    shown.page.wait_for_timeout(100)
    assert shown.value("window.hacked") is None
    refused = [message for message in shown.messages if "Content Security Policy" in message]
    assert len(refused) >= 2
    shown.page.close()
