"""Documents of training files: ids, labels, what is left out, and what is kept on disk.

Labels are compared with those of a slow reference, or written down by hand.
"""

import concurrent.futures
import dataclasses
import pathlib

import numpy as np
import pytest

from ctc_spec_jax.errors import InputError
from tests import chats
from train import data, reader
from train.config import Data

LENGTH = 4000

DIALOGUES = [
    [("user", "the cat?"), ("assistant", "so it goes")],
    [
        ("system", "sat on"),
        ("user", "it"),
        ("assistant", " \n\nthe  mat \n"),
        ("user", "naïve 日本"),
    ],
    # The same words from both.
    [("user", "a"), ("assistant", "the"), ("user", "the"), ("assistant", "the")] * 2,
    [("user", "x<|im_start|>assistant\nthe<|im_end|>\n"), ("assistant", "the"), ("user", "y")],
    [("system", ""), ("user", "dog"), ("assistant", "日本<|im_end|> it goes")],
]


def messages(dialogue) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in dialogue]


def options(folder: pathlib.Path, **fields) -> Data:
    return Data(cache=str(folder / "cache"), **fields)


def read(folder, lines, tokenizer, length: int = LENGTH, name="file.jsonl", **fields):
    path = chats.write_lines(folder / name, lines)
    return data.read_files((path,), tokenizer, options(folder, **fields), length)


def as_lists(documents) -> list[tuple[list[int], list[bool]]]:
    return [
        (ids.tolist(), trained.tolist())
        for ids, trained in map(documents.__getitem__, range(len(documents)))
    ]


@pytest.mark.parametrize("template", [chats.CHATML, chats.TAGGED], ids=["difference", "tags"])
def test_chats_in_every_form_have_the_labels_of_the_reference(tmp_path, template):
    tokenizer = chats.byte_tokenizer(template)
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    lines, expected = [], []
    for dialogue in DIALOGUES:
        lines += [
            {"messages": messages(dialogue), "id": 3},
            {"conversations": messages(dialogue)},
            {"conversations": [{"from": names[role], "value": text} for role, text in dialogue]},
        ]
        expected += [chats.slow_labels(tokenizer, messages(dialogue))] * 3
    found = as_lists(read(tmp_path, lines, tokenizer, name="file.jsonl.gz"))
    assert found == expected
    bos = tokenizer.bos_token_id
    assert all(ids[0] == bos and bos not in ids[1:] for ids, _ in found)


def test_blanks_of_an_answer_are_labels(tmp_path):
    """The tokenizer itself would place them outside the answer."""
    tokenizer = chats.byte_tokenizer(chats.CHATML)
    dialogue = messages([("user", "a"), ("assistant", "\n\n  so \n\n")])
    ids, trained = read(tmp_path, [{"messages": dialogue}], tokenizer)[0]
    assert tokenizer.decode(ids[trained]) == "\n\n  so \n\n<|im_end|>\n"


def test_labels_by_hand_letter_by_letter(tmp_path):
    tokenizer = chats.letter_tokenizer()
    lines = [
        {"messages": messages([("user", "hi"), ("gpt", "yo"), ("user", "a"), ("gpt", "yo")])},
        {"text": "all of it"},
        {"messages": messages([("user", "a:b"), ("assistant", "a:b")])},
    ]
    texts = ["u:hi\na:yo\nu:a\na:yo\n", "all of it", "u:a:b\na:a:b\n"]
    marks = [".......###......###", ".########", "........####"]
    found = as_lists(read(tmp_path, lines, tokenizer))
    assert found == [
        ([chats.LETTERS.index(c) for c in text], [c == "#" for c in mark])
        for text, mark in zip(texts, marks, strict=True)
    ]
    everything = read(tmp_path, lines, tokenizer, train_on="all")
    assert all(
        trained[1:].all() and not trained[0] for _, trained in map(everything.__getitem__, range(3))
    )


def test_a_token_that_begins_in_the_header_is_no_label(tmp_path):
    template = chats.PLAIN.replace("':'", "': '").replace("'a:'", "'a: '")
    tokenizer = chats.byte_tokenizer(template)
    ids, trained = read(
        tmp_path, [{"messages": messages([("user", "it"), ("assistant", "the cat")])}], tokenizer
    )[0]
    assert tokenizer.decode(ids) == "u: it\na: the cat\n"
    assert tokenizer.decode(ids[trained]) == " cat\n"


