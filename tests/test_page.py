"""The page in a real browser, on the small models. `.ci/browser` installs Chromium, Playwright and axe-core."""

import base64
import io
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from derived import EDIT
from helpers import ROOT
from judges import as_required, filtered_copy
from mlx_flux_krea.convert import convert
from PIL import Image, ImageChops
from served import Served, serving
from test_preview import MAP

playwright = pytest.importorskip("playwright.sync_api", reason="the browser's tests need Playwright (.ci/browser)")
expect = playwright.expect
expect.set_options(timeout=20_000)  # milliseconds: the machine may have other work
PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AXE = Path(os.environ.get("FLUX_KREA_AXE", ""))  # axe.min.js
FIRST_LOAD = 150_000  # bytes, compressed
RED = "a red circle on a blue background"
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        try:
            opened = running.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no browser starts here: {error.message.splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("page") / "home", step=0.02) as one:
        yield one


class Tab:
    """A page of the browser, on which nothing may go wrong unseen."""

    def __init__(self, browser, server: Served, **context):
        self.context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | context))
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.wrong.append(dialog.message), dialog.dismiss()))
        self.page.on("console", lambda said: said.type == "error" and self.wrong.append(said.text))
        self.open(server)

    def close(self) -> None:
        self.context.close()
        assert not [text for text in self.wrong if "Failed to load resource" not in text], self.wrong

    def open(self, server: Served) -> None:
        self.page.goto(f"http://127.0.0.1:{server.port}/#token={server.token}")
        expect(self.page.locator("#model")).to_have_value(re.compile("."))
        expect(self.page.locator("#total")).not_to_be_empty()

    # parts of the page, by their accessible names

    @property
    def prompt(self):
        return self.page.get_by_role("textbox", name="Prompt", exact=True)

    @property
    def jobs(self):
        return self.page.get_by_role("list", name="Queue").locator("> li")

    @property
    def pictures(self):
        return self.page.get_by_role("list", name="Pictures").locator("> li")

    def button(self, name: str):
        return self.page.get_by_role("button", name=name, exact=True)

    def generate(self, prompt: str, steps: int = 4) -> None:
        self.page.get_by_label("Steps", exact=True).fill(str(steps))
        self.prompt.fill(prompt)
        self.button("Generate").click()

    def choose_size(self, width: int, height: int) -> None:
        self.page.get_by_role("radio", name="Other").check()
        self.page.get_by_label("Width").fill(str(width))
        self.page.get_by_label("Height").fill(str(height))

    def view(self, number: int = 0):
        """Opens a picture; returns its full view."""
        self.pictures.nth(number).get_by_role("button").click()
        return self.page.get_by_role("dialog", name="Picture")


@pytest.fixture
def tab(browser, server):
    for job in server.good("GET", "/api/queue")["jobs"]:
        server.ask("DELETE", f"/api/queue/{job['id']}")
    opened = Tab(browser, server)
    yield opened
    opened.close()


def pixels(server: Served, key: str) -> Image.Image:
    return Image.open(io.BytesIO(server.raw("GET", f"/api/pictures/{key}/file")[2])).convert("RGB")


def newest(server: Served) -> dict:
    return server.good("GET", f"/api/pictures/{server.good('GET', '/api/pictures')['pictures'][0]['id']}")


def drop(tab: Tab, data: bytes, name: str = "dropped.png", onto: str = "body") -> None:
    """Drops a file on an element, as a person does from a folder."""
    make = """([text, name]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name, {type: "image/png"}));
        return transfer;
    }"""
    transfer = tab.page.evaluate_handle(make, [base64.b64encode(data).decode(), name])
    for event in ("dragover", "drop"):
        tab.page.dispatch_event(onto, event, {"dataTransfer": transfer})


def axe(tab: Tab) -> list[str]:
    """Findings of axe-core that it calls serious or critical."""
    if not AXE.is_file():
        pytest.skip("axe-core is not here (.ci/browser, FLUX_KREA_AXE)")
    tab.page.evaluate(AXE.read_text())  # past the page's policy, which lets no script of others in
    rules = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
    found = tab.page.evaluate("(rules) => axe.run({runOnly: rules})", rules)["violations"]
    bad = [one for one in found if one["impact"] in ("serious", "critical")]
    return [f"{one['id']}: {one['help']}: {[node['html'][:150] for node in one['nodes']]}" for one in bad]


