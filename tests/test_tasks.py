"""The task of a model: what it reads besides a prompt, from its channels, its sources, or the person who converts."""

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import derived
import foreign
import gguf
import mlx.core as mx
import pytest
from helpers import REFERENCE, TOKENIZERS, assert_close, edit_json, full_size_folder, run_command
from hub import Hub
from mlx_flux_krea.convert import convert, examine, index
from mlx_flux_krea.convert.fetch import outlined
from mlx_flux_krea.convert.job import decide as decide_job
from mlx_flux_krea.convert.licence import licence_files
from mlx_flux_krea.convert.tasks import ASKED, Task

from mlx_flux_krea import presets
from mlx_flux_krea.commands.shared.installation import installed_model
from mlx_flux_krea.commands.shared.installed import find_installed
from mlx_flux_krea.errors import ModelError, UsageError
from mlx_flux_krea.licence import Evidence, decide
from mlx_flux_krea.models import config as configs
from mlx_flux_krea.weights import open_model

CHANNELS = {"kontext": 64, "fill": 384, "control": 128}
DEFAULTS = {"kontext": (28, 2.5), "fill": (50, 30.0), "canny": (50, 30.0), "depth": (50, 10.0), "control": (50, 10.0)}


def tell(*sources, **options):
    """Returns task and kind of sources."""
    found = examine(sources, tokenizers=TOKENIZERS, **options).index
    return found.task, found.kind


def defaults_of(index) -> tuple[int, float]:
    return index.defaults.num_inference_steps, index.defaults.guidance_scale


# --- conversion ---


@pytest.mark.parametrize("name", CHANNELS)
def test_the_editing_models_convert_with_their_task_and_defaults(request, name):
    folder = open_model(request.getfixturevalue(name))
    index, sizes = folder.index, folder.flux.sizes
    assert (index.task, index.kind) == (name, None)
    assert (sizes.in_channels, sizes.out_channels) == (CHANNELS[name], 64)
    assert defaults_of(index) == DEFAULTS[name]
    stored = foreign.arrays_of(folder.path)["transformer"]
    theirs = mx.load(str(derived.editing_file(name)))
    assert stored.keys() == theirs.keys()
    assert all(mx.array_equal(array, theirs[n].astype(mx.float32)) for n, array in stored.items())


@pytest.mark.parametrize(
    ("name", "run"), [("kontext", "kontext_4"), ("fill", "fill_4.sample"), ("control", "control_4.sample")]
)
def test_the_first_step_of_each_equals_the_reference(request, full_pipe, name, run):
    """From the stored inputs of the transformer; the bar is far below the reference's nearest mistake, 1.3e-3."""
    known, facts = derived.goldens(), derived.facts()["runs"][run]
    flux = open_model(request.getfixturevalue(name)).flux.load(mx.float32)
    embeds, pooled = full_pipe.encode_prompt(facts["prompts"][0])
    inputs, (sigma, following, *_) = known[f"{run}.model_input"], facts["sigmas"]
    ids = known[f"{run}.img_ids"].astype(mx.float32)
    v = flux(inputs, mx.array([sigma]), mx.array([facts["g"]]), pooled, embeds, ids, mx.zeros((embeds.shape[1], 3)))
    expected = known[f"{run}.latents"][0]
    tokens = expected.shape[1]  # those of the picture come first
    assert_close(inputs[:, :tokens, :64] + (following - sigma) * v[:, :tokens], expected, 1e-5)


@pytest.mark.core("kontext-GGUF", "fill-ComfyUI", "control-BFL")
@pytest.mark.parametrize("layout", ["BFL", "all-in-one", "GGUF", "ComfyUI"])
@pytest.mark.parametrize("name", CHANNELS)
def test_every_layout_gives_the_same_arrays_and_the_task(request, tmp_path, name, layout):
    types = {"BFL": "F8_E4M3", "GGUF": "Q8_0", "ComfyUI": "scaled", "all-in-one": "BF16"}
    model = request.getfixturevalue(name)
    source = foreign.write(model, tmp_path / "source", layout, transformer=types[layout])
    made = convert([source], tmp_path / "out", dtype="float32", tokenizers=TOKENIZERS, task=name).path
    foreign.assert_same(made, foreign.expected(source, layout))
    assert open_model(made).index.task == name


@pytest.mark.core("control")
@pytest.mark.parametrize("name", CHANNELS)
def test_own_folders_keep_task_kind_and_defaults_in_another_precision(request, tmp_path, name):
    model = request.getfixturevalue(name)
    asked = {"task": "depth"} if name == "control" else {}
    once = convert([model], tmp_path / "once", quantize="none", dtype="bfloat16", **asked).path
    twice = open_model(convert([once], tmp_path / "twice", quantize="none", dtype="float32").path).index
    assert (twice.task, twice.kind) == (name, asked.get("task"))
    assert defaults_of(twice) == DEFAULTS[asked.get("task", name)]


