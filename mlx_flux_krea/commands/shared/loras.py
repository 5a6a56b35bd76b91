"""The adapters of `--lora` and of prompts: found, fetched from the hub, loaded into the pipeline, with their presets.

An adapter is written SOURCE=WEIGHT: a file, a folder, the name of an installed one, or OWNER/NAME[:FILE] on the hub.
Runs and records write SOURCE@sha256:HASH=WEIGHT, which is found by its hash wherever it lies now, and never fetched.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_flux_krea import FluxPipeline, home
from mlx_flux_krea.adapters.formulas import Uses
from mlx_flux_krea.adapters.installed import (
    Origin,
    find_hash,
    find_source,
    installed,
    is_hub_source,
    obtain,
    outlined,
)
from mlx_flux_krea.adapters.loaded import Weights
from mlx_flux_krea.adapters.parts import Facts
from mlx_flux_krea.beside import is_licence
from mlx_flux_krea.convert import hub
from mlx_flux_krea.convert.fetch import fetch
from mlx_flux_krea.errors import ModelError, UsageError
from mlx_flux_krea.files import sha256
from mlx_flux_krea.models.config import FLUX_DEV_MODEL, ModelSizes
from mlx_flux_krea.weights import open_model

from .jobs import PictureJob, PreparedJob
from .options import split_lora
from .terminal import ByteProgress, Console

FEW_STEPS = "for few steps: it has the layers of Turbo-Alpha (8 steps, guidance 3.5) and Hyper-SD (weight 0.125, too)"
_HASH = re.compile(r"(.*)@sha256:([0-9a-f]{64})")


@dataclass(frozen=True)
class JobAdapters:
    """The adapters of one picture.

    Attributes:
        weights: names under which they are loaded, with their weights.
        facts: about them.
        exact: texts by which a resumed run finds the same ones.
        preset: arguments of the pipeline that they were published with.
        notes: sentences about these.
    """

    weights: Weights = ()
    facts: tuple[Facts, ...] = ()
    exact: tuple[str, ...] = ()
    preset: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Loras:
    """Loads the adapters of a run's pictures, each once."""

    def __init__(self, pipe: FluxPipeline):
        self._pipe = pipe
        self._loaded: dict[str, Facts] = {}

    def of(self, job: PictureJob) -> JobAdapters:
        """Returns the adapters of a picture, loaded.

        Raises:
            ModelError: one is missing, damaged, or for another model.
            UsageError: one is given twice.
        """
        weights: dict[str, float] = {}
        facts, exact, preset, notes = [], [], {}, []
        for text in job.options.get("lora", ()):
            source, weight = split_lora(text)
            one = self._load(source)
            if one.name in weights:
                raise UsageError(f"the adapter {one.name} is given twice", "each once, with one weight")
            if weight is None and one.preset:
                notes.append(f"{one.name} has weight {one.preset[2]:g}, as {one.published} publishes it")
            if one.few_steps and "steps" not in job.options:
                notes.append(f"{one.name} is perhaps {FEW_STEPS}; if so, give --steps, --guidance and its weight")
            weight = weight if weight is not None else one.preset[2] if one.preset else 1.0
            weights[one.name] = weight
            facts.append(one)
            origin = source.partition("@sha256:")[0] if "@sha256:" in source else one.source
            exact.append(f"{origin}@sha256:{one.sha256}={weight!r}")
            if one.preset and not preset:
                preset, said = _preset(one, job)
                notes += said
        return JobAdapters(tuple(weights.items()), tuple(facts), tuple(exact), preset, tuple(notes))

    def _load(self, source: str) -> Facts:
        if source not in self._loaded:
            self._loaded[source] = self._load_now(source)
        return self._loaded[source]

    def _load_now(self, source: str) -> Facts:
        if match := _HASH.fullmatch(source):
            return self._pipe.load_adapter(_by_hash(match[1], match[2]))
        if is_hub_source(source) and source not in installed() and not find_source(source):
            path, origin = fetched(source)
            return self._pipe.load_adapter(path, origin=origin)
        return self._pipe.load_adapter(source)


def planned(texts: Iterable[str], sizes: ModelSizes) -> Uses:
    """Returns the adapters of a plan with their weights; their headers alone are read, and nothing is installed.

    Args:
        texts: values of --lora.
        sizes: of the model.

    Raises:
        ModelError: one is missing, damaged, or for another model.
    """
    uses = []
    for text in texts:
        source, weight = split_lora(text)
        adapter = outlined(source, sizes)
        default = adapter.facts.preset[2] if adapter.facts.preset else 1.0
        uses.append((adapter, default if weight is None else weight))
    return uses


def load_all(pipe: FluxPipeline, jobs: Iterable[PictureJob]) -> None:
    """Loads the adapters of these pictures.

    Raises:
        ModelError: one is missing, damaged, or for another model.
    """
    loras = Loras(pipe)
    for job in jobs:
        loras.of(job)


