"""Models that transformers loads as ours compute, and theirs as they do; what cannot be exchanged is refused in words."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tinylm import tokenizer_json
from tinylm.checkpoint import load_model, save_model
from tinylm.cli import main
from tinylm.config import GenerateConfig, ModelConfig
from tinylm.errors import ConfigError, DamagedFileError, LabError
from tinylm.exchange import export_hf, import_hf
from tinylm.generate import generate
from tinylm.model import TinyLM
from tinylm.tokenizer import Tokenizer

REFERENCE = Path(__file__).resolve().parents[1] / "results" / "quickstart" / "models" / "best.safetensors"
SMALL = ModelConfig(vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=128)
GREEDY = GenerateConfig(temperature=0, max_new_tokens=100)
HARD = "x <0x0A> <unk> <s> \u2581a\t\ttab  two   three\n\n漢字 \r\n \u00e9 Ã end\u00a0\U0001f600 "
KINDS = {"bpe": 300, "unigram": 300, "char": 300, "byte": 256}


@pytest.fixture(scope="module")
def text():
    rng = random.Random(0)
    words = ["".join(rng.choices("aaabcdeéü<0xunk>", k=rng.randint(1, 6))) for _ in range(200)]
    return "\n".join(" ".join(rng.choices(words, k=9)) for _ in range(400))


@pytest.fixture(scope="module")
def trained(text):
    return {kind: Tokenizer.train([text], kind, size) for kind, size in KINDS.items()}


def theirs(folder):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float32
    return model.eval()


def logits_of(model, ids):
    with torch.no_grad():
        found = model(ids)
    return getattr(found, "logits", found)


def continued(model, tokenizer, prompt, count):
    """What transformers writes behind a prompt, greedily: token ids and text."""
    told = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**told, max_new_tokens=count, do_sample=False)[0, told["input_ids"].shape[1] :]
    return ids.tolist(), tokenizer.decode(ids)


# -------------------------------------------------------------------------------------------------------------- export


def test_transformers_speaks_as_the_reference_model_does(tmp_path):
    model, tokenizer, _ = load_model(REFERENCE)
    export_hf(model, tokenizer, tmp_path / "hf")
    other, its_tokenizer = theirs(tmp_path / "hf"), transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "The moon was bright, and all the little stars were gone;\nI went to see the sea. " * 9
    ids = torch.tensor([its_tokenizer(text)["input_ids"][: model.config.max_seq_len]])
    assert ids.tolist() == [tokenizer.encode(text)[: model.config.max_seq_len]]
    difference = (logits_of(other, ids) - logits_of(model, ids)).abs().max().item()
    largest = logits_of(model, ids).abs().max().item()
    print(f"logits up to {largest:.3g}, largest difference {difference:.3g}")
    assert difference <= 1e-5 * largest  # theirs rounds the frequencies of RoPE to fp32, ours does not
    written = generate(model, tokenizer, "The moon", GREEDY)
    assert continued(other, its_tokenizer, "The moon", 100) == (written.token_ids, written.text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": False, "rope_theta": 500.0, "num_kv_heads": 1, "norm_eps": 0.1}]
)
def test_a_model_of_any_tokenizer_goes_out_and_comes_back(kind, changes, trained, text, tmp_path):
    tokenizer = trained[kind]
    config = SMALL.replace(vocab_size=KINDS[kind], init="scaled", dropout=0.1, **changes)
    model = TinyLM(config, seed=1).eval()
    folder = export_hf(model, tokenizer, tmp_path / "new" / "folder")
    other, its_tokenizer = theirs(folder), transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.randint(0, config.vocab_size, (2, 128), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits_of(other, ids), logits_of(model, ids), rtol=0, atol=1e-5)
    for words in (text, HARD, "", " ", "\n"):
        ids = its_tokenizer(words)["input_ids"]
        assert its_tokenizer.decode(ids) == words == its_tokenizer.decode(tokenizer.encode(words))
        assert ids == tokenizer.encode(words) or (kind == "unigram" and len(ids) == len(tokenizer.encode(words)))
    written = generate(model, tokenizer, "abc", GREEDY)
    found = continued(other, its_tokenizer, "abc", 100)
    assert found[0] == written.token_ids and (found[1] == written.text or "\ufffd" in written.text)

    again, its_own = import_hf(folder)
    assert again.config == config.replace(dropout=0, init="fixed").resolve() and not again.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    assert its_own.encode(text) == tokenizer.encode(text) and its_own.encode(HARD) == tokenizer.encode(HARD)
    assert its_own.token_bytes.tolist() == tokenizer.token_bytes.tolist()
    assert generate(again, its_own, "abc", GREEDY).text == written.text


@pytest.fixture(scope="module")
def exported(trained):
    return {
        kind: tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json.to_json(own))) for kind, own in trained.items()
    }


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    words=st.text(
        st.sampled_from("aabe <0xA>\n\r\t\u2581é漢\u00a0\u0130\ue000") | st.characters(codec="utf-8"), max_size=60
    )
)
def test_any_text_survives_the_exported_tokenizer(kind, words, trained, exported):
    other = exported[kind]
    ids = other.encode(words).ids
    assert other.decode(ids) == words
    if kind != "unigram":  # whose scores theirs adds up in another precision
        assert ids == trained[kind].encode(words)


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "layernorm"},
        {"norm_position": "post"},
        {"mlp": "gelu"},
        {"mlp": "relu"},
        {"position": "learned"},
        {"position": "sinusoidal"},
        {"position": "none"},
        {"attention_scale": 0.1},
        {"qk_norm": True},
    ],
)
def test_what_llama_cannot_express_is_refused_before_anything_is_written(changes, tmp_path):
    ((name, value),) = changes.items()
    with pytest.raises(LabError, match=rf"Received: {name}={value!r}\."):
        export_hf(TinyLM(SMALL.replace(**changes)), None, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_an_export_takes_the_place_of_an_earlier_one_and_of_nothing_else(trained, tmp_path):
    folder = export_hf(TinyLM(SMALL), trained["bpe"], tmp_path / "hf")
    export_hf(TinyLM(SMALL, seed=1), None, folder)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    (folder / "thesis.txt").touch()
    with pytest.raises(LabError, match=r"a folder of its own.*thesis\.txt"):
        export_hf(TinyLM(SMALL), None, folder)
    a_llama(tmp_path / "theirs")
    (tmp_path / "theirs" / "generation_config.json").unlink()
    before = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    with pytest.raises(LabError, match=r"a folder of its own.*config\.json, model\.safetensors"):
        export_hf(TinyLM(SMALL), None, tmp_path / "theirs")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    with pytest.raises(LabError, match="vocab_size=300 in the model, 256 in the tokenizer"):
        export_hf(TinyLM(SMALL), trained["byte"], tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(LabError, match="Not a directory"):
        export_hf(TinyLM(SMALL), None, folder / "thesis.txt")


# -------------------------------------------------------------------------------------------------------------- import

CONFIG = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
CONFIG |= {"num_attention_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.1}


def a_llama(folder, shards="5GB", dtype=torch.float32, family=transformers.LlamaConfig, **changes):
    """A checkpoint as transformers writes it, with a tokenizer of bytes beside it."""
    torch.manual_seed(0)
    config = family(**{**CONFIG, "eos_token_id": 7, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=shards)
    if dtype != torch.float32:  # as the file holds it, with RoPE in full precision
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json.to_json(Tokenizer("byte", 256))))
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "num_key_value_heads": 2},
        {"shards": "20KB", "num_key_value_heads": 1, "rope_theta": 1000.0, "rms_norm_eps": 1e-3},
        {"dtype": torch.bfloat16},
        {"family": transformers.MistralConfig, "sliding_window": None, "num_key_value_heads": 2},
    ],
)
def test_a_checkpoint_of_theirs_computes_the_same_here(changes, tmp_path):
    other = a_llama(tmp_path, **changes)
    if "shards" in changes:
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    model, tokenizer = import_hf(tmp_path)
    assert model.config.num_kv_heads == changes.get("num_key_value_heads", 4)
    ids = torch.randint(0, 300, (2, 100), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits_of(model, ids), logits_of(other, ids), rtol=0, atol=1e-5)
    assert tokenizer.ends == {7} and tokenizer.vocab_size == 300
    told = torch.tensor([tokenizer.encode("It was")])
    ids = other.generate(told, max_new_tokens=100, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 6:]
    assert generate(model, tokenizer, "It was", GREEDY).token_ids == ids.tolist()
    if not changes:
        short = import_hf(tmp_path, max_seq_len=16)[0]
        assert short.config.max_seq_len == 16 and torch.equal(short.embedding.weight, model.embedding.weight)
        with pytest.raises(ConfigError, match=r"max_seq_len=1000, max_position_embeddings=128"):
            import_hf(tmp_path, max_seq_len=1000)


def changed(folder, name="config.json", **changes):
    told = json.loads((folder / name).read_text())
    told = {key: value for key, value in {**told, **changes}.items() if value != "absent"}
    (folder / name).write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"model_type": "absent"}, "model_type=None"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_type='llama3'"),
        ({"rope_parameters": "absent", "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"model_type": "mistral"}, "sliding_window=4096"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"head_dim": 16}, "head_dim=16"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": "absent"}, "hidden_size=None"),
        ({"hidden_size": "32"}, "hidden_size='32'"),
        ({"num_attention_heads": 5}, "num_heads=5"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3"),
        ({"rms_norm_eps": -1}, "norm_eps=-1"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers by the config"),
        ({"num_hidden_layers": 1}, r"also model\.layers\.1"),
        ({"hidden_size": 4 * 10**12}, "DamagedFileError"),
        ({"vocab_size": 301}, r"lm_head.weight is \(301, 32\) by the config and \(300, 32\) in the file"),
        ({"intermediate_size": 64}, r"\(32, 64\) by the config and \(32, 48\) in the file"),
    ],
)
def test_a_config_that_our_models_cannot_follow_is_refused(changes, words, tmp_path):
    a_llama(tmp_path)
    changed(tmp_path, **changes)
    if "head_dim" not in changes and "hidden_size" in changes:
        changed(tmp_path, head_dim="absent")
    with pytest.raises(LabError) as caught:
        import_hf(tmp_path)
    assert "Way out" in str(caught.value)
    if words == "DamagedFileError":
        assert isinstance(caught.value, DamagedFileError)
    else:
        caught.match(words)


def rewritten(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_are_not_those_of_the_config_are_refused(tmp_path):
    a_llama(tmp_path, tie_word_embeddings=True)
    rewritten(tmp_path, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    rewritten(tmp_path, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    import_hf(tmp_path)  # old checkpoints hold these too
    for change, words in [
        (lambda w: w["lm_head.weight"].add_(1), "lm_head.weight is not the embedding"),
        (lambda w: w.update({"lm_head.weight": torch.ones(2)}), r"lm_head.weight is \(300, 32\) by the config"),
        (
            lambda w: w.update(
                {"lm_head.weight": w["model.embed_tokens.weight"].clone(), "q.bias": w["model.norm.weight"] + 0}
            ),
            "also q.bias",
        ),
        (
            lambda w: (w.pop("q.bias"), w.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})),
            "model.norm.weight in I8",
        ),
        (lambda w: w.pop("model.norm.weight"), "no model.norm.weight"),
    ]:
        rewritten(tmp_path, change)
        with pytest.raises(LabError, match=words):
            import_hf(tmp_path)


def test_a_pickle_is_not_opened_and_the_way_out_is_told(tmp_path):
    a_llama(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(LabError, match=r"safetensors alone.*holds pytorch_model\.bin.*safe_serialization=True"):
        import_hf(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(LabError, match=r"no model\.safetensors"):
        import_hf(tmp_path)
    with pytest.raises(LabError, match="is a folder with a config"):
        import_hf(tmp_path / "config.json")
    (tmp_path / "config.json").unlink()
    with pytest.raises(LabError, match=r"config\.json: No such file"):
        import_hf(tmp_path)


def test_an_index_leads_nowhere_else(tmp_path):
    a_llama(tmp_path / "a", shards="20KB")
    index = tmp_path / "a" / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    first = min((tmp_path / "a").glob("model-*.safetensors"))
    (tmp_path / "secret.safetensors").write_bytes(first.read_bytes())
    for value in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), "pytorch_model.bin", 3, None):
        told["weight_map"]["model.norm.weight"] = value
        index.write_text(json.dumps(told))
        with pytest.raises(DamagedFileError, match="beside it"):
            import_hf(tmp_path / "a")
    for value in (first.name, "absent.safetensors"):  # not in it, and no such file
        told["weight_map"]["model.norm.weight"] = value
        index.write_text(json.dumps(told))
        with pytest.raises(DamagedFileError, match="whole safetensors files"):
            import_hf(tmp_path / "a")


def test_damage_of_any_kind_is_told_in_words(tmp_path):
    a_llama(tmp_path)
    names = ("config.json", "tokenizer.json", "model.safetensors")
    whole = {name: (tmp_path / name).read_bytes() for name in names}
    rng, refused = random.Random(0), 0
    header = 8 + struct.unpack_from("<Q", whole["model.safetensors"])[0]
    for number in range(400):
        name = names[number % 3]
        data = bytearray(whole[name])
        place = rng.randrange(header if name.endswith("tensors") else len(data))
        if number % 4 == 0:
            del data[place:]
        else:
            data[place] = rng.randrange(256)
        (tmp_path / name).write_bytes(data)
        try:
            import_hf(tmp_path)
        except LabError as error:
            refused += 1
            assert "Received" in str(error)
        (tmp_path / name).write_bytes(whole[name])
    assert refused > 200
    for head in (struct.pack("<Q", 1 << 62), struct.pack("<Q", 99_999_999), b"", b"\xff" * 8):
        (tmp_path / "model.safetensors").write_bytes(head + whole["model.safetensors"][8:])
        with pytest.raises(DamagedFileError, match="whole safetensors files"):
            import_hf(tmp_path)
    for data in (b"[" * 100_000, b"[]", b"\xff", b"{"):
        (tmp_path / "config.json").write_bytes(data)
        with pytest.raises(DamagedFileError, match="a JSON object"):
            import_hf(tmp_path)


# --------------------------------------------------------------------------------------------------------- tokenizers

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
OPENS = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}], "pair": []}
OPENS["single"].append({"Sequence": {"id": "A", "type_id": 0}})
OPENS["special_tokens"] = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
SPACES = {"type": "Metaspace", "replacement": "\u2581", "split": False}
WORDS = "It's 1234 OF them:  don't \n\n  we'LL go\r\n\t (x)  ٣² Ⅷ naïve 漢字 e\u0301 <s> </s>\u2581 \u1680\x1c "


def over_bytes(text, *before):
    """A vocabulary over bytes, trained by theirs, with what cuts a text into words."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    trainer.initial_alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([text, WORDS * 3], trainer)
    told = json.loads(made.to_str())
    rest = [] if before == () else [{**BYTES, "use_regex": False}]
    told["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*before, *rest]} if before else BYTES
    return {**told, "decoder": BYTES, "post_processor": OPENS}


def with_signs(tokenizer, **parts):
    """One of ours as Llama 2 writes them: a sign for the space, one before each text, and special tokens."""
    told = tokenizer_json.to_json(tokenizer)
    model = told["model"]
    vocab = {piece.replace(" ", "\u2581"): i for piece, i in model["vocab"].items() if piece}
    for name in ("<unk>", "<s>", "</s>"):
        vocab[name] = len(vocab) + 1
    model["merges"] = [[piece.replace(" ", "\u2581") for piece in pair] for pair in model["merges"]]
    told["model"] = {**model, "vocab": vocab, "unk_token": "<unk>", "fuse_unk": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    told["added_tokens"] = [{"id": vocab[name], "content": name, **flags} for name in ("<unk>", "<s>", "</s>")]
    steps = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}]
    steps += [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    opens = json.loads(json.dumps(OPENS).replace("[1]", f"[{vocab['<s>']}]"))
    return {**told, "decoder": {"type": "Sequence", "decoders": steps}, "post_processor": opens, **parts}


def variants(text, trained):
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace]}
    split = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
    yield "gpt-2", over_bytes(text)
    yield "llama 3", over_bytes(text, split)
    yield (
        "llama 3, words kept whole",
        (told := over_bytes(text, split)) | {"model": {**told["model"], "ignore_merges": True}},
    )
    yield "smollm", over_bytes(text, {"type": "Digits", "individual_digits": True}, BYTES)
    yield "llama 2", with_signs(trained["bpe"], normalizer=prepend)
    for scheme in ("first", "always", "never"):
        yield f"metaspace {scheme}", with_signs(trained["bpe"], pre_tokenizer={**SPACES, "prepend_scheme": scheme})
    yield (
        "split at spaces",
        with_signs(
            trained["bpe"],
            pre_tokenizer={**SPACES, "prepend_scheme": "first", "split": True},
            normalizer={"type": "NFKC"},
        ),
    )
    for flags in (
        {"normalized": True},
        {"lstrip": True},
        {"rstrip": True},
        {"single_word": True},
        {"lstrip": True, "rstrip": True},
    ):
        for made in (with_signs(trained["bpe"], normalizer=prepend), over_bytes(text)):
            made["added_tokens"] = [
                {**token, **(flags if token["content"] != "<s>" else {})} for token in made["added_tokens"]
            ]
            yield f"added tokens with {flags}", made
    legacy = with_signs(trained["char"], normalizer=prepend)
    legacy["model"]["merges"] = [" ".join(pair) for pair in legacy["model"]["merges"]]
    yield "no merges", legacy


