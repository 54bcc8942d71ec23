"""The programs: one sentence for every mistake, nothing half-written, and what they print.

Runs ``main`` in this process, on a tiny pair of random weights that goes through ordinary folders.
"""

import argparse
import dataclasses
import functools
import importlib
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from ctc_spec_jax import cli, demo, folders
from ctc_spec_jax.decode import NoDraft
from ctc_spec_jax.draft.ctc import CTCDrafter, ctc_config
from ctc_spec_jax.draft.gsd import GSD
from ctc_spec_jax.draft.ngram import PromptLookup
from ctc_spec_jax.draft.ouroboros import Ouroboros
from ctc_spec_jax.draft.small_lm import SmallLM
from ctc_spec_jax.engine import Engine, Generation
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models import convert
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.models.decoder import DecoderLM
from ctc_spec_jax.tree.ctc_prefix import PrefixTree
from infer import chat, generate, profile, rounds
from train import corpus, train

ROOT = pathlib.Path(__file__).parent.parent
VOCAB, POSITIONS = 300, 128
TEXT = (ROOT / "train" / "data.py").read_text()
MODULES = (generate, chat, profile, train)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Folders of a target and of a drafter for it."""

    target: pathlib.Path
    drafter: pathlib.Path

    def copy(self, folder: pathlib.Path) -> "Pair":
        """A pair in ``folder`` that a test may break."""
        return Pair(
            shutil.copytree(self.target, folder / "target"),
            shutil.copytree(self.drafter, folder / "drafter"),
        )


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    """Two layers, width 32, byte-level BPE; weights large enough that greedy text varies."""
    folder = tmp_path_factory.mktemp("pair")
    shape = dict(num_heads=4, num_kv_heads=2, head_width=8, mlp_width=48, tied_embeddings=True)
    lm = DecoderLM(DecoderConfig(vocab_size=VOCAB, width=32, num_layers=2, **shape))

    def enlarge(path, x):
        return x if x.ndim < 2 else x * (50.0 if "embedding" in str(path) else 16.0)

    params = jax.tree_util.tree_map_with_path(enlarge, lm.init(jax.random.key(1)))
    tokenizer = corpus.train_tokenizer([TEXT], VOCAB)
    ids = {"eos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": POSITIONS}
    convert.save_target(folder / "target", lm, params, ids)
    tokenizer.save_pretrained(folder / "target")
    drafter = CTCDrafter(ctc_config(lm.config, 1, 6), PrefixTree(8, 4))
    draft_params = drafter.init_params(jax.random.key(2))
    folders.save_drafter(folder / "drafter", "ctc", drafter, draft_params, "tiny", tokenizer, {})
    return Pair(folder / "target", folder / "drafter")


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    """The cache is a setting of the whole process."""
    for module in MODULES:
        monkeypatch.setattr(module, "use_compilation_cache", lambda: None)


@pytest.fixture
def call(monkeypatch, capsys):
    """``call(module, *arguments)`` runs its program and gives its standard output."""

    def run(module, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def sentence(call, capsys, tmp_path):
    """``sentence(module, *arguments)``: the program fails as it should; what it says."""

    def run(module, *arguments) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            call(module, *arguments)
        assert stop.value.code == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        lines = printed.err.splitlines()
        assert len(lines) == 1, printed.err
        assert lines[0].startswith("error: ")
        assert "expected" in lines[0] and "found" in lines[0]
        assert sorted(tmp_path.rglob("*")) == before
        return lines[0]

    return run


def edit(path: pathlib.Path, **changes) -> None:
    """Change keys of a JSON file; None removes a key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def lose_a_shard(pair: Pair) -> None:
    (pair.target / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (pair.target / "model.safetensors.index.json").write_text(json.dumps(index))


def other_tokenizer(pair: Pair) -> None:
    corpus.train_tokenizer(["quite another text " * 40], VOCAB).save_pretrained(pair.target)


def no_tokenizer(pair: Pair) -> None:
    for path in pair.target.glob("tokenizer*"):
        path.unlink()


# What is done to the pair, and what the sentence has to name: argument, expected, found.
MISTAKES: dict[str, tuple[Any, str]] = {
    "target folder missing": (lambda p: shutil.rmtree(p.target), "target: .* hub id .*target"),
    "target config missing": (lambda p: (p.target / "config.json").unlink(), r"config\.json: .*"),
    "target weights missing": (
        lambda p: (p.target / "model.safetensors").unlink(),
        r"target: expected model\.safetensors or .* found",
    ),
    "target weights truncated": (
        lambda p: truncate(p.target / "model.safetensors"),
        r"model\.safetensors: expected whole safetensors, found",
    ),
    "shard of the index missing": (
        lose_a_shard,
        r"index\.json: expected shard model-00002-of-00002\.safetensors .* found none",
    ),
    "unknown model type": (
        lambda p: edit(p.target / "config.json", model_type="mamba"),
        r"model_type: expected one of llama, .* found 'mamba'",
    ),
    "weights of another shape": (
        lambda p: edit(p.target / "config.json", intermediate_size=64),
        r"expected model\.layers\.0\.mlp\.down_proj.* \(32, 64\) .* found \(32, 48\)",
    ),
    "tokenizer missing": (no_tokenizer, "target: expected tokenizer files in .* found none"),
    "tokenizer broken": (
        lambda p: truncate(p.target / "tokenizer.json"),
        "target: expected tokenizer files in .* found none",
    ),
    "tokenizer of another model": (
        other_tokenizer,
        r"drafter tokenizer: expected the vocabulary .* \(sha256 \w{12}\), found \w{12}",
    ),
    "drafter folder missing": (
        lambda p: shutil.rmtree(p.drafter),
        r"drafter: expected a folder with config\.json, found .*drafter",
    ),
    "drafter weights missing": (
        lambda p: (p.drafter / "model.safetensors").unlink(),
        r"drafter: expected a complete .*model\.safetensors, found",
    ),
    "drafter weights truncated": (
        lambda p: truncate(p.drafter / "model.safetensors"),
        r"drafter: expected a complete .*model\.safetensors, found",
    ),
    "drafter config is no JSON": (
        lambda p: truncate(p.drafter / "config.json"),
        r"drafter: expected JSON in .*config\.json, found",
    ),
    "drafter config is a list": (
        lambda p: (p.drafter / "config.json").write_text("[]"),
        r"drafter model_type: expected one of ctc, .* found None",
    ),
    "unknown kind of drafter": (
        lambda p: edit(p.drafter / "config.json", model_type="oracle"),
        r"drafter model_type: expected one of ctc, .* found 'oracle'",
    ),
    "drafter of another vocabulary": (
        lambda p: edit(p.drafter / "config.json", vocab_size=VOCAB + 1),
        f"drafter vocab_size: expected {VOCAB} as in the target, found {VOCAB + 1}",
    ),
    "drafter of another hidden size": (
        lambda p: edit(p.drafter / "config.json", width=64),
        "drafter width: expected 32 as in the target, found 64",
    ),
    "drafter of a deeper target": (
        lambda p: edit(p.drafter / "config.json", target_layer_ids=[0, 2]),
        "drafter target_layer_ids: expected layers below 2, found 2",
    ),
    "drafter without layers to read": (
        lambda p: edit(p.drafter / "config.json", target_layer_ids=[]),
        "drafter taps: expected at least one target layer, found none",
    ),
    "drafter key missing": (
        lambda p: edit(p.drafter / "config.json", tree_depth=None),
        r"drafter tree_depth: expected a whole number in .*config\.json, found None",
    ),
    "drafter key of another type": (
        lambda p: edit(p.drafter / "config.json", frames="six"),
        r"drafter frames: expected a whole number in .*config\.json, found 'six'",
    ),
    "drafter tensor of another shape": (
        lambda p: edit(p.drafter / "config.json", frames=7),
        r"drafter tensor 'frame_embedding': expected shape \(7, 32\), found \(6, 32\)",
    ),
}


def test_a_tokenizer_that_transformers_would_make_up(tmp_path):
    """For this family it answers a folder without tokenizer files with an empty tokenizer."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(InputError, match="target: expected tokenizer files in .*, found none"):
        folders.load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", MISTAKES)
def test_broken_folders(pair, sentence, tmp_path, name):
    spoil, pattern = MISTAKES[name]
    broken = pair.copy(tmp_path)
    spoil(broken)
    out = tmp_path / "results.json"
    places = ("--target", broken.target, "--drafter", broken.drafter, "--json", out)
    assert re.search(pattern, sentence(generate, *places, "--prompt", "def f(x):"))


# Arguments, with {out} for a folder of the test; the pair itself is fine.
ARGUMENTS = [
    (("--prompt", ""), "prompt 0: expected at least one token, found none"),
    (
        ("--prompt", "x" * 500, "--max-new-tokens", "16"),
        f"prompt 0: expected at most {POSITIONS - 16} tokens, .* 16 .* {POSITIONS} .* found [0-9]+",
    ),
    (("--prompt", "x", "--prompts", "y"), "--prompt: expected it or --prompts, found both"),
    (("--prompts", "{out}/none.jsonl"), "--prompts: expected a readable file, found .*none"),
    (("--prompts", "{out}/empty.jsonl"), "--prompts: expected at least one line .* found none"),
    (("--prompts", "{out}/broken.jsonl"), "line 1 of .*: expected an object .* found '{\"prom"),
    (("--prompts", "{out}/number.jsonl"), "line 1 of .*: expected an object .* text, found 5"),
    (("--prompts", "{out}/latin.jsonl"), r"line 1 of .*: expected UTF-8, found b'\\xe9'"),
    (
        ("--prompts", "{out}/long.jsonl", "--max-new-tokens", "16"),
        f"line 1 of .*: expected at most {POSITIONS - 16} tokens, .* found [0-9]+",
    ),
    (("--temperature", "-1"), "temperature: expected 0 .* or 1e-6 to 1e6, found -1.0"),
    (("--top-p", "0"), "top_p: expected a number above 0 and at most 1, found 0.0"),
    (("--top-p", "1.5"), "top_p: expected a number above 0 and at most 1, found 1.5"),
    (("--stop", ""), "stop_strings: expected non-empty strings, found ''"),
    (("--logit-bias", "7"), "--logit-bias: expected TOKEN=BIAS, found '7'"),
    (("--logit-bias", "999=1"), f"logit_bias.*: expected token ids below .* {VOCAB}, found 999"),
    (("--batch", "0"), "--batch: expected at least 1, found 0"),
    (("--max-new-tokens", "0"), "--max-new-tokens: expected at least 1, found 0"),
    (("--num-prompts", "0"), "--num-prompts: expected at least 1, found 0"),
    (("--repeats", "-1"), "--repeats: expected at least 1, found -1"),
    (("--tree-nodes", "8", "1"), "--tree-nodes: expected at least 2, found 1"),
    (("--json", "{out}/none/results.json"), "--json: expected .* writable folder, found .*none"),
    (("--json", "{out}/empty.jsonl/x"), r"--json: expected .* writable folder, found .*empty\.js"),
    (("--json", "{out}"), "--json: expected a file, found the folder"),
]


@pytest.mark.parametrize(("arguments", "pattern"), ARGUMENTS)
def test_bad_arguments(pair, sentence, tmp_path, arguments, pattern):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": \n')
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    (tmp_path / "number.jsonl").write_text('{"prompt": 5}\n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"turns": ["y" * 500]}))
    arguments = [argument.format(out=tmp_path) for argument in arguments]
    places = ("--target", pair.target, "--drafter", pair.drafter, "--max-new-tokens", "8")
    assert re.search(pattern, sentence(generate, *places, *arguments))


def test_the_other_lines_of_a_file_run(pair, call, capsys, tmp_path, monkeypatch):
    """Lines that cannot be decoded are named with their numbers; the status is 2 at the end."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "results.json"
    lines = [
        b'{"prompt": "def f(x):", "temperature": 0.9, "stop_strings": ["zzzz"]}',
        b'{"prompt": "caf\xe9"}',
        b"",
        b'{"prompt": "import os", "temperature": -1}',
        b'{"prompt": "import os", "top_p": "many"}',
        b'{"turns": ["import os"], "max_new_tokens": 4, "logit_bias": {"7": 1.5}}',
        b"{",
        b'{"prompt": "import os", "logit_bias": {"x": 1}}',
    ]
    prompts.write_bytes(b"\n".join(lines))
    places = ("--target", pair.target, "--drafter", pair.drafter, "--prompts", prompts)
    with pytest.raises(SystemExit) as stop:
        call(generate, *places, "--max-new-tokens", 8, "--repeats", 1, "--json", out)
    assert stop.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    for number, pattern, error in zip(
        (2, 4, 5, 7, 8),
        ("UTF-8", "temperature", "top_p", "an object", "token ids"),
        errors,
        strict=True,
    ):
        assert re.search(f"line {number} of .*expected.*{pattern}|{pattern}: expected", error)
    result = json.loads(out.read_text())
    assert result["tokens"] == 12 and len(result["text"]) == 2


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (("--compare",), "--compare: expected --drafter or --method for --target, found neither"),
        (("--tree", "x"), "--tree: expected it beside --drafter or --method, found 'x'"),
        (("--method", "oracle"), "method: expected one of ctc, .* found 'oracle'"),
        (("--method", "small_lm"), "method: expected one without parameters, found 'small_lm', "),
        (("--method", "prompt_lookup", "--tree", "x"), "tree: expected '', .* found 'x'"),
        (("--drafter", "{target}", "--method", "ctc"), "method: expected small_lm.* found 'ctc'"),
        (("--drafter", "{drafter}", "--method", "medusa"), "method: expected ctc .* 'medusa'"),
    ],
)
@pytest.mark.parametrize("program", [generate, chat])
def test_methods_that_do_not_fit(program, arguments, pattern, pair, sentence):
    if program is chat and arguments == ("--compare",):
        pytest.skip("a chat compares nothing")
    places = [argument.format(**dataclasses.asdict(pair)) for argument in arguments]
    assert re.search(pattern, sentence(program, "--target", pair.target, *places))


