"""flux-krea ui: the queue, the pictures, the door; with a real server on 127.0.0.1 and the small models."""

import http.client
import io
import json
import random
import re
import signal
import socket
from datetime import datetime
from pathlib import Path

import pytest
from helpers import ROOT, run_command
from judges import as_required
from PIL import ExifTags, Image
from served import Served, serving

from mlx_flux_krea.credentials.reading import read_credentials
from mlx_flux_krea.filters import acknowledgement
from mlx_flux_krea.server import errors, fields, openai, pictures, store, trash, uploads
from mlx_flux_krea.server.api import Services
from mlx_flux_krea.server.app import routes_of
from mlx_flux_krea.server.events import KEPT, Events
from mlx_flux_krea.server.store import Store

RED = {"prompt": "a red circle on a blue background", "model": "nano", "seed": 7, "steps": 4}
LONG = RED | {"steps": 40}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("page") / "home") as one:
        yield one


@pytest.fixture(scope="module")
def made(server):
    """An ended job of two pictures."""
    return server.make(**RED, num_images=2)


def png(side: int = 16) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (side, side), (255, 255, 255)).save(data, "PNG")
    return data.getvalue()


# --- plain functions ---


def test_a_message_names_no_folder_of_the_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("FLUX_KREA_HOME", str(tmp_path / "home"))
    for text in (
        f"{tmp_path}/home/models/krea/model_index.json is missing",
        f"{Path.home()}/Pictures/holiday/x.png cannot be opened",
        "'/var/lib/secret/x.png' is damaged; expected /etc/y",
    ):
        shown = errors.plain(text)
        assert not re.search(r"(^|[^\w])/\w|secret|home/|holiday", shown), shown
    assert errors.plain("see https://huggingface.co/a/b") == "see https://huggingface.co/a/b"
    assert errors.plain("a\x1b[31m\u202eb") == r"a\x1b[31m\u202eb"


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        ({"width": "512"}, "width"),
        ({"width": True}, "width"),
        ({"steps": 2.5}, "steps"),
        ({"guidance": float("nan")}, "guidance"),
        ({"image": "../../etc/passwd"}, "image"),
        ({"image": "/etc/passwd"}, "image"),
        ({"output": "/tmp/x.png"}, "output"),
        ({"lora": ["/tmp/x.safetensors"]}, "lora"),
        ({"loras": [{"name": "x", "path": "/tmp"}]}, "loras"),
        ({"loras": {"name": "x"}}, "loras"),
        ({"seed": []}, "seed"),
        ({"seed": [-1]}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"aspect": "7:3"}, "aspect"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"check": "none"}, "check"),
        ({"memory": "1B"}, "memory"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(request_, param):
    with pytest.raises(errors.HTTPProblem) as error:
        fields.check(request_)
    assert (error.value.status, error.value.param) == (400, param)


@pytest.mark.parametrize("name", ["/etc", "../nano", "nano/..", "NANO", ""])
def test_a_model_is_one_of_those_installed(name):
    with pytest.raises(errors.HTTPProblem) as error:
        fields.options({"model": name}, lambda key: Path())
    assert (error.value.status, error.value.code) == (404, "model_not_found")


def test_a_request_of_openai_becomes_one_of_the_page():
    asked = {"prompt": "a", "n": 2, "size": "64x32", "output_format": "jpeg", "output_compression": 80, "user": "me"}
    expected = {"prompt": "a", "num_images": 2, "width": 64, "height": 32, "format": "jpeg", "quality": 80, "steps": 4}
    assert openai.request_of(asked | {"steps": 4, "size": "64x32", "quality": "high"}) == expected
    for wrong in ({"size": "64"}, {"size": "60x64"}, {"n": 11}, {"background": "transparent"}, {"image": "0" * 16}):
        with pytest.raises(errors.HTTPProblem) as error:
            openai.request_of({"prompt": "a"} | wrong)
        assert error.value.param == next(iter(wrong))


def test_a_stream_that_missed_events_is_told_to_read_everything_again():
    events = Events()
    for number in range(KEPT + 10):
        events.publish("job", number)
    assert events._after(0) == [(KEPT + 10, "reset", {})]
    assert [event[2] for event in events._after(KEPT + 7)] == [KEPT + 7, KEPT + 8, KEPT + 9]


def test_a_mask_of_openai_is_white_where_it_is_transparent_and_the_only_file_that_is_kept():
    mask, data = Image.new("RGBA", (4, 2), (9, 9, 9, 255)), io.BytesIO()
    mask.putpixel((0, 0), (9, 9, 9, 0))
    mask.putpixel((3, 0), (9, 9, 9, 155))
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 3  # upside down
    mask.save(data, "PNG", exif=turned)
    key = uploads.keep_mask(data.getvalue())
    (path,) = uploads.folder().iterdir()
    assert path == uploads.find(key)
    with Image.open(path) as kept:
        assert kept.convert("L").tobytes() == bytes([0, 0, 0, 0, 100, 0, 0, 255])


@pytest.mark.parametrize(
    "read",
    [
        lambda shown, key: shown.page("", "", 9),
        lambda shown, key: shown.find(key),
        lambda shown, key: shown.path(key),
        lambda shown, key: shown.thumbnail(key, 64),
        lambda shown, key: shown.scan(),
    ],
)
def test_whoever_reads_a_new_picture_first_takes_the_news_of_it_from_nobody(tmp_path, read):
    events = Events()
    shown = pictures.Pictures(Store(tmp_path / "page.sqlite"), events)
    told = []
    for name in ("a.png", "b.png"):  # the second one within the same tick of the folder's time
        (pictures.folder() / name).write_bytes(png())
        read(shown, pictures.identity(name))
        told.append(pictures.identity(name))
        assert [one["id"] for _, _, data in events._after(0) for one in data["added"]] == told
    (pictures.folder() / "a.png").unlink()
    shown.scan()
    assert events._after(2)[0][1:] == ("pictures", {"added": [], "removed": told[:1]})


def test_a_damaged_database_is_set_aside(tmp_path):
    path = tmp_path / "page.sqlite"
    path.write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 40)
    store = Store(path)
    assert store.is_new
    assert store.rows("SELECT * FROM jobs") == []
    assert (tmp_path / "page.sqlite.damaged").exists()
    store.close()


