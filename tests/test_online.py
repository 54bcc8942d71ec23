"""Drafters that learn while they serve: what is stored, what is learnt, and that nothing is lost.

Targets and drafters are tables: a decoder whose layers are zero, so that the law of a token depends
on the token before it alone and a step of plain gradient descent on the head moves the rows of the
contexts that it saw, and no others.
"""

import dataclasses
import functools
import itertools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ctc_spec_jax import folders
from ctc_spec_jax.draft import small_lm_loss
from ctc_spec_jax.draft.anchors import sample_anchors
from ctc_spec_jax.draft.small_lm import Best, Drawn, SmallLM
from ctc_spec_jax.draft.small_lm_loss import SmallLMLoss
from ctc_spec_jax.draft.training import Loss
from ctc_spec_jax.engine import Engine
from ctc_spec_jax.generation import Generation
from ctc_spec_jax.models import convert
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.models.decoder import DecoderLM
from ctc_spec_jax.verify_sampled import Rejection
from tests.chats import LETTERS, letter_tokenizer, write_lines
from tests.test_sampling import p_value
from train import online, replay
from train.student import School, Student

V, WIDTH, FIRST = len(LETTERS), 32, 4
LM = DecoderLM(DecoderConfig(V, WIDTH, 1, 2, 1, 8, 16))
HALF = (V - FIRST) // 2
TOPICS = {"a": list(range(FIRST, FIRST + HALF)), "b": list(range(FIRST + HALF, V))}
NEW, EVERY = 16, 2


@pytest.fixture(scope="module", autouse=True)
def optimizer_promotes():
    """optax mixes Python floats with integer counts."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def table_params(table):
    """Parameters whose logits after a token are a row of ``table`` [V, V]."""
    shapes = jax.eval_shape(LM.init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    ones = {"norm": jnp.ones(WIDTH)}
    ones["embedding"] = jnp.eye(V, WIDTH)
    # The norm makes a unit vector sqrt(WIDTH) long.
    ones["head"] = jnp.zeros((WIDTH, V)).at[:V].set(jnp.asarray(table, jnp.float32) / WIDTH**0.5)
    return {**params, **ones}


def table_of(params) -> np.ndarray:
    return np.asarray(params["head"])[:V] * WIDTH**0.5


def successor() -> np.ndarray:
    """The target's greedy next token: round each topic's letters, in an order of its own."""
    following = np.arange(V)
    for step, letters in zip((1, 5), TOPICS.values(), strict=True):
        for place, token in enumerate(letters):
            following[token] = letters[(place + step) % len(letters)]
    return following


@functools.cache
def target():
    return table_params(perfect())


def perfect() -> np.ndarray:
    """The target's table."""
    return 6.0 * np.eye(V)[successor()]


def engine_of(table, drafter=None, verifier=None) -> Engine:
    drafter = drafter or SmallLM(LM, (1, 1, 1), Best())
    engine = Engine(LM, target(), letter_tokenizer(), drafter, table_params(table))
    return engine if verifier is None else dataclasses.replace(engine, verifier=verifier)


HEAD = optax.multi_transform(
    {True: optax.sgd(0.5), False: optax.set_to_zero()},
    lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == "head", params),
)
"""Plain gradient descent on the head alone."""


def school_of(engine: Engine, every: int = EVERY, keep: int = EVERY) -> School:
    drafter: Any = engine.drafter
    loss = Loss(cross_entropy=0.0, forward_kl=1.0, chunk=64)
    return School(engine, SmallLMLoss(LM, drafter, loss, 0), HEAD, every, keep, 24)


def answer_of(start: int, tokens: int = NEW) -> list[int]:
    """What the target writes, in closed form."""
    text = [start]
    for _ in range(tokens):
        text.append(int(successor()[text[-1]]))
    return text[1:]


CONTEXT = TOPICS["a"][6]


def wrong_once() -> np.ndarray:
    """The target's table but for one context, after which the drafter is sure of another token."""
    following = successor()
    following[CONTEXT] = TOPICS["a"][2]
    return 6.0 * np.eye(V)[following]