@pytest.mark.parametrize("target", [(), ("--target", "{target}")])
@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ((), None),
        (("--method", "prompt_lookup"), PromptLookup),
        (("--drafter", "{target}"), SmallLM),
        (("--drafter", "{target}", "--method", "small_lm"), SmallLM),
        (("--drafter", "{target}", "--method", "gsd", "--tree", "token"), GSD),
        (("--drafter", "{target}", "--method", "ouroboros"), Ouroboros),
        (("--drafter", "{drafter}", "--method", "ctc"), CTCDrafter),
    ],
)
def test_methods_by_name(arguments, kind, target, pair, monkeypatch):
    """What the flags choose, for the target of the pair, which is the demo here, and named."""
    monkeypatch.setattr(demo, "drafter_folder", lambda: pair.drafter)
    parser = argparse.ArgumentParser()
    parser.add_argument("--target")
    cli.add_method(parser)
    places = [part.format(**dataclasses.asdict(pair)) for part in (*target, *arguments)]
    given = argparse.Namespace(dtype="float32", **vars(parser.parse_args(places)))
    drafter = cli.with_drafts(Engine.from_pretrained(str(pair.target)), given, 5).drafter
    assert type(drafter) is (kind or (NoDraft if target else CTCDrafter))
    assert kind is not PromptLookup or (drafter.num_nodes, drafter.max_depth) == (5, 4)


