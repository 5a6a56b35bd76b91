"""OpenAI's own Python client, on the page's HTTP interface: generate, edit, stream, errors; and review on the page."""

import base64
import http.client
import io
import json
import shutil

import judges
import openai
import pytest
from helpers import acknowledge, edit_json
from PIL import Image, ImageDraw
from served import serving
from test_preview import MAP

from mlx_flux_krea.commands.shared.reviewing import QUESTIONS
from mlx_flux_krea.filters.log import Log

pytestmark = pytest.mark.page

RED = "a red circle on a blue background"
SMALL = {"extra_body": {"seed": 7, "steps": 4}}
NO = dict.fromkeys(QUESTIONS, False)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("page") / "home", step=0.05) as one:
        yield one


def client_of(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=server.token, max_retries=0)


@pytest.fixture(scope="module")
def client(server):
    with client_of(server) as one:
        yield one


def opened(encoded: str | None) -> Image.Image:
    assert encoded
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def test_generate_and_models(client):
    assert [one.id for one in client.models.list().data] == ["nano"]
    answer = client.images.generate(model="nano", prompt=RED, n=2, size="64x96", user="somebody", **SMALL)
    assert [opened(one.b64_json).size for one in answer.data] == [(64, 96)] * 2
    kinds = {"output_format": "webp", "output_compression": 50, "size": "auto"}
    answer = client.images.generate(model="nano", prompt=RED, **kinds, **SMALL)
    assert (opened(answer.data[0].b64_json).format, answer.output_format, answer.size) == ("WEBP", "webp", "96x96")
    link = client.images.generate(model="nano", prompt=RED, response_format="url", **SMALL).data[0].url
    assert link.startswith("data:image/png;base64,iVBOR")


def test_stream(client):
    events = list(client.images.generate(model="nano", prompt=RED, stream=True, partial_images=2, **SMALL))
    assert [one.type.rpartition(".")[2] for one in events] == ["partial_image", "partial_image", "completed"]
    assert [one.partial_image_index for one in events[:2]] == [0, 1]
    assert opened(events[-1].b64_json).size == (96, 96)


def test_edit_changes_what_is_transparent_in_the_mask(client):
    image, mask = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (96, 96), (10, 200, 30)).save(image, "PNG")
    cut = Image.new("RGBA", (96, 96), (0, 0, 0, 255))
    ImageDraw.Draw(cut).rectangle((48, 0, 95, 95), fill=(0, 0, 0, 0))
    cut.save(mask, "PNG")
    files = {"image": ("a.png", image.getvalue()), "mask": ("m.png", mask.getvalue())}
    answer = client.images.edit(model="nano", prompt=RED, extra_body={"seed": 7, "steps": 4, "strength": 1}, **files)
    made = opened(answer.data[0].b64_json).convert("RGB")
    assert made.crop((0, 0, 32, 96)).getcolors() == [(32 * 96, (10, 200, 30))]
    assert len(made.crop((64, 0, 96, 96)).getcolors(10**5)) > 50
    with pytest.raises(openai.BadRequestError) as error:
        client.images.edit(model="nano", prompt=RED, image=files["image"], mask=("m.png", image.getvalue()))
    assert error.value.param == "mask"
    with pytest.raises(openai.BadRequestError):
        client.images.edit(model="nano", prompt=RED, image=("a.png", b"no image"))


@pytest.mark.parametrize(
    ("given", "kind", "code", "param"),
    [
        ({"model": "gpt-image-1"}, openai.NotFoundError, "model_not_found", "model"),
        ({"size": "1x1"}, openai.BadRequestError, "invalid_value", "size"),
        ({"n": 11}, openai.BadRequestError, "invalid_value", "n"),
        ({"background": "transparent"}, openai.BadRequestError, "invalid_value", "background"),
        ({"extra_body": {"steps": 0}}, openai.BadRequestError, "invalid_value", "steps"),
        ({"extra_body": {"image": "/etc/passwd"}}, openai.BadRequestError, "invalid_value", "image"),
        ({"extra_body": {"loras": [{"name": "/tmp/x"}]}}, openai.NotFoundError, "not_found", "loras"),
        ({"prompt": "a ring <lora:/tmp/x.safetensors:1>"}, openai.BadRequestError, "invalid_value", None),
    ],
)
def test_errors_are_those_of_openai(client, given, kind, code, param):
    with pytest.raises(kind) as error:
        client.images.generate(**({"model": "nano", "prompt": RED} | given))
    assert (error.value.code, error.value.param) == (code, param)


def test_a_wrong_token(server):
    with (
        openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="x", max_retries=0) as other,
        pytest.raises(openai.AuthenticationError),
    ):
        other.models.list()


# --- a model that requires filters ---


