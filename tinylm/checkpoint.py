"""Models and training states on disk: safetensors, whole or not at all, and checked against a hash of their contents.

A file is a plain safetensors file (an 8-byte length, a JSON header, the tensors), so that other tools read it too. Its
header metadata holds strings: ``format``, ``meta`` (JSON) and ``sha256``, the hash of everything else in header and
body.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tinylm import counts
from tinylm.config import ModelConfig
from tinylm.errors import ConfigError, DamagedFileError, LabError
from tinylm.files import canonical_json, sha256_bytes, write_whole
from tinylm.model import TinyLM

MODEL_FORMAT, STATE_FORMAT = "tinylm-model-1", "tinylm-state-1"
MOST_POSITIONS = (
    1 << 26
)  # times channels of a head, the most that a file is believed: their table stands before any text
_TOKENIZER = "tokenizer"  # no parameter bears this name: theirs end in .weight or .bias


def save_model(
    path: str | os.PathLike,
    model: TinyLM,
    tokenizer: object | None = None,
    metadata: dict | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write one self-contained file: weights (tied ones once) as ``dtype``, the config, the tokenizer's bytes and
    ``metadata`` (JSON values). Equal models give equal files."""
    tensors = {name: parameter.detach().to("cpu", dtype) for name, parameter in model.named_parameters()}
    if tokenizer is not None:
        tensors[_TOKENIZER] = torch.frombuffer(bytearray(tokenizer.to_bytes()), dtype=torch.uint8)
    meta = {"config": model.config.to_dict(), "metadata": metadata or {}}
    return write_whole(path, _pack(tensors, MODEL_FORMAT, meta))


def load_model(path: str | os.PathLike) -> tuple[TinyLM, object | None, dict]:
    """(model on the CPU in fp32 and eval mode, tokenizer or None, metadata) of a file written by ``save_model``.

    Raises DamagedFileError where the file is not what was written, ConfigError where its config is unknown here.
    """
    tensors, meta = _unpack(path, MODEL_FORMAT)
    stored = tensors.pop(_TOKENIZER, None)
    told, metadata = meta.get("config"), meta.get("metadata")
    if not isinstance(told, dict) or not isinstance(metadata, dict):
        raise DamagedFileError("A model's file must tell its config", path, "write the file again from its model")
    model = _built(ModelConfig.from_dict(told), tensors, path)
    copy_weights(model, tensors, path)
    tokenizer = None
    if stored is not None:
        from tinylm.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_bytes(stored.numpy().tobytes())
    return model.eval(), tokenizer, metadata


def _built(config: ModelConfig, tensors: dict[str, Tensor], path: str | os.PathLike) -> TinyLM:
    """The model of a file's config, where that is not far larger than the file: no room is taken on its word alone."""
    held, said = sum(tensor.numel() for tensor in tensors.values()), counts.parameters(config)["total"]
    channels = config.resolve().head_dim
    if said > 4 * max(held, 1 << 18) or config.max_seq_len * channels > MOST_POSITIONS:
        raise DamagedFileError(
            "A file's weights must be those of its config",
            f"{path}: {held:,} weights where the config has {said:,}, and max_seq_len={config.max_seq_len:,} of {channels:,} "
            "channels a head",
            "write the file again from its model",
        )
    return TinyLM(config)


def copy_weights(model: TinyLM, weights: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Write ``weights`` (by parameter name) into ``model``, in place; DamagedFileError where names or shapes differ."""
    own = dict(model.named_parameters())
    for name in sorted({*own, *weights}):
        shapes = [tuple(tensors[name].shape) if name in tensors else None for tensors in (own, weights)]
        if shapes[0] != shapes[1]:
            raise DamagedFileError(
                "A file's weights must be those of its config",
                f"{path}: {name} is {shapes[0] or 'absent'} by the config and {shapes[1] or 'absent'} in the file",
                "write the file again from its model",
            )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def save_state(path: str | os.PathLike, tensors: dict[str, Tensor], meta: dict) -> Path:
    """Write tensors (bit for bit) and meta (a dict of JSON values) as one file."""
    return write_whole(path, _pack(tensors, STATE_FORMAT, meta))


def load_state(path: str | os.PathLike, expect: dict | None = None) -> tuple[dict[str, Tensor], dict]:
    """(tensors, meta) of a file written by ``save_state``.

    expect: what the file's meta must hold, by key; ConfigError names the values that differ. DamagedFileError where the
    file is not what was written.
    """
    tensors, meta = _unpack(path, STATE_FORMAT)
    wanted = json.loads(canonical_json(expect or {}))  # as it would come back from a file: tuples are lists
    different = [line for key, value in wanted.items() for line in _differences(key, meta.get(key), value)]
    if different:
        raise ConfigError(
            "A run is resumed only with what it was started with",
            f"{path}: " + "; ".join(different[:5]) + ("; ..." if len(different) > 5 else ""),
            "ask for what the file holds, choose another checkpoint folder, or delete the file to start anew",
        )
    return tensors, meta


def _differences(name: str, stored: object, wanted: object) -> list[str]:
    if isinstance(stored, dict) and isinstance(wanted, dict):
        keys = sorted({*stored, *wanted})
        return [line for key in keys for line in _differences(f"{name}.{key}", stored.get(key), wanted.get(key))]
    return [] if stored == wanted else [f"{name} is {stored!r} in the file, {wanted!r} was asked for"]


def _pack(tensors: dict[str, Tensor], kind: str, meta: dict) -> bytes:
    header, body = _split(save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))
    notes = {"format": kind, "meta": canonical_json(meta)}
    header["__metadata__"] = {**notes, "sha256": _digest(header, notes, body)}
    text = canonical_json(header).encode("utf-8")
    text += b" " * (-len(text) % 8)  # safetensors aligns its body to 8 bytes
    return struct.pack("<Q", len(text)) + text + body


def _unpack(path: str | os.PathLike, kind: str) -> tuple[dict[str, Tensor], dict]:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise LabError(
            "The file must exist and be readable", f"{path}: {error.strerror}", "check the path, or write it again"
        ) from error
    try:
        header, body = _split(data)
        notes = dict(header.pop("__metadata__"))
        stored, found = notes.pop("sha256"), notes["format"]
        actual = _digest(header, notes, body)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFileError(
            "The file must be a safetensors file that this lab wrote",
            f"{path}, {len(data)} bytes, whose header cannot be read",
            "use a file from save_model or save_state, or write it again: it may be truncated",
        ) from error
    if actual != stored:
        raise DamagedFileError(
            "A file's contents must match the hash written with them",
            f"{path}, {len(data)} bytes: truncated or altered",
            "write or copy the file again; delete a damaged checkpoint to start its run anew",
        )
    if found != kind:
        raise DamagedFileError(
            f"The file must be of the kind {kind}", f"{path} of the kind {found}", "models and states are not exchanged"
        )
    try:
        tensors, meta = load(data), json.loads(notes["meta"])
        if not isinstance(meta, dict):
            raise ValueError(f"its meta is {type(meta).__name__}")
        return tensors, meta
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise DamagedFileError(
            "The file must be a valid safetensors file", f"{path}: {error}", "write it again"
        ) from error


def _split(data: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack_from("<Q", data)
    if length > len(data) - 8:
        raise ValueError("header longer than the file")
    return json.loads(data[8 : 8 + length].decode("utf-8")), data[8 + length :]


def _digest(header: dict, notes: dict, body: bytes) -> str:
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    return sha256_bytes(canonical_json([tensors, notes]).encode("utf-8") + body)
