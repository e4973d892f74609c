# ruff: noqa: C408 - mm configurations are written with dict(...)
"""A narrow UPerNet for images of 128 px, made for the demo and for tests.

The backbone is a placeholder: gppf_ds replaces it. No flip: the demo's objects are digits.
"""

size = (128, 128)
classes = 3
norm = dict(type="BN", requires_grad=True)

model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=size,
    ),
    backbone=dict(type="ResNet", depth=18),
    decode_head=dict(
        type="UPerHead",
        in_channels=[64, 128, 256, 512],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=64,
        dropout_ratio=0.1,
        num_classes=classes,
        norm_cfg=norm,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=dict(
        type="FCNHead",
        in_channels=256,
        in_index=2,
        channels=64,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=classes,
        norm_cfg=norm,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=0.4),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=size, ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type="RandomCrop", crop_size=size, cat_max_ratio=0.95),
    dict(type="PackSegInputs"),
]
val_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=size, keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]


def split(name, pipeline):
    return dict(
        dataset=dict(
            type="BaseSegDataset",
            data_root="data/demo/segmentation",
            data_prefix=dict(img_path=f"images/{name}", seg_map_path=f"labels/{name}"),
            metainfo=dict(classes=[str(index) for index in range(classes)]),
            pipeline=pipeline,
        )
    )


train_dataloader = split("train", train_pipeline)
val_dataloader = split("val", val_pipeline)
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