# --- generate ---


def test_a_prompt_becomes_a_picture_and_is_found_again(tab, server):
    before = server.good("GET", "/api/pictures")["total"]
    tab.generate("a red circle on a {blue|green} background")
    expect(tab.page.locator("#prompt-counts")).to_contain_text("CLIP 9 of 48 tokens")
    expect(tab.page.locator("#plan")).to_contain_text("2 pictures · 96 × 96 · 4 steps")
    expect(tab.pictures).to_have_count(before + 2)
    expect(tab.jobs.first).to_contain_text("done")
    tab.page.get_by_role("searchbox", name="Search by prompt").fill("green")
    expect(tab.pictures).to_have_count(1)
    expect(tab.pictures.first).to_contain_text("a red circle on a green background")
    view = tab.view()
    expect(view).to_contain_text("num inference steps")
    expect(view.get_by_role("img")).to_have_js_property("naturalWidth", 96)
    view.get_by_role("button", name="Larger").click()
    view.get_by_role("button", name="Full size").click()
    expect(tab.page.locator("#zoom-level")).to_have_text("100 %")
    with tab.page.expect_download() as download:
        view.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename.endswith(".png")
    view.get_by_role("button", name="Copy", exact=True).click()
    expect(tab.page.get_by_text("The picture is copied")).to_be_visible()
    seed = newest(server)["record"]["seed"]
    view.get_by_role("button", name="Use again").click()
    expect(tab.prompt).to_have_value("a red circle on a green background")
    expect(tab.page.get_by_label("Seed", exact=True)).to_have_value(str(seed))
    expect(tab.page.get_by_label("Keep seed")).to_be_checked()


def test_a_signed_picture_has_a_badge_that_is_also_read_aloud(tab, server):
    pytest.importorskip("c2pa", reason="needs c2pa-python, the extra `credentials`")
    tab.page.locator("#more-part summary").click()
    tab.page.get_by_label("Sign the file").select_option("require")
    tab.generate("a yellow ring on a black background")
    expect(tab.pictures.first).to_contain_text("signed")
    expect(
        tab.page.get_by_role("button", name=re.compile("^a yellow ring on a black background, .*, signed$"))
    ).to_be_visible()
    assert newest(server)["signed"] is True
    expect(tab.view()).to_contain_text("signed (C2PA)")
    assert axe(tab) == []


def test_a_new_seed_is_another_picture_and_a_deleted_one_is_in_the_trash(tab, server):
    made = server.make(prompt=RED, model="nano", seed=2**63 + 1, steps=2)
    assert made["seeds"] == [2**63 + 1]
    view = tab.view()
    view.get_by_role("button", name="Use again").click()
    expect(tab.page.get_by_label("Seed", exact=True)).to_have_value(
        str(2**63 + 1)
    )  # more than a number of JavaScript holds
    tab.button("Generate").click()
    server.until(lambda s: s.good("GET", "/api/queue")["jobs"][0]["seeds"] == [2**63 + 1])
    server.ended(server.good("GET", "/api/queue")["jobs"][0]["id"])
    before = server.good("GET", "/api/pictures")["total"]
    view = tab.view()
    view.get_by_role("button", name="New seed").click()
    server.until(lambda s: s.good("GET", "/api/pictures")["total"] == before + 1)
    assert newest(server)["seed"] != 2**63 + 1
    view.get_by_role("button", name="Delete").click()
    expect(tab.page.get_by_text("The picture is in the Trash")).to_be_visible()
    server.until(lambda s: s.good("GET", "/api/pictures")["total"] == before)


def test_what_is_not_read_of_a_prompt_is_said_while_typing(tab):
    tab.prompt.fill("a ring, " + "very " * 120 + "round")
    expect(tab.page.locator("#prompt-cut")).to_contain_text("CLIP does not read: “")
    tab.prompt.fill("")
    tab.button("Generate").click()
    expect(tab.page.locator("#problem")).not_to_be_empty()


