"""LICENSE.md, NOTICE and README.md of a model folder, which the licences of weights require of derivatives."""

from dataclasses import dataclass
from pathlib import Path

from mlx_flux_krea.beside import licence_names
from mlx_flux_krea.errors import printable
from mlx_flux_krea.files import open_regular
from mlx_flux_krea.models.config import ComponentIndex, ModelIndex
from mlx_flux_krea.presets import TASKS

# Section 3(b) of the FLUX.1 [dev] Non-Commercial License prescribes these two sentences. Not ours; not to be reworded.
ATTRIBUTION_NOTICE = (
    "The FLUX.1 [dev] Model is licensed by Black Forest Labs Inc. under the FLUX.1 [dev] Non-Commercial License. "
    "Copyright Black Forest Labs Inc.\n"
    "IN NO EVENT SHALL BLACK FOREST LABS INC. BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN "
    "ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH USE OF THIS MODEL.\n"
)


@dataclass(frozen=True)
class Licence:
    """A licence of published weights of this family."""

    title: str
    words: str  # in its text, which tell it from the licence of something else in the same folder
    url: str
    notice: str  # the prescribed text of NOTICE
    duties: str


LICENCES = {
    "flux-1-dev-non-commercial": Licence(
        "FLUX.1 [dev] Non-Commercial License",
        "Non-Commercial License",
        "https://github.com/black-forest-labs/flux/blob/main/model_licenses/LICENSE-FLUX1-dev",
        ATTRIBUTION_NOTICE,
        "It allows non-commercial use, and asks for content filters or a review of all that these weights make. "
        "Whoever gets a copy of this folder must get LICENSE.md and NOTICE with it. Their rights come from Black "
        "Forest Labs, under that licence and no other terms; its sections 5 and 6 disclaim warranty and liability.",
    ),
    "apache-2.0": Licence(
        "Apache License 2.0",
        "Apache License",
        "https://www.apache.org/licenses/LICENSE-2.0",
        "",
        "Whoever gets a copy of this folder must get LICENSE.md and this page with it.",
    ),
}
_READS = {  # what a model of a task reads besides a prompt
    "kontext": "a picture to change",
    "fill": "a picture with a mask of the part to fill",
    "control": "a map of edges or of depth",
}
BESIDE = "LICENSE.source.txt"  # a text that lay beside the weights and is not the licence that they are known to have
_MOST = 2**20  # bytes of a licence file


def licence_files(index: ModelIndex | ComponentIndex, folders: list[Path], stored: list[str]) -> dict[str, bytes]:
    """Returns the files about rights and duties by name.

    Args:
        index: of the new folder, with its sources.
        folders: folders in which a licence may lie, the nearest first.
        stored: a line on every component's precision.
    """
    licence = LICENCES.get(index.license)
    text = next(filter(None, (_find(folder, licence) for folder in folders)), None)
    other = None if text else next(filter(None, (_find(folder, None) for folder in folders)), None)
    if text is None and licence:
        text = (
            f"# {licence.title}\n\nThese weights are under the {licence.title}. Its text did not lie beside the files "
            f"that they were converted from.\nRead it at {licence.url},\nand put it here before you pass them on.\n"
        ).encode()
    changed = _changes(index, stored)
    files = {"README.md": _readme(index, licence, changed, bool(text), bool(other)).encode()}
    if text is not None:
        files["LICENSE.md"] = text
    if other is not None:
        files[BESIDE] = other
    if licence and licence.notice:
        files["NOTICE"] = f"{licence.notice}\n{changed}".encode()
    return files


def _find(folder: Path, licence: Licence | None) -> bytes | None:
    for name in licence_names(folder):
        try:
            with open_regular(folder / name) as file:
                text = file.read(_MOST + 1)
        except OSError:
            continue
        if len(text) <= _MOST and (licence is None or licence.words.encode() in text):
            return text
    return None


def _changes(index: ModelIndex | ComponentIndex, stored: list[str]) -> str:
    lines = [
        f"The weights in this folder were modified: flux-krea convert {index.converter} changed their names, order and "
        "precision, for MLX.",
        "How they are stored:",
        *(f"- {line}" for line in stored),
        "What they were made from (sha256), the original first:",
        *(f"- {printable(source.file)} ({source.sha256})" for source in index.source),
    ]
    return "\n".join(lines) + "\n"


def _readme(
    index: ModelIndex | ComponentIndex, licence: Licence | None, changed: str, has_text: bool, has_other: bool
) -> str:
    if licence:
        rights = f"These weights are under the {licence.title} (LICENSE.md). {licence.duties}"
    else:
        source = "LICENSE.md is what lay beside them." if has_text else "Ask whoever made them."
        rights = f"Which licence these weights have, the files that they were converted from do not say. {source}"
    if has_other:
        rights += f" Another text lay beside them, which changes nothing of that: {BESIDE}."
    if isinstance(index, ModelIndex) and index.filters == "required" and not licence:
        rights += " They may derive from FLUX.1 [dev], so content filters or a review are required all the same."
    if isinstance(index, ModelIndex) and index.defaults.true_cfg_scale > 1:
        rights = (
            f"{rights}\n\n## Defaults\n\nWithout a guidance embedding, this model follows a prompt by true CFG, with a "
            f"scale of {index.defaults.true_cfg_scale:g} unless another is given: each step takes twice the time."
        )
    name, base = printable(index.name), printable(index.base)
    about = (
        f"{base}, as a model folder of mlx-flux-krea. Neither the program nor this folder is a product of whoever "
        "trained the model, or endorsed by them."
    )
    if isinstance(index, ModelIndex) and index.task != TASKS[0]:
        about += f" Its task is {index.task_and_kind}: it makes pictures from a prompt and {_READS[index.task]}."
    use = "    flux-krea verify FOLDER"
    if isinstance(index, ModelIndex):
        use = f'    flux-krea generate "a frog" -m FOLDER\n{use}'
    return f"# {name}\n\n{about}\n\n{use}\n\n## Changes\n\n{changed}\n## Licence\n\n{rights}\n"