def test_the_openapi_file_is_current_and_has_every_route():
    import runpy

    text = (ROOT / "docs" / "openapi.json").read_text()
    assert text == runpy.run_path(str(ROOT / "docs" / "make.py"))["openapi"](), "run: python docs/make.py"
    page, paths = (ROOT / "docs" / "http.md").read_text(), json.loads(text)["paths"]
    for method, path in every_route("{id}"):
        assert method == "HEAD" or path == "/openapi.json" or method.lower() in paths[path.replace("nano", "{name}")]
        assert path.replace("{id}", "ID").replace("nano", "NAME") in page, path


# --- the door ---


def every_route(key: str = "0" * 16) -> list[tuple[str, str]]:
    """Method and path of each route of the application, the page's files left out."""
    services = Services(Store(store.path()))
    try:
        found = [(method, route.path) for route in routes_of(services) for method in sorted(route.methods or ())]
    finally:
        services.store.close()
    assert len(found) > 40
    return [(method, path.replace("{id}", key).replace("{name}", "nano")) for method, path in found]


@pytest.mark.page
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": ""}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Basic dXNlcjpwYXNz"}, 401),
        ({"Authorization": "Bearer \xff"}, 401),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1"}, 403),
        ({"Host": "127.0.0.1:1"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
    ],
)
def test_whoever_is_not_the_page_gets_no_answer_from_any_route(server, headers, status):
    of_files = {("GET", "/"), ("GET", "/index.html"), ("GET", "/openapi.json"), ("HEAD", "/openapi.json")}
    for method, path in {*every_route(), *of_files}:
        if status == 401 and (method, path) in of_files:
            continue  # no token is needed
        found, sent, body = server.raw(method, path, b"{}", **headers)
        assert found == status, (method, path)
        assert method == "HEAD" or json.loads(body)["error"]["type"] == "invalid_request_error"
        assert not {name for name in sent if name.lower().startswith("access-control")}