def taught() -> Student:
    """A student of ``wrong_once`` after eight requests."""
    student = Student(school_of(engine_of(wrong_once())))
    for number in range(8):
        start = TOPICS["a"][number % 3]
        answer, metrics = student.serve([start], max_new_tokens=NEW)
        assert answer.tokens == answer_of(start)
        assert ("loss" in metrics) == (number % EVERY == 1)
    return student


def check_that_one_context_is_learnt():
    table, before = table_of(taught().params), wrong_once()
    others = np.arange(V) != CONTEXT
    np.testing.assert_array_equal(table[others], table_of(table_params(before))[others])
    assert table[CONTEXT].argmax() == successor()[CONTEXT]


def test_exactly_the_wrong_context_is_learnt():
    check_that_one_context_is_learnt()


def one_late(batch, name: str = "trained"):
    """PLANTED FAULT of a release: the place of the corrected token, not the one before it."""
    return batch[name] & (batch["segments"] > 0)


def test_a_loss_one_place_late_is_found(monkeypatch):
    """It teaches the context after the wrong one, where nothing was wrong."""
    monkeypatch.setattr(small_lm_loss, "label_places", one_late)
    with pytest.raises(AssertionError):
        check_that_one_context_is_learnt()


def first_answer(table) -> Generation:
    return Student(school_of(engine_of(table))).serve([TOPICS["a"][0]], max_new_tokens=NEW)[0]


def test_only_corrections_are_stored_as_wrong():
    """Not the bonus tokens of rounds that kept their whole draft, nor the last of the budget."""
    answer = first_answer(wrong_once())
    own = [i for i, drafted in enumerate(answer.from_draft) if not drafted]
    wrong = [i for i, refused in enumerate(answer.refused) if refused]
    assert [answer.tokens[i] for i in wrong] == [successor()[CONTEXT]] * len(wrong)
    assert 0 < len(wrong) < len(own) - 1, "some rounds ended in a bonus token"
    row = replay.row_of([TOPICS["a"][0]], answer, 24)
    assert np.flatnonzero(row["refused"]).tolist() == [i + 1 for i in wrong]
    assert row["tokens"][: NEW + 1].tolist() == [TOPICS["a"][0], *answer.tokens]
    ends = np.cumsum(answer.emitted)
    rounds = [np.searchsorted(ends, i, side="right") for i in wrong]
    begins = [int(ends[r] - answer.emitted[r]) for r in rounds]
    assert np.flatnonzero(row["roots"]).tolist() == begins  # the token before a round's first
    assert row["trained"].tolist() == [False] + [True] * NEW + [False] * (23 - NEW)
    right = first_answer(perfect())
    assert not any(right.refused) and right.rounds == NEW // 4


def test_ring_wraps():
    """Five answers in three rows: the newest three, each where the ring has come to."""
    ring, store = replay.empty(3, 8), jax.jit(replay.store)
    rows = []
    for number in range(5):
        size = 2 + number % 3
        drafted = [i == 0 for i in range(size)]
        answer = Generation(
            "",
            list(range(number, number + size)),
            "length",
            1,
            [size],
            0.0,
            drafted,
            [i == size - 1 and number % 2 == 0 for i in range(size)],
        )
        rows.append(replay.row_of([20 + number, 21], answer, 8))
        ring = store(ring, rows[-1])
        if number == 1:
            half = jax.device_get(replay.batch_of(ring, False))
            assert not half["segments"][0, 2].any() and not half["trained"][0, 2].any()
    assert int(ring.written) == 5
    for place, number in enumerate((3, 4, 2)):
        for name, value in rows[number].items():
            np.testing.assert_array_equal(np.asarray(getattr(ring, name))[place], value)
    batch = jax.device_get(replay.batch_of(ring, False))
    assert batch["tokens"].shape == (1, 3, 8) and batch["row"].tolist() == [[0, 1, 2]]
    for place, number in enumerate((3, 4, 2)):
        size = int(rows[number]["lengths"])
        assert batch["segments"][0, place].tolist() == [1] * size + [0] * (8 - size)
        assert batch["refused"][0, place].sum() == (number % 2 == 0)
    assert "refused" not in replay.batch_of(ring, True)