def test_a_folder_that_was_converted_as_another_is_mended_by_converting_it(model, tmp_path):
    path = convert([model], tmp_path / "out", quantize="none", dtype="float32", task="kontext").path
    assert open_model(path).index.task == "kontext"
    assert defaults_of(open_model(path).index) == DEFAULTS["kontext"]


def test_single_files_are_those_of_the_reference_to_the_byte():
    known = json.loads((REFERENCE / "bfl" / "sha256.json").read_text())
    files = {path.stem: path for path in derived.single_files().glob("*.safetensors")}
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()} == known


# --- what tells a task ---


@pytest.mark.parametrize(
    ("place", "metadata", "expected"),
    [
        ("flux1-dev.safetensors", {}, "text-to-image"),
        ("models--black-forest-labs--FLUX.1-Kontext-dev/snapshots/abc/flux.safetensors", {}, "kontext"),
        ("models--Comfy-Org--flux1-kontext-dev_ComfyUI/snapshots/abc/flux.safetensors", {}, "kontext"),
        ("flux.safetensors", {"modelspec.title": "Flux.1 Kontext Dev"}, "kontext"),
        ("flux.safetensors", {"modelspec.architecture": "flux-kontext"}, "kontext"),
        ("flux.safetensors", {"comment": "made with kontext in mind"}, "text-to-image"),
    ],
)
def test_kontext_is_known_by_its_repository_and_by_what_its_file_says(tmp_path, place, metadata, expected):
    assert tell(*derived.single_source("kontext", tmp_path / "files" / place, metadata)) == (expected, None)


@pytest.mark.slow
def test_a_repository_on_the_hub_tells_task_and_kind_of_a_folder_that_says_neither(tmp_path):
    folder = derived.editing_source("control", tmp_path / "published", "FluxPipeline")
    shutil.copytree(TOKENIZERS, folder, dirs_exist_ok=True)
    with Hub(folder, "black-forest-labs/FLUX.1-Depth-dev") as served:
        ran = run_command("convert", served.repo, "-q", "none", cwd=tmp_path, **served.env(tmp_path))
    assert ran.returncode == 0, ran.stderr
    made = open_model(Path(ran.stdout.strip())).index
    assert (made.task, made.kind, made.repository) == ("control", "depth", "black-forest-labs/FLUX.1-Depth-dev")


def test_kontext_is_known_by_the_name_in_a_gguf_file(kontext, tmp_path):
    sources = derived.single_source("kontext", tmp_path / "files" / "flux.safetensors")
    tensors = foreign.read(sources[0])
    for says, expected in (("FLUX.1 Kontext [dev]", "kontext"), ("FLUX.1 [dev]", "text-to-image")):
        file = tmp_path / "files" / "flux.gguf"
        foreign.save_gguf(file, tensors, "F16", add=lambda writer, says=says: writer.add_name(says))
        assert gguf.GGUFReader(file).get_field("general.name") is not None
        assert tell(file, *sources[1:]) == (expected, None)


def test_kontext_is_known_by_a_card_beside_it(tmp_path):
    sources = derived.single_source("kontext", tmp_path / "files" / "flux.safetensors")
    (tmp_path / "files" / "README.md").write_text("---\nbase_model:\n- black-forest-labs/FLUX.1-Kontext-dev\n---\n")
    assert tell(*sources) == ("kontext", None)


@pytest.mark.parametrize("place", ["flux1-kontext-dev-Q4_K_S.safetensors", "FLUX.1-Kontext-dev/flux.safetensors"])
def test_a_name_alone_makes_no_kontext_and_the_person_is_asked(tmp_path, place):
    sources = derived.single_source("kontext", tmp_path / "files" / place)
    with pytest.raises(UsageError, match=r"is called Kontext, and has the shapes .*; expected `task` kontext or text-"):
        tell(*sources)
    for asked in ("kontext", "text-to-image"):
        assert tell(*sources, task=asked) == (asked, None)


def test_a_vae_of_kontexts_repository_makes_no_kontext(tmp_path):
    sources = derived.single_source("kontext", tmp_path / "files" / "flux1-dev.safetensors")
    snapshot = tmp_path / "models--black-forest-labs--FLUX.1-Kontext-dev" / "snapshots" / "abc"
    sources[-1] = shutil.copytree(sources[-1], snapshot / "vae")
    assert tell(*sources) == ("text-to-image", None)