@pytest.mark.page
def test_the_page_has_a_strict_policy_and_no_token_in_a_query(server):
    status, sent, _ = server.raw("GET", "/", Authorization="")
    assert status == 200
    assert "'unsafe-inline'" not in sent["content-security-policy"]
    assert server.raw("GET", f"/api/status?token={server.token}", Authorization="")[0] == 401


@pytest.mark.page
def test_paths_lead_nowhere(server):
    for path in ("/../../../etc/passwd", "/%2e%2e/%2e%2e/api.py", "/..%2fapi.py", "/page/../api.py", "//etc/passwd"):
        assert server.raw("GET", path)[0] in (404, 400), path
    for key in ("../page.sqlite", "..%2f..%2fpage.sqlite", "%00", "0" * 16, "*", "%2e%2e"):
        for route in ("pictures/{}", "pictures/{}/file", "pictures/{}/thumbnail", "uploads/{}", "review/{}/file"):
            assert server.raw("GET", f"/api/{route.format(key)}")[0] == 404, (route, key)
    assert server.ask("DELETE", "/api/pictures/..%2fpage.sqlite")[0] in (404, 405)


VALUES = [None, True, -1, 2**70, 1e400, "x" * 3000, "\0", "<script>", [], {}, [[[]]], {"a": {"b": None}}, "7:3"]
NAMES = [
    *fields.properties(),
    "ids",
    "name",
    "answers",
    "reviewer",
    "check",
    "accept_licence",
    "previews",
    "n",
    "stream",
]
BAD = ({"unknown": 1}, {"model": "nowhere"})  # the second passes more checks before it is refused
KEYS = ("0" * 16, "0" * 32, "..%2fpage.sqlite", "%00", "%ff", "order", "x" * 3000, "*", "%F0%9F%90%B8")


def random_body(draw: random.Random, path: str, number: int) -> tuple[bytes, dict[str, str]]:
    """Bytes, JSON or a form, each broken in some way, and headers."""
    if number % 4 == 0:
        return draw.randbytes(draw.randrange(60)), {}
    wrong = {draw.choice(NAMES): draw.choice(VALUES) for _ in range(draw.randrange(1, 4))}
    if path != "/v1/images/edits":
        return json.dumps(wrong | draw.choice(BAD)).encode()[: draw.choice((9, 10**6))], {}
    files = [(name, draw.choice((b"", b"no image", png()))) for name in draw.choices(("image", "image[]", "mask", "x"))]
    parts = [(f'name="{name}"', json.dumps(value).encode()) for name, value in wrong.items()]
    parts += [('name="prompt"', b"a frog"), draw.choice((('name="unknown"', b"1"), ('name="model"', b"nowhere")))]
    parts += [(f'name="{name}"; filename="{draw.choice(("a.png", "../../a", ""))}"', data) for name, data in files]
    draw.shuffle(parts)
    form = b"".join(
        b"--b\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (about.encode(), data) for about, data in parts
    )
    return (form + b"--b--\r\n")[: draw.choice((99, 10**6, 10**6))], {"Content_Type": "multipart/form-data; boundary=b"}


@pytest.mark.page
def test_random_bodies_are_refused_by_every_route_without_a_traceback(server):
    draw = random.Random(24)
    routes = [one for one in every_route("KEY") if one[0] in ("POST", "PUT", "PATCH", "DELETE")]
    assert {("POST", "/v1/images/edits"), ("POST", "/api/setup"), ("POST", "/api/uploads")} <= set(routes)
    for method, path in routes:
        takes_none = method == "DELETE"  # a body says nothing there
        for number in range(200):
            body, headers = random_body(draw, path, number)
            status, _, answer = server.raw(method, path.replace("KEY", draw.choice(KEYS)), body, **headers)
            assert 400 <= status < 500 or (takes_none and status == 200), (method, path, body, answer)
            assert status == 200 or json.loads(answer)["error"]["message"]
    assert server.raw("POST", "/api/queue", b"[" * 100_000)[0] == 400
    assert server.good("GET", "/api/queue")["jobs"] == []
    assert "Traceback" not in server.said()


