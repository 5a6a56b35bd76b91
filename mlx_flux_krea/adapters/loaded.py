"""The adapters of a pipeline: loaded ones by name, the weights that are set, and diffusers' methods for both."""

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import compat
from ..errors import UsageError
from ..models.config import ModelSizes
from ..presets import MAX_WEIGHT
from ..weights import ModelFolder
from ..worker import Worker
from .formulas import Uses
from .installed import Origin, added_duty, installed, obtain
from .parts import Adapter, Facts

logger = logging.getLogger("mlx_flux_krea")

_TAG = re.compile(r"<(?:lora|lyco):([^<>:]*)(?::([^<>]*))?>", re.I)
_OPEN_TAG = re.compile(r"<(?:lora|lyco):[^<>]*(?=<|\Z)", re.I)

Weights = tuple[tuple[str, float], ...]  # names of adapters with their weights


class LoadedAdapters:
    """Adapters that were loaded for one model, by name, and the weights of those that are active."""

    def __init__(self, sizes: ModelSizes):
        self.sizes = sizes
        self.all: dict[str, Adapter] = {}
        self.active: dict[str, float] = {}
        self.enabled = True

    def add(self, adapter: Adapter, name: str | None) -> str:
        """Adds an adapter under a name. Returns the name.

        Raises:
            UsageError: another one has that name.
        """
        name = adapter.facts.name if name is None else name
        before = self.all.get(name)
        if before and before.facts.sha256 != adapter.facts.sha256:
            raise UsageError(f"an adapter is loaded as {name}", "another name", "or unload it: delete_adapters()")
        self.all[name] = before or adapter
        return name

    def current(self) -> Weights:
        """Returns the adapters that a call uses which names none."""
        return tuple(self.active.items()) if self.enabled else ()

    def uses(self, weights: Weights) -> Uses:
        """Returns adapters with their weights, by name.

        Raises:
            UsageError: one is not loaded.
        """
        for name, _ in weights:
            if name not in self.all:
                raise UsageError(f"no adapter is loaded as {name!r}", known_names(self.all), "load_lora_weights() does")
        return [(self.all[name], weight) for name, weight in weights]

    def records(self, weights: Weights) -> list[dict[str, Any]]:
        """Returns everything about these adapters that decides a picture, as JSON."""
        facts = [(self.all[name].facts, name, weight) for name, weight in weights]
        return [
            {"name": name, "weight": weight, "sha256": one.sha256, "source": _shared(one.source), "applied": one.count}
            | ({"license": list(one.license)} if one.license else {})
            for one, name, weight in facts
        ]

    def duty(self, folder: ModelFolder) -> str:
        """Returns why loaded adapters require filters of a model, or ""."""
        return added_duty((adapter.facts for adapter in self.all.values()), folder.flux.sizes.architecture)


def _shared(source: str) -> str:
    """Returns the source of an adapter as pictures that are passed on name it: without a folder of this disk."""
    return Path(source).name if Path(source).is_absolute() else source


def known_names(names: Iterable[str]) -> str:
    """Returns names for a message."""
    return f"one of {', '.join(names)}" if names else "one that is loaded: none is"


def has_tags(text: str) -> bool:
    """True where a prompt holds <lora:NAME:WEIGHT>."""
    return bool(_TAG.search(text))


def take_tags(text: str) -> tuple[str, Weights]:
    """Takes <lora:NAME:WEIGHT> out of a prompt. Returns the prompt, and the names with their weights.

    Raises:
        UsageError: a name is missing, or a weight is no number.
    """
    tags = []
    for match in _TAG.finditer(text):
        name, weight = match[1].strip(), (match[2] or "1").strip()
        try:
            number = float(weight)
        except ValueError:
            number = float("nan")
        if not name or not abs(number) <= MAX_WEIGHT:
            raise UsageError(f"the prompt holds {match[0]}", "<lora:NAME:WEIGHT>, such as <lora:paper:0.8>")
        tags.append((name, number))
    if match := _OPEN_TAG.search(_TAG.sub("", text)):
        found = f"the prompt holds {match[0][:40]}, which is not closed"
        raise UsageError(found, "<lora:NAME:WEIGHT>, such as <lora:paper:0.8>")
    if not tags:
        return text, ()
    plain = re.sub(r"\s{2,}", " ", _TAG.sub(" ", text))
    return re.sub(r"\s*,(?:\s*,)*", ",", plain).strip(" ,"), tuple(tags)


