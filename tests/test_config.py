"""Sizes as they come from files: whatever stands there, they are usable or refused in one line."""

import dataclasses
import itertools
import json
import time

import pytest
from helpers import REFERENCE

from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.models import config as configs
from mlx_flux_krea.sampling.sampler import make_sigmas
from mlx_flux_krea.weights import COMPONENTS

TINY = json.loads((REFERENCE / "bfl" / "config.json").read_text())
GOOD = {
    configs.FluxConfig: {k: v for k, v in TINY["flux"].items() if k != "qkv_bias"},
    configs.T5Config: {k: v for k, v in TINY["t5"].items() if k != "feed_forward"},
    configs.CLIPConfig: {k: v for k, v in TINY["clip"].items() if k != "hidden_act"},
    configs.VAEConfig: {k: v for k, v in TINY["ae"].items() if k != "resolution"} | {"norm_num_groups": 8},
    configs.Schedule: configs.to_json(configs.Schedule()),
    configs.Defaults: {"width": 1024, "height": 1024, "num_inference_steps": 28, "guidance_scale": 4.5},
    configs.SourceFile: {"file": "a", "sha256": "b", "bytes": 1, "layout": "c"},
}
GOOD[configs.ModelIndex] = {
    "name": "a", "base": "b", "license": "c", "filters": "none", "max_sequence_length": 512, "format": 1,
    "schedule": GOOD[configs.Schedule], "defaults": GOOD[configs.Defaults], "source": [GOOD[configs.SourceFile]],
}  # fmt: skip
FIELDS = [(cls, name) for cls, good in GOOD.items() for name in good]
NEVER = [None, [[]], {}, {"a": 1}, [None], ["x"], [1.5], [float("nan")], [-1], [2**63], "", b"x"]
NEVER_NUMBERS = [-1, -0.5, 2**63, 10**400, 1e300, float("nan"), float("inf"), -float("inf"), "1", True, [1], []]
ODD = [0, 0.0, 1, 2, 3, 5, 7, 12, 1e-9, 0.001, 2**16, 2**24, 2**40, [], [0], [1], [2, 2, 2], [1] * 100, [3, 30, 31]]


def read(cls, **changes):
    return configs.from_json(cls, GOOD[cls] | changes, "folder/config.json")


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=lambda x: getattr(x, "__name__", x))
def test_a_wrong_value_of_any_field_is_refused_by_file_and_field(cls, name):
    good = GOOD[cls][name]
    number = isinstance(good, int | float) and not isinstance(good, bool)
    signed = name in ("shift_factor", "base_shift", "max_shift")
    bad = [v for v in NEVER if (name, v) != ("schedule", {}) and not (isinstance(good, str) and v == "")]
    bad += [v for v in NEVER_NUMBERS if not (signed and v in (-1, -0.5))] if number else []
    begin = time.perf_counter()
    for value in bad:
        with pytest.raises(ModelError) as refused:
            read(cls, **{name: value})
        message = str(refused.value)
        assert message.startswith("folder/config.json: "), message
        assert name in message
        assert len(message) < 400
        assert "\n" not in message
    assert time.perf_counter() - begin < 2


@pytest.mark.parametrize("component", COMPONENTS)
def test_sizes_that_are_accepted_can_be_built_in_no_time_and_no_memory(component):
    cls, network = COMPONENTS[component]
    built = 0
    for (name, good), value in itertools.product(GOOD[cls].items(), ODD):
        if isinstance(good, list) != isinstance(value, list):
            continue
        try:
            config = read(cls, **{name: value})
        except ModelError:
            continue
        begin = time.perf_counter()
        network(config)
        built += 1
        assert time.perf_counter() - begin < 5, (name, value)
    assert built > 10


def test_every_schedule_that_is_accepted_gives_falling_numbers():
    values = [-20, -1, 0, 0.5, 1.15, 20, 1, 256, 4096, 2**20]
    accepted = 0
    for changes in itertools.product(values, repeat=4):
        fields = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
        try:
            schedule = read(configs.Schedule, **dict(zip(fields, changes, strict=True)))
        except ModelError:
            continue
        accepted += 1
        for tokens in (1, 4096, 2**18):  # up to 8192 x 8192
            sigmas = make_sigmas(schedule, tokens, 4)
            assert (sigmas[:-1] >= sigmas[1:]).all(), schedule  # never NaN
    assert accepted > 20


