"""The target's own answers: what the decoder writes, each line exactly once, in any order.

Runs ``main`` in this process on a tiny target of random weights; deaths of whole processes are in
``tests.killed``.
"""

import fcntl
import functools
import gzip
import itertools
import json
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctc_spec_jax import folders, xla
from ctc_spec_jax.draft.ctc import CTCDrafter, ctc_config
from ctc_spec_jax.engine import Engine
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.generation import Generation
from ctc_spec_jax.models import convert
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.models.decoder import DecoderLM, output_logits
from ctc_spec_jax.tree.ctc_prefix import PrefixTree
from tests import killed
from train import answering, corpus, dialogue, prompts, regenerate
from train.ledger import Ledger

ROOT = pathlib.Path(__file__).parents[1]
VOCAB, POSITIONS, NEW, ROWS = 300, 128, 12, 3
ENDS = tuple(range(0, 300, 12))
TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'refuse' %}{{ raise_exception('no') }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
TEXTS = ["def f(x):", "import os", "a", "return self.x + 1", "class A:", "for i in range(9):", "x"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a target that often ends early, a drafter, and prompts of both kinds."""
    folder = tmp_path_factory.mktemp("regenerate")
    shape: dict[str, Any] = dict(num_heads=4, num_kv_heads=2, head_width=8, mlp_width=48)
    config = DecoderConfig(VOCAB, width=32, num_layers=2, tied_embeddings=True, **shape)
    lm = DecoderLM(config)

    def enlarge(path, x):
        return x if x.ndim < 2 else x * (50.0 if "embedding" in str(path) else 16.0)

    params = jax.tree_util.tree_map_with_path(enlarge, jax.jit(lm.init)(jax.random.key(1)))
    tokenizer = corpus.train_tokenizer([(ROOT / "train" / "prompts.py").read_text()], VOCAB)
    tokenizer.chat_template = TEMPLATE
    ids = {"eos_token_id": list(ENDS), "pad_token_id": 0, "max_position_embeddings": POSITIONS}
    convert.save_target(folder / "target", lm, params, ids)
    tokenizer.save_pretrained(folder / "target")
    drafter = CTCDrafter(ctc_config(lm.config, 1, 6), PrefixTree(8, 4))
    draft_params = jax.jit(drafter.init_params)(jax.random.key(2))
    folders.save_drafter(folder / "drafter", "ctc", drafter, draft_params, "tiny", tokenizer, {})
    write(folder / "texts.jsonl", [{"id": f"t{i}", "prompt": t} for i, t in enumerate(TEXTS)])
    write(folder / "chats.jsonl", [{"id": i, "turns": [t, "go"]} for i, t in enumerate(TEXTS)])
    return folder


@pytest.fixture(scope="module")
def engine(place):
    return Engine.from_pretrained(str(place / "target"))


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path) -> list[dict]:
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def lines(path) -> list[str]:
    """The lines of a file, sorted."""
    return sorted(pathlib.Path(path).read_text().splitlines())


@pytest.fixture
def call(place, tmp_path, monkeypatch, capsys):
    """``call(*arguments)`` runs the program: its file, and what it printed on both streams."""
    monkeypatch.setattr(regenerate, "use_compilation_cache", lambda: None)

    def run(*arguments, out="out.jsonl", rows=ROWS, status=0):
        words = ["--target", place / "target", "--out", tmp_path / out, "--rows", rows, *arguments]
        if "--max-new-tokens" not in words:
            words += ["--max-new-tokens", NEW]
        monkeypatch.setattr(sys, "argv", ["regenerate", *map(str, words)])
        if status:
            with pytest.raises(SystemExit) as stop:
                regenerate.main()
            assert stop.value.code == status
        else:
            regenerate.main()
        printed = capsys.readouterr()
        return tmp_path / out, printed.out, printed.err

    return run


@pytest.fixture
def refused(call, tmp_path):
    """``refused(*arguments)``: the one sentence that the program ends with, writing nothing."""

    def run(*arguments, **options) -> str:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        _, out, err = call(*arguments, status=2, **options)
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
        return err

    return run


@functools.cache
def next_token(lm):
    @jax.jit
    def function(params, padded, length):
        hidden, _, _ = lm.hidden(params, padded[None], length[None])
        return jnp.argmax(output_logits(params, hidden)[0, length - 1])

    return function


def greedy(engine, prompt) -> list[int]:
    """Slow and obvious: one full forward per token, up to a stop token or the budget."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + NEW:
        padded = np.zeros(POSITIONS, np.int32)
        padded[: len(tokens)] = tokens
        step = next_token(engine.lm)
        tokens.append(int(step(engine.params, padded, np.int32(len(tokens)))))
        if tokens[-1] in ENDS:
            break
    return tokens[len(prompt) :]


def test_answers_are_what_the_target_writes(call, place, engine):
    """Against one full forward per token: some end at a stop token, which is part of the answer."""
    out, printed, _ = call("--prompts", place / "texts.jsonl", out="new/folder/out.jsonl")
    rows = {row["id"]: row for row in read(out)}
    assert rows.keys() == {f"t{i}" for i in range(len(TEXTS))}
    finishes = set()
    for index, text in enumerate(TEXTS):
        row = rows[f"t{index}"]
        prompt = engine.tokenizer(text)["input_ids"]
        said = greedy(engine, prompt)
        assert row["input_ids"] == prompt + said
        assert row["loss_mask"] == [0] * len(prompt) + [1] * len(said)
        assert row["finish"] == ["stop" if said[-1] in ENDS else "length"]
        assert (row["rounds"], row["accepted_length"]) == (len(said), 1.0)
        assert "messages" not in row
        finishes.add(row["finish"][0])
    assert finishes == {"stop", "length"}
    tokens = sum(sum(row["loss_mask"]) for row in rows.values())
    expected = rf"7 answers, {tokens} tokens, \d+% loop, mean accepted length 1\.00, 0 prompts .*"
    assert re.fullmatch(expected + f"{out}\n", printed)
    beside = json.loads((out.parent / "out.jsonl.json").read_text())
    assert beside["counts"]["answers"] == 7 and beside["counts"]["tokens"] == tokens
    assert beside["settings"]["max_new_tokens"] == NEW and "jax" in beside["versions"]


def test_drafts_change_nothing_but_the_rounds(call, place):
    plain, _, _ = call("--prompts", place / "texts.jsonl", out="plain.jsonl")
    drafter = ("--drafter", place / "drafter", "--tree-nodes", 8)
    drafted, printed, _ = call("--prompts", place / "texts.jsonl", *drafter, out="drafted.jsonl")
    first, second = ({row["id"]: row for row in read(path)} for path in (plain, drafted))
    assert first.keys() == second.keys()
    for name, row in first.items():
        assert second[name]["rounds"] <= row["rounds"]
        for field in ("input_ids", "loss_mask", "finish"):
            assert second[name][field] == row[field]
    rounds, tokens = (sum(f(row) for row in second.values()) for f in (_rounds, _answered))
    assert f"mean accepted length {tokens / rounds:.2f}" in printed


def _rounds(row) -> int:
    return row["rounds"]


def _answered(row) -> int:
    return sum(row["loss_mask"])


# The logits are far apart, so that a lower temperature would seldom leave the greedy text.
SAMPLED = ("--temperature", 20, "--top-p", 0.95, "--top-k", 50, "--seed", 3)


def test_lines_depend_on_neither_order_nor_batch_nor_shard(call, place, tmp_path):
    """Sampled; other rows, two workers with a share each, and shuffled and gzipped chats."""
    texts, chats = (("--prompts", place / f"{n}.jsonl", *SAMPLED) for n in ("texts", "chats"))
    expected = lines(call(*texts)[0])
    assert len(expected) == len(TEXTS)
    assert lines(call(*texts, out="other.jsonl", rows=2)[0]) == expected
    shares = [lines(call(*texts, "--shard", f"{i}/2", out=f"{i}.jsonl")[0]) for i in (0, 1)]
    assert all(shares) and sorted(shares[0] + shares[1]) == expected
    plain = lines(call("--prompts", place / "texts.jsonl", out="plain.jsonl")[0])
    seeds = lines(call(*texts[:-1], 4, out="seeds.jsonl")[0])
    assert not set(expected) & set(plain) and not set(expected) & set(seeds)

    expected = lines(call(*chats, out="chats.jsonl")[0])
    shuffled = tmp_path / "shuffled.jsonl.gz"
    rows = (place / "chats.jsonl").read_text().splitlines()[::-1]
    with gzip.open(shuffled, "wt") as file:
        file.write("\n".join(rows[2:] + rows[:2]))
    assert lines(call("--prompts", shuffled, *SAMPLED, out="again.jsonl")[0]) == expected


def test_later_turns_follow_the_answers_that_were_generated(call, place, engine):
    out, _, _ = call("--prompts", place / "chats.jsonl")
    for row in read(out):
        said = row["messages"]
        assert [m["role"] for m in said] == ["user", "assistant"] * 2
        assert [m["content"] for m in said[::2]] == [TEXTS[int(row["id"])], "go"]
        first = dialogue.render(engine.tokenizer, said[:1])
        tokens = greedy(engine, first)
        assert said[1]["content"] == engine.decode_text(tokens)
        second = dialogue.render(engine.tokenizer, said[:3])
        assert said[1]["content"] in engine.tokenizer.decode(second)
        last = greedy(engine, second)
        assert row["input_ids"] == [*second, *last]
        assert row["loss_mask"][len(second) :] == [1] * len(last)
        same = list(itertools.takewhile(lambda p: p[0] == p[1], zip(second, (*first, *tokens))))  # noqa: B905
        kept = len(same) - len(first)
        mask = [0] * len(first) + [1] * kept + [0] * (len(second) - len(same))
        assert row["loss_mask"][: len(second)] == mask
    out, _, _ = call("--prompts", place / "chats.jsonl", "--first-turn", out="first.jsonl")
    assert {len(row["messages"]) for row in read(out)} == {2}


def test_tokens_that_are_written_otherwise_later_are_no_labels(engine):
    """The text of an answer parts from its tokens where those were not the usual ones."""
    tokenizer = engine.tokenizer
    turns = tuple(({"role": "user", "content": t},) for t in ("first", "second"))
    begun = dialogue.begin(tokenizer, prompts.Prompt("x", turns=turns))
    usual = tokenizer("return self")["input_ids"]
    odd = [*usual, *(i for letter in " in" for i in tokenizer(letter)["input_ids"])]
    assert len(tokenizer("return self in")["input_ids"]) < len(odd)
    for tokens, kept in ((usual, len(usual)), (odd, len(usual))):
        answer = Generation(tokenizer.decode(tokens), tokens, "length", 2, [], 0.0)
        following = dialogue.next_turn(tokenizer, dialogue.with_answer(begun, answer))
        assert following is not None
        start = len(begun.ids)
        assert following.ids[start : start + kept] == tuple(tokens[:kept])
        rest = len(following.ids) - start - kept
        assert following.mask == (0,) * start + (1,) * kept + (0,) * rest
    assert dialogue.next_turn(tokenizer, dialogue.with_answer(following, answer)) is None


def test_prompts_are_cut_from_the_sources(call, engine):
    arguments = ("--sources", "asyncio", "--heldout", 0.3, "--max-bytes", 10000, "--count", 8)
    out, _, _ = call(*arguments, "--prompt-lengths", 4, 8, "--ignore-eos")
    assert {tuple(row["finish"]) for row in read(out)} == {("length",)}
    texts, _ = corpus.corpus(("asyncio",), 0.3, 10000)
    text = ",".join(map(str, corpus.tokenize(engine.tokenizer, texts)))
    cut = [row["input_ids"][: row["loss_mask"].index(1)] for row in read(out)]
    assert len(cut) == 8 and {len(ids) for ids in cut} <= set(range(4, 9))
    assert len({len(ids) for ids in cut}) > 1 and len(set(map(tuple, cut))) > 4
    assert all(",".join(map(str, ids)) in text for ids in cut)


def test_batches_are_full_and_of_one_bucket(call, place, tmp_path, monkeypatch):
    sizes = []
    generate = Engine.generate

    def spy(self, contents, max_new_tokens, **fields):
        widths = {xla.bucket(len(ids)) for ids in contents}
        sizes.append((len(contents), widths, list(max_new_tokens)))
        return generate(self, contents, max_new_tokens, **fields)

    monkeypatch.setattr(Engine, "generate", spy)
    mixed = [{"prompt": "def f(x): " * n} for n in (1, 9, 1, 1, 1, 9)]
    out, _, _ = call("--prompts", write(tmp_path / "mixed.jsonl", mixed))
    assert len(read(out)) == 6
    assert [rows for rows, _, _ in sizes] == [ROWS] * 3
    assert all(len(widths) == 1 for _, widths, _ in sizes)
    assert [budgets for _, _, budgets in sizes] == [[NEW] * 3, [NEW, 1, 1], [NEW, NEW, 1]]


def test_long_prompts_are_skipped_and_long_chats_end_early(call, tmp_path):
    rows = [{"id": "long", "prompt": "x y z " * POSITIONS}, {"id": "chat", "turns": ["a", "b"]}]
    rows[1]["turns"][1] += "x y z " * POSITIONS
    out, printed, err = call("--prompts", write(tmp_path / "long.jsonl", rows))
    (row,) = read(out)
    assert row["id"] == "chat" and len(row["messages"]) == 2 and len(row["finish"]) == 1
    assert ", 1 prompts too long: " in printed
    room = POSITIONS - NEW
    assert (
        f"prompt long (line 1 of {tmp_path}/long.jsonl) is skipped: expected at most {room}" in err
    )
    assert "prompt chat (line 2 of" in err and "ends early" in err
    counts = json.loads((tmp_path / "out.jsonl.json").read_text())["counts"]
    assert (counts["too_long"], counts["ended_early"]) == (1, 1)


BAD = [
    (b"{", "expected an object with 'messages'"),
    (b"\xff\xfe", "expected UTF-8"),
    (b"[1]", "expected an object with 'messages'"),
    (b'{"text": "a"}', "expected an object with 'messages', .* found one with 'text'"),
    (b'{"prompt": 3}', "prompt: expected a text, found 3"),
    (b'{"prompt": ""}', "expected at least one token, found none"),
    (b'{"prompt": "a", "id": [1]}', "expected an id that is a text or a whole number"),
    (b'{"prompt": "a", "id": "t"}', "expected an id of its own, found 't' of line 1 of "),
    (b'{"turns": "a"}', "turns: expected a list, found 'a'"),
    (b'{"turns": []}', "expected a message of the user, found none"),
    (b'{"messages": [{"role": "tool", "content": ""}]}', "expected a chat without tools, found"),
    (b'{"messages": [{"role": "user", "content": [1]}]}', "expected a chat, found wrong shape"),
    (b'{"conversations": ["a"]}', "expected a chat, found wrong shape: .* found 'a'"),
    (b'{"messages": [], "input_ids": [1], "loss_mask": [1]}', "expected a chat, found tokens"),
    (b'{"turns": ["a", "refuse"]}', "expected messages that fit the chat template, found no"),
]


def test_bad_lines_are_named_and_the_rest_runs(call, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join([b'{"id": "t", "prompt": "a"}', *[line for line, _ in BAD]]))
    out, _, err = call("--prompts", path, status=2)
    assert [row["id"] for row in read(out)] == ["t"]
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(BAD)
    for number, (_, sentence) in enumerate(BAD, 2):
        (found,) = [e for e in errors if f"--prompts: line {number} of {path}: " in e]
        assert re.search(sentence, found), found


def test_forms_of_chats_and_ids_of_lines_without_one(tmp_path):
    """The file's own answers are left out; equal lines get numbers, whatever their order."""
    system = {"role": "system", "content": "s"}
    users = [{"role": "user", "content": t} for t in "ab"]
    own = {"role": "assistant", "content": "never seen"}
    share = [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}]
    share += [{"from": "gpt", "value": "other"}, {"from": "human", "value": "b"}]
    rows = [
        {"messages": [system, users[0], own, users[1], own], "prompt": "ignored"},
        {"conversations": share},
        {"turns": ["a", "b"]},
        {"prompt": "a"},
        {"id": 7, "messages": [own, *users]},
    ]
    found, problems = prompts.read_prompts([write(tmp_path / "forms.jsonl", rows)])
    assert not problems
    chat = ((system, users[0]), (users[1],))
    plain = ((users[0],), (users[1],))
    assert [p.turns for p in found] == [chat, chat, plain, (), plain]
    assert [p.content for p in found] == ["", "", "", "a", ""]
    names = [p.id for p in found]
    assert names[1] == f"{names[0]}-2" and len(set(names)) == 5 and names[4] == "7"
    again, _ = prompts.read_prompts([write(tmp_path / "again.jsonl", rows[::-1])])
    assert {p.id for p in again} == set(names)
    first, _ = prompts.read_prompts([write(tmp_path / "forms.jsonl", rows)], first_turn=True)
    assert [p.turns for p in first] == [t[:1] for t in (chat, chat, plain, (), plain)]


def test_an_interrupted_run_goes_on(call, place, tmp_path, monkeypatch):
    """Interrupted before every batch in turn, the file ends up as if nothing had happened."""
    chats = ("--prompts", place / "chats.jsonl", *SAMPLED)
    expected = lines(call(*chats, out="whole.jsonl")[0])
    answer = answering.answer

    def interrupted(*arguments):
        if next(countdown) == 0:
            raise KeyboardInterrupt
        return answer(*arguments)

    monkeypatch.setattr(answering, "answer", interrupted)
    sizes = []
    for batches in (0, 1, 2, 3, 100):
        countdown = iter(range(batches, -1, -1))
        try:
            call(*chats)
        except SystemExit as end:
            assert end.code == 130
            sizes.append(len(lines(tmp_path / "out.jsonl")))
    assert sizes[0] == 0 and 0 < sizes[-1] < len(TEXTS)
    assert lines(tmp_path / "out.jsonl") == expected
    before = (tmp_path / "out.jsonl").read_bytes()
    countdown = iter([0])  # nothing is left to answer
    out, printed, _ = call(*chats)
    assert out.read_bytes() == before and printed.startswith("7 answers, ")


def row_of(name: str) -> dict:
    return {"id": name, "input_ids": [1, 2], "loss_mask": [0, 1], "rounds": 1, "accepted_length": 1}


def test_a_line_torn_at_any_byte_is_written_again(tmp_path):
    path, seen = tmp_path / "torn.jsonl", []
    rows = [row_of(name) for name in ("a", "b", "ü")]
    with Ledger(str(path), {"seed": 1}, {}, seen.append) as ledger:
        ledger.append(rows)
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for size in range(start, len(whole) + 1):
        path.write_bytes(whole[:size])
        with Ledger(str(path), {"seed": 1}, {}, seen.append) as ledger:
            assert ledger.done == ({"a", "b", "ü"} if size == len(whole) else {"a", "b"})
            ledger.append(row for row in rows if row["id"] not in ledger.done)
        assert path.read_bytes() == whole


@pytest.fixture(scope="module")
def deaths(place):
    """The files of ``tests.killed``."""
    folder = place / "deaths"
    folder.mkdir()
    rows = [{"id": i, "turns": ["a", "b"][: 1 + i % 2]} for i in range(24)]
    path = write(folder / "prompts.jsonl", rows)
    command = [sys.executable, "-m", "tests.killed", str(place / "target"), path, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_killed_at_random_moments(deaths):
    """At least 20 kills, most of them within a line; then every line is there exactly once."""
    assert int((deaths / "kills").read_text()) >= 20
    expected = lines(deaths / "whole.jsonl")
    assert len({json.loads(line)["id"] for line in expected}) == len(expected) == 24
    assert lines(deaths / "killed.jsonl") == expected
    beside = [json.loads((deaths / f"{n}.jsonl.json").read_text()) for n in ("whole", "killed")]
    assert beside[0]["counts"] == beside[1]["counts"]


def test_a_full_disk_ends_with_one_sentence_and_loses_no_line(deaths):
    (error,) = [s for s in (deaths / "full.err").read_text().splitlines() if "error" in s]
    partly, whole = ((deaths / f"{n}.jsonl").read_bytes() for n in ("partly", "whole"))
    count = partly.count(b"\n")
    assert 0 < count < 24 and len(partly) <= killed.LIMIT and partly.endswith(b"\n")
    assert set(partly.splitlines()) < set(whole.splitlines())
    assert (
        f"error: --out: expected room for the next line, found File too large after {count}"
        in error
    )
    assert lines(deaths / "full.jsonl") == lines(deaths / "whole.jsonl")


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        (("--temperature", 0.5), "temperature"),
        (("--max-new-tokens", 4), "max-new-tokens"),
        (("--seed", 1), "seed"),
        (("--shard", "0/2"), "shard"),
        (("--first-turn",), "first-turn"),
        (("--prompts", "{place}/texts.jsonl"), "prompts"),
        (("--template", "{place}/deaths/template"), "template"),
        (("--drafter", "{place}/drafter"), "drafter"),
        (("--dtype", "bfloat16"), "dtype"),
        (("--ignore-eos",), "ignore-eos"),
    ],
)
def test_other_options_do_not_go_on(refused, place, tmp_path, monkeypatch, capsys, changes, flag):
    monkeypatch.setattr(regenerate, "load", lambda arguments: killed.Engine(tokenizer_of(place)))
    (place / "deaths").mkdir(exist_ok=True)
    (place / "deaths" / "template").write_text(TEMPLATE)
    regenerate_with(monkeypatch, place, tmp_path)
    capsys.readouterr()
    changes = [str(word).format(place=place) for word in changes]
    sentence = refused("--prompts", place / "chats.jsonl", *changes)
    assert sentence.startswith(f"error: --{flag}: expected ") and "out.jsonl.json" in sentence