def test_shapes_have_their_sizes(tab):
    for area, expected in (("1 MP", "1216 × 832"), ("1.5 MP", "1488 × 1024"), ("2 MP", "1712 × 1184")):
        tab.page.get_by_role("radio", name=area).check()
        tab.page.get_by_role("radio", name="3:2").check()
        expect(tab.page.locator("#size")).to_have_text(expected)
    tab.choose_size(64, 100)
    tab.prompt.fill("a ring")
    expect(tab.page.locator("#plan")).to_contain_text("64 x 100 is no multiple of 16: the picture is 64 x 96")


def test_prompts_used_before_are_listed(tab, server):
    server.make(prompt="a yellow ring", model="nano", steps=1)
    tab.button("History").click()
    tab.page.get_by_role("dialog", name="Prompts used before").get_by_role(
        "button", name="a yellow ring", exact=True
    ).click()
    expect(tab.prompt).to_have_value("a yellow ring")


# --- queue ---


def test_five_jobs_of_which_one_is_cancelled(tab, server):
    before = server.good("GET", "/api/pictures")["total"]
    tab.generate(f"{RED} 1", steps=40)
    for number in range(2, 6):
        tab.generate(f"{RED} {number}", steps=2)
    expect(tab.jobs).to_have_count(5)
    expect(tab.jobs.first.get_by_role("progressbar")).to_be_visible()
    expect(tab.jobs.first.get_by_role("img", name=re.compile("Preview at step"))).to_be_visible()
    tab.button(f"Earlier: {RED} 5").click()
    expect(tab.jobs.nth(3)).to_contain_text(f"{RED} 5")
    tab.button(f"Cancel: {RED} 3").click()
    expect(tab.jobs.filter(has_text=f"{RED} 3")).to_contain_text("cancelled")
    server.until(lambda s: s.good("GET", "/api/pictures")["total"] == before + 4)
    ends = sorted(server.good("GET", "/api/queue")["jobs"], key=lambda job: job["ended"])
    assert [job["request"]["prompt"][-1] for job in ends if job["state"] == "done"] == ["1", "2", "5", "4"]
    tab.button("Clear ended").click()
    expect(tab.jobs).to_have_count(0)


def test_a_reload_in_the_middle_loses_nothing(tab, server):
    tab.generate(RED, steps=40)
    tab.page.get_by_label("Seed", exact=True).fill("11")
    tab.prompt.fill("the next prompt")
    tab.page.get_by_label("Negative prompt").evaluate("(field) => { field.value = 'grey'; }")
    tab.prompt.press("End")
    tab.prompt.type("!")
    tab.page.reload()
    expect(tab.jobs.first.get_by_role("progressbar")).to_be_visible()
    expect(tab.prompt).to_have_value("the next prompt!")
    expect(tab.page.get_by_label("Seed", exact=True)).to_have_value("11")
    expect(tab.page.get_by_label("Negative prompt")).to_have_value("grey")
    expect(tab.jobs.first).to_contain_text("done")


def test_a_killed_server_is_found_again_and_its_job_ends(browser, tmp_path):
    with serving(tmp_path / "whole") as whole:
        job = whole.make(prompt=RED, model="nano", seed=7, steps=20)
        expected = whole.raw("GET", f"/api/pictures/{job['pictures'][0]['picture']}/file")[2]
    slow = Served(tmp_path / "home", step=0.3)
    tab = Tab(browser, slow)
    tab.page.get_by_label("Seed", exact=True).fill("7")
    tab.generate(RED, steps=20)
    expect(tab.jobs.first).to_contain_text(re.compile(r"step [2-9] of 20"))
    slow.stop(9)
    expect(tab.page.locator("#connection")).to_contain_text("does not answer")
    with serving(tmp_path / "home", port=slow.port) as again:
        expect(tab.pictures).to_have_count(1)  # the same page, which was open all the time
        expect(tab.page.locator("#connection")).to_be_empty()
        expect(tab.jobs.first).to_contain_text("done")
        assert again.raw("GET", f"/api/pictures/{newest(again)['id']}/file")[2] == expected
    tab.close()


