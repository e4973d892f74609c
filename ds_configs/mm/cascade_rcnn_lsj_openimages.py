# ruff: noqa: C408 - mm configurations are written with dict(...)
"""GPPF-SwinT's Open Images task: mmdet's Cascade R-CNN on the data of ``lsj_openimages.py``.

A configuration can only replace a list as a whole: the three stages are mmdet's but for the number of classes.
"""

from typing import Any

_base_ = ["./lsj_openimages.py", "mmdet::_base_/models/cascade-rcnn_r50_fpn.py"]

classes = 500


def stage(x: float, y: float) -> dict[str, Any]:
    return dict(
        type="Shared2FCBBoxHead",
        in_channels=256,
        fc_out_channels=1024,
        roi_feat_size=7,
        num_classes=classes,
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[x, x, y, y]),
        reg_class_agnostic=True,
        loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
        loss_bbox=dict(type="SmoothL1Loss", beta=1.0, loss_weight=1.0),
    )


stages = [stage(0.1, 0.2), stage(0.05, 0.1), stage(0.033, 0.067)]
model = dict(roi_head=dict(bbox_head=stages), test_cfg=dict(rcnn=dict(score_thr=0.01)))
