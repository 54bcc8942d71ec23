"""The benchmark: what is asked, in which order, the figures by hand, resume after a kill, the page.

Most tests decode with a made-up model, without a program; the others with a tiny pair.
"""

import collections
import dataclasses
import html.parser
import itertools
import json
import pathlib
import re
import signal
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctc_spec_jax import demo, folders, recipes
from ctc_spec_jax.draft.training import Shape
from ctc_spec_jax.engine import Engine, Generation
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models import convert
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.models.decoder import DecoderLM
from ctc_spec_jax.types import Acceptance
from ctc_spec_jax.verify import TargetSample
from infer import benchmark, cells, intervals, methods, peers, questions, report, split
from infer.questions import Question, Turn
from train import corpus

ROOT = pathlib.Path(__file__).parent.parent
VOCAB = 300
TEXT = (ROOT / "train" / "data.py").read_text()
FREE = ("prompt_lookup", "ngram_pool")
HELDOUT = "import numpy as np\n\n\ndef source_files("
"""Of more than 32 tokens, so that it shares its bucket of 64 with the turn after it."""
BUDGET = 16


def save_language_model(folder, seed: int, tokenizer) -> None:
    shape = dict(num_heads=4, num_kv_heads=2, head_width=8, mlp_width=48, tied_embeddings=True)
    lm = DecoderLM(DecoderConfig(vocab_size=VOCAB, width=32, num_layers=1, **shape))

    def enlarge(path, x):
        return x if x.ndim < 2 else x * (50.0 if "embedding" in str(path) else 16.0)

    params = jax.tree_util.tree_map_with_path(enlarge, lm.init(jax.random.key(seed)))
    ids = {"eos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": 384}
    convert.save_target(folder, lm, params, ids)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("target")
    save_language_model(folder, 1, corpus.train_tokenizer([TEXT], VOCAB))
    return folder


@pytest.fixture(scope="module")
def engine(target) -> Engine:
    return Engine.from_pretrained(str(target))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, engine) -> dict[str, str]:
    """Folder of an untrained drafter for every method that has one of its own."""
    place, found = tmp_path_factory.mktemp("drafters"), {}
    for name, recipe in recipes.RECIPES.items():
        if recipe.language_model or name in FREE:
            continue
        network = recipe.network(engine.lm.config, Shape(frames=4))
        drafter = recipe.drafter(network, 6, 3, "")
        shapes = jax.eval_shape(drafter.init_params, jax.random.key(0))
        if not shapes:
            continue
        draw = np.random.default_rng(0)
        params = {k: draw.normal(size=x.shape).astype(np.float32) for k, x in shapes.items()}
        folders.save_drafter(place / name, name, drafter, params, "tiny", engine.tokenizer, {})
        found[name] = str(place / name)
    return found


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    monkeypatch.setattr(benchmark, "use_compilation_cache", lambda: None)


@pytest.fixture
def call(monkeypatch, capsys):
    def run(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
        benchmark.main()
        return capsys.readouterr().out

    return run


class Made:
    """A decoder without a model: answers follow from the prompt, calls are noted.

    Every round keeps ``a_round`` tokens and takes a second.
    """

    def __init__(self, name: str, calls: list, a_round: int = 1, wrong: int | None = None):
        self.name, self.calls, self.a_round, self.wrong = name, calls, a_round, wrong

    def generate(self, prompts, max_new_tokens=8, **options):
        self.calls.append((self.name, [len(prompt) for prompt in prompts], options))
        seconds = max_new_tokens / self.a_round
        return [self._answer(prompt, max_new_tokens, seconds) for prompt in prompts]

    def _answer(self, prompt, budget: int, seconds: float) -> Generation:
        draw = np.random.default_rng([*prompt])
        tokens = draw.integers(1, VOCAB, budget).tolist()
        if self.wrong is not None:
            tokens[self.wrong] = 0
        rounds = budget // self.a_round
        accepted = [rounds] * (self.a_round - 1)
        emitted = [self.a_round] * rounds
        counts = {
            "accepted": accepted,
            "from_draft": ([True] * (self.a_round - 1) + [False]) * rounds,
        }
        return Generation("x", tokens, "length", rounds, emitted, seconds, **counts)


def turn(question_id: int, index: int = 0, length: int = 5, category: str = "a") -> Turn:
    return Turn(question_id, category, index, (*range(1, length), question_id + 1))


def test_questions_of_files(tmp_path):
    """Spec-Bench's names and the others; categories in turns; a bad line is named."""
    file = tmp_path / "question.jsonl"
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["one", "two"]},
        {"question_id": 82, "category": "writing", "turns": ["three"]},
        {"id": "gsm/0", "category": "math", "turns": ["four"], "reference": ["18"]},
        {"prompt": "five"},
    ]
    lines = [*map(json.dumps, rows), "", '{"turns": "six"}', '{"turns": []}', "[1]", "\\"]
    file.write_text("\n".join(lines))
    found, problems = questions.read_questions([str(file)], None)
    assert found == [
        Question(81, "writing", ("one", "two")),
        Question("gsm/0", "math", ("four",)),
        Question(4, "question", ("five",)),
        Question(82, "writing", ("three",)),
    ]
    assert [re.findall(r"line (\d+) of", p) for p in problems] == [["6"], ["7"], ["8"], ["9"]]
    assert questions.read_questions([str(file)], 2)[0] == found[:2]
    assert len(questions.read_questions([str(file)] * 2, 3)[0]) == 6
    with pytest.raises(InputError, match="--prompts: expected a readable file, found"):
        questions.read_questions([str(tmp_path / "none")], None)


