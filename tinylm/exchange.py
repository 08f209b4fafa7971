"""Models to and from the Hugging Face Llama format: config.json, model.safetensors (or shards of it) and a tokenizer.

Llama is one point among our switches: RMSNorm before each part, SwiGLU, RoPE that turns channels i and i + Dh / 2, no
biases, attention scaled by 1 / sqrt(Dh) (Touvron et al. 2023). What lies elsewhere is refused, with the reason, before
anything is written. The files are written and read here, without transformers; pickled weights are never opened.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from tinylm.config import ModelConfig
from tinylm.errors import ConfigError, DamagedFileError, LabError
from tinylm.files import disk_error, write_whole
from tinylm.model import TinyLM
from tinylm.positional import build_position
from tinylm.tokenizer import Tokenizer
from tinylm.tokenizer_json import ImportedTokenizer, read_object, read_tokenizer, to_json

WINDOW = 2048  # tokens of context that an imported model gets where no other window is asked for
OURS = {"format": "pt", "written_by": "tinylm"}  # in the header of the weights, by which an earlier export is known
WRITTEN = ("model.safetensors", "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "config.json")

_OUTSIDE = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
_HEAD = {"head.weight": "lm_head.weight"}
_INSIDE = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.q.weight": "self_attn.q_proj.weight",
    "attention.k.weight": "self_attn.k_proj.weight",
    "attention.v.weight": "self_attn.v_proj.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
}
# What a config.json leaves out means what its family says. Mistral is Llama with a window over its attention.
_FAMILIES = {"llama": {}, "mistral": {"num_key_value_heads": 8, "sliding_window": 4096}}
_DTYPES = ("F64", "F32", "F16", "BF16")


def export_hf(model: TinyLM, tokenizer: Tokenizer | None, folder: str | os.PathLike) -> Path:
    """Write a model of ours as a folder that transformers loads as Llama, in fp32, with equal logits; its tokenizer, where
    there is one, with equal text. Dropout, which is for training, does not go along.

    Raises LabError for a model that Llama cannot express, and for a folder that holds anything but an earlier export.
    """
    folder, config = Path(folder), model.config
    _check_expressible(config)
    told = to_json(tokenizer) if tokenizer else None
    if tokenizer and tokenizer.vocab_size != config.vocab_size:
        raise LabError(
            "Model and tokenizer must have the same vocabulary",
            f"vocab_size={config.vocab_size} in the model, {tokenizer.vocab_size} in the tokenizer",
            "give the tokenizer that the model was trained with",
        )
    if folder.exists() and (others := _others(folder)):
        raise LabError(
            "A model is exported to a folder of its own",
            f"{folder} holds {', '.join(others[:5])}",
            "name another folder",
        )
    about = {
        **{
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "torch_dtype": "float32",
        },
        **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
        **{"num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim},
        **{"max_position_embeddings": config.max_seq_len, "rope_theta": config.rope_theta, "rope_scaling": None},
        **{"rms_norm_eps": config.norm_eps, "tie_word_embeddings": config.tie_embeddings},
        **{"attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "use_cache": True},
        **{"initializer_range": min(config.init_std, 1.0)},
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},  # left out, they would be Llama's
    }
    names = _names(config)
    weights = {names[ours]: weight.detach().to("cpu", torch.float32) for ours, weight in model.named_parameters()}
    try:
        for name in reversed(WRITTEN):  # config.json first and last: without it, half a folder is no model
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise disk_error(error, folder) from error
    write_whole(folder / "model.safetensors", save(weights, metadata=OURS))
    if tokenizer:
        options = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_seq_len}
        options["clean_up_tokenization_spaces"] = False
        write_whole(folder / "tokenizer.json", json.dumps(told, ensure_ascii=False))
        write_whole(folder / "tokenizer_config.json", json.dumps(options, indent=2) + "\n")
        if tokenizer.model_proto:
            write_whole(folder / "tokenizer.model", tokenizer.model_proto)
    write_whole(folder / "config.json", json.dumps(about, indent=2) + "\n")
    return folder


def _others(folder: Path) -> list[str]:
    """What a folder holds that no earlier export left there."""
    try:
        names = sorted(path.name for path in folder.iterdir() if path.suffix != ".part")
        with contextlib.suppress(OSError, SafetensorError), safe_open(folder / WRITTEN[0], framework="pt") as weights:
            if weights.metadata() == OURS:  # they are the first that is written, and the last that goes
                return [name for name in names if name not in WRITTEN]
        return names
    except OSError as error:
        raise LabError(
            "The folder must be one that can be read", f"{folder}: {error.strerror}", "name another"
        ) from error


def _check_expressible(config: ModelConfig) -> None:
    told = {
        "norm": (config.norm, "rmsnorm"),
        "norm_position": (config.norm_position, "pre"),
        "mlp": (config.mlp, "swiglu"),
        "position": (config.position, "rope"),
        "attention_scale": (config.attention_scale, config.head_dim**-0.5),
        "qk_norm": (config.qk_norm, False),
    }
    wrong = [f"{name}={value!r}" for name, (value, wanted) in told.items() if value != wanted]
    if wrong:
        wanted = ", ".join(f"{name}={value!r}" for name, (_, value) in told.items())
        raise LabError(
            f"The Llama format holds models with {wanted}, and no others",
            ", ".join(wrong),
            "train one of that kind, or keep this one in its own file",
        )


def _names(config: ModelConfig) -> dict[str, str]:
    """Our parameters' names -> theirs, in our order."""
    names = {f"blocks.{n}.{a}": f"model.layers.{n}.{b}" for n in range(config.num_layers) for a, b in _INSIDE.items()}
    return {**_OUTSIDE, **names, **({} if config.tie_embeddings else _HEAD)}


