# ruff: noqa: C408 - mm configurations are written with dict(...)
"""RetinaNet on COCO as detectors on window transformers are trained: multi-scale images, half of them cropped first.

The sizes are DETR's (arXiv 2005.12872, section 4): shorter side 480 to 800, longer side at most 1333; crops of 384 to
600 pixels out of images of 400 to 600. The head is mmdet's own, with the anchors and losses of arXiv 1708.02002.
"""

_base_ = ["mmdet::_base_/models/retinanet_r50_fpn.py", "mmdet::_base_/datasets/coco_detection.py"]

resize = dict(type="RandomChoiceResize", scales=[(side, 1333) for side in range(480, 801, 32)], keep_ratio=True)
crop = [
    dict(type="RandomChoiceResize", scales=[(400, 4200), (500, 4200), (600, 4200)], keep_ratio=True),
    dict(type="RandomCrop", crop_type="absolute_range", crop_size=(384, 600), allow_negative_crop=True),
]
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True),
            dict(type="RandomFlip", prob=0.5),
            dict(type="RandomChoice", transforms=[[resize], [*crop, resize]]),
            dict(type="PackDetInputs"),
        ]
    )
)
