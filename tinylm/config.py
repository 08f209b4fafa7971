"""Every hyperparameter of the lab, in frozen and validated dataclasses. Imports no torch.

``None`` stands for "derived from the others"; ``ModelConfig.resolve`` and ``TrainConfig.resolve`` fill it in. A switch is a
name in one of the sets below; the module that owns the switch holds the table from the name to the code.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import sys
import types
import typing
from dataclasses import dataclass

from tinylm.errors import ConfigError

NORMS = ("rmsnorm", "layernorm")
NORM_POSITIONS = ("pre", "post")
MLPS = ("swiglu", "gelu", "relu", "relu2")
POSITIONS = ("rope", "learned", "sinusoidal", "none")
INITS = ("fixed", "scaled")
SCHEDULES = ("cosine", "wsd")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
TOKENIZERS = ("bpe", "unigram", "char", "byte")
DAMAGES = ("swap", "shuffle", "repeat", "boilerplate", "foreign")

MOST = sys.float_info.max

# Fields of ModelConfig and TrainConfig that are younger than the first records. At its default such a field is no part of a
# run's identity, so that what was trained before it was there is still found.
YOUNGER = ("qk_norm", "loss_scaling")

_type_hints = functools.cache(typing.get_type_hints)  # a study makes tens of thousands of configs


class _Config:
    """What all configs share: type checks, a dict and JSON round trip, and errors that name the field."""

    def _check_types(self) -> None:
        hints = _type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            checked = _as_type(field.name, value, hints[field.name])
            if checked is not value:
                object.__setattr__(self, field.name, checked)

    def _require(self, ok: bool, rule: str, fix: str, **got) -> None:
        if not ok:
            raise ConfigError(rule, ", ".join(f"{name}={value!r}" for name, value in got.items()), fix)

    def _one_of(self, field: str, names: tuple[str, ...]) -> None:
        value = getattr(self, field)
        if value not in names:
            raise ConfigError(
                f"{field} must be one of {', '.join(names)}", f"{field}={value!r}", _nearest(str(value), names)
            )

    def to_dict(self) -> dict:
        """All fields by name; ``from_dict`` gives the same config back."""
        return dataclasses.asdict(self)

    def identifying(self) -> dict:
        """What of a resolved config enters a run's identity: all fields, without the ``YOUNGER`` ones at their defaults."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: v for name, v in self.to_dict().items() if name not in YOUNGER or v != defaults[name]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True)

    def replace(self, **changes) -> typing.Self:
        """A copy with some fields changed: ``config.replace(norm="layernorm")``."""
        return type(self).from_dict({**self.to_dict(), **changes})

    @classmethod
    def from_dict(cls, values: dict) -> typing.Self:
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise ConfigError(
                    f"{cls.__name__} has no field of that name", f"{name}={values[name]!r}", _nearest(name, names)
                )
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> typing.Self:
        return cls.from_dict(json.loads(text))


def _nearest(word: str, names: typing.Sequence[str]) -> str:
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return (f"perhaps {close[0]!r} was meant; " if close else "") + "the names are " + ", ".join(names)


