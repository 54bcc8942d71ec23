"""The only place that maps the name of a drafting method to its parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ctc_spec_jax.draft.block import BlockConfig, BlockDrafter, BlockLoss, ProductTree, block_config
from ctc_spec_jax.draft.ctc import CTCConfig, CTCDrafter, ctc_config, published
from ctc_spec_jax.draft.ctc_labels import LabelConfig, LabelLoss, label_config, label_drafter
from ctc_spec_jax.draft.ctc_loss import CTCLoss
from ctc_spec_jax.draft.diffusion import (
    DiffusionConfig,
    diffusion_config,
    diffusion_drafter,
    diffusion_products,
)
from ctc_spec_jax.draft.diffusion_loss import DiffusionLoss
from ctc_spec_jax.draft.eagle import EagleConfig, eagle_config, eagle_drafter
from ctc_spec_jax.draft.frames_loss import frames_products
from ctc_spec_jax.draft.glide import GlideConfig, glide_config, glide_drafter, glide_notes
from ctc_spec_jax.draft.gsd import gsd_drafter
from ctc_spec_jax.draft.heads_loss import HeadsLoss
from ctc_spec_jax.draft.hydra import HydraConfig, HydraDrafter, hydra_config
from ctc_spec_jax.draft.medusa import MedusaConfig, MedusaDrafter, medusa_config
from ctc_spec_jax.draft.mlp_speculator import (
    MLPSpeculatorConfig,
    MLPSpeculatorDrafter,
    mlp_speculator_config,
)
from ctc_spec_jax.draft.ngram import LookupConfig, PhrasePool, PoolConfig, PromptLookup
from ctc_spec_jax.draft.ouroboros import ouroboros_drafter
from ctc_spec_jax.draft.pearl import pearl_drafter
from ctc_spec_jax.draft.sequential_loss import SequentialLoss
from ctc_spec_jax.draft.small_lm import Best, Drawn, SmallLM
from ctc_spec_jax.draft.small_lm_loss import SmallLMLoss, small_lm_products
from ctc_spec_jax.draft.stop import AdaEDL, Never
from ctc_spec_jax.draft.training import Shape
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.models.decoder import DecoderLM
from ctc_spec_jax.tree.ctc_prefix import PrefixTree
from ctc_spec_jax.tree.ctc_transform import TransformTree, default_template
from ctc_spec_jax.types import Drafter, Verifier
from ctc_spec_jax.verify import Greedy, TargetSample, Typical
from ctc_spec_jax.verify_sampled import Block, MultiCandidate, Rejection


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a method is put together.

    ``config`` is the class of its network configuration: a frozen dataclass of numbers with
    ``width``, ``vocab_size`` and ``taps``. ``network(target, shape)`` makes one for a target;
    ``drafter(network, nodes, depth, tree)`` a drafter of trees of at most that many nodes and that
    depth, ``tree`` naming one of its ways to build them (empty: the best). ``loss`` is a
    ``training.DraftLoss``, None where nothing is trained. ``notes(network)`` are further entries
    of config.json, for readers. ``products(network, length, anchors)`` counts the multiply-adds of
    a training row's forward pass, those of a frozen LM head and all others; without it a run's
    count of operations leaves the drafter out. ``language_model`` says that ``network`` is the
    configuration of one, and that the drafter's folder is that of a language model as a target's.
    ``drawn`` names the way to build chains that are drawn from a law that they state, if any.
    """

    config: type
    network: Callable[[DecoderConfig, Shape], Any]
    drafter: Callable[[Any, int, int, str], Any]
    loss: Callable[..., Any] | None = None
    notes: Callable[[Any], dict[str, Any]] = lambda network: {}
    products: Callable[[Any, int, int], tuple[int, int]] = lambda network, length, anchors: (0, 0)
    language_model: bool = False
    drawn: str = ""


def find(name: str) -> Recipe:
    """The recipe of a method.

    Raises:
      InputError: no such name.
    """
    if name not in RECIPES:
        raise InputError(f"method: expected one of {', '.join(RECIPES)}, found {name!r}")
    return RECIPES[name]


def of_language_models() -> list[str]:
    """The methods whose drafter folders are those of language models."""
    return [name for name, recipe in RECIPES.items() if recipe.language_model]


def name_of(network: Any) -> str:
    """The name of ``of``."""
    return next(name for name, recipe in RECIPES.items() if recipe.config is type(network))