def test_anchors_lie_at_roots_of_failed_drafts():
    """Methods that learn whole drafts learn those that failed; rows without one learn nothing."""
    rows = [replay.row_of([9], first_answer(table), 24) for table in (wrong_once(), perfect())]
    ring = functools.reduce(replay.store, rows, replay.empty(2, 24))
    batch = jax.tree.map(lambda x: x[0], replay.batch_of(ring, False))
    keys = jax.random.split(jax.random.key(0), 2)
    anchors, labels, counts = map(np.asarray, sample_anchors(keys, batch, 5, 3))
    roots = np.flatnonzero(rows[0]["roots"])
    assert set(anchors[0]) == set(roots) and (counts[0] > 0).all() and not counts[1].any()
    for place, said, count in zip(anchors[0], labels[0], counts[0], strict=True):
        after = rows[0]["tokens"][place + 1 : place + 1 + count]
        assert count == min(3, NEW - place) and said[:count].tolist() == after.tolist()


def windows(service, stream) -> list[float]:
    """Accepted length of every window; answers are checked against the closed form."""
    found = []
    for topic, number in stream:
        start = TOPICS[topic][number % HALF]
        answer, metrics = service.request(topic, [start], max_new_tokens=NEW)
        assert answer.tokens == answer_of(start)
        if "accepted_length" in metrics:
            found.append(metrics["accepted_length"])
    return found


def test_acceptance_rises_falls_at_a_switch_and_recovers(tmp_path):
    school = school_of(engine_of(np.zeros((V, V))))
    service = online.Service(school, [""], tmp_path, 4)
    stream = [(topic, n) for topic in "ab" for n in range(16)]
    lengths = windows(service, stream)
    a, b = lengths[:4], lengths[4:]
    assert a[0] < 1.8 and a[-1] == 4.0, lengths
    assert b[0] < 1.8 and b[-1] == 4.0, lengths


def test_two_topics_keep_two_drafters(tmp_path):
    """Each learns the contexts of its own requests; one for all would learn both."""
    school = school_of(engine_of(np.zeros((V, V))))
    service = online.Service(school, ["a", "b"], tmp_path, 4)
    windows(service, [(topic, n) for n in range(6) for topic in "ab"])
    service.close_window()
    windows(service, [("b", 7)] * 3)
    _, metrics = service.request("a", [TOPICS["a"][0]], max_new_tokens=NEW)
    assert {"accepted_length", "accepted_length/a", "accepted_length/b"} <= metrics.keys()
    tables = {topic: table_of(service.students[topic].params) for topic in "ab"}
    for topic, other in ("ab", "ba"):
        assert not tables[topic][TOPICS[other]].any()
        seen = tables[topic][TOPICS[topic]]
        assert (seen.argmax(1) == successor()[TOPICS[topic]]).mean() > 0.8


SOFT, START = 1.5 * np.random.default_rng(5).normal(size=(2, V, V))
"""Of a target that samples, and of the drafter before it has learnt anything."""


@dataclasses.dataclass(frozen=True)
class Swapped(SmallLM):
    """PLANTED FAULT: weights change between drafting and verification of a round."""

    def propose(self, params, state, context, keys):
        drafts = super().propose(params, state, context, keys)
        other = state | {"logits": -state["logits"]}  # those of a head with the other sign
        told = super().propose(params, other, context, keys).draft_logits
        return dataclasses.replace(drafts, draft_logits=told)


