"""Data sets inside the wrappers of a configuration."""

from __future__ import annotations

from pathlib import Path

from gppf_ds.tasks.detection import Detection
from gppf_ds.tasks.openmm import leaf_dataset, leaf_datasets


def test_use_data_reaches_every_data_set_inside_wrappers(tmp_path: Path) -> None:
    parts = [{"type": "CocoDataset", "data_root": f"data/{name}", "ann_file": "a.json"} for name in ("a", "b")]
    joined = {"type": "ConcatDataset", "datasets": parts}
    overrides = {
        "train_dataloader.dataset": {"_delete_": True, "type": "RepeatDataset", "times": 2, "dataset": joined},
        "val_dataloader.dataset": {"_delete_": True, **joined},
    }
    task = Detection("faster-rcnn_r50_fpn_1x_coco.py", batch_size=2, overrides=overrides)
    assert task.data_folder() == Path("data/a")
    assert [leaf.data_root for leaf in leaf_datasets(task.cfg.train_dataloader.dataset)] == ["data/a", "data/b"]
    task.use_data(tmp_path)
    for split in ("train", "val"):
        dataset = task.cfg[f"{split}_dataloader"].dataset
        leaves = list(leaf_datasets(dataset))
        assert [leaf.data_root for leaf in leaves] == [str(tmp_path)] * 2
        assert [leaf.get("test_mode", False) for leaf in leaves] == [split == "val"] * 2
        assert leaf_dataset(dataset) is leaves[0]
        assert "data_root" not in dataset
    assert task.data_folder() == tmp_path