def import_hf(folder: str | os.PathLike, max_seq_len: int | None = None) -> tuple[TinyLM, ImportedTokenizer]:
    """A Llama-family checkpoint from its folder: the model in fp32, ready to sample, and its tokenizer.

    max_seq_len: tokens that the model looks back on; None is what it was trained for, but at most 2,048, since the room for
    keys and values grows with it. Weights go from the file into the model one tensor at a time.

    Raises LabError for what our models cannot express (scaled RoPE, biases, a sliding window, quantised weights), for
    weights that are not those of the config, and for pickled ones.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LabError("A checkpoint is a folder with a config.json", folder, "name the folder that holds it")
    config, ends = _read_config(folder, max_seq_len)
    places = _places(folder)
    layers = config.num_layers
    if 9 * layers > len(places):  # before names are made for each of them
        raise _not_of_config(folder, f"{layers} layers by the config, {len(places)} tensors in the files")
    names = _names(config)
    own = {"lm_head.weight"} if config.tie_embeddings else set()
    unknown = sorted(name for name in places.keys() - names.values() - own if not name.endswith("rotary_emb.inv_freq"))
    if missing := sorted(names.values() - places.keys()):
        raise _not_of_config(folder, f"no {', '.join(missing[:3])}" + (" ..." if len(missing) > 3 else ""))
    if unknown:
        raise _not_of_config(folder, f"also {', '.join(unknown[:3])}" + (" ..." if len(unknown) > 3 else ""))
    tokenizer = read_tokenizer(folder, config.vocab_size)
    tokenizer.ends = ends

    try:
        with torch.device("meta"):  # shapes without weights
            model = TinyLM(config)
    except (RuntimeError, OverflowError) as error:
        raise _not_of_config(folder, str(error)) from error
    wanted = {names[ours]: tuple(weight.shape) for ours, weight in model.named_parameters()}
    wanted |= {name: wanted[_OUTSIDE["embedding.weight"]] for name in own & places.keys()}
    _each(folder, places, lambda name, file: _check(folder, name, file.get_slice(name), wanted.get(name)))
    model = model.to_empty(device="cpu").eval()
    model.position = build_position(config)
    parameters = {names[ours]: weight for ours, weight in model.named_parameters()}
    for name in own & places.keys():
        parameters[name] = parameters[_OUTSIDE["embedding.weight"]]

    @torch.no_grad()
    def fill(name: str, file: safe_open) -> None:
        if name in parameters and name not in own:
            parameters[name].copy_(file.get_tensor(name))

    @torch.no_grad()
    def compare(name: str, file: safe_open) -> None:
        if name in own and not torch.equal(file.get_tensor(name).float(), parameters[name]):
            raise _not_of_config(folder, f"tie_word_embeddings is true, and {name} is not the embedding")

    _each(folder, places, fill)
    _each(folder, {name: places[name] for name in own & places.keys()}, compare)
    return model, tokenizer


def _read_config(folder: Path, max_seq_len: int | None) -> tuple[ModelConfig, frozenset[int]]:
    """What config.json comes to as a config of ours, and the ids that end a text."""
    path = folder / "config.json"
    told = read_object(path)
    family = told.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        raise _refused(path, f"model_type={family!r}", f"a model of the kind {' or '.join(_FAMILIES)}")
    told = {**_FAMILIES[family], **told}
    rope = told.get("rope_parameters") or told.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise _refused(path, f"rope_parameters={rope!r}", "an object there, or nothing")
    kind = rope.get("rope_type", rope.get("type", "default"))
    plain = {
        "hidden_act": (told.get("hidden_act", "silu"), ("silu", "swish")),
        "attention_bias": (told.get("attention_bias"), (None, False)),
        "mlp_bias": (told.get("mlp_bias"), (None, False)),
        "sliding_window": (told.get("sliding_window"), (None,)),
        "rope_type": (kind, ("default",)),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", told.get("partial_rotary_factor")), (None, 1)),
        "quantization_config": (told.get("quantization_config"), (None,)),
    }
    for name, (value, allowed) in plain.items():
        if value not in allowed:
            raise _refused(path, f"{name}={value!r}", f"{name}={allowed[-1]!r}")
    tied = told.get("tie_word_embeddings", False)
    longest = told.get("max_position_embeddings", WINDOW)
    for name, value, type_ in (("tie_word_embeddings", tied, bool), ("max_position_embeddings", longest, int)):
        if not isinstance(value, type_):
            raise _refused(path, f"{name}={value!r}", f"{name} of type {type_.__name__}")
    for theirs in _SIZES.values():
        if not isinstance(told.get(theirs), int):
            raise _refused(path, f"{theirs}={told.get(theirs)!r}", f"a whole number as {theirs}")
    if max_seq_len is not None and max_seq_len > longest:
        raise ConfigError(
            "max_seq_len may not exceed what the model was trained for",
            f"max_seq_len={max_seq_len}, max_position_embeddings={longest}",
            "lower max_seq_len, or leave it out",
        )
    heads = told.get("num_key_value_heads")
    config = ModelConfig(
        **{ours: told[theirs] for ours, theirs in _SIZES.items()},
        num_kv_heads=told["num_attention_heads"] if heads is None else heads,
        max_seq_len=max_seq_len or min(longest, WINDOW),
        rope_theta=rope.get("rope_theta", told.get("rope_theta", 10000.0)),
        norm_eps=told.get("rms_norm_eps", 1e-6),
        tie_embeddings=tied,
    ).resolve()
    if told.get("head_dim") not in (None, config.head_dim):
        raise _refused(path, f"head_dim={told['head_dim']!r}", f"head_dim={config.head_dim}, hidden_size by heads")
    return config, _ends(folder, told)


def _ends(folder: Path, told: dict) -> frozenset[int]:
    path = folder / "generation_config.json"
    ends = (read_object(path) if path.exists() else {}).get("eos_token_id", told.get("eos_token_id"))
    return frozenset(i for i in (ends if isinstance(ends, list) else [ends]) if isinstance(i, int))


def _refused(path: Path, got: str, wanted: str) -> LabError:
    return LabError(
        f"A checkpoint is read where our models can express it: {wanted}", f"{got} in {path}", "use another one"
    )


def _not_of_config(folder: Path, why: str) -> DamagedFileError:
    return DamagedFileError(
        "A checkpoint's weights must be those of its config", f"{folder}: {why}", "fetch or write the checkpoint again"
    )


def _places(folder: Path) -> dict[str, str]:
    """The file that holds each tensor."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not single.exists() and index.exists():
        places = read_object(index).get("weight_map")
        if not isinstance(places, dict) or not all(
            isinstance(file, str) and file.endswith(".safetensors") and file == Path(file).name
            for file in places.values()
        ):
            raise DamagedFileError(
                "An index must name a safetensors file beside it for each tensor", index, "fetch or write it again"
            )
        return places
    if not single.exists():
        pickled = sorted(p.name for kind in ("bin", "pt", "pth", "ckpt", "pkl") for p in folder.glob(f"*.{kind}"))
        raise LabError(
            "Weights are read from safetensors alone: to open a pickle (.bin, .pt) is to run what it says",
            f"{folder} holds {', '.join(pickled[:3]) or 'no model.safetensors'}",
            "where you trust it, write it anew with transformers: AutoModelForCausalLM.from_pretrained(old)."
            "save_pretrained(new, safe_serialization=True)",
        )
    found: list[str] = []
    _open(single, lambda file: found.extend(file.keys()))
    return dict.fromkeys(found, single.name)


def _each(folder: Path, places: dict[str, str], do) -> None:
    """``do(name, file)`` for each tensor, with one file open at a time."""
    by_file: dict[str, list[str]] = {}
    for name, file in places.items():
        by_file.setdefault(file, []).append(name)
    for file, names in sorted(by_file.items()):
        _open(folder / file, lambda opened, names=names: [do(name, opened) for name in names])


def _open(path: Path, do) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            do(file)
    except (OSError, SafetensorError) as error:
        raise DamagedFileError(
            "Weights must be in whole safetensors files", f"{path}: {error}", "fetch or write the checkpoint again"
        ) from error


def _check(folder: Path, name: str, tensor, wanted: tuple[int, ...] | None) -> None:
    if wanted is None:
        return
    if tuple(tensor.get_shape()) != wanted:
        raise _not_of_config(folder, f"{name} is {wanted} by the config and {tuple(tensor.get_shape())} in the file")
    if tensor.get_dtype() not in _DTYPES:
        raise LabError(
            f"Weights are read in the formats {', '.join(_DTYPES)}",
            f"{name} in {tensor.get_dtype()}",
            "use a checkpoint that is not quantised",
        )