def tokenizer_of(place):
    tokenizer = folders.load_tokenizer(place / "target")
    tokenizer.model_max_length = POSITIONS
    return tokenizer


def regenerate_with(monkeypatch, place, tmp_path, *arguments) -> None:
    """A finished file of the chats."""
    words = ["--target", place / "target", "--out", tmp_path / "out.jsonl"]
    words += ["--prompts", place / "chats.jsonl", "--max-new-tokens", NEW, *arguments]
    monkeypatch.setattr(sys, "argv", ["regenerate", *map(str, words)])
    regenerate.main()
    assert len(read(tmp_path / "out.jsonl")) == len(TEXTS)


@pytest.mark.parametrize(
    ("content", "beside", "message"),
    [
        (b"text\n", None, "expected no file or .*out.jsonl.json that says how it was made"),
        (b"text\n", "{", "expected no file or .*out.jsonl.json that says how it was made"),
        (b"text\n", '{"settings": {}}', "expected answers in line 1 of .*out.jsonl, found"),
        (json.dumps(row_of("a")).encode() + b"\n", "{}", "expected no file or"),
        ((json.dumps(row_of("a")).encode() + b"\n") * 2, '{"settings": {}}', "found two of 'a'"),
    ],
)
def test_other_files_are_not_touched(tmp_path, content, beside, message):
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    if beside is not None:
        (tmp_path / "out.jsonl.json").write_text(beside)
    with pytest.raises(InputError, match=f"^--out: .*{message}"):
        Ledger(str(path), {}, {}, dialogue.Totals().add)
    assert path.read_bytes() == content


