"""The command line: fetch, train, generate, export, import, fit, plan, study, bench, doctor, clean. Commands import what they need,
``--help`` no torch."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import json
import os
import sys
import typing
from collections.abc import Callable
from pathlib import Path

import click

from tinylm import __version__, counts
from tinylm.config import (
    INITS,
    MLPS,
    NORM_POSITIONS,
    NORMS,
    POSITIONS,
    PRECISIONS,
    SCHEDULES,
    TOKENIZERS,
    DataConfig,
    GenerateConfig,
    ModelConfig,
    TrainConfig,
)
from tinylm.errors import LabError

_CHOICES = {
    "norm": NORMS,
    "norm_position": NORM_POSITIONS,
    "mlp": MLPS,
    "position": POSITIONS,
    "init": INITS,
    "schedule": SCHEDULES,
    "precision": PRECISIONS,
    "tokenizer": TOKENIZERS,
}


class _Commands(click.Group):
    """Ends a LabError, and what the system refuses, as one line on stderr with exit code 2, and Ctrl-C with 130; none shows a
    traceback."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except LabError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)
        except OSError as error:
            if error.errno == errno.EPIPE:  # who read the output has gone, which click ends in silence
                raise
            told = LabError("The system must let a command do its work", error, "mend what it names, and start again")
            click.echo(f"error: {told}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
            ctx.exit(130)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="tinylm")
def main() -> None:
    """A lab for small language models: from a text to a measured scaling law."""


def _whole(value: str) -> int:
    """``1000``, and also ``1e3``."""
    try:
        return int(value)
    except ValueError:
        if not float(value).is_integer():
            raise
        return int(float(value))


_whole.__name__ = "whole number"
_KINDS = {int: _whole, float: float, str: str}


def _options_of(*configs: type) -> Callable:
    """One option for every field of the configs, of the field's type and with its default."""

    def decorate(function: Callable) -> Callable:
        for config in reversed(configs):
            hints = typing.get_type_hints(config)
            for field in reversed(dataclasses.fields(config)):
                kind = next(k for k in (*typing.get_args(hints[field.name]), hints[field.name]) if k is not type(None))
                name = "--" + field.name.replace("_", "-")
                if kind is bool:
                    option = click.option(
                        f"{name}/--no-{name[2:]}", field.name, default=field.default, show_default=True
                    )
                else:
                    option = click.option(
                        name,
                        field.name,
                        type=click.Choice(_CHOICES[field.name]) if field.name in _CHOICES else _KINDS[kind],
                        metavar=None if field.name in _CHOICES else {int: "N", float: "X", str: "TEXT"}[kind],
                        default=field.default,
                        show_default=field.default is not None,
                    )
                function = option(function)
        return function

    return decorate


def _meaning_of(*configs: type) -> str:
    """The configs' docstrings, kept as they are laid out, for the end of a command's help."""
    return "\n\n".join(
        "\b\n" + inspect.getdoc(config).replace("``", "").replace("\n\n", "\n\n\b\n") for config in configs
    )


def _config(kind: type, values: dict) -> typing.Any:
    return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})


@main.command()
@click.argument("names", nargs=-1)
def fetch(names: tuple[str, ...]) -> None:
    """Fetch named texts over the network into the cache; without a NAME, list them."""
    from tinylm import corpora

    if not names:
        for name, description in corpora.NAMES.items():
            click.echo(f"{name:14s} {description}")
    for name in names:
        text = corpora.fetch(name)
        click.echo(f"{text.name}: {text.bytes:,} bytes in {text.path}")
        click.echo(f"  source: {text.provenance['source']}; licence: {text.provenance['licence']}")


@main.command(epilog=_meaning_of(DataConfig, ModelConfig, TrainConfig))
@_options_of(DataConfig, ModelConfig, TrainConfig)
@click.option("--out", type=click.Path(file_okay=False), required=True, help="Results folder to write to.")
def train(out: str, **values) -> None:
    """Train one model on a text: its record goes to OUT/runs, the model to OUT/models.

    The same command started again goes on where it was stopped, and trains nothing that is finished. Started as
    `torchrun --nproc_per_node=2 -m tinylm train ...` it trains in several processes, to the same losses but for
    rounding and dropout.
    """
    data, model, training = (_config(kind, values) for kind in (DataConfig, ModelConfig, TrainConfig))
    from tinylm.ranks import joined
    from tinylm.study import runs

    run = runs.Run(model, training, data)
    with joined(training.device) as ranks:
        if ranks.rank == 0:
            size = f"{counts.parameters(model)['total']:,} parameters, {run.flops:.3g} FLOPs, text {data.text}"
            click.echo(size + (f", {ranks.size} processes" if ranks.size > 1 else ""), err=True)
        try:
            record = runs.train_run(run, out, keep_model=True, progress=True, ranks=ranks)
        except KeyboardInterrupt:
            if ranks.rank == 0:
                click.echo("\nstopped; the same command started again goes on from there", err=True)
            sys.exit(130)
    if record is None:  # the first process tells
        return
    if record["val_loss"] is None:
        way_out = "lower learning_rate"
        if record["status"] != "diverged":
            way_out = (
                "mend what it names (want of memory: a smaller model or batch_size), and start the same command again"
            )
        raise LabError(f"Training must succeed, and this run {record['status']}", record["reason"], way_out)
    bits = "" if record["val_bpb"] is None else f", {record['val_bpb']:.4f} bits per byte"
    click.echo(f"{record['status']}: val_loss {record['val_loss']:.4f} nats per token{bits}")
    click.echo(f"record: {Path(out, 'runs', record['run_id'] + '.json')}")
    if record["model_file"]:
        click.echo(f"model:  {Path(out, record['model_file'])}")


