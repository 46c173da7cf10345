"""Copy a module of the user for adoption: in evaluation mode, in float32 on the CPU, without wrappers."""

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from models.artifact import copy_script
from training.adoption.scripted import Interpreted
from training.errors import AdoptionError

LIGHTNING_REFERENCES = ("_trainer", "trainer", "_fabric")  # to data loaders and processes, which are not copied
MAX_BYTES = 1 << 30  # of all weights; an artifact may have 4 GiB


def copy_module(module: nn.Module, *, as_float32: bool = True) -> nn.Module:
    """Return a copy of `module` in evaluation mode, on the CPU. The module itself does not change.

    The copy has no wrappers (DataParallel, torch.compile) and no parametrisations (weight norm, spectral norm).

    Args:
        as_float32: whether to convert the weights of the copy to float32.

    Raises:
        AdoptionError: the module cannot be copied, is too large, or has a weight that is not finite.
    """
    if not isinstance(module, nn.Module):
        raise AdoptionError(f"expected a torch.nn.Module to adopt, got {type(module).__name__}")
    module = _unwrap(module)
    _check_weights(module)
    found = _copy(module).eval()
    for parameter in found.parameters():
        parameter.requires_grad_(False)
    _remove_parametrisations(found)
    found = found.cpu()
    if as_float32:
        found = found.float()
        _convert_attributes(found)
    return Interpreted(found) if isinstance(found, torch.jit.ScriptModule) else found


def weights_of(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of `module`."""
    return [*module.parameters(), *module.buffers()]


def _unwrap(module: nn.Module) -> nn.Module:
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner  # the result of torch.compile
        else:
            return module


def _check_weights(module: nn.Module) -> None:
    names = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if (size := sum(tensor.nbytes for tensor in names.values())) > MAX_BYTES:
        raise AdoptionError(f"the module has {size:,} bytes of weights, at most {MAX_BYTES:,} can be adopted")
    for name, tensor in names.items():
        if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
            raise AdoptionError(f"the weight {name} has no shape yet: run the module on some rows before you adopt it")
        if tensor.is_complex():
            raise AdoptionError(f"the weight {name} is complex: expected real weights")
        if tensor.is_meta:
            raise AdoptionError(f"the weight {name} is on the meta device, which has no values: load the weights first")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise AdoptionError(
                f"the weight {name} has values that are not finite (NaN or infinite): load the weights of an epoch in "
                "which the training had not diverged"
            )


def _copy(module: nn.Module) -> nn.Module:
    if isinstance(module, torch.jit.ScriptModule):
        return copy_script(module)
    memo: dict[int, Any] = {}
    for each in module.modules():
        for name in LIGHTNING_REFERENCES:
            reference = each.__dict__.get(name)
            if reference is not None and not isinstance(reference, nn.Module | Tensor | str | int | float | bool):
                memo[id(reference)] = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 warns of its own .pt2 programs
            found: nn.Module = copy.deepcopy(module, memo)
    except Exception:  # noqa: BLE001 - attributes of the user may raise anything; then only the modules are copied
        found = _copy_structure(module, {})
    return found


def _copy_structure(module: nn.Module, copies: dict[int, nn.Module]) -> nn.Module:
    """Return a copy of the tree of modules with copies of all tensors. Other attributes are shared."""
    if id(module) in copies:
        return copies[id(module)]
    found = module.__class__.__new__(module.__class__)
    copies[id(module)] = found
    for name, value in module.__dict__.items():
        copied = value
        if name in ("_parameters", "_buffers"):
            copied = type(value)((key, _copy_tensor(each)) for key, each in value.items())
        elif name == "_modules":
            copied = type(value)(
                (key, None if each is None else _copy_structure(each, copies)) for key, each in value.items()
            )
        elif isinstance(value, Tensor):
            copied = value.detach().clone()
        elif name in LIGHTNING_REFERENCES:
            copied = None
        elif isinstance(value, dict | list | set):
            copied = copy.copy(value)
        found.__dict__[name] = copied
    return found


def _copy_tensor(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    copied = tensor.detach().clone()
    return nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied


def _remove_parametrisations(module: nn.Module) -> None:
    """Replace the weights that torch computes from other weights before each call by their values."""
    for each in module.modules():
        if parametrize.is_parametrized(each):
            _fix_parametrised_weights(each)
        for hook in list(each._forward_pre_hooks.values()):
            name = getattr(hook, "name", None)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                if type(hook).__name__ == "WeightNorm" and name:
                    nn.utils.remove_weight_norm(each, name)
                elif type(hook).__name__ == "SpectralNorm" and name:
                    nn.utils.remove_spectral_norm(each, name)


def _fix_parametrised_weights(module: nn.Module) -> None:
    """Replace the parametrised weights of `module` by their values.

    `parametrize.remove_parametrizations` would also delete them from the class, which the user's module shares.
    """
    with torch.no_grad():
        values = {name: getattr(module, name).detach().clone() for name in list(module.parametrizations)}  # type: ignore[arg-type]
    module.__class__ = type(module).__bases__[0]  # the class before the first parametrisation
    del module._modules["parametrizations"]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))


def _convert_attributes(module: nn.Module) -> None:
    """Move tensors that are plain attributes to the CPU, and convert those of floats to float32, like the weights."""
    for each in module.modules():
        for name, value in list(each.__dict__.items()):
            if isinstance(value, Tensor):
                moved = value.detach().cpu()
                each.__dict__[name] = moved.float() if moved.is_floating_point() else moved
