"""Read the pickle inside a `.pt` file without running any of its code.

Every name that the pickle may mention is on the allow-list below and stands for an inert record of what was pickled, so a file
written by any torch from 2.4 on reads alike under any other, and importing torch is not needed.
"""
import collections
import contextlib
import io
import pickle
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merger import MergeError

MEMORY_LIMIT = 1 << 30
DISTRIBUTED = "torch.distributed"
# Classes that verl's checkpoints mention. Their modules moved between torch 2.4 and 2.13 (`_tensor` became `tensor`,
# `_shard` stayed), so any home below torch.distributed will do.
DISTRIBUTED_NAMES = frozenset({
    "DTensor", "DTensorSpec", "TensorMeta", "ShardOrderEntry", "DeviceMesh", "_MeshLayout", "_FlatLayout", "Shard",
    "Replicate", "Partial", "_Partial", "_StridedShard", "ShardedTensor", "ShardMetadata", "ShardedTensorMetadata",
    "TensorProperties", "MEM_FORMAT_ENCODING", "EnumerableShardingSpec", "ChunkShardingSpec", "ProcessGroupState",
    "_remote_device", "ReduceOp", "RedOpType"
})
STORAGE_DTYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
DTYPES = frozenset(STORAGE_DTYPES.values()) | {"float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64"}
UNSUPPORTED = ("complex", "quint", "qint", "quantized", "bits", "float8_e", "float4_e")  # of element types


@dataclass(frozen=True)
class Storage:
    """A storage record of the archive: its key, element type and number of elements."""
    key: str
    dtype: str | None
    numel: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor as a view of a storage; offset and strides count elements."""
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str


class _Sealed(type):
    """A class that a pickle cannot alter (BUILD may set attributes of anything that it holds)."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"the pickle tries to alter {cls.__name__}")


class Record(metaclass=_Sealed):
    """An inert stand-in for a pickled object: constructor arguments and state, as they were written."""
    __slots__ = ("args", "state")
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> "Record":
        self = object.__new__(cls)
        object.__setattr__(self, "args", args)
        object.__setattr__(self, "state", {})
        return self

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        # A pickled state is a dict, or a pair of a dict (or None) and a dict of slots.
        if isinstance(state, tuple) and len(state) == 2 and all(part is None or isinstance(part, dict)
                                                                for part in state):
            state = {**(state[0] or {}), **(state[1] or {})}
        object.__setattr__(self, "state", state)

    def __setattr__(self, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"the pickle tries to set {name} of {type(self).__name__}")

    @property
    def kind(self) -> str:
        """The class's name, without its module."""
        return type(self).__name__


class Function:
    """An inert stand-in for a function that a pickle calls."""
    __slots__ = ("_call", )
    _call: Any

    def __init__(self, call: Any) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setattr__(self, name: str, value: object) -> None:
        raise pickle.UnpicklingError("the pickle tries to alter a function")


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or not all(type(n) is int and n >= 0 for n in value):
        raise pickle.UnpicklingError(f"not a shape: {value!r:.80}")
    return tuple(value)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, dtype: str | None) -> TensorRef:
    if not isinstance(storage, Storage) or type(offset) is not int or offset < 0 or dtype is None:
        raise pickle.UnpicklingError("a tensor without a proper storage")
    shape, stride = _shape(shape), _shape(stride)
    if len(shape) != len(stride):
        raise pickle.UnpicklingError(f"a tensor of shape {shape} with strides {stride}")
    return TensorRef(storage, offset, shape, stride, dtype)


def _rebuild_tensor_v2(storage: Any, offset: Any, shape: Any, stride: Any, *_rest: Any) -> TensorRef:
    return _tensor(storage, offset, shape, stride, getattr(storage, "dtype", None))


def _rebuild_tensor_v3(storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_rest:
                       Any) -> TensorRef:
    return _tensor(storage, offset, shape, stride, dtype if dtype in DTYPES else None)


def _rebuild_parameter(data: Any, *_rest: Any) -> Any:
    return data


def _rebuild_wrapper_subclass(cls: Any, dtype: Any, shape: Any, *_rest: Any) -> Record:
    if not (isinstance(cls, type) and issubclass(cls, Record)):
        raise pickle.UnpicklingError("a wrapper tensor of no known class")
    return cls(dtype, _shape(shape))


def _rebuild_from_type_v2(func: Any, _type: Any, args: Any, state: Any) -> Any:
    if not isinstance(func, Function):
        raise pickle.UnpicklingError("a tensor rebuilt by no known function")
    value = func(*args)
    if isinstance(value, Record):
        value.__setstate__(state)
    return value


