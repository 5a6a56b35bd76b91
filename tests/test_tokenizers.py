"""Token ids against transformers' own, for every prompt of the goldens."""

import json
import random
import shutil

import pytest
from helpers import TOKENIZERS, facts

from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.tokenizers import CLIPTokenizer, T5Tokenizer


@pytest.fixture(scope="module")
def prompts(published):
    prompts = json.loads((published / "golden.json").read_text())["prompts"]
    assert len(prompts) == 71
    return prompts


def test_clip_ids_equal_transformers_for_every_prompt(published, prompts):
    tokenizer = CLIPTokenizer(published / "clip")
    assert [p["name"] for p in prompts if tokenizer(p["text"]).ids != p["clip"]] == []


@pytest.mark.parametrize("file", ["tokenizer.json", "spiece.model"])
def test_t5_ids_equal_transformers_for_every_prompt(published, prompts, file, tmp_path):
    shutil.copy(published / "t5" / file, tmp_path)
    tokenizer = T5Tokenizer(tmp_path)
    assert [p["name"] for p in prompts if tokenizer(p["text"], 512).ids != p["t5"]] == []


# what T5TokenizerFast of transformers 4.57 makes of special tokens that touch text; without the end token
SPECIAL = {
    "a cat</s>dog": [3, 9, 1712, 1, 10169],
    "a cat </s> dog": [3, 9, 1712, 1, 1782],
    "<pad>x": [0, 226],
    "<extra_id_0>x y": [32099, 226, 3, 63],
    "x<extra_id_99>": [3, 226, 32000],
    "a</s>,b": [3, 9, 1, 6, 115],
    "a</s>\u00a0b": [3, 9, 1, 3, 115],
    "a</s>\u200bb": [3, 9, 1, 3, 115],
    "</s>\n</s>": [1, 1],
    "a<unk>b": [3, 9, 2, 115],
    "<extra_id_100>": [3, 2, 25666, 834, 23, 26, 834, 2915, 3155],
}


@pytest.mark.parametrize("file", ["tokenizer.json", "spiece.model"])
def test_special_tokens_that_touch_text_are_read_as_transformers_reads_them(published, file, tmp_path):
    shutil.copy(published / "t5" / file, tmp_path)
    tokenizer = T5Tokenizer(tmp_path)
    for text, ids in SPECIAL.items():
        tokens = tokenizer(text, 32)
        assert tokens.ids[: tokens.count] == [*ids, 1], text


def test_both_forms_of_t5_agree_on_any_mixture(published, tmp_path):
    shutil.copy(published / "t5" / "spiece.model", tmp_path)
    fast, slow = T5Tokenizer(published / "t5"), T5Tokenizer(tmp_path)
    bits = ["a", "cat", " ", "  ", "\n", "</s>", "<pad>", "<unk>", "<extra_id_5>", "<extra_id_007>", "\u200b", "▁"]
    bits += [",", "é", "日本", "🐸", "{", "<", "s>", "dog.", "\u3000", "\ufeff", "ﬁ"]
    generator = random.Random(0)
    for _ in range(1000):
        text = "".join(generator.choices(bits, k=generator.randint(1, 8)))
        assert slow(text, 64) == fast(text, 64), text


def test_clip_reads_a_folder_that_holds_only_tokenizer_json(published, prompts, tmp_path):
    vocab = json.loads((published / "clip" / "vocab.json").read_text())
    lines = (published / "clip" / "merges.txt").read_text().split("\n")[1:]
    merges = [line.split(" ") for line in lines if line]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocab, "merges": merges}}))
    tokenizer = CLIPTokenizer(tmp_path)
    assert [p["name"] for p in prompts if tokenizer(p["text"]).ids != p["clip"]] == []


def test_the_tokenizers_of_the_tests_give_the_ids_of_the_goldens():
    clip, t5 = CLIPTokenizer(TOKENIZERS / "tokenizer"), T5Tokenizer(TOKENIZERS / "tokenizer_2")
    used = {text["prompt"] for text in facts()["text"]}
    checked = 0
    for row in facts()["tokens"]:
        if row["prompt"] in used:
            assert clip(row["prompt"]).ids[: len(row["clip_ids"])] == row["clip_ids"]
            assert t5(row["prompt"], 512).ids[: len(row["t5_ids"])] == row["t5_ids"]
            checked += 1
    assert checked >= 2


def test_what_is_cut_off_is_told():
    clip, t5 = CLIPTokenizer(TOKENIZERS / "tokenizer"), T5Tokenizer(TOKENIZERS / "tokenizer_2")
    long = "cat " * 75 + "holding a sign"
    tokens = clip(long)
    assert (len(tokens.ids), tokens.count, tokens.cut) == (77, 77, "holding a sign")
    assert tokens.ids[-1] == 49407
    tokens = t5("cat holding a sign that says hello world", 6)
    assert tokens.ids[-1] == 1
    assert (len(tokens.ids), tokens.count) == (6, 6)
    assert tokens.cut.endswith("hello world")


def test_nothing_is_cut_off_where_everything_fits():
    tokens = CLIPTokenizer(TOKENIZERS / "tokenizer")("cat " * 75)
    assert (tokens.count, tokens.cut) == (77, "")
    tokens = CLIPTokenizer(TOKENIZERS / "tokenizer")("a cat")
    assert (tokens.count, tokens.cut, tokens.ids[4:]) == (4, "", [49407] * 73)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "holds no CLIP tokenizer"),
        ({"vocab.json": "{}"}, "cannot be read"),
        ({"vocab.json": "{", "merges.txt": ""}, "cannot be read"),
        ({"vocab.json": "{}", "merges.txt": ""}, "is damaged"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b"}, "is damaged"),
        ({"tokenizer.json": '{"model": {}}'}, "cannot be read"),
        ({"vocab.json": "[" * 100_000, "merges.txt": ""}, "cannot be read"),
        ({"tokenizer.json": '{"model":' * 100_000}, "cannot be read"),
        ({"vocab.json": '{"\\ud800": 0}', "merges.txt": ""}, "is damaged"),
    ],
)
def test_a_damaged_clip_tokenizer_is_named(tmp_path, files, says):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=says):
        CLIPTokenizer(tmp_path)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "holds no T5 tokenizer"),
        ({"tokenizer.json": "{"}, "is damaged"),
        ({"tokenizer.json": "[" * 100_000}, "is damaged"),
        ({"spiece.model": "not a model"}, "is damaged"),
        ({"tokenizer.json": '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'}, "has no <pad>"),
    ],
)
def test_a_damaged_t5_tokenizer_is_named(tmp_path, files, says):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=says):
        T5Tokenizer(tmp_path)
