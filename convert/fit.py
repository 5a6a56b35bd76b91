"""Fits a component to its sizes: from its own config.json, else the published sizes; then every tensor is mapped."""

import re
from dataclasses import fields, replace
from functools import cache

from mlx.utils import tree_flatten

from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.files import read_json
from mlx_flux_krea.models import config as configs
from mlx_flux_krea.models.config import VAEConfig
from mlx_flux_krea.models.depth_config import DEPTH_ANYTHING_V2_SMALL
from mlx_flux_krea.models.filter_config import NSFW_VIT, PIXTRAL_12B, PixtralConfig
from mlx_flux_krea.weights import COMPONENTS, NETWORKS, Sizes, build, parameters

from . import decode, maps
from .layouts import Layout, SourceComponent
from .lookalikes import by_sizes
from .remap import ComponentPlan, Misfit, generic, matches, plan, source_names
from .sizes import require, short


@cache
def target_shapes(component: str, config: Sizes) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of our tensors of a component in the order of its modules, with MLX's axes."""
    return {name: tuple(array.shape) for name, array in parameters(build(component, config)).items()}


def make_plan(component: SourceComponent) -> tuple[Sizes, ComponentPlan]:
    """Returns the sizes of a component and the complete mapping of its tensors.

    Sizes come from the layout's own config.json; for single files, from the published config with these shapes, else
    from a config.json beside the file in our form, BFL's or the layout's.

    Raises:
        ModelError: sizes unknown, or tensors missing, unknown, of another shape or of a type that cannot be decoded.
    """
    config, mapping = _fit(component)
    for tensor in (t for target in mapping.targets for t in target.sources):
        decode.check(tensor.dtype, f"{tensor.path}: {tensor.name}")
    return config, mapping


def _fit(component: SourceComponent) -> tuple[Sizes, ComponentPlan]:
    name, layout, source = component.layout.component, component.layout, component.source
    if layout.told and not source.component:
        told = layout.told({name: tensor.shape for name, tensor in component.tensors.items()})
        config = configs.from_json(NETWORKS[name][0], told, str(source.path))
        return config, _plan(component, config)
    beside, file = source.config(), f"{source.folder / 'config.json'}"
    if beside is None:
        return _fit_published(component)
    theirs = None if _is_ours(beside, name) else layout.convert_config
    if source.component:
        is_its_own = theirs is not None or _is_ours(beside, name)
    else:
        is_its_own = theirs is not None and _kind(beside) in layout.config_kinds
    if not is_its_own and (fitted := _first_fit(component, [])):
        return fitted
    obj = theirs(beside, file) if theirs else _beside(beside, name, file)
    config = configs.from_json(NETWORKS[name][0], obj, file)
    if name not in COMPONENTS:
        _check_published(component, config, file)
    return config, _plan(component, config)


def _fit_published(component: SourceComponent) -> tuple[Sizes, ComponentPlan]:
    """Fits a single file to the published sizes.

    Raises:
        ModelError: none fits.
    """
    refused: list[Misfit] = []
    if fitted := _first_fit(component, refused):
        return fitted
    nearest = min(refused, key=lambda error: len(error.problems))
    if nearest.same_sizes:
        raise nearest
    known = by_sizes(component.layout.component, component.tensors)
    of_whom = f", and those of {known}" if known else ""
    raise ModelError(
        f"{component.source.path} has other sizes than the published {component.layout.name}{of_whom}"
        f" ({nearest.found})",
        "a config.json beside it with heads and other sizes that shapes do not tell",
    )


def _first_fit(component: SourceComponent, refused: list[Misfit]) -> tuple[Sizes, ComponentPlan] | None:
    for config in _PUBLISHED[component.layout.component]:
        try:
            return config, _plan(component, config)
        except Misfit as error:
            refused.append(error)
    return None


def _check_published(component: SourceComponent, config: Sizes, where: str) -> None:
    """Checks the config of a filter or of a component: with the published shapes it must have the published numbers.

    Raises:
        ModelError: naming the first number that differs, or a preprocessing for another network.
    """
    name = component.layout.component
    for published in _PUBLISHED[name]:
        told, expected = (dict(tree_flatten(configs.to_json(c))) for c in (config, published))
        differ = sorted(field for field in told.keys() | expected if told.get(field) != expected.get(field))
        shapes, others = (target_shapes(name, c) | {"lm_head.weight": ()} for c in (config, published))
        if differ and shapes == others:
            field = differ[0]
            found = f"{where}: {field} is {short(told.get(field))}"
            raise ModelError(found, f"{expected.get(field)}", "take the original")
    _check_preprocessing(component, config)


