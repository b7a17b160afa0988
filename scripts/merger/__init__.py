"""Merge sharded FSDP checkpoints, as verl writes them, into Hugging Face safetensors.

The way of a tensor: `discover` finds the ranks' files, `pickles` and `shardfile` say where in them its pieces lie,
`layout` says where the pieces belong, `checkpoint` checks that the ranks agree, `job` makes every other check and `plan`
lays out the output; `copying` streams the bytes, `publish` puts the finished folder in place.
"""
__version__ = "0.1.0"
DTYPES = ("bfloat16", "float16", "float32", "keep")  # what `--dtype` takes
NAMES = ("files", "memory")  # and `--names`


class MergeError(ValueError):
    """A checkpoint, folder or flag that the user can mend; its text is one line: what, the value, the remedy.

    Whoever wrote the words in it, a terminal shows them and does not act on them.
    """

    def __init__(self, message: str = "") -> None:
        from merger.foreign.text import printable
        super().__init__(printable(message))
