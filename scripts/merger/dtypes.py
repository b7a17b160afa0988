"""Element types by torch's names, as numpy and safetensors know them."""
import ml_dtypes
import numpy as np

NUMPY: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "float64": np.float64,
        "float32": np.float32,
        "float16": np.float16,
        "bfloat16": ml_dtypes.bfloat16,
        "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
        "float8_e5m2": ml_dtypes.float8_e5m2,
        "int64": np.int64,
        "int32": np.int32,
        "int16": np.int16,
        "int8": np.int8,
        "uint64": np.uint64,
        "uint32": np.uint32,
        "uint16": np.uint16,
        "uint8": np.uint8,
        "bool": np.bool_,
    }.items()
}

# https://github.com/huggingface/safetensors: the `dtype` field of a tensor's header entry.
SAFETENSORS = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}

# What `--dtype` converts. Integers, booleans and 8-bit floats mean what their bits say: they keep their type.
CONVERTED = frozenset({"float64", "float32", "float16", "bfloat16"})


def itemsize(dtype: str) -> int:
    """Return the bytes of one element."""
    return NUMPY[dtype].itemsize


def output_dtype(dtype: str, wanted: str) -> str:
    """Return the type that a tensor of `dtype` is written as when the user wants `wanted` (a name or `keep`)."""
    return wanted if wanted != "keep" and dtype in CONVERTED else dtype
