"""Chats and texts as token ids, and which of them are labels.

Shape letters: T tokens.
"""

from __future__ import annotations

import copy
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np

from ctc_spec_jax.errors import InputError
from train.lines import TEMPLATE, BrokenLine

Labelled = tuple[np.ndarray, np.ndarray]
"""Token ids int32 [T], and whether each is a label, bool [T]."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chat_template(tokenizer, path: str = "") -> str | None:
    """Text of a Jinja file, or else the tokenizer's own template, or None.

    Raises:
      InputError: an unreadable file, or a template that is no Jinja.
    """
    if not path:
        found = tokenizer.chat_template
        return found.get("default") if isinstance(found, dict) else found
    try:
        text = pathlib.Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"data.template: expected a readable file, found {path} ({error})"
        ) from error
    return text


def has_generation_tags(template: str) -> bool:
    """Whether a template marks what the assistant generates."""
    return bool(_GENERATION.search(template))


class Encoder:
    """Tokenises as a target is prompted: a chat by its template, which alone writes a BOS.

    Args:
      tokenizer: a fast Hugging Face tokenizer.
      template: of chats, or None.
      train_on: ``assistant`` (answers only) or ``all``.
    """

    def __init__(self, tokenizer, template: str | None, train_on: str = "assistant"):
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                f"data: expected a fast tokenizer, found {type(tokenizer).__name__}, "
                "which cannot say where its tokens lie in the text"
            )
        self.tokenizer, self.template, self.train_on = tokenizer, template, train_on
        # Post-processors trim blanks off the places of tokens; no special token is added here.
        self._exact = copy.deepcopy(tokenizer)
        self._exact.backend_tokenizer.post_processor = None
        self._probe: tuple[str, str] | None = None

    def texts(self, texts: Sequence[str]) -> list[Labelled]:
        """Texts with the tokenizer's own special tokens, one BOS at most, and an EOS at the end."""
        bos, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        result = []
        for encoding in self.tokenizer.backend_tokenizer.encode_batch(list(texts)):
            ids = encoding.ids
            if bos is not None and ids[:2] == [bos, bos]:
                ids = ids[1:]  # the text had its own
            if end is not None and ids[-1:] != [end]:
                ids = [*ids, end]
            result.append((np.asarray(ids, np.int32), np.ones(len(ids), bool)))
        return result

    def chats(self, chats: Sequence[Sequence[Mapping[str, Any]]]) -> list[Labelled | BrokenLine]:
        """Every chat with its labels, or why the template does not fit it.

        Raises:
          InputError: no template.
        """
        if chats and self.template is None:
            raise InputError(
                "data.template: expected a Jinja file, since the tokenizer has no chat template, "
                "found ''"
            )
        if self.train_on == "assistant" and has_generation_tags(self.template or ""):
            return [self._caught(self._tagged, chat) for chat in chats]
        found = [self._caught(self._spans, chat) for chat in chats]
        texts = [spans[0] for spans in found if not isinstance(spans, BrokenLine)]
        encodings = self._exact.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        rest = iter(encodings)
        return [
            spans if isinstance(spans, BrokenLine) else self._label(next(rest), spans[1])
            for spans in found
        ]

    def render(self, messages: Sequence[Mapping[str, Any]], prompt: bool = False) -> str:
        """A chat as text, with the assistant's header at the end if ``prompt``."""
        text = self._exact.apply_chat_template(
            list(messages),
            chat_template=self.template,
            add_generation_prompt=prompt,
            tokenize=False,
        )
        assert isinstance(text, str)
        return text

    def _caught(self, function, chat):
        try:
            return function(chat)
        except BrokenLine as error:
            return error
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            if isinstance(error, jinja2.TemplateSyntaxError):
                raise InputError(f"data.template: expected Jinja, found {error}") from error
            return BrokenLine(TEMPLATE, error)

    def _tagged(self, chat) -> Labelled:
        """Labels where the template says so."""
        found = self._exact.apply_chat_template(
            list(chat),
            chat_template=self.template,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
        return np.asarray(found["input_ids"], np.int32), np.asarray(found["assistant_masks"], bool)

    def _spans(self, chat) -> tuple[str, list[tuple[int, int]]]:
        """The rendered chat and where its answers lie: what each adds to the text before it."""
        whole = self.render(chat)
        if self.train_on == "all":
            return whole, [(0, len(whole))]
        spans, end = [], 0
        for place, message in enumerate(chat):
            if message["role"] != "assistant":
                continue
            span = self._plain_span(message["content"], whole, end)
            if span is None:
                start = self._start(chat[:place], whole, end)
                end = self._end(chat[: place + 1], whole, start, last=place + 1 == len(chat))
                span = start, end
            if spans and span[0] < spans[-1][1]:
                raise BrokenLine(TEMPLATE, "its answers end in several ways")
            spans.append(span)
            end = span[1]
        return whole, spans

    def _plain_span(self, content: str, whole: str, end: int) -> tuple[int, int] | None:
        """The next answer after ``end``, if it stands there word by word between its marks.

        This is what the difference of renderings finds, without rendering a chat for every turn.
        """
        header, footer = self._marks()
        if not header.strip() or not footer.strip():
            return None
        answer = header + content + footer
        place = whole.find(header, end)
        # A user may have written the same; then only the renderings tell.
        if not whole.startswith(answer, max(place, 0)) or whole.find(answer, place + 1) >= 0:
            return None
        return place + len(header), place + len(answer)

    def _start(self, before, whole: str, end: int) -> int:
        try:
            text = self.render(before, prompt=True) if before else ""
        except jinja2.TemplateError:
            text = ""
        if text and whole.startswith(text):
            return len(text)
        # A chat cannot be rendered before its first message, and some templates rewrite earlier
        # ones; the header of an answer stays the same.
        return _after(self._marks()[0], whole, end)

    def _end(self, chat, whole: str, start: int, last: bool) -> int:
        text = whole if last else self.render(chat)
        if whole.startswith(text) and len(text) > start:
            return len(text)
        # Some templates write the last answer in another way, with its thoughts for instance.
        return _after(self._marks()[1], whole, start)

    def _marks(self) -> tuple[str, str]:
        """Header and footer of an answer."""
        if self._probe is None:
            user = {"role": "user", "content": "x"}
            prompt = self.render([user], prompt=True)
            text = self.render([user, {"role": "assistant", "content": "qqq"}])
            footer = text[text.rfind("qqq") + 3 :] if "qqq" in text else ""
            self._probe = prompt.removeprefix(self.render([user])), footer
        return self._probe

    def _label(self, encoding, spans) -> Labelled:
        ids = np.asarray(encoding.ids, np.int32)
        first, last = np.asarray(encoding.offsets, np.int64).reshape(-1, 2).T
        starts, ends = np.asarray(spans, np.int64).reshape(-1, 2).T
        if not len(starts):
            return ids, np.zeros(len(ids), bool)
        span = np.searchsorted(starts, first, side="right") - 1
        # A token that begins in a header is never generated; an empty one at the end of an answer
        # belongs to what follows.
        return ids, (span >= 0) & (last <= ends[span]) & (first < ends[span])


def _after(mark: str, whole: str, begin: int) -> int:
    """Where the text after the next ``mark`` begins; blanks alone are no mark."""
    place = whole.find(mark, begin) if mark.strip() else -1
    if place < 0:
        raise BrokenLine(TEMPLATE, "it rewrites earlier messages, so answers cannot be found")
    return place + len(mark)
