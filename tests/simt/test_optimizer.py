"""The learning rate over the steps; what decays and what does not."""

from __future__ import annotations

import pytest

from gppf_ds.backbone.lego import LegoBackbone
from gppf_ds.config import BackboneConfig, OptimizerConfig, RunConfig
from gppf_ds.errors import UserError
from gppf_ds.simt.model import SimtModel
from gppf_ds.simt.optimizer import build_optimizer, learning_rate

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


def test_the_learning_rate_warms_up_and_falls_as_a_cosine_or_by_tenths() -> None:
    def rates(**settings: object) -> list[float]:
        optimizer = OptimizerConfig(learning_rate=1.0, warmup_steps=2, **settings)  # type: ignore[arg-type]
        config = RunConfig(output="", steps=10, optimizer=optimizer)
        return [learning_rate(step, config) for step in range(10)]

    assert rates()[:3] == [0.5, 1.0, 1.0]
    assert rates()[6] == pytest.approx(0.5)
    assert rates(milestones=[5, 8]) == pytest.approx([0.5, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("milestones", [[5, 5], [8, 5], [1]])
def test_milestones_that_do_not_rise_after_the_warm_up_are_refused(milestones: list[int]) -> None:
    with pytest.raises(UserError, match=r"optimizer\.milestones must rise"):
        OptimizerConfig(warmup_steps=2, milestones=milestones)
