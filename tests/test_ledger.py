"""Quarantine, log and release: nothing leaves without a verdict about its very pixels, whatever fails, and when."""

import hashlib
import io
import json
import os
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from mlx_flux_krea.errors import FiltersError, FluxKreaError, ResourceError, UsageError
from mlx_flux_krea.filters import ledger as ledgers
from mlx_flux_krea.filters import log
from mlx_flux_krea.filters.ledger import Ledger, Verdict, pixel_hash
from mlx_flux_krea.filters.log import FOLLOWS, Log
from mlx_flux_krea.provenance import SOFTWARE, read_record

RECORD = {"software": SOFTWARE, "prompt": "a secret frog", "seed": 7}
PIXELS = np.arange(24 * 16 * 3, dtype=np.uint8).reshape(16, 24, 3)


@pytest.fixture
def ledger(home):
    return Ledger()


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    return folder


def events(ledger) -> list[str]:
    return [entry["event"] for entry in Log(ledger.root / "log").read()]


def kept(ledger, event=None, check="filters", pixels=PIXELS):
    """A picture in the quarantine of a run that ended, with a verdict."""
    with ledger.run(check) as run:
        one = run.keep(pixels, RECORD)
        return ledger.settle(one, Verdict(event, one.facts["pixels"])) if event else one


