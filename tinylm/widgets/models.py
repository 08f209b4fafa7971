"""Texts and models to play with, without a network: what studies have left, or something small made here and now."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path

import torch

from tinylm import files
from tinylm.checkpoint import load_model, save_model
from tinylm.model import TinyLM
from tinylm.study.design import Recipe
from tinylm.study.parameters import repository
from tinylm.tokenizer import Tokenizer
from tinylm.train import Trainer


def study_folders(study: str | None = None) -> list[Path]:
    """Results folders of studies that are there, one's own before the reference's."""
    bases = (repository() / "results" / "local", repository() / "results")
    found = [folder for base in bases for folder in ([base / study] if study else sorted(base.glob("*")))]
    return [folder for folder in found if (folder / "runs").is_dir()]


def find_model(study: str = "quickstart") -> Path | None:
    """The best model that a study kept, in results/local/<study>/models, else in results/<study>/models; None without.

    ``best.safetensors`` where there is one, else the file whose metadata tells the lowest val_loss.
    """
    for results in (repository() / "results" / "local", repository() / "results"):
        kept = sorted((results / study / "models").glob("*.safetensors"))
        if kept:
            named = [path for path in kept if path.stem == "best"]
            return named[0] if named else min(kept, key=lambda path: _val_loss(load_model(path)[2]))
    return None


def load_or_train(study: str = "quickstart", seconds: float = 20.0) -> tuple[TinyLM, Tokenizer]:
    """A model to play with, and a line about it: the study's best one, or a small one trained here and now."""
    path = find_model(study)
    if path is None:
        return small_model(seconds)
    model, tokenizer, about = load_model(path)
    # Steps as small as these lose by a second thread, most of all beside a busy neighbour; small_model does the same.
    torch.set_num_threads(1)
    print(f"{path.relative_to(repository())}: {_in_words(model, about)}")
    return model, tokenizer


@functools.cache
def _pages() -> list[str]:
    """A text that every Python brings along, its own language reference (``pydoc_data.topics``, 0.5 MB), in pages: its
    prose, tables and rules left out, the lines of a paragraph joined."""
    from pydoc_data.topics import topics

    prose = {name: re.sub(r"(?m)^\s*(?:[|+]|[*=-]{3}).*$", "", topics[name]) for name in topics}
    return ["\n".join(" ".join(part.split()) for part in prose[name].split("\n\n")) for name in sorted(prose)]


def own_manual() -> str:
    """Path of a text file that needs no network: Python's own manual, written to the lab's cache."""
    text = "\n".join(_pages())
    path = files.home() / "labs" / f"python-manual-{files.sha256_bytes(text.encode())[:8]}.txt"
    if not path.exists():
        files.write_whole(path, text)
    return str(path)


def small_model(seconds: float = 20.0) -> tuple[TinyLM, Tokenizer]:
    """Train a small model for about so long on Python's own manual, and keep it in the lab's cache; the next call takes it
    from there."""
    pages, recipe = _pages(), Recipe()
    config = recipe.model((64, 2, 4), vocab_size=512)
    identity = files.sha256_bytes(files.canonical_json([pages, config.to_dict(), seconds]).encode())[:16]
    path = files.home() / "labs" / f"small-{identity}.safetensors"
    if path.exists():
        model, tokenizer, about = load_model(path)
        print(f"A small model from an earlier visit: {_in_words(model, about)}")
        return model, tokenizer
    print(f"No study has left a model yet, so a small one learns from Python's own manual, for about {seconds:.0f} s.")
    tokenizer = Tokenizer.train(pages, "bpe", config.vocab_size)
    train = tokenizer.encode_array("\n".join(page for number, page in enumerate(pages) if number % 10))
    val = tokenizer.encode_array("\n".join(page for number, page in enumerate(pages) if not number % 10))
    probe = recipe.train(config, 20 * 8 * recipe.seq_len, learning_rate=1e-3, batch_size=8, eval_tokens=1)
    speed = Trainer(config, probe, train, val).run().tokens_per_second
    rate = recipe.learning_rate(sum(p.numel() for p in TinyLM(config).parameters()))
    plan = recipe.train(config, speed * seconds, learning_rate=rate)
    trainer = Trainer(config, plan, train, val, tokenizer.token_bytes, progress=True)
    result = trainer.run()
    about = {"text": "Python's manual", "val_loss": result.val_loss, "tokens_seen": result.tokens_seen}
    if result.status == "finished":
        save_model(path, trainer.model, tokenizer, about)
    print(_in_words(trainer.model, about))
    return trainer.model, tokenizer


def _val_loss(about: dict) -> float:
    value = about.get("val_loss")
    return math.inf if value is None else float(value)


def _in_words(model: TinyLM, about: dict) -> str:
    parts = [f"{sum(p.numel() for p in model.parameters()):,} parameters"]
    parts += [f"trained on {about['text']}"] if about.get("text") else []
    parts += [f"validation loss {_val_loss(about):.3f} nats per token"] if about.get("val_loss") is not None else []
    return ", ".join(parts) + "."
