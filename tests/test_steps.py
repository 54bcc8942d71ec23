"""infer.steps on tiny shapes: arithmetic by hand, random weights, curves, files that survive."""

import dataclasses
import json
import pathlib
import runpy
import types

import jax
import jax.numpy as jnp
import pytest

from ctc_spec_jax import folders, memory, xla
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.models.decoder import DecoderLM
from infer import growth, made_up, peer_steps, roofline, rounds, steps
from infer.growth import Case
from tests.helpers import write_model

TINY = DecoderConfig(
    vocab_size=11, width=4, num_layers=2, num_heads=2, num_kv_heads=1, head_width=2, mlp_width=3
)
LAYER = 4 * 4 * 2 + 4 * 4 + 4 * 2 * 3 + 3 * 4  # qkv, output, gate and up, down
HEAD, NORMS = 4 * 11, 2 * (4 + 4) + 4
RATES = roofline.Rates(1e9, 1e10)


@pytest.fixture
def model(tmp_path):
    """Two layers of 2 kv heads, as a config.json."""
    return write_model(tmp_path, 2, hidden_size=32, intermediate_size=48, vocab_size=64)


@pytest.fixture
def quick(monkeypatch):
    """Two rounds a call, no warm-up, and rates of small arrays."""
    for module in (made_up, peer_steps):
        monkeypatch.setattr(module, "ROUNDS", 2)
        monkeypatch.setattr(module, "_WARM_UP", 1)
    monkeypatch.setattr(roofline, "_ARRAY", {"cpu": 1 << 20})
    monkeypatch.setattr(roofline, "_SIDE", {"cpu": 32})
    monkeypatch.setattr(rounds.time, "perf_counter", _quarter_seconds())


def _quarter_seconds():
    """A clock that moves on by 0.3 s with every look, so that turns hold one call."""
    ticks = iter(range(1 << 30))
    return lambda: next(ticks) * 0.3


def shapes(config=TINY):
    return folders.abstract_params(DecoderLM(config).init, jnp.bfloat16)


def test_the_bound_by_hand():
    """Weights and used caches once, in two bytes a number; of the embedding no step reads all."""
    bound = roofline.plain_bound(TINY, shapes(), context=5, batch=3)
    caches = 3 * 5 * 2 * 2 * 2  # rows, tokens, layers, keys and values, width of the kv head
    assert bound.bytes == 2 * (2 * LAYER + NORMS + HEAD + caches)
    assert bound.operations == 2 * 3 * (2 * LAYER + HEAD)
    slides = dataclasses.replace(TINY, windows=(2, 0))
    less = roofline.plain_bound(slides, shapes(slides), context=5, batch=3)
    assert bound.bytes - less.bytes == 2 * 3 * (5 - 2) * 2 * 2
    tied = dataclasses.replace(TINY, tied_embeddings=True)
    assert roofline.plain_bound(tied, shapes(tied), 5, 3) == bound


def test_work_by_hand():
    """A pass reads all slots, and its scores and logits are written and read in float32."""
    work = roofline.target_work(TINY, shapes(), batch=3, nodes=4, slots=8)
    scores, logits = 2 * 2 * 12 * (8 + 4), 12 * 11
    assert work.bytes == 2 * (2 * LAYER + NORMS + HEAD + 3 * 8 * 8) + 8 * (scores + logits)
    assert work.operations == 2 * 12 * (2 * LAYER + HEAD) + 4 * 2 * scores
    sizes = dict(frames=3, num_layers=1, num_heads=2, num_kv_heads=1, head_width=2, vocab_size=11)
    own = {"matrix": jnp.zeros((4, 4), jnp.bfloat16), "norm": jnp.zeros(4, jnp.bfloat16)}
    work = roofline.drafter_work(types.SimpleNamespace(**sizes), own, shapes(), batch=2, slots=7)
    scores = 2 * 6 * (7 + 3)
    assert work.bytes == 2 * (16 + 4 + HEAD + 2 * 7 * 4) + 8 * (scores + 6 * 11)
    assert work.operations == 2 * 6 * (16 + HEAD) + 4 * 2 * scores


def test_the_longer_of_two_times():
    assert roofline.Work(2e9, 1e10).seconds(RATES) == 2
    assert roofline.Work(2e9, 1e10).ruled_by(RATES) == "bytes"
    assert roofline.Work(2e9, 5e10).seconds(RATES) == 5
    assert roofline.Work(2e9, 5e10).ruled_by(RATES) == "operations"


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_random_weights(model, dtype, monkeypatch):
    """In the dtype that was asked for from the start: no program makes another one."""
    made = []
    normal = jax.random.normal

    def noted(key, shape, dtype):
        made.append((shape, jnp.dtype(dtype)))
        return normal(key, shape, dtype)

    monkeypatch.setattr(jax.random, "normal", noted)
    made_up._normal.clear_cache()
    engine = made_up.random_engine(model, dtype, 1)
    leaves = jax.tree.leaves_with_path(engine.params)
    assert {leaf.dtype for _, leaf in leaves} == {kind for _, kind in made} == {jnp.dtype(dtype)}
    assert engine.lm.config.num_layers == 1
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path)
        spread = float(jnp.std(leaf.astype(jnp.float32)))
        assert spread == 0 if "norm" in name else 0.01 < spread < 0.03, name
    assert not jnp.array_equal(engine.params["embedding"], engine.params["head"].T)


