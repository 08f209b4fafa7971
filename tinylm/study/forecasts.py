"""Forecasts that cannot be improved afterwards: sealed before the run exists, scored once, kept when they fail.

A folder holds one JSON file a forecast, ``<study>-<hash>.json``, and beside it ``<study>-<hash>.score.json`` once its
run was trained. Nothing in the folder is ever rewritten. The ``hash`` is over what the forecast says; the ``checksum``
is over the whole file, its time included, so that a file changed by hand is refused. ``calibration`` judges them all
together, the missed ones too.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from tinylm import files
from tinylm.errors import DamagedFileError, LabError
from tinylm.study.runs import OtherSchemaError
from tinylm.study.scaling import Fit

TARGET = ("params_total", "tokens", "learning_rate", "run_id")
PREDICTION = ("loss", "low", "high")
SCHEMA = 1  # of a seal and of a score
LEVEL = 0.95  # of every interval sealed
HALF_WIDTH = stats.norm.ppf(0.5 * (1 + LEVEL))  # of such an interval, in standard deviations


def predict(fit: Fit, *inputs: float, seed_sd: float) -> dict[str, float]:
    """What ``seal`` takes as prediction: loss and the 95 % interval for one new run at ``inputs`` (params, tokens for a
    surface). The interval combines the bootstrap of the fit with the spread between seeds, seed_sd in nats."""
    row = fit.predict(*inputs, seed_sd=seed_sd).iloc[0]
    return {name: float(row[name]) for name in PREDICTION}


def seal(
    folder: str | os.PathLike, *, study: str, target: dict, prediction: dict, fit: dict, time: str | None = None
) -> Path:
    """Write a forecast before its run exists; returns the file's path.

    target: at least params_total, tokens, learning_rate and run_id, and whatever else names the run (its shape, batch).
    prediction: loss, low and high in nats per token. fit: what it came from, such as ``Fit.to_dict()``.
    time: ISO 8601, by default now. The same content sealed twice gives the first file, with its first time.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", study):
        raise LabError("A study's name is part of a file name: letters, digits, -, _ and .", repr(study))
    for name, values, needed in (("target", target, TARGET), ("prediction", prediction, PREDICTION)):
        missing = [key for key in needed if key not in values]
        if missing:
            raise LabError(f"A forecast's {name} needs {', '.join(needed)}", f"without {', '.join(missing)}")
    loss, low, high = (_number(prediction[name], name) for name in PREDICTION)
    if not low <= loss <= high:
        raise LabError("The predicted loss must lie in its own interval", f"loss={loss}, low={low}, high={high}")
    content = _plain({"study": study, "target": target, "prediction": prediction, "fit": fit})
    digest = files.sha256_bytes(files.canonical_json(content).encode())
    path = Path(folder) / f"{study}-{digest[:16]}.json"
    if path.exists():
        _read(path)
        return path
    return _write_once(path, {"schema": SCHEMA, **content, "hash": digest, "time": _utc(time).isoformat()})


def score(folder: str | os.PathLike, seal: str | os.PathLike, observed: dict) -> dict:
    """Hold a sealed forecast against its run; writes ``<name>.score.json`` beside it and returns what stands there.

    observed: ``loss`` in nats per token and ``time``, when its training started (ISO 8601), its ``run_id``, and its
    ``status``, which may be left out where the run ended well. A run that diverged has no loss (None): its forecast has
    missed. The error is observed - predicted. Raises LabError for a run that started before the seal, for a run that is
    not the one sealed, and for a second, different observation: a forecast is scored once. A damaged seal is refused.
    """
    path = Path(seal) if os.path.dirname(os.fspath(seal)) else Path(folder) / f"{Path(seal).stem}.json"
    forecast = _read(path)
    diverged = observed.get("status") == "diverged"
    needed = ("time", "run_id") if diverged else ("loss", "time", "run_id")
    missing = [key for key in needed if observed.get(key) is None]
    if missing:
        raise LabError("An observation needs loss, time and run_id", f"without {', '.join(missing)}")
    started = _utc(observed["time"])
    if started < _utc(forecast["time"]):
        raise LabError(
            "A forecast is scored by a run that started after it was sealed",
            f"sealed {forecast['time']}, run started {started.isoformat()}",
            "seal a new forecast for a run that is not trained yet",
        )
    if observed["run_id"] != forecast["target"]["run_id"]:
        raise LabError(
            "A forecast is scored by the very run it names",
            f"sealed for run {forecast['target']['run_id']}, observed run {observed['run_id']}",
            "train the sealed run, or seal a forecast for this one before it is trained",
        )
    result = {"schema": SCHEMA, "seal": forecast["hash"], "run_id": observed["run_id"]}
    if diverged:
        result |= {"observed": None, "started": started.isoformat(), "error": None, "error_percent": None}
        result |= {"inside": False, "status": "diverged"}
    else:
        predicted, low, high = (float(forecast["prediction"][name]) for name in PREDICTION)
        loss = _number(observed["loss"], "loss")
        error = loss - predicted
        result |= {"observed": loss, "started": started.isoformat(), "error": error}
        result |= {"error_percent": 100 * error / predicted, "inside": low <= loss <= high}
    beside = path.with_name(f"{path.stem}.score.json")
    if beside.exists():
        before = _read(beside)
        if {key: before.get(key) for key in result} != result:
            raise LabError(
                "A forecast is scored once, and its score stays",
                f"scored {before['observed']} before, {loss} now",
                "seal a new forecast for another run",
            )
        return before
    _write_once(beside, result)
    return _read(beside)


