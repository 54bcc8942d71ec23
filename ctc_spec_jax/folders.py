"""Targets and drafters on disk.

A drafter folder holds ``config.json`` (what it is and which target it fits), ``model.safetensors``
and ``training.json`` (how it was made).
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file

from ctc_spec_jax import recipes, sharding
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models import convert
from ctc_spec_jax.models.config import FAMILIES
from ctc_spec_jax.models.decoder import DecoderLM
from ctc_spec_jax.models.int8 import own_head, rounded_params, rounding
from ctc_spec_jax.types import Params


def load_target(
    path_or_id: str,
    dtype=jnp.float32,
    revision: str | None = None,
    mesh: Mesh | None = None,
    int8: bool = False,
):
    """Target, parameters and tokenizer of a Hugging Face folder or hub id.

    On a mesh every parameter lies as ``sharding.parameters`` says; ``int8``: see ``models.int8``.
    """
    folder = convert.target_folder(path_or_id, revision)

    def put(path, x):
        return jnp.asarray(x) if mesh is None else _place(path[-1], x, mesh)

    store = rounding(put) if int8 else put
    lm, params = convert.load_target(str(folder), dtype, put=store)
    params = own_head(params, put) if int8 else params
    tokenizer = load_tokenizer(folder)
    positions = json.loads((folder / "config.json").read_text()).get("max_position_embeddings")
    if isinstance(positions, int):
        # The model's own limit counts: tokenizer files often name none or another one.
        tokenizer.model_max_length = positions
    return lm, params, tokenizer


def stop_ids(path_or_id: str, tokenizer, revision: str | None = None) -> tuple[int, ...]:
    """Token ids that end an answer of a target, as ``transformers`` ``generate`` finds them.

    Those of generation_config.json or else of config.json, where chat models list several; or
    else the tokenizer's end-of-text token.
    """
    folder = convert.target_folder(path_or_id, revision)
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads((folder / name).read_text()).get("eos_token_id")
        except (OSError, json.JSONDecodeError):
            continue
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)


def load_tokenizer(folder):
    """The tokenizer of a Hugging Face folder."""
    # Nothing here needs torch, so the advice to install it would mislead.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    expected = f"target: expected tokenizer files in {folder}, found none that load"
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # broken files raise the bare Exception of the tokenizers library
        raise InputError(expected) from error
    # Where there is no file, transformers makes up an empty tokenizer for some families.
    names = tokenizer.vocab_files_names.values()
    if names and not any((pathlib.Path(folder) / name).is_file() for name in names):
        raise InputError(expected)
    return tokenizer


def tokenizer_hash(tokenizer) -> str:
    """SHA-256 of the vocabulary and the special tokens, so that a pair can be checked."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def save_drafter(
    folder, method: str, drafter, params: Params, target: str, tokenizer, training: dict
) -> None:
    """Write a drafter folder; it appears under its name only when it is complete.

    ``method`` is the name of the recipe that ``drafter`` was made by. A language model's folder is
    one of transformers, tokenizer included.
    """
    final = pathlib.Path(folder)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        part = pathlib.Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}-"))
    except OSError as error:
        raise InputError(
            f"folder: expected a writable place, found {final} ({error.strerror})"
        ) from error
    try:
        if recipes.find(method).language_model:
            convert.save_target(part, DecoderLM(drafter.config), params, _of_tokenizer(tokenizer))
            tokenizer.save_pretrained(part)
        else:
            _write_network(part, method, drafter, params, target, tokenizer, training)
        (part / "training.json").write_text(json.dumps(training, indent=1) + "\n")
        part.chmod(0o755)
        if final.exists():
            shutil.rmtree(final)
        part.rename(final)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _of_tokenizer(tokenizer) -> dict[str, Any]:
    """What config.json says of the tokenizer of a language model."""
    names = ("eos_token_id", "pad_token_id", "bos_token_id")
    found = {name: getattr(tokenizer, name) for name in names}
    # A tokenizer without a limit names a huge one.
    if tokenizer.model_max_length < 2**31:
        found["max_position_embeddings"] = tokenizer.model_max_length
    return found