def files(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- the way out ---


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_what_passed_is_released_with_its_record_and_the_log_says_so_first(ledger, out, name):
    with ledger.run("filters", model="tiny") as run:
        one = run.keep(PIXELS, RECORD)
        one = ledger.settle(one, Verdict("passed", one.facts["pixels"], scores={"nsfw": 0.1}))
        picture = ledger.hand_over(one)
        ledger.discard(one)
    picture.save(out / name, force=False)
    assert files(out) == [name]
    assert read_record(out / name) == RECORD
    assert events(ledger) == ["run", "generated", "passed", "released", "written"]
    written = ledger.log.read()[-1]
    assert written["pixels"] == pixel_hash(PIXELS)
    assert written["file_sha256"] == hashlib.sha256((out / name).read_bytes()).hexdigest()
    assert files(ledger.quarantine) == []
    buffer = io.BytesIO()
    picture.copy().save(buffer, "PNG")
    assert np.array_equal(np.asarray(Image.open(buffer)), PIXELS)
    assert "frog" not in ledger.log.path.read_text()  # hashes only


@pytest.mark.parametrize(
    ("check", "event"),
    [
        ("filters", None), ("filters", "flagged"), ("filters", "error"), ("filters", "waiting"), ("both", "passed"),
        ("review", "waiting"), ("review", "passed"),
    ],
)  # fmt: skip
def test_nothing_leaves_without_the_verdicts_that_were_asked_for(ledger, check, event):
    one = kept(ledger, event, check)
    with pytest.raises(FiltersError, match='cannot become "released"'):
        ledger.hand_over(one)
    assert one.path.exists()


def test_a_verdict_is_a_verdict_and_about_these_pixels(ledger):
    with ledger.run("filters") as run:
        one, other = run.keep(PIXELS, RECORD), run.keep(PIXELS[::-1], RECORD)
        for wrong in (True, "passed", {"event": "passed"}, Verdict("passed", other.facts["pixels"])):
            with pytest.raises(ValueError, match=r"Ledger\.settle"):
                ledger.settle(one, wrong)
        assert pixel_hash(PIXELS) != pixel_hash(PIXELS.reshape(24, 16, 3))
    assert events(ledger) == ["run", "generated", "generated"]


def test_flagged_and_unsettled_pictures_are_approved_by_a_person_only_once(ledger):
    for event in ("flagged", "error", "waiting"):
        one = kept(ledger, event)
        yes = Verdict("approved", one.facts["pixels"], reviewer="Ada", answers={"unlawful": False})
        one = ledger.settle(one, yes)
        with pytest.raises(FiltersError, match='"approved" cannot become "approved"'):
            ledger.settle(one, yes)
        assert np.array_equal(np.asarray(ledger.hand_over(one)), PIXELS)
        assert ledger.log.picture(one.image)["reviewer"] == "Ada"


def test_a_file_swapped_between_check_and_release_is_not_released(ledger):
    for swap in (lambda p: Image.fromarray(PIXELS[::-1]).save(p), lambda p: p.write_bytes(b"x"), lambda p: p.unlink()):
        one = kept(ledger, "passed")
        swap(one.path)
        with pytest.raises(FiltersError, match="changed after it was judged"):
            ledger.hand_over(one)
        assert ledger.log.picture(one.image)["event"] == "error"


def test_another_record_is_a_swap_too(ledger):
    one = kept(ledger, "passed")
    ledgers.Picture.from_pixels(PIXELS, RECORD | {"prompt": "another"}).save(one.path)
    with pytest.raises(FiltersError, match="changed after it was judged"):
        ledger.hand_over(one)


def released(ledger):
    one = kept(ledger, "passed")
    picture = ledger.hand_over(one)
    ledger.discard(one)
    return picture


def test_pixels_that_were_changed_after_their_release_are_not_saved(ledger, out):
    picture = released(ledger)
    picture.putpixel((0, 0), (255, 0, 0))
    with pytest.raises(UsageError, match="changed after it was released"):
        picture.save(out / "a.png")
    assert files(out) == []


def test_a_picture_that_the_log_does_not_know_is_not_saved(ledger, out):
    picture = ledgers.Released.from_pixels(PIXELS, RECORD)
    picture.image, picture.root = "0" * 32, ledger.root
    with pytest.raises(FiltersError, match="does not say that this picture was released"):
        picture.save(out / "a.png")
    assert files(out) == []


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_an_encoder_that_writes_something_else_is_caught(ledger, out, name, monkeypatch):
    picture, save = released(ledger), Image.Image.save
    monkeypatch.setattr(
        Image.Image, "save", lambda self, *args, **more: save(Image.new("RGB", self.size), *args, **more)
    )
    with pytest.raises(FiltersError, match="does not show the released picture"):
        picture.save(out / name)
    monkeypatch.undo()
    more = {"save_all": True, "append_images": [Image.new("RGB", (24, 16))]}
    if name != "a.jpg":
        with pytest.raises(FiltersError, match="does not show the released picture"):
            picture.save(out / name, **more)
    assert files(out) == []
    picture.save(out / name, **({} if name == "a.png" else {"quality": 1}))
    assert files(out) == [name]


def test_nothing_is_overwritten_without_force_and_the_log_says_that_it_was_not_written(ledger, out):
    (out / "a.png").write_bytes(b"before")
    picture = released(ledger)
    with pytest.raises(FileExistsError):
        picture.save(out / "a.png", force=False)
    assert (out / "a.png").read_bytes() == b"before"
    picture.save(out / "b.png", force=False)
    assert events(ledger)[-3:] == ["written", "unwritten", "written"]


def fails(number):
    def call(*args, **more):
        raise OSError(number, os.strerror(number))

    return call


def test_a_full_disk_of_the_output_is_said_and_leaves_nothing(ledger, out, monkeypatch):
    picture = released(ledger)
    monkeypatch.setattr(ledgers, "replacing", lambda path, force: fails(28)())
    with pytest.raises(OSError, match="No space"):
        picture.save(out / "a.png")
    assert (files(out), events(ledger)[-1]) == ([], "released")


@pytest.mark.parametrize(("number", "error"), [(28, ResourceError), (30, FiltersError)])
def test_a_quarantine_that_cannot_be_written_keeps_nothing(ledger, monkeypatch, number, error):
    with ledger.run("filters") as run:
        monkeypatch.setattr("mlx_flux_krea.files.os.replace", fails(number))
        with pytest.raises(error):
            run.keep(PIXELS, RECORD)
        monkeypatch.undo()
        assert not list(run.folder.glob("*.p*"))


# --- the log ---


def test_every_event_has_its_place(ledger):
    one = kept(ledger, "passed")
    for event in FOLLOWS.keys() - {"released", "error", "waiting", "purged"}:
        with pytest.raises(FiltersError, match="cannot become"):
            ledger.log.append(event, image=one.image)


@pytest.mark.parametrize("place", ["os.fsync", "os.replace"])
@pytest.mark.parametrize("number", [28, 30])
def test_a_log_that_cannot_be_written_releases_nothing(ledger, out, monkeypatch, place, number):
    picture, one = released(ledger), kept(ledger, "passed")
    monkeypatch.setattr(f"mlx_flux_krea.filters.log.{place}", fails(number))
    with pytest.raises(FiltersError, match=r"the log .* cannot be written"):
        ledger.hand_over(one)
    with pytest.raises(FluxKreaError, match=r"the log .* cannot be written|a\.png (is full|cannot be written)"):
        picture.save(out / "a.png")
    monkeypatch.undo()
    assert files(out) == []
    Log(ledger.root / "log").read()  # and stays sound


def test_a_log_that_really_has_no_room_is_cut_back_to_its_last_entry(home, tmp_path):
    """A limit of the system on the size of a file: the write itself stops in the middle."""
    script = """
import resource, signal
from mlx_flux_krea.errors import FiltersError
from mlx_flux_krea.filters.ledger import Ledger
log = Ledger().log
log.append("note", text="x" * 100)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
try:
    log.append("note", text="x" * 1000)
except FiltersError as error:
    print(error.exit_code, error)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("6 the log ")
    assert (home / "log" / "log.jsonl").read_bytes().count(b"\n") == 1
    assert [entry["n"] for entry in Log(home / "log").read()] == [1]


def lines(ledger) -> list[bytes]:
    return ledger.log.path.read_bytes().splitlines(keepends=True)


CHANGES = {
    "a fact": lambda lines: [lines[0], lines[1].replace(b'"seed": 7', b'"seed": 8'), *lines[2:]],
    "a line out of the middle": lambda lines: [lines[0], *lines[2:]],
    "the first line": lambda lines: lines[1:],
    "the last line": lambda lines: lines[:-1],
    "everything": lambda lines: [],
    "the order": lambda lines: [lines[1], lines[0], *lines[2:]],
    "a line twice": lambda lines: [lines[0], lines[0], *lines[1:]],
    "a line of rubbish": lambda lines: [lines[0], b"rubbish\n", *lines[1:]],
    "rubbish for the last line": lambda lines: [*lines[:-1], b"rubbish\n"],
    "a forged last line": lambda lines: [*lines[:-1], lines[-1].replace(b"passed", b"flagged")],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_log_is_noticed(ledger, change):
    kept(ledger, "passed")
    ledger.log.path.write_bytes(b"".join(CHANGES[change](lines(ledger))))
    with pytest.raises(FiltersError, match=r"log\.jsonl was changed") as caught:
        Log(ledger.root / "log").read()
    assert caught.value.exit_code == 6
    with pytest.raises(FiltersError, match="was changed"):
        kept(Ledger())


def test_a_log_that_is_cut_while_a_process_has_it_is_noticed(ledger):
    kept(ledger, "passed")
    ledger.log.path.write_bytes(b"".join(lines(ledger)[:-1]))
    with pytest.raises(FiltersError, match="shorter than it was"):
        ledger.log.append("note")


@pytest.mark.parametrize("head", [b"", b"x y", b"99 " + b"0" * 64, b"\xff", None])
def test_a_changed_head_is_noticed(ledger, head):
    kept(ledger)
    path = ledger.root / "log" / "head"
    path.unlink() if head is None else path.write_bytes(head)
    with pytest.raises(FiltersError, match="its end is missing, or its head"):
        Log(ledger.root / "log").read()


@pytest.mark.parametrize("tail", [b'{"n": 3, "ti', b"rubbish\n"])
def test_a_line_torn_by_a_crash_is_named_as_one_and_the_chain_goes_on(ledger, tail):
    kept(ledger)
    with open(ledger.log.path, "ab") as file:
        file.write(tail)
    Log(ledger.root / "log").read()
    kept(Ledger())
    assert events(ledger) == ["run", "generated", "torn", "error", "run", "generated"]
    assert [entry["n"] for entry in Log(ledger.root / "log").read()] == [1, 2, 4, 5, 6, 7]


def test_processes_write_one_chain(home):
    script = (
        "from mlx_flux_krea.filters.ledger import Ledger\nfor i in range(40): Ledger().log.append('note', number=i)"
    )
    started = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(2)]
    assert [process.wait(60) for process in started] == [0, 0]
    assert [entry["n"] for entry in Log(home / "log").read()] == list(range(1, 81))


@pytest.mark.parametrize(("what", "says"), [("pipe", "device or a pipe"), ("/dev/zero", "device"), ("hole", "larger")])
def test_a_log_that_is_no_file_or_has_no_end_is_refused_unread(ledger, what, says):
    kept(ledger)
    path = ledger.log.path
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "hole":
        path.touch()
        os.truncate(path, 2**40)  # with nothing on the disk
    else:
        path.symlink_to(what)
    with pytest.raises(FiltersError, match=says) as caught:
        Ledger(ledger.root).waiting()
    assert caught.value.exit_code == 6


def test_a_line_of_the_log_is_read_once_however_much_is_asked(ledger, monkeypatch):
    """A long log takes as long as its lines, not as long as its lines times the pictures of a run."""
    for _ in range(5):
        released(ledger)
    read, real = [], log._parse
    monkeypatch.setattr(log, "_parse", lambda line: read.append(line) or real(line))
    again = Ledger(ledger.root)
    images = again.log.images()
    for image in images:
        assert again.log.picture(image)["event"] == "released"
        assert not again.log.has_written(image)
        assert again.log.is_withheld(image) is False
    again.log.append("note")
    assert len(images) == 5
    assert read == [line.rstrip() for line in lines(ledger)]


# --- quarantine ---


def test_quarantine_and_log_are_private_and_names_tell_nothing(ledger):
    one = kept(ledger)
    for folder in (ledger.quarantine, one.path.parent, ledger.root / "log"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(ledger.log.path.stat().st_mode) == 0o600
    assert len(one.image) == 32
    assert not any("frog" in name for name in files(ledger.root))
    assert one.path.parent.suffix == ".noindex"  # Spotlight leaves such folders alone


@pytest.mark.parametrize(
    "part", ["Dropbox", "Dropbox (Personal)", "Mobile Documents", "OneDrive - Work", "Google Drive"]
)
def test_no_quarantine_where_files_are_copied_to_a_server(tmp_path, part):
    with pytest.raises(FiltersError, match=r"copied to a server.*FLUX_KREA_HOME"):
        Ledger(tmp_path / part / "flux-krea")
    assert files(tmp_path) == []
    Ledger(tmp_path / "Dropboxes")


def test_a_home_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FiltersError, match="cannot be written: Not a directory"):
        Ledger(tmp_path / "file" / "home")
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "log.jsonl").mkdir()
    with pytest.raises(FiltersError, match="cannot be opened: Is a directory") as caught:
        Ledger(tmp_path).log.read()
    assert caught.value.exit_code == 6


DIES = """
import os, signal, sys
import numpy as np
from mlx_flux_krea.filters.ledger import Ledger, Verdict
from mlx_flux_krea.provenance import SOFTWARE
ledger = Ledger()
moment = sys.argv[1]
with ledger.run("filters") as run:
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)
    if moment == "before the log":
        ledger.log.append = lambda *args, **more: die()
    one = run.keep(np.arange(24 * 16 * 3, dtype=np.uint8).reshape(16, 24, 3), {"software": SOFTWARE, "seed": 1})
    if moment == "generated":
        die()
    one = ledger.settle(one, Verdict(moment if moment == "flagged" else "passed", one.facts["pixels"]))
    if moment in ("passed", "flagged"):
        die()
    picture = ledger.hand_over(one)
    die()
