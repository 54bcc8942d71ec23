"""Time plain decoding against ``transformers`` on the same weights, prompts and CPU threads.

    python -m infer.benchmark --peers

Both decode greedily in float32 with a cache, take turns on every prompt, and end at the same stop
token and cap. Needs torch, which this library itself does not.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ctc_spec_jax import demo
from ctc_spec_jax.cli import exit_on_bad_input, use_compilation_cache
from ctc_spec_jax.engine import Engine, Generation
from ctc_spec_jax.errors import InputError
from ctc_spec_jax.models import convert
from infer.generate import check_counts, check_json, measure, write_document
from infer.prompts import Prompt, choose_prompts
from infer.prompts import report as report_lines


@dataclasses.dataclass(frozen=True)
class Difference:
    """First token in which two answers to one prompt differ.

    ``logit_gap`` is how much higher the peer scores its own token than this library's, after the
    text that both agree on; None where one of the answers ends.
    """

    prompt: int
    position: int
    logit_gap: float | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Result of the benchmark; names as in the JSON file."""

    target: str
    prompts: int
    max_new_tokens: int
    repeats: int
    threads: int
    tokens: int
    tokens_per_second: float
    transformers_tokens: int
    transformers_tokens_per_second: float
    ratio: float
    identical: bool
    differences: list[Difference]
    command: str
    versions: dict[str, str]


class Transformers:
    """``transformers`` ``generate`` behind the method of ``Engine``: torch, CPU, float32, greedy.

    Prompts are encoded and answers are cut by ``engine``, so that both get the same token ids.
    """

    def __init__(self, engine: Engine, folder: str, threads: int):
        self.torch, library = _torch(), importlib.import_module("transformers")
        self.torch.set_num_threads(threads)
        library.utils.logging.disable_progress_bar()
        self.engine = engine
        loaded = library.AutoModelForCausalLM.from_pretrained(folder, dtype=self.torch.float32)
        self.model: Any = loaded.eval()
        self.end = engine.tokenizer.eos_token_id
        # ``generate`` fills what a call leaves open from here; the folder may ask for sampling.
        self.model.generation_config = library.GenerationConfig(
            do_sample=False, use_cache=True, eos_token_id=self.end, pad_token_id=self.end
        )

    def generate(self, prompts, max_new_tokens=(), **options: Any) -> list[Generation]:
        """See ``Engine.generate``; one target pass per token, greedy whatever the ``options``."""
        del options
        tokens, lengths = self.engine.encode(prompts, max_new_tokens)
        return [
            self._answer(row[:length], budget)
            for row, length, budget in zip(tokens, lengths, max_new_tokens, strict=True)
        ]

    def logits(self, tokens) -> np.ndarray:
        """float32 [V] after the text ``tokens`` [T]."""
        with self.torch.inference_mode():
            return self.model(self._row(tokens)).logits[0, -1].numpy()

    def _row(self, tokens):
        return self.torch.tensor(np.asarray(tokens)[None], dtype=self.torch.int64)

    def _answer(self, prompt: np.ndarray, max_new_tokens: int) -> Generation:
        row = self._row(prompt)
        mask = self.torch.ones_like(row)
        began = time.perf_counter()
        with self.torch.inference_mode():
            whole = self.model.generate(row, attention_mask=mask, max_new_tokens=max_new_tokens)
        seconds = time.perf_counter() - began
        new = whole[0, len(prompt) :].tolist()
        finish = "stop" if new and new[-1] == self.end else "length"
        text = self.engine.decode_text(new)
        return Generation(text, new, finish, len(new), [1] * len(new), seconds)


def _torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise InputError(
            "--peers: expected torch to be installed (pip install torch), found none"
        ) from error


def find_differences(
    prompts: list[list[int]],
    answers: list[list[int]],
    peer_answers: list[list[int]],
    logits: Callable[[list[int]], np.ndarray],
) -> list[Difference]:
    """The first difference of every prompt whose two answers differ.

    Args:
      prompts: token ids.
      answers: token ids of this library.
      peer_answers: token ids of the peer.
      logits: of the peer, [V] after a text of token ids.
    """
    found = []
    for index, (prompt, ours, theirs) in enumerate(
        zip(prompts, answers, peer_answers, strict=True)
    ):
        if ours == theirs:
            continue
        shared = min(len(ours), len(theirs))
        position = next((i for i in range(shared) if ours[i] != theirs[i]), shared)
        gap = None
        if position < shared:
            scores = logits(prompt + theirs[:position])
            gap = float(scores[theirs[position]] - scores[ours[position]])
        found.append(Difference(index, position, gap))
    return found


