# ruff: noqa: C408 - mm configurations are written with dict(...)
"""Data of GPPF's LVIS task: as COCO's (``lsj_coco.py``), scored by LVIS's rules; no model.

Not repeated here is mmdet's oversampling of rare classes (``ClassBalancedDataset``): GPPF balances classes in a second
stage.

The paper does not say what its loss does with the classes that nobody looked for in an image. mmdet's counts them as
absent; here box heads leave them out (``federated``, see ``gppf_ds/tasks/federated.py``). ``overrides: {federated:
false}`` in a recipe gives mmdet's loss.
"""

_base_ = "./lsj_coco.py"

federated = True

train_dataloader = dict(
    dataset=dict(
        dataset=dict(
            type="LVISV1Dataset",
            data_root="data/lvis_v1/",
            ann_file="annotations/lvis_v1_train.json",
            data_prefix=dict(img=""),
        )
    )
)
val_dataloader = dict(
    dataset=dict(
        type="LVISV1Dataset",
        data_root="data/lvis_v1/",
        ann_file="annotations/lvis_v1_val.json",
        data_prefix=dict(img=""),
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(
    _delete_=True,
    type="LVISMetric",
    ann_file="data/lvis_v1/annotations/lvis_v1_val.json",
    metric=["bbox", "segm"],
)
test_evaluator = val_evaluator
