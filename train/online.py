"""Serve prompts while the drafter learns from where its drafts failed.

    python -m train.online --target owner/model --drafter folder/of/a/drafter \
        --prompts requests.jsonl --out runs/online [--by-topic] [options of the answers]

Online Speculative Decoding (Liu et al. 2024, arXiv 2310.07177). Requests are answered in the order
of the file; after every ``--every`` of a drafter's requests it takes one step of the optimiser on
the newest ``--keep`` answers, at the tokens in whose place a draft was refused. Answers are those
of the target whatever the drafter has learnt. With ``--by-topic`` every ``category`` (or
``topic``) of the prompts has a drafter of its own, which begins as ``--drafter``.

``--out`` holds answers.jsonl, metrics.jsonl (accepted length by window of requests and by topic,
losses of the updates), checkpoints, and in the end ``export``, a drafter folder, or one per topic.
Killed at any moment the same command goes on where its last checkpoint was, with the same answers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import optax
from etils import epath
from tqdm import tqdm

from ctc_spec_jax import cli, folders, recipes, sharding
from ctc_spec_jax.cli import DTYPES, exit_on_bad_input, use_compilation_cache, use_precision
from ctc_spec_jax.draft.training import DIVERGENCES, Loss
from ctc_spec_jax.engine import Engine
from ctc_spec_jax.errors import InputError
from infer.prompts import report
from train import regenerate
from train.answering import prepare
from train.dialogue import Dialogue
from train.log import Log
from train.prompts import file_digest, read_prompts, row_seed
from train.runs import versions
from train.student import School, Student, Tally


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", required=True, help="Hugging Face folder or hub id")
    parser.add_argument("--prompts", required=True, nargs="+", help="JSONL files, may be gzipped")
    parser.add_argument("--out", required=True, help="folder to write or to go on with")
    parser.add_argument("--template", help="Jinja file with a chat template")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="of the decode")
    parser.add_argument("--tree-nodes", type=int, default=6)
    parser.add_argument("--max-new-tokens", type=int, default=128, help="of one answer")
    parser.add_argument("--by-topic", action="store_true", help="a drafter for every topic")
    cli.add_method(parser)
    group = parser.add_argument_group("learning")
    group.add_argument("--every", type=int, default=8, help="requests from update to update")
    group.add_argument("--keep", type=int, help="newest answers to learn from (default: --every)")
    group.add_argument("--rate", type=float, default=1e-4, help="of AdamW, constant")
    group.add_argument(
        "--objective",
        choices=("cross_entropy", *DIVERGENCES),
        default="forward_kl",
        help="of drafters that state a law for every token",
    )
    group.add_argument("--loss-temperature", type=float, default=1.0, help="of both laws")
    group.add_argument(
        "--anchors", type=int, default=16, help="drafts of an answer that are learnt"
    )
    group.add_argument("--everywhere", action="store_true", help="learn from all tokens of answers")
    group = parser.add_argument_group("records")
    group.add_argument("--window", type=int, default=16, help="requests of a line of metrics")
    group.add_argument("--checkpoint-every", type=int, default=64, help="requests")
    cli.add_options(parser)
    arguments = parser.parse_args()
    if arguments.keep is None:
        arguments.keep = arguments.every
    for name in ("every", "window", "checkpoint_every", "anchors", "max_new_tokens"):
        if getattr(arguments, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag}: expected at least 1, found {getattr(arguments, name)}")
    if arguments.keep < arguments.every:
        raise InputError(f"--keep: expected at least --every, found {arguments.keep}")
    if not all(0 < x < math.inf for x in (arguments.rate, arguments.loss_temperature)):
        raise InputError("--rate and --loss-temperature: expected numbers above 0, found another")
    if arguments.drafter is None:
        raise InputError("--drafter: expected the folder of a drafter that can learn, found none")
    return arguments


def load(arguments: argparse.Namespace) -> Engine:
    """Target and drafter; the drafter's parameters are float32, as learning needs them."""
    engine = Engine.from_pretrained(arguments.target, dtype=DTYPES[arguments.dtype])
    if arguments.template:
        regenerate.use_template(engine, arguments.template)
    drafting = (arguments.tree_nodes, jnp.float32, arguments.tree, arguments.method)
    engine = engine.with_drafter(arguments.drafter, *drafting)
    return engine.with_verifier(arguments.verifier) if arguments.verifier else engine