def _by_hash(source: str, digest: str) -> str | Path:
    """Returns the installed adapter, or the file, that has a hash.

    Raises:
        ModelError: neither is here.
    """
    if folder := find_hash(digest):
        return folder.name
    path = Path(source).expanduser()
    if path.is_file() and sha256(path) == digest:
        return path
    todo = "install that file: flux-krea models add " + (source if is_hub_source(source) else "FILE")
    raise ModelError(f"the adapter {source} (sha256 {digest}) is not here", "the file that was used then", todo)


def _preset(facts: Facts, job: PictureJob) -> tuple[dict[str, Any], list[str]]:
    """Returns the arguments that an adapter for few steps was published with, unless they were given."""
    steps, guidance, _ = facts.preset
    preset, said = {}, []
    if "steps" not in job.options and "sigmas" not in job.options:
        preset["num_inference_steps"] = int(steps)
        said.append(f"{steps:g} steps")
    if "guidance" not in job.options:
        preset["guidance_scale"] = guidance
        said.append(f"guidance {guidance:g}")
    return preset, [f"{' and '.join(said)}, as {facts.published} publishes {facts.name}"] if said else []


def fetched(source: str) -> tuple[Path, Origin]:
    """Fetches an adapter from the hub, with the texts beside it that say something about its licence.

    Args:
        source: OWNER/NAME, where it has one safetensors file, or OWNER/NAME:FILE.

    Raises:
        ModelError: no such repository or file, several files, access denied, or the hub cannot be reached.
    """
    repo, _, name = source.partition(":")
    if not hub.is_repo_id(repo):
        raise ModelError(f"{repo!r} is no repository on the hub", "OWNER/NAME or OWNER/NAME:FILE")
    listing = hub.look(repo, wanted=lambda names: _wanted(repo, name, names))
    file = next(file.name for file in listing.files if file.name.endswith(".safetensors"))
    progress = ByteProgress()
    try:
        folder = fetch(listing, [one.name for one in listing.files], progress)
    finally:
        progress.close()
    return folder / file, Origin(f"{repo}:{file}", listing.licences)


def _wanted(repo: str, name: str, names: list[str]) -> list[str]:
    """Selects the adapter among the files of a repository, and what lies beside it.

    Raises:
        ModelError: there is no such file, or several and none was named.
    """
    files = sorted(one for one in names if one.endswith(".safetensors"))
    chosen = [one for one in files if one == name] if name else files
    if len(chosen) != 1:
        found = f"{repo} has no file {name!r}" if name else f"{repo} holds {len(files)} safetensors files"
        listed = ", ".join(files[:8]) + (", ..." if len(files) > 8 else "")
        raise ModelError(found, listed or "an adapter as .safetensors", f"name one: {repo}:FILE" if files else "")
    return [*chosen, *(one for one in names if one == "README.md" or is_licence(one))]


def with_adapters(ready: PreparedJob, adapters: JobAdapters) -> PreparedJob:
    """Returns a job whose options find the same adapters again, with the notes about them."""
    if not adapters.exact:
        return ready
    job = replace(ready.job, options=ready.job.options | {"lora": adapters.exact})
    return replace(ready, job=job, notes=(*ready.notes, *adapters.notes))


def announce(adapters: list[JobAdapters], console: Console) -> None:
    """Says how much of each adapter is applied, and with which weights."""
    lines: dict[str, list[str]] = {}
    counts = {}
    for one in adapters:
        for facts, (name, weight) in zip(one.facts, one.weights, strict=True):
            lines.setdefault(name, []).append(f"{weight:g}")
            counts[name] = facts
    for name, weights in lines.items():
        several = ", ".join(dict.fromkeys(weights))
        console.say(f"adapter {name}, weight {several}: applied {counts[name].count}", event="adapter")


def add(source: str, name: str | None) -> Facts:
    """Installs an adapter. The model that fits it is the default one, the small one, or FLUX.1.

    Raises:
        ModelError: it is missing, damaged, or fits none of them.
    """
    path, origin = fetched(source) if is_hub_source(source) else (Path(source), None)
    if not path.expanduser().exists():
        raise ModelError(f"there is nothing at {source}", "a file, or OWNER/NAME:FILE on the hub")
    first = None
    for sizes in (FLUX_DEV_MODEL, *(open_model(folder).sizes for folder in known_models())):
        try:
            return obtain(path, sizes, name=name, origin=origin).facts
        except ModelError as error:
            first = first or error
    raise first or ModelError(f"{source} cannot be installed")


def known_models() -> list[Path]:
    """Returns the folders of models that an adapter may be for, beside FLUX.1."""
    return [*home.installed_models().values(), home.NANO]
