"""Makes the files of this folder from the reference cases and the published vocabularies, which are not in the tree.

    python tests/data/make.py REFERENCE TOKENIZERS MANIFESTS

REFERENCE holds `pipeline`, `bfl`, `vit`, `llava`, `images`, `lora`, `goldens.json` and `goldens.safetensors`, and
`edit`, a set of the same form about editing and adapters. TOKENIZERS holds `clip` and `t5`, MANIFESTS the names, types
and shapes of published files and the rules between their layouts.

Weights and images are copied, but for those that tests/derived.py makes from others. Goldens are the keys that the
tests read. The tokenizers are our own: byte-pair merges made here, which give the reference's ids for the prompts of
the goldens, and single characters for any other text, so that whole runs can be compared without the published
vocabularies.
"""

import gzip
import hashlib
import json
import random
import re
import shutil
import sys
import zipfile
from pathlib import Path

import mlx.core as mx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mlx_flux_krea.tokenizers import CLIPTokenizer, _clean

HERE = Path(__file__).parent
ADAPTERS = ("lora",)  # goldens of adapters, which stand in a folder of their own
RUNS = ("lora_lokr", "lora_two", "lora_te")
NOT_EDITING = ("lora", "clora.forward.", "cache.")  # goldens in `edit` of adapters and of step caches
ASCII = [chr(c) for c in range(33, 127)]


def main(reference: Path, tokenizers: Path, manifests: Path) -> None:
    target = HERE / "reference"
    shutil.rmtree(target, ignore_errors=True)
    skip = shutil.ignore_patterns("tokenizer", "tokenizer_2")
    shutil.copytree(reference / "pipeline", target / "pipeline", ignore=skip)
    for name in ("vit", "llava"):
        shutil.copytree(reference / name, target / name)
    (target / "bfl").mkdir()
    shutil.copy(reference / "bfl" / "config.json", target / "bfl")
    digests = {p.stem: hashlib.sha256(p.read_bytes()).hexdigest() for p in reference.glob("bfl/*.safetensors")}
    (target / "bfl" / "sha256.json").write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n")
    shutil.copytree(reference / "images", target / "images", ignore=shutil.ignore_patterns("lora*"))
    arrays = mx.load(str(reference / "goldens.safetensors"))
    facts = json.loads((reference / "goldens.json").read_text())
    edit = json.loads((reference / "edit" / "goldens.json").read_text())
    mx.save_safetensors(str(target / "goldens.safetensors"), {k: v for k, v in arrays.items() if not _of_adapters(k)})
    make_editing(reference / "edit", edit, target / "edit")
    make_caches(reference / "edit", edit["cache"], target / "edit")
    for path in target.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    kept = {k: v for k, v in facts.items() if k not in ADAPTERS and k != "keys"}
    kept["runs"] = {k: v for k, v in kept["runs"].items() if not _of_adapters(k)}
    (target / "goldens.json").write_text(json.dumps(kept))
    prompts = sorted(
        {text["prompt"] for text in facts["text"]}
        | {p for run in kept["runs"].values() for p in _prompts(run)}
        | {p for run in edit["runs"].values() for p in _prompts(run)}
        | {*edit["prompts"], edit["negative_prompt"]}
    )
    make_clip(prompts, CLIPTokenizer(tokenizers / "clip"), HERE / "tokenizers" / "tokenizer")
    make_t5(
        prompts, Tokenizer.from_file(str(tokenizers / "t5" / "tokenizer.json")), HERE / "tokenizers" / "tokenizer_2"
    )
    make_layouts(manifests, HERE / "layouts.json.gz")
    make_adapters(reference, HERE / "adapters")


def make_layouts(manifests: Path, target: Path) -> None:
    """Manifests and rules. Tensors that differ in a number alone are one entry: name, type, shape, numbers."""
    layouts = {}
    for path in sorted(manifests.glob("*.json")):
        entries: dict[str, list[int]] = {}
        for name, (dtype, shape) in json.loads(path.read_text()).get("tensors", {}).items():
            number = re.search(r"(?<![^._])\d+(?![^._])", name)
            template = name if number is None else f"{name[: number.start()]}#{name[number.end() :]}"
            entries.setdefault(json.dumps([template, dtype, shape]), []).append(number and int(number[0]))
        if entries:
            layouts[path.stem] = [[*json.loads(entry), numbers] for entry, numbers in entries.items()]
    rules = json.loads(gzip.decompress((manifests / "mapping-tables.json.gz").read_bytes()))
    rules.pop("about")
    text = json.dumps({"layouts": layouts, "rules": rules}, separators=(",", ":"))
    target.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def make_adapters(reference: Path, target: Path) -> None:
    """The files in one archive, half as large; of runs, the last latents."""
    target.mkdir(exist_ok=True)
    with zipfile.ZipFile(target / "files.zip", "w") as archive:
        for path in sorted([*(reference / "lora").iterdir(), *(reference / "edit" / "lora").iterdir()]):
            archive.writestr(zipfile.ZipInfo(path.name), path.read_bytes(), zipfile.ZIP_LZMA)
    ours, theirs = (mx.load(str(folder / "goldens.safetensors")) for folder in (reference, reference / "edit"))
    arrays = {k: v for k, v in ours.items() if k.startswith("lora.")}
    arrays |= {k: v for k, v in theirs.items() if k.startswith(("lora.", "clora.forward.")) and ".diffusers_" not in k}
    arrays |= {f"{run}.latents": theirs[f"{run}.latents"][-1] for run in RUNS}
    mx.save_safetensors(str(target / "goldens.safetensors"), arrays)


