"""ADE20K as in GPPF (section 4.1): mmseg's own UPerNet, with an auxiliary FCN head on Res4, and mmseg's settings.

Nothing differs from mmseg's configuration; evaluation takes whole images. Batch normalisation of the heads is local to
a device (their SyncBN becomes BN), for which device runs them changes with every step.
"""

# Spelt out, as mmengine takes "mmseg::" for a package called mmsegmentation, which need not be the one installed.
_base_ = (
    __import__("importlib.util").util.find_spec("mmseg").submodule_search_locations[0] + "/.mim/configs/"
    "upernet/upernet_r50_4xb4-160k_ade20k-512x512.py"
)
