import sys
from pathlib import Path

# the tiny run of the training tests
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
