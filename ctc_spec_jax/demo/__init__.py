"""The embedded demo pair: a small Python code model and its CTC drafter.

Both were trained by ``configs/demo_target.yaml`` and ``configs/demo_drafter.yaml``; how is recorded
in the ``training.json`` beside the weights.
"""

from __future__ import annotations

import pathlib

TREE_NODES = 8
"""Tree size that decodes the demo pair fastest on two CPU cores."""

_HERE = pathlib.Path(__file__).parent


def target_folder() -> pathlib.Path:
    """Hugging Face folder of the demo target."""
    return _HERE / "target"


def drafter_folder() -> pathlib.Path:
    """Folder of its CTC drafter."""
    return _HERE / "drafter"
