"""Calls to macOS, as far as another machine can see them: the commands that are run, the files written.

The verbs run on the Mac of `mac.py`, and each call that it replaces must have been reached.
"""

import json
import os
import platform
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from types import SimpleNamespace

import mlx.core as mx
import pytest
from helpers import PIPELINE, ROOT, TOKENIZERS, at_terminal
from huggingface_hub import constants
from mac import path_of
from mlx_flux_krea.convert import convert

from mlx_flux_krea import checkpoint, macos, worker
from mlx_flux_krea import convert as converter
from mlx_flux_krea.chip import wheel
from mlx_flux_krea.errors import FiltersError, UsageError
from mlx_flux_krea.filters.ledger import Ledger
from mlx_flux_krea.home import find_model
from mlx_flux_krea.memory import machine_memory


@pytest.fixture
def ready(mac):
    """Can be read as soon as `caffeinate` runs."""
    os.mkfifo(mac.folder / "bin" / "caffeinate.ready")
    descriptor = os.open(mac.folder / "bin" / "caffeinate.ready", os.O_RDONLY | os.O_NONBLOCK)
    yield descriptor
    os.close(descriptor)


def test_the_machine_stays_awake_as_long_as_the_block_and_no_longer_than_the_process(mac, ready, monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    with macos.awake():
        assert select.select([ready], [], [], 30)[0]
        assert mac.calls() == [f"caffeinate -i -w {os.getpid()}"]
        assert started[0].poll() is None
    assert started[0].poll() is not None


def test_a_program_that_ignores_the_request_to_end_holds_nobody_up(ready):
    """A child inherits signals that its parent ignores, as `signals.finish` leaves them after every verb."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        start = time.perf_counter()
        for _ in range(2):
            with macos.awake():
                assert select.select([ready], [], [], 30)[0]
                os.read(ready, 100)
        assert time.perf_counter() - start < 20
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_machine_without_caffeinate_runs_all_the_same(mac, monkeypatch):
    monkeypatch.setenv("PATH", str(mac.folder))
    with macos.awake():
        pass


def test_a_folder_is_left_out_of_spotlight_and_time_machine_once(mac, tmp_path):
    for _ in range(2):
        macos.exclude(tmp_path)
    assert (tmp_path / ".metadata_never_index").read_bytes() == b""
    assert mac.calls() == [f"tmutil addexclusion {tmp_path}", "held 0"]


def test_elsewhere_nothing_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(subprocess, "Popen", None)
    with macos.awake():
        macos.exclude(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert macos.sysctl("hw.memsize") is None
    macos.check_python()


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"sysctl.proc_translated": "1"}, "is built for Intel and runs translated.*prints arm64"),
        ({"sysctl.proc_translated": "0", "machdep.cpu.brand_string": "Apple M2"}, "is built for Intel"),
        ({"machdep.cpu.brand_string": "Intel(R) Core(TM) i7"}, "has an Intel processor"),
        ({}, "has an Intel processor"),
    ],
)
def test_a_python_for_intel_is_named_as_the_problem(mac, monkeypatch, values, problem):
    macos.check_python()
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for name in ("sysctl.proc_translated", "machdep.cpu.brand_string"):
        mac.says(name, None)
    for name, value in values.items():
        mac.says(name, value)
    with pytest.raises(UsageError, match=problem):
        macos.check_python()


def test_the_command_names_it_before_mlx_is_imported(mac):
    """The real command, where MLX cannot be imported at all."""
    mac.says("sysctl.proc_translated", "1")
    script = (
        "import sys, platform; sys.platform = 'darwin'; platform.machine = lambda: 'x86_64'; sys.modules['mlx'] = None;"
        "from mlx_flux_krea import cli; cli.main(sys.argv[1:])"
    )
    for verb, code in (("plan", 2), ("doctor", 2)):
        ran = subprocess.run(
            [sys.executable, "-c", script, verb], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert ran.returncode == code, ran.stderr
        assert ran.stderr.startswith("flux-krea: this Python (")
        assert "is built for Intel and runs translated" in ran.stderr


# --- whole verbs ---

ON_A_MAC = "import sys, mac; mac.install(sys.argv.pop(1)); from mlx_flux_krea import cli; cli.main(sys.argv[1:])"
TINY = ("--width", "32", "--height", "48", "--steps", "2", "--seed", "5")
LEAST = ("--memory", "240MB")  # most of the tiny model is streamed


@pytest.fixture
def own(home):
    """The home folder with the tiny pipeline's name in it."""
    (home / "models").mkdir(parents=True)
    return home


def excluded(mac) -> list[str]:
    return [call.removeprefix("addexclusion ") for call in mac.calls("tmutil")]


def synced(mac) -> set[str]:
    """The files and folders that went to the disk's platter; the random part of a temporary name is left out."""
    return {re.sub(r"\.\d+-[0-9a-f]{16}", "", path) for path in mac.calls("F_FULLFSYNC")}


def test_a_conversion_reads_and_writes_past_the_cache_and_is_excluded_before_it_is_filled(mac, own, command):
    model = own / "models" / "tiny"
    code, _, err = command("convert", PIPELINE, "--tokenizers", TOKENIZERS, "--dtype", "float32", "-o", model)
    assert code == 0, err
    partial = str(own / "models" / ".tiny.flux-krea.partial")
    assert (excluded(mac), mac.calls("held")) == ([partial], ["0"])
    assert len(mac.calls("caffeinate")) == 1
    written = {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()} - {macos.NEVER_INDEX}
    places = [f"{partial}/{name}" for name in written] + [partial, str(own / "models")]
    assert set(places) <= synced(mac)
    bypassed = mac.calls("F_NOCACHE")
    shards = [str(path) for path in PIPELINE.rglob("*.safetensors")]
    assert shards
    assert {*shards, *(f"{partial}/{name}" for name in written)} <= set(bypassed)
    assert command("verify", model)[0] == 0


def test_a_checkpoint_and_the_log_reach_the_platter_and_stay_out_of_backups(mac, own, model, command):
    code, out, err = command("generate", "a cat", "-m", model, "--check", "review", *TINY, *LEAST)
    assert code == 5, out + err
    at = {place: str(own / place) for place in ("quarantine", "log", "interrupted")}
    assert sorted(excluded(mac)) == sorted(at.values())
    assert set(mac.calls("held")) == {"0"}
    assert {f"{at['log']}/log.jsonl", f"{at['log']}/.head.partial"} <= synced(mac)
    assert any(re.fullmatch(rf"{at['interrupted']}/\.[0-9a-f]+\.partial", path) for path in synced(mac))
    assert any(re.fullmatch(rf"{at['quarantine']}/\w+\.noindex/\.\w+\.png\.partial", path) for path in synced(mac))
    streamed = {path for path in mac.calls("F_NOCACHE") if path.startswith(str(model / "transformer"))}
    assert streamed
    assert len(mac.calls("caffeinate")) == 1


def test_a_disk_that_cannot_do_it_is_asked_for_what_it_can(mac, own, model, command, monkeypatch):
    """As disks on a network: F_FULLFSYNC fails there, and fsync does not."""
    plain, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: plain.append(path_of(file)) or fsync(file))
    mac.refuse_full_sync()
    assert command("generate", "a cat", "-m", model, *TINY)[0] == 0
    assert synced(mac)
    assert {re.sub(r"\.\d+-[0-9a-f]{16}", "", path) for path in plain} == synced(mac)


