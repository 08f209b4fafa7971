"""What holds the house together: versions, imports that run one way, notebooks that narrate, commands that exist."""

from __future__ import annotations

import ast
import graphlib
import itertools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import tinylm
from tinylm.cli import main

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NOTEBOOKS = sorted(path for folder in ("labs", "studies") for path in (ROOT / folder).glob("*.ipynb"))
STUDIES = [path for path in NOTEBOOKS if path.parent.name == "studies"]

# From the ground up; a module imports only from lines above its own. Modules of ``study`` import
# each other too, and so do those of ``widgets``.
FLOORS = (
    ("errors", "words"),
    ("files",),
    ("cache", "config"),
    ("counts", "layers", "ranks"),
    ("backend", "normalization", "positional"),
    ("attention", "mlp"),
    ("decoder",),
    ("model", "tokenizer", "verse"),
    ("stack", "corpora", "checkpoint", "decoding", "tokenizer_json"),
    ("train", "generate", "probe", "exchange"),
    ("inside",),
    ("study",),
    ("widgets", "cli"),
    ("__main__",),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
TORCHLESS = ("errors", "files", "cache", "config", "counts", "cli", "__main__")


# ------------------------------------------------------------------------------------------------------------ imports


def modules() -> dict[str, Path]:
    """All modules of the package but its __init__, by dotted name without the package's own."""
    names = {}
    for path in sorted((ROOT / "tinylm").rglob("*.py")):
        parts = path.relative_to(ROOT / "tinylm").with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    names.pop("")
    return names


def imports_of(source: str, everywhere: bool = True) -> list[tuple[str, str | None]]:
    """(module, name or None) of each import; not everywhere: only of those that run when the module is imported."""
    found = []
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports name the package in full"
            found += [(node.module, alias.name) for alias in node.names]
        if everywhere or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            pending += ast.iter_child_nodes(node)
    return found


def own_imports(name: str, path: Path) -> set[str]:
    """The modules of this package that a module imports, anywhere in it."""
    known, found = modules(), set()
    for module, imported in imports_of(path.read_text(encoding="utf-8")):
        if module != "tinylm" and not module.startswith("tinylm."):
            continue
        target = module.removeprefix("tinylm").removeprefix(".")
        if imported and f"{target}.{imported}".lstrip(".") in known:
            target = f"{target}.{imported}".lstrip(".")
        if target:
            assert target in known, f"{name} imports {module}, which is not there"
            found.add(target)
        else:
            assert imported in (None, "__version__"), f"{name} imports {imported} from the package, not from its module"
    return found


@pytest.mark.parametrize("name", modules())
def test_imports_run_one_way(name):
    floor = name.partition(".")[0]
    assert floor in FLOOR, f"give {floor} a place in FLOORS"
    for target in own_imports(name, modules()[name]):
        other = target.partition(".")[0]
        below = FLOOR[other] < FLOOR[floor]
        assert below or floor == other in ("study", "widgets"), f"tinylm.{name} may not import tinylm.{target}"


def test_no_circle_among_imports():
    order = graphlib.TopologicalSorter({name: own_imports(name, path) for name, path in modules().items()})
    assert set(order.static_order()) >= set(modules())  # raises CycleError where there is one


def test_only_widgets_knows_the_screen():
    for name, path in modules().items():
        screen = {
            module for module, _ in imports_of(path.read_text(encoding="utf-8")) if module.startswith("ipywidgets")
        }
        assert not screen or name.partition(".")[0] == "widgets", f"tinylm.{name} imports {screen}"


@pytest.mark.parametrize("name", TORCHLESS)
def test_light_modules_import_no_torch(name):
    heavy = {"torch", "numpy", "pandas", "scipy", "matplotlib", "safetensors", "sentencepiece", "papermill"}
    top = {module.partition(".")[0] for module, _ in imports_of(modules()[name].read_text(encoding="utf-8"), False)}
    assert not top & heavy


def test_reader_of_imports_sees_them_all():
    source = "import a.b\ndef f():\n    from c import d\nclass K:\n    import e\n"
    assert sorted(imports_of(source), key=str) == [("a.b", None), ("c", "d"), ("e", None)]
    assert ("c", "d") not in imports_of(source, everywhere=False)


# --------------------------------------------------------------------------------------------------- the package itself


def test_exported_names():
    expected = "ModelConfig TrainConfig GenerateConfig DataConfig TinyLM Tokenizer TextDataset Trainer generate stream"
    assert set(tinylm.__all__) == {*expected.split(), "load_model", "save_model", "prepare", "__version__"}
    for name in tinylm.__all__:
        assert getattr(tinylm, name) is not None
        assert name in dir(tinylm)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = tinylm.no_such_name


def test_importing_the_package_imports_no_torch():
    code = """
import sys, tinylm, tinylm.config, tinylm.counts, tinylm.cli
from tinylm import ModelConfig
assert not {"torch", "numpy", "pandas"} & set(sys.modules)
from tinylm.generate import stream
import tinylm.generate
assert tinylm.stream is stream
assert callable(tinylm.generate) and tinylm.generate.__name__ == "generate"
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_package_is_installed():
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "tinylm").rglob("__init__.py")}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == packages


def test_environment_file_follows_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *conda, pip = environment["dependencies"]
    project = PYPROJECT["project"]
    assert environment["name"] == project["name"]
    assert conda == [f"python{project['requires-python']}", "pip"]
    assert pip["pip"] == [*project["dependencies"], "-e ."]


def test_versions_have_a_floor_and_a_cap():
    project = PYPROJECT["project"]
    for requirement in itertools.chain(project["dependencies"], *project["optional-dependencies"].values()):
        assert re.fullmatch(r"[\w-]+>=[\d.]+,<[\d.]+", requirement), requirement


# ----------------------------------------------------------------------------------------------------------- notebooks


def code_cells(path: Path) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_notebooks_are_there():
    assert {path.relative_to(ROOT).as_posix() for path in NOTEBOOKS} >= {
        "labs/01_generation.ipynb",
        "studies/quickstart.ipynb",
    }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_narrate(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    cells = code_cells(path)
    lines = [line for cell in cells for line in cell.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(lines) < 110
    source = "\n".join(cells)
    assert "sys.path" not in source
    tree = ast.parse(source)  # and so no magics: a notebook's code is plain Python
    assert not [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    imported = {module.partition(".")[0] for module, _ in imports_of(source)}
    assert "tinylm" in imported
    assert "ipywidgets" not in imported
    assert not [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and cell["outputs"]]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_studies_have_one_parameters_cell(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    assert tagged[0] is next(cell for cell in cells if cell["cell_type"] == "code")
    assert all(isinstance(node, (ast.Assign, ast.AnnAssign)) for node in ast.parse("".join(tagged[0]["source"])).body)


# ------------------------------------------------------------------------------------------------- documents and Make


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_commands_in_documents_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```.*?```", text, re.DOTALL) + re.findall(r"`[^`\n]+`", text))
    made = re.findall(r"(?<![\w-])make (?:[A-Z]+=\S+ )*([a-z][\w-]*)", code)
    assert made, "the document shows how to make things"
    assert set(made) <= targets()
    called = re.findall(r"(?:-m |bin/|^\$? ?|[`;&] ?)tinylm ([a-z]+)", code, re.MULTILINE)
    assert set(called) <= set(main.commands)
    for study in re.findall(r"(?:studies|labs)/[\w./-]+\.ipynb", text):
        assert (ROOT / study).exists(), study


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    if not shutil.which("make"):
        pytest.skip("no make")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"}
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_make_refuses_an_old_python(tmp_path):
    old = script(tmp_path / "python", 'if [ "$1" = --version ]; then echo Python 3.9.2; else exit 1; fi')
    done = make("study", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}")
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr and "3.9.2" in done.stderr and "PYTHON=" in done.stderr


def test_make_says_when_its_environment_is_broken(tmp_path):
    environment = tmp_path / "venv"
    environment.mkdir()
    (environment / "pyvenv.cfg").touch()
    done = make("study", f"PYTHON={sys.executable}", f"VENV={environment}")  # half made: no interpreter in it
    assert done.returncode != 0 and "does not start" in done.stderr and "rm -r" in done.stderr
    script(environment / "bin" / "python", "exit 1")
    (environment / ".installed").touch()
    done = make("study", f"PYTHON={sys.executable}", f"VENV={environment}")  # made once, and useless since
    assert done.returncode != 0 and "does not hold this folder's tinylm" in done.stderr and "rm -r" in done.stderr


def test_make_study_hands_on_its_variables(tmp_path):
    environment = tmp_path / "venv"
    script(environment / "bin" / "python", 'case "$1" in -m) shift; for word; do echo "[$word]"; done;; esac')
    for stamp in (".installed", ".installed-test"):
        (environment / stamp).touch()
    done = make("study", f"VENV={environment}", "TEXT=my 'own' text.txt", "PRESET=smoke", "SEED=3", "MINUTES=5")
    words = [line[1:-1] for line in done.stdout.splitlines() if line.startswith("[")]
    assert words[:4] == ["tinylm", "study", "--text", "my 'own' text.txt"]
    assert words[4:] == ["--preset", "smoke", "--minutes", "5", "--seed", "3"]
    plain = make("study", f"VENV={environment}", TEXT="", PRESET="", SEED="", MINUTES="")
    assert [line for line in plain.stdout.splitlines() if line.startswith("[")] == ["[tinylm]", "[study]"]
    tests = make("test", f"VENV={environment}").stdout
    assert "[pytest]\n" in tests and "[-m]\n[not slow]" in tests


def test_make_study_needs_no_test_packages(tmp_path):
    done = make("-n", "study", f"VENV={tmp_path / 'venv'}")
    assert "pip install -e .\n" in done.stdout
    assert "[test]" not in done.stdout
    assert "[test]" in make("-n", "test", f"VENV={tmp_path / 'venv'}").stdout


def test_make_screenshots_without_a_browser_is_no_success(tmp_path, monkeypatch):
    lab = str(ROOT / "tests" / "test_labs_browser.py")
    assert "TINYLM_SCREENSHOTS=labs/pictures" in make("-n", "screenshots", f"VENV={tmp_path / 'venv'}").stdout
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("TINYLM_SCREENSHOTS", raising=False)
    runpy.run_path(lab)  # all its tests are skipped: who runs them all need not have a browser
    monkeypatch.setenv("TINYLM_SCREENSHOTS", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match=r"no chromium on the PATH.*apt install"):
        runpy.run_path(lab)


def test_continuous_integration_runs_everything():
    path = ROOT / ".ci" / "run"
    assert os.access(path, os.X_OK)
    text = path.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    assert set(re.findall(r"^part ([\w-]+)$", text, re.MULTILINE)) == {"check", "test", "test-slow"} <= targets()
    if shutil.which("bash"):
        subprocess.run(["bash", "-n", str(path)], check=True)


# ---------------------------------------------------------------------------------------------------------- cold start

SLOW_TO_LOAD = {"torch", "numpy", "pandas", "scipy", "matplotlib", "sentencepiece", "IPython", "papermill"}
COMPILER = {"torch._dynamo", "torch._inductor", "sympy"}  # a second or more, for who compiles nothing


def loaded_by(code: str, already: str = "") -> set[str]:
    """The modules that some code loads in a fresh interpreter, beyond those that are loaded ``already``."""
    tell = "import sys; before = set(sys.modules)"
    end = "print('\\n', *sorted(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([already, tell, code, end])], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_the_package_itself_adds_nothing_to_torch():
    assert loaded_by("import tinylm", already="import torch") == {"tinylm"}


@pytest.mark.parametrize("module", ["tinylm", "tinylm.config", "tinylm.counts", "tinylm.cli", "tinylm.__main__"])
def test_what_needs_no_torch_loads_none(module):
    found = loaded_by(f"import {module}")
    assert module in found
    assert not found & SLOW_TO_LOAD


@pytest.mark.parametrize("command", ["", *main.commands])
def test_help_loads_nothing_slow(command):
    shown = f"""
import runpy
sys.argv = ["tinylm", *{command!r}.split(), "--help"]
try:
    runpy.run_module("tinylm", run_name="__main__")
except SystemExit as end:
    assert not end.code
"""
    found = loaded_by(shown)
    assert "tinylm.cli" in found
    assert not found & SLOW_TO_LOAD


def test_tokenising_loads_no_torch():
    found = loaded_by("import tinylm; tinylm.Tokenizer, tinylm.prepare")
    assert found >= {"tinylm.tokenizer", "tinylm.corpora"}
    assert not found & (SLOW_TO_LOAD - {"numpy", "sentencepiece"})


def test_what_compiles_nothing_loads_no_compiler():
    training = """
import numpy
from tinylm import ModelConfig, TinyLM, TrainConfig, Trainer, generate, load_model, save_model, stream
shape = ModelConfig(vocab_size=256, hidden_size=16, num_layers=1, num_heads=2, max_seq_len=8)
TinyLM(shape)
tokens = numpy.zeros(200, dtype=numpy.uint16)
plain = TrainConfig(max_steps=1, warmup_steps=0, batch_size=1, compile=False, precision="fp32", threads=1)
Trainer(shape, plain, tokens, tokens).run()
"""
    found = loaded_by(training)
    assert found >= {"torch", "tinylm.model", "tinylm.train", "tinylm.generate", "tinylm.checkpoint"}
    assert not found & (COMPILER | {"pandas", "scipy", "matplotlib"})
