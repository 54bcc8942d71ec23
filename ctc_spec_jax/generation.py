"""One decoded answer, as the caller gets it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from ctc_spec_jax import stops
from ctc_spec_jax.types import STOPPED_BY_STRING, GenerateOutput

FINISH = ("running", "stop", "length", "stop_string", "cache_full")
"""Names of the finish reasons, by their number."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """One decoded answer. Text, tokens, log-probabilities and counts end at the same token.

    That token is the stop token, or the one that completes ``stop_string``, or the last one of
    the budget. ``emitted[r]`` is the number of tokens kept from round r. ``from_draft[i]`` says
    whether token i was drafted; otherwise it is the target's own, and ``refused[i]`` says whether
    that was in place of a drafted one. ``drafted[d]`` and
    ``accepted[d]`` count nodes offered and tokens kept at depth d + 1. ``top_logprobs[i]`` holds
    the most probable tokens at the place of token i with their log-probabilities.
    """

    text: str
    tokens: list[int]
    finish: str
    rounds: int
    emitted: list[int]
    seconds: float
    from_draft: list[bool] = dataclasses.field(default_factory=list)
    refused: list[bool] = dataclasses.field(default_factory=list)
    drafted: list[int] = dataclasses.field(default_factory=list)
    accepted: list[int] = dataclasses.field(default_factory=list)
    stop_string: str | None = None
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None

    @property
    def accepted_length(self) -> float:
        """Tokens per target pass, the target's own (bonus) token included."""
        return len(self.tokens) / max(self.rounds, 1)

    @property
    def text_before_stop(self) -> str:
        """The text up to the stop string that ended it."""
        return self.text if self.stop_string is None else self.text.split(self.stop_string)[0]


def generation_of(
    result: GenerateOutput,
    row: int,
    decode_text: Callable[[Sequence[int]], str],
    stop_strings: Sequence[str],
    seconds: float,
) -> Generation:
    """Row ``row`` of a result that has been fetched from the device."""
    length, rounds = int(result.lengths[row]), int(result.stats.rounds[row])
    tokens = np.asarray(result.tokens)[row, :length].tolist()
    text, finish = decode_text(tokens), int(result.finish[row])
    record, logprobs, top = result.record, None, None
    if record.logprobs is not None:
        logprobs = np.asarray(record.logprobs)[row, :length].tolist()
    if record.top_ids is not None:
        ids, values = np.asarray(record.top_ids)[row], np.asarray(record.top_logprobs)[row]
        top = [
            list(zip(*pair, strict=True))
            for pair in zip(ids.tolist(), values.tolist(), strict=True)
        ]
        top = top[:length]
    return Generation(
        text=text,
        tokens=tokens,
        finish=FINISH[finish],
        rounds=rounds,
        emitted=np.asarray(result.stats.emitted)[row, :rounds].tolist(),
        seconds=seconds,
        from_draft=np.asarray(record.from_draft)[row, :length].tolist(),
        refused=np.asarray(record.refused)[row, :length].tolist(),
        drafted=np.asarray(result.stats.drafted)[row].tolist(),
        accepted=np.asarray(result.stats.accepted)[row].tolist(),
        stop_string=stops.first_stop(text, stop_strings) if finish == STOPPED_BY_STRING else None,
        logprobs=logprobs,
        top_logprobs=top,
    )