def test_generate_without_a_drafter(pair, call, tmp_path):
    """Plain decoding has no tree sizes to measure; a method without parameters has them."""
    places = ("--target", pair.target, "--prompt", "import os", "--repeats", 1)
    numbers = ("--max-new-tokens", 24, "--tree-nodes", 3, 6, "--json", tmp_path / "out.json")
    call(generate, *places, *numbers)
    plain = json.loads((tmp_path / "out.json").read_text())
    assert [size["tree_nodes"] for size in plain["sizes"]] == [1]
    assert plain["rounds"] == plain["tokens"]
    call(generate, *places, *numbers, "--method", "prompt_lookup", "--compare")
    result = json.loads((tmp_path / "out.json").read_text())
    assert [size["tree_nodes"] for size in result["sizes"]] == [3, 6]
    assert result["text"] == plain["text"] and result["identical"]
    assert result["rounds"] < result["tokens"]


def test_tokens_that_the_target_does_not_have(pair):
    engine = Engine.from_pretrained(str(pair.target))
    with pytest.raises(InputError, match=f"prompt 1: .* below .* {VOCAB}, found {VOCAB}"):
        engine.generate([[1], [2, VOCAB]], 4)
    with pytest.raises(InputError, match=r"prompt 0: .* found -1"):
        engine.encode([[-1, 3]])
    with pytest.raises(InputError, match="prompts: expected at least one, found none"):
        engine.encode([])


