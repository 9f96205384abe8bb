from absl import flags
from ml_collections.config_dict import ConfigDict

class ConfigFileFlagParser(flags.ArgumentParser[ConfigDict]):
    def __init__(self, name: str, lock_config: bool = True) -> None: ...
    # Until it is first read, what raises the error of a file that can't be.
    def parse(self, path: str) -> ConfigDict: ...
