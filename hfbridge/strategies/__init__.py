"""How the ranks of a run share the work: strategies of Lightning's, each on GPUs and on CPUs."""

from hfbridge.strategies.ddp import DDPStrategy
from hfbridge.strategies.deepspeed import DeepSpeedStrategy
from hfbridge.strategies.fsdp import FSDPStrategy
from hfbridge.strategies.fsdp2 import FSDP2Strategy
from hfbridge.strategies.launcher import ScriptLauncher, close_group_at_exit, launched_ranks, rank_variables
from hfbridge.strategies.lightnings import needs_equal_batches, sharing_of
from hfbridge.strategies.make import make_strategy
from hfbridge.strategies.sharing import Sharing

__all__ = [
    "DDPStrategy",
    "DeepSpeedStrategy",
    "FSDP2Strategy",
    "FSDPStrategy",
    "ScriptLauncher",
    "Sharing",
    "close_group_at_exit",
    "launched_ranks",
    "make_strategy",
    "needs_equal_batches",
    "rank_variables",
    "sharing_of",
]