@pytest.mark.parametrize(
    ("cls", "changes", "says"),
    [
        (configs.FluxConfig, {"num_heads": 3}, "hidden_size 64 is not divisible by num_heads 3"),
        (configs.FluxConfig, {"axes_dim": [8, 12]}, "three even numbers with the sum 32"),
        (configs.FluxConfig, {"mlp_ratio": 0}, "mlp_ratio is int 0; expected a number from 0.0625 to 64.0"),
        (configs.FluxConfig, {"depth": 513}, "depth is int 513; expected a number from 0 to 512"),
        (configs.T5Config, {"layer_norm_epsilon": 0}, "layer_norm_epsilon is int 0"),
        (configs.T5Config, {"relative_attention_max_distance": 8}, "is not above 8"),
        (configs.T5Config, {"relative_attention_num_buckets": 30}, "not divisible by 4"),
        (configs.CLIPConfig, {"num_attention_heads": 0}, "num_attention_heads is int 0"),
        (
            configs.VAEConfig,
            {"num_res_blocks": 2**24},
            "num_res_blocks is int 16777216; expected a number from 1 to 16",
        ),
        (configs.VAEConfig, {"ch_mult": [1] * 9}, "ch_mult has 9 levels and not 1 to 8"),
        (configs.VAEConfig, {"in_channels": 4}, "in_channels is int 4; expected 3"),
        (configs.VAEConfig, {"norm_num_groups": 3}, "not divisible by 3 groups"),
        (configs.Schedule, {"shift": "odd"}, 'shift is "odd"'),
        (configs.Schedule, {"max_image_seq_len": 256}, "is not above base_image_seq_len"),
        (configs.Schedule, {"max_image_seq_len": 257}, "too steep"),
        (configs.ModelIndex, {"filters": "some"}, 'filters is "some"'),
        (configs.ModelIndex, {"format": 2}, "reads format 1"),
        (configs.ModelIndex, {"defaults": {}}, "defaults lacks width, height"),
        (configs.ModelIndex, {"x" * 10**6: 1}, "unknown fields: xxx"),
    ],
)
def test_numbers_that_make_no_model_are_refused_with_the_reason(cls, changes, says):
    with pytest.raises(ModelError) as refused:
        read(cls, **changes)
    assert says in str(refused.value)
    assert len(str(refused.value)) < 500


def test_what_is_good_is_read_and_written_back_unchanged():
    for cls, good in GOOD.items():
        config = read(cls)
        assert configs.from_json(cls, json.loads(json.dumps(configs.to_json(config))), "here") == config
        for name, value in good.items():
            if not isinstance(value, dict | list):
                assert getattr(config, name) == value
    assert isinstance(read(configs.FluxConfig, mlp_ratio=4).mlp_ratio, float)
    for other in ([], "x", None, 3):
        with pytest.raises(ModelError, match="expected a JSON object"):
            configs.from_json(configs.Schedule, other, "here")


def test_components_that_do_not_fit_are_refused_with_both_numbers():
    published = configs.FLUX_DEV_MODEL
    published.check()
    configs.ModelSizes(
        flux=read(configs.FluxConfig),
        t5=read(configs.T5Config),
        clip=read(configs.CLIPConfig),
        vae=read(configs.VAEConfig),
    ).check()
    for name, change, says in (
        ("flux", {"in_channels": 128, "out_channels": 128}, "out_channels is 128; expected 64 "),
        ("flux", {"out_channels": 16}, "out_channels is 16; expected 64 "),
        ("t5", {"d_model": 2048}, "transformer and text_encoder_2 do not fit: context_in_dim is 4096; expected 2048"),
        ("clip", {"hidden_size": 1280}, "transformer and text_encoder do not fit: vec_in_dim is 768; expected 1280"),
        ("vae", {"z_channels": 4}, "out_channels is 64; expected 16"),
    ):
        sizes = dataclasses.replace(getattr(published, name), **change)
        with pytest.raises(ModelError, match=says):
            dataclasses.replace(published, **{name: sizes}).check()
