# ruff: noqa: C408 - mm configurations are written with dict(...)
"""Data of GPPF's COCO task (arXiv 2208.02148, section 4.1): large-scale jitter to 1024 and Copy-Paste, no model.

mmdet's own Copy-Paste configuration jitters by 0.8 to 1.25; large-scale jitter (Ghiasi et al., arXiv 2012.07177) goes
from 0.1 to 2.0.
"""

_base_ = ["mmdet::common/ssj_scp_270k_coco-instance.py", "./lsj.py"]

load_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    *_base_.jitter,
]
train_dataloader = dict(dataset=dict(dataset=dict(pipeline=load_pipeline)))