def _getattr(owner: Any, name: Any) -> Any:
    """Answer the two uses of `getattr`: naming a class nested in ShardedTensor, and a member of an enumeration.

    Python names the latter so in some releases (3.11.0 to 3.11.3), and calls the enumeration with the value in others.
    """
    if owner is RECORDS["ShardedTensor"] and name == "ProcessGroupState":
        return RECORDS[name]
    if owner is RECORDS["MEM_FORMAT_ENCODING"] and isinstance(name, str):
        return owner(name)
    raise MergeError(f"looks up {name!r:.40}, which no checkpoint needs; it may run code, so it was not read")


FUNCTIONS = {
    "torch.Size": Function(_shape),
    "torch.device": Function(lambda *args: None),
    "torch.serialization._get_layout": Function(lambda *args: None),
    "torch._utils._rebuild_tensor": Function(_rebuild_tensor_v2),
    "torch._utils._rebuild_tensor_v2": Function(_rebuild_tensor_v2),
    "torch._utils._rebuild_tensor_v3": Function(_rebuild_tensor_v3),
    "torch._utils._rebuild_parameter": Function(_rebuild_parameter),
    "torch._utils._rebuild_wrapper_subclass": Function(_rebuild_wrapper_subclass),
    "torch._tensor._rebuild_from_type_v2": Function(_rebuild_from_type_v2),
    "__builtin__.getattr": Function(_getattr),
    "builtins.getattr": Function(_getattr),
    "_codecs.encode": Function(lambda text, *args: text.encode("latin1")),
}
RECORDS = {
    **{
        name: _Sealed(name, (Record, ), {"__slots__": ()})
        for name in DISTRIBUTED_NAMES
    },
    "torch.Tensor": _Sealed("Tensor", (Record, ), {"__slots__": ()}),
    "torch.storage.UntypedStorage": _Sealed("UntypedStorage", (Record, ), {"__slots__": ()}),
    "torch.nn.parameter.Parameter": _Sealed("Parameter", (Record, ), {"__slots__": ()}),
}


class _Unpickler(pickle.Unpickler):

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full == "collections.OrderedDict":
            return collections.OrderedDict
        if full in FUNCTIONS:
            return FUNCTIONS[full]
        if full in RECORDS:
            return RECORDS[full]
        if name in DISTRIBUTED_NAMES and (module == DISTRIBUTED or module.startswith(DISTRIBUTED + ".")):
            return RECORDS[name]
        if module == "torch" and name in DTYPES:
            return name
        if module == "torch" and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]
        if module == "torch" and name.lower().startswith(UNSUPPORTED):
            raise MergeError(f"has a tensor of torch.{name}, which is not supported; save the checkpoint without it")
        raise MergeError(f"mentions {full}, which no checkpoint needs; it may run code, so it was not read")

    def persistent_load(self, pid: Any) -> Storage:
        match pid:
            case ("storage", dtype, str(key), _, int(numel)) if numel >= 0:
                return Storage(key, dtype if dtype in DTYPES else None, numel)
        raise pickle.UnpicklingError(f"an unknown kind of storage: {pid!r:.80}")


def load(data: bytes) -> Any:
    """Return what `data` pickles, with `TensorRef`, `Record` and plain containers in place of torch's classes.

    Raises:
        MergeError: the pickle names something that is not on the allow-list, or is damaged.
    """
    try:
        with _ONE_AT_A_TIME, _memory_limit(MEMORY_LIMIT + 64 * len(data)):
            return _Unpickler(io.BytesIO(data)).load()
    except MergeError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything, from KeyError to MemoryError
        raise MergeError(f"its pickle cannot be read ({type(error).__name__}: {error!s:.120})") from error


_ONE_AT_A_TIME = threading.Lock()  # the limit is the process's: two threads would restore each other's


@contextlib.contextmanager
def _memory_limit(extra: int) -> Iterator[None]:
    """Let the process grow by at most `extra` bytes: one damaged memo index makes the unpickler ask for 64 GB."""
    try:
        import resource
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        old = resource.getrlimit(resource.RLIMIT_AS)
        limit = pages * resource.getpagesize() + extra
        resource.setrlimit(resource.RLIMIT_AS, (limit if old[1] < 0 else min(limit, old[1]), old[1]))
    except (ImportError, OSError, ValueError):  # no such limit here: Windows, macOS
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)