def make_editing(reference: Path, facts: dict, target: Path) -> None:
    """Transformers in BFL's names, Redux, pictures, and goldens but for those of adapters and of step caches."""
    ignore = shutil.ignore_patterns("lora*")
    for name in ("bfl", "redux", "images"):
        shutil.copytree(reference / name, target / name, ignore=ignore)
    arrays = mx.load(str(reference / "goldens.safetensors"))
    mx.save_safetensors(
        str(target / "goldens.safetensors"), {k: v for k, v in arrays.items() if not k.startswith(NOT_EDITING)}
    )
    kept = {k: v for k, v in facts.items() if k not in ("keys", "lora", "cache")}
    kept["runs"] = {k: v for k, v in kept["runs"].items() if not k.startswith(NOT_EDITING)}
    (target / "goldens.json").write_text(json.dumps(kept))


def make_caches(reference: Path, facts: dict, target: Path) -> None:
    """Runs with a first-block cache on the tiny model. (Those on the small trained one are of its earlier weights.)"""
    runs = {k: v for k, v in facts["runs"].items() if k == "tiny.none" or k.startswith("tiny.fbc_")}
    arrays = mx.load(str(reference / "goldens.safetensors"))
    finals = {f"{run}.final": arrays[f"cache.{run}.final"] for run in runs}
    mx.save_safetensors(str(target / "caches.safetensors"), finals)
    kept = {name: facts[name] for name in ("steps", "seed")} | facts["models"]["tiny"]
    (target / "caches.json").write_text(json.dumps(kept | {"runs": runs}))


def _of_adapters(key: str) -> bool:
    return key.startswith(ADAPTERS)


def _prompts(run: dict) -> list[str]:
    return [*(run["prompts"] or ()), *(run.get(key) for key in ("prompt_2", "negative_prompt") if run.get(key))]


def make_clip(prompts: list[str], real: CLIPTokenizer, folder: Path) -> None:
    """vocab.json and merges.txt, in the published form."""
    tokens = {}
    for prompt in prompts:
        encoding = real._bpe.encode(_clean(prompt))
        tokens |= dict(zip(encoding.tokens, encoding.ids, strict=True))
    pieces = {token: tuple(token) for token in tokens}
    pieces |= {token: (*token[:-5], token[-5:]) for token in tokens if token.endswith("</w>")}
    alphabet = [char + end for char in ASCII for end in ("", "</w>")]
    special = {"<|startoftext|>": 49406, "<|endoftext|>": 49407}

    def wrong(vocab, merges) -> set[str]:
        write_clip(vocab, merges, folder)
        ours = CLIPTokenizer(folder)._bpe
        return different(prompts, lambda p: real._bpe.encode(_clean(p)), lambda p: ours.encode(_clean(p)))

    search(pieces, alphabet, tokens | special, wrong)


def write_clip(vocab: dict[str, int], merges: list[tuple[str, str]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(f"{a} {b}" for a, b in merges) + "\n")


def different(prompts: list[str], real, ours) -> set[str]:
    """The real tokens of every prompt whose ids differ at their place."""
    wrong = set()
    for prompt in prompts:
        theirs, mine = real(prompt), ours(prompt)
        if theirs.ids != mine.ids:
            wrong |= set(theirs.tokens) - set(mine.tokens)
    return wrong


def make_t5(prompts: list[str], full: Tokenizer, folder: Path) -> None:
    """tokenizer.json: byte-pair merges in place of T5's unigrams, with the same ids."""
    tokens = {}
    for prompt in prompts:
        encoding = full.encode(prompt, add_special_tokens=False)
        tokens |= dict(zip(encoding.tokens, encoding.ids, strict=True))
    special = {"<pad>": 0, "</s>": 1, "<unk>": 2}

    def wrong(vocab, merges) -> set[str]:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
        )
        tokenizer.decoder = decoders.Metaspace()
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        return different(prompts, lambda p: full.encode(p, add_special_tokens=False), tokenizer.encode)

    search({token: tuple(token) for token in tokens}, [*ASCII, "▁"], tokens | special, wrong)


def search(pieces: dict[str, tuple[str, ...]], alphabet: list[str], known: dict[str, int], encode) -> None:
    """Tries orders and directions of merging the letters of each word until all words give the known ids."""
    choose, words = random.Random(0), list(pieces)
    from_left = {word: not word.startswith("▁") for word in words}  # "▁" alone is a token too: it joins last
    for _ in range(5000):
        merges, symbols = {}, dict.fromkeys(alphabet)
        for word in words:
            parts = list(pieces[word])
            symbols |= dict.fromkeys(parts)
            while len(parts) > 1:
                at = slice(0, 2) if from_left[word] else slice(len(parts) - 2, len(parts))
                merges.setdefault(tuple(parts[at]))
                parts[at] = ["".join(parts[at])]
                symbols |= dict.fromkeys(parts)
        free = (i for i in range(3, 49406) if i not in set(known.values()))
        vocab = known | {symbol: next(free) for symbol in symbols if symbol not in known}
        wrong = encode(vocab, list(merges))
        if not wrong:
            return
        for word in wrong & set(words):  # those first, and the other way round now and then
            words.remove(word)
            words.insert(choose.randrange(len(words) // 4 + 1), word)
            from_left[word] = choose.random() < 0.5 and not word.startswith("▁")
    raise SystemExit(f"no order of merges was found; wrong to the end: {wrong}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