def test_cases():
    """The base first, then every axis alone, none twice."""
    axes = {"context": [128, 512], "nodes": [64, 4], "batch": []}
    found = growth.cases([512, 64, 1], axes)
    assert found == [Case(512, 64, 1), Case(128, 64, 1), Case(512, 4, 1)]


@pytest.mark.parametrize("axis", growth.AXES)
def test_predictions_never_fall(model, axis):
    engines = steps.engines_of(arguments(model))
    found = []
    for size in (2, 3, 8, 16, 64, 256):
        case = dataclasses.replace(Case(128, 8, 1), **{axis: size})
        slots = made_up.slots_for(case.context, 8)
        times = {"plain": 1.0, "round": 1.0, "outside": 0.5}
        found.append(growth.cost(engines(case.nodes), case, slots, RATES, times))
    for name in ("plain", "round"):
        curve = [one.predicted[name] for one in found]
        assert curve == sorted(curve) and (
            curve[0] < curve[-1] or (axis, name) == ("nodes", "plain")
        )
    assert all(one.predicted["plain"] < one.predicted["round"] for one in found)
    assert all(one.bound.seconds(RATES) <= one.predicted["plain"] for one in found)


def arguments(model: str, *more):
    base = ("--base", 20, 4, 1, "--frames", 4, "--depth", 3, "--repeats", 1)
    return steps.parser().parse_args([*map(str, ("--model", model, *base, *more))])


def test_rounds_of_a_filled_cache(model, quick):
    """All rounds run, from the same place in every call, and what the rows had seen stays."""
    engine = steps.engines_of(arguments(model))(4)
    case = made_up.filled(engine, 2, 20, made_up.slots_for(20, 3))
    cache = made_up.Cache(made_up.random_arrays(case.shapes.cache))
    before = jax.tree.map(lambda x: jnp.array(x, copy=True), cache.arrays)
    run = made_up.filled_timer(case, cache)
    assert run() > 0 and run.rounds.tolist() == [2, 2]
    for (k, v), (old_k, old_v) in zip(cache.arrays, before, strict=True):
        assert k.shape[3] == case.loop.slots >= 20 + 3 * 4
        assert jnp.array_equal(k[..., :20], old_k[..., :20])
        assert jnp.array_equal(v[:, :, :20], old_v[:, :, :20])
        assert not jnp.array_equal(k[..., 20:23], old_k[..., 20:23])
    assert case.bytes > memory.tree_bytes(case.shapes) > memory.tree_bytes(before)


def call(monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["infer.steps", *map(str, flags)])
    monkeypatch.setattr(steps, "use_compilation_cache", lambda: None)
    steps.main()


def test_curves_of_a_model(model, quick, tmp_path, monkeypatch, capsys):
    """A line and an entry per case; one that does not fit is named and the others go on."""
    out, picture = tmp_path / "growth.json", tmp_path / "growth.png"
    check = memory.check

    def small(needed, batch, what):
        if batch == 3:
            monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
        check(needed, batch, what)

    monkeypatch.setattr(memory, "check", small)
    timers = ({"transformers": lambda: 0.5}, {"transformers-static": "needs a GPU"})
    monkeypatch.setattr(peer_steps, "timers", lambda shapes: timers)
    base = ("--base", 20, 2, 1, "--frames", 2, "--depth", 1, "--repeats", 1, "--layers", 1)
    axes = ("--tree-nodes", 1, "--context", 30, "--batch", 3, "--peers")
    places = ("--json", out, "--plot", picture)
    call(monkeypatch, "--model", model, "--dtype", "bfloat16", *base, *axes, *places)
    printed, document = capsys.readouterr().out, json.loads(out.read_text())
    assert "random weights: 1 layers of width 32" in printed and "left out, batch: exp" in printed
    assert document["random_weights"] and document["device"] and picture.stat().st_size > 1000
    sizes = [(one["context"], one["nodes"], one["batch"]) for one in document["results"]]
    assert sizes == [(20, 2, 1), (30, 2, 1), (20, 1, 1)]
    (left_out,) = document["left_out"]
    assert left_out["batch"] == 3 and "expected one that needs at most" in left_out["reason"]
    for one in document["results"]:
        seconds, predicted = one["seconds"], one["predicted_seconds"]
        assert one["share_of_bound"] == pytest.approx(predicted["bound"] / seconds["plain"])
        assert one["plain_steps"] == pytest.approx(seconds["round"] / seconds["plain"])
        assert one["share_outside"] == pytest.approx(seconds["outside"] / seconds["round"])
        assert (one["work"]["drafter"]["bytes"] > 0) == (one["nodes"] > 1)
    assert document["results"][0]["seconds"]["transformers"] == 0.5
    last = printed.splitlines()[-3:]
    assert last[0].split()[:2] == ["this", "library"] and last[1].split()[1] == "500.00"
    assert last[2].endswith("left out: needs a GPU")


