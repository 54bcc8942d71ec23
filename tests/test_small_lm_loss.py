"""A small language model that learns from the target: its loss, its own text, its acceptance."""

import contextlib
import dataclasses
import functools
import io
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctc_spec_jax import folders
from ctc_spec_jax.decode import Loop
from ctc_spec_jax.draft import small_lm_loss
from ctc_spec_jax.draft.small_lm import Drawn, SmallLM
from ctc_spec_jax.draft.small_lm_loss import SmallLMLoss
from ctc_spec_jax.draft.training import Loss
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models import convert
from ctc_spec_jax.models.decoder import output_logits
from ctc_spec_jax.sharding import make_mesh
from ctc_spec_jax.verify_sampled import Rejection
from tests.chats import letter_tokenizer, write_lines
from tests.helpers import VOCAB, ragged_prompts, tiny_target
from train import distill, evaluate, plan
from train import train as program
from train.config import load_config

TEMPERATURE = 8.0
WEIGHTS = Loss(cross_entropy=0.5, forward_kl=1.0, total_variation=0.25, temperature=3.0, chunk=8)


@pytest.fixture(scope="module", autouse=True)
def optimizer_promotes():
    """optax mixes Python floats with integer counts."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@functools.cache
def target():
    return tiny_target(num_layers=1)


@functools.cache
def small():
    shape = dict(num_heads=2, num_kv_heads=1, head_width=8, mlp_width=16)
    return tiny_target(seed=2, num_layers=1, width=16, **shape)


def loss_of(**changes) -> SmallLMLoss:
    weights = dataclasses.replace(WEIGHTS, **changes)
    return SmallLMLoss(target()[0], SmallLM(small()[0], (1, 1)), weights, anchors=0)


def packed():
    """Three rows of 14: one document, two documents, one short one with two answers."""
    lengths, first = [[14], [6, 8], [9]], [[3], [1, 4], [2]]
    draw = np.random.default_rng(3)
    batch = {"tokens": draw.integers(0, VOCAB, (3, 14)).astype(np.int32)}
    batch |= {name: np.zeros((3, 14), np.int32) for name in ("segments", "positions")}
    batch["trained"] = np.zeros((3, 14), bool)
    for row in range(3):
        begin = 0
        for number, (length, start) in enumerate(zip(lengths[row], first[row], strict=True), 1):
            part = slice(begin, begin + length)
            batch["segments"][row, part] = number
            batch["positions"][row, part] = np.arange(length)
            batch["trained"][row, begin + start : begin + length] = True
            begin += length
    batch["trained"][2, 5] = False
    batch["trained"][1, 6] = True  # a first token has no law
    return batch


KEYS = jax.random.split(jax.random.key(7), 3)


STOPS = np.asarray([4, 9], np.int32)


@functools.cache
def own_text():
    return jax.jit(loss_of().own_text)


def jitted(**changes):
    return jax.jit(loss_of(**changes).loss)


def alone(lm, params, batch) -> np.ndarray:
    """Logits [B, T, V] of every document by itself, without packing."""
    texts, places = [], []
    for row in range(3):
        for number in range(1, batch["segments"][row].max() + 1):
            where = np.flatnonzero(batch["segments"][row] == number)
            texts.append(np.pad(batch["tokens"][row, where], (0, 14 - len(where))))
            places.append((row, where))
    hidden = jax.jit(lm.hidden)(params, np.stack(texts), np.full((len(texts),), 14, np.int32))[0]
    logits = np.asarray(output_logits(params, hidden))
    found = np.zeros((3, 14, VOCAB))
    for (row, where), text in zip(places, logits, strict=True):
        found[row, where] = text[: len(where)]
    return found


def labels(batch, name: str = "trained"):
    """Row, place before it, token: of every label."""
    for row in range(3):
        for t in range(1, 14):
            same = batch["segments"][row, t] == batch["segments"][row, t - 1] > 0
            if same and batch[name][row, t]:
                yield row, t - 1, batch["tokens"][row, t]


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def expected(batch, name: str = "trained"):
    """Means by their definitions, over documents that are run alone."""
    terms = []
    laws = [alone(*model, batch) for model in (target(), small())]
    for row, place, token in labels(batch, name):
        p, q = (softmax(law[row, place] / WEIGHTS.temperature) for law in laws)
        nats = -np.log(softmax(laws[1][row, place])[token])
        terms.append([nats, (p * np.log(p / q)).sum(), abs(p - q).sum() / 2])
    mean = np.mean(terms, axis=0)
    return len(terms), dict(zip(("cross_entropy", "forward_kl", "total_variation"), mean))  # noqa: B905


def check(batch, name: str = "trained"):
    count, terms = expected(batch, name)
    given = (small()[1], target()[1], batch, KEYS)
    loss, found, metrics = jax.jit(loss_of().loss)(*given)
    assert found == count
    for name_, value in terms.items():
        np.testing.assert_allclose(metrics[name_], value, rtol=2e-5)
    whole = 0.5 * terms["cross_entropy"] + terms["forward_kl"] + 0.25 * terms["total_variation"]
    np.testing.assert_allclose(loss, whole, rtol=2e-5)
    return metrics


def test_loss_is_that_of_documents_alone():
    metrics = check(packed())
    np.testing.assert_allclose(metrics["overlap"], 1 - metrics["total_variation"], rtol=1e-5)


def wrong_places():
    batch = packed()
    return batch | {"refused": batch["trained"] & (batch["tokens"] % 3 == 0)}


def test_only_refused_places_are_learnt_from():
    """The acceptance is still that of all labels."""
    batch = wrong_places()
    metrics = check(batch, "refused")
    everywhere = 1 - expected(batch)[1]["total_variation"]
    np.testing.assert_allclose(metrics["overlap"], everywhere, rtol=1e-5)
    assert abs(everywhere - 1 + metrics["total_variation"]) > 1e-3


def one_late(batch, name: str = "trained"):
    """PLANTED FAULT: at the place of the label, as a release of online distillation has it."""
    return jnp.asarray(batch[name]) & (batch["segments"] > 0)


@pytest.mark.parametrize("name", ["trained", "refused"])
def test_planted_fault_is_found(name, monkeypatch):
    monkeypatch.setattr(small_lm_loss, "label_places", one_late)
    with pytest.raises(AssertionError):
        check(packed() if name == "trained" else wrong_places(), name)


def test_own_text_follows_the_drafter():
    """Every answer's token is the draw, with its key, from the law after the drawn text."""
    batch = packed()
    own = jax.device_get(own_text()(small()[1], batch | {"stops": STOPS}, KEYS))
    written = batch["trained"] & (batch["positions"] > 0)
    assert (own["tokens"] == batch["tokens"])[~written].all()
    assert (own["tokens"] != batch["tokens"])[written].any()
    logits = alone(*small(), batch | {"tokens": own["tokens"]})
    ended = False
    for row in range(3):
        for t in range(14):
            if not batch["trained"][row, t]:
                ended = False
            elif batch["positions"][row, t]:
                key = jax.random.fold_in(KEYS[row], t)
                law = jnp.asarray(logits[row, t - 1] / WEIGHTS.temperature, jnp.float32)
                assert own["tokens"][row, t] == jax.random.categorical(key, law)
            assert own["trained"][row, t] == (batch["trained"][row, t] and not ended)
            ended |= bool(batch["trained"][row, t] and own["tokens"][row, t] in STOPS)
    assert (own["trained"] != batch["trained"]).any()


