# ruff: noqa: C408 - mm configurations are written with dict(...)
"""Data of GPPF's Open Images task: the files of the 2019 challenge as published, large-scale jitter to 1024; no model.

mmdet's own configuration of the challenge names files of another origin (boxes as txt, hierarchy and image sizes as
pickles). Those are read too, less the pickles: see ``gppf_ds/tasks/openimages_data.py``.

The paper does not say what its loss does with the classes that nobody looked for in an image, or with "vehicle" where a
car is. mmdet's counts both as absent; here box heads leave them out (``federated``, see
``gppf_ds/tasks/federated.py``), for which the verified image labels of train are read too. ``overrides: {federated:
false}`` in a recipe gives mmdet's loss.
"""

_base_ = ["mmdet::_base_/datasets/openimages_detection.py", "./lsj.py"]

federated = True
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    *_base_.jitter,
    dict(type="PackDetInputs"),
]
challenge = dict(
    type="OpenImagesChallengeDataset",
    label_file="challenge2019/challenge-2019-classes-description-500.csv",
    hierarchy_file="challenge2019/challenge-2019-label500-hierarchy.json",
    meta_file="",
)
train_dataloader = dict(
    dataset=dict(
        **challenge,
        ann_file="challenge2019/challenge-2019-train-detection-bbox.csv",
        image_level_ann_file="challenge2019/challenge-2019-train-detection-human-imagelabels.csv",
        pipeline=train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(
        **challenge,
        ann_file="challenge2019/challenge-2019-validation-detection-bbox.csv",
        image_level_ann_file="challenge2019/challenge-2019-validation-detection-human-imagelabels.csv",
    )
)
test_dataloader = val_dataloader
