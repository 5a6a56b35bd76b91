"""flux-krea tool-schema: `generate` as a tool that a language model can call."""

import json

import click

from mlx_flux_krea import presets

from .shared.options import BY_NAME, USUAL, Seeds

NAMES = (
    "prompt", "negative_prompt", "true_cfg_scale", "aspect", "megapixels", "width", "height", "steps", "guidance",
    "seed", "num_images", "noise",
)  # fmt: skip


@click.command(name="tool-schema")
@click.option("-m", "--model", help="Whose defaults.  [default: FLUX.1 Krea [dev]'s]")
def tool_schema(model):
    """Print a JSON description of `generate` for language models.

    What a model answers with is a row for --prompts.

    \b
    Example:
      flux-krea tool-schema > tool.json
      flux-krea generate --prompts answer.jsonl
    """
    base, defaults = presets.KREA.base, presets.KREA.defaults
    if model:
        from mlx_flux_krea.home import find_model
        from mlx_flux_krea.weights import open_model

        index = open_model(find_model(model)).index
        base, defaults = index.base, index.defaults
    usual = USUAL | {
        "width": defaults.width,
        "height": defaults.height,
        "steps": defaults.num_inference_steps,
        "guidance": defaults.guidance_scale,
    }
    properties = {}
    for name in NAMES:
        text = BY_NAME[name].help.partition("  [default")[0].replace("--true-cfg-scale", "true_cfg_scale above 1")
        properties[name] = {**_type(BY_NAME[name].type), "description": text}
        if name in usual:
            properties[name]["default"] = usual[name]
    properties["seed"]["description"] = "Repeats a picture."
    properties["noise"]["enum"] = list(presets.RECIPES)
    schema = {
        "name": "generate_image",
        "description": f"Makes pictures from a description in words, with {base} on this machine. "
        "width and height exclude aspect and megapixels.",
        "parameters": {
            "type": "object",
            "properties": properties,
            "required": ["prompt"],
            "additionalProperties": False,
        },
    }
    click.echo(json.dumps(schema, indent=1, ensure_ascii=False))


def _type(type_: click.ParamType) -> dict:
    """A type of click's in JSON Schema."""
    if isinstance(type_, Seeds):
        return {"type": "integer", "minimum": 0, "maximum": 2**64 - 1}
    if isinstance(type_, click.Choice):
        return {"type": "string", "enum": list(type_.choices)}
    if isinstance(type_, click.IntRange | click.FloatRange):
        kind = "integer" if isinstance(type_, click.IntRange) else "number"
        return {"type": kind, "minimum": type_.min, "maximum": type_.max}
    return {"type": "string"}
