"""Jobs of the page: a request with its pictures, as rows of the database and as JSON for clients."""

import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_flux_krea import home
from mlx_flux_krea.checkpoint import Checkpoint
from mlx_flux_krea.commands.shared import settings
from mlx_flux_krea.commands.shared.credentials import check_credentials
from mlx_flux_krea.commands.shared.generation import over_config
from mlx_flux_krea.commands.shared.jobs import PictureJob, make_jobs, prepare
from mlx_flux_krea.errors import UsageError
from mlx_flux_krea.home import find_model
from mlx_flux_krea.weights import open_model

from . import fields, pictures
from .errors import invalid

MOST_PICTURES = 64  # of a job
ENDED = ("done", "failed", "cancelled")
STATES = ("waiting", "running", *ENDED)
_NOT_OURS = ("output", "contact_sheet", "preview", "verbose", "keep_map", "prompt")  # of the config file: for files


@dataclass
class PageJob:
    """A job.

    Attributes:
        id: 16 hexadecimal digits.
        request: its fields, with the first seed.
        model: name of the model.
        seeds: of its pictures.
        place: among the jobs that wait.
        state: one of `STATES`.
        checkpoint: name of the file of the unfinished run; "" before it starts.
        pictures: an outcome for each finished picture, as in docs/http.md.
        error: of a failed job.
        progress: while it runs.
        preview: step and steps of the newest preview.
        png: the newest preview.
    """

    id: str
    request: dict[str, Any]
    model: str
    seeds: list[int]
    place: int = 0
    state: str = "waiting"
    created: float = 0.0
    started: float | None = None
    ended: float | None = None
    checkpoint: str = ""
    pictures: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: dict[str, Any] | None = None
    progress: dict[str, Any] | None = None
    preview: dict[str, int] | None = None
    png: bytes | None = None
    is_cancelled: bool = False

    def to_row(self) -> dict[str, Any]:
        """Returns the row of the database."""
        names = ("id", "place", "state", "created", "started", "ended", "model", "checkpoint", "request", "seeds")
        return {name: getattr(self, name) for name in (*names, "pictures", "notes", "error")}

    def to_json(self) -> dict[str, Any]:
        """Returns the job as clients see it."""
        names = ("id", "state", "created", "started", "ended", "request", "model", "seeds", "notes", "progress")
        return {name: getattr(self, name) for name in (*names, "preview", "pictures", "error")} | {
            "count": len(self.seeds)
        }

    @property
    def is_ended(self) -> bool:
        """True where nothing of it will run any more."""
        return self.state in ENDED


def job_of_row(row: dict[str, Any]) -> PageJob:
    """Returns the job of a row of the database."""
    return PageJob(**row)


def new_job(request: dict[str, Any], find_image: fields.FindImage) -> PageJob:
    """Makes a job of a request, which is checked against its model; no weight is read.

    Raises:
        HTTPProblem: a field that cannot be used.
        FluxKreaError: options that do not go together, or a model that cannot be used.
    """
    fields.check(request)
    if "prompt" not in request and "styles" not in request:
        raise invalid("there is no prompt; expected a text", "prompt")
    key = f"{int(time.time() * 1000):012x}"[-12:] + secrets.token_hex(2)
    base, made = picture_jobs(key, request, find_image)
    folder = open_model(find_model(base.get("model")))
    prepare(made[0], folder, {})
    check_credentials(base.get("credentials"))
    seeds = [job.seed for job in made]
    asked = request if isinstance(request.get("seed"), list) else request | {"seed": seeds[0]}
    return PageJob(id=key, request=asked, model=fields.model_name(folder), seeds=seeds, created=time.time())


def picture_jobs(
    key: str, request: dict[str, Any], find_image: fields.FindImage
) -> tuple[dict[str, Any], list[PictureJob]]:
    """Returns the options of a job's run, and its pictures.

    Args:
        key: id of the job.
        request: checked.
        find_image: returns the file of an upload or a picture.

    Raises:
        HTTPProblem: a field that cannot be used.
        FluxKreaError: options that do not go together.
    """
    given = fields.options(request, find_image) | {"output": output_of(key, request)}
    given.setdefault("prompt", "")
    config = {name: value for name, value in settings.read_options().items() if name not in _NOT_OURS}
    base = over_config(config, given)
    made, _ = make_jobs(base, given)
    if len(made) > MOST_PICTURES:
        raise UsageError(f"this job has {len(made)} pictures", f"{MOST_PICTURES} at most", "split it")
    return base, made


def output_of(key: str, request: dict[str, Any]) -> Path:
    """Returns the template of the files of a job's pictures."""
    place = str(home.path(home.PICTURES).absolute()).replace("{", "{{").replace("}", "}}")
    return Path(place) / f"{key}-{{n}}{fields.FORMATS[request.get('format', 'png')]}"


def outcome(job: PageJob, index: int, said: str, path: Path | None, review: str | None) -> dict[str, Any]:
    """Returns the outcome of a picture as JSON.

    Args:
        job: the job.
        index: of the picture in it.
        said: the pipeline's outcome.
        path: of a released picture.
        review: id of a picture that waits.
    """
    about: dict[str, Any] = {"number": index + 1, "seed": job.seeds[index]}
    if path is not None:
        return about | {"outcome": "released", "picture": pictures.identity(path.name)}
    if said == "waiting":
        return about | {"outcome": "waiting", "review": review}
    return about | {"outcome": "withheld", "reason": said.partition(": ")[2] or said}


def job_of_checkpoint(path: Path) -> PageJob | None:
    """Returns the job of an unfinished run whose pictures are the page's; None: it is another run, or damaged.

    Args:
        path: of the checkpoint.
    """
    try:
        opened = Checkpoint.read(path)
    except UsageError:
        return None
    opened.close()
    try:
        made, when = opened.run["jobs"], path.stat().st_mtime
        outputs = [Path(one["output"]) for one in made]
        keys = {(output.parent, named and named[0]) for output in outputs for named in [pictures.job_of(output.name)]}
        ((folder, key),) = keys
        options = made[0]["options"]
        request = {name: options[name] for name in fields.PLAIN if options.get(name) is not None}
        request["seed"] = made[0]["seed"]
        seeds = [int(one["seed"]) for one in made]
    except (KeyError, TypeError, ValueError, IndexError, OSError):
        return None
    if key is None or folder.resolve() != home.path(home.PICTURES).resolve():
        return None
    model = Path(str(opened.run.get("options", {}).get("model", ""))).name
    job = PageJob(id=key, request=request, model=model, seeds=seeds, created=when)
    job.checkpoint = path.stem
    return job
