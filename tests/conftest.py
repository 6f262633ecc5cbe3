"""What all tests share: the golden cases and the task importable from anywhere in tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
