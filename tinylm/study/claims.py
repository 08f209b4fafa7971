"""The fifteen claims on trial, as data, and their verdicts, from records.

A claim is a sentence with a rule: what is measured, and between which bounds the claim holds. A study that serves a claim
``seal``s its rule in its results folder before its first run, and writes what it measured into tables/effects.csv; ``judge``
reads both. Studies of laws, which know nothing of claims, are read by the functions of ``READERS``.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from tinylm import files
from tinylm.errors import LabError
from tinylm.study import contents, plots, scaling
from tinylm.study.contrasts import MARGIN
from tinylm.study.parameters import ClaimsParameters, repository, within_repository
from tinylm.study.report import Report, interval, write_table
from tinylm.study.runs import _read_checked, _write_checked, load_runs, read_kept, read_record

# ------------------------------------------------------------------------------------------------------- claims as data

# A row of tables/effects.csv: the name of a ``Part``; the effect with its 95 % and 90 % intervals (equal ends where it is
# exact; the latter wider where a study looked more than once); p after correction where the study tests several (else empty);
# the unit; seeds behind it; the run_ids behind it, with blanks between; and, where the effect is a plain difference of mean
# losses, the run_ids of what is taken away, in the order of the same seeds. The run of another study is named study/run_id.
COLUMNS = ("part", "effect", "low", "high", "low_90", "high_90", "p", "unit", "seeds", "runs", "base_runs")
TIMED = ("norms", "decoding")  # studies that time code and train nothing: their effects have no run_ids
SEEDED = ("ablations", "data_quality", "extrapolation")  # studies whose intervals narrow as seeds are added
TIMINGS = "timings.json"  # where these keep what they timed

Bounds = tuple[float | None, float | None]


@dataclass(frozen=True)
class Part:
    """One comparison of a claim. name: of the row in the study's effects. about: what is measured, and how. supported: the
    bounds between which the claim holds of it (None is without end); refuted: those between which it fails, by default
    everywhere else. level: of the interval that must lie within ``supported``; 90 makes it two one-sided tests at 5 %.
    decides: whether the verdict hangs on it, or it is shown beside."""

    name: str
    study: str
    about: str
    supported: Bounds
    refuted: Bounds | None = None
    level: int = 95
    decides: bool = True

    def verdict(self, row: pd.Series) -> str:
        """``supported``, ``refuted`` or ``undecided`` for one row of effects."""
        low, high = (row.low, row.high) if self.level == 95 else (row.low_90, row.high_90)
        if _within(low, high, self.supported) and _told(row, self.supported):
            return "supported"
        if self.refuted is None:
            least, most = self.supported
            outside = (least is not None and row.high < least) or (most is not None and row.low > most)
            return "refuted" if outside and _told(row, self.supported) else "undecided"
        return "refuted" if _within(row.low, row.high, self.refuted) and _told(row, self.refuted) else "undecided"

    def seeds_to_decide(self, row: pd.Series) -> float:
        """How many seeds would decide it, were the effect what it seems: those that bring the interval within the bounds that
        the effect lies in, of which two sets may overlap (the sooner counts), and p below 5 % where the rule asks for that.
        Infinite where the effect lies on a bound."""
        effect, wide = row.effect, 0.5 * (row.high - row.low)
        inside = _within(effect, effect, self.supported)
        ways = [(self.supported, wide if self.level == 95 else 0.5 * (row.high_90 - row.low_90))] if inside else []
        if self.refuted is None and not inside:
            ways.append((self.supported, wide))  # refuted is everywhere else
        elif self.refuted is not None and _within(effect, effect, self.refuted):
            ways.append((self.refuted, wide))
        return min(
            (float(np.ceil(row.seeds * _shrink(row, bounds, half) ** 2)) for bounds, half in ways), default=math.inf
        )


def _within(low: float, high: float, bounds: Bounds) -> bool:
    least, most = bounds
    return (least is None or low > least) and (most is None or high < most)


def _told(row: pd.Series, bounds: Bounds) -> bool:
    """Where a bound is zero, a corrected p must agree that the effect is not zero."""
    return not (0 in bounds and math.isfinite(row.p)) or row.p < 0.05


def _shrink(row: pd.Series, bounds: Bounds, half: float) -> float:
    """By how much the errors of a row must shrink for an interval of this half width to keep clear of the bounds, and for a
    corrected p to agree where one is asked for."""
    distance = min(abs(row.effect - end) for end in bounds if end is not None)
    needed = half / distance if distance else math.inf
    if not _told(row, bounds):
        sure = stats.norm.isf(row.p / 2)
        needed = max(needed, stats.norm.isf(0.025) / sure if sure > 0 else math.inf)
    return needed


@dataclass(frozen=True)
class Claim:
    """A sentence on trial. margin: what counts as equal, minimal or about, in words. rule: how the verdicts of the parts make
    that of the claim, in words beside ``RULE``."""

    number: int
    title: str
    sentence: str
    margin: str
    parts: tuple[Part, ...]
    rule: str = ""

    @property
    def hash(self) -> str:
        """16 hex digits over all of it: any change of words, bounds or parts is another rule."""
        return files.sha256_bytes(files.canonical_json([RULE, dataclasses.asdict(self)]).encode())[:16]

    @property
    def studies(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part.study for part in self.parts))


RULE = (
    "A part is supported where its interval (95 %, or 90 % for equality, which is two one-sided tests at 5 %) lies within the "
    "bounds stated, refuted where its 95 % interval lies outside them (or within those stated for that), and else undecided; "
    "where a bound is zero and several contrasts are tested, the p corrected by Holm must be below 5 % too. A claim is "
    "supported where all its deciding parts are, refuted where one is refuted, and else undecided at this scale."
)
ABOVE, BELOW, EQUAL = (0.0, None), (None, 0.0), (-MARGIN, MARGIN)
PLACES = ("small", "large")  # the two fixed points of the ablations
_LOSS = "loss of the variant less the baseline's, nats per token, equal total parameters within 1 % and equal tokens"


def _contrasts(variant: str, supported: Bounds, **options: object) -> tuple[Part, ...]:
    """The contrast of one variant with the baseline at both places."""
    about = options.pop("about", _LOSS)
    return tuple(Part(f"{place}: {variant}", "ablations", about, supported, **options) for place in PLACES)


def _unbeaten(variant: str) -> tuple[Part, ...]:
    """An alternative does not beat the baseline: it is not better by more than the margin, or else not better at all."""
    return _contrasts(variant, (-MARGIN, None), refuted=BELOW)


def _by_place(name: str, study: str, about: str, supported: Bounds, **options: object) -> tuple[Part, ...]:
    return tuple(Part(f"{place}: {name}", study, about, supported, **options) for place in PLACES)


_REACHES = ("T to 2T", "2T to 4T", "4T to 8T")
_SCORED = (
    "mean loss over the positions named, on `stories`, T the training length, models trained on windows of T at equal tokens "
    "and seeds (three at least), the very same tokens scored for all; interval over seeds and stretches of text"
)
_RANGE = (
    "the loss at a quarter less the loss at four times of it, by the surface (or by L(C) for compute) of the compute study at "
    "the place's size and tokens, less the range of the loss over the alternatives of the architecture choice that matters "
    "most there; nats per token"
)
_DOUBLING = "what twice of the first takes off the loss less what the second does, at the place's size and tokens, nats per token"
_QUALITY = (
    "three seeds, judged on clean validation text, 400,000 distinct clean tokens read once, at the two sizes 32 x 2 (small) and "
    "64 x 2 (large)"
)

CLAIMS = (
    Claim(
        1, "RMSNorm", "RMSNorm is faster than LayerNorm and equally effective.",
        f"equal is within {MARGIN} nats; a faster step is one that takes at least 1 % less time",
        (
            *(
                Part(
                    f"norm alone, {path}", "norms",
                    "time of RMSNorm, forward and backward, over LayerNorm's, less one; 4096 x 256 activations, fp32, one "
                    f"thread, {path} code, idle machine, interleaved rounds (20 at least), interval over rounds", BELOW,
                )
                for path in ("eager", "native", "compiled")
            ),
            Part(
                "whole step", "norms",
                "time of a whole training step with RMSNorm over that with LayerNorm, less one; 256 x 6, 16 windows of 256, "
                "one thread, the path that the machine picks, interleaved rounds", (None, -0.01),
            ),
            *_contrasts("layernorm", EQUAL, level=90),
        ),
    ),
    Claim(
        2, "pre-norm", "Pre-norm trains more stably than post-norm.",
        "half an octave of learning rate, the step of the grid",
        (
            *(
                Part(
                    f"largest stable rate, {warmup}", "stability",
                    "log2 of pre-norm's largest stable learning rate over post-norm's, mean over depths of 2, 4, 8 and 16 layers "
                    "of hidden size 32; a rate is stable where no seed of three diverges or ends 0.5 nats above the best rate "
                    f"of its depth and position; {warmup}; grid of half octaves; interval over depths and seeds", (0.5, None),
                )
                for warmup in ("with warmup", "without warmup")
            ),
            Part(
                "share of diverged runs", "stability",
                "share of post-norm's runs that diverge less pre-norm's, over the same grid of rates, depths, warmups and seeds",
                ABOVE,
            ),
        ),
    ),
    Claim(
        3, "SwiGLU", "SwiGLU is better than GELU and ReLU at equal parameters.", "better is any difference told from zero",
        (*_contrasts("gelu", ABOVE), *_contrasts("relu", ABOVE)),
    ),
    Claim(
        4, "RoPE", "RoPE extrapolates better than learned and sinusoidal positions.", "better is any difference told from zero",
        (
            *(
                Part(f"{kind} less rope, {reach}", "extrapolation", f"{_SCORED}{how}", ABOVE)
                for kind, how in (
                    ("sinusoidal", "; each kind's own angles or table, carried on"),
                    ("learned", "; the learned table ends at T, so its model slides a window of T; RoPE's angles are carried on"),
                )
                for reach in _REACHES
            ),
            *(
                Part(f"rope less its own sliding window, {reach}", "extrapolation", _SCORED, (None, MARGIN), decides=False)
                for reach in _REACHES
            ),
        ),
    ),
    Claim(
        5, "GQA", "Grouped-query attention is faster than multi-head attention with minimal loss of quality.",
        "faster is 10 % more tokens a second; minimal is less than 0.02 nats",
        (
            Part(
                "tokens a second, groups of 3", "decoding",
                "tokens a second of GQA with three query heads a key-value head over MHA's, less one; 12 layers of 768 with 12 "
                "heads, context 4096, batch 8, fp32, all cores, interleaved rounds, interval over rounds", (0.1, None),
            ),
            Part(
                "cache bytes, groups of 3", "decoding", "bytes of the key-value cache of the same, over MHA's; exact",
                (None, 0.5), decides=False,
            ),
            *_contrasts("gqa by 3 as used", (None, 0.02), about="loss above MHA's, nats per token, equal tokens"),
            *_contrasts("gqa by 3", (None, 0.02), decides=False),
        ),
    ),
    Claim(
        6, "tied embeddings", "Tied embeddings save parameters.",
        f"a saving is 1 % of the parameters at least; it costs nothing where the loss is not more than {MARGIN} nats above",
        (
            *_by_place("share of the head", "ablations", "parameters of an untied head over all; exact", (0.01, None)),
            *_contrasts("untied", (-MARGIN, None)),
            *_contrasts(
                "untied as used", (-MARGIN, None), decides=False, about="the same with equal blocks: the untied head on top",
            ),
        ),
        "At equal total parameters tying must cost nothing; at equal non-embedding parameters the cost is shown beside.",
    ),
    Claim(
        7, "quality over size", "More high-quality text beats a bigger model.", "better is any difference told from zero",
        (
            *_by_place(
                "twice the size less twice the text", "data_quality",
                f"loss with twice the parameters less the loss with twice the clean text; {_QUALITY}", ABOVE,
            ),
            *_by_place(
                "damaged text at four times the size less clean text", "data_quality",
                "loss of a model of four times the parameters on text with a tenth of its characters swapped, less the loss of "
                f"the model on clean text; {_QUALITY}", ABOVE,
            ),
        ),
    ),
    Claim(
        8, "doubling the size", "Doubling the parameters is about 15 % better.", "about is 10 to 20 %",
        (
            Part(
                "perplexity at fixed data", "model_scaling",
                "one less the perplexity of twice the parameters over that of once, at the largest sizes measured, by L(N) = E + A "
                "/ N^alpha through the ladder at equal tokens", (0.10, 0.20),
            ),
            Part(
                "loss at fixed data", "model_scaling", "the same of the loss in nats, and so of bits per byte", (0.10, 0.20),
                decides=False,
            ),
            Part(
                "perplexity at fixed compute", "compute_scaling",
                "the same at equal compute, from the best size to twice of it, by the mean curvature of the families",
                (0.10, 0.20), decides=False,
            ),
        ),
        "Judged in the reading that is kindest to it: perplexity, more parameters for free.",
    ),
    Claim(
        9, "longer training", "Training longer on more data keeps paying, as a power of compute.",
        "paying is at least 1 % of the loss for twice the compute",
        (
            Part("exponent of loss", "compute_scaling", "alpha of L(C) = A / C^alpha along the families' minima", (0.0145, None)),
            Part(
                "exponent of loss at the top", "compute_scaling",
                "the same between the two largest budgets alone: it should not have stopped", (0.0145, None),
            ),
        ),
        "0.0145 is the exponent that takes 1 % off the loss when compute doubles.",
    ),
    Claim(
        10, "architecture last", "Architecture choices bring less than data, parameters or compute.",
        "less is any difference told from zero",
        tuple(
            part
            for what in ("parameters", "data", "compute")
            for part in _by_place(f"{what} less architecture", "compute_scaling", _RANGE, ABOVE)
        ),
    ),
    Claim(
        11, "balanced growth", "With compute C, the best N and D each grow about as C^0.5.", "about is 0.4 to 0.6",
        (
            Part("exponent of parameters", "compute_scaling", "a of N_opt = k C^a along the minima, all parameters", (0.4, 0.6)),
            Part("exponent of tokens", "compute_scaling", "a of D_opt = k C^a along the minima", (0.4, 0.6)),
        ),
    ),
    Claim(
        12, "the starred knobs",
        "The knobs that matter most are learning rate, hidden size, number of layers, data quality, data size and, in generation, "
        "temperature.",
        "more is any difference told from zero",
        (
            Part(
                "least starred less largest other, training", "hyperparameters",
                "a knob's impact is the loss between its worst and its best value over the range stated beforehand (a quarter to "
                "four times of the tuned value where it is a number) at fixed FLOPs, small place, five seeds, nats per token; the "
                "least impact among learning_rate, hidden_size, num_layers, data quality and data size, less the largest among "
                "all other knobs of training and of the model", ABOVE,
            ),
            Part(
                "temperature less largest other, generation", "hyperparameters",
                "the same of temperature against top_k, top_p, repetition_penalty and max_new_tokens; a knob's impact is the loss "
                "of its samples under a larger model, between worst and best value of its range, nats per token", ABOVE,
            ),
        ),
    ),
    Claim(
        13, "a product of powers", "Performance is proportional to N^0.5 D^0.5 C^0.5.",
        "an exponent is about 1 from 0.8 to 1.2 (with C as 6 N D the three halves come to N D)",
        (
            Part(
                "error on held-out runs, product less sum", "compute_scaling",
                "mean absolute log error on the sizes of the largest budget of log L = k - a log N - b log D, exponents free, less "
                "that of L = E + A / N^alpha + B / D^beta, both fitted to the smaller budgets", BELOW,
            ),
            Part("exponent of N in 1 / L", "compute_scaling", "the exponent a of N in that product of powers", (0.8, 1.2)),
            Part("exponent of D in 1 / L", "compute_scaling", "the exponent b of D in that product of powers", (0.8, 1.2)),
        ),
    ),
    Claim(
        14, "already optimal", "GQA, SwiGLU and RoPE are already optimal: no tested alternative beats them.",
        f"an alternative within {MARGIN} nats does not beat",
        (
            *(part for name in ("gelu", "relu", "relu2", "learned", "sinusoidal", "none") for part in _unbeaten(name)),
            *_contrasts("gqa by 3", (None, MARGIN), refuted=ABOVE),
            *_contrasts(
                "mqa less gqa by 3", (-MARGIN, None), refuted=BELOW,
                about="loss of MQA less that of GQA, equal total parameters and tokens",
            ),
        ),
        "MHA beats GQA where GQA's loss is above it.",
    ),
    Claim(
        15, "the order", "The order of what to scale is data, then parameters, then compute, then architecture.",
        "an order is any difference told from zero",
        (
            *_by_place("data less parameters", "compute_scaling", f"{_DOUBLING} (by the surface)", ABOVE),
            *_by_place("parameters less compute", "compute_scaling", f"{_DOUBLING} (surface; L(C) for compute)", ABOVE),
            *_by_place(
                "a doubling of compute less architecture", "compute_scaling",
                "what twice the compute takes off the loss less the range of the architecture choice that matters most", ABOVE,
            ),
            *(
                Part(
                    f"{words} the batch at equal tokens", "compute_scaling",
                    "loss less that of the recipe's batch, each at its best rate, mean over budgets, nats per token", EQUAL,
                    level=90, decides=False,
                )
                for words in ("half", "twice")
            ),
        ),
    ),
)  # fmt: skip


def claims_of(numbers: Iterable[int] = ()) -> tuple[Claim, ...]:
    """Claims by number; all of them where none is named. Raises LabError for a number that is none."""
    known = {claim.number: claim for claim in CLAIMS}
    wanted = list(numbers) or list(known)
    if unknown := [number for number in wanted if number not in known]:
        raise LabError("Claims are known by their numbers", ", ".join(map(str, unknown)), f"they are 1 to {max(known)}")
    return tuple(known[number] for number in wanted)


# ------------------------------------------------------------------------------------------------------------- sealed rules

RULES = "rules.json"


def seal(folder: Path, study: str, claims: Iterable[Claim] = CLAIMS) -> None:
    """Write the rules of the claims that a study serves into its results folder, each with its hash and the time; to be
    called before the first run. A rule that is sealed there stays. Raises LabError where one has changed since."""
    own = [claim for claim in claims if study in claim.studies]
    known = _sealed(folder)
    changed = [
        claim for claim in own if (old := known.get(str(claim.number))) and old["hash"] != claim.hash
    ]  # fmt: skip
    if changed and (any((folder / "runs").glob("*.json")) or (folder / TIMINGS).exists()):
        raise _changed(folder, changed[0], known)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    rules = {
        str(claim.number): {"hash": claim.hash, "time": now} for claim in own if claim in changed or str(claim.number) not in known
    }  # fmt: skip
    if rules:
        _write_checked(folder / RULES, "rules", {"rules": {**known, **rules}})


def _sealed(folder: Path) -> dict[str, dict]:
    path = folder / RULES
    if not path.exists():
        return {}
    return _read_checked(
        path, "rules", "restore it as it was written: without it nobody can say which rule came first"
    )["rules"]


def _timed(folder: Path) -> list[str]:
    """When each piece of timing in a folder began; none where nothing was timed there."""
    path = folder / TIMINGS
    if not path.exists():
        return []
    kept = _read_checked(path, "timings", "delete the file, and measure again")
    return [one["started"] for one in kept.get("sittings", kept.get("cells", []))]


def _changed(folder: Path, claim: Claim, known: dict[str, dict]) -> LabError:
    entry = known[str(claim.number)]
    return LabError(
        "A rule may not change after its data",
        f"claim {claim.number} ({claim.title}) is {claim.hash} now and was sealed as {entry['hash']} on {entry['time']} in "
        f"{within_repository(folder)}",
        "take the old rule back, or measure anew in an empty folder",
    )


# ----------------------------------------------------------------------------------------------------------------- evidence


def effects_row(
    part: str,
    effect: float,
    low: float,
    high: float,
    low_90: float | None = None,
    high_90: float | None = None,
    p: float = math.nan,
    unit: str = "nats per token",
    seeds: int = 1,
    runs: Iterable[str] = (),
    base_runs: Iterable[str] = (),
) -> dict:
    """A row of tables/effects.csv. Without a 90 % interval the 95 % one stands for it, which can only decide less."""
    return dict(
        zip(
            COLUMNS,
            (part, effect, low, high, low if low_90 is None else low_90, high if high_90 is None else high_90, p, unit, seeds,
             " ".join(runs), " ".join(base_runs)),
            strict=True,
        )
    )  # fmt: skip


def drawn_row(part: str, effect: float, draws: np.ndarray, **rest: object) -> dict:
    """The same with intervals from draws of the effect (R,)."""
    ends = np.quantile(draws, [0.025, 0.975, 0.05, 0.95])
    return effects_row(part, effect, *map(float, ends), **rest)


def evidence(root: Path, study: str) -> pd.DataFrame:
    """What a study's folder says to claims: COLUMNS. Raises LabError where it is not there or not whole."""
    folder = root / study
    reader = READERS.get(study)
    if reader is not None:
        return pd.DataFrame(reader(root), columns=list(COLUMNS))
    table = _table(root, study, "effects")
    if missing := [name for name in COLUMNS if name not in table]:
        raise LabError(
            "A study's effects have fixed columns", f"{folder}: without {', '.join(missing)}", "run the study again"
        )
    return table.assign(runs=table.runs.fillna(""), base_runs=table.base_runs.fillna(""))