def of(network: Any) -> Recipe:
    """The recipe whose networks are described by objects like this one."""
    return next(recipe for recipe in RECIPES.values() if recipe.config is type(network))


def _ctc_network(target: DecoderConfig, shape: Shape) -> CTCConfig:
    if shape.preset not in ("", "published"):
        raise InputError(f"drafter.preset: expected 'published' or '', found {shape.preset!r}")
    if shape.preset:
        return published(target)
    return ctc_config(target, shape.layers, shape.frames, shape.taps, shape.mlp_width)


def _ctc_drafter(network: CTCConfig, nodes: int, depth: int, tree: str) -> CTCDrafter:
    trees = ("", "prefix", "transform")
    if tree not in trees:
        raise InputError(f"tree: expected one of {', '.join(trees[1:])}, found {tree!r}")
    if tree == "transform":
        template = default_template(nodes, network.frames, network.vocab_size + 1)
        return CTCDrafter(network, TransformTree(template))
    return CTCDrafter(network, PrefixTree(nodes, min(depth, network.frames, nodes - 1)))


def _block_drafter(network: BlockConfig, nodes: int, depth: int, tree: str) -> BlockDrafter:
    if tree not in ("", "product"):
        raise InputError(f"tree: expected product, found {tree!r}")
    return BlockDrafter(network, ProductTree(nodes, min(depth, network.frames, nodes - 1)))


def _ctc_notes(network: CTCConfig) -> dict[str, Any]:
    collapse = "merge adjacent repeats, then delete blanks"
    return {"blank_id": network.vocab_size, "collapse": collapse}


