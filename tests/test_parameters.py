"""What a study can be asked: the right value out of whatever papermill hands over, or an error that says what to write."""

from __future__ import annotations

import ast
import dataclasses
import json
import typing
from dataclasses import dataclass
from pathlib import Path

import papermill.parameterize
import pytest
from IPython.core.interactiveshell import InteractiveShell
from papermill.cli import _resolve_type as as_papermill_reads_it
from traitlets.config import Config

from tinylm.config import _Config
from tinylm.errors import ConfigError
from tinylm.study.notebooks import PARAMETERS
from tinylm.study.parameters import QuickstartParameters, RecipeParameters, given, repository, validate


@dataclass(frozen=True)
class Every(_Config):
    """A field of every type that a study may have."""

    flag: bool = False
    count: int = 1
    rate: float = 0.5
    limit: int | None = None
    share: float | None = 0.1
    name: str = ""
    rates: tuple[float, ...] = (1.0, 2.0)

    def __post_init__(self) -> None:
        self._check_types()


def ask(**values: object) -> Every:
    return validate(values, Every)


# ------------------------------------------------------------------------------------------- strings become what is meant


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("flag", "true", True),
        ("flag", "True", True),
        ("flag", " yes ", True),
        ("flag", "1", True),
        ("flag", "false", False),
        ("flag", "off", False),
        ("count", "3", 3),
        ("count", "1e3", 1000),
        ("count", "-2", -2),
        ("rate", "1e-3", 0.001),
        ("rate", "2", 2.0),
        ("limit", "none", None),
        ("limit", "null", None),
        ("limit", "", None),
        ("limit", "7", 7),
        ("share", "None", None),
        ("share", ".25", 0.25),
        ("name", "true", "true"),
        ("name", "1e-3", "1e-3"),
        ("rates", "3", (3.0,)),
        ("rates", "10, 60", (10.0, 60.0)),
        ("rates", "[1e-3, 2]", (0.001, 2.0)),
        ("rates", " [10,60] ", (10.0, 60.0)),
    ],
)
def test_a_string_becomes_what_the_field_asks_for(name, text, value):
    found = getattr(ask(**{name: text}), name)
    assert found == value and type(found) is type(value)
    if isinstance(value, tuple):
        assert all(type(item) is float for item in found)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("flag", "maybe", ["flag must be of type bool", "'maybe' (str)"]),
        ("flag", "2", ["flag must be of type bool", "'2' (str)"]),
        ("count", "two", ["count must be of type int", "'two' (str)"]),
        ("count", "2.5", ["count must be of type int", "'2.5' (str)"]),
        ("count", "", ["count must be of type int", "''"]),
        ("count", "nan", ["count", "'nan'"]),
        ("count", "inf", ["count", "'inf'"]),
        ("count", "1e999", ["count", "'1e999'"]),
        ("rate", "1e-x", ["rate must be of type float", "'1e-x' (str)"]),
        ("rate", "nan", ["rate must be a finite number", "nan"]),
        ("rate", "none", ["rate must be of type float", "'none'"]),
        ("rate", "[0.1]", ["rate must be of type float", "'[0.1]'"]),
        ("limit", "some", ["limit must be of type int or None", "'some'"]),
        ("rates", "ten", ["rates", "'ten'"]),
        ("rates", "[1, two]", ["rates", "[1, two]"]),
        ("rates", '["1"]', ["rates must be one or more numbers", "['1']"]),
        ("rates", "[[1], 2]", ["rates must be one or more numbers", "[[1], 2]"]),
        ("rates", "1;2", ["rates", "'1;2'"]),
    ],
)
def test_a_string_that_is_no_such_value_is_refused(name, text, words):
    with pytest.raises(ConfigError) as caught:
        ask(**{name: text})
    assert all(word in str(caught.value) for word in ["Received: ", "Way out: ", *words]), str(caught.value)


