"""The bench: it refuses a busy machine, compares within rounds, and draws its report from what it kept."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from click.testing import CliRunner

from tinylm import counts
from tinylm.cli import main
from tinylm.config import ModelConfig
from tinylm.errors import ConfigError, DamagedFileError, LabError
from tinylm.study import bench

TINY = dataclasses.replace(bench.PRESETS["smoke"], rounds=2, seconds=0.0)
silent = [].append


def turn(case: str, contender: str, number: int, rate: float, **more) -> dict:
    return {"case": case, "contender": contender, "round": number, "amount": 2 * rate, "seconds": 2.0, **more}


# ------------------------------------------------------------------------------------------------ what it makes of turns


def test_ratios_are_taken_within_rounds():
    """A machine that slows to a third in one round moves rates, and no ratio."""
    speeds = (1.0, 0.3, 1.0, 1.1, 0.9)
    turns = [
        turn("A", name, i, rate * speed) for i, speed in enumerate(speeds) for name, rate in (("x", 30), ("base", 10))
    ]
    table = bench.summarise(turns, "base").set_index("contender")
    assert list(table.index) == ["x", "base"]
    assert table.loc["x", ["ratio_low", "ratio", "ratio_high"]].tolist() == pytest.approx([3, 3, 3])
    assert table.loc["x", ["rate_low", "rate", "rate_high"]].tolist() == pytest.approx([27, 30, 30])
    assert table.loc["x", "rounds"] == 5


def test_ratio_to_a_contender_that_took_no_part_is_not_known():
    assert np.isnan(bench.summarise([turn("A", "x", 0, 5.0)], "base")["ratio"].iloc[0])


def test_share_of_the_peak_counts_exact_flops_against_the_best_product():
    turns = [turn("A", "tinylm", i, 1000.0) for i in range(2)]
    turns += [turn("A", "square float32", i, 1.0, best=best) for i, best in enumerate((8e9, 4e9))]
    turns += [turn("A", "square bfloat16", i, 1.0, best=1e9) for i in range(2)]
    facts = bench._shape_facts(["A"])
    data = {"shapes": facts, "turns": turns, "about": [{"case": "A", "contender": "tinylm", "path": "eager"}]}
    (row,) = bench.training_table(data).to_dict("records")
    flops = 1000 * counts.train_flops_per_token(ModelConfig(512, 64, 2, 4, max_seq_len=128), 128)
    assert row["flops"] == pytest.approx(flops)
    assert (row["share_fp32"], row["share_bf16"]) == pytest.approx((flops / 8e9, flops / 1e9))
    assert row["share"] == row["share_fp32"]  # emulated bf16 products are no limit


def test_parity_is_judged_against_the_spread_of_seeds():
    plain, near, far = [3.00, 3.02, 3.04], [3.001, 3.019, 3.04], [3.03, 3.05, 3.07]
    rows = [
        {"case": "Z", "way": way, "seed": seed, "val_loss": loss}
        for way, losses in (("plain", plain), ("fast", near), ("sweep", far))
        for seed, loss in enumerate(losses)
    ]
    fast, sweep = bench.parity_table(rows).to_dict("records")
    assert fast["seed_sd"] == pytest.approx(0.02)
    assert (fast["way"], fast["within"], sweep["way"], sweep["within"]) == ("fast", True, "sweep", False)
    assert fast["difference"] == pytest.approx(0.0, abs=1e-9) and fast["largest"] == pytest.approx(0.001)
    assert sweep["difference"] == pytest.approx(0.03) and sweep["error"] == pytest.approx(0, abs=1e-9)


def test_exponent_is_one_where_cost_grows_as_flops():
    flops = np.array([1e6, 1e7, 3e8])
    assert bench.exponent(flops, flops / 1e9) == pytest.approx(1.0)
    assert bench.exponent(flops, 0.01 + flops / 1e9) < 0.7  # where a fixed cost weighs


@pytest.mark.parametrize(
    "names, group",
    [
        (["aten::copy_", "aten::to", "data"], "data"),
        (["aten::mm"], "matrix products"),
        (["aten::addmm", "aten::linear"], "matrix products"),
        (["mkldnn::_linear_pointwise"], "matrix products"),
        (["aten::bmm", "aten::matmul"], "attention"),
        (["aten::_scaled_dot_product_flash_attention_for_cpu_backward"], "attention"),
        (["graph_0_cpp_fused__softmax_mul_2"], "attention"),
        (["graph_1_cpp_fused__log_softmax_nll_loss_forward_view_1"], "loss function"),
        (["graph_0_cpp_fused_add_mean_mul_pow_rsqrt_0"], "norm, elementwise, embedding"),
        (["aten::embedding_dense_backward"], "norm, elementwise, embedding"),
        (["graph_2_cpp_fused_lerp_mul_sqrt_0", "optimizer"], "optimizer"),
        (["TorchDynamo Cache Lookup"], bench.REST),
        (["aten::as_strided", "aten::transpose"], bench.REST),
    ],
)
def test_operations_find_their_group(names, group):
    assert bench.group_of(names) == group


def test_every_goal_is_measured_by_the_full_preset():
    full = bench.PRESETS["full"]
    cases = {
        "training": full.shapes,
        "generation": [bench._case(*case) for case in full.generation],
        "sweep": [case.name for case in full.sweeps],
    }
    for what, section, case, contender, _, must, aim in bench.GOALS:
        assert case in cases[section], what
        assert contender in (*full.contenders, "sweep engine") and 0 < must < aim
    assert full.rounds >= 5 and full.sweep_rounds >= 5
    assert [case.count for case in full.sweeps] == [16, 16, 8]


# ----------------------------------------------------------------------------------------------------- a busy machine


@pytest.fixture
def idle(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))


def test_a_sweep_at_work_is_noticed(idle, tmp_path):
    lock = tmp_path / "mine" / ".checkpoints" / "0123.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    found = lambda: [words for words in bench.busy(tmp_path, 0.01) if "sweep" in words]  # noqa: E731
    assert not found()  # a lock that nobody holds was left behind
    with lock.open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert len(found()) == 1 and str(tmp_path / "mine") in found()[0]
    assert not found()


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="needs /proc")
def test_a_busy_process_is_named_and_counted(idle, tmp_path):
    watch = bench._Watch()
    with subprocess.Popen([sys.executable, "-c", "while True: pass", str(tmp_path / "name")]) as process:
        try:
            time.sleep(0.3)
            mine = [words for words in bench.busy(tmp_path, 0.7) if f"process {process.pid} " in words]
            others = watch.share()["others"]
        finally:
            process.kill()
    assert len(mine) == 1 and "of a core" in mine[0]
    assert str(tmp_path) not in mine[0]  # reports are published: no folders
    assert others > 0.05  # not ours until it has ended and we have waited for it


def test_load_average_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "getloadavg", lambda: (9.5, 0.0, 0.0))
    assert any("9.50" in words for words in bench.busy(tmp_path, 0.01))


def test_refuses_a_busy_machine_unless_forced(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "busy", lambda: ["a sweep is at work in results/local/mine"])
    monkeypatch.setitem(bench.MEASURES, "machine", lambda preset, scratch, say: {"rows": MACHINE})
    with pytest.raises(LabError, match=r"results/local/mine.*--force"):
        bench.run(("machine",), TINY, tmp_path, say=silent)
    assert not list(tmp_path.iterdir())
    page = bench.run(("machine",), TINY, tmp_path, force=True, say=silent)
    assert "Not to be relied on" in page.read_text() and "results/local/mine" in page.read_text()


def test_losses_are_compared_on_a_busy_machine_too(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "busy", lambda: ["a sweep is at work in results/local/mine"])
    monkeypatch.setitem(bench.MEASURES, "parity", lambda preset, scratch, say: FAKES["parity"]())
    assert "Not to be relied on" not in bench.run(("parity",), TINY, tmp_path, say=silent).read_text()


MACHINE = [
    {"threads": 1, "what": f"{dtype} product", "size": 64, "value": value, "unit": "GFLOP/s"}
    for dtype, value in (("float32", 80.0), ("bfloat16", 20.0))
]


# ------------------------------------------------------------------------------------------------------- wrong requests


@pytest.mark.parametrize("asked", [{"only": ("speed",)}, {"preset": "quick"}, {"rounds": 0}])
def test_unknown_names_are_refused(asked, tmp_path):
    with pytest.raises(ConfigError):
        bench.run(**asked, results_dir=tmp_path)


def test_transformers_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(bench, "busy", list)
    with pytest.raises(LabError, match=r"pip install -e '.\[test\]'"):
        bench.run(("generation",), TINY, tmp_path, say=silent)
    with pytest.raises(LabError, match="something measured"):  # what needs no transformers goes on without it
        bench.run(("report",), TINY, tmp_path, say=silent)


def test_command_line(tmp_path):
    done = CliRunner().invoke(main, ["bench", "--only", "nonsense", "--results-dir", str(tmp_path)])
    assert done.exit_code == 2 and "nonsense" in done.output and "generation" in done.output
    text = CliRunner().invoke(main, ["bench", "--help"]).output
    assert all(name in text for name in (*bench.MEASURES, *bench.PRESETS, "--force"))


# ---------------------------------------------------------------------------------------------------------- contenders


def test_token_maps_are_of_the_size_asked_for(tmp_path):
    path = bench._token_map(tmp_path / "a", 1_500_000, 300)
    tokens = np.fromfile(path, np.uint16)
    assert len(tokens) == 1_500_000 and tokens.max() == 299
    first, second = (np.mean(tokens == i) for i in (0, 1))
    assert first == pytest.approx(2 * second, rel=0.02)  # Zipf


def test_contenders_take_turns_and_rotate(tmp_path):
    jobs = {
        "square float32": {"kind": "square", "threads": 1, "dtype": "float32", "squares": (64,)},
        "plain": bench._job("train", tmp_path, 1, bench.SHAPES["tiny"], 0.1, path=bench.PLAIN),
    }
    told = []
    found = bench.interleave("tiny", jobs, 2, 0.0, told.append)
    order = [(row["round"], row["contender"]) for row in found["turns"]]
    assert order == [(0, "square float32"), (0, "plain"), (1, "plain"), (1, "square float32")]
    for row in found["turns"]:
        amount = 2 * 64**3 if "square" in row["contender"] else bench.SHAPES["tiny"].tokens
        assert row["amount"] == amount * row["units"] and row["units"] >= 1 and row["seconds"] > 0
        assert row["peak_mb"] > 50
    assert found["about"][1]["path"] and found["about"][1]["setup_seconds"] > 0
    assert told[0].startswith("tiny")


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
def test_memory_is_the_most_held_since_the_peak_was_forgotten():
    bench._forget_peak()
    before = bench._memory()
    held = bytearray(200_000_000)
    during = bench._memory()
    assert during["own_mb"] - before["own_mb"] == pytest.approx(200, abs=20)
    del held
    assert bench._memory()["peak_mb"] - before["peak_mb"] == pytest.approx(200, abs=20)
    bench._forget_peak()
    assert bench._memory()["peak_mb"] - before["peak_mb"] < 50


def test_a_contender_that_fails_says_why():
    job = {"kind": "square", "threads": 1, "dtype": "float5", "squares": (8,)}
    with pytest.raises(LabError, match=r"the odd one.*float5"), bench._Contender("the odd one", job):
        pass


def test_its_process_ends_with_the_block():
    job = {"kind": "square", "threads": 1, "dtype": "float32", "squares": (8,)}
    with contextlib.suppress(RuntimeError), bench._Contender("a square", job) as contender:
        raise RuntimeError
    assert contender.process.poll() is not None


# ------------------------------------------------------------------------------------------------------------- report


def test_report_is_redrawn_from_what_was_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "busy", list)
    for name, make in FAKES.items():
        monkeypatch.setitem(bench.MEASURES, name, lambda preset, scratch, say, make=make: make())
    page = bench.run(tuple(bench.MEASURES), TINY, tmp_path, say=silent)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    figures = {path.stem for path in tmp_path.glob("figures/*.svg")}
    assert figures == {"throughput", "step", "cost"} == {path.stem for path in tmp_path.glob("figures/*.png")}
    monkeypatch.setattr(bench, "busy", lambda: ["busy"])  # drawing needs no idle machine
    for name in bench.MEASURES:
        monkeypatch.setitem(bench.MEASURES, name, None)
    assert bench.run(("report",), TINY, tmp_path, say=silent) == page
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    text = page.read_text()
    for heading in ("The machine", "Training", "Where a step's time goes", "Generation", "Sweeps", "Cost against size"):
        assert f"## {heading}\n" in text
    assert (
        "Of 2 figures" in text and "1 reach what they must and 0 also" in text
    )  # of A: 2.0 in training, 4.0 in generation
    assert "grows as FLOPs to the power 1.00" in text
    assert "from 300 to 310 MB" in text
    assert "In 2 of 2 comparisons" in text


def test_a_damaged_section_is_refused(monkeypatch, tmp_path):
    (tmp_path / "machine.json").write_text('{"schema": 1, "section": "mach')
    with pytest.raises(DamagedFileError, match="--only machine"):
        bench.run(("report",), TINY, tmp_path, say=silent)


def _compared(case: str, base: float, own: float) -> dict:
    rates = {"tinylm": own, "transformers": base}
    turns = [turn(case, name, i, rate) for i in range(2) for name, rate in rates.items()]
    return {"turns": turns, "about": [{"case": case, "contender": name, "path": "eager"} for name in rates]}


def _training() -> dict:
    data = {"shapes": bench._shape_facts(["A"]), **_compared("A", 10.0, 20.0)}
    data["turns"] += [turn("A", f"square {dtype}", 0, 1.0, best=1e9) for dtype in ("float32", "bfloat16")]
    return data


def _sweep() -> dict:
    names = {"sweep engine": 4.0, "one after another": 1.0}
    turns = [turn("tiny", name, i, rate, losses=[3.0, 3.1]) for i in range(2) for name, rate in names.items()]
    case = {"case": "tiny", "runs": 2, **dataclasses.asdict(bench.Sweep("tiny", 4, 2, 1, 40))}
    return {"cases": [case], "turns": turns, "about": []}


def _growth() -> dict:
    facts = {"parameters": 7088, "tokens_a_step": 128, "setup_seconds": 1.0, "own_mb": 200.0, "mapped_mb": 100.0}
    rows = [
        {"series": series, "case": str(i), "corpus_mb": 10**i, "flops": 1e6 * 10**i, "step_seconds": 1e-3 * 10**i}
        | {"peak_mb": 300.0 + 10 * i, **facts}
        for series in ("tokens a step", "parameters", "corpus")
        for i in range(2)
    ]
    return {"rows": rows}


FAKES = {
    "machine": lambda: {"rows": MACHINE},
    "training": _training,
    "generation": lambda: _compared(bench._case("A", 1), 10.0, 40.0),
    "sweep": _sweep,
    "profile": lambda: {
        "rows": [
            {
                **{"case": "A", "path": "compiled", "step_seconds": 0.1, "profiled_seconds": 0.12},
                "groups": dict.fromkeys([*bench.GROUPS, bench.REST], 0.02),
            }
        ]
    },
    "growth": _growth,
    "parity": lambda: {
        "steps": 30,
        "rows": [
            {"case": "tiny", "way": way, "seed": seed, "val_loss": 3.0 + 0.1 * seed}
            for way in bench.PARITY
            for seed in range(2)
        ],
    },
}


@pytest.mark.slow
def test_smoke_measures_everything(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "busy", list)
    page = bench.run(tuple(bench.MEASURES), "smoke", tmp_path, say=silent)
    sections = bench.read_sections(tmp_path)
    assert set(sections) == set(bench.MEASURES)
    text = page.read_text()
    assert "transformers" in text and "sweep engine" in text and "nan" not in text
    parity = bench.parity_table(sections["parity"]["data"]["rows"])
    assert (parity["largest"] < 1e-2).all()
    peak = {row["corpus_mb"]: row["peak_mb"] for row in sections["growth"]["data"]["rows"] if row["series"] == "corpus"}
    assert peak[4] - peak[1] < 40
    groups = sections["profile"]["data"]["rows"][0]["groups"]
    assert all(groups[name] > 0 for name in ("data", "optimizer", "loss function", "attention", "matrix products"))
    assert json.loads((tmp_path / "machine.json").read_text())["preset"] == "smoke"