def facts_line(facts: Facts) -> str:
    """Returns a sentence about what of an adapter is used."""
    line = f"{facts.name}: applied {facts.count}"
    if not facts.dropped:
        return line
    names = ", ".join(facts.dropped[:4]) + (", ..." if len(facts.dropped) > 4 else "")
    return f"{line}; this model does not have {names}"


class AdapterMethods:
    """diffusers' methods for adapters, of a pipeline."""

    _worker: Worker
    _loaded: LoadedAdapters

    def load_lora_weights(
        self,
        path_or_name: str | os.PathLike | None = None,
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        **others: Any,
    ) -> None:
        """Loads an adapter (LoRA, LoKr, LoHa, DoRA) of any trainer, and sets it to weight 1 beside those that are set.

        Args:
            path_or_name: a safetensors file, a folder that holds one, the name of an installed adapter, or OWNER/NAME
                of one that was fetched (`flux-krea models add OWNER/NAME`).
            adapter_name: for `set_adapters`; None: the name of the file.
            weight_name: of the file in the folder.
            others: further arguments of diffusers (`compat.ADAPTERS`), accepted with a log line or refused.

        Raises:
            ModelError: there is none, it is damaged, or it is for another model.
            UsageError: arguments that cannot be used; another adapter has that name.
        """
        if path_or_name is None:
            path_or_name = others.pop("pretrained_model_name_or_path_or_dict", None)
        if not isinstance(path_or_name, str | os.PathLike):
            found = f"`path_or_name` is {type(path_or_name).__name__}"
            raise UsageError(found, "a file, or the name of an installed adapter", "save a dict as safetensors first")
        if adapter_name is not None and (not isinstance(adapter_name, str) or not adapter_name):
            raise UsageError(f"`adapter_name` is {adapter_name!r}", "a text")
        if subfolder := others.pop("subfolder", None):
            weight_name = f"{subfolder}/{weight_name}" if weight_name else str(subfolder)
        compat.take_known(AdapterMethods.load_lora_weights, others, compat.ADAPTERS)
        self.load_adapter(path_or_name, adapter_name, weight_name=weight_name, active=True)

    def load_adapter(
        self,
        source: str | os.PathLike,
        name: str | None = None,
        *,
        weight_name: str | None = None,
        origin: Origin | None = None,
        active: bool = False,
    ) -> Facts:
        """Loads an adapter. Returns everything about it but its arrays, with the name under which it is loaded.

        Args:
            source: as in `load_lora_weights`.
            name: under which it is loaded; None: the one that it is installed as.
            weight_name: as there.
            origin: where the file comes from, if that is not its path.
            active: set it to weight 1; else only requests that name it use it.

        Raises:
            FluxKreaError: as there.
        """

        def load() -> Facts:
            adapter = obtain(source, self._loaded.sizes, name=name, weight_name=weight_name, origin=origin)
            chosen = self._loaded.add(adapter, name)
            if active:
                self._loaded.active[chosen] = 1.0
            facts = self._loaded.all[chosen].facts
            logger.log(logging.WARNING if facts.dropped else logging.INFO, facts_line(facts))
            return facts

        return self._worker.run(load)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Sets the adapters that calls use from now on, and no others.

        Args:
            adapter_names: one or more that are loaded.
            adapter_weights: a number for all, or one for each; None: 1.

        Raises:
            UsageError: a name that is not loaded, or weights that are no numbers.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        several = isinstance(adapter_weights, Sequence)
        given: list[Any] = list(adapter_weights) if several else [adapter_weights] * len(names)
        weights = [1.0 if weight is None else weight for weight in given]
        if len(weights) != len(names):
            raise UsageError(f"{len(weights)} weights for {len(names)} adapters", "one for each")
        for weight in weights:
            if isinstance(weight, Mapping):
                raise UsageError("`adapter_weights` holds weights by block", "one number for each adapter")
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) <= MAX_WEIGHT:
                found = f"`adapter_weights` holds {weight!r}"
                raise UsageError(found, f"numbers from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
        chosen = {name: float(weight) for name, weight in zip(names, weights, strict=True)}
        if len(chosen) < len(names):
            raise UsageError("`adapter_names` holds a name twice", "each once")
        self._loaded.uses(tuple(chosen.items()))
        self._loaded.active = chosen

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Returns the names of loaded adapters by the networks that they change."""
        names: dict[str, list[str]] = {}
        for name, adapter in self._loaded.all.items():
            for component in ("transformer", "text_encoder", "text_encoder_2"):
                if adapter.changes(component):
                    names.setdefault(component, []).append(name)
        return names

    def get_active_adapters(self) -> list[str]:
        """Returns the names of the adapters that calls use."""
        return [name for name, _ in self._loaded.current()]

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Unloads adapters by name.

        Raises:
            UsageError: one is not loaded.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._loaded.uses(tuple((name, 1.0) for name in names))
        for name in names:
            self._loaded.all.pop(name)
            self._loaded.active.pop(name, None)

    def unload_lora_weights(self, reset_to_overwritten_params: bool = False) -> None:
        """Unloads all adapters: the next picture is the model's own again."""
        self._loaded.all.clear()
        self._loaded.active.clear()

    def disable_lora(self) -> None:
        """Leaves adapters out of calls until `enable_lora`."""
        self._loaded.enabled = False

    def enable_lora(self) -> None:
        """Ends `disable_lora`."""
        self._loaded.enabled = True

    def fuse_lora(self, components: Any = None, lora_scale: float = 1.0, **others: Any) -> None:
        """Does nothing: adapters run beside the weights, which gives the same picture.

        Raises:
            UsageError: a scale that would change the picture.
        """
        if lora_scale != 1:
            raise compat.refuse("lora_scale", "set_adapters(names, weights) sets the weights")
        compat.tell("fuse_lora()", "adapters run beside the weights, and are never merged into them")

    unfuse_lora = compat.Accepted("adapters are never merged into the weights")

    def _with_scale(self, scale: float | None) -> Weights | None:
        """Returns the active adapters with their weights times diffusers' `scale`; None: as they are."""
        if scale is None:
            return None
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= MAX_WEIGHT:
            raise UsageError(f"`scale` is {scale!r}", "a number")
        active = self._loaded.current()
        if not active:
            compat.tell("joint_attention_kwargs", "`scale` is that of adapters, and none is set")
        return tuple((name, weight * scale) for name, weight in active)

    def _load_tags(self, texts: Iterable[str]) -> Weights:
        """Loads the adapters that prompts name as <lora:NAME:WEIGHT>.

        Raises:
            UsageError: one is neither loaded nor installed, or prompts of one call name different ones.
        """
        sets = {take_tags(text)[1] for text in texts}
        if len(sets) > 1:
            raise UsageError("the prompts name different adapters", "the same in one call", "make a call for each")
        tags = next(iter(sets), ())
        for name, _ in tags:
            if name in self._loaded.all:
                continue
            if name not in installed():
                names = ", ".join([*self._loaded.all, *installed()]) or "none"
                found = f"the prompt names the adapter {name!r}, which is not installed"
                raise UsageError(found, names, "install it: flux-krea models add FILE")
            self.load_adapter(name, name)
        return tags
