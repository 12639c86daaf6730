"""Under nbval the notebooks run without progress bars, whose text is never twice the same."""

import os

os.environ.setdefault("ADVKD_PROGRESS", "0")