def compare(engine: Engine, folder: str, prompts, max_new_tokens: int, repeats: int) -> Comparison:
    """Measure ``engine`` and ``transformers`` in turns; ``folder`` is that of the engine's target.

    Raises:
      InputError: torch is not installed.
    """
    threads = os.cpu_count() or 1
    peer = Transformers(engine, folder, threads)
    (ours, theirs), seconds = measure(engine, peer, prompts, repeats)
    tokens, lengths = engine.encode([prompt.content for prompt in prompts], max_new_tokens)
    differences = find_differences(
        [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)],
        [answer.tokens for answer in ours],
        [answer.tokens for answer in theirs],
        peer.logits,
    )
    counts = [sum(len(answer.tokens) for answer in answers) for answers in (ours, theirs)]
    speeds = [count / sum(times) for count, times in zip(counts, seconds, strict=True)]
    return Comparison(
        target=folder,
        prompts=len(prompts),
        max_new_tokens=max_new_tokens,
        repeats=repeats,
        threads=threads,
        tokens=counts[0],
        tokens_per_second=speeds[0],
        transformers_tokens=counts[1],
        transformers_tokens_per_second=speeds[1],
        ratio=speeds[0] / speeds[1],
        identical=not differences,
        differences=differences,
        command="python -m infer.benchmark " + " ".join(sys.argv[1:]),
        versions={
            "jax": jax.__version__,
            "torch": peer.torch.__version__,
            "transformers": importlib.import_module("transformers").__version__,
        },
    )


def report(result: Comparison) -> str:
    """The comparison as aligned text."""
    rows = [
        ("", "this library", "transformers"),
        ("tokens", str(result.tokens), str(result.transformers_tokens)),
        (
            "tokens/s, plain decoding",
            f"{result.tokens_per_second:.1f}",
            f"{result.transformers_tokens_per_second:.1f}",
        ),
        ("ratio", f"{result.ratio:.2f}", ""),
        ("identical", "yes" if result.identical else "no", ""),
    ]
    lines = [f"{name:<28}{ours:>14}{theirs:>14}".rstrip() for name, ours, theirs in rows]
    for difference in result.differences:
        gap = difference.logit_gap
        lines.append(
            f"prompt {difference.prompt} differs first in token {difference.position}"
            + ("" if gap is None else f", logit gap {gap:.2e}")
        )
    return "\n".join(lines)


@exit_on_bad_input
def main() -> None:
    """Entry point of ``python -m infer.benchmark``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", action="store_true", help="compare with transformers (torch)")
    parser.add_argument("--target", help="Hugging Face folder or hub id (default: the demo)")
    parser.add_argument("--prompts", help="JSONL file with 'prompt' or 'turns'")
    parser.add_argument("--num-prompts", type=int, default=8, help="held-out prompts to take")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each prompt")
    parser.add_argument("--json", help="file to write the result to")
    arguments = parser.parse_args()
    if not arguments.peers:
        raise InputError("--peers: expected it, the one comparison there is, found none")
    check_counts(arguments, ("num_prompts", "max_new_tokens", "repeats"))
    check_json(arguments.json)
    _torch()
    use_compilation_cache()
    folder = str(convert.target_folder(arguments.target or str(demo.target_folder())))
    engine = Engine.from_pretrained(folder)
    fields = {"max_new_tokens": arguments.max_new_tokens}
    prompts, problems = choose_prompts(engine, arguments.prompts, arguments.num_prompts, fields)
    prompts = [Prompt(prompt.content, fields) for prompt in prompts]
    report_lines(problems)
    result = compare(engine, folder, prompts, arguments.max_new_tokens, arguments.repeats)
    print(report(result))
    if arguments.json:
        named = {"target": arguments.target or "demo"}  # a folder of this machine says nothing
        write_document(arguments.json, dataclasses.asdict(result) | named)
    if problems:
        raise SystemExit(2)


if __name__ == "__main__":
    main()