def test_values_of_the_right_type_pass_as_they_are():
    assert ask(flag=True, count=2, rate=1, limit=None, name="x", rates=[10, 60.0]) == Every(
        True, 2, 1.0, None, 0.1, "x", (10.0, 60.0)
    )
    assert ask(rates=5).rates == (5.0,)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("flag", 1, ["flag must be of type bool", "1 (int)"]),
        ("count", True, ["count must be of type int", "True (bool)"]),
        ("count", 2.5, ["count must be of type int", "2.5 (float)"]),
        ("count", None, ["count must be of type int", "None (NoneType)"]),
        ("count", [3], ["count must be of type int", "[3] (list)"]),
        ("name", True, ["name must be of type str", "True (bool)"]),
        ("rates", {"a": 1}, ["rates must be one or more numbers", "{'a': 1}"]),
        ("rates", [True], ["rates must be one or more numbers", "[True]"]),
    ],
)
def test_a_value_of_a_wrong_type_is_refused(name, value, words):
    with pytest.raises(ConfigError) as caught:
        ask(**{name: value})
    assert all(word in str(caught.value) for word in ["Received: ", "Way out: ", *words]), str(caught.value)


@pytest.mark.parametrize("word", ["true", "1e-3", "10", "0.5", "none", "[10, 60]", "verse", "False", "None"])
def test_whatever_papermills_command_line_makes_of_a_word_it_comes_out_right(word):
    """-p guesses types, -r hands text, -y reads YAML: all three must mean the same."""
    means = {"true": ("flag", True), "1e-3": ("rate", 0.001), "10": ("count", 10), "0.5": ("rate", 0.5)}
    means |= {"none": ("limit", None), "[10, 60]": ("rates", (10.0, 60.0)), "verse": ("name", "verse")}
    means |= {"False": ("flag", False), "None": ("limit", None)}
    name, value = means[word]
    for handed in (word, as_papermill_reads_it(word)):
        assert getattr(ask(**{name: handed}), name) == value, repr(handed)


# ------------------------------------------------------------------------------------------------------- unknown names


def test_an_unknown_name_is_refused_with_its_nearest():
    with pytest.raises(ConfigError) as caught:
        validate({"preset": "smoke", "vocab_sise": 300}, QuickstartParameters)
    for word in ("only its own parameters", "vocab_sise=300", "perhaps 'vocab_size' was meant", "minutes"):
        assert word in str(caught.value)
    with pytest.raises(ConfigError, match="minutes=5"):  # a parameter of one study is none of another
        validate({"minutes": 5}, RecipeParameters)


