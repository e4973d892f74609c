# ruff: noqa: C408 - mm configurations are written with dict(...)
"""GPPF-R50's Objects365 task: mmdet's Faster R-CNN with large-scale jitter."""

_base_ = ["./lsj_objects365.py", "mmdet::_base_/models/faster-rcnn_r50_fpn.py"]

model = dict(roi_head=dict(bbox_head=dict(num_classes=365)))
