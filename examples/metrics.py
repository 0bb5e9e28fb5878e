"""Scores of masks, image by image: pixel accuracy, its mean over the classes, intersection over union."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

NAMES = ("PA", "mPA", "mIoU")


def mask_scores(predicted: Tensor, mask: Tensor) -> Tensor:
    """PA, mPA and mIoU of each image, (N, 3) in float64, from masks (N, *) of 0 and 1.

    PA = (TP + TN) / all, mPA = (TP / (TP + FP) + TN / (TN + FN)) / 2,
    mIoU = (TP / (TP + FP + FN) + TN / (TN + FP + FN)) / 2. A class that is neither there nor predicted counts as 1, as
    nothing was wrong about it; one that is there but not predicted has 0 / 0 in mPA, which counts as 0.
    """
    said, there = predicted.flatten(1).bool(), mask.flatten(1).bool()
    tp, fp, tn, fn = (both.sum(1).double() for both in (said & there, said & ~there, ~said & ~there, ~said & there))

    def share(right: Tensor, of: Tensor, union: Tensor) -> Tensor:
        return torch.where(union == 0, 1.0, right / of.clamp(min=1))

    object_union, ground_union = tp + fp + fn, tn + fp + fn
    accuracy = (tp + tn) / (tp + fp + tn + fn)
    precision = (share(tp, tp + fp, object_union) + share(tn, tn + fn, ground_union)) / 2
    overlap = (share(tp, object_union, object_union) + share(tn, ground_union, ground_union)) / 2
    return torch.stack((accuracy, precision, overlap), dim=1)


class MaskScores(Metric):
    """Mean and standard deviation of :func:`mask_scores` over all images, as {"PA": ..., "PA_std": ..., ...}."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "squares"):
            self.add_state(name, torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, mask: Tensor) -> None:
        scores = mask_scores(predicted, mask)
        self.total += scores.sum(0)
        self.squares += scores.square().sum(0)
        self.count += len(scores)

    def compute(self) -> dict[str, Tensor]:
        mean = self.total / self.count
        deviation = (self.squares / self.count - mean.square()).clamp(min=0).sqrt()
        return dict(zip(NAMES, mean, strict=True)) | {f"{n}_std": d for n, d in zip(NAMES, deviation, strict=True)}
