"""Read the pickle inside a `.pt` file without running any of its code.

Every name that the pickle may mention is on the allow-list below and stands for an inert record of what was pickled, so a file
written by any torch from 2.4 on reads alike under any other, and importing torch is not needed. What a pickle does with
inert things may still take years and all memory: it is read under the limits of `foreign.limits`.
"""
import collections
import io
import pickle
import re
from dataclasses import dataclass
from typing import Any

from merger import MergeError
from merger.foreign.text import printable
from merger.foreign.values import as_count, as_list, as_shape, shown

DISTRIBUTED = "torch.distributed"
NPU_FORMAT = "torch_npu.npu._format.Format"  # an enumeration
LOCAL_SHARD = "torch.distributed._shard.sharded_tensor.shard.Shard"  # a ShardedTensor's piece; a placement has that name, too
DEVICE_NAME = re.compile(r"[a-z]{2,20}(:\d{1,4})?", re.ASCII)
# Classes that verl's checkpoints mention. Their modules moved between torch 2.4 and 2.13 (`_tensor` became `tensor`,
# `_shard` stayed), so any home below torch.distributed will do.
DISTRIBUTED_NAMES = frozenset({
    "DTensor", "DTensorSpec", "TensorMeta", "ShardOrderEntry", "DeviceMesh", "_MeshLayout", "_FlatLayout", "Shard",
    "Replicate", "Partial", "_Partial", "_StridedShard", "ShardedTensor", "ShardMetadata", "ShardedTensorMetadata",
    "TensorProperties", "MEM_FORMAT_ENCODING", "EnumerableShardingSpec", "ChunkShardingSpec", "ProcessGroupState",
    "_remote_device", "ReduceOp", "RedOpType"
})
# Those that the `.metadata` of a distributed checkpoint mentions beside them; its save's own path is one of pathlib's.
METADATA_NAMES = frozenset({
    "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
    "_MEM_FORMAT_ENCODING", "_StorageInfo"
})
DATACLASSES = METADATA_NAMES - {"_MEM_FORMAT_ENCODING"}
PATHS = frozenset(f"{module}.{kind}" for module in ("pathlib", "pathlib._local")
                  for kind in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"))
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
# What torch's own classes demand while a pickle is read, of everything in it, used or not: how many arguments, which
# numbers and texts of a state, and of which two the state is a tuple of five.
ARGUMENTS = {"TensorMeta": 3, "ShardOrderEntry": 2}
REBUILT = ("DTensor", )  # by torch's function for it, and never made as such
STATE_NUMBERS = {"Shard": ("dim", ), "_StridedShard": ("dim", "split_factor")}
STATE_TEXTS = {"Partial": ("reduce_op", )}
FIVES = ("ShardedTensor", "TensorProperties")
MEMORY_FORMATS = ("TORCH_CONTIGUOUS_FORMAT", "TORCH_CHANNELS_LAST", "TORCH_PRESERVE_FORMAT")  # of two enumerations
PLAIN_STATES = ("Shard", "_StridedShard", "Replicate", "Partial", "DeviceMesh")  # no pair with a dict of slots
UNSUPPORTED = ("complex", "quint", "qint", "quantized", "bits", "float8_e", "float4_e")  # of element types


class Dtype(str):
    """An element type by torch's name, as a pickle mentions it: no text that it holds is one."""
    __slots__ = ()


class StorageType(str):
    """The element type of a kind of storage, as a pickle mentions that."""
    __slots__ = ()


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
        if cls.__name__ in REBUILT or len(args) != ARGUMENTS.get(cls.__name__, len(args)):
            raise pickle.UnpicklingError(f"a {cls.__name__} of {len(args)} arguments")
        if not _takes(cls.__name__, args):
            raise pickle.UnpicklingError(f"a {cls.__name__} of {shown(args)}")
        return cls.made(*args)

    @classmethod
    def made(cls, *args: Any) -> "Record":
        """Return a record that one of our functions makes."""
        self = object.__new__(cls)
        object.__setattr__(self, "args", args)
        object.__setattr__(self, "state", {})
        return self

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        # A pickled state is a dict, or a pair of a dict (or None) and a dict of slots.
        if type(state) is tuple and len(state) == 2 and self.kind not in (*PLAIN_STATES, *DATACLASSES) and all(
                part is None or type(part) is dict for part in state):
            state = {**(state[0] or {}), **(state[1] or {})}
        if not _fits(self.kind, state):
            raise pickle.UnpicklingError(f"the state of a {self.kind} is none")
        object.__setattr__(self, "state", state)

    def __setattr__(self, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"the pickle tries to set {name} of {type(self).__name__}")

    @property
    def kind(self) -> str:
        """The class's name, without its module."""
        return type(self).__name__


def _takes(kind: str, args: tuple[Any, ...]) -> bool:
    """Return True if `args` are what a dataclass, an enumeration or a path of a `.metadata` is made of."""
    if kind in DATACLASSES:  # by their state
        return not args
    if kind.endswith("MEM_FORMAT_ENCODING"):  # by value, or by name
        return len(args) == 1 and type(
            args[0]) in (int, str) and args[0] in (*range(len(MEMORY_FORMATS)), *MEMORY_FORMATS)
    if kind.endswith("Path"):
        return all(type(part) is str for part in args)
    return True


def _fits(kind: str, state: Any) -> bool:
    """Return True if torch's class `kind` takes `state`."""
    if kind == "Unknown":
        return True
    if kind in FIVES:
        return type(state) is tuple and len(state) == 5 and (kind != "TensorProperties" or str(
            getattr(state[3], "kind", "")).endswith("MEM_FORMAT_ENCODING"))
    if type(state) is not dict or not all(type(name) is str for name in state):
        return False
    if kind == "DeviceMesh" and "_dim_group_names" in state:  # looked up by name, in C++
        names = state["_dim_group_names"]
        return type(names) in (list, tuple) and all(type(name) is str and name.isprintable() for name in names)
    numbers = (state.get(name) for name in STATE_NUMBERS.get(kind, ()))
    texts = (state.get(name) for name in STATE_TEXTS.get(kind, ()))
    return (all(type(number) is int and -2**63 <= number < 2**63 for number in numbers)
            and all(type(text) is str for text in texts))


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


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, dtype: str | None) -> TensorRef:
    if not isinstance(storage, Storage) or dtype is None:
        raise pickle.UnpicklingError("a tensor without a proper storage")
    shape, stride = as_shape(shape), tuple(map(as_count, as_list(stride, "strides")))
    if len(shape) != len(stride):
        raise pickle.UnpicklingError(f"a tensor of shape {shape} with strides {stride}")
    return TensorRef(storage, as_count(offset, "an offset"), shape, stride, dtype)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> TensorRef:
    return _tensor(storage, offset, shape, stride, getattr(storage, "dtype", None))


