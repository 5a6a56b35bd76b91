"""A model's need of filters follows from evidence: everything adds the requirement, one hash lifts it."""

import json
import shutil

import pytest
from helpers import PIPELINE, TOKENIZERS, edit_json, full_size_folder
from hub import Hub
from huggingface_hub import ModelInfo
from mlx_flux_krea.convert import convert, evidence
from mlx_flux_krea.convert.choose import choose
from mlx_flux_krea.convert.fetch import outlined
from mlx_flux_krea.convert.hub import look
from mlx_flux_krea.convert.index import make_index
from mlx_flux_krea.convert.tasks import TEXT_TO_IMAGE

from mlx_flux_krea import presets
from mlx_flux_krea.licence import FLUX_1_DEV, FLUX_1_SCHNELL, Evidence, decide
from mlx_flux_krea.models import config as configs
from mlx_flux_krea.request import Request
from mlx_flux_krea.weights import open_model

DEV_TEXT = "FLUX.1 [dev] Non-Commercial License v1.1.1\n\nBlack Forest Labs Inc. ..."
APACHE_TEXT = "                                 Apache License\n                           Version 2.0, January 2004\n"
TOY = FLUX_1_DEV._replace(hidden_size=128, num_heads=4)
WIDE = FLUX_1_DEV._replace(hidden_size=2048, num_heads=16)
PINNED = next(iter(presets.SCHNELL_FILES))
OTHER = "ab" * 32


@pytest.mark.parametrize(
    ("given", "required"),
    [
        # FLUX.1's size and whatever looks derived from it
        (Evidence(FLUX_1_DEV), True),
        (Evidence(FLUX_1_SCHNELL), True),
        (Evidence(FLUX_1_DEV._replace(depth=8)), True),
        (Evidence(FLUX_1_DEV._replace(depth=20)), True),
        (Evidence(FLUX_1_DEV._replace(depth_single_blocks=37)), True),
        (Evidence(FLUX_1_SCHNELL._replace(depth_single_blocks=37)), True),
        # nothing but a hash lifts it
        (Evidence(FLUX_1_SCHNELL, texts=(APACHE_TEXT,), ids=("apache-2.0",), names=("FLUX.1-schnell",)), True),
        (Evidence(FLUX_1_SCHNELL, sha256=frozenset([OTHER])), True),
        (Evidence(FLUX_1_SCHNELL, sha256=frozenset([PINNED, OTHER])), True),
        (Evidence(FLUX_1_SCHNELL, sha256=frozenset([PINNED])), False),
        (Evidence(FLUX_1_SCHNELL, sha256=frozenset([OTHER]), confirmed=frozenset([OTHER])), False),
        (Evidence(FLUX_1_DEV, sha256=frozenset([PINNED])), True),
        (Evidence(FLUX_1_SCHNELL._replace(depth=18), sha256=frozenset([PINNED])), True),
        # text, id, name: of other sizes too
        (Evidence(WIDE), False),
        (Evidence(WIDE, texts=(APACHE_TEXT, DEV_TEXT)), True),
        (Evidence(WIDE, ids=("flux-1-dev-non-commercial-license",)), True),
        (Evidence(WIDE, ids=("apache-2.0",)), False),
        (Evidence(WIDE, names=("black-forest-labs/FLUX.1-dev",)), True),
        (Evidence(WIDE, names=("flux1-krea-dev.safetensors",)), True),
        (Evidence(WIDE, names=("FLUX.1-schnell", "my-devices", "influx-development")), False),
        (Evidence(WIDE).beside([Evidence(WIDE, texts=(DEV_TEXT,))]), True),
        (Evidence(WIDE, declared=True), True),
        # a toy requires nothing
        (Evidence(TOY, texts=(DEV_TEXT,), ids=("flux-1-dev-non-commercial",), names=("FLUX.1-dev",)), False),
    ],
)
def test_the_decision(given, required):
    decision = decide(given)
    assert decision.required == required, decision.why
    assert decision.why


@pytest.fixture
def checkpoint(tmp_path):
    """The reference's pipeline, with a name that says nothing."""
    return shutil.copytree(PIPELINE, tmp_path / "weights")


