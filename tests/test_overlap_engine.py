"""A drafter that works ahead of the target, from a folder to answers, streams and conversations."""

import functools

import pytest

from ctc_spec_jax.draft.pearl import AheadLM
from ctc_spec_jax.draft.small_lm import Best, Drawn
from ctc_spec_jax.engine import Engine
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models import convert
from ctc_spec_jax.streaming import Conversation
from tests.chats import letter_tokenizer
from tests.helpers import tiny_target

CONTEXT, BUDGET = 160, 10  # a last round whose drafts are all kept, so that more are pending
TEMPLATE = (
    "{% for m in messages %}{{ 'b:' if m.role == 'user' else 'a:' }}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
"""Of letters that the target has."""


@functools.cache
def target():
    return tiny_target(num_layers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ahead") / "model"
    convert.save_target(folder, *target())
    letter_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def engine(folder):
    """The target drafts for itself, so that all drafts are right."""
    tokenizer = letter_tokenizer()
    tokenizer.model_max_length, tokenizer.chat_template = CONTEXT, TEMPLATE
    return Engine(*target(), tokenizer).with_drafter(folder, 4, method="pearl")


def test_a_folder_drafts_ahead_by_the_name_of_the_method(engine, folder):
    lm = target()[0]
    assert engine.drafter == AheadLM(lm, 3, Best())
    drawn = engine.with_drafter(folder, 9, tree="sampled", method="pearl")
    assert drawn.drafter == AheadLM(lm, 8, Drawn())
    message = "tree nodes: expected at least 3, a root and two drafts, .* found 2"
    with pytest.raises(InputError, match=message):
        engine.with_drafter(folder, 2, method="pearl")
    with pytest.raises(InputError, match="tree: expected one of greedy, sampled, found 'beam'"):
        engine.with_drafter(folder, 4, tree="beam", method="pearl")
    with pytest.raises(InputError, match="method: expected one without parameters, found 'pearl'"):
        engine.with_method("pearl", 4, 3)


def test_streams_and_conversations(engine):
    """A turn whose cache is kept answers as a fresh decode; drafts of the last turn are dropped."""
    prompt = engine.tokenizer("b:ab\na:")["input_ids"]
    pieces = list(engine.stream(prompt, BUDGET, rounds=2))
    plain = engine.plain().generate([prompt], BUDGET)[0]
    assert [token for piece in pieces for token in piece.tokens] == plain.tokens
    assert all(all(piece.from_draft) for piece in pieces)
    assert pieces[-1].rounds == 1 + -(-(BUDGET - 1) // 3)

    chat = Conversation(engine, max_new_tokens=BUDGET, rounds=2)
    for text in ("ab", "dc", "b"):
        before = [*chat.messages, {"role": "user", "content": text}]
        ids = engine.tokenizer.apply_chat_template(
            before, add_generation_prompt=True, return_dict=False
        )
        pieces = list(chat.send(text))
        assert all(all(piece.from_draft) for piece in pieces)
        answer = "".join(map(str, pieces))
        assert answer == engine.plain().generate([ids], BUDGET)[0].text and answer
