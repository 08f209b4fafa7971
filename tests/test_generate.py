"""The sampler by meaning: filters against definitions, caches against slow references, streams against whole texts."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tinylm.config import MLPS, NORM_POSITIONS, NORMS, POSITIONS, GenerateConfig, ModelConfig
from tinylm.errors import LabError
from tinylm.generate import STAGES, Decoding, filter_logits, generate, next_token_logits, stream
from tinylm.model import TinyLM
from tinylm.tokenizer import Tokenizer

WINDOW = 12
GREEDY = GenerateConfig(temperature=0, max_new_tokens=3 * WINDOW)
PLAIN = GenerateConfig(temperature=1.0, max_new_tokens=3 * WINDOW, seed=3)


class Bytes:
    """The plainest tokenizer there is: ids are bytes."""

    vocab_size = 256

    def encode(self, text):
        return list(text.encode())

    def decode_bytes(self, ids):
        return bytes(list(ids))

    def decode(self, ids):
        return self.decode_bytes(ids).decode(errors="replace")

    def pieces(self, token):
        return repr(bytes([token]))


def model_of(position="rope", kv_heads=2, max_seq_len=WINDOW, seed=0, **changes):
    config = ModelConfig(
        vocab_size=256, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=kv_heads, max_seq_len=max_seq_len,
        position=position, init="scaled", init_std=0.05,
    )  # fmt: skip
    return TinyLM(config.replace(**changes), seed=seed).eval()


def banded(q, k, v, scale, **options):
    """Attention in which a token sees itself and the WINDOW - 1 tokens before it."""
    t = torch.arange(q.shape[2])
    near = (t[:, None] >= t) & (t[:, None] - t < WINDOW)
    return attention(q, k, v, attn_mask=near, scale=scale)


attention = F.scaled_dot_product_attention


@torch.no_grad()
def slow_greedy(model, prompt, count, monkeypatch):
    """The documented rule without any cache: every token from a forward pass over all that it may know."""
    slides = model.config.position in ("rope", "none")
    ids, log_probs = list(prompt.encode())[-WINDOW:], []
    start = 0  # where the window of tied positions begins
    for _ in range(count):
        with monkeypatch.context() as patch:
            if slides:
                patch.setattr(F, "scaled_dot_product_attention", banded)
            logits = model(torch.tensor([ids[start:]]))[0, -1]
        ids.append(int(logits.argmax()))
        log_probs.append(float(logits.log_softmax(-1)[ids[-1]]))
        if not slides and len(ids) - start > WINDOW:
            start = len(ids) - WINDOW // 2
    return ids[-count:], log_probs


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("prompt", ["to b", "a prompt longer than the window is"], ids=["short", "long"])
def test_the_cache_changes_nothing_inside_and_past_the_window(position, kv_heads, prompt, monkeypatch):
    model = model_of(position, kv_heads)
    expected_ids, expected_log_probs = slow_greedy(model, prompt, GREEDY.max_new_tokens, monkeypatch)
    fast = generate(model, Bytes(), prompt, GREEDY)
    assert len(set(expected_ids)) > 3  # a text that repeats one letter would prove little
    assert fast.token_ids == expected_ids
    assert fast.log_probs == pytest.approx(expected_log_probs, abs=1e-4)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_a_row_in_a_batch_gives_what_it_gives_alone(position, kv_heads):
    model, prompts = (
        model_of(position, kv_heads),
        ["to be", "or", "", "a prompt longer than the window", "not to be, th"],
    )
    config = PLAIN.replace(repetition_penalty=1.3, top_k=40)
    batch = generate(model, Bytes(), prompts, config)
    for row, prompt in enumerate(prompts):
        alone = generate(model, Bytes(), prompt, config.replace(seed=config.seed + row))
        assert batch[row].prompt == prompt
        assert batch[row].token_ids == alone.token_ids
        assert batch[row].log_probs == pytest.approx(alone.log_probs, abs=1e-4)


def test_same_seed_same_text_whatever_the_global_generator_and_another_seed_another():
    model = model_of()
    torch.manual_seed(1)
    first = generate(model, Bytes(), "to be", PLAIN)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert generate(model, Bytes(), "to be", PLAIN).token_ids == first.token_ids
    assert torch.equal(torch.get_rng_state(), state)
    assert generate(model, Bytes(), "to be", PLAIN.replace(seed=4)).token_ids != first.token_ids
    assert generate(model, Bytes(), ["to be"] * 2, PLAIN)[1].token_ids != first.token_ids


def test_a_longer_text_begins_with_the_shorter():
    model = model_of()
    long = generate(model, Bytes(), "to be", PLAIN)
    assert generate(model, Bytes(), "to be", PLAIN.replace(max_new_tokens=7)).token_ids == long.token_ids[:7]


def test_draws_follow_the_distribution():
    model, config = model_of(init_std=0.2), GenerateConfig(temperature=0.7, top_k=5, max_new_tokens=1)
    logits, seen = next_token_logits(model, Bytes(), "to be")
    expected = filter_logits(logits, config, seen)["top_p"][0]
    drawn = [out.token_ids[0] for out in generate(model, Bytes(), ["to be"] * 2000, config)]
    counts = torch.bincount(torch.tensor(drawn), minlength=256).double()
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi_square = ((counts - 2000 * expected)[kept] ** 2 / (2000 * expected[kept])).sum()
    assert chi_square < 23.5  # 4 degrees of freedom: once in ten thousand by chance, and the seeds are fixed


def test_log_probs_are_those_of_the_unfiltered_model():
    model = model_of()
    filtered = PLAIN.replace(temperature=0.5, top_k=4, top_p=0.9, repetition_penalty=1.5, max_new_tokens=6)
    out = generate(model, Bytes(), "to", filtered)
    with torch.no_grad():
        log_probs = model(torch.tensor([list(b"to") + out.token_ids]))[0].log_softmax(-1)
    expected = [float(log_probs[1 + t, token]) for t, token in enumerate(out.token_ids)]
    assert out.log_probs == pytest.approx(expected, abs=1e-4)
    for token, log_prob in zip(stream(model, Bytes(), "to", filtered, top=3), out.log_probs, strict=True):
        assert token.probability == pytest.approx(math.exp(log_prob), rel=1e-4)
        assert len(token.alternatives) == 3
        assert token.alternatives[0][2] >= token.alternatives[1][2] >= token.alternatives[2][2] > 0
        assert token.alternatives[0][1] == Bytes().pieces(token.alternatives[0][0])


def probabilities(*values):
    return torch.tensor([values], dtype=torch.float64).log()


def test_filters_on_an_example_worked_by_hand():
    logits = probabilities(0.1, 0.4, 0.2, 0.3)
    stages = filter_logits(logits, GenerateConfig(temperature=0.5, top_k=3, top_p=0.8))
    assert tuple(stages) == STAGES
    expected = {
        "model": [0.1, 0.4, 0.2, 0.3],
        "repetition_penalty": [0.1, 0.4, 0.2, 0.3],
        "temperature": [1 / 30, 16 / 30, 4 / 30, 9 / 30],  # squares, scaled
        "top_k": [0, 16 / 29, 4 / 29, 9 / 29],
        "top_p": [0, 16 / 25, 0, 9 / 25],  # 16/29 falls short of 0.8, 25/29 reaches it
    }
    for name, values in expected.items():
        assert stages[name][0].tolist() == pytest.approx(values), name


def test_repetition_penalty_lowers_seen_tokens_whatever_the_sign():
    logits, seen = torch.tensor([[2.0, -2.0, 2.0, -2.0]]), torch.tensor([[True, True, False, False]])
    after = filter_logits(logits, GenerateConfig(repetition_penalty=2.0, temperature=1.0), seen)["repetition_penalty"]
    assert after.log().diff().tolist()[0] == pytest.approx([-5.0, 6.0, -4.0])  # logits 1, -4, 2, -2


@pytest.mark.parametrize("position", POSITIONS)
def test_repetition_penalty_forbids_what_the_window_holds_and_forgets_what_left_it(position):
    model, prompt = model_of(position, init_std=0.02), "to be or not"  # nearly flat: a heavy penalty then decides alone
    config = GenerateConfig(temperature=0, repetition_penalty=1e6, max_new_tokens=3 * WINDOW)
    window, said = list(prompt.encode()), generate(model, Bytes(), prompt, config).token_ids
    assert next_token_logits(model, Bytes(), prompt)[1].nonzero()[:, 1].tolist() == sorted(set(window))
    for token in said:
        assert token not in window
        window.append(token)
        if len(window) > WINDOW:
            window = window[-(WINDOW if position in ("rope", "none") else WINDOW // 2) :]
    assert len(set(said)) < len(said)


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=30),
    temperature=st.sampled_from([0.0, 1e-300, 0.1, 0.7, 1.0, 3.0, 1e6]),
    top_k=st.one_of(st.none(), st.integers(1, 40)),
    top_p=st.floats(0.01, 1.0),
    penalty=st.sampled_from([0.5, 1.0, 1.7]),
)
def test_filters_by_definition(logits, temperature, top_k, top_p, penalty):
    config = GenerateConfig(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    seen = torch.arange(len(logits))[None] % 3 == 0
    stages = filter_logits(torch.tensor([logits]), config, seen)
    for name in STAGES:
        assert (stages[name] >= 0).all() and float(stages[name].sum()) == pytest.approx(1.0), name
    warmed, cut, last = (stages[name][0] for name in ("temperature", "top_k", "top_p"))
    assert int((cut > 0).sum()) <= (top_k or len(logits))
    assert (cut > 0).all() or warmed[cut > 0].min() >= warmed[cut == 0].max()  # nothing likelier was dropped
    kept = last > 0
    assert kept.any() and bool(kept[cut.argmax()])
    assert float(cut[kept].sum()) >= top_p - 1e-9  # it reaches p ...
    if int(kept.sum()) > 1:
        assert float(cut[kept].sum() - cut[kept].min()) < top_p + 1e-9  # ... and with one token fewer it would not
    if temperature == 0:
        assert float(last.max()) == 1.0


@pytest.mark.parametrize("change", [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-9}], ids=str)
def test_four_ways_to_be_greedy(change):
    model = model_of()
    greedy = generate(model, Bytes(), "to be", PLAIN.replace(**change))
    assert greedy.token_ids == generate(model, Bytes(), "to be", GREEDY).token_ids


@pytest.mark.parametrize("change", [{"top_k": 256}, {"top_k": 9999}, {"top_p": 1.0}], ids=str)
def test_filters_that_keep_everything_change_nothing(change):
    model = model_of()
    assert (
        generate(model, Bytes(), "to be", PLAIN.replace(**change)).token_ids
        == generate(model, Bytes(), "to be", PLAIN).token_ids
    )


@torch.no_grad()
def scripted(script):
    """A model that says the bytes of a script, one after the other, whatever it is told: each position has a channel of
    its own, which leads to the byte that comes next."""
    model = model_of("learned", max_seq_len=16, hidden_size=16, num_layers=1, tie_embeddings=False)
    for name, parameter in model.named_parameters():
        parameter.fill_(float("norm" in name))
    model.position.weight.copy_(torch.eye(16))
    model.head.weight[script, torch.arange(len(script))] = 100.0
    return model


def told(script, **options):
    config = GenerateConfig(temperature=1.0, max_new_tokens=len(script))
    return [part.text for part in stream(scripted(list(script)), Bytes(), "", config, **options)]


def test_characters_of_several_bytes_are_streamed_whole():
    parts = told("caf\u00e9 \u20ac \U0001f600".encode())
    assert parts == [*"caf", "", "\u00e9", " ", "", "", "\u20ac", " ", "", "", "", "\U0001f600"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0x41, 0x80, 0x9F, 0xBF, 0xC3, 0xE2, 0xE0, 0xF0, 0xF4, 0xFF]), min_size=1, max_size=14))
def test_streamed_parts_join_to_the_whole_for_any_bytes(script):
    assert "".join(told(script)) == Bytes().decode(script)


def test_a_stopped_stream_tells_the_rest_of_its_bytes():
    asked = []
    parts = told("a\u20ac".encode(), stop=lambda: len(asked) == 3 or asked.append(True))
    assert parts == ["a", "", "\ufffd"]


@pytest.mark.parametrize("kind,vocab_size", [("bpe", 300), ("unigram", 280), ("char", 300), ("byte", 256)])
def test_with_every_kind_of_tokenizer(kind, vocab_size):
    text = "to be or not to be, that is the question: whether 'tis nobler in the mind to suffer\n"
    tokenizer = Tokenizer.train(
        [text, "the slings and arrows of outrageous fortune, or to take arms\n"], kind, vocab_size
    )
    model = model_of(vocab_size=vocab_size)
    for prompt in ("to be", "caf\u00e9 \u65e5\u672c", ""):
        out = generate(model, tokenizer, prompt, PLAIN)
        assert "".join(part.text for part in stream(model, tokenizer, prompt, PLAIN)) == out.text
        assert out.text == tokenizer.decode(out.token_ids)


def test_stream_says_what_generate_says():
    model = model_of()
    out, parts = generate(model, Bytes(), "to be", PLAIN), list(stream(model, Bytes(), "to be", PLAIN))
    assert [part.token_id for part in parts] == out.token_ids
    assert "".join(part.text for part in parts) == out.text == Bytes().decode(out.token_ids)
    assert all(part.alternatives == [] for part in parts)
    assert out.tokens_per_second == pytest.approx(len(out.token_ids) / out.seconds)


def test_stop_ends_the_stream_at_the_next_token_with_the_text_complete():
    model, asked = model_of(), []

    def stop():
        asked.append(True)
        return len(asked) > 5

    parts = list(stream(model, Bytes(), "to be", PLAIN, stop=stop))
    assert len(parts) == 5
    assert "".join(p.text for p in parts) == Bytes().decode([p.token_id for p in parts])
    assert list(stream(model, Bytes(), "to be", PLAIN, stop=lambda: True)) == []


def test_an_empty_prompt_starts_from_a_newline():
    model = model_of()
    empty, newline = generate(model, Bytes(), "", GREEDY), generate(model, Bytes(), "\n", GREEDY)
    assert empty.token_ids == newline.token_ids and empty.prompt == ""


def test_a_window_of_one_token_still_generates():
    for position in POSITIONS:
        out = generate(model_of(position, max_seq_len=1), Bytes(), ["to be", "x"], PLAIN)
        assert [len(row.token_ids) for row in out] == [PLAIN.max_new_tokens] * 2


def test_sampling_leaves_the_model_and_the_caller_as_they_were():
    model = model_of(dropout=0.5).train()
    expected = generate(model_of(dropout=0.5), Bytes(), "to be", GREEDY).token_ids
    parts = []
    for part in stream(model, Bytes(), "to be", GREEDY):
        assert model.training and not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        parts.append(part.token_id)
    assert parts == expected  # dropout was off all the same


@pytest.mark.parametrize("position", POSITIONS)
def test_the_model_reads_a_prompt_once_and_a_full_window_of_tied_positions_anew(position, monkeypatch):
    model, sizes = model_of(position), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, cache: (sizes.append(ids.shape[1]), forward(ids, cache))[1])
    generate(model, Bytes(), "to b", PLAIN)
    assert sizes == ([4] if position in ("rope", "none") else [4] + [WINDOW // 2] * 4)


class Work(TorchDispatchMode):
    """Counts the operations and the numbers that they write, views aside."""

    def __init__(self):
        super().__init__()
        self.operations = self.numbers = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        self.operations += 1
        if isinstance(result, torch.Tensor) and not operation.is_view:
            self.numbers += result.numel()
        return result


@pytest.mark.parametrize("position", ["rope", "none"])
def test_work_for_a_token_grows_by_its_attention_alone(position):
    model, work = model_of(position, max_seq_len=64), []
    text = stream(model, Bytes(), "to", PLAIN.replace(max_new_tokens=200))
    next(text)
    next(text)  # builds what all further tokens use
    while len(work) < 190:
        with Work() as counted:
            next(text)
        work.append((counted.operations, counted.numbers))
    growing, full = work[:61], work[61:]  # the window is full with the token of work[60]
    assert len({operations for operations, _ in growing}) == 1
    scores_and_weights = 2 * model.config.num_layers * model.config.num_heads
    assert {later[1] - before[1] for before, later in itertools.pairwise(growing)} == {scores_and_weights}
    # From there on nothing grows; a table of positions is made anew, once for a window of tokens.
    assert 0 < sum(step != work[60] for step in full) <= 2


SWITCHES = [
    {"norm": norm, "norm_position": norm_position, "mlp": mlp, "tie_embeddings": tie, "qk_norm": qk_norm}
    for (norm, norm_position, mlp), tie, qk_norm in zip(
        itertools.product(NORMS, NORM_POSITIONS, MLPS),
        itertools.cycle([True, False]),
        itertools.cycle([False, True, True]),
        strict=False,
    )
]


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda switches: "-".join(map(str, switches.values())))
@pytest.mark.parametrize("position,kv_heads", list(zip(POSITIONS, (2, 1, 4, 2), strict=True)))
def test_cached_logits_are_the_models_own_for_every_switch(switches, position, kv_heads):
    model = model_of(position, kv_heads, attention_scale=0.5, **switches)
    with torch.no_grad():
        for parameter in model.parameters():  # norms away from one and zero, so that they are tested too
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        ids = torch.randint(256, (2, WINDOW), generator=torch.Generator().manual_seed(2))
        expected = model(ids)
        decoding = Decoding(model, [ids[0, :5].tolist(), ids[1, :3].tolist()])  # the second starts two tokens behind
        for t in range(WINDOW - 5):
            expected_now = torch.stack([expected[0, 4 + t], expected[1, 2 + t]])
            torch.testing.assert_close(decoding.logits, expected_now, atol=1e-5, rtol=1e-5)
            with torch.inference_mode():
                decoding.advance(torch.stack([ids[0, 5 + t], ids[1, 3 + t]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_of_another_type_are_sampled_in_fp32(dtype):
    model = model_of().to(dtype)
    out = generate(model, Bytes(), ["to be", "or"], PLAIN)
    assert model.embedding.weight.dtype == dtype
    model.float()
    assert [row.token_ids for row in out] == [row.token_ids for row in generate(model, Bytes(), ["to be", "or"], PLAIN)]


@pytest.mark.parametrize("position", POSITIONS)
def test_a_large_model_that_is_sampled_without_a_copy_says_the_same(position, monkeypatch):
    model = model_of(position, dropout=0.5).train()
    prompts, config = ["a", "bcd", "e" * 30], GREEDY
    copied = [row.token_ids for row in generate(model, Bytes(), prompts, config)]
    module = sys.modules["tinylm.generate"]  # the package's attribute of that name is the function
    monkeypatch.setattr(module, "STEP_UP_TO", 0)
    monkeypatch.setattr(module, "Step", None)
    assert [row.token_ids for row in generate(model, Bytes(), prompts, config)] == copied
    assert model.training


def test_weights_are_read_anew_for_every_text():
    model, other = model_of(), model_of(seed=1)
    generate(model, Bytes(), "to be", GREEDY)
    model.load_state_dict(other.state_dict())
    assert generate(model, Bytes(), "to be", GREEDY).token_ids == generate(other, Bytes(), "to be", GREEDY).token_ids


def test_no_prompts_no_texts():
    assert generate(model_of(), Bytes(), []) == []


def test_mistakes_are_told_in_words():
    model = model_of()
    other = TinyLM(model.config.replace(vocab_size=100))
    with pytest.raises(LabError, match=r"same vocabulary.*100.*256.*Way out"):
        generate(other, Bytes(), "to be")
    with pytest.raises(LabError, match="tokenizer"):
        generate(model, None, "to be")
    with pytest.raises(LabError, match=r"prompt must be a str.*7 \(int\)"):
        stream(model, Bytes(), 7)
    with pytest.raises(LabError, match="top must not be negative"):
        stream(model, Bytes(), "to be", top=-1)
    with torch.no_grad():
        model.embedding.weight[0, 0] = float("nan")
    with pytest.raises(LabError, match=r"finite logits.*diverged"):
        generate(model, Bytes(), "to be")


def test_generation_is_a_plain_record():
    out = generate(model_of(), Bytes(), "to be", PLAIN)
    assert set(dataclasses.asdict(out)) == {
        "prompt",
        "text",
        "token_ids",
        "log_probs",
        "seconds",
        "tokens_per_second",
    }