def asked(engine, turns, **changes):
    """What ``ask`` makes of one question with a made-up model."""
    made = Made("plain", [])
    for name, value in {"tokenizer": engine.tokenizer, "plain": lambda: made, **changes}.items():
        setattr(made, name, value)
    made.encode = engine.encode
    return made, *questions.ask(made, [Question(1, "a", turns)], 8)


def test_turns_of_a_base_model_in_order(engine):
    made, [talk], problems = asked(engine, ("def one(", "def two("))
    first = engine.tokenizer("def one(")["input_ids"]
    answer = made._answer(first, 8, 1.0).tokens
    second = engine.tokenizer("\n\ndef two(", add_special_tokens=False)["input_ids"]
    assert [list(one.tokens) for one in talk] == [first, first + answer + second]
    assert [one.turn for one in talk] == [0, 1] and problems == []


def test_turns_of_a_chat(engine):
    """As ``Conversation`` sends them; a turn that does not fit ends the question."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

    def render(messages, **options):
        assert options == {"add_generation_prompt": True, "return_dict": False}
        text = "".join(f"{m['role']}: {m['content']}\n" for m in messages)
        return engine.tokenizer(text)["input_ids"]

    tokenizer = types.SimpleNamespace(chat_template=template, apply_chat_template=render)
    _, [talk], problems = asked(engine, ("one", "two", "y " * 400, "z"), tokenizer=tokenizer)
    texts = [engine.tokenizer.decode(one.tokens) for one in talk]
    assert texts == ["user: one\n", "user: one\nassistant: x\nuser: two\n"]
    assert len(problems) == 1 and problems[0].startswith("question 1: expected at most 376 tokens")


def test_batches_are_full():
    """Rows are repeated where there are too few, and the repeated ones do not count."""
    talks = [[turn(0), turn(0, 1)], [turn(1)], [turn(2), turn(2, 1)]]
    found = list(questions.batches(talks, 2))
    ids = [[[t.question_id for t in b.turns] for b in group] for group in found]
    assert ids == [[[0, 1], [0, 0]], [[2, 2], [2, 2]]]
    assert [[b.counted for b in group] for group in found] == [[2, 1], [1, 1]]


def test_decoders_take_turns():
    """Each first as often; the same prompts, caps and seeds; one warm-up of every shape."""
    calls = []
    pair = (Made("method", calls, 2), Made("plain", calls))
    talks = [[turn(0)], [turn(1), turn(1, 1, length=40)], [turn(2)], [turn(3)]]
    runs = cells.measure(pair, talks, 1, 2, {"max_new_tokens": 8, "temperature": 0.0}, seed=7)
    names = [name for name, _, _ in calls]
    warm = ["method", "plain"]
    first, second = ["plain", "method", "method", "plain"], ["method", "plain", "plain", "method"]
    assert names == [*warm, *first, *second, *warm, *second, *first, *second]
    for (_, ours, mine), (_, theirs, other) in zip(calls[::2], calls[1::2], strict=True):
        assert (ours, mine) == (theirs, other)
    assert {options["seed"][0] for _, _, options in calls} == {7, 8, 9, 10}
    assert [run.seconds for run in runs] == [[[4, 8]] * 2, [[8, 16]] * 2, *[[[4, 8]] * 2] * 2]
    assert [run.tokens for run in runs] == [(8, 8), (16, 16), (8, 8), (8, 8)]


def test_interval_against_all_resamples():
    """Three groups have 27 resamples, all as likely: the interval is that of their quantiles."""
    tokens = np.asarray([[10, 10], [20, 20], [30, 28]])
    seconds = np.asarray([[[1.0, 2.0]], [[2.5, 3.0]], [[2.0, 6.0]]])
    picks = np.asarray(list(itertools.product(range(3), repeat=3)))
    speeds = tokens[picks].sum(1) / seconds[picks, 0].sum(1)
    exact = np.sort(speeds[:, 0] / speeds[:, 1])
    found = intervals.speedup(tokens, seconds)
    # 2.5 % of 27 lies within the first resample, 97.5 % within the last.
    np.testing.assert_allclose((found.low, found.high), (exact[0], exact[-1]), rtol=1e-12)
    np.testing.assert_allclose(found.value, (60 / 5.5) / (58 / 11))


def test_interval_against_the_normal_law():
    """Many groups of equal answers: a ratio of means, whose standard error has a closed form."""
    draw = np.random.default_rng(3)
    seconds = draw.normal((1.0, 2.0), (0.2, 0.3), (400, 1, 2))
    found = intervals.speedup(np.ones((400, 2)), seconds, resamples=4000)
    x, y = seconds[:, 0, 0], seconds[:, 0, 1]
    value = y.mean() / x.mean()
    half = 1.96 * np.std(y - value * x, ddof=1) / x.mean() / 20
    np.testing.assert_allclose(found.value, value)
    np.testing.assert_allclose((found.low, found.high), (value - half, value + half), rtol=0.01)


def test_interval_of_repeats():
    """One group: the interval is that of its repeats, both decoders of a repeat together."""
    seconds = np.asarray([[[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]]])
    found = intervals.speedup(np.ones((1, 2)), seconds)
    np.testing.assert_allclose((found.low, found.value, found.high), 2.0)
    uneven = intervals.speedup(np.ones((1, 2)), [[[1.0, 1.0], [1.0, 2.0], [1.0, 4.0]]])
    assert (uneven.low, uneven.value, uneven.high) == (1.0, 2.0, 4.0)


def test_interval_of_a_ratio():
    """Three questions have 27 resamples, all as likely: the interval is that of their quantiles."""
    tokens, rounds = np.asarray([9, 20, 12]), np.asarray([4, 5, 6])
    picks = np.asarray(list(itertools.product(range(3), repeat=3)))
    exact = np.sort(tokens[picks].sum(1) / rounds[picks].sum(1))
    found = intervals.ratio(tokens, rounds)
    np.testing.assert_allclose((found.low, found.high), (exact[0], exact[-1]), rtol=1e-12)
    np.testing.assert_allclose(found.value, 41 / 15)


def test_first_differences():
    """Position of the first differing token, and the logit gap after the shared text."""
    seen = []

    def logits(tokens):
        seen.append(tokens)
        return np.arange(10, dtype=np.float32) / 4

    prompts = [[1], [2], [3]]
    ours, theirs = [[5, 6], [5, 6, 7], [5]], [[5, 6], [5, 8, 7], [5, 9]]
    assert intervals.find_differences(prompts, ours, theirs, logits) == [
        intervals.Difference(1, 1, 0.5),
        intervals.Difference(2, 1, None),
    ]
    assert seen == [[2, 5]]


def test_figures_of_a_cell():
    """Counted by hand; a planted wrong token is found with its place and gap."""
    scores = np.zeros(VOCAB, np.float32)
    scores[0] = -2.5
    texts = []

    def logits(tokens):
        texts.append(tokens)
        return scores

    talks = [[turn(0)], [turn(1, category="b"), turn(1, 1, category="b")], [turn(2)]]
    options = {"max_new_tokens": 8, "temperature": 0.0}
    runs = cells.measure((Made("m", [], 4), Made("plain", [])), talks, 1, 2, options)
    found = cells.cell("m", 0.0, 1, 8, runs, logits)
    assert (found.questions, found.turns, found.tokens, found.rounds) == (3, 4, 32, 8)
    assert (found.accepted_length, found.accepted_length_without_bonus) == (4.0, 3.0)
    assert (found.accepted_length_low, found.accepted_length_high) == (4.0, 4.0)
    assert found.accepted_length_with_loops == 4.0 and found.looping_share == 0.0
    assert found.accepted_by_position == [1.0, 1.0, 1.0]
    assert (found.tokens_per_second, found.baseline_tokens_per_second) == (4.0, 1.0)
    assert (found.speedup_low, found.speedup, found.speedup_high) == (4.0, 4.0, 4.0)
    assert found.identical is True and found.differences == [] and texts == []
    assert found.categories["b"]["turns"] == 2 and found.categories["a"]["speedup"] == 4.0
    assert cells.cell("m", 0.8, 1, 8, runs, logits).identical is None

    runs = cells.measure((Made("m", [], 4, wrong=5), Made("plain", [])), talks[1:], 2, 1, options)
    found = cells.cell("m", 0.0, 2, 8, runs, logits)
    assert found.identical is False and found.categories["a"]["speedup"] is None
    assert found.differences == [
        {"question_id": q, "turn": t, "position": 5, "logit_gap": 2.5}
        for q, t in ((1, 0), (2, 0), (1, 1))
    ]
    assert texts[0] == [*turn(1).tokens, *runs[0].baseline[0].tokens[:5]]


def test_interval_of_an_accepted_length_is_over_questions():
    """Two turns of one question are drawn together: 4 tokens a round, or 2, or their mean."""
    talks = [turn(0), turn(0, 1), turn(1, category="b")]
    made = [Made("m", [], size)._answer([i], 8, 1.0) for i, size in enumerate((4, 4, 2))]
    found = cells._accepted_interval(talks, made)
    assert found == {"accepted_length_low": 2.0, "accepted_length_high": 4.0}
    same = cells._accepted_interval([turn(0), turn(0, 1), turn(0, 2)], made)
    assert set(same.values()) == {24 / 8}


@dataclasses.dataclass(frozen=True)
class WrongToken(TargetSample):
    """The rule of plain decoding, but for another token in the place of one."""

    token: int = 0

    def __call__(self, keys, tree, depth, mask, laws, max_depth):
        kept = super().__call__(keys, tree, depth, mask, laws, max_depth)
        wrong = kept.next_token + (kept.next_token == self.token).astype(jnp.int32)
        return Acceptance(kept.path, kept.length, wrong)


def test_a_wrong_token_of_a_verifier_is_found(engine):
    """Its place is the first token that the rule touches, and the target prefers its own there."""
    prompt = tuple(engine.tokenizer(HELDOUT)["input_ids"])
    talks = [[Turn(1, "a", 0, prompt)]]
    plain = engine.plain().generate([prompt], max_new_tokens=BUDGET)[0].tokens
    position = next(i for i, token in enumerate(plain) if token != plain[0])
    faulty = dataclasses.replace(engine.plain(), verifier=WrongToken(plain[position]))
    options = {"max_new_tokens": BUDGET, "temperature": 0.0}
    runs = cells.measure((faulty, engine.plain()), talks, 1, 1, options)
    found = cells.cell("faulty", 0.0, 1, 1, runs, cells.target_logits(engine))
    assert runs[0].baseline[0].tokens == plain
    assert found.identical is False
    [difference] = found.differences
    assert (difference["turn"], difference["position"]) == (0, position)
    assert difference["logit_gap"] > 0


def test_methods_that_can_run(engine, target, trained):
    """All of them with their folders; a language model's folder serves all that draft with one."""
    chosen, left_out = methods.choose(engine, "all", [*trained.values(), str(target)])
    assert [method.name for method in chosen] == [methods.PLAIN, *recipes.RECIPES]
    assert left_out == []
    by_name = {method.name: method.folder for method in chosen}
    assert {by_name[name] for name in recipes.of_language_models()} == {str(target)}
    for method in chosen:
        drafter = method.engine(engine, 6, jnp.float32).drafter
        assert 2 <= drafter.num_nodes <= 6 or method.name == methods.PLAIN, method
    chosen, left_out = methods.choose(engine, "all", [])
    assert {method.name for method in chosen} >= {methods.PLAIN, *FREE}
    assert {method.name for method in chosen} | {one.method for one in left_out} == {
        methods.PLAIN,
        *recipes.RECIPES,
    }
    assert {one.method for one in left_out} >= {*trained, *recipes.of_language_models()}
    assert all("needs the folder of a drafter" in one.reason for one in left_out)