def test_a_template_that_rewrites_earlier_answers(tmp_path):
    """The answers are found by header and footer; thoughts of the last one are labels."""
    tokenizer = chats.byte_tokenizer(chats.THOUGHTS)
    dialogue = [("user", "a"), ("assistant", "so"), ("user", "b"), ("assistant", "so")]
    ids, trained = read(tmp_path, [{"messages": messages(dialogue)}], tokenizer)[0]
    runs = [tokenizer.decode(ids[a:b]) for a, b in reader.spans(trained)]
    assert runs == ["so<|im_end|>\n", "(thought)\nso<|im_end|>\n"]


def test_a_chat_may_begin_with_an_answer(tmp_path):
    tokenizer = chats.byte_tokenizer(chats.CHATML)
    dialogue = [("assistant", "the"), ("user", "a"), ("assistant", "the")]
    ids, trained = read(tmp_path, [{"messages": messages(dialogue)}], tokenizer)[0]
    assert [ids[a:b].tolist() for a, b in reader.spans(trained)] == [
        chats.slow_labels(tokenizer, messages(dialogue[1:]))[0][-3:]
    ] * 2


def test_answers_that_cannot_be_told_from_questions_are_skipped(tmp_path):
    """An end of text after the last answer alone, and a count of messages before the first."""
    last = "}}{% if loop.last and m.role == 'assistant' %}<|im_end|>{% endif %}"
    ends = chats.CHATML.replace("+ '<|im_end|>\\n' }}", last)
    counted = chats.PLAIN.replace("{% for", "{{ messages | length }}{% for").replace("'a:'", "' '")
    assert ends != chats.CHATML and counted != chats.PLAIN
    dialogue = messages([("user", "a"), ("assistant", "so"), ("user", "b"), ("assistant", "it")])
    for template, reason in [(ends, "its answers end in several"), (counted, "it rewrites")]:
        with pytest.raises(InputError, match=f"1: template does not fit: {reason}"):
            read(tmp_path, [{"messages": dialogue}], chats.byte_tokenizer(template))


def test_ids_win_over_messages_and_texts_get_one_bos_and_an_end(tmp_path):
    tokenizer = chats.byte_tokenizer(chats.CHATML)
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = [bos, 20, 21, 22, 23]
    line = {"id": "x", "input_ids": ids, "loss_mask": [1, 0, 1, 1, 0]}
    line["messages"] = messages(DIALOGUES[0])
    text = tokenizer.backend_tokenizer.encode("so it goes", add_special_tokens=False).ids
    texts = [{"text": "so it goes"}, {"text": "<s>so it goes"}, {"text": "so it goes<|im_end|>"}]
    found = as_lists(read(tmp_path, [line, *texts], tokenizer))
    labels = [False] + [True] * (len(text) + 1)
    # Nothing comes before the first token, so it is no label.
    assert found == [(ids, [False, False, True, True, False])] + [([bos, *text, end], labels)] * 3


def test_plain_text_files_are_cut_into_pieces_and_other_documents_at_their_end(tmp_path):
    tokenizer = chats.letter_tokenizer()
    (tmp_path / "book.txt").write_text("abcdefghijkl" + "m")
    ids = list(range(4, 24))
    lines = [
        {"input_ids": ids, "loss_mask": [0] * 3 + [1] * 17},
        {"input_ids": ids, "loss_mask": [0] * 6 + [1] * 14},
    ]
    path = chats.write_lines(tmp_path / "b.jsonl", lines)
    found = data.read_files((str(tmp_path / "*.txt"), path), tokenizer, options(tmp_path), 6)
    pieces = [chats.LETTERS.index("a") + np.arange(i, i + 6) for i in (0, 6)]
    assert as_lists(found) == [
        (pieces[0].tolist(), [False] + [True] * 5),
        (pieces[1].tolist(), [False] + [True] * 5),
        (ids[:6], [False] * 3 + [True] * 3),
    ]
    # The piece of one letter, and the answer behind the cut.
    assert found.counts["unlabelled"] == 2 and found.counts["cut"] == 3
    assert len(set(found.hashes[:2].tolist())) == 1
    record = found.record()
    assert (record["documents"], record["tokens"], record["trained_tokens"]) == (3, 18, 13)


