"""What every study of this lab does, step by step: tell of the text and the recipe, train, measure the noise, seal and score,
show a page, write the report. A study's notebook calls these steps and its own in order.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shlex
from pathlib import Path

import pandas as pd
from scipy import stats

from tinylm import counts, files
from tinylm.config import GenerateConfig, TrainConfig
from tinylm.errors import LabError
from tinylm.study import contents, forecasts, plots, scaling
from tinylm.study.cluster import study_pool
from tinylm.study.design import LADDER, Point, Recipe, bracket
from tinylm.study.parameters import StudyParameters, repository, within_repository
from tinylm.study.report import Report, interval, write_table
from tinylm.study.runs import Folder, Run, about_corpus, prepare_corpus, read_kept
from tinylm.study.sweep import sweep
from tinylm.words import duration, quantity


def known_text(settings: StudyParameters) -> dict:
    """What is known of a study's text. Prepares it, unless its facts stand in the results folder."""
    recipe = Recipe()
    model = recipe.model(LADDER[0], settings.vocab_size)
    some = Run(model, recipe.train(model, 1e5, 0.01), settings.data)  # any run over the text will do
    known = Folder(settings.folder).corpus(some)
    return about_corpus(prepare_corpus(some, progress=True)) if known is None else known


def command(run: Run) -> str:
    """The command that trains a run: every field of its configs that is not at its default."""
    words = ["tinylm train --out results/local/next"]
    for config in (run.data, run.model, run.train):
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if value != field.default:
                name = field.name.replace("_", "-")
                words.append(
                    f"--{'' if value else 'no-'}{name}"
                    if isinstance(value, bool)
                    else f"--{name} {shlex.quote(str(value))}"
                )
    return " \\\n    ".join(words)


def have(count: int) -> str:
    return "has" if count == 1 else "have"