def test_ways_to_build_trees(engine, target):
    """Behind the name of a method, and part of the name of its cells."""
    [_, best, drawn], _ = methods.choose(engine, "small_lm,small_lm:sampled", [str(target)])
    assert (best.name, drawn.name) == ("small_lm", "small_lm:sampled")
    drafters = [one.engine(engine, 4, jnp.float32).drafter for one in (best, drawn)]
    assert [drafter.states_law for drafter in drafters] == [False, True]


def test_methods_that_cannot(engine, target, trained, tmp_path):
    with pytest.raises(InputError, match="method: expected one of ctc, .* found 'oracle'"):
        methods.choose(engine, "prompt_lookup,oracle", [])
    with pytest.raises(InputError, match="--methods: ctc needs the folder of a drafter"):
        methods.choose(engine, "prompt_lookup,ctc", [])
    with pytest.raises(InputError, match="--drafters: expected one folder of each method, found"):
        methods.by_method([trained["ctc"], trained["ctc"]])
    with pytest.raises(InputError, match="--drafters: expected a folder whose config.json"):
        methods.by_method([str(tmp_path)])


def test_drafters_beside_the_demo(monkeypatch, tmp_path):
    """Every folder of ``demo/drafters``, and ``demo/drafter`` if its method is not among them."""
    for name in ("drafter", "drafters/medusa", "drafters/other"):
        (tmp_path / name).mkdir(parents=True)
        kind = name.rpartition("/")[2] if name.endswith("medusa") else "ctc"
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": kind}))
    (tmp_path / "drafters" / "empty").mkdir()
    monkeypatch.setattr(demo, "drafter_folder", lambda: tmp_path / "drafter")
    others = [str(tmp_path / "drafters" / name) for name in ("medusa", "other")]
    assert methods.demo_folders() == others
    (tmp_path / "drafters" / "other" / "config.json").unlink()
    assert methods.demo_folders() == [str(tmp_path / "drafter"), others[0]]
    monkeypatch.undo()
    assert "ctc" in methods.by_method(methods.demo_folders())


