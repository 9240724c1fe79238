"""The classifier layer of a network: find it, take it off, fill it.

A student's feature map and head are linear and fold into one layer; the plain network with that layer filled gives
the same logits.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from darht.core.errors import ModelError
from darht.core.nets.build import accepts_num_classes, build

# Any count will do for a layer that is removed at once; 7 is no width that a hidden layer has.
_PROBE_CLASSES = 7


class Backbone(NamedTuple):
    """A network without its classifier: `module` maps normalised pixels `[B, 3, H, W]` to `[B, num_features]`."""

    module: nn.Module
    num_features: int


def head_name(model: nn.Module, num_classes: int) -> str:
    """The dotted name of the classifier layer.

    A timm model is asked (`get_classifier`); elsewhere it is the last linear layer or 1x1 convolution, in order of
    registration, with `num_classes` outputs.

    Raises:
        ModelError: no layer fits.
    """
    name = _find(model, num_classes)
    if name is None:
        raise ModelError(
            f"the classifier must be a linear layer or a 1x1 convolution with {num_classes} outputs;"
            f" {type(model).__name__} has none: check the class count and the architecture"
        )
    return name


def find_head(model: nn.Module, num_classes: int | None) -> tuple[str, int] | None:
    """Name and outputs of the classifier layer with `num_classes` outputs (any number if None); None without one."""
    name = _find(model, num_classes)
    return None if name is None else (name, _sizes(model.get_submodule(name))[1])


def backbone(arch: str, kwargs: Mapping[str, Any] | None = None) -> Backbone:
    """Build `arch` with its classifier replaced by the identity.

    Its parameter names are those of `build`: its state, plus `weight` and `bias` of the head, is `build`'s state.

    Raises:
        ConfigError: `arch` has no known form.
        ModelError: the architecture is unknown, refuses an option, has no classifier layer, or an activation after it.
    """
    module = build(arch, _PROBE_CLASSES, kwargs)
    name = _find(module, _PROBE_CLASSES if accepts_num_classes(arch) else None)
    if name is None:
        raise ModelError(f"{arch} has no single linear layer or 1x1 convolution as its classifier; choose another")
    activation = _activation_after(module, name)
    if activation is not None:
        raise ModelError(
            f"{arch} puts {activation} after its classifier '{name}', so that what stands behind the features is not "
            "linear and no student on it folds into a plain network; choose another architecture"
        )
    num_features = _sizes(module.get_submodule(name))[0]
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, nn.Identity())
    return Backbone(module, num_features)


def _activation_after(module: nn.Module, name: str) -> str | None:
    """The class of an activation that a Sequential runs after its member `name` (squeezenet: a ReLU), or None.

    What a `forward` of its own does after the layer is not seen here.
    """
    parts = name.split(".")
    for depth, child in enumerate(parts):
        parent = module.get_submodule(".".join(parts[:depth]))
        if isinstance(parent, nn.Sequential):
            names = list(parent._modules)
            later = list(parent)[names.index(child) + 1 :]
            found = [
                type(layer).__name__ for layer in later if type(layer).__module__ == nn.modules.activation.__name__
            ]
            if found:
                return found[0]
    return None


def fold_head(plain: nn.Module, name: str, weight: Tensor, bias: Tensor) -> None:
    """Copy `weight` `[C, D]` and `bias` `[C]` into the layer `name` of `plain`, in place.

    Raises:
        ModelError: no such layer, a layer that is no classifier with a bias, or other sizes; nothing is copied then.
    """
    layer = dict(plain.named_modules()).get(name)
    if not isinstance(layer, nn.Linear | nn.Conv2d) or not _is_classifier(layer, None):
        raise ModelError(f"'{name}' must be a linear layer or a 1x1 convolution; it is {type(layer).__name__}")
    if layer.bias is None:
        raise ModelError(f"'{name}' must have a bias to hold the folded one; build the network with one")
    features, classes = _sizes(layer)
    if weight.shape != (classes, features) or bias.shape != (classes,):
        raise ModelError(
            f"'{name}' takes weight {[classes, features]} and bias {[classes]};"
            f" got {list(weight.shape)} and {list(bias.shape)}"
        )
    with torch.no_grad():
        layer.weight.copy_(weight.reshape(layer.weight.shape))
        layer.bias.copy_(bias)


def folded(head: tuple[Tensor, Tensor], mapped: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Weight `[C, D]` and bias `[C]` of the one layer that does what a feature map and a head on it do.

    `W = W_head W_map` and `b = W_head b_map + b_head`; products are taken in float64.

    Args:
        head: weight and bias.
        mapped: those of the map, or None where there is none.
    """
    weight, bias = head[0].double(), head[1].double()
    if mapped is not None:
        bias = weight @ mapped[1].double() + bias
        weight = weight @ mapped[0].double()
    return weight.to(head[0].dtype), bias.to(head[1].dtype)


def _find(model: nn.Module, num_classes: int | None) -> str | None:
    """The name of the classifier with `num_classes` outputs (any number if None), or None."""
    layers = [(name, layer) for name, layer in model.named_modules() if name and _is_classifier(layer, num_classes)]
    ask = getattr(model, "get_classifier", None)
    if callable(ask):
        told = ask()
        layers = [(name, layer) for name, layer in layers if layer is told]
    return layers[-1][0] if layers else None


def _is_classifier(layer: nn.Module, num_classes: int | None) -> bool:
    pointwise = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1
    if not pointwise and not isinstance(layer, nn.Linear):
        return False
    return num_classes is None or _sizes(layer)[1] == num_classes


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer or convolution."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    assert isinstance(layer, nn.Conv2d)
    return layer.in_channels, layer.out_channels