# --- images ---


def test_a_mask_is_painted_and_inpainted(tab, server):
    first = server.make(prompt=RED, model="nano", seed=3)["pictures"][0]["picture"]
    tab.view().get_by_role("button", name="Start from this").click()
    tab.button("Paint a mask").click()
    editor = tab.page.get_by_role("dialog", name="Mask")
    canvas = editor.get_by_role("application")
    box = canvas.bounding_box()
    at = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in ((0.75, 0.2), (0.75, 0.8))]
    tab.page.mouse.move(*at[0])
    tab.page.mouse.down()
    tab.page.mouse.move(*at[1], steps=5)
    tab.page.mouse.up()
    editor.get_by_role("button", name="Use").click()
    expect(tab.page.get_by_role("img", name="The mask")).to_be_visible()
    tab.generate("a green circle on a blue background", steps=8)
    expect(tab.jobs.filter(has_text="a green circle")).to_contain_text("done")
    key = newest(server)["id"]
    changed = ImageChops.difference(pixels(server, first), pixels(server, key))
    assert changed.crop((0, 0, 60, 96)).getbbox() is None  # outside, to the bit
    assert changed.getbbox() is not None
    tab.button("Expand").click()
    borders = tab.page.get_by_role("dialog", name="Expand")
    borders.get_by_role("slider", name="Border at the right").press("ArrowRight")
    expect(borders).to_contain_text("96 × 96 becomes 112 × 96")
    handle = borders.get_by_role("slider", name="Border at the bottom").bounding_box()
    tab.page.mouse.move(handle["x"] + 5, handle["y"] + 5)
    tab.page.mouse.down()
    tab.page.mouse.move(handle["x"] + 5, handle["y"] + 60)
    tab.page.mouse.up()
    expect(borders.get_by_label("Border at the bottom, in pixels")).not_to_have_value("0")
    borders.get_by_role("button", name="Use").click()
    expect(tab.page.locator("#expand-state")).to_contain_text(re.compile(r"0,16,\d+,0"))


def test_a_mask_is_painted_by_keys_and_changed_again(tab, server):
    server.make(prompt=RED, model="nano", seed=3, steps=2)
    tab.view().get_by_role("button", name="Start from this").click()
    tab.button("Paint a mask").click()
    editor = tab.page.get_by_role("dialog", name="Mask")
    canvas = editor.get_by_role("application")
    for key in ("]", "ArrowRight", "Space", "Shift+ArrowDown", "Space"):
        canvas.press(key)
    editor.get_by_role("button", name="Invert").click()
    editor.get_by_role("button", name="Undo").click()
    editor.get_by_role("button", name="Use").click()
    mask = tab.page.get_by_role("img", name="The mask")
    expect(mask).to_have_js_property("naturalWidth", 96)
    share = """(image) => {
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [96, 96];
        const pen = canvas.getContext("2d");
        pen.drawImage(image, 0, 0);
        return pen.getImageData(0, 0, 96, 96).data.filter((value, at) => at % 4 === 0 && value > 127).length;
    }"""
    painted = mask.evaluate(share)
    assert 0 < painted < 96 * 96 / 4
    tab.button("Paint a mask").click()
    editor.get_by_role("button", name="Use").click()
    tab.page.wait_for_timeout(300)
    assert abs(mask.evaluate(share) - painted) < 30  # a mask that is opened and used again is the same