def _rebuild_tensor_v2(storage: Any,
                       offset: Any,
                       shape: Any,
                       stride: Any,
                       grad: Any,
                       hooks: Any,
                       metadata: Any = None) -> TensorRef:
    tensor = _rebuild_tensor(storage, offset, shape, stride)
    _check_extras(tensor.dtype, grad, hooks, metadata)
    return tensor


def _rebuild_tensor_v3(storage: Any,
                       offset: Any,
                       shape: Any,
                       stride: Any,
                       grad: Any,
                       hooks: Any,
                       dtype: Any,
                       metadata: Any = None) -> TensorRef:
    tensor = _tensor(storage, offset, shape, stride, str(dtype) if _is_dtype(dtype) else None)
    _check_extras(tensor.dtype, grad, hooks, metadata)
    return tensor


def _rebuild_npu_tensor(storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any,
                        info: Any) -> TensorRef:
    """Read a tensor of an Ascend NPU: saved in plain strides, with the format that the device keeps it in (ND, 2, …)."""
    if type(info) not in (bool, int) and not isinstance(info, RECORDS[NPU_FORMAT]):
        raise pickle.UnpicklingError(f"an NPU's tensor of the format {shown(info)}")
    return _rebuild_tensor_v2(storage, offset, shape, stride, grad, hooks)


