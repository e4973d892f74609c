# ruff: noqa: C408 - mm configurations are written with dict(...)
"""A narrow Mask R-CNN for small objects (24 to 64 px in images of 128 px), made for the demo and for tests.

The backbone is a placeholder: gppf_ds replaces it. No flip: the demo's objects are digits.
"""

from typing import Any

size = (128, 128)
classes = 10

roi_sampler: dict[str, Any] = dict(type="RandomSampler", pos_fraction=0.5, neg_pos_ub=-1)
loss_bbox: dict[str, Any] = dict(type="L1Loss", loss_weight=1.0)


def roi_extractor(output_size: int) -> dict[str, Any]:
    return dict(
        type="SingleRoIExtractor",
        roi_layer=dict(type="RoIAlign", output_size=output_size, sampling_ratio=2),
        out_channels=64,
        featmap_strides=[4, 8, 16, 32],
        finest_scale=28,
    )


def assigner(pos: float, neg: float, low: float) -> dict[str, Any]:
    return dict(
        type="MaxIoUAssigner",
        pos_iou_thr=pos,
        neg_iou_thr=neg,
        min_pos_iou=low,
        match_low_quality=True,
        ignore_iof_thr=-1,
    )


proposals: dict[str, Any] = dict(nms_pre=200, max_per_img=100, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0)

model = dict(
    type="MaskRCNN",
    data_preprocessor=dict(
        type="DetDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_mask=True,
        pad_size_divisor=32,
    ),
    backbone=dict(type="ResNet", depth=18),
    neck=dict(type="FPN", in_channels=[64, 128, 256, 512], out_channels=64, num_outs=5),
    rpn_head=dict(
        type="RPNHead",
        in_channels=64,
        feat_channels=64,
        anchor_generator=dict(type="AnchorGenerator", scales=[4], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64]),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[1.0] * 4),
        loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0),
        loss_bbox=loss_bbox,
    ),
    roi_head=dict(
        type="StandardRoIHead",
        bbox_roi_extractor=roi_extractor(7),
        bbox_head=dict(
            type="Shared2FCBBoxHead",
            in_channels=64,
            fc_out_channels=256,
            roi_feat_size=7,
            num_classes=classes,
            bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2]),
            loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
            loss_bbox=loss_bbox,
        ),
        mask_roi_extractor=roi_extractor(14),
        mask_head=dict(
            type="FCNMaskHead",
            num_convs=2,
            in_channels=64,
            conv_out_channels=64,
            num_classes=classes,
            loss_mask=dict(type="CrossEntropyLoss", use_mask=True, loss_weight=1.0),
        ),
    ),
    train_cfg=dict(
        rpn=dict(
            assigner=assigner(0.7, 0.3, 0.3),
            sampler=dict(roi_sampler, num=64, add_gt_as_proposals=False),
            allowed_border=-1,
            pos_weight=-1,
            debug=False,
        ),
        rpn_proposal=proposals,
        rcnn=dict(
            assigner=assigner(0.5, 0.5, 0.5),
            sampler=dict(roi_sampler, num=64, add_gt_as_proposals=True),
            mask_size=28,
            pos_weight=-1,
            debug=False,
        ),
    ),
    test_cfg=dict(
        rpn=proposals,
        rcnn=dict(score_thr=0.05, nms=dict(type="nms", iou_threshold=0.5), max_per_img=50, mask_thr_binary=0.5),
    ),
)

annotations = dict(type="LoadAnnotations", with_bbox=True, with_mask=True)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    annotations,
    dict(type="Resize", scale=size, keep_ratio=True),
    dict(type="PackDetInputs"),
]
val_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=size, keep_ratio=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]

train_dataloader = dict(
    dataset=dict(
        type="CocoDataset",
        data_root="data/demo/detection",
        ann_file="train.json",
        data_prefix=dict(img="train"),
        filter_cfg=dict(filter_empty_gt=True, min_size=1),
        pipeline=train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(
        type="CocoDataset",
        data_root="data/demo/detection",
        ann_file="val.json",
        data_prefix=dict(img="val"),
        pipeline=val_pipeline,
    )
)
val_evaluator = dict(type="CocoMetric", metric=["bbox", "segm"])