def gathered(folder, architecture=WIDE):
    with outlined([folder], offline=True) as remote:
        return evidence.gather(choose(remote.paths).components, architecture, remote)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("LICENSE.md", DEV_TEXT),
        ("LICENCE.txt", DEV_TEXT),
        ("README.md", "---\nlicense: other\nlicense_name: flux-1-dev-non-commercial-license\n---\n# A fine-tune\n"),
        ("README.md", "---\nbase_model: black-forest-labs/FLUX.1-dev\n---\n"),
        ("transformer/LICENSE", DEV_TEXT),
        ("vae/LICENSE.md", DEV_TEXT),
        # other names, ends of lines, encodings and spellings
        *((name, DEV_TEXT) for name in ("license.MD", "LICENSE-FLUX1-dev", "flux_licence.rst", "COPYING", "NOTICE")),
        ("LICENSE", "FLUX.1 [dev] Non\u2011\nCommercial License"),
        ("LICENSE", "\ufeffthe FLUX.1 Krea\n[dev]  weights are non-\ncommercial".encode("utf-16")),
        ("README.md", "# About\n\nUnder the [FLUX.1 \\[dev\\] Non-Commercial License](LICENSE)."),
        ("Readme.md", "\ufeff---\r\nbase_model:\r\n- black-forest-labs/FLUX.1-dev\r\n---"),
        ("README.md", "---\ntags:\n  - base_model:adapter:black-forest-labs/FLUX.1-dev\n---\n"),
        (
            "README.md",
            "---\nlicense_link: https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md\n---\n",
        ),
    ],
)
def test_texts_and_cards_beside_any_source_are_evidence(checkpoint, name, text):
    assert not decide(gathered(checkpoint)).required
    (checkpoint / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert decide(gathered(checkpoint)).required


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("LICENSE", APACHE_TEXT),
        ("README.md", "---\nlicense: apache-2.0\nbase_model:\n- black-forest-labs/FLUX.1-schnell\n---\nFor devices."),
        ("license.py", DEV_TEXT),
        ("LICENSE.md/text", DEV_TEXT),
    ],
)
def test_other_texts_are_no_evidence(checkpoint, name, text):
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_text(text)
    assert not decide(gathered(checkpoint)).required


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json"])
@pytest.mark.parametrize(
    "facts",
    [
        {"_name_or_path": "black-forest-labs/FLUX.1-Krea-dev"},
        {"license": "FLUX.1 [dev] Non-Commercial License"},
        {"metadata": {"base_model": ["black-forest-labs/FLUX.1-dev"]}},
    ],
)
def test_an_id_in_json_is_evidence(checkpoint, file, facts):
    edit_json(checkpoint / file, **facts)
    assert decide(gathered(checkpoint)).required


def test_a_folder_called_dev_is_evidence(tmp_path):
    assert decide(gathered(shutil.copytree(PIPELINE, tmp_path / "my-flux.1-dev-finetune"))).required


DEV_REPOSITORY = "black-forest-labs/FLUX.1-dev"


@pytest.mark.parametrize(
    ("page", "required"),
    [
        ({"cardData": {"license": "other", "license_name": "flux-1-dev-non-commercial-license"}}, True),
        ({"cardData": {"base_model": [DEV_REPOSITORY]}}, True),
        ({"tags": ["diffusers", f"base_model:finetune:{DEV_REPOSITORY}"]}, True),
        ({"cardData": {"license": "apache-2.0", "base_model": "a/b"}, "tags": ["license:apache-2.0"]}, False),
        ({}, False),
    ],
)
def test_the_hubs_licence_field_is_evidence(checkpoint, monkeypatch, page, required):
    (checkpoint / "LICENSE-of-flux").write_text(APACHE_TEXT)
    served = Hub(checkpoint, "somebody/finetune").info() | page
    monkeypatch.setattr("huggingface_hub.model_info", lambda repo, **_: ModelInfo(**served))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    listing = look("somebody/finetune")
    assert "LICENSE-of-flux" in {file.name for file in listing.files}
    with outlined([checkpoint], offline=True) as remote:
        for file in listing.files:
            remote.files[checkpoint / file.name] = listing, file
        given = evidence.gather(choose(remote.paths).components, WIDE, remote)
    assert decide(given).required is required


@pytest.mark.parametrize(
    ("name", "hashes", "base", "license", "steps", "shift", "true_cfg"),
    [
        ("flux1-schnell", {PINNED}, "FLUX.1 [schnell]", "apache-2.0", 4, "none", 1.0),
        ("flux1-schnell", {OTHER}, "FLUX.1 [schnell], by its name", "unknown", 4, "none", 1.0),
        ("undistilled", {OTHER}, "FLUX.1 without guidance embedding", "unknown", 28, "dynamic", 3.5),
        ("flux-dev-de-distill", {OTHER}, "FLUX.1 without guidance embedding", presets.DEV.license, 28, "dynamic", 3.5),
    ],
)
def test_without_guidance_a_name_chooses_defaults_and_a_hash_the_licence(
    tmp_path, name, hashes, base, license, steps, shift, true_cfg
):
    source = shutil.copytree(PIPELINE, tmp_path / name)
    shutil.rmtree(source / "scheduler")
    with outlined([source], offline=True) as remote:
        components = choose(remote.paths).components
        given = evidence.gather(components, FLUX_1_SCHNELL, remote)
        given, _ = evidence.confirm(given, hashes, offline=True)
        index = make_index(components, configs.FLUX_SCHNELL, given, TEXT_TO_IMAGE)
    assert (index.base, index.license, index.schedule.shift) == (base, license, shift)
    assert (index.defaults.num_inference_steps, index.defaults.true_cfg_scale) == (steps, true_cfg)
    assert index.filters == ("none" if hashes == {PINNED} else "required")