def test_a_second_writer_is_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    with open(path, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="^--out: expected a file that no other run writes"):
            Ledger(str(path), {}, {}, dialogue.Totals().add)
    Ledger(str(path), {}, {}, dialogue.Totals().add).__exit__()


def test_totals_count_answers_that_loop():
    totals = dialogue.Totals()
    fresh, loop = list(range(40)), [1, 2] * 20
    for ids, mask in (
        (fresh, [1] * 40),
        (loop, [1] * 40),
        (loop, [0] * 40),
        (loop + fresh, 40 * [1]),
    ):
        mask = mask + [0] * (len(ids) - len(mask))
        line = {"input_ids": ids, "loss_mask": mask, "rounds": 20, "accepted_length": 2.0}
        totals.add(line)
    counts = totals.counts()
    assert (counts["answers"], counts["tokens"], counts["rounds"]) == (4, 120, 80)
    assert (counts["loop_share"], counts["accepted_length"]) == (0.5, 2.0)
    assert dialogue.Totals().counts()["accepted_length"] == 0.0


def test_shares_and_seeds_come_from_the_id(monkeypatch):
    every = [prompts.Prompt(str(i)) for i in range(300)]
    shares = [prompts.share_of(every, index, 3) for index in range(3)]
    assert sorted(p.id for share in shares for p in share) == sorted(p.id for p in every)
    assert all(70 < len(share) < 130 for share in shares)
    places = [(p.id, turn, seed) for p in every for turn in (0, 1) for seed in (0, 1)]
    assert len({prompts.row_seed(*place) for place in places}) == len(places)
    assert regenerate.shard_of("2/3") == (2, 3) and regenerate.shard_of(None) == (0, 1)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    assert regenerate.shard_of(None) == (1, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--count", "0"), "--count: expected at least 1, found 0"),
        (("--rows", "0"), "--rows: expected at least 1, found 0"),
        (("--max-new-tokens", "0"), "--max-new-tokens: expected at least 1, found 0"),
        (("--temperature", "-1"), "temperature: expected 0 (greedy) or "),
        (("--top-p", "0"), "top_p: expected a number above 0 and at most 1, found 0.0"),
        (("--shard", "2/2"), "--shard: expected I/N with 0 <= I < N, found '2/2'"),
        (("--shard", "1"), "--shard: expected I/N with 0 <= I < N, found '1'"),
        (("--out", "{tmp}/empty/new/out.jsonl"), "--out: expected a writable folder, found "),
        (("--out", "{tmp}"), "--out: expected a file, found the folder "),
        (("--target", "{tmp}/none"), "target: expected an existing folder or a hub id"),
        (("--prompts", "a", "--sources", "b"), "--prompts: expected it or --sources, found both"),
        (("--prompts", "{tmp}/none"), "--prompts: expected a readable file, found {tmp}/none ("),
        (("--prompts", "{tmp}/empty"), "--prompts: expected at least one line in {tmp}/empty, "),
        (("--prompts", "{tmp}/no.gz"), "--prompts: expected a readable file, found {tmp}/no.gz ("),
        (("--template", "{tmp}/none"), "--template: expected a readable file, found {tmp}/none"),
        (("--template", "{tmp}/broken"), "--template: expected a Jinja template, found "),
        (("--sources", "no_such"), "data.sources: expected an installed package, found 'no_such'"),
        (("--max-new-tokens", "125"), "--max-new-tokens: expected 1..120, so that the longest "),
        (("--prompt-lengths", "9", "8"), "--prompt-lengths: expected 1 <= shortest <= longest < "),
    ],
)
def test_bad_arguments_are_refused(refused, tmp_path, arguments, message):
    (tmp_path / "empty").touch()
    (tmp_path / "no.gz").write_bytes(b"text")
    (tmp_path / "broken").write_text("{% for %}")
    small = () if "--prompts" in arguments else ("--max-bytes", "1000", "--prompt-lengths", 4, 8)
    sentence = refused(*small, *(word.format(tmp=tmp_path) for word in arguments))
    assert sentence.startswith(f"error: {message.format(tmp=tmp_path)}")


def test_chats_need_a_template(refused, place, monkeypatch):
    bare = tokenizer_of(place)
    bare.chat_template = None
    monkeypatch.setattr(regenerate, "load", lambda arguments: killed.Engine(bare))
    sentence = refused("--prompts", place / "chats.jsonl")
    assert sentence.startswith("error: --template: expected a chat template, since the tokenizer")
