"""What every test relies on, whatever the process that runs them was started with.

One thread: the numbers do not depend on the machine, and cores may be shared. Signals are heard:
a job of the background ignores some, and so would the runs that tests start and interrupt.
"""

import os
import signal

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
