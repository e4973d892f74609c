# ruff: noqa: C408 - mm configurations are written with dict(...)
"""GPPF-R50's Open Images task: mmdet's Faster R-CNN with large-scale jitter and the score threshold of mmdet's own."""

_base_ = ["./lsj_openimages.py", "mmdet::_base_/models/faster-rcnn_r50_fpn.py"]

model = dict(roi_head=dict(bbox_head=dict(num_classes=500)), test_cfg=dict(rcnn=dict(score_thr=0.01)))
