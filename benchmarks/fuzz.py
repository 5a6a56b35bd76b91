"""Hostile files: any file ends a command with one sentence and its exit code, soon, and in its own place.

    python benchmarks/fuzz.py [--cases 20000] [--seed 0] [--kinds weights json ...] [--jobs 2] [--state FILE]

A case is a valid file with some damage, chosen by the seed and the number of the case alone, and a command that opens
it. Commands run one after the other in a worker process, which is replaced when it hangs or dies. A case fails when it
ends in a traceback (exit code 1) or a crash, takes more than 10 s, takes the process above 1 GB of memory, or changes a
file outside the folder it may write to. With `--state` finished cases are kept in FILE, and a second start continues
after them. The last line is JSON: cases by kind and exit code, and every failure with the number that repeats it
(`--only NUMBER`).
"""

import argparse
import contextlib
import copy
import io
import json
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data"
SECONDS, BYTES = 10, 10**9
NUMBERS = ["-7", "0", "1", "2e0", "1e999", "-1e999", "NaN", "Infinity", str(2**31), str(2**63), str(2**70), str(10**13)]
VALUES = [
    *NUMBERS,
    "null",
    "true",
    '""',
    "[]",
    "{}",
    '"\\ud800"',
    '"../../x"',
    '"/etc/passwd"',
    '"%s"' % ("n" * 70_000),
]
DEEP = "[" * 100_000


# --- damage ---


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Returns bytes with one to three random faults: cut, flipped, repeated, overwritten or grown."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(7)
        if kind == 0:
            del data[at:]
        elif kind == 1 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[at:at] = data[at : at + rng.choice((1, 8, 1000))]
        elif kind == 3:
            data[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1)))
        elif kind == 4:
            data[:at] = b""
        elif kind == 5:
            data[at:at] = rng.randbytes(rng.choice((1, 16, 4096)))
        else:
            data[at : at + 4] = rng.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xef\xbb\xbf", b"<htm", b"PK\3\4"))
    return bytes(data)


def damaged_json(text: str, rng: random.Random) -> str:
    """Returns JSON with another value, a missing or renamed key, or deep nesting; of other text, damaged text."""
    try:
        obj = json.loads(text)
    except ValueError:
        return damaged(text.encode(), rng).decode("latin-1")
    places = list(_places(obj))
    if not places or rng.random() < 0.15:
        return damaged(text.encode(), rng).decode("latin-1")
    parent, key = rng.choice(places)
    kind = rng.randrange(5)
    if kind == 0 and isinstance(parent, dict):
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice(("x" * 70_000, "", "\0", "__proto__", key + " ", "\x1b[2J"))] = parent.pop(key)
    elif kind == 2:
        other, name = rng.choice(places)
        parent[key] = copy.deepcopy(other[name])
    else:
        parent[key] = "\0mark"
    made = json.dumps(obj)
    return made.replace('"\\u0000mark"', DEEP if rng.random() < 0.05 else rng.choice(VALUES))


def _places(obj):
    """Yields every (parent, key) of a JSON value."""
    for key in list(obj) if isinstance(obj, dict) else range(len(obj)) if isinstance(obj, list) else ():
        yield obj, key
        yield from _places(obj[key])


def damaged_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Returns a safetensors file with damage in its header's JSON, its length, or anywhere."""
    if rng.random() < 0.3:
        return damaged(data, rng)
    (length,) = struct.unpack("<Q", data[:8])
    header = damaged_json(data[8 : 8 + length].decode(), rng).encode("utf-8", "surrogateescape")
    size = len(header) if rng.random() < 0.9 else rng.choice((0, 1, 2**40, 2**63))
    return struct.pack("<Q", size) + header + data[8 + length :]


# --- cases ---