def test_a_dropped_picture_fills_the_form_and_another_image_becomes_the_start(tab, server):
    job = server.make(prompt="a yellow square", model="nano", seed=5, steps=6, guidance=3)
    data = server.raw("GET", f"/api/pictures/{job['pictures'][0]['picture']}/file")[2]
    drop(tab, data)
    expect(tab.prompt).to_have_value("a yellow square")
    for label, value in (("Seed", "5"), ("Steps", "6"), ("Guidance", "3")):
        expect(tab.page.get_by_label(label, exact=True)).to_have_value(value)
    tab.button("Use as image").click()
    expect(tab.page.get_by_role("img", name="Image to start from")).to_have_js_property("naturalWidth", 96)
    tab.button("Start over").click()
    plain = io.BytesIO()
    Image.new("RGB", (80, 48), (9, 99, 199)).save(plain, "PNG")
    drop(tab, plain.getvalue())
    expect(tab.page.get_by_role("img", name="Image to start from")).to_have_js_property("naturalWidth", 80)
    expect(tab.page.get_by_role("radio", name="As the image")).to_be_checked()
    tab.generate("a blue ring", steps=4)
    expect(tab.jobs.filter(has_text="a blue ring")).to_contain_text("done")
    assert (newest(server)["width"], newest(server)["height"]) == (80, 48)
    drop(tab, b"no image", onto=".well")
    expect(tab.page.locator("#alerts")).to_contain_text("image")


def test_two_pictures_are_compared(tab, server):
    server.make(prompt=RED, model="nano", steps=1, num_images=3)
    marks = tab.pictures.get_by_role("checkbox")
    for number in range(3):
        marks.nth(number).check()
    assert [marks.nth(number).is_checked() for number in range(3)] == [False, True, True]
    tab.button("Side by side").click()
    view = tab.page.get_by_role("dialog", name="Side by side")
    expect(view.get_by_role("img")).to_have_count(2)
    view.get_by_role("img").first.press("+")
    tab.page.keyboard.press("+")
    scales = view.get_by_role("img").evaluate_all("(all) => all.map((one) => one.style.transform)")
    assert scales[0] == scales[1]


# --- review, filters, first run ---


@pytest.fixture
def strict(tmp_path, model, monkeypatch):
    """A server with a tiny model that requires filters, under review."""
    home = tmp_path / "home"
    monkeypatch.setenv("FLUX_KREA_HOME", str(home))
    filtered_copy(model, home / "models" / "tiny", monkeypatch)
    (home / "config.json").write_text(json.dumps({"check": "review"}))
    with serving(home) as one:
        yield one


def test_review_asks_both_questions_and_shows_nothing_elsewhere(browser, strict):
    tab = Tab(browser, strict)
    tab.choose_size(32, 32)
    tab.page.get_by_label("Number", exact=True).fill("2")
    tab.generate("a cat", steps=2)
    tab.button("2 to review").click()
    expect(tab.pictures).to_have_count(0)
    form = tab.page.get_by_role("form", name="Verdict")
    expect(tab.page.get_by_role("img", name="The picture to review")).to_have_js_property("naturalWidth", 32)
    form.get_by_role("button", name="Release").click()
    expect(tab.page.locator("#alerts")).to_contain_text("Answer both questions")
    form.get_by_label("Your name").fill("Ada")
    for question in form.get_by_role("radio", name="No").all():
        question.check()
    form.get_by_role("button", name="Release").click()
    expect(tab.page.locator("#review-place")).to_have_text("1 of 1 picture")
    form.get_by_label("Your name").fill("Ada")
    form.get_by_role("radio", name="Yes").first.check()
    form.get_by_role("radio", name="No").nth(1).check()
    form.get_by_role("button", name="Reject and delete").click()
    expect(tab.page.locator("#alerts")).to_contain_text("delete")
    form.get_by_label(re.compile("Type")).fill("delete")
    assert not AXE.is_file() or axe(tab) == []
    form.get_by_role("button", name="Reject and delete").click()
    expect(tab.page.get_by_text("Nothing waits for review.")).to_be_visible()
    tab.page.get_by_role("tab", name="Pictures").click()
    expect(tab.pictures).to_have_count(1)
    tab.close()


def test_the_first_run_says_what_is_missing_and_can_be_set_up(tab):
    setup = tab.page.get_by_role("region", name="Set up")
    expect(setup).to_contain_text("FLUX.1 Krea [dev] is not installed")
    expect(setup.get_by_role("radio")).to_have_count(2)
    expect(setup.get_by_role("button", name="Set up", exact=True)).to_be_enabled()


