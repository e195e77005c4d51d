"""The configuration: one dataclass per group, checked before anything heavy is imported.

Each option has its default, type, range and meaning here, and nowhere else; the files in `conf/` name a variant and
state what differs. Hydra checks names and types while it composes. The dataclasses check values when `load_config`
converts the result. Below `pipeline.py` and `line.py` nothing reads a whole `Config`.
"""

from gradsift.config.data import *
from gradsift.config.evaluation import *
from gradsift.config.export import *
from gradsift.config.machine import *
from gradsift.config.methods import *
from gradsift.config.models import *
from gradsift.config.run import *
from gradsift.config.schemas import *