def school_of(arguments: argparse.Namespace, engine: Engine, length: int) -> School:
    """What the flags say about learning.

    Raises:
      InputError: a drafter without a loss.
    """
    drafter: Any = engine.drafter
    recipe = recipes.of(drafter.config)
    if recipe.loss is None:
        raise InputError(f"--drafter: expected one that is trained, found {arguments.drafter}")
    weights: Any = {
        name: float(name == arguments.objective) for name in ("cross_entropy", *DIVERGENCES)
    }
    loss = Loss(labels=drafter.max_depth, temperature=arguments.loss_temperature, **weights)
    return School(
        engine,
        recipe.loss(engine.lm, drafter, loss, arguments.anchors, DTYPES[arguments.dtype]),
        optax.adamw(arguments.rate, weight_decay=0.0),
        arguments.every,
        arguments.keep,
        length,
        arguments.everywhere,
        arguments.seed,
    )


class Service:
    """Students by topic, the requests that they have had, and what is written about them."""

    def __init__(self, school: School, topics: Sequence[str], folder: pathlib.Path, window: int):
        self.students = {topic: Student(school) for topic in topics}
        self.folder, self.window, self.done = folder, window, 0
        self.tallies = {topic: Tally() for topic in topics}

    def request(self, topic: str, prompt: Sequence[int], **fields: Any):
        """Answer one request by the student of its topic, or by the only one.

        Returns:
          The answer, and metrics of this request's number: of an update, of a window's end.
        """
        topic = topic if topic in self.students else ""
        answer, metrics = self.students[topic].serve(prompt, **fields)
        self.tallies[topic].add(answer)
        self.done += 1
        if self.done % self.window == 0:
            metrics |= self.close_window()
        return answer, metrics

    def close_window(self) -> dict[str, float]:
        """Metrics of the window, all topics together and each by itself; begins a new one."""
        whole = Tally()
        for tally in self.tallies.values():
            for name, value in vars(tally).items():
                setattr(whole, name, getattr(whole, name) + value)
        found = whole.numbers()
        for topic, tally in self.tallies.items():
            if topic and tally.requests:
                found |= {f"{name}/{topic}": value for name, value in tally.numbers().items()}
        self.tallies = {topic: Tally() for topic in self.tallies}
        return found

    def state(self) -> dict[str, Any]:
        """Arrays to save, by number of the student: names of topics may be any text."""
        return {str(i): student.state for i, student in enumerate(self.students.values())}

    def notes(self) -> dict[str, Any]:
        """The rest of what is to be saved."""
        served = {topic: student.served for topic, student in self.students.items()}
        tallies = {topic: vars(tally) for topic, tally in self.tallies.items()}
        return {"served": served, "tallies": tallies}

    def restore(self, done: int, state: dict[str, Any], notes: dict[str, Any]) -> None:
        """Go on as if ``done`` requests had just been served."""
        self.done = done
        for i, (topic, student) in enumerate(self.students.items()):
            served = notes["served"][topic]
            self.students[topic] = Student(student.school, state[str(i)], served)
            self.tallies[topic] = Tally(**notes["tallies"][topic])


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What decides the answers and what is learnt, by flag; JSON values."""
    free = ("out", "prompts", "template", "window", "checkpoint_every", "target", "drafter")
    given = {name: value for name, value in vars(arguments).items() if name not in free}
    models = {name: getattr(arguments, name) for name in ("target", "drafter")}
    files = {"prompts": [file_digest(path) for path in arguments.prompts]}
    weights = {
        name: f"{path} (weights {regenerate.fingerprint(path)})" for name, path in models.items()
    }
    return json.loads(json.dumps({**given, **weights, **files}))


def check_same(path: pathlib.Path, settings: dict[str, Any]) -> None:
    """Refuse to go on with other settings than those that ``path`` remembers."""
    if not path.exists():
        return
    before = json.loads(path.read_text())
    for name, value in settings.items():
        if before.get(name) != value:
            raise InputError(
                f"--out: expected {name} {before.get(name)!r} as in {path}, found {value!r}; "
                "choose another folder"
            )


def answers_before(path: pathlib.Path, done: int) -> None:
    """Drop the answers after request ``done``, which are about to be given again."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    part = path.with_name(f".{path.name}.part")
    part.write_text("".join(lines[:done]))
    part.replace(path)


