"""A model against the truth: on a language whose probabilities are known, training must come close and cannot come below.

``zipf-markov`` is generated, so log p of each token given all before it is known exactly. The mean of log p_true - log p_model
over validation tokens is then how many nats a model is worse than anything can be; below zero there is only chance, and a
mistake somewhere: a target that leaked into its own context, a loss that is not a log probability, a split that overlaps.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tinylm import corpora
from tinylm.config import ModelConfig, TrainConfig
from tinylm.train import Trainer

SEQ_LEN, VOCABULARY = 128, 322
CLOSE = 0.02  # of the entropy


@pytest.fixture(scope="module")
def zipf():
    return corpora.prepare("zipf-markov", "char", VOCABULARY, progress=False)


def excess(corpus, log_probs) -> tuple[float, float]:
    """(mean, standard error) of log p_true - log p_model over the targets of all whole windows of the validation part.

    log_probs(inputs (B, T), targets (B, T)) -> (B, T) is the model's log p of each target in nats. Tokens of one window
    share what the model makes of their context, so the standard error is that of the windows' means.
    """
    windows = (len(corpus.val) - 1) // SEQ_LEN
    tokens = np.asarray(corpus.val[: windows * SEQ_LEN + 1]).astype(np.int64)
    truth = corpora.zipf_markov_log_prob(tokens, corpus.tokenizer, start=0)[1:].reshape(windows, SEQ_LEN)
    inputs, targets = tokens[:-1].reshape(windows, SEQ_LEN), tokens[1:].reshape(windows, SEQ_LEN)
    found = [log_probs(inputs[i : i + 32], targets[i : i + 32]) for i in range(0, windows, 32)]
    means = (truth - np.concatenate(found)).mean(axis=1)
    return float(means.mean()), float(means.std(ddof=1) / windows**0.5)


def of_a_model(model):
    @torch.no_grad()
    def log_probs(inputs, targets):
        logits = model(torch.from_numpy(inputs)).double()
        return torch.log_softmax(logits, -1).gather(-1, torch.from_numpy(targets)[..., None])[..., 0].numpy()

    return log_probs


def a_model(**changes) -> ModelConfig:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_seq_len": SEQ_LEN}
    return ModelConfig(**{**sizes, "init": "scaled", **changes})


def test_a_trained_model_comes_within_two_percent_of_the_truth_and_not_below_it(zipf):
    train = TrainConfig(
        learning_rate=0.01, batch_size=4, max_steps=1500, warmup_steps=50, stride=SEQ_LEN, threads=1, eval_tokens=8192
    )
    trainer = Trainer(a_model(), train, zipf.train, zipf.val)
    result = trainer.run()
    mean, error = excess(zipf, of_a_model(trainer.model))
    entropy = corpora.zipf_markov_entropy()
    print(
        f"\nafter {result.tokens_seen:,} tokens and {result.seconds:.0f} s: {mean:.4f} nats above the truth "
        f"({100 * mean / entropy:.2f} % of the entropy {entropy:.4f}), standard error {error:.4f}"
    )
    assert -3 * error <= mean <= CLOSE * entropy
    assert (
        mean > 3 * error
    )  # a model that is still learning is worse than the truth, and the measure is fine enough to see it
    assert result.val_loss == pytest.approx(entropy + mean, abs=0.05)  # the trainer's own loss says the same


def test_the_truth_itself_has_no_excess_and_a_guess_has_much(zipf):
    """The measure above can fail on both sides: it knows the truth, a guesser and a cheat apart."""
    entropy, size = corpora.zipf_markov_entropy(), len(corpora.ZIPF_SYMBOLS)

    def the_truth(inputs, targets):
        return np.stack(
            [
                corpora.zipf_markov_log_prob(np.append(row[:1], own), zipf.tokenizer)[1:]
                for row, own in zip(inputs, targets, strict=True)
            ]
        )

    assert excess(zipf, the_truth) == (0.0, 0.0)

    def a_guess(inputs, targets):
        return np.full(targets.shape, -np.log(size))

    mean, error = excess(zipf, a_guess)
    assert mean == pytest.approx(np.log(size) - entropy, abs=5 * error) and mean > CLOSE * entropy

    def a_cheat(inputs, targets):  # has seen one target in a hundred
        seen = np.random.default_rng(0).random(targets.shape) < 0.01
        return np.where(seen, 0.0, the_truth(inputs, targets))

    mean, error = excess(zipf, a_cheat)
    assert mean < -3 * error


def test_an_untrained_model_is_far_from_the_truth(zipf):
    from tinylm.model import TinyLM

    mean, _ = excess(zipf, of_a_model(TinyLM(a_model()).eval()))
    assert mean > np.log(VOCABULARY) - corpora.zipf_markov_entropy() - 0.5