def load(folder: str | os.PathLike) -> pd.DataFrame:
    """Every forecast of a folder, oldest first, the missed ones too, one row each; ``scored`` tells those that still
    wait.

    Columns: name, study, time, params_total, tokens, learning_rate, run_id, flops and reach (the run's compute, and how
    many times the largest behind the fit that is; NaN where the seal does not say), loss, low, high, scored, observed
    (NaN where the run diverged), error (nats), error_percent, inside. A damaged file is an error, never a gap.
    """
    columns = ["name", "study", "time", *TARGET, "flops", "reach", *PREDICTION, "scored", "observed", "error"]
    columns += ["error_percent", "inside"]
    rows = []
    for path in sorted(Path(folder).glob("*.json")):
        if path.name.endswith(".score.json"):
            if not path.with_name(path.name.replace(".score.json", ".json")).exists():
                raise DamagedFileError("A score stands beside its seal", f"{path} alone", "restore the seal")
            continue
        forecast = _read(path)
        row = {"name": path.stem, "study": forecast["study"], "time": forecast["time"]}
        row |= {name: forecast["target"][name] for name in TARGET}
        row |= {name: _or_nan(forecast["target"].get(name)) for name in ("flops", "reach")}
        row |= {name: forecast["prediction"][name] for name in PREDICTION}
        beside = path.with_name(f"{path.stem}.score.json")
        row["scored"] = beside.exists()
        if row["scored"]:
            result = _read(beside)
            if result["seal"] != forecast["hash"]:
                raise DamagedFileError("A score belongs to the seal beside it", beside, "restore the two files")
            row |= {name: _or_nan(result[name]) for name in ("observed", "error", "error_percent")}
            row["inside"] = result["inside"]
        rows.append(row)
    return pd.DataFrame(rows, columns=columns).sort_values(["time", "name"], ignore_index=True)


@dataclass(frozen=True)
class Calibration:
    """How sealed forecasts and what came of them agree.

    table: ``load``'s rows with ``standardised``, the error in standard deviations of its own interval (1.96 is the
    interval's end; NaN for those that wait or whose run diverged). sealed, scored, inside: how many; a run that
    diverged is scored, and not inside. share: 95 % interval (Clopper and Pearson 1934) of the long-run share inside,
    as far as these tell it. mean, rms: of the standardised errors; honest intervals give about 0 and 1. luck: the
    probability that honest 95 % intervals would hold so few or fewer.
    """

    table: pd.DataFrame
    sealed: int
    scored: int
    inside: int
    share: tuple[float, float]
    mean: float
    rms: float
    luck: float

    @property
    def verdict(self) -> str:
        """``too narrow``, ``too wide``, ``leaning`` (all to one side), or ``no fault seen``; ``nothing scored``."""
        errors = self.table["standardised"].dropna()
        if not self.scored:
            return "nothing scored"
        if self.luck < 0.05:
            return "too narrow"
        if len(errors) > 1 and abs(self.mean) * len(errors) ** 0.5 > HALF_WIDTH:
            return "leaning"
        if len(errors) > 1 and self.rms**2 * len(errors) < stats.chi2.ppf(0.025, len(errors)):
            return "too wide"
        return "no fault seen"

    def sentence(self) -> str:
        """How many were sealed, how many came out inside, which did not, and what that says of the intervals."""
        waiting = self.sealed - self.scored
        text = [f"{_count(self.sealed, 'forecast was', 'forecasts were')} sealed before the run existed."]
        if waiting:
            text[0] = f"{text[0][:-1]}; {_count(waiting, 'run is', 'runs are')} still to come."
        if not self.scored:
            return text[0]
        low, high = self.share
        text.append(
            f"{self.inside} of {self.scored} came out inside the 95 % interval; as far as so many can tell, the long-run "
            f"share lies between {low:.0%} and {high:.0%}."
        )
        for row in self.table[self.table["inside"].eq(False)].itertuples():
            how = "its run diverged" if np.isnan(row.observed) else f"{row.error_percent:+.2f} %"
            text.append(f"Missed: {row.name} ({how}).")
        if np.isfinite(self.rms):
            text.append(
                f"In standard deviations of their own intervals the errors average {self.mean:+.2f}, and their root mean "
                f"square is {self.rms:.2f}; honest intervals give about 0 and 1."
            )
        text.append(
            {
                "too narrow": "The intervals are too narrow: honest ones would hold so few with a probability of only "
                f"{self.luck:.2g}.",
                "leaning": f"The forecasts lean: what came out was {'above' if self.mean > 0 else 'below'} them more than "
                "chance explains.",
                "too wide": "The intervals are wider than they need be.",
                "no fault seen": f"Nothing speaks against the intervals; {_count(self.scored, 'score', 'scores')} could "
                f"not show more (honest intervals hold so few, or fewer, with probability {self.luck:.2g}).",
            }[self.verdict]
        )
        return " ".join(text)


