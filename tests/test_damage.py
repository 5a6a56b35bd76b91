"""Damaged, hostile or merely foreign files in the converter: one line that names the file and the trouble."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import derived
import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import DATA, PIPELINE, TOKENIZERS, edit_json, edit_tensors
from mlx_flux_krea.convert import convert, fit, index
from mlx_flux_krea.convert.identify import identify
from mlx_flux_krea.convert.sources import open_sources
from mlx_flux_krea.convert.tasks import TEXT_TO_IMAGE

from mlx_flux_krea import cli
from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.licence import Evidence
from mlx_flux_krea.models import config as configs
from mlx_flux_krea.weights import open_model

NESTED: list = []
for _ in range(500):
    NESTED = [NESTED]
BAD = (
    0, -1, 1, "", "8", "\x1b[31m", None, [], [0], {}, 2.5, float("nan"), float("inf"), 10**400, 2**24, 2**63, True,
    [1, 2, 3], [None], [16] * 100, NESTED,
)  # fmt: skip
MISFIT = ("has shape", "has the unknown tensor", "lacks")  # sizes that are possible, and not those of the tensors
CONFIGS = [
    PIPELINE / "transformer" / "config.json",
    PIPELINE / "text_encoder" / "config.json",
    PIPELINE / "text_encoder_2" / "config.json",
    PIPELINE / "vae" / "config.json",
]


@pytest.fixture
def source(tmp_path):
    return Path(shutil.copytree(PIPELINE, tmp_path / "source"))


@pytest.fixture
def singles(tmp_path):
    return Path(shutil.copytree(derived.single_files(), tmp_path / "files"))


def run(*sources, **options):
    return convert(sources, dtype="float32", tokenizers=TOKENIZERS, **options)


def refused_in_one_line(call, *said: str) -> bool:
    """Returns True if it was refused; any error but a ModelError of one line that says so is a failure."""
    try:
        call()
        return False
    except ModelError as error:
        text = str(error)
    assert text.isprintable()
    assert len(text) < 1000
    assert any(word in text for word in said), (said, text)
    return True


def rename_in_header(file: Path, old: bytes, new: bytes) -> None:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].replace(old, new)
    file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


# --- JSON that belongs to somebody else ---


@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.parent.name)
def test_any_value_in_any_field_is_taken_or_refused_by_name(config, tmp_path):
    folder = Path(shutil.copytree(config.parent, tmp_path / config.parent.name))
    good, refused = json.loads(config.read_text()), 0
    for number, field in enumerate(good):
        for value in BAD[number % 2 :: 2]:
            (folder / "config.json").write_text(json.dumps(good | {field: value}))
            refused += refused_in_one_line(
                lambda: fit.make_plan(*identify(open_sources([folder])[0])),
                "config.json",
                *MISFIT,
            )
    assert refused > 2.5 * len(BAD)


@pytest.mark.slow
def test_any_value_in_a_config_beside_a_single_file_is_taken_or_refused_by_name(singles):
    good, refused = json.loads((singles / "config.json").read_text()), 0
    found = [one for source in open_sources([singles]) for one in identify(source)]
    for each in found:
        section = fit._BFL_SECTIONS[each.layout.component]
        for field in good[section]:
            for value in BAD[::2]:
                (singles / "config.json").write_text(json.dumps(good | {section: good[section] | {field: value}}))
                refused += refused_in_one_line(lambda: fit.make_plan(each), "config.json", *MISFIT)  # noqa: B023
    assert refused > 10 * len(BAD)


@pytest.mark.parametrize("field", ["in_channels", "num_attention_heads", "axes_dims_rope", "guidance_embeds"])
def test_a_field_is_called_as_in_its_file(source, tmp_path, field):
    edit_json(source / "transformer" / "config.json", **{field: "8"})
    with pytest.raises(ModelError, match=rf"source/transformer/config\.json: {field} is '8'; expected"):
        run(source, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shift_terminal", 0.02),
        ("time_shift_type", "linear"),
        ("use_karras_sigmas", True),
        ("use_exponential_sigmas", True),
        ("use_beta_sigmas", True),
        ("stochastic_sampling", True),
        ("invert_sigmas", True),
        ("num_train_timesteps", 500),
        ("use_dynamic_shifting", "yes"),
        ("_class_name", "EulerDiscreteScheduler"),
        ("base_shift", "0.5"),
    ],
)
def test_a_scheduler_that_would_draw_another_picture_is_refused(source, tmp_path, field, value):
    edit_json(source / "scheduler" / "scheduler_config.json", **{field: value})
    with pytest.raises(ModelError, match=rf"scheduler_config\.json: {field} is .*{value}"):
        run(source, out=tmp_path / "out")


def test_any_value_in_the_scheduler_is_taken_or_refused_by_name(source):
    known = Evidence(configs.FLUX_DEV.architecture)
    path = source / "scheduler" / "scheduler_config.json"
    good = json.loads(path.read_text())
    found = {s.component: identify(s)[0] for s in open_sources([source])}
    refused = 0
    for field in good:
        for value in BAD:
            path.write_text(json.dumps(good | {field: value}))
            refused += refused_in_one_line(
                lambda: index.make_index(found, configs.FLUX_DEV, known, TEXT_TO_IMAGE), "scheduler_config.json"
            )
    assert refused > 10 * len(BAD)


@pytest.mark.parametrize(
    "changes",
    [
        {"dense_act_fn": "gelu_pytorch_tanh"},
        {"feed_forward_proj": "gated-gelu_pytorch_tanh"},
        {"feed_forward_proj": "gated-gelu_new"},
    ],
)
def test_the_tanh_form_of_gelu_goes_by_several_names(source, tmp_path, changes):
    edit_json(source / "text_encoder_2" / "config.json", **changes)
    assert run(source, out=tmp_path / "out").path.exists()


@pytest.mark.parametrize("changes", [{"dense_act_fn": "relu"}, {"feed_forward_proj": "gated-silu"}])
def test_another_activation_of_t5_is_refused(source, tmp_path, changes):
    edit_json(source / "text_encoder_2" / "config.json", **changes)
    with pytest.raises(ModelError, match=f"{next(iter(changes))} is "):
        run(source, out=tmp_path / "out")


# --- names and types ---


@pytest.mark.parametrize("stored", ["U32", "U8", "I64"])
def test_a_type_that_cannot_be_decoded_is_refused_while_planning(singles, tmp_path, monkeypatch, stored):
    """The last tensor of the last component: nothing may be written before it is found."""
    file = singles / "ae.safetensors"
    arrays = mx.load(str(file))
    name = "decoder.norm_out.weight"
    size = {"U32": 4, "U8": 1, "I64": 8}[stored]
    header, body, offset = {}, [], 0
    for n, array in arrays.items():
        data = bytes(size * array.size) if n == name else np.array(array.astype(mx.float32)).tobytes()
        dtype = stored if n == name else "F32"
        header[n] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
        body.append(data)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(body))
    progress = []
    with pytest.raises(ModelError, match=rf"{name} is stored as {stored}; expected one of F32, F16, BF16"):
        run(singles, out=tmp_path / "out", progress=lambda *step: progress.append(step))
    assert progress == []


def test_a_type_that_cannot_be_decoded_is_no_problem_where_it_is_left_out(source, tmp_path):
    """Old CLIP files hold their positions, as I64."""
    edit_tensors(
        source / "text_encoder" / "model.safetensors",
        lambda a: a.update({"text_model.embeddings.position_ids": mx.arange(77, dtype=mx.int64)}),
    )
    dropped = [c.dropped for c in run(source, out=tmp_path / "out").components if c.name == "text_encoder"]
    assert dropped == [(("text_model.embeddings.position_ids", "positions are counted, not stored"),)]


def test_parts_of_several_types_make_one_tensor(source, tmp_path):
    """q, k and v of one layer in three types, as nobody forbids."""
    for shard in sorted((source / "transformer").glob("*.safetensors")):

        def mix(arrays):
            for name in arrays:
                kind = next(
                    (t for part, t in (("to_q", mx.bfloat16), ("to_k", mx.float16)) if part in name), mx.float32
                )
                arrays[name] = arrays[name].astype(kind)

        edit_tensors(shard, mix)
    path = run(source, out=tmp_path / "out").path
    parts = {}
    for shard in sorted((source / "transformer").glob("*.safetensors")):
        parts |= mx.load(str(shard))
    ours = {}
    for shard in sorted((path / "transformer").glob("*.safetensors")):
        ours |= mx.load(str(shard))
    for stream, names in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))):
        wanted = [parts[f"transformer_blocks.1.attn.{n}.weight"].astype(mx.float32) for n in names]
        assert mx.array_equal(ours[f"double_blocks.1.{stream}_attn.qkv.weight"], mx.concatenate(wanted))


@pytest.mark.parametrize("name", [b"\\u001b[31m", b"\\n", b"\\u202e"])
def test_names_that_would_steer_a_terminal_are_refused_escaped(singles, tmp_path, name):
    rename_in_header(singles / "ae.safetensors", b"decoder.conv_in.bias", b"decoder." + name + b".position_ids")
    with pytest.raises(ModelError, match=r"ae\.safetensors holds the name decoder\.\\") as caught:
        run(singles, out=tmp_path / "out")
    assert str(caught.value).isprintable()


def test_names_in_an_index_are_held_to_the_same(source, tmp_path):
    path = next((source / "transformer").glob("*.index.json"))
    weights = json.loads(path.read_text())["weight_map"]
    for odd in ({"x\x1b[2J": "diffusion_pytorch_model-00001-of-00002.safetensors"}, {"x": "\x07.safetensors"}):
        edit_json(path, weight_map=weights | odd)
        with pytest.raises(ModelError, match=r"holds the name .*\\x") as caught:
            run(source, out=tmp_path / "out")
        assert str(caught.value).isprintable()


def test_a_source_whose_name_is_not_utf8_is_refused_early(singles, tmp_path):
    odd = tmp_path / "caf\udce9"
    try:
        singles.rename(odd)
    except OSError:
        pytest.skip("this file system takes no such name")
    with pytest.raises(ModelError, match=r"caf\\udce9 is not UTF-8; expected one that is; rename it"):
        run(odd, out=tmp_path / "out")
    odd.rename(singles)
    (singles / "ae.safetensors").rename(singles / "a\udce9.safetensors")
    with pytest.raises(ModelError, match=r"a\\udce9\.safetensors is not UTF-8"):
        run(singles, out=tmp_path / "out")


# --- what is something else ---


@pytest.mark.parametrize("part", ["transformer", "vae/model-00001-of-00001.safetensors"])
def test_a_part_of_a_model_folder_of_ours_can_be_inspected(model, part):
    shown = CliRunner().invoke(cli.cli, ["inspect", str(model / part)], catch_exceptions=False)
    assert (shown.exit_code, "Black Forest Labs" in shown.output) == (0, True)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_model_folder_whose_index_is_damaged_is_not_taken_for_another(model, tmp_path, text):
    folder = Path(shutil.copytree(model, tmp_path / "copy"))
    (folder / "model_index.json").write_text(text)
    with pytest.raises(ModelError, match=r"copy/model_index\.json (cannot be read|holds a list)"):
        CliRunner().invoke(cli.cli, ["inspect", str(folder)], catch_exceptions=False)


def test_a_part_of_a_model_folder_of_ours_is_no_source(model, tmp_path):
    for paths in ([model / "transformer"], [next((model / "vae").glob("*.safetensors"))], [model, PIPELINE / "vae"]):
        with pytest.raises(ModelError, match=rf"is a model folder of ours; expected .*; name it alone: {model}$"):
            run(*paths, out=tmp_path / "out")


def test_a_gguf_that_is_none_is_named(tmp_path):
    file = tmp_path / "flux1-krea-dev-Q4_K_S.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    for path in (file, tmp_path):
        with pytest.raises(ModelError, match=r"Q4_K_S\.gguf cannot be read: it is of version 0.*complete GGUF file"):
            run(path, out=tmp_path / "out")
    file.unlink()
    with pytest.raises(ModelError, match=r"holds no weights; expected \.safetensors or \.gguf files$"):
        run(tmp_path, out=tmp_path / "out")


def test_components_that_do_not_fit_are_refused_before_anything_is_written(source, tmp_path):
    """More input channels than latents and a mask have."""
    for shard in sorted((source / "transformer").glob("*.safetensors")):
        edit_tensors(
            shard,
            lambda a: a.update({n: mx.zeros((64, 400)) for n in a if n == "x_embedder.weight"}),
        )
    edit_json(source / "transformer" / "config.json", in_channels=400, out_channels=64)
    progress = []
    with pytest.raises(ModelError, match=r"in_channels 400 with out_channels 64 is none of 64 .*, 384 .*, 128 "):
        run(source, out=tmp_path / "out", progress=lambda *step: progress.append(step))
    assert progress == []
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_scale_without_its_weight_is_refused_by_name(singles, tmp_path):
    name = "double_blocks.0.img_mlp.1.scale_weight"
    edit_tensors(singles / "flux1-tiny.safetensors", lambda a: a.update({name: mx.zeros((1,))}))
    with pytest.raises(ModelError, match=r"has the unknown tensor double_blocks\.0\.img_mlp\.1\.scale_weight"):
        run(singles, out=tmp_path / "out")


# --- prefixes and tokenizers ---


def test_the_prefix_of_t5_in_all_in_one_files_is_taken_off(singles, tmp_path):
    prefix = "text_encoders.t5xxl.transformer."
    edit_tensors(singles / "t5xxl.safetensors", lambda a: [a.update({prefix + n: a.pop(n)}) for n in list(a)])
    assert open_model(run(singles, out=tmp_path / "out").path)


def test_clips_tokenizer_may_be_a_tokenizer_json_in_a_folder_of_its_own(source, tmp_path):
    own = DATA / "tokenizers" / "tokenizer"
    vocab = json.loads((own / "vocab.json").read_text())
    merges = [line for line in (own / "merges.txt").read_text().split("\n") if line and not line.startswith("#")]
    (tmp_path / "some" / "clip").mkdir(parents=True)
    (tmp_path / "some" / "clip" / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": vocab, "merges": merges}})
    )
    shutil.copytree(DATA / "tokenizers" / "tokenizer_2", tmp_path / "some" / "t5")
    path = convert([source], tmp_path / "out", tokenizers=tmp_path / "some").path
    assert [p.name for p in (path / "tokenizer").iterdir()] == ["tokenizer.json"]


def test_a_tokenizer_json_that_could_be_either_is_not_guessed(source, tmp_path):
    (tmp_path / "some").mkdir()
    shutil.copy(DATA / "tokenizers" / "tokenizer_2" / "tokenizer.json", tmp_path / "some")
    with pytest.raises(ModelError, match="no tokenizer was found"):
        convert([source], tmp_path / "out", tokenizers=tmp_path / "some")


def test_a_damaged_tokenizer_is_not_passed_over(source, tmp_path):
    shutil.copytree(DATA / "tokenizers", tmp_path / "some")
    (tmp_path / "some" / "tokenizer" / "vocab.json").write_text("{")
    with pytest.raises(ModelError, match="some/tokenizer cannot be read"):
        convert([source], tmp_path / "out", tokenizers=tmp_path / "some")


def test_a_file_of_a_tokenizer_that_cannot_be_read_is_not_the_targets_fault(source, tmp_path):
    shutil.copytree(DATA / "tokenizers", tmp_path / "some")
    (tmp_path / "some" / "tokenizer" / "special_tokens_map.json").mkdir()
    with pytest.raises(ModelError, match=r"special_tokens_map\.json cannot be read: Is a directory"):
        convert([source], tmp_path / "out", tokenizers=tmp_path / "some")


def test_a_disk_that_refuses_a_file_is_named_as_what_cannot_be_written(tmp_path):
    argv = ["convert", str(PIPELINE), "--tokenizers", str(TOKENIZERS), "-o", str(tmp_path / "out")]
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))"
    program = f"from mlx_flux_krea import cli; {limit}; cli.main({argv!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "out cannot be written: File too large" in done.stderr
    assert not any(tmp_path.iterdir())
