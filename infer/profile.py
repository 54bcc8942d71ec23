"""Cost of a round against a plain step, by tree size, batch and options, on this device.

    python -m infer.profile --json benchmarks/round_cost.json --plot benchmarks/round_cost.png
    python -m infer.profile --advise --batch 1 4 16

Every figure is a ratio of times of one run in which all programs take turns, medians of repeats.
The last part times what a round does beside the model (build, mask, verify, commit) against a
plain step of a model of one billion parameters, with random weights. --advise sets the cost
against the tokens that a drafter's rounds keep; see ``advice``.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ctc_spec_jax import demo, memory
from ctc_spec_jax.cli import (
    add_method,
    add_precision,
    exit_on_bad_input,
    load_engine,
    use_compilation_cache,
    use_precision,
    with_drafts,
)
from ctc_spec_jax.draft.ctc import CTCDrafter, ctc_config
from ctc_spec_jax.engine import Engine
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.models.decoder import DecoderLM
from ctc_spec_jax.tree.ctc_prefix import PrefixTree
from ctc_spec_jax.types import Array, DraftTree, TargetOutput
from infer import advice
from infer.generate import check_counts, check_json, write_document
from infer.made_up import Silent
from infer.rounds import in_turns, round_timer

EVERY_OPTION: dict[str, Any] = {
    "temperature": 0.8,
    "top_k": 50,
    "top_p": 0.95,
    "min_p": 0.02,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "min_new_tokens": 5,
    "logit_bias": {5: -1.0},
    "bad_words_ids": [[7, 8], [9, 10, 11]],
}
_BILLION = DecoderConfig(
    vocab_size=32000,
    width=2048,
    num_layers=18,
    num_heads=16,
    num_kv_heads=8,
    head_width=128,
    mlp_width=6144,
    tied_embeddings=True,
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of one round of greedy rows, and ratios; a plain step is a round of one node."""

    nodes: int
    batch: int
    seconds: float
    plain_steps: float
    sampled: float  # of rows at temperature 0.8, in greedy rounds
    every_option: float  # of rows with every processor on, in greedy rounds


def round_costs(
    engines: Mapping[int, Engine], batches: Sequence[int], repeats: int
) -> Iterator[list[Cost]]:
    """Costs of rounds for every size of tree, a list per batch size; 1 node is plain decoding."""
    kinds = {"greedy": {}, "sampled": {"temperature": 0.8}, "every_option": EVERY_OPTION}
    for batch in tqdm(batches, unit=" batch sizes"):
        timers = {}
        for size, engine in tqdm(engines.items(), unit=" tree sizes", leave=False):
            for kind, fields in kinds.items():
                timers[size, kind] = round_timer(engine, batch, fields)
        if 1 not in engines:
            plain = next(iter(engines.values())).plain()
            timers[1, "greedy"] = round_timer(plain, batch, {})
        seconds = in_turns(timers, repeats)
        costs = []
        for size in engines:
            greedy = seconds[size, "greedy"]
            ratios = (seconds[size, kind] / greedy for kind in ("sampled", "every_option"))
            costs.append(Cost(size, batch, greedy, greedy / seconds[1, "greedy"], *ratios))
        yield costs


def _made_up(seed: Array, place: Array) -> Array:
    """Float32 in [-8, 8) at every place, by integer operations that take next to no time."""
    mixed = (seed * 40503 + place) * jnp.int32(-1640531527)
    return ((mixed >> 12) & 1023).astype(jnp.float32) / 64 - 8


@dataclasses.dataclass(frozen=True)
class NoModel(DecoderLM):
    """A target whose pass costs nothing: zeros in the shapes of the real one."""

    def forward_tree(self, params, cache, length, tokens, positions, mask, taps=()) -> TargetOutput:
        """See ``types.Target``; depends on its arguments so that nothing is hoisted."""
        batch, nodes = tokens.shape
        c = self.config
        count = positions + jnp.sum(mask, axis=-1, dtype=jnp.int32)
        logits = _made_up(count[..., None], jnp.arange(c.vocab_size, dtype=jnp.int32)[None, None])
        seed = count.astype(jnp.float32)
        hidden = jnp.broadcast_to(seed[..., None], (batch, nodes, c.width))
        key = jnp.broadcast_to(seed[:, None, None], (batch, c.num_kv_heads, c.head_width, nodes))
        value = jnp.swapaxes(key, 2, 3)
        return TargetOutput(logits, (hidden,) * len(taps), ((key, value),) * c.num_layers)


