"""Filters from published files to folders of ours: every naming and precision, and what is refused on the way."""

import json
import shutil
from functools import partial

import foreign
import mlx.core as mx
import pytest
from click.testing import CliRunner
from fitted import write_wide
from helpers import CONTROL, PIPELINE, REFERENCE, assert_close, edit_json, edit_tensors, pack_as_mlx_vlm, pixtral_source
from mlx_flux_krea.convert import convert as run_converter
from mlx_flux_krea.convert import fit
from mlx_flux_krea.convert.folder import check_manifest
from mlx_flux_krea.convert.identify import identify
from mlx_flux_krea.convert.sources import Source
from mlx_flux_krea.convert.tensors import Tensor

from mlx_flux_krea import cli
from mlx_flux_krea import convert as converter
from mlx_flux_krea.errors import ModelError, UsageError
from mlx_flux_krea.models import filter_config
from mlx_flux_krea.models.config import Quantization
from mlx_flux_krea.models.filter_config import NSFW_SHA256, NSFW_VIT, PIXTRAL_12B
from mlx_flux_krea.weights import open_filter, open_model

convert = partial(run_converter, allow_unknown_filter=True)  # these are small


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A small Pixtral with random weights, as it would be published."""
    return write_wide(tmp_path_factory.mktemp("wide"))


def arrays_of(path, component="pixtral") -> dict[str, mx.array]:
    arrays = {}
    for shard in (path / component).glob("*.safetensors"):
        arrays |= mx.load(str(shard))
    return arrays


def same(one: dict[str, mx.array], other: dict[str, mx.array]) -> bool:
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and mx.array_equal(one[n], other[n]) for n in one
    )


def logits(path, dtype=mx.float32) -> mx.array:
    network = open_filter("pixtral", path).network.load(dtype)
    pixels = mx.random.normal((1, 16, 24, 3), key=mx.random.key(1))
    return network.logits([([1, 3, *[10, 10, 10, 12, 10, 10, 10, 13], 44, 4], [pixels])])[0]


# --- where they go, and in which precision ---
def test_the_classifier_goes_to_its_place_and_stays_float32(home):
    report = convert([REFERENCE / "vit"], quantize=None)
    assert (report.path, report.dtype, report.quantize) == (home / "filters" / "nsfw", "float32", "none")
    folder = open_filter("nsfw")
    assert (folder.network.component, folder.network.dtype, folder.network.quantization) == ("nsfw", "float32", None)
    assert json.loads((report.path / "model_index.json").read_text())["_class_name"] == "NSFWFilter"
    (source,) = folder.index.source
    assert (source.file, source.layout) == ("model.safetensors", "classifier ViT")
    assert report.notes == (
        f"vit: an unknown filter, and not the published classifier, whose sha256 is {NSFW_SHA256}; "
        "the log of every run will say so",
    )
    assert folder.index.weights == "unknown"
    assert check_manifest(report.path, lambda *_: None)[1] == {"differs": [], "missing": [], "not listed": []}


def test_the_published_classifier_is_known_by_its_hash(monkeypatch, tmp_path):
    sha256 = open_filter("nsfw", convert([REFERENCE / "vit"], tmp_path / "a").path).index.source[0].sha256
    monkeypatch.setattr(filter_config, "NSFW_SHA256", sha256)
    monkeypatch.setattr(converter, "check_sizes", lambda job: None)
    assert run_converter([REFERENCE / "vit"], tmp_path / "b").notes == ()
    assert open_filter("nsfw", tmp_path / "b").index.weights == "published"
    assert run_converter([tmp_path / "b"], tmp_path / "c").notes == ()  # and again, from a folder of ours


@pytest.mark.parametrize("options", [{"quantize": "8"}, {"quantize": "4", "group_size": 32}, {"dtype": "bfloat16"}])
def test_the_classifier_is_in_no_other_precision(options, tmp_path):
    with pytest.raises(UsageError, match=r"the classifier in .*; expected float32, `quantize` none"):
        convert([REFERENCE / "vit"], tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_pixtrals_decoder_becomes_4_bits_and_its_tower_stays_in_16(wide, home):
    assert convert([wide], quantize=None).path == home / "filters" / "pixtral"
    folder = open_filter("pixtral")
    for path, q in folder.network.layers().items():
        if path.startswith(("vision_tower.", "multi_modal_projector.", "lm_head")):
            assert q is None
        else:
            assert q == Quantization(8 if path == "embed_tokens" else 4, 64), path
    assert {str(a.dtype) for a in arrays_of(folder.path).values()} == {"mlx.core.bfloat16", "mlx.core.uint32"}
    assert (folder.path / "tokenizer" / "tokenizer.json").read_bytes() == (wide / "tokenizer.json").read_bytes()


def test_of_the_head_only_the_rows_that_are_asked_for_are_kept(wide, tmp_path):
    shutil.copytree(wide, tmp_path / "two")
    whole = arrays_of(convert([wide], tmp_path / "whole").path)
    answers = json.loads((wide / "config.json").read_text())["head_ids"][:2]
    edit_json(tmp_path / "two" / "config.json", head_ids=answers)
    made = arrays_of(convert([tmp_path / "two"], tmp_path / "out").path)
    head = mx.load(str(wide / "model.safetensors"))["language_model.lm_head.weight"]
    assert mx.array_equal(made.pop("lm_head.weight"), head[mx.array(answers)])
    whole.pop("lm_head.weight")
    assert same(made, whole)


# --- other namings ---
TRANSFORMERS_5 = (
    ("language_model.lm_head.", "lm_head."), ("language_model.model.", "model.language_model."),
    ("vision_tower.", "model.vision_tower."), ("multi_modal_projector.", "model.multi_modal_projector."),
)  # fmt: skip


def rename(folder, *changes):
    def edit(arrays):
        for name in list(arrays):
            new = name
            for old, other in changes:
                new = new.replace(old, other)
            arrays[new] = arrays.pop(name)

    edit_tensors(folder / "model.safetensors", edit)


def split(folder) -> None:
    """Into two shards with an index, as the published files are."""
    arrays = mx.load(str(folder / "model.safetensors"))
    mx.eval(arrays)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in (0, 1):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        shard = {name: array for i, (name, array) in enumerate(sorted(arrays.items())) if i % 2 == number}
        mx.save_safetensors(str(folder / file), shard)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("changes", [(), TRANSFORMERS_5], ids=["transformers 4", "transformers 5"])
def test_shards_of_either_naming_give_the_same_folder(wide, tmp_path, changes):
    folder = shutil.copytree(wide, tmp_path / "shards")
    rename(folder, *changes)
    split(folder)
    assert same(arrays_of(convert([folder], tmp_path / "a").path), arrays_of(convert([wide], tmp_path / "b").path))


@pytest.fixture
def ready(wide, tmp_path):
    """Pixtral in 4 bits, as mlx-vlm writes it: all matrices, and convolutions in MLX's axes."""
    folder = shutil.copytree(wide, tmp_path / "mlx-vlm")
    pack_as_mlx_vlm(folder)
    return folder


