"""Train a model by hand: every knob, what it will cost before one presses Train, and the curve as it grows."""

from __future__ import annotations

import html
import math
import os
import time
from pathlib import Path

import ipywidgets
import numpy as np
import torch
from matplotlib.figure import Figure

from tinylm import config as names
from tinylm import counts
from tinylm.config import DataConfig, ModelConfig, TrainConfig
from tinylm.errors import LabError
from tinylm.model import TinyLM
from tinylm.study.design import Recipe
from tinylm.study.planner import FAR, Evidence, Speed, evaluation_tokens, measure_speed
from tinylm.study.runs import Run
from tinylm.tokenizer import Tokenizer
from tinylm.train import learning_rate_at
from tinylm.widgets.live import LiveRun, evidence_for, labs_folder, law_line, read_curves
from tinylm.widgets.models import own_manual
from tinylm.widgets.shared import (
    COLOURS,
    GREY,
    MACHINE,
    ORANGE,
    PAGE,
    SMALL,
    Panel,
    beside,
    button,
    choice,
    draw_curve,
    grid,
    in_background,
    knob,
    log_x,
    offer,
    parts,
    place,
    png,
    table,
)
from tinylm.words import duration, quantity

_WIDTH = 190  # of a knob's name and unit, in pixels
_MODEL, _TRAIN = (tuple(kind.__dataclass_fields__) for kind in (ModelConfig, TrainConfig))
START_TOKENS = 6e5  # of the run that the panel opens with


def training_panel(text: str | Path | None = None, results_dir: str | Path | None = None) -> TrainingPanel:
    """Train models on a text by hand, and compare them.

    text: a name from ``tinylm.corpora.NAMES`` or the path of a file; None is Python's own manual, which is always there.
    results_dir: where runs are recorded, as any study's; None is results/local/labs. ``panel.model()`` gives the last model
    and its tokenizer, ``panel.records()`` the compared runs.
    """
    text = own_manual() if text is None else str(text)
    return place(TrainingPanel, text, labs_folder() if results_dir is None else Path(results_dir), same=text)


def memory_estimate(model: ModelConfig, train: TrainConfig) -> float:
    """Bytes that training holds at its peak, about: weights, gradients and AdamW's two moments (16 bytes a parameter), and
    what a micro-step keeps for its backward pass in fp32: about 8 D + 2 K Dh + 4 F values a token and block, and the logits
    three times."""
    c, tokens = model.resolve(), train.batch_size * train.resolve(model).seq_len
    a_block = 8 * c.hidden_size + 2 * c.num_kv_heads * c.head_dim + 4 * c.intermediate_size
    return 16 * counts.parameters(c)["total"] + 4 * tokens * (c.num_layers * a_block + 3 * c.vocab_size)


