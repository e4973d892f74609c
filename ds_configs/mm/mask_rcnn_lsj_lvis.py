# ruff: noqa: C408 - mm configurations are written with dict(...)
"""GPPF-R50's LVIS task: the model of ``mask_rcnn_lsj_coco.py`` with LVIS's classes and limits."""

_base_ = ["./lsj_lvis.py", "mmdet::_base_/models/mask-rcnn_r50_fpn.py"]

norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    neck=dict(norm_cfg=norm_cfg),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=dict(type="Shared4Conv1FCBBoxHead", conv_out_channels=256, norm_cfg=norm_cfg, num_classes=1203),
        mask_head=dict(norm_cfg=norm_cfg, num_classes=1203),
    ),
    test_cfg=dict(rcnn=dict(score_thr=0.0001, max_per_img=300)),  # LVIS counts 300 detections per image
)
