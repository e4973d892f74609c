# ruff: noqa: C408 - mm configurations are written with dict(...)
"""Large-scale jitter to 1024 (Ghiasi et al., arXiv 2012.07177): resize by 0.1 to 2.0, crop, pad."""

jitter_size = (1024, 1024)
jitter = [
    dict(type="RandomResize", scale=jitter_size, ratio_range=(0.1, 2.0), keep_ratio=True),
    dict(
        type="RandomCrop",
        crop_type="absolute_range",
        crop_size=jitter_size,
        recompute_bbox=True,
        allow_negative_crop=True,
    ),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(1e-2, 1e-2)),
    dict(type="RandomFlip", prob=0.5),
    dict(type="Pad", size=jitter_size),
]