@pytest.mark.page
def test_what_is_too_large_is_refused_before_it_is_read(server):
    assert server.raw("POST", "/api/queue", b" " * 1_100_000)[0] == 413
    with socket.create_connection(("127.0.0.1", server.port)) as connection:  # states more than it sends
        head = (
            f"POST /api/uploads HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nAuthorization: Bearer {server.token}\r\n"
        )
        connection.sendall(f"{head}Content-Length: 99999999999\r\n\r\n".encode())
        assert b" 413 " in connection.recv(100)
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")
    assert server.raw("POST", "/api/uploads", bomb.getvalue())[0] == 413
    for body in (b"", b"no image", png()[:60], b"<svg onload='x'/>"):
        assert server.raw("POST", "/api/uploads", body)[0] == 400


@pytest.mark.page
def test_a_thousand_idle_streams_do_not_stop_the_worker(server):
    head = f"GET /api/events HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nAuthorization: Bearer {server.token}\r\n\r\n"
    connections = []
    try:
        for _ in range(1000):
            one = socket.create_connection(("127.0.0.1", server.port), timeout=20)
            one.sendall(head.encode())
            connections.append(one)
        job = server.make(**RED)
        assert job["state"] == "done"
        assert 0 < server.good("GET", "/api/status")["streams"] <= 64
    finally:
        for one in connections:
            one.close()
    server.until(lambda one: one.good("GET", "/api/status")["streams"] == 0)


# --- queue and pictures ---


@pytest.mark.page
def test_pictures_are_those_of_generate_and_are_found_again(server, made, tmp_path):
    assert [one["outcome"] for one in made["pictures"]] == ["released"] * 2
    assert made["seeds"] == [7, 8]
    arguments = ("generate", RED["prompt"], "-m", "nano", "--seed", "7", "--steps", "4", "-o", "one.png")
    assert run_command(*arguments, cwd=tmp_path).returncode == 0
    key = made["pictures"][0]["picture"]
    status, headers, data = server.raw("GET", f"/api/pictures/{key}/file?download=1")
    assert (status, data) == (200, (tmp_path / "one.png").read_bytes())
    assert headers["content-disposition"].endswith('"a-red-circle-on-a-blue-background-7.png"')
    assert headers["cache-control"] == "no-store"
    full = server.good("GET", f"/api/pictures/{key}")
    assert (full["record"]["seed"], full["job"], full["missing"]) == (7, made["id"], [])
    assert server.make(**full["request"])["pictures"][0]["outcome"] == "released"
    with Image.open(io.BytesIO(server.raw("GET", f"/api/pictures/{key}/thumbnail?side=64")[2])) as small:
        assert (small.format, small.size) == ("WEBP", (64, 64))
    first = server.good("GET", "/api/pictures?query=RED+circle&limit=1")
    assert first["next"]
    second = server.good("GET", f"/api/pictures?query=circle&limit=1&before={first['next']}")
    assert first["pictures"][0]["created"] >= second["pictures"][0]["created"]
    assert first["pictures"][0]["id"] != second["pictures"][0]["id"]
    assert server.good("GET", "/api/pictures?query=zebra")["total"] == 0
    assert server.good("GET", "/api/prompts?query=red")["prompts"][0]["prompt"] == RED["prompt"]


@pytest.mark.page
def test_a_signed_picture_has_a_badge_and_its_download_is_the_signed_file(server, made, tmp_path):
    pytest.importorskip("c2pa", reason="needs c2pa-python, the extra `credentials`")
    key = made["pictures"][0]["picture"]
    assert server.good("GET", f"/api/pictures/{key}")["signed"] is False
    job = server.make(
        prompt="a red cross", model="nano", steps=1, seed=3, format="webp", credentials="require", image=key
    )
    key = job["pictures"][0]["picture"]
    assert server.good("GET", f"/api/pictures/{key}")["signed"] is True
    assert [one["signed"] for one in server.good("GET", "/api/pictures?query=red+cross")["pictures"]] == [True]
    (tmp_path / "a.webp").write_bytes(server.raw("GET", f"/api/pictures/{key}/file?download=1")[2])
    found = read_credentials(tmp_path / "a.webp")  # by the home folder of the tests, which did not sign it
    assert (found["state"], found["ingredients"][0]["relation"]) == ("valid", "parentOf")
    status, answer = server.ask("POST", "/api/queue", {"prompt": "a", "model": "nano", "credentials": "yes"})
    assert (status, answer["error"]["param"]) == (400, "credentials")


