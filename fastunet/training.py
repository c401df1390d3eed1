"""`fastunet.train.loop` under the name that it was first imported by."""

import sys

from fastunet.train import loop

sys.modules[__name__] = loop