def _table(root: Path, study: str, name: str) -> pd.DataFrame:
    path = root / study / "tables" / f"{name}.csv"
    if not path.exists():
        raise LabError(
            "A claim is judged from what its study measured",
            f"no {within_repository(path)}",
            f"run `tinylm study {study} --results-dir {within_repository(root / study)}`",
        )
    return pd.read_csv(path, dtype={"runs": str, "base_runs": str})


@dataclass
class Verdict:
    """What became of a claim. parts: one row a part, with its verdict; sealed: whether the rule stood before its data
    (``before``), or was written when some of them were there (``after``); runs: all run_ids behind it."""

    claim: Claim
    verdict: str
    parts: pd.DataFrame
    sealed: str
    runs: list[str]

    def row(self) -> dict:
        """The verdict in one row: number, title, sentence, verdict, parts, seeds, sizes, corpus, sealed, rule, runs,
        the first effect that speaks for the verdict in words, and how many claims there are (of)."""
        parts = self.parts[self.parts.decides]
        sizes = parts[["params_low", "params_high"]].dropna()
        drawn = parts[parts.low < parts.high]  # no luck in what is exact
        return {
            "claim": self.claim.number, "title": self.claim.title, "sentence": self.claim.sentence, "verdict": self.verdict,
            "supported": int((parts.verdict == "supported").sum()), "refuted": int((parts.verdict == "refuted").sum()),
            "undecided": int((parts.verdict == "undecided").sum()), "seeds": int((drawn if len(drawn) else parts).seeds.min()),
            "smallest": sizes.params_low.min(), "largest": sizes.params_high.max(),
            "corpus": ", ".join(sorted({name for names in parts.corpus for name in names.split(", ") if name})),
            "sealed": self.sealed, "rule": self.claim.hash, "runs": len(self.runs), "effect": _words_of(self),
            "of": len(CLAIMS),
        }  # fmt: skip


