# ruff: noqa: C408 - mm configurations are written with dict(...)
"""GPPF-SwinT's LVIS task: mmdet's Cascade R-CNN on the data of ``lsj_lvis.py``.

A configuration can only replace a list as a whole: the three stages are mmdet's but for the number of classes.
"""

_base_ = ["./lsj_lvis.py", "mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py"]

classes = 1203
stages = [dict(stage, num_classes=classes) for stage in _base_.model.roi_head.bbox_head]
model = dict(
    roi_head=dict(bbox_head=stages, mask_head=dict(num_classes=classes)),
    test_cfg=dict(rcnn=dict(score_thr=0.0001, max_per_img=300)),  # LVIS counts 300 detections per image
)
