"""A tokenizer, chat templates and a slow way to label chats, for tests of training data."""

from __future__ import annotations

import gzip
import json
import pathlib

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, END, START = "<s>", "<|im_end|>", "<|im_start|>"

CHATML = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Without generation tags, and with a BOS of its own, as that of Llama 3."""

TAGGED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>\\n' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
)
"""The same text with generation tags."""

THOUGHTS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '(thought)\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Writes thoughts in the last answer only, so an earlier answer is rewritten by the next turn."""

PLAIN = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
"""Letters alone, no special tokens."""

TEXT = "the cat sat on the mat and the dog sat on the cat.\n\nso it goes, and so  it goes on "


def byte_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE that, like Llama 3's, adds a BOS and trims blanks off the places of tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=[BOS, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    bos = tokenizer.token_to_id(BOS)
    with_bos = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    trimmed = processors.ByteLevel(trim_offsets=True)
    tokenizer.post_processor = processors.Sequence([trimmed, with_bos])
    result = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=END, pad_token=END
    )
    result.chat_template = template
    return result


def letter_tokenizer(template: str | None = PLAIN) -> PreTrainedTokenizerFast:
    """One token per character, whose id is its place in ``LETTERS``."""
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(LETTERS)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    result = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    result.chat_template = template
    return result


LETTERS = "?:\n abcdefghijklmnopqrstuvwxyz"


def chatml(messages, prompt: bool = False) -> str:
    """What ``CHATML`` renders, without Jinja."""
    text = BOS + "".join(f"{START}{m['role']}\n{m['content']}{END}\n" for m in messages)
    return text + f"{START}assistant\n" if prompt else text


def slow_labels(tokenizer, messages, render=chatml) -> tuple[list[int], list[bool]]:
    """Ids of a chat and its labels: what every answer adds to the tokens before it."""

    def ids(text):
        return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    whole = ids(render(messages))
    trained = [False] * len(whole)
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            before = ids(render(messages[:place], prompt=True))
            after = ids(render(messages[: place + 1]))
            assert whole[: len(before)] == before and whole[: len(after)] == after
            trained[len(before) : len(after)] = [True] * (len(after) - len(before))
    return whole, trained


def write_lines(path: pathlib.Path, lines) -> str:
    """Write JSON lines (bytes stay as they are), compressed if the name ends in .gz."""
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    data = b"\n".join([*encoded, b""])
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)
