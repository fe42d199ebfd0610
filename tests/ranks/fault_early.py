"""One rank ends as soon as it has trained, the others have more to do that needs nobody. Argument: the first to end."""

import sys
import time

import keras
from _report import BACKEND, RANK, report  # first: it writes down the process's id
from fault_parts import batch, build, losses

import disttrain as dt

comm = dt.init(BACKEND, stall_timeout=2)
with comm.scope():
    model, optimizer = build(), keras.optimizers.SGD(0.01)
step = dt.TrainStep(model, optimizer, loss_fn=losses, comm=comm, jit=False)
for index in range(2 + RANK):
    step(batch(RANK, index))
joined = step.join()
if int(sys.argv[1]) != RANK:
    time.sleep(6)  # longer than the watchdog waits for anybody
report(joined=joined)