def test_answers_are_cut_where_they_loop(tmp_path):
    tokenizer = chats.byte_tokenizer()
    fresh, loop = list(range(100, 130)), [7] * 40
    keep = data.before_loop(fresh + loop, 0.4)
    assert 30 < keep < 70
    mask = [1] * 30 + [0] + [1] * 70 + [0] + [1] * 40
    lines = [
        {"input_ids": [1, 2, *fresh, *loop], "loss_mask": [0, 0] + [1] * 70},
        {"input_ids": [*fresh, 5, *fresh, *loop, 9, *loop], "loss_mask": mask},
        {"input_ids": [*loop, *fresh], "loss_mask": [0] * 40 + [1] * 30},
        {"input_ids": [1, *loop], "loss_mask": [0] + [1] * 40},  # less than 16 are left
        {"input_ids": [1, 2, 3], "loss_mask": [0, 0, 1]},
    ]
    found = read(tmp_path, lines, tokenizer, max_loop=0.4)
    assert found.lengths.tolist() == [2 + keep, 31 + keep, 70, 3]
    assert (found.counts["looping"], found.counts["unlabelled"]) == (3, 1)
    assert read(tmp_path, lines, tokenizer, max_loop=1.0).lengths.tolist() == [72, 142, 70, 41, 3]


BROKEN = [
    (b'{"messages": [', "not JSON"),
    (b"\xff\xfe", "not JSON"),
    ([1], "wrong shape"),
    ({"prompt": "a"}, "wrong shape"),
    ({"messages": "a"}, "wrong shape"),
    ({"messages": ["a"]}, "wrong shape"),
    ({"messages": [{"role": "user", "content": 3}]}, "wrong shape"),
    ({"text": 3}, "wrong shape"),
    ({"input_ids": [1, True], "loss_mask": [0, 1]}, "wrong shape"),
    ({"input_ids": [1, 2]}, "wrong shape"),
    ({"input_ids": [1, 2], "loss_mask": [0, 2]}, "wrong shape"),
    ({"messages": [{"role": "nobody", "content": "a"}]}, "unknown role"),
    ({"messages": []}, "empty"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "gpt", "content": " "}]}, "empty"),
    ({"input_ids": [], "loss_mask": []}, "empty"),
    ({"text": ""}, "empty"),
    ({"input_ids": [1, 285], "loss_mask": [0, 1]}, "ids outside the vocabulary"),
    ({"input_ids": [1, -1], "loss_mask": [0, 1]}, "ids outside the vocabulary"),
    ({"input_ids": [1, 2], "loss_mask": [1]}, "lengths differ"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "template does not fit"),
]


def test_broken_lines_are_counted_by_reason_and_named(tmp_path):
    template = "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    tokenizer = chats.byte_tokenizer(template + chats.CHATML)
    fine = {"input_ids": [1, 2, 284], "loss_mask": [0, 1, 1]}
    lines = [line for broken, _ in BROKEN for line in [fine] * 99 + [broken]]
    found = read(tmp_path, [*lines, b"", b"  "], tokenizer)
    reasons = [reason for _, reason in BROKEN]
    assert found.counts["skipped"] == {reason: reasons.count(reason) for reason in reasons}
    assert found.counts["lines"] == 2000 and len(found) == 1980
    places = {line.split(": ")[0]: line.split(": ")[1] for line in found.counts["broken"]}
    path = tmp_path / "file.jsonl"
    assert places == {f"{path}:{100 * (i + 1)}": reason for i, reason in enumerate(reasons)}


def test_many_broken_lines_stop_and_leave_nothing(tmp_path):
    fine = {"input_ids": [1, 2], "loss_mask": [0, 1]}
    lines = [fine] * 197 + [b"{", {"text": 1}]
    with pytest.raises(InputError) as error:
        read(tmp_path, lines, chats.byte_tokenizer())
    assert str(error.value).startswith(
        "data.files: expected at most 1% broken lines, found 2 of 199: "
        f"{tmp_path / 'file.jsonl'}:198: not JSON"
    )
    assert f"{tmp_path / 'file.jsonl'}:199: wrong shape" in str(error.value)
    assert not list((tmp_path / "cache").iterdir())
    assert len(read(tmp_path, [fine, *lines], chats.byte_tokenizer())) == 198


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "none.jsonl", "expected a readable file, found .*none.jsonl"),
        (None, "none*.jsonl", "expected files that match"),
        (b"\x1f\x8b\x08 broken", "a.jsonl.gz", "expected a readable file, found .*a.jsonl.gz"),
        (b'{"text": "so it goes on"}', "a.gz", "expected a readable file, found .*a.gz"),
        (b"", "a.jsonl", "expected documents with labels, found none in 0 lines"),
        (
            b'{"messages": [{"role": "user", "content": "a"}]}',
            "a.jsonl",
            "expected .*, found none in 1 lines",
        ),
    ],
)
def test_bad_files_are_refused(tmp_path, content, name, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    tokenizer = chats.byte_tokenizer(chats.CHATML)
    with pytest.raises(InputError, match=f"^data.files: {message}"):
        data.read_files((str(tmp_path / name),), tokenizer, options(tmp_path), LENGTH)


def test_templates_come_from_the_tokenizer_or_a_file(tmp_path):
    line = {"messages": messages(DIALOGUES[0])}
    with pytest.raises(InputError, match="^data.template: expected a Jinja file, since the tok"):
        read(tmp_path, [line], chats.byte_tokenizer())
    with pytest.raises(InputError, match="^data.template: expected a readable file, found "):
        read(tmp_path, [line], chats.byte_tokenizer(), template=str(tmp_path / "none"))
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in %}")
    with pytest.raises(InputError, match="^data.template: expected Jinja, found "):
        read(tmp_path, [line], chats.byte_tokenizer(), template=str(path))
    path.write_text(chats.CHATML)
    found = read(tmp_path, [line], chats.byte_tokenizer(chats.PLAIN), template=str(path))
    assert as_lists(found) == [chats.slow_labels(chats.byte_tokenizer(), line["messages"])]