def judge(root: Path, claims: Iterable[Claim] = CLAIMS) -> list[Verdict]:
    """The verdicts of claims from the results folders under ``root``, one a study.

    Raises one LabError that names all that is missing: a study, a part of its effects, a record. Raises for a rule that
    changed after it was sealed, and for an effect that its records do not give.
    """
    claims, missing = list(claims), []
    seen: dict[str, pd.DataFrame] = {}
    for study in dict.fromkeys(study for claim in claims for study in claim.studies):
        try:
            table = evidence(root, study)
        except LabError as error:
            missing.append(f"claims {_numbers(claims, study)}: {error.got}")
            continue
        absent = {part.name for claim in claims for part in claim.parts if part.study == study} - set(table.part)
        both = "" if study not in READERS or (root / "ablations").is_dir() else " without the study ablations"
        missing += [f"{study} does not tell {name!r}{both}" for name in sorted(absent)]
        seen[study] = table.set_index("part")
    if missing:
        studies = dict.fromkeys(study for claim in claims for study in claim.studies)
        raise LabError(
            "A verdict needs every record that its rule names",
            "; ".join(missing),
            f"run what is missing of {', '.join(studies)}, or judge other claims with -p numbers",
        )
    return [_judge_one(root, claim, seen) for claim in claims]


