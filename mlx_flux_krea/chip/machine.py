"""Everything around a machine's arithmetic: wheel, device, long commands, memory, files, sleep, terminal."""

import fcntl
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import mlx.core as mx

from .. import __version__, macos
from ..commands.shared import terminal
from ..commands.shared.estimates import device, this_chip
from ..errors import gpu_error
from ..files import give_name, sync, try_lock
from ..models.layers import in_rows
from ..presets import CHIPS
from . import wheel
from .check import NO_GPU, NO_MAC, CheckResult, Setting, is_gpu, normal
from .products import SHAPES

# Seconds of one command. `in_rows` makes parts of a quarter of a second; the system was seen to end commands of several
# seconds while the display needs the GPU (ml-explore/mlx#3267).
LIMIT = 1.0
_TOKENS = 16896  # of a picture of 2048 x 2048
_HEADS, _WIDTH = 24, 128
_PATIENCE = 60  # seconds for another process

# In another process, since an allocator that does not say no ends it.
ALLOCATION = """
import sys
import mlx.core as mx
try:
    mx.eval(mx.zeros((2**20, 2**20), mx.float32))
except RuntimeError as error:
    print(" ".join(str(error).split()))
print(mx.sum(mx.ones((4,))).item())
"""
LOCK = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'rb'), fcntl.LOCK_EX | fcntl.LOCK_NB)"


def library(setting: Setting) -> CheckResult:
    """Checks that the installed MLX was made for this chip and this macOS."""
    is_here, problem = wheel.library_problem()
    if problem:
        return CheckResult(problem.found, problem.expected, False, problem.todo)
    if not is_here:
        return CheckResult(NO_MAC)
    return CheckResult(f"made for {device()} and macOS {wheel.macos_version()}")


def backend(setting: Setting) -> CheckResult:
    """Checks that MLX computes on Metal by default, on a Mac."""
    found = f"{device()}, flux-krea {__version__}, mlx {version('mlx')} on {'its GPU' if is_gpu() else 'the CPU'}"
    if sys.platform != "darwin":
        return CheckResult(f"{NO_MAC}: {found}")
    peak = CHIPS.get(this_chip() or "")
    known = f"{found}, peak {peak} TFLOP/s" if peak else f"{found}, peak not known"
    return CheckResult(known, "Metal", is_gpu(), "a virtual machine may have no GPU: run it on the Mac itself")


def switch(name: str, setting: Setting) -> CheckResult:
    """Checks that a way of MLX to compute less exactly is switched off."""
    variable, effect = wheel.SWITCHES[name]
    value = os.environ.get(variable, "")
    found = f"{'off' if value == '0' else 'on'}, {variable} is {value or 'not set'}"
    return CheckResult(found, "off", value == "0", f"unset {variable}: {effect}")


