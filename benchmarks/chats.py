"""Chats as training text of a target, prompts of its drafters and questions of the benchmark.

    python benchmarks/chats.py CHATS.jsonl FOLDER   (or .jsonl.gz)

Writes into FOLDER: package ``chat_texts`` with a text per chat, which ``data.sources`` can name;
``prompts.jsonl`` of the same chats; ``questions.jsonl`` of the first 32, which are in neither; and
the template of both, ``chat.jinja``.
"""

import itertools
import json
import os
import pathlib
import sys

from train.files import expand, lines
from train.lines import BrokenLine, Chat, parse

QUESTIONS = 32
MOST = int(os.environ.get("ANSWERS", 8192))
TEXTS = 60_000
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def chats(path: str):
    """Messages of every line that is a chat which a user begins."""
    for _, line, _ in lines(expand([path])):
        try:
            content, _ = parse(line)
        except BrokenLine:
            continue
        if isinstance(content, Chat) and content.messages[0]["role"] == "user":
            yield [dict(message) for message in content.messages]


def main(path: str, folder: pathlib.Path) -> None:
    """Write all four; see the top of this file."""
    texts, found = folder / "chat_texts", chats(path)
    texts.mkdir(parents=True, exist_ok=True)
    (texts / "__init__.py").write_text("")
    (folder / "chat.jinja").write_text(TEMPLATE)
    with open(folder / "questions.jsonl", "w") as file:
        for number, chat in enumerate(itertools.islice(found, QUESTIONS)):
            row = {"question_id": number, "category": "chat", "turns": [chat[0]["content"]]}
            print(json.dumps(row), file=file)
    with open(folder / "prompts.jsonl", "w") as file:
        for number, chat in enumerate(itertools.islice(found, TEXTS)):
            text = "".join(f"{m['role']}: {m['content']}\n" for m in chat)
            (texts / f"{number}.py").write_text(text, "utf-8")
            if number < MOST:
                print(json.dumps({"messages": chat}), file=file)


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]))