def _numbers(claims: list[Claim], study: str) -> str:
    return ", ".join(str(claim.number) for claim in claims if study in claim.studies)


def _judge_one(root: Path, claim: Claim, seen: dict[str, pd.DataFrame]) -> Verdict:
    rows, runs, sealed = [], {}, "before"
    for study in claim.studies:
        known = _sealed(root / study)
        if str(claim.number) in known and known[str(claim.number)]["hash"] != claim.hash:
            raise _changed(root / study, claim, known)
    for part in claim.parts:
        row = seen[part.study].loc[part.name]
        records = _records(root / part.study, part, row)
        runs |= records
        time = _sealed(root / part.study).get(str(claim.number), {}).get("time")
        began = [record["started"] for record in records.values()] or _timed(root / part.study)
        started = min(began, default=None)
        if time is None or (started is not None and started < time):
            sealed = "after"
        sizes = [record["parameters"]["total"] for record in records.values()]
        rows.append(
            {"part": part.name, "study": part.study, **row.drop(["runs", "base_runs"]).to_dict(),
             "seeds": int(row.seeds), "decides": part.decides,
             "verdict": part.verdict(row), "supported_from": part.supported[0], "supported_to": part.supported[1],
             "params_low": min(sizes, default=math.nan), "params_high": max(sizes, default=math.nan),
             "corpus": ", ".join(sorted({record["corpus"]["name"] for record in records.values()})),
             "runs": " ".join(records), "about": part.about}
        )  # fmt: skip
        rows[-1]["more_seeds"] = part.seeds_to_decide(row) if rows[-1]["verdict"] == "undecided" else 0
    table = pd.DataFrame(rows)
    deciding = set(table.verdict[table.decides])
    verdict = "refuted" if "refuted" in deciding else "undecided" if "undecided" in deciding else "supported"
    return Verdict(claim, verdict, table, sealed, sorted(runs))


