"""The host side: options per row, seeds, streams, conversations, memory, compiling ahead."""

import dataclasses

import jax
import numpy as np
import pytest

from ctc_spec_jax import decode as loop_of
from ctc_spec_jax import memory, options, xla
from ctc_spec_jax.draft.ctc import CTCDrafter, ctc_config
from ctc_spec_jax.engine import Engine
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.models.decoder import DecoderLM
from ctc_spec_jax.options import Options
from ctc_spec_jax.streaming import Conversation
from ctc_spec_jax.tree.ctc_prefix import PrefixTree
from train import corpus

VOCAB = 300
TEXT = "def source(files):\n    return [f for f in files if f]\n\nimport os\n" * 30
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
EVERYTHING = {
    "temperature": 0.9,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.01,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.2,
    "min_new_tokens": 4,
    "logit_bias": {5: 1.5},
    "bad_words_ids": [[7, 8], [9]],
    "stop_strings": ["zq"],
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    """Two layers, width 32, byte-level BPE, and an untrained CTC drafter."""
    shape = dict(num_heads=4, num_kv_heads=2, head_width=8, mlp_width=48, tied_embeddings=True)
    lm = DecoderLM(DecoderConfig(vocab_size=VOCAB, width=32, num_layers=2, **shape))

    def enlarge(path, x):
        return x if x.ndim < 2 else x * (50.0 if "embedding" in str(path) else 16.0)

    params = jax.tree_util.tree_map_with_path(enlarge, lm.init(jax.random.key(1)))
    tokenizer = corpus.train_tokenizer([TEXT], VOCAB)
    tokenizer.model_max_length = 160
    tokenizer.chat_template = TEMPLATE
    drafter = CTCDrafter(ctc_config(lm.config, 1, 6), PrefixTree(8, 4))
    draft_params = drafter.init_params(jax.random.key(2))
    return Engine(lm, params, tokenizer, drafter, draft_params, stop_ids=(0,))


PROMPTS = ["def source(", "import os\n", "return [f for f in files"]


def test_rows_do_not_depend_on_the_batch(engine):
    """Mixed greedy and sampled rows with everything on; each alone with its seed is the same."""
    rows = {name: [value, value, value] for name, value in EVERYTHING.items()}
    rows["temperature"] = [0.9, 0.0, 1.3]
    rows["stop_strings"] = [["zq"], None, ["qz", "xx"]]
    budgets = [20, 12, 16]
    answers = engine.generate(PROMPTS, budgets, seed=[5, 6, 7], logprobs=2, **rows)
    for i, answer in enumerate(answers):
        own = {name: values[i : i + 1] for name, values in rows.items()}
        # Strings that no answer holds: without any, the row would need a program of its own.
        own["stop_strings"] = [own["stop_strings"][0] or ["zzzzz"]]
        alone = engine.generate(PROMPTS[i : i + 1], budgets[i], seed=5 + i, logprobs=2, **own)[0]
        assert alone.tokens == answer.tokens and alone.finish == answer.finish
        assert alone.from_draft == answer.from_draft and alone.emitted == answer.emitted
        np.testing.assert_allclose(alone.logprobs, answer.logprobs, atol=1e-4)
    swapped = engine.generate(
        PROMPTS[::-1],
        budgets[::-1],
        seed=[7, 6, 5],
        logprobs=2,
        **{name: values[::-1] for name, values in rows.items()},
    )
    assert [answer.tokens for answer in swapped[::-1]] == [answer.tokens for answer in answers]


def test_seeds(engine):
    def texts(seed, count=3):
        answers = engine.generate(PROMPTS[:1] * count, 16, seed=seed, temperature=1.0)
        return [answer.tokens for answer in answers]

    first = texts(3)
    assert first == texts(3)
    assert first[:1] == texts(3, 1)
    assert first[0] != first[1] != first[2]
    assert first[0] != texts(4)[0]
    assert texts([3, 4, 3]) == [first[0], texts(4)[0], first[0]]


@pytest.mark.parametrize("rounds", [1, 3, 100])
def test_stream_is_the_answer(engine, rounds):
    """Whatever the chunks: text, tokens, provenance, finish; from one program call per chunk."""
    fields = EVERYTHING | {"stop_strings": None}
    whole = engine.generate(PROMPTS[:1], 24, seed=9, **fields)[0]
    pieces = list(engine.stream(PROMPTS[0], 24, rounds=rounds, seed=9, **fields))
    assert "".join(map(str, pieces)) == whole.text
    assert [t for piece in pieces for t in piece.tokens] == whole.tokens
    assert [d for piece in pieces for d in piece.from_draft] == whole.from_draft
    assert pieces[-1].finish == whole.finish and pieces[-1].rounds == whole.rounds
    assert all(piece.finish == "running" for piece in pieces[:-1])
    assert len(pieces) <= -(-whole.rounds // rounds)


def test_stop_strings_end_text_tokens_and_counts_together(engine):
    """A string inside the greedy answer cuts it at the token that completes it, drafted or not."""
    whole = engine.generate(PROMPTS[:1], 24)[0]
    assert len(whole.text) > 12
    for stop in (whole.text[5:8], whole.text[9:10], whole.text[3:12]):
        answer = engine.generate(PROMPTS[:1], 24, stop_strings=stop, logprobs=0)[0]
        ends = [n for n in range(1, 25) if stop in engine.decode_text(whole.tokens[:n])]
        assert answer.tokens == whole.tokens[: ends[0]]
        assert answer.finish == "stop_string" and answer.stop_string == stop
        assert answer.text == engine.decode_text(answer.tokens)
        assert answer.text_before_stop == answer.text[: answer.text.index(stop)]
        assert len(answer.logprobs) == len(answer.from_draft) == sum(answer.emitted) == ends[0]
        assert sum(answer.accepted) == sum(answer.from_draft)


def test_logprobs_are_those_of_the_processed_law(engine):
    """Each is among the best where it should be; greedy rows take the best token."""
    greedy, drawn = engine.generate(PROMPTS[:2], 12, logprobs=3, temperature=[0, 0.7], top_k=[0, 3])
    for token, value, top in zip(greedy.tokens, greedy.logprobs, greedy.top_logprobs, strict=True):
        assert top[0][0] == token and top[0][1] == value
    for token, value, top in zip(drawn.tokens, drawn.logprobs, drawn.top_logprobs, strict=True):
        assert dict(top)[token] == value  # top_k 3: the three best are all there is
        np.testing.assert_allclose(sum(np.exp(v) for _, v in top), 1.0, rtol=1e-5)


def test_greedy_options_hold_under_drafts(engine):
    """Every processor on, greedy: the drafted answer is the plain one."""
    fields = {k: v for k, v in EVERYTHING.items() if k not in ("temperature", "stop_strings")}
    ours = engine.generate(PROMPTS, 24, **fields)
    plain = engine.plain().generate(PROMPTS, 24, **fields)
    bare = engine.plain().generate(PROMPTS, 24)
    assert [a.tokens for a in ours] == [a.tokens for a in plain]
    assert all(a.tokens != b.tokens for a, b in zip(ours, bare, strict=True))
    assert not any(9 in a.tokens for a in ours)


def test_draft_depth(engine):
    """Depth 0 is plain decoding by another name; a row's depth is its own and changes no token."""
    answers = engine.generate(PROMPTS, 16, draft_depth=[0, 1, None])
    free = engine.generate(PROMPTS, 16)
    assert [a.tokens for a in answers] == [a.tokens for a in free]
    assert answers[0].rounds == 16 and sum(answers[0].drafted) == 0
    assert sum(answers[1].drafted[1:]) == 0 < answers[1].drafted[0]
    assert answers[2].drafted == free[2].drafted


def test_a_bucket_compiles_once(engine):
    function = xla.jitted(loop_of.decode)
    engine.compile_ahead(prompt_length=20, max_new_tokens=30, temperature=1.0, top_p=0.5)
    before = function._cache_size()
    for prompt, budget in (([1, 2, 3], 30), (list(range(1, 30)), 9), ("import os", 32)):
        engine.generate([prompt], budget, temperature=0.3, top_p=0.9, seed=budget)
    assert function._cache_size() == before
    engine.generate([[1, 2, 3]], 30, temperature=0.3, top_k=4, seed=1)
    assert function._cache_size() == before + 1


def test_buckets():
    for size in range(1, 5000):
        assert size <= xla.bucket(size) <= max(size + 31, size * 5 // 4)
    assert len({xla.bucket(size) for size in range(1, 4097)}) < 30


MISTAKES = [
    ({"temperature": -0.5}, "temperature: expected 0 .* or 1e-6 to 1e6, found -0.5"),
    # In float32 the logits over it are infinite, and the law is no number.
    ({"temperature": 1e-40}, "temperature: expected 0 .* or 1e-6 to 1e6, found 1e-40"),
    ({"temperature": 1e39}, "temperature: expected 0 .* or 1e-6 to 1e6, found 1e\\+39"),
    ({"temperature": float("nan")}, "temperature: expected .* found nan"),
    ({"top_p": 0}, r"top_p: expected a number above 0 and at most 1, found 0"),
    ({"top_p": 1.01}, r"top_p: expected .*, found 1.01"),
    ({"top_k": 2.5}, "top_k: expected a whole number, .* found 2.5"),
    ({"top_k": -2}, "top_k: expected .*, found -2"),
    ({"min_p": 2}, "min_p: expected .* found 2"),
    ({"repetition_penalty": 0}, "repetition_penalty: expected .* from 1e-6 to 1e6, found 0"),
    ({"frequency_penalty": 1e39}, "frequency_penalty: expected .* -1e9 to 1e9, found 1e\\+39"),
    ({"presence_penalty": float("inf")}, "presence_penalty: expected .* found inf"),
    ({"min_new_tokens": -1}, "min_new_tokens: expected at least 0, found -1"),
    ({"stop_strings": ["a", ""]}, "stop_strings: expected non-empty strings, found ''"),
    ({"stop_strings": [["a"]]}, "stop_strings: expected one .* the 3 prompts, found 1"),
    ({"bad_words_ids": [[]]}, "bad_words_ids: expected at least one token id, found none"),
    ({"bad_words_ids": [5, 6]}, r"bad_words_ids: expected a list of lists .* found \[5, 6\]"),
    ({"stop_token_ids": 5}, "stop_token_ids: expected a list of token ids, found 5"),
    ({"stop_token_ids": iter([5])}, "stop_token_ids: expected a list of token ids, found <list_it"),
    ({"stop_strings": 5}, "stop_strings: expected a string or a list of strings, found 5"),
    ({"ignore_eos": "no"}, "ignore_eos: expected True or False, found 'no'"),
    ({"logit_bias": 5}, "logit_bias: expected a mapping from tokens to numbers, found 5"),
    ({"logit_bias": {5: float("inf")}}, "logit_bias: expected numbers of at most 1e9, found inf"),
    ({"logit_bias": {5: float("nan")}}, "logit_bias: expected numbers of at most 1e9, found nan"),
    ({"logit_bias": {5: "1"}}, "logit_bias: expected numbers of at most 1e9, found '1'"),
    ({"bad_words_ids": [[i] for i in range(VOCAB)]}, "a token that may come first, found all 300"),
    (
        {"bad_words_ids": [[i] for i in range(1, VOCAB)], "min_new_tokens": 1},
        "a token that may come first, found all 300 ruled out",
    ),
    ({"bad_words_ids": [[VOCAB]]}, f"expected token ids below .* {VOCAB}, found {VOCAB}"),
    ({"stop_token_ids": [-1]}, "stop_token_ids: expected token ids .* found -1"),
    ({"logit_bias": {VOCAB: 1.0}}, f"logit_bias.* below .* {VOCAB}, found {VOCAB}"),
    ({"temperature": [0.5, 0.6]}, "temperature: expected one .* the 3 prompts, found 2"),
    ({"seed": [1, 2]}, "seed: expected one for each of the 3 prompts, found 2"),
    ({"seed": 0.5}, "seed: expected whole numbers of 64 bits, found 0.5"),
    ({"seed": [1, 2**64, 3]}, "seed: expected whole numbers of 64 bits, found 1844"),
    ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, found 0"),
    ({"logprobs": VOCAB + 1}, f"logprobs: expected 0 to {VOCAB} or None, found"),
    ({"beams": 3}, "option beams: expected one of bad_words_ids, .* found it"),
]


@pytest.mark.parametrize(("fields", "pattern"), MISTAKES, ids=lambda v: str(v)[:30])
def test_bad_options(engine, fields, pattern):
    with pytest.raises(InputError, match=pattern):
        engine.generate(PROMPTS, **{"max_new_tokens": 4, **fields})


def test_bad_prompts_and_keys(engine):
    with pytest.raises(InputError, match="prompts: expected a list of prompts, found one text"):
        engine.generate("abc", 4)
    tokens, lengths = engine.encode(PROMPTS[:2])
    decode = engine.decode_function(4)
    for key, found in (
        (jax.random.PRNGKey(0), r"uint32 of shape \(2,\)"),
        (jax.random.split(jax.random.key(0), 3), r"key<fry> of shape \(3,\)"),
    ):
        with pytest.raises(
            InputError, match=f"key: expected one of .*, or 2 of them, found {found}"
        ):
            decode(engine.params, engine.draft_params, tokens, lengths, key)


def test_numbers_beyond_int32_are_no_limit():
    names = ("max_new_tokens", "min_new_tokens", "draft_depth", "top_k")
    rows = [Options(temperature=1.0, **dict.fromkeys(names, 2**40))]
    request = options.build_request(rows, None, (0,), VOCAB, list)
    found = (request.max_new_tokens, request.draft_depth)
    found += (request.sampling.min_new_tokens, request.sampling.top_k)
    assert [column.tolist() for column in found] == [[2**31 - 1]] * 4


@pytest.mark.parametrize("off", [0, -1, None])
def test_every_way_to_turn_top_k_off(engine, off):
    plain = engine.generate(PROMPTS[:1], 8, temperature=1.0, seed=1)[0]
    assert engine.generate(PROMPTS[:1], 8, temperature=1.0, top_k=off, seed=1)[0].tokens == (
        plain.tokens
    )


def test_off_values_compile_nothing_extra():
    """A batch that uses no option gets the arrays of a greedy one."""
    rows = options.per_row(2, {"top_k": [0, None], "top_p": 1, "temperature": [0, None]})
    request = options.build_request(rows, None, (0,), VOCAB, list)
    assert all(
        getattr(request.sampling, field.name) is None
        for field in dataclasses.fields(request.sampling)
    )
    assert request.stop_strings is None and request.draft_depth is None


def test_per_row_nesting():
    """Lists that belong to one row are not mistaken for one value per row."""
    one = options.per_row(2, {"stop_strings": ["a", "b"], "bad_words_ids": [[1, 2], [3]]})
    assert one == [Options(stop_strings=["a", "b"], bad_words_ids=[[1, 2], [3]])] * 2
    two = options.per_row(2, {"stop_strings": [["a"], None], "bad_words_ids": [[], [[1]]]})
    assert two[0] == Options(stop_strings=["a"], bad_words_ids=[])
    assert two[1] == Options(bad_words_ids=[[1]])
    assert options.per_row(2, {"stop_strings": [None, None]}) == [Options()] * 2
    assert options.per_row(2, {"stop_strings": [[], None]}) == [Options(stop_strings=[]), Options()]
    none = options.per_row(2, {"bad_words_ids": [[], []], "temperature": np.array(0.5)})
    assert none == [Options(bad_words_ids=[], temperature=0.5)] * 2


def test_a_batch_beyond_the_memory(engine, monkeypatch):
    """Refused with both numbers before anything is allocated."""
    monkeypatch.setattr(memory, "available_bytes", lambda: 50_000)
    pattern = (
        r"batch: expected .* 0\.00 GiB .* free, found 3 rows \(caches of \d+ slots .*\) .* GiB"
    )
    with pytest.raises(InputError, match=pattern):
        engine.generate(PROMPTS, 16)
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    engine.generate(PROMPTS, 16)


def test_memory_estimate_is_that_of_the_state(engine):
    tokens, lengths = engine.encode(PROMPTS, 16)
    loop = engine.loop(32)
    rows = options.per_row(3, {"max_new_tokens": 16})
    request = engine.request(rows, loop_of.row_keys(jax.random.key(0), 3))
    state = loop_of.start(loop, engine.params, engine.draft_params, tokens, lengths, request)
    needed = memory.decode_bytes(loop, engine.params, engine.draft_params, tokens, lengths, request)
    size = memory.tree_bytes(state)
    assert size < needed < size + 4 * (3 * 3 * 8 * VOCAB + 3 * 4 * 32 * 32)


def fresh_answer(engine, messages, budget):
    """The answer of an engine that knows nothing of earlier turns."""
    ids = engine.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    return engine.generate([ids], budget)[0]


@pytest.mark.parametrize("plain", [False, True])
def test_conversation_keeps_its_cache(engine, plain):
    """Every turn equals a fresh decode of the whole conversation; only what is new is prefilled."""
    engine = engine.plain() if plain else engine
    chat = Conversation(engine, max_new_tokens=10, system="Be brief.", rounds=2)
    widths = []
    for text in ("import os", "def f(x):", "more"):
        before = [*chat.messages, {"role": "user", "content": text}]
        known = chat._state
        answer = "".join(map(str, chat.send(text)))
        assert answer == fresh_answer(engine, before, 10).text
        assert chat.messages == [*before, {"role": "assistant", "content": answer}]
        widths.append(known is not None)
    assert widths == [False, True, True]


def test_conversation_rolls_back(engine):
    """A message that is taken back, and an answer that is not read to its end."""
    chat = Conversation(engine, max_new_tokens=12, rounds=1)
    list(chat.send("import os"))
    chat.messages = chat.messages[:-2]
    text = "".join(map(str, chat.send("import re")))
    assert text == fresh_answer(engine, [{"role": "user", "content": "import re"}], 12).text
    pieces = chat.send("def f(x):")
    first = next(pieces)
    pieces.close()
    assert chat.messages[-1] == {"role": "assistant", "content": first.text}
    before = [*chat.messages, {"role": "user", "content": "more"}]
    assert "".join(map(str, chat.send("more"))) == fresh_answer(engine, before, 12).text


def test_conversation_goes_on_beside_an_open_answer(engine):
    """One that was never read, and one that is still held; both end at the next message."""
    chat = Conversation(engine, max_new_tokens=12, rounds=1)
    list(chat.send("import os"))
    kept = list(chat.messages)
    unread = chat.send("forget me")
    pieces = chat.send("def f(x):")
    assert chat.messages == kept and list(unread) == []
    first = next(pieces)
    answer = chat.send("more")
    assert chat.messages[-1] == {"role": "assistant", "content": first.text}
    assert len(chat.messages) == len(kept) + 2 and list(pieces) == []
    before = [*chat.messages, {"role": "user", "content": "more"}]
    assert "".join(map(str, answer)) == fresh_answer(engine, before, 12).text


def test_conversation_that_is_full(engine):
    """The cache ends an answer; then the next message is refused and nothing is lost."""
    chat = Conversation(engine, context=40, max_new_tokens=64)
    pieces = list(chat.send("import os"))
    assert pieces[-1].finish == "cache_full"
    kept = list(chat.messages)
    with pytest.raises(InputError, match=r"conversation: expected at most \d+ tokens .* found \d+"):
        chat.send("import re")
    assert chat.messages == kept


def test_conversation_needs_a_template(engine):
    tokenizer = corpus.train_tokenizer([TEXT], VOCAB)
    bare = dataclasses.replace(engine, tokenizer=tokenizer)
    with pytest.raises(InputError, match="chat template: expected one in the tokenizer .* none"):
        Conversation(bare)
    with pytest.raises(InputError, match="context: expected 2 to .* 160 positions, found 500"):
        Conversation(engine, context=500)
