import sys
from pathlib import Path

# the tests share the seeded weights and images that `make_golden.py` also uses as a script
sys.path.insert(0, str(Path(__file__).parent))