@pytest.mark.parametrize("quantize", [None, "8", "none"])
def test_a_ready_4_bit_copy_stays_what_it_is(ready, tmp_path, quantize):
    """Bits that were lost do not come back, and rounding again would lose more."""
    report = convert([ready], tmp_path / "out", quantize=quantize)
    path, what = report.path, {None: "4", "8": "8", "none": "none"}[quantize]
    kept = [note for note in report.notes if "unknown filter" not in note]
    assert kept == [f"`quantize` {what}: layers that have as few bits or fewer in the source stay as they are"]
    folder = open_filter("pixtral", path)
    layers = folder.network.layers()
    assert layers.pop("lm_head") is None
    assert set(layers.values()) == {Quantization(4, 64)}
    stored, made = mx.load(str(ready / "model.safetensors")), arrays_of(path)
    for part in ("weight", "scales", "biases"):
        assert mx.array_equal(
            made[f"layers.1.attention.q_proj.{part}"], stored[f"language_model.model.layers.1.self_attn.q_proj.{part}"]
        )
        assert mx.array_equal(made[f"embed_tokens.{part}"], stored[f"language_model.model.embed_tokens.{part}"])
        tower = "transformer.layers.0.feed_forward.up_proj"
        assert mx.array_equal(
            made[f"vision_tower.layers.0.feed_forward.up_proj.{part}"],
            stored[f"vision_tower.vision_model.{tower}.{part}"],
        )


