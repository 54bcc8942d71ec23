"""The figures of the README are those of the measurement that lies beside the demo pair."""

import json
import pathlib
import re

from ctc_spec_jax import demo
from infer import compile, precision, profile, report
from infer.generate import Result, table
from train import compile as train_compile

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_readme_shows_the_measurement():
    measured = json.loads((demo.target_folder().parent / "measured.json").read_text())
    results = [Result(text=[], finish=[], **size) for size in measured["sizes"]]
    assert table(results) in README.read_text()
    assert all(result.identical for result in results)


def test_readme_shows_the_cost_of_rounds():
    path = README.parent / "benchmarks" / "round_cost.json"
    measured = json.loads(path.read_text())
    costs = [profile.Cost(**cost) for cost in measured["results"]]
    assert profile.table(costs, measured["bookkeeping"]) in README.read_text()
    assert all(cost.every_option <= 1.105 for cost in costs if cost.nodes >= 8)
    assert max(cost.every_option for cost in costs) <= 1.205
    assert measured["bookkeeping"]["share"] <= 0.15


def test_readme_shows_what_narrower_numbers_do():
    path = README.parent / "benchmarks" / "precision.json"
    found = [precision.Found(**one) for one in json.loads(path.read_text())["results"]]
    assert precision.table(found) in README.read_text()
    moved = {one.numbers: one.divergence for one in found}
    assert moved["float32, matrices in int8"] < 1.5 * moved["bfloat16"]


def test_readme_shows_the_methods():
    """Greedy answers of every method are those of plain decoding."""
    document = json.loads((README.parent / "benchmarks" / "methods.json").read_text())
    assert report.text(document) in README.read_text()
    assert {row["identical"] for row in document["results"] if not row["temperature"]} == {True}


def test_readme_shows_the_picture_of_the_methods():
    """Drawn of the results that lie beside it: ``infer.report benchmarks/methods.json --plot``."""
    document = json.loads((README.parent / "benchmarks" / "methods.json").read_text())
    path = README.parent / "benchmarks" / "methods.png"
    assert report.digest(document).encode() in path.read_bytes()
    assert "](benchmarks/methods.png)" in README.read_text()


def test_configs_say_what_the_compiler_found():
    """Each names a slice and the memory that a compiled step of these shapes needs there."""
    results = json.loads((README.parent / "benchmarks" / "tpu_compile.json").read_text())["results"]
    found = {
        (
            result["settings"]["topology"],
            f"{result['programs']['step']['memory']['total'] / 2**30:.2f}",
        )
        for result in results
        if "mesh" not in result["settings"]
    }
    lines = [
        re.search(r"Expected memory.*: ([\d.]+) GiB .* on (\S+);", path.read_text())
        for path in sorted((README.parent / "configs").glob("*.yaml"))
    ]
    said = {(line[2], line[1]) for line in lines if line}
    assert len(said) >= 4 and said <= found


def test_readme_shows_the_batch_sizes():
    """Of the padded target: greedy answers are those of plain decoding; the picture is of these."""
    document = json.loads((README.parent / "benchmarks" / "batch.json").read_text())
    assert report.text(document) in README.read_text()
    assert {row["identical"] for row in document["results"]} == {True}
    first = next(r for r in document["results"] if (r["method"], r["batch"]) == ("ctc", 1))
    assert f"{first['speedup']:.2f} times as fast" in README.read_text().replace("\n", " ")
    path = README.parent / "benchmarks" / "batch.png"
    assert report.digest(document).encode() in path.read_bytes()
    assert "](benchmarks/batch.png)" in README.read_text()


def test_docs_show_the_compiled_decodes():
    results = json.loads((README.parent / "benchmarks" / "tpu_compile.json").read_text())["results"]
    text = (README.parent / "docs" / "tpu.md").read_text()
    assert compile.overview(results) in text and train_compile.overview(results) in text
    turns = [
        program["loop"]
        for result in results
        for name, program in result["programs"].items()
        if name.startswith(("plain", "16"))
    ]
    assert turns and all(turn["copies"] == 0 for turn in turns)


def test_docs_show_the_decodes_compiled_for_gpus():
    """Every loop fits into one CUDA graph, and no cache is copied in it."""
    results = json.loads((README.parent / "benchmarks" / "gpu_compile.json").read_text())["results"]
    assert compile.gpu_overview(results) in (README.parent / "docs" / "gpu.md").read_text()
    for result in results:
        graphs = result["settings"]["xla"] == "graphs"
        turns = [found for name, found in result["programs"].items() if name != "prefill"]
        assert len(turns) == 3 and all(turn["loop"]["copies"] == 0 for turn in turns)
        assert all(turn["kernels"]["one_graph"] == graphs for turn in turns)