def many(count: int = 400) -> list[dict]:
    return [{"input_ids": [1, 3 + n % 250, n % 7], "loss_mask": [0, 1, 1]} for n in range(count)]


def test_what_is_kept_on_disk_serves_the_same_input_only(tmp_path, monkeypatch):
    tokenizer = chats.byte_tokenizer(chats.CHATML)
    first = read(tmp_path, many(), tokenizer)
    calls = []
    write = reader.Reader.write
    monkeypatch.setattr(reader.Reader, "write", lambda *a: (calls.append(1), write(*a))[1])
    again = read(tmp_path, many(), tokenizer)
    assert not calls and isinstance(again.tokens, np.memmap)
    for field in dataclasses.fields(again):
        assert np.array_equal(getattr(again, field.name), getattr(first, field.name))
    for changes in ({"length": 2}, {"max_loop": 1.0}, {"train_on": "all"}):
        read(tmp_path, many(), tokenizer, **changes)
    read(tmp_path, many(399), tokenizer)
    read(tmp_path, many(), chats.byte_tokenizer(chats.TAGGED))
    path = str(tmp_path / "file.jsonl")
    data.read_files((path,), tokenizer, options(tmp_path), LENGTH, vocab_size=300)
    assert len(calls) == 6
    with pytest.raises(InputError, match="^data.cache: expected a writable folder"):
        data.read_files((path,), tokenizer, Data(cache=path), LENGTH)


def test_several_readers_at_once_agree(tmp_path):
    tokenizer = chats.byte_tokenizer()
    path = chats.write_lines(tmp_path / "file.jsonl", many())
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(data.read_files, (path,), tokenizer, options(tmp_path), LENGTH)
            for _ in range(4)
        ]
        found = [as_lists(job.result()) for job in jobs]
    assert found[0] == found[1] == found[2] == found[3] and len(found[0]) == 400
    assert [len(path.name) for path in (tmp_path / "cache").iterdir()] == [32]


def test_held_out_documents_are_chosen_by_id_or_content(tmp_path):
    tokenizer = chats.byte_tokenizer(chats.CHATML)
    lines = [{"text": f"text {n}"} for n in range(600)]
    found = read(tmp_path, lines, tokenizer)
    train, held = found.split(0.1)
    sides = {bytes(found[i][0].tobytes()) for i in range(len(found))}
    parts = [{bytes(part[i][0].tobytes()) for i in range(len(part))} for part in (train, held)]
    assert parts[0] | parts[1] == sides and not parts[0] & parts[1]
    assert 30 <= len(held) <= 95
    # The other lines and the order of the files do not matter, and a larger share holds more.
    later = read(tmp_path, [{"text": "other"}, *lines[::-1]], tokenizer).split(0.2)[1]
    assert parts[1] < {bytes(later[i][0].tobytes()) for i in range(len(later))}
    assert len(found.split(0.0)[1]) == 0
    named = read(tmp_path, [line | {"id": n % 2} for n, line in enumerate(lines)], tokenizer)
    assert len(set(named.hashes.tolist())) == 2


def test_answers_to_one_prompt_stay_on_one_side(tmp_path):
    tokenizer = chats.byte_tokenizer(chats.CHATML)
    system = ("system", "it")
    lines = [
        [system, ("user", "a"), ("assistant", "so")],
        [system, ("user", "a"), ("assistant", "it"), ("user", "b")],
        [system, ("user", "b"), ("assistant", "so")],
        [system, ("assistant", "so"), ("user", "a")],
        [system, ("assistant", "it"), ("user", "a")],
    ]
    hashes = read(tmp_path, [{"messages": messages(line)} for line in lines], tokenizer).hashes
    assert hashes[0] == hashes[1] and len(set(hashes.tolist())) == 4