@pytest.mark.slow
def test_a_ready_copy_answers_as_its_values_do(ready, wide, tmp_path):
    """Pixtral's values, unpacked by MLX and stored under the published names."""
    plain = shutil.copytree(wide, tmp_path / "plain")
    stored = mx.load(str(ready / "model.safetensors"))

    def unpack(arrays):
        for name, array in arrays.items():
            if array.ndim == 2:
                new = name.replace("vision_tower.", "vision_tower.vision_model.")[:-6]
                parts = (stored[new + "scales"].astype(mx.float32), stored[new + "biases"].astype(mx.float32))
                arrays[name] = mx.dequantize(stored[new + "weight"], *parts, group_size=64, bits=4)

    edit_tensors(plain / "model.safetensors", unpack)
    made = (
        convert([ready], tmp_path / "a", dtype="float32").path,
        convert([plain], tmp_path / "b", dtype="float32").path,
    )
    assert_close(logits(made[0]), logits(made[1]), 1e-4)


# --- folders of ours ---
def test_a_filter_of_ours_is_converted_again(wide, tmp_path):
    whole = convert([wide], tmp_path / "whole")
    again = convert([whole.path], tmp_path / "again")
    assert same(arrays_of(again.path), arrays_of(whole.path))
    assert open_filter("pixtral", again.path).index.source[0] == open_filter("pixtral", whole.path).index.source[0]
    assert all("unknown filter" in note for note in again.notes)
    small, direct = (
        convert([whole.path], tmp_path / "small", quantize="4"),
        convert([wide], tmp_path / "d", quantize="4"),
    )
    assert same(arrays_of(small.path), arrays_of(direct.path))
    classifier = convert([REFERENCE / "vit"], tmp_path / "vit").path
    assert same(arrays_of(convert([classifier], tmp_path / "vit2").path, "nsfw"), arrays_of(classifier, "nsfw"))


def test_a_filter_is_inspected_and_is_no_model(wide, tmp_path):
    path = convert([wide], tmp_path / "out", quantize=None).path
    facts = json.loads(CliRunner().invoke(cli.cli, ["inspect", str(path), "--json"]).stdout)
    assert list(facts["components"]) == ["pixtral"]
    assert facts["components"]["pixtral"]["quantization"]["bits"] == 4
    with pytest.raises(ModelError, match="is not of a FluxPipeline"):
        open_model(path)
    with pytest.raises(ModelError, match="is of a PixtralFilter; expected the filter nsfw"):
        open_filter("nsfw", path)
    with pytest.raises(ModelError, match=r"there is no filter at .*flux-krea convert"):
        open_filter("nsfw")
    text = (path / "README.md").read_text()
    assert "flux-krea verify FOLDER" in text
    assert "generate" not in text


def test_float16_is_no_type_that_filters_compute_in(wide, tmp_path):
    assert logits(convert([wide], tmp_path / "out", dtype="float16").path, mx.float16).dtype == mx.float32
    network = open_filter("pixtral", tmp_path / "out").network.load(mx.float16)
    assert network.norm.weight.dtype == mx.bfloat16
    path = convert([REFERENCE / "vit"], tmp_path / "vit").path
    assert open_filter("nsfw", path).network.load(mx.float16).cls_token.dtype == mx.float32


