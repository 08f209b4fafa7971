"""The model study, step by step: what studies/model_scaling.ipynb narrates.

How loss falls with parameters at equal tokens, which depth suits a width, and what "size" should mean: hidden_size times
num_layers, hidden_size squared times num_layers, or parameters, and which of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from tinylm import counts
from tinylm.config import ModelConfig
from tinylm.errors import TextError
from tinylm.study import doctor, plots, scaling
from tinylm.study.design import Recipe, best_runs, bracket, tune
from tinylm.study.parameters import ModelParameters
from tinylm.study.report import interval
from tinylm.study.runs import Run
from tinylm.study.sections import SectionStudy, aicc, doubling, left_out_errors, preferred, refit, size_words
from tinylm.study.steps import have, known_text
from tinylm.words import quantity

STEP = 8  # hidden sizes of a family of equal parameters are multiples of it, so that four heads of even width fit


@dataclass(frozen=True)
class Preset:
    """How much a preset measures. sizes: shapes of the ladder for L(N); families: a shape of the ladder and the numbers of
    layers that are compared at its number of parameters; tokens: of every run; noisy: shapes that are repeated with
    ``seeds`` seeds; moves: how often a bracket of rates may move outward; bootstrap: resamples of a fit."""

    sizes: tuple[tuple[int, int, int], ...]
    families: tuple[tuple[tuple[int, int, int], tuple[int, ...]], ...]
    tokens: float
    noisy: tuple[tuple[int, int, int], ...]
    seeds: int = 3
    moves: int = 3
    bootstrap: int = 1000


PRESETS = {
    "smoke": Preset(
        ((8, 2, 2), (12, 2, 2), (16, 2, 4), (24, 2, 4), (32, 2, 4)),
        (((24, 2, 4), (1, 2, 4)),),
        tokens=12e3, noisy=((8, 2, 2), (24, 2, 4)), seeds=2, moves=1, bootstrap=100,
    ),
    "quick": Preset(
        ((8, 2, 2), (12, 2, 2), (16, 2, 4), (24, 2, 4), (32, 2, 4), (48, 2, 4), (64, 2, 4), (72, 3, 4)),
        (((64, 2, 4), (1, 2, 4, 8)),),
        tokens=5e5, noisy=((24, 2, 4), (64, 2, 4)),
    ),
    "full": Preset(
        ((12, 2, 2), (16, 2, 4), (24, 2, 4), (32, 2, 4), (48, 2, 4), (64, 2, 4), (96, 4, 4), (128, 4, 4)),
        (((64, 2, 4), (1, 2, 3, 4, 6, 8)), ((32, 2, 4), (1, 2, 4, 12))),
        tokens=2e6, noisy=((32, 2, 4), (64, 2, 4)),
    ),
}  # fmt: skip


def equal_shape(recipe: Recipe, vocab_size: int, base: tuple[int, int, int], num_layers: int) -> ModelConfig:
    """A model of so many layers with as many parameters in all as ``base`` (within half a percent where it is not tiny):
    the hidden size that comes nearest with a feed-forward of the usual proportions, and then the feed-forward that closes
    the gap."""
    target = counts.parameters(recipe.model(base, vocab_size))["total"]
    if num_layers == base[1]:
        return recipe.model(base, vocab_size)
    widths = range(STEP, 4 * base[0] + 1, STEP)
    shapes = [recipe.model((width, num_layers, base[2]), vocab_size) for width in widths]
    nearest = min(shapes, key=lambda model: abs(math.log(counts.parameters(model)["total"] / target)))
    parts = counts.parameters(nearest)
    mlp = target - (parts["total"] - parts["mlp"])
    return nearest.replace(intermediate_size=max(1, round(mlp / (3 * nearest.hidden_size * num_layers))))


@dataclass(frozen=True)
class Member:
    """One model of the study. family: ``ladder``, or the name of the family of equal parameters that it belongs to."""

    model: ModelConfig
    family: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.model.hidden_size, self.model.num_layers


def begin(settings: ModelParameters) -> ModelStudy:
    """The study. Prepares the text, unless all that is known of it stands in the results folder."""
    known, preset = known_text(settings), PRESETS[settings.preset]
    if (there := known["tokens"]["train"]) < preset.tokens + 1:
        raise TextError(
            f"The {settings.preset} preset of this study reads {preset.tokens:,.0f} training tokens once",
            f"{there:,}",
            "choose a smaller preset or another text; `tinylm study quickstart` takes small texts",
        )
    return ModelStudy(settings, preset, known)


class ModelStudy(SectionStudy):
    """How loss falls with the size of a model at equal tokens, and which size it is that counts."""

    title = "How large, and of what shape: models of many sizes on {text}"

    # Training -------------------------------------------------------------------------------------------------------------

    def members(self) -> list[Member]:
        """All models: the ladder, and the families of equal parameters; the model that both hold stands in the ladder."""
        vocab_size = self.settings.vocab_size
        found = [Member(self.recipe.model(shape, vocab_size), "ladder") for shape in self.preset.sizes]
        for base, layers in self.preset.families:
            name = f"{base[0]} x {base[1]}"
            found += [
                Member(equal_shape(self.recipe, vocab_size, base, count), name) for count in layers if count != base[1]
            ]
        return found

    def runs_of(self, member: Member, rates: list[float], seed: int | None = None) -> list[Run]:
        seed = self.settings.seed if seed is None else seed
        tags = {"family": member.family, "budget": 0.0}
        train = [self.recipe.train(member.model, self.preset.tokens, rate, seed) for rate in rates]
        return [Run(member.model, config, self.data, tags) for config in train]

    def guesses(self, member: Member) -> list[float]:
        return bracket(self.recipe.learning_rate(counts.parameters(member.model)["total"]))

    def stages(self, train: Callable[..., pd.DataFrame]) -> list[pd.DataFrame]:
        """First every model at its rates; then the seeds, each model at its best rate."""
        members = self.members()
        frame = tune(members, self.runs_of, self.guesses, train, self.preset.moves)
        best = best_runs(frame).set_index("point").learning_rate
        noisy = [(member, best.get(number)) for number, member in enumerate(members) if self.noisy(member)]
        runs = [run for member, rate in noisy if rate is not None for run in self.seeds_of(member, rate)]
        return [frame, train(runs).assign(family="seeds")]

    def expected_runs(self) -> list[Run]:
        members = self.members()
        runs = [run for member in members for run in self.runs_of(member, self.guesses(member))]
        noisy = [member for member in members if self.noisy(member)]
        return runs + [run for member in noisy for run in self.seeds_of(member, self.guesses(member)[1])]

    def noisy(self, member: Member) -> bool:
        return member.family == "ladder" and member.shape in [shape[:2] for shape in self.preset.noisy]

    def seeds_of(self, member: Member, rate: float) -> list[Run]:
        first = self.settings.seed
        return [run for seed in range(first, first + self.preset.seeds) for run in self.runs_of(member, [rate], seed)]

    def measure(self) -> None:
        self.frame, self.noise = self.stages(self.train)
        self.best = scaling.best_learning_rate(self.frame, ("hidden_size", "num_layers"))
        self.best["family"] = (
            self.frame.groupby(["hidden_size", "num_layers"])
            .family.first()[list(zip(self.best.hidden_size, self.best.num_layers, strict=True))]
            .to_numpy()
        )
        self.best["size"] = size_words(self.best)
        for name, notion in NOTIONS.items():
            self.best[name] = notion.measure(self.best)
        self.ladder = self.best[self.best.family == "ladder"].sort_values("params_total")

    # Telling --------------------------------------------------------------------------------------------------------------

    def show_learning_rates(self) -> None:
        edges, count = int(self.frame.groupby("point").edge.first().sum()), self.frame.point.nunique()
        rule = scaling.learning_rate_rule(self.frame, by=("hidden_size", "num_layers"))
        self.report.section("Learning rates")
        self.report.text(
            f"Each of {count} models read {quantity(self.preset.tokens)} tokens once, at three rates or more, a factor of two "
            f"apart, and the bracket moved outward while its best rate lay at an edge; {edges} of {count} still {have(edges)} "
            f"theirs there. The loss of a model is from here on the vertex of the parabola through its runs. {rule.sentence()}"
        )
        ladder = self.frame[self.frame.family == "ladder"]

        def draw(ax: object) -> None:
            plots.learning_rates(ladder, ax)
            ax.set_title("")

        self.report.figure(
            "learning_rates", "Loss against learning rate, by parameters; a star is the vertex of a size's parabola, hollow at an "
            "edge", draw, size=(7.4, 4.4),
        )  # fmt: skip

    def show_noise(self) -> None:
        self.noise = self.noise.assign(place=size_words(self.noise))
        super().show_noise()

    def fit_sizes(self) -> None:
        """L(N) with and without a floor, N counted with and without the embeddings."""
        counts_of = {"params_total": "all parameters", "params_non_embedding": "without embeddings"}
        fits = {
            (column, kind): fit
            for column in counts_of
            for kind, fit in self.laws(self.ladder[column], self.ladder.val_loss).items()
        }
        told = {
            f"{counts_of[column]}, {kind}": doctor.diagnose(fit, bootstrap=0) for (column, kind), fit in fits.items()
        }
        rows = []
        for (column, kind), fit in fits.items():
            errors = left_out_errors(self.ladder[column], self.ladder.val_loss, kind == "floor")
            rows.append(
                {
                    "N": counts_of[column], "law": kind, "points": fit.n,
                    "residual": _rms(fit.data.observed - fit.data.predicted), "left_out": _rms(errors),
                    "largest_left_out": errors[-1], "aicc": aicc(fit),
                }
            )  # fmt: skip
        table = pd.DataFrame(rows)
        table["aicc"] = (table.aicc - table.aicc.min()).replace(math.inf, math.nan)
        self.size_laws = fits
        total = {kind: fit for (column, kind), fit in fits.items() if column == "params_total"}
        chosen = total[preferred(total)]
        self.report.section("Loss against parameters")
        self.report.text(
            f"{len(self.ladder)} sizes from {quantity(self.ladder.params_total.min())} to "
            f"{quantity(self.ladder.params_total.max())} parameters, all on {quantity(self.preset.tokens)} tokens. "
            + self._about_floor(told)
        )
        self.report.table(
            self.ladder, "sizes", "The ladder: each size at its best rate, loss in nats per token", size="", params_total=",.0f",
            params_non_embedding=",.0f", learning_rate=".3g", flops=".2g", val_loss=".3f", edge="",
        )  # fmt: skip
        self.show_verdicts(
            "laws", "L(N) = A / N^alpha without and E + A / N^alpha with a floor, with 95 % intervals and the verdict on each "
            "parameter", told,
        )  # fmt: skip
        self.report.table(
            table, "size_laws", "How well each law does: its residual, its error on a size that it was not shown (root mean square "
            "over sizes), its error on the largest size (observed less predicted; nats), and Akaike's criterion for few points "
            "above the best", N="", law="", points="d", residual=".4f", left_out=".4f", largest_left_out="+.4f", aicc=".1f",
        )  # fmt: skip
        self.report.figure(
            "sizes", "Loss against parameters with 95 % bands: all parameters (left), without the embeddings (right)",
            lambda axes: self._draw_sizes(axes, counts_of), size=(9.4, 4.0), panels=2,
        )  # fmt: skip
        value, low, high = doubling(chosen)
        self.findings.append(
            f"Twice the parameters multiplies the loss by {value:.3f} ({interval(low, high)}) at the largest sizes, at "
            f"{quantity(self.preset.tokens)} tokens. {self._about_floor(told)}"
        )

    def _about_floor(self, told: dict[str, doctor.Diagnosis]) -> str:
        """Whether these sizes show a floor, in words."""
        if "all parameters, floor" not in told:
            return "With so few sizes a floor cannot be looked for."
        floor = told["all parameters, floor"].verdicts.loc["E"]
        laws = {kind: told[f"all parameters, {kind}"].fit for kind in ("no floor", "floor")}
        better = "with" if preferred(laws) == "floor" else "without"
        return (
            f"A floor of {floor.value:.3g} nats ({floor.low:.3g} to {floor.high:.3g}) is {floor.status}; Akaike's criterion "
            f"prefers the law {better} one."
        )

    def _draw_sizes(self, axes: object, counts_of: dict[str, str]) -> None:
        words = {"no floor": "power law", "floor": "with a floor"}
        for ax, (column, title) in zip(axes, counts_of.items(), strict=True):
            for colour, (kind, label) in zip(plots.COLOURS, words.items(), strict=False):
                if (column, kind) in self.size_laws:
                    plots.law(self.size_laws[column, kind], ax=ax, label=label, colour=colour)
            ax.set_title(title)
        low, high = (f(ax.get_ylim()[i] for ax in axes) for i, f in ((0, min), (1, max)))
        for ax in axes:
            ax.set_ylim(low, high)

    def show_depth(self) -> None:
        """The best number of layers at equal parameters."""
        rows, members = [], []
        for base, layers in self.preset.families:
            family = self.family(base, layers)
            members.append(family)
            rows.append(best_depth(family, self.seed_sd, self.freedom, self.settings.seed))
        frame = pd.concat(members, ignore_index=True)
        self.shapes, self.depth = frame, pd.DataFrame(rows)
        self.report.section("Deep or wide")
        usual = {base: self.recipe.model(base, self.settings.vocab_size).resolve() for base, _ in self.preset.families}
        self.report.text(
            "Each family holds as many parameters as one size of the ladder: the hidden size is the multiple of "
            f"{STEP} that comes nearest, and the feed-forward closes the gap, so it is wider or narrower than usual "
            f"(`feed forward` over `hidden size`; {' and '.join(_ratio(model) for model in usual.values())} in the ladder). "
            "All models of a family read the same tokens; deeper ones cost some more compute for the same parameters. The "
            "minimum is that of a parabola of loss in log layers, its interval from redrawing every loss with the spread "
            "between seeds; it has no end where the parabola's minimum lies outside the layers tried."
        )
        self.report.table(
            frame.assign(off_percent=100 * (frame.params_total / frame.target - 1)), "shapes",
            "The families of equal parameters: difference to the family's size in percent, loss (nats per token), and what a shape "
            "costs against the best of its family", family="", num_layers="d", hidden_size="d", intermediate_size="d",
            params_total=",.0f", off_percent="+.2f", flops=".3g", learning_rate=".3g", val_loss=".3f", costs="+.3f",
        )  # fmt: skip
        self.report.table(
            self.depth, "depth", "The best number of layers of each family and its hidden size over layers, with 95 % intervals; "
            "p is the chance that seeds alone make the losses of the family differ so much",
            family="", params="", layers=".2g", layers_low=".2g", layers_high=".2g", ratio=".3g", ratio_low=".3g",
            ratio_high=".3g", loss=".3f", inside="", one_layer_costs="+.3f", deepest_costs="+.3f", p=".2g",
        )  # fmt: skip
        titles = self.depth.assign(title=[f"{row.params} parameters" for row in self.depth.itertuples()])
        self.report.figure(
            "depth", "Loss against layers at equal parameters; bars are 95 % of seeds, the star is the minimum of the parabola",
            lambda axes: plots.depths(frame, titles, axes, 1.96 * self.seed_sd), size=(4.3 * len(titles) + 0.4, 3.8),
            panels=len(titles),
        )  # fmt: skip
        for row in self.depth.itertuples():
            found = f"no minimum inside the layers tried: the best tried has {row.layers:.0f}"
            if row.inside:
                found = f"about {row.layers:.2g} layers ({_ends(row.layers_low, row.layers_high)}), a hidden size of "
                found += f"{row.ratio:.3g} times the layers ({_ends(row.ratio_low, row.ratio_high)})"
            told = "beyond chance" if row.p < 0.05 else "no more than chance can"
            self.findings.append(
                f"At {row.params} parameters the best shape has {found}; one layer costs {row.one_layer_costs:.3f} nats and "
                f"{row.deepest} layers {row.deepest_costs:.3f}. The losses of the family differ {told} (p = {row.p:.2g})."
            )

    def family(self, base: tuple[int, int, int], layers: tuple[int, ...]) -> pd.DataFrame:
        """The models of a family of equal parameters, by layers, each at its best rate."""
        name = f"{base[0]} x {base[1]}"
        own = (self.best.family == name) | (self.best["size"] == name)
        family = self.best[own & self.best.num_layers.isin(layers)].sort_values("num_layers")
        target = family.params_total[family.num_layers == base[1]].iloc[0]
        return family.assign(family=name, target=target, costs=family.val_loss - family.val_loss.min())

    def compare_sizes(self) -> None:
        """Which notion of size one law of loss in it fits best, over all shapes."""
        shapes = self.best.sort_values("params_total")
        columns = {name: (shapes[name], shapes.val_loss) for name in NOTIONS}
        fits = {
            name: scaling.fit_power(*rows, floor=True, objective="lsq", bootstrap=0) for name, rows in columns.items()
        }
        errors = {name: left_out_errors(*rows, floor=True) for name, rows in columns.items()}
        table = pd.DataFrame(
            {
                "notion": {name: notion.words for name, notion in NOTIONS.items()},
                "points": len(shapes),
                "alpha": {name: fit.params["alpha"] for name, fit in fits.items()},
                "E": {name: fit.params["E"] for name, fit in fits.items()},
                "residual": {name: _rms(fit.data.observed - fit.data.predicted) for name, fit in fits.items()},
                "left_out": {name: _rms(values) for name, values in errors.items()},
                "aicc": {name: aicc(fit) for name, fit in fits.items()},
                "wins": 100 * win_shares(errors, self.settings.seed),
            }
        )
        table["aicc"] -= table.aicc.min()
        families = self.shapes.groupby("family")
        wider = (families.h_l.max() / families.h_l.min()).max()
        self.report.section("Which size counts")
        self.report.text(
            f"One law, L = E + A / x^alpha, is fitted to all {len(shapes)} shapes with x each notion of size in turn. The ladder "
            "alone could not tell them apart, since its notions rise together; the families can: at equal parameters "
            f"hidden_size x num_layers changes by up to {wider:.1f} times, and the loss by up to "
            f"{families.costs.max().max():.3f} nats. `left out` is the error on a shape that the fit was not shown; `wins` is how "
            "often a notion has the smallest such error when the shapes are drawn again, with replacement: near 100 % it is sure, "
            f"near {100 / len(table):.0f} % a toss."
        )
        self.report.table(
            table.reset_index(drop=True), "notions", "Notions of size x in L = E + A / x^alpha: residual and error on a shape left "
            "out (root mean square, nats), Akaike's criterion for few points above the best, and percent of redrawn sets of shapes "
            "that it wins", notion="", points="d", alpha=".3f", E=".3f", residual=".4f", left_out=".4f", aicc=".1f", wins=".0f",
        )  # fmt: skip
        self.report.figure(
            "notions", "All shapes against each notion of size, with the law fitted to it",
            lambda axes: plots.notions(shapes, fits, {name: notion.label for name, notion in NOTIONS.items()}, axes),
            size=(3.0 * len(NOTIONS) + 1.2, 3.5), panels=len(NOTIONS),
        )  # fmt: skip
        best, second = table.left_out.sort_values().index[:2]
        sure = table.wins[best]
        rival = table.aicc.drop(best).min() - table.aicc[best]
        verdict = (
            f"loss follows {NOTIONS[best].words} best: its error on a shape left out is {table.left_out[best]:.4f} nats, "
            f"{NOTIONS[second].words} comes next with {table.left_out[second]:.4f}; it wins in {sure:.0f} % of the redrawn sets, "
            f"and Akaike's criterion puts it {abs(rival):.1f} {'before' if rival > 0 else 'behind'} the best of the others"
        )
        standing = "settled here" if sure > 95 and rival > 6 else "likely, not sure" if sure > 70 else "not settled"
        counted, other = table.loc[["params_total", "params_non_embedding"]].left_out.sort_values().index
        share = win_shares({name: errors[name] for name in (counted, other)}, self.settings.seed)[counted]
        self.report.text(
            f"So {verdict}: this is **{standing}**. Of the two counts, {NOTIONS[counted].words} tell more than "
            f"{NOTIONS[other].words} ({table.left_out[counted]:.4f} against {table.left_out[other]:.4f} nats on shapes left out), "
            f"in {share:.0%} of the redrawn sets."
        )
        self.findings.append(f"{verdict[0].upper()}{verdict[1:]}: {standing}.")
        self.findings.append(
            f"{NOTIONS[counted].words.capitalize()} tell more of the loss than {NOTIONS[other].words}, in {share:.0%} of redrawn "
            "sets of shapes."
        )
        self._tell_exponent(shapes)

    def _tell_exponent(self, shapes: pd.DataFrame) -> None:
        profile, (power, low, high) = exponent_profile(shapes)
        self.report.figure(
            "exponent", "The same law with x = h^p L: how much the squared residuals rise away from the best p (1 is h L, 2 is "
            "h² L)", lambda ax: self._draw_exponent(ax, profile), size=(5.2, 3.4),
        )  # fmt: skip
        allowed = [name for name, value in (("h L", 1), ("h² L", 2)) if low <= value <= high]
        told = [
            "neither h L nor h² L is allowed",
            f"only {' '.join(allowed)} is allowed",
            "h L and h² L are both allowed",
        ]
        edge = ", the largest tried," if high == math.inf and power >= profile.value.max() else ""
        said = f"with size as a product h^p L of hidden size and layers, p = {power:.1f}{edge} fits best (95 % {_open(low, high)})"
        self.report.text(f"Between h L (p = 1) and h² L (p = 2): {said}; {told[len(allowed)]} by these shapes.")
        self.findings.append(f"{said[0].upper()}{said[1:]}; {told[len(allowed)]}.")

    @staticmethod
    def _draw_exponent(ax: object, profile: pd.DataFrame) -> None:
        plots.profiles(profile, ax)
        for power, words in ((1, "$h L$"), (2, "$h^2 L$")):
            ax.axvline(power, color=plots.COLOURS[1], linewidth=1.2, linestyle=":")
            ax.annotate(words, (power, 0.97), (3, 0), xycoords=ax.get_xaxis_transform(), textcoords="offset points", va="top",
                        color=plots.COLOURS[1])  # fmt: skip
        ax.set_xlabel("p, in x = $h^p L$")
        ax.set_ylabel("squared residuals above their least\nin units of the 95 % limit")

    def end(self) -> None:
        self.finish([self.frame, self.noise])


@dataclass(frozen=True)
class Notion:
    """What "size" may mean: in words, on an axis, and computed from a table of shapes."""

    words: str
    label: str
    measure: Callable[[pd.DataFrame], pd.Series]


NOTIONS = {
    "h_l": Notion("hidden_size x num_layers", "$h L$", lambda t: t.hidden_size * t.num_layers),
    "h2_l": Notion("hidden_size² x num_layers", "$h^2 L$", lambda t: t.hidden_size**2 * t.num_layers),
    "params_total": Notion("all parameters", "all parameters N", lambda t: t.params_total),
    "params_non_embedding": Notion(
        "parameters without embeddings", "N without embeddings", lambda t: t.params_non_embedding
    ),
}


def best_depth(family: pd.DataFrame, seed_sd: float, freedom: int, seed: int = 0, draws: int = 4000) -> dict:
    """The minimum of a parabola of loss in log layers, with 95 % intervals from redrawing the losses.

    family: as ``ModelStudy.family`` gives it, three models at least. seed_sd (nats), freedom: the spread between seeds and its
    degrees of freedom. Where the parabola has no minimum between the fewest and the most layers, ``inside`` is false and the
    best model tried stands there; redrawn minima outside count as infinitely far out. ``p``: the chance that seeds alone make
    the losses differ so much (an F test of their variance).
    """
    x, losses = np.log(family.num_layers.to_numpy(float)), family.val_loss.to_numpy(float)
    rng = np.random.default_rng(seed)
    noise = seed_sd * np.sqrt(freedom / rng.chisquare(freedom, size=draws))
    drawn = np.column_stack([losses, losses[:, None] + noise * rng.standard_normal((len(x), draws))])
    a, b, c = np.linalg.pinv(np.vander(x, 3)) @ drawn
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex = np.where(a > 0, -b / (2 * a), np.where(b > 0, -np.inf, np.inf))
    inside = bool(a[0] > 0 and x[0] < vertex[0] < x[-1])
    lowest = int(losses.argmin())
    at = vertex[0] if inside else x[lowest]
    # Hidden size over layers along the family: straight in logs between its models.
    log_ratio = np.log(family.hidden_size.to_numpy(float)) - x
    low, high = np.quantile(vertex[1:], [0.025, 0.975], method="nearest")
    low, high = (end if x[0] <= end <= x[-1] else np.nan for end in (low, high))
    ratio, ratio_high, ratio_low = (
        float(np.exp(np.interp(v, x, log_ratio))) if np.isfinite(v) else np.nan for v in (at, low, high)
    )
    return {
        "family": family.family.iloc[0], "params": quantity(family.target.iloc[0]), "layers": float(np.exp(at)),
        "layers_low": float(np.exp(low)), "layers_high": float(np.exp(high)), "ratio": ratio, "ratio_low": ratio_low,
        "ratio_high": ratio_high, "loss": float(np.polyval([a[0], b[0], c[0]], at)) if inside else losses[lowest],
        "inside": inside, "a": a[0], "b": b[0], "c": c[0], "one_layer_costs": losses[0] - losses.min(),
        "p": float(stats.f.sf(losses.var(ddof=1) / seed_sd**2, len(x) - 1, freedom)),
        "deepest": int(family.num_layers.iloc[-1]), "deepest_costs": losses[-1] - losses.min(),
    }  # fmt: skip


def win_shares(errors: dict[str, np.ndarray], seed: int = 0, draws: int = 10_000) -> pd.Series:
    """How often each of several ways to predict has the smallest sum of squared errors when their rows, the same for all,
    are drawn again with replacement. errors: (rows,) of each."""
    squares = np.array([np.asarray(values) ** 2 for values in errors.values()])
    rng = np.random.default_rng(seed)
    counts_drawn = rng.multinomial(squares.shape[1], np.full(squares.shape[1], 1 / squares.shape[1]), size=draws)
    winners = (squares @ counts_drawn.T).argmin(axis=0)
    return pd.Series(np.bincount(winners, minlength=len(squares)) / draws, index=list(errors))


def exponent_profile(
    shapes: pd.DataFrame, grid: np.ndarray | None = None
) -> tuple[pd.DataFrame, tuple[float, float, float]]:
    """L = E + A / (h^p L)^alpha with p held at each value of a grid: the sum of squared log residuals, as a table that
    ``plots.profiles`` takes (parameter, value, delta, threshold), and the best p with its 95 % region (an F test; an end that
    the grid does not reach is infinite)."""
    grid = np.round(np.arange(0.0, 4.01, 0.1), 2) if grid is None else grid
    width, layers = shapes.hidden_size.to_numpy(float), shapes.num_layers.to_numpy(float)
    whole = np.ones((1, len(shapes)))
    squares = np.array([refit(width**p * layers, shapes.val_loss, whole)[1][0] for p in grid])
    freedom = len(shapes) - 4
    limit = squares.min() * stats.f.ppf(0.95, 1, freedom) / freedom if freedom > 0 else math.inf
    rise = squares - squares.min()
    table = pd.DataFrame({"parameter": "p", "value": grid, "delta": rise, "threshold": limit})
    best = int(rise.argmin())
    low, high = doctor.profile_intervals(table)["p"]
    return table, (float(grid[best]), low, high)


def _rms(errors: object) -> float:
    return float(np.sqrt(np.mean(np.asarray(errors) ** 2)))


def _ratio(model: ModelConfig) -> str:
    return f"{model.intermediate_size / model.hidden_size:.2f}"


def _ends(low: float, high: float) -> str:
    """A 95 % interval whose ends may lie beyond what was tried (NaN)."""
    if math.isnan(low) and math.isnan(high):
        return "with no end within those tried"
    if math.isnan(low) or math.isnan(high):
        return f"{high:.3g} at most" if math.isnan(low) else f"{low:.3g} at least"
    return f"{low:.3g} to {high:.3g}"


def _open(low: float, high: float) -> str:
    """A 95 % region whose ends may not exist."""
    if math.isinf(low) and math.isinf(high):
        return "without a limit either way"
    if math.isinf(low) or math.isinf(high):
        return f"below {high:.2f}" if math.isinf(low) else f"above {low:.2f}"
    return f"{low:.2f} to {high:.2f}"