class Study:
    """What all studies share: the text, the report, the sweeps, the noise, the samples."""

    title = ""

    def __init__(self, settings: StudyParameters, preset: object, corpus: dict):
        self.settings, self.data, self.corpus = settings, settings.data, corpus
        self.preset, self.recipe, self.folder = preset, Recipe(), settings.folder
        self.workers = settings.workers or None
        self.report = Report(self.folder, self.title.format(text=corpus["name"]))
        self.findings: list[str] = []
        self._pool = study_pool(settings.cluster, self.workers)
        self._executor = None

    # Training -------------------------------------------------------------------------------------------------------------

    def model(self, shape: tuple[int, int, int]):
        return self.recipe.model(shape, self.settings.vocab_size)

    def train(self, runs: list[Run], **options) -> pd.DataFrame:
        """Records of the runs, trained where there are none yet; the workers stay for the whole study."""
        if self._executor is None:
            self._executor = self._pool.__enter__()
        return sweep(runs, self.folder, executor=self._executor, **options)

    def runs_at(self, point: Point, rates: list[float], seed: int | None = None, **changes) -> list[Run]:
        model = self.model(point.shape)
        seed = self.settings.seed if seed is None else seed
        tags = {"family": point.family, "budget": point.budget}
        changes = {"eval_tokens": self.eval_tokens, **changes}
        return [
            Run(model, self.recipe.train(model, point.tokens, rate, seed, **changes), self.data, tags) for rate in rates
        ]

    @property
    def eval_tokens(self) -> int:
        """Tokens of each evaluation: the preset's, where it has a number of its own."""
        return getattr(self.preset, "eval_tokens", TrainConfig.eval_tokens)

    def first_rates(self, point: Point) -> list[float]:
        return bracket(self.recipe.learning_rate(counts.parameters(self.model(point.shape))["total"]))

    # Telling --------------------------------------------------------------------------------------------------------------

    def describe_text(self) -> None:
        """What was read, and how it is split and cut into tokens."""
        facts, split = self.corpus, self.corpus["bytes"]
        total, tokens = sum(split.values()), facts["tokens"]
        origin = facts["provenance"]
        own = origin["source"].startswith("own")
        source = "" if own else f"{origin['source']}; licence: {origin['licence']}"
        self.report.section("The text")
        self.report.text(
            f"**{facts['name']}**, {total / 1e6:.1f} MB{f' ({source})' if source else ''}. Of it {split['train'] / total:.0%} "
            f"train the models, {split['val'] / total:.0%} judge them, and the rest is kept for a last test; the parts are "
            f"contiguous blocks. A {self.data.tokenizer} tokenizer of {self.settings.vocab_size} pieces, trained on the "
            f"training part alone, cuts it into {quantity(tokens['train'])} training tokens of "
            f"{split['train'] / tokens['train']:.2f} bytes each. Loss is in nats per token over {self.eval_tokens:,} "
            f"tokens of the validation part at most, the same for every run; a guess at random would lose "
            f"{math.log(self.settings.vocab_size):.2f}."
        )

    def describe_recipe(self) -> None:
        """The frozen recipe, and its evidence where it is at hand."""
        recipe, evidence = self.recipe, repository() / "results" / "recipe"
        self.report.section("The recipe")
        self.report.text(
            "Every run has the same recipe: RMSNorm before each part, SwiGLU, multi-head attention, tied embeddings, RoPE with "
            f"rope_theta {recipe.rope_theta:g}; windows of {recipe.seq_len} tokens; weights drawn with the spread that their "
            f"width asks for (`init={recipe.init}`); "
            f"AdamW with weight decay {recipe.weight_decay:g} and beta2 {recipe.beta2:g}; warmup over as many tokens as the model "
            f"has parameters, at most {recipe.warmup_share:.0%} of the run, then a cosine to zero that ends where the run ends; "
            f"{recipe.batch_tokens_base:g} tokens a step for 300,000 tokens of training, growing with the square root of the "
            "tokens. It was chosen by measurement on `verse` before this study, and then frozen."
        )
        table = evidence / "tables" / "variants.csv"
        if table.exists():
            self.report.table(
                pd.read_csv(table), "recipe", "The evidence: what changing one thing does to the loss at a small budget, each "
                "variant at the best of the rates tried (`edge`: it is the lowest or the highest of them, so a better one may "
                f"lie beyond; more in {within_repository(evidence)}/README.md)", budget=".2g", variant="", rate=".3g", edge="",
                loss=".3f", seed_sd=".3f", seeds="d", difference="+.3f", low="+.3f", high="+.3f", verdict="",
            )  # fmt: skip

    def with_seeds(self, run: Run, count: int | None = None) -> list[Run]:
        """The same run with ``count`` seeds, by default as many as the preset says."""
        seeds = range(self.settings.seed, self.settings.seed + (count or self.preset.seeds))
        return [
            dataclasses.replace(run, train=run.train.replace(seed=seed), tags={**run.tags, "family": "seeds"})
            for seed in seeds
        ]

    def show_noise(self, frame: pd.DataFrame) -> None:
        self.noise = frame
        frame = frame[frame.val_loss.notna()]
        n, sd = len(frame), frame.val_loss.std()
        low, high = (sd * math.sqrt((n - 1) / stats.chi2.ppf(q, n - 1)) for q in (0.95, 0.05))
        self.seed_sd = sd
        self.report.section("How much luck there is")
        self.report.text(
            f"The same run with {n} seeds ({frame.hidden_size.iloc[0]} x {frame.num_layers.iloc[0]}, "
            f"{quantity(frame.tokens_seen.iloc[0])} tokens): the standard deviation of the loss is **{sd:.4f} nats** (90 % "
            f"interval {interval(low, high, '.4f')}). Two single runs must differ by {1.96 * 2**0.5 * sd:.3f} "
            "nats before chance is unlikely."
        )
        self.report.figure("seeds", f"{n} seeds of one run", lambda ax: plots.seeds(frame, ax=ax), size=(7, 2.2))
        table = pd.DataFrame(
            [{"runs": n, "mean": frame.val_loss.mean(), "sd": sd, "sd_low_90": low, "sd_high_90": high}]
        )
        write_table(self.folder / "tables" / "seeds.csv", table)
        self.findings.append(f"The seed alone moves the loss by {sd:.3f} nats (standard deviation of {n} runs).")

    def _again(self) -> str:
        """The command that makes this study."""
        name = self.settings.study
        words = f"tinylm study {'' if name == 'quickstart' else name + ' '}--results-dir FOLDER"
        for field in dataclasses.fields(self.settings):
            value = getattr(self.settings, field.name)
            if value != field.default and field.name not in ("results_dir", "workers", "cluster"):
                text = ",".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)
                words += f" -p {field.name} {shlex.quote(text)}"
        return words

    def task(self, run: Run):
        """The run as the results folder identifies it, also where it is the first of its kind."""
        folder = Folder(self.folder)
        if (task := folder.task(run)) is None:
            folder.admit([(run, prepare_corpus(run))])
            task = folder.task(run)
        return task

    def seal_and_score(self, run: Run, target: dict, prediction: dict, fit: scaling.Fit, what: str) -> None:
        """Seal a forecast before its run exists, train the run, and hold the one against the other."""
        inside = self.folder.is_relative_to(repository() / "results")
        folder = (self.folder.parent if inside else self.folder) / "forecasts"
        study = re.sub(r"[^A-Za-z0-9_.-]+", "-", self.folder.name).strip("-.") or "study"
        earlier = forecasts.load(folder)
        earlier = earlier[(earlier.run_id == target["run_id"]) & (earlier.study == study)]
        if len(earlier):  # sealed by an earlier start of this study: that one counts
            sealed = folder / f"{earlier['name'].iloc[0]}.json"
            prediction = earlier.iloc[0]
        else:
            sealed = forecasts.seal(folder, study=study, target=target, prediction=prediction, fit=fit.to_dict())
        loss, low, high = (float(prediction[name]) for name in ("loss", "low", "high"))
        print(f"sealed {sealed.name}: loss {loss:.3f} ({low:.3f} to {high:.3f})")
        self.final = self.train([run], keep_models=True)
        record = self.final.iloc[0]
        self.report.section("A forecast, sealed and scored")
        said = f"the loss of {what} was forecast: **{loss:.3f} nats, 95 % interval {interval(low, high)}**"
        try:
            diverged = record.status == "diverged"
            observed = {"loss": None if diverged else record.val_loss, "status": record.status}
            score = forecasts.score(folder, sealed, {**observed, "time": record.started, "run_id": record.run_id})
        except LabError as error:  # its seal was lost and made anew after the run
            self.report.text(f"Before its run, {said}. It could not be scored ({record.status}). {error}")
            self.findings.append("The sealed forecast could not be scored.")
            return
        _publish_calibration(folder)
        if diverged:
            self.report.text(f"Before it was trained, {said}. The run diverged ({record.reason}): a miss.")
            self.findings.append("The run behind the sealed forecast diverged: a miss.")
            return
        error, kept = score["error_percent"], score["inside"]
        where = os.path.relpath(sealed, self.folder)
        self.report.text(
            f"Before it was trained, {said}. It came out at **{record.val_loss:.3f}**: {error:+.2f} % off, "
            f"{'inside' if kept else 'outside'} the interval. The seal with its time is [{sealed.name}]({where})."
        )
        table = forecasts.load(folder)
        self.report.figure(
            "forecast", "What was forecast and what came out",
            lambda ax: plots.forecast(table[table["name"] == sealed.stem], ax=ax), size=(7, 2.4),
        )  # fmt: skip
        self.findings.append(
            f"A forecast sealed before its run was off by {error:+.2f} % of the loss and {'kept' if kept else 'left'} its 95 % "
            f"interval: {what}."
        )

    def show_samples(self, prompts: tuple[str, ...] = ("The ", "And ")) -> None:
        """A page that the best model wrote."""
        run_id = self.final.run_id.iloc[0]
        path = self.folder / "models" / f"{run_id}.safetensors"
        kept = self.folder / "tables" / "pages.json"  # a large model may be left out of what is published
        config = GenerateConfig(temperature=0.8, top_p=0.95, max_new_tokens=220, seed=self.settings.seed)
        self.report.section("A page from the best model")
        written = read_kept(kept, _pages_of) if kept.exists() else {}
        if written.get("run_id") != run_id and not path.exists():
            self.report.text("The model was not kept, so there is no page of its own here.")
            return
        if path.exists():
            files.write_whole(self.folder / "models" / "best.safetensors", path.read_bytes())
        if written.get("run_id") != run_id:
            from tinylm.checkpoint import load_model
            from tinylm.generate import generate

            model, tokenizer, _ = load_model(path)
            pages = generate(model, tokenizer, list(prompts), config)
            written = {"run_id": run_id, "pages": dict(zip(prompts, (page.text for page in pages), strict=True))}
            files.write_whole(kept, json.dumps(written) + "\n")
        for prompt, page in written["pages"].items():
            text = (prompt + page).strip("\n").replace("```", "'''")
            self.report.text(
                f"Prompt `{prompt!r}`, temperature {config.temperature}, top_p {config.top_p}:\n\n```text\n{text}\n```"
            )

    def finish(self, frames: list[pd.DataFrame], also: tuple[str, ...] = ()) -> None:
        """The table of all runs, how it was made, and the report's first lines. also: columns of that table that say what a run
        stands for in this study."""
        runs = pd.concat(frames).drop_duplicates("run_id").sort_values(["flops", "run_id"])
        columns = [
            "run_id",
            "family",
            "budget",
            "status",
            "hidden_size",
            "num_layers",
            "params_total",
            "params_non_embedding",
        ]
        columns += [
            "tokens_seen",
            "epochs",
            "flops",
            "batch_size",
            "max_steps",
            "learning_rate",
            "seed",
            "val_loss",
            "val_bpb",
        ]
        write_table(self.folder / "tables" / "runs.csv", runs[[*columns, *also]])
        arithmetic = (Folder(self.folder).shared("arithmetic") or {}).get("machine", {})
        self.report.section("How this was made")
        self.report.text(
            f"{len(runs)} runs, {runs.flops.sum():.2g} FLOPs, {duration(runs.seconds.sum())} of work for one core, "
            f"on {', '.join(f'{k} {v}' for k, v in arithmetic.items())}. One JSON a run is in [runs](runs), every run in one "
            f"table in [tables/runs.csv](tables/runs.csv). Again, from its records or for real in an empty folder: "
            f"`{self._again()}`."
        )
        self.report.summary("\n".join(f"- {line}" for line in self.findings))
        self.report.write()
        if self._executor is not None:
            self._pool.__exit__(None, None, None)
            self._executor = None
        if self.folder.parent == repository() / "results":
            contents.write(self.folder.parent)
        print(f"report: {within_repository(self.folder / 'README.md')}")


