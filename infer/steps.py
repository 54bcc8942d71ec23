"""How near a step is to the limit of the device, and how its cost grows.

    python -m infer.steps --tree-nodes 1 4 16 64 256 --context 128 512 2048 --batch 1 8 64 \
        --json benchmarks/growth.json --plot benchmarks/growth.png
    python -m infer.steps --model configs/models/llama2_7b.json --dtype bfloat16 --peers

Without --model the demo pair; with it a config.json whose weights are random numbers made on the
device, and an untrained drafter. Caches are filled, not computed. Every axis is varied alone, the
others at their --base. The bound of a plain step is the time of reading its weights and the
caches of its rows once, at the bandwidth that the same run measures; what a step or a round should
take is said by arithmetic, see ``roofline``. Outside of the two models is a round of the same
shapes whose models cost nothing: tree, mask, rule, tokens, cache rows. All programs of a case take
turns; medians.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from tqdm import tqdm

from ctc_spec_jax import demo, memory
from ctc_spec_jax.cli import (
    DTYPES,
    add_precision,
    exit_on_bad_input,
    load_engine,
    use_compilation_cache,
)
from ctc_spec_jax.engine import Engine
from ctc_spec_jax.errors import InputError
from infer import growth, made_up, peer_steps, roofline
from infer.compile import drafter_of
from infer.generate import check_counts, check_json, write_document
from infer.growth import AXES, Case, Cost
from infer.profile import NoModel, NoNetwork, hardware
from infer.rounds import in_turns

Engines = Callable[[int], Engine]
"""The target with a drafter whose trees have so many nodes; 1 node is plain decoding."""


def engines_of(given: argparse.Namespace) -> Engines:
    """The pair that the flags ask for.

    Raises:
      InputError: no such model, or one that does not fit.
    """
    dtype = DTYPES[given.dtype]
    if given.model is None:
        plain = load_engine(str(demo.target_folder()), given)
        folder = str(demo.drafter_folder())
        return lambda n: plain.with_drafter(folder, n, dtype) if n > 1 else plain
    plain = made_up.random_engine(given.model, dtype, given.layers, given.int8)
    shape = (given.drafter_layers, given.frames, given.depth)
    made: list[Any] = []

    def engine(nodes: int) -> Engine:
        drafter, init = drafter_of(plain.lm, nodes, *shape)
        if nodes == 1:
            return plain
        if not made:  # trees of all sizes come from the same network
            made.append(made_up.random_params(init, dtype))
        return dataclasses.replace(plain, drafter=drafter, draft_params=made[0])

    return engine


def without_models(engine: Engine) -> Engine:
    """The same rounds where target and network cost nothing."""
    target, drafter = NoModel(engine.lm.config), engine.drafter
    if drafter.num_nodes > 1:
        network = vars(drafter)
        drafter = NoNetwork(network["config"], network["tree"])
    return dataclasses.replace(engine, lm=target, drafter=drafter, draft_params=())


def cost_of(
    engine: Engine, case: Case, slots: int, rates: roofline.Rates, repeats: int, others: Any = None
) -> Cost:
    """Measured and predicted costs of a case.

    Args:
      engine: target and drafter of the case.
      case: its sizes.
      slots: S of all caches.
      rates: of this device.
      repeats: turns.
      others: more timers by name, which take turns with these.

    Raises:
      InputError: the case does not fit the memory.
    """
    kinds = {"plain": engine.plain(), "round": engine, "outside": without_models(engine)}
    cases = {
        name: made_up.filled(one, case.batch, case.context, slots) for name, one in kinds.items()
    }
    needed = max(one.bytes for one in cases.values())
    memory.check(needed, case.batch, f"caches of {slots} slots, trees of {case.nodes} nodes")
    try:
        cache = made_up.Cache(made_up.random_arrays(cases["plain"].shapes.cache))
        timers = {name: made_up.filled_timer(one, cache) for name, one in cases.items()}
        seconds = in_turns({**timers, **(others or {})}, repeats)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(f"batch: {case} does not fit the memory of the device") from error
    return growth.cost(engine, case, slots, rates, seconds)


def run(given: argparse.Namespace, document: dict[str, Any]) -> tuple[list[Cost], list[Case]]:
    """Costs of all cases that fit, written into the document's file one after the other."""
    engines, cases = engines_of(given), growth.cases(given.base, growth.axes_of(given))
    rates = roofline.measure(DTYPES[given.dtype])
    document["rates"] = dataclasses.asdict(rates)
    print(growth.heading(engines(1), rates, given.model is not None), flush=True)
    deepest = max(engines(case.nodes).drafter.max_depth for case in cases)
    found: list[Cost] = []
    print(growth.titles(), flush=True)
    for case in tqdm(cases, unit=" cases", leave=False):
        engine = engines(case.nodes)
        slots = made_up.slots_for(case.context, deepest)
        try:
            others = {}
            if given.peers and case == cases[0]:
                path = given.model or str(demo.target_folder())
                shapes = (given.layers, given.dtype, case.batch, case.context)
                others, document["peers_left_out"] = peer_steps.timers(
                    peer_steps.Shapes(path, *shapes)
                )
            found.append(cost_of(engine, case, slots, rates, given.repeats, others))
        except InputError as error:
            tqdm.write(f"{case}: left out, {error}")
            document["left_out"].append({**dataclasses.asdict(case), "reason": str(error)})
        else:
            tqdm.write(growth.line(found[-1]))
        document["results"] = [growth.as_dict(one) for one in found]
        if given.json:  # after every case: a run that is cut keeps what it has
            write_document(given.json, document)
    return found, cases


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--model", help="config.json of a target without weights: random ones")
    options.add_argument("--layers", type=int, default=0, help="the target's first layers alone")
    add_precision(options)
    options.add_argument("--drafter-layers", type=int, default=1, help="of --model")
    options.add_argument("--frames", type=int, default=12, help="of --model")
    options.add_argument("--depth", type=int, default=8, help="deepest node of a tree, of --model")
    options.add_argument(
        "--base",
        type=int,
        nargs=3,
        metavar=("CONTEXT", "NODES", "BATCH"),
        default=[512, 64, 1],
        help="sizes that are held while another one is varied",
    )
    for axis, what in AXES.items():
        flag = "--tree-nodes" if axis == "nodes" else f"--{axis}"
        options.add_argument(flag, dest=axis, type=int, nargs="+", default=[], help=what)
    options.add_argument("--peers", action="store_true", help="transformers too, at the base")
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--json", help="file to write the figures to")
    options.add_argument("--plot", help="picture to draw (needs matplotlib, extra report)")
    return options


