"""Networks without SAM, trained from nothing."""

from __future__ import annotations

from sam_medical.methods.method import Method

U_NET = Method("U-Net", "U-Net (arXiv:1505.04597), MONAI's", network="u-net", learning_rate=2e-3)


U_NET_CLDICE = Method(
    "U-Net, clDice", "clDice (arXiv:2003.07311), MONAI's", network="u-net", loss="dice-cldice", learning_rate=2e-3
)


UNETR = Method("UNETR", "UNETR (arXiv:2103.10504), MONAI's", network="unetr", learning_rate=5e-4)


DEEPLAB_V3_PLUS = Method(
    "DeepLab v3+",
    "DeepLab v3+ (arXiv:1802.02611), on transformers' MobileNetV2",
    network="deeplab-v3-plus",
    learning_rate=2e-3,
)


SEGNET = Method("SegNet", "SegNet (arXiv:1511.00561)", network="segnet", learning_rate=2e-3)
