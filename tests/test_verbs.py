"""The verbs besides generate, as somebody meets them on the first day: with nothing installed but the small model."""

import json
import re

import pytest
from helpers import ROOT

from mlx_flux_krea import provenance
from mlx_flux_krea.commands.shared.text import flattened, json_text
from mlx_flux_krea.commands.shell import HELP, SHORT, WORDS
from mlx_flux_krea.commands.shell import shell as shell_command
from mlx_flux_krea.home import NANO

# --- the small model is enough ---


def test_with_only_the_small_model_nothing_is_wrong(command, home):
    code, out, err = command("doctor")
    assert code == 0, err
    assert "WRONG" not in out
    assert re.search(r"^model nano .*complete by size$", out, re.M)
    assert re.search(r"^models +none but the built-in one; install one: flux-krea setup$", out, re.M)
    code, out, err = command("models")
    assert code == 0
    assert re.search(r"^nano +built in ", out, re.M)
    assert "flux-krea setup" in err
    (one,) = json.loads(command("models", "--json")[1])
    assert (one["name"], one["kind"], one["default"]) == ("nano", "built in", False)
    assert not home.exists()


def test_the_small_model_can_be_the_default_and_not_be_removed(command, home):
    assert command("models", "default", "nano")[0] == 0
    assert re.search(r"^nano .* default$", command("models")[1], re.M)
    code, _, err = command("generate", "a red circle on a blue background", "--steps", "1", "--width", "32")
    assert code == 0, err
    code, _, err = command("models", "rm", "nano", "--yes")
    assert (code, NANO.is_dir()) == (3, True)
    assert "nano is built in, and cannot be removed" in err


def test_a_model_of_that_name_comes_first(command, home, model):
    (home / "models").mkdir(parents=True)
    (home / "models" / "nano").symlink_to(model)
    (one,) = json.loads(command("models", "--json")[1])
    assert (one["name"], one["kind"]) == ("nano", "model")


@pytest.mark.parametrize(("name", "says"), [("nan", "did you mean nano?"), ("krea", "expected nano"), ("", "expected")])
def test_a_model_that_is_not_there_is_answered_with_those_that_are(command, home, name, says):
    code, _, err = command("models", "default", name)
    assert code == 3
    assert says in err


# --- what is printed ---


@pytest.mark.parametrize("words", [["log"], ["completion"], ["completion", "tcsh"], ["plan", "--dtype", "int8"]])
def test_no_message_has_the_marks_of_line_ends_in_it(command, words):
    code, out, err = command(*words)
    assert (code, out) == (2, "")
    assert "\\n" not in err
    assert "\\t" not in err
    assert "Commands:" in err if words == ["log"] else err.count("\n") == 1


def test_the_schema_names_a_model_of_no_known_family_by_its_name(command, model):
    for name, says in (("nano", "with the model nano on"), (model, "with the model ")):
        assert says in json.loads(command("tool-schema", "-m", name)[1])["description"]
    assert "with FLUX.1 Krea [dev] on" in json.loads(command("tool-schema")[1])["description"]


def test_an_option_of_the_config_is_shown_as_its_value(command, home):
    code, out, err = command("config", "steps")
    assert (code, out) == (0, "")
    assert "steps is not set" in err
    command("config", "steps", "20")
    command("config", "negative-prompt", "a\u202eb")
    for name, value in (("steps", "20\n"), ("negative_prompt", "a\\u202eb\n")):
        assert command("config", name)[:2] == (0, value)
    assert json.loads(command("config", "steps", "--json")[1]) == {"steps": "20"}
    code, _, err = command("config", "stesp")
    assert code == 2
    assert "did you mean steps?" in err
    assert command("config", "--unset")[0] == command("config", "seed", "--unset")[0] == 2


def test_a_record_is_a_table_of_words(command, tmp_path):
    command("generate", "a red circle", "-m", "nano", "--steps", "1", "--width", "32", "--height", "32", "-o", "a.png")
    code, out, _ = command("inspect", "a.png")
    assert code == 0
    assert not re.search(r"[{}]|\[|\bNone\b|\bTrue\b", out)
    assert re.search(r"^schedule\.shift +dynamic$", out, re.M)
    record = json.loads(command("inspect", "a.png", "--json")[1])["record"]
    assert record["schedule"]["shift"] == "dynamic"
    assert record == provenance.read_record(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("facts", "rows"),
    [
        ({"a": None, "b": [], "c": {}}, [("a", "none"), ("b", "none"), ("c", "none")]),
        ({"a": {"b": {"c": 1.5}}, "d": True}, [("a.b.c", "1.5"), ("d", "yes")]),
        ({"a": [1, 2], "b": [{"c": "x"}, {"c": False}]}, [("a", "1, 2"), ("b.1.c", "x"), ("b.2.c", "no")]),
        ({"a": [[1, 2], [3]]}, [("a.1", "1, 2"), ("a.2", "3")]),
        ({"a": 0, "b": ""}, [("a", "0"), ("b", "")]),
    ],
)
def test_facts_become_rows(facts, rows):
    assert flattened(facts) == rows


