import sys
from pathlib import Path

# the tests share the run that `tiny_run.py` also offers as a script
sys.path.insert(0, str(Path(__file__).parent))
