# What this project uses of ml_collections, which has no types. What a checker infers from its code instead
# depends on the order in which it reads the files.
from ml_collections import config_dict as config_dict
from ml_collections import config_flags as config_flags
from ml_collections.config_dict import ConfigDict as ConfigDict