def _write_network(
    part: pathlib.Path, method: str, drafter, params: Params, target: str, tokenizer, training: dict
) -> None:
    config = dataclasses.asdict(drafter.config)
    taps = config.pop("taps")
    description = {
        "model_type": method,
        **config,
        **recipes.find(method).notes(drafter.config),
        "target_layer_ids": list(taps),
        "target_layer_convention": "output: residual stream after that layer, counted from 0",
        "tree_depth": drafter.max_depth,
        "target": target,
        "tokenizer_sha256": tokenizer_hash(tokenizer),
        "versions": {name: _version(name) for name in ("jax", "flax", "ctc-spec-jax")},
        "command": training.get("command", ""),
    }
    save_file(
        {name: np.asarray(value, order="C") for name, value in params.items()},
        part / "model.safetensors",
    )
    (part / "config.json").write_text(json.dumps(description, indent=1) + "\n")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "not installed"


def load_drafter(
    folder,
    lm: DecoderLM,
    tokenizer=None,
    nodes: int = 16,
    dtype=jnp.float32,
    tree: str = "",
    mesh: Mesh | None = None,
    method: str = "",
):
    """Drafter and parameters of a drafter folder, checked against the target.

    Args:
      folder: of ``save_drafter``; or that of a language model of the target's vocabulary, which
        then drafts itself.
      lm: the target it will draft for.
      tokenizer: the target's, or None to skip its check.
      nodes: tree nodes N, root included.
      dtype: of the parameters.
      tree: how a tree is built where the method knows several ways; its default if empty.
      mesh: where the parameters lie; None for the default device.
      method: by which the folder drafts, a name of ``recipes``; its default if empty. Only those
        of a language model leave a choice.

    Raises:
      InputError: missing or broken files, or a drafter made for another target or method.
    """
    folder = pathlib.Path(folder)
    description = _read_config(folder)
    if nodes < 2:
        raise InputError(f"tree nodes: expected at least 2, found {nodes}")
    if description["model_type"] in FAMILIES:
        recipe = _choose(method or recipes.LANGUAGE_MODEL, recipes.of_language_models(), folder)
        network, params = _load_language_model(folder, lm, tokenizer, dtype, mesh)
        return recipe.drafter(network, nodes, nodes - 1, tree), params
    kind = description["model_type"]
    recipe = _choose(method or kind, [kind], folder)
    network = _network(recipe.config, description, folder / "config.json")
    _check_pair(network, description, lm, tokenizer)
    drafter = recipe.drafter(network, nodes, description["tree_depth"], tree)
    return drafter, _read_params(folder, drafter, dtype, mesh)


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        description = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"drafter: expected a folder with config.json, found {folder}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"drafter: expected JSON in {path}, found {error}") from error
    kind = description.get("model_type") if isinstance(description, dict) else None
    if kind not in {*recipes.RECIPES, *FAMILIES}.difference(recipes.of_language_models()):
        names = ", ".join([*recipes.RECIPES, *FAMILIES])
        raise InputError(f"drafter model_type: expected one of {names}, found {kind!r} in {path}")
    return description


def _choose(method: str, known: list[str], folder: pathlib.Path) -> recipes.Recipe:
    recipe = recipes.find(method)
    if method not in known:
        raise InputError(f"method: expected {' or '.join(known)} for {folder}, found {method!r}")
    return recipe


def _load_language_model(folder, lm: DecoderLM, tokenizer, dtype, mesh):
    own, params, own_tokenizer = load_target(str(folder), dtype, mesh=mesh)
    if own.vocab_size != lm.vocab_size:
        raise InputError(
            f"drafter vocab_size: expected {lm.vocab_size} as in the target, rows of padding "
            f"counted, found {own.vocab_size}"
        )
    if tokenizer is not None:
        _check_tokenizer(tokenizer, tokenizer_hash(own_tokenizer))
    return own.config, params


