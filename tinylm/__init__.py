"""A lab for small decoder-only language models: from a text to a measured scaling law on a laptop.

Everything named here is imported when it is first used, so that ``import tinylm`` is quick and imports no torch.
"""

from __future__ import annotations

import importlib
import sys
import types

__version__ = "0.1.0"

_HOME = {
    "ModelConfig": "config",
    "TrainConfig": "config",
    "GenerateConfig": "config",
    "DataConfig": "config",
    "TinyLM": "model",
    "Tokenizer": "tokenizer",
    "TextDataset": "train",
    "Trainer": "train",
    "generate": "generate",
    "stream": "generate",
    "load_model": "checkpoint",
    "save_model": "checkpoint",
    "prepare": "corpora",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """Keeps ``tinylm.generate`` the function, where importing the submodule of that name would put the module."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "generate" and isinstance(value, types.ModuleType):
            value = value.generate
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
