"""Residual blocks with a modulated deformable 3x3 convolution (Zhu et al. 2019, Deformable ConvNets v2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from gppf_ds.backbone.blocks import Block


class DeformableConv2d(nn.Conv2d):
    """A convolution that samples at learnt offsets with learnt weights; parameter names are mmcv's.

    The offsets start at zero and the modulation at one half, as in the paper.

    Args:
        plain: the convolution whose place it takes, weights included.
    """

    def __init__(self, plain: nn.Conv2d) -> None:
        size, stride, padding, dilation = plain.kernel_size, plain.stride, plain.padding, plain.dilation
        super().__init__(plain.in_channels, plain.out_channels, size, stride, padding, dilation, bias=False)  # type: ignore[arg-type]
        self.weight = plain.weight
        points = size[0] * size[1]
        self.conv_offset = nn.Conv2d(plain.in_channels, 3 * points, size, stride, padding, dilation)  # type: ignore[arg-type]
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        vertical, horizontal, modulation = self.conv_offset(x).chunk(3, dim=1)
        offset = torch.cat([vertical, horizontal], dim=1)
        # In the weights' precision, whatever autocast says: on a CPU torchvision knows nothing of it.
        own, mask, offset = (value.to(self.weight.dtype) for value in (x, torch.sigmoid(modulation), offset))
        with torch.autocast(x.device.type, enabled=False):
            y = deform_conv2d(own, offset, self.weight, None, self.stride, self.padding, self.dilation, mask)
        return y.to(x.dtype)


def deformable(block: Block) -> Block:
    """The residual block with a deformable ``conv2``, from Res3 on; the stem and Res2 stay plain (as in the paper)."""
    if block.name == "Stem" or block.name.startswith("Res2"):
        return block
    block.module.conv2 = DeformableConv2d(block.module.conv2)  # type: ignore[arg-type]
    return block