@pytest.mark.page
def test_a_dropped_picture_fills_the_form_and_an_image_is_edited(server, made):
    data = server.raw("GET", f"/api/pictures/{made['pictures'][0]['picture']}/file")[2]
    kept = json.loads(server.raw("POST", "/api/uploads", data)[2])
    assert (kept["request"]["prompt"], kept["request"]["seed"], kept["request"]["model"]) == (RED["prompt"], 7, "nano")
    mask = json.loads(server.raw("POST", "/api/uploads", png(96))[2])
    assert (mask["record"], mask["request"], mask["has_alpha"]) == (None, None, False)
    assert server.raw("GET", f"/api/uploads/{mask['id']}")[2].startswith(b"\x89PNG")
    job = server.make(**RED, image=kept["id"], mask=mask["id"])
    assert job["state"] == "done", job
    full = server.good("GET", f"/api/pictures/{job['pictures'][0]['picture']}")
    assert full["request"]["image"] == kept["id"]
    assert "/" not in json.dumps(full["record"].get("adapters", ""))


@pytest.mark.page
def test_events_follow_a_job_and_continue_after_a_break(server):
    def read(last: str, until: str) -> tuple[list[str], str]:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("GET", "/api/events", headers={"Authorization": f"Bearer {server.token}", **(
            {"Last-Event-ID": last} if last else {})})  # fmt: skip
        answer, names, number = connection.getresponse(), [], last
        job = None if last else server.good("POST", "/api/queue", RED)
        while not names or names[-1] != until:
            line = answer.readline().decode()
            number = line[4:].strip() if line.startswith("id: ") else number
            names += [line[7:].strip()] if line.startswith("event: ") else []
        connection.close()
        return names, number if job is None else f"{number} {job['id']}"

    names, place = read("", "progress")
    assert names[0] == "reset"
    number, key = place.split()
    server.ended(key)
    more, _ = read(number, "pictures")
    assert "reset" not in more
    assert "job" in names + more
    assert read("deadbeef-3", "reset")[0] == ["reset"]


@pytest.mark.page
def test_jobs_are_ordered_and_cancelled_and_the_queue_is_bounded(server):
    running = server.good("POST", "/api/queue", LONG | {"steps": 1000})
    one, two, three = (server.good("POST", "/api/queue", RED | {"seed": seed})["id"] for seed in (1, 2, 3))
    listed = server.good("PUT", "/api/queue/order", {"ids": [three, one]})["jobs"]
    assert [job["id"] for job in listed[:4]] == [running["id"], three, one, two]
    assert server.good("DELETE", f"/api/queue/{one}")["state"] == "cancelled"
    server.until(lambda s: s.good("GET", f"/api/queue/{running['id']}")["progress"])
    server.until(lambda s: s.raw("GET", f"/api/queue/{running['id']}/preview")[0] == 200)
    server.good("DELETE", f"/api/queue/{running['id']}")
    assert server.ended(running["id"])["state"] == "cancelled"
    ends = [server.ended(key)["ended"] for key in (three, two)]
    assert ends == sorted(ends)
    assert server.ask("PUT", "/api/queue/order", {"ids": [two]})[0] == 404
    assert server.ask("POST", "/api/queue", RED | {"num_images": 17})[0] == 400
    assert server.ask("POST", "/api/queue", {"model": "nano"})[0] == 400
    assert server.ask("POST", "/api/queue", RED | {"aspect": "1:1", "width": 64})[0] == 400
    assert list((server.home / "interrupted").glob("*.safetensors")) == []


@pytest.mark.page
def test_a_removed_picture_is_in_the_trash(server):
    key = server.make(**RED, format="jpeg")["pictures"][0]["picture"]
    assert server.good("DELETE", f"/api/pictures/{key}") == {"id": key, "trash": True}
    assert server.ask("GET", f"/api/pictures/{key}")[0] == 404
    place = server.home.parent / "data" / "Trash"
    (file,) = (place / "files").iterdir()
    about = (place / "info" / f"{file.name}.trashinfo").read_text()
    assert f"Path={server.home}/pictures/{file.name}\n" in about
    assert f"DeletionDate={datetime.now():%Y-%m-%dT}" in about


