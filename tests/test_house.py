"""Rules of the house that a reviewer would otherwise have to remember."""

import ast
import pathlib
import re

import pytest

from ctc_spec_jax import recipes

ROOT = pathlib.Path(__file__).parent.parent
PROGRAMS = ("ctc_spec_jax", "train", "infer")
FILES = sorted(path for folder in PROGRAMS for path in (ROOT / folder).rglob("*.py"))
METHODS = ("ctc", "medusa", "eagle", "hydra", "glide", "pearl", "ngram", "diffusion", "speculator")
METHODS += ("small_lm", "prompt_lookup")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes_and_docstrings(path):
    """No file over 350 lines, no function over 80; every public name says what it is."""
    text = path.read_text()
    assert text.count("\n") <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, node.name
    if path.is_relative_to(ROOT / "ctc_spec_jax"):
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
                assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("name", ["decode.py", "verify.py", "accept.py", "types.py"])
def test_the_loop_knows_no_method(name):
    """The loop, the rules and the types neither import drafters nor name a method."""
    text = (ROOT / "ctc_spec_jax" / name).read_text()
    assert not re.search(r"^(from|import) .*\bdraft\b", text, re.MULTILINE)
    code = re.sub(r'""".*?"""|#.*|ctc_spec_jax', "", text, flags=re.DOTALL)
    assert not re.findall(rf"\b\w*(?:{'|'.join(METHODS)})\w*\b", code, re.IGNORECASE)


OUTSIDE = [
    path
    for path in FILES
    if path.parent.name != "draft" and path.name not in ("recipes.py", "overlap.py")
]
KNOWN = {
    "losses.py": {"ctc"},  # an objective of that name
    "config.py": {"ctc"},  # what an experiment trains unless it says otherwise
    "compile.py": {"draft.ctc"},  # programs that measure this drafter on shapes alone
    "profile.py": {"draft.ctc"},
}


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_recipes_know_the_names_of_methods(path):
    """Outside ``draft/`` no method is asked for by its name and no method's file is imported."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and node.value in recipes.RECIPES:
            found.add(node.value)
        for module in _modules(node):
            if module.startswith("ctc_spec_jax.draft"):
                found.add(module.removeprefix("ctc_spec_jax."))
    assert found - {"draft.training"} <= KNOWN.get(path.name, set())


def _modules(node) -> list[str]:
    """Full names of what an import statement may load."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom) or node.module is None:
        return []
    if node.module in ("ctc_spec_jax", "ctc_spec_jax.draft"):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [node.module]


def test_linen_only_where_parameters_live():
    """Flax is imported in ``models/`` and ``draft/`` alone."""
    for path in FILES:
        inside = path.parent.name in ("models", "draft")
        if not inside and path.is_relative_to(ROOT / "ctc_spec_jax"):
            assert not re.search(r"^(from|import) flax", path.read_text(), re.MULTILINE), path


def test_torch_is_never_imported_by_the_library():
    allowed = {ROOT / "infer" / "peers.py"}  # compares with transformers, on request
    for path in set(FILES) - allowed:
        assert not re.search(r"^\s*(from|import) torch", path.read_text(), re.MULTILINE), path