def calibration(forecasts: pd.DataFrame | str | os.PathLike) -> Calibration:
    """All forecasts ever sealed, held against what came out. forecasts: ``load``'s table, or the folder itself."""
    table = (forecasts if isinstance(forecasts, pd.DataFrame) else load(forecasts)).copy()
    error = table["error"].astype(float)
    side = np.where(error > 0, table["high"] - table["loss"], table["loss"] - table["low"]).astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        standardised = np.where(error == 0, 0.0, error / (side / HALF_WIDTH))
    table["standardised"] = standardised
    scored = table["scored"].astype(bool)
    count, inside = int(scored.sum()), int(table["inside"].eq(True).sum())
    known = table["standardised"].dropna()
    return Calibration(
        table=table,
        sealed=len(table),
        scored=count,
        inside=inside,
        share=(
            float(stats.beta.ppf(0.025, inside, count - inside + 1)) if inside else 0.0,
            float(stats.beta.ppf(0.975, inside + 1, count - inside)) if inside < count else 1.0,
        ),
        mean=float(known.mean()) if len(known) else math.nan,
        rms=float(np.sqrt((known**2).mean())) if len(known) else math.nan,
        luck=float(stats.binom.cdf(inside, count, LEVEL)),
    )


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _write_once(path: Path, content: dict) -> Path:
    """Write a JSON file with its checksum, unless a file of that name is there already: then that one stays."""
    content = {**content, "checksum": files.sha256_bytes(files.canonical_json(content).encode())}
    aside = files.write_whole(path.with_name(f"{path.name}.{os.getpid()}.new"), json.dumps(content, indent=2) + "\n")
    try:
        os.link(aside, path)  # unlike a rename, a link never replaces what another process wrote in between
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        if not path.exists():
            os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    files.sync_folder(path.parent)
    _read(path)
    return path


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise OtherSchemaError(
                f"This version of tinylm reads schema {SCHEMA} of sealed forecasts and their scores",
                f"{path}: schema {content['schema']!r}",
                "use the version of tinylm that wrote it",
            )
        checksum = content.pop("checksum")
        same = files.sha256_bytes(files.canonical_json(content).encode()) == checksum
        if "target" in content:
            said = {name: content[name] for name in ("study", "target", "prediction", "fit")}
            same = same and files.sha256_bytes(files.canonical_json(said).encode()) == content["hash"]
    except OtherSchemaError:
        raise
    except FileNotFoundError as error:
        raise LabError(
            "There must be a sealed forecast of that name", path, "see load(folder) for the names"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError("A sealed forecast must be readable", f"{path}: {error!r}", "restore it") from error
    if not same:
        raise DamagedFileError(
            "A sealed forecast must be as it was sealed",
            f"{path} was changed: its checksum differs",
            "restore the file from the repository's history",
        )
    return content


def _plain(content: dict) -> dict:
    """The content as JSON holds it (numpy's numbers as numbers), so that its hash does not depend on who wrote it."""
    try:
        return json.loads(json.dumps(content, default=lambda value: value.item(), allow_nan=False))
    except (TypeError, ValueError, AttributeError) as error:
        raise LabError(
            "A forecast holds plain, finite values", str(error), "None stands for what is not known"
        ) from error


def _number(value: object, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise LabError(f"{name} must be a finite number", repr(value))
    return number


def _utc(time: str | None) -> datetime.datetime:
    if time is None:
        now = datetime.datetime.now(datetime.UTC)
        return now.replace(microsecond=now.microsecond // 1000 * 1000)  # whole milliseconds, as runs record their start
    try:
        moment = datetime.datetime.fromisoformat(str(time))
    except ValueError as error:
        raise LabError("A time is written in ISO 8601", repr(time), "such as 2031-05-04T12:00:00+00:00") from error
    return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