def test_training_refuses(sentence, tmp_path, monkeypatch):
    """Configurations and folders, before any training."""
    monkeypatch.setattr(train, "make_objective", lambda config: None)
    config, file = tmp_path / "config.yaml", tmp_path / "file"
    config.write_text("objective: target\noptim: {speed: 1}\n")
    file.touch()
    assert re.search(
        r"config key optim\.speed: expected one of rate, .* found ",
        sentence(train, "--config", config),
    )
    config.write_text("objective: target\n")
    for arguments, pattern in (
        (("--config", tmp_path / "none.yaml"), "config: expected a readable file, found .*none"),
        (("--config", config, "model.depth=3"), r"model\.depth: expected one of width, .* found"),
        (("--config", config, "run.steps=many"), r"run\.steps: expected int, found 'many'"),
        (("--config", config, "run.steps"), r"override: expected section\.field=value, found"),
        (
            ("--config", config, f"run.folder={file}/run"),
            r"run\.folder: expected a writable folder, found .*file/run",
        ),
    ):
        assert re.search(pattern, sentence(train, *arguments))


def test_a_drafter_folder_that_cannot_be_written(pair, tmp_path):
    engine = Engine.from_pretrained(str(pair.target), str(pair.drafter))
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InputError, match=r"folder: expected .* found .*file/drafter"):
        folders.save_drafter(
            file / "drafter",
            "ctc",
            engine.drafter,
            engine.draft_params,
            "tiny",
            engine.tokenizer,
            {},
        )
    assert list(tmp_path.iterdir()) == [file]