def test_files_of_one_name_are_kept_apart_in_the_trash(tmp_path):
    for number in (1, 2):
        file = tmp_path / str(number) / "a b.png"
        file.parent.mkdir()
        file.write_text(str(number))
        trash._to_trash_of_desktops(file, tmp_path / "Trash")
        assert not file.exists()
    for number, name in ((1, "a b.png"), (2, "a b 2.png")):
        assert (tmp_path / "Trash" / "files" / name).read_text() == str(number)
        assert f"/{number}/a%20b.png\n" in (tmp_path / "Trash" / "info" / f"{name}.trashinfo").read_text()


@pytest.mark.parametrize(
    ("program", "kept"),
    [
        (None, {".Trash/a.png", ".Trash/a 2.png"}),
        ('mv "$1" "$(dirname "$0")/taken-$(cat "$1").png"', {"taken-1.png", "taken-2.png"}),
        ("exit 1", {".Trash/a.png", ".Trash/a 2.png"}),
        ("exit 0", {".Trash/a.png", ".Trash/a 2.png"}),  # it says that it did, and did not
    ],
)
def test_on_a_mac_the_program_of_the_system_moves_a_file_to_the_trash(tmp_path, program, kept):
    tool = tmp_path / "trash"
    if program:
        tool.write_text(f"#!/bin/sh\n{program}\n")
        tool.chmod(0o755)
    for number in (1, 2):
        (tmp_path / "a.png").write_text(str(number))
        trash._to_trash_of_macos(tmp_path / "a.png", tmp_path / ".Trash", str(tool))
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")} == kept


@pytest.mark.page
def test_an_idle_model_is_freed_and_loaded_again(tmp_path):
    def model_of(one):
        return one.good("GET", "/api/status")["model"]

    with serving(tmp_path / "home", minute=0.05) as server:
        assert model_of(server) is None  # nothing is loaded before the first job
        server.good("PUT", "/api/settings", {"idle_minutes": 1440})
        first = server.make(**RED)
        loaded = server.good("GET", "/api/status")
        assert loaded["model"] == "nano"
        assert [one["loaded"] for one in server.good("GET", "/api/models")["models"]] == [True]
        server.good("PUT", "/api/settings", {"idle_minutes": 1})
        server.until(lambda one: model_of(one) is None)
        assert server.good("GET", "/api/status")["memory"] < loaded["memory"] / 10
        again = server.make(**RED)
        pair = [server.raw("GET", f"/api/pictures/{job['pictures'][0]['picture']}/file")[2] for job in (first, again)]
        assert pair[0] == pair[1]


@pytest.mark.page
def test_facts_for_the_page(server):
    (nano,) = server.good("GET", "/api/models")["models"]
    assert (nano["name"], nano["default"], nano["previews"], nano["requires_filters"]) == ("nano", True, "live", False)
    assert {"aspect": "3:2", "megapixels": 1.5, "width": 1488, "height": 1024} in nano["sizes"]
    plan = server.good("POST", "/api/plan", RED)
    assert (plan["width"], plan["evaluations"], plan["seconds"]["previews"]) == (96, 4, 0)
    assert plan["peak"] == plan["process"] + max(plan["stages"].values())
    tokens = server.good("POST", "/api/tokens", {"prompt": "a {red|green} ring " + "very " * 200, "model": "nano"})
    assert tokens["pictures"] == 2
    assert tokens["prompts"][0]["clip"]["cut"]
    assert server.good("GET", "/api/adapters") == {"adapters": []}
    assert server.good("PUT", "/api/settings", {"idle_minutes": 5})["idle_minutes"] == 5
    assert server.ask("PUT", "/api/settings", {"idle_minutes": "5"})[0] == 400
    setup = server.good("GET", "/api/setup")
    assert (setup["ready"], setup["missing"]) == (False, ["model"])
    assert server.good("GET", "/api/review")["pictures"] == []
    assert server.good("GET", "/v1/models/nano")["id"] == "nano"
    assert server.ask("POST", "/v1/models")[0] == 405


# --- kills and losses ---