@pytest.fixture(scope="module")
def strict(model, tmp_path_factory):
    """A server whose only model, the tiny one, requires filters."""
    home = tmp_path_factory.mktemp("strict") / "home"
    shutil.copytree(model, home / "models" / "tiny")
    edit_json(home / "models" / "tiny" / "model_index.json", filters="required", latent_rgb=MAP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLUX_KREA_HOME", str(home))
        acknowledge(home / "models" / "tiny")
        judges.install()
    with serving(home) as one:
        yield one


TINY = {"width": 32, "height": 32, "steps": 2, "seed": 7, "model": "tiny"}


def test_withheld_and_released(strict):
    job = strict.make(prompt="a cat", **TINY)
    assert [one["outcome"] for one in job["pictures"]] == ["released"], job
    assert job["preview"] is None
    with client_of(strict) as client, pytest.raises(openai.BadRequestError) as error:
        client.images.generate(model="tiny", prompt="mickey", size="32x32", extra_body={"steps": 2})
    assert error.value.code == "content_policy_violation"
    events = [entry["event"] for entry in Log(strict.home / "log").read()]
    assert events[-1] == "prompt_flagged"


def test_a_checked_preview_passes_both_filters_first(strict):
    wanted = TINY | {"steps": 6}
    without = strict.make(prompt="a bird", **wanted)
    assert strict.good("PUT", "/api/settings", {"checked_previews": True})["checked_previews"]
    try:
        log = Log(strict.home / "log")
        before = len(log.read())
        job = strict.make(prompt="a bird", **wanted)
        events = [entry["event"] for entry in log.read()[before:]]
        pair = [strict.raw("GET", f"/api/pictures/{one['pictures'][0]['picture']}/file")[2] for one in (without, job)]
        assert pair[0] == pair[1]
        assert sum(event.startswith("preview_") for event in events) == 2
        plan = strict.good("POST", "/api/plan", {"prompt": "a bird", **wanted})
        assert plan["seconds"]["previews"] == 2 * plan["seconds"]["filters"] if plan["chip"] else True
    finally:
        strict.good("PUT", "/api/settings", {"checked_previews": False})


def test_review_on_the_page_has_the_questions_and_the_log_of_the_command(strict):
    (strict.home / "config.json").write_text(json.dumps({"check": "review"}))
    before = strict.good("GET", "/api/pictures")["total"]
    with client_of(strict) as client, pytest.raises(openai.ConflictError) as error:
        client.images.generate(model="tiny", prompt="a cat", n=2, size="32x32", extra_body={"steps": 2, "seed": 7})
    assert error.value.code == "review_required"
    listed = strict.good("GET", "/api/review")
    assert {one["name"]: one["text"] for one in listed["questions"]} == QUESTIONS
    one, two = (picture["id"] for picture in listed["pictures"])
    assert error.value.body["review"] == [one, two]
    for key in (one, two):
        for route in ("pictures/{}/file", "pictures/{}/thumbnail", "uploads/{}", "queue/{}/preview"):
            assert strict.raw("GET", f"/api/{route.format(key)}")[0] == 404
            assert strict.raw("GET", f"/api/{route.format(key[:16])}")[0] == 404
    assert strict.good("GET", "/api/pictures")["total"] == before
    verdict = {"reviewer": "Ada", "answers": NO}
    assert strict.ask("POST", f"/api/review/{one}", verdict)[1]["error"]["code"] == "conflict"  # nobody looked
    for wrong in ({"answers": NO}, {"reviewer": " ", "answers": NO}, {"reviewer": "Ada", "answers": {}}):
        assert strict.ask("POST", f"/api/review/{one}", wrong)[0] == 400
    with Image.open(io.BytesIO(strict.raw("GET", f"/api/review/{one}/file")[2])) as shown:
        assert shown.size == (32, 32)
    released = strict.good("POST", f"/api/review/{one}", verdict)
    assert (released["outcome"], released["picture"]["seed"]) == ("released", 7)
    assert strict.raw("GET", f"/api/pictures/{released['picture']['id']}/file")[0] == 200
    strict.raw("GET", f"/api/review/{two}/file")
    yes = {"reviewer": "Ada", "answers": NO | {"unlawful": True}}
    assert strict.ask("POST", f"/api/review/{two}", yes)[0] == 400  # not confirmed
    assert strict.good("POST", f"/api/review/{two}", yes | {"confirm": "delete"})["outcome"] == "rejected"
    assert strict.good("GET", "/api/review")["pictures"] == []
    entries = Log(strict.home / "log").read()
    assert [e["event"] for e in entries if e.get("reviewer") == "Ada"] == ["approved", "rejected"]
    (job,) = (job for job in strict.good("GET", "/api/queue")["jobs"] if job["count"] == 2)
    assert [p["outcome"] for p in job["pictures"]] == ["released", "withheld"]


def test_without_filters_nothing_is_generated(strict):
    (strict.home / "config.json").write_text("{}")
    shutil.rmtree(strict.home / "filters" / "nsfw")
    job = strict.make(prompt="a dog", **TINY)
    assert (job["state"], job["error"]["code"], job["pictures"]) == ("failed", "filters_unavailable", [])
    assert str(strict.home) not in json.dumps(job)


def test_a_client_that_goes_away_cancels_its_job(server):
    body = {"model": "nano", "prompt": RED, "steps": 1000}
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("POST", "/v1/images/generations", json.dumps(body), {"Authorization": f"Bearer {server.token}"})
    job = server.until(lambda one: next((j for j in one.good("GET", "/api/queue")["jobs"] if j["progress"]), None))
    connection.close()
    assert server.ended(job["id"])["state"] == "cancelled"
