# ruff: noqa: C408 - mm configurations are written with dict(...)
"""GPPF-R50's COCO task: Mask R-CNN with 4 convolutions in box and mask head, large-scale jitter and Copy-Paste."""

_base_ = ["./lsj_coco.py", "mmdet::_base_/models/mask-rcnn_r50_fpn.py"]

norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    neck=dict(norm_cfg=norm_cfg),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=dict(type="Shared4Conv1FCBBoxHead", conv_out_channels=256, norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)
