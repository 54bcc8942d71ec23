"""A line of a training file: which form it has, and what is wrong with it if it has none."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "tool": "tool",
}

NOT_JSON = "not JSON"
NOT_TEXT = "not UTF-8"
WRONG_SHAPE = "wrong shape"
UNKNOWN_ROLE = "unknown role"
EMPTY = "empty"
OUTSIDE = "ids outside the vocabulary"
UNEQUAL = "lengths differ"
TEMPLATE = "template does not fit"


class BrokenLine(ValueError):
    """A line that cannot be used; ``reason`` is one of the constants above."""

    def __init__(self, reason: str, found: object = ""):
        super().__init__(f"{reason}: {found}" if found else reason)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Chat:
    """Messages with the roles system, user, assistant and tool."""

    messages: tuple[Mapping[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Token ids, and which of them are labels (0 or 1)."""

    ids: tuple[int, ...]
    mask: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Text:
    """Text of which every token is a label."""

    text: str


def parse(line: bytes) -> tuple[Chat | Tokens | Text, bytes]:
    """Content of a JSON line, and the bytes whose hash decides whether it is held out.

    These are the line's ``id`` or else its content; of a chat only what comes before its first
    answer, so that all answers to one prompt stay on one side.

    Raises:
      BrokenLine: not one of the forms.
    """
    try:
        row = json.loads(line)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BrokenLine(NOT_JSON, line[:40]) from error
    if not isinstance(row, dict):
        raise BrokenLine(WRONG_SHAPE, f"expected an object, found {line[:40]!r}")
    content = _content(row)
    key = row["id"] if isinstance(row.get("id"), str | int) else _essence(content)
    return content, json.dumps(key).encode()


def _content(row: Mapping[str, Any]) -> Chat | Tokens | Text:
    if "input_ids" in row:
        return _tokens(row["input_ids"], row.get("loss_mask"))
    for name in ("messages", "conversations"):
        if name in row:
            return _chat(row[name])
    if "text" not in row:
        names = "messages, conversations, input_ids or text"
        raise BrokenLine(WRONG_SHAPE, f"expected {names}, found {sorted(row)[:6]}")
    if not isinstance(row["text"], str):
        raise BrokenLine(WRONG_SHAPE, f"expected a text, found {type(row['text']).__name__}")
    if not row["text"]:
        raise BrokenLine(EMPTY, "text")
    return Text(row["text"])


def _tokens(ids: Any, mask: Any) -> Tokens:
    if not (isinstance(ids, list) and all(type(i) is int for i in ids)):
        raise BrokenLine(WRONG_SHAPE, "expected whole numbers in input_ids")
    # A mask of true and false is as clear as one of ones and zeros.
    if not (isinstance(mask, list) and all(isinstance(m, int) and m in (0, 1) for m in mask)):
        raise BrokenLine(WRONG_SHAPE, "expected zeros and ones in loss_mask")
    if len(ids) != len(mask):
        raise BrokenLine(UNEQUAL, f"{len(ids)} input_ids, {len(mask)} of loss_mask")
    if not ids:
        raise BrokenLine(EMPTY, "input_ids")
    return Tokens(tuple(ids), tuple(mask))


def _chat(messages: Any) -> Chat:
    if not isinstance(messages, list):
        raise BrokenLine(WRONG_SHAPE, f"expected a list of messages, found {messages!r:.40}")
    if not messages:
        raise BrokenLine(EMPTY, "messages")
    return Chat(tuple(map(_message, messages)))


def _message(message: Any) -> Mapping[str, Any]:
    if not isinstance(message, dict):
        raise BrokenLine(WRONG_SHAPE, f"expected a message, found {message!r:.40}")
    keys = ("role", "content") if "role" in message else ("from", "value")
    role, content = map(message.get, keys)
    if not isinstance(role, str) or not isinstance(content, str):
        raise BrokenLine(WRONG_SHAPE, f"expected role and content, found {message!r:.40}")
    if role not in _ROLES:
        raise BrokenLine(UNKNOWN_ROLE, repr(role)[:40])
    role = _ROLES[role]
    if role == "assistant" and not content.strip():
        raise BrokenLine(EMPTY, "answer")
    # Templates read more of a message than these two: names, tool calls, thoughts.
    rest = {name: value for name, value in message.items() if name not in keys}
    return {"role": role, "content": content, **rest}


def _essence(content: Chat | Tokens | Text) -> Any:
    if not isinstance(content, Chat):
        return dataclasses.astuple(content)
    roles = [message["role"] for message in content.messages]
    first = roles.index("assistant") if "assistant" in roles else len(roles)
    # Chats that begin with an answer, or after the same system message, share no prompt.
    prompt = content.messages[:first] if "user" in roles[:first] else content.messages
    return [[message["role"], message["content"]] for message in prompt]
