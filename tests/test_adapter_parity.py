"""Adapters that PEFT makes now, on fresh random numbers, beside PEFT's own results."""

import adapters as files
import loras
import mlx.core as mx
import numpy as np
import pytest
from helpers import PIPELINE, assert_close, goldens

from mlx_flux_krea import nano
from mlx_flux_krea.adapters.formulas import Attached, Base
from mlx_flux_krea.sampling.sampler import position_ids
from mlx_flux_krea.weights import open_model

pytestmark = pytest.mark.parity

INPUTS = {
    "hidden_states": "hidden_states", "encoder_hidden_states": "encoder_hidden_states", "timestep": "timestep",
    "pooled_projections": "pooled", "guidance": "guidance", "img_ids": "img_ids", "txt_ids": "txt_ids",
}  # fmt: skip
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out", "proj_mlp", "proj_out", "ff.net.0.proj"]
LAYERS += ["ff.net.2", "norm.linear", "norm1.linear", "norm_out.linear", "x_embedder", "linear_1"]
CASES = {
    "LoRA": ("LoraConfig", {"r": 3, "lora_alpha": 2}),
    "ranks": ("LoraConfig", {"r": 3, "lora_alpha": 2, "rank_pattern": {"to_q": 5}, "alpha_pattern": {"to_q": 1}}),
    "rsLoRA": ("LoraConfig", {"r": 3, "lora_alpha": 2, "use_rslora": True}),
    "DoRA": ("LoraConfig", {"r": 3, "lora_alpha": 2, "use_dora": True}),
    "LoRA with bias": ("LoraConfig", {"r": 3, "lora_alpha": 2, "lora_bias": True}),
    "LoHa": ("LoHaConfig", {"r": 3, "alpha": 2}),
    "LoKr": ("LoKrConfig", {"r": 3, "alpha": 2, "decompose_factor": 8}),
    "LoKr, both": ("LoKrConfig", {"r": 2, "alpha": 2, "decompose_both": True, "decompose_factor": 4}),
    "LoKr, whole": ("LoKrConfig", {"r": 64, "alpha": 2}),
}  # fmt: skip


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("peft")
    pytest.importorskip("diffusers")
    return pytest.importorskip("torch")


@pytest.mark.parametrize("case", CASES)
def test_what_peft_makes_gives_what_peft_gives(torch, model, tmp_path, case):
    import peft
    from diffusers import FluxTransformer2DModel

    kind, settings = CASES[case]
    theirs = FluxTransformer2DModel.from_pretrained(PIPELINE / "transformer", torch_dtype=torch.float32)
    config = getattr(peft, kind)(target_modules=LAYERS, **settings)
    peft.inject_adapter_in_model(config, theirs, adapter_name="a")
    generator = torch.Generator().manual_seed(len(case))
    for name, parameter in theirs.named_parameters():
        if any(part in name for part in ("lora_", "lokr_", "hada_")):
            noise = torch.randn(parameter.shape, generator=generator)
            length = "magnitude" in name
            parameter.data = parameter.data * (1 + noise / 10) if length else noise / 5
    theirs.eval()
    given = {name: torch.tensor(np.array(goldens()[f"forward.0.{ours}"])) for name, ours in INPUTS.items()}
    with torch.no_grad():
        expected = theirs(**given, return_dict=False)[0].numpy()
    state = peft.get_peft_model_state_dict(theirs, adapter_name="a")
    arrays = {f"base_model.model.{name}": mx.array(tensor.numpy()) for name, tensor in state.items()}
    path = files.save(tmp_path / "adapter_model.safetensors", arrays)
    config.save_pretrained(tmp_path)

    folder = open_model(model)
    adapter = files.opened(path, folder.sizes)
    assert not adapter.facts.dropped
    flux = folder.flux.load(mx.float32)
    Attached(flux, "transformer", mx.float32).use([(adapter, 1.0)], Base(folder, mx.float32).lengths)
    names = ("hidden_states", "timestep", "guidance", "pooled", "encoder_hidden_states", "img_ids", "txt_ids")
    got = flux(*(goldens()[f"forward.0.{name}"] for name in names))
    assert_close(got, mx.array(expected), 3e-5, case)


@pytest.mark.parametrize("name", ["heart", "dusk"])
def test_the_network_that_trains_loras_is_ours(name):
    """diffusers' transformer with our weights and a trained LoRA, as `nano/train_lora.py` has them while it trains."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from mlx_flux_krea.nano import train_lora

    folder, path = open_model(nano.FOLDER), loras.FILES[name]
    theirs, arrays = train_lora.as_diffusers(folder), mx.load(str(path))
    layers = dict(theirs.named_modules())
    for module in sorted({key.removeprefix("transformer.").rpartition(".lora_")[0] for key in arrays}):
        lora = train_lora.LoRA(layers[module], 8)
        for factor in ("lora_A", "lora_B"):
            value = np.array(arrays[f"transformer.{module}.{factor}.weight"].astype(mx.float32))
            getattr(lora, factor).weight.data.copy_(torch.tensor(value))
    generator = torch.Generator().manual_seed(3)
    x, states, pooled = (torch.randn(2, *shape, generator=generator) for shape in ((36, 64), (40, 128), (128,)))
    sigma, guidance = torch.tensor([0.3, 0.8]), torch.tensor([4.5, 1.0])
    with torch.no_grad():
        expected = train_lora.velocity(theirs, train_lora.NATIVE, x, sigma, guidance, states, pooled).numpy()
    ours = folder.flux.load(mx.float32)
    Attached(ours, "transformer", mx.float32).use([(files.opened(path, folder.sizes), 1.0)], lambda *_: None)
    given = [mx.array(one.numpy()) for one in (x, sigma, guidance, pooled, states)]
    ids = position_ids(40, 12, 12)
    got = ours(*given, ids[40:], ids[:40])
    assert_close(got, mx.array(expected), 3e-5, name)