def _records(folder: Path, part: Part, row: pd.Series) -> dict[str, dict]:
    """The records behind an effect, checked: all there, and giving the difference that the table says."""
    ids = [str(row.runs).split(), str(row.base_runs).split()]
    ids = [[] if names == ["nan"] else names for names in ids]
    if not ids[0] and part.study not in TIMED:
        raise LabError("An effect names the runs behind it", f"{folder.name}: {part.name!r}", "run the study again")
    records = {}
    for name in (*ids[0], *ids[1]):
        study, _, own = name.rpartition("/")
        path = (folder.parent / study if study else folder) / "runs" / f"{own}.json"
        if not path.exists():
            raise LabError(
                "A verdict needs every record behind it", f"no {within_repository(path)}, for {part.name!r}",
                "restore it, or run the study again",
            )  # fmt: skip
        records[name] = read_record(path)
    if ids[1]:
        losses = [np.array([records[name]["val_loss"] for name in names], float) for names in ids]
        found = float(losses[0].mean() - losses[1].mean())
        if not abs(found - row.effect) < 1e-6:
            raise LabError(
                "An effect must be what its records give",
                f"{folder.name}, {part.name!r}: {row.effect:.6f} in the table, {found:.6f} by the records",
                "run the study again: it draws its tables anew from its records",
            )
    return records


# --------------------------------------------------------------------------------------- studies that know nothing of claims


def _t_row(part: str, values: np.ndarray, **rest: object) -> dict:
    """The mean of a few values with Student's intervals."""
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    ends = [error * stats.t.ppf(q, len(values) - 1) for q in (0.975, 0.95)]
    return effects_row(part, mean, mean - ends[0], mean + ends[0], mean - ends[1], mean + ends[1], **rest)


def _family_runs(root: Path, study: str, families: tuple[str, ...]) -> pd.DataFrame:
    folder = root / study
    if not (folder / "runs").is_dir():
        raise LabError(
            "A claim is judged from what its study measured", f"no {within_repository(folder)}", f"run {study}"
        )
    frame = load_runs(folder)
    return frame[frame.family.isin(families)]


def _read_model_scaling(root: Path) -> list[dict]:
    """Claim 8 at fixed data, from the ladder of the model study."""
    runs = _family_runs(root, "model_scaling", ("ladder",))
    ladder = _table(root, "model_scaling", "sizes")
    fit = scaling.fit_power(ladder.params_total, ladder.val_loss, floor=True, bootstrap=500)
    x = float(fit.data.x.max())
    near = np.array([x / 2, x])
    value, draws = (scaling.evaluate_law("power", p, near) for p in (fit.params, fit.samples))
    rest = {"unit": "share", "seeds": 1, "runs": runs.run_id}
    return [
        drawn_row("perplexity at fixed data", 1 - math.exp(value[1] - value[0]), 1 - np.exp(draws[:, 1] - draws[:, 0]), **rest),
        drawn_row("loss at fixed data", 1 - value[1] / value[0], 1 - draws[:, 1] / draws[:, 0], **rest),
    ]  # fmt: skip


