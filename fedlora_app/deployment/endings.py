"""How an executor's process ends, in exit statuses; what has started it reads them."""

from __future__ import annotations

FAULTY = 1  # as Python itself ends
UNUSABLE = 2  # it cannot work here, and starting it again would not help
STOPPED_IN_TASK = 3  # its SuperNode has a reply that says so, and needs a moment to send it
SPOILT = 4  # CUDA is lost to the process; a new one gets it again