def check(given: argparse.Namespace) -> None:
    """Refuse bad flags."""
    check_counts(given, ("repeats", "drafter_layers", "frames", "depth"))
    for axis, base in zip(AXES, given.base, strict=True):
        flag = "--tree-nodes" if axis == "nodes" else f"--{axis}"
        for name, sizes in (("--base", [base]), (flag, getattr(given, axis))):
            if min(sizes, default=1) < 1:
                raise InputError(f"{name}: expected at least 1, found {min(sizes)}")
    if given.peers and given.int8:
        raise InputError("--int8: expected no --peers, whose weights are not rounded, found both")
    if given.layers and given.model is None:
        raise InputError("--layers: expected --model beside it, found none")
    check_json(given.json)
    if given.plot and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot: expected matplotlib (pip install -e '.[report]'), found none")
    if given.plot and not pathlib.Path(given.plot).absolute().parent.is_dir():
        raise InputError(f"--plot: expected a file in a folder that exists, found {given.plot}")


def _settings(given: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(given).items() if name not in ("json", "plot")}


@exit_on_bad_input
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m infer.steps``."""
    given = parser().parse_args(arguments)
    check(given)
    use_compilation_cache()
    document = {
        **hardware(),
        "settings": _settings(given),
        "random_weights": given.model is not None,
        "results": [],
        "left_out": [],
    }
    found, _ = run(given, document)
    if not found:
        raise InputError("--base: expected at least one case that fits, found none")
    print(growth.peers(found[0], document.get("peers_left_out", {})), end="")
    if given.plot:
        growth.plot(found, given.base, given.plot)


if __name__ == "__main__":
    main()
