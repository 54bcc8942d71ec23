"""What a drafter is trained on and judged by: documents of files, in rows, and held-out prompts."""

from __future__ import annotations

import copy
import hashlib

import jax
import numpy as np
from jax.sharding import Mesh

from ctc_spec_jax import sharding
from ctc_spec_jax.errors import InputError
from train import data
from train.chat import chat_template
from train.config import TrainConfig
from train.dialogue import begin
from train.evaluate import Prompts
from train.prompts import read_prompts


class DocumentSource:
    """Rows of ``data.files`` for the steps, and held-out rows and prompts for evaluations.

    ``fingerprint`` names the documents and how they are cut, so that a resumed run can tell whether
    they are still the same.
    """

    def __init__(self, config: TrainConfig, tokenizer, vocab_size: int):
        self.config, self._tokenizer = config, tokenizer
        options, length = config.data, config.batch.length
        if not options.files:
            raise InputError("data.files: expected files of train.regenerate or chats, found none")
        documents = data.read_files(options.files, tokenizer, options, length, vocab_size)
        train, self._heldout = documents.split(options.heldout)
        if not len(self._heldout):
            raise InputError(
                f"data.heldout: expected a share that holds out at least one of {len(documents)} "
                f"documents, found {options.heldout}"
            )
        self._rows = data.pack(train, length, options.pack)
        self._heldout_rows = data.pack(self._heldout, length, options.pack)
        # Too few rows fail here and not when the first step is due.
        data.batch_dataset(self._rows, config.batch.rows, config.run.seed)
        digest = hashlib.sha256(documents.hashes.tobytes() + documents.lengths.tobytes())
        self.fingerprint = digest.hexdigest()[:16]
        self.record = self._rows.record() | {"heldout_documents": len(self._heldout)}

    def batches(self, start: int) -> data.Batches:
        """This process's batches from step ``start`` on; see ``data.batch_dataset``."""
        return data.batches(
            self._rows,
            self.config.batch.rows,
            self.config.run.seed,
            jax.process_index(),
            jax.process_count(),
            start,
        )

    def heldout_rows(self, count: int, mesh: Mesh) -> dict[str, jax.Array]:
        """The first ``count`` held-out rows as a batch, spread over the mesh where they divide."""
        picked = [self._heldout_rows[i] for i in range(min(count, len(self._heldout_rows)))]
        batch = jax.tree.map(lambda *rows: np.stack(rows), *picked)
        return jax.device_put(batch, sharding.rows(mesh, batch))

    def heldout_prompts(self, count: int, longest: int) -> Prompts:
        """``count`` prompts: of ``evaluation.files``, or the beginnings of held-out documents.

        A document's prompt ends before its first label or after ``longest`` tokens; a file's longer
        ones are left out.
        """
        if self.config.evaluation.files:
            return self._file_prompts(count, longest)
        tokens = []
        for place in range(min(count, len(self._heldout))):
            ids, trained = self._heldout[place]
            tokens.append(ids[: min(longest, int(np.argmax(trained)))].tolist())
        return Prompts(tokens, [""] * len(tokens))

    def _file_prompts(self, count: int, longest: int) -> Prompts:
        found, problems = read_prompts(self.config.evaluation.files, first_turn=True)
        if problems:
            raise InputError(f"evaluation.files: {problems[0].removeprefix('--prompts: ')}")
        tokenizer = self._tokenizer
        if self.config.data.template:
            tokenizer = copy.copy(tokenizer)
            tokenizer.chat_template = chat_template(tokenizer, self.config.data.template)
        rows = [(begin(tokenizer, prompt).ids, prompt.category) for prompt in found]
        rows = [(ids, category) for ids, category in rows if 1 <= len(ids) <= longest]
        if not rows:
            raise InputError(
                f"evaluation.files: expected prompts of at most {longest} tokens "
                f"(evaluation.prompt_length), found none among {len(found)}"
            )
        # Every k-th, so that all categories of a sorted file are met.
        picked = [rows[i * len(rows) // count] for i in range(count)] if count < len(rows) else rows
        return Prompts([ids for ids, _ in picked], [category for _, category in picked])
