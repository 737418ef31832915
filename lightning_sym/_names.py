"""Names of tensors and modules as their author wrote them."""

from __future__ import annotations

#: What compilation, sharding and activation checkpointing put between the parts of a name.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def clean_name(name: str) -> str:
    """Return a module's or tensor's name without what wrappers put into it.

    ``DistributedDataParallel``'s ``module.`` stays: by its name it can't be told from a module of the
    user's that is called so.

    Example:
        >>> clean_name("net._orig_mod.0._fsdp_wrapped_module.weight")
        'net.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
