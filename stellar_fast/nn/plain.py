"""Whether a module is what this package built, so that a faster way to its result may leave its call out."""

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` does what `kind` does with its `weight` and `bias`, and nothing else.

    Then those may be read, and options be given that `kind` alone knows. It is not so of a module with hooks, of one
    that wraps another or takes its place (adapters, quantisation, a subclass with a forward of its own), of a pruned
    one, nor of one whose weight is a tensor of another kind: such a module has to be called. A parametrized one is
    plain, since its `weight` is what it multiplies.
    """
    return (
        isinstance(module, kind)
        and type(module).forward is kind.forward
        and "forward" not in vars(module)
        and not wraps_tensors(module._parameters.get("weight"))
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not (hooks._has_any_global_hook() and _a_global_hook_acts())
    )


def is_watched(module: nn.Module) -> bool:
    """Whether a hook may see, and keep, what the parts of `module` pass on; a compiler knows that for itself.

    A hook on `module` itself sees what goes in and what comes out alone.
    """
    if torch.compiler.is_compiling():
        return False
    return bool(hooks._has_any_global_hook()) or any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in module.modules()
        if m is not module
    )


def wraps_tensors(weight: Tensor | None) -> bool:
    """Whether a weight is of one of torch's kinds of tensors that consist of others: sharded, quantised."""
    return type(weight) not in (nn.Parameter, Tensor) and is_traceable_wrapper_subclass(weight)


def _a_global_hook_acts() -> bool:
    """Whether any of the hooks on all modules is more than torch's FlopCounterMode, which is to count what runs."""
    from torch.utils.module_tracker import ModuleTracker

    return any(
        not isinstance(getattr(hook, "__self__", None), ModuleTracker)
        for registered in (
            hooks._global_forward_hooks,
            hooks._global_forward_pre_hooks,
            hooks._global_backward_hooks,
            hooks._global_backward_pre_hooks,
        )
        for hook in registered.values()
    )


def input_dtype(module: nn.Module, x: Tensor) -> torch.dtype:
    """What `module` multiplies with, whatever it is made of: the dtype of its first floating parameter, else x's."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), x.dtype)