def _check_preprocessing(component: SourceComponent, config: Sizes) -> None:
    """Checks the preprocessor_config.json of an encoder of pictures, where there is one.

    Raises:
        ModelError: it describes another preprocessing than ours.
    """
    folder, layout = component.source.folder, component.layout
    for file in (folder / "preprocessor_config.json", folder.parent / "feature_extractor" / "preprocessor_config.json"):
        if layout.preprocessing and file.exists() and (file.parent == folder or component.source.component):
            require(read_json(file), str(file), **layout.preprocessing(config))


_PUBLISHED: dict[str, tuple[Sizes, ...]] = {
    "transformer": (configs.FLUX_DEV, configs.FLUX_SCHNELL, configs.FLUX_FILL, configs.FLUX_CONTROL),
    "text_encoder": (configs.CLIP_L,),
    "text_encoder_2": (configs.T5_XXL,),
    "vae": (configs.FLUX_VAE,),
    "nsfw": (NSFW_VIT,),
    "pixtral": (PIXTRAL_12B,),
    "image_encoder": (configs.SIGLIP_SO400M,),
    "image_embedder": (configs.REDUX_DEV,),
    "depth": (DEPTH_ANYTHING_V2_SMALL,),
}
# sections of a config.json in BFL's form, and their fields that must have these values
_BFL_SECTIONS = {"transformer": "flux", "text_encoder": "clip", "text_encoder_2": "t5", "vae": "ae"}
_BFL_FIXED = {
    "transformer": {"qkv_bias": True},
    "text_encoder": {"hidden_act": "quick_gelu"},
    "text_encoder_2": {"feed_forward": "gated gelu (tanh form)"},
    "vae": {},
}


def _plan(component: SourceComponent, config: Sizes) -> ComponentPlan:
    last = len(config.ch_mult) - 1 if isinstance(config, VAEConfig) else 0
    layout, shapes = component.layout, target_shapes(component.layout.component, config)
    dropped = (*layout.dropped, *maps.ANY_DROPPED)
    outside = ((t.name, matches(t.name, dropped) or maps.NOT_NEEDED) for t in component.outside)
    picked = config.head_ids if isinstance(config, PixtralConfig) else ()
    made = plan(
        component.tensors,
        table=layout.table,
        dropped=dropped,
        lost=layout.lost,
        shapes=shapes,
        modules=modules(layout),
        last=last,
        source=str(component.source.path),
        picked=picked,
    )
    reasons = dict((*made.dropped, *outside))
    said = tuple((n, reason if reason != maps.NOT_NEEDED else aside(n) or reason) for n, reason in reasons.items())
    return replace(made, dropped=said)


@cache
def modules(layout: Layout) -> frozenset[str]:
    """Returns the generic names of all modules that a network of the published sizes has in a layout."""
    config = _PUBLISHED[layout.component][0]
    last = len(config.ch_mult) - 1 if isinstance(config, VAEConfig) else 0
    names = {n for ours in target_shapes(layout.component, config) for n in source_names(ours, layout.table, last)[0]}
    parts = (generic(name).split(".")[:-1] for name in names)
    return frozenset(".".join(split[:n]) for split in parts for n in range(1, len(split) + 1))


@cache
def aside(prefix: str) -> str | None:
    """Returns why a copy of a network under a prefix is no network to convert; None: it is one."""
    rows = ((pattern, reason) for pattern, reason in maps.ASIDE)
    return next((why for pattern, why in rows if re.fullmatch(pattern, prefix.rstrip("."), re.IGNORECASE)), None)


_NOT_SIZES = ("dtype", "quantization")  # fields of a config.json of ours about the arrays


def _kind(obj: dict):
    return obj.get("_class_name", obj.get("model_type"))


def _is_ours(obj: dict, component: str) -> bool:
    known = {*_NOT_SIZES, *(f.name for f in fields(NETWORKS[component][0]))}
    return _BFL_SECTIONS.get(component) in obj or (bool(obj) and obj.keys() <= known)


def _beside(obj: dict, component: str, where: str) -> dict:
    """Returns our sizes from a config.json beside a single file: ours, or in the form of BFL's parameter classes."""
    section = _BFL_SECTIONS.get(component)
    if section and isinstance(obj.get(section), dict):
        own = dict(obj[section])
        require(own, where, **_BFL_FIXED[component])
        for name in (*_BFL_FIXED[component], "resolution"):
            own.pop(name, None)
        if component == "vae" and "ae_norm_num_groups" in obj:
            own["norm_num_groups"] = obj["ae_norm_num_groups"]
        return own
    return {k: v for k, v in obj.items() if k not in _NOT_SIZES}
