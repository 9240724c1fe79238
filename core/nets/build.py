"""From the name of an architecture to a network with random weights."""

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn

from darht.core.errors import ConfigError, DarhtError, ModelError
from darht.core.nets.deepmind import DMPreActResNet, DMWideResNet
from darht.core.nets.layers import check_positive
from darht.core.nets.mobilenet import MobileNetV2
from darht.core.nets.preact import PreActResNet
from darht.core.nets.resnet import ResNet
from darht.core.nets.wideresnet import WideResNet
from darht.core.nets.xcit import SIZES, xcit_p4
from darht.core.vision import torchvision

Factory = Callable[..., Any]
_FETCHING = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay")  # what timm finds weights by
_OWN: dict[str, Factory] = {
    "resnet18": ResNet,
    "resnet34": partial(ResNet, blocks=(3, 4, 6, 3)),
    "resnet50": partial(ResNet, blocks=(3, 4, 6, 3), bottleneck=True),
    "preact_resnet18": PreActResNet,
    "dm-preact-resnet18": DMPreActResNet,
    "mobilenetv2": MobileNetV2,
    **{f"xcit-{size}-p4": partial(xcit_p4, width=width, heads=heads) for size, (width, heads) in SIZES.items()},
}
_WIDE: dict[str, Factory] = {"wrn": WideResNet, "dm-wrn": DMWideResNet}
_FORMS = (
    "resnet18, resnet34, resnet50, preact_resnet18, wrn-D-W, dm-wrn-D-W, dm-preact-resnet18, xcit-s12-p4, xcit-m12-p4, "
    "xcit-l12-p4, mobilenetv2, timm:NAME, torchvision:NAME or python:package.module:callable"
)


def build(arch: str, num_classes: int, kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """Build a network with random weights, drawn from torch's global generator; nothing is downloaded.

    Args:
        arch: `resnet18`, `resnet34`, `resnet50`, `preact_resnet18`, `wrn-D-W`, `mobilenetv2` (CIFAR form),
            `dm-wrn-D-W`, `dm-preact-resnet18` (DeepMind's), `xcit-s12-p4`, `xcit-m12-p4`, `xcit-l12-p4`, `timm:NAME`,
            `torchvision:NAME`, or `python:package.module:callable`, which gets `num_classes` if its signature accepts
            it.
        num_classes: C, the length of a row of logits.
        kwargs: options of the architecture, such as `width` of `resnet18` or `img_size` of a timm ViT.

    Returns:
        A module from normalised pixels `[B, 3, H, W]` to raw logits `[B, C]`, in train mode unless a `python:`
        callable decided otherwise.

    Raises:
        ConfigError: `arch` has none of the forms above.
        ModelError: the architecture is unknown, or refuses an option.
    """
    check_positive("num_classes", num_classes)
    options = dict(kwargs or {})
    factory, reserved = _factory(arch)
    taken = sorted(reserved & options.keys())
    if taken:
        raise ModelError(f"{arch}: {', '.join(taken)} cannot be set in kwargs because darht sets it; remove it there")
    if arch.startswith(("timm:", "torchvision:")) and (
        odd := [key for key, value in options.items() if not _plain(value)]
    ):
        raise ModelError(
            f"{arch}: kwargs are numbers, texts, lists and mappings of these; {', '.join(map(str, odd))} is not"
        )
    if _accepts(factory, "num_classes"):
        options["num_classes"] = num_classes
    return _call(arch, factory, options)


def _plain(value: object) -> bool:
    """Whether a value is what JSON holds, so that no option of a library is code."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def accepts_num_classes(arch: str) -> bool:
    """Whether the class count of `arch` can be chosen: always, except for `python:` callables that fix their own.

    Raises:
        ConfigError: `arch` has no known form.
        ModelError: the architecture is unknown.
    """
    return _accepts(_factory(arch)[0], "num_classes")


def _factory(arch: str) -> tuple[Factory, set[str]]:
    """The callable behind `arch`, and the keywords that are not the user's to set."""
    prefix, separator, name = arch.partition(":")
    if not separator:
        return _own(arch), {"num_classes"}
    if prefix not in ("timm", "torchvision", "python") or not name:
        raise ConfigError(f"an architecture reads {_FORMS}; got '{arch}'")
    if prefix == "timm":
        return _timm(name), {"num_classes", *_FETCHING, "checkpoint_path", "cache_dir"}
    if prefix == "torchvision":
        return _torchvision(name), {"num_classes", "pretrained", "weights", "weights_backbone"}
    return _python(name), {"num_classes"}


def _own(arch: str) -> Factory:
    if arch in _OWN:
        return _OWN[arch]
    if match := re.fullmatch(r"((?:dm-)?wrn)-([0-9]+)-([0-9]+)", arch):
        return partial(_WIDE[match[1]], int(match[2]), int(match[3]))
    close = difflib.get_close_matches(arch, [*_OWN, "wrn-28-10", "wrn-34-10", "dm-wrn-28-10", "dm-wrn-70-16"], n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    raise ModelError(f"unknown architecture '{arch}'{hint} (an architecture reads {_FORMS})")


def _timm(name: str) -> Factory:
    torchvision()  # first, because timm imports it as well
    import timm

    # A tag after the dot names pretrained weights; hf_hub: names, which would need the network, are not models here.
    if not timm.is_model(name):
        raise ModelError(f"timm has no model '{name}'; {_nearest(name, timm.list_models())}")
    return partial(timm.create_model, name, pretrained=False)


def _torchvision(name: str) -> Factory:
    models = torchvision().models
    known = models.list_models(module=models)
    if name not in known:
        raise ModelError(f"torchvision has no classifier '{name}'; {_nearest(name, known)}")
    return partial(models.get_model, name, weights=None)


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"the nearest names are {', '.join(close)}" if close else "no known name is near it"


def _python(path: str) -> Factory:
    module_name, _, name = path.partition(":")
    if not module_name or not name or ":" in name:
        raise ConfigError(f"a Python architecture reads python:package.module:callable; got 'python:{path}'")
    torchvision()  # first, because the module may import it, or timm, which does
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's: whatever it raises while it loads is the answer
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelError(f"cannot import '{module_name}' ({reason}); install it or put it on PYTHONPATH") from error
    function: Factory | None = getattr(module, name, None)
    if not callable(function):
        near = _nearest(name, (key for key, value in vars(module).items() if callable(value)))
        raise ModelError(f"module '{module_name}' has no callable '{name}'; {near}")
    return function


def _call(arch: str, factory: Factory, options: dict[str, Any]) -> nn.Module:
    unknown = sorted(str(key) for key in options if not _accepts(factory, key))
    if unknown:
        known = [key for key in inspect.signature(factory).parameters if key != "num_classes"]
        raise ModelError(f"{arch} does not know {', '.join(unknown)}; its kwargs are {', '.join(known) or 'none'}")
    try:
        model = factory(**options)
    except DarhtError:
        raise
    except Exception as error:  # timm, torchvision and user code refuse options in their own ways
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelError(f"{arch} cannot be built with {options}: {reason}; change its kwargs") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{arch} must return a torch.nn.Module; it returned {type(model).__name__}")
    return model


def _accepts(factory: Factory, keyword: str) -> bool:
    """Whether `factory(keyword=...)` fits the signature; a callable without one takes whatever it is given."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return keyword != "num_classes"
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return True
    return keyword in parameters and parameters[keyword].kind in by_name