def test_mixed_rows_are_given_or_own():
    """With a share of 1 the loss is that of the drafter's own text."""
    batch = packed()
    draw = jax.vmap(jax.random.split)(KEYS)[:, 0]
    own = jax.device_get(own_text()(small()[1], batch | {"stops": STOPS}, draw))
    mixed = jitted(on_policy=1.0)(small()[1], target()[1], batch | {"stops": STOPS}, KEYS)
    plain = jitted()(small()[1], target()[1], batch | own, KEYS)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), mixed, plain)


@functools.cache
def tried():
    """Texts of the real decoder with drawn drafts, and where a draft was tried."""
    prompts, lengths = ragged_prompts(0, [3, 5, 4] * 200)
    rows = evaluate.Prompts([row[:n] for row, n in zip(prompts, lengths, strict=True)], [""] * 600)
    drafter = SmallLM(small()[0], (1, 1, 1), Drawn())
    loop = Loop(target()[0], drafter, Rejection(), 12)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    return evaluate.tries(loop, target()[1], small()[1], rows, [2], mesh, TEMPERATURE)


def test_acceptance_of_the_decoder_is_the_mean_of_the_overlap():
    """The share of drafts kept by rejection is the mean of ``sum_v min(p, q)`` at the same places.

    The two differ by a martingale, so five standard errors are a false alarm in 1.7 million.
    """
    rows, found = tried()
    loss = loss_of(temperature=TEMPERATURE)
    keys = jax.random.split(jax.random.key(0), 600)
    law = jax.jit(loss.loss)(small()[1], target()[1], rows, keys)[2]["overlap"]
    assert found["acceptance_error"] < 0.012 and 0.2 < law < 0.9
    assert abs(found["acceptance"] - law) < 5 * found["acceptance_error"]


