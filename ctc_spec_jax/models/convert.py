"""Hugging Face folders to parameters and back, one tensor at a time and without torch.

Shape letters: V vocabulary, D width, K kv heads, G query heads per kv head, C head width, W MLP
width.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models.config import DecoderConfig, config_from_hf, config_to_hf
from ctc_spec_jax.models.decoder import DecoderLM
from ctc_spec_jax.models.int8 import KERNELS
from ctc_spec_jax.types import Params

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Not "*": repositories also hold torch weights and second copies of the same weights.
_HUB_FILES = ["*.json", "*.txt", "*.jinja", "tokenizer*", "model*.safetensors"]


def target_folder(path_or_id: str, revision: str | None = None) -> Path:
    """The folder itself, or the snapshot of a hub model ``owner/name`` (downloaded if needed).

    The Hugging Face cache, ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` are honoured.

    Raises:
      InputError: no such folder or model, an unknown revision, no access, or no network.
    """
    folder = Path(path_or_id).expanduser()
    if path_or_id and folder.is_dir():
        return folder
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(path_or_id)):
        raise InputError(
            f"target: expected an existing folder or a hub id 'owner/name', found {path_or_id!r}"
        )
    import huggingface_hub
    from huggingface_hub import errors

    download: Callable[..., str] = huggingface_hub.snapshot_download
    expected = f"target: expected a folder or a hub model, found no folder {path_or_id!r} and"
    try:
        return Path(
            download(
                path_or_id, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]
            )
        )
    except errors.GatedRepoError as error:
        raise InputError(
            f"{expected} a gated model (accept its terms on the hub and set HF_TOKEN)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(f"{expected} no such model (or a private one: set HF_TOKEN)") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(
            f"revision: expected a branch, tag or commit of {path_or_id}, found {revision!r}"
        ) from error
    # The network stack of the hub client raises types that no common base class covers.
    except Exception as error:
        raise InputError(
            f"{expected} neither a cached copy nor an answer of the hub ({type(error).__name__})"
        ) from error


def load_target(
    path_or_id: str | os.PathLike,
    dtype: Any = jnp.float32,
    revision: str | None = None,
    *,
    put: Callable[[tuple[str, ...], np.ndarray], Any] | None = None,
) -> tuple[DecoderLM, Params]:
    """Target of a Hugging Face folder or hub id; every tensor is cast to ``dtype`` as it is read.

    Host memory holds one raw tensor and one assembled leaf beside what was already loaded.

    Args:
      path_or_id: folder with ``config.json`` and safetensors, or a hub id ``owner/name``.
      dtype: floating dtype of all parameters.
      revision: branch, tag or commit of a hub id.
      put: places one leaf, called with its path in the tree (``("layer_0", "qkv")``); the default
        is the default device. With sharded placement no device holds the whole model.

    Raises:
      InputError: anything wrong with the folder, ``config.json`` or the weights.
    """
    folder = target_folder(os.fspath(path_or_id), revision)
    config = read_config(folder)
    lm = DecoderLM(config)
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    with _open_tensors(folder) as tensors:
        _check_tensors(folder, tensors, _expected_shapes(shapes, config), config.tied_embeddings)

        def read(path, shape):
            names = tuple(entry.key for entry in path)
            leaf = np.empty(shape.shape, jnp.dtype(dtype))
            for part in _parts(names, leaf, config.group):
                _copy(part.view, tensors[part.name].get_tensor(part.name))
            return jnp.asarray(leaf) if put is None else put(names, leaf)

        return lm, jax.tree_util.tree_map_with_path(read, shapes)


def read_config(path: str | os.PathLike) -> DecoderConfig:
    """Decoder configuration of a ``config.json``, or of the one in a folder.

    Raises:
      InputError: the file is missing, is not a JSON object, or describes an unsupported model.
    """
    path = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        return config_from_hf(_read_json(path))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def save_target(
    folder: str | os.PathLike,
    lm: DecoderLM,
    params: Params,
    hf_extra: dict[str, Any] | None = None,
) -> None:
    """Write ``config.json`` and ``model.safetensors`` as transformers reads them.

    Both files are written into a temporary sibling, which is then renamed, so ``folder`` never
    holds half a file. In a folder that exists already the two files are replaced one after the
    other and other files stay. Leaves keep their dtype; ``load_target`` gives them back bit for
    bit.

    Args:
      hf_extra: more keys of ``config.json``, such as token ids; see ``config_to_hf``.

    Raises:
      InputError: ``params`` do not fit ``lm``, no supported family has this architecture, or
        ``folder`` cannot be written.
    """
    folder = Path(folder).resolve()
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    if jax.tree.map(lambda x: x.shape, params) != jax.tree.map(lambda x: x.shape, shapes):
        raise InputError("params: expected the parameters of lm, found other names or shapes")
    dtype = jnp.dtype(params["embedding"].dtype).name
    try:
        hf = config_to_hf(lm.config, hf_extra)
    except ValueError as error:
        raise InputError(str(error)) from error
    hf |= {"dtype": dtype, "torch_dtype": dtype}
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        _write_safetensors(temporary / _WEIGHTS, params, lm.config)
        (temporary / "config.json").write_text(json.dumps(hf, indent=2, sort_keys=True) + "\n")
        if folder.is_dir():
            for name in (_WEIGHTS, "config.json"):
                os.replace(temporary / name, folder / name)
        else:
            os.rename(temporary, folder)
    except OSError as error:
        raise InputError(f"{folder}: expected a writable folder, found {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _Part(NamedTuple):
    """One Hugging Face tensor as a view of a leaf: axes in Hugging Face order, out axes split."""

    name: str
    view: np.ndarray
    shape: tuple[int, ...]


_NAMES = {
    "embedding": "model.embed_tokens",
    "head": "lm_head",
    "norm": "model.norm",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "output": "self_attn.o_proj",
    "down": "mlp.down_proj",
}


def _parts(path: tuple[str, ...], leaf: np.ndarray, group: int) -> list[_Part]:
    """The Hugging Face tensors that make up one leaf."""
    *layer, leaf_name = path
    stem = f"model.layers.{layer[0].removeprefix('layer_')}." if layer else ""
    name = leaf_name.removesuffix("_bias")
    suffix = "weight" if name == leaf_name else "bias"
    if name == "qkv":
        slots = {"q_proj": slice(group), "k_proj": group, "v_proj": group + 1}
        views = {f"self_attn.{key}": leaf[..., slot, :] for key, slot in slots.items()}
    elif name == "gate_up":
        views = {"mlp.gate_proj": leaf[..., 0, :], "mlp.up_proj": leaf[..., 1, :]}
    else:
        views = {_NAMES[name]: leaf}
    parts = []
    for key, view in views.items():
        # A kernel is (in, out) here and (out, in) there.
        view = np.moveaxis(view, 0, -1) if leaf_name in KERNELS else view
        matrix = leaf_name in KERNELS or leaf_name == "embedding"
        shape = (math.prod(view.shape[:-1]), view.shape[-1]) if matrix else (view.size,)
        parts.append(_Part(f"{stem}{key}.{suffix}", view, shape))
    return parts


def _expected_shapes(shapes, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """{Hugging Face name: shape} of all tensors of a model."""
    expected = {}
    for path, shape in jax.tree_util.tree_leaves_with_path(shapes):
        leaf = np.broadcast_to(np.float32(0), shape.shape)  # no memory behind it
        names = tuple(entry.key for entry in path)
        expected |= {part.name: part.shape for part in _parts(names, leaf, config.group)}
    return expected


def _copy(view: np.ndarray, tensor: np.ndarray) -> None:
    tensor = tensor.reshape(view.shape)
    if view.ndim == 1 or view.flags.c_contiguous:
        view[...] = tensor
        return
    # Blocks of rows stay in the processor's cache: transposing all at once takes twice the time.
    for index in np.ndindex(view.shape[:-2]):
        for row in range(0, view.shape[-2], 64):
            block = (*index, slice(row, row + 64))
            view[block] = tensor[block]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise InputError(f"target: expected an existing folder, found none at {path.parent}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: expected a file, found none") from error
    except OSError as error:
        raise InputError(f"{path}: expected a readable file, found {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: expected JSON, found {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    index = folder / _INDEX
    if not index.is_file():
        others = sorted(path.name for path in folder.iterdir() if "model" in path.name)
        found = f"only {others[0]}" if others else "neither"
        raise InputError(f"{folder}: expected {_WEIGHTS} or {_INDEX}, found {found}")
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{index}: expected an object weight_map of file names, found {names!r}")
    files = [folder / name for name in sorted(set(names.values()))]
    for file in files:
        if not file.is_file():
            raise InputError(f"{index}: expected shard {file.name} in the folder, found none")
    return files


@contextlib.contextmanager
def _open_tensors(folder: Path) -> Iterator[dict[str, Any]]:
    """{tensor name: open file that holds it}; the files are memory-mapped, not read."""
    with contextlib.ExitStack() as stack:
        tensors = {}
        for file in _weight_files(folder):
            try:
                opened = stack.enter_context(safe_open(file, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise InputError(f"{file}: expected whole safetensors, found {error}") from error
            tensors |= dict.fromkeys(opened.keys(), opened)
        yield tensors


def _check_tensors(folder: Path, tensors, expected: dict[str, tuple[int, ...]], tied: bool) -> None:
    """Names, shapes and dtypes, from the headers alone: a bad model fails before it is read."""
    for name, shape in expected.items():
        if name not in tensors:
            raise InputError(f"{folder}: expected tensor {name}, found none")
        header = tensors[name].get_slice(name)
        if tuple(header.get_shape()) != shape:
            raise InputError(
                f"{folder}: expected {name} of shape {shape} by config.json, "
                f"found {tuple(header.get_shape())}"
            )
        if header.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise InputError(f"{folder}: expected {name} in floats, found {header.get_dtype()}")
    if tied and "lm_head.weight" in tensors:
        pair = (tensors[n].get_tensor(n) for n in ("lm_head.weight", "model.embed_tokens.weight"))
        if not np.array_equal(*pair):
            raise InputError(
                f"{folder}: expected lm_head.weight equal to the embedding "
                "(tie_word_embeddings is true), found other values"
            )
    known = {*expected, "lm_head.weight"} if tied else {*expected}
    # Old files store the rotary frequencies, which config.json determines.
    unknown = sorted(n for n in tensors if n not in known and not n.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise InputError(
            f"{folder}: expected only tensors of the architecture in config.json, "
            f"found {unknown[0]} ({len(unknown)} unknown)"
        )


_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def _write_safetensors(path: Path, params: Params, config: DecoderConfig) -> None:
    """One file, tensor by tensor: the library's own writer wants all of them in memory at once."""
    leaves = [
        (tuple(entry.key for entry in path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    leaves.sort(key=lambda item: -item[1].dtype.itemsize)  # keeps every tensor aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for names, leaf in leaves:
        for part in _parts(names, np.broadcast_to(np.float32(0), leaf.shape), config.group):
            start, end = end, end + math.prod(part.shape) * leaf.dtype.itemsize
            header[part.name] = {
                "dtype": _DTYPES[leaf.dtype.name],
                "shape": part.shape,
                "data_offsets": (start, end),
            }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for names, leaf in leaves:
            for part in _parts(names, np.asarray(leaf), config.group):
                # As bytes, because bfloat16 has no buffer interface.
                file.write(np.ascontiguousarray(part.view).reshape(-1).view(np.uint8).data)
