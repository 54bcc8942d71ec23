"""Experiment files: YAML with a fixed set of keys, changed by ``section.field=value`` arguments."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import yaml

from ctc_spec_jax.draft.training import Loss, Shape
from ctc_spec_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Run:
    """Where and how long. ``folder`` (local or ``gs://``) holds checkpoints, metrics, the export.

    A run that continues with other ``steps`` follows the rate schedule of the new length. It ends
    early after ``patience`` evaluations without a longer accepted length (0: never).
    """

    folder: str = "runs/unnamed"
    seed: int = 0
    steps: int = 1000
    log_every: int = 20
    eval_every: int = 500
    checkpoint_every: int = 500
    keep: int = 2
    patience: int = 0
    tensorboard: bool = False


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW with linear warm-up, cosine decay to ``final`` x ``rate``, clipping by global norm.

    ``average`` > 0 keeps a moving average of the parameters with that decay, which is what is
    evaluated and exported.
    """

    rate: float = 1e-3
    warmup: int = 100
    final: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    decay: float = 0.1
    clip: float = 1.0
    average: float = 0.0


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; one of them may be -1: all that are left. See ``sharding``."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Batch:
    """``rows`` sequences of ``length`` tokens a step, ``microbatch`` of them at a time.

    The gradients of a step are summed on the device over its micro-batches. ``remat`` recomputes
    layers in the backward pass instead of keeping what they made.
    """

    rows: int = 16
    microbatch: int = 4
    length: int = 256
    anchors: int = 32
    remat: bool = False


@dataclasses.dataclass(frozen=True)
class Data:
    """Training text.

    ``sources`` names installed packages (``stdlib`` for the standard library) whose Python files
    are read, at most ``max_bytes`` of them unless 0, each file held out with probability
    ``heldout`` by a hash of its relative path. A target trains its own tokenizer of ``vocab_size``
    tokens, or takes the one in the folder ``tokenizer``.

    ``files`` (patterns of JSONL, plain or .gz, or .txt; see ``train.data``) are what a drafter
    learns from, each document held out with probability ``heldout`` by a hash of its id or content.
    ``template`` is a Jinja file in place of the tokenizer's chat template; ``train_on`` is
    ``assistant`` (labels in answers only) or ``all``; ``pack`` puts several documents in a row.
    Answers that come as token ids are cut where their share of repeated 8-token groups passes
    ``max_loop``. ``cache`` is a folder for tokenised documents, by default under the user's cache.
    """

    sources: tuple[str, ...] = ("stdlib",)
    max_bytes: int = 0
    heldout: float = 0.02
    tokenizer: str = ""
    vocab_size: int = 4096
    files: tuple[str, ...] = ()
    template: str = ""
    train_on: str = "assistant"
    pack: bool = True
    cache: str = ""
    max_loop: float = 0.4


@dataclasses.dataclass(frozen=True)
class Model:
    """Shape of a target that is trained from text; see ``DecoderConfig``."""

    width: int = 192
    layers: int = 10
    heads: int = 3
    kv_heads: int = 1
    mlp_width: int = 512
    rope_theta: float = 10000.0


@dataclasses.dataclass(frozen=True)
class Drafter(Shape):
    """The drafter: its ``method`` (a name of ``recipes``), its shape, and the tree that its
    evaluation decodes with. Parameters start as those of the folder ``init_from``.
    """

    method: str = "ctc"
    tree_nodes: int = 16
    init_from: str = ""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out measurement: ``rows`` sequences for the loss, ``prompts`` for the real decoder.

    The prompts, of at most ``prompt_length`` tokens, are those of ``files`` (as for
    ``train.regenerate``; their ``category`` is reported apart) or else the beginnings of held-out
    documents. ``before`` measures before the first step too.
    """

    rows: int = 64
    prompts: int = 16
    prompt_length: int = 96
    files: tuple[str, ...] = ()
    new_tokens: int = 128
    before: bool = False


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One experiment. ``objective`` is ``target`` (next token) or ``drafter``.

    ``dtype`` is that of the computation (``float32`` or ``bfloat16``) and of a frozen target;
    trained parameters and the optimiser's state are float32 always.
    """

    objective: str
    target: str = ""
    dtype: str = "float32"
    mesh: Mesh = Mesh()
    run: Run = Run()
    optim: Optim = Optim()
    batch: Batch = Batch()
    data: Data = Data()
    model: Model = Model()
    drafter: Drafter = Drafter()
    loss: Loss = dataclasses.field(default_factory=Loss)
    evaluation: Evaluation = Evaluation()

    def __post_init__(self):
        for section, names in _AT_LEAST_ONE.items():
            for name in names:
                found = getattr(getattr(self, section), name)
                if found < 1:
                    raise InputError(f"{section}.{name}: expected at least 1, found {found}")
        if self.objective not in ("target", "drafter"):
            raise InputError(f"objective: expected 'target' or 'drafter', found {self.objective!r}")
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"dtype: expected 'float32' or 'bfloat16', found {self.dtype!r}")
        if not 0 <= self.optim.average < 1:
            raise InputError(f"optim.average: expected 0 to 1, found {self.optim.average}")
        if self.batch.rows % self.batch.microbatch:
            raise InputError(
                f"batch.microbatch: expected a divisor of batch.rows ({self.batch.rows}), "
                f"found {self.batch.microbatch}"
            )
        if self.model.width % self.model.heads:
            raise InputError(
                f"model.heads: expected a divisor of model.width ({self.model.width}), "
                f"found {self.model.heads}"
            )
        if self.data.vocab_size < 257:
            raise InputError(
                "data.vocab_size: expected at least 257 (256 bytes and the end of text), "
                f"found {self.data.vocab_size}"
            )
        if self.data.train_on not in ("assistant", "all"):
            raise InputError(
                f"data.train_on: expected 'assistant' or 'all', found {self.data.train_on!r}"
            )
        if not 0 <= self.data.heldout < 1:
            raise InputError(f"data.heldout: expected 0 <= share < 1, found {self.data.heldout}")
        if not 0 <= self.loss.on_policy <= 1:
            raise InputError(f"loss.on_policy: expected 0 to 1, found {self.loss.on_policy}")
        if not 0 < self.loss.beta < 1:
            raise InputError(f"loss.beta: expected between 0 and 1, found {self.loss.beta}")
        if not self.loss.temperature > 0:
            raise InputError(f"loss.temperature: expected above 0, found {self.loss.temperature}")