FIELDS = {
    *("method", "temperature", "batch", "accepted_length", "accepted_length_without_bonus"),
    *("tokens_per_second", "speedup", "speedup_low", "speedup_high", "identical"),
    *("rounds", "drafter_cost", "tree_nodes"),
}


def test_end_to_end(target, trained, call, tmp_path, capsys):
    """A real run of a method and two turns: the file, the table, the page."""
    prompts, out, page = (tmp_path / name for name in ("p.jsonl", "out.json", "out.html"))
    row = {"question_id": 9, "category": "code", "turns": [HELDOUT, "x"]}
    prompts.write_text(json.dumps(row) + "\n")
    places = ("--target", target, "--drafters", trained["ctc"], "--prompts", prompts)
    numbers = ("--max-new-tokens", BUDGET, "--repeats", 1, "--tree-nodes", 6, "--no-split")
    names = ("--methods", "ctc", "--json", out, "--report", page)
    printed = call(*places, *numbers, *names)
    document = json.loads(out.read_text())
    assert {"device", "versions", "commit", "settings", "results"} <= set(document)
    assert [row["method"] for row in document["results"]] == ["plain", "ctc"]
    for row in document["results"]:
        assert FIELDS <= set(row) and row["identical"] is True
        assert (row["questions"], row["turns"], row["tokens"]) == (1, 2, 2 * BUDGET)
        assert row["speedup_low"] <= row["speedup_high"]
        assert row["accepted_length_with_loops"] == row["tokens"] / row["rounds"]
        ratio = row["tokens_per_second"] / row["baseline_tokens_per_second"]
        np.testing.assert_allclose(row["speedup"], ratio)
    plain, _ = document["results"]
    assert (plain["rounds"], plain["tree_nodes"]) == (2 * BUDGET, 1)
    assert re.search(r"^ctc +0 +1 +6 .* yes", printed, re.MULTILINE)
    assert page.exists() and page.with_suffix(".md").exists()
    assert not list(tmp_path.glob("*.part"))


