"""Naming by rules: any common prefix, anything beside a network, and no silent wrong match.

Names and shapes are those of published files, at full size; the changes of single tensors are tried on small networks.
"""

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path

import foreign
import mlx.core as mx
import pytest
from mlx_flux_krea.convert import convert, fit
from mlx_flux_krea.convert.choose import choose
from mlx_flux_krea.convert.identify import identify
from mlx_flux_krea.convert.remap import generic
from mlx_flux_krea.convert.sources import Source
from mlx_flux_krea.convert.tensors import Tensor
from test_layouts import LAYOUTS, PARAMETERS, names_in, published

from mlx_flux_krea import nano
from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.weights import COMPONENTS, open_model

PREFIXES = [
    "module.", "_orig_mod.", "transformer.", "model.", "net.", "unet.", "dit.", "base_model.model.", "text_encoder.",
    "clip_l.transformer.", "t5xxl.transformer.", "first_stage_model.", "model.diffusion_model.", "diffusion_model.",
    "state_dict.model.", "generator.module.0.",
]  # fmt: skip
INNER = [r"^(\w+\.)", r"^((?:\w+\.){2})"]  # places for a wrapper inside a name
WRAPPERS = ["module.", "_forward_module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."]
# tensors that other tools leave in files, and the reason that is given for dropping them
PASSENGERS = {
    "__index_timestep_zero__": "a mark of ComfyUI's",
    "global_step": "bookkeeping of training",
    "model_ema.decay": "an averaged copy",
    "model_ema.num_updates": "an averaged copy",
    "optimizer.state.0.exp_avg": "bookkeeping of training",
    "some.other.thing": "not needed",
    "double": "not needed",
    "text_projection.bias": "not needed",
}


def with_names(source: Source, rename) -> Source:
    return replace(source, tensors={rename(n): replace(t, name=rename(n)) for n, t in source.tensors.items()})


def with_tensors(source: Source, *names: str, shape=(1,)) -> Source:
    more = {name: Tensor(name, source.path, "F32", shape, 0, 0) for name in names}
    return replace(source, tensors={**source.tensors, **more})


def plan_of(source: Source):
    (found,) = identify(source)
    return found.layout, fit.make_plan(found)[1]


# --- prefixes ---


@pytest.mark.parametrize(("name", "prefix"), [*zip(LAYOUTS, itertools.cycle(PREFIXES), strict=False)])
def test_every_layout_is_known_under_any_prefix(name, prefix):
    layout, plan = plan_of(with_names(published(name), lambda n: prefix + n))
    assert (layout.component, layout.name) == LAYOUTS[name]
    assert {n.removeprefix(prefix) for n in names_in(plan)} == names_in(plan_of(published(name))[1])


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", ["comfy-transformer-krea-fp8_scaled", "gguf-t5xxl-Q5_K_M"])
def test_every_prefix_is_stripped(name, prefix):
    plan = plan_of(with_names(published(name), lambda n: prefix + n))[1]
    assert plan.parameters == PARAMETERS[LAYOUTS[name][0]]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("place", INNER)
def test_wrappers_inside_names_are_left_out(place, wrapper):
    plan = plan_of(with_names(published("bfl-transformer-dev"), lambda n: re.sub(place, rf"\1{wrapper}", n)))[1]
    assert plan.parameters == PARAMETERS["transformer"]


def test_a_name_with_and_without_a_wrapper_is_one_tensor_twice():
    with pytest.raises(ModelError, match=r"img_in\.weight twice, as _orig_mod\.img_in\.weight"):
        identify(with_tensors(published("bfl-transformer-dev"), "_orig_mod.img_in.weight"))


@pytest.mark.parametrize(
    "copy", ["model_ema.", "ema.", "ema_model.module.", "model.ema_model.", "ema_net.", "swa_model."]
)
def test_an_averaged_copy_is_dropped_and_another_copy_refused(copy):
    source = published("bfl-transformer-dev")
    for prefix, is_average in ((copy, True), ("teacher.", False)):
        twice = replace(source, tensors={**source.tensors, **with_names(source, lambda n: prefix + n).tensors})  # noqa: B023
        if is_average:
            plan = plan_of(twice)[1]
            assert plan.parameters == PARAMETERS["transformer"]
            assert [reason for _, reason in plan.dropped] == ["an averaged copy of training (EMA)"] * len(
                source.tensors
            )
        else:
            with pytest.raises(ModelError, match=r"holds a transformer twice, as .* and as teacher\."):
                identify(twice)


