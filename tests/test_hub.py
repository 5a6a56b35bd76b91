"""Sources on the hub: the real command against a hub on this machine, with everything that can go wrong on the way."""

import http.server
import json
import os
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
from helpers import PIPELINE, REFERENCE, TOKENIZERS, at_terminal, run_command
from hub import WEIGHTS, Hub
from huggingface_hub import ModelInfo, get_session
from mlx_flux_krea.convert import _check_disk, convert, hub
from mlx_flux_krea.convert.room import Room

from mlx_flux_krea.errors import ModelError, ResourceError, UsageError

REPO = "black-forest-labs/FLUX.1-Krea-dev"
OPTIONS = ("-o", "model", "--dtype", "float32", "-q", "none")
NOT_NEEDED = (
    "flux1-krea-dev.safetensors",
    "ae.safetensors",
    "README.md",
    "transformer/optimizer.bin",
    ".gitattributes",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The reference's tiny pipeline as Krea is published: single files beside the folders, and more."""
    folder = tmp_path_factory.mktemp("published") / REPO.split("/")[1]
    shutil.copytree(PIPELINE, folder)
    shutil.copytree(TOKENIZERS, folder, dirs_exist_ok=True)
    (folder / "LICENSE.md").write_text("A Non-Commercial License of these tests.\n")
    for name in NOT_NEEDED:
        (folder / name).write_bytes(b"not needed")
    return folder


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    """The folder that conversion from the disk makes."""
    target = tmp_path_factory.mktemp("models")
    convert([folder], target / "model", dtype="float32")
    return made(target, repository="")


@pytest.fixture
def served(folder):
    with Hub(folder, REPO) as served:
        yield served


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def made(folder: Path, repository: str = REPO) -> dict[str, bytes]:
    """Every file of the model in a folder, without the repository that it records, which must be this one."""
    files = contents(folder / "model")
    index, manifest = (json.loads(files.pop(name)) for name in ("model_index.json", "manifest.json"))
    assert index.pop("repository") == repository
    assert manifest.pop("model_index.json")["sha256"]
    return files | {"model_index.json": json.dumps(index).encode(), "manifest.json": json.dumps(manifest).encode()}


def weights(folder: Path) -> dict[str, int]:
    """The weight files that a conversion needs, and their sizes."""
    paths = [p for p in folder.rglob("*.safetensors") if p.parent != folder]
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in paths}


def run(served: Hub, tmp_path: Path, *args, timeout: float = 120, **env):
    arguments = ("convert", served.repo, *OPTIONS, *args)
    return run_command(*arguments, cwd=tmp_path, timeout=timeout, **served.env(tmp_path, **env))


