"""What papermill hands to a study, checked by name, type and value before any work starts.

Papermill hands strings for ``true``, ``1e-3`` and lists, and lets unknown names pass; here each becomes the right value or a
clear error.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path

from tinylm.config import TOKENIZERS, DataConfig, _Config, _nearest
from tinylm.errors import ConfigError

# Names that a notebook's own machinery puts beside the parameters.
_KERNEL_NAMES = {"In", "Out", "exit", "quit", "get_ipython", "open", "papermill"}
_YES, _NO = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


def repository() -> Path:
    """The folder that holds ``labs``, ``studies`` and ``results``: where the installed package's source lies."""
    return Path(__file__).resolve().parents[2]


def within_repository(path: Path) -> str:
    """A path as a study takes it: relative to the repository where it lies in it, so that a result does not name the
    folders of the machine that made it; else in full."""
    path = Path(path).expanduser().resolve()
    return path.relative_to(repository()).as_posix() if path.is_relative_to(repository()) else str(path)


def given(namespace: dict[str, object]) -> dict[str, object]:
    """The parameters among the names of a notebook that has run nothing but its parameters cell."""
    return {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_")
        and name not in _KERNEL_NAMES
        and not isinstance(value, types.ModuleType)
        and not callable(value)
        and not type(value).__module__.startswith("tinylm")  # what later cells made, where this one is run again
    }


Kind = typing.TypeVar("Kind", bound=_Config)


def validate(namespace: dict[str, object], kind: type[Kind]) -> Kind:
    """The parameters in ``namespace`` (a notebook's ``globals()``) as a checked ``kind``. Strings become what the field's type
    asks for; unknown names, wrong types and values out of range raise ConfigError."""
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    values = {}
    for name, value in given(namespace).items():
        if name not in names:
            raise ConfigError("A study takes only its own parameters", f"{name}={value!r}", _nearest(name, names))
        if isinstance(value, str):
            value = _from_text(value, hints[name])
        elif hints[name] is str and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)  # a file named 1984 reaches papermill as a number
        values[name] = value
    return kind(**values)


def _from_text(text: str, hint: object) -> object:
    """What a string stands for where the field is not a string."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if str in allowed:
        return text
    if hint == tuple[float, ...]:
        return _numbers(text)
    word = text.strip().lower()
    if type(None) in allowed and word in ("", "none", "null"):
        return None
    if bool in allowed and word in _YES | _NO:
        return word in _YES
    try:
        if int in allowed and float(word).is_integer():
            return int(float(word))
        if float in allowed:
            return float(word)
    except (ValueError, OverflowError):
        pass
    return text  # the type check, or the list below, says what is wrong


def _numbers(text: str) -> object:
    """The list in text such as "10, 60" or "[1e11, 2e11]"; the text itself where it is none, for the type check to refuse."""
    try:
        return json.loads(text if text.strip().startswith("[") else f"[{text}]")
    except (ValueError, RecursionError):
        return text


@dataclass(frozen=True)
class StudyParameters(_Config):
    """What every study can be asked.

    text: a name from tinylm.corpora.NAMES or a path; empty is ``usual_text``, and for the smoke preset the generated
    ``zipf-markov``, which needs no network. results_dir: where records, tables, figures and the report go, relative to the
    repository; empty is a folder in results/local named after the study, with the preset and the text in its name where they
    are not the usual ones.
    workers: processes that train side by side; 0 is one a core. cluster: where they are: empty is this machine, ``local`` a
    Dask cluster started on it, else the address of a Dask scheduler, whose workers there are; ``workers`` then says how many
    are to come, where that is more.
    """

    text: str = ""
    preset: str = "full"
    vocab_size: int = 512
    results_dir: str = ""
    workers: int = 0
    cluster: str = ""
    seed: int = 0

    study: typing.ClassVar[str] = ""
    presets: typing.ClassVar[tuple[str, ...]] = ("smoke", "full")
    usual_preset: typing.ClassVar[str] = "full"
    usual_text: typing.ClassVar[str] = "verse"

    def __post_init__(self) -> None:
        self._check_types()
        self._one_of("preset", self.presets)
        for name in ("workers", "seed"):
            value = getattr(self, name)
            self._require(value >= 0, f"{name} must not be negative", "0 is the default", **{name: value})
        self._require(self.vocab_size >= 2, "vocab_size must be at least 2", "512 is usual", vocab_size=self.vocab_size)

    @property
    def data(self) -> DataConfig:
        """The text that the study reads, and its tokenizer."""
        return DataConfig(self.text or ("zipf-markov" if self.preset == "smoke" else self.usual_text))

    @property
    def folder(self) -> Path:
        """Where the study writes."""
        if self.results_dir:
            return repository() / Path(self.results_dir).expanduser()
        parts = [self.study]
        if self.preset != self.usual_preset:
            parts.append(self.preset)
        if self.text and self.text != self.usual_text:
            parts.append(re.sub(r"[^a-z0-9]+", "-", Path(self.text).stem.lower()).strip("-") or "text")
        if self.vocab_size != type(self).vocab_size:
            parts.append(str(self.vocab_size))
        return repository() / "results" / "local" / "-".join(parts)


@dataclass(frozen=True)
class RecipeParameters(StudyParameters):
    """What can be asked of studies/recipe.ipynb."""

    study: typing.ClassVar[str] = "recipe"


@dataclass(frozen=True)
class QuickstartParameters(StudyParameters):
    """What can be asked of studies/quickstart.ipynb, besides what every study takes.

    tokenizer: its kind. field: the key of the text in a jsonl file. minutes: for how long the next run may train; the study
    plans one run for each.
    """

    preset: str = "quick"
    tokenizer: str = "bpe"
    field: str = ""
    minutes: tuple[float, ...] = (10.0, 60.0)

    study: typing.ClassVar[str] = "quickstart"
    presets: typing.ClassVar[tuple[str, ...]] = ("smoke", "quick", "full")
    usual_preset: typing.ClassVar[str] = "quick"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("tokenizer", TOKENIZERS)
        self._require(
            len(self.minutes) > 0 and min(self.minutes) > 0,
            "minutes must be one or more positive numbers",
            "write 10 or [10, 60]",
            minutes=self.minutes,
        )

    @property
    def data(self) -> DataConfig:
        return dataclasses.replace(super().data, tokenizer=self.tokenizer, field=self.field or None)


@dataclass(frozen=True)
class DataParameters(StudyParameters):
    """What can be asked of studies/data_scaling.ipynb."""

    study: typing.ClassVar[str] = "data_scaling"
    presets: typing.ClassVar[tuple[str, ...]] = ("smoke", "quick", "full")


@dataclass(frozen=True)
class ModelParameters(StudyParameters):
    """What can be asked of studies/model_scaling.ipynb."""

    study: typing.ClassVar[str] = "model_scaling"
    presets: typing.ClassVar[tuple[str, ...]] = ("smoke", "quick", "full")


@dataclass(frozen=True)
class DataQualityParameters(StudyParameters):
    """What can be asked of studies/data_quality.ipynb."""

    study: typing.ClassVar[str] = "data_quality"
    presets: typing.ClassVar[tuple[str, ...]] = ("smoke", "quick", "full")


@dataclass(frozen=True)
class AblationParameters(StudyParameters):
    """What can be asked of studies/ablations.ipynb, besides what every study takes.

    variants: names from tinylm.study.ablations.VARIANTS, with commas between; empty is all of them.
    """

    variants: str = ""

    study: typing.ClassVar[str] = "ablations"
    presets: typing.ClassVar[tuple[str, ...]] = ("smoke", "quick", "full")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The names that are asked for."""
        return tuple(name.strip() for name in self.variants.split(",") if name.strip())