# --- what is refused ---
PUBLISHED = {"nsfw": ("hf-nsfw_image_detection-vit", NSFW_VIT), "pixtral": ("hf-pixtral-12b-llava", PIXTRAL_12B)}


def plan_of(name: str, folder, config: dict):
    """Index of a full-size source beside this config.json."""
    (folder / "config.json").write_text(json.dumps(config))
    path = folder / "model.safetensors"
    tensors = {n: Tensor(n, path, *stored, 0, 0) for n, stored in foreign.published(PUBLISHED[name][0]).items()}
    (found,) = identify(Source(path, (path,), tensors, {}))
    return fit.make_plan(found)[0]


VIT_CONFIG = {
    "architectures": ["ViTForImageClassification"], "model_type": "vit", "hidden_size": 768, "intermediate_size": 3072,
    "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224, "patch_size": 16, "num_channels": 3,
    "hidden_act": "gelu", "layer_norm_eps": 1e-12, "qkv_bias": True, "id2label": {"0": "normal", "1": "nsfw"},
    "label2id": {"normal": "0", "nsfw": "1"}, "problem_type": "single_label_classification",
}  # fmt: skip
# as it is published: what it leaves out is transformers' default
PIXTRAL_CONFIG = {
    "model_type": "llava", "image_token_index": 10, "projector_hidden_act": "gelu", "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full", "image_seq_length": 1, "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "mistral", "hidden_size": 5120, "intermediate_size": 14336, "num_hidden_layers": 40,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072, "max_position_embeddings": 1024000,
        "rms_norm_eps": 1e-05, "rope_theta": 1000000000.0, "sliding_window": None,
    },
    "vision_config": {
        "model_type": "pixtral", "head_dim": 64, "image_size": 1024, "patch_size": 16, "rope_theta": 10000.0,
        "hidden_act": "silu",
    },
}  # fmt: skip


def changed(config: dict, path: str, value) -> dict:
    first, _, rest = path.partition(".")
    return config | {first: changed(config[first], rest, value) if rest else value}


