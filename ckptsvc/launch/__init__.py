"""What the environment of a process says about its job.

placement    where this rank stands (any launcher)
allocation   which nodes the job has, and which of them this is (`ckptsvc run` under Slurm or PBS)
hostlist     Slurm's short form of many node names
"""

from ckptsvc.launch.placement import LOCAL_JOB, RESTARTS_PER_REQUEUE, Placement, detect

__all__ = ["LOCAL_JOB", "RESTARTS_PER_REQUEUE", "Placement", "detect"]