@pytest.mark.parametrize("copy", ["ema.", "model_ema.", "transformer_ema.", "EMA.module.", "shadow."])
@pytest.mark.parametrize("name", ["bfl-transformer-dev", "gguf-t5xxl-Q8_0"])
def test_an_averaged_copy_that_stands_alone_is_the_network(name, copy):
    assert plan_of(with_names(published(name), lambda n: copy + n))[1].parameters == PARAMETERS[LAYOUTS[name][0]]


OF_TRAINING = ["optimizer.state.{}.exp_avg", "{}.exp_avg", "opt_state.mu.{}", "{}.grad", "state.exp_avg.{}"]


@pytest.mark.parametrize("place", OF_TRAINING)
def test_the_state_of_training_is_dropped_wherever_it_stands(place):
    source = published("bfl-transformer-dev")
    twice = {place.format(n): replace(t, name=place.format(n)) for n, t in source.tensors.items()}
    plan = plan_of(replace(source, tensors=source.tensors | twice))[1]
    assert plan.parameters == PARAMETERS["transformer"]
    assert {reason for _, reason in plan.dropped} == {"bookkeeping of training"}
    if "{}." not in place:
        with pytest.raises(ModelError, match="no known layout"):
            identify(replace(source, tensors=twice))


# --- passengers ---


