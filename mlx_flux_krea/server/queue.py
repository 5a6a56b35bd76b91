"""The queue: one job runs, others wait. Its thread calls the runner; everything else only changes the list.

The list is kept in the database after every change, so that a restart, or a kill, loses nothing: the job that ran
resumes from its checkpoint.
"""

import threading
import time
import traceback
from pathlib import Path
from typing import Any

from mlx_flux_krea.checkpoint import unfinished
from mlx_flux_krea.commands.shared import signals
from mlx_flux_krea.errors import FluxKreaError

from . import fields, reviews, uploads
from .errors import HTTPProblem, bug, not_found, refusal
from .events import Events
from .jobs import PageJob, job_of_checkpoint, job_of_row, new_job
from .pictures import Pictures
from .running import Runner
from .store import Store

MOST_WAITING = 100
SHOWN_ENDED = 50
KEPT_ENDED = 500
SETTINGS = {"previews": True, "checked_previews": False, "idle_minutes": 10}
MINUTE = 60.0  # seconds of `idle_minutes`
_TICK = 1.0  # seconds between looks at the clock
_PATIENCE = 0.1  # seconds between two tries to stop a run: the first may come before it computes


class Queue:
    """Jobs of the page, and the thread that runs them.

    Args:
        store: the database.
        shown: the index of pictures.
        events: where changes are published.
    """

    def __init__(self, store: Store, shown: Pictures, events: Events):
        self._store, self._pictures, self._events = store, shown, events
        self._runner = Runner(self.find_image, self._told)
        self._change = threading.Condition()
        self._jobs = {row["id"]: job_of_row(row) for row in store.rows("SELECT * FROM jobs")}
        if store.is_new:
            self._recover()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._work, name="flux-krea-queue", daemon=True)

    def _recover(self) -> None:
        """Takes up the unfinished runs of a page whose database was lost."""
        for path in reversed(unfinished()):
            if job := job_of_checkpoint(path):
                job.place = 1 + len(self._jobs)
                self._jobs[job.id] = job
                self._store.insert("jobs", job.to_row())

    # --- for any thread ---

    def start(self) -> None:
        """Starts the thread."""
        uploads.remove_old(
            {key for job in self._jobs.values() if not job.is_ended for key in fields.images(job.request)}
        )
        self._thread.start()

    def stop(self) -> None:
        """Stops the job that runs, which stays in the list to be resumed, and waits for the thread."""
        with self._change:
            self._is_stopping = True
            self._change.notify_all()
        while self._thread.is_alive():
            self._runner.interrupt()
            self._thread.join(_PATIENCE)

    def add(self, request: dict[str, Any]) -> PageJob:
        """Adds a job.

        Raises:
            HTTPProblem: the queue is full, or the request cannot be used.
            FluxKreaError: options that do not go together, or a model that cannot be used.
        """
        self._check_room()
        job = new_job(request, self.find_image)
        with self._change:
            self._check_room()
            job.place = 1 + max((one.place for one in self._jobs.values()), default=0)
            self._jobs[job.id] = job
            self._store.insert("jobs", job.to_row())
            self._change.notify_all()
        self._store.remember(str(request.get("prompt", "")))
        self._publish(job, is_moved=True)
        return job

    def find(self, key: str) -> PageJob:
        """Returns a job.

        Raises:
            HTTPProblem: there is none.
        """
        with self._change:
            if key not in self._jobs:
                raise not_found("job")
            return self._jobs[key]

    def listed(self) -> list[dict[str, Any]]:
        """Returns the jobs: the one that runs, those that wait, the last ones that ended."""
        with self._change:
            return [job.to_json() for job in [*self._open(), *self._ended()[:SHOWN_ENDED]]]

    @property
    def waiting(self) -> int:
        """Number of jobs that wait."""
        with self._change:
            return sum(job.state == "waiting" for job in self._jobs.values())

    @property
    def model(self) -> str | None:
        """The model in memory."""
        return self._runner.model

    def order(self, keys: list[str]) -> None:
        """Puts waiting jobs first, in this order; others follow as they were.

        Raises:
            HTTPProblem: one of them is no waiting job.
        """
        with self._change:
            waiting = [job for job in self._open() if job.state == "waiting"]
            known = {job.id: job for job in waiting}
            if unknown := [key for key in keys if key not in known]:
                raise not_found(f"waiting job: {unknown[0][:40]}")
            first = [known[key] for key in dict.fromkeys(keys)]
            moved = [*first, *(job for job in waiting if job not in first)]
            for job, place in zip(moved, sorted(job.place for job in waiting), strict=True):
                job.place = place
                self._store.update("jobs", job.id, place=place)
        self._publish_order()

    def cancel(self, key: str) -> PageJob:
        """Cancels a job that waits or runs; removes one that has ended from the list.

        Raises:
            HTTPProblem: there is none.
        """
        job = self.find(key)
        with self._change:
            if job.is_ended:
                del self._jobs[key]
                self._store.delete("jobs", [key])
            elif job.state == "waiting":
                self._end(job, "cancelled")
            else:
                job.is_cancelled = True
        if job.is_ended and key not in self._jobs:
            self._events.publish("job", {"id": key, "removed": True})
        elif job.is_ended:
            self._runner.forget(job)
            self._publish(job, is_moved=True)
        else:
            threading.Thread(target=self._interrupt, args=(job,), daemon=True).start()
        return job

    def settled(self, job_id: str, number: int, outcome: dict[str, Any]) -> None:
        """Takes the outcome of a review into the job that made the picture, if that is still listed."""
        with self._change:
            job = self._jobs.get(job_id)
            if job is None or not 0 < number <= len(job.pictures):
                return
            job.pictures[number - 1] = {**job.pictures[number - 1], **outcome}
            job.pictures[number - 1].pop("review", None)
            self._store.update("jobs", job.id, pictures=job.pictures)
        self._publish(job)

    def find_image(self, key: str) -> Path:
        """Returns the file of an upload or of a picture.

        Raises:
            HTTPProblem: there is neither.
        """
        if uploads.exists(key):
            return uploads.find(key)
        try:
            return self._pictures.path(key)
        except HTTPProblem:
            raise not_found("upload or picture") from None

    def tell_review(self) -> None:
        """Publishes how many pictures wait for review."""
        self._events.publish("review", {"waiting": reviews.count()})

    # --- of the thread ---

    def _work(self) -> None:
        idle = time.monotonic()
        while not self._is_stopping:
            with self._change:
                job = next(iter(self._open()), None)
                if job is None:
                    self._change.wait(_TICK)
            if self._is_stopping:
                return
            if job is not None:
                self._run(job)
                idle = time.monotonic()
            elif time.monotonic() - idle > MINUTE * self._store.settings(SETTINGS)["idle_minutes"]:
                self._runner.free()
                idle = time.monotonic()

    def _run(self, job: PageJob) -> None:
        job.state, job.started = "running", job.started or time.time()
        self._keep(job, is_moved=True)
        wanted = self._store.settings(SETTINGS)
        try:
            self._runner.run(job, previews=wanted["previews"], checked=wanted["checked_previews"], started=self._keep)
            state = "done"
        except FluxKreaError as error:
            if self._is_stopping and not job.is_cancelled and len(job.pictures) < len(job.seeds):
                return  # it stays in the list as running
            state = self._state_after(job, error)
        except HTTPProblem as error:
            job.error, state = error.to_json()["error"], "failed"
        except signals.Stopped:  # the server ends
            self._is_stopping = True
            return
        except Exception as error:
            traceback.print_exception(error)
            job.error, state = bug().to_json()["error"], "failed"
        if state == "cancelled":
            self._runner.forget(job)
        with self._change:
            self._end(job, state)
        self._pictures.scan()
        self._publish(job, is_moved=True)

    def _state_after(self, job: PageJob, error: FluxKreaError) -> str:
        """Returns the state of a job whose run ended with an error, which says little where every picture is there."""
        if len(job.pictures) == len(job.seeds):
            return "done"
        if job.is_cancelled:
            return "cancelled"
        job.error = refusal(error).to_json()["error"]
        return "failed"

    def _told(self, name: str, job: PageJob) -> None:
        """Publishes a change that the runner reports."""
        if name == "progress":
            self._events.publish("progress", {"job": job.id, "progress": job.progress})
        elif name == "preview" and job.preview:
            self._events.publish("preview", {"job": job.id, **job.preview})
        else:
            self._keep(job)
            if name == "picture":
                self._pictures.scan()
                if any(one["outcome"] == "waiting" for one in job.pictures):
                    self.tell_review()

    def _keep(self, job: PageJob, *, is_moved: bool = False) -> None:
        self._store.insert("jobs", job.to_row())
        self._publish(job, is_moved=is_moved)

    # --- with the lock ---

    def _open(self) -> list[PageJob]:
        """Returns the job that runs, or ran when the server was stopped, then those that wait."""
        return sorted(
            (job for job in self._jobs.values() if not job.is_ended),
            key=lambda job: (job.state != "running", job.place),
        )

    def _ended(self) -> list[PageJob]:
        """Returns the jobs that have ended, newest first."""
        return sorted((job for job in self._jobs.values() if job.is_ended), key=lambda job: -(job.ended or 0))

    def _end(self, job: PageJob, state: str) -> None:
        job.state, job.ended = state, time.time()
        job.progress = job.preview = job.png = None
        self._store.insert("jobs", job.to_row())
        for one in self._ended()[KEPT_ENDED:]:
            del self._jobs[one.id]
            self._store.delete("jobs", [one.id])
        self._change.notify_all()

    # --- without it ---

    def _check_room(self) -> None:
        if self.waiting >= MOST_WAITING:
            raise HTTPProblem(429, "queue_full", f"{MOST_WAITING} jobs wait already; cancel some, or wait")

    def _interrupt(self, job: PageJob) -> None:
        """Stops a running job, however early or late it is."""
        while not job.is_ended and not self._is_stopping:
            self._runner.interrupt()
            time.sleep(_PATIENCE)

    def _publish(self, job: PageJob, *, is_moved: bool = False) -> None:
        self._events.publish("job", job.to_json())
        if is_moved:
            self._publish_order()

    def _publish_order(self) -> None:
        with self._change:
            order = [job.id for job in self._open()]
        self._events.publish("queue", {"order": order})
