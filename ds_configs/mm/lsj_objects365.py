# ruff: noqa: C408 - mm configurations are written with dict(...)
"""Data of GPPF's Objects365 task: mmdet's Objects365 v2 with large-scale jitter to 1024; no model."""

_base_ = ["mmdet::_base_/datasets/objects365v2_detection.py", "./lsj.py"]

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    *_base_.jitter,
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