def test_results_that_cannot_be_written_leave_nothing(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(InputError, match=r"--json: expected .* found .*folder"):
        generate.write_document(str(folder), {})
    assert list(tmp_path.rglob("*")) == [folder]


def test_in_its_own_process(tmp_path):
    """Exit status and streams as a shell sees them; the cache says where it is before the error."""
    place = tmp_path / "none"
    done = subprocess.run(
        [sys.executable, "-m", "infer.generate", "--target", place, "--drafter", place],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    *notes, last = done.stderr.splitlines()
    assert last.startswith("error: target: expected an existing folder or a hub id")
    assert all(note.startswith("compiled programs are kept in") for note in notes)


FIELDS = (
    *("text", "tokens", "rounds", "accepted_length", "accepted_length_without_bonus"),
    *("tokens_per_second", "baseline_tokens_per_second", "speedup", "identical"),
)


def test_generate_end_to_end(pair, call, tmp_path):
    """Two prompts, one with every field of the JSON file; the stream is the text of the first."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "results.json"
    rows = [{"prompt": "def source_files("}, {"turns": ["import numpy", "unused"]}]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    places = ("--target", pair.target, "--drafter", pair.drafter, "--prompts", prompts)
    numbers = ("--max-new-tokens", 24, "--tree-nodes", 8, "--repeats", 1)
    printed = call(generate, *places, *numbers, "--compare", "--json", out)
    result = json.loads(out.read_text())
    assert set(FIELDS) <= set(result)
    assert result["identical"] is True
    assert printed.startswith(result["text"][0] + "\n")
    assert 0 < result["rounds"] <= result["tokens"] <= 48
    # One of the target's own tokens a round, but for rounds that end in a drafted one.
    whole = result["accepted_length_without_bonus"] - (result["accepted_length"] - 1)
    assert -1e-9 <= whole < 1
    ratio = result["tokens_per_second"] / result["baseline_tokens_per_second"]
    np.testing.assert_allclose(result["speedup"], ratio)
    assert [size["tree_nodes"] for size in result["sizes"]] == [8]
    assert re.search(r"^identical +yes$", printed, re.MULTILINE)
    assert not list(tmp_path.glob("*.part"))


def test_exact_as_the_ordinary_compiler_optimises(pair, tmp_path):
    """Tests compile in haste; here the program starts as users start it."""
    out = tmp_path / "results.json"
    inherited = {name: os.environ[name] for name in os.environ if name != "TPU_LIBRARY_PATH"}
    assert "optimization_level=0" not in inherited.get("XLA_FLAGS", "")
    arguments = ["--target", pair.target, "--drafter", pair.drafter, "--prompt", "import numpy"]
    numbers = ["--max-new-tokens", "24", "--tree-nodes", "8", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "infer.generate", *arguments, *numbers, "--compare", "--json", out],
        cwd=ROOT,
        env=inherited | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["identical"] is True and 0 < result["rounds"] <= result["tokens"] == 24


def test_one_differing_token_is_not_identical():
    def answer(*tokens):
        return Generation("", list(tokens), "length", 1, [len(tokens)], 1.0)

    ours, same = [answer(1, 2, 3), answer(4, 5)], [answer(1, 2, 3), answer(4, 5)]
    other = [answer(1, 2, 3), answer(4, 6)]
    assert generate.summarise(8, ours, [1.0, 1.0], same, [1.0, 1.0]).identical is True
    assert generate.summarise(8, ours, [1.0, 1.0], other, [1.0, 1.0]).identical is False
    assert generate.summarise(8, ours, [1.0, 1.0], [], []).identical is None


def test_the_example_of_the_readme(pair, monkeypatch, capsys):
    """As it stands, with the tiny pair in the place of the demo pair."""
    monkeypatch.setattr(demo, "target_folder", lambda: pair.target)
    monkeypatch.setattr(demo, "drafter_folder", lambda: pair.drafter)
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(examples) == 1
    names: dict[str, Any] = {}
    exec(examples[0], names)
    assert names["answer"].text in capsys.readouterr().out
    plain = names["engine"].plain()
    again = plain.decode_function(64)(
        plain.params, (), names["tokens"], names["lengths"], jax.random.key(0)
    )
    np.testing.assert_array_equal(names["output"].tokens, again.tokens)


def test_ci_runs_the_test_command_of_the_readme():
    commands = re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(commands) == 2
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == commands[1]


def test_programs_explain_themselves(monkeypatch, capsys):
    for module in MODULES:
        monkeypatch.setattr(sys, "argv", ["program", "--help"])
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(module.__name__).main()
        assert stop.value.code == 0
        assert module.__doc__.splitlines()[0] in " ".join(capsys.readouterr().out.split())


TEMPLATE = "{% for m in messages %}# {{ m.role }}\n{{ m.content }}\n{% endfor %}"


def test_chat_end_to_end(pair, call, capsys, monkeypatch, tmp_path):
    """Two turns, a reset, a message too long; the first answer is that of the one-shot program."""
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    lines = ["import os", "", "import re", "x" * 500, "/reset", "import os"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    places = ("--target", pair.target, "--drafter", pair.drafter, "--template", template)
    monkeypatch.setattr(sys, "argv", ["program", *map(str, (*places, "--max-new-tokens", 8))])
    chat.main()
    printed = capsys.readouterr()
    counts = re.findall(r"\[(\w+): (\d+) tokens in (\d+) target passes", printed.err)
    assert [(why, n) for why, n, _ in counts] == [("length", "8")] * 3
    assert re.search(r"error: conversation: expected at most .* found \d+ \(/reset", printed.err)
    engine = Engine.from_pretrained(str(pair.target), str(pair.drafter))
    first = engine.generate(["# user\nimport os\n"], 8)[0].text
    assert printed.out.startswith(first + "\n") and printed.out.endswith(first + "\n")


def test_chat_refuses(pair, sentence, tmp_path):
    places = ("--target", pair.target)
    assert "chat template: expected one in the tokenizer of" in sentence(chat, *places)
    assert "--template: expected a readable file" in sentence(
        chat, *places, "--template", tmp_path / "none"
    )


def test_generate_streams(pair, call, capsys):
    """Every prompt's answer, as sampled by ``generate`` with the same seed."""
    places = ("--target", pair.target, "--drafter", pair.drafter, "--prompt", "import os")
    printed = call(
        generate, *places, "--stream", "--max-new-tokens", 12, "--temperature", 1, "--seed", 5
    )
    engine = Engine.from_pretrained(str(pair.target), str(pair.drafter))
    answer = engine.generate(["import os"], 12, seed=5, temperature=1.0)[0]
    assert printed == answer.text + "\n\n"


def test_profile_end_to_end(pair, call, tmp_path, monkeypatch):
    """Every field of the JSON file, a picture, and bookkeeping beside a small model."""
    monkeypatch.setattr(rounds, "ROUNDS", 2)
    tiny = DecoderConfig(400, 32, 2, 4, 2, 8, 48, tied_embeddings=True)
    monkeypatch.setattr(
        profile, "bookkeeping", functools.partial(profile.bookkeeping, nodes=8, config=tiny)
    )
    out, picture = tmp_path / "cost.json", tmp_path / "cost.png"
    places = ("--target", pair.target, "--drafter", pair.drafter, "--json", out, "--plot", picture)
    printed = call(
        profile, *places, "--tree-nodes", 1, 4, "--batch", 2, "--repeats", 1, "--bookkeeping"
    )
    result = json.loads(out.read_text())
    assert [(cost["nodes"], cost["batch"]) for cost in result["results"]] == [(1, 2), (4, 2)]
    assert all(cost["every_option"] > 0 for cost in result["results"])
    assert result["bookkeeping"]["share"] > 0 and result["device"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "of a plain step" in printed