@pytest.mark.parametrize(
    ("place", "kind", "note"),
    [
        ("flux.safetensors", None, "nothing says if it reads edges or depth"),
        ("flux1-canny-dev.safetensors", "canny", "kind canny, by its name"),
        ("flux1-depth-dev-fp8.safetensors", "depth", "with `task` canny"),
        ("canny-and-depth.safetensors", None, "nothing says"),
        ("models--black-forest-labs--FLUX.1-Canny-dev/snapshots/abc/depth.safetensors", "canny", ""),
        ("models--black-forest-labs--FLUX.1-Depth-dev/snapshots/abc/flux.safetensors", "depth", ""),
    ],
)
def test_canny_and_depth_are_told_by_repository_and_name_and_it_is_said(tmp_path, place, kind, note):
    sources = derived.single_source("control", tmp_path / "files" / place)
    with outlined(sources, offline=True) as remote:
        job = decide_job(remote, None, "float32", "none", None, TOKENIZERS)
    assert isinstance(job.index, configs.ModelIndex)
    assert (job.index.task, job.index.kind, defaults_of(job.index)) == ("control", kind, DEFAULTS[kind or "control"])
    assert len(job.notes) == bool(note)
    assert note in "".join(job.notes)


def test_a_conversion_says_the_task_and_its_guess_of_the_kind(tmp_path, command):
    sources = derived.single_source("control", tmp_path / "flux1-canny-dev.safetensors")
    code, out, err = command("convert", *sources, "--tokenizers", TOKENIZERS, "-q", "none", "-o", "out", "--json")
    assert (code, json.loads(out)["task"]) == (0, "control (canny)")
    assert "kind canny, by its name; if that is wrong, convert it with --task depth" in err
    assert ", control (canny), in " in err


@pytest.mark.parametrize("kind", presets.KINDS)
def test_a_kind_that_is_asked_for_is_recorded(tmp_path, kind):
    sources = derived.single_source("control", tmp_path / "flux1-canny-dev.safetensors")
    assert tell(*sources, task=kind) == ("control", kind)


@pytest.mark.parametrize(
    ("name", "asked"),
    [(name, asked) for name in CHANNELS for asked in ASKED if ASKED[asked][0] not in (name, "text-to-image")]
    + [("fill", "text-to-image"), ("control", "text-to-image"), ("fill", "edit"), ("fill", "")],
)
def test_a_task_of_other_channels_is_refused_before_a_weight_is_read(tmp_path, command, name, asked):
    sources = derived.single_source(name, tmp_path / "flux.safetensors")
    with pytest.raises(UsageError, match=rf"`task` {asked}, and the transformer has in_channels|no task is called"):
        tell(*sources, task=asked)
    code, out, err = command("convert", *sources, "--tokenizers", TOKENIZERS, "-o", "out", "--task", asked)
    assert (code, out, (tmp_path / "out").exists()) == (2, "", False)
    assert "--task" in err


def test_a_filter_has_no_task(tmp_path):
    with pytest.raises(UsageError, match="the source is of nsfw"):
        convert([REFERENCE / "vit"], tmp_path / "out", task="fill", allow_unknown_filter=True)


@pytest.mark.parametrize(
    ("config", "task"),
    [
        (configs.FLUX_DEV, Task("kontext", None)),
        (configs.FLUX_FILL, Task("fill", None)),
        *((configs.FLUX_CONTROL, Task("control", kind)) for kind in (*presets.KINDS, None)),
    ],
)
def test_all_of_published_size_are_devs_and_require_filters(tmp_path, config, task):
    evidence = Evidence(config.architecture)
    family = index._family(config, ["flux"], evidence, task)
    assert (family.task, family.kind, family.license) == (*task[:2], presets.DEV.license)
    assert decide(evidence).required
    known = {"kontext": "Kontext", "fill": "Fill"}.get(task.name, (task.kind or "Canny or Depth").title())
    assert known.replace("Or", "or") in family.base
    published = full_size_folder(tmp_path / "big", "required")
    made = replace(open_model(published).index, base=family.base, task=task.name, kind=task.kind)
    files = licence_files(made, [tmp_path], [])
    assert files.keys() == {"README.md", "LICENSE.md", "NOTICE"}
    assert f"Its task is {made.task_and_kind}: it makes pictures from a prompt and" in files["README.md"].decode()


# --- the folder ---


@pytest.fixture
def copy(fill, tmp_path):
    """A copy of a folder for Fill, to be changed."""
    return shutil.copytree(fill, tmp_path / "copy")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"task": "inpaint"}, 'task is "inpaint" and not one of text-to-image, kontext, fill, control'),
        ({"task": None}, "task is NoneType None; expected str"),
        ({"task": ["fill"]}, r"task is list \['fill'\]; expected str"),
        ({"task": "x" * 10_000}, r'task is "x{37}\.\.\." and not one of'),
        ({"task": "control"}, 'task is "control", and the transformer has in_channels 384; expected fill'),
        ({"task": "kontext"}, 'task is "kontext", and the transformer has in_channels 384; expected fill'),
        ({"kind": "canny"}, 'kind is "canny" and task "fill", and only control has kinds'),
        ({"task": "control", "kind": "edges"}, 'kind is "edges" and not one of canny, depth'),
        ({"kind": 1}, "kind is int 1; expected str"),
    ],
)
def test_a_task_that_is_unknown_or_not_the_transformers_is_refused(copy, change, says):
    edit_json(copy / "model_index.json", **change)
    with pytest.raises(ModelError, match=says):
        open_model(copy)