@pytest.mark.parametrize("kind", [SmallLM, Swapped])
def test_law_of_samples_while_the_drafter_learns(kind):
    """Joint law of two tokens over four versions of the drafter, 2,048 draws.

    One chi-square test at 1e-5 is its false alarm. The planted fault is found.
    """
    drafter = kind(LM, (1,), Drawn())
    engine = dataclasses.replace(engine_of(START, drafter, Rejection()), params=table_params(SOFT))
    student = Student(school_of(engine, every=1, keep=1))
    counts, tables = np.zeros((V, V)), []
    for version in range(4):
        tables.append(table_of(student.params))
        now = dataclasses.replace(engine, draft_params=student.params)
        answers = now.generate([[5]] * 512, 8, seed=version, temperature=1.0)
        np.add.at(counts, tuple(np.asarray([a.tokens[:2] for a in answers]).T), 1)
        row = replay.row_of([5], answers[0], 24)
        student.state["replay"] = replay.store(student.state["replay"], row)
        student.learn()
    # The planted fault keeps nearly all drafts and so leaves nothing to learn.
    assert kind is Swapped or all((x != y).any() for x, y in itertools.pairwise(tables))
    law = np.asarray(jax.nn.softmax(jnp.asarray(SOFT, jnp.float32), axis=-1), np.float64)
    joint = law[5][:, None] * law
    assert (p_value(counts, joint / joint.sum()) > 1e-5) == (kind is SmallLM)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders of a target and a drafter, and a stream of two topics."""
    folder = tmp_path_factory.mktemp("online")
    for name, params in (("target", target()), ("drafter", table_params(np.zeros((V, V))))):
        convert.save_target(folder / name, LM, params)
        letter_tokenizer().save_pretrained(folder / name)
    lines = [
        {"prompt": LETTERS[TOPICS[topic][n]], "topic": topic} for n in range(6) for topic in "ab"
    ]
    write_lines(folder / "prompts.jsonl", lines)
    return folder


def run_program(place, out: str, *more: str) -> None:
    arguments = ["--target", str(place / "target"), "--drafter", str(place / "drafter")]
    arguments += ["--prompts", str(place / "prompts.jsonl"), "--out", str(place / out)]
    arguments += ["--every", "2", "--rate", "0.05", "--max-new-tokens", str(NEW), "--by-topic"]
    arguments += ["--tree-nodes", "4", "--window", "4", "--checkpoint-every", "4", *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["online", *arguments])
        patch.setattr(online, "use_compilation_cache", lambda: None)
        online.main()


def written(folder) -> tuple[list[dict], list[dict]]:
    answers, metrics = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("answers.jsonl", "metrics.jsonl")
    )
    return answers, [{k: v for k, v in line.items() if k != "seconds"} for line in metrics]


def test_program_goes_on_where_it_was_killed(place, monkeypatch):
    run_program(place, "whole")
    answers, metrics = written(place / "whole")
    assert len(answers) == 12 and [line["step"] for line in metrics][-1] == 12
    for number, line in enumerate(answers):
        assert line["tokens"] == answer_of(TOPICS["ab"[number % 2]][number // 2])
    assert {"loss", "overlap", "accepted_length/a", "acceptance/b"} <= metrics[-1].keys()
    first = next(line for line in metrics if "accepted_length" in line)
    assert metrics[-1]["accepted_length"] > first["accepted_length"]

    request = online.Service.request

    def killed(self, *given, **fields):
        if self.done == 7:
            raise InterruptedError
        return request(self, *given, **fields)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(online.Service, "request", killed)
        run_program(place, "killed")
    run_program(place, "killed")
    assert written(place / "killed") == (answers, metrics)
    lm, _, tokenizer = folders.load_target(str(place / "target"))
    for topic in "ab":
        exports = [place / name / "export" / topic for name in ("whole", "killed")]
        (drafter, one), (_, two) = (folders.load_drafter(e, lm, tokenizer, 4) for e in exports)
        jax.tree.map(np.testing.assert_array_equal, one, two)
        assert drafter.config == LM.config and np.asarray(one["head"]).any()


def test_program_refuses_what_it_cannot_do(place, capsys):
    for more, message in (
        (["--rate", "0.1"], "--out: expected rate 0.05 as in"),
        (["--every", "0"], "--every: expected at least 1, found 0"),
        (["--keep", "1"], "--keep: expected at least --every, found 1"),
        (["--keep", "0"], "--keep: expected at least --every, found 0"),
        (["--rate", "inf"], "--rate and --loss-temperature: expected numbers above 0, found"),
    ):
        with pytest.raises(SystemExit) as exit_:
            run_program(place, "whole", *more)
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err
