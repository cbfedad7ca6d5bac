"""The page in a real browser: Debian's Chromium, driven by Playwright's core, without a network."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from study_results import make_arm, make_results

from samestep.study.charts import draw_figures
from samestep.study.report import render_page
from samestep.study.results import NoiseSums, Results

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "<script>document.title = 'broken'</script>"
LONG = "a-name-that-goes-on-" * 8

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"
)


def results() -> Results:
    noise = NoiseSums(signal=[0.1, 0.11, 0.09], variance=[100.0, 101.0, 99.0])
    arms = []
    for cut, group in ((0.0, "as they are"), (0.75, HOSTILE)):
        place: dict[str, Any] = {"cut": cut, "group": group}
        seeds = {0: 3.0, 1: 3.1, 2: 2.9}
        arms += [
            make_arm("32 x 1", seeds, reference=True, **place),
            make_arm("1 x 32", seeds, difference=1e-7, of_run={"noise": noise}, **place),
            make_arm(HOSTILE, {0: 3.5, 1: 3.7, 2: 3.3}, difference=0.4, **place),
            make_arm(LONG, {0: 3.5, 1: 3.7, 2: 3.3}, difference=40.0, **place),
        ]
    return make_results(arms, name=f"{HOSTILE} & co")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_page(results(), draw_figures(results())), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # The sandbox needs rights that containers lack; the page is our own.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened:
    """A loaded page, with all that it said and asked for."""

    def __init__(self, browser: Browser, file: Path, width: int, scheme: Any) -> None:
        self.page: Page = browser.new_page(
            viewport={"width": width, "height": 900}, color_scheme=scheme
        )
        self.trouble: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.trouble.append(message.text))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("body[data-drawn]")


@pytest.mark.sampled(4)
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_loads_quietly_and_fits(browser: Browser, file: Path, width: int, scheme: str) -> None:
    opened = Opened(browser, file, width, scheme)
    page = opened.page
    assert opened.trouble == []
    assert opened.requests == [file.as_uri()]
    assert page.locator(".plot svg").count() == 9
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for plot in page.locator(".plot svg").all():
        box, frame = plot.bounding_box(), plot.locator("xpath=ancestor::figure").bounding_box()
        assert box is not None
        assert frame is not None
        assert box["width"] > 250
        assert box["x"] + box["width"] <= frame["x"] + frame["width"] + 1
    ink, ground = (
        page.evaluate(f"getComputedStyle(document.body).{name}")
        for name in ("color", "backgroundColor")
    )
    assert contrast(ink, ground) > 7
    label = page.locator(".role-axis-label text").first
    assert contrast(label.evaluate("node => getComputedStyle(node).fill"), ground) > 4.5
    page.close()


def test_hostile_and_long_names_are_text(browser: Browser, file: Path) -> None:
    opened = Opened(browser, file, 390, "light")
    assert opened.page.title() == f"{HOSTILE} & co: samestep study"
    assert opened.page.locator("h1").inner_text() == f"{HOSTILE} & co"
    assert opened.page.locator("script").count() == 3
    assert opened.page.get_by_role("button", name=HOSTILE).count() == 1
    assert opened.page.get_by_role("button", name=LONG).is_visible()


def test_a_press_hides_an_arm_in_every_figure_and_another_shows_it(
    browser: Browser, file: Path
) -> None:
    page = Opened(browser, file, 1280, "light").page
    button = page.get_by_role("button", name=HOSTILE)
    drawn = page.locator(".plot", has=page.locator(".mark-line path")).first
    curves = drawn.locator(".mark-line path")
    last = page.locator(".plot").last.locator(".mark-line path")
    before, before_in_last = curves.count(), last.count()
    button.click()
    page.wait_for_selector("body[data-hidden='1']")
    assert button.get_attribute("aria-pressed") == "false"
    assert curves.count() == before - 1
    assert last.count() == before_in_last - 1
    button.press("Enter")
    page.wait_for_selector("body[data-hidden='0']")
    assert button.get_attribute("aria-pressed") == "true"
    assert curves.count() == before


def test_hovering_shows_the_values(browser: Browser, file: Path) -> None:
    page = Opened(browser, file, 1280, "light").page
    points = page.locator("[data-chart='1-evaluation-loss'] .mark-symbol path")
    points.last.hover(force=True)
    tip = page.locator("#vg-tooltip-element")
    tip.wait_for(state="visible")
    text = tip.inner_text()
    assert "step" in text
    assert "lowest seed" in text
    assert "3.3" in text


def test_the_colours_follow_when_the_scheme_changes(browser: Browser, file: Path) -> None:
    page = Opened(browser, file, 1280, "light").page
    label = ".role-axis-label text"
    before = page.locator(label).first.evaluate("node => getComputedStyle(node).fill")
    page.get_by_role("button", name="1 x 32").click()
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(
        f"getComputedStyle(document.querySelector('{label}')).fill !== '{before}'"
    )
    # What was hidden stays hidden.
    assert page.get_by_role("button", name="1 x 32").get_attribute("aria-pressed") == "false"
    page.wait_for_function("document.querySelectorAll('.plot svg').length === 9")


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two CSS colours (WCAG 2)."""

    def luminance(colour: str) -> float:
        parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