def _rebuild_device_tensor(data: Any, dtype: Any, device: Any, grad: Any) -> TensorRef:
    """Read a tensor of a device without storages of its own (XLA, MTIA, HPU, …), saved as the CPU's."""
    if not isinstance(data, TensorRef) or not _is_dtype(dtype) or data.dtype != dtype:
        raise pickle.UnpicklingError("a device's tensor that is not the CPU's")
    if type(device) is not str or not DEVICE_NAME.fullmatch(device):
        raise pickle.UnpicklingError("a device of no name")
    _check_extras(data.dtype, grad, None)
    return data


def _check_extras(dtype: str, grad: Any, hooks: Any, metadata: Any = None) -> None:
    """Refuse what torch does, and metadata: a bit of it may negate or conjugate all elements."""
    if type(grad) is not bool or (grad and "float" not in dtype) or not _is_empty(hooks) or not _is_empty(metadata):
        raise pickle.UnpicklingError("a tensor with gradients, hooks or metadata that no checkpoint has")


def _is_empty(value: Any) -> bool:
    return value is None or (type(value) in (dict, collections.OrderedDict) and not value)


def _is_dtype(value: Any) -> bool:
    return type(value) is Dtype


def _rebuild_parameter(data: Any, grad: Any, hooks: Any) -> Any:
    if not isinstance(data, (TensorRef, Record)) or type(grad) is not bool or not _is_empty(hooks):
        raise pickle.UnpicklingError("a parameter of no tensor")
    return data


def _rebuild_wrapper_subclass(cls: Any, dtype: Any, shape: Any, stride: Any, offset: Any, layout: Any, device: Any,
                              grad: Any) -> Record:
    if cls not in (RECORDS["DTensor"],
                   RECORDS["ShardedTensor"]) or layout is not LAYOUT or device is not DEVICE or type(offset) is not int:
        raise pickle.UnpicklingError("a wrapper tensor of no known class")
    strides = as_list(stride, "strides")
    if not _is_dtype(dtype) or len(as_shape(shape)) != len(strides):
        raise pickle.UnpicklingError("a wrapper tensor of no type or shape")
    if not all(type(number) is int and 0 <= number < 2**63 for number in (*strides, offset)):
        raise pickle.UnpicklingError("a wrapper tensor whose strides are no numbers")
    _check_extras(dtype, grad, None)
    record: Record = cls.made(str(dtype), as_shape(shape))
    return record


def _rebuild_from_type_v2(func: Any, kind: Any, args: Any, state: Any) -> Any:
    if not isinstance(func, Function) or type(args) is not tuple:
        raise pickle.UnpicklingError("a tensor rebuilt by no known function")
    value = func(*args)
    if isinstance(value, Record):
        if kind is not type(value):
            raise pickle.UnpicklingError("a tensor rebuilt as another class")
        value.__setstate__(state)
    return value


def _getattr(owner: Any, name: Any) -> Any:
    """Answer the two uses of `getattr`: naming a class nested in ShardedTensor, and a member of an enumeration.

    Python names the latter so in some releases (3.11.0 to 3.11.3), and calls the enumeration with the value in others.
    """
    if owner is RECORDS["ShardedTensor"] and name == "ProcessGroupState":
        return RECORDS[name]
    enumerations = (RECORDS["MEM_FORMAT_ENCODING"], RECORDS[NPU_FORMAT], METADATA["_MEM_FORMAT_ENCODING"])
    if owner in enumerations and isinstance(name, str):
        return owner(name)
    raise MergeError(f"looks up {shown(name)}, which no checkpoint needs; it may run code, so it was not read")


LAYOUT, DEVICE = object(), object()  # of a wrapper tensor: a strided one's, and whichever


def _layout(name: Any) -> Any:
    if type(name) is not str or name != "torch.strided":
        raise pickle.UnpicklingError("a tensor whose elements do not lie in strides")
    return LAYOUT


def _device(name: Any, index: Any = 0) -> Any:
    if type(name) is not str or type(index) is not int or not DEVICE_NAME.fullmatch(name):
        raise pickle.UnpicklingError("a device of no name")
    return DEVICE


