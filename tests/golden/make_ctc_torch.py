"""Writes ``ctc_torch.npz``: values and gradients of ``torch.nn.CTCLoss``, in float64.

Run in this folder: ``python make_ctc_torch.py``. Only this script needs torch; tests read the file.
"""

from pathlib import Path

import numpy as np
import torch

NUM_FRAMES, VOCAB = 6, 5

LABELS = np.array(
    [
        [0, 1, 2, 3],  # no repeat
        [4, 4, 1, 1],  # two repeats: 6 frames, one alignment skeleton
        [2, 2, 2, 2],  # three repeats: needs 7 frames, impossible
        [3, 0, 3, 9],  # padded
        [1, 9, 9, 9],
        [9, 9, 9, 9],  # empty
    ],
    np.int32,
)
LENGTHS = np.array([4, 4, 4, 3, 1, 0], np.int32)


def torch_ctc(logits, labels, lengths):
    """``nll [A]`` (inf if impossible) and ``d sum(nll) / d logits`` (0 for impossible rows).

    logits float64 [A, F, V+1], blank last; labels int [A, K], right-padded; lengths int [A].
    """
    z = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    num_anchors, num_frames, num_classes = z.shape
    log_probs = z.log_softmax(-1).transpose(0, 1)
    targets = torch.tensor(np.minimum(labels, num_classes - 2), dtype=torch.long)
    frames = torch.full((num_anchors,), num_frames)
    sizes = torch.tensor(lengths, dtype=torch.long)
    options = {"blank": num_classes - 1, "reduction": "none"}
    nll = torch.nn.CTCLoss(**options)(log_probs, targets, frames, sizes)
    finite = torch.nn.CTCLoss(**options, zero_infinity=True)(log_probs, targets, frames, sizes)
    (grad,) = torch.autograd.grad(finite.sum(), z)
    return nll.detach().numpy(), grad.numpy()


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=2.0, size=(len(LABELS), NUM_FRAMES, VOCAB + 1))
    nll, grad = torch_ctc(logits, LABELS, LENGTHS)
    np.savez(
        Path(__file__).with_name("ctc_torch.npz"),
        logits=logits,
        labels=LABELS,
        lengths=LENGTHS,
        nll=nll,
        grad=grad,
    )
