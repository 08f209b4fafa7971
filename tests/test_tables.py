"""Anyone's table of runs: its rows are read or named, what is dropped is told, and each form gives its law."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from tinylm.errors import LabError
from tinylm.study.coverage import CHINCHILLA, spread
from tinylm.study.scaling import Fit, evaluate_law, fit_surface
from tinylm.study.tables import budgets_of, fit_file, read_runs

NAMES = {"params": "N", "tokens": "D", "loss": "L"}
KEYS = "n form objective value params intervals a a_interval starts starts_agreeing status warnings"


@pytest.fixture
def write(tmp_path):
    def to(table: pd.DataFrame | str, name: str = "runs.csv", **options) -> str:
        path = tmp_path / name
        if isinstance(table, str):
            path.write_text(table, encoding="utf-8")
        else:
            table.to_csv(path, index=False, **options)
        return str(path)

    return to


def runs(count: int = 60, sd: float = 0.004) -> pd.DataFrame:
    N, D = spread(count)(np.random.default_rng(0))
    noise = np.exp(sd * np.random.default_rng(1).standard_normal(count))
    return pd.DataFrame({"N": N, "D": D, "L": evaluate_law("surface", CHINCHILLA, N, D) * noise})


def families(sd: float = 0.001, spread_in_budget: float = 0.0) -> pd.DataFrame:
    rng, rows = np.random.default_rng(0), []
    for C in 10.0 ** np.arange(19, 21.6, 0.5):
        for N in Fit("surface", CHINCHILLA).optimal(C)["params"][0] * 1.6 ** np.arange(-2.0, 3):
            own = C * np.exp(spread_in_budget * rng.uniform(-1, 1))
            L = evaluate_law("surface", CHINCHILLA, N, own / 6 / N) * np.exp(sd * rng.standard_normal())
            rows.append({"N": N, "D": own / 6 / N, "C": own, "L": L})
    return pd.DataFrame(rows)


# Reading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_lines_are_counted_as_an_editor_does(write, separator):
    lines = ["N,D,L,note", "1,2,3,a", "", '4,5,6,"two', 'lines"', "7,8,9,b"]
    read = read_runs(write("\n".join(lines).replace(",", separator)), NAMES)
    assert read.frame["line"].tolist() == [2, 5, 6]
    assert read.frame["loss"].tolist() == [3, 6, 9] and read.frame["note"].tolist() == ["a", "two\nlines", "b"]


def test_bad_cells_are_named_and_may_be_dropped_by_name(write):
    path = write("N,D,L\n1,2,3\n-1,2,3\n1,,3\n1,2,inf\n1,2,three\n1,2\n")
    with pytest.raises(LabError) as error:
        read_runs(path, NAMES)
    for told in (
        "line 3: N='-1'",
        "line 4: D=''",
        "line 5: L='inf'",
        "line 6: L='three'",
        "line 7: L=None",
        "--drop bad",
    ):
        assert told in str(error.value)
    left = read_runs(path, NAMES, ["bad"])
    assert left.frame["line"].tolist() == [2] and left.dropped == {"bad": [3, 4, 5, 6, 7]}


def test_numbers_are_read_as_people_write_them(write):
    comma = '\ufeffModel size (N), D ,L\r\n"1,234,567",1 000 000,3.5\r\n1e6,2_000_000,"3"\r\n'
    read = read_runs(write(comma), {"params": "Model size (N)", "tokens": "D", "loss": "L"})
    assert read.frame["params"].tolist() == [1234567, 1e6] and read.frame["tokens"].tolist() == [1e6, 2e6]
    semicolon = read_runs(write("N;D;L;depth\n1,5;2.000.000;3,25;4,0\n1.5;2000;3.25;8\n"), NAMES, ["depth=8"])
    assert semicolon.frame[["params", "tokens", "loss"]].values.tolist() == [[1.5, 2e6, 3.25]]
    for cell in ("7B", "1,23,456", "3.1.4"):
        with pytest.raises(LabError, match="line 2"):
            read_runs(write(f'N,D,L\n"{cell}",2,3\n'), NAMES)


def test_a_comma_too_many_is_a_bad_row_not_shifted_cells(write):
    path = write("N,D,L,note\n1,000,2,3,a\n4,5,6,b,\n")
    with pytest.raises(LabError, match="line 2: 5 cells for 4 columns"):
        read_runs(path, NAMES)
    assert read_runs(path, NAMES, ["bad"]).frame["line"].tolist() == [3]


def test_a_line_of_units_is_left_out_and_told(write):
    read = read_runs(write("N,D,L\ncount,tokens,nats\n1,2,3\n"), NAMES)
    assert read.dropped == {"units": [2]} and read.frame["line"].tolist() == [3]
    assert any("rule units" in said and "1 row (line 2)" in said for said in read.sentences())
    with pytest.raises(LabError, match="line 2"):
        read_runs(write("N,D,L\nnan,nan,nan\n1,2,3\n"), NAMES)
    with pytest.raises(LabError, match="line 3: L='nats'"):
        read_runs(write("N,D,L\n1,2,3\n1,2,nats\n"), NAMES)


@pytest.mark.parametrize(
    ("rule", "lines"),
    [
        ("loss>4", [3, 5]),
        ("L > 4", [3, 5]),
        ("params<=1e6", [2, 3]),
        ("loss>=5 and params<1e7", [3]),
        ("status==failed", [5]),
        ("status != 'ok'", [5]),
        ("epochs>2", [4]),
        ("unique-tokens<60", [4]),
        ("depth=8", [4]),
    ],
)
def test_a_rule_drops_what_it_says_and_no_more(write, rule, lines):
    table = (
        "N,D,L,U,status,depth\n1e5,100,3,100,ok,4\n1e6,100,5,100,ok,4\n1e8,100,2,40,ok,8.0\n1e9,100,6,100,failed,4\n"
    )
    read = read_runs(write(table), {**NAMES, "unique_tokens": "U"}, [rule])
    assert read.dropped == {rule: lines}
    assert read.frame["line"].tolist() == [line for line in (2, 3, 4, 5) if line not in lines]
    assert f"dropped by the rule {rule}: {len(lines)} row" in " ".join(read.sentences())


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("loss", "compares"),
        ("lost>4", "'lost'"),
        ("loss>four", "number"),
        ("loss>0", "drop every row"),
        ("epochs>1", "'epochs'"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused(write, rule, said):
    with pytest.raises(LabError, match=said):
        read_runs(write("N,D,L\n1,2,3\n"), NAMES, [rule])


def test_files_that_are_no_tables_are_refused(write, tmp_path):
    with pytest.raises(LabError, match="readable CSV"):
        read_runs(tmp_path / "absent.csv", NAMES)
    with pytest.raises(LabError, match="no rows"):
        read_runs(write("N,D,L\n"), NAMES)
    with pytest.raises(LabError, match=r"no 'L' in .*the columns are N, D; say which one holds loss"):
        read_runs(write("N,D\n1,2\n"), NAMES)
    with pytest.raises(LabError, match="2 'L' in"):
        read_runs(write("N,D,L,L\n1,2,3,4\n"), NAMES)
    with pytest.raises(LabError, match="the file is empty"):
        read_runs(write(""), NAMES)


# Forms ----------------------------------------------------------------------------------------------------------------


def test_a_surface_is_the_fit_of_its_columns(write):
    table = runs()
    answer = fit_file(write(table), NAMES, bootstrap=100)
    own = fit_surface(table["N"], table["D"], table["L"], bootstrap=100)
    told = json.loads(json.dumps(answer.content, allow_nan=False))
    assert set(KEYS.split()) <= set(told)
    assert told["params"] == pytest.approx(own.params, rel=1e-9) and told["value"] == pytest.approx(own.value)
    assert told["intervals"]["alpha"] == pytest.approx(list(own.intervals["alpha"]))
    assert (told["n"], told["form"], told["objective"], told["starts"]) == (60, "surface", "huber", 4500)
    assert told["a"] == pytest.approx(own.a) and told["a_interval"] == pytest.approx(list(own.a_interval))
    assert told["status"] == dict.fromkeys(CHINCHILLA, "identified") and told["warnings"] == []
    assert "N_opt grows as C^a" in answer.text and "60 rows" in answer.text


@pytest.mark.parametrize("objective", ["huber", "lsq", "lad"])
def test_without_a_bootstrap_there_are_still_verdicts(write, objective):
    told = fit_file(write(runs()), NAMES, bootstrap=0, objective=objective).content
    assert told["objective"] == objective and told["interval_method"] == "profile"
    assert told["status"] == dict.fromkeys(CHINCHILLA, "identified")
    assert told["intervals"]["alpha"][0] < CHINCHILLA["alpha"] < told["intervals"]["alpha"][1]


def test_units_change_no_exponent_and_are_noticed(write):
    table = runs(80).assign(C=lambda t: 6 * t.N * t.D)
    whole = fit_file(write(table), {**NAMES, "flops": "C"}, bootstrap=0).content
    small = table.assign(N=table.N / 1e6, D=table.D / 1e9)
    units = fit_file(write(small, "units.csv"), {**NAMES, "flops": "C"}, bootstrap=0).content
    assert units["params"]["alpha"] == pytest.approx(whole["params"]["alpha"], rel=1e-4)
    assert units["a"] == pytest.approx(whole["a"], rel=1e-4)
    assert any("units of different size" in w for w in units["warnings"]) and not whole["warnings"]


def test_perplexities_are_noticed(write):
    told = fit_file(write(runs().assign(L=lambda t: np.exp(1.5 * t.L))), NAMES, bootstrap=0).content
    assert any("perplexity" in w for w in told["warnings"])


def test_what_was_dropped_stands_in_the_answer(write):
    answer = fit_file(write(runs()), NAMES, drop=["loss>3"], bootstrap=0)
    dropped = answer.content["rows"]["dropped"]["loss>3"]
    assert answer.content["n"] == 60 - len(dropped) and len(dropped) > 3
    assert answer.content["warnings"][0].startswith(f"dropped by the rule loss>3: {len(dropped)} rows (lines ")
    assert answer.content["warnings"][0] in answer.text


def test_the_labs_own_counts_are_compared(write):
    table = runs().rename(columns={"N": "params_total", "D": "tokens_seen", "L": "val_loss"})
    table["params_non_embedding"] = table.params_total - 3e7
    answer = fit_file(write(table), {}, bootstrap=50)
    assert [row["params"] for row in answer.content["doctor"]["accounting"]] == ["total", "non-embedding"]
    assert "Counting parameters" in answer.text


@pytest.mark.parametrize("role", ["params", "tokens", "flops"])
def test_a_power_law_is_in_the_one_column_given(write, role):
    x = np.geomspace(1e6, 1e9, 12)
    path = write(pd.DataFrame({"x": x, "L": 1.7 + 40 * x**-0.3}))
    told = fit_file(path, {role: "x", "loss": "L"}, form="power", bootstrap=50).content
    assert told["params"] == pytest.approx({"E": 1.7, "A": 40, "alpha": 0.3}, rel=1e-5)
    assert told["a"] is None and told["a_interval"] == [None, None] and set(told["status"].values()) == {"identified"}


def test_a_power_law_of_rows_that_vary_in_both_is_the_frontiers(write):
    table = families(0.0)
    answer = fit_file(write(table), NAMES, form="power", bootstrap=50)
    best = table.loc[table.groupby("C")["L"].idxmin()]
    assert "frontier" in answer.content["warnings"][0]
    assert set(best["L"].round(6)) <= set(answer.fit.data["observed"].round(6))
    few = write(table[table.C < 2e19], "few.csv")
    assert "without a floor" in " ".join(
        fit_file(few, {"params": "N", "loss": "L"}, form="power").content["warnings"]
    ) or ("E" in fit_file(few, {"params": "N", "loss": "L"}, form="power").content["params"])


def test_isoflop_families_give_the_laws_of_the_best_size(write):
    a = CHINCHILLA["beta"] / (CHINCHILLA["alpha"] + CHINCHILLA["beta"])
    for table, columns in ((families(), NAMES), (families(), {"params": "N", "loss": "L", "flops": "C"})):
        answer = fit_file(write(table), columns, form="isoflop", bootstrap=200)
        told = json.loads(json.dumps(answer.content, allow_nan=False))
        assert set(KEYS.split()) <= set(told)
        assert told["a"] == told["params"]["a"] == pytest.approx(a, abs=0.03)
        assert told["a"] + told["params"]["b"] == pytest.approx(1, abs=1e-3)
        assert told["a_interval"][0] < told["a"] < told["a_interval"][1] and told["status"]["a"] == "identified"
        assert len(told["budgets"]) == 6 and told["surface"]["params"]["alpha"] == pytest.approx(0.3478, rel=0.2)
        assert "FLOPs: N =" in answer.text
    shaken = fit_file(write(families(spread_in_budget=0.06)), {**NAMES, "flops": "C"}, form="isoflop").content
    assert shaken["a"] == pytest.approx(a, abs=0.03) and len(shaken["budgets"]) == 6


def test_one_budget_gives_its_best_size_and_no_exponent(write):
    table = families()[lambda t: t.C.min() == t.C]
    told = fit_file(write(table), {**NAMES, "flops": "C"}, form="isoflop").content
    assert told["a"] is None and set(told["status"].values()) == {"not identified"}
    assert told["budgets"][0]["inside"] and any("no exponent can be told" in w for w in told["warnings"])


def test_budgets_are_found_by_their_gaps():
    C = np.array([1e19, 1.05e19, 3e19, 3.1e19, 1e20])
    budgets, real = budgets_of(C)
    assert real and len(np.unique(budgets)) == 3
    assert budgets[0] == pytest.approx(np.sqrt(1e19 * 1.05e19))
    budgets, real = budgets_of(np.geomspace(1e19, 1e20, 100))
    assert not real and 7 <= len(np.unique(budgets)) <= 9


def test_repeated_text_is_fitted_where_it_is_told(write):
    rng = np.random.default_rng(3)
    law = CHINCHILLA | {"R_D": 10.0, "R_N": 5.0}
    U = 10 ** rng.choice([8.0, 9.0, 10.0, 11.0], 80)
    D = U * np.where(rng.random(80) < 0.3, 1.0, np.exp(rng.uniform(0, 4, 80)))
    N = np.exp(rng.uniform(np.log(1e7), np.log(1e10), 80))
    path = write(pd.DataFrame({"N": N, "D": D, "U": U, "L": evaluate_law("data-constrained", law, N, D, U)}))
    told = fit_file(path, {**NAMES, "unique_tokens": "U"}, bootstrap=50, objective="lsq").content
    assert told["form"] == "data-constrained" and told["params"] == pytest.approx(law, rel=1e-4)
    assert told["status"]["R_D"] == "identified"
    plain = fit_file(path, {**NAMES, "unique_tokens": "U"}, form="surface", bootstrap=0).content
    assert any("repeat their text" in w for w in plain["warnings"])


def test_rows_of_several_numerics_revisions_are_not_mixed_without_a_word(write):
    table = runs(20).assign(numerics_revision=[1] * 8 + [2] * 12)
    mixed = fit_file(write(table), NAMES, bootstrap=0)
    (said,) = [w for w in mixed.content["warnings"] if "numerics revisions (1, 2)" in w]
    assert said in mixed.text
    alone = fit_file(write(table), NAMES, bootstrap=0, drop=["numerics_revision!=2"])  # as the warning says
    assert alone.content["n"] == 12 and not [w for w in alone.content["warnings"] if "several" in w]


def test_a_form_that_is_not_there_is_refused(write):
    with pytest.raises(LabError, match="surface, power, isoflop"):
        fit_file(write(runs()), NAMES, form="cubic")