def _pages_of(kept: dict) -> dict:
    """What ``show_samples`` wrote, as it is used."""
    return {"run_id": kept["run_id"], "pages": {prompt: page + "" for prompt, page in kept["pages"].items()}}


def _publish_calibration(folder: Path) -> None:
    """The page of all forecasts ever sealed beside their seals, the failed ones too."""
    found = forecasts.calibration(folder)
    page = Report(folder, "Every forecast that was sealed")
    page.text(found.sentence())
    page.text(
        "A seal is a file of this folder, written before its run existed, and its score the file beside it. The studies named "
        "below seal and score them; their last sections have the commands, and each of them draws this page anew."
    )
    page.table(
        found.table.rename(columns={"inside": "kept its interval"}), "calibration",
        "Forecasts in the order they were sealed: loss (nats per token) with its 95 % interval, what came out, and by how many "
        "percent and how many standard deviations of its own interval that was above", name="",
        study="", time="", reach=".1f", loss=".3f", low=".3f", high=".3f", observed=".3f", error_percent="+.2f",
        standardised="+.2f", **{"kept its interval": ""},
    )  # fmt: skip
    page.figure(
        "calibration", "What was forecast and what came out; on the right each error in standard deviations of its own interval",
        lambda axes: plots.calibration(found.table, axes), size=(8.4, 3.9), panels=2,
    )  # fmt: skip
    page.write()
