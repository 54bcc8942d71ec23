"""Writes ``processors.npz``: scores of one position after the processors of transformers.

Run in this folder: ``python make_processors.py``. torch and transformers are needed here only; the
tests read the file. The list of processors, hence their order, is what ``generate`` itself makes
of a ``GenerationConfig``.

A case is a dict: ``scores`` float32 [V], ``prompt`` and ``generated`` token ids, ``eos`` token ids
and ``options``, the arguments of ``generate`` that are on.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np

GOLDEN = Path(__file__).with_name("processors.npz")
VOCAB = 64
PROCESSORS = (
    "sequence_bias",
    "repetition_penalty",
    "bad_words_ids",
    "min_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
)
CASES = 48


def subsets(rng):
    """(processors that are on, greedy or not) of every case: none, one each, all, random ones."""
    yield (), False
    yield (), True
    for name in PROCESSORS:
        yield (name,), False
    for number in range(10):
        yield PROCESSORS, number % 5 == 4
    for number in range(CASES - 20):
        on = rng.random(len(PROCESSORS)) < 0.6
        names = tuple(name for name, use in zip(PROCESSORS, on, strict=True) if use)
        yield names, number % 4 == 3


def random_case(rng, names, greedy):
    """A case with the processors ``names``; phrases often continue what is known already."""
    prompt = rng.integers(0, VOCAB, rng.integers(1, 9)).tolist()
    generated = rng.integers(0, VOCAB, rng.integers(0, 9)).tolist()
    known = prompt + generated
    eos = rng.choice(VOCAB, rng.integers(1, 4), replace=False).tolist()
    scores = (1.5 * rng.standard_normal(VOCAB)).astype(np.float32)

    def phrases(count):
        """Distinct id lists: single tokens, phrases that match and phrases that do not."""
        found = set()
        while len(found) < count:
            size = int(rng.integers(0, min(4, len(known)) + 1))
            start = known[len(known) - size :]
            if start and rng.random() < 0.3:
                start[int(rng.integers(size))] = int(rng.integers(VOCAB))
            # Likely tokens, so that it matters. A stop token is no bad word: see generate.
            last = int(rng.choice(np.argsort(scores)[-24:]))
            if last not in eos:
                found.add((*start, last))
        return [list(ids) for ids in sorted(found)]

    every = {
        "sequence_bias": [[ids, float(rng.uniform(-3, 3))] for ids in phrases(8)],
        "repetition_penalty": float(rng.choice([0.8, 1.2, 1.7])),
        "bad_words_ids": phrases(5),
        "min_new_tokens": len(generated) + int(rng.integers(0, 2)),
        "temperature": float(rng.choice([0.6, 0.9, 1.4, 2.0])),
        "top_k": int(rng.choice([1, 12, 20, 40, 500])),
        "top_p": float(rng.choice([0.3, 0.8, 0.9, 0.95])),
        "min_p": float(rng.choice([0.02, 0.05, 0.2])),
    }
    options = {"do_sample": not greedy, **{name: every[name] for name in names}}
    return {
        "scores": scores,
        "prompt": prompt,
        "generated": generated,
        "eos": eos,
        "options": options,
    }


def hf_scores(case):
    """float32 [V], and the names of the processors in the order in which they ran."""
    import torch
    from transformers import GenerationConfig
    from transformers.generation import GenerationMixin

    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(**{**off, **case["options"]}, eos_token_id=case["eos"])
    config._eos_token_tensor = torch.tensor(case["eos"])
    # The method reads nothing else of a model.
    model = GenerationMixin()
    model.config = SimpleNamespace(is_encoder_decoder=False)
    processors = model._get_logits_processor(config, input_ids_seq_length=len(case["prompt"]))
    ids = torch.tensor([case["prompt"] + case["generated"]])
    scores = processors(ids, torch.from_numpy(case["scores"][None].copy()))
    return scores[0].numpy(), [type(processor).__name__ for processor in processors]


def stable(case):
    """Whether the thresholds of top-p and min-p are clear of ties and of rounding."""
    options = case["options"]
    support = np.isfinite(hf_scores(case)[0])
    for name in {"top_p", "min_p"} & options.keys():
        for factor in (1 - 1e-3, 1 + 1e-3):
            nudged = {**options, name: options[name] * factor}
            other, _ = hf_scores({**case, "options": nudged})
            if (np.isfinite(other) != support).any():
                return False
    return True


def random_cases(seed):
    """``CASES`` stable cases, each with what transformers makes of it under ``expected``."""
    rng = np.random.default_rng(seed)
    cases = []
    for names, greedy in subsets(rng):
        case = random_case(rng, names, greedy)
        while not stable(case):
            case = random_case(rng, names, greedy)
        case["expected"], case["order"] = hf_scores(case)
        cases.append(case)
    return cases


def load():
    """The stored cases."""
    with np.load(GOLDEN) as stored:
        cases = json.loads(str(stored["cases"]))
        for case, scores, expected in zip(cases, stored["scores"], stored["expected"], strict=True):
            case["scores"], case["expected"] = scores, expected
        return cases


if __name__ == "__main__":
    cases = random_cases(seed=6)
    rest = [{k: v for k, v in c.items() if k not in ("scores", "expected")} for c in cases]
    np.savez_compressed(
        GOLDEN,
        cases=np.array(json.dumps(rest)),
        scores=np.stack([case["scores"] for case in cases]),
        expected=np.stack([case["expected"] for case in cases]),
    )
    for case in cases:
        print(np.isfinite(case["expected"]).sum(), *case["order"])