CHILD = """
import os, signal, sys
from infer import benchmark
from tests import test_benchmark

benchmark.Engine.generate = test_benchmark.made_up
benchmark.use_compilation_cache = lambda: None
replace, writes = os.replace, iter(range(1, 5))

def dies(old, new):
    if str(new).endswith("out.json") and next(writes) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(old, new)

os.replace = dies
sys.argv = ["benchmark", *sys.argv[1:]]
benchmark.main()
"""


def made_up(engine, prompts, max_new_tokens, temperature=0.0, seed=0):
    """In the place of ``Engine.generate``."""
    name = type(engine.drafter).__name__
    CALLS.append((name, temperature, len(prompts)))
    made = Made(name, [], 1 if engine.drafter.num_nodes == 1 else 2)
    answers = made.generate(prompts, max_new_tokens)
    seconds = answers[0].seconds * (1 + 0.1 * np.random.default_rng().random())
    return [dataclasses.replace(answer, seconds=seconds) for answer in answers]


CALLS: list = []


def test_resume_after_a_kill(target, call, tmp_path, monkeypatch):
    """Killed within its fourth write, the third cell is whole; what is there is not done again."""
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out.json"
    prompts.write_text('{"prompt": "import os"}\n{"prompt": "def main("}\n')
    arguments = [
        *("--target", target, "--prompts", prompts, "--json", out, "--max-new-tokens", 8),
        *("--methods", ",".join(FREE), "--temperature", 0, 0.8, "--no-split", "--resume"),
    ]
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = json.loads(out.read_text())
    kept = [benchmark.place(row) for row in before["results"]]
    assert kept == [("plain", 0.0, 1), ("prompt_lookup", 0.0, 1), ("ngram_pool", 0.0, 1)]

    monkeypatch.setattr(Engine, "generate", made_up)
    CALLS.clear()
    call(*arguments)
    after = json.loads(out.read_text())
    assert after["results"][:3] == before["results"]
    assert [benchmark.place(row) for row in after["results"][3:]] == [
        (method, 0.8, 1) for method in ("plain", *FREE)
    ]
    assert {temperature for _, temperature, _ in CALLS} == {0.8}
    assert [row["identical"] for row in after["results"]] == [True] * 3 + [None] * 3

    CALLS.clear()
    printed = call(*arguments, "--batch", 1, 2)
    assert {rows for _, _, rows in CALLS} == {2}
    assert printed.count("law") == 6 and printed.count("yes") == 6
    assert json.loads(out.read_text())["results"][:6] == after["results"]