class Cases:
    """Valid files of every kind, and a case by its number: the files written into a folder, and the command.

    Args:
        folder: samples are made in it once; they are read only afterwards.
    """

    KINDS = ("weights", "gguf", "json", "home", "tokenizer", "resume", "picture", "prompts", "hub", "adapters")

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = DATA / "written_before" / "model"
        self.tokenizers = DATA / "tokenizers"
        self.gguf = folder / "t5.gguf"
        self.limit = ["--memory", "1kB"]  # refused once everything else is read: no case generates a picture

    def make_samples(self) -> None:
        """Writes the one sample that is not among the tests' data."""
        import gguf
        import numpy as np

        writer = gguf.GGUFWriter(self.gguf, "flux")
        for number in range(6):
            writer.add_tensor(f"double_blocks.{number}.img_attn.qkv.weight", np.ones((6, 32), np.float16))
        writer.add_tensor("img_in.weight", np.ones((4, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with zipfile.ZipFile(DATA / "adapters" / "files.zip") as archive:
            archive.extractall(self.folder / "adapters")
        self._install(self.folder / "adapters" / "kohya.safetensors")

    def _install(self, file: Path) -> None:
        """Makes the folder of an installed adapter, as the first use of a file does."""
        from mlx_flux_krea.adapters import installed
        from mlx_flux_krea.weights import open_model

        before = os.environ.get("FLUX_KREA_HOME")
        os.environ["FLUX_KREA_HOME"] = str(self.folder / "home")
        try:
            installed.obtain(file, open_model(self.model).sizes, name="style")
            (self.folder / "home" / "adapters" / "style").rename(self.folder / "installed")
        finally:
            os.environ.pop("FLUX_KREA_HOME") if before is None else os.environ.update(FLUX_KREA_HOME=before)

    def case(self, kind: str, rng: random.Random, inside: Path, home: Path) -> list[str]:
        """Writes the files of a case and returns its command."""
        return getattr(self, f"_{kind}")(rng, inside, home)

    def _weights(self, rng, inside, home):
        samples = [*(DATA / "reference" / "edit" / "bfl").glob("*.safetensors"), *self.model.glob("*/*.safetensors")]
        sample = rng.choice(sorted(samples))
        file = inside / rng.choice(("model.safetensors", "._x.safetensors", "M.SAFETENSORS"))
        file.write_bytes(damaged_safetensors(sample.read_bytes(), rng))
        if rng.random() < 0.1:
            return ["convert", str(file), "--tokenizers", str(self.tokenizers), "-o", "made"]
        return ["inspect", str(file), *(["--json"] if rng.random() < 0.5 else [])]

    def _adapters(self, rng, inside, home):
        """A damaged adapter of any trainer is described, installed or used; or one in the home folder is damaged."""
        samples = sorted((self.folder / "adapters").glob("*.safetensors"))
        sample, command = rng.choice(samples), rng.choice(("inspect", "add", "generate", "installed"))
        file = inside / rng.choice(
            ("style.safetensors", "._x.safetensors", "a=b.safetensors", "adapter_model.safetensors")
        )
        file.write_bytes(damaged_safetensors(sample.read_bytes(), rng))
        if rng.random() < 0.2:
            (inside / "adapter_config.json").write_text(rng.choice((*VALUES, DEEP, '{"r": 4, "lora_alpha": "x"}')))
        use = ["generate", "a cat", "-m", str(self.model), *self.limit, "--lora"]
        if command == "inspect":
            return ["inspect", str(file), *(["--json"] if rng.random() < 0.5 else [])]
        if command == "add":
            return ["models", "add", str(file)]
        if command == "generate":
            return [*use, f"{file}={rng.choice(('0.5', '-1', 'x', '1e400', ''))}"]
        kept = home / "adapters" / "style"
        shutil.copytree(self.folder / "installed", kept)
        for name in rng.sample(("adapter.json", "manifest.json"), rng.randint(0, 2)):
            _write_json(kept / name, rng)
        if rng.random() < 0.5:
            path = kept / "adapter.safetensors"
            path.write_bytes(damaged_safetensors(path.read_bytes(), rng))
        return rng.choice((["models"], ["inspect", "style"], [*use, "style"], ["models", "rm", "style", "--yes"]))

    def _gguf(self, rng, inside, home):
        file = inside / "model.gguf"
        file.write_bytes(damaged(self.gguf.read_bytes(), rng))
        return ["inspect", str(file)]

    def _json(self, rng, inside, home):
        folder = self._copied(inside)
        file = rng.choice(sorted(path for path in folder.rglob("*.json") if "tokenizer" not in path.parts[-2]))
        _write_json(file, rng)
        command = rng.choice((["inspect"], ["verify"], ["plan"], ["generate", "a cat", *self.limit, "-m"]))
        return [*command, str(folder)]

    def _home(self, rng, inside, home):
        shutil.copytree(DATA / "written_before" / "home", home)
        file = rng.choice(sorted(p for p in home.rglob("*") if p.suffix in (".json", ".jsonl") or p.name == "head"))
        if file.suffix == ".json":
            _write_json(file, rng)
        else:
            file.write_bytes(damaged(file.read_bytes(), rng))
        return rng.choice((["config"], ["models"], ["log", "verify"], ["log", "export"], ["doctor"]))

    def _tokenizer(self, rng, inside, home):
        folder = self._copied(inside)
        file = rng.choice(sorted(p for p in folder.glob("tokenizer*/*")))
        if file.suffix == ".json":
            _write_json(file, rng)
        else:
            _replace(file, damaged(file.read_bytes(), rng))
        return ["generate", "a cat", "-m", str(folder), *self.limit]

    def _resume(self, rng, inside, home):
        data = (DATA / "written_before" / "unfinished.safetensors").read_bytes()
        file = inside / "run.safetensors"
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        if rng.random() < 0.7:  # in the JSON that the command keeps inside the metadata
            facts = header["__metadata__"]["flux-krea"].replace("/tmp/fx/tiny", str(self.model))
            header["__metadata__"]["flux-krea"] = damaged_json(facts, rng)
            text = json.dumps(header).encode()
            data = struct.pack("<Q", len(text)) + text + data[8 + length :]
        else:
            data = damaged_safetensors(data, rng)
        file.write_bytes(data)
        return ["resume", str(file), "-m", str(self.model), *self.limit]

    def _picture(self, rng, inside, home):
        sample = DATA / "written_before" / f"cat.{rng.choice(('png', 'jpg', 'webp'))}"
        file = inside / sample.name
        file.write_bytes(damaged(sample.read_bytes(), rng))
        verb = rng.choice((["inspect"], ["generate", "--from"], ["generate", "a cat", "--image"]))
        return [*verb, str(file), *([] if verb == ["inspect"] else ["-m", str(self.model), *self.limit])]

    def _prompts(self, rng, inside, home):
        rows = '{"prompt": "a red ring", "seed": 3, "output": "p1.png"}\n{"prompt": "b", "steps": 5, "width": 64}\n'
        table = 'prompt,seed,width,output\na cat,1,32,x.png\n"a, dog",2,64,y.webp\n'
        suffix, text = rng.choice(((".jsonl", rows), (".csv", table), (".txt", "a cat\na dog\n")))
        if suffix == ".jsonl" and rng.random() < 0.7:
            first, second = text.splitlines()
            text = f"{damaged_json(first, rng)}\n{second}\n"
            data = text.encode("utf-8", "surrogateescape")
        else:
            data = damaged(text.encode(), rng)
        file = inside / f"rows{suffix}"
        file.write_bytes(data)
        return ["generate", "--prompts", str(file), "-m", str(self.model), *self.limit]

    def _hub(self, rng, inside, home):
        return ["convert", "owner/name", "-o", "made"]  # the worker's server answers with damage

    def _copied(self, inside: Path) -> Path:
        """A copy of the model folder that costs no disk: files are links to the same bytes until one is replaced."""
        return Path(shutil.copytree(self.model, inside / "model", copy_function=os.link))


def _replace(file: Path, data: bytes) -> None:
    file.unlink()
    file.write_bytes(data)


def _write_json(file: Path, rng: random.Random) -> None:
    _replace(file, damaged_json(file.read_text(), rng).encode("utf-8", "surrogateescape"))


# --- the worker: runs cases in one process ---


def work(folder: Path, seed: int, kinds: list[str]) -> None:
    """Reads numbers from standard input and prints how each case ended, as JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    cases, mine = Cases(folder), folder / f"worker-{os.getpid()}"
    server = _LyingHub() if "hub" in kinds else None
    os.environ |= {
        "HOME": str(folder / "user"),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hub-cache"),
        "COLUMNS": "80",
    }
    if server:
        os.environ |= {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    from mlx_flux_krea import cli

    if server:
        from mlx_flux_krea.convert import hub

        hub._TRIES = 1
    for line in sys.stdin:
        number = int(line)
        kind = kinds[number % len(kinds)]
        rng = random.Random(f"{seed} {kind} {number}")
        shutil.rmtree(mine, ignore_errors=True)
        inside, out, home = mine / "in", mine / "out", mine / "home"
        inside.mkdir(parents=True), out.mkdir()
        os.environ["FLUX_KREA_HOME"] = str(home)
        os.chdir(out)
        argv = cases.case(kind, rng, inside, home)
        if server:
            server.rng = random.Random(f"{seed} answers {number}")
        before = _listing(inside) | _listing(folder / "canary") | _listing(folder / "user")
        _reset_peak()
        code, said = _run(cli, argv)
        moved = before != _listing(inside) | _listing(folder / "canary") | _listing(folder / "user")
        report = {"number": number, "kind": kind, "code": code, "peak": _peak(), "moved": moved}
        if code == 1 or "Traceback" in said or moved:
            report |= {"argv": argv, "said": said[-1500:]}
        answers.write(json.dumps(report) + "\n")
        answers.flush()
        os.chdir(folder)
    shutil.rmtree(mine, ignore_errors=True)
    os._exit(0)


def _run(cli, argv: list[str]) -> tuple[int, str]:
    """Runs the command's own main. Returns its exit code and what it wrote to standard error."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace") for _ in range(2)]
    code = 0
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            cli.main(argv)
        except SystemExit as end:
            code = end.code or 0
        except BaseException as error:  # nothing may come this far
            streams[1].write(f"Traceback: {type(error).__name__}: {error}")
            code = 1
    streams[1].flush()
    return code, streams[1].buffer.getvalue().decode("utf-8", "replace")


def _listing(folder: Path) -> dict:
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


def _reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Returns the most memory in bytes since `_reset_peak`; 0 where the system does not tell."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    return 0


class _LyingHub:
    """A hub on this machine whose answers about a repository are damaged."""

    def __init__(self):
        import threading
        from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

        files = [p for p in (DATA / "reference" / "pipeline").rglob("*") if p.is_file()]
        names = [(p.relative_to(DATA / "reference" / "pipeline").as_posix(), p.stat().st_size) for p in sorted(files)]
        lfs = {"sha256": "0" * 64, "pointerSize": 134}
        siblings = [
            {"rfilename": n, "size": s, "blobId": "0" * 40, **({"lfs": lfs | {"size": s}} if n.endswith("rs") else {})}
            for n, s in names
        ]
        told = {
            "id": "owner/name",
            "sha": "c0ffee" * 6 + "c0de",
            "gated": False,
            "private": False,
            "siblings": siblings,
        }
        self.rng, text, lying = random.Random(0), json.dumps(told), self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                is_api = self.path.startswith("/api/models/owner/name")
                body = damaged_json(text, lying.rng).encode("utf-8", "surrogateescape") if is_api else b"{}"
                self.send_response(200 if is_api else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(body if self.command == "GET" else b"")

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()


# --- the parent: hands out numbers, watches the clock ---


class Worker:
    """A worker process and the number it is at work on."""

    def __init__(self, folder: Path, seed: int, kinds: list[str]):
        command = [sys.executable, __file__, "--worker", str(folder), "--seed", str(seed), "--kinds", *kinds]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self.number: int | None = None
        self.begun, self.cases = 0.0, 0

    def give(self, number: int) -> None:
        """Hands it a case."""
        self.number, self.begun = number, time.monotonic()
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()

    def crash(self) -> dict:
        """Returns a report of a process that ended by itself."""
        code = self.process.wait()
        self.errors.seek(0)
        return {"fault": f"crash {code}", "said": self.errors.read()[-1500:]}

    def end(self) -> None:
        """Ends it, whatever it does."""
        self.process.kill()
        self.process.wait()


def run(cases: range | list[int], seed: int, kinds: list[str], jobs: int, state: Path | None = None) -> dict:
    """Runs cases and returns counts by kind and exit code, and the failures."""
    known = [json.loads(line) for line in state.read_text().splitlines()] if state and state.exists() else []
    done = {report["number"] for report in known}
    todo = iter([number for number in cases if number not in done])
    reports = list(known)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        (folder / "canary").mkdir()
        (folder / "canary" / "precious.txt").write_text("not yours")
        (folder / "user").mkdir()
        Cases(folder).make_samples()
        workers = [Worker(folder, seed, kinds) for _ in range(jobs)]
        idle = list(workers)
        while True:
            for worker in idle:
                if (number := next(todo, None)) is not None:
                    worker.give(number)
            idle = []
            busy = [worker for worker in workers if worker.number is not None]
            if not busy:
                break
            ready, _, _ = select.select([worker.process.stdout for worker in busy], [], [], 0.5)
            for worker in busy:
                report = None
                first = SECONDS if worker.cases else 60  # imports, on a busy machine
                if worker.process.stdout in ready:
                    line = worker.process.stdout.readline()
                    report = json.loads(line) if line else worker.crash()
                elif time.monotonic() - worker.begun > first:
                    report = {"fault": f"hang above {first} s"}
                if report is None:
                    continue
                report = {"number": worker.number, "kind": kinds[worker.number % len(kinds)], "code": None} | report
                if report.get("code") == 1 or "Traceback" in report.get("said", ""):
                    report["fault"] = "traceback"
                elif report.get("moved"):
                    report["fault"] = "a file outside its place"
                elif report.get("peak", 0) > BYTES:
                    report["fault"] = f"memory: {report['peak'] / 1e9:.2f} GB"
                reports.append(report)
                if state:
                    with state.open("a") as file:
                        file.write(json.dumps(report) + "\n")
                worker.number, worker.cases = None, worker.cases + 1
                if "crash" in report.get("fault", "") or "hang" in report.get("fault", ""):
                    worker.end()
                    workers[workers.index(worker)] = worker = Worker(folder, seed, kinds)
                idle.append(worker)
                if len(reports) % 500 == 0:
                    faults = sum("fault" in r for r in reports)
                    print(f"{len(reports)} cases, {faults} failures", file=sys.stderr, flush=True)
        for worker in workers:
            worker.end()
    counts = Counter(f"{report['kind']} {report['code']}" for report in reports)
    failures = [report for report in reports if "fault" in report]
    return {"cases": len(reports), "counts": dict(sorted(counts.items())), "failures": failures}


def main() -> int:
    """Prints counts and failures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=Cases.KINDS, default=list(Cases.KINDS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--state", type=Path, help="file that keeps finished cases")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of cases to repeat")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.worker, given.seed, given.kinds)
    found = run(given.only or range(given.cases), given.seed, given.kinds, given.jobs, given.state)
    for failure in found["failures"]:
        print(f"case {failure['number']} ({failure['kind']}): {failure['fault']}\n{failure.get('said', '')}")
    print(json.dumps(found))
    return bool(found["failures"])


if __name__ == "__main__":
    sys.exit(main())
