"""What the files and folders of a checkpoint and of a model are called."""
import re

# What verl writes into `global_step_N/actor` and `…/critic`.
RANK_FILE = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")
RANK_PATTERN = "model_world_size_*_rank_*.pt"
ACCELERATE_FILE = re.compile(r"(pytorch_model_fsdp_\d+)_rank(\d+)\.bin")  # a rank's, by accelerate without torch's DCP
STEP_FOLDER = re.compile(r"global_step_(\d+)")
ROLES = ("actor", "critic")
TRACKER = "latest_checkpointed_iteration.txt"  # beside the steps: the last one that was saved whole
FSDP_CONFIG = "fsdp_config.json"
CONTENTS = "ckpt_contents.json"  # of verl's Megatron layout: where the weights are
LORA_META = "lora_train_meta.json"
LORA_FOLDER = "lora_adapter"  # also where a merged adapter goes
MODEL_FOLDER = "huggingface"  # also where a merged model goes

# What torch's own distributed checkpoints are made of; without collectives each rank writes its own metadata.
METADATA = re.compile(r"(?:__(\d+))?\.metadata")
DCP_FILE = re.compile(r"__(\d+)_\d+\.distcp")
DCP_SUFFIX = ".distcp"
SHARD_FILE = re.compile(r"shard-(\d{5,})-model-\d{5,}-of-\d{5,}\.safetensors")
MEGATRON = "common.pt"  # beside `.metadata`, of Megatron's own names and shapes
RANKS, DCP, SHARDED = "FSDP ranks", "torch DCP", "sharded safetensors"  # the forms of a checkpoint

# A model's folder.
CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
CARD = "README.md"
RECORD = "merge.json"
MODEL_STEM, ADAPTER_STEM = "model", "adapter_model"


def weight_index(stem: str = MODEL_STEM) -> str:
    """Return the name of the index of weights that lie in several files.

    >>> weight_index()
    'model.safetensors.index.json'
    """
    return f"{stem}.safetensors.index.json"
