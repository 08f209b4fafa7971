"""Run a notebook of ``studies/`` in this interpreter's environment: progress on the terminal, errors in one sentence,
the executed notebook and a self-contained page of it in the study's results folder."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from tinylm import errors
from tinylm.errors import LabError
from tinylm.files import write_whole
from tinylm.study.parameters import (
    AblationParameters,
    ClaimsParameters,
    ComputeParameters,
    DataParameters,
    DataQualityParameters,
    DecodingParameters,
    ExtrapolationParameters,
    HyperparameterParameters,
    ModelParameters,
    NormsParameters,
    NumericsParameters,
    QuickstartParameters,
    RecipeParameters,
    StabilityParameters,
    repository,
    validate,
)

_KINDS = (
    *(QuickstartParameters, RecipeParameters, DataParameters, ModelParameters, ComputeParameters),
    *(AblationParameters, DataQualityParameters, ClaimsParameters),
    *(HyperparameterParameters, NumericsParameters),
    *(NormsParameters, StabilityParameters),
    *(ExtrapolationParameters, DecodingParameters),
)
PARAMETERS = {kind.study: kind for kind in _KINDS}

# The names under which a kernel reports the errors that are meant for a person.
_FOR_PEOPLE = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, LabError)}

# nbconvert's page without the scripts that it would load from the network.
_PAGE = """{%- extends 'index.html.j2' -%}
{%- block html_head_js -%}{%- endblock html_head_js -%}
{%- block jupyter_widgets -%}{%- endblock jupyter_widgets -%}
{%- block html_head_js_mathjax -%}{%- endblock html_head_js_mathjax -%}
{%- block html_head_js_mermaidjs -%}{%- endblock html_head_js_mermaidjs -%}
"""


class StudyFailed(RuntimeError):
    """A notebook stopped at an error; the text is what a person should read."""


def find_study(name: str) -> Path:
    """The notebook of a study by its name. Raises LabError for an unknown one, and where the package was installed
    without its repository."""
    folder = repository() / "studies"
    if not folder.is_dir():
        raise LabError(
            "Studies are notebooks in the repository's studies/ folder, beside the package",
            f"no {folder}",
            "clone the repository and install it in place, with `pip install -e .`",
        )
    known = sorted(path.stem for path in folder.glob("*.ipynb"))
    if name not in known:
        raise LabError("A study is named after its notebook in studies/", name, f"the studies are {', '.join(known)}")
    return folder / f"{name}.ipynb"


def results_folder(name: str, parameters: Mapping[str, object]) -> Path:
    """Where a study writes, given what it is asked. Raises LabError for parameters that the study will not take."""
    if name in PARAMETERS:
        return validate(dict(parameters), PARAMETERS[name]).folder
    return repository() / str(parameters.get("results_dir", Path("results", "local", name)))


def run_notebook(notebook: Path, results_dir: Path, parameters: Mapping[str, object]) -> Path:
    """Execute a parametrised notebook with papermill; return the path of the page made of it.

    The kernel is this interpreter, in the current folder; what cells print goes to the terminal as they do. Writes
    notebook.ipynb and notebook.html into results_dir when all cells have run. Raises StudyFailed with the text of the
    error that stopped a cell: a LabError's alone, any other's with its type, and then the notebook with its traceback
    is kept as notebook-failed.ipynb. Ctrl-C ends the kernel and its workers, and is raised as KeyboardInterrupt.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    logging.getLogger("papermill").setLevel(logging.ERROR)
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # spares the terminal a warning for debuggers
    failed = results_dir / "notebook-failed.ipynb"
    with tempfile.TemporaryDirectory() as scratch, _own_kernel() as (kernel, interrupted):
        executed = Path(scratch) / notebook.name
        try:
            node = papermill.execute_notebook(
                notebook,
                executed,
                parameters=dict(parameters),
                kernel_name="python3",
                kernel_manager_class=kernel,
                progress_bar=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
                cwd=os.getcwd(),
            )
        except (PapermillExecutionError, RuntimeError) as error:  # a kernel that dies raises a RuntimeError
            if interrupted.is_set():
                raise KeyboardInterrupt from error
            if not isinstance(error, PapermillExecutionError):
                raise StudyFailed(
                    f"The notebook's Python ended before its work was done ({error}), perhaps for want of memory. "
                    "Way out: free some memory or lower workers, and start again: finished runs are kept."
                ) from error
            message = error.evalue.strip()
            if error.ename not in _FOR_PEOPLE:
                write_whole(failed, executed.read_bytes())
                message = f"{error.ename}: {message} (the traceback is in {failed})"
            raise StudyFailed(message) from error
    # Papermill notes where it read and wrote; a result should not carry the folders of the machine that made it.
    node.metadata.papermill.update(input_path=f"{notebook.parent.name}/{notebook.name}", output_path="notebook.ipynb")
    write_whole(results_dir / "notebook.ipynb", _as_json(node))
    failed.unlink(missing_ok=True)
    return write_whole(results_dir / "notebook.html", page(node, title=f"tinylm: {notebook.stem}"))


def page(node, title: str) -> str:
    """One HTML page of an executed notebook, with its figures inside and nothing loaded from elsewhere."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(raw_template=_PAGE, embed_images=True)
    html, _ = exporter.from_notebook_node(node, resources={"metadata": {"name": title}})
    return html


def _as_json(node) -> str:
    import nbformat

    return nbformat.writes(node) + "\n"


@contextlib.contextmanager
def _own_kernel() -> Iterator[tuple[type, threading.Event]]:
    """The class of a kernel manager that starts this interpreter, whatever kernels are registered as ``python3``, and
    an event that says whether Ctrl-C was pressed: meanwhile the first stops the cell that runs, the second all."""
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    started: list[AsyncKernelManager] = []
    interrupted = threading.Event()

    class OwnKernel(AsyncKernelManager):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

        @property
        def kernel_spec(self) -> KernelSpec:
            # A notebook's errors arrive as messages; what the kernel logs of its own start and end helps nobody.
            return KernelSpec(resource_dir="", **get_kernel_dict(extra_arguments=["--log-level=CRITICAL"]))

    def on_interrupt(*_: object) -> None:
        group = getattr(started[-1].provisioner, "pgid", None) if started else None
        if group is None or interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()
        os.killpg(group, signal.SIGINT)

    if threading.current_thread() is not threading.main_thread():  # only there can signals be caught
        yield OwnKernel, interrupted
        return
    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield OwnKernel, interrupted
    finally:
        signal.signal(signal.SIGINT, before)
