"""Models of timm and torchvision with the weights that their makers published."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from darht.core.errors import ModelError
from darht.core.preprocessing import Preprocessing
from darht.core.vision import torchvision


def pretrained(text: str, kwargs: Mapping[str, Any]) -> tuple[nn.Module, Preprocessing, int]:
    """The network behind `timm:NAME` or `torchvision:NAME`, its own preprocessing, and its class count.

    The weights come from the library's own cache on this machine, or over the network.

    Raises:
        ModelError: no such model, or its weights cannot be had.
    """
    library, _, name = text.partition(":")
    loader = _timm if library == "timm" else _torchvision
    try:
        return loader(name, dict(kwargs))
    except Exception as error:  # libraries fail in their own ways: unknown names, no network, refused options
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(
            f"{text} cannot be had with its published weights ({reason}); weights in a file are evaluated with "
            f"darht-eval FILE --arch {text} --data NAME"
        ) from error


def _timm(name: str, kwargs: dict[str, Any]) -> tuple[nn.Module, Preprocessing, int]:
    torchvision()  # first, because timm imports it as well
    import timm

    net = timm.create_model(name, pretrained=True, **kwargs)
    config = net.pretrained_cfg
    side = int(config["input_size"][-1])
    return net, Preprocessing(side, tuple(config["mean"]), tuple(config["std"])), int(net.num_classes)


def _torchvision(name: str, kwargs: dict[str, Any]) -> tuple[nn.Module, Preprocessing, int]:
    models = torchvision().models
    weights = models.get_model_weights(name).DEFAULT
    net = models.get_model(name, weights=weights, **kwargs)
    seen = weights.transforms()
    side = int(seen.crop_size[0])
    return net, Preprocessing(side, tuple(seen.mean), tuple(seen.std)), len(weights.meta["categories"])
