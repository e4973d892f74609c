# ruff: noqa: C408 - mm configurations are written with dict(...)
"""GPPF-SwinT's Open Images task: mmdet's Cascade R-CNN on the data of ``lsj_openimages.py``.

A configuration can only replace a list as a whole: the three stages are mmdet's but for the number of classes.
"""

_base_ = ["./lsj_openimages.py", "mmdet::_base_/models/cascade-rcnn_r50_fpn.py"]

classes = 500
stages = [dict(stage, num_classes=classes) for stage in _base_.model.roi_head.bbox_head]
model = dict(roi_head=dict(bbox_head=stages), test_cfg=dict(rcnn=dict(score_thr=0.01)))
