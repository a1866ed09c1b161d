"""Networks without SAM, trained from random weights."""

from __future__ import annotations

from sam_medical.methods.method import Method, Network
from sam_medical.methods.tuners import WholeModel
from sam_medical.models.networks import deep_lab, segnet, unet, unetr

U_NET = Method("U-Net", "U-Net (arXiv:1505.04597), MONAI's", Network(unet), WholeModel(), learning_rate=2e-3)
U_NET_CLDICE = Method(
    "U-Net, clDice",
    "clDice (arXiv:2003.07311), MONAI's",
    Network(unet),
    WholeModel(),
    loss="dice-cldice",
    learning_rate=2e-3,
)
UNETR = Method("UNETR", "UNETR (arXiv:2103.10504), MONAI's", Network(unetr), WholeModel(), learning_rate=5e-4)
DEEPLAB_V3_PLUS = Method(
    "DeepLab v3+",
    "DeepLab v3+ (arXiv:1802.02611), on transformers' MobileNetV2",
    Network(deep_lab),
    WholeModel(),
    learning_rate=2e-3,
)
SEGNET = Method("SegNet", "SegNet (arXiv:1511.00561)", Network(segnet), WholeModel(), learning_rate=2e-3)