def test_their_tokenizers_are_read_as_theirs_are(text, trained, tmp_path):
    rng, seen = random.Random(0), 0
    texts = [WORDS, HARD, text[:3000], "", " ", "  x", "\u2581x", "a</s>b </s> <unk>\n </s></s>  c _</s> <s> </s>"]
    texts += ["".join(rng.choices(WORDS + text[:50], k=rng.randint(1, 50))) for _ in range(150)]
    for name, told in variants(text, trained):
        (tmp_path / "tokenizer.json").write_text(json.dumps(told))
        other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        own = tokenizer_json.read_tokenizer(tmp_path, 1000)
        for words in texts:
            ids = other.encode(words).ids
            assert own.encode(words) == ids, (name, words)
            if "normalized" not in name:  # theirs shows such a special token where it shows no other
                assert own.decode(ids) in (other.decode(ids), " " + other.decode(ids)), (name, words)
            seen += len(ids)
    assert seen > 10_000


def test_a_tokenizer_model_is_read_as_sentencepiece_reads_it(text, tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split("\n")), model_prefix=str(tmp_path / "tokenizer"), model_type="bpe",
        vocab_size=400, byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    words = "abc de\n漢 e"
    plain = processor.encode(words)
    own = tokenizer_json.read_tokenizer(tmp_path, 420)
    assert own.encode(words) == [processor.bos_id(), *plain] and own.decode(own.encode(words)) == " " + words
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert tokenizer_json.read_tokenizer(tmp_path, 400).encode(words) == plain
    with pytest.raises(LabError, match="ids"):
        tokenizer_json.read_tokenizer(tmp_path, 399)
    with pytest.raises(LabError, match="lone surrogate"):
        own.encode("\ud800")
    for write in (
        lambda: save_model(tmp_path / "m", TinyLM(SMALL), own),
        lambda: export_hf(TinyLM(SMALL), own, tmp_path / "m"),
    ):
        with pytest.raises(LabError, match="leave it in its folder"):
            write()


