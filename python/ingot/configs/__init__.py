"""Configurations: frozen, keyword-only, with a docstring under each field; the command line and the TOML files are made from them.

Field names follow TRL and transformers where those have a name for the thing. Derived values are methods or properties, never fields.
This package stays light (no numpy, no native code), so that ``ingot --help`` answers at once.
"""

from ingot.configs.checks import check_keys, load_recipe, load_toml, parse_duration, recipe_names, require
from ingot.configs.distill import DistillConfig
from ingot.configs.dpo import DPOConfig
from ingot.configs.grpo import GRPOConfig
from ingot.configs.lora import LoraConfig
from ingot.configs.model import Activation, Architecture, AttentionBias, ModelConfig, Norm, Position
from ingot.configs.online import OnlineConfig
from ingot.configs.ppo import PPOConfig
from ingot.configs.pretrain import PretrainConfig
from ingot.configs.reward import RewardConfig
from ingot.configs.sft import SFTConfig
from ingot.configs.sync import SyncConfig
from ingot.configs.training import Backend, Level, RunConfig, TrainingConfig

__all__ = [
    "Activation",
    "Architecture",
    "AttentionBias",
    "Backend",
    "DPOConfig",
    "DistillConfig",
    "GRPOConfig",
    "Level",
    "LoraConfig",
    "ModelConfig",
    "Norm",
    "OnlineConfig",
    "PPOConfig",
    "Position",
    "PretrainConfig",
    "RewardConfig",
    "RunConfig",
    "SFTConfig",
    "SyncConfig",
    "TrainingConfig",
    "check_keys",
    "load_recipe",
    "load_toml",
    "parse_duration",
    "recipe_names",
    "require",
]