def _small_lm_network(target: DecoderConfig, shape: Shape) -> DecoderConfig:
    width = shape.width or target.width
    heads = max(1, width // target.head_width)
    same = width == target.width
    return dataclasses.replace(
        target,
        width=width,
        num_layers=shape.layers,
        num_heads=target.num_heads if same else heads,
        num_kv_heads=target.num_kv_heads if same else heads,
        mlp_width=shape.mlp_width or target.mlp_width,
        windows=(),
    )


_SMALL_LM_TREES = {
    "greedy": (Best(), Never()),
    "sampled": (Drawn(), Never()),
    "siblings": (Drawn(), Never()),
    "greedy-adaptive": (Best(), AdaEDL()),
    "sampled-adaptive": (Drawn(), AdaEDL()),
}


def _small_lm_drafter(network: DecoderConfig, nodes: int, depth: int, tree: str) -> SmallLM:
    tree = tree or "greedy"
    if tree not in _SMALL_LM_TREES:
        raise InputError(f"tree: expected one of {', '.join(_SMALL_LM_TREES)}, found {tree!r}")
    first, depth = 1, _branches(nodes, depth)[1]
    if tree == "siblings":
        first, depth = _branches(nodes, min(depth, (nodes - 1) // 4))
        first = min(first, network.vocab_size)  # siblings differ
    return SmallLM(DecoderLM(network), (first, *[1] * (depth - 1)), *_SMALL_LM_TREES[tree])


def _branches(nodes: int, depth: int) -> tuple[int, int]:
    """How many branches of which depth fit into a tree of so many nodes."""
    depth = max(1, min(depth, nodes - 1))
    return max(1, (nodes - 1) // depth), depth


def _text_drafter(drafter: Callable[..., Any]) -> Callable[[Any, int, int, str], Any]:
    """Makes drafters of branches that continue the text; they know one way to build a tree."""

    def make(network, nodes: int, depth: int, tree: str):
        if tree:
            raise InputError(f"tree: expected '', the only way of this method, found {tree!r}")
        return drafter(network, *_branches(nodes, depth))

    return make


def _heads_drafter(kind: Callable[..., Any], trees: tuple[str, ...] = ("beam",)):
    """Makes drafters of heads; ``trees`` are the names that it takes, the default first."""

    def drafter(network: Any, nodes: int, depth: int, tree: str):
        if tree not in ("", *trees):
            raise InputError(f"tree: expected one of {', '.join(trees)}, found {tree!r}")
        depth = min(depth, network.heads, nodes - 1)
        if tree != "static":
            return kind(network, nodes, depth)
        template = default_template(nodes, depth, network.vocab_size)
        return kind(network, template.num_nodes, template.max_depth, template=template)

    return drafter


DEFAULT = "ctc"
"""The method that experiments train unless they name another."""

LANGUAGE_MODEL = "small_lm"
"""The method that the folder of a language model drafts by unless another one is named."""

RECIPES: dict[str, Recipe] = {
    "ctc": Recipe(CTCConfig, _ctc_network, _ctc_drafter, CTCLoss, _ctc_notes, frames_products),
    "ctc_labels": Recipe(
        LabelConfig, label_config, label_drafter, LabelLoss, _ctc_notes, frames_products
    ),
    "block": Recipe(BlockConfig, block_config, _block_drafter, BlockLoss, products=frames_products),
    "diffusion": Recipe(
        DiffusionConfig,
        diffusion_config,
        diffusion_drafter,
        DiffusionLoss,
        products=diffusion_products,
        drawn="conditional",
    ),
    "medusa": Recipe(
        MedusaConfig,
        medusa_config,
        _heads_drafter(MedusaDrafter, ("product", "static")),
        HeadsLoss,
        products=MedusaConfig.products,
    ),
    "hydra": Recipe(
        HydraConfig,
        hydra_config,
        _heads_drafter(HydraDrafter),
        HeadsLoss,
        products=HydraConfig.products,
    ),
    "mlp_speculator": Recipe(
        MLPSpeculatorConfig,
        mlp_speculator_config,
        _heads_drafter(MLPSpeculatorDrafter),
        HeadsLoss,
        products=MLPSpeculatorConfig.products,
    ),
    "eagle": Recipe(
        EagleConfig,
        eagle_config,
        eagle_drafter,
        SequentialLoss,
        products=EagleConfig.products,
        drawn="sampled",
    ),
    "glide": Recipe(
        GlideConfig,
        glide_config,
        glide_drafter,
        SequentialLoss,
        glide_notes,
        GlideConfig.products,
        drawn="sampled",
    ),
    LANGUAGE_MODEL: Recipe(
        DecoderConfig,
        _small_lm_network,
        _small_lm_drafter,
        SmallLMLoss,
        products=small_lm_products,
        language_model=True,
        drawn="sampled",
    ),
    "pearl": Recipe(
        DecoderConfig, _small_lm_network, pearl_drafter, language_model=True, drawn="sampled"
    ),
    "gsd": Recipe(DecoderConfig, _small_lm_network, gsd_drafter, language_model=True),
    "ouroboros": Recipe(DecoderConfig, _small_lm_network, ouroboros_drafter, language_model=True),
    "prompt_lookup": Recipe(
        LookupConfig,
        lambda target, shape: LookupConfig(target.width, target.vocab_size),
        _text_drafter(PromptLookup),
    ),
    "ngram_pool": Recipe(
        PoolConfig,
        lambda target, shape: PoolConfig(target.width, target.vocab_size),
        _text_drafter(PhrasePool),
    ),
}
"""Name -> parts: ``model_type`` in a drafter's config.json, ``drafter.method`` in an experiment."""

VERIFIERS: dict[str, Verifier] = {
    "target_sample": TargetSample(),
    "rejection": Rejection(),
    "block": Block(),
    "multi_candidate": MultiCandidate(),
    "greedy": Greedy(),
    "typical": Typical(),
}
"""Name -> rule of verification; ``typical`` is lossy, ``greedy`` ignores temperatures."""


def verifier(name: str, drafter: Drafter) -> Verifier:
    """The rule of a name; without one the best that is exact for the drafter's trees.

    Drafters that draw their trees say so by a ``states_law`` that holds.

    Raises:
      InputError: no such rule, or one that needs what the drafter's trees do not have.
    """
    stated = getattr(drafter, "states_law", False)
    is_chain = drafter.num_nodes == drafter.max_depth + 1
    if not name:
        return Block() if stated and is_chain else MultiCandidate() if stated else TargetSample()
    if name not in VERIFIERS:
        raise InputError(f"verifier: expected one of {', '.join(VERIFIERS)}, found {name!r}")
    if name in ("rejection", "block", "multi_candidate") and not stated:
        raise InputError(f"verifier: expected drafts that are drawn from a stated law for {name}")
    if name in ("rejection", "block") and not is_chain:
        raise InputError(f"verifier: expected drafts that are chains for {name}, found trees")
    return VERIFIERS[name]