def test_what_a_notebook_keeps_beside_its_parameters_is_no_parameter():
    def function() -> None: ...

    namespace = {"preset": "smoke", "seed": 3, "json": json, "function": function, "Path": Path, "_hidden": 1}
    namespace |= {"In": [""], "Out": {}, "exit": object(), "quit": object(), "__name__": "__main__", "_i1": ""}
    assert given(namespace) == {"preset": "smoke", "seed": 3}
    assert validate(namespace, QuickstartParameters).seed == 3


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """A namespace as a live kernel has it."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    config = Config()
    config.HistoryManager.enabled = False
    yield InteractiveShell(config=config)
    InteractiveShell.clear_instance()


def test_a_live_kernel_adds_no_parameter(shell):
    shell.run_cell("preset = 'smoke'\nworkers = '2'").raise_error()
    shell.run_cell("from tinylm.study import parameters").raise_error()
    shell.run_cell("settings = parameters.validate(globals(), parameters.QuickstartParameters)").raise_error()
    settings = shell.user_ns["settings"]
    assert (settings.preset, settings.workers) == ("smoke", 2)


def test_the_cell_that_checks_the_parameters_may_be_run_again(shell):
    """As a person does who changes a parameter in Jupyter and runs the notebook from the top."""
    cells = json.loads((repository() / "studies" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    first, second = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"][:2]
    check = "\n".join(line for line in second.splitlines() if "import" in line or "validate" in line)
    for preset in ("smoke", "quick"):
        shell.run_cell(first).raise_error()
        shell.run_cell(f"preset = {preset!r}").raise_error()
        shell.run_cell(check + "\nstudy = object.__new__(quickstart.ComputeStudy)").raise_error()
        assert shell.user_ns["settings"].preset == preset


# ------------------------------------------------------------------------------------------------ the studies' parameters


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_notebooks_defaults_are_those_of_its_parameters(name):
    """The parameters cell says what is asked when nothing is, with the same names and values as the class."""
    notebook = json.loads((repository() / "studies" / f"{name}.ipynb").read_text(encoding="utf-8"))
    (cell,) = (cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", []))
    namespace = {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse("".join(cell["source"])).body}
    assert validate(namespace, PARAMETERS[name]) == PARAMETERS[name]()
    assert set(namespace) == {field.name for field in dataclasses.fields(PARAMETERS[name])}


def test_the_parameters_cell_is_what_papermill_can_override():
    """Papermill itself finds every name and type, which `papermill --help-notebook` prints."""
    from papermill.inspection import _infer_parameters
    from papermill.iorw import load_notebook_node

    node = load_notebook_node(str(repository() / "studies" / "quickstart.ipynb"))
    found = {parameter.name for parameter in _infer_parameters(node)}
    assert found == {field.name for field in dataclasses.fields(QuickstartParameters)}
    with_values = papermill.parameterize.parameterize_notebook(node, {"preset": "smoke"})
    assert any("injected-parameters" in cell.metadata.get("tags", []) for cell in with_values.cells)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"preset": "quik"}, ["preset must be one of smoke, quick, full", "'quik'", "perhaps 'quick'"]),
        ({"tokenizer": "words"}, ["tokenizer must be one of bpe, unigram, char, byte", "'words'"]),
        ({"workers": -1}, ["workers must not be negative", "workers=-1"]),
        ({"seed": "-1"}, ["seed must not be negative", "seed=-1"]),
        ({"vocab_size": 1}, ["vocab_size must be at least 2", "vocab_size=1"]),
        ({"minutes": []}, ["minutes must be one or more positive numbers", "write 10 or [10, 60]"]),
        ({"minutes": "0"}, ["minutes must be one or more positive numbers", "0.0"]),
        ({"minutes": [10, -1]}, ["minutes must be one or more positive numbers", "-1.0"]),
    ],
)
def test_a_value_out_of_range_is_refused_with_rule_value_and_way_out(values, words):
    with pytest.raises(ConfigError) as caught:
        validate(values, QuickstartParameters)
    assert all(word in str(caught.value) for word in ["Received: ", "Way out: ", *words]), str(caught.value)


def test_a_study_reads_the_text_it_is_given_or_the_usual_one():
    assert QuickstartParameters().data.text == "verse"
    assert QuickstartParameters(preset="smoke").data.text == "zipf-markov"  # no network
    given = QuickstartParameters(preset="smoke", text="a b.jsonl", tokenizer="char", field="body").data
    assert (given.text, given.tokenizer, given.field) == ("a b.jsonl", "char", "body")
    assert QuickstartParameters(text="a.txt").data.field is None
    assert (
        validate({"text": 1984}, QuickstartParameters).text == "1984"
    )  # a file whose name papermill takes for a number


def test_results_of_different_questions_go_to_different_folders():
    local = repository() / "results" / "local"
    asked = [{}, {"preset": "smoke"}, {"text": "my texts/Notes 2.txt"}, {"text": "shakespeare"}, {"vocab_size": 1024}]
    folders = [QuickstartParameters(**values).folder for values in asked]
    assert folders[0] == local / "quickstart" and QuickstartParameters(text="verse").folder == folders[0]
    assert RecipeParameters().folder == local / "recipe"
    assert len(set(folders)) == len(folders)
    for folder in folders:
        assert folder.parent == local and folder.name.startswith("quickstart")
        assert set(folder.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_a_results_folder_is_taken_from_the_repository_unless_it_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert QuickstartParameters(results_dir="results/mine").folder == repository() / "results" / "mine"
    assert QuickstartParameters(results_dir=str(tmp_path / "mine")).folder == tmp_path / "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert QuickstartParameters(results_dir="~/mine").folder == tmp_path / "mine"


def test_every_parameter_has_a_type_that_text_can_become():
    for kind in PARAMETERS.values():
        for name, hint in typing.get_type_hints(kind).items():
            if name not in {field.name for field in dataclasses.fields(kind)}:
                continue
            default = getattr(kind(), name)
            text = json.dumps(list(default)) if isinstance(default, tuple) else str(default)
            assert getattr(validate({name: text}, kind), name) == default, (name, hint)