@dataclasses.dataclass(frozen=True)
class NoNetwork(CTCDrafter):
    """The CTC drafter without its network: a lattice out of nothing, and the real tree of it."""

    def init(self, params, context, taps):
        """No state."""
        return ()

    def propose(self, params, state, context, keys):
        """See ``types.Drafter``."""
        shape = (context.length.shape[0], self.config.frames, self.config.vocab_size + 1)
        place = jnp.arange(np.prod(shape[1:]), dtype=jnp.int32).reshape(shape[1:])
        lattice = _made_up(context.length[:, None, None], place[None])
        return DraftTree(*jax.vmap(self.tree)(jax.nn.log_softmax(lattice), context.pending))

    def commit(self, params, state, context, output, acceptance):
        """No state."""
        return state


def bookkeeping(repeats: int, nodes: int = 64, config: DecoderConfig = _BILLION) -> dict[str, Any]:
    """Seconds of a round without the model, and of a plain step of a large one, batch 1."""
    lm = DecoderLM(config)
    shapes = jax.eval_shape(lambda: lm.init(jax.random.key(0)))
    memory.check(memory.tree_bytes(shapes), 1, "weights of the model of the billion")
    leaves, structure = jax.tree.flatten(shapes)
    draw = np.random.default_rng(0)
    weights = [draw.standard_normal(leaf.shape, np.float32) * 0.02 for leaf in leaves]
    params = jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in weights])
    ends = Silent()
    model = Engine(lm, params, ends)
    drafter = NoNetwork(ctc_config(config), PrefixTree(nodes, 8))
    empty = Engine(NoModel(config), params, ends, drafter)
    timers = {
        "plain_step": round_timer(model, 1, {}),
        "bookkeeping": round_timer(empty, 1, {}),
        "bookkeeping_every_option": round_timer(empty, 1, EVERY_OPTION),
    }
    seconds = in_turns(timers, repeats)
    count = sum(int(np.prod(leaf.shape)) for leaf in leaves)
    return {
        "parameters": count,
        "nodes": nodes,
        "seconds": seconds,
        "share": seconds["bookkeeping"] / seconds["plain_step"],
        "share_every_option": seconds["bookkeeping_every_option"] / seconds["plain_step"],
    }


