"""The figures of the README are those of the measurement that lies beside the demo pair."""

import json
import pathlib

from ctc_spec_jax import demo
from infer.generate import Result, table

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_readme_shows_the_measurement():
    measured = json.loads((demo.target_folder().parent / "measured.json").read_text())
    results = [Result(text=[], finish=[], **size) for size in measured["sizes"]]
    assert table(results) in README.read_text()
    assert all(result.identical for result in results)