def _read_compute_scaling(root: Path) -> list[dict]:
    """Claims 8 (fixed compute), 9, 11, 13, and with the ablations 10 and 15."""
    study = "compute_scaling"
    runs = _family_runs(root, study, ("isoflop",))
    laws = _table(root, study, "laws").set_index(["law", "parameter"])
    minima = _table(root, study, "isoflop_minima").sort_values("budget")
    ids = runs.run_id.tolist()
    rest = {"unit": "exponent", "runs": ids}
    rows = [
        effects_row(part, row.value, row.low, row.high, **rest)
        for part, key in (
            ("exponent of loss", ("L(C) = A / C^alpha", "alpha")),
            ("exponent of parameters", ("N_opt(C) = k C^a", "a")),
            ("exponent of tokens", ("D_opt(C) = k C^a", "a")),
        )
        for row in [laws.loc[key]]
    ]
    last = minima.tail(2)
    spread = np.log(last.loss_high / last.loss_low).to_numpy() / (2 * stats.norm.ppf(0.975))
    step = math.log(last.budget.iloc[1] / last.budget.iloc[0])
    top = math.log(last.loss_min.iloc[0] / last.loss_min.iloc[1]) / step
    half = stats.norm.ppf(0.975) * float(np.hypot(*spread)) / step
    rows.append(effects_row("exponent of loss at the top", top, top - half, top + half, **rest))
    inside = minima[minima.inside.astype(bool)]
    nats = inside.curvature.to_numpy(float) * math.log(2) ** 2  # what twice the best size costs at equal compute
    rows.append(_t_row("perplexity at fixed compute", 1 - np.exp(nats), unit="share", runs=ids))
    rows.append(_t_row("loss at fixed compute", -nats / inside.loss_min.to_numpy(float), unit="share", runs=ids))
    rows += _products(runs, ids)
    batches = _table(root, study, "batches")
    tried = [*ids, *_family_runs(root, study, ("batches",)).run_id]
    for words, group in (("half", batches[batches.factor < 1]), ("twice", batches[batches.factor > 1])):
        if len(group):
            mean, width = group.difference.mean(), ((group.high - group.low) / 2).mean() / math.sqrt(len(group))
            narrow = width * stats.norm.ppf(0.95) / stats.norm.ppf(0.975)
            ends = (mean - width, mean + width, mean - narrow, mean + narrow)
            rows.append(effects_row(f"{words} the batch at equal tokens", mean, *ends, runs=tried))
    there = (root / "ablations" / "tables" / "effects.csv").exists()
    return rows + (_gains(root, ids) if there else [])


def _products(runs: pd.DataFrame, ids: list[str], draws: int = 1000) -> list[dict]:
    """Claim 13: a product of powers against the additive surface, on the sizes of the largest budget."""
    sizes = scaling.best_learning_rate(runs)
    known, held = sizes[sizes.budget < sizes.budget.max()], sizes[sizes.budget == sizes.budget.max()]

    def design(rows: pd.DataFrame) -> np.ndarray:
        return np.stack([np.ones(len(rows)), -np.log(rows.params_total), -np.log(rows.tokens_seen)], axis=1)

    X, y = design(known), np.log(known.val_loss.to_numpy(float))
    theta = np.linalg.lstsq(X, y, rcond=None)[0]
    surface = scaling.fit_surface(known.params_total, known.tokens_seen, known.val_loss, bootstrap=0)
    truth = np.log(held.val_loss.to_numpy(float))
    summed = np.log(surface.predict(held.params_total, held.tokens_seen).loss.to_numpy())
    worse = np.abs(design(held) @ theta - truth) - np.abs(summed - truth)
    rng = np.random.default_rng(0)
    weights = rng.exponential(size=(draws, len(y)))
    drawn = np.array([np.linalg.lstsq(X * w[:, None] ** 0.5, y * w**0.5, rcond=None)[0] for w in weights])
    rows = [_t_row("error on held-out runs, product less sum", worse, unit="log loss", runs=ids)]
    for i, name in ((1, "N"), (2, "D")):
        rows.append(drawn_row(f"exponent of {name} in 1 / L", theta[i], drawn[:, i], unit="exponent", runs=ids))
    return rows