def begin(served: Hub, tmp_path: Path, *args) -> subprocess.Popen:
    """The command, running."""
    program = [str(Path(sys.executable).parent / "flux-krea"), "convert", served.repo, *OPTIONS, *args]
    env = {**os.environ, **served.env(tmp_path)}
    return subprocess.Popen(
        program, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def until(condition, process: subprocess.Popen, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def in_cache(tmp_path: Path) -> set[str]:
    """Names of the files that programs find in the cache."""
    snapshots = (tmp_path / "hub" / "hub").glob("models--*/snapshots/*")
    return {name for snapshot in snapshots for name in contents(snapshot)}


def leftovers(tmp_path: Path) -> list[str]:
    """Names of the incomplete files in the cache."""
    return [p.name for p in (tmp_path / "hub").rglob("*.incomplete")]


# --- all is well ---


@pytest.mark.slow
def test_a_repository_becomes_what_its_folder_becomes_and_nothing_is_fetched_twice(served, folder, expected, tmp_path):
    """Then again, by the hub's cache alone; then offline, with nobody there."""
    ran = run(served, tmp_path)
    assert (ran.returncode, ran.stdout) == (0, "model\n"), ran.stderr
    assert made(tmp_path) == expected
    asked = set(served.fetched())
    assert asked.isdisjoint(NOT_NEEDED)
    assert asked == set(contents(folder)) - set(NOT_NEEDED)
    assert asked == in_cache(tmp_path)
    headers = len(weights(folder)) * 2**18
    assert served.sent <= sum(weights(folder).values()) + headers
    served.requests.clear()
    ran = run(served, tmp_path, "--force")
    assert ran.returncode == 0, ran.stderr
    assert served.fetched() == []
    served.stop()
    ran = run(served, tmp_path, "--force", "--offline")
    assert ran.returncode == 0, ran.stderr
    assert made(tmp_path) == expected


@pytest.mark.slow
def test_the_hubs_own_client_shares_the_cache(served, folder, tmp_path):
    """Neither program fetches the files again that the other one has fetched."""

    def client(script: str) -> str:
        env = {**os.environ, **served.env(tmp_path)}
        ran = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
        return ran.stdout.strip()

    name = "text_encoder_2/model.safetensors"
    client(f"from huggingface_hub import hf_hub_download as get; print(get({REPO!r}, {name!r}))")
    served.requests.clear()
    assert run(served, tmp_path).returncode == 0
    assert name not in served.fetched()
    found = client(f"from huggingface_hub import snapshot_download as get; print(get({REPO!r}, local_files_only=True))")
    assert contents(Path(found)) == {n: data for n, data in contents(folder).items() if n not in NOT_NEEDED}


@pytest.mark.slow
def test_a_filter_is_fetched_without_its_pickles(tmp_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("filter") / "nsfw_image_detection"
    shutil.copytree(REFERENCE / "vit", folder)
    for name in ("pytorch_model.bin", "optimizer.pt", "falconsai_yolov9_nsfw_model_quantized.pt", "labels.json"):
        (folder / name).write_bytes(b"not needed")
    with Hub(folder, "Falconsai/nsfw_image_detection") as served:
        ran = run_command(
            "convert",
            served.repo,
            "--allow-unknown-filter",
            cwd=tmp_path,
            **served.env(tmp_path, FLUX_KREA_HOME=str(tmp_path / "home")),
        )
        assert ran.returncode == 0, ran.stderr
        assert set(served.fetched()) == {"config.json", "preprocessor_config.json", "model.safetensors"}
    assert (tmp_path / "home" / "filters" / "nsfw" / "model_index.json").exists()


PUBLISHED = {
    "Pixtral, with Mistral's own file beside it": (
        ["config.json", "model.safetensors.index.json", "preprocessor_config.json", "tokenizer.json"]
        + [f"model-0000{n}-of-00006.safetensors" for n in range(1, 7)],
        ["consolidated.safetensors", "tekken.json", "params.json", "README.md", "model.onnx"],
    ),
    "one file": (["flux1-dev-fp8.safetensors", "LICENSE.md"], ["README.md", "flux1-dev-Q4_0.gguf", "dev_grid.jpg"]),
    "a GGUF": (["flux1-dev-Q4_0.gguf", "config.json"], ["flux1.ckpt", "flax_model.msgpack", "media/a.json"]),
    "mflux": (
        ["transformer/0.safetensors", "transformer/1.safetensors", "tokenizer/vocab.json", "vae/0.safetensors"],
        ["transformer/0.h5", "vae/sub/0.safetensors", "tokenizer/notes.txt"],
    ),
}


@pytest.mark.parametrize(("needed", "others"), PUBLISHED.values(), ids=list(PUBLISHED))
def test_of_what_is_published_only_this_is_needed(needed, others):
    assert hub._needed([*others, *needed]) == sorted(needed)


# --- cut, stopped and killed ---


@pytest.mark.slow
def test_what_is_cut_goes_on_where_it_ended(served, folder, expected, tmp_path):
    cuts = [random.Random(seed).randrange(1, 900_000) for seed in range(6)]
    served.cut_after = [*cuts[:2], *[10**9] * 4, *cuts[2:]]  # a header, then the files themselves
    ran = run(served, tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert made(tmp_path) == expected
    begun = [start for name in weights(folder) for start in served.begun_at(name)]
    assert len([start for start in begun if start]) >= 3, f"cut at {cuts}"
    assert served.sent < sum(weights(folder).values()) + 8 * 2**18  # nothing came twice but headers


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.slow
def test_pieces_are_written_while_others_come_and_whatever_ends_it_the_next_start_goes_on(
    served, folder, expected, tmp_path, number
):
    total, served.rate = sum(weights(folder).values()), 2e6
    process = begin(served, tmp_path)
    written = tmp_path / ".model.flux-krea.partial" / "vae" / "model.safetensors.index.json"
    until(written.exists, process)
    assert served.sent < total
    until(lambda: len(leftovers(tmp_path)) == 1, process)
    process.send_signal(number)
    begun = time.monotonic()
    assert process.wait(30) == (130 if number == signal.SIGINT else -signal.SIGKILL)
    process.stderr.close()
    assert time.monotonic() - begun < 10
    assert not (tmp_path / "model").exists()
    here = in_cache(tmp_path) & weights(folder).keys()
    assert here, "some were whole"
    served.requests.clear()
    served.rate = None
    ran = run(served, tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert made(tmp_path) == expected
    assert here.isdisjoint(served.fetched())
    assert any(start for name in weights(folder) for start in served.begun_at(name)), "one was in the middle"
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_a_terminal_shows_what_came_and_the_time_left(served, tmp_path):
    served.rate = 2e6
    code, _, shown = at_terminal("convert", REPO, *OPTIONS, cwd=tmp_path, size=(30, 100), **served.env(tmp_path))
    assert code == 0, shown
    assert re.search(r"fetching +: +\d+%.*/\S+M \[\d+:\d+<\d+:\d+, +\S+B/s\]", shown), shown


# --- refused ---

GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted: you are not in the authorized list"}
REFUSED = {
    "gated, nobody is logged in": (
        {"gated": "auto"}, {}, [f"{REPO} is gated", "nobody is logged in", f"/{REPO}", "hf auth login"],
    ),
    "gated, not accepted": (
        {"refusals": [(403, GATED)]}, {"HF_TOKEN": "hf_good"}, ["not in the authorized list", f"/{REPO}", "accept it"],
    ),
    "gated, and refused without a code": (
        {"gated": "auto", "refusals": [(401, {})]}, {}, [f"{REPO} is gated", "nobody is logged in", "hf auth login"],
    ),
    "refused without a code": (
        {"refuse_all": (401, {})}, {}, ["gated, private, or not there", "accept it", f"/{REPO}", "hf auth login"],
    ),
    "refused without a code, with a login": (
        {"refuse_all": (401, {})}, {"HF_TOKEN": "hf_good"}, ["this login", "HF_TOKEN"],
    ),
    "an expired login": ({}, {"HF_TOKEN": "hf_old"}, ["expired", "HF_TOKEN"]),
    "not the name of a repository": (
        {"refuse_all": (404, {"X-Error-Code": "RepoNotFound"})}, {}, ["neither a file or folder", "OWNER/NAME"],
    ),
    "private": ({"refuse_all": (401, {"X-Error-Code": "RepoNotFound"})}, {}, ["nor a repository", "hf auth login"]),
    "more requests than allowed": (
        {"refusals": [(429, {"Retry-After": "1000"})]}, {}, ["too many requests", "in 1000 s"],
    ),
    "out of order": ({"refuse_all": (503, {"Retry-After": "1000"})}, {}, ["the hub fails (503)", "start again"]),
    "something else answers": ({"refuse_all": (200, {"Content-Type": "text/html"})}, {}, ["is not the hub", "proxy"]),
    "a file is gone": ({"refusals": [(404, {"X-Error-Code": "EntryNotFound"})]}, {}, ["LICENSE.md any more"]),
}  # fmt: skip


@pytest.mark.parametrize(("orders", "env", "words"), REFUSED.values(), ids=list(REFUSED))
def test_a_refusal_is_explained(served, tmp_path, orders, env, words):
    served.tokens = {"hf_good": "somebody"}
    for name, value in orders.items():
        setattr(served, name, list(value) if isinstance(value, list) else value)
    ran = run(served, tmp_path, **env)
    assert (ran.returncode, ran.stdout) == (3, ""), ran.stderr
    assert len(ran.stderr.splitlines()) == 1, ran.stderr
    assert all(word in ran.stderr for word in words), ran.stderr
    assert "hf_" not in ran.stderr
    assert [p.name for p in tmp_path.iterdir() if p.name != "hub"] == []
    assert served.sent == 0, "no weights were fetched"


LIES = {
    **{f"weights of {size}": ("safetensors", {"size": size}) for size in (2**70, 2**44, -7, True, "7", 1.5, None)},
    **{f"JSON of {size}": ("json", {"size": size}) for size in (2**70, 10**10, -7)},
    "no hash": ("safetensors", {"lfs": {"sha256": "../../x", "size": 5, "pointerSize": 1}}),
    "a hash of 7": ("json", {"blobId": 7}),
    "a number as LFS": ("safetensors", {"lfs": 7}),
    "a number as a name": ("", {"rfilename": 7}),
    "no name": ("", {"rfilename": None}),
    "one name outside": ("", {"rfilename": "../../evil.safetensors"}),
    "an absolute name": ("", {"rfilename": "/evil.safetensors"}),
}
ANSWERS = {
    **{f"siblings {value}": {"siblings": value} for value in ("abc", 7, [7], {}, None)},
    **{f"commit {value}": {"sha": value} for value in ("../../x", 7, None, "a" * 100_000)},
}


@pytest.mark.parametrize("lie", [*LIES, *ANSWERS])
def test_an_answer_that_cannot_be_true_is_refused(folder, monkeypatch, lie):
    info = Hub(folder, REPO).info()
    if lie in ANSWERS:
        info |= ANSWERS[lie]
    for entry in info["siblings"] if lie in LIES else ():
        if entry["rfilename"].endswith(LIES[lie][0]):
            entry |= LIES[lie][1]
    monkeypatch.setattr("huggingface_hub.model_info", lambda repo, **_: ModelInfo(**info))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ModelError, match=r"the hub gives|the hub's answer|holds no weights"):
        hub.look(REPO)


def test_what_cannot_be_converted_is_refused_before_its_weights_come(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "published" / "name")
    (broken / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with Hub(broken, "owner/name") as served:
        ran = run(served, tmp_path)
        assert ran.returncode == 3
        assert "owner/name/transformer lacks the shard diffusion_pytorch_model-00002" in ran.stderr
        assert served.sent <= 2**18 * len(weights(broken))


@pytest.mark.slow
def test_a_pause_that_the_hub_asks_for_is_kept(served, expected, tmp_path):
    served.refusals = [(429, {"Retry-After": "2"}), (429, {"RateLimit": '"api";r=0;t=1'}), (503, {})]
    begun = time.monotonic()
    ran = run(served, tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert made(tmp_path) == expected
    assert time.monotonic() - begun > 4


@pytest.mark.parametrize("fault", ["redirects", "protocol", "certificate", "network"])
def test_what_no_further_attempt_heals_is_told_at_once(fault):
    """And a network that was away for a moment is asked again, as long as nobody stops it."""
    session, calls, stop = get_session(), [], threading.Event()

    class Circle(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    def call():
        calls.append(1)
        if fault == "protocol":
            session.get("nothing://host/file")
        if fault == "certificate":
            raise hub._failures()[0]("no") from ssl.SSLCertVerificationError(1, "self-signed")
        if fault == "network":
            stop.set()
            raise hub._failures()[0]("the network is unreachable")
        session.get(f"http://127.0.0.1:{server.server_port}/", follow_redirects=True)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Circle) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(CancelledError if fault == "network" else hub._failures()):
            hub.patiently(call, stop=stop)
        server.shutdown()
    assert len(calls) == 1


@pytest.mark.slow
def test_whoever_is_allowed_gets_what_is_gated(served, tmp_path):
    served.gated, served.tokens = "manual", {"hf_good": "somebody"}
    ran = run(served, tmp_path, HF_TOKEN="hf_good")
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
def test_a_file_with_another_hash_is_refused_and_deleted(served, folder, expected, tmp_path):
    name = "text_encoder/model.safetensors"
    served.spoiled = {name}
    ran = run(served, tmp_path)
    assert ran.returncode == 3
    assert f"{name} of {REPO} has other content than" in ran.stderr
    assert name not in in_cache(tmp_path)
    assert leftovers(tmp_path) == []
    assert not (tmp_path / "model").exists()
    served.spoiled.clear()
    assert run(served, tmp_path).returncode == 0
    assert made(tmp_path) == expected


@pytest.mark.slow
def test_a_file_that_was_damaged_in_the_cache_is_seen(served, tmp_path):
    assert run(served, tmp_path).returncode == 0
    (damaged,) = (tmp_path / "hub" / "hub").glob("models--*/snapshots/*/vae/*.safetensors")
    data = damaged.read_bytes()
    damaged.resolve().write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    ran = run(served, tmp_path, "--force", "--offline")
    assert ran.returncode == 3
    assert "vae/diffusion_pytorch_model.safetensors" in ran.stderr


@pytest.mark.slow
def test_a_beginning_that_was_damaged_is_seen_when_the_rest_has_come(served, tmp_path):
    assert run(served, tmp_path).returncode == 0
    (link,) = (tmp_path / "hub" / "hub").glob("models--*/snapshots/*/vae/*.safetensors")
    blob, data = link.resolve(), link.read_bytes()
    blob.unlink()
    blob.with_name(f"{blob.name}.incomplete").write_bytes(bytes([data[0] ^ 1]) + data[1 : len(data) // 2])
    served.requests.clear()
    ran = run(served, tmp_path, "--force")
    assert (ran.returncode, "has other content than" in ran.stderr) == (3, True), ran.stderr
    assert len(data) // 2 in served.begun_at(f"vae/{link.name}"), "only the rest was asked for"
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_a_hub_that_goes_away_half_way_leaves_what_came(served, folder, expected, tmp_path):
    total = sum(weights(folder).values())
    served.gone_after = total // 2
    soon = (  # half a minute is for people
        "from mlx_flux_krea import cli; from mlx_flux_krea.convert import hub; hub._TRIES = 3; cli.main()"
    )
    ran = subprocess.run(
        [sys.executable, "-c", soon, "convert", served.repo, *OPTIONS], cwd=tmp_path,
        env={**os.environ, **served.env(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 3
    assert f"of {REPO} was not fetched" in ran.stderr
    assert "start again" in ran.stderr
    assert not (tmp_path / "model").exists()
    with Hub(folder, REPO) as back:
        ran = run(back, tmp_path)
        assert ran.returncode == 0, ran.stderr
        assert back.sent < 0.7 * total + 2**18 * len(weights(folder))
    assert made(tmp_path) == expected


@pytest.mark.slow
def test_without_a_network_it_says_so(served, tmp_path):
    """A port at which nobody listens; a proxy that is not there."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        for env in (
            {"HF_ENDPOINT": closed},
            {"HTTP_PROXY": closed, "http_proxy": closed, "NO_PROXY": "", "no_proxy": ""},
        ):
            ran = run(served, tmp_path, **env)
            assert ran.returncode == 3, ran.stderr
            assert "the hub is out of reach" in ran.stderr
            assert "connect, and start again" in ran.stderr
            assert "--offline" not in ran.stderr  # nothing is in the cache
    ran = run(served, tmp_path, "--offline")
    assert ran.returncode == 3
    assert "nothing of such a repository in the hub's cache" in ran.stderr
    assert served.requests == []


# --- disk ---


@pytest.mark.slow
def test_what_is_fetched_is_deleted_once_it_is_converted(served, folder, expected, tmp_path):
    """An interrupted download continues; files that were here before stay."""
    name = "text_encoder_2/model.safetensors"
    script = f"from huggingface_hub import hf_hub_download as get; get({REPO!r}, {name!r})"
    env = {**os.environ, **served.env(tmp_path)}
    subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, check=True)
    served.rate = 2e6
    process = begin(served, tmp_path, "--discard-source")
    written = tmp_path / ".model.flux-krea.partial" / "vae" / "model.safetensors.index.json"
    until(written.exists, process)
    process.kill()
    process.wait()
    process.stderr.close()
    served.rate = None
    ran = run(served, tmp_path, "--discard-source")
    assert ran.returncode == 0, ran.stderr
    assert made(tmp_path) == expected
    assert leftovers(tmp_path) == []
    assert [n for n in in_cache(tmp_path) if n.endswith(WEIGHTS)] == [name]
    large = [p for p in (tmp_path / "hub").rglob("blobs/*") if p.stat().st_size == weights(folder)[name]]
    assert len(large) == 1
    assert not [
        p
        for p in (tmp_path / "hub").rglob("blobs/*")
        if p.stat().st_size in weights(folder).values() and p not in large
    ]


def test_only_what_is_fetched_can_be_discarded(command, folder):
    for sources, words in (
        ([folder], "--discard-source is only for"),
        ([REPO, "--offline"], "--offline fetches nothing"),
    ):
        code, _, err = command("convert", *sources, "--discard-source")
        assert code == 2
        assert words in err


@pytest.mark.parametrize(
    ("free", "discard", "fits"),
    [(58, False, False), (59, False, True), (48, True, False), (49, True, True)],
)
def test_disk_is_counted_before_the_first_byte(tmp_path, monkeypatch, free, discard, fits):
    """In GB: encoders of 10 become 6, a transformer of 24 becomes 18; the encoders may be gone when it is stored."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, int(free * 1e9)))
    room = Room((10 * 10**9, 24 * 10**9), (6 * 10**9, 18 * 10**9))
    if fits:
        _check_disk(tmp_path / "model", room, discard)
    else:
        with pytest.raises(ResourceError, match="GB are free") as error:
            _check_disk(tmp_path / "model", room, discard)
        assert ("`discard_source`" in str(error.value)) is not discard


# --- names and logins ---


def test_a_path_is_never_taken_for_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_repo_id(REPO)
    (tmp_path / REPO).mkdir(parents=True)
    for source in (REPO, "name", "./owner/name", "owner/name/", "/owner/name", "a/b/c", "owner/..", "owner/a--b"):
        assert not hub.is_repo_id(source), source


@pytest.mark.slow
def test_one_process_at_a_time_fetches_a_repository(served, tmp_path):
    served.rate = 1e6
    process = begin(served, tmp_path)
    until(lambda: leftovers(tmp_path), process)
    ran = run(served, tmp_path, "-o", "other")
    process.kill()
    process.wait()
    process.stderr.close()
    assert ran.returncode == UsageError.exit_code
    assert "by another process" in ran.stderr


@pytest.mark.slow
def test_who_is_logged_in_is_told_without_the_token(served, tmp_path):
    served.tokens = {"hf_good": "somebody"}
    script = "from mlx_flux_krea.convert import hub; print(hub.login())"

    def ask(**env):
        env = {**os.environ, **served.env(tmp_path, **env)}
        return subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)

    assert ask().stdout == "None\n"
    assert ask(HF_TOKEN="hf_good").stdout == "somebody\n"
    assert ask(HF_TOKEN="hf_good", HF_HUB_OFFLINE="1").stdout == "someone\n"
    old = ask(HF_TOKEN="hf_old")
    assert "does not know this login" in old.stderr
    assert "hf_old" not in old.stderr