def test_a_run_that_is_cut(model, quick, tmp_path, monkeypatch, capsys):
    """Keeps the cases before."""
    out, done = tmp_path / "growth.json", []

    def cost_of(engine, case, slots, rates, repeats, others):
        if done:
            raise KeyboardInterrupt
        done.append(case)
        times = {"plain": 1.0, "round": 2.0, "outside": 0.5}
        return growth.cost(engine, case, slots, rates, times)

    monkeypatch.setattr(steps, "cost_of", cost_of)
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "--model", model, "--json", out, "--batch", 2, 4)
    assert ended.value.code == 130
    (one,) = json.loads(out.read_text())["results"]
    assert one["batch"] == 1 and one["plain_steps"] == 2


def test_models_that_cost_nothing(model):
    """Same sizes of trees and caches; neither has parameters of a drafter."""
    for nodes in (1, 4):
        engine = steps.engines_of(arguments(model))(nodes)
        empty = steps.without_models(engine)
        assert empty.drafter.num_nodes == engine.drafter.num_nodes == nodes
        assert empty.drafter.max_depth == engine.drafter.max_depth and empty.draft_params == ()
        ours, theirs = (made_up.filled(e, 1, 20, 64).shapes.cache for e in (engine, empty))
        assert ours == theirs


WRONG = [
    (("--batch", 1, 0), "--batch: expected at least 1, found 0"),
    (("--tree-nodes", -3), "--tree-nodes: expected at least 1, found -3"),
    (("--base", 0, 4, 1), "--base: expected at least 1, found 0"),
    (("--repeats", 0), "--repeats: expected at least 1, found 0"),
    (("--layers", 2), "--layers: expected --model beside it, found none"),
    (("--model", "none.json"), "config.json: expected a file, found none.json|none.json"),
    (("--model", "MODEL", "--layers", 3), "layers: expected 0 to 2, found 3"),
    (("--json", "nowhere/x.json"), "--json: expected a file in a writable folder, found "),
    (("--plot", "nowhere/x.png"), "--plot: expected a file in a folder that exists, found "),
]


@pytest.mark.parametrize(("flags", "sentence"), WRONG)
def test_bad_input(model, monkeypatch, capsys, flags, sentence):
    """One sentence and status 2."""
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, *(model if flag == "MODEL" else flag for flag in flags))
    error = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and len(error.splitlines()) == 1 and error.startswith("error: ")
    assert any(part in error for part in sentence.split("|")), error


def test_steps_of_transformers(model, quick, monkeypatch):
    """Both caches start a call with the same tokens; the growing one ends it longer."""
    pytest.importorskip("torch")
    step = peer_steps._Step(peer_steps.Shapes(model, 1, "float32", 2, 5))
    assert len(step.model.model.layers) == 1
    for cache_of in (step.growing, step.fixed):
        cache = (renew := cache_of())()
        assert step.timer(lambda renew=renew: renew)() > 0
        assert int(cache.get_seq_length()) == 5 + 2
        assert int(renew().get_seq_length()) == 5
    monkeypatch.setattr(peer_steps, "_Step", lambda shapes: step)
    found, left_out = peer_steps.timers(step.shapes)
    assert [*found] == ["transformers"] and [*left_out] == [peer_steps.STATIC]


def test_options_of_gpus(monkeypatch):
    """This version of XLA knows all of them; the environment switches them on."""
    assert all(xla._accepts(name, value) for name, value in xla._GPU.items())
    assert not xla._accepts("xla_gpu_graph_min_graph_size", "many")
    assert "WHILE" in xla._GPU["xla_gpu_enable_command_buffer"].split(",")
    options = xla.decode_options.__wrapped__
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.delenv("CTC_SPEC_XLA", raising=False)
    assert options() is None
    monkeypatch.setenv("CTC_SPEC_XLA", "graphs")
    assert options() == xla._GPU


def test_chats_for_a_pair(tmp_path):
    """Questions are in neither the prompts nor the texts; a broken line is left out."""
    file = pathlib.Path(__file__).parent.parent / "benchmarks" / "chats.py"
    turns = [
        [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": "x"}] for i in range(40)
    ]
    lines = [json.dumps({"conversations": chat}) for chat in turns]
    (tmp_path / "chats.jsonl").write_text("\n".join([*lines[:5], "{", *lines[5:]]))
    runpy.run_path(str(file))["main"](str(tmp_path / "chats.jsonl"), tmp_path)
    questions = [json.loads(x) for x in (tmp_path / "questions.jsonl").read_text().splitlines()]
    prompts = [json.loads(x) for x in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert [row["turns"] for row in questions] == [[f"{i}?"] for i in range(32)]
    assert [row["messages"][0]["content"] for row in prompts] == [f"{i}?" for i in range(32, 40)]
    texts = sorted(path.name for path in (tmp_path / "chat_texts").iterdir())
    assert texts == sorted(["__init__.py", *(f"{i}.py" for i in range(8))])
    assert (tmp_path / "chat_texts" / "3.py").read_text() == "user: 35?\nassistant: x\n"