def test_the_hub_is_asked_for_a_hash_that_is_not_pinned(monkeypatch):
    asked = []
    monkeypatch.setattr(evidence, "stated_hashes", lambda repo: asked.append(repo) or {OTHER})
    found, published = evidence.confirm(Evidence(FLUX_1_SCHNELL), [OTHER], offline=False)
    assert (decide(found).required, published) == (False, {OTHER: presets.SCHNELL_REPOSITORIES[-1]})
    assert evidence.confirm(Evidence(FLUX_1_DEV), [OTHER], offline=False)[1] == {}
    assert decide(evidence.confirm(Evidence(FLUX_1_SCHNELL), [OTHER], offline=True)[0]).required
    assert asked == list(presets.SCHNELL_REPOSITORIES)


# --- folders of ours ---


def folder_with(path, **changes):
    folder = full_size_folder(path, filters="none", guidance_embed=False)
    edit_json(folder / "model_index.json", **changes)
    return open_model(folder)


def record(sha256: str, published: str = "") -> list[dict]:
    facts = {"file": "x", "sha256": sha256, "bytes": 1, "layout": "transformer, Black Forest Labs"}
    return [facts | {"published": published}]


@pytest.mark.parametrize(
    ("changes", "required"),
    [
        (
            {"license": "apache-2.0", "name": "FLUX.1-schnell", "source": record(OTHER)},
            True,
        ),
        ({"license": "apache-2.0", "base": "FLUX.1 [schnell]", "source": record(PINNED)}, False),
        ({"license": "apache-2.0", "source": record(OTHER, presets.SCHNELL_REPOSITORIES[0])}, False),
        ({"license": "apache-2.0", "source": record(OTHER, "somebody/else")}, True),
        ({"license": "apache-2.0", "source": record(PINNED), "filters": "required"}, True),
    ],
)
def test_a_folders_json_lifts_nothing_but_by_the_hash_of_its_source(tmp_path, changes, required):
    folder = folder_with(tmp_path / "big", **changes)
    assert folder.requires_filters == required, folder.filters.why


def test_one_block_more_or_less_changes_nothing(tmp_path):
    folder = full_size_folder(tmp_path / "big", filters="none")
    edit_json(folder / "transformer" / "config.json", depth=18)
    assert open_model(folder).requires_filters


def test_a_model_folder_converted_again_keeps_its_duty(model, tmp_path):
    source = shutil.copytree(model, tmp_path / "strict")
    edit_json(source / "model_index.json", filters="required")
    made = convert([source], tmp_path / "again", quantize="none", dtype="bfloat16", tokenizers=TOKENIZERS).path
    assert open_model(made).requires_filters


def test_inspect_says_why(command, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "strict")
    edit_json(folder / "model_index.json", filters="required")
    assert "required: its model_index.json says so" in command("inspect", folder)[1]


def test_inspect_says_why_not(command, model):
    assert "not required: its hidden size" in command("inspect", model)[1]


@pytest.mark.parametrize(
    ("given", "scale", "negative"),
    [
        ({}, 3.5, ("",)),
        ({"negative_prompt": "rain"}, 3.5, ("rain",)),
        ({"true_cfg_scale": 1.0}, 1.0, ()),
        ({"true_cfg_scale": 2.0, "negative_prompt": "rain"}, 2.0, ("rain",)),
    ],
)
def test_a_model_without_guidance_follows_its_prompt_by_true_cfg(model, tmp_path, given, scale, negative):
    folder = shutil.copytree(model, tmp_path / "undistilled")
    defaults = json.loads((folder / "model_index.json").read_text())["defaults"]
    edit_json(folder / "model_index.json", defaults=defaults | {"true_cfg_scale": 3.5})
    request = Request(prompt="a cat", seed=1, **given).resolve(open_model(folder))
    assert (request.true_cfg_scale, request.negative_prompt) == (scale, negative)