def test_a_tokenizer_with_parts_unknown_here_is_refused(text, trained, tmp_path):
    with pytest.raises(LabError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        tokenizer_json.read_tokenizer(tmp_path, 300)
    plain = with_signs(trained["bpe"])
    split = {"type": "Split", "pattern": {"Regex": r"\p{Han}"}, "behavior": "Isolated", "invert": False}
    for changes, words in [
        ({"model": {"type": "Unigram"}}, "a Unigram in tokenizer.json"),
        ({"normalizer": {"type": "Lowercase"}}, "a normalizer Lowercase"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "a pre-tokenizer Whitespace"),
        ({"pre_tokenizer": split}, r"the class \\p\{Han\}"),
        ({"pre_tokenizer": {**split, "pattern": {"Regex": "(("}}}, "the pattern"),
        ({"decoder": {"type": "WordPiece"}}, "a decoder WordPiece"),
        ({"post_processor": {"type": "BertProcessing"}}, "a post-processor BertProcessing"),
        ({"model": {**plain["model"], "end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
        ({"model": {**plain["model"], "merges": [["a", "absent"]]}}, "KeyError"),
        ({"model": {**plain["model"], "vocab": {"a": 1 << 40}}}, "no small whole number"),
        ({"model": {**plain["model"], "vocab": 3}}, "AttributeError"),
    ]:
        (tmp_path / "tokenizer.json").write_text(json.dumps({**plain, **changes}))
        with pytest.raises(LabError, match=words):
            tokenizer_json.read_tokenizer(tmp_path, 1000)


# ------------------------------------------------------------------------------------------------------ command line


def test_export_and_import_from_a_shell(trained, tmp_path):
    def call(*words):
        return CliRunner().invoke(main, [str(word) for word in words])

    save_model(tmp_path / "models" / "m.safetensors", TinyLM(SMALL.replace(init="scaled"), seed=2), trained["bpe"])
    done = call("export", "--model", tmp_path, "--to", "hf", tmp_path / "hf")
    assert done.exit_code == 0 and "m.safetensors as Llama in" in done.stdout, done.output
    options = ["--prompt", "abc", "--max-new-tokens", 40, "--seed", 3]
    here = call("generate", "--model", tmp_path, *options)
    there = call("import", tmp_path / "hf", *options)
    assert there.exit_code == 0 and there.stdout == here.stdout and len(there.stdout) > 10
    model, tokenizer = import_hf(tmp_path / "hf")
    third = generate(model, tokenizer, "abc", GenerateConfig(max_new_tokens=40, seed=3)).token_ids[2]
    changed(tmp_path / "hf", eos_token_id=[third])
    assert len(call("import", tmp_path / "hf", *options).stdout) < len(there.stdout)

    save_model(tmp_path / "post.safetensors", TinyLM(SMALL.replace(norm_position="post")))
    for words, told in [
        (("export", "--model", tmp_path / "post.safetensors", "--to", "hf", tmp_path / "no"), "norm_position='post'"),
        (("import", tmp_path / "no"), "a folder with a config.json"),
    ]:
        done = call(*words)
        assert done.exit_code == 2 and done.stderr.startswith("error: ") and told in done.stderr
    assert not (tmp_path / "no").exists()
