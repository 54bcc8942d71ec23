"""Random requests against a slow, obvious decoder, as many as you like.

python -m tests.fuzz --requests 10000 --seed 0
python -m tests.fuzz --seed 0 --only 4711     (one request again, as a failure prints it)
python -m tests.fuzz --methods all            (drafters of every row of ``recipes.RECIPES``)
python -m tests.fuzz --methods pearl:sampled  (one of them, and how it builds its trees)

Every request is drawn from the seed and its number alone. The library decodes a batch; then every
row is replayed: one full forward of the target without a cache gives the raw scores before every
token that was emitted, ``reference_scores`` makes the law of each, and the ends are searched in
plain Python. A greedy row must have emitted the arg-max of that law at every place and have ended
where the reference ends; by induction over the tokens this is equality with greedy decoding, one
token at a time. A sampled row must have emitted tokens that its law allows, and the same ends hold.

Where log-probabilities were recorded they must be those of the reference. That is what shows a
filter that is too strict, which allows only tokens that are allowed.

Shape letters: B batch, T new tokens, S text positions, V vocabulary, Q automaton states.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import itertools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ctc_spec_jax import decode as decoding
from ctc_spec_jax import recipes, stops
from ctc_spec_jax.decode import Loop, NoDraft
from ctc_spec_jax.draft.training import Shape
from ctc_spec_jax.models.decoder import output_logits
from ctc_spec_jax.types import (
    CACHE_FULL,
    NO_TOKEN,
    OUT_OF_BUDGET,
    STOPPED,
    STOPPED_BY_STRING,
    GenerateOutput,
    Request,
    Sampling,
    StopStrings,
)
from ctc_spec_jax.verify import TargetSample
from tests.helpers import VOCAB, OracleAhead, OracleTree, tiny_target
from tests.reference import reference_scores

BATCH, WIDTH, CAPACITY = 32, 12, 24
STATES = 512
PAD = -5  # no token, so that padding cannot be mistaken for one
NUM_STOPS, NUM_PHRASES, PHRASE_WIDTH = 2, 2, 3
TEXT = WIDTH + CAPACITY
ROUNDING = 1e-4
"""Two raw scores that are closer than this may change places; they are of the order of 10."""

# Of several characters, of none and of half a character: a string may end anywhere in a token.
PIECES = "a|b|ab|ba|c||abc|\xc3|\xa9|aa|cab| |bc||ca|b |aab".encode("latin-1").split(b"|")

PLAIN = Loop(tiny_target()[0], NoDraft(), TargetSample(), CAPACITY, PAD, 0)
DEEP = dataclasses.replace(PLAIN, drafter=OracleTree(4, 12, quality=0.9))
# Too few slots for a long prompt and a full answer, and nothing recorded.
SHALLOW = dataclasses.replace(
    PLAIN, drafter=OracleTree(2, 5, quality=0.9), top_logprobs=None, slots=WIDTH + 14
)
AHEAD = dataclasses.replace(PLAIN, drafter=OracleAhead(4))
LOOPS = (DEEP, SHALLOW, AHEAD, PLAIN)
"""The loops of successive batches."""

REASONS = {
    STOPPED: "stop token",
    STOPPED_BY_STRING: "stop string",
    OUT_OF_BUDGET: "budget",
    CACHE_FULL: "cache full",
}


def of_method(name: str) -> tuple[Loop, Any]:
    """The loop of a method of ``recipes`` with its own rule, and parameters of its drafter.

    ``name`` may end in a colon and a way to build trees. A language model is the target with
    noise, so that its drafts are often right but not always; other parameters are fresh ones.
    """
    method, _, tree = name.partition(":")
    lm, params = tiny_target()
    recipe, key = recipes.find(method), jax.random.key(5)
    layers = lm.config.num_layers if recipe.language_model else 1
    network = recipe.network(lm.config, Shape(layers=layers, frames=4))
    drafter = recipe.drafter(network, 12, 4, tree)
    if recipe.language_model:
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        noise = [1 + 0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        own = jax.tree.unflatten(structure, [x * n for x, n in zip(leaves, noise, strict=True)])
    else:
        own = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, drafter.init_params(key))
    rule = recipes.verifier("", drafter)
    return dataclasses.replace(PLAIN, drafter=drafter, verifier=rule), own


@dataclasses.dataclass(frozen=True)
class Case:
    """One request; ``options`` are the keywords of ``reference_scores``, but for ``stops``."""

    number: int
    prompt: tuple[int, ...]
    budget: int
    stops: tuple[int, ...]
    strings: tuple[str, ...]
    depth: int | None
    guess_quality: float
    options: dict[str, Any]

    @property
    def is_greedy(self) -> bool:
        return self.options.get("temperature", 0.0) == 0


@dataclasses.dataclass
class Summary:
    """What a run has seen."""

    requests: int = 0
    tokens: int = 0
    drafted: int = 0
    near_ties: int = 0
    near_thresholds: int = 0
    seconds: float = 0.0
    finish: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    failures: list[str] = dataclasses.field(default_factory=list)

    def line(self) -> str:
        ends = ", ".join(f"{REASONS[reason]} {n}" for reason, n in sorted(self.finish.items()))
        return (
            f"{self.requests} requests, {self.tokens} tokens ({self.drafted} drafted) in "
            f"{self.seconds:.0f} s; ends: {ends}; rows with near ties {self.near_ties}, with near "
            f"thresholds {self.near_thresholds}; differences {len(self.failures)}"
        )


def draw_case(seed: int, number: int) -> Case:
    """Request ``number``; every option is off in most requests."""
    draw = np.random.default_rng([seed, number])
    ids = functools.partial(draw.integers, 0, VOCAB)

    def number_from(low: float, high: float) -> float:
        return round(float(draw.uniform(low, high)), 3)

    def phrase(prompt):
        start = [prompt[-1]] if draw.random() < 0.5 else ids(draw.integers(1, PHRASE_WIDTH))
        value = -math.inf if draw.random() < 0.5 else number_from(-10, 10)
        return (*map(int, start), int(ids())), value

    prompt = tuple(map(int, ids(draw.integers(1, WIDTH + 1))))
    makers = {
        "temperature": (0.5, lambda: number_from(0.3, 2)),
        "top_k": (0.3, lambda: int(draw.integers(1, VOCAB + 3))),
        "top_p": (0.3, lambda: number_from(0.05, 0.99)),
        "min_p": (0.3, lambda: number_from(0.01, 0.6)),
        "repetition_penalty": (0.3, lambda: number_from(0.5, 2)),
        "presence_penalty": (0.3, lambda: number_from(-3, 3)),
        "frequency_penalty": (0.3, lambda: number_from(-2, 2)),
        "bias": (0.3, lambda: {int(token): number_from(-10, 10) for token in ids(3)}),
        "phrases": (0.3, lambda: [phrase(prompt) for _ in range(draw.integers(1, 3))]),
        "min_new_tokens": (0.3, lambda: int(draw.integers(1, 13))),
    }
    options = {name: make() for name, (share, make) in makers.items() if draw.random() < share}
    if "bias" in options and draw.random() < 0.3:
        options["bias"][int(ids())] = -math.inf
    letters = [*"aabbc ", "\xe9"]
    return Case(
        number,
        prompt,
        int(draw.integers(0, CAPACITY + 3)),
        tuple(map(int, ids(draw.integers(1, 3)))) if draw.random() < 0.4 else (),
        tuple(
            "".join(draw.choice(letters, draw.integers(1, 6))) for _ in range(draw.integers(1, 3))
        )
        if draw.random() < 0.4
        else (),
        int(draw.integers(0, 5)) if draw.random() < 0.3 else None,
        float(draw.choice([0.0, 0.6, 1.0], p=[0.1, 0.3, 0.6])),
        options,
    )


def aim(case: Case, seed: int, text: list[int]) -> Case:
    """The case with ends and phrases, where it has some, that its text is likely to meet.

    A stop token and a stop string are aimed at the same place, so that both end there at times.
    """
    draw = np.random.default_rng([seed, case.number, 3])
    size = int(draw.integers(2, PHRASE_WIDTH + 1))
    reach = min(len(text), max(2, case.budget))
    place = int(draw.integers(1, reach))
    token_ends, strings, options = case.stops, case.strings, dict(case.options)
    if token_ends and draw.random() < 0.7:
        token_ends = (text[place], *token_ends[1:])
        if draw.random() < 0.4:  # the stop is just allowed, just ruled out, or out for longer
            options["min_new_tokens"] = place + int(draw.integers(0, 3))
    if strings and draw.random() < 0.7:
        spelt = b"".join(PIECES[token] for token in text[: place + 1])
        # The string may end before the token does.
        spelt = spelt[: len(spelt) - draw.integers(0, 2)][-draw.integers(1, 7) :]
        strings = (spelt.decode(errors="ignore") or strings[0], *strings[1:])
    if "phrases" in options and draw.random() < 0.7:
        place = int(draw.integers(1, reach))
        (_, value), *others = options["phrases"]
        options["phrases"] = [(tuple(text[max(0, place + 1 - size) : place + 1]), value), *others]
    return dataclasses.replace(case, stops=token_ends, strings=strings, options=options)


def build_request(cases: list[Case], seed: int) -> Request:
    """The arrays of a batch, of the same shapes whatever is asked for; row by row, no sharing."""

    def column(name: str, off: float, dtype=np.float32) -> Any:
        return np.asarray([case.options.get(name, off) for case in cases], dtype)

    bias = np.zeros((len(cases), VOCAB), np.float32)
    phrases = np.full((len(cases), NUM_PHRASES, PHRASE_WIDTH), NO_TOKEN, np.int32)
    phrase_bias = np.zeros((len(cases), NUM_PHRASES), np.float32)
    ends = np.full((len(cases), NUM_STOPS), NO_TOKEN, np.int32)
    for row, case in enumerate(cases):
        ends[row, : len(case.stops)] = case.stops
        for token, value in case.options.get("bias", {}).items():
            bias[row, token] = value
        for place, (ids, value) in enumerate(case.options.get("phrases", ())):
            phrases[row, place, PHRASE_WIDTH - len(ids) :] = ids
            phrase_bias[row, place] = value
    automata = stops.build([case.strings for case in cases], PIECES)
    table = np.zeros((STATES, VOCAB), np.int32)
    table[: len(automata.table)] = automata.table
    sampling: dict[str, Any] = {
        "temperature": column("temperature", 0),
        "top_k": column("top_k", 0, np.int32),
        "top_p": column("top_p", 1),
        "min_p": column("min_p", 0),
        "repetition_penalty": column("repetition_penalty", 1),
        "presence_penalty": column("presence_penalty", 0),
        "frequency_penalty": column("frequency_penalty", 0),
        "bias": bias,
        "phrases": phrases,
        "phrase_bias": phrase_bias,
        "min_new_tokens": column("min_new_tokens", 0, np.int32),
    }
    arrays: dict[str, Any] = {
        "max_new_tokens": np.asarray([case.budget for case in cases], np.int32),
        "stops": ends,
        "draft_depth": np.asarray(
            [99 if case.depth is None else case.depth for case in cases], np.int32
        ),
    }
    numbers = np.asarray([case.number for case in cases], np.uint32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)
    strings = StopStrings(jnp.asarray(table), automata.start)
    return Request(keys=keys, sampling=Sampling(**sampling), stop_strings=strings, **arrays)


def without_ends(case: Case) -> Case:
    """The case to the end of the capacity, so that a guess goes on behind every stop."""
    return dataclasses.replace(case, budget=CAPACITY, stops=(), strings=())


class Fuzzer:
    """Programs, traced anew for every fuzzer, and what the reference needs.

    ``loops`` are those of successive batches. ``guesser`` is a jitted decode of ``PLAIN`` that
    makes the text for the oracles; by default the fuzzer's own. ``drafters`` are the parameters of
    drafters that are none, by loop.
    """

    def __init__(
        self,
        seed: int,
        loops: tuple[Loop, ...] = LOOPS,
        guesser: Any = None,
        drafters: dict[Loop, Any] | None = None,
    ):
        self.seed, self.loops, self.drafters = seed, loops, drafters or {}
        self.lm, self.params = tiny_target()
        self.programs = {
            loop: jax.jit(functools.partial(decoding.decode, loop)) for loop in {*loops, PLAIN}
        }
        self.guesser = guesser or self.programs[PLAIN]
        self.summary = Summary()

        @jax.jit
        def raw_scores(tokens, lengths):
            hidden, _, _ = self.lm.hidden(self.params, tokens, lengths)
            return output_logits(self.params, hidden)

        self.raw_scores = raw_scores

    def run_batch(self, numbers: list[int]) -> None:
        """Decode and check requests of one batch; fewer than BATCH are filled up with the last."""
        loop = self.loops[numbers[0] // BATCH % len(self.loops)]
        cases = [draw_case(self.seed, number) for number in numbers]
        cases += cases[-1:] * (BATCH - len(cases))
        lengths = np.asarray([len(case.prompt) for case in cases], np.int32)
        prompts = np.zeros((BATCH, WIDTH), np.int32)
        for row, case in enumerate(cases):
            padding = np.random.default_rng([self.seed, case.number, 1]).integers(0, VOCAB, WIDTH)
            prompts[row] = (*case.prompt, *padding[len(case.prompt) :])
        unbounded = build_request([without_ends(case) for case in cases], self.seed)
        plain = np.asarray(self.guesser(self.params, (), prompts, lengths, unbounded).tokens)
        cases = [
            aim(case, self.seed, text) for case, text in zip(cases, plain.tolist(), strict=True)
        ]
        guess = self.drafters.get(loop, ())
        if isinstance(loop.drafter, OracleTree | OracleAhead):
            guess = self.guess(cases, plain)
        request = build_request(cases, self.seed)
        out = self.programs[loop](self.params, guess, prompts, lengths, request)
        out = jax.tree.map(np.asarray, out)
        scores = self.score(cases, out)
        for row, case in enumerate(cases[: len(numbers)]):
            self.check(loop, case, one_row(out, row), scores[row])

    def guess(self, cases: list[Case], plain: np.ndarray) -> np.ndarray:
        """Texts for the oracle, int32 [B, S]: ``plain`` [B, T] behind the prompts, or garbage."""
        texts = np.zeros((BATCH, TEXT + 8), np.int32)
        for text, case, answer in zip(texts, cases, plain, strict=True):
            draw = np.random.default_rng([self.seed, case.number, 2])
            text[:] = draw.integers(0, VOCAB, text.shape)
            place = text[len(case.prompt) : len(case.prompt) + CAPACITY]
            place[:] = np.where(draw.random(CAPACITY) < case.guess_quality, answer, place)
        return texts

    def score(self, cases, out: GenerateOutput) -> np.ndarray:
        """Raw scores [B, T, V] before every emitted token, each from its whole text."""
        text = np.zeros((BATCH, TEXT), np.int32)
        lengths = np.zeros(BATCH, np.int32)
        for row, case in enumerate(cases):
            emitted = np.clip(out.tokens[row, : max(out.lengths[row], 0)], 0, VOCAB - 1)
            lengths[row] = len(case.prompt) + len(emitted)
            text[row, : lengths[row]] = (*case.prompt, *emitted)
        raw = np.asarray(self.raw_scores(text, lengths))
        begin = np.asarray([len(case.prompt) - 1 for case in cases])
        index = np.minimum(begin[:, None] + np.arange(CAPACITY), TEXT - 1)
        return np.take_along_axis(raw, index[:, :, None], axis=1)

    def check(self, loop: Loop, case: Case, out: GenerateOutput, scores) -> None:
        summary = self.summary
        summary.requests += 1
        summary.tokens += int(out.lengths)
        summary.drafted += int(out.record.from_draft.sum())
        summary.finish[int(out.finish)] += 1
        ties, thresholds = [], []
        try:
            check_ends(loop, case, out)
            check_bookkeeping(loop, case, out)
            check_laws(case, out, scores, ties, thresholds)
        except AssertionError as error:
            name = type(loop.drafter).__name__
            summary.failures.append(
                f"{case}\n  drafter {name} {loop.drafter.max_depth}, tokens "
                f"{out.tokens.tolist()}, finish {out.finish}, emitted {out.stats.emitted.tolist()}"
                f"\n  {error}\n  again, with the same --methods: python -m tests.fuzz "
                f"--seed {self.seed} --only {case.number}"
            )
        summary.near_ties += bool(ties)
        summary.near_thresholds += bool(thresholds)


def one_row(out: GenerateOutput, row: int) -> GenerateOutput:
    return jax.tree.map(lambda array: array[row], out)


def limit_of(loop: Loop, case: Case) -> tuple[int, int]:
    """Most new tokens, and the reason to end there."""
    slots = loop.slots or TEXT + loop.drafter.max_depth + 1
    room = min(CAPACITY, slots - loop.drafter.max_depth - len(case.prompt))
    return (case.budget, OUT_OF_BUDGET) if case.budget <= room else (room, CACHE_FULL)


def end_of(loop: Loop, case: Case, tokens: list[int]) -> tuple[int, int | None]:
    """How many of the tokens the reference keeps, and why it ends there; None: it would go on."""
    limit, reason = limit_of(loop, case)
    if limit == 0:
        return 0, reason
    for n in range(1, len(tokens) + 1):
        if tokens[n - 1] in case.stops:
            return n, STOPPED
        text = b"".join(PIECES[token] for token in tokens[:n])
        if any(string.encode() in text for string in case.strings):
            return n, STOPPED_BY_STRING
        if n == limit:
            return n, reason
    return len(tokens), None


def check_ends(loop: Loop, case: Case, out: GenerateOutput) -> None:
    """The row ends where its own tokens make the reference end, and for the same reason."""
    length = int(out.lengths)
    assert 0 <= length <= CAPACITY, f"length {length}"
    tokens = out.tokens[:length].tolist()
    assert all(0 <= token < VOCAB for token in tokens), "padding among the tokens"
    assert (out.tokens[length:] == PAD).all(), "no padding past the length"
    expected = end_of(loop, case, tokens)
    found = length, int(out.finish)
    assert found == expected, f"(length, finish): expected {expected}, found {found}"


def check_bookkeeping(loop: Loop, case: Case, out: GenerateOutput) -> None:
    """Counters and record tell the same story of rounds."""
    stats, drafted, length = out.stats, out.record.from_draft, int(out.lengths)
    emitted = stats.emitted[stats.emitted > 0].tolist()
    deepest = loop.drafter.max_depth if case.depth is None else case.depth
    deepest = min(deepest, loop.drafter.max_depth)
    assert int(stats.rounds) == len(emitted), f"rounds {stats.rounds}, emitted {emitted}"
    assert stats.emitted[: len(emitted)].tolist() == emitted, "an empty round"
    assert sum(emitted) == length, f"emitted {emitted}, length {length}"
    waits = not hasattr(loop.drafter, "ahead")  # then a round ends with the target's token
    most = deepest + 1 if waits else max(deepest, 1)
    assert max(emitted, default=0) <= most, f"emitted {emitted}, depth {deepest}"
    assert not drafted[length:].any(), "drafted past the length"
    refused: Any = out.record.refused
    assert not (refused & drafted).any() and not refused[length:].any(), "refused drafted tokens"
    accepted, place = np.zeros(loop.drafter.max_depth, int), 0
    for count in emitted:
        kept = drafted[place : place + count]
        assert kept[:-1].all(), f"own token inside the round at {place}"
        accepted += np.arange(len(accepted)) < kept.sum()
        place += count
    found = stats.accepted.tolist()
    assert found == accepted.tolist(), f"accepted: expected {accepted}, found {found}"
    assert accepted.sum() == drafted.sum()
    assert (stats.drafted >= stats.accepted).all() and not stats.drafted[deepest:].any()
    # The last round's own token may have been cut.
    own = length - drafted.sum()
    assert own in (len(emitted), len(emitted) - 1) or (not waits and own < len(emitted))
    if out.record.logprobs is not None:
        assert not out.record.logprobs[length:].any(), "log-probabilities past the length"


def check_laws(case: Case, out: GenerateOutput, scores, ties: list, thresholds: list) -> None:
    """Every token is what its law allows; notes the places where rounding decides."""
    tokens = out.tokens[: int(out.lengths)].tolist()
    logprobs = [None] * len(tokens) if out.record.logprobs is None else out.record.logprobs
    for place, token in enumerate(tokens):

        def law(raw, prefix=tuple(tokens[:place])):
            options = case.options
            return reference_scores(raw, case.prompt, prefix, stops=case.stops, **options)

        processed = law(scores[place])
        best = np.sort(processed)
        if case.is_greedy and best[-1] - best[-2] < ROUNDING:
            ties.append(place)
        wrong = disagreement(case, processed, token, logprobs[place])
        if wrong and not case.is_greedy:
            # Rounding may push a token across a threshold: is it allowed for scores close by?
            draw = np.random.default_rng(place)
            for _ in range(64):
                noise = draw.uniform(-ROUNDING, ROUNDING, VOCAB)
                near = law(scores[place] + noise)
                if not disagreement(case, near, token, logprobs[place]):
                    thresholds.append(place)
                    wrong = None
                    break
        assert not wrong, f"token {place}: {wrong}"


def disagreement(case: Case, processed, token: int, logprob) -> str | None:
    """What is wrong with a token under its law; None where nothing is."""
    best = int(np.argmax(processed))
    if not np.isfinite(processed[token]):
        return f"{token} is ruled out"
    if case.is_greedy and processed[token] < processed[best] - ROUNDING:
        return f"expected {best}, found {token}"
    if logprob is not None:
        shifted = processed - processed[best]
        expected = shifted[token] - math.log(np.exp(shifted).sum())
        if abs(expected - logprob) > 1e-3:
            return f"log-probability of {token}: expected {expected:.5f}, found {logprob:.5f}"
    return None


def run(num_requests: int, seed: int, first: int = 0, *, progress=False, **fields) -> Summary:
    """Draw, decode and check requests ``first`` to ``first + num_requests - 1``.

    Programs are traced anew, so a fault that was planted before the call is seen. ``fields`` are
    those of ``Fuzzer``.
    """
    fuzzer, begin = Fuzzer(seed, **fields), time.perf_counter()
    numbers = range(first, first + num_requests)
    batches = [[*group] for _, group in itertools.groupby(numbers, lambda n: n // BATCH)]
    for batch in tqdm(batches, unit=" batches", disable=not progress):
        fuzzer.run_batch(batch)
    fuzzer.summary.seconds = time.perf_counter() - begin
    return fuzzer.summary


def main() -> None:
    """Run, print the differences and one line, and say by the exit status whether there are any."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10000, help="how many (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the requests (default: 0)")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this request alone")
    parser.add_argument("--methods", metavar="NAMES", help="drafters of these, or of all")
    args = parser.parse_args()
    fields: dict[str, Any] = {}
    if args.methods:
        names = [*recipes.RECIPES] if args.methods == "all" else args.methods.split(",")
        fields["drafters"] = dict(map(of_method, names))
        fields["loops"] = tuple(fields["drafters"])
    # An accelerator would round products of float32 to far less.
    jax.config.update("jax_default_matmul_precision", "highest")
    alone = args.only is not None
    summary = run(
        1 if alone else args.requests,
        args.seed,
        args.only if alone else 0,
        progress=not alone,
        **fields,
    )
    for failure in summary.failures:
        print(failure)
    print(summary.line())
    raise SystemExit(1 if summary.failures else 0)


if __name__ == "__main__":
    main()
