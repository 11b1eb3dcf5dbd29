"""What a launch file may ask for; that a sharded student trains as a whole one is in test_ranks.py."""

import argparse
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from test_trainer import distiller_of

from glmd.errors import ConfigError
from glmd.strict_yaml import configs_root
from glmd.training.fsdp import FSDP_SETTINGS, OTHER_LAUNCHES, _layer_classes, require_sound_launch, take_up_sharding

FILES = sorted((configs_root() / "accelerate").glob("*.yaml"))


def environment_of(path: Path) -> dict[str, str]:
    """What the launcher tells each process by a file."""
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "-m", "glmd"])
    validated: argparse.Namespace = _validate_launch_command(arguments)[0]
    return {"WORLD_SIZE": str(validated.num_processes), **prepare_multi_gpu_env(validated)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_launch_file_is_one_of_accelerates_and_sound(path, monkeypatch):
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "no", "the run's own key decides"
    assert config.num_processes > 1 or path.stem == "single"
    require_sound_launch(environment_of(path), "bf16")


def test_the_fsdp_file_says_what_glmd_takes_from_it():
    environment = environment_of(configs_root() / "accelerate" / "fsdp2.yaml")
    assert environment["ACCELERATE_USE_FSDP"] == "true" and environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    assert environment["FSDP_RESHARD_AFTER_FORWARD"] == "true"


@pytest.mark.parametrize("name", [*OTHER_LAUNCHES, *FSDP_SETTINGS])
def test_what_would_train_otherwise_than_said_is_refused_by_name(name):
    environment = environment_of(configs_root() / "accelerate" / "fsdp2.yaml") | {name: "true"}
    with pytest.raises(ConfigError, match=re.escape({**OTHER_LAUNCHES, **FSDP_SETTINGS}[name])):
        require_sound_launch(environment, "no")


@pytest.mark.parametrize(
    ("changes", "precision", "message"),
    [
        ({"FSDP_VERSION": "1"}, "no", "fsdp_version 1 is not supported; give fsdp_version: 2"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "no", "may part tied weights; give TRANSFORMER_BASED_WRAP"),
        ({}, "fp16", "mixed_precision fp16 is not supported with FSDP; give bf16"),
        ({"WORLD_SIZE": "1"}, "no", "FSDP has nothing to shard in one process"),
    ],
)
def test_what_fsdp_cannot_do_here_is_refused_with_a_remedy(changes, precision, message):
    environment = environment_of(configs_root() / "accelerate" / "fsdp2.yaml") | changes
    with pytest.raises(ConfigError, match=message):
        require_sound_launch(environment, precision)


def test_without_fsdp_its_settings_say_nothing():
    require_sound_launch({"FSDP_VERSION": "1", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fp16")


def test_the_layers_are_what_is_sharded_by_itself():
    assert _layer_classes(distiller_of()) == {"BertLayer"}


def test_precision_is_that_of_ddp_whatever_accelerate_made_of_it():
    """For bf16 it would sum gradients over ranks, and the loss over tokens, in bf16."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy is not None
    state = SimpleNamespace(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    take_up_sharding(SimpleNamespace(state=state), {"ACCELERATE_USE_FSDP": "true"})
    assert state.fsdp_plugin is plugin and plugin.mixed_precision_policy is None
