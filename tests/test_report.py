"""Reports: the same pieces give the same bytes, a table keeps its columns, and every number is also in a file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tinylm.errors import LabError
from tinylm.study.report import HEADINGS, Report, interval, write_table

FRAME = pd.DataFrame(
    {
        "variant": ["plain", "a|b", "|"],
        "params_total": [12345, 678, 1_000_000],
        "loss": [3.14159, np.nan, 2.0],
        "inside": [True, False, True],
        "note": ["x", None, "y"],
    }
)


def pieces(report: Report) -> Report:
    """One of everything."""
    report.section("First")
    report.text("  Some *words*.\n")
    report.table(FRAME, "numbers", "What is in it", variant="", params_total=",d", loss=".3f", inside="")
    report.figure("one", "A line", lambda ax: ax.plot([1, 2], [3, 4], label="a $\\alpha$"))
    report.figure("two", "Two panels", lambda axes: [ax.scatter([1], [1]) for ax in axes], size=(6, 3), panels=2)
    report.summary("- In short")
    report.write()
    return report


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def cells(row: str) -> list[str]:
    """The cells of a row as Markdown parts them: at bars that no backslash stands before."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip())[1:-1]]


def table_of(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [cells(line) for line in lines]


# ---------------------------------------------------------------------------------------------------------------- bytes


def test_the_same_pieces_give_the_same_bytes(tmp_path):
    first, second = (files_of(pieces(Report(tmp_path / name, "Title")).folder) for name in ("a", "b"))
    assert set(first) == {
        "README.md", "tables/numbers.csv",
        *(f"figures/{name}.{kind}" for name in ("one", "two") for kind in ("svg", "png")),
    }  # fmt: skip
    assert first == second
    assert not list(tmp_path.rglob("*.part"))


def test_another_process_gives_the_same_bytes(tmp_path):
    """Nothing of the moment is in a figure: no date, no random name, no hash that differs from run to run."""
    here = files_of(pieces(Report(tmp_path / "a", "Title")).folder)
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    code += "from pathlib import Path\nfrom test_report import Report, pieces\n"
    code += f"pieces(Report(Path({str(tmp_path / 'b')!r}), 'Title'))"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    assert files_of(tmp_path / "b") == here


def test_a_report_written_again_replaces_the_first(tmp_path):
    report = pieces(Report(tmp_path, "Title"))
    before = files_of(tmp_path)
    report.text("One more.")
    report.write()
    changed = {name for name, content in files_of(tmp_path).items() if content != before[name]}
    assert changed == {"README.md"}


def test_nothing_of_this_machine_is_in_a_report(tmp_path):
    pieces(Report(tmp_path, "Title"))
    for name, content in files_of(tmp_path).items():
        assert str(tmp_path).encode() not in content, name


# --------------------------------------------------------------------------------------------------------------- README


def test_the_readme_is_the_pieces_in_order_with_the_summary_first(tmp_path):
    readme = (pieces(Report(tmp_path, "Title")).folder / "README.md").read_text(encoding="utf-8")
    places = [readme.index(part) for part in (
        "# Title", "- In short", "## First", "Some *words*.", "| variant", "*What is in it*", "![A line]", "![Two panels]",
    )]  # fmt: skip
    assert places == sorted(places) and places[0] == 0
    assert readme.endswith("\n") and "\n\n\n" not in readme
    links = re.findall(r"\]\(([^)]+)\)", readme)
    assert links and all((tmp_path / link).is_file() for link in links)
    for kind in ("figures/one.png", "figures/one.svg", "tables/numbers.csv"):
        assert kind in links


# --------------------------------------------------------------------------------------------------------------- tables


def test_a_table_has_a_cell_for_each_column_whatever_stands_in_it(tmp_path):
    report = pieces(Report(tmp_path, "Title"))
    head, sides, *rows = table_of(next(piece for piece in report.pieces if piece.startswith("|")))
    assert len(head) == len(sides) == 4 and len(rows) == 3
    assert all(len(row) == 4 for row in rows)
    assert [row[0].replace("\\|", "|") for row in rows] == ["plain", "a|b", "|"]
    assert [row[1] for row in rows] == ["12,345", "678", "1,000,000"]
    assert [row[2] for row in rows] == ["3.142", "–", "2.000"]  # no number is a dash
    assert [row[3] for row in rows] == ["yes", "no", "yes"]
    assert head == ["variant", HEADINGS["params_total"], HEADINGS["loss"], HEADINGS["inside"]]
    assert sides == [":---", "---:", "---:", ":---"]  # words left, numbers right


@pytest.mark.parametrize("nothing", [None, float("nan"), np.float64("nan"), np.nan])
def test_nothing_is_a_dash_under_any_format(tmp_path, nothing):
    report = Report(tmp_path, "Title")
    frame = pd.DataFrame({"value": pd.Series([nothing, "a"], dtype=object), "other": ["x", "y"]})
    report.table(frame.iloc[:1], "nothing", "", value=".3f", other="")
    assert table_of(report.pieces[-1])[2] == ["–", "x"]


def test_a_table_shows_what_is_asked_for_and_keeps_all_in_its_file(tmp_path):
    report = Report(tmp_path, "Title")
    report.table(FRAME, "numbers", "All of it", loss=".1f", variant="")
    assert [row[:2] for row in table_of(report.pieces[-1])][2:] == [["3.1", "plain"], ["–", "a\\|b"], ["2.0", "\\|"]]
    kept = pd.read_csv(tmp_path / "tables" / "numbers.csv")
    assert list(kept.columns) == list(FRAME.columns)
    assert kept.params_total.tolist() == [12345, 678, 1_000_000] and kept.loss[0] == 3.14159
    report.table(FRAME, "whole", "Without formats")
    assert len(table_of(report.pieces[-1])[0]) == len(FRAME.columns)


def awkward() -> pd.DataFrame:
    """150 rows whose floats are whole for long, with gaps, signs that are no ASCII, quotes and what starts a formula."""
    rows = np.arange(150)
    return pd.DataFrame(
        {
            "whole": rows,
            "late": np.where(rows < 120, 0.0, rows / 7),
            "gaps": np.where(rows % 2, np.nan, 1e12),
            "flag": rows % 3 == 0,
            "name": ["–", 'a "b", c', "two\nlines", "", "é"] * 30,
        }
    )


def test_tables_open_in_other_tools_as_they_were(tmp_path):
    frame = awkward()
    path = write_table(tmp_path / "awkward.csv", frame)
    assert path.read_bytes().startswith(b"\xef\xbb\xbfwhole,late")  # how Excel tells UTF-8
    again = pd.read_csv(path, keep_default_na=False, na_values={"gaps": [""]})
    pd.testing.assert_frame_equal(again, frame, check_exact=False, rtol=1e-9)
    ascii = write_table(tmp_path / "ascii.csv", frame.drop(columns="name")).read_bytes()
    assert ascii.startswith(b"whole,late") and b"\n0,0.0,1e+12,True\n" in ascii
    inf = write_table(tmp_path / "inf.csv", pd.DataFrame({"x": [1.0, np.inf, -np.inf, np.nan], "y": "a"}))
    assert pd.read_csv(inf).x.tolist()[:3] == [1.0, np.inf, -np.inf]


def test_tables_open_in_polars(tmp_path):
    polars = pytest.importorskip("polars")
    path = write_table(tmp_path / "awkward.csv", awkward())
    found = polars.read_csv(path)
    assert found.columns == list(awkward().columns) and found.height == 150
    kinds = [found.schema[name] for name in ("whole", "late", "gaps", "flag")]
    assert kinds == [polars.Int64, polars.Float64, polars.Float64, polars.Boolean]
    assert found["late"].to_list() == pytest.approx(awkward().late.tolist(), rel=1e-9)
    assert found["name"][0] == "–" and found["name"][2] == "two\nlines"
    for table in sorted((Path(__file__).resolve().parents[1] / "results").glob("*/tables/*.csv")):
        assert polars.read_csv(table).shape == pd.read_csv(table).shape


def test_a_table_keeps_ten_digits_in_its_file(tmp_path):
    value = 1.23456789123456
    Report(tmp_path, "Title").table(pd.DataFrame({"x": [value]}), "digits", "", x=".2f")
    assert pd.read_csv(tmp_path / "tables" / "digits.csv").x[0] == pytest.approx(value, rel=1e-9)


def test_whole_numbers_stay_whole_beside_others(tmp_path):
    report = Report(tmp_path, "Title")
    report.table(pd.DataFrame({"seeds": [3, 8], "loss": [2.5, 2.25]}), "mixed", "", seeds="d", loss=".2f")
    assert table_of(report.pieces[-1])[2:] == [["3", "2.50"], ["8", "2.25"]]


# -------------------------------------------------------------------------------------------------------------- figures


def test_a_figure_is_a_picture_and_a_drawing_of_its_size(tmp_path):
    report = Report(tmp_path, "Title")
    report.figure("one", "A line", lambda ax: ax.plot([1, 2], [3, 4]), size=(5, 3))
    png, svg = (tmp_path / "figures" / f"one.{kind}" for kind in ("png", "svg"))
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (5 * 150, 3 * 150)
    assert b"<svg" in svg.read_bytes()
    assert report.pieces[-1].startswith("![A line](figures/one.png)")


def test_a_figure_leaves_no_state_behind(tmp_path):
    import matplotlib
    import matplotlib.pyplot as plt

    before = dict(matplotlib.rcParams)
    Report(tmp_path, "Title").figure("one", "A line", lambda ax: ax.plot([1, 2], [3, 4]))
    assert dict(matplotlib.rcParams) == before and plt.get_fignums() == []


def test_a_full_disk_is_told_in_words(tmp_path, monkeypatch):
    import errno

    from tinylm import files

    report = pieces(Report(tmp_path, "Title"))
    before = files_of(tmp_path)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    report.text("More.")
    with pytest.raises(LabError, match=r"disk must have room.*README\.md.*free some space"):
        report.write()
    assert files_of(tmp_path) == before


def test_an_interval_is_told_in_words():
    assert interval(1.23456, 2.5) == "1.235 to 2.500"
    assert interval(10, 2000, ",.0f") == "10 to 2,000"