@main.command(epilog=_meaning_of(GenerateConfig))
@click.option("--model", required=True, type=click.Path(path_type=Path), help="A model's file, or a results folder.")
@click.option("--prompt", default="", help="What the text begins with.")
@_options_of(GenerateConfig)
def generate(model: Path, prompt: str, **values) -> None:
    """Write text with a model, token by token. Of a results folder, the model written last is taken."""
    config = _config(GenerateConfig, values)
    from tinylm.checkpoint import load_model
    from tinylm.generate import stream

    network, tokenizer, _ = load_model(_model_file(model))
    click.echo(prompt, nl=False)
    for token in stream(network, tokenizer, prompt, config):
        click.echo(token.text, nl=False)
    click.echo()


def _model_file(path: Path) -> Path:
    """The file itself, or of a results folder the model written last."""
    if not path.is_dir():
        return path
    kept = sorted(path.glob("models/*.safetensors"), key=lambda path: path.stat().st_mtime)
    if not kept:
        raise LabError("The folder must hold a model", f"no {path / 'models'}/*.safetensors", "train one with --out")
    return kept[-1]


@main.command()
@click.option("--model", required=True, type=click.Path(path_type=Path), help="A model's file, or a results folder.")
@click.option("--to", "form", type=click.Choice(["hf"]), required=True, help="hf: Llama, as transformers loads it.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
def export(model: Path, form: str, folder: Path) -> None:
    """Write a model for other tools into the new folder DIR: its weights, its config and its tokenizer.

    Of a results folder, the model written last is taken. A model that the format cannot express is refused.
    """
    from tinylm.checkpoint import load_model
    from tinylm.exchange import export_hf

    file = _model_file(model)
    network, tokenizer, _ = load_model(file)
    click.echo(f"{file} as Llama in {export_hf(network, tokenizer, folder)}")


@main.command("import", epilog=_meaning_of(GenerateConfig))
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--prompt", default="", help="What the text begins with.")
@click.option("--max-seq-len", type=_whole, metavar="N", help="Tokens to look back on; by default at most 2048.")
@_options_of(GenerateConfig)
def import_(folder: Path, prompt: str, max_seq_len: int | None, **values) -> None:
    """Read a Llama-family checkpoint (safetensors) from the folder DIR and write text with it, token by token, up to
    --max-new-tokens or to where the model ends it."""
    config = _config(GenerateConfig, values)
    from tinylm.exchange import import_hf
    from tinylm.generate import stream

    network, tokenizer = import_hf(folder, max_seq_len)
    click.echo(prompt, nl=False)
    for token in stream(network, tokenizer, prompt, config):
        if token.token_id in tokenizer.ends:
            break
        click.echo(token.text, nl=False)
    click.echo()


@main.command()
@click.argument("table", metavar="FILE.csv", type=click.Path(path_type=Path))
@click.option("--params", metavar="COLUMN", help="Parameters of the model; by default params_total.")
@click.option("--tokens", metavar="COLUMN", help="Tokens of training; by default tokens_seen, or FLOPs / 6N.")
@click.option("--loss", metavar="COLUMN", help="Loss at the end of the run; by default val_loss.")
@click.option("--flops", metavar="COLUMN", help="FLOPs of training.")
@click.option("--unique-tokens", metavar="COLUMN", help="Distinct tokens among those of training.")
@click.option("--drop", multiple=True, metavar="RULE", help='Leave rows out, as "loss>4"; may be given again.')
@click.option("--objective", type=click.Choice(["huber", "lsq", "lad"]), default="huber", show_default=True)
@click.option("--delta", type=float, default=1e-3, show_default=True, help="Of Huber's objective, on log loss.")
@click.option("--form", type=click.Choice(["surface", "power", "isoflop", "data-constrained"]), help="See below.")
@click.option(
    "--bootstrap",
    type=click.IntRange(min=0),
    default=1000,
    show_default=True,
    metavar="N",
    help="Resamples; 0 is none.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def fit(
    table: Path, drop: tuple[str, ...], objective: str, delta: float, form: str | None, bootstrap: int, as_json: bool,
    **columns: str | None,
) -> None:  # fmt: skip
    """Fit a scaling law to a table of runs, one row each, and say what of it these rows can tell.

    \b
    surface           L(N, D) = E + A / N^alpha + B / D^beta (the default)
    data-constrained  the same where text is repeated (the default with --unique-tokens)
    isoflop           the best size at each budget, and its power laws
    power             L(x) = E + A / x^alpha in the one column given, or along the frontier of compute

    A rule of --drop compares params, tokens, loss, flops, epochs or any column of the file with a value, as in "loss>4" or
    "params<1e6 and status!=finished"; the rule `bad` leaves out rows without positive, finite numbers. Nothing else is left
    out but a first line of units, and the report names every line left out.
    """
    from tinylm.study.tables import fit_file

    answer = fit_file(table, columns, form, drop, objective, delta, bootstrap)
    click.echo(json.dumps(answer.content, indent=2, allow_nan=False) if as_json else answer.text)


@main.command()
@click.option("--minutes", type=float, help="Time to train for on this machine; its speed is measured where not known.")
@click.option("--flops", type=float, help="Compute to spend.")
@click.option("--tokens", type=float, help="Tokens to train on, repeats counted, at the size that suits so many.")
@click.option("--results-dir", type=click.Path(path_type=Path), help="By default results/local/quickstart.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(
    minutes: float | None, flops: float | None, tokens: float | None, results_dir: Path | None, as_json: bool
) -> None:
    """Plan the next run from the laws that a study measured: its shape, tokens, batch and learning rate, the loss to
    expect with its 95 % interval, its time, and what a model of half or twice the size would cost.

    Give one budget. Where it is more than the text holds, the plan says how many epochs that is and what they are worth.
    """
    if sum(budget is not None for budget in (minutes, flops, tokens)) != 1:
        raise LabError(
            "A plan has one budget",
            f"minutes={minutes}, flops={flops}, tokens={tokens}",
            "give --minutes or --flops or --tokens",
        )
    from tinylm.study import design, planner
    from tinylm.study.parameters import QuickstartParameters
    from tinylm.study.runs import read_kept

    folder, recipe = results_dir or QuickstartParameters().folder, design.Recipe()
    law = folder / "tables" / "law.json"
    if not os.path.exists(law):
        raise LabError(
            "A plan needs the results of a finished quickstart study",
            f"no {law}",
            "run `tinylm study`, or name another folder with --results-dir; a text under 2 MB gives no compute law",
        )
    evidence = read_kept(law, planner.Evidence.from_dict)
    if minutes is None:
        found = evidence.plan(recipe, flops=flops, tokens=tokens)
    else:
        found = _plan_in_time(evidence, recipe, 60 * minutes, folder / "speed.json")
    if as_json:
        click.echo(json.dumps(found.to_dict()))
        return
    for item, value in found.table()["plan"].items():
        click.echo(f"{item:30s} {value}")
    for warning in found.warnings:
        click.echo(f"warning: {warning}", err=True)


def _plan_in_time(evidence: typing.Any, recipe: typing.Any, seconds: float, path: Path) -> typing.Any:
    """A plan at the speed that the study measured, where that was on this machine; else at a speed measured now."""
    from tinylm import backend
    from tinylm.study import planner
    from tinylm.study.runs import read_kept

    known = read_kept(path, planner.Speed.from_dict) if path.exists() else None
    threads = os.cpu_count() or 1
    if known is None or (known.machine, known.threads) != (backend.machine()["cpu"], threads):
        load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
        click.echo(f"measuring this machine's speed; it should be idle ({threads} threads{load})", err=True)
        known = evidence.speed_for(recipe, [seconds], threads)
    return evidence.plan(recipe, seconds=seconds, speed=known)


@main.command()
@click.argument("name", default="quickstart")
@click.option("--text", help="A named text, or the path of a file or folder of your own.")
@click.option("--preset", help="smoke, quick or full.")
@click.option(
    "--minutes", help="For how long the next run may train, in minutes; several as 10,60. One plan is made for each."
)
@click.option("--workers", type=int, help="Worker processes.")
@click.option("--seed", type=int, help="Seed of the first run of each kind.")
@click.option("--results-dir", type=click.Path(path_type=Path), help="By default in results/local of the repository.")
@click.option("-p", "more", nargs=2, multiple=True, metavar="NAME VALUE", help="Any other parameter of the notebook.")
def study(name: str, results_dir: Path | None, more: tuple[tuple[str, str], ...], **named: str | None) -> None:
    """Run a study's notebook: studies/NAME.ipynb, with its defaults for what is not given.

    Finished runs are kept: a study that was stopped goes on where it was.
    """
    from tinylm.study import notebooks
    from tinylm.study.parameters import within_repository

    given = {key: value for key, value in named.items() if value is not None}
    parameters = {**given, **{key: _value(value) for key, value in more}}
    if results_dir:
        parameters["results_dir"] = within_repository(results_dir)
    notebook = notebooks.find_study(name)
    folder = notebooks.results_folder(name, parameters)
    try:
        page = notebooks.run_notebook(notebook, folder, parameters)
    except notebooks.StudyFailed as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        click.echo("\nstopped; finished runs are kept, and the same command started again goes on from there", err=True)
        sys.exit(130)
    click.echo(f"page:   {page}")


@main.command()
@click.option("--only", metavar="NAME,...", help="Sections to measure, or `report` to draw it anew; see below.")
@click.option("--preset", type=click.Choice(["smoke", "full"]), default="full", show_default=True)
@click.option("--rounds", type=int, help="Turns of each contender, other than the preset's.")
@click.option("--force", is_flag=True, help="Measure also while the machine is busy; the report says so.")
@click.option("--results-dir", type=click.Path(path_type=Path), help="By default results/bench/<this machine>.")
def bench(only: str | None, preset: str, rounds: int | None, force: bool, results_dir: Path | None) -> None:
    """Measure speed on this machine, beside transformers and beside what its arithmetic allows.

    Sections: machine, training, generation, sweep, profile, growth, and parity, which is measured only when it is named. Each
    is kept when it is measured, and the report is drawn from all that are there. The smoke preset shows in about a minute
    that everything runs, and writes under results/local.
    """
    from tinylm.study import bench as benchmark

    names = tuple(name.strip() for name in only.split(",")) if only else benchmark.USUAL
    benchmark.run(names, preset, results_dir, force, rounds, say=click.echo)


@main.command()
@click.argument("folder", required=False, metavar="[FOLDER]", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(folder: Path | None, as_json: bool) -> None:
    """Check this installation and this machine, and with a FOLDER the results in it: one line a finding, with the way out.

    ok: as it should be; look: it works, and there is something to know; broken: something will not work, and the exit code
    is 1. Nothing is changed.
    """
    from tinylm.study import checkup

    found = checkup.checkup(folder)
    click.echo(checkup.to_json(found) if as_json else "\n".join(finding.line() for finding in found))
    sys.exit(any(finding.state == checkup.BROKEN for finding in found))


@main.command()
@click.argument("kinds", nargs=-1, metavar="[KIND]...")
@click.option("--results", "results_dir", type=click.Path(path_type=Path), help="Also what lies in a results folder.")
@click.option("--yes", is_flag=True, help="Remove without asking.")
def clean(kinds: tuple[str, ...], results_dir: Path | None, yes: bool) -> None:
    """Say what the cache holds, by kind; with KINDs, remove these, after showing them.

    With --results also the checkpoints of runs that were cut off, and half-written files. Records and models stay, whatever
    is named, links are not followed, and nothing is removed that a run is using.
    """
    import time

    from tinylm import cache, files

    kinds = cache.checked(kinds, results_dir)
    found = cache.holdings(results_dir)
    click.echo(f"cache: {files.home()}" + (f"; results: {results_dir}" if results_dir else ""))
    for holding in found.values():
        if holding.kind in kinds or (not kinds and (holding.paths or holding.links)):
            used = time.strftime("last used %Y-%m-%d %H:%M", time.localtime(holding.used)) if holding.paths else ""
            size = f"{holding.bytes / 1e6:10,.1f} MB {len(holding.paths):7,d} files"
            click.echo(f"{holding.kind:12s}{size}  {used:26s}  {holding.about}")
            for link in holding.links:
                click.echo(f"{'':12s}{link} is a link: left alone")
    doomed = sum(found[kind].bytes for kind in kinds)
    if kinds and not any(found[kind].paths for kind in kinds):
        click.echo("nothing to remove")
    elif kinds and (yes or click.confirm(f"Remove {doomed / 1e6:,.1f} MB?")):
        click.echo(f"{cache.remove(kinds, results_dir) / 1e6:,.1f} MB removed")


def _value(text: str) -> object:
    """A parameter as a notebook should get it: a number, true, false, null or a list where it reads so, else text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text, text)
