"""Asks for options that differ from rank to rank: sys.argv[1] is JSON, a list of them by rank."""

import json
import sys
import time

from _report import BACKEND, RANK, mark, report  # first: it writes down the process's id

import disttrain as dt
from disttrain.errors import BackendError

try:
    dt.init(BACKEND, **json.loads(sys.argv[1])[RANK])
except BackendError as error:
    report(error=str(error))
    mark("refused")
    time.sleep(3)  # the first that does not catch it ends the others, who are to see their own before
    raise
