"""What must come out alike elsewhere: a sweep on a cluster that loses a worker, one run on two processes, an exported model.

Each function measures one figure and returns a small table; ``python -m tinylm.study.reliability`` calls them and tells what
they found. ``python -m tinylm.study.agreement`` is a process that trains while ``pace`` asks it to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

from tinylm import counts
from tinylm.config import GenerateConfig
from tinylm.errors import LabError
from tinylm.ranks import joined
from tinylm.study import bench
from tinylm.study.cluster import study_pool
from tinylm.study.parameters import within_repository
from tinylm.study.report import Report
from tinylm.study.runs import Run, read_record
from tinylm.study.sweep import sweep
from tinylm.words import quantity

# Of a record: what differs between a run and its repetition. A killed sweep leaves other runs to share a stack.
TIMES = ("started", "finished", "seconds", "tokens_per_second", "checksum", "trained_together")
ROUNDING = 1e-5  # of a loss: how far two processes may always drift from one
GROWTH = 10  # and how many times further than one process does that adds up a batch in another order
CLOSE = 1e-5  # of the largest logit
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def timeless(record: dict) -> dict:
    """What must not differ between a run and its repetition."""
    curve = [{**point, "seconds": None} for point in record["curve"]]
    return {**{name: value for name, value in record.items() if name not in TIMES}, "curve": curve}


# ------------------------------------------------------------------------------------------------- a sweep on a cluster


def cluster(folder: Path, runs: Sequence[Run]) -> pd.DataFrame:
    """Sweep on a Dask cluster of two workers on this machine, one of them killed while both train, and by this machine's own
    workers. One row a run: hidden_size, max_steps, seed, status; ``cut_off``, whether it was under way at the kill; val_loss
    there and here (nats per token); ``differs``, what else than times is not equal in the records (empty where nothing).

    Raises LabError without Dask, and where the sweep was over before both workers trained.
    """
    there, here = folder / "dask", folder / "local"
    with study_pool("local", 2) as pool, ThreadPoolExecutor(1) as side:
        victim = pool.submit(os.getpid).result()
        swept = side.submit(sweep, runs, there, executor=pool, stack=1, progress=False)
        while len(under_way := {path.stem for path in there.glob(".checkpoints/*.progress")}) < 2:
            if swept.done():
                raise LabError(
                    "A worker must be killed in the middle of its work",
                    f"{len(swept.result())} runs that ended before two of them trained",
                    "give longer runs",
                )
            time.sleep(0.01)
        os.kill(victim, signal.SIGKILL)
        swept.result()
    rows = []
    for _, row in sweep(runs, here, workers=2, progress=False).iterrows():
        theirs, ours = (timeless(read_record(place / "runs" / f"{row['run_id']}.json")) for place in (there, here))
        rows.append(
            {
                **{name: row[name] for name in ("hidden_size", "max_steps", "seed", "status")},
                **{"cut_off": row["run_id"] in under_way, "val_loss": theirs["val_loss"]},
                **{"val_loss_local": ours["val_loss"]},
                "differs": ", ".join(sorted(name for name in ours if theirs.get(name) != ours[name])),
            }
        )
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------- one run on two processes


def ranks(folder: Path, text: Path, steps: int = 200) -> pd.DataFrame:
    """Train one run by ``tinylm train`` in one process, by torchrun in two that share each batch, and once more in one that adds
    up each batch in two halves (grad_accum), which shows what rounding alone grows to. One row an evaluation: step, val_loss
    of one and of two (nats per token), and the larger relative difference of training and validation loss to the first:
    ``apart`` of two processes, ``halves_apart`` of two halves."""
    settings = {
        **{"text": text, "tokenizer": "byte", "vocab_size": 256, "hidden_size": 64, "num_layers": 2, "num_heads": 4},
        **{"max_seq_len": 128, "init": "scaled", "batch_size": 16, "learning_rate": 0.006, "warmup_steps": 20},
        **{"max_steps": steps, "eval_interval": max(1, steps // 8), "eval_tokens": 16384, "seed": 0, "threads": 1},
        "precision": "fp32",
    }
    curves = []
    for name, (start, changes) in {
        "one": ((), {}), "two": (TORCHRUN, {}), "halves": ((), {"batch_size": 8, "grad_accum": 2})
    }.items():  # fmt: skip
        given = (settings | changes).items()
        words = [word for field, value in given for word in (f"--{field.replace('_', '-')}", str(value))]
        command = [sys.executable, *start, "-m", "tinylm", "train", "--out", str(folder / name), "--no-compile", *words]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise LabError(f"The run in {name} must end well", done.stderr[-2000:], "mend what is said there")
        (path,) = (folder / name / "runs").glob("*.json")
        curves.append(read_record(path)["curve"])
    rows = []
    for one, two, halves in zip(*curves, strict=True):
        apart, halves_apart = (
            max(abs(other[name] / one[name] - 1) for name in ("train_loss", "val_loss")) for other in (two, halves)
        )
        rows.append(
            {"step": one["step"], "val_loss": one["val_loss"], "val_loss_two": two["val_loss"], "apart": apart,
             "halves_apart": halves_apart}
        )  # fmt: skip
    return pd.DataFrame(rows)


SHAPES = tuple(bench.Shape(*rung, 512, 128, 16) for rung in ((64, 2, 4), (128, 4, 4)))  # two of design.LADDER
SIDE_BY_SIDE, RANKS = "two runs side by side, one thread each", "one run on two processes, one thread each"
CONTENDERS = {  # processes started, threads of each, how they are started
    SIDE_BY_SIDE: (2, 1, ()),
    RANKS: (1, 1, TORCHRUN),
    "one run, two threads": (1, 2, ()),
    "one run, one thread": (1, 1, ()),
}


def pace(
    folder: Path,
    shapes: Sequence[bench.Shape] = SHAPES,
    rounds: int = 7,
    seconds: float = 2.5,
    say: Callable[[str], object] = print,
) -> pd.DataFrame:
    """How fast one run is on two processes beside two single-thread runs at once, and beside one process. One row a turn:
    params_total, contender, round, tokens_per_second (of two runs the sum), and ``others``, the share of the cores that
    other work took in all that time.

    All contenders of a shape are set up and warmed first; then they take turns of so many seconds, in rounds whose order
    rotates, as in ``bench``. Each run has the same batch, in fp32 and not compiled.
    """
    watch, rows = bench._Watch(), []
    for shape in shapes:
        params = counts.parameters(shape.model)["total"]
        with contextlib.ExitStack() as stack, ThreadPoolExecutor(2) as both:
            teams = {}
            for name, (processes, threads, start) in CONTENDERS.items():
                job = bench._job("pace", folder, threads, shape, path=bench.PLAIN)
                command = (*start, "-m", "tinylm.study.agreement")
                teams[name] = [stack.enter_context(bench._Contender(name, job, command)) for _ in range(processes)]
            for number in range(rounds):
                say(f"{params:,} parameters: round {number + 1} of {rounds}")
                first = number % len(teams)
                for name, team in [*teams.items()][first:] + [*teams.items()][:first]:
                    told = list(both.map(lambda contender: contender.turn(seconds), team))
                    rate = sum(turn["amount"] / turn["seconds"] for turn in told)
                    turn = {"params_total": params, "contender": name, "round": number, "tokens_per_second": rate}
                    rows.append(turn)
    return pd.DataFrame(rows).assign(others=watch.share()["others"])


def efficiency(rows: pd.DataFrame) -> pd.DataFrame:
    """Of ``pace``: medians and quartiles of the rate, and of its ratio to two single-thread runs side by side in the same
    round (see ``bench.summarise``); ``case`` is the number of parameters."""
    turns = rows.rename(columns={"params_total": "case", "tokens_per_second": "amount"}).assign(seconds=1.0)
    return bench.summarise(turns.to_dict("records"), SIDE_BY_SIDE)


def _serve() -> None:
    """The life of a contender's process, or of the two that torchrun started: a job on the first one's stdin, then turns as
    they are asked for, answers as lines of JSON."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes elsewhere
    with joined("cpu") as ranks:

        def heard() -> dict | None:
            line = sys.stdin.readline() if ranks.rank == 0 else ""
            return ranks.tell(json.loads(line) if line else None)

        def say(answer: dict) -> None:
            if ranks.rank == 0:
                print(json.dumps(answer), file=answers, flush=True)

        job = heard()
        trainer, tokens = bench._own_trainer(job, ranks), bench.Shape(**job["shape"]).tokens
        for _ in range(3):
            trainer.train_step()
        steps, took = steps_within(60.0, 5, trainer.train_step)
        say({})
        while asked := heard():
            most = ranks.tell(math.ceil(1.2 * asked["seconds"] * steps / took))
            steps, took = steps_within(asked["seconds"], most, trainer.train_step)
            say({"amount": steps * tokens, "seconds": took})


