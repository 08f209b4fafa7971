"""Anyone's runs: a CSV file in, a law with its diagnosis out. What ``tinylm fit`` does.

No row is dropped unless a rule that the person gave says so, and the report tells which. A cell that is not a positive,
finite number is an error that names its line.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from tinylm.errors import LabError
from tinylm.study import doctor
from tinylm.study.optima import frontier
from tinylm.study.scaling import (
    Fit,
    finite,
    fit_data_constrained,
    fit_power,
    fit_surface,
    isoflop_laws,
    isoflop_minima,
)

FORMS = ("surface", "power", "isoflop", "data-constrained")
ROLES = {
    "params": "params_total",
    "tokens": "tokens_seen",
    "loss": "val_loss",
    "flops": "flops",
    "unique_tokens": "unique_tokens",
}
_COMPARE = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
}


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Runs:
    """Rows of a table, ready to fit. frame: the roles that were asked for (params, tokens, loss, ...) as numbers, ``line``
    as an editor counts them, and every other column of the file as text. columns: role -> column of the file. dropped:
    for each rule its text and the lines it dropped."""

    path: str
    frame: pd.DataFrame
    columns: dict[str, str]
    dropped: dict[str, list[int]]

    def sentences(self) -> list[str]:
        """What was read and what was left out, in words."""
        said = [f"{len(self.frame)} rows of {self.path}"]
        for rule, lines in self.dropped.items():
            shown = ", ".join(map(str, lines[:12])) + (", ..." if len(lines) > 12 else "")
            many = "" if len(lines) == 1 else "s"
            said.append(f"dropped by the rule {rule}: {len(lines)} row{many}" + f" (line{many} {shown})" * bool(lines))
        return said


def read_runs(path: str | Path, columns: dict[str, str], drop: Sequence[str] = ()) -> Runs:
    """Read the columns (role -> name in the file) of a CSV file; comma, semicolon or tab, as its header shows.

    drop: rules such as ``loss>4``, ``params<1e6 and epochs>4``, ``status!=finished``: a role, ``epochs`` (tokens over
    unique_tokens) or any column of the file, one of < <= > >= == !=, and a number or (for == and !=) a text. ``bad``
    drops the rows whose cells are not positive, finite numbers, or more than the header names. A first line without any
    number in those columns tells their units and is dropped, by the rule ``units``. Raises LabError for files and
    rules that cannot be read, for columns that are not there once, and for bad rows that no rule drops, by line.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            file.seek(0)
            delimiter = max(",;\t", key=header.count)
            rows = csv.DictReader(file, delimiter=delimiter, skipinitialspace=True)
            rows.fieldnames = names = [name.strip() for name in rows.fieldnames or []]
            lines = [(rows.line_num, row) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LabError(
            "The table must be a readable CSV file in UTF-8", f"{path}: {error}", "check the path"
        ) from error
    for role, name in columns.items():
        if names.count(name) != 1:
            raise LabError(
                "The table must have each column that is named, once",
                f"{names.count(name) or 'no'} {name!r} in {path}",
                f"the columns are {', '.join(names)}; say which one holds {role}" if names else "the file is empty",
            )
    if not lines:
        raise LabError("The table must hold runs", f"{path} has a header and no rows")
    number = functools.partial(_number, decimal_comma=delimiter == ";")
    rules = [(text, _rule(text, columns, names, number)) for text in drop]
    dropped: dict[str, list[int]] = {text: [] for text, _ in rules}
    first, cells = lines[0]
    if all(
        re.fullmatch(r"(?!\s*[+-]?(nan|inf|none|n/?a)\b)\D*[^\W\d]\D*", str(cells.get(c)), re.I)
        for c in columns.values()
    ):
        dropped["units"] = [first]
        lines = lines[1:]
    kept, wrong = [], []
    for line, row in lines:
        numbers = {role: number(row.get(name)) for role, name in columns.items()}
        bad = [f"line {line}: {columns[r]}={row.get(columns[r])!r}" for r, v in numbers.items() if not 0 < v < math.inf]
        if any(row.get(None, ())):  # a comma too many shifts every cell after it
            bad = [f"line {line}: {len(names) + len(row[None])} cells for {len(names)} columns"]
        if {"tokens", "unique_tokens"} <= set(numbers):
            numbers["epochs"] = numbers["tokens"] / numbers["unique_tokens"] if not bad else math.nan
        hit = next((text for text, test in rules if (bool(bad) if test is None else test(row, numbers))), None)
        if hit is not None:
            dropped[hit].append(line)
        elif bad:
            wrong += bad
        else:
            taken = {*ROLES, "epochs", "line", None}  # a column of that name which is not asked for is none of ours
            rest = {name: value for name, value in row.items() if name not in taken}
            kept.append({**rest, **numbers, "line": line})
    if wrong:
        raise LabError(
            "Every row must hold positive, finite numbers",
            "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""),
            "mend those lines, or leave them out with --drop bad",
        )
    if not kept:
        raise LabError("Some rows must be left to fit", f"the rules {', '.join(dropped)} drop every row")
    return Runs(str(path), pd.DataFrame(kept), dict(columns), dropped)


def _number(text: object, decimal_comma: bool = False) -> float:
    """A cell as a number, NaN where it is none. Thousands may be parted by commas, spaces or underscores; where cells are
    parted by semicolons, one comma is the decimal one, and points part thousands."""
    text = str(text).strip()
    if decimal_comma and text.count(",") < 2 and (text.rfind(",") > text.rfind(".") or text.count(".") > 1):
        text = text.replace(".", "").replace(",", ".")
    if re.fullmatch(r"[+-]?\d{1,3}([,_ \u00a0\u2009\u202f])\d{3}(\1\d{3})*(\.\d*)?([eE][+-]?\d+)?", text):
        text = re.sub(r"[,_ \u00a0\u2009\u202f]", "", text)
    try:
        return float(text)
    except ValueError:
        return math.nan


def _rule(text: str, columns: dict[str, str], names: list[str], number: Callable):
    """A rule as a test of (row, numbers), or None for ``bad``."""
    if text.strip() == "bad":
        return None
    tests = []
    for part in re.split(r"\s+and\s+", text.strip()):
        found = re.fullmatch(r"(.+?)\s*(<=|>=|==|!=|<|>|=)\s*(.+)", part)
        if not found:
            raise LabError(
                "A rule compares a column with a value", repr(text), 'write it as "loss>4" or "params<1e6 and epochs>4"'
            )
        name, sign, value = found[1].strip(), found[2], found[3].strip().strip("'\"")
        role = name.replace("-", "_")
        known = [*columns, *(["epochs"] if {"tokens", "unique_tokens"} <= set(columns) else [])]
        if role not in known and name not in names:
            raise LabError(
                "A rule names a column of the table",
                f"{name!r} in {text!r}",
                f"there are {', '.join([*known, *names])}",
            )
        if math.isnan(number(value)) and sign not in ("==", "!=", "="):
            raise LabError("A rule's limit must be a number", f"{value!r} in {text!r}")
        tests.append((role if role in known else name, role in known, _COMPARE[sign], value))

    def test(row: dict, numbers: dict) -> bool:
        for name, is_role, compare, value in tests:
            own = numbers[name] if is_role else row.get(name)
            if math.isnan(number(value)):
                if not compare(str(own).strip(), value):
                    return False
            elif not compare(own if is_role else number(own), number(value)):
                return False
        return True

    return test


# ------------------------------------------------------------------------------------------------------------- fitting


@dataclass(frozen=True)
class Answer:
    """A law for a table of runs: ``text`` to read, ``content`` as JSON holds it. fit and diagnosis are None for isoFLOP
    laws, whose ``Fit``s are in ``laws``."""

    text: str
    content: dict
    fit: Fit | None = None
    diagnosis: doctor.Diagnosis | None = None
    laws: dict[str, Fit] = dataclasses.field(default_factory=dict)


def fit_file(
    path: str | Path,
    columns: dict[str, str | None] | None = None,
    form: str | None = None,
    drop: Sequence[str] = (),
    objective: str = "huber",
    delta: float = 1e-3,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Answer:
    """Fit a form to a CSV file and diagnose it.

    columns: role (params, tokens, loss, flops, unique_tokens) -> column; what is not given has the lab's own name where
    the form needs it. form: one of ``FORMS``; None is ``data-constrained`` where unique_tokens is given, else
    ``surface``. Tokens that are not given are FLOPs / (6 N) where FLOPs are; a ``power`` law is in the one variable
    that is given, or else of the compute frontier; isoFLOP budgets are FLOPs, or 6 N D.
    """
    given = {role: name for role, name in (columns or {}).items() if name}
    form = form or ("data-constrained" if "unique_tokens" in given else "surface")
    if form not in FORMS:
        raise LabError(f"The form must be one of {', '.join(FORMS)}", form)
    single = form == "power" and len({"params", "tokens", "flops"} & set(given)) == 1
    needed = ["loss"] if single else ["params", "loss"]
    if not single and not ("tokens" not in given and "flops" in given):
        needed.append("tokens")
    if form == "data-constrained":
        needed.append("unique_tokens")
    runs = read_runs(path, {**{role: ROLES[role] for role in needed}, **given}, drop)
    notes = runs.sentences()[1:]
    frame = runs.frame
    if "tokens" not in frame and not single:
        frame["tokens"] = frame["flops"] / 6 / frame["params"]
        notes.append("No column of tokens is given: D = C / (6 N).")
    notes += _doubts(frame, form)
    options = {"objective": objective, "delta": delta, "bootstrap": bootstrap, "seed": seed}
    if form == "isoflop":
        return _isoflop(runs, notes, options)
    accounting = None
    if form == "power":
        fit, more = _power(frame, single, given, options)
        notes += more
    elif form == "surface":
        fit = fit_surface(frame["params"], frame["tokens"], frame["loss"], **options)
        accounting = _accounting(frame, given, options)
    else:
        fit = fit_data_constrained(frame["params"], frame["tokens"], frame["unique_tokens"], frame["loss"], **options)
    diagnosis = doctor.diagnose(fit, accounting=accounting, bootstrap=bootstrap, seed=seed)
    if len(diagnosis.outliers) and fit.n == len(frame):
        lines = ", ".join(map(str, frame["line"].iloc[diagnosis.outliers.index]))
        diagnosis.notes.append(f"The outliers stand in lines {lines}.")
    content = fit.to_dict()
    content |= {"form": form, "status": diagnosis.status, "warnings": [*notes, *fit.warnings]}
    content["intervals"] = {name: _pair(diagnosis.verdicts.loc[name]) for name in fit.params}
    content["interval_method"] = "bootstrap" if len(fit.samples) else "profile"
    content["a"] = finite(fit.a)
    has_a = "a" in diagnosis.verdicts.index
    content["a_interval"] = _pair(diagnosis.verdicts.loc["a"]) if has_a else [None, None]
    content["a_status"] = diagnosis.verdicts["status"]["a"] if has_a else None
    content |= {"rows": _rows(runs), "doctor": diagnosis.to_dict()}
    text = "\n".join([f"{runs.sentences()[0]}.", *(f"- {note}" for note in notes), "", diagnosis.report()])
    return Answer(text, content, fit, diagnosis)


def _pair(row: pd.Series) -> list[float | None]:
    return [finite(row["low"]), finite(row["high"])]


def _rows(runs: Runs) -> dict:
    return {"file": runs.path, "columns": runs.columns, "used": len(runs.frame), "dropped": runs.dropped}


def _doubts(frame: pd.DataFrame, form: str) -> list[str]:
    """What looks odd about the columns before anything is fitted."""
    notes = []
    if frame["loss"].median() > 20:
        notes.append("The loss is above 20 in most rows: nats per token are meant, not perplexity.")
    if {"params", "tokens", "flops"} <= set(frame):
        ratio = frame["flops"] / (6 * frame["params"] * frame["tokens"])
        middle = ratio.median()
        if not 0.2 < middle < 5:
            notes.append(
                f"FLOPs are {middle:.3g} times 6 N D: the columns seem to be in units of different size. Exponents do not "
                "depend on units, coefficients do."
            )
    if "numerics_revision" in frame and len(kinds := sorted(set(frame["numerics_revision"].astype(str)))) > 1:
        notes.append(
            f"The rows are of several numerics revisions ({', '.join(kinds)}), computed differently: fit each alone, as with "
            f'--drop "numerics_revision!={kinds[-1]}".'
        )
    if "unique_tokens" in frame and form == "surface" and (frame["epochs"] > 1.02).any():
        count = int((frame["epochs"] > 1.02).sum())
        notes.append(
            f"{count} of {len(frame)} rows repeat their text, which a surface takes for new: see data-constrained."
        )
    return notes


def _power(frame: pd.DataFrame, single: bool, given: dict, options: dict) -> tuple[Fit, list[str]]:
    """A power law in the one variable given, with a floor where four values allow one; else along the frontier."""
    if single:
        role = next(role for role in ("params", "tokens", "flops") if role in given)
        x, y, notes = frame[role], frame["loss"], [f"The law is in x = {given[role]}."]
    else:
        flops = frame["flops"] if "flops" in frame else 6 * frame["params"] * frame["tokens"]
        chosen = frontier(flops, frame["loss"])
        x, y = flops.to_numpy(float)[chosen], frame["loss"].to_numpy(float)[chosen]
        source = "the column of FLOPs" if "flops" in frame else "6 N D"
        notes = [
            f"N and D both vary, so the law is that of the compute frontier, in x = C ({source}): the {len(chosen)} of "
            f"{len(frame)} rows whose loss no cheaper row reaches. Give one of params, tokens, flops for a law in it alone."
        ]
    floor = len(np.unique(np.round(np.log(np.asarray(x, float)), 2))) >= 4
    if not floor:
        notes.append("Fewer than four distinct values of x: the law is fitted without a floor.")
    return fit_power(x, y, floor=floor, **options), notes


def _accounting(frame: pd.DataFrame, given: dict, options: dict) -> pd.DataFrame | None:
    """The other ways to count, where the table holds them: exact FLOPs, and the lab's own counts of parameters."""
    counts = {given.get("params", "params_total"): frame["params"]}
    own = [name for name in ("params_non_embedding", "params_embedding", "params_head") if name in frame]
    if given.get("params", "params_total") == "params_total" and own:
        numbers = frame[own].apply(pd.to_numeric, errors="coerce").assign(params_total=frame["params"])
        ways = doctor.conventions(numbers)
        counts = {name: column for name, column in ways.items() if (column > 0).all()}
    if len(counts) == 1 and "flops" not in frame:
        return None
    options = {**options, "bootstrap": min(options["bootstrap"], 300)}
    return doctor.accounting(frame, counts, "tokens", "loss", "flops" if "flops" in frame else None, **options)


def budgets_of(flops: object, most: float = 1.35) -> tuple[np.ndarray, bool]:
    """The budget of each row (the geometric mean of its group), and whether the rows lie on budgets at all: groups are
    parted by gaps of 15 %; where one spans more than ``most``, rows are put into bins of that width instead."""
    logs = np.log(np.asarray(flops, float))
    order = np.argsort(logs)
    group = np.zeros(len(logs), int)
    group[order] = np.cumsum(np.diff(logs[order], prepend=logs[order][0]) > np.log(1.15))
    spans = pd.Series(logs).groupby(group).agg(np.ptp)
    real = bool((spans <= np.log(most)).all())
    if not real:
        group = ((logs - logs.min()) / (np.log(most) + 1e-12)).astype(int)
    return np.exp(pd.Series(logs).groupby(group).transform("mean").to_numpy()), real


def _isoflop(runs: Runs, notes: list[str], options: dict) -> Answer:
    """Parabolas at equal compute and the laws of their minima, with the surface of the same rows beside them."""
    frame = runs.frame.copy()
    if "flops" not in frame:
        frame["flops"] = 6 * frame["params"] * frame["tokens"]
        notes.append("No column of FLOPs is given: C = 6 N D.")
    frame["budget"], real = budgets_of(frame["flops"])
    surface = None
    if len(frame) >= 8:
        surface = fit_surface(frame["params"], frame["tokens"], frame["loss"], **options)
    if not real:
        notes.append("The rows do not lie on budgets; they are put into bins of compute, 1.35-fold wide.")
    move = (frame["budget"] / frame["flops"]).to_numpy(float)
    if surface is not None and np.abs(np.log(move)).max() > 0.01:
        # A row somewhat off its budget is moved onto it, with the tokens that buys, along the surface.
        there = surface.predict(frame["params"], frame["tokens"] * move)["loss"].to_numpy()
        here = surface.predict(frame["params"], frame["tokens"])["loss"].to_numpy()
        frame["loss"], frame["tokens"] = frame["loss"] + there - here, frame["tokens"] * move
        notes.append("Rows are moved along the fitted surface to the exact compute of their budget.")
    names = dict(budget="budget", params="params", tokens="tokens", loss="loss")
    table = frame[[*names]]
    minima = isoflop_minima(table, **names)
    laws: dict[str, Fit] = {}
    scatter = math.nan
    if minima["inside"].sum() >= 2:
        found = isoflop_laws(table, **names, bootstrap=options["bootstrap"] or 1000, seed=options["seed"])
        minima, laws, scatter = found.minima, found.laws, found.scatter
        notes += found.warnings
    else:
        notes.append(
            f"{int(minima['inside'].sum())} of {len(minima)} budgets have their minimum inside the sizes tried, and a law "
            "needs two: no exponent can be told."
        )
    used = (("N_opt", "k", "k_N"), ("N_opt", "a", "a"), ("D_opt", "k", "k_D"), ("D_opt", "a", "b"),
            ("L_min", "A", "A"), ("L_min", "alpha", "alpha"))  # fmt: skip
    params, intervals, status = {}, {}, {}
    for law, own, name in used:
        known = law in laws
        params[name] = finite(laws[law].params[own]) if known else None
        intervals[name] = [finite(v) for v in laws[law].intervals[own]] if known else [None, None]
        status[name] = laws[law].status[own] if known else "not identified"
    warnings = [*notes, *(said for fit in laws.values() for said in fit.warnings)]
    content = {
        "n": len(frame),
        "form": "isoflop",
        "objective": "lsq",
        "delta": None,
        "value": finite(laws["N_opt"].value) if laws else None,
        "params": params,
        "intervals": intervals,
        "starts": 1,
        "starts_agreeing": 1,
        "status": status,
        "warnings": list(dict.fromkeys(warnings)),
        "a": params["a"],
        "a_interval": intervals["a"],
        "a_status": status["a"],
        "scatter": finite(scatter),
        "budgets": [
            {key: finite(v) if isinstance(v, float) else v for key, v in row.items()}
            for row in minima.to_dict("records")
        ],
        "surface": surface.to_dict() if surface is not None else None,
        "rows": _rows(runs),
    }
    lines = [f"{runs.sentences()[0]}.", *(f"- {note}" for note in dict.fromkeys(warnings)), ""]
    lines.append("The best size at each budget, by a parabola of loss in log N; intervals are 95 %.\n")
    for row in minima.to_dict("records"):
        place = "" if row["inside"] else "  (the edge of the sizes tried)"
        lines.append(
            f"  {row['budget']:.3g} FLOPs: N = {row['params_opt']:.3g}{_span(row, 'params')}, D = {row['tokens_opt']:.3g}"
            f"{_span(row, 'tokens')}, loss {row['loss_min']:.4g}{_span(row, 'loss')}, {row['sizes']} sizes{place}"
        )
    lines.append("\nN_opt = k_N C^a, D_opt = k_D C^b, L_min = A C^-alpha")
    for name, value in params.items():
        if value is not None:
            low, high = intervals[name]
            span = "[no interval]" if low is None else f"[{low:.4g}, {high:.4g}]"
            lines.append(f"  {name:6s} {value:<11.4g} {span:26s} {status[name]}")
    if surface is not None:
        lines.append(f"\nParabolas are biased on wide grids. The surface of the same rows: {surface.sentence()}")
    return Answer("\n".join(lines), content, None, None, laws)


def _span(row: dict, name: str) -> str:
    low, high = row.get(f"{name}_low", math.nan), row.get(f"{name}_high", math.nan)
    return f" [{low:.3g}, {high:.3g}]" if low == low else ""
