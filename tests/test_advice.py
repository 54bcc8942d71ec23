"""Advice on tree sizes: by hand from made-up costs and curves, and end to end on a tiny pair."""

import dataclasses
import io
import json
import pathlib
import re
import sys
import types
from typing import Any

import jax
import numpy as np
import pytest

from ctc_spec_jax import xla
from ctc_spec_jax.decode import NoDraft
from ctc_spec_jax.engine import Engine, Generation
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models import convert
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.models.decoder import DecoderLM
from ctc_spec_jax.types import RUNNING
from infer import advice, chat, generate, profile, prompts, rounds
from infer.intervals import Interval
from infer.prompts import Prompt
from train import corpus

ROOT = pathlib.Path(__file__).parent.parent
VOCAB, POSITIONS = 300, 384
TEXT = (ROOT / "train" / "data.py").read_text()
METHOD = ("--method", "prompt_lookup")
CURVE = {
    2: [[2, 1, 2, 1], [1, 2]],
    4: [[3, 3], [1, 2]],
    8: [[4, 2], [1, 1, 2]],
}
"""Accepted lengths 9/6, 9/4 and 10/5."""


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> pathlib.Path:
    """One layer, byte-level BPE; weights large enough that greedy text varies."""
    folder = tmp_path_factory.mktemp("target")
    lm = DecoderLM(DecoderConfig(VOCAB, 32, 1, 4, 2, 8, 48, tied_embeddings=True))

    def enlarge(path, x):
        return x if x.ndim < 2 else x * (50.0 if "embedding" in str(path) else 16.0)

    params = jax.tree_util.tree_map_with_path(enlarge, lm.init(jax.random.key(1)))
    tokenizer = corpus.train_tokenizer([TEXT], VOCAB)
    ids = {"eos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": POSITIONS}
    convert.save_target(folder, lm, params, ids)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """No cache of programs, few sizes, short held-out prompts of two lengths."""
    for module in (chat, generate, profile):
        monkeypatch.setattr(module, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(advice, "SIZES", (2, 4))
    monkeypatch.setattr(advice, "NEW_TOKENS", 12)
    monkeypatch.setattr(rounds, "ROUNDS", 2)

    def heldout(tokenizer, count):
        return [list(range(40 + i, 50 + 2 * i)) for i in range(count)]

    monkeypatch.setattr(prompts, "heldout_prompts", heldout)


@pytest.fixture
def call(monkeypatch, capsys):
    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
        module.main()
        return capsys.readouterr()

    return run


def test_the_best_size_by_hand():
    """Accepted length over cost; its depth; an interval around it that is the value for one row."""
    found = advice.recommend({2: 1.0, 4: 1.2, 8: 1.1}, CURVE, 4)
    assert [size.accepted_length for size in found.sizes] == [9 / 6, 9 / 4, 2.0]
    gains = [size.speedup.value for size in found.sizes]
    np.testing.assert_allclose(gains, [1.5, 9 / 4 / 1.2, 2 / 1.1], rtol=1e-12)
    assert (found.batch, found.nodes, found.depth) == (4, 4, 2)
    assert found.speedup == found.sizes[1].speedup
    # Resamples of two prompts: the first twice (6/2), the second twice (3/2), or both.
    assert found.speedup.low == pytest.approx(3 / 2 / 1.2)
    assert found.speedup.high == pytest.approx(6 / 2 / 1.2)
    alone = advice.recommend({4: 1.5}, {4: [[3, 3]]})
    assert alone.speedup == Interval(2.0, 2.0, 2.0)
    assert advice.recommend({2: 1.0, 4: 1.2, 8: 1.0}, CURVE).nodes == 8


@pytest.mark.parametrize("costs", [(1.5, 2.25, 2.0), (9.0, 9.0, 2.0), (4.0, 5.0, 6.0)])
def test_no_size_above_one(costs):
    """Equal to plain decoding is not above it."""
    found = advice.recommend(dict(zip(CURVE, costs, strict=True)), CURVE)
    assert (found.nodes, found.depth, found.speedup) == (1, 0, Interval(1.0, 1.0, 1.0))
    assert len(found.sizes) == 3 and max(size.speedup.value for size in found.sizes) <= 1
    assert "do not speculate" in advice.sentence(found)
    assert "*" not in advice.table(found)


@pytest.mark.parametrize("scale", [0.1, 0.3, 0.7, 1 / 3])
def test_ties_go_to_the_smaller_tree(scale):
    """Also where rounding parts equal ratios."""
    curve = {16: [[3] * 7], 4: [[2] * 9], 8: [[1, 2, 3] * 5]}
    found = advice.recommend({16: 3 * scale, 4: 2 * scale, 8: 2 * scale}, curve)
    assert found.nodes == 4
    assert [size.nodes for size in found.sizes] == [4, 8, 16]


@pytest.mark.parametrize(
    ("kept", "depth"),
    [
        ([1, 1, 1], 1),
        ([2, 2], 1),
        ([5], 4),
        ([1, 3, 3], 2),
        ([2] * 49 + [1, 3], 1),  # depth 1 keeps 101 of 102 tokens
        ([2] * 48 + [1, 3], 1),  # 99 of 100: exactly enough
        ([2] * 47 + [1, 3], 2),  # 97 of 98: too few
    ],
)
def test_depth_by_hand(kept, depth):
    """The smallest that keeps 99 % of the tokens of the rounds."""
    assert advice.recommend({6: 0.5}, {6: [kept]}).depth == depth


def test_what_is_said():
    found = advice.recommend({2: 1.0, 4: 1.2, 8: 1.1}, CURVE, 4)
    assert advice.sentence(found) == (
        "batch 4: 4 nodes, depth 2; expected 1.88 times as fast as plain decoding "
        "(95 % 1.25 to 2.50), 2.25 tokens a round of 1.20 plain steps"
    )
    doubtful = advice.recommend({4: 2.0}, {4: CURVE[4]})
    assert "4 nodes, depth 2, not certain; expected 1.12 times" in advice.sentence(doubtful)
    lines = advice.table(found).splitlines()
    assert lines[2].split() == "4 4 2 2.25 1.20 1.88 1.25 - 2.50 *".split()
    assert [line.endswith("*") for line in lines] == [False, False, True, False]


def test_what_is_refused():
    for costs, curve, pattern in (
        ({2: 1.0}, {}, r"costs: expected those of sizes \[\], found \[2\]"),
        ({2: 1.0}, {4: [[1]]}, r"expected those of sizes \[4\], found \[2\]"),
        ({4: 0.0}, {4: [[1]]}, "expected positive numbers, found 0.0 for 4 nodes"),
        ({4: np.nan}, {4: [[1]]}, "expected positive numbers, found nan"),
        ({4: 1.0}, {4: [[], []]}, "curve: expected at least one round of 4 nodes, found none"),
    ):
        with pytest.raises(InputError, match=pattern):
            advice.recommend(costs, curve)


@dataclasses.dataclass(frozen=True)
class Made:
    """Decodes without a model: rounds keep the given tokens in turns, the last one is cut."""

    emitted: tuple[int, ...]
    loops: bool = False
    room: int = 1000

    drafter = types.SimpleNamespace(max_depth=4, num_nodes=8)

    @property
    def tokenizer(self):
        return types.SimpleNamespace(model_max_length=self.room)

    def encode(self, contents):
        return None, np.asarray([len(content) for content in contents])

    def generate(self, contents, seed, max_new_tokens, temperature):
        assert seed == [0, 1] and temperature == [0.5, 0.7]
        return [self._answer(max_new_tokens) for _ in contents]

    def _answer(self, budget: int) -> Generation:
        emitted, total = [], 0
        while total < budget:
            emitted.append(min(self.emitted[len(emitted) % len(self.emitted)], budget - total))
            total += emitted[-1]
        tokens = [7] * budget if self.loops else list(range(budget))
        return Generation("", tokens, "length", len(emitted), emitted, 1.0)


TWO = [Prompt([1, 2], {"temperature": 0.5}), Prompt([1], {"temperature": 0.7})]


def test_rounds_of_a_curve():
    """Those that begin before the budget, whole; before loops; as far as there are positions."""
    engines: Any = {8: Made((3, 5)), 16: Made((2,), loops=True), 32: Made((3,), room=2 + 11)}
    found = advice.acceptance_curve(engines, TWO, 10)
    assert found[8] == [[3, 5, 3]] * 2  # the third begins at token 8, the fourth at 11
    assert found[16] == [[2] * 4] * 2  # 7 tokens, one short of a group of 8
    assert found[32] == [[3, 3]] * 2  # 11 new tokens, of which 5 are kept free


def test_sizes_of_a_method(target):
    """A drafter is measured once; sizes that it does not know are left out unless asked for."""
    base = Engine.from_pretrained(str(target))

    def sized(nodes: int) -> Engine:
        if nodes < 3:
            raise InputError("expected 3")
        return base.with_method("prompt_lookup", min(nodes, 6), 8)

    found = advice.candidates(sized, (4, 3, 8, 6))
    assert {n: one.drafter.num_nodes for n, one in found.items()} == {3: 3, 4: 4, 6: 6}
    assert [*advice.candidates(sized)] == [4]
    with pytest.raises(InputError, match="expected 3"):
        advice.candidates(sized, (2, 4))
    with pytest.raises(InputError, match="--tree-nodes: expected --drafter or --method"):
        advice.candidates(lambda nodes: base.plain())


def test_no_row_ends_while_it_is_timed(target, monkeypatch):
    """All rounds that are divided by were run: 13 tokens have room for 2 rounds of up to 5."""
    jitted, calls = xla.jitted, []

    def noted(function, *donated):
        def run(*arguments):
            calls.append((arguments[-1], jitted(function, *donated)(*arguments)))
            return calls[-1][1]

        return run

    monkeypatch.setattr(rounds, "ROUNDS", 16)
    monkeypatch.setattr(xla, "jitted", noted)
    engine = Engine.from_pretrained(str(target)).with_method("prompt_lookup", 5, 4)
    fields = {"max_new_tokens": 13, "ignore_eos": True}
    assert rounds.round_timer(engine, 2, fields, [[5, 6] * 8, [7] * 16])() > 0
    (_, _), (first, state), (second, _) = calls
    assert first == second == 2
    assert state.stats.rounds.tolist() == [2, 2] and state.finish.tolist() == [RUNNING] * 2


def test_profile_advises(target, call, tmp_path):
    """A table and a sentence for each batch size, and the figures behind them in the file."""
    out = tmp_path / "advice.json"
    numbers = ("--batch", 2, "--repeats", 1, "--num-prompts", 2, "--max-new-tokens", 12)
    places = ("--target", target, *METHOD, "--json", out)
    printed = call(profile, *places, "--advise", *numbers, "--tree-nodes", 4).out
    document = json.loads(out.read_text())
    (one,) = document["advice"]
    assert document["device"] and one["batch"] == 2
    assert [size["nodes"] for size in one["sizes"]] == [4]
    for size in one["sizes"]:
        ratio = size["accepted_length"] / size["plain_steps"]
        assert size["speedup"]["value"] == pytest.approx(ratio)
        assert 1 <= size["accepted_length"] <= size["nodes"] and 1 <= size["depth"] < size["nodes"]
    best = max(size["speedup"]["value"] for size in one["sizes"])
    assert (one["nodes"] > 1) == (best > 1)
    lines = printed.splitlines()
    assert [line.split()[1] for line in lines[:2]] == ["nodes", "4"]
    assert lines[2] == one["sentence"]


def test_generate_takes_the_advice(target, call, tmp_path, monkeypatch):
    """Of the prompts that it decodes; plainly where drafting does not pay, with the same text."""
    asked, results, prices = [], {}, iter((0.01, 50.0))

    def costs(engines, given, batch, repeats):
        asked.append((len(given), batch))
        cost = next(prices)
        return {2: 2 * cost, 4: cost}

    monkeypatch.setattr(advice, "round_costs", costs)
    monkeypatch.setattr(generate, "show", lambda *_: None)
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out.json"
    rows = [{"prompt": "import os"}, {"prompt": "def f(x):"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    places = ("--target", target, *METHOD, "--prompts", file, "--json", out)
    numbers = ("--max-new-tokens", 12, "--repeats", 1, "--batch", 8)
    for nodes in (4, 1):
        printed = call(generate, *places, *numbers, "--tree-nodes", "auto")
        lines = [line for line in printed.err.splitlines() if line.startswith("--tree-nodes")]
        assert len(lines) == 1 and ("do not speculate" in lines[0]) == (nodes == 1)
        results[nodes] = json.loads(out.read_text())
        assert [size["tree_nodes"] for size in results[nodes]["sizes"]] == [nodes]
    assert asked == [(2, 2)] * 2
    assert results[4]["text"] == results[1]["text"]
    assert results[4]["rounds"] < results[1]["rounds"] == results[1]["tokens"]


@pytest.mark.parametrize("nodes", [4, 1])
def test_chat_takes_the_advice(target, call, monkeypatch, nodes):
    engines = []

    def choose(engine, arguments, given, batch):
        assert (len(given), batch, given[0].options["temperature"]) == (8, 1, 0.5)
        return nodes

    monkeypatch.setattr(advice, "choose_size", choose)
    monkeypatch.setattr(chat, "Conversation", lambda engine, **_: engines.append(engine))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    call(chat, "--target", target, *METHOD, "--tree-nodes", "auto", "--temperature", 0.5)
    assert [one.drafter.num_nodes for one in engines] == [nodes]
    assert isinstance(engines[0].drafter, NoDraft) == (nodes == 1)


WRONG = [
    (generate, ("--tree-nodes", "many"), "--tree-nodes: expected whole numbers or auto, .* 'many'"),
    (generate, ("--tree-nodes", "auto", 4), "--tree-nodes: expected whole .*, found 'auto'"),
    (generate, ("--tree-nodes", 4, "auto"), "--tree-nodes: expected whole .*, found 'auto'"),
    (generate, ("--tree-nodes", "auto"), "--tree-nodes: expected --drafter or --method beside"),
    (chat, ("--tree-nodes", "auto"), "--tree-nodes: expected --drafter or --method beside"),
    (generate, ("--tree-nodes", -3), "--tree-nodes: expected at least 2, found -3"),
    (chat, ("--tree-nodes", "1.5"), "--tree-nodes: expected whole numbers or auto, found '1.5'"),
    (profile, ("--advise",), "--tree-nodes: expected --drafter or --method beside it"),
    (profile, (), "--tree-nodes: expected --drafter or --method beside it, found neither"),
    (profile, ("--advise", "--tree-nodes", 1, 4), "--tree-nodes: expected at least 2, found 1"),
    (profile, ("--tree-nodes", 0, 4), "--tree-nodes: expected at least 1, found 0"),
    (profile, ("--advise", "--plot", "x.png"), "--plot: expected it or --advise, found both"),
    (profile, ("--advise", "--bookkeeping"), "--bookkeeping: expected it or --advise, found both"),
    (profile, ("--advise", "--batch", 4, 0), "--batch: expected at least 1, found 0"),
    (profile, ("--num-prompts", 0), "--num-prompts: expected at least 1, found 0"),
    (profile, ("--advise", "--method", "oracle"), "method: expected one of .*, found 'oracle'"),
    (profile, ("--advise", *METHOD, "--tree", "x"), "tree: expected '', .* found 'x'"),
]


@pytest.mark.parametrize(("program", "arguments", "pattern"), WRONG)
def test_bad_flags(target, call, capsys, program, arguments, pattern):
    """One sentence and status 2."""
    with pytest.raises(SystemExit) as stop:
        call(program, "--target", target, *arguments)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == ""
    (line,) = [line for line in printed.err.splitlines() if line]
    assert re.search(f"^error: {pattern}", line), line