def test_setup_runs_on_the_page_and_shows_the_licence(browser, model, tmp_path, monkeypatch):
    monkeypatch.setenv("FLUX_KREA_HOME", str(tmp_path / "other"))
    small = {"width": 32, "height": 32, "num_inference_steps": 2, "guidance_scale": 4.5}
    as_required(model, tmp_path / "home" / "models" / "tiny", defaults=small)
    with serving(tmp_path / "home") as server:
        tab = Tab(browser, server)
        setup = tab.page.get_by_role("region", name="Set up")
        expect(setup).to_contain_text("the filters are not installed; nobody has agreed to the licence")
        setup.get_by_role("radio", name="I review each picture myself").check()
        setup.get_by_role("button", name="Set up", exact=True).click()
        text = setup.get_by_role("region", name="Text of the licence")
        expect(text).to_contain_text("FLUX")
        expect(setup.get_by_role("button", name="Continue")).to_be_disabled()
        setup.get_by_role("checkbox", name="I have read it and agree").check()
        setup.get_by_role("button", name="Continue").click()
        expect(setup).to_be_hidden(timeout=20_000)
        expect(tab.page.locator("#review-count")).to_contain_text("1")  # the first picture
        tab.close()


def test_previews_of_a_filtered_model_are_a_choice_and_pass_the_filters(browser, model, tmp_path, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setenv("FLUX_KREA_HOME", str(home))
    filtered_copy(model, home / "models" / "tiny", monkeypatch, latent_rgb=MAP)
    with serving(home, step=0.2) as server:
        tab = Tab(browser, server)
        choice = tab.page.get_by_role("checkbox", name=re.compile("Show up to two previews, each through both filters"))
        expect(choice).not_to_be_checked()
        choice.check()
        server.until(lambda s: s.good("GET", "/api/settings")["checked_previews"])
        tab.choose_size(32, 32)
        tab.generate("a bird", steps=12)
        expect(tab.page.get_by_role("img", name=re.compile("Preview at step [48] of 12"))).to_be_visible()
        expect(tab.pictures).to_have_count(1)
        tab.close()


def test_editing_models_have_their_own_parts(browser, tmp_path, request):
    home = tmp_path / "home"
    for name in ("kontext", "control", "model"):
        shutil.copytree(request.getfixturevalue(name), home / "models" / name)
    convert([EDIT / "redux"], home / "components" / "redux", dtype="float32")
    photo = io.BytesIO()
    Image.radial_gradient("L").resize((64, 48)).convert("RGB").save(photo, "PNG")
    file = {"name": "photo.png", "mimeType": "image/png", "buffer": photo.getvalue()}

    def ended(prompt: str) -> dict:
        expect(tab.jobs.filter(has_text=prompt)).to_contain_text("done")
        (job,) = (one for one in server.good("GET", "/api/queue")["jobs"] if one["request"]["prompt"] == prompt)
        return job["request"]

    with serving(home) as server:
        tab = Tab(browser, server)
        choose = tab.page.get_by_label("Model", exact=True)
        choose.select_option("control")
        tab.choose_size(32, 32)
        tab.page.get_by_text("Control image", exact=True).click()
        tab.page.get_by_label("Control image file", exact=True).set_input_files(file)
        tab.page.get_by_label("It is").select_option("canny")
        tab.generate("a cat of edges", steps=2)
        assert ended("a cat of edges").items() >= {"model": "control", "control": "canny"}.items()

        choose.select_option("kontext")
        expect(tab.page.get_by_text("Control image", exact=True)).to_be_hidden()
        tab.page.get_by_text("Image to start from", exact=True).click()
        tab.page.get_by_label("Image to start from", exact=True).set_input_files(file)
        tab.page.get_by_text("More references", exact=True).click()
        tab.page.get_by_label("Reference 1", exact=True).set_input_files(file)
        expect(tab.page.get_by_label("Reference 2", exact=True)).to_be_visible()
        tab.page.get_by_role("radio", name="Other").check()
        tab.generate("a cat of references", steps=2)
        expect(tab.jobs.filter(has_text="a cat of references")).to_contain_text("several references are experimental")
        tab.button("Cancel: a cat of references").click()  # they are read at Kontext's own size

        choose.select_option("model")
        tab.button("Start over").click()
        choose.select_option("model")
        tab.choose_size(32, 32)
        tab.page.get_by_text("Style images", exact=True).click()
        tab.page.get_by_label("Style image 1", exact=True).set_input_files(file)
        tab.page.get_by_label("Weight of style image 1").fill("0.5")
        tab.generate("a cat of styles", steps=2)
        request_ = ended("a cat of styles")
        assert [one["weight"] for one in request_["styles"]] == [0.5]
        assert not {"control", "control_image", "references", "image"} & request_.keys()
        tab.close()


def test_models_and_their_plans_are_shown(tab):
    tab.page.get_by_role("tab", name="Models").click()
    models = tab.page.get_by_role("tabpanel", name="Models")
    expect(models).to_contain_text("Plan for this machine: 96 × 96, 28 steps")
    tab.page.get_by_label(re.compile("Minutes without a job")).fill("7")
    tab.page.keyboard.press("Tab")
    expect(tab.page.get_by_text("Kept")).to_be_visible()


# --- hands, eyes, enemies ---


def test_everything_is_done_by_keys(tab, server):
    server.make(prompt=RED, model="nano", steps=1)
    before = server.good("GET", "/api/pictures")["total"]
    tab.page.keyboard.press("Tab")
    expect(tab.page.get_by_role("link", name="Skip to the pictures")).to_be_focused()
    tab.prompt.focus()
    tab.page.keyboard.type("a yellow circle on a blue background")
    tab.page.keyboard.press("Control+Enter")
    expect(tab.pictures).to_have_count(min(before + 1, 60))
    tab.pictures.first.get_by_role("button").focus()
    tab.page.keyboard.press("ArrowRight")
    expect(tab.pictures.nth(1).get_by_role("button")).to_be_focused()
    tab.page.keyboard.press("Enter")
    view = tab.page.get_by_role("dialog", name="Picture")
    expect(view).to_be_visible()
    title = view.get_by_role("heading", level=3).first
    here = title.text_content()
    tab.page.keyboard.press("ArrowLeft")
    expect(title).not_to_have_text(here or "")
    tab.page.keyboard.press("Escape")
    expect(view).to_be_hidden()
    expect(tab.pictures.nth(1).get_by_role("button")).to_be_focused()
    tab.page.get_by_role("tab", name="Pictures").focus()
    tab.page.keyboard.press("ArrowRight")
    tab.page.keyboard.press("Enter")
    expect(tab.page.get_by_role("tabpanel", name="Review")).to_be_visible()


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_axe_finds_nothing_serious(browser, server, colours):
    server.make(prompt=RED, model="nano", steps=1)
    tab = Tab(browser, server, color_scheme=colours, reduced_motion="reduce")
    tab.prompt.fill("a ring")
    for part in tab.page.locator("#settings details:visible > summary").all():
        part.click()
    assert axe(tab) == []
    tab.view()
    expect(tab.page.get_by_role("button", name="Use again")).to_be_visible()
    assert axe(tab) == []
    tab.page.get_by_role("button", name="Start from this").click()
    tab.button("Paint a mask").click()
    expect(tab.page.get_by_role("dialog", name="Mask")).to_be_visible()
    assert axe(tab) == []
    tab.page.keyboard.press("Escape")
    tab.button("Expand").click()
    expect(tab.page.get_by_role("dialog", name="Expand")).to_be_visible()
    assert axe(tab) == []
    tab.page.keyboard.press("Escape")
    for view in ("Review", "Models"):
        tab.page.get_by_role("tab", name=view).click()
        tab.page.wait_for_timeout(200)
        assert axe(tab) == []
    tab.close()


def test_a_phone_shows_everything_in_its_width(browser, server):
    before = server.good("GET", "/api/pictures")["total"]
    tab = Tab(browser, server, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    wide = "() => document.documentElement.scrollWidth"
    tab.generate(RED, steps=2)
    server.until(lambda s: s.good("GET", "/api/pictures")["total"] == before + 1)
    assert tab.page.evaluate(wide) == 390
    view = tab.view()
    expect(view.get_by_role("img")).to_be_visible()
    assert tab.page.evaluate(wide) == 390
    view.get_by_role("button", name="Start from this").click()
    tab.button("Paint a mask").click()
    tab.page.get_by_role("application").tap()
    tab.page.get_by_role("dialog", name="Mask").get_by_role("button", name="Use").click()
    expect(tab.page.get_by_role("img", name="The mask")).to_be_visible()
    for name in ("Review", "Models"):
        tab.page.get_by_role("tab", name=name).click()
        assert tab.page.evaluate(wide) == 390
    tab.close()


def test_texts_of_others_are_texts(tab, server):
    hostile = "<img src=x onerror=alert(1)><script>alert(2)</script> \u202egnp.exe \x1b[31m {{7*7}} ${alert(3)}"
    server.make(prompt=hostile.replace("{", "").replace("}", ""), model="nano", steps=1)
    server.until(lambda s: "onerror" in newest(s)["prompt"])
    expect(tab.pictures.first).to_contain_text("<img src=x onerror=alert(1)>")
    expect(tab.pictures.first).to_contain_text("[U+202E]gnp.exe [U+001B][31m")
    expect(tab.jobs.first).to_contain_text("<script>alert(2)</script>")
    view = tab.view()
    expect(view.get_by_role("heading", level=3).first).to_contain_text("[U+202E]")
    view.get_by_role("button", name="Use again").click()
    expect(tab.prompt).to_have_value(re.compile("\u202e"))  # as it was
    tab.button("History").click()
    expect(tab.page.get_by_role("list", name="Prompts").get_by_role("button").first).to_contain_text("[U+202E]")
    assert tab.page.evaluate("() => document.querySelectorAll('body script, img[onerror]').length") == 0


def test_without_its_token_the_page_says_where_to_find_it(browser, server):
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{server.port}/")
    expect(page.locator("#connection")).to_contain_text("Open the link that flux-krea ui shows")
    page.goto(f"http://127.0.0.1:{server.port}/#token=wrong")
    expect(page.locator("#connection")).to_contain_text("This link has expired")
    page.goto(f"http://127.0.0.1:{server.port}/#token={server.token}")
    expect(page.locator("#model")).to_have_value("nano")
    assert "token" not in page.url
    context.close()


def test_the_first_load_is_small_and_comes_from_this_server_alone(browser, server):
    context = browser.new_context()
    page = context.new_page()
    answers = []
    page.on("response", lambda answer: answers.append(answer))
    page.goto(f"http://127.0.0.1:{server.port}/#token={server.token}")
    expect(page.locator("#total")).not_to_be_empty()
    page.wait_for_timeout(300)
    assert {answer.url.split("/")[2] for answer in answers} == {f"127.0.0.1:{server.port}"}
    wanted = [
        one for one in answers if "/events" not in one.url and "/thumbnail" not in one.url and "/file" not in one.url
    ]
    assert len(wanted) > 15
    assert sum(len(one.body()) for one in wanted) < FIRST_LOAD
    context.close()
    names = {path.name for path in (ROOT / "mlx_flux_krea" / "server" / "page").iterdir()}
    assert names <= {answer.url.rpartition("/")[2].partition("#")[0] or "index.html" for answer in answers}


def test_pictures_leave_no_memory_behind(browser, server):
    """`benchmarks/page.py` makes a hundred."""
    tab = Tab(browser, server)
    tool = tab.context.new_cdp_session(tab.page)
    tool.send("Performance.enable")

    def used_after(jobs: int) -> tuple[int, int]:
        for _ in range(jobs):
            server.make(prompt=RED, model="nano", steps=1, num_images=5, width=64, height=64)
        tab.page.wait_for_timeout(500)
        tab.button("Clear ended").click()
        expect(tab.jobs).to_have_count(0)
        tool.send("HeapProfiler.collectGarbage")
        found = {one["name"]: one["value"] for one in tool.send("Performance.getMetrics")["metrics"]}
        return found["JSHeapUsedSize"], found["Nodes"]

    before, after = used_after(1), used_after(4)
    assert after[0] < before[0] + 20 * 10_000, (before, after)  # entries of a list, no images
    assert after[1] < before[1] + 20 * 20, (before, after)
    tab.close()
