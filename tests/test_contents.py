"""The first page of results/."""

from __future__ import annotations

import json
import re

import pandas as pd

from tinylm.study import contents


def study(results, name: str, text: str, a: float) -> None:
    folder = results / name
    (folder / "tables").mkdir(parents=True)
    (folder / "README.md").write_text(
        f"# How loss falls on {text}\n\n- A finding of {name}.\n\n## The text\n\nDetails.\n"
    )
    (folder / "corpora.json").write_text(json.dumps({"corpora": [{"name": text}]}))
    rows = [(law, parameter, a, a - 0.1, a + 0.1, "weak") for law, parameter in contents.LAWS.values()]
    columns = ["law", "parameter", "value", "low", "high", "status"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "tables" / "laws.csv", index=False)
    pd.DataFrame({"budget": [1e11, 1e12]}).to_csv(folder / "tables" / "isoflop_minima.csv", index=False)


def test_the_first_page_tells_each_study_and_what_changes_with_the_text(tmp_path):
    study(tmp_path, "compute_scaling", "verse", 0.4)
    for folder, said in (
        ("recipe", "81 runs, and why."),
        ("bench/machine", "Of 14 figures 6."),
        ("local/mine", "Mine."),
    ):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "README.md").write_text(f"# {folder}\n\n{said}\n\nMore.\n\n## Then\n")
    page = contents.write(tmp_path).read_text()
    assert "A finding of compute_scaling." in page and "81 runs, and why." in page and "Of 14 figures 6." in page
    assert "Details" not in page and "More" not in page and "Mine" not in page and "What changes" not in page
    study(tmp_path, "compute_scaling_stories", "stories", 0.6)
    page = contents.write(tmp_path).read_text()
    assert "What changes with the text" in page and "0.60 (0.50 to 0.70; weak)" in page and "1e+11 to 1e+12" in page
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert "#words" in links and "## Words" in page
    assert all((tmp_path / link).exists() for link in links if link != "#words")
    assert pd.read_csv(tmp_path / "texts.csv").text.tolist() == ["verse", "stories"]


def test_verdicts_and_the_map_come_first(tmp_path):
    study(tmp_path, "ablations_of_mine", "verse", 0.4)
    study(tmp_path, "hyperparameters", "verse", 0.4)
    (tmp_path / "hyperparameters" / "figures").mkdir()
    (tmp_path / "hyperparameters" / "figures" / "map.png").write_bytes(b"")
    study(tmp_path, "claims", "verse", 0.4)
    verdict = {"claim": 3, "sentence": "SwiGLU is better.", "verdict": "undecided", "supported": 1, "refuted": 0,
               "undecided": 3, "seeds": 5, "corpus": "verse", "effect": "relu: +0.010 nats", "sealed": "after",
               "of": 15}  # fmt: skip
    pd.DataFrame([verdict]).to_csv(tmp_path / "claims" / "tables" / "verdicts.csv", index=False)
    page = contents.write(tmp_path).read_text()
    assert "| 3 | SwiGLU is better. | **undecided** | relu: +0.010 nats | 1 of 4 | 5 | verse | after |" in page
    assert "written down beforehand" not in page  # some rules were not
    assert "1 of the design's 15 claims are judged so far" in page
    assert page.index("SwiGLU") < page.index("map.png") < page.index("A finding of ablations_of_mine")
    (tmp_path / "claims" / "tables" / "verdicts.csv").write_text("damaged\n1\n")
    assert "A finding of claims." in contents.write(tmp_path).read_text()
