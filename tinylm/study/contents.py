"""The first page of results/: what every published study found, and what changes with the text."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from tinylm.files import write_whole
from tinylm.study.report import interval, write_table
from tinylm.study.runs import read_kept

LAWS = {  # column -> (law, parameter) of a compute study's tables/laws.csv
    "best size": ("N_opt(C) = k C^a", "a"),
    "its tokens": ("D_opt(C) = k C^a", "a"),
    "a of the surface": ("L(N, D)", "a"),
    "alpha": ("L(N, D)", "alpha"),
    "beta": ("L(N, D)", "beta"),
    "floor E": ("L(N, D)", "E"),
}


WORDS = {
    "nat": (
        "the unit of loss: how surprised a model is by the next token, on average, in natural logarithms. Lower is better; a guess "
        f"at random among 512 tokens loses {math.log(512):.2f}. A bit is {math.log(2):.3f} nats; perplexity is e to the loss."
    ),
    "FLOP": "one multiplication or addition. Compute is counted in them, so that the machine does not matter.",
    "95 % interval": (
        "it holds the true value in 95 of 100 such studies. Two things are told apart where the interval of their difference "
        "leaves out zero, after a correction for how many comparisons were made (Holm's)."
    ),
    "seed": (
        "the number from which first weights and the order of the text are drawn. Runs that differ in it alone tell how much is "
        "luck; paired by seed, two things are compared with much of that luck taken out."
    ),
    "identified, weak, not identified": "how well the runs tell a parameter of a law: its interval is narrow, wide, or no help.",
    "family, minimum": "models of several sizes trained with equal compute, and the size at which their loss is lowest.",
    "surface": "one law of parameters N and tokens D together: L = E + A / N^alpha + B / D^beta.",
    "compute multiplier": (
        "the compute at which the baseline reaches a variant's loss, over the compute that the variant took: above 1 the variant "
        "saves compute."
    ),
    "small and large place": "the two sizes of model and compute at which choices of the architecture were tried.",
    "as used": (
        "a variant with as many parameters as it has by itself; the others are brought to the baseline's number by the width of "
        "their feed-forward."
    ),
    "octave": "a factor of two, here of learning rate.",
    "MHA, GQA by n, MQA": "attention in which each query head has keys and values of its own, n heads share them, or all do.",
    "qk-norm, relu2": "queries and keys normalised before they meet; a feed-forward with the square of ReLU.",
    "eager, native, compiled": "torch's operations one by one, its fused one, and machine code made of all of them.",
}

# What a reader meets first; what is not named here follows by name.
ORDER = ("claims", "hyperparameters", "compute_scaling", "data_scaling", "model_scaling", "ablations", "quickstart")


def write(results: Path) -> Path:
    """Write results/README.md anew from the reports and tables that lie under ``results``: verdicts and the measured map
    first, where they are there."""
    results = Path(results)
    reports = sorted([*results.glob("*/README.md"), *results.glob("bench/*/README.md")])
    folders = sorted(
        (path.parent for path in reports if path.parent.name != "local"),
        key=lambda folder: ORDER.index(folder.name) if folder.name in ORDER else len(ORDER),
    )
    pieces = [
        "# Results\n\nEvery number here was computed from the records beside it. The first lines of each report stand below; "
        "the reports have the tables, the figures and the doubts; a study's last section has the command that makes it again. "
        "The [words](#words) are explained at the end."
    ]
    texts = pd.DataFrame([row for folder in folders if (row := _laws(folder))])
    for folder in folders:
        title, findings = _first_lines(folder / "README.md")
        link = folder.relative_to(results).as_posix()
        shown = _verdicts(folder, link) or findings
        picture = (
            f"![The map of hyperparameters]({link}/figures/map.png)"
            if (folder / "figures" / "map.png").exists()
            else ""
        )
        pieces.append("\n\n".join(filter(None, [f"## [{title}]({link}/README.md)", shown, picture])))
    if len(texts) > 1:
        write_table(results / "texts.csv", texts)
        pieces.append(
            "## What changes with the text\n\nThe same study on several texts: exponents with 95 % intervals, and the verdict "
            "where they are not identified. Losses of different texts cannot be compared with each other, exponents can.\n\n"
            + _table(texts)
            + "\n\n([texts.csv](texts.csv))"
        )
    pieces.append("## Words\n\n" + "\n".join(f"- **{word}**: {meaning}" for word, meaning in WORDS.items()))
    return write_whole(results / "README.md", "\n\n".join(pieces) + "\n")


def _verdicts(folder: Path, link: str) -> str:
    """The table of verdicts of the claims study; empty for any other."""
    try:
        rows = pd.read_csv(folder / "tables" / "verdicts.csv").to_dict("records")
        parts = [f"{row['supported']} of {row['supported'] + row['refuted'] + row['undecided']}" for row in rows]
        lines = [
            f"| {row['claim']} | {row['sentence']} | **{row['verdict']}** | {row['effect']} | {part} | {row['seeds']} | "
            f"{row['corpus']} | {row['sealed']} |"
            for row, part in zip(rows, parts, strict=True)
        ]
    except (OSError, KeyError, ValueError):
        return ""
    told = (
        "What the design says, tried: the verdict of a rule, the first effect that speaks for the verdict with its 95 % interval, "
        "how many of the claim's comparisons hold, the fewest seeds behind one (rounds where something was timed, 1 where a law "
        "was fitted), the text, and whether the rule was sealed before its data or after some of them, by people who could have "
        f"seen them. All effects and rules are in the [report]({link}/README.md)."
    )
    if rows and len(rows) < rows[0]["of"]:
        told += (
            f" {len(rows)} of the design's {rows[0]['of']} claims are judged so far; the others wait for their studies."
        )
    heads = (
        "| | claim | verdict | effect | comparisons that hold | seeds | text | rule sealed |\n"
        "| ---: | :--- | :--- | :--- | :--- | ---: | :--- | :--- |"
    )
    return f"{told}\n\n{heads}\n" + "\n".join(lines)


def _first_lines(path: Path) -> tuple[str, str]:
    """The title of a report and what stands before its first section."""
    title, _, rest = path.read_text(encoding="utf-8").partition("\n")
    first = rest.split("\n## ")[0].strip()
    return title.removeprefix("# ").strip(), first if first.startswith("- ") else first.split("\n\n")[0]


def _laws(folder: Path) -> dict | None:
    """The exponents of a compute study, None of any other."""
    tables = folder / "tables"
    try:
        laws = pd.read_csv(tables / "laws.csv").set_index(["law", "parameter"])
        minima = pd.read_csv(tables / "isoflop_minima.csv")
        text = read_kept(folder / "corpora.json", lambda kept: kept["corpora"][0]["name"])
    except (OSError, KeyError, ValueError, IndexError):
        return None
    if not set(LAWS.values()) <= set(laws.index):
        return None
    row = {"study": folder.name, "text": text, "from": minima.budget.min(), "to": minima.budget.max()}
    for name, where in LAWS.items():
        found = laws.loc[where]
        row |= {name: found["value"], f"{name} low": found["low"], f"{name} high": found["high"]}
        row[f"{name} status"] = found["status"]
    return row


def _table(texts: pd.DataFrame) -> str:
    heads = ["text", "FLOPs", *LAWS]
    lines = [f"| {' | '.join(heads)} |", "|" + " :--- |" * len(heads)]
    for row in texts.to_dict("records"):
        cells = [f"[{row['text']}]({row['study']}/README.md)", f"{row['from']:.2g} to {row['to']:.2g}"]
        for name in LAWS:
            status = row[f"{name} status"]
            span = interval(row[f"{name} low"], row[f"{name} high"], ".2f")
            cells.append(f"{row[name]:.2f} ({span}{'' if status == 'identified' else f'; {status}'})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