def steps_within(seconds: float, most: int, step: Callable[[], object]) -> tuple[int, float]:
    """Call ``step`` ``most`` times, and return how many calls ended within so many seconds (at least one) and when the last of
    these did. The others keep the processor busy, so that a neighbour which is as fast is never alone with it."""
    began, done, last = time.perf_counter(), 0, 0.0
    for _ in range(most):
        step()
        now = time.perf_counter() - began
        if now <= seconds or not done:
            done, last = done + 1, now
    return done, last


# ------------------------------------------------------------------------------------------------- models elsewhere


def exchange(folder: Path, models: Iterable[Path], tokens: int = 100) -> pd.DataFrame:
    """Export models as Llama and let transformers load them. One row a model: its file, params_total, ``positions`` of a text
    it wrote itself, the ``largest`` logit there, the largest ``difference`` between transformers' and ours and its share of
    the largest (``relative``), and ``same_tokens``, how many of so many tokens written greedily agree before the first that
    does not; ``same_text``, whether all text does, that of both tokenizers' reading included."""
    try:
        import transformers
    except ImportError as error:
        raise LabError("Reading an export needs transformers", error, "pip install -e '.[test]'") from error
    import torch

    from tinylm.checkpoint import load_model
    from tinylm.exchange import export_hf
    from tinylm.generate import generate

    if not (models := list(models)):
        raise LabError(
            "An export needs a model", "none", "run a study that keeps its best model in results/<study>/models"
        )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = []
    for number, path in enumerate(models):
        model, tokenizer, _ = load_model(path)
        place = export_hf(model, tokenizer, folder / f"hf-{number}")
        other = transformers.AutoModelForCausalLM.from_pretrained(place, local_files_only=True).eval()
        its_tokenizer = transformers.AutoTokenizer.from_pretrained(place, local_files_only=True)
        text = generate(model, tokenizer, "", GenerateConfig(max_new_tokens=2 * model.config.max_seq_len, seed=0)).text
        ids = tokenizer.encode(text)[: model.config.max_seq_len]
        with torch.no_grad():
            ours, theirs = model(torch.tensor([ids])), other(torch.tensor([ids])).logits
        largest, difference = ours.abs().max().item(), (theirs - ours).abs().max().item()
        prompt = tokenizer.decode(ids[:8])
        written = generate(model, tokenizer, prompt, GenerateConfig(temperature=0, max_new_tokens=tokens))
        told = its_tokenizer(prompt, return_tensors="pt")
        found = other.generate(**told, max_new_tokens=tokens, do_sample=False)[0, told["input_ids"].shape[1] :].tolist()
        alike = [a == b for a, b in zip(found, written.token_ids, strict=False)]
        rows.append(
            {
                **{"model": within_repository(path), "params_total": counts.parameters(model.config)["total"]},
                **{"positions": len(ids), "largest": largest, "difference": difference},
                **{"relative": difference / largest, "tokens": tokens},
                "same_tokens": alike.index(False) if False in alike else len(alike),
                "same_text": its_tokenizer.decode(found) == written.text
                and its_tokenizer(text)["input_ids"] == tokenizer.encode(text),
            }
        )
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------------------ how it is told


