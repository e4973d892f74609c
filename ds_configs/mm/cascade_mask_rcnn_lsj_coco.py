"""GPPF-SwinT's COCO task: mmdet's Cascade R-CNN on the data of ``lsj_coco.py``."""

_base_ = ["./lsj_coco.py", "mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py"]