def hardware() -> dict[str, Any]:
    """What the figures were measured with."""
    device = jax.local_devices()[0]
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in _lines("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "device": f"{cpu}, {os.cpu_count()} cores"
        if device.platform == "cpu"
        else device.device_kind,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # a machine without git
        return ""


def _lines(path: str) -> list[str]:
    try:
        return pathlib.Path(path).read_text().splitlines()
    except OSError:
        return []


def table(costs: list[Cost], extra: dict[str, Any] | None) -> str:
    """The figures as aligned text."""
    names = ("batch", "nodes", "ms a round", "plain steps", "sampled", "every option")
    lines = ["".join(f"{name:>14}" for name in names)]
    for cost in costs:
        ratios = (cost.plain_steps, cost.sampled, cost.every_option)
        figures = [f"{cost.seconds * 1e3:.2f}", *(f"{ratio:.2f}" for ratio in ratios)]
        lines.append("".join(f"{x:>14}" for x in (str(cost.batch), str(cost.nodes), *figures)))
    lines.append("sampled, every option: in greedy rounds of the same size")
    if extra:
        step, share = extra["seconds"]["plain_step"], extra["share"]
        lines.append(
            f"tree of {extra['nodes']} nodes beside a model of {extra['parameters'] / 1e9:.2f} "
            f"billion: {share:.1%} of a plain step of {step * 1e3:.0f} ms, "
            f"{extra['share_every_option']:.1%} with every option"
        )
    return "\n".join(lines)


def plot(costs: list[Cost], path: str) -> None:
    """Cost of a round in plain steps by tree size, a line per batch size."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for batch in sorted({cost.batch for cost in costs}):
        mine = [cost for cost in costs if cost.batch == batch]
        sizes = [cost.nodes for cost in mine]
        axes.plot(sizes, [cost.plain_steps for cost in mine], marker="o", label=f"batch {batch}")
    axes.set(xscale="log", xlabel="tree nodes", ylabel="cost of a round in plain steps")
    axes.set_xticks(sizes, map(str, sizes))
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", help="Hugging Face folder or hub id (default: the demo)")
    add_method(parser)
    add_precision(parser)
    parser.add_argument(
        "--tree-nodes", type=int, nargs="+", help="1 4 8 16 32 64; with --advise 2 instead of 1"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--advise",
        action="store_true",
        help="recommend a tree size for every batch size, or none, by held-out prompts",
    )
    parser.add_argument("--num-prompts", type=int, default=advice.PROMPTS, help="of --advise")
    parser.add_argument("--max-new-tokens", type=int, default=advice.NEW_TOKENS, help="likewise")
    parser.add_argument("--bookkeeping", action="store_true", help="also beside a large model")
    parser.add_argument("--json", help="file to write the figures to")
    parser.add_argument("--plot", help="picture to draw (needs matplotlib, extra notebook)")
    arguments = parser.parse_args()
    _check(arguments)
    return arguments


def _check(arguments: argparse.Namespace) -> None:
    check_counts(arguments, ("repeats", "num_prompts", "max_new_tokens"))
    if min(arguments.batch) < 1:
        raise InputError(f"--batch: expected at least 1, found {min(arguments.batch)}")
    for name in ("plot", "bookkeeping"):
        if arguments.advise and getattr(arguments, name):
            raise InputError(f"--{name}: expected it or --advise, found both")
    least = 2 if arguments.advise else 1
    if min(arguments.tree_nodes or [least]) < least:
        found = min(arguments.tree_nodes)
        raise InputError(f"--tree-nodes: expected at least {least}, found {found}")
    check_json(arguments.json)


def _advise(engine: Engine, arguments: argparse.Namespace) -> None:
    """Print a table and the advice for every batch size."""
    engines = advice.candidates(
        lambda nodes: with_drafts(engine, arguments, nodes), arguments.tree_nodes
    )
    prompts = advice.held_out(engine, {}, arguments.num_prompts)
    given = (arguments.batch, arguments.repeats, arguments.max_new_tokens)
    document = {**hardware(), "advice": []}
    for one in advice.advise(engines, prompts, *given):
        print(f"{advice.table(one)}\n{advice.sentence(one)}\n", flush=True)
        document["advice"].append(dataclasses.asdict(one) | {"sentence": advice.sentence(one)})
        if arguments.json:  # after every batch size: a run that is cut keeps what it has
            write_document(arguments.json, document)


def _costs(engine: Engine, arguments: argparse.Namespace) -> None:
    """Print the costs of rounds, and draw them."""
    document = {**hardware(), "results": [], "bookkeeping": None}
    nodes, costs = arguments.tree_nodes or [1, 4, 8, 16, 32, 64], []
    engines = {n: with_drafts(engine, arguments, n) if n > 1 else engine.plain() for n in nodes}
    if any(n > 1 and one.drafter.num_nodes == 1 for n, one in engines.items()):
        raise InputError("--tree-nodes: expected --drafter or --method beside it, found neither")
    for found in round_costs(engines, arguments.batch, arguments.repeats):
        costs += found
        document["results"] = [dataclasses.asdict(cost) for cost in costs]
        if arguments.json:
            write_document(arguments.json, document)
    if arguments.bookkeeping:
        document["bookkeeping"] = bookkeeping(arguments.repeats)
    print(table(costs, document["bookkeeping"]))
    if arguments.json:
        write_document(arguments.json, document)
    if arguments.plot:
        plot(costs, arguments.plot)


@exit_on_bad_input
def main() -> None:
    """Entry point of ``python -m infer.profile``."""
    arguments = _parse()
    use_compilation_cache()
    if arguments.advise:  # as the programs decode that ask for it
        use_precision(arguments.dtype)
    engine = load_engine(arguments.target or str(demo.target_folder()), arguments)
    (_advise if arguments.advise else _costs)(engine, arguments)


if __name__ == "__main__":
    main()
