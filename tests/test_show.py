"""What ``train.show`` prints of training data, and what it warns of."""

import sys

import pytest

from ctc_spec_jax.errors import InputError
from tests import chats
from train import data, show
from train.config import Data, TrainConfig

CHAT = [
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "so it goes"},
    {"role": "user", "content": "it"},
]


@pytest.fixture
def target(tmp_path):
    """Folder of a target of which only the tokenizer matters."""
    folder = tmp_path / "target"
    chats.byte_tokenizer(chats.CHATML).save_pretrained(folder)
    return str(folder)


def warned(tmp_path, tokenizer, lines, train_on="assistant") -> list[str]:
    path = chats.write_lines(tmp_path / "file.jsonl", lines)
    options = Data(cache=str(tmp_path / "cache"), train_on=train_on)
    documents = data.read_files((path,), tokenizer, options, 256)
    return show.problems(tokenizer, tokenizer.chat_template, documents, train_on)


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def test_labels_are_marked():
    tokenizer = chats.byte_tokenizer()
    ids, labels = chats.slow_labels(tokenizer, CHAT)
    before = "<s><|im_start|>user\nthe cat?<|im_end|>\n<|im_start|>assistant\n"
    after = "<|im_start|>user\nit<|im_end|>\n"
    answer = "so it goes<|im_end|>\n"
    assert show.marked(tokenizer, ids, labels, False) == f"{before}⟦{answer}⟧{after}"
    assert show.marked(tokenizer, ids, labels, True) == f"{before}\033[32m{answer}\033[0m{after}"


def test_good_data_is_not_warned_of(tmp_path):
    for template in (chats.CHATML, chats.TAGGED):
        assert warned(tmp_path, chats.byte_tokenizer(template), [{"messages": CHAT}]) == []


def test_double_bos_and_empty_masks(tmp_path):
    tokenizer = chats.byte_tokenizer(chats.CHATML)
    ids = ids_of(tokenizer, chats.BOS + chats.chatml(CHAT))
    lines = [
        {"input_ids": ids, "loss_mask": [0] * 9 + [1] * (len(ids) - 9)},
        {"messages": CHAT},
        {"messages": CHAT[:1]},
        {"input_ids": ids, "loss_mask": [0] * len(ids)},
    ]
    found = warned(tmp_path, tokenizer, lines, "all")
    assert found[0].startswith("1 documents have no labels")
    assert found[1] == "1 documents begin with two <s> (double BOS)"
    assert len(found) == 2


@pytest.mark.parametrize("shift", [0, 1])
def test_headers_of_users_among_the_labels(tmp_path, shift):
    """All of a header is a label in the first file, all but its last token in the second."""
    tokenizer = chats.byte_tokenizer(chats.CHATML)
    assert tokenizer.decode(list(show.user_header(tokenizer, chats.CHATML))) == "<|im_start|>user\n"
    ids = ids_of(tokenizer, chats.chatml(CHAT))
    header = ids_of(tokenizer, "<|im_start|>user\n")
    last = [i for i in range(len(ids)) if ids[i : i + len(header)] == header][-1] + len(header)
    mask = [0] * 9 + [1] * (last - 9 - shift) + [0] * (len(ids) - last + shift)
    found = warned(tmp_path, tokenizer, [{"input_ids": ids, "loss_mask": mask}])
    text = "1 documents have the user's header '<|im_start|>user\\n' among their labels"
    assert found == [text] * (1 - shift)


def test_templates_of_another_tokenizer(tmp_path):
    template = chats.CHATML.replace("im_start", "begin")
    found = warned(tmp_path, chats.byte_tokenizer(template), [{"messages": CHAT}])
    assert len(found) == 1 and found[0].startswith("<|begin|> of the template is no token but ")
    template = chats.CHATML.split("{% if add")[0]
    (found,) = warned(tmp_path, chats.byte_tokenizer(template), [{"messages": CHAT}])
    assert "so the assistant's header is a label" in found
    tokenizer = chats.letter_tokenizer()
    assert warned(tmp_path, tokenizer, [{"text": "a+b"}]) == [
        "1 documents hold the unknown token ?"
    ]


def test_program(tmp_path, target, capsys):
    """Counts and samples of a configuration; without colours, since this is no terminal."""
    fine = {"messages": CHAT}
    path = chats.write_lines(tmp_path / "file.jsonl", [fine] * 150 + [b"{"])
    options = Data(files=(path,), cache=str(tmp_path / "cache"), heldout=0.0)
    show.show(TrainConfig("drafter", target, data=options), 2, False)
    printed = capsys.readouterr()
    assert printed.out.count("⟦so it goes<|im_end|>\n⟧") == 2
    assert '"documents": 150' in printed.out and '"not JSON": 1' in printed.out
    assert f"warning: broken line {path}:151: not JSON" in printed.err


def test_command_line(tmp_path, target, monkeypatch, capsys):
    path = chats.write_lines(tmp_path / "file.jsonl", [{"messages": CHAT}])
    config = tmp_path / "config.yaml"
    config.write_text(f"objective: drafter\ntarget: {target}\ndata: {{files: [{path}]}}\n")
    for arguments in (["--target", target, "--files", path], ["--config", str(config)]):
        command = ["show", f"data.cache={tmp_path}", "data.heldout=0", "--count", "1", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        show.main()
        assert "⟦so it goes<|im_end|>\n⟧" in capsys.readouterr().out


def test_bad_arguments_are_one_sentence(tmp_path, target, monkeypatch, capsys):
    for arguments, message in [
        ([], "error: --config: expected an experiment file, or --target and --files, found none\n"),
        (["--target", target, "--files", str(tmp_path / "none")], "error: data.files: expected a"),
    ]:
        monkeypatch.setattr(sys, "argv", ["show", *arguments])
        with pytest.raises(SystemExit) as stop:
            show.main()
        assert stop.value.code == 2 and capsys.readouterr().err.startswith(message)
    with pytest.raises(InputError, match="^data.files: expected files or patterns, found none"):
        show.show(TrainConfig("drafter", target), 1, False)