def test_published_configs_are_the_published_sizes(tmp_path):
    assert plan_of("nsfw", tmp_path, VIT_CONFIG) == NSFW_VIT
    assert plan_of("pixtral", tmp_path, PIXTRAL_CONFIG) == PIXTRAL_12B
    early = changed(PIXTRAL_CONFIG, "vision_config.hidden_act", "gelu")
    assert plan_of("pixtral", tmp_path, early) == PIXTRAL_12B
    text = {k: v for k, v in PIXTRAL_CONFIG["text_config"].items() if k != "rope_theta"}
    newer = {"text_config": text | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e9}}}
    assert plan_of("pixtral", tmp_path, PIXTRAL_CONFIG | newer) == PIXTRAL_12B


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("hidden_act", "gelu_new"),
        ("id2label", {"0": "nsfw", "1": "normal"}),
        ("id2label", {"0": "safe", "1": "nsfw", "2": "other"}),
        ("num_attention_heads", 6),
        ("layer_norm_eps", 1e-6),
        ("qkv_bias", False),
        ("image_size", 112),
        ("num_hidden_layers", 11),
    ],
)
def test_a_config_that_disagrees_with_the_published_classifier_is_refused(tmp_path, path, value):
    with pytest.raises(ModelError):
        plan_of("nsfw", tmp_path, changed(VIT_CONFIG, path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("image_token_index", 11),
        ("projector_hidden_act", "gelu_new"),
        ("vision_feature_layer", -2),
        ("vision_feature_select_strategy", "default"),
        ("head_ids", [2649, 13059]),
        ("head_ids", [13059, 2649, 1]),
        ("text_config", None),
        ("text_config.rope_theta", 1e6),
        ("text_config.rope_theta", "1e9"),
        ("text_config.rope_parameters", {"rope_type": "yarn", "rope_theta": 1e9}),
        ("text_config.rope_parameters", {"rope_type": "default", "rope_theta": 1e6}),
        ("text_config.rope_scaling", {"type": "linear", "factor": 2.0}),
        ("text_config.rms_norm_eps", 1e-6),
        ("text_config.num_attention_heads", 64),
        ("text_config.hidden_act", "gelu"),
        ("text_config.sliding_window", 4096),
        ("vision_config.hidden_act", "relu"),
        ("vision_config.num_attention_heads", 8),
        ("vision_config.rope_theta", 1e6),
        ("vision_config.image_size", 512),
        ("vision_config.patch_size", 14),
    ],
)
def test_a_config_that_disagrees_with_the_published_pixtral_is_refused(tmp_path, path, value):
    with pytest.raises(ModelError):
        plan_of("pixtral", tmp_path, changed(PIXTRAL_CONFIG, path, value))


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("nsfw", "resample", 3),
        ("nsfw", "size", {"height": 384, "width": 384}),
        ("nsfw", "image_mean", [0.485, 0.456, 0.406]),
        ("nsfw", "do_normalize", False),
        ("pixtral", "resample", 2),
        ("pixtral", "patch_size", {"height": 14, "width": 14}),
        ("pixtral", "image_std", [0.5, 0.5, 0.5]),
        ("pixtral", "rescale_factor", 1.0),
    ],
)
def test_pictures_prepared_for_another_network_are_refused(tmp_path, name, field, value):
    source = REFERENCE / {"nsfw": "vit", "pixtral": "llava"}[name]
    folder = shutil.copytree(source, tmp_path / "source") if name == "nsfw" else pixtral_source(tmp_path / "source")
    edit_json(folder / "preprocessor_config.json", **{field: value})
    with pytest.raises(ModelError, match=rf"preprocessor_config.json: {field} is "):
        convert([folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pixtral_without_its_tokenizer_is_refused_and_may_be_given_one(tmp_path):
    folder = pixtral_source(tmp_path / "source")
    (tmp_path / "given").mkdir()
    (folder / "tokenizer.json").rename(tmp_path / "given" / "tokenizer.json")
    with pytest.raises(ModelError, match=r"no tokenizer was found .*set `tokenizers` to its folder"):
        convert([folder], tmp_path / "out")
    path = convert([folder], tmp_path / "out", tokenizers=tmp_path / "given").path
    assert (path / "tokenizer" / "tokenizer.json").exists()
    edit_json(folder / "config.json", head_ids=[20, 21])
    with pytest.raises(ModelError, match='for "yes"'):
        convert([folder], tmp_path / "other", tokenizers=tmp_path / "given")
    assert not (tmp_path / "other").exists()


def test_one_filter_at_a_time_and_nothing_beside_it(wide, tmp_path):
    with pytest.raises(ModelError, match=r"the sources hold nsfw, pixtral; expected a model, or one filter alone"):
        convert([REFERENCE / "vit", wide], tmp_path / "out")
    with pytest.raises(ModelError, match=r"expected a model, or one filter alone"):
        convert([REFERENCE / "vit", PIPELINE / "vae" / "diffusion_pytorch_model.safetensors"], tmp_path / "out")


def test_pixtral_in_mistrals_own_names_is_refused(tmp_path):
    mx.save_safetensors(
        str(tmp_path / "consolidated.safetensors"),
        {n: mx.zeros((8, 8)) for n in ("tok_embeddings.weight", "vision_language_adapter.w_in.weight")},
    )
    with pytest.raises(ModelError, match="Pixtral in Mistral's own names"):
        convert([tmp_path / "consolidated.safetensors"], tmp_path / "out")


def test_a_head_with_too_few_rows_is_refused(tmp_path):
    folder = pixtral_source(tmp_path / "source")
    name = "language_model.lm_head.weight"
    edit_tensors(folder / "model.safetensors", lambda arrays: arrays.update({name: arrays[name][: len(CONTROL)]}))
    with pytest.raises(ModelError, match=r"lm_head.weight has shape"):
        convert([folder], tmp_path / "out")
