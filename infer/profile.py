"""Cost of a round against a plain step, by tree size, batch and options, on this device.

    python -m infer.profile --json benchmarks/round_cost.json --plot benchmarks/round_cost.png

Every figure is a ratio of times of one run in which all programs take turns, medians of repeats.
The last part times what a round does beside the model (build, mask, verify, commit) against a
plain step of a model of one billion parameters, with random weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import os
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ctc_spec_jax import decode as loop_of
from ctc_spec_jax import demo, memory, options, xla
from ctc_spec_jax.cli import exit_on_bad_input, use_compilation_cache
from ctc_spec_jax.draft.ctc import CTCDrafter, ctc_config
from ctc_spec_jax.engine import Engine, seed_keys
from ctc_spec_jax.models.config import DecoderConfig
from ctc_spec_jax.models.decoder import DecoderLM
from ctc_spec_jax.tree.ctc_prefix import PrefixTree
from ctc_spec_jax.types import Array, DraftTree, TargetOutput
from infer.generate import check_counts, check_json, write_document

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
_PROMPT, _ROUNDS = 64, 16
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


def round_state(engine: Engine, batch: int, fields: dict[str, Any]):
    """Loop, both parameters, state after the prefill and request of a batch of made-up prompts."""
    new = _ROUNDS * (engine.drafter.max_depth + 1)
    rows = options.per_row(batch, {"max_new_tokens": new, "ignore_eos": True, **fields})
    draw = np.random.default_rng(0)
    prompts = draw.integers(1, engine.lm.vocab_size, (batch, _PROMPT)).tolist()
    tokens, lengths = engine.encode(prompts, [new] * batch)
    loop, request = engine.loop(xla.bucket(new)), engine.request(rows, seed_keys(0, batch))
    params = (engine.params, engine.draft_params)
    return loop, params, xla.jitted(loop_of.start)(loop, *params, tokens, lengths, request), request


def round_timer(engine: Engine, batch: int, fields: dict[str, Any]) -> Callable[[], float]:
    """A function that runs rounds of a batch from the same state and gives seconds per round."""
    loop, params, state, request = round_state(engine, batch, fields)
    advance = xla.jitted(loop_of.advance)

    def run() -> float:
        began = time.perf_counter()
        jax.block_until_ready(advance(loop, *params, state, request, np.int32(_ROUNDS)))
        return (time.perf_counter() - began) / _ROUNDS

    run()  # compiles
    return run


def in_turns(timers: dict[Any, Callable[[], float]], repeats: int) -> dict[Any, float]:
    """Median seconds of every timer; they take turns, so that noise hits all alike."""
    found: dict[Any, list[float]] = {name: [] for name in timers}
    for _ in tqdm(range(repeats), unit=" turns", leave=False):
        for name, timer in timers.items():
            # A turn lasts a quarter of a second at least: one call of a small program would not.
            began = time.perf_counter()
            while True:
                found[name].append(timer())
                if time.perf_counter() - began > 0.25:
                    break
    return {name: statistics.median(times) for name, times in found.items()}


def round_costs(engine: Engine, folder: str, nodes, batches, repeats: int) -> Iterator[list[Cost]]:
    """Costs of rounds for every size of tree, a list per batch size; 1 node is plain decoding."""
    kinds = {"greedy": {}, "sampled": {"temperature": 0.8}, "every_option": EVERY_OPTION}
    for batch in tqdm(batches, unit=" batch sizes"):
        timers = {}
        for size in tqdm(nodes, unit=" tree sizes", leave=False):
            one = engine.plain() if size == 1 else engine.with_drafter(folder, size)
            for kind, fields in kinds.items():
                timers[size, kind] = round_timer(one, batch, fields)
        if 1 not in nodes:
            timers[1, "greedy"] = round_timer(engine.plain(), batch, {})
        seconds = in_turns(timers, repeats)
        costs = []
        for size in nodes:
            greedy = seconds[size, "greedy"]
            ratios = (seconds[size, kind] / greedy for kind in ("sampled", "every_option"))
            costs.append(Cost(size, batch, greedy, greedy / seconds[1, "greedy"], *ratios))
        yield costs


def _made_up(seed: Array, place: Array) -> Array:
    """Float32 in [-8, 8) at every place, by integer operations that take next to no time."""
    mixed = (seed * 40503 + place) * jnp.int32(-1640531527)
    return ((mixed >> 12) & 1023).astype(jnp.float32) / 64 - 8


@dataclasses.dataclass(frozen=True)
class _NoModel(DecoderLM):
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
class _NoNetwork(CTCDrafter):
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
    ends = _Silent()
    model = Engine(lm, params, ends)
    drafter = _NoNetwork(ctc_config(config), PrefixTree(nodes, 8))
    empty = Engine(_NoModel(config), params, ends, drafter)
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


class _Silent:
    """The part of a tokenizer that token ids need."""

    pad_token_id, model_max_length = 0, 1 << 20


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
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "device": f"{cpu}, {os.cpu_count()} cores"
        if device.platform == "cpu"
        else device.device_kind,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


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


@exit_on_bad_input
def main() -> None:
    """Entry point of ``python -m infer.profile``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", help="Hugging Face folder or hub id (default: the demo)")
    parser.add_argument("--drafter", help="folder of a drafter (default: the demo's)")
    parser.add_argument("--tree-nodes", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--bookkeeping", action="store_true", help="also beside a large model")
    parser.add_argument("--json", help="file to write the figures to")
    parser.add_argument("--plot", help="picture to draw (needs matplotlib, extra notebook)")
    arguments = parser.parse_args()
    check_counts(arguments, ("repeats",))
    check_json(arguments.json)
    use_compilation_cache()
    engine = Engine.from_pretrained(arguments.target, arguments.drafter)
    folder = arguments.drafter or str(demo.drafter_folder())
    document = {**hardware(), "results": [], "bookkeeping": None}
    costs: list[Cost] = []
    for found in round_costs(
        engine, folder, arguments.tree_nodes, arguments.batch, arguments.repeats
    ):
        costs += found
        document["results"] = [dataclasses.asdict(cost) for cost in costs]
        if arguments.json:  # after every batch size: a run that is cut keeps what it has
            write_document(arguments.json, document)
    if arguments.bookkeeping:
        document["bookkeeping"] = bookkeeping(arguments.repeats)
    print(table(costs, document["bookkeeping"]))
    if arguments.json:
        write_document(arguments.json, document)
    if arguments.plot:
        plot(costs, arguments.plot)


if __name__ == "__main__":
    main()