def test_resume_refuses_another_setting(target, call, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Engine, "generate", made_up)
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out.json"
    prompts.write_text('{"prompt": "import os"}\n')
    arguments = ["--target", target, "--prompts", prompts, "--json", out, "--no-split", "--resume"]
    arguments += ["--methods", "prompt_lookup", "--repeats", 1]
    call(*arguments, "--max-new-tokens", 8)
    for changed, expected in (
        (("--max-new-tokens", 9), "max_new_tokens 8, found 9"),
        (("--max-new-tokens", 8, "--tree-nodes", 4), "tree_nodes 8, found 4"),
    ):
        with pytest.raises(SystemExit) as stop:
            call(*arguments, *changed)
        assert stop.value.code == 2
        assert f"--resume: expected {expected}" in capsys.readouterr().err
    prompts.write_text('{"prompt": "import sys"}\n')
    with pytest.raises(SystemExit):
        call(*arguments, "--max-new-tokens", 8)
    assert "--resume: expected prompts_sha256" in capsys.readouterr().err


def row_of(method: str, batch: int, speedup: float, **changes) -> dict:
    """A row of results with round figures."""
    interval = {"speedup_low": speedup - 0.1, "speedup_high": speedup + 0.1}
    lengths = {"accepted_length": 2.5, "accepted_length_without_bonus": 1.5}
    part = {"turns": 1, "tokens": 5, "rounds": 2, "tokens_per_second": 9.0, "speedup": speedup}
    values = {
        field.name: None for field in dataclasses.fields(cells.Cell) if field.name not in changes
    }
    return values | {
        **{"method": method, "temperature": 0.0, "batch": batch, "tree_nodes": 8},
        **{"accepted_by_position": [0.75, 0.5] if batch else [], "differences": []},
        **{"tokens_per_second": 100.0, "speedup": speedup, "identical": True},
        "categories": {"math": part | interval | lengths, "code": part | interval | lengths},
        "time_split": dict.fromkeys(report._PARTS, 0.001),
        "accepted_length_with_loops": 3.25,
        "drafter_cost": 0.5,
        **interval,
        **lengths,
        **changes,
    }


def document_of(*rows, **changes) -> dict:
    settings = {"target": "demo", "dtype": "float32", "questions": 2, "turns": 3, "repeats": 3}
    settings |= {"prompts": ["question.jsonl"], "max_new_tokens": 128}
    fixed = {"device": "a <device>", "versions": {"jax": "0.0"}, "commit": "abc", "date": "today"}
    return {
        **fixed,
        "settings": settings,
        "results": list(rows),
        "peers": [],
        "left_out": [],
    } | changes


def test_where_speculation_stops_paying():
    rows = [row_of("a", 16, 0.9), row_of("a", 1, 2.0), row_of("a", 4, 1.05), row_of("b", 1, 0.5)]
    assert report.pays(rows) == [
        ["a", "0", "1", "16", "2.00 at batch 1"],
        ["b", "0", "none", "1", "0.50 at batch 1"],
    ]


class Page(html.parser.HTMLParser):
    """Tags of a page, what they refer to, and that they are closed in order."""

    void = ("meta", "br", "path", "use", "rect", "stop")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.count, self.references, self.ids = [], collections.Counter(), [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.count[tag] += 1
        if tag != "meta":
            self.open.append(tag)
        for name, value in attrs:
            if name.split(":")[-1] in ("src", "href", "srcset", "action", "data", "poster"):
                self.references.append(value)
            if name == "id":
                self.ids.append(value)
            self.references += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag


def test_the_page_needs_no_network(tmp_path):
    """Four plots and all tables; every reference stays within the page; the same in Markdown.

    The page is parsed, and nothing in it refers to another file; see ``test_report_page`` for what
    a browser makes of it.
    """
    difference = {"question_id": 7, "turn": 1, "position": 3, "logit_gap": 1e-5}
    rows = [row_of("plain", 1, 1.0), row_of("m", 1, 1.5), row_of("m", 4, 0.75)]
    rows[2] |= {"identical": False, "differences": [difference]}
    rows.append(row_of("m", 1, 1.2, temperature=0.8, identical=None))
    left_out = {"method": "x", "reason": "needs | a folder", "temperature": None, "batch": None}
    document = document_of(*rows, peers=[row_of("other", 1, 0.8)], left_out=[left_out])
    place = tmp_path / "report.html"
    report.write(document, str(place), str(ROOT / "benchmarks" / "round_cost.json"))
    text, markdown = place.read_text(), place.with_suffix(".md").read_text()
    page = Page(text)
    assert page.open == [] and page.count["svg"] >= 4 and page.count["script"] == 0
    assert page.count["link"] == page.count["img"] == page.count["iframe"] == 0
    assert page.references and all(one.startswith("#") for one in page.references)
    assert {one[1:] for one in page.references} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"@import|https?://(?!www\.w3\.org/)", text)
    headings = re.findall(r"<h\d>(.*?)</h\d>", text)
    assert headings == re.findall(r"^#+ (.*)$", markdown, re.MULTILINE)
    cells_of = re.findall(r"<td>(.*?)</td>", text)
    assert {"law", "no", "yes", "1.40 to 1.60"} <= set(cells_of)
    assert "logit gap 1.00e-05" in text and "needs \\| a folder" in markdown
    assert "a &lt;device&gt;" in text
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert len(pictures) == page.count["svg"]
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == sorted(pictures)


