"""The configuration: one dataclass per group, checked before anything heavy is imported.

The default, type, range and meaning of each option are stated here only; a file in `conf/` states what differs. Hydra
checks names and types, and the dataclasses check values when `load_config` converts the composed config. Only modules
at the top of the package read a whole `Config`; those in its folders get the groups that they need.
"""

from gradsift.config.checks import *
from gradsift.config.data import *
from gradsift.config.evaluation import *
from gradsift.config.machine import *
from gradsift.config.methods import *
from gradsift.config.models import *
from gradsift.config.run import *
