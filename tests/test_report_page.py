"""The report in a real browser without a network, and the picture of the README."""

import html
import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from ctc_spec_jax import recipes
from ctc_spec_jax.errors import InputError
from infer import report
from tests.test_benchmark import document_of, row_of

ROOT = pathlib.Path(__file__).parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)

ERRORS = "<script>var errors=[];onerror=m=>errors.push(m)</script>"
PROBE = """<script>
onload = () => {
  const box = e => e.getBoundingClientRect();
  const shape = e => { const r = box(e); return [r.left, r.top, r.right, r.bottom]; };
  const canvas = document.createElement("div");
  canvas.style.background = "Canvas";
  document.body.append(canvas);
  const found = {
    errors, width: innerWidth, wanted: document.documentElement.scrollWidth,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    paper: getComputedStyle(canvas).backgroundColor,
    ink: getComputedStyle(document.querySelector("td")).color,
    letters: parseFloat(getComputedStyle(document.querySelector("td")).fontSize),
    loads: performance.getEntriesByType("resource").map(e => e.name),
    tables: [...document.querySelectorAll("table")].map(e => [...shape(e), e.rows.length]),
    pictures: [...document.querySelectorAll("svg")].map(e => ({
      box: shape(e), name: e.getAttribute("aria-label"),
      texts: [...e.querySelectorAll("text")].map(t => [t.textContent, ...shape(t)]),
    })),
  };
  parent.document.body.textContent = JSON.stringify(found);
};
</script>"""


def full_document(count: int = 20) -> dict:
    """All methods, two temperatures, three batch sizes, seven categories and every part."""
    methods = ["plain", *recipes.RECIPES][:count]
    categories = ("writing", "math", "coding", "translation", "summarization", "qa", "rag")
    rows = []
    for index, method in enumerate(methods):
        for batch in (1, 4, 16):
            speedup = 0.5 + 0.1 * index / batch**0.3
            part = row_of(method, batch, speedup)["categories"]["math"]
            drafts = {
                "categories": {name: part for name in categories},
                "accepted_by_position": [0.8 - 0.02 * index, 0.5, 0.1 + 0.02 * index],
                "work": {
                    "verify": {"bytes": 2e7 * (1 + index), "operations": 1e8 * batch},
                    "plain_step": {"bytes": 2e7, "operations": 1e7 * batch},
                },
                "accepted_length_low": 2.25,
                "accepted_length_high": 2.5 + 0.1 * index,
            }
            rows += [row_of(method, batch, speedup, temperature=t, **drafts) for t in (0.0, 1.0)]
    rates = {"bandwidth": 1e10, "operations": 1e11}
    reason = "needs the folder of a drafter (--drafters), and none was given"
    left_out = [{"method": "x", "reason": reason, "temperature": None, "batch": None}]
    return document_of(*rows, rates=rates, left_out=left_out, peers=[row_of("other", 1, 0.8)])


