"""Under nbval the notebooks draw no progress bars, whose text is never twice the same, and leave figures/ as it is."""

import os
import tempfile

os.environ.setdefault("ADVKD_PROGRESS", "0")
os.environ.setdefault("ADVKD_FIGURES", tempfile.mkdtemp(prefix="advkd-figures-"))