def test_reports_that_cannot_be_written(tmp_path):
    for path, sentence in (
        (tmp_path / "report.md", "--report: expected a file that ends in .html"),
        (tmp_path / "none" / "report.html", "--report: expected a file in a writable folder"),
    ):
        with pytest.raises(InputError, match=sentence):
            report.check(str(path), None)
    other = tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(InputError, match="--round-cost: expected a file of infer.profile, found"):
        report.check(None, str(other))
    assert list(tmp_path.iterdir()) == [other]


@dataclasses.dataclass(frozen=True)
class Slow:
    """A chain of zeros that costs a known number of products."""

    products: int
    max_depth: int = 2
    num_nodes: int = 3
    taps: tuple[int, ...] = ()

    def init(self, params, context, taps):
        del params, context, taps
        return ()

    def propose(self, params, state, context, keys):
        del state, keys
        x = context.length[:, None].astype(jnp.float32) + params[:1] * 0.0
        for _ in range(self.products):
            x = jnp.tanh(x @ params)
        zero = (x[:, :1] > 2.0).astype(jnp.int32)
        tokens = jnp.concatenate([context.pending[:, None], zero, zero], axis=1)
        parents = jnp.arange(3, dtype=jnp.int32)[None] - 1 + zero
        return split.DraftTree(tokens, parents, jnp.ones(tokens.shape, bool))

    def commit(self, params, state, context, output, acceptance):
        del params, context, output, acceptance
        return state


def test_time_split(engine):
    """The drafter's products are seen where they are, and none of them is left out or hoisted."""
    weights = jnp.zeros((1200, 1200), jnp.float32)
    slow = dataclasses.replace(engine, drafter=Slow(8), draft_params=weights)
    found = split.time_split(slow, 1, {}, 1)
    assert set(found) == set(report._PARTS)
    timer = split._timer(_products, 8, weights)
    alone = min(timer() for _ in range(8))  # what they cost at the least
    assert found["draft"] > 0.5 * alone and found["round"] > 0.5 * alone
    assert found["draft"] > 3 * found["tree"]
    cost = (found["draft"] + found["update"]) / found["plain_step"]
    assert split.drafter_cost(found) == cost


@dataclasses.dataclass(frozen=True)
class Sometimes(Slow):
    """``Slow`` after prompts that begin with ``first``, where a text is longer than ``after``.

    With ``after`` 0 its work depends on what it holds and on the text alone.
    """

    first: int = 0
    after: int = 0

    def init(self, params, context, taps):
        del taps
        return jnp.zeros((context.length.shape[0], len(params)), jnp.float32)

    def propose(self, params, state, context, keys):
        del keys

        def work(x):
            for _ in range(self.products):
                x = jnp.tanh(x @ params)
            return x

        busy = context.tokens[:, 0] == self.first
        if self.after:
            busy &= context.length > self.after
        x = jax.lax.cond(jnp.any(busy), work, lambda x: x, state)
        zero = (x[:, :1] > 2.0).astype(jnp.int32)
        tokens = jnp.concatenate([context.pending[:, None], zero, zero], axis=1)
        parents = jnp.arange(3, dtype=jnp.int32)[None] - 1 + zero
        return split.DraftTree(tokens, parents, jnp.ones(tokens.shape, bool))


@pytest.mark.parametrize("after", [0, 10])
def test_time_split_of_a_drafter_that_gives_up(engine, after):
    """Timed are the given prompts, some way into their answers, and all that follows a state."""
    weights = jnp.zeros((1200, 1200), jnp.float32)
    prompt = [7, 5, 3, 2]
    costly = dataclasses.replace(
        engine, drafter=Sometimes(8, first=7, after=after), draft_params=weights
    )
    draft = split.time_split(costly, 1, {}, 1, [prompt])["draft"]
    timer = split._timer(_products, 8, weights)
    alone = min(timer() for _ in range(8))
    assert draft > 0.25 * alone


def test_work_of_the_passes(engine):
    """Operations grow with rows and nodes; the bytes of the weights are read once."""
    slow = dataclasses.replace(engine, drafter=Slow(1), draft_params=())
    one, four = split.works(slow, 1), split.works(slow, 4)
    weights = sum(x.nbytes for x in jax.tree.leaves(engine.params))
    for work in (one, four):
        plain, tree = work["plain_step"], work["verify"]
        assert 2.5 < tree["operations"] / plain["operations"] < 3.5  # three nodes
        assert weights < plain["bytes"] < tree["bytes"]
    ratio = four["plain_step"]["operations"] / one["plain_step"]["operations"]
    np.testing.assert_allclose(ratio, 4.0)
    assert four["plain_step"]["bytes"] < 4 * one["plain_step"]["bytes"]