def seen(text: str, folder: pathlib.Path, width: int, dark: bool) -> dict:
    """What a browser makes of a page when no name can be looked up and no host be reached."""
    text = text.replace("<head>", f"<head>{ERRORS}").replace("</body>", f"{PROBE}</body>")
    page = folder / "probed.html"  # a window has a least width, a frame has none
    look = f"border: 0; height: 1000px; width: {width}px"
    frame = f'<iframe style="{look}" srcdoc="{html.escape(text, quote=True)}"></iframe>'
    page.write_text(f'<!doctype html><meta charset="utf-8"><body>{frame}</body>')
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--disable-extensions"]
    done = subprocess.run(
        [*command, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    body = re.search(r"<body>(.*)</body>", done.stdout, re.DOTALL)
    assert body, done.stderr
    return json.loads(html.unescape(body[1]))


def luminance(colour: str) -> float:
    """Of an opaque ``rgb(...)``, as contrast is defined for pages (WCAG 2)."""
    parts = [int(x) / 255 for x in re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", colour).groups()]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def problems(found: dict, width: int, dark: bool) -> list[str]:
    """Sentences on what a reader of the page would complain about."""
    light = sorted(luminance(found[name]) + 0.05 for name in ("paper", "ink"))
    said = {
        "errors of scripts": found["errors"],
        "loads something": found["loads"],
        "another width than asked for": found["width"] != width,
        "wider than the window": found["wanted"] > found["width"],
        "another scheme of colours": found["dark"] != dark,
        "paper of the wrong scheme": (luminance(found["paper"]) < 0.2) != dark,
        "little contrast": light[1] / light[0] < 7,
        "small letters": found["letters"] < 13,
        "no tables": len(found["tables"]) < 8,
        "an empty table": any(rows < 2 or r <= l or b <= t for l, t, r, b, rows in found["tables"]),
        "no pictures": not found["pictures"],
    }
    for picture in found["pictures"]:
        left, top, right, bottom = picture["box"]
        said[f"{picture['name']}: no size"] = right - left < 300 or bottom - top < 150
        said[f"{picture['name']}: no names"] = len(picture["texts"]) < 4
        texts = [one for one in picture["texts"] if one[0].strip()]
        for text, l, t, r, b in texts:
            inside = left - 1 <= l and top - 1 <= t and r <= right + 1 and b <= bottom + 1
            said[f"{picture['name']}: {text!r} is cut"] = not inside
            said[f"{picture['name']}: {text!r} is tiny"] = min(b - t, r - l) < 4 or b - t < 9
        for index, one in enumerate(texts):
            for two in texts[:index]:
                across = min(one[3], two[3]) - max(one[1], two[1])
                down = min(one[4], two[4]) - max(one[2], two[2])
                name = f"{picture['name']}: {two[0]!r} and {one[0]!r} overlap"
                said[name] = across > 1 and down > 3
    return [name for name, wrong in said.items() if wrong]


@pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed")
@pytest.mark.parametrize(("width", "dark", "count"), [(1280, False, 20), (390, True, 3)])
def test_a_browser_shows_the_page(width, dark, count, tmp_path):
    """Wide, light and full; narrow, dark and small: nothing is loaded, cut, overlapping or tiny."""
    place = tmp_path / "report.html"
    report.write(full_document(count), str(place), str(ROOT / "benchmarks" / "round_cost.json"))
    found = seen(place.read_text(), tmp_path, width, dark)
    assert problems(found, width, dark) == []
    assert [picture["name"] for picture in found["pictures"]] == [
        "Speedup by batch, temperature 0",
        "Speedup by batch, temperature 1",
        "Accepted length by position",
        "Speedup by category",
        "Cost of a round by tree size",
        "Roofline",
    ]


FAULTS = {
    "loads something": '<img src="http://example.org/x.png">',
    "errors of scripts": "<script>missing()</script>",
    "wider than the window": '<div style="width: 500px">x</div>',
    "an empty table": "<table></table>",
    "None: no size": '<svg style="min-width: 0; width: 0"></svg>',
    "p: 'one' and 'two' overlap": '<svg aria-label="p" viewBox="0 0 400 200">'
    '<text x="9" y="50">one</text><text x="12" y="50">two</text>',
    "p: 'three' is cut": '<text x="390" y="50">three</text>',
    "p: 'four' is tiny": '<text x="50" y="150" font-size="3">four</text></svg>',
}


@pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed")
def test_faults_of_a_page_are_seen(tmp_path):
    place = tmp_path / "report.html"
    report.write(full_document(3), str(place))
    text = place.read_text().replace("<body>", f"<body>{''.join(FAULTS.values())}", 1)
    told = problems(seen(text, tmp_path, 390, False), 390, False)
    assert set(FAULTS) <= set(told)


def headings(found) -> list[str]:
    return [block.heading for block in found]


def test_what_is_absent_is_named():
    """One line for every part that the results lack, and the flag that adds it."""
    costs = report.read_costs(str(ROOT / "benchmarks" / "round_cost.json"))
    full = headings(report.blocks(full_document(3), costs))
    assert "Not in this report" not in full
    row = row_of("m", 4, 1.5, time_split=None)
    blocks = report.blocks(document_of(row), None)
    assert blocks[-1].heading == "Not in this report"
    named = dict(blocks[-1].table[1:])
    assert set(named) <= {*full, "Speedup by batch"}
    assert set(named).isdisjoint(headings(blocks))
    flags = [re.search(r"--[\w-]+", flag)[0] for flag in named.values()]
    assert flags == ["--batch", "--batch", "--no-split", "--no-split", "--round-cost", "--peers"]


def plotted(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    report.main()


def test_the_picture_of_the_readme(monkeypatch, tmp_path, capsys):
    """Opaque, so that it can be read on any page; made of these results and no others."""
    image = pytest.importorskip("PIL.Image")
    out, results = tmp_path / "x.png", tmp_path / "x.json"
    document = full_document(6)
    document["results"] = [row for row in document["results"] if row["batch"] == 1]
    results.write_text(json.dumps(document))
    plotted(monkeypatch, results, "--plot", out)
    with image.open(out) as picture:
        assert picture.info["Description"] == report.digest(document)
        pixels = picture.convert("RGBA")
    assert pixels.width == 1200 and pixels.height > 300
    assert pixels.getextrema()[3] == (255, 255) and pixels.getpixel((0, 0)) == (255,) * 4
    colours = {colour for _, colour in pixels.getcolors(1 << 24)}
    assert {(27, 158, 119, 255), (217, 95, 2, 255), (0, 0, 0, 255)} <= colours
    document["results"][0]["accepted_length"] = 9.0
    assert picture.info["Description"] != report.digest(document)
    for row in document["results"]:  # results of a time before there were intervals
        del row["accepted_length_low"], row["accepted_length_high"]
    report.draw(document, str(out))
    with pytest.raises(InputError, match="results: expected at least one cell, found none"):
        report.draw(document_of(), str(out))
    for bad, sentence in (
        (("--plot", tmp_path / "x.svg"), "--plot: expected a file that ends in .png"),
        ((), "--report: expected it or --plot, found neither"),
    ):
        with pytest.raises(SystemExit):
            plotted(monkeypatch, results, *bad)
        assert sentence in capsys.readouterr().err


def test_the_picture_of_batch_sizes(tmp_path):
    """A panel per temperature, drawn of the speedups alone."""
    image = pytest.importorskip("PIL.Image")

    def pixels(document: dict):
        report.draw(document, str(tmp_path / "x.png"))
        with image.open(tmp_path / "x.png") as picture:
            assert picture.info["Description"] == report.digest(document)
            return picture.convert("RGB")

    document = full_document(6)
    for row in document["results"]:
        del row["accepted_length"], row["accepted_length_low"], row["accepted_length_high"]
    both = pixels(document)
    document["results"] = [row for row in document["results"] if not row["temperature"]]
    greedy = pixels(document)
    assert both.width == greedy.width == 1200 and both.height > 1.5 * greedy.height
    colours = {colour for _, colour in greedy.getcolors(1 << 24)}
    assert {(27, 158, 119), (217, 95, 2), (0, 0, 0), (255, 255, 255)} <= colours
    document["results"][-1]["speedup"] += 0.05
    assert pixels(document).tobytes() != greedy.tobytes()