@dataclasses.dataclass(frozen=True)
class Section:
    """How a table is told: a line of the summary, a section of the report, and how much in it is wrong."""

    sentence: Callable[[pd.DataFrame], str]
    tell: Callable[[Report, pd.DataFrame], None]
    wrong: Callable[[pd.DataFrame], int]


def of(good: int, count: int) -> str:
    """A share of a whole, set off as what a report is about."""
    return f"**{good:,} of {count:,}**"


def _say_cluster(rows: pd.DataFrame) -> str:
    good = int((rows["differs"] == "").sum())
    end = ", bit for bit" if good == len(rows) else "; what differs in the others stands below"
    return (
        f"{of(good, len(rows))} runs of a sweep on a Dask cluster, of whose two workers one was killed while both trained, have "
        f"the records of the local sweep{end}."
    )


def _tell_cluster(report: Report, rows: pd.DataFrame) -> None:
    report.section("A cluster that loses a worker")
    report.text(
        "A sweep of two shapes and several lengths, with a run that diverges, by two Dask workers, one of which gets SIGKILL, and "
        "by this machine's own worker processes. Whole records are compared, curves included, but for times."
    )
    specs = {"hidden_size": "d", "max_steps": ",d", "seed": "d", "status": "", "cut_off": ""}
    specs |= {"val_loss": ".6f", "val_loss_local": ".6f", "differs": ""}
    caption = "Runs; cut off: under way when the worker was killed; differs: what is not equal."
    report.table(rows, "cluster", caption, **specs)


def _say_ranks(rows: pd.DataFrame) -> str:
    first, last = rows.iloc[0], rows.iloc[-1]
    said = (
        f"{first['apart']:.1e} of the loss apart after {first['step']:,.0f} steps and at most {rows['apart'].max():.1e} in "
        f"{last['step']:,.0f}, where one process that adds up its batches in halves comes to {rows['halves_apart'].max():.1e}"
    )
    if _apart(rows):
        return f"One run on two processes does not give the losses of one: {said}."
    return f"One run on two processes gives the losses of one to rounding: {said}."


