"""Finds the networks in a file by names alone: under any common prefix, beside anything else.

A tensor belongs to the network with the longest prefix of its name. What a network does not need is dropped and listed;
`remap.py` refuses what matters and is not understood.
"""

from mlx_flux_krea.errors import ModelError

from . import lookalikes, maps
from .fit import aside, modules
from .layouts import LAYOUTS, Layout, SourceComponent
from .remap import deepest, matches
from .sizes import short
from .sources import Source
from .tensors import Tensor

# parts of names that wrappers of training frameworks put between a module's own
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
_WRAPPERS |= {"base_layer", "original_module", "orig_module", "module"}
_WANTED = "FLUX.1 Krea [dev] or one of its kin, in fp8, GGUF, MLX's quantization, or 16 or 32 bits"

Names = dict[str, Tensor]


def identify(source: Source) -> tuple[SourceComponent, ...]:
    """Identifies the components in a source: one, or those of an all-in-one file.

    Raises:
        ModelError: another model (named, if it is known), a network of another kind than its folder's name, or the same
            network twice.
    """
    if model := lookalikes.by_names(source.tensors):
        raise ModelError(f"{source.path} is {model}", _WANTED)
    names = _unwrapped(source)
    found = _networks(source, names)
    if model := lookalikes.alone(source.tensors, {layout.component for _, layout in found}):
        raise ModelError(f"{source.path} is {model}", _WANTED)
    if not found:
        raise _unknown(source)
    for _, layout in found:
        if source.component not in (None, layout.component):
            raise ModelError(f"{source.path} holds a {layout.name}", f"a {source.component}")
    parts: dict[tuple[str, str], Names] = {(prefix, layout.name): {} for prefix, layout in found}
    outside: list[Tensor] = []
    for name, tensor in names.items():
        if (owner := _owner(name, found)) is None:
            outside.append(tensor)
        else:
            prefix, layout = owner
            parts[prefix, layout.name][name.removeprefix(prefix)] = tensor
    first, *others = (SourceComponent(source, layout, parts[prefix, layout.name]) for prefix, layout in found)
    return SourceComponent(source, first.layout, first.tensors, tuple(outside)), *others


def _unknown(source: Source) -> ModelError:
    """Returns the error about a source of no known layout."""
    first = ", ".join(sorted(source.tensors)[:3])
    architecture = source.metadata.get("general.architecture") or source.metadata.get("modelspec.architecture")
    kind = f"says that it is {short(architecture)}, and " if architecture else ""
    found = f"{source.path} has no known layout (it {kind}holds {first})"
    return ModelError(found, todo="see flux-krea convert --help")


def _unwrapped(source: Source) -> Names:
    """Returns the tensors by names without wrappers.

    Raises:
        ModelError: two names become one.
    """
    names: Names = {}
    for name, tensor in source.tensors.items():
        bare = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if bare in names:
            raise ModelError(f"{source.path} holds {bare} twice, as {name} too", "every tensor once")
        names[bare] = tensor
    return names


def _networks(source: Source, names: Names) -> list[tuple[str, Layout]]:
    """Returns the networks whose identifying tensors are there, each with its prefix.

    Copies of training are left out, but for an averaged one of a network that stands there only so.

    Raises:
        ModelError: the same network stands there twice.
    """
    there = [(prefix, layout) for layout in LAYOUTS for prefix in _prefixes(layout, names)]
    reasons = {prefix: aside(prefix) for prefix, _ in there}
    found: dict[str, tuple[str, Layout]] = {}
    for reason in (None, maps.ASIDE[0][1]):
        before = set(found)
        for prefix, layout in there:
            is_other = reasons[prefix] != reason or layout.component in before
            if is_other or _is_part(prefix, layout, found):
                continue
            if layout.component in found:
                other, known = found[layout.component]
                twice = f"as {other + known.probe[0]} and as {prefix + layout.probe[0]}"
                raise ModelError(f"{source.path} holds a {layout.component} twice, {twice}", "every network once")
            found[layout.component] = prefix, layout
    return list(found.values())


def _prefixes(layout: Layout, names: Names) -> list[str]:
    """Returns the prefixes under which all identifying tensors of a layout stand."""
    first, *others = layout.probe
    ends = (name.removesuffix(first) for name in names if name.endswith(first))
    return [p for p in ends if (not p or p.endswith(".")) and all(p + other in names for other in others)]


def _is_part(prefix: str, layout: Layout, found: dict[str, tuple[str, Layout]]) -> bool:
    """Returns True for names that an earlier network has: the same under shorter names, or its part that we drop."""
    for before, known in found.values():
        if not prefix.startswith(before):
            continue
        inner = (prefix + layout.probe[0]).removeprefix(before)
        if (known.component == layout.component and known is not layout) or matches(inner, known.dropped):
            return True
    return False


def _owner(name: str, found: list[tuple[str, Layout]]) -> tuple[str, Layout] | None:
    """Returns the network that a name belongs to: the longest prefix, then the most parts that its modules share."""
    inside = [(len(prefix), deepest(name.removeprefix(prefix), modules(layout)), -i)
              for i, (prefix, layout) in enumerate(found) if name.startswith(prefix)]  # fmt: skip
    return found[-max(inside)[2]] if inside else None
