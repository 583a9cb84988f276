"""A small job for the schedulers' tests: one number that is the step, kept equal on all ranks.

python train.py STORE STEPS SECONDS_PER_STEP
"""

import os
import sys
import time

import torch
import torch.distributed as dist

import ckptsvc

store, steps, pause = os.path.expandvars(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
dist.init_process_group("gloo")
value = torch.zeros(1000)
run = ckptsvc.attach({"value": value}, store=store, every="3s")
rank, world, node = dist.get_rank(), dist.get_world_size(), os.environ["CKPTSVC_NODE"]
print(f"attached step={run.steps_done} world={world} node={node} from={run.restored_from}", flush=True)
assert value[0].item() == run.steps_done, "restored another state than that of its step"
while run.steps_done < steps:
    time.sleep(pause)
    value += 1
    together = value.clone()
    dist.all_reduce(together)
    assert together[0].item() == world * value[0].item()
    run.step()
    if rank == 0 and run.steps_done % 20 == 0:
        print(f"done step={run.steps_done} world={world}", flush=True)
run.save(wait=True)
print(f"finished step={run.steps_done}", flush=True)
run.close()
dist.destroy_process_group()