@pytest.mark.parametrize("name", ["model", "fill", "control"])
def test_a_folder_without_a_task_has_the_usual_one_of_its_channels(request, tmp_path, name):
    path = shutil.copytree(request.getfixturevalue(name), tmp_path / "copy")
    stored = json.loads((path / "model_index.json").read_text())
    del stored["task"], stored["kind"]
    (path / "model_index.json").write_text(json.dumps(stored))
    assert open_model(path).index.task == {"model": "text-to-image"}.get(name, name)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"in_channels": 383},
            r"in_channels 383 with out_channels 64 is none of 64 \(text-to-image\), 384 \(fill\), 128",
        ),
        ({"in_channels": 32, "out_channels": 32}, 'task is "fill", and the transformer has in_channels 32'),
        ({"in_channels": 320, "out_channels": 32}, "out_channels is 32; expected 64"),
        ({"out_channels": 384}, 'task is "fill", and the transformer has in_channels 384; expected text-to-image or'),
    ],
)
def test_channels_of_no_task_are_refused_with_those_that_there_are(copy, change, says):
    edit_json(copy / "transformer" / "config.json", **change)
    with pytest.raises(ModelError, match=says):
        open_model(copy)


def test_the_channels_of_fills_mask_are_those_of_8_x_8_pixels():
    vae = replace(configs.FLUX_VAE, ch_mult=(1, 2, 4))
    with pytest.raises(ModelError, match="makes one latent of 4 pixels a side; expected 8"):
        replace(configs.FLUX_DEV_MODEL, flux=configs.FLUX_FILL, vae=vae).check()
    replace(configs.FLUX_DEV_MODEL, flux=configs.FLUX_CONTROL, vae=vae).check()


# --- the command ---


def test_inspect_models_and_tool_schema_name_the_task(command, home, control):
    (home / "models").mkdir(parents=True)
    (home / "models" / "edges").symlink_to(control)
    assert re.search(r"^task +control \(canny or depth\)$", command("inspect", control)[1], re.M)
    facts = json.loads(command("inspect", control, "--json")[1])
    assert (facts["kind"], facts["task"], facts["control_kind"]) == ("model folder", "control", None)
    assert "model, control (canny or depth)" in command("models")[1]
    assert json.loads(command("models", "--json")[1])[0]["task"] == "control (canny or depth)"
    says = json.loads(command("tool-schema", "-m", "edges")[1])["description"]
    assert says.endswith("The model's task is control (canny or depth).")
    assert "task" not in json.loads(command("tool-schema")[1])["description"]


@pytest.mark.parametrize("name", ["kontext", "FLUX.1 Fill [dev]", "canny-dev", "flux-dev-depth"])
def test_names_of_the_editing_models_are_answered_with_their_repository(command, name):
    model = next(m for m in ("Kontext", "Fill", "Canny", "Depth") if m.lower() in name.lower())
    code, _, err = command("generate", "a frog", "-m", name)
    assert code == 3
    assert f"install it: flux-krea convert black-forest-labs/FLUX.1-{model}-dev" in err


@pytest.mark.parametrize("model", ["Krea", "Kontext", "Fill", "Canny", "Depth"])
def test_setup_is_proposed_for_the_model_that_it_installs(command, model):
    code, _, err = command("generate", "a frog", "-m", f"black-forest-labs/FLUX.1-{model}-dev")
    assert (code, "flux-krea setup does everything" in err) == (3, model == "Krea")
    assert f"convert it: flux-krea convert black-forest-labs/FLUX.1-{model}-dev" in err


def test_setup_takes_no_model_for_another_task_for_the_usual_one(home, fill):
    """Fill alone is installed, and its licence asks for filters: setup still has to install Krea."""
    (home / "models").mkdir(parents=True)
    path = shutil.copytree(fill, home / "models" / "fill")
    edit_json(path / "model_index.json", filters="required")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["model_index.json"]["bytes"] = (path / "model_index.json").stat().st_size
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert [one.problem for one in find_installed()] == [None]
    assert installed_model({"model": (), "quantize": None}) is None


def test_setup_refuses_a_model_for_another_task(command, fill):
    code, _, err = command("setup", "--model", fill, "--offline", "--check", "review")
    assert code == 3
    assert "is a model for fill; expected one for text-to-image" in err