FUNCTIONS = {
    "torch.Size": Function(lambda shape: as_shape(shape)),
    "torch.device": Function(_device),
    "torch.serialization._get_layout": Function(_layout),
    "torch._utils._rebuild_tensor": Function(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v2": Function(_rebuild_tensor_v2),
    "torch._utils._rebuild_tensor_v3": Function(_rebuild_tensor_v3),
    "torch._utils._rebuild_parameter": Function(_rebuild_parameter),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": Function(_rebuild_device_tensor),
    "torch_npu.utils.storage._rebuild_npu_tensor": Function(_rebuild_npu_tensor),
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
    NPU_FORMAT: _Sealed("Format", (Record, ), {"__slots__": ()}),
    LOCAL_SHARD: _Sealed("LocalShard", (Record, ), {"__slots__": ()}),
    "torch.Tensor": _Sealed("Tensor", (Record, ), {"__slots__": ()}),
    "torch.storage.UntypedStorage": _Sealed("UntypedStorage", (Record, ), {"__slots__": ()}),
    "torch.nn.parameter.Parameter": _Sealed("Parameter", (Record, ), {"__slots__": ()}),
}

METADATA = {name: _Sealed(name.rpartition(".")[2], (Record, ), {"__slots__": ()}) for name in METADATA_NAMES | PATHS}
UNKNOWN = _Sealed("Unknown", (Record, ), {"__slots__": ()})


class _Unpickler(pickle.Unpickler):

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full == "collections.OrderedDict":
            return collections.OrderedDict
        if full in FUNCTIONS:
            return FUNCTIONS[full]
        if full in RECORDS:
            return RECORDS[full]
        if full == "torch_npu.npu.Format":
            return RECORDS[NPU_FORMAT]
        if name in DISTRIBUTED_NAMES and (module == DISTRIBUTED or module.startswith(DISTRIBUTED + ".")):
            return RECORDS[name]
        if module == "torch" and name in DTYPES:
            return Dtype(name)
        if module == "torch" and name in STORAGE_DTYPES:
            return StorageType(STORAGE_DTYPES[name])
        if module == "torch" and name.lower().startswith(UNSUPPORTED):
            raise MergeError(
                f"has a tensor of torch.{printable(name, 80)}, which is not supported; save the checkpoint without it")
        raise MergeError(
            f"mentions {printable(full, 200)}, which no checkpoint needs; it may run code, so it was not read")

    def persistent_load(self, pid: Any) -> Storage:
        if type(pid) is tuple and len(pid) == 5 and type(pid[0]) is str and pid[0] == "storage":
            _, dtype, key, _, numel = pid
            if type(key) is str and (type(dtype) is StorageType or dtype is RECORDS["torch.storage.UntypedStorage"]):
                known = str(dtype) if type(dtype) is StorageType else None
                return Storage(key, known, as_count(numel, "a storage's elements"))
        raise pickle.UnpicklingError(f"an unknown kind of storage: {shown(pid)}")


class _MetadataUnpickler(_Unpickler):

    def find_class(self, module: str, name: str) -> Any:
        known = f"{module}.{name}" if f"{module}.{name}" in PATHS else name
        if known in PATHS or (known in METADATA_NAMES and module.startswith(DISTRIBUTED + ".checkpoint.")):
            return METADATA[known]
        return super().find_class(module, name)


class _Skimmer(_Unpickler):
    """Takes any name, and makes an inert record of whatever it stands for."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except MergeError:
            return UNKNOWN


def skim(data: bytes) -> Any:
    """Return what `data` pickles as `load` does, with inert records of things that no allow-list names.

    For what is asked a question or two, and is no part of the model.

    Raises:
        MergeError: the pickle is damaged.
    """
    return _loaded(_Skimmer, data)


def load(data: bytes, metadata: bool = False) -> Any:
    """Return what `data` pickles, with `TensorRef`, `Record` and plain containers in place of torch's classes.

    Args:
        metadata: it is a distributed checkpoint's `.metadata`.

    Raises:
        MergeError: the pickle names something that is not on the allow-list, or is damaged.
    """
    return _loaded(_MetadataUnpickler if metadata else _Unpickler, data)


def _loaded(unpickler: type[_Unpickler], data: bytes) -> Any:
    try:
        return unpickler(io.BytesIO(data)).load()
    except MergeError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything, from KeyError to MemoryError
        raise MergeError(f"its pickle cannot be read ({type(error).__name__}: {printable(str(error), 120)})") from error
