"""The configuration: one dataclass per group, checked before anything heavy is imported.

The default, type, range and meaning of each option are stated here only. A file in `conf/` names a variant and states
the values that differ from the defaults. Hydra checks names and types while it composes a config. The dataclasses check
values when `load_config` converts the composed config. Only modules at the top of the package read a whole `Config`;
the modules in its folders get the groups that they need.
"""

from gradsift.config.data import *
from gradsift.config.evaluation import *
from gradsift.config.export import *
from gradsift.config.machine import *
from gradsift.config.methods import *
from gradsift.config.models import *
from gradsift.config.run import *
from gradsift.config.schemas import *