@pytest.mark.parametrize(
    "text", ['é 猫 🙂 \\ "', "\x1b[31m", "\x9b31m", "\x7f", "\u202e\u2066", "\u2028", "\udce9", "\U000e0001"]
)
def test_json_holds_the_same_and_nothing_that_a_terminal_obeys(text):
    written = json_text({text: [text]})
    assert written.isprintable()
    assert json.loads(written) == {text: [text]}
    assert text in json_text(text) or not text.isprintable() or "\\" in text


def test_json_of_commands_goes_through_the_function_that_escapes():
    for path in (ROOT / "mlx_flux_krea" / "commands").rglob("*.py"):
        if path.name not in ("text.py", "settings.py"):
            assert "json.dumps" not in path.read_text(), path


# --- the shell ---


def in_shell(command, monkeypatch, *lines, width=80):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("sys.stdin", iter([f"{line}\n" for line in lines]))
    monkeypatch.setattr("mlx_flux_krea.commands.shell._is_typed", lambda: False)
    return command("shell", "-m", "nano", "--width", "32", "--height", "32", "--steps", "1")


@pytest.mark.parametrize("word", ["exit", "quit", "EXIT", "/exit", "/quit", "/q", "q", ":q", "bye"])
def test_words_that_end_a_shell_elsewhere_end_this_one(command, monkeypatch, tmp_path, word):
    assert in_shell(command, monkeypatch, word, "a star")[:2] == (0, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("word", ["help", "/help", "?", "Help"])
@pytest.mark.parametrize("width", [40, 80])
def test_help_breaks_no_word(command, monkeypatch, word, width):
    _, out, err = in_shell(command, monkeypatch, word, width=width)
    assert out == ""
    words = set(err.split())
    assert {"nsfw-threshold", "true-cfg-scale", "negative-prompt", "exit"} <= words
    assert max(map(len, err.splitlines())) <= width


@pytest.mark.parametrize("word", ["clear", "/clear", "cls"])
def test_clear_is_no_prompt(command, monkeypatch, word):
    assert in_shell(command, monkeypatch, word)[:2] == (0, "")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/hlep", "did you mean /help?"), ("/exti", "did you mean /exit?"), ("/claer", "did you mean /clear?"),
        ("/stpes", "did you mean /steps?"), ("/stpes 3", "did you mean steps?"), ("/zzz", "/zzz has no value"),
        ("/n x", "num-images is 'x'"), ("/num-image 3", "did you mean num-images?"),
    ],
)  # fmt: skip
def test_near_commands_are_suggested(command, monkeypatch, line, says):
    assert says in in_shell(command, monkeypatch, line)[2]


@pytest.mark.slow
def test_n_is_the_number_of_pictures_as_for_generate(command, monkeypatch):
    options = {option.name: option.opts for option in shell_command.params}
    for letter, name in SHORT.items():
        assert f"/{letter}" in HELP or f"-{letter}" in options[name]
    lines = ["a red circle", "/n 2", "", "/n", "", "/s 5", "/n 3", "a red circle"]
    code, out, err = in_shell(command, monkeypatch, *lines)
    assert code == 0, err
    seeds = [provenance.read_record(path)["seed"] for path in out.split()]
    first = seeds[0]
    assert seeds == [first, first, first + 1, first, 5, 6, 7]


def test_the_words_are_in_the_help():
    assert {"exit", "help", "clear"} <= set(re.findall(r"\w+", HELP))
    assert set(WORDS.values()) == {"quit", "help", "clear"}


# --- completion ---


def test_the_line_for_zsh_works_before_compinit_has_run(command):
    """A new Mac has no .zshrc, and no `compdef`."""
    _, out, _ = command("completion", "zsh")
    assert out.lstrip().startswith("#compdef flux-krea")
    lines = [line.strip() for line in out.splitlines()]
    at = lines.index("compdef _flux_krea_completion flux-krea")
    assert lines[at - 1] == "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -i; }"