@pytest.mark.parametrize("name", ["bfl-transformer-dev", "bfl-ae", "comfy-clip_l-fp16", "comfy-t5xxl-fp16"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_passengers_are_dropped_with_a_reason(name, prefix):
    source = with_tensors(with_names(published(name), lambda n: prefix + n), *PASSENGERS)
    dropped = dict(plan_of(source)[1].dropped)
    assert {n: next(r for r in PASSENGERS.values() if dropped[n].startswith(r)) for n in PASSENGERS} == PASSENGERS


@pytest.mark.parametrize(
    ("name", "more", "reason"),
    [
        ("comfy-clip_l-fp16", ["vision_model.pre_layrnorm.weight", "visual_projection.weight"], "encoder of pictures"),
        ("comfy-t5xxl-fp16", ["decoder.block.0.layer.1.EncDecAttention.q.weight", "lm_head.weight"], "T5's decoder"),
        ("gguf-t5xxl-Q8_0", ["dec.blk.0.attn_q.weight", "output.weight"], "T5's decoder"),
        ("comfy-transformer-dev-fp8_e4m3fn", ["double_blocks.0.img_attn.comfy_attention.config"], "ComfyUI's"),
    ],
)
def test_the_other_half_of_a_network_is_dropped(name, more, reason):
    dropped = dict(plan_of(with_tensors(published(name), *more))[1].dropped)
    assert all(reason in dropped[n] for n in more)


def test_t5_with_one_copy_of_its_embedding_under_either_name():
    source = published("comfy-t5xxl-fp16")
    only = with_names(source, lambda n: "encoder.embed_tokens.weight" if n == "shared.weight" else n)
    assert plan_of(only)[1].parameters == PARAMETERS["text_encoder_2"]
    both = with_tensors(source, "encoder.embed_tokens.weight", shape=source.tensors["shared.weight"].shape)
    assert ("encoder.embed_tokens.weight", "a second copy of shared.weight") in plan_of(both)[1].dropped
    with pytest.raises(ModelError, match=r"embed_tokens\.weight has shape \[1\], expected \[32128, 4096\]"):
        plan_of(with_tensors(source, "encoder.embed_tokens.weight"))


INSIDE = ["double_blocks.0.img_attn.qkv.weight.q", "double_blocks.0.extra", "double_blocks.19.img_attn.proj.weight",
          "img_in.weight_scale", "img_in.scales", "img_in",
          "final_layer.linear.zero", "single_blocks.3.new.weight"]  # fmt: skip


@pytest.mark.parametrize("name", INSIDE)
def test_what_is_unknown_inside_a_network_is_refused(name):
    for prefix in ("", "model.diffusion_model."):
        source = with_names(with_tensors(published("bfl-transformer-dev"), name), lambda n: prefix + n)  # noqa: B023
        with pytest.raises(ModelError, match=f"has the unknown tensor {name}"):
            plan_of(source)


def test_a_dev_file_that_lost_one_tensor_of_its_guidance_is_not_schnell():
    """The rest of the guidance would be left over, and the licence with it."""
    source = published("bfl-transformer-dev")
    for lost in [n for n in source.tensors if n.startswith("guidance_in.")]:
        with pytest.raises(ModelError, match="guidance_in"):
            plan_of(replace(source, tensors={n: t for n, t in source.tensors.items() if n != lost}))


# --- networks of the same names and other sizes ---

SIZES = {
    "the autoencoder of Stable Diffusion": ("bfl-ae", {"encoder.conv_out.weight": (8, 512, 3, 3)}),
    "the autoencoder of FLUX.2": ("bfl-ae", {"encoder.conv_out.weight": (64, 512, 3, 3)}),
    "CLIP bigG": ("comfy-clip_l-fp16", {"text_model.embeddings.token_embedding.weight": (49408, 1280)}),
    "LongCLIP": ("comfy-clip_l-fp16", {"text_model.embeddings.position_embedding.weight": (248, 768)}),
    "UMT5": ("comfy-t5xxl-fp16", {"shared.weight": (256384, 4096)}),
    "T5 Large": ("comfy-t5xxl-fp16", {"shared.weight": (32128, 1024)}),
}


def resized(name: str, shapes: dict) -> Source:
    source = published(name)
    changed = {n: replace(source.tensors[n], shape=shape) for n, shape in shapes.items()}
    return replace(source, tensors=source.tensors | changed)


@pytest.mark.parametrize("model", SIZES)
def test_a_network_of_another_model_is_known_by_its_shapes(model):
    with pytest.raises(ModelError, match=f"has other sizes than the published .*, and those of {model}"):
        plan_of(resized(*SIZES[model]))


@pytest.mark.parametrize("name", ["bfl-transformer-dev", "diffusers-transformer-dev"])
def test_a_transformer_of_fewer_blocks_is_called_by_its_name(name):
    source = published(name)
    few = {n: t for n, t in source.tensors.items() if not re.search(r"(?:double|^transformer)_blocks\.([89]|1\d)\.", n)}
    with pytest.raises(ModelError, match=r"Flux\.1 Lite or Flex\.1|lacks (?:double|transformer)_blocks\.8"):
        plan_of(replace(source, tensors=few))


@pytest.mark.parametrize("shape", [(2, 5120), (1,), (), (5120, 131072), (131073, 5120)])
def test_a_head_without_the_rows_that_are_needed_is_refused(shape):
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        plan_of(resized("hf-pixtral-12b-llava", {"language_model.lm_head.weight": shape}))


def test_in_a_folder_of_both_the_network_of_the_right_shapes_is_taken(tmp_path):
    """CLIP L and G, both in the names of transformers."""
    source = foreign.write(nano.FOLDER, tmp_path / "models", "ComfyUI")
    shapes = {n: tuple(a.shape) for n, a in foreign.arrays_of(nano.FOLDER)["text_encoder"].items()}
    larger = {n: (*(2 * x for x in shape),) for n, shape in shapes.items()}
    other = {n: ("F16", shape, bytes(2 * math.prod(shape))) for n, shape in larger.items()}
    foreign.save(source / "text_encoders" / "clip_g.safetensors", other)
    choice = choose([source])
    assert choice.components["text_encoder"].source.path.name == "clip_l.safetensors"
    assert [note for note in choice.notes if "clip_g.safetensors" in note]


# --- no silent wrong match ---

SMALL = [
    ("transformer", "diffusers"), ("text_encoder_2", "llama.cpp"), ("text_encoder", "BFL"), ("vae", "diffusers"),
    ("transformer", "mflux"),
]  # fmt: skip


def _elsewhere(name: str) -> str:
    """The name with its first number 90 higher; one without numbers gets a part more."""
    moved = re.sub(r"\d+", lambda number: str(int(number[0]) + 90), name, count=1)
    return moved if moved != name else f"{name}.x"


CHANGES = {
    "renamed": lambda n, t: {f"{n}_": t},
    "renamed in its place": lambda n, t: {".".join(reversed(n.rsplit(".", 1))): t},
    "renamed to another block": lambda n, t: {_elsewhere(n): t},
    "dropped": lambda n, t: {},
    "doubled": lambda n, t: {n: t, f"{n}.copy": t},
    "doubled outside": lambda n, t: {n: t, f"copy.of.{n}": t},
    "transposed": lambda n, t: {n: replace(t, shape=(*reversed(t.shape),))},
    "longer": lambda n, t: {n: replace(t, shape=(t.shape[0] + 1, *t.shape[1:]))},
    "one axis more": lambda n, t: {n: replace(t, shape=(1, *t.shape))},
    "one axis less": lambda n, t: {n: replace(t, shape=t.shape[1:])},
}


@pytest.fixture(scope="module")
def small():
    """Sources of each small network in each layout, at the sizes of the small model."""
    arrays, sources = foreign.arrays_of(nano.FOLDER), {}
    for component, layout in SMALL:
        path = Path("nowhere") / f"{component}.safetensors"
        shapes = foreign.take_apart(arrays[component], component, layout)
        tensors = {n: Tensor(n, path, "F32", tuple(a.shape), 0, 0) for n, a in shapes.items()}
        sources[component, layout] = Source(path, (path,), tensors, {})
    return sources


# one layout for each change; the others are slow
CORE = [f"{'-'.join(row)}-{change}" for row, change in zip(itertools.cycle(SMALL), CHANGES, strict=False)]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("component", "layout"), SMALL, ids=["-".join(row) for row in SMALL])
@pytest.mark.core(*CORE)
def test_any_change_of_any_tensor_is_noticed(small, monkeypatch, component, layout, change):
    """It is refused, or leaves the mapping as it was and is listed as dropped, or as lost where that is known.

    Of tensors whose names differ in numbers only, one is changed.
    """
    folder = open_model(nano.FOLDER)
    monkeypatch.setitem(fit._PUBLISHED, component, (folder.networks[component].sizes,))
    source = small[component, layout]
    _, before = plan_of(source)
    unseen = []
    for name, tensor in {generic(n): (n, t) for n, t in source.tensors.items()}.values():
        changed = CHANGES[change](name, tensor)
        if changed == {name: tensor} or name in dict(before.dropped):
            continue
        tensors = {k: t for n, t in source.tensors.items() for k, t in (changed if n == name else {n: t}).items()}
        try:
            _, after = plan_of(replace(source, tensors=tensors))
        except ModelError:
            continue
        is_same = [t.sources for t in after.targets] == [t.sources for t in before.targets]
        is_said = tensors.keys() - source.tensors.keys() <= dict(after.dropped).keys() and changed.get(name) == tensor
        if not (is_same and is_said) and not after.lost:
            unseen.append(name)
    assert unseen == []


def test_all_that_is_dropped_is_reported_and_the_rest_converted_to_the_same_bits(tmp_path):
    source = foreign.write(nano.FOLDER, tmp_path / "source", "all-in-one")
    file = source / "flux1-krea-dev-all.safetensors"
    arrays = mx.load(str(file))
    mx.eval(arrays)
    more = {name: mx.zeros((1,)) for name in PASSENGERS}
    more["text_encoders.clip_l.transformer.vision_model.pre_layrnorm.weight"] = mx.zeros((4,))
    renamed = {n.replace("first_stage_model.", "vae."): a for n, a in arrays.items()}
    foreign.save(file, {n: foreign.plain(a, "F32") for n, a in {**renamed, **more}.items()})
    report = convert([source], tmp_path / "out", dtype="float32", tokenizers=nano.FOLDER)
    foreign.assert_same(report.path, foreign.arrays_of(nano.FOLDER))
    dropped = {name for component in report.components for name, _ in component.dropped}
    assert {n.split("transformer.")[-1] for n in more} <= dropped
    assert {component.name for component in report.components} == COMPONENTS.keys()
