"""flux-krea tool-schema: describes `generate` as a tool that a language model can call."""

from typing import Any

import click

from mlx_flux_krea import presets
from mlx_flux_krea.home import find_model
from mlx_flux_krea.weights import open_model

from .shared.options import BY_NAME, DEFAULTS, Seeds
from .shared.text import json_text

NAMES = (
    "prompt", "negative_prompt", "true_cfg_scale", "aspect", "megapixels", "upscale", "width", "height", "steps",
    "guidance", "seed", "num_images", "noise", "lora", "style", "style_rule", "fast", "solver", "schedule", "cache",
    "image", "reference", "mask", "strength", "expand", "crop_to_mask", "control_image", "control", "fit",
    "credentials", "watermark",
)  # fmt: skip
_MASKED, _CONTROL = {"mask", "expand", "crop_to_mask", "strength"}, {"control_image", "control"}
_NOT_OF = {
    "kontext": _MASKED | _CONTROL | {"upscale"},
    "fill": _CONTROL | {"reference", "upscale"},
    "control": {"reference", "upscale"},
}  # what a task does not read
_NEEDS = {  # options that say something about another
    "style_rule": "style", "control": "control_image", "crop_to_mask": "image and mask",
    "fit": "image or control_image", "strength": "image or upscale",
    **dict.fromkeys(("reference", "mask", "expand"), "image"),
}  # fmt: skip
# Names that language models know; other bases are remarks about a model's origin.
_BASES = {family.base for family in (presets.KREA, presets.DEV, presets.SCHNELL, *presets.EDITING)}


@click.command(name="tool-schema")
@click.option("-m", "--model", help="Model whose defaults are shown.  [default: FLUX.1 Krea [dev]]")
def tool_schema(model):
    """Print generate as a JSON tool for language models.

    The answer of a language model is a row of a --prompts file.

    \b
    Example:
      flux-krea tool-schema > tool.json
      flux-krea generate --prompts answer.jsonl
    """
    base, defaults, task, without = presets.KREA.base, presets.KREA.defaults, "", {"reference"}
    if model:
        index = open_model(find_model(model)).index
        task = "" if index.task == presets.TASKS[0] else f" The model's task is {index.task_and_kind}."
        without = _NOT_OF.get(index.task, without)
        base, defaults = index.base if index.base in _BASES else f"the model {index.name}", index.defaults
    values = DEFAULTS | {
        "width": defaults.width,
        "height": defaults.height,
        "megapixels": round(defaults.width * defaults.height / presets.MEGAPIXEL, 3),
        "steps": defaults.num_inference_steps,
        "guidance": defaults.guidance_scale,
    }
    properties = {}
    for name in NAMES:
        if name in without:
            continue
        text = (BY_NAME[name].help or "").partition("  [default")[0]
        text = text.replace("--true-cfg-scale", "true_cfg_scale above 1")
        text += f" Only with {_NEEDS[name]}." if name in _NEEDS else ""
        properties[name] = {**json_type(BY_NAME[name].type), "description": text}
        if BY_NAME[name].multiple:
            properties[name] = {"type": "array", "items": json_type(BY_NAME[name].type), "description": text}
        if name in values:
            properties[name]["default"] = values[name]
    properties["seed"]["description"] = "Seed: the same seed repeats a picture."
    properties["noise"]["enum"] = list(presets.RECIPES)
    schema = {
        "name": "generate_image",
        "description": f"Generates pictures from a description in words, with {base} on this machine. "
        f"width and height exclude aspect and megapixels; upscale excludes megapixels.{task}",
        "parameters": {
            "type": "object",
            "properties": properties,
            "required": ["prompt"],
            "additionalProperties": False,
        },
    }
    click.echo(json_text(schema, indent=1))


def json_type(kind: click.ParamType) -> dict[str, Any]:
    """Returns a type of click as JSON Schema."""
    if isinstance(kind, Seeds):
        return {"type": "integer", "minimum": 0, "maximum": 2**64 - 1}
    if isinstance(kind, click.types.BoolParamType):
        return {"type": "boolean"}
    if isinstance(kind, click.Choice):
        return {"type": "string", "enum": list(kind.choices)}
    if isinstance(kind, click.IntRange | click.FloatRange):
        name = "integer" if isinstance(kind, click.IntRange) else "number"
        return {"type": name, "minimum": kind.min, "maximum": kind.max}
    return {"type": "string"}