def test_other_measures_are_not_the_acceptance():
    """Neither bonus tokens among the tries nor min(p(x), q(x)) of the drafted x would do."""
    rows, found = tried()
    batch = jax.device_get(rows)
    tries = batch["trained"].sum()
    answers = (batch["segments"] > 0).sum() - sum([3, 5, 4] * 200)
    assert answers > 1.05 * tries, "some rounds ended in a bonus token"
    at = np.where(batch["trained"][:, 1:])
    logits = [
        np.asarray(jax.jit(functools.partial(all_logits, lm))(params, batch["tokens"]))[at]
        for lm, params in (target(), small())
    ]

    def overlap(temperature: float):
        p, q = (np.asarray(jax.nn.softmax(x / temperature)) for x in logits)
        # The second is the mean over x ~ q of min(p(x), q(x)), the measure of a release.
        return np.minimum(p, q).sum(-1).mean(), (q * np.minimum(p, q)).sum(-1).mean()

    measured, error = found["acceptance"], found["acceptance_error"]
    right, released = overlap(TEMPERATURE)
    assert abs(right - measured) < 5 * error
    assert abs(released - measured) > 20 * error
    assert abs(overlap(0.01)[0] - measured) > 10 * error


def all_logits(lm, params, tokens):
    hidden = lm.hidden(params, tokens, jnp.full((len(tokens),), tokens.shape[1], jnp.int32))[0]
    return output_logits(params, hidden)


CONFIG = """
objective: drafter
run: {steps: 16, log_every: 8, eval_every: 8, checkpoint_every: 8}
optim: {rate: 1e-2, warmup: 4}
batch: {rows: 4, microbatch: 2, length: 24}
data: {max_loop: 1.0, heldout: 0.25}
drafter: {method: small_lm, layers: 1, width: 16, mlp_width: 24, tree_nodes: 5}
loss: {labels: 4, cross_entropy: 0.0, forward_kl: 1.0, on_policy: 0.5, chunk: 16}
evaluation: {rows: 3, prompts: 2, prompt_length: 8, new_tokens: 8, before: true}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A target's folder, answers and an experiment."""
    folder = tmp_path_factory.mktemp("distill")
    shape = dict(num_heads=2, num_kv_heads=1, head_width=8, mlp_width=16)
    lm, params = tiny_target(seed=2, num_layers=1, width=16, **shape)
    lm = dataclasses.replace(lm, config=dataclasses.replace(lm.config, vocab_size=30))
    params = lm.init(jax.random.key(0))
    convert.save_target(folder / "target", lm, params)
    letter_tokenizer().save_pretrained(folder / "target")
    draw = np.random.default_rng(0)
    lines = [
        {
            "id": str(i),
            "input_ids": draw.integers(4, 30, 16).tolist(),
            "loss_mask": [0] * 4 + [1] * 12,
        }
        for i in range(24)
    ]
    answers = write_lines(folder / "answers.jsonl", lines)
    (folder / "config.yaml").write_text(CONFIG)
    shared = [f"target={folder / 'target'}", f"data.files=[{answers}]", f"data.cache={folder}"]
    return folder, shared