def _apart(rows: pd.DataFrame) -> int:
    """Evaluations at which two processes are further from one than rounding explains, by then."""
    explained = (GROWTH * rows["halves_apart"].cummax()).clip(lower=ROUNDING)
    return int((~(rows["apart"] <= explained)).sum())


def _tell_ranks(report: Report, rows: pd.DataFrame) -> None:
    report.section("One run on two processes")
    report.text(
        "`tinylm train` alone and under `torchrun --nproc_per_node=2`: the same run, each batch shared between two processes of "
        "one thread. Sums in another order round otherwise, and training lets that grow; how far is shown by one process that "
        f"adds up each batch in two halves. Two processes may be {GROWTH} times further away by then, or {ROUNDING:g} of the loss."
    )
    specs = {"step": ",d", "val_loss": ".6f", "val_loss_two": ".6f", "apart": ".1e", "halves_apart": ".1e"}
    caption = (
        "Validation loss in one process and in two; apart, halves apart: the larger relative difference of training and "
        "validation loss between one process and two, and between one and one with halved batches."
    )
    report.table(rows, "ranks", caption, **specs)


def _say_pace(rows: pd.DataFrame) -> str:
    table = efficiency(rows)
    sizes = [
        f"**{row.ratio:.2f}** ({row.ratio_low:.2f} to {row.ratio_high:.2f}) at {quantity(row.case)} parameters"
        for row in table[table["contender"] == RANKS].itertuples()
    ]
    return (
        f"Two processes of one thread that train one run make {' and '.join(sizes)} of the tokens a second that two runs make side "
        "by side (medians, quartiles in brackets)."
    )


def _tell_pace(report: Report, rows: pd.DataFrame) -> None:
    report.section("What two processes bring")
    report.text(
        "Tokens a second of training steps alone, in fp32 and not compiled, each run with the same batch. All processes are "
        "started and warmed before the first round; in a round each contender trains once while the others wait. Two runs side by "
        f"side are counted while both train, and their rates added. Other work took {rows['others'].iloc[0]:.1%} of the processor."
    )
    specs = {"case": ",d", "contender": "", "rate": ",.0f", "rate_low": ",.0f", "rate_high": ",.0f"}
    specs |= {"ratio": ".2f", "ratio_low": ".2f", "ratio_high": ".2f"}
    table, rounds = efficiency(rows), rows["round"].nunique()
    caption = f"Case: parameters; rate: tokens/s; ratio: to two runs side by side. Medians of {rounds} rounds, with quartiles."
    report.table(table, "efficiency", caption, **specs)
    report.text("Every turn stands in [pace.csv](tables/pace.csv).")


def _other_models(rows: pd.DataFrame) -> int:
    return int((~((rows["relative"] <= CLOSE) & (rows["same_tokens"] == rows["tokens"]) & rows["same_text"])).sum())


def _say_exchange(rows: pd.DataFrame) -> str:
    return (
        f"{of(len(rows) - _other_models(rows), len(rows))} exported models compute in transformers what they do here, within "
        f"{CLOSE:.0e} of the largest logit, and write the same text greedily over {rows['tokens'].max()} tokens; the logits differ "
        f"by {rows['difference'].max():.1e} at most, and by {rows['relative'].max():.1e} of the largest."
    )


def _tell_exchange(report: Report, rows: pd.DataFrame) -> None:
    report.section("Models in transformers")
    report.text(
        "Each model is exported as Llama and loaded by transformers' AutoModelForCausalLM and AutoTokenizer. Both read a text that "
        "the model wrote, as far as its window goes, and both continue its beginning greedily."
    )
    specs = {"model": "", "params_total": ",d", "positions": ",d", "largest": ".3g", "difference": ".1e"}
    specs |= {"relative": ".1e", "same_tokens": "d", "tokens": "d", "same_text": ""}
    caption = (
        "Largest logit, largest difference, its share of the largest; tokens that agree, of so many; and the text."
    )
    report.table(rows, "exchange", caption, **specs)


SECTIONS = {
    "cluster": Section(_say_cluster, _tell_cluster, lambda rows: int((rows["differs"] != "").sum())),
    "ranks": Section(_say_ranks, _tell_ranks, _apart),
    "pace": Section(_say_pace, _tell_pace, lambda rows: 0),
    "exchange": Section(_say_exchange, _tell_exchange, _other_models),
}


if __name__ == "__main__":
    _serve()
