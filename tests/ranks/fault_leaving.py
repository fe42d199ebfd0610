"""A rank takes long to say good-bye, and the others hear how it does. Argument: which."""

import sys
import time

from _report import BACKEND, RANK, report  # first: it writes down the process's id

import disttrain as dt
from disttrain.comm.watchdog import Watchdog

comm = dt.init(BACKEND, stall_timeout=6)
send = Watchdog._send


def late(watchdog, **message):
    if message["kind"] == "bye":
        time.sleep(1.5)  # longer than the line rests between two looks
    send(watchdog, **message)


comm.barrier()
if int(sys.argv[1]) == RANK:
    Watchdog._send = late
    comm.close()
time.sleep(3)  # longer than it takes to judge who has gone
report(done=True)
comm.close()
