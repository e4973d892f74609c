"""Centred kernel alignment: how alike two layers arrange the same images (GPPF appendix A).

CKA(K, L) = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with linear kernels K = X X^T, L = Y Y^T. Each HSIC is the average
over minibatches of the unbiased estimator of Song et al. 2012, which makes the result independent of the batch size but
for noise (Nguyen, Raghu and Kornblith 2021, arXiv 2010.15327): memory is that of one batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_IMAGES = 4
"""In a batch; the unbiased estimator divides by n - 3."""


def gram(features: Tensor) -> Tensor:
    """The linear kernel of n images, (n, ...) -> (n, n) float64.

    The mean is taken off before: HSIC does not see it, but in single precision it would drown the differences.
    """
    flat = features.detach().float().flatten(1)
    flat = flat - flat.mean(0)
    return (flat @ flat.T).double()


def unbiased_hsic(grams: Tensor) -> Tensor:
    """HSIC_1 of every pair of kernels, on the same n images.

    HSIC_1(K, L) = [tr(K~ L~) + 1'K~1 1'L~1 / ((n-1)(n-2)) - 2 / (n-2) 1'K~ L~1] / (n (n-3)), where ~ sets the diagonal
    to zero (Song et al. 2012).

    Args:
        grams: (kernels, n, n), symmetric, n at least :data:`LEAST_IMAGES`.

    Returns:
        (kernels, kernels).
    """
    n = grams.shape[-1]
    hollow = grams - torch.diag_embed(grams.diagonal(dim1=-2, dim2=-1))
    flat, rows = hollow.flatten(1), hollow.sum(-1)
    sums = rows.sum(-1)
    value = flat @ flat.T + sums[:, None] * sums[None] / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows @ rows.T
    return value / (n * (n - 3))


class MinibatchCka:
    """CKA between all pairs of layers, batch by batch."""

    def __init__(self) -> None:
        self.batches = 0
        self.images = 0
        self._hsic: Tensor | float = 0.0

    def update(self, grams: Tensor) -> None:
        """Adds a batch.

        Args:
            grams: (layers, n, n), of the layers of all models on the same n images; see :func:`gram`.
        """
        self._hsic = self._hsic + unbiased_hsic(grams)
        self.batches += 1
        self.images += grams.shape[-1]

    def compute(self) -> Tensor:
        """(layers, layers): 1 on the diagonal; nan where too few images leave a layer without a positive HSIC."""
        hsic = torch.as_tensor(self._hsic, dtype=torch.float64)
        own = hsic.diagonal()
        scale = torch.where(own > 0, own, torch.nan).sqrt()
        return hsic / (scale[:, None] * scale[None])