@pytest.fixture(scope="module")
def trained(place):
    """The folder of a run of one pair, and what the program printed."""
    folder, shared = place
    arguments = ["--config", str(folder / "config.yaml"), "--divergences", "forward_kl"]
    arguments += ["--on-policy", "0.5", *shared, f"run.folder={folder / 'runs'}"]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr("sys.argv", ["distill", *arguments])
        patch.setattr(distill, "use_compilation_cache", lambda: None)
        distill.main()
    return folder / "runs" / "forward_kl_0.5", printed.getvalue().splitlines()


def test_table_of_a_divergence_and_a_mix(trained):
    folder, (titles, row) = trained
    assert titles.split()[:3] == ["divergence", "on", "policy"]
    name, share, *numbers = row.split()
    assert (name, share, len(numbers)) == ("forward_kl", "0.5", 6)
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "acceptance" in line]
    assert [line["step"] for line in measured] == [0, 8, 16]
    ends = measured[0]["acceptance"], measured[-1]["acceptance"]
    assert numbers[:2] == [f"{x:.3f}" for x in ends]
    names = ("acceptance_overlap", "own_text_overlap", "heldout_overlap", "heldout_forward_kl")
    assert all(0 <= measured[-1][name] for name in names)


def test_export_is_a_language_model(trained, place):
    folder, _ = place
    export = trained[0] / "export"
    lm, params, tokenizer = folders.load_target(str(export))
    assert (lm.config.width, lm.config.num_layers, lm.vocab_size) == (16, 1, 30)
    target, _, own = folders.load_target(str(folder / "target"))
    assert tokenizer.get_vocab() == own.get_vocab()
    drafter, again = folders.load_drafter(export, target, own, nodes=5)
    assert drafter.config == lm.config and drafter.max_depth == 4
    jax.tree.map(np.testing.assert_array_equal, again, params)
    forward = plan.forward_flops(lm.config, 1, 24, head=True)
    assert plan.drafter_flops(lm.config, 1, 24, 0) == forward
    step = plan.step_flops(target.config, lm.config, 1, 24, 0)
    assert step == plan.forward_flops(target.config, 1, 24, head=True) + 3 * forward


def test_drafter_starts_from_a_language_model_of_any_shape(trained, place):
    folder, shared = place
    export = trained[0] / "export"
    other = [*shared, "drafter.layers=3", f"drafter.init_from={export}", "run.folder=unused"]
    config = load_config(str(folder / "config.yaml"), other)
    objective: Any = program.make_objective(config, program.make_mesh(config))
    lm, params, _ = folders.load_target(str(export))
    assert objective.drafter.config == lm.config
    jax.tree.map(np.testing.assert_array_equal, objective.initial, params)


def test_methods_without_text_of_their_own_refuse_it(place):
    folder, shared = place
    other = ["drafter={method: ctc, frames: 4}", "loss.labels=2", "run.folder=unused"]
    config = load_config(str(folder / "config.yaml"), [*shared, *other])
    with pytest.raises(InputError, match=r"^loss\.on_policy: expected 0 for a method that writes"):
        program.make_objective(config, program.make_mesh(config))