def _gains(root: Path, ids: list[str], draws: int = 1000) -> list[dict]:
    """Claims 10 and 15: what parameters, data and compute bring at the places of the ablations, by the laws of the compute
    study, against the range of the architecture choice that matters most there."""
    from tinylm.study.planner import Evidence

    path = root / "compute_scaling" / "tables" / "law.json"
    if not path.exists():
        raise LabError(
            "A claim is judged from what its study measured", f"no {within_repository(path)}", "run it again"
        )
    law = read_kept(path, Evidence.from_dict)
    ablations = evidence(root, "ablations").set_index("part")
    places = _table(root, "ablations", "places").set_index("place")
    rng = np.random.default_rng(0)

    def falls(fit: scaling.Fit, *ends: tuple) -> tuple[float, np.ndarray]:
        """The loss at the first end less the loss at the second, of the fit and of its resamples."""
        columns = [np.array(column, float) for column in zip(*ends, strict=True)]
        value, drawn = (scaling.evaluate_law(fit.form, p, *columns) for p in (fit.params, fit.samples))
        return float(value[0] - value[1]), drawn[:, 0] - drawn[:, 1]

    def less(part: str, one: tuple[float, np.ndarray], other: tuple[float, np.ndarray], runs: list[str] = ids) -> dict:
        picks = [rng.choice(values, draws) for _, values in (one, other)]
        return drawn_row(part, one[0] - other[0], picks[0] - picks[1], runs=runs)

    rows = []
    for place, row in places.iterrows():
        N, D, C = row.params_total, row.tokens_seen, row.flops
        choice = ablations.loc[f"{place}: largest choice"]
        error = (choice.high - choice.low) / (2 * stats.norm.ppf(0.975))
        both = [*ids, *(f"ablations/{name}" for name in choice.runs.split())]
        architecture = choice.effect, choice.effect + error * rng.standard_normal(draws)

        def gains(low: float, high: float, N: float = N, D: float = D, C: float = C) -> dict:
            found = {
                "parameters": falls(law.surface, (N * low, D), (N * high, D)),
                "data": falls(law.surface, (N, D * low), (N, D * high)),
            }
            if law.frontier is not None:
                found["compute"] = falls(law.frontier, (C * low,), (C * high,))
            return found

        wide, double = gains(0.25, 4.0), gains(1.0, 2.0)
        rows += [less(f"{place}: {what} less architecture", gain, architecture, both) for what, gain in wide.items()]
        (more, drawn), (larger, drawn_too) = double["data"], double["parameters"]  # of one surface: draw by draw
        rows.append(drawn_row(f"{place}: data less parameters", more - larger, drawn - drawn_too, runs=ids))
        if "compute" in double:
            rows.append(less(f"{place}: parameters less compute", double["parameters"], double["compute"]))
            rows.append(
                less(f"{place}: a doubling of compute less architecture", double["compute"], architecture, both)
            )
    return rows


READERS: dict[str, Callable[[Path], list[dict]]] = {
    "compute_scaling": _read_compute_scaling,
    "model_scaling": _read_model_scaling,
}


# What stands below the table of a claim, of the same readers, without being part of its rule.
BESIDE = {
    2: {
        "stability": {
            f"largest stable rate, {warmup}, where both learn": f"the largest stable rate {warmup} over those depths alone at "
            "which both learn something"
            for warmup in ("with warmup", "without warmup")
        }
    },
    4: {
        "extrapolation": {
            f"learned less rope, both sliding, {reach}": f"learned less RoPE where both read a sliding window of T, {reach}"
            for reach in _REACHES
        }
    },
    8: {
        "compute_scaling": {
            "loss at fixed compute": "one less the loss, and so the bits per byte, of twice the best size over that of the best, "
            "at equal compute"
        }
    },
}


# ---------------------------------------------------------------------------------------------------------------- the study

COLOURS = {"supported": plots.COLOURS[2], "refuted": plots.COLOURS[1], "undecided": plots.GREY}


def begin(settings: ClaimsParameters) -> Claims:
    return Claims(settings)


class Claims:
    """Reads records and rules, and says what became of each claim."""

    def __init__(self, settings: ClaimsParameters):
        self.settings, self.folder = settings, settings.folder
        self.root = settings.folder if settings.preset == "smoke" else repository() / settings.evidence
        served = (3,) if settings.preset == "smoke" else ()  # by its small evidence
        self.claims = claims_of(int(number) for number in settings.numbers or served)
        self.report = Report(self.folder, "Claims on trial")

    def show_rules(self) -> None:
        """The rules, and where each is sealed. Seals those that a study of laws could not, so that they stay from now on."""
        for study in READERS:
            if (self.root / study / "runs").is_dir():
                seal(self.root / study, study)
        self.report.section("The rules")
        self.report.text(RULE)
        self.report.text(
            "The p shown is that corrected one. The ablations look at a contrast twice, at 1 % and at 4 %: their intervals and "
            "their p allow for it. Parts without a p (of timings, of laws, of two variants, of variants that are not primary) are "
            "judged by their interval alone. Each rule stands whole in "
            "[tables/parts.csv](tables/parts.csv), and its hash, with the time when it was sealed, in `rules.json` of each study "
            "that serves it. `tinylm study claims` hashes every rule again, and refuses one that has changed, an effect that "
            "its records do not give, and a record whose checksum does not fit."
        )
        rows = [
            {"claim": claim.number, "sentence": claim.sentence, "margin": claim.margin, "parts": len(claim.parts),
             "studies": ", ".join(claim.studies), "rule": claim.hash}
            for claim in self.claims
        ]  # fmt: skip
        self.report.table(
            pd.DataFrame(rows), "rules", "The claims in our words, with their margins, the studies that they are judged from, and "
            "the hash of the whole rule, every bound included", claim="d", sentence="", margin="", parts="d", studies="", rule="",
        )  # fmt: skip
        parts = [
            {"claim": claim.number, "part": part.name, "study": part.study, "decides": part.decides, "level": part.level,
             "holds": _bounds(part.supported), "fails": _bounds(part.refuted) if part.refuted else "elsewhere",
             "about": part.about}
            for claim in self.claims
            for part in claim.parts
        ]  # fmt: skip
        write_table(self.folder / "tables" / "parts.csv", pd.DataFrame(parts))

    def show_verdicts(self) -> None:
        self.verdicts = judge(self.root, self.claims)
        table = pd.DataFrame([verdict.row() for verdict in self.verdicts])
        counted = table.verdict.value_counts()
        self.report.section("The verdicts")
        self.report.text(
            f"Supported: {counted.get('supported', 0)} of {len(table)} claims; refuted: {counted.get('refuted', 0)}; undecided "
            f"at this scale: {counted.get('undecided', 0)}. A rule that was sealed after some of its data (`sealed`) was "
            "written by people who could have seen them."
        )
        self.report.table(
            table, "verdicts", "Each claim with its verdict, how many of its deciding parts were supported, refuted and undecided, "
            "the fewest seeds behind a part, the smallest and the largest model (parameters) and the text", claim="d",
            sentence="", verdict="", supported="d", refuted="d", undecided="d", seeds="d", smallest=",.0f", largest=",.0f",
            corpus="", sealed="", rule="", runs="d",
        )  # fmt: skip
        self.report.figure(
            "verdicts", "Each claim and the parts that decide it, in the order of its table below: green supported, orange "
            "refuted, grey undecided",
            lambda ax: _draw_verdicts(self.verdicts, ax), size=(8.6, 1.1 + 0.36 * len(table)),
        )  # fmt: skip
        for verdict in self.verdicts:
            self._tell(verdict)
        runs = [{"claim": v.claim.number, "run_id": name} for v in self.verdicts for name in v.runs]
        write_table(self.folder / "tables" / "runs.csv", pd.DataFrame(runs))
        self.report.summary("\n".join(f"- **{v.verdict}**: {v.claim.sentence} {_words_of(v)}" for v in self.verdicts))

    def _tell(self, verdict: Verdict) -> None:
        claim = verdict.claim
        self.report.text(
            f"### {claim.number}. {claim.sentence}\n\n**{verdict.verdict.capitalize()}**"
            f"{' at this scale' if verdict.verdict == 'undecided' else ''}. Margin: {claim.margin}. {claim.rule}".strip()
            + "\n\n"
            + _measures(claim)
        )
        shown = verdict.parts.assign(
            holds=[_bounds(part.supported) for part in claim.parts],
            interval=[_span(row) for row in verdict.parts.itertuples()],
            more_seeds=[_seeds_words(row) for row in verdict.parts.itertuples()],
        )
        self.report.table(
            shown, f"claim_{claim.number}", "The effect of each part with its 95 % interval and its corrected p, between which "
            "bounds the claim holds, and how many seeds would decide it by this rule, were the effect what it seems", part="",
            effect="+.4f", interval="", unit="", p=".2g", holds="", verdict="", decides="", seeds="d", more_seeds="", study="",
        )  # fmt: skip
        for study, beside in BESIDE.get(claim.number, {}).items():
            table = evidence(self.root, study).set_index("part")
            told = "; ".join(
                f"{about}: {row.effect:+.4f} {row.unit} ({_span(row)})"
                for name, about in beside.items()
                if name in table.index
                for row in [table.loc[name]]
            )
            if told:
                self.report.text(f"Beside the rule, {told}.")

    def end(self) -> None:
        """Where each study stands, how this was made, and the files."""
        studies = dict.fromkeys(study for claim in self.claims for study in claim.studies)
        pages = [(study, self.root / study / "README.md") for study in studies]
        links = ", ".join(f"[{s}]({os.path.relpath(page, self.folder)})" if page.exists() else s for s, page in pages)
        self.report.section("How this was made")
        self.report.text(
            f"From what these studies measured: {links}. The last section of each has the command that measures it anew; what it "
            "measured is judged again by "
            + (
                "`tinylm study claims --preset smoke`."
                if self.settings.preset == "smoke"
                else f"`tinylm study claims -p evidence {within_repository(self.root)}"
                + (f" -p numbers {','.join(f'{n:g}' for n in self.settings.numbers)}" if self.settings.numbers else "")
                + "`."
            )
        )
        path = self.report.write()
        if self.folder.parent == repository() / "results":
            contents.write(self.folder.parent)
        print(f"report: {within_repository(path)}")


