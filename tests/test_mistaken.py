"""Mistaken commands end in one line with what was found, what was expected and what to type: `mistaken.ROWS`."""

import re
import shlex

import numpy as np
import pytest
from mistaken import NOTES, ROWS
from PIL import Image

from mlx_flux_krea.cli import VERBS
from mlx_flux_krea.commands.shared import answers, options, peers, terminal
from mlx_flux_krea.errors import UsageError

FILES = {  # by name: its bytes
    "list.yaml": b"- a frog\n",
    "list.xlsx": b"PK\x03\x04",
    "latin.txt": "un caf\xe9".encode("latin-1"),
    "comments.txt": b"# a frog\n\n  # a toad\n",
    "broken.json": b'{"prompt": "a"}\n{"prompt": "b"}\n',
    "number.json": b"[7]",
    "names.csv": b"frog\n",
    "stesp.jsonl": b'{"prompt": "a", "stesp": 3}',
    "sampler.jsonl": b'{"prompt": "a", "sampler": "euler"}',
    "model.jsonl": b'{"prompt": "a", "model": "nano"}',
    "a.txt": b"a frog\n",
    "README.md": b"# A frog on a log, and what it does\n",
    "page.safetensors": b"<!DOCTYPE html><html></html>",
    "pointer.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "cfg.csv": b"prompt,cfg\na frog,4\n",
    "weights.safetensors": b"\x02\0\0\0\0\0\0\0{}",
}
NEVER = re.compile(
    r"Traceback|\[Errno|<class|mlx_flux_krea\.|\bNone\b|integer range|x<=|true_cfg_scale|--force|--yes|purge"
)


@pytest.fixture
def folder(tmp_path):
    """The folder that commands run in, with the files that they name."""
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "other.png")
    (tmp_path / "a folder").mkdir()
    return tmp_path


def test_there_are_many_and_every_verb_has_some():
    assert len({row[0] for row in ROWS}) == len(ROWS) >= 130
    assert {row[0].split()[0] for row in ROWS} >= VERBS.keys()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_mistaken_command_is_answered(command, folder, row):
    line, code, *words = row
    before = sorted(path.name for path in folder.iterdir())
    found, out, err = command(*shlex.split(line))
    assert (found, out) == (code, ""), err
    last = err.splitlines()[-1]
    assert last.startswith("flux-krea: ")
    for word in words:
        assert word in last
    typed = line.replace("'", "").replace('"', "") + " purge" * (line == "uninstall")  # the one that asks for it
    assert not [hit for hit in NEVER.findall(last) if hit not in typed and "purge" not in typed], last
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("row", NOTES, ids=lambda row: row[0])
def test_a_command_that_probably_means_something_else_gets_a_note(command, folder, row):
    line, *words = row
    code, out, err = command(*shlex.split(line))
    assert (code, out) == (0, "out.png\n"), err
    notes = [text for text in err.splitlines() if text.startswith("note: ")]
    for word in words:
        assert any(word in note for note in notes), err


def test_progress_is_a_line_every_few_seconds_where_nothing_can_be_redrawn(capsys, monkeypatch):
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: next(clock))
    progress = terminal.PipelineProgress(terminal.Console())
    for done in range(1, 11):
        progress("denoise", done, 10)
    assert capsys.readouterr().err.splitlines() == [
        "denoising: step 4 of 10, 12 s left",
        "denoising: step 7 of 10, 6 s left",
    ]
    progress = terminal.ByteProgress()
    for done in range(0, 11):
        progress("fetching", done * 10**9, 10**10)
    assert capsys.readouterr().err.splitlines()[0] == "fetching: 3.0 GB of 10.0 GB, 14 s left"


@pytest.mark.parametrize(
    ("word", "names", "near"),
    [
        ("--stesp", ["--seed", "--steps"], "--steps"),
        ("--forec", ["--force", "--from"], None),
        ("--forcee", ["--force", "--width"], None),
        ("prge", ["purge", "plan"], None),
        ("--meta", ["--metadata", "--memory"], "--metadata"),
        ("--me", ["--metadata", "--memory"], None),
        ("--negative_prompt", ["--negative-prompt"], "--negative-prompt"),
        ("--zzz", ["--seed"], None),
    ],
)
def test_the_nearest_name_is_proposed_and_none_that_deletes(word, names, near):
    assert answers.nearest(word, names) == near


def test_peers_name_no_option_of_ours_and_none_twice():
    ours = {name.replace("_", "-") for name in options.BY_NAME}
    for table in (peers.OPTIONS, peers.CONVERTING):
        names = [name for row in table for name in row[0].split()]
        assert sorted(names) == sorted(set(names))
        assert all(tools and text for _, tools, text in table)
    assert not {name for row in peers.OPTIONS for name in row[0].split()} & (ours - {"prompt"})
    for _, _, text in peers.OPTIONS:  # each answer names options that exist
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text):
            assert option in {o for one in options.OPTIONS for o in one.opts}, text


def test_numbers_of_the_systems_errors_are_not_shown():
    error = OSError(2, "No such file or directory", "a b")
    assert str(UsageError(f"it cannot be read: {error}")) == "it cannot be read: No such file or directory: 'a b'"
