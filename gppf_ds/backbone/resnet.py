"""ResNets as lego layers: the stem and every residual block (17 layers for ResNet-50, GPPF figure 11)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from gppf_ds.backbone.blocks import Block, Tap


def split(model: Any) -> list[Block]:
    """The blocks of a timm ResNet, in order.

    The strided block with its projection shortcut is one unit. Max-pooling has no parameters and stays outside the
    units, so that the stem's own stride-2 map can be tapped (the depth head wants it).
    """
    stem = nn.Sequential(OrderedDict(conv1=model.conv1, bn1=model.bn1, act1=model.act1))
    blocks = [Block("Stem", "", stem, Tap(model.bn1.num_features, 2))]
    before = model.maxpool
    for number, info in enumerate(model.feature_info[1:], start=1):
        stage = getattr(model, f"layer{number}")
        for index, module in enumerate(stage):
            tap = Tap(info["num_chs"], info["reduction"]) if index == len(stage) - 1 else None
            block = Block(f"Res{number + 1}.{index}", f"layer{number}.{index}.", module, tap)
            if before is not None:
                block.before, before = before, None
            blocks.append(block)
    return blocks