def _bounds(bounds: Bounds) -> str:
    least, most = bounds
    if least is None:
        return f"below {most:g}"
    return f"above {least:g}" if most is None else f"{least:g} to {most:g}"


def _span(row: tuple) -> str:
    return "exact" if row.low == row.high else interval(row.low, row.high, "+.4f")


def _seeds_words(row: tuple) -> str:
    """How many seeds would decide a part; nothing where an interval is not of seeds alone, but of a law, of rounds or of depths."""
    if row.verdict != "undecided" or row.study not in SEEDED or row.effect != row.effect:
        return ""
    return "more than anyone has" if not row.more_seeds < 1e4 else f"{row.more_seeds:.0f}"


def _measures(claim: Claim) -> str:
    """What the parts of a claim measure, a line for all that measure alike."""
    names: dict[str, list[str]] = {}
    for part in claim.parts:
        names.setdefault(part.about, []).append(part.name)
    return "\n".join(f"- *{'; '.join(own)}*: {about}." for about, own in names.items())


def _words_of(verdict: Verdict) -> str:
    """The first of the deciding parts that speak for the verdict, in words, and how many more do."""
    parts = verdict.parts[verdict.parts.decides & (verdict.parts.verdict == verdict.verdict)]
    row = next(parts.itertuples())
    if row.effect != row.effect:
        return f"{row.part}: it diverged."
    others = len(parts) - 1
    more = f" (and {others} more part{'s' * (others > 1)} alike)" if others else ""
    scale, unit, spec = (100, " %", "+.1f") if row.unit == "share" else (1, f" {row.unit}", "+.3f")
    span = "exact" if row.low == row.high else interval(scale * row.low, scale * row.high, spec)
    return f"{row.part}: {scale * row.effect:{spec}}{unit} ({span}){more}."


def _draw_verdicts(verdicts: list[Verdict], ax: object) -> None:
    """A line a claim: its parts as squares, coloured by verdict, and the claim's own verdict in words."""
    for i, verdict in enumerate(verdicts):
        parts = verdict.parts[verdict.parts.decides]
        for j, part in enumerate(parts.itertuples()):
            ax.plot(j, i, "s", color=COLOURS[part.verdict], markersize=9)
        ax.annotate(
            verdict.verdict, (1.01, i), xycoords=("axes fraction", "data"), va="center", fontsize=10,
            color=COLOURS[verdict.verdict], annotation_clip=False, fontweight="bold",
        )  # fmt: skip
    ax.set_yticks(range(len(verdicts)), [f"{v.claim.number}. {v.claim.title}" for v in verdicts])
    ax.set_ylim(len(verdicts) - 0.4, -0.6)
    ax.set_xlim(-0.6, max(14.6, ax.get_xlim()[1]))
    ax.set_xticks([])
    ax.grid(visible=False)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    ax.tick_params(axis="y", length=0)
