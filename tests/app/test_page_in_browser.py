"""The page, in a browser; where Gradio, Playwright and Chromium are there.

With ``DMM_SCREENSHOTS`` naming a folder, what a person would see is left there at two widths.
"""

import base64
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving import served

from dmm.cli import main
from dmm.files.parameters import read_parameters

pytest.importorskip("gradio", reason="the page needs Gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="the browser is driven by Playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,  # a server, a browser and many paintings: half a minute
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
]
MODEL = os.environ.get("DMM_SERVED")  # a merged model to look at, in place of the tiny one


@pytest.fixture(scope="module")
def model(merged):
    return Path(MODEL) if MODEL else merged


@pytest.fixture(scope="module")
def address(model):
    with served(model) as (_, port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser, address):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    page.goto(address)
    page.wait_for_selector("#paint")
    page.fill("#prompt textarea", "fox")
    yield page
    page.close()


def weights(page):
    return [float(box.input_value()) for box in page.locator(".style input[type=number]").all()]


def settled(page, is_there):
    """The weights, once the server has answered: they sum to 1, and are what was asked for."""
    for _ in range(300):
        now = weights(page)
        if abs(sum(now) - 1) < 1e-6 and is_there(now):
            return now
        page.wait_for_timeout(100)
    raise AssertionError(now)


def move(page, i, value):
    box = page.locator(".style input[type=number]").nth(i)
    box.fill(str(value))
    box.press("Enter")
    return settled(page, lambda now: now[i] == value)


def choose(page, element, option):
    page.click(f"{element} input")
    page.get_by_role("option", name=option, exact=True).click()


def paint(page, count=1):
    page.click("#paint")
    page.wait_for_function(
        "([count, old]) => { const all = [...document.querySelectorAll('#pictures img')].map(one => one.src);"
        " return all.length == count && all.join() != old }",
        arg=[count, sources(page)],
    )
    return [base64.b64decode(one.partition(",")[2]) for one in sources(page).split("|")]


def sources(page):
    return page.evaluate("[...document.querySelectorAll('#pictures img')].map(one => one.src).join('|')")


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def test_sliders_sum_to_1_after_any_moves(page):
    for i, value in ((1, 0.3), (2, 0.45), (0, 0.0), (1, 1.0), (0, 0.77)):
        now = move(page, i, value)
    page.click("#random")
    settled(page, lambda mixed: mixed != now)
    choose(page, "#preset", "all alike")
    settled(page, lambda alike: max(alike) - min(alike) < 0.011)


def test_a_picture_is_that_of_generate_and_a_dropped_one_restores_the_controls(page, model, tmp_path):
    mix = move(page, 0, 0.7)
    (painted,) = paint(page)
    (tmp_path / "saved.png").write_bytes(painted)
    style = read_parameters(tmp_path / "saved.png")["Style"]
    assert main(["generate", str(model), "fox", "--style", style, "--output", f"{tmp_path}/own.png"]) == 0
    assert abs(pixels(painted) - pixels((tmp_path / "own.png").read_bytes())).max() <= 2

    page.fill("#prompt textarea", "something else")
    choose(page, "#preset", "all alike")
    settled(page, lambda now: now != mix)
    page.click("#settings button")
    page.set_input_files("#dropped input[type=file]", str(tmp_path / "saved.png"))
    settled(page, lambda now: now == mix)
    assert page.input_value("#prompt textarea") == "fox"


def test_the_grid_has_all_styles(page):
    choose(page, "#what", "every style")
    count = len(weights(page))
    assert len(set(paint(page, count))) == count
    folder = os.environ.get("DMM_SCREENSHOTS")
    if folder:
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_timeout(1000)
            page.screenshot(path=f"{folder}/page-{width}.png", full_page=True)
    page.set_viewport_size({"width": 390, "height": 900})
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_painting_can_be_cancelled(page):
    page.click("#how button")
    steps = page.locator("#how input[type=number]").first
    steps.fill("150")
    steps.press("Enter")
    page.locator("input[aria-label*='Pictures'], label:has-text('Pictures') input").first.fill("16")
    page.click("#paint")
    page.wait_for_selector("#progress .dmm-bar")
    page.click("#cancel")
    page.wait_for_selector("text=Cancelled.")


def test_a_merge_is_watched(browser, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "recipe.yaml").write_text("training: {steps: 100}\n")
    (tmp_path / "log.jsonl").write_text('{"step": 10, "time": 1.0, "score": 0.5, "score/ink": 0.5}\n')
    with served("--run", tmp_path) as (_, port):
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}")
        page.wait_for_selector("text=step 10 of 100")
        with (tmp_path / "log.jsonl").open("a") as log:
            log.write('{"step": 20, "time": 21.0, "score": 0.4, "score/ink": 0.4}\n')
        page.wait_for_selector("text=step 20 of 100; 2 s a step, 3 min left.")
        assert page.locator("#curves polyline").count() == 1
        page.close()
