"""The page in a browser: is a step slower while it is open, and does memory grow with its pictures?

    python benchmarks/page.py [--pictures 100] [--rounds 6]

Needs the extras `ui` and `browser`, and Chromium (`.ci/browser` installs it). A server of its own makes pictures of the
small model by turns with the page open, previews shown, and without any page; the ratio of the two times is that of one
run. Then it makes pictures with the page open, and reads the heap and the nodes of the page, and the server's memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import playwright.sync_api as playwright

WANTED = {"prompt": "a red circle on a blue background", "model": "nano"}


class Server:
    """A `flux-krea ui` of its own home folder."""

    def __init__(self, home: Path):
        command = [sys.executable, "-m", "mlx_flux_krea.cli", "ui", "--no-open", "--json"]
        env = os.environ | {"FLUX_KREA_HOME": str(home)}
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.about = json.loads(self.process.stdout.readline())

    def ask(self, method: str, path: str, value: dict | None = None) -> dict:
        """Returns the JSON that the server answers with."""
        address = self.about["url"].partition("#")[0].rstrip("/") + path
        headers = {"Authorization": f"Bearer {self.about['token']}"}
        body = None if value is None else json.dumps(value).encode()
        with urllib.request.urlopen(urllib.request.Request(address, body, headers, method=method)) as answer:
            return json.load(answer)

    def make(self, **request) -> float:
        """Makes the pictures of a request. Returns the seconds from its start to its end."""
        key = self.ask("POST", "/api/queue", WANTED | request)["id"]
        while not (job := self.ask("GET", f"/api/queue/{key}"))["ended"]:
            time.sleep(0.2)
        assert job["state"] == "done", job
        return job["ended"] - job["started"]

    @property
    def memory(self) -> int:
        """Resident bytes of the process."""
        found = subprocess.run(["ps", "-o", "rss=", "-p", str(self.process.pid)], capture_output=True, text=True)
        return 1024 * int(found.stdout)


def used(tool: playwright.CDPSession) -> dict[str, float]:
    """Returns the page's heap in bytes, and its nodes, after a collection."""
    tool.send("HeapProfiler.collectGarbage")
    found = {one["name"]: one["value"] for one in tool.send("Performance.getMetrics")["metrics"]}
    return {"heap": found["JSHeapUsedSize"], "nodes": found["Nodes"]}


def measure(server: Server, browser: playwright.Browser, pictures: int, rounds: int) -> dict[str, float]:
    """Returns the figures."""

    def opened() -> playwright.Page:
        page = browser.new_page()
        page.goto(server.about["url"])
        page.wait_for_selector("#total:not(:empty)")
        return page

    server.make()  # loads the model
    times: dict[str, list[float]] = {"open": [], "closed": []}
    for number in range(rounds):
        for state in ("open", "closed") if number % 2 else ("closed", "open"):
            page = opened() if state == "open" else None
            times[state].append(server.make(steps=100))
            if page:
                page.close()
    page = opened()
    tool = page.context.new_cdp_session(page)
    tool.send("Performance.enable")
    server.make(steps=1, num_images=10)
    page.wait_for_timeout(1000)
    before = used(tool) | {"server": server.memory}
    for _ in range(pictures // 10):
        server.make(steps=1, num_images=10)
    page.wait_for_timeout(1000)
    after = used(tool) | {"server": server.memory}
    closed, open_ = (statistics.median(times[state]) for state in ("closed", "open"))
    grown = {f"{name}_grown": after[name] - before[name] for name in before}
    return {"step_open_over_closed": round(open_ / closed, 3), "pictures": pictures, **before, **grown}


def main() -> None:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home, playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=os.environ.get("CHROMIUM"), args=["--no-sandbox"])
        server = Server(Path(home))
        try:
            print(json.dumps(measure(server, browser, args.pictures, args.rounds)))
        finally:
            server.process.terminate()
            server.process.wait()
            browser.close()


if __name__ == "__main__":
    main()