@pytest.mark.page
def test_a_killed_server_continues_its_queue_with_the_same_bytes(tmp_path):
    home = tmp_path / "home"
    with serving(tmp_path / "other") as whole:
        expected = [
            whole.raw("GET", f"/api/pictures/{one['picture']}/file")[2]
            for one in whole.make(**RED, num_images=2)["pictures"]
        ]
    slow = Served(home, step=0.2)
    running = slow.good("POST", "/api/queue", RED | {"num_images": 2})["id"]
    waiting = slow.good("POST", "/api/queue", RED | {"seed": 9})["id"]
    slow.until(lambda s: (s.good("GET", f"/api/queue/{running}")["preview"] or {}).get("step", 0) >= 2)
    assert slow.stop(signal.SIGKILL) == -signal.SIGKILL
    with serving(home) as again:
        job = again.ended(running)
        assert job["state"] == "done", job
        files = [again.raw("GET", f"/api/pictures/{one['picture']}/file")[2] for one in job["pictures"]]
        assert files == expected
        assert again.ended(waiting)["state"] == "done"
        assert list((home / "interrupted").glob("*.safetensors")) == []
        assert again.stop() == 143
    (home / "page.sqlite").unlink()
    with serving(home) as rebuilt:
        shown = rebuilt.good("GET", "/api/pictures")
        assert shown["total"] == 3
        assert {one["job"] for one in shown["pictures"]} == {running, waiting}
        full = rebuilt.good("GET", f"/api/pictures/{job['pictures'][0]['picture']}")
        assert (full["request"]["seed"], full["request"]["model"]) == (7, "nano")
        other = run_command("ui", "--no-open", cwd=tmp_path, FLUX_KREA_HOME=str(home))
        assert (other.returncode, "runs already" in other.stderr) == (2, True)


@pytest.mark.page
def test_a_run_is_taken_up_where_the_database_is_lost_too(tmp_path):
    slow = Served(tmp_path / "home", step=0.2)
    key = slow.good("POST", "/api/queue", RED)["id"]
    slow.until(lambda s: (s.good("GET", f"/api/queue/{key}")["preview"] or {}).get("step", 0) >= 2)
    slow.stop(signal.SIGKILL)
    for path in slow.home.glob("page.sqlite*"):
        path.unlink()
    with serving(slow.home) as again:
        job = again.ended(key)
        assert (job["state"], job["seeds"], job["request"]["prompt"]) == ("done", [7], RED["prompt"])


@pytest.mark.page
def test_setup_on_the_page_shows_the_licence_and_takes_the_agreement(model, tmp_path):
    small = {"width": 32, "height": 32, "num_inference_steps": 2, "guidance_scale": 4.5}
    folder = as_required(model, tmp_path / "home" / "models" / "tiny", defaults=small)
    with serving(tmp_path / "home") as server:
        assert server.good("GET", "/api/setup")["missing"] == ["filters", "licence"]
        for wrong in ({"check": "none"}, {"accept_licence": "x"}, {"model": "/tmp"}, {"offline": 1}):
            assert server.ask("POST", "/api/setup", wrong)[0] == 400
        server.good("POST", "/api/setup", {"check": "review"})

        def ended(one):
            state = one.good("GET", "/api/setup")
            return None if state["running"] else state

        state = server.until(lambda one: (ended(one) or {}).get("licence") and ended(one))
        assert state["licence"]["text"] == acknowledgement.find_text(folder)[1].decode().strip()
        assert [step["name"] for step in state["steps"] if step["state"] == "done"] == ["weights", "checks"]
        server.good("POST", "/api/setup", {"accept_licence": state["licence"]["sha256"]})  # the check was named before
        state = server.until(ended)
        assert {step["state"] for step in state["steps"]} == {"done"}, state
        assert (state["ready"], state["missing"], state["error"], state["licence"]) == (True, [], None, None)
        assert len(server.good("GET", "/api/review")["pictures"]) == 1
        assert str(tmp_path) not in json.dumps(state)


def test_the_server_is_a_verb_with_no_option_for_another_address():
    ran = run_command("ui", "--host", "0.0.0.0", cwd=ROOT)
    assert ran.returncode == 2