@pytest.mark.slow
def test_a_picture_is_reviewed_in_the_systems_viewer(mac, own, model, tmp_path, command):
    """In another process, at a terminal, with few files, and in a locale without letters beyond ASCII."""
    output = tmp_path / "Zoë"
    output.mkdir()
    generated = command("generate", "a cat named Zoë", "-m", model, "--check", "review", "-o", output / "ü.png", *TINY)
    assert generated[0] == 5, generated
    todo, asks = iter(["Ada\n", "no\n", "no\n"]), re.compile(r"(later\): |\]: |releasing it: |none\): )$")
    code, out, seen = at_terminal(
        "review", cwd=tmp_path, program=(sys.executable, "-c", ON_A_MAC, str(mac.folder)),
        answer=lambda shown: next(todo, "\x04") if asks.search(shown) else "",
        PYTHONPATH=f"{ROOT / 'tests'}{os.pathsep}{ROOT}", TERM="xterm",
    )  # fmt: skip
    assert code == 0, out + seen
    assert (output / "ü.png").exists(), seen
    assert len(mac.calls("open")) == 1


def test_doctor_knows_the_machine_without_proc_and_measures_its_disk(mac, own, command, monkeypatch):
    """As in a virtual machine, where MLX has no GPU."""
    monkeypatch.setattr(mx, "device_info", dict)
    code, out, _ = command("doctor", "--json")
    found = json.loads(out)["findings"]
    assert code == 0, out
    assert found["system"].startswith("macOS 26.2")  # by the kernel: Python was told another
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert machine_memory() == memory * 3 // 4 * 4 // 5
    assert mac.calls("/proc") == ["/proc/meminfo"] * 2
    assert "wired limit the default" in found["memory"]
    assert found["chip"].startswith("Apple M2")
    assert {"-n kern.osproductversion", "-n iogpu.wired_limit_mb", "-n machdep.cpu.brand_string"} <= set(
        mac.calls("sysctl")
    )
    assert "GB/s" in found["disk"]
    first = next(i for i, call in enumerate(mac.calls()) if call.startswith("F_NOCACHE"))
    assert mac.calls()[first + 1].startswith("F_FULLFSYNC")  # the bypass comes before the bytes