def _as_type(name: str, value: object, hint: object) -> object:
    """Check a value against its annotation; a whole float may stand for an int and an int for a float, a bool for neither."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in allowed:
        return value
    if hint == tuple[float, ...]:
        items = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(item, bool) or not isinstance(item, int | float) for item in items):
            raise ConfigError(f"{name} must be one or more numbers", f"{name}={value!r}", "write 10, or [10, 60]")
        return tuple(_as_type(name, item, float) for item in items)
    for kind in allowed:
        if kind is bool and isinstance(value, bool):
            return value
        if kind in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
            if not -MOST <= value <= MOST:  # NaN, too, lies nowhere
                raise ConfigError(f"{name} must be a finite number", f"{name}={value!r}", "give a finite number")
            if kind is float:
                return float(value)
            if float(value).is_integer():
                return int(value)
        if kind is str and isinstance(value, str):
            return value
    wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in allowed)
    raise ConfigError(
        f"{name} must be of type {wanted}", f"{name}={value!r} ({type(value).__name__})", f"give {wanted}"
    )


@dataclass(frozen=True)
class ModelConfig(_Config):
    """Architecture of a decoder-only transformer. Shapes: D = hidden_size, H = num_heads, K = num_kv_heads, Dh = D / H,
    F = intermediate_size, V = vocab_size.

    num_kv_heads: None is num_heads (multi-head attention); fewer is grouped-query attention; 1 is multi-query.
    intermediate_size: None is 8/3 D rounded to a multiple of 8 for the gated SwiGLU and 1.5 times that for the plain MLPs,
        so that all three hold exactly as many parameters.
    attention_scale: factor on q.k; None is 1 / sqrt(Dh).
    qk_norm: RMSNorm over the channels of each query and key head, before RoPE (Henry et al. 2020, with RMSNorm in place of
        the unit length), with one gain a channel that all heads of a layer share.
    init: ``fixed`` draws every matrix at init_std; ``scaled`` at init_std * sqrt(1024 / fan_in), so that init_std keeps its
        meaning at fan_in 1024 and narrow layers are not starved.
    """

    vocab_size: int = 512
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int | None = None
    intermediate_size: int | None = None
    max_seq_len: int = 128
    rope_theta: float = 10000.0
    dropout: float = 0.0
    norm: str = "rmsnorm"
    norm_position: str = "pre"
    mlp: str = "swiglu"
    position: str = "rope"
    tie_embeddings: bool = True
    attention_scale: float | None = None
    init: str = "fixed"
    init_std: float = 0.02
    norm_eps: float = 1e-6
    qk_norm: bool = False

    def __post_init__(self) -> None:
        self._check_types()
        self._one_of("norm", NORMS)
        self._one_of("norm_position", NORM_POSITIONS)
        self._one_of("mlp", MLPS)
        self._one_of("position", POSITIONS)
        self._one_of("init", INITS)
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "max_seq_len"):
            value = getattr(self, name)
            self._require(value >= 1, f"{name} must be at least 1", "give a positive whole number", **{name: value})
        for name in ("num_kv_heads", "intermediate_size"):
            value = getattr(self, name)
            self._require(
                value is None or value >= 1,
                f"{name} must be at least 1",
                "leave it out for its default",
                **{name: value},
            )
        self._require(
            self.hidden_size % self.num_heads == 0,
            "hidden_size must be divisible by num_heads",
            f"num_heads could be {_divisors_near(self.hidden_size, self.num_heads)}, or hidden_size "
            f"{self.num_heads * max(1, round(self.hidden_size / self.num_heads))}",
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
        )
        kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        self._require(
            kv_heads <= self.num_heads and self.num_heads % kv_heads == 0,
            "num_heads must be divisible by num_kv_heads",
            f"num_kv_heads could be {_divisors_near(self.num_heads, kv_heads)}",
            num_heads=self.num_heads,
            num_kv_heads=kv_heads,
        )
        self._require(
            self.position != "rope" or self.head_dim % 2 == 0,
            "RoPE turns pairs of channels, so the head size hidden_size / num_heads must be even",
            "choose another num_heads, or position='learned', 'sinusoidal' or 'none'",
            head_dim=self.head_dim,
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
        )
        self._require(
            self.position != "sinusoidal" or self.hidden_size % 2 == 0,
            "sinusoidal positions pair a sine with a cosine, so hidden_size must be even",
            "add 1 to hidden_size",
            hidden_size=self.hidden_size,
        )
        self._require(0 <= self.dropout < 1, "dropout must be in [0, 1)", "0 turns it off", dropout=self.dropout)
        for name in ("rope_theta", "init_std", "norm_eps", "attention_scale"):
            value = getattr(self, name)
            self._require(
                value is None or value > 0, f"{name} must be positive", "give a number above 0", **{name: value}
            )

    @property
    def head_dim(self) -> int:
        """Dh, channels of one head."""
        return self.hidden_size // self.num_heads

    def resolve(self) -> ModelConfig:
        """The same config with every None replaced by the value it stands for."""
        gated = max(8, round(8 * self.hidden_size / 3 / 8) * 8)
        derived = {
            "num_kv_heads": self.num_heads,
            "intermediate_size": gated if self.mlp == "swiglu" else gated * 3 // 2,
            "attention_scale": self.head_dim**-0.5,
        }
        return self.replace(**{name: value for name, value in derived.items() if getattr(self, name) is None})


@dataclass(frozen=True)
class TrainConfig(_Config):
    """How a model is trained. ``batch_size`` counts windows per micro-step; a step sees batch_size * grad_accum windows of
    seq_len tokens.

    warmup_steps rise linearly to learning_rate; then ``cosine`` falls to min_lr at max_steps, and ``wsd`` stays and falls
    linearly over the last decay_steps (None is a fifth of max_steps).
    seq_len: the training window; None is the model's max_seq_len. stride: tokens between window starts; None is seq_len // 2.
    unique_tokens: train on this many distinct tokens only (windows taken from a fixed shuffle); None is all of them.
    eval_interval: steps between evaluations; None is max_steps // 20, at least 1. eval_tokens: validation tokens scored each
        time, always the same ones. patience: stop after so many evaluations without a better val_loss; None never stops early.
    precision: of matrix products; weights, norms, softmax and loss stay fp32. ``auto`` and compile None are picked by what was
        measured on this machine (see ``backend``); ``fp32`` and False give the plain path. compile True compiles a run of any
        length, and needs a C++ compiler.
    loss_scaling: under precision fp16, multiply the loss by a power of two before the backward pass and divide the gradient
        by it, so that small gradients do not become zero (Micikevicius et al. 2018); False keeps that factor at 1. No other
        precision has one.
    checkpoint_minutes: how often a resumable checkpoint is written where a folder for it is given; it changes no number.
    """

    learning_rate: float = 3e-3
    batch_size: int = 8
    grad_accum: int = 1
    max_steps: int = 1000
    warmup_steps: int = 50
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    min_lr: float = 0.0
    schedule: str = "cosine"
    decay_steps: int | None = None
    seq_len: int | None = None
    stride: int | None = None
    unique_tokens: int | None = None
    precision: str = "auto"
    loss_scaling: bool = True
    device: str = "cpu"
    compile: bool | None = None
    threads: int | None = None
    seed: int = 0
    eval_interval: int | None = None
    eval_tokens: int = 65536
    patience: int | None = None
    checkpoint_minutes: float = 1.0

    def __post_init__(self) -> None:
        self._check_types()
        self._one_of("schedule", SCHEDULES)
        self._one_of("precision", PRECISIONS)
        for name in ("batch_size", "grad_accum", "max_steps", "eval_tokens"):
            value = getattr(self, name)
            self._require(value >= 1, f"{name} must be at least 1", "give a positive whole number", **{name: value})
        for name in ("decay_steps", "seq_len", "stride", "unique_tokens", "threads", "eval_interval", "patience"):
            value = getattr(self, name)
            self._require(value is None or value >= 1, f"{name} must be at least 1", "leave it out", **{name: value})
        for name in ("warmup_steps", "weight_decay", "min_lr", "seed", "checkpoint_minutes"):
            value = getattr(self, name)
            self._require(value >= 0, f"{name} must not be negative", "0 turns it off", **{name: value})
        for name in ("learning_rate", "grad_clip"):
            value = getattr(self, name)
            self._require(value > 0, f"{name} must be positive", "give a number above 0", **{name: value})
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            self._require(0 <= value < 1, f"{name} must be in [0, 1)", "0.9 and 0.95 are usual", **{name: value})
        self._require(
            self.min_lr <= self.learning_rate,
            "min_lr must not exceed learning_rate",
            "min_lr is where the schedule ends; 0 or learning_rate / 10 are usual",
            min_lr=self.min_lr,
            learning_rate=self.learning_rate,
        )
        self._require(
            self.warmup_steps < self.max_steps or self.max_steps == 1,
            "warmup_steps must be smaller than max_steps",
            "lower warmup_steps or train for more steps",
            warmup_steps=self.warmup_steps,
            max_steps=self.max_steps,
        )

    def resolve(self, model: ModelConfig) -> TrainConfig:
        """The same config with every None that a model decides replaced; checks it against the model."""
        seq_len = self.seq_len or model.max_seq_len
        if seq_len > model.max_seq_len:
            raise ConfigError(
                "seq_len may not exceed the model's max_seq_len",
                f"seq_len={seq_len}, max_seq_len={model.max_seq_len}",
                "lower seq_len or raise max_seq_len",
            )
        derived = {
            "decay_steps": max(1, self.max_steps // 5),
            "seq_len": seq_len,
            "stride": max(1, seq_len // 2),
            "eval_interval": max(1, self.max_steps // 20),
        }
        return self.replace(**{name: value for name, value in derived.items() if getattr(self, name) is None})

    @property
    def windows_per_step(self) -> int:
        return self.batch_size * self.grad_accum


@dataclass(frozen=True)
class GenerateConfig(_Config):
    """How text is sampled. temperature 0 is greedy; top_k None and top_p 1 keep every token; repetition_penalty 1 is none
    (Keskar et al. 2019: positive logits of tokens already seen are divided by it, negative ones multiplied)."""

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        self._require(
            self.temperature >= 0, "temperature must not be negative", "0 is greedy", temperature=self.temperature
        )
        self._require(
            self.top_k is None or self.top_k >= 1,
            "top_k must be at least 1",
            "None keeps every token",
            top_k=self.top_k,
        )
        self._require(0 < self.top_p <= 1, "top_p must be in (0, 1]", "1 keeps every token", top_p=self.top_p)
        self._require(
            self.repetition_penalty > 0,
            "repetition_penalty must be positive",
            "1 turns it off, above 1 discourages repeats",
            repetition_penalty=self.repetition_penalty,
        )
        self._require(
            self.max_new_tokens >= 1,
            "max_new_tokens must be at least 1",
            "give a positive whole number",
            max_new_tokens=self.max_new_tokens,
        )
        self._require(self.seed >= 0, "seed must not be negative", "give 0 or more", seed=self.seed)


@dataclass(frozen=True)
class Damage(_Config):
    """How a text is spoilt on purpose, to measure what its quality is worth; ``str`` writes it as ``parse`` reads it.

    kind: ``swap`` has neighbouring characters change places, ``shuffle`` lines; ``repeat`` writes lines again behind themselves,
        ``boilerplate`` puts stock phrases of web pages between lines, ``foreign`` lines of a made-up language.
    share: of the spoilt text that is not as it was: of its characters for ``swap``, of its lines for the others.
    seed: of the choice of places.
    """

    kind: str
    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        self._one_of("kind", DAMAGES)
        whole = self.kind in ("swap", "shuffle")  # the others add lines, and something must be there to add them to
        self._require(
            0 < self.share < 1 or (whole and self.share == 1),
            f"the share of a damage must be above 0 and {'at most' if whole else 'below'} 1",
            "0.1 spoils a tenth; leave damage out for the text as it is",
            kind=self.kind,
            share=self.share,
        )
        self._require(self.seed >= 0, "seed must not be negative", "give 0 or more", seed=self.seed)

    @classmethod
    def parse(cls, text: str) -> Damage:
        """The damage that ``kind:share`` or ``kind:share:seed`` says. Raises ConfigError for anything else."""
        kind, *numbers = text.split(":")
        try:
            share, seed = (float(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 0)
        except (IndexError, ValueError):
            share = None
        if share is None or len(numbers) > 2:
            raise ConfigError(
                "A damage is a kind and a share, and a seed if it is not 0, with colons between",
                f"damage={text!r}",
                f"write {kind if kind in DAMAGES else 'swap'}:0.1, or swap:0.1:3; the kinds are {', '.join(DAMAGES)}",
            )
        return cls(kind, share, seed)

    def __str__(self) -> str:
        return f"{self.kind}:{self.share:.10g}" + (f":{self.seed}" if self.seed else "")


@dataclass(frozen=True)
class DataConfig(_Config):
    """Which text, and how it becomes tokens. text: a name from ``tinylm.corpora.NAMES`` or a path to a file or folder of the
    user's own; field: the key that holds the text in a jsonl file. The tokenizer's size is the model's vocab_size.
    damage: ``kind:share`` or ``kind:share:seed``, such as swap:0.1, spoils the training part on purpose (see ``Damage``); the
    tokenizer and the validation part stay those of the clean text. None spoils nothing."""

    text: str = "verse"
    tokenizer: str = "bpe"
    field: str | None = None
    damage: str | None = None

    def __post_init__(self) -> None:
        self._check_types()
        self._one_of("tokenizer", TOKENIZERS)
        if self.damage is not None:  # one way to write it, so that it is found again
            object.__setattr__(self, "damage", str(Damage.parse(self.damage)))


def _divisors_near(number: int, near: int) -> str:
    near = min(near, number)
    within = range(max(1, near - 1000), min(number, near + 1000) + 1)  # a foreign config may hold any number
    divisors = [1, *(d for d in within if d > 1 and number % d == 0)]
    return " or ".join(str(d) for d in sorted(sorted(divisors, key=lambda d: abs(d - near))[:3]))