"""


@pytest.mark.parametrize(
    ("moment", "event"),
    [
        ("before the log", "error"), ("generated", "error"), ("passed", "waiting"), ("flagged", "flagged"),
        ("released", "waiting"),
    ],
)  # fmt: skip
def test_what_a_killed_process_leaves_waits_for_a_person(ledger, out, moment, event):
    ran = subprocess.run([sys.executable, "-c", DIES, moment], check=False, cwd=out)
    assert ran.returncode == -signal.SIGKILL
    (one,) = ledger.waiting()
    assert one.facts["event"] == event
    with pytest.raises(FiltersError, match='cannot become "released"'):
        ledger.hand_over(one)
    ledger.recover()
    (one,) = Ledger().waiting()  # once is enough
    assert one.facts["event"] == event
    approved = ledger.settle(one, Verdict("approved", one.facts["pixels"], reviewer="Ada"))
    assert np.array_equal(np.asarray(ledger.hand_over(approved)), PIXELS)
    assert files(out) == []


def test_a_run_that_lives_is_left_alone_by_others_and_by_itself(ledger):
    with ledger.run("filters") as run:
        one = run.keep(PIXELS, RECORD)
        with Ledger().run("filters"):
            pass
        script = "from mlx_flux_krea.filters.ledger import Ledger; print(len(Ledger().waiting()))"
        ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert ran.stdout == "0\n"
        assert ledger.log.picture(one.image)["event"] == "generated"
        with Ledger().claimed(one) as is_mine:
            assert not is_mine
    assert [k.facts["event"] for k in ledger.waiting()] == ["error"]


def test_one_person_at_a_time_reviews_a_picture(ledger):
    one = kept(ledger, "waiting")
    with ledger.claimed(one) as mine, Ledger().claimed(one) as theirs:
        assert (mine, theirs) == (True, False)
        ledger.settle(one, Verdict("rejected", one.facts["pixels"]))
        ledger.discard(one)
    with ledger.claimed(one) as mine:
        assert not mine
    assert files(ledger.quarantine) == []


@pytest.mark.parametrize("days", [31, 4000, -4000])
def test_a_clock_that_jumps_deletes_nothing(ledger, days):
    waiting = [kept(ledger, event) for event in ("waiting", "flagged", "error")]
    for one in waiting:
        moment = time.time() - days * 86400
        os.utime(one.path, (moment, moment))
    assert [one.image for one in ledger.waiting()] == [one.image for one in waiting]


def test_a_picture_whose_file_was_placed_is_not_written_twice(ledger, out):
    """Killed between the name of the file and the end of the review: it does not wait again."""
    one = kept(ledger, "waiting")
    ledger.settle(one, Verdict("approved", one.facts["pixels"], reviewer="somebody"))
    ledger.hand_over(one).save(out / "a.png")
    assert one.path.exists()
    assert Ledger().waiting() == []
    assert (files(out), one.path.exists()) == (["a.png"], False)
    assert events(ledger).count("written") == 1


@pytest.mark.parametrize(
    ("dies_in", "written", "waits"), [("files.give_name", 1, 0), ("ledger.sync", 0, 1), ("ledger._compare", 0, 1)]
)
def test_a_picture_is_written_once_whenever_the_review_is_killed(ledger, out, dies_in, written, waits):
    """Killed once the log says it, the next start gives the file its name; before, the picture waits again."""
    kept(ledger, "waiting")
    script = f"""
