"""What decays and what does not."""

from __future__ import annotations

import pytest

from gppf_ds.backbone.lego import LegoBackbone
from gppf_ds.config import BackboneConfig, OptimizerConfig, RunConfig
from gppf_ds.simt.model import SimtModel
from gppf_ds.simt.optimizer import build_optimizer

NETS = {
    "vit_tiny_patch16_224": ({"embed_dim": 48, "depth": 2, "num_heads": 3}, {"pos_embed", "cls_token"}),
    "swin_tiny_patch4_window7_224": (
        {"embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]},
        {"relative_position_bias_table"},
    ),
    "resnet18": ({"layers": [1, 1, 1, 1], "channels": [4, 8, 8, 8]}, set()),
}


@pytest.mark.parametrize("norm_decay", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_norms_biases_and_what_timm_exempts_do_not_decay(name: str, norm_decay: bool) -> None:
    options, exempt = NETS[name]
    model = SimtModel(LegoBackbone(BackboneConfig(name=name, options=options)), {}, {})
    optimizer = OptimizerConfig(name="adamw", weight_decay=0.1, norm_decay=norm_decay)
    groups = build_optimizer(model, RunConfig(output="", steps=1, optimizer=optimizer)).param_groups
    rates = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    for parameter_name, parameter in model.named_parameters():
        spared = parameter.dim() <= 1 or parameter_name.rsplit(".", 1)[-1] in exempt
        assert rates[parameter] == (0.0 if spared and not norm_decay else 0.1), parameter_name
