"""Students too large for one device: FSDP2 through Accelerate, as its launch file asks for it.

    require_sound_launch(os.environ, mixed_precision)     # before anything is loaded
    take_up_sharding(accelerator)
    model, optimizer = prepare_sharded(accelerator, distiller, optimizer)

Ranks then hold a part of each weight, its gradient and its moments. What is written and read is whole: by name, as
without sharding.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from glmd.distillation.distiller import Distiller
from glmd.errors import ConfigError
from glmd.models.heads import backbone, backbone_prefix
from glmd.models.layers import layer_lists, layer_stacks

# What Accelerate's launcher says by its environment, why that is refused, and what would work.
OTHER_LAUNCHES = {
    "ACCELERATE_USE_DEEPSPEED": "distributed_type DEEPSPEED (ZeRO) keeps its own files, which glmd can neither verify "
    "nor read whole; configs/accelerate/fsdp2.yaml shards the same",
    "ACCELERATE_USE_MEGATRON_LM": "distributed_type MEGATRON_LM wants models of its own; configs/accelerate/fsdp2.yaml "
    "shards any",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config is not supported; remove it: FSDP2 shards over all ranks",
}
FSDP_SETTINGS = {
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "fsdp_cpu_ram_efficient_loading, true where it is not given, would leave the "
    "teacher of all ranks but one empty; give false",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing would draw another dropout for the gradient than "
    "for the loss; give false",
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params is not supported; give false",
    "FSDP_IGNORED_MODULES": "fsdp_ignored_modules would keep gradients from other ranks; remove it",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "fsdp_transformer_layer_cls_to_wrap would have to fit every student and teacher of "
    "a run; remove it: their layers are found",
}


def require_sound_launch(environment: Mapping[str, str], mixed_precision: str, *, compiles: bool = False) -> None:
    """Refuse what a launch file asks for and would train otherwise than said. Raises ConfigError, one line."""

    def says(name: str) -> bool:
        return environment.get(name, "").lower() not in ("", "0", "false", "none")

    for name, problem in OTHER_LAUNCHES.items():
        if says(name):
            raise ConfigError(f"accelerate: {problem}")
    if not _asks_for_fsdp(environment):
        return
    version, policy = environment.get("FSDP_VERSION", "1"), environment.get("FSDP_AUTO_WRAP_POLICY", "")
    if version != "2":
        raise ConfigError(f"accelerate: fsdp_version {version} is not supported; give fsdp_version: 2")
    if policy.upper() == "SIZE_BASED_WRAP":
        raise ConfigError(
            "accelerate: fsdp_auto_wrap_policy SIZE_BASED_WRAP may part tied weights; give TRANSFORMER_BASED_WRAP"
        )
    for name, problem in FSDP_SETTINGS.items():
        if says(name):
            raise ConfigError(f"accelerate: {problem}")
    if mixed_precision == "fp16":
        raise ConfigError("mixed_precision fp16 is not supported with FSDP; give bf16")
    if compiles:
        raise ConfigError("torch_compile is not supported with FSDP; give torch_compile: false")
    if int(environment.get("WORLD_SIZE", "1")) == 1:
        raise ConfigError("accelerate: FSDP has nothing to shard in one process; launch more, or with single.yaml")


def _asks_for_fsdp(environment: Mapping[str, str]) -> bool:
    return environment.get("ACCELERATE_USE_FSDP", "").lower() == "true"  # as Accelerate reads it


def take_up_sharding(accelerator: Accelerator, environment: Mapping[str, str]) -> None:
    """Shard on every kind of device where FSDP is asked for, and with the precision that there is without it."""
    if not _asks_for_fsdp(environment):
        return
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate makes plain DDP of it on a CPU, without a word.
        _set_type(accelerator, DistributedType.FSDP)
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
    # It would sum gradients over ranks, and the loss over tokens, in bf16. Autocast gives what DDP has.
    state.fsdp_plugin.mixed_precision_policy = None


def end_sharding(accelerator: Accelerator) -> None:
    """Leave the state of this process as it was, for a next run on a CPU."""
    if is_sharded(accelerator) and accelerator.device.type == "cpu":
        _set_type(accelerator, DistributedType.MULTI_CPU)


def _set_type(accelerator: Accelerator, kind: DistributedType) -> None:
    # Each has its own, and the second is copied into the first by and by.
    accelerator.state.distributed_type = PartialState().distributed_type = kind


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether ranks share out the student's weights."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def prepare_sharded(
    accelerator: Accelerator, distiller: Distiller, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, Any]:
    """Shard a distiller in place, each layer of its backbone by itself and all else together, and its optimizer."""
    # Models also name their embeddings as not to be split; tied weights have to lie in one group, that of the whole.
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(_layer_classes(distiller))
    model, prepared = accelerator.prepare(distiller, optimizer)
    return model, prepared


def shard_backbones(models: Sequence[nn.Module], device: torch.device) -> None:
    """Share out over all ranks the backbone that frozen models have in common, layer by layer. Heads stay whole.

    Each layer is moved to the device and cut there before the next, and gathered for its own forward: all ranks have to
    call the backbone equally often. The models are on the CPU before, and on the device then.
    """
    body, mesh = backbone(models[0]), init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    inside = {id(each) for each in body.buffers()} | {id(each) for each in body.parameters()}
    for model in models:
        model.requires_grad_(False)
        for each in (*model.parameters(), *model.buffers()):
            if id(each) not in inside:
                each.data = each.data.to(device)
    prefix = backbone_prefix(models[0])
    for name, layers in layer_lists(models[0]).items():
        for layer in layers if name.startswith(prefix) else ():
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    whole = type(body)
    fully_shard(body, mesh=mesh, reshard_after_forward=True)
    # By the name of its class transformers knows what a forward can give, and a sharded module has a class of its own.
    type(body).__module__, type(body).__qualname__ = whole.__module__, whole.__qualname__


def _layer_classes(distiller: Distiller) -> set[str]:
    """Names of the classes of the students' layers; of a model that repeats one layer there are none."""
    found: set[str] = set()
    for model in (distiller.language_model, distiller.classifier):
        for lists in layer_stacks(model) if model is not None else ():
            layers = lists[min(lists, key=len)] if lists else ()
            found |= {type(layer).__name__ for layer in layers}
    return found


@torch.no_grad()
def full_tensors(tensors: Mapping[str, Tensor], *, wanted: bool = True) -> dict[str, Tensor]:
    """Each tensor with all of its parts, on the CPU if ranks share it. All ranks must call; only some may want it."""
    found = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor  # one at a time on the device
        if wanted:
            found[name] = full
    return found


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """What this rank holds of a whole tensor, which all ranks have, where `like` lies."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements)
