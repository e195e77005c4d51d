"""The configuration: one dataclass per group of options, checked before slow imports such as torch.

The default, type, range and meaning of each option are stated only here; a file in `conf/` states only what differs
from the defaults. Hydra checks names and types, and the dataclasses check values when `load_config` converts the
composed config. Only the top-level modules of gradsift read a whole `Config`; the modules of its subpackages get only
the groups that they need.
"""

from gradsift.config.checks import *
from gradsift.config.data import *
from gradsift.config.evaluation import *
from gradsift.config.machine import *
from gradsift.config.methods import *
from gradsift.config.models import *
from gradsift.config.run import *
