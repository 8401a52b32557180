import sys
from pathlib import Path

# benchmarks/ is not installed; an installed stellar_fast keeps its place before the checkout
sys.path.append(str(Path(__file__).resolve().parents[2]))