@contextlib.contextmanager
def opened(arguments: argparse.Namespace, service: Service) -> Iterator[tuple[Any, Log]]:
    """Checkpoints and log of a folder; the service is where its newest checkpoint was.

    Raises:
      InputError: a folder of other settings, or one that cannot be written.
    """
    from ctc_spec_jax.checkpoint import Checkpoints

    folder, settings = service.folder, settings_of(arguments)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_same(folder / "online.json", settings)
        (folder / "online.json").write_text(json.dumps(settings, indent=1) + "\n")
    except OSError as error:
        raise InputError(
            f"--out: expected a writable folder, found {folder} ({error.strerror})"
        ) from error
    with contextlib.closing(Checkpoints(folder / "checkpoints", 2)) as checkpoints:
        done = checkpoints.latest() or 0
        if done:
            service.restore(done, *checkpoints.restore(done, service.state()))
            tqdm.write(f"resumed after {done} requests in {folder}", file=sys.stderr)
        answers_before(folder / "answers.jsonl", done)
        with contextlib.closing(Log(epath.Path(folder), done)) as log:
            yield checkpoints, log


def serve_all(
    arguments: argparse.Namespace, engine: Engine, service: Service, requests: list[Dialogue]
) -> None:
    """Answer the requests that are left, in order; everything is written as it comes."""
    fields = cli.option_fields(arguments, engine)
    with (
        opened(arguments, service) as (checkpoints, log),
        open(service.folder / "answers.jsonl", "a", encoding="utf-8") as answers,
        tqdm(total=len(requests), initial=service.done, unit=" request") as bar,
    ):
        for number in range(service.done, len(requests)):
            asked = requests[number]
            seed = row_seed(asked.prompt.id, 0, arguments.seed)
            answer, metrics = service.request(asked.prompt.category, asked.ids, seed=seed, **fields)
            line = {"id": asked.prompt.id, "topic": asked.prompt.category, "text": answer.text}
            line |= {"finish": answer.finish, "tokens": answer.tokens, "rounds": answer.rounds}
            answers.write(json.dumps(line) + "\n")
            answers.flush()
            done = number + 1
            if done == len(requests) and done % arguments.window:
                metrics |= service.close_window()
            if metrics:
                log.write(done, metrics)
                shown = {n: log.newest[n] for n in ("accepted_length", "loss") if n in log.newest}
                bar.set_postfix(shown, refresh=False)
            if done == len(requests) or done % arguments.checkpoint_every == 0:
                checkpoints.save(done, service.state(), service.notes(), metrics)
                checkpoints.wait()  # before a step gives the arrays away
            bar.update()
        export(arguments, engine, service, log)


def export(arguments: argparse.Namespace, engine: Engine, service: Service, log: Log) -> None:
    """Write the drafter of every student as a folder of its own."""
    drafter: Any = engine.drafter
    for topic, student in service.students.items():
        name = re.sub(r"[^\w.-]+", "_", topic)
        folder = service.folder / "export" / name if topic else service.folder / "export"
        record = {
            "command": " ".join(["python -m train.online", *sys.argv[1:]]),
            "topic": topic,
            "requests": student.served,
            "updates": int(student.state["step"]),
            "metrics": log.newest,
            "versions": versions(),
        }
        params = sharding.host_copy(student.params)
        method = arguments.method or recipes.name_of(drafter.config)
        given = (params, arguments.target, engine.tokenizer, record)
        folders.save_drafter(folder, method, drafter, *given)
        tqdm.write(f"exported to {folder}", file=sys.stderr)


@exit_on_bad_input
def main() -> None:
    """Entry point of ``python -m train.online``."""
    arguments = _parse()
    use_compilation_cache()
    use_precision(arguments.dtype)
    engine = load(arguments)
    prompts, problems = read_prompts(arguments.prompts, first_turn=True)
    requests, refused, _ = prepare(engine, prompts, arguments.max_new_tokens)
    report(problems + refused)
    if not requests:
        raise InputError("--prompts: expected at least one that fits the target, found none")
    topics = sorted({r.prompt.category for r in requests}) if arguments.by_topic else [""]
    length = max(len(r.ids) for r in requests) + arguments.max_new_tokens
    school = school_of(arguments, engine, length)
    service = Service(school, topics, pathlib.Path(arguments.out), arguments.window)
    serve_all(arguments, engine, service, requests)
    if problems or refused:
        raise SystemExit(2)


if __name__ == "__main__":
    main()