import os, sys
from pathlib import Path
from mlx_flux_krea import files
from mlx_flux_krea.filters import ledger
it = ledger.Ledger(Path({str(ledger.root)!r}))
(one,) = it.waiting()
with it.claimed(one):
    settled = it.settle(one, ledger.Verdict("approved", one.facts["pixels"], reviewer="somebody"))
    picture = it.hand_over(settled)
    real = {dies_in}
    {dies_in} = lambda *given: real(*given) if "head" in str(given) or ".json" in str(given) else os._exit(9)
    picture.save({str(out / "a.png")!r}, force=False)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    assert [one.facts["event"] for one in Ledger(ledger.root).waiting()] == ["waiting"] * waits
    assert [path.name for path in out.iterdir()] == ["a.png"] * written
    assert events(ledger).count("written") == written


def test_a_picture_whose_file_was_not_placed_waits_again(ledger, out):
    one = kept(ledger, "waiting")
    ledger.settle(one, Verdict("approved", one.facts["pixels"], reviewer="somebody"))
    ledger.hand_over(one).save(out / "a.png")
    (out / "a.png").write_bytes(b"another file")
    assert [again.image for again in Ledger().waiting()] == [one.image]


def test_a_planted_link_with_a_temporary_name_is_not_followed(ledger, out, monkeypatch):
    monkeypatch.setattr("mlx_flux_krea.files.secrets.token_hex", lambda count: "0" * 2 * count)
    victim = out / "victim"
    victim.write_text("precious")
    (out / f".a.png.{os.getpid()}-{'0' * 16}.partial").symlink_to(victim)
    with pytest.raises(FileExistsError):
        released(ledger).save(out / "a.png")
    assert victim.read_text() == "precious"


def test_prompts_are_logged_by_a_hash_that_only_this_installation_makes(ledger, tmp_path):
    first = ledger.fingerprint("a cat")
    assert Ledger(ledger.root).fingerprint("a cat") == first != Ledger(tmp_path / "other").fingerprint("a cat")
    assert first != hashlib.sha256(b"a cat").hexdigest()
    assert (ledger.root / "log" / "salt").stat().st_mode & 0o777 == 0o600


def test_a_damaged_file_in_quarantine_is_deleted_and_a_half_written_one_too(ledger):
    one = kept(ledger, "waiting")
    (one.path.parent / "stranger.png").write_bytes(b"x")
    (one.path.parent / ".stranger.png.1.partial").write_bytes(b"x")
    assert [k.image for k in ledger.waiting()] == [one.image]
    assert sorted(p.suffix for p in one.path.parent.iterdir()) == ["", ".png"]
    assert json.loads(lines(ledger)[-1])["reasons"] == ["its file is damaged"]


def test_what_waits_comes_oldest_first_though_all_were_made_in_one_second(ledger):
    made = [kept(ledger, "flagged").image for _ in range(8)]
    assert [one.image for one in Ledger().waiting()] == made