_AT_LEAST_ONE = {
    "run": ("steps", "log_every", "eval_every", "checkpoint_every", "keep"),
    "batch": ("rows", "microbatch", "length", "anchors"),
    "model": ("width", "layers", "heads", "kv_heads", "mlp_width"),
    "drafter": ("layers", "frames"),
    "loss": ("labels", "chunk"),
    "evaluation": ("rows", "prompts", "prompt_length", "new_tokens"),
}


def load_config(path: str, overrides: typing.Sequence[str] = ()) -> TrainConfig:
    """Read an experiment file and apply ``section.field=value`` overrides (values are YAML).

    Raises:
      InputError: unreadable file, unknown key, or a value of the wrong type.
    """
    try:
        with open(path, encoding="utf-8") as file:
            tree = _parse(file, f"config: expected YAML in {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config: expected a readable file, found {path} ({error})") from error
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise InputError(f"config: expected sections in {path}, found {type(tree).__name__}")
    for override in overrides:
        name, separator, value = override.partition("=")
        if not separator:
            raise InputError(f"override: expected section.field=value, found {override!r}")
        *sections, field = name.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise InputError(f"override: expected a section at {section!r}, found a value")
        node[field] = _parse(value, f"override: expected a YAML value in {override!r}")
    return _build(TrainConfig, tree, "")


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The resolved configuration as plain YAML types; ``load_config`` reads it back unchanged."""

    def plain(value) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


def _parse(text, expected: str):
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        # The parser's own message spans several lines.
        raise InputError(f"{expected}, found {' '.join(str(error).split())}") from error


def _build(cls, tree: dict[str, Any], prefix: str):
    hints = typing.get_type_hints(cls)
    unknown = [key for key in tree if key not in hints]
    if unknown:
        raise InputError(
            f"config key {prefix}{unknown[0]}: expected one of {', '.join(hints)}, found another"
        )
    if "objective" in hints and "objective" not in tree:
        raise InputError("config key objective: expected 'target' or 'drafter', found nothing")
    values = {}
    for key, value in tree.items():
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise InputError(f"config key {prefix}{key}: expected a section, found {value!r}")
            values[key] = _build(hint, value, f"{prefix}{key}.")
        else:
            values[key] = _coerce(value, hint, prefix + key)
    return cls(**values)


def _coerce(value, hint: Any, name: str):
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        if not isinstance(value, list | tuple):
            raise InputError(f"config key {name}: expected a list, found {value!r}")
        return tuple(_coerce(entry, item, name) for entry in value)
    if hint is float and isinstance(value, str):
        # YAML reads 1e-3 as text: its floats need a dot.
        try:
            value = float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise InputError(f"config key {name}: expected {hint.__name__}, found {value!r}")
    return value
