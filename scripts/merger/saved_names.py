"""What transformers would save a model's tensors as: which names, and which elements of which tensors.

transformers 5 fuses and renames tensors when it loads a model, and reverts that when it saves one
(`core_model_loading.revert_weight_conversion`). Its own code is run here on tensors without data that note where their
elements come from, so every family that it knows is known here, and an operation that does more than to move elements
is named. Runs in the child process of `model_check`: it needs torch and transformers.
"""
import contextlib
import traceback
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from merger.lattice import Lattice, cut, row_major

aten = torch.ops.aten
Places = list[tuple[str, Lattice]]  # a tensor's elements (here) by the tensor of the checkpoint that has them (there)
COPIES = (aten.clone, aten.detach, aten.alias)
VIEWS = (aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias, aten.unsqueeze, aten.squeeze, aten.slice,
         aten.narrow, aten.select, aten.split, aten.split_with_sizes, aten.chunk, aten.unbind, aten.transpose, aten.t,
         aten.permute, aten.movedim, aten.as_strided)  # yapf: disable


class Unknown(Exception):
    """An operation is not one that only moves elements."""


class Traced(torch.Tensor):
    """A tensor without data, row-major, of which each element's origin is known."""
    places: Places

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: Any, places: Places) -> "Traced":
        made: Traced = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=torch.device("meta"))
        made.places = places
        return made

    def __init__(self, *_: Any) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore
        packet = operation.overloadpacket
        if packet in (aten.cat, aten.stack):
            return _joined(packet is aten.stack, *args, **(kwargs or {}))
        if packet not in VIEWS and packet not in COPIES:
            raise Unknown(str(operation))
        source = args[0]
        plain = torch.empty(source.shape, dtype=source.dtype, device="meta")
        found = operation(plain, *args[1:], **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            return _viewed(source, found, operation)
        return type(found)(_viewed(source, one, operation) for one in found)


@lru_cache(1 << 14)
def _block(lattice: Lattice, shape: tuple[int, ...], start: tuple[int, ...], extent: tuple[int, ...],
           steps: tuple[int, ...]) -> tuple[Lattice, ...]:  # layers are alike
    return tuple(cut(lattice, shape, start, extent, steps))


def _viewed(source: Traced, view: Any, operation: Any) -> Traced:
    """Return the tensor that `view` is of a row-major tensor in `source`'s place."""
    if view.is_contiguous() and view.numel() == source.numel():
        return Traced(view.shape, source.dtype, source.places)
    steps = row_major(source.shape)
    start, rest = [], view.storage_offset()
    for step in steps:
        index, rest = divmod(rest, max(step, 1))
        start.append(index)
    extent, new = [1] * len(steps), [0] * len(steps)
    for count, stride, step in zip(view.shape, view.stride(), row_major(view.shape), strict=True):
        dim = next((d for d, n in enumerate(source.shape) if steps[d] == stride and n > 1), None)
        if count != 1 and (dim is None or extent[dim] != 1):
            raise Unknown(str(operation))
        if count != 1 and dim is not None:
            extent[dim], new[dim] = count, step
    places = [(name, part) for name, lattice in source.places
              for part in _block(lattice, tuple(source.shape), tuple(start), tuple(extent), tuple(new))]
    return Traced(view.shape, source.dtype, places)


def _joined(stacked: bool, tensors: Sequence[Traced], dim: int = 0) -> Traced:
    if stacked:
        tensors = [tensor.unsqueeze(dim) for tensor in tensors]  # type: ignore[misc]
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise Unknown("a sum of tensors of different types")
    shape = list(torch.cat([torch.empty(tensor.shape, device="meta") for tensor in tensors], dim).shape)
    steps = row_major(shape)
    places: Places = []
    before = 0
    for tensor in tensors:
        for name, lattice in tensor.places:
            for part in _block(lattice, tuple(tensor.shape), (0, ) * len(shape), tuple(tensor.shape), steps):
                places.append((name, part._replace(here=part.here + before * steps[dim])))
        before += tensor.shape[dim]
    return Traced(shape, tensors[0].dtype, places)


def saved_as(model: Any, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return the fields of a `Verdict` that say what `model` saves those of `shapes` as that it has in memory.

    They are `in_memory`, the names that are not saved as they are; `on_disk`, what is saved in their place, by name: the
    name of one of them, or (shape, places); and `unsaved`, why the way back is not known, or empty.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 saves what it holds
        return {}
    held = {
        name: Traced(shapes[name], torch.float32, [(name, _whole(shapes[name]))])
        for name in model.state_dict() if name in shapes
    }
    try:
        saved = revert_weight_conversion(model, dict(held))
        return _changed(held, saved)
    except Exception as error:  # of the mapping's own kinds
        found = " ".join(str(error).split())[:120]
        return {"unsaved": f"{_operation(error)} ({type(error).__name__}: {found})"}


def _whole(shape: Sequence[int]) -> Lattice:
    count = 1
    for extent in shape:
        count *= extent
    return Lattice(0, 0, ((count, 1, 1), ))


def _changed(held: Mapping[str, Traced], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields for what is in `held` and `saved` as something else.

    Raises:
        Unknown: an element of the checkpoint would be in no file, or a file's in no checkpoint.
    """
    on_disk: dict[str, Any] = {}
    taken: dict[str, int] = dict.fromkeys(held, 0)
    changed: dict[str, None] = {}
    for name, tensor in saved.items():
        if not isinstance(tensor, Traced):
            raise Unknown(f"{name} is not made of the checkpoint's tensors")
        for source, lattice in tensor.places:
            taken[source] += lattice.numel
        if sum(lattice.numel for _, lattice in tensor.places) != tensor.numel():
            raise Unknown(f"{name} is not made of the checkpoint's tensors alone")
        sources = list(dict.fromkeys(source for source, _ in tensor.places))
        same = len(sources) == 1 and tensor.places == held[sources[0]].places and tensor.shape == held[sources[0]].shape
        if same and sources[0] == name:
            continue
        changed.update(dict.fromkeys(sources))
        on_disk[name] = sources[0] if same else [list(tensor.shape), tensor.places]
    for name, tensor in held.items():
        if taken[name] != tensor.numel():
            raise Unknown(f"of {name} {taken[name]} of {tensor.numel()} elements would be saved")
    return {"in_memory": [name for name in held if name in changed], "on_disk": on_disk}


def _operation(error: BaseException) -> str:
    """Return the name of the mapping's operation that raised `error`, as far as that is known."""
    with contextlib.suppress(ImportError):
        from transformers.core_model_loading import ConversionOps
        owners = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
        found = [type(owner).__name__ for owner in owners if isinstance(owner, ConversionOps)]
        if found:
            return found[-1]
    return "its mapping"
