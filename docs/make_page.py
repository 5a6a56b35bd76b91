"""Takes the pictures of docs/page.md: `python docs/make_page.py`, with the extras `ui` and `browser`, and Chromium.

The page runs on the small model, which makes every picture that is shown; $CHROMIUM names the browser.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import playwright.sync_api as playwright
from PIL import Image

HERE = Path(__file__).parent
PROMPTS = (
    "a red circle on a blue background", "a yellow ring on a green background", "a purple star on a white background",
    "a large green square on a yellow background", "an orange cross on a blue background",
    "a blue triangle on a red background",
)  # fmt: skip


def take(page: playwright.Page, name: str) -> None:
    """Writes what the page shows."""
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(HERE / name, optimize=True)


def generate(page: playwright.Page, prompt: str, steps: str = "28", seed: str = "2") -> None:
    """Puts a prompt into the queue."""
    for label, value in (("Steps", steps), ("Seed", seed), ("Prompt", prompt)):
        page.get_by_label(label, exact=True).fill(value)
    page.get_by_role("button", name="Generate", exact=True).click()


def opened(browser: playwright.Browser, url: str, width: int, height: int, colours: str) -> playwright.Page:
    """Opens the page."""
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=colours)  # type: ignore[arg-type]
    page.goto(url)
    page.wait_for_selector("#total:not(:empty)")
    page.locator("#setup summary").click()
    return page


def take_all(browser: playwright.Browser, url: str) -> None:
    """Makes pictures, and shows the page in each of its states."""
    page = opened(browser, url, 1280, 800, "light")
    for number, prompt in enumerate(PROMPTS):
        generate(page, prompt)
        page.wait_for_selector(f"#pictures > li:nth-child({number + 1}) img[src]")
    page.get_by_role("button", name="Clear ended").click()
    generate(page, PROMPTS[0], steps="400")
    generate(page, PROMPTS[1])
    page.wait_for_selector("#queue li img[src]")
    page.get_by_role("textbox", name="Prompt", exact=True).fill("a red {circle|star} on a blue background")
    page.wait_for_timeout(9000)  # messages go
    take(page, "page.png")
    page.close()
    page = opened(browser, url, 1280, 800, "dark")
    page.locator("#pictures > li").filter(has_text=PROMPTS[4]).get_by_role("button").click()
    page.get_by_role("button", name="Start from this").click()
    page.get_by_role("button", name="Paint a mask").click()
    board = page.get_by_role("application")
    box = board.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] * 0.35, box["y"] + box["height"] * 0.5)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.55, steps=4)
    page.mouse.up()
    take(page, "page-mask.png")
    page.close()
    page = opened(browser, url, 390, 844, "light")
    page.locator("#pictures").scroll_into_view_if_needed()
    page.wait_for_timeout(1500)
    take(page, "page-phone.png")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as home, playwright.sync_playwright() as running:
        command = [sys.executable, "-m", "mlx_flux_krea.cli", "ui", "--no-open", "--json"]
        server = subprocess.Popen(command, env=os.environ | {"FLUX_KREA_HOME": home}, stdout=subprocess.PIPE, text=True)
        assert server.stdout
        about = json.loads(server.stdout.readline())
        started = running.chromium.launch(executable_path=os.environ.get("CHROMIUM"), args=["--no-sandbox"])
        try:
            take_all(started, about["url"])
        finally:
            started.close()
            server.terminate()
            server.wait()
