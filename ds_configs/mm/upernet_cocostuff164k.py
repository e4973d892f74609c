# ruff: noqa: C408 - mm configurations are written with dict(...)
"""COCO-Stuff (164k) as in GPPF (section 4.1): UPerNet with an auxiliary FCN head on Res4.

mmseg has UPerNet for other sets and this set for other heads; here are the two together.
"""

# Spelt out, as mmengine takes "mmseg::" for a package called mmsegmentation, which need not be the one installed.
_base_ = [
    __import__("importlib.util").util.find_spec("mmseg").submodule_search_locations[0] + "/.mim/configs/_base_/" + part
    for part in (
        "models/upernet_r50.py",
        "datasets/coco-stuff164k.py",
        "default_runtime.py",
        "schedules/schedule_160k.py",
    )
]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    decode_head=dict(num_classes=171),
    auxiliary_head=dict(num_classes=171),
)
