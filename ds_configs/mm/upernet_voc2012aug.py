"""Pascal VOC 2012 with SBD as in GPPF (section 4.1): mmseg's own UPerNet, with an auxiliary FCN head on Res4.

Its settings are mmseg's too.
"""

# Spelt out, as mmengine takes "mmseg::" for a package called mmsegmentation, which need not be the one installed.
_base_ = (
    __import__("importlib.util").util.find_spec("mmseg").submodule_search_locations[0] + "/.mim/configs/"
    "upernet/upernet_r50_4xb4-40k_voc12aug-512x512.py"
)