# --- mlx's own library ---


@pytest.mark.parametrize(
    ("chip", "version", "library", "kernels", "problem"),
    [
        ("Apple M2", "15.6", b"MLX_CONV_WINOGRAD", b"gemm", None),
        ("Apple M2", "26.0", b"MLX_CONV_WINOGRAD", b"gemm_nax", None),
        ("Apple M4 Max", "26.2", b"MLX_CONV_WINOGRAD", b"gemm", None),
        ("Apple M5", "26.2", b"MLX_CONV_WINOGRAD", b"gemm_nax", None),
        ("Apple M5 Pro", "26.4.1", b"MLX_CONV_WINOGRAD", b"gemm_nax", None),
        ("Apple M6", "27.0", b"MLX_CONV_WINOGRAD", b"gemm_nax", None),
        ("Apple M5", "26.1", b"MLX_CONV_WINOGRAD", b"gemm", None),
        ("Apple M5", "26.1", b"MLX_CONV_WINOGRAD", b"gemm_nax", "which macOS 26.1 cannot do.*update macOS"),
        ("Apple M5 Max", "26.0", b"MLX_CONV_WINOGRAD", b"gemm_nax", "which macOS 26.0 cannot do"),
        ("Apple M5", "26.2", b"MLX_CONV_WINOGRAD", b"gemm", "2.7 times as long.*wheel of mlx-metal for macOS 26"),
        ("Apple M10 Ultra", "30.0", b"MLX_CONV_WINOGRAD", b"gemm", "2.7 times as long"),
        ("Apple M1", "14.0", b"MLX_ENABLE_TF32", b"gemm", "does not know MLX_CONV_WINOGRAD"),
        ("Apple processor", "26.2", b"MLX_CONV_WINOGRAD", b"gemm", None),  # in a virtual machine
        (None, None, b"MLX_CONV_WINOGRAD", b"gemm", None),
    ],
)
def test_doctor_notices_a_library_of_mlx_for_another_mac(
    mac, command, tmp_path, monkeypatch, chip, version, library, kernels, problem
):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libmlx.dylib").write_bytes(b"\0" * 9999 + library + b"\0")
    (tmp_path / "lib" / "mlx.metallib").write_bytes(b"\0" * 9999 + kernels + b"\0")
    mac.says("machdep.cpu.brand_string", chip)
    mac.says("kern.osproductversion", version)
    monkeypatch.setattr(wheel, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    code, out, _ = command("doctor", "--json")
    found = json.loads(out)["findings"]["mlx's library"]
    assert (code, found) == (0, "fits this chip and this macOS") if problem is None else code == 2
    assert problem is None or re.search(f"WRONG: .*{problem}", found)


# --- memory that MLX keeps ---


def test_mlx_keeps_little_freed_memory_on_a_gpu_from_the_start_and_what_it_likes_elsewhere(monkeypatch):
    """A Mac of 8 GB offers 5.3, of which MLX would keep all that is ever freed."""
    limits = []
    monkeypatch.setattr(mx, "set_cache_limit", limits.append)
    worker.limit_cache()
    assert limits == []
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=mx.gpu))
    for offered in (5_300_000_000, 48_000_000_000):
        monkeypatch.setattr(mx, "device_info", lambda offered=offered: {"max_recommended_working_set_size": offered})
        worker.limit_cache()
    worker.limit_cache(2**26)
    assert limits == [331_250_000, 10**9, 2**26]


