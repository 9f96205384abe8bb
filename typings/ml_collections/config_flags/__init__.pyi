from typing import Any

from absl import flags
from ml_collections.config_dict import ConfigDict
from ml_collections.config_flags import config_flags as config_flags

def DEFINE_config_file(
    name: str, default: str | None = None, help_string: str = ..., *, lock_config: bool = True
) -> flags.FlagHolder[ConfigDict]: ...
def get_config_filename(flag: flags.FlagHolder[ConfigDict] | flags.Flag[ConfigDict]) -> str: ...
def get_override_values(flag: flags.FlagHolder[ConfigDict] | flags.Flag[ConfigDict]) -> dict[str, Any]: ...