def _network(network_class, description: dict[str, Any], path: pathlib.Path):
    """The network's configuration, every key that loading needs checked for its type."""
    number = {int: "a whole number", float: "a number", list: "a list", str: "a text"}
    kinds: dict[str, type] = {
        field.name: float if isinstance(field.default, float) else int
        for field in dataclasses.fields(network_class)
    }
    del kinds["taps"]
    # Switches came later than some folders, which are as if these were off.
    switches = {
        field.name: False for field in dataclasses.fields(network_class) if field.default is False
    }
    description = switches | description
    other = {"target_layer_ids": list, "tree_depth": int, "tokenizer_sha256": str}
    for key, kind in (kinds | other).items():
        value = description.get(key)
        if not isinstance(value, int if kind is float and isinstance(value, int) else kind):
            raise InputError(f"drafter {key}: expected {number[kind]} in {path}, found {value!r}")
    taps = tuple(description["target_layer_ids"])
    try:
        return network_class(taps=taps, **{name: description[name] for name in kinds})
    except ValueError as error:
        raise InputError(f"drafter {error} in {path}") from error


def _check_pair(network, description: dict[str, Any], lm: DecoderLM, tokenizer) -> None:
    for name in ("vocab_size", "width"):
        expected, found = getattr(lm.config, name), getattr(network, name)
        if expected != found:
            raise InputError(f"drafter {name}: expected {expected} as in the target, found {found}")
    for layer in network.taps:
        if layer not in range(lm.config.num_layers):
            raise InputError(
                f"drafter target_layer_ids: expected layers below {lm.config.num_layers}, "
                f"found {layer!r}"
            )
    if tokenizer is not None:
        _check_tokenizer(tokenizer, description["tokenizer_sha256"])


def _check_tokenizer(tokenizer, expected: str) -> None:
    found = tokenizer_hash(tokenizer)
    if found != expected:
        expected = f"the vocabulary the drafter was trained with (sha256 {expected[:12]})"
        raise InputError(f"drafter tokenizer: expected {expected}, found {found[:12]}")


def _read_params(folder: pathlib.Path, drafter, dtype, mesh: Mesh | None) -> Params:
    path = folder / "model.safetensors"
    try:
        found = load_file(path)
    except Exception as error:  # safetensors raises its own type for truncated files
        raise InputError(f"drafter: expected a complete {path}, found {error}") from error
    shapes = jax.eval_shape(lambda: drafter.init_params(jax.random.key(0)))
    for name, shape in shapes.items():
        if name not in found:
            raise InputError(f"drafter: expected tensor {name!r} in {path}, found none")
        if found[name].shape != shape.shape:
            raise InputError(
                f"drafter tensor {name!r}: expected shape {shape.shape}, found {found[name].shape}"
            )
    if mesh is None:
        return {name: jnp.asarray(found[name], dtype) for name in shapes}
    return {name: _place(name, found[name].astype(dtype), mesh) for name in shapes}


def _place(name: str, leaf: np.ndarray, mesh: Mesh):
    return jax.device_put(leaf, sharding.home(mesh, name, leaf.shape))


def abstract_target(
    path: str, dtype=jnp.float32, num_layers: int = 0, int8: bool = False
) -> tuple[DecoderLM, Params]:
    """Target and the shapes of its parameters, of a ``config.json`` without weights.

    Args:
      path: the file, such as those of ``configs/models``.
      dtype: of the parameters.
      num_layers: the first layers alone; 0 for all.
      int8: matrices in eight bits, see ``models.int8``.

    Raises:
      InputError: the file is missing, is not a JSON object, or describes an unsupported model.
    """
    config = convert.read_config(path)
    if num_layers < 0 or num_layers > config.num_layers:
        raise InputError(f"layers: expected 0 to {config.num_layers}, found {num_layers}")
    if num_layers:
        windows = config.windows[:num_layers]
        config = dataclasses.replace(config, num_layers=num_layers, windows=windows)
    lm = DecoderLM(config)
    shapes = abstract_params(lm.init, dtype)
    return lm, jax.eval_shape(rounded_params, shapes) if int8 else shapes


def abstract_params(init, dtype=jnp.float32) -> Params:
    """Shapes of the parameters that ``init(key)`` would make, in ``dtype``."""
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