def test_conversion_and_the_thread_that_computes_set_it_first(monkeypatch, tmp_path):
    begun = []
    for place in (worker, converter):
        monkeypatch.setattr(place, "limit_cache", lambda: begun.append(1) or (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError):
        convert([PIPELINE], tmp_path / "out", tokenizers=TOKENIZERS)
    monkeypatch.setattr(worker, "_waiting", SimpleNamespace(get=lambda: pytest.fail("a job came before the limit")))
    with pytest.raises(InterruptedError):
        worker._work()
    assert len(begun) == 2
    assert list(tmp_path.iterdir()) == []


# --- a file system that folds names ---


def test_a_folder_is_apart_from_itself_in_no_spelling(mac, tmp_path):
    """A conversion onto its own source, named in capitals, or with an umlaut in two characters."""
    shutil.copytree(PIPELINE, tmp_path / "Modèle" / "krea")
    mac.fold(tmp_path)
    for name in ("MODÈLE/krea", "Modèle/KREA", unicodedata.normalize("NFD", "Modèle/krea"), "modèle/Krea/new"):
        with pytest.raises(UsageError, match="overlaps the source"):
            convert([tmp_path / "Modèle" / "krea"], tmp_path / name, tokenizers=TOKENIZERS, force=True)
    assert mac.calls("folded")


def test_a_model_is_replaced_under_another_spelling_of_its_name(mac, model, tmp_path):
    shutil.copytree(model, tmp_path / "krea")
    mac.fold(tmp_path)
    with pytest.raises(UsageError, match="exists"):
        convert([PIPELINE], tmp_path / "Krea", tokenizers=TOKENIZERS)
    convert([PIPELINE], tmp_path / "Krea", tokenizers=TOKENIZERS, force=True)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


@pytest.mark.core("CAT.png")
@pytest.mark.parametrize("name", ["CAT.png", "caT.PNG"])
def test_a_picture_never_replaces_another_of_the_same_name_in_other_letters(mac, own, model, tmp_path, command, name):
    (tmp_path / "cat.png").write_text("mine")
    mac.fold(tmp_path)
    code, out, err = command("generate", "a cat", "-m", model, "-o", name, *TINY)
    assert code == 0, err
    assert (tmp_path / "cat.png").read_text() == "mine"
    assert not out.strip().lower().startswith("cat.png"), out


@pytest.mark.slow
def test_rows_whose_names_fold_into_one_all_keep_their_pictures(mac, own, model, tmp_path, command):
    rows = [{"prompt": "a cat", "output": name} for name in ("é.png", "É.png", "e\u0301.png")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    mac.fold(tmp_path)
    code, out, err = command("generate", "--prompts", "rows.jsonl", "-m", model, *TINY)
    assert code == 0, out + err
    assert len(list(tmp_path.glob("*.png"))) == 3, out


def test_an_installed_model_is_found_however_its_accents_are_kept(mac, own, model, tmp_path, command):
    kept, typed = (unicodedata.normalize(form, "modèle") for form in ("NFD", "NFC"))
    for name in (kept, "other"):
        shutil.copytree(model, own / "models" / name)
    assert [row["name"] for row in json.loads(command("models", "--json")[1])][:2] == [typed, "other"]
    for spelling in (kept, typed):
        assert command("models", "default", spelling)[0] == 0
        assert find_model(None) == find_model(spelling) == own / "models" / kept
    code, _, err = command("models", "rm", typed, "--yes")
    assert (code, [path.name for path in (own / "models").iterdir()]) == (0, ["other"]), err
    assert "model" not in json.loads((own / "config.json").read_text())


def test_a_checkpoint_in_our_folder_is_ours_in_any_spelling(mac, own):
    whole = checkpoint.Checkpoint({"prompt": "a cat"})
    whole.write()
    whole.close()
    mac.fold(own.parent)
    for name in (own.name, own.name.upper()):
        read = checkpoint.Checkpoint.read(own.parent / name / "interrupted" / whole.path.name)
        assert read.is_ours
        read.close()
    assert mac.calls("folded")


@pytest.mark.parametrize("name", ["Documents", "documents", "DESKTOP"])
def test_a_quarantine_where_icloud_may_copy_it_is_refused_in_any_spelling(mac, tmp_path, monkeypatch, name):
    for folder in ("Documents", "Desktop"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    mac.fold(tmp_path)
    with pytest.raises(FiltersError, match="copied to a server"):
        Ledger(tmp_path / name / "krea")
    Ledger(tmp_path / "Pictures" / "krea")


# --- what the system does not let a program see ---

LOOKS = {  # verbs that look around, with their exit codes in a home with one model
    ("models",): 0, ("doctor",): 0, ("plan", "nano"): 0, ("setup", "--offline"): 3, ("inspect", "nano"): 0,
    ("log", "verify"): 0, ("generate", "a cat", "-m", "nano", *TINY): 0, ("review",): 0, ("resume",): 2, ("config",): 0,
}  # fmt: skip
REFUSED = {  # by folder: the verbs that end otherwise, and name it
    "Documents": {},
    "hub": {},
    "home/models": {},
    "home/models/one": {},
    "home/models/one/vae": {"doctor": 3},
    "home/filters": {"doctor": 6},
    "home/filters/nsfw": {"doctor": 6},
    "home/adapters": {},
    "home/interrupted": {},
    "here": {"generate": 2},
}


@pytest.mark.core("Documents", "home/filters", "here")
@pytest.mark.parametrize("place", REFUSED)
def test_no_look_into_a_refused_folder_ends_a_verb(mac, model, tmp_path, command, monkeypatch, place):
    """macOS refuses Documents, Desktop, Downloads and disks apart until a person has allowed them."""
    for name in REFUSED:
        (tmp_path / name / "inside").mkdir(parents=True, exist_ok=True)
    shutil.rmtree(tmp_path / "home" / "models" / "one")
    shutil.copytree(model, tmp_path / "home" / "models" / "one")
    if "filters" not in place:
        shutil.rmtree(tmp_path / "home" / "filters")
    for name, folder in (("HOME", ""), ("FLUX_KREA_HOME", "home"), ("HF_HOME", "hub")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path / "here")
    mac.refuse(tmp_path / place)
    for verb, usual in LOOKS.items():
        code, out, err = command(*verb)
        assert code == REFUSED[place].get(verb[0], usual), (verb, out, err)
        named = re.search("Operation not permitted|refuses to show", out + err)
        assert code == usual or named, (verb, out, err)
    assert mac.calls("refused")