class TrainingPanel(Panel):
    """What ``training_panel`` gives. ``start()``, ``pause()``, ``resume()`` and ``stop()`` do what the buttons do; ``knobs``
    holds every control by its hyperparameter's name."""

    def __init__(self, text: str, results_dir: Path):
        super().__init__(same=text)
        self.text, self.results_dir = text, results_dir
        self.live: LiveRun | None = None
        self._wants_pause = self._is_paused = self._is_fitting = False
        self._speeds: dict[tuple, Speed] = {}  # by what decides it besides the size, see ``_speed_key``
        self._law: dict[tuple, tuple[Evidence, str] | None] = {}
        self._records = {record["run_id"]: record for record in read_curves(results_dir)}
        self.knobs = _knobs(text)
        self.knobs |= {"name": knob(ipywidgets.Text, "name of the run", "what to call this run; left empty, what tells it "
                                    "apart", label_width=120, value="")}  # fmt: skip
        self.prompt = knob(ipywidgets.Text, "samples begin with", "what each sample of the model goes on from",
                           label_width=140, value="The")  # fmt: skip
        self.train_button = button("Train", "play", primary=True)
        self.pause_button = button("Pause", "pause", disabled=True)
        self.resume_button = button("Resume", "step-forward", disabled=True)
        self.stop_button = button("Stop", "stop", disabled=True)
        for control, does in (
            (self.train_button, self.start), (self.pause_button, self.pause), (self.resume_button, self.resume),
            (self.stop_button, self.stop),
        ):  # fmt: skip
            control.on_click(lambda _, does=does: does())
        self.facts, self.reasons = ipywidgets.HTML(), ipywidgets.HTML()
        self.samples = ipywidgets.HTML(layout={"max_height": "260px", "overflow": "auto"})
        self.comparison = ipywidgets.HTML()
        self.compare = ipywidgets.SelectMultiple(
            description="compare", rows=5, layout={"width": "auto"}, style={"description_width": "60px"}
        )
        pages = ipywidgets.Tab(
            [grid([self.knobs[name] for name in page], width=380) for page in _PAGES.values()], titles=tuple(_PAGES)
        )
        self.children = [
            pages,
            self.reasons,
            self.facts,
            beside(self.knobs["name"], self.prompt),
            beside(self.train_button, self.pause_button, self.resume_button, self.stop_button, self.status),
            self.shown_picture(),
            self.samples,
            self.compare,
            self.comparison,
        ]
        self.in_parts()
        for name, control in self.knobs.items():
            if name != "name":
                control.observe(self._changed, "value")
        self.compare.observe(self._compared, "value")
        self._fit_options()
        self._offer_runs()
        self._tell_facts()
        self._draw_picture()
        self.redraw()  # measures the speed, which takes a moment

    # What the controls say.

    @property
    def run(self) -> Run:
        """The run that Train would start. Raises LabError where its parts do not fit each other."""
        value = {name: control.value for name, control in self.knobs.items()}
        value |= {name: float(f"{value[name]:.4g}") for name in _ROUNDED}  # a log slider's steps are no round numbers
        value["max_steps"] = round(value["max_steps"])
        value["min_lr"] *= value["learning_rate"]
        value["stride"] = max(1, round(value["stride"] * value["seq_len"]))
        value |= {name: value[name] or None for name in _OPEN}
        value["decay_steps"] = value["decay_steps"] if value["schedule"] == "wsd" else None
        value["compile"] = None if value["compile"] == "auto" else value["compile"]
        model = ModelConfig(**{name: value[name] for name in _MODEL})
        train = TrainConfig(**{name: value[name] for name in _TRAIN})
        tags = {"label": value["name"].strip()} if value["name"].strip() else {}
        return Run(model, train, DataConfig(self.text, value["tokenizer"]), tags)

    def _changed(self, _change: dict) -> None:
        if self._is_fitting:
            return
        self._fit_options()
        self._tell_facts()
        self.redraw()

    def _fit_options(self) -> None:
        """Let each knob offer only what fits the others, and say why."""
        self._is_fitting = True
        try:
            k = self.knobs
            hidden, turned = k["hidden_size"].value, k["position"].value == "rope"
            heads = [h for h in range(1, 33) if hidden % h == 0 and not (turned and hidden // h % 2)]
            why = [f"num_heads is one of {', '.join(map(str, heads))}: it divides hidden_size {hidden}"
                   + (", and RoPE turns pairs of channels, so heads are even in size" if turned else "")]  # fmt: skip
            offer(k["num_heads"], heads)
            offer(k["num_kv_heads"], [h for h in heads_below(k["num_heads"].value)])
            why.append(f"num_kv_heads divides num_heads {k['num_heads'].value}")
            offer(k["seq_len"], [n for n in _WINDOWS if n <= k["max_seq_len"].value])
            why.append(f"seq_len is at most max_seq_len, {k['max_seq_len'].value} tokens")
            steps = round(k["max_steps"].value)
            k["warmup_steps"].max = max(1, steps - 1)
            k["decay_steps"].max = steps
            why.append(f"warmup_steps ends before max_steps, {steps:,}")
            offer(k["vocab_size"], [256] if k["tokenizer"].value == "byte" else list(_VOCABULARIES))
            for name, needed, because in (
                ("vocab_size", k["tokenizer"].value != "byte", "a byte tokenizer has 256 tokens"),
                ("rope_theta", turned, f"positions are {k['position'].value}, and only RoPE has a base"),
                ("decay_steps", k["schedule"].value == "wsd", "the cosine decays all the way"),
                ("loss_scaling", k["precision"].value == "fp16", "only fp16 has a loss scale"),
            ):
                k[name].disabled = not needed
                why += [] if needed else [f"{name} is off: {because}"]
            self.reasons.value = (
                f"<details style='{SMALL}'><summary>what cannot be set, and why</summary>"
                + "".join(f"<div>{html.escape(words)}.</div>" for words in why) + "</details>"
            )  # fmt: skip
        finally:
            self._is_fitting = False

    def _tell_facts(self) -> None:
        """Parameters, FLOPs, memory, time and the law's word, before anything is trained."""
        try:
            run = self.run
        except LabError as error:
            self.facts.value = (
                f"<div style='{SMALL};border-left:4px solid {ORANGE};padding-left:8px'>{html.escape(str(error))}</div>"
            )
            self.train_button.disabled = True
            return
        with self._lock:  # facts are told from a thread too, and Train may be pressed meanwhile
            self.train_button.disabled = self.is_running or self._is_paused
        params = counts.parameters(run.model)
        tokens = run.train.max_steps * run.train.windows_per_step * run.train.resolve(run.model).seq_len
        seconds = self._seconds(run, tokens)
        lines = [
            f"<b>{params['total']:,} parameters</b>: "
            + ", ".join(f"{name} {params[name]:,}" for name in
                        ("embedding", "position", "attention", "mlp", "norm", "head") if params[name])
            + f"; {params['non_embedding']:,} without embeddings",
            f"<b>{quantity(run.flops)} FLOPs</b> for {quantity(tokens)} tokens in {run.train.max_steps:,} steps of "
            f"{run.train.windows_per_step * run.train.resolve(run.model).seq_len:,} tokens",
            f"<b>about {memory_estimate(run.model, run.train) / 1e6:,.0f} MB</b> of memory; "
            f"<b>{'measuring how long it takes …' if seconds is None else 'about ' + duration(seconds)}</b>"
            + ("" if seconds is None else " on this machine, as busy as it is now"),
        ]  # fmt: skip
        law = self._law.get(_law_key(run))
        if law is not None:
            expected = law[0].surface.predict(params["total"], tokens, seed_sd=law[0].seed_sd).iloc[0]
            reach = run.flops / law[0].largest_flops
            lines.append(
                f"The law of {html.escape(law[1])} expects a loss of <b>{expected['loss']:.3f}</b> "
                f"[{expected['low']:.3f}, {expected['high']:.3f}] nats per token at the end, of its own recipe at its best "
                "learning rate, reading no text twice."
                + (f" That is {reach:,.0f} times its largest run: far beyond the evidence." if reach > FAR else "")
            )
        self.facts.value = f"<div class='tinylm-facts' style='{SMALL}'>{'<br>'.join(lines)}</div>"

    def _seconds(self, run: Run, tokens: float) -> float | None:
        """How long the run takes at the speed measured for its size, evaluations included."""
        speed = self._speed_for(run)
        if speed is None:
            return None
        total = counts.parameters(run.model)["total"]
        per_token = counts.train_flops_per_token(run.model, run.train.resolve(run.model).seq_len)
        rate = speed({"params_total": total, "flops_per_token": per_token})
        return float((tokens + evaluation_tokens(tokens)) / rate)

    def _speed_for(self, run: Run) -> Speed | None:
        """What was measured for runs like this one; for steps too long to be tried, whatever was measured last."""
        last = next(reversed(self._speeds.values()), None) if _is_long(run) else None
        return self._speeds.get(_speed_key(run), last)

    # Training.

    def start(self) -> None:
        """Train what the controls say; does nothing while something is trained or waits."""
        if self.is_running or self._is_paused:
            return
        try:
            self.live = LiveRun(self.run, self.results_dir, self.prompt.value or "The")
        except LabError as error:
            self._complain(error)
            return
        self._wants_pause = False
        self.begin(self._train)

    def pause(self) -> None:
        """End after the next step with a checkpoint, for ``resume`` to go on from."""
        with self._lock:
            if self.is_running:
                self._wants_pause = True
                self._say("pausing …")
                self._stop.set()
                self.live.request_stop()

    def resume(self) -> None:
        """Go on where ``pause`` ended, bit for bit."""
        if self._is_paused:
            self._is_paused = self._wants_pause = False
            self.live.record = None
            self.begin(self._train)

    def stop(self) -> None:
        """End the run after its next step, or give up one that is paused; what it had learned is thrown away."""
        super().stop()
        if self.is_running:
            self._wants_pause = False
            self.live.request_stop()
        elif self._is_paused:
            self._is_paused = False
            self.live.discard()
            self._say(f"given up after step {self.live.step:,}")
            self.ready(True)

    def make_room(self) -> None:
        """End the run, if one is going on, as ``pause`` does: its checkpoint stays, and the same run goes on from there when
        it is trained again."""
        if self.is_running:
            self.pause()

    def ready(self, is_ready: bool) -> None:
        self.train_button.disabled = not is_ready or self._is_paused
        self.pause_button.disabled = is_ready
        self.resume_button.disabled = not (is_ready and self._is_paused)
        self.stop_button.disabled = is_ready and not self._is_paused
        if is_ready:
            self.redraw()  # knobs may have moved meanwhile, and nothing is measured while a run goes on

    def model(self) -> tuple[TinyLM, Tokenizer]:
        """The last model that was trained here, and its tokenizer."""
        if self.live is None:
            raise LabError("A model must have been trained before it can be had", "nothing trained yet", "press Train")
        return self.live.model()

    def records(self) -> list[dict]:
        """The records of the runs that are compared, as they stand on disk."""
        return [self._records[run_id] for run_id in self.compare.value]

    def _train(self) -> str:
        """The body of the thread: one run, or as much of it as was asked for."""
        live = self.live
        in_background(self._tick, live)
        record = live.train(self.is_stopping, self._progress, self._point)
        if record is None or record["status"] == "stopped":
            if self._wants_pause:
                self._is_paused = True
                return f"paused after step {live.step:,} of {live.run.train.max_steps:,}"
            live.discard()
            self.redraw()
            return f"stopped after step {live.step:,} of {live.run.train.max_steps:,}; nothing of it is kept"
        self._records[record["run_id"]] = record
        self._offer_runs(record["run_id"])
        self._show_samples()
        if record["status"] == "finished":
            before = "" if live.trainer else "trained before; "
            return (
                f"done: {before}val_loss {record['val_loss']:.3f} nats/token, {record['val_bpb']:.3f} bits/byte, in "
                f"{duration(record['seconds'])}; recorded as {record['run_id']}"
            )
        return f"{record['status'].replace('_', ' ')}: {record['reason']}"

    def _tick(self, live: LiveRun) -> None:
        """Tell how far the run is, a few times a second, while it lasts."""
        began = seen = None
        while self.is_running and live is self.live and live.record is None:
            trainer = live.trainer
            if trainer is not None and trainer.step:
                if began is None:
                    began, seen = time.perf_counter(), trainer.step
                most, done = trainer.config.max_steps, trainer.step
                a_step = (time.perf_counter() - began) / max(1, done - seen)
                tokens = trainer.config.windows_per_step * trainer.config.seq_len
                self._progress(
                    f"step {done:,} of {most:,}"
                    + (
                        f", {tokens / a_step:,.0f} tokens/s, {duration(a_step * (most - done))} left"
                        if done > seen
                        else ""
                    )
                )
            time.sleep(0.25)

    def _point(self) -> None:
        self._show_samples()
        self.redraw()

    def _show_samples(self) -> None:
        told = [
            f"<div><span style='opacity:.65'>step {step:,}</span> {html.escape(text)}</div>"
            for step, text in self.live.samples[-8:][::-1]
        ]
        self.samples.value = f"<div class='tinylm-samples' style='{PAGE}'>{''.join(told)}</div>" if told else ""

    # Comparing.

    def _offer_runs(self, new: str | None = None) -> None:
        """Offer every run that is known, newest first, and compare the new one with those that were compared."""
        chosen = [new, *self.compare.value] if new else list(self._records)[-3:]
        labels = labels_of(list(self._records.values()))
        options = [(labels[run_id], run_id) for run_id in list(self._records)[::-1]]
        self.compare.layout.display = None if options else "none"
        self.compare.options = options
        self.compare.value = tuple(run_id for _, run_id in options if run_id in chosen)
        self._compared()

    def _compared(self, _change: object = None) -> None:
        records = self.records()
        labels = labels_of(records)
        rows = [
            (labels[r["run_id"]], f"{r['parameters']['total']:,}", quantity(r["tokens_seen"]), quantity(r["flops"]),
             *(f"{r[name]:.4f}" if r[name] is not None else "–" for name in ("val_loss", "val_bpb")),
             duration(r["seconds"]), r["status"], r["run_id"])
            for r in records
        ]  # fmt: skip
        head = (
            "run",
            "parameters",
            "tokens",
            "FLOPs",
            "val_loss (nats/token)",
            "val_bpb (bits/byte)",
            "time",
            "status",
            "record",
        )
        self.comparison.value = table(head, rows) if rows else ""
        self.redraw()

    # The picture.

    def draw(self) -> None:
        if not self.is_running:
            self._look_around()
            self._tell_facts()
        self._draw_picture()

    def _look_around(self) -> None:
        """Find the law of this text, and how fast this machine trains such a model, where that is not known yet."""
        run = self.run
        if _law_key(run) not in self._law:
            self._law[_law_key(run)] = evidence_for(run)
        total, key = float(counts.parameters(run.model)["total"]), _speed_key(run)
        before = self._speeds.get(key)
        known = before is not None and min(abs(math.log(total / p)) for p in before.params) < 0.2
        if known or (_is_long(run) and self._speeds) or not MACHINE.acquire(blocking=False):
            return
        try:
            device, threads, batch = key
            train = TrainConfig(precision="fp32", compile=False, device=device, batch_size=batch)
            speed = measure_speed([run.model], 0.2, threads, batch, train)
            self._speeds[key] = before.joined(speed) if before else speed
        finally:
            MACHINE.release()

    def _draw_picture(self) -> None:
        run = self.run
        self.picture.value = png(lambda figure: self._draw_curves(figure, run), (9.6, 3.9))

    def _draw_curves(self, figure: Figure, run: Run) -> None:
        loss, rate = parts(figure)
        records = self.records()
        labels = labels_of(records)
        curves = [(labels[r["run_id"]], r["curve"], "-") for r in records]
        live = self.live
        if live is not None and live.curve and (live.record is None or live.record["status"] == "stopped"):
            curves.append(("now", live.curve, "-" if self.is_running else "--"))
        for number, (label, curve, dashes) in enumerate(curves):
            colour = COLOURS[number % len(COLOURS)]
            draw_curve(loss, curve, "val_loss", colour, label, dashes)
            # Losses of whole intervals: the last one may be of a few steps.
            seen = [(point["tokens"], point["train_loss"]) for point in curve if not point["step"] % curve[0]["step"]]
            loss.plot(*zip(*seen, strict=True), color=colour, linewidth=0.8, alpha=0.6)
        followed = live.run if live is not None and self.is_running else run
        law = self._law.get(_law_key(followed))
        c = followed.train.resolve(followed.model)
        a_step = c.windows_per_step * c.seq_len
        if law is not None:
            total = counts.parameters(followed.model)["total"]
            tokens, expected = law_line(law[0], total, c.max_steps * a_step)
            words = f"law of {law[1]}: a run of {quantity(total)} parameters that ends here"
            loss.plot(tokens, expected, ":", color=GREY, linewidth=2, label=words)
        if not curves:
            loss.set(xlim=(a_step, c.max_steps * a_step), ylim=(0, 1.15 * math.log(followed.model.vocab_size)))
            loss.axhline(math.log(followed.model.vocab_size), color=COLOURS[0], linestyle="--", linewidth=1,
                         label="ln(vocab_size): where one who knows nothing begins")  # fmt: skip
        loss.set_ylabel("loss (nats/token)")
        log_x(loss, "training tokens")
        loss.set_title(
            "validation (dots; star: on more text, at the end) and training (thin)"
            if curves
            else "press Train: the curve will grow here"
        )
        if loss.get_legend_handles_labels()[0]:
            loss.legend(loc="upper right")
        steps = (
            np.unique(np.geomspace(1, c.max_steps, 200).astype(int))
            if c.max_steps > 400
            else np.arange(1, c.max_steps + 1)
        )
        rate.plot(steps, [learning_rate_at(int(s) - 1, c) for s in steps], color=COLOURS[1])
        if live is not None and self.is_running and live.trainer is not None:
            rate.axvline(live.trainer.step, color=GREY, linewidth=1)
        rate.set(xlabel="step", title="learning rate of this run", xlim=(0, c.max_steps), ylim=(0, None))
        rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def _speed_key(run: Run) -> tuple[str, int, int]:
    """Device, threads and windows a micro-step; beyond 16 of these the speed changes little."""
    return run.train.device, run.train.threads or 1, min(run.train.batch_size, 16)


def _is_long(run: Run) -> bool:
    """Whether a step is too long to be tried for the sake of a number."""
    return run.flops / run.train.max_steps > 1e11


def _law_key(run: Run) -> tuple:
    return run.data.text, run.data.tokenizer, run.model.vocab_size


def heads_below(num_heads: int) -> list[int]:
    """Numbers of key-value heads that so many query heads can share."""
    return [h for h in range(1, num_heads + 1) if num_heads % h == 0]


def labels_of(records: list[dict]) -> dict[str, str]:
    """A short name for each record by run_id: its own label, else in what it differs from the others."""
    flat = {
        r["run_id"]: {
            "text": Path(r["data"]["text"]).name,
            "tokenizer": r["data"]["tokenizer"],
            **{**ModelConfig().to_dict(), **r["model"]},  # a record may be older than a field
            **{**TrainConfig().to_dict(), **r["train"]},
        }
        for r in records
    }
    quiet = {
        "intermediate_size",
        "attention_scale",
        "decay_steps",
        "eval_interval",
        "stride",
        "threads",
    }  # follow others
    first = next(iter(flat.values()), {})
    differ = [name for name in first if name not in quiet and len({repr(own.get(name)) for own in flat.values()}) > 1]
    found = {}
    for record in records:
        own = flat[record["run_id"]]
        shown = [
            f"{name} {own[name]:.3g}" if isinstance(own[name], float) else f"{name} {own[name]}" for name in differ
        ]
        shape = f"{own['hidden_size']} channels, {own['num_layers']} block{'' if own['num_layers'] == 1 else 's'}"
        found[record["run_id"]] = record["tags"].get("label") or ", ".join(shown[:4]) or shape
    return found


# --------------------------------------------------------------------------------------------------------------- knobs

_WINDOWS = (16, 32, 64, 128, 256, 512, 1024)
_VOCABULARIES = (320, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
_OPEN = (
    "intermediate_size",
    "attention_scale",
    "unique_tokens",
    "decay_steps",
    "eval_interval",
    "patience",
)  # 0: derived
_ROUNDED = ("learning_rate", "rope_theta", "init_std", "norm_eps", "grad_clip")
_PAGES = {
    "The model": (
        *("hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size", "max_seq_len"),
        *("norm", "norm_position", "mlp", "position"),
    ),
    "The training": (
        *("learning_rate", "max_steps", "batch_size", "grad_accum", "warmup_steps", "schedule", "decay_steps"),
        *("min_lr", "weight_decay", "dropout", "seq_len", "seed"),
    ),
    "Text": ("tokenizer", "vocab_size", "unique_tokens", "stride"),
    "Finer points": (
        *("tie_embeddings", "qk_norm", "rope_theta", "attention_scale", "init", "init_std", "norm_eps"),
        *("beta1", "beta2", "grad_clip", "eval_interval", "eval_tokens", "patience"),
    ),
    "Machine": ("precision", "loss_scaling", "compile", "device", "threads", "checkpoint_minutes"),
}


def _knobs(text: str) -> dict[str, ipywidgets.Widget]:
    """A control for every field of ModelConfig and TrainConfig and for the tokenizer, at the recipe's values."""
    recipe = Recipe()
    model = recipe.model((64, 2, 4), vocab_size=512)
    rate = float(f"{recipe.learning_rate(counts.parameters(model)['total']):.2g}")
    train = recipe.train(model, START_TOKENS, learning_rate=rate, batch_size=4)

    def some(name: str, tooltip: str, options, value, unit: str = "") -> ipywidgets.SelectionSlider:
        return knob(ipywidgets.SelectionSlider, name, tooltip, unit, _WIDTH, options=options, value=value)

    def whole(name: str, tooltip: str, least: int, most: int, value: int, unit: str = "") -> ipywidgets.IntSlider:
        return knob(ipywidgets.IntSlider, name, tooltip, unit, _WIDTH, min=least, max=most, value=value)

    def log(name: str, tooltip: str, least: float, most: float, value: float, unit: str = "", form: str = ".2g"):
        return knob(
            ipywidgets.FloatLogSlider, name, tooltip, unit, _WIDTH,
            min=least, max=most, step=0.05, value=value, readout_format=form,
        )  # fmt: skip

    def pick(name: str, tooltip: str, options, value) -> ipywidgets.ToggleButtons:
        return choice(name, tooltip, options, value, _WIDTH)

    threads = sorted({1, 2, os.cpu_count() or 1})
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    made = [
        some("hidden_size", "width of the residual stream",
             (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512), 64, "channels"),
        whole("num_layers", "how many blocks lie on one another", 1, 12, model.num_layers, "blocks"),
        some("num_heads", "query heads of each attention", (1, 2, 4, 8, 16, 32), model.num_heads),
        some("num_kv_heads", "key-value heads, shared among the query heads", (1, 2, 4), model.num_kv_heads),
        some("intermediate_size", "width of the feed-forward; auto holds its parameters equal",
             [("auto", 0), *((str(n), n) for n in (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 2048))], 0, "channels"),
        some("max_seq_len", "the longest window the model can read", _WINDOWS, model.max_seq_len, "tokens"),
        pick("norm", "how a vector is brought to size", names.NORMS, model.norm),
        pick("norm_position", "before each part, or after the sum", names.NORM_POSITIONS, model.norm_position),
        pick("mlp", "the feed-forward's form", names.MLPS, model.mlp),
        pick("position", "how a token knows its place", names.POSITIONS, model.position),
        log("learning_rate", "step size at its highest", -5, -0.5, train.learning_rate),
        log("max_steps", "length of the training", 1, 5, train.max_steps, "steps", ",.0f"),
        some("batch_size", "windows a micro-step", (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128), train.batch_size, "windows"),
        whole("grad_accum", "micro-steps a step", 1, 16, 1, "micro-steps"),
        whole("warmup_steps", "over which the rate rises", 0, train.max_steps - 1, train.warmup_steps, "steps"),
        pick("schedule", "how the rate falls", names.SCHEDULES, train.schedule),
        whole("decay_steps", "at the end of wsd; 0 is a fifth of all", 0, train.max_steps, 0, "steps"),
        knob(ipywidgets.FloatSlider, "min_lr", "where the rate ends, as a part of learning_rate", "of learning_rate", _WIDTH,
             min=0, max=1, step=0.05, value=0.0),
        some("weight_decay", "pull of matrices towards zero", (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0), train.weight_decay),
        knob(ipywidgets.FloatSlider, "dropout", "share of channels switched off at random while training", "", _WIDTH,
             min=0, max=0.5, step=0.05, value=0.0),
        some("seq_len", "the training window", _WINDOWS, recipe.seq_len, "tokens"),
        knob(ipywidgets.BoundedIntText, "seed", "of weights, batches and dropout", "", _WIDTH, min=0, max=2**31 - 1, value=0),
        pick("tokenizer", "how text becomes tokens", names.TOKENIZERS, "bpe"),
        some("vocab_size", "different tokens; another size trains another tokenizer", _VOCABULARIES, model.vocab_size, "tokens"),
        some("unique_tokens", "how much of the text to read, again and again",
             [("all", 0), *((quantity(n), n) for n in (3000, 10000, 30000, 100000, 300000, 1000000))], 0, "tokens"),
        some("stride", "from one window's start to the next", [("seq_len / 4", 0.25), ("seq_len / 2", 0.5), ("seq_len", 1.0)], 1.0),
        pick("tie_embeddings", "one matrix for reading and writing tokens, or two", [("tied", True), ("untied", False)], True),
        log("rope_theta", "base of RoPE's wavelengths", 1, 6, model.rope_theta, form=",.0f"),
        some("attention_scale", "factor on q.k",
             [("1 / sqrt(Dh)", 0), *((str(s), s) for s in (0.03, 0.06, 0.125, 0.25, 0.5, 1.0))], 0),
        pick("qk_norm", "RMSNorm over each query and key before they meet", [("off", False), ("on", True)], model.qk_norm),
        pick("init", "a fixed spread, or one that grows as layers narrow", names.INITS, model.init),
        log("init_std", "spread of the first weights", -3, 0, model.init_std),
        log("norm_eps", "keeps norms from dividing by zero", -12, -2, model.norm_eps, form=".0e"),
        knob(ipywidgets.FloatSlider, "beta1", "memory of AdamW's mean gradient", "", _WIDTH,
             min=0, max=0.99, step=0.01, value=train.beta1),
        some("beta2", "memory of AdamW's squared gradient", (0.9, 0.95, 0.98, 0.99, 0.995, 0.999), train.beta2),
        log("grad_clip", "the longest gradient that is let through", -2, 2, train.grad_clip),
        some("eval_interval", "from one evaluation to the next",
             [("max_steps / 20", 0), *((str(n), n) for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000))], 0, "steps"),
        some("eval_tokens", "of the validation text that are scored", (4096, 16384, 65536, 262144), train.eval_tokens, "tokens"),
        some("patience", "end after so many evaluations without progress",
             [("never ends", 0), *((str(n), n) for n in (1, 2, 3, 5, 8, 12, 20))], 0, "evaluations"),
        pick("precision", "of matrix products; auto measures this machine once", names.PRECISIONS, "fp32"),
        pick("loss_scaling", "under fp16, keep small gradients from becoming zero", [("on", True), ("off", False)], True),
        pick("compile",
             "compile the step first, which no Stop can cut short", [("auto", "auto"), ("no", False), ("yes", True)], False),
        pick("device", "where to compute", devices, "cpu"),
        some("threads", "cores to use", threads, train.threads),
        some("checkpoint_minutes", "how often a checkpoint is written, so that a run that is cut off can go on",
             (0.0, 0.5, 1.0, 2.0, 5.0, 10.0), train.checkpoint_minutes),
    ]  # fmt: skip
    found = {control.description.split(" (")[0]: control for control in made}
    assert set(found) == {*_MODEL, *_TRAIN, "tokenizer"}, "every hyperparameter has its knob"
    return found