def test_the_roof_is_measured_once(target, call, tmp_path, monkeypatch):
    """With the time split, and kept when a run goes on; without it there is none."""
    measured = []
    rates = benchmark.roofline.Rates(1e9, 1e10)
    monkeypatch.setattr(benchmark.roofline, "measure", lambda dtype: measured.append(1) or rates)
    monkeypatch.setattr(split, "time_split", lambda *_: dict.fromkeys(report._PARTS, 0.001))
    monkeypatch.setattr(Engine, "generate", made_up)
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out.json"
    prompts.write_text('{"prompt": "import os"}\n')
    places = ("--target", target, "--prompts", prompts, "--json", out, "--max-new-tokens", 8)
    call(*places, "--methods", "prompt_lookup", "--no-split")
    assert json.loads(out.read_text())["rates"] is None and not measured
    for count in (1, 2):
        call(*places, "--methods", ",".join(FREE[:count]), "--resume", "--batch", count)
        document = json.loads(out.read_text())
        assert document["rates"] == dataclasses.asdict(rates) and len(measured) == 1
    works = [row["work"] for row in document["results"] if row["work"]]
    assert works and all(set(work) == {"verify", "plain_step"} for work in works)


def _products(count, weights):
    def step(index, x):
        del index
        for _ in range(count):
            x = jnp.tanh(x @ weights)
        return x

    return jax.lax.fori_loop(0, split.ROUNDS, step, jnp.ones((1, len(weights)), jnp.float32))


def test_peers(engine, target):
    """The same greedy tokens as ``transformers`` in three ways; fewer rounds where it drafts."""
    pytest.importorskip("torch", reason="torch is optional")
    prompt = tuple(engine.tokenizer(HELDOUT)["input_ids"])
    talks = [[Turn(1, "a", 0, prompt)]]
    options = {"max_new_tokens": BUDGET, "temperature": 0.0}
    found = {}
    for peer in peers.peers(str(target))[0]:
        other = peers.Transformers(engine, str(target), peer)
        runs = cells.measure((other, engine.plain()), talks, 1, 1, options)
        found[peer.name] = cells.cell(peer.name, 0.0, 1, 1, runs, other.logits)
    assert list(found) == ["transformers", "transformers-assisted", "transformers-lookup"]
    assert all(one.identical and one.tokens == BUDGET for one in found.values())
    assert found["transformers"].rounds == BUDGET
    # The assistant is the target itself.
    assert found["transformers-assisted"].rounds <= 8
    assert found["transformers-lookup"].rounds <= BUDGET
    drawn = peers.Transformers(engine, str(target), peers.peers(None)[0][0])
    rows = drawn.generate([prompt, prompt[:5]], 8, seed=[3, 4], temperature=0.9)
    assert [len(row.tokens) for row in rows] == [8, 8]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--json", "{}/none/x.json"), "--json: expected a file in a writable folder, found"),
        (("--resume",), "--resume: expected --json, the file to go on with, found none"),
        (("--batch", 0), "--batch: expected at least 1, found 0"),
        (("--temperature", -1), "--temperature: expected 0 or more, found [-1.0]"),
        (("--tree-nodes", 1), "--tree-nodes: expected at least 2, found 1"),
        (("--report", "{}/x.md"), "--report: expected a file that ends in .html, found"),
        (("--prompts", "{}/none"), "--prompts: expected a readable file, found"),
        (("--methods", "oracle"), "method: expected one of ctc, "),
        (("--target", "{}/none"), "target: expected an existing folder or a hub id"),
    ],
)
def test_refusals(arguments, sentence, target, call, tmp_path, capsys):
    """One sentence, status 2, no file."""
    places = [str(argument).format(tmp_path) for argument in arguments]
    with pytest.raises(SystemExit) as stop:
        call("--target", target, *places)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"error: {sentence}")
    assert printed.err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_peers_beside_the_methods(target, call, tmp_path, monkeypatch):
    """Their cells have a list of their own; ways that cannot run are left out with the reason."""
    pytest.importorskip("torch", reason="torch is optional")
    made = Made("peer", [])
    monkeypatch.setattr(Engine, "generate", made_up)
    monkeypatch.setattr(peers, "Transformers", lambda *arguments: made)
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out.json"
    prompts.write_text('{"prompt": "import os"}\n')
    places = ("--target", target, "--prompts", prompts, "--json", out, "--no-split", "--peers")
    call(*places, "--methods", "prompt_lookup", "--max-new-tokens", 8, "--batch", 1, 2)
    document = json.loads(out.read_text())
    assert [benchmark.place(row) for row in document["peers"]] == [
        ("transformers", 0.0, 1),
        ("transformers-lookup", 0.0, 1),
        ("transformers", 0.0, 2),
    ]
    assert len(document["results"]) == 4 and "torch" in document["versions"]
    assert [(one["method"], one["batch"]) for one in document["left_out"]] == [
        ("transformers-static", None),
        ("transformers-assisted", None),
        ("transformers-lookup", 2),
    ]


def test_peers_need_torch(call, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit):
        call("--peers")
    assert "--peers: expected torch to be installed" in capsys.readouterr().err