def longest_command(setting: Setting) -> CheckResult:
    """Times the commands of the longest attention and the longest product, of a picture of 2048 x 2048."""
    tokens, heads = _TOKENS // setting.divisor, max(1, _HEADS // setting.divisor)
    q, k, v = (normal((1, heads, tokens, _WIDTH), mx.bfloat16, seed) for seed in range(3))
    inputs, outputs = (side // setting.divisor for side in SHAPES[1][1:])
    x, weight = normal((1, tokens, inputs), mx.bfloat16), normal((inputs, outputs), mx.bfloat16)
    seconds: dict[str, list[float]] = {"attention": [], "product": []}

    def timed(kind: str, command, rows: mx.array) -> mx.array:
        start = perf_counter()
        result = command(rows)
        mx.eval(result)
        seconds[kind].append(perf_counter() - start)
        return result

    def attend(queries: mx.array) -> mx.array:
        return timed("attention", lambda q: mx.fast.scaled_dot_product_attention(q, k, v, scale=_WIDTH**-0.5), queries)

    mx.eval(in_rows(attend, q, 4 * heads * tokens**2 * _WIDTH, axis=2))
    mx.eval(in_rows(lambda rows: timed("product", lambda y: mx.matmul(y, weight), rows), x, 2 * x.size * outputs))
    longest = max(max(each) for each in seconds.values())
    each = ", ".join(f"{kind} {max(took):.2g} s ({len(took)} commands)" for kind, took in seconds.items())
    if not is_gpu():
        return CheckResult(f"{NO_GPU}, which has no limit: {each}", figures={"seconds": longest})
    todo = "the system may end such commands: let the display sleep, or make smaller pictures; please report the chip"
    return CheckResult(each, f"at most {LIMIT:g} s", longest <= LIMIT, todo, {"seconds": longest})


def allocation(setting: Setting) -> CheckResult:
    """Checks that too large an allocation raises an error that this program knows, and that computing goes on."""
    if not is_gpu():
        return CheckResult(f"{NO_GPU}, whose allocator does not say no")
    ran = subprocess.run(
        [sys.executable, "-c", ALLOCATION],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE, check=False,
    )  # fmt: skip
    said, _, after = ran.stdout.strip().rpartition("\n")
    is_right = ran.returncode == 0 and gpu_error(RuntimeError(said)) is not None and after == "4.0"
    found = f"raises an error: {said}" if said and ran.returncode == 0 else f"the process ended with {ran.returncode}"
    todo = "a picture that is too large will end the program: plan its memory with flux-krea plan"
    return CheckResult(found, "an error of the allocator, and a program that goes on", is_right, todo)


def names(setting: Setting) -> CheckResult:
    """Checks that a file takes a free name at once, and that a taken one is not written over."""
    with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
        first, second, third, name = (Path(folder) / name for name in ("first", "second", "third", "name"))
        for file in (first, second, third):
            file.write_bytes(file.name.encode())
        give_name(first, name, force=False)
        try:
            give_name(second, name, force=False)
            is_refused = False
        except FileExistsError:
            is_refused = True
        is_kept = name.read_bytes() == b"first"
        found = "a taken name is refused" if is_refused else "a taken name is written over"
        found += "" if is_kept or not is_refused else ", and its file is lost"
        how = "links" if _has_links(third, Path(folder) / "link") else "no links, as on exFAT"
    todo = "keep $FLUX_KREA_HOME and pictures on a disk of this Mac"
    return CheckResult(f"{found}; {how}", "refused", is_refused and is_kept, todo)


def _has_links(path: Path, link: Path) -> bool:
    try:
        os.link(path, link)
        return path.samefile(link)
    except OSError:
        return False


def locks(setting: Setting) -> CheckResult:
    """Checks that a lock keeps another process out, and ends with its file."""
    with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
        path = Path(folder) / "lock"
        held = try_lock(path)
        kept_out = _another_is_refused(path)
        if held is not None:
            os.close(held)
        is_free = not _another_is_refused(path)
    found = f"{'kept out' if kept_out else 'let in'} while it is held, {'let in' if is_free else 'kept out'} afterwards"
    is_right = held is not None and kept_out and is_free
    todo = "this disk knows no locks: keep $FLUX_KREA_HOME on a disk of this Mac, and run one flux-krea at a time"
    return CheckResult(f"another process is {found}", "kept out, then let in", is_right, todo)


def _another_is_refused(path: Path) -> bool:
    ran = subprocess.run([sys.executable, "-S", "-c", LOCK, path], capture_output=True, timeout=_PATIENCE, check=False)
    return ran.returncode != 0


def written_down(setting: Setting) -> CheckResult:
    """Checks that the disk writes down an open file when it is asked to."""
    with tempfile.TemporaryFile(dir=setting.folder) as file:
        file.write(b"written")
        file.flush()
        sync(file.fileno())
        if (command := getattr(fcntl, "F_FULLFSYNC", None)) is None:
            return CheckResult(f"{NO_MAC}: fsync")
        try:
            fcntl.fcntl(file.fileno(), command)
        except OSError as error:
            todo = "a power cut may lose the log: keep $FLUX_KREA_HOME on a disk of this Mac"
            return CheckResult(f"F_FULLFSYNC fails: {error.strerror}", "F_FULLFSYNC", False, todo)
    return CheckResult("F_FULLFSYNC")


def stays_awake(setting: Setting) -> CheckResult:
    """Checks that `caffeinate` runs as long as a run does, and ends with it."""
    if sys.platform != "darwin":
        return CheckResult(NO_MAC)
    with macos.awake() as process:
        runs = process is not None and process.poll() is None
    ended = process is not None and process.poll() is not None
    found = f"{'runs' if runs else 'does not run'} during a run, {'ends' if ended else 'does not end'} with it"
    return CheckResult(f"caffeinate {found}", "runs, then ends", runs and ended, "end it: killall caffeinate")


def shows_pictures(setting: Setting) -> CheckResult:
    """Checks that a terminal which says by its variables that it shows pictures answers as such a one does."""
    protocol = terminal.protocol()
    if protocol is None:
        return CheckResult("not known to show pictures: they open in the system's viewer")
    answer = terminal.asked(protocol)
    if answer is None:
        return CheckResult(f"by the protocol of {protocol}; nobody asked, since this is no terminal")
    found = f"by the protocol of {protocol}, {'and it answers' if answer else 'but it does not answer'}"
    todo = "pictures may not be seen in it: `review` asks whether they were"
    return CheckResult(found, "an answer", answer, todo)