@dataclass(frozen=True)
class ClaimsParameters(_Config):
    """What can be asked of studies/claims.ipynb, which trains nothing but, for the smoke preset, small evidence of its own.

    evidence: the folder that holds the studies' results, relative to the repository. numbers: the claims to be judged; empty is
    all of them, or for the smoke preset those that its small evidence serves. results_dir: where the report goes; empty is
    results/local/claims.
    """

    preset: str = "full"
    evidence: str = "results"
    numbers: tuple[float, ...] = ()
    results_dir: str = ""

    study: typing.ClassVar[str] = "claims"

    def __post_init__(self) -> None:
        self._check_types()
        self._one_of("preset", ("smoke", "full"))
        whole = all(number.is_integer() for number in self.numbers)
        self._require(whole, "claims are known by whole numbers", "write 3 or [3, 6]", numbers=self.numbers)

    @property
    def folder(self) -> Path:
        """Where the study writes."""
        named = "claims" if self.preset == "full" else f"claims-{self.preset}"
        return repository() / (
            Path(self.results_dir).expanduser() if self.results_dir else Path("results/local", named)
        )


@dataclass(frozen=True)
class NormsParameters(_Config):
    """What can be asked of studies/norms.ipynb, which times code and trains nothing.

    force: measure also while the machine is busy; the report says so. results_dir: where timings and report go; empty is
    results/local/norms.
    """

    preset: str = "full"
    results_dir: str = ""
    force: bool = False

    study: typing.ClassVar[str] = "norms"

    def __post_init__(self) -> None:
        self._check_types()
        self._one_of("preset", ("smoke", "quick", "full"))

    @property
    def folder(self) -> Path:
        """Where the study writes."""
        named = self.study if self.preset == "full" else f"{self.study}-{self.preset}"
        return repository() / (
            Path(self.results_dir).expanduser() if self.results_dir else Path("results/local", named)
        )


@dataclass(frozen=True)
class DecodingParameters(NormsParameters):
    """What can be asked of studies/decoding.ipynb, which times code and trains nothing: the same as of norms."""

    study: typing.ClassVar[str] = "decoding"


@dataclass(frozen=True)
class ExtrapolationParameters(StudyParameters):
    """What can be asked of studies/extrapolation.ipynb, whose usual text is ``stories``: books, which have long contexts."""

    study: typing.ClassVar[str] = "extrapolation"
    presets: typing.ClassVar[tuple[str, ...]] = ("smoke", "quick", "full")
    usual_text: typing.ClassVar[str] = "stories"


@dataclass(frozen=True)
class StabilityParameters(StudyParameters):
    """What can be asked of studies/stability.ipynb."""

    study: typing.ClassVar[str] = "stability"
    presets: typing.ClassVar[tuple[str, ...]] = ("smoke", "quick", "full")


@dataclass(frozen=True)
class HyperparameterParameters(StudyParameters):
    """What can be asked of studies/hyperparameters.ipynb."""

    study: typing.ClassVar[str] = "hyperparameters"
    presets: typing.ClassVar[tuple[str, ...]] = ("smoke", "quick", "full")


@dataclass(frozen=True)
class NumericsParameters(StudyParameters):
    """What can be asked of studies/numerics.ipynb."""

    study: typing.ClassVar[str] = "numerics"
    presets: typing.ClassVar[tuple[str, ...]] = ("smoke", "quick", "full")


@dataclass(frozen=True)
class ComputeParameters(QuickstartParameters):
    """What can be asked of studies/compute_scaling.ipynb: the same as of the quickstart."""

    preset: str = "full"

    study: typing.ClassVar[str] = "compute_scaling"
    usual_preset: typing.ClassVar[str] = "full"
